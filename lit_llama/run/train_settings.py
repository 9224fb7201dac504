"""Settings that the training scripts share. Each script inherits them and sets its own defaults for the main ones.

`may_change` lists the settings that may differ when a run is resumed, because they affect neither its weights nor its
losses.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_llama.settings import Checked, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Quantize, Seed
from lit_llama.utils import UserError

LossType = Literal["sigmoid", "ipo", "hinge"]  # of DPO
LengthTerm = Literal["answer", "constant"]  # of reinforcement learning: what a loss is divided by
SHARDED = ("fsdp", "hsdp")  # strategies that shard the base over all devices, or over those of each machine
Precision = Literal["auto", "32-true", "bf16-true", "bf16-mixed"]  # fp16 would need loss scaling


@dataclass(kw_only=True)
class TrainSettings(Checked):
    """Settings of the training loop, the run folder and the devices.

    Raises:
        UserError: A value is out of range.
    """

    may_change = ("out_dir", "log_interval", "save_interval", "logger", "resume", "overwrite", "accelerator", "devices",
                  "num_nodes", "strategy")  # fmt: skip
    dry_run = False  # a setting of the finetuning scripts

    # == What to train on ==
    out_dir: Path  # folder for all files of the run

    # == Optimization ==
    epochs: PositiveFloat  # passes over the data, not necessarily a whole number
    batch_size: PositiveInt  # rows per optimizer step, over all devices
    micro_batch_size: PositiveInt  # rows per forward pass on one device; divides batch_size
    learning_rate: PositiveFloat  # peak learning rate
    warmup_epochs: NonNegativeFloat  # length of the linear warmup
    max_steps: PositiveInt | None = None  # stop after this many steps even if the epochs are not over
    early_stopping: PositiveInt | None = None  # stop after this many validations in a row without a lower loss
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warmup; cosine decays to 0
    weight_decay: NonNegativeFloat = 0.02  # weight decay of AdamW; gates and biases have none
    grad_clip: NonNegativeFloat = 1.0  # maximum norm of the gradient; 0 disables clipping
    seed: Seed = 1337  # seed of the initial weights, the order of the data, dropout and RL's sampled answers

    # == Reporting ==
    log_interval: PositiveInt = 10  # steps between reads of the metrics on a single GPU; 1 elsewhere and in RL
    eval_interval: PositiveInt  # steps between validations
    save_interval: PositiveInt  # steps between saved states, from which --resume continues
    logger: Literal["tensorboard", "wandb"] = "tensorboard"  # wandb: also log to Weights & Biases
    resume: bool = False  # continue the run in out_dir
    overwrite: bool = False  # replace the run in out_dir

    # == Devices ==
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" uses a GPU if there is one
    devices: PositiveInt | str = 1  # number of devices, or "auto" for all
    num_nodes: PositiveInt = 1  # number of machines
    strategy: str = "auto"  # "auto", "ddp", "fsdp" (shard the base over all devices), "hsdp" (within each machine)
    precision: Precision = "auto"  # of the frozen weights; "auto" is bf16-true on GPUs with bf16, else 32-true

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}."
            )
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite cannot be combined.")


@dataclass(kw_only=True)
class FinetuneSettings(TrainSettings):
    """Settings of every finetuning script.

    A script adds `method`, a name in `lit_llama.methods.METHODS`. Fields of a script with the same name as a field of
    the method's configuration set that field.
    """

    may_change = (*TrainSettings.may_change, "checkpoint_dir", "data_dir", "gradient_checkpointing", "sample_prompts",
                  "max_new_tokens")  # fmt: skip

    # == What to train on ==
    checkpoint_dir: Path  # folder of the frozen base model
    data_dir: Path  # dataset folder written by a scripts/prepare_*.py
    init_adapter: Path | None = None  # start from this adapter; its configuration overrides the settings

    # == Optimization ==
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, more time

    # == Reporting ==
    eval_rows: PositiveInt = 512  # validate on at most this many rows, always the same
    sample_prompts: NonNegativeInt = 2  # validation prompts to answer at each validation
    max_new_tokens: PositiveInt = 60  # maximum length of an answer to a validation prompt
    dry_run: bool = False  # estimate memory and time from the data and one or two measured steps, and write nothing

    # == Devices ==
    quantize: Quantize | None = None  # store the base's layers in 4 or 8 bits, with bitsandbytes
    compile: bool = False  # compile the layers with torch.compile: the first steps take longer, later ones are faster

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize is not None and self.strategy in SHARDED:
            raise UserError(f"--quantize {self.quantize} and --strategy {self.strategy} cannot be combined.")
        if self.compile and (self.quantize is not None or self.strategy in SHARDED):
            other = f"--strategy {self.strategy}" if self.quantize is None else f"--quantize {self.quantize}"
            raise UserError(f"--compile and {other} cannot be combined.")
