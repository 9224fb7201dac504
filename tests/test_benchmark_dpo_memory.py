import pytest

import benchmarks.dpo_memory as script
from lit_llama.utils import UserError


def test_a_step_has_gradients_and_a_size(base_dir):
    args = script.Settings(checkpoint_dir=base_dir, rows=4, tokens=32, accelerator="cpu")
    for args.what in ("sft", "dpo", "two models"):
        assert script.peak(args) >= 0


def test_an_odd_number_of_rows_is_refused(base_dir):
    with pytest.raises(UserError, match="rows is 3; two make a pair"):
        script.main(script.Settings(checkpoint_dir=base_dir, rows=3))
