"""All settings of the training runs that the studies compare and ship.

No result depends on a default of a finetuning script: `studies.trials` rejects a trial that does not state a setting
that changes weights or losses.
"""

import math
from typing import Any

COMMON: dict[str, Any] = {
    "init_adapter": None,
    "max_steps": None,
    "early_stopping": None,
    "dry_run": False,
    "compile": False,
    "lr_schedule": "cosine",
    "weight_decay": 0.02,
    "grad_clip": 1.0,
    "gradient_checkpointing": False,
    "sample_prompts": 0,
    "max_new_tokens": 60,
    "overwrite": True,
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "auto",
    "quantize": None,
}
DPO: dict[str, Any] = {
    "adapter_prompt_length": 1,
    "adapter_start_layer": 2,
    "beta": 1.0,
    "loss_type": "sigmoid",
    "label_smoothing": 0.0,
    "reference_free": False,
    "sft_weight": 3.0,
    "precompute_reference": True,
    "drift_prompts": 0,
    "batch_size": 16,
    "micro_batch_size": 16,
    "warmup_epochs": 0.5,
}
RL: dict[str, Any] = {
    "adapter_prompt_length": 1,
    "adapter_start_layer": 2,
    "reward_options": None,
    "score": None,
    "group_size": 8,
    "updates_per_batch": 1,
    "clip": 0.2,
    "kl_weight": 0.0,
    "divide_by_std": True,
    "length_term": "answer",
    "batch_size": 8,
    "micro_batch_size": 8,
    "warmup_epochs": 0.0,
    "drift_prompts": 0,
}
# settings of a method besides its size, which is in `scripts.count_parameters.Variant.settings`
METHODS: dict[str, dict[str, Any]] = {
    "aligner": {"adapter_start_layer": 2, "method": "aligner", "method_config": None},
    "adapter": {"adapter_start_layer": 2},
    "adapter_v2": {"adapter_start_layer": 2},
    "lora": {"lora_alpha": 16, "lora_dropout": 0.05},
    "bitfit": {},
    "prompt_tuning": {},
}


def sft_settings(rows: int, steps: int, batch_size: int, **settings: Any) -> dict[str, Any]:
    """Return the settings of a supervised finetuning run of `steps` steps, the first tenth of them warmup.

    Args:
        rows: training rows of the data.
        settings: those that differ from `COMMON` or are not in it.
    """
    per_epoch = math.ceil(rows / batch_size)
    schedule = {"epochs": steps / per_epoch, "warmup_epochs": 0.1 * steps / per_epoch}
    return {**COMMON, "batch_size": batch_size, "micro_batch_size": batch_size, **schedule, **settings}


def dpo_settings(**settings: Any) -> dict[str, Any]:
    """Return the settings of a DPO run; `settings` are those that differ from `COMMON` and `DPO` or are not in them."""
    return {**COMMON, **DPO, **settings}


def rl_settings(rows: int, steps: int, **settings: Any) -> dict[str, Any]:
    """Return the settings of `steps` steps of reinforcement learning.

    Args:
        rows: prompts of the data.
        settings: those that differ from `COMMON` and `RL` or are not in them.
    """
    per_epoch = math.ceil(rows / RL["batch_size"])
    return {**COMMON, **RL, "epochs": math.ceil(steps / per_epoch), "max_steps": steps, **settings}
