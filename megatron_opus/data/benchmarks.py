"""Multiple-choice benchmarks as uniform records, out of JSONL or Parquet files.

The ten benchmarks of the OPUS paper and two close to them are read with the field names of their Hugging Face data
sets, and in the `query` / `choices` / `gold` form in which evaluation suites store them. The benchmark's name says
which forms are possible, the first row which one it is, and every other row must have it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
}
ANLI_CHOICES = ("entailment", "neutral", "contradiction")
YES_NO = ("no", "yes")
_SHOWN_KEYS = 12


class BenchmarkError(ValueError):
    """A benchmark file that cannot be read: names file and line, what was expected and what was found."""


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
        choices = () if self.choices in (ANLI_CHOICES, YES_NO) else self.choices
        return "\n".join(part for part in (self.context, self.question, *choices) if part)

    def passages(self) -> tuple[str, ...]:
        """The pieces of running text that a document with this item in it would contain; the question is in the first.

        A choice is a piece of its own, unless it continues the question (HellaSwag, PIQA) or fills its blank.
        """
        question = " ".join(part for part in (self.context, self.question) if part)
        if self.choices in (ANLI_CHOICES, YES_NO):
            return (question,)
        if self.benchmark in ("winogrande", "wsc") and "_" in question:
            return tuple(question.replace("_", choice) for choice in self.choices)
        if self.benchmark in ("hellaswag", "piqa"):
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

    name: one of PAPER, `openbookqa`, `sciq`, an alias of one; any other name takes rows of query, choices, gold.
    Raises BenchmarkError naming file and line for unreadable, empty or incomplete files and answers out of range.
    """
    benchmark, path = canonical_name(name), Path(path)
    chosen: _Form | None = None
    items = []
    for line, values in _rows(path):
        where = f"{path}:{line}"
        row = _Row(where, values)
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


# --- rows -----------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row from 1, fields)."""
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise BenchmarkError(f"{path}: expected a .jsonl or .parquet file, got suffix {path.suffix!r}")
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
            except (ValueError, RecursionError) as error:
                hint = "; a JSON array is to be written as one object per line" if raw.lstrip()[:1] == b"[" else ""
                raise BenchmarkError(f"{path}:{line}: not one JSON object per line ({error}){hint}") from None
            if not isinstance(row, dict):
                raise BenchmarkError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
            yield line, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise BenchmarkError(f"{path}: not a Parquet file: {error}") from error
    yield from enumerate(rows, 1)


class _Row:
    """The fields of one row, each asked for with the type that it must have."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def require(self, fields: Sequence[str], benchmark: str) -> None:
        missing = [field for field in fields if field not in self.values]
        if missing:
            raise BenchmarkError(
                f"{self.where}: missing {', '.join(missing)} (found {_listed(self.values)}); the rows of this "
                f"{benchmark} file have {', '.join(fields)}"
            )

    def text(self, key: str) -> str:
        return self._text(key, self.values[key])

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.values[key]
        if not isinstance(values, list | tuple):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a list of strings, got {type(values).__name__}")
        return tuple(self._text(key, value) for value in values)

    def labelled(self, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(texts, labels) of `choices: {text: [...], label: [...]}`."""
        value = self.values[key]
        if not isinstance(value, Mapping) or not {"text", "label"} <= value.keys():
            raise BenchmarkError(f"{self.where}: {key!r}: expected an object with the lists text and label")
        inner = _Row(self.where, value)
        texts, labels = inner.texts("text"), inner.texts("label")
        if len(texts) != len(labels):
            raise BenchmarkError(f"{self.where}: {key!r}: {len(texts)} texts and {len(labels)} labels")
        return texts, labels

    def number(self, key: str, count: int, first: int = 0) -> int | None:
        """0-based index out of a number that starts at `first`; None for the -1 or "" of hidden answers."""
        value = self.values[key]
        if value in ("", -1, "-1"):
            return None
        digits = isinstance(value, str) and value.isascii() and value.isdigit()
        if isinstance(value, bool) or not (isinstance(value, int) or digits):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a number, got {value!r}")
        gold = int(value) - first
        if not 0 <= gold < count:
            raise BenchmarkError(f"{self.where}: {key!r}: expected {first}..{count - 1 + first}, got {value!r}")
        return gold

    def label(self, key: str, labels: Sequence[str]) -> int | None:
        """Index of the answer's label; None for the "" of hidden answers."""
        value = self.values[key]
        if value == "":
            return None
        if value not in labels:
            raise BenchmarkError(f"{self.where}: {key!r}: expected one of {', '.join(labels)}, got {value!r}")
        return labels.index(value)

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a string, got {type(value).__name__}")
        return value


def _listed(values: Mapping[str, Any]) -> str:
    keys = list(map(str, values))
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return (", ".join(keys[:_SHOWN_KEYS]) or "no field") + more


# --- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    context: str
    question: str
    choices: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True)
class _Form:
    fields: tuple[str, ...]
    read: Callable[[_Row], _Parts]


def _stored(row: _Row) -> _Parts:
    # "Question: ... Answer:" is the frame of a prompt, not the benchmark's text.
    query = re.sub(r"\s*\bAnswer:\s*$", "", re.sub(r"^\s*Question:\s*", "", row.text("query")))
    choices = row.texts("choices")
    return _Parts("", query, choices, row.number("gold", len(choices)))


def _plain(question: str, choices: str, answer: str, context: str = "") -> _Form:
    def read(row: _Row) -> _Parts:
        found = row.texts(choices)
        before = row.text(context) if context else ""
        return _Parts(before, row.text(question), found, row.number(answer, len(found)))

    return _Form((*([context] if context else []), question, choices, answer), read)


def _lettered(question: str) -> _Form:
    def read(row: _Row) -> _Parts:
        texts, labels = row.labelled("choices")
        return _Parts("", row.text(question), texts, row.label("answerKey", labels))

    return _Form((question, "choices", "answerKey"), read)


def _named(question: str, choices: tuple[str, ...], answer: str, first: int, context: str = "") -> _Form:
    """Every choice in a field of its own; the answer is a number that starts at `first`."""

    def read(row: _Row) -> _Parts:
        before = row.text(context) if context else ""
        found = tuple(row.text(choice) for choice in choices)
        return _Parts(before, row.text(question), found, row.number(answer, len(found), first))

    return _Form((*([context] if context else []), question, *choices, answer), read)


def _anli(row: _Row) -> _Parts:
    return _Parts(row.text("premise"), row.text("hypothesis"), ANLI_CHOICES, row.number("label", 3))


def _winogrande(row: _Row) -> _Parts:
    sentence = row.text("sentence")
    if sentence.count("_") != 1:
        raise BenchmarkError(f"{row.where}: 'sentence': expected one _ for the choice, found {sentence.count('_')}")
    return _Parts("", sentence, (row.text("option1"), row.text("option2")), row.number("answer", 2, 1))


def _winograd(row: _Row) -> _Parts:
    text, pronoun, place = row.text("text"), row.text("pronoun"), row.values["pronoun_loc"]
    if not isinstance(place, int) or text[place : place + len(pronoun)] != pronoun:
        raise BenchmarkError(
            f"{row.where}: 'pronoun_loc': expected where {pronoun!r} stands in the text, got {place!r}"
        )
    options = row.texts("options")
    sentence = f"{text[:place]}_{text[place + len(pronoun) :]}"
    return _Parts("", sentence, options, row.number("label", len(options)))


def _coreference(row: _Row) -> _Parts:
    question = f"Does {row.text('span2_text')} refer to {row.text('span1_text')}?"
    return _Parts(row.text("text"), question, YES_NO, row.number("label", 2))


def _schema(row: _Row) -> _Parts:
    """Contexts that differ in the filled-in choice, and one continuation."""
    contexts = row.texts("context_options")
    if len(contexts) < 2:
        raise BenchmarkError(f"{row.where}: 'context_options': expected at least two, found {len(contexts)}")
    words = [context.split(" ") for context in contexts]
    shortest = min(map(len, words))
    same = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest - 1)
    tails = [" ".join(w[same:]) for w in words]
    sentence = f"{' '.join([*words[0][:same], '_'])}{row.text('continuation')}"
    return _Parts("", sentence, tuple(tails), row.number("gold", len(contexts)))


def _sciq(row: _Row) -> _Parts:
    choices = tuple(row.text(key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return _Parts("", row.text("question"), choices, 3)


_STORED = _Form(("query", "choices", "gold"), _stored)
_SCIQ_FIELDS = ("question", "distractor1", "distractor2", "distractor3", "correct_answer")
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
}


def _form(benchmark: str, row: _Row) -> _Form:
    forms = (_STORED, *_FORMS.get(benchmark, ()))
    for form in forms:
        if all(field in row.values for field in form.fields):
            return form
    expected = " or ".join(", ".join(form.fields) for form in forms)
    known = "" if benchmark in _FORMS else f"; {benchmark!r} is none of {', '.join(_FORMS)}, of which more is known"
    raise BenchmarkError(f"{row.where}: expected the fields {expected}; found {_listed(row.values)}{known}")
