"""Measure where a task lies between form and knowledge, by how much of LoRA's gain one token recovers.

One token adds the same vector to every token of a layer, whatever is asked. So it can select among behaviors of the
base model, but cannot store facts (section 5.2 of the paper proposes this as a probe). For each dataset this study
trains Aligner with one token, Aligner with many, and LoRA, with the same data, steps and candidate learning rates, and
reports on held-out rows

    share = (loss of the base - loss with one token) / (loss of the base - loss with LoRA)

1 is form, 0 is knowledge. The same share is reported for the number of label tokens that are not the model's first
choice: a loss also falls when the model becomes less certain of what it does not know, which takes no knowledge. The
learning rate is chosen by the loss on a part of the training rows. A stopped probe continues where it stopped.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, OpenShare, PositiveFloat, PositiveInt, Seed


@dataclass
class Settings(Checked):
    # == What is probed ==
    data_dir: tuple[Path, ...] = (Path("data/microworld-pirate"),)  # prepared folders, one task each
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    out_dir: Path = Path("out/probe")  # training runs, probe.json, probe.md and probe.png

    # == Each training run ==
    many: PositiveInt = 100  # prefix tokens of the larger Aligner
    steps: PositiveInt = 120  # optimizer steps
    batch_size: PositiveInt = 16  # rows per step
    learning_rates: tuple[PositiveFloat, ...] = (4e-3, 1.6e-2, 6.4e-2, 2.56e-1, 1.024)  # the best per method and task
    valid_fraction: OpenShare = 0.2  # share of the training rows that the rate is chosen on
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of the training runs at the chosen rate
    rows: PositiveInt = 256  # maximum number of held-out rows

    # == Running ==
    resamples: PositiveInt = 10_000  # bootstrap samples for the interval
    jobs: PositiveInt = 2  # training runs in parallel, one thread each


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch
from datasets import disable_progress_bars
from torch.nn import functional as F

from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.data import IGNORE_INDEX, SFTData
from lit_llama.model import LLaMA
from lit_llama.modules import eval_mode
from lit_llama.prepare import held_out, write_dataset
from lit_llama.run.report import make_figure, plain_label, save_figure
from lit_llama.storage.files import claim, write_text
from lit_llama.tables import markdown_table
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from scripts.count_parameters import VARIANTS, Variant
from studies.protocol import sft_settings
from studies.trials import Cell, Plan, Record, Trial, at_edge, choose, run_plans

SWEEP_SEED = 0  # of the training runs that choose the rate
MEASURES = {
    "loss": ("Held-out loss, nats per token", "4f"),
    "wrong": ("Held-out tokens that are not the likeliest", "1%"),
}


@dataclass(frozen=True)
class Share:
    """A share and its 95% interval; the interval is nan if `recovered` gives none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "LoRA gains nothing"
        value, low, high = (f"{round(x, 2) + 0.0:.0%}" for x in (self.value, self.low, self.high))  # no -0 %
        return f"{value} ({'no interval' if math.isnan(self.low) else f'{low} to {high}'})"


# == shares ==


def recovered(
    base: np.ndarray, other: np.ndarray, lora: np.ndarray, tokens: np.ndarray, *, resamples: int, seed: int = 0,
    planned: int = 1,
) -> Share:  # fmt: skip
    """Return the share of LoRA's gain over the base that another method has, per token of the held-out rows.

    The interval is a bootstrap: rows are drawn with replacement, the same for all methods, and the mean over the
    training runs of a method is shifted by its standard error times a draw from Student's t with S - 1 degrees of
    freedom. With one run each it covers only the rows. There is no interval if LoRA's gain may be zero, or if one of
    several planned runs is left, whose standard error is unknown.

    Args:
        base: Loss of each row without an adapter (n,), summed over its tokens (nats, or wrong tokens).
        other, lora: The same with each of S trained adapters (S, n).
        tokens: Number of label tokens of each row (n,).
        planned: Number of runs of each method, including those that failed.
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
    full = (base - lora).sum(1).mean()
    value = (base - other).sum(1).mean() / full if full else math.nan
    if (gains[1] <= 0).mean() > 0.025 or min(len(other), len(lora)) == 1 < planned:
        return Share(float(value), math.nan, math.nan)
    low, high = np.quantile(gains[0] / gains[1], [0.025, 0.975])
    return Share(float(value), float(low), float(high))


# == the trials ==


@torch.no_grad()
def row_scores(model: LLaMA, data: SFTData, batch_size: int = 16) -> dict[str, np.ndarray]:
    """Return the scores (rows,) of each row, summed over its label tokens, given the right tokens before each.

    "loss" is the negative log-likelihood in nats, "wrong" the number of tokens that are not the likeliest.
    """
    scores = {name: np.zeros(len(data)) for name in MEASURES}
    order = np.argsort(data.lengths, kind="stable")
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = data.batch(rows)
            targets = batch["labels"][:, 1:]
            predicts = targets != IGNORE_INDEX
            logits = F.linear(model.hidden(batch["idx"])[:, :-1][predicts], model.output_weight).float()  # (labels, V)
            counts, targets = predicts.sum(1).tolist(), targets[predicts]
            by_label = {
                "loss": F.cross_entropy(logits, targets, reduction="none"),
                "wrong": (logits.argmax(-1) != targets).float(),
            }
            for name, values in by_label.items():
                scores[name][rows] = [part.sum().item() for part in values.split(counts)]
    return scores


def score(trial: Trial, run: Path) -> dict[str, list[float]]:
    """Return the scores of each validation row with a trained adapter."""
    base = trial.settings["checkpoint_dir"]
    data = SFTData(trial.settings["data_dir"], "test", Tokenizer(base), trial.scoring["rows"])
    scores = row_scores(load_model(base, read_adapter(run / "last.safetensors")), data)
    return {name: values.tolist() for name, values in scores.items()}


def split_training_rows(data_dir: Path, fraction: float, output_dir: Path) -> None:
    """Write a dataset of the training rows of another one, with a share of the prompts held out for validation."""
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


def cell_plan(
    settings: Settings, name: str, variant: Variant, folder: Path, chosen_by: Path
) -> Plan[tuple[Record, Cell]]:
    """Choose the learning rate of a method on a dataset and train all seeds; return the chosen trial, and all."""
    rates, seeds = settings.learning_rates, settings.seeds
    swept = yield [make_trial(settings, f"{name}-choosing", variant, chosen_by, rate, SWEEP_SEED) for rate in rates]
    best = choose(swept, key=lambda record: -sum(record["scores"]["loss"]))
    rate = best["trial"]["settings"]["learning_rate"]
    return best, (swept, (yield [make_trial(settings, name, variant, folder, rate, seed) for seed in seeds]))


def probe(settings: Settings, folder: Path, cells: dict[str, tuple[Record, Cell]]) -> dict[str, Any]:
    """Compare the methods on one dataset.

    Args:
        cells: The result of `cell_plan` for each method.

    Returns:
        For each of `MEASURES` its mean per token (method, and "base" -> number) and shares (method -> `Share`); rates;
        edges: methods whose rate is the lowest or highest tried; seeds: the number of training runs that each mean is
        over; failed: the other ones, and those that failed in the choice of the rate; rows; seconds.
    """
    data = SFTData(folder, "test", Tokenizer(settings.checkpoint_dir), settings.rows)
    base, results = row_scores(load_model(settings.checkpoint_dir), data), {}
    tokens = data.weights
    for measure in MEASURES:
        scores = {method: np.array([record["scores"][measure] for record in finished(trained)])  # (S, n)
                  for method, (_, (_, trained)) in cells.items()}  # fmt: skip
        all_scores = {"base": base[measure][None], **scores}
        results[measure] = {
            "mean": {method: float(rows.sum(1).mean() / tokens.sum()) for method, rows in all_scores.items()},
            "shares": {m: recovered(base[measure], rows, scores["lora"], tokens, resamples=settings.resamples,
                                    planned=len(settings.seeds)) for m, rows in scores.items() if m != "lora"},
        }  # fmt: skip
    records = [record for _, cell in cells.values() for runs in cell for record in runs]
    return {
        **results,
        "rates": {method: best["trial"]["settings"]["learning_rate"] for method, (best, _) in cells.items()},
        "edges": [method for method, (best, (swept, _)) in cells.items() if at_edge(best, swept)],
        "seeds": {method: len(finished(trained)) for method, (_, (_, trained)) in cells.items()},
        "failed": [f"{record['trial']['name']}: {record['error']}" for record in records if "error" in record],
        "rows": len(data),
        "seconds": round(sum(record.get("seconds", 0) for record in records)),
    }


def finished(records: list[Record]) -> list[Record]:
    """Return the training runs that did not fail.

    Raises:
        UserError: All failed.
    """
    done = [record for record in records if "error" not in record]
    if not done:
        raise UserError(f"All training runs of {records[0]['trial']['name']} failed: {records[0]['error']}")
    return done


# == reports ==


def report(results: dict[str, dict[str, Any]], variants: dict[str, Variant]) -> str:
    """Return a Markdown table for each measure, with a line for each dataset, from form to knowledge."""
    small, parts = [method for method in variants if method != "lora"], []
    for measure, (title, digits) in MEASURES.items():
        heads = ["data", "held-out rows", "base", *(v.label for v in variants.values())]
        heads += [f"share, {variants[method].label}" for method in small]
        lines = []
        for name, result in sorted(results.items(), key=lambda item: -item[1][measure]["shares"][small[0]].value):
            means, shares = result[measure]["mean"], result[measure]["shares"]
            cells = [f"{means[m]:.{digits}}{'*' * (m in result['edges'])}" for m in ("base", *variants)]
            lines.append([name, str(result["rows"]), *cells, *(str(shares[method]) for method in small)])
        parts.append(f"{title}\n\n{markdown_table(heads, lines)}")
    if any(result["edges"] for result in results.values()):
        parts.append("`*`: its learning rate is the lowest or the highest that was tried; a better one may lie beyond.")
    parts += [f"Failed: {failure}" for result in results.values() for failure in result["failed"]]
    return "\n\n".join(parts)


def plot(results: dict[str, dict[str, Any]], variants: dict[str, Variant], path: Path) -> None:
    """Plot the shares of each measure: a line for each dataset, a point with its interval for each Aligner."""
    small, first = [method for method in variants if method != "lora"], next(iter(MEASURES))
    names = sorted(results, key=lambda name: results[name][first]["shares"][small[0]].value)
    figure = make_figure(10, 1.8 + 0.5 * len(names))
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, (title, _)) in zip(panels, MEASURES.items(), strict=True):
        for i, method in enumerate(small):
            for y, name in enumerate(names):
                share = results[name][measure]["shares"][method]
                low, high = (share.value if math.isnan(end) else end for end in (share.low, share.high))
                axes.plot([low, high], [y - 0.14 * i] * 2, color=f"C{i}", linewidth=2)
                label = variants[method].label if y == 0 and axes is panels[0] else None
                axes.plot(share.value, y - 0.14 * i, "o", color=f"C{i}", label=label)
        for end in (0, 1):
            axes.axvline(end, color="0.6", linewidth=0.8)
        axes.set(title=title, ylim=(-0.6, len(names) - 0.4), xlabel="share of LoRA's gain: 0 knowledge, 1 form")
    panels[0].set_yticks(range(len(names)), [plain_label(name) for name in names])
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    save_figure(figure, path)


def main(settings: Settings) -> None:
    names = [folder.resolve().name for folder in settings.data_dir]
    if len(set(names)) < len(names):
        raise UserError(f"Two data folders have the same name: {', '.join(names)}.")
    if len(set(settings.seeds)) < len(settings.seeds) or SWEEP_SEED in settings.seeds:
        raise UserError(f"seeds must differ from each other and from {SWEEP_SEED}, which chooses the rate.")
    large = Variant(f"Aligner, N = {settings.many}", "aligner", {"adapter_prompt_length": settings.many})
    variants = {"aligner1": VARIANTS["aligner1"], "many": large, "lora": VARIANTS["lora"]}
    for folder in settings.data_dir:
        SFTData(folder, "test", Tokenizer(settings.checkpoint_dir))  # a UserError before anything is trained
    claim(settings.out_dir, ("probe.md", "probe.json", "probe.png"))
    folders, plans = dict(zip(names, settings.data_dir, strict=True)), {}
    for name, folder in folders.items():
        chosen_by = settings.out_dir / "data" / name
        split_training_rows(folder, settings.valid_fraction, chosen_by)
        for method, variant in variants.items():
            plans[name, method] = cell_plan(settings, f"{name}-{method}", variant, folder, chosen_by)
    expected = len(plans) * (len(settings.learning_rates) + len(settings.seeds))
    trained = run_plans(
        list(plans.values()), settings.out_dir / "runs", score, jobs=settings.jobs, desc="training runs",
        expected=expected,
    )  # fmt: skip
    cells = dict(zip(plans, trained, strict=True))
    probes = {name: probe(settings, folders[name], {m: cells[name, m] for m in variants}) for name in folders}
    table = report(probes, variants)
    print(table)
    write_text(settings.out_dir / "probe.md", table + "\n")
    about = {"settings": json.loads(json.dumps(asdict(settings), default=str)), "results": probes}
    write_text(settings.out_dir / "probe.json", json.dumps(about, default=asdict, indent=1) + "\n")
    plot(probes, variants, settings.out_dir / "probe.png")
    log(f"wrote probe.md, probe.json and probe.png in {settings.out_dir}")


if __name__ == "__main__":
    cli.run(main, settings)
