"""Look before you run: whether a list of hooks fits a model, and what each of them changes on which tokens."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from emolens._typing import HookedModel, Text, hook_name, typed
from emolens.interventions.hooks import Hook, Hooks
from emolens.interventions.positions import Positions, Window
from emolens.interventions.stream import stream_points
from emolens.models.identity import check_model
from emolens.models.points import check_layers, device_of
from emolens.models.running import can_start_at_layer, checked
from emolens.models.tokens import EncodedText, encode, pad
from emolens.sets.corpus import several


def validate(
    model: HookedModel,
    hooks: Hooks,
    *,
    encoded: Sequence[EncodedText] | None = None,
    allow_other_model: bool | None = False,
) -> None:
    """Refuse hooks that cannot do what they say on this model and batch, before any forward pass.

    Args:
        model: That they will run in.
        hooks: A list of ``(hook_name, function)``, ours or anyone's.
        encoded: The prompts that they will run on; None where they are not known yet.
        allow_other_model: Take directions of another model with the same shape; None asks for no more than the shape that is read.

    Raises:
        KeyError: a hook point that the model lacks (one backend would ignore it in silence).
        ValueError: another model's directions, another width, rows or positions of other prompts.
        TypeError: not a list of (name, function).

    Example:
        >>> from emolens.interventions import validate
        >>> validate(model, em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1))
        >>> validate(model, [("blocks.1.hook_resid_pots", lambda act, hook: act)])
        Traceback (most recent call last):
        KeyError: "this model has no hook point 'blocks.1.hook_resid_pots'; did you mean 'blocks.1.hook_resid_po...'?"
    """
    points = model.hook_dict  # one look: a bridge makes it anew at each
    known: list[Mapping[str, Any]] = []  # models that were compared with this one
    for entry in hooks:
        if not (
            isinstance(entry, tuple)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and callable(entry[1])
        ):
            raise TypeError(f"hooks are a list of (hook name, function), found {entry!r}")
        name, hook = entry
        if name not in points:
            if isinstance(hook, Hook):
                check_layers(model, hook.spec.hook_point, hook.spec.layer)
            near = difflib.get_close_matches(name, points, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if "resid_mid" in name:
                hint = "; a parallel-residual model adds attention and MLP at once and has no resid_mid"
            raise KeyError(f"this model has no hook point {name!r}{hint}")
        if not isinstance(hook, Hook):
            continue
        spec = hook.spec
        # subtle: what resid_mid loses for the MLP alone, the skip connection loses at resid_post of the same block
        if spec.hook_point == "resid_mid" and not can_start_at_layer(model) and not spec.stream:
            raise KeyError(
                f"{spec}: on a TransformerBridge this hook point is only what the MLP reads, and a change there is lost to the stream; "
                "use attn_out, which adds the same vector to the stream, or backend='hooked'"
            )
        width = model.cfg.d_head if spec.hook_point in ("z", "q", "k", "v") else model.cfg.d_model
        if spec.width not in (None, width):
            raise ValueError(f"{spec}: made for width {spec.width}, this model has {width}")
        if spec.model is not None and spec.model not in known:
            check_model(model, spec.model, allow_other_model=allow_other_model)
            known.append(spec.model)
        if encoded is None:
            continue
        if spec.rows not in (1, len(encoded)):
            raise ValueError(f"{spec}: made for {spec.rows} rows, here are {len(encoded)} prompts")
        if isinstance(hook.positions, Positions):
            mine, here = [e.ids for e in hook.positions.encoded], [e.ids for e in encoded]
            if mine != here:
                raise ValueError(
                    f"{spec}: its positions are of other prompts; resolve them again with em.positions(...)"
                )
    ablated = {name for name, hook in hooks if isinstance(hook, Hook) and hook.spec.stream}
    needed = {hook_name(point, k) for point, layers in stream_points(model).items() for k in layers}
    if ablated and (missing := sorted(needed - ablated)):
        raise ValueError(
            f"ablate_stream left out {missing[0]}, which this model has; give it em.collect_stream(...) of this model, and use all its hooks"
        )


@typed
@dataclass(frozen=True, eq=False)
class Check:
    """What hooks did to one prompt.

    Attributes:
        text: The prompt.
        spans: Characters of each token; none of a token that the tokenizer adds.
        tokens: What each token is in the text, spaces included; the name of one that the tokenizer adds.
        steered: `[pos]` whether any hook changed the token.
        fired: For each hook: its name, how often it fired, how many tokens it changed, the median over them of |x' - x| / |x|, and of
            |x'| / |x|.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[str, ...]
    steered: Bool[Tensor, " pos"]
    fired: tuple[tuple[str, int, int, float, float], ...]

    def _pieces(self) -> Iterator[tuple[str, bool]]:
        """The text cut at its tokens, and whether each piece was changed; a token without characters (a BOS) stands under its name."""
        at = 0
        for (start, end), name, on in zip(
            self.spans, self.tokens, self.steered.tolist(), strict=True
        ):
            if start == end:
                yield name if on else "", on
                continue
            start = max(start, at)
            yield self.text[at:start], False
            yield (
                self.text[start:end],
                on,
            )  # nothing where the token before has taken the whole character
            at = max(end, at)
        yield self.text[at:], False

    @property
    def marked(self) -> str:
        """The text with changed tokens in brackets."""
        return "".join(f"[{piece}]" if on and piece else piece for piece, on in self._pieces())

    def __repr__(self) -> str:
        lines = [self.marked]
        for what, times, n, step, norm in self.fired:
            lines.append(
                f"  {what}: fired {times}x, {n} of {len(self.spans)} tokens, |change| {step:.3f} |x|, norm x {norm:.3f}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        mark = '<mark style="background:#f6cdb8">'
        text = "".join(
            f"{mark}{escape(p)}</mark>" if on and p else escape(p) for p, on in self._pieces()
        )
        lines = "".join(
            f"<li>{escape(what)}: fired {times}x, {n} of {len(self.spans)} tokens, |change| = {step:.3f} |x|, norm x {norm:.3f}</li>"
            for what, times, n, step, norm in self.fired
        )
        style = "font:14px/1.7 system-ui,sans-serif;color:#1d2433;background:#fff;padding:8px;max-width:52em"
        return f'<div style="{style}"><bdi>{text}</bdi><ul>{lines}</ul></div>'


def check(
    model: HookedModel,
    hooks: Hooks,
    prompt: Text | Sequence[Text],
    *,
    prepend_bos: bool | None = None,
    allow_other_model: bool = False,
) -> Check:
    """Run one prompt and report which hooks fired, which tokens they changed, and by how much.

    Args:
        model: From `em.load_model`, or your own.
        hooks: From the factories here, or anyone's; hooks with one row for each prompt are shown for their first row.
        prompt: One text or chat.
        prepend_bos: As in `em.score`.
        allow_other_model: Take directions of another model with the same shape.

    Returns:
        `Check`; it prints as the text with the changed tokens in brackets, and shows itself in Jupyter.

    Raises:
        ValueError: no token was changed; or what `validate` refuses.
        FloatingPointError: NaN or infinity, with the layer and the type.

    Example:
        >>> p = em.positions(model, "He feels", "last")
        >>> found = em.check(model, em.steer_resid_post(directions["glimmer"], layer=1, dose=0.1, positions=p), "He feels")
        >>> found.marked.endswith("]"), found.steered.tolist().count(True)
        (True, 1)
    """
    texts = several(prompt)
    if len(texts) > 1:
        raise ValueError(f"check runs one prompt, got {len(texts)}; call it for each")
    [encoded] = encode(model, texts, prepend_bos=prepend_bos)
    hooks = [
        (name, h.take([0]) if isinstance(h, Hook) and h.spec.rows > 1 else h) for name, h in hooks
    ]
    if not hooks:
        raise ValueError("no hooks given")
    validate(model, hooks, encoded=[encoded], allow_other_model=allow_other_model)
    tokens, mask = pad([encoded], "left", device_of(model))
    window = Window(tokens.shape[1])
    steered = torch.zeros(tokens.shape[1], dtype=torch.bool)
    seen: list[list[tuple[int, float, float]]] = [[] for _ in hooks]

    def watched(function: Any, k: int) -> Callable[..., Any]:
        inner = function.within(window) if isinstance(function, Hook) else function

        def hook(act: Tensor, hook: Any) -> Any:
            old = act.detach().clone()
            new = inner(act, hook)
            if new is None:
                new = act
            x, y = (
                rearrange(t.detach().float().cpu(), "1 pos ... -> pos (...)") for t in (old, new)
            )
            norm, size, step = (torch.linalg.vector_norm(t, dim=-1) for t in (x, y, y - x))
            changed = step > 0
            steered.logical_or_(changed)
            ratios = torch.stack([step / norm, size / norm])[:, changed]
            seen[k].append((int(changed.sum()), *_medians(ratios)))
            return new

        return hook

    run = partial(model.run_with_hooks, tokens, attention_mask=mask, return_type="logits")
    plain = [(n, h.within(window) if isinstance(h, Hook) else h) for n, h in hooks]
    with torch.no_grad():
        logits = run(fwd_hooks=[(n, watched(h, k)) for k, (n, h) in enumerate(hooks)])
        checked(model, logits, lambda more: run(fwd_hooks=[*plain, *more]), mask)
    fired = []
    for (name, h), at in zip(hooks, seen, strict=True):
        last = at[-1] if at else (0, 0.0, 0.0)
        fired.append((str(h.spec) if isinstance(h, Hook) else name, len(at), *last))
    if not steered.any():
        raise ValueError(
            "these hooks changed no token of the prompt: "
            + "; ".join(f"{what} fired {n}x" for what, n, *_ in fired)
        )
    tokenizer = model.tokenizer
    return Check(
        encoded.text,
        tuple(encoded.offsets),
        tuple(encoded.pieces(tokenizer)),
        steered,
        tuple(fired),
    )


def _medians(values: Float[Tensor, "ratio pos"]) -> tuple[float, float]:
    """Of the two rows; 0 where nothing was changed."""
    step, norm = values.median(-1).values.tolist() if values.shape[1] else (0.0, 0.0)
    return step, norm
