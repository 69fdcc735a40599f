"""The proxy's mixture: what each domain gives to the steps, by its number of sequences or by `data.proxy_weights`."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from data_helpers import StreamOfNumbers

from megatron_opus.config import ConfigError, DataConfig
from megatron_opus.data.corpus import Corpus, CorpusError
from megatron_opus.data.manifest import DatasetEntry, Manifest
from megatron_opus.data.permutation import key, permute
from megatron_opus.data.proxy_weights import BLOCK, WeightedProxy

SIZES = {"source": 390, "docstrings": 90, "prose": 20}  # sequences: 78%, 18%, 4%
GOLDEN = [435, 358, 139, 44, 31, 451, 425, 149]  # step 7, 8 sequences, seed 3


def corpus(sizes: dict[str, int] = SIZES, **settings: Any) -> Corpus:
    """Proxy domains of so many sequences of 4 tokens, behind 10 sequences of candidates."""
    roles: dict[tuple[Any, str], int] = {("candidates", "web"): 10, **{("proxy", name): n for name, n in sizes.items()}}
    entries = [
        DatasetEntry(
            name=name,
            role=role,
            prefix=name,
            dtype="int32",
            documents=1,
            tokens=4 * n + 1,
            bin_bytes=16 * n + 4,
            bin_sha256=name,
            idx_sha256=name,
            sources=[],
        )
        for (role, name), n in roles.items()
    ]
    streams = {place: StreamOfNumbers(place[1], 4 * n + 1) for place, n in roles.items()}
    manifest = Manifest(tokenizer={"fingerprint": "t"}, datasets=entries, settings={})
    return Corpus(manifest, streams, None, DataConfig(seq_length=4, **settings))  # type: ignore[arg-type]


def drawn(made: Corpus, steps: Any, count: int = 8, seed: int = 3) -> Counter[str]:
    return Counter(made.describe(int(i)).domain for step in steps for i in made.proxy_ids(step, count, seed))


def test_without_weights_the_ids_are_what_they_were() -> None:
    """Guards against a release after which a run goes on with other proxies than the ones that it began with."""
    made = corpus()
    for step in (0, 1, 61, 62, 200):
        epoch, turn = divmod(step, 500 // 8)
        expected = 10 + permute(np.arange(turn * 8, turn * 8 + 8), 500, key("proxy", 3, epoch))
        assert np.array_equal(made.proxy_ids(step, 8, 3), expected)
    assert made.proxy_ids(7, 8, 3).tolist() == GOLDEN
    assert made.fingerprint == corpus(proxy_weights={"prose": 1}).fingerprint


@pytest.mark.parametrize(
    "weights",
    [
        {"source": 1, "docstrings": 1, "prose": 1},
        {"prose": 0.5, "source": 0.3, "docstrings": 0.2},
        {"docstrings": 1e-3, "source": 1e3, "prose": 77.7},
        {"source": 1, "prose": 3},
        {"prose": 2},
    ],
)
def test_every_domain_follows_its_weight(weights: dict[str, float]) -> None:
    """Guards against a long domain that sets the direction although the user gave it the weight of the others.

    The bounds are exact: one sequence after every block of 16 steps. Within a block the order is shuffled; a step is
    wrong by less than two, so 50 steps, which end in the second step of a block, by less than five.
    """
    made, seen, total = corpus(proxy_weights=weights), Counter[str](), sum(weights.values())
    for step in range(50):
        ids = made.proxy_ids(step, 8, 3)
        assert len(ids) == len(set(ids.tolist())) == 8
        seen.update(made.describe(int(i)).domain for i in ids)
        bound = 1 if (step + 1) % BLOCK == 0 else 1 + 2 * min((step + 1) % BLOCK, BLOCK - (step + 1) % BLOCK)
        for name in SIZES:
            assert abs(seen[name] - 8 * (step + 1) * weights.get(name, 0.0) / total) <= bound
    assert made.proxy_shares() == pytest.approx({name: weights.get(name, 0.0) / total for name in SIZES})


def test_totals_of_any_mixture() -> None:
    """Guards against counts that do not sum to the batch, or that fall, and against a wrong bound on the error."""
    chosen = random.Random(0)
    for domains in [*range(1, 12)] * 6:
        weights = {f"{d}": chosen.choice([1.0, chosen.random() ** 3 + 1e-3, 1e-9, 1e15]) for d in range(domains)}
        made = WeightedProxy(dict.fromkeys(weights, (0, 10**9)), weights)
        total, before = sum(weights.values()), dict.fromkeys(weights, 0)
        for n in range(1, 120):
            found = made.totals(n)
            assert sum(found.values()) == n
            for name, count in found.items():
                assert count >= before[name]
                assert abs(count - n * weights[name] / total) < (1 if domains <= 3 else 2)
            before = found


@pytest.mark.parametrize("every", [2, 4, 8])
def test_steps_that_are_left_out_do_not_shift_the_mixture(every: int) -> None:
    """Guards against a domain that is never drawn, whose turn comes at every fourth step, where every fourth is scored.

    2 sequences a step at a share of 1/8 are one in 4 steps. In 1,000 scored steps 250 are expected, with a standard
    deviation of at most 14, that of independent steps.
    """
    made = corpus(proxy_weights={"source": 7, "prose": 1})
    assert abs(drawn(made, range(0, 1000 * every, every), count=2)["prose"] - 250) < 4 * 14


def test_each_domain_is_walked_to_its_end() -> None:
    """Guards against sequences of a short domain that come twice between two shuffles, or never.

    20 sequences at 4 a step are 5 places between two shuffles. After 80 steps each has been drawn 16 times.
    """
    made = corpus(proxy_weights={"source": 1, "prose": 1})
    times = Counter(int(i) for step in range(80) for i in made.proxy_ids(step, 8, 3))
    first = int(made.first_ids("proxy")[2])
    assert {times[first + i] for i in range(20)} == {16}
    counts = [times[10 + i] for i in range(390)]
    assert sum(counts) == 320
    assert max(counts) == 1


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    """Guards against a resumed run, or another rank, that scores toward other sequences."""
    weights = {"source": 1, "docstrings": 2, "prose": 1}
    one, other = corpus(proxy_weights=weights), corpus(proxy_weights=dict(reversed(weights.items())))
    ids = [one.proxy_ids(step, 8, 3) for step in range(40)]
    for step in (39, 17, 0):
        assert np.array_equal(other.proxy_ids(step, 8, 3), ids[step])
    assert not np.array_equal(one.proxy_ids(0, 8, 4), ids[0])


def test_each_half_of_a_step_is_of_all_domains() -> None:
    """Guards against halves that are different targets: the controller takes their difference for noise."""
    made = corpus(proxy_weights={"source": 2, "docstrings": 1, "prose": 1})
    halves = [made.proxy_ids(step, 8, 3)[:4] for step in range(200)]
    seen = Counter(made.describe(int(i)).domain for half in halves for i in half)
    assert abs(seen["source"] - 400) < 50  # of 800; the standard deviation is 11
    assert abs(seen["prose"] - 200) < 40


def test_a_domain_that_is_too_small_is_refused_at_any_step() -> None:
    """Guards against a run that ends after hours, at the first step that asks more of a domain than it has."""
    sizes = {"source": 390, "prose": 4}
    made = corpus(sizes, proxy_weights={"source": 1, "prose": 1})
    assert drawn(made, range(30)) == {"source": 120, "prose": 120}
    for step in (0, 1, 30):
        with pytest.raises(ConfigError, match=r"at least 5 sequences in proxy domain prose.*=9\), got 4; lower"):
            made.proxy_ids(step, 9, 3)
    three = corpus({**SIZES, "prose": 3}, proxy_weights={"source": 5, "docstrings": 4, "prose": 1})
    assert drawn(three, range(1600))["prose"] == 1280
    assert drawn(corpus({"prose": 8}, proxy_weights={"prose": 1}), range(3)) == {"prose": 24}
    with pytest.raises(ConfigError, match="at least 9 sequences"):
        corpus({"prose": 8}, proxy_weights={"prose": 1}).proxy_ids(0, 9, 3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"sources": 1.0}, "data.proxy_weights: no proxy domain 'sources'; did you mean source?"),
        ({"web": 1.0}, "data.proxy_weights: no proxy domain 'web'; there are source, docstrings, prose"),
        ({"source": 0.0}, "data.proxy_weights.source: expected > 0, got 0.0"),
        ({"source": -1.0}, "data.proxy_weights.source: expected > 0, got -1.0"),
        ({"source": float("nan")}, "data.proxy_weights.source: expected > 0, got nan"),
        ({"source": float("inf")}, "data.proxy_weights.source: expected at most"),
        ({"source": "all"}, "data.proxy_weights.source: expected float, got 'all'"),
        (3, "data.proxy_weights: expected a mapping, got 3"),
    ],
)
def test_weights_that_mean_nothing(weights: Any, expected: str) -> None:
    """Guards against a misspelt domain that is left out of the proxy without a word, and a weight that is no number."""
    with pytest.raises((ConfigError, CorpusError)) as caught:
        corpus(proxy_weights=weights)
    assert expected in str(caught.value)
