"""Vectors from elsewhere as fields of directions: shapes and layers checked against the model, what is not given left unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emolens._typing import Blocks, HookPoint, block_numbers

Vector = Tensor | NDArray[np.floating] | Sequence[float]


@runtime_checkable
class Described(Protocol):
    """What `em.model_info(model)` gives."""

    def to_dict(self) -> dict[str, Any]: ...


def described(model: Described | Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a model, as it is kept in a file; TypeError for something that is no description of one."""
    about = dict(model) if isinstance(model, Mapping) else getattr(model, "to_dict", dict)()
    if missing := {"name", "d_model", "n_layers", "fingerprint"} - set(about):
        raise TypeError(
            f"model= is em.model_info(model), or the info['model'] of directions; this {type(model).__name__} has no {min(missing)}"
        )
    return about


def given_fields(
    vectors: Mapping[str, Vector],
    about: Mapping[str, Any],
    hook_point: HookPoint,
    layers: Blocks,
    reference: Vector | None,
    norm_median: Vector | float | None,
) -> dict[str, Any]:
    """The tensors of directions, with their emotions and layers. Arguments and errors: `EmotionDirections.from_tensors`."""
    if hook_point not in get_args(HookPoint):
        raise ValueError(f"hook_point={hook_point!r}; allowed: {', '.join(get_args(HookPoint))}")
    if not vectors:
        raise ValueError("no vectors given: a name and a vector [d_model] are needed")
    wanted, n = block_numbers(layers), about["n_layers"]
    if sorted(set(wanted) & set(range(n))) != sorted(wanted) or not wanted:
        raise ValueError(f"layers={layers!r}: blocks of {about['name']}, 0 to {n - 1}, each once")
    shape = (len(wanted), int(about["d_model"]))
    rows = [_rows(f"the vector of {name!r}", given, shape) for name, given in vectors.items()]
    nowhere, unknown = torch.full(shape, torch.nan), torch.full(shape[:1], torch.nan)
    return {
        "emotions": tuple(str(name) for name in vectors),
        "layers": wanted,
        "vectors": torch.stack(rows),
        "reference": nowhere if reference is None else _rows("reference", reference, shape),
        "neutral_mean": nowhere,
        "norm_median": unknown if norm_median is None else _sizes(norm_median, len(wanted)),
        "norm_mean": unknown,
        "reliability": torch.full((len(rows), len(wanted)), torch.nan),
    }


def _sizes(given: Any, n_layers: int) -> Float[Tensor, " layer"]:
    sizes = torch.as_tensor(given).detach().to("cpu", torch.float32).reshape(-1)
    if len(sizes) not in (1, n_layers) or not ((sizes > 0) & sizes.isfinite()).all():
        raise ValueError(f"norm_median={given!r}: a positive number, or one for each layer")
    return sizes.expand(n_layers).clone()


def _rows(what: str, given: Any, shape: tuple[int, int]) -> Float[Tensor, "layer d_model"]:
    """A copy as float32 on the CPU; of one layer the axis may be left out."""
    x = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, np.float32))
    x = x.detach().to("cpu", torch.float32, copy=True)
    found, one = list(x.shape), shape[0] == 1
    x = x[None] if x.ndim == 1 and one else x
    if x.shape != shape:
        needed = "[d_model]" if one else "[layer d_model]"
        raise ValueError(f"{what} has shape {found}; {needed} is {list(shape[one:])} here")
    if not x.isfinite().all():
        raise ValueError(f"{what} is not finite")
    return x
