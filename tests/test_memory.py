"""Memory estimates compared with PyTorch's actual memory use on a CPU."""

import json

import pytest
import torch

from benchmarks.memory import EXACT, Case, measure
from lit_llama.config import LLaMAConfig
from lit_llama.kv_cache import KVCache
from lit_llama.memory import cache_bytes, generation_memory, training_memory
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA
from tests import toys

SCRIPT = "scripts/estimate_memory.py"
SMALL = dict(block_size=512, vocab_size=2048, n_layer=5, n_head=4, n_embd=256, intermediate_size=768)


def estimate_training(method: str = "aligner", **changes):
    cls = METHODS[method]
    method_config = {"adapter_prompt_length": changes.pop("length")} if "length" in changes else {}
    shape = dict(sequences=2, tokens=48, labels=40, dtype=torch.float32) | changes
    return training_memory(cls, cls.config_class(**SMALL, **method_config), **shape)


@pytest.mark.parametrize("case", [
    Case("SFT", sequences=8, config=SMALL),
    Case("LoRA", "lora", sequences=8, config={**SMALL, "qk_norm": True, "n_kv_head": 2}),
], ids=lambda case: case.label)  # fmt: skip
def test_the_measured_peak_is_close_to_the_estimate(case):
    assert case.estimate().activations > 5e7
    assert measure(case, **EXACT) == pytest.approx(case.estimate().total, rel=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_activations_saved_for_the_backward_pass_are_counted(method):
    """Tensors that autograd saves in a forward pass, each storage counted once, make up most of the estimate."""
    cls = METHODS[method]
    model = cls(cls.config_class(**SMALL)).train()
    toys.randomize(model)
    for name, p in model.named_parameters():
        p.requires_grad_(model.is_adapter_parameter(name))
    model_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model_storages |= {t.untyped_storage().data_ptr() for t in (model.rope.cos, model.rope.sin)}
    saved = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in model_storages:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    idx = toys.token_ids(4, 256, vocab_size=2048)
    labels = idx.clone()
    labels[:, :192] = -1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.label_logps(idx, labels).sum()
    estimate = estimate_training(method, sequences=4, tokens=256, labels=4 * 64).activations
    # the estimate also includes the logits of the labels (2 MB each) and temporary tensors of a layer
    assert 0.95 < estimate / sum(saved.values()) < 1.6
    assert loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_six_vectors_of_the_width_and_two_of_the_mlp_for_each_token(dtype):
    """Inputs of both norms and of SwiGLU, queries, keys, values, attention output, but not the output of c_attn."""
    shape = dict(sequences=4, tokens=256, labels=40, dtype=dtype)
    few, many = (training_memory(METHODS["aligner"], METHODS["aligner"].config_class(**{**SMALL, "n_layer": layers}),
                                 **shape).activations for layers in (5, 10))  # fmt: skip
    of_a_token = (6 * 256 + 2 * 768) * dtype.itemsize + 4 * (4 + 2)  # and the normalizers of four heads and two norms
    assert many - few == pytest.approx(5 * 4 * 256 * of_a_token, rel=0.01)


def test_larger_inputs_take_more_memory():
    plain = estimate_training()
    for more in (dict(sequences=4), dict(tokens=96), dict(length=100), dict(dtype=torch.float32, labels=80)):
        assert estimate_training(**more).total > plain.total
    assert (
        estimate_training(tokens=512, gradient_checkpointing=True).activations
        < 0.8 * estimate_training(tokens=512).activations
    )
    half = estimate_training(dtype=torch.bfloat16)
    assert half.base < plain.base and half.activations < plain.activations
    assert half.adapter == plain.adapter  # trainable parameters stay in fp32


@pytest.mark.parametrize("layers", [5, 10])
def test_the_mask_of_packed_rows_is_counted_once(layers):
    """Rows of 512 tokens have a mask of 1 MB each in fp32, which all layers share."""
    shape = dict(sequences=4, tokens=512, labels=40, dtype=torch.float32)
    config = METHODS["aligner"].config_class(**{**SMALL, "n_layer": layers})
    plain, packed = (training_memory(METHODS["aligner"], config, **shape, packed=value).activations
                     for value in (False, True))  # fmt: skip
    assert 4 * 2**20 <= packed - plain < 8 * 2**20


def test_weights_and_cache():
    config = LLaMAConfig(**SMALL, n_kv_head=2)
    estimate = generation_memory(LLaMA, config, rows=3, prompt=20, new=12, dtype=torch.bfloat16)
    model = LLaMA(config).bfloat16()
    tables = model.rope.cos.nbytes + model.rope.sin.nbytes
    assert estimate.base == sum(p.nbytes for p in model.parameters()) + tables
    cache = KVCache(config, 3, 32, torch.device("cpu"), torch.bfloat16)
    assert estimate.cache == cache_bytes(config, 3, 32, torch.bfloat16) == cache.k.nbytes + cache.v.nbytes
    assert estimate.adapter == 0


def test_answers_to_the_same_prompt_share_its_prefill():
    shape = dict(prompt=100, new=12, dtype=torch.float32)
    config = LLaMAConfig(**SMALL)
    one, many, shared = (generation_memory(LLaMA, config, rows=rows, distinct=distinct, **shape)
                         for rows, distinct in ((1, None), (16, None), (16, 1)))  # fmt: skip
    assert one.activations <= shared.activations < one.activations + 16 * 2048 * 3 * 4  # and the logits of 16 rows
    assert many.activations > 10 * shared.activations
    # the prompt's cache is copied to those of the answers
    assert shared.cache == many.cache + cache_bytes(config, 1, 100, torch.float32)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_quantized_weights(mode):
    pytest.importorskip("bitsandbytes")
    from lit_llama.quantize import projections, quantize_

    model = LLaMA(LLaMAConfig(**SMALL))
    shape = dict(rows=1, prompt=8, new=8, dtype=torch.float32)
    saved = generation_memory(LLaMA, model.config, **shape).base
    saved -= generation_memory(LLaMA, model.config, **shape, quantize=mode).base
    before = sum(layer.weight.nbytes for layer in projections(model).values())
    names = list(projections(model))
    quantize_(model, mode, torch.device("cpu"), torch.float32)
    after = 0
    for layer in map(model.get_submodule, names):
        state = layer.weight.quant_state
        after += layer.weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert saved == pytest.approx(before - after, rel=0.002)


def test_int8_layers_keep_their_inputs():
    """Those whose input depends on the adapter: from the output projection of its first layer on.

    They are attributes of nodes of the graph, which are freed with it, after the backward pass.
    """
    shape = dict(sequences=4, tokens=128, labels=4, dtype=torch.float32)
    config = METHODS["aligner"].config_class(**SMALL)
    int8, nf4 = (training_memory(METHODS["aligner"], config, **shape, quantize=mode).activations
                 for mode in ("int8", "nf4"))  # fmt: skip
    C, hidden = config.n_embd, config.intermediate_size
    layers = config.n_layer - config.adapter_start_layer
    numbers = layers * (3 * C + hidden) - C
    assert int8 - nf4 == 4 * 128 * numbers * 4
    checkpointed = [training_memory(METHODS["aligner"], config, **shape, quantize=mode, gradient_checkpointing=True)
                    for mode in ("int8", "nf4")]  # fmt: skip
    # checkpointing discards only what is saved for the backward pass with `save_for_backward`
    assert checkpointed[0].activations - checkpointed[1].activations == 4 * 128 * numbers * 4


# == scripts/estimate_memory.py ==


def estimate_rows(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("| SFT", "| DPO", "| generation"))]


def test_a_model_by_size_hub_name_folder_and_config(tmp_path, base_dir, run_script):
    code, by_size, err = run_script(SCRIPT, "--model", "SmolLM2-135M")
    assert code == 0, err
    assert "SmolLM2-135M: 134,515,008 parameters and 828 trainable ones (aligner)." in by_size  # 576 + 28 × 9
    assert len(estimate_rows(by_size)) == 3
    assert estimate_rows(run_script(SCRIPT, "--model", "HuggingFaceTB/SmolLM2-135M")[1]) == estimate_rows(by_size)
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert estimate_rows(run_script(SCRIPT, "--checkpoint_dir", path)[1]) == estimate_rows(by_size)
    code, out, err = run_script(SCRIPT, "--checkpoint_dir", base_dir)  # its context length is 64 tokens
    assert code == 0 and "4 × 64 tokens" in out and "prompts of 32 tokens and answers of 32 tokens" in out, err
    # next to 10 vectors
    code, out, err = run_script(SCRIPT, "--checkpoint_dir", base_dir, "--method", "prompt_tuning")
    assert code == 0 and "4 × 54 tokens" in out and "prompts of 27 tokens and answers of 27 tokens" in out, err
    assert len(estimate_rows(out)) == 3


def test_user_errors(tmp_path, refused):
    message = refused(SCRIPT, "--model", "org/Llama-9")
    assert message.startswith("'org/Llama-9' is not one of the models that --table lists; pass a folder")
    assert "holds neither lit_config.json nor config.json" in refused(SCRIPT, "--checkpoint_dir", tmp_path)
    assert "There is no method 'x'" in refused(SCRIPT, "--method", "x")
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma3ForCausalLM"]}')
    assert 'The architecture is "Gemma3ForCausalLM"' in refused(SCRIPT, "--checkpoint_dir", tmp_path)
