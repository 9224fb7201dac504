"""The output of scripts/inspect_aligner.py."""

import re
from pathlib import Path

import pytest
import torch
import toys

from lit_llama.checkpoint import read_adapter, save_adapter
from lit_llama.methods import METHODS

SCRIPT = "scripts/inspect_aligner.py"
GATES = {2: [0.5, -0.5], 3: [0.25, 0.0]}  # by layer, one per head


def write(path: Path, prefix: torch.Tensor, gates: dict[int, list[float]], **meta: object) -> Path:
    state = {f"transformer.h.{i}.attn.gating_factor": torch.tensor(g).view(1, -1, 1, 1) for i, g in gates.items()}
    state["global_value_embedding.weight"] = prefix
    config = {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(gates)}
    save_adapter(path, state, {"method": "aligner", "config": config, **meta})
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    meta = {"prompt_style": "orca", "training": {"val_loss": 1.5, "step": 20}}
    return write(tmp_path / "one.safetensors", torch.tensor([[1.0, 3.0, 5.0]]), GATES, **meta)


def test_one_adapter(one, run_script):
    code, out, err = run_script(SCRIPT, one)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == str(one)
    assert lines[1] == "  N = 1, layers 2 to 3, 3 wide, 2 heads: 7 parameters, float32"
    assert lines[2:5] == ["  prompt style: orca", "  step: 20", "  validation loss: 1.5"]
    assert lines[5] == "  prefix: mean +3.0000, std 2.0000"
    # mean |gate| is 0.5 and 0.125: one full bar, and a quarter of that, rounded
    assert lines[7].split() == ["2", "+0.000000", "0.500000", "█" * 30]
    assert lines[8].split() == ["3", "+0.125000", "0.125000", "█" * 8]
    assert len(lines) == 9


def test_differences(one, run_script, tmp_path):
    # prefix: cosine (1, 3, 5)·(1, 3, -5) / 35 = -15 / 35; gates: only layer 3 is common, and both have (0.25, 0)
    other = write(tmp_path / "other.safetensors", torch.tensor([[1.0, 3.0, -5.0]]), {3: [0.25, 0.0], 4: [1.0, 1.0]})
    longer = write(tmp_path / "longer.safetensors", torch.ones(2, 3), {2: [-0.5, 0.5], 3: [0.25, 0.0]})
    code, out, _ = run_script(SCRIPT, one, other, longer)
    parts = out.split("\n\n")
    assert code == 0 and len(parts) == 6
    assert [part.splitlines()[2:] for part in parts[3:]] == [
        [
            "  prefix: 2 of 3 values equal (66.7%), cosine -0.428571",
            "  gates: 2 of 2 values equal (100.0%), cosine 1.000000",
        ],
        # cosine (0.5, -0.5, 0.25, 0)·(-0.5, 0.5, 0.25, 0) / 0.5625 = -0.4375 / 0.5625
        ["  prefix: 1 × 3 and 2 × 3, not comparable", "  gates: 2 of 4 values equal (50.0%), cosine -0.777778"],
        ["  prefix: 1 × 3 and 2 × 3, not comparable", "  gates: 2 of 2 values equal (100.0%), cosine 1.000000"],
    ]


def test_no_common_layer(one, run_script, tmp_path):
    other = write(tmp_path / "other.safetensors", torch.ones(1, 3), {7: [1.0, 1.0]})
    assert "gates: 0 and 0 in 0 common layers, not comparable" in run_script(SCRIPT, one, other)[1]


@pytest.mark.parametrize("suffix, head", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_figure(one, run_script, tmp_path, suffix, head):
    one, figure = (
        one.rename(tmp_path / "a$^$b.safetensors"),
        tmp_path / f"gates{suffix}",
    )  # not a formula
    assert run_script(SCRIPT, one, one, "--plot", figure)[0] == 0
    assert figure.read_bytes().startswith(head)


def test_closed_gates_have_no_bar(run_script, tmp_path):
    path = write(tmp_path / "new.safetensors", torch.ones(1, 2), {0: [0.0], 1: [0.0]})
    code, out, _ = run_script(SCRIPT, path)
    assert code == 0 and "█" not in out


def test_the_columns_of_another_method_are_aligned(run_script, tmp_path):
    """A layer without one of the tensors has a dash in its column."""
    network = METHODS["adapter_v2"](METHODS["adapter_v2"].config_class(**toys.SIZES))
    toys.randomize(network)
    state = {name: p.detach() for name, p in network.adapter_parameters().items()}
    config = {"adapter_prompt_length": network.config.adapter_prompt_length,
              "adapter_start_layer": network.config.adapter_start_layer}  # fmt: skip
    save_adapter(tmp_path / "v2.safetensors", state, {"method": "adapter_v2", "config": config})
    code, out, _ = run_script(SCRIPT, tmp_path / "v2.safetensors")
    heading, *lines = out[out.index("  layer  ") :].splitlines()
    kinds = heading.split(" of ")[1].split(", ")
    assert code == 0 and len(lines) == network.config.n_layer
    for line in lines:
        layer, *cells = line.split()
        assert len(cells) == len(kinds)
        for kind, cell in zip(kinds, cells, strict=True):
            names = (f"transformer.h.{layer}.attn.{kind}", f"transformer.h.{layer}.{kind}", *[kind] * (layer == "0"))
            tensor = next((state[name] for name in names if name in state), None)
            assert cell == ("-" if tensor is None else f"{tensor.float().square().mean().sqrt():.6f}")


def test_not_an_adapter(refused, run_script, tmp_path, base_dir, one):
    (tmp_path / "notes.pth").write_text("Dear diary,")
    assert "notes.pth is not a checkpoint: it is text, beginning 'Dear diary,'" in refused(
        SCRIPT, tmp_path / "notes.pth"
    )
    assert "is not an adapter" in refused(SCRIPT, base_dir / "lit_model.safetensors")
    assert "There is no adapter in the folder" in refused(SCRIPT, base_dir)
    assert "There is no adapter at" in refused(SCRIPT, one, tmp_path / "nothing.pth")
    torch.save({"global_value_embedding.weight": torch.ones(1, 2), "transformer.h.2.attn.gating_factor": torch.ones(1),
                "transformer.h.2.attn.adapter_wte.weight": torch.zeros(1, 2)}, tmp_path / "other.pth")  # fmt: skip
    assert "these are a LLaMA-Adapter's weights" in refused(SCRIPT, tmp_path / "other.pth")
    code, _, err = run_script(SCRIPT)
    assert code == 2 and "files" in err


def test_conversion(one, run_script, refused, tmp_path):
    out = tmp_path / "out" / "a.safetensors"
    state = {name: t.bfloat16() for name, t in read_adapter(one).state.items()}
    prefix = state["global_value_embedding.weight"]
    aliases = {f"transformer.h.{i}.attn.adapter_wte.weight": prefix for i in GATES}
    torch.save({**state, **aliases}, tmp_path / "published.pth")
    assert run_script(SCRIPT, tmp_path / "published.pth", "--to_safetensors", out, "--prompt_style", "beaver")[0] == 0
    adapter = read_adapter(out)
    assert adapter.meta == {
        "method": "aligner",
        "config": {"adapter_prompt_length": 1, "adapter_start_layer": 2},
        "converted_from": "published.pth",
        "prompt_style": "beaver",
    }
    assert adapter.state.keys() == state.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t, state[n].float()) for n, t in adapter.state.items())
    assert "converted from: published.pth" in run_script(SCRIPT, out)[1]

    code, _, err = run_script(SCRIPT, one, out, "--to_safetensors", tmp_path / "b.safetensors")
    assert code == 1 and "writes one adapter, but 2 were given" in err
    for flags, message in (
        (("--to_safetensors", tmp_path / "b.pth"), "b.pth must end in .safetensors"),
        (("--to_safetensors", tmp_path / "b.safetensors", "--prompt_style", "x"), "There is no prompt style 'x'"),
        (("--prompt_style", "orca"), "--prompt_style needs --to_safetensors"),
        (("--plot", tmp_path / "b.txt"), "b.txt is not a .png, .svg or .pdf"),
    ):
        code, _, err = run_script(SCRIPT, one, "--plot", tmp_path / "b.png", *flags)
        assert code == 1 and message in err and not list(tmp_path.glob("b.*"))


def test_published_files(shared, run_script, refused):
    folder = shared / "aligner_weights_published/PKU-Beaver-DPO-Value-Alignment"
    (reference,), (dpo,) = folder.glob("Beaver*/*.pth"), folder.glob("*.pth")
    _, out, _ = run_script(SCRIPT, reference, dpo)
    assert out.count("N = 1, layers 2 to 31, 4096 wide, 32 heads: 5,056 parameters, bfloat16") == 2
    # training changed 6 of 4,096 and 275 of 960 values
    assert re.search(r"prefix: 4,090 of 4,096 values equal .*\n  gates: 685 of 960 values equal \(71.4%\)", out)
    (broken,) = folder.parent.glob("Alpaca*/aligner10Tokens-llama2-7B-*.pth")
    assert "is not a checkpoint: it is JSON text" in refused(SCRIPT, broken)
