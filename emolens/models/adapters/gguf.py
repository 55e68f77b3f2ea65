"""What a GGUF file says beside its weights, put into the Hugging Face config that transformers makes of it.

transformers reads the keys that it knows and drops the others, rotary scaling among them: Llama-3.1's is a tensor (`rope_freqs.weight`),
others' is `rope.scaling.*`. Here every key and tensor that bears on the arithmetic is put into the config, is checked to say what
the config says already, or is refused by name. Hugging Face's model is built from that config, so all that is made of it is right.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emolens.models.adapters._refuse import ConversionError

_BLOCK = r"blk\.(\d+)\."
_TENSORS = re.compile(
    rf"(token_embd|output|output_norm|rope_freqs)\.weight|{_BLOCK}(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm))\.weight"
)
_BIASES = {
    "llama": {
        "attention_bias": re.compile(rf"{_BLOCK}attn_(q|k|v|output)\.bias"),
        "mlp_bias": re.compile(rf"{_BLOCK}ffn_(gate|up|down)\.bias"),
    },
    "qwen2": {"": re.compile(rf"{_BLOCK}attn_(q|k|v)\.bias")},
}
# carried over by transformers
_READ = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "rope.freq_base", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "vocab_size",
}  # fmt: skip
# read here, by `_rope`
_ROPE = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# names of `tokenizer.ggml.pre` that split a text before its bytes are merged as GPT-2 does, or nearly (digits one by one, which no
# merge of theirs joins); transformers takes this for all that it does not know
_LIKE_GPT2 = {
    "default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "roberta-bpe", "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone",
}  # fmt: skip
# to which llama.cpp adds a BOS where the file does not say
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe"}
# those that transformers splits by their own rule
_SPLIT = {
    "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez", "qwen35", "gpt-4o",
    "llama4",
}  # fmt: skip
_KEYS = ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
_STOPS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def _is(wanted: float) -> Callable[[Any, int], bool]:
    return lambda value, d_head: (
        not isinstance(value, list) and math.isclose(value, wanted, rel_tol=1e-5)
    )


# say nothing where they have these values, and are refused with any other: (value, size of a head) -> bool
_NEUTRAL: dict[str, Callable[[Any, int], bool]] = {
    "attention.key_length": lambda value, d_head: value == d_head,
    "attention.value_length": lambda value, d_head: value == d_head,
    "rope.dimension_count": lambda value, d_head: value == d_head,
    "attention.scale": lambda value, d_head: math.isclose(value, d_head**-0.5, rel_tol=1e-5),
    "attention.causal": _is(True),
    "tensor_data_layout": lambda value, d_head: True,  # in which order a converter found q and k; they are in one order in every file
    "rope.scaling.attn_factor": _is(1),
    "rope.scaling.yarn_attn_factor": _is(1),
    "rope.scaling.yarn_ext_factor": _is(1),
    "rope.scaling.yarn_log_multiplier": _is(0),
} | dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), _is(1)) | dict.fromkeys(
    (
        "expert_count", "expert_used_count", "attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias",
        "use_parallel_residual", "attn_logit_softcapping", "final_logit_softcapping",
    ),
    _is(0),
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a GGUF file says beside its weights: keys of its architecture, the shapes of its tensors,
    rotary factors if it has them, the tokens at which a text or a turn ends, and how its tokenizer splits and begins a text
    (None where it does not say)."""

    file: str
    arch: str
    keys: dict[str, Any]
    shapes: dict[str, list[int]]
    n_tokens: int
    factors: Any
    stops: list[int]
    pre: str | None
    adds_bos: bool | None

    def complete_tokenizer(self, tokenizer: Any) -> None:
        """Let the tokenizer that transformers made of this file begin a text as the file means it.

        Raises:
            ConversionError: it splits texts in a way that transformers does not know, which would give other tokens.
        """
        if self.pre is not None and self.pre not in _LIKE_GPT2 | _LLAMA3 | _SPLIT:
            raise ConversionError(
                f"{self.file}: tokenizer.ggml.pre = {self.pre!r} is not converted; give the tokenizer of the Hugging Face checkpoint (tokenizer=)"
            )
        if self.pre in _LLAMA3 and self.adds_bos is None and tokenizer.bos_token_id is not None:
            tokenizer.add_bos_token = True

    def complete(self, config: Any) -> None:
        """Put into the config that transformers made of this file what it has left out.

        Raises:
            ConversionError: a key or tensor that is neither known nor without effect, by name.
        """
        keys, arch = self.keys, self.arch
        # end of turn as well as end of text, of which transformers reads the first only
        if self.stops:
            config.eos_token_id = self.stops
        by_width = config.hidden_size // config.num_attention_heads
        d_head = keys.get("attention.key_length") or by_width
        if arch in _BIASES:
            config.head_dim = d_head
            known = _READ
        else:
            from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

            d_head = getattr(config, "head_dim", None) or d_head
            known = {
                k
                for k, name in GGUF_CONFIG_MAPPING.get(config.model_type, {}).items()
                if name is not None
            }
        for key, value in keys.items():
            if key not in known | _ROPE and not (key in _NEUTRAL and _NEUTRAL[key](value, d_head)):
                raise ConversionError(
                    f"{self.file}: {arch}.{key} = {str(value)[:60]} is not converted; load the Hugging Face checkpoint"
                )
        rows = self.shapes["token_embd.weight"][-1]
        if self.n_tokens > rows:
            raise ConversionError(
                f"{self.file}: {self.n_tokens} tokens, but the embedding has {rows} rows; convert the checkpoint again"
            )
        if arch in _BIASES:
            _tensors(config, self.file, arch, list(self.shapes))
        elif rope := [name for name in self.shapes if name.startswith("rope")]:
            raise ConversionError(
                f"{self.file}: the tensor {rope[0]} is not converted for {arch}; load the Hugging Face checkpoint"
            )
        if arch in _BIASES or any(key in keys for key in _ROPE):
            theta = keys.get("rope.freq_base", 10000.0)
            config.rope_parameters = {
                "rope_theta": theta,
                **_rope(self.file, keys, self.factors, theta, d_head),
            }


_ALONE = threading.RLock()


@contextmanager
def read_once() -> Iterator[None]:
    """Within, a file is parsed once and the names of its tensors are laid out once.

    transformers parses it anew for config, tokenizer and weights, and lays the names out once for every module: half of the time that a
    small model takes to load. What it calls is replaced for everybody, so one thread at a time is in here: another would put back a
    replacement, which remembers files that may have changed since.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    with _ALONE:
        yield from _replaced(gguf)


def _replaced(gguf: Any) -> Iterator[None]:
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    by_name = functools.cache(reader)

    def opened(path: Path | str) -> Any:
        return by_name(str(path))

    gguf.GGUFReader, gguf.get_tensor_name_map = opened, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def read(path: Path) -> Header:
    """The header of a file.

    Raises:
        ConversionError: one of several parts; numbers that differ between layers, which no config can say; no number of key heads.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {
        k: f.contents()
        for k, f in reader.fields.items()
        if not k.startswith(("tokenizer.", "GGUF."))
    }
    arch = fields["general.architecture"]
    if fields.get("split.count", 0) > 1:
        raise ConversionError(
            f"{path.name} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge"
        )
    keys = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    if arch in _BIASES:
        if several := [k for k in keys if isinstance(keys[k], list)]:
            raise ConversionError(
                f"{path.name}: {arch}.{several[0]} differs between layers, which is not converted"
            )
        # transformers would then leave q and k in llama.cpp's order
        if "attention.head_count_kv" not in keys:
            raise ConversionError(
                f"{path.name}: {arch}.attention.head_count_kv is missing; convert the checkpoint again"
            )
    tokens, tensors = (
        reader.fields.get("tokenizer.ggml.tokens"),
        {t.name: t for t in reader.tensors},
    )
    factors = tensors.get("rope_freqs.weight")
    return Header(
        path.name,
        arch,
        keys,
        {name: [int(n) for n in t.shape] for name, t in tensors.items()},
        0 if tokens is None else len(tokens.data),
        None if factors is None else np.asarray(factors.data, dtype=np.float64),
        list(dict.fromkeys(int(reader.fields[k].contents()) for k in _STOPS if k in reader.fields)),
        *(reader.fields[k].contents() if k in reader.fields else None for k in _KEYS),
    )


def _tensors(config: Any, file: str, arch: str, names: list[str]) -> None:
    """Switch on the biases that are there; refuse what has no place."""
    for name in names:
        found = _TENSORS.fullmatch(name)
        for switch, pattern in _BIASES[arch].items():
            if not found and (found := pattern.fullmatch(name)) and switch:
                setattr(config, switch, True)
        block = re.match(_BLOCK, name)
        if not found or (block and int(block[1]) >= config.num_hidden_layers):
            raise ConversionError(
                f"{file}: the tensor {name} has no place in a {arch} model of {config.num_hidden_layers} layers"
            )


def _rope(
    file: str, own: dict[str, Any], factors: Any, theta: float, d_head: int
) -> dict[str, Any]:
    """Rotary scaling in Hugging Face's words; without a type a factor is linear, as llama.cpp has it."""
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)) or 1.0
    kind = own.get("rope.scaling.type", "linear")
    scaled = kind != "none" and factor != 1.0
    if factors is not None and not np.allclose(factors, 1.0):
        if scaled:
            raise ConversionError(
                f"{file}: both rope_freqs.weight and rope.scaling are not converted"
            )
        if len(factors) != d_head // 2:
            raise ConversionError(
                f"{file}: rope_freqs.weight has {len(factors)} factors for heads of {d_head}; partial rotary is not converted"
            )
        every = factors.tolist()
        free = {
            "rope_type": "longrope",
            "short_factor": every,
            "long_factor": every,
            "attention_factor": 1.0,
        }
        return llama3(factors, theta, d_head) or free | {
            "original_max_position_embeddings": own["context_length"]
        }
    if not scaled:
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length", own["context_length"])
        betas = {
            name: own.get(f"rope.scaling.yarn_{name}", usual)
            for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **betas,
        }
    raise ConversionError(
        f"{file}: rope.scaling.type = {kind!r} is not converted (converted: none, linear, yarn)"
    )


def llama3(factors: Any, theta: float, d_head: int) -> dict[str, Any] | None:
    """Parameters of the llama3 scaling that divides each frequency by its factor; None where there are none.

    With wavelength w and s = (original / w - low) / (high - low) within 0 and 1:  1 / factor_i = s + (1 - s) / factor.  Only
    original / low and original / high are in it, so low is 1; where no wavelength lies between them high is the usual 4.
    """
    wavelength = 2 * math.pi * theta ** (np.arange(0, d_head, 2) / d_head)
    factor = float(factors.max())
    s = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (s > 1e-4) & (s < 1 - 1e-4)
    high = 4.0
    if between.sum() > 1:
        slope, level = np.polyfit(1 / wavelength[between], s[between], 1)
        high, original = 1 - 1 / level, -slope / level
    elif between.any():
        original = float((wavelength * (s * (high - 1) + 1))[between][0])
    else:
        kept = high * wavelength[s > 0.5].max(initial=wavelength[0] / high)
        original = math.sqrt(kept * wavelength[s < 0.5].min())
    original, high = round(float(original)), round(float(high), 4)
    if high <= 1 or original < 1:
        return None
    s = ((original / wavelength - 1) / (high - 1)).clip(0, 1)
    if not np.allclose(1 / (s + (1 - s) / factor), factors, rtol=1e-4):
        return None
    shape = {
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    return {"rope_type": "llama3", "factor": factor, **shape}
