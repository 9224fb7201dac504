"""Scripts run as files, not as modules, so Python searches for imports in the script's folder first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["evaluate/microworld.py", "generate/aligner.py", "microworld/pretrain.py"])
def test_a_script_named_like_a_package_or_module_imports_the_right_one(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / script, "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python {script}" in result.stdout


HELP_WITHOUT_TORCH = """
import contextlib, io, runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning"):
            raise AssertionError(f"{script} imports {name}")

sys.meta_path.insert(0, Refuse())
for script in sys.argv[1:]:
    sys.argv, sys.path[0], out = [script, "--help"], script.rpartition("/")[0], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 0 and "--config FILE" in out.getvalue(), script
"""


def test_help_does_not_import_torch():
    scripts = [
        path for path in sorted(ROOT.glob("*/*.py")) if "\n    cli.run(main, " in path.read_text(encoding="utf-8")
    ]
    assert len(scripts) > 40
    result = subprocess.run([sys.executable, "-c", HELP_WITHOUT_TORCH, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


IMPORTED_LATER = """
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
    for slow in ("lightning", "datasets", "pandas", "torch.distributed.fsdp", "matplotlib", "scipy"):
        assert slow not in sys.modules, f"{name} imports {slow}"
"""


def test_generation_does_not_import_what_it_rarely_needs():
    """These packages take longer to import than PyTorch."""
    modules = [f"generate.{name}" for name in ("base", "aligner", "interactive", "engine", "serve")]
    result = subprocess.run([sys.executable, "-c", IMPORTED_LATER, *modules], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
