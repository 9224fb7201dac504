"""Checkpoint folders of base models, and adapter files.

The folder of a base model contains `lit_config.json`, `lit_model.safetensors` (or Lit-LLaMA's `lit-llama.pth`) and
`tokenizer.model` (or `tokenizer.json`). An adapter is one small safetensors file whose header describes it and
identifies its base. Files are written under a temporary name and renamed.
"""

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from lit_llama.config import CONFIG_NAME, MOST
from lit_llama.console import did_you_mean, transient_bar
from lit_llama.device import disable_cudnn_attention
from lit_llama.huggingface.hub import download_adapter, is_on_hub
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.quantize import check_quantize, projections, quantize_
from lit_llama.sharding import check_shardable, shard_base_
from lit_llama.storage.files import atomic_write, write_text
from lit_llama.storage.schema import field
from lit_llama.storage.tensor_files import LazyTensor, open_rows, read_header, read_state, write_tensors
from lit_llama.utils import UserError
from lit_llama.variant import without_aliases

TOKENIZER_NAME = "tokenizer.model"
WEIGHT_NAMES = ("lit_model.safetensors", "lit_model.pth", "lit-llama.pth")
META_KEY = "lit_llama"  # the metadata entry in the header of an adapter file
HEADER = {  # the fields of that entry that are used
    "method": str,
    "config": dict,
    "base": dict | None,
    "prompt_style": str | None,
    "training": dict,
    "data": dict,
}


# == base models ==


def weights_path(checkpoint_dir: Path) -> Path:
    """Return the weight file in the folder of a base model.

    Raises:
        UserError: The folder or a weight file in it is missing.
    """
    checkpoint_dir = Path(checkpoint_dir)
    if not checkpoint_dir.is_dir():
        raise UserError(f"There is no checkpoint folder at {checkpoint_dir}.")
    for name in WEIGHT_NAMES:
        if (checkpoint_dir / name).is_file():
            return checkpoint_dir / name
    raise UserError(
        f"{checkpoint_dir} has no {' or '.join(WEIGHT_NAMES)}; convert a Hugging Face folder with "
        "scripts/convert_hf_checkpoint.py."
    )


def save_base(checkpoint_dir: Path, config: LLaMAConfig, state: dict[str, torch.Tensor]) -> None:
    """Write `lit_config.json` and `lit_model.safetensors` to a folder."""
    checkpoint_dir = Path(checkpoint_dir)
    with atomic_write(checkpoint_dir / WEIGHT_NAMES[0]) as path:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    write_text(checkpoint_dir / CONFIG_NAME, config.to_json())


def write_base(checkpoint_dir: Path, config: LLaMAConfig, tensors: dict[str, LazyTensor]) -> None:
    """Write the same files as `save_base`, one tensor at a time and with a progress bar."""
    Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(t.nbytes for t in tensors.values()), desc="Writing", unit="B", unit_scale=True) as bar:
        write_tensors(Path(checkpoint_dir) / WEIGHT_NAMES[0], tensors, bar.update)
    write_text(Path(checkpoint_dir) / CONFIG_NAME, config.to_json())


def base_fingerprint(checkpoint_dir: Path) -> dict[str, Any]:
    """Return a fingerprint of a base model: its configuration, and two hashes of a sample of its weights.

    `tensors` is a hash of the name and shape of every tensor, of all norm scales and biases, and of eight evenly spaced
    rows of each matrix, so that 13 GB need not be read. `weights` is the hash that earlier versions recorded: of the
    first four rows of the embedding and of the first and last `c_attn`, and the first four values of each norm scale.
    Values are converted to bf16 first, so converting the base to fp32 or bf16 keeps the hashes. (Converting it from
    fp32 to fp16 does not, since values are then rounded twice.)

    Raises:
        UserError: The folder is not a checkpoint.
    """
    config = LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME)
    path = weights_path(checkpoint_dir)
    names = [f"transformer.h.{i}.rms_{n}.scale" for i in range(config.n_layer) for n in (1, 2)]
    names += ["transformer.ln_f.scale", "transformer.wte.weight"]
    names += [f"transformer.h.{i}.attn.c_attn.weight" for i in (0, config.n_layer - 1)]
    rows = open_rows(path)
    missing = [name for name in (*names, *rows) if name not in rows or not all(rows[name][0]) or not rows[name][0]]
    if missing:
        raise UserError(f"{path} does not have the weights that {CONFIG_NAME} describes: {missing[0]} is missing.")
    weights, tensors = hashlib.sha256(), hashlib.sha256()
    for name in names:
        shape, read = rows[name]
        weights.update(_bf16_bytes(read(0, min(4, shape[0]))))
    for name, (shape, read) in sorted(rows.items()):
        tensors.update(f"{name} {shape} ".encode())
        sampled = sorted({i * (shape[0] - 1) // 7 for i in range(8)})
        for first, last in [(i, i + 1) for i in sampled] if len(shape) > 1 else [(0, shape[0])]:
            tensors.update(_bf16_bytes(read(first, last)))
    hashes = {"weights": weights.hexdigest()[:16], "tensors": tensors.hexdigest()[:16]}
    return {"config": json.loads(config.to_json()), **hashes}


def _bf16_bytes(rows: torch.Tensor) -> bytes:
    return rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


# == adapters ==


@dataclass
class AdapterFile:
    """The content of an adapter file.

    Args:
        state: Tensors by parameter name.
        meta: The header's description; empty for the files of the paper's authors.
        path: Where the file was read from.
    """

    state: dict[str, torch.Tensor]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None

    @property
    def method(self) -> str:
        """The method's name in `METHODS`; inferred from the tensors if the header lacks it."""
        return self.meta["method"] if "method" in self.meta else self._infer()[0]

    @property
    def config(self) -> dict[str, Any]:
        """The method's configuration; inferred from the tensors if the header lacks it."""
        return self.meta["config"] if "config" in self.meta else self._infer()[1]

    def _infer(self) -> tuple[str, dict[str, Any]]:
        for name, network_class in METHODS.items():
            try:
                config = network_class.config_from_state(self.state)
            except UserError as error:
                raise UserError(f"{self.path} cannot be used: {error}") from None
            if config is not None:
                return name, config
        raise UserError(f"{self.path} is not an adapter: it has no prefix with gating factors.")


def save_adapter(path: Path, state: dict[str, torch.Tensor], meta: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write an adapter file.

    Args:
        path: File to write. An existing file is replaced if its header shows that this project wrote it.
        state: Tensors by parameter name.
        meta: Description that can be converted to JSON: method, config, base, prompt_style, training, versions.
        overwrite: Replace any file.
    """
    with atomic_write(path, overwrite=overwrite or is_ours(path)) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in state.items()},
            temporary,
            metadata={META_KEY: json.dumps(meta, sort_keys=True, default=str)},
        )


def is_ours(path: Path, key: str = META_KEY) -> bool:
    """Return whether this project wrote a file: an adapter, or another kind of file with its `key` in the header."""
    try:
        return read_header(path, key) is not None
    except UserError:
        return False


def read_adapter(path: Path) -> AdapterFile:
    """Return the adapter in a file of this project (`.safetensors`) or of the paper's authors (`.pth`).

    Args:
        path: The file, a run folder (for its best adapter), or `hf:owner/name` for a repository on the Hub.

    Raises:
        UserError: The file is missing, or is not an adapter.
    """
    path = download_adapter(path) if is_on_hub(path) else Path(path)
    if not path.exists():
        near = [str(other) for folder in (path.parent, Path("aligner_weights")) for other in folder.glob("*")]
        raise UserError(f"There is no adapter at {path}{did_you_mean(str(path), near)}")
    if path.is_dir():
        files = [path / name for name in ("best.safetensors", "adapter.safetensors") if (path / name).is_file()]
        if not files:
            raise UserError(f"There is no adapter in the folder {path}.")
        path = files[0]
    if is_ours(path, "lit_llama_bank"):
        raise UserError(f"{path} is a bank, not an adapter; give it alone to generate/aligner.py, with --bank.")
    adapter = AdapterFile(read_state(path), read_header(path, META_KEY) or {}, path)
    _check_adapter(adapter)
    if adapter.method == "aligner":
        adapter.state = without_aliases(adapter.state)
    return adapter


def _check_adapter(adapter: AdapterFile) -> None:
    """Check the types of a header's fields, the method's configuration, and that all numbers are finite."""
    source, base_fields = f"The header of {adapter.path}", {f.name for f in fields(LLaMAConfig)}
    for name, kind in HEADER.items():
        if name in adapter.meta:
            field(adapter.meta, name, kind, source)
    if (base := adapter.meta.get("base")) is not None:
        field(base, "config", dict, f"{source}: base")
        field(base, "weights", str, f"{source}: base")
    for name, t in adapter.state.items():
        if t.dim() == 0 or t.numel() == 0:
            raise UserError(f"{adapter.path} is not an adapter: {name} has the shape {tuple(t.shape)}.")
    if adapter.method not in METHODS:
        raise UserError(f"{adapter.path} has the unknown method {adapter.method!r}, not one of {', '.join(METHODS)}.")
    config_class = METHODS[adapter.method].config_class
    if unknown := sorted(adapter.config.keys() - ({f.name for f in fields(config_class)} - base_fields)):
        raise UserError(f"{source}: config has {unknown[0]!r}, which is not a setting of {adapter.method!r}.")
    try:
        config = config_class(n_layer=MOST["n_layer"], block_size=MOST["block_size"], **adapter.config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if "config" in adapter.meta:  # settings missing from the header have their defaults
        adapter.meta["config"] = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in base_fields}
    for name, t in adapter.state.items():
        if not t.isfinite().all():
            raise UserError(
                f"{adapter.path} cannot be used: {name} holds numbers that are not finite (NaN or infinity)."
            )


# == models ==


def load_model(
    checkpoint_dir: Path,
    adapter: AdapterFile | None = None,
    *,
    method: str | type[LLaMA] | None = None,
    method_config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    mesh: DeviceMesh | None = None,
) -> LLaMA:
    """Load a base model: plain, with a trained adapter, or with a newly initialized one.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter: Trained adapter. It determines the method and its configuration.
        method: Method of a new adapter, by its name in `METHODS` or by its class.
        method_config: Configuration of the new adapter.
        device: Device of all parameters.
        dtype: Dtype of the base's parameters. Those of the adapter are always fp32.
        quantize: Quantization of the base's projections, one of `lit_llama.settings.Quantize`.
        mesh: Processes over which the base is sharded; each reads and stores a part (see `lit_llama.sharding`).

    Raises:
        UserError: A file is missing or damaged, the adapter belongs to another base, or the base cannot be quantized or
            sharded.
    """
    device = torch.device(device)
    disable_cudnn_attention()
    if adapter is not None:
        method, method_config = adapter.method, adapter.config
    model_class = METHODS[method] if isinstance(method, str) else method or LLaMA
    config = model_class.config_class.from_json(Path(checkpoint_dir) / CONFIG_NAME, **(method_config or {}))
    if adapter is not None:
        check_base(adapter, checkpoint_dir, config)
    with torch.device("meta"):
        model = model_class(config)
    later: set[str] = set()  # weights that stay memory-mapped for now, to be read layer by layer
    if quantize is not None:
        check_quantize(quantize, model, device)
        later = {f"{name}.weight" for name in projections(model)}
    if mesh is not None:
        check_shardable(model, quantize)
        later = {name for name, _ in model.named_parameters()}
    _load_base(model, weights_path(checkpoint_dir), device, dtype, later)
    if adapter is not None:
        model.load_state_dict({name: t.to(device, torch.float32) for name, t in adapter.state.items()}, assign=True)
    else:
        model.initialize_adapter()
    if quantize is not None:
        quantize_(model, quantize, device, dtype)
    if mesh is None:
        return model.to(device)
    shard_base_(model, mesh, device, dtype)
    return model


def _load_base(model: LLaMA, path: Path, device: torch.device, dtype: torch.dtype, later: set[str]) -> None:
    """Replace the base's parameters on the meta device with those of a file; those in `later` stay memory-mapped."""
    model.load_state_dict(read_state(path), assign=True)  # checks the shapes before anything is allocated
    present = [p for name, p in model.named_parameters() if not p.is_meta and name not in later]
    for p in transient_bar(present, "Loading the base", "tensor"):
        p.data = p.data.to(device, dtype)
    if missing := [n for n, p in model.named_parameters() if p.is_meta and not model.is_adapter_parameter(n)]:
        raise UserError(f"{path} contains no base model: {missing[0]} is missing.")


def check_base(
    adapter: AdapterFile, checkpoint_dir: Path, config: LLaMAConfig, base: dict[str, Any] | None = None
) -> None:
    """Check that an adapter was trained on this base model.

    Args:
        adapter: The adapter. Only its width can be checked if its header does not name a base.
        checkpoint_dir: Folder of the base model.
        config: Configuration of the base model.
        base: Its fingerprint, if known.

    Raises:
        UserError: The configurations or the weights differ.
    """
    prefix = adapter.state.get("global_value_embedding.weight")
    if prefix is not None and prefix.size(-1) != config.n_embd:
        raise UserError(
            f"The adapter {adapter.path} is {prefix.size(-1)} wide and the base model in {checkpoint_dir} is "
            f"{config.n_embd}; name the base that it was trained on with --checkpoint_dir, or another --adapter."
        )
    if (trained_on := adapter.meta.get("base")) is None:
        return
    base = base_fingerprint(checkpoint_dir) if base is None else base
    if differing := [k for k, v in trained_on["config"].items() if base["config"].get(k) != v]:
        was, now = ({k: c["config"].get(k) for k in differing} for c in (trained_on, base))
        raise UserError(f"The adapter {adapter.path} was trained on a base with {was}; {checkpoint_dir} has {now}.")
    for name in ("weights", "tensors"):  # files of earlier versions have no `tensors`
        if name in trained_on and name in base and trained_on[name] != base[name]:
            raise UserError(
                f"The adapter {adapter.path} was trained on a base of this shape but with other weights than "
                f"{checkpoint_dir} (fingerprint {trained_on[name]}, here {base[name]})."
            )


def versions() -> dict[str, str]:
    """Return the versions that results may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "lightning": version("lightning")}
