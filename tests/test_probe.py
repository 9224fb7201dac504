"""The form-knowledge probe: shares and intervals of hand-made cases, and a complete run on a tiny model."""

import json
import math

import numpy as np
import pytest
import torch

from lit_llama.checkpoint import load_model
from lit_llama.data import SFTData
from scripts.count_parameters import Variant
from studies.probe import Settings, Share, plot, probe, recovered, report, row_scores, split_training_rows

SCRIPT = "studies/probe.py"
VARIANTS = {
    "aligner1": Variant("one", "aligner"),
    "many": Variant("many", "aligner"),
    "lora": Variant("LoRA", "lora"),
}


def test_share_of_the_gain():
    base, tokens = np.array([4.0, 2.0]), np.array([2, 1])
    # gains: 1 + 1 = 2 in one run and 0 + 1 = 1 in the other, mean 1.5; with LoRA 2 + 1 = 3
    other, lora = np.array([[3.0, 1.0], [4.0, 1.0]]), np.array([[2.0, 1.0]])
    share = recovered(base, other, lora, tokens, resamples=500)
    assert share.value == pytest.approx(0.5)
    assert share.low < 0.5 < share.high
    assert recovered(base, lora, lora, tokens, resamples=500) == Share(1.0, 1.0, 1.0)
    # all rows gain equally in a single run: no uncertainty
    assert recovered(base, base[None] - tokens / 4, base[None] - tokens, tokens, resamples=9) == Share(0.25, 0.25, 0.25)


def test_there_is_no_interval_if_lora_may_gain_nothing():
    base, tokens = np.array([4.0, 2.0, 3.0]), np.ones(3)
    share = recovered(base, base[None] - 0.5, np.array([[3.0, 3.5, 2.0]]), tokens, resamples=500)
    assert share.value == pytest.approx(1.5 / 0.5) and math.isnan(share.low) and math.isnan(share.high)
    assert str(share) == "300% (no interval)"
    assert str(recovered(base, base[None] - 0.5, base[None], tokens, resamples=50)) == "LoRA gains nothing"


def test_there_is_no_interval_if_one_of_several_runs_is_left():
    base, tokens = np.array([4.0, 2.0, 3.0]), np.ones(3)
    several, one = base - np.array([[0.5], [0.55], [0.6]]), base[None] - 1
    for other, lora in ((several, one), (one, several), (one, one)):
        assert not math.isnan(recovered(base, other, lora, tokens, resamples=500).low)
        share = recovered(base, other, lora, tokens, resamples=500, planned=3)
        assert share.value > 0 and math.isnan(share.low) and math.isnan(share.high)
    assert not math.isnan(recovered(base, several, several * 0.9, tokens, resamples=500, planned=3).low)


def test_more_rows_and_closer_runs_narrow_the_interval():
    def width(n: int, spread: float) -> float:
        base, noise = np.full(n, 5.0), np.random.default_rng(1).normal(0, 0.5, n)
        seeds = np.array([[-spread], [0.0], [spread]])
        share = recovered(base, base - 0.5 - noise / 2 + seeds, base - 1 - noise + seeds, np.ones(n), resamples=2000)
        return share.high - share.low

    assert width(100, 0.0) < 1e-9  # half of LoRA's gain in every row
    assert width(100, 0.01) < width(100, 0.05)

    def width_over_rows(n: int) -> float:
        rng = np.random.default_rng(2)
        base, gain = np.full(n, 5.0), rng.normal(1, 0.5, n)
        share = recovered(base, base[None] - rng.normal(0.5, 0.5, n), base[None] - gain, np.ones(n), resamples=2000)
        return share.high - share.low

    assert width_over_rows(400) < 0.7 * width_over_rows(50)


@pytest.mark.parametrize("trainings", [1, 3])
def test_the_interval_covers_the_truth(trainings):
    """Rows and runs are random; about 95% of the intervals contain the share of the expected gains, 0.6."""
    rng, n, repeats = np.random.default_rng(0), 60, 300
    spread = 0.05 if trainings > 1 else 0.0  # of a run's gain; a single run gives no estimate of it
    covered = 0
    for repeat in range(repeats):
        tokens = rng.integers(5, 15, n)
        base = 3 * tokens + rng.normal(0, 5, n)
        level = rng.normal(1, 0.4, n)  # how much can be gained in each row
        losses = [
            base - tokens * (mean * level + rng.normal(0, 0.1, n) + rng.normal(0, spread, (trainings, 1)))
            for mean in (0.6, 1.0)
        ]
        share = recovered(base, *losses, tokens, resamples=400, seed=repeat)
        covered += share.low <= 0.6 <= share.high
    assert 0.91 <= covered / repeats <= 0.99


def test_row_scores_match_the_logits(base_dir, data_dir):
    model, data = load_model(base_dir), SFTData(data_dir, "train", max_rows=7)
    scores = row_scores(model, data, batch_size=3)
    for i, (ids, prompt_length) in enumerate(zip(data.rows["input_ids"], data.rows["prompt_length"], strict=True)):
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            logps = model(ids[None])[0].log_softmax(-1)
        labels = range(prompt_length, len(ids))
        assert scores["loss"][i] == pytest.approx(-sum(logps[t - 1, ids[t]].item() for t in labels), rel=1e-4)
        assert scores["wrong"][i] == sum(logps[t - 1].argmax() != ids[t] for t in labels)


def test_row_scores_do_not_use_dropout(base_dir, data_dir):
    torch.manual_seed(0)
    model, data = load_model(base_dir, method="lora", method_config={"lora_dropout": 0.5}), SFTData(data_dir, "test")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    first, again = row_scores(model, data), row_scores(model, data)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_training_rows_are_split_by_prompt(data_dir, tmp_path):
    split_training_rows(data_dir, 0.3, tmp_path / "parts")
    full = SFTData(data_dir, "train")
    train, test = (SFTData(tmp_path / "parts", split) for split in ("train", "test"))
    rows = [sorted(ids.tobytes() for ids in data.rows["input_ids"]) for data in (full, train, test)]
    assert rows[0] == sorted(rows[1] + rows[2]) and 5 <= len(test) <= 25
    prompts = [{ids[:n].tobytes() for ids, n in zip(d.rows["input_ids"], d.rows["prompt_length"], strict=True)}
               for d in (train, test)]  # fmt: skip
    assert not prompts[0] & prompts[1]
    assert test.meta["prompt_style"] == "plain" and test.meta["counts"]["test"] == len(test)


def test_table_and_figure(tmp_path):
    def result(one: float, edges: list[str]) -> dict:
        mean = {"base": 2.0, "aligner1": 0.5, "many": 0.25, "lora": 0.125}
        shares = {"aligner1": Share(one, one - 0.1, one + 0.1), "many": Share(-0.001, math.nan, math.nan)}
        measure = {"mean": mean, "shares": shares}
        return {"loss": measure, "wrong": measure, "edges": edges, "failed": [], "rows": 9}

    results = {"facts": result(0.1, []), "form": result(0.9, ["lora"])}
    lines = report(results, VARIANTS).splitlines()
    assert lines[4] == "| form | 9 | 2.0000 | 0.5000 | 0.2500 | 0.1250* | 90% (80% to 100%) | 0% (no interval) |"
    assert lines[5].startswith("| facts | 9 | 2.0000 | 0.5000 | 0.2500 | 0.1250 | 10% (0% to 20%) |")
    assert lines[11].startswith("| form | 9 | 200.0% | 50.0% | 25.0% | 12.5%* |")
    assert "lowest or the highest" in lines[-1]
    assert "*" not in report({"facts": results["facts"]}, VARIANTS)
    plot(results, VARIANTS, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_failed_runs_are_listed_and_counted(base_dir, data_dir):
    settings = Settings(checkpoint_dir=base_dir, data_dir=(data_dir,), resamples=50)
    base = row_scores(load_model(base_dir), SFTData(data_dir, "test"))

    def record(method: str, seed: int, gain: float | None) -> dict:
        trial = {"name": f"animals-{method}-lr0.1-seed{seed}", "settings": {"learning_rate": 0.1}}
        if gain is None:
            return {"trial": trial, "error": "UserError: NaN"}
        return {"trial": trial, "scores": {name: (scores - gain).tolist() for name, scores in base.items()}}

    gains = {"aligner1": (0.4, 0.5, 0.6), "many": (0.7, None, None), "lora": (1.0, None, 1.1)}
    cells = {}
    for method, by_seed in gains.items():
        trained = [record(method, seed, gain) for seed, gain in enumerate(by_seed, 1)]
        cells[method] = trained[0], ([record(method, 0, 0.1)], trained)
    result = probe(settings, data_dir, cells)
    assert result["seeds"] == {"aligner1": 3, "many": 1, "lora": 2}
    names = ("many-lr0.1-seed2", "many-lr0.1-seed3", "lora-lr0.1-seed2")
    assert result["failed"] == [f"animals-{name}: UserError: NaN" for name in names]
    shares = result["loss"]["shares"]
    assert math.isnan(shares["many"].low) and not math.isnan(shares["aligner1"].low)
    text = report({"animals": result}, VARIANTS)
    assert text.endswith("\n\n".join(f"Failed: {failure}" for failure in result["failed"]))


def test_a_complete_probe(run_script, tmp_path, base_dir, data_dir):
    flags = ["--data_dir", data_dir, "--checkpoint_dir", base_dir, "--out_dir", tmp_path, "--jobs", 1, "--many", 5,
             "--steps", 3, "--learning_rates", 1e-6, 3e-2, "--seeds", 1, 2, "--resamples", 50]  # fmt: skip
    code, out, _ = run_script(SCRIPT, *flags)
    assert code == 0
    assert out.splitlines()[4].startswith("| animals | 5 | ")
    results = json.loads((tmp_path / "probe.json").read_text())["results"]["animals"]
    records = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")}
    assert len(records) == 3 * (2 + 2)
    assert results["seeds"] == {"aligner1": 2, "many": 2, "lora": 2} and results["failed"] == []
    test = SFTData(data_dir, "test")
    tokens, base = test.weights.sum(), row_scores(load_model(base_dir), test)
    for measure in ("loss", "wrong"):
        means = results[measure]["mean"]
        assert means["base"] == pytest.approx(base[measure].sum() / tokens)
        for method in ("aligner1", "many", "lora"):
            runs = [records[f"animals-{method}-lr{results['rates'][method]:g}-seed{seed}"] for seed in (1, 2)]
            assert {record["summary"]["steps"] for record in runs} == {3}
            mean = np.mean([sum(record["scores"][measure]) for record in runs]) / tokens
            assert means[method] == pytest.approx(mean)
    gains = {method: results["loss"]["mean"]["base"] - loss for method, loss in results["loss"]["mean"].items()}
    assert results["loss"]["shares"]["many"]["value"] == pytest.approx(gains["many"] / gains["lora"])
    for method in ("aligner1", "many", "lora"):
        names = {rate: f"animals-{method}-choosing-lr{rate:g}-seed0" for rate in (1e-6, 3e-2)}
        losses = {rate: sum(records[name]["scores"]["loss"]) for rate, name in names.items()}
        assert results["rates"][method] == min(losses, key=losses.get)
    assert records["animals-many-choosing-lr0.03-seed0"]["summary"]["trainable_parameters"] == 5 * 32 + 4

    # again: nothing is retrained
    modified = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/record.json")}
    assert run_script(SCRIPT, *flags)[1] == out
    assert modified == {path: path.stat().st_mtime_ns for path in modified}


def test_invalid_input_is_refused(refused, tmp_path, data_dir, base_dir):
    flags = ("--checkpoint_dir", base_dir, "--out_dir", tmp_path / "out")
    assert "the same name: animals, animals" in refused(SCRIPT, "--data_dir", data_dir, data_dir, *flags)
    assert "seeds must differ" in refused(SCRIPT, "--data_dir", data_dir, "--seeds", 0, 1, *flags)
    assert "valid_fraction is 1.0; it must be" in refused(SCRIPT, "--data_dir", data_dir, "--valid_fraction", 1, *flags)
    assert "There is no prepared dataset at" in refused(SCRIPT, "--data_dir", tmp_path / "none", *flags)
    assert not (tmp_path / "out").exists()
