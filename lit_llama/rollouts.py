"""Sampling in reinforcement learning: the answers of a step as training data, and greedy answers to held-out prompts.

A step samples a group of answers to each of its prompts from the current policy, scores them, and takes one or more
optimizer steps on them. The answers depend only on the seed, the step number and the policy, so a resumed run gets the
same answers and rewards.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llama.console import transient_bar
from lit_llama.data import PromptData
from lit_llama.epochs import plan_epoch, plan_validation
from lit_llama.generation import Sampling, cut_at_stop, generate
from lit_llama.model import LLaMA
from lit_llama.modules import add_scaled, eval_mode
from lit_llama.packing import answers_per_row, pack_answers
from lit_llama.prompts import get_prompt_style
from lit_llama.rewards import Reward
from lit_llama.rl import answer_logps, answer_weights, group_advantages
from lit_llama.run.processes import together
from lit_llama.run.steps import Batches, Step, mean_over_processes, share_of_process
from lit_llama.run.train_settings import LengthTerm
from lit_llama.sharding import in_step
from lit_llama.storage.schema import field
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import Trainer


@dataclass
class Answers:
    """Answers of a model.

    Args:
        prompts, ids: Token ids of each prompt and its answer; the ids of a finished answer include the stop token.
        texts: The answers as text, up to the first stop text of the prompt style.
        ended: Whether each answer ended with a stop token.
        rows: (answers,) row number of each prompt.
    """

    prompts: list[list[int]]
    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    rows: np.ndarray


class Answerer:
    """Answers the prompts of a dataset.

    Args:
        max_new_tokens: Longest answer, in tokens.
    """

    def __init__(self, data: PromptData, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self.data, self.tokenizer, self.max_new_tokens = data, tokenizer, max_new_tokens
        self.stop = get_prompt_style(field(data.meta, "prompt_style", str, "meta.json of the dataset"), tokenizer).stop

    def answers(
        self, model: LLaMA, rows: np.ndarray, *, each: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> Answers:
        """Return `each` answers to the prompt of every row; the answers of a row are adjacent."""
        seeds = (rows[:, None] * each + np.arange(each)).flatten().tolist()
        rows = np.repeat(rows, each)
        prompts = self.data.prompt_ids(rows)
        sampling = Sampling(self.max_new_tokens, temperature, seed=seed)
        ids = generate(model, prompts, sampling, finished=self.has_ended, rows=seeds)
        ended = [self.has_ended(answer) for answer in ids]
        texts = [self.tokenizer.decode(answer[: len(answer) - end]) for answer, end in zip(ids, ended, strict=True)]
        texts = [cut_at_stop(text, self.stop)[0].strip() for text in texts]
        return Answers(prompts, ids, texts, ended, rows)

    def has_ended(self, ids: list[int]) -> bool:
        return ids[-1] in self.tokenizer.stop_ids

    def rewards(self, reward: Reward, answers: Answers) -> Tensor:
        """Return the reward of each answer, (answers,) fp32."""
        prompts = [self.tokenizer.decode(ids) for ids in answers.prompts]
        values = reward(prompts, answers.texts, self.data.sources(answers.rows), answers.rows.tolist())
        return torch.tensor(values, dtype=torch.float32)


class Rollouts:
    """Sampled answers as training data (`lit_llama.data.Data`): a row is a prompt with a group of answers.

    Args:
        reward: Scores the answers.
        group_size: Number of answers to each prompt, G, 2 or more.
        seed: Seed of sampling.
        divide_by_std: As for `group_advantages`.
        length_term: As for `answer_weights`.
        keep_equal: Keep groups whose rewards are all equal. Their advantages are 0, so only the KL term trains on them.
    """

    def __init__(
        self, answerer: Answerer, reward: Reward, *, group_size: int, seed: int, divide_by_std: bool,
        length_term: LengthTerm, keep_equal: bool,
    ) -> None:  # fmt: skip
        self.answerer, self.reward, self.group_size, self.seed = answerer, reward, group_size, seed
        self.divide_by_std, self.length_term, self.keep_equal = divide_by_std, length_term, keep_equal
        self.lengths, self.weights = answerer.data.lengths, answerer.data.weights
        self.tokens, self.sha256 = group_size * self.lengths, answerer.data.sha256
        self.batches: dict[bytes, dict[str, Tensor]] = {}  # of the current step, by their rows

    def sample(self, model: LLaMA, step: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Sample and score answers to the prompts of a micro-batch, which `batch` then returns.

        Returns:
            Sums over the prompts: mean reward and standard deviation of its group, whether all rewards of the group are
            equal (no_signal), mean number of tokens of an answer, share of answers that ended, and number of tokens
            of all answers, each with its prompt.
        """
        seed = int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0])
        answers = self.answerer.answers(model, rows, each=self.group_size, temperature=1.0, seed=seed)
        rewards = self.answerer.rewards(self.reward, answers).view(-1, self.group_size)
        lengths = torch.tensor([len(ids) for ids in answers.ids])
        ended = torch.tensor(answers.ended).float()
        has_signal = (rewards != rewards[:, :1]).any(1)
        trained = torch.arange(len(rewards)) if self.keep_equal else has_signal.nonzero().flatten()
        if len(trained) == 0:  # a batch must not be empty
            trained = torch.tensor([0])
        first = trained * self.group_size  # of the answers to each prompt
        kept = (first[:, None] + torch.arange(self.group_size)).flatten()
        means = answer_weights(lengths, self.group_size, "answer", self.answerer.max_new_tokens)
        per_answer = {
            "advantages": group_advantages(rewards, self.divide_by_std).flatten(),
            "weights": answer_weights(lengths, self.group_size, self.length_term, self.answerer.max_new_tokens),
            "mean_weights": means * len(rewards) / len(trained),  # the trainer divides by all prompts
        }
        per_token = {name: values[kept].repeat_interleave(lengths[kept]) for name, values in per_answer.items()}
        groups = []
        for i in first.tolist():
            prompt, ids = answers.prompts[i], answers.ids[i : i + self.group_size]
            mean_length = sum(map(len, ids)) / len(ids)
            size = answers_per_row(len(prompt), mean_length, len(ids), model.config.n_embd)
            groups += [(prompt, ids[j : j + size]) for j in range(0, len(ids), size)]
        self.batches[rows.tobytes()] = {**pack_answers(groups), **per_token}
        return {
            "reward": rewards.mean(1).sum(),
            "reward_std": rewards.std(1, correction=0).sum(),
            "no_signal": (~has_signal).float().sum(),
            "answer_tokens": lengths.sum() / self.group_size,
            "ended": ended.sum() / self.group_size,
            "tokens": torch.tensor(float(self.group_size * (self.lengths[rows] - 1).sum() + lengths.sum())),
        }

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the sampled answers to a micro-batch of prompts.

        Returns:
            idx, labels, segments, label_index: from `pack_answers`, one or more rows for each prompt. Without
                `keep_equal`, only prompts whose rewards differ, or the first prompt if there are none.
            advantages, weights, mean_weights: (n,) for each label, the value of its answer, for `PolicyLoss`.
            old_logps: (n,) log-probabilities under the sampling policy, if they were kept.
        """
        return self.batches[indices.tobytes()]


class PolicyTrainer(Trainer):
    """A `Trainer` whose steps sample their data, and whose validation scores greedy answers to held-out prompts.

    Args:
        val_answerer: Answers the validation prompts.
        score: Scores these answers: 1 is right. The validation loss is 1 minus the mean score.
    """

    train: Rollouts

    def __init__(self, *args: Any, val_answerer: Answerer, score: Reward, **options: Any) -> None:
        # not sorted by length: prompts of one kind have similar lengths, and steps of a single kind undo each other
        super().__init__(*args, plan=partial(plan_epoch, sorted_batches=1), **options)
        self.val_answerer, self.score = val_answerer, score
        self.batches = Batches(self.train, self.fabric, ahead=False)  # a step samples its data
        self.log_interval = 1  # each step waits for the device anyway, to score its answers

    def train_step(self, micro_batches: list[np.ndarray]) -> Step:
        """Sample answers, take `updates_per_batch` optimizer steps on them, and return the last step."""
        began, sampled = time.perf_counter(), self.sample(micro_batches)
        for _ in range(self.settings.updates_per_batch):
            step = super().train_step(micro_batches)
        self.tokens -= (self.settings.updates_per_batch - 1) * step.tokens  # counted once, as in `tokens_per_s`
        return step._replace(began=began, further=sampled)

    def sample(self, micro_batches: list[np.ndarray]) -> dict[str, float]:
        """Sample the answers of this process and return metrics, means over the prompts of all processes."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        self.train.batches.clear()
        with together(self.fabric), in_step(self.model):
            for rows, scale in share_of_process(self.fabric, micro_batches):
                sampled = self.train.sample(self.unwrapped, self.step, rows)
                add_scaled(sums, self.fabric.to_device(sampled), scale)
                if self.settings.updates_per_batch > 1:  # the first update does not need them: its ratio is 1
                    batch = self.train.batch(rows)
                    on_device = self.fabric.to_device(batch)
                    with torch.no_grad(), eval_mode(self.model):
                        batch["old_logps"] = answer_logps(self.model, on_device)
        metrics = mean_over_processes(self.fabric, sums, sum(map(len, micro_batches)))
        self.train.tokens[np.concatenate(micro_batches)] = round(metrics.pop("tokens"))
        return {f"train/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return metrics of greedy answers to the validation prompts, always in the same batches."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.fabric.device))
        with together(self.fabric), in_step(self.model):
            batches = share_of_process(self.fabric, plan_validation(self.val.lengths, self.settings.answers_at_once))
            for rows, scale in transient_bar(batches, "Validation", "batch"):
                answers = self.val_answerer.answers(self.unwrapped, rows)
                scores = rewards = self.val_answerer.rewards(self.score, answers)
                if self.train.reward is not self.score:
                    rewards = self.val_answerer.rewards(self.train.reward, answers)
                metrics = {
                    "loss": (1 - scores).sum(),
                    "accuracy": (scores >= 1).float().sum(),
                    "reward": rewards.sum(),
                    "answer_tokens": torch.tensor(float(sum(map(len, answers.ids)))),
                    "ended": torch.tensor(answers.ended).float().sum(),
                }
                add_scaled(sums, self.fabric.to_device(metrics), scale)
        return mean_over_processes(self.fabric, sums, len(self.val))

    def summary(self) -> dict[str, Any]:
        summary = super().summary()
        if self.run.is_first:
            rows = sorted(self.run.metrics.rows.items())
            # there are none if metrics.csv was moved away after the last step
            accuracies = [row["val/accuracy"] for _, row in rows if "val/accuracy" in row] or [None]
            epochs, steps = divmod(self.step, self.steps_per_epoch)
            prompts = epochs * len(self.train.lengths) + steps * self.settings.batch_size
            summary |= {
                "accuracy_before": accuracies[0],
                "accuracy_after": accuracies[-1],
                "accuracy_at_best": dict(rows).get(summary["best_step"], {}).get("val/accuracy"),
                "answers_sampled": prompts * self.train.group_size,
            }
        return summary


def falling_score(rows: dict[int, dict[str, float]]) -> str | None:
    """Return a warning if the reward of the sampled answers rose and the accuracy on held-out prompts fell.

    Args:
        rows: The metrics of a run by step (`MetricsLog.rows`). The mean reward between the last two validations is
            compared with that between the first two. The last accuracy must be more than 5 points below the highest.
    """
    accuracies = {step: row["val/accuracy"] for step, row in sorted(rows.items()) if "val/accuracy" in row}
    if len(accuracies) < 3:
        return None
    steps = list(accuracies)
    first, last = (
        np.mean([row["train/reward"] for step, row in rows.items() if begin <= step < end and "train/reward" in row])
        for begin, end in (steps[:2], steps[-2:])
    )
    best, now = max(accuracies.values()), accuracies[steps[-1]]
    if not (last > first and now < best - 0.05):
        return None
    return (
        f"warning: the reward of sampled answers rose from {first:.3f} to {last:.3f}, but the accuracy on held-out "
        f"prompts fell from {best:.1%} to {now:.1%}: wrong answers may earn the reward. Read samples.jsonl, lower "
        "--learning_rate, or raise --kl_weight."
    )
