"""Evaluation of a trained checkpoint: against lm-eval called directly, against sums by hand, against the trainer."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from eval_helpers import ByHand, rows, write

from megatron_opus.config import ConfigError
from megatron_opus.data import manifest
from megatron_opus.data.benchmarks.items import load_benchmark
from megatron_opus.data.manifest import Manifest
from megatron_opus.data.tokenizers import base as tokenizers
from megatron_opus.evaluation import harness
from megatron_opus.evaluation.evaluate import Settings, evaluate, summary
from megatron_opus.evaluation.exports import find_checkpoint
from megatron_opus.evaluation.prompts import EvaluationError, questions
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.weights.convert import opus_to_hf

# The same sums in another order (padding, batches): float32 rounding of sums of some 100 nats, with a margin.
TOLERANCE = 1e-4
BENCHMARKS = ("mmlu", "arc_easy", "piqa", "winogrande")
LENGTH = 96


def train(config: Any) -> None:
    tiny_runs.run(config)


@pytest.fixture(scope="module")
def run_dir(world2: Any, embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps over two tensor-parallel ranks: what is exported is not what one process holds."""
    output = tmp_path_factory.mktemp("runs")
    config = tiny_runs.recipe(
        embedded_cache,
        output,
        "plain",
        data={"seq_length": LENGTH},
        parallel={"tensor_model_parallel_size": 2},
        training={"train_steps": 2},
    )
    world2.run(train, config)
    return output / config.name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("benchmarks")
    return {name: write(folder / f"{name}.jsonl", rows(name)) for name in BENCHMARKS}


@pytest.fixture(scope="module")
def evaluated(run_dir: Path, files: dict[str, Path]) -> dict[str, Any]:
    """One evaluation of everything, with every way to a network closed."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a connection was tried: {args}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        settings = Settings(run_dir=run_dir, benchmarks=tuple(files.items()), tasks_dir=run_dir / "tasks", device="cpu")
        return evaluate(settings)


@pytest.fixture(scope="module")
def by_hand(evaluated: dict[str, Any]) -> ByHand:
    return ByHand(Path(evaluated["model"]))


def pairs(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """(context, continuation) of every choice and the right one, written out anew from the files' own fields."""
    if "sentence" in row:
        before, after = row["sentence"].split("_")
        return [(before + row[key], after) for key in ("option1", "option2")], int(row["answer"]) - 1
    if "goal" in row:
        choices = [row["sol1"].strip(), row["sol2"].strip()]
        return [(f"Question: {row['goal']}\nAnswer:", f" {c}") for c in choices], row["label"]
    prompt = row.get("query") or f"Question: {row['question']}\nAnswer:"
    return [(prompt, f" {choice}") for choice in row["choices"]], row["gold"] if "gold" in row else row["answer"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_numbers_are_those_of_sums_by_hand(
    evaluated: dict[str, Any], by_hand: ByHand, files: dict[str, Path], name: str
) -> None:
    """Fault: a prompt with another space or line end, a choice scored by letter, normalised by characters or not at
    all, gold counted from 1: each gives plausible accuracies."""
    hits, gold_nats, gold_tokens, by_rule = [], 0.0, 0, []
    for row in map(json.loads, files[name].read_text().splitlines()):
        asked, gold = pairs(row)
        scored = [by_hand(*pair) for pair in asked]
        per_token, in_sum = [ll / n for ll, n in scored], [ll for ll, _ in scored]
        hits.append(per_token.index(max(per_token)) == gold)
        by_rule.append(per_token.index(max(per_token)) != in_sum.index(max(in_sum)))
        gold_nats -= scored[gold][0]
        gold_tokens += scored[gold][1]
    found = evaluated["benchmarks"][name]
    assert found["accuracy"] == sum(hits) / len(hits)
    assert found["n"] == len(hits) == 6
    assert math.isclose(found["perplexity_of_gold"], math.exp(gold_nats / gold_tokens), rel_tol=TOLERANCE)
    assert found["random_baseline"] == (0.5 if name in ("piqa", "winogrande") else 0.25)
    assert found["rules"] == (["partial"] if name == "winogrande" else ["choices"])
    assert (found["truncated"], found["merged_boundaries"]) == (0, 0)
    if name in ("mmlu", "arc_easy"):
        assert any(by_rule), "the generated choices do not tell the rules apart"


def test_numbers_are_those_of_lm_eval_called_directly(
    evaluated: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    """Fault: our tasks, model settings or export make lm-eval see something else than its own users would."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    common = {
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }

    def data(name: str) -> dict[str, Any]:
        return {"data_files": {"test": str(files[name])}, "cache_dir": str(tmp_path)}

    question = "Question: {{question}}\nAnswer:"
    fields = {"doc_to_choice": "choices", "doc_to_target": "answer"}
    mmlu = {**common, **fields, "task": "mine_mmlu", "dataset_kwargs": data("mmlu"), "doc_to_text": question}
    winogrande = {
        **common,
        "task": "mine_winogrande",
        "dataset_kwargs": data("winogrande"),
        # as lm-eval's own winogrande: contexts in the place of choices
        "doc_to_text": lambda doc: int(doc["answer"]) - 1,
        "doc_to_choice": lambda doc: [doc["sentence"].split("_")[0] + doc[o] for o in ("option1", "option2")],
        "doc_to_target": lambda doc: doc["sentence"].split("_")[1].strip(),
    }
    with harness.offline():
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": evaluated["model"], "dtype": "float32"},
            tasks=[mmlu, winogrande],
            task_manager=TaskManager(include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
    ours = evaluated["benchmarks"]
    for name in ("mmlu", "winogrande"):
        assert results["results"][f"mine_{name}"]["acc,none"] == ours[name]["accuracy_sum"]
    assert results["results"]["mine_mmlu"]["acc_norm,none"] == ours["mmlu"]["accuracy_norm"]
    assert ours["winogrande"]["accuracy_norm"] is None  # lm-eval divides by the lengths of the contexts there
    assert results["results"]["mine_winogrande"]["acc,none"] == ours["winogrande"]["accuracy"]


def test_every_likelihood_is_lm_evals_and_the_hands(
    evaluated: dict[str, Any], by_hand: ByHand, run_dir: Path, files: dict[str, Path]
) -> None:
    """Fault: accuracies agree by luck of few questions. The kept task files are run as `lm_eval --include_path` would;
    also in a model that reads 24 tokens at once, where contexts are cut on their left and counted."""
    asked = questions(load_benchmark("arc_easy", files["arc_easy"]))
    for max_length in (None, 24):
        lm = harness.load_model(Path(evaluated["model"]), device="cpu", batch_size=3, max_length=max_length)
        (answered,) = harness.run_tasks(lm, harness.write_task(run_dir / "again", "arc_easy", asked)).values()
        cut = 0
        for one, question in zip(answered, asked, strict=True):
            keep = max_length + 1 if max_length else None
            for ll, tokens, choice in zip(one.loglikelihoods, one.tokens, question.choices, strict=True):
                expected, count = by_hand(question.contexts[0], f" {choice}", keep)
                assert abs(ll - expected) < TOLERANCE
                assert tokens == count
            cut += one.cut > 0
        summary = harness.summarise(answered)
        assert summary["truncated"] == cut
        assert (cut > 0) == (max_length is not None)


def test_perplexity_is_the_trainers(
    evaluated: dict[str, Any], run_dir: Path, world2: Any, embedded_cache: Path, tmp_path: Path
) -> None:
    """Fault: other windows, positions, masks or counted tokens than in training, or another step's weights."""
    flags = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
    config = tiny_runs.recipe(
        embedded_cache, tmp_path, "documents", data={"seq_length": 64, **flags}, training={"train_steps": 2}
    )
    world2.run(train, config)
    of_documents = evaluate(Settings(run_dir=tmp_path / "documents", device="cpu"))
    for record, folder, tokens in ((evaluated, run_dir, 4 * LENGTH), (of_documents, tmp_path / "documents", 4 * 64)):
        trainers = read_metrics(folder)[-1]["validation_loss"]
        assert set(record["perplexity"]) == set(trainers) == {"prose", "docstrings", "source", "tables"}
        for name, loss in trainers.items():
            found = record["perplexity"][name]
            assert math.isclose(found["loss"], loss, abs_tol=TOLERANCE)
            assert found["trainer_loss"] == loss
            assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
            assert found["tokens"] <= tokens
        assert record["benchmarks"] == {} or record["average"] is not None


def test_the_record_is_complete_and_an_export_is_used_again(
    evaluated: dict[str, Any], run_dir: Path, files: dict[str, Path]
) -> None:
    """Fault: a second evaluation that exports gigabytes again, uses the export of a run that was deleted and made
    again, or destroys what the first one has found."""
    assert json.loads((run_dir / "evaluation.json").read_text()) == evaluated
    assert evaluated["step"] == 2
    assert [line.split()[0] for line in summary(evaluated).splitlines()] == [
        *BENCHMARKS, "average", "prose", "docstrings", "source", "tables",
    ]  # fmt: skip
    values = [one["accuracy"] for one in evaluated["benchmarks"].values()]
    assert evaluated["average"] == pytest.approx(sum(values) / 4)
    assert evaluated["in_domain_average"] is None
    assert set(evaluated["benchmarks"]["mmlu"]["subjects"]) == {"law", "logic"}
    weights = run_dir / "exported/step_00000002/model.safetensors"
    assert Path(evaluated["model"]) == weights.parent
    made = weights.stat().st_mtime_ns
    settings = Settings(run_dir=run_dir, perplexity=False, benchmarks=(("PIQA", files["piqa"]),), limit=2, device="cpu")
    second = evaluate(settings)
    assert weights.stat().st_mtime_ns == made
    assert second["benchmarks"]["piqa"]["n"] == 2
    assert second["benchmarks"]["piqa"]["n_in_files"] == 6
    assert json.loads((run_dir / "evaluation.1.json").read_text()) == evaluated
    marker = run_dir / "checkpoints/step_00000002/complete.json"
    marker.write_text(marker.read_text())
    evaluate(settings)
    assert weights.stat().st_mtime_ns > made
    assert not list((run_dir / "exported").glob("*.partial"))


def test_a_model_directory_and_examples(evaluated: dict[str, Any], files: dict[str, Path], tmp_path: Path) -> None:
    """Fault: examples that are ignored, or taken from the questions themselves."""
    directory = Path(evaluated["model"])
    examples = write(tmp_path / "train.jsonl", rows("arc_easy", 9)[6:])
    settings = Settings(
        model=directory,
        benchmarks=(("arc_easy", files["arc_easy"]),),
        fewshot=(("arc_easy", examples),),
        num_fewshot=2,
        tasks_dir=tmp_path / "tasks",
        output=tmp_path / "out.json",
        device="cpu",
    )
    record = evaluate(settings)["benchmarks"]["arc_easy"]
    assert record["perplexity_of_gold"] != evaluated["benchmarks"]["arc_easy"]["perplexity_of_gold"]
    with pytest.raises(EvaluationError, match=r"no examples for arc_easy; name their training file by --fewshot"):
        evaluate(Settings(model=directory, benchmarks=settings.benchmarks, num_fewshot=2, device="cpu"))


def test_another_tokenizer_is_refused(evaluated: dict[str, Any], run_dir: Path, files: dict[str, Path]) -> None:
    """Fault: a model given ids that mean something else to it, which costs accuracy and no error."""
    path = Path(evaluated["model"]) / "tokenizer.json"
    good = path.read_bytes()
    definition = json.loads(good)
    definition["model"]["merges"] = definition["model"]["merges"][:10]
    path.write_text(json.dumps(definition))
    try:
        with pytest.raises(EvaluationError, match=r"gives other ids than the corpus's for a text of prose"):
            evaluate(Settings(run_dir=run_dir, benchmarks=(("piqa", files["piqa"]),), device="cpu"))
    finally:
        path.write_bytes(good)


def test_data_prepared_anew_does_not_spoil_an_export(run_dir: Path, tmp_path: Path) -> None:
    """Fault: the tokenizer of other data beside a model that never saw it; or no export at all because of it."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"</s>": 0, **{str(i): i for i in range(1, 5000)}}, unk_token="</s>"))
    larger = tokenizers.HuggingFaceTokenizer(backend.to_str().encode())
    description = larger.save(tmp_path / "tokenizer")
    manifest.write(tmp_path, Manifest(tokenizer=description, datasets=[], settings={}))
    path = find_checkpoint(run_dir, None)
    with pytest.raises(ConfigError, match=r"expected at most the model's 4096 tokens, found 5000"):
        opus_to_hf(path, tmp_path / "named", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "named").exists()
    moved = tmp_path / "run/checkpoints/step_00000002"
    shutil.copytree(path, moved)
    marker = json.loads((moved / "complete.json").read_text())
    marker["config"]["data"]["path"] = str(tmp_path)
    (moved / "complete.json").write_text(json.dumps(marker))
    done = opus_to_hf(moved, tmp_path / "found")
    assert done.companions == ()
    assert "exported without a tokenizer: " in done.notice
    assert (tmp_path / "found/model.safetensors").is_file()
    with pytest.raises(EvaluationError, match=r"expected tokenizer files beside the model, found none"):
        evaluate(Settings(model=tmp_path / "found", benchmarks=(("piqa", write(tmp_path / "p.jsonl", rows("piqa"))),)))


def test_a_step_without_checkpoint_names_those_that_are_there(run_dir: Path) -> None:
    """Fault: another step is evaluated than the one asked for."""
    with pytest.raises(EvaluationError, match=r"no complete checkpoint of step 1; there are those of steps 2"):
        evaluate(Settings(run_dir=run_dir, checkpoint=1))
