"""Reinforcement learning with Aligner: a frozen LLaMA learns from a function that scores its answers.

A step samples a group of answers to each of several prompts, and raises the probability of answers that scored above
the rest of their group (GRPO, lit_llama/rl.py). Without arguments a bundled micro-world model learns to answer two-hop
questions, which it answers reliably only step by step; first run python scripts/prepare_microworld.py --stage rl. Edit
the values below, pass flags of the same name, or give a YAML file with --config.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.run.train_settings import FinetuneSettings, LengthTerm
from lit_llama.settings import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, PositiveInt, Range


@dataclass
class Settings(FinetuneSettings):
    may_change = (*(name for name in FinetuneSettings.may_change if name != "max_new_tokens"), "drift_prompts")

    # == What to train on ==
    checkpoint_dir: Path = Path("checkpoints/microworld-aloud")  # folder of the frozen base model
    data_dir: Path = Path("data/microworld-rl")  # prompts, from a scripts/prepare_*.py with --stage rl
    init_adapter: Path | None = None  # start from this adapter (default: start from the base)
    out_dir: Path = Path("out/rl/microworld")  # folder for all files of the run

    # == Method ==
    method: str = "aligner"  # or another name in lit_llama/methods.py: adapter, adapter_v2, lora, bitfit, …
    method_config: dict[str, Any] | None = None  # further settings of the method, such as {"lora_r": 4}
    adapter_prompt_length: PositiveInt = 1  # number of prefix tokens N, 1 to about 300
    adapter_start_layer: NonNegativeInt = 2  # first layer that attends to them, counted from 0

    # == Reward ==
    reward: str = "microworld_two_hop"  # a name in lit_llama/rewards.py, or your own module:function
    reward_options: dict[str, Any] | None = None  # keyword arguments of the reward function, such as {"words": 10}
    score: str | None = None  # scores greedy answers to held-out prompts, 1 if correct (default: the --reward function)

    # == Policy gradient ==
    group_size: Annotated[int, Range(least=2)] = 8  # answers sampled per prompt, G, at temperature 1
    max_new_tokens: PositiveInt = 60  # longest answer, in tokens
    updates_per_batch: PositiveInt = 1  # optimizer steps on the answers that each step samples
    clip: OpenShare = 0.2  # ε: a larger relative change of a token's probability is not rewarded
    kl_weight: NonNegativeFloat = 0.0  # β: a larger value keeps the policy closer to its start; 0 saves a forward pass
    divide_by_std: bool = True  # divide advantages by the standard deviation of the group (false: Dr. GRPO)
    length_term: LengthTerm = "answer"  # divide by the tokens of an answer, or by max_new_tokens (Dr. GRPO)

    # == Optimization ==
    epochs: PositiveFloat = 2.0  # passes over the prompts, not necessarily a whole number
    batch_size: PositiveInt = 16  # prompts per step, over all devices
    micro_batch_size: PositiveInt = 16  # prompts per sampling and forward pass on one device; divides batch_size
    learning_rate: PositiveFloat = 0.2  # peak learning rate of AdamW
    warmup_epochs: NonNegativeFloat = 0.0  # length of the linear warmup
    max_steps: PositiveInt | None = 80  # stop after this many steps even if the epochs are not over

    # == Reporting ==
    eval_interval: PositiveInt = 20  # steps between validations
    eval_rows: PositiveInt = 200  # held-out prompts to answer greedily at each validation, always the same
    save_interval: PositiveInt = 20  # steps between saved states, from which --resume continues
    sample_prompts: NonNegativeInt = 4  # held-out prompts whose answers are printed and saved
    drift_prompts: NonNegativeInt = 32  # held-out prompts to sample answers to, which give the KL; 0: none

    @property
    def answers_at_once(self) -> int:
        """Number of answers that a micro-batch or a validation generates at once."""
        return self.micro_batch_size * self.group_size


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.data import PromptData
from lit_llama.model import LLaMA
from lit_llama.reference import adapter_sha256, sampled_kl
from lit_llama.rewards import Reward
from lit_llama.rl import PolicyLoss
from lit_llama.rollouts import Answerer, PolicyTrainer, Rollouts, falling_score
from lit_llama.run.dry_run import dry_run
from lit_llama.run.folder import RunFolder
from lit_llama.run.report import duration, early_end, generate_command, note_untrained, write_above_bar
from lit_llama.run.samples import answer_samples, compare_samples
from lit_llama.run.setup import set_up_finetuning, with_initial_config, with_launcher_flags
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import log

PANELS = {
    "reward": ["reward"],
    "accuracy": ["accuracy"],
    "standard deviation of rewards in a group": ["reward_std"],
    "share of groups without signal": ["no_signal"],
    "entropy (nats per token)": ["entropy"],
    "KL to the start (nats per answer)": ["kl"],
    "share of degenerate answers": ["degenerate"],
    "KL to the start (nats per token)": ["kl_per_token"],
    "length of answers (tokens)": ["answer_tokens"],
    "share of answers that ended": ["ended"],
    "share of clipped tokens": ["clipped"],
    "gradient norm": ["grad_norm"],
}


def print_summary(summary: dict[str, Any], settings: Settings) -> None:
    """Print the result of a run to stdout, and the command that generates with it."""
    before, best, after = (summary[f"accuracy_{when}"] for when in ("before", "at_best", "after"))
    took = f"{duration(summary['seconds'])}{early_end(summary, settings)}"
    shares = "not logged"
    if None not in (before, best):
        shares = f"{before:.1%} before, {best:.1%} at best (step {summary['best_step']}), {after:.1%} at the end"
    print(
        f"\ntrained      {summary['trainable_parameters']:,} parameters, {summary['steps']} steps and "
        f"{summary['answers_sampled']:,} sampled answers in {took}\n"
        f"accuracy     {shares};\n"
        f"             of greedy answers to held-out prompts (score: {settings.score or settings.reward})\n"
        f"in {settings.out_dir}{os.sep}: best.safetensors, last.safetensors, metrics.png, metrics.csv, samples.jsonl\n"
        f"generate     {generate_command(settings)}"
    )
    note_untrained(summary)


def main(settings: Settings) -> None:
    settings = with_initial_config(with_launcher_flags(settings))
    reward = Reward(settings.reward, settings.reward_options)
    score = Reward(settings.score) if settings.score else reward
    run = RunFolder(settings, {"metrics.png": PANELS})
    tokenizer = Tokenizer(settings.checkpoint_dir)
    train = PromptData(settings.data_dir, "train", tokenizer)
    val = PromptData(settings.data_dir, "test", tokenizer, settings.eval_rows)
    rollouts = Rollouts(
        Answerer(train, tokenizer, settings.max_new_tokens),
        reward,
        group_size=settings.group_size,
        seed=settings.seed,
        divide_by_std=settings.divide_by_std,
        length_term=settings.length_term,
        keep_equal=settings.kl_weight > 0,
    )
    setup = set_up_finetuning(settings, train.meta)
    model = setup.unwrapped
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss = PolicyLoss(clip=settings.clip, kl_weight=settings.kl_weight, start=start)
    meta = {**setup.adapter_meta, "reward": settings.reward, "start": adapter_sha256(start)}
    setup = replace(setup, adapter_meta={**meta, "data": {**meta["data"], "sha256": train.sha256}})
    drift = [prompt for prompt, _ in val.prompts(settings.drift_prompts)]

    def further_metrics(model: LLaMA) -> dict[str, float]:
        if warning := falling_score(run.metrics.rows):
            write_above_bar(warning)
        if not drift:
            return {}
        most = settings.max_new_tokens
        return sampled_kl(model, start, drift, tokenizer.stop_ids, most, settings.answers_at_once)

    trainer = PolicyTrainer(
        setup, rollouts, val, loss, run,
        val_answerer=Answerer(val, tokenizer, settings.max_new_tokens),
        score=score,
        val_metrics=further_metrics,
        sample_answers=answer_samples(val.prompts(settings.sample_prompts), tokenizer, settings.max_new_tokens),
    )  # fmt: skip
    if settings.dry_run:
        return dry_run(trainer)
    summary = trainer.fit()
    if run.is_first:
        print(compare_samples(settings.out_dir / "samples.jsonl"), end="")
        print_summary(summary, settings)
        if not settings.kl_weight and all(row.get("train/no_signal", 1) == 1 for row in run.metrics.rows.values()):
            log("note: in each step, all answers to a prompt had the same reward, so nothing was learned; see "
                "howto/finetune_rl.md.")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, settings)
