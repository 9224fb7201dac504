import csv
import fcntl
import json
import math
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from torch.nn import functional as F

from lit_llama import aligner, train
from lit_llama.checkpoint import load_model
from lit_llama.console import transient_bar
from lit_llama.data import SFTData
from lit_llama.logps import LabelLogps
from lit_llama.run import setup
from lit_llama.run.folder import NAMES, RunFolder
from lit_llama.run.processes import full_gpu_explained
from lit_llama.run.report import MetricsLog, Progress, note_untrained, plot_metrics, read_metrics, write_above_bar
from lit_llama.run.setup import FABRIC_RUN, FABRIC_RUN_FLAGS, Setup, adamw, make_fabric, with_launcher_flags
from lit_llama.run.steps import Batches, steps_between_reads
from lit_llama.run.train_settings import FinetuneSettings, TrainSettings
from lit_llama.storage.files import claim, write_text
from lit_llama.train import SFTLoss, Trainer, lr_at
from lit_llama.utils import UserError


@dataclass
class Settings(TrainSettings):
    epochs: float = 1.0
    batch_size: int = 8
    micro_batch_size: int = 4
    learning_rate: float = 1.0
    warmup_epochs: float = 0.0
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    eval_interval: int = 100
    save_interval: int = 100
    seed: int = 0
    accelerator: str = "cpu"
    precision: str = "32-true"


@dataclass
class FrozenBase(Settings, FinetuneSettings):
    checkpoint_dir: Path = Path("base")
    data_dir: Path = Path("data")


def trainer_for(base_dir, data_dir, out_dir, precision="32-true", make_optimizer=adamw, length=2, **changes):
    """Return a trainer for an Aligner with nonzero gates."""
    settings = FrozenBase(out_dir=out_dir, precision=precision, **changes)
    fabric = make_fabric(settings)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    method_config = {"adapter_prompt_length": length, "adapter_start_layer": 1}
    torch.manual_seed(0)
    model = load_model(base_dir, method="aligner", method_config=method_config, dtype=dtype)
    for attn in toys.prefix_layers(model):
        torch.nn.init.normal_(attn.gating_factor)
    aligner.mark_only_adapter_as_trainable(model)
    train, val = SFTData(data_dir, "train"), SFTData(data_dir, "test")
    setup = Setup.wrap(fabric, model, [make_optimizer(model, settings)], {"method": "aligner", "base": {}})
    return Trainer(setup, train, val, SFTLoss(), RunFolder(settings))


def plain_sgd(model, settings):
    """Return plain SGD: the size of a step is the learning rate times the gradient."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


# == the learning rate ==


def test_warmup_rises_linearly_to_the_peak():
    rates = [lr_at(step, peak=10.0, warmup_steps=4, max_steps=100) for step in range(6)]
    assert rates == pytest.approx([2.0, 4.0, 6.0, 8.0, 10.0, 10.0])


def test_constant_schedule_keeps_the_peak_to_the_last_step():
    assert lr_at(99, peak=9e-3, warmup_steps=4, max_steps=100, schedule="constant") == 9e-3


def test_cosine_schedule_halves_in_the_middle_and_ends_near_zero():
    def rate(step):
        return lr_at(step, peak=2.0, warmup_steps=4, max_steps=14, schedule="cosine")

    assert rate(4) == pytest.approx(2.0)
    assert rate(9) == pytest.approx(1.0)
    assert rate(13) == pytest.approx(1 + math.cos(0.9 * math.pi))  # nine tenths of the way down
    assert all(rate(step) > rate(step + 1) for step in range(4, 13))


def test_without_warmup_the_schedule_starts_at_the_peak():
    assert lr_at(0, peak=3.0, warmup_steps=0, max_steps=1, schedule="cosine") == 3.0


def test_a_run_that_ends_during_warmup_never_reaches_the_peak():
    assert lr_at(9, peak=1.0, warmup_steps=19, max_steps=10, schedule="cosine") == pytest.approx(0.5)


# == settings ==


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0."),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be a number."),
        ({"epochs": math.inf}, "epochs is inf; it must be below inf."),
        ({"max_steps": 0}, "max_steps is 0; it must be 1 or more."),
        ({"eval_interval": 0}, "eval_interval is 0; it must be 1 or more."),
        ({"grad_clip": -2.0}, "grad_clip is -2.0; it must be 0 or more."),
        ({"seed": -1}, "seed is -1; it must be 0 or more."),
        ({"seed": 2**32}, "seed is 4294967296; it must be at most 4294967295."),
        ({"num_nodes": 0}, "num_nodes is 0; it must be 1 or more."),
        ({"micro_batch_size": 3}, "batch_size 8 is not a multiple of micro_batch_size 3."),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite cannot be combined."),
        (
            {"batch_size": 0, "warmup_epochs": -1.0},
            "batch_size is 0; it must be 1 or more. warmup_epochs is -1.0; it must be 0 or more.",
        ),
    ],
)
def test_an_invalid_setting_raises_a_clear_error(tmp_path, changes, sentence):
    with pytest.raises(UserError) as error:
        Settings(out_dir=tmp_path, **changes)
    assert str(error.value) == sentence


def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(tmp_path):
    claim(tmp_path, NAMES)
    (tmp_path / "state.pt").touch()
    with pytest.raises(UserError, match="already contains a run: continue it with --resume, replace it with"):
        RunFolder(Settings(out_dir=tmp_path))


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_whose_state_was_deleted_can_only_be_overwritten(tmp_path, resume):
    claim(tmp_path, NAMES)
    (tmp_path / "last.safetensors").touch()
    with pytest.raises(UserError, match=r"without its state\.pt, which cannot be resumed; replace it with --overwrite"):
        RunFolder(Settings(out_dir=tmp_path, resume=resume))
    RunFolder(Settings(out_dir=tmp_path, overwrite=True))


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ("fsdp", "--strategy fsdp shards a frozen base, and here the base is trained; use ddp."),
        (
            "ddp_spawn",
            "'ddp_spawn' .* is not supported; use 'ddp' for several devices with a complete base each, or 'fsdp'",
        ),
        ("nonsense", "Fabric refuses these settings"),
    ],
)
def test_an_unsupported_strategy_raises_a_clear_error(tmp_path, strategy, sentence):
    with pytest.raises(UserError, match=sentence):
        make_fabric(Settings(out_dir=tmp_path, strategy=strategy, devices=2))


def test_an_incomplete_launcher_environment_raises_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(
        UserError, match="variables of SLURM or torchrun, but not SLURM_NODEID: start the script with srun"
    ):
        make_fabric(Settings(out_dir=tmp_path, devices=2))


@pytest.mark.parametrize(
    ("kind", "precision", "sentence"),
    [
        (FrozenBase, "16-true", "precision 16-true is not supported; use 32-true, bf16-true, bf16-mixed"),
        (Settings, "bf16-true", "bf16-true is not supported where the base is trained; use 32-true, bf16-mixed"),
    ],
)
def test_a_precision_that_cannot_train_is_refused(tmp_path, kind, precision, sentence):
    with pytest.raises(UserError, match=sentence):
        make_fabric(kind(out_dir=tmp_path, precision=precision))


@pytest.mark.parametrize(("kind", "precision"), [(FrozenBase, "bf16-true"), (Settings, "bf16-mixed")])
def test_the_default_precision_on_a_gpu_keeps_trained_weights_in_fp32(tmp_path, monkeypatch, kind, precision):
    monkeypatch.setattr(setup, "computes_bf16", lambda accelerator: True)
    assert make_fabric(kind(out_dir=tmp_path, precision="auto")).strategy.precision.precision == precision


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (Settings, "lower --micro_batch_size"),
        (
            FrozenBase,
            "set --gradient_checkpointing, which --resume accepts, or lower --micro_batch_size, or set --quantize nf4",
        ),
        (dict(strategy="fsdp"), "set --gradient_checkpointing, which --resume accepts, or lower --micro_batch_size"),
        (dict(gradient_checkpointing=True, compile=True), "lower --micro_batch_size"),
        (dict(gradient_checkpointing=True, quantize="int8", micro_batch_size=1),
         "use more devices, shorter rows or a smaller base"),
    ],
)  # fmt: skip
def test_the_advice_for_a_full_gpu_names_flags_that_the_script_has_and_that_are_not_set(tmp_path, kind, advice):
    settings = FrozenBase(out_dir=tmp_path, **kind) if isinstance(kind, dict) else kind(out_dir=tmp_path)
    with pytest.raises(UserError, match=f"^Training .* GPU: {advice}\\.$"), full_gpu_explained(settings):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("changes", [{}, {"quantize": "nf4"}, {"compile": True}, {"strategy": "fsdp"}])
def test_a_base_that_does_not_fit_is_named(tmp_path, changes):
    advice = "use more devices or a smaller base"
    if not changes:  # the others cannot be combined
        advice = "shard it over several GPUs with --strategy fsdp and --devices, or set --quantize nf4"
    with pytest.raises(UserError, match=f"^The base .* GPU: {advice}\\.$"):
        with full_gpu_explained(FrozenBase(out_dir=tmp_path, **changes), "The base"):
            raise torch.OutOfMemoryError


def test_fabric_run_passes_its_flags_in_environment_variables(tmp_path, python):
    script = tmp_path / "print_environment.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    flags = {"accelerator": "cpu", "devices": "1", "num_nodes": "1", "strategy": "ddp", "precision": "bf16-mixed"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [python, "-m", "lightning.fabric.cli", *words, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    environment = json.loads(done.stdout)
    assert environment[FABRIC_RUN] == "1"
    assert {name: environment[variable] for name, variable in FABRIC_RUN_FLAGS.items()} == flags


def test_fabric_run_settings_override_the_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_DEVICES", "1")
    monkeypatch.setenv("LT_NUM_NODES", "1")
    monkeypatch.setenv("LT_PRECISION", "bf16")  # Fabric's short name
    settings = with_launcher_flags(Settings(out_dir=tmp_path, devices=4))
    assert (settings.devices, settings.num_nodes, settings.precision) == (1, 1, "bf16-mixed")
    fabric = make_fabric(settings)
    assert (fabric.world_size, fabric.strategy.precision.precision) == (1, "bf16-mixed")
    monkeypatch.setenv("LT_ACCELERATOR", "gpu")
    assert with_launcher_flags(settings).accelerator in ("cuda", "mps")  # names that --accelerator takes


def test_rows_longer_than_the_context_are_refused_before_training(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path)
    trainer.unwrapped.config = replace(trainer.unwrapped.config, block_size=40)
    setup = Setup(trainer.fabric, trainer.model, trainer.optimizers, {})
    with pytest.raises(UserError, match="A training row has 50 tokens and the model's context is 40"):
        Trainer(setup, trainer.train, trainer.val, trainer.loss, trainer.run)


# == one step ==


def hand_computed_gradients(model, data: SFTData, rows: list[int]) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss over all label tokens of the rows, computed row by row from full logits."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(data.rows[row]["input_ids"]).long()
        first = int(data.rows[row]["prompt_length"])
        logps = F.log_softmax(model(ids[None])[0].double(), dim=-1)
        for position in range(first, len(ids)):
            total, count = total - logps[position - 1, ids[position]], count + 1
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trainable, torch.autograd.grad(total / count, list(trainable.values())), strict=True))


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_gradient_of_a_step_is_the_mean_over_its_tokens_for_any_micro_batch_size(
    base_dir, data_dir, tmp_path, micro_batch_size
):
    trainer = trainer_for(base_dir, data_dir, tmp_path, make_optimizer=plain_sgd, micro_batch_size=micro_batch_size)
    rows = [3, 9, 18, 0, 32, 40, 23, 1]  # 11 to 30 labels each
    assert len({trainer.train.weights[row] for row in rows}) > 4
    expected = hand_computed_gradients(trainer.unwrapped, trainer.train, rows)
    before = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    trainer.train_step(np.split(np.array(rows), len(rows) // micro_batch_size))
    assert max(g.abs().max() for g in expected.values()) > 1e-2
    for name, p in trainer.trainable.items():
        torch.testing.assert_close(before[name] - p.detach(), expected[name], atol=1e-6, rtol=0)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path)
    micro_batches = [np.array([3, 9]), np.array([18])]
    sums, counts = 0.0, 0
    for rows in micro_batches:
        batch = trainer.train.batch(rows)
        logits = trainer.unwrapped(batch["idx"])[:, :-1].double()
        sums += F.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-1, reduction="sum"
        )
        counts += int((batch["labels"] != -1).sum())
    (metrics,) = trainer.read([trainer.train_step(micro_batches)])
    assert metrics["train/loss"] == pytest.approx((sums / counts).item(), rel=1e-6)


def test_the_learning_rate_of_a_group_is_scaled(base_dir, data_dir, tmp_path):
    def two_groups(model, settings):
        gates = [attn.gating_factor for attn in toys.prefix_layers(model)]
        groups = [{"params": [model.global_value_embedding.weight]}, {"params": gates, "lr_scale": 0.1}]
        return torch.optim.SGD(groups, lr=0.0)

    trainer = trainer_for(base_dir, data_dir, tmp_path, make_optimizer=two_groups, learning_rate=0.5)
    expected = hand_computed_gradients(trainer.unwrapped, trainer.train, [3, 9, 18])
    before = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    (metrics,) = trainer.read([trainer.train_step([np.array([3, 9, 18])])])
    for name, p in trainer.trainable.items():
        lr = 0.05 if name.endswith("gating_factor") else 0.5
        torch.testing.assert_close(before[name] - p.detach(), lr * expected[name], atol=1e-6, rtol=0)
    assert metrics["lr"] == 0.5


def test_clipping_bounds_the_gradient_and_reports_its_norm(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path, make_optimizer=plain_sgd, grad_clip=0.01)
    before = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    (metrics,) = trainer.read([trainer.train_step([np.arange(8)])])
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in trainer.trainable.items()])
    assert metrics["grad_norm"] > 0.02
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_applies_to_the_prefix_but_not_to_the_gates(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path, weight_decay=0.02)
    decay = {
        id(p): group["weight_decay"] for o in trainer.optimizers for group in o.param_groups for p in group["params"]
    }
    names = {name: decay[id(p)] for name, p in trainer.trainable.items()}
    assert names == {
        "global_value_embedding.weight": 0.02,
        "transformer.h.1.attn.gating_factor": 0.0,
        "transformer.h.2.attn.gating_factor": 0.0,
    }


def test_with_bf16_the_optimizer_keeps_fp32_and_small_updates_survive(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path, precision="bf16-true", learning_rate=1e-4)
    frozen = [p for p in trainer.unwrapped.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    updated = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in updated} == {id(p) for p in trainer.trainable.values()}
    assert {p.dtype for p in updated} == {torch.float32}
    prefix = trainer.trainable["global_value_embedding.weight"]
    before = prefix.detach().clone()
    trainer.train_step([np.arange(8)])
    moved = (prefix.detach() - before).abs()
    # AdamW's first step equals the learning rate wherever the gradient is nonzero
    assert ((moved > 0.9e-4) & (moved < 1.1e-4)).float().mean() > 0.95
    large = before.abs() > 0.1
    assert (before[large].bfloat16() + (prefix.detach() - before)[large].bfloat16() == before[large].bfloat16()).all()
    assert {state["exp_avg"].dtype for o in trainer.optimizers for state in o.state.values()} == {torch.float32}


def test_metrics_read_for_several_steps_at_once_are_those_of_each_step(base_dir, data_dir, tmp_path, monkeypatch):
    """As on a GPU: metrics are read every `log_interval` steps, and batches are built in a thread."""
    read, reads, runs = train.read_metrics, [], []
    monkeypatch.setattr(train, "read_metrics", lambda fabric, steps: reads.append(len(steps)) or read(fabric, steps))
    for interval in (1, 3):
        out_dir = tmp_path / str(interval)
        trainer = trainer_for(base_dir, data_dir, out_dir, epochs=2.0, eval_interval=4, learning_rate=0.01)
        trainer.log_interval, trainer.batches = interval, Batches(trainer.train, trainer.fabric, ahead=interval > 1)
        trainer.fit()
        assert not trainer.batches.ready
        rows = csv.DictReader((out_dir / "metrics.csv").open())
        runs.append([{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows])
    assert runs[0] == runs[1] and len(runs[0]) == 13
    assert reads == [1] * 12 + [3, 1] * 3


@pytest.mark.parametrize(("device", "processes", "steps"), [("cuda", 1, 10), ("cuda", 8, 1), ("cpu", 1, 1)])
def test_several_processes_read_each_step_to_agree_on_the_last(device, processes, steps):
    fabric = SimpleNamespace(device=torch.device(device), world_size=processes)
    assert steps_between_reads(fabric, 10) == steps


def test_each_micro_batch_has_its_own_random_numbers(base_dir, data_dir, tmp_path):
    """On a CPU, PyTorch's generator ignores the high 32 bits of a seed."""
    trainer, drawn, loss = trainer_for(base_dir, data_dir, tmp_path, seed=3), [], SFTLoss()
    trainer.loss = lambda model, batch: drawn.append(torch.rand(4)) or loss(model, batch)
    for trainer.step in (5, 6):
        trainer.train_step(np.split(np.arange(8), 4))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 8
    torch.manual_seed(3 * 1_000_003 + 5)  # the results of studies depend on the first one
    assert torch.equal(drawn[0], torch.rand(4))


def test_a_nonfinite_loss_reports_step_and_rows_and_changes_no_parameters(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path)
    trainer.step = 7
    healthy = {name: p.detach().clone() for name, p in trainer.trainable.items()}
    loss = trainer.loss

    def broken(model, batch):
        return {"loss": loss(model, batch)["loss"] * (math.inf if batch["idx"].size(0) == 3 else 1.0)}

    trainer.loss = broken
    with pytest.raises(UserError, match=r"^The loss is inf in step 7, rows 20, 21, 22, at lr 1\.0e\+00: lower"):
        trainer.read([trainer.train_step([np.array([1, 2]), np.array([20, 21, 22])])])
    assert all(torch.equal(p.detach(), healthy[name]) for name, p in trainer.trainable.items())


def test_every_row_is_seen_once_per_epoch_and_resuming_skips_finished_steps(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path, epochs=2.5)
    assert trainer.steps_per_epoch == 6  # 41 rows in steps of 8
    plan = []
    for micro_batches in trainer.remaining_steps():
        plan.append([m.tolist() for m in micro_batches])
        trainer.step += 1
    assert len(plan) == 15
    for epoch in (plan[:6], plan[6:12]):
        assert sorted(row for step in epoch for m in step for row in m) == list(range(41))
    assert plan[:6] != plan[6:12]
    trainer.step = 8
    rest = []
    for micro_batches in trainer.remaining_steps():
        rest.append([m.tolist() for m in micro_batches])
        trainer.step += 1
    assert rest == plan[8:]


def test_validation_is_the_mean_over_all_labels_and_is_deterministic(base_dir, data_dir, tmp_path):
    trainer = trainer_for(base_dir, data_dir, tmp_path)
    val, model = trainer.val, LabelLogps(trainer.unwrapped)
    with torch.no_grad():
        total = sum(trainer.loss(model, val.batch(np.array([row])))["loss"].double() for row in range(len(val)))
    first = trainer.validate()["loss"]
    assert first == pytest.approx((total / val.weights.sum()).item(), rel=1e-6)
    assert trainer.validate()["loss"] == first
    assert trainer.unwrapped.training


# == metrics and progress ==


def test_metrics_have_one_unrounded_row_per_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    log.log(0, {"val/loss": 1 / 3})
    log.log(0, {"train/loss": 0.1 + 0.2, "lr": 1e-30})
    log.log(1, {"train/loss": 2.0, "lr": 3.0})
    assert not log.path.exists()  # not written at every step
    log.save()
    with log.path.open(newline="") as file:
        assert next(csv.reader(file)) == ["step", "lr", "train/loss", "val/loss"]
    assert read_metrics(log.path) == {
        0: {"val/loss": 1 / 3, "train/loss": 0.1 + 0.2, "lr": 1e-30},
        1: {"train/loss": 2.0, "lr": 3.0},
    }


def test_metrics_are_saved_automatically_after_an_interval(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    log.written -= log.interval + 1
    log.log(0, {"lr": 1.0})
    assert read_metrics(log.path) == {0: {"lr": 1.0}}


def test_a_figure_shows_the_name_of_a_folder_as_it_is(tmp_path):
    """Between two dollars, matplotlib expects a formula."""
    write_text(tmp_path / "metrics.csv", "step,train/loss\n0,2.0\n1,1.0\n")
    plot_metrics(tmp_path / "metrics.csv", tmp_path / "loss.png", {"loss": ["loss"]}, "out/$USER_$DATE")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("best_step", "steps", "noted"), [(0, 5, True), (5, 5, False), (0, 0, False)])
def test_a_run_that_improved_nothing_is_noted(best_step, steps, noted, capsys):
    note_untrained({"best_step": best_step, "steps": steps})
    assert ("best.safetensors is the initial adapter" in capsys.readouterr().err) == noted


def test_resuming_metrics_drops_rows_after_the_saved_state(tmp_path):
    log = MetricsLog(tmp_path / "metrics.csv")
    for step in range(6):
        log.log(step, {"train/loss": float(step)})
    log.log(3, {"val/loss": 9.0})  # validated, then saved, then trained on
    log.save()
    later = MetricsLog(log.path)
    later.resume(3)
    assert later.rows == {0: {"train/loss": 0.0}, 1: {"train/loss": 1.0}, 2: {"train/loss": 2.0}, 3: {"val/loss": 9.0}}
    later.resume(2)
    assert later.rows == {0: {"train/loss": 0.0}, 1: {"train/loss": 1.0}}


def test_a_terminal_shows_a_progress_bar(monkeypatch):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(2, 4, enabled=True) as progress:
            time.sleep(0.11)  # a bar is drawn ten times a second at most
            progress.advance([{"train/loss": 0.5, "lr": 1e-2, "tokens_per_s": 1000.0}])
            assert list(transient_bar([1, 2], "Validation", "batch")) == [1, 2]  # too short for a bar
            for seconds in transient_bar([2.1, 0.11], "Validation", "batch"):
                time.sleep(seconds)
            write_above_bar("step 3: something")
        output = b""
        while select.select([master], [], [], 1.0)[0]:  # a terminal delivers its output in pieces
            output += os.read(master, 10_000)
    os.close(master)
    output = output.decode()
    assert re.search(r"75%\|.*\| 3/4 \[00:0\d<00:0\d, .*step/s, loss 0\.500, lr 1\.00e-02, 1,000 tokens/s\]", output)
    assert output.count("Validation: ") == 2
    assert re.search(r"\rValidation: 100%\|[^\r]*\| 2/2 \[[^\r]*\r\n\r +\x1b\[A", output)  # and is then cleared
    assert "\rstep 3: something\r\n" in output


def test_a_log_file_gets_plain_lines_at_intervals(capsys):
    assert not sys.stderr.isatty()
    progress = Progress(2, 12, enabled=True)
    progress.advance([{"train/loss": 0.5, "lr": 1e-2, "tokens_per_s": 1000.0}])
    assert capsys.readouterr().err == ""  # too soon
    progress.began -= 20.0
    progress.shown -= 20.0
    read_together = [{"train/loss": loss, "lr": 1e-2, "tokens_per_s": 1234.0} for loss in (0.75, 0.5, 0.25)]
    progress.advance(read_together)
    assert capsys.readouterr().err == "step 6 of 12: loss 0.250, lr 1.00e-02, 1,234 tokens/s, 0:00:30 left\n"
