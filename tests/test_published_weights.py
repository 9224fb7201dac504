"""The authors' published adapters: each loads into the model it was trained on, and the broken file is refused."""

from pathlib import Path

import pytest
import torch
import toys

from lit_llama import aligner
from lit_llama.checkpoint import read_adapter
from lit_llama.utils import UserError

PUBLISHED = Path(__file__).parents[2] / "shared" / "aligner_weights_published"
pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the authors' weights are not at {PUBLISHED}")

ALPACA = "Alpaca_Instruction_Following_Supervised_Finetuning/aligner"
META_MATH = "MetaMath_Supervised_Finetuning/aligner"
BEAVER = "PKU-Beaver-DPO-Value-Alignment/"
BROKEN = ALPACA + "10Tokens-llama2-7B-"
# start of the path, model, prefix tokens, trained parameters
FILES = [
    (ALPACA + "1Token-llama2-7B-", "7B", 1, 5_056),
    (ALPACA + "1Token-llama2-13B-", "13B", 1, 6_640),
    (ALPACA + "10Token-llama2-13B-", "13B", 10, 52_720),
    (META_MATH + "1token-llama2-7B-", "7B", 1, 5_056),
    (META_MATH + "10token-llama2-7B-", "7B", 10, 41_920),
    (META_MATH + "100token-llama2-7B-", "7B", 100, 410_560),
    (META_MATH + "300token-llama2-7B-", "7B", 300, 1_229_760),
    (BEAVER + "BeaverDatasetSafetyPartSFTOnly/aligner1token-llama2-7B-", "7B", 1, 5_056),
    (BEAVER + "aligner1token-llama2-7B-DPO-", "7B", 1, 5_056),
]


def find_path(beginning: str) -> Path:
    (path,) = PUBLISHED.glob(beginning + "*.pth")
    return path


def make_network(name: str, **config: int) -> aligner.LLaMA:
    """Return a model of this size on the meta device, which allocates no memory."""
    with torch.device("meta"):
        network = aligner.LLaMA.from_name(f"Llama-2-{name}", **config)
    aligner.mark_only_adapter_as_trainable(network)
    return network


def test_every_published_file_is_listed():
    assert len(list(PUBLISHED.rglob("*.pth"))) == len(FILES) + 1


@pytest.mark.parametrize("beginning, name, length, count", FILES)
def test_published_file_loads_with_exact_counts_and_values(beginning, name, length, count):
    path = find_path(beginning)
    adapter = read_adapter(path)
    assert adapter.config == {"adapter_prompt_length": length, "adapter_start_layer": 2}
    network = make_network(name, **adapter.config)
    network.load_state_dict(adapter.state, assign=True)

    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    raw = torch.load(path, map_location="cpu", weights_only=True)
    for parameter_name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, raw[parameter_name].float())
    assert all(p.is_meta for n, p in network.named_parameters() if n not in trained)
    assert all((attn.gating_factor != 0).any() for attn in toys.prefix_layers(network))
    # the file has the prefix under many names, the model under one
    assert sum(n.endswith(".adapter_wte.weight") for n in raw) == network.config.n_layer - 2
    assert sum("embedding" in n or "adapter_wte" in n for n in trained) == 1


def test_dpo_in_bf16_changed_few_parameters():
    # why this project trains adapters in fp32: the run changed 6 of 4,096 prefix values and 275 of 960 gates
    before, after = (read_adapter(find_path(FILES[i][0])).state for i in (7, 8))
    changed = {name: int((before[name] != after[name]).sum()) for name in before}
    assert changed["global_value_embedding.weight"] == 6
    assert sum(n for name, n in changed.items() if name.endswith("gating_factor")) == 275


def test_the_broken_file_is_refused_with_a_one_line_error():
    path = find_path(BROKEN)
    with pytest.raises(UserError) as error:
        read_adapter(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not a checkpoint: it is JSON text, beginning")
    assert message.endswith(".") and "\n" not in message
    assert error.value.__cause__ is None


def test_a_published_file_is_refused_by_a_model_it_was_not_trained_on():
    adapter = read_adapter(find_path(FILES[0][0]))
    with pytest.raises(UserError, match=r"transformer.h.32.attn.gating_factor is missing"):
        make_network("13B", **adapter.config).load_state_dict(adapter.state, assign=True)
    with pytest.raises(UserError, match=r"transformer.h.2.attn.gating_factor does not belong to this model"):
        make_network("7B", adapter_start_layer=3).load_state_dict(adapter.state, assign=True)
    with pytest.raises(UserError, match=r"global_value_embedding.weight is \(1, 4096\), not \(10, 4096\)"):
        make_network("7B", adapter_prompt_length=10).load_state_dict(adapter.state, assign=True)
