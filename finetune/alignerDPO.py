"""Direct preference optimisation with Aligner: a frozen LLaMA learns values from pairs of a better and a worse answer.

Policy and reference are one base with two tiny sets of adapter weights, on one device. Without arguments it teaches
the bundled micro-world model to refuse what is harmful. Edit the values below, pass flags of the same name, or name a
YAML file with --config (the paper's recipe: howto/recipes/beaver_dpo_7b_n1.yaml).
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch

from lit_llama import cli
from lit_llama.cache import cache_folder
from lit_llama.data import plan_fixed_epoch
from lit_llama.dpo import (
    DPOData,
    LossType,
    adapter_sha256,
    cached_reference,
    check_policy_equals_reference,
    reference_key,
    sampled_kl,
)
from lit_llama.model import LLaMA
from lit_llama.quantize import Quantize
from lit_llama.report import plot_metrics, print_summary
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import Precision, TrainConfig, Trainer, answer_samples, start_finetuning
from lit_llama.utils import log
from scripts import prepare_microworld_safe


@dataclass
class Settings:
    # == What to train on ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the frozen base model's folder
    data_dir: Path = Path("data/microworld-safe")  # pairs, from scripts/prepare_beaver_safe.py or _microworld_safe
    init_adapter: Path | None = None  # start from this adapter, and keep close to it; default: from the bare base
    out_dir: Path = Path("out/dpo/microworld-safe")  # everything the run writes

    # == Aligner ==
    adapter_prompt_length: int = 1  # prefix tokens N, 1 to about 300
    adapter_start_layer: int = 2  # first layer that attends to them, from 0
    method: Literal["aligner", "adapter", "lora", "bitfit", "prompt_tuning"] = "aligner"  # or one to compare it with
    method_config: dict[str, Any] | None = None  # further settings of the method, such as {"lora_r": 4}

    # == Preference ==
    beta: float = 1.0  # β: larger keeps the policy closer to the reference
    loss_type: LossType = "sigmoid"  # sigmoid is DPO's own; ipo, hinge
    label_smoothing: float = 0.0  # share of pairs thought to be labelled the wrong way round (sigmoid)
    reference_free: bool = False  # compare with a uniform reference instead of the starting point
    sft_weight: float = 3.0  # weight of the chosen response's negative log-likelihood per token; 0: plain DPO
    precompute_reference: bool = True  # once, cached beside the data; false: in every step, one more forward pass

    # == Optimisation (a step is always an optimiser step) ==
    epochs: float = 4.5  # passes over the pairs; need not be whole
    max_steps: int | None = None  # stop after so many steps even if the epochs are not over
    batch_size: int = 16  # pairs per step, over all devices
    micro_batch_size: int = 16  # pairs per forward pass on one device; divides batch_size
    learning_rate: float = 3e-2  # peak of AdamW's learning rate
    warmup_epochs: float = 0.5  # linear rise from 0 to the peak
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warmup; cosine falls to 0
    weight_decay: float = 0.02  # AdamW's, never on gates and biases
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, more time
    seed: int = 1337  # of the fresh adapter, the order of the data and the samples

    # == Reporting ==
    eval_interval: int = 32  # steps between validations
    eval_rows: int = 512  # validate on at most so many pairs, always the same
    save_interval: int = 64  # steps between saved states, which --resume continues from
    sample_prompts: int = 4  # validation prompts to answer at each validation
    drift_prompts: int = 32  # validation prompts whose sampled answers are compared with the reference; 0 for none
    max_new_tokens: int = 60  # longest such answer
    resume: bool = False  # continue the run in out_dir
    overwrite: bool = False  # replace the run in out_dir

    # == Devices ==
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" is a GPU where there is one
    devices: int | str = 1  # how many, or "auto" for all there are
    num_nodes: int = 1  # machines
    strategy: str = "auto"  # Fabric's: "auto", "ddp"
    precision: Precision = "auto"  # of the base; "auto" is bf16-true on GPUs that have it, else 32-true
    quantize: Quantize | None = None  # hold the base's layers in 4 or 8 bits, with bitsandbytes (default: as precision)


PANELS = {
    "loss (per pair)": ["loss"],
    "reward accuracy": ["reward_accuracy"],
    "reward, margin (β × nats)": ["chosen_reward", "rejected_reward", "margin"],
    "log-probability (nats per response)": ["chosen_logp", "rejected_logp"],
    "KL to the reference (nats per answer)": ["kl"],
    "gradient norm": ["grad_norm"],
}


def set_reference(args: Settings, trainer: Trainer, start: dict[str, torch.Tensor], adapter: str) -> None:
    """Gives both splits their reference, and checks that training starts from it."""
    fabric, model, config = trainer.fabric, trainer.model, trainer.config
    plan = plan_fixed_epoch(trainer.train.lengths, config.batch_size, config.micro_batch_size, 0, 0)
    splits = {
        "training": (trainer.train, [micro for step in plan for micro in step]),
        "validation": (trainer.val, trainer.val_batches()),
    }
    for name, (data, batches) in splits.items():
        if args.reference_free:
            continue
        if args.precompute_reference:
            key = reference_key(data, args.checkpoint_dir, adapter, batches, fabric, args.quantize)
            cache_dir = cache_folder(args.data_dir)
            data.reference_logps = cached_reference(data, fabric, model, batches, name, key, cache_dir)
        else:
            data.reference_state = start
        check_policy_equals_reference(data, fabric, model, batches[:: max(1, len(batches) // 4)])


class Samples:
    """Greedy answers to validation prompts, and how far sampled ones have moved from the reference."""

    def __init__(self, args: Settings, trainer: Trainer, start: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
        self.answers = answer_samples(trainer.val, tokenizer, args.sample_prompts, args.max_new_tokens)
        self.prompts = [prompt for prompt, _ in trainer.val.prompts(args.drift_prompts)]
        self.trainer, self.start = trainer, start
        self.stop_ids, self.max_new_tokens = tokenizer.stop_ids, args.max_new_tokens

    def __call__(self, model: LLaMA) -> list[dict[str, str]]:
        if self.prompts:
            moved = sampled_kl(model, self.start, self.prompts, self.stop_ids, self.max_new_tokens)
            fabric, step = self.trainer.fabric, self.trainer.step
            fabric.log_dict({f"val/{name}": value for name, value in moved.items()}, step)
            before = fabric.loggers[0].rows[0]["val/degenerate"]
            if moved["degenerate"] > before + 0.1:
                self.trainer.progress.write(
                    f"warning: {moved['degenerate']:.0%} of the sampled answers are empty, do not end or repeat "
                    f"themselves, {before:.0%} did before training: lower --learning_rate or --epochs, or raise "
                    "--sft_weight or --beta."
                )
        return self.answers(model)


def compare(samples: Path) -> str:
    """The first and the last answer to each sample prompt, as text."""
    records = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    steps = [record["step"] for record in records]
    before, after = ([r for r in records if r["step"] == step] for step in (min(steps), max(steps)))
    return "".join(
        f"\n> {b['prompt']}\nbefore: {b['answer']}\nafter:  {a['answer']}\n"
        for b, a in zip(before, after, strict=True)
    )  # fmt: skip


def main(args: Settings) -> None:
    config = TrainConfig(**{name: getattr(args, name) for name in TrainConfig.__dataclass_fields__})
    if args.data_dir == Settings.data_dir and not args.data_dir.exists():
        log(f"Writing the default dataset, {args.data_dir}, with scripts/prepare_microworld_safe.py.")
        prepare_microworld_safe.main(prepare_microworld_safe.Settings(checkpoint_dir=args.checkpoint_dir))
    tokenizer = Tokenizer(args.checkpoint_dir)
    loss: dict[str, Any] = {
        name: getattr(args, name) for name in ("beta", "label_smoothing", "loss_type", "reference_free", "sft_weight")
    }
    train = DPOData(args.data_dir, "train", tokenizer, **loss)
    val = DPOData(args.data_dir, "test", tokenizer, args.eval_rows, **loss)

    fabric, model, meta = start_finetuning(args, train.meta, args.method)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # a fresh adapter adds nothing to the base, but for a learnt prompt
    fresh = args.init_adapter is None and not model.n_virtual_tokens
    meta["reference"] = "none" if fresh else adapter_sha256(start)
    meta["data"]["sha256"] = train.sha256
    trainer = Trainer(fabric, model, train, val, config, asdict(args), meta, plan=plan_fixed_epoch)
    trainer.sample_answers = Samples(args, trainer, start, tokenizer)
    set_reference(args, trainer, start, meta["reference"])
    if fabric.global_rank == 0:
        log(f"{sum(p.numel() for p in trainer.trainable.values()):,} trainable parameters, {len(train):,} pairs, "
            f"{trainer.max_steps} steps")  # fmt: skip
    summary = trainer.fit()
    if fabric.global_rank == 0:
        plot_metrics(args.out_dir / "metrics.csv", args.out_dir / "metrics.png", PANELS)
        if args.sample_prompts:
            print(compare(args.out_dir / "samples.jsonl"), end="")
        command = ["python", "generate/aligner.py", "--checkpoint_dir", f"{args.checkpoint_dir}"]
        command += ["--adapter", f"{args.out_dir}", *(["--quantize", args.quantize] if args.quantize else [])]
        print_summary(summary, args.out_dir, [*command, "--prompt", "your instruction"])


if __name__ == "__main__":
    cli.run(main, Settings)
