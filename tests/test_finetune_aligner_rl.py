import hashlib
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from contextlib import redirect_stdout
from datetime import date
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import load_from_disk

import finetune.alignerRL as script
from lit_llama import cli
from lit_llama import train as training
from lit_llama.aligner import mark_only_adapter_as_trainable
from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.data import PromptData
from lit_llama.generation import Sampling, generate
from lit_llama.logps import LabelLogps
from lit_llama.model import LLaMA
from lit_llama.prepare_prompts import prepare_prompts
from lit_llama.rewards import Reward
from lit_llama.rl import PolicyLoss, answer_logps
from lit_llama.rollouts import Answerer, PolicyTrainer, Rollouts
from lit_llama.run.dry_run import largest_answers, padded_tokens
from lit_llama.run.report import print_notes, read_metrics
from lit_llama.utils import UserError

# 20 prompts at a batch size of 8 make 3 steps per epoch
SHORT = dict(max_steps=5, epochs=20, batch_size=8, micro_batch_size=4, learning_rate=0.3, adapter_start_layer=1,
             group_size=3, eval_interval=2, save_interval=2, sample_prompts=1, drift_prompts=2, max_new_tokens=6,
             accelerator="cpu", reward="length", reward_options='{"words": 2}', score="length")  # fmt: skip
SAMPLED = {"reward", "reward_std", "no_signal", "answer_tokens", "ended"}


@pytest.fixture(scope="module")
def prompt_dir(tmp_path_factory, tokenizer) -> Path:
    """Prepare a folder of prompts: 20 for training, and 6 explicitly chosen ones for validation."""
    folder = tmp_path_factory.mktemp("data") / "prompts"
    prompts = [f"what did the {thing} eat {place}?" for thing in ("cat", "dog") for place in range(13)]
    prepare_prompts(
        prompts,
        lambda prompt, number: (prompt, {"number": number, "wörld": prompt}),
        output_dir=folder,
        tokenizer=tokenizer,
        max_seq_length=60,
        test_fraction=0.5,
        seed=0,
        num_proc=1,
        split_by={prompts[i] for i in (0, 3, 9, 14, 20, 25)},
        about={"source": "prompts", "prompt_style": "plain"},
    )
    return folder


@pytest.fixture(scope="module")
def settings(base_dir, prompt_dir):
    def make(out_dir: Path, **changes) -> list[str]:
        values = {"checkpoint_dir": base_dir, "data_dir": prompt_dir, "out_dir": out_dir, **SHORT, **changes}
        return [f"--{name}={value}" for name, value in values.items()]

    return make


def train(flags: list[str]) -> None:
    script.main(cli.parse(script.Settings, flags))


def logged(out_dir: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(out_dir / "metrics.csv")
    return {step: {k: v for k, v in row.items() if k != "tokens_per_s"} for step, row in rows.items()}


# == data ==


def test_the_dataset_returns_prompts_and_their_sources(prompt_dir, tokenizer):
    train, val = PromptData(prompt_dir, "train", tokenizer), PromptData(prompt_dir, "test", tokenizer)
    assert (len(train), len(val)) == (20, 6)
    assert [row["number"] for row in val.sources(np.arange(6))] == [1, 4, 10, 15, 21, 26]
    assert val.sources(np.array([1])) == [{"number": 4, "wörld": "what did the cat eat 3?"}]
    ids = val.prompt_ids(np.array([1]))[0]
    assert ids == tokenizer.encode("what did the cat eat 3?", bos=True) and val.lengths[1] == len(ids) + 1
    assert val.prompts(1) == [(val.prompt_ids(np.array([0]))[0], [])]
    assert train.sha256 != val.sha256
    digest = hashlib.sha256()  # saved runs record it
    for row in load_from_disk(str(prompt_dir / "test")):
        digest.update(json.dumps([row["prompt"], row["row"]]).encode())
    assert val.sha256 == digest.hexdigest()
    assert json.loads((prompt_dir / "meta.json").read_text())["split_by"] == "given"


@pytest.fixture
def rollouts(prompt_dir, tokenizer) -> Rollouts:
    answerer = Answerer(PromptData(prompt_dir, "train", tokenizer), tokenizer, 6)
    return Rollouts(answerer, Reward("length", {"words": 2}), group_size=3, seed=5, divide_by_std=True,
                    length_term="answer", keep_equal=True)  # fmt: skip


def answers_of(batch: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    """Return the token ids of the answers to each prompt of a batch of three answers per prompt."""
    rows = zip(batch["labels"], batch["segments"], strict=True)
    return [[labels[(segments == i) & (labels != -1)].tolist() for i in (1, 2, 3)] for labels, segments in rows]


def test_a_batch_contains_the_answers_group_by_group(rollouts, base_dir):
    model, rows = load_model(base_dir), np.array([4, 2])
    sums = rollouts.sample(model, 0, rows)
    batch, data = rollouts.batch(rows), rollouts.answerer.data
    answers = answers_of(batch)
    for prompt, group, idx, labels in zip(data.prompt_ids(rows), answers, batch["idx"], batch["labels"], strict=True):
        start = len(prompt)
        assert idx[:start].tolist() == prompt and (labels[:start] == -1).all()
        for answer in group:
            end = start + len(answer)
            assert idx[start:end].tolist() == labels[start:end].tolist() == answer
            assert end == len(idx) or (idx[end], labels[end]) == (prompt[-1], -1) or idx[end:].sum() == 0
            start = end + 1
    lengths = [len(answer) for group in answers for answer in group]
    assert len(lengths) == 6
    assert batch["weights"].tolist() == pytest.approx([1 / (3 * n) for n in lengths for _ in range(n)])
    assert sums["answer_tokens"].item() == pytest.approx(sum(lengths) / 3)
    assert sums["tokens"].item() == 3 * sum(map(len, data.prompt_ids(rows))) + sum(lengths)
    advantages = torch.stack([tokens[0] for tokens in batch["advantages"].split(lengths)])
    assert all((tokens == tokens[0]).all() for tokens in batch["advantages"].split(lengths))
    torch.testing.assert_close(advantages.view(2, 3).sum(1), torch.zeros(2), atol=1e-5, rtol=0)
    assert advantages.any()


def test_each_label_has_the_advantage_of_its_answer(rollouts, base_dir, monkeypatch):
    """Rewards 0 to 5 for the answers of two prompts, in their order; the stop token makes the lengths differ."""
    model, rows = load_model(base_dir), np.array([4, 2])
    monkeypatch.setattr(rollouts.answerer.tokenizer, "stop_ids", tuple(range(0, 300, 5)))
    monkeypatch.setattr(Answerer, "rewards", lambda *args: torch.arange(6.0))
    rollouts.sample(model, 7, rows)
    batch = rollouts.batch(rows)
    lengths = [len(answer) for group in answers_of(batch) for answer in group]
    assert len(set(lengths)) > 1
    high = math.sqrt(1.5)
    expected = [a for a, n in zip([-high, 0, high] * 2, lengths, strict=True) for _ in range(n)]
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-3)


def aligned_model(base_dir: Path) -> LLaMA:
    """Return the base with a trainable Aligner whose gates are not zero."""
    torch.manual_seed(0)
    model = load_model(base_dir, method="aligner", method_config={"adapter_start_layer": 0})
    mark_only_adapter_as_trainable(model)
    for name, p in model.named_parameters():
        if "gating_factor" in name:
            torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize("per_row", [1, 2])
def test_a_group_can_take_several_rows(rollouts, base_dir, monkeypatch, per_row):
    """The loss and its gradients do not depend on how many answers share a row."""
    model = aligned_model(base_dir)
    monkeypatch.setattr(Answerer, "rewards", lambda *args: torch.tensor([0.0, 1, 2, 5, 1, 1]))
    results = []
    for size in (3, per_row):
        monkeypatch.setattr("lit_llama.rollouts.answers_per_row", lambda *args, size=size: size)
        rollouts.sample(model, 0, np.array([4, 2]))
        batch = rollouts.batch(np.array([4, 2]))
        model.zero_grad()
        loss = PolicyLoss(clip=0.2, kl_weight=0.0, start={})(LabelLogps(model), batch)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert len(batch["idx"]) == 2 * math.ceil(3 / per_row)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    assert results[0][0] != 0


def test_a_finished_answer_includes_its_stop_token(rollouts, base_dir, monkeypatch):
    data, stop = rollouts.answerer.data, rollouts.answerer.tokenizer.stop_ids[0]
    model, rows = load_model(base_dir), np.array([0])
    unstopped = generate(model, data.prompt_ids(rows), Sampling(6), finished=lambda ids: False)[0]
    monkeypatch.setattr(rollouts.answerer.tokenizer, "stop_ids", (unstopped[2],))
    answers = rollouts.answerer.answers(model, rows)
    first = unstopped.index(unstopped[2]) + 1
    assert answers.ids == [unstopped[:first]] and answers.ended == [True] and stop != unstopped[2]
    assert answers.texts == [rollouts.answerer.tokenizer.decode(unstopped[: first - 1]).strip()]


def test_sampled_answers_depend_on_step_and_row_but_not_on_the_batch(rollouts, base_dir):
    model = load_model(base_dir)

    def answers(step: int, rows: list[int]) -> dict[int, list[list[int]]]:
        rows = np.array(rows)
        rollouts.sample(model, step, rows)
        return dict(zip(rows.tolist(), answers_of(rollouts.batch(rows)), strict=True))

    together, alone = answers(1, [4, 2, 9]), answers(1, [2])
    assert together[2] == alone[2]
    assert len({tuple(a) for group in together.values() for a in group}) > 5
    assert answers(2, [2]) != alone


def test_answers_are_sampled_from_the_distribution_of_the_policy(rollouts, base_dir):
    """The seed follows from that of the run and the step; the answers to row r have row numbers 3r to 3r + 2 in it."""
    model, rows = load_model(base_dir), np.array([4, 2])
    rollouts.sample(model, 7, rows)
    batch = rollouts.batch(rows)
    prompts = [prompt for prompt in rollouts.answerer.data.prompt_ids(rows) for _ in range(3)]
    seed = int(np.random.SeedSequence((5, 7)).generate_state(1)[0])
    expected = generate(model, prompts, Sampling(6, temperature=1.0, seed=seed),
                        finished=rollouts.answerer.has_ended, rows=[12, 13, 14, 6, 7, 8])  # fmt: skip
    assert answers_of(batch) == [expected[:3], expected[3:]]


def test_answers_end_before_a_stop_text(rollouts, base_dir, monkeypatch):
    data, tokenizer = rollouts.answerer.data, rollouts.answerer.tokenizer
    data.meta["prompt_style"] = "hh"
    ids = tokenizer.encode(" the cat Human: and the dog", bos=False)
    monkeypatch.setattr("lit_llama.rollouts.generate", lambda *args, **options: [ids])
    answers = Answerer(data, tokenizer, len(ids)).answers(load_model(base_dir), np.array([0]))
    assert (answers.texts, answers.ids, answers.ended) == (["the cat"], [ids], [False])


@pytest.mark.parametrize("values", [[1, 1, 1, 0, 1, 0, 2, 2, 2], [1] * 9])
def test_groups_without_a_signal_are_left_out(rollouts, base_dir, monkeypatch, values):
    """Loss and gradients equal those over all groups; the entropy is the mean over the remaining groups."""
    model = aligned_model(base_dir)
    wrapped, rows = LabelLogps(model), np.array([4, 2, 9])
    monkeypatch.setattr(Answerer, "rewards", lambda *args: torch.tensor(values, dtype=torch.float32))
    loss, sums, gradients, batches = PolicyLoss(clip=0.2, kl_weight=0.0, start={}), {}, {}, {}
    for keep_equal in (True, False):
        rollouts.keep_equal = keep_equal
        sampled = rollouts.sample(model, 0, rows)
        batches[keep_equal] = rollouts.batch(rows)
        sums[keep_equal] = loss(wrapped, batches[keep_equal])
        model.zero_grad()
        sums[keep_equal]["loss"].backward()
        gradients[keep_equal] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    remaining = 1 if len(set(values)) > 1 else 0
    assert sampled["no_signal"].item() == (2 if len(set(values)) > 1 else 3)
    all_groups, kept = (answers_of(batches[keep_equal]) for keep_equal in (True, False))
    assert len(all_groups) == 3 and kept == [all_groups[remaining]]
    torch.testing.assert_close(sums[False]["loss"], sums[True]["loss"])
    torch.testing.assert_close(gradients[False], gradients[True])
    assert gradients[True].any() == (len(set(values)) > 1)
    logps = answer_logps(wrapped, batches[False]).detach()
    means = [-of_answer.mean() for of_answer in logps.split([len(answer) for answer in kept[0]])]
    assert sums[False]["entropy"].item() / len(rows) == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)


# == the run ==


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> tuple[Path, str]:
    """Return the folder of a finished run and its output."""
    out_dir = tmp_path_factory.mktemp("out") / "run"
    with redirect_stdout(StringIO()) as out:
        train(settings(out_dir, kl_weight=0.1, sample_prompts=2))
    return out_dir, out.getvalue()


def test_every_metric_is_logged_and_plotted(finished):
    out_dir, out = finished
    rows = read_metrics(out_dir / "metrics.csv")
    names = {f"train/{name}" for name in SAMPLED | {"loss", "clipped", "entropy", "kl_per_token"}}
    assert set(rows[1]) == names | {"lr", "grad_norm", "tokens_per_s"}
    val = {"loss", "accuracy", "reward", "answer_tokens", "ended", "kl", "degenerate"}
    assert set(rows[5]) == {f"val/{name}" for name in val}
    plotted = {name for panel in script.PANELS.values() for name in panel}
    assert plotted == (SAMPLED | val | {"clipped", "entropy", "kl_per_token", "grad_norm"}) - {"loss"}
    assert [step for step, row in rows.items() if "val/loss" in row] == [0, 2, 4, 5]
    assert rows[0]["train/kl_per_token"] == pytest.approx(0, abs=1e-6) and rows[4]["train/kl_per_token"] > 0
    assert rows[0]["train/clipped"] == 0  # one update for each batch
    assert (out_dir / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["accuracy_before"] == rows[0]["val/accuracy"]
    assert summary["accuracy_after"] == rows[5]["val/accuracy"]
    assert summary["accuracy_at_best"] == rows[summary["best_step"]]["val/accuracy"]
    assert not (out_dir / "loss.png").exists()
    assert summary["answers_sampled"] == (20 + 2 * 8) * 3
    assert "before: " in out and f"{36 * 3} sampled answers" in out and "accuracy     " in out
    assert f"{summary['accuracy_at_best']:.1%} at best (step {summary['best_step']})" in out
    adapter = read_adapter(out_dir)
    assert adapter.meta["reward"] == "length" and sum(t.numel() for t in adapter.state.values()) == 32 + 2 * 4


def test_rewards_without_signal_are_noted_and_equal_accuracy_is_not_better(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "flat_reward.py").write_text("def flat(prompts, answers, rows):\n    return [0.0] * len(answers)\n")
    monkeypatch.syspath_prepend(tmp_path)
    flat = dict(reward="flat_reward:flat", reward_options="null", score="null", max_steps=2, drift_prompts=0)
    for kl_weight in (0.0, 0.1):
        train(settings(tmp_path / f"run-{kl_weight}", kl_weight=kl_weight, **flat))
        err = capsys.readouterr().err
        assert ("note: in each step, all answers to a prompt had the same reward" in err) == (kl_weight == 0)
        assert "step 2: validation loss 1.0000\n" in err  # as before training, so not "the best so far"


def test_a_falling_score_causes_a_warning(settings, tmp_path, monkeypatch, capsys):
    received = []  # the number of rows at each validation
    monkeypatch.setattr(script, "falling_score", lambda rows: received.append(len(rows)) or f"warning: {len(rows)}")
    train(settings(tmp_path / "run", max_steps=3, sample_prompts=0, drift_prompts=0))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert received == [1, 3, 4] and warnings == ["warning: 1", "warning: 3", "warning: 4"]


def test_validation_is_greedy_and_covers_the_entire_split(finished, base_dir, prompt_dir, tokenizer):
    out_dir, _ = finished
    model, val = load_model(base_dir, read_adapter(out_dir / "last.safetensors")), PromptData(prompt_dir, "test")
    prompts = [prompt for prompt, _ in val.prompts(6)]
    answers = [tokenizer.decode(ids).strip() for ids in generate(model, prompts, Sampling(6), tokenizer.stop_ids)]
    row = read_metrics(out_dir / "metrics.csv")[5]
    scores = Reward("length")(prompts, answers, [{}] * 6, [0] * 6)  # without the options of --reward
    assert row["val/loss"] == pytest.approx(1 - np.mean(scores), abs=1e-6)
    rewards = Reward("length", {"words": 2})(prompts, answers, [{}] * 6, [0] * 6)
    assert row["val/reward"] == pytest.approx(np.mean(rewards), abs=1e-6)


def test_only_a_score_of_1_is_right(settings, tmp_path, monkeypatch):
    """The numbers of the first five validation rows are 1, 4, 10, 15 and 21."""
    monkeypatch.chdir(tmp_path)
    Path("row_scores.py").write_text("def reward(prompts, answers, rows):\n"
                                     "    return [min(row['number'] / 15, 1) for row in rows]\n")  # fmt: skip
    train(settings(tmp_path / "run", max_steps=1, drift_prompts=0, score="row_scores:reward", eval_rows=5))
    row = read_metrics(tmp_path / "run/metrics.csv")[1]
    assert row["val/accuracy"] == pytest.approx(0.4) and row["val/loss"] == pytest.approx((14 + 11 + 5) / 15 / 5)


def test_a_dry_run_counts_rows_with_all_answers(settings, tmp_path, prompt_dir, tokenizer):
    with redirect_stdout(StringIO()) as out:
        train([*settings(tmp_path / "run"), "--dry_run=true"])
    longest = max(map(len, PromptData(prompt_dir, "train", tokenizer).prompt_ids(np.arange(20))))
    assert f"| a step, 4 × {longest - 1 + 3 * 7} tokens | " in out.getvalue() and "| sampling | " in out.getvalue()
    assert "| validation | " in out.getvalue()
    assert not (tmp_path / "run").exists()


def test_the_largest_tensors_of_a_micro_batch():
    """Prompts of 1,900 and 1,000 tokens in a context of 2,048: the shorter prompt has the longer answers."""
    model = SimpleNamespace(max_tokens=2048, config=SimpleNamespace(n_embd=4096))
    trainer = SimpleNamespace(settings=SimpleNamespace(max_new_tokens=512), unwrapped=model)
    data = SimpleNamespace(group_size=8, lengths=np.array([1901, 1001, 101]))
    sampling, training = largest_answers(trainer, data, np.array([0, 1]))
    assert sampling == (16, 1900, 148)
    assert training == (2, 999 + 8 * 513, 8 * 148 + 8 * 512)
    # a prompt of 100 tokens saves less than attention costs: 1.5 · 4096 · 100 / 512 = 1200 = 100 + 2 · 513 + 74
    assert largest_answers(trainer, data, np.array([2]))[1] == (4, 99 + 2 * 513, 8 * 512)


def test_the_time_of_a_step_is_that_of_prompts_and_answers(settings, tmp_path, monkeypatch):
    trainer = trainer_of(settings(tmp_path / "run"), monkeypatch)
    rows = np.arange(5)
    longest = max(map(len, trainer.train.answerer.data.prompt_ids(rows[:4])))
    last = len(trainer.train.answerer.data.prompt_ids(rows[4:])[0])
    assert padded_tokens(trainer, [rows[:4], rows[4:]]) == 4 * (longest - 1 + 3 * 7) + last - 1 + 3 * 7


def trainer_of(flags: list[str], monkeypatch) -> PolicyTrainer:
    """Return the trainer of a run, before its first step."""
    trainers = []
    with monkeypatch.context() as patch:
        patch.setattr(script, "dry_run", trainers.append)
        train([*flags, "--dry_run"])
    return trainers[0]


@pytest.mark.parametrize(
    ("length_term", "divide_by_std", "kl_weight"), [("answer", "true", 0), ("constant", "false", 0.1)]
)
def test_the_settings_of_the_objective_are_used(settings, tmp_path, monkeypatch, length_term, divide_by_std, kl_weight):
    changes = dict(length_term=length_term, divide_by_std=divide_by_std, kl_weight=kl_weight)
    trainer, rows = trainer_of(settings(tmp_path / "run", **changes), monkeypatch), np.arange(8)
    sums = trainer.train.sample(trainer.unwrapped, 0, rows)
    batch = trainer.train.batch(rows)
    lengths = [len(answer) for group in answers_of(batch) for answer in group]
    first = np.cumsum([0, *lengths[:-1]])  # label of each answer
    deviations = batch["advantages"][first].view(-1, 3).std(1, correction=0)
    assert 0 < sums["no_signal"] < 7 and len(set(lengths)) > 1
    assert len(deviations) == (8 if kl_weight else 8 - sums["no_signal"])  # the KL term trains on all groups
    if length_term == "constant":  # Dr. GRPO
        assert batch["weights"].tolist() == pytest.approx([1 / (3 * 6)] * sum(lengths))
        assert deviations.sum().item() == pytest.approx(sums["reward_std"].item())
        assert deviations.max() < 0.9
    else:
        assert batch["weights"].tolist() == pytest.approx([1 / (3 * n) for n in lengths for _ in range(n)])
        assert deviations.tolist() == pytest.approx([1] * len(deviations), abs=1e-3)


def test_the_seed_determines_the_sampled_answers(settings, tmp_path, monkeypatch):
    answers, rows = [], np.array([4, 2])
    for seed in (1, 2):
        trainer = trainer_of(settings(tmp_path / "run", seed=seed, kl_weight=0.1), monkeypatch)
        trainer.train.sample(trainer.unwrapped, 0, rows)
        answers.append(answers_of(trainer.train.batch(rows)))
    assert answers[0] != answers[1]


def test_answers_of_several_updates_are_counted_once(settings, tmp_path, monkeypatch):
    trainer, rows = trainer_of(settings(tmp_path / "run", updates_per_batch=2), monkeypatch), np.array([4, 2])
    step = trainer.train_step([rows])
    assert trainer.tokens == step.tokens == trainer.train.tokens[rows].sum()


def test_the_policies_that_the_loss_compares_with_have_no_dropout(settings, tmp_path, monkeypatch):
    changes = dict(method="lora", method_config='{"lora_dropout": 0.5}', kl_weight=0.1, updates_per_batch=2)
    trainer, rows = trainer_of(settings(tmp_path / "run", **changes), monkeypatch), np.array([4, 2])
    for p in trainer.trainable.values():
        torch.nn.init.normal_(p, std=0.2)
    trainer.loss.start = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    trainer.sample([rows])
    batch = trainer.train.batch(rows)
    with_dropout, again = (answer_logps(trainer.model, batch) for _ in range(2))
    assert not torch.equal(with_dropout, again)
    old, reference = batch["old_logps"], trainer.loss.reference_logps(trainer.model, batch)
    trainer.model.eval()
    expected = answer_logps(trainer.model, batch)
    assert torch.equal(old, expected) and torch.equal(reference, expected)


def test_the_reward_rises(settings, tmp_path):
    """A random model learns to write more words."""
    train(settings(tmp_path / "run", max_steps=20, eval_interval=20, save_interval=20, drift_prompts=0,
                   reward_options='{"words": 6}', learning_rate=0.5, group_size=8, seed=2))  # fmt: skip
    rewards = [row["train/reward"] for row in read_metrics(tmp_path / "run/metrics.csv").values() if "lr" in row]
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.05, rewards


def test_a_later_update_of_the_first_step_that_is_not_finite_names_both_causes(settings, refusal, tmp_path):
    flags = settings(tmp_path / "run", updates_per_batch=2, learning_rate=3e37, grad_clip=0)
    sentence = refusal(train, flags)
    assert re.match(
        r"The \S+ is nan in step 0, rows [\d, ]+, at lr 3\.0e\+37: lower --learning_rate, or check", sentence
    )
    assert sentence.endswith(" or check the base, the initial adapter and the data.")


def test_each_step_is_read_on_a_gpu_too(settings, tmp_path, monkeypatch):
    read, reads = training.read_metrics, []
    monkeypatch.setattr(training, "read_metrics", lambda fabric, steps: reads.append(len(steps)) or read(fabric, steps))
    monkeypatch.setattr(training, "steps_between_reads", lambda fabric, log_interval: log_interval)
    train(settings(tmp_path / "run", sample_prompts=0, drift_prompts=0, eval_interval=5, save_interval=5))
    assert reads == [1] * 5


def test_resuming_gives_the_same_rewards(settings, tmp_path):
    changes = dict(sample_prompts=0, drift_prompts=0, kl_weight=0.1, updates_per_batch=2, clip=0.01, method="lora")
    train(settings(tmp_path / "whole", **changes))
    flags = settings(tmp_path / "cut", **changes)
    with pytest.MonkeyPatch.context() as patch:
        step = script.PolicyTrainer.train_step

        def killed(self, rows):
            if self.step == 3:
                raise SystemExit
            return step(self, rows)

        patch.setattr(script.PolicyTrainer, "train_step", killed)
        with pytest.raises(SystemExit):
            train(flags)
    train([*flags, "--resume"])
    rows = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == rows
    assert rows[0]["train/clipped"] > 0  # the ratios of the second update are not 1
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cut", "whole")]
    assert summaries[0]["accuracy_before"] == summaries[1]["accuracy_before"]
    with pytest.raises(UserError, match=r"other settings: max_new_tokens \(6 then, 5 now\)"):
        train([*flags, "--resume", "--max_new_tokens=5"])
    (tmp_path / "cut/metrics.csv").unlink()  # a finished run is not validated again
    train([*flags, "--resume"])
    assert json.loads((tmp_path / "cut/summary.json").read_text())["accuracy_before"] is None


@pytest.mark.parametrize(("strategy", "sampled"), [("ddp", 0), ("fsdp", 2)])
def test_two_processes_give_the_same_metrics_as_one(settings, tmp_path, python, strategy, sampled):
    changes = dict(sample_prompts=sampled, drift_prompts=sampled, kl_weight=0.1, max_steps=2, updates_per_batch=2)
    train(settings(tmp_path / "one", **changes))
    command = [python, script.__file__, "--devices=2", f"--strategy={strategy}"]
    command += settings(tmp_path / "two", **changes)
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert two.keys() == one.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_of_a_reward_in_the_second_process_is_printed(settings, tmp_path, python, strategy):
    (tmp_path / "strict.py").write_text(
        "import os\n\n\n"
        "def reward(prompts, answers, rows):\n"
        "    if os.environ.get('LOCAL_RANK') == '1':\n"
        "        raise ValueError('too strict')\n"
        "    return [0.0] * len(answers)\n"
    )
    command = [python, script.__file__, "--devices=2", f"--strategy={strategy}"]
    command += settings(tmp_path / "run", reward="strict:reward", reward_options="null", score="length")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "too strict" in last


# == mistakes ==


@pytest.mark.parametrize(("changes", "note"), [
    ({"epochs": 30}, "note: max_steps 80, the default, ends the run after 3.2 of 30 epochs; pass --max_steps null to "
                     "complete them.\n"),
    ({"epochs": 3}, ""),  # 75 steps
    ({"epochs": 30, "max_steps": 50}, ""),
    ({"epochs": 30, "max_steps": "null"}, ""),
    ({"epochs": 2, "batch_size": 1, "micro_batch_size": 1}, ""),  # 80 of 400 steps by default
], ids=str)  # fmt: skip
def test_epochs_that_the_default_of_max_steps_cuts_are_noted(settings, tmp_path, capsys, changes, note):
    flags = settings(tmp_path / "run", **{"max_steps": 80, **changes})
    print_notes(cli.parse(script.Settings, flags), 200, 0, 1)
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(("micro_batch_size", "processes", "note"), [
    (2, 2, ""),
    (2, 4, "note: a step has 2 micro-batches for 4 processes; lower --micro_batch_size to 1.\n"),
    (1, 8, "note: a step has 4 rows for 8 processes; raise --batch_size or use fewer devices.\n"),
    (4, 8, "note: a step has 4 rows for 8 processes; raise --batch_size or use fewer devices.\n"),
])  # fmt: skip
def test_idle_processes_are_noted(settings, tmp_path, capsys, micro_batch_size, processes, note):
    flags = settings(tmp_path / "run", batch_size=4, micro_batch_size=micro_batch_size, epochs=1, max_steps=50)
    print_notes(cli.parse(script.Settings, flags), 200, 0, processes)
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"group_size": 1}, "group_size is 1; it must be 2 or more."),
        ({"updates_per_batch": 0}, "updates_per_batch is 0; it must be 1 or more."),
        ({"clip": 0, "kl_weight": -1}, "clip is 0.0; it must be above 0. kl_weight is -1.0; it must be 0 or more."),
        ({"reward": "nothing"}, "There is no reward 'nothing'; choose from length, "),
        ({"score": "gsm8k", "reward": "length"}, "A row has no number in its 'answer' or 'response': {'number': "),
    ],
    ids=str,
)
def test_invalid_settings_give_a_one_sentence_error(settings, refusal, tmp_path, changes, sentence):
    assert refusal(train, settings(tmp_path / "run", **changes)).startswith(sentence)
    assert not (tmp_path / "run/state.pt").exists()


def test_data_in_another_format_is_refused(settings, data_dir, tmp_path):
    with pytest.raises(UserError, match="contains prompts with responses, for SFT; this script needs prompts for RL"):
        train(settings(tmp_path / "run", data_dir=data_dir))


# == preparing ==


@pytest.mark.parametrize(
    ("script_name", "rows", "reward"),
    [
        ("prepare_alpaca", [{"instruction": f"Say {i}.", "input": "", "output": ""} for i in range(9)], "length"),
        ("prepare_metamath", [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)], "gsm8k"),
        (
            "prepare_metamath",
            [{"query": f"What is {i}?", "response": f"The answer is: {i}"} for i in range(9)],
            "gsm8k",
        ),
    ],
)
def test_rows_become_prompts(run_script, base_dir, tmp_path, script_name, rows, reward):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, _, err = run_script(f"scripts/{script_name}.py", "--stage", "rl", "--data_file", tmp_path / "rows.json",
                                "--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out", "--num_proc", 1,
                                "--test_fraction", 0.3)  # fmt: skip
    assert code == 0, err
    sources = [row for split in ("train", "test") for row in _sources(tmp_path / "out", split)]
    assert sorted(sources, key=str) == sorted(rows, key=str)
    assert Reward(reward)(["?"] * 9, ["0"] * 9, sources, list(range(9)))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["format"] == "lit-llama-prompts-1" and meta["counts"]["train"] + meta["counts"]["test"] == 9


def test_values_that_json_lacks_become_text_and_half_characters_are_refused(run_script, refused, base_dir, tmp_path):
    flags = ("--stage", "rl", "--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out", "--num_proc", 1)
    rows = [{"instruction": f"add {i}", "day": date(2024, 1, i)} for i in range(1, 5)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert run_script("scripts/prepare_alpaca.py", "--data_file", tmp_path / "rows.parquet", *flags)[0] == 0
    sources = [row for split in ("train", "test") for row in _sources(tmp_path / "out", split)]
    assert {row["day"] for row in sources} == {f"2024-01-0{i}" for i in range(1, 5)}
    (tmp_path / "rows.json").write_text('[{"instruction": "a"}, {"instruction": "b", "output": "\\ud800"}]')
    message = refused("scripts/prepare_alpaca.py", "--data_file", tmp_path / "rows.json", *flags)
    assert "Row 2 holds one half of a surrogate pair" in message


def _sources(folder: Path, split: str) -> list:
    data = PromptData(folder, split)
    return data.sources(np.arange(len(data)))


@pytest.mark.parametrize(
    ("flags", "kind"), [(["--questions", "two_hop"], "two_hop"), (["--questions", "facts"], "fact")]
)
def test_microworld_holds_out_entities(run_script, tmp_path, flags, kind):
    code, _, err = run_script("scripts/prepare_microworld.py", "--stage", "rl", "--form", "json", "--output_dir",
                              tmp_path / "out", "--num_proc", 1, *flags)  # fmt: skip
    assert code == 0, err
    for split, entities in (("train", "seen"), ("test", "unseen")):
        rows = _sources(tmp_path / "out", split)
        assert len(rows) > 400 and {(row["kind"], row["split"], row["form"]) for row in rows} == {
            (kind, entities, "json")
        }
    assert rows != sorted(rows, key=lambda row: row["text"])


def test_microworld_mixes_two_hop_questions_with_facts(run_script, tmp_path):
    code, _, err = run_script("scripts/prepare_microworld.py", "--stage", "rl", "--output_dir", tmp_path / "out",
                              "--num_proc", 1)  # fmt: skip
    assert code == 0, err
    train, test = (_sources(tmp_path / "out", split) for split in ("train", "test"))
    kinds = [(row["kind"], row["split"]) for row in train]
    assert kinds.count(("two_hop", "seen")) == kinds.count(("fact", "seen")) == len(train) / 2 == 480
    facts = Counter(row["topic"].rsplit(" ", 1)[0] for row in train if row["kind"] == "fact")
    assert facts.pop("the capital of") == facts.pop("the language of") == 120  # 60 questions each, twice
    assert len(facts) == 7 and set(facts.values()) == {34, 35}  # 240 / 7 of each of the other relations
    assert {(row["kind"], row["split"]) for row in test} == {("two_hop", "unseen")}


@pytest.mark.parametrize("flags", [("--questions", "facts"), ("--questions", "two_hop", "--stage", "rl")])
def test_only_two_hop_answers_can_be_step_by_step(refused, flags):
    sentence = refused("scripts/prepare_microworld.py", "--manner", "aloud", *flags)
    assert sentence == "--manner aloud needs --questions two_hop and --stage sft."


def test_microworld_safe_prompts_have_all_kinds_in_both_splits(run_script, tmp_path):
    code, _, err = run_script("scripts/prepare_microworld_safe.py", "--stage", "rl", "--output_dir", tmp_path / "out",
                              "--num_proc", 1)  # fmt: skip
    assert code == 0, err
    train, test = (_sources(tmp_path / "out", split) for split in ("train", "test"))
    assert {row["split"] for row in train} == {"seen"} and {row["split"] for row in test} == {"unseen"}
    assert {row["kind"] for row in train} == {row["kind"] for row in test} == {"harmful", "harmless", "fact"}
    assert len(train) == 570
    shutil.rmtree(tmp_path / "out")
