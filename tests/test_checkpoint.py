"""Checkpoint folders, adapter files, and damaged or missing files."""

import json
import os
import resource
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_llama import aligner, model
from lit_llama.bank import Bank
from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, save_adapter, save_base
from lit_llama.storage.tensor_files import MAPPED_BYTES, open_rows, open_tensors, read_state
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = dict(block_size=32, vocab_size=40, n_layer=3, n_head=4, n_embd=16, intermediate_size=24)


def random_state(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    config = model.LLaMAConfig(**{**SIZES, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    save_base(folder, config, random_state(model.LLaMA(config), seed))
    return folder


def make_adapter(path: Path, base: Path, length: int = 3, seed: int = 5) -> dict[str, Any]:
    """Write a trained adapter and return its header."""
    network = aligner.LLaMA(aligner.LLaMAConfig.from_json(base / "lit_config.json", adapter_prompt_length=length))
    state = {n: t for n, t in random_state(network, seed).items() if network.is_adapter_parameter(n)}
    meta = {
        "method": "aligner",
        "config": {"adapter_prompt_length": length, "adapter_start_layer": 2},
        "base": base_fingerprint(base),
        "prompt_style": "alpaca",
        "training": {"settings": {"out_dir": path.parent}},
    }
    save_adapter(path, state, meta)
    return json.loads(json.dumps(meta, default=str))


# == adapters ==


def test_an_adapter_is_read_as_it_was_saved(tmp_path):
    base = make_base(tmp_path / "base")
    meta = make_adapter(tmp_path / "out/best.safetensors", base)
    for path in (tmp_path / "out/best.safetensors", tmp_path / "out"):  # a run folder means its best adapter
        adapter = read_adapter(path)
        assert adapter.meta == meta and adapter.method == "aligner"
        assert adapter.config == {"adapter_prompt_length": 3, "adapter_start_layer": 2}
    loaded = load_model(base, adapter, dtype=torch.bfloat16)
    parameters = dict(loaded.named_parameters())
    assert set(adapter.state) == {"global_value_embedding.weight", "transformer.h.2.attn.gating_factor"}
    for name, tensor in load_file(tmp_path / "out/best.safetensors").items():
        assert parameters[name].dtype == torch.float32 and torch.equal(parameters[name], tensor)
    for name, tensor in load_file(base / "lit_model.safetensors").items():
        assert torch.equal(parameters[name], tensor.bfloat16())


def test_a_fresh_adapter_does_not_change_the_output(tmp_path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    method_config = {"adapter_prompt_length": 2, "adapter_start_layer": 1}
    fresh, plain = load_model(base, method="aligner", method_config=method_config), load_model(base)
    assert fresh.global_value_embedding.weight.shape == (2, 16) and fresh.global_value_embedding.weight.std() > 0.5
    idx = torch.arange(10).unsqueeze(0)
    assert torch.equal(fresh(idx), plain(idx))


def test_without_a_header_the_configuration_is_inferred_from_the_tensors(tmp_path):
    gates = {f"transformer.h.{i}.attn.gating_factor": torch.randn(1, 4, 1, 1) for i in (1, 2)}
    torch.save({"global_value_embedding.weight": torch.randn(7, 16), **gates}, tmp_path / "old.pth")
    adapter = read_adapter(tmp_path / "old.pth")
    assert adapter.meta == {} and adapter.config == {"adapter_prompt_length": 7, "adapter_start_layer": 1}
    assert load_model(make_base(tmp_path / "base"), adapter).global_value_embedding.weight.shape == (7, 16)


names = st.text(min_size=1, max_size=8)


@given(
    meta=st.dictionaries(names, st.one_of(st.text(), st.integers(), st.lists(st.booleans()), st.none()), max_size=4),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_header_survives_a_round_trip(tmp_path, meta, values):
    state = {
        "global_value_embedding.weight": torch.tensor([values]),
        "transformer.h.4.attn.gating_factor": torch.ones(1),
    }
    save_adapter(tmp_path / "a.safetensors", state, {**meta, "method": "aligner"})
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.meta == {**meta, "method": "aligner"}
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in state.items())


def load_error(base: Path, adapter: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(base, read_adapter(adapter))
    return str(error.value)


def test_adapters_of_other_bases_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    make_adapter(path, make_base(tmp_path / "base"))
    assert "is 16 wide and the base model in" in load_error(make_base(tmp_path / "wide", n_embd=32), path)
    message = load_error(make_base(tmp_path / "deep", n_layer=4), path)
    assert "was trained on a base with {'n_layer': 3}" in message and "has {'n_layer': 4}" in message
    message = load_error(make_base(tmp_path / "twin", seed=1), path)
    assert "of this shape but with other weights" in message and "fingerprint" in message
    load_model(make_base(tmp_path / "same"), read_adapter(path))  # the same weights in another folder are the same base


def test_tensors_that_contradict_the_header_are_refused(tmp_path):
    base, path = make_base(tmp_path / "base"), tmp_path / "a.safetensors"
    meta = make_adapter(path, base)
    save_adapter(path, read_state(path), {**meta, "config": {"adapter_prompt_length": 4, "adapter_start_layer": 2}})
    assert "global_value_embedding.weight is (3, 16), not (4, 16)" in load_error(base, path)


def test_files_and_folders_without_an_adapter_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    with pytest.raises(UserError, match="There is no adapter in the folder"):
        read_adapter(base)
    with pytest.raises(UserError, match="is not an adapter: it has no prefix with gating factors"):
        read_adapter(base / "lit_model.safetensors")
    save_adapter(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {"method": "prompt tuning"})
    with pytest.raises(UserError, match="has the unknown method 'prompt tuning', not one of aligner"):
        read_adapter(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"lit_llama": "{'method'"})
    with pytest.raises(UserError, match="the header entry 'lit_llama' is not JSON"):
        read_adapter(tmp_path / "b.safetensors")


HEADERS: dict[str, Any] = {
    "config is a list; expected an object": {"config": [1]},
    "config has 'n_layer', which is not a setting of 'aligner'": {"config": {"n_layer": 2}},
    'adapter_prompt_length is "3"; expected a whole number': {"config": {"adapter_prompt_length": "3"}},
    "adapter_start_layer is null; expected": {"config": {"adapter_start_layer": None}},
    "adapter_prompt_length is 1000000000000; expected": {"config": {"adapter_prompt_length": 10**12}},
    "method is null; expected text": {"method": None},
    "method is a list; expected text": {"method": []},
    "base has no config": {"base": {"weights": "0" * 16}},
    "base: weights is 1; expected text": {"base": {"config": {}, "weights": 1}},
    'training is "x"; expected an object': {"training": "x"},
    "prompt_style is 1; expected text or null": {"prompt_style": 1},
}


@pytest.mark.parametrize("sentence", HEADERS)
def test_headers_that_are_refused(sentence, tmp_path):
    base, path = make_base(tmp_path / "base"), tmp_path / "a.safetensors"
    meta = make_adapter(path, base)
    save_file(load_file(path), path, metadata={"lit_llama": json.dumps({**meta, **HEADERS[sentence]})})
    with pytest.raises(UserError) as error:
        read_adapter(path)
    assert sentence in str(error.value) and str(path) in str(error.value)


def test_settings_missing_from_a_header_have_their_defaults(tmp_path):
    base, path = make_base(tmp_path / "base"), tmp_path / "a.safetensors"
    meta = make_adapter(path, base)
    save_file(load_file(path), path, metadata={"lit_llama": json.dumps({**meta, "config": {}})})
    assert read_adapter(path).config == {"adapter_prompt_length": 1, "adapter_start_layer": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["global_value_embedding.weight", "transformer.h.2.attn.gating_factor"])
def test_numbers_that_are_not_finite_are_refused(value, name, tmp_path):
    base, path = make_base(tmp_path / "base"), tmp_path / "a.safetensors"
    make_adapter(path, base)
    state = load_file(path)
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "a.pth")
    save_file(state, path)
    for file in (path, tmp_path / "a.pth"):
        with pytest.raises(UserError, match=rf"{name} holds numbers that are not finite"):
            read_adapter(file)


TENSORS: dict[str, dict[Any, torch.Tensor]] = {
    "weight holds int64 numbers, which are not supported": {"weight": torch.ones(2, dtype=torch.int64)},
    "weight is (1000000000, 16), but the file holds only part of it": {"weight": torch.ones(1).expand(10**9, 16)},
    "it does not hold named tensors": {3: torch.ones(2)},
    "not hold named tensors": {"weight": torch.ones(2).to_sparse()},
    "named tensors.": {"weight": torch.ones(2, device="meta")},
}


@pytest.mark.parametrize("sentence", TENSORS)
def test_tensors_that_are_refused(sentence, tmp_path):
    torch.save(TENSORS[sentence], tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        read_state(tmp_path / "a.pth")
    assert sentence in str(error.value)


# == files larger than memory ==

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def memory() -> int:
    """Return the bytes of this machine's memory and swap."""
    if not OVERCOMMIT.is_file():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kilobytes = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * (int(kilobytes["MemTotal:"]) + int(kilobytes["SwapTotal:"]))


def write_sparse_safetensors(path: Path, tensors: int, nbytes: int, **metadata: str) -> None:
    """Write a file whose tensors of zeros take no space on the disk."""
    entries = [{"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
               for i in range(tensors)]  # fmt: skip
    header = {"__metadata__": metadata, **{f"x{i}": entry for i, entry in enumerate(entries)}}
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, path.stat().st_size + tensors * nbytes)


def test_small_tensors_keep_no_file_open(tmp_path):
    """A mapping does, and a bank of adapters would reach the system's limit of open files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    state = {f"x{i}": torch.full((3,), float(i)) for i in range(200)}
    save_file(state, tmp_path / "a.safetensors")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, limits[0]), limits[1]))
        read = read_state(tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    read["x7"][0] = 5  # writable


def test_a_model_may_have_more_tensors_than_files_may_be_open(tmp_path):
    """Each mapped tensor keeps its file open, and macOS allows 256 files unless a program asks for more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    write_sparse_safetensors(tmp_path / "a.safetensors", 200, MAPPED_BYTES)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, limits[0]), limits[1]))
        assert len(read_state(tmp_path / "a.safetensors")) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_safetensors_larger_than_memory_are_mapped(tmp_path):
    path, nbytes = tmp_path / "a.safetensors", memory() // 4 * 2
    write_sparse_safetensors(path, 6, nbytes)
    for state in (read_state(path), {name: tensor.read() for name, tensor in open_tensors([path]).items()}):
        assert [t.nbytes for t in state.values()] == [nbytes] * 6 and state["x5"][-1] == 0
    assert open_rows(path)["x5"][1](nbytes // 2 - 1, nbytes // 2) == 0
    state["x5"][-1] = 1  # copied on write
    assert read_state(path)["x5"][-1] == 0


if OVERCOMMIT.is_file() and OVERCOMMIT.read_text().strip() == "0":  # Linux refuses larger mappings than its memory

    def test_a_tensor_larger_than_memory_is_refused(tmp_path):
        write_sparse_safetensors(tmp_path / "a.safetensors", 1, 3 * memory())
        with pytest.raises(UserError, match=r"a\.safetensors cannot be read \("):
            read_state(tmp_path / "a.safetensors")

    def test_a_bank_larger_than_memory_is_refused(tmp_path):
        about = {"config": SIZES, "start_layer": 1, "base": None, "lengths": [1]}
        write_sparse_safetensors(tmp_path / "a.safetensors", 1, 3 * memory(), lit_llama_bank=json.dumps(about))
        with pytest.raises(UserError, match=r"The bank .*a\.safetensors \(\d+ GB\) cannot be mapped into memory"):
            Bank.load(tmp_path / "a.safetensors")

    def test_a_pickle_larger_than_memory_is_refused(tmp_path):
        torch.save({"x": torch.ones(2)}, tmp_path / "small.pth")
        with ZipFile(tmp_path / "small.pth") as small, ZipFile(tmp_path / "a.pth", "w") as large:
            for item in small.infolist():
                large.writestr(item, small.read(item))
            large.start_dir += 3 * memory()  # of the directory at the end, so the space before it is a hole
        with pytest.raises(UserError, match=r"a\.pth \(\d+ GB\) cannot be mapped into memory as a unit"):
            read_state(tmp_path / "a.pth")


# == fingerprints ==


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_survives_casts(dtype, tmp_path):
    config = model.LLaMAConfig(**SIZES)
    state = {name: t.to(dtype) for name, t in random_state(model.LLaMA(config), 0).items()}
    fingerprints = []
    for cast in (dtype, torch.float32, torch.bfloat16):
        folder = tmp_path / str(cast)
        folder.mkdir(exist_ok=True)
        save_base(folder, config, {name: t.to(cast) for name, t in state.items()})
        fingerprints.append(base_fingerprint(folder))
    (tmp_path / "pth").mkdir()
    torch.save(state, tmp_path / "pth/lit-llama.pth")
    (tmp_path / "pth/lit_config.json").write_text(config.to_json())
    assert fingerprints.count(base_fingerprint(tmp_path / "pth")) == 3


def test_the_fingerprint_opens_a_pickle_once(tmp_path, monkeypatch):
    config, load, opened = model.LLaMAConfig(**SIZES), torch.load, []
    torch.save(random_state(model.LLaMA(config), 0), tmp_path / "lit-llama.pth")
    (tmp_path / "lit_config.json").write_text(config.to_json())
    monkeypatch.setattr(torch, "load", lambda path, **options: opened.append(path) or load(path, **options))
    base_fingerprint(tmp_path)
    assert opened == [tmp_path / "lit-llama.pth"]


def test_the_fingerprint_tells_weights_apart(tmp_path):
    config = model.LLaMAConfig(**SIZES)
    state = random_state(model.LLaMA(config), 0)
    fingerprints = {base_fingerprint(make_base(tmp_path, seed))["weights"] for seed in (0, 1)}
    places = {"ln_f.scale": 3, "wte.weight": (0, 0), "h.1.rms_2.scale": 0, "h.2.attn.c_attn.weight": (1, 1)}
    for name, index in places.items():
        changed = {k: v.clone() for k, v in state.items()}
        changed[f"transformer.{name}"][index] *= 1.02
        save_base(tmp_path, config, changed)
        fingerprints.add(base_fingerprint(tmp_path)["weights"])
    assert len(fingerprints) == 6
    assert base_fingerprint(make_base(tmp_path))["config"] == json.loads(config.to_json())


def test_the_fingerprint_covers_every_tensor(tmp_path):
    shape = dict(qkv_bias=True, proj_bias=True, mlp_bias=True, n_embd=64)
    config = model.LLaMAConfig(**{**SIZES, **shape})
    state = random_state(model.LLaMA(config), 0)
    before = base_fingerprint(make_base(tmp_path, **shape))
    for name in state:
        changed = {k: v.clone() for k, v in state.items()}
        changed[name][-1] *= 1.02
        save_base(tmp_path, config, changed)
        now = base_fingerprint(tmp_path)
        assert now["tensors"] != before["tensors"] and now["config"] == before["config"], name


def test_adapters_of_earlier_versions_are_accepted_by_the_old_fingerprint(tmp_path):
    base, path = make_base(tmp_path / "base"), tmp_path / "a.safetensors"
    meta = make_adapter(path, base)
    config, state = model.LLaMAConfig(**SIZES), load_file(base / "lit_model.safetensors")
    state["transformer.h.1.mlp.c_proj.weight"] *= 2  # not covered by the old fingerprint
    save_base(base, config, state)
    assert "other weights" in load_error(base, path)
    save_adapter(path, read_state(path), {**meta, "base": {k: v for k, v in meta["base"].items() if k != "tensors"}})
    load_model(base, read_adapter(path))


# == files that are not checkpoints ==


def write_pickle(path: Path) -> None:
    torch.save({"x": toys.RunsCode()}, path)


def write_list(path: Path) -> None:
    torch.save([1, 2], path)


def write_truncated_pth(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def write_truncated_safetensors(path: Path) -> None:
    # the header has 123 bytes, so its length field begins with the byte of "{", as JSON does
    save_file({"x" * 71: torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1])


NO_CHECKPOINTS = {
    "it is empty": ("a.pth", b""),
    "it is JSON text, beginning": ("a.pth", b'{"question": "What is two plus two?", "answer": "4"}\n{}'),
    "it is text, beginning '<!DOCTYPE": ("a.safetensors", b"<!DOCTYPE html>\n<html><body>Not found</body>"),
    "it is text, beginning 'éé": ("b.safetensors", "é".encode() * 60),
    "it is a Git LFS pointer, so fetch the file itself with `git lfs pull`": (
        "c.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
    "it is damaged or cut short.": ("d.safetensors", write_truncated_safetensors),
    "it is damaged or cut short, or it would run code": ("b.pth", write_truncated_pth),
    "checkpoint: it would run code when loaded.": ("c.pth", write_pickle),
    "it does not hold named tensors": ("d.pth", write_list),
}  # fmt: skip


@pytest.mark.parametrize("sentence", NO_CHECKPOINTS)
def test_files_that_are_not_checkpoints_are_refused(sentence, tmp_path):
    name, content = NO_CHECKPOINTS[sentence]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(UserError) as error:
        read_adapter(path)
    assert str(error.value).startswith(f"{path} is not a checkpoint: ")
    assert sentence in str(error.value) and "\n" not in str(error.value)


@given(content=st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_arbitrary_bytes_are_refused(tmp_path, content):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint"):
            read_state(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"There is no adapter at .*a\.pth"):
        read_adapter(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"There is no model configuration at .*lit_config\.json"):
        load_model(tmp_path)
    base = make_base(tmp_path / "base")
    (base / "lit_model.safetensors").unlink()
    for call in (load_model, base_fingerprint):
        with pytest.raises(UserError, match=r"has no lit_model\.safetensors or .*scripts/convert_hf_checkpoint\.py"):
            call(base)


def test_weights_that_do_not_match_the_configuration(tmp_path):
    base = make_base(tmp_path / "base")
    state = load_file(base / "lit_model.safetensors")
    del state["transformer.ln_f.scale"]
    save_file(state, base / "lit_model.safetensors")
    with pytest.raises(UserError, match=r"transformer\.ln_f\.scale is missing"):
        load_model(base)
    with pytest.raises(UserError, match=r"does not have the weights that lit_config\.json describes"):
        base_fingerprint(base)


def test_the_broken_published_file_is_refused(shared):
    folder = shared / "aligner_weights_published/Alpaca_Instruction_Following_Supervised_Finetuning"
    (path,) = folder.glob("aligner10Tokens-llama2-7B*")
    with pytest.raises(UserError, match="is not a checkpoint: it is JSON text, beginning"):
        read_adapter(path)


def test_headers_can_be_read_without_the_tensors(tmp_path):
    """An adapter's header is plain safetensors metadata that any program can read."""
    base = make_base(tmp_path / "base")
    meta = make_adapter(tmp_path / "a.safetensors", base)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lit_llama"]) == meta
