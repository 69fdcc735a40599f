from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.data.buffer import CandidateBuffer, DrawError, systematic_counts
from megatron_opus.data.corpus import Corpus, CorpusError
from megatron_opus.types import Candidates


class Domains:
    """The part of a corpus that the buffer reads: names and sequence counts."""

    def __init__(self, sizes: dict[str, int], fingerprint: str = "x") -> None:
        self._sizes = np.array(list(sizes.values()), dtype=np.int64)
        self.domains = {"candidates": tuple(sizes)}
        self.fingerprint = fingerprint

    def sequences(self, role: str) -> np.ndarray:
        return self._sizes

    def first_ids(self, role: str) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    def candidate_weights(self, weights: dict[str, float] | None) -> np.ndarray:
        values = self._sizes if weights is None else np.array([weights.get(n, 0) for n in self.domains["candidates"]])
        return values / values.sum()


SIZES = {"a": 50, "b": 23, "c": 9}


def buffer(sizes: dict[str, int] = SIZES, size: int = 8, seed: int = 1, **settings_: Any) -> CandidateBuffer:
    return CandidateBuffer(Domains(sizes), size, seed, **settings_)  # type: ignore[arg-type]


def use(b: CandidateBuffer, step: int, k: int = 4, weights: Any = None) -> tuple[Candidates, np.ndarray]:
    """Draw and settle one step; the K used positions are a function of the step."""
    drawn = b.draw(step, weights)
    chosen = np.random.RandomState(step).permutation(len(drawn))[:k]
    b.settle(drawn, chosen)
    return drawn, drawn.sample_ids[chosen]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    size=st.integers(1, 12),
    seed=st.integers(0, 1000),
    unselected=st.sampled_from(["discard", "return"]),
    steps=st.integers(1, 40),
)
def test_no_sequence_twice_in_an_epoch(
    sizes: list[int], size: int, seed: int, unselected: Literal["discard", "return"], steps: int
) -> None:
    """Guards against repeats: within one buffer, of a used sequence within an epoch, of any one when discarding."""
    domains = {f"d{i}": n for i, n in enumerate(sizes)}
    try:
        b = buffer(domains, size, seed, unselected=unselected)
    except DrawError:
        return  # a domain that is too small for its share; covered by its own test
    used_in: dict[tuple[int, int], set[int]] = {}
    offered_in: dict[tuple[int, int], set[int]] = {}
    for step in range(steps):
        drawn = b.draw(step)
        assert len(set(drawn.sample_ids.tolist())) == size
        assert b._drawn is not None
        epochs = b._drawn[1]
        chosen = np.random.RandomState(step).permutation(size)[: (size + 1) // 2]
        for i, (sample, domain, epoch) in enumerate(zip(drawn.sample_ids, drawn.domains, epochs, strict=True)):
            where = (int(domain), int(epoch))
            assert sample not in used_in.setdefault(where, set())
            if unselected == "discard":
                assert sample not in offered_in.setdefault(where, set())
                offered_in[where].add(int(sample))
            if i in chosen:
                used_in[where].add(int(sample))
        b.settle(drawn, chosen)


def test_discard_offers_every_sequence_once_per_epoch() -> None:
    """Guards against sequences lost where a buffer ends one epoch and begins the next."""
    b = buffer({"a": 21}, size=8)
    seen = np.concatenate([use(b, step)[0].sample_ids for step in range(21)])
    # 21 draws of 8 are 8 epochs of 21 exactly.
    assert np.array_equal(np.bincount(seen, minlength=21), np.full(21, 8))
    assert b.counters()["a"] == {"offered": 168, "used": 84, "epoch": 7, "sequences": 21}


def test_return_offers_rejected_ones_again_and_used_ones_not() -> None:
    """Guards against `return` behaving like `discard`, and against offering a used sequence again."""
    b = buffer({"a": 40}, size=8, unselected="return")
    offered: list[int] = []
    used: list[int] = []
    for step in range(6):
        drawn, chosen = use(b, step)
        assert not set(drawn.sample_ids.tolist()) & set(used)
        offered += drawn.sample_ids.tolist()
        used += chosen.tolist()
        assert b.counters()["a"]["epoch"] == 0
    rejected = [s for s in offered[:40] if s not in used[:20]]
    assert set(offered[40:]) <= set(rejected), "after one pass only the returned ones are left"
    assert offered[40:48] == [s for s in offered[40:48] if offered.count(s) == 2]


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 14), unselected=st.sampled_from(["discard", "return"]), seed=st.integers(0, 50))
def test_resume_at_any_step(stop: int, unselected: Literal["discard", "return"], seed: int) -> None:
    """Guards against a resumed run that reads other candidates, repeats some or leaves some out."""
    whole = buffer(seed=seed, unselected=unselected)
    first = buffer(seed=seed, unselected=unselected)
    expected = [use(whole, step)[0] for step in range(15)]
    for step in range(stop):
        use(first, step)
    state = first.state_dict()
    for step in range(stop, 15):
        use(first, step)  # a state that shares memory with the buffer would change here
    resumed = buffer(seed=seed, unselected=unselected)
    resumed.load_state_dict(state)
    for step in range(stop, 15):
        drawn, _ = use(resumed, step)
        assert np.array_equal(drawn.sample_ids, expected[step].sample_ids)
        assert np.array_equal(drawn.domains, expected[step].domains)
    assert resumed.counters() == whole.counters()


def test_state_survives_a_safe_torch_load(tmp_path: Any) -> None:
    """Guards against a checkpoint that torch.load refuses with its default weights_only=True."""
    b = buffer(unselected="return")
    use(b, 0)
    torch.save(b.state_dict(), tmp_path / "state.pt")
    resumed = buffer(unselected="return")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert np.array_equal(use(resumed, 1)[0].sample_ids, use(b, 1)[0].sample_ids)


def test_weights_changed_during_the_run() -> None:
    """Guards against repeats (or a restart of the domain) when the mixture changes."""
    b = buffer({"a": 60, "b": 60}, size=8)
    seen: list[int] = []
    for step in range(10):
        drawn, _ = use(b, step, weights=[1.0, 0.0] if step % 2 else [0.25, 0.75])
        seen += drawn.sample_ids.tolist()
        assert np.bincount(drawn.domains, minlength=2).tolist() == ([8, 0] if step % 2 else [2, 6])
    assert len(set(seen)) == len(seen)


def test_counts_follow_the_weights() -> None:
    """Guards against rounding that starves small domains or favours the first ones.

    Mean over 4000 offsets: a count differs from its share by less than 1, so the standard error is below
    0.5 / sqrt(4000) = 0.008; 5 of them.
    """
    weights = np.array([0.013, 0.5, 0.0, 0.237, 0.25])
    offsets = np.random.RandomState(0).rand(4000)
    counts = np.stack([systematic_counts(weights, 10, float(u)) for u in offsets])
    assert (counts.sum(1) == 10).all()
    assert (np.abs(counts - weights * 10) < 1).all()
    assert np.abs(counts.mean(0) - weights * 10).max() < 5 * 0.008
    assert (counts[:, 2] == 0).all()
    assert systematic_counts(np.array([0.1] * 10), 32, 1 - 2**-53).sum() == 32


def test_same_seed_same_draw_other_seed_other_draw() -> None:
    """Guards against unseeded sampling (defect 8 of the reference)."""
    a, b, c = buffer(seed=5), buffer(seed=5), buffer(seed=6)
    first, second, third = use(a, 0)[0], use(b, 0)[0], use(c, 0)[0]
    assert np.array_equal(first.sample_ids, second.sample_ids)
    assert not np.array_equal(first.sample_ids, third.sample_ids)
    assert first.sample_ids.dtype == np.int64
    assert first.domains.dtype == np.int32


def test_domains_are_those_of_the_ids() -> None:
    """Guards against ids and domains shuffled differently."""
    drawn = buffer().draw(0)
    edges = np.cumsum([0, *SIZES.values()])
    assert np.array_equal(np.searchsorted(edges, drawn.sample_ids, side="right") - 1, drawn.domains)


def test_misuse_is_refused() -> None:
    """Guards against a driver that draws twice, settles other candidates or goes back in time."""
    b = buffer()
    drawn = b.draw(3)
    with pytest.raises(DrawError, match="not settled"):
        b.draw(4)
    with pytest.raises(DrawError, match="not settled"):
        b.state_dict()
    with pytest.raises(DrawError, match="twice"):
        b.settle(drawn, [0, 0])
    with pytest.raises(DrawError, match=r"positions 0\.\.7"):
        b.settle(drawn, [8])
    with pytest.raises(DrawError, match="not the candidates"):
        b.settle(Candidates(step=3, sample_ids=drawn.sample_ids[::-1], domains=drawn.domains), [0])
    b.settle(drawn, torch.tensor([0, 1]))
    with pytest.raises(DrawError, match="no open draw"):
        b.settle(drawn, [0])
    with pytest.raises(DrawError, match="must increase"):
        b.draw(3)


@pytest.mark.parametrize("other", [{"seed": 2}, {"size": 4}, {"unselected": "return"}])
def test_state_of_another_buffer_is_refused(other: dict[str, Any]) -> None:
    """Guards against a resume with another seed or size, which would repeat and skip data without a word."""
    state = buffer().state_dict()
    with pytest.raises(DrawError, match=next(iter(other))):
        buffer(**other).load_state_dict(state)


def test_state_of_other_data_is_refused(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against ids of one cut of the data being used with another."""
    state = CandidateBuffer(open_corpus(), 4, 0).state_dict()
    with pytest.raises(DrawError, match="fingerprint"):
        CandidateBuffer(open_corpus(seq_length=17), 4, 0).load_state_dict(state)


def test_more_candidates_than_there_are() -> None:
    """Guards against an endless draw, or duplicates, when N is larger than a domain."""
    with pytest.raises(DrawError, match="domain c"):
        buffer(size=40, domain_weights={"c": 1.0})
    with pytest.raises(DrawError, match="domain c"):
        buffer(size=40).draw(0, [0, 0, 1])


def test_configured_weights(open_corpus: Callable[..., Corpus]) -> None:
    """Guards against a misspelt domain getting weight 0 silently, and against weights that are ignored."""
    corpus = open_corpus()
    with pytest.raises(CorpusError, match="did you mean a"):
        CandidateBuffer(corpus, 4, 0, {"aa": 1.0})
    drawn = CandidateBuffer(corpus, 8, 0, {"b": 3.0, "a": 1.0}).draw(0)
    assert np.bincount(drawn.domains, minlength=3).tolist() == [2, 6, 0]
