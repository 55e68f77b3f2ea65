"""Which weights a model has: a fingerprint that every tensor of its state is in (`shards.same_weights` compares two).

A tensor counts by its stored bits, under the name and in the layout of Hugging Face, so that a `HookedTransformer` and a bridge of
one checkpoint agree. The same is taken of the weights rounded to coarser types: a checkpoint is known again whatever it was loaded in.
Tables that follow from the config (rotary angles, masks) count through the config, and by their bits where they are not what it says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from emolens._typing import HookedModel, Weights, is_hooked
from emolens.models.adapters import FAMILIES
from emolens.models.adapters._refuse import ConversionError

# what the weights of a load are also rounded to, to be known again in a load of that type
ROUNDED = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.float16,),
    torch.float16: (torch.bfloat16,),
}
# eight bytes in halves: modulo 2^64 their highest bit, the sign, would count by nothing but whether the number of flips is odd
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
CHUNK = 2**20  # elements copied at once
# facts of the config that no tensor holds, under the names of a HookedTransformerConfig
FACTS = (
    "act_fn", "eps", "n_heads", "parallel_attn_mlp", "rotary_dim", "rotary_base", "use_NTK_by_parts_rope", "NTK_by_parts_factor",
    "NTK_by_parts_low_freq_factor", "NTK_by_parts_high_freq_factor", "NTK_original_ctx_len",
)  # fmt: skip
# keys of a config of Hugging Face by which no logit changes
_SAYS_NOTHING = re.compile(
    r"_|(dtype|torch_dtype|transformers_version|architectures|use_cache|quantization_config|id2label|label2id|problem_type|return_dict"
    r"|tie_word_embeddings|is_decoder|chunk_size_feed_forward|vocab_size)$|.*(token_id|dropout|dropout_prob|pdrop|initializer_range)$|(output_|summary_|task_)"
)


def fingerprints(model: Weights, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Fingerprint of the weights as they are, and of the same rounded to other types (first 16 hex digits of a sha256 each).

    With b_i the bits of the elements of a tensor (of float64 in halves) and r_i fixed odd numbers, its share is  sum_i b_i r_i mod 2^64  for every 2^20 of
    them, which any one changed element changes. A tensor of zeros is left out: it is a bias that one backend has and the other has not.

    Args:
        model: On either backend; or Hugging Face's own where it is quantised.
        dtype: Of the load: what it is rounded to follows from it.
    """
    coarser = ROUNDED.get(dtype, ())
    facts = json.dumps(_facts(model), sort_keys=True).encode()
    digests = [hashlib.sha256(facts) for _ in (dtype, *coarser)]
    for name, tensor in sorted(_state(model), key=lambda pair: pair[0]):
        for digest, sums in zip(digests, _checksums(tensor.detach(), coarser), strict=True):
            if any(sums):
                digest.update(f"{name} {list(tensor.shape)} {sums}".encode())
    own, *others = (d.hexdigest()[:16] for d in digests)
    return own, {str(d).removeprefix("torch."): h for d, h in zip(coarser, others, strict=True)}


def glance(model: HookedModel) -> tuple[Any, ...]:
    """What differs after any edit of the weights, at the price of reading them (about 0.2 s a gigabyte; a fingerprint takes 2 s).

    For each tensor its place in its storage, and for each storage  sum_i r_i (w_i + floor(w_i / 2^32)) mod 2^64  with w_i its words of eight
    bytes, so many at a time: the place of a word counts, and so does its highest bit, of which a multiple of w_i alone would keep whether
    the number of flips is odd. Counters of torch (`_version`, `data_ptr`) would cost nothing, and do not see what is written through
    `.data`, by numpy or by a fused optimiser.
    """
    storages: dict[int, int] = {}
    places, sums = [], []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = len(storages)
            sums += _sums(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))  # type: ignore[arg-type]
        where = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        places.append((name, storages[storage.data_ptr()], *where))
    facts = json.dumps(_facts(model), sort_keys=True)
    return facts, tuple(places), tuple(int(total) for total in sums)


def _sums(stored: Tensor) -> Iterator[Tensor]:
    """Numbers of `glance` for the bytes of a storage."""
    whole = len(stored) - len(stored) % 8
    size = CHUNK if stored.is_cuda else CHUNK // 8  # what stays in a processor's cache
    for part in (*stored[:whole].view(torch.int64).split(size), stored[whole:].long()):
        yield (part >> 32).add_(part).mul_(_odd(len(part), part.device)).sum()


def _checksums(tensor: Tensor, coarser: tuple[torch.dtype, ...]) -> list[list[int]]:
    """For the tensor itself and for each rounding of it, one number for every chunk of rows."""
    if tensor.ndim == 0:
        tensor = tensor[None]
    if not tensor.numel():
        return [[] for _ in (None, *coarser)]
    kept = [tensor.dtype] * (1 + len(coarser))
    kinds = [tensor.dtype, *coarser] if tensor.is_floating_point() else kept
    sums: list[list[Tensor]] = [[] for _ in kinds]
    for rows in tensor.split(max(1, CHUNK // tensor[0].numel())):
        for out, kind in zip(sums, kinds, strict=True):
            bits = rows.to(kind).contiguous().view(-1).view(BITS[kind.itemsize]).long()
            out.append((bits * _odd(len(bits), rows.device)).sum())
    return [torch.stack(out).tolist() for out in sums]


def _odd(n: int, device: torch.device) -> Tensor:
    """The first n of a fixed series of odd 64-bit numbers (splitmix64)."""
    return _series(max(n, CHUNK), device)[:n]


@lru_cache(maxsize=2)
def _series(n: int, device: torch.device) -> Tensor:
    golden = -7046029254386353131  # 2^64 over the golden ratio
    x = torch.arange(1, n + 1, dtype=torch.int64) * golden
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (x | 1).to(device)


def _state(model: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the arithmetic reads, but for tables that are what the config says."""
    if is_hooked(model):
        yield from _hooked(model)
        return
    if is_quantised(model):
        yield from _packed(model)
        return
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    yield from state.items()
    seen = {t.data_ptr() for t in state.values()}
    # what TransformerLens has no name for
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # GPT-NeoX's fused weight is not read any more: a bridge works on the q, k and v that it took from it
        if tensor.data_ptr() not in seen and ".qkv." not in name:
            seen.add(tensor.data_ptr())
            if not _as_configured(model, name, tensor):
                yield name.replace("._original_component", ""), tensor


def is_quantised(model: Weights) -> bool:
    """Whether there are weights that are stored as integers."""
    return any(not p.is_floating_point() for p in model.parameters())


def _packed(model: Weights) -> Iterator[tuple[str, Tensor]]:
    """Stored bits and their scales. Not by way of `state_dict`: bitsandbytes' repacks the weights of a model that has run, wrongly."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _as_configured(model, name, tensor):
            yield name, tensor
        scales = getattr(tensor, "quant_state", None)
        for key in ("absmax", "code", "offset"):
            if isinstance(scale := getattr(scales, key, None), Tensor):
                yield f"{name}.{key}", scale
        for key in ("SCB", "CB"):
            if isinstance(scale := getattr(tensor, key, None), Tensor):
                yield f"{name}.{key}", scale


# TransformerLens's tensors as Hugging Face stores them: the name, and the permutation of the axes before heads are put side by side
_LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "W_E": ("weight", (0, 1)),
    "W_U": ("weight", (1, 0)),
    "b_U": ("bias", (0,)),
    "w": ("weight", (0,)),
    "b": ("bias", (0,)),
    "W_Q": ("q.weight", (0, 2, 1)),
    "W_K": ("k.weight", (0, 2, 1)),
    "W_V": ("v.weight", (0, 2, 1)),
    "W_O": ("o.weight", (2, 0, 1)),
    "b_Q": ("q.bias", (0, 1)),
    "b_K": ("k.bias", (0, 1)),
    "b_V": ("v.bias", (0, 1)),
    "b_O": ("o.bias", (0,)),
    "W_in": ("in.weight", (1, 0)),
    "W_gate": ("gate.weight", (1, 0)),
    "W_out": ("out.weight", (1, 0)),
    "b_in": ("in.bias", (0,)),
    "b_up": ("in.bias", (0,)),
    "b_gate": ("gate.bias", (0,)),
    "b_out": ("out.bias", (0,)),
}


def _hooked(model: Weights) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        theirs, axes = _LAYOUT.get(leaf.lstrip("_"), (leaf, ()))
        if leaf == "b_in" and hasattr(model.get_submodule(path), "W_gate"):
            theirs = leaf  # TransformerLens adds it after the product: no tensor of Hugging Face's
        if len(axes) != tensor.ndim:
            yield name, tensor
            continue
        tensor = tensor.permute(axes)
        if theirs.split(".")[0] in ("q", "k", "v"):
            tensor = tensor.flatten(0, 1)
        elif theirs == "o.weight":
            tensor = tensor.flatten(1)
        yield f"{path}.{theirs}", tensor
    angles: dict[Any, tuple[Tensor, Tensor]] = {}
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        if leaf in ("rotary_sin", "rotary_cos"):
            attn: Any = model.get_submodule(path)
            cfg = attn.cfg
            base = attn._rotary_base() if hasattr(attn, "_rotary_base") else cfg.rotary_base
            key = (len(buffer), base)
            if key not in angles:
                of_config = attn.calculate_sin_cos_rotary
                angles[key] = of_config(cfg.rotary_dim, len(buffer), base, cfg.dtype)
            expected = angles[key][leaf == "rotary_cos"]
        elif leaf == "IGNORE":
            expected = torch.tensor(-torch.inf)
        else:
            # the causal mask, which grows with the texts that are read
            causal = leaf == "mask" and buffer.ndim == 2
            expected = torch.ones_like(buffer).tril() if causal else None
        if expected is None or not _close(buffer, expected):
            yield name, buffer


def _as_configured(model: Weights, name: str, tensor: Tensor) -> bool:
    """Whether a buffer of a rotary embedding of Hugging Face's is what its class makes of its config."""
    path, _, leaf = name.rpartition(".")
    if "inv_freq" not in leaf or not hasattr(module := model.get_submodule(path), "config"):
        return False
    expected = getattr(type(module)(module.config), leaf, None)
    return isinstance(expected, Tensor) and _close(tensor, expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of a float32 product and the precision of a cast."""
    if found.shape != expected.shape or not found.is_floating_point():
        return found.shape == expected.shape and torch.equal(found.cpu(), expected.cpu())
    slack = max(1e-5, 2 * torch.finfo(found.dtype).eps)
    return torch.allclose(found.cpu().double(), expected.cpu().double(), rtol=slack, atol=slack)


def _facts(model: Any) -> dict[str, Any]:
    """What the arithmetic takes from the config, the same from either backend's; of a model that has one backend only, its own words."""
    if is_hooked(model):
        found = {name: getattr(model.cfg, name, None) for name in FACTS}
        if model.cfg.positional_embedding_type != "rotary":
            found = {n: v for n, v in found.items() if "NTK" not in n and "rotary" not in n}
    else:
        hf_model = getattr(model, "original_model", model)
        config = hf_model.config
        try:
            found = FAMILIES[type(hf_model).__name__].config(config)
        except (KeyError, ConversionError):
            return _said(config.to_dict())
    found = {name: found.get(name) for name in FACTS}
    if not found["use_NTK_by_parts_rope"]:
        found = {n: v for n, v in found.items() if "NTK" not in n}
    # False is what a family's config leaves unsaid
    said = {n: v for n, v in found.items() if v not in (None, False)}
    return {n: float(v) if isinstance(v, int | float) else v for n, v in said.items()}


def _said(config: dict[str, Any]) -> dict[str, Any]:
    """All that a config of Hugging Face says, but for names, types, training, and the tokens of a text."""
    return {
        name: _said(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not _SAYS_NOTHING.match(name)
    }


_SAMPLED = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
    "ln1": ("w", "b"),
    "ln2": ("w", "b"),
}


def sampled_fingerprint(model: HookedModel) -> str:
    """The fingerprint that version 0.1 wrote: of a sample of the embedding and the blocks, as float32."""
    digest = hashlib.sha256()

    def add(tensor: Any, heads: bool = False) -> None:
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return
        tensor = tensor.detach()
        if heads:
            tensor = tensor[:: max(1, len(tensor) - 1)][:2].flatten(0, -2)
        sample = tensor[tuple(slice(None, None, max(1, n // 16)) for n in tensor.shape)].float()
        if sample.any():
            digest.update(sample.cpu().contiguous().numpy().tobytes())

    digest.update(json.dumps(list(model.W_E.shape)).encode())
    add(model.W_E)
    for block in model.blocks:
        for part, names in _SAMPLED.items():
            for name in names:
                own, heads = getattr(block, part), part == "attn" and name != "b_O"
                grouped = getattr(own, f"_{name}", None)
                add(grouped if isinstance(grouped, Tensor) else getattr(own, name, None), heads)
    return digest.hexdigest()[:16]
