"""The authors' numbers: `golden("16-rs2-schedule.json")` is that file's content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden_path(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The path of a golden file, for those that are not JSON; skips where the file is absent."""
    option = request.config.getoption("--golden-dir")
    folder = Path(option) if option else DATA

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_file():
            pytest.skip(f"{path} is not here")
        return path

    return find


@pytest.fixture(scope="session")
def golden(golden_path: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """Load a golden JSON file by its name."""

    def load(name: str) -> dict[str, Any]:
        return dict(json.loads(golden_path(name).read_text(encoding="utf-8")))

    return load
