"""Benchmark text inside of documents."""

from __future__ import annotations

import pytest

from megatron_opus.data.benchmarks.items import BenchmarkItem
from megatron_opus.data.proxy.benchmark_overlap import BenchmarkText

QUESTION = "Which of these changes when water freezes slowly in a tall glass on the cold window sill?"


def item(question: str, *choices: str, name: str = "mmlu") -> BenchmarkItem:
    return BenchmarkItem(benchmark=name, id="1", context="", question=question, choices=choices or ("a", "b"), gold=0)


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        f"Chapter 3.\n\n(12) {QUESTION.upper()}\n a) volume",
        QUESTION.replace(" ", "\n"),
        QUESTION.replace("water freezes", "water -- freezes,"),
        "Which of these changes when water freezes slowly in a tall glass on",  # 13 words
    ],
)
def test_an_item_is_found(text: str) -> None:
    """Fault: punctuation, case, line breaks or a cut-off end hide a question that leaked."""
    other = item("A question of nine words that nobody has leaked.")
    assert BenchmarkText([other, item(QUESTION)]).find(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Which of these changes when water freezes slowly in a tall glass",  # 12 words
        "Which of those changes when water freezes slowly in a short glass on a cold window sill?",
        "",
        "water",
        "on the cold window sill? volume mass weight colour taste smell sound light heat",  # across question and choice
    ],
)
def test_less_than_an_ngram_is_not(text: str) -> None:
    """Fault: ordinary language is taken for benchmark text, and useful documents leave the proxy."""
    assert BenchmarkText([item(QUESTION, "volume mass weight colour taste smell sound light heat")]).find(text) is None


def test_short_questions() -> None:
    """Fault: a question shorter than 13 words is never found, or four words of it are enough."""
    short = BenchmarkText([item("What is the capital of France?"), item("What gas do all green plants take in?")])
    assert short.too_short == 1
    assert short.find("What is the capital of France? Paris.") is None
    assert short.find("Quiz. What gas do all green plants take in? Carbon dioxide.") == 1
    assert short.find("What gas do all green plants give off?") is None


def test_filled_blanks_and_long_choices() -> None:
    """Fault: a sentence with its blank filled in, or a leaked ending, is not recognised as the benchmark's."""
    blank = item(
        "Sarah was a much better surgeon than Maria so _ always got the easier cases.", "Sarah", "Maria",
        name="winogrande",
    )  # fmt: skip
    assert BenchmarkText([blank]).find(blank.question.replace("_", "Maria")) == 0
    ending = "volume " * 6 + "and the other seven words of it"
    assert BenchmarkText([item("What?", ending, "mass")]).find(f"It was {ending}.") == 0
