"""How a benchmark's question is put to a language model, and which of its answers counts as chosen.

    rule      contexts              continuations    chosen
    choices   one prompt            every choice     lowest perplexity, exp(-log p(choice | prompt) / tokens)
    partial   one per choice        the same rest    most likely rest of the sentence

`choices` is the perplexity rule of the OPUS paper (MMLU too: the text of the answer is scored, not its letter).
`partial` (Trinh and Le 2018, arXiv 1806.02847) fills a blank: what follows it has the same tokens for every choice, so
no length enters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_opus.config import ConfigError
from megatron_opus.data.benchmarks.items import ANLI_CHOICES, AX_CHOICES, YES_NO, BenchmarkItem

Rule = Literal["choices", "partial"]
BLANKS = ("winogrande", "wsc")  # a sentence with _ for the choice
# The words that a text would have where the data set has labels, in the order of ANLI_CHOICES and AX_CHOICES.
ANLI_ANSWERS = ("True", "Neither", "False")
AX_ANSWERS = ("True", "False")
_ASKED = (
    "mmlu", "piqa", "arc_easy", "arc_challenge", "commonsense_qa", "openbookqa", "sciq", "wsc", "race_m", "race_h",
)  # fmt: skip


class EvaluationError(ConfigError):
    """An evaluation that cannot be made: says what was expected, what was found and what to change."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item as texts to score. `choices` have no space around them; one stands before each of them."""

    id: str
    subject: str
    rule: Rule
    contexts: tuple[str, ...]  # rule choices: one; partial: one per choice
    choices: tuple[str, ...]  # rule choices: the answers; partial: one, what follows the blank, as it stands
    gold: int

    @property
    def answers(self) -> int:
        """How many there are to choose from."""
        return max(len(self.contexts), len(self.choices))


def questions(items: Sequence[BenchmarkItem], limit: int | None = None) -> list[Question]:
    """The items of one benchmark in their order; with a limit, that many at even distances.

    Raises EvaluationError naming the first item without an answer, with an empty choice, or with nothing to score.
    """
    hidden = [item for item in items if item.gold is None]
    if hidden:
        raise EvaluationError(
            f"{hidden[0].benchmark}: {len(hidden)} of {len(items)} questions have no answer in the file (first: "
            f"{hidden[0].id}), as test splits often do; give the validation split"
        )
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    return [_question(item) for item in items]


def _question(item: BenchmarkItem) -> Question:
    where = f"{item.benchmark}, question {item.id}"
    assert item.gold is not None
    choices = tuple(choice.strip() for choice in item.choices)
    if not all(choices):
        raise EvaluationError(f"{where}: choice {choices.index('')} is empty; it has no likelihood, correct the file")
    if item.benchmark in BLANKS and "_" in item.question:
        before, after = _around_blank(item)
        contexts = tuple(f"{before}{choice}" for choice in choices)
        rest: tuple[str, ...] = (after,)
        if not after.strip():
            raise EvaluationError(
                f"{where}: nothing follows the blank, so no continuation tells the choices apart; correct the file"
            )
        rule: Rule = "partial"
    else:
        contexts, rest, rule = (prompt(item),), choices, "choices"
        rest = {ANLI_CHOICES: ANLI_ANSWERS, AX_CHOICES: AX_ANSWERS}.get(item.choices, rest)
        if not contexts[0].strip():
            raise EvaluationError(f"{where}: the question is empty")
    return Question(id=item.id, subject=item.subject, rule=rule, contexts=contexts, choices=rest, gold=item.gold)


def _around_blank(item: BenchmarkItem) -> tuple[str, str]:
    before, _, after = item.question.partition("_")
    return (f"{item.context} {before}" if item.context else before), after


def prompt(item: BenchmarkItem) -> str:
    """The text before the choice under the rule `choices`, without a space at its end."""
    question = item.question.strip()
    if item.choices == ANLI_CHOICES:
        return f"{item.context.strip()}\nQuestion: {question} True, False, or Neither?\nAnswer:"
    if item.choices == AX_CHOICES:
        return f"{item.context.strip()}\nQuestion: {question} True or False?\nAnswer:"
    if item.choices == YES_NO:
        return f"{item.context.strip()}\nQuestion: {question}\nAnswer:"
    if item.benchmark == "hellaswag":
        return _without_brackets(question)
    if item.benchmark == "siqa":
        return f"Q: {item.context.strip()} {question}\nA:"
    if item.benchmark in _ASKED:
        before = f"{item.context.strip()}\n" if item.context.strip() else ""
        return f"{before}Question: {question}\nAnswer:"
    return f"{item.context.strip()} {question}".strip()  # a text to be continued: COPA and any other


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow half has marks such as [header], [title] and [step] in it."""
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))).strip()
