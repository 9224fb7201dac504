"""Score a model on the micro-world exactly: the form of its answers, whether their facts are correct, what it refuses.

Questions are about the held-out half of the entities (and, for comparison, the half that finetuning saw). The whole
answer must fit a form, and state the correct topic and value. Two-hop questions may be answered step by
step: one statement for each hop, and both must be correct.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # before this folder, which also has a microworld

from lit_llama import cli
from lit_llama.settings import Checked, NonNegativeFloat, Number, PositiveInt, Seed
from lit_llama.utils import UserError, log
from microworld.world import FormName, GroupName


@dataclass
class Settings(Checked):
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter: tuple[Path, ...] = ()  # adapter files or run folders; several add up (default: the base model)
    strength: tuple[Number, ...] = (1.0,)  # scale of each adapter, one for all or one each; 0 is the base exactly
    form: FormName | None = None  # expected form (default: the one the adapter was trained on)
    temperature: NonNegativeFloat = 0.0  # 0 is greedy
    questions: PositiveInt = 400  # questions to ask of each group, drawn at random
    groups: tuple[GroupName, ...] = ("unseen", "seen")  # facts about these entities, requests or two-hop questions
    seed: Seed = 0  # seed of the draw and of sampling
    world_seed: Seed = 0  # seed of the world; the bundled base knows world 0
    batch_size: PositiveInt = 100  # questions answered at a time
    output_file: Path | None = None  # write the scores and all answers here, as JSON
    overwrite: bool = False  # replace output_file if it exists

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapter and set(self.strength) != {1}:
            raise UserError("--strength scales an adapter; give --adapter too.")


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.checkpoint import load_model, read_adapter
from lit_llama.compose import load_adapted
from lit_llama.storage.files import check_file, write_text
from lit_llama.storage.schema import field
from lit_llama.tokenizer import Tokenizer
from microworld.scorer import draw_questions, question_groups, score_model
from microworld.world import ALL_FORMS, World


def main(args: Settings) -> None:
    if args.output_file:
        check_file(args.output_file, args.checkpoint_dir, *args.adapter, overwrite=args.overwrite)
    world, tokenizer = World(args.world_seed), Tokenizer(args.checkpoint_dir)
    adapters = [read_adapter(path) for path in args.adapter]
    model = load_adapted(args.checkpoint_dir, adapters, args.strength) if adapters else load_model(args.checkpoint_dir)
    sources = [
        field(adapter.meta.get("data", {}), "source", str, f"The header of {adapter.path}: data", "")
        for adapter in adapters
    ]
    forms = [source.partition(", form ")[2] for source in sources]
    form = args.form or next((form for form in forms if form in ALL_FORMS), None)
    groups, results = question_groups(world), {}
    print(f"{'questions':<13} {'asked':>6} {'form ' + (form or ''):>14} {'fact':>7} {'refused':>8} {'steps':>6}  forms")
    for name in args.groups:
        questions = draw_questions(groups[name], args.questions, args.seed)
        result = score_model(model, tokenizer, world, questions, temperature=args.temperature, seed=args.seed,
                             batch_size=args.batch_size, form=form)  # fmt: skip
        results[name] = result
        in_form = "" if result["form"] is None else f"{result['form']:.1%}"
        most = ", ".join(f"{k} {v:.0%}" for k, v in list(result["forms"].items())[:9])
        shares = f"{result['fact']:>7.1%} {result['refused']:>8.1%} {result['aloud']:>6.1%}"
        print(f"{name:<13} {result['n']:>6} {in_form:>14} {shares}  {most}")
    if args.output_file:
        settings = json.loads(json.dumps(asdict(args), default=str))
        text = json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
        write_text(args.output_file, text, overwrite=args.overwrite)
        log(f"wrote {args.output_file}")


if __name__ == "__main__":
    cli.run(main, settings)
