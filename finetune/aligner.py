"""Supervised finetuning with Aligner: teach a frozen LLaMA a form by training a few thousand parameters.

Without arguments it trains one token on the bundled micro-world model; first run python scripts/prepare_microworld.py.
Edit the values below, pass flags of the same name, or give a YAML file with --config (the paper's: howto/recipes/).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.run.train_settings import FinetuneSettings
from lit_llama.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class SFTSettings(FinetuneSettings):
    """Settings of every supervised finetuning script; reporting and devices are in lit_llama/run/train_settings.py."""

    # == What to train on ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # folder of the frozen base model
    data_dir: Path = Path("data/microworld-pirate")  # dataset folder written by a scripts/prepare_*.py
    init_adapter: Path | None = None  # start from this adapter, with its configuration
    out_dir: Path = Path("out/aligner/microworld-pirate")  # folder for all files of the run

    # == Optimization ==
    epochs: PositiveFloat = 4.0  # passes over the data, not necessarily a whole number
    batch_size: PositiveInt = 32  # rows per optimizer step, over all devices
    micro_batch_size: PositiveInt = 32  # rows per forward pass on one device; divides batch_size
    learning_rate: PositiveFloat = 3e-2  # peak learning rate of AdamW
    warmup_epochs: NonNegativeFloat = 0.4  # length of the linear warmup

    # == Reporting ==
    eval_interval: PositiveInt = 50  # steps between validations
    save_interval: PositiveInt = 100  # steps between saved states, from which --resume continues


@dataclass
class Settings(SFTSettings):
    # == Method ==
    method: str = "aligner"  # or another name in lit_llama/methods.py: adapter, adapter_v2, lora, bitfit, …
    method_config: dict[str, Any] | None = None  # further settings of the method, such as {"lora_r": 4}
    adapter_prompt_length: PositiveInt = 1  # number of prefix tokens N, 1 to about 300
    adapter_start_layer: NonNegativeInt = 2  # first layer that attends to them, counted from 0


def main(settings: SFTSettings) -> None:
    # imported here, so that neither --help nor the scripts that share the settings above load PyTorch
    from lit_llama.data import SFTData
    from lit_llama.run.dry_run import dry_run
    from lit_llama.run.folder import RunFolder
    from lit_llama.run.report import print_summary
    from lit_llama.run.samples import answer_samples
    from lit_llama.run.setup import set_up_finetuning, with_initial_config, with_launcher_flags
    from lit_llama.tokenizer import Tokenizer
    from lit_llama.train import SFTLoss, Trainer

    settings = with_initial_config(with_launcher_flags(settings))
    run = RunFolder(settings)
    tokenizer = Tokenizer(settings.checkpoint_dir)
    train = SFTData(settings.data_dir, "train", tokenizer)
    val = SFTData(settings.data_dir, "test", tokenizer, settings.eval_rows)
    setup = set_up_finetuning(settings, train.meta)
    answer = answer_samples(val.prompts(settings.sample_prompts), tokenizer, settings.max_new_tokens)
    trainer = Trainer(setup, train, val, SFTLoss(), run, sample_answers=answer)
    if settings.dry_run:
        return dry_run(trainer)
    summary = trainer.fit()
    if run.is_first:
        print_summary(summary, settings)


if __name__ == "__main__":
    cli.run(main, cli.parse(Settings))
