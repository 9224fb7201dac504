"""The finetuning methods by name, as used by `--method`, adapter files and `load_model`.

To add a method, write a module with a subclass of `lit_llama.model.LLaMA` and register the class here.
"""

from dataclasses import fields
from typing import Any

from lit_llama import adapter, adapter_v2, aligner, bitfit, lora, prompt_tuning
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.run.train_settings import FinetuneSettings
from lit_llama.utils import UserError

METHODS: dict[str, type[LLaMA]] = {
    "aligner": aligner.LLaMA,
    "adapter": adapter.LLaMA,
    "adapter_v2": adapter_v2.LLaMA,
    "lora": lora.LLaMA,
    "bitfit": bitfit.LLaMA,
    "prompt_tuning": prompt_tuning.LLaMA,
}


def method_config(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the configuration of the method, from settings of the same name, `method_config` or the defaults.

    Raises:
        UserError: There is no such method, or `method_config` has a name that is not in its configuration.
    """
    if settings.method not in METHODS:
        raise UserError(f"There is no method {settings.method!r}; choose from {', '.join(METHODS)}.")
    base_fields = {field.name for field in fields(LLaMAConfig)}
    method_fields = [field for field in fields(METHODS[settings.method].config_class) if field.name not in base_fields]
    config = {field.name: getattr(settings, field.name, field.default) for field in method_fields}
    overrides = getattr(settings, "method_config", None) or {}
    if unknown := sorted(overrides.keys() - config.keys()):
        known = f"it has {', '.join(config)}" if config else "it has none"
        raise UserError(f"method_config: {unknown[0]!r} is not a setting of the method {settings.method!r}; {known}.")
    return {**config, **overrides}
