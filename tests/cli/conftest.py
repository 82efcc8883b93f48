"""The command line in this process: arguments in, exit code and both outputs back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest

from scoredraw.cli import main


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def scoredraw(monkeypatch, capsys) -> Callable[..., Finished]:
    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["scoredraw", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Finished(int(end.value.code or 0), out, err)

    return run
