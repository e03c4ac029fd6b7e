"""The commands of the cookbook run as they stand, with a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

COOKBOOK = ROOT / "docs" / "cookbook"
PAGES = sorted(page for page in COOKBOOK.glob("*.md") if page.name != "README.md")


def commands(page: Path) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_run(page: Path, tmp_path: Path) -> None:
    for name in ("recipes", "configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = Path(sys.executable).parent
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(COOKBOOK / "README.md") + commands(page)],
        cwd=tmp_path,
        env={
            **os.environ,
            "MODEL": "tiny",
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    named = re.findall(r"(?:output_dir=|--output )(runs/cookbook/[\w.-]+)", commands(page))
    for path in named:
        path = path.replace("keep-", "keep-0.5") if path.endswith("keep-") else path
        assert (tmp_path / path).exists(), f"{page.name} says that there is a {path}"


def test_every_page_is_listed() -> None:
    listed = re.findall(r"\(([\w-]+\.md)\)", (COOKBOOK / "README.md").read_text("utf-8"))
    assert sorted(listed) == [page.name for page in PAGES]
