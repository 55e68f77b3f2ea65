"""Which commands there are, and what becomes of an error: one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from emolens.cli.extract import extract, plan
from emolens.cli.models import models
from emolens.cli.saved import score, steer
from emolens.cli.sets import sets
from emolens.cli.stories import write_stories
from emolens.cli.study import languages, run, study

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find, read and test emotion directions in language models.\n\nStart with: emolens study --model smollm2-135m-instruct-q4 --set core",
)
for command in (study, run, extract, plan, score, steer, write_stories, languages, models):
    app.command()(command)  # in the order of the help
app.add_typer(sets, name="sets")

WRONG = (ValueError, KeyError, TypeError, FileNotFoundError, FileExistsError, ModuleNotFoundError)


def main() -> None:
    """Run the command line; errors are one line, not a traceback (set EMOLENS_TRACEBACK=1 to see it).

    Example:
        >>> from unittest.mock import patch
        >>> from emolens.cli import main
        >>> with patch("sys.argv", ["emolens", "sets", "list"]):
        ...     main()
        Traceback (most recent call last):
        SystemExit: 0
    """
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes", err=True)
        sys.exit(130)
    except WRONG as error:
        _fail(error, 2)
    except (OSError, MemoryError, ArithmeticError, RuntimeError) as error:
        _fail(error, 3)


def _fail(error: BaseException, code: int) -> None:
    if os.environ.get("EMOLENS_TRACEBACK"):
        raise error
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    typer.echo(f"emolens: {' '.join(str(message).split())}", err=True)
    sys.exit(code)
