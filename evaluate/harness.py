"""Run tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model with any adapter.

The harness is installed with requirements-harness.txt. --tasks names tasks from --include_path, a folder of task files;
by default, from the tasks that come with the harness, whose index takes half a minute to read.

From Python, with this folder on sys.path, `harness.HarnessModel(harness.load(settings))` is a model for
`lm_eval.simple_evaluate` and `lm_eval.evaluate`; `settings` is a `harness.ModelSettings`.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from evaluate.settings import ModelSettings
from lit_llama import cli
from lit_llama.settings import NonNegativeInt, PositiveInt


@dataclass
class Settings(ModelSettings):
    # == Model ==
    prompt_style: str = "plain"  # plain continues the tasks' texts; alpaca, orca, ... ask them as instructions

    # == Tasks ==
    tasks: tuple[str, ...] = ()  # names of tasks, groups or tags
    include_path: Path | None = None  # folder of task files (default: the tasks that come with lm_eval)
    limit: PositiveInt | None = None  # only this many questions of each task
    num_fewshot: NonNegativeInt | None = None  # few-shot examples before each question (default: the task's)
    confirm_run_unsafe_code: bool = False  # allow tasks, such as humaneval, that run the code that the model writes

    # == Batches ==
    batch_tokens: PositiveInt = 16384  # scored texts: tokens of one forward pass, padding included
    batch_size: PositiveInt = 32  # generated texts: this many at a time

    # == Output ==
    output_dir: Path = Path("out/evaluate/harness")  # receives answers.jsonl, summary.json and summary.md
    overwrite: bool = False  # replace results of other settings in output_dir


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import torch
from tqdm import tqdm

from evaluate.common import EvaluatedModel, Results, answer_batches, answer_statistics, identify, load
from evaluate.letters import length_batches, pad
from lit_llama.console import did_you_mean
from lit_llama.generation import Sampling
from lit_llama.model import LLaMA
from lit_llama.modules import eval_mode
from lit_llama.prompts import is_chat
from lit_llama.tables import markdown_table
from lit_llama.utils import UserError, first_line, log

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:
    lm_eval, TemplateLM = None, object

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # environment variable without which the metric `code_eval` runs no code
CHUNK = 2048  # predicted tokens whose logits are in memory at a time


# == The model class ==


class HarnessModel(TemplateLM):
    """A base model, alone or with an adapter, as a model of lm-evaluation-harness.

    Requests that are longer than the model's context are truncated at the beginning, as in the harness's models;
    `truncated` counts them. With a prompt style other than plain, `apply_chat_template` renders the tasks in it.

    Args:
        evaluated: the model, or a function that loads it when it is first needed: after the tasks.
        batch_tokens: tokens of one forward pass, padding included.
        batch_size: texts generated at a time.
    """

    def __init__(
        self,
        evaluated: EvaluatedModel | Callable[[], EvaluatedModel],
        *,
        batch_tokens: int = 16384,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self._given, self.batch_tokens, self.batch_size = evaluated, batch_tokens, batch_size
        self.truncated = 0
        self.generated: list[dict[str, Any]] = []  # tokens, ended and seconds of each answer

    @cached_property
    def evaluated(self) -> EvaluatedModel:
        return self._given if isinstance(self._given, EvaluatedModel) else self._given()

    @property
    def eot_token_id(self) -> int:
        return self.evaluated.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if the tokenizer has no BOS."""
        bos_id = self.evaluated.tokenizer.bos_id
        return bos_id if bos_id >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's request cache."""
        return f"{self.evaluated.tokenizer.sha256}-{self.evaluated.style.name}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, which begin with BOS unless `add_special_tokens` is False."""
        return self.evaluated.tokenizer.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation in the prompt style. A system message becomes part of the first instruction.

        Tasks such as wikitext and blimp ask nothing; their context stays empty, as without a style.

        Raises:
            UserError: A task without questions has few-shot examples.
        """
        turns, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        if not turns[-1]["content"].strip():
            if any(turn["role"] == "assistant" for turn in turns):
                raise UserError(
                    "A task has few-shot examples but no questions, so they cannot be turns of a prompt style; use "
                    "--prompt_style plain or --num_fewshot 0."
                )
            return begun
        prompt = self.evaluated.style.render_messages(turns)
        return prompt if add_generation_prompt else f"{prompt.rstrip(' ')} {begun}"  # some styles end with a space

    def _split(self, context: str) -> tuple[str, str]:
        """Return a context's prompt in the style, and the answer that it begins; training encodes them separately.

        The prompt is empty if the context is not rendered in the style.
        """
        ending = self.evaluated.style.template.partition("{instruction}")[2]
        prompt, mark, answer = context.rpartition(ending) if ending else ("", "", context)
        return prompt + mark, answer.lstrip(" ") if mark else answer

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both. An answer to an instruction is encoded as a response in training."""
        prompt, begun = self._split(context)
        if not prompt:
            return super()._encode_pair(context, continuation)
        if not begun:
            continuation = continuation.lstrip(" ")
        elif not begun[-1].isspace() and not continuation[:1].isspace():
            continuation = f" {continuation}"
        n_begun = len(self.tok_encode(begun.rstrip(), add_special_tokens=False))
        answer = self.tok_encode(begun + continuation, add_special_tokens=False)
        return [*self.tok_encode(prompt), *answer[:n_begun]], answer[n_begun:]

    def _encode_context(self, context: str) -> list[int]:
        """Return the tokens of a context to continue; an answer that it begins is encoded as a response in training."""
        prompt, begun = self._split(context)
        if not prompt:
            return self.tok_encode(context) or [self.prefix_token_id]
        return [*self.tok_encode(prompt), *self.tok_encode(begun, add_special_tokens=False)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would produce it.

        Requests that begin with another's tokens share its row of a batch: the four letters of a question take one row.

        Args:
            requests: texts, which may be None, tokens of the context and of the continuation.
        """
        inputs = [self._fit(context, continuation) for _, context, continuation in requests]
        rows = shared_rows(inputs)
        lengths = {row: len(row) for row in rows}
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with (
            eval_mode(self.evaluated.model),
            tqdm(
                total=sum(lengths.values()), unit="token", unit_scale=True, desc="Scoring", disable=disable_tqdm
            ) as bar,
        ):
            for batch in length_batches(lengths, self.batch_tokens):
                members = [(place, i) for place, row in enumerate(batch) for i in rows[row]]
                spans = [(place, len(inputs[i]) - len(requests[i][2]), requests[i][2]) for place, i in members]
                scores = span_logps(self.evaluated.model, batch, spans)
                for (_, i), score in zip(members, scores, strict=True):
                    answers[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(sum(lengths[row] for row in batch))
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the tokens that the model reads: all but the last, cut at their beginning to fit its context.

        Raises:
            UserError: the continuation alone does not fit.
        """
        limit = self.evaluated.model.max_tokens
        if len(continuation) > limit:
            raise UserError(
                f"An answer of a task has {len(continuation)} tokens, but the model's context has {limit}; leave out "
                "the task, or use a model with a longer context."
            )
        context = context or [self.prefix_token_id]
        tokens = (context + continuation)[: len(context) + max(len(continuation) - 1, 0)]
        self.truncated += len(tokens) > limit
        return tuple(tokens[-limit:])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text; a long one is read in windows of the model's context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.evaluated.model.max_tokens, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to the first of its `until` texts."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), unit="text", desc="Generating", disable=disable_tqdm) as bar:
            for members in groups.values():
                contexts = {i: requests[i].args[0] for i in members}
                for i, answer in self._generate(contexts, requests[members[0]].args[1]):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update()
        return answers

    def _generate(self, contexts: dict[int, str], options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Yield the number and continuation of contexts that share their options, the longest contexts first."""
        limit = self.evaluated.model.max_tokens
        sampling, stop = read_options(options)
        stop += self.evaluated.style.stop
        longest = limit - min(sampling.max_new_tokens, limit // 2)
        encoded = {i: self._encode_context(text) for i, text in contexts.items()}
        self.truncated += sum(len(ids) > longest for ids in encoded.values())
        encoded = {i: ids[-longest:] for i, ids in encoded.items()}
        for answers in answer_batches(self.evaluated, encoded, sampling, stop, self.batch_size):
            for i, answer in answers.items():
                text = answer.pop("answer")
                self.generated.append(answer)
                yield i, text


def shared_rows(inputs: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Return the distinct rows to run, each with the indices of the inputs that are a prefix of it.

    In sorted order, the inputs that begin with another input directly follow it.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    row: tuple[int, ...] = ()
    for i in sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True):
        if row[: len(inputs[i])] != inputs[i]:
            row = inputs[i]
        rows.setdefault(row, []).append(i)
    return rows


@torch.inference_mode()
def span_logps(
    model: LLaMA, rows: list[tuple[int, ...]], spans: list[tuple[int, int, list[int]]]
) -> list[tuple[float, bool]]:
    """Return the log-probability of each span, and whether all of its tokens are the most likely ones.

    Args:
        rows: token ids, padded on the right here.
        spans: row, position whose logits predict the first token, and tokens.
    """
    device = model.transformer.wte.weight.device
    hidden = model.hidden(pad([list(row) for row in rows], device))
    targets = [(row, start + k, token) for row, start, tokens in spans for k, token in enumerate(tokens)]
    logps, greedy = [], []
    for start in range(0, len(targets), CHUNK):
        row, position, token = torch.tensor(targets[start : start + CHUNK], device=device).T
        logits = model.unembed(hidden[row, position])[:, : model.config.vocab_size].float()
        logps += logits.log_softmax(-1).gather(1, token[:, None])[:, 0].tolist()
        greedy += (logits.argmax(-1) == token).tolist()
    scores, end = [], 0
    for _, _, tokens in spans:
        begin, end = end, end + len(tokens)
        scores.append((sum(logps[begin:end]), all(greedy[begin:end])))
    return scores


def read_options(options: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """Return the sampling and the stop texts of a task's generation settings."""
    until = options.get("until") or ()
    lengths = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    sampling = Sampling(
        max_new_tokens=next(filter(None, lengths), 256),
        temperature=temperature,
        top_k=options.get("top_k") or 0,
        top_p=options.get("top_p") or 1.0,
    )
    return sampling, (until,) if isinstance(until, str) else tuple(until)


# == The script ==


def open_tasks(settings: Settings) -> "TaskManager":
    """Read the index of tasks.

    Raises:
        UserError: there is no such folder or task.
    """
    if not settings.tasks:
        raise UserError("There is nothing to evaluate; name tasks with --tasks.")
    if settings.include_path is None:
        log("note: reading the index of all tasks of lm_eval takes half a minute; --include_path reads one folder.")
    elif not settings.include_path.is_dir():
        raise UserError(f"There is no folder {settings.include_path}; --include_path is a folder of task files.")
    manager = TaskManager(include_path=settings.include_path, include_defaults=settings.include_path is None)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            place = settings.include_path or "lm_eval"
            raise UserError(f"There is no task {name!r} in {place}{did_you_mean(name, manager.all_tasks)}")
    manager.load = partial(load_tasks, settings, manager.load)
    return manager


def load_tasks(settings: Settings, load: Callable[[list[str]], dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return what `TaskManager.load` returns; it downloads the tasks' data.

    Raises:
        UserError: a task cannot be loaded, needs other input than text, or runs code without permission.
    """
    unsafe = "{} runs the code that the model writes; to allow this, pass --confirm_run_unsafe_code true."
    if settings.confirm_run_unsafe_code:
        os.environ[ALLOW_CODE] = "1"
    try:
        loaded = load(names)
    except Exception as error:  # of the Hub, of `datasets` or of a task's code
        if ALLOW_CODE in str(error):
            raise UserError(unsafe.format(f"A task of {', '.join(names)}")) from None
        raise UserError(
            f"Cannot load {', '.join(names)} ({first_line(error)}); check the network and the task files."
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
            raise UserError(unsafe.format(f"The task {name}"))
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"The task {name} asks about images or sound; the model reads only text.")
    without = [name for name, task in loaded["tasks"].items() if task.get_config("num_fewshot") == 0]
    if settings.num_fewshot and without:
        log(f"note: --num_fewshot is ignored for {', '.join(without)}, defined to have no few-shot examples.")
    return loaded


def make_records(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the answers of all tasks; one with several filters has a record for each."""
    records = []
    for task, rows in samples.items():
        for row in rows:
            suffix = "" if row["filter"] == "none" else f"/{row['filter']}"
            record = {
                "id": f"{task}/{row['doc_id']}{suffix}",
                "prompt": row["arguments"][0][0],
                "arguments": [list(arguments[1:]) for arguments in row["arguments"]],
                **{name: row[name] for name in ("doc", "target", "resps", "filtered_resps", *row["metrics"])},
            }
            records.append(json.loads(json.dumps(record, default=str)))
    return records


def show(summary: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    rows = []
    for task, scores in summary["tasks"].items():
        for name, value in scores.items():
            metric, _, filter = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float | int) or not filter:
                continue
            error = scores.get(f"{metric}_stderr,{filter}")
            error = f"{error:.4f}" if isinstance(error, float) else "-"
            about = [summary[name].get(task) for name in ("n", "num_fewshot", "task_versions")]
            about = ["-" if known is None else known for known in about]
            rows.append([task, metric, filter, *about, f"{value:.4f}", error])
    heads = ["task", "metric", "filter", "questions", "examples", "task version", "value", "standard error"]
    table = markdown_table(heads, rows)
    notes = f"{summary['truncated']} requests were longer than the model's context and were truncated at the beginning"
    if "ended_share" in summary:
        notes += f". {summary['ended_share']:.1%} of the answers ended by themselves, after "
        notes += f"{summary['mean_tokens']:.1f} tokens on average; {summary['tokens_per_second']:.0f} tokens/s"
    return f"{table}\n\n{notes}.\n"


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate one model and return the content of summary.json."""
    if lm_eval is None:
        raise UserError("The package lm_eval is missing; install it with pip install -r requirements-harness.txt.")
    if is_chat(settings.prompt_style):
        raise UserError("The harness builds its prompts from plain text; --prompt_style chat cannot be used with it.")
    names = ("tasks", "include_path", "limit", "num_fewshot")
    made_by = {name: getattr(settings, name) for name in names} | identify(settings)
    results = Results(
        settings.output_dir, {"benchmark": "lm_eval", "lm_eval": lm_eval.__version__, **made_by}, settings.overwrite
    )
    manager = open_tasks(settings)
    model = HarnessModel(partial(load, settings), batch_tokens=settings.batch_tokens, batch_size=settings.batch_size)
    output = lm_eval.simple_evaluate(
        model,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        apply_chat_template=settings.prompt_style != "plain",
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
    )
    results.replace(make_records(output["samples"]))  # all questions were evaluated, also in a repeated run
    summary = {
        "tasks": output["results"],
        "n": {task: counts["effective"] for task, counts in output["n-samples"].items()},
        "num_fewshot": output["n-shot"],
        "task_versions": output["versions"],
        "truncated": model.truncated,
        **(answer_statistics(model.generated) if model.generated else {}),
    }
    summary = json.loads(json.dumps(summary, default=str))
    return results.finish(summary, show(summary))


if __name__ == "__main__":
    cli.run(main, settings)
