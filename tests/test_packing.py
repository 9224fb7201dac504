"""Several answers to a prompt in one row: layout, mask, and log-probabilities and gradients of separate rows."""

import pytest
import reference
import test_baselines
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llama.packing import pack_answers, packed_length, segment_mask

PROMPTS = [[3, 14, 15, 9], [2, 6], [5]]
ANSWERS = [[[26, 5, 35], [8], [9, 7]], [[9, 3, 2, 38, 46, 26], [43]], [[38, 32, 7]]]
GROUPS = list(zip(PROMPTS, ANSWERS, strict=True))


def test_the_layout_by_hand():
    packed = pack_answers([([1, 2, 3, 4], [[5, 6], [7, 8, 9]]), ([1], [[2], [3]])])
    assert packed["idx"].tolist() == [[1, 2, 3, 4, 5, 6, 4, 7, 8, 9], [1, 2, 1, 3, 0, 0, 0, 0, 0, 0]]
    assert packed["labels"].tolist() == [[-1, -1, -1, -1, 5, 6, -1, 7, 8, 9], [-1, 2, -1, 3, -1, -1, -1, -1, -1, -1]]
    assert packed["segments"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 4, 5, 6, 7, 8]]
    assert packed["label_index"].tolist() == [3, 4, 6, 7, 8, 10, 12]
    mask, positions = segment_mask(packed["segments"])
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6], [0, 1, 0, 1, 0, 0, 0, 0, 0, 0]]
    rows = ["".join("x" if attends else "." for attends in row) for row in mask[0, 0].tolist()]
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
    mask, positions = segment_mask(packed["segments"])
    seen = iter(index.tolist())
    for row, (prompt, answers) in enumerate(groups):
        for answer in answers:
            for n in range(len(answer)):
                row_of_label, t = divmod(next(seen), packed["idx"].size(1))
                assert row_of_label == row and positions[row, t] == len(prompt) - 1 + n
                assert packed["idx"][row, mask[row, 0, t]].tolist() == prompt + answer[:n]
    assert mask.any(-1).all()  # padding attends to something: a softmax over nothing is nan


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
def test_one_answer_in_a_row_has_the_logps_of_an_ordinary_row(method):
    network = test_baselines.adapted(method)
    idx = torch.tensor([PROMPTS[0] + ANSWERS[0][0]])
    labels = idx.clone()
    labels[:, : len(PROMPTS[0])] = -1
    packed = packed_logps(network, [(PROMPTS[0], ANSWERS[0][:1])])
    torch.testing.assert_close(packed, network.label_logps(idx, labels), atol=1e-4, rtol=1e-4)


def test_a_row_can_be_longer_than_the_context():
    """Only a prompt with one of its answers must fit: here 4 + 60 tokens into a context of 64."""
    network, prompt = toys.aligned(), PROMPTS[0]
    answers = toys.token_ids(5, 60).tolist()
    logps = packed_logps(network, [(prompt, answers)])
    alone = torch.cat([packed_logps(network, [(prompt, [answer])]) for answer in answers])
    torch.testing.assert_close(logps, alone, atol=1e-4, rtol=1e-4)
