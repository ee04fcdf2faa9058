"""What the documents say of the methods is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sensikernels.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
_ROW = re.compile(r"^\| (?:\[`([\w-]+)`\]\(([^)]*)\)|`([\w-]+)`) \|(.*)\|$", re.M)


def rows() -> dict[str, tuple[str, list[str]]]:
    """By method, the link and the other cells of its row in the table."""
    text = (PAGES / "README.md").read_text()
    return {
        linked or plain: (link, [cell.strip() for cell in cells.split("|")])
        for linked, link, plain, cells in _ROW.findall(text)
    }


def test_every_method_has_a_row_with_its_rate() -> None:
    table = rows()
    assert set(table) == set(METHODS)
    for name, (_, cells) in table.items():
        assert float(cells[6].strip("*")) == METHODS[name].learning_rate, name


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_section(name: str) -> None:
    link = rows()[name][0]
    if not link:
        assert name == "dense"
        return
    page, _, anchor = link.partition("#")
    text = (PAGES / (page or "README.md")).read_text()
    heads = [line.lower() for line in text.splitlines() if line.startswith("## ")]
    assert any(name in head for head in heads)
    assert not anchor or f"## {anchor}" in heads


@pytest.mark.parametrize(
    "page",
    sorted(ROOT.glob("*.md")) + sorted(PAGES.glob("*.md")),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
