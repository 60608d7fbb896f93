"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside a checkout; tests that read it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real data), which stands beside the project's own checkouts only")
    return SHARED
