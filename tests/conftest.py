"""Fixtures: a tiny base model and datasets as files, created once, and real models and data where available."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny; subprocesses inherit this, and what follows
os.environ["CUDA_VISIBLE_DEVICES"], os.environ["DISABLE_MPS"] = "", "1"  # run on the CPU, also where there is a GPU
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the servers of the tests listen

import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, field, fields, make_dataclass
from http.server import ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import sentencepiece
import torch
from hub_server import Hub
from huggingface_hub import constants
from hypothesis import settings
from preloaded import Preloaded

from lit_llama.checkpoint import TOKENIZER_NAME, save_base
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prepare import prepare_preferences, prepare_sft
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from microworld.world import World
from studies.trials import Trial, prepare_run

ROOT = Path(__file__).parents[1]

settings.register_profile("any machine", deadline=None)  # a slow machine must not fail tests
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def unchanged_number_of_threads():
    """Restore the number of threads after each test: benchmarks set it, and rounding in training depends on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer_path) -> Path:
    """Save a base model (3 layers, 4 heads, 2 key/value heads, width 32, random weights) and return its folder."""
    folder = tmp_path_factory.mktemp("base")
    config = LLaMAConfig(
        block_size=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=48
    )
    network, generator = LLaMA(config), torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + 0.2 * noise if name.endswith("scale") else 0.2 * noise
    save_base(folder, config, network.state_dict())
    shutil.copy(tokenizer_path, folder / TOKENIZER_NAME)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, tokenizer) -> Path:
    """Prepare an SFT dataset, 41 rows of varying length for training and 5 for validation, and return its folder."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data") / "animals"
    things = ["the cat", "the dog", "the rat", "the hat", "a mat"]
    pairs = [(rng.choice(things), " and ".join(rng.sample(things, rng.randint(1, 4)))) for _ in range(46)]
    prepare_sft(
        pairs,
        lambda pair, number: (f"{number} what did {pair[0]} eat?", f" {pair[0]} ate {pair[1]}"),
        output_dir=folder,
        tokenizer=tokenizer,
        max_seq_length=60,
        mask_prompt=True,
        test_fraction=0.11,
        seed=0,
        num_proc=1,
        about={"source": "animals", "repo_id": "me/animals", "revision": "v1", "prompt_style": "plain"},
    )
    return folder


@pytest.fixture(scope="session")
def preference_dir(tmp_path_factory, tokenizer) -> Path:
    """Prepare a preference dataset, 20 pairs of varying length for training and 6 for validation; return its folder."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data") / "preferences"
    things = ["the cat", "the dog", "the rat", "the hat", "a mat"]
    texts = [(t, " and ".join(rng.sample(things, rng.randint(1, 4)))) for t in things for _ in range(6)][:26]
    prepare_preferences(
        texts,
        lambda row, number: (f"what did {row[0]} eat?", f" {row[0]} ate {row[1]}", f" {row[1]}, said {row[0]}"),
        output_dir=folder,
        tokenizer=tokenizer,
        max_seq_length=62,
        test_fraction=0.2,
        seed=0,
        num_proc=1,
        about={"source": "preferences", "prompt_style": "plain"},
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """Train a LLaMA-like tokenizer: decoding restores the exact text, and unknown characters become bytes."""
    text = ["the cat sat on the mat and the dog ate the hat", "Below is an instruction. Write a response."]
    path = tmp_path_factory.mktemp("tokenizer") / TOKENIZER_NAME
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text * 20),
            model_writer=file,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real models and data, next to the project's folder."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder of real models and data is absent")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    """Start a local server in place of the Hugging Face Hub, with a token that may write, and return its class."""

    class Server(Hub):
        repositories, private, failures, objects, asked = {}, set(), {}, {}, []

    Server.tokens = {"hf_writer": "write", "hf_reader": "read"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # use Git LFS; the server does not simulate Xet
    yield Server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def free_port() -> int:
    """Return a port on which a process that the test starts can listen.

    It is below those that the system assigns to other sockets, and in a range of this pytest process, so that it is
    still free when the process needs it.
    """

    def is_free(port: int) -> bool:
        try:
            with socket.create_server(("127.0.0.1", port)):
                return True
        except OSError:
            return False

    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    ports = range(10_000 + 1000 * worker, 11_000 + 1000 * worker)
    return next(filter(is_free, random.SystemRandom().sample(ports, len(ports))))


@pytest.fixture
def fixed_rates(monkeypatch) -> None:
    """Replace the measurements of how fast this machine copies and multiplies, which take seconds on some CPUs."""
    rates = {"matmul_rate": lambda device, dtype, clock: {4: 195e9, 2: 429e9}[dtype.itemsize],
             "copy_bandwidth": lambda device, clock: 33.6e9}  # fmt: skip
    for module, names in {"measure": rates, "harness": rates, "training": ["matmul_rate"],
                          "generation": ["copy_bandwidth"]}.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(f"benchmarks.{module}.{name}", rates[name])


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """Return the path of an interpreter that starts at once, with the heavy modules imported."""
    with Preloaded() as server:
        yield server.python


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a script as from the command line: run_script("scripts/x.py", *arguments) -> (exit code, stdout, stderr)."""

    def run(script: str, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(run_script) -> Callable[..., str]:
    """Like `run_script`, for a call that must fail with exit code 1 and a one-sentence error, which is returned."""

    def run(script: str, *arguments: object) -> str:
        code, out, err = run_script(script, *arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and err.endswith((".\n", "?\n")) and err.count("\n") == 1, err
        return err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """Call a function that must raise a UserError or reject its command line, and return the error message."""

    def sentence(function: Callable, *args: object) -> str:
        with pytest.raises((UserError, SystemExit)) as error:
            function(*args)
        if error.type is UserError:
            return str(error.value)
        assert error.value.code in (1, 2)
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    return sentence


@pytest.fixture
def error_for_another_user() -> Callable[[str, str, int], tuple[Path, str]]:
    """Return a function that runs code on a file of this user as another user, and returns the file and the error.

    The file has the given mode; its folder is readable for all. The modules are imported before the user changes.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def run(imports: str, use: str, mode: int) -> tuple[Path, str]:
        code = (
            f"import os, sys; from pathlib import Path; {imports}\n"
            "path = Path(sys.argv[1])\n"
            "os.setuid(65534)\n"
            f"try: {use}\n"
            "except ValueError as error: print(error)"
        )
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            path = Path(folder, "a.json")
            path.write_text("{}")
            path.chmod(mode)
            result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
        return path, result.stdout

    return run


@pytest.fixture
def left_to_defaults(monkeypatch) -> Callable[..., set[str]]:
    """Change the defaults of all finetuning scripts; return a function that lists the settings a trial takes from them.

    Settings that change neither weights nor losses are ignored.
    """
    for path in sorted((ROOT / "finetune").glob("[!_]*.py")):
        script = importlib.import_module(f"finetune.{path.stem}")
        edited = [(f.name, f.type, field(default="edited by a user")) for f in fields(script.Settings)]
        namespace = {"may_change": script.Settings.may_change}
        monkeypatch.setattr(script, "Settings", make_dataclass("Settings", edited, namespace=namespace))

    def left(trial: Trial, folder: Path) -> set[str]:
        settings = prepare_run(trial, folder)[1]
        defaults = {name for name, value in asdict(settings).items() if value == "edited by a user"}
        of_method = {f.name for f in fields(METHODS[trial.variant.method].config_class)}
        of_method -= {f.name for f in fields(LLaMAConfig)}
        unstated = of_method - asdict(settings).keys() - (getattr(settings, "method_config", None) or {}).keys()
        return (defaults | unstated) - set(settings.may_change)

    return left
