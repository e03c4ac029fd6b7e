"""What the documentation says of files, packages and anchors is so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from alphatoken.config.preference import PreferenceRunConfig
from tests.test_imports import PACKAGES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_that_pages_mention_exist(page: Path) -> None:
    """A path in backticks (`training/step.py`, `tests/oracle.py`) is a file of the repository or of
    the library, and a dotted name whose first part is one of our packages is defined there."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`([a-z_][\w/]*/[\w.]+\.(?:py|json|sh|yaml|sbatch))(?::\d+)?`", text):
        places = (ROOT / path, ROOT / "alphatoken" / path, ROOT / "configs" / "deepspeed" / path)
        assert any(place.exists() for place in places), f"{page.name} mentions {path}"
    for name in re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", text):
        parts = name.removeprefix("alphatoken.").split(".")
        of_ours = (ROOT / "alphatoken" / parts[0]).is_dir()
        if not of_ours or parts[-1] in ("json", "yaml", "html") or is_config_key(parts):
            continue
        assert is_defined(parts), f"{page.name} mentions {name}"


def is_config_key(parts: list[str]) -> bool:
    """Whether a dotted name is a key of a run's configuration, such as `data.train`."""
    section = PreferenceRunConfig.model_fields.get(parts[0])
    fields = getattr(section.annotation, "model_fields", {}) if section else {}
    return len(parts) > 1 and parts[1] in fields


def is_defined(parts: list[str]) -> bool:
    """Whether `package.module.name.attribute` can be imported and read."""
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(("alphatoken", *parts[:split])))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_picture_of_the_packages_has_their_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Packages") :]
    picture = section.split("```")[1]
    drawn = "\n".join(line.partition("#")[0] for line in picture.splitlines())
    names = re.findall(r"[a-z]+", drawn)
    assert names == [name for name in PACKAGES if name != "__main__"]
