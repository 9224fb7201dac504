"""What the generate scripts share: prompts in, answers out."""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_llama.checkpoint import versions, weights_path, write_text
from lit_llama.generation import Sampling, answer, check_prompts, stream
from lit_llama.model import LLaMA
from lit_llama.onednn import pack_
from lit_llama.prompts import PromptStyle
from lit_llama.rows import read_rows, text_field
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log


@dataclass(frozen=True)
class Request:
    """One thing to answer; `id` is the question's own, if its file has one, `adapter` the name of one from a bank."""

    prompt: str
    input: str = ""
    id: Any = None
    adapter: str | None = None


def read_requests(path: Path) -> list[Request]:
    """The prompts of a file.

    JSON or JSON lines hold rows with `prompt` or `instruction` and maybe `input`, or Vicuna-bench rows with `turns`
    (the first is asked) and `question_id`, and maybe an `adapter`; any other file has one prompt per line.

    Raises:
        UserError: no such file, no prompt in it, or a row without one (with its number).
    """
    path = Path(path)
    if path.suffix in (".json", ".jsonl", ".gz", ".parquet"):
        requests = []
        for number, row in enumerate(read_rows(path), 1):
            turns = row.get("turns") if isinstance(row, dict) else None
            if isinstance(turns, list) and turns:
                row = {**row, "prompt": turns[0]}
            name = "instruction" if isinstance(row, dict) and "instruction" in row else "prompt"
            prompt = text_field(row, number, name)
            if not prompt.strip():
                raise UserError(f"Row {number} of {path}: {name!r} is empty.")
            rest = [text_field(row, number, name, default="") for name in ("input", "adapter")]
            requests.append(Request(prompt, rest[0], row.get("question_id"), rest[1] or None))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text ({error}).") from None
        requests = [Request(line.strip()) for line in lines if line.strip()]
    if not requests:
        raise UserError(f"{path} holds no prompt.")
    return requests


def gather_requests(prompts: list[str], input: str, prompt_file: Path | None, bank: bool = False) -> list[Request]:
    """The requests of a command line; only with a bank the adapters that they name count."""
    requests = read_requests(prompt_file) if prompt_file else [Request(prompt, input) for prompt in prompts]
    if not bank and any(request.adapter for request in requests):
        log("note: the adapters that the prompts name count only with generate/aligner.py --bank.")
        requests = [replace(request, adapter=None) for request in requests]
    return requests


@dataclass
class Session:
    """A loaded model and how it is to answer.

    Args:
        model, tokenizer: loaded.
        style: how requests become prompts.
        sampling, batch_size: how answers are made.
        seconds_to_load: for the report.
    """

    model: LLaMA
    tokenizer: Tokenizer
    style: PromptStyle
    sampling: Sampling
    batch_size: int
    seconds_to_load: float

    def answers(
        self,
        requests: list[Request],
        adapters: list[str | None] | None = None,
        styles: list[PromptStyle] | None = None,
    ) -> list[str]:
        """The answers, in a style that continues the prompt with the prompt before them.

        Args:
            adapters: as in `answer`.
            styles: of each request, where they are not all the session's.

        Raises:
            UserError: a prompt is empty or longer than the context, or there is no such adapter.
        """
        styles = styles or [self.style] * len(requests)
        prompts = [style.render(r.prompt, r.input) for style, r in zip(styles, requests, strict=True)]
        check_prompts(self.model, [self.tokenizer.encode(prompt, bos=True) for prompt in prompts])
        began, tokens, texts = time.perf_counter(), 0, [""] * len(prompts)
        for style in dict.fromkeys(styles):
            rows = [row for row, other in enumerate(styles) if other == style]
            own = [adapters[row] for row in rows] if adapters else None
            asked = [prompts[row] for row in rows]
            said = answer(self.model, self.tokenizer, asked, self.sampling, style.stop, self.batch_size,
                          style.continues, rows, own)  # fmt: skip
            for row, text in zip(rows, said, strict=True):
                texts[row] = text
            tokens += sum(len(self.tokenizer.encode(text)) for text in said)
            if style.continues:
                tokens -= sum(len(self.tokenizer.encode(prompt)) for prompt in asked)
        self.report(tokens, time.perf_counter() - began)
        return texts

    def report(self, tokens: int, seconds: float) -> None:
        """Load time, speed and memory, to stderr."""
        if next(self.model.parameters()).is_cuda:
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        log(
            f"loaded in {self.seconds_to_load:.1f} s; {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} "
            f"tokens/s); {memory / 1e9:.2f} GB at peak"
        )

    def chat(self) -> None:
        """Answers line by line until the input ends; each question stands for itself."""
        log("Ask something; end with Ctrl-D.")
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if not line.strip():
                continue
            try:
                for piece in stream(self.model, self.tokenizer, self.style.render(line.strip()), self.sampling,
                                    self.style.stop, self.style.continues):  # fmt: skip
                    print(piece, end="", flush=True)
            except UserError as error:
                log(f"error: {error}")
            print(flush=True)


def show(requests: list[Request], columns: dict[str, list[str]]) -> None:
    """Prints one answer bare, several under their prompts, and several columns (base, aligned) by name."""
    for i, request in enumerate(requests):
        if len(requests) > 1 or len(columns) > 1:
            name = f"({request.adapter}) " if request.adapter else ""
            print("\n" * (i > 0) + f"> {name}{request.prompt}" + (f"\n> {request.input}" if request.input else ""))
        for name, texts in columns.items():
            print(f"{name + ':':<9}{texts[i]}" if len(columns) > 1 else texts[i])


def save_answers(
    path: Path, requests: list[Request], columns: dict[str, list[str]], sampling: Sampling, about: dict[str, Any]
) -> None:
    """A JSON list of records: prompt, input, response (and base_response), what made it."""
    settings = {**asdict(sampling), "versions": versions()}
    records = []
    for i, request in enumerate(requests):
        record = {k: v for k, v in asdict(request).items() if v not in ("", None)}
        record |= {("response" if name != "base" else "base_response"): texts[i] for name, texts in columns.items()}
        records.append({**record, **about, "settings": settings})
    write_text(path, json.dumps(records, indent=2, ensure_ascii=False, default=str) + "\n")
    log(f"wrote {path}")


def open_session(load: Callable[[], LLaMA], checkpoint_dir: Path, style: PromptStyle, sampling: Sampling,
                 batch_size: int) -> Session:  # fmt: skip
    """Loads tokenizer and model, taking the time."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be 1 or more.")
    weights_path(checkpoint_dir)  # a missing folder is said before a missing tokenizer
    began = time.perf_counter()
    tokenizer = Tokenizer(checkpoint_dir)
    return Session(pack_(load()), tokenizer, style, sampling, batch_size, time.perf_counter() - began)
