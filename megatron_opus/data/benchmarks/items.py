"""Multiple-choice benchmarks as uniform records, out of JSONL or Parquet files.

The ten benchmarks of the OPUS paper, five of its six out-of-domain ones (BBH is generated) and two close to them are
read with the field names of their Hugging Face data sets, and in the `query` / `choices` / `gold` form in which
evaluation suites store them. The benchmark's name says which forms are possible, the first row which one it is, and
every other row must have it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opus.data.benchmarks.rows import BenchmarkError, Row, listed, rows

PAPER = (
    "mmlu", "anli", "hellaswag", "piqa", "siqa", "winogrande", "arc_easy", "arc_challenge", "commonsense_qa", "wsc",
)  # fmt: skip
ALIASES = {
    "social_i_qa": "siqa",
    "socialiqa": "siqa",
    "social_iqa": "siqa",
    "csqa": "commonsense_qa",
    "commonsenseqa": "commonsense_qa",
    "arc-e": "arc_easy",
    "arc-c": "arc_challenge",
    "winograd_wsc": "wsc",
    "wsc273": "wsc",
    "race_middle": "race_m",
    "race_high": "race_h",
    "axb": "ax_b",
    "axg": "ax_g",
    "storycloze": "story_cloze",
}
ANLI_CHOICES = ("entailment", "neutral", "contradiction")
AX_CHOICES = ("entailment", "not_entailment")
YES_NO = ("no", "yes")
_LABELS = (ANLI_CHOICES, AX_CHOICES, YES_NO)  # choices that are no text of the benchmark


@dataclass(frozen=True, kw_only=True)
class BenchmarkItem:
    """One question. gold: index into `choices`; None where the file hides the answer (a test split).

    context: what is read before the question; empty where the benchmark has none. In WinoGrande and WSC the question is
    a sentence in which `_` stands for the choice.
    """

    benchmark: str
    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    subject: str = ""

    def text(self) -> str:
        """Context, question and choices, a line each, without the answer; choices that are mere labels are left out."""
        choices = () if self.choices in _LABELS else self.choices
        return "\n".join(part for part in (self.context, self.question, *choices) if part)

    def passages(self) -> tuple[str, ...]:
        """The pieces of running text that a document with this item in it would contain; the question is in the first.

        A choice is a piece of its own, unless it continues the question, as in HellaSwag, or fills its blank.
        """
        question = " ".join(part for part in (self.context, self.question) if part)
        if self.choices in _LABELS:
            return (question,)
        if self.benchmark in ("winogrande", "wsc") and "_" in question:
            return tuple(question.replace("_", choice) for choice in self.choices)
        if self.benchmark in ("hellaswag", "piqa", "story_cloze"):
            return tuple(f"{question} {choice}" for choice in self.choices)
        return (question, *self.choices)


def canonical_name(name: str) -> str:
    """`arc_easy` for `ARC-E`, `siqa` for `social_i_qa`, and so on; other names in lower case."""
    lower = name.lower()
    return ALIASES.get(lower, lower.replace("-", "_"))


def load_benchmarks(files: Iterable[tuple[str, str | Path]]) -> list[BenchmarkItem]:
    """All items of (name, file) pairs, in their order; several files of one benchmark are put together.

    Raises BenchmarkError for no file at all, a file given twice, and what `load_benchmark` raises.
    """
    pairs = [(canonical_name(name), Path(path)) for name, path in files]
    if not pairs:
        raise BenchmarkError("no benchmark given: expected NAME=FILE, for example arc_easy=arc_easy_test.jsonl")
    twice = sorted({str(path) for _, path in pairs if [p.resolve() for _, p in pairs].count(path.resolve()) > 1})
    if twice:
        raise BenchmarkError(f"benchmarks: {', '.join(twice)} is given twice")
    return [item for name, path in pairs for item in load_benchmark(name, path)]


def load_benchmark(name: str, path: str | Path) -> list[BenchmarkItem]:
    """The items of one JSONL or Parquet file, in its order.

    name: a key of _FORMS or an alias of one; any other name takes rows of query, choices, gold.
    Raises BenchmarkError naming file and line for unreadable, empty or incomplete files and answers out of range.
    """
    benchmark, path = canonical_name(name), Path(path)
    chosen: _Form | None = None
    items = []
    for line, values in rows(path):
        where = f"{path}:{line}"
        row = Row(where, values)
        if chosen is None:
            chosen = _form(benchmark, row)
        row.require(chosen.fields, benchmark)
        parts = chosen.read(row)
        if len(parts.choices) < 2:
            raise BenchmarkError(f"{where}: expected at least two choices, found {len(parts.choices)}")
        if not parts.question.strip():
            raise BenchmarkError(f"{where}: the question is empty")
        identity = next((str(values[key]) for key in ("id", "uid", "idx", "ind") if values.get(key) is not None), "")
        items.append(
            BenchmarkItem(
                benchmark=benchmark,
                id=identity or f"{path.stem}:{line}",
                context=parts.context,
                question=parts.question,
                choices=parts.choices,
                gold=parts.gold,
                subject=str(values.get("subject") or ""),
            )
        )
    if not items:
        raise BenchmarkError(f"{path}: no question in this file")
    return items


def digest(items: Sequence[BenchmarkItem]) -> str:
    """sha256 of the items, whatever file or form they came from."""
    found = hashlib.sha256()
    for item in items:
        found.update((json.dumps(asdict(item), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    return found.hexdigest()


# --- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _QuestionParts:
    context: str
    question: str
    choices: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True)
class _Form:
    fields: tuple[str, ...]
    read: Callable[[Row], _QuestionParts]


def _stored(row: Row) -> _QuestionParts:
    # "Question: ... Answer:" is the frame of a prompt, not the benchmark's text.
    query = re.sub(r"\s*\bAnswer:\s*$", "", re.sub(r"^\s*Question:\s*", "", row.text("query")))
    choices = row.texts("choices")
    return _QuestionParts("", query, choices, row.number("gold", len(choices)))


def _plain(question: str, choices: str, answer: str, context: str = "") -> _Form:
    def read(row: Row) -> _QuestionParts:
        found = row.texts(choices)
        before = row.text(context) if context else ""
        return _QuestionParts(before, row.text(question), found, row.number(answer, len(found)))

    return _Form((*([context] if context else []), question, choices, answer), read)


def _lettered(question: str) -> _Form:
    def read(row: Row) -> _QuestionParts:
        texts, labels = row.labelled("choices")
        return _QuestionParts("", row.text(question), texts, row.label("answerKey", labels))

    return _Form((question, "choices", "answerKey"), read)


def _named(question: str, choices: tuple[str, ...], answer: str, first: int, context: str = "") -> _Form:
    """Every choice in a field of its own; the answer is a number that starts at `first`."""

    def read(row: Row) -> _QuestionParts:
        before = row.text(context) if context else ""
        found = tuple(row.text(choice) for choice in choices)
        return _QuestionParts(before, row.text(question), found, row.number(answer, len(found), first))

    return _Form((*([context] if context else []), question, *choices, answer), read)


def _anli(row: Row) -> _QuestionParts:
    return _QuestionParts(row.text("premise"), row.text("hypothesis"), ANLI_CHOICES, row.number("label", 3))


def _entailed(premise: str, hypothesis: str) -> _Form:
    def read(row: Row) -> _QuestionParts:
        return _QuestionParts(row.text(premise), row.text(hypothesis), AX_CHOICES, row.number("label", 2))

    return _Form((premise, hypothesis, "label"), read)


def _race(row: Row) -> _QuestionParts:
    options = row.texts("options")
    return _QuestionParts(
        row.text("article"), row.text("question"), options, row.label("answer", tuple("ABCD"[: len(options)]))
    )


def _story(row: Row) -> _QuestionParts:
    texts = [row.text(key) for key in _STORY_FIELDS[:-1]]
    return _QuestionParts("", " ".join(texts[:4]), tuple(texts[4:]), row.number(_STORY_FIELDS[-1], 2, 1))


def _winogrande(row: Row) -> _QuestionParts:
    sentence = row.text("sentence")
    if sentence.count("_") != 1:
        raise BenchmarkError(f"{row.where}: 'sentence': expected one _ for the choice, found {sentence.count('_')}")
    return _QuestionParts("", sentence, (row.text("option1"), row.text("option2")), row.number("answer", 2, 1))


def _winograd(row: Row) -> _QuestionParts:
    text, pronoun, place = row.text("text"), row.text("pronoun"), row.values["pronoun_loc"]
    if not isinstance(place, int) or text[place : place + len(pronoun)] != pronoun:
        raise BenchmarkError(
            f"{row.where}: 'pronoun_loc': expected where {pronoun!r} stands in the text, got {place!r}"
        )
    options = row.texts("options")
    sentence = f"{text[:place]}_{text[place + len(pronoun) :]}"
    return _QuestionParts("", sentence, options, row.number("label", len(options)))


def _coreference(row: Row) -> _QuestionParts:
    question = f"Does {row.text('span2_text')} refer to {row.text('span1_text')}?"
    return _QuestionParts(row.text("text"), question, YES_NO, row.number("label", 2))


def _schema(row: Row) -> _QuestionParts:
    """Contexts that differ in the filled-in choice, and one continuation."""
    contexts = row.texts("context_options")
    if len(contexts) < 2:
        raise BenchmarkError(f"{row.where}: 'context_options': expected at least two, found {len(contexts)}")
    words = [context.split(" ") for context in contexts]
    shortest = min(map(len, words))
    same = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest - 1)
    tails = [" ".join(w[same:]) for w in words]
    sentence = f"{' '.join([*words[0][:same], '_'])}{row.text('continuation')}"
    return _QuestionParts("", sentence, tuple(tails), row.number("gold", len(contexts)))


def _sciq(row: Row) -> _QuestionParts:
    choices = tuple(row.text(key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return _QuestionParts("", row.text("question"), choices, 3)


_STORED = _Form(("query", "choices", "gold"), _stored)
_SCIQ_FIELDS = ("question", "distractor1", "distractor2", "distractor3", "correct_answer")
_STORY_FIELDS = (
    *(f"input_sentence_{i}" for i in (1, 2, 3, 4)),
    "sentence_quiz1",
    "sentence_quiz2",
    "answer_right_ending",
)
_RACE = (_Form(("article", "question", "options", "answer"), _race),)
_FORMS: Mapping[str, tuple[_Form, ...]] = {
    "mmlu": (_plain("question", "choices", "answer"),),
    "anli": (_Form(("premise", "hypothesis", "label"), _anli),),
    "hellaswag": (_plain("ctx", "endings", "label"),),
    "piqa": (_named("goal", ("sol1", "sol2"), "label", 0),),
    "siqa": (_named("question", ("answerA", "answerB", "answerC"), "label", 1, context="context"),),
    "winogrande": (_Form(("sentence", "option1", "option2", "answer"), _winogrande),),
    "arc_easy": (_lettered("question"),),
    "arc_challenge": (_lettered("question"),),
    "commonsense_qa": (_lettered("question"),),
    "wsc": (
        _Form(("text", "pronoun", "pronoun_loc", "options", "label"), _winograd),
        _Form(("text", "span1_text", "span2_text", "label"), _coreference),
        _Form(("context_options", "continuation", "gold"), _schema),
    ),
    "openbookqa": (_lettered("question_stem"),),
    "sciq": (_Form(_SCIQ_FIELDS, _sciq),),
    "race_m": _RACE,
    "race_h": _RACE,
    "ax_b": (_entailed("sentence1", "sentence2"),),
    "ax_g": (_entailed("premise", "hypothesis"),),
    "story_cloze": (_Form(_STORY_FIELDS, _story),),
}


def _form(benchmark: str, row: Row) -> _Form:
    forms = (_STORED, *_FORMS.get(benchmark, ()))
    for form in forms:
        if all(field in row.values for field in form.fields):
            return form
    expected = " or ".join(", ".join(form.fields) for form in forms)
    known = "" if benchmark in _FORMS else f"; {benchmark!r} is none of {', '.join(_FORMS)}, of which more is known"
    raise BenchmarkError(f"{row.where}: expected the fields {expected}; found {listed(row.values)}{known}")
