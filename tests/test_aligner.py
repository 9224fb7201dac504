"""The Aligner compared with a plain reference implementation; its gradients, dtypes, and loading of weights."""

import copy

import pytest
import reference
import torch
import toys

from lit_llama import aligner
from lit_llama.compose import scaled_adapter
from lit_llama.generation import Sampling, generate
from lit_llama.utils import UserError

LENGTHS = (1, 3, 10)
each_architecture = pytest.mark.parametrize("architecture", toys.ARCHITECTURES)
each_length = pytest.mark.parametrize("length", LENGTHS)


def trainable(network) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def gradients(network, idx, labels=None) -> dict[str, torch.Tensor]:
    network.zero_grad()
    (-network.label_logps(idx, idx if labels is None else labels).sum()).backward()
    return {name: p.grad.clone() for name, p in trainable(network).items()}


# == Parity ==


@each_architecture
@each_length
def test_logits_loss_and_gradients_equal_the_reference(architecture, length):
    network = toys.aligned(length, **toys.ARCHITECTURES[architecture])
    idx = toys.token_ids(2, 9)
    labels = idx.clone()
    labels[0, :4] = labels[1, 6:] = -1

    state = reference.double(network.state_dict(), trainable=tuple(trainable(network)))
    expected = torch.stack([reference.logits(state, network.config, row) for row in idx.tolist()])
    torch.testing.assert_close(network(idx).double(), expected, atol=5e-5, rtol=5e-5)

    rows = zip(idx.tolist(), labels.tolist(), strict=True)
    loss = -sum(logp for row, row_labels in rows for logp in reference.logps(state, network.config, row, row_labels))
    loss.backward()
    torch.testing.assert_close(-network.label_logps(idx, labels).double().sum(), loss, atol=1e-4, rtol=1e-5)

    actual = gradients(network, idx, labels)
    assert set(actual) == {"global_value_embedding.weight"} | {f"transformer.h.{i}.attn.gating_factor" for i in (1, 2)}
    for name, gradient in actual.items():
        assert gradient.abs().min() > 0  # every value gets a gradient
        torch.testing.assert_close(gradient.double(), state[name].grad, atol=1e-4, rtol=1e-3)


@each_architecture
@each_length
def test_cached_greedy_decoding_equals_the_reference(architecture, length):
    network = toys.aligned(length, **toys.ARCHITECTURES[architecture])
    prompts = toys.prompts(3, 9, 1)
    state = reference.double(network.state_dict())
    expected = [reference.greedy(state, network.config, prompt, 6) for prompt in prompts]
    assert generate(network, prompts, Sampling(max_new_tokens=6)) == expected


def test_the_adapter_changes_the_logits_noticeably():
    # if the adapter's term were negligible, the parity tests would prove nothing
    network, idx = toys.aligned(), toys.token_ids(1, 12)
    open_gates = network(idx)
    for attn in toys.prefix_layers(network):
        attn.gating_factor.data.zero_()
    assert (open_gates - network(idx)).abs().mean() > 0.1 * open_gates.std()


@each_architecture
@each_length
def test_zero_gates_give_the_outputs_of_the_base_bit_for_bit(architecture, length):
    overrides = toys.ARCHITECTURES[architecture]
    base = toys.base(**overrides)
    network = aligner.LLaMA(toys.aligned(length, **overrides).config)  # gates are zero from the start
    network.load_state_dict(base.state_dict())
    idx = toys.token_ids(2, 20)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(network.to(dtype)(idx), base.to(dtype)(idx))
        sampling = Sampling(max_new_tokens=8, temperature=1.0)
        prompts = toys.prompts(4, 7)
        assert generate(network, prompts, sampling) == generate(base, prompts, sampling)


def test_layers_from_the_start_layer_on_have_gates_and_each_affects_only_its_head():
    network = toys.aligned(2, start=2, n_kv_head=2)
    assert [type(block.attn).__module__ for block in network.transformer.h] == [
        "lit_llama.model", "lit_llama.model", "lit_llama.aligner",
    ]  # fmt: skip
    attn = network.transformer.h[2].attn
    qk, v = attn.heads(torch.randn(1, 6, 32))
    q, k = qk.split((4, 2), dim=1)
    attn.gating_factor.data.zero_()
    before = attn.attend(q, k, v, None)
    attn.gating_factor.data[0, 1] = 0.5
    changed = (attn.attend(q, k, v, None) - before).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.tolist() == [False, True, False, False]


@each_architecture
def test_closed_form_of_one_token_equals_the_softmax_over_it(architecture):
    # two equal tokens share the softmax weight, so the general path must give the result of the closed form
    overrides = toys.ARCHITECTURES[architecture]
    one, two = toys.aligned(1, **overrides), toys.aligned(2, **overrides)
    state = one.state_dict()
    state["global_value_embedding.weight"] = state["global_value_embedding.weight"].repeat(2, 1)
    two.load_state_dict(state)
    idx = toys.token_ids(2, 15)
    torch.testing.assert_close(one(idx), two(idx), atol=2e-5, rtol=2e-5)
    g1, g2 = gradients(one, idx), gradients(two, idx)
    g2["global_value_embedding.weight"] = g2["global_value_embedding.weight"].sum(0, keepdim=True)
    torch.testing.assert_close(g1, g2, atol=2e-4, rtol=1e-3)


# == Gradients ==


def test_only_the_adapter_is_trained_and_the_base_gets_no_gradient():
    network, idx = toys.aligned(10), toys.token_ids(2, 9)
    assert sum(p.numel() for p in trainable(network).values()) == 10 * 32 + 2 * 4
    before = {name: t.clone() for name, t in network.state_dict().items()}
    gradients(network, idx)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
    torch.optim.AdamW(trainable(network).values(), lr=1e-2).step()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) != network.is_adapter_parameter(name), name


@each_length
def test_gradients_are_the_same_after_a_no_grad_forward_and_after_generation(length):
    network, idx = toys.aligned(length), toys.token_ids(2, 9)
    expected = gradients(network, idx)
    network.eval()
    with torch.no_grad():
        network(idx)
    network.train()
    torch.testing.assert_close(gradients(network, idx), expected)
    generate(network, toys.prompts(3, 5), Sampling(max_new_tokens=4))
    assert network.training
    torch.testing.assert_close(gradients(network, idx), expected)
    torch.testing.assert_close(gradients(network, idx), expected)  # a second backward pass works too


@each_length
def test_gradient_checkpointing_gives_the_same_gradients(length):
    network, idx = toys.aligned(length, n_kv_head=2), toys.token_ids(2, 9)
    expected = gradients(network, idx)
    network.gradient_checkpointing, calls = True, []
    network.transformer.h[-1].register_forward_pre_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(gradients(network, idx), expected)
    assert len(calls) == 2  # the backward pass computes the block again


def test_a_bf16_base_gives_fp32_gradients_near_the_exact_ones():
    network, idx = toys.aligned(3), toys.token_ids(4, 12)
    exact, rounded = gradients(network, idx), gradients(network.to(torch.bfloat16), idx)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99, name


# == Precision ==


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_casting_a_model_keeps_the_exact_fp32_values_of_prefix_and_gates(cast):
    network = toys.aligned(10)
    exact = {name: p.detach().clone() for name, p in trainable(network).items()}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in exact.values())
    parameters = trainable(network)
    network = cast(network)
    for name, parameter in trainable(network).items():
        assert parameter is parameters[name]  # an optimizer created before the cast still trains it
        assert parameter.dtype == torch.float32 and torch.equal(parameter, exact[name]), name


def test_small_steps_are_not_lost_under_bf16():
    # the authors' DPO run moved 6 of 4,096 values: in bf16 a step of 1e-4 on a value of 1 is rounded away
    network, idx = toys.aligned(3).to(torch.bfloat16), toys.token_ids(2, 9)
    before = {name: p.detach().clone() for name, p in trainable(network).items()}
    gradients(network, idx)
    optimizer = torch.optim.AdamW(trainable(network).values(), lr=7.5e-5)
    optimizer.step()
    for name, parameter in trainable(network).items():
        assert (parameter != before[name]).all(), name
        assert all(t.dtype == torch.float32 for t in optimizer.state[parameter].values())


# == Prefix keys and values are computed once per generation ==


@each_length
def test_a_prefix_edited_between_two_generations_changes_the_second(length):
    network, prompts, sampling = toys.aligned(length), toys.prompts(4, 6), Sampling(max_new_tokens=8)
    first = generate(network, prompts, sampling)
    assert generate(network, prompts, sampling) == first
    with torch.no_grad():
        network.global_value_embedding.weight.mul_(-3)
    second = generate(network, prompts, sampling)
    state = reference.double(network.state_dict())
    assert second == [reference.greedy(state, network.config, p, 8) for p in prompts]
    assert second != first


def test_nothing_is_cached_outside_generation():
    network = toys.aligned()
    with pytest.raises(ZeroDivisionError), network.inference():
        assert all(attn.cached is not None for attn in toys.prefix_layers(network))
        1 / 0  # noqa: B018
    assert all(attn.cached is None for attn in toys.prefix_layers(network))


def test_a_copied_model_uses_its_own_prefix():
    network, idx = toys.aligned(), toys.token_ids(1, 6)
    before = network(idx)
    twin = copy.deepcopy(network)
    twin.global_value_embedding.weight.data.zero_()
    assert torch.equal(network(idx), before) and not torch.equal(twin(idx), before)


@each_length
def test_strength_scales_the_gates_and_restores_them_afterwards(length):
    network, idx = toys.aligned(length, n_kv_head=2), toys.token_ids(2, 9)
    base = toys.base(n_kv_head=2)
    base.load_state_dict({n: t for n, t in network.state_dict().items() if not network.is_adapter_parameter(n)})
    trained = network(idx)
    with scaled_adapter(network, 0.0):
        assert torch.equal(network(idx), base(idx))
    with scaled_adapter(network, 1.0):
        assert torch.equal(network(idx), trained)
    with pytest.raises(ZeroDivisionError), scaled_adapter(network, 0.5):
        half = reference.logits(reference.double(network.state_dict()), network.config, idx[0].tolist())
        torch.testing.assert_close(network(idx)[0].double(), half, atol=5e-5, rtol=5e-5)
        assert not torch.allclose(network(idx), trained, atol=1e-2)
        1 / 0  # noqa: B018
    assert torch.equal(network(idx), trained)


# == Sizes, names, loading ==


@pytest.mark.parametrize(
    "name, length, count",
    [
        ("7B", 1, 5_056),
        ("7B", 10, 41_920),
        ("7B", 100, 410_560),
        ("7B", 300, 1_229_760),
        ("Llama-2-7B", 1, 5_056),
        ("13B", 1, 6_640),
        ("13B", 10, 52_720),
        ("Llama-3-8B", 1, 4_096 + 30 * 32),
    ],
)
def test_trainable_parameter_counts_match_the_paper(name, length, count):
    with torch.device("meta"):
        network = aligner.LLaMA.from_name(name, adapter_prompt_length=length)
    aligner.mark_only_adapter_as_trainable(network)
    state = toys.adapter_state(network)
    assert sum(p.numel() for p in trainable(network).values()) == sum(t.numel() for t in state.values()) == count
    assert set(state) == set(trainable(network))
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_fresh_adapter_has_closed_gates_and_a_standard_normal_prefix():
    torch.manual_seed(0)
    network = aligner.LLaMA(aligner.LLaMAConfig(**{**toys.SIZES, "n_embd": 256}, adapter_prompt_length=100))
    assert all((attn.gating_factor == 0).all() for attn in toys.prefix_layers(network))
    assert network.transformer.h[2].attn.gating_factor.shape == (1, 4, 1, 1)
    prefix = network.global_value_embedding.weight
    assert prefix.shape == (100, 256)
    assert abs(prefix.mean()) < 0.02 and abs(prefix.std() - 1) < 0.02


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (dict(adapter_prompt_length=0), "adapter_prompt_length is 0; it must be 1 or more"),
        (dict(adapter_start_layer=3), "adapter_start_layer is 3; it must be from 0 to 2"),
        (dict(adapter_start_layer=-1), "adapter_start_layer is -1"),
    ],
)
def test_invalid_adapter_configs_are_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        aligner.LLaMAConfig(**toys.SIZES, **overrides)


def test_base_and_adapter_load_separately_without_changing_each_other():
    network, idx = toys.aligned(seed=1), toys.token_ids(1, 8)
    expected = network(idx)
    state = network.state_dict()
    adapter = toys.adapter_state(network)
    other = toys.aligned(seed=2)
    other.load_state_dict({name: t for name, t in state.items() if name not in adapter})
    assert not torch.equal(other(idx), expected)
    other.load_state_dict(adapter)
    assert torch.equal(other(idx), expected)


def published_form(network) -> dict[str, torch.Tensor]:
    """Return the adapter as the authors save it: in bf16, with a copy of the prefix under each layer's name."""
    state = toys.adapter_state(network)
    state = {name: t.bfloat16() for name, t in state.items()}
    for name in [n for n in state if n.endswith("gating_factor")]:
        state[name.replace("gating_factor", "adapter_wte.weight")] = state["global_value_embedding.weight"].clone()
    return state


@pytest.mark.parametrize("assign", [False, True])
def test_alias_names_of_the_published_files_are_accepted(assign):
    state = published_form(toys.aligned(10, seed=1))
    assert len(state) == 1 + 2 * 2
    network = toys.aligned(10)
    names = list(state)
    network.load_state_dict(state, assign=assign)
    assert list(state) == names  # the caller's dict is unchanged
    for name, parameter in trainable(network).items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, state[name].float()), name
    assert not any("adapter_wte" in name for name in network.state_dict())


def differing_alias(state):
    state["transformer.h.2.attn.adapter_wte.weight"][3, 4] += 1


def aliases_without_the_prefix(state):
    del state["global_value_embedding.weight"]


def extra_gate(state):
    state["transformer.h.0.attn.gating_factor"] = torch.zeros(1, 4, 1, 1)


def missing_gate(state):
    del state["transformer.h.2.attn.gating_factor"]


def shorter_prefix(state):
    for name in [n for n in state if n.endswith("weight")]:
        state[name] = state[name][:9]


def scalar_gate(state):
    state["transformer.h.1.attn.gating_factor"] = torch.zeros(1)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (differing_alias, "transformer.h.2.attn.adapter_wte.weight is not the global prefix: .*LLaMA-Adapter"),
        (aliases_without_the_prefix, "adapter_wte.weight is not the global prefix"),
        (extra_gate, "transformer.h.0.attn.gating_factor does not belong to this model"),
        (missing_gate, "transformer.h.2.attn.gating_factor is missing"),
        (shorter_prefix, r"global_value_embedding.weight is \(9, 32\), not \(10, 32\)"),
        (scalar_gate, r"transformer.h.1.attn.gating_factor is \(1,\), not \(1, 4, 1, 1\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_nothing_is_loaded(spoil, sentence):
    state = published_form(toys.aligned(10, seed=1))
    spoil(state)
    network = toys.aligned(10)
    before = {name: p.detach().clone() for name, p in trainable(network).items()}
    with pytest.raises(UserError, match=sentence):
        network.load_state_dict(state)
    assert all(torch.equal(p, before[name]) for name, p in trainable(network).items())
