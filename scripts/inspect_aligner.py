"""Describe an adapter file and its gates by layer; for several files, also their differences.

Reads this project's .safetensors, run folders, and the authors' .pth files. A gate is one number per layer and
head that multiplies the attention to the prefix: a layer with gates near zero does not use the Aligner. For adapters of
other methods, the root mean square of each layer's tensors is shown.
"""

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    files: tuple[Path, ...] = ()  # adapters: .safetensors, .pth or run folders
    plot: Path | None = None  # also plot the gates by layer to this file (.png, .svg or .pdf)
    to_safetensors: Path | None = None  # also write the only adapter to this file, in fp32 and this project's format
    overwrite: bool = False  # replace the files that plot and to_safetensors name, if they exist
    prompt_style: str | None = None  # with --to_safetensors: the prompt style to record (default: the file's)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from lit_llama.checkpoint import AdapterFile, read_adapter, save_adapter
from lit_llama.prompts import check_style_name
from lit_llama.run.report import make_figure, plain_label, save_figure
from lit_llama.storage.files import check_file
from lit_llama.utils import UserError, log

PREFIX = "global_value_embedding.weight"
LAYER = re.compile(r"transformer\.h\.(\d{1,4})\.(?:attn\.)?(.+)")
BAR = 30  # length of the longest bar, in characters


def open_adapter(path: Path) -> AdapterFile:
    """Return the content of an Aligner's file, with the prefix under one name.

    Raises:
        UserError: The file is not an Aligner.
    """
    adapter = read_adapter(path)
    if PREFIX not in adapter.state or adapter.state[PREFIX].dim() != 2 or not gates(adapter):
        raise UserError(f"{adapter.path} has no prefix with gates; its method is {adapter.method}.")
    if len({len(gate) for gate in gates(adapter).values()}) > 1:
        raise UserError(f"{adapter.path} has gates for different numbers of heads.")
    return adapter


def gates(adapter: AdapterFile) -> dict[int, torch.Tensor]:
    """Return the gates (nh,) in fp32 by layer."""
    by_layer = kinds(adapter).get("gating_factor", {})
    return {layer: t.flatten() for layer, t in by_layer.items()}


def kinds(adapter: AdapterFile) -> dict[str, dict[int, torch.Tensor]]:
    """Return the tensors in fp32 by kind, such as `c_attn.lora_A`, and layer; 0 for tensors outside the layers."""
    by_kind: dict[str, dict[int, torch.Tensor]] = {}
    for name, t in adapter.state.items():
        match = LAYER.fullmatch(name)
        layer, kind = (int(match[1]), match[2]) if match else (0, name)
        by_kind.setdefault(kind, {})[layer] = t.float()
    return {kind: dict(sorted(by_layer.items())) for kind, by_layer in sorted(by_kind.items())}


def describe_other(adapter: AdapterFile) -> str:
    """Return a description of an adapter of another method: settings, and the size of its tensors by layer."""
    count = sum(t.numel() for t in adapter.state.values())
    settings = "".join(f", {name} {value}" for name, value in adapter.config.items())
    lines = [f"{adapter.path}", f"  {adapter.method}{settings}: {count:,} parameters"]
    lines += [f"  {name}: {value}" for name, value in about(adapter.meta).items()]
    by_kind = kinds(adapter)
    lines += [f"  layer  root mean square of {', '.join(by_kind)}"]
    for layer in sorted({layer for by_layer in by_kind.values() for layer in by_layer}):
        sizes = [by_layer[layer].square().mean().sqrt() if layer in by_layer else None for by_layer in by_kind.values()]
        cells = [f"{'-':<8}" if size is None else f"{size:.6f}" for size in sizes]
        lines.append(f"  {layer:5}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def describe(adapter: AdapterFile, largest: float) -> str:
    """Return a description of an Aligner with a line for each layer; a full bar is a mean |gate| of `largest`."""
    prefix, by_layer = adapter.state[PREFIX].float(), gates(adapter)
    count = sum(t.numel() for t in adapter.state.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in adapter.state.values()})
    heads = len(next(iter(by_layer.values())))
    lines = [
        f"{adapter.path}",
        f"  N = {len(prefix)}, layers {min(by_layer)} to {max(by_layer)}, {prefix.size(1)} wide, {heads} heads: "
        f"{count:,} parameters, {' and '.join(dtypes)}",
        *(f"  {name}: {value}" for name, value in about(adapter.meta).items()),
        f"  prefix: mean {prefix.mean():+.4f}, std {prefix.std():.4f}",
        f"  layer  mean gate       std  mean |gate|, a full bar is {largest:.4f}",
    ]
    for layer, gate in by_layer.items():
        bar = "█" * round(BAR * gate.abs().mean().item() / largest) if largest else ""
        lines.append(f"  {layer:5}  {gate.mean():+.6f}  {gate.std(correction=0):.6f}  {bar}".rstrip())
    return "\n".join(lines)


def about(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the header entries to show; the authors' files have none."""
    training, data, base = (meta.get(name) or {} for name in ("training", "data", "base"))
    entries = {
        "prompt style": meta.get("prompt_style"),
        "data": data.get("source"),
        "base": base.get("weights"),
        "step": training.get("step"),
        "validation loss": training.get("val_loss"),
        "converted from": meta.get("converted_from"),
    }
    return {name: value for name, value in entries.items() if value is not None}


def agreement(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """Return the number of equal values of two tensors of the same shape, and their cosine similarity."""
    return int((a == b).sum()), torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def difference(one: AdapterFile, other: AdapterFile) -> str:
    """Return a comparison of two Aligners on the layers that both have."""
    gates_of = gates(one), gates(other)
    layers = [layer for layer in gates_of[0] if layer in gates_of[1]]
    pairs = {
        "prefix": (one.state[PREFIX].float().flatten(), other.state[PREFIX].float().flatten()),
        "gates": tuple(torch.cat([by_layer[i] for i in layers] or [torch.empty(0)]) for by_layer in gates_of),
    }
    lines = [f"{one.path}", f"{other.path}"]
    if one.state[PREFIX].shape != other.state[PREFIX].shape:
        shapes = (" × ".join(map(str, adapter.state[PREFIX].shape)) for adapter in (one, other))
        lines.append("  prefix: {} and {}, not comparable".format(*shapes))
        del pairs["prefix"]
    for name, (a, b) in pairs.items():
        if a.shape != b.shape or not len(a):
            lines.append(f"  {name}: {len(a)} and {len(b)} in {len(layers)} common layers, not comparable")
            continue
        equal, cosine = agreement(a, b)
        lines.append(f"  {name}: {equal:,} of {len(a):,} values equal ({equal / len(a):.1%}), cosine {cosine:.6f}")
    return "\n".join(lines)


def draw(adapters: list[AdapterFile], path: Path, overwrite: bool) -> None:
    """Plot the gates by layer: a dot per head, the mean as a line, and one standard deviation around it."""
    figure = make_figure(7, 3 * len(adapters))
    for axes, adapter in zip(figure.subplots(len(adapters), sharex=True, squeeze=False)[:, 0], adapters, strict=True):
        by_layer = gates(adapter)
        layers, values = list(by_layer), torch.stack(list(by_layer.values()))  # (layers, nh)
        mean, std = values.mean(1), values.std(1, correction=0)
        axes.plot(layers, values.numpy(), ".", color="0.7", markersize=3)
        axes.fill_between(layers, (mean - std).numpy(), (mean + std).numpy(), alpha=0.25)
        axes.plot(layers, mean.numpy())
        axes.axhline(0, color="0.3", linewidth=0.6)
        axes.set(ylabel="gate")
        axes.set_title(plain_label(f"{adapter.path.parent.name}/{adapter.path.name}"), fontsize=8)
    axes.set(xlabel="layer")
    save_figure(figure, path, overwrite=overwrite)
    log(f"wrote {path}")


def convert(adapter: AdapterFile, path: Path, style: str | None, overwrite: bool) -> None:
    """Write an adapter in this project's format, in fp32."""
    meta = {"method": adapter.method, "config": adapter.config, **adapter.meta, "converted_from": adapter.path.name}
    if style is not None:
        meta["prompt_style"] = style
    save_adapter(path, {name: t.float() for name, t in adapter.state.items()}, meta, overwrite=overwrite)
    log(f"wrote {path}")


def main(settings: Settings) -> None:
    for output in filter(None, (settings.plot, settings.to_safetensors)):
        check_file(output, *settings.files, overwrite=settings.overwrite)
    if settings.to_safetensors and len(settings.files) > 1:
        raise UserError(f"--to_safetensors writes one adapter, but {len(settings.files)} were given.")
    if settings.to_safetensors and settings.to_safetensors.suffix != ".safetensors":
        raise UserError(f"{settings.to_safetensors} must end in .safetensors.")
    if settings.prompt_style is not None:
        check_style_name(settings.prompt_style)
        if not settings.to_safetensors:
            raise UserError("--prompt_style needs --to_safetensors, the file to record it in.")
    adapters = [read_adapter(path) for path in settings.files]
    others = [adapter for adapter in adapters if adapter.method != "aligner"]
    if others and settings.plot:
        raise UserError(f"--plot draws an Aligner's gates, but {others[0].path} is of the method {others[0].method!r}.")
    aligners = [open_adapter(adapter.path) for adapter in adapters if adapter.method == "aligner"]
    largest = max((gate.abs().mean().item() for a in aligners for gate in gates(a).values()), default=0.0)
    parts = [describe(adapter, largest) for adapter in aligners] + [describe_other(adapter) for adapter in others]
    parts += [difference(one, other) for one, other in itertools.combinations(aligners, 2)]
    print("\n\n".join(parts))
    if settings.plot:
        draw(aligners, settings.plot, settings.overwrite)
    if settings.to_safetensors:
        convert((aligners + others)[0], settings.to_safetensors, settings.prompt_style, settings.overwrite)


if __name__ == "__main__":
    cli.run(main, settings)
