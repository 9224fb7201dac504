import re

import pytest

import benchmarks.dpo_memory as script
from lit_llama.utils import UserError


def test_a_second_model_takes_more_memory(capsys):
    script.main(script.Settings(rows=4, tokens=32, accelerator="cpu"))
    matches = re.findall(r"^(\S.*?) +([\d,]+) MB +(\d+\.\d\d) x$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _, _ in matches] == ["sft", "dpo", "dpo, two models"]
    sizes = [int(size.replace(",", "")) for _, size, _ in matches]
    assert sizes[0] > 8 and sizes[2] > sizes[1] + 10  # the bundled base has 3.9 M parameters: 15.7 MB in fp32


def test_an_odd_number_of_rows_is_refused(base_dir):
    with pytest.raises(UserError, match="rows is 3; two make a pair"):
        script.main(script.Settings(checkpoint_dir=base_dir, rows=3))
