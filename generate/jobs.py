"""Requests to the engine (generate/engine.py), and the rows of its running batch that answer them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lit_llama.compose import Sum
from lit_llama.generation import Sampling
from lit_llama.live_text import LiveText
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

Terms = list[tuple[Tensor, Tensor]]  # keys and values (layers, n, nh, N, hs) of a request's prefixes, by length N


class JobError(UserError):
    """A request that cannot be answered, or not completely.

    Args:
        code: why, for programs: "queue_full", "shutting_down", "timeout", "context_length_exceeded" or "server_error".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Args:
        text: the text that it adds to the answer; a character of several tokens belongs to the last of them.
        start: position of the text in the answer.
        logp: log-probability under the model, before temperature, top_k and top_p.
        top: the most likely tokens with their log-probabilities, as texts.
    """

    text: str
    start: int
    logp: float = 0.0
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """A part of an answer.

    Args:
        text: the next text of the answer.
        tokens: the tokens of the text.
        finish: "stop" or "length" in the last part.
        error: why the answer ended early, instead of `finish`.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A request.

    Args:
        prompt: token ids.
        on_event: called with each part of the answer, in the engine's thread; it must return at once.
        adapters: weighted sum, as `Engine.parse` returns it.
        sampling, row: how tokens are chosen; the pair (sampling.seed, row) seeds the random generator.
        stop: texts that end the answer.
        strip: remove whitespace around the answer.
        n_top: report log-probabilities of the tokens, and of this many of the most likely ones; None reports neither.
        streams: report the answer in pieces.
        seconds: time limit, including the time in the queue.
        style: the prompt style of the first adapter, if the prompt is in it; an adapter that replaces it must have the
            same.
    """

    prompt: list[int]
    on_event: Callable[[Event], None]
    adapters: Sum = ()
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    row: int = 0
    stop: tuple[str, ...] = ()
    strip: bool = True
    n_top: int | None = None
    streams: bool = False
    seconds: float = math.inf
    style: str | None = None
    n_new: int = field(default=0, init=False)  # tokens so far
    submitted: float = field(default=0.0, init=False)
    done: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)  # set it to end the request; its row is free at the next step


class Row:
    """A request in the running batch.

    Args:
        limit: maximum number of new tokens.

    Attributes:
        kind: how its tokens are chosen; rows of the same kind are sampled together.
        terms: what its adapters add to each layer.
        last: the last token.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, limit: int, device: torch.device) -> None:
        self.job, self.limit, self.stop_ids = job, limit, tokenizer.stop_ids
        self.kind = replace(job.sampling, max_new_tokens=1, seed=0)
        (self.generator,) = job.sampling.generators([job.row], device)
        self.text = LiveText(tokenizer, job.prompt, job.stop, job.strip)
        self.terms: Terms = []
        self.last = -1
        self.tokens: list[Token] = []  # not reported yet

    @property
    def length(self) -> int:
        """The number of tokens in the KV cache; the last token is not in it yet."""
        return len(self.job.prompt) + self.job.n_new - 1

    def append(self, token: int, logits: Tensor) -> Event | None:
        """Append a token, chosen from logits (V,), to the answer. Return the event to report, if any."""
        job, text, finish = self.job, self.text, None
        self.last = token
        if token in self.stop_ids:
            finish = "stop"
        else:
            job.n_new += 1
            start = len(text.text)
            logp, top = (0.0, ()) if job.n_top is None else self._logps(token, logits)
            self.tokens.append(Token(text.push(token), start, logp, top))
            finish = "stop" if text.stopped else "length" if job.n_new == self.limit else None
        if not (finish or job.streams):
            return None
        piece = text.take(last=finish is not None)
        ready = [t for t in self.tokens if t.start < text.n_taken]
        self.tokens = self.tokens[len(ready) :]
        return Event(piece, tuple(ready), finish) if piece or finish else None

    def _logps(self, token: int, logits: Tensor) -> tuple[float, tuple[tuple[str, float], ...]]:
        """Return the log-probability of a token, and the texts and log-probabilities of the most likely ones."""
        logps = logits.float().log_softmax(-1)
        values, ids = logps.topk(min(self.job.n_top, len(logps)))
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return logps[token].item(), tuple((self.text.preview(i), value) for i, value in top)
