"""What may be written, replaced and deleted: the only place in this project that decides it.

- A file or folder is written in a private temporary folder beside its place, synchronized with the disk and renamed.
- A file is never written through a symbolic link, and never replaces a folder, a device or a write-protected file. One
  that a flag names is replaced only with --overwrite.
- A folder is replaced only if a manifest, written with it, records everything in it as it is now.
- Nothing else is ever deleted. What a killed process left behind is rolled back by the next write into the same folder.
"""

import errno
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lit_llama.manifest import MANIFEST, find_strangers, make_manifest, remove_recorded
from lit_llama.utils import UserError

TEMPORARY = ".aligner-tmp-"  # then the process id, the host and random characters
NO_ROOM = ("No space left", "File too large", "PytorchStreamWriter", "inline_container", "iostream error")
_in_use: set[str] = set()  # names of this process's temporary folders


def check_file(path: Path, *inputs: Path | None, overwrite: bool = False) -> None:
    """Check that a file may be written. A script calls it before its work for each file that a flag names.

    Args:
        path: File to write.
        inputs: Files and folders that are read; `path` must not be one of them.
        overwrite: Whether a file that exists may be replaced.

    Raises:
        UserError: The file exists and may not be replaced, or cannot be written.
    """
    path, problem = Path(path), ""
    with _explained(path):
        if _exists(path):
            if path.is_symlink() or not path.is_file():
                problem = "is not a regular file; name another one"
            elif not overwrite:
                problem = "exists; replace it with --overwrite true, or name another file"
            elif not os.access(path, os.W_OK):
                problem = "is write-protected; name another file"
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
    with _staged(path) as new:
        yield new
        _settle(new)
        check_file(path, overwrite=overwrite)
        os.replace(new, path)
        _synchronize(path.parent)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(path, overwrite=overwrite) as new:
        new.write_text(text, encoding="utf-8")


def check_folder(path: Path, kind: str, *inputs: Path | None) -> None:
    """Check that a folder may be written: that it is new, or empty, or one of this kind that this project wrote.

    Args:
        path: Folder to write. A symbolic link to a folder, if it is the user's own, stays one.
        kind: What the folder holds, such as "prepared dataset"; a folder of another kind is not replaced.
        inputs: Files and folders that are read; none may be `path` or lie in it.

    Raises:
        UserError: The folder holds anything else, or an input, or cannot be written.
    """
    path, problem = Path(path), ""
    with _explained(path):
        if _exists(path):
            if path.is_symlink() and path.lstat().st_uid != os.geteuid():
                problem = "is a symbolic link of another user"
            elif not path.is_dir():
                problem = "is not a folder"
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

    The folder that was there is renamed aside, the new one is renamed to its place, and the recorded files of the old
    one are removed. After a kill between the renames, the next write into the parent folder puts the old one back.

    Raises:
        UserError: As `check_folder`, or the disk is full. Nothing was changed.
    """
    check_folder(path, kind)
    path = Path(path).resolve()
    with _staged(path) as new:
        new.mkdir()
        yield new
        (new / MANIFEST).write_text(make_manifest(new, kind), encoding="utf-8")
        _settle(new)
        check_folder(path, kind)
        if path.exists():
            old = new.parents[1] / "old" / path.name
            old.parent.mkdir()
            os.rename(path, old)
        os.rename(new, path)
        _synchronize(path.parent)


def check_separate(output: Path, *inputs: Path | None) -> None:
    """Check that an existing output is none of the inputs and holds none of them, also by way of links.

    Raises:
        UserError: It is or does.
    """
    for source in filter(None, inputs):
        resolved = Path(source).resolve()
        if any(path.exists() and output.exists() and path.samefile(output) for path in (resolved, *resolved.parents)):
            raise UserError(f"Writing {output} would replace {source}, which is read; choose another output.")


# == temporary folders ==


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new temporary folder beside `path`, and remove that folder afterwards."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{platform.node()}-{secrets.token_hex(8)}"
    with _explained(path):
        made = [folder for folder in path.parents if not folder.exists()]
        _in_use.add(temporary.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _recover(path.parent)
            temporary.mkdir(0o700)
            (temporary / "new").mkdir()
            yield temporary / "new" / path.name
        finally:
            _close(temporary)
            _in_use.discard(temporary.name)
            with suppress(OSError):
                for folder in made:  # stays if something was written to it
                    folder.rmdir()


def _close(temporary: Path) -> None:
    """Put back a folder that was renamed aside and not replaced, and remove the temporary folder."""
    for old in (temporary / "old").glob("*"):
        if os.path.lexists(place := temporary.parent / old.name):
            remove_recorded(old)
        else:
            os.rename(old, place)
    shutil.rmtree(temporary / "new", ignore_errors=True)
    for folder in (temporary / "old", temporary):
        with suppress(OSError):
            folder.rmdir()


def _recover(folder: Path) -> None:
    """Do the same with the temporary folders in a folder that killed processes of this user left."""
    for temporary in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            about = temporary.lstat()
            private = about.st_uid == os.geteuid() and about.st_mode & 0o077 == 0
            if stat.S_ISDIR(about.st_mode) and private and _is_abandoned(temporary.name):
                _close(temporary)


def _is_abandoned(name: str) -> bool:
    """Return whether the process that made a temporary folder on this host has ended."""
    match = re.fullmatch(re.escape(TEMPORARY) + r"(\d{1,9})-(.*)-[0-9a-f]{16}", name)
    if match is None or match[2] != platform.node():
        return False
    if int(match[1]) == os.getpid():
        return name not in _in_use
    try:
        os.kill(int(match[1]), 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _settle(path: Path) -> None:
    """Give a new file, or all files of a new folder, the usual permissions, and write them to the disk."""
    mode = path.parent.stat().st_mode & 0o666  # that of a folder just made; safetensors makes its files private
    for item in (path, *path.rglob("*")):
        if item.is_file():
            item.chmod(mode)
        _synchronize(item)


def _synchronize(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some filesystems cannot synchronize folders
            raise
    finally:
        os.close(handle)


# == errors ==


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise unwritable(path, error) or error from None


def unwritable(path: Path, error: Exception) -> UserError | None:
    """Return a sentence for a full disk or another error of the system, as Python, torch or safetensors report it."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(message in text for message in NO_ROOM):
        return UserError(f"There is no room left to write {path}: free some space and run again; nothing was changed.")
    if number is None:
        return None
    other = getattr(error, "filename", None)
    where = f": {other}" if other and TEMPORARY not in str(other) and str(other) != str(path) else ""
    return UserError(f"Cannot write {path} ({os.strerror(number)}{where}); choose another output folder.")


def _exists(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        OSError: It does not and cannot be made.
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
