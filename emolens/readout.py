"""Read emotions from text with directions: calibrated scores, and the logit lens with its own test.

An uncentred projection is the largest error in published readouts: raw activations share a component that dwarfs every emotion.
Here s_e(x) = (x - mu) . v_e/|v_e|, and the score is z_e = (s_e - mean_e) / std_e with mean and spread of held-out stories (texts) or
of neutral text at the same position (tokens). Below the band of neutral text of the same length (position) the answer is "none"; how often neutral
text of unknown topics still lies above it was measured, and is said beside it. Raw projections are there by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens._typing import HookedModel
from emolens.collect.forward import collect
from emolens.collect.pooling import Pooling, char_span, every_token, last_token, mean_over_tokens
from emolens.collect.recipe import Texts
from emolens.directions.algebra import project
from emolens.directions.value import EmotionDirections, position_bin
from emolens.models.identity import check_model
from emolens.models.running import unembed
from emolens.models.tokens import encode, text_after, word_tokens
from emolens.sets.corpus import Long, open_corpus
from emolens.shards import vacant, written_whole

SHOWN = 3  # emotions of a row, in the table and in the view
SHORT = 8  # pooled tokens; below this a text score rests on little


@dataclass(frozen=True, eq=False)
class Scores:
    """Calibrated scores of texts, or of their tokens. In Jupyter they show themselves.

    Attributes:
        values: `[text emotion]` z scores (standard deviations of held-out stories), or for tokens `[token emotion]` z scores against
            neutral text.
        raw: The same shape, (x - mu) . v/|v|, in the residual stream's units.
        texts: The texts as they were read (chat messages rendered).
        text_of: `[token]` index of each token's text, or the row itself for texts.
        spans: Characters of its text that a token stands for; the whole text otherwise.
        band: `[row]` a highest score below it is within what 95 % of neutral texts as long (neutral tokens at that position) do.
        rate: `[row]` the share of neutral texts of held-out topics that were measured above the band; NaN where it was not measured.
        flags: For each text: "short" (few tokens), "training" (its directions were made from this very text), "cut" (longer than the model
            reads, its beginning was read) or "left out" (the same, it has no row).
    """

    emotions: tuple[str, ...]
    values: Float[Tensor, "row emotion"]
    raw: Float[Tensor, "row emotion"]
    per: Literal["text", "token"]
    layer: int
    texts: tuple[str, ...]
    text_of: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    band: Float[Tensor, " row"]
    rate: Float[Tensor, " row"]
    flags: tuple[tuple[str, ...], ...]
    info: dict[str, Any] = field(repr=False)

    @property
    def labels(self) -> list[str]:
        """The highest emotion of each row, or "none" inside the neutral band."""
        best, index = self.values.max(1)
        above = (best > self.band).tolist()
        return [
            self.emotions[i] if shown else "none"
            for shown, i in zip(above, index.tolist(), strict=True)
        ]

    @property
    def band_in_words(self) -> str:
        """The band and how often neutral text was measured above it.

        For example ``none below 2.1 to 3.4 by length; 4 to 6 % of neutral texts of unknown topics lie above``.
        """
        what = "texts" if self.per == "text" else "tokens"
        known, n = self.rate[~self.rate.isnan()], len(self)
        by = " by length" if self.per == "text" else " by position"
        band = f"none below {_range(self.band, '.1f', by)}"
        if not len(known):
            return f"{band}; how many neutral {what} lie above was not measured: too few were collected, or by an earlier version"
        rest = f" (not measured for {n - len(known)} of {n} {what})" if len(known) < n else ""
        return f"{band}; {_range(100 * known, '.0f')} % of neutral {what} of held-out topics lie above{rest}"

    def top(self, k: int = 3) -> list[list[tuple[str, float]]]:
        """The k highest emotions of each row with their z."""
        values, index = self.values.topk(min(k, len(self.emotions)), dim=1)
        return [
            [(self.emotions[j], float(v)) for v, j in zip(vs, js, strict=True)]
            for vs, js in zip(values.tolist(), index.tolist(), strict=True)
        ]

    def column(self, emotion: str) -> int:
        """Column of an emotion; KeyError with the known ones otherwise."""
        if emotion not in self.emotions:
            raise KeyError(f"no emotion {emotion!r} here; there are: {', '.join(self.emotions)}")
        return self.emotions.index(emotion)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return self.table(20)

    def table(self, rows: int | None = None) -> str:
        """The rows as lines of text: label, the highest emotions with their z (in brackets inside the neutral band), flags.

        Args:
            rows: At most so many; None takes all.
        """
        shown = len(self) if rows is None else min(rows, len(self))
        lines = [f"Scores per {self.per}, layer {self.layer}, z ({self.band_in_words})"]
        for row, (label, best) in enumerate(
            zip(self.labels[:shown], self.top(SHOWN), strict=False)
        ):
            start, end = self.spans[row]
            text = self.texts[self.text_of[row]][start:end].replace("\n", " ")
            band = float(self.band[row])
            said = [f"{e} {z:+.1f}" if z > band else f"({e} {z:+.1f})" for e, z in best]
            flags = [f"[{f}]" for f in self.flags[self.text_of[row]]] if self.per == "text" else []
            lines.append(
                f"  {text if len(text) <= 50 else text[:47] + '...'!r:<54} {label:<13} {'  '.join([*said, *flags])}"
            )
        if shown < len(self):
            lines.append(f"  ... {len(self) - shown} more")
        if left := sum("left out" in flags for flags in self.flags):
            lines.append(f"  {left} texts left out: longer than the model reads")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, emotions: Sequence[str] | None = None, limit: float = 4.0) -> str:
        """A self-contained view: coloured tokens, or a bar for each emotion of a text.

        Args:
            emotions: Rows of the token view, bars of a text; None takes the three that are highest in each text.
            limit: The z that gets the full colour.
        """
        style = "font:14px/1.7 system-ui,sans-serif;color:#1d2433;background:#fff;padding:8px;max-width:52em"
        parts, asked = (
            [f'<div style="{style}">'],
            None if emotions is None else [self.column(e) for e in emotions],
        )
        for t, text in enumerate(self.texts):
            rows = [i for i, owner in enumerate(self.text_of) if owner == t]
            if not rows:
                continue
            if self.per == "text":
                parts.append(self._text_html(rows[0], text, asked))
                continue
            values = self.values[rows]
            order = asked
            if (
                order is None
            ):  # the mean of the five highest tokens, so that one odd token does not choose
                order = (
                    values.topk(min(5, len(rows)), dim=0)
                    .values.mean(0)
                    .argsort(descending=True)[:3]
                    .tolist()
                )
            for e in order:
                spans = [self.spans[i] for i in rows]
                parts.append(f'<div style="margin:4px 0"><b>{escape(self.emotions[e])}</b> ')
                parts.append(
                    token_html(text, spans, values[:, e].tolist(), self.band[rows].tolist(), limit)
                    + "</div>"
                )
        scale = (
            "z against neutral text at the same position"
            if self.per == "token"
            else "z against held-out stories"
        )
        parts.append(
            f'<div style="font-size:12px;color:#667">layer {self.layer}; {scale}; '
            f"grey: inside the band of neutral text, where nothing is claimed ({self.band_in_words})</div></div>"
        )
        return "".join(parts)

    def _text_html(self, row: int, text: str, asked: Sequence[int] | None) -> str:
        label = self.labels[row]
        flags = "".join(
            f' <small style="color:#a40">[{escape(f)}]</small>'
            for f in self.flags[self.text_of[row]]
        )
        shown = escape(text if len(text) < 600 else text[:600] + " ...")
        best = (
            self.top(SHOWN)[row]
            if asked is None
            else [(self.emotions[e], float(self.values[row, e])) for e in asked]
        )
        bars = "".join(
            f'<div style="display:flex;align-items:center"><span style="width:8em">{escape(e)}</span>'
            f'<span style="background:{"#d9622b" if z > float(self.band[row]) else "#c9ccd3"};height:9px;width:{max(0.0, min(z, 6.0)) * 2.2:.2f}em"></span>'
            f'<span style="margin-left:6px;color:#667">{z:+.1f}</span></div>'
            for e, z in best
        )
        return f'<div style="margin:8px 0"><div><bdi>{shown}</bdi></div><b>{escape(label)}</b>{flags}{bars}</div>'


def _range(values: Tensor, form: str, by: str = "") -> str:
    """One number, or the least and the largest."""
    low, high = f"{float(values.min()):{form}}", f"{float(values.max()):{form}}"
    return low if low == high else f"{low} to {high}{by}"


def token_html(
    text: str,
    spans: Sequence[tuple[int, int]],
    values: Sequence[float],
    bands: Sequence[float],
    limit: float,
) -> str:
    """Text with each token's background from blue (low) over white (inside its band) to orange (high); everything escaped."""
    out, at = [], 0
    for (start, end), z, band in zip(spans, values, bands, strict=True):
        if start < at:  # a character of several tokens belongs to the first
            start = at
        if end <= start:
            continue
        strength = (
            0.0
            if abs(z) <= band
            else min((abs(z) - band) / max(limit - band, 1e-6) * 0.85 + 0.15, 1.0)
        )
        colour = "217,98,43" if z > 0 else "60,110,180"
        piece = escape(text[start:end]).replace("\n", "<br>")
        out.append(escape(text[at:start]).replace("\n", "<br>"))
        out.append(
            f'<span title="{z:+.1f}" style="background:rgba({colour},{strength:.2f})">{piece}</span>'
        )
        at = end
    out.append(escape(text[at:]).replace("\n", "<br>"))
    # isolate right-to-left marks, so that a hostile text cannot reorder the page around it
    return f"<bdi>{''.join(out)}</bdi>"


PAGE = "<!doctype html><html><head><meta charset='utf-8'><title>emolens</title></head><body>"


def write_page(path: str | Path, body: str, *, overwrite: bool = False) -> None:
    """Write a view as a page of its own.

    Raises:
        FileExistsError: the file is there and is no such page.
    """
    vacant_page(path, overwrite=overwrite)
    with written_whole(path) as part:
        part.write_text(f"{PAGE}{body}</body></html>", encoding="utf-8")


def vacant_page(path: str | Path, *, overwrite: bool = False) -> None:
    """Whether `write_page` may write there; errors as there."""

    def other(file: Path) -> str | None:
        with file.open("rb") as page:
            return (
                None
                if page.read(len(PAGE)) == PAGE.encode()
                else "something that emolens did not write"
            )

    vacant(path, other, overwrite=overwrite)


def score(
    model: HookedModel,
    directions: EmotionDirections,
    texts: Texts,
    *,
    per: Literal["text", "token"] = "text",
    layer: SupportsIndex | None = None,
    skip: int = 1,
    long: Long = "raise",
    spans: Sequence[tuple[int, int] | str] | None = None,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
    progress: bool = False,
) -> Scores:
    """How strongly texts, or their tokens, read as each emotion.

    z_e = ((x - mu) . v_e/|v_e| - mean_e) / std_e;  x is a text pooled as the directions were made (the mean over its ordinary tokens, its last
    token, a span of it), or one token.

    Args:
        model: The model that the directions were made with.
        directions: From `mean_difference` and its siblings; directions made by arithmetic have no calibration.
        texts: One text or chat (a list of messages), several, or the `pathlib.Path` of a file, as for `collect_resid_post`.
        per: "text" or "token".
        layer: None is the directions' own default.
        skip: Tokens left out at the start, where tokens are averaged or read one by one; 1 leaves out the attention sink only.
        long: A text of more tokens than the model reads: "raise" before any is read, "truncate" it or "skip" it; see `Scores.flags`.
        spans: Where to read each text, as for `char_span`: for directions that were made from spans, and only for them.
        allow_other_model: Accept a model with other weights but the same width and tokenizer (base and instruct, checkpoints).

    Returns:
        `Scores`; in Jupyter a view with coloured tokens.

    Raises:
        ValueError: directions of another model, or without calibration; directions made from spans without `spans`; a text of one token.
    """
    if per not in ("text", "token"):
        raise ValueError(f"per={per!r}; allowed: 'text', 'token'")
    if per == "token" and spans is not None:
        raise ValueError(
            "spans= says where to pool a text; with per='token' every token is read and nothing is pooled"
        )
    v = directions.at(directions.layer if layer is None else layer)
    cal = v.scale(per)
    pooling = (
        pooled_as(directions.info, skip=skip, spans=spans)
        if per == "text"
        else every_token(skip=skip)
    )
    check_model(model, directions.info["model"], allow_other_model=allow_other_model)
    corpus = open_corpus(texts)
    acts = collect(
        model,
        corpus,
        v.hook_point,
        layers=v.layers,
        pooling=pooling,
        prepend_bos=prepend_bos,
        long=long,
        progress=progress,
    )
    encoded = encode(
        model, [text for text, _ in corpus.read()], prepend_bos=prepend_bos, any_length=True
    )
    fits = [len(e.ids) <= model.cfg.n_ctx for e in encoded]
    kept = [i for i, fit in enumerate(fits) if fit or long == "truncate"]
    text_of = tuple(kept[t] for t in acts.row_text.tolist())
    raw = project(acts.rows, v.vectors, v.reference)[:, :, 0]
    if per == "token":
        values, b = (
            v.token_z(acts.rows, acts.row_position)[:, :, 0],
            position_bin(acts.row_position),
        )
        band, rate = cal.token_band[b, 0], cal.token_rate[b, 0]
        at = zip(text_of, acts.row_position.tolist(), strict=True)
        places = tuple(encoded[t].offsets[p] for t, p in at)
    else:
        values = v.z(acts.rows)[:, :, 0]
        start = pooling.skip if pooling.kind == "mean" else 1
        band, rate = (
            x[:, 0] for x in cal.of_length(torch.tensor([t.n_tokens - start for t in acts.texts]))
        )
        places = tuple((0, len(encoded[t].text)) for t in text_of)
    training = set(v.info["training_texts"])
    flags: list[tuple[str, ...]] = [("left out",)] * len(encoded)
    for i, t in zip(kept, acts.texts, strict=True):
        known = (
            ("short", t.n_tokens <= SHORT),
            ("training", t.sha256 in training),
            ("cut", not fits[i]),
        )
        flags[i] = tuple(name for name, on in known if on)
    return Scores(
        emotions=v.emotions,
        values=values,
        raw=raw,
        per=per,
        layer=v.layer,
        texts=tuple(e.text for e in encoded),
        text_of=text_of,
        spans=places,
        band=band,
        rate=rate,
        flags=tuple(flags),
        info=acts.info
        | {"directions": {k: v.info[k] for k in ("method", "remove_neutral", "set", "set_sha256")}},
    )


def pooled_as(
    made_with: Mapping[str, Any],
    *,
    skip: int = 1,
    spans: Sequence[tuple[int, int] | str] | None = None,
) -> Pooling:
    """How to pool a text that directions are to read: as the texts that they were made from. `made_with` is their ``info``.

    A direction of last tokens says nothing of a mean over tokens, and the other way round: scale, reference and band are of that pooling.

    >>> pooled_as({"pooling": {"kind": "last"}}).kind
    'last'

    Raises:
        ValueError: they were made from spans and none are given, or spans are given and they were not.
    """
    kind = (made_with.get("pooling") or {}).get("kind", "mean")
    if (kind == "span") != (spans is not None):
        raise ValueError(
            "these directions were made from spans of their texts: say with spans= where to read these, one for each text"
            if kind == "span"
            else f"spans= given, but these directions were not made from spans (their pooling is {kind!r}): leave spans out, or make "
            "directions with pooling=char_span(...)"
        )
    if spans is not None:
        return char_span(spans)
    return last_token() if kind == "last" else mean_over_tokens(skip=skip)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the directions write on the vocabulary, and whether that can be trusted.

    Attributes:
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
        return float(np.nanmean(list(self.auc.values())))


def first_tokens(
    tokenizer: Any, target_words: Mapping[str, Sequence[str]], prompt: str | None = None
) -> dict[str, list[int]]:
    """The first token of each target word where it follows a prompt; one that several emotions share says nothing about any of them.

    Args:
        prompt: None is a sentence of the word's own script; see `tokens.word_tokens`.
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
    """Directions through the final norm (with its gain) and the unembedding, tested before any word is shown.

    The lens value of token w is  [unembed(ln_final(mu + v_e)) - unembed(ln_final(mu))]_w, centred over emotions: the norm is not linear,
    so the direction is read where the stories are.

    Args:
        target_words: For each emotion the words that name it; the first token of each, as it follows a text, is looked up.
        n_random: Random directions of the same norm for the null.
        null: Directions to use for it instead, at this layer: from shuffled labels, for example.
        k: Words shown for each emotion, if the test passes.
        allow_other_model: As in `score`.

    Raises:
        ValueError: directions of another model; no target words that tell at least two emotions apart.
    """
    check_model(model, directions.info["model"], allow_other_model=allow_other_model)
    tokenizer = model.tokenizer
    v = directions.at(directions.layer if layer is None else layer)
    first = first_tokens(tokenizer, {e: target_words.get(e, ()) for e in v.emotions})
    if sum(map(bool, first.values())) < 2:
        raise ValueError(
            "fewer than two emotions have target words whose first token is theirs alone in this tokenizer"
        )
    columns = [(t, i) for i, e in enumerate(v.emotions) for t in first[e]]
    ids, owner = np.array([c[0] for c in columns]), np.array([c[1] for c in columns])

    base = v.reference[0]
    weight = next(model.parameters())

    def lens(vectors: Tensor) -> Tensor:
        with torch.no_grad():
            stacked = torch.cat([base[None], base + vectors]).to(weight)
            logits = (
                unembed(model, rearrange(stacked, "row d_model -> 1 row d_model"))[0].float().cpu()
            )
        out = logits[1:] - logits[:1]
        return out - out.mean(0)

    def aucs(logits: Tensor) -> np.ndarray:
        return stats.multilabel_auc(
            logits[:, ids].T.double().numpy(), owner[:, None] == np.arange(len(v.emotions))
        )

    vectors = v.vectors[:, 0]
    logits = lens(vectors)
    auc = aucs(logits)
    generator = torch.Generator().manual_seed(seed)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    random = torch.randn((n_random if null is None else 0, *vectors.shape), generator=generator)
    draws = (
        random / torch.linalg.vector_norm(random, dim=-1, keepdim=True) * norms
        if null is None
        else null
    )
    drawn = [float(np.nanmean(aucs(lens(draw)))) for draw in draws]
    p = stats.permutation_p(float(np.nanmean(auc)), drawn)
    words: dict[str, list[str]] = {e: [] for e in v.emotions}
    if p < 0.05:
        before = tokenizer(
            "a", add_special_tokens=False
        ).input_ids  # a token by itself may lose its space
        for i, e in enumerate(v.emotions):
            words[e] = [
                text_after(tokenizer, before, [t]) for t in logits[i].topk(k).indices.tolist()
            ]
    return LogitLens(
        v.emotions,
        v.layer,
        dict(zip(v.emotions, auc.tolist(), strict=True)),
        tuple(drawn),
        p,
        words,
    )
