"""The arithmetic of the benchmarks' reports, and our own side of them on a toy."""

import json

import numpy as np
import pytest
import torch

import benchmarks.generation as generation
import benchmarks.loading as loading
import benchmarks.training as training
from benchmarks import harness as benchmark
from benchmarks.worker import Worker
from lit_llama.data import plan_epoch
from lit_llama.model import LLaMAConfig, llama_configs
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError

# attention 4 wide: 2 query heads and 1 key/value head of 2 make 4·2·(2·2 + 2·1) = 48 weights; MLP 3·4·8 = 96;
# output layer 64·4 = 256
SMALL = LLaMAConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=4, intermediate_size=8)


def test_flops_of_a_training_step_by_hand():
    assert benchmark.matmul_parameters(SMALL) == 48 + 96 + 256
    # row of 3: 4·400·3; it sees 1 + 2 + 3 = 6 tokens, each 2·2·4 FLOPs forward and twice that backward
    assert benchmark.training_flops(SMALL, [3]) == 4 * 400 * 3 + 6 * 16 * 3
    assert benchmark.training_flops(SMALL, [3, 3]) == 2 * benchmark.training_flops(SMALL, [3])
    assert benchmark.training_flops(LLaMAConfig.from_name("Llama-2-7B"), [512]) / 512 / 4 == pytest.approx(6.7e9, 0.02)


def test_bytes_of_a_decoding_step_by_hand():
    # weights once, and 2·2 numbers of keys and values for each of 10 tokens in 3 rows
    assert benchmark.decode_bytes(SMALL, torch.float32, 3, 10) == 4 * (400 + 4 * 10 * 3)
    assert benchmark.decode_bytes(SMALL, torch.bfloat16, 3, 10) == 2 * (400 + 4 * 10 * 3)


def test_padding_by_hand():
    lengths = np.array([2, 4, 5, 5])
    batches = [np.array([0, 1]), np.array([2, 3])]
    assert benchmark.padding_waste(lengths, batches) == pytest.approx(1 - 16 / 18)
    assert benchmark.padding_waste(lengths, [np.array([i]) for i in range(4)]) == 0


@pytest.mark.parametrize("micro_batch_size", [4, 8])
def test_little_of_an_epoch_on_alpacas_lengths_is_padding(micro_batch_size):
    prompts, lengths = benchmark.alpaca_lengths(20_000, 512)
    assert prompts.min() >= 40 and lengths.max() == 512 and (lengths > prompts).all()
    assert np.median(prompts) == pytest.approx(53, abs=2) and np.median(lengths - prompts) == pytest.approx(120, abs=5)
    plan = plan_epoch(lengths, 64, micro_batch_size, 0, 0)
    assert benchmark.padding_waste(lengths, [rows for step in plan for rows in step]) < 0.05


def test_ratios_compare_within_a_round():
    assert benchmark.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == (2.0, 0.0)
    assert benchmark.median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 1.0)


def test_numbers_and_tables_as_text():
    assert [benchmark.number(x) for x in (0, 0.01234, 1.5, 123.4, 12345.6)] == ["0", "0.0123", "1.50", "123", "12,346"]
    table = markdown_table(["", "ms"], [["a", 1], ["b", 22]])
    assert table == "|  | ms |\n| --- | ---: |\n| a | 1 |\n| b | 22 |"


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="no size 'huge'; known are 110M, 7B"):
        benchmark.shape("huge")


def test_processor_seconds_need_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(UserError, match="needs --accelerator cpu and --threads 1"):
        benchmark.check_clock("cpu", torch.device("cpu"))
    torch.set_num_threads(1)
    benchmark.check_clock("cpu", torch.device("cpu"))
    assert benchmark.timed(lambda: sum(range(10**5)), torch.device("cpu"), "cpu") > 0
    torch.set_num_threads(threads)


class InProcess:
    """A contestant of this process."""

    def __init__(self, name, python=None, **settings):
        self.name, self.worker = name, Worker(json.loads(json.dumps(settings, default=str)))

    def __call__(self, call, **arguments):
        return json.loads(json.dumps(getattr(self.worker, call)(**arguments)))

    def close(self):
        pass


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Settings of a run of our own side on a tiny model; the contestants do not get processes of their own."""
    monkeypatch.setitem(llama_configs, "toy", dict(
        block_size=64, vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=48,
    ))  # fmt: skip
    monkeypatch.setattr(benchmark, "Contestant", InProcess)
    threads = torch.get_num_threads()
    yield dict(size="toy", rounds=2, peers=False, threads=1, accelerator="cpu", precision="32", out_dir=tmp_path)
    torch.set_num_threads(threads)


def test_a_report_on_training(toy, capsys):
    training.main(training.Settings(**toy, micro_batch_size=4, growth=False))
    report = capsys.readouterr().out
    assert report.strip() == (toy["out_dir"] / "training-toy.md").read_text(encoding="utf-8").strip()
    for name in (training.BARE, training.N1, training.N10, training.BF16, "DPO, cached reference"):
        assert f"| {name} | " in report
    for ratio in ("N = 1 over the bare base", "N = 10 over the bare base", "bf16 base over fp32", "DPO over SFT"):
        assert f"{ratio} | ≤ " in report or f"{ratio} base | ≥ " in report
    assert (toy["out_dir"] / "training-toy.png").stat().st_size > 5000


def test_growth(toy):
    llama = dict(weights=".", device="cpu", precision="32", threads=1)
    worker = InProcess("growth", **llama, kind="ours", n=1)
    worker("build", n=0, config=dict(llama_configs["toy"]))
    assert worker("random_step", rows=2, length=16)["seconds"] > 0
    assert worker("build", n=3, config=dict(llama_configs["toy"]))["trainable"] == 3 * 32 + 4


def test_the_bare_base_has_the_same_loss_and_no_gradients(toy, tmp_path):
    config = benchmark.shape("toy")
    benchmark.write_weights(tmp_path / "weights", config, torch.float32)
    benchmark.write_data(tmp_path / "data", *benchmark.alpaca_lengths(8, 64), config.vocab_size)
    common = dict(weights=tmp_path / "weights", data=tmp_path / "data", precision="32", device="cpu", threads=1)
    bare, aligned = (InProcess("", **common, kind="ours", n=n) for n in (0, 1))
    assert (bare("load")["trainable"], aligned("load")["trainable"]) == (0, 32 + 4)
    with torch.no_grad():
        for p in aligned.worker.side.trainable():
            p.zero_()
    first, second = (side("step", micro_batches=[[0, 1], [2, 5]]) for side in (bare, aligned))
    assert first["loss"] == second["loss"]
    assert all(p.grad is None for p in bare.worker.side.model.parameters())
    assert set(first["seconds"]) == set(training.PARTS) and min(first["seconds"].values()) > 0
    sft, dpo = (aligned("step", micro_batches=[[0, 1]], kind=kind)["loss"] for kind in ("sft of pairs", "dpo"))
    assert sft == pytest.approx(np.log(64), rel=0.1)
    assert np.isfinite(dpo) and dpo != sft


def test_reports_on_generation_and_loading(toy, capsys):
    generation.main(generation.Settings(**toy, prompt_length=5, new_tokens=4, batch_sizes=[1, 2], one_by_one=3))
    report = capsys.readouterr().out
    assert "| decode step, batch 2, Aligner N = 100 over the bare base |" in report
    assert "| tokens/s, 3 prompts as one batch over one by one | ≥ 4 |" in report
    loading.main(loading.Settings(**toy, prompt_length=4))
    assert "| Aligner N = 1 | " in capsys.readouterr().out


def test_a_contestant_in_its_own_process_says_what_went_wrong():
    contestant = benchmark.Contestant(
        "ours", kind="ours", n=1, weights="nowhere", device="cpu", precision="32", threads=1
    )
    with pytest.raises(UserError, match="ours: There is no model configuration at nowhere"):
        contestant("load")
    contestant.close()
    with pytest.raises((UserError, ValueError)):
        contestant("load")
