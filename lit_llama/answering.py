"""Functions that the generate scripts share: read prompts, answer them, show and save the answers."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_llama.answer_settings import AnswerSettings
from lit_llama.checkpoint import versions, weights_path
from lit_llama.compiled import compile_
from lit_llama.device import pick_device
from lit_llama.generation import answer, check_prompts, stream
from lit_llama.model import LLaMA
from lit_llama.onednn import pack_
from lit_llama.prompts import PromptStyle
from lit_llama.sharding import is_sharded, only_assists
from lit_llama.storage.files import write_text
from lit_llama.storage.rows import naming, read_rows, read_text, text_field
from lit_llama.storage.schema import field
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, check_text, log


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Args:
        prompt, input: instruction and its context.
        id: id of the question in its file, if it has one.
        adapter: the adapters to answer with, as text for `lit_llama.compose.parse_sum`; None if not specified.
    """

    prompt: str
    input: str = ""
    id: Any = None
    adapter: str | None = None


def read_requests(path: Path) -> list[Request]:
    """Return the prompts of a file.

    Rows of JSON or JSON Lines have `prompt` or `instruction`, and optionally `input` and `adapter`; or they have the
    `turns` (of which the first is used) and the `question_id` of Vicuna-bench. Any other file has one prompt per line.

    Raises:
        UserError: There is no such file, it has no prompt, or a row has none (the message has its number).
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl", ".gz", ".parquet"):
        rows = read_rows(path)
        with naming(path):
            requests = [_request_of(row, number) for number, row in enumerate(rows, 1)]
    else:
        lines = read_text(path).split("\n")  # not splitlines, which also splits at U+2028
        requests = [Request(line.strip()) for line in lines if line.strip()]
    if not requests:
        raise UserError(f"{path} has no prompt.")
    return requests


def _request_of(row: Any, number: int) -> Request:
    turns = row.get("turns") if isinstance(row, dict) else None
    if isinstance(turns, list) and turns:
        row = {**row, "prompt": turns[0]}
    name = "instruction" if isinstance(row, dict) and "instruction" in row else "prompt"
    prompt = text_field(row, number, name)
    if not prompt.strip():
        raise UserError(f"Row {number}: {name!r} is empty.")
    input, adapter = (text_field(row, number, name, default="") for name in ("input", "adapter"))
    question_id = field(row, "question_id", int | str | None, f"Row {number}", None)
    check_text(str(question_id), f"Row {number}: 'question_id'")
    return Request(prompt, input, question_id, adapter or None)


def gather_requests(settings: AnswerSettings, bank: bool = False) -> list[Request]:
    """Return the requests of a command line; none with --interactive. Without a bank, their adapters are ignored."""
    if settings.interactive:
        return []
    if not settings.prompt_file:
        return [Request(prompt, settings.input) for prompt in settings.prompt]
    requests = read_requests(settings.prompt_file)
    if not bank and any(request.adapter for request in requests):
        log(f"note: the adapters in {settings.prompt_file} are ignored; they need generate/aligner.py --bank.")
        return [replace(request, adapter=None) for request in requests]
    return requests


@dataclass
class Session:
    """A loaded model that answers requests according to the settings."""

    model: LLaMA
    tokenizer: Tokenizer
    settings: AnswerSettings
    seconds_to_load: float

    def answers(
        self, requests: Sequence[Request], styles: Sequence[PromptStyle], adapters: Sequence[Any] | None = None
    ) -> list[str]:
        """Return the answers; in a style that continues its prompts, each prompt with its continuation.

        Args:
            styles: the prompt style of each request.
            adapters: the adapters of each request; see `answer`.

        Raises:
            UserError: A prompt is empty or longer than the context, or an adapter does not exist.
        """
        system = self.settings.system
        prompts = [style.render(r.prompt, r.input, system) for style, r in zip(styles, requests, strict=True)]
        check_prompts(self.model, [self.tokenizer.encode(prompt, bos=True) for prompt in prompts])
        began, n_tokens, n_cut, texts = time.perf_counter(), 0, 0, [""] * len(prompts)
        hidden = len(prompts) <= self.settings.batch_size or only_assists(self.model)
        with tqdm(total=len(prompts), desc="Answering", unit=" prompts", disable=hidden) as bar:
            for style in dict.fromkeys(styles):
                rows = [row for row, other in enumerate(styles) if other == style]
                answers = answer(
                    self.model,
                    self.tokenizer,
                    [prompts[row] for row in rows],
                    self.settings.sampling,
                    style.stop,
                    self.settings.batch_size,
                    echo=style.continues,
                    rows=rows,
                    adapters=None if adapters is None else [adapters[row] for row in rows],
                    on_batch=bar.update,
                )
                for row, text in zip(rows, answers, strict=True):
                    texts[row] = text
                    n = self.count(text) - (self.count(prompts[row]) if style.continues else 0)
                    n_tokens += n
                    n_cut += n >= self.settings.max_new_tokens
        self.report(n_tokens, time.perf_counter() - began)
        if n_cut:
            log(f"answers that reached --max_new_tokens {self.settings.max_new_tokens}: {n_cut} of {len(prompts)}")
        return texts

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def report(self, n_tokens: int, seconds: float) -> None:
        """Log load time, speed and memory."""
        if next(self.model.parameters()).is_cuda:
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        log(
            f"loaded in {self.seconds_to_load:.1f} s; {n_tokens} tokens in {seconds:.1f} s ({n_tokens / seconds:.0f} "
            f"tokens/s); {memory / 1e9:.2f} GB at peak"
        )

    def answer_lines(self, style: PromptStyle) -> None:
        """Answer stdin line by line until it ends. Questions are independent of each other.

        Raises:
            UserError: At the end, if a line could not be answered.
        """
        failed = 0
        while line := sys.stdin.readline():
            if not line.strip():
                continue
            try:
                prompt = style.render(check_text(line.strip(), "The line"), system=self.settings.system)
                sampling = self.settings.sampling
                for piece in stream(self.model, self.tokenizer, prompt, sampling, style.stop, style.continues):
                    print(piece, end="", flush=True)
            except UserError as error:
                failed += 1
                log(f"error: {error}")
            print(flush=True)
        if failed:
            lines = f"{failed} line{'s' * (failed > 1)}"
            raise UserError(f"{lines} of the input could not be answered; the messages above say why.")


def is_terminal() -> bool:
    """Return whether standard input is a terminal.

    Raises:
        UserError: It is closed.
    """
    if sys.stdin is None:
        raise UserError("--interactive reads standard input, which is closed.")
    return sys.stdin.isatty()


def open_tokenizer(settings: AnswerSettings) -> Tokenizer:
    """Return the tokenizer of the base.

    Raises:
        UserError: A file is missing or damaged.
    """
    weights_path(settings.checkpoint_dir)  # report a missing folder rather than its missing tokenizer
    return Tokenizer(settings.checkpoint_dir)


def open_session(settings: AnswerSettings, tokenizer: Tokenizer, load: Callable[[], LLaMA]) -> Session:
    """Load the model.

    Raises:
        UserError: A file is missing or damaged, or the model cannot be compiled.
    """
    began = time.perf_counter()
    model = load()
    if settings.compile:
        compile_(model, "decoding")
    elif not is_sharded(model):
        pack_(model)
    return Session(model, tokenizer, settings, time.perf_counter() - began)


def show(requests: Sequence[Request], columns: dict[str, list[str]]) -> None:
    """Print the answers: a single one alone, several below their prompts, several columns with their names."""
    for i, request in enumerate(requests):
        if len(requests) > 1 or len(columns) > 1:
            name = f"({request.adapter}) " if request.adapter else ""
            print("\n" * (i > 0) + f"> {name}{request.prompt}" + (f"\n> {request.input}" if request.input else ""))
        for name, texts in columns.items():
            print(f"{name + ':':<9}{texts[i]}" if len(columns) > 1 else texts[i])


def save_answers(
    settings: AnswerSettings, requests: Sequence[Request], columns: dict[str, list[str]], made_by: dict[str, Any]
) -> None:
    """Write JSON records to `output_file`: prompt, input, response (and base_response), `made_by`, settings."""
    if settings.output_file is None:
        return
    _, dtype = pick_device(settings.accelerator, settings.precision)
    model = {"precision": str(dtype).removeprefix("torch."), "quantize": settings.quantize}
    made_by = {
        "base": settings.checkpoint_dir,
        **made_by,
        "settings": {"system": settings.system, **asdict(settings.sampling), **model, "versions": versions()},
    }
    records = []
    for i, request in enumerate(requests):
        record = {name: value for name, value in asdict(request).items() if value not in ("", None)}
        record |= {("response" if name != "base" else "base_response"): texts[i] for name, texts in columns.items()}
        records.append(record | made_by)
    text = json.dumps(records, indent=2, ensure_ascii=False, default=str) + "\n"
    write_text(settings.output_file, text, overwrite=settings.overwrite)
    log(f"wrote {settings.output_file}")
