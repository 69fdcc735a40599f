"""The laboratory's corpora: deterministic, and held-out text nowhere else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from megatron_opus.data.prepare import stdlib_text
from megatron_opus.studies.lab import corpora
from megatron_opus.studies.lab.corpora import LabCorpusError, changed, cloze, corrupted

SENTENCE = "{}{} word{} and the long sentence number{} with several plain words ends here."
TEXTS = {
    name: [" ".join(SENTENCE.format(name, i, (7 * i + j) % 50, j) for j in range(30)) for i in range(60)]
    for name in ("prose", "docstrings", "source", "tables")
}


@pytest.fixture(params=sorted(corpora.KINDS))
def kind(request, monkeypatch) -> str:
    monkeypatch.setattr(stdlib_text, "documents", lambda: TEXTS)
    return request.param


def test_roles_share_no_document(kind):
    """Fault: a document that is evaluated on and scored toward, or trained on, or of which a copy is trained on."""
    parts = corpora.parts_of(kind)
    by_role = {role: {t for (_, r), texts in parts.items() if r == role for t in texts} for _, role in parts}
    for a, b in itertools.combinations(by_role, 2):
        assert not by_role[a] & by_role[b]
    held_out = [i for i in range(60) if not any(f"prose{i} " in t for t in by_role["candidates"])]
    assert held_out  # by the name that every sentence of a document has
    if kind != "clean":
        for role in ("proxy", "validation"):
            used = {i for i in range(60) for t in by_role[role] if f"prose{i} " in t}
            assert used <= set(held_out)
    proxies = {i for i in range(60) if any(f"prose{i} " in t for t in by_role["proxy"])}
    assert proxies
    assert not proxies & {i for i in range(60) if any(f"prose{i} " in t for t in by_role["validation"])}


def test_the_same_text_gives_the_same_corpus(kind):
    """Fault: corruption from a global generator: every machine trains on other noise."""
    assert corpora.parts_of(kind) == corpora.parts_of(kind)


def test_what_makes_each_kind(kind):
    """Fault: a protocol without the property that it is named for."""
    parts = corpora.parts_of(kind)
    candidates = {name for name, role in parts if role == "candidates"}
    targets = {name for name, role in parts if role == "proxy"}
    assert targets <= {name for name, role in parts if role == "validation"}
    if kind == "noisy":
        assert candidates == {*TEXTS, "noise"}
        whole = {t for texts in TEXTS.values() for t in texts}
        assert not whole & set(parts["noise", "candidates"])
    if kind == "clean":
        assert targets == candidates == {"prose", "docstrings", "source"}
    if kind == "shift":
        assert targets == {"questions"}
        assert "questions" not in candidates
        assert all("Answer: (" in t for t in parts["questions", "proxy"])
    if kind == "hidden":
        assert candidates == {corpora.HIDDEN}
        sources = corpora._hidden_parts(TEXTS)
        assert set().union(*sources.values()) == set(parts[corpora.HIDDEN, "candidates"])
        size = {name: sum(map(len, texts)) for name, texts in sources.items()}
        assert size["prose"] / sum(size.values()) == pytest.approx(0.1, abs=0.03)
        assert size["noise"] / sum(size.values()) == pytest.approx(0.4, abs=0.03)
    if kind == "web":
        assert candidates == {"docstrings"}
        assert targets == {"prose"}
    if kind == "near_duplicate":
        copies = parts["copies", "candidates"]
        assert len(set(copies)) > 0.9 * len(copies)
        originals = [t for t in TEXTS["prose"] if any(t[:6] == c[:6] for c in copies)]
        assert not set(originals) & set(copies)


def test_damage_leaves_little_and_a_copy_leaves_much():
    """Fault: corrupted text that is still useful, or copies that share no more than any two documents."""
    text = TEXTS["prose"][0]
    words = text.split(" ")

    def kept(other: str) -> float:
        pairs = set(itertools.pairwise(words))
        return sum(p in pairs for p in itertools.pairwise(other.split(" "))) / len(words)

    assert all(kept(corrupted(t)) < 0.5 for t in [text])
    assert 0.75 < kept(changed(text, 0)) < 1
    assert changed(text, 0) != changed(text, 1)
    assert cloze(text).count("____") == cloze(text).count("Answer: (") > 5


def test_text_that_is_missing_is_named(tmp_path: Path):
    """Fault: an experiment that quietly trains on less."""
    with pytest.raises(LabCorpusError, match="openstax_science"):
        corpora.parts_of("noisy", tmp_path)
    with pytest.raises(LabCorpusError, match="expected one of"):
        corpora.prepare_lab("nosy", tmp_path, None)  # type: ignore[arg-type]


def test_the_larger_text_has_the_domains_of_the_protocols(shared_data: Path):
    """Fault: a protocol whose weights name domains that the larger text does not give."""
    parts = corpora.parts_of("shift", shared_data)
    assert {name for name, role in parts if role == "candidates"} == set(corpora.SHARED)
    evaluated, scored_toward = (set(parts["questions", role]) for role in ("validation", "proxy"))
    assert evaluated
    assert scored_toward
    assert not evaluated & scored_toward
    first = json.loads((shared_data / "gsm8k/test.jsonl").open().readline())
    assert any(first["question"] in text for text in evaluated)
