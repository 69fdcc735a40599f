"""lm-eval on a Hugging Face directory: questions become local JSON tasks, log-likelihoods become the paper's numbers.

lm-eval tokenises, batches and computes log p(continuation | context) for every choice; its own `acc` (sum) and
`acc_norm` (per character) are reported as they are. What it has no metric for, the choice by perplexity per token, is
made from the same log-likelihoods and from the numbers of tokens that it has scored.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus.evaluation.prompts import EvaluationError, Question
from megatron_opus.files import atomic_file, write_text

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")
FEWSHOT_SEED = 1234  # lm-eval's own
_PREFIX = "opus_"  # our task names: never one of lm-eval's, whose configuration would be taken instead


@dataclass(frozen=True)
class Scored:
    """One (context, continuation) pair. Lengths in tokens, before anything was cut off."""

    context: int
    continuation: int
    cut: int  # tokens of the context that did not fit
    merged: bool  # the context's last tokens are others with the continuation behind them


def require_lm_eval() -> None:
    """Raises EvaluationError where a package is missing that evaluation needs and training does not."""
    for module, package in (("lm_eval", "lm-eval"), ("accelerate", "accelerate"), ("transformers", "transformers")):
        if importlib.util.find_spec(module) is None:
            raise EvaluationError(f"{package} is not installed; benchmarks need it: pip install -e '.[eval]'")


@contextmanager
def offline() -> Iterator[None]:
    """No library inside asks a server for anything. Modules imported earlier have read the variables already."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_model(directory: Path, *, device: str, batch_size: int, max_length: int | None) -> Any:
    """lm-eval's Hugging Face model of `directory`. It notes what it scores: `.scored[context, continuation]`.

    Raises EvaluationError for a directory without tokenizer.
    """
    from lm_eval.models.huggingface import HFLM

    class Noting(HFLM):
        """The same numbers; requests that it could not score, or not whole, are found before the first batch."""

        def __init__(self, **settings: Any) -> None:
            self.scored: dict[tuple[str, str], Scored] = {}
            super().__init__(**settings)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for pair, context, continuation in requests:
                self.scored[pair] = _noted(self, pair, context, continuation)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise EvaluationError(
            f"{directory}: expected tokenizer files beside the model, found none; export it with --tokenizer DIR"
        )
    return Noting(
        pretrained=str(directory),
        device=device,
        batch_size=batch_size,
        max_length=max_length,
        dtype="auto",
        softmax_dtype="float32",  # in the model's bfloat16, sums of log-likelihoods lose the second digit
        trust_remote_code=False,
    )


def _noted(lm: Any, pair: tuple[str, str], context: list[int], continuation: list[int]) -> Scored:
    shown = f"{pair[1]!r} after {pair[0][-60:]!r}"
    if not continuation:
        raise EvaluationError(f"{shown}: the tokenizer makes no token of it after this context; it has no likelihood")
    if len(continuation) > lm.max_length:
        raise EvaluationError(
            f"{shown}: {len(continuation)} tokens, more than the {lm.max_length} that the model reads at once; leave "
            "such questions out by --skip-too-long, or raise --max-length where the model was trained for more"
        )
    whole = lm.tok_encode(pair[0] + pair[1])
    cut = max(0, len(context) + len(continuation) - (lm.max_length + 1))
    return Scored(len(context), len(continuation), cut, bool(pair[0]) and whole[: len(context)] != context)


def fits(lm: Any, question: Question) -> bool:
    """Whether every answer has at most as many tokens as the model reads at once."""
    texts = question.choices if question.rule == "partial" else [f" {choice}" for choice in question.choices]
    # no tokenizer here makes more tokens than bytes, but for one in front
    long = [text for text in texts if len(text.encode()) >= lm.max_length]
    return all(len(lm.tok_encode(text)) <= lm.max_length for text in long)


# --- tasks ----------------------------------------------------------------------------------------------------------


def write_task(
    directory: Path, name: str, asked: Sequence[Question], fewshot: Sequence[Question] = (), num_fewshot: int = 0
) -> list[dict[str, Any]]:
    """JSON lines and task configurations for lm-eval, one task per rule; `tasks=` of `simple_evaluate` takes them.

    The configurations are written as YAML too: `lm_eval --include_path DIRECTORY --tasks ...` runs them.
    """
    import yaml

    directory = directory.resolve()  # the configurations are used from other directories too
    directory.mkdir(parents=True, exist_ok=True)
    tasks = []
    for rule in sorted({question.rule for question in asked}):
        task = f"{_PREFIX}{name}_{rule}"
        files = {"test": _write_docs(directory / f"{task}.jsonl", [q for q in asked if q.rule == rule])}
        config: dict[str, Any] = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(directory / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": num_fewshot,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (("acc", "acc_norm") if rule == "choices" else ("acc",))
            ],
            "metadata": {"version": 1.0},
        }
        if rule == "choices":
            config |= {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
        else:  # lm-eval takes an index for the text, and choices for contexts, where one continuation follows them all
            config |= {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "rest"}
            config["target_delimiter"] = ""
        if num_fewshot:
            shown = [q for q in fewshot if q.rule == rule]
            if len(shown) < num_fewshot:
                raise EvaluationError(f"{name}: {num_fewshot} examples asked for, {len(shown)} in the --fewshot file")
            files["fewshot"] = _write_docs(directory / f"{task}.fewshot.jsonl", shown)
            config["fewshot_split"] = "fewshot"
        write_text(directory / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False))
        tasks.append(config)
    return tasks


def _write_docs(path: Path, asked: Sequence[Question]) -> str:
    with atomic_file(path) as stream:
        for q in asked:
            doc: dict[str, Any] = {"id": q.id, "subject": q.subject, "gold": q.gold}
            if q.rule == "choices":
                doc |= {"context": q.contexts[0], "choices": list(q.choices)}
            else:
                doc |= {"contexts": list(q.contexts), "rest": q.choices[0]}
            stream.write((json.dumps(doc, ensure_ascii=False) + "\n").encode())
    return str(path)


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question and the model's log-likelihoods, in nats, in the order of its answers."""

    question: Mapping[str, Any]
    loglikelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    cut: int  # the largest number of context tokens that did not fit
    merged: bool
    acc: float
    acc_norm: float | None

    @property
    def chosen(self) -> int:
        """The answer with the lowest perplexity, the first of equals."""
        values = [ll / n for ll, n in zip(self.loglikelihoods, self.tokens, strict=True)]
        return values.index(max(values))


def run_tasks(lm: Any, tasks: Sequence[dict[str, Any]]) -> dict[str, list[Answered]]:
    """Benchmark -> answers, in the order of the files. All are put to the model together, longest texts first, so that
    what cannot be scored is found before anything is.

    Raises EvaluationError for a choice that has no token or does not fit, and for a likelihood that is not a number.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    with quiet():
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[dict(task) for task in tasks],
            task_manager=TaskManager(include_defaults=False),  # reading lm-eval's own thousands takes longer
            bootstrap_iters=0,
            log_samples=True,
            fewshot_random_seed=FEWSHOT_SEED,
        )
    assert results is not None
    found: dict[str, list[Answered]] = {}
    for task in tasks:
        samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
        name = task["task"].removeprefix(_PREFIX).rsplit("_", 1)[0]
        found.setdefault(name, []).extend(_answered(lm, name, sample) for sample in samples)
    return found


def _answered(lm: Any, name: str, sample: Mapping[str, Any]) -> Answered:
    noted = [lm.scored[tuple(pair)] for pair in sample["arguments"]]
    values = tuple(float(ll) for ll, _ in sample["filtered_resps"])
    if not all(map(math.isfinite, values)):
        raise EvaluationError(f"{name}, question {sample['doc']['id']}: log-likelihoods {values}: the model is broken")
    return Answered(
        question=sample["doc"],
        loglikelihoods=values,
        tokens=tuple(one.continuation for one in noted),
        cut=max(one.cut for one in noted),
        merged=any(one.merged for one in noted),
        acc=float(sample["acc"]),
        acc_norm=float(sample["acc_norm"]) if "acc_norm" in sample else None,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval writes a line per cut context, transformers one for long texts; ours are counted and reported."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- numbers --------------------------------------------------------------------------------------------------------


def summarise(answered: Sequence[Answered]) -> dict[str, Any]:
    """The record of one benchmark in evaluation.json; docs/evaluation.md says what each value is."""
    n = len(answered)
    right = [one.chosen == one.question["gold"] for one in answered]
    accuracy = sum(right) / n
    gold = [(one.loglikelihoods[one.question["gold"]], one.tokens[one.question["gold"]]) for one in answered]
    nats = -sum(ll for ll, _ in gold) / sum(tokens for _, tokens in gold)
    norms = [one.acc_norm for one in answered if one.acc_norm is not None]
    subjects: dict[str, list[bool]] = {}
    for one, hit in zip(answered, right, strict=True):
        if one.question["subject"]:
            subjects.setdefault(one.question["subject"], []).append(hit)
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        "accuracy_sum": sum(one.acc for one in answered) / n,
        "accuracy_norm": sum(norms) / n if len(norms) == n else None,
        "random_baseline": sum(1 / len(one.loglikelihoods) for one in answered) / n,
        "perplexity_of_gold": _exp(nats),
        "n": n,
        "rules": sorted({"choices" if "choices" in one.question else "partial" for one in answered}),
        "truncated": sum(one.cut > 0 for one in answered),
        "merged_boundaries": sum(one.merged for one in answered),
        "subjects": {name: {"accuracy": sum(hits) / len(hits), "n": len(hits)} for name, hits in subjects.items()},
    }


def _exp(nats: float) -> float | None:
    """A model that is worse than any vocabulary has a perplexity that no float holds; JSON has no infinity."""
    return math.exp(nats) if nats < 700 else None
