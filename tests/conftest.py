"""Fixtures shared by every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference tensors, real images and weights that the project does not ship."""
    default = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("SSN_SHARED", default))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set SSN_SHARED to its folder")
    return path
