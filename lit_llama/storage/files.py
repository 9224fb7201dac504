"""The rules for writing, replacing and deleting files, in one place for the whole project:

- A file or folder is written in a private temporary folder next to its destination, synced to the disk and renamed.
- A file is never written through a symbolic link, and never replaces a folder, a device or a write-protected file. A
  file that a flag names is replaced only with --overwrite.
- A folder is replaced only if the manifest written with it records everything in it as it is now. In a folder that a
  program keeps writing to, such as a run folder, it replaces and deletes only the names that it has claimed.
- Nothing else is ever deleted. Leftovers of a killed process are rolled back by the next write into the same folder,
  unless the file system cannot keep them private (FAT, CIFS).
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_llama.storage.manifest import FORMAT, MANIFEST, OUTPUTS, find_strangers, make_manifest, read_manifest
from lit_llama.storage.staging import TEMPORARY, settle, staged, synchronize
from lit_llama.utils import UserError, log

LOCK = ".aligner-lock"  # in folders that programs keep writing to, for `locked`
NO_ROOM = ("No space left", "PytorchStreamWriter", "inline_container", "iostream error")
TOO_LARGE = "File too large"


def check_file(path: Path, *inputs: Path | None, overwrite: bool = False) -> None:
    """Check that a file may be written. Scripts call it for each output file in their flags before they start.

    Args:
        path: File to write.
        inputs: Files and folders that are read; `path` must not be one of them.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UserError: The file exists and may not be replaced, or cannot be written.
    """
    path, problem = Path(path), ""
    with explained(path):
        if _exists(path):
            if path.is_symlink() or not path.is_file():
                problem = "is not a regular file; name another one"
            elif not overwrite:
                problem = "exists; replace it with --overwrite, or name another file"
            elif not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
                problem = "or its folder is write-protected; name another file"
            check_separate(path, *inputs)
    if problem:
        raise UserError(f"{path} {problem}.")


@contextmanager
def atomic_write(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which becomes `path` if no error occurs.

    Raises:
        UserError: As `check_file`, or the disk is full. Nothing was changed.
    """
    path = Path(path)
    check_file(path, overwrite=overwrite)
    with explained(path), staged(path) as new:
        yield new
        settle(new)
        check_file(path, overwrite=overwrite)
        os.replace(new, path)
        synchronize(path.parent)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(path, overwrite=overwrite) as new:
        new.write_text(text, encoding="utf-8")


def copy_file(source: Path, path: Path, *, overwrite: bool = True) -> None:
    """Copy the content of a file."""
    with atomic_write(path, overwrite=overwrite) as new:
        shutil.copyfile(source, new)


def check_folder(path: Path, kind: str, *inputs: Path | None) -> None:
    """Check that a folder may be written: it must be new, empty, or a folder of this kind that this project wrote.

    Args:
        path: Folder to write. A symbolic link to a folder, if the user owns it, stays a link.
        kind: The kind of folder, such as "prepared dataset"; a folder of another kind is not replaced.
        inputs: Files and folders that are read; none may be `path` or inside it.

    Raises:
        UserError: The folder contains anything else, or an input, or is a mount point, or cannot be written to.
    """
    path, problem = Path(path), ""
    with explained(path):
        if _exists(path):
            if path.is_symlink() and path.lstat().st_uid != os.geteuid():
                problem = "is a symbolic link of another user"
            elif not path.is_dir():
                problem = "is not a folder"
            elif os.path.ismount(path.resolve()):
                raise UserError(f"{path} is a mount point, which cannot be replaced; choose a folder inside it.")
            elif strangers := find_strangers(path, kind):
                problem = f"holds {strangers[0]}, which is not part of a {kind} that this project wrote there"
            elif not all(os.access(folder, os.W_OK | os.X_OK) for folder, _, _ in os.walk(path)):
                problem = "is write-protected"
            check_separate(path, *inputs)
    if problem:
        raise UserError(f"{path} {problem}; nothing is replaced, choose another folder.")


@contextmanager
def atomic_folder(path: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary folder to fill, which becomes `path` if no error occurs.

    An existing folder is moved aside, the new one is renamed to `path`, and the recorded files of the old one are
    removed. If the process is killed between the renames, the next write into the parent folder restores the old one.

    Raises:
        UserError: As `check_folder`, or the disk is full. Nothing was changed.
    """
    check_folder(path, kind)
    path = Path(path).resolve()
    with explained(path), staged(path) as new:
        new.mkdir()
        yield new
        (new / MANIFEST).write_text(make_manifest(new, kind), encoding="utf-8")
        settle(new)
        check_folder(path, kind)
        if path.exists():
            old = new.parents[1] / "old" / path.name
            old.parent.mkdir()
            os.rename(path, old)
        os.rename(new, path)
        synchronize(path.parent)


def check_separate(output: Path, *inputs: Path | None) -> None:
    """Check that an existing output is not one of the inputs and contains none of them, after resolving links.

    Raises:
        UserError: It is, or contains, an input.
    """
    for source in filter(None, inputs):
        resolved = Path(source).resolve()
        if any(path.exists() and output.exists() and path.samefile(output) for path in (resolved, *resolved.parents)):
            raise UserError(f"Writing {output} would replace {source}, which is read; choose another output.")


def check_claim(folder: Path, names: Iterable[str], *, adopt: bool = False) -> dict[str, Any]:
    """Check that `claim` would succeed, without writing anything, and return what the manifest will record.

    Raises:
        UserError: As `claim`.
    """
    folder = Path(folder)
    with explained(folder):
        recorded = read_manifest(folder, OUTPUTS)
        claimed = recorded or {}
        foreign = [name for name in names if name not in claimed and not adopt and _exists(folder / name)]
        if recorded is None and _exists(folder / MANIFEST):
            foreign.append(MANIFEST)
    if foreign:
        raise UserError(
            f"{folder / foreign[0]} was not written by this program: it is not replaced; choose another folder."
        )
    return {**claimed, **{name: None for name in names if name not in claimed}}


def claim(folder: Path, names: Iterable[str], *, adopt: bool = False) -> None:
    """Claim names in a folder for files that a program writes, replaces and deletes there; the manifest records them.

    Args:
        folder: Folder, which is created if it does not exist. It may contain other files.
        names: Names of files.
        adopt: Whether existing files of these names are known to be this project's without a record.

    Raises:
        UserError: Such a file exists without a record, or the folder is of another kind or cannot be written to.
    """
    files = check_claim(folder, tuple(names), adopt=adopt)
    if files != read_manifest(folder, OUTPUTS):
        manifest = {"format": FORMAT, "kind": OUTPUTS, "files": files}
        write_text(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock during a block. The lock is also released when the process ends in any way.

    Args:
        path: File to lock. It is created if it does not exist, and is not deleted.
        shared: Whether other processes may hold a shared lock at the same time.
        wait: Whether to wait until another process releases the lock, instead of raising. On a file system without
            locks, no note is printed.

    Raises:
        UserError: Another process holds a lock, at least one of the two is exclusive, and `wait` is False; or the file
            cannot be opened for writing.
    """
    with explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"Another process is writing into {path.parent}; wait until it ends, or choose another folder."
            ) from None
        except OSError:
            if not wait:  # which would repeat the note for each record
                log(f"note: {path} cannot be locked on its file system: start no second process with this folder.")
        yield
    finally:
        os.close(handle)


# == errors ==


@contextmanager
def explained(
    path: Path, kinds: type[Exception] | tuple[type[Exception], ...] = (OSError, RuntimeError, SafetensorError)
) -> Iterator[None]:
    """Turn the errors of these kinds that `unwritable` knows into a `UserError`.

    Pass `OSError` alone for a block that does more than write: a RuntimeError may be about anything.
    """
    try:
        yield
    except kinds as error:
        raise unwritable(path, error) or error from None


def unwritable(path: Path, error: Exception) -> UserError | None:
    """Return an error for a full disk or another system error, as Python, torch or safetensors report it.

    Torch reports a full disk and a file that is too large in the same way, which is explained as a full disk.
    """
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.EFBIG or TOO_LARGE in text:
        return UserError(
            f"Cannot write {path} ({TOO_LARGE}): its file system or `ulimit -f` allows only smaller files; choose "
            "another output folder or raise the limit; nothing was changed."
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or any(message in text for message in NO_ROOM):
        return UserError(f"There is no room left to write {path}: free some space and run again; nothing was changed.")
    if number is None:
        return None
    other = getattr(error, "filename", None)
    where = f": {other}" if other and TEMPORARY not in str(other) and str(other) != str(path) else ""
    return UserError(f"Cannot write {path} ({os.strerror(number)}{where}); choose another output folder.")


def _exists(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        OSError: It does not exist and cannot be created.
    """
    try:
        path.lstat()
        return True
    except FileNotFoundError:
        pass
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return False
