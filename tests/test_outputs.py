"""Output files named by flags: replaced only with --overwrite, and never if they are inputs."""

import json

import pytest
import torch

from lit_llama.bank import Bank
from lit_llama.checkpoint import save_adapter
from lit_llama.model import LLaMAConfig
from lit_llama.utils import UserError

ADAPTER = "aligner_weights/microworld-pirate-n1/adapter.safetensors"
SCRIPTS = {
    "generate/aligner.py --output_file": ["--prompt", "Who?", "--max_new_tokens", "2"],
    "generate/base.py --output_file": ["--prompt", "Who?", "--max_new_tokens", "2"],
    "evaluate/microworld.py --output_file": ["--questions", "2", "--groups", "unseen"],
    "scripts/inspect_aligner.py --to_safetensors": [ADAPTER],
    "scripts/inspect_aligner.py --plot": [ADAPTER],
}


@pytest.mark.parametrize("call", SCRIPTS)
def test_a_named_file_is_replaced_only_with_overwrite(run_script, refused, tmp_path, call):
    script, flag = call.split()
    path = tmp_path / {"--plot": "a.png", "--to_safetensors": "a.safetensors"}.get(flag, "a.json")
    path.write_bytes(b"years of work")
    message = refused(script, *SCRIPTS[call], flag, path)
    assert message == f"{path} exists; replace it with --overwrite, or name another file."
    assert path.read_bytes() == b"years of work" and len(list(tmp_path.iterdir())) == 1
    code, _, err = run_script(script, *SCRIPTS[call], flag, path, "--overwrite")
    assert code == 0, err
    assert path.read_bytes() != b"years of work"


def test_an_input_is_not_replaced(refused, tmp_path):
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"prompt": "Who?"}]))
    (tmp_path / "link").symlink_to(tmp_path)
    flags = ("--prompt_file", questions, "--output_file", tmp_path / "link/questions.json", "--overwrite")
    assert "which is read" in refused("generate/aligner.py", *flags)


def test_adapters_and_banks_replace_their_own_kind(tmp_path):
    state = {"x": torch.ones(1)}
    config = LLaMAConfig(n_layer=3, n_head=4, n_embd=32, vocab_size=50, block_size=8)
    adapter, bank, other = (tmp_path / name for name in ("adapter", "bank", "other"))
    other.write_text("years of work")
    for _ in range(2):
        save_adapter(adapter, state, {})
        Bank(config).save(bank)
    for path in (bank, other):
        with pytest.raises(UserError, match="exists"):
            save_adapter(path, state, {})
    for path in (adapter, other):
        with pytest.raises(UserError, match="exists"):
            Bank(config).save(path)
    assert other.read_text() == "years of work"
    save_adapter(other, state, {}, overwrite=True)
