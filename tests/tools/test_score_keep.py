"""The commands of static selection as a user types them: score, report, keep, and a run on what was kept."""

from __future__ import annotations

import re
from pathlib import Path

import hf_models
import numpy as np
import pytest
import tiny_runs
from distributed import DistributedPool
from proxy_helpers import science_questions
from score_helpers import opened, topic_corpus

from megatron_opus.cli import main
from megatron_opus.corpus_scores.score_files import read_scores


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    science_questions(root / "questions.jsonl")
    made = topic_corpus(root)
    hf_models.save(root / "llama", "llama", vocab_size=opened(made).tokenizer.vocab_size, max_position_embeddings=64)
    return made


def score(corpus: Path, output: Path, scorer: str, *more: str) -> int:
    return main(["score-corpus", "--corpus", str(corpus), "--scorer", scorer, "--output", str(output), *more])


def test_score_report_keep_and_train(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], world2: DistributedPool
) -> None:
    """Guards against an option that does not reach the work, a page that lacks what it promises, and a kept corpus
    that the trainer cannot read."""
    model = ["--model", str(corpus.parent / "llama"), "--window", "48"]
    options = {
        "dsir": ["--target", "proxy", "--per", "ngram"],
        "betr": ["--target", "proxy", "--sample-tokens", "4k"],
        "loss": model,
        "min-k": [*model, "--min-k", "0.5", "--windows", "1"],
        "color": [
            "--prior",
            str(corpus.parent / "llama"),
            "--conditional",
            str(corpus.parent / "llama"),
            "--window",
            "48",
        ],
        "nag": [*model, "--target", "proxy", "--neurons", "7"],
        "opus": [*model, "--geometry", "sgd", "--normalise", "--proxy-windows", "4", "--windows", "1"],
    }
    for name, more in options.items():
        assert score(corpus, tmp_path / name, name, *more) == 0
        said = capsys.readouterr().out
        assert f"choose with `megatron-opus keep --scores {tmp_path / name}`" in said
        assert re.search(rf"{name}: ready after [\d.]+ s, [\d.]+ of the processor", said)  # else similarity looks free
        assert re.search(rf"{name}: [\d,]+ tokens in [\d.]+ s on one process: [\d,]+ tokens/s", said)
    assert score(corpus, tmp_path / "dsir", "dsir", *options["dsir"]) == 0
    assert "already scored" in capsys.readouterr().out
    settings = {name: read_scores(tmp_path / name, opened(corpus)).settings for name in options}
    assert settings["dsir"]["per"] == "ngram"
    assert (settings["min-k"]["share"], settings["min-k"]["windows"], settings["min-k"]["window"]) == (0.5, 1, 48)
    assert (settings["nag"]["neurons"], settings["nag"]["target"]) == (7, [{"source": "proxy"}])
    assert (settings["opus"]["normalise"], settings["opus"]["proxy_windows"]) == (True, 4)
    assert np.ptp(read_scores(tmp_path / "color").of["mixed"]) == 0  # of one model with itself

    named = [f"{name}={tmp_path / name}" for name in ("dsir", "loss")]
    page = tmp_path / "scores.html"
    assert (
        main(["score-report", "--corpus", str(corpus), "--scores", *named, "--share", "0.3", "--output", str(page)])
        == 0
    )
    text = page.read_text(encoding="utf-8")
    for heading in (
        "Histograms by domain",
        "Rank correlation",
        "What a rule would keep",
        "Documents by loss",
        "Lowest",
    ):
        assert heading in text
    assert "gumbel:0.5@dsir" in text
    assert "atom" in text  # of a document
    assert "<script" not in text

    capsys.readouterr()
    kept = ["--rule", "top@dsir and band:0-0.9@loss", "--share", "0.4", "--output", str(tmp_path / "kept")]
    assert main(["keep", "--corpus", str(corpus), "--scores", *named, *kept]) == 0
    assert f"train on it with data={tmp_path / 'kept'}" in capsys.readouterr().out
    assert (tmp_path / "kept/dropped.parquet").is_file()
    config = tiny_runs.recipe(
        tmp_path, tmp_path, "run", data={"path": str(tmp_path / "kept")}, training={"train_steps": 2}
    )
    assert len(world2.run(tiny_runs.run, config)[0]["losses"]) == 2


def test_mistakes_are_said_in_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback, or status 0, for an option that is missing or cannot be."""
    model = str(corpus.parent / "llama")
    cases: tuple[tuple[str, list[str], str], ...] = (
        ("dsir", [], "got none (--target)"),
        ("column", [], "expected --score-key NAME, got none"),
        ("column", ["--score-key", "edu"], "expected the column 'edu', found none"),
        ("betr", [], "no benchmark given"),
        ("loss", [], "got none (--model DIR)"),
        ("loss", ["--model", model], "at most the model's 64 positions, got 512"),
        ("loss", ["--model", str(tmp_path)], "expected a Hugging Face directory"),
        ("color", ["--prior", model], "expected --prior DIR and --conditional DIR"),
        ("nag", ["--model", model, "--window", "32", "--neurons", "0"], "at least one neuron of each layer"),
        ("opus", ["--model", model, "--window", "32"], "compare plain gradients with --geometry sgd"),
        ("loss", ["--model", model, "--part", "3/2"], "expected I/N"),
    )
    for number, (scorer, more, message) in enumerate(cases):
        assert score(corpus, tmp_path / f"none{number}", scorer, *more) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("score_corpus: ")
        assert message in line
    assert score(corpus, tmp_path / "half", "dsir", "--target", "proxy", "--part", "0/2") == 0
    half = ["--corpus", str(corpus), "--scores", str(tmp_path / "half"), "--output", str(tmp_path / "kept")]
    assert "left for the other parts" in capsys.readouterr().out
    assert main(["keep", *half, "--rule", "top", "--share", "0.5"]) == 1
    assert "parts are not all there; run the missing ones" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    assert main(["score-report", "--corpus", str(corpus), "--scores", str(tmp_path / "absent")]) == 1
    assert "expected a complete scoring" in capsys.readouterr().err
    (tmp_path / "mine.html").write_text("mine")
    other = ["--output", str(tmp_path / "mine.html"), "--scores", str(tmp_path)]
    assert main(["score-report", "--corpus", str(corpus), *other]) == 1
    assert "is no report of this tool" in capsys.readouterr().err
