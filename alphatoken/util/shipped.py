"""Files that come with the package: recipes, configurations and launchers.

`alphatoken/shipped` has links to the folders of the repository, which a wheel holds as copies.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "shipped"


def or_shipped(path: Path) -> Path:
    """The path as it is; or where nothing is there, that of the shipped file of this name, as
    `configs/sft/quickstart.yaml`."""
    shipped = SHIPPED / path
    return shipped if not path.exists() and shipped.exists() else path
