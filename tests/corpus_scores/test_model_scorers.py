"""Scores by frozen models, against transformers and against gradients of one document at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import tiny_runs
import torch
from chaos import KillAtFileEvent
from distributed import DistributedPool
from launched import Launched, Server
from score_helpers import opened, scored, topic_corpus
from torch import Tensor
from torch.nn import functional

from megatron_opus.corpus_scores.documents import Block, CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.model_losses import Color, Loss, MinK, ModelScorer
from megatron_opus.corpus_scores.neuron_graph import NeuronGraph
from megatron_opus.corpus_scores.reference_model import Windowing, model_identity
from megatron_opus.corpus_scores.update_utility import Opus
from megatron_opus.weights.convert import opus_to_hf

FAMILIES = ("gpt2", "qwen3", "llama")
SHORT = Windowing(tokens=80, most=3)
POSITIONS = 100


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topic_corpus(tmp_path_factory.mktemp("models"), documents=24)


@pytest.fixture(scope="module")
def models(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of each family with the corpus's vocabulary, and a second GPT-2."""
    root, size = tmp_path_factory.mktemp("hf"), opened(corpus).tokenizer.vocab_size
    room = {kind: {"n_positions" if kind == "gpt2" else "max_position_embeddings": POSITIONS} for kind in FAMILIES}
    made = {kind: hf_models.save(root / kind, kind, vocab_size=size, **room[kind]) for kind in FAMILIES}
    return {**made, "other": hf_models.save(root / "other", "gpt2", vocab_size=size, seed=5, **room["gpt2"])}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours on the corpus, with its optimizer state."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny_runs.recipe(
        root, root, "trained", data={"path": str(corpus), "seq_length": 32}, training={"train_steps": 4}
    )
    pool = DistributedPool(1)
    pool.run(tiny_runs.run, config)
    pool.close()
    return root / "trained"


def published(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def losses_by_transformers(model: Any, ids: np.ndarray, windowing: Windowing) -> list[Tensor]:
    """Token losses of each window of a document, one window at a time."""
    text = torch.from_numpy(ids[:-1].astype(np.int64))
    starts = list(range(0, len(text) - 1, windowing.tokens))
    if len(starts) > windowing.most:
        starts = [starts[round(i * (len(starts) - 1) / (windowing.most - 1))] for i in range(windowing.most)]
    found = []
    for start in starts:
        window = text[start : start + windowing.tokens + 1]
        logits = model(window[None, :-1]).logits[0]
        found.append(functional.cross_entropy(logits, window[1:], reduction="none"))
    return found


def every_document(documents: CorpusDocuments, domain: int) -> list[np.ndarray]:
    return [documents.one(domain, i).ids for i in range(documents.entries[domain].documents)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_are_those_of_transformers(corpus: Path, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Guards against a Hugging Face directory that is read as another model, labels that are shifted, padding that
    counts, windows that are left out, and documents in another order than they were batched in."""
    documents = opened(corpus)
    loss = scored(corpus, Loss([models[kind]], windowing=SHORT), tmp_path / "loss")
    least = scored(corpus, MinK([models[kind]], share=0.3, windowing=SHORT), tmp_path / "min-k")
    model = published(models[kind])
    lengths = []
    for number, entry in enumerate(documents.entries):
        for i, ids in enumerate(every_document(documents, number)):
            with torch.no_grad():
                parts = losses_by_transformers(model, ids, SHORT)
            lengths.append(len(parts))
            tokens = torch.cat(parts).double()
            assert loss.of[entry.name][i] == pytest.approx(tokens.mean().item(), abs=1e-4)
            worst = tokens.sort().values[-max(1, int(0.3 * len(tokens))) :]
            assert least.of[entry.name][i] == pytest.approx(-worst.mean().item(), abs=1e-4)
    assert {2, 3} <= {*lengths}
    assert max(len(ids) for ids in every_document(documents, 0)) > 3 * 80 + 2  # some windows are passed over


def test_color_is_the_difference_of_two_losses(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Guards against prior and conditional model exchanged: then the filter keeps what the target is not like."""
    prior, conditional = (
        scored(corpus, Loss([models[name]], windowing=SHORT), tmp_path / name) for name in ("gpt2", "other")
    )
    color = scored(corpus, Color(models["gpt2"], models["other"], windowing=SHORT), tmp_path / "color")
    for name, values in color.of.items():
        np.testing.assert_allclose(values, prior.of[name] - conditional.of[name], atol=1e-5)
    assert np.std(color.of["mixed"]) > 0.01


def test_several_models_are_averaged(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Guards against the scores of the first or the last of several checkpoints."""
    one, two = (scored(corpus, Loss([models[name]], windowing=SHORT), tmp_path / name) for name in ("gpt2", "qwen3"))
    both = scored(corpus, Loss([models["gpt2"], models["qwen3"]], windowing=SHORT), tmp_path / "both")
    np.testing.assert_allclose(both.of["mixed"], (one.of["mixed"] + two.of["mixed"]) / 2, atol=1e-5)


def test_a_checkpoint_of_ours_has_the_losses_of_its_export(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Guards against initial weights, or another checkpoint than the newest, under a run folder's name."""
    opus_to_hf(trained, tmp_path / "exported")
    windowing = Windowing(tokens=32, most=4)
    ours = scored(corpus, Loss([trained], windowing=windowing), tmp_path / "ours")
    model, documents = published(tmp_path / "exported"), opened(corpus)
    for i, ids in enumerate(every_document(documents, 1)):
        with torch.no_grad():
            expected = torch.cat(losses_by_transformers(model, ids, windowing)).mean().item()
        assert ours.of[documents.entries[1].name][i] == pytest.approx(expected, abs=1e-4)


# --- opus -----------------------------------------------------------------------------------------------------------


def gradient(model: Any, ids: np.ndarray, windowing: Windowing) -> Tensor:
    """The gradient of a document's mean loss by the matrices of the blocks, one vector in float64."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    loss = torch.cat(losses_by_transformers(model, ids, windowing)).mean()
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize("normalise", [False, True])
def test_utilities_are_those_of_whole_gradients(
    corpus: Path, models: dict[str, Path], tmp_path: Path, normalise: bool
) -> None:
    """Guards against windows that weigh alike whatever their length, a proxy that is not the target's mean, and norms
    of windows in the place of the document's."""
    documents, model = opened(corpus), published(models["llama"])
    scorer = Opus([models["llama"]], geometry="sgd", normalise=normalise, proxy_windows=10**6, windowing=SHORT)
    found = scored(corpus, scorer, tmp_path / "opus")
    proxy = [ids for block in documents.target(["proxy"]) for ids in block.documents()]
    windows = [
        gradient(model, np.append(window, 0), Windowing(tokens=80, most=1))
        for ids in proxy
        for window in SHORT.cut(ids)
    ]
    toward = torch.stack(windows).mean(0)
    number = [entry.name for entry in documents.entries].index("mixed")
    expected = []
    for ids in every_document(documents, number):
        own = gradient(model, ids, SHORT)
        expected.append((own @ toward / (own.norm() if normalise else 1.0)).item())
    spread = np.std(expected)
    np.testing.assert_allclose(found.of["mixed"], expected, atol=(0.15 if normalise else 1e-3) * spread)


def test_a_checkpoint_brings_its_optimizer_along(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Guards against plain gradients where the checkpoint has AdamW's second moments, and a state of zeros."""
    windowing = Windowing(tokens=32, most=2)
    scorer = Opus([trained], windowing=windowing, say=lambda text: None)
    auto = scored(corpus, scorer, tmp_path / "auto")
    assert scorer._passes[0].preconditioners.geometry.startswith("adamw")
    plain = scored(corpus, Opus([trained], geometry="sgd", windowing=windowing), tmp_path / "sgd")
    found, other = auto.of["mixed"], plain.of["mixed"]
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.99
    assert (
        0.1 < found.std() / (tiny_runs.recipe(tmp_path, tmp_path, "x").optimizer.lr * other.std()) < 1e6
    )  # not 1 / eps


# --- nag ------------------------------------------------------------------------------------------------------------


def graph(model: Any, kind: str, ids: np.ndarray, neurons: int) -> list[set[int]]:
    """The `neurons` neurons of each layer with the largest mean |h . W|, from the inputs of transformers' own MLPs."""
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    impact = [torch.zeros(1) for _ in layers]

    def add(number: int, seen: Tensor) -> None:
        up = layers[number].mlp.c_fc.weight if kind == "gpt2" else layers[number].mlp.up_proj.weight.T
        impact[number] = impact[number] + (seen[0] @ up).abs().sum(0)

    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments, number=number: add(number, arguments[0]))
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for window in SHORT.cut(ids):
            model(torch.from_numpy(window[None, :-1].astype(np.int64)))
    for handle in handles:
        handle.remove()
    return [set(of_layer.topk(neurons).indices.tolist()) for of_layer in impact]


@pytest.mark.parametrize("kind", FAMILIES)
def test_overlaps_are_those_of_the_published_formula(
    corpus: Path, models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Guards against the gate's neurons in the place of up's, padding that counts, windows of one document in several
    graphs, and a profile that is not a share of each layer."""
    documents, model, neurons = opened(corpus), published(models[kind]), 6
    found = scored(corpus, NeuronGraph([models[kind]], ["proxy"], neurons=neurons, windowing=SHORT), tmp_path / "nag")
    wanted = [graph(model, kind, ids, neurons) for block in documents.target(["proxy"]) for ids in block.documents()]
    number = [entry.name for entry in documents.entries].index("mixed")
    expected = []
    for ids in every_document(documents, number):
        layers = zip(graph(model, kind, ids, neurons), zip(*wanted, strict=True), strict=True)
        expected.append(np.mean([np.mean([len(own & one) for one in of_layer]) / neurons for own, of_layer in layers]))
    np.testing.assert_allclose(found.of["mixed"], expected, atol=1e-6)
    assert np.std(expected) > 0.01


def test_graphs_that_cannot_be_are_refused(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Guards against graphs of all neurons, of none, and of a model whose neurons are spread over experts; and against
    a score of 0 for a document that was never read."""
    refused(
        corpus, NeuronGraph([models["gpt2"]], neurons=49, windowing=SHORT), tmp_path / "a", "at most the 48 neurons"
    )
    moe = hf_models.save(tmp_path / "moe", "qwen3_moe", vocab_size=opened(corpus).tokenizer.vocab_size)
    short = Windowing(tokens=32)
    refused(corpus, NeuronGraph([moe], windowing=short), tmp_path / "b", "nag knows no experts")
    for wrong, message in (({"neurons": 0}, "at least one neuron"), ({"models": []}, r"got none \(--model DIR\)")):
        with pytest.raises(ScoreError, match=message):
            NeuronGraph(**{"models": [moe], **wrong})
    scorer, documents = NeuronGraph([models["gpt2"]], windowing=SHORT), opened(corpus)
    scorer.prepare(documents, tmp_path, (0, 1))
    eod = documents.tokenizer.eod
    values = scorer.score(Block(ids=np.array([eod, 7, eod, 7, 8, eod]), ends=np.array([1, 3, 6])))
    assert np.isnan(values[:2]).all()
    assert 0 < values[2] < 1
    assert np.isnan(scorer.score(Block(ids=np.array([eod]), ends=np.array([1])))).all()


# --- parts and interruptions ----------------------------------------------------------------------------------------


def prepare() -> None:
    """Import the command and cut its work into many pieces, once for all processes that are forked."""

    ModelScorer.piece_tokens, ModelScorer.block_tokens = 900, 300


def program(arguments: list[str], _recipe: str) -> int:
    from megatron_opus.cli import main

    return main(arguments)


@pytest.fixture(scope="module")
def commands() -> Iterator[Server]:
    """Processes of `megatron-opus`."""
    server = Server(prepare, program)
    yield server
    server.close()


def command(corpus: Path, model: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--corpus", str(corpus), "--scorer", "loss", "--model", str(model), "--output", str(output)]
    return ["score-corpus", *arguments, "--window", "24", *more]


def files(directory: Path) -> dict[str, bytes]:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file() and not p.name.startswith(".lock"))
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


def test_processes_and_kills_leave_the_bytes_of_one_run(
    commands: Server, corpus: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Guards against scores that depend on how the corpus was divided among processes, or on a SIGKILL between."""

    def start(name: str, *more: str, kill: KillAtFileEvent | None = None) -> Launched:
        arguments = command(corpus, models["qwen3"], tmp_path / name, *more)
        return commands.launch(1, arguments, tmp_path / "logs" / "-".join([name, *more[1:]]).replace("/", "of"), kill)

    whole = start("whole")
    assert whole.wait() == {0: 0}, whole.log(0)
    parts = [start("parts", "--part", f"{i}/2") for i in range(2)]
    assert [part.wait() for part in parts] == [{0: 0}, {0: 0}]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    killed = start("killed", kill=KillAtFileEvent(0, 12, f"{tmp_path}/killed/pieces/"))
    assert killed.wait() == {0: -9}, killed.log(0)
    assert [*(tmp_path / "killed").glob("pieces/0*.npy")]
    assert not (tmp_path / "killed" / "scores.json").exists()
    again = start("killed")
    assert again.wait() == {0: 0}, again.log(0)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(corpus: Path, scorer: ModelScorer | Opus | NeuronGraph, output: Path, message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        scored(corpus, scorer, output)


def test_another_tokenizer_is_refused(corpus: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Guards against losses of ids that mean other words to the model: they look like numbers of junk."""
    small = hf_models.save(tmp_path / "small", "gpt2")
    refused(
        corpus,
        Loss([small], windowing=Windowing(tokens=32)),
        tmp_path / "s",
        r"at most the model's 91 token ids, found \d+",
    )
    other = shutil.copytree(models["gpt2"], tmp_path / "with_tokenizer")
    vocabulary = {"<|endoftext|>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<|endoftext|>",
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(corpus, Loss([other], windowing=SHORT), tmp_path / "t", "prepared with the model's own tokenizer")


def test_the_run_s_own_tokenizer_is_compared(trained: Path, tmp_path: Path) -> None:
    """Guards against a corpus of another training of SentencePiece, of the same size as the run's."""
    other = topic_corpus(tmp_path / "other", documents=60)
    refused(
        other,
        Loss([trained], windowing=Windowing(tokens=32)),
        tmp_path / "t",
        "prepared with the model's own tokenizer",
    )


def test_models_that_cannot_score_are_refused(
    corpus: Path, models: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    """Guards against scores by no model, beyond a model's positions, or in a geometry that nothing is known of."""
    refused(
        corpus,
        Loss([models["gpt2"]], windowing=Windowing(tokens=101)),
        tmp_path / "a",
        "model's 100 positions, got 101",
    )
    refused(corpus, Opus([models["gpt2"]]), tmp_path / "b", "found weights alone; compare plain gradients")
    refused(corpus, Loss([tmp_path]), tmp_path / "c", "expected a Hugging Face directory with safetensors")
    for make in (lambda: Loss([]), lambda: Opus([])):
        with pytest.raises(ScoreError, match=r"got none \(--model DIR\)"):
            make()
    run = shutil.copytree(trained, tmp_path / "two")
    (marker,) = run.glob("checkpoints/*/complete.json")
    raw = json.loads(marker.read_text())
    raw["layout"]["world_size"] = 2
    marker.write_text(json.dumps(raw))
    refused(corpus, Opus([run], windowing=Windowing(tokens=16)), tmp_path / "d", "a checkpoint of one process")
    for wrong in ({"tokens": 1}, {"most": 0}):
        with pytest.raises(ScoreError, match="at least 2 tokens and 1 window"):
            Windowing(**wrong)
    with pytest.raises(ScoreError, match="share of the tokens above 0"):
        MinK([trained], share=0.0)


def test_a_document_without_a_prediction_has_no_score(corpus: Path, models: dict[str, Path]) -> None:
    """Guards against a division by zero, or a score of 0, for an empty document and for one of a single token."""
    scorer = Loss([models["gpt2"]], windowing=SHORT)
    documents = opened(corpus)
    scorer.prepare(documents, Path(), (0, 1))
    eod = documents.tokenizer.eod
    found = scorer.score(Block(ids=np.array([eod, 7, eod, 7, 8, eod]), ends=np.array([1, 3, 6])))
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2])


def test_other_weights_are_another_model(models: dict[str, Path]) -> None:
    """Guards against scores that go on with another model of the same shape and name."""
    assert model_identity(models["gpt2"]) != model_identity(models["other"])
