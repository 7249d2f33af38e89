"""README, CONTRIBUTING and the pages of docs/ are true where that can be looked up: links, names, examples, tables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from docs import hooks
from forkd.config.loader import read_settings
from forkd.config.schema import reference_page
from forkd.states import as_markdown
from tests.support.paths import CHECKOUT

DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / name for name in hooks.pages(CHECKOUT)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    targets = [found.partition("#")[0] for found in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    files = [page.parent / target for target in targets if target and "://" not in target]
    assert [file for file in files if not file.exists() and file not in GENERATED] == []


def test_site_has_every_page_in_its_menu() -> None:
    menu = yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text())["nav"]

    def named(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [name for value in entry.values() for name in named(value)]
        return [name for one in entry for name in named(one)] if isinstance(entry, list) else [str(entry)]

    pages = {str(page.relative_to(DOCS)) for page in [*DOCS.rglob("*.md"), *GENERATED]}
    assert sorted(named(menu)) == sorted(pages)


def test_site_has_the_reference_of_the_settings() -> None:
    assert hooks.pages(CHECKOUT)["reference.md"].endswith(reference_page())


@pytest.mark.parametrize("package", ["config", "master", "serve", "system"])
def test_architecture_names_the_modules_of_each_package(package: str) -> None:
    row = re.search(rf"^\| `{package}/` \| (.*) \|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    inside = [one for one in (CHECKOUT / "forkd" / package).iterdir() if not one.name.startswith("_")]
    modules = [f"{one.name}/" if one.is_dir() else one.stem for one in inside]
    assert row is not None
    assert sorted(re.findall(r"`([^`]+)`", row[1])) == sorted(modules)


def test_architecture_shows_the_tables_of_states() -> None:
    assert as_markdown() in (DOCS / "architecture.md").read_text()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_code_that_is_named_is_there(page: Path) -> None:
    # of forkd: README names a file that its reader writes
    named = re.findall(r"`([\w./-]+\.py)(?::([\w.]+))?`", page.read_text())
    assert [f"{file}:{name}" for file, name in named if not _is_there(file, name)] == []


def test_each_trust_border_has_a_test() -> None:
    """Whether there is one of that name is looked at by `test_code_that_is_named_is_there`."""
    _, _, *rows = [line for line in (DOCS / "security.md").read_text().splitlines() if line.startswith("|")]
    assert rows
    assert [row for row in rows if not re.search(r"\| `tests/[\w./]+\.py:test_\w+` \|$", row)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_settings_that_are_shown_are_right(page: Path, tmp_path: Path) -> None:
    for number, example in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(example if "listen:" in example else _whole(example))
        assert read_settings(file, (), {"name": "shown"}).problems == []


def _whole(example: str) -> str:
    """A settings file of some settings, which may be a listener's."""
    listener = "listen:\n  - address: tcp://127.0.0.1:0\n    handler: a:b\n"
    return listener + (f"    {example}" if example.startswith("limits:") else example)


def _is_there(file: str, name: str) -> bool:
    """Whether a file of the checkout, or of forkd/, has a definition of this name, `Class.method` included."""
    found = [path for path in (CHECKOUT / file, CHECKOUT / "forkd" / file) if path.is_file()]
    return bool(found) and (not name or _defines(ast.parse(found[0].read_text()).body, name.split(".")))


def _defines(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for one in body:
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and one.name == names[0]:
            return _defines(one.body, names[1:])
        if isinstance(one, ast.Assign | ast.AnnAssign):
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            if names == [target.id for target in targets if isinstance(target, ast.Name)]:
                return True
    return False
