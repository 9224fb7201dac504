"""Weight files: read and write named tensors one at a time, so that a complete model is never in memory.

Files are safetensors, or pickles as `torch.save` writes them. Pickled code is never run.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lit_llama.storage.schema import LFS_POINTER, check_readable, parse_json, unreadable
from lit_llama.utils import UserError, allow_open_files

# dtypes of unquantized weights, by their names in safetensors headers
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAPPED_BYTES = 2**20  # smaller tensors are read: a mapping holds an open file, and an adapter has a tensor per layer
OTHER_FILES = 1024  # open files besides the mapped tensors of a model, the usual limit on Linux; macOS has 256


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read or computed only when it is written.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype in which the tensor is written.
        read: Function that returns the tensor, in any dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# == reading ==


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors` or `.pth` file, memory-mapped where the format allows it.

    Raises:
        UserError: The file is missing, is not a checkpoint, or cannot be mapped into memory.
    """
    path = Path(path)
    check_readable(path, "checkpoint")
    if path.suffix.lower() == ".safetensors":
        tensors = _open_safetensors(path)
        if mapped := sum(tensor.nbytes >= MAPPED_BYTES for tensor in tensors.values()):
            allow_open_files(OTHER_FILES + mapped)
        return {name: tensor.read() for name, tensor in tensors.items()}
    try:
        state = _load_pickle(path)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path} is not a checkpoint: {_diagnose(path, error)}.") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} is not a checkpoint: it does not hold named tensors.")
    for name, t in state.items():
        _check_tensor(path, name, t)
    return state


def _check_tensor(path: Path, name: Any, t: torch.Tensor) -> None:
    """Check that a tensor has a supported dtype and that all its numbers are in the file: a pickle can repeat some."""
    if type(name) is not str or t.layout != torch.strided or t.device.type != "cpu":
        raise UserError(f"{path} is not a checkpoint: it does not hold named tensors.")
    _check_dtype(path, name, t.dtype, str(t.dtype).removeprefix("torch."))
    if t.nbytes > t.untyped_storage().nbytes():
        raise UserError(f"{path} is not a checkpoint: {name} is {tuple(t.shape)}, but the file holds only part of it.")


def _check_dtype(path: Path, name: str, dtype: torch.dtype | None, text: str) -> None:
    if dtype not in DTYPES.values():
        raise UserError(f"{path}: {name} holds {text} numbers, which are not supported; are they quantized?")


def read_header(path: Path, key: str) -> dict[str, Any] | None:
    """Return the JSON object in an entry of a safetensors header; None without the entry or for another format.

    Raises:
        UserError: The file is missing or cannot be read, or the entry is not such an object.
    """
    check_readable(path)
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(key)
    except (OSError, SafetensorError):
        return None
    return None if text is None else parse_json(text, f"{path}: the header entry {key!r}")


def open_tensors(paths: Iterable[Path]) -> dict[str, LazyTensor]:
    """Return the tensors of several files by name, without reading them.

    Raises:
        UserError: A file is missing or damaged, has an unsupported dtype, or repeats a tensor of another file.
    """
    tensors: dict[str, LazyTensor] = {}
    read_unmapped = lru_cache(maxsize=1)(read_state)  # files of torch < 1.6 are read as a unit
    for path in map(Path, paths):
        check_readable(path, "checkpoint")
        opened = _open_safetensors(path) if path.suffix.lower() == ".safetensors" else _open_pickle(path, read_unmapped)
        if repeated := sorted(opened.keys() & tensors.keys()):
            raise UserError(f"{path} holds {repeated[0]}, which another file holds too.")
        tensors |= opened
    return tensors


def open_rows(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[int, int], torch.Tensor]]]:
    """Return the shape of each tensor of a file, and a function that reads its rows `first` to `last` - 1.

    A safetensors file is not memory-mapped, because the system would read megabytes around each row.

    Raises:
        UserError: As `open_tensors`.
    """
    if path.suffix.lower() != ".safetensors":
        state = read_state(path)
        return {name: (tuple(t.shape), lambda first, last, t=t: t[first:last]) for name, t in state.items()}
    check_readable(path, "checkpoint")

    def read(start: int, shape: tuple[int, ...], dtype: torch.dtype, first: int, last: int) -> torch.Tensor:
        row = math.prod(shape[1:]) * dtype.itemsize
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(start + first * row)
            return torch.frombuffer(bytearray(file.read((last - first) * row)), dtype=dtype)

    layout = _read_layout(path)
    return {name: (shape, partial(read, start, shape, dtype)) for name, (start, shape, dtype) in layout.items()}


def _read_layout(path: Path) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Return the position in the file, in bytes, the shape and the dtype of each tensor of a safetensors file.

    Raises:
        UserError: The file is damaged or has an unsupported dtype.
    """
    try:
        with safe_open(path, framework="np") as file:  # validates the header; "pt" would reserve memory for all tensors
            names = file.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a checkpoint: {_diagnose(path, error)}.") from None
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    layout = {}
    for name in names:
        entry = header[name]
        _check_dtype(path, name, DTYPES.get(entry["dtype"]), entry["dtype"])
        layout[name] = (start + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return layout


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    layout = _read_layout(path)
    return {
        name: LazyTensor(shape, dtype, partial(_map_tensor, path, start, shape, dtype))
        for name, (start, shape, dtype) in layout.items()
    }


def _map_tensor(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that maps its part of a file, which is released with the tensor. Writing changes only memory.

    A tensor of less than `MAPPED_BYTES` is read instead.

    Raises:
        UserError: The system refuses to map it, or the file cannot be read.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        if nbytes < MAPPED_BYTES:
            with path.open("rb") as file:
                file.seek(start)
                return torch.frombuffer(bytearray(file.read(nbytes)), dtype=dtype).view(shape)
        mapped = np.memmap(path, np.uint8, "c", start, (nbytes,))
    except OSError as error:
        raise unreadable(path, error) from None
    return torch.from_numpy(mapped).view(dtype).view(shape)


def _open_pickle(path: Path, read_unmapped: Callable[[Path], dict[str, torch.Tensor]]) -> dict[str, LazyTensor]:
    # a mapped file is opened again for each tensor, which releases the pages of the one before
    read_file = read_state if is_zipfile(path) else read_unmapped

    def read(name: str) -> torch.Tensor:
        return read_file(path)[name]

    return {name: LazyTensor(tuple(t.shape), t.dtype, partial(read, name)) for name, t in read_state(path).items()}


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "unable to mmap" in str(error):
            raise UserError(
                f"{path} ({path.stat().st_size / 1e9:.0f} GB) cannot be mapped into memory as a unit, as torch needs "
                "for a pickled file: use the model's safetensors if it has any, or add memory or swap space."
            ) from None
        if "mmap can only be used with" not in str(error):  # torch's message for files of torch < 1.6
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _diagnose(path: Path, error: Exception) -> str:
    """Return a clause that explains why a file cannot be read as a checkpoint."""
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        return "it is empty"
    if head.startswith(LFS_POINTER):
        return "it is a Git LFS pointer, so fetch the file itself with `git lfs pull`"
    text = head.decode("utf-8", "ignore")
    if all(c.isprintable() or c.isspace() for c in text) and len(text.encode()) > len(head) - 4:
        return f"it is {'JSON ' if text.lstrip()[:1] in ('{', '[') else ''}text, beginning {text!r}"
    if "Unsupported global" in str(error):  # torch's message for a function that the pickle calls
        return "it would run code when loaded"
    damaged = "it is damaged or cut short"
    return damaged if isinstance(error, SafetensorError) else f"{damaged}, or it would run code when loaded"


# == writing ==


def write_tensors(
    path: Path, tensors: dict[str, LazyTensor], on_write: Callable[[int], Any] = lambda nbytes: None
) -> None:
    """Write a safetensors file one tensor at a time.

    Args:
        path: File to write.
        tensors: Tensors by name; each is read when its turn comes.
        on_write: Called with the number of bytes of each tensor after it was written.
    """
    header = _make_header(tensors)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = tensor.read()
            assert value.shape == tensor.shape, name
            file.seek(start + header[name]["data_offsets"][0])
            file.write(value.to(tensor.dtype).contiguous().flatten().view(torch.uint8).numpy())
            on_write(tensor.nbytes)


def _make_header(tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    """Return a safetensors header. Tensors with large items come first, so that all are aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    return header


def check_free(folder: Path, nbytes: int) -> None:
    """Check that a folder's disk has enough space for a number of bytes. The folder need not exist yet.

    Raises:
        UserError: There is too little free space.
    """
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise UserError(
            f"The files take {nbytes / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free; choose "
            "another --output_dir or free some space."
        )
