"""Log-probabilities of labels: values, gradients, memory."""

import pytest
import torch
import toys
from torch.nn import functional as F

from lit_llama import logps as logps_module
from lit_llama.logps import LabelLogps, token_logps


@pytest.mark.parametrize("trained", [False, True], ids=["frozen output layer", "trained"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_chunked_token_logps_match_a_direct_computation(count, trained, monkeypatch):
    monkeypatch.setattr(logps_module, "LOGP_CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(11, (count,), generator=generator)
    factors = torch.randn(count, generator=generator)
    results = []
    for function in (token_logps, lambda h, w, t: F.linear(h, w).log_softmax(-1).gather(1, t.unsqueeze(1))[:, 0]):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logps = function(h, w, targets)
        (logps * factors).sum().backward()
        results.append((logps, h.grad) + (w.grad,) * trained)
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, weight, targets), results[0][0])


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    kept = []
    hidden, weight = torch.randn(40, 4, requires_grad=True), torch.randn(1000, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        token_logps(hidden, weight, torch.arange(40)).sum()
    assert 0 < sum(kept) < 40 * 1000 / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_token_logps_are_fp32_and_their_gradient_is_as_accurate_as_the_dtype(dtype):
    hidden, weight, targets = torch.randn(4, 16).to(dtype), torch.randn(30, 16).to(dtype), torch.tensor([1, 2, 3, 4])
    logps = token_logps(hidden.requires_grad_(), weight, targets)
    (logps * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    direct = F.linear(exact, weight.double()).log_softmax(-1)[range(4), targets]
    (direct * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    assert logps.dtype == torch.float32 and hidden.grad.dtype == dtype
    rounded = F.linear(hidden, weight).double().log_softmax(-1)[range(4), targets]  # from logits in `dtype`
    torch.testing.assert_close(logps.double(), rounded, atol=1e-5, rtol=0)
    assert (hidden.grad - exact.grad).norm() < {torch.bfloat16: 0.02, torch.float32: 1e-6}[dtype] * exact.grad.norm()


def test_the_label_logps_module_returns_logits_without_labels():
    network, idx = toys.base(), toys.token_ids(2, 5)
    assert torch.equal(LabelLogps(network)(idx), network(idx))
    assert torch.equal(LabelLogps(network)(idx, idx), network.label_logps(idx, idx))
