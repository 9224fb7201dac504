"""Several answers to a prompt in one row: layout, mask, and log-probabilities and gradients of separate rows."""

import math
from collections import Counter

import pytest
import reference
import test_baselines
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama.packing import answers_per_row, pack_answers, packed_length, segment_mask

PROMPTS = [[3, 14, 15, 9], [2, 6], [5]]
ANSWERS = [[[26, 5, 35], [8], [9, 7]], [[9, 3, 2, 38, 46, 26], [43]], [[38, 32, 7]]]
GROUPS = list(zip(PROMPTS, ANSWERS, strict=True))


def test_the_layout_by_hand():
    packed = pack_answers([([1, 2, 3, 4], [[5, 6], [7, 8, 9]]), ([1], [[2], [3]])])
    assert packed["idx"].tolist() == [[1, 2, 3, 4, 5, 6, 4, 7, 8, 9], [1, 2, 1, 3, 0, 0, 0, 0, 0, 0]]
    assert packed["labels"].tolist() == [[-1, -1, -1, -1, 5, 6, -1, 7, 8, 9], [-1, 2, -1, 3, -1, -1, -1, -1, -1, -1]]
    assert packed["segments"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 4, 5, 6, 7, 8]]
    assert packed["label_index"].tolist() == [3, 4, 6, 7, 8, 10, 12]
    mask, positions = segment_mask(packed["segments"], torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and set(mask.unique().tolist()) == {0, -math.inf}
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6], [0, 1, 0, 1, 0, 0, 0, 0, 0, 0]]
    rows = ["".join("x" if score == 0 else "." for score in row) for row in mask[0, 0].tolist()]
    assert rows == [
        "x.........", "xx........", "xxx.......",
        "xxxx......", "xxxxx.....", "xxxxxx....",
        "xxx...x...", "xxx...xx..", "xxx...xxx.", "xxx...xxxx",
    ]  # fmt: skip


token_lists = st.lists(st.integers(0, 49), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(token_lists, st.lists(token_lists, min_size=1, max_size=4)), min_size=1, max_size=3))
def test_labels_are_the_answers_and_see_their_prompt(groups):
    packed = pack_answers(groups)
    assert packed["idx"].size(1) == max(packed_length(len(p), list(map(len, answers))) for p, answers in groups)
    index = packed["label_index"]
    targets = packed["labels"].flatten()[index + 1].tolist()
    assert targets == [token for _, answers in groups for answer in answers for token in answer]
    mask, positions = segment_mask(packed["segments"], torch.float32)
    attends = mask[:, 0] == 0
    seen = iter(index.tolist())
    for row, (prompt, answers) in enumerate(groups):
        for answer in answers:
            for n in range(len(answer)):
                row_of_label, t = divmod(next(seen), packed["idx"].size(1))
                assert row_of_label == row and positions[row, t] == len(prompt) - 1 + n
                assert packed["idx"][row, attends[row, t]].tolist() == prompt + answer[:n]
    assert attends.any(-1).all()  # padding attends to something: a softmax over nothing is nan


def packed_logps(network, groups) -> torch.Tensor:
    packed = pack_answers(groups)
    return network.label_logps(packed["idx"], packed["labels"], packed["label_index"], packed["segments"])


def gradients(network) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", toys.ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 3])
def test_logps_and_gradients_equal_the_reference(architecture, length):
    network = toys.aligned(length, **toys.ARCHITECTURES[architecture])
    trainable = tuple(name for name, p in network.named_parameters() if p.requires_grad)
    state = reference.double(network.state_dict(), trainable)
    rows = [(prompt, answer) for prompt, answers in GROUPS for answer in answers]
    expected = torch.stack([
        logp for prompt, answer in rows
        for logp in reference.logps(state, network.config, prompt + answer, [-1] * len(prompt) + answer)
    ])  # fmt: skip
    weights = torch.linspace(-1, 2, len(expected))  # as advantages do, to tell the answers apart
    (expected * weights).sum().backward()
    actual = packed_logps(network, GROUPS)
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    for name, gradient in gradients(network).items():
        assert gradient.abs().min() > 0
        torch.testing.assert_close(gradient.double(), state[name].grad, atol=5e-4, rtol=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", test_baselines.BASELINES)
def test_logps_and_gradients_equal_those_of_separate_rows(method, checkpointing):
    results, separate_rows = [], [(prompt, [answer]) for prompt, answers in GROUPS for answer in answers]
    for groups in (GROUPS, separate_rows):
        network = test_baselines.adapted(method, n_kv_head=2)
        network.gradient_checkpointing = checkpointing
        logps = packed_logps(network, groups)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        results.append((logps.detach(), gradients(network)))
    (packed, packed_gradients), (separate, separate_gradients) = results
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=1e-4)
    assert packed_gradients.keys() == separate_gradients.keys()
    for name, gradient in packed_gradients.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, separate_gradients[name], atol=5e-4, rtol=2e-3)


@pytest.mark.parametrize("method", test_baselines.BASELINES)
def test_a_row_can_be_longer_than_the_context(method):
    """Only a prompt with one of its answers must fit, here exactly. Their log-probabilities are those of plain rows."""
    packed, plain = (test_baselines.adapted(method) for _ in range(2))
    prompt = PROMPTS[0]
    answers = toys.token_ids(5, packed.max_tokens - len(prompt)).tolist()
    idx = torch.tensor([prompt + answer for answer in answers])
    labels = idx.clone()
    labels[:, : len(prompt)] = -1
    logps, expected = packed_logps(packed, [(prompt, answers)]), plain.label_logps(idx, labels)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-4)
    for x in (logps, expected):
        (x * torch.linspace(-1, 2, len(x))).sum().backward()
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], atol=5e-3, rtol=5e-3)


def test_bf16_differs_by_its_rounding_alone():
    network = toys.aligned()
    exact = packed_logps(network, GROUPS)
    rounded = packed_logps(network.bfloat16(), GROUPS)
    assert rounded.dtype == torch.float32 and network.global_value_embedding.weight.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.3
    (rounded * torch.linspace(-1, 2, len(rounded))).sum().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(network).values())


def test_the_mask_has_the_dtype_of_attention_under_autocast():
    network, dtypes = toys.aligned(), []
    for block in network.transformer.h:
        block.attn.attend = lambda q, k, v, mask: dtypes.append((q.dtype, mask.dtype)) or v
    with torch.autocast("cpu", torch.bfloat16):
        packed_logps(network, GROUPS)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


def test_all_layers_share_a_mask():
    network, sizes = toys.aligned(n_layer=5), Counter()
    T = pack_answers(GROUPS)["idx"].size(1)

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 4 and t.shape[-2:] == (T, T):
            sizes[t.untyped_storage().data_ptr()] += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        packed_logps(network, GROUPS)
    assert len(sizes) == 1 and sum(sizes.values()) > 2


@pytest.mark.parametrize(("prompt", "answer", "width", "most"), [
    (150, 300, 4096, 9),  # T ≤ 1.5 · 4096 · 150 / 300 = 3072 = 150 + 9 · 301 + 213
    (150, 1024, 4096, 1), (33, 20, 192, 21), (1, 500, 64, 1),
])  # fmt: skip
def test_a_row_is_limited_to_where_attention_costs_more_than_the_prompt(prompt, answer, width, most):
    assert answers_per_row(prompt, answer, 100, width) == math.ceil(100 / math.ceil(100 / most))
    assert answers_per_row(prompt, answer, 1, width) == 1


def test_answers_are_divided_evenly():
    assert answers_per_row(150, 300, 8, 4096) == 8
    assert answers_per_row(150, 300, 10, 4096) == 5  # not 9 and 1
