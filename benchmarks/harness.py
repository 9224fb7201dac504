"""What the benchmarks share: shapes and lengths, the arithmetic of their tables, contestants in processes of their own.

Every number is a ratio, or becomes one: the contestants take turns (A B C A B C …), so that what else the machine
does meets all of them, and medians are reported with their spread.
"""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from lit_llama.checkpoint import weights_path, write_base, write_text
from lit_llama.data import PREFERENCE_FORMAT, SFT_FORMAT
from lit_llama.device import pick_device
from lit_llama.hf import parameters, to_hf
from lit_llama.hf_config import hf_config
from lit_llama.model import LLaMAConfig, llama_configs
from lit_llama.prepare import write_dataset
from lit_llama.tensor_files import LazyTensor, open_tensors, write_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, atomic_write, log

ROOT = Path(__file__).parent.parent.resolve()
MICROWORLD = ROOT / "checkpoints" / "microworld"

# the shape of a 110M-parameter LLaMA: large enough to be limited by its matrix products, small enough for a CPU
SIZE_110M = dict(vocab_size=32000, n_layer=12, n_head=12, n_embd=768, intermediate_size=2048, tie_embeddings=True)

# tokens of 999 Alpaca rows under LLaMA's tokenizer, in the Alpaca template with BOS and EOS: the 0, 5, 10, … 100 %
# quantiles of prompt and response
PROMPT_QUANTILES = [40, 43, 44, 46, 46, 47, 48, 49, 50, 51, 53, 57, 65, 69, 72, 74, 77, 81, 87, 97, 224]
RESPONSE_QUANTILES = [2, 9, 13, 16, 22, 29, 38, 53, 71, 92, 120, 150, 179, 212, 251, 290, 325, 366, 405, 460, 663]


def shape(size: str, block_size: int = 1024) -> LLaMAConfig:
    """The configuration of a benchmark: "110M", or a name of `lit_llama.model.llama_configs`.

    Raises:
        UserError: there is no such size.
    """
    if size == "110M":
        return LLaMAConfig(block_size=block_size, **SIZE_110M)
    if size not in llama_configs:
        raise UserError(f"There is no size {size!r}; known are 110M, {', '.join(llama_configs)}.")
    return LLaMAConfig.from_name(size)


def alpaca_lengths(rows: int, max_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) tokens of prompts and of prompts with their responses, drawn from Alpaca's quantiles, cut to a length."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, len(PROMPT_QUANTILES))
    prompts, responses = (
        np.interp(rng.random(rows), at, quantiles).round().astype(int)
        for quantiles in (PROMPT_QUANTILES, RESPONSE_QUANTILES)
    )
    prompts = np.minimum(prompts, max_length - 2)
    return prompts, np.minimum(prompts + responses, max_length)


# == arithmetic ==


def matmul_parameters(config: LLaMAConfig) -> int:
    """Weights that every token is multiplied with: the blocks' projections and the output layer."""
    attention = config.n_embd * config.head_size * (2 * config.n_head + 2 * config.n_kv_head)
    mlp = 3 * config.n_embd * config.intermediate_size
    return config.n_layer * (attention + mlp) + config.padded_vocab_size * config.n_embd


def training_flops(config: LLaMAConfig, lengths: Iterable[int]) -> int:
    """Model FLOPs of a training step on a frozen base, forward and activation gradients: 4 per weight and token.

    Causal attention adds, per layer and per pair of a token and one it sees, 2 products of 2·nh·hs FLOPs in the
    forward pass and 4 in the backward pass. Padding is no work; work that is left out (the output layer where nothing
    is predicted, gradients below the first aligned layer) counts as done, as everybody counts.
    """
    pairs = sum(int(t) * (int(t) + 1) // 2 for t in lengths)
    width = config.n_head * config.head_size
    return 4 * matmul_parameters(config) * int(sum(lengths)) + 12 * config.n_layer * width * pairs


def decode_bytes(config: LLaMAConfig, dtype: torch.dtype, batch_size: int, context: float) -> float:
    """Bytes that one decoding step must read: all weights once, and every row's keys and values."""
    cache = 2 * config.n_layer * config.n_kv_head * config.head_size * batch_size * context
    return (matmul_parameters(config) + cache) * dtype.itemsize


def padding_waste(lengths: np.ndarray, batches: Iterable[np.ndarray]) -> float:
    """The share of padding among all tokens computed, 0 to 1."""
    batches = list(batches)
    computed = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - sum(int(lengths[rows].sum()) for rows in batches) / computed


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    low, high = np.quantile(values, (0.25, 0.75))
    return statistics.median(values), float(high - low) / 2


def ratio(values: list[float], others: list[float]) -> tuple[float, float]:
    """Median and spread of values[i] / others[i]: what was measured in the same round is compared."""
    return median_and_spread([a / b for a, b in zip(values, others, strict=True)])


# == limits of the machine ==


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable[[], Any], device: torch.device, clock: Clock = "wall") -> float:
    """Seconds of one call; "cpu" are the processor seconds of this process, which do not grow while others run."""
    synchronize(device)
    began = CLOCKS[clock]()
    work()
    synchronize(device)
    return CLOCKS[clock]() - began


def check_clock(clock: Clock, device: torch.device) -> None:
    """Raises: UserError: processor seconds mean nothing for a GPU or for several threads."""
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock cpu counts the processor's seconds: it needs --accelerator cpu and --threads 1.")


def copy_bandwidth(device: torch.device, clock: Clock = "wall") -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device, clock) for _ in range(7))


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Clock = "wall") -> float:
    """FLOPs per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device, clock) for _ in range(5))


# == material ==


def write_weights(folder: Path, config: LLaMAConfig, dtype: torch.dtype) -> None:
    """A random base in our layout, and in Hugging Face's in its folder hf; made once."""
    about = json.dumps({"config": config.to_json(), "dtype": str(dtype)})
    done = folder / "benchmark.json"
    if done.is_file() and done.read_text(encoding="utf-8") == about:
        return
    shutil.rmtree(folder, ignore_errors=True)

    def random(name: str, size: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(size) if name.endswith("scale") else 0.02 * torch.randn(size)

    torch.manual_seed(0)
    shapes = parameters(config)
    write_base(
        folder, config, {name: LazyTensor(size, dtype, partial(random, name, size)) for name, size in shapes.items()}
    )
    (folder / "hf").mkdir()
    write_tensors(folder / "hf" / "model.safetensors", to_hf(open_tensors([weights_path(folder)]), config))
    write_text(folder / "hf" / "config.json", json.dumps(hf_config(config, dtype, Tokenizer(MICROWORLD))))
    write_text(done, about)


def write_data(folder: Path, prompts: np.ndarray, lengths: np.ndarray, vocab_size: int) -> None:
    """Random tokens as prepared datasets: an SFT one of these lengths, and pairs whose responses have equal lengths."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(3, vocab_size, count).tolist()

    sizes = list(zip(prompts.tolist(), lengths.tolist(), strict=True))
    sft = {"input_ids": [tokens(n) for _, n in sizes], "prompt_length": prompts.tolist()}
    pairs = {"prompt": [tokens(p) for p, _ in sizes]}
    pairs |= {side: [tokens(n - p) for p, n in sizes] for side in ("chosen", "rejected")}
    for name, columns, format in (("sft", sft, SFT_FORMAT), ("pairs", pairs, PREFERENCE_FORMAT)):
        meta = {"format": format, "mask_prompt": True, "tokenizer_sha256": ""}
        write_dataset(folder / name, {"train": Dataset.from_dict(columns)}, meta)


# == peers ==


def make_peers(folder: Path) -> Path:
    """A throw-away environment with PEFT and LitGPT from PyPI that borrows everything else from this one.

    So torch is the same build for everybody, and is not downloaded again. What cannot be installed is said, and missing
    in the tables.

    Returns:
        Its Python.
    """
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / f"with-torch-{torch.__version__}"
    if stamp.is_file():
        return executable
    log(f"making an environment for the peers in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    where = [executable, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    own = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    pip = [executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--progress-bar", "off"]
    # LitGPT's pins would replace what transformers needs; what it imports is here already
    (folder / "constraints.txt").write_text(f"torch=={torch.__version__}\n", encoding="utf-8")
    missing = []
    for packages in (["transformers", "peft"], ["--no-deps", "litgpt"]):
        command = [*pip, "-c", folder / "constraints.txt", *packages]
        if subprocess.run(command, stdout=sys.stderr, stderr=subprocess.DEVNULL).returncode:
            missing.append(packages[-1])
            log(f"note: pip cannot install {packages[-1]}; the tables are without it.")
    if not missing:  # else the next run tries again
        stamp.touch()
    return executable


def peer_versions(python: Path) -> str:
    """A sentence."""
    names = ("torch", "transformers", "peft", "litgpt")
    code = f"""
from importlib import metadata
found = {{d.metadata["Name"].lower(): d.version for d in reversed(list(metadata.distributions()))}}
print(", ".join(f"{{name}} {{found[name]}}" for name in {names} if name in found))"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return f"The peers' environment: {done.stdout.strip()}."


class Contestant:
    """One side of a comparison, in a process of its own: `benchmarks/worker.py` with its settings.

    Calling it sends a call and waits for the answer; the other processes sleep meanwhile.

    Raises:
        UserError: the process cannot do what it is asked, or ends; the sentence is its own.
    """

    def __init__(self, name: str, python: Path | str = sys.executable, **settings: Any) -> None:
        self.name = name
        words = [str(python), str(ROOT / "benchmarks" / "worker.py"), json.dumps(settings, default=str)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, call: str, **arguments: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        except BrokenPipeError:
            answer = {"error": "its process ended"}
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}.")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_all(specs: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, Contestant]:
    """Starts and loads the contestants; who cannot take part gets a sentence in `notes`."""
    contestants = {}
    for name, settings in specs.items():
        contestant = Contestant(name, **settings)
        try:
            contestant("load")
            contestants[name] = contestant
        except UserError as error:
            contestant.close()
            log(f"note: without {error}")
            notes.append(f"Without {error}")
    return contestants


# == reports ==


def about_machine(device: torch.device) -> dict[str, str]:
    """Machine, versions, date and command of a report."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = {}
    for package in ("torch", "lightning"):
        packages[package] = metadata.version(package)
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores{gpu}",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{k} {v}" for k, v in packages.items())]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def number(value: float, digits: int = 3) -> str:
    """A few significant digits, thousands separated, never an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:.0f}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def with_spread(values: list[float], scale: float = 1.0) -> str:
    """Median ± half the distance between the quartiles."""
    median, spread = median_and_spread([value * scale for value in values])
    return f"{number(median)} ± {number(spread, 2)}"


def set_up(args: Any) -> tuple[LLaMAConfig, dict[str, Any]]:
    """What a run begins with: threads, device and random weights. `args.device` and `args.precision` become those used.

    Returns:
        the model's shape, and what every contestant is told.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device, dtype = pick_device(args.accelerator, args.precision)
    args.precision = "bf16" if dtype == torch.bfloat16 else "32"
    check_clock(args.clock, args.device)
    config, weights = shape(args.size), args.out_dir / f"weights-{args.size}-{args.precision}"
    write_weights(weights, config, dtype)
    return config, {"weights": weights, "device": args.device, "precision": args.precision,
                    "threads": torch.get_num_threads(), "clock": args.clock}  # fmt: skip


def write_report(path: Path, title: str, parts: list[str], device: torch.device) -> None:
    """Markdown: what was run where, then tables and notes."""
    about = "".join(f"- {name}: {value}\n" for name, value in about_machine(device).items())
    write_text(path, "\n\n".join(part.rstrip("\n") for part in (f"# {title}", about, *parts)) + "\n")


def plot_bars(path: Path, panels: dict[str, dict[str, list[float]]]) -> None:
    """A panel per quantity: a bar per contestant, the median, with its spread."""
    figure = _figure(len(panels))
    for axes, (label, bars) in zip(figure.axes, panels.items(), strict=True):
        pairs = [median_and_spread(values) for values in bars.values()]
        axes.barh(list(bars), [m for m, _ in pairs], xerr=[s for _, s in pairs], color="C0", ecolor="0.3", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def plot_lines(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], ylabel: str) -> None:
    """A panel per cause: named curves of (cause, cost) from the origin, so that a straight line looks straight."""
    figure = _figure(len(panels))
    for axes, (label, curves) in zip(figure.axes, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        axes.set(xlabel=label, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def _figure(panels: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure = Figure(figsize=(7 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes in list(grid)[panels:]:
        axes.remove()
    return figure


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
