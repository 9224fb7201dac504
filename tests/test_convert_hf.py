"""Conversion of Hugging Face checkpoints, compared with a plain LLaMA that applies half-split RoPE to their tensors."""

import functools
import io
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import load_model
from lit_llama.generation import Sampling, answer
from lit_llama.huggingface.config import convert_config
from lit_llama.huggingface.weights import deinterleave, hf_names, interleave
from lit_llama.model import LLaMAConfig
from lit_llama.storage.manifest import MANIFEST
from lit_llama.storage.tensor_files import read_state
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

SCRIPT = str(Path(__file__).parents[1] / "scripts/convert_hf_checkpoint.py")
TINY: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=60, hidden_size=24, intermediate_size=36,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=48, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2, rope_theta=500.0),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "biases": dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=10, num_key_value_heads=2, rms_norm_eps=1e-2),
    "linear rope": dict(rope_scaling={"type": "linear", "factor": 3.0}),
    "llama3 rope": dict(rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3_ROPE}),
    "transformers 5": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_ROPE}),
    "qwen3": dict(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2, head_dim=10, tie_word_embeddings=True),
    "qwen3, biases": dict(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2, head_dim=6, attention_bias=True),
    "smollm3": dict(
        architectures=["SmolLM3ForCausalLM"], model_type="smollm3", no_rope_layers=[0, 1], tie_word_embeddings=False
    ),
    "smollm3, by interval": dict(model_type="smollm3", architectures=None, num_hidden_layers=4, no_rope_layers=None),
    "default rope": dict(rope_parameters={"rope_type": "default", "rope_theta": 700.0}, partial_rotary_factor=None),
    "rope_scaling over rope_parameters": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 700.0}, rope_scaling={"type": "linear", "factor": 3.0}
    ),
}


def is_qwen3(config: dict[str, Any]) -> bool:
    return config["architectures"] == ["Qwen3ForCausalLM"]


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    c = config
    hs = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    width, mlp, q, kv = c["hidden_size"], c["intermediate_size"], *(
        hs * c[f"num_{n}_heads"] for n in ("attention", "key_value")
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
    if not c.get("tie_word_embeddings", c.get("model_type") == "smollm3"):
        shapes["lm_head.weight"] = (c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        for part, shape, bias in (
            ("input_layernorm", (width,), False),
            ("self_attn.q_proj", (q, width), c.get("attention_bias")),
            ("self_attn.k_proj", (kv, width), c.get("attention_bias")),
            *((f"self_attn.{norm}", (hs,), False) for norm in ("q_norm", "k_norm") if is_qwen3(c)),
            ("self_attn.v_proj", (kv, width), c.get("attention_bias")),
            ("self_attn.o_proj", (width, q), c.get("attention_bias")),
            ("post_attention_layernorm", (width,), False),
            ("mlp.gate_proj", (mlp, width), c.get("mlp_bias")),
            ("mlp.up_proj", (mlp, width), c.get("mlp_bias")),
            ("mlp.down_proj", (width, mlp), c.get("mlp_bias")),
        ):
            shapes[f"model.layers.{i}.{part}.weight"] = shape
            if bias:
                shapes[f"model.layers.{i}.{part}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.4 if len(shape) == 2 else 1.0)
        for name, shape in shapes.items()
    }


def hf_logits(t: dict[str, torch.Tensor], c: dict[str, Any], idx: torch.Tensor) -> torch.Tensor:
    """Return the logits as Hugging Face computes them: in each head, RoPE pairs dimension i with i + hs/2."""
    nh, ng = c["num_attention_heads"], c["num_key_value_heads"]
    hs = c.get("head_dim") or c["hidden_size"] // nh
    T = idx.size(1)
    theta = 2e6 if c["model_type"] == "smollm3" else 10000.0  # the default if the config has none
    parameters, scaling = c.get("rope_parameters", {}), c.get("rope_scaling")
    rope = {"rope_theta": parameters.get("rope_theta", c.get("rope_theta", theta)), **(scaling or parameters)}
    frequencies = []
    for i in range(hs // 2):
        frequency = rope["rope_theta"] ** (-2 * i / hs)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            frequency /= rope["factor"]
        if kind == "llama3":
            length, wavelength = rope["original_max_position_embeddings"], 2 * math.pi / frequency
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > length / low:
                frequency /= rope["factor"]
            elif wavelength > length / high:
                smooth = (length / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        frequencies.append(frequency)
    angles = torch.tensor([[p * f for f in frequencies * 2] for p in range(T)])

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-x[..., hs // 2 :], x[..., : hs // 2]), dim=-1)
        return x * angles.cos() + half * angles.sin()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros(()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * t[f"{name}.weight"]

    rotated = c.get("no_rope_layers", [1] * c["num_hidden_layers"]) or [1, 1, 1, 0]
    x = t["model.embed_tokens.weight"][idx]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(h, f"{layer}.self_attn.{name}_proj").view(*idx.shape, heads, hs).transpose(1, 2)
            for name, heads in (("q", nh), ("k", ng), ("v", ng))
        )
        if is_qwen3(c):
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        if rotated[i]:
            q, k = rotate(q), rotate(k)
        k, v = (torch.stack([z[:, n * ng // nh] for n in range(nh)], dim=1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(hs)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*idx.shape, nh * hs)
        x = x + linear(y, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    x = norm(x, "model.norm")
    return x @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


@functools.cache
def small_tokenizer(vocab_size: int = 40) -> bytes:
    """Return a small SentencePiece model."""
    content = io.BytesIO()
    text = ["the cat sat on the mat and the dog ate the hat", "quick foxes jump over lazy wizards"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=content, vocab_size=vocab_size, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return content.getvalue()


def write_hf(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    shards: int = 0,
    suffix: str = ".safetensors",
) -> Path:
    """Write a folder as transformers does; `shards` is the number of indexed weight files, 0 for a single file."""
    stem, save = ("model", save_file) if suffix == ".safetensors" else ("pytorch_model", torch.save)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(small_tokenizer())
    (folder / "generation_config.json").write_text("{}")
    files = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)] or [f"{stem}{suffix}"]
    weight_map = {name: files[i % len(files)] for i, name in enumerate(tensors)}
    for file in files:
        save({name: tensors[name] for name, location in weight_map.items() if location == file}, folder / file)
    if shards:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def convert(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    arguments = ["--checkpoint_dir", str(source), "--output_dir", str(out), *more]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_original(case, tmp_path, monkeypatch, capsys):
    config = {**TINY, **CASES[case]}
    tensors = random_tensors(config)
    convert(write_hf(tmp_path / "hf", config, tensors), tmp_path / "out", monkeypatch)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    idx = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(1))
    ours, theirs = load_model(tmp_path / "out")(idx), hf_logits(tensors, config, idx)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards, suffix", [(3, ".safetensors"), (0, ".bin"), (2, ".bin")])
def test_every_weight_format_gives_the_same_file(shards, suffix, tmp_path, monkeypatch):
    tensors = random_tensors(TINY)
    convert(write_hf(tmp_path / "one", TINY, tensors), tmp_path / "a", monkeypatch)
    convert(write_hf(tmp_path / "other", TINY, tensors, shards, suffix), tmp_path / "b", monkeypatch)
    for name in ("lit_model.safetensors", "lit_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_output_folder_contains_the_expected_files(tmp_path, monkeypatch):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # in old checkpoints
    convert(write_hf(tmp_path / "hf", TINY, tensors), tmp_path / "out", monkeypatch)
    names = {"lit_config.json", "lit_model.safetensors", "tokenizer.model", "generation_config.json", MANIFEST}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out/tokenizer.model").read_bytes() == small_tokenizer()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    convert(tmp_path / "hf", tmp_path / "out", monkeypatch)  # a converted folder may be replaced


def test_dtype_casts_and_auto_keeps_the_original(tmp_path, monkeypatch):
    tensors = {name: t.half() for name, t in random_tensors(TINY).items()}
    source = write_hf(tmp_path / "hf", TINY, tensors)
    for flags, dtype in (((), torch.float16), (("--dtype", "bfloat16"), torch.bfloat16)):
        convert(source, tmp_path / "out", monkeypatch, *flags)
        state = load_file(tmp_path / "out/lit_model.safetensors")
        assert {t.dtype for t in state.values()} == {dtype}
    expected = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(state["transformer.h.1.mlp.c_fc2.weight"], expected)


def test_a_tied_output_layer_may_be_stored_if_it_equals_the_embedding(tmp_path, monkeypatch, capsys):
    config = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    convert(write_hf(tmp_path / "same", config, tensors), tmp_path / "out", monkeypatch)
    assert "lm_head.weight" not in read_state(tmp_path / "out/lit_model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(SystemExit):
        convert(write_hf(tmp_path / "other", config, tensors), tmp_path / "out2", monkeypatch)
    assert "ties lm_head.weight to the embedding" in capsys.readouterr().err


def without(name: str):
    return lambda tensors: tensors.pop(name)


BAD_TENSORS = {
    "model.layers.1.self_attn.k_proj.weight is missing": without("model.layers.1.self_attn.k_proj.weight"),
    "lm_head.weight is missing": without("lm_head.weight"),
    "model.layers.0.self_attn.q_norm.weight does not belong to this model": lambda tensors: tensors.update(
        {"model.layers.0.self_attn.q_norm.weight": torch.ones(6)}
    ),
    "model.layers.0.self_attn.v_proj.weight is (12, 24), not (24, 24)": lambda tensors: tensors.update(
        {"model.layers.0.self_attn.v_proj.weight": torch.ones(12, 24)}
    ),
    "model.layers.0.self_attn.q_proj.weight is missing (and 19 more)": lambda tensors: (
        tensors.clear() or tensors.update(x=torch.ones(1))
    ),
}


@pytest.mark.parametrize("sentence", BAD_TENSORS)
def test_mismatched_tensors_are_named(sentence, tmp_path, monkeypatch, capsys):
    tensors = random_tensors(TINY)
    BAD_TENSORS[sentence](tensors)
    assert_refused(write_hf(tmp_path / "hf", TINY, tensors), tmp_path, monkeypatch, capsys, sentence)


def test_a_wrong_number_of_heads_is_detected_by_the_key_projection(tmp_path, monkeypatch, capsys):
    tensors = random_tensors({**TINY, "num_key_value_heads": 2})
    source = write_hf(tmp_path / "hf", {**TINY, "num_attention_heads": 6, "num_key_value_heads": 2}, tensors)
    message = "model.layers.0.self_attn.k_proj.weight is (12, 24), not (8, 24)"
    assert_refused(source, tmp_path, monkeypatch, capsys, message)


def assert_refused(source: Path, tmp_path: Path, monkeypatch, capsys, sentence: str) -> None:
    """Check that the conversion exits with code 1 and a one-line error, and creates no files."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        convert(source, tmp_path / "out", monkeypatch)
    captured = capsys.readouterr()
    assert exit.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
    assert sorted(tmp_path.rglob("*")) == before


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    'The architecture is "GemmaForCausalLM"': dict(architectures=["GemmaForCausalLM"], model_type="gemma"),
    "config.json: hidden_size is null; expected a whole number": dict(hidden_size=None),
    'config.json: num_hidden_layers is "2"; expected a whole number': dict(num_hidden_layers="2"),
    "config.json: num_hidden_layers is 18446744073709551616; expected": dict(num_hidden_layers=2**64),
    "config.json: architectures is 3; expected a list": dict(architectures=3),
    "config.json: tie_word_embeddings is 1; expected true or false": dict(tie_word_embeddings=1),
    "config.json: rope_theta is NaN; expected a number from 1": dict(rope_theta=math.nan),
    "config.json: rope_scaling is a list; expected an object": dict(rope_scaling=[1]),
    "config.json: rms_norm_eps is 2; expected a number from 0 up to 1": dict(rms_norm_eps=2),
    'The architecture is "Qwen3MoeForCausalLM"; only': dict(architectures=["Qwen3MoeForCausalLM"]),
    'The architecture is "Gemma3ForCausalLM"; only': dict(architectures=["Gemma3ForCausalLM"]),
    "config.json: head_dim is 0; expected": dict(architectures=["Qwen3ForCausalLM"], head_dim=0),
    "no_rope_layers must list 1 (with RoPE) or 0 for each of the 2 layers": dict(
        architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1]
    ),
    "1 (with RoPE) or 0 for each": dict(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, "a"]),
    "config.json: no_rope_layers is 3; expected a list": dict(architectures=["SmolLM3ForCausalLM"], no_rope_layers=3),
    "config.json: no_rope_layer_interval is 0; expected a whole number from 1": dict(
        architectures=["SmolLM3ForCausalLM"], no_rope_layer_interval=0
    ),
    'The activation is "gelu"': dict(hidden_act="gelu"),
    "quantized": dict(quantization_config={"bits": 4}),
    "Rope scaling 'yarn' is not supported": dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
    "config.json: rope scaling 'llama3' has no low_freq_factor": dict(
        rope_scaling={"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8}
    ),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5),
}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_without_a_number_of_key_value_heads_there_are_as_many_as_heads(name):
    hf = {**TINY, "architectures": [f"{name}ForCausalLM"], "num_key_value_heads": None}
    assert convert_config(hf).n_kv_head == 4
    del hf["num_key_value_heads"]  # only for Llama does transformers have the same default
    if name == "Llama":
        assert convert_config(hf).n_kv_head == 4
    else:
        with pytest.raises(UserError, match=r"config\.json has no num_key_value_heads"):
            convert_config(hf)


def test_a_scaled_context_may_be_in_another_field():
    """Vicuna v1.5 16k states the context before the scaling as max_position_embeddings."""
    hf = {**TINY, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert convert_config({**hf, "max_sequence_length": 192}).block_size == 192
    assert convert_config({**hf, "max_sequence_length": None}).block_size == 48


def test_a_longer_context_than_is_allowed_is_limited(capsys):
    assert convert_config({**TINY, "max_position_embeddings": 2**22}).block_size == 2**20
    assert capsys.readouterr().err == (
        "note: the context is limited to 1,048,576 tokens; config.json allows 4,194,304\n"
    )


@pytest.mark.parametrize("sentence", BAD_CONFIGS)
def test_configurations_that_cannot_be_converted(sentence):
    with pytest.raises(UserError, match=r"^[A-Zc].*[.]$") as error:
        convert_config({**TINY, **BAD_CONFIGS[sentence]})
    assert sentence in str(error.value)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def replace_config_with_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def write_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def point_elsewhere(name: str) -> Callable[[Path], object]:
    """Return a function that makes an index refer to an existing file outside its folder."""

    def point(folder: Path) -> None:
        shutil.copy(folder / "model-00002-of-00002.safetensors", folder.parent / "secret")
        index = folder / "model.safetensors.index.json"
        text = index.read_text().replace("model-00002-of-00002.safetensors", name.format(folder.parent))
        index.write_text(text)

    return point


BAD_FOLDERS = {
    "names '../secret'; expected the name of a file in its folder": point_elsewhere("../secret"),
    "/secret'; expected the name of a file in its folder": point_elsewhere("{}/secret"),
    "names 'x/../../secret'; expected the name of a file": point_elsewhere("x/../../secret"),
    "There is no file at": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": damage_config,
    "config.json holds a list; expected an object": replace_config_with_list,
    "needs its tokenizer.model or tokenizer.json": lambda folder: (folder / "tokenizer.model").unlink(),
    "is not a SentencePiece model": lambda folder: (folder / "tokenizer.model").write_bytes(b"text"),
    "tokenizer.model is a Git LFS pointer, so fetch": lambda folder: write_lfs_pointer(folder / "tokenizer.model"),
    "has 65 tokens and the model 60": lambda folder: (folder / "tokenizer.model").write_bytes(small_tokenizer(65)),
    "has no weights": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "names model-00002-of-00002.safetensors, which is not in the folder": remove_shard,
    "model-00002-of-00002.safetensors is not a checkpoint: it is damaged or cut short": truncate_shard,
    "it is a Git LFS pointer": lambda folder: write_lfs_pointer(folder / "model-00001-of-00002.safetensors"),
    "has no weight_map": empty_index,
}


@pytest.mark.parametrize("sentence", BAD_FOLDERS)
def test_damaged_folders(sentence, tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY), shards=2)
    BAD_FOLDERS[sentence](source)
    assert_refused(source, tmp_path, monkeypatch, capsys, sentence)


def test_a_missing_folder(tmp_path, monkeypatch, capsys):
    assert_refused(tmp_path / "nowhere", tmp_path, monkeypatch, capsys, "There is no file at")


def test_code_in_a_bin_file_does_not_run(tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY), suffix=".bin")
    torch.save({"model.norm.weight": toys.RunsCode()}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path, monkeypatch, capsys, "it would run code when loaded")


def test_other_folders_are_not_overwritten(tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    before = sorted(source.iterdir())
    for out in (source, tmp_path):
        with pytest.raises(SystemExit):
            convert(source, out, monkeypatch)
        error = capsys.readouterr().err
        assert "which is read" in error or "which is not part of a base model" in error
    assert sorted(source.iterdir()) == before


def test_a_folder_with_only_a_tokenizer_json(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    (source / "tokenizer.model").unlink()
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "cat": 1}, unk_token="<eos>"))
    engine.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    convert(source, tmp_path / "out", monkeypatch)
    assert Tokenizer(tmp_path / "out").encode("cat", bos=True, eos=True) == [1, 0]


def test_an_interrupted_conversion_leaves_no_files(tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    before = sorted(tmp_path.rglob("*"))

    def interrupt(rows: torch.Tensor, head_size: int) -> torch.Tensor:
        assert list(tmp_path.glob(".aligner-tmp-*/new/out/lit_model.safetensors"))  # the conversion has started
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_llama.huggingface.weights.interleave", interrupt)
    with pytest.raises(SystemExit) as exit:
        convert(source, tmp_path / "out", monkeypatch)
    assert exit.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_space_is_checked_before_the_conversion(tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", TINY, random_tensors(TINY))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    assert_refused(source, tmp_path, monkeypatch, capsys, "GB and the disk of")


def test_duplicate_tensors_and_unsupported_dtypes_are_refused(tmp_path, monkeypatch, capsys):
    tensors = random_tensors(TINY)
    source = write_hf(tmp_path / "hf", TINY, tensors, shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    content = load_file(shard)
    save_file({**content, "model.embed_tokens.weight": torch.ones(1)}, shard)
    assert_refused(
        source, tmp_path, monkeypatch, capsys, "holds model.embed_tokens.weight, which another file holds too"
    )
    save_file({**content, "model.norm.weight": torch.ones(24, dtype=torch.int8)}, shard)
    assert_refused(source, tmp_path, monkeypatch, capsys, "model.norm.weight holds I8 numbers, which are not supported")


MEASURED = """
import re, sys
from lit_llama import cli
from scripts import convert_hf_checkpoint as script
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
small, large = (["--checkpoint_dir", source, "--output_dir", source + "-out"] for source in sys.argv[1:])
script.main(cli.parse(script.Settings, small))  # what the libraries take once
before = peak()
script.main(cli.parse(script.Settings, large))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process has used, at most")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_peak_memory_stays_below_the_size_of_a_shard(suffix, tmp_path):
    config = {**TINY, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
    tensors = {name: torch.zeros(t.shape) for name, t in random_tensors(config).items()}
    small = write_hf(tmp_path / "small", TINY, random_tensors(TINY), shards=3, suffix=suffix)
    large = write_hf(tmp_path / "large", config, tensors, shards=3, suffix=suffix)
    del tensors
    shards = [path.stat().st_size for path in large.glob(f"*{suffix}")]
    assert sum(shards) > 200e6
    command = [sys.executable, "-c", MEASURED, str(small), str(large)]
    result = subprocess.run(command, cwd=Path(SCRIPT).parents[1], capture_output=True, text=True, check=True)
    growth = int(result.stdout.split()[-1])
    assert growth < 0.75 * max(shards), f"{growth / 1e6:.0f} MB"


@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(0, 3))
def test_interleave(heads, half, columns):
    shape = (heads * 2 * half, columns) if columns else (heads * 2 * half,)
    rows = torch.randn(shape)
    interleaved = interleave(rows, 2 * half)
    assert interleaved.shape == rows.shape
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half
            assert torch.equal(interleaved[first + 2 * i], rows[first + i])
            assert torch.equal(interleaved[first + 2 * i + 1], rows[first + half + i])
    assert torch.equal(deinterleave(interleaved, 2 * half), rows)


def test_hf_names():
    assert hf_names("transformer.wte.weight") == ["model.embed_tokens.weight"]
    assert hf_names("transformer.ln_f.scale") == ["model.norm.weight"]
    assert hf_names("lm_head.weight") == ["lm_head.weight"]
    assert hf_names("transformer.h.11.attn.c_attn.bias") == [f"model.layers.11.self_attn.{x}_proj.bias" for x in "qkv"]
    assert hf_names("transformer.h.0.rms_2.scale") == ["model.layers.0.post_attention_layernorm.weight"]


# fields of the published config.json files
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": dict(
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
        tie_word_embeddings=False, vocab_size=32000,
    ),
    "Llama-3.2-1B": dict(
        attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=True, vocab_size=128256,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                          original_max_position_embeddings=8192, rope_type="llama3"),
    ),
    "SmolLM2-135M": dict(
        hidden_act="silu", hidden_size=576, intermediate_size=1536, max_position_embeddings=8192,
        num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-05, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_equal_the_named_ones(name):
    config = convert_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **PUBLISHED[name]})
    assert config == LLaMAConfig.from_name(name)


def test_converted_stories260k_generates_the_known_story(shared, tmp_path, monkeypatch):
    convert(shared / "models/stories260K-hf", tmp_path / "out", monkeypatch)
    model, tokenizer = load_model(tmp_path / "out"), Tokenizer(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == 260_032
    story = answer(model, tokenizer, ["Once upon a time"], Sampling(max_new_tokens=60))[0]
    # what llama2.c prints for this model at temperature 0
    assert story.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )
