"""Answer prompts with a base model and an adapter of any method.

The adapter file records its method, settings, prompt style and base model. Several Aligners are added up, in the prompt
style of the first; with --bank, each prompt may use different ones. Answers go to stdout, everything else to stderr.

Examples of --use, where a number after a name is its strength:

    --use pirate              every prompt with the bank's adapter "pirate"
    --use pirate base         the first prompt with "pirate", the second with the base model
    --use pirate+polite:0.5   every prompt with both, "polite" at half strength
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.answer_settings import AnswerSettings
from lit_llama.settings import Number


@dataclass
class Settings(AnswerSettings):
    # == Model ==
    adapter: tuple[Path, ...] = (Path("aligner_weights/microworld-pirate-n1"),)  # files or run folders; they add up
    strength: tuple[Number, ...] = (1.0,)  # one for all or one each: 0 is exactly the base, 1 as trained

    # == Many Aligners, a different one for each prompt ==
    bank: tuple[Path, ...] = ()  # instead of --adapter: a bank's file, or adapter files and folders, addressed by name
    use: tuple[str, ...] = ()  # names in the bank, one for all or one each (default: base); also "a:0.5" and "a+b"

    # == Prompts ==
    prompt: tuple[str, ...] = (
        "What is the capital of Pilmaria?",
        "How do I repair the old barn?",
    )  # instructions to answer
    prompt_style: str | None = None  # alpaca, orca, beaver, hh, plain or chat (default: the adapter's own)
    compare_base: bool = False  # also show the base model's answers


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from generate.interactive import Adapters, BankAdapters, Chat, OneAdapter, style_name
from lit_llama.answering import (
    Request,
    gather_requests,
    is_terminal,
    open_session,
    open_tokenizer,
    save_answers,
    show,
)
from lit_llama.bank import BASE, START_LAYER, adapter_name, adapter_names, make_bank, open_bank
from lit_llama.checkpoint import AdapterFile, read_adapter
from lit_llama.compose import Sum, load_adapted, load_with_bank, parse_sum, scaled_adapter
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.sharding import in_step, only_assists
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log


class Plan(NamedTuple):
    """How to answer requests: the model's loader, the requests, their styles and adapters, and metadata for the file.

    A chat has no requests and a single style. `adapters` is None if the model has the same adapters for all requests.
    """

    load: Callable[[], LLaMA]
    requests: list[Request]
    styles: list[PromptStyle]
    adapters: list[Sum] | None
    made_by: dict[str, Any]


def main(settings: Settings) -> None:
    settings.check_output(*settings.adapter, *settings.bank)
    check_choice(settings)
    if settings.interactive and is_terminal():
        return chat(settings, open_tokenizer(settings))
    requests, tokenizer = gather_requests(settings, bank=bool(settings.bank)), open_tokenizer(settings)
    plan = (plan_bank if settings.bank else plan_adapters)(settings, requests, tokenizer)
    session = open_session(settings, tokenizer, plan.load)
    if settings.interactive:
        return session.answer_lines(plan.styles[0])
    with in_step(session.model):
        if only_assists(session.model):
            return
        columns = {}
        if settings.compare_base:
            with scaled_adapter(session.model, 0.0):
                columns["base"] = session.answers(plan.requests, plan.styles)
        columns["aligned"] = session.answers(plan.requests, plan.styles, plan.adapters)
    try:  # first, since showing them ends the program if standard output is closed
        save_answers(settings, plan.requests, columns, {"strength": settings.strength, **plan.made_by})
    finally:
        show(plan.requests, columns)


def check_choice(settings: Settings) -> None:
    """Check that the settings that choose adapters fit together.

    Raises:
        UserError: They do not.
    """
    if settings.interactive and settings.compare_base:
        raise UserError("--interactive and --compare_base cannot be combined.")
    if settings.use and not settings.bank:
        raise UserError("--use names adapters of a bank; give --bank too.")
    if settings.bank and len(settings.strength) > 1:
        raise UserError("With --bank, --strength takes one number for all; give each its own in --use, as in a:0.5+b.")
    if not settings.bank and len(settings.strength) not in (1, len(settings.adapter)):
        counts = f"{len(settings.adapter)} adapters and {len(settings.strength)} strengths"
        raise UserError(f"There are {counts}; give each its own.")


def style_of(settings: Settings, adapter: AdapterFile, tokenizer: Tokenizer) -> PromptStyle:
    """Return the prompt style of the settings, else the adapter's, else Alpaca's."""
    return get_prompt_style(settings.prompt_style or adapter.meta.get("prompt_style") or "alpaca", tokenizer)


def plan_adapters(settings: Settings, requests: list[Request], tokenizer: Tokenizer) -> Plan:
    """Return the plan for --adapter: the same adapters for all requests.

    Raises:
        UserError: A file or setting does not fit.
    """
    adapters = [read_adapter(path) for path in settings.adapter]
    style = style_of(settings, adapters[0], tokenizer)
    load = partial(load_adapted, settings.checkpoint_dir, adapters, settings.strength, **settings.model_options)
    made_by = {"style": style.name, "adapter": " + ".join(str(adapter.path) for adapter in adapters)}
    return Plan(
        partial(load, merge=not settings.compare_base), requests, [style] * max(1, len(requests)), None, made_by
    )


def plan_bank(settings: Settings, requests: list[Request], tokenizer: Tokenizer) -> Plan:
    """Return the plan for --bank: each request with the adapters that its row in the file or --use names.

    Raises:
        UserError: A file or setting does not fit, or a name is not in the bank.
    """
    n_rows = max(1, len(requests))  # the chat has no requests and one row
    if len(settings.use) not in (0, 1, n_rows):
        raise UserError(f"There are {n_rows} prompts and {len(settings.use)} names in --use; give each its own.")
    bank = open_bank(settings.bank, settings.checkpoint_dir)
    names = settings.use if len(settings.use) == n_rows else (settings.use or (BASE,)) * n_rows
    if not settings.use and not any(request.adapter for request in requests):
        log("note: no prompt names an adapter, so the base model answers; name one with --use.")
    # the prompt file takes precedence over the command line
    requests = [replace(request, adapter=request.adapter or names[i]) for i, request in enumerate(requests)]
    sums = [parse_sum(text, bank) for text in ([request.adapter for request in requests] or names)]
    names = [settings.prompt_style or style_name(terms, bank, tokenizer) for terms in sums]
    by_name = {name: get_prompt_style(name, tokenizer) for name in set(names)}
    styles = [by_name[name] for name in names]
    sums = [tuple((name, strength * settings.strength[0]) for name, strength in terms) for terms in sums]
    made_by = {"style": settings.prompt_style or "each adapter's own", "bank": settings.bank}
    load = partial(load_with_bank, settings.checkpoint_dir, bank, **settings.model_options)
    if len(set(sums)) == 1 and not settings.compare_base:
        return Plan(partial(load, sums[0], merge=True), requests, styles, None, made_by)
    return Plan(load, requests, styles, sums, made_by)


def chat(settings: Settings, tokenizer: Tokenizer) -> None:
    """Chat in the terminal. Adapters are not merged into the base, so that they can be scaled and switched.

    Raises:
        UserError: A file or setting does not fit.
    """
    base, options = settings.checkpoint_dir, settings.model_options
    adapters = [] if settings.bank else [read_adapter(path) for path in settings.adapter]
    if any(adapter.method != "aligner" for adapter in adapters):
        session = open_session(settings, tokenizer, partial(load_adapted, base, adapters, **options))
        style = style_of(settings, adapters[0], tokenizer)
        choice: Adapters = OneAdapter(session.model, adapter_name(settings.adapter[0]), style, settings.strength[0])
        return Chat(session, choice).run()
    if settings.bank:
        if len(settings.use) > 1:
            raise UserError("A chat begins with one of the bank's adapters; give --use a single name or sum.")
        bank = open_bank(settings.bank, base)
        terms = parse_sum(settings.use[0] if settings.use else BASE, bank)
        strengths = [strength * settings.strength[0] for _, strength in terms]
        terms = tuple((name, strength) for (name, _), strength in zip(terms, strengths, strict=True))
    else:
        names = adapter_names(settings.adapter)
        bank = make_bank(base, list(zip(names, adapters, strict=True)), START_LAYER)
        strengths = [*settings.strength] * (len(names) if len(settings.strength) == 1 else 1)
        terms = tuple(zip(names, strengths, strict=True))
    session = open_session(settings, tokenizer, partial(load_with_bank, base, bank, **options))
    files = {} if settings.bank else {name: path.resolve() for name, path in zip(names, settings.adapter, strict=True)}
    Chat(session, BankAdapters(session.model, tokenizer, terms, settings.prompt_style, files)).run()


if __name__ == "__main__":
    cli.run(main, settings)
