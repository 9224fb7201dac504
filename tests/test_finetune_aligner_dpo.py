import json
import math
import shutil
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

import finetune.alignerDPO as script
from lit_llama import aligner, cli, reference
from lit_llama.checkpoint import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHT_NAMES,
    load_model,
    read_adapter,
    save_adapter,
    save_base,
)
from lit_llama.data import PreferenceData
from lit_llama.dpo import sequence_logps
from lit_llama.epochs import plan_fixed_epoch
from lit_llama.generation import Sampling
from lit_llama.model import LLaMAConfig
from lit_llama.run import setup
from lit_llama.run.report import read_metrics
from lit_llama.storage.manifest import MANIFEST
from lit_llama.storage.tensor_files import read_state
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

# 20 pairs with a batch size of 8 make 3 steps per epoch
SHORT = dict(max_steps=7, epochs=20, batch_size=8, micro_batch_size=4, learning_rate=0.05, warmup_epochs=0,
             adapter_start_layer=1, eval_interval=3, save_interval=3, sample_prompts=1, drift_prompts=2,
             max_new_tokens=4, accelerator="cpu", beta=0.3, sft_weight=0)  # fmt: skip
METRICS = {"loss", "reward_accuracy", "chosen_reward", "rejected_reward", "margin", "chosen_logp", "rejected_logp"}


def make_flags(out_dir: Path, **changes) -> list[str]:
    values = {"out_dir": out_dir, **SHORT, **changes}
    return [f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]


@pytest.fixture
def settings(base_dir, preference_dir, tmp_path):
    """Return a function that makes the flags of a short run on a copy of the data, so that its cache is not shared."""
    data_dir = shutil.copytree(preference_dir, tmp_path / "data/pairs")
    return partial(make_flags, checkpoint_dir=base_dir, data_dir=data_dir)


def train(flags: list[str]) -> None:
    script.main(cli.parse(script.Settings, flags))


def column(out_dir: Path, name: str) -> dict[int, float]:
    return {step: row[name] for step, row in read_metrics(out_dir / "metrics.csv").items() if name in row}


def logged(out_dir: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(out_dir / "metrics.csv")
    return {step: {k: v for k, v in row.items() if k != "tokens_per_s"} for step, row in rows.items()}


@pytest.fixture(scope="module")
def trained_adapter(base_dir, tmp_path_factory) -> Path:
    """Return the path of an adapter with open gates, as SFT produces it."""
    torch.manual_seed(3)
    state = {"global_value_embedding.weight": torch.randn(2, 32)}
    state |= {f"transformer.h.{i}.attn.gating_factor": torch.randn(1, 4, 1, 1) for i in (1, 2)}
    path = tmp_path_factory.mktemp("adapter") / "sft.safetensors"
    config = {"adapter_prompt_length": 2, "adapter_start_layer": 1}
    save_adapter(path, state, {"method": "aligner", "config": config, "prompt_style": "plain"})
    return path


# == start of training ==


@pytest.mark.parametrize(
    ("precision", "precompute", "per_row"),  # every pair of two values occurs
    [("32-true", True, 2), ("32-true", False, 1), ("bf16-true", True, 1), ("bf16-true", False, 2),
     ("bf16-mixed", True, 2), ("bf16-mixed", False, 1)],
)  # fmt: skip
def test_training_starts_at_ln_2_with_margins_of_0(
    settings, trained_adapter, tmp_path, monkeypatch, precision, precompute, per_row
):
    monkeypatch.setattr("lit_llama.packing.answers_per_row", lambda *args: per_row)
    out_dir = tmp_path / "run"
    train(settings(out_dir, init_adapter=trained_adapter, precision=precision, precompute_reference=precompute))
    rows = read_metrics(out_dir / "metrics.csv")
    for split in ("train", "val"):
        assert rows[0][f"{split}/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[0][f"{split}/margin"] == rows[0][f"{split}/chosen_reward"] == 0
        assert rows[0][f"{split}/chosen_logp"] < -5
    assert rows[7]["val/loss"] < math.log(2) - 0.01
    assert rows[7]["val/margin"] > 0
    assert rows[0]["val/kl"] == 0
    assert rows[7]["val/kl"] != 0


@pytest.mark.parametrize(
    ("changes", "loss_of"),
    [
        (dict(loss_type="ipo", beta=0.25), lambda margin: (margin / 0.25 - 2) ** 2),
        (dict(loss_type="hinge"), lambda margin: max(0.0, 1 - margin)),
        (
            dict(label_smoothing=0.2),
            lambda margin: 0.8 * math.log1p(math.exp(-margin)) + 0.2 * math.log1p(math.exp(margin)),
        ),
    ],
    ids=["ipo", "hinge", "label smoothing"],
)
def test_the_settings_of_the_loss_are_used(settings, tmp_path, changes, loss_of):
    """With one pair per step, the loss follows from the margin, which is 0 in the first step."""
    train(settings(tmp_path / "run", batch_size=1, micro_batch_size=1, max_steps=3, drift_prompts=0, **changes))
    margins, losses = (column(tmp_path / "run", f"train/{name}") for name in ("margin", "loss"))
    assert margins[0] == 0 and abs(margins[2]) > 0.01
    assert losses == pytest.approx({step: loss_of(margin) for step, margin in margins.items()}, abs=1e-5)


@pytest.mark.parametrize("precompute", [True, False])
def test_pairs_longer_than_the_context_are_refused_before_the_reference_is_computed(
    settings, base_dir, tmp_path, precompute
):
    shutil.copytree(base_dir, tmp_path / "base")
    config = replace(LLaMAConfig.from_json(base_dir / CONFIG_NAME), block_size=40)
    save_base(tmp_path / "base", config, read_state(base_dir / WEIGHT_NAMES[0]))
    flags = settings(tmp_path / "run", checkpoint_dir=tmp_path / "base", precompute_reference=precompute)
    with pytest.raises(UserError, match=r"^A training row has \d+ tokens and the model's context is 40; prepare"):
        train(flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precompute", "sentence"), [
    (True, "Log-probabilities of the reference (training rows)"),
    (False, "Before the first step, log-probabilities of the policy or the reference"),
])  # fmt: skip
def test_a_reference_that_is_not_finite_is_refused_and_not_cached(
    settings, refusal, base_dir, tmp_path, precompute, sentence
):
    shutil.copytree(base_dir, tmp_path / "base")
    state = {name: t.clone() for name, t in read_state(base_dir / WEIGHT_NAMES[0]).items()}
    state["transformer.ln_f.scale"][0] = torch.inf
    save_base(tmp_path / "base", LLaMAConfig.from_json(base_dir / CONFIG_NAME), state)
    flags = settings(tmp_path / "run", checkpoint_dir=tmp_path / "base", precompute_reference=precompute)
    assert refusal(train, flags) == (
        f"{sentence} are not finite (NaN or infinity): check the base, the initial adapter and the data; with "
        "--quantize int8, use a 4-bit mode such as nf4."
    )
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("data/.aligner-cache/reference-*"))


def test_a_reference_that_differs_from_the_initial_policy_is_refused(settings, tmp_path, monkeypatch):
    original = reference.compute_reference
    monkeypatch.setattr(reference, "compute_reference", lambda *args: original(*args) + torch.tensor([0.0, 0.01]))
    with pytest.raises(UserError, match=r"Before the first step the loss is 0.69\d+ and a margin 3.0e-03, but they"):
        train(settings(tmp_path / "run"))
    assert not (tmp_path / "run/state.pt").exists()


def test_a_large_loss_at_the_start_may_be_rounded(settings, tmp_path, monkeypatch):
    """One unit in the last place of a log-probability changes a loss of 278 by more than 1e-5."""
    original = reference.compute_reference
    up = torch.tensor([torch.inf, 0.0])
    monkeypatch.setattr(reference, "compute_reference", lambda *args: torch.nextafter(original(*args), up))
    train(settings(tmp_path / "run", max_steps=1, drift_prompts=0, loss_type="ipo", beta=0.03))
    assert column(tmp_path / "run", "train/loss")[0] == pytest.approx((1 / 0.06) ** 2, rel=1e-5)


def test_precomputing_the_reference_does_not_change_the_metrics(settings, trained_adapter, tmp_path):
    for name, precompute in (("before", True), ("in steps", False)):
        train(settings(tmp_path / name, init_adapter=trained_adapter, precompute_reference=precompute))
    assert logged(tmp_path / "before") == logged(tmp_path / "in steps")


def test_micro_batches_are_fixed_and_their_order_changes():
    lengths = np.random.default_rng(0).integers(1, 50, 45)
    epochs = [plan_fixed_epoch(lengths, 8, 4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for plan in epochs:
        assert [len(step) for step in plan] == [2] * 6
        assert sorted(np.concatenate([m for step in plan for m in step])) == list(range(45))
    as_sets = [{tuple(m) for step in plan for m in step} for plan in epochs]
    assert all(s == as_sets[0] for s in as_sets)
    orders = [[tuple(m) for step in plan for m in step] for plan in epochs]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


# == reference cache ==


def recomputed_splits(flags: list[str], monkeypatch) -> list[str]:
    """Return the splits for which a run recomputes the reference."""
    names, original = [], reference.compute_reference
    with monkeypatch.context() as patch:
        patch.setattr(reference, "compute_reference", lambda *args: names.append(args[-1]) or original(*args))
        patch.setattr(script.Trainer, "fit", lambda self: exit())  # the rest is tested elsewhere
        with pytest.raises(SystemExit):
            train(flags)
    return names


def test_the_reference_is_recomputed_when_an_input_changes(
    settings, trained_adapter, base_dir, tokenizer, tmp_path, monkeypatch
):
    def run(**changes):
        return recomputed_splits(settings(tmp_path / "run", **{**defaults, **changes}), monkeypatch)

    defaults = dict(init_adapter=trained_adapter)
    both = ["training", "validation"]
    assert run() == both
    assert run() == run(seed=5, learning_rate=1e-3, beta=0.2) == []

    # the adapter: one gate
    adapter = read_adapter(trained_adapter)
    state = {name: t.clone() for name, t in adapter.state.items()}
    state["transformer.h.1.attn.gating_factor"][0, 0] += 1
    save_adapter(tmp_path / "other.safetensors", state, adapter.meta)
    assert run(init_adapter=tmp_path / "other.safetensors") == both

    # the base: one weight in the middle
    other_base = tmp_path / "base"
    shutil.copytree(base_dir, other_base)
    state = {name: t.clone() for name, t in read_state(base_dir / WEIGHT_NAMES[0]).items()}
    state["transformer.h.1.mlp.c_fc1.weight"][20, 20] += 1
    save_base(other_base, LLaMAConfig.from_json(base_dir / CONFIG_NAME), state)
    assert run(checkpoint_dir=other_base) == both

    # the data: one token of one validation pair
    data_dir = tmp_path / "data/other"
    shutil.copytree(tmp_path / "data/pairs", data_dir)
    rows = load_from_disk(str(data_dir / "test")).to_list()
    rows[0]["rejected"][0] += 1
    shutil.rmtree(data_dir / "test")
    (data_dir / MANIFEST).unlink()  # it would not match the changed data
    Dataset.from_list(rows).save_to_disk(str(data_dir / "test"))
    assert run(data_dir=data_dir) == ["validation"]

    # the tokenizer: another file, with its hash in meta.json
    sha = tokenizer.sha256
    with (other_base / TOKENIZER_NAME).open("ab") as file:
        file.write(b"\xba\x3e\x00")  # an empty field that sentencepiece ignores
    meta = tmp_path / "data/pairs/meta.json"
    meta.write_text(meta.read_text().replace(sha, Tokenizer(other_base).sha256))
    assert run(checkpoint_dir=other_base) == both

    # the way it is computed
    meta.write_text(meta.read_text().replace(Tokenizer(other_base).sha256, sha))
    assert run(micro_batch_size=8) == both
    assert run(precision="bf16-true") == both
    assert run() == []
    with monkeypatch.context() as patch:
        patch.setattr(setup, "compile_", lambda *args: None)  # compiled layers are tested elsewhere
        assert run(compile=True) == both
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        assert run() == both
    assert run() == []
    monkeypatch.setattr(reference, "instruction_set", lambda: "AVX9")
    assert run() == both


def test_a_reference_that_cannot_be_cached_is_computed_again(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "data/.aligner-cache").write_text("a file where the folder would be")
    for _ in range(2):
        assert recomputed_splits(settings(tmp_path / "run"), monkeypatch) == ["training", "validation"]
    assert (
        capsys.readouterr().err.count(
            "note: the reference is not cached, and the next run computes it again. Cannot write "
        )
        == 4
    )


def test_a_damaged_cache_is_computed_again(settings, tmp_path, monkeypatch):
    flags = settings(tmp_path / "run")
    assert len(recomputed_splits(flags, monkeypatch)) == 2
    files = list((tmp_path / "data/.aligner-cache").glob("reference-*/*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(b"not this")
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a changed value in a readable file
    assert len(recomputed_splits(flags, monkeypatch)) == 2
    assert recomputed_splits(flags, monkeypatch) == []


# == training ==


def test_responses_that_share_a_row_give_the_same_metrics(settings, trained_adapter, tmp_path, monkeypatch):
    """Training, validation and the cached reference all use the model's width."""
    widths, sequences, original = set(), {1: set(), 2: set()}, PreferenceData.batch
    for per_row, name in ((1, "separate"), (2, "packed")):
        monkeypatch.setattr("lit_llama.packing.answers_per_row", lambda *args, n=per_row: widths.add(args[-1]) or n)

        def batch(data, indices, per_row=per_row):
            result = original(data, indices)
            sequences[per_row].add(len(result["idx"]) / len(indices))
            return result

        monkeypatch.setattr(PreferenceData, "batch", batch)
        assert len(recomputed_splits(settings(tmp_path / "none"), monkeypatch)) == 2  # none is that of another layout
        train(settings(tmp_path / name, init_adapter=trained_adapter))
    assert widths == {32} and sequences == {1: {2}, 2: {1}}
    before, after = logged(tmp_path / "separate"), logged(tmp_path / "packed")
    assert before.keys() == after.keys()
    for step in (0, 1, 2):  # later, rounding grows
        assert after[step] == pytest.approx(before[step], rel=1e-3, abs=1e-3), step


@pytest.fixture(scope="module")
def finished(base_dir, preference_dir, tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a finished run and its output."""
    folder = tmp_path_factory.mktemp("finished")
    data_dir = shutil.copytree(preference_dir, folder / "data/pairs")
    with redirect_stdout(StringIO()) as out:
        train(make_flags(folder / "run", checkpoint_dir=base_dir, data_dir=data_dir, sft_weight=0.5, eval_rows=5))
    return folder / "run", out.getvalue()


def test_every_metric_is_logged_and_plotted(finished):
    out_dir, output = finished
    rows = read_metrics(out_dir / "metrics.csv")
    names = METRICS | {"dpo_loss", "sft_loss"}
    assert set(rows[2]) == {f"train/{name}" for name in names} | {"lr", "grad_norm", "tokens_per_s"}
    assert set(rows[7]) == {f"val/{name}" for name in (*names, "kl", "degenerate")}
    assert [step for step, row in rows.items() if "val/loss" in row] == [0, 3, 6, 7]
    row = rows[7]
    assert row["val/margin"] == pytest.approx(row["val/chosen_reward"] - row["val/rejected_reward"], abs=1e-5)
    assert row["val/loss"] == pytest.approx(row["val/dpo_loss"] + 0.5 * row["val/sft_loss"], abs=1e-5)
    assert (out_dir / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    records = [json.loads(line) for line in (out_dir / "samples.jsonl").read_text().splitlines()]
    assert f"> {records[0]['prompt']}\nbefore: {records[0]['answer']}\nafter:  {records[-1]['answer']}\n" in output


def test_validation_covers_the_pairs_of_eval_rows(finished, base_dir, preference_dir):
    """The last row of metrics equals a computation with two models, one pair at a time."""
    out_dir, _ = finished
    policy, base = load_model(base_dir, read_adapter(out_dir / "last.safetensors")), load_model(base_dir)
    val = PreferenceData(preference_dir, "test", max_rows=5)
    margins = []
    for i in range(len(val)):
        batch = val.batch(np.array([i]))
        with torch.no_grad():
            p, r = (sequence_logps(m(batch["idx"]), batch["labels"]) for m in (policy, base))
        margins.append(0.3 * ((p[0] - p[1]) - (r[0] - r[1])).item())
    row = read_metrics(out_dir / "metrics.csv")[7]
    assert row["val/margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert row["val/reward_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert row["val/dpo_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=1e-4)


def test_resuming_gives_the_same_metrics(settings, trained_adapter, tmp_path):
    changes = dict(init_adapter=trained_adapter, sample_prompts=0)
    train(settings(tmp_path / "whole", **changes))
    flags = settings(tmp_path / "cut", **changes)
    with pytest.MonkeyPatch.context() as patch:
        step = script.Trainer.train_step

        def stop_at_step_5(self, rows):
            if self.step == 5:
                raise SystemExit
            return step(self, rows)

        patch.setattr(script.Trainer, "train_step", stop_at_step_5)
        with pytest.raises(SystemExit):
            train(flags)
    train([*flags, "--resume"])
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    with pytest.raises(UserError, match=r"other settings: beta \(0.3 then, 0.1 now\)"):
        train([*flags, "--resume", "--beta=0.1"])


def test_reporting_settings_can_change_on_resume(settings, tmp_path, capsys):
    train(settings(tmp_path / "run", max_steps=7, sample_prompts=4, drift_prompts=0, save_interval=3))
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    torch.save({**state, "step": 3, "val_losses": state["val_losses"][:2]}, tmp_path / "run/state.pt")
    capsys.readouterr()
    train(settings(tmp_path / "run", max_steps=7, sample_prompts=2, drift_prompts=4, resume=True))
    assert list(column(tmp_path / "run", "val/kl")) == [6, 7]
    records = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0] * 4 + [3] * 4 + [6] * 2 + [7] * 2
    output = capsys.readouterr().out
    assert output.count("before: ") == 2
    first = {record["prompt"]: record["answer"] for record in records[:4]}
    assert all(
        f"> {r['prompt']}\nbefore: {first[r['prompt']]}\nafter:  {r['answer']}\n" in output for r in records[-2:]
    )


@pytest.mark.parametrize(
    ("strategy", "precompute", "sampled"), [("ddp", True, 0), ("ddp", False, 0), ("fsdp", True, 3), ("fsdp", False, 0)]
)
def test_two_processes_give_the_same_metrics_as_one(
    settings, trained_adapter, tmp_path, python, strategy, precompute, sampled
):
    changes = dict(init_adapter=trained_adapter, precompute_reference=precompute)
    changes |= dict(sample_prompts=sampled, drift_prompts=sampled)
    train(settings(tmp_path / "one", **changes))
    shutil.rmtree(tmp_path / "data/.aligner-cache", ignore_errors=True)  # both processes compute it
    command = [python, script.__file__, "--devices=2", f"--strategy={strategy}"]
    command += settings(tmp_path / "two", **changes)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert two.keys() == one.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4, abs=1e-4)


def test_without_a_reference(settings, tmp_path):
    train(settings(tmp_path / "run", reference_free=True))
    row = read_metrics(tmp_path / "run/metrics.csv")[0]
    assert row["val/chosen_reward"] == pytest.approx(0.3 * row["val/chosen_logp"], rel=1e-5)
    assert not (tmp_path / "data/.aligner-cache").exists()


def test_degenerate_answers_cause_a_warning(settings, tmp_path, monkeypatch, capsys):
    shares = iter([0.1, 0.15, 0.5, 0.5])
    monkeypatch.setattr(script, "sampled_kl", lambda *args: {"kl": 1.0, "degenerate": next(shares)})
    train(settings(tmp_path / "run"))
    stderr = capsys.readouterr().err
    assert stderr.count("warning: 50% of the sampled answers are empty, do not end or repeat themselves, 10% did") == 2


def test_drift_matches_a_computation_by_hand(base_dir, trained_adapter, monkeypatch):
    """The answers are fixed: two that end, and one that repeats itself and does not end."""
    policy = load_model(base_dir, read_adapter(trained_adapter))
    closed = {name: torch.zeros_like(p) for name, p in policy.named_parameters() if policy.is_adapter_parameter(name)}
    answers = [[5, 6, 7], [8, 9] * 10, [4, 5, 6, 7, 8, 9, 10, 11, 12]]
    prompts, calls = [[1, 3], [1, 3, 4], [1, 5]], []

    def fixed(*args, rows):
        calls.append((*args, rows))
        return [answers[row] for row in rows]

    monkeypatch.setattr(reference, "generate", fixed)
    result = reference.sampled_kl(policy, closed, prompts, (2, 1, 999), 20, batch_size=2)  # the model has no token 999
    sampling = Sampling(20, temperature=1.0)
    assert calls == [(policy, prompts[:2], sampling, (2, 1), [0, 1]), (policy, prompts[2:], sampling, (2, 1), [2])]
    assert result["degenerate"] == pytest.approx(1 / 3)
    base, kl = load_model(base_dir), 0.0
    for prompt, answer, ends in zip(prompts, answers, ((2, 1), None, (2, 1)), strict=True):
        ids = torch.tensor([[*prompt, *answer, end] for end in ends] if ends else [prompt + answer])
        labels = torch.tensor([[-1] * len(prompt) + row[len(prompt) :] for row in ids.tolist()])
        with torch.no_grad():  # an answer can end with either stop token
            p, r = (sequence_logps(m(ids), labels).logsumexp(0) for m in (policy, base))
        kl += (p - r).item() / 3
    assert result["kl"] == pytest.approx(kl, abs=1e-3)


def test_the_drift_does_not_depend_on_the_batch_size(base_dir, trained_adapter, preference_dir):
    policy = load_model(base_dir, read_adapter(trained_adapter))
    closed = {name: torch.zeros_like(p) for name, p in policy.named_parameters() if policy.is_adapter_parameter(name)}
    prompts = [prompt for prompt, _ in PreferenceData(preference_dir, "train").prompts(5)]
    results = [reference.sampled_kl(policy, closed, prompts, (2,), 10, batch_size) for batch_size in (5, 2, 1)]
    assert results[1:] == [pytest.approx(results[0], abs=1e-4)] * 2
    assert abs(results[0]["kl"]) > 0.1


def test_the_figure_shows_all_metrics_of_a_validation_except_the_parts_of_the_loss(finished):
    logged = {name.removeprefix("val/") for name in read_metrics(finished[0] / "metrics.csv")[0] if "val/" in name}
    assert logged - {name for names in script.PANELS.values() for name in names} == {"dpo_loss", "sft_loss"}


# == errors ==


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"beta": 0}, "beta is 0.0; it must be above 0"),
        ({"sft_weight": -1}, "sft_weight is -1.0; it must be 0 or more."),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1; only the sigmoid loss supports it"),
        ({"drift_prompts": -1}, "drift_prompts is -1; it must be 0 or more."),
        ({"micro_batch_size": 3}, "batch_size 8 is not a multiple of micro_batch_size 3."),
    ],
)
def test_invalid_settings_are_refused_before_the_run_folder_is_created(settings, refusal, tmp_path, changes, sentence):
    assert refusal(train, settings(tmp_path / "run", **changes)).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_sft_data_is_refused(settings, data_dir, tmp_path):
    with pytest.raises(UserError, match="contains prompts with responses, for SFT; this script needs preference pairs"):
        train(settings(tmp_path / "run", data_dir=data_dir))


def test_only_gates_and_prefix_are_trained(finished, base_dir):
    out_dir, _ = finished
    adapter = read_adapter(out_dir / "last.safetensors")
    assert sum(t.numel() for t in adapter.state.values()) == 32 + 2 * 4
    assert adapter.meta["reference"] == "none"
    assert load_model(base_dir, adapter, dtype=torch.bfloat16).config.adapter_start_layer == 1
    assert isinstance(load_model(base_dir, adapter), aligner.LLaMA)
