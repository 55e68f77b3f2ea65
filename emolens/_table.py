"""A small table with labels: what every `.top()` returns.

Rows are plain tuples, so a loop unpacks them; a column has a name; a notebook shows it as a table, and `to_dicts` is what a data frame
is made from. Nothing is computed here: it holds strings and numbers, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, SupportsIndex, overload

SHOWN = 20  # rows that are printed
WIDE = 50  # characters of a cell that are printed


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    >>> table = Table(("emotion", "cosine"), (("glimmer", 0.5), ("gloamer", -0.25)))
    >>> table
    emotion  cosine
    glimmer    0.500
    gloamer   -0.250
    >>> table[0], table["emotion"]
    (('glimmer', 0.5), ['glimmer', 'gloamer'])

    Attributes:
        columns: A name for each column.
        rows: Tuples of strings and numbers, as long as `columns`.

    Raises:
        ValueError: two columns of one name, or a row of another length.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns {', '.join(self.columns)}: each needs a name of its own")
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"row {wrong[0]} does not fit the columns {', '.join(self.columns)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    @overload
    def __getitem__(self, key: SupportsIndex) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: slice) -> Table: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> tuple[Any, ...] | list[Any] | Table:
        if isinstance(key, slice):
            return Table(self.columns, self.rows[key])
        if not isinstance(key, str):
            return self.rows[key]
        if key not in self.columns:
            raise KeyError(f"no column {key!r} here; there are: {', '.join(self.columns)}")
        return [row[self.columns.index(key)] for row in self.rows]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Each row by the names of its columns, as `pandas.DataFrame` takes them.

        >>> Table(("emotion", "cosine"), (("glimmer", 0.5),)).to_dicts()
        [{'emotion': 'glimmer', 'cosine': 0.5}]
        """
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def __repr__(self) -> str:
        columns = []
        for name, values in zip(self.columns, self._shown(), strict=True):
            cells = [name, *_printed(values)]
            wide, number = max(map(len, cells)), all(isinstance(x, int | float) for x in values)
            columns.append([c.rjust(wide) if number else c.ljust(wide) for c in cells])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join(lines + [self._rest()] * bool(self._rest()))

    def _repr_html_(self) -> str:
        body = zip(*map(_printed, self._shown()), strict=True)
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = ("".join(f"<td><bdi>{escape(cell)}</bdi></td>" for cell in row) for row in body)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>"
            f"{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>{self._rest()}"
        )

    def _shown(self) -> list[list[Any]]:
        return [[row[i] for row in self.rows[:SHOWN]] for i in range(len(self.columns))]

    def _rest(self) -> str:
        return f"... {len(self) - SHOWN} more" if len(self) > SHOWN else ""


def _printed(column: list[Any]) -> list[str]:
    """The cells of a column: its numbers with as many decimals as give the largest three digits, its words on one line."""
    sizes = [abs(x) for x in column if isinstance(x, float) and math.isfinite(x) and x]
    decimals = max(0, 2 - math.floor(math.log10(max(sizes)))) if sizes else 1
    cells = [f"{x:.{decimals}f}" if isinstance(x, float) else str(x) for x in column]
    plain = ["".join(c if c.isprintable() else " " for c in cell) for cell in cells]
    return [cell if len(cell) <= WIDE else f"{cell[: WIDE - 3]}..." for cell in plain]
