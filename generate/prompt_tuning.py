"""Answers of a base model with an adapter that finetune/prompt_tuning.py trained.

The adapter knows its settings, prompt style and base model; none of them is asked for. Answers go to stdout, everything
else to stderr.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from generate import aligner
from lit_llama import cli

INHERITS = (aligner, "Model")

# == Model ==
checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
adapter: list[Path] = [Path("out/prompt_tuning/microworld-pirate")]  # an adapter file or a run's folder
strength: list[float] = [1.0]  # 0 is the base exactly, 1 the adapter as trained

main = partial(aligner.main, method="prompt_tuning")

if __name__ == "__main__":
    cli.run(main, __file__, globals())
