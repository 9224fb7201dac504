"""Packed linear layers compute what plain ones compute, with every method."""

import pytest
import torch
import toys
from test_baselines import BASELINES, adapted

from lit_llama import onednn
from lit_llama.answer_settings import AnswerSettings
from lit_llama.chat import open_session
from lit_llama.checkpoint import AdapterFile, load_model, save_base
from lit_llama.compose import load_adapted, scaled_adapter
from lit_llama.generation import Sampling, generate
from lit_llama.onednn import PRIVATE_OPERATORS, PackedLinear, gains, pack_
from lit_llama.tokenizer import Tokenizer

MODELS = {
    "base": toys.base,
    "one token": lambda **sizes: toys.aligned(1, **sizes),
    "ten tokens": lambda **sizes: toys.aligned(10, **sizes),
    **{method: lambda method=method, **sizes: adapted(method, **sizes) for method in BASELINES},
}
SAMPLING = Sampling(max_new_tokens=8)


DTYPES = [torch.float32, torch.bfloat16]


def cast(network, dtype=torch.bfloat16):
    for name, p in network.named_parameters():
        p.data = p.data if network.is_adapter_parameter(name) else p.data.to(dtype)
    return network


needs_bf16 = pytest.mark.skipif(
    not gains(torch.ones(2, 2).bfloat16()), reason="this CPU, or this PyTorch, does not multiply in bf16 through oneDNN"
)
each_dtype = pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=needs_bf16)])


@pytest.fixture(autouse=True)
def small_layers_on_two_threads(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_pytorch_still_has_the_private_operators():
    missing = [name for name in PRIVATE_OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    assert not missing, (
        f"PyTorch {torch.__version__} has no torch.ops.mkldnn.{missing[0]}, so lit_llama/onednn.py leaves every model "
        "unpacked and generation on a CPU is slow: call the operator's successor there, or delete the file."
    )


@each_dtype
@pytest.mark.parametrize("architecture", ["mha", "gqa", "tied", "biases", "narrow heads"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_packed_is_as_exact_as_plain(kind, architecture, dtype):
    sizes = toys.ARCHITECTURES[architecture]
    exact, plain, other = (cast(MODELS[kind](**sizes), d) for d in (torch.float64, dtype, dtype))
    pack_(other)
    for network in (exact, plain, other):
        network.eval()
    left = [name for name, layer in other.named_modules() if type(layer) is torch.nn.Linear]
    assert not left and (isinstance(other.lm_head, PackedLinear) or kind == "adapter_v2")  # its layers are its own
    for rows, length in ((1, 1), (1, 12), (5, 1), (5, 12)):
        idx = toys.token_ids(rows, length)
        expected = exact(idx)
        errors = [(network(idx).double() - expected).square().mean() for network in (plain, other)]
        assert other(idx).dtype == dtype and errors[1] <= 1.5 * errors[0] + 1e-12
        assert errors[1] < {torch.float32: 1e-10, torch.bfloat16: 0.01}[dtype] * expected.square().mean()


@needs_bf16
def test_generation_through_packed_layers():
    network, prompts = cast(toys.aligned(3, n_kv_head=2)), toys.prompts(3, 11, 3)
    expected = generate(network, prompts, SAMPLING)
    with scaled_adapter(network, 0.0):
        unadapted = generate(network, prompts, SAMPLING)
    assert pack_(network) is network and pack_(network) is network  # once more changes nothing
    assert generate(network, prompts, SAMPLING) == expected != unadapted
    with scaled_adapter(network, 0.0):
        assert generate(network, prompts, SAMPLING) == unadapted


@needs_bf16
def test_composed_adapters_use_packed_layers(tmp_path):
    first, second = toys.aligned(2), toys.aligned(3, seed=1)
    save_base(tmp_path, first.config, toys.base().state_dict())
    adapters = [
        AdapterFile(
            {name: p.detach() for name, p in network.named_parameters() if network.is_adapter_parameter(name)},
            {"method": "aligner", "config": {"adapter_prompt_length": n, "adapter_start_layer": 1}},
            tmp_path / "adapter.safetensors",
        )
        for network, n in ((first, 2), (second, 3))
    ]
    models = [load_adapted(tmp_path, adapters, [1.0], dtype=torch.bfloat16) for _ in range(2)]
    expected, idx = models[0](toys.token_ids(2, 9)), toys.token_ids(2, 9)
    attention = pack_(models[1]).transformer.h[1].attn
    assert isinstance(attention.c_attn, PackedLinear)
    models[1].use(models[1].sums)  # projects the prefixes once more, through the packed layers
    with torch.no_grad():
        torch.testing.assert_close(models[1](idx), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("cause", ["small layers", "one thread", "no oneDNN", "no such call", "little memory"])
def test_others_are_left_alone(cause, monkeypatch):
    if cause == "small layers":
        monkeypatch.setattr(onednn, "MIN_WEIGHTS", 10_000)
    elif cause == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    elif cause == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif cause == "no such call":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:
        monkeypatch.setattr(onednn.os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes
    network = pack_(toys.base())
    assert not any(isinstance(layer, PackedLinear) for layer in network.modules())


@needs_bf16
def test_the_generate_scripts_pack(base_dir):
    def load():
        return load_model(base_dir, dtype=torch.bfloat16)

    session = open_session(AnswerSettings(checkpoint_dir=base_dir), Tokenizer(base_dir), load)
    assert isinstance(session.model.transformer.h[0].attn.c_attn, PackedLinear)
