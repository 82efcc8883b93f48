"""Start-up: nothing heavy is imported before a method asks for it.

Each check is a fresh interpreter. Times are the best of several starts, stopping at the first one
under the limit: noise on a shared machine only ever adds, so the smallest time is the honest one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.contract

IMPORT_SECONDS = 0.3
HELP_SECONDS = 0.5
STARTS = 15

HEAVY = {
    "cvxpy",
    "datasets",
    "diffusers",
    "faiss",
    "igraph",
    "jinja2",
    "matplotlib",
    "networkx",
    "numba",
    "openai",
    "ot",
    "pandas",
    "peft",
    "polars",
    "pyarrow.dataset",
    "ray",
    "scipy.stats",
    "sentence_transformers",
    "sklearn",
    "torch",
    "transformers",
    "trl",
}

COMMAND = """
import sys
from scoredraw.cli import main
sys.argv[0] = "scoredraw"
try:
    main()
finally:
    {finally_}
"""
REPORT = "import json; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"


def start(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def loaded(stderr: str) -> set[str]:
    return set(json.loads(stderr.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    done = start(f"import sys, scoredraw; {REPORT}")
    assert done.returncode == 0, done.stderr
    modules = loaded(done.stderr)
    assert "scoredraw" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize("arguments", [("--help",), ("papers",), ("--version",)])
def test_command_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = start(COMMAND.format(finally_=REPORT), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != ""
    modules = loaded(done.stderr)
    assert "scoredraw.cli" in modules
    assert modules & HEAVY == set()


def test_the_check_sees_what_is_loaded() -> None:
    done = start(f"import sys, scoredraw, scipy.stats; {REPORT}")
    assert "scipy.stats" in loaded(done.stderr) & HEAVY


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import scoredraw; print(time.perf_counter() - t)"
    best = float("inf")
    for _ in range(STARTS):
        best = min(best, float(start(code).stdout))
        if best < IMPORT_SECONDS:
            return
    pytest.fail(f"import scoredraw takes {best:.2f} s at best, want under {IMPORT_SECONDS} s")


def test_help_is_quick() -> None:
    best = float("inf")
    for _ in range(STARTS):
        begin = time.perf_counter()
        done = start(COMMAND.format(finally_="pass"), "--help")
        best = min(best, time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        if best < HELP_SECONDS:
            return
    pytest.fail(f"scoredraw --help takes {best:.2f} s at best, want under {HELP_SECONDS} s")
