"""Ask a language model for judgements, and keep every reply.

    requests ──► a key for each: the hash of everything that its reply depends on
                 ├─ in the cache file ──────────────────────────────► reply
                 └─ else threads ──► endpoint ──► appended to it ──► reply

The cache file is JSON Lines and is only appended to. A run that was stopped continues from it, and a finished run is
scored again without an endpoint. The API key comes from the environment and is written nowhere.
"""

import hashlib
import json
import os
import queue
import random
import re
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluate.common import JsonLines
from evaluate.endpoint import Endpoint, Refused, Retry, reply_text
from evaluate.settings import JudgeSettings
from lit_llama.utils import UserError, log

JUDGEMENTS = "judgements.jsonl"
FIRST_DELAY = 1.0  # seconds before the second attempt; each further delay is twice as long, up to a minute
LONGEST_WAIT = 600  # seconds; an endpoint that asks for more ends the run, which can be continued later
MOST_FAILURES = 5  # consecutive failed requests after which the run ends; refusals count until the first reply


@dataclass(frozen=True)
class Request:
    """One call of the judge.

    Args:
        messages: the (role, text) pairs of the chat.
        about: what the call is for, such as a question's id; recorded with the reply, but no part of its key.
    """

    messages: tuple[tuple[str, str], ...]
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def body(self, settings: JudgeSettings) -> dict[str, Any]:
        """Return the JSON object to send; decoding is greedy, unless `judge_body` has another temperature."""
        body = {
            "model": settings.judge_model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "temperature": 0,
            "max_tokens": settings.judge_max_tokens,
            **settings.judge_body,
        }
        return {name: value for name, value in body.items() if value is not None}


def request_key(body: dict[str, Any]) -> str:
    """Return a hash of everything that a reply depends on: model, messages and sampling settings, not the address."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def is_judgement(record: dict[str, Any]) -> bool:
    """Return whether a record of the cache file has a key of `request_key` and a reply."""
    return bool(re.fullmatch("[0-9a-f]{64}", record.get("key", ""))) and isinstance(record.get("reply"), str)


class Judge:
    """Replies to requests, from the cache or from the endpoint.

    Args:
        settings: without a `judge_url`, only the cache is read.
        output_dir: has the cache, unless `judge_cache` is set.

    Raises:
        UserError: no model is named and the cached replies do not share one model and its sampling settings, or a
            setting or the cache is invalid.
    """

    def __init__(self, settings: JudgeSettings, output_dir: Path) -> None:
        self.file = JsonLines(settings.judge_cache or Path(output_dir) / JUDGEMENTS, first="key")
        # a single incomplete line is not known to be a judgement, and would be removed by the first reply
        is_cut = not self.file.records and self.file.path.exists() and self.file.path.stat().st_size > 0
        if is_cut or not all(map(is_judgement, self.file.records)):
            raise UserError(
                f"{self.file.path} is not a file of judgements; move the file away or set --judge_cache, and run again."
            )
        self.records: dict[str, dict[str, Any]] = {}
        for record in self.file.records:
            self.keep(record)
        self.endpoint = None
        if settings.judge_url:
            key = os.environ.get(settings.judge_key_env, "").strip() or None
            self.endpoint = Endpoint(settings.judge_url, key, settings.judge_key_env, settings.judge_timeout)
        self.settings = settings if self.endpoint else self.cached_settings(settings)
        if self.settings.judge_model is None:
            models = sorted({str(record.get("model")) for record in self.records.values()})
            known = f"; {self.file.path} has replies by {', '.join(models)}" if models else ""
            raise UserError(f"Name the judge with --judge_model{known}.")
        self.failed: dict[str, str] = {}  # key -> why the request has no reply

    def cached_settings(self, settings: JudgeSettings) -> JudgeSettings:
        """Return the model and the sampling settings that all replies of the cache have; `settings` if they differ."""
        bodies = [{**record.get("request", {}), "messages": None} for record in self.records.values()]
        if not bodies or bodies.count(bodies[0]) < len(bodies):
            return settings
        body = {"max_tokens": None, "temperature": None, **bodies[0]}
        model = body.pop("model", None)
        if settings.judge_model not in (None, model):
            return settings
        del body["messages"]
        if body["temperature"] == 0:
            del body["temperature"]
        max_tokens = settings.judge_max_tokens if body["max_tokens"] is None else body.pop("max_tokens")
        return replace(settings, judge_model=model, judge_max_tokens=max_tokens, judge_body=body)

    def keep(self, record: dict[str, Any]) -> None:
        """Use a line of the cache file, unless an earlier one has a reply to the same request."""
        if "refused" in self.records.get(record["key"], {"refused": ""}):
            self.records[record["key"]] = record

    def store(self, record: dict[str, Any]) -> None:
        self.file.append(record)
        self.keep(record)

    def ask(self, requests: list[Request]) -> list[dict[str, Any] | None]:
        """Return the record of the reply to each request; None where the endpoint did not answer.

        Equal requests are sent once. Requests that the endpoint refuses while it accepts others, such as those that a
        content filter stops, get an empty reply, and are sent again the next time. Each reply is on the disk before the
        next one is waited for.

        Raises:
            UserError: the cache lacks replies and there is no endpoint, or the endpoint does not work. Replies that
                arrived before are in the cache.
        """
        keys = [request_key(request.body(self.settings)) for request in requests]
        again = {key for key, record in self.records.items() if "refused" in record and self.endpoint}
        missing = set(keys) - (self.records.keys() - again)
        jobs = {key: request for key, request in zip(keys, requests, strict=True) if key in missing}
        total = len(set(keys))
        if jobs and not self.endpoint:
            raise UserError(
                f"{self.file.path} lacks {len(jobs)} of {total} judgements by {self.settings.judge_model}; "
                "set --judge_url to ask for them."
            )
        if jobs:
            log(f"asking {self.settings.judge_model} at {self.endpoint.name} for {len(jobs)} of {total} judgements")
            with tqdm(total=total, initial=total - len(jobs), desc="Judging", unit="judgement") as bar:
                Dispatcher(self, jobs, bar).run()
            if failed := [self.failed[key] for key in jobs if key in self.failed]:
                log(f"note: {len(failed)} of {len(jobs)} requests have no reply ({failed[0]}); run again to send them.")
        if cut := sum(self.records.get(key, {}).get("finish_reason") == "length" for key in set(keys)):
            log(f"note: {cut} of {total} replies were cut at the limit (--judge_max_tokens or --judge_body).")
        return [self.records.get(key) for key in keys]

    def describe(self, records: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Return what a report states about the judge and the replies that it uses, as JSON."""
        used = [*{record["key"]: record for record in records if record}.values()]
        refused = {record["key"]: record["refused"] for record in used if "refused" in record}
        used = [record for record in used if "refused" not in record]
        times = sorted(record["time"] for record in used if "time" in record)
        return {
            "model": self.settings.judge_model,
            "served_models": sorted({str(record["served_model"]) for record in used if record.get("served_model")}),
            "endpoints": sorted({record["endpoint"] for record in used if "endpoint" in record}),
            "max_tokens": self.settings.judge_max_tokens,
            "body": self.settings.judge_body,
            "replies": len(used),
            "cut_replies": sum(record.get("finish_reason") == "length" for record in used),
            "first_reply": times[0] if times else None,
            "last_reply": times[-1] if times else None,
            "failed_requests": sorted({**self.failed, **refused}.values()),
        }


def open_judge(settings: JudgeSettings, output_dir: Path) -> Judge | None:
    """Return the judge, or None if there is neither an endpoint nor a file of replies."""
    if settings.judge_url or (settings.judge_cache or Path(output_dir) / JUDGEMENTS).exists():
        return Judge(settings, output_dir)
    log("note: there is no judge; set --judge_url to have the answers judged.")
    return None


class Dispatcher:
    """Threads that send requests, while the calling thread stores the replies.

    Args:
        judge: has the endpoint and the cache.
        jobs: key -> request.
        bar: counts the replies.
    """

    def __init__(self, judge: Judge, jobs: dict[str, Request], bar: tqdm) -> None:
        self.judge, self.settings, self.bar = judge, judge.settings, bar
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        # shuffled, since a content filter may refuse all requests of a category
        for job in random.Random(0).sample([*jobs.items()], len(jobs)):
            self.jobs.put(job)
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.successes, self.failures_in_a_row, self.not_before = 0, 0, 0.0
        self.noted: set[str] = set()
        self.refused: dict[str, Request] = {}  # key -> request that the endpoint refuses
        # whether the cache has a reply of this model with these sampling settings
        same = Request(()).body(self.settings)
        replies = [record for record in judge.records.values() if "refused" not in record]
        self.accepted_before = any({**record.get("request", {}), "messages": []} == same for record in replies)

    def run(self) -> None:
        """Send all requests. An error ends the run after the replies in flight are stored."""
        running = min(self.settings.judge_workers, self.jobs.qsize())
        for _ in range(running):
            threading.Thread(target=self.work, daemon=True).start()
        errors = []
        while running:
            outcome = self.outcomes.get()
            if outcome is None:
                running -= 1
            elif isinstance(outcome, Exception):
                errors.append(outcome)
                self.stopped.set()
            else:
                self.judge.store(outcome)
                self.bar.update()
        if self.successes or self.accepted_before:
            for key, request in self.refused.items():
                if key not in self.judge.records:
                    self.judge.store(self.record(key, request, {"reply": "", "refused": self.judge.failed[key]}))
        elif self.judge.failed and not errors:
            errors = [UserError(f"{self.name()} accepts no request ({next(iter(self.judge.failed.values()))}).")]
        if errors and isinstance(errors[0], UserError):
            progress = f"{self.bar.n} of {self.bar.total} judgements are in {self.judge.file.path}"
            raise UserError(f"{errors[0]} {progress}; run the command again to continue.")
        if errors:
            raise errors[0]

    def work(self) -> None:
        """Take requests until there are none; put each reply or error, and None at the end."""
        try:
            while not self.stopped.is_set():
                record = self.send(*self.jobs.get_nowait())
                if record:
                    self.outcomes.put(record)
        except queue.Empty:
            pass
        except Exception as error:
            self.outcomes.put(error)
        self.outcomes.put(None)

    def send(self, key: str, request: Request) -> dict[str, Any] | None:
        """Return the record of the reply, after as many attempts as allowed; None if there is none."""
        body, attempt, successes = request.body(self.settings), 0, self.successes
        while not self.stopped.wait(max(0.0, self.not_before - time.monotonic())):
            began = time.monotonic()
            try:
                reply = self.judge.endpoint.post(body)
            except Refused as refusal:
                self.refused[key], self.judge.failed[key] = request, str(refusal)
                if self.successes or key in self.judge.records:  # the endpoint works, or refused it in an earlier run
                    return None
                return self.give_up(key, str(refusal))
            except Retry as failure:
                if failure.kind == "busy" and self.successes > successes:
                    attempt, successes = 0, self.successes  # the rate limit let other requests through
                if attempt == self.settings.judge_retries or (failure.kind == "down" and not self.successes):
                    return self.last_failure(key, failure)
                self.back_off(failure, attempt)
                attempt += 1
            else:
                self.successes, self.failures_in_a_row = self.successes + 1, 0
                received = {
                    "reply": reply_text(reply),
                    "finish_reason": reply["choices"][0].get("finish_reason"),
                    "served_model": reply.get("model"),
                    "usage": reply.get("usage"),
                    "seconds": round(time.monotonic() - began, 3),
                }
                return self.record(key, request, received)
        return None

    def name(self) -> str:
        return f"The judge at {self.judge.endpoint.name}"

    def back_off(self, failure: Retry, attempt: int) -> None:
        """Wait before the next attempt; if the endpoint names a time, all threads wait for it."""
        delay = min(60.0, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.5)
        if failure.wait is not None:
            if failure.wait > LONGEST_WAIT:
                raise UserError(f"{self.name()} asks to wait for {failure.wait:.0f} s ({failure}).")
            self.not_before = max(self.not_before, time.monotonic() + failure.wait)
            delay = failure.wait + random.uniform(0.0, min(delay, 1.0))
        if str(failure) not in self.noted:
            self.noted.add(str(failure))
            tqdm.write(f"note: {failure}; trying again", file=self.bar.fp)
        self.stopped.wait(delay)

    def last_failure(self, key: str, failure: Retry) -> None:
        """Give up one request, or the run if the endpoint itself does not work."""
        if failure.kind == "down":
            raise UserError(f"{self.name()} cannot be reached ({failure}).")
        if failure.kind == "busy" or not self.successes:
            raise UserError(f"{self.name()} does not answer ({failure}).")
        self.give_up(key, str(failure))

    def give_up(self, key: str, reason: str) -> None:
        """Leave one request without a reply; end the run after too many in a row."""
        self.judge.failed[key] = reason
        self.failures_in_a_row += 1
        # a refusal takes less time than a reply, so all workers may be refused before the first reply arrives
        most = MOST_FAILURES if self.successes else max(MOST_FAILURES, 2 * self.settings.judge_workers)
        if self.failures_in_a_row >= most:
            raise UserError(f"{self.name()} does not answer these requests ({reason}).")

    def record(self, key: str, request: Request, received: dict[str, Any]) -> dict[str, Any]:
        """Return the line of the cache file.

        Args:
            received: the fields of the reply; for a refused request an empty reply, and the reason.
        """
        return {
            "key": key,
            **request.about,
            "model": self.settings.judge_model,
            **received,
            "endpoint": self.judge.endpoint.name,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "request": request.body(self.settings),
        }
