"""From texts to pooled activations: one forward pass each, in memory or by shard."""

from emolens.collect.activations import Activations, TextInfo, join
from emolens.collect.collection import Collection, collect_to
from emolens.collect.engines import Request, collect_on
from emolens.collect.forward import (
    collect,
    collect_attn_out,
    collect_embed,
    collect_mlp_out,
    collect_resid_mid,
    collect_resid_post,
    collect_resid_pre,
)
from emolens.collect.moments import Moments
from emolens.collect.planning import Plan, plan_measured, plan_named
from emolens.collect.pooling import Pooling, char_span, every_token, last_token, mean_over_tokens

__all__ = [
    "Activations",
    "Collection",
    "Moments",
    "Plan",
    "Pooling",
    "Request",
    "TextInfo",
    "char_span",
    "collect",
    "collect_attn_out",
    "collect_embed",
    "collect_mlp_out",
    "collect_on",
    "collect_resid_mid",
    "collect_resid_post",
    "collect_resid_pre",
    "collect_to",
    "every_token",
    "join",
    "last_token",
    "mean_over_tokens",
    "plan_measured",
    "plan_named",
]
