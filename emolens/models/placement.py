"""On which device, in which precision, and whether it fits: decided before any weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from emolens.models.catalogue import CATALOGUE
from emolens.models.identity import Backend, dtype_name
from emolens.models.sources import Source, quiet

HEADROOM = 1.2  # memory asked for beyond the weights: activations, buffers, one block re-laid


def check_device(device: str | torch.device | None) -> torch.device:
    """Find the device asked for, or the one that is used where none is.

    Args:
        device: As torch names it; None is "cuda" if there is one, else "cpu".

    Returns:
        The device, which is on this machine.

    Raises:
        ValueError: no such device, or none of it on this machine.

    Example:
        >>> em.models.check_device("cpu")
        device(type='cpu')
    """
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        wanted = torch.device(device or ("cuda" if n else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={device!r}; allowed: cpu, cuda, cuda:1, mps") from error
    if wanted.type == "cuda" and not 0 <= (wanted.index or 0) < n:
        there = f"has {n} (cuda:0 to cuda:{n - 1})" if n else "has none that PyTorch sees"
        raise ValueError(
            f"device={str(device)!r}, but of CUDA devices this machine {there}; use device='cpu', or leave it out"
        )
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "device='mps', but PyTorch sees none on this machine; use device='cpu', or leave it out"
        )
    return wanted


def placement_options(
    backend: Backend, n_devices: int, device_map: str | dict[str, Any] | None
) -> dict[str, Any]:
    """Options of `from_pretrained`: where accelerate puts the parts of a bridge's model."""
    if device_map is None and n_devices > 1 and backend == "bridge":
        free = {i: torch.cuda.mem_get_info(i)[0] for i in range(n_devices)}
        return {"device_map": "balanced", "max_memory": free}
    return {"device_map": device_map}


def chosen_dtype(
    dtype: str | torch.dtype | None, device: torch.device, hf_config: Any
) -> torch.dtype:
    """The precision asked for, or the default: float32 on a CPU, the checkpoint's own on a GPU."""
    if dtype is None:
        own = getattr(hf_config, "dtype", None)
        dtype = torch.float32 if device.type == "cpu" or own is None else own
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    allowed = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if found not in allowed:
        raise ValueError(
            f"dtype={dtype!r}; allowed: {', '.join(str(d).removeprefix('torch.') for d in allowed)}"
        )
    return found


def check_memory(
    source: Source, n_bytes: int, dtype: torch.dtype, device: torch.device, n_devices: int, device_map: Any, stored: str = "",
) -> None:  # fmt: skip
    """Refuse a model whose weights cannot fit, before they are downloaded; `stored` says in what they are, if not in `dtype`."""
    if device_map is not None:
        return  # accelerate may spread it over devices, memory and disk
    if device.type == "cuda":
        devices = range(n_devices) if n_devices > 1 else (device,)
        free = sum(torch.cuda.mem_get_info(d)[0] for d in devices)
    else:
        free = psutil.virtual_memory().available
    need = n_bytes * HEADROOM
    if need > free:
        family = source.entry.family if source.entry else None
        most = min(free / HEADROOM, n_bytes - dtype.itemsize)
        fits = [e for e in CATALOGUE.values() if e.n_parameters * dtype.itemsize <= most]
        fits = [e for e in fits if e.family == family] or fits
        smaller = max(fits, key=lambda e: e.n_parameters, default=None)
        halved = not stored and dtype.itemsize == 4 and need / 2 <= free
        hint = "no model of the catalogue fits"
        if smaller:
            half = " (or dtype='bfloat16')" if halved else ""
            hint = f"the nearest smaller one that fits is {smaller.alias!r}{half}"
        raise MemoryError(
            f"{source.label} needs about {need / 1e9:.1f} GB in {stored or dtype_name(dtype)}, "
            f"{free / 1e9:.1f} GB are free on {device.type}; {hint}"
        )


def count_weights(hf_config: Any) -> tuple[int, int]:
    """Number of parameters of a config, and how many of them are the matrices of blocks, which quantisation packs."""
    model = unweighted(hf_config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    packed = sum(m.weight.numel() for m in linear)
    return sum(p.numel() for p in model.parameters()), packed


def unweighted(hf_config: Any) -> Any:
    """The model of a config, not quantised and without weights."""
    from transformers import AutoModelForCausalLM

    plain = copy.copy(hf_config)
    vars(plain).pop("quantization_config", None)
    # not accelerate's init_empty_weights, under which tied embeddings are counted twice
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(plain)


def stored_bits(hf_config: Any) -> float | None:
    """Bits of one packed weight with its share of the scales; None where they are not quantised."""
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is None:
        return None
    says = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    method = str(getattr(says.get("quant_method"), "value", says.get("quant_method")))
    if method == "gguf":  # transformers unpacks it
        return None
    if says.get("load_in_4bit"):
        # a float32 for each 64, or a byte
        return 4.127 if says.get("bnb_4bit_use_double_quant") else 4.5
    eight = says.get("load_in_8bit") or "fp8" in method
    bits = 8 if eight else says.get("bits") or says.get("w_bit")
    if bits is None:
        return 4.25 if "mxfp4" in method else 16
    return float(bits) + (0.25 if bits < 8 else 0)
