"""Tokens per second of MMLU scoring (evaluate/mmlu.py) against a plain forward pass over the same padded batches.

The two take turns. The plain pass computes the logits of all positions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import Clock
from evaluate.settings import ModelSettings
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveInt


@dataclass
class Settings(ModelSettings):
    # == Model ==
    prompt_style: str = "plain"  # as in evaluate/mmlu.py

    # == Questions ==
    data_file: Path | None = None  # mmlu.zip, a folder, a CSV file or rows (default: download --repo_id)
    repo_id: str = "cais/mmlu"  # dataset on the Hugging Face Hub; its dev and test splits are used
    subjects: tuple[str, ...] = ()  # names such as anatomy (default: all 57)

    # == What to measure ==
    limit: PositiveInt | None = 5  # use only this many questions of each subject
    shots: NonNegativeInt = 0  # few-shot examples before each question
    batch_tokens: PositiveInt = 4096  # tokens of one forward pass, padding included
    rounds: PositiveInt = 7  # passes over all batches
    threads: NonNegativeInt = 1  # threads on a CPU; 0: PyTorch chooses
    clock: Clock = "wall"  # or cpu: CPU time, for a machine that is also used by others; needs --threads 1


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from benchmarks.harness import check_clock, describe_run, take_turns
from benchmarks.measure import compare, timed, with_interval
from evaluate import mmlu
from evaluate.common import load
from evaluate.letters import Letters, length_batches, letter_logps, pad
from lit_llama.modules import eval_mode
from lit_llama.tables import markdown_table


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    evaluated = load(settings)
    model, tokenizer = evaluated.model, evaluated.tokenizer
    device = model.transformer.wte.weight.device
    check_clock(settings.clock, device)
    letters = Letters.of(tokenizer, response=evaluated.style.name != "plain")
    prompts = {q.id: letters.prompt(tokenizer, q.prompt) for q in mmlu.make_questions(settings, evaluated.style)}
    lengths = {id: len(ids) for id, ids in prompts.items() if len(ids) <= model.max_tokens}
    batches = [[prompts[id] for id in batch] for batch in length_batches(lengths, settings.batch_tokens)]

    def score() -> None:
        for batch in batches:
            letter_logps(model, batch, letters)

    def forward() -> None:
        for batch in batches:
            model(pad(batch, device))

    turns = {"letters' log-probabilities": score, "plain forward pass": forward}
    with eval_mode(model), torch.inference_mode():
        _, seconds = take_turns(
            {name: lambda work=work: timed(work, device, settings.clock) for name, work in turns.items()},
            settings.rounds,
            notes=[],
        )
    tokens, padded = sum(lengths.values()), sum(len(batch) * len(batch[0]) for batch in batches)
    print(f"{describe_run(device)}\n")
    print(f"{len(lengths)} questions, {tokens} tokens, {1 - tokens / padded:.1%} padding\n")
    scored, plain = ([tokens / s for s in seconds[name]] for name in turns)
    rows = [
        ["letters' log-probabilities", with_interval(scored), *compare(scored, plain)],
        ["plain forward pass", with_interval(plain), 1, ""],
    ]
    print(markdown_table([str(settings.checkpoint_dir), "tokens/s", "ratio (95%)", "is"], rows))


if __name__ == "__main__":
    cli.run(main, settings)
