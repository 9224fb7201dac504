from pathlib import Path

import pytest
import torch

from lit_llama.aligner import LLaMA, LLaMAConfig
from lit_llama.memory import generation_memory, training_memory
from lit_llama.methods import METHODS
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("flags", [(), ("--table",)])
def test_an_unknown_method_is_refused(run_script, flags):
    code, out, err = run_script("scripts/estimate_memory.py", "--method", "lra", *flags)
    assert (code, out) == (1, "") and "\nerror: There is no method 'lra'; choose from aligner, " in f"\n{err}"


def test_a_precision_has_the_names_of_the_other_scripts(run_script):
    outputs = {}
    for precision in ("bf16", "bf16-true", "fp32", "32", "32-true"):
        code, outputs[precision], err = run_script(
            "scripts/estimate_memory.py", "--model", "microworld", "--precision", precision
        )
        assert code == 0, err
    assert outputs["bf16"] == outputs["bf16-true"] != outputs["fp32"] == outputs["32"] == outputs["32-true"]


def test_pairs_take_less_than_twice_the_memory_of_sft_where_they_share_rows(run_script):
    flags = ("--model", "microworld", "--tokens", "60")
    activations = {}
    for share in ("0.5", "0.9"):  # for long responses, sharing the prompt would not pay
        code, out, err = run_script("scripts/estimate_memory.py", *flags, "--response_share", share)
        assert code == 0, err
        rows = [line.split("|") for line in out.splitlines() if line.startswith(("| SFT", "| DPO"))]
        activations[share] = [float(cells[5].split()[0]) for cells in rows]
    assert activations["0.9"][1] > 1.9 * activations["0.9"][0] and activations["0.5"][1] < 1.7 * activations["0.5"][0]


def test_the_pages_state_the_memory_of_the_recipes_at_7b():
    config = METHODS["aligner"].config_class(**vars(LLaMAConfig.from_name("Llama-2-7B")))
    shape = dict(sequences=8, tokens=512, labels=8 * 256, dtype=torch.bfloat16)
    plain, checkpointed = (
        training_memory(METHODS["aligner"], config, **shape, gradient_checkpointing=value).total / 1e9
        for value in (False, True)
    )
    readme, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "howto/finetune_aligner.md"))
    assert f"{plain:.0f} GB of GPU memory, or {checkpointed:.0f} GB with `--gradient_checkpointing`" in readme
    assert f"take an estimated {plain:.1f} GB at 7B" in page and f"checkpointing`: {checkpointed:.1f} GB at 7B" in page


def test_a_batch_too_large_for_any_device_is_refused():
    config = LLaMAConfig.from_name("microworld")
    for sequences, tokens in ((2**31, 2), (1, 2**31)):
        with pytest.raises(UserError, match="has more than 4,194,304 in all, which no device holds"):
            training_memory(LLaMA, config, sequences=sequences, tokens=tokens, labels=1, dtype=torch.float32)
        with pytest.raises(UserError, match="has more than 4,194,304 in all, which no device holds"):
            generation_memory(LLaMA, config, rows=sequences, prompt=tokens, new=1, dtype=torch.float32)
