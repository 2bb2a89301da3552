"""README and docs: links lead somewhere, and files and settings that pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blip_scale.commands.main import COMMANDS
from blip_scale.config import settings
from blip_scale.config.recipe import Recipe

REPO = Path(__file__).resolve().parent.parent
DRILLS = "contributing.md"
"""Names files that do not exist until a reader makes them."""
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:blip_scale|docs|ds_configs|slurm|tests|tools)/[\w/.-]+)`")
COMMAND = re.compile(r"(?:^|[`$;] ?)blip-scale ([a-z][\w-]*)", re.MULTILINE)
SECTIONS = "model|objective|data|optimizer|train|checkpoint|log|evaluation"
SETTING = re.compile(rf"`((?:{SECTIONS})\.(?!py)[a-z][\w.]*)[=:`]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    named = FILE.findall(page.read_text(encoding="utf-8")) if page.name != DRILLS else []
    assert not [name for name in named if not (REPO / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_settings_are_there(page: Path) -> None:
    setting_names = {setting.name for setting in settings.describe(Recipe)}
    named = SETTING.findall(page.read_text(encoding="utf-8")) if page.name != DRILLS else []
    in_general = [re.sub(r"\.\d+\.", ".N.", name) for name in named]
    assert not [name for name in in_general if name not in setting_names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_are_there(page: Path) -> None:
    named = COMMAND.findall(page.read_text(encoding="utf-8"))
    assert set(named) <= COMMANDS.keys()


def test_every_page_is_in_the_index() -> None:
    index = (REPO / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(LINK.findall(index))
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= linked
