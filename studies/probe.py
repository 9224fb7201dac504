"""Form or knowledge? Where a task falls between the two, by how much of LoRA's gain one token recovers.

One token adds the same vector to every token of a layer, whatever is asked, so it can choose among what the base
model does already and has no room for facts (section 5.2 of the paper proposes it as a probe). For every dataset this
trains Aligner with one token, with many, and LoRA with the same data, steps and learning rates to choose from, and
reports

    share = (loss of the base - loss with one token) / (loss of the base - loss with LoRA)

on held-out rows: 1 is form, 0 is knowledge. The same share is reported of the label tokens that are the model's first
choice: a loss also falls when the model becomes less sure of what it does not know, and that takes no knowledge. The
rate is chosen by the loss on a part of the training rows. Finished trainings are kept in out_dir, so a probe that was
stopped goes on where it was.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import numpy as np
import torch
from datasets import disable_progress_bars
from torch.nn import functional as F

from lit_llama import cli
from lit_llama.checkpoint import load_model, read_adapter, write_text
from lit_llama.data import IGNORE_INDEX, SFTData
from lit_llama.model import LLaMA
from lit_llama.prepare import held_out, write_dataset
from lit_llama.report import make_figure, save_figure
from lit_llama.tables import markdown_table
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, eval_mode, log
from scripts.count_parameters import VARIANTS, Variant
from studies.protocol import sft_settings
from studies.trials import Record, Trial, at_edge, choose, run_trials


@dataclass
class Settings:
    # == What is probed ==
    data_dir: tuple[Path, ...] = (Path("data/microworld-pirate"),)  # prepared folders, each a task of its own
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    out_dir: Path = Path("out/probe")  # trainings, probe.json, probe.md and probe.png

    # == Every training ==
    many: int = 100  # prefix tokens of the larger Aligner
    steps: int = 120  # optimiser steps
    batch_size: int = 16  # rows of a step
    learning_rates: tuple[float, ...] = (
        4e-3,
        1.6e-2,
        6.4e-2,
        2.56e-1,
        1.024,
    )  # every method chooses one of these for each task
    valid_fraction: float = 0.2  # share of the training rows to choose it by
    seeds: tuple[int, ...] = (1, 2, 3)  # of the trainings at the chosen rate
    rows: int = 256  # held-out rows to read at most

    # == Running ==
    resamples: int = 10_000  # draws of the rows for the interval
    jobs: int = 2  # trainings side by side, one thread each


SWEEP_SEED = 0  # of the trainings that choose the rate
MEASURES = {
    "loss": ("Held-out loss, nats per token", "4f"),
    "wrong": ("Held-out tokens that are not the likeliest", "1%"),
}


@dataclass(frozen=True)
class Share:
    """A share and its 95 % interval, which is nan where LoRA's gain may be none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "LoRA gains nothing"
        value, low, high = (f"{round(x, 2) + 0.0:.0%}" for x in (self.value, self.low, self.high))  # no -0 %
        return f"{value} ({'no interval' if math.isnan(self.low) else f'{low} to {high}'})"


# == the scale ==


def recovered(
    base: np.ndarray, other: np.ndarray, lora: np.ndarray, tokens: np.ndarray, *, resamples: int, seed: int = 0
) -> Share:
    """The share of LoRA's gain over the base that another method has, per token of the held-out rows.

    The interval is a bootstrap: rows are drawn with replacement, the same for base and methods, and the mean over a
    method's trainings is moved by its standard error times a draw from Student's t with S - 1 degrees of freedom. With
    one training each it covers the rows alone.

    Args:
        base: (n,) what each row loses without an adapter, a sum over its tokens (nats, or wrong tokens).
        other, lora: (S, n) the same with each of S trained adapters.
        tokens: (n,) label tokens of each row.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=resamples)  # (R, n)
    gains = []
    for losses in (other, lora):
        drawn = (counts @ (base - losses).T) / (counts @ tokens)[:, None]  # (R, S)
        gain = drawn.mean(1)
        if len(losses) > 1:
            error = drawn.std(1, ddof=1) / math.sqrt(len(losses))
            gain = gain + rng.standard_t(len(losses) - 1, resamples) * error
        gains.append(gain)
    whole = (base - lora).sum(1).mean()
    value = (base - other).sum(1).mean() / whole if whole else math.nan
    if (gains[1] <= 0).mean() > 0.025:
        return Share(float(value), math.nan, math.nan)
    low, high = np.quantile(gains[0] / gains[1], [0.025, 0.975])
    return Share(float(value), float(low), float(high))


# == the trials ==


@torch.no_grad()
def row_scores(model: LLaMA, data: SFTData, batch_size: int = 16) -> dict[str, np.ndarray]:
    """For each row, summed over its label tokens, given those before: "loss", the negative log-likelihood in nats, and
    "wrong", how many are not the likeliest."""
    scores = {name: np.zeros(len(data)) for name in MEASURES}
    order = np.argsort(data.lengths, kind="stable")
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            batch = data.batch(own)
            targets = batch["labels"][:, 1:]
            predicts = targets != IGNORE_INDEX
            logits = F.linear(model.hidden(batch["idx"])[:, :-1][predicts], model.output_weight).float()  # (labels, V)
            counts, targets = predicts.sum(1).tolist(), targets[predicts]
            found = {
                "loss": F.cross_entropy(logits, targets, reduction="none"),
                "wrong": (logits.argmax(-1) != targets).float(),
            }
            for name, values in found.items():
                scores[name][own] = [part.sum().item() for part in values.split(counts)]
    return scores


def score(trial: Trial, run: Path) -> dict[str, list[float]]:
    """Return the scores of each validation row with a trained adapter."""
    base = trial.settings["checkpoint_dir"]
    data = SFTData(trial.settings["data_dir"], "test", Tokenizer(base), trial.scoring["rows"])
    scores = row_scores(load_model(base, read_adapter(run / "last.safetensors")), data)
    return {name: values.tolist() for name, values in scores.items()}


def split_training_rows(data_dir: Path, fraction: float, output_dir: Path) -> None:
    """A folder whose rows are the training rows of another one, some of them for validation; those of one prompt stay
    together."""
    data = SFTData(data_dir, "train")
    prompts = [ids[:n].tobytes() for ids, n in zip(data.rows["input_ids"], data.rows["prompt_length"], strict=True)]
    in_test = held_out(prompts, fraction, seed=0)
    splits = {name: data.rows.select(np.flatnonzero(of)) for name, of in (("train", ~in_test), ("test", in_test))}
    counts = {name: len(part) for name, part in splits.items()}
    disable_progress_bars()
    write_dataset(output_dir, splits, {**data.meta, "counts": counts})


def make_trial(settings: Settings, name: str, variant: Variant, folder: Path, rate: float, seed: int) -> Trial:
    rows = len(SFTData(folder, "train"))
    stated = sft_settings(
        rows, settings.steps, settings.batch_size, data_dir=folder, checkpoint_dir=settings.checkpoint_dir,
        learning_rate=rate, seed=seed, eval_interval=settings.steps, eval_rows=32, save_interval=settings.steps,
    )  # fmt: skip
    return Trial(f"{name}-lr{rate:g}-seed{seed}", variant, stated, scoring={"rows": settings.rows})


def probe(args: Settings, folder: Path, name: str, variants: dict[str, Variant]) -> dict[str, Any]:
    """Chooses the rates, trains all seeds and compares, for one dataset.

    Returns:
        For each of `MEASURES` its mean per token (method, and "base" -> number) and shares (method -> `Share`); rates;
        edges: methods whose rate is the lowest or highest tried; rows; seconds.
    """
    chosen_by = args.out_dir / "data" / name
    split_training_rows(folder, args.valid_fraction, chosen_by)
    runs, rates = args.out_dir / "runs", {}
    grid = [
        make_trial(args, f"{name}-{method}-choosing", variant, chosen_by, rate, SWEEP_SEED)
        for method, variant in variants.items()
        for rate in args.learning_rates
    ]
    swept = run_trials(grid, runs, score, jobs=args.jobs, desc=f"{name}, choosing rates")
    edges, final = [], []
    for i, (method, variant) in enumerate(variants.items()):
        own = swept[i * len(args.learning_rates) : (i + 1) * len(args.learning_rates)]
        best = choose(own, key=lambda record: -sum(record["scores"]["loss"]))
        rates[method] = best["trial"]["settings"]["learning_rate"]
        edges += [method] * at_edge(best, own)
        final += [make_trial(args, f"{name}-{method}", variant, folder, rates[method], seed) for seed in args.seeds]
    trained = run_trials(final, runs, score, jobs=args.jobs, desc=f"{name}, seeds")

    data = SFTData(folder, "test", Tokenizer(args.checkpoint_dir), args.rows)
    base, measures = row_scores(load_model(args.checkpoint_dir), data), {}
    for name in MEASURES:
        scores = {"base": base[name][None]}  # (S, n) each
        for i, method in enumerate(variants):
            scores[method] = scores_of(trained[i * len(args.seeds) : (i + 1) * len(args.seeds)], name)
        measures[name] = {
            "mean": {method: float(rows.sum(1).mean() / data.weights.sum()) for method, rows in scores.items()},
            "shares": {
                method: recovered(scores["base"][0], rows, scores["lora"], data.weights, resamples=args.resamples)
                for method, rows in scores.items()
                if method not in ("base", "lora")
            },
        }
    seconds = round(sum(record.get("seconds", 0) for record in [*swept, *trained]))
    return {**measures, "rates": rates, "edges": edges, "rows": len(data), "seconds": seconds}


def scores_of(records: list[Record], name: str) -> np.ndarray:
    """(S, n) held-out scores of the trainings that did not fail.

    Raises:
        UserError: all did.
    """
    done = [record["scores"][name] for record in records if "error" not in record]
    if not done:
        raise UserError(f"All trainings of {records[0]['trial']['name']} failed: {records[0]['error']}")
    return np.array(done)


# == reports ==


def report(found: dict[str, dict[str, Any]], variants: dict[str, Variant]) -> str:
    """A Markdown table for each measure; a line for each dataset, from form to knowledge."""
    small, parts = [method for method in variants if method != "lora"], []
    for measure, (title, digits) in MEASURES.items():
        heads = ["data", "held-out rows", "base", *(v.label for v in variants.values())]
        heads += [f"share, {variants[method].label}" for method in small]
        lines = []
        for name, result in sorted(found.items(), key=lambda item: -item[1][measure]["shares"][small[0]].value):
            means, shares = result[measure]["mean"], result[measure]["shares"]
            cells = [f"{means[m]:.{digits}}{'*' * (m in result['edges'])}" for m in ("base", *variants)]
            lines.append([name, str(result["rows"]), *cells, *(str(shares[method]) for method in small)])
        parts.append(f"{title}\n\n{markdown_table(heads, lines)}")
    if any(result["edges"] for result in found.values()):
        parts.append("`*`: its learning rate is the lowest or the highest that was tried; a better one may lie beyond.")
    return "\n\n".join(parts)


def plot(found: dict[str, dict[str, Any]], variants: dict[str, Variant], path: Path) -> None:
    """The scale of each measure: a line for each dataset, a point with its interval for each Aligner."""
    small, first = [method for method in variants if method != "lora"], next(iter(MEASURES))
    names = sorted(found, key=lambda name: found[name][first]["shares"][small[0]].value)
    figure = make_figure(10, 1.8 + 0.5 * len(names))
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, (title, _)) in zip(panels, MEASURES.items(), strict=True):
        for i, method in enumerate(small):
            for y, name in enumerate(names):
                share = found[name][measure]["shares"][method]
                low, high = (share.value if math.isnan(end) else end for end in (share.low, share.high))
                axes.plot([low, high], [y - 0.14 * i] * 2, color=f"C{i}", linewidth=2)
                label = variants[method].label if y == 0 and axes is panels[0] else None
                axes.plot(share.value, y - 0.14 * i, "o", color=f"C{i}", label=label)
        for end in (0, 1):
            axes.axvline(end, color="0.6", linewidth=0.8)
        axes.set(title=title, ylim=(-0.6, len(names) - 0.4), xlabel="share of LoRA's gain: 0 knowledge, 1 form")
    panels[0].set_yticks(range(len(names)), names)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    save_figure(figure, path)


def main(args: Settings) -> None:
    names = [folder.resolve().name for folder in args.data_dir]
    if len(set(names)) < len(names):
        raise UserError(f"Two data folders have the same name: {', '.join(names)}.")
    if not 0 < args.valid_fraction < 1 or min(args.rows, args.steps, args.batch_size, args.resamples, args.jobs) < 1:
        raise UserError(
            "valid_fraction must be between 0 and 1, and rows, steps, batch_size, resamples, jobs 1 or more."
        )
    if len(set(args.seeds)) < len(args.seeds) or SWEEP_SEED in args.seeds:
        raise UserError(f"seeds must differ from each other and from {SWEEP_SEED}, which chooses the rate.")
    large = Variant(f"Aligner, N = {args.many}", "aligner", {"adapter_prompt_length": args.many})
    variants = {"aligner1": VARIANTS["aligner1"], "many": large, "lora": VARIANTS["lora"]}
    found = {}
    for name, folder in zip(names, args.data_dir, strict=True):
        SFTData(folder, "test", Tokenizer(args.checkpoint_dir))  # refuses what does not fit before anything is trained
        found[name] = probe(args, folder, name, variants)
    table = report(found, variants)
    print(table)
    write_text(args.out_dir / "probe.md", table + "\n")
    settings = json.loads(json.dumps(asdict(args), default=str))
    write_text(
        args.out_dir / "probe.json",
        json.dumps({"settings": settings, "results": found}, default=asdict, indent=1) + "\n",
    )
    plot(found, variants, args.out_dir / "probe.png")
    log(f"wrote probe.md, probe.json and probe.png in {args.out_dir}")


if __name__ == "__main__":
    cli.run(main, Settings)
