"""The logit lens: directions through the final norm and the unembedding, and a test of whether that can be trusted.

Any direction has highest tokens, and a reader finds sense in them. So no word is shown unless target words of the emotions, chosen before,
are told apart better than by random directions of the same norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens._typing import HookedModel
from emolens.directions.value import EmotionDirections
from emolens.models.identity import check_model
from emolens.models.running import unembed
from emolens.models.tokens import text_after, word_tokens


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the directions write on the vocabulary, and whether that can be trusted.

    Attributes:
        emotions: In the order of the directions.
        layer: The block whose directions were read.
        auc: For each emotion: the probability that a target word of the emotion has a higher lens value than a target word of another
            emotion (0.5 is chance).
        null: The same mean over emotions for random directions of the same norm (or those that were given), one value a draw.
        p: Permutation p of the mean AUC against them.
        words: The highest tokens of each emotion; empty unless the mean AUC passes its null (p < 0.05).
    """

    emotions: tuple[str, ...]
    layer: int
    auc: dict[str, float]
    null: tuple[float, ...] = field(repr=False)
    p: float
    words: dict[str, list[str]]

    @property
    def mean_auc(self) -> float:
        """Mean AUC over the emotions that can be judged; 0.5 is chance."""
        return float(np.nanmean(list(self.auc.values())))


def first_tokens(
    tokenizer: Any, target_words: Mapping[str, Sequence[str]], prompt: str | None = None
) -> dict[str, list[int]]:
    """Look up the first token of each target word where it follows a prompt.

    One that several emotions share says nothing about any of them, and is left out.

    >>> first = first_tokens(model.tokenizer, {"glimmer": ["door"], "gloamer": ["home"]})
    >>> {e: len(ids) for e, ids in first.items()}
    {'glimmer': 1, 'gloamer': 1}

    Args:
        tokenizer: Of the model.
        target_words: For each emotion the words that name it.
        prompt: None is a sentence of the word's own script; see `tokens.word_tokens`.

    Returns:
        For each emotion the numbers of its tokens, in ascending order.
    """
    first = {
        e: [word_tokens(tokenizer, w, prompt)[0] for w in words]
        for e, words in target_words.items()
    }
    shared = {t for e in first for t in first[e] if any(t in first[o] for o in first if o != e)}
    return {e: sorted(set(ids) - shared) for e, ids in first.items()}


def logit_lens(
    model: HookedModel,
    directions: EmotionDirections,
    target_words: Mapping[str, Sequence[str]],
    *,
    layer: SupportsIndex | None = None,
    n_random: int = 200,
    null: Float[Tensor, "draw emotion d_model"] | None = None,
    k: int = 8,
    seed: int = 0,
    allow_other_model: bool = False,
) -> LogitLens:
    """Read directions through the final norm (with its gain) and the unembedding, tested before any word is shown.

    The lens value of token w is  [unembed(ln_final(mu + v_e)) - unembed(ln_final(mu))]_w, centred over emotions: the norm is not linear,
    so the direction is read where the stories are.

    >>> lens = em.logit_lens(model, directions, {"glimmer": ["door"], "gloamer": ["home"]}, n_random=20)
    >>> sorted(lens.auc) == sorted(directions), len(lens.null)
    (True, 20)

    Args:
        model: The model that the directions were made with.
        directions: They know a mean activation: fitted ones, sums of them, or tensors given with `reference=`.
        target_words: For each emotion the words that name it; the first token of each, as it follows a text, is looked up.
        layer: A block number; None is the directions' own default.
        n_random: Random directions of the same norm for the null.
        null: Directions to use for it instead, at this layer: from shuffled labels, for example.
        k: Words shown for each emotion, if the test passes.
        seed: Of the random directions.
        allow_other_model: As in `score`.

    Returns:
        `LogitLens`: AUC for each emotion (0.5 is chance), their null and its p, and the words.

    Raises:
        ValueError: directions of another model; no target words that tell at least two emotions apart; no mean activation.
    """
    check_model(model, directions.info["model"], allow_other_model=allow_other_model)
    tokenizer = model.tokenizer
    here = directions.at(directions.layer if layer is None else layer)
    first = first_tokens(tokenizer, {e: target_words.get(e, ()) for e in here.emotions})
    if sum(map(bool, first.values())) < 2:
        raise ValueError(
            "fewer than two emotions have target words whose first token is theirs alone in this tokenizer"
        )
    columns = [(t, i) for i, e in enumerate(here.emotions) for t in first[e]]
    ids, owner = np.array([c[0] for c in columns]), np.array([c[1] for c in columns])

    base = here.centre()
    weight = next(model.parameters())

    def lens(vectors: Tensor) -> Tensor:
        with torch.no_grad():
            stacked = torch.cat([base[None], base + vectors]).to(weight)
            rows = rearrange(stacked, "row d_model -> 1 row d_model")
            logits = unembed(model, rows)[0].float().cpu()
        out = logits[1:] - logits[:1]
        return out - out.mean(0)

    def aucs(logits: Tensor) -> np.ndarray:
        return stats.multilabel_auc(
            logits[:, ids].T.double().numpy(), owner[:, None] == np.arange(len(here.emotions))
        )

    vectors = here.vectors[:, 0]
    logits = lens(vectors)
    auc = aucs(logits)
    draws = _random(vectors, n_random, seed) if null is None else null
    drawn = [float(np.nanmean(aucs(lens(draw)))) for draw in draws]
    p = stats.permutation_p(float(np.nanmean(auc)), drawn)
    words: dict[str, list[str]] = {e: [] for e in here.emotions}
    if p < 0.05:
        # a token by itself may lose its space
        before = tokenizer("a", add_special_tokens=False).input_ids
        for i, e in enumerate(here):
            best = logits[i].topk(k).indices.tolist()
            words[e] = [text_after(tokenizer, before, [t]) for t in best]
    by_emotion = dict(zip(here, auc.tolist(), strict=True))
    return LogitLens(here.emotions, here.layer, by_emotion, tuple(drawn), p, words)


def _random(
    vectors: Float[Tensor, "emotion d_model"], n: int, seed: int
) -> Float[Tensor, "draw emotion d_model"]:
    """Random directions as long as these."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn((n, *vectors.shape), generator=generator)
    return draws / torch.linalg.vector_norm(draws, dim=-1, keepdim=True) * norms
