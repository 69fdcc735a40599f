"""Run an experiment: arms times seeds as ordinary training runs, then a table, JSON and pictures.

    megatron-opus experiment configs/lab/noisy.yaml --jobs 2
    megatron-opus experiment configs/lab/noisy.yaml --shared ../shared/data --jobs 2
    megatron-opus experiment configs/lab/noisy.yaml --report-only

The file states hypothesis, metric and stopping rule before anything runs. Interrupt it at will: the same command keeps
the finished runs and resumes the others. Every run is a folder like any other below OUTPUT/NAME.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opus.cli import parser_of

if TYPE_CHECKING:
    from megatron_opus.studies.lab import experiment as lab


def parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = parser_of("experiment", program, __doc__)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/lab"), help="default runs/lab")
    parser.add_argument(
        "--match",
        action="append",
        default=[],
        metavar="ARM",
        help="add an arm: random with the domain shares that ARM has trained on, seed by seed",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each (default 1)")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="make the corpus of larger text in DIR")
    parser.add_argument("--cache-dir", type=Path, default=Path("data"), help="for corpora, default data")
    parser.add_argument("--minutes", type=float, help="end a run that takes longer; it counts as failed")
    parser.add_argument("--report-only", action="store_true", help="start nothing, report on what there is")
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures, which need matplotlib")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1 or arguments.jobs > len(os.sched_getaffinity(0)):
        parser.error(f"--jobs: expected 1 to {len(os.sched_getaffinity(0))}, the cores there are, got {arguments.jobs}")
    return arguments


def corpus(experiment: lab.Experiment, arguments: argparse.Namespace) -> Path | None:
    """The prepared corpus, or None where the recipe's own data is used."""
    if not experiment.corpus:
        return None
    from megatron_opus.studies.lab.corpora import prepare_lab

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of GPU libraries that token files do not need
        from megatron_opus.backends.formats import indexed
    return prepare_lab(
        experiment.corpus, arguments.cache_dir, indexed, shared=arguments.shared, progress=False, log=print
    ).resolve()


def main(argv: Sequence[str], program: str) -> int:
    arguments = parse(argv, program)
    from megatron_opus.studies.lab import experiment as lab
    from megatron_opus.studies.lab import pictures, report, runner

    experiment = lab.read_experiment(arguments.experiment)
    if arguments.shared is not None:
        experiment = experiment.on_shared_text()
    for arm in arguments.match:
        experiment = experiment.with_matched(arm)
    folder = arguments.output / experiment.name
    runs = experiment.runs(folder, corpus(experiment, arguments))
    record = lab.record(experiment, runs, folder)
    if not arguments.report_only:
        runner.run_all(runs, jobs=arguments.jobs, minutes=arguments.minutes, say=lambda text: print(text, flush=True))
    results = report.collect(experiment, runs, record)
    written = report.write(results, folder)
    print("\n" + report.table(results))
    if not arguments.no_pictures:
        written += pictures.draw(report.as_json(results), folder)
    print("\n" + "\n".join(str(path) for path in written))
    return 3 if results.failed else 0
