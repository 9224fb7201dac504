"""Answer MMLU, multiple-choice questions in 57 subjects (arXiv 2009.03300; the paper's Figure 5 left).

Downloads cais/mmlu, or reads --data_file: mmlu.zip of the MMLU authors, a folder of its files, one of its CSV files, or
rows with `question`, `subject`, `choices` and `answer` (0 to 3). By default, the predicted letter is the one with the
highest log-probability after the prompt, so each question takes one forward pass.
"""

import csv
import difflib
import io
import re
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch
from tqdm import tqdm

from evaluate.common import (
    EvaluatedModel,
    ModelSettings,
    Question,
    Results,
    answer_questions,
    answer_statistics,
    bootstrap_interval,
    drop_long,
    few_shot,
    identify,
    load,
    percent,
    pick_style,
)
from lit_llama import cli
from lit_llama.generation import Sampling
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.rows import download_rows, read_rows, text_field
from lit_llama.tables import markdown_table
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, eval_mode

LETTERS = "ABCD"

# fmt: off
CATEGORIES = {
    "STEM": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
        "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}
# fmt: on
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}


@dataclass
class Settings(ModelSettings):
    # == Model ==
    prompt_style: str = "plain"  # plain continues the benchmark's usual text; alpaca, orca, ... ask in that template

    # == Questions ==
    data_file: Path | None = None  # mmlu.zip, a folder, a CSV file or rows (default: download --repo_id)
    repo_id: str = "cais/mmlu"  # dataset on the Hugging Face hub; its dev and test splits are used
    subjects: tuple[str, ...] = ()  # names such as anatomy (default: all 57)
    limit: int | None = None  # answer only the first questions of each subject, this many
    shots: Literal[0, 1, 2, 3, 4, 5] = 1  # worked examples before each question, from the dev split
    skip_long: bool = True  # skip and count prompts longer than the model's context; false: stop with an error

    # == Scoring ==
    scoring: Literal["letters", "generate"] = "letters"  # compare the letters' log-probabilities, or read an answer
    batch_tokens: int = 16384  # letters: tokens of one forward pass, padding included
    max_new_tokens: int = 16  # generate: longest answer, in tokens
    batch_size: int = 32  # generate: questions answered at a time

    # == Output ==
    output_dir: Path = Path("out/evaluate/mmlu")  # receives answers.jsonl, summary.json and summary.md
    overwrite: bool = False  # replace results of other settings in output_dir


# == Data ==


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `answer` is a letter."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str

    def text(self) -> str:
        return "\n".join([self.question.strip(), *map("{}. {}".format, LETTERS, self.choices)])


def read_items(settings: Settings) -> dict[str, dict[str, list[Item]]]:
    """Return the questions of the dev and test splits by subject: `items[split][subject]`.

    Raises:
        UserError: a file is missing or is not MMLU's, or a row is bad (with its number).
    """
    path = settings.data_file
    if path is None:
        rows = {split: download_rows(settings.repo_id, split=split, name="all") for split in ("dev", "test")}
        found = [(split, item) for split in rows for item in from_rows(rows[split], f"{settings.repo_id} ({split})")]
    elif path.suffix in (".json", ".jsonl", ".parquet", ".gz"):
        found = [("test", item) for item in from_rows(read_rows(path), str(path))]
    else:
        found = [(split, item) for split, name, text in csv_files(path) for item in from_csv(text, name)]
    items: dict[str, dict[str, list[Item]]] = {"dev": {}, "test": {}}
    for split, item in found:
        items[split].setdefault(item.subject, []).append(item)
    if not items["test"]:
        raise UserError(f"{path or settings.repo_id} holds no test questions of MMLU; they are in SUBJECT_test.csv.")
    return items


def csv_files(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield split, name and text of each CSV file in a zip file or folder; of a single file also its dev questions.

    Raises:
        UserError: the path is missing or cannot be read.
    """

    def split(name: str) -> str | None:
        match = re.fullmatch(r"[a-z_]+_(dev|test)\.csv", name.split("/")[-1])
        return match and match[1]

    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(filter(split, archive.namelist())):
                    yield split(name), f"{path}/{name}", archive.read(name).decode("utf-8-sig")
            return
        if path.is_dir():
            files = sorted(path.rglob("*.csv"))
        else:
            dev = path.name.replace("_test.", "_dev.")
            files = [path, *filter(Path.is_file, (path.with_name(dev), path.parent.parent / "dev" / dev))][:2]
        if not path.is_dir() and not split(path.name):
            raise UserError(f"{path} is not named like MMLU's files: SUBJECT_test.csv.")
        for file in files:
            if split(file.name):
                yield split(file.name), str(file), file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as MMLU's files ({error}).") from None


def from_csv(text: str, name: str) -> Iterator[Item]:
    """Yield the questions of a CSV file; its rows are question, four choices and a letter.

    Raises:
        UserError: a row has other columns (with its number).
    """
    subject = re.split(r"_(?:dev|test)\.csv$", name.split("/")[-1])[0]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            if len(row) != 6:
                raise UserError(
                    f"Row {number} of {name} has {len(row)} columns instead of 6: question, four choices, letter."
                )
            yield checked(Item(subject, row[0], tuple(row[1:5]), row[5].strip()), number, name)
    except csv.Error as error:
        raise UserError(f"Row {number + 1} of {name} is not CSV: {error}.") from None


def from_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Item]:
    """Yield the questions of rows in the hub's schema.

    Raises:
        UserError: a row lacks a field or has another type there (with its number).
    """
    for number, row in enumerate(rows, 1):
        question, subject = text_field(row, number, "question"), text_field(row, number, "subject")
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
            raise UserError(f"Row {number} of {name}: 'choices' is not a list of four texts.")
        letter = LETTERS[answer] if type(answer) is int and answer in range(4) else str(answer)
        yield checked(Item(subject, question, tuple(choices), letter), number, name)


def checked(item: Item, number: int, name: str) -> Item:
    if item.subject not in CATEGORY:
        raise UserError(f"Row {number} of {name}: {item.subject!r} is not one of MMLU's 57 subjects.")
    if item.answer not in tuple(LETTERS):
        raise UserError(f"Row {number} of {name}: the answer is {item.answer!r} instead of one of A, B, C, D.")
    return item


def pick_subjects(wanted: tuple[str, ...], available: Iterable[str]) -> list[str]:
    """Return the subjects to evaluate, in alphabetical order.

    Raises:
        UserError: MMLU or the data has no such subject.
    """
    available = sorted(available)
    for name in wanted:
        if name not in CATEGORY:
            near = difflib.get_close_matches(name.replace(" ", "_"), CATEGORY, n=1)
            hint = f"the nearest name is {near[0]!r}" if near else f"examples are {', '.join(available[:3])}"
            raise UserError(f"MMLU has no subject {name!r}; {hint}.")
        if name not in available:
            raise UserError(f"The data has no questions of the subject {name!r}; it has {', '.join(available)}.")
    return sorted(set(wanted)) or available


# == Prompts ==


def make_questions(settings: Settings, style: PromptStyle) -> list[Question]:
    """Read the questions and render their prompts; a question's id is its subject and number.

    Raises:
        UserError: a setting is out of range, the data is bad, or a subject has too few dev questions.
    """
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"limit is {settings.limit}; it must be 1 or more.")
    items = read_items(settings)
    questions = []
    for subject in pick_subjects(settings.subjects, items["test"]):
        examples = items["dev"].get(subject, [])[: settings.shots]
        if len(examples) < settings.shots:
            raise UserError(
                f"{settings.data_file or settings.repo_id} has {len(examples)} dev questions of {subject}, fewer than "
                f"--shots {settings.shots}; use --shots {len(examples)}."
            )
        for number, item in enumerate(items["test"][subject][: settings.limit], 1):
            details = {"subject": subject, "gold": item.answer, "choices": item.choices}
            questions.append(Question(f"{subject}/{number}", render(item, examples, style), details))
    return questions


def render(item: Item, examples: list[Item], style: PromptStyle) -> str:
    """Return the prompt of a question after worked examples, up to where the letter belongs."""
    subject = item.subject.replace("_", " ")
    if style.name == "plain":
        header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        return header + few_shot(style, [(e.text(), e.answer) for e in examples], item.text())
    header = f"Answer the following multiple choice question about {subject} with A, B, C or D.\n\n"
    return few_shot(style, [(header + e.text(), e.answer) for e in examples], header + item.text()).rstrip()


# == Scoring by the letters' log-probabilities ==


@dataclass(frozen=True)
class Letters:
    """How a tokenizer encodes " A", " B", " C" and " D" after a prompt.

    Args:
        space: tokens that are appended to the prompt: those before the letters, which some tokenizers split off.
        tokens: for each letter, its token and how many of `space` precede it. "▁B" may be one token while "▁", "A"
            are two.
    """

    space: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Letters":
        """Encode the letters.

        Raises:
            UserError: the letters cannot be compared in one forward pass.
        """
        encoded = [tokenizer.encode(f"Answer: {letter}") for letter in LETTERS]
        shared = next(i for i, ids in enumerate(zip(*encoded, strict=False)) if len(set(ids)) > 1)
        encoded = [ids[shared:] for ids in encoded]
        space = max((ids[:-1] for ids in encoded), key=len)
        if any(ids[:-1] != space[: len(ids) - 1] for ids in encoded):
            raise UserError(f"{tokenizer.path} splits the letters A to D unevenly; use --scoring generate.")
        return cls(tuple(space), tuple((ids[-1], len(ids) - 1) for ids in encoded))

    def prompt(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the tokens of a prompt, to which `space` is appended."""
        count = self.tokens[0][1] + 1  # tokens of the first letter
        return [*tokenizer.encode(f"{text} {LETTERS[0]}", bos=True)[:-count], *self.space]


def length_batches(lengths: dict[str, int], batch_tokens: int) -> list[list[str]]:
    """Group ids of similar length, longest first, so that a padded batch has at most `batch_tokens` tokens.

    A longer prompt makes a batch of its own.
    """
    batches: list[list[str]] = []
    for id in sorted(lengths, key=lambda id: -lengths[id]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(id)
        else:
            batches.append([id])
    return batches


def pad(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Return token ids (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True).to(device)


@torch.inference_mode()
def letter_logps(model: LLaMA, prompts: list[list[int]], letters: Letters) -> torch.Tensor:
    """Return the log-probabilities (B, 4), fp32, of the letters after each prompt, in one forward pass.

    Prompts are padded on the right, where causal attention does not see the padding.
    """
    device = model.transformer.wte.weight.device
    idx = pad(prompts, device)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    n_space, rows = len(letters.space), torch.arange(len(prompts), device=device)
    if n_space == 0:
        logits = model(idx, last=last).unsqueeze(1)
    else:
        logits = model(idx)[rows[:, None], last[:, None] + torch.arange(-n_space, 1, device=device)]
    logps = logits[..., : model.config.vocab_size].float().log_softmax(-1)  # (B, n_space + 1, V)
    before = torch.zeros(len(prompts), n_space + 1, device=device)  # of the tokens of `space` so far
    for i, token in enumerate(letters.space):
        before[:, i + 1] = before[:, i] + logps[:, i, token]
    return torch.stack([before[:, n] + logps[:, n, token] for token, n in letters.tokens], dim=1).cpu()


def score_letters(
    evaluated: EvaluatedModel,
    questions: list[Question],
    prompts: dict[str, list[int]],
    letters: Letters,
    results: Results,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """Score the questions that have no record yet, longest prompts first, and return the records of all.

    Args:
        prompts: the result of `letters.prompt`, by id.
    """
    by_id = {question.id: question for question in questions}
    done = results.answered({question.id: question.prompt for question in questions})
    lengths = {id: len(prompts[id]) for id in by_id if id not in done}
    with (
        eval_mode(evaluated.model),
        tqdm(total=sum(lengths.values()), unit="token", unit_scale=True, desc="MMLU") as bar,
    ):
        for batch in length_batches(lengths, batch_tokens):
            began = time.perf_counter()
            logps = letter_logps(evaluated.model, [prompts[id] for id in batch], letters).tolist()
            seconds = (time.perf_counter() - began) / len(batch)
            pairs = zip((by_id[id] for id in batch), logps, strict=True)
            results.add(*(letter_record(q, row, lengths[q.id], seconds) for q, row in pairs))
            bar.update(sum(lengths[id] for id in batch))
    return [results.by_id[question.id] for question in questions]


def letter_record(question: Question, logps: list[float], prompt_tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "id": question.id,
        "prompt": question.prompt,
        **question.details,
        "logps": {letter: round(x, 5) for letter, x in zip(LETTERS, logps, strict=True)},
        "predicted": LETTERS[logps.index(max(logps))],
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
    }


# == Scoring by a generated answer ==


def read_letter(record: dict[str, Any]) -> dict[str, Any]:
    """Return the letter that an answer chooses as `predicted`, or None.

    It is the letter that the answer begins with or states after "answer is", or that of the one choice that the answer
    begins with.
    """
    answer = record["answer"]
    match = re.match(r"\W*([A-D])(?![\w'’])(?!\s+[a-z])", answer) or re.search(
        r"\b[Aa]nswer\s*(?:is|:)\W*([A-D])\b(?!\s+[a-z])", answer
    )
    if match:
        return {"predicted": match[1]}
    text = answer.strip().lower()
    same = [letter for letter, c in zip(LETTERS, record["choices"], strict=True) if text.startswith(c.strip().lower())]
    return {"predicted": same[0] if len(same) == 1 else None}


def generate_letters(
    evaluated: EvaluatedModel, questions: list[Question], settings: Settings, results: Results
) -> list[dict[str, Any]]:
    stop = ("\n\n",) if evaluated.style.name == "plain" else evaluated.style.stop
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    return answer_questions(
        evaluated, questions, sampling, results, stop=stop, batch_size=settings.batch_size, desc="MMLU",
        score=read_letter,
    )  # fmt: skip


# == Summary ==


def summarize(records: list[dict[str, Any]], questions: list[Question], scoring: str) -> dict[str, Any]:
    """Return accuracies of all questions, of the four categories and of each subject, with statistics of the answers.

    All means are over questions, as in the benchmark's paper.
    """
    asked = Counter(q.details["subject"] for q in questions)
    subjects = {subject: {subject} for subject in sorted(asked)}
    categories = {name: set(members) & set(asked) for name, members in CATEGORIES.items()}

    def group(members: Iterable[str]) -> dict[str, Any]:
        correct = [r["predicted"] == r["gold"] for r in records if r["subject"] in members]
        return {
            "n": len(correct),
            "skipped": sum(asked[subject] for subject in members) - len(correct),
            "accuracy": sum(correct) / len(correct) if correct else None,
            "interval": bootstrap_interval(correct) if correct else None,
        }

    predicted = Counter(r["predicted"] for r in records)
    seconds = max(sum(r["seconds"] for r in records), 1e-9)
    if scoring == "generate":
        statistics = answer_statistics(records)
    else:
        statistics = {"prompt_tokens_per_second": sum(r["prompt_tokens"] for r in records) / seconds}
    return {
        **group(asked),
        "categories": {name: group(members) for name, members in categories.items() if members},
        "subjects": {name: group(members) for name, members in subjects.items()},
        "predicted": {letter or "none": predicted[letter] for letter in (*LETTERS, None)},
        **statistics,
    }


def show(summary: dict[str, Any], shots: int) -> str:
    """Return the summary as Markdown."""
    groups = {"**all**": summary, **{f"**{k}**": v for k, v in summary["categories"].items()}, **summary["subjects"]}
    rows = [
        [
            name,
            group["n"],
            group["skipped"],
            "-" if group["accuracy"] is None else f"{group['accuracy']:.4f}",
            "-" if group["interval"] is None else "{:.3f} to {:.3f}".format(*group["interval"]),
        ]
        for name, group in groups.items()
    ]
    table = markdown_table([f"MMLU, {shots}-shot", "questions", "skipped", "accuracy", "95 % interval"], rows)
    notes = "Predicted: " + ", ".join(f"{letter} {count}" for letter, count in summary["predicted"].items())
    if "ended_share" in summary:
        notes += f". {percent(summary['ended_share'])} of the answers ended by themselves, after "
        notes += f"{summary['mean_tokens']:.1f} tokens on average; {summary['tokens_per_second']:.0f} tokens/s"
    else:
        notes += f". {summary['prompt_tokens_per_second']:.0f} prompt tokens/s"
    return f"{table}\n\n{notes}.\n"


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate one model and return the content of summary.json."""
    if settings.batch_tokens < 1:
        raise UserError(f"batch_tokens is {settings.batch_tokens}; it must be 1 or more.")
    questions = make_questions(settings, pick_style(settings))
    made_by = {"benchmark": "mmlu", "scoring": settings.scoring, "shots": settings.shots, **identify(settings)}
    if settings.scoring == "generate":
        made_by["max_new_tokens"] = settings.max_new_tokens
    results = Results(settings.output_dir, made_by, settings.overwrite)
    evaluated = load(settings)
    letters = Letters.of(evaluated.tokenizer) if settings.scoring == "letters" else None
    prompts = {q.id: letters.prompt(evaluated.tokenizer, q.prompt) for q in questions} if letters else {}
    lengths = [len(prompts[q.id]) for q in questions] if letters else None
    fitting = drop_long(evaluated, questions, lengths, skip=settings.skip_long)
    if letters:
        records = score_letters(evaluated, fitting, prompts, letters, results, settings.batch_tokens)
    else:
        records = generate_letters(evaluated, fitting, settings, results)
    summary = summarize(records, questions, settings.scoring)
    table = show(summary, settings.shots)
    print(table, end="")
    return results.finish(summary, table)


if __name__ == "__main__":
    cli.run(main, Settings)
