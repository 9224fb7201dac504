"""Peak memory of one training step: SFT, DPO, and DPO with a second whole model as its reference, at the same tokens.

Each runs in a process of its own, on random tokens. On a GPU it is the memory that PyTorch allocated at most, on a CPU
what the process gained over its size before the model was loaded.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from lit_llama import aligner, cli
from lit_llama.checkpoint import load_model
from lit_llama.device import pick_device
from lit_llama.dpo import dpo_loss, sum_logps_by_row
from lit_llama.utils import UserError


@dataclass
class Settings:
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    rows: int = 32  # sequences of a micro-batch; for DPO half as many pairs
    tokens: int = 256  # of each sequence
    response_share: float = 0.5  # of them in the response
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # of the base
    what: Literal["all", "sft", "dpo", "two models"] = "all"  # one of the three prints bytes alone


def resident() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(args: Settings) -> int:
    """Bytes of one forward and backward pass, the model included."""
    device, dtype = pick_device(args.accelerator, args.precision)
    before = resident()
    model = load_model(args.checkpoint_dir, method="aligner", device=device, dtype=dtype)
    aligner.mark_only_adapter_as_trainable(model)
    idx = torch.randint(model.config.vocab_size, (args.rows, args.tokens), device=device)
    labels = idx.clone()
    labels[:, : args.tokens - int(args.response_share * args.tokens)] = -1
    if args.what == "sft":
        loss = -model(idx, labels=labels).mean()
    else:
        reference = torch.zeros(args.rows, device=device)  # as if computed beforehand
        if args.what == "two models":
            other = load_model(args.checkpoint_dir, device=device, dtype=dtype)
            with torch.no_grad():
                reference = sum_logps_by_row(other(idx, labels=labels), labels)
        policy = sum_logps_by_row(model(idx, labels=labels), labels)
        loss = dpo_loss(*policy.chunk(2), *reference.chunk(2))[0].mean()
    loss.backward()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before


def main(args: Settings) -> None:
    if args.rows < 2 or args.rows % 2:
        raise UserError(f"rows is {args.rows}; two make a pair, so it must be even.")
    if args.what != "all":
        return print(peak(args))
    found = {}
    for name in ("sft", "dpo", "two models"):
        command = [sys.executable, __file__, *sys.argv[1:], "--what", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{name} failed: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
        found[name] = int(done.stdout)
    for name, size in found.items():
        print(f"{name:<11}{size / 1e6:>10,.0f} MB{size / found['sft']:>8.2f} x")


if __name__ == "__main__":
    cli.run(main, Settings)
