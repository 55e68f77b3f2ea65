"""The words that every other room shares: axis names, the `typed` decorator and the model protocol.

Axis vocabulary: ``batch pos text layer emotion component head d_model d_head d_vocab token``. A public function that carries
`@typed` checks its annotations at every call (about 0.1 ms); a wrong shape is a `jaxtyping.TypeCheckError`.

What holds activations, vectors, scores or effects holds torch tensors on the CPU; `stats` and `geometry` take and give numpy arrays.
A table of results (`_table.Table`) holds plain numbers.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    SupportsIndex,
    TypeVar,
    get_args,
    runtime_checkable,
)

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

if TYPE_CHECKING:
    from torch import Tensor, nn

HookPoint = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
HeadPoint = Literal["z", "q", "k", "v"]
InnerPoint = HeadPoint | Literal["pattern", "mlp_post"]  # inside a block; only read
AnyPoint = HookPoint | InnerPoint

Text = str | Sequence[Mapping[str, Any]]  # plain, or chat messages with "role" and "content"
Blocks = SupportsIndex | Iterable[SupportsIndex]  # one layer or several: of Python, numpy or torch

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
_PLACES = {
    "embed": "the token embeddings",
    "resid_pre": "the residual stream before the block",
    "resid_mid": "the stream between attention and MLP",
    "resid_post": "the stream after the block",
    "attn_out": "the output of attention",
    "mlp_out": "the output of the MLP",
    "z": "what each head read, before W_O",
    "q": "the queries of each head",
    "k": "the keys of each head (of each group, with grouped queries)",
    "v": "the values of each head (of each group, with grouped queries)",
}


# a whole number is a float, as for a type checker
_CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typed(function: F) -> F:
    """Check the annotations of `function`, tensor shapes included, at every call."""
    return jaxtyped(typechecker=_CHECKER)(function)


def at_hook_point(
    function: Callable[Concatenate[Any, P], R], hook_point: HookPoint | HeadPoint
) -> Callable[P, R]:
    """`function` with its first argument, the hook point, filled in: a public call of its own name, signature and docstring.

    >>> def _read(hook_point, layer):
    ...     '''Read a layer.
    ...
    ...     Args: layer, a block.'''
    ...     return hook_name(hook_point, layer)
    >>> read_z = at_hook_point(_read, "z")
    >>> read_z(3), read_z.__name__, inspect.signature(read_z), inspect.getdoc(read_z)[:45]
    ('blocks.3.attn.hook_z', 'read_z', <Signature (layer)>, 'Read a layer: what each head read, before W_O')
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(hook_point, *args, **kwargs)

    call.__name__ = call.__qualname__ = f"{function.__name__.strip('_')}_{hook_point}"
    call.__module__ = function.__module__
    signature = inspect.signature(function)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]  # for help()
    first, rest = inspect.cleandoc(function.__doc__ or "").split("\n", 1)
    call.__doc__ = f"{first.rstrip('.')}: {_PLACES[hook_point]}.\n{rest}"
    return call


@runtime_checkable
class Weights(Protocol):
    """What emolens needs of any `torch.nn.Module`, to tell which weights it has."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> Mapping[str, Any]: ...


class _ByClass(type(Protocol)):  # type: ignore[misc]  # the metaclass of protocols has no public name
    """Who asks whether something is a model looks at its class: at the object, a bridge would stack the weights of all blocks for `W_O`."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return issubclass(type(instance), cls)


@runtime_checkable
class HookedModel(Weights, Protocol, metaclass=_ByClass):
    """What emolens needs of a model: `HookedTransformer` and `TransformerBridge` both have it."""

    context_level: int

    @property
    def cfg(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def hook_dict(self) -> Mapping[str, Any]: ...
    @property
    def blocks(self) -> Any: ...
    @property
    def W_E(self) -> Tensor: ...
    @property
    def W_O(self) -> Tensor: ...
    def ln_final(self, resid: Tensor) -> Tensor: ...
    def unembed(self, resid: Tensor) -> Tensor: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
    def hooks(self, *args: Any, **kwargs: Any) -> Any: ...

    @classmethod
    def __subclasshook__(cls, subclass: type, /) -> bool:
        return all(
            hasattr(subclass, name) for name in ("run_with_hooks", "run_with_cache", "hooks")
        )


@runtime_checkable
class Cache(Protocol):
    """Activations by hook name: a dict, or TransformerLens's `ActivationCache`, which is no `Mapping`."""

    def __getitem__(self, name: Any, /) -> Any: ...
    def keys(self) -> Iterable[str]: ...
    def values(self) -> Iterable[Any]: ...


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
        # a truth value is an index too, in torch as in Python
        if not isinstance(layer, bool) and "bool" not in str(getattr(layer, "dtype", "")):
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
        several = isinstance(layers, Iterable) and getattr(layers, "ndim", 1) > 0
        if isinstance(layers, str | bytes) or not several:
            raise
    return tuple(block_number(layer, wrong) for layer in layers)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A number of Python, numpy or torch as a plain one.

    >>> whole_number("skip", 50)
    50

    Raises:
        ValueError: it is no whole number, or less than `least`.
    """
    try:
        number = block_number(value)
    except ValueError:
        raise ValueError(f"{name}={value!r}; a whole number, at least {least}") from None
    if number < least:
        raise ValueError(f"{name}={value}; at least {least}")
    return number


def hook_name(hook_point: AnyPoint, layer: int) -> str:
    """TransformerLens's name of a hook point.

    >>> hook_name("resid_post", 3)
    'blocks.3.hook_resid_post'
    >>> hook_name("embed", 0)
    'hook_embed'
    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'
    >>> hook_name("mlp_post", 3)
    'blocks.3.mlp.hook_post'
    """
    if hook_point == "mlp_post":
        return f"blocks.{layer}.mlp.hook_post"
    if hook_point in (*get_args(HeadPoint), "pattern"):
        return f"blocks.{layer}.attn.hook_{hook_point}"
    return "hook_embed" if hook_point == "embed" else f"blocks.{layer}.hook_{hook_point}"
