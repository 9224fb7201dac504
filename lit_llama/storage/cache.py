"""The cache folder for results that can be recomputed: tokenized rows, and log-probabilities of a DPO reference."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_llama.storage.files import atomic_folder, explained, write_text
from lit_llama.storage.manifest import MANIFEST
from lit_llama.storage.schema import check_readable, read_json
from lit_llama.utils import UserError

NAME, CHECKSUMS = ".aligner-cache", "sha256.json"
FILES = {
    # https://bford.info/cachedir: backup programs skip folders with this file
    "CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n",
    "README": "Tokenized rows and log-probabilities of DPO references. This folder may be deleted at any time.\n",
}


def cache_path(data_dir: Path) -> Path:
    """Return the path of the cache folder next to a dataset folder."""
    return Path(data_dir).absolute().parent / NAME


def cache_folder(data_dir: Path) -> Path:
    """Return the cache folder next to a dataset folder. It is created if it does not exist.

    Raises:
        UserError: The folder cannot be written to.
    """
    folder = cache_path(data_dir)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            if not (folder / name).is_file():
                write_text(folder / name, text)
    return folder


def fill_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder in the cache, unless it exists and the checksums of its files are correct.

    Args:
        folder: Folder to create.
        fill: Function that writes the files to a given folder.

    Raises:
        UserError: The folder cannot be written to.
    """
    if is_intact(folder):
        return
    with explained(folder):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    with atomic_folder(folder, "cache") as new:
        fill(new)
        (new / CHECKSUMS).write_text(json.dumps(_checksums(new)), encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Return whether a folder of `fill_once` exists and the checksums of its files are correct."""
    try:
        return read_json(folder / CHECKSUMS) == _checksums(folder)
    except (OSError, UserError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name not in (CHECKSUMS, MANIFEST))
    return {name: hash_file(folder / name).hexdigest() for name in names}


def hash_file(path: Path) -> Any:
    """Return the sha256 object of a file. (`hashlib.file_digest` needs Python 3.11.)

    Raises:
        UserError: It is a device, a pipe or a folder, or cannot be read.
    """
    check_readable(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest
