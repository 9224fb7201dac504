"""Serve a base model and a bank of Aligners over HTTP, with OpenAI's API.

Requests with different adapters share one running batch. A request's `model` is the name of an adapter, "base", or a
weighted sum such as "pirate:0.5+polite". Adapters can be added, replaced and removed while the server runs. The page at
/ is a playground.
"""

import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveFloat, PositiveInt, Quantize, Range

Port = Annotated[int, Range(least=0, most=65535)]


@dataclass
class Settings(Checked):
    may_be_empty = ("bank",)

    # == Model ==
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    bank: tuple[Path, ...] = (
        Path("aligner_weights/microworld-pirate-n1"),
        Path("aligner_weights/microworld-json-n1"),
    )  # a bank's file, or adapter files and folders, addressed by name (without a value: start with no adapters)
    prompt_style: str | None = None  # of chats: alpaca, orca, beaver, hh, plain or chat (default: each adapter's own)

    # == Address ==
    host: str = "127.0.0.1"  # address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 all network interfaces
    port: Port = 8000  # 0 is any free port
    allowed_hosts: tuple[str, ...] = ()  # host names in requests (default: this machine's; any if --host is not local)

    # == Access ==
    api_key: str | None = None  # clients must send it (default: the environment variable ALIGNER_API_KEY, else open)
    admin_token: str | None = None  # needed to change adapters (default: ALIGNER_ADMIN_TOKEN, else nobody can)

    # == Limits ==
    max_batch: PositiveInt = 64  # rows of the running batch; the KV cache is allocated for them
    max_length: PositiveInt | None = None  # tokens of a prompt with its answer (default: the model's context)
    max_new_tokens: PositiveInt = 1024  # longest answer, in tokens; also the default for requests without max_tokens
    max_waiting: PositiveInt = 256  # requests in the queue; further ones are refused
    max_connections: PositiveInt = 1024  # simultaneous connections, including idle ones
    seconds: PositiveFloat = 120.0  # time limit for an answer, including the time in the queue
    body_seconds: PositiveFloat = 10.0  # time limit for the body of a request to arrive, after its headers
    max_body_kb: PositiveInt = 256  # largest request
    max_adapter_mb: PositiveInt = 16  # largest adapter that can be added
    max_adapters: PositiveInt = 10_000  # adapters in the bank; no more can be added

    # == Device ==
    accelerator: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # of the base: 32-true, bf16-true, 16-true; auto: bf16-true on GPUs with bf16, else 32-true
    quantize: Quantize | None = None  # store the base's layers in 4 or 8 bits with bitsandbytes (default: no)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from generate.engine import Engine
from lit_llama.bank import open_bank
from lit_llama.checkpoint import weights_path
from lit_llama.compose import load_with_bank
from lit_llama.console import explain
from lit_llama.device import pick_device
from lit_llama.kv_cache import cache_dtype
from lit_llama.memory import byte_size, cache_bytes
from lit_llama.onednn import pack_
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, allow_open_files, log

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(settings: Settings) -> None:
    try:
        import uvicorn

        from generate.app import HTTPServer, make_app
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise UserError(f"The server needs {error.name}: pip install -r requirements-serve.txt.") from None
    if settings.prompt_style is not None:
        get_prompt_style(settings.prompt_style, settings.checkpoint_dir)  # raises an error if there is none
    settings = with_access(settings)
    allow_open_files(2 * settings.max_connections)  # also of connections that are refused
    listener = listen(settings.host, settings.port)
    engine = make_engine(settings)
    # clients drop idle connections after some seconds; a server that does so first makes their next request fail
    options = {"timeout_keep_alive": 60, "ws": "none"}
    options |= {"limit_concurrency": settings.max_connections + 1}  # uvicorn accepts one fewer
    options |= {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "on"}
    server = HTTPServer(uvicorn.Config(make_app(engine, settings), **options), engine)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.host not in LOCAL and settings.api_key is None:
        log(f"note: everybody who reaches {settings.host} may use this server; --api_key restricts it.")
    log(f"serving at http://{host}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])


def with_access(settings: Settings) -> Settings:
    """Return the settings, with defaults for the keys (from the environment) and for the allowed host names."""
    default_hosts = ("127.0.0.1", "localhost", "[::1]") if settings.host in LOCAL else ("*",)
    return replace(
        settings,
        api_key=settings.api_key or os.environ.get("ALIGNER_API_KEY") or None,
        admin_token=settings.admin_token or os.environ.get("ALIGNER_ADMIN_TOKEN") or None,
        allowed_hosts=tuple(map(str.lower, settings.allowed_hosts)) or default_hosts,
    )


def make_engine(settings: Settings) -> Engine:
    """Load the model and allocate the running batch.

    Raises:
        UserError: A file or setting does not fit, or the KV cache does not fit into the memory.
    """
    base = settings.checkpoint_dir
    device, dtype = pick_device(settings.accelerator, settings.precision)
    weights_path(base)  # report a missing folder rather than its missing tokenizer
    tokenizer = Tokenizer(base)
    bank = open_bank(settings.bank, base)
    model = pack_(load_with_bank(base, bank, device=device, dtype=dtype, quantize=settings.quantize))
    rows, length = settings.max_batch, min(settings.max_length or model.max_tokens, model.max_tokens)
    size = byte_size(cache_bytes(model.config, rows, length, cache_dtype(model.transformer.wte.weight)))
    try:
        engine = Engine(model, tokenizer, max_batch=rows, max_waiting=settings.max_waiting, max_length=length)
    except RuntimeError as error:
        if not explain(error):
            raise
        raise UserError(
            f"There is no memory for the KV cache: {rows} rows of {length:,} tokens take {size}; lower --max_batch or "
            "--max_length."
        ) from None
    log(f"{len(bank)} adapters; the KV cache of {rows} rows of {length:,} tokens takes {size}")
    return engine


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: The address is not this machine's, or it is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", None) and error.errno > 0 else error
        raise UserError(f"Cannot listen on {host}, port {port} ({reason}); choose another --host or --port.") from None


if __name__ == "__main__":
    cli.run(main, settings)
