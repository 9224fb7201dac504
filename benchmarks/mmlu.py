"""Tokens per second of MMLU's scoring (evaluate/mmlu.py) beside a plain forward pass over the same padded batches.

Both take turns on every batch. The plain pass computes the logits of all positions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from benchmarks import harness as b
from evaluate import mmlu
from evaluate.common import load, markdown_table
from lit_llama import cli
from lit_llama.utils import eval_mode


@dataclass
class Settings(mmlu.Settings):
    # == What to measure ==
    limit: int | None = 5  # use only the first questions of each subject, this many
    shots: int = 0  # worked examples before each question
    batch_tokens: int = 4096  # tokens of one forward pass, padding included
    rounds: int = 5  # passes over all batches
    threads: int = 1  # on a CPU
    clock: b.Clock = "wall"  # or cpu: processor seconds, for a CPU that others use too; needs --threads 1


def main(args: Settings) -> None:
    torch.set_num_threads(args.threads)
    evaluated = load(args)
    model, tokenizer = evaluated.model, evaluated.tokenizer
    device = model.transformer.wte.weight.device
    b.check_clock(args.clock, device)
    letters = mmlu.Letters.of(tokenizer)
    prompts = {q.id: letters.prompt(tokenizer, q.prompt) for q in mmlu.make_questions(args, evaluated.style)}
    prompts = {id: ids for id, ids in prompts.items() if len(ids) <= model.max_tokens}
    lengths = {id: len(ids) for id, ids in prompts.items()}
    batches = [[prompts[id] for id in batch] for batch in mmlu.length_batches(lengths, args.batch_tokens)]
    padded = [
        torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True).to(device)
        for batch in batches
    ]
    tokens = sum(lengths.values())
    seconds: dict[str, list[float]] = {"letters' log-probabilities": [], "plain forward pass": []}
    with eval_mode(model), torch.inference_mode():
        for round in range(-1, args.rounds):  # the first is not counted
            work = [
                [lambda batch=batch: mmlu.letter_logps(model, batch, letters) for batch in batches],
                [lambda idx=idx: model(idx) for idx in padded],
            ]
            sums = [0.0, 0.0]
            for pair in zip(*work, strict=True):
                for i, call in enumerate(pair):
                    sums[i] += b.timed(call, device, args.clock)
            if round >= 0:
                for values, total in zip(seconds.values(), sums, strict=True):
                    values.append(total)
    print(f"{len(prompts)} questions, {tokens} tokens, {1 - tokens / sum(x.numel() for x in padded):.1%} padding\n")
    plain = seconds["plain forward pass"]
    rows = [
        [
            name,
            b.with_spread([tokens / s for s in values]),
            b.with_spread([p / s for p, s in zip(plain, values, strict=True)]),
        ]
        for name, values in seconds.items()
    ]
    print(markdown_table([str(args.checkpoint_dir), "tokens/s", "of the plain pass"], rows), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
