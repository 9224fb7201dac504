"""Manifests: records of the files in a folder that this project wrote; nothing else in it is replaced or removed."""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST, FORMAT = ".aligner-manifest.json", "aligner-manifest-1"
# kinds of folders
DATASET, BASE_MODEL, HF_MODEL, MERGED_MODEL = "prepared dataset", "base model", "Hugging Face model", "merged model"
OUTPUTS = "output folder"  # one that a program keeps writing to
HASHED = 2**20  # a manifest identifies a file by its size and a hash of this many bytes from its beginning


def make_manifest(folder: Path, kind: str) -> str:
    """Return the manifest of everything in a folder, as JSON."""
    files = {name: _identify(folder / name) for name in _contents(folder) if name != MANIFEST}
    return json.dumps({"format": FORMAT, "kind": kind, "files": files}, indent=1) + "\n"


def find_strangers(folder: Path, kind: str | None = None) -> list[str]:
    """Return the names in a folder that its manifest does not record, or that have changed since.

    Args:
        kind: If given, a manifest of another kind is treated as missing.
    """
    recorded = read_manifest(folder, kind)
    if recorded is None:
        return _contents(folder)
    names = [name for name in _contents(folder) if name != MANIFEST]
    return [name for name in names if name not in recorded or recorded[name] != _identify(folder / name)]


def changed_names(folder: Path, kind: str) -> list[str]:
    """Return the recorded names of a folder that are missing or have changed since; none without a manifest."""
    recorded = read_manifest(folder, kind) or {}
    return [name for name in recorded if not (folder / name).exists() or recorded[name] != _identify(folder / name)]


def remove_recorded(folder: Path) -> None:
    """Remove the files of a folder that its manifest records, and the manifest last; anything else stays."""
    for name in set(_contents(folder)) - set(find_strangers(folder)) - {MANIFEST}:
        (folder / name).unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(root)
    if folder.exists() and os.listdir(folder) == [MANIFEST] and not find_strangers(folder):
        (folder / MANIFEST).unlink()
        folder.rmdir()


def read_manifest(folder: Path, kind: str | None) -> dict[str, Any] | None:
    """Return the entries of a folder's manifest by name; None if it is missing, damaged or of another kind."""
    try:
        if not stat.S_ISREG((folder / MANIFEST).lstat().st_mode):
            return None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest["files"]) if manifest["format"] == FORMAT and kind in (None, manifest["kind"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _contents(folder: Path) -> list[str]:
    """Return the relative names of all files and links in a folder, and of empty folders."""

    def fail(error: OSError) -> None:
        raise error

    paths = []
    for root, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        paths += [Path(root, name) for name in names + links]
        paths += [Path(root)] if not folders and not names and Path(root) != folder else []
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _identify(path: Path) -> list[Any] | None:
    """Return the size of a file and a hash of its beginning; None for anything but a regular file."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return None
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.sha256(file.read(HASHED)).hexdigest()]
