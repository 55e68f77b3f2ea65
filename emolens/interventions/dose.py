"""How much is enough: the dose that moves the words at a given damage to neutral text, and the same thing said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from emolens import stats
from emolens._typing import HookedModel, Text, block_number
from emolens.directions.value import EmotionDirections
from emolens.interventions.check import validate
from emolens.interventions.measure import Cell, Run, Written, cut_prompt, vector_of
from emolens.interventions.sweep import Sweep
from emolens.interventions.verbs import steer_at
from emolens.models.running import run_to, unembed
from emolens.models.tokens import encode
from emolens.sets.corpus import several
from emolens.sets.emotion_sets import EmotionSet


@dataclass(frozen=True)
class DoseCalibration:
    """A dose chosen on half of the texts (and prompts); everything here was measured on the other half.

    Attributes:
        direction, layer: What was added, and after which block.
        dose: In median residual norms.
        budget: Of the KL divergence, in nats a token.
        kl: Nats a token on the neutral texts.
        n_texts: How many those are.
        perplexity_budget: Of the ratio, where prompts were given.
        perplexity_ratio: Of what is written, geometric mean over prompts.
        distinct, length: Of what is written, means over prompts.
        n_prompts: That were written from.
    """

    direction: str
    layer: int
    dose: float
    budget: float
    kl: stats.Estimate
    n_texts: int
    perplexity_budget: float | None = None
    perplexity_ratio: stats.Estimate | None = None
    distinct: float | None = None
    length: float | None = None
    n_prompts: int = 0

    def __str__(self) -> str:
        kl = f"KL {self.kl} nats a token on {self.n_texts} other texts (budget {self.budget:g})"
        if self.perplexity_ratio is not None:
            kl += (
                f"; perplexity of its text x {self.perplexity_ratio} on {self.n_prompts} other prompts (budget {self.perplexity_budget:g}), "
                f"distinct pairs {self.distinct:.2f}, {self.length:.0f} tokens"
            )
        return f"{self.direction} at layer {self.layer}: dose {self.dose:.3g}, {kl}"


def calibrate_dose(
    model: HookedModel,
    direction: EmotionDirections,
    neutral: Sequence[Text],
    *,
    layer: SupportsIndex | None = None,
    budget: float = 0.1,
    prompts: Sequence[Text] = (),
    perplexity_budget: float = 1.5,
    max_new_tokens: int = 24,
    max_dose: float = 1.0,
    neutral_tokens: int = 64,
    seed: int = 0,
) -> DoseCalibration:
    """The largest dose that changes neutral text, and what is written, by no more than a budget.

    By bisection (to 2 % of itself) on half of the texts. Perplexity need not grow with the dose, so with prompts the doses 1, .9, .81 ...
    times that one are tried on half of them, and the largest within its budget is taken. Reported on the other halves, with intervals.

    Args:
        model: From `em.load_model`, or your own.
        direction: One emotion.
        neutral: At least four texts.
        layer: Block; None is the directions' default.
        budget: Mean KL(unsteered || steered) in nats a token.
        prompts: At least four, to write from; without any only the KL counts.
        perplexity_budget: Perplexity of what is written under the unsteered model, in units of that of its own text.
        max_new_tokens: To write for each prompt, at most.
        max_dose: Where to stop looking, in median residual norms.
        neutral_tokens: Of each neutral text the first so many count.
        seed: Of the halves.

    Returns:
        `DoseCalibration`.

    Raises:
        ValueError: several directions, fewer than four texts or prompts, a budget that is not positive (of perplexity: not above 1), KL that
            falls as the dose grows, or no dose within the budget of perplexity.

    Example:
        >>> texts = ["The door was open.", "He counted the steps.", "The kettle was on.", "A dog barked.", "It rained."]
        >>> found = em.calibrate_dose(model, directions["glimmer"], texts, layer=1, budget=0.05)
        >>> found.direction, found.layer, 0 < found.dose <= 1, found.n_texts
        ('glimmer', 1, True, 3)
    """
    if len(direction.emotions) != 1:
        raise ValueError(f"one direction, as in v['joy'], not {len(direction.emotions)}")
    if len(neutral) < 4 or not budget > 0 or not max_dose > 0:
        raise ValueError(
            f"{len(neutral)} texts, budget={budget}, max_dose={max_dose}: at least four texts, both above zero"
        )
    if prompts and (len(prompts) < 4 or not perplexity_budget > 1 or max_new_tokens < 1):
        raise ValueError(
            f"{len(prompts)} prompts, perplexity_budget={perplexity_budget}, max_new_tokens={max_new_tokens}: at least four prompts, above one, at least one token"
        )
    layer = direction.layer if layer is None else block_number(layer)
    validate(
        model,
        steer_at(direction.hook_point, direction, dose=0.0, layer=layer),
        allow_other_model=None,
    )
    rng = np.random.default_rng(seed)
    runs = [
        Run(model, [], [cut_prompt(e, neutral_tokens) for e in encode(model, part)], {})
        for part in _halves(neutral, rng)
    ]
    e = direction.emotions[0]

    def vectors(doses: Iterable[float]) -> Tensor:
        return torch.stack([vector_of(direction, Cell(e, None, layer, dose)) for dose in doses])

    def damage(run: Run, dose: float) -> Tensor:
        return run.damage(vectors([dose]), direction.hook_point, layer)[0]

    low, high = 0.0, max_dose
    at_low, at_high = 0.0, float(damage(runs[0], max_dose).mean())
    if at_high > budget:
        while high - low > 0.02 * high:
            middle = (low + high) / 2
            kl = float(damage(runs[0], middle).mean())
            if not at_low - 1e-6 <= kl <= at_high + 1e-6:
                raise ValueError(
                    f"KL does not grow with the dose between {low:.3g} and {high:.3g}; lower max_dose"
                )
            if kl <= budget:
                low, at_low = middle, kl
            else:
                high, at_high = middle, kl
    else:
        low = max_dose
    text: dict[str, Any] = {}
    if prompts:
        writers = [
            Run(model, encode(model, part), [], {}, max_new_tokens=max_new_tokens)
            for part in _halves(prompts, rng)
        ]

        def writes(run: Run, dose: float) -> tuple[Written, Tensor]:
            made = run.written(run.text(vectors([dose]), direction.hook_point, layer))
            log_ratio = (made.log_perplexity - run.unsteered["log_perplexity"])[0]
            return made, log_ratio[
                ~log_ratio.isnan()
            ]  # an empty text has no perplexity; `length` shows it

        for dose in (low * 0.9**k for k in range(22)):  # down to a tenth
            if float(writes(writers[0], dose)[1].mean()) <= math.log(perplexity_budget):
                low = dose
                break
        else:
            raise ValueError(
                f"no dose up to {low:.3g} keeps the perplexity within {perplexity_budget:g} times"
            )
        made, log_ratio = writes(writers[1], low)
        ratio = stats.bootstrap(lambda i: float(log_ratio[i].mean().exp()), range(len(log_ratio)))
        text = {
            "perplexity_budget": perplexity_budget,
            "perplexity_ratio": ratio,
            "distinct": float(made.distinct.nanmean()),
            "length": float(made.length.mean()),
            "n_prompts": made.length.numel(),
        }
    kl = damage(runs[1], low).double().numpy()
    return DoseCalibration(
        e, layer, low, budget, stats.bootstrap_mean(kl, range(len(kl))), len(kl), **text
    )


def _halves(texts: Sequence[Text], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    order = rng.permutation(len(texts))
    half = len(order) // 2
    return [texts[i] for i in order[:half]], [texts[i] for i in order[half:]]


def prompt_baseline(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    emotions: EmotionSet,
    *,
    names: Sequence[str] | None = None,
    neutral: Sequence[str] | None = None,
    neutral_tokens: int = 64,
    template: str = "Someone feels {adjective} today. ",
) -> Sweep:
    """The same readouts with an instruction in words before the text instead of a direction in the stream.

    `calibrate_dose` with the KL of the instruction as its budget gives the dose to compare at.

    Args:
        model: From `em.load_model`, or your own.
        prompts: Texts or chats that end where the word would come.
        emotions: A set, whose adjectives are said and whose target words are read.
        names: Which emotions are said; None is all with an adjective.
        neutral: Texts to measure the damage on.
        neutral_tokens: Of each the first so many count.
        template: Put before every prompt and neutral text; in a chat before its first message.

    Returns:
        `Sweep` with control "prompt", layer -1 and dose 0.

    Raises:
        ValueError: no prompt, or an emotion without an adjective.

    Example:
        >>> found = em.prompt_baseline(model, "Today she felt", stories, names=["glimmer"])
        >>> found.change.shape, found.cells[0].control
        (torch.Size([1, 1, 4]), 'prompt')
    """
    asked = several(prompts)
    words = {e.name: e.target_words for e in emotions.emotions if e.target_words}
    adjective = {e.name: e.adjective for e in emotions.emotions if e.adjective}
    names = list(adjective) if names is None else list(names)
    if unknown := [n for n in names if n not in adjective]:
        raise ValueError(f"{unknown[0]!r} has no adjective in set {emotions.name!r}")
    texts = (
        [cut_prompt(e, neutral_tokens) for e in encode(model, several(neutral))] if neutral else []
    )
    run = Run(model, encode(model, asked), texts, dict(words))
    change, kl = [], []
    for name in names:
        said = template.format(adjective=adjective[name])
        told = Run(model, encode(model, [_said_before(said, p) for p in asked]), [], dict(words))
        change.append(told.baseline - run.baseline)
        if texts:
            kl.append(_told_damage(model, run, said))
    cells = tuple(Cell(n, "prompt", -1, 0.0) for n in names)
    plain = tuple(e.text for e in run.encoded)
    damage = torch.stack(kl) if kl else None
    return Sweep(cells, plain, tuple(words), torch.stack(change), run.baseline, damage)


def _said_before(said: str, prompt: Text) -> Text:
    if isinstance(prompt, str):
        return said + prompt
    first, *rest = prompt
    return [
        {**first, "content": [said, *([c] if isinstance(c := first["content"], str) else c)]},
        *rest,
    ]


@torch.no_grad()
def _told_damage(model: HookedModel, run: Run, said: str) -> Float[Tensor, " text"]:
    """KL of each neutral text with the instruction before it, over the same tokens."""
    [before] = encode(model, [said.rstrip()])
    out = []
    for i, e in enumerate(run.neutral):
        bos = int(
            model.tokenizer.bos_token_id is not None and e.ids[:1] == [model.tokenizer.bos_token_id]
        )
        ids = torch.tensor([before.ids + e.ids[bos:]], device=run.device)
        resid = run_to(model, ids, torch.ones_like(ids), model.cfg.n_layers)
        log = unembed(model, resid)[0].float().log_softmax(-1)
        n = len(e.ids)
        base, told = run.neutral_log[i, 1:n], log[-(n - 1) :]
        out.append((base.exp() * (base - told)).sum(-1).mean())
    return torch.stack(out).cpu()
