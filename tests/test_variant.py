"""What every variant inherits: initial values for each adapter parameter, wherever it stands."""

import pytest
import torch
import torch.nn as nn
import toys

import lit_llama.model as llama
from lit_llama.methods import METHODS


class Shift(nn.Module):
    """A module with a parameter and, in a subclass, a way to initialize it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))


class ResettableShift(Shift):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.shift)


class ShiftedLLaMA(llama.LLaMA):
    """Adds a vector to the embedded tokens, held by the module `shift_class`, or by the model itself without one."""

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


def fresh(variant: type[llama.LLaMA]) -> llama.LLaMA:
    with torch.device("meta"):
        network = variant(variant.config_class(**toys.SIZES))
    network.initialize_adapter()
    return network


@pytest.mark.parametrize("variant", [ShiftedLLaMA, ResettableRoot])
def test_every_parameter_is_initialized_in_a_module_and_in_the_model_itself(variant):
    (shift,) = (p for name, p in fresh(variant).named_parameters() if variant.is_adapter_parameter(name))
    assert torch.equal(shift, torch.ones(32)) and shift.requires_grad


@pytest.mark.parametrize(
    "variant, sentence",
    [
        (ForgottenRoot, r"^Not initialized: shift; a reset_parameters\(\) of its module would do it\.$"),
        (NotResettable, r"^Not initialized: shifted\.shift; a reset_parameters"),
        (ForgottenByAnOverride, r"^Not initialized: shifted\.shift;"),
    ],
)
def test_a_parameter_without_an_initial_value_is_named(variant, sentence):
    with pytest.raises(TypeError, match=sentence):
        fresh(variant)


@pytest.mark.parametrize("method", METHODS)
def test_initializing_leaves_the_base_alone_and_repeats_with_the_seed(method):
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
