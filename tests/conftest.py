"""Shared fixtures."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of upstream data files: BBKIT_DATA_DIR, or shared/data beside the checkout."""
    folder = os.environ.get("BBKIT_DATA_DIR")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no upstream data: set BBKIT_DATA_DIR, laid out as data_cards/README.md says")
    return path
