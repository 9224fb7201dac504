"""Conversion of Meta's checkpoints, compared with LLaMA as Meta computes it from the original tensors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

from lit_llama.checkpoint import load_model

SCRIPT = "scripts/convert_checkpoint.py"
PARAMS: dict[str, Any] = dict(dim=32, n_layers=2, n_heads=8, norm_eps=1e-5, vocab_size=-1, multiple_of=16)
HIDDEN, VOCABULARY = 48, 304
IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
# tensors that Meta's checkpoints shard along dimension 0 and along dimension 1
COLUMNS, ROWS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


def random_tensors(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    width = params["dim"]
    kv = width // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes = {"tok_embeddings": (VOCABULARY, width), "output": (VOCABULARY, width), "norm": (width,)}
    for i in range(params["n_layers"]):
        for part, shape in {
            "attention.wq": (width, width), "attention.wk": (kv, width), "attention.wv": (kv, width),
            "attention.wo": (width, width), "feed_forward.w1": (HIDDEN, width), "feed_forward.w2": (width, HIDDEN),
            "feed_forward.w3": (HIDDEN, width), "attention_norm": (width,), "ffn_norm": (width,),
        }.items():  # fmt: skip
            shapes[f"layers.{i}.{part}"] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {f"{name}.weight": t * (0.3 if t.dim() == 2 else 1.0) for name, t in tensors.items()}


def meta_logits(t: dict[str, torch.Tensor], params: dict[str, Any], idx: torch.Tensor) -> torch.Tensor:
    """Return the logits as Meta computes them: dimensions 2i and 2i + 1 of a head are one complex number, which is
    rotated by the position.
    """
    nh, T = params["n_heads"], idx.size(1)
    ng, hs = params.get("n_kv_heads", nh), params["dim"] // nh
    frequencies = []
    for i in range(hs // 2):
        frequency = params.get("rope_theta", 10000.0) ** (-2 * i / hs)
        if params.get("use_scaled_rope"):
            wavelength, factor = 2 * math.pi / frequency, params["factor"]
            if wavelength > 8192 / 1:
                frequency /= factor
            elif wavelength > 8192 / 4:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    phases = torch.polar(torch.ones(()), torch.outer(torch.arange(T), torch.tensor(frequencies)))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * t[f"{name}.weight"]

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return (x @ t[f"{name}.weight"].T).view(*idx.shape, count, hs).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * phases).flatten(
            3
        )

    x = t["tok_embeddings.weight"][idx]
    for i in range(params["n_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.attention_norm")
        q = rotate(heads(h, f"{layer}.attention.wq", nh))
        k, v = rotate(heads(h, f"{layer}.attention.wk", ng)), heads(h, f"{layer}.attention.wv", ng)
        k, v = (torch.stack([z[:, n * ng // nh] for n in range(nh)], dim=1) for z in (k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(hs)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ t[f"{layer}.attention.wo.weight"].T
        h = norm(x, f"{layer}.ffn_norm")
        gate = h @ t[f"{layer}.feed_forward.w1.weight"].T
        h = gate * gate.sigmoid() * (h @ t[f"{layer}.feed_forward.w3.weight"].T)
        x = x + h @ t[f"{layer}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ t["output.weight"].T


def write_checkpoint(
    folder: Path, tokenizer_path: Path, params: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1,
    by_vocabulary: bool = False,
) -> Path:  # fmt: skip
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    for n in range(shards):
        part = {"rope.freqs": torch.zeros(2)}
        for name, tensor in tensors.items():
            kind = name.split(".")[-2]
            dim = 0 if kind in COLUMNS else 1 if kind in ROWS else None
            if kind == "tok_embeddings":
                dim = 0 if by_vocabulary else 1
            part[name] = tensor if dim is None else tensor.chunk(shards, dim)[n].clone()
        torch.save(part, folder / f"consolidated.{n:02}.pth")
    return folder


CASES: dict[str, dict[str, Any]] = {
    "LLaMA 1": dict(),
    "Llama 2, GQA": dict(n_kv_heads=4, rope_theta=10000.0),
    "Llama 3": dict(n_kv_heads=4, rope_theta=500000.0),
    "Llama 3.1": dict(n_kv_heads=4, rope_theta=500000.0, use_scaled_rope=True, factor=8.0),
    "Llama 3.2, tied": dict(n_kv_heads=4, rope_theta=500000.0, use_scaled_rope=True, factor=32.0),
}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_original_checkpoint(case, shards, tmp_path, tokenizer_path, run_script):
    params = {**PARAMS, **CASES[case]}
    tensors = random_tensors(params)
    if "tied" in case:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    source = write_checkpoint(tmp_path / "meta", tokenizer_path, params, tensors, shards, by_vocabulary="3" in case)
    out = tmp_path / "out"
    code, stdout, err = run_script(SCRIPT, "--checkpoint_dir", source, "--output_dir", out, "--block_size", 64)
    assert (code, stdout) == (0, f"{out}\n")
    model = load_model(out)
    assert model.config.tie_embeddings == ("tied" in case) and model.config.block_size == 64
    if "factor" in params:
        assert model.config.rope_scaling["factor"] == params["factor"] and f"factor {params['factor']:g}" in err
    expected = meta_logits(tensors, params, IDS)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


def test_dtype_and_a_tokenizer_from_another_folder(tmp_path, tokenizer_path, run_script):
    tensors = {name: t.bfloat16() for name, t in random_tensors(PARAMS).items()}
    source = write_checkpoint(tmp_path / "meta", tokenizer_path, PARAMS, tensors, 2)
    (source / "tokenizer.model").unlink()
    flags = ("--checkpoint_dir", source, "--tokenizer_dir", tokenizer_path.parent, "--output_dir", tmp_path / "out")
    for dtype_flags, dtype in (((), torch.bfloat16), (("--dtype", "float32"), torch.float32)):
        assert run_script(SCRIPT, *flags, *dtype_flags)[0] == 0
        state = load_file(tmp_path / "out/lit_model.safetensors")
        assert {t.dtype for t in state.values()} == {dtype}
        assert torch.equal(
            state["transformer.h.1.mlp.c_fc2.weight"], tensors["layers.1.feed_forward.w3.weight"].to(dtype)
        )
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_path.read_bytes()


@pytest.mark.parametrize("case, length", [("LLaMA 1", 4096), ("Llama 3", 8192), ("Llama 3.1", 131072)])
def test_the_default_of_the_longest_sequence_follows_from_the_positions(
    case, length, tmp_path, tokenizer_path, run_script
):
    params = {**PARAMS, **CASES[case]}
    source = write_checkpoint(tmp_path / "meta", tokenizer_path, params, random_tensors(params), by_vocabulary=True)
    code, _, err = run_script(SCRIPT, "--checkpoint_dir", source, "--output_dir", tmp_path / "out")
    assert code == 0 and f"longest sequence: {length:,} tokens;" in err
    assert json.loads((tmp_path / "out/lit_config.json").read_text())["block_size"] == length


def test_by_default_the_output_has_the_name_of_the_input(tmp_path, tokenizer_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "tiny", tokenizer_path, PARAMS, random_tensors(PARAMS), 1)
    assert run_script(SCRIPT, "--checkpoint_dir", "tiny")[:2] == (0, "checkpoints/tiny\n")


def delete(name: str):
    return lambda folder: (folder / name).unlink()


def change_json(name: str, **values: Any):
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in {**content, **values}.items() if v is not None}))

    return edit


def change_shard(edit: Any, name: str = "consolidated.01.pth"):
    def damage(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=True)
        edit(state)
        torch.save(state, folder / name)

    return damage


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-200])


BAD: dict[str, Any] = {
    "There is no file at": delete("params.json"),
    "params.json has no n_layers": change_json("params.json", n_layers=None),
    'params.json: n_layers is "3"; expected a whole number from 1': change_json("params.json", n_layers="3"),
    "needs its tokenizer.model or tokenizer.json": delete("tokenizer.model"),
    "found: consolidated.01.pth": delete("consolidated.00.pth"),
    "The shards do not fit together: tok_embeddings.weight is ()": change_shard(
        lambda state: state.update({"tok_embeddings.weight": torch.tensor(1.0)}), "consolidated.00.pth"
    ),
    "found: none": lambda folder: [path.unlink() for path in folder.glob("*.pth")],
    "consolidated.01.pth is not a checkpoint: it is damaged or cut short": truncate,
    "is not a checkpoint: it would run code when loaded": lambda folder: torch.save(
        {"norm.weight": toys.RunsCode()}, folder / "consolidated.01.pth"
    ),
    # a wrong n_heads changes only the head size, which is noticed only if n_kv_heads is set
    "layers.0.attention.wk.weight is (16, 32), not (32, 32)": change_json("params.json", n_heads=4),
    "layers.0.attention.wq.weight is (16, 32), not (32, 32)": delete("consolidated.01.pth"),
    "layers.2.attention_norm.weight is missing": change_json("params.json", n_layers=3),
    "only one of them has norm.weight": change_shard(lambda state: state.pop("norm.weight")),
    "The shards do not fit together: layers.1.attention.wo.weight is (32, 16) and (30, 16)": change_shard(
        lambda state: state.update({"layers.1.attention.wo.weight": torch.ones(30, 16)})
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_folders_are_refused(sentence, tmp_path, tokenizer_path, refused):
    params = {**PARAMS, "n_kv_heads": 4}
    source = write_checkpoint(tmp_path / "meta", tokenizer_path, params, random_tensors(params), 2)
    BAD[sentence](source)
    assert sentence in refused(SCRIPT, "--checkpoint_dir", source, "--output_dir", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"meta"}
