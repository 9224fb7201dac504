"""Console output: text that cannot control the terminal, one clear sentence for an error, and an exit code."""

import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from errno import EACCES, ELOOP, ENAMETOOLONG, EPERM
from types import FrameType, TracebackType
from typing import Any, TextIO, TypeVar

from lit_llama.storage.schema import unreadable
from lit_llama.utils import UserError, log, printable

CLOSED_PIPE = 141  # the exit code that a shell reports for a program ended by SIGPIPE
SECONDS_TO_END = 0.2  # time that a worker of `signals_to_first_process` has after SIGTERM

T = TypeVar("T")

_signals_to_first_process = threading.Event()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: a similar name, if there is one, and the punctuation."""
    by_name = {other.lstrip("-"): other for other in known}
    near = get_close_matches(name.lstrip("-"), by_name, 1)
    return f"; did you mean {by_name[near[0]]}?" if near else "."


class Output:
    """Standard output or standard error.

    Text is written to a pipe or a file unchanged, in UTF-8. On a terminal, standard output shows control characters as
    escape sequences, because prompts, answers and file headers may come from untrusted sources. (`log` does the same
    for standard error, where progress bars move the cursor.) A closed pipe ends the process quietly. A full disk is an
    error for standard output, and is ignored for standard error.
    """

    def __init__(self, stream: TextIO | None, is_result: bool) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream
        self.is_result = is_result
        self.escapes = is_result and self.stream.isatty()
        if hasattr(self.stream, "reconfigure"):
            encoding = self.stream.encoding if self.stream.isatty() else "utf-8"
            self.stream.reconfigure(encoding=encoding, errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._explained():
            self.stream.write(printable(text) if self.escapes else text)
        return len(text)

    def flush(self) -> None:
        with self._explained():
            self.stream.flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # discard what is buffered
            if isinstance(error, BrokenPipeError):
                sys.exit(CLOSED_PIPE)
            if self.is_result:
                raise UserError(f"Cannot write to standard output ({os.strerror(error.errno)}).") from None


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error of torch.distributed means that another process has ended; gloo has no type for it."""
    return type(error).__name__ == "DistBackendError" or "/gloo/transport/" in str(error)


def is_first_process() -> bool:
    """Return whether this process is the first one of a run on its machine, which reports an error that all have.

    torchrun and Lightning number the processes of a run. SLURM also numbers independent tasks, so its number counts
    only after the processes of the run have found each other.
    """
    distributed = sys.modules.get("torch.distributed")
    if "WORLD_SIZE" in os.environ:
        rank = os.environ.get("LOCAL_RANK", "0")
    elif distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank = os.environ.get("SLURM_LOCALID", "0")
    else:
        rank = "0"
    return rank == "0" or not rank.isdecimal()


def hide_interrupts() -> None:
    """Let Ctrl-C end the process without a traceback while modules are imported, which takes seconds."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = hook


def explain(error: Exception) -> str:
    """Return a sentence for a system error that can occur anywhere; empty for a bug of this project."""
    if isinstance(error, OSError) and error.filename and error.errno in (EACCES, EPERM, ENAMETOOLONG, ELOOP):
        return str(unreadable(error.filename, error))  # raised while checking whether a file exists
    if isinstance(error, UnicodeError) and getattr(error, "encoding", "") == sys.getfilesystemencoding() != "utf-8":
        text = error.object[error.start : error.start + 40]
        return f"{text!a} in the name or content of a file is outside this locale, which is ASCII; set PYTHONUTF8=1."
    if type(error).__name__ == "OutOfMemoryError":
        return "The GPU's memory is full; lower the batch size or the sequence length, or use fewer bits."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "The memory is full; lower the batch size or the sequence length, or use a smaller model."
    return ""


def ends_at_once() -> Callable[..., None]:
    """Return a signal handler that ends the process at once, but does nothing within a second from now.

    Some programs signal a process and then its group; the two signals are one request.
    """
    began = time.monotonic()

    def end(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return end


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process like `sys.exit`, so that its child processes and temporary files are cleaned up."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, ends_at_once())
        sys.exit(128 + signal.SIGTERM)

    in_main_thread = threading.current_thread() is threading.main_thread()
    default = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_to_first_process() -> Iterator[None]:
    """Let processes forked in this context leave Ctrl-C and SIGTERM to this process, which then ends them.

    If a worker dies while it holds a lock, its pool waits for the lock forever. So workers ignore SIGINT from the
    start, and SIGTERM ends them only after `SECONDS_TO_END`, in which the pool takes the lock.
    """
    if hasattr(os, "register_at_fork"):
        _register_fork_hooks()
    _signals_to_first_process.set()
    try:
        yield
    finally:
        _signals_to_first_process.clear()


@functools.cache  # hooks cannot be removed
def _register_fork_hooks() -> None:
    """Change the signal handlers of a new process before any signal reaches it."""
    both, masks = {signal.SIGINT, signal.SIGTERM}, threading.local()

    def block() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, both)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def in_child() -> None:
        if _signals_to_first_process.is_set():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_END))
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=in_child)


def end_on_interrupt() -> None:
    """Let Ctrl-C end this worker process at once and without a traceback; the first process reports it."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its default is shared by processes, and Python reports that it is not released
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def transient_bar(items: Sequence[T], desc: str, unit: str) -> Iterable[T]:
    """Return the items, on a terminal with a progress bar that appears after two seconds and disappears at the end."""
    from tqdm import tqdm  # `--help` does not wait for it

    hidden = not (is_first_process() and sys.stderr.isatty())
    return tqdm(items, desc=desc, unit=unit, delay=2, leave=False, dynamic_ncols=True, disable=hidden)


def last_words(text: str) -> None:
    """Print a message on its own line, after closing unfinished progress bars."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()
    log(text)


def call(command: list[str], **options: Any) -> int:
    """Run a command and return its exit code. SIGTERM is passed on to it, and ends this process after it.

    Args:
        options: of `subprocess.Popen`.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and the command, which gets it too, has ended.
    """
    process, terminated = subprocess.Popen(command, **options), threading.Event()

    def pass_on(*_: Any) -> None:
        terminated.set()
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # `subprocess.run` would kill it
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if terminated.is_set():
        signal.raise_signal(signal.SIGTERM)
    return code


def quiet_lightning() -> None:
    """Hide Lightning's advice, which is for authors of training loops. Importing Lightning afterwards undoes this."""
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a permission error, Ctrl-C or a full GPU into one line on stderr and an exit code.

    Other exceptions are bugs of this project and keep their traceback.
    """
    quiet_lightning()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional parts that are only faster
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # rejected where it is used as text
    with _ended_by_sigterm(), redirect_stdout(Output(sys.stdout, True)), redirect_stderr(Output(sys.stderr, False)):
        try:
            try:
                yield
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except UserError as error:
            if is_first_process():
                last_words(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt:
            last_words("interrupted")
            sys.exit(130)
        except Exception as error:
            if is_lost_connection(error):
                last_words("error: Another process of this run ended; it printed the reason, or it was killed.")
                with suppress(UserError, SystemExit):
                    sys.stdout.flush()
                os._exit(1)  # the threads of torch.distributed would abort a usual exit
            if not (sentence := explain(error)):
                raise
            last_words(f"error: {sentence}")
            sys.exit(1)
        finally:
            with suppress(UserError, SystemExit):  # the exit code is already set
                sys.stdout.flush()
