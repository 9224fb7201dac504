"""The arithmetic of the benchmark reports, and the benchmarks of our models on a toy model."""

import mmap
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.generation as generation
import benchmarks.loading as loading
import benchmarks.serving as serving
import benchmarks.training as training
import benchmarks.waiting as waiting
from benchmarks import harness, material, measure
from benchmarks.worker import Ours
from lit_llama import onednn
from lit_llama.epochs import plan_epoch
from lit_llama.model import LLaMAConfig, llama_configs
from lit_llama.onednn import PackedLinear
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError

# attention of width 4, with 2 query heads and 1 key/value head of size 2: 4·2·(2·2 + 2·1) = 48 weights;
# MLP 3·4·8 = 96; output layer 64·4 = 256
SMALL = LLaMAConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=4, intermediate_size=8)

CPU = dict(device=measure.CPU, dtype=torch.float32, threads=1)  # settings of a contestant


def test_flops_of_a_training_step_by_hand():
    assert material.matmul_parameters(SMALL) == 48 + 96 + 256
    # a row of 3 tokens: 4·400·3 for the weights; the tokens attend to 1 + 2 + 3 = 6 tokens, with 2·2·4 FLOPs each in
    # the forward pass and twice that in the backward pass
    assert material.training_flops(SMALL, [3]) == 4 * 400 * 3 + 6 * 16 * 3
    assert material.training_flops(SMALL, [3, 3]) == 2 * material.training_flops(SMALL, [3])
    assert material.training_flops(LLaMAConfig.from_name("Llama-2-7B"), [512]) / 512 / 4 == pytest.approx(6.7e9, 0.02)


def test_bytes_of_a_decoding_step_by_hand():
    # the weights once, and 2·2 elements of keys and values for each of 10 tokens in 3 rows
    assert material.decode_bytes(SMALL, torch.float32, 3, 10) == 4 * (400 + 4 * 10 * 3)
    assert material.decode_bytes(SMALL, torch.bfloat16, 3, 10) == 2 * (400 + 4 * 10 * 3)


def test_padding_by_hand():
    lengths = np.array([2, 4, 5, 5])
    batches = [np.array([0, 1]), np.array([2, 3])]
    assert material.padding_share(lengths, batches) == pytest.approx(1 - 16 / 18)
    assert material.padding_share(lengths, [np.array([i]) for i in range(4)]) == 0


CPUINFO = {
    "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\nprocessor\t: 1\n"
    "model name\t: Some Xeon\nflags\t\t: fpu\n": "Some Xeon with AVX2, AVX-512, AVX512-BF16, AMX-BF16",
    "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n": " with NEON, BF16",
}


@pytest.mark.parametrize("text, expected", CPUINFO.items())
def test_the_description_of_the_processor(text, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert harness.describe_cpu(tmp_path / "cpuinfo").endswith(expected)
    assert torch.backends.cpu.get_cpu_capability() in harness.describe_cpu(tmp_path / "missing")


def test_a_report_states_the_machine_and_its_rates(tmp_path, fixed_rates):
    text = harness.write_report(tmp_path / "out/report.md", "Title", ["A part."], measure.CPU)
    rates = "a large matrix product does 195 GFLOP/s in fp32, 429 in bf16 (2.2 ×)"
    assert f"- in this run: a copy reads and writes 33.6 GB/s; {rates}\n" in text
    assert f"- machine: {harness.describe_cpu()}, " in text and "# Title" in text


def test_the_rates_of_the_machine_are_those_of_the_fastest_run(monkeypatch):
    seconds: list[float] = []

    def timed(work, device, clock):
        assert (device, clock) == (measure.CPU, "wall")
        work()
        return seconds.pop(0)

    monkeypatch.setattr(measure, "timed", timed)
    copy_bandwidth, matmul_rate = measure.copy_bandwidth.__wrapped__, measure.matmul_rate.__wrapped__  # not cached
    seconds[:] = [0.5, 0.25, *[0.5] * 5]
    assert copy_bandwidth(measure.CPU, "wall") == 2 * 2**28 / 0.25 and not seconds
    seconds[:] = [1.0, 0.5, 1.0, 1.0, 2.0]
    assert matmul_rate(measure.CPU, torch.float32, "wall") == 2 * 1536**3 / 0.5 and seconds == [2.0]  # 3 s are over
    seconds[:] = [0.5, 0.5, 0.25, 0.5, 0.5, 0.125]
    assert matmul_rate(measure.CPU, torch.float32, "wall") == 2 * 1536**3 / 0.25 and seconds == [0.125]


@pytest.mark.parametrize("micro_batch_size", [4, 8])
def test_an_epoch_of_rows_with_alpacas_lengths_has_little_padding(micro_batch_size):
    prompts, lengths = material.alpaca_lengths(20_000, 512)
    assert prompts.min() >= 40 and lengths.max() == 512 and (lengths > prompts).all()
    assert np.median(prompts) == pytest.approx(53, abs=2) and np.median(lengths - prompts) == pytest.approx(120, abs=5)
    plan = plan_epoch(lengths, 64, micro_batch_size, 0, 0)
    assert material.padding_share(lengths, [rows for step in plan for rows in step]) < 0.05


def test_the_interval_of_a_median():
    # the range of n values misses the median with probability 2 / 2^n; from n = 9 on, the smallest and largest value
    # can be dropped, which raises it to 2 · (1 + 9) / 2^9 = 3.9%
    assert measure.median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert measure.median_interval([float(i) for i in range(8)]) == (3.5, 0.0, 7.0)
    assert measure.median_interval([float(i) for i in range(9)]) == (4.0, 1.0, 7.0)


def test_the_interval_of_a_median_covers_it():
    rng, n = np.random.default_rng(0), 12
    intervals = np.array([measure.median_interval(rng.exponential(size=n).tolist()) for _ in range(2000)])
    covered = (intervals[:, 1] <= np.log(2)) & (np.log(2) <= intervals[:, 2])
    assert 0.95 <= covered.mean() <= 0.98  # 96.1%: 1 - 2 · (1 + 12 + 66) / 2^12


def test_ratios_are_computed_within_each_round():
    assert measure.compare([2.0, 20.0, 6.0] * 2, [1.0, 10.0, 3.0] * 2) == ["2.000 (2.000 to 2.000)", "more"]
    assert measure.compare([1.0, 2.0, 3.0] * 2, [2.0, 4.0, 5.0] * 2) == ["0.500 (0.500 to 0.600)", "less"]
    assert measure.compare([1.1, 0.9, 1.0] * 2, [1.0] * 6, 2) == ["1.00 (0.90 to 1.10)", "no difference"]
    assert measure.compare([1.1, 1.2], [1.0, 1.0], 1) == ["1.1 (1.1 to 1.2)", "too few rounds"]


def test_contestants_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []

    def turn(name: str):
        return lambda: calls.append(name) or len(calls)

    notes: list[str] = []
    first, answers = harness.take_turns({name: turn(name) for name in "abc"}, 19, notes)
    order, rounds = "".join(calls), [calls[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len({*map(tuple, rounds)}) == 6
    places = {name: [i for i, called in enumerate(order, 1) if called == name] for name in "abc"}
    assert first == {name: numbers[0] for name, numbers in places.items()}
    assert answers == {name: numbers[1:] for name, numbers in places.items()} and not notes

    calls.clear()
    harness.take_turns({name: turn(name) for name in "abc"}, 19, notes)
    assert "".join(calls) == order  # the same in every run


def test_an_unavailable_peer_is_left_out_but_an_error_on_our_side_is_raised():
    def fail(error: type[UserError]):
        def turn():
            raise error("x: no such thing.")

        return turn

    notes: list[str] = []
    _, answers = harness.take_turns({"a": lambda: 1, "x": fail(harness.Unavailable)}, 2, notes)
    assert answers == {"a": [1, 1]} and notes == ["Without x: no such thing."]
    with pytest.raises(UserError, match="no such thing"):
        harness.take_turns({"a": lambda: 1, "x": fail(UserError)}, 2, notes)


def test_memory_measures_current_and_peak_use():
    memory = measure.Memory(torch.device("cpu"))
    memory.reset_peak()
    pages = mmap.mmap(-1, 2**26)  # 64 MiB of new pages; an array may get memory that an earlier test has freed
    pages.write(bytes(2**26))
    assert memory.now() > 60e6
    pages.close()
    assert memory.peak() > 60e6
    memory.reset_peak()
    assert memory.now() < 30e6 and memory.peak() < 30e6


def test_formatting_of_numbers_and_tables():
    assert [measure.number(x) for x in (0, 0.01234, 1.5, 123.4, 12345.6)] == ["0", "0.0123", "1.50", "123", "12,346"]
    table = markdown_table(["", "ms"], [["a", 1], ["b", 22]])
    assert table == "|  | ms |\n| --- | ---: |\n| a | 1 |\n| b | 22 |"


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="no size 'huge'; choose from 110M, 7B"):
        material.shape("huge")


def test_measuring_cpu_time_needs_one_thread(toy):
    with pytest.raises(UserError, match="needs --accelerator cpu and --threads 1"):
        harness.start_run(generation.Settings(**{**toy, "threads": 2}, clock="cpu"))
    assert harness.start_run(generation.Settings(**toy, clock="cpu")).shared["clock"] == "cpu"
    assert measure.timed(lambda: sum(range(10**5)), torch.device("cpu"), "cpu") > 0


class InProcess:
    """A contestant that runs in this process."""

    def __init__(self, name, **settings):
        self.name, self.worker = name, Ours(settings)

    def __call__(self, method, **arguments):
        return getattr(self.worker, method)(**arguments)

    def close(self):
        pass


@pytest.fixture
def toy(monkeypatch, tmp_path, fixed_rates):
    """Return settings for measuring only our models, on a tiny model, with all contestants in this process."""
    monkeypatch.setitem(llama_configs, "toy", dict(
        block_size=64, vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=48,
    ))  # fmt: skip
    monkeypatch.setattr(harness, "Contestant", InProcess)
    return dict(size="toy", rounds=2, peers=False, threads=1, accelerator="cpu", precision="32", out_dir=tmp_path)


def test_a_report_on_training(toy, capsys):
    training.main(training.Settings(**toy, micro_batch_size=4, growth=False))
    report = capsys.readouterr().out
    assert report.strip() == (toy["out_dir"] / "training-toy-fp32.md").read_text(encoding="utf-8").strip()
    for name in (
        training.BARE,
        training.N1,
        training.N10,
        training.BF16,
        training.CHECKPOINTED,
        "DPO, cached reference",
    ):
        assert f"| {name} | " in report
    for ratio in ("N = 1 over the bare base", "N = 10 over the bare base", "bf16 base over fp32", "DPO over SFT"):
        assert f"{ratio} | ≤ " in report or f"{ratio} base | ≥ " in report
    assert (toy["out_dir"] / "training-toy-fp32.png").stat().st_size > 5000


def test_a_machine_that_emulates_bf16_does_not_train_a_bf16_base(toy):
    settings = training.Settings(**toy, dpo=False)
    for bf16, expected in ((1e9, False), (1e11, True)):
        rates = {torch.float32: 1e11, torch.bfloat16: bf16}
        assert (training.BF16 in training.our_contestants(settings, torch.float32, rates)) == expected


@pytest.mark.skipif(not onednn.can_pack(torch.ones(2, 2)), reason="this PyTorch has no oneDNN")
def test_a_report_states_which_contestants_have_packed_weights(toy, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)
    measured = [False, True, False]  # whether packing is faster, in turn
    monkeypatch.setattr(onednn, "gains_from_packing", lambda weights: measured.pop(0))
    run, names = harness.start_run(generation.Settings(**toy)), ("bare", "one", "two")
    with run.contestants({name: {"n": n, "generates": True} for n, name in enumerate(names)}, {}) as contestants:
        packed = [name for name, c in contestants.items() if isinstance(c.worker.model.lm_head, PackedLinear)]
    plain = [name for name in names if name not in packed]
    assert len(packed) == 1 and len(run.notes) == 1
    assert f": {packed[0]}; not packed: " in run.notes[0] and all(name in run.notes[0] for name in plain)


def trainable(contestant: InProcess) -> list[torch.nn.Parameter]:
    return [p for p in contestant.worker.model.parameters() if p.requires_grad]


def test_growth(toy, monkeypatch):
    worker = InProcess("growth", weights=".", **CPU, kind="ours", n=1)
    worker("build", n=0, config=dict(llama_configs["toy"]))
    assert not trainable(worker)
    assert worker("step", batches=[[2, 16, 8]], data="random")["seconds"]["backward"] > 0
    worker("build", n=3, config=dict(llama_configs["toy"]))
    assert sum(p.numel() for p in trainable(worker)) == 3 * 32 + 4

    monkeypatch.setattr(training, "GROWTH", {"layers": (3, 4), "prefix tokens N": (1, 2)})
    growth = training.measure_growth(harness.start_run(training.Settings(**toy)))
    assert growth.keys() == {"layers", "prefix tokens N"}
    assert [value for value, _ in growth["layers"]["N = 1"]] == [3, 4] and "bare base" in growth["layers"]
    assert all(seconds > 0 for _, seconds in growth["prefix tokens N"]["Aligner"])
    assert "| layers: 3, 4 | N = 1 | " in training.growth_table(growth)


def test_the_bare_base_has_the_same_loss_and_no_gradients(toy, tmp_path):
    weights = material.random_weights(tmp_path, "toy", torch.float32)
    material.write_data(tmp_path / "data", *material.alpaca_lengths(8, 64), material.shape("toy").vocab_size)
    common = dict(weights=weights, data=tmp_path / "data", **CPU)
    bare, aligned = (InProcess("", **common, kind="ours", n=n) for n in (0, 1))
    for contestant, parameters in ((bare, 0), (aligned, 32 + 4)):
        contestant("load")
        assert sum(p.numel() for p in trainable(contestant)) == parameters
    with torch.no_grad():
        for p in trainable(aligned):
            p.zero_()
    first, second = (side("step", batches=[[0, 1], [2, 5]]) for side in (bare, aligned))
    assert first["loss"] == second["loss"]
    assert all(p.grad is None for p in bare.worker.model.parameters())
    assert set(first["seconds"]) == set(training.PARTS) and min(first["seconds"].values()) > 0
    sft, dpo = (aligned("step", batches=[[0, 1]], data="pairs", loss=loss)["loss"] for loss in ("sft", "dpo"))
    assert sft == pytest.approx(np.log(64), rel=0.1)
    assert np.isfinite(dpo) and dpo != sft


def test_reports_on_generation_and_loading(toy, capsys):
    generation.main(generation.Settings(**toy, prompt_length=5, new_tokens=4, batch_sizes=[1, 2], one_by_one=3))
    report = capsys.readouterr().out
    assert "| decode step, batch 2, Aligner N = 100 over the bare base |" in report
    assert "| tokens/s, 3 prompts as one batch over one by one | ≥ 4 |" in report
    loading.main(loading.Settings(**toy, prompt_length=4))
    assert "| Aligner N = 1 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [("ours", UserError, "There is no model configuration at nowhere"), ("transformers", harness.Unavailable, "")],
)
def test_a_contestant_in_its_own_process_reports_errors(kind, error, sentence):
    settings = dict(kind=kind, n=1, method="", weights=Path("nowhere"), **CPU)
    contestant = harness.Contestant("one", **settings)
    with pytest.raises(error, match=rf"^one: {sentence}") as first:
        contestant("load")
    with pytest.raises(error, match="one: ") as second:
        contestant("no such call")
    # the process of a peer has ended, so its later turns repeat the first failure
    assert (str(first.value) == str(second.value)) == (kind != "ours")
    contestant.close()


def test_ctrl_c_ends_an_idle_contestant_without_a_traceback(capfd):
    contestant = harness.Contestant("one", kind="ours")
    worker = contestant.process._processes[contestant.process.submit(os.getpid).result()]
    os.kill(worker.pid, signal.SIGINT)
    worker.join()
    contestant.close()
    assert (worker.exitcode, capfd.readouterr().err) == (130, "")


def test_the_environment_for_how_threads_wait_is_set_and_restored(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with waiting.environment({"GOMP_SPINCOUNT": "9"}):
        assert "OMP_WAIT_POLICY" not in os.environ and os.environ["GOMP_SPINCOUNT"] == "9"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ


def test_a_server_that_does_not_start_gives_its_reason(tmp_path):
    with pytest.raises(UserError, match=r"^The server did not start: There is no .*nowhere"):
        serving.Server(tmp_path / "nowhere", serving.Settings(accelerator="cpu", precision="32")).__enter__()


def test_the_server_is_measured_only_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="This benchmark needs Linux: it reads"):
        serving.main(serving.Settings())


def test_busy_programs_end():
    with waiting.busy_programs(1):
        (program,) = multiprocessing.active_children()
    assert not program.is_alive()
