"""What the report reads: the ledger in one pass against the whole of it at once, metrics against their rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from report_runs import DOMAINS, STEPS, K, N, make_corpus, write_run

from megatron_opus.data.corpus import Corpus
from megatron_opus.report import decisions
from megatron_opus.report.decisions import QUANTILES, Tally, scan, standardise
from megatron_opus.report.documents import choices, ends, find, rank
from megatron_opus.report.record import read_records
from megatron_opus.runs.ledger import read_ledger


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    root = tmp_path_factory.mktemp("report_data")
    return root / "run", write_run(root / "run", make_corpus(root))


@pytest.mark.parametrize("batch_rows", [3, 8, 11, 1 << 16])
def test_one_pass_agrees_with_the_whole_ledger(
    run: tuple[Path, Corpus], monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    """Guards against rows lost, or counted twice, where a batch cuts a step, a bin or a part."""
    monkeypatch.setattr(decisions, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(decisions, "MERGE_ROWS", 20)
    found = scan(run[0] / "ledger", bins=5)
    table = read_ledger(run[0] / "ledger").to_pydict()
    step, utility, chosen = (np.array(table[name]) for name in ("step", "utility", "selected"))
    domain = np.array([DOMAINS.index(name) for name in table["domain"]])
    standard = np.concatenate([(u := utility[step == s]) * 0 + (u - u.mean()) / u.std() for s in range(STEPS)])
    assert found is not None
    assert (found.rows, found.first, found.last, found.notes) == (STEPS * N, 0, STEPS - 1, [])
    assert found.domains == list(DOMAINS)
    bin_ = step * 5 // STEPS
    for b in range(5):
        for fate in (0, 1):
            mine = (bin_ == b) & (chosen == bool(fate))
            # two ways of the same sum: a few units in the last place
            np.testing.assert_allclose(found.standardised[b, fate], np.quantile(standard[mine], QUANTILES), atol=1e-12)
        for d in range(2):
            assert found.offered[b, d] == ((bin_ == b) & (domain == d)).sum()
            assert found.chosen[b, d] == ((bin_ == b) & (domain == d) & chosen).sum()
    np.testing.assert_allclose(found.domain_utility, [standard[domain == d].mean() for d in range(2)])
    assert found.excluded["non-finite factors"] == STEPS
    offered = Counter(table["sample_id"])
    used = Counter(i for i, c in zip(table["sample_id"], chosen, strict=True) if c)
    assert found.tally.ids.tolist() == sorted(offered)
    assert found.tally.offered.tolist() == [offered[i] for i in sorted(offered)]
    assert found.tally.chosen.tolist() == [used[i] for i in sorted(offered)]


def test_standardised_utilities() -> None:
    """Guards against a step without spread, or with a NaN, that spoils its own or other steps."""
    step = np.array([0, 0, 0, 3, 3, 4, 4, 5])
    utility = np.array([1.0, 3.0, np.nan, 2.0, 2.0, -1.0, 1.0, np.nan])
    expected = [-1.0, 1.0, np.nan, np.nan, np.nan, -1.0, 1.0, np.nan]
    np.testing.assert_allclose(standardise(step, utility), expected)


def test_many_utilities_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against memory that grows with the ledger, and against a thinning that keeps the beginning only."""
    monkeypatch.setattr(decisions, "MAX_VALUES", 1000)
    values = decisions._Values()
    for start in range(0, 50_000, 700):
        values.add(np.arange(start, start + 700, dtype=np.float64))
    assert values.thinned
    assert values._size <= 1000
    # 50,400 evenly spaced numbers of which at least 500 are kept: quantiles to 1 in 250
    np.testing.assert_allclose(values.quantiles() / 50_400, QUANTILES, atol=0.004)


def test_many_sequences_are_counted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against memory that grows with the ids, and against counts of a kept id that miss some of its rows."""
    monkeypatch.setattr(decisions, "MERGE_ROWS", 500)
    tally, whole = Tally(300), Tally()
    generator = np.random.default_rng(0)
    for _ in range(20):
        ids = generator.integers(0, 2000, 400)
        rows = (ids, (ids % 2).astype(np.int32), ids % 3 == 0, generator.normal(size=400))
        tally.add(*rows)
        whole.add(*rows)
    tally.merge()
    whole.merge()
    assert 0 < len(tally.ids) <= 300
    assert tally.halvings
    # a hash keeps about 1 in 2^halvings: 5 standard deviations of that count
    expected = len(whole.ids) / 2**tally.halvings
    assert abs(len(tally.ids) - expected) < 5 * expected**0.5
    place = np.searchsorted(whole.ids, tally.ids)
    for name in ("ids", "domain", "offered", "chosen", "scored"):
        assert (getattr(tally, name) == getattr(whole, name)[place]).all(), name
    np.testing.assert_allclose(tally.utility, whole.utility[place], atol=1e-12)


def test_documents_are_ranked_by_their_sequences(run: tuple[Path, Corpus]) -> None:
    """Guards against texts of other documents than those that were counted: all worked out from `describe`."""
    directory, corpus = run
    found = scan(directory / "ledger")
    assert found is not None
    table = read_ledger(directory / "ledger").to_pydict()
    offered: Counter[tuple[str, int]] = Counter()
    chosen: Counter[tuple[str, int]] = Counter()
    for sample, was_chosen in zip(table["sample_id"], table["selected"], strict=True):
        info = corpus.describe(sample)
        for document in range(info.first_document, info.last_document + 1):
            offered[info.domain, document] += 1
            chosen[info.domain, document] += was_chosen
    ranking = rank(found.tally, found.domains, K / N, corpus)
    keys = list(zip(ranking.domain.tolist(), ranking.key.tolist(), strict=True))
    assert dict(zip(keys, ranking.offered.tolist(), strict=True)) == offered
    assert dict(zip(keys, ranking.chosen.tolist(), strict=True)) == {key: chosen[key] for key in offered}
    surplus = [chosen[key] - offered[key] * K / N for key in keys]
    assert surplus == sorted(surplus, reverse=True)
    most, least = ends(ranking, 3)
    assert most == [0, 1, 2]
    assert least == [len(keys) - 1, len(keys) - 2, len(keys) - 3]
    within, _ = ends(ranking, 3, "code")
    assert {ranking.domain[i] for i in within} == {"code"}
    for choice in choices(ranking, [keys.index(("code", d)) for d in (0, 3, 39) if ("code", d) in keys], corpus):
        number = int(choice.name.removeprefix("document "))
        assert choice.text.startswith(f"def function_{number}(x): return x + {number} ")
    (choice,) = choices(ranking, [keys.index(("web", min(d for n, d in keys if n == "web")))], corpus)
    assert "<script>" in choice.text


def test_without_a_corpus_sequences_are_ranked(run: tuple[Path, Corpus]) -> None:
    """Guards against an error, or numbers of documents, where nothing says which sequence holds which."""
    found = scan(run[0] / "ledger")
    assert found is not None
    ranking = rank(found.tally, found.domains, K / N, None)
    assert sorted(ranking.key.tolist()) == found.tally.ids.tolist()
    assert ranking.offered.sum() == STEPS * N
    (first,) = choices(ranking, [0], None)
    assert first.name == f"sequence {int(ranking.key[0]):,}"
    assert first.text == ""


def test_columns_are_the_rows(tmp_path: Path) -> None:
    """Guards against a column that slips by a row where a name comes late, is null, or a step is taken again."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 3.0, "step_seconds": 1.0}\n'
        '{"step": 1, "loss": null, "late": 7, "step_seconds": 1.0, "validation_loss": {"a": 1.0}}\n'
        '{"step": 2, "loss": 2.0, "geometry": "sgd", "step_seconds": 1.0}\n'
        '{"step": 1, "loss": 2.5, "validation_loss": {"a": null, "b": 4.0}, "step_seconds": 2.0}\n'
        '{"step": 3, "loss": 1.0, "flag": true, "step_seconds": 1.0}\n'
    )
    (record,) = read_records([tmp_path])
    assert record.step.tolist() == [0, 1, 3]
    assert record.superseded == 2
    assert record.evaluated.tolist() == [1]
    assert record.geometries["sgd"] == 0
    np.testing.assert_array_equal(record.columns["loss"], [3.0, 2.5, 1.0])
    np.testing.assert_array_equal(record.columns["flag"], [np.nan, np.nan, 1.0])
    assert record.column("late") is None
    np.testing.assert_array_equal(record.seconds, [1.0, 3.0, 4.0])
    np.testing.assert_array_equal(record.curve("a", record.seconds), [(3.0, np.nan)])
    assert any("1 steps between" in note for note in record.notes)


def test_what_chooses_beside_the_strategy_is_named(tmp_path: Path) -> None:
    """Guards against a page that calls a run random whose sequences a prefilter has picked."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n')
    for prefilter, said in (("{pool_ratio: 8}", "random, domain bandit, prefilter"), ("{}", "random, domain bandit")):
        selection = f"{{strategy: random, domain_bandit: {{enabled: true}}, prefilter: {prefilter}}}"
        (tmp_path / "config.yaml").write_text(f"selection: {selection}\n")
        assert read_records([tmp_path])[0].strategy == said


def test_documents_of_many_sequences(run: tuple[Path, Corpus]) -> None:
    """Guards against a fast way to a sequence's documents that disagrees with `describe`."""
    _, corpus = run
    ids = np.arange(corpus.num_sequences)
    _, first, last = corpus.documents_of(ids)
    infos = [corpus.describe(i) for i in ids.tolist()]
    assert first.tolist() == [i.first_document for i in infos]
    assert last.tolist() == [i.last_document for i in infos]
    assert (last >= first).all()


def test_the_corpus_is_found_from_another_folder(
    run: tuple[Path, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against texts that are there only where the report is made in the folder of the run's start."""
    root = tmp_path / "there"
    (root / "runs").mkdir(parents=True)
    (root / "corpus").symlink_to(run[0].parent / "corpus")
    monkeypatch.chdir(root)
    write_run(Path("runs/run"), Path("corpus"))
    monkeypatch.chdir(tmp_path)
    (record,) = read_records([root / "runs/run"])
    source = find(record, None)
    assert source.corpus is not None
    assert source.targets == ("goal",)
    assert source.notes == ()
