import pickle
import re
import subprocess
from pathlib import Path

import pytest

import benchmarks.dpo_memory as script
from lit_llama.utils import UserError

STEP = """
import pickle, sys
from benchmarks.worker import Ours
settings, arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
worker = Ours(settings)
worker.load()
print(worker.step(**arguments)["peak"])
"""


def test_a_second_model_takes_more_memory(python, monkeypatch, capsys):
    class Contestant:
        """A contestant whose process starts at once; it loads the model and takes its step in one call."""

        def __init__(self, name, **settings):
            self.settings = settings

        def __call__(self, method, **arguments):
            if method == "load":
                return {}
            request = pickle.dumps((self.settings, arguments)).hex()
            root = Path(__file__).parents[1]
            return {"peak": int(subprocess.check_output([python, "-c", STEP, request], cwd=root))}

        def close(self):
            pass

    monkeypatch.setattr(script.b, "Contestant", Contestant)
    script.main(script.Settings(rows=4, tokens=32, accelerator="cpu"))
    matches = re.findall(r"^(\S.*?) +([\d,]+) MB +(\d+\.\d\d) x$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _, _ in matches] == ["sft", "dpo", "dpo, two models"]
    sizes = [int(size.replace(",", "")) for _, size, _ in matches]
    assert sizes[0] > 8 and sizes[2] > sizes[1] + 10  # the bundled base has 3.9 M parameters: 15.7 MB in fp32


def test_an_odd_number_of_rows_is_refused(base_dir):
    with pytest.raises(UserError, match="rows is 3; two make a pair"):
        script.main(script.Settings(checkpoint_dir=base_dir, rows=3))
