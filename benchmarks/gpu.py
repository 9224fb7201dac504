"""Check that a GPU computes the same as the CPU, then measure its speed, in one command.

The checks run on the bundled micro-world model, the measurements on random weights of the shape --size, which are
generated on the device; nothing is downloaded. All rows are on one Markdown page, which is rewritten after each part.
The part "peers" does not run by default: it installs transformers, PEFT and LitGPT and writes 27 GB of weights for 7B.
On a CPU, --accelerator cpu --size microworld tests the command itself.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import DeviceSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt, Range

Part = Literal["logits", "compiled", "answers", "training", "dpo", "quantize", "flash", "packed", "processes", "train",
               "decode", "peers"]  # fmt: skip
USUAL: tuple[Part, ...] = tuple(part for part in get_args(Part) if part != "peers")


@dataclass
class Settings(DeviceSettings):
    # == What to check and to measure ==
    parts: tuple[Part, ...] = USUAL  # parts to run, in this order
    size: str = "Llama-2-7B"  # 110M, or a name of lit_llama.model.llama_configs
    out_dir: Path = Path("out/benchmark")  # the page, and the files of the checks

    # == How to measure ==
    rounds: PositiveInt = 7  # measured rounds; every contestant runs once in each
    rows: PositiveInt = 8  # rows of a micro-batch, an even number: two make a pair
    length: PositiveInt = 512  # tokens of each row, half of them labels
    prompt_length: PositiveInt = 128  # tokens of each prompt
    new_tokens: Annotated[int, Range(least=3)] = 128  # tokens to generate; the rate is that from the third on
    batch_sizes: tuple[PositiveInt, ...] = (1, 8, 64)  # prompts at a time


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import gc
import os
import time
import traceback
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks import harness as b
from benchmarks import training
from benchmarks.gpu_checks import CHECKS
from benchmarks.material import decode_bytes, dtype_name, shape, training_flops
from benchmarks.measure import compare, copy_bandwidth, matmul_rate, with_interval
from benchmarks.worker import Ours
from lit_llama.compiled import compile_
from lit_llama.device import pick_device
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError, first_line, log

Rows = Iterator[list[str]]  # what, target, measured, compared with 1


def make_worker(settings: Settings, device: torch.device, dtype: torch.dtype, *, generates: bool) -> Ours:
    """Return a contestant with random weights on the device and an Aligner of one token.

    For generation the Aligner is merged, as the generate scripts do: the model is a plain one with an output bias.
    """
    about = {"threads": torch.get_num_threads(), "weights": None, "device": device, "dtype": dtype}
    worker, config = Ours({**about, "generates": generates}), asdict(shape(settings.size))
    worker.build(n=0 if generates else 1, config={**config, "proj_bias": generates})
    return worker


def measure_training(settings: Settings, device: torch.device, dtype: torch.dtype) -> Rows:
    """Utilization and memory of a training step, with and without compiled layers, and DPO against SFT."""
    worker = make_worker(settings, device, dtype, generates=False)
    response = settings.length // 2
    batch = [(settings.rows, settings.length, response)]
    sft, dpo = (partial(worker.step, batches=batch, data="random", loss=loss) for loss in ("sft", "dpo"))
    peak = matmul_rate(device, dtype, "wall")

    def utilization(what: str, steps: list[dict]) -> list[str]:
        flops = training_flops(worker.model.config, steps[0]["lengths"]) / steps[0]["lengths"].sum()
        rates = training.tokens_per_second(steps)
        used = f"{np.median(rates) * flops / peak:.0%} ({with_interval(rates)} tokens/s)"
        return [f"training, {what}: utilization of the rate of a large product", "≥ 60%", used, ""]

    packed = partial(worker.step, batches=batch, data="random, packed", loss="dpo")
    _, steps_of = b.take_turns({"SFT": sft, "DPO": dpo, "DPO, packed": packed}, settings.rounds, [])
    yield utilization("N = 1", steps_of["SFT"])
    seconds = {name: [sum(step["seconds"].values()) for step in steps] for name, steps in steps_of.items()}
    yield ["time, DPO over SFT", "≤ 1.05", *compare(seconds["DPO"], seconds["SFT"])]
    yield [
        "time, DPO with packed pairs over separate responses",
        "≤ 1",
        *compare(seconds["DPO, packed"], seconds["DPO"]),
    ]
    if device.type == "cuda":  # on a CPU, the memory of other models in this process would count too
        ratio = steps_of["DPO"][-1]["peak"] / steps_of["SFT"][-1]["peak"]
        yield ["peak memory, DPO over SFT", "≤ 1.1", f"{ratio:.2f}", ""]
        beyond = steps_of["SFT"][-1]["beyond"]
        yield ["memory beyond the weights, N = 1", "≤ 0.5 × the leanest peer's", f"{beyond / 1e9:.2f} GB", ""]
        compile_(worker.model, "training")
        _, compiled = b.take_turns({"compiled": sft}, settings.rounds, [])
        yield utilization("N = 1, --compile", compiled["compiled"])


def measure_decoding(settings: Settings, device: torch.device, dtype: torch.dtype) -> Rows:
    """Decoding as a share of the bandwidth limit, plain and compiled with CUDA graphs; a batch against one by one."""
    worker, rng = make_worker(settings, device, dtype, generates=True), np.random.default_rng(0)
    config, bandwidth = worker.model.config, copy_bandwidth(device, "wall")
    yield ["bandwidth of a copy, read and written", "", f"{bandwidth / 1e9:,.0f} GB/s", ""]
    length, new = settings.prompt_length, settings.new_tokens

    def prompts(count: int) -> list[list[int]]:
        return rng.integers(3, config.vocab_size, (count, length)).tolist()

    for what in ("", ", --compile") if device.type == "cuda" else ("",):
        if what:
            compile_(worker.model, "decoding")
        for size in settings.batch_sizes:
            turn = partial(worker.generate, prompts=prompts(size), n_new=new)
            _, answers = b.take_turns({"decode": turn}, max(3, settings.rounds // 2), [])
            rates = [size / answer["steady"] for answer in answers["decode"]]
            read = length + (new if what else new / 2)  # slots of the cache; compiled steps always read all of them
            limit = size * bandwidth / decode_bytes(config, dtype, size, read)
            used = f"{np.median(rates) / limit:.0%} ({with_interval(rates)} tokens/s)"
            yield [f"decode, batch {size}{what}: share of the bandwidth limit", "≥ 85%", used, ""]
        if not what:  # a compiled step would be recorded again for each prompt
            many = prompts(max(settings.batch_sizes))
            # no warm-up: these shapes have been generated above
            together, alone = (worker.answer_all(many, new, size)["seconds"] for size in (len(many), 1))
            yield [f"tokens/s, {len(many)} prompts as one batch over one by one", "≥ 20", f"{alone / together:.1f}", ""]


def measure_peers(settings: Settings, device: torch.device, dtype: torch.dtype) -> Rows:
    """Training with N = 1 compared with PEFT and LitGPT, as benchmarks/training.py measures it."""
    run = b.start_run(training.Settings(
        accelerator=settings.accelerator, precision="bf16" if dtype == torch.bfloat16 else "32", size=settings.size,
        rounds=settings.rounds, out_dir=settings.out_dir, micro_batch_size=settings.rows, max_length=settings.length,
        dpo=False, growth=False,
    ))  # fmt: skip
    _, answers = training.measure(run, {training.N1: {"n": 1}})
    yield from training.ratios(run, answers)
    yield from ([note, "", "", ""] for note in run.notes)


MEASUREMENTS = {"train": measure_training, "decode": measure_decoding, "peers": measure_peers}


def run_part(part: str, settings: Settings, device: torch.device, dtype: torch.dtype) -> tuple[list[list[str]], bool]:
    """Return the rows of a part, and whether it succeeded. An error in it does not stop the other parts.

    The traceback of an unexpected error goes to stderr, its first line into the rows.
    """
    rows: list[list[str]] = []
    try:
        gc.collect()  # the model of the part before: a compiled one is in a reference cycle
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if part in CHECKS:
            rows += ([*row, ""] for row in CHECKS[part](device, settings.out_dir))
        else:
            for row in MEASUREMENTS[part](settings, device, dtype):
                rows.append(row)
    except Exception as error:  # from any library: a driver, a compiler, a peer
        if not isinstance(error, UserError):
            log(traceback.format_exc())
        sentence = first_line(error)
        log(f"{part}: {sentence}")
        return [*rows, [part, "", f"failed: {sentence}", ""]], False
    return rows, True


def main(settings: Settings) -> None:
    if settings.rows % 2:
        raise UserError(f"rows is {settings.rows}; two make a pair, so it must be even.")
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1":
        raise UserError("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 rounds fp32 products; unset it to check them.")
    device, dtype = pick_device(settings.accelerator, settings.precision)
    some = "" if settings.parts == USUAL else f"-{'-'.join(settings.parts)}"  # does not replace the complete page
    path = settings.out_dir / f"gpu-{settings.size}-{device.type}{some}.md"
    tables, failed = [], []
    for part in settings.parts:
        began = time.perf_counter()
        log(f"== {part}")
        rows, succeeded = run_part(part, settings, device, dtype)
        failed += [] if succeeded else [part]
        title = f"## {part}, {time.perf_counter() - began:.0f} s"
        tables += [title, markdown_table(["what", "target", "measured", "compared with 1"], rows)]
        text = b.write_report(path, f"{device.type}, {settings.size}, {dtype_name(dtype)}", tables, device)
        log("\n".join(f"{row[0]}: {row[2]}" for row in rows))
    print(text, end="")
    if failed:
        raise UserError(f"Failed: {', '.join(failed)}; {path} says why.")


if __name__ == "__main__":
    cli.run(main, settings)
