"""Sums of pooled rows by emotion and topic, in float64: all that a mean over any subset of topics needs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int
from torch import Tensor

if TYPE_CHECKING:
    from emolens.collect.activations import Activations


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums of pooled rows by group, which is all that a difference of means needs of a corpus.

    Attributes:
        groups: (split, emotion, topic) of each group, in order of appearance; topics as `with_topics` names them.
        n: `[group]` rows in it.
        total: `[group layer d_model]` their sum, in float64.
        person: Grammatical person of each topic of the main texts.

    Example:
        >>> moments = acts.moments()
        >>> moments.emotions, moments.total.shape[1:]
        (['glimmer', 'gloamer', 'brindle', 'tarrow'], torch.Size([3, 32]))
    """

    groups: tuple[tuple[str, str | None, str], ...]
    n: Int[Tensor, " group"]
    total: Float64[Tensor, "group layer d_model"]
    person: dict[str, str | None]

    @staticmethod
    def of(chunks: Iterable[Activations]) -> Moments:
        """Add up chunk by chunk, in their order: the same chunks give the same bits.

        Args:
            chunks: Activations of slices of one corpus.

        Returns:
            `Moments`.

        Example:
            >>> em.collect.Moments.of(acts.chunks()).n.sum() == len(acts.rows)
            tensor(True)
        """
        n: dict[tuple[str, str | None, str], int] = {}
        total: dict[tuple[str, str | None, str], Tensor] = {}
        person: dict[str, str | None] = {}
        for chunk, topics in with_topics(chunks):
            pairs = list(zip(chunk.texts, topics, strict=True))
            groups = [(t.split, t.emotion, topic) for t, topic in pairs]
            for group in dict.fromkeys(groups):
                mine = torch.tensor([g == group for g in groups])[chunk.row_text]
                n[group] = n.get(group, 0) + int(mine.sum())
                added = chunk.rows[mine].sum(0, dtype=torch.float64)
                total[group] = total[group] + added if group in total else added
            person |= {topic: t.person for t, topic in pairs if t.split == "main"}
        if not total:
            empty = torch.zeros((0, 0, 0), dtype=torch.float64)
            return Moments((), torch.zeros(0, dtype=torch.long), empty, person)
        return Moments(
            tuple(n), torch.tensor(list(n.values())), torch.stack(list(total.values())), person
        )

    @property
    def emotions(self) -> list[str]:
        """Emotions of the main texts, in order of appearance."""
        return list(
            dict.fromkeys(e for split, e, _ in self.groups if e is not None and split == "main")
        )

    def counts(self, without: Container[str] = ()) -> Int[Tensor, " emotion"]:
        """Main texts of each emotion.

        Args:
            without: Topics that are left out.

        Returns:
            `[emotion]`, a copy.

        Example:
            >>> bool((acts.moments().counts(without=[acts.texts[0].topic]) < acts.moments().counts()).all())
            True
        """
        return self._sums(without)[0]

    def means(self, without: Container[str] = ()) -> Float64[Tensor, "emotion layer d_model"]:
        """Mean over the main texts of each emotion; NaN where nothing is left.

        Args:
            without: Topics that are left out.

        Returns:
            `[emotion layer d_model]` in float64, a copy.

        Example:
            >>> acts.moments().means().shape
            torch.Size([4, 3, 32])
        """
        n, total = self._sums(without)
        return total / n[:, None, None]

    def _sums(self, without: Container[str]) -> tuple[Tensor, Tensor]:
        names = self.emotions
        n = torch.zeros(len(names), dtype=torch.long)
        total = self.total.new_zeros((len(names), *self.total.shape[1:]))
        for k, (split, emotion, topic) in enumerate(self.groups):
            if split == "main" and emotion is not None and topic not in without:
                n[names.index(emotion)] += self.n[k]
                total[names.index(emotion)] += self.total[k]
        return n, total


UNTOLD = 16  # parts into which the texts of an emotion are dealt where no topic is known


def with_topics(chunks: Iterable[Activations]) -> Iterator[tuple[Activations, list[str]]]:
    """Each chunk with the topic of each of its texts; those without one are dealt, emotion by emotion, to `UNTOLD` parts in turn."""
    seen: dict[tuple[str, str | None], int] = {}
    for chunk in chunks:
        topics = []
        for t in chunk.texts:
            if t.topic is not None:
                topics.append(t.topic)
                continue
            k = seen[t.split, t.emotion] = seen.get((t.split, t.emotion), -1) + 1
            topics.append(f"#{k % UNTOLD}")
        yield chunk, topics
