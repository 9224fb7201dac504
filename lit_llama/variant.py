"""The base class of all variants of LLaMA (Aligner, LoRA, ...): which parameters belong to the adapter, and how they
are initialized, loaded and scaled.

A variant subclasses `lit_llama.model.LLaMA`, overrides `is_adapter_parameter`, and changes one step of the network,
usually through `make_attention` and `CausalSelfAttention.attend`.
"""

import math
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.utils import UserError


class Variant(nn.Module):
    """Base class of `lit_llama.model.LLaMA` with the methods that its variants override."""

    compiled: str | None = None  # what the layers are compiled for: "training" or "decoding"; see lit_llama/compiled.py

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        """Return whether a parameter belongs to the adapter, which is trained and saved, and not to the frozen base."""
        return False

    @staticmethod
    def scaled_parameter(name: str, value: Tensor, strength: float) -> Tensor:
        """Return an adapter parameter at a strength: 0 gives the base model exactly, 1 the adapter as trained.

        Raises:
            UserError: The variant does not support this strength.
        """
        if strength != 1:
            raise UserError("Adapters of this method cannot be scaled; use strength 1.")
        return value

    @staticmethod
    def config_from_state(state_dict: dict[str, Tensor]) -> dict[str, Any] | None:
        """Return the variant's configuration for an adapter file without a header, None for another variant's file.

        Raises:
            UserError: The tensors are this variant's but do not determine its configuration.
        """
        return None

    def normalize_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy without the redundant tensors that other programs write.

        Raises:
            UserError: A tensor that should be redundant differs from the one it repeats.
        """
        return dict(state_dict)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False):
        """Load the base, the adapter, or both; each must be complete.

        Adapter parameters stay fp32 regardless of the dtype of the file, even with `assign`.

        Raises:
            UserError: A tensor is unknown, missing or of the wrong shape.
        """
        state_dict = self.normalize_state_dict(state_dict)
        has_adapter = {self.is_adapter_parameter(name) for name in state_dict}
        shapes = {n: tuple(p.shape) for n, p in self.named_parameters() if self.is_adapter_parameter(n) in has_adapter}
        check_shapes(state_dict, shapes, "The weights do not fit the model")
        in_fp32 = {name: t.float() for name, t in state_dict.items() if self.is_adapter_parameter(name)}
        return super().load_state_dict({**state_dict, **in_fp32}, strict=False, assign=assign)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter by name."""
        return {name: p for name, p in self.named_parameters() if self.is_adapter_parameter(name)}

    def initialize_adapter(self) -> None:
        """Allocate the adapter on the CPU, so a seed gives the same values on every device, and call `reset_adapter`.

        Raises:
            TypeError: A parameter was not initialized.
        """
        for name, p in self.adapter_parameters().items():
            module, _, child = name.rpartition(".")
            setattr(self.get_submodule(module), child, nn.Parameter(torch.full_like(p, math.nan, device="cpu")))
        self.reset_adapter()
        if left_out := [name for name, p in self.adapter_parameters().items() if p.isnan().any()]:
            raise TypeError(f"Not initialized: {', '.join(left_out)}; a reset_parameters() of its module would do it.")

    def reset_adapter(self) -> None:
        """Initialize the adapter: call `reset_trained` of each module with adapter parameters, or `reset_parameters`.

        A module that also has parameters of the base has a `reset_trained`.
        """
        for prefix, module in self.named_modules():
            names = [name for name, _ in module.named_parameters(prefix, recurse=False)]
            reset = getattr(module, "reset_trained", None) or getattr(module, "reset_parameters", None)
            if any(map(self.is_adapter_parameter, names)) and reset is not None:
                reset()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Temporarily cache the tensors that do not depend on the text (see `CausalSelfAttention.constants`).

        The adapter must not change in the meantime.
        """
        attention = [block.attn for block in self.transformer.h]
        try:
            with torch.no_grad():
                for attn in attention:
                    attn.cached = attn.constants(self.transformer.wte.weight.dtype)
            yield
        finally:
            for attn in attention:
                attn.cached = None

    def selecting(self, rows: list[int]) -> AbstractContextManager:
        """Temporarily expect batches of only these rows, for variants with different adapters per row."""
        return nullcontext()

    def adapters_of_rows(self, count: int) -> Sequence[Hashable]:
        """Return a value for each row of a batch, equal for rows that use the same adapters.

        Args:
            count: number of rows.

        Raises:
            UserError: The model has adapters for a different number of rows.
        """
        return [None] * count


def check_shapes(tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], complaint: str) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Args:
        complaint: how the error message begins.

    Raises:
        UserError: A tensor is missing, unexpected, or has the wrong shape.
    """
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in shapes if name not in actual]
    problems += [f"{name} does not belong to this model" for name in actual if name not in shapes]
    problems += [f"{n} is {actual[n]}, not {shapes[n]}" for n in shapes if n in actual and actual[n] != shapes[n]]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{complaint}: {'; '.join(problems[:3])}{more}.")


def mark_only_adapter_as_trainable(model: Variant) -> None:
    """Freeze all parameters except the adapter's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.is_adapter_parameter(name))


def layers_of(state_dict: dict[str, Tensor], suffix: str) -> list[int]:
    """Return the numbers of the layers that have a tensor whose name ends with `suffix`."""
    matches = [re.match(r"transformer\.h\.(\d{1,4})\.", name) for name in state_dict if name.endswith(suffix)]
    return [int(match[1]) for match in matches if match]


def without_aliases(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the copies of an Aligner's prefix (`attn.adapter_wte.weight` of each layer) from the authors' files.

    Raises:
        UserError: A copy differs from the prefix: the file is a LLaMA-Adapter's.
    """
    prefix = state_dict.get("global_value_embedding.weight")
    aliases = {name for name in state_dict if name.endswith(".attn.adapter_wte.weight")}
    for name in sorted(aliases):
        if prefix is None or not torch.equal(state_dict[name], prefix):
            raise UserError(f"{name} is not the global prefix: these are a LLaMA-Adapter's weights, not an Aligner's.")
    return {name: tensor for name, tensor in state_dict.items() if name not in aliases}
