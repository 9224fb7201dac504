"""studies/analysis.py, on cases computed by hand and on the authors' published adapters."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import aligned, token_ids

from lit_llama import aligner
from lit_llama.checkpoint import AdapterFile, load_model, save_adapter
from lit_llama.utils import UserError
from scripts.inspect_aligner import PREFIX, open_adapter
from studies.analysis import (
    cuda_normal,
    equal_by_size,
    initial_prefix,
    labels_of,
    layer_effects,
    lens,
    philox,
    plot_prefixes,
    prefix_tables,
    token_shifts,
    tsne,
)

SCRIPT = "studies/analysis.py"

# == the initial prefix ==


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers for philox4x32 with 10 rounds from Random123, the reference implementation
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox(np.array(counter, np.uint64).reshape(4, 1), tuple(key)).flatten().tolist() == words


def test_normals_of_one_thread():
    # the first four words of seed 0 are the first known answer above
    a, b, c, d = ((word + 0.5) / 2**32 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
    expected = [
        math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * v)
        for u, v in ((a, b), (c, d))
        for turn in (math.sin, math.cos)
    ]
    np.testing.assert_allclose(cuda_normal(4, 0, threads=1), expected, rtol=2e-6, atol=1e-6)


def test_numbers_of_several_threads_are_interleaved():
    one, two = cuda_normal(12, 1337, threads=1), cuda_normal(12, 1337, threads=2)
    assert np.array_equal(two[0::2], one[:6])
    assert not set(two[1::2]) & set(one)
    many = cuda_normal(20_000, 1337, threads=1000)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03 and len(set(many)) > 19_900


def test_the_initial_prefix_is_the_one_that_training_draws(base_dir):
    config = {"adapter_prompt_length": 3, "adapter_start_layer": 1}
    torch.manual_seed(5)
    fresh = load_model(base_dir, method="aligner", method_config=config).global_value_embedding.weight
    settings = {"seed": 5, "init_adapter": None}
    adapter = AdapterFile({PREFIX: torch.zeros(3, 32)}, {"training": {"settings": settings}})
    before = torch.get_rng_state()
    assert torch.equal(initial_prefix(adapter), fresh)
    assert torch.equal(torch.get_rng_state(), before)
    settings["init_adapter"] = "other.safetensors"
    assert initial_prefix(adapter) is None
    adapter.meta["training"] = {"step": 3}
    assert initial_prefix(adapter) is None


@pytest.mark.parametrize(("settings", "sentence"), [
    ([], "training: settings is a list; expected an object"),
    ({"seed": "x"}, 'training.settings: seed is "x"; expected a whole number'),
])  # fmt: skip
def test_a_header_without_usable_settings_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        initial_prefix(AdapterFile({PREFIX: torch.zeros(3, 32)}, {"training": {"settings": settings}}))


def published(shared) -> list[AdapterFile]:
    paths = sorted((shared / "aligner_weights_published").rglob("*.pth"))
    return [open_adapter(path) for path in paths if "aligner10Tokens-llama2-7B" not in path.name]  # not an adapter


def test_the_authors_adapters_share_an_initial_prefix(shared):
    """59% to 83% of their values never changed, mostly large ones, for which bf16 is too coarse."""
    shares = []
    for adapter in published(shared):
        prefix, start = adapter.state[PREFIX].float(), initial_prefix(adapter)
        shares.append((prefix == start).float().mean().item())
        *small, (_, _, n, equal), (_, _, m, equal_above_2) = equal_by_size(prefix, start)
        assert (equal + equal_above_2) / (n + m) > 0.998
        assert small[0][3] / small[0][2] < 0.2
    assert len(shares) == 9
    assert (round(100 * min(shares)), round(100 * max(shares))) == (59, 83)


def test_values_equal_in_two_tasks_are_those_that_training_did_not_change(shared):
    alpaca, metamath = (a for a in published(shared) if a.state[PREFIX].shape == (1, 4096) and "lr0.009" in a.path.name)
    a, b = (adapter.state[PREFIX].float() for adapter in (alpaca, metamath))
    start = initial_prefix(alpaca)
    equal = a == b
    assert (equal & (a == start)).sum() / equal.sum() > 0.98


# == tables ==


def test_adapters_of_the_same_name_are_told_apart_by_their_folders():
    paths = ["Alpaca/one-lr0.009bs64.pth", "MetaMath/One-epoch-3.pth", "MetaMath/two.pth", "a/run/last.safetensors",
             "b/run/best.safetensors", "b/run/last.safetensors"]  # fmt: skip
    labels = labels_of([AdapterFile({}, {}, Path(path)) for path in paths])
    assert labels == ["Alpaca/one", "MetaMath/One", "two", "a/run", "5: b/run", "6: b/run"]


def test_equality_by_size():
    start = torch.tensor([[0.1, -0.2, 0.3, 0.9, -1.0, 1.9, -4.0, 2.0]])
    prefix = torch.tensor([[0.1, -0.3, 0.4, 0.9, -1.0, 1.0, -4.0, 2.0]])
    inf = float("inf")
    assert equal_by_size(prefix, start) == [
        (0.0, 0.25, 2, 1), (0.25, 0.5, 1, 0), (0.5, 1.0, 1, 1), (1.0, 2.0, 2, 1), (2.0, inf, 2, 2)
    ]  # fmt: skip


def test_tables_of_prefixes():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, -4.0], [9.0, 9.0]])
    start = torch.tensor([[3.0, 0.0]])
    with_start, sizes, pairs = prefix_tables(["a", "b"], [a, b], [start, start.repeat(2, 1)], near=4.0)
    # a: one of two values equal, both within 4, lower median of the distances 0 and 4, cosine 9 / (5 · 3)
    assert "| a | 2 | 50.0% | 100.0% | 0.0000 | 0.6000 |" in with_start
    # b: 3 equal, distances 0, 4, 6, 9; (9 + 27) / (√187 · √18)
    assert "| b | 4 | 25.0% | 50.0% | 4.0000 | 0.6205 |" in with_start
    assert "| a | 100.0% |  |  |  | 0.0% |" not in sizes and "| a | 0.0% |  |  |  | 100.0% |" in sizes
    # the first tokens: cosine (9 − 16) / 25, displacements from the start (0, 4) and (0, −4)
    assert "| a and b | 2 | 50.0% | 50.0% | 0.0000 | -0.2800 | -1.0000 |" in pairs
    assert len(prefix_tables(["a", "b"], [a, torch.ones(1, 3)], [None, None], near=1.0)) == 0


def test_moves_of_untrained_prefixes_are_not_plotted(tmp_path, monkeypatch):
    """scikit-learn crashes with a segmentation fault if all points are equal."""
    sizes = []
    monkeypatch.setattr(
        "studies.analysis.tsne", lambda points, seed: sizes.append(len(points)) or points[:, :2].numpy()
    )
    prefix = torch.randn(5, 8)
    plot_prefixes(["a"], [prefix], [prefix], 0, tmp_path / "prefixes.png")
    assert sizes == [5] and (tmp_path / "prefixes.png").exists()


def test_tsne_keeps_groups_apart():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(12, 20, generator=generator), 100 + torch.randn(12, 20, generator=generator)])
    placed = tsne(points, seed=0)
    assert placed.shape == (24, 2)
    centers = placed[:12].mean(0), placed[12:].mean(0)
    spread = max(
        np.linalg.norm(placed[:12] - centers[0], axis=1).max(), np.linalg.norm(placed[12:] - centers[1], axis=1).max()
    )
    assert np.linalg.norm(centers[0] - centers[1]) > 2 * spread


# == what a layer receives ==


def attention_output(network: aligner.LLaMA, layer: int, ids: torch.Tensor, gate: float) -> torch.Tensor:
    """Return the input of c_proj in a layer, (T, nh · hs), with the layer's gates multiplied by `gate`."""
    attn, captured = network.transformer.h[layer].attn, []
    hook = attn.c_proj.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0][0]))
    original = attn.gating_factor.data.clone()
    attn.gating_factor.data.mul_(gate)
    with torch.no_grad():
        network(ids[None])
    attn.gating_factor.data.copy_(original)
    hook.remove()
    return captured[0]


@pytest.mark.parametrize("length", [1, 3])
def test_layer_effects(length):
    network = aligned(length=length, n_kv_head=2)
    texts = [token_ids(1, n, seed=n)[0] for n in (7, 12)]
    logits = network(texts[0][None])
    effects = layer_effects(network, texts)
    assert list(effects) == [1, 2]
    for layer, effect in effects.items():
        ratios = []
        for ids in texts:
            plain, full = (attention_output(network, layer, ids, gate) for gate in (0.0, 1.0))
            ratios += ((full - plain).norm(dim=1) / plain.norm(dim=1)).tolist()
        assert effect == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert torch.equal(network(texts[0][None]), logits)  # the model is unchanged
    assert all("attend" not in vars(block.attn) for block in network.transformer.h)


def test_one_token_shifts_by_a_constant():
    network, ids = aligned(length=1, n_kv_head=2), token_ids(1, 9)[0]
    shifts = token_shifts(network)
    assert list(shifts) == [1, 2]
    for layer, shift in shifts.items():
        added = attention_output(network, layer, ids, 1.0) - attention_output(network, layer, ids, 0.0)  # (T, nh · hs)
        projected = added @ network.transformer.h[layer].attn.c_proj.weight.T
        torch.testing.assert_close(projected, shift.expand(9, -1), atol=1e-5, rtol=1e-4)


def test_lens():
    network = aligned(length=1, vocab_size=32, padded_vocab_size=32)
    network.lm_head.weight.data = torch.eye(32)
    network.transformer.ln_f.scale.data = torch.ones(32)
    network.transformer.ln_f.scale.data[4] = 10  # entry 4 becomes the largest
    shift = torch.zeros(32)
    shift[[3, 4, 7, 9, 31]] = torch.tensor([2.0, 0.5, -3.0, -1.0, 40.0])
    assert lens(network, shift, top=2, vocab_size=31) == ([4, 3], [7, 9])
    assert lens(network, shift, top=1, vocab_size=32) == ([31], [7])


# == the script ==


def write(path: Path, prefix: torch.Tensor, gates: dict[int, torch.Tensor], seed: int = 3) -> Path:
    state = {f"transformer.h.{i}.attn.gating_factor": g.view(1, -1, 1, 1) for i, g in gates.items()}
    config = {"adapter_prompt_length": len(prefix), "adapter_start_layer": min(gates)}
    training = {"settings": {"seed": seed, "init_adapter": None}}
    save_adapter(path, {PREFIX: prefix, **state}, {"method": "aligner", "config": config, "training": training})
    return path


@pytest.fixture
def two(tmp_path) -> list[Path]:
    gates = {1: torch.tensor([0.5, -0.5, 0.5, -0.5]), 2: torch.tensor([1.0, 1.0, 1.0, 3.0])}
    torch.manual_seed(3)
    start = torch.randn(4, 32)
    return [write(tmp_path / "a.safetensors", start, gates), write(tmp_path / "b.safetensors", start[:1] + 1, gates)]


def test_report_without_a_base_model(two, run_script, tmp_path):
    code, out, _ = run_script(SCRIPT, *two, "--out_dir", tmp_path / "out")
    assert code == 0
    assert "| a | 128 | 100.0% | 100.0% | 0.0000 | 1.0000 |" in out
    assert "| a and b | 32 | 0.0% | 0.0% | 1.0000 |" in out
    with (tmp_path / "out/layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # means 0 and 1.5; the deviations are ±0.5, and (−0.5, −0.5, −0.5, 1.5) with √0.75
    assert [(r["adapter"], r["layer"]) for r in rows] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    numbers = [float(rows[i][name]) for i in (0, 1) for name in ("gate_mean", "gate_std")]
    assert numbers == pytest.approx([0, 0.5, 1.5, 0.75**0.5])
    assert {row["effect"] for row in rows} == {""}
    for name in ("gates", "prefixes"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "t-SNE needs four different tokens" in run_script(SCRIPT, two[1], "--out_dir", tmp_path / "out")[2]
    assert not (tmp_path / "out/prefixes.png").exists()  # it would be of other adapters than the new gates.png


def test_dollar_signs_in_names_are_drawn(two, run_script, tmp_path):
    path = two[0].rename(tmp_path / "a$^$b.safetensors")
    code, _, err = run_script(SCRIPT, path, two[1], "--out_dir", tmp_path / "out")
    assert code == 0 and (tmp_path / "out/prefixes.png").exists(), err


def test_report_with_a_base_model(two, run_script, tmp_path, base_dir, data_dir):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--rows", 3, "--top", 2, "--out_dir", tmp_path / "o")
    code, out, err = run_script(SCRIPT, *two, *flags)
    assert code == 0
    assert f"Norm of the added term over the attention output's, 3 rows of {data_dir}, by layer" in out
    assert "No lens for a: a prefix of several tokens adds no constant." in err
    layers = [line for line in out.partition("b: what the token's constant pushes")[2].splitlines() if "|" in line]
    assert [line.split(" | ")[0] for line in layers] == ["| layer", "| ---", "| 1", "| 2", "| sum"]
    with (tmp_path / "o/layers.csv").open(newline="") as file:
        assert all(float(row["effect"]) > 0 for row in csv.DictReader(file))


def test_invalid_input_is_refused(two, refused, tmp_path, data_dir):
    assert "give --checkpoint_dir too" in refused(SCRIPT, two[0], "--data_dir", data_dir)
    assert "must be 1 or more" in refused(SCRIPT, two[0], "--top", 0)
    save_adapter(tmp_path / "c.safetensors", {"x": torch.ones(1)}, {"method": "aligner", "config": {}})
    assert "has no prefix with gates" in refused(SCRIPT, tmp_path / "c.safetensors", "--out_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# == table 1 ==


def test_parameter_counts_of_every_method(run_script):
    code, out, _ = run_script("scripts/count_parameters.py", "--models", "Llama-2-7B", "Llama-2-13B")
    assert code == 0
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:4]] for line in out.splitlines() if (cells := line[1:].split("|"))
    }
    assert rows["the base itself"][:2] == ["6,738,415,616", "13,015,864,320"]
    assert rows.pop("method")[2] == "in 24 GiB beside Llama-2-7B"
    # N · C and a gate for each head of 30 (38) layers; 10 · C and gates likewise; 2 matrices of r · C and of C · r in
    # each of 32 (40) layers; C in each; 10 · C
    expected = {
        **{f"Aligner, N = {n}": (n * 4096 + 30 * 32, n * 5120 + 38 * 40) for n in (1, 10, 100, 300)},
        "LLaMA-Adapter, 10 tokens": (30 * (10 * 4096 + 32), 38 * (10 * 5120 + 40)),
        "LoRA, r = 8": (32 * 4 * 8 * 4096, 40 * 4 * 8 * 5120),
        "BitFit": (32 * 4096, 40 * 5120),
        "prompt tuning, 10 tokens": (10 * 4096, 10 * 5120),
    }
    assert expected["Aligner, N = 1"][0] == 5056 and expected["Aligner, N = 10"][0] == 41_920
    assert expected.keys() <= rows.keys()
    for method, counts in expected.items():
        # 24 GiB are 25,769,803,776 bytes, of which the base takes 13,476,831,232
        fit = 12_292_972_544 // (2 * counts[0])
        assert rows[method] == [*(f"{n:,}" for n in counts), f"{fit:,}"], method


def test_too_little_memory_and_unknown_models(run_script, refused):
    flags = ("--models", "microworld", "--beside", "Llama-2-13B")
    _, out, _ = run_script("scripts/count_parameters.py", *flags)
    assert all(line.endswith("| 0 |") for line in out.splitlines()[3:])
    assert "There is no model named 'Llama-9'" in refused("scripts/count_parameters.py", "--beside", "Llama-9")
    assert "must be above 0" in refused("scripts/count_parameters.py", "--memory_gib", 0)
    assert "must be at most 1000000" in refused("scripts/count_parameters.py", "--memory_gib", 1e300)
