"""A base sharded over two processes with gloo: results match those of one process, and each uses half of its memory."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys

from lit_llama.answer_settings import AnswerSettings
from lit_llama.checkpoint import save_adapter, save_base
from lit_llama.compose import load_with_bank
from lit_llama.methods import METHODS
from lit_llama.model import LLaMAConfig
from lit_llama.run.setup import with_launcher_flags
from lit_llama.run.train_settings import FinetuneSettings
from lit_llama.sharding import check_shardable, in_step, is_sharded, only_assists
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
REQUIRED: dict = {name: Path(name) for name in ("out_dir", "checkpoint_dir", "data_dir")}
REQUIRED |= dict(epochs=1.0, batch_size=1, micro_batch_size=1, learning_rate=1.0, warmup_epochs=0.0, eval_interval=1,
                 save_interval=1)  # fmt: skip
START = f"""
import json, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import toys
from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.console import exit_on_user_error
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA
from lit_llama.run.processes import base_mesh, launch_sharded, together
from lit_llama.sharding import average_gradients, in_step, is_sharded, only_assists
from lit_llama.storage.files import explained
from lit_llama.utils import UserError
from lit_llama.variant import mark_only_adapter_as_trainable

folder = Path(sys.argv[1])
fabric = launch_sharded("cpu", 2)
rank, mesh = fabric.global_rank, base_mesh(fabric, "fsdp")

def own_bytes(model):
    return sum(getattr(p, "to_local", lambda p=p: p)().nbytes for n, p in model.named_parameters()
               if not model.is_adapter_parameter(n))

def report(values):
    (folder / f"report-{{rank}}.json").write_text(json.dumps(values))
"""


def run(python: str, folder: Path, script: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    """Run a script in two processes. Return the report of each, and the completed first process."""
    (folder / "script.py").write_text(START + script)
    done = subprocess.run([python, folder / "script.py", folder], capture_output=True, text=True, timeout=300)
    paths = [folder / f"report-{rank}.json" for rank in (0, 1)]
    return [json.loads(path.read_text()) for path in paths if path.exists()], done


NUMBERS = """
said = {}
for case in json.loads((folder / "cases.json").read_text()):
    dtype = getattr(torch, case["dtype"])
    adapter = read_adapter(folder / case["name"] / "adapter.safetensors")
    one = load_model(folder / case["name"], adapter, dtype=dtype)
    two = load_model(folder / case["name"], adapter, dtype=dtype, mesh=mesh)
    idx, labels = toys.token_ids(3, 12, seed=rank), toys.token_ids(3, 12, seed=9)
    labels[:, :5] = -1
    equal = {"sharded": is_sharded(two) and not is_sharded(one)}
    gradients = {}
    for model in (one, two):
        mark_only_adapter_as_trainable(model)
        model.gradient_checkpointing = case["gradient_checkpointing"]
        for scale in (1, 2):  # micro-batches
            (scale * model.label_logps(idx, labels)).sum().backward()
        gradients[model] = {n: p.grad.clone() for n, p in model.adapter_parameters().items()}
        for p in model.adapter_parameters().values():
            p.grad = None
        model(idx).float().logsumexp(-1).sum().backward()  # through the logits
        gradients[model] |= {"logits, " + n: p.grad.clone() for n, p in model.adapter_parameters().items()}
    equal["gradients"] = all(torch.equal(g, gradients[two][n]) for n, g in gradients[one].items())
    equal["there are gradients"] = all(g.abs().sum() > 0 for g in gradients[one].values())
    with torch.no_grad():
        equal["logits"] = torch.equal(one(idx), two(idx))
        equal["logps"] = torch.equal(one.label_logps(idx, labels), two.label_logps(idx, labels))

    # each process has other prompts, and makes another number of passes
    prompts = toys.prompts(3, 9, 30, seed=rank)[: 1 + 2 * rank]
    sampling = Sampling(4 + 5 * rank, temperature=1.0)
    with in_step(two):
        answers = generate(two, prompts, sampling)
    equal["answers"] = answers == generate(one, prompts, sampling)
    with in_step(two):
        if rank == 0:
            equal["alone"] = generate(two, prompts, sampling) == answers

    average_gradients(fabric, two)
    for n, p in two.adapter_parameters().items():
        first, second = (fabric.broadcast(gradients[one]["logits, " + n], src=source) for source in (0, 1))
        equal["mean, " + n] = torch.allclose(p.grad, (first + second) / 2, rtol=1e-6)
    unused, *others = two.adapter_parameters().values()
    before, unused.grad = [p.grad.clone() for p in others], None
    average_gradients(fabric, two)
    equal["no gradient"] = unused.grad is None
    equal["means of equal gradients"] = all(torch.equal(p.grad, g) for p, g in zip(others, before))
    said[case["name"] + " " + case["dtype"]] = {"equal": equal, "bytes": [own_bytes(one), own_bytes(two)]}
report(said)
"""
CASES = [("mha", "float32", False), ("tied", "float32", True), ("biases", "bfloat16", False),
         ("tied", "bfloat16", False), ("gqa", "bfloat16", True)]  # fmt: skip


@pytest.fixture(scope="module")
def numbers(tmp_path_factory, python) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharded")
    for name in dict.fromkeys(name for name, *_ in CASES):
        model = toys.aligned(length=3, **toys.ARCHITECTURES[name])
        adapter = toys.adapter_state(model)
        base = {n: t for n, t in model.state_dict().items() if n not in adapter}
        save_base(folder / name, LLaMAConfig(**toys.SIZES, **toys.ARCHITECTURES[name]), base)
        meta = {"method": "aligner", "config": {"adapter_prompt_length": 3, "adapter_start_layer": 1}}
        save_adapter(folder / name / "adapter.safetensors", adapter, meta)
    cases = [dict(zip(("name", "dtype", "gradient_checkpointing"), case, strict=True)) for case in CASES]
    (folder / "cases.json").write_text(json.dumps(cases))
    reports, done = run(python, folder, NUMBERS)
    assert done.returncode == 0, done.stderr
    return reports


@pytest.mark.parametrize("case", [f"{name} {dtype}" for name, dtype, _ in CASES])
def test_two_processes_match_one_bit_for_bit(numbers, case):
    for report in numbers:
        assert [name for name, is_equal in report[case]["equal"].items() if not is_equal] == []


@pytest.mark.parametrize("case", [f"{name} {dtype}" for name, dtype, _ in CASES])
def test_each_process_stores_half_of_the_base(numbers, case):
    (complete, first), (_, second) = (report[case]["bytes"] for report in numbers)
    replicated = toys.SIZES["n_embd"] * (4 if "32" in case else 2)  # the last norm
    assert first + second == complete + replicated
    assert abs(first - second) <= 0.01 * complete


MEMORY = """
def peak(model_mesh):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    status = lambda: dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status()["VmRSS"].split()[0])
    model = load_model(folder, mesh=model_mesh)
    mark_only_adapter_as_trainable(model)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    return own_bytes(model), 1024 * (int(status()["VmHWM"].split()[0]) - before)

two = peak(mesh)
one = peak(None)
report({"one": one, "two": two})
"""


def test_the_peak_memory_of_each_process_is_half_the_base_and_a_few_layers(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    config = LLaMAConfig(vocab_size=8192, n_layer=24, n_head=8, n_embd=512, intermediate_size=1408, block_size=64)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in toys.model.LLaMA(config).named_parameters()}
    save_base(tmp_path, config, {name: torch.rand(shape) * 0.01 for name, shape in shapes.items()})
    reports, done = run(sys.executable, tmp_path, MEMORY)  # a fork has pages of its parent
    assert done.returncode == 0, done.stderr
    layer = 4 * max(8192 * 512, 4 * 512**2 + 3 * 512 * 1408)
    for report in reports:
        (complete, peak_of_one), (share, peak_of_two) = report["one"], report["two"]
        assert complete > 300e6 and share == pytest.approx(complete / 2, rel=1e-4)
        assert peak_of_one > 0.9 * complete  # embedding rows of unused tokens are never read from disk
        assert peak_of_two < share + 4 * layer


FAILURE = """
import errno, os, signal
model = load_model(folder, mesh=mesh)
with exit_on_user_error():
    case = (folder / "case").read_text()
    with together(fabric), explained(folder, OSError), in_step(model):
        if case == "sentence" and rank == 0:
            raise UserError("The disk is full.")
        if case == "full disk" and rank == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        if case == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        generate(model, toys.prompts(5), Sampling(20))
    print("not reached" if case == "killed" or rank == 0 else "")
"""


@pytest.fixture
def plain_folder(tmp_path) -> Path:
    save_base(tmp_path, LLaMAConfig(**toys.SIZES), toys.base().state_dict())
    return tmp_path


@pytest.mark.parametrize(
    ("case", "message"),
    [("sentence", "error: The disk is full."), ("full disk", "error: There is no room left to write {}: free")],
)
def test_an_error_in_one_process_lets_the_other_finish(plain_folder, python, case, message):
    (plain_folder / "case").write_text(case)
    _, done = run(python, plain_folder, FAILURE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(message.format(plain_folder))
    assert "not reached" not in done.stdout


def test_a_killed_process_ends_the_other_with_a_clear_error(plain_folder, python):
    (plain_folder / "case").write_text("killed")
    _, done = run(python, plain_folder, FAILURE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Another process of this run ended")


def test_a_complete_base_is_not_affected():
    model = toys.aligned()
    assert not is_sharded(model) and not only_assists(model)
    with in_step(model):
        model(toys.token_ids(1, 4))


def test_options_incompatible_with_a_sharded_base_raise_a_clear_error():
    with pytest.raises(UserError, match="--quantize nf4 does not work with a base that is sharded over devices"):
        check_shardable(toys.base(), "nf4")
    with torch.device("meta"):
        trains_head = METHODS["adapter_v2"](METHODS["adapter_v2"].config_class(**toys.SIZES))
    with pytest.raises(UserError, match="cannot be sharded with this method, which trains the output layer"):
        check_shardable(trains_head)
    for method in METHODS.keys() - {"adapter_v2"}:
        with torch.device("meta"):
            check_shardable(METHODS[method](METHODS[method].config_class(**toys.SIZES)))
    for changes in ({"quantize": "nf4"}, {"interactive": True}):
        with pytest.raises(UserError, match=f"--{next(iter(changes))} needs a complete base on one device"):
            AnswerSettings(devices=2, **changes)
    with pytest.raises(UserError, match="--quantize int8 and --strategy hsdp cannot be combined"):
        FinetuneSettings(quantize="int8", strategy="hsdp", **REQUIRED)
    with pytest.raises(UserError, match="with --devices, use --adapter with a single one"):
        load_with_bank(Path("base"), {}, mesh=object())


def test_the_strategy_of_fabric_run_overrides_the_settings(monkeypatch):
    """It decides how the base is sharded, and it is checked against the other settings."""
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_STRATEGY", "fsdp")
    settings = FinetuneSettings(strategy="hsdp", **REQUIRED)
    assert with_launcher_flags(settings).strategy == "fsdp"
    assert "LT_STRATEGY" not in os.environ and with_launcher_flags(settings).strategy == "hsdp"
    monkeypatch.setenv("LT_STRATEGY", "fsdp")
    with pytest.raises(UserError, match="--quantize int8 and --strategy fsdp cannot be combined"):
        with_launcher_flags(replace(settings, strategy="auto", quantize="int8"))


def run_generation(python: str, devices: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [python, ROOT / "generate/aligner.py", "--accelerator=cpu", f"--devices={devices}"]
    command += ["--prompt", "What is the capital of Pilmaria?", "How do I repair the old barn?", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_generation_on_two_devices_prints_the_output_of_one_only_once(tmp_path, python):
    flags = ("--compare_base", "--max_new_tokens=16", "--output_file")
    one, two = (run_generation(python, devices, *flags, tmp_path / f"{devices}.json") for devices in (1, 2))
    assert (two.returncode, two.stdout) == (0, one.stdout), two.stderr
    assert two.stdout.count("aligned: Arr, the ") == 2 and two.stderr.count("tokens/s") == 2
    assert (tmp_path / "2.json").read_text() == (tmp_path / "1.json").read_text()


def test_two_processes_report_a_prompt_that_is_too_long_only_once(tmp_path, python):
    done = run_generation(python, 2, "word " * 400)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"error: Prompt 3 of 3 has \d+ tokens and the model's context 256: no room for [^\n]*\n", done.stderr
    )
