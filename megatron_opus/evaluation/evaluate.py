"""One evaluation: export, benchmarks, perplexity per domain, evaluation.json. tools/evaluate.py is its command line."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opus.backends.formats import indexed
from megatron_opus.config import DataConfig, RunConfig
from megatron_opus.data.benchmarks.items import PAPER, canonical_name, digest, load_benchmark
from megatron_opus.data.corpus import Corpus
from megatron_opus.evaluation import harness
from megatron_opus.evaluation.exports import Exported, export
from megatron_opus.evaluation.perplexity import domain_perplexity
from megatron_opus.evaluation.prompts import EvaluationError, Question, questions
from megatron_opus.files import write_json
from megatron_opus.runs.data import open_corpus
from megatron_opus.runs.metrics import read_metrics

FORMAT = 1
FILE_NAME = "evaluation.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated and how. `run_dir` or `model`, not both."""

    run_dir: Path | None = None
    model: Path | None = None  # an exported model
    checkpoint: int | None = None  # step; None: the newest
    benchmarks: tuple[tuple[str, Path], ...] = ()  # (name, file); a name may come with several files
    fewshot: tuple[tuple[str, Path], ...] = ()  # where the examples of num_fewshot come from
    num_fewshot: int = 0
    limit: int | None = None  # questions per benchmark
    perplexity: bool = True
    data: Path | None = None  # prepared data for a `model`; a run has its own
    eval_sequences: int | None = None  # per validation domain; None: the run's training.eval_sequences; 0: all
    batch_size: int = 8
    device: str = "auto"
    skip_too_long: bool = False  # leave out questions with an answer that the model cannot read at once, and count them
    max_length: int | None = None  # tokens that the model reads at once; None: see docs/evaluation.md
    tokenizer: Path | None = None
    tasks_dir: Path | None = None  # keep lm-eval's task files here
    output: Path | None = None


def evaluate(settings: Settings, say: Say = lambda text: None) -> dict[str, Any]:
    """Evaluate and write evaluation.json; its contents (docs/evaluation.md has the schema).

    Everything that can be refused without the model is refused first. Raises EvaluationError, BenchmarkError and what
    export and corpus raise.
    """
    started = time.monotonic()
    _check(settings)
    device = _device(settings.device)
    asked = _questions(settings.benchmarks, settings.limit)
    shown = _questions(settings.fewshot, None)
    if settings.num_fewshot and (missing := sorted(asked.keys() - shown.keys())):
        raise EvaluationError(
            f"--num-fewshot {settings.num_fewshot}: no examples for {', '.join(missing)}; name their training file by "
            "--fewshot NAME=FILE (examples out of the evaluated questions would give answers away)"
        )
    output = _output(settings)
    exported = export(settings.run_dir, settings.checkpoint, tokenizer=settings.tokenizer, say=say) if (
        settings.run_dir
    ) else None  # fmt: skip
    directory = exported.directory if exported else settings.model
    assert directory is not None
    max_length = settings.max_length or (_trained_length(exported.config) if exported else None)
    with harness.offline(), harness.quiet():
        lm = None
        if asked:
            lm = harness.load_model(directory, device=device, batch_size=settings.batch_size, max_length=max_length)
        corpus = _corpus(settings, exported, max_length, say) if settings.perplexity else None
        if corpus is not None and lm is not None:
            _check_tokenizer(lm, corpus, directory)
        results = _benchmarks(lm, asked, shown, settings, say) if lm is not None else {}
        domains = _perplexity(lm, directory, device, corpus, settings, exported, say) if corpus else {}
    record = {
        "format": FORMAT,
        "model": str(directory),
        "run": str(settings.run_dir) if settings.run_dir else None,
        "checkpoint": exported.checkpoint.name if exported else None,
        "step": exported.step if exported else None,
        "benchmarks": results,
        "average": _average(results, tuple(results)),
        "average_of": sorted(results),
        "in_domain_average": _average(results, PAPER),
        "perplexity": domains,
        "settings": {
            "num_fewshot": settings.num_fewshot,
            "limit": settings.limit,
            "batch_size": settings.batch_size,
            "device": device,
            "max_length": lm.max_length if lm is not None else max_length,
            "dtype": str(lm.model.dtype).removeprefix("torch.") if lm is not None else None,
        },
        "lm_eval_version": importlib.metadata.version("lm_eval") if lm is not None else None,
        "transformers_version": importlib.metadata.version("transformers"),
        "seconds": round(time.monotonic() - started, 1),
    }
    _keep(output)
    write_json(output, record)
    say(f"written to {output}")
    return record


# --- before the model -----------------------------------------------------------------------------------------------


def _check(settings: Settings) -> None:
    if (settings.run_dir is None) == (settings.model is None):
        raise EvaluationError("expected a run folder or --model DIR, got " + ("both" if settings.model else "neither"))
    if settings.run_dir is not None and not settings.run_dir.is_dir():
        raise EvaluationError(f"{settings.run_dir}: no such run folder")
    if settings.model is not None and settings.checkpoint is not None:
        raise EvaluationError("--checkpoint is of a run folder; --model DIR has one set of weights")
    if settings.model is not None and not (settings.model / "config.json").is_file():
        raise EvaluationError(f"{settings.model}: expected a Hugging Face model, found no config.json")
    if settings.run_dir is not None and settings.data is not None:
        raise EvaluationError("--data is for --model DIR; a run is evaluated on the data that it was trained on")
    for name, value, least in (
        ("--batch-size", settings.batch_size, 1),
        ("--limit", settings.limit, 1),
        ("--max-length", settings.max_length, 2),
        ("--num-fewshot", settings.num_fewshot, 0),
        ("--eval-sequences", settings.eval_sequences, 0),
    ):
        if value is not None and value < least:
            raise EvaluationError(f"{name}: expected at least {least}, got {value}")
    if settings.benchmarks:
        harness.require_lm_eval()
    elif not settings.perplexity or (settings.model is not None and settings.data is None):
        raise EvaluationError("nothing to evaluate: name --benchmarks NAME=FILE ..., or --data DIR for perplexity")


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"--device {asked}: torch sees no GPU here; use --device cpu")
    return asked


def _questions(files: Sequence[tuple[str, Path]], limit: int | None) -> dict[str, _Asked]:
    items: dict[str, list[Any]] = {}
    paths: dict[str, list[str]] = {}
    for name, path in files:
        benchmark = canonical_name(name)
        items.setdefault(benchmark, []).extend(load_benchmark(benchmark, path))
        paths.setdefault(benchmark, []).append(str(path))
    return {
        name: _Asked(questions=questions(found, limit), files=paths[name], digest=digest(found), of=len(found))
        for name, found in items.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Asked:
    questions: list[Question]
    files: list[str]
    digest: str
    of: int  # questions in the files


def _output(settings: Settings) -> Path:
    output = settings.output or ((settings.run_dir or Path()) / FILE_NAME)
    if not output.parent.is_dir():
        raise EvaluationError(f"--output {output}: there is no directory {output.parent}")
    return output


def _keep(output: Path) -> None:
    """An earlier evaluation stays, under the first free number."""
    if not output.exists():
        return
    number = 1
    while (old := output.with_name(f"{output.stem}.{number}{output.suffix}")).exists():
        number += 1
    output.rename(old)


def _trained_length(config: RunConfig) -> int | None:
    """Learned positions beyond the training length were never trained, whatever the model has room for."""
    return config.data.seq_length if config.model.position_embedding_type == "learned_absolute" else None


# --- with the model -------------------------------------------------------------------------------------------------


def _benchmarks(
    lm: Any, asked: Mapping[str, _Asked], shown: Mapping[str, _Asked], settings: Settings, say: Say
) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        folder = settings.tasks_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="opus-eval-")))
        tasks = []
        kept = {name: one.questions for name, one in asked.items()}
        if settings.skip_too_long:
            kept = {name: [q for q in found if harness.fits(lm, q)] for name, found in kept.items()}
        for name, found in kept.items():
            examples = shown[name].questions if settings.num_fewshot else []
            if not found:
                raise EvaluationError(f"{name}: no question has answers of at most {lm.max_length} tokens")
            tasks += harness.write_task(folder, name, found, examples, settings.num_fewshot)
        say(f"{sum(map(len, kept.values())):,} questions of {', '.join(asked)}")
        answered = harness.run_tasks(lm, tasks)
    return {
        name: {
            **harness.summarise(answered[name]),
            "too_long": len(one.questions) - len(kept[name]),
            "n_in_files": one.of,
            "files": one.files,
            "items_sha256": one.digest,
        }
        for name, one in asked.items()
    }


def _corpus(settings: Settings, exported: Exported | None, max_length: int | None, say: Say) -> Corpus | None:
    if exported is None:
        if settings.data is None:
            return None
        if max_length is None:
            raise EvaluationError("--data without a run needs --max-length N: the length of its sequences, in tokens")
        return Corpus.open(settings.data, DataConfig(seq_length=max_length), indexed.open_documents)
    corpus = open_corpus(exported.config, lambda text: None)
    trained = exported.marker["fingerprints"]["data"]
    if corpus.fingerprint != trained:
        raise EvaluationError(
            f"{exported.config.data.path}: expected the data that the run was trained on (fingerprint {trained[:16]}), "
            f"found {corpus.fingerprint[:16]}; restore it, or leave the perplexities out with --no-perplexity"
        )
    return corpus


def _check_tokenizer(lm: Any, corpus: Corpus, directory: Path) -> None:
    """The model must be given the ids that it was trained on."""
    for name in corpus.domains["validation"]:
        for number in corpus.validation_ids(name, 4).tolist():
            text = corpus.text(number)
            if lm.tokenizer.encode(text, add_special_tokens=False) != corpus.tokenizer.encode(text):
                raise EvaluationError(
                    f"{directory}: its tokenizer gives other ids than the corpus's for a text of {name} "
                    f"({text[:60]!r}...); name the right one by --tokenizer DIR"
                )


def _perplexity(
    lm: Any,
    directory: Path,
    device: str,
    corpus: Corpus,
    settings: Settings,
    exported: Exported | None,
    say: Say,
) -> dict[str, dict[str, Any]]:
    model: Any
    if lm is not None:
        model = lm.model
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        model.to(torch.device(device))
    count = settings.eval_sequences
    if count is None:
        count = exported.config.training.eval_sequences if exported else 0
    found = domain_perplexity(model, corpus, sequences=count or None, batch_size=settings.batch_size, say=say)
    if exported is not None and settings.run_dir is not None and count == exported.config.training.eval_sequences:
        for name, loss in _trainers_loss(settings.run_dir, exported.step).items():
            if name in found:
                found[name]["trainer_loss"] = loss
    return found


def _trainers_loss(run_dir: Path, step: int) -> dict[str, float]:
    """Validation losses that the trainer itself wrote after this step; empty where it did not evaluate then."""
    rows = [row for row in read_metrics(run_dir) if row["step"] == step - 1]
    return rows[-1].get("validation_loss") or {} if rows else {}


# --- for people -----------------------------------------------------------------------------------------------------


def _average(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float | None:
    if not names or not all(name in results for name in names):
        return None
    return sum(results[name]["accuracy"] for name in names) / len(names)


def table_row(name: str, result: Mapping[str, Any]) -> str:
    """One line: accuracy and its standard error, chance, lm-eval's two accuracies, in per cent."""

    def percent(value: float | None) -> str:
        return "    -" if value is None else f"{100 * value:5.1f}"

    notes = [f"{result[key]} {text}" for key, text in _NOTES if result[key]]
    return (
        f"{name:<16} {percent(result['accuracy'])} ± {percent(result['stderr']).strip():<4} "
        f"chance {percent(result['random_baseline'])}  sum {percent(result['accuracy_sum'])}  "
        f"norm {percent(result['accuracy_norm'])}  n {result['n']}" + (f"  ({'; '.join(notes)})" if notes else "")
    )


_NOTES = (
    ("too_long", "left out for an answer that does not fit"),
    ("truncated", "with a context that did not fit and was cut on its left"),
    ("merged_boundaries", "where tokens cross from the context into a choice"),
)


def summary(record: Mapping[str, Any]) -> str:
    """The whole evaluation as a table."""
    lines = [table_row(name, result) for name, result in record["benchmarks"].items()]
    if record["average"] is not None:
        lines.append(f"{'average':<16} {100 * record['average']:5.1f} of {len(record['benchmarks'])} benchmarks")
    for name, one in record["perplexity"].items():
        shown = "inf" if one["perplexity"] is None else f"{one['perplexity']:.2f}"
        trainer = f"  (the trainer's: {one['trainer_loss']:.4f})" if one.get("trainer_loss") is not None else ""
        lines.append(f"{name:<16} loss {one['loss']:.4f}  perplexity {shown}  over {one['tokens']:,} tokens{trainer}")
    return "\n".join(lines)
