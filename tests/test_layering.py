"""The house: who may import whom, and what no file may contain.

    cli -> bakeoff, papers, gallery -> verbs -> rooms -> ground floor

Imports go down only, and nobody imports a neighbour on the same floor, except along an arrow of
`ARROWS`. The ground floor is one floor of plain modules that may import one another; a room is a
package or one of `ROOM_FILES`. Everything is read from the source with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "scoredraw"
GROUND, ROOM, VERBS, HALL, CLI = range(5)
HALLS = {"bakeoff", "papers", "gallery"}
ROOM_FILES = {"conformal", "routing", "graphs", "layer_selection"}
ARROWS = {("distillation", "diffusion")}
FACADE = {"__version__"}  # the names that anyone may take from `scoredraw` itself
MAX_LINES = 500
STREAMS = {"sys.stdout", "sys.stderr"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
PAPER = re.compile(r"^scoredraw\.papers\.p\d\d")


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The module or package directly under `scoredraw`; the facade itself is ''."""
    return [*module.split("."), ""][1]


def floor_of(unit: str, source: Path) -> int:
    if unit in {"", "__main__", "cli"}:
        return CLI
    if unit == "verbs":
        return VERBS
    if unit in HALLS:
        return HALL
    return ROOM if unit in ROOM_FILES or (source / PACKAGE / unit).is_dir() else GROUND


def modules_of(source: Path) -> dict[str, tuple[Path, ast.Module]]:
    return {
        module_name(path, source): (path, ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted((source / PACKAGE).rglob("*.py"))
    }


def imports_of(module: str, path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that `module` imports, wherever in it that stands.

    `from a.b import c` gives `a.b.c`: whether c is a module or a name in one, its unit is the same.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def import_violations(source: Path) -> Iterator[str]:
    """Imports that go up, or sideways without an arrow."""
    modules = modules_of(source)
    for module, (path, tree) in modules.items():
        unit = unit_of(module)
        floor = floor_of(unit, source)
        for line, target in imports_of(module, path, tree):
            if target.split(".")[0] != PACKAGE:
                continue
            there = unit_of(target)
            at = f"{module}:{line} imports {target}"
            if PAPER.match(target):
                yield f"{at}: a paper is imported by reports.run_paper alone, dynamically"
            if f"{PACKAGE}.{there}" not in modules:  # a name that the facade offers
                if there not in FACADE and floor < CLI:
                    yield f"{at}: no such module, and the facade is for users"
                continue
            if there == unit or (unit, there) in ARROWS:
                continue
            other = floor_of(there, source)
            if other > floor or (other == floor and floor not in (GROUND, CLI)):
                yield f"{at}: imports go down only"


def dynamic_import_violations(source: Path) -> Iterator[str]:
    """`import_module("scoredraw.papers...")` anywhere but in reports.py."""
    for module, (_, tree) in modules_of(source).items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or module == f"{PACKAGE}.reports":
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name not in {"import_module", "__import__"}:
                continue
            for leaf in ast.walk(node):
                if isinstance(leaf, ast.Constant) and "papers" in str(leaf.value).split("."):
                    yield f"{module}:{node.lineno} imports papers: only reports.run_paper does"


def choice_violations(source: Path) -> Iterator[str]:
    """A weighted `choice` anywhere but in sampling.py."""
    for module, (_, tree) in modules_of(source).items():
        for node in ast.walk(tree):
            if (
                module != f"{PACKAGE}.sampling"
                and isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"choice", "choices"}
                and (len(node.args) > 3 or {"p", "weights"} & {k.arg for k in node.keywords})
            ):
                yield f"{module}:{node.lineno} draws with rng.choice(p=): use sampling.py"


def printing_violations(source: Path) -> Iterator[str]:
    """Printing on the ground floor or in a room."""
    for module, (_, tree) in modules_of(source).items():
        if floor_of(unit_of(module), source) > ROOM:
            continue
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print":
                yield f"{module}:{called.lineno} prints"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in STREAMS:
                yield f"{module}:{node.lineno} writes to {ast.unparse(node)}"


def file_violations(root: Path) -> Iterator[str]:
    """Files that are too long, and modules and folders named for nothing."""
    for folder in ("src", "tests", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            where = path.relative_to(root)
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                yield f"{where} has {lines} lines, want at most {MAX_LINES}"
            vague = VAGUE_NAMES & {part.strip("_") for part in where.with_suffix("").parts}
            if vague:
                yield f"{where}: {', '.join(sorted(vague))} says nothing about what is inside"


def unmarked_tests(root: Path) -> Iterator[str]:
    """Test files that do not say which of the four kinds they are."""
    kinds = re.compile(r"pytest\.mark\.(oracle|golden|property|contract)\b")
    for path in sorted((root / "tests").rglob("test_*.py")):
        if not kinds.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(root)} has no mark: oracle, golden, property, contract"


RULES = {
    "imports": lambda root: import_violations(root / "src"),
    "dynamic imports": lambda root: dynamic_import_violations(root / "src"),
    "weighted choice": lambda root: choice_violations(root / "src"),
    "printing": lambda root: printing_violations(root / "src"),
    "files": file_violations,
    "marks": unmarked_tests,
}


@pytest.mark.parametrize("rule", RULES)
def test_house(rule: str) -> None:
    assert list(RULES[rule](ROOT)) == []


# ---- the rules bite: each is shown a small house with one thing wrong ---------------------------

SOUND = {
    "src/scoredraw/__init__.py": "from scoredraw.errors import InputError\n",
    "src/scoredraw/__main__.py": "from scoredraw.cli import main\n",
    "src/scoredraw/errors.py": "class InputError(ValueError): ...\n",
    "src/scoredraw/sampling.py": "from .errors import InputError\nrng.choice(3, p=q)\n",
    "src/scoredraw/reports.py": "import_module(f'scoredraw.papers.{name}')\n",
    "src/scoredraw/conformal.py": "from scoredraw import __version__, sampling\n",
    "src/scoredraw/coresets/__init__.py": "from .leverage import scores\n",
    "src/scoredraw/coresets/leverage.py": "from scoredraw.sampling import poisson\n",
    "src/scoredraw/diffusion/__init__.py": "",
    "src/scoredraw/distillation/__init__.py": "from ..diffusion import schedules\n",
    "src/scoredraw/verbs.py": "from scoredraw import coresets\n",
    "src/scoredraw/bakeoff/__init__.py": "from scoredraw import verbs\nprint('fits')\n",
    "src/scoredraw/papers/__init__.py": "",
    "src/scoredraw/papers/training.py": "from scoredraw import coresets\n",
    "src/scoredraw/papers/p01_lp.py": "from . import training\n",
    "src/scoredraw/cli/__init__.py": "from scoredraw import bakeoff, reports\nprint('hello')\n",
    "tests/test_some.py": "pytestmark = pytest.mark.oracle\n",
}

WRONG = [
    ("imports", "src/scoredraw/errors.py", "from scoredraw import coresets"),
    ("imports", "src/scoredraw/errors.py", "import scoredraw.conformal"),
    ("imports", "src/scoredraw/errors.py", "from scoredraw import InputError"),
    ("imports", "src/scoredraw/coresets/leverage.py", "import scoredraw"),
    ("imports", "src/scoredraw/coresets/leverage.py", "from ..diffusion import schedules"),
    ("imports", "src/scoredraw/coresets/leverage.py", "def f():\n    import scoredraw.conformal"),
    ("imports", "src/scoredraw/diffusion/__init__.py", "from scoredraw import distillation"),
    ("imports", "src/scoredraw/coresets/__init__.py", "from .. import verbs"),
    ("imports", "src/scoredraw/verbs.py", "from scoredraw.bakeoff import rows"),
    ("imports", "src/scoredraw/bakeoff/__init__.py", "from scoredraw.papers import training"),
    ("imports", "src/scoredraw/bakeoff/__init__.py", "from scoredraw.cli import main"),
    ("imports", "src/scoredraw/cli/__init__.py", "from scoredraw.papers import p01_lp"),
    ("imports", "src/scoredraw/papers/__init__.py", "from .p01_lp import run"),
    ("dynamic imports", "src/scoredraw/verbs.py", "import_module('scoredraw.papers.p01_lp')"),
    ("weighted choice", "src/scoredraw/coresets/leverage.py", "rng.choice(9, size=2, p=q)"),
    ("weighted choice", "src/scoredraw/papers/p01_lp.py", "rng.choice(9, 2, True, q)"),
    ("printing", "src/scoredraw/coresets/leverage.py", "print(1)"),
    ("printing", "src/scoredraw/reports.py", "sys.stderr.write('x')"),
    ("files", "src/scoredraw/coresets/common.py", ""),
    ("files", "src/scoredraw/_utils/rows.py", ""),
    ("files", "src/scoredraw/coresets/leverage.py", "x = 1\n" * MAX_LINES),
    ("marks", "tests/coresets/test_leverage.py", "def test_sum(): ..."),
]


def build(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_rule_passes_a_sound_house(rule: str, tmp_path: Path) -> None:
    build(tmp_path, SOUND)
    assert list(RULES[rule](tmp_path)) == []


@pytest.mark.parametrize(("rule", "file", "line"), WRONG)
def test_rule_bites(rule: str, file: str, line: str, tmp_path: Path) -> None:
    build(tmp_path, SOUND | {file: SOUND.get(file, "") + line + "\n"})
    assert len(list(RULES[rule](tmp_path))) == 1
