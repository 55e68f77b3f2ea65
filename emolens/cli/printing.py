"""What commands print: tables, and lines beside them. What files and models say is shown as it is, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from emolens.experiments.rows import Row
    from emolens.interventions.generate import Generations
    from emolens.models.catalogue import Entry
    from emolens.sets.check import Check
    from emolens.sets.emotion_sets import EmotionSet


def print_primary(rows: Iterable[Row]) -> None:
    """Print the primary rows of a study: value, interval, control."""
    table = Table(
        "experiment", "primary row", "value [95 %]", "control", box=None, header_style="bold"
    )
    for r in rows:
        known = r.low is not None and r.high is not None
        interval = f" [{r.low:.2f}, {r.high:.2f}]" if known else ""
        table.add_row(r.experiment, r.metric, f"{r.value:.3f}{interval}", r.control or "")
    Console().print(table)


def print_experiments() -> None:
    """Print every experiment in the order in which they run: name, question, what it needs, the profiles it is in."""
    from emolens.experiments.protocol import EXPERIMENTS, PROFILES

    table = Table("experiment", "question", "needs", "profiles", box=None, header_style="bold")
    for e in EXPERIMENTS:
        inside = [p for p, names in PROFILES.items() if names is None or e.name in names]
        table.add_row(e.name, Text(e.question), ", ".join(e.needs), ", ".join(inside))
    Console().print(table)


def print_side_by_side(
    prompts: list[str], written: Mapping[str, Generations], *, read: bool, note: str
) -> None:
    """Print each prompt with what every run wrote: columns, or one below the other on a narrow terminal.

    Args:
        read: Below each text, what it reads as.
    """
    console = Console(highlight=False)
    for i, prompt in enumerate(prompts):
        console.print(Text(prompt, style="bold"))
        cells = []
        for made in written.values():
            top = made.top(i) if read and made.tokens[i] else ""
            cells.append(Group(Text(made.texts[i].strip()), Text(top, style="dim")))
        if console.width < 100:
            for title, cell in zip(written, cells, strict=True):
                console.print(Text(title, style="underline"), cell)
        else:
            table = Table(expand=True)
            for title in written:
                table.add_column(Text(title), ratio=1)
            table.add_row(*cells)
            console.print(table)
    console.print(Text(note, style="dim"))


def print_set(s: EmotionSet) -> None:
    """Print the emotions of a set with their human norms; adjectives and target words on a wide terminal."""
    from emolens.sets.check import coverage
    from emolens.sets.norms import norm_of

    console = Console()
    wide = console.width >= 120
    table = Table(box=None, header_style="bold")
    table.add_column("emotion", no_wrap=True)
    for heading in ("family", "antonym", *(("adjective", "target words") if wide else ())):
        table.add_column(heading)
    for heading in ("Glasgow V", "A", "R&M V", "A"):
        table.add_column(heading, justify="right", no_wrap=True)
    for e in s.emotions:
        cells = []
        for source in ("glasgow_2019", "russell_mehrabian_1977"):
            rated, match = norm_of(e, source)
            mark = {"sense": "~", "related": "*"}.get(match or "", "")
            numbers = (rated.valence, rated.arousal) if rated else ()
            cells += [f"{x:.1f}{mark}" for x in numbers] or ["-", "-"]
        words = (e.adjective, ", ".join(e.target_words)) if wide else ()
        said = (e.name, e.family, e.antonym, *words)
        table.add_row(*(escape(x or "") for x in said), *cells)
    console.print(table)
    for title, text in coverage(s).items():
        console.print(f"{title}: {text}", style="dim", highlight=False)
    console.print(
        "Glasgow: Scott et al. 2019, 1..9; R&M: Russell & Mehrabian 1977, -1..1; V valence, A arousal; ~ one sense of the word; * another form of it; - not rated",
        style="dim",
        highlight=False,
    )


def print_checks(
    results: Mapping[str, Check],
    across: Mapping[str, Mapping[str, str]],
    together: list[list[str]],
    *,
    verbose: bool,
) -> None:
    """Print numbers, rules and violations of checked sets.

    Args:
        across: For each measure between sets, a cell by set.
        together: Which sets are columns of one table.
        verbose: Every violation of a rule, not only the first.
    """
    console = Console(highlight=False)
    for columns in together:
        shown = [results[name] for name in columns]
        table = Table(box=None, show_header=False)
        for key in dict.fromkeys(key for result in shown for key in result.numbers):
            table.add_row(key, *(escape(result.numbers.get(key, "")) for result in shown))
        for key, cells in across.items():
            table.add_row(key, *(cells[name] for name in columns))
        for rule in dict.fromkeys(rule for result in shown for rule in result.rules):
            found = [result.rules.get(rule) for result in shown]
            counts = ["not asked" if broken is None else str(len(broken)) for broken in found]
            table.add_row(f"rule: {rule}", *counts)
        console.print("  ".join(columns), style="bold", markup=False, soft_wrap=True)
        console.print(table)
        for name, result in zip(columns, shown, strict=True):
            for rule, broken in result.rules.items():
                for k, violation in enumerate(broken if verbose else broken[:1]):
                    of = f" ({len(broken)} such)" if k == 0 and len(broken) > 1 else ""
                    line = f"violation: {name}: {rule}: {violation}{of}"
                    console.print(line, markup=False, soft_wrap=True)
    broken = sum(len(result.violations) for result in results.values())
    console.print(f"{broken or 'no'} violations in {len(results)} checked", style="bold")


def print_catalogue(entries: Iterable[Entry]) -> None:
    """Print the models known by a short name, with parameters and memory."""
    table = Table(box=None, header_style="bold")
    table.add_column("name", no_wrap=True)
    for heading in ("layers", "size", "float32", "bfloat16"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for e in entries:
        large = e.n_parameters > 1e9
        n = f"{e.n_parameters / 1e9:.1f} B" if large else f"{e.n_parameters / 1e6:.0f} M"
        note = "gated" if e.gated else ("in a package" if e.gguf_package else "")
        memory = f"{e.gigabytes(4):.1f} GB", f"{e.gigabytes(2):.1f} GB"
        table.add_row(e.alias, str(e.n_layers), n, *memory, note)
    console = Console()
    console.print(table)
    console.print(
        "Any other Llama-3, Qwen-2.5 or Pythia model loads by its hub name, a directory or a .gguf file.",
        style="dim",
    )
