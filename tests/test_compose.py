import pytest
import torch
from toys import aligned, base, token_ids

from lit_llama.aligner import prefix_attention
from lit_llama.checkpoint import AdapterFile, load_model, save_adapter, save_base
from lit_llama.compose import load_composed
from lit_llama.generation import Sampling, gates_scaled, generate
from lit_llama.utils import UserError


def adapter(length: int, start: int, seed: int) -> AdapterFile:
    network = aligned(length, start, seed, n_kv_head=2)
    state = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    config = {"adapter_prompt_length": length, "adapter_start_layer": start}
    return AdapterFile(state, {"method": "aligner", "config": config}, f"adapter {seed}")


LATE, EARLY = adapter(3, 2, seed=1), adapter(1, 1, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, network = tmp_path_factory.mktemp("base"), base(n_kv_head=2)
    save_base(path, network.config, network.state_dict())
    return path


def with_terms(folder, weights: dict[int, float]):
    """The base, whose attention adds the terms of single-adapter models, computed by those models' own layers."""
    network = load_model(folder)
    for number, weight in weights.items():
        single = load_model(folder, (LATE, EARLY)[number])
        for own, other in zip(network.transformer.h, single.transformer.h, strict=True):
            if hasattr(other.attn, "gating_factor"):
                plain, attn = own.attn.attend, other.attn
                own.attn.attend = lambda q, k, v, mask, plain=plain, attn=attn, weight=weight: (
                    plain(q, k, v, mask) + weight * prefix_attention(q, *attn.constants(q.dtype))
                )
    return network


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 0.0)])
def test_contributions_add_up_in_each_layer(folder, strengths):
    idx = token_ids(2, 12)
    composed = load_composed(folder, [LATE, EARLY], list(strengths))
    expected = with_terms(folder, dict(enumerate(strengths)))(idx)
    torch.testing.assert_close(composed(idx), expected, atol=2e-5, rtol=1e-5)
    swapped = load_composed(folder, [EARLY, LATE], list(strengths[::-1]))
    torch.testing.assert_close(composed(idx), swapped(idx), atol=1e-5, rtol=1e-5)
    assert torch.equal(composed(idx), load_model(folder)(idx)) == (strengths == (0.0, 0.0))


def test_one_adapter_is_that_adapter(folder):
    idx = token_ids(2, 12)
    assert torch.equal(load_composed(folder, [LATE], [1.0])(idx), load_model(folder, LATE)(idx))


def test_one_strength_is_for_all_and_the_base_comes_back(folder):
    idx = token_ids(2, 12)
    composed = load_composed(folder, [LATE, EARLY], [0.5])
    assert torch.equal(composed(idx), load_composed(folder, [LATE, EARLY], [0.5, 0.5])(idx))
    with gates_scaled(composed, 0.0):
        assert torch.equal(composed(idx), load_model(folder)(idx))


def test_generation_with_its_cache_is_greedy_decoding_without_one(folder):
    composed = load_composed(folder, [LATE, EARLY], [1.0])
    prompt = token_ids(1, 5)[0].tolist()
    (cached,) = generate(composed, [prompt], Sampling(8))
    ids = list(prompt)
    for _ in range(8):
        ids.append(composed(torch.tensor([ids]))[0, -1].argmax().item())
    assert cached == ids[5:]


def test_numbers_that_do_not_match_and_foreign_adapters_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"There are 2 adapters and 3 strengths; give each its own\."):
        load_composed(folder, [LATE, EARLY], [1.0, 1.0, 1.0])
    wide = AdapterFile(
        {**LATE.state, "global_value_embedding.weight": torch.randn(3, 64)}, LATE.meta, tmp_path / "wide.safetensors"
    )
    save_adapter(wide.path, wide.state, wide.meta)
    with pytest.raises(UserError, match="is 64 wide"):
        load_composed(folder, [EARLY, wide], [1.0])


def test_only_aligners_add_up(folder):
    foreign = AdapterFile(EARLY.state, {**EARLY.meta, "method": "lora"}, "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors was made by the method 'lora'; only Aligners add up"):
        load_composed(folder, [LATE, foreign], [1.0])
