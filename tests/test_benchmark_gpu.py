"""The GPU benchmark runs on a CPU, and reports a failed check in its report and by its exit code."""

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.worker import Ours
from lit_llama.model import LLaMA
from lit_llama.packing import segment_mask
from lit_llama.utils import UserError

SMALL = ("--accelerator", "cpu", "--size", "microworld", "--rounds", "1", "--rows", "2", "--length", "32",
         "--prompt_length", "8", "--new_tokens", "4", "--batch_sizes", "1", "2")  # fmt: skip


def test_checks_and_measurements_are_written_to_one_report(run_script, tmp_path, fixed_rates):
    parts = ("logits", "compiled", "flash", "packed", "dpo", "processes", "train", "decode")
    code, out, err = run_script("benchmarks/gpu.py", *SMALL, "--out_dir", tmp_path, "--parts", *parts)
    assert code == 0, err
    assert out == (tmp_path / f"gpu-microworld-cpu-{'-'.join(parts)}.md").read_text(encoding="utf-8")
    titles = [line.split()[1].rstrip(",") for line in out.splitlines() if line.startswith("## ")]
    assert titles == list(parts)
    assert "| logits, N = 1, fp32: relative error | ≤ 0.000100 | 0 |" in out
    for row in (
        "gradients, N = 10, bf16",
        "packed rows, grouped queries, gradients, bf16",
        "--compile, packed rows, gradients, bf16",
        "grouped queries, fp32 | possible | yes",
        "DPO's start, bf16: ",
        "DPO's start, bf16, --compile",
        "DPO with packed pairs over separate responses",
        "utilization",
        "decode, batch 2",
        "over one by one",
    ):
        assert row in out
    assert "not run: 0 GPUs" in out or torch.cuda.is_available()


def test_the_traceback_of_an_unexpected_error_goes_to_stderr(monkeypatch, capsys):
    def fail(device, out_dir):
        yield "first", "≤ 1", "0"
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setitem(gpu_checks.CHECKS, "logits", fail)
    rows, succeeded = gpu.run_part("logits", gpu.Settings(), torch.device("cpu"), torch.float32)
    assert not succeeded and [row[0] for row in rows] == ["first", "logits"]
    assert rows[1][2] == "failed: CUDA error: an illegal memory access was encountered"
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err and captured.out == ""


def test_a_failed_check_is_named_and_the_others_run(run_script, tmp_path, monkeypatch, fixed_rates):
    def fail(device, out_dir):
        yield "first", "≤ 1", "0"
        yield gpu_checks.within("second", 2.0, 1.0)

    monkeypatch.setitem(gpu_checks.CHECKS, "logits", fail)
    code, out, err = run_script("benchmarks/gpu.py", *SMALL, "--out_dir", tmp_path, "--parts", "logits", "flash")
    assert code == 1 and err.endswith("says why.\n") and "error: Failed: logits; " in err
    assert "| first | ≤ 1 | 0 |" in out and "failed: second: 2.00, and at most 1.00 is allowed" in out
    assert "flash kernels" in out


def test_a_model_with_different_results_fails(tmp_path, monkeypatch):
    """The second of the compared models has different gates."""
    model, calls = gpu_checks.model, []

    def changed_model(*args):
        network = model(*args)
        calls.append(network)
        if len(calls) == 2:
            network.transformer.h[4].attn.gating_factor.data *= 1.01
        return network

    monkeypatch.setattr(gpu_checks, "model", changed_model)
    with pytest.raises(UserError, match="logits, N = 1, fp32"):
        list(gpu_checks.check_logits_and_gradients(torch.device("cpu"), tmp_path))


def test_a_model_without_a_flash_kernel_fails(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(gpu_checks.LLaMA, "label_logps", fail)
    with pytest.raises(UserError, match="No fused attention, all heads, bf16: No available kernel"):
        list(gpu_checks.check_flash(torch.device("cpu"), tmp_path))


def test_packed_rows_with_different_results_fail(tmp_path, monkeypatch):
    def without_mask(segments, dtype):
        mask, positions = segment_mask(segments, dtype)
        return torch.zeros_like(mask), positions

    monkeypatch.setattr("lit_llama.model.segment_mask", without_mask)
    with pytest.raises(UserError, match="packed rows, all heads, log-probabilities, fp32"):
        list(gpu_checks.check_packed(torch.device("cpu"), tmp_path))


@pytest.mark.parametrize("n", [0, 1, 10])
def test_a_random_model_is_built_on_the_device_in_the_dtype_of_the_base(n):
    """On the meta device, which does not mix with the CPU."""
    meta = torch.device("meta")
    worker = Ours({"threads": torch.get_num_threads(), "weights": None, "device": meta, "dtype": torch.bfloat16})
    worker.build(n=n, config=dict(block_size=32, vocab_size=64, n_layer=4, n_head=4, n_embd=32))
    dtypes = {name: p.dtype for name, p in worker.model.named_parameters()}
    assert {dtypes.pop(name) for name in (worker.model.adapter_parameters() if n else ())} <= {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert worker.model(torch.zeros(2, 8, dtype=torch.long, device=meta)).is_meta


def test_decoding_measures_the_merged_model_that_generation_uses():
    settings = gpu.Settings(size="microworld")
    worker = gpu.make_worker(settings, torch.device("cpu"), torch.float32, generates=True)
    assert type(worker.model) is LLaMA and worker.model.config.proj_bias
    assert not any(p.requires_grad for p in worker.model.parameters())


@pytest.mark.parametrize(("flag", "sentence"), [
    (("--rows", "3"), "rows is 3; two make a pair, so it must be even."),
    (("--new_tokens", "2"), "new_tokens is 2"),
])  # fmt: skip
def test_sizes_that_cannot_be_measured_are_refused(flag, sentence, refused, tmp_path):
    assert refused("benchmarks/gpu.py", *SMALL, *flag, "--out_dir", tmp_path).startswith(sentence)
