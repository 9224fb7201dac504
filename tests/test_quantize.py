"""A quantized base. bitsandbytes is optional: tests that need it are skipped if it is not installed."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import toys
from lightning.fabric import Fabric
from torch.nn import functional as F

import finetune.aligner
import finetune.alignerDPO
from lit_llama import adapter_v2, aligner, lora
from lit_llama.checkpoint import TOKENIZER_NAME, AdapterFile, load_model, read_adapter, save_adapter, save_base
from lit_llama.compose import load_adapted
from lit_llama.data import PreferenceData
from lit_llama.generation import Sampling, generate
from lit_llama.quantize import check_quantize, projections
from lit_llama.reference import reference_key
from lit_llama.settings import Quantize
from lit_llama.utils import UserError

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
MODES = get_args(Quantize)
OWN = {"adapter_prompt_length": 2, "adapter_start_layer": 1}
SHORT = dict(max_steps=3, batch_size=4, micro_batch_size=4, learning_rate=0.1, warmup_epochs=0, adapter_start_layer=1,
             sample_prompts=1, max_new_tokens=4, accelerator="cpu")  # fmt: skip


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory, tokenizer_path) -> Path:
    """Return a base whose rows are multiples of 64, the block size; norms and biases are random too."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {**toys.SIZES, **dict(vocab_size=300, padded_vocab_size=300, n_embd=64, intermediate_size=128, n_kv_head=2)}
    network = toys.base(**sizes, qkv_bias=True)
    save_base(folder, network.config, network.state_dict())
    shutil.copy(tokenizer_path, folder / TOKENIZER_NAME)
    return folder


def adapter(seed: int = 0) -> AdapterFile:
    """Return an Aligner with two prefix tokens and open gates for the base in `wide_dir`."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"transformer.h.{i}.attn.gating_factor": torch.randn(1, 4, 1, 1, generator=generator) for i in (1, 2)}
    return AdapterFile(
        state | {"global_value_embedding.weight": torch.randn(2, 64, generator=generator)}, {"config": OWN}
    )


@pytest.mark.parametrize("script", ["generate/base.py", "generate/aligner.py", "finetune/aligner.py"])
def test_without_bitsandbytes_the_error_says_what_to_install(
    script, refused, wide_dir, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # its import fails, installed or not
    save_adapter(tmp_path / "adapter.safetensors", adapter().state, {"config": OWN})
    flags = {
        "generate/base.py": [],
        "generate/aligner.py": ["--adapter", tmp_path / "adapter.safetensors"],
        "finetune/aligner.py": ["--data_dir", data_dir, "--out_dir", tmp_path / "run", "--accelerator", "cpu"],
    }[script]
    message = refused(script, "--checkpoint_dir", wide_dir, "--quantize", "nf4", *flags)
    assert message == "--quantize nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes."
    assert not (tmp_path / "run").exists()


def test_an_unsupported_mode_or_device_is_refused(base_dir, run_script):
    with pytest.raises(UserError, match=r"nf5.*choose from nf4, nf4-dq, fp4, fp4-dq, int8"):
        load_model(base_dir, quantize="nf5")
    with pytest.raises(UserError, match="CUDA and CPU, not on mps"):
        check_quantize("nf4", toys.base(), torch.device("mps"))
    code, _, err = run_script("generate/base.py", "--quantize", "nf5")
    assert code == 2 and "--quantize: expected {nf4,nf4-dq,fp4,fp4-dq,int8}, got 'nf5'" in err


def test_which_layers_are_quantized():
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj")
    everything = [f"transformer.h.{i}.{layer}" for i in range(3) for layer in layers]
    assert list(projections(toys.base())) == list(projections(toys.aligned())) == everything  # lm_head is not
    with_lora = lora.LLaMA(lora.LLaMAConfig(**toys.SIZES))
    assert list(projections(with_lora)) == [name for name in everything if not name.endswith("c_attn")]


def test_the_key_of_a_cached_reference_depends_on_quantization_method_and_packing(preference_dir, tokenizer):
    data = PreferenceData(preference_dir, "train", tokenizer)
    fabric = Fabric(accelerator="cpu", devices=1)
    keys = [reference_key(data, "base", "none", [], fabric, quantize) for quantize in (None, "nf4", "int8")]
    keys.append(reference_key(data, "base", "none", [], fabric, "int8", "lora"))  # whose c_attn is not quantized
    for width in (0, 10**6):  # pairs that share rows are rounded differently
        data.n_embd = width
        keys.append(reference_key(data, "base", "none", [np.arange(3)], fabric))
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


@needs_bitsandbytes
def test_rows_that_are_not_a_multiple_of_the_block_size_are_refused(base_dir):
    with pytest.raises(UserError, match=r"multiple of 64, and transformer.h.0.attn.c_attn is 32 wide"):
        load_model(base_dir, quantize="fp4-dq")
    assert load_model(base_dir, quantize="int8")


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_base_computes_like_the_base_with_rounded_weights(mode, dtype, wide_dir):
    quantized = load_model(wide_dir, adapter(), dtype=dtype, quantize=mode)
    rounded = load_model(wide_dir, adapter(), dtype=dtype)
    for network in (quantized, rounded):
        aligner.mark_only_adapter_as_trainable(network)
    for name, layer in projections(rounded).items():
        dequantized_weight, original = dequantize(quantized.get_submodule(name)), layer.weight.data.clone()
        layer.weight.data = dequantized_weight.to(dtype)
        assert 0 < (dequantized_weight - original).norm() / original.norm() < (0.02 if mode == "int8" else 0.2)
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.h.0.rms_1.scale"):
        assert torch.equal(quantized.get_parameter(name), rounded.get_parameter(name))

    idx = toys.token_ids(2, 9)
    tolerance = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-4}
    with torch.no_grad():  # like a validation, which must not change what a training step computes
        torch.testing.assert_close(quantized(idx), rounded(idx), **tolerance)
        assert torch.equal(quantized.eval()(idx), quantized.train()(idx))  # the DPO reference, and the policy
    for network in (quantized, rounded):
        (-network.label_logps(idx, idx).mean()).backward()
    for name, p in quantized.named_parameters():
        expected = rounded.get_parameter(name).grad
        assert (p.grad is None) == (expected is None) == (not quantized.is_adapter_parameter(name)), name
        if p.grad is not None:
            assert p.dtype == p.grad.dtype == torch.float32
            assert F.cosine_similarity(p.grad.flatten(), expected.flatten(), dim=0) > 0.99, name


def dequantize(layer: torch.nn.Module) -> torch.Tensor:
    """Return the dequantized weights of a bitsandbytes layer in fp32."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        assert layer.weight.dtype == torch.int8
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scales.unsqueeze(1) / 127
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features / 2
    return bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).float()


@needs_bitsandbytes
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_several_adapters_and_lora_on_a_quantized_base(mode, wide_dir):
    composed = load_adapted(wide_dir, [adapter(), adapter(1)], [1.0], quantize=mode)
    answers = generate(composed, toys.prompts(3, 7), Sampling(5), set())
    alone = [generate(composed, [prompt], Sampling(5), set())[0] for prompt in toys.prompts(3, 7)]
    assert answers == alone

    network = load_model(wide_dir, method="lora", quantize=mode)
    assert type(network.transformer.h[0].attn.c_attn) is lora.LoRALinear
    assert type(network.transformer.h[0].attn.c_proj) is not torch.nn.Linear
    aligner.mark_only_adapter_as_trainable(network)
    network.label_logps(toys.token_ids(1, 9), toys.token_ids(1, 9)).sum().backward()
    assert network.transformer.h[0].attn.c_attn.lora_B.grad.norm() > 0


@needs_bitsandbytes
@pytest.mark.parametrize(("mode", "precision"), [("nf4-dq", "32-true"), ("nf4", "bf16-true"), ("int8", "bf16-true"),
                                                 ("nf4", "bf16-mixed"), ("int8", "bf16-mixed")])  # fmt: skip
def test_training_on_a_quantized_base(mode, precision, wide_dir, data_dir, tmp_path, run_script):
    settings = {**SHORT, "checkpoint_dir": wide_dir, "data_dir": data_dir, "out_dir": tmp_path / "run"}
    settings |= {"precision": precision, "quantize": mode, "gradient_checkpointing": precision == "bf16-true"}
    finetune.aligner.main(finetune.aligner.Settings(**settings))
    trained = read_adapter(tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in trained.state.values())
    assert all(t.abs().max() > 0 for name, t in trained.state.items() if name.endswith("gating_factor"))
    code, _, _ = run_script("generate/aligner.py", "--checkpoint_dir", wide_dir, "--adapter", tmp_path / "run",
                              "--quantize", mode, "--prompt", "the cat", "--max_new_tokens", "3")  # fmt: skip
    assert code == 0
    with pytest.raises(UserError, match="quantize"):
        finetune.aligner.main(finetune.aligner.Settings(**{**settings, "quantize": None, "resume": True}))


@needs_bitsandbytes
def test_a_dry_run_counts_the_parameters_of_a_quantized_base(wide_dir, data_dir, tmp_path, run_script):
    """A 4-bit layer stores two weights in a byte."""
    flags = {**SHORT, "checkpoint_dir": wide_dir, "data_dir": data_dir, "out_dir": tmp_path / "run", "quantize": "nf4"}
    code, out, err = run_script("finetune/aligner.py", *(f"--{k}={v}" for k, v in flags.items()), "--dry_run")
    assert code == 0, err
    count = sum(p.numel() for p in load_model(wide_dir).parameters())
    assert f"parameters   {count:,} frozen in float32, layers in nf4, {64 + 2 * 4} trained (aligner)\n" in out


@needs_bitsandbytes
def test_dpo_on_a_quantized_base(wide_dir, preference_dir, tmp_path):
    settings = {**SHORT, "checkpoint_dir": wide_dir, "data_dir": preference_dir, "out_dir": tmp_path / "run"}
    finetune.alignerDPO.main(finetune.alignerDPO.Settings(**settings, quantize="nf4", drift_prompts=2))
    assert read_adapter(tmp_path / "run" / "last.safetensors").meta["training"]["settings"]["quantize"] == "nf4"


@needs_bitsandbytes
def test_a_method_that_changes_every_linear_layer_is_refused():
    with torch.device("meta"):
        network = adapter_v2.LLaMA(adapter_v2.LLaMAConfig(**toys.SIZES))
    with pytest.raises(UserError, match="--quantize nf4 does not work with this method, which changes every linear"):
        check_quantize("nf4", network, torch.device("cpu"))
