"""The house rules, read from the source: who may import whom, how large things may get, and the
rules of style that a program can check."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from blip_scale.storage import run_folder

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "blip_scale"

MAY_IMPORT = {
    "config": set(),
    "logs": {"storage"},
    "launcher": {"config"},
    "storage": set(),
    "model": set(),
    "objectives": {"model"},
    "interop": {"storage", "model"},
    "data": {"config", "storage"},
    "inference": {"config", "storage", "model", "interop", "data"},
    "planning": {"config", "storage", "model", "data", "inference"},
    "capfilt": {"config", "storage", "model", "data", "inference"},
    "engine": {"config", "logs", "launcher", "storage", "model"},
    "evaluation": {"config", "storage", "model", "objectives", "data", "inference", "engine"},
    "tasks": {
        "config",
        "logs",
        "storage",
        "model",
        "objectives",
        "interop",
        "data",
        "inference",
        "engine",
        "evaluation",
    },
}
"""A room or module of the package -> what else of the package it may import (itself always)."""
for _rooms in MAY_IMPORT.values():
    _rooms.add("errors")
MAY_IMPORT["errors"] = set()
MAY_IMPORT["commands"] = {*MAY_IMPORT}
MAY_IMPORT["train"] = {*MAY_IMPORT}

ENGINE_ONLY = ("torch.distributed", "deepspeed")
SPEAKING = ("commands",)
"""Rooms that may print."""
MAX_FILE_LINES = 600
"""A file that long does several jobs; look at one above 400 lines."""
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 7

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    *MODULES,
    *sorted((REPO / "tools").rglob("*.py")),
    *sorted((REPO / "slurm").glob("*.py")),
]
EVERYTHING = [*SOURCES, *sorted((REPO / "tests").rglob("*.py"))]

FILLER_NAMES = {"found", "one", "own", "said", "mine", "theirs", "known", "given"}
"""Variable names that do not tell what the variable holds."""
UNFINISHED = re.compile(r"(Of|As|So|What|The same)\b")
"""Beginnings of an attribute doc that needs its neighbours to be understood."""
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
MAX_NESTED_COMPREHENSION_LINES = 2


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def holds_for(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make a rule for a file into one test of all `paths`, which lists the files that break it."""

    def decorate(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            broken = []
            for path in paths:
                try:
                    rule(path)
                except AssertionError as error:
                    broken.append(f"{relative(path)}: {error}")
            assert not broken, "\n".join(broken)

        return test

    return decorate


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, relative imports resolved; `from a import b` gives a and
    a.b."""
    package = path.relative_to(REPO).with_suffix("").parts[:-1]
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Arguments of a function, `self` and `cls` left out."""
    signature = function.args
    named = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    stars = [star for star in (signature.vararg, signature.kwarg) if star is not None]
    return [argument for argument in named + stars if argument.arg not in ("self", "cls")]


def test_there_is_a_rule_for_every_room() -> None:
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(MAY_IMPORT), "add the new room or module to MAY_IMPORT"


@holds_for(MODULES)
def test_imports_go_one_way(path: Path) -> None:
    importer = room(path)
    allowed = MAY_IMPORT.get(importer, set()) | {importer}
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "blip_scale" or len(parts) == 1:
            continue
        if parts[1] in MAY_IMPORT:
            assert parts[1] in allowed, f"{importer} must not import {name}"
        assert not parts[-1].startswith("_") or parts[-1].startswith("__"), f"{name} is private"


def test_packages_gather_nothing() -> None:
    """An `__init__` that imports from its own room closes a circle with each module that imports
    from the room."""
    for path in MODULES:
        if path.name == "__init__.py":
            ours = [name for name in imported(path) if name.startswith("blip_scale.")]
            allowed = ["blip_scale.logs"] if room(path) == "engine" else []
            assert set(ours) <= set(allowed), f"{relative(path)} imports {ours}"


def test_modules_do_not_import_in_circles() -> None:
    """The strict graph: each import anywhere in a module, and the packages that it goes through."""
    names = {".".join(p.relative_to(REPO).with_suffix("").parts): p for p in MODULES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        edges[name] = {other for other in imported(path) if other in names} - {name}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in finished:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            finished.add(name)

    for name in names:
        visit(name, ())


def test_a_name_means_one_module() -> None:
    """`from blip_scale.x import checks` names one module everywhere."""
    modules = {".".join(p.relative_to(REPO).with_suffix("").parts) for p in MODULES}
    meant: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in modules:
                        meant.setdefault(alias.asname or alias.name, set()).add(full)
    assert {name: full for name, full in meant.items() if len(full) > 1} == {}


@holds_for(MODULES)
def test_only_the_engine_knows_processes(path: Path) -> None:
    if room(path) == "engine":
        return
    used = set(imported(path))
    for node in nodes_of(path):  # deepspeed as an attribute needs an import
        if isinstance(node, ast.Attribute) and node.attr == "distributed":
            used.add(ast.unparse(node))
    for name in used:
        for forbidden in ENGINE_ONLY:
            assert name != forbidden and not name.startswith(f"{forbidden}."), name


@holds_for(SOURCES)
def test_names_in_a_run_folder_have_one_home(path: Path) -> None:
    """Names of files are literals in run_folder.py alone, and those of folders are joined to a path
    there alone. Data sets have a summary.json too, and checkpoints a manifest.json and rank files
    of their own."""
    if path == PACKAGE / "storage" / "run_folder.py":
        return
    constants = [value for name, value in vars(run_folder).items() if name.isupper()]
    names = {value for value in constants if isinstance(value, str)}
    files = {name for name in names if re.fullmatch(r"\w+\.(json|jsonl|yaml|txt)", name)}
    folders = {"logs", "samples", "checkpoints", "tensorboard"}
    assert files and folders <= names
    if path == PACKAGE / "storage" / "checkpoint_format.py":
        files -= {run_folder.RUN_MANIFEST}
    if path.is_relative_to(PACKAGE / "data"):
        files -= {run_folder.SUMMARY}
    for node in nodes_of(path):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant):
            assert node.value not in files, f"{relative(path)}:{line}: take it from run_folder"
        joined = node.right if isinstance(node, ast.BinOp) else None
        if isinstance(joined, ast.Constant | ast.JoinedStr):
            text = ast.unparse(joined).strip("f'\"")
            assert text.partition("/")[0] not in folders, f"{relative(path)}:{line}: run_folder"
            assert not re.match(r"rank_\{.*\.(log|jsonl)$", text), f"{relative(path)}:{line}"


def test_no_module_shadows_another() -> None:
    """Python puts blip_scale/ itself first on its path when it runs blip_scale/train.py."""
    ours = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    installed = set(importlib.metadata.packages_distributions()) - {"blip_scale"}
    assert not ours & set(sys.stdlib_module_names)
    assert not ours & installed


@holds_for(MODULES)
def test_nothing_prints(path: Path) -> None:
    if room(path) in SPEAKING:
        return
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{relative(path)}:{node.lineno}: use logging"


@holds_for(SOURCES)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines"
    for function in functions(path):
        where = f"{relative(path)}:{function.lineno}: {function.name}"
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{where} has {length} lines"
        count = len(arguments(function))
        assert count <= MAX_ARGUMENTS, f"{where} has {count} arguments: make a dataclass"


@holds_for(SOURCES)
def test_every_function_is_annotated(path: Path) -> None:
    for function in functions(path):
        where = f"{relative(path)}:{function.lineno}: {function.name}"
        constructor = function.name == "__init__"  # returns None, what else
        assert constructor or function.returns is not None, f"{where} has no return annotation"
        for argument in arguments(function):
            assert argument.annotation is not None, f"{where}: {argument.arg} has no annotation"


@holds_for(SOURCES)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{relative(path)} has no docstring"


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names that one node of a syntax tree binds: variables, loop targets, parameters, fields."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias) and node.asname:
        yield node.asname
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name


def attribute_docs(node: ast.AST) -> Iterator[ast.Constant]:
    """Strings that stand below an assignment in the body of a module or a class."""
    if not isinstance(node, ast.Module | ast.ClassDef):
        return
    for statement, below in itertools.pairwise(node.body):
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            yield below.value


def is_nested(comprehension: ast.AST) -> bool:
    """Whether a comprehension has a second `for`, in itself or in a comprehension inside it."""
    return sum(isinstance(node, ast.comprehension) for node in ast.walk(comprehension)) > 1


def test_variables_are_named_for_what_they_hold() -> None:
    fillers = []
    for path in EVERYTHING:
        for node in nodes_of(path):
            for name in FILLER_NAMES.intersection(bound_names(node)):
                fillers.append(f"{relative(path)}:{getattr(node, 'lineno', 0)}: {name}")
    assert not fillers, "name the variable for what it holds:\n" + "\n".join(fillers)


def test_attribute_docs_stand_by_themselves() -> None:
    unfinished = []
    for path in EVERYTHING:
        for node in nodes_of(path):
            for doc in attribute_docs(node):
                if UNFINISHED.match(doc.value.strip()):
                    unfinished.append(f"{relative(path)}:{doc.lineno}: {doc.value[:40]}")
    assert not unfinished, "begin with a noun or a verb:\n" + "\n".join(unfinished)


def test_nested_comprehensions_are_short() -> None:
    long = []
    for path in EVERYTHING:
        for node in nodes_of(path):
            if isinstance(node, COMPREHENSIONS) and is_nested(node):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_NESTED_COMPREHENSION_LINES:
                    long.append(f"{relative(path)}:{node.lineno}: {lines} lines")
    assert not long, "make it a loop or a named helper:\n" + "\n".join(long)


def test_every_folder_is_installed() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {relative(path.parent).replace("/", ".") for path in MODULES}
    extra = {"blip_scale.recipes", "blip_scale.ds_configs"}
    assert folders | extra == set(listed), "list the new folder in pyproject.toml"


def test_the_command_is_a_page_without_classes() -> None:
    path = PACKAGE / "train.py"
    assert not [node for node in nodes_of(path) if isinstance(node, ast.ClassDef)]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 120
