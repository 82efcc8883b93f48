"""Whole files or none, and logs that survive being cut off."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.journal import Journal, atomic_path

pytestmark = pytest.mark.contract


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.csv.gz"
    with atomic_path(out) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")  # hidden: no glob or folder takes it for a table
        assert temporary.name.endswith(".csv.gz")
        temporary.write_text("new")
        assert not out.exists()
    assert out.read_text() == "new"
    assert names(tmp_path) == ["out.csv.gz"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask  # not mkstemp's 600


def test_the_older_file_is_replaced_not_overwritten(tmp_path: Path) -> None:
    """Whoever has it open goes on reading it, whole."""
    out = tmp_path / "out.txt"
    out.write_text("old")
    with out.open() as reader:
        with atomic_path(out) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert out.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_or_interrupt_leaves_the_older_file(tmp_path: Path, error) -> None:
    out = tmp_path / "out.txt"
    out.write_text("old")

    def break_off() -> None:
        with atomic_path(out) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        break_off()
    assert out.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("")
    for out, pattern in [
        (tmp_path, "which is a folder"),
        (tmp_path / "no" / "out.txt", "No such file or directory"),
        (tmp_path / "file" / "out.txt", "Not a directory"),
        (Path("/proc/out.txt"), "cannot write /proc/out.txt"),
    ]:
        with pytest.raises(InputError, match=f"^out: .*{pattern}") as error, atomic_path(out):
            pytest.fail("the block ran")
        assert "\n" not in str(error.value)
    with (
        pytest.raises(InputError, match=r"^out: cannot write .*: No space left"),
        atomic_path(tmp_path / "out.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["file"]


# ------------------------------------------------------------------ the journal

records = st.lists(
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9)),
    max_size=6,
)


@pytest.mark.property
@settings(max_examples=60)
@given(records, records, st.data())
def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, before, after, data) -> None:
    """kill -9 in the middle of a line: what was finished is there, and appending goes on."""
    journal = Journal(tmp_path_factory.mktemp("log") / "new" / "runs.jsonl")
    assert journal.records() == []
    for record in before:
        journal.append(record)
    assert journal.records() == before
    whole = journal.path.read_bytes() if before else b""
    journal.path.parent.mkdir(exist_ok=True)
    cut = data.draw(st.integers(0, len(whole)))
    journal.path.write_bytes(whole[:cut])
    kept = before[: whole[:cut].count(b"\n")]
    # a line that lost nothing but its line break is whole
    if cut < len(whole) and whole[cut : cut + 1] == b"\n":
        kept = before[: len(kept) + 1]
    assert journal.records() == kept
    for record in after:
        journal.append(record)
    assert journal.records() == kept + after


def test_a_log_with_rubbish_in_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs.jsonl")
    journal.path.write_bytes(b'{"a": 1}\n\xff\xfe\n12\n"x"\n[1]\n\n{"b": "\\u2028"}\n')
    assert journal.records() == [{"a": 1}, {"b": "\u2028"}]
    journal.append({"c": float("nan")})
    assert np.isnan(journal.records()[-1]["c"])


def test_processes_append_side_by_side(tmp_path: Path) -> None:
    """Four processes of 100 long records each: no line is lost or mixed with another."""
    path = tmp_path / "runs.jsonl"
    code = (
        "import sys\nfrom scoredraw.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for i in range(100):\n"
        "    journal.append({'who': int(sys.argv[2]), 'i': i, 'pad': 'x' * 3000})\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(who)]) for who in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    found = Journal(path).records()
    assert len(found) == 400
    for who in range(4):
        assert [record["i"] for record in found if record["who"] == who] == list(range(100))
    assert all(len(record["pad"]) == 3000 for record in found)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^journal: cannot write .*runs.jsonl") as error:
        Journal(tmp_path / "file" / "runs.jsonl").append({})
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError):
        Journal(tmp_path / "runs.jsonl").append({"a": object()})
    assert not (tmp_path / "runs.jsonl").exists()  # nothing was begun
    Journal(tmp_path / "runs.jsonl").append({"a": 1})
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == {"a": 1}
