"""Conversion of models made by transformers, in both directions, compared with transformers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model
from lit_llama.generation import Sampling, answer
from lit_llama.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SCRIPT = "scripts/convert_hf_checkpoint.py"
SIZES: dict[str, Any] = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.3,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
IDS = torch.randint(320, (2, 50), generator=torch.Generator().manual_seed(0))


def make(folder: Path, tokenizer_path: Path, kind: str = "Llama", shard: str = "5GB", **changes: Any) -> torch.Tensor:
    """Save a random transformers model with a tokenizer, and return its logits for `IDS`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # initialized to ones and zeros, which would hide errors
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    with torch.no_grad():
        return model(IDS).logits


def reload(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("heads", "tied", "rope", "biases"),
    list(itertools.product((4, 2), (False, True), ("plain", "llama3"), (False, True))),
)
def test_llama_variants(heads, tied, rope, biases, tmp_path, tokenizer_path, run_script):
    expected = make(
        tmp_path / "hf",
        tokenizer_path,
        num_key_value_heads=heads,
        tie_word_embeddings=tied,
        rope_parameters=LLAMA3 if rope == "llama3" else {"rope_type": "default", "rope_theta": 1000.0},
        attention_bias=biases,
        mlp_bias=biases,
    )
    assert expected.std() > 0.3
    assert run_script(SCRIPT, "--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "ours")[0] == 0
    torch.testing.assert_close(load_model(tmp_path / "ours")(IDS), expected, rtol=0, atol=1e-4)
    flags = ("--reverse", "--checkpoint_dir", tmp_path / "ours", "--output_dir", tmp_path / "back")
    assert run_script(SCRIPT, *flags)[0] == 0
    torch.testing.assert_close(reload(tmp_path / "back"), expected, rtol=0, atol=1e-6)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "changes", "context"),
    [
        ("Qwen2", {}, 64),
        ("Qwen2", dict(use_sliding_window=True, sliding_window=50, max_window_layers=0), 50),
        ("Qwen3", dict(head_dim=12), 64),
        ("Qwen3", dict(head_dim=6, tie_word_embeddings=True, attention_bias=True), 64),
        ("Qwen3", dict(head_dim=8, use_sliding_window=True, sliding_window=50, max_window_layers=0), 50),
        ("SmolLM3", dict(num_hidden_layers=4, pad_token_id=0), 64),
        ("SmolLM3", dict(no_rope_layers=[0, 1], pad_token_id=0, attention_bias=True, tie_word_embeddings=False), 64),
        ("SmolLM3", dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=50, pad_token_id=0), 50),
        ("Mistral", dict(sliding_window=None), 64),
        ("Mistral", dict(sliding_window=50, head_dim=6), 50),
    ],
)
def test_other_architectures(kind, changes, context, tmp_path, tokenizer_path, run_script):
    expected = make(tmp_path / "hf", tokenizer_path, kind, num_key_value_heads=2, **changes)
    assert run_script(SCRIPT, "--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "ours")[0] == 0
    model = load_model(tmp_path / "ours")
    assert model.config.block_size == context
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    flags = ("--reverse", "--checkpoint_dir", tmp_path / "ours", "--output_dir", tmp_path / "back")
    assert run_script(SCRIPT, *flags)[0] == 0
    torch.testing.assert_close(reload(tmp_path / "back"), expected, rtol=0, atol=1e-6)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()


def test_sharded_checkpoints(tmp_path, tokenizer_path, run_script):
    expected = make(tmp_path / "hf", tokenizer_path, shard="50KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert run_script(SCRIPT, "--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "ours")[0] == 0
    torch.testing.assert_close(load_model(tmp_path / "ours")(IDS), expected, rtol=0, atol=1e-4)


def test_verify(tmp_path, tokenizer_path, run_script, refused, monkeypatch):
    make(tmp_path / "hf", tokenizer_path, num_key_value_heads=2)
    flags = ("--checkpoint_dir", tmp_path / "hf", "--verify", "--output_dir")
    for dtype in ("auto", "bfloat16"):
        code, _, err = run_script(SCRIPT, *flags, tmp_path / dtype, "--dtype", dtype)
        assert code == 0 and "logits differ from those of transformers by" in err
    about = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**about, "dtype": "float16"}))  # the weights stay fp32
    assert run_script(SCRIPT, *flags, tmp_path / "auto")[0] == 0
    reverse = ("--reverse", "--verify", "--checkpoint_dir", tmp_path / "auto", "--output_dir", tmp_path / "back")
    assert "logits differ from those of transformers by" in run_script(SCRIPT, *reverse)[2]

    # a conversion error is detected, and no output remains
    monkeypatch.setattr("lit_llama.huggingface.weights.interleave", lambda rows, head_size: rows)
    code, _, err = run_script(SCRIPT, *flags, tmp_path / "wrong")
    assert code == 1 and "logits differ from those of transformers by up to" in err
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "--verify needs transformers" in refused(SCRIPT, *flags, tmp_path / "wrong")


def test_stories260k(shared, tmp_path, run_script):
    """A real model generates the same greedy text and converts back to the original weights."""
    source = shared / "models/stories260K-hf"
    assert run_script(SCRIPT, "--checkpoint_dir", source, "--output_dir", tmp_path / "ours")[0] == 0
    ours = Tokenizer(tmp_path / "ours")
    prompt = "Once upon a time"
    text = answer(load_model(tmp_path / "ours"), ours, [prompt], Sampling(max_new_tokens=80), echo=True)[0]
    flags = ("--reverse", "--checkpoint_dir", tmp_path / "ours", "--output_dir", tmp_path / "back")
    assert run_script(SCRIPT, *flags)[0] == 0
    for folder in (source, tmp_path / "back"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([ours.encode(prompt, bos=True)])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        assert ours.decode(new[0].tolist()) == text
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert all(other[name] == one[name] for name in other)
