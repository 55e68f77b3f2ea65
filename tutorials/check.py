"""Check that every tutorial's .ipynb matches its .py; with --execute, run them and write their outputs.

python tutorials/check.py              # the pair must have the same cells
python tutorials/check.py --execute    # run, then write the notebooks; with names, those only
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat

WIDGET = "application/vnd.jupyter.widget-view+json"  # a bar of progress, which is empty in a file


def cells(notebook) -> list[tuple[str, str]]:
    return [(c.cell_type, c.source.strip()) for c in notebook.cells]


def execute(notebook, folder: Path):
    from nbclient import NotebookClient

    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:  # what differs from run to run says nothing
        cell.metadata.pop("execution", None)
        if (
            cell.cell_type == "code"
        ):  # warnings of the machine that ran it, with its paths, and bars
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 04_doors; none takes all")
    parser.add_argument("--execute", action="store_true")
    arguments = parser.parse_args()
    bad = 0
    for script in sorted(Path(__file__).parent.glob("[0-9]*.py")):
        if arguments.names and script.stem not in arguments.names:
            continue
        source, target = jupytext.read(script), script.with_suffix(".ipynb")
        for i, cell in enumerate(source.cells):
            cell["id"] = f"cell-{i:02d}"
        source.metadata.pop("jupytext", None)
        if arguments.execute:
            nbformat.write(execute(source, script.parent), target)
            print(f"executed {target.name}")
        elif not target.is_file() or cells(nbformat.read(target, 4)) != cells(source):
            mend = f"python tutorials/check.py --execute {script.stem}"
            print(f"{target.name} does not match {script.name}: run `{mend}`")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
