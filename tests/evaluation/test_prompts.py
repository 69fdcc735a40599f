"""Questions as texts, the choice by each rule, and what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import rows, write

from megatron_opus.data.benchmarks.items import BenchmarkItem, load_benchmark
from megatron_opus.evaluation import harness
from megatron_opus.evaluation.evaluate import Settings, evaluate
from megatron_opus.evaluation.harness import Answered, summarise
from megatron_opus.evaluation.prompts import EvaluationError, questions


def item(benchmark: str, question: str, *choices: str, context: str = "", gold: int | None = 0) -> BenchmarkItem:
    return BenchmarkItem(benchmark=benchmark, id="q7", context=context, question=question, choices=choices, gold=gold)


NLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("asked", "contexts", "choices"),
    [
        (item("mmlu", "2+2?", "3", "4"), ("Question: 2+2?\nAnswer:",), ("3", "4")),
        (item("piqa", "Boil an egg", "fry it ", " heat"), ("Question: Boil an egg\nAnswer:",), ("fry it", "heat")),
        (item("siqa", "Why?", "a", "b", context="Ann left."), ("Q: Ann left. Why?\nA:",), ("a", "b")),
        (item("hellaswag", "[header] A man [title] runs [step]", "a", "b"), ("A man. runs",), ("a", "b")),
        (item("winogrande", "Ann saw _'s cup.", "Bo", "Cy"), ("Ann saw Bo", "Ann saw Cy"), ("'s cup.",)),
        (item("wsc", "It fell: _ was full.", "cup", "jug"), ("It fell: cup", "It fell: jug"), (" was full.",)),
        (item("wsc", "Is it?", "no", "yes", context="A."), ("A.\nQuestion: Is it?\nAnswer:",), ("no", "yes")),
        (
            item("anli", "It is wet.", *NLI, context="It rains."),
            ("It rains.\nQuestion: It is wet. True, False, or Neither?\nAnswer:",),
            ("True", "Neither", "False"),
        ),
        (
            item("ax_b", "It is wet.", "entailment", "not_entailment", context="It rains."),
            ("It rains.\nQuestion: It is wet. True or False?\nAnswer:",),
            ("True", "False"),
        ),
        (
            item("race_h", "It is _ .", "a", "b", context="It rains."),
            ("It rains.\nQuestion: It is _ .\nAnswer:",),
            ("a", "b"),
        ),
        (item("story_cloze", "S1. S2.", "She won.", "She ate."), ("S1. S2.",), ("She won.", "She ate.")),
        (item("copa", "He ran therefore", "he won.", "he ate."), ("He ran therefore",), ("he won.", "he ate.")),
    ],
)
def test_prompts(asked: BenchmarkItem, contexts: tuple[str, ...], choices: tuple[str, ...]) -> None:
    """Fault: a space at the end of a prompt (another token), two before a choice, or none where the text has none."""
    (question,) = questions([asked])
    assert (question.contexts, question.choices) == (contexts, choices)
    assert question.rule == ("partial" if len(contexts) > 1 else "choices")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (item("piqa", "Boil", "fry", "  "), r"piqa, question q7: choice 1 is empty"),
        (item("winogrande", "Ann saw _", "Bo", "Cy"), r"question q7: nothing follows the blank"),
        (item("hellaswag", "A man", "a", "b", gold=None), r"1 of 1 questions have no answer .*validation split"),
    ],
)
def test_items_that_cannot_be_scored_are_named(asked: BenchmarkItem, message: str) -> None:
    """Fault: a division by no characters, a likelihood of nothing, or a hidden answer counted as choice 0."""
    with pytest.raises(EvaluationError, match=message):
        questions([asked])


def test_a_limit_reaches_over_the_whole_file() -> None:
    """Fault: the first questions only, which in MMLU are all abstract algebra."""
    found = questions([item("mmlu", f"{i}?", "a", "b") for i in range(10)], limit=3)
    assert [q.contexts[0][10] for q in found] == ["0", "3", "6"]
    assert len(questions([item("mmlu", "1?", "a", "b")], limit=3)) == 1


def test_the_choice_is_by_perplexity() -> None:
    """Fault: another normalisation. By sum the first is best, by character the second, by token the third."""

    def answered(gold: int) -> Answered:
        return Answered(
            question={"gold": gold, "choices": ["", "", ""], "subject": ""},
            loglikelihoods=(-4.0, -6.0, -9.0),
            tokens=(1, 2, 9),
            cut=0,
            merged=False,
            acc=float(gold == 0),
            acc_norm=float(gold == 1),
        )

    assert answered(0).chosen == 2
    found = summarise([answered(2), answered(0), answered(1), answered(2)])
    assert (found["accuracy"], found["accuracy_sum"], found["accuracy_norm"]) == (0.5, 0.25, 0.25)
    assert found["stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    assert found["random_baseline"] == pytest.approx(1 / 3)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a traceback, or a refusal only after the export."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    good = (("arc_easy", write(tmp_path / "arc.jsonl", rows("arc_easy"))),)

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(EvaluationError, match=match):
            evaluate(Settings(**settings))

    refused(r"expected a run folder or --model DIR, got neither", benchmarks=good)
    refused(r"none: no such run folder", run_dir=tmp_path / "none", benchmarks=good)
    refused(r"expected a complete checkpoint, found none", run_dir=tmp_path, benchmarks=good)
    refused(r"nothing to evaluate", model=model)
    refused(r"found no config\.json", model=tmp_path, benchmarks=good)
    refused(r"expected tokenizer files", model=model, benchmarks=good, output=tmp_path / "o.json")
    refused(r"--limit: expected at least 1, got 0", model=model, benchmarks=good, limit=0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        refused(r"torch sees no GPU", model=model, benchmarks=good, device="cuda")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    refused(r"lm-eval is not installed; .*pip install -e '\.\[eval\]'", model=model, benchmarks=good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arc.jsonl", "model"]


def test_examples_stand_before_the_question(tmp_path: Path) -> None:
    """Fault: an example without its answer, with another space before it, or the question itself as its own example;
    in a sentence with a blank, an example whose choice or whose rest is missing."""
    from lm_eval.tasks import TaskManager

    shown = [item("piqa", f"Goal {i}", "no", f"yes {i}", gold=1) for i in (1, 2)]
    blanks = [item("winogrande", f"Ann {i} and Bo: _ won {i}.", "Ann", "Bo", gold=1) for i in (1, 2)]
    asked = [item("piqa", "Goal 9", "a", "b")], [item("winogrande", "Cy said _ left.", "he", "she")]
    tasks = harness.write_task(tmp_path, "piqa", questions(asked[0]), questions(shown), 2)
    tasks += harness.write_task(tmp_path, "winogrande", questions(asked[1]), questions(blanks), 2)
    loaded = TaskManager(include_defaults=False).load([dict(task) for task in tasks])["tasks"]
    for task in loaded.values():
        task.set_fewshot_seed(1)
    piqa, winogrande = loaded["opus_piqa_choices"], loaded["opus_winogrande_partial"]
    examples = {f"Question: Goal {i}\nAnswer: yes {i}\n\n" for i in (1, 2)}
    context = piqa.fewshot_context(piqa.eval_docs[0], 2)
    assert context.endswith("Question: Goal 9\nAnswer:")
    assert all(context.count(example) == 1 for example in examples)
    first, second = winogrande.fewshot_context(winogrande.eval_docs[0], 2)
    assert first.endswith("\n\nCy said he")
    assert second.endswith("\n\nCy said she")
    assert all(first.count(f"Ann {i} and Bo: Bo won {i}.\n\n") == 1 for i in (1, 2))
    with pytest.raises(EvaluationError, match=r"piqa: 3 examples asked for, 2 in the --fewshot file"):
        harness.write_task(tmp_path, "piqa", questions(asked[0]), questions(shown), 3)


def test_answers_longer_than_the_model_are_named(tmp_path: Path) -> None:
    """Fault: lm-eval's bare AssertionError in the middle of a benchmark."""

    class Model:
        max_length = 3

        def tok_encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

    note = harness._noted
    with pytest.raises(EvaluationError, match=r"' five of them are here' after 'a b': 5 tokens, more than the 3"):
        note(Model(), ("a b", " five of them are here"), [1, 1], [4, 2, 4, 3, 4])
    with pytest.raises(EvaluationError, match=r"no token of it"):
        note(Model(), ("a b", " "), [1, 1], [])
    found = note(Model(), ("a bb ccc", " d"), [1, 2, 3], [1])
    assert (found.cut, found.merged) == (0, False)
    assert note(Model(), ("a bb ccc dddd", " d e"), [1, 2, 3, 4], [1, 1]).cut == 2
    assert note(Model(), ("a b", "b c"), [1, 1], [1]).merged
    short, long = questions([item("piqa", "Q", "a b c", "d"), item("piqa", "Q", "a", "b c d e")])
    assert (harness.fits(Model(), short), harness.fits(Model(), long)) == (True, False)


def test_every_local_benchmark_becomes_questions(shared_data: Path) -> None:
    """Fault: a published file with an empty choice or without anything after its blank, found hours into a run."""
    counts = {}
    for name, file in (
        ("mmlu", "mmlu/validation.jsonl"),
        ("winogrande", "benchmarks_olmo/winogrande_val.jsonl"),
        ("piqa", "benchmarks_olmo/piqa_val.jsonl"),
        ("siqa", "benchmarks_olmo/socialiqa_val.jsonl"),
        ("csqa", "benchmarks_olmo/csqa_val.jsonl"),
        ("copa", "benchmarks_olmo/copa_validation.jsonl"),
    ):
        counts[name] = len(questions(load_benchmark(name, shared_data / file)))
    expected = {"mmlu": 1531, "winogrande": 1267, "piqa": 1838, "siqa": 1954, "csqa": 1221, "copa": 100}
    assert counts == expected
