"""While the suite runs, every function and value of the package checks its annotations, tensor shapes included.

Imported before emolens. Inside `pytest.raises` a test gives what no annotation allows, to read our own error: nothing is checked there,
unless the error that is expected is that of the check itself.
"""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, config, install_import_hook
from jaxtyping._import_hook import JaxtypingTransformer

# a whole number may stand for a float, as for every type checker
of_rooms = beartype(conf=BeartypeConf(is_pep484_tower=True))
_of_any = JaxtypingTransformer.visit_FunctionDef


def _of_outermost(self: Any, node: ast.FunctionDef) -> ast.FunctionDef:
    """A function inside a function is made anew at every call: to check it would take more time than all tests of this suite do."""
    inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
    return node if inside else _of_any(self, node)


JaxtypingTransformer.visit_FunctionDef = _of_outermost
install_import_hook("emolens", "checked.of_rooms")
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
