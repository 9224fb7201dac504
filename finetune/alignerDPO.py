"""Direct preference optimization with Aligner: a frozen LLaMA learns values from pairs of a better and a worse answer.

Policy and reference share one base model on one device and differ only in their adapter weights. Without arguments it
teaches the bundled micro-world model to refuse harmful requests; first run python scripts/prepare_microworld_safe.py.
Edit the values below, pass flags of the same name, or give a YAML file with --config (the paper's:
howto/recipes/beaver_dpo_7b_n1.yaml).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.run.train_settings import FinetuneSettings, LossType
from lit_llama.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from lit_llama.utils import UserError


@dataclass
class Settings(FinetuneSettings):
    may_change = (*FinetuneSettings.may_change, "precompute_reference", "drift_prompts")

    # == What to train on ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # folder of the frozen base model
    data_dir: Path = Path("data/microworld-safe")  # pairs, from scripts/prepare_beaver_safe.py or _microworld_safe.py
    init_adapter: Path | None = None  # start from this adapter, and stay close to it (default: start from the base)
    out_dir: Path = Path("out/dpo/microworld-safe")  # folder for all files of the run

    # == Method ==
    method: str = "aligner"  # or another name in lit_llama/methods.py: adapter, adapter_v2, lora, bitfit, …
    method_config: dict[str, Any] | None = None  # further settings of the method, such as {"lora_r": 4}
    adapter_prompt_length: PositiveInt = 1  # number of prefix tokens N, 1 to about 300
    adapter_start_layer: NonNegativeInt = 2  # first layer that attends to them, counted from 0

    # == Preference ==
    beta: PositiveFloat = 1.0  # β: a larger value keeps the policy closer to the reference
    loss_type: LossType = "sigmoid"  # sigmoid (DPO), ipo or hinge
    label_smoothing: Annotated[float, Range(least=0, below=0.5)] = 0.0  # assumed share of swapped labels, for sigmoid
    reference_free: bool = False  # compare with a uniform reference instead of the initial adapter
    sft_weight: NonNegativeFloat = 3.0  # weight of the chosen response's mean negative log-likelihood; 0: plain DPO
    precompute_reference: bool = True  # compute it once and cache it; false: one more forward pass in every step

    # == Optimization ==
    epochs: PositiveFloat = 4.5  # passes over the pairs, not necessarily a whole number
    batch_size: PositiveInt = 16  # pairs per optimizer step, over all devices
    micro_batch_size: PositiveInt = 16  # pairs per forward pass on one device; divides batch_size
    learning_rate: PositiveFloat = 3e-2  # peak learning rate of AdamW
    warmup_epochs: NonNegativeFloat = 0.5  # length of the linear warmup

    # == Reporting ==
    eval_interval: PositiveInt = 32  # steps between validations
    save_interval: PositiveInt = 64  # steps between saved states, from which --resume continues
    sample_prompts: NonNegativeInt = 4  # validation prompts to answer at each validation
    drift_prompts: NonNegativeInt = 32  # held-out prompts to sample answers to, which give the KL; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(
                f"label_smoothing is {self.label_smoothing}; only the sigmoid loss supports it, not {self.loss_type!r}."
            )

    @property
    def loss(self) -> dict[str, Any]:
        """The settings of the loss."""
        return {name: getattr(self, name) for name in ("beta", "label_smoothing", "loss_type", "sft_weight")}


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch

from lit_llama.data import PreferenceData, check_rows
from lit_llama.dpo import DPOLoss, Reference
from lit_llama.epochs import plan_fixed_epoch, plan_validation
from lit_llama.model import LLaMA
from lit_llama.reference import (
    adapter_reference,
    adapter_sha256,
    base_sha256,
    cached_reference,
    check_policy_equals_reference,
    reference_key,
    sampled_kl,
    stored_reference,
)
from lit_llama.run.dry_run import dry_run
from lit_llama.run.folder import RunFolder
from lit_llama.run.processes import full_gpu_explained
from lit_llama.run.report import LOSS_FIGURE, print_summary, write_above_bar
from lit_llama.run.samples import answer_samples, compare_samples
from lit_llama.run.setup import Setup, set_up_finetuning, with_initial_config, with_launcher_flags
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import Trainer

PANELS = {
    "loss (per pair)": ["loss"],
    "reward accuracy": ["reward_accuracy"],
    "reward, margin (β × nats)": ["chosen_reward", "rejected_reward", "margin"],
    "log-probability (nats per response)": ["chosen_logp", "rejected_logp"],
    "KL to the reference (nats per answer)": ["kl"],
    "share of degenerate answers": ["degenerate"],
    "gradient norm": ["grad_norm"],
}


def make_losses(
    settings: Settings, setup: Setup, train: PreferenceData, val: PreferenceData, start: dict[str, torch.Tensor]
) -> tuple[DPOLoss, DPOLoss]:
    """Return the training and the validation loss, with the adapter weights `start` as the reference.

    Raises:
        UserError: A setting is out of range, or training would not start from the reference.
    """
    epoch = plan_fixed_epoch(train.lengths, settings.batch_size, settings.micro_batch_size, 0, 0)
    splits = {
        "training": (train, [micro_batch for step in epoch for micro_batch in step]),
        "validation": (val, plan_validation(val.lengths, settings.micro_batch_size)),
    }
    caches = settings.precompute_reference and not settings.dry_run and not settings.reference_free
    base = base_sha256(settings.checkpoint_dir) if caches and setup.fabric.global_rank == 0 else ""
    losses = []
    for name, (data, batches) in splits.items():
        reference: Reference | None = adapter_reference(start)
        if settings.reference_free:
            reference = None
        elif settings.precompute_reference and settings.dry_run:  # placeholders for a long computation
            reference = stored_reference(torch.zeros(len(data), 2, device=setup.fabric.device))
        elif settings.precompute_reference:
            key = reference_key(
                data,
                base,
                setup.adapter_meta["reference"],
                batches,
                setup.fabric,
                quantize=settings.quantize,
                method=settings.method,
                compiled=settings.compile,
            )
            logps = cached_reference(data, setup.fabric, setup.model, batches, name, key, settings.data_dir)
            reference = stored_reference(logps.to(setup.fabric.device))
        loss = DPOLoss(reference, **settings.loss)
        if not settings.dry_run:
            some_batches = batches[:: max(1, len(batches) // 4)]
            check_policy_equals_reference(loss, data, setup.fabric, setup.model, some_batches)
        losses.append(loss)
    return losses[0], losses[1]


def warn_if_degenerate(share: float, share_before: float | None) -> None:
    if share_before is not None and share > share_before + 0.1:
        write_above_bar(
            f"warning: {share:.0%} of the sampled answers are empty, do not end or repeat themselves, "
            f"{share_before:.0%} did before training: lower --learning_rate or --epochs, or raise --sft_weight or "
            "--beta."
        )


def main(settings: Settings) -> None:
    settings = with_initial_config(with_launcher_flags(settings))
    run = RunFolder(settings, {**LOSS_FIGURE, "metrics.png": PANELS})
    tokenizer = Tokenizer(settings.checkpoint_dir)
    train = PreferenceData(settings.data_dir, "train", tokenizer)
    val = PreferenceData(settings.data_dir, "test", tokenizer, settings.eval_rows)
    setup = set_up_finetuning(settings, train.meta)
    model = setup.unwrapped
    train.n_embd = val.n_embd = model.config.n_embd  # the responses to a prompt may share a row
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    # a fresh adapter does not change the base, except for the learned vectors of prompt tuning
    is_base = settings.init_adapter is None and not model.n_virtual_tokens
    meta = {**setup.adapter_meta, "reference": "none" if is_base else adapter_sha256(start)}
    setup = replace(setup, adapter_meta={**meta, "data": {**meta["data"], "sha256": train.sha256}})
    check_rows(train, "training", model.max_tokens)  # before the reference is computed
    check_rows(val, "validation", model.max_tokens)
    with full_gpu_explained(settings):
        train_loss, val_loss = make_losses(settings, setup, train, val, start)

    prompts = [prompt for prompt, _ in val.prompts(settings.drift_prompts)]

    def kl_to_reference(model: LLaMA) -> dict[str, float]:
        if not prompts:
            return {}
        metrics = sampled_kl(
            model, start, prompts, tokenizer.stop_ids, settings.max_new_tokens, settings.micro_batch_size
        )
        warn_if_degenerate(metrics["degenerate"], run.metrics.first("val/degenerate"))
        return metrics

    answer = answer_samples(val.prompts(settings.sample_prompts), tokenizer, settings.max_new_tokens)
    trainer = Trainer(setup, train, val, train_loss, run, val_loss=val_loss, val_metrics=kl_to_reference,
                      sample_answers=answer, plan=plan_fixed_epoch)  # fmt: skip
    if settings.dry_run:
        return dry_run(trainer)
    summary = trainer.fit()
    if run.is_first:
        print(compare_samples(settings.out_dir / "samples.jsonl"), end="")
        print_summary(summary, settings)


if __name__ == "__main__":
    cli.run(main, settings)
