"""The finetuning methods by name, as used by `--method`, adapter files and `load_model`.

To add a method, write a module with a subclass of `lit_llama.model.LLaMA` and register the class here.
"""

from lit_llama import adapter, adapter_v2, aligner, bitfit, lora, prompt_tuning
from lit_llama.model import LLaMA

METHODS: dict[str, type[LLaMA]] = {
    "aligner": aligner.LLaMA,
    "adapter": adapter.LLaMA,
    "adapter_v2": adapter_v2.LLaMA,
    "lora": lora.LLaMA,
    "bitfit": bitfit.LLaMA,
    "prompt_tuning": prompt_tuning.LLaMA,
}
