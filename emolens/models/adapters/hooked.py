"""Build a `HookedTransformer` around tensors that already exist.

The module tree is made with its parameters on the meta device, so that nothing is allocated, and each parameter is then
replaced by the view that the family's adapter yields. TransformerLens's four weight-processing switches run on copies and
their results are laid out again in the fast strided form.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emolens.models.adapters._refuse import ConversionError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def to_hooked(
    hf_model: Any,
    family: Any,
    *,
    tokenizer: Any,
    model_name: str,
    process_weights: dict[str, bool],
    default_prepend_bos: bool,
    device: torch.device | None = None,
    n_devices: int = 1,
) -> HookedTransformer:
    """Convert a HF model that is already in its final dtype and, but for `n_devices`, on its final device.

    Args:
        hf_model: The loaded model; a GPT-NeoX model is taken apart, the others keep working and share their weights.
        family: The adapter module of the architecture (`emolens.models.adapters.family_of`).
        process_weights: TransformerLens's `fold_ln`, `center_writing_weights`, `center_unembed`, `fold_value_biases`.
        device, n_devices: Spread the blocks over this many devices of this kind, as TransformerLens does, from wherever `hf_model` is.

    Returns:
        A `HookedTransformer` in eval mode. Without processing its parameters are views of `hf_model`'s.
    """
    from accelerate import init_empty_weights
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    first = next(hf_model.parameters())
    processed = any(process_weights.values())
    if processed and getattr(hf_model.config, "mlp_bias", False):
        raise ConversionError(
            "process_weights is not defined for gated MLPs with biases; load without processing"
        )
    cfg = HookedTransformerConfig(
        **family.config(hf_model.config),
        model_name=model_name,
        original_architecture=type(hf_model).__name__,
        tokenizer_name=None,
        dtype=first.dtype,
        device=str(first.device if n_devices == 1 else device),
        n_devices=n_devices,
        default_prepend_bos=default_prepend_bos,
        init_weights=False,
    )
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.filterwarnings(
            "ignore", message="HookedTransformer is deprecated", category=DeprecationWarning
        )
        model = HookedTransformer(cfg, None, move_to_device=False)
        if getattr(hf_model.config, "mlp_bias", False):
            for block in model.blocks:
                block.add_module("mlp", _biased_gated_mlp(cfg))
            model.setup()  # names the new hook points

    loaded = dict(family.parameters(hf_model))
    for name, parameter in list(model.named_parameters()):
        tensor = loaded.pop(name, None)
        if tensor is None:  # a bias that this checkpoint does not have
            if not name.rsplit(".", 1)[1].lstrip("_").startswith("b_"):
                raise ConversionError(f"the checkpoint has no tensor for {name}")
            tensor = torch.zeros(parameter.shape, dtype=first.dtype, device=first.device)
        if tensor.shape != parameter.shape:
            raise ConversionError(
                f"{name}: the checkpoint has shape {list(tensor.shape)}, not {list(parameter.shape)}"
            )
        _assign(model, name, tensor.detach())
    if loaded:
        raise ConversionError(
            f"tensors without a place in a HookedTransformer: {', '.join(loaded)}"
        )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(first.device)

    if processed:
        _process(model, process_weights)
    if n_devices > 1:
        model.move_model_modules_to_device()
    _attach_tokenizer(model, tokenizer)
    return model.eval()


def _biased_gated_mlp(cfg: Any) -> nn.Module:
    """TransformerLens's gated MLP with biases inside the product: act(x W_gate + b_gate) * (x W_in + b_up), then W_out."""
    from transformer_lens.components.mlps.gated_mlp import GatedMLP

    class BiasedGatedMLP(GatedMLP):
        def __init__(self) -> None:
            super().__init__(cfg)
            self.b_gate = nn.Parameter(torch.empty_like(self.b_in))
            self.b_up = nn.Parameter(torch.empty_like(self.b_in))

        def forward(self, x: Tensor) -> Tensor:
            pre = self.hook_pre(functional.linear(x, self.W_gate.T, self.b_gate))
            pre_linear = self.hook_pre_linear(functional.linear(x, self.W_in.T, self.b_up))
            post = self.hook_post(self.act_fn(pre) * pre_linear)
            return functional.linear(post, self.W_out.T, self.b_out)

    return BiasedGatedMLP()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    setattr(module, leaf, nn.Parameter(tensor))


def _process(model: Any, process_weights: dict[str, bool]) -> None:
    """Run TransformerLens's processing and restore the fast layout, which its re-computed tensors have lost."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    # its loader copies into place: give it memory of its own
    for name, parameter in list(model.named_parameters()):
        _assign(model, name, torch.empty_like(parameter))
    model.load_and_process_state_dict(state, **process_weights)
    for name, parameter in list(model.named_parameters()):
        leaf = name.rsplit(".", 1)[1].lstrip("_")
        if leaf in ("W_Q", "W_K", "W_V"):
            _assign(model, name, parameter.detach().transpose(1, 2).contiguous().transpose(1, 2))
        elif leaf == "W_O":
            _assign(model, name, parameter.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
        elif leaf in ("W_in", "W_gate", "W_out", "W_U"):
            _assign(model, name, parameter.detach().T.contiguous().T)


def _attach_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give the model its tokenizer as it is.

    TransformerLens's own `set_tokenizer` reloads it with BOS added, by name, from the hub; here the user's tokenizer is kept.
    """
    model.tokenizer = tokenizer
    if tokenizer is not None:
        model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
