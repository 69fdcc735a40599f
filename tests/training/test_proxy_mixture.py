"""Runs with several proxy domains: what they draw, what they say, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_text, run, spec, write_jsonl
from tiny_runs import recipe

from megatron_opus.config import RunConfig

STEPS = 16


@pytest.fixture(scope="module")
def three_proxies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with proxies of 90, 30 and 4 documents."""
    root = tmp_path_factory.mktemp("three")
    documents = {"web": (0, 200), "long": (1000, 90), "middle": (2000, 30), "short": (3000, 4), "check": (4000, 8)}
    files = {
        name: write_jsonl(root / f"{name}.jsonl", (make_text(first + i) for i in range(count)))
        for name, (first, count) in documents.items()
    }
    roles = {"web": "candidates", "check": "validation"}
    run(root / "corpus", *(spec(name, roles.get(name, "proxy"), file) for name, file in files.items()))
    return root / "corpus"


def proxies_of_run(config: RunConfig, resume: bool = False) -> tuple[dict[int, list[str]], list[str]]:
    """Run on this rank: the proxy domains of each step that was scored, and what was said."""
    from megatron_opus.training.session import Session

    said: list[str] = []
    session = Session(config, resume=resume, versions={}, say=said.append)
    corpus, found = session.corpus, {}
    proxy_ids = corpus.proxy_ids

    def watched(step: int, count: int, seed: int) -> Any:
        ids = proxy_ids(step, count, seed)
        found[step] = [corpus.describe(int(i)).domain for i in ids]
        return ids

    corpus.proxy_ids = watched  # type: ignore[method-assign]
    session.train()
    return found, said


def settings(corpus: Path, output: Path, name: str, steps: int = STEPS, length: int = 32, **data: Any) -> RunConfig:
    return recipe(
        corpus,
        output,
        name,
        data={"path": str(corpus), "seq_length": length, **data},
        training={"train_steps": steps, "checkpoint_interval": 0},
        optimizer={"lr_decay_steps": STEPS},
        selection={"score_length": length},
    )


def test_a_run_draws_its_proxy_by_weights(three_proxies, tmp_path, world2):
    """Guards against weights that are written down and never drawn by, on one rank, or after a resume.

    4 sequences a step, two ranks, 16 steps: 64 of them, each total within one of its share.
    """
    weights = {"short": 1, "middle": 1, "long": 2}
    cut, first = world2.run(proxies_of_run, settings(three_proxies, tmp_path, "run", 6, proxy_weights=weights))[0]
    ranks = world2.run(proxies_of_run, settings(three_proxies, tmp_path, "run", proxy_weights=weights), True)
    assert ranks[0][0] == ranks[1][0]
    names = [name for of_step in (cut | ranks[0][0]).values() for name in of_step]
    assert sorted([*cut, *ranks[0][0]]) == list(range(STEPS))
    for name, weight in weights.items():
        assert abs(names.count(name) - 64 * weight / 4) <= 1
    assert "proxy: long 0.5, middle 0.25, short 0.25 of its sequences (data.proxy_weights)" in first


def test_the_mixture_of_the_proxy_is_said(three_proxies, embedded_cache, tmp_path):
    """Guards against a target of which three quarters are one domain, where nobody is told, and an empty line."""
    from megatron_opus.runs.data import open_corpus

    said: list[str] = []
    corpus = open_corpus(settings(three_proxies, tmp_path, "run"), said.append)
    n = dict(zip(corpus.domains["proxy"], corpus.sequences("proxy").tolist(), strict=True))
    total = sum(n.values())
    shares = ", ".join(f"{name} {n[name] / total:.2g}" for name in ("long", "middle", "short"))
    assert said[-1] == f"proxy: {shares} of its sequences (by their number; data.proxy_weights: none)"
    said.clear()
    open_corpus(recipe(embedded_cache, tmp_path, "run"), said.append)
    assert said
    assert not [line for line in said if line.startswith("proxy")]


def refusal(config: RunConfig) -> str:
    from megatron_opus.training.session import Session

    with pytest.raises(ValueError, match=r"data\.proxy_weights") as caught:
        Session(config, resume=False, versions={}, say=lambda text: None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("weights", "length", "expected"),
    [
        ({"shrt": 1}, 32, "data.proxy_weights: no proxy domain 'shrt'; did you mean short?"),
        ({"short": 1}, 200, "data.proxy_weights: expected at least 4 sequences in proxy domain short"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_the_start(three_proxies, tmp_path, world2, weights, length, expected):
    """Guards against a run that ends at the first step that asks more of a proxy than it has, or a misspelt one."""
    config = settings(three_proxies, tmp_path, "run", length=length, proxy_weights=weights)
    assert all(said.startswith(expected) for said in world2.run(refusal, config))
    assert not (tmp_path / "run").exists()
