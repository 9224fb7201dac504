import pytest
import torch

from lit_llama.device import computes_bf16, pick_device
from lit_llama.utils import UserError


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_only_on_gpus_with_native_bf16(native, monkeypatch):
    """PyTorch emulates bf16 on older GPUs, slowly, and counts it as supported by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert [computes_bf16(name) for name in ("auto", "gpu", "cuda", "cpu", "mps")] == [native] * 3 + [False] * 2
    monkeypatch.setattr("lit_llama.device.computes_bf16", lambda accelerator: native)
    assert pick_device("cpu", "auto")[1] == (torch.bfloat16 if native else torch.float32)


def test_the_default_on_a_cpu_is_fp32():
    assert pick_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bf16-true")[1] == pick_device("cpu", "bf16")[1] == torch.bfloat16
    assert pick_device("cpu", "16")[1] == torch.float16


def test_attention_does_not_use_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu", "auto")
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_an_accelerator_is_the_default_device(kind, monkeypatch):
    monkeypatch.delenv("DISABLE_MPS", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    assert {pick_device(name, "32")[0] for name in ("auto", "gpu", kind)} == {torch.device(kind, 0)}
    assert pick_device("cpu", "32")[0] == torch.device("cpu")
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert pick_device("auto", "32")[0] == torch.device("cpu" if kind == "mps" else "cuda:0")


def test_unknown_devices_and_precisions_are_refused():
    for name in ("abacus", "mps", "gpu"):
        with pytest.raises(UserError, match=rf"There is no accelerator '{name}' here; choose from auto, cpu\."):
            pick_device(name, "auto")
    with pytest.raises(UserError, match="precision is '8'; choose from auto, bf16"):
        pick_device("cpu", "8")
