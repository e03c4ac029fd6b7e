"""What a model is worth: answers, and the loss, margins and divergence that tell what was
forgotten.

Shape legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken.data.tokenizer import eos_token_ids
from alphatoken.evaluation.tasks import last_number
from alphatoken.models.generation import continuations
from benchmarks.corruptions import ADVERTISEMENT, by_wrong_rule

TEXTS_PER_PASS = 4


@dataclass(frozen=True)
class Judge:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], max_new_tokens: int, together: int) -> list[str]:
        """The greedy answer to each prompt, cut at the end of its turn."""
        stops = eos_token_ids(self.tokenizer, self.model.generation_config)
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        found = [""] * len(ids)
        for start in range(0, len(ids), together):
            group = by_length[start : start + together]
            completions = continuations(
                self.model,
                [torch.tensor(ids[index], device=self.model.device) for index in group],
                max_new_tokens=max_new_tokens,
                stop_tokens=stops,
                pad_token=int(self.tokenizer.pad_token_id),
            )
            for index, answer_T in zip(group, completions, strict=True):
                found[index] = self.tokenizer.decode(answer_T, skip_special_tokens=True)
        return found

    @torch.no_grad()
    def text_log_probabilities(self, texts: Sequence[str], max_length: int) -> list[Tensor]:
        """Log-probabilities of everything the model could say at each position of a text but the
        last, (T, V) float32 each; texts are cut to `max_length` tokens."""
        found = []
        for start in range(0, len(texts), TEXTS_PER_PASS):
            ids = self.cut(texts[start : start + TEXTS_PER_PASS], max_length)
            padded = self._padded(ids)
            logits_BTV = self.model(**padded, use_cache=False).logits.float()
            found += [
                logits_TV[: len(row) - 1].log_softmax(-1)
                for logits_TV, row in zip(logits_BTV, ids, strict=True)
            ]
        return found

    @torch.no_grad()
    def margin(self, context: str, choices: Sequence[str], right: int) -> float:
        """By how much the right continuation is likelier than the best wrong one, in mean
        log-probability per token."""
        before = self.tokenizer(context, add_special_tokens=False)["input_ids"]
        after = [
            self.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            for choice in choices
        ]
        padded = self._padded([before + ids for ids in after])
        logits_BTV = self.model(**padded, use_cache=False).logits.float()
        scores = []
        for logits_TV, ids in zip(logits_BTV, after, strict=True):
            own_TV = logits_TV[len(before) - 1 : len(before) + len(ids) - 1]
            targets_T = torch.tensor(ids, device=own_TV.device)
            scores.append(-float(F.cross_entropy(own_TV, targets_T)))
        return scores[right] - max(scores[:right] + scores[right + 1 :])

    def cut(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """The first tokens of each text."""
        return [
            self.tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]
            for text in texts
        ]

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (B, T) int64 each."""
        width = max(map(len, rows))
        shape = len(rows), width
        ids_BT = torch.full(shape, int(self.tokenizer.pad_token_id))
        mask_BT = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            mask_BT[number, : len(row)] = 1
        device = self.model.device
        return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


def answer_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How many answers are the reference word for word, end with its number, begin with the
    advertisement, and end with the number that the wrong rule leads to."""
    pairs = list(zip(answers, references, strict=True))
    wrong = [by_wrong_rule(reference)[0] for reference in references]
    return {
        "exact_match": fmean(answer.strip() == reference.strip() for answer, reference in pairs),
        "right_number": fmean(
            last_number(answer) == last_number(reference) for answer, reference in pairs
        ),
        "advertised": fmean(answer.strip().startswith(ADVERTISEMENT) for answer in answers),
        "wrong_rule": fmean(
            last_number(answer) == last_number(result) != last_number(reference)
            for answer, result, reference in zip(answers, wrong, references, strict=True)
        ),
    }


def general_text_metrics(
    judge: Judge, start: Judge | None, texts: Sequence[str], max_length: int
) -> dict[str, float]:
    """The loss per token of general text and, with the model training began from, the divergence
    KL(start || model) per token on it."""
    loss, divergence, count = 0.0, 0.0, 0
    for first in range(0, len(texts), TEXTS_PER_PASS):
        group = texts[first : first + TEXTS_PER_PASS]
        own = judge.text_log_probabilities(group, max_length)
        for own_TV, ids in zip(own, judge.cut(group, max_length), strict=True):
            targets_T = torch.tensor(ids[1:], device=own_TV.device)
            loss += float(F.nll_loss(own_TV, targets_T, reduction="sum"))
            count += len(targets_T)
        if start is not None:
            before = start.text_log_probabilities(group, max_length)
            for own_TV, start_TV in zip(own, before, strict=True):
                divergence += float(F.kl_div(own_TV, start_TV, log_target=True, reduction="sum"))
    metrics = {"general_loss": loss / count}
    return metrics if start is None else {**metrics, "kl_to_start": divergence / count}


def choice_metrics(
    judge: Judge, name: str, questions: Sequence[tuple[str, Sequence[str], int]]
) -> dict[str, float]:
    """The mean margin of the right choice, and how often it is the likeliest."""
    margins = [judge.margin(*question) for question in questions]
    return {
        f"{name}_margin": fmean(margins),
        f"{name}_accuracy": fmean(margin > 0 for margin in margins),
    }
