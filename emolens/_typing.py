"""The words that every other room shares: axis names, the `typed` decorator and the model protocol.

Axis vocabulary: ``batch pos text layer emotion component head d_model d_head d_vocab token``. A public function that carries
`@typed` checks its annotations at every call (about 0.1 ms); a wrong shape is a `jaxtyping.TypeCheckError`.

What holds activations, vectors, scores or effects holds torch tensors on the CPU; `stats` and `geometry` take and give numpy arrays.
A table of results (`_table.Table`) holds plain numbers.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, SupportsIndex, TypeVar, get_args, runtime_checkable

from beartype import beartype
from jaxtyping import jaxtyped

HookPoint = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
HeadPoint = Literal["z", "q", "k", "v"]

Text = str | Sequence[Mapping[str, Any]]  # plain, or chat messages with "role" and "content"
Blocks = SupportsIndex | Iterable[SupportsIndex]  # one layer or several: of Python, numpy or torch

F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """Check the annotations of `function`, tensor shapes included, at every call."""
    return jaxtyped(typechecker=beartype)(function)


@runtime_checkable
class HookedModel(Protocol):
    """What emolens needs of a model: `HookedTransformer` and `TransformerBridge` both have it."""

    @property
    def cfg(self) -> Any: ...
    @property
    def hook_dict(self) -> dict[str, Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
    def hooks(self, *args: Any, **kwargs: Any) -> Any: ...


def is_hooked(model: Any) -> bool:
    """Whether it is a `HookedTransformer` or of a class made from it; else it is a bridge."""
    return any(kind.__name__ == "HookedTransformer" for kind in type(model).__mro__)


def block_number(layer: Any, wrong: str = ": layers are block numbers, such as 18") -> int:
    """A layer as a plain number, of whatever library it is.

    >>> block_number(3)
    3

    Raises:
        ValueError: it is no whole number; `wrong` ends the sentence.
    """
    try:
        if not isinstance(layer, bool) and "bool" not in str(
            getattr(layer, "dtype", "")
        ):  # of torch, an index too
            return operator.index(layer)
    except TypeError:
        pass
    raise ValueError(f"layer {layer!r}{wrong}")


def block_numbers(
    layers: Any, wrong: str = ": layers are block numbers, such as 18"
) -> tuple[int, ...]:
    """One layer or several as plain numbers.

    >>> block_numbers(3), block_numbers(range(2))
    ((3,), (0, 1))

    Raises:
        ValueError: something among them is no whole number.
    """
    try:
        return (block_number(layers, wrong),)
    except ValueError:
        if isinstance(layers, str | bytes | bool) or not isinstance(layers, Iterable):
            raise
    return tuple(block_number(layer, wrong) for layer in layers)


def hook_name(hook_point: HookPoint | HeadPoint, layer: int) -> str:
    """TransformerLens's name of a hook point.

    >>> hook_name("resid_post", 3)
    'blocks.3.hook_resid_post'
    >>> hook_name("embed", 0)
    'hook_embed'
    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'
    """
    if hook_point in get_args(HeadPoint):
        return f"blocks.{layer}.attn.hook_{hook_point}"
    return "hook_embed" if hook_point == "embed" else f"blocks.{layer}.hook_{hook_point}"
