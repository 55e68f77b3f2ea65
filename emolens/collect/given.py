"""Tensors that were read elsewhere, checked and pooled: what `Activations.from_tensors` takes over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from emolens._typing import (
    AnyPoint,
    Blocks,
    Cache,
    HeadPoint,
    HookedModel,
    block_numbers,
    hook_name,
)
from emolens.collect.recipe import check_layers, site_width
from emolens.models.identity import ModelInfo, model_info
from emolens.sets.corpus import plain_label


def given_rows(
    rows: Any, layers: Blocks | None, hook_point: AnyPoint, mask: Tensor | None
) -> tuple[tuple[int, ...], Tensor, tuple[Tensor, ...], int | None]:
    """Blocks, rows `[text layer d_model]` with heads side by side, the norms of each layer, and how many heads."""
    if hook_point == "pattern":
        raise ValueError("a pattern is as wide as its texts are long: em.collect_pattern pools it")
    found, parts = _blocks_of(rows, layers, hook_point)
    heads = None
    if hook_point in get_args(HeadPoint):
        heads = parts[0].shape[-2]
        parts = [part.flatten(-2) for part in parts]
    parts, norms = zip(*(_averaged(part, mask) for part in parts), strict=True)
    return found, torch.stack(parts, 1), norms, heads


def given_model(
    model: HookedModel | str, hook_point: AnyPoint, layers: tuple[int, ...], width: int
) -> dict[str, Any]:
    """What is known of the model: of one that is only named no weights, so that it is the same as no other."""
    if isinstance(model, str):
        return ModelInfo(
            name=model, source=model, revision=None, n_layers=max(layers) + 1, d_model=width, dtype="float32",
            process_weights={}, fingerprint=f"{model}, not loaded", tokenizer="none",
            backend="unknown", architecture="unknown", transformer_lens="unknown",
        ).to_dict()  # fmt: skip
    check_layers(model, hook_point, layers)
    info, own = model_info(model), site_width(model, hook_point, 0)
    if width != own:
        raise ValueError(f"rows are {width} wide, {hook_point} of {info.name} is {own}")
    return info.to_dict()


def _blocks_of(
    rows: Any, layers: Blocks | None, hook_point: AnyPoint
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Blocks, and of each what was given: from a cache by name, or from `[text layer ...]`."""
    chosen = None if layers is None else block_numbers(layers)
    if not isinstance(rows, Cache):
        x = torch.as_tensor(rows).detach().float().cpu()
        n_axes = 4 if hook_point in get_args(HeadPoint) else 3
        if chosen is None:
            raise ValueError("layers: say which blocks these rows are of, such as layers=[18]")
        if x.ndim != n_axes or x.shape[1] != len(chosen):
            axes = "text layer head d_head" if n_axes == 4 else "text layer d_model"
            raise ValueError(
                f"rows of shape {list(x.shape)} for layers {list(chosen)}; give [{axes}]"
            )
        return chosen, list(x.unbind(1))
    names = list(rows.keys())
    if chosen is None:
        blocks = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")} | {0}
        chosen = tuple(k for k in sorted(blocks) if hook_name(hook_point, k) in names)
    wanted = [hook_name(hook_point, k) for k in chosen] or [hook_name(hook_point, 0)]
    if missing := [name for name in wanted if name not in names]:
        raise KeyError(f"the cache has no {missing[0]}; it has: {', '.join(names)}")
    return chosen, [torch.as_tensor(rows[name]).detach().float().cpu() for name in wanted]


def _averaged(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows `[text d]`, averaged over the masked tokens where there are tokens, and the norms of what was averaged."""
    if x.ndim not in (2, 3):
        raise ValueError(
            f"an activation of shape {list(x.shape)}; give [text d_model] or [text pos d_model]"
        )
    if (x.ndim == 3) != (mask is not None):
        raise ValueError(
            f"activations of shape {list(x.shape)} {'need' if mask is None else 'take no'} mask: [text pos], 1 for the tokens of [text pos d_model] to be averaged"
        )
    used = None if mask is None else torch.as_tensor(mask).cpu().bool()
    if used is not None and (used.shape != x.shape[:2] or not bool(used.any(-1).all())):
        raise ValueError(
            f"mask of shape {list(used.shape)} for activations of shape {list(x.shape)}; [text pos], with a token of each text"
        )
    kept = x if used is None else x[used]
    if not bool(torch.isfinite(kept).all()):
        raise ValueError("NaN or infinity in these activations")
    if used is not None:  # padding may hold anything, NaN too
        total = x.masked_fill(~used[..., None], 0).sum(1)
        x = total / used.sum(-1, keepdim=True)
    return x, torch.linalg.vector_norm(kept, dim=-1)


def given_words(values: Iterable[Any] | None, name: str, n: int) -> list[str | None]:
    """Labels of `n` texts as plain words."""
    words = [plain_label(value) for value in ([None] * n if values is None else values)]
    if len(words) != n:
        raise ValueError(f"{len(words)} {name} for {n} texts")
    return words


def row_hash(row: Tensor) -> str:
    """Identity of a text of which only the activations are known."""
    return hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16]
