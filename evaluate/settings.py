"""Settings that several evaluations share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lit_llama.settings import (
    Checked,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Quantize,
    Seed,
)
from lit_llama.utils import UserError


@dataclass
class ModelSettings(Checked):
    # == Model ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter: Path | None = None  # adapter file or run folder, of any method (default: the base model alone)
    strength: Number = 1.0  # scale of the adapter: 0 is the base model exactly, 1 the adapter as trained
    prompt_style: str | None = None  # alpaca, orca, beaver, hh, plain, chat (default: the adapter's; alpaca for a base)

    # == Device ==
    accelerator: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # of the base: 32-true, bf16-true, 16-true; auto: bf16-true on GPUs with bf16, else 32-true
    quantize: Quantize | None = None  # store the base in 4 or 8 bits, with bitsandbytes (default: no)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is None and self.strength != 1:
            raise UserError("--strength scales an adapter; give --adapter too.")


@dataclass
class JudgeSettings(Checked):
    # == Judge ==
    judge_url: str | None = None  # OpenAI-compatible endpoint, like https://api.openai.com/v1 (default: only the cache)
    judge_model: str | None = None  # the model's name; required with --judge_url (default: the only one in the cache)
    judge_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the API key; may be unset
    judge_workers: PositiveInt = 4  # requests in flight at a time
    judge_timeout: PositiveFloat = 120.0  # seconds to wait for a reply
    judge_retries: NonNegativeInt = 6  # retries after HTTP 429 or 5xx, a time-out or a broken connection
    judge_max_tokens: PositiveInt = 1024  # longest reply, in tokens
    judge_body: dict[str, Any] = field(default_factory=dict)  # more fields of a request, as JSON; null removes one
    judge_cache: Path | None = None  # file that all replies are appended to (default: judgements.jsonl in --output_dir)


@dataclass
class CompareSettings(ModelSettings, JudgeSettings):
    # a setting -> the settings that it replaces, which have no effect if it is given
    replaces: ClassVar[dict[str, tuple[str, ...]]] = {"answer_file": ("adapter", "strength")}

    # == Compared answers ==
    answer_file: Path | None = None  # use these answers instead of the model's: FastChat's format or answers.jsonl
    against: str = "base"  # compare with: base, an adapter (a file or a run folder), or a file of answers
    max_new_tokens: PositiveInt = 1024  # longest answer, in tokens
    temperature: NonNegativeFloat = 0.0  # 0 is greedy
    seed: Seed = 1234  # seed of sampling
    batch_size: PositiveInt = 16  # questions answered at a time
    skip_long: bool = True  # skip and count questions longer than the model's context; false: stop with an error

    def __post_init__(self) -> None:
        for name, replaced in self.replaces.items():
            for ignored in replaced:
                if getattr(self, name) and getattr(self, ignored) != getattr(type(self), ignored):
                    raise UserError(
                        f"--{name} and --{ignored} cannot be combined: --{ignored} has no effect with --{name}."
                    )
        super().__post_init__()
