"""Run the demo, the tests or a script in this repository's virtual environment (.venv), which the first run creates.

    python3 scripts/run.py demo              finetune the bundled model and write a report
    python3 scripts/run.py test              run all tests
    python3 scripts/run.py SCRIPT [ARG …]    run a script, such as generate/aligner.py --interactive
    python3 scripts/run.py --cpu demo        the same, but if .venv has no PyTorch yet, install it without CUDA

Relative paths refer to the repository, not to the current folder. Requires only Linux or macOS (on Windows, WSL) and
Python 3.10 or newer. On Linux the default build of PyTorch includes 5 GB of CUDA libraries; the build without CUDA is
not on every package index.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

# here, because an older Python cannot evaluate the annotations below
if sys.version_info < (3, 10):  # noqa: UP036  (this script is what an older Python would run)
    sys.exit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")

ROOT = Path(__file__).parent.parent.resolve()
ENV = ROOT / ".venv"
PYTHON = ENV / "bin/python"
MARKER = ENV / "made-by-run"  # written first, so that an incomplete environment is known to be this script's
LOCK = ROOT / ".venv.lock"  # held while the environment is changed


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def make_environment() -> None:
    """Create an empty virtual environment with pip."""
    is_empty = ENV.is_dir() and not any(ENV.iterdir())
    if os.path.lexists(ENV) and not is_empty and not MARKER.exists() and not any(ENV.glob("installed-*")):
        stop(f"{ENV} has no bin/python and was not made by this script; move it away and run again.")
    print(f"making a virtual environment in {ENV}", file=sys.stderr)
    shutil.rmtree(ENV, ignore_errors=True)
    ENV.mkdir(exist_ok=True)
    MARKER.touch()
    try:
        import ensurepip  # noqa: F401  (Debian has it in another package)
    except ImportError:
        if not (shutil.which("apt-get") and os.geteuid() == 0):
            stop("This Python cannot create virtual environments; run: sudo apt-get install python3-venv")
        print("installing Debian's python3-venv", file=sys.stderr)
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=sys.stderr)
        subprocess.run(["apt-get", "install", "-q", "-y", "python3-venv"], check=True, stdout=sys.stderr)
        # only a new interpreter finds the package
        subprocess.run([sys.executable, "-m", "venv", str(ENV)], check=True)
        return
    venv.create(ENV, with_pip=True, symlinks=True)


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of the environment, which another process of this script may have first."""
    import fcntl  # does not exist on Windows

    with open(LOCK, "w") as file:
        with suppress(OSError):  # the file system has no locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that changes {ENV}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(requirements: list[str], cpu: bool = False) -> None:
    """Install requirement files at the pinned versions, unless they are installed already.

    Args:
        requirements: Names of the files.
        cpu: Install the build of torch without CUDA. It does not replace an installed build with CUDA.
    """
    files = [ROOT / name for name in [*requirements, "requirements-serve.txt", "constraints.txt"]]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    stamp = ENV / f"installed-{requirements[-1]}"

    def is_installed() -> bool:
        return PYTHON.exists() and stamp.exists() and stamp.read_text() == digest

    if is_installed():
        return
    with locked():
        if not is_installed():  # another process may have done it meanwhile
            change_environment(requirements, cpu)
            stamp.write_text(digest)


def change_environment(requirements: list[str], cpu: bool) -> None:
    """Create the environment if there is none, and install requirement files; see `install`."""
    if not PYTHON.exists():
        make_environment()
    elif subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode:
        # creating it was interrupted, or another program made it without pip
        if subprocess.run([str(PYTHON), "-m", "ensurepip", "-q"], stdout=sys.stderr).returncode:
            stop(f"{ENV} has no pip; delete this folder and run again.")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # torch first and alone: the other packages then accept the installed build
    installed = [path.name for path in ENV.glob("lib/python*/site-packages/torch-*.dist-info")]
    with_cuda = any("+cpu" not in name for name in installed)
    torch = cpu_build() if cpu and sys.platform == "linux" and not with_cuda else "torch"
    for what in ([torch], [x for name in requirements for x in ("-r", str(ROOT / name))]):
        print(f"installing {' '.join(Path(w).name for w in what if w != '-r')}", file=sys.stderr, flush=True)
        if subprocess.run([*pip, "-q", *constraints, *what], stdout=sys.stderr).returncode:
            if "+cpu" in what[0]:
                stop(
                    "pip found no torch without CUDA; add PyTorch's own index to pip's extra-index-url, or omit --cpu."
                )
            stop("pip could not install the requirements (see above); check the network and run again.")


def cpu_build() -> str:
    """Return the requirement for the pinned torch version without CUDA."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch==")) + "+cpu"


def scripts() -> dict[str, Path]:
    """Return all scripts by their path in the repository."""
    paths = {}
    for folder in ("finetune", "generate", "scripts", "evaluate", "microworld", "studies", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if not path.samefile(__file__) and "\n    cli.run(main" in path.read_text(encoding="utf-8"):
                paths[f"{folder}/{path.name}"] = path
    return paths


def overview() -> str:
    """Return the usage, and a list of all scripts with the first sentence of each."""
    sys.path.append(str(ROOT))
    from lit_llama.command import first_sentence

    lines = [f"    {name}\n        {first_sentence(path)}" for name, path in scripts().items()]
    return "\n".join([f"{__doc__}\nScripts:\n", *lines])


def main() -> None:
    """Run the command line; report Ctrl-C, a failing command and a folder without access in one line."""
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        stop(f"This command failed: {shlex.join(map(str, error.cmd))}")
    except OSError as error:
        stop(f"{error.filename or ROOT} cannot be read or written ({error.strerror or error}).")


def run() -> None:
    if os.name == "nt":
        stop("Windows is not supported; use the Windows Subsystem for Linux (WSL).")
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    cpu = sys.argv[1] == "--cpu"
    what, *arguments = sys.argv[1 + cpu :] or ["demo"]
    if what in ("demo", "test") and "--cpu" in arguments:  # neither has such a flag
        arguments.remove("--cpu")
        cpu = True
    requirements = ["requirements.txt"] + ["requirements-dev.txt"] * (what == "test")
    if what == "demo":
        command = ["scripts/demo.py", *arguments]
    elif what == "test":
        command = ["-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal", *arguments]
    elif (ROOT / what).is_file():
        command = [what, *arguments]
    else:
        near = get_close_matches(what, ["demo", "test", *scripts()], 1)
        stop(f"There is no script {what}; {f'did you mean {near[0]}?' if near else '--help lists all.'}")
    install(requirements, cpu)
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execv(str(PYTHON), [str(PYTHON), *command])  # signals then reach the script itself


if __name__ == "__main__":
    main()
