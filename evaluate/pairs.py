"""Judgements of two answers to each question: of the pair in both orders, or of each alone; tables and figures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluate.answers import Answers, Item, render_answers
from evaluate.common import bootstrap_interval, markdown_table
from evaluate.judge import Judge, Request
from evaluate.replies import parse_scores
from lit_llama.run.report import plain_label
from lit_llama.storage.files import write_text
from lit_llama.utils import log

Verdict = Literal["win", "tie", "loss"]  # of the first answer
MIRRORED: dict[Verdict, Verdict] = {"win": "loss", "tie": "tie", "loss": "win"}
MIN_OVERLAP = 0.2  # share of the questions on which each side must be longer, for a length-controlled rate


def verdict(scores: tuple[float, float] | None) -> Verdict | None:
    """Return whether the first answer has the higher score; None stays None, for a reply that was not understood."""
    if scores is None:
        return None
    return "win" if scores[0] > scores[1] else "loss" if scores[0] < scores[1] else "tie"


def combine(direct: Verdict | None, swapped: Verdict | None) -> Verdict | None:
    """Return the verdict of both orders: a disagreement is a tie; None if a reply was not understood.

    Args:
        direct: of the first answer, when it was shown first.
        swapped: of the first answer, when it was shown second.
    """
    if direct is None or swapped is None:
        return None
    return direct if direct == swapped else "tie"


def tally(verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
    """Return counts and rates of the first answer.

    Returns:
        n: verdicts that were understood; win, tie, loss, unparsed: counts; rate: win / n; adjusted_rate:
        (win + tie / 2) / n; interval: 95% bootstrap interval of the adjusted rate. Rates are None if n is 0.
    """
    counts: dict[str, Any] = {name: sum(v == name for v in verdicts) for name in ("win", "tie", "loss")}
    n = sum(counts.values())
    counts = {"n": n, **counts, "unparsed": len(verdicts) - n}
    if not n:
        return {**counts, "rate": None, "adjusted_rate": None, "interval": None}
    points = values(verdicts)
    return {
        **counts,
        "rate": counts["win"] / n,
        "adjusted_rate": float(np.mean(points)),
        "interval": bootstrap_interval(points),
    }


def values(verdicts: Sequence[Verdict | None]) -> list[float]:
    """Return 1 for a win, 0.5 for a tie and 0 for a loss."""
    return [{"win": 1.0, "tie": 0.5, "loss": 0.0}[v] for v in verdicts if v is not None]


@dataclass(frozen=True)
class Comparison:
    """The judge's scores of one pair of answers: (first, second) in both orders, None for an unparsed reply.

    Args:
        item: the question.
        direct: when the first answer was shown first.
        swapped: when it was shown second; None too if there is only one order.
        one_order: there is only the direct order.
    """

    item: Item
    direct: tuple[float, float] | None
    swapped: tuple[float, float] | None
    one_order: bool = False

    @property
    def verdicts(self) -> tuple[Verdict | None, Verdict | None]:
        return verdict(self.direct), verdict(self.swapped)

    @property
    def verdict(self) -> Verdict | None:
        """The first answer wins, ties or loses; a disagreement of the orders is a tie."""
        return self.verdicts[0] if self.one_order else combine(*self.verdicts)

    @property
    def scores(self) -> tuple[float, float] | None:
        """Mean scores of both orders."""
        if self.verdict is None:
            return None
        both = [self.direct] if self.one_order else [self.direct, self.swapped]
        return float(np.mean([s[0] for s in both])), float(np.mean([s[1] for s in both]))


def reference_block(item: Item) -> str:
    return f"\n[Reference answer]\n{item.reference}\n[End of the reference answer]\n" if item.reference else ""


def judge_pairs(
    judge: Judge, template: str, items: list[Item], first: Answers, second: Answers
) -> tuple[list[Comparison], list[dict[str, Any] | None]]:
    """Return the comparison of each question in both orders, and the records of the judge's replies.

    Args:
        template: with {question}, {reference}, {answer_1} and {answer_2}.
    """
    requests = []
    for item in items:
        a, b = first.texts[item.id], second.texts[item.id]
        for order, (one, two) in {"direct": (a, b), "swapped": (b, a)}.items():
            prompt = template.format(question=item.text, reference=reference_block(item), answer_1=one, answer_2=two)
            requests.append(Request((("user", prompt),), {"id": item.id, "kind": "pair", "order": order}))
    records = judge.ask(requests)
    comparisons = []
    for item, direct, swapped in zip(items, records[::2], records[1::2], strict=True):
        scores = [parse_scores(record["reply"]) if record else None for record in (direct, swapped)]
        comparisons.append(Comparison(item, scores[0], scores[1] and scores[1][::-1]))
    return comparisons, records


@dataclass(frozen=True)
class Ratings:
    """A grade or a flag of both answers to a question, each read alone; None for a reply that was not understood."""

    item: Item
    first: float | bool | None
    second: float | bool | None


def judge_each(
    judge: Judge, items: list[Item], first: Answers, second: Answers, request: Callable[..., Request], parse: Callable
) -> tuple[list[Ratings], list[dict[str, Any] | None]]:
    """Return the ratings of each question's answers, and the records of the judge's replies.

    Args:
        request: returns the request to rate an answer, from its question, its text and its side, "first" or "second".
        parse: returns the rating in a reply.
    """
    sides = (("first", first), ("second", second))
    records = judge.ask([request(item, answers.texts[item.id], side) for item in items for side, answers in sides])
    parsed = [parse(record["reply"]) if record else None for record in records]
    return [Ratings(*triple) for triple in zip(items, parsed[::2], parsed[1::2], strict=True)], records


def rating_summary(
    ratings: list[Ratings], average: Callable[[list[Any]], dict[str, Any]], names: Sequence[str] = ("first", "second")
) -> dict[str, Any]:
    """Return the averages of all questions and of each category, and the ratings of each question, as JSON.

    Args:
        average: returns the averages of some questions from their (first, second) ratings.
        names: of the two ratings of a question.
    """

    def averages(part: list[Ratings]) -> dict[str, Any]:
        return average([(r.first, r.second) for r in part if None not in (r.first, r.second)])

    return {
        "all": averages(ratings),
        "by_category": {category: averages(part) for category, part in by_category(ratings).items()},
        "unparsed": [r.item.id for r in ratings if None in (r.first, r.second)],
        "questions": [{"id": r.item.id, names[0]: r.first, names[1]: r.second} for r in ratings],
    }


def comparison_summary(
    comparisons: list[Comparison], first: Answers | None = None, second: Answers | None = None
) -> dict[str, Any]:
    """Return counts, rates and scores of all questions and of each category, and the effects of order and length.

    `questions` lists the scores of each question in both orders, (first, second) each, and the verdict.
    """
    verdicts = [c.verdict for c in comparisons]
    summary: dict[str, Any] = {
        "all": {**tally(verdicts), **mean_scores(comparisons)},
        "by_category": {
            category: {**tally([c.verdict for c in part]), **mean_scores(part)}
            for category, part in by_category(comparisons).items()
        },
        "order": order_summary([c for c in comparisons if not c.one_order]),
        "unparsed": [c.item.id for c in comparisons if c.verdict is None],
    }
    if first and second:
        summary["length"] = length_summary(comparisons, first, second)
    summary["questions"] = [
        {"id": c.item.id, "category": c.item.category, "direct": c.direct, "swapped": c.swapped, "verdict": c.verdict}
        for c in comparisons
    ]
    return summary


def by_category(comparisons: Sequence[Any]) -> dict[str, list[Any]]:
    """Group objects that have an `item` by its category, in order of appearance."""
    groups: dict[str, list[Any]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.item.category, []).append(comparison)
    return groups


def mean_scores(comparisons: list[Comparison]) -> dict[str, float | None]:
    scores = [c.scores for c in comparisons if c.scores]
    means = [float(np.mean(column)) for column in zip(*scores, strict=True)] if scores else [None, None]
    return {"mean_score": means[0], "mean_score_against": means[1]}


def order_summary(comparisons: list[Comparison]) -> dict[str, float | int | None]:
    """Return how the order of the answers affects the verdicts.

    Returns:
        n: questions with both replies understood; consistent: share where both orders give the same verdict;
        prefers_first, prefers_second: shares of the single verdicts that prefer the answer shown first or second.
    """
    both = [c.verdicts for c in comparisons if None not in c.verdicts]
    if not both:
        return {"n": 0, "consistent": None, "prefers_first": None, "prefers_second": None}
    by_position = [v for direct, swapped in both for v in (direct, MIRRORED[swapped])]
    return {
        "n": len(both),
        "consistent": sum(direct == swapped for direct, swapped in both) / len(both),
        "prefers_first": by_position.count("win") / len(by_position),
        "prefers_second": by_position.count("loss") / len(by_position),
    }


def length_summary(comparisons: list[Comparison], first: Answers, second: Answers) -> dict[str, Any]:
    """Return mean lengths, how often the longer answer won, and the length-controlled rate if there is one.

    Lengths are in characters. `longer_won` is a share of the questions that one side won with answers of different
    length.
    """
    understood = [c for c in comparisons if c.verdict is not None]
    longer = {c.item.id: len(first.texts[c.item.id]) - len(second.texts[c.item.id]) for c in comparisons}
    decided = [c for c in understood if c.verdict != "tie" and longer[c.item.id]]
    won = sum((c.verdict == "win") == (longer[c.item.id] > 0) for c in decided)
    return {
        "mean_characters": float(np.mean([len(first.texts[c.item.id]) for c in comparisons])),
        "mean_characters_against": float(np.mean([len(second.texts[c.item.id]) for c in comparisons])),
        "decided": len(decided),
        "longer_won": won / len(decided) if decided else None,
        **length_controlled(values([c.verdict for c in understood]), [longer[c.item.id] for c in understood]),
    }


def length_controlled(points: list[float], differences: list[float], resamples: int = 1000) -> dict[str, Any]:
    """Return the adjusted rate that a logistic regression on the length difference predicts for equal lengths.

    As in length-controlled AlpacaEval (arXiv 2404.04475), without its terms for models and questions.
    If one side nearly always has the longer answer, nothing is known about equal lengths, and no rate is given.

    Args:
        points: 1, 0.5 or 0 for each question.
        differences: length of the first answer minus that of the second.

    Returns:
        first_longer, second_longer: questions; length_controlled_rate and _interval (95% bootstrap), or None.
    """
    y, x = np.asarray(points, float), np.asarray(differences, float)
    first_longer, second_longer = int((x > 0).sum()), int((x < 0).sum())
    result = {
        "first_longer": first_longer,
        "second_longer": second_longer,
        "length_controlled_rate": None,
        "length_controlled_interval": None,
    }
    if min(first_longer, second_longer) < max(MIN_OVERLAP * len(x), 5):
        return result
    x = np.tanh(x / x.std())  # so that a few very long answers do not decide
    rng = np.random.default_rng(0)
    rates = [rate_at_zero(x[rows], y[rows]) for rows in rng.integers(len(x), size=(resamples, len(x)))]
    low, high = np.quantile(rates, [0.025, 0.975])
    return {
        **result,
        "length_controlled_rate": rate_at_zero(x, y),
        "length_controlled_interval": (float(low), float(high)),
    }


def rate_at_zero(x: np.ndarray, y: np.ndarray, ridge: float = 0.01) -> float:
    """Fit p(y) = sigmoid(a + b x) by Newton's method with bounded steps and a small ridge, and return sigmoid(a)."""
    design, weights = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(20):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (p - y) + ridge * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step * min(1.0, 2.0 / np.linalg.norm(step).clip(1e-12))
    return float(1 / (1 + np.exp(-weights[0])))


def tally_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of all questions and of each category."""
    header = ["category", "n", "win", "tie", "loss", "unparsed", "win rate", "adjusted", "95%", "score", "against"]
    parts = {"all": summary["all"], **summary["by_category"]}
    return markdown_table(header, [[name, *tally_cells(part)] for name, part in parts.items()])


def tally_cells(part: dict[str, Any]) -> list[Any]:
    interval = "–" if part["interval"] is None else "{:.3f}–{:.3f}".format(*part["interval"])
    return [
        *(part[name] for name in ("n", "win", "tie", "loss", "unparsed")),
        *(fixed(part[name], 4) for name in ("rate", "adjusted_rate")),
        interval,
        *(fixed(part[name], 2) for name in ("mean_score", "mean_score_against")),
    ]


def fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def render_pairs(summary: dict[str, Any], first: str, second: str) -> str:
    """Return the comparison as Markdown.

    Args:
        summary: of `comparison_summary`.
        first, second: the names of both sides.
    """
    lines = [f"Wins are wins of {first} over {second}.\n", tally_table(summary)]
    order, length = summary["order"], summary.get("length")
    if order["n"]:
        lines.append(
            f"Both orders give the same verdict for {order['consistent']:.1%} of {order['n']} questions; otherwise it "
            f"is a tie. The judge preferred the answer shown first in {order['prefers_first']:.1%} of its replies and "
            f"the one shown second in {order['prefers_second']:.1%}.\n"
        )
    if length:
        lines.append(render_length(length))
    return "\n".join(lines) + render_unparsed(summary["unparsed"])


def render_unparsed(ids: list[Any]) -> str:
    """Return a sentence about the questions whose replies could not be parsed."""
    listed = ", ".join(map(str, ids[:30])) + (", ..." if len(ids) > 30 else "")
    return f"\nQuestions not counted, as a reply could not be parsed: {len(ids)} ({listed}).\n" if ids else ""


def render_length(length: dict[str, Any]) -> str:
    """Return the sentences about the lengths of the answers."""
    text = (
        f"Mean length: {length['mean_characters']:.0f} against {length['mean_characters_against']:.0f} characters. "
        f"The longer answer won {fixed(length['longer_won'], 3)} of the {length['decided']} decided questions.\n"
    )
    if not length["decided"]:
        return text
    if length["length_controlled_rate"] is None:
        return text + (
            f"No length-controlled rate: the first answer is longer for {length['first_longer']} questions and the "
            f"second for {length['second_longer']}, so too little is known about answers of equal length.\n"
        )
    low, high = length["length_controlled_interval"]
    return text + f"Length-controlled rate: {length['length_controlled_rate']:.3f} (95% {low:.3f}–{high:.3f}).\n"


def write_report(
    title: str,
    summary: dict[str, Any],
    sections: dict[str, str],
    output_dir: Path,
    plot: Callable[[dict[str, Any], Path], None] | None,
) -> dict[str, Any]:
    """Print the report of two sides, write summary.json, summary.md and figure.png, and return the summary.

    Args:
        summary: with `first` and `second` (of `describe`), `date`, `versions`, and perhaps `skipped` and `judge`.
        sections: Markdown by heading.
        plot: draws the summary into a file; None for no figure.
    """
    parts = [f"# {title}, {summary['date']}: {summary['first']['name']} against {summary['second']['name']}\n"]
    if summary.get("skipped"):
        parts.append(f"{summary['skipped']} questions are longer than a model's context; they are skipped.\n")
    parts += [render_answers(summary[side]) for side in ("first", "second") if "n" in summary[side]]
    sections = {**sections, "Judge": render_judge(summary["judge"])} if "judge" in summary else sections
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()) + ".\n")
    text = "\n".join(parts)
    print(text, end="")
    write_text(output_dir / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")
    write_text(output_dir / "summary.md", text)
    if plot:
        plot(summary, output_dir / "figure.png")
    log(f"wrote {output_dir}")
    return summary


def render_judge(judge: dict[str, Any]) -> str:
    """Return the judge's description and its prompts as Markdown."""
    sent = {"temperature": 0, "max_tokens": judge["max_tokens"], **judge["body"]}
    sampling = ", ".join(f"{name} {value}" for name, value in sent.items() if value is not None)
    failed = judge["failed_requests"]
    text = (
        f"Judge: {judge['model']} (served as {', '.join(judge['served_models']) or 'unknown'}) at "
        f"{', '.join(judge['endpoints'])}, {sampling or 'no sampling settings'}; "
        f"{judge['replies']} replies from {judge['first_reply']} to {judge['last_reply']}, {judge['cut_replies']} of "
        f"them cut at the limit; {len(failed)} requests without a reply{f' ({failed[0]})' if failed else ''}.\n"
    )
    if "reference_file" in judge:
        n = judge["questions_with_reference"]
        text += f"The judge saw the reference answers in {judge['reference_file']}, for {n} of the questions.\n"
    for name, prompt in judge["prompts"].items():
        text += f"\nPrompt ({name}):\n\n```text\n{prompt}\n```\n"
    return text


def plot_pairs(axes: Any, summary: dict[str, Any], title: str) -> None:
    """Draw the shares of wins, ties and losses of all questions and of each category."""
    parts = {"all": summary["all"], **summary["by_category"]}
    names = [plain_label(f"{name} (n = {part['n']})") for name, part in parts.items()]
    left = np.zeros(len(parts))
    for outcome, color in (("win", "C0"), ("tie", "0.8"), ("loss", "C1")):
        shares = np.array([part[outcome] / part["n"] if part["n"] else 0.0 for part in parts.values()])
        axes.barh(names, shares, left=left, color=color, label=outcome)
        left += shares
    axes.axvline(0.5, color="black", lw=0.8, ls="--")
    axes.invert_yaxis()
    axes.set(title=plain_label(title), xlabel="share of the questions", xlim=(0, 1))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)


def plot_bars(
    axes: Any, summary: dict[str, Any], fields: tuple[str, str], names: tuple[str, str], label: str, limit: float
) -> None:
    """Draw a number of both sides, for all questions and for each category."""
    parts = {"all": summary["all"], **summary["by_category"]}
    places = np.arange(len(parts))
    for shift, field, name in zip((-0.2, 0.2), fields, names, strict=True):
        axes.barh(places + shift, [part[field] or 0 for part in parts.values()], 0.4, label=plain_label(name))
    axes.set(yticks=places, yticklabels=[plain_label(name) for name in parts], xlim=(0, limit), xlabel=label)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
