"""Chat on a small model, part 1: dialogues and pairs of answers about the quickstart's corpus.

python scripts/chat_small/dialogues.py [--out data/chat_small] [--functions 300]

The dialogues ask what functions of Python's standard library do; the answers are the first sentences of their docstrings.
In a pair, the worse answer is that of another function. A second call finds the files and does nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinytron.cli import entry
from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

MODULES = (
    *("abc", "argparse", "ast", "base64", "bisect", "calendar", "code", "codecs", "collections", "contextlib", "copy"),
    *(
        "csv",
        "dataclasses",
        "difflib",
        "dis",
        "enum",
        "fileinput",
        "fnmatch",
        "fractions",
        "functools",
        "getpass",
        "glob",
    ),
    *("gzip", "heapq", "hmac", "inspect", "ipaddress", "keyword", "linecache", "locale", "mimetypes", "operator", "os"),
    *(
        "pathlib",
        "pickle",
        "pkgutil",
        "posixpath",
        "pprint",
        "random",
        "re",
        "sched",
        "shlex",
        "shutil",
        "site",
        "socket",
    ),
    *(
        "statistics",
        "string",
        "subprocess",
        "tempfile",
        "textwrap",
        "threading",
        "tokenize",
        "trace",
        "traceback",
        "types",
    ),
    *("typing", "uuid", "warnings", "weakref", "zipfile"),
)
QUESTIONS = ("What does {name} in {module} do?", "Tell me about {module}.{name}.", "In {module}, what is {name} for?")
LONGEST = 110  # characters of an answer


class Function(NamedTuple):
    """A function of the library and the first sentence about it."""

    module: str
    name: str
    sentence: str


def functions() -> Iterator[Function]:
    """The documented functions and classes at the top of the modules, by module and place."""
    for module in MODULES:
        path = Path(sysconfig.get_paths()["stdlib"], *module.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if not file.is_file():
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                sentence = re.split(r"(?<=\.)\s", text)[0]
                if 15 <= len(sentence) <= LONGEST:
                    yield Function(module, node.name, sentence)


def chosen(count: int) -> list[Function]:
    """``count`` of the functions, by a hash of their names. Raises: DataError if there are fewer than 10."""
    found = list(functions())
    if len(found) < 10:
        raise DataError(f"the standard library in {sysconfig.get_paths()['stdlib']} has no docstrings to ask about")
    by_hash = sorted(found, key=lambda f: hashlib.sha256(f"{f.module}.{f.name}".encode()).digest())
    return by_hash[:count]


def question(number: int, function: Function) -> dict[str, str]:
    """The user's message about ``function``, in one of three wordings."""
    text = QUESTIONS[number % len(QUESTIONS)].format(name=function.name, module=function.module)
    return {"role": "user", "content": text}


def dialogues(found: list[Function]) -> Iterator[dict[str, object]]:
    """Every question in every wording, with its answer."""
    for number in range(len(QUESTIONS)):
        for function in found:
            answer = {"role": "assistant", "content": function.sentence}
            yield {"messages": [question(number, function), answer]}


def pairs(found: list[Function]) -> Iterator[dict[str, object]]:
    """The right answer to a question and that to another one."""
    for number, function in enumerate(found):
        other = found[(number + len(found) // 2) % len(found)]
        yield {
            "prompt": [question(number, function)],
            "chosen": [{"role": "assistant", "content": function.sentence}],
            "rejected": [{"role": "assistant", "content": other.sentence}],
        }


def write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    """Write JSON lines, unless the file exists with the same content."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text.encode()))


def main() -> None:
    """Write the dialogues and the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/chat_small"), help="folder of the files")
    parser.add_argument("--functions", type=int, default=300, help="number of functions to ask about")
    args = parser.parse_args()
    found = chosen(args.functions)
    write(args.out / "dialogues.jsonl", dialogues(found))
    write(args.out / "pairs.jsonl", pairs(found))
    print(f"{len(QUESTIONS) * len(found)} dialogues and {len(found)} pairs about {len(found)} functions: {args.out}")


if __name__ == "__main__":
    entry.run(main)
