"""Compare estimated memory (lit_llama/memory.py) with the measured peak, on a CPU, for random models of a few shapes.

Each case runs in its own process: a training step, or the answers to a batch of prompts. The peak is the
growth of the process since before the model was created. glibc keeps freed blocks of less than 32 MB for later use, but
larger tensors cannot reuse them; so each case is measured again with MALLOC_MMAP_THRESHOLD_=65536, which returns them,
and the estimate is compared with that.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    cases: tuple[str, ...] = ()  # measure only cases whose label contains one of these (default: all)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from benchmarks.material import SIZE_110M
from benchmarks.measure import Memory as MeasuredMemory
from lit_llama.generation import Sampling, generate
from lit_llama.memory import Memory, generation_memory, training_memory
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tables import markdown_table
from lit_llama.utils import log
from lit_llama.variant import mark_only_adapter_as_trainable

TINY = dict(block_size=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64)
SIZE_49M = dict(SIZE_110M, vocab_size=8000, n_layer=6)
SIZE_14M = dict(SIZE_49M, n_head=6, n_embd=384, intermediate_size=1024)
QWEN3 = dict(SIZE_14M, n_kv_head=2, qk_norm=True)
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A task on a random model.

    Args:
        label: the label in the table.
        method, own: the method's name, and its settings that differ from the defaults.
        sequences, tokens: shape of the micro-batch, or of the prompts.
        new: tokens of each answer; 0 trains.
        config: the base's configuration.
    """

    label: str
    method: str = "aligner"
    own: dict[str, Any] = field(default_factory=dict)
    sequences: int = 4
    tokens: int = 256
    new: int = 0
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    config: dict[str, Any] = field(default_factory=lambda: SIZE_49M)

    @property
    def labels(self) -> int:
        return self.sequences * self.tokens // 2

    @property
    def model_class(self) -> type[LLaMA]:
        return LLaMA if self.new else METHODS[self.method]

    @property
    def model_config(self) -> LLaMAConfig:
        return self.model_class.config_class(**self.config, **({} if self.new else self.own))

    def estimate(self) -> Memory:
        if self.new:
            return generation_memory(LLaMA, self.model_config, rows=self.sequences, prompt=self.tokens, new=self.new,
                                     dtype=self.dtype)  # fmt: skip
        return training_memory(
            self.model_class, self.model_config, sequences=self.sequences, tokens=self.tokens, labels=self.labels,
            dtype=self.dtype, gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip


CASES = (
    Case("Aligner, N = 1"),
    Case("Aligner, N = 1, 1 × 1,024 tokens", sequences=1, tokens=1024),
    Case("Aligner, N = 1, 110M parameters, 2 × 256 tokens", sequences=2, config=SIZE_110M),
    Case("Aligner, N = 10", own={"adapter_prompt_length": 10}),
    Case("14M parameters: gradient checkpointing", gradient_checkpointing=True, config=SIZE_14M),
    Case("14M: bf16", dtype=torch.bfloat16, config=SIZE_14M),
    Case("14M: Qwen3's architecture", config=QWEN3),
    Case("14M: LoRA, r = 8", method="lora", config=SIZE_14M),
    Case("14M: LLaMA-Adapter v2", method="adapter_v2", config=SIZE_14M),
    Case("14M: generation, 8 × (192 + 4) tokens", sequences=8, tokens=192, new=4, config=SIZE_14M),
)


def random_model(case: Case) -> LLaMA:
    with torch.device("meta"):
        model = case.model_class(case.model_config).to(case.dtype)
    for name, p in list(model.named_parameters()):
        module, _, child = name.rpartition(".")
        values = torch.empty(p.shape, dtype=p.dtype).uniform_(-0.03, 0.03)
        setattr(model.get_submodule(module), child, torch.nn.Parameter(values))
    mark_only_adapter_as_trainable(model)
    model.gradient_checkpointing = case.gradient_checkpointing
    return model.to("cpu")


def run(case: Case) -> None:
    """Run the task of a case."""
    torch.manual_seed(0)
    model, idx = random_model(case), torch.randint(3, case.config["vocab_size"], (case.sequences, case.tokens))
    if case.new:
        generate(model, idx.tolist(), Sampling(case.new))
        return
    labels = idx.clone()
    labels[:, : case.tokens - case.labels // case.sequences] = -1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    (-model.label_logps(idx, labels).mean()).backward()
    optimizer.step()


def peak(case: Case) -> int:
    """Return the most bytes that this process grows by while it runs the task."""
    tiny = {**TINY, **{name: case.config[name] for name in ("qk_norm",) if name in case.config}}
    run(Case("", case.method, case.own, 2, 16, min(case.new, 2), case.dtype, config=tiny))  # libraries start up
    memory = MeasuredMemory()
    run(case)
    return memory.peak()


def measure(case: Case, **variables: str) -> int:
    """Return the peak of a case in a process with these environment variables."""
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(peak, case).result()


def main(settings: Settings) -> None:
    rows = []
    for case in CASES:
        if settings.cases and not any(part in case.label for part in settings.cases):
            continue
        log(case.label)
        estimate, default, exact = case.estimate(), measure(case), measure(case, **EXACT)
        sizes = [estimate.base + estimate.adapter, estimate.cache + estimate.activations, estimate.total, exact]
        cells = [f"{size / 1e6:,.0f}" for size in sizes]
        rows.append([case.label, *cells, f"{estimate.total / exact - 1:+.1%}", f"{default / 1e6:,.0f}"])
    heads = ["case", "weights", "activations, cache", "estimate", "measured", "difference", "with glibc's default"]
    threads = torch.get_num_threads()
    print(f"Sizes in MB. Unless its name says otherwise, a case is a training step of 4 × 256 tokens in fp32 on 49M "
          f"parameters; torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}.\n")  # fmt: skip
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    cli.run(main, settings)
