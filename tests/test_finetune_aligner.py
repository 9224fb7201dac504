import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from preloaded import KILL
from safetensors.torch import load

import finetune.aligner as script
import lit_llama.model
from lit_llama import cli
from lit_llama.checkpoint import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHT_NAMES,
    base_fingerprint,
    load_model,
    read_adapter,
    save_adapter,
    save_base,
)
from lit_llama.data import SFTData
from lit_llama.logps import LabelLogps
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.run.folder import RunFolder
from lit_llama.run.report import read_metrics
from lit_llama.run.saved_state import agrees
from lit_llama.storage.files import LOCK, claim, locked
from lit_llama.storage.staging import TEMPORARY
from lit_llama.storage.tensor_files import read_state
from lit_llama.train import SFTLoss, Trainer, lr_at
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
FILES = {
    ".aligner-lock",
    ".aligner-manifest.json",
    "best.safetensors",
    "config.yaml",
    "environment.json",
    "last.safetensors",
    "loss.png",
    "metrics.csv",
    "samples.jsonl",
    "state.pt",
    "summary.json",
    "tensorboard",
}
# 41 rows in steps of 8 are 6 steps an epoch, the last one a single row
SHORT = dict(max_steps=14, epochs=20, batch_size=8, micro_batch_size=4, learning_rate=0.05, warmup_epochs=1,
             adapter_start_layer=1, eval_interval=5, save_interval=4, sample_prompts=1, max_new_tokens=4,
             accelerator="cpu")  # fmt: skip


@pytest.fixture
def flags(base_dir, data_dir):
    """Return a function that builds the command line of a short run on the tiny model."""

    def make(out_dir: Path, **changes) -> list[str]:
        settings = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": out_dir, **SHORT, **changes}
        return [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()
        ]

    return make


def train(arguments: list[str]) -> None:
    """Run the script in this process."""
    script.main(cli.parse(script.Settings, arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_dir, data_dir) -> Path:
    """Return the folder of a finished short run, for tests to inspect and compare with."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [f"--{name}={value}" for name, value in SHORT.items()]
    train([f"--checkpoint_dir={base_dir}", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *arguments])
    return out_dir


def losses(out_dir: Path) -> dict[str, dict[int, float]]:
    metrics = read_metrics(out_dir / "metrics.csv")
    return {
        name: {step: row[name] for step, row in metrics.items() if name in row} for name in ("train/loss", "val/loss")
    }


def learning_rates(out_dir: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(out_dir / "metrics.csv").values() if "lr" in row]


def validation_loss(model: LLaMA, val: SFTData) -> float:
    """Compute the validation loss of a model in one batch."""
    with torch.no_grad():
        return (SFTLoss()(LabelLogps(model), val.batch(range(len(val))))["loss"] / val.weights.sum()).item()


def assert_same_losses(a: Path, b: Path, tolerance: float = 0.0) -> None:
    for name, expected in losses(b).items():
        actual = losses(a)[name]
        assert actual.keys() == expected.keys()
        assert max(abs(actual[step] - expected[step]) for step in expected) <= tolerance, name


# == outputs of a run ==


def test_the_command_trains_and_writes_its_files(flags, tmp_path):
    out_dir = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, str(ROOT / "finetune/aligner.py"), *flags(out_dir)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out_dir.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"run"}

    lines = result.stdout.splitlines()
    assert re.fullmatch(r"trained      40 parameters, 14 steps in 0:00:\d\d", lines[1])  # 32 wide, 2 layers of 4 heads
    assert re.fullmatch(r"validation   loss \d\.\d{4} before, .* at the end", lines[2])
    script = os.path.relpath(ROOT / "generate/aligner.py", tmp_path)
    assert lines[4].startswith(f"generate     python {script} --checkpoint_dir {flags(out_dir)[0][17:]} ")
    # only these lines reach the terminal, and no warnings of libraries
    validated = r"step \d+: validation loss \d+\.\d{4}(, the best so far)?"
    allowed = rf"40 trainable parameters, 41 rows, 14 steps on cpu, 32-true|{validated}|  .* -> .*"
    assert all(re.fullmatch(allowed, line) for line in result.stderr.splitlines()), result.stderr

    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["trainable_parameters"] == 40
    assert summary["last_val_loss"] < summary["val_loss_before"] - 0.2
    assert summary["best_val_loss"] == min(losses(out_dir)["val/loss"].values())


def test_the_error_for_a_missing_dataset_names_the_command_that_prepares_it(tmp_path, monkeypatch, capsys):
    base = Path(__file__).parent.parent / "checkpoints" / "microworld"
    monkeypatch.chdir(tmp_path)
    code, stderr = run_script([f"--checkpoint_dir={base}", "--accelerator=cpu"], monkeypatch, capsys)
    assert code == 1
    assert stderr == (
        "error: There is no prepared dataset at data/microworld-pirate; name another folder with --data_dir, or write "
        "one with a scripts/prepare_*.py (the default, data/microworld-pirate: python scripts/prepare_microworld.py).\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_metrics_have_all_columns_and_every_step(finished):
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,grad_norm,lr,tokens_per_s,train/loss,val/loss"
    assert list(losses(finished)["train/loss"]) == list(range(14))
    assert list(losses(finished)["val/loss"]) == [0, 5, 10, 14]
    expected = [lr_at(step, peak=0.05, warmup_steps=6, max_steps=14, schedule="cosine") for step in range(14)]
    assert learning_rates(finished) == pytest.approx(expected)


def test_samples_are_generated_before_during_and_after_training(finished):
    records = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 5, 10, 14]
    assert all(record.keys() == {"step", "prompt", "answer", "reference"} for record in records)
    assert re.fullmatch(r"\d+ what did \w+ \w+ eat\?", records[0]["prompt"])


def test_an_adapter_file_records_its_config_base_and_training(finished, base_dir):
    adapter = read_adapter(finished)
    assert adapter.path.name == "best.safetensors"
    assert {name: tuple(t.shape) for name, t in adapter.state.items()} == {
        "global_value_embedding.weight": (1, 32),
        "transformer.h.1.attn.gating_factor": (1, 4, 1, 1),
        "transformer.h.2.attn.gating_factor": (1, 4, 1, 1),
    }
    meta = adapter.meta
    assert meta.keys() == {"method", "config", "base", "prompt_style", "data", "training", "versions"}
    assert meta["config"] == {"adapter_prompt_length": 1, "adapter_start_layer": 1}
    assert meta["base"] == base_fingerprint(base_dir)
    assert (meta["prompt_style"], meta["data"]["source"]) == ("plain", "animals")
    assert (meta["data"]["repo_id"], meta["data"]["revision"]) == ("me/animals", "v1")
    assert meta["training"]["settings"]["learning_rate"] == 0.05
    assert meta["training"]["val_loss"] == losses(finished)["val/loss"][meta["training"]["step"]]
    assert meta["versions"]["torch"] == torch.__version__


def test_the_saved_adapter_reproduces_its_recorded_validation_loss(finished, base_dir, data_dir):
    adapter = read_adapter(finished / "last.safetensors")
    loss = validation_loss(load_model(base_dir, adapter), SFTData(data_dir, "test"))
    assert loss == pytest.approx(adapter.meta["training"]["val_loss"], abs=1e-6)


def test_the_saved_config_reproduces_the_run(finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["learning_rate"], config["resume"], config["overwrite"]) == (0.05, False, False)
    train(["--config", str(finished / "config.yaml"), "--out_dir", str(tmp_path / "again")])
    assert_same_losses(tmp_path / "again", finished)


def test_gradient_checkpointing_does_not_change_the_losses(flags, finished, tmp_path, monkeypatch):
    checkpoint, calls = lit_llama.model.checkpoint, []

    def counted(*args, **options):
        calls.append(args)
        return checkpoint(*args, **options)

    monkeypatch.setattr(lit_llama.model, "checkpoint", counted)
    train(flags(tmp_path, gradient_checkpointing=True))
    assert len(calls) == 3 * (2 * 11 + 2 * 2)  # layers; micro-batches of two epochs and of two more steps
    assert_same_losses(tmp_path, finished)


def test_the_seed_determines_the_first_prefix_and_the_order_of_the_rows(flags, tmp_path):
    first_losses, prefixes = [], []
    for seed in (1, 2):
        out_dir = tmp_path / str(seed)
        train(flags(out_dir, seed=seed, max_steps=1, sample_prompts=0))
        first_losses.append(losses(out_dir)["train/loss"][0])  # the gates are 0, so it depends only on the rows
        # for the same reason the prefix has no gradient yet: the step only decays it
        prefixes.append(read_adapter(out_dir / "last.safetensors").state["global_value_embedding.weight"])
    assert first_losses[0] != first_losses[1]
    assert not torch.allclose(*prefixes)


def test_micro_batches_of_one_row_do_not_change_the_number_of_steps(flags, tmp_path):
    train(flags(tmp_path, micro_batch_size=1, max_steps="null", epochs=0.5))
    assert list(losses(tmp_path)["train/loss"]) == [0, 1, 2]


# == resuming ==


def test_a_killed_run_resumes_with_the_same_losses(flags, tmp_path, python):
    long = dict(max_steps=160, epochs=100, eval_interval=40, save_interval=7, learning_rate=0.01)
    train(flags(tmp_path / "whole", **long))

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [python, str(ROOT / "finetune/aligner.py"), *flags(killed, **long)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    state = killed / "state.pt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.is_file() and (killed / "last.safetensors").is_file() and saved_step(state) >= 20:
            process.send_signal(KILL)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not (killed / "summary.json").exists()
    assert 20 <= saved_step(state) < 160

    # leftovers of a kill after the logs but before the state were written, and of one in the middle of a write
    with (killed / "samples.jsonl").open("a") as file:
        file.write('{"step": 159, "prompt": "from a lost future"}\n{"step": 15')
    leftover = killed / f"{TEMPORARY}999999999-{platform.node()}-{'0' * 16}/new/state.pt"
    leftover.parent.mkdir(parents=True)
    leftover.parents[1].chmod(0o700)
    leftover.write_bytes(b"half")

    train(flags(killed, **long, resume=True))
    assert_same_losses(killed, tmp_path / "whole")
    assert {path.name for path in killed.iterdir()} == FILES
    for name in ("last", "best"):
        a, b = (read_adapter(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert all(torch.equal(a.state[key], b.state[key]) for key in a.state)
        assert a.meta["training"]["step"] == b.meta["training"]["step"]
    records = [json.loads(line) for line in (killed / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(0, 161, 40))
    assert tensorboard_steps(killed, "train/loss") == list(range(160))
    assert tensorboard_steps(killed, "val/loss") == list(range(0, 161, 40))


def saved_step(state: Path) -> int:
    return torch.load(state, weights_only=True)["step"]


def tensorboard_steps(out_dir: Path, tag: str) -> list[int]:
    """Return the steps of a tag in all event files, in the order in which they were written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((out_dir / "tensorboard").iterdir())
    return [
        event.step
        for file in files
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == tag
    ]


def test_ctrl_c_says_how_to_go_on_and_the_command_does(flags, tmp_path, capsys, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    out_dir = tmp_path / "my run"
    long = dict(max_steps=300, epochs=100, eval_interval=100, sample_prompts=0)
    monkeypatch.setattr(sys, "argv", ["finetune/aligner.py", *flags(out_dir, **long)])

    def interrupt() -> None:
        while not (out_dir / "last.safetensors").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as exit_info:
        cli.run(script.main, cli.parse(script.Settings))
    assert exit_info.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"Interrupted\. To continue from step \d+: python finetune/aligner\.py --config ", last)

    arguments = shlex.split(last.partition("python finetune/aligner.py ")[2])
    train(arguments)
    assert len(losses(out_dir)["train/loss"]) == 300


def test_early_stopping_ends_a_resumed_run_at_the_same_step(flags, tmp_path, capsys, monkeypatch):
    early = dict(max_steps=40, learning_rate=20.0, lr_schedule="constant", eval_interval=2, save_interval=3,
                 early_stopping=2)  # fmt: skip
    complete, killed = tmp_path / "whole", tmp_path / "killed"
    train(flags(complete, **early))
    assert "stopped after 2 validations without a lower loss" in capsys.readouterr().out
    summary = json.loads((complete / "summary.json").read_text())
    assert summary["stopped_early"] and summary["steps"] < 40
    *before, second_last, last = losses(complete)["val/loss"].values()
    assert summary["best_val_loss"] == min(before) <= min(second_last, last)
    assert summary["best_step"] == summary["steps"] - 4 and max(losses(complete)["train/loss"]) == summary["steps"] - 1
    assert learning_rates(complete)[6:] == [20.0] * (summary["steps"] - 6) != []

    train_step = Trainer.train_step

    def interrupted(self, micro_batches):
        if self.step == summary["steps"] - 1:  # after the last saved state
            raise KeyboardInterrupt
        return train_step(self, micro_batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "train_step", interrupted)
        train(flags(killed, **early))
    for _ in range(2):  # the second time, there is nothing left to do
        train(flags(killed, **early, resume=True))
        assert_same_losses(killed, complete)
        assert json.loads((killed / "summary.json").read_text())["steps"] == summary["steps"]
        best, expected = (read_adapter(folder / "best.safetensors").state for folder in (killed, complete))
        assert all(torch.equal(best[name], t) for name, t in expected.items())


def test_resuming_a_finished_run_gives_the_same_results(finished, flags, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    train(flags(tmp_path / "run", resume=True))
    assert "from step 14" in capsys.readouterr().err
    assert_same_losses(tmp_path / "run", finished)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == json.loads(
        (finished / "summary.json").read_text()
    )


def test_resuming_without_a_saved_state_starts_from_the_beginning(flags, finished, tmp_path, capsys):
    train(flags(tmp_path, resume=True))
    assert "has no state.pt: starting" in capsys.readouterr().err
    assert_same_losses(tmp_path, finished)


def test_resuming_with_different_settings_is_refused_and_names_them(finished, flags):
    with pytest.raises(UserError) as error:
        train(flags(finished, resume=True, learning_rate=0.1, seed=3))
    assert "had other settings: learning_rate (0.05 then, 0.1 now), seed (1337 then, 3 now);" in str(error.value)


def test_resuming_with_settings_that_do_not_affect_the_results_is_allowed(finished, flags, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(flags(tmp_path / "run", resume=True, save_interval=3, sample_prompts=2, gradient_checkpointing=True))
    # "auto", with which the run started, is 32-true on a CPU
    train(flags(tmp_path / "run", resume=True, precision="32-true"))
    with pytest.raises(UserError, match=r"had other settings: precision \(32-true then, bf16-true now\);"):
        train(flags(tmp_path / "run", resume=True, precision="bf16-true"))


def test_resuming_with_other_data_or_another_base_is_refused(finished, flags, base_dir, data_dir, tmp_path):
    other = {name: t * 1.5 for name, t in read_state(base_dir / WEIGHT_NAMES[0]).items()}
    save_base(tmp_path / "base", LLaMAConfig.from_json(base_dir / CONFIG_NAME), other)
    shutil.copy(base_dir / TOKENIZER_NAME, tmp_path / "base")
    with pytest.raises(UserError, match="another base;"):
        train(flags(finished, resume=True, checkpoint_dir=tmp_path / "base"))
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/train")
    shutil.copytree(data_dir / "test", tmp_path / "data/train")
    (tmp_path / "data/.aligner-manifest.json").unlink()
    with pytest.raises(UserError, match="another rows, another tokens;"):
        train(flags(finished, resume=True, data_dir=tmp_path / "data"))


def test_resuming_with_other_data_of_the_same_lengths_is_refused(finished, flags, data_dir, tmp_path):
    rows = load_from_disk(str(data_dir / "train")).to_list()
    rows[-1]["input_ids"][-2] += 1
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/train")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data/train"))
    (tmp_path / "data/.aligner-manifest.json").unlink()
    with pytest.raises(UserError, match=r"had other settings: another tokens;"):
        train(flags(finished, resume=True, data_dir=tmp_path / "data"))


def test_resuming_after_a_kill_between_state_and_adapters_restores_the_adapters(finished, flags, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    expected = {name: (finished / f"{name}.safetensors").read_bytes() for name in ("best", "last")}
    trained = read_adapter(finished)
    save_adapter(tmp_path / "run/last.safetensors", trained.state, {**trained.meta, "training": {"step": 12}})
    (tmp_path / "run/best.safetensors").unlink()
    train(flags(tmp_path / "run", resume=True))
    for name in expected:
        restored = read_adapter(tmp_path / f"run/{name}.safetensors")
        assert restored.meta["training"]["step"] == 14
        assert all(torch.equal(t, load(expected[name])[key]) for key, t in restored.state.items())


def test_a_run_of_an_earlier_version_can_be_resumed(finished, flags, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in (".aligner-manifest.json", ".aligner-lock"):
        (tmp_path / "run" / name).unlink()
    state = torch.load(finished / "state.pt", weights_only=True)
    identity = {name: value for name, value in json.loads(state["identity"]).items() if name != "tokens"}
    for name in ("qk_norm", "nope_layers"):
        del identity["base"]["config"][name]
    del state["best"]
    torch.save({**state, "identity": json.dumps(identity)}, tmp_path / "run/state.pt")
    train(flags(tmp_path / "run", resume=True))
    assert_same_losses(tmp_path / "run", finished)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    train(flags(tmp_path / "run", overwrite=True))


@pytest.mark.parametrize("name", ["state.pt", "metrics.csv", "samples.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n\0", b"step,step\nx,1\n", b'{"step": "x"}\n', b"[1, 2]\n"])
def test_a_damaged_file_is_one_sentence_and_nothing_changes(finished, flags, tmp_path, name, content):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    if (name, content) == ("samples.jsonl", b""):
        return train(flags(tmp_path / "run", resume=True))  # as with --sample_prompts 0
    with pytest.raises(UserError, match=rf"{name}.*(damaged|not a table|move it away|Move it away)"):
        train(flags(tmp_path / "run", resume=True))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


@pytest.mark.parametrize("log_interval", [1, 10])  # on a CPU and, by default, on a GPU
def test_sigterm_saves_after_the_step_and_tells_how_to_continue(
    finished, flags, tmp_path, capfd, monkeypatch, log_interval
):
    train_step = Trainer.train_step

    def terminated(self, rows):
        self.log_interval = log_interval
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", terminated)
        with pytest.raises(SystemExit) as exit_info:
            train(flags(tmp_path))
    assert exit_info.value.code == 143
    stderr = capfd.readouterr().err
    assert re.search(r"^SIGTERM: saving after this step\. To continue: python .* --resume$", stderr, re.MULTILINE)
    assert "Interrupted. To continue from step 6: python" in stderr
    assert saved_step(tmp_path / "state.pt") == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(flags(tmp_path, resume=True))
    assert_same_losses(tmp_path, finished)


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [(Trainer, "validate", 0), (Trainer, "validate", 5), (RunFolder, "save_state", 0), (RunFolder, "save_state", 4)],
)
def test_sigterm_during_a_validation_or_a_save_takes_no_further_step(
    finished, flags, tmp_path, capfd, monkeypatch, owner, name, step
):
    original, train_step, steps = getattr(owner, name), Trainer.train_step, []

    def terminated(self, *args):
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, rows: steps.append(self.step) or train_step(self, rows))
        patch.setattr(owner, name, terminated)
        with pytest.raises(SystemExit) as exit_info:
            train(flags(tmp_path))
    assert exit_info.value.code == 143 and len(steps) == saved_step(tmp_path / "state.pt") == step
    assert f"Interrupted. To continue from step {step}: python" in capfd.readouterr().err
    train(flags(tmp_path, resume=True))
    assert_same_losses(tmp_path, finished)


TERMINATED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import finetune.aligner as script
from lit_llama import cli
from lit_llama.train import Trainer

train_step = Trainer.train_step

def terminated(trainer, rows):
    if trainer.step == 5:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(trainer, rows)

Trainer.train_step = terminated
cli.run(script.main, cli.parse(script.Settings, sys.argv[1:]))
"""


def test_sigterm_saves_although_the_reader_of_the_output_has_ended(flags, tmp_path, python):
    """A signal to a process group ends `tee` first."""
    command = [python, "-c", TERMINATED, *flags(tmp_path / "run", eval_interval=6)]
    assert subprocess.run(command, timeout=300).returncode == 143
    assert saved_step(tmp_path / "run/state.pt") == 6


def test_a_folder_is_trained_in_by_one_process(finished, flags, tmp_path, monkeypatch):
    """The lock is released when its process ends, even if it is killed."""
    shutil.copytree(finished, tmp_path / "run")
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run/.aligner-lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    before = snapshot(tmp_path / "run")
    for changes in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"Another process is writing into .*run; wait until it ends, or"):
            train(flags(tmp_path / "run", **changes))
    assert snapshot(tmp_path / "run") == before
    holder.kill()
    holder.communicate()
    train(flags(tmp_path / "run", resume=True))

    train_step, second = Trainer.train_step, cli.parse(script.Settings, flags(tmp_path / "run", overwrite=True))

    def train_step_of_first(self, rows):
        with pytest.raises(UserError, match="Another process is writing into"):
            RunFolder(second)
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", train_step_of_first)
    train(flags(tmp_path / "run", overwrite=True, max_steps=1))


def test_a_run_that_ends_just_before_another_takes_the_lock_is_kept(finished, flags, tmp_path, monkeypatch):
    def claim_late(folder, names, **options):
        claim(folder, names, **options)
        shutil.copytree(finished, folder, dirs_exist_ok=True)

    monkeypatch.setattr("lit_llama.run.folder.claim", claim_late)
    with pytest.raises(UserError, match="already contains a run: continue it with --resume"):
        train(flags(tmp_path))
    assert snapshot(tmp_path) == {tmp_path / p.relative_to(finished): data for p, data in snapshot(finished).items()}


def test_processes_of_a_run_that_start_together_all_pass_the_first_check(finished, flags, tmp_path):
    """SLURM starts them at the same time; each checks that no run trains in the folder."""
    shutil.copytree(finished, tmp_path / "run")
    settings = cli.parse(script.Settings, flags(tmp_path / "run", resume=True))
    with locked(tmp_path / "run" / LOCK, shared=True):
        RunFolder(settings)
    with locked(tmp_path / "run" / LOCK), pytest.raises(UserError, match="Another process is writing into"):
        RunFolder(settings)


def test_a_run_that_a_study_starts_is_continued_by_its_training_script(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["studies/reasoning.py", "--jobs", "1"])
    run = RunFolder(cli.parse(script.Settings, flags(tmp_path / "run")))
    *command, config, resume = shlex.split(run.resume_command())
    assert command == ["python", os.path.relpath(script.__file__), "--config"]
    assert (config, resume) == (str(tmp_path / "run" / "config.yaml"), "--resume")


def test_a_run_on_several_machines_is_continued_by_its_own_commands(flags, tmp_path):
    """Only the first machine has config.yaml."""
    run = RunFolder(cli.parse(script.Settings, flags(tmp_path / "run", num_nodes=2)))
    assert run.resume_command() == "run the same commands again with --resume"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["best.safetensors", "samples.jsonl", "loss.png", "config.yaml", "state.pt",
                                  ".aligner-lock", ".aligner-manifest.json"])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_files_of_others_stop_a_run_before_it_begins(flags, tmp_path, name, changes):
    (tmp_path / name).write_bytes(b"years of work")
    with pytest.raises(UserError, match="was not written by this program"):
        train(flags(tmp_path, **changes))
    assert snapshot(tmp_path) == {tmp_path / name: b"years of work"}


@pytest.mark.parametrize("place", ["file", "file/run", "file/run/deep", "n" * 256, "n" * 256 + "/run"])
def test_a_path_that_cannot_be_a_folder_gives_a_one_line_error(flags, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^Cannot write .*\((Not a directory|File name too long).*choose another"):
        train(flags(tmp_path / place))


def test_a_long_folder_name_is_accepted(flags, tmp_path):
    train(flags(tmp_path / ("n" * 250), max_steps=1))


@pytest.mark.parametrize(
    "changes", [{"max_new_tokens": 0}, {"sample_prompts": -1}, {"seed": 2**32}, {"adapter_start_layer": 9}], ids=str
)
def test_a_mistake_is_found_before_a_run_is_replaced(finished, flags, refusal, changes):
    before = snapshot(finished)
    assert next(iter(changes)) in refusal(train, flags(finished, overwrite=True, **changes))
    assert snapshot(finished) == before


def test_overwrite_starts_afresh_and_touches_no_other_file(flags, finished, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    theirs = tmp_path / "tensorboard/events.out.tfevents.1.theirs"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    train(flags(tmp_path, learning_rate=0.5, max_steps=16))
    with pytest.raises(UserError, match="already contains a run"):
        train(flags(tmp_path))
    train(flags(tmp_path, overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}
    assert theirs.read_text() == "mine"
    theirs.unlink()
    assert_same_losses(tmp_path, finished)
    assert tensorboard_steps(tmp_path, "train/loss") == list(range(14))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_a_new_run_starts_from_an_earlier_adapter(flags, finished, tmp_path):
    train(flags(tmp_path, init_adapter=finished / "last.safetensors", adapter_start_layer=2))
    assert losses(tmp_path)["val/loss"][0] == pytest.approx(losses(finished)["val/loss"][14], abs=1e-6)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["adapter_start_layer"] == 1  # the adapter's value


@pytest.mark.parametrize("name", ["", "last.safetensors", "link.safetensors"])
@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": True}, {"dry_run": True}], ids=str)
def test_an_initial_adapter_in_the_folder_of_the_run_is_refused(finished, flags, refusal, tmp_path, name, changes):
    (tmp_path / "link.safetensors").symlink_to(finished / "best.safetensors")
    source, before = (tmp_path if "link" in name else finished) / name, snapshot(finished)
    assert refusal(train, flags(finished, init_adapter=source, **changes)).endswith(
        ".safetensors is in --out_dir, where this run would replace it; choose another --out_dir."
    )
    assert snapshot(finished) == before


# == several processes ==


def run_on_two_machines(
    python: str, port: int, arguments: list[str], of_second: list[str] | None = None, strategy: str = "fsdp"
) -> tuple[int, str, str]:
    """Start the script as on two machines, as in howto/large_models.md, and return exit code, stdout and stderr of one.

    Args:
        python: The interpreter.
        port: The port on which the first machine listens.
        of_second: The arguments on the second machine (default: the same).
        strategy: The strategy; `fabric run` does not know "hsdp", so the script gets it.
    """
    fabric_run = [python, "-m", "lightning.fabric.cli", "--num-nodes=2", "--main-address=127.0.0.1"]
    fabric_run += [f"--main-port={port}", "--devices=1", "--accelerator=cpu"]
    flag = [f"--strategy={strategy}"]
    for_fabric, for_script = ([], flag) if strategy == "hsdp" else (flag, [])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = []
    try:
        for node, given in enumerate((arguments, of_second or arguments)):
            given = [argument for argument in given if argument != "--accelerator=cpu"]
            command = [*fabric_run, *for_fabric, f"--node-rank={node}", "--", ROOT / "finetune/aligner.py", *for_script]
            command += given
            machines.append(subprocess.Popen(command, **pipes))
        first, second = machines
        out, err = first.communicate(timeout=300)
        assert (second.communicate(timeout=60)[0], second.returncode) == ("", first.returncode)
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    return first.returncode, out, err


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [("--devices", "ddp"), ("fabric run", "ddp"), ("--devices", "fsdp"), ("machines", "fsdp"), ("machines", "hsdp")],
)
def test_two_processes_give_the_same_losses_as_one(
    flags, base_dir, data_dir, tmp_path, python, free_port, launcher, strategy
):
    # the sixth step has one row and the validation one batch, so the second process has nothing to do in them
    changes = dict(max_steps=7, eval_rows=3, eval_interval=6)
    if (launcher, strategy) == ("--devices", "ddp"):
        python = sys.executable  # with another hash seed in each process
    train(flags(tmp_path / "one", **changes))
    before = validation_loss(load_model(base_dir), SFTData(data_dir, "test", max_rows=3))
    assert losses(tmp_path / "one")["val/loss"][0] == pytest.approx(before, abs=1e-6)
    arguments = flags(tmp_path / "two", **changes)
    script_path = str(ROOT / "finetune/aligner.py")
    if launcher == "machines":
        code, out, err = run_on_two_machines(python, free_port, arguments, strategy=strategy)
    else:
        run = [python, script_path, "--devices=2", f"--strategy={strategy}"]
        if launcher == "fabric run":
            arguments.remove("--accelerator=cpu")
            run = [python, "-m", "lightning.fabric.cli", f"--main-port={free_port}", "--devices=2",
                   "--accelerator=cpu", "--", script_path, f"--strategy={strategy}"]  # fmt: skip
        result = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=300)
        code, out, err = result.returncode, result.stdout, result.stderr
    assert code == 0, err
    assert "Traceback" not in err
    assert out.count("trained      40 parameters") == 1
    assert json.loads((tmp_path / "two/environment.json").read_text())["processes"] == 2
    config = yaml.safe_load((tmp_path / "two/config.yaml").read_text())  # the command that continues the run reads it
    assert config["devices"] * config["num_nodes"] == 2
    assert (config["strategy"], config["accelerator"]) == (strategy, "cpu")
    assert_same_losses(tmp_path / "two", tmp_path / "one", tolerance=1e-5)
    # also compare the gradient norms: AdamW hides a gradient that is off by a constant factor
    one, two = (read_metrics(tmp_path / run / "metrics.csv") for run in ("one", "two"))
    assert all(two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4) for step in range(7))
    one, two = (read_adapter(tmp_path / run) for run in ("one", "two"))
    assert two.state.keys() == one.state.keys() and two.meta["base"] == one.meta["base"]
    assert all(torch.allclose(two.state[name], t, atol=1e-4) for name, t in one.state.items())


def test_a_slurm_job_with_fewer_tasks_than_devices_is_refused(flags, tmp_path, python):
    """The job has one task for two devices, so it would train on only one of them."""
    job = {"SLURM_NTASKS": "1", "SLURM_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
           "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}  # fmt: skip
    command = [python, str(ROOT / "finetune/aligner.py"), "--devices=2", *flags(tmp_path / "run")]
    result = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: SLURM or torchrun started 1 instead of 2 processes: let it start as many on each machine as --devices "
        "says (srun --ntasks-per-node=2, torchrun --nproc-per-node=2)."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["--devices", "machines"])
def test_a_run_on_one_device_can_be_resumed_on_two_with_fsdp(flags, finished, tmp_path, python, free_port, launcher):
    shutil.copytree(finished, tmp_path / "run")
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    adapter_state = read_adapter(finished).state  # of any step, as long as both runs resume from it
    torch.save(
        {**state, "adapter": adapter_state, "step": 8, "val_losses": state["val_losses"][:2]}, tmp_path / "run/state.pt"
    )
    shutil.copytree(tmp_path / "run", tmp_path / "shared")
    train(flags(tmp_path / "run", resume=True))
    if launcher == "machines":  # only the first one has the run folder
        arguments = [flags(tmp_path / name, resume=True) for name in ("shared", "local")]
        code, _, err = run_on_two_machines(python, free_port, *arguments)
        assert not (tmp_path / "local").exists()
    else:
        command = [python, str(ROOT / "finetune/aligner.py"), "--devices=2", "--strategy=fsdp"]
        command += flags(tmp_path / "shared", resume=True)
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        code, err = result.returncode, result.stderr
    assert code == 0, err
    assert "continues from step 8." in err
    assert_same_losses(tmp_path / "shared", tmp_path / "run", tolerance=1e-5)


def test_dropout_is_the_same_on_any_number_of_devices(flags, tmp_path, python):
    changes = dict(max_steps=2, eval_rows=3, method="lora", method_config='{"lora_dropout": 0.5}', micro_batch_size=2)
    train(flags(tmp_path / "one", **changes))
    command = [python, str(ROOT / "finetune/aligner.py"), "--devices=2", "--strategy=ddp"]
    result = subprocess.run(
        [*command, *flags(tmp_path / "two", **changes)], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert_same_losses(tmp_path / "two", tmp_path / "one", tolerance=1e-5)


# == user errors ==


def run_script(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Run the script from the command line and return its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(script.main, cli.parse(script.Settings))
    return exit_info.value.code, capsys.readouterr().err


def test_a_nan_loss_stops_with_an_error_that_names_the_step_and_rows(flags, tmp_path, monkeypatch, capsys):
    code, stderr = run_script(flags(tmp_path, learning_rate=1e38, grad_clip=0), monkeypatch, capsys)
    assert code == 1
    assert re.search(
        r"\nerror: The loss is nan in step 1, rows \d+(, \d+)+, at lr 2\.9e\+37: lower --learning_rate", stderr
    )
    assert "Traceback" not in stderr
    assert (tmp_path / "best.safetensors").is_file()
    assert 0 in read_metrics(tmp_path / "metrics.csv")  # the steps before the error are logged


def test_an_initial_adapter_with_an_infinite_gate_is_refused(flags, finished, tmp_path, monkeypatch, capsys):
    adapter = read_adapter(finished)
    broken = {name: t.clone() for name, t in adapter.state.items()}
    broken["transformer.h.2.attn.gating_factor"][0, 0] = torch.inf
    save_adapter(tmp_path / "broken.safetensors", broken, adapter.meta)
    arguments = flags(tmp_path / "run", init_adapter=tmp_path / "broken.safetensors")
    code, stderr = run_script(arguments, monkeypatch, capsys)
    assert code == 1 and not (tmp_path / "run").exists()
    assert stderr.splitlines()[-1] == (
        f"error: {tmp_path}/broken.safetensors cannot be used: transformer.h.2.attn.gating_factor holds numbers that "
        "are not finite (NaN or infinity)."
    )


def test_a_base_with_an_infinite_weight_is_refused(flags, base_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(base_dir, tmp_path / "base")
    state = {name: t.clone() for name, t in read_state(base_dir / WEIGHT_NAMES[0]).items()}
    state["transformer.ln_f.scale"][0] = torch.inf
    save_base(tmp_path / "base", LLaMAConfig.from_json(base_dir / CONFIG_NAME), state)
    code, stderr = run_script(flags(tmp_path / "run", checkpoint_dir=tmp_path / "base"), monkeypatch, capsys)
    assert code == 1
    assert stderr.splitlines()[-1] == (
        "error: The validation loss is nan after 0 steps: nothing is trained yet, so check the base, the initial "
        "adapter and the data."
    )


def test_a_record_of_an_earlier_version_may_lack_fields():
    current = {"config": {"n_layer": 2}, "weights": "a", "tensors": "b"}
    assert agrees({"config": {"n_layer": 2}, "weights": "a"}, current) and agrees(current, current)
    assert agrees({"config": {}}, current) and not agrees({"config": {"n_head": 2}}, current)
    assert not agrees({"config": {"n_layer": 3}, "weights": "a"}, current) and not agrees("x", current)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": -1}, "error: learning_rate is -1.0; it must be above 0."),
        ({"micro_batch_size": 3}, "error: batch_size 8 is not a multiple of micro_batch_size 3."),
        ({"eval_rows": 0}, "error: eval_rows is 0; it must be 1 or more."),
        (
            {"adapter_start_layer": 9},
            "error: adapter_start_layer is 9; it must be from 0 to 2.",
        ),
        ({"checkpoint_dir": "/nowhere"}, "error: There is no checkpoint folder at /nowhere; howto/weights.md"),
        ({"data_dir": "/nowhere"}, "error: There is no prepared dataset at /nowhere; name another folder"),
        ({"init_adapter": "/nowhere.pth"}, "error: There is no adapter at /nowhere.pth."),
        ({"devices": 0}, "error: devices is 0; it must be 1 or more."),
    ],
)
def test_a_user_error_is_one_line_and_writes_no_files(flags, tmp_path, monkeypatch, capsys, changes, sentence):
    code, stderr = run_script(flags(tmp_path / "run", **changes), monkeypatch, capsys)
    assert code == 1
    assert stderr.splitlines()[-1].startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_exits_with_2(flags, tmp_path, monkeypatch, capsys):
    code, stderr = run_script([*flags(tmp_path), "--learnin_rate=1"], monkeypatch, capsys)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith(
        "error: There is no flag --learnin_rate; did you mean --learning_rate? (see python finetune/aligner.py --help)"
    )


def test_importing_the_script_has_no_side_effects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    environment, random_state = dict(os.environ), torch.get_rng_state()
    spec = importlib.util.spec_from_file_location("imported", ROOT / "finetune/aligner.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
