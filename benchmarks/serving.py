"""The server under load: throughput and time to the first token with many adapters, or 10,000 checked answers.

--mode speed: 64 clients with 64 different adapters, 64 clients with one adapter, and one client that sends one question
at a time; the three take turns.

--mode stress: --requests requests, a third of them canceled or malformed; each answer is compared with that of
lit_llama.generation.instruct for its adapter. At the end, no row may be in use, and the number of the server's open
files may not have grown; its memory is reported.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from benchmarks.settings import BenchmarkSettings
from lit_llama import cli
from lit_llama.settings import PositiveInt


@dataclass
class Settings(BenchmarkSettings):
    # == What to measure ==
    mode: Literal["speed", "stress"] = "speed"  # throughput, or correctness of every answer under load and bad requests
    clients: PositiveInt = 64  # clients at the same time, and adapters in mode "speed"
    requests: PositiveInt = 10_000  # requests in mode "stress"
    requests_per_client: PositiveInt = 4  # requests in each turn of mode "speed"


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import harness as b
from benchmarks.material import MICROWORLD, dtype_name
from benchmarks.measure import compare, number, with_interval
from lit_llama.bank import Bank, open_bank
from lit_llama.checkpoint import AdapterFile
from lit_llama.compose import load_with_bank, parse_sum
from lit_llama.device import pick_device
from lit_llama.generation import Sampling, instruct
from lit_llama.prompts import get_prompt_style
from lit_llama.tables import markdown_table
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from microworld.world import UNSEEN, World

BUNDLED = MICROWORLD.parents[1] / "aligner_weights"
NEW_TOKENS = 24  # longest answer
KEY = "benchmark"


# == the server and its clients ==


@dataclass
class Server:
    """A running server; the settings give its device, threads and number of clients."""

    bank: Path
    settings: Settings
    process: subprocess.Popen = field(init=False)
    url: str = field(init=False)

    def __enter__(self) -> "Server":
        script = Path(__file__).parents[1] / "generate" / "serve.py"
        clients, threads = self.settings.clients, self.settings.threads
        command = [sys.executable, script, "--port", "0", "--checkpoint_dir", MICROWORLD, "--bank", self.bank]
        command += ["--accelerator", self.settings.accelerator, "--precision", self.settings.precision]
        # also for requests that were just canceled; for 64 clients, the server's defaults
        command += ["--max_waiting", str(4 * clients), "--max_connections", str(16 * clients)]
        environment = {**os.environ, "ALIGNER_API_KEY": KEY}
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        line = "it wrote nothing"
        for line in self.process.stderr:
            if "serving at" in line:
                self.url = line.split()[-1]
                Thread(target=lambda: sys.stderr.writelines(self.process.stderr), daemon=True).start()
                return self
        self.process.wait()
        raise UserError(f"The server did not start: {line.strip().removeprefix('error: ')}")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """Return the server's resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def connect(server: Server) -> Any:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=300)


def chat(model: str, question: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS, **options}


@dataclass
class Reply:
    """A streamed answer: its text, tokens, and seconds until its first part."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0


async def ask(http: Any, body: dict[str, Any], parts: int | None = None) -> Reply:
    """Return a streamed answer; close the connection after `parts` parts."""
    began, reply, n = time.perf_counter(), Reply(), 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if n == parts:
                break
            if not line.startswith("data: {"):
                continue
            n, part = n + 1, json.loads(line[6:])
            if part["choices"]:
                reply.first = reply.first or time.perf_counter() - began
                reply.text += part["choices"][0]["delta"].get("content", "")
            else:
                reply.tokens = part["usage"]["completion_tokens"]
    return reply


async def share(work: list[Callable[[], Coroutine]], clients: int) -> list[Any]:
    """Run all work with `clients` clients at a time, and return the results."""
    free = asyncio.Semaphore(clients)

    async def run(task: Callable[[], Coroutine]) -> Any:
        async with free:
            return await task()

    return await asyncio.gather(*map(run, work))


# == speed ==


def make_adapters(settings: Settings) -> tuple[Path, list[str]]:
    """Write a bank of adapters whose answers have similar lengths, and return it with their names."""
    bundled = open_bank([BUNDLED / "microworld-pirate-n1"], MICROWORLD)
    pirate = bundled.adapter("microworld-pirate-n1")
    bank, names = Bank(bundled.config, MICROWORLD), [f"pirate-{i}" for i in range(settings.clients)]
    for name, strength in zip(names, np.linspace(0.9, 1.1, len(names)), strict=True):
        state = {key: t * float(strength) if "gating" in key else t for key, t in pirate.state.items()}
        bank.add(name, AdapterFile(state, pirate.meta, Path(name)))
    path = settings.out_dir / "serving-bank.safetensors"
    bank.save(path)
    return path, names


def measure_speed(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the parts of the report, and no problems."""
    path, names = make_adapters(settings)
    questions = [q.text for q in World(0).questions(UNSEEN) if q.text.startswith("What")]
    count = settings.clients * settings.requests_per_client
    kinds = {
        f"{settings.clients} clients, {settings.clients} adapters": (settings.clients, names, count),
        f"{settings.clients} clients, one adapter": (settings.clients, names[settings.clients // 2 :][:1], count),
        "one client, one by one": (1, names, max(1, settings.clients // 4)),
    }
    with Server(path, settings) as server:
        turns = {}
        for kind, (clients, models, n) in kinds.items():
            bodies = [chat(models[i % len(models)], questions[i % len(questions)]) for i in range(n)]
            turns[kind] = partial(load, server, bodies, clients)
        loads = b.take_turns(turns, settings.rounds, [])[1]
    rates = {kind: [turn.tokens / turn.seconds for turn in answers] for kind, answers in loads.items()}
    cpu = {kind: [turn.tokens / turn.used for turn in answers] for kind, answers in loads.items()}
    first = {kind: [seconds for turn in answers for seconds in turn.first] for kind, answers in loads.items()}
    rows, reference = [], list(kinds)[1]
    for kind in kinds:
        p50, p95 = (number(1000 * np.quantile(first[kind], q)) for q in (0.5, 0.95))
        ratios = ["1", "1"] if kind == reference else [compare(r[kind], r[reference])[0] for r in (rates, cpu)]
        cells = [with_interval(rates[kind]), ratios[0], with_interval(cpu[kind]), ratios[1], p50, p95]
        rows.append([kind, *cells])
    many, _, one = list(kinds)
    gains = [compare(r[many], r[one])[0] for r in (rates, cpu)]
    header = ["load", "tokens/s", "ratio to one adapter", "tokens per processor second", "ratio to one adapter",
              "ms to the first token, median", "95th percentile"]  # fmt: skip
    return [
        f"Answers of up to {NEW_TOKENS} tokens, streamed, greedy; {settings.rounds} rounds. The clients run on the "
        "same cores. Processor seconds are the server's.",
        markdown_table(header, rows),
        f"With {settings.clients} clients and adapters, {gains[0]} times the tokens/s of one by one, and {gains[1]} "
        "times the tokens per processor second.",
    ], []


@dataclass
class Load:
    """Tokens of a turn, its seconds, the server's processor seconds, and seconds to the first part of each answer."""

    tokens: int
    seconds: float
    used: float
    first: list[float]


def load(server: Server, bodies: list[dict[str, Any]], clients: int) -> Load:
    """Let clients send requests, and measure them."""
    before, began = server.processor_seconds(), time.perf_counter()
    replies = asyncio.run(run_all(server, bodies, clients))
    seconds, used = time.perf_counter() - began, server.processor_seconds() - before
    return Load(sum(reply.tokens for reply in replies), seconds, used, [reply.first for reply in replies])


async def run_all(server: Server, bodies: list[dict[str, Any]], clients: int) -> list[Reply]:
    async with connect(server) as http:
        return await share([lambda body=body: ask(http, body) for body in bodies], clients)


# == stress ==


def known_answers(
    settings: Settings, bank: Bank, models: list[str], questions: list[str]
) -> dict[tuple[str, str], str]:
    """Return the correct answer of each model to each question."""
    device, dtype = pick_device(settings.accelerator, settings.precision)
    network = load_with_bank(MICROWORLD, bank, device=device, dtype=dtype)
    tokenizer, style = Tokenizer(MICROWORLD), get_prompt_style("alpaca")
    pairs = [(model, question) for model in models for question in questions]
    adapters, texts = [parse_sum(model, bank) for model, _ in pairs], [question for _, question in pairs]
    answers = instruct(network, tokenizer, texts, style, Sampling(NEW_TOKENS), batch_size=64, adapters=adapters)
    return dict(zip(pairs, answers, strict=True))


def malformed(rng: random.Random, model: str, question: str) -> tuple[dict[str, Any], int]:
    """Return the arguments of a request that must be rejected, and the expected HTTP status."""
    good, json_type = chat(model, question), {"Content-Type": "application/json"}
    cases = [
        ({"json": {**good, "model": f"{model}x+{model}"}}, 404),
        ({"json": {**good, "temperature": -1}}, 400),
        ({"json": {**good, "messages": []}}, 400),
        ({"json": {**good, "tools": [1]}}, 400),
        ({"json": chat(model, question * 50)}, 400),
        ({"content": json.dumps(good)[:-9].encode(), "headers": json_type}, 400),
        ({"content": rng.randbytes(200), "headers": json_type}, 400),
        ({"content": b"x" * 300_000, "headers": json_type}, 413),
        ({"json": good, "headers": {"Authorization": "Bearer wrong"}}, 401),
    ]
    return rng.choice(cases)


def measure_stress(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the parts of the report, and what should not have happened."""
    from httpx import TransportError

    adapters = sorted(path for path in BUNDLED.glob("microworld-*-n1") if path.is_dir())
    bank = open_bank(adapters, MICROWORLD)
    names = list(bank)
    models = ["base", *names, *(f"{a}:0.5+{c}" for a, c in pairwise(names))]
    questions = [q.text for q in World(0).questions(UNSEEN) if q.text.startswith("What")][:8]
    right = known_answers(settings, bank, models, questions)
    path = settings.out_dir / "serving-bank.safetensors"
    bank.save(path)
    outcomes, wrong, rng = Counter(), [], random.Random(0)

    def make(server: Server, http: Any, bar: tqdm) -> Callable[[], Coroutine]:
        model, question = rng.choice(models), rng.choice(questions)
        kind = rng.choice(["stream", "stream", "plain", "plain", "cancel", "malformed"])
        parts, bad = rng.randrange(4), malformed(rng, model, question)
        delay = rng.choice([0.002, 0.05, 0.3])

        async def work() -> None:
            try:
                await send()
            except TransportError as error:
                outcomes[f"connection lost ({type(error).__name__})"] += 1
            bar.update()

        async def send() -> None:
            if kind == "malformed":
                request, status = bad
                reply = await http.post("/v1/chat/completions", **request)
                correct = reply.status_code == status and set(reply.json()["error"]) >= {"message", "type"}
                outcomes["malformed, refused" if correct else "malformed, not refused as expected"] += 1
            elif kind == "cancel" and parts:
                await ask(http, chat(model, question), parts)
                outcomes["cancelled while streaming"] += 1
            elif kind == "cancel":
                try:
                    await asyncio.wait_for(http.post("/v1/chat/completions", json=chat(model, question)), delay)
                    outcomes["answered before it was cancelled"] += 1
                except asyncio.TimeoutError:
                    outcomes["cancelled while waiting"] += 1
            else:
                await check(http, model, question, kind)

        return work

    async def check(http: Any, model: str, question: str, kind: str) -> None:
        if kind == "stream":
            text = (await ask(http, chat(model, question))).text
        else:
            reply = await http.post("/v1/chat/completions", json=chat(model, question))
            text = reply.json()["choices"][0]["message"]["content"]
        if text == right[model, question]:
            outcomes["answered, right"] += 1
            return
        others = [other for other in models if right[other, question] == text]
        outcomes["answered, another adapter's answer" if others else "answered, otherwise wrong"] += 1
        wrong.append(f"{model}: {text!r} instead of {right[model, question]!r}")

    async def run(server: Server, count: int) -> None:
        with tqdm(total=count, desc="Requests", mininterval=10) as bar:
            async with connect(server) as http:
                await share([make(server, http, bar) for _ in range(count)], settings.clients)

    with Server(path, settings) as server:
        states = []
        for count in (settings.requests // 10, settings.requests - settings.requests // 10):  # the first tenth warms up
            asyncio.run(run(server, count))
            states.append(asyncio.run(settle(server)))
    for line in wrong[:20]:
        log(line)
    rows = [[what, f"{n:,}"] for what, n in sorted(outcomes.items())]
    (memory, files), (memory_after, files_after) = states
    expected = ("answered, right", "malformed, refused", "cancelled", "answered before")
    problems = [f"{n:,} {what}" for what, n in sorted(outcomes.items()) if not what.startswith(expected)]
    problems += [f"{files_after} open files, {files} after the first tenth"] * (files_after > files)
    return [
        f"{settings.requests:,} requests of {settings.clients} clients, {len(models)} different sums of adapters.",
        markdown_table(["requests", "number"], rows),
        "At the end no row was in use and nothing waited. From the first tenth to the end, the server's memory went "
        f"from {memory:.0f} to {memory_after:.0f} MB, and its open files from {files} to {files_after}.",
    ], problems


async def settle(server: Server) -> tuple[float, int]:
    """Wait until no request runs, and return the server's memory and open files.

    Raises:
        UserError: Abandoned requests are still running.
    """
    async with connect(server) as http:
        for _ in range(100):
            text = (await http.get("/metrics")).text
            if "\naligner_running 0\n" in text and "\naligner_waiting 0\n" in text:
                await asyncio.sleep(1)
                return server.resident(), server.open_files()
            await asyncio.sleep(0.1)
    raise UserError("Rows are still in use 10 seconds after the last client disconnected.")


def main(settings: Settings) -> None:
    if sys.platform != "linux":
        raise UserError("This benchmark needs Linux: it reads the server's processor time and memory from /proc.")
    if find_spec("httpx") is None:
        raise UserError("This benchmark needs httpx: pip install -r requirements-dev.txt.")
    if settings.threads:
        torch.set_num_threads(settings.threads)  # as in the server
    device, dtype = pick_device(settings.accelerator, settings.precision)
    parts, problems = (measure_speed if settings.mode == "speed" else measure_stress)(settings)
    title = f"The server: {settings.mode}, {dtype_name(dtype)}"
    print(b.write_report(settings.out_dir / f"serving-{settings.mode}.md", title, parts, device), end="")
    if problems:
        raise UserError(f"The server failed: {'; '.join(problems)}.")


if __name__ == "__main__":
    cli.run(main, settings)
