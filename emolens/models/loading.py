"""Load a language model with TransformerLens's hooks, from a short name, a hub name, a directory or a GGUF file.

On transformer-lens 3.9 the result is a `HookedTransformer` made by emolens's own adapters (HF's memory and nearly its speed);
on 4.x, where that class is gone, a raw `TransformerBridge` with the same hook names. Weights are left unprocessed by default, so
that a direction means the same in Hugging Face, in both TransformerLens majors and in other engines. This room and `adapters/`
are the only ones that import transformer_lens. Nothing here reads pickled weights or runs a repository's code unless asked to.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emolens._typing import HookedModel
from emolens.models import adapters
from emolens.models.adapters import gguf, lora
from emolens.models.fingerprint import fingerprints, is_quantised
from emolens.models.identity import (
    PROCESSING,
    Backend,
    adds_bos,
    dtype_name,
    dtype_of,
    ends_of,
    set_info,
)
from emolens.models.placement import (
    check_device,
    check_memory,
    chosen_dtype,
    count_weights,
    placement_options,
    stored_bits,
    unweighted,
)
from emolens.models.running import checked, not_finite
from emolens.models.sources import (
    Source,
    base_source,
    check_vocabulary,
    drop_invented,
    explained,
    gguf_header,
    has_file,
    open_tokenizer,
    quiet,
    read_config,
    resolve,
)


def load_model(
    name_or_path: str | Path,
    *,
    backend: Backend | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    process_weights: Sequence[str] | Mapping[str, bool] | None = None,
    n_devices: int = 1,
    device_map: str | dict[str, Any] | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model as a `HookedTransformer` (transformer-lens 3.9) or a raw `TransformerBridge` (4.x).

    Args:
        name_or_path: An alias of `catalogue()`, a hub name, a directory in Hugging Face format (a LoRA adapter beside the model or
            alone is merged), or a ``.gguf`` file. A `Path` is always a place on this machine.
        backend: "hooked" or "bridge"; None is "hooked" where the installed TransformerLens has it.
        device: None is "cuda" if there is one, else "cpu".
        dtype: None is float32 on a CPU and the checkpoint's own dtype elsewhere.
        revision: Hub branch, tag or commit; for Pythia a training step such as "step3000".
        tokenizer: A tokenizer, or the name or directory of one; None takes the model's own.
        process_weights: Which of `fold_ln`, `center_writing_weights`, `center_unembed`, `fold_value_biases` to apply.
        n_devices: Spread the blocks over this many CUDA devices.
        device_map: accelerate's placement, for the bridge backend.
        verify: Compare the result with the Hugging Face model on two left-padded prompts.
        trust_remote_code: Allow a hub repository's own Python code to run. Never on by default.

    Returns:
        The model in eval mode; `model_info(model)` says what it is.

    Raises:
        TypeError: not a name or path: a model that is in memory.
        ValueError: unknown name, option or step, a name that is a catalogue's and a folder's; tokens beyond the embedding;
            `emolens.models.adapters.ConversionError` for what is not converted.
        MemoryError: the weights cannot fit; raised before any weight file is downloaded.
        OSError: the hub cannot be reached, the model is gated, or a file is not what it should be.

    Example:
        A step of training, from the hub: ``em.load_model("pythia-160m", revision="step3000")``. What a name can be:

        >>> em.load_model("pythia-160n")
        Traceback (most recent call last):
        ValueError: unknown model 'pythia-160n'; did you mean pythia-160m or ...
    """
    backend = _backend(backend)
    processing = _processing(process_weights)
    hf_model, tokenizer, source, family = open_hf(
        name_or_path, backend=backend, device=device, dtype=dtype, revision=revision, tokenizer=tokenizer,
        n_devices=n_devices, device_map=device_map, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    device = check_device(device)
    prepend = tokenizer is not None and adds_bos(tokenizer)
    ends = ends_of(hf_model, tokenizer)
    # before it runs: bitsandbytes packs its weights anew at the first pass
    stored = fingerprints(hf_model, hf_model.dtype) if is_quantised(hf_model) else None
    reference = _reference(hf_model, tokenizer) if verify else None
    if backend == "hooked":
        model = adapters.to_hooked(
            hf_model, family, tokenizer=tokenizer, model_name=source.name, process_weights=processing,
            default_prepend_bos=prepend, device=device, n_devices=n_devices,
        )  # fmt: skip
    else:
        placed = hasattr(hf_model, "hf_device_map")
        model = _bridge(hf_model, tokenizer, source.name, device, processing, prepend, placed)
    own = source.local and source.entry is None and source.adapter is None  # a path of the user's
    set_info(
        model, source.label if own else source.name, source.label, source.revision, backend, dict(processing),
        type(hf_model).__name__, ends, source.adapter, stored,
    )  # fmt: skip
    if reference is not None:
        _compare(model, reference)
    return model


@gguf.read_once()
def open_hf(
    name_or_path: str | Path,
    *,
    backend: Backend = "bridge",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    n_devices: int = 1,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Source, Any]:
    """Open the Hugging Face model that `load_model` converts or bridges, with all of its checks.

    Args:
        name_or_path, backend, device, dtype, revision, tokenizer, n_devices, device_map, trust_remote_code: As for `load_model`.

    Returns:
        The model in eval mode, its tokenizer, where it came from, and for backend "hooked" the adapter of its family.

    Raises:
        TypeError, ValueError, MemoryError, OSError: as `load_model`.

    Example:
        >>> em.models.open_hf("./no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: ./no/such/folder: no such file or directory
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name_or_path, revision)
    adapter, asked = None, None
    if source.entry is None and not source.gguf_file:
        with explained(source):
            adapter = lora.find(source.location, source.revision, source.label)
        if adapter is not None:
            asked = source if has_file(source, "tokenizer_config.json") else None
            source = base_source(source, adapter)
    device = check_device(device)
    if dtype is not None:
        chosen_dtype(dtype, device, None)  # before anything is read
    if device_map is not None and backend == "hooked":
        raise ValueError(
            "device_map places the parts of a Hugging Face model: use backend='bridge', or n_devices="
        )
    if n_devices < 1 or (n_devices > torch.cuda.device_count() and n_devices > 1):
        raise ValueError(
            f"n_devices={n_devices}, but this machine has {torch.cuda.device_count()} CUDA devices"
        )

    if source.entry is not None:  # known sizes: refuse before the first request
        guess = dtype or ("float32" if device.type == "cpu" else source.entry.checkpoint_dtype)
        known = chosen_dtype(guess, device, None)
        n_bytes = source.entry.n_parameters * known.itemsize
        check_memory(source, n_bytes, known, device, n_devices, device_map)
    with explained(source):
        header = gguf_header(source)
        hf_config = read_config(source, header, trust_remote_code)
    architecture = (getattr(hf_config, "architectures", None) or ["unknown"])[0]
    family = None
    if backend == "hooked":
        family = adapters.family_of(architecture)
        family.config(hf_config)  # refuses what is not converted before any weight is read
    torch_dtype = chosen_dtype(dtype, device, hf_config)
    if source.entry is None:
        n_parameters, n_packed = count_weights(hf_config)
        bits = stored_bits(hf_config)
        n_packed = 0 if bits is None else n_packed
        n_bytes = int((n_parameters - n_packed) * torch_dtype.itemsize + n_packed * (bits or 0) / 8)
        packed = f"{bits or 0:.3g} bits a packed weight and {dtype_name(torch_dtype)}"
        stored = "" if bits is None else packed
        check_memory(source, n_bytes, torch_dtype, device, n_devices, device_map, stored)
    with explained(source):
        own, rows = tokenizer is None, hf_config.get_text_config().vocab_size
        tokenizer = open_tokenizer(source if asked is None else asked, tokenizer, trust_remote_code)
    if header is not None and own:
        drop_invented(tokenizer, rows)
        header.complete_tokenizer(tokenizer)
    check_vocabulary(source.label, tokenizer, rows)
    with explained(source), _named_misfit(source, hf_config):
        placement = placement_options(backend, n_devices, device_map)
        with quiet(), lora.left_out():
            # `_complete` names the tensors that are missing or have another size
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location, revision=source.revision, config=hf_config, gguf_file=source.gguf_file, dtype=torch_dtype,
                use_safetensors=None if source.gguf_file else True, trust_remote_code=trust_remote_code,
                output_loading_info=True, ignore_mismatched_sizes=True, **placement,
            )  # fmt: skip
    hf_model, report = loaded
    _complete(source, hf_model, report)
    if adapter is not None:
        hf_model = lora.merge(hf_model, adapter)
    quantised = stored_bits(hf_config) is not None  # transformers has put it where it works
    if placement["device_map"] is None and n_devices == 1 and not quantised:
        # of several, `to_hooked` places each block; before viewing: a later .to() would copy views one by one and untie them
        hf_model = hf_model.to(device=device)
    return hf_model.eval(), tokenizer, source, family


def _backend(backend: str | None) -> Backend:
    has_hooked = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
    if backend is None:
        return "hooked" if has_hooked else "bridge"
    if backend not in ("hooked", "bridge"):
        raise ValueError(f"backend={backend!r}; allowed: 'hooked', 'bridge'")
    if backend == "hooked" and not has_hooked:
        raise ValueError(
            "transformer-lens 4 has no HookedTransformer: install transformer-lens<4, or use backend='bridge'"
        )
    return backend  # type: ignore[return-value]  # checked above


def _processing(switches: Sequence[str] | Mapping[str, bool] | None) -> dict[str, bool]:
    if isinstance(switches, str):
        switches = [switches]
    given = dict(switches) if isinstance(switches, Mapping) else dict.fromkeys(switches or (), True)
    unknown = [key for key in given if key not in PROCESSING]
    if unknown:
        raise ValueError(
            f"process_weights: unknown switch {unknown[0]!r}; allowed: {', '.join(PROCESSING)}"
        )
    return {key: bool(given.get(key, False)) for key in PROCESSING}


@contextmanager
def _named_misfit(source: Source, hf_config: Any) -> Iterator[None]:
    """Name what a quantised checkpoint lacks: transformers fills holes with random numbers, which bytes do not take, before it reports."""
    try:
        yield
    except NotImplementedError as error:
        from safetensors import safe_open
        from transformers.utils import cached_file

        config = cached_file(source.location, "config.json", revision=source.revision)
        found: dict[str, tuple[list[int], str]] = {}
        for path in sorted(Path(str(config)).parent.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                found |= {n: (part.get_shape(), part.get_dtype()) for n, part in parts.items()}
        wrong = []
        for name, tensor in unweighted(hf_config).named_parameters():
            shape, dtype = found.get(name, ([], ""))
            if not any(other.startswith(name.removesuffix("weight")) for other in found):
                wrong.append(f"{name} is missing")
            elif dtype in ("F64", "F32", "F16", "BF16") and shape != list(tensor.shape):
                wrong.append(f"{name} has shape {shape}, its config says {list(tensor.shape)}")
        some = "some of its tensors are not those of its config"
        what = f"the tensor {wrong[0]}" if wrong else some
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise OSError(
            f"{source.label}: {what}{more}; the quantised checkpoint is not complete ({error})"
        ) from error


def _bridge(
    hf_model: Any, tokenizer: Any, name: str, device: torch.device, processing: dict[str, bool], prepend: bool, placed: bool
) -> Any:  # fmt: skip
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = build_bridge_from_module(
        hf_model, type(hf_model).__name__, hf_config=hf_model.config, tokenizer=None, dtype=hf_model.dtype,
        device=None if placed else str(device), model_name=name,
    )  # fmt: skip
    if tokenizer is not None:
        # subtle: past TransformerLens's property, which reloads a tokenizer with a BOS added, or calls its EOS a BOS
        object.__setattr__(model, "_tokenizer", tokenizer)
        model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
    if any(processing.values()):
        model.enable_compatibility_mode(disable_warnings=True, **processing)
    model.cfg.default_prepend_bos = prepend
    return model.eval()


# buffers of earlier versions of transformers, which its models make anew
KNOWN_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|\.attn\.(masked_)?bias$|(^|\.)position_ids$"
)


def _complete(source: Source, hf_model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not the model: transformers fills holes with random numbers, drops the rest, and only warns."""
    wrong = [(key, "is missing") for key in sorted(report["missing_keys"])]
    wrong += [
        (key, f"has shape {list(found)}, its config says {list(wanted)}")
        for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise OSError(
            f"{source.label}: the tensor {wrong[0][0]} {wrong[0][1]}{more}; the checkpoint is not complete"
        )
    unused = sorted(key for key in report["unexpected_keys"] if not KNOWN_BUFFERS.search(key))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise OSError(
            f"{source.label}: the checkpoint has tensors that {type(hf_model).__name__} with this config.json does not use: "
            f"{', '.join(unused[:3])}{more}; without them it would be another model. Correct config.json (number of layers, "
            "attention_bias, mlp_bias, architectures), or remove the tensors if they are meant to be unused"
        )
    if away := [name for name, tensor in hf_model.named_parameters() if tensor.is_meta]:
        raise ValueError(
            f"{source.label}: device_map puts {len(away)} tensors on the disk or in memory until they are needed (the first is {away[0]}), "
            "where emolens cannot read them; use a device_map without 'cpu' and 'disk', more devices (n_devices=), or device='cpu'"
        )


VERIFY_PROMPTS = (
    "The door was open when she came home.",
    "He had counted the steps to the station every morning for eleven years, and today there was one more.",
)


def _reference(hf_model: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probabilities of the HF model; taken before conversion, which may take the model apart."""
    encoded = [tokenizer(text).input_ids for text in VERIFY_PROMPTS]
    width, device = max(map(len, encoded)), hf_model.device
    padding = [[0] * (width - len(ids)) for ids in encoded]
    rows = list(zip(padding, encoded, strict=True))
    tokens = torch.tensor([pad + ids for pad, ids in rows], device=device)
    mask = torch.tensor([pad + [1] * len(ids) for pad, ids in rows], device=device)
    with torch.inference_mode():
        # position_ids: HF does not derive them from the mask outside generate()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = hf_model(tokens, attention_mask=mask, position_ids=positions).logits
    return tokens, mask, logits.float().log_softmax(-1)


def _compare(model: HookedModel, reference: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, mask, expected = reference
    with torch.inference_mode():
        run = partial(model.run_with_hooks, tokens, attention_mask=mask, return_type="logits")
        logits = checked(model, run(), lambda more: run(fwd_hooks=more), mask)
    if not torch.isfinite(expected[mask.bool()]).all():
        what = "verify: the Hugging Face model's own log-probability"
        raise not_finite(what, dtype_name(dtype_of(model)))
    change = logits.float().log_softmax(-1) - expected.to(logits.device)
    difference = float(change.abs()[mask.bool()].max())
    # float32 noise of 30 blocks is 5e-5 in log-probability; half precision and activations rounded to 8 bits keep two or three digits
    allowed = 1e-4 if logits.dtype == torch.float32 and not is_quantised(model) else 0.5
    if not difference < allowed:
        raise RuntimeError(
            f"verify: log-probabilities differ from the Hugging Face model by {difference:.2e} (allowed {allowed:.0e}); "
            "the conversion of this checkpoint is wrong: please report it, and use backend='bridge' meanwhile"
        )
