"""Ablate the whole stream: at every place where a block reads it or leaves it, with the mean of each place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from emolens._typing import HookedModel, HookPoint
from emolens.collect.activations import Activations, TextInfo, is_main
from emolens.collect.forward import collect
from emolens.directions.value import EmotionDirections
from emolens.interventions.hooks import Hooks
from emolens.interventions.places import Direction, resolve_places
from emolens.interventions.positions import Positions, Where
from emolens.interventions.verbs import basis_of, removed_from
from emolens.models.points import check_layers, layers_with
from emolens.shards import same_weights


def stream_points(model: HookedModel) -> dict[HookPoint, tuple[int, ...]]:
    """Where the residual stream is read or left: before block 0, between attention and MLP, and after every block.

    A parallel model, whose MLP reads what attention reads, has no second place. (Before block k + 1 is after block k.)

    Args:
        model: From `em.load_model`, or your own.

    Returns:
        For each hook point its blocks.

    Example:
        >>> from emolens.interventions import stream_points
        >>> stream_points(model)
        {'resid_pre': (0,), 'resid_mid': (0, 1, 2), 'resid_post': (0, 1, 2)}
    """
    middle = layers_with(model, "resid_mid")
    between: dict[HookPoint, tuple[int, ...]] = {"resid_mid": middle} if middle else {}
    return {"resid_pre": (0,), **between, "resid_post": check_layers(model, "resid_post")}


@dataclass(frozen=True, eq=False)
class Stream:
    """Pooled activations of the same texts at every place of `stream_points`: what `ablate_stream` takes its references from.

    Attributes:
        sites: `Activations` of one model, one for each hook point.

    Raises:
        ValueError: places of another model, a place that is missing, or one that is no place of the stream.
    """

    sites: tuple[Activations, ...]

    def __post_init__(self) -> None:
        models = {a.info["model"]["fingerprint"]: a.info["model"] for a in self.sites}
        if len(models) != 1:
            raise ValueError(f"a stream is of one model, these activations are of {len(models)}")
        [model] = models.values()
        have = {(a.hook_point, k) for a in self.sites for k in a.layers}
        points = {point for point, _ in have if point == "resid_mid"} | {"resid_post"}
        needed = {
            ("resid_pre", 0),
            *((point, k) for point in points for k in range(model["n_layers"])),
        }
        if have != needed:
            point, k = min(have ^ needed, key=lambda place: (place[1], place[0]))
            which = "is missing" if (point, k) in needed else "is none of its places"
            raise ValueError(
                f"a stream is resid_pre of block 0 and resid_mid (but in a parallel model) and resid_post of every block; {point} of block {k} "
                f"{which}: em.collect_stream reads them"
            )

    def select(self, keep: Callable[[TextInfo], bool]) -> Stream:
        """The texts for which `keep` is true, at every place.

        Args:
            keep: Asked for each text.

        Returns:
            A new `Stream`.

        Example:
            >>> stream = em.collect_stream(model, stories, progress=False)
            >>> {t.emotion for t in stream.select(lambda t: t.emotion == "glimmer").sites[0].texts}
            {'glimmer'}
        """
        return Stream(tuple(a.select(keep) for a in self.sites))

    def places(self) -> Iterator[tuple[Activations, int, int]]:
        """Go through the places in the order of the model.

        Returns:
            Of each: the activations that have it, the block, and its slot there.

        Example:
            >>> stream = em.collect_stream(model, stories, progress=False)
            >>> [(acts.hook_point, layer) for acts, layer, slot in stream.places()][:3]
            [('resid_pre', 0), ('resid_mid', 0), ('resid_post', 0)]
        """
        order = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}
        found = [
            (layer, order[a.hook_point], a, k)
            for a in self.sites
            for k, layer in enumerate(a.layers)
        ]
        for layer, _, a, k in sorted(found, key=lambda place: place[:2]):
            yield a, layer, k


def collect_stream(model: HookedModel, texts: Any, **options: Any) -> Stream:
    """Read texts at every place where a block reads the residual stream or leaves it (`stream_points`): one pass for each hook point.

    Args:
        model: From `em.load_model`, or your own.
        texts: An emotion set, or plain texts.
        options: As for `em.collect_resid_post`, but without `layers`.

    Returns:
        `Stream`, for `ablate_stream`; the mean of its texts at each place is what the ablation keeps.

    Raises:
        ValueError: as `em.collect_resid_post`.

    Example:
        >>> stream = em.collect_stream(model, stories, progress=False)
        >>> [(acts.hook_point, acts.layers) for acts in stream.sites]
        [('resid_pre', (0,)), ('resid_mid', (0, 1, 2)), ('resid_post', (0, 1, 2))]
    """
    found = stream_points(model)
    return Stream(
        tuple(
            collect(model, texts, point, layers=layers, **options)
            for point, layers in found.items()
        )
    )


def ablate_stream(
    direction: Direction,
    stream: Stream,
    *,
    direction_from: SupportsIndex | None = None,
    method: Literal["affine", "zero", "mean"] = "affine",
    per_row: bool = False,
    positions: Where | Positions = "all",
    sinks: bool = False,
) -> Hooks:
    """Take a direction, or the subspace of several, out of the whole stream: no block reads it any more.

    At every place of the stream  x' = x - ((x - r).v) v, with r the mean of the texts of `stream` at that place. `ablate_resid_post` at all
    layers leaves what the embedding and each attention layer write for the MLP of the same block to read.

    Args:
        direction: One or several emotions (the subspace they span), or a tensor `[d_model]` or `[component d_model]`.
        stream: From `em.collect_stream`; of stories, the ones that the directions were made from, say.
        direction_from: The layer whose direction is taken out everywhere; None is the directions' own default.
        method: "affine": r is the mean of the emotions' means over the stories (of all texts, where none has an emotion); "mean": that of
            the neutral texts; "zero": 0.
        per_row, positions, sinks: As in `ablate_resid_post`.

    Returns:
        A list of ``(hook_name, hook)`` for every place. On a `TransformerBridge` the change of resid_mid reaches the MLP only; the
        skip connection loses the directions at resid_post of the same block, so that every reader finds the same.

    Raises:
        ValueError: directions and stream of two models; no text to take the mean of.

    Example:
        >>> stream = em.collect_stream(model, stories, progress=False)
        >>> hooks = em.ablate_stream(directions["tarrow"], stream, direction_from=1)
        >>> [name for name, _ in hooks][:3]
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_mid', 'blocks.0.hook_resid_post']
    """
    if method not in ("affine", "zero", "mean"):
        raise ValueError(f"method={method!r}; allowed: 'affine', 'zero', 'mean'")
    if not isinstance(direction, EmotionDirections):
        if direction_from is not None:
            raise ValueError(
                f"direction_from={direction_from}, but a bare tensor knows no layers: leave it out"
            )
        [given] = resolve_places("ablate", "resid_post", direction, 0, None)
    else:
        [given] = resolve_places(
            "ablate", direction.hook_point, direction, direction_from, direction_from
        )
        made, read = direction.info["model"], stream.sites[0].info["model"]
        if not same_weights(made, read):
            raise ValueError(
                f"the directions are of {made.get('name')} and the stream of {read.get('name')}; collect both from one model"
            )
    if (width := stream.sites[0].rows.shape[-1]) != given.unit.shape[-1]:
        raise ValueError(
            f"a direction of width {given.unit.shape[-1]} for a stream of width {width}"
        )
    basis, out = basis_of(given.unit, per_row), []
    for acts, layer, slot in stream.places():
        r = torch.zeros_like(given.unit[0]) if method == "zero" else _mean_of(acts, slot, method)
        norm = {"median": float(acts.norm_median[slot])}
        place = replace(given, hook_point=acts.hook_point, layer=layer, norm=norm)
        name, hook = removed_from(place, basis, r, method, positions, sinks)
        out.append((name, replace(hook, spec=replace(hook.spec, stream=True))))
    return out


def _mean_of(acts: Activations, slot: int, method: str) -> Tensor:
    """Mean `[d_model]` of the stories (each emotion weighs the same), of the texts where none has an emotion, or of the neutral texts."""
    if method == "affine" and any(map(is_main, acts.texts)):
        groups = [t.emotion if is_main(t) else None for t in acts.texts]
    else:
        split = "neutral" if method == "mean" else ""
        groups = [split if t.split == split else None for t in acts.texts]
    of_row = [groups[i] for i in acts.row_text.tolist()]
    names = [g for g in dict.fromkeys(groups) if g is not None]
    if not names:
        raise ValueError(
            f"method={method!r} has no {'neutral texts' if method == 'mean' else 'texts'} to take the mean of here"
        )
    means = [
        acts.rows[torch.tensor([g == name for g in of_row]), slot].double().mean(0)
        for name in names
    ]
    return torch.stack(means).mean(0).float()
