"""Every public function says what goes in, what comes out, what is refused, and shows itself in use; every value says what it holds.

Public is what `emolens` and its rooms list in `__all__`, with the methods and properties of its classes.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest

import emolens


def public() -> Iterator[tuple[str, Any]]:
    """The name at home and the object, each once: functions, classes, and what the classes define; a property is its class's."""
    rooms = [emolens, *(importlib.import_module(f"emolens.{m.name}") for m in pkgutil.iter_modules(emolens.__path__) if m.ispkg)]  # fmt: skip
    seen = set()
    for room in rooms:
        for name in getattr(room, "__all__", ()):
            thing = getattr(room, name)
            if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing in seen:
                continue
            seen.add(thing)
            yield f"{room.__name__}.{name}", thing
            if inspect.isclass(thing):
                for key, value in vars(thing).items():
                    if key in fields(thing):  # its default may be a function
                        continue
                    method = value.__func__ if isinstance(value, staticmethod | classmethod) else value  # fmt: skip
                    if not key.startswith("_") and inspect.isfunction(method):
                        yield f"{room.__name__}.{name}.{key}", method


def fields(thing: type) -> set[str]:
    """What a value holds: of a dataclass or of a pydantic model."""
    names = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set(getattr(thing, "model_fields", ()))  # fmt: skip
    return {name for name in names if not name.startswith("_")}


def section(doc: str, *titles: str) -> str | None:
    """The indented text under a title of the Google form."""
    found = re.search(rf"^(?:{'|'.join(titles)}):\s*\n((?:[ \t]+.*\n?|\s*\n)*)", doc, re.MULTILINE)
    return None if found is None else textwrap.dedent(found[1])


def described(text: str | None) -> set[str]:
    """The names before a colon at the start of a line: ``low, high: ...``."""
    heads = re.findall(r"^([*\w]+(?:, [*\w.]+)*)(?: \([^)]*\))?:", text or "", re.MULTILINE)
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


def gives(function: Any) -> bool:
    """Whether it returns something that a reader has to be told of."""
    return inspect.signature(function).return_annotation not in (None, "None", inspect.Signature.empty)  # fmt: skip


def raises(function: Any) -> bool:
    """Whether its own lines refuse something."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(ast.parse(source)))  # fmt: skip


def lacking(thing: Any) -> list[str]:
    """What the docstring of one name does not say."""
    doc = inspect.cleandoc(thing.__doc__ or "") + "\n"
    if inspect.isclass(thing):
        out = [f"Attributes {name}" for name in sorted(fields(thing) - described(section(doc, "Attributes", "Args")))]  # fmt: skip
        out += [f"{name}: a docstring" for name, value in vars(thing).items() if isinstance(value, property | cached_property) and not value.__doc__]  # fmt: skip
    else:
        parameters = {p for p in inspect.signature(thing).parameters if p not in ("self", "cls")}
        out = [f"Args {name}" for name in sorted(parameters - described(section(doc, "Args")))]
        out += ["Returns"] if gives(thing) and section(doc, "Returns", "Yields") is None else []
        out += ["Raises"] if raises(thing) and section(doc, "Raises") is None else []
        out += [] if ">>> " in doc else ["Example"]
    return ["a docstring"] if not doc.strip() else out


def missing() -> list[str]:
    return sorted(f"{name}: {what}" for name, thing in public() for what in lacking(thing))


def test_a_public_name_says_all_that_a_caller_needs():
    assert not (lacks := missing()), "\n".join(["missing in the docstrings of:", *lacks])


def test_what_a_docstring_lacks_is_seen():
    def half(rows: list[int], *, low: float = 0.0, high: float = 1.0) -> list[int]:
        """Keep some.

        Args:
            rows: Numbers.

        Raises:
            ValueError: none is kept.
        """
        raise ValueError

    def whole(low: float, high: float) -> float:
        """Add two numbers.

        Args:
            low, high: Any numbers.

        Returns:
            The sum.

        Example:
            >>> 1 + 2
            3
        """
        return low + high

    @dataclasses.dataclass
    class Pair:
        """Two numbers.

        Attributes:
            low: One.
        """

        low: float
        high: float = 1.0

        @property
        def span(self):
            return self.high - self.low

    assert lacking(Pair) == ["Attributes high", "span: a docstring"]
    assert lacking(half) == ["Args high", "Args low", "Returns", "Example"]
    assert lacking(whole) == []


@pytest.mark.parametrize("name", ["emolens.load_model", "emolens.EmotionDirections.cosine"])
def test_functions_and_methods_are_looked_at(name):
    assert name in dict(public())
