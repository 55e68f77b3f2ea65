"""Where a model can be read and changed: its layers, its hook points, and the device that its tokens go to."""

from __future__ import annotations

from typing import get_args

import torch

from emolens._typing import Blocks, HeadPoint, HookedModel, HookPoint, block_numbers, hook_name


def device_of(model: HookedModel) -> torch.device:
    """Say on which device a model takes its tokens.

    Args:
        model: On either backend. Of a model that is spread over several devices it is the first one's; weights that accelerate keeps
            elsewhere until they are needed do not count.

    Returns:
        The device that the model's config names.

    Example:
        >>> em.models.device_of(model)
        device(type='cpu')
    """
    return torch.device(getattr(model.cfg, "device", None) or "cpu")


def existing_layers(layers: Blocks | None, n_layers: int) -> tuple[int, ...]:
    """Layers as plain numbers, each of them there and named once; every one of the model for None.

    >>> existing_layers(None, 3), existing_layers(2, 3)
    ((0, 1, 2), (2,))

    Raises:
        ValueError: a layer that does not exist or is there twice, or none at all.
    """
    wrong = f" does not exist; this model has layers 0 to {n_layers - 1}"
    chosen = tuple(range(n_layers)) if layers is None else block_numbers(layers, wrong)
    if not chosen:
        raise ValueError("layers is empty; give block indices, or None for all")
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer {layer}{wrong}")
        if chosen.count(layer) > 1:
            raise ValueError(f"layer {layer} is there twice; name each layer once")
    return chosen


def layers_with(model: HookedModel, hook_point: HookPoint | HeadPoint) -> tuple[int, ...]:
    """The layers in which a hook point fires; none for resid_mid of a parallel model, whose MLP reads what attention reads."""
    # a bridge lists hook_resid_mid of parallel blocks too, where it never fires
    if hook_point == "resid_mid" and getattr(model.cfg, "parallel_attn_mlp", False):
        return ()
    points = model.hook_dict  # one look: a bridge makes it anew at each
    return tuple(k for k in range(model.cfg.n_layers) if hook_name(hook_point, k) in points)


def check_layers(
    model: HookedModel, hook_point: HookPoint | HeadPoint, layers: Blocks | None = None
) -> tuple[int, ...]:
    """Refuse layers that a model does not have, or that do not carry a hook point: TransformerLens ignores an unknown name in silence.

    Args:
        model: On either backend.
        hook_point: As TransformerLens calls it; "embed" is there once, at layer 0, whatever the layers.
        layers: One block index or several, of Python, numpy or torch; None is every layer.

    Returns:
        The layers as plain numbers, in the order given.

    Raises:
        ValueError: a layer that does not exist or is there twice, or none at all.
        KeyError: the model has no such hook point there; the message names those that it has.

    Example:
        >>> em.models.check_layers(model, "resid_post"), em.models.check_layers(model, "z", [2, 0])
        ((0, 1, 2), (2, 0))
    """
    chosen = existing_layers((0,) if hook_point == "embed" else layers, model.cfg.n_layers)
    there = layers_with(model, hook_point)
    for layer in chosen:
        if layer not in there:
            others = [p for p in get_args(HookPoint)[1:] if layer in layers_with(model, p)]
            why = " (a parallel-residual model adds attention and MLP at once)"
            raise KeyError(
                f"this model has no {hook_name(hook_point, layer)}{why if hook_point == 'resid_mid' else ''}; "
                f"it has: {', '.join(others)}"
            )
    return chosen
