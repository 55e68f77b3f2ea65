"""Write steering hooks into the weights of a Hugging Face checkpoint, and measure what the copy does.

With ``y = W x + b`` the last projection of attention or of the MLP, as Hugging Face stores it (`W` `[d_model d_in]`), s the vector that a
hook adds, B the orthonormal rows that it ablates and t the projections that it sets:
``steer``   b' = b + s;   ``ablate``  W' = (I - B^T B) W,  b' = (I - B^T B) b + B^T t.
A steered residual stream is a steered last writer: resid_post of a block is its MLP, resid_mid its attention, resid_pre the block before.
Both are exact but for rounding. What is not affine, or not the same for every token, cannot be baked and is refused.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from emolens._files import here
from emolens._typing import HookedModel, Text
from emolens.interventions.check import validate
from emolens.interventions.hooks import Hook, Hooks, Spec
from emolens.models.identity import model_info
from emolens.models.loading import VERIFY_PROMPTS, load_model, open_hf
from emolens.models.points import device_of
from emolens.models.running import checked
from emolens.models.tokens import encode, pad
from emolens.sets.corpus import several
from emolens.shards import vacant_folder

Writer = Literal["attn", "mlp"]
RECORD = "emolens.json"
ALLOWED = 1e-3  # float32 only; the noise of 30 blocks is 5e-5 in log-probability, a wrong bias is 0.1 and more
# Where each architecture keeps the projections that write to the stream, and the other linear maps that share their bias switch.
_LLAMA_ATTN, _LLAMA_MLP = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)
_LAYOUT: dict[str, dict[Writer, tuple[str, tuple[str, ...]]]] = {
    "LlamaForCausalLM": {"attn": ("self_attn", _LLAMA_ATTN), "mlp": ("mlp", _LLAMA_MLP)},
    "Qwen2ForCausalLM": {"attn": ("self_attn", ("o_proj",)), "mlp": ("mlp", ("down_proj",))},
    "GPTNeoXForCausalLM": {
        "attn": ("attention", ("query_key_value", "dense")),
        "mlp": ("mlp", ("dense_h_to_4h", "dense_4h_to_h")),
    },
}
_SWITCH = {
    ("LlamaForCausalLM", "attn"): "attention_bias",
    ("LlamaForCausalLM", "mlp"): "mlp_bias",
    ("GPTNeoXForCausalLM", "attn"): "attention_bias",
}


@dataclass(frozen=True)
class Baked:
    """A baked checkpoint and how well it does what the hooks do.

    Attributes:
        path: The directory, for `load_model` or an engine that reads Hugging Face checkpoints of this architecture.
        difference: Largest absolute difference of log-probabilities (nats) between the baked model and the original with hooks.
        moved: The same between the baked model and the original without hooks: what `difference` has to be small against.
        dtype: Of the saved weights; `difference` includes their rounding.
        hooks: What was baked.
        changed: Names of the tensors that were changed or added.
    """

    path: Path
    difference: float
    moved: float
    dtype: str
    hooks: tuple[Spec, ...] = field(repr=False)
    changed: tuple[str, ...] = field(repr=False)


def bake(
    name_or_path: str | Path,
    hooks: Hooks,
    *,
    revision: str | None = None,
    prompts: Text | Sequence[Text] = VERIFY_PROMPTS,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    out: str | Path,
) -> Baked:
    """Save a copy of a model that behaves as if the hooks were always on.

    The MLP's and attention's last projections are changed by the formulas of this module; several hooks at one place act in their order.
    Llama gets ``mlp_bias`` or ``attention_bias`` in its config, with zeros for the biases that come along; GPT-NeoX has them already.
    The copy is reloaded and compared with the original under the hooks, and what was done is recorded in ``emolens.json``.

    Args:
        name_or_path: As in `load_model`, GGUF files included (their weights are saved dequantised).
        hooks: `steer_*` with one row, `ablate_attn_out` and `ablate_mlp_out`, all with ``positions="all"``.
        revision: As in `load_model`.
        prompts: A list of texts or chats to compare on.
        dtype: Of the saved weights; None is that in which `load_model` opens the model.
        overwrite: Replace a checkpoint that is at `out`. The new one is moved into place only when it is complete and measured.
        out: Directory to make: safetensors, config, tokenizer.

    Returns:
        `Baked`, with the measured difference in nats.

    Raises:
        ValueError: a hook or architecture that cannot be baked, and why; `out` is the model itself or is no checkpoint.
        FileExistsError: `out` is not empty.
        RuntimeError: the float32 copy does not do what the hooks do.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> hooks = em.steer_resid_post(directions["glimmer"], layer=1, dose=0.5)
        >>> loaded_from = model.tokenizer.name_or_path
        >>> with TemporaryDirectory() as folder:
        ...     baked = em.bake(loaded_from, hooks, out=f"{folder}/glimmering")
        >>> baked.difference < 1e-4 < baked.moved
        True
    """
    out = vacant_folder(out)
    _vacant(out, name_or_path, overwrite)
    ours = [_bakeable(name, hook) for name, hook in hooks]
    if not ours:
        raise ValueError("no hooks given: there is nothing to bake")
    prompts = several(prompts)

    original = load_model(name_or_path, revision=revision)
    info = model_info(original)
    _fits(info.architecture, ours)
    validate(original, hooks, allow_other_model=None)
    ids, plain = _log_probs(original, prompts, [])
    _, hooked = _log_probs(original, prompts, hooks)
    del original  # before the same weights are opened again

    hf_model, tokenizer, source, _ = open_hf(name_or_path, revision=revision)
    quantizer = getattr(hf_model, "hf_quantizer", None)
    if (
        quantizer is not None and source.gguf_file
    ):  # its weights are plain by now, only the label says otherwise
        quantizer.remove_quantization_config(hf_model)
    elif quantizer is not None:
        raise ValueError(
            f"{source.label} is quantised, and its weights cannot be changed exactly; bake the full model"
        )
    changed = _write(hf_model, ours)
    if dtype is not None:
        hf_model = hf_model.to(
            getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        )
    saved = str(hf_model.dtype).removeprefix("torch.")
    out.parent.mkdir(parents=True, exist_ok=True)
    half_done = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        half_done.mkdir()
        hf_model.save_pretrained(half_done, safe_serialization=True)
        tokenizer.save_pretrained(half_done)
        del hf_model
        baked_ids, baked = _log_probs(load_model(half_done, dtype=saved), prompts, [])
        if baked_ids != ids:
            raise RuntimeError(
                "the saved tokenizer splits the prompts otherwise than the original one"
            )
        difference, moved = (float((baked - other).abs().max()) for other in (hooked, plain))
        if not difference < (ALLOWED if saved in ("float32", "float64") else float("inf")):
            raise RuntimeError(
                f"the baked model differs from the hooks by {difference:.2e} nats (allowed {ALLOWED:.0e}); nothing was saved"
            )
        specs = tuple(hook.spec for hook in ours)
        record = {
            "made_from": info.to_dict(),
            "hooks": [asdict(spec) for spec in specs],
            "changed": changed,
            "dtype": saved,
            "max_log_prob_difference": difference,
            "max_log_prob_moved": moved,
            "prompts": list(prompts),
        }
        (half_done / RECORD).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        _move(half_done, out)
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
    return Baked(out, difference, moved, saved, specs, tuple(changed))


def _vacant(out: Path, name_or_path: str | Path, overwrite: bool) -> None:
    """Refuse a place where something would be lost."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty; give another directory, or overwrite=True")
    source = here(name_or_path)
    if source.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{out} holds the model that is read; give another directory")
    if not (out / "config.json").is_file():
        raise ValueError(
            f"{out} is no checkpoint (it has no config.json), and overwrite= replaces only those"
        )


def _move(half_done: Path, out: Path) -> None:
    old = half_done.with_name(half_done.name + ".old")
    if out.exists():
        out.rename(old)
    try:
        half_done.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _bakeable(name: str, hook: Any) -> Hook:
    """The hook, if what it does to every token is one fixed affine map of a projection's output."""
    if not isinstance(hook, Hook):
        raise ValueError(
            f"the hook at {name} is not from emolens: what it does is not known as a formula"
        )
    spec = hook.spec
    if spec.kind == "clamp":
        reason = "clamp is not baked; ablate_attn_out and ablate_mlp_out are"
    elif spec.kind == "rotate":
        reason = "a rotation depends on each activation, it is not affine"
    elif spec.kind == "patch":
        reason = "a patch is the activation of one run, not a map"
    elif hook.positions != "all":
        reason = "weights act on every token, so only positions='all' can be baked"
    elif spec.rows != 1:
        reason = f"weights act on every row alike, and this has {spec.rows} rows"
    elif spec.kind == "steer" and spec.hook_point == "resid_pre" and spec.layer == 0:
        reason = "nothing with a bias writes before block 0; steer resid_post of block 0, or resid_pre of block 1"
    elif spec.kind == "ablate" and spec.hook_point.startswith("resid"):
        reason = "the residual stream is a sum of many writers, and one layer's projection cannot take the rest out; use ablate_attn_out and ablate_mlp_out"
    elif spec.kind == "ablate" and torch.isfinite(hook.tensors[2]).any():
        reason = "it leaves attention sinks alone, which weights cannot; make it with sinks=True"
    else:
        return hook
    raise ValueError(f"cannot bake {spec}: {reason}")


def _fits(architecture: str, hooks: Sequence[Hook]) -> None:
    if architecture not in _LAYOUT:
        raise ValueError(f"cannot bake into {architecture}; allowed: {', '.join(_LAYOUT)}")
    if architecture != "Qwen2ForCausalLM":
        return
    for hook in hooks:
        if hook.spec.kind == "steer" or hook.tensors[1].any():
            raise ValueError(
                f"cannot bake {hook.spec}: Qwen-2.5 has no bias on the outputs of attention and MLP, and no config switch for one; "
                "only ablate_attn_out and ablate_mlp_out with method='zero' can be baked into it"
            )


def _log_probs(
    model: HookedModel, prompts: Sequence[Text], hooks: Hooks
) -> tuple[list[list[int]], Float[Tensor, "token d_vocab"]]:
    """Token ids of the prompts, and the log-probabilities after each real token."""
    encoded = encode(model, prompts)
    tokens, mask = pad(encoded, "left", device_of(model))
    run = partial(model.run_with_hooks, tokens, attention_mask=mask, return_type="logits")
    with torch.inference_mode():
        logits = checked(
            model, run(fwd_hooks=hooks), lambda more: run(fwd_hooks=[*hooks, *more]), mask
        )
    return [e.ids for e in encoded], logits[mask.bool()].float().log_softmax(-1).cpu()


def _place(spec: Spec) -> tuple[int, Writer]:
    """Block and projection whose output the hook changes."""
    if spec.hook_point == "resid_pre":
        return spec.layer - 1, "mlp"
    return spec.layer, "attn" if spec.hook_point in ("attn_out", "resid_mid") else "mlp"


@torch.no_grad()
def _write(hf_model: Any, hooks: Sequence[Hook]) -> list[str]:
    """Change the projections in place; returns the names of the tensors that are new or other."""
    architecture = type(hf_model).__name__
    layout, blocks = _LAYOUT[architecture], hf_model.base_model.layers
    before = dict.fromkeys(name for name, _ in hf_model.named_parameters())
    touched: list[nn.Parameter] = []
    # an ablation of the output comes before a step in the stream that the output is added to, whatever the order in the list
    for hook in sorted(hooks, key=lambda h: h.spec.hook_point.startswith("resid")):
        layer, writer = _place(hook.spec)
        inside, names = layout[writer]
        if hook.spec.kind == "steer" or hook.tensors[1].any():
            switch = _SWITCH.get((architecture, writer))
            if switch is not None and not getattr(hf_model.config, switch):
                setattr(hf_model.config, switch, True)
                for block in blocks:  # the switch is one for all blocks and all maps
                    for name in names:
                        linear = block.get_submodule(f"{inside}.{name}")
                        if linear.bias is None:
                            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        linear = blocks[layer].get_submodule(f"{inside}.{names[-1]}")
        bias = None if linear.bias is None else linear.bias.double()
        if hook.spec.kind == "steer":
            assert bias is not None  # given above, or refused by `_fits`
            bias = bias + hook.tensors[0][0].to(bias)
        else:
            weight = linear.weight.double()
            basis, target = (t[0].to(weight) for t in hook.tensors[:2])
            now = einsum(basis, weight, "component d_model, d_model d_in -> component d_in")
            linear.weight.copy_(
                weight - einsum(basis, now, "component d_model, component d_in -> d_model d_in")
            )
            touched.append(linear.weight)
            if bias is not None:
                step = target - einsum(basis, bias, "component d_model, d_model -> component")
                bias = bias + einsum(basis, step, "component d_model, component -> d_model")
        if bias is not None:
            assert linear.bias is not None  # `bias` was read from it
            linear.bias.copy_(bias)
            touched.append(linear.bias)
    ids = {id(p) for p in touched}
    return [name for name, p in hf_model.named_parameters() if id(p) in ids or name not in before]
