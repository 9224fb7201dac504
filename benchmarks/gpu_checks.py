"""Checks that a device computes what the CPU computes in fp32, on the bundled micro-world model and random tokens.

Each check yields the rows of a table: what, the limit, the value. A value beyond its limit raises `UserError`.
"""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.material import MICROWORLD, write_data
from benchmarks.measure import number
from lit_llama import aligner
from lit_llama.bank import open_bank
from lit_llama.checkpoint import load_model
from lit_llama.compiled import compile_
from lit_llama.compose import load_with_bank
from lit_llama.data import PreferenceData, SFTData, pad_rows
from lit_llama.dpo import DPOLoss
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.packing import pack_answers
from lit_llama.quantize import Quantize
from lit_llama.reference import adapter_reference, check_policy_equals_reference
from lit_llama.run.folder import RunFolder
from lit_llama.run.report import read_metrics
from lit_llama.run.setup import Setup, adamw, make_fabric
from lit_llama.run.train_settings import FinetuneSettings
from lit_llama.train import SFTLoss, Trainer
from lit_llama.utils import UserError

ROOT = Path(__file__).parent.parent
ADAPTERS = [ROOT / "aligner_weights" / f"microworld-{name}-n1" for name in ("pirate", "short", "json")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
Row = tuple[str, str, str]


def within(what: str, value: float, most: float) -> Row:
    """Return a row for a value that must not exceed a limit.

    Raises:
        UserError: It does.
    """
    if not value <= most:
        raise UserError(f"{what}: {number(value)}, and at most {number(most)} is allowed")
    return what, f"≤ {number(most)}", number(value)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of a tensor relative to the norm of the expected one."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def model(device: torch.device, dtype: torch.dtype, n: int = 1, quantize: str | None = None) -> LLaMA:
    """Return the micro-world model with a random Aligner with nonzero gates, the same on every device."""
    torch.manual_seed(n)
    network = load_model(MICROWORLD, method="aligner", method_config={"adapter_prompt_length": n},
                         device=device, dtype=dtype, quantize=quantize)  # fmt: skip
    generator = torch.Generator().manual_seed(n)
    for name, p in network.named_parameters():
        if name.endswith("gating_factor"):
            p.data = 0.1 * torch.randn(p.shape, generator=generator).to(device)
    aligner.mark_only_adapter_as_trainable(network)
    return network


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 2048, n).tolist() for n in lengths]


def batch(device: torch.device, *lengths: int) -> dict[str, torch.Tensor]:
    """Return rows of random tokens, by default of 64 and 41; the first 20 of each are not labels."""
    ids = [torch.tensor(row) for row in tokens(*(lengths or (64, 41)))]
    labels = [torch.where(torch.arange(len(row)) < 20, -1, row) for row in ids]
    return {name: tensor.to(device) for name, tensor in pad_rows(ids, labels).items()}


def check_logits_and_gradients(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Logits, loss and gradients with N = 1 and N = 10, in fp32 and bf16."""
    for n in (1, 10):
        results = {}
        for name, (where, dtype) in {"CPU": (CPU, torch.float32), **{d: (device, DTYPES[d]) for d in DTYPES}}.items():
            network, rows = model(where, dtype, n), batch(where)
            loss = SFTLoss()(lambda idx, labels, index, m=network: m.label_logps(idx, labels, index), rows)["loss"]
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
            with torch.no_grad():
                results[name] = network(rows["idx"]), loss, gradients
        for name, limits in (("fp32", (1e-4, 1e-5, 1e-3)), ("bf16", (0.03, 0.01, 0.1))):
            for what, actual, expected, most in zip(
                ("logits", "loss", "gradients"), results[name], results["CPU"], limits, strict=True
            ):
                yield within(f"{what}, N = {n}, {name}: relative error", error(actual, expected), most)


def check_compiled(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Log-probabilities and gradients of compiled layers in bf16: rows of two lengths, and packed rows."""
    network, compiled = model(device, torch.bfloat16, 10), model(device, torch.bfloat16, 10)
    compile_(compiled, "training", backend(device))
    packed = pack_answers([(prompt, tokens(9, 30, seed=len(prompt))) for prompt in tokens(20, 35)])
    packed = {name: packed[name].to(device) for name in ("idx", "labels", "label_index", "segments")}
    for kind, rows in (
        ("up to 64 tokens", batch(device)),
        ("up to 40 tokens", batch(device, 40, 31)),
        ("packed rows", packed),
    ):
        results = []
        for layers in (compiled, network):
            layers.zero_grad()
            logps = layers.label_logps(**rows)
            logps.sum().backward()
            results.append((logps, torch.cat([p.grad.flatten() for p in layers.parameters() if p.requires_grad])))
        for what, one, other, most in zip(("log-probabilities", "gradients"), *results, (0.03, 0.1), strict=True):
            yield within(f"--compile, {kind}, {what}, bf16: relative error", error(one, other), most)


def backend(device: torch.device) -> str:
    """Return the backend of `torch.compile`: on a CPU one that needs no compiler."""
    return "inductor" if device.type == "cuda" else "eager"


def check_greedy_answers(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Greedy tokens of the bundled Aligner, plain and compiled, and of a bank whose rows differ."""
    bank, prompts = open_bank(ADAPTERS, MICROWORLD), tokens(12, 30, 7, 21, 12)
    rows, sampling = [*bank, None, next(iter(bank))], Sampling(24)

    def answers(where: torch.device, dtype: torch.dtype, compiled: bool = False) -> list[list[int]]:
        network = load_with_bank(MICROWORLD, bank, next(iter(bank)), merge=True, device=where, dtype=dtype)
        if compiled:
            compile_(network, "decoding", backend(where))
        return generate(network, prompts, sampling)

    expected = answers(CPU, torch.float32)
    for name, compiled, most in (("fp32", False, 0.0), ("fp32", True, 0.0), ("bf16", False, 0.4)):
        actual = answers(device, DTYPES[name], compiled)
        same = np.mean([a == b for x, y in zip(actual, expected, strict=True) for a, b in zip(x, y, strict=True)])
        what = f"greedy tokens, {name}{', --compile' * compiled}: share that differs"
        yield within(what, 1 - same, most)
    network = load_with_bank(MICROWORLD, bank, device=device)
    with network.using(rows):
        together = generate(network, prompts, sampling)
    alone = []
    for row, prompt in zip(rows, prompts, strict=True):
        with network.using([row]):
            alone += generate(network, [prompt], sampling)
    differing = sum(a != b for a, b in zip(together, alone, strict=True))
    yield within("bank: rows of a mixed batch with other tokens than alone", differing, 0)


@dataclass
class FiftySteps(FinetuneSettings):
    epochs: float = 100.0
    batch_size: int = 8
    micro_batch_size: int = 4
    learning_rate: float = 1e-2
    warmup_epochs: float = 0.0
    max_steps: int | None = 50
    eval_interval: int = 50
    save_interval: int = 50
    overwrite: bool = True


def trainer(device: torch.device, name: str, out_dir: Path) -> Trainer:
    """Return a run of 50 steps as the scripts make it, on random rows."""
    prompts, lengths = np.full(32, 16), np.random.default_rng(0).integers(24, 56, 32)
    data_dir = out_dir / "check-rows" / "sft"
    if not (data_dir / "meta.json").is_file():
        write_data(out_dir / "check-rows", prompts, lengths, 2048)
    precision = "bf16-true" if name == "bf16" else "32-true"
    where = "cuda" if device.type == "cuda" else "cpu"
    settings = FiftySteps(
        checkpoint_dir=MICROWORLD,
        data_dir=data_dir,
        out_dir=out_dir / f"check-{device.type}-{name}",
        accelerator=where,
        precision=precision,
    )
    fabric, network = make_fabric(settings), model(device, DTYPES[name])
    data = SFTData(data_dir, "train")
    setup = Setup.wrap(fabric, network, [adamw(network, settings)], {"method": "aligner", "base": {}})
    return Trainer(setup, data, data, SFTLoss(), RunFolder(settings))


def read_losses(run_dir: Path) -> np.ndarray:
    """Return the training loss of each step of a run."""
    rows = sorted(read_metrics(run_dir / "metrics.csv").items())
    return np.array([row["train/loss"] for _, row in rows if "train/loss" in row])


def losses(run: Trainer) -> np.ndarray:
    """Train, and return the loss of each step."""
    run.fit()
    return read_losses(run.settings.out_dir)


def check_training(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Fifty steps of the training loop: prefetched batches, metrics read together, fused AdamW."""
    expected = losses(trainer(CPU, "fp32", out_dir / "expected"))
    for name, most in (("fp32", 2e-3), ("bf16", 0.05)):
        actual = losses(trainer(device, name, out_dir))
        yield within(f"50 training steps, {name}: relative error of a loss", np.abs(actual / expected - 1).max(), most)
    if device.type == "cuda":
        run = trainer(device, "bf16", out_dir)
        steps = run.batches.look_ahead(run.remaining_steps())
        for _ in range(2):  # the first steps allocate memory
            run.train_step(next(steps))
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train_step(next(steps))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield "a training step waits for the device", "never", "never"


def check_dpo(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """DPO starts from its reference: the loss is ln 2 and every margin 0, within 1e-5, also packed and compiled."""
    for name, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
        run = trainer(device, name, out_dir)
        pairs = PreferenceData(out_dir / "check-rows" / "pairs", "train")
        batches = np.array_split(np.arange(len(pairs)), 16)[: 1 if compiled else 2]  # compiling a shape takes seconds
        if compiled:
            compile_(run.unwrapped, "training", backend(device))
        loss = DPOLoss(adapter_reference({n: p.detach().clone() for n, p in run.trainable.items()}))
        for width in (10**6,) if compiled else (0, 10**6):
            pairs.n_embd = width
            if ("segments" in pairs.batch(batches[0])) != (width > 0):
                raise UserError(f"Pairs are {'not ' if width else ''}packed for a model of width {width}")
            check_policy_equals_reference(loss, pairs, run.fabric, run.model, batches)
        yield f"DPO's start, {name}{', --compile' * compiled}: distance of the loss from ln 2", "≤ 1e-5", "within"


def check_quantized(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Logits and gradients of every --quantize mode against those of the unquantized base."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield "--quantize", "", "not run: bitsandbytes is not installed"
        return
    rows, exact = batch(device), model(device, torch.bfloat16, 10)
    expected = exact(rows["idx"])
    for mode in get_args(Quantize):
        network = model(device, torch.bfloat16, 10, mode)
        network.label_logps(rows["idx"], rows["labels"], rows["label_index"]).sum().backward()
        norms = [p.grad.norm().item() for p in network.parameters() if p.requires_grad]
        if not all(math.isfinite(norm) for norm in norms) or not any(norms):
            raise UserError(f"--quantize {mode}: the adapter's gradients have the norms {norms}")
        yield within(f"logits, {mode}: relative error", error(network(rows["idx"]), expected),
                     0.1 if mode == "int8" else 0.3)  # fmt: skip


FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def check_flash(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Attention to text and prefix is fused, forward and backward: by flash in bf16, also with grouped queries."""
    rows = batch(device)
    for n_kv_head, kind in ((8, "all heads"), (2, "grouped queries")):
        for name, kernels, which in (("bf16", FUSED[:1], "flash"), ("fp32", FUSED, "fused")):
            network = random_model(device, DTYPES[name], n_kv_head)
            try:
                with sdpa_kernel(kernels):
                    network.label_logps(**rows).sum().backward()
            except RuntimeError as problem:
                raise UserError(f"No fused attention, {kind}, {name}: {str(problem).splitlines()[0]}") from None
            yield f"attention through the {which} kernels alone, {kind}, {name}", "possible", "yes"


def random_model(device: torch.device, dtype: torch.dtype, n_kv_head: int) -> aligner.LLaMA:
    """Return a model of the micro-world's shape with random weights and ten tokens, the same on every device."""
    torch.manual_seed(0)
    config = {**asdict(LLaMAConfig.from_name("microworld")), "adapter_prompt_length": 10, "n_kv_head": n_kv_head}
    network = aligner.LLaMA(aligner.LLaMAConfig(**config))
    for block in network.transformer.h[network.config.adapter_start_layer :]:
        torch.nn.init.normal_(block.attn.gating_factor, std=0.1)
    aligner.mark_only_adapter_as_trainable(network)
    return network.to(device, dtype)


def check_packed(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Answers that share a row, as in RL and DPO, against separate rows, with fused attention alone."""
    groups = [(prompt, tokens(9, 30, seed=len(prompt))) for prompt in tokens(20, 35)]
    separate = [(prompt, [answer]) for prompt, answers in groups for answer in answers]
    for kind, n_kv_head in (("all heads", 8), ("grouped queries", 2)):
        for name, limits in (("fp32", (1e-4, 1e-3)), ("bf16", (0.03, 0.1))):
            network, results = random_model(device, DTYPES[name], n_kv_head), []
            for packed in (pack_answers(groups), pack_answers(separate)):
                rows = [packed[key].to(device) for key in ("idx", "labels", "label_index", "segments")]
                network.zero_grad()
                try:
                    with sdpa_kernel(FUSED):
                        logps = network.label_logps(*rows)
                        logps.sum().backward()
                except RuntimeError as problem:
                    raise UserError(f"No fused attention with a mask, {kind}: {str(problem).splitlines()[0]}") from None
                gradients = [p.grad.flatten() for p in network.parameters() if p.requires_grad]
                results.append((logps, torch.cat(gradients)))
            for what, one, other, most in zip(("log-probabilities", "gradients"), *results, limits, strict=True):
                yield within(f"packed rows, {kind}, {what}, {name}: relative error", error(one, other), most)


def check_processes(device: torch.device, out_dir: Path) -> Iterator[Row]:
    """Ten steps of finetune/aligner.py on two GPUs and on one."""
    if torch.cuda.device_count() < 2:
        yield "two processes", "", f"not run: {torch.cuda.device_count()} GPUs"
        return
    data, runs = out_dir / "check-microworld", []
    script = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    if not (data / "meta.json").is_file():
        script([sys.executable, "scripts/prepare_microworld.py", "--output_dir", data.resolve()])
    for devices in (1, 2):
        run = (out_dir / f"check-{devices}-devices").resolve()
        script([sys.executable, "finetune/aligner.py", "--data_dir", data.resolve(), "--out_dir", run, "--overwrite",
                "--devices", str(devices), "--max_steps", "10", "--micro_batch_size", "16", "--precision", "32-true",
                "--sample_prompts", "0"])  # fmt: skip
        runs.append(read_losses(run))
    yield within("two processes, relative error of a loss", np.abs(runs[1] / runs[0] - 1).max(), 1e-3)


CHECKS: dict[str, Callable[[torch.device, Path], Iterator[Row]]] = {
    "logits": check_logits_and_gradients,
    "compiled": check_compiled,
    "answers": check_greedy_answers,
    "training": check_training,
    "dpo": check_dpo,
    "quantize": check_quantized,
    "flash": check_flash,
    "packed": check_packed,
    "processes": check_processes,
}
