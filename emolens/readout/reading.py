"""Read texts, or their tokens, with directions.

An uncentred projection is the largest error in published readouts: raw activations share a component that dwarfs every emotion.
Here s_e(x) = (x - mu) . v_e/|v_e|, and the score is z_e = (s_e - mean_e) / std_e with mean and spread of held-out stories (texts) or
of neutral text at the same position (tokens). Below the band of neutral text of the same length (position) the answer is "none"; how often neutral
text of unknown topics still lies above it was measured, and is said beside it. Raw projections are there by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import torch

from emolens._typing import HookedModel
from emolens.collect.forward import collect
from emolens.collect.pooling import Pooling, char_span, every_token, last_token, mean_over_tokens
from emolens.collect.recipe import Texts
from emolens.directions.algebra import project
from emolens.directions.calibration import position_bin
from emolens.directions.value import EmotionDirections
from emolens.models.identity import check_model
from emolens.models.tokens import encode
from emolens.readout.scores import Scores
from emolens.sets.corpus import Long, open_corpus

SHORT = 8  # pooled tokens; below this a text score rests on little


def score(
    model: HookedModel,
    directions: EmotionDirections,
    texts: Texts,
    *,
    per: Literal["text", "token"] = "text",
    layer: SupportsIndex | None = None,
    skip: int = 1,
    long: Long = "raise",
    spans: Sequence[tuple[SupportsIndex, SupportsIndex] | str] | None = None,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
    progress: bool | None = None,
) -> Scores:
    """Score how strongly texts, or their tokens, read as each emotion.

    z_e = ((x - mu) . v_e/|v_e| - mean_e) / std_e;  x is a text pooled as the directions were made (the mean over its ordinary tokens, its last
    token, a span of it), or one token.

    >>> scores = em.score(model, directions, ["The door was open when she came home.", "It rained."])
    >>> scores.values.shape, scores.per, scores.flags
    (torch.Size([2, 4]), 'text', ((), ()))

    Args:
        model: The model that the directions were made with.
        directions: From `mean_difference` and its siblings; directions made by arithmetic or from tensors have no calibration.
        texts: One text or chat (a list of messages), several, or the `pathlib.Path` of a file, as for `collect_resid_post`.
        per: "text" or "token". A token is compared with neutral tokens, so the directions must know some; a text needs neutral texts
            only to be called "none".
        layer: A block number; None is the directions' own default.
        skip: Tokens left out at the start, where tokens are averaged or read one by one; 1 leaves out the attention sink only.
        long: A text of more tokens than the model reads: "raise" before any is read, "truncate" it or "skip" it; see `Scores.flags`.
        spans: Where to read each text, as for `char_span`: for directions that were made from spans, and only for them.
        prepend_bos: Whether a BOS token is put before each text; None is the model's own way.
        allow_other_model: Accept a model with other weights but the same width and tokenizer (base and instruct, checkpoints).
        progress: Whether to show a bar; None shows one where it lasts and somebody can see it.

    Returns:
        `Scores` in standard deviations, of held-out stories or of neutral tokens; in Jupyter a view with coloured tokens.

    Raises:
        ValueError: directions of another model, or without calibration; directions made from spans without `spans`; a text of one token.
    """
    if per not in ("text", "token"):
        raise ValueError(f"per={per!r}; allowed: 'text', 'token'")
    if per == "token" and spans is not None:
        raise ValueError(
            "spans= says where to pool a text; with per='token' every token is read and nothing is pooled"
        )
    here = directions.at(directions.layer if layer is None else layer)
    cal = here.scale(per)
    of_text = per == "text"
    pooling = pooled_as(here.info, skip=skip, spans=spans) if of_text else every_token(skip=skip)
    check_model(model, directions.info["model"], allow_other_model=allow_other_model)
    corpus = open_corpus(texts)
    acts = collect(
        model, corpus, here.hook_point, layers=here.layers, pooling=pooling, prepend_bos=prepend_bos, long=long, progress=progress
    )  # fmt: skip
    read = [text for text, _ in corpus.read()]
    encoded = encode(model, read, prepend_bos=prepend_bos, any_length=True)
    fits = [len(e.ids) <= model.cfg.n_ctx for e in encoded]
    kept = [i for i, fit in enumerate(fits) if fit or long == "truncate"]
    text_of = tuple(kept[t] for t in acts.row_text.tolist())
    raw = project(acts.rows, here.vectors, here.reference)[:, :, 0]
    if of_text:
        values = here.z(acts.rows)[:, :, 0]
        start = pooling.skip if pooling.kind == "mean" else 1
        n_tokens = torch.tensor([t.n_tokens - start for t in acts.texts])
        band, rate = (x[:, 0] for x in cal.of_length(n_tokens))
        places = tuple((0, len(encoded[t].text)) for t in text_of)
    else:
        values = here.token_z(acts.rows, acts.row_position)[:, :, 0]
        b = position_bin(acts.row_position)
        band, rate = cal.token_band[b, 0], cal.token_rate[b, 0]
        at = zip(text_of, acts.row_position.tolist(), strict=True)
        places = tuple(encoded[t].offsets[p] for t, p in at)
    training = set(here.info["training_texts"])
    flags: list[tuple[str, ...]] = [("left out",)] * len(encoded)
    for i, t in zip(kept, acts.texts, strict=True):
        short, seen = t.n_tokens <= SHORT, t.sha256 in training
        known = (("short", short), ("training", seen), ("cut", not fits[i]))
        flags[i] = tuple(name for name, on in known if on)
    made = {k: here.info[k] for k in ("method", "remove_neutral", "set", "set_sha256")}
    return Scores(
        emotions=here.emotions,
        values=values,
        raw=raw,
        per=per,
        layer=here.layer,
        texts=tuple(e.text for e in encoded),
        text_of=text_of,
        spans=places,
        band=band,
        rate=rate,
        flags=tuple(flags),
        info=acts.info | {"directions": made},
    )


def pooled_as(
    made_with: Mapping[str, Any],
    *,
    skip: int = 1,
    spans: Sequence[tuple[SupportsIndex, SupportsIndex] | str] | None = None,
) -> Pooling:
    """Choose how to pool a text that directions are to read: as the texts that they were made from.

    A direction of last tokens says nothing of a mean over tokens, and the other way round: scale, reference and band are of that pooling.

    >>> pooled_as({"pooling": {"kind": "last"}}).kind
    'last'

    Args:
        made_with: Their ``info``.
        skip: Tokens left out at the start of a mean; 1 leaves out the attention sink only.
        spans: Where to read each text, as for `char_span`, if they were made from spans.

    Returns:
        The `Pooling` of their corpus; of a mean over tokens with `skip` of one's own.

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
