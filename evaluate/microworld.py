"""Scores a model of the micro-world exactly: the form of its answers, whether their facts are right, what it refuses.

Questions are about the held-out half of the entities (and, for comparison, the half that finetuning saw). Each answer
must fit a form as a whole, and restate the right topic with the right value.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from jsonargparse import Namespace

from lit_llama import cli
from lit_llama.checkpoint import load_model, read_adapter, write_text
from lit_llama.compose import load_composed
from lit_llama.generation import Sampling, instruct
from lit_llama.model import LLaMA
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from microworld.world import SEEN, UNSEEN, VALID, Question, World

checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
adapter: list[Path] = []  # adapter files, or training runs' folders; several add up; default: the base model alone
strength: list[float] = [1.0]  # how much each counts, one for all or one each; 0 is the base exactly
form: str | None = None  # the form wanted (default: the one the adapter was trained on)
temperature: float = 0.0  # 0 is greedy
questions: int = 400  # asked of each group, drawn once from all there are
groups: list[str] = ["unseen", "seen"]  # facts of unseen, seen, valid entities; harmful, harmless, valid_harmful, ...
seed: int = 0  # of the draw and of sampling
world_seed: int = 0  # of the world; the bundled base knows world 0
batch_size: int = 100  # questions answered at a time
output_file: Path | None = None  # write the scores and all answers here, as JSON


def ask(
    model: LLaMA, tokenizer: Tokenizer, world: World, asked: list[Question], *, temperature: float, seed: int,
    batch_size: int = 100, form: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answers questions in the Alpaca template and scores the answers.

    Returns:
        n; forms: share of each form, "none" for what fits none; form: share of the wanted one; fact: share with topic
        and value right; refused: share that declines; answers: records of question, answer and score.
    """
    sampling = Sampling(max_new_tokens=60, temperature=temperature, seed=seed)
    style = get_prompt_style("alpaca")
    answers = instruct(model, tokenizer, [q.text for q in asked], style, sampling, batch_size=batch_size)
    scores = [world.score(q, a) for q, a in zip(asked, answers, strict=True)]
    forms = Counter(s.form or "none" for s in scores)
    n = len(asked)
    return {
        "n": n,
        "forms": {name: count / n for name, count in forms.most_common()},
        "form": forms[form] / n if form else None,
        "fact": sum(s.fact for s in scores) / n,
        "refused": sum(s.refused for s in scores) / n,
        "answers": [
            {"question": q.text, "answer": a, "form": s.form, "fact": s.fact, "refused": s.refused}
            for q, a, s in zip(asked, answers, scores, strict=True)
        ],
    }


def draw(pool: list[Question], count: int, seed: int) -> list[Question]:
    return random.Random(seed).sample(pool, min(count, len(pool)))


def main(args: Namespace) -> None:
    world, tokenizer = World(args.world_seed), Tokenizer(args.checkpoint_dir)
    adapters = [read_adapter(path) for path in args.adapter]
    model = load_composed(args.checkpoint_dir, adapters, args.strength) if adapters else load_model(args.checkpoint_dir)
    sources = [adapter.meta.get("data", {}).get("source", "").partition(", form ") for adapter in adapters]
    form = args.form or next((form for _, _, form in sources if form), None)
    pools = {split: world.questions(split) for split in (UNSEEN, SEEN, VALID)}
    pools |= {kind: world.requests(kind, UNSEEN) for kind in ("harmful", "harmless")}
    pools |= {f"valid_{kind}": world.requests(kind, VALID) for kind in ("harmful", "harmless")}
    if args.questions < 1 or not set(args.groups) <= set(pools):
        raise UserError(f"questions is {args.questions} and must be 1 or more; groups can be {', '.join(pools)}.")

    results = {}
    print(f"{'questions':<10} {'asked':>6} {'form ' + (form or ''):>14} {'fact':>7} {'refused':>8}  forms")
    for name in args.groups:
        asked = draw(pools[name], args.questions, args.seed)
        result = ask(model, tokenizer, world, asked, temperature=args.temperature, seed=args.seed,
                     batch_size=args.batch_size, form=form)  # fmt: skip
        results[name] = result
        wanted = "" if result["form"] is None else f"{result['form']:.1%}"
        most = ", ".join(f"{k} {v:.0%}" for k, v in list(result["forms"].items())[:9])
        print(f"{name:<10} {result['n']:>6} {wanted:>14} {result['fact']:>7.1%} {result['refused']:>8.1%}  {most}")
    if args.output_file:
        settings = json.loads(json.dumps(args.as_dict(), default=str))
        write_text(args.output_file, json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
        log(f"wrote {args.output_file}")


if __name__ == "__main__":
    cli.run(main, __file__, globals())
