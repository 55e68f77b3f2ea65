"""From texts to pooled activations: one forward pass each, in memory or by shard."""

from emolens.collect.activations import Activations, TextInfo, join
from emolens.collect.by_token import token_activations
from emolens.collect.collection import Collection, collect_to
from emolens.collect.engines import Request, collect_on
from emolens.collect.forward import (
    collect,
    collect_attn_out,
    collect_embed,
    collect_k,
    collect_mlp_out,
    collect_mlp_post,
    collect_pattern,
    collect_q,
    collect_resid_mid,
    collect_resid_post,
    collect_resid_pre,
    collect_v,
    collect_z,
)
from emolens.collect.moments import Moments
from emolens.collect.planning import Plan, plan_measured, plan_named
from emolens.collect.pooling import Pooling, char_span, every_token, last_token, mean_over_tokens
from emolens.collect.progress import progress_bar
from emolens.collect.recipe import Batching

__all__ = [
    "Activations",
    "Batching",
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
    "collect_k",
    "collect_mlp_out",
    "collect_mlp_post",
    "collect_on",
    "collect_pattern",
    "collect_q",
    "collect_resid_mid",
    "collect_resid_post",
    "collect_resid_pre",
    "collect_to",
    "collect_v",
    "collect_z",
    "every_token",
    "join",
    "last_token",
    "mean_over_tokens",
    "plan_measured",
    "plan_named",
    "progress_bar",
    "token_activations",
]
