"""The rules of the house, on every file: floors, sizes, annotations, docstrings, and the tools that check the rest."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tinytron"
# What is on which floor; a file imports only its own floor and lower ones.
FLOORS = (
    ("errors", "utils", "config", "registry", "job"),
    ("distributed", "kernels"),
    ("model", "hooks", "data", "text", "optim", "metrics"),
    ("checkpoint", "interop", "inference", "evaluation", "planner", "observe"),
    ("training",),
    ("jobs", "experiments", "quick", "quickstart", "manifests", "dispatch"),
    ("cli", "timl"),
)
SCRIPT_FLOOR = len(FLOORS) - 1
SCRIPTS = ("scripts", "benchmarks", "examples")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
READS_ENVIRONMENT = ("cli/", "quick.py", "training/world.py", "utils/training.py", "utils/remote.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _files() -> list[Path]:
    """Library and entry scripts."""
    scripts = [*ROOT.glob("*.py"), *(path for room in SCRIPTS for path in ROOT.glob(f"{room}/**/*.py"))]
    return sorted([*PACKAGE.rglob("*.py"), *scripts])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _parsed(files: list[Path]) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in files]


def _without_encoding(tree: ast.AST) -> list[int]:
    """The lines that read or write text in the encoding of the user's locale."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        named = {word.arg: word.value for word in call.keywords}
        opens = isinstance(call.func, ast.Name) and call.func.id == "open"
        mode = named.get("mode", call.args[1] if opens and len(call.args) > 1 else ast.Constant("r"))
        is_text = opens and isinstance(mode, ast.Constant) and "b" not in str(mode.value)
        is_text |= isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
        if is_text and "encoding" not in named:
            found.append(call.lineno)
    return found


def test_text_files_are_utf_8_whatever_the_locale() -> None:
    parsed = _parsed(sorted(PACKAGE.rglob("*.py")))
    assert not [f"{_name(path)}:{line}" for path, tree in parsed for line in _without_encoding(tree)]


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _floor(module: str) -> int:
    """The floor of ``tinytron.<package>...``; the root package itself holds only the version."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__version__":
        return 0
    if parts[1] == "__main__":
        return SCRIPT_FLOOR
    (number,) = (n for n, names in enumerate(FLOORS) if parts[1] in names)
    return number


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from tinytron.training import world` may name a module
            yield from (
                [f"tinytron.{a.name}" for a in node.names] if node.module == "tinytron" else [node.module or ""]
            )


def test_imports_go_down() -> None:
    wrong = []
    for path, tree in _parsed(_files()):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = _floor(module.removesuffix(".__init__")) if PACKAGE in path.parents else SCRIPT_FLOOR
        for imported in _imports(tree):
            root = imported.split(".")[0]
            if root == "tests" or (root == "tinytron" and _floor(imported) > own):
                wrong.append(f"{_name(path)} (floor {own}) imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_floor() -> None:
    names = {p.stem if p.suffix else p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert names - {"__init__", "__main__"} <= {name for floor in FLOORS for name in floor}
    assert (_floor("tinytron.errors"), _floor("tinytron.cli.entry"), _floor("tinytron")) == (0, 6, 0)


def test_data_does_not_import_text() -> None:
    """They share a floor: text makes shards and may know their format; training reads them without text."""
    for path, tree in _parsed(sorted((PACKAGE / "data").rglob("*.py"))):
        assert not any(name.startswith("tinytron.text") for name in _imports(tree)), _name(path)


def test_sizes() -> None:
    wrong = []
    for path, tree in _parsed(_files()):
        if (count := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            wrong.append(f"{_name(path)} has {count} lines")
        for function in _functions(tree):
            if (count := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES:
                wrong.append(f"{_name(path)}: {function.name} has {count} lines")
    assert not wrong, "\n".join(wrong)


def test_every_function_is_annotated() -> None:
    wrong = []
    for path, tree in _parsed(_files()):
        for function in _functions(tree):
            where, given = f"{_name(path)}:{function.lineno}: {function.name}", function.args
            if function.returns is None:
                wrong.append(f"{where} has no return annotation")
            variadic = [a for a in (given.vararg, given.kwarg) if a is not None]
            for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs, *variadic]:
                if argument.annotation is None and argument.arg not in ("self", "cls"):
                    wrong.append(f"{where}: {argument.arg} is not annotated")
    assert not wrong, "\n".join(wrong)


def test_everything_public_has_a_docstring() -> None:
    wrong = []
    for path, tree in _parsed(_files()):
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{_name(path)} does not say what it is")
        for node in tree.body:
            public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                wrong.append(f"{_name(path)}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)


def test_style_that_no_tool_checks() -> None:
    """The step never waits for ``.item()``; no module state; asserts say what is wrong; the environment is read in few
    places; no reminders left in the code."""
    wrong = []
    for path, tree in _parsed(sorted(PACKAGE.rglob("*.py"))):
        for node in ast.walk(tree):
            where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and node.attr == "item":
                wrong.append(f"{where}: .item() waits for the device")
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            if reads and not str(path.relative_to(PACKAGE)).startswith(READS_ENVIRONMENT):
                wrong.append(f"{where}: the environment is read in {', '.join(READS_ENVIRONMENT)} only")
            if isinstance(node, ast.Global):
                wrong.append(f"{where}: module state")
            if isinstance(node, ast.Assert) and node.msg is None:
                wrong.append(f"{where}: an assert without a message")
        reminders = [word for word in ("TODO", "FIXME", "XXX") if word in path.read_text()]
        wrong += [f"{_name(path)}: {word}; make it an issue" for word in reminders]
    assert not wrong, "\n".join(wrong)


def _tracked() -> list[Path]:
    """Files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_path_of_the_workshop_is_left() -> None:
    place = "/" + "work" + "/"  # not written out, or this file would be found
    for path in _tracked():
        assert place.encode() not in path.read_bytes(), f"{_name(path)} mentions {place}"


def test_every_test_folder_is_a_package() -> None:
    """Or two test files of one name would hide each other."""
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), f"{_name(folder)} has no __init__.py"


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", ".", "--exclude", "*.md"), ("mypy",)],
    ids=["ruff_check", "ruff_format", "mypy"],
)
def test_tools_are_content(command: tuple[str, ...]) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e '.[dev]'")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
