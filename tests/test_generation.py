"""Decoding: the cache, batches, sampling, stopping, streaming."""

import itertools
import math

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama import generation
from lit_llama.generation import (
    Sampling,
    answer,
    cut_at_stop,
    decode,
    decode_one_token,
    generate,
    instruct,
    length_groups,
    prefill,
    sample,
    stream,
)
from lit_llama.kv_cache import KVCache, cache_dtype
from lit_llama.prompts import PromptStyle
from lit_llama.utils import UserError

GREEDY = Sampling(max_new_tokens=10)
WARM = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
MODELS = {
    "base": lambda: toys.base(),
    "base, gqa": lambda: toys.base(n_kv_head=2),
    "one token": lambda: toys.aligned(1, n_kv_head=2),
    "ten tokens": lambda: toys.aligned(10, n_kv_head=2),
}
each_model = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(params=[generation.GROUP_TOKENS, 1], ids=["one prefill", "a prefill for each length"])
def grouping(request, monkeypatch):
    monkeypatch.setattr(generation, "GROUP_TOKENS", request.param)


def uncached(network, prompt: list[int], n_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(n_new):
        ids = torch.cat([ids, network(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


# == Cache and batches ==


@each_model
@pytest.mark.parametrize("lengths", [(2, 7, 5), (6, 6, 6)], ids=["uneven", "even"])
def test_cached_and_uncached_logits_are_equal_at_every_step(kind, lengths, grouping):
    network, prompts = MODELS[kind](), toys.prompts(*lengths)
    next_tokens = toys.token_ids(3, 6, seed=5)
    cache = KVCache(network.config, 3, 13, torch.device("cpu"), torch.float32)
    with network.inference():
        logits = prefill(network, prompts, cache)
        for step in range(7):
            for row, prompt in enumerate(prompts):
                sequence = torch.tensor([prompt + next_tokens[row, :step].tolist()])
                torch.testing.assert_close(logits[row], network(sequence)[0, -1], atol=2e-5, rtol=2e-5)
            if step < 6:
                positions = torch.tensor([len(p) + step for p in prompts])
                logits = decode_one_token(network, next_tokens[:, step], positions, cache)


def test_dropping_rows_of_the_cache_copies_them_within_its_buffers():
    cache = KVCache(toys.base().config, 4, 5, torch.device("cpu"), torch.float32)
    buffers = cache.k, cache.v
    for buffer in buffers:
        buffer.normal_()
    expected = [buffer[:, [1, 3]].clone() for buffer in buffers]
    cache.keep(torch.tensor([1, 3]))
    for kept, buffer, rows in zip((cache.k, cache.v), buffers, expected, strict=True):
        assert torch.equal(kept, rows) and kept.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    cache.length, new = 4, torch.randn(2, 2, cache.k.size(2), 1, cache.k.size(4))
    positions = torch.tensor([[2], [3]])
    for layer, rows in zip(cache.layers(positions), expected[0], strict=True):
        keys, _ = layer.update(*new)
        rows[[0, 1], :, positions.flatten()] = new[0, :, :, 0]
        assert torch.equal(keys, rows[:, :, :4])


def test_the_cache_is_not_less_precise_than_the_model():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert cache_dtype(torch.ones(1, dtype=dtype)) == expected
    assert cache_dtype(torch.ones(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


@each_model
def test_a_bf16_model_decodes_with_attention_in_fp32_on_a_cpu(kind, monkeypatch):
    caches, network, exact = [], MODELS[kind]().bfloat16(), MODELS[kind]().bfloat16().float()
    monkeypatch.setattr(generation, "KVCache", lambda *args, **kw: caches.append(KVCache(*args, **kw)) or caches[-1])
    prompts, logits = toys.prompts(2, 7, 5), []
    unembed = network.unembed
    monkeypatch.setattr(network, "unembed", lambda x: logits.append(unembed(x)) or logits[-1])
    tokens = generate(network, prompts, Sampling(2))
    assert {cache.k.dtype for cache in caches} == {torch.float32}
    for row, prompt in enumerate(prompts):
        expected = exact(torch.tensor([prompt + tokens[row][:1]]))[0, -1]
        assert (logits[-1][row, -1] - expected).norm() / expected.norm() < 0.03


@each_model
def test_cached_greedy_decoding_equals_uncached(kind):
    network, prompts = MODELS[kind](), toys.prompts(1, 20, 6)
    assert generate(network, prompts, GREEDY) == [uncached(network, p, 10) for p in prompts]


@each_model
@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(10, 0.8, top_k=5), Sampling(10, 1.3, top_p=0.7, seed=8)])
def test_a_batch_gives_the_same_tokens_as_one_prompt_at_a_time(kind, sampling, grouping):
    network, prompts = MODELS[kind](), toys.prompts(12, 1, 30, 7, 7)
    batched = generate(network, prompts, sampling)
    single = [generate(network, [prompt], sampling, rows=[row])[0] for row, prompt in enumerate(prompts)]
    assert batched == single
    assert [len(ids) for ids in batched] == [10] * 5


@each_model
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_several_answers_to_a_prompt_share_its_prefill(kind, sampling, grouping, monkeypatch):
    network, (a, b, c) = MODELS[kind](), toys.prompts(12, 5, 7)
    prompts, computed, hidden = [a, b, a, c, a, b], [], network.hidden
    monkeypatch.setattr(
        network, "hidden", lambda idx, *rest: computed.append(len(idx) * (idx.size(1) > 1)) or hidden(idx, *rest)
    )
    batched = generate(network, prompts, sampling)
    assert sum(computed) == 3  # rows over all prefills
    assert len(set(map(tuple, batched))) == (3 if sampling == GREEDY else 6)
    for row, prompt in enumerate(prompts):
        assert batched[row] == generate(network, [prompt], sampling, rows=[row])[0]


@each_model
@pytest.mark.parametrize("sampling", [Sampling(30), Sampling(30, 1.0, seed=3)], ids=["greedy", "sampled"])
def test_finished_rows_are_no_longer_computed(kind, sampling, grouping, monkeypatch):
    network, prompts = MODELS[kind](), toys.prompts(12, 1, 30, 7, 7, 3, 9, 20)
    options = {"finished": lambda ids: len(ids) >= 3 + ids[0] % 28}
    rows, forward = [], type(network).forward
    monkeypatch.setattr(
        type(network), "forward", lambda self, x, **given: rows.append(len(x)) or forward(self, x, **given)
    )
    batched = generate(network, prompts, sampling, **options)
    computed, lengths = rows[:], [len(ids) for ids in batched]
    assert len(set(lengths)) > 3 and len(computed) == max(lengths) - 1
    needed = [sum(n > step for n in lengths) for step in range(1, max(lengths))]  # rows that need another token
    assert all(need <= n and (n == need or n < 2 * need) for n, need in zip(computed, needed, strict=True))
    assert computed[0] == 8 and computed[-1] < 8
    for row, prompt in enumerate(prompts):
        assert batched[row] == generate(network, [prompt], sampling, rows=[row], **options)[0]


def test_a_full_context_in_one_row_does_not_truncate_the_others(grouping):
    network, prompts = toys.base(), toys.prompts(60, 5, 63, 50)
    sampling = Sampling(max_new_tokens=20, temperature=1.0)
    batched = generate(network, prompts, sampling)
    assert [len(ids) for ids in batched] == [4, 20, 1, 14]
    assert batched == [generate(network, [p], sampling, rows=[row])[0] for row, p in enumerate(prompts)]


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=80))
def test_length_groups_contain_every_row_once_with_little_padding(lengths):
    groups = length_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[row] for row in group]
        assert min(members) >= 0.75 * max(members) or len(members) * max(members) <= 256
    assert len(groups) <= 27  # each longest row is below 0.75 of the last group's: 2000 * 0.75 ** 27 < 1


def test_the_seed_determines_the_tokens():
    network, prompts = toys.base(), toys.prompts(5, 5)
    first = generate(network, prompts, WARM)
    torch.manual_seed(123)
    torch.rand(7)  # the global generator is neither used nor changed
    state = torch.get_rng_state()
    assert generate(network, prompts, WARM) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(network, prompts, Sampling(10, 1.0, seed=4)) != first
    same_prompt_twice = generate(network, [prompts[0]] * 2, WARM)
    assert same_prompt_twice[0] == first[0] != same_prompt_twice[1]


@each_model
def test_a_model_that_has_generated_can_be_trained(kind):
    expected, gradients = MODELS[kind](), []
    network = MODELS[kind]()
    generate(network, toys.prompts(4), GREEDY)
    for model in (network, expected):
        model.requires_grad_()
        (-model.label_logps(toys.token_ids(2, 9), toys.token_ids(2, 9)).mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_decoding_restores_the_models_mode_even_if_it_is_stopped_early():
    network = toys.aligned()
    network.train()
    steps = decode(network, toys.prompts(4), GREEDY)
    next(steps)
    assert not network.training and torch.is_grad_enabled()
    steps.close()
    assert network.training
    assert all(attn.cached is None for attn in toys.prefix_layers(network))
    network.eval()
    generate(network, toys.prompts(4), GREEDY)
    assert not network.training


def test_vocabulary_padding_is_never_sampled():
    network = toys.base(vocab_size=40, padded_vocab_size=64)
    network.lm_head.weight.data[40:] = 10 * network.lm_head.weight.data[:24]
    prompts = toys.prompts(*[4] * 20, vocab_size=40)
    for sampling in (GREEDY, WARM):
        assert max(itertools.chain(*generate(network, prompts, sampling))) < 40


# == Sampling ==

PROBS = torch.tensor([0.15, 0.5, 0.05, 0.3])  # unsorted


def sample_frequencies(sampling: Sampling, draws: int = 20_000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = sample(PROBS.log().expand(draws, -1), sampling, [generator] * draws)
    return (tokens.bincount(minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(temperature=1.0), [0.15, 0.5, 0.05, 0.3]),
        # temperature 0.5 squares the odds: 225 : 2500 : 25 : 900
        (dict(temperature=0.5), [225 / 3650, 2500 / 3650, 25 / 3650, 900 / 3650]),
        (dict(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_k=3), [15 / 95, 50 / 95, 0, 30 / 95]),
        (dict(temperature=1.0, top_k=9), [0.15, 0.5, 0.05, 0.3]),
        (dict(temperature=1.0, top_p=0.3), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_p=1e-300), [0, 1, 0, 0]),  # 0 in fp32
        (dict(temperature=1.0, top_p=0.6), [0, 5 / 8, 0, 3 / 8]),
        (dict(temperature=1.0, top_p=0.9), [15 / 95, 50 / 95, 0, 30 / 95]),
        # top_p applies after top_k, to 5/8 and 3/8
        (dict(temperature=1.0, top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
        (dict(temperature=1e-40), [0, 1, 0, 0]),
        (dict(temperature=0.0, top_k=2, top_p=0.1), [0, 1, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(options, expected):
    for frequency, probability in zip(sample_frequencies(Sampling(**options)), expected, strict=True):
        margin = 4.5 * math.sqrt(probability * (1 - probability) / 20_000)
        assert abs(frequency - probability) <= margin
        assert (frequency == 0) == (probability == 0)


def test_top_p_applies_to_each_row_separately():
    logits = torch.stack([PROBS.log(), PROBS.flip(0).log()]).repeat(500, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(1000)]
    tokens = sample(logits, Sampling(temperature=1.0, top_p=0.6), generators)
    assert set(tokens[0::2].tolist()) == {1, 3} and set(tokens[1::2].tolist()) == {2, 0}


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
    st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_samples_are_always_among_the_most_likely_tokens(logits, temperature, top_k, top_p, seed):
    scores = torch.tensor([logits])
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    token = int(sample(scores, sampling, [torch.Generator().manual_seed(seed)]))
    probs = (scores[0] / temperature).softmax(-1)
    more_likely = probs > probs[token]
    assert more_likely.sum() < (top_k or len(logits))
    assert probs[more_likely].sum() <= top_p + 1e-5
    assert probs[token] > 0


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be 1 or more"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0; it must be above 0"),
        (dict(top_p=1.1), "top_p is 1.1; it must be at most 1"),
    ],
)
def test_invalid_settings_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**options)


# == Stopping ==


def test_stop_ids_end_only_their_row_and_are_not_returned():
    network, prompts = toys.base(), toys.prompts(3, 8, 5)
    full = generate(network, prompts, WARM)
    stop = full[0][4]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in full]
    assert len(expected[0]) <= 4 and any(len(ids) == 10 for ids in expected)
    assert generate(network, prompts, WARM, stop_ids=(stop,)) == expected


def test_an_immediate_stop_id_gives_an_empty_answer():
    network, prompts = toys.base(), toys.prompts(6)
    first = generate(network, prompts, GREEDY)[0][0]
    assert generate(network, prompts, GREEDY, stop_ids=(first,)) == [[]]


def test_finished_receives_the_tokens_so_far():
    network, prompts = toys.base(), toys.prompts(4, 7)
    full = generate(network, prompts, GREEDY)
    assert generate(network, prompts, GREEDY, finished=lambda ids: len(ids) == 3) == [ids[:3] for ids in full]


def test_decoding_ends_with_the_last_running_row():
    network, calls = toys.base(), []
    hidden = network.hidden
    network.hidden = lambda *args, **kwargs: calls.append(1) or hidden(*args, **kwargs)
    generate(network, toys.prompts(4, 7), GREEDY, finished=lambda ids: len(ids) == 3)
    assert len(calls) == 3  # a prefill and two decoding steps; the third token is the last


@pytest.mark.parametrize(
    "lengths, sentence",
    [
        ((64,), "The prompt has 64 tokens and the model's context 64: no room for an answer"),
        ((5, 80, 3), "Prompt 2 of 3 has 80 tokens"),
        ((0,), "The prompt has no tokens"),
        ((3, 0), "Prompt 2 of 2 has no tokens"),
    ],
)
def test_empty_and_too_long_prompts_are_refused(lengths, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(toys.base(), toys.prompts(*lengths), GREEDY)


# == Text ==


@pytest.fixture(scope="module")
def speaker(tokenizer):
    """A model that generates random pieces and bytes, often incomplete characters."""
    return toys.aligned(3, vocab_size=tokenizer.vocab_size, padded_vocab_size=320)


PROMPTS = ["the cat", "a dog ran to the hat on the mat", "say", "it sat"]


def test_answers_are_in_the_order_of_the_prompts_at_any_batch_size(speaker, tokenizer):
    sampling = Sampling(max_new_tokens=15, temperature=1.0)
    answers = answer(speaker, tokenizer, PROMPTS, sampling)
    assert len(set(answers)) == 4
    for batch_size in (1, 2, 3):
        assert answer(speaker, tokenizer, PROMPTS, sampling, batch_size=batch_size) == answers


def test_the_longest_prompts_are_answered_first(speaker, tokenizer, monkeypatch):
    """If a batch is too large for the memory, no answers are lost."""
    batches = []

    def record(model, prompts, *args):
        batches.append(max(map(len, prompts)))
        return generate(model, prompts, *args)

    monkeypatch.setattr(generation, "generate", record)
    answer(speaker, tokenizer, PROMPTS, GREEDY, batch_size=1)
    assert len(set(batches)) > 2 and batches == sorted(batches, reverse=True)


@pytest.mark.parametrize("seed", range(12))
def test_streamed_pieces_join_to_the_answer(speaker, tokenizer, seed):
    sampling = Sampling(max_new_tokens=40, temperature=1.5, seed=seed)
    pieces = list(stream(speaker, tokenizer, PROMPTS[0], sampling))
    assert "".join(pieces) == answer(speaker, tokenizer, PROMPTS[:1], sampling)[0]
    assert len(pieces) > 1 and all(pieces)


@pytest.mark.parametrize("seed", range(12))
def test_stop_texts_truncate_streams_and_answers_at_the_same_place(speaker, tokenizer, seed):
    sampling = Sampling(max_new_tokens=40, temperature=1.5, seed=seed)
    full = "".join(stream(speaker, tokenizer, PROMPTS[0], sampling))
    middle = len(full) // 2
    for stop in ((full[middle : middle + 3],), (full[-2:], full[middle : middle + 4]), ("never said",)):
        expected = cut_at_stop(full, stop)[0].strip()
        assert "".join(stream(speaker, tokenizer, PROMPTS[0], sampling, stop)) == expected
        assert answer(speaker, tokenizer, PROMPTS[:1], sampling, stop) == [expected]


def test_a_stream_never_yields_part_of_a_stop_text_or_character():
    class ByteTokenizer:
        """A tokenizer with one token per byte."""

        stop_ids = ()

        def encode(self, text, bos=False):
            return [1]

        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    text = " né## ok \n### Inst".encode()
    network = toys.base(vocab_size=256, padded_vocab_size=256)
    network.hidden = lambda idx, cache, positions=None: scripted_logits(text, positions)
    network.unembed = lambda x: x
    pieces = list(stream(network, ByteTokenizer(), "", Sampling(max_new_tokens=len(text)), stop=("### Inst",)))
    assert pieces == ["n", "é", "##", " o", "k"]


def scripted_logits(text, positions):
    """Return logits that select the next byte of `text`; the prompt has one token."""
    index = 0 if positions is None else int(positions)
    logits = torch.zeros(1, 1, 256)
    logits[0, 0, text[index]] = 1
    return logits


def test_cut_at_stop_cuts_before_the_first_stop_text():
    assert cut_at_stop("abc def ghi", ("ghi", "def")) == ("abc ", True)
    assert cut_at_stop("abc", ("x",)) == ("abc", False)
    assert cut_at_stop("abc", ()) == ("abc", False)


def test_a_too_long_prompt_is_refused_before_any_answer_is_generated(speaker, tokenizer):
    calls = []
    handle = speaker.transformer.wte.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=r"Prompt 2 of 3 has \d+ tokens and the model's context 64"):
        answer(speaker, tokenizer, ["the cat", "sat " * 80, "on"], GREEDY, batch_size=1)
    with pytest.raises(UserError, match="The prompt has"):
        list(stream(speaker, tokenizer, "sat " * 80, GREEDY))
    handle.remove()
    assert not calls


def test_instruct_uses_the_template_and_stop_texts_of_the_style(speaker, tokenizer):
    style = PromptStyle("toy", "the {instruction} sat")
    full = answer(speaker, tokenizer, ["the cat sat"], WARM)[0]
    assert instruct(speaker, tokenizer, ["cat"], style, WARM) == [full]
    stopping = PromptStyle("toy", "the {instruction} sat", stop=(full[3:5],))
    assert instruct(speaker, tokenizer, ["cat"], stopping, WARM) == [cut_at_stop(full, (full[3:5],))[0].strip()]
