"""Which model is it: what is recorded of a model, and whether two are one.

A `ModelInfo` is made when a model is loaded or wrapped and travels with everything that is made from it. Directions and stored
activations are used on the weights that they were made with, unless the user says that another model of the same width will do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from emolens._typing import HookedModel, is_hooked
from emolens.models.fingerprint import fingerprints, glance, is_quantised, sampled_fingerprint
from emolens.models.sources import check_vocabulary
from emolens.shards import same_weights

Backend = Literal["hooked", "bridge"]
PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@dataclass(frozen=True)
class ModelInfo:
    """What emolens remembers of a loaded model, and writes into every file made from it.

    Attributes:
        name: The alias or hub name it was asked for by; of a local model, its directory or file name.
        source: Hub repository, or the file name of a local model (never a path of the user's machine).
        revision: Hub revision or training step, if one was given.
        backend: "hooked" or "bridge".
        architecture: Hugging Face's name of its class.
        n_layers, d_model: Number of blocks, and width of the residual stream.
        dtype: Precision of the weights, such as "float32".
        process_weights: TransformerLens's four switches as they were applied, or "unknown" for a model wrapped by the user.
        fingerprint: Of every tensor of the weights, whatever the backend (16 hex digits).
        tokenizer: sha256 of the vocabulary (first 16 hex digits), or "none".
        transformer_lens: Version of TransformerLens it was loaded with.
        rounded: The fingerprints of the weights rounded to other types, by which a load in another precision is known again.
        adapter: What was merged into the weights (LoRA and its kind), by the name of its folder or repository.
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
        """Give the fields as a dictionary, as files hold them.

        Returns:
            JSON values by name.

        Example:
            >>> em.model_info(model).to_dict()["d_model"]
            32
        """
        return asdict(self)


def wrap(model: HookedModel, *, name: str | None = None) -> HookedModel:
    """Accept a `HookedTransformer` or `TransformerBridge` that the user already has.

    What can be read from its config is recorded: folded norms are visible there, the other processing switches are not and are
    recorded as "unknown".

    Args:
        model: On either backend.
        name: What to call it in files; None takes the config's `model_name`.

    Returns:
        The model itself, not a copy.

    Raises:
        TypeError: it is not a model with TransformerLens's hooks.
        ValueError: it has LoRA layers, or a tokenizer with tokens beyond its embedding.

    Example:
        >>> em.wrap(model) is model
        True
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
        if not hooked and not untouched:
            # a bridge keeps its norms; folding leaves their gains at one
            folded = bool((model.blocks[0].ln1.w == 1).all())
        processing: dict[str, bool | str] = {"fold_ln": folded}
        processing |= dict.fromkeys(PROCESSING[1:], False if untouched else "unknown")
        label = name or str(cfg.model_name)
        if (tokenizer := getattr(model, "tokenizer", None)) is not None:
            check_vocabulary(label, tokenizer, cfg.d_vocab)
        of_bridge = getattr(cfg, "original_architecture", None)
        architecture = str(of_bridge or getattr(cfg, "architecture", None))
        ends = ends_of(getattr(model, "original_model", None), tokenizer)
        backend = "hooked" if hooked else "bridge"
        set_info(model, label, label, None, backend, processing, architecture, ends)
    return model


def model_info(model: HookedModel) -> ModelInfo:
    """Say what is known of a model: as it was when it was loaded or wrapped.

    Args:
        model: On either backend; one that is new is wrapped.

    Returns:
        Its `ModelInfo`, which goes into every file that is made with it.

    Raises:
        TypeError, ValueError: as `wrap`.

    Example:
        >>> em.model_info(model).n_layers
        3
    """
    return vars(wrap(model))["_emolens_info"]


def present_info(model: HookedModel) -> ModelInfo:
    """Say what is known of a model with its weights and precision as they are now: trained, edited or cast since it was loaded.

    Whoever compares weights asks here, at every call: the fingerprint is taken anew only where a `glance` shows a change. Of a
    quantised model it is as it was when loaded: its stored bits change their order when it runs.

    Args:
        model: On either backend.

    Returns:
        `model_info(model)` with the present fingerprint and dtype.

    Raises:
        TypeError, ValueError: as `wrap`.

    Example:
        >>> em.models.present_info(model) == em.model_info(model)
        True
    """
    if is_quantised(model):
        return model_info(model)
    known, seen = model_info(model), glance(model)
    if seen == vars(model)["_emolens_seen"]:
        return known
    dtype = dtype_of(model)
    fingerprint, rounded = fingerprints(model, dtype)
    now = replace(known, fingerprint=fingerprint, rounded=rounded, dtype=dtype_name(dtype))
    _remember(model, now, seen)
    return now


def _remember(model: HookedModel, info: ModelInfo, seen: tuple[Any, ...] | None) -> None:
    for name, value in (("_emolens_info", info), ("_emolens_seen", seen)):
        object.__setattr__(model, name, value)  # past nn.Module's bookkeeping


def has_weights_of(model: HookedModel, info: Mapping[str, Any]) -> bool:
    """Say whether a file was made with the weights of a model, whatever their precision, loader and backend.

    A file of version 0.1 knows a sample of them only: the same sample is taken here, and the processing has to be the same by name.

    Args:
        model: On either backend.
        info: The file's ``info["model"]``.

    Returns:
        Whether they are the same.

    Example:
        >>> em.models.has_weights_of(model, directions.info["model"])
        True
    """
    if "rounded" in info:
        return same_weights(present_info(model).to_dict(), info)
    same = info["process_weights"] == model_info(model).process_weights
    return same and info["fingerprint"] == sampled_fingerprint(model)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a BOS before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def ends_of(hf_model: Any, tokenizer: Any) -> dict[str, Any]:
    """End-of-text tokens of the tokenizer, the config and the generation config together, by name; and the last one's strings."""
    configs = [getattr(hf_model, name, None) for name in ("config", "generation_config")]
    ids: list[int] = []
    for owner in (tokenizer, *configs):
        found = getattr(owner, "eos_token_id", None)
        ids += [] if found is None else [found] if isinstance(found, int) else list(found)
    own = {} if tokenizer is None else {i: token for token, i in tokenizer.get_vocab().items()}
    # some configs say -1 for none
    tokens = {own.get(i, f"<{i}>"): i for i in dict.fromkeys(ids) if i >= 0}
    strings = getattr(configs[1], "stop_strings", None) or []
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"generation_config: stop_strings {strings!r}; allowed: strings that are not empty"
        )
    return {"stop_tokens": tokens, "stop_strings": list(strings)}


def set_info(
    model: HookedModel, name: str, source: str, revision: str | None, backend: str, processing: dict[str, bool | str],
    architecture: str, ends: dict[str, Any], adapter: str | None = None, stored: tuple[str, dict[str, str]] | None = None,
) -> None:  # fmt: skip
    """Remember with a model which one it is; `stored` is what `fingerprints` gave before a quantised one ran."""
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


def dtype_of(model: HookedModel) -> torch.dtype:
    """In which precision its weights are kept."""
    return model.W_E.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written in files: float32."""
    return str(dtype).removeprefix("torch.")


def _vocabulary_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def check_model(
    model: HookedModel, made_with: Mapping[str, Any], *, allow_other_model: bool | None = False
) -> None:
    """Refuse directions that belong to another model.

    Args:
        model: On which they are to be used.
        made_with: The directions' ``info["model"]``.
        allow_other_model: Whether other weights of the same width and tokenizer will do (base and instruct, checkpoints); None where
            the caller has no such option, so that none is recommended.

    Raises:
        ValueError: other weights or other processing; with `allow_other_model`, another width or tokenizer.

    Example:
        >>> em.models.check_model(model, directions.info["model"])
        >>> em.models.check_model(model, directions.info["model"] | {"d_model": 64})
        Traceback (most recent call last):
        ValueError: these directions have width 64 (...), this model 32 (...)
    """
    here, there = model_info(model).to_dict(), made_with
    if here["d_model"] != there["d_model"]:
        raise ValueError(
            f"these directions have width {there['d_model']} ({there['name']}), this model {here['d_model']} ({here['name']})"
        )
    if has_weights_of(model, there):
        return
    if not allow_other_model:
        processed = here["process_weights"] != there["process_weights"]
        what = "processing of the weights" if processed else "weights"
        fix = ", or pass allow_other_model=True for a twin such as base and instruct"
        raise ValueError(
            f"these directions were made with {there['name']} and this is {here['name']} (other {what}); collect again"
            f"{'' if allow_other_model is None else fix}"
        )
    if here["tokenizer"] != there["tokenizer"]:
        raise ValueError(
            f"{here['name']} has another tokenizer than {there['name']}; allow_other_model needs the same one"
        )
