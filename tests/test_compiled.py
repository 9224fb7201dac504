"""Compiled layers match eager ones, without graph breaks; decoding steps keep their shapes and addresses."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import toys
from test_on_device import MODELS, sft_batch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lit_llama import lora
from lit_llama.compiled import compile_, eager_unless
from lit_llama.generation import Sampling, decode_one_token, generate, prefill
from lit_llama.kv_cache import KVCache
from lit_llama.logps import LabelLogps
from lit_llama.model import CausalSelfAttention, LLaMA
from lit_llama.packing import pack_answers
from lit_llama.utils import UserError
from lit_llama.variant import mark_only_adapter_as_trainable

# with N = 1 an Aligner adds its values without attention
METHODS = [
    kind for kind in MODELS if "bank" not in kind and (kind.endswith("3") or kind.startswith(("base", "aligner")))
]
TRAINED = ["aligner, N = 1", "lora, N = 3"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reset_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def with_inductor(kinds: list[str], one: str) -> list:
    """Return (kind, backend) parameters: all kinds with the eager backend, and one with Inductor."""
    return [(kind, "eager") for kind in kinds] + [(one, "inductor")]


@pytest.mark.parametrize("kind, backend", with_inductor(METHODS, "aligner, N = 3"))
def test_generation_gives_the_same_tokens(kind, backend):
    network = MODELS[kind]()
    # shapes of the first batch are compiled as constants, those of the second as symbols
    batches = [(toys.prompts(3, 9, 5), Sampling(6)), (toys.prompts(6, 6), Sampling(6, temperature=1.0, seed=3))]
    batches = batches[:1] if backend == "inductor" else batches
    expected = [generate(network, *batch) for batch in batches]
    compile_(network, "decoding", backend)
    assert [generate(network, *batch) for batch in batches] == expected
    assert all(len(set(map(tuple, answers))) > 1 for answers in expected)


@pytest.mark.parametrize("kind", METHODS)
@torch.inference_mode()
def test_a_step_with_a_static_cache_keeps_shapes_and_addresses_and_compiles_once(kind):
    network, lengths = MODELS[kind]().eval(), [3, 9, 5]
    compile_(network, "decoding", "eager")
    slots = network.n_virtual_tokens + 20
    cache = KVCache(network.config, 3, slots, CPU, torch.float32, static=True)
    masks, run_blocks = [], network.run_blocks

    def watched(x, cache, positions, segments=None):
        masks.append(cache.mask(positions).shape)
        assert {layer.update(*[torch.zeros(3, 2, 1, 8)] * 2)[0].shape for layer in cache.layers(positions)} == {
            (3, 2, slots, 8)
        }
        return run_blocks(x, cache, positions, segments)

    with network.inference(), eager_unless(network, "prefill"):
        logits = prefill(network, toys.prompts(*lengths), cache)
    buffers = cache.k.data_ptr(), cache.v.data_ptr()
    network.run_blocks = watched
    with network.inference():
        for i in range(4):
            positions = torch.tensor(lengths) + i
            if i == 1:
                torch.compiler.set_stance("fail_on_recompile")
            logits = decode_one_token(network, logits.argmax(-1), positions, cache)
    torch.compiler.set_stance("default")
    assert masks == [(3, 1, 1, slots)] * 4
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == buffers


@pytest.mark.parametrize("kind", METHODS)
@torch.inference_mode()
def test_a_decoding_step_is_one_graph(kind):
    network = MODELS[kind]().eval()
    prompts, tokens, positions = toys.prompts(4, 7), torch.tensor([5, 6]), torch.tensor([4, 7])
    caches = [KVCache(network.config, 2, 12 + network.n_virtual_tokens, CPU, torch.float32, static=True) for _ in "ab"]
    with network.inference():
        for cache in caches:
            prefill(network, prompts, cache)
        step = torch.compile(lambda t, p, c: network(t.unsqueeze(1), cache=c, positions=p.unsqueeze(1)),
                             fullgraph=True, backend="eager")  # fmt: skip
        compiled = step(tokens, positions, caches[0])[:, -1]
        assert torch.equal(compiled, decode_one_token(network, tokens, positions, caches[1]))
    assert torch.equal(caches[0].k, caches[1].k)


@pytest.mark.parametrize("kind", ["base, N = 1", "aligner, N = 1", "aligner, N = 3"])
@torch.inference_mode()
def test_a_step_with_a_static_cache_matches_a_growing_cache_and_can_be_repeated(kind):
    network, prompts = MODELS[kind]().eval(), toys.prompts(3, 9, 5)
    logits = []
    for static in (False, True):
        cache = KVCache(network.config, 3, 30, CPU, torch.float32, static=static)
        prefill(network, prompts, cache)
        step = torch.tensor([7, 8, 9]), torch.tensor([3, 9, 5]), cache
        first = decode_one_token(network, *step)
        if static:  # the warm-up of a CUDA graph repeats a step
            assert torch.equal(decode_one_token(network, *step), first)
        logits.append(first)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, backend", with_inductor(TRAINED, "aligner, N = 3"))
def test_training_gives_the_same_gradients(kind, backend):
    results = []
    for compiled in (False, True):
        network = MODELS[kind]()
        for name, p in network.named_parameters():
            p.requires_grad_(network.is_adapter_parameter(name))
        if compiled:
            compile_(network, "training", backend)
        losses = []
        # inductor compiles for the first length, then for any
        for length in (9, 12, 15) if backend == "inductor" else (9, 12):
            checkpointing = length == 12 and backend != "inductor"
            torch.manual_seed(0)  # for dropout
            idx = toys.token_ids(2, length, seed=length)
            network.gradient_checkpointing = checkpointing
            loss = -network.label_logps(idx, idx).mean()
            loss.backward()
            losses.append(loss.detach())
            if length == 12:  # compiling takes seconds
                with torch.no_grad():  # validation
                    losses.append(-network.label_logps(idx, idx).mean())
        for groups in ([([1, 2, 3], [[4, 5], [6]])], [([7], [[8, 9, 10]]), ([1, 2], [[3], [4], [5, 6]])]):  # RL
            rows = pack_answers(groups)
            loss = -network.label_logps(rows["idx"], rows["labels"], None, rows["segments"]).mean()
            loss.backward()
            losses.append(loss.detach())
        # generation does not use layers compiled for training
        answers = generate(network, toys.prompts(4, 6), Sampling(4))
        results.append((losses, [p.grad for p in network.parameters() if p.requires_grad], answers))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_ddp_does_not_split_layers():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    network = lora.LLaMA(lora.LLaMAConfig(**toys.SIZES, lora_r=2**13))  # 1 MiB in lora_B alone
    mark_only_adapter_as_trainable(network)
    compile_(network, "training", backend)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(LabelLogps(network))(*[toys.token_ids(2, 9)] * 2).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 2  # the input of the first layer has no gradient


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_training_does_not_change_how_other_models_compute_attention(backend):
    network = MODELS["aligner, N = 1"]()
    compile_(network, "training", backend)
    q = torch.randn(1, 2, 9, 8, requires_grad=True)

    def kernel() -> str:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn.name()

    before = kernel()
    network.label_logps(*[toys.token_ids(2, 9, seed=0)] * 2).mean().backward()
    assert kernel() == before == "ScaledDotProductFlashAttentionForCpuBackward0"


def test_generation_beside_layers_compiled_for_training_uses_the_fused_kernel(monkeypatch):
    network, backends = MODELS["aligner, N = 1"](), set()
    compile_(network, "training", "eager")
    attend = CausalSelfAttention.attend

    def watched(*args):
        backends.add(torch.backends.cuda.flash_sdp_enabled())
        return attend(*args)

    monkeypatch.setattr(CausalSelfAttention, "attend", watched)
    generate(network, toys.prompts(4, 6), Sampling(4))
    assert backends == {True}


def test_generation_does_not_use_layers_compiled_for_training(monkeypatch):
    network = MODELS["aligner, N = 3"]()

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    compile_(network, "training", refuse)
    assert generate(network, toys.prompts(4, 6), Sampling(4)) == generate(
        MODELS["aligner, N = 3"](), toys.prompts(4, 6), Sampling(4)
    )
    with pytest.raises(Exception, match="compiled"):
        network.label_logps(sft_batch()["idx"], sft_batch()["labels"])


def test_quantized_layers_are_refused():
    network = LLaMA(toys.base().config)
    network.transformer.h[0].mlp.c_fc1.weight = torch.nn.Parameter(torch.zeros(4, 4).byte(), requires_grad=False)
    with pytest.raises(UserError, match="--compile and --quantize cannot be combined"):
        compile_(network, "decoding")
