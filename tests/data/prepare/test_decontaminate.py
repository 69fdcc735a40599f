from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_text, run, spec, texts_of, write_jsonl

from megatron_opus.data.prepare.decontaminate import Benchmarks, Decontamination, benchmark_items, build, words_of
from megatron_opus.data.prepare.document import SourceError
from megatron_opus.data.prepare.resolve import PrepareError, expand_files

QUESTION = (
    "Which of these seventeen remarkably purple elephants would most quickly solve the unusual riddle of the Sphinx?"
)
SHORT = "Nine quick herons juggle bright orange anvils daily"  # 8 words


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def loaded(root: Path, *files: Path, **settings: object) -> Benchmarks:
    build(Decontamination(files=tuple(map(str, files)), **settings), root / "b.npz")  # type: ignore[arg-type]
    return Benchmarks.load(root / "b.npz")


def by_hand(text: str, items: list[str], n: int, least: int) -> bool:
    """The rule, word by word."""
    words = words_of(text)
    for item in items:
        wanted = words_of(item)
        size = min(n, len(wanted))
        runs = {tuple(wanted[i : i + size]) for i in range(len(wanted) - size + 1)}
        if size >= least and any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1)):
            return True
    return False


def test_the_rule_word_by_word(tmp_path: Path) -> None:
    """Guards against overlaps that are missed at the edges of a text, or found where a word differs."""
    chance = random.Random(0)
    alphabet = ["w0", "w1"]
    items = [" ".join(chance.choices(alphabet, k=size)) for size in (3, 4, 5, 6, 7, 9, 12)]
    found = loaded(tmp_path, write_records(tmp_path / "b.jsonl", *items), n=6, min_words=4)
    answers = []
    for size in [*range(30), 200]:
        for _ in range(12):
            text = " ".join(chance.choices([*alphabet, *alphabet, "other"], k=size))
            overlap = found.find(text)
            assert (overlap is not None) == by_hand(text, items, 6, 4)
            answers.append(overlap is not None)
            if overlap is not None:
                assert overlap.ngram in text
                assert overlap.ngram in items[overlap.benchmark_line - 1]
    assert 40 < sum(answers) < len(answers) - 40


def test_case_punctuation_and_unicode_do_not_hide_an_overlap(tmp_path: Path) -> None:
    """Guards against copies that differ in what a reader would not call a difference."""
    found = loaded(tmp_path, write_records(tmp_path / "b.jsonl", {"question": QUESTION, "note": SHORT}))
    changed = QUESTION.upper().replace(" ", " -\n")
    overlap = found.find(f"Before. {changed} After.")
    assert overlap is not None
    assert (overlap.field, overlap.benchmark_line, len(overlap.ngram.split())) == ("question", 1, 13)
    assert found.find(QUESTION.replace("elephants", "\uff45lephants"))
    assert found.find(f"x {SHORT} y")
    assert found.find(SHORT.replace("anvils", "bells")) is None
    assert found.find(" ".join(QUESTION.split()[:12])) is None
    assert found.find("") is None


def test_preparation_drops_and_lists(tmp_path: Path) -> None:
    """Guards against benchmark text in candidates or proxy, an unlisted removal, and a wrong line in the list."""
    bench = write_records(
        tmp_path / "mmlu.jsonl", {"question": "short one"}, {"question": QUESTION, "choices": ["a", SHORT]}
    )
    texts = [make_text(i) for i in range(40)]
    bad = [*texts[:25], f"{texts[0]} {QUESTION}", *texts[25:], f"So: {SHORT}."]
    web = write_jsonl(tmp_path / "web.jsonl", bad)
    goal = write_jsonl(tmp_path / "goal.jsonl", [make_text(100 + i) for i in range(9)] + [QUESTION + " Yes."])
    held = write_jsonl(tmp_path / "held.jsonl", [make_text(200), QUESTION])
    datasets = (spec("web", "candidates", web), spec("goal", "proxy", goal), spec("held", "validation", held))
    config = Decontamination(files=(str(bench),))
    out = tmp_path / "out"
    manifest = run(out, *datasets, decontamination=config, shard_bytes=600)
    counts = {e.name: (e.documents, e.contaminated) for e in manifest.datasets}
    assert counts == {"web": (40, 2), "goal": (9, 1), "held": (2, 0)}, "validation may be the benchmark itself"
    assert texts_of(out, "candidates", "web") == texts
    listed = [json.loads(line) for line in (out / "decontamination.jsonl").read_text().splitlines()]
    assert [(r["domain"], r["file"], r["line"], r["benchmark_line"], r["field"]) for r in listed] == [
        ("web", str(web), 26, 2, "question"),
        ("web", str(web), 42, 2, "choices[1]"),
        ("goal", str(goal), 10, 2, "question"),
    ]
    assert listed[1]["ngram"] == SHORT.lower()
    assert all(r["benchmark"] == str(bench) for r in listed)
    (about,) = manifest.decontamination["files"]
    assert (about["items"], about["too_short"]) == (2, 2)
    run(tmp_path / "two", *datasets, decontamination=config, shard_bytes=600, workers=2)
    assert (tmp_path / "two" / "decontamination.jsonl").read_bytes() == (out / "decontamination.jsonl").read_bytes()
    write_records(bench, {"question": QUESTION + " Perhaps."})
    with pytest.raises(PrepareError, match="other settings \\(decontamination"):
        run(out, *datasets, decontamination=config)
    only = run(
        tmp_path / "fields",
        *datasets,
        decontamination=Decontamination(files=(str(bench),), fields=("choices", "question")),
    )
    assert {e.name: e.contaminated for e in only.datasets} == {"web": 1, "goal": 1, "held": 0}


def test_every_format_gives_the_same_items(tmp_path: Path) -> None:
    """Guards against a benchmark that is read as something else, or half."""
    import gzip

    records = [
        {"id": 3, "q": QUESTION, "c": ["x y", "z"], "deep": {"a": {"b": "inner"}}},
        {"q": SHORT, "c": [], "deep": None},
    ]
    write_records(tmp_path / "b.jsonl", *records)
    write_records(tmp_path / "lines.json", *records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": "1.0", "data": records}))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "b.jsonl.zst").write_bytes(pa.compress((tmp_path / "b.jsonl").read_bytes(), codec="zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    expected = [(1, "q", QUESTION), (1, "c[0]", "x y"), (1, "c[1]", "z"), (1, "deep.a.b", "inner"), (2, "q", SHORT)]
    for name in ("b.jsonl", "lines.json", "list.json", "wrapped.json", "b.jsonl.gz", "b.jsonl.zst", "b.parquet"):
        assert list(benchmark_items(str(tmp_path / name), ())) == expected, name
        assert list(benchmark_items(str(tmp_path / name), ("q",))) == [expected[0], expected[4]]
    (tmp_path / "b.txt").write_text(f"{QUESTION}\n\n{SHORT}\n")
    assert [text.strip() for _, _, text in benchmark_items(str(tmp_path / "b.txt"), ())] == [QUESTION, SHORT]


def test_bad_benchmark_files_are_named(tmp_path: Path) -> None:
    """Guards against hours of preparation that end, or go on in silence, because of an unreadable benchmark."""
    web = write_jsonl(tmp_path / "web.jsonl", [make_text(i) for i in range(20)])
    (tmp_path / "broken.jsonl").write_text('{"q": "a"}\n{"q": \n')
    (tmp_path / "data.csv").write_text("q\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.jsonl").write_bytes(b'{"q": "\xff"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    write_records(tmp_path / "numbers.jsonl", {"q": 3})
    write_records(tmp_path / "short.jsonl", {"q": "too short"})
    for name, message in (
        ("broken.jsonl", r"broken\.jsonl:2: the benchmark file has broken JSON"),
        ("data.csv", r"data\.csv: an unknown benchmark format"),
        ("cut.parquet", r"cut\.parquet: the benchmark file"),
        ("latin.jsonl", r"latin\.jsonl: the benchmark file is not UTF-8"),
        ("cut.jsonl.gz", r"cut\.jsonl\.gz: the benchmark file cannot be read"),
        ("numbers.jsonl", r"numbers\.jsonl: a benchmark file with no text in it"),
        ("short.jsonl", r"short\.jsonl: all 1 benchmark items have fewer than 8 words"),
        ("missing.jsonl", r"missing\.jsonl: the benchmark file cannot be read: No such file"),
    ):
        with pytest.raises((SourceError, PrepareError), match=message):
            run(
                tmp_path / f"out-{name}",
                spec("x", "candidates", web),
                decontamination=Decontamination(files=(str(tmp_path / name),)),
            )
        assert not list((tmp_path / f"out-{name}").glob(".work/tokens")), "before anything is tokenized"
    with pytest.raises(PrepareError, match=r"--decontaminate .*nothing\*: no such file"):
        expand_files("--decontaminate", [str(tmp_path / "nothing*")])


def test_real_benchmarks_in_real_text(shared_data: Path, tmp_path: Path) -> None:
    """Guards against a rule that finds nothing in real text, or everything."""
    questions = [
        json.loads(line)["question"] for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    ]
    found = loaded(tmp_path, shared_data / "gsm8k" / "test.jsonl", shared_data / "mmlu" / "test.jsonl")
    long = [q for q in questions if len(words_of(q)) >= 13][:100]
    assert all(found.find(f"A forum says: {q}") for q in long)
    pile = (shared_data / "pile_domains" / "wikipedia_en.jsonl").read_text().splitlines()[:150]
    assert sum(found.find(json.loads(line)["text"]) is not None for line in pile) <= 2
