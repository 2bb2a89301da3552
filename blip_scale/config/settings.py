"""Build nested settings from YAML files and dotted overrides. Errors name the place and the fix.

This works for any tree of pydantic dataclasses. `recipe.py` defines the settings of a run.
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
"""Largest number of faults that one error lists."""
_MOST_BYTES = 512 << 10
_MOST_NODES = 20_000
"""Largest number of values in a file. An alias counts as many values as its anchor has."""
_MOST_LEVELS = 40
_NAMES, _ITEMS = "names, each with ", "list, each "
_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Setting:
    """Name, type, default and help of one setting."""

    name: str
    """Dotted name; `N` stands for the index of a list item."""
    allowed: str
    default: str
    description: str


@dataclass(frozen=True)
class Override:
    """One setting from the command line."""

    name: str
    value: Any
    text: str
    """The override as the user typed it, for error messages."""


class BareArgument(ValueError):
    """An argument that neither sets a value nor follows the name of a setting."""

    def __init__(self, argument: str) -> None:
        super().__init__(
            f"{argument}: expected a setting with its value, "
            "e.g. train.epochs=2 or --train.epochs 2"
        )
        self.argument = argument


class _Loader(yaml.SafeLoader):
    """YAML loader for settings.

    It reads 1e-5 as a number, although this is a string in YAML 1.1. It refuses duplicate keys, and
    aliases that expand a small file to a very large tree.
    """

    def compose_document(self) -> yaml.Node:
        """Parse the document and check its size, before objects are built from it."""
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
                problem = f"{_show(name)} is not the name of a setting"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if name in names:
                problem = f"{name} is set twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, counted: dict[int, int], level: int) -> int:
    """Count the values below a node, itself included.

    Args:
        node: node of the graph that anchors and aliases form.
        counted: id of a node -> number of its values; 0 while the node is being counted.
        level: depth of the node, starting at 0.

    Raises:
        yaml.MarkedYAMLError: the graph has too many values, too many levels or a cycle.
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
            f"anchors and aliases in a cycle, more than {_MOST_LEVELS} levels, or more than "
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
    """Read the mapping in a YAML file; an empty file gives an empty mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML or not a mapping. The message names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes: a recipe has at most {_MOST_BYTES}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    tree = _parse_yaml(text, str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected settings (`name: value` lines), found {_show(tree)}")
    return tree


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Parse overrides of the forms `a.b=1`, `--a.b=1` and `--a.b 1`, whose values are YAML.

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


def repeats(overrides: Sequence[Override]) -> list[str]:
    """Return a sentence for each setting with several overrides, of which the last one is used."""
    last: dict[str, Override] = {}
    sentences = []
    for override in overrides:
        if override.name in last:
            earlier = last[override.name].text
            sentences.append(f"{override.name} is given twice: {override.text} replaces {earlier}")
        last[override.name] = override
    return sentences


def build(cls: type[T], tree: Tree, source: str, overrides: Sequence[Override] = ()) -> T:
    """Build an instance of the dataclass `cls` from plain values and overrides.

    Args:
        cls: dataclass of the settings.
        tree: nested settings; the overrides change it in place.
        source: origin of the tree, such as its file, for error messages.
        overrides: settings to change, in order.

    Raises:
        ValueError: there are unknown settings or values that are not allowed. The message lists all
            of them in one line, with the nearest names of unknown settings.
    """
    for override in overrides:
        _apply(tree, override)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults: dict[str, str] = {}  # one per setting: pydantic reports each member of a union
        for detail in error.errors(include_url=False):
            name = _declared_part([str(part) for part in detail["loc"]], cls)
            faults.setdefault(name, _explain(cls, detail, source, overrides))
        raise ValueError(_joined(list(faults.values()))) from error


def dump_yaml(settings: object) -> str:
    """Write settings as YAML, from which `build` makes an equal object."""
    tree = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def describe(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a dataclass, then the settings of its sections."""
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
    """Format every setting with default, allowed values and description, grouped by section."""
    lines: list[str] = []
    group = None
    listed: dict[tuple[str, str], str] = {}
    for setting in describe(cls):
        section, _, leaf = setting.name.rpartition(".")
        first = listed.setdefault((leaf, setting.description), section)
        if section.endswith(".N") and first != section:
            continue  # an earlier list has the same items, and its help explains them
        if section != group:
            lines += ["", section or "(top level)"]
            group = section
        lines.append(f"  {setting.name} = {setting.default}   ({setting.allowed})")
        text = " ".join(setting.description.split()).replace("`", "")
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:])


def nearest(name: str, cls: type) -> str:
    """Suggest the setting nearest to a mistyped name, as part of a sentence."""
    names = [setting.name for setting in describe(cls)]
    sections = {n.rpartition(".")[0] for n in names} - {""}
    names += sorted(sections | {s.rpartition(".")[0] for s in sections} - {""})
    typed = ".".join("N" if part.isdigit() else part for part in name.split("."))
    section, _, leaf = typed.rpartition(".")
    prefix = name[: len(name) - len(leaf)]
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
    leaves = {n.rpartition(".")[2]: n for n in reversed(names)}
    words = {word: n for last, n in leaves.items() for word in last.split("_")}
    guesses = [(siblings, 0.65), (leaves, 0.75), (words, 1.0)]
    for candidates, cutoff in guesses[:1] if section.endswith(".N") else guesses:
        close = difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff)
        if close:
            same = candidates is siblings
            return f"the nearest is {prefix + close[0] if same else candidates[close[0]]}"
    if siblings:
        return f"{prefix.rstrip('.') or 'the recipe'} has {', '.join(siblings)}"
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
        # From PyYAML's constructors: an impossible date, a number with too many digits.
        raise ValueError(f"{source}: not valid YAML: {error}") from error


def _apply(tree: Tree, override: Override) -> None:
    """Set one dotted name in the tree, creating missing sections on the way."""
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
            raise ValueError(
                f"{override.text}: {done} is {_show(node)}, which has no settings below it"
            )
        if position == len(sections):
            node[key] = override.value
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[key]


def _joined(faults: Sequence[str]) -> str:
    """Join faults in one line, with numbers if there are several."""
    if len(faults) == 1:
        return faults[0]
    shown = [f"({number}) {fault}" for number, fault in enumerate(faults[:_MOST_FAULTS], 1)]
    rest = len(faults) - len(shown)
    more = [f"and {rest} more"] if rest else []
    return " ".join([f"{len(faults)} faults:", *shown, *more])


def _explain(cls: type, error: Any, source: str, overrides: Sequence[Override]) -> str:
    """Describe a pydantic error in one line: the place, the fault, and the values allowed."""
    name = _declared_part([str(part) for part in error["loc"]], cls)
    for override in overrides:
        if f"{name}.".startswith(f"{override.name}.") or f"{override.name}.".startswith(f"{name}."):
            source = f"override {override.text}"
    where = f"{source}: {name or 'recipe'}"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown setting; {nearest(name, cls)}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    all_allowed = {setting.name: setting.allowed for setting in describe(cls)}
    setting_name = ".".join("N" if part.isdigit() else part for part in name.split("."))
    if setting_name in all_allowed:
        allowed = all_allowed[setting_name]
    else:  # a value in a mapping, an item of a list, or a whole section
        outer = setting_name.rpartition(".")[0]
        allowed = all_allowed.get(outer, "a section of settings")
        allowed = allowed.removeprefix(_NAMES).removeprefix(_ITEMS)
    if error["type"] == "missing" and not str(error["loc"][-1]).isdigit():
        return f"{where}: missing; expected {allowed}"
    return f"{where}: expected {allowed}, found {_show(error['input'])}"


def _declared_part(parts: list[str], cls: type) -> str:
    """Return the dotted name of an error's place, without the union members added by pydantic."""
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
    """Return the dataclass in an annotation, or None, and whether the annotation is a list."""
    is_list = typing.get_origin(annotation) is list
    inner = typing.get_args(annotation)[0] if is_list else annotation
    return (inner if is_dataclass(inner) and isinstance(inner, type) else None), is_list


def _allowed(annotation: Any) -> str:
    """Describe in words the values that a setting allows."""
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
        return _ITEMS + _allowed(arguments[0])
    if origin is dict:
        return _NAMES + _allowed(arguments[1])
    return "a section of settings" if is_dataclass(annotation) else str(annotation)


def _limits(metadata: Sequence[Any]) -> str:
    """Format the bounds in an annotation's metadata, e.g. ` >= 0, < 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = []
    for item in metadata:  # constraints, or a Field with constraints in its own metadata
        for constraint in getattr(item, "metadata", [item]):
            for name, sign in signs.items():
                bound = getattr(constraint, name, None)
                if bound is not None:
                    bounds.append(f"{sign} {_number(bound)}")
    return f" {', '.join(bounds)}" if bounds else ""


def _number(bound: float) -> str:
    """Format a bound. A large bound is written as a power, such as 1e12."""
    return str(bound) if bound < 10**6 else re.sub(r"e\+0*", "e", f"{bound:g}")


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def expand(text: str, name: str) -> str:
    """Expand environment variables in a path.

    Args:
        text: the path.
        name: setting that holds the path, for the error.

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
