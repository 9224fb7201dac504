"""A few cases of each campaign; `python tests/campaign/NAME.py --cases N` runs more."""

import os
import subprocess
from pathlib import Path

import pytest

FLAGS = {
    "deletion": ("--each",),
    "streams": ("--cases", "8"),
    "fuzz": ("--cases", "20"),
    "pickles": ("--each",),
    "kills": ("--cases", "4", "--seed", "330"),  # a run of each of `kills.STARTS` is killed at a change of its folder
    "disk": ("--cases", "2"),
    "flags": ("--cases", "6"),
    "permissions": ("--cases", "4", "--seed", "42"),  # a case of each kind
}
INPUTS = {"fuzz": "files", "pickles": "files", "kills": "runs", "disk": "runs"}  # campaigns with the same inputs


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a folder for the inputs of each campaign."""
    made = {name: tmp_path_factory.mktemp("campaign") for name in {INPUTS.get(name, name) for name in FLAGS}}
    return {name: made[INPUTS.get(name, name)] for name in FLAGS}


@pytest.mark.parametrize("name", FLAGS)
def test_campaign(name, python, folders):
    if name == "permissions" and os.geteuid() != 0:
        pytest.skip("only root can run scripts as another user")
    command = [python, Path(__file__).with_name(f"{name}.py"), *FLAGS[name]]
    environment = os.environ | {"PRELOADED_PYTHON": python, "CAMPAIGN_FOLDER": str(folders[name])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended before its kill" not in done.stdout
