"""Baseline methods: comparison with explicit formulas, and runs of the shared scripts.

LoRA, BitFit and prompt tuning are each equivalent to a plain LLaMA with different weights, which the reference model
evaluates. All parameters are random: a method that adds nothing to the base would pass many of these tests.
"""

import importlib
import json
import math
import runpy
from pathlib import Path

import pytest
import reference
import torch
import toys

from lit_llama import adapter, adapter_v2, aligner, bitfit, generation, lora, prompt_tuning
from lit_llama.checkpoint import load_model, read_adapter, save_adapter
from lit_llama.compose import load_adapted, scaled_adapter
from lit_llama.generation import Sampling, generate
from lit_llama.huggingface.weights import to_hf
from lit_llama.methods import METHODS
from lit_llama.run.report import read_metrics
from lit_llama.settings import describe
from lit_llama.storage.tensor_files import LazyTensor
from lit_llama.utils import UserError
from scripts import merge_aligner

BASELINES = {"adapter": adapter, "adapter_v2": adapter_v2, "lora": lora, "bitfit": bitfit,
             "prompt_tuning": prompt_tuning}  # fmt: skip
OWN = {
    "adapter": dict(adapter_prompt_length=3, adapter_start_layer=1),
    "adapter_v2": dict(adapter_prompt_length=3, adapter_start_layer=1),
    "lora": dict(lora_r=4, lora_alpha=6, lora_dropout=0.0),
    "bitfit": {},
    "prompt_tuning": dict(prompt_length=3),
}
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj")
KEYS = {
    "adapter": [f"transformer.h.{i}.attn.{key}" for i in (1, 2) for key in ("adapter_wte.weight", "gating_factor")],
    "adapter_v2": [
        *(f"transformer.h.{i}.attn.{key}" for i in (1, 2) for key in ("adapter_wte.weight", "gating_factor")),
        *(
            f"transformer.h.{i}.{layer}.{key}"
            for i in range(3)
            for layer in LINEAR
            for key in ("adapter_bias", "adapter_scale")
        ),
        *(f"transformer.h.{i}.{norm}.adapter_scale" for i in range(3) for norm in ("rms_1", "rms_2")),
        "transformer.ln_f.adapter_scale",
        "lm_head.adapter_bias",
        "lm_head.adapter_scale",
    ],
    "lora": [f"transformer.h.{i}.attn.c_attn.{key}" for i in range(3) for key in ("lora_A", "lora_B")],
    "bitfit": [f"transformer.h.{i}.attn.adapter_bias" for i in range(3)],
    "prompt_tuning": ["prompt_embedding.weight"],
}
each_method = pytest.mark.parametrize("method", BASELINES)
each_architecture = pytest.mark.parametrize(
    "architecture",
    ["mha", "gqa", "tied", "biases", "narrow heads", "qk norm, biases", "nope"],
)


def adapted(method: str, seed: int = 0, **overrides):
    """Return a model of the method with a frozen base and random parameters."""
    module = BASELINES[method]
    network = module.LLaMA(module.LLaMAConfig(**{**toys.SIZES, **OWN[method], **overrides}))
    toys.randomize(network, seed)
    aligner.mark_only_adapter_as_trainable(network)
    return network


def trainable(network) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def reference_logits(method: str, state: reference.Tensors, config, ids: list[int]) -> torch.Tensor:
    """Return the method's logits, (T, V), computed with the reference model."""
    if method == "prompt_tuning":  # treat the vectors as tokens of a larger vocabulary
        V, P = config.padded_vocab_size, config.prompt_length
        larger = torch.cat((state["transformer.wte.weight"], state["prompt_embedding.weight"]))
        return reference.logits({**state, "transformer.wte.weight": larger}, config, [*range(V, V + P), *ids])[P:, :V]
    plain = dict(state)
    if method == "adapter_v2":  # fold scale and bias into the layer: s·(Wx + b + bias) = (sW)x + s(b + bias)
        for name in [name.removesuffix(".adapter_scale") for name in state if name.endswith(".adapter_scale")]:
            scale = state[f"{name}.adapter_scale"]
            if f"{name}.weight" in state:
                plain[f"{name}.weight"] = scale[:, None] * state[f"{name}.weight"]
                plain[f"{name}.bias"] = scale * (state.get(f"{name}.bias", 0) + state[f"{name}.adapter_bias"])
            else:
                plain[f"{name}.scale"] = scale * state[f"{name}.scale"]
        scores = reference.logits(plain, config, ids)
        return scores if config.tie_embeddings else scores + plain["lm_head.bias"]
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}.attn"
        if method == "bitfit":
            plain[f"{name}.c_proj.bias"] = state[f"{name}.adapter_bias"] + state.get(f"{name}.c_proj.bias", 0)
        if method == "lora":
            A, B, r = state[f"{name}.c_attn.lora_A"], state[f"{name}.c_attn.lora_B"], config.lora_r
            n_query, n_value = config.n_head * config.head_size, config.n_kv_head * config.head_size
            assert A.shape == (2 * r, config.n_embd) and B.shape == (n_query + n_value, r)
            rows = list(state[f"{name}.c_attn.weight"])
            for i in range(n_query):
                rows[i] = rows[i] + config.lora_alpha / r * torch.einsum("r,rc->c", B[i], A[:r])
            for i in range(n_value):
                update = torch.einsum("r,rc->c", B[n_query + i], A[r:])
                rows[n_query + n_value + i] = rows[n_query + n_value + i] + config.lora_alpha / r * update
            plain[f"{name}.c_attn.weight"] = torch.stack(rows)
    return reference.logits(plain, config, ids)


# == the methods ==


@each_architecture
@each_method
def test_logits_loss_and_gradients_equal_the_formulas(method, architecture):
    network = adapted(method, **toys.ARCHITECTURES[architecture])
    idx = toys.token_ids(2, 9)
    labels = idx.clone()
    labels[0, :4] = labels[1, 6:] = -1

    keys = list(KEYS[method])
    if method == "adapter_v2" and network.config.qk_norm:
        keys += [f"transformer.h.{i}.attn.{x}_norm.adapter_scale" for i in range(3) for x in "qk"]
    assert sorted(trainable(network)) == sorted(k for k in keys if k in network.state_dict())
    assert architecture == "tied" or len(trainable(network)) == len(keys)
    state = reference.double(network.state_dict(), trainable=tuple(trainable(network)))
    expected = torch.stack([reference_logits(method, state, network.config, row) for row in idx.tolist()])
    torch.testing.assert_close(network(idx).double(), expected, atol=1e-4, rtol=1e-4)

    targets = labels[:, 1:]
    loss = -sum(expected[b, t].log_softmax(-1)[targets[b, t]] for b, t in (targets != -1).nonzero().tolist())
    loss.backward()
    got = -network.label_logps(idx, labels).sum()
    torch.testing.assert_close(got.double(), loss, atol=1e-4, rtol=1e-5)
    got.backward()
    for name, p in network.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), state[name].grad, atol=1e-3, rtol=2e-3)
            assert p.grad.abs().min() > 0, name  # every element gets a gradient
        else:
            assert p.grad is None, name


@each_method
def test_padding_on_the_right_changes_nothing(method):
    network, idx = adapted(method, n_kv_head=2), toys.token_ids(1, 9)
    padded = torch.cat((idx, torch.zeros(1, 7, dtype=torch.long)), dim=1)
    torch.testing.assert_close(network(padded)[:, :9], network(idx), atol=1e-5, rtol=1e-5)


@each_architecture
@each_method
@pytest.mark.parametrize("group_tokens", [generation.GROUP_TOKENS, 1])
def test_cached_greedy_decoding_equals_the_formulas(method, architecture, group_tokens, monkeypatch):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)  # 1: a separate prefill for each length
    network = adapted(method, **toys.ARCHITECTURES[architecture])
    prompts, state = toys.prompts(3, 9, 1), reference.double(network.state_dict())
    expected = []
    for ids in prompts:
        sequence = list(ids)
        for _ in range(5):
            sequence.append(int(reference_logits(method, state, network.config, sequence)[-1].argmax()))
        expected.append(sequence[len(ids) :])
    assert generate(network, prompts, Sampling(max_new_tokens=5)) == expected


@each_method
def test_a_fresh_adapter_gives_the_logits_of_the_base_bit_for_bit(method, base_dir):
    idx = toys.token_ids(2, 20)
    for dtype in (torch.float32, torch.bfloat16):
        base = load_model(base_dir, dtype=dtype)
        torch.manual_seed(3)
        network = load_model(base_dir, method=method, dtype=dtype)
        assert torch.equal(network(idx), base(idx)) != (method == "prompt_tuning")
        torch.manual_seed(3)
        again = load_model(base_dir, method=method, dtype=dtype)
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), again.parameters(), strict=True))


def test_the_learned_prompt_starts_as_embeddings_of_tokens_in_the_vocabulary(base_dir):
    network = load_model(base_dir, method="prompt_tuning", method_config={"prompt_length": 20})
    wte = network.transformer.wte.weight[: network.config.vocab_size]
    same = (network.prompt_embedding.weight[:, None] == wte[None]).all(-1)  # (P, V)
    assert same.any(-1).all() and len(set(same.int().argmax(-1).tolist())) > 10


def test_lora_starts_with_random_A_and_zero_B():
    network = lora.LLaMA(lora.LLaMAConfig(**toys.SIZES))
    attn = network.transformer.h[0].attn.c_attn
    assert attn.lora_A.std() > 0.05 and not attn.lora_B.any()
    weight = attn.weight.clone()
    network.reset_adapter()
    assert torch.equal(attn.weight, weight)  # the frozen weight is not reinitialized


# == strength ==


@each_method
def test_strength_0_gives_the_base_and_strength_1_the_adapter_bit_for_bit(method, tmp_path, base_dir):
    network = load_model(base_dir, method=method, method_config=OWN[method])
    state = {name: torch.randn_like(p) for name, p in network.named_parameters() if network.is_adapter_parameter(name)}
    save_adapter(tmp_path / "a.safetensors", state, {"method": method, "config": OWN[method]})
    file, base, idx = read_adapter(tmp_path / "a.safetensors"), load_model(base_dir), toys.token_ids(2, 15)
    network.load_state_dict(state)
    trained, prompts, sampling = network(idx), toys.prompts(4, 7), Sampling(max_new_tokens=6, temperature=1.0)
    assert not torch.allclose(trained, base(idx), atol=0.1)
    with scaled_adapter(network, 0.0):
        assert torch.equal(network(idx), base(idx))
        assert generate(network, prompts, sampling) == generate(base, prompts, sampling)
    with scaled_adapter(network, 1.0):
        assert torch.equal(network(idx), trained)
    assert torch.equal(network(idx), trained)
    assert torch.equal(load_adapted(base_dir, [file], [0.0])(idx), base(idx))
    assert torch.equal(load_adapted(base_dir, [file], [1.0])(idx), trained)
    if method == "prompt_tuning":
        with pytest.raises(UserError, match=r"can only be used \(1\) or left out \(0\)"):
            load_adapted(base_dir, [file], [0.5])
    else:
        half = load_adapted(base_dir, [file], [0.5])(idx)
        assert not torch.allclose(half, trained, atol=0.1) and not torch.allclose(half, base(idx), atol=0.1)


# == individual methods ==


def test_llama_adapter_with_equal_prefixes_is_the_aligner():
    tied, free = toys.aligned(3, n_kv_head=2), adapted("adapter", n_kv_head=2)
    state = tied.state_dict()
    prefix = state.pop("global_value_embedding.weight")
    free.load_state_dict(state | {f"transformer.h.{i}.attn.adapter_wte.weight": prefix for i in (1, 2)})
    idx = toys.token_ids(2, 12)
    assert torch.equal(tied(idx), free(idx))


@each_architecture
def test_one_aligner_token_is_bitfit_with_tied_weights(architecture):
    overrides = toys.ARCHITECTURES[architecture]
    one, free = toys.aligned(1, start=1, **overrides), adapted("bitfit", **overrides)
    state, biases = one.state_dict(), {}
    prefix = state["global_value_embedding.weight"][0]
    for layer, block in enumerate(one.transformer.h):
        name, config = f"transformer.h.{layer}.attn", one.config
        biases[f"{name}.adapter_bias"] = torch.zeros(32)
        for head in range(config.n_head if layer >= 1 else 0):
            hs, group = config.head_size, head * config.n_kv_head // config.n_head
            first = (config.n_head + config.n_kv_head + group) * hs
            rows = slice(first, first + hs)
            value = block.attn.c_attn.weight[rows] @ prefix
            value = value + (0 if block.attn.c_attn.bias is None else block.attn.c_attn.bias[rows])
            gate = state[f"{name}.gating_factor"][0, head, 0, 0]
            columns = block.attn.c_proj.weight[:, head * hs : (head + 1) * hs]
            biases[f"{name}.adapter_bias"] = biases[f"{name}.adapter_bias"] + gate * (columns @ value)
    free.load_state_dict({k: t for k, t in state.items() if not one.is_adapter_parameter(k)})
    free.load_state_dict({k: t.detach() for k, t in biases.items()})
    idx = toys.token_ids(2, 15)
    torch.testing.assert_close(free(idx), one(idx), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["mha", "gqa", "biases"])
def test_merging_lora_keeps_the_logits_and_unmerging_restores_the_base(architecture, dtype):
    network, idx = adapted("lora", **toys.ARCHITECTURES[architecture]).to(dtype).eval(), toys.token_ids(2, 15)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    unmerged = network(idx)
    network.merge()
    network.merge()  # merging again changes nothing
    merged = network(idx)
    if dtype == torch.float32:
        torch.testing.assert_close(merged, unmerged, atol=5e-5, rtol=5e-5)
    changed = {name for name, t in network.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(3)}
    network.unmerge()
    network.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(network(idx), unmerged)


def test_lora_dropout_is_active_only_in_training():
    network, idx = adapted("lora", lora_dropout=0.5), toys.token_ids(2, 15)
    torch.manual_seed(0)
    first = network(idx)
    assert not torch.equal(network(idx), first)
    torch.manual_seed(0)
    assert torch.equal(network(idx), first)
    network.eval()
    assert torch.equal(network(idx), network(idx))
    torch.testing.assert_close(network(idx), adapted("lora")(idx))


def test_the_learned_prompt_takes_up_context():
    network = adapted("prompt_tuning", block_size=16)  # the prompt takes 3 positions
    assert network(toys.token_ids(1, 13)).shape == (1, 13, 50)
    with pytest.raises(UserError, match="A sequence of 14 tokens is longer than the model's 13"):
        network(toys.token_ids(1, 14))
    # both rows continue until the context is full
    new = generate(network, toys.prompts(3, 10), Sampling(max_new_tokens=50))
    assert [len(ids) for ids in new] == [10, 3]
    state = reference.double(network.state_dict())
    for prompt, ids in zip(toys.prompts(3, 10), new, strict=True):
        scores = reference_logits("prompt_tuning", state, network.config, prompt + ids[:-1])
        assert scores[len(prompt) - 1 :].argmax(-1).tolist() == ids
    with pytest.raises(UserError, match="13 tokens and the model's context 13: no room"):
        generate(network, toys.prompts(13), Sampling(max_new_tokens=1))


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("adapter", dict(adapter_prompt_length=0)),
        ("adapter", dict(adapter_start_layer=3)),
        ("lora", dict(lora_r=0)),
        ("lora", dict(lora_alpha=0)),
        ("lora", dict(lora_dropout=1.0)),
        ("prompt_tuning", dict(prompt_length=0)),
        ("prompt_tuning", dict(prompt_length=64)),
    ],
)
def test_settings_out_of_range_are_refused(method, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        BASELINES[method].LLaMAConfig(**{**toys.SIZES, **wrong})


# == sizes ==

# 7B: C = 4096, L = 32, nh = 32; 13B: C = 5120, L = 40, nh = 40; the start layer is 2
COUNTS = {
    "aligner": {"7B": 4096 + 30 * 32, "13B": 5120 + 38 * 40},
    "adapter": {"7B": 30 * (10 * 4096 + 32), "13B": 38 * (10 * 5120 + 40)},
    # the above, plus a bias and a scale for each of the 3C + C + 2·11008 (13B: 13824) + C outputs of a layer's
    # projections and each logit, and a scale for the two norms of each layer and the final norm
    "adapter_v2": {
        "7B": 30 * (10 * 4096 + 32) + 2 * (32 * (5 * 4096 + 2 * 11008) + 32000) + (2 * 32 + 1) * 4096,
        "13B": 38 * (10 * 5120 + 40) + 2 * (40 * (5 * 5120 + 2 * 13824) + 32000) + (2 * 40 + 1) * 5120,
    },
    "lora": {"7B": 32 * (16 * 4096 + 8192 * 8), "13B": 40 * (16 * 5120 + 10240 * 8)},
    "bitfit": {"7B": 32 * 4096, "13B": 40 * 5120},
    "prompt_tuning": {"7B": 10 * 4096, "13B": 10 * 5120},
}


@pytest.mark.parametrize("size", ["7B", "13B"])
@pytest.mark.parametrize("method", METHODS)
def test_parameter_counts(method, size):
    with torch.device("meta"):
        network = METHODS[method].from_name(size)
    count = sum(p.numel() for name, p in network.named_parameters() if network.is_adapter_parameter(name))
    assert count == COUNTS[method][size]
    published = {
        ("adapter", "7B"): 1_229_760,
        ("adapter_v2", "7B"): 4_279_744,
        ("lora", "7B"): 4_194_304,
        ("bitfit", "7B"): 131_072,
    }
    assert count == published.get((method, size), count)


def test_lora_parameter_count_with_fewer_value_heads_than_query_heads():
    # Llama-3-8B has 8 value heads and 32 query heads, so lora_B has 4096 + 1024 rows
    with torch.device("meta"):
        network = lora.LLaMA.from_name("Llama-3-8B")
    count = sum(p.numel() for name, p in network.named_parameters() if network.is_adapter_parameter(name))
    assert count == 32 * (16 * 4096 + 5120 * 8)


# == precision ==


@each_method
def test_adapter_parameters_and_gradients_stay_fp32_with_a_bf16_base(method):
    network, idx = adapted(method), toys.token_ids(4, 12)
    for p in trainable(network).values():
        p.data *= 0.5  # with updates far larger than the base weights, bf16 rounding errors would dominate
    exact = {name: p.detach().clone() for name, p in trainable(network).items()}
    parameters = trainable(network)
    (-network.label_logps(idx, idx).sum()).backward()
    exact_grads = {name: p.grad.clone() for name, p in trainable(network).items()}
    network.zero_grad()
    network.to(torch.bfloat16)
    assert network.transformer.h[0].attn.c_attn.weight.dtype == network.transformer.wte.weight.dtype == torch.bfloat16
    for name, p in trainable(network).items():
        assert p is parameters[name] and p.dtype == torch.float32 and torch.equal(p, exact[name]), name
    (-network.label_logps(idx, idx).sum()).backward()
    for name, p in trainable(network).items():
        assert p.grad.dtype == torch.float32
        assert torch.cosine_similarity(p.grad.flatten(), exact_grads[name].flatten(), dim=0) > 0.99, name


@each_method
def test_gradient_checkpointing_gives_the_same_gradients(method):
    network, idx = adapted(method, **({"lora_dropout": 0.3} if method == "lora" else {})), toys.token_ids(2, 9)
    gradients = []
    for network.gradient_checkpointing in (False, True):
        network.zero_grad()
        torch.manual_seed(0)
        (-network.label_logps(idx, idx).sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(network).items()})
    torch.testing.assert_close(*gradients)


# == files ==


@each_method
def test_a_saved_adapter_is_restored_from_its_header(method, tmp_path, base_dir):
    network = load_model(base_dir, method=method, method_config=OWN[method])
    state = {name: torch.randn_like(p) for name, p in network.named_parameters() if network.is_adapter_parameter(name)}
    network.load_state_dict(state)
    save_adapter(tmp_path / "a.safetensors", state, {"method": method, "config": OWN[method]})
    file = read_adapter(tmp_path / "a.safetensors")
    assert (file.method, file.config) == (method, OWN[method])
    idx = toys.token_ids(2, 12)
    assert torch.equal(load_model(base_dir, file).eval()(idx), network.eval()(idx))


@each_method
def test_method_and_settings_of_a_file_without_a_header_are_inferred(method, tmp_path):
    state = {name: p.detach() for name, p in trainable(adapted(method)).items()}
    torch.save(state, tmp_path / "a.pth")
    if method == "lora":
        with pytest.raises(UserError, match=r"a\.pth cannot be used: .* which is needed for lora_alpha"):
            read_adapter(tmp_path / "a.pth")
    else:
        file = read_adapter(tmp_path / "a.pth")
        assert (file.method, file.config) == (method, OWN[method])


# == scripts ==

SHORT = dict(max_steps=4, epochs=9, batch_size=8, micro_batch_size=4, warmup_epochs=0.2, eval_interval=2,
             save_interval=2, sample_prompts=1, max_new_tokens=4, accelerator="cpu")  # fmt: skip


def script_of(method: str):
    return importlib.import_module(f"finetune.{method}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_dir, data_dir) -> dict[str, Path]:
    """Train each method for a few steps and return the run folders by method."""
    folders = {}
    for method in BASELINES:
        script, folder = script_of(method), tmp_path_factory.mktemp("runs") / method
        config = {k: v for k, v in OWN[method].items() if k != "lora_dropout"}
        script.main(script.Settings(checkpoint_dir=base_dir, data_dir=data_dir, out_dir=folder, **SHORT, **config))
        folders[method] = folder
    return folders


@each_method
def test_a_run_reduces_the_loss_and_its_adapter_loads_with_the_base(method, runs, base_dir):
    summary = json.loads((runs[method] / "summary.json").read_text())
    assert summary["last_val_loss"] < summary["val_loss_before"]
    file = read_adapter(runs[method])
    assert file.method == method and sorted(file.state) == sorted(KEYS[method])
    assert summary["trainable_parameters"] == sum(t.numel() for t in file.state.values())
    load_model(base_dir, file)


@each_method
def test_a_resumed_run_gives_the_same_losses(method, runs, tmp_path, base_dir, data_dir, monkeypatch):
    """LoRA trains with dropout, whose masks change in every step."""
    script = script_of(method)
    settings = {**SHORT, **OWN[method], "checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "run"}
    settings.pop("lora_dropout", None)
    from lit_llama.train import Trainer

    step = Trainer.train_step

    def killed(trainer, micro_batches):
        if trainer.step == 3:
            raise RuntimeError("killed")
        return step(trainer, micro_batches)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Trainer, "train_step", killed)
        script.main(script.Settings(**settings))
    script.main(script.Settings(**settings, resume=True))
    uninterrupted, resumed = (read_metrics(folder / "metrics.csv") for folder in (runs[method], tmp_path / "run"))
    for name in ("train/loss", "val/loss"):
        assert {k: row[name] for k, row in resumed.items() if name in row} == {
            k: row[name] for k, row in uninterrupted.items() if name in row
        }


@each_method
def test_answers_are_compared_with_those_of_the_base(method, runs, run_script, refused, base_dir, capsys):
    flags = ("--checkpoint_dir", base_dir, "--prompt", "the cat", "--max_new_tokens", "4", "--accelerator", "cpu")
    script = "generate/aligner.py"
    code, out, _ = run_script(script, *flags, "--adapter", runs[method], "--compare_base")
    assert code == 0 and "base:" in out and "aligned:" in out
    if method != "adapter_v2":  # the others used to have their own scripts
        with pytest.raises(SystemExit, match=rf"^error: generate/{method}\.py is now generate/aligner\.py"):
            runpy.run_path(str(Path(__file__).parents[1] / f"generate/{method}.py"))
    assert "only Aligners add up" in refused(script, *flags, "--adapter", runs[method], runs[method])


@each_method
def test_microworld_evaluation_supports_every_method(method, tmp_path, run_script):
    base = Path(__file__).parents[1] / "checkpoints" / "microworld"
    network = load_model(base, method=method)
    state = {name: p.detach() for name, p in network.named_parameters() if network.is_adapter_parameter(name)}
    config = {"lora": {"lora_r": 8, "lora_alpha": 16}}.get(method, {})
    save_adapter(tmp_path / "a.safetensors", state, {"method": method, "config": config, "prompt_style": "alpaca"})
    flags = ("--adapter", tmp_path / "a.safetensors", "--strength", "0", "--questions", "4", "--groups", "unseen")
    code, out, _ = run_script("evaluate/microworld.py", *flags)
    assert code == 0 and out.splitlines()[1].split()[:2] == ["unseen", "4"]


def test_init_adapter_refuses_a_file_of_another_method(runs, refused, base_dir, data_dir, tmp_path):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "x")
    error = refused("finetune/aligner.py", *flags, "--init_adapter", runs["lora"])
    assert error.endswith("was trained with the method 'lora' and cannot initialize one of the method 'aligner'.")


def test_init_adapter_continues_training_with_the_settings_of_the_file(runs, tmp_path, base_dir, data_dir):
    script = script_of("lora")
    settings = {**SHORT, "checkpoint_dir": base_dir, "data_dir": data_dir, "max_steps": 1}
    script.main(script.Settings(**settings, init_adapter=runs["lora"], out_dir=tmp_path / "more"))
    assert read_adapter(tmp_path / "more").config["lora_r"] == OWN["lora"]["lora_r"]
    before = json.loads((runs["lora"] / "summary.json").read_text())["best_val_loss"]
    after = json.loads((tmp_path / "more/summary.json").read_text())["val_loss_before"]
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "precompute"),
    [*((method, True) for method in BASELINES), ("lora", False), ("prompt_tuning", False)],
)
def test_dpo_trains_every_method(method, precompute, runs, tmp_path, base_dir, preference_dir, run_script):
    """Before the first step, the DPO loss is ln 2 and the KL divergence 0, although LoRA trains with dropout."""
    config = {"lora_r": 4, "lora_dropout": 0.5} if method == "lora" else {}
    config |= {"prompt_length": 1} if method == "prompt_tuning" else {}  # the longest pair leaves no room for more
    flags = {"checkpoint_dir": base_dir, "data_dir": preference_dir, "out_dir": tmp_path / "run", "method": method,
             "method_config": json.dumps(config), "adapter_prompt_length": 3, "adapter_start_layer": 1, "max_steps": 2,
             "batch_size": 4, "micro_batch_size": 2, "eval_interval": 1, "sample_prompts": 1, "drift_prompts": 2,
             "max_new_tokens": 4, "accelerator": "cpu", "precompute_reference": str(precompute).lower()}  # fmt: skip
    code, out, err = run_script("finetune/alignerDPO.py", *(f"--{k}={v}" for k, v in flags.items()))
    assert code == 0, err
    assert "generate/aligner.py" in out
    file = read_adapter(tmp_path / "run/last.safetensors")
    assert file.method == method and sorted(file.state) == sorted(KEYS[method])
    assert config.items() <= file.config.items()
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    assert metrics[0]["val/dpo_loss"] == pytest.approx(0.693147, abs=1e-5) and metrics[0]["val/kl"] == 0


def test_the_reference_of_dpo_has_no_dropout(runs, tmp_path, base_dir, preference_dir):
    """Dropout changes a LoRA only if B is not 0, as after training."""
    script, losses = script_of("alignerDPO"), []
    for precompute in (True, False):
        settings = script.Settings(
            checkpoint_dir=base_dir, data_dir=preference_dir, out_dir=tmp_path / f"{precompute}", method="lora",
            method_config={"lora_dropout": 0.5}, init_adapter=runs["lora"], max_steps=2, batch_size=4,
            micro_batch_size=2, sample_prompts=0, drift_prompts=0, accelerator="cpu", precompute_reference=precompute,
        )  # fmt: skip
        script.main(settings)
        rows = read_metrics(settings.out_dir / "metrics.csv")
        losses.append([rows[step]["train/dpo_loss"] for step in (0, 1)])
    assert losses[0] == losses[1] and abs(losses[0][0] - math.log(2)) > 1e-4  # the policy has dropout


@each_method
def test_the_method_flag_equals_the_script_of_the_method(method, runs, tmp_path, base_dir, data_dir, run_script):
    config = {k: v for k, v in OWN[method].items() if k != "lora_dropout"}
    rate = script_of(method).Settings.learning_rate
    flags = {**SHORT, "checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "run", "method": method,
             "method_config": json.dumps(config), "learning_rate": rate}  # fmt: skip
    code, _, err = run_script("finetune/aligner.py", *(f"--{k}={v}" for k, v in flags.items()))
    assert code == 0, err
    by_flag, by_script = (read_adapter(folder / "last.safetensors") for folder in (tmp_path / "run", runs[method]))
    assert (by_flag.method, by_flag.config) == (by_script.method, by_script.config)
    assert all(torch.equal(by_flag.state[name], t) for name, t in by_script.state.items())


def test_unknown_methods_are_refused(refused, base_dir, data_dir, tmp_path):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "x", "--method", "lorra")
    error = refused("finetune/aligner.py", *flags)
    assert error == "There is no method 'lorra'; choose from aligner, adapter, adapter_v2, lora, bitfit, prompt_tuning."


def test_unknown_settings_of_a_method_are_refused(refused, base_dir, preference_dir, tmp_path):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", preference_dir, "--out_dir", tmp_path / "x")
    error = refused("finetune/alignerDPO.py", *flags, "--method", "lora", "--method_config", '{"rank": 8}')
    assert error.startswith("method_config: 'rank' is not a setting of the method 'lora'; it has lora_r, lora_alpha,")
    error = refused("finetune/alignerDPO.py", *flags, "--method", "bitfit", "--method_config", '{"rank": 8}')
    assert error.endswith("it has none.")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("architecture", ["mha", "gqa", "biases"])
def test_merging_into_a_plain_model_keeps_the_logits(method, architecture, tmp_path, tokenizer_path, run_script):
    from lit_llama.checkpoint import save_base
    from lit_llama.model import LLaMA, LLaMAConfig

    sizes = {**toys.SIZES, "vocab_size": 300, "padded_vocab_size": 300, **toys.ARCHITECTURES[architecture]}
    base, idx = LLaMA(LLaMAConfig(**sizes)), toys.token_ids(2, 20)
    toys.randomize(base)
    save_base(tmp_path / "base", base.config, base.state_dict())
    (tmp_path / "base/tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    network = load_model(tmp_path / "base", method=method, method_config=OWN[method])
    state = {
        name: 0.3 * torch.randn_like(p) for name, p in network.named_parameters() if network.is_adapter_parameter(name)
    }
    save_adapter(tmp_path / "a.safetensors", state, {"method": method, "config": OWN[method]})
    flags = ("--checkpoint_dir", tmp_path / "base", "--adapter", tmp_path / "a.safetensors", "--format", "lit")
    assert run_script("scripts/merge_aligner.py", *flags, "--output_dir", tmp_path / "merged")[0] == 0
    network.load_state_dict(state)
    assert not torch.allclose(network(idx), base(idx), atol=0.1)
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(idx), network.eval()(idx), atol=1e-4, rtol=1e-4)


def test_writing_the_format_of_hugging_face_computes_the_merged_weights_of_a_layer_once(monkeypatch):
    layers = []

    def count(attn, base, merge_layer=merge_aligner.merge_layer):
        layers.append(attn)
        return merge_layer(attn, base)

    monkeypatch.setattr(merge_aligner, "merge_layer", count)
    network = adapted("lora")
    base = {
        name: LazyTensor(tuple(t.shape), t.dtype, t.clone)
        for name, t in network.state_dict().items()
        if not network.is_adapter_parameter(name)
    }
    tensors, config = merge_aligner.merge(base, network, "c_attn.weight")
    written = {name: tensor.read() for name, tensor in to_hf(tensors, config).items()}
    assert layers == [block.attn for block in network.transformer.h]
    network.merge()
    for i, block in enumerate(network.transformer.h):
        value = written[f"model.layers.{i}.self_attn.v_proj.weight"]
        assert torch.equal(value, block.attn.c_attn.weight[-len(value) :])


@pytest.mark.parametrize("method", ["adapter", "adapter_v2", "prompt_tuning"])
def test_methods_that_a_plain_model_cannot_represent_are_not_merged(method, runs, refused, base_dir, tmp_path):
    flags = ("--checkpoint_dir", base_dir, "--adapter", runs[method], "--output_dir", tmp_path / "merged")
    assert "use this one with generate/aligner.py" in refused("scripts/merge_aligner.py", *flags)


@each_method
def test_inspection_reports_parameter_sizes_of_every_method(method, runs, run_script, refused, tmp_path):
    code, out, _ = run_script("scripts/inspect_aligner.py", runs[method])
    assert code == 0 and f"  {method}" in out
    assert out.splitlines()[-1].split()[0] == ("0" if method == "prompt_tuning" else "2")
    sizes = [float(word) for word in out.splitlines()[-1].split()[1:] if word != "-"]
    state = read_adapter(runs[method]).state
    last_layer = sorted((name, t) for name, t in state.items() if ".h.2." in name or method == "prompt_tuning")
    expected = [t.pow(2).mean().item() ** 0.5 for _, t in last_layer]
    assert sizes == pytest.approx(expected, abs=1e-6)
    assert "draws an Aligner's gates" in refused(
        "scripts/inspect_aligner.py", runs[method], "--plot", tmp_path / "a.png"
    )


def test_gates_biases_and_scales_have_no_weight_decay():
    from types import SimpleNamespace

    from lit_llama.run.setup import adamw

    config = SimpleNamespace(weight_decay=0.1)
    for method in BASELINES:
        network = adapted(method)
        optimizer = adamw(network, config)
        names = {id(p): name for name, p in network.named_parameters()}
        exempt = {
            names[id(p)] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
        }
        assert exempt == {key for key in KEYS[method] if key.endswith(("gating_factor", "bias", "adapter_scale"))}


# == inherited settings ==


def test_a_script_inherits_all_settings_except_those_of_the_aligner():
    parent = {s.name: s for s in describe(script_of("aligner").Settings)}
    for method, module in BASELINES.items():
        script = script_of(method)
        settings = describe(script.Settings)
        names = [s.name for s in settings]
        added = [f for f in module.LLaMAConfig.__dataclass_fields__
                 if f not in METHODS["aligner"].config_class.__mro__[1].__dataclass_fields__]  # fmt: skip
        aligner_settings = {"method", "method_config", "adapter_prompt_length", "adapter_start_layer"}
        assert script.Settings.method == method
        assert set(names) == set(parent) - aligner_settings | set(added)
        assert len(names) == len(set(names))
        if added:
            assert len({s.group for s in settings if s.name in added}) == 1
            assert not {s.group for s in settings if s.name in added} & {s.group for s in parent.values()}
        by_name = {s.name: s for s in settings}
        assert by_name["out_dir"].default == Path(f"out/{method}/microworld-pirate")
        assert by_name["batch_size"] == parent["batch_size"]
        defaults = module.LLaMAConfig()
        assert all(by_name[name].default == getattr(defaults, name) for name in added)


def test_a_bank_refuses_adapters_of_other_methods(refused, runs, base_dir):
    error = refused("generate/aligner.py", "--checkpoint_dir", base_dir, "--bank", runs["lora"], "--prompt", "the cat")
    assert error.endswith("was made by the method 'lora'; a bank holds Aligners.")
