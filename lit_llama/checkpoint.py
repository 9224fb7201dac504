"""Checkpoint folders and adapter files.

A base model is a folder: `lit_config.json`, `lit_model.safetensors` (or Lit-LLaMA's `lit-llama.pth`) and
`tokenizer.model` (or `tokenizer.json`).
An adapter is one small safetensors file whose header says what it is and which base it belongs to. Nothing here runs
pickled code, and everything is written under a temporary name and renamed.
"""

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.quantize import check_quantize, projections, quantize_
from lit_llama.utils import UserError, atomic_write

CONFIG_NAME, TOKENIZER_NAME = "lit_config.json", "tokenizer.model"
WEIGHT_NAMES = ("lit_model.safetensors", "lit_model.pth", "lit-llama.pth")
META_KEY = "lit_llama"  # the header entry of our adapter files


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.pth` file, memory-mapped where the format allows.

    Raises:
        UserError: no such file, or something else under that name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            return {name: _mapped(path, name) for name in _names(path)}
        state = _load_pickle(path)
    except Exception as error:  # each format has its own
        raise UserError(f"{path} is not a checkpoint: {_what_is(path, error)}.") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is not a checkpoint: it holds something else than named tensors.")
    return state


SAFE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, or made, only when it is written: `read` gives it in that shape, in any dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_tensors(paths: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of all files by name, none of them read yet.

    Raises:
        UserError: a file is damaged, holds numbers of another kind, or repeats a tensor of another file.
    """
    tensors: dict[str, LazyTensor] = {}
    opened: dict[Path, dict[str, torch.Tensor]] = {}

    def read(path: Path, name: str) -> torch.Tensor:
        # the pages of a mapped file are let go with the tensor
        if path.suffix == ".safetensors":
            return _mapped(path, name)
        if is_zipfile(path):
            return read_state(path)[name]
        if path not in opened:  # of torch < 1.6
            opened.clear()
            opened[path] = read_state(path)
        return opened[path][name]

    for path in map(Path, paths):
        if path.suffix == ".safetensors":
            found = {name: LazyTensor(shape, dtype, partial(read, path, name)) for name, shape, dtype in _headers(path)}
        else:
            state = read_state(path).items()
            found = {name: LazyTensor(tuple(t.shape), t.dtype, partial(read, path, name)) for name, t in state}
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{path} holds {twice[0]}, which another file holds too.")
        tensors |= found
    return tensors


def _headers(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of each tensor of a safetensors file."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except SafetensorError as error:
        raise UserError(f"{path} is not a checkpoint: {_what_is(path, error)}.") from None
    if other := [(name, dtype) for name, _, dtype in found if dtype not in SAFE_DTYPES]:
        raise UserError("{}: {} holds {} numbers, which are not supported; are they quantized?".format(path, *other[0]))
    return [(name, shape, SAFE_DTYPES[dtype]) for name, shape, dtype in found]


def write_tensors(
    path: Path, tensors: dict[str, LazyTensor], wrote: Callable[[int], Any] = lambda nbytes: None
) -> None:
    """Writes a safetensors file one tensor at a time, so that memory never holds more than one.

    Args:
        wrote: told the bytes of each tensor once it is written.
    """
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):  # so all are aligned
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = tensor.read()
            assert value.shape == tensor.shape, name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(value.to(tensor.dtype).contiguous().flatten().view(torch.uint8).numpy())
            wrote(tensor.nbytes)


def check_space(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        UserError: the disk of `folder`, which need not exist yet, has less room than the tensors take.
    """
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"The weights take {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free; choose "
            "another --output_dir or free some space."
        )


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _mapped(path: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file, mapped by itself: its pages are let go with it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # files of torch < 1.6 cannot be mapped
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _what_is(path: Path, error: Exception) -> str:
    """A phrase for a file that should have been a checkpoint and could not be read."""
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, so fetch the file itself with `git lfs pull`"
    text = head.decode("utf-8", "ignore")
    if all(c.isprintable() or c.isspace() for c in text) and len(text.encode()) > len(head) - 4:
        return f"it is {'JSON ' if text.lstrip()[:1] in ('{', '[') else ''}text, beginning {text!r}"
    if "Unsupported global" in str(error):  # torch's word for a function that a pickle calls
        return "it would run code when loaded"
    damaged = "it is damaged or cut short"
    return damaged if isinstance(error, SafetensorError) else f"{damaged}, or it would run code when loaded"


def weights_path(checkpoint_dir: Path) -> Path:
    """The weight file of a base model's folder.

    Raises:
        UserError: no such folder, or none of the names in it.
    """
    checkpoint_dir = Path(checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise UserError(f"There is no checkpoint folder at {checkpoint_dir}.")
    for name in WEIGHT_NAMES:
        if (checkpoint_dir / name).is_file():
            return checkpoint_dir / name
    raise UserError(
        f"{checkpoint_dir} holds no {' or '.join(WEIGHT_NAMES)}; convert a Hugging Face folder with "
        "scripts/convert_hf_checkpoint.py."
    )


def save_base(checkpoint_dir: Path, config: LLaMAConfig, state: dict[str, torch.Tensor]) -> None:
    """Writes `lit_config.json` and `lit_model.safetensors` into a folder."""
    checkpoint_dir = Path(checkpoint_dir)
    with atomic_write(checkpoint_dir / WEIGHT_NAMES[0]) as path:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    write_text(checkpoint_dir / CONFIG_NAME, config.to_json())


def write_base(checkpoint_dir: Path, config: LLaMAConfig, tensors: dict[str, LazyTensor]) -> None:
    """As `save_base`, one tensor at a time."""
    Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(t.nbytes for t in tensors.values()), desc="Writing", unit="B", unit_scale=True) as bar:
        write_tensors(Path(checkpoint_dir) / WEIGHT_NAMES[0], tensors, bar.update)
    write_text(Path(checkpoint_dir) / CONFIG_NAME, config.to_json())


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def base_fingerprint(checkpoint_dir: Path) -> dict[str, Any]:
    """What ties an adapter to its base: the configuration and a hash of a few rows.

    The first four rows of the embedding and of the first and last c_attn, and the first four values of every norm
    scale, are read in bf16, so that the hash costs nothing at 13 GB and a base converted to fp32 or bf16 stays the same
    base. (An fp32 base cut to fp16 does not: it is rounded twice.)

    Raises:
        UserError: the folder is no checkpoint.
    """
    config = LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME)
    names = [f"transformer.h.{i}.rms_{n}.scale" for i in range(config.n_layer) for n in (1, 2)]
    names += ["transformer.ln_f.scale", "transformer.wte.weight"]
    names += [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, config.n_layer - 1)]
    rows = _first_rows(weights_path(checkpoint_dir), names)
    digest = hashlib.sha256()
    for name in names:
        digest.update(rows[name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return {"config": json.loads(config.to_json()), "weights": digest.hexdigest()[:16]}


def _first_rows(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The first four rows of some tensors of a weight file, without reading the rest."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name)[:4] for name in names}
        state = read_state(path)
        return {name: state[name][:4] for name in names}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} does not hold the weights its {CONFIG_NAME} describes ({error}).") from None


@dataclass
class AdapterFile:
    """An adapter file: its tensors and what its header says (`meta` is empty for the authors' files)."""

    state: dict[str, torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def method(self) -> str:
        """Its name in `METHODS`."""
        return self.meta["method"] if "method" in self.meta else self._read_off()[0]

    @property
    def config(self) -> dict[str, Any]:
        """The method's own configuration; read off the tensors where the header does not say it."""
        return self.meta["config"] if "config" in self.meta else self._read_off()[1]

    def _read_off(self) -> tuple[str, dict[str, Any]]:
        """Method and configuration of a file without a header."""
        for name, network_class in METHODS.items():
            try:
                config = network_class.config_from_state(self.state)
            except UserError as error:
                raise UserError(f"{self.path} cannot be used: {error}") from None
            if config is not None:
                return name, config
        raise UserError(f"{self.path} is not an adapter: it has no prefix with gating factors.")


def save_adapter(path: Path, state: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Writes an adapter; `meta` must be JSON: method, config, base, prompt_style, training, versions."""
    with atomic_write(path) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in state.items()},
            temporary,
            metadata={META_KEY: json.dumps(meta, sort_keys=True, default=str)},
        )


def read_adapter(path: Path) -> AdapterFile:
    """An adapter of ours (`.safetensors`) or of the authors (`.pth`).

    Raises:
        UserError: no such file, or no adapter.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.safetensors", "adapter.safetensors") if (path / name).is_file()]
        if not found:
            raise UserError(f"There is no adapter in the folder {path}.")
        path = found[0]
    state, meta = read_state(path), {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(META_KEY, "{}")
        try:
            meta = json.loads(header)
        except json.JSONDecodeError:
            raise UserError(f"{path} has a damaged header: its entry {META_KEY!r} is not JSON.") from None
    adapter = AdapterFile(state, meta, path)
    if adapter.method not in METHODS:
        raise UserError(f"{path} was made by the method {adapter.method!r}; known are {', '.join(METHODS)}.")
    assert adapter.config is not None  # else it says why not
    return adapter


def load_model(
    checkpoint_dir: Path,
    adapter: AdapterFile | None = None,
    *,
    method: str | type[LLaMA] | None = None,
    method_config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> LLaMA:
    """A base model, plain, with a trained adapter, or with a fresh one of `method`.

    Args:
        checkpoint_dir: the base model's folder.
        adapter: trained weights; they say by which method and with which configuration.
        method, method_config: the method of a fresh adapter, by its name in `METHODS` or by its class, and its
            configuration.
        dtype: of the frozen base; adapter parameters are fp32 always.
        quantize: how the base's projections are held, a `lit_llama.quantize.Quantize`; they compute in `dtype`.

    Raises:
        UserError: a file is missing or damaged, the adapter belongs to another base model, or the base cannot be
            quantised.
    """
    if adapter is not None:
        method, method_config = adapter.method, adapter.config
    network_class = METHODS[method] if isinstance(method, str) else method or LLaMA
    config = network_class.config_class.from_json(Path(checkpoint_dir) / CONFIG_NAME, **(method_config or {}))
    if adapter is not None:
        check_base(adapter, checkpoint_dir, config)
    with torch.device("meta"):
        network = network_class(config)
    device = torch.device(device)
    waiting = set()
    if quantize is not None:
        check_quantize(quantize, network, device)
        waiting = {f"{name}.weight" for name in projections(network)}
    # the base keeps its pages in the file until they are cast, moved, packed or quantised
    state = read_state(weights_path(checkpoint_dir))
    for name in state.keys() - waiting:
        state[name] = state[name].to(device=device, dtype=dtype)
    network.load_state_dict(state, assign=True)
    del state
    if adapter is not None:
        state = {name: t.to(device=device, dtype=torch.float32) for name, t in adapter.state.items()}
        network.load_state_dict(state, assign=True)
    missing = [n for n, p in network.named_parameters() if p.is_meta and not network.is_adapter_parameter(n)]
    if missing:
        raise UserError(f"{weights_path(checkpoint_dir)} holds no base model: {missing[0]} is missing.")
    if quantize is not None:
        quantize_(network, quantize, device, dtype)
    if adapter is None:
        # a fresh one is drawn on the CPU, so that a seed means the same on every device
        for child in network.modules():
            for name, p in child.named_parameters(recurse=False):
                if p.is_meta:
                    setattr(child, name, torch.nn.Parameter(torch.empty_like(p, device="cpu")))
        network.reset_adapter()
    return network.to(device)


def check_base(adapter: AdapterFile, checkpoint_dir: Path, config: LLaMAConfig) -> None:
    """Refuses an adapter that was trained on another base.

    Raises:
        UserError: widths, heads or layers differ, or the base's weights do.
    """
    prefix = adapter.state.get("global_value_embedding.weight")
    if prefix is not None and prefix.size(-1) != config.n_embd:
        raise UserError(
            f"The adapter {adapter.path} is {prefix.size(-1)} wide and the base model in {checkpoint_dir} is "
            f"{config.n_embd}: it was trained on another model."
        )
    trained_on = adapter.meta.get("base")
    if trained_on is None:
        return
    base = base_fingerprint(checkpoint_dir)
    differing = [k for k, v in trained_on["config"].items() if base["config"].get(k) != v]
    if differing:
        was, now = ({k: c["config"].get(k) for k in differing} for c in (trained_on, base))
        raise UserError(f"The adapter {adapter.path} was trained on a base with {was}; {checkpoint_dir} has {now}.")
    if trained_on["weights"] != base["weights"]:
        raise UserError(
            f"The adapter {adapter.path} was trained on a base of this shape but with other weights than "
            f"{checkpoint_dir} (fingerprint {trained_on['weights']}, here {base['weights']})."
        )


def versions() -> dict[str, str]:
    """What a result may depend on."""
    import lightning

    return {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
