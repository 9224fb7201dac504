"""Initialization of adapter parameters, which all variants inherit."""

import pytest
import torch
import torch.nn as nn
import toys

import lit_llama.model as llama
from lit_llama.compose import scaled_adapter
from lit_llama.methods import METHODS
from lit_llama.utils import UserError


class Shift(nn.Module):
    """A module with a parameter that only a subclass can initialize."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))


class ResettableShift(Shift):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.shift)


class ShiftedLLaMA(llama.LLaMA):
    """A variant whose adapter is one vector, a parameter of a `shift_class` module or, if None, of the model itself."""

    shift_class: type[Shift] | None = ResettableShift

    def __init__(self, config: llama.LLaMAConfig) -> None:
        super().__init__(config)
        if self.shift_class is None:
            self.shift = nn.Parameter(torch.empty(config.n_embd))
        else:
            self.shifted = self.shift_class(config.n_embd)

    @staticmethod
    def is_adapter_parameter(name: str) -> bool:
        return name in ("shift", "shifted.shift")


class ForgottenRoot(ShiftedLLaMA):
    shift_class = None


class ResettableRoot(ForgottenRoot):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.shift)


class NotResettable(ShiftedLLaMA):
    shift_class = Shift


class ForgottenByAnOverride(ShiftedLLaMA):
    def reset_adapter(self) -> None:
        pass


def initialized_model(variant: type[llama.LLaMA]) -> llama.LLaMA:
    with torch.device("meta"):
        network = variant(variant.config_class(**toys.SIZES))
    network.initialize_adapter()
    return network


@pytest.mark.parametrize("variant", [ShiftedLLaMA, ResettableRoot])
def test_parameters_of_modules_and_of_the_model_itself_are_initialized(variant):
    (shift,) = (p for name, p in initialized_model(variant).named_parameters() if variant.is_adapter_parameter(name))
    assert torch.equal(shift, torch.ones(32)) and shift.requires_grad


@pytest.mark.parametrize(
    "variant, sentence",
    [
        (ForgottenRoot, r"^Not initialized: shift; a reset_parameters\(\) of its module would do it\.$"),
        (NotResettable, r"^Not initialized: shifted\.shift; a reset_parameters"),
        (ForgottenByAnOverride, r"^Not initialized: shifted\.shift;"),
    ],
)
def test_an_error_names_parameters_that_are_not_initialized(variant, sentence):
    with pytest.raises(TypeError, match=sentence):
        initialized_model(variant)


@pytest.mark.parametrize("method", METHODS)
def test_initialization_keeps_the_base_and_is_reproducible_with_a_seed(method):
    variant = METHODS[method]
    network, states = variant(variant.config_class(**toys.SIZES)), []
    before = {name: t.clone() for name, t in network.state_dict().items()}
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        network.initialize_adapter()
        states.append({name: t.clone() for name, t in toys.adapter_state(network).items()})
    assert states[0] and all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    if method != "bitfit":  # all zeros
        assert not all(torch.equal(t, states[2][name]) for name, t in states[0].items())
    for name, tensor in network.state_dict().items():
        assert network.is_adapter_parameter(name) or torch.equal(tensor, before[name]), name


def test_a_variant_without_scaled_parameter_cannot_be_mistaken_for_the_base():
    network = initialized_model(ShiftedLLaMA)
    with scaled_adapter(network, 1.0):
        assert torch.equal(network.shifted.shift, torch.ones(network.config.n_embd))
    with pytest.raises(UserError, match="cannot be scaled; use strength 1"):
        scaled_adapter(network, 0.0)
