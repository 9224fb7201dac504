"""Answer prompts with a base model and an adapter of any method.

The adapter file states its method, settings, prompt style and base model. Several Aligners are applied together, in the
prompt style of the first; with --bank, each prompt may name its own. Answers go to stdout, everything else to stderr.

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
    adapter: tuple[Path, ...] = (Path("aligner_weights/microworld-pirate-n1"),)  # files or run folders; several add up
    strength: tuple[Number, ...] = (1.0,)  # one for all or one each: 0 is the base exactly, 1 as trained

    # == Many Aligners, another one for each prompt ==
    bank: tuple[Path, ...] = ()  # instead of --adapter: a bank's file, or adapter files and folders, addressed by name
    use: tuple[str, ...] = ()  # names in the bank, one for each prompt or one for all; "base", "a:0.5" and "a+b" work

    # == Prompts ==
    prompt: tuple[str, ...] = (
        "What is the capital of Pilmaria?",
        "How do I repair the old barn?",
    )  # instructions to answer
    prompt_style: str | None = None  # alpaca, orca, beaver, hh or plain (default: the adapter's own)
    compare_base: bool = False  # the base model's answers beside the aligned ones


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from lit_llama.bank import BASE, open_bank
from lit_llama.chat import Request, gather_requests, open_session, save_answers, show
from lit_llama.checkpoint import read_adapter
from lit_llama.compose import Sum, load_adapted, load_with_bank, parse_sum, scaled_adapter
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle, get_prompt_style
from lit_llama.utils import UserError


class Plan(NamedTuple):
    """How requests are answered: loader, requests, prompt style and adapters of each, and what the file records.

    The chat has no requests, and one style. Adapters are None if the model has the same for all.
    """

    load: Callable[[], LLaMA]
    requests: list[Request]
    styles: list[PromptStyle]
    adapters: list[Sum] | None
    made_by: dict[str, Any]


def main(settings: Settings) -> None:
    settings.check_output(*settings.adapter, *settings.bank)
    if settings.interactive and settings.compare_base:
        raise UserError("--interactive and --compare_base do not go together.")
    requests = gather_requests(settings, bank=bool(settings.bank))
    plan = (plan_bank if settings.bank else plan_adapters)(settings, requests)
    session = open_session(settings, plan.load)
    if settings.interactive:
        return session.chat(plan.styles[0])
    columns = {"aligned": session.answers(plan.requests, plan.styles, plan.adapters)}
    if settings.compare_base:
        with scaled_adapter(session.model, 0.0):
            columns = {"base": session.answers(plan.requests, plan.styles), **columns}
    show(plan.requests, columns)
    save_answers(settings, plan.requests, columns, {"strength": settings.strength, **plan.made_by})


def plan_adapters(settings: Settings, requests: list[Request]) -> Plan:
    """Return the plan for --adapter: the same adapters for all requests.

    Raises:
        UserError: A file or setting does not fit.
    """
    if settings.use:
        raise UserError("--use names adapters of a bank; give --bank too.")
    adapters = [read_adapter(path) for path in settings.adapter]
    style = get_prompt_style(settings.prompt_style or adapters[0].meta.get("prompt_style", "alpaca"))
    load = partial(load_adapted, settings.checkpoint_dir, adapters, settings.strength, **settings.model_options)
    made_by = {"style": style.name, "adapter": " + ".join(str(adapter.path) for adapter in adapters)}
    return Plan(
        partial(load, merge=not settings.compare_base), requests, [style] * max(1, len(requests)), None, made_by
    )


def plan_bank(settings: Settings, requests: list[Request]) -> Plan:
    """Return the plan for --bank: each request with the adapters that its row in the file or --use names.

    Raises:
        UserError: A file or setting does not fit, or a name is not in the bank.
    """
    n_rows = max(1, len(requests))  # the chat has no requests and one row
    if len(settings.strength) > 1:
        raise UserError("With --bank, --strength takes one number for all; single ones go into --use, as in a:0.5+b.")
    if len(settings.use) not in (0, 1, n_rows):
        raise UserError(f"There are {n_rows} prompts and {len(settings.use)} names in --use; give each its own.")
    bank = open_bank(settings.bank, settings.checkpoint_dir)
    names = settings.use if len(settings.use) == n_rows else (settings.use or (BASE,)) * n_rows
    # the prompt file takes precedence over the command line
    requests = [replace(request, adapter=request.adapter or names[i]) for i, request in enumerate(requests)]
    sums = [parse_sum(text, bank) for text in ([request.adapter for request in requests] or names)]
    # the style is that of a sum's first adapter, for the base model that of the bank's first
    firsts = [terms[0][0] if terms else next(iter(bank)) for terms in sums]
    styles = [get_prompt_style(settings.prompt_style or bank[name].style) for name in firsts]
    sums = [tuple((name, strength * settings.strength[0]) for name, strength in terms) for terms in sums]
    made_by = {"style": settings.prompt_style or "each adapter's own", "bank": settings.bank}
    load = partial(load_with_bank, settings.checkpoint_dir, bank, **settings.model_options)
    if len(set(sums)) == 1 and not settings.compare_base:
        return Plan(partial(load, sums[0], merge=True), requests, styles, None, made_by)
    return Plan(load, requests, styles, sums, made_by)


if __name__ == "__main__":
    cli.run(main, settings)
