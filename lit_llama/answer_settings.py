"""Settings that the scripts in generate/ share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.settings import Checked, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare, Quantize, Seed
from lit_llama.storage.files import check_file
from lit_llama.utils import UserError

if TYPE_CHECKING:
    from lit_llama.generation import Sampling


@dataclass
class AnswerSettings(Checked):
    """Settings of every generate script; each adds its own and overrides some defaults."""

    # == Model ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder

    # == Prompts ==
    prompt: tuple[str, ...] = ()  # texts to answer
    input: str = ""  # context for the prompts: Alpaca's field for it; in other styles, a new line after the prompt
    prompt_file: Path | None = None  # JSON or JSON Lines (prompt, instruction or turns), or lines of text
    system: str = ""  # system message: what the model is and how it should answer
    interactive: bool = False  # chat in the terminal; from a pipe, answer each line
    output_file: Path | None = None  # also write prompts and answers here, as JSON
    overwrite: bool = False  # replace output_file if it exists

    # == Sampling ==
    temperature: NonNegativeFloat = 0.0  # 0 is greedy; 1 samples from the model's distribution
    top_k: NonNegativeInt = 0  # sample from the k most likely tokens; 0 means all
    top_p: PositiveShare = 1.0  # sample from the most likely tokens that together reach this probability; 1 means all
    max_new_tokens: PositiveInt = 100  # longest answer, in tokens
    seed: Seed = 1234  # of sampling; the same prompts give the same answers
    batch_size: PositiveInt = 16  # prompts answered at a time

    # == Device ==
    accelerator: str = "auto"  # auto, cpu, cuda or mps
    devices: PositiveInt = 1  # number of devices; with more than one, the base is sharded over them
    precision: str = "auto"  # of the base: 32-true, bf16-true, 16-true; auto: bf16-true on GPUs with bf16, else 32-true
    quantize: Quantize | None = None  # store the base's layers in 4 or 8 bits with bitsandbytes (default: no)
    compile: bool = False  # compile the layers, which pays off for many answers; on a GPU, with CUDA graphs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("interactive", "quantize", "compile"):
            if self.devices > 1 and getattr(self, name):
                raise UserError(
                    f"--{name} needs a complete base on one device, and --devices {self.devices} shards it."
                )
        if self.compile and self.quantize:
            raise UserError("--compile and --quantize cannot be combined: quantized layers cannot be compiled.")
        for name in ("input", "prompt_file", "output_file"):
            if self.interactive and getattr(self, name):
                raise UserError(f"--interactive and --{name} cannot be combined.")
        if self.prompt_file and self.input:
            raise UserError("--input is the context of --prompt; in --prompt_file, each row has its own.")

    @property
    def sampling(self) -> "Sampling":
        from lit_llama.generation import Sampling  # loads PyTorch

        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def model_options(self) -> dict[str, Any]:
        """Device, dtype and quantization as arguments of `load_model`; with several devices, a mesh of processes.

        The first access starts these processes.
        """
        from lit_llama.device import pick_device  # loads PyTorch

        device, dtype = pick_device(self.accelerator, self.precision)
        if self.devices == 1:
            return {"device": device, "dtype": dtype, "quantize": self.quantize}
        from lit_llama.run.processes import base_mesh, launch_sharded  # loads Lightning

        fabric = launch_sharded(self.accelerator, self.devices)
        return {"device": fabric.device, "dtype": dtype, "mesh": base_mesh(fabric, "fsdp")}

    def check_output(self, *inputs: Path) -> None:
        """Check that `output_file` may be written and is not one of the inputs.

        Raises:
            UserError: It may not be written, or it is an input.
        """
        if self.output_file:
            check_file(self.output_file, self.prompt_file, self.checkpoint_dir, *inputs, overwrite=self.overwrite)
