"""The house as CONTRIBUTING.md draws it: arrows point down, one room knows TransformerLens, and nothing unsafe is read."""

from __future__ import annotations

import ast
import re
import tokenize
from inspect import signature
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "emolens"
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
}

PICTURE = PACKAGE.parent / "CONTRIBUTING.md"
FACE = "__init__"  # loads everything lazily, and is the only place that may know every room; `__version__` lives there
LONGEST = 500  # lines of one file


def _floors() -> list[list[str]]:
    """The house as CONTRIBUTING.md draws it, from the roof down: a floor a line, its rooms with dots between."""
    house = PICTURE.read_text(encoding="utf-8").split("## The house")[1].split("\n## ")[0]
    drawn = [line.strip() for line in house.splitlines() if line.startswith("    ")]
    return [re.split(r"\s{2,}", line)[0].split(" · ") for line in drawn]


FLOOR = {room: -k for k, rooms in enumerate(_floors()) for room in rooms}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(tree: ast.AST) -> set[str]:
    """Absolute names of everything imported anywhere in a module, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rooms(imported: set[str]) -> set[str]:
    """The modules of this package among the imported names."""
    rooms = set()
    for name in imported:
        parts = name.split(".")
        if parts[0] != "emolens":
            continue
        for k in range(len(parts), 0, -1):  # emolens.models.pad is a name in emolens.models
            inside = ".".join(parts[1:k])
            if inside in MODULES:
                rooms.add(inside)
                break
            if f"{inside}.__init__".lstrip(".") in MODULES:
                rooms.add(f"{inside}.__init__".lstrip("."))
                break
    return rooms


def _room(module: str) -> str:
    """The room that a module is in: its folder, or itself."""
    return module.split(".")[0]


def _arrows(name: str, *, run: bool = False) -> set[str]:
    """The modules that a module imports; with `run` only those that are there when it runs, not for the type checker alone."""
    tree = _tree(MODULES[name])
    if run:
        tree.body = [
            n
            for n in tree.body
            if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
        ]
    return _rooms(_imports(tree)) - {FACE, name}


def test_the_picture_has_every_room_and_no_other():
    assert {_room(m) for m in MODULES} - {FACE, "__main__"} == set(FLOOR), (
        "CONTRIBUTING.md draws another house"
    )


@pytest.mark.parametrize("name", sorted(set(MODULES) - {FACE, "__main__"}))
def test_arrows_point_down_only(name):
    own = FLOOR[_room(name)]
    other = {m for m in _arrows(name) if _room(m) != _room(name)}
    wrong = {m for m in other if FLOOR[_room(m)] >= own}
    assert not wrong, f"{name} imports {sorted(wrong)}, which are not below it"


def test_no_arrows_go_in_a_circle_inside_a_room():
    inside = {m: {o for o in _arrows(m, run=True) if _room(o) == _room(m)} for m in MODULES}
    done: set[str] = set()
    while ready := {m for m, below in inside.items() if m not in done and below <= done}:
        done |= ready
    assert not set(inside) - done, f"these import each other: {sorted(set(inside) - done)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_holds_more_than_one_reads_at_a_sitting(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("name", [m for m in MODULES if m.endswith(".__init__")])
def test_the_init_of_a_room_is_a_list_of_names(name):
    body = _tree(MODULES[name]).body
    assert all(isinstance(n, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for n in body)
    names = {a.asname or a.name for n in body if isinstance(n, ast.ImportFrom) for a in n.names}
    listed = next((ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign)), [])
    assert names == set(listed)


def test_the_import_reader_sees_an_arrow_that_points_up():
    source = "def f():\n    from emolens import cli, stats\n    import emolens.readout\n    from emolens.models import pad\n"
    rooms = {"cli.__init__", "stats", "readout.__init__", "models.__init__"}
    assert _rooms(_imports(ast.parse(source))) == rooms


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_models_imports_transformer_lens(name):
    imported = {i for i in _imports(_tree(MODULES[name])) if i.split(".")[0] == "transformer_lens"}
    assert not imported or _room(name) == "models", f"{name} imports {imported}"


@pytest.mark.parametrize(
    "name", sorted(m for m in MODULES if _room(m) in ("directions", "geometry", "stats"))
)
def test_pure_rooms_never_see_a_model(name):
    imported = _imports(_tree(MODULES[name]))
    assert "models" not in set(map(_room, _rooms(imported)))
    assert not {i for i in imported if i.split(".")[0] in ("transformers", "transformer_lens")}
    names = {n.id for n in ast.walk(_tree(MODULES[name])) if isinstance(n, ast.Name)}
    assert "HookedModel" not in names


def test_the_face_imports_nothing_of_weight():
    eager = [n for n in _tree(MODULES[FACE]).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in eager} <= {
        "importlib",
        "typing",
    }


def test_every_name_of_the_face_exists_where_it_says():
    import emolens

    for name in emolens.__all__:
        assert getattr(emolens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'emotions'"):
        emolens.emotions  # noqa: B018  (the access is the test)


def test_type_checkers_see_the_names_that_people_see():
    import emolens

    seen = {
        alias.name: n.module
        for block in _tree(MODULES[FACE]).body
        if isinstance(block, ast.If)
        for n in block.body
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    assert seen == {name: f"emolens.{room}" for name, room in emolens._HOME.items()}, (
        "in emolens/__init__.py a name is in _NAMES and below TYPE_CHECKING"
    )


def test_every_estimator_is_where_people_look_for_it():
    import emolens
    from emolens import directions
    from emolens.cli.extract import METHODS

    tree = _tree(MODULES["directions.estimators"])
    written = {f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"}
    for where, names in {
        "emolens/directions/__init__.py": directions.__all__,
        "emolens/__init__.py": emolens.__all__,
        "METHODS of emolens/cli/extract.py": METHODS,
    }.items():
        assert written <= set(names), f"not in {where}: {', '.join(written - set(names))}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_everything_public_has_a_docstring(name):
    tree = _tree(MODULES[name])
    if tree.body:
        assert ast.get_docstring(tree) or name == "__main__", f"{name} has no module docstring"
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing, f"{name}: no docstring: {missing}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_printed_and_nothing_pickled(name):
    tree = _tree(MODULES[name])
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {
        "print", "eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
        "np.load", "joblib.load", "os.system",
    }  # fmt: skip
    assert not calls & forbidden
    roots = {i.split(".")[0] for i in _imports(tree)}
    assert not roots & {
        "pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "subprocess",
    }


def test_remote_code_is_never_trusted_by_default():
    from emolens.models import loading

    tree = _tree(MODULES["models.loading"])
    defaults = {
        arg.arg: default
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }
    assert defaults["trust_remote_code"].value is False
    assert signature(loading.load_model).parameters["trust_remote_code"].default is False


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_silenced_checker_says_why(name):
    with MODULES[name].open("rb") as file:
        comments = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    for comment in comments:
        for marker in ("type: ignore", "noqa", "pyright: ignore"):
            if marker in comment.string:
                assert f"{marker}[" in comment.string or "noqa: " in comment.string, (
                    f"{name}:{comment.start[0]}"
                )


def _in_the_platforms_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in whatever encoding the platform has: cp1252 on Windows."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        function, options = node.func, {k.arg: k.value for k in node.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        if name == "open" and not owner[:1].isupper():  # not `Collection.open`
            mode = next(iter(node.args[not owner :]), options.get("mode"))
            text = "b" not in (mode.value if isinstance(mode, ast.Constant) else "r")
        elif name in ("read_text", "write_text") and owner:
            text = len(node.args) == (name == "write_text")
        else:
            text = name in ("run", "Popen", "check_output") and "text" in options
        found += [node.lineno] * bool(text)
    return found


@pytest.mark.parametrize("folder", ["emolens", "benchmarks", "tests"])
def test_text_is_read_and_written_in_an_encoding_that_is_said(folder: str) -> None:
    wrong = {
        str(path.relative_to(PACKAGE.parent)): lines
        for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
        if (lines := _in_the_platforms_encoding(_tree(path)))
    }
    assert not wrong


def test_the_reader_of_encodings_sees_each_way_to_forget_one() -> None:
    forgotten = [
        "open('a')", "open('a', 'w')", "path.open()", "path.open('a+')", "path.read_text()", "path.write_text('x')",
        "subprocess.run(c, text=True)",
    ]  # fmt: skip
    said = [
        "open('a', 'rb')",
        "path.open('rb')",
        "path.read_text(encoding='utf-8')",
        "Collection.open(x)",
        "read_text(path)",
    ]
    assert all(_in_the_platforms_encoding(ast.parse(code)) for code in forgotten)
    assert not any(_in_the_platforms_encoding(ast.parse(code)) for code in said)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_of_one_platform_is_imported_with_the_module(name: str) -> None:
    top = ast.Module(
        [n for n in _tree(MODULES[name]).body if isinstance(n, ast.Import | ast.ImportFrom)], []
    )
    assert not {i.split(".")[0] for i in _imports(top)} & {
        "fcntl",
        "resource",
        "pwd",
        "grp",
        "termios",
        "msvcrt",
        "winreg",
    }
