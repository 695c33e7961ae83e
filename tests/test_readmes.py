"""The pages that people read first: short where they should be, links that lead somewhere, commands
that run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("", "bbkit/", "data_cards/", "notebooks/recorded/")
PAGES = [ROOT / name / "README.md" for name in NAMES] + [ROOT / "notebooks" / "INSTRUCTOR.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
MODULES = sorted({m for text in TEXTS.values() for m in re.findall(r"python3? -m ([\w.]+)", text)})


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_readme_is_a_front_door():
    """Long tables, costs and discussion have pages of their own."""
    assert PAGES[0].stat().st_size < 12_288


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_within_the_repository_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S)
    links = re.findall(r"\]\(([^()\s]+)\)", text)
    assert links or page.parent.name == "notebooks"
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("module", MODULES)
def test_every_command_named_is_there(module, monkeypatch, capsys):
    assert {"bbkit.train", "bbkit.study", "bbkit.study.comparison", "bbkit.evaluate"} <= {*MODULES}
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out


def test_the_map_names_every_module():
    text = TEXTS[ROOT / "bbkit" / "README.md"]
    tree = text.split("## The tree", 1)[1].split("```")[1].split("bbkit/\n")[1]
    named, folders = set(), [ROOT / "bbkit"]
    for indent, name in re.findall(r"^((?:  )+)([\w.]+/?) ", tree, flags=re.M):
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(folders[-1] / name)
        elif name.endswith(".py"):
            named.add(folders[-1] / name)
    rooms = {path for path in (ROOT / "bbkit").rglob("*.py") if path.name[:2] != "__"}
    assert named == rooms | {ROOT / "bbkit" / "__init__.py"}
