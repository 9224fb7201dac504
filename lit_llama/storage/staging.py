"""Temporary folders: outputs appear as a unit, and leftovers of killed processes are cleaned up.

    .aligner-tmp-PID-HOST-RANDOM/new/NAME       the file or folder NAME until it is complete
    .aligner-tmp-PID-HOST-RANDOM/old/NAME       the folder that NAME replaces, until its files are removed

They are next to the file or folder, only their user can open them, and their names are unpredictable. Their process
holds a lock on them, because its id means nothing in another container, where it would seem to have ended.
"""

import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lit_llama.storage.manifest import remove_recorded

TEMPORARY = ".aligner-tmp-"
_in_use: set[str] = set()  # names of this process's temporary folders


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new temporary folder next to `path`, and remove that folder afterwards."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{platform.node()}-{secrets.token_hex(8)}"
    made = [folder for folder in path.parents if not folder.exists()]
    _in_use.add(temporary.name)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _recover(path.parent)
            temporary.mkdir(0o700)
            stack.enter_context(_locked(temporary))
            (temporary / "new").mkdir()
            yield temporary / "new" / path.name
        finally:
            _close(temporary)
            _in_use.discard(temporary.name)
            with suppress(OSError):
                for folder in made:  # a folder stays if something was written to it
                    folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder during a block, if its file system has locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise
        yield
    finally:
        os.close(handle)


def _close(temporary: Path) -> None:
    """Restore a folder that was moved aside and not replaced, and remove the temporary folder."""
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
    """Close the temporary folders that killed processes of this user left in a folder."""
    for temporary in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            about = temporary.lstat()
            private = about.st_uid == os.geteuid() and about.st_mode & 0o077 == 0
            if stat.S_ISDIR(about.st_mode) and private and _is_abandoned(temporary.name):
                with _locked(temporary):
                    _close(temporary)


def _is_abandoned(name: str) -> bool:
    """Return whether the process that made a temporary folder on this host has ended, as far as its id shows."""
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


def settle(path: Path) -> None:
    """Give a new file, or all files of a new folder, the usual permissions, and sync them to the disk.

    On a file system that determines the permissions itself, such as CIFS or FAT, files keep those that they have.
    """
    mode = path.parent.stat().st_mode & 0o666  # the mode of a new folder; safetensors makes its files private
    for item in (path, *path.rglob("*")):
        if item.is_file() and item.stat().st_mode & 0o777 != mode:
            with suppress(PermissionError):
                item.chmod(mode)
        synchronize(item)


def synchronize(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some filesystems cannot synchronize folders
            raise
    finally:
        os.close(handle)
