"""What the tests share: where the golden values are."""

from __future__ import annotations

from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent


def golden_dir() -> Path | None:
    """Return the folder of golden values: beside the repository all of them, within it a few."""
    places = (_TESTS.parents[1] / "shared" / "golden", _TESTS / "data" / "golden")
    return next((place for place in places if place.is_dir()), None)


def golden(path: str) -> Path:
    """Return a golden file or folder, or skip the test that needs it."""
    folder = golden_dir()
    if folder is None or not (folder / path).exists():
        pytest.skip(
            f"golden values {path!r} are not here: {folder or 'no folder of golden values'} lacks them"
        )
    return folder / path
