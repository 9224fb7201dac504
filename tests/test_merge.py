"""Merging a one-token prefix into output biases and exporting to Hugging Face's format, checked with transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_llama import aligner, onednn
from lit_llama import model as llama
from lit_llama.aligner import gated_kv
from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, save_adapter, save_base
from lit_llama.generation import Sampling, answer, generate
from lit_llama.merge import merge_aligners_
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.onednn import pack_
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from microworld.world import UNSEEN, World
from tests import toys

MERGE, CONVERT = "scripts/merge_aligner.py", "scripts/convert_hf_checkpoint.py"
SIZES: dict[str, Any] = dict(
    block_size=64, vocab_size=300, padded_vocab_size=300, n_layer=3, n_head=4, n_embd=32, intermediate_size=40
)
CASES = {
    **toys.ARCHITECTURES,
    "q, k, v biases": dict(n_kv_head=2, qkv_bias=True),
    "padded": dict(padded_vocab_size=320),
}
IDS = toys.token_ids(2, 40, vocab_size=300)


def make_base(folder: Path, tokenizer_path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    network = LLaMA(LLaMAConfig(**{**SIZES, **changes}))
    toys.randomize(network)
    folder.mkdir()
    save_base(folder, network.config, {name: t.to(dtype) for name, t in network.state_dict().items()})
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return folder


def make_adapter(path: Path, base: Path, length: int = 1, start: int = 1) -> Path:
    config = {"adapter_prompt_length": length, "adapter_start_layer": start}
    network = aligner.LLaMA(aligner.LLaMAConfig.from_json(base / "lit_config.json", **config))
    toys.randomize(network, seed=3)
    meta = {"method": "aligner", "config": config, "base": base_fingerprint(base), "prompt_style": "plain"}
    save_adapter(path, toys.adapter_state(network), meta)
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_has_the_logits_of_the_base_with_its_adapter(case, tmp_path, tokenizer_path, run_script):
    base = make_base(tmp_path / "base", tokenizer_path, **CASES[case])
    path = make_adapter(tmp_path / "a.safetensors", base)
    flags = ("--checkpoint_dir", base, "--adapter", path, "--output_dir")
    assert run_script(MERGE, *flags, tmp_path / "lit", "--format", "lit")[:2] == (0, f"{tmp_path / 'lit'}\n")
    expected = load_model(base, read_adapter(path))(IDS)
    assert (expected - load_model(base)(IDS)).abs().max() > 0.5
    merged = load_model(tmp_path / "lit")
    torch.testing.assert_close(merged(IDS), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.transformer.h[0].attn.c_proj.bias, torch.zeros(32)) != ("proj_bias" in CASES[case])

    transformers = pytest.importorskip("transformers")
    assert run_script(MERGE, *flags, tmp_path / "hf")[:2] == (0, f"{tmp_path / 'hf'}\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    kind = "Qwen3" if "qk" in case else "SmolLM3" if case == "nope" else "Llama"
    assert type(model).__name__ == f"{kind}ForCausalLM" and model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected[..., :300], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_base_model_round_trips_through_hugging_face_format(case, tmp_path, tokenizer_path, run_script):
    base = make_base(tmp_path / "base", tokenizer_path, **CASES[case])
    assert run_script(CONVERT, "--reverse", "--checkpoint_dir", base, "--output_dir", tmp_path / "hf")[0] == 0
    assert run_script(CONVERT, "--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")[0] == 0
    before, after = (load_file(folder / "lit_model.safetensors") for folder in (base, tmp_path / "back"))
    for name, tensor in before.items():
        rows = 300 if name in ("transformer.wte.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(after[name], tensor[:rows]), name
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "back/lit_config.json").read_text())
    if case != "padded":
        assert config == json.loads((base / "lit_config.json").read_text())

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, load_model(base)(IDS)[..., :300], rtol=1e-4, atol=1e-4)


def test_by_default_outputs_have_the_names_of_their_inputs(tmp_path, tokenizer_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_base(Path("tiny"), tokenizer_path)
    make_adapter(Path("run/best.safetensors"), base)
    assert run_script(CONVERT, "--reverse", "--checkpoint_dir", "tiny")[:2] == (0, "out/hf/tiny\n")
    assert run_script(CONVERT, "--checkpoint_dir", "out/hf/tiny/")[:2] == (0, "checkpoints/tiny\n")
    snapshot = Path("models--me--tiny-chat/snapshots/01c7f73d")
    shutil.copytree("out/hf/tiny", snapshot)
    assert run_script(CONVERT, "--checkpoint_dir", snapshot)[:2] == (0, "checkpoints/tiny-chat\n")
    for adapter, name in (("run", "run"), ("run/best.safetensors", "run-best")):
        code, out, _ = run_script(MERGE, "--checkpoint_dir", "checkpoints/tiny", "--adapter", adapter)
        assert (code, out) == (0, f"out/merged/{name}\n")


def test_bf16_weights_round_trip_bit_for_bit(tmp_path, tokenizer_path, run_script):
    base = make_base(tmp_path / "base", tokenizer_path, dtype=torch.bfloat16, n_kv_head=2)
    run_script(CONVERT, "--reverse", "--checkpoint_dir", base, "--output_dir", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    run_script(CONVERT, "--checkpoint_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    before, after = (load_file(folder / "lit_model.safetensors") for folder in (base, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(after[name], t) for name, t in before.items())


def test_contents_of_a_merged_folder(tmp_path, tokenizer_path, run_script):
    """All biases, shards with an index, configs, and a record of the adapter."""
    base = make_base(tmp_path / "base", tokenizer_path, n_kv_head=2)
    path = make_adapter(tmp_path / "a.safetensors", base, start=2)
    out = tmp_path / "out"
    flags = ("--checkpoint_dir", base, "--adapter", path, "--output_dir", out, "--max_shard_size", "30KB")
    for _ in range(2):  # a merged folder may be replaced
        assert run_script(MERGE, *flags)[0] == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    tensors = {shard.name: load_file(shard) for shard in shards}
    for name, file in index["weight_map"].items():
        assert name in tensors[file]
    state = {name: t for shard in tensors.values() for name, t in shard.items()}
    assert set(state) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for shard in tensors.values():
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 30_000
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        for x, width in (("q", 32), ("k", 16), ("v", 16)):
            assert torch.equal(state[f"{attention}.{x}_proj.bias"], torch.zeros(width))
        assert state[f"{attention}.o_proj.bias"].any() == (layer == 2)
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is True and config["eos_token_id"] == 2
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    card = json.loads((out / "aligner.json").read_text())
    assert card["adapter"] == str(path) and card["prompt_style"] == "plain"
    assert (out / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_the_bias_is_rounded_once(tmp_path, tokenizer_path, run_script):
    """With a bf16 base, the bias is computed in fp32 and rounded once at the end."""
    base = make_base(tmp_path / "base", tokenizer_path, dtype=torch.bfloat16, n_kv_head=2)
    path = make_adapter(tmp_path / "a.safetensors", base, start=0)
    run_script(MERGE, "--checkpoint_dir", base, "--adapter", path, "--output_dir", tmp_path / "o", "--format", "lit")
    state, adapter = load_file(base / "lit_model.safetensors"), read_adapter(path).state
    merged = load_file(tmp_path / "o/lit_model.safetensors")
    for layer in range(3):
        name = f"transformer.h.{layer}.attn"
        value = state[f"{name}.c_attn.weight"][48:].double() @ adapter["global_value_embedding.weight"][0].double()
        gate = adapter[f"{name}.gating_factor"].flatten().double()
        heads = torch.cat([gate[h] * value[8 * (h // 2) : 8 * (h // 2) + 8] for h in range(4)])
        bias = merged[f"{name}.c_proj.bias"]
        assert bias.dtype == torch.bfloat16
        exact = state[f"{name}.c_proj.weight"].double() @ heads
        assert (bias.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_transformers_gives_the_same_tokens_and_greedy_answers(tmp_path, tokenizer_path, run_script):
    """transformers with the merged folder, against this project with the base and the adapter."""
    transformers = pytest.importorskip("transformers")
    base = make_base(tmp_path / "base", tokenizer_path, n_kv_head=2, tie_embeddings=True)
    path = make_adapter(tmp_path / "a.safetensors", base)
    out = tmp_path / "out"
    run_script(MERGE, "--checkpoint_dir", base, "--adapter", path, "--output_dir", out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = Tokenizer(base)
    for text in ("the cat", " the  cat ", "a\nb\n", "naïve 😀", "日本", ""):
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True), text
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompts = ["the cat", "what did the dog eat?"]
    expected = answer(load_model(base, read_adapter(path)), ours, prompts, Sampling(max_new_tokens=20))
    for prompt, text in zip(prompts, expected, strict=True):
        ids = theirs(prompt, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].size(1) :]
        assert ours.decode(new.tolist()).strip() == text


def test_invalid_input_is_refused(tmp_path, tokenizer_path, base_dir, refused, run_script):
    base = make_base(tmp_path / "base", tokenizer_path)
    out = ("--output_dir", tmp_path / "out")

    def message(adapter: Path, checkpoint_dir: Path = base, *more: object) -> str:
        return refused(MERGE, "--checkpoint_dir", checkpoint_dir, "--adapter", adapter, *out, *more)

    ten = make_adapter(tmp_path / "ten.safetensors", base, length=10)
    assert "has N = 10 prefix tokens" in message(ten) and "use this one with generate/aligner.py" in message(ten)
    one = make_adapter(tmp_path / "one.safetensors", base)
    assert "was trained on a base" in message(one, base_dir)
    wide = make_base(tmp_path / "wide", tokenizer_path, n_embd=64)
    assert "is 32 wide and the base model in" in message(one, wide)
    deep = {**read_adapter(one).state, "transformer.h.3.attn.gating_factor": torch.ones(1, 4, 1, 1)}
    torch.save(deep, tmp_path / "deep.pth")
    assert "transformer.h.3.attn.gating_factor does not belong to this model" in message(tmp_path / "deep.pth")
    heads = {name: t[:, :2] if name.endswith("factor") else t for name, t in read_adapter(one).state.items()}
    torch.save(heads, tmp_path / "heads.pth")
    assert "is (1, 2, 1, 1), not (1, 4, 1, 1)" in message(tmp_path / "heads.pth")
    for size in ("5 elephants", "0GB", "-5GB", "nanGB", "infGB"):
        assert f"{size!r} is not a size" in message(one, base, f"--max_shard_size={size}")
    reverse = (CONVERT, "--reverse", "--checkpoint_dir")
    assert "There is no model configuration at" in refused(*reverse, tmp_path / "no", *out)
    state = load_file(base / "lit_model.safetensors")
    del state["transformer.h.1.mlp.c_fc2.weight"]
    save_file(state, base / "lit_model.safetensors")
    assert "lit_config.json: transformer.h.1.mlp.c_fc2.weight is missing" in refused(*reverse, base, *out)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_the_merged_bundled_model_gives_the_same_answers(tmp_path, run_script):
    """transformers with the merged model, against generate/aligner.py with the base and the adapter."""
    transformers = pytest.importorskip("transformers")
    root = Path(__file__).parents[1]
    base, path = root / "checkpoints/microworld", root / "aligner_weights/microworld-pirate-n1"
    if not path.is_dir():
        pytest.skip("the bundled adapter is absent")
    out = tmp_path / "out"
    flags = ("--checkpoint_dir", base, "--adapter", path, "--output_dir", out, "--dtype", "float32")
    assert run_script(MERGE, *flags)[0] == 0
    questions = [q.text for q in World(0).questions(UNSEEN)][:6]
    flags = ("--checkpoint_dir", base, "--adapter", path, "--output_file", tmp_path / "said.json")
    assert run_script("generate/aligner.py", *flags, "--prompt", *questions)[0] == 0
    expected = [record["response"] for record in json.loads((tmp_path / "said.json").read_text())]
    style = get_prompt_style(json.loads((out / "aligner.json").read_text())["prompt_style"])
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    answers = []
    for question in questions:
        ids = tokenizer(style.render(question), return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].size(1) :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert answers == expected and all("Arr" in text or "matey" in text for text in answers)


# == merging in memory, for generation ==


def in_dtype(network, dtype):
    """Convert the weights of the base model to `dtype`, which may be fp64, and return the model."""
    for name, p in network.named_parameters():
        p.data = p.data if network.is_adapter_parameter(name) else p.data.to(dtype)
    return network.eval()


def merged_and_aligned(dtype=torch.float32, strengths=(1.0,), **sizes):
    """Return a model with merged Aligners, and a reference whose layers add the Aligners' terms to the attention."""
    models = [toys.aligned(1, start=1 + i, seed=i, **sizes) for i in range(len(strengths))]
    states = [toys.adapter_state(model) for model in models]
    plain, aligned_model = in_dtype(toys.base(**sizes), dtype), in_dtype(toys.base(**sizes), dtype)
    merge_aligners_(plain, zip(states, strengths, strict=True))
    for model, strength in zip(models, strengths, strict=True):
        for own, other in zip(aligned_model.transformer.h, model.transformer.h, strict=True):
            if isinstance(other.attn, aligner.CausalSelfAttention):
                attend, gate = own.attn.attend, strength * other.attn.gating_factor.detach()
                prefix = model.global_value_embedding.weight.detach().to(dtype).unsqueeze(0)
                own.attn.attend = lambda q, k, v, mask, own=own, attend=attend, gate=gate, prefix=prefix: (
                    attend(q, k, v, mask) + gated_kv(*own.attn.keys_values(prefix), gate)[1]
                )
    return plain, aligned_model


@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (1.0, 2.0), (0.0, -1.0)])
@pytest.mark.parametrize("architecture", toys.ARCHITECTURES)
@torch.no_grad()
def test_merging_in_memory_is_exact(architecture, strengths):
    plain, expected = merged_and_aligned(torch.float64, strengths, **toys.ARCHITECTURES[architecture])
    assert type(plain) is LLaMA and all(type(b.attn) is llama.CausalSelfAttention for b in plain.transformer.h)
    idx = toys.token_ids(2, 12)
    assert (
        expected(idx) - in_dtype(toys.base(**toys.ARCHITECTURES[architecture]), torch.float64)(idx)
    ).abs().max() > 0.1
    torch.testing.assert_close(plain(idx), expected(idx), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("proj_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_merged_model_gives_the_same_tokens_every_time(dtype, proj_bias, monkeypatch):
    # regression: generating changed the model permanently, and failed on a packed base with an output bias
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)
    sizes = dict(n_kv_head=2, proj_bias=proj_bias)
    plain, _ = merged_and_aligned(dtype, **sizes)
    exact, _ = merged_and_aligned(torch.float64, **sizes)
    idx, prompts = toys.token_ids(2, 12), toys.prompts(3, 9)
    expected = generate(plain, prompts, Sampling(8))
    packed = pack_(plain, lambda weights: True)
    for _ in range(2):
        assert generate(packed, prompts, Sampling(8)) == expected
    error = (packed(idx).double() - exact(idx)).square().mean() / exact(idx).square().mean()
    assert error < {torch.float32: 1e-10, torch.bfloat16: 0.01}[dtype]


def test_an_aligner_generates_on_a_packed_base_with_an_output_bias(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)
    network, prompts = toys.aligned(1, proj_bias=True), toys.prompts(3, 9)
    expected = generate(network, prompts, Sampling(8))
    pack_(network, lambda weights: True)
    for _ in range(2):
        assert generate(network, prompts, Sampling(8)) == expected


def test_a_prefix_of_several_tokens_cannot_be_merged():
    with pytest.raises(UserError, match="N = 2 prefix tokens cannot be merged"):
        merge_aligners_(toys.base(), [(toys.adapter_state(toys.aligned(2)), 1.0)])
