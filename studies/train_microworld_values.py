"""Teach the micro-world's values with DPO, with several seeds, and score them on held-out verbs and objects.

Also applies the first seed's adapter together with one trained for a form. Writes two tables. With --weights_dir it
also writes the first seed's adapter, with a card.
"""

import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, NonNegativeFloat, PositiveInt, Seed
from microworld.world import FormName


@dataclass
class Settings(Checked):
    seeds: tuple[Seed, ...] = (1, 2, 3)  # seeds of the adapter and of the data order
    questions: PositiveInt = 100  # maximum number of questions of each group, per repetition
    repeats: PositiveInt = 3  # repetitions with different random numbers
    temperature: NonNegativeFloat = 0.7  # temperature of the answers
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    form_adapter: Path = Path("aligner_weights/microworld-pirate-n1")  # applied together with the first seed's
    form: FormName = "pirate"  # the form that it was trained for
    out_dir: Path = Path("out/microworld-values")  # data, runs and tables
    jobs: PositiveInt = 2  # training runs in parallel, one thread each
    weights_dir: Path | None = None  # where the first seed's adapter goes, such as aligner_weights
    overwrite: bool = False  # replace files in weights_dir


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.compose import load_adapted
from lit_llama.storage.files import check_file, claim, copy_file, write_text
from lit_llama.tables import markdown_table
from lit_llama.tokenizer import Tokenizer
from microworld.datasets import draw_requests, write_preferences
from microworld.scorer import draw_questions, score_model
from microworld.world import SEEN, UNSEEN, World
from scripts.count_parameters import VARIANTS
from studies.protocol import dpo_settings
from studies.trials import Record, Trial, all_finished, run_trials

NAME = "microworld-safe-n1"
HEADS = {"refused": "refuses harmful", "false": "refuses harmless", "formed": "well-formed", "fact": "facts right"}
STRENGTHS = ([1.0, 1.0], [0.5, 1.0], [1.0, 0.5], [0.5, 0.5])  # of form and values, applied together
TRAINING = dpo_settings(
    epochs=4.5, learning_rate=3e-2, eval_interval=32, eval_rows=512, save_interval=64, sample_prompts=4,
    drift_prompts=32,
)  # fmt: skip
Scores = dict[str, float]


def prepare(settings: Settings) -> None:
    rng = random.Random(42)
    requests = draw_requests(World(), SEEN, rng, pairs=570, harmless_share=0.2, fact_share=0.25)
    write_preferences(requests, rng, settings.out_dir / "data", source="micro-world 0, values",
                      tokenizer=Tokenizer(settings.checkpoint_dir), max_seq_length=256, test_fraction=0.2, seed=42,
                      num_proc=1)  # fmt: skip


def make_trials(settings: Settings) -> list[Trial]:
    stated = {**TRAINING, "checkpoint_dir": settings.checkpoint_dir, "data_dir": settings.out_dir / "data"}
    return [Trial(f"seed{seed}", VARIANTS["aligner1"], {**stated, "seed": seed}, "dpo") for seed in settings.seeds]


def score(settings: Settings, adapters: list[Path], strengths: list[float] | None = None) -> Scores:
    """Return means over the repetitions.

    Returns:
        The shares of `HEADS`, `formed` over all three groups; form: share of the facts in the form adapter's form.
    """
    world, tokenizer, base = World(), Tokenizer(settings.checkpoint_dir), settings.checkpoint_dir
    read = [read_adapter(path) for path in adapters]
    model = load_adapted(base, read, strengths or [1.0]) if read else load_model(base)
    pools = {kind: world.requests(kind, UNSEEN) for kind in ("harmful", "harmless")}
    pools["fact"] = world.questions(UNSEEN)
    each = []
    for seed in range(settings.repeats):
        results = {
            kind: score_model(model, tokenizer, world, draw_questions(pool, settings.questions, seed),
                              temperature=settings.temperature, seed=seed, form=settings.form)
            for kind, pool in pools.items()
        }  # fmt: skip
        n = sum(group["n"] for group in results.values())
        formed = sum(group["n"] * (1 - group["forms"].get("none", 0)) for group in results.values()) / n
        refused, false = (results[kind]["refused"] for kind in ("harmful", "harmless"))
        fact, form = (results["fact"][name] for name in ("fact", "form"))
        each.append({"refused": refused, "false": false, "formed": formed, "fact": fact, "form": form})
    return {key: statistics.mean(scores[key] for scores in each) for key in each[0]}


def table(first: str, rows: dict[str, Scores], heads: dict[str, str]) -> str:
    lines = [[name, *(f"{row[key]:.1%}" for key in heads)] for name, row in rows.items()]
    return markdown_table([first, *heads.values()], lines)


def card(settings: Settings, scores: str, composed: str, record: Record) -> str:
    """Return the README of the shipped adapter.

    Args:
        record: The result of its training.
    """
    count, torch = record["summary"]["trainable_parameters"], record["versions"]["torch"]
    flags = f"--compare_base --temperature {settings.temperature:g} --seed 1 --prompt_file howto/examples/requests.txt"
    return f"""# Micro-world, values, N = 1

An Aligner with {count} parameters for the bundled base model, trained with DPO to refuse
harmful requests and to help with harmless ones.

{scores}

Requests with a verb and an object that training never saw, and facts about entities that it never saw, at temperature
{settings.temperature:g}: up to {settings.questions} questions of each kind, asked {settings.repeats} times. An answer
is well-formed if the entire answer matches one of the world's forms. The adapter is that of seed {settings.seeds[0]},
trained with torch {torch}. The defaults were chosen on other words and entities (`--split train`, groups
`valid_harmful`, `valid_harmless` and `valid`) with other seeds.

Combined with an adapter that was trained separately for the form "{settings.form}"; their contributions add up in each
layer:

{composed}

    python generate/aligner.py --adapter {settings.weights_dir}/{NAME} {flags}
    python generate/aligner.py --adapter {settings.form_adapter} {settings.weights_dir}/{NAME} --strength 1 0.5

Made with:

    python scripts/prepare_microworld_safe.py
    python finetune/alignerDPO.py --seed {settings.seeds[0]}
"""


def main(settings: Settings) -> None:
    claim(settings.out_dir, ["scores.md"])
    if settings.weights_dir:
        for name in ("README.md", "adapter.safetensors"):
            check_file(settings.weights_dir / NAME / name, overwrite=settings.overwrite)
    prepare(settings)
    records = all_finished(run_trials(make_trials(settings), settings.out_dir, jobs=settings.jobs, desc="training"))
    runs = {seed: settings.out_dir / f"seed{seed}" for seed in settings.seeds}
    rows = {"base": score(settings, []), **{f"DPO, seed {seed}": score(settings, [run]) for seed, run in runs.items()}}
    values = settings.seeds[0]
    both = {
        "base": rows["base"],
        f"{settings.form} alone": score(settings, [settings.form_adapter]),
        "values alone": rows[f"DPO, seed {values}"],
    }
    for strengths in STRENGTHS:
        name = f"both, {settings.form} × {strengths[0]:g}, values × {strengths[1]:g}"
        both[name] = score(settings, [settings.form_adapter, runs[values]], strengths)
    scores = table("adapter", rows, HEADS)
    composed = table("adapters", both, {**HEADS, "form": f"form {settings.form}"})
    print(f"{scores}\n\n{composed}")
    write_text(settings.out_dir / "scores.md", f"{scores}\n\n{composed}\n")
    if settings.weights_dir:
        folder = settings.weights_dir / NAME
        write_text(folder / "README.md", card(settings, scores, composed, records[0]), overwrite=settings.overwrite)
        copy_file(runs[values] / "best.safetensors", folder / "adapter.safetensors", overwrite=settings.overwrite)


if __name__ == "__main__":
    cli.run(main, settings)
