"""The device and precision of a run."""

import os

import torch

from lit_llama.utils import UserError

DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16": torch.float16,
    "16-true": torch.float16,
    "32": torch.float32,
    "32-true": torch.float32,
}


def computes_bf16(accelerator: str) -> bool:
    """Return whether `accelerator`, one of Fabric's names, is a GPU with bf16 arithmetic; emulation does not count."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: torch.device) -> str:
    """Return the name of an NVIDIA GPU, such as "NVIDIA H100 80GB HBM3", or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def disable_cudnn_attention() -> None:
    """Leave out cuDNN's attention, which PyTorch prefers on some GPUs from version 2.11 on.

    It makes a plan on the CPU for each new shape, so for each token that is decoded and each length of a micro-batch.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def pick_device(accelerator: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of an accelerator, and the dtype of the base model on it.

    The accelerators are named as in Fabric, which is not used here because it takes seconds to import. DISABLE_MPS=1
    hides the GPU of a Mac, as in Fabric. The precision "auto" is bf16 if `computes_bf16(accelerator)`, and fp32
    otherwise.

    Raises:
        UserError: There is no such device or precision.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    devices = {"auto": torch.device("cpu"), "cpu": torch.device("cpu")}
    if found is not None and not (found.type == "mps" and os.environ.get("DISABLE_MPS") == "1"):
        devices |= dict.fromkeys(("auto", "gpu", found.type), torch.device(found.type, 0))
    if accelerator not in devices:
        raise UserError(f"There is no accelerator {accelerator!r} here; choose from {', '.join(devices)}.")
    if precision == "auto":
        precision = "bf16" if computes_bf16(accelerator) else "32"
    disable_cudnn_attention()
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r}; choose from auto, {', '.join(DTYPES)}.")
    return devices[accelerator], DTYPES[precision]
