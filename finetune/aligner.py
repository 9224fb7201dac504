"""Supervised finetuning with Aligner: a frozen LLaMA learns a form through a few thousand numbers.

Without arguments it trains one token on the bundled micro-world model. Edit the values below, pass flags of the same
name, or name a YAML file with --config (recipes of the paper: howto/recipes/).
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.data import SFTData
from lit_llama.quantize import Quantize
from lit_llama.report import print_summary
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import Precision, TrainConfig, Trainer, answer_samples, start_finetuning
from lit_llama.utils import log
from scripts import prepare_microworld


@dataclass
class SFTSettings:
    """The settings of every supervised finetuning script; a script adds those of its method."""

    # == What to train on ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the frozen base model's folder
    data_dir: Path = Path("data/microworld-pirate")  # a folder that scripts/prepare_*.py wrote
    init_adapter: Path | None = None  # start from this adapter, with its length and start layer
    out_dir: Path = Path("out/aligner/microworld-pirate")  # everything the run writes

    # == Optimisation (a step is always an optimiser step) ==
    epochs: float = 4.0  # passes over the data; need not be whole
    max_steps: int | None = None  # stop after so many steps even if the epochs are not over
    batch_size: int = 32  # rows per step, over all devices
    micro_batch_size: int = 32  # rows per forward pass on one device; divides batch_size
    learning_rate: float = 3e-2  # peak of AdamW's learning rate
    warmup_epochs: float = 0.4  # linear rise from 0 to the peak
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warmup; cosine falls to 0
    weight_decay: float = 0.02  # AdamW's, never on gates and biases
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, more time
    seed: int = 1337  # of the fresh adapter, the order of the data and the samples

    # == Reporting ==
    eval_interval: int = 50  # steps between validations
    eval_rows: int = 512  # validate on at most so many rows, always the same
    save_interval: int = 100  # steps between saved states, which --resume continues from
    sample_prompts: int = 2  # validation prompts to answer at each validation
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


@dataclass
class Settings(SFTSettings):
    # == Aligner ==
    adapter_prompt_length: int = 1  # prefix tokens N, 1 to about 300
    adapter_start_layer: int = 2  # first layer that attends to them, from 0


def main(args: SFTSettings, method: str = "aligner") -> None:
    """Train an adapter of a method, a name in `lit_llama.methods.METHODS`."""
    config = TrainConfig(**{name: getattr(args, name) for name in TrainConfig.__dataclass_fields__})
    if args.data_dir == Settings.data_dir and not args.data_dir.exists():
        log(f"Writing the default dataset, {args.data_dir}, with scripts/prepare_microworld.py.")
        prepare_microworld.main(prepare_microworld.Settings(checkpoint_dir=args.checkpoint_dir))
    tokenizer = Tokenizer(args.checkpoint_dir)
    train, val = SFTData(args.data_dir, "train", tokenizer), SFTData(args.data_dir, "test", tokenizer, args.eval_rows)
    fabric, model, meta = start_finetuning(args, train.meta, method)
    samples = answer_samples(val, tokenizer, args.sample_prompts, args.max_new_tokens)
    trainer = Trainer(fabric, model, train, val, config, asdict(args), meta, samples)
    if fabric.global_rank == 0:
        log(f"{sum(p.numel() for p in trainer.trainable.values()):,} trainable parameters, {len(train):,} rows, "
            f"{trainer.max_steps} steps")  # fmt: skip
    summary = trainer.fit()
    if fabric.global_rank == 0:
        command = ["python", "generate/aligner.py", "--checkpoint_dir", f"{args.checkpoint_dir}"]
        command += ["--adapter", f"{args.out_dir}", *(["--quantize", args.quantize] if args.quantize else [])]
        print_summary(summary, args.out_dir, [*command, "--prompt", "your instruction"])


if __name__ == "__main__":
    cli.run(main, Settings)
