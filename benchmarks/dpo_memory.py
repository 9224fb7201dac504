"""Peak memory of one training step: SFT, DPO, and DPO with a second model as its reference, on equally many tokens.

Each runs in its own process, on random tokens. On a GPU this is the most memory that PyTorch allocated, on a CPU the
growth of the process since before the model was loaded.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import DeviceSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt, Share


@dataclass
class Settings(DeviceSettings):
    # == What to measure ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    rows: PositiveInt = 32  # sequences of a micro-batch; for DPO half as many pairs
    tokens: PositiveInt = 256  # tokens of each sequence
    response_share: Share = 0.5  # share of the tokens in the response


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from benchmarks import harness as b
from lit_llama.device import pick_device
from lit_llama.utils import UserError


def main(settings: Settings) -> None:
    if settings.rows % 2:
        raise UserError(f"rows is {settings.rows}; two make a pair, so it must be even.")
    device, dtype = pick_device(settings.accelerator, settings.precision)
    shared = {"kind": "ours", "n": 1, "weights": settings.checkpoint_dir, "device": device,
              "dtype": dtype, "threads": torch.get_num_threads()}  # fmt: skip
    batch = settings.rows, settings.tokens, int(settings.response_share * settings.tokens)
    peaks = {}
    for loss in ("sft", "dpo", "dpo, two models"):
        with closing(b.Contestant(loss, **shared)) as contestant:
            contestant("load")
            peaks[loss] = contestant("step", batches=[batch], data="random", loss=loss)["peak"]
    for loss, size in peaks.items():
        print(f"{loss:<16}{size / 1e6:>10,.0f} MB{size / peaks['sft']:>8.2f} x")


if __name__ == "__main__":
    cli.run(main, settings)
