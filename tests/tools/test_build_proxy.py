"""The command line of the proxy, and a run that trains on what it made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import DistributedPool
from tiny_runs import recipe, run

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "data")]

import build_proxy  # noqa: E402
from proxy_helpers import make_corpus, science_questions  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    science_questions(root / "questions.jsonl")
    return make_corpus(root)


def command(corpus: Path, output: Path, *more: str) -> list[str]:
    benchmarks = ["--benchmarks", f"mmlu={corpus.parent / 'questions.jsonl'}"]
    return ["--corpus", str(corpus), "--output", str(output), "--token-budget", "2k", *benchmarks, *more]


def test_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an option that does not reach the work, or a second run that does it again."""
    output = corpus.parent / "out"
    assert build_proxy.main(command(corpus, output, "--encoder", "lexical")) == 0
    said = capsys.readouterr().out
    assert "proxy       bench_proxy" in said
    assert f"train on it with data={output}" in said
    assert build_proxy.main(command(corpus, output, "--encoder", "lexical")) == 0
    assert "already built" in capsys.readouterr().out
    random = ["--kind", "std", "--seed", "7", "--scores", str(corpus.parent / "hashes")]
    assert build_proxy.main(command(corpus, corpus.parent / "random", *random)) == 0
    assert (corpus.parent / "hashes" / "settings.json").is_file()
    assert "std_proxy" in capsys.readouterr().out


def test_mistakes_are_said_in_one_line(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a traceback, or status 0, for a mistyped option."""
    output = corpus.parent / "none"
    for more, message in (
        (["--encoder", "lexical", "--benchmarks", "mmlu"], "'mmlu': expected NAME=FILE"),
        (["--encoder", "lexical", "--benchmarks", "mmlu=absent.jsonl"], "absent.jsonl: no such file"),
        (["--encoder", "lexical", "--token-budget", "much"], "token budget: expected a positive number such as 30M"),
        (["--encoder", "lexical", "--part", "2"], "--part '2': expected I/N"),
        (["--encoder", str(corpus)], "expected a sentence-transformers model, found no modules.json"),
        (["--encoder", "lexical", "--corpus", str(corpus / "tokenizer")], "manifest.json: not found"),
    ):
        assert build_proxy.main(command(corpus, output, *more)) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("build_proxy: ")
        assert message in line
    assert build_proxy.main(["--corpus", str(corpus), "--output", str(output)]) == 1
    assert "no benchmark given" in capsys.readouterr().err


def test_training_and_resume(corpus: Path, tmp_path: Path, world2: DistributedPool) -> None:
    """Fault: a run that cannot read the directory, or resumes with other documents: steps 4 to 6 done again from the
    checkpoint of step 3 give the same losses, draws and weights bit for bit."""
    output = corpus.parent / "trained"
    assert build_proxy.main(command(corpus, output, "--encoder", "lexical")) == 0

    training = {"train_steps": 6, "checkpoint_interval": 3, "keep_checkpoints": 2, "eval_interval": 3}
    config = recipe(tmp_path, tmp_path, "proxied", data={"path": str(output)}, training=training)
    whole = world2.run(run, config)[0]
    assert len(whole["losses"]) == 6
    assert torch.isfinite(torch.tensor(whole["losses"])).all()
    shutil.rmtree(tmp_path / "proxied" / "checkpoints" / "step_00000006")
    resumed = world2.run(run, config, True)[0]
    for column in ("losses", "ids", "selected", "order"):
        assert resumed[column] == whole[column], column
    assert torch.equal(resumed["weights"], whole["weights"])


def test_an_installation_without_the_extra_is_told_of_it(tmp_path: Path) -> None:
    """Fault: a traceback about scipy from an import at the top, before the message that names the extra."""
    code = "import sys; sys.modules.update(scipy=None, sklearn=None, sentence_transformers=None); import build_proxy; "
    code += "sys.exit(build_proxy.main(sys.argv[1:]))"
    arguments = ["--corpus", str(tmp_path), "--output", str(tmp_path / "out"), "--benchmarks", "a=b", "--encoder"]
    for encoder in ("lexical", "some/model"):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, encoder],
            cwd=ROOT / "tools",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "pip install -e '.[proxy]'" in done.stderr
        assert "Traceback" not in done.stderr
