"""Scripts run as files, not as modules: Python then looks for imports beside the script first."""

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
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
