import time

import pytest
import torch
from toys import aligned, base, prompts, token_ids

from lit_llama import generation
from lit_llama.aligner import prefix_attention
from lit_llama.bank import make_bank
from lit_llama.checkpoint import AdapterFile, load_model, save_adapter, save_base
from lit_llama.compose import as_sum, load_adapted, load_with_bank, parse_sum, scaled_adapter
from lit_llama.generation import Sampling, decode_one_token, generate, prefill
from lit_llama.kv_cache import KVCache, cache_dtype
from lit_llama.model import LLaMA
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
    """Return the base with the terms of single-adapter models added to its attention, computed by their layers."""
    network = load_model(folder)
    for number, weight in weights.items():
        single = load_model(folder, (LATE, EARLY)[number])
        for block, single_block in zip(network.transformer.h, single.transformer.h, strict=True):
            if hasattr(single_block.attn, "gating_factor"):
                plain, attn = block.attn.attend, single_block.attn
                block.attn.attend = lambda q, k, v, mask, plain=plain, attn=attn, weight=weight: (
                    plain(q, k, v, mask) + weight * prefix_attention(q, *attn.constants(q.dtype))
                )
    return network


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 0.0)])
def test_contributions_add_up_in_each_layer(folder, strengths):
    idx = token_ids(2, 12)
    composed = load_adapted(folder, [LATE, EARLY], list(strengths))
    expected = with_terms(folder, dict(enumerate(strengths)))(idx)
    torch.testing.assert_close(composed(idx), expected, atol=2e-5, rtol=1e-5)
    swapped = load_adapted(folder, [EARLY, LATE], list(strengths[::-1]))
    torch.testing.assert_close(composed(idx), swapped(idx), atol=1e-5, rtol=1e-5)
    assert torch.equal(composed(idx), load_model(folder)(idx)) == (strengths == (0.0, 0.0))


def test_a_sum_of_one_adapter_equals_that_adapter(folder):
    idx = token_ids(2, 12)
    assert torch.equal(load_adapted(folder, [LATE], [1.0])(idx), load_model(folder, LATE)(idx))


def test_one_strength_applies_to_all_adapters_and_0_gives_the_base(folder):
    idx = token_ids(2, 12)
    composed = load_adapted(folder, [LATE, EARLY], [0.5])
    assert torch.equal(composed(idx), load_adapted(folder, [LATE, EARLY], [0.5, 0.5])(idx))
    with scaled_adapter(composed, 0.0):
        assert torch.equal(composed(idx), load_model(folder)(idx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligners_of_one_token_are_merged_into_a_plain_model(folder, dtype):
    """The merged model has the adapters' constant terms as biases and runs no adapter code."""
    idx, adapters = token_ids(2, 12), [EARLY, adapter(1, 2, seed=3)]
    merged = load_adapted(folder, adapters, [0.5, 2.0], dtype=dtype)
    composed = load_adapted(folder, adapters, [0.5, 2.0], dtype=dtype, merge=False)
    assert type(merged) is LLaMA and type(composed) is not LLaMA
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(merged(idx), composed(idx), atol=tolerance, rtol=tolerance)
    assert torch.equal(load_adapted(folder, adapters, [0.0], dtype=dtype)(idx), load_model(folder, dtype=dtype)(idx))
    with pytest.raises(ValueError, match="no adapter that could be scaled"), scaled_adapter(merged, 0.0):
        raise AssertionError


# == A different sum for each row ==

SUMS = [
    "late",
    (("late", 0.5), ("early", 2.0)),
    None,
    (("late", 1.0), ("other", -1.0)),
    (("early", 1.0), ("single", 0.5), ("early", 0.25)),
    (("late", 0.5),),
    (("other", 0.0),),
]


@pytest.fixture(scope="module")
def bank(folder):
    adapters = {"late": LATE, "early": EARLY, "other": adapter(3, 1, seed=3), "single": adapter(1, 2, seed=4)}
    return make_bank(folder, list(adapters.items()))


def test_each_row_has_its_own_sum(folder, bank):
    model, idx = load_with_bank(folder, bank), token_ids(len(SUMS), 12)
    with model.using(SUMS):
        batched = model(idx)
        with scaled_adapter(model, 0.5):
            halved = model(idx)
        with scaled_adapter(model, 0.0):
            assert torch.equal(model(idx), load_model(folder)(idx))
        assert torch.equal(model(idx), batched)
    for row, terms in enumerate(SUMS):
        for scale, batch in ((1.0, batched), (0.5, halved)):
            names, strengths = zip(*as_sum(terms), strict=True) if as_sum(terms) else (["late"], [0.0])
            alone = load_adapted(folder, [bank.adapter(name) for name in names], [scale * s for s in strengths])
            torch.testing.assert_close(batch[row], alone(idx[row : row + 1])[0], atol=3e-5, rtol=1e-5)
    unadapted = load_model(folder)(idx)
    assert [row for row in range(len(SUMS)) if torch.equal(batched[row], unadapted[row])] == [2, 6]


def test_a_bf16_base_decodes_a_sum_for_each_row(folder, bank):
    """On a CPU, the attention of a decoding step is in fp32, and the terms of the rows are in bf16."""
    model, exact = load_with_bank(folder, bank, dtype=torch.bfloat16), load_with_bank(folder, bank)
    prompt_ids, next_ids = prompts(5, 20, 1, 9, 3, 14, 7), token_ids(len(SUMS), 3)
    cache = KVCache(model.config, len(SUMS), 24, torch.device("cpu"), cache_dtype(model.output_weight))
    with model.using(SUMS), exact.using(SUMS), model.inference():
        prefill(model, prompt_ids, cache)
        for step in range(3):
            positions = torch.tensor([len(prompt) + step for prompt in prompt_ids])
            logits = decode_one_token(model, next_ids[:, step], positions, cache)
        ids = [torch.tensor(prompt + next_ids[row].tolist()) for row, prompt in enumerate(prompt_ids)]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        expected = exact(padded)[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]
    assert (logits - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("group_tokens", [generation.GROUP_TOKENS, 1], ids=["one prefill", "a prefill for each length"])
def test_generation_with_a_sum_for_each_row(folder, bank, group_tokens, monkeypatch):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)
    model, prompt_ids, sampling = load_with_bank(folder, bank), prompts(5, 20, 1, 9, 3, 14, 7), Sampling(8, 1.0)
    lengths = [2, 8, 1, 4, 8, 1, 3]  # finished rows leave the batch
    with model.using(SUMS):
        batched = generate(model, prompt_ids, sampling)
        expected = [ids[:n] for ids, n in zip(batched, lengths, strict=True)]
        truncated = generate(model, prompt_ids, sampling, finished=lambda ids: ids in expected)
        assert generate(model, prompt_ids, sampling) == batched  # each row still has its sum
    assert truncated == expected
    for row, terms in enumerate(SUMS):
        alone = load_with_bank(folder, bank, terms, merge=row % 2 == 0)
        assert batched[row] == generate(alone, [prompt_ids[row]], sampling, rows=[row])[0]


def test_rows_share_a_prefill_only_if_their_sums_are_equal(folder, bank, monkeypatch):
    model, (prompt,), sampling = load_with_bank(folder, bank), prompts(9), Sampling(8, 1.0)
    prefilled, hidden = [], model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda idx, *rest: prefilled.append(len(idx) * (idx.size(1) > 1)) or hidden(idx, *rest)
    )
    with model.using(SUMS):
        batched = generate(model, [prompt] * len(SUMS), sampling)
    assert sum(prefilled) == len(set(map(as_sum, SUMS))) == len(SUMS) - 1
    for row, terms in enumerate(SUMS):
        alone = load_with_bank(folder, bank, terms)
        assert batched[row] == generate(alone, [prompt], sampling, rows=[row])[0]


def test_more_prompts_than_sums_are_refused(folder, bank):
    model = load_with_bank(folder, bank)
    with model.using(["late", "late", "early"]):
        for lengths in ((5, 5), (5, 9, 3, 4)):
            with pytest.raises(UserError, match=f"There are adapters for 3 rows, and the batch has {len(lengths)}."):
                generate(model, prompts(*lengths), Sampling(1))


def test_one_sum_applies_to_batches_of_any_size(folder, bank):
    model, idx = load_with_bank(folder, bank), token_ids(4, 9)
    terms = (("late", 0.5), ("early", 2.0), ("other", 1.0))
    model.use([terms])
    expected = model(idx)
    torch.testing.assert_close(model(idx[:3]), expected[:3], atol=2e-5, rtol=1e-5)
    with model.using([terms] * 4):
        assert torch.equal(model(idx), expected)
    with model.using([None]):
        assert torch.equal(model(idx), load_model(folder)(idx))
    assert torch.equal(model(idx), expected)


def test_sums_are_parsed_from_text(folder):
    one = adapter(1, 1, seed=1)
    bank = make_bank(folder, [(name, one) for name in ("pirate", "polite", "c++", "v:2", "2")])
    assert parse_sum("pirate", bank) == (("pirate", 1.0),)
    assert parse_sum("pirate:0.5+polite", bank) == (("pirate", 0.5), ("polite", 1.0))
    assert parse_sum("pirate:-1+base+2:1e-1", bank) == (("pirate", -1.0), ("2", 0.1))
    assert parse_sum("base", bank) == parse_sum("base:2", bank) == ()
    assert parse_sum("c++", bank) == (("c++", 1.0),) and parse_sum("c++:0.5", bank) == (("c++", 0.5),)
    assert parse_sum("v:2+pirate+v:2:3", bank) == (("v:2", 4.0), ("pirate", 1.0))
    for text, unknown in (("pirat:2", "pirat"), ("pirate:x", "pirate:x"), ("pirate:nan", "pirate:nan"), ("a+2", "a"),
                          ("", ""), ("pirate+", "")):  # fmt: skip
        with pytest.raises(UserError, match=f"no adapter named '{unknown}' among the 5"):
            parse_sum(text, bank)
    assert parse_sum("+".join(["pirate"] * 16), bank) == (("pirate", 16.0),)
    with pytest.raises(UserError, match=r"^The sum has 17 terms; use at most 16\.$"):
        parse_sum("+".join(["pirate"] * 17), bank)
    began = time.process_time()
    with pytest.raises(UserError, match="no adapter named"):
        parse_sum(f"pirate:{'1' * 9000}x", bank)
    assert time.process_time() - began < 1
    assert as_sum("pirate") == (("pirate", 1.0),) and as_sum(None) == () == as_sum([("pirate", 0.0)])


def test_generation_with_the_cache_equals_greedy_decoding_without_it(folder):
    composed = load_adapted(folder, [LATE, EARLY], [1.0])
    prompt = token_ids(1, 5)[0].tolist()
    (cached,) = generate(composed, [prompt], Sampling(8))
    ids = list(prompt)
    for _ in range(8):
        ids.append(composed(torch.tensor([ids]))[0, -1].argmax().item())
    assert cached == ids[5:]


def test_mismatched_strengths_and_adapters_of_another_width_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"There are 2 adapters and 3 strengths; give each its own\."):
        load_adapted(folder, [LATE, EARLY], [1.0, 1.0, 1.0])
    wide = AdapterFile(
        {**LATE.state, "global_value_embedding.weight": torch.randn(3, 64)}, LATE.meta, tmp_path / "wide.safetensors"
    )
    save_adapter(wide.path, wide.state, wide.meta)
    with pytest.raises(UserError, match="is 64 wide"):
        load_adapted(folder, [EARLY, wide], [1.0])


def test_only_aligners_can_be_summed(folder):
    lora = AdapterFile(EARLY.state, {**EARLY.meta, "method": "lora"}, "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors was made by the method 'lora'; only Aligners add up"):
        load_adapted(folder, [LATE, lora], [1.0])
