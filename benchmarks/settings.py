"""Settings that several benchmarks share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_llama.settings import Checked, NonNegativeInt, PositiveInt

Clock = Literal["wall", "cpu"]


@dataclass
class DeviceSettings(Checked):
    # == Device ==
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    precision: str = "auto"  # precision of the base: 32, bf16; auto is bf16 on GPUs that have it, else 32


@dataclass
class BenchmarkSettings(DeviceSettings):
    # == What to measure ==
    rounds: PositiveInt = 7  # measured rounds; every contestant runs once in each
    out_dir: Path = Path("out/benchmark")  # tables, plots, random weights, the peers' packages

    # == Device ==
    threads: NonNegativeInt = 0  # threads of each process on a CPU; 0 leaves the choice to PyTorch


@dataclass
class PeerSettings(BenchmarkSettings):
    # == What to measure ==
    size: str = "110M"  # 110M, or a name of lit_llama.model.llama_configs: microworld, Llama-2-7B, ...
    peers: bool = True  # install and measure transformers, PEFT and LitGPT too

    # == Device ==
    clock: Clock = "wall"  # or cpu: CPU time, for a machine that is also used by others; needs --threads 1
