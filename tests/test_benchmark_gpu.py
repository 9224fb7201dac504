"""The GPU benchmark runs on a CPU, and reports a failed check in its report and by its exit code."""

import pytest
import torch

from benchmarks import gpu_checks

SMALL = ("--accelerator", "cpu", "--size", "microworld", "--rounds", "1", "--rows", "2", "--length", "32",
         "--prompt_length", "8", "--new_tokens", "4", "--batch_sizes", "1", "2")  # fmt: skip


def test_checks_and_measurements_are_written_to_one_report(run_script, tmp_path):
    parts = ("logits", "flash", "dpo", "processes", "train", "decode")
    code, out, err = run_script("benchmarks/gpu.py", *SMALL, "--out_dir", tmp_path, "--parts", *parts)
    assert code == 0, err
    assert out == (tmp_path / f"gpu-microworld-cpu-{'-'.join(parts)}.md").read_text(encoding="utf-8")
    titles = [line.split()[1].rstrip(",") for line in out.splitlines() if line.startswith("## ")]
    assert titles == list(parts)
    assert "| logits, N = 1, fp32: relative error | ≤ 0.000100 | 0 |" in out
    for row in ("gradients, N = 10, bf16", "DPO's start, bf16", "utilization", "decode, batch 2", "over one by one"):
        assert row in out
    assert "not run: 0 GPUs" in out or torch.cuda.is_available()


def test_a_failed_check_is_named_and_the_others_run(run_script, tmp_path, monkeypatch):
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
    with pytest.raises(gpu_checks.Failed, match="logits, N = 1, fp32"):
        list(gpu_checks.check_logits_and_gradients(torch.device("cpu"), tmp_path))


def test_a_model_without_a_flash_kernel_fails(tmp_path, monkeypatch):
    original = gpu_checks.LLaMA.label_logps

    def fail(self, *args):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(gpu_checks.LLaMA, "label_logps", fail)
    with pytest.raises(gpu_checks.Failed, match="Flash attention is not reached: No available kernel"):
        list(gpu_checks.check_flash(torch.device("cpu"), tmp_path))
    assert original is not fail
