"""Who writes a direction: the residual stream split into what each embedding, head and MLP added.

A sum, hence exact, but blind to indirect effects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, SupportsIndex

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from emolens._table import Table
from emolens._typing import HookedModel, hook_name, typed
from emolens.directions.value import EmotionDirections
from emolens.interventions.metrics import check_single, heat_map
from emolens.interventions.patching import Prompts, cache_of
from emolens.models.identity import check_model
from emolens.models.points import device_of
from emolens.models.running import checked
from emolens.models.tokens import encode
from emolens.sets.corpus import several


@typed
@dataclass(frozen=True, eq=False)
class Attribution:
    """Who writes a direction: x.v / |v| at resid_post of `layer` as a sum over everything that was added to x.

    Attributes:
        emotion: Whose direction v is.
        layer: The block after which x is read.
        labels: "embed", "L3H5", "L3 mlp", "L3 bias" (the biases of both outputs).
        values: `[entry]`, mean over ordinary tokens; `[token entry]` for single tokens, in the stream's units.
        total: `[]` or `[token]`, the projection itself.
        error: Largest |sum of entries - projection| / |x| over tokens.
        n_heads: Heads of a block.
        tokens: Strings of the tokens, for single tokens.

    Raises:
        jaxtyping.TypeCheckError: values and total of other tokens.
        ValueError: another number of labels than of entries.
    """

    emotion: str
    layer: int
    labels: tuple[str, ...]
    values: Float[Tensor, "*token entry"]
    total: Float[Tensor, "*token"]
    error: float
    n_heads: int
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.shape[-1:] != (len(self.labels),):
            raise ValueError(
                f"values {list(self.values.shape)} are [entry] or [token entry], for {len(self.labels)} labels"
            )

    @property
    def mean(self) -> Float[Tensor, " entry"]:
        """Mean over the tokens, in the stream's units."""
        return self.values if self.values.ndim == 1 else self.values.mean(0)

    @property
    def heads(self) -> Float[Tensor, "layer head"]:
        """What each head writes, mean over tokens."""
        of_heads = [i for i, name in enumerate(self.labels) if "H" in name]
        return rearrange(self.mean[of_heads], "(layer head) -> layer head", head=self.n_heads)

    def top(self, k: int = 10) -> Table:
        """The k entries of largest absolute value, mean over tokens.

        Args:
            k: How many at most.

        Returns:
            `Table` of entry and value (in the stream's units), the largest first.

        Example:
            >>> found = em.attribute(model, directions["glimmer"], "She laughed out loud.", layer=0)
            >>> sorted(found.top(7)["entry"])
            ['L0 bias', 'L0 mlp', 'L0H0', 'L0H1', 'L0H2', 'L0H3', 'embed']
        """
        order = self.mean.abs().argsort(descending=True, stable=True)[:k].tolist()
        rows = tuple((self.labels[i], float(self.mean[i])) for i in order)
        return Table(("entry", "value"), rows)

    def _title(self) -> str:
        return f"{self.emotion} at resid_post {self.layer}"

    def __repr__(self) -> str:
        total = float(self.total.mean())
        lines = [f"{self._title()}: x.v = {total:.3f}, error {self.error:.1e} of |x|"]
        return "\n".join(lines + [f"  {name:<9}{x:9.3f}" for name, x in self.top(10)])

    def _repr_html_(self) -> str:
        """All entries: a row for each block with its heads, MLP and biases, and the embedding in the first."""
        title = f"{self._title()}: what each part writes (x.v = {float(self.total.mean()):.3f})"
        entry = dict(zip(self.labels, self.mean.tolist(), strict=True))
        rows = [f"L{i}" for i in range(self.layer + 1)]
        heads = [f"H{h}" for h in range(self.n_heads)]
        table = []
        for r in rows:
            written = [entry[r + end] for end in (*heads, " mlp", " bias")]
            table.append([*written, entry["embed"] if r == "L0" else math.nan])
        values = np.array(table)
        limit = float(np.nanmax(np.abs(values))) or 1.0
        return heat_map(title, rows, [*heads, "mlp", "bias", "embed"], values, limit)


def _or(bias: Tensor | None, zero: Tensor) -> Tensor:
    return zero if bias is None else bias


@typed
def attribute(
    model: HookedModel,
    direction: EmotionDirections,
    prompts: Prompts,
    *,
    layer: SupportsIndex | None = None,
    per: Literal["component", "token"] = "component",
    allow_other_model: bool = False,
) -> Attribution:
    """Split the projection on one emotion into what the embedding, each head and each MLP wrote.

    ``x.v = embed.v + sum_l (sum_h z_lh W_O_lh . v + mlp_l . v + bias_l . v)``, with v of norm one and the first token left out.

    Args:
        model: From `em.load_model`, or your own.
        direction: One emotion, at resid_post.
        prompts: One or several texts or chats.
        layer: The block after which x is read; None is the directions' default.
        per: "component" is the mean over the tokens of all prompts, "token" keeps each.
        allow_other_model: Take directions of another model with the same shape.

    Returns:
        `Attribution`, in the stream's units.

    Raises:
        ValueError: several emotions, directions of another hook point or model, a prompt of one token, or an architecture that
            normalises outputs after W_O, where the heads' sum is not what is written.

    Example:
        >>> found = em.attribute(model, directions["glimmer"], "She laughed out loud.", layer=1)
        >>> found.heads.shape, len(found.top(3)), found.error < 1e-5
        (torch.Size([2, 4]), 3, True)
    """
    check_single(direction)
    check_model(model, direction.info["model"], allow_other_model=allow_other_model)
    if direction.hook_point != "resid_post":
        raise ValueError(
            f"attribute needs directions at resid_post, these are at {direction.hook_point}"
        )
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        raise ValueError(
            "this architecture normalises after W_O; its heads do not add up to what attention writes"
        )
    layer = direction.layers[direction.slot(layer)]
    texts = encode(model, several(prompts))
    short = next((i for i, e in enumerate(texts) if len(e.ids) < 2), None)
    if short is not None:
        raise ValueError(f"prompt {short} has no token after the first")
    n = layer + 1
    names = [hook_name("z", i) for i in range(n)] + [hook_name("mlp_out", i) for i in range(n)]
    names += [hook_name("resid_pre", 0), hook_name("resid_post", layer)]
    device = device_of(model)
    unit = direction.unit(layer)[0].to(device)
    w = [model.W_O[i].float() @ unit.float() for i in range(n)]  # [head d_head]
    zero = torch.zeros_like(unit)  # a bridge has None where the checkpoint has no bias
    blocks = [model.blocks[i] for i in range(n)]
    bias_attn = [_or(getattr(b.attn, "b_O", None), zero).float() @ unit.float() for b in blocks]
    bias_mlp = [_or(getattr(b.mlp, "b_out", None), zero).float() @ unit.float() for b in blocks]
    n_heads = w[0].shape[0]
    labels = ["embed"]
    for i in range(n):
        labels += [f"L{i}H{h}" for h in range(n_heads)] + [f"L{i} mlp", f"L{i} bias"]
    rows, totals, norms, tokens = [], [], [], []
    with torch.inference_mode():
        for e in texts:
            ids = torch.tensor([e.ids], device=device)
            acts = cache_of(model, ids, names)
            again = partial(model.run_with_hooks, ids)
            checked(model, acts[names[-1]], lambda more, again=again: again(fwd_hooks=more))
            acts = {name: act[0, 1:].float() for name, act in acts.items()}
            parts = [acts[hook_name("resid_pre", 0)] @ unit.float()]
            for i in range(n):
                z = acts[hook_name("z", i)]
                if z.ndim == 2:  # a bridge may keep the heads side by side
                    z = rearrange(z, "pos (head d_head) -> pos head d_head", head=n_heads)
                parts += list(einsum(z, w[i], "pos head d_head, head d_head -> head pos"))
                parts.append(acts[hook_name("mlp_out", i)] @ unit.float() - bias_mlp[i])
                parts.append((bias_attn[i] + bias_mlp[i]).expand(len(z)))
            x = acts[hook_name("resid_post", layer)]
            rows.append(torch.stack(parts, -1))
            totals.append(x @ unit.float())
            norms.append(torch.linalg.vector_norm(x, dim=-1))
            tokens += [e.text[a:b] for a, b in e.offsets[1:]]
    values, total = torch.cat(rows), torch.cat(totals)
    error = float(((values.sum(-1) - total).abs() / torch.cat(norms)).max())
    if per == "component":
        values, total, tokens = values.mean(0), total.mean(0), []
    return Attribution(
        direction.emotions[0], layer, tuple(labels), values.cpu(), total.cpu(), error, n_heads, tuple(tokens)
    )  # fmt: skip
