"""Continuous batching: answers to many requests in one running batch, each row with its own adapters.

    submit ──► waiting ──► prefill ──► row of the running batch ──► one token per step ──► finished
                 (queue)    (joins)          (KV cache)                                     (its row is free again)

A request joins the batch at the next step and leaves when it is done; the last row then moves into the gap, so that
the batch has no empty rows. Its tokens are those of `lit_llama.generation.generate` for the same prompt, adapters,
sampling and row number. It keeps the adapters that it joined with, even if the bank changes later.
"""

import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from generate.jobs import Event, Job, JobError, Row
from lit_llama.compose import LLaMA, Sum, Term, as_sum, parse_sum
from lit_llama.generation import Sampling, decode_one_token, prefill, sample
from lit_llama.kv_cache import KVCache, cache_dtype
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

FIRST_TOKEN_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds, of the histogram in /metrics


class Engine:
    """A model that answers requests in a running batch.

    `step` does the work; `start` calls it in a thread. The other methods may be called from any thread.

    Args:
        model: from `load_with_bank`; nothing else may use it meanwhile.
        max_batch: rows of the batch, for which the KV cache is allocated.
        max_waiting: requests that may wait.
        max_length: tokens of a prompt with its answer (default: the model's context).
    """

    # prompts of up to this many tokens in total, with their padding, join in one step, between two tokens of running
    # ones; a longer prompt joins alone
    prefill_tokens = 2048

    def __init__(
        self,
        model: LLaMA,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 64,
        max_waiting: int = 256,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.bank = model.eval(), tokenizer, model.bank
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.max_length = min(max_length or model.max_tokens, model.max_tokens)
        weight = model.transformer.wte.weight
        self.device = weight.device
        self.cache = KVCache(model.config, max_batch, self.max_length, weight.device, cache_dtype(weight))
        self.rows: list[Row] = []
        self.waiting: deque[Job] = deque()
        self.counts: Counter[str] = Counter()  # what happened since the start, for /metrics
        self.changed = threading.Condition()  # guards `waiting` and `bank`
        self.ending: tuple[str, str] | None = None  # code and message for requests, once the thread is to end
        self.thread: threading.Thread | None = None

    # == requests ==

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue requests: all of them or none.

        Raises:
            JobError: A prompt leaves no room for an answer, the queue is full, or the engine was stopped.
            UserError: A prompt is empty, or there are more requests than may wait.
        """
        for job in jobs:
            if not job.prompt:
                raise UserError("The prompt has no tokens.")
            if len(job.prompt) >= self.max_length:
                raise JobError(
                    "context_length_exceeded",
                    f"The prompt has {len(job.prompt)} tokens; with its answer it may have {self.max_length}.",
                )
        if len(jobs) > self.max_waiting:
            raise UserError(f"The request asks for {len(jobs)} answers, and at most {self.max_waiting} may wait.")
        with self.changed:
            if self.ending:
                raise JobError(*self.ending)
            if len(self.waiting) + len(jobs) > self.max_waiting:
                self.counts["refused"] += len(jobs)
                room = self.max_waiting - len(self.waiting)
                raise JobError(
                    "queue_full",
                    f"The queue has room for {room} of {self.max_waiting} answers, and the request asks for "
                    f"{len(jobs)}; try again later.",
                )
            for job in jobs:
                job.submitted = time.monotonic()
            self.waiting.extend(jobs)
            self.counts["requests"] += len(jobs)
            self.changed.notify()

    def parse(self, text: str) -> Sum:
        """Return the weighted sum that a text describes; see `parse_sum`."""
        with self.changed:
            return parse_sum(text, self.bank)

    # == the thread ==

    def start(self) -> None:
        """Answer requests in a thread, until `stop`."""
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread. Unfinished requests fail."""
        with self.changed:
            self.ending = self.ending or ("shutting_down", "The server is shutting down.")
            self.changed.notify()
        if self.thread is not None:
            self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.rows or self.ending):
                    self.changed.wait()
            if self.ending:  # `/health` reports that the thread has ended
                return self._fail_all(JobError(*self.ending))
            try:
                self.step()
            except torch.AcceleratorError:  # such as an illegal access: all later calls to the GPU would fail
                log(traceback.format_exc())
                with self.changed:
                    self.ending = "server_error", "The GPU has failed; restart the server, whose log says why."
            except Exception:  # a bug, or a GPU out of memory: other requests may still succeed
                self._fail_all(logged_error())

    def _fail_all(self, error: Exception) -> None:
        with self.changed:
            jobs = [row.job for row in self.rows] + list(self.waiting)
            self.waiting.clear()
        self.rows = []
        self._fail(jobs, error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            if not job.done:
                self._finish(job, Event(error=error))

    # == one step ==

    @torch.inference_mode()
    def step(self) -> None:
        """Remove the rows of requests that have ended, let waiting ones join, and generate a token for each row."""
        for job in [row.job for row in self.rows]:
            self._expire(job)
        changed = self._leave()
        if self._join():
            changed = True
            self._leave()  # some may end with their first token
        if changed:
            self._set_terms()
        if not self.rows:
            return
        cache, n = copy(self.cache), len(self.rows)
        cache.k, cache.v, cache.starts = cache.k[:, :n], cache.v[:, :n], cache.starts[:n]
        cache.length = max(row.length for row in self.rows)
        tokens = torch.tensor([row.last for row in self.rows], device=self.device)
        positions = torch.tensor([row.length for row in self.rows], device=self.device)
        self._append(self.rows, decode_one_token(self.model, tokens, positions, cache))
        self.counts["steps"] += 1
        self.counts["rows"] += n

    def _expire(self, job: Job) -> bool:
        """End a request that was cancelled or has run out of time. Return whether it is done."""
        if job.cancelled and not job.done:
            job.done = True
            self.counts["cancelled"] += 1
        elif not job.done and time.monotonic() - job.submitted > job.seconds:
            error = JobError("timeout", f"The answer was not complete after {job.seconds:g} seconds.")
            self._finish(job, Event(error=error))
        return job.done

    def _leave(self) -> bool:
        """Remove the rows that are done; rows from the end take their places. Return whether any were removed."""
        n_before, i = len(self.rows), 0
        while i < len(self.rows):
            if not self.rows[i].job.done:
                i += 1
                continue
            row = self.rows.pop()
            if i < len(self.rows):
                self.rows[i], source, length = row, len(self.rows), row.length
                for buffer in (self.cache.k, self.cache.v):
                    buffer[:, i, :, :length] = buffer[:, source, :, :length]
        return len(self.rows) < n_before

    def _next_jobs(self) -> list[Job]:
        """Take the requests that join at this step off the queue, in order."""
        jobs, longest = [], 0
        for job in list(self.waiting):
            if self._expire(job):
                self.waiting.remove(job)
        while self.waiting and len(self.rows) + len(jobs) < self.max_batch:
            longest = max(longest, len(self.waiting[0].prompt))
            if jobs and (len(jobs) + 1) * longest > self.prefill_tokens:
                break
            job = self.waiting.popleft()
            try:
                self.model.check_rows([job.adapters])
                self._check_style(job)
                jobs.append(job)
            except UserError as error:  # removed or replaced since the request was checked
                self._finish(job, Event(error=error))
        return jobs

    def _check_style(self, job: Job) -> None:
        """Check that the first adapter of a request still has the prompt style of its prompt.

        Raises:
            UserError: It was replaced by an adapter of another style.
        """
        slot = self.bank.get(job.adapters[0][0]) if job.adapters and job.style is not None else None
        if slot is not None and slot.style != job.style:
            name = job.adapters[0][0]
            raise UserError(f"The adapter {name!r} now has another prompt style; send the request again.")

    def _join(self) -> bool:
        """Let waiting requests join. If this fails, only they fail, and the running ones continue.

        Returns:
            Whether any joined.
        """
        jobs, n_before = [], len(self.rows)
        try:
            with self.changed:
                jobs = self._next_jobs()
                if not jobs:
                    return False
                sums = [as_sum(job.adapters) for job in jobs]
                gathered = self.bank.gather([name for terms in sums for name, _ in terms])
            with self.model.using(sums, gathered):  # projects the prefixes, without the lock
                self._prefill(jobs)
        except torch.AcceleratorError:
            with self.changed:
                self.waiting.extend(jobs)  # so that they fail with all others
            raise
        except Exception:  # for example, a GPU without memory for these prompts
            del self.rows[n_before:]
            self._fail(jobs, logged_error())
            return False
        for job in jobs:
            self.counts["prompt_tokens"] += len(job.prompt)
            self._count_first_token(time.monotonic() - job.submitted)
        return True

    def _prefill(self, jobs: list[Job]) -> None:
        """Run the prompts of requests, copy keys and values into the cache, and choose the first tokens."""
        limits = [min(job.sampling.max_new_tokens, self.max_length - len(job.prompt)) for job in jobs]
        rows = [Row(job, self.tokenizer, n, self.device) for job, n in zip(jobs, limits, strict=True)]
        longest = max(len(job.prompt) for job in jobs)
        places = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self._take_terms(rows)
        cache = KVCache(self.model.config, len(jobs), longest, self.device, self.cache.k.dtype)
        logits = prefill(self.model, [job.prompt for job in jobs], cache)
        for buffer, new in ((self.cache.k, cache.k), (self.cache.v, cache.v)):
            buffer[:, places, :, :longest] = new.nan_to_num(posinf=0.0, neginf=0.0)  # also of the padding; see `_drop`
        self._append(rows, logits)

    def _count_first_token(self, seconds: float) -> None:
        self.counts["first_tokens"] += 1
        self.counts["first_token_seconds"] += seconds
        for bound in FIRST_TOKEN_BOUNDS:
            self.counts[f"first_tokens_within_{bound:g}"] += seconds <= bound

    def _take_terms(self, rows: list[Row]) -> None:
        """Copy the adapter terms of the model's current batch to its rows."""
        layers = [block.attn.terms for block in self.model.transformer.h if block.attn.terms]
        for terms in zip(*layers, strict=True):  # the same term in all layers
            keys, values = (torch.stack(tensors) for tensors in zip(*((t.keys, t.values) for t in terms), strict=True))
            members: defaultdict[int, list[int]] = defaultdict(list)
            if terms[0].rows is not None:
                for i, row in enumerate(terms[0].rows.tolist()):
                    members[row].append(i)
            else:
                members |= {i: [i if keys.size(1) > 1 else 0] for i in range(len(rows))}
            for row, indices in members.items():
                rows[row].terms.append((keys[:, indices], values[:, indices]))

    def _set_terms(self) -> None:
        """Set the model's terms to those of all rows, concatenated by prefix length."""
        for block in self.model.transformer.h:
            block.attn.terms = ()  # free the former terms before the new ones are allocated
        members: defaultdict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            for keys, values in row.terms:
                members[keys.size(3)] += [(i, keys, values)]
        layers: list[list[Term]] = [[] for _ in self.model.transformer.h]
        for parts in members.values():
            numbers = [i for i, keys, _ in parts for _ in range(keys.size(1))]
            numbers = torch.tensor(numbers, device=self.device)
            keys, values = torch.cat([k for _, k, _ in parts], dim=1), torch.cat([v for _, _, v in parts], dim=1)
            for layer, *pair in zip(layers[-len(keys) :], keys, values, strict=True):
                layer.append(Term(*pair, numbers))
        for block, terms in zip(self.model.transformer.h, layers, strict=True):
            block.attn.terms = terms

    # == tokens ==

    def _append(self, rows: list[Row], logits: Tensor) -> None:
        """Choose the next token of each row from its logits (B, V), and report the text that is final."""
        logits = logits[:, : self.model.config.vocab_size]  # without the padding
        groups: defaultdict[Sampling, list[int]] = defaultdict(list)
        for i, (row, is_finite) in enumerate(zip(rows, logits.isfinite().all(-1).tolist(), strict=True)):
            if is_finite:
                groups[row.kind].append(i)
            else:
                self._drop(row)
        for kind, members in groups.items():
            group_logits = logits if len(members) == len(rows) else logits[members]
            chosen = sample(group_logits, kind, [rows[i].generator for i in members])
            for i, token in zip(members, chosen.tolist(), strict=True):
                job, event = rows[i].job, rows[i].append(token, logits[i])
                self.counts["new_tokens"] += 1
                if event is not None and event.finish:
                    self._finish(job, event)
                elif event is not None:
                    job.on_event(event)

    def _drop(self, row: Row) -> None:
        """End a request whose logits are not finite, for example because of a strength of 1e39.

        Its keys and values are set to 0: a later row in its place masks them, but 0 times infinity is not 0.
        """
        for buffer in (self.cache.k, self.cache.v):
            buffer[:, self.rows.index(row)] = 0
        self._finish(row.job, Event(error=UserError("The model's activations overflow; use smaller strengths.")))

    def _finish(self, job: Job, event: Event) -> None:
        job.done = True
        self.counts[event.finish or "failed"] += 1
        job.on_event(event)


def logged_error() -> JobError:
    """Log the exception that is being handled, and return the error that clients receive."""
    log(traceback.format_exc())
    return JobError("server_error", "The server failed to compute the answer; its log says why.")
