"""The base model: architecture, precision, configuration, loading."""

import json
import math

import pytest
import reference
import torch
import toys
from torch.nn import functional as F

from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig, RMSNorm, SwiGLU, llama_configs
from lit_llama.rope import RoPE, rope_frequencies, rotate
from lit_llama.utils import UserError


@pytest.mark.parametrize("architecture", toys.ARCHITECTURES)
def test_logits_equal_the_reference(architecture):
    network = toys.base(**toys.ARCHITECTURES[architecture])
    idx = toys.token_ids(2, 40)
    expected = [reference.logits(reference.double(network.state_dict()), network.config, row) for row in idx.tolist()]
    torch.testing.assert_close(network(idx).double(), torch.stack(expected), atol=4e-5, rtol=2e-5)


def test_selected_positions_give_the_same_logits_as_the_full_output():
    network, idx = toys.base(), toys.token_ids(3, 12)
    logits = network(idx)
    last = torch.tensor([11, 0, 5])
    torch.testing.assert_close(
        network.unembed(network.hidden(idx)[torch.arange(3), last]), logits[torch.arange(3), last]
    )
    labels = idx.clone()
    labels[0, :4] = labels[1, 2:] = labels[2, 7] = -1
    expected = [
        logits[b, t - 1].log_softmax(-1)[idx[b, t]] for b in range(3) for t in range(1, 12) if labels[b, t] >= 0
    ]
    logps = network.label_logps(idx, labels)
    assert logps.dtype == torch.float32 and len(logps) == (12 - 4) + 1 + (11 - 1)
    torch.testing.assert_close(logps, torch.stack(expected))


def test_without_labels_the_logps_are_empty_and_can_be_summed():
    network, idx = toys.base(), toys.token_ids(2, 5)
    logps = network.label_logps(idx, torch.full_like(idx, -1))
    assert logps.shape == (0,)
    logps.sum().backward()


def test_padding_on_the_right_changes_nothing():
    network, idx = toys.base(n_kv_head=2), toys.token_ids(1, 10)
    padded = torch.cat([idx, toys.token_ids(1, 6, seed=9)], dim=1)
    torch.testing.assert_close(network(padded)[:, :10], network(idx))


# == Precision ==


def test_rope_angles_match_the_formula_up_to_the_end_of_the_context():
    config = LLaMAConfig(**{**toys.SIZES, "block_size": 4096})
    x = torch.zeros(1, 1, 4096, 8)
    x[..., 0::2] = 1
    rotated = rotate(x, *RoPE(config)(slice(4096)))[0, 0].double()
    expected = reference.rotate(x[0, 0].double(), config)
    torch.testing.assert_close(rotated, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("head_size", [6, 64])
def test_rotation_and_its_gradient_are_a_complex_product(head_size, by_row):
    config = LLaMAConfig(**{**toys.SIZES, "head_size": head_size})
    positions = torch.randint(64, (3, 12)) if by_row else slice(12)
    angles = torch.outer(torch.arange(64.0), rope_frequencies(config))[positions]
    turns = torch.polar(torch.ones_like(angles), angles)
    x = torch.randn(3, 12, 5, head_size, requires_grad=True)
    heads, grad = x.transpose(1, 2), torch.randn(3, 5, 12, head_size)
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * (turns.unsqueeze(1) if by_row else turns)).flatten(-2)
    rotated = rotate(heads, *RoPE(config)(positions))
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (rotated, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_positions_above_256_stay_distinct_in_a_bf16_model():
    network = toys.base(block_size=1024).to(torch.bfloat16)
    x = torch.zeros(1, 1, 1024, 8, dtype=torch.bfloat16)
    x[..., 0::2] = 1
    rotated = rotate(x, *network.rope(slice(1024)))[0, 0]
    assert rotated.dtype == torch.bfloat16
    exact = rotate(x.float(), *RoPE(network.config)(slice(1024)))[0, 0]
    assert torch.equal(rotated, exact.bfloat16())  # the tables were not rounded
    assert len(rotated[256:].unique(dim=0)) == 1024 - 256
    # in the authors' fork positions were in bf16: above 256 they are even, above 512 multiples of 4
    assert len(torch.arange(256, 1024).bfloat16().unique()) < 260


def test_rms_norm_is_fp32_under_bf16():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(512, eps=1e-5).to(torch.bfloat16)
    norm.scale.data.copy_(1 + 0.3 * torch.randn(512, generator=generator))
    x = (3 * torch.randn(64, 512, generator=generator)).bfloat16()
    y = norm(x)
    expected = reference.norm(x.double(), norm.scale.double(), 1e-5).bfloat16()
    assert y.dtype == torch.bfloat16
    assert (y != expected).float().mean() < 1e-3  # a norm in bf16 gets a third of them wrong
    in_bf16 = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm.scale
    assert (in_bf16 != expected).float().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_matches_the_values_and_gradients_of_autograd(dtype):
    generator = torch.Generator().manual_seed(0)
    gate, x, grad = (3 * torch.randn(3, 7, 16, generator=generator).to(dtype) for _ in range(3))
    gate.requires_grad_(), x.requires_grad_()
    expected = F.silu(gate) * x
    ours = SwiGLU.apply(gate, x)
    assert torch.equal(ours, expected)
    gradients = (torch.autograd.grad(y, (gate, x), grad) for y in (ours, expected))
    assert all(torch.equal(g, e) for g, e in zip(*gradients, strict=True))


def test_swiglu_saves_only_its_two_inputs_for_the_backward_pass():
    gate, x = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        SwiGLU.apply(gate, x)
    assert saved == [gate.data_ptr(), x.data_ptr()]


def test_bf16_model_is_close_to_the_fp32_model():
    network = toys.base(n_kv_head=2)
    idx = toys.token_ids(2, 40)
    exact, rounded = network(idx), network.to(torch.bfloat16)(idx)
    assert rounded.dtype == torch.bfloat16
    assert (exact - rounded.float()).abs().mean() < 0.05 * exact.std()


def test_llama3_scaling_keeps_high_blends_middle_and_lowers_low_frequencies():
    config = LLaMAConfig.from_name("Llama-3.1-8B")
    scaled = rope_frequencies(config).double()
    plain = rope_frequencies(LLaMAConfig.from_name("Llama-3-8B")).double()
    torch.testing.assert_close(scaled, torch.tensor(reference.frequencies(config)).double(), rtol=1e-5, atol=0)
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8)
    assert ((ratio > 1.01) & (ratio < 7.9)).sum() == 6  # pairs with a wavelength between 8192/4 and 8192 tokens


# == Compilation ==


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_forward_pass_compiles_without_graph_breaks(method):
    variant = LLaMA if method is None else METHODS[method]
    network, idx = variant(variant.config_class(**toys.SIZES)), toys.token_ids(2, 12)
    toys.randomize(network)
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(idx), network(idx))
    compiled(idx).sum().backward()
    assert network.transformer.wte.weight.grad.norm() > 0
    torch.compiler.reset()


# == Memory ==


def test_gradient_checkpointing_gives_the_same_gradients():
    network, idx = toys.base(n_kv_head=2), toys.token_ids(2, 12)
    gradients = []
    for network.gradient_checkpointing in (False, True):
        network.zero_grad()
        network.label_logps(idx, idx).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    torch.testing.assert_close(*gradients)


# == Configuration ==

# published totals, from the model cards and the tensor shapes in the checkpoints
PARAMETERS = {
    "7B": 6_738_415_616,
    "13B": 13_015_864_320,
    "30B": 32_528_943_616,
    "65B": 65_285_660_672,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "TinyLlama-1.1B": 1_100_048_384,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,  # the output layer is tied to the embedding and counted once
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", sorted(llama_configs.keys() | PARAMETERS.keys()))
def test_named_models_have_their_published_size(name):
    with torch.device("meta"):
        network = LLaMA.from_name(name)
    count = sum(p.numel() for p in network.parameters())
    assert name == "microworld" or count == PARAMETERS[name]
    assert count < 7_000_000 or name != "microworld"


def test_mlp_width_and_padding_follow_from_the_other_sizes():
    config = LLaMAConfig(n_embd=4096, n_head=32, vocab_size=32001)
    assert (config.intermediate_size, config.padded_vocab_size, config.head_size) == (11008, 32064, 128)
    assert (config.n_kv_head, config.norm_eps) == (32, 1e-5)


def test_config_survives_a_round_trip_through_its_file(tmp_path):
    config = LLaMAConfig.from_name("Llama-3.2-1B")
    (tmp_path / "lit_config.json").write_text(config.to_json())
    assert LLaMAConfig.from_json(tmp_path / "lit_config.json") == config
    assert LLaMAConfig.from_json(tmp_path / "lit_config.json", n_layer=2).n_layer == 2


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (dict(n_embd=30), r"n_embd \(30\) is not a multiple of n_head \(4\)"),
        (dict(n_kv_head=3), r"n_head \(4\) is not a multiple of n_kv_head \(3\)"),
        (dict(padded_vocab_size=49), r"padded_vocab_size \(49\) is below vocab_size \(50\)"),
        (dict(head_size=7), r"head_size \(7\) is odd"),
        (dict(n_layer=0), "n_layer is 0; expected a whole number from 1 up to 1,024"),
        (dict(n_kv_head=0), "n_kv_head is 0"),
        (dict(n_layer="3"), 'n_layer is "3"; expected a whole number'),
        (dict(n_layer=10**7), "n_layer is 10000000; expected a whole number from 1 up to 1,024"),
        (dict(block_size=10**9), "block_size is 1000000000; expected"),
        (dict(block_size=2**20, head_size=2**14), r"block_size \(1,048,576\) × head_size \(16,384\) is above"),
        (dict(vocab_size=2**64), "vocab_size is 18446744073709551616; expected"),
        (dict(n_embd=None), "n_embd is null; expected"),
        (dict(n_embd=True), "n_embd is true; expected"),
        (dict(norm_eps=math.nan), "norm_eps is NaN; expected a number"),
        (dict(rope_base=0), "rope_base is 0; expected a number from 1"),
        (dict(tie_embeddings=1), "tie_embeddings is 1; expected true or false"),
        (dict(rope_scaling=[]), "rope_scaling is a list; expected an object or null"),
        (dict(rope_scaling=dict(rope_type=["linear"])), "rope_scaling: rope_type is a list; expected text or null"),
        (dict(rope_scaling=dict(rope_type="linear", factor="4")), 'factor is "4"; expected a number'),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "'yarn' is not supported, only llama3 and linear"),
        (dict(rope_scaling=dict(type="linear", factor=4.0)), "None is not supported"),
        (dict(rope_scaling=dict(rope_type="linear")), "'linear' lacks factor"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "lacks high_freq_factor, low_freq_factor, original"),
    ],
)
def test_impossible_configs_are_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        LLaMAConfig(**{**toys.SIZES, **overrides})


def test_a_folder_that_was_not_converted_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has Hugging Face's layout; convert it with scripts/convert_hf_checkpoint"):
        LLaMAConfig.from_json(tmp_path / "lit_config.json")


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "There is no model configuration at"),
        ("{", "is not JSON"),
        (json.dumps({"n_layer": 2, "hidden_size": 64}), r"it has \['hidden_size'\]"),
        (json.dumps({"n_layer": None}), r"lit_config\.json cannot be used: n_layer is null"),
        ("[1]", "holds a list; expected an object"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "lit_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        LLaMAConfig.from_json(path)


def test_error_for_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no model named '8B'; choose from 7B, 13B, .*SmolLM2-135M"):
        LLaMA.from_name("8B")


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="65 tokens is longer than the model's 64"):
        toys.base()(toys.token_ids(1, 65))


# == Loading ==


def test_state_dict_has_lit_llamas_names_and_nothing_else():
    names = {"transformer.wte.weight", "transformer.ln_f.scale", "lm_head.weight"}
    for layer in range(3):
        parts = ("rms_1.scale", "rms_2.scale", "attn.c_attn.weight", "attn.c_proj.weight",
                 "mlp.c_fc1.weight", "mlp.c_fc2.weight", "mlp.c_proj.weight")  # fmt: skip
        names |= {f"transformer.h.{layer}.{part}" for part in parts}
    network = toys.base()
    network(toys.token_ids(1, 4))  # a forward pass adds no cache or table to it
    assert set(network.state_dict()) == names


def left_over(state):
    state["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.ones(4)


def missing(state):
    del state["transformer.h.1.mlp.c_fc2.weight"]


def mis_shaped(state):
    state["transformer.ln_f.scale"] = torch.ones(31)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (left_over, "transformer.h.0.attn.rotary_emb.inv_freq does not belong to this model"),
        (missing, "transformer.h.1.mlp.c_fc2.weight is missing"),
        (mis_shaped, r"transformer.ln_f.scale is \(31,\), not \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(spoil, sentence):
    network, state = toys.base(seed=1), toys.base(seed=2).state_dict()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    spoil(state)
    with pytest.raises(UserError, match=sentence):
        network.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_long_lists_of_problems_are_truncated():
    with pytest.raises(UserError, match=r"\(and 20 more\)\.$"):
        toys.base().load_state_dict({"transformer.wte.weight": torch.ones(50, 32)})


def test_tied_model_accepts_an_output_layer_only_if_it_equals_the_embedding():
    network = toys.base(tie_embeddings=True)
    state = toys.base(seed=1, tie_embeddings=True).state_dict()
    network.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"].clone()})
    assert torch.equal(network.output_weight, state["transformer.wte.weight"])
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding"):
        network.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"] + 1})
