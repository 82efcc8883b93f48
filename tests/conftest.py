"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=None,
        metavar="DIR",
        help="read the authors' numbers from DIR instead of tests/golden/data",
    )
