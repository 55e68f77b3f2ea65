"""LoRA adapters: merged, whichever way they lie, or refused by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Tiny, tiny_tokenizer

import emolens as em
from emolens.models import adapters
from emolens.models.adapters import _refuse

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'emolens[lora]'")

HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
BACKENDS = ("hooked", "bridge")[not HAS_HOOKED :]
IDS = torch.arange(5, 25)[None]
# float32: one product of a merged weight against two of its parts, on weights that the adapter makes ten times as large
LOGPROB = 1e-4
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "neox": ["query_key_value", "dense"],
}


def adapted(path: Path, folder: Path, family: str = "llama", **config: Any) -> tuple[Any, Any]:
    """Save an adapter of a tiny model; log-probabilities with it and without."""
    from transformers import AutoModelForCausalLM

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(IDS).logits.log_softmax(-1)

    base = AutoModelForCausalLM.from_pretrained(path)
    without = logits(base)
    options = {"r": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return logits(model), without


def off(model: Any, wanted: Any) -> float:
    with torch.no_grad():
        return (model(IDS).log_softmax(-1) - wanted).abs().max().item()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "use_dora": True}),
        ("qwen2", {"bias": "lora_only"}),
        ("neox", {}),
    ],
    ids=str,
)
def test_an_adapter_alone_or_beside_its_model_is_merged(
    tiny: Tiny, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    wanted, without = adapted(tiny(family), alone, family, **config)
    shutil.copytree(tiny(family), both)
    for file in alone.glob("adapter*"):
        shutil.copy(file, both)
    prints = set()
    for place in (alone, both):
        for backend in BACKENDS:
            model = em.load_model(place, backend=backend, verify=True)
            assert off(model, wanted) < LOGPROB < 0.1 < off(model, without)
            info = em.model_info(model)
            assert (info.name, info.adapter) == (place.name, f"{place.name} (LoRA, r=4)")
            assert str(tmp_path) not in json.dumps(info.to_dict())
            prints.add(info.fingerprint)
    assert len(prints) == 1
    assert em.model_info(em.load_model(tiny(family))).fingerprint not in prints


def test_without_peft_an_adapter_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(tiny("llama"), tmp_path / "alone")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(
        ModuleNotFoundError,
        match=r"alone holds a LoRA adapter \(adapter_config\.json\).*'emolens\[lora\]'",
    ):
        em.load_model(tmp_path / "alone")


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def test_what_cannot_be_merged_faithfully_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def folder(name: str) -> Path:
        adapted(tiny("llama"), tmp_path / name)
        return tmp_path / name

    def refused(path: Path, message: str) -> None:
        with pytest.raises((adapters.ConversionError, OSError), match=message):
            em.load_model(path, backend="bridge")

    other = folder("prompts")
    _edit(other, peft_type="PREFIX_TUNING")
    refused(other, r"prompts holds a PREFIX_TUNING adapter .* other kinds are not converted")
    gone = folder("gone")
    _edit(gone, base_model_name_or_path=str(tmp_path / "nowhere"))
    refused(
        gone,
        r"gone: the model of this adapter, by its adapter_config\.json: .*no such file or directory",
    )
    pickled = folder("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, r"pickled: adapter_config\.json is there, but no adapter_model\.safetensors")
    for name, change in (("more", "used"), ("fewer", "missing")):
        path = folder(name)
        weights = load_file(path / "adapter_model.safetensors")
        first = next(iter(weights))
        if change == "used":
            weights[first.replace("layers.0", "layers.7")] = weights[first].clone()
        else:
            del weights[first]
        save_file(weights, path / "adapter_model.safetensors")
        refused(path, rf"{name}: the adapter's tensor \S+ is (not )?{change}")
    wide = folder("wide")
    _edit(wide, base_model_name_or_path=str(tiny("llama", hidden_size=64)))
    refused(wide, r"wide: this adapter does not fit")


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, when the test makes the adapter
def test_an_adapter_on_one_of_two_tied_matrices_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    adapted(tiny("qwen2"), tmp_path / "tied", "qwen2", target_modules=["lm_head"])
    with pytest.raises(adapters.ConversionError, match=r"tied: .*tied embeddings cannot be merged"):
        em.load_model(tmp_path / "tied", backend="bridge")


def test_lora_layers_are_never_read_through_their_weight(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), hf_model)
    with pytest.raises(adapters.ConversionError, match="a layer of type Linear is not converted"):
        dict(adapters.family_of("LlamaForCausalLM").parameters(hf_model))
    with pytest.raises(ValueError, match=r"this model has LoRA layers.*merge_and_unload\(\)"):
        em.wrap(hf_model)
    with pytest.raises(adapters.ConversionError, match="a layer of type Scaled is not converted"):
        _refuse.plain(type("Scaled", (torch.nn.Linear,), {})(2, 2))


def test_the_adapters_own_tokenizer_is_taken_before_that_of_its_model(
    tiny: Tiny, tmp_path: Path
) -> None:
    adapted(tiny("llama"), tmp_path / "a")
    assert em.load_model(tmp_path / "a").tokenizer.chat_template is None
    tiny_tokenizer("chat").save_pretrained(tmp_path / "a")
    assert em.load_model(tmp_path / "a").tokenizer.chat_template is not None


def test_the_revision_of_the_model_that_an_adapter_was_made_for_is_taken(
    tiny: Tiny, tmp_path: Path
) -> None:
    adapted(tiny("llama"), tmp_path / "a")
    _edit(tmp_path / "a", base_model_name_or_path="EleutherAI/pythia-70m", revision="step7")
    with pytest.raises(ValueError, match="'step7' is not a published Pythia checkpoint"):
        em.load_model(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, when the test makes the adapter
def test_an_adapter_without_a_merged_form_or_with_nan_is_refused_by_name(
    tiny: Tiny, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    adapted(tiny("llama"), tmp_path / "biased", lora_bias=True)
    adapted(tiny("llama"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    for name in ("biased", "damaged"):
        with pytest.raises(
            adapters.ConversionError, match=f"{name}: this adapter cannot be merged"
        ):
            em.load_model(tmp_path / name)
