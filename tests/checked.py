"""While the suite runs, every function and value of the package checks its annotations, tensor shapes included.

Imported before emolens. Inside `pytest.raises` a test gives what no annotation allows, to read our own error: nothing is checked there,
unless the error that is expected is that of the check itself.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import jaxtyping._import_hook as hook
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, config, install_import_hook, jaxtyped

# a whole number may stand for a float, as for every type checker
every = beartype(conf=BeartypeConf(is_pep484_tower=True))
TIMES = 20  # that a function inside a function is made with its check
_made: Counter[CodeType] = Counter()
_visit = hook.JaxtypingTransformer.visit_FunctionDef


def of_inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function inside a function is made at every call of the outer one, and its check with it, half a millisecond: so not every time."""
    _made[function.__code__] += 1
    checked = _made[function.__code__] <= TIMES
    return jaxtyped(typechecker=every)(function) if checked else function


def _visit_function(self: Any, node: ast.FunctionDef) -> ast.FunctionDef:
    decorators = len(node.decorator_list)
    inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
    _visit(self, node)
    if inside and len(node.decorator_list) > decorators:  # jaxtyping puts its own at the end
        place = ast.parse("jaxtyping._import_hook.of_inner", mode="eval").body
        node.decorator_list[-1] = ast.fix_missing_locations(ast.copy_location(place, node))
    return node


hook.of_inner = of_inner  # type: ignore[attr-defined]  # by a name that every module of the package can say
hook.JaxtypingTransformer.visit_FunctionDef = _visit_function
install_import_hook("emolens", "checked.every")
_raises = pytest.raises


@contextmanager
def raises(expected: Any, **options: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    __tracebackhide__ = True
    asked = TypeCheckError in (expected if isinstance(expected, tuple) else (expected,))
    with _raises(expected, **options) as found:
        before = config.jaxtyping_disable
        config.update("jaxtyping_disable", before or not asked)
        try:
            yield found
        finally:
            config.update("jaxtyping_disable", before)


pytest.raises = raises
