"""Packages and their levels, allowed imports, the length of files, and the stubs at old paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a module imports only from lower levels and from its own package
LEVELS = {"lit_llama": 0, "finetune": 1, "generate": 1, "microworld": 1, "evaluate": 2, "scripts": 2, "studies": 3,
          "benchmarks": 3}  # fmt: skip
SOURCES = sorted(path.relative_to(ROOT) for package in LEVELS for path in (ROOT / package).rglob("*.py"))

MOST_LINES = {"lit_llama/aligner.py": 130, "lit_llama/model.py": 300, "lit_llama/train.py": 300,
              "lit_llama/cli.py": 120}  # fmt: skip
MOST_LINES_IN_LIT_LLAMA = 350

MOVED = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("*/*.py")
    if path.read_text(encoding="utf-8").startswith('raise SystemExit("error: ')
)


def imported(source: str) -> set[str]:
    """Return the modules that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    return modules


def upward_imports(path: Path, source: str) -> set[str]:
    """Return "FILE imports MODULE" for every import from a higher level, or from another package on the same level."""
    package = path.parts[0]
    violations = set()
    for module in imported(source):
        other = module.partition(".")[0]
        if other in LEVELS and other != package and LEVELS[other] >= LEVELS[package]:
            violations.add(f"{path.as_posix()} imports {module}")
    return violations


def test_upward_and_sideways_imports_are_detected():
    source = "import os\nfrom lit_llama import cli\ndef f():\n    from scripts.demo import main\n"
    assert upward_imports(Path("finetune/x.py"), source) == {"finetune/x.py imports scripts.demo"}
    assert upward_imports(Path("generate/x.py"), "import finetune.aligner as a") == {
        "generate/x.py imports finetune.aligner"
    }
    assert upward_imports(Path("studies/x.py"), source) == set()


def test_packages_import_only_from_lower_levels():
    assert {
        line for path in SOURCES for line in upward_imports(path, (ROOT / path).read_text(encoding="utf-8"))
    } == set()


def test_every_package_has_a_level():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders - {"tests", "pretrain", ".venv"} == set(LEVELS)


def test_files_are_short():
    lines = {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    limits = {path: MOST_LINES_IN_LIT_LLAMA for path in lines if path.startswith("lit_llama/")} | MOST_LINES
    assert {path: lines[path] for path, limit in limits.items() if lines[path] > limit} == {}


@pytest.mark.parametrize("path", MOVED, ids=str)
def test_an_old_path_names_the_new_one_and_fails(path):
    result = subprocess.run([sys.executable, path, "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    match = re.fullmatch(rf"error: {path.as_posix()} [^\n]*?([a-z_]+/\w+\.py)[^\n]*\.\n", result.stderr)
    assert match and (ROOT / match[1]).is_file(), result.stderr


def test_there_are_stubs():
    assert len(MOVED) >= 15


def test_the_figure_shows_all_packages_and_files():
    figure = (ROOT / "howto" / "architecture.svg").read_text(encoding="utf-8")
    assert set(re.findall(r'class="mid bold">(\w+)<', figure)) >= set(LEVELS)
    shown = re.findall(r'class="mid small">(\w+)<', figure.partition(">lit_llama<")[2])
    files = [path.stem for path in SOURCES if path.parts[0] == "lit_llama" and path.stem != "__init__"]
    assert sorted(shown) == sorted(files)
