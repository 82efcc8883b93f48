"""Calls in text, and tools that misbehave in every way we could think of."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoredraw.errors import InputError
from scoredraw.rl.tool_calls import (
    CALCULATOR,
    CHECKS,
    DATE_DIFFERENCE,
    DATE_SHIFT,
    Tool,
    ToolSandbox,
    calculate,
    format_limit,
    format_reward,
    parse_step,
    table_tool,
)

pytestmark = pytest.mark.contract

TOOLS = {tool.name: tool for tool in (CALCULATOR, DATE_DIFFERENCE, DATE_SHIFT)}
THINK = "<think>so</think>"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


# ── reading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "met", "problem"),
    [
        (THINK + call("calculator", expression="1"), 5, ""),
        (f"\n{THINK}\n <answer> 4 </answer>\n", 5, ""),
        (call("calculator", expression="1"), 4, ""),
        ("<answer>4</answer>", 4, ""),
        (THINK + "4", 1, "no block"),
        (THINK + "<tool_call>{}", 1, "no block"),
        ("", 0, "no block"),
        (THINK + "<answer>4</answer> and more", 4, "more than one block alone"),
        (THINK + "<answer>4</answer><answer>5</answer>", 4, "more than one block alone"),
        (THINK + "<tool_call>calculator(1)</tool_call>", 2, "no JSON"),
        (THINK + "<tool_call>[1]</tool_call>", 2, "no object of name and arguments"),
        (THINK + '<tool_call>{"name": 1, "arguments": {}}</tool_call>', 2, "no object of name"),
        (THINK + '<tool_call>{"name": "x", "arguments": NaN}</tool_call>', 2, "no JSON"),
        (THINK + "<tool_call>" + "[" * 9000 + "</tool_call>", 2, "no JSON"),
        (THINK + "<tool_call>" + " " * 10_001 + "</tool_call>", 2, "a call of 10001 characters"),
        (THINK + call("calculator"), 3, "expression is missing"),
        (THINK + call("calculator", expression=3), 3, "expression is no string"),
        (THINK + call("calculator", expression="3", x=1), 3, "x is not known"),
        (THINK + call("shift_date", date="2024-01-01", days=True), 3, "days is no integer"),
        (THINK + call("launch"), 3, "there is no tool 'launch'"),
    ],
)
def test_checks_of_a_step(text: str, met: int, problem: str) -> None:
    step = parse_step(text, TOOLS)
    assert sum(step.passed) == met
    assert step.problem.startswith(problem)
    assert len(step.passed) == len(CHECKS)
    assert format_reward(step, 0.5) == (0.5 if met == 5 else -0.5)
    assert format_reward(step, 0.5, graded=True) == pytest.approx(met / 5 - 0.5)
    assert format_reward(step, 0.5, ran=False, graded=True) == -0.5  # a tool that raised


def test_what_a_step_says() -> None:
    step = parse_step(f"{THINK}{call('calculator', expression='1+1')}", TOOLS)
    assert step[:4] == ("so", "calculator", {"expression": "1+1"}, None)
    assert parse_step(f"{THINK}<answer> 4 </answer>", TOOLS).answer == "4"


PIECES = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "{", "}",
    '"name"', ":", '"calculator"', ",", '"arguments"', "[", "]", "1e999", "\\", '"',
)  # fmt: skip


@pytest.mark.property
@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5))))
def test_reading_never_raises(parts: list[str]) -> None:
    step = parse_step("".join(parts), TOOLS)
    assert step.name is None or step.answer is None
    assert -1 <= format_reward(step, 1.0, graded=True) <= 1


def test_reading_takes_linear_time() -> None:
    began = time.process_time()
    parse_step("<answer>" * 100_000, TOOLS)
    parse_step("<think>" * 100_000, TOOLS)
    assert time.process_time() - began < 1  # quadratic: minutes


def test_formats_never_overturn_an_outcome() -> None:
    for gamma in (0.0, 0.5, 0.95, 1.0):
        assert format_limit(gamma, 6) * 2 <= gamma**5  # the least a right answer is worth


@pytest.mark.oracle
@pytest.mark.property
@settings(max_examples=200)
@given(st.recursive(
    st.integers(0, 99).map(str) | st.sampled_from(["0.5", "2.25"]),
    lambda x: st.tuples(st.sampled_from(["({}+{})", "{}-{}", "{}*{}", "-{}*{}"]), x, x).map(
        lambda t: t[0].format(t[1], t[2])),
    max_leaves=12))  # fmt: skip
def test_the_calculator_agrees_with_python(expression: str) -> None:
    assert calculate(expression) == eval(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').abort()", "().__class__", "'a' * 9", "[1][0]", "x", "1 if 1 else 2",
        "lambda: 1", "True", "1j", "max(1, key=abs)", "9 ** 9 ** 9", "2 ** 20000", "(-8) ** 0.5",
        "exp(1e9)", "1e308 * 10", "", "1 +", "(" * 300, "-" * 501, "f'{1}'", "1; 2", "min()",
        "1/0", "~1", "1 << 10 ** 9", "(1).real", "max(*[1])", "round(1, -10 ** 9)",
    ],
)  # fmt: skip
def test_the_calculator_computes_arithmetic_alone(expression: str) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        calculate(expression)


# ── running ─────────────────────────────────────────────────────────────────────────────────────

BAD = """
import ctypes, os, socket, struct, subprocess, sys, time
from pathlib import Path

def hang():
    time.sleep(600)

def spin():
    while True:
        pass

def flood():
    return "x" * 10_000_000

def printing():
    for _ in range(100_000):
        print("x" * 100)
    return "printed"

def pour():
    for fd in range(3, 20):
        try:
            os.write(fd, b"x" * 1_000_000)
        except OSError:
            pass

def eat():
    return len(bytearray(10**10))

def die():
    os._exit(3)

def leave():
    sys.exit(0)

def environment():
    return dict(os.environ)

def ask():
    return input()

def connect(port):
    socket.create_connection(("127.0.0.1", port), timeout=1)

def raw_connect(port):
    import _socket
    s = _socket.socket()
    s.connect(("127.0.0.1", port))

libc = ctypes.CDLL(None)
make, join = libc.socket, libc.connect  # looked up before anything is forbidden

def below_python(port):
    address = struct.pack("=HH4s8x", 2, socket.htons(port), bytes([127, 0, 0, 1]))
    return join(make(2, 1, 0), address, len(address))

def write(path):
    Path(path).write_text("here")

def run(path):
    subprocess.run(["touch", path])

def fork():
    os.fork()

def system(path):
    os.system("touch " + path)

def deep():
    return deep()

def odd():
    return {1, 2}

def surrogate():
    return "\\ud800"

def fine(x, secret):
    return f"{x} {secret}"
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolSandbox]:
    """The functions above in one sandbox of short limits."""
    path = tmp_path_factory.mktemp("tools") / "bad_tools.py"
    path.write_text(BAD)
    takes = {name: {"port": "integer"} for name in ("connect", "raw_connect", "below_python")}
    takes |= {name: {"path": "string"} for name in ("write", "run", "system")}
    names = [line[4:].split("(")[0] for line in BAD.splitlines() if line.startswith("def ")]
    tools = [Tool(name, f"{path}:{name}", takes.get(name, {})) for name in names if name != "fine"]
    tools.append(Tool("fine", f"{path}:fine", {"x": "number"}, bound={"secret": "kept"}))
    with ToolSandbox(tools, seconds=1, output=1000) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("name", "how", "text"),
    [
        ("hang", "timeout", "no result within 1 s"),
        ("spin", "timeout", "no result"),
        ("flood", "flood", "a result of 10000000 characters"),
        ("pour", "flood", "too much output"),
        ("eat", "error", "MemoryError"),
        ("die", "died", "the tool died"),
        ("leave", "error", "SystemExit"),
        ("ask", "error", "EOFError"),
        ("fork", "error", "PermissionError: os.fork"),
        ("deep", "error", "RecursionError"),
        ("odd", "error", "TypeError"),
        ("printing", "done", "printed"),
        ("surrogate", "done", "?"),
    ],
)
def test_a_tool_that_misbehaves(bad: ToolSandbox, name: str, how: str, text: str) -> None:
    began = time.perf_counter()
    result = bad.call(name, {})
    assert (result.how, result.ok) == (how, how == "done")
    assert result.text.startswith(text)
    assert result.seconds <= time.perf_counter() - began
    assert bad.call("fine", {"x": 1}).text == "1 kept"  # the next call is served


def test_no_environment(bad: ToolSandbox) -> None:
    seen = json.loads(bad.call("environment", {}).text)
    assert set(seen) <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # what Python sets itself


@pytest.mark.parametrize("name", ["connect", "raw_connect"])
def test_no_network(bad: ToolSandbox, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        result = bad.call(name, {"port": server.getsockname()[1]})
        assert (result.ok, result.how) == (False, "error")
        assert "PermissionError: socket" in result.text
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_network_below_python(bad: ToolSandbox) -> None:
    """A call that Python does not see finds no network either, where namespaces are granted."""
    assert bad.call("fine", {"x": 1}).ok
    if not bad.namespace:
        pytest.skip("this system grants no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        assert bad.call("below_python", {"port": server.getsockname()[1]}).text == "-1"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["write", "run", "system"])
def test_no_files_and_no_processes(bad: ToolSandbox, name: str, tmp_path: Path) -> None:
    result = bad.call(name, {"path": str(tmp_path / "here")})
    assert result.text.startswith("PermissionError")
    assert not (tmp_path / "here").exists()


def test_nothing_stays_behind(bad: ToolSandbox) -> None:
    """A process that hangs is gone when its call returns, and one that idles at the close."""
    assert bad.call("fine", {"x": 1}).ok
    first = bad._process.pid
    assert bad.call("odd", {}).how == "error"
    assert bad._process.pid == first  # an error costs no process
    assert bad.call("hang", {}).how == "timeout"
    assert bad.call("fine", {"x": 1}).ok
    second = bad._process.pid
    bad.close()
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    bad.close()
    assert bad.call("fine", {"x": 2}).text == "2 kept"


def test_the_tools_that_come_along() -> None:
    table = {"Oslo": {"people": 717710, "river": "Akerselva"}}
    with ToolSandbox([*TOOLS.values(), table_tool(table)]) as sandbox:

        def say(name: str, **arguments: Any) -> str:
            return sandbox.call(name, arguments).text

        assert say("calculator", expression="2 ** 0.5") == str(2**0.5)
        assert say("calculator", expression="open('x')").startswith("ValueError")
        assert say("days_between", start="2023-12-31", end="2024-12-31") == "366"
        assert say("shift_date", date="2024-01-31", days=-31) == "2023-12-31 Sunday"
        assert say("shift_date", date="31.1.", days=1).startswith("ValueError")
        assert say("look_up", row="Oslo", column="people") == "717710"
        assert say("look_up", row="Bergen", column="people") == "KeyError: no row 'Bergen'"
        assert "but people, river" in say("look_up", row="Oslo", column="hills")
        assert say("look_up", row="Oslo") == "column is missing"
        assert say("nothing") == "there is no tool 'nothing'"
        assert say("calculator", expression="1" * 40_000) == "arguments that are too long"


HOSTILE = (
    ("calculator", {"expression": "round(1, -10 ** 9)"}, "ValueError: a rounding that is too"),
    ("calculator", {"expression": "round(10 ** 300, -10 ** 3000)"}, "ValueError: a rounding"),
    ("calculator", {"expression": "*".join(["2**9999"] * 60)}, "ValueError: Exceeds the limit"),
    ("calculator", {"expression": "**".join(["9"] * 100)}, "ValueError: a power"),
    ("calculator", {"expression": "-" * 499 + "1"}, "-1"),
    ("calculator", {"expression": "10 ** 400"}, "1" + "0" * 400),
    ("calculator", {"expression": "\ud800"}, "UnicodeEncodeError"),
    ("calculator", {"expression": "1\x00"}, "ValueError: not an arithmetic"),
    ("calculator", {"expression": "9\u00b2"}, "ValueError: not an arithmetic"),
    ("shift_date", {"date": "9999-12-31", "days": 1}, "OverflowError"),
    ("shift_date", {"date": "2024-01-01", "days": 10**4000}, "OverflowError"),
    ("shift_date", {"date": "2024-01-01", "days": 10**5000}, "arguments that are no JSON"),
    ("shift_date", {"date": "2024-01-01", "days": math.nan}, "days is no integer"),
    ("days_between", {"start": "2024-02-30", "end": "2024-01-01"}, "ValueError: day is out"),
    ("look_up", {"row": "__class__", "column": "people"}, "KeyError: no row '__class__'"),
    ("look_up", {"row": "Oslo", "column": "__getitem__"}, "KeyError: no column '__getitem__'"),
    ("look_up", {"row": "Oslo", "column": "\ud800" * 4000}, "KeyError: no column"),
    ("look_up", {"row": "Oslo", "column": "people", "table": {}}, "table is not known"),
)


def test_hostile_arguments() -> None:
    """Each is answered at once, by the one process that was there at the start."""
    with ToolSandbox([*TOOLS.values(), table_tool({"Oslo": {"people": 717710}})]) as sandbox:
        assert sandbox.call("calculator", {"expression": "1"}).ok
        first = sandbox._process.pid
        for name, arguments, want in HOSTILE:
            result = sandbox.call(name, arguments)
            assert result.text.startswith(want), (name, result)
            assert result.how in {"done", "error"}
        assert sandbox._process.pid == first


def test_schema_of_a_tool() -> None:
    tool = Tool("f", "m:f", {"a": "number", "b": "string"}, "does f", ("b",))
    assert tool.schema["function"] == {
        "name": "f", "description": "does f",
        "parameters": {
            "type": "object", "required": ["a"],
            "properties": {"a": {"type": "number"}, "b": {"type": "string"}},
        },
    }  # fmt: skip
    assert [tool.misfit({"a": 1}), tool.misfit({"a": 1, "b": "x"})] == [None, None]


def test_refusals(tmp_path: Path) -> None:
    good = CALCULATOR
    for message, make in (
        ("tools: got \\[\\]", lambda: ToolSandbox([])),
        ("tools: got .*calculator", lambda: ToolSandbox([good, good])),
        ("seconds: got 0", lambda: ToolSandbox([good], seconds=0)),
        ("memory: got 1,", lambda: ToolSandbox([good], memory=1)),
        ("output: got 0", lambda: ToolSandbox([good], output=0)),
        ("function: got 'f'", lambda: Tool("f", "f", {})),
        ("parameters: got \\['float'\\]", lambda: Tool("f", "m:f", {"x": "float"})),
        ("optional: got \\['y'\\]", lambda: Tool("f", "m:f", {"x": "number"}, "", ("y",))),
        ("tools: got ModuleNotFoundError",
         lambda: ToolSandbox([Tool("f", f"{tmp_path}/no.py:f", {})]).call("f", {})),
        ("tools: got AttributeError",
         lambda: ToolSandbox([Tool("f", "math:no", {})]).call("f", {})),
        (r"gamma: got 2", lambda: format_limit(2, 3)),
        ("max_depth: got 0", lambda: format_limit(0.5, 0)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make()
