"""Benchmark files as uniform records: every form that they are published in, and clear words for what is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opus.data.benchmarks.items import PAPER, BenchmarkError, digest, load_benchmark, load_benchmarks

LETTERS = {"text": ["iron", "wood", "milk"], "label": ["A", "B", "C"]}
WINOGRAD = {"text": "The cup fell off the table because it was full.", "pronoun": "it", "pronoun_loc": 35}
SCHEMA = {"context_options": ["Ann saw the red cup because the cup", "Ann saw the red cup because the table"]}
# name, row in the published form, context, question, choices, gold
ROWS: tuple[tuple[str, dict[str, Any], str, str, tuple[str, ...], int | None], ...] = (
    ("mmlu", {"question": "2+2?", "choices": ["3", "4"], "answer": 1, "subject": "sums"}, "", "2+2?", ("3", "4"), 1),
    (
        "anli",
        {"uid": "u1", "premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        "It rains.",
        "It is wet.",
        ("entailment", "neutral", "contradiction"),
        0,
    ),
    (
        "hellaswag",
        {"ind": 4, "ctx": "A man", "endings": ["runs", "eats"], "label": "1"},
        "",
        "A man",
        ("runs", "eats"),
        1,
    ),
    ("hellaswag", {"ctx": "A man", "endings": ["runs", "eats"], "label": ""}, "", "A man", ("runs", "eats"), None),
    (
        "piqa",
        {"goal": "Boil an egg", "sol1": "fry", "sol2": "heat water", "label": -1},
        "",
        "Boil an egg",
        ("fry", "heat water"),
        None,
    ),
    (
        "social_i_qa",
        {"context": "Ann left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Ann left.",
        "Why?",
        ("a", "b", "c"),
        2,
    ),
    (
        "winogrande",
        {"sentence": "Al met Bo and _ left.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "",
        "Al met Bo and _ left.",
        ("Al", "Bo"),
        1,
    ),
    (
        "arc_easy",
        {"id": "q7", "question": "A metal?", "choices": LETTERS, "answerKey": "A"},
        "",
        "A metal?",
        ("iron", "wood", "milk"),
        0,
    ),
    ("ARC-C", {"question": "Food?", "choices": LETTERS, "answerKey": "C"}, "", "Food?", ("iron", "wood", "milk"), 2),
    ("csqa", {"question": "Food?", "choices": LETTERS, "answerKey": ""}, "", "Food?", ("iron", "wood", "milk"), None),
    (
        "wsc",
        {**WINOGRAD, "options": ["The cup", "The table"], "label": 0},
        "",
        "The cup fell off the table because _ was full.",
        ("The cup", "The table"),
        0,
    ),
    (
        "wsc",
        {"text": "Al met Bo; he left.", "span1_text": "Bo", "span2_text": "he", "label": 1},
        "Al met Bo; he left.",
        "Does he refer to Bo?",
        ("no", "yes"),
        1,
    ),
    (
        "winograd_wsc",
        {**SCHEMA, "continuation": " was full.", "gold": 1},
        "",
        "Ann saw the red cup because the _ was full.",
        ("cup", "table"),
        1,
    ),
    (
        "arc_challenge",
        {"query": "Question: Why so?\nAnswer:", "choices": ["x", "y"], "gold": 0},
        "",
        "Why so?",
        ("x", "y"),
        0,
    ),
    (
        "RACE-M",
        {
            "example_id": "m1.txt",
            "article": "It rained.",
            "question": "It was _ .",
            "options": ["dry", "wet"],
            "answer": "B",
        },
        "It rained.",
        "It was _ .",
        ("dry", "wet"),
        1,
    ),
    ("axb", {"sentence1": "A", "sentence2": "B", "label": 1}, "A", "B", ("entailment", "not_entailment"), 1),
    ("AX-g", {"premise": "A", "hypothesis": "B", "label": 0}, "A", "B", ("entailment", "not_entailment"), 0),
    (
        "story_cloze",
        {
            **{f"input_sentence_{i}": f"S{i}." for i in (1, 2, 3, 4)},
            **{"sentence_quiz1": "She won.", "sentence_quiz2": "She ate.", "answer_right_ending": 2},
        },
        "",
        "S1. S2. S3. S4.",
        ("She won.", "She ate."),
        1,
    ),
    ("my_own", {"query": "Why so?", "choices": ["x", "y"], "gold": 1}, "", "Why so?", ("x", "y"), 1),
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "row", "context", "question", "choices", "gold"), ROWS)
def test_published_forms(tmp_path: Path, name, row, context, question, choices, gold) -> None:
    """Fault: an answer off by one (SIQA and WinoGrande count from 1), or a form that only one suite writes."""
    (item,) = load_benchmark(name, write(tmp_path / "a.jsonl", row))
    assert (item.context, item.question, item.choices, item.gold) == (context, question, choices, gold)
    assert item.id == str(row.get("id") or row.get("uid") or row.get("ind") or "a:1")
    assert item.subject == row.get("subject", "")


def test_all_ten_of_the_paper_are_there() -> None:
    """Fault: a benchmark of the paper without a loader."""
    assert {"arc_challenge" if n == "ARC-C" else n for n, *_ in ROWS} >= set(PAPER) - {"siqa", "commonsense_qa"}
    assert len(PAPER) == 10


def test_texts_for_similarity_and_for_overlap(tmp_path: Path) -> None:
    """Fault: label words (entailment, yes) pull documents toward themselves; a blank hides a sentence that leaked."""
    items = {i.benchmark: i for n, row, *_ in ROWS for i in load_benchmark(n, write(tmp_path / "x.jsonl", row))}
    assert items["anli"].text() == "It rains.\nIt is wet."
    assert items["ax_g"].passages() == ("A B",)
    assert items["story_cloze"].passages() == ("S1. S2. S3. S4. She won.", "S1. S2. S3. S4. She ate.")
    assert items["piqa"].text() == "Boil an egg\nfry\nheat water"
    assert items["winogrande"].passages() == ("Al met Bo and Al left.", "Al met Bo and Bo left.")
    assert items["hellaswag"].passages() == ("A man runs", "A man eats")
    assert items["siqa"].passages() == ("Ann left. Why?", "a", "b", "c")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "mmlu",
            [ROWS[0][1], {"question": "x", "answer": 0}],
            r"a\.jsonl:2: missing choices \(found question, answer\)",
        ),
        ("mmlu", [{**ROWS[0][1], "answer": 2}], r"a\.jsonl:1: 'answer': expected 0\.\.1, got 2"),
        ("mmlu", [{**ROWS[0][1], "answer": True}], "expected a number, got True"),
        ("mmlu", [{**ROWS[0][1], "answer": "B"}], "expected a number, got 'B'"),
        ("mmlu", [{**ROWS[0][1], "choices": "34"}], "'choices': expected a list of strings, got str"),
        ("mmlu", [{**ROWS[0][1], "choices": ["3", 4]}], "'choices': expected a string, got int"),
        ("mmlu", [{**ROWS[0][1], "choices": ["3"], "answer": 0}], "at least two choices, found 1"),
        ("mmlu", [{**ROWS[0][1], "question": " "}], "the question is empty"),
        ("siqa", [{**ROWS[5][1], "label": "0"}], r"'label': expected 1\.\.3, got '0'"),
        ("arc_easy", [{**ROWS[7][1], "answerKey": "D"}], "expected one of A, B, C, got 'D'"),
        ("arc_easy", [{**ROWS[7][1], "choices": ["a"]}], "an object with the lists text and label"),
        ("arc_easy", [{**ROWS[7][1], "choices": {"text": ["a"], "label": []}}], "1 texts and 0 labels"),
        ("arc_eazy", [ROWS[7][1]], r"expected the fields query, choices, gold; found id, .*'arc_eazy' is none of mmlu"),
        ("piqa", [ROWS[0][1]], "expected the fields query, choices, gold or goal, sol1, sol2, label"),
        ("winogrande", [{**ROWS[6][1], "sentence": "No blank."}], "expected one _ for the choice, found 0"),
        ("wsc", [{**ROWS[10][1], "pronoun_loc": 3}], "'pronoun_loc': expected where 'it' stands"),
        ("mmlu", [["question"]], r"a\.jsonl:1: expected a JSON object, got list"),
        ("mmlu", [], r"a\.jsonl: no question in this file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, rows: list[Any], message: str) -> None:
    """Fault: a row that is skipped in silence, or an error that does not say which of 14,000 rows it means."""
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(name, write(tmp_path / "a.jsonl", *rows))


def test_files_that_are_none(tmp_path: Path) -> None:
    """Fault: a traceback of a library for a broken or missing file."""
    (tmp_path / "torn.jsonl").write_bytes(json.dumps(ROWS[0][1]).encode() + b'\n{"question": "cut')
    (tmp_path / "array.json").write_text(json.dumps([ROWS[0][1]], indent=1))
    (tmp_path / "fake.parquet").write_bytes(b"x" * 50)
    (tmp_path / "table.csv").write_text("a,b")
    for name, message in (
        ("torn.jsonl", r"torn\.jsonl:2: not one JSON object per line"),
        ("array.json", r"array\.json:1: .*one object per line"),
        ("fake.parquet", "not a Parquet file"),
        ("table.csv", r"expected a \.jsonl or \.parquet file"),
        ("none.jsonl", "no such file"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            load_benchmark("mmlu", tmp_path / name)
    with pytest.raises(BenchmarkError, match="no benchmark given"):
        load_benchmarks([])
    one = write(tmp_path / "one.jsonl", ROWS[0][1])
    with pytest.raises(BenchmarkError, match=r"one\.jsonl is given twice"):
        load_benchmarks([("mmlu", one), ("mmlu", tmp_path / "." / "one.jsonl")])


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    """Fault: the form in which the Hub stores its data sets gives other items than the same rows as JSON."""
    rows = [ROWS[7][1], {**ROWS[7][1], "id": "q8", "answerKey": "B"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    mine = load_benchmark("arc_easy", tmp_path / "a.parquet")
    assert mine == load_benchmark("arc_easy", write(tmp_path / "a.jsonl", *rows))
    assert digest(mine) == digest(load_benchmark("arc_easy", tmp_path / "a.jsonl")) != digest(mine[:1])


def test_real_files(shared_data: Path) -> None:
    """Fault: forms that exist only in this test. Counts are those of the files' own notices."""
    folder = shared_data / "benchmarks_olmo"
    for name, file, count, choices in (
        ("arc_easy", folder / "arc_easy_test.jsonl", 2376, {3, 4, 5}),
        ("arc_challenge", folder / "arc_challenge_test.jsonl", 1172, {3, 4, 5}),
        ("csqa", folder / "csqa_val.jsonl", 1221, {5}),
        ("piqa", folder / "piqa_val.jsonl", 1838, {2}),
        ("siqa", folder / "socialiqa_val.jsonl", 1954, {3}),
        ("winogrande", folder / "winogrande_val.jsonl", 1267, {2}),
        ("openbookqa", folder / "openbookqa_test.jsonl", 500, {4}),
        ("sciq", folder / "sciq_validation.jsonl", 1000, {4}),
        ("mmlu", shared_data / "mmlu" / "validation.jsonl", 1531, {4}),
    ):
        items = load_benchmark(name, file)
        assert len(items) == count
        assert {len(i.choices) for i in items} <= choices
        assert all(i.gold is not None for i in items)
        assert not any(i.question.startswith("Question:") or i.question.endswith("Answer:") for i in items)
