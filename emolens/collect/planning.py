"""What a collection will cost, before anyone pays for it: tokens, operations, memory, hours and disk, each with its formula.

Speed is measured (a five-second probe of the real model on the real texts) or looked up (the peak of a named device times
`UTILISATION`). It is an estimate of the forward passes alone: loading the model and fitting directions come on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from emolens._typing import Blocks, HookedModel
from emolens.collect.collection import disk_bytes
from emolens.collect.forward import collect
from emolens.collect.pooling import LENGTHS
from emolens.collect.recipe import SAMPLED, token_budget, token_bytes
from emolens.models.catalogue import CATALOGUE
from emolens.models.identity import model_info
from emolens.models.points import check_layers, existing_layers
from emolens.models.tokens import encode
from emolens.sets.emotion_sets import EmotionSet

# peak of dense bfloat16 (float16 for V100) arithmetic, operations a second, from the makers' data sheets
DEVICES = {
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "rtx4090": 165e12,
    "v100": 125e12,
}
UTILISATION = 0.4  # of that peak; an assumption, for batches of thousands of tokens
TOKENS_PER_WORD = 1.35  # where no tokenizer is at hand; SmolLM2 has 1.31 on the shipped stories


@dataclass(frozen=True)
class Plan:
    """An estimate. `str(plan)` is the table with the formulas.

    Attributes:
        model: Its name.
        n_texts: Stories and neutral texts.
        n_neutral: Neutral texts among them, of which single tokens are kept too.
        tokens_per_text: On average.
        n_layers: Blocks to collect.
        d_model: Width of the residual stream.
        block_parameters: Parameters of the blocks that run, up to the deepest that is collected.
        weight_bytes: Of the model, on each device.
        batch_bytes: Of one batch of activations at most, on each device.
        moment_bytes: Of the sums, in main memory.
        tokens_per_second: Of one device.
        speed_from: In words, where that speed is from.
        devices: How many work side by side.

    Example:
        >>> from emolens.collect import plan_named
        >>> plan = plan_named("smollm2-135m-instruct", stories, "a100", layers=[10])
        >>> plan.n_layers, plan.hours > 0
        (1, True)
    """

    model: str
    n_texts: int
    n_neutral: int
    tokens_per_text: float
    n_layers: int
    d_model: int
    block_parameters: int
    weight_bytes: int
    batch_bytes: int
    moment_bytes: int
    tokens_per_second: float
    speed_from: str
    devices: int

    @property
    def n_tokens(self) -> float:
        """Tokens of all texts."""
        return self.n_texts * self.tokens_per_text

    @property
    def flops(self) -> float:
        """Two operations a parameter and token, and attention to half of the text's tokens."""
        return self.n_tokens * (
            2 * self.block_parameters + 2 * self.n_layers * self.d_model * self.tokens_per_text
        )

    @property
    def hours(self) -> float:
        """Of the forward passes on all devices together; loading and fitting come on top."""
        return self.n_tokens / (self.tokens_per_second * self.devices) / 3600

    @property
    def disk(self) -> int:
        """Bytes of the folder of shards."""
        return disk_bytes(self.n_texts, self.n_layers, self.d_model, self.n_neutral)

    def __str__(self) -> str:
        took = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{self.hours * 3600:.0f} seconds"
        memory = self.weight_bytes + self.batch_bytes + self.moment_bytes
        rows = [
            ("texts", f"{self.n_texts:,}", "emotions x stories, and the neutral texts"),
            ("tokens", f"{self.n_tokens:.3g}", f"texts x {self.tokens_per_text:.0f} tokens a text"),
            ("operations", f"{self.flops:.2e}", f"tokens x (2 x {self.block_parameters:.3g} parameters + 2 layers d_model tokens-a-text)"),
            ("memory", f"{memory / 1e9:.1f} GB", f"a device: weights {self.weight_bytes / 1e9:.1f} + a batch {self.batch_bytes / 1e9:.1f} (at most) + sums {self.moment_bytes / 1e9:.2f} (in main memory)"),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s", f"a device, {self.speed_from}"),
            ("time", took, f"tokens / (speed x {self.devices} devices); without loading and fitting"),
            ("disk", f"{self.disk / 1e9:.1f} GB", f"(texts + {SAMPLED + len(LENGTHS)} rows of each of {self.n_neutral} neutral texts) x (layers + 1) x d_model x 4 bytes, and 512 bytes a text"),
        ]  # fmt: skip
        return "\n".join(f"{name:<11}{value:>18}   {how}" for name, value, how in rows)


def plan_named(
    model: str, emotions: EmotionSet, device_name: str, *, stories_per_emotion: int | None = None,
    layers: Blocks | None = None, devices: int = 1,
) -> Plan:  # fmt: skip
    """An estimate for a model of the catalogue on a device by name, without opening the model.

    Args:
        model: Its alias.
        emotions: The set, for its texts.
        device_name: As in `DEVICES`, in any case of letters.
        stories_per_emotion: Of the run that is planned; None is what the set has.
        layers: Blocks to collect; None is every one.
        devices: As many of them.

    Returns:
        `Plan`, in half precision.

    Raises:
        ValueError: unknown model or device, or a layer that does not exist.

    Example:
        >>> from emolens.collect import plan_named
        >>> plan_named("smollm2-135m-instruct", stories, "a100").speed_from
        '40% of the peak of a100 in half precision'
    """
    if device_name.lower() not in DEVICES:
        raise ValueError(
            f"device {device_name!r} is not known; known: {', '.join(DEVICES)}; or leave it out, to measure"
        )
    entry = CATALOGUE.get(model.lower())
    if entry is None:
        raise ValueError(
            f"{model!r} is not in the catalogue (`emolens models`), so its size is not known; measure instead"
        )
    chosen = existing_layers(layers, entry.n_layers)
    per_text = (
        TOKENS_PER_WORD
        * sum(len(t.text.split()) for _, t in emotions.texts())
        / len(emotions.texts())
    )
    block_parameters = entry.n_block_parameters * (max(chosen) + 1) // entry.n_layers
    per_token = 2 * block_parameters + 2 * len(chosen) * entry.d_model * per_text
    return Plan(
        model,
        _n_texts(emotions, stories_per_emotion),
        len(emotions.neutral),
        per_text,
        len(chosen),
        entry.d_model,
        block_parameters,
        entry.n_parameters * 2,
        65_536 * token_bytes(entry.d_model, 4 * entry.d_model, entry.d_model // 64, 1024),
        _moment_bytes(emotions, len(chosen), entry.d_model),
        UTILISATION * DEVICES[device_name.lower()] / per_token,
        f"{UTILISATION:.0%} of the peak of {device_name} in half precision",
        devices,
    )


def plan_measured(
    model: HookedModel, emotions: EmotionSet, *, stories_per_emotion: int | None = None,
    layers: Blocks | None = None, devices: int = 1, seconds: float | int = 5.0,
) -> Plan:  # fmt: skip
    """An estimate from a probe: stories of the set are collected for a few seconds on this machine.

    Args:
        model: The loaded model.
        emotions: The set, for its texts.
        stories_per_emotion: Of the run that is planned; None is what the set has.
        layers: Blocks to collect; None is every one.
        devices: As many devices as fast as this one.
        seconds: Length of the probe, after a batch to warm up.

    Returns:
        `Plan`.

    Raises:
        ValueError: a layer that does not exist.

    Example:
        >>> from emolens.collect import plan_measured
        >>> plan_measured(model, stories, seconds=0.01).n_layers
        3
    """
    chosen = check_layers(model, "resid_post", layers)
    texts = [t.text for _, t in emotions.texts()]
    step = len(texts) // 64 or 1
    sample = texts[::step]  # across the emotions, whose stories may differ in length
    lengths = [len(e.ids) for e in encode(model, sample)]
    collect(model, sample[:8], "resid_post", layers=chosen, progress=False)
    n_tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        collect(model, sample, "resid_post", layers=chosen, progress=False)
        n_tokens += sum(lengths)
    info, cfg = model_info(model), model.cfg
    parameters = list(model.parameters())
    blocks = sum(p.numel() for b in list(model.blocks)[: max(chosen) + 1] for p in b.parameters())
    return Plan(
        info.name,
        _n_texts(emotions, stories_per_emotion),
        len(emotions.neutral),
        sum(lengths) / len(lengths),
        len(chosen),
        info.d_model,
        blocks,
        sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in parameters}.values()),
        token_budget(model)
        * token_bytes(cfg.d_model, cfg.d_mlp or 4 * cfg.d_model, cfg.n_heads, min(cfg.n_ctx, 1024)),
        _moment_bytes(emotions, len(chosen), info.d_model),
        n_tokens / elapsed,
        f"measured here for {elapsed:.0f} seconds",
        devices,
    )


def _n_texts(emotions: EmotionSet, stories_per_emotion: int | None) -> int:
    stories = sum(len(s) for s in emotions.stories.values())
    return len(emotions.neutral) + (
        stories if stories_per_emotion is None else stories_per_emotion * len(emotions.names)
    )


def _moment_bytes(emotions: EmotionSet, n_layers: int, d_model: int) -> int:
    return 8 * len(emotions.names) * len(emotions.topics) * n_layers * d_model
