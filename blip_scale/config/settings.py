"""YAML files and dotted overrides into nested settings, with errors that name place and mend.

Works for any tree of pydantic dataclasses; what the settings mean is `recipe.py`'s business.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
Tree = dict[str, Any]

_MOST_FAULTS = 10
"""Faults of a recipe that are shown."""
_MOST_BYTES = 512 << 10
_MOST_NODES = 20_000
"""Values of a file, with those of an anchor counted wherever an alias repeats them."""
_MOST_LEVELS = 40
_NAMES = "names, each with "
_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Setting:
    """One field of the tree."""

    name: str
    """Dotted; `N` stands for the index of a list item."""
    allowed: str
    default: str
    description: str


@dataclass(frozen=True)
class Override:
    """One setting given on the command line."""

    name: str
    value: Any
    text: str
    """As the user wrote it, for error messages."""


class BareArgument(ValueError):
    """An argument that neither sets a value nor stands after the name of a setting."""

    def __init__(self, argument: str) -> None:
        super().__init__(
            f"{argument}: expected a setting with its value, "
            "e.g. train.epochs=2 or --train.epochs 2"
        )
        self.argument = argument


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number (YAML 1.1 calls it a string), no key may stand twice, and
    aliases can't make a small file large."""

    def compose_document(self) -> yaml.Node:
        """The document, before anything is made of it."""
        root = super().compose_document()
        _count(root, {}, 0)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | None):
                problem = f"{_show(name)} is no name of a setting"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if name in names:
                problem = f"{name} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, counted: dict[int, int], level: int) -> int:
    """Number of values below a node, itself included.

    Args:
        node: of the graph that anchors and aliases make.
        counted: results by id of node; 0 while a node is being counted.
        level: of the node, from 0.

    Raises:
        yaml.MarkedYAMLError: there are too many, too many levels, or a circle.
    """
    total = counted.get(id(node))
    if total is None and level <= _MOST_LEVELS:
        counted[id(node)], total = 0, 1
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        for child in children:
            for inner in child if isinstance(child, tuple) else (child,):
                total += _count(inner, counted, level + 1)
        counted[id(node)] = total
    if not total or total > _MOST_NODES:
        problem = (
            f"anchors and aliases in a circle, more than {_MOST_LEVELS} levels, or more than "
            f"{_MOST_NODES} values when aliases are written out"
        )
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return total


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(file: Path) -> Tree:
    """The mapping in a YAML file, empty for an empty file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a mapping; names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes: no recipe is that large")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    tree = _parse_yaml(text, str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected settings (`name: value` lines), found {_show(tree)}")
    return tree


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Overrides in any of the forms `a.b=1`, `--a.b=1`, `--a.b 1`; values are YAML.

    Raises:
        BareArgument: an argument has none of these forms.
        ValueError: a value is not YAML.
    """
    overrides = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        text = argument
        if not equals:
            following = next(rest, None) if argument.startswith("--") else None
            if following is None:
                raise BareArgument(argument)
            value, text = following, f"{argument} {following}"
        overrides.append(Override(name, _parse_yaml(value, text), text))
    return overrides


def build(cls: type[T], tree: Tree, source: str, overrides: Sequence[Override] = ()) -> T:
    """An instance of the dataclass `cls` from a tree of plain values with overrides on top.

    Args:
        tree: nested settings; changed in place by the overrides.
        source: where the tree comes from, for error messages.

    Raises:
        ValueError: unknown settings (with the nearest names) and values that are not allowed, all
            of them in one line.
    """
    for override in overrides:
        _apply(tree, override)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults: dict[str, str] = {}  # by setting: pydantic names each member of a union
        for detail in error.errors(include_url=False):
            name = _known_part([str(part) for part in detail["loc"]], cls)
            faults.setdefault(name, _explain(cls, detail, source, overrides))
        raise ValueError(_joined(list(faults.values()))) from error


def dump_yaml(settings: object) -> str:
    """The settings as YAML that `build` reads back to an equal object."""
    tree = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def describe(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass, then those of the sections below it."""
    sections = []
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        section, is_list = _section(info.annotation)
        if section is not None:
            sections.append((section, f"{prefix}{name}.N." if is_list else f"{prefix}{name}."))
        if section is None or is_list:
            default = "required"
            if not info.is_required():
                default = _show(info.get_default(call_default_factory=True))
            allowed = _allowed(info.annotation) + _limits(info.metadata)
            yield Setting(f"{prefix}{name}", allowed, default, info.description or "")
    for section, full in sections:
        yield from describe(section, full)


def help_text(cls: type, width: int = 100) -> str:
    """Every setting with what it takes, its default and its description, grouped by section."""
    lines: list[str] = []
    group = None
    listed: dict[tuple[str, str], str] = {}
    for setting in describe(cls):
        section, _, leaf = setting.name.rpartition(".")
        first = listed.setdefault((leaf, setting.description), section)
        if section.endswith(".N") and first != section:
            continue  # the items of this list were explained with an earlier one
        if section != group:
            lines += ["", section or "(top level)"]
            group = section
        lines.append(f"  {setting.name} = {setting.default}   ({setting.allowed})")
        text = " ".join(setting.description.split()).replace("`", "")
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:])


def nearest(name: str, cls: type) -> str:
    """A sentence that leads from a mistyped setting to the one that was meant."""
    known = [setting.name for setting in describe(cls)]
    sections = {n.rpartition(".")[0] for n in known} - {""}
    known += sorted(sections | {s.rpartition(".")[0] for s in sections} - {""})
    typed = ".".join("N" if part.isdigit() else part for part in name.split("."))
    section, _, leaf = typed.rpartition(".")
    given = name[: len(name) - len(leaf)]
    siblings = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == section}
    leaves = {n.rpartition(".")[2]: n for n in reversed(known)}
    words = {word: n for last, n in leaves.items() for word in last.split("_")}
    guesses = [(siblings, 0.65), (leaves, 0.75), (words, 1.0)]
    for candidates, cutoff in guesses[:1] if section.endswith(".N") else guesses:
        close = difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff)
        if close:
            same = candidates is siblings
            return f"the nearest is {given + close[0] if same else candidates[close[0]]}"
    if siblings:
        return f"{given.rstrip('.') or 'the recipe'} has {', '.join(siblings)}"
    return "--help lists all settings"


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{where}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: not valid YAML: nested too deep") from error
    except (ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        # Of PyYAML's constructors: a date that is none, a number of too many digits.
        raise ValueError(f"{source}: not valid YAML: {error}") from error


def _apply(tree: Tree, override: Override) -> None:
    """Set one dotted name in the tree, making the sections on the way to it."""
    *sections, leaf = override.name.split(".")
    node: Any = tree
    for position, part in enumerate([*sections, leaf]):
        done = ".".join(override.name.split(".")[:position])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(
                    f"{override.text}: {done} is a list of {len(node)}: expected an index "
                    f"from 0 to {len(node) - 1}, found {part!r}"
                )
            key: Any = int(part)
        elif isinstance(node, dict):
            key = part
        else:
            raise ValueError(f"{override.text}: {done} is {_show(node)}: it has no settings below")
        if position == len(sections):
            node[key] = override.value
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[key]


def _joined(faults: Sequence[str]) -> str:
    """All faults in one line, numbered where there are several."""
    if len(faults) == 1:
        return faults[0]
    shown = [f"({number}) {fault}" for number, fault in enumerate(faults[:_MOST_FAULTS], 1)]
    rest = len(faults) - len(shown)
    return " ".join([f"{len(faults)} faults:", *shown, *([f"and {rest} more"] if rest else [])])


def _explain(cls: type, error: Any, source: str, overrides: Sequence[Override]) -> str:
    """One line for one pydantic error: where, what, what is allowed."""
    name = _known_part([str(part) for part in error["loc"]], cls)
    for override in overrides:
        if f"{name}.".startswith(f"{override.name}.") or f"{override.name}.".startswith(f"{name}."):
            source = f"override {override.text}"
    where = f"{source}: {name or 'recipe'}"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown setting; {nearest(name, cls)}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    known = {setting.name: setting.allowed for setting in describe(cls)}
    wanted = ".".join("N" if part.isdigit() else part for part in name.split("."))
    allowed = known.get(wanted) or known.get(wanted.rpartition(".")[0], "a section of settings")
    allowed = allowed.removeprefix(_NAMES) if wanted not in known else allowed
    if error["type"] == "missing" and not str(error["loc"][-1]).isdigit():
        return f"{where}: missing; expected {allowed}"
    return f"{where}: expected {allowed}, found {_show(error['input'])}"


def _known_part(parts: list[str], cls: type) -> str:
    """Dotted name of an error's place, without the union members that pydantic appends."""
    node: Any = cls
    for position, part in enumerate(parts):
        if is_dataclass(node):
            names = {f.name for f in fields(node)}
            if part not in names:
                return ".".join(parts[: position + 1])
            node = getattr(node, "__pydantic_fields__")[part].annotation  # noqa: B009
        elif typing.get_origin(node) is list:
            node = typing.get_args(node)[0]
        elif typing.get_origin(node) is dict:
            return ".".join(parts[: position + 1])
        else:
            return ".".join(parts[:position])
    return ".".join(parts)


def _section(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass that an annotation is or is a list of, and whether it is a list."""
    is_list = typing.get_origin(annotation) is list
    inner = typing.get_args(annotation)[0] if is_list else annotation
    return (inner if is_dataclass(inner) and isinstance(inner, type) else None), is_list


def _allowed(annotation: Any) -> str:
    """What a setting takes, in words."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0]) + _limits(annotation.__metadata__)
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_allowed, arguments))
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(_allowed, arguments))}"
    if origin is list:
        return "list"
    if origin is dict:
        return _NAMES + _allowed(arguments[1])
    return "a section of settings" if is_dataclass(annotation) else str(annotation)


def _limits(metadata: Sequence[Any]) -> str:
    """Bounds in an annotation's metadata, e.g. ` >= 0, < 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    constraints = [inner for outer in metadata for inner in getattr(outer, "metadata", [outer])]
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in constraints
        for name, sign in signs.items()
        if getattr(constraint, name, None) is not None
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def expand(text: str, name: str) -> str:
    """A path with environment variables filled in.

    Args:
        name: the setting that holds it, for the error.

    Raises:
        ValueError: a variable is not set.
    """
    path = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)\}?", path)
    if unset:
        raise ValueError(
            f"{name}: {text}: environment variable {unset[1]} is not set; "
            f"export {unset[1]}=... or give {name}=... on the command line"
        )
    return path
