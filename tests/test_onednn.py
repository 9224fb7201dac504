"""Packed linear layers: same results as plain ones for every method, and packed only if measured to be faster."""

from pathlib import Path

import pytest
import torch
import toys
from test_baselines import BASELINES, adapted

from lit_llama import onednn
from lit_llama.answer_settings import AnswerSettings
from lit_llama.answering import open_session
from lit_llama.checkpoint import AdapterFile, load_model, save_base
from lit_llama.compose import load_adapted, scaled_adapter
from lit_llama.generation import Sampling, generate
from lit_llama.onednn import PRIVATE_OPERATORS, PackedLinear, can_pack, gains, measure, pack_
from lit_llama.tokenizer import Tokenizer

MODELS = {
    "base": toys.base,
    "one token": lambda **sizes: toys.aligned(1, **sizes),
    "ten tokens": lambda **sizes: toys.aligned(10, **sizes),
    **{method: lambda method=method, **sizes: adapted(method, **sizes) for method in BASELINES},
}
SAMPLING = Sampling(max_new_tokens=8)
MICROWORLD = Path(__file__).parents[1] / "checkpoints" / "microworld"


DTYPES = [torch.float32, torch.bfloat16]


def cast(network, dtype=torch.bfloat16):
    for name, p in network.named_parameters():
        p.data = p.data if network.is_adapter_parameter(name) else p.data.to(dtype)
    return network


needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.ones(2, 2).bfloat16()),
    reason="this CPU, or this PyTorch, does not multiply in bf16 through oneDNN",
)
needs_onednn = pytest.mark.skipif(not can_pack(torch.ones(2, 2)), reason="this PyTorch has no oneDNN")
each_dtype = pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=needs_bf16)])


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 1)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_pytorch_still_has_the_private_operators():
    missing = [name for name in PRIVATE_OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    assert not missing, (
        f"PyTorch {torch.__version__} has no torch.ops.mkldnn.{missing[0]}, so lit_llama/onednn.py leaves every model "
        "unpacked and generation on a CPU is slow: call the operator's successor there, or delete the file."
    )


def always(weights):
    return True


@each_dtype
@pytest.mark.parametrize("architecture", ["mha", "gqa", "tied", "biases", "narrow heads"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_packed_layers_are_as_accurate_as_plain_ones(kind, architecture, dtype):
    sizes = toys.ARCHITECTURES[architecture]
    exact, plain, packed = (cast(MODELS[kind](**sizes), d) for d in (torch.float64, dtype, dtype))
    pack_(packed, always)
    for network in (exact, plain, packed):
        network.eval()
    unpacked = [name for name, layer in packed.named_modules() if type(layer) is torch.nn.Linear]
    # the layers of adapter_v2 are of another class
    assert not unpacked and (isinstance(packed.lm_head, PackedLinear) or kind == "adapter_v2")
    for rows, length in ((1, 1), (1, 12), (5, 1), (5, 12)):
        idx = toys.token_ids(rows, length)
        expected = exact(idx)
        errors = [(network(idx).double() - expected).square().mean() for network in (plain, packed)]
        assert packed(idx).dtype == dtype and errors[1] <= 1.5 * errors[0] + 1e-12
        assert errors[1] < {torch.float32: 1e-10, torch.bfloat16: 0.01}[dtype] * expected.square().mean()


@needs_bf16
def test_generation_through_packed_layers_gives_the_same_answers():
    network, prompts = cast(toys.aligned(3, n_kv_head=2)), toys.prompts(3, 11, 3)
    expected = generate(network, prompts, SAMPLING)
    with scaled_adapter(network, 0.0):
        unadapted = generate(network, prompts, SAMPLING)
    for _ in range(2):  # packing again changes nothing
        assert pack_(network, always) is network
    assert generate(network, prompts, SAMPLING) == expected != unadapted
    with scaled_adapter(network, 0.0):
        assert generate(network, prompts, SAMPLING) == unadapted


@needs_onednn
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packs", [False, True])
def test_layers_are_packed_only_if_the_callback_returns_true(packs, tied):
    network, shapes = toys.base(tie_embeddings=tied), []
    before = [*network.modules()]
    pack_(network, lambda weights: shapes.extend(tuple(weight.shape) for weight in weights) or packs)
    block = [(96, 32), (32, 32), (40, 32), (40, 32), (32, 40)]
    assert sorted(shapes) == sorted(3 * block + [(50, 32)])
    packed = [layer for layer in network.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == packs * 16 and isinstance(network.lm_head, PackedLinear) == packs
    assert packs or [*network.modules()] == before


PLAIN = (1.0, 2.0)  # seconds with one row and with eight


@pytest.mark.parametrize(
    "packed, expected",
    [
        (PLAIN, False),
        ((0.95, 1.9), False),  # speedup too small
        ((1.1, 0.2), False),  # slower with one row
        ((0.5, 2.2), False),  # slower with eight
        ((1.0, 1.6), True),
        ((0.8, 2.0), True),
        ((0.5, 0.5), True),
    ],
)
def test_packing_requires_a_speedup(packed, expected):
    assert gains(PLAIN, packed) == expected


@needs_onednn
def test_a_stopped_clock_leaves_layers_plain():
    assert not gains(*measure([torch.ones(8, 4), torch.ones(6, 8)], clock=lambda: 0.0))


@pytest.mark.parametrize("faster, second, passes", [("plain", 1.0, onednn.MIN_PASSES), ("packed", 1e-6, onednn.PASSES)])
def test_times_are_extrapolated_from_samples_of_each_shape(faster, second, passes, monkeypatch):
    products, now = [], 0.0

    def product(name, x, weight):
        nonlocal now
        first_pass = len(products) < 8  # two shapes, plain and packed, two numbers of rows
        products.append((name, tuple(weight.shape), len(x)))
        now += second * (100 if first_pass else (1 if name == faster else 2) * len(x) * len(weight))

    monkeypatch.setattr(onednn.F, "linear", lambda x, weight: product("plain", x, weight))
    monkeypatch.setattr(onednn, "PackedLinear", lambda weight: lambda x: product("packed", x, weight))
    monkeypatch.setattr(onednn, "SAMPLE_BYTES", 2 * 5 * 16)  # five rows of four numbers for each shape
    times = measure([torch.ones(8, 4), torch.ones(3, 4), torch.ones(8, 4)], clock=lambda: now)
    rows = 8 + 3 + 8
    expected = [(rows, 8 * rows), (2 * rows, 16 * rows)]
    for measured, estimate in zip(times, expected if faster == "plain" else expected[::-1], strict=True):
        assert measured == pytest.approx([second * value for value in estimate])
    assert len(products) == 8 * passes
    assert gains(*times) == (faster == "packed")
    assert {shape for _, shape, _ in products} == {(5, 4), (3, 4)} and {rows for *_, rows in products} == {1, 8}


@needs_onednn
def test_a_base_and_its_variants_are_measured_once_per_process(monkeypatch):
    calls = []

    def measured(weights):
        calls.append(len(weights))
        return PLAIN, (0.5, 0.5)

    monkeypatch.setattr(onednn, "measure", measured)
    monkeypatch.setattr(onednn, "_gains", {})
    size = dict(vocab_size=200, padded_vocab_size=200)
    for network in (toys.base(**size), toys.aligned(2, **size), adapted("lora", **size)):
        pack_(network)
        assert isinstance(network.transformer.h[0].mlp.c_proj, PackedLinear)
    assert calls == [16]
    pack_(toys.base())
    assert calls == [16, 16]  # a different base
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    pack_(toys.base())
    assert calls == [16, 16, 16]  # a different number of threads


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
    attention = pack_(models[1], always).transformer.h[1].attn
    assert isinstance(attention.c_attn, PackedLinear)
    models[1].use(models[1].sums)  # projects the prefixes once more, through the packed layers
    with torch.no_grad():
        torch.testing.assert_close(models[1](idx), expected, atol=0.1, rtol=0.05)


CAUSES = ["few weights", "little memory", "another dtype", "another device", "no oneDNN", "no such call"]


@pytest.mark.parametrize("cause", CAUSES)
def test_unsuitable_models_are_left_unpacked(cause, monkeypatch):
    network = toys.base()
    if cause == "few weights":
        monkeypatch.setattr(onednn, "MIN_WEIGHTS", 100_000)
    elif cause == "little memory":
        monkeypatch.setattr(onednn.os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes
    elif cause == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif cause == "no such call":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    else:
        network = network.double() if cause == "another dtype" else network.to("meta")
    before = [*network.modules()]
    pack_(network, always)
    assert [*network.modules()] == before


def test_the_bundled_model_is_never_packed(monkeypatch):
    monkeypatch.undo()  # the real MIN_WEIGHTS
    network = load_model(MICROWORLD)
    before = [*network.modules()]
    assert [*pack_(network, always).modules()] == before  # so its answers never depend on a measurement


@needs_bf16
def test_open_session_packs_the_model(base_dir, monkeypatch):
    monkeypatch.setattr(onednn, "gains_from_packing", always)

    def load():
        return load_model(base_dir, dtype=torch.bfloat16)

    session = open_session(AnswerSettings(checkpoint_dir=base_dir), Tokenizer(base_dir), load)
    assert isinstance(session.model.transformer.h[0].attn.c_attn, PackedLinear)
