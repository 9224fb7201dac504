"""Analyze trained Aligners: their gates, how far the prefixes moved from initialization, and what they add to layers.

    python studies/analysis.py aligner_weights/microworld-json-n1 aligner_weights/microworld-pirate-n1

Reads adapters of this project and the authors' .pth files. Gates and prefixes need no base model. With
--checkpoint_dir it also lists the vocabulary tokens that the constant of a one-token Aligner pushes up and down in each
layer, and with --data_dir the norm of the added term relative to the attention output. Tables go to stdout; gates.png,
prefixes.png and layers.csv go to out_dir.
"""

import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, NonNegativeFloat, PositiveInt, Seed


@dataclass
class Settings(Checked):
    files: tuple[Path, ...] = ()  # adapters: .safetensors, .pth or run folders
    checkpoint_dir: Path | None = None  # the base model that all of them were trained on
    data_dir: Path | None = None  # prepared dataset to measure effects on; needs the base
    rows: PositiveInt = 32  # validation rows to read
    within: NonNegativeFloat = 0.1  # values that differ by at most this count as near
    top: PositiveInt = 6  # vocabulary tokens to list in each direction
    seed: Seed = 0  # seed of t-SNE
    out_dir: Path = Path("out/analysis")  # figures and layers.csv


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama import aligner
from lit_llama.checkpoint import AdapterFile, load_model
from lit_llama.data import SFTData
from lit_llama.run.report import make_figure, make_panels, plain_label, save_figure
from lit_llama.storage.files import claim, write_text
from lit_llama.storage.schema import field
from lit_llama.tables import csv_text, markdown_table
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from scripts.inspect_aligner import PREFIX, agreement, gates, open_adapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTHORS_SEED = 1337
AUTHORS_THREADS = 84 * 1536  # threads that their GPU, an RTX A6000, runs at once
SIZES = (0.0, 0.25, 0.5, 1.0, 2.0, float("inf"))


# == the start of a prefix ==


def initial_prefix(adapter: AdapterFile) -> torch.Tensor | None:
    """Return the prefix before the first step (N, C) in fp32; None if unknown or taken from another adapter.

    This project draws it on the CPU in fp32 from the seed in the header. Files without a header are taken to be the
    authors', who drew it on a GPU in bf16 from seed 1337.
    """
    shape = adapter.state[PREFIX].shape
    if "training" not in adapter.meta:
        drawn = cuda_normal(shape.numel(), AUTHORS_SEED, AUTHORS_THREADS)
        return torch.from_numpy(drawn).view(shape).bfloat16().float()
    source = f"The header of {adapter.path}: training"
    settings = field(adapter.meta["training"], "settings", dict, source, {})
    seed = field(settings, "seed", int, f"{source}.settings", None)
    if settings.get("init_adapter") is not None or seed is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return aligner.Prefix(*shape, dtype=torch.float32).weight.detach()


def cuda_normal(count: int, seed: int, threads: int) -> np.ndarray:
    """Return the first `count` numbers that torch's `normal_` draws on a GPU after `torch.manual_seed(seed)`, in fp32.

    Element i is number i // threads of thread i % threads. Each thread has its own stream of Philox (Salmon et al.,
    SC 2011) and makes four normals of four words by the Box-Muller transform, as cuRAND does.

    Args:
        threads: Threads that the GPU runs at once: multiprocessors × resident threads of each.
    """
    turn, thread = np.divmod(np.arange(count, dtype=np.uint64), np.uint64(threads))
    counter = np.stack([turn // 4, np.zeros_like(turn), thread, np.zeros_like(turn)])
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float32)  # (4, count)
    uniform = words * np.float32(2**-32) + np.float32(2**-33)
    radius = np.sqrt(-2 * np.log(uniform[0::2]))  # (2, count): of the first pair of words and of the second
    angle = np.float32(2 * np.pi) * uniform[1::2]
    normals = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1).reshape(4, count)
    return normals[turn % 4, np.arange(count)]


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return the random words (4, n), 32 bits each in uint64, of Philox4x32 with ten rounds for counters (4, n)."""
    a, b, c, d = counter
    low = np.uint64(0xFFFFFFFF)
    for i in range(10):
        k0, k1 = ((k + i * step) & 0xFFFFFFFF for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        ac, cc = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (cc >> 32) ^ b ^ np.uint64(k0), cc & low, (ac >> 32) ^ d ^ np.uint64(k1), ac & low
    return np.stack([a, b, c, d])


def equal_by_size(prefix: torch.Tensor, start: torch.Tensor) -> list[tuple[float, float, int, int]]:
    """Return (from, to, values, equal values) for ranges of |start|; bf16's steps double with each power of two."""
    size, equal = start.abs(), prefix == start
    counts = []
    for low, high in itertools.pairwise(SIZES):
        there = (size >= low) & (size < high)
        counts.append((low, high, int(there.sum()), int((there & equal).sum())))
    return counts


# == what a layer receives ==


@torch.no_grad()
def layer_effects(model: aligner.LLaMA, texts: list[torch.Tensor]) -> dict[int, float]:
    """Return ‖added term‖ / ‖attention output‖ of each aligned layer, both over all heads and before c_proj.

    Args:
        texts: Token ids (T,) of each text; the ratio is the mean over all tokens.
    """
    ratios: dict[int, list[torch.Tensor]] = {}

    def measure(layer: int, attn: aligner.CausalSelfAttention):
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            y = llama.CausalSelfAttention.attend(attn, q, k, v, mask)  # (B, nh, T, hs)
            added = aligner.prefix_attention(q, *attn.constants(q.dtype)).expand_as(y)
            ratios.setdefault(layer, []).append((norms(added) / norms(y)).flatten())
            return y + added

        return attend

    aligned = [
        (i, b.attn) for i, b in enumerate(model.transformer.h) if isinstance(b.attn, aligner.CausalSelfAttention)
    ]
    try:
        for layer, attn in aligned:
            attn.attend = measure(layer, attn)  # hides the method
        for ids in texts:
            model(ids.unsqueeze(0))
    finally:
        for _, attn in aligned:
            vars(attn).pop("attend", None)
    return {layer: torch.cat(values).mean().item() for layer, values in ratios.items()}


def norms(heads: torch.Tensor) -> torch.Tensor:
    """Return the norms (B, T) over all heads (B, nh, T, hs), in fp32."""
    return heads.float().square().sum(dim=(1, 3)).sqrt()


@torch.no_grad()
def token_shifts(model: aligner.LLaMA) -> dict[int, torch.Tensor]:
    """Return what an Aligner of one token adds to the residual stream in each layer (C,): gate × V_p through c_proj."""
    shifts = {}
    for layer, block in enumerate(model.transformer.h):
        if isinstance(block.attn, aligner.CausalSelfAttention):
            _, values = block.attn.constants(model.output_weight.dtype)  # (1, nh, 1, hs)
            shifts[layer] = F.linear(values.flatten(), block.attn.c_proj.weight)
    return shifts


@torch.no_grad()
def lens(model: aligner.LLaMA, shift: torch.Tensor, top: int, vocab_size: int) -> tuple[list[int], list[int]]:
    """Return the ids that a residual vector (C,), read by the last norm and the output layer, pushes up and down."""
    logits = F.linear(model.transformer.ln_f(shift), model.output_weight)[:vocab_size].float()
    order = logits.argsort(descending=True).tolist()
    return order[:top], order[::-1][:top]


# == tables and figures ==


def labels_of(adapters: list[AdapterFile]) -> list[str]:
    """Return the name of each file, or of its folder if all files of that kind have the same name.

    Equal names are preceded by the name of the folder that contains them, and by a number if these are equal, too.
    """
    folders, labels = [], []
    for path in (adapter.path.resolve() for adapter in adapters):
        in_run = path.stem in ("adapter", "best", "last")
        # the authors put their settings into the name
        labels.append(path.parent.name if in_run else re.split("-lr|-epoch", path.stem)[0])
        folders.append(path.parents[in_run].name)
    for prefixes in ([f"{folder}/" for folder in folders], [f"{i}: " for i in range(1, len(labels) + 1)]):
        count = Counter(name.lower() for name in labels)
        labels = [prefix * (count[name.lower()] > 1) + name for prefix, name in zip(prefixes, labels, strict=True)]
    return labels


def compare(name: str, a: torch.Tensor, b: torch.Tensor, near: float) -> list[str]:
    """Return a line of a table about two tensors of one shape."""
    equal, cosine = agreement(a, b)
    distance = (a - b).abs().flatten()
    shares = [f"{count / a.numel():.1%}" for count in (equal, int((distance <= near).sum()))]
    return [name, f"{a.numel():,}", *shares, f"{distance.median():.4f}", f"{cosine:.4f}"]


def section(title: str, header: list[str], rows: list[list[str]]) -> str:
    return f"{title}\n\n{markdown_table(header, rows)}"


def prefix_tables(
    labels: list[str], prefixes: list[torch.Tensor], starts: list[torch.Tensor | None], near: float
) -> list[str]:
    """Return tables that compare prefixes with their start, also by size, and with each other on common tokens."""
    columns = ["values", "equal", f"within {near:g}", "median distance", "cosine"]
    known = [parts for parts in zip(labels, prefixes, starts, strict=True) if parts[2] is not None]
    ranges = [f"{low:g} to {high:g}" if high < SIZES[-1] else f"above {low:g}"
              for low, high in itertools.pairwise(SIZES)]  # fmt: skip
    by_size = [
        [name, *(f"{equal / count:.1%}" if count else "" for _, _, count, equal in equal_by_size(prefix, start))]
        for name, prefix, start in known
    ]
    pairs = []
    for i, j in itertools.combinations(range(len(prefixes)), 2):
        a, b = prefixes[i], prefixes[j]
        if a.size(1) == b.size(1):
            n = min(len(a), len(b))
            line = compare(f"{labels[i]} and {labels[j]}", a[:n], b[:n], near)
            moves = [p[:n] - s[:n] for p, s in ((a, starts[i]), (b, starts[j])) if s is not None]
            pairs.append([*line, f"{agreement(*moves)[1]:.4f}" if len(moves) == 2 else ""])
    parts = []
    if known:
        lines = [compare(name, prefix, start, near) for name, prefix, start in known]
        parts.append(section("Prefixes and their random start", ["adapter", *columns], lines))
        parts.append(section("Values equal to the start, by the start's size", ["adapter", *ranges], by_size))
    if pairs:
        parts.append(section("Pairs of prefixes", ["adapters", *columns, "cosine of the moves from the start"], pairs))
    return parts


def add_legend(figure: "Figure", labels: list[str]) -> None:
    """Add a legend below the panels, in as many columns as fit, at most four."""
    characters = 17 * figure.get_figwidth()  # that fit into a line of this size
    ncols = max(1, min(4, int(characters / (max(map(len, labels)) + 10))))
    figure.legend(loc="outside lower center", ncols=ncols, fontsize=7)


def plot_gates(labels: list[str], adapters: list[AdapterFile], path: Path) -> None:
    """Plot the standard deviation and the mean of each layer's gates."""
    figure = make_figure(11, 4.6)
    panels = figure.subplots(1, 2, sharex=True)
    for name, adapter in zip(labels, adapters, strict=True):
        by_layer = gates(adapter)
        panels[0].plot(list(by_layer), [g.std(correction=0) for g in by_layer.values()], label=plain_label(name))
        panels[1].plot(list(by_layer), [g.mean() for g in by_layer.values()])
    for axes, what in zip(panels, ("standard deviation over heads", "mean over heads"), strict=True):
        axes.set(xlabel="layer", title=f"gates: {what}")
        axes.axhline(0, color="0.3", linewidth=0.6)
    add_legend(figure, labels)
    save_figure(figure, path)
    log(f"wrote {path}")


def plot_prefixes(
    labels: list[str], prefixes: list[torch.Tensor], starts: list[torch.Tensor | None], seed: int, path: Path
) -> None:
    """Plot t-SNE of all prefix tokens and of their moves from the start, for each width with four different ones.

    scikit-learn's t-SNE crashes the process if all points are equal, such as the moves of untrained prefixes.
    """
    panels, colors = [], {name: f"C{i % 10}" for i, name in enumerate(labels)}
    for width in sorted({prefix.size(1) for prefix in prefixes}):
        same_width = [i for i, prefix in enumerate(prefixes) if prefix.size(1) == width]
        panels.append((f"prefix tokens, width {width}", [(labels[i], prefixes[i]) for i in same_width]))
        moves = [(labels[i], prefixes[i] - starts[i]) for i in same_width if starts[i] is not None]
        panels.append((f"their moves from the start, width {width}", moves))
    distinct = [len({tuple(token.tolist()) for _, tokens in groups for token in tokens}) for _, groups in panels]
    panels = [panel for panel, count in zip(panels, distinct, strict=True) if count >= 4]
    if not panels:
        path.unlink(missing_ok=True)
        log("No prefixes.png: t-SNE needs four different tokens of one width.")
        return
    figure, grid = make_panels(len(panels), 5.5, 5)
    for axes, (title, groups) in zip(grid, panels, strict=True):
        points = iter(tsne(torch.cat([tokens for _, tokens in groups]), seed))
        for name, tokens in groups:
            x, y = zip(*itertools.islice(points, len(tokens)), strict=True)
            axes.scatter(x, y, s=60 if len(tokens) == 1 else 10, color=colors[name])
        axes.set(title=f"t-SNE: {title}", xticks=[], yticks=[])
    for name, color in colors.items():
        axes.scatter([], [], color=color, label=plain_label(name))
    add_legend(figure, labels)
    save_figure(figure, path)
    log(f"wrote {path}")


def tsne(points: torch.Tensor, seed: int) -> np.ndarray:
    """Return points in the plane (n, 2) for points (n, C); n is at least 4."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.numpy())


def lens_table(model: aligner.LLaMA, name: str, tokenizer: Tokenizer, top: int) -> str:
    shifts, rows = token_shifts(model), []
    for layer, shift in [*shifts.items(), ("sum", sum(shifts.values()))]:
        pushed = lens(model, shift, top, tokenizer.vocab_size)
        pieces = [" ".join(repr(tokenizer.decode([i])) for i in ids) for ids in pushed]
        rows.append([str(layer), f"{shift.norm():.3f}", *pieces])
    return section(f"{name}: what the token's constant pushes", ["layer", "norm", "up", "down"], rows)


def effects_table(effects: dict[str, dict[int, float]], title: str) -> str:
    layers = sorted({layer for by_layer in effects.values() for layer in by_layer})
    rows = [[n, *(f"{e[i]:.3f}" if i in e else "" for i in layers)] for n, e in effects.items()]
    return section(title, ["adapter", *map(str, layers)], rows)


def inside_base(
    settings: Settings, labels: list[str], adapters: list[AdapterFile]
) -> tuple[list[str], dict[str, dict[int, float]]]:
    """Return the tables that need the base, and each adapter's effect by layer."""
    tokenizer, parts = Tokenizer(settings.checkpoint_dir), []
    effects: dict[str, dict[int, float]] = {}
    for name, adapter in zip(labels, adapters, strict=True):
        model = load_model(settings.checkpoint_dir, adapter)
        if settings.data_dir:
            data = SFTData(settings.data_dir, "test", tokenizer, settings.rows)
            effects[name] = layer_effects(model, [torch.from_numpy(ids).long() for ids in data.rows["input_ids"]])
        if model.config.adapter_prompt_length > 1:
            log(f"No lens for {name}: a prefix of several tokens adds no constant.")
        else:
            parts.append(lens_table(model, name, tokenizer, settings.top))
    if effects:
        where = f"{len(data)} rows of {settings.data_dir}, by layer"
        parts.insert(0, effects_table(effects, f"Norm of the added term over the attention output's, {where}"))
    return parts, effects


def layer_rows(
    labels: list[str], adapters: list[AdapterFile], effects: dict[str, dict[int, float]]
) -> list[dict[str, Any]]:
    """Return the rows of layers.csv."""
    return [
        {"adapter": name, "layer": layer, "gate_mean": gate.mean().item(), "gate_std": gate.std(correction=0).item(),
         "effect": effects.get(name, {}).get(layer, "")}
        for name, adapter in zip(labels, adapters, strict=True) for layer, gate in gates(adapter).items()
    ]  # fmt: skip


def main(settings: Settings) -> None:
    if settings.data_dir and not settings.checkpoint_dir:
        raise UserError("--data_dir measures effects in a base model; give --checkpoint_dir too.")
    adapters = [open_adapter(path) for path in settings.files]
    claim(settings.out_dir, ("layers.csv", "gates.png", "prefixes.png"))
    labels = labels_of(adapters)
    prefixes = [adapter.state[PREFIX].float() for adapter in adapters]
    starts = [initial_prefix(adapter) for adapter in adapters]
    parts, effects = prefix_tables(labels, prefixes, starts, settings.within), {}
    if settings.checkpoint_dir:
        more, effects = inside_base(settings, labels, adapters)
        parts += more
    print("\n\n".join(parts))
    write_text(settings.out_dir / "layers.csv", csv_text(layer_rows(labels, adapters, effects)))
    plot_gates(labels, adapters, settings.out_dir / "gates.png")
    plot_prefixes(labels, prefixes, starts, settings.seed, settings.out_dir / "prefixes.png")


if __name__ == "__main__":
    cli.run(main, settings)
