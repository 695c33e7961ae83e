"""Shared fixtures."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side: before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of upstream data files: BBKIT_DATA_DIR, or shared/data beside the checkout."""
    folder = os.environ.get("BBKIT_DATA_DIR")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no upstream data: set BBKIT_DATA_DIR, laid out as data_cards/README.md says")
    return path
