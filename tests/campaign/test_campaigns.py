"""A few cases of each campaign; `python tests/campaign/NAME.py --cases N` runs more."""

import os
import subprocess
from pathlib import Path

import pytest

CASES = {"deletion": 10, "streams": 8, "fuzz": 20, "pickles": 8, "kills": 3, "disk": 2, "flags": 6,
         "permissions": 4}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_campaign(name, python):
    if name == "permissions" and os.geteuid() != 0:
        pytest.skip("only root can run scripts as another user")
    command = [python, Path(__file__).with_name(f"{name}.py"), "--cases", str(CASES[name])]
    environment = os.environ | {"PRELOADED_PYTHON": python}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
