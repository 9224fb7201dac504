"""Qwen3 and SmolLM3 from a transformers checkpoint to a merged model, with the scripts."""

import copy

import pytest
import torch

from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.generation import Sampling, generate
from lit_llama.tokenizer import Tokenizer
from tests.test_transformers import IDS, make, transformers

KINDS = {
    "Qwen3": dict(head_dim=12, num_key_value_heads=2, tie_word_embeddings=True),
    "SmolLM3": dict(num_hidden_layers=4, num_key_value_heads=2, no_rope_layer_interval=2, pad_token_id=0),
}


@pytest.fixture(params=KINDS)
def converted(request, tmp_path, tokenizer_path, run_script):
    """Return the kind of model, the transformers checkpoint and the converted one."""
    make(tmp_path / "hf", tokenizer_path, request.param, **{"num_hidden_layers": 3, **KINDS[request.param]})
    flags = ("--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "ours")
    assert run_script("scripts/convert_hf_checkpoint.py", *flags)[0] == 0
    return request.param, tmp_path / "hf", tmp_path / "ours"


def generate_with_transformers(folder, prompt: list[int], n_new: int, cached: bool) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=n_new, do_sample=False, eos_token_id=None, use_cache=cached)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_cached_decoding_equals_transformers(converted):
    _, hf, ours = converted
    prompts = [IDS[0, :9].tolist(), IDS[1, :4].tolist()]
    expected = [generate_with_transformers(hf, prompt, 20, cached=False) for prompt in prompts]
    assert generate(load_model(ours), prompts, Sampling(max_new_tokens=20)) == expected
    assert [generate_with_transformers(hf, prompt, 20, cached=True) for prompt in prompts] == expected


def test_bf16_is_as_close_to_fp32_as_in_transformers(converted):
    _, hf, ours = converted
    exact = load_model(ours)(IDS)
    mine = load_model(ours, dtype=torch.bfloat16)(IDS).float()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)(IDS).logits.float()
    assert (mine - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()
    assert (mine - exact).abs().mean() < 0.1 * exact.std()


def test_training_merging_and_quantizing(converted, data_dir, tmp_path, run_script):
    kind, _, ours = converted
    flags = ("--checkpoint_dir", ours, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--max_steps", "4")
    training_flags = (
        "--learning_rate",
        "0.3",
        "--warmup_epochs",
        "0",
        "--adapter_start_layer",
        "1",
        "--accelerator",
        "cpu",
    )
    code, _, err = run_script("finetune/aligner.py", *flags, *training_flags, "--lr_schedule", "constant")
    assert code == 0, err
    adapter = read_adapter(tmp_path / "out/last.safetensors")
    aligned, base = load_model(ours, adapter), load_model(ours)
    with torch.no_grad():
        assert (aligned(IDS) - base(IDS)).abs().max() > 0.1  # the gates have opened

    flags = ("--checkpoint_dir", ours, "--adapter", tmp_path / "out/last.safetensors", "--output_dir")
    assert run_script("scripts/merge_aligner.py", *flags, tmp_path / "merged")[0] == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == f"{kind}ForCausalLM" and merged.config.attention_bias
    with torch.no_grad():
        expected = aligned(IDS)
        torch.testing.assert_close(merged(IDS).logits, expected[..., : merged.config.vocab_size], rtol=0, atol=1e-4)

    prompt = Tokenizer(ours).encode("what did the cat eat?", bos=True)
    new = generate(aligned, [prompt], Sampling(max_new_tokens=12))[0]
    assert generate_with_transformers(tmp_path / "merged", prompt, 12, cached=True) == new
    flags = (
        "--checkpoint_dir",
        ours,
        "--adapter",
        tmp_path / "out/last.safetensors",
        "--prompt",
        "what did the cat eat?",
    )
    code, out, err = run_script("generate/aligner.py", *flags, "--max_new_tokens", "12", "--accelerator", "cpu")
    assert code == 0 and out.strip(), err

    pytest.importorskip("bitsandbytes")
    quantized = load_model(ours, copy.deepcopy(adapter), quantize="int8")
    with torch.no_grad():
        assert (quantized(IDS) - expected).abs().mean() < 0.1 * expected.std()
