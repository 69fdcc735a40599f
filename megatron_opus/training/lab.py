"""Experiments: arms times seeds as ordinary training runs, started as ordinary processes, resumable.

An experiment is a YAML file that states its hypothesis, metric and stopping rule before anything runs; they are
recorded in the experiment's folder with the settings of every run, and neither can be changed afterwards without
another folder. Runs that are finished are kept, interrupted ones resumed, failed ones tried again at the next start.
A run that another experiment in the same output directory has made, with the same settings, data and source code, is
copied instead of made again: arms such as the baseline are common to many. Where the file has a `start`, all arms of a
seed begin with the weights of one run, so that what happens by chance in a model's first steps is the same for them.

    <output>/<name>/experiment.json      what was announced, and the settings of every run
    <output>/<name>/<arm>-<seed>/        an ordinary run folder
    <output>/<name>/start-<seed>/        where the arms of a seed begin, if the file says so
    <output>/<name>/<arm>-<seed>/lab.json   what it was made by; where it was copied from
    <output>/<name>/logs/<arm>-<seed>.txt
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus import config as configs
from megatron_opus import schema
from megatron_opus.config import RunConfig
from megatron_opus.data.files import write_json
from megatron_opus.training.metrics import read_metrics

RECORD = "experiment.json"
MADE_BY = "lab.json"  # in a finished run's folder
ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("name", "hypothesis", "metric", "stopping_rule", "recipe", "baseline", "seeds", "arms")
OPTIONAL = ("corpus", "settings", "shared", "clock", "contrasts", "start")
CLOCKS = ("wall", "cpu")
RESERVED = ("name", "output_dir", "seed")  # the laboratory's own
START, START_SEEDS = "start", 1000  # a run that arms begin with; its seeds are others, so that its data is too
SINGLE_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CORES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class LabError(ValueError):
    """An experiment that is incomplete, or not the one its folder belongs to."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    arm: str
    seed: int
    directory: Path
    recipe: Path
    overrides: tuple[str, ...]
    config: RunConfig
    after: PlannedRun | None = None  # the run whose weights it starts from

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One YAML file. `metric`: the validation domains whose mean loss at the end is compared."""

    name: str
    hypothesis: str
    metric: tuple[str, ...]
    stopping_rule: str
    recipe: Path
    corpus: str  # of data/lab_corpora.py; empty: the recipe's own data
    settings: Mapping[str, Any]  # dotted overrides of the recipe for all arms
    baseline: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]  # name -> dotted overrides
    contrasts: tuple[tuple[str, str], ...]  # arms compared with each other, beside the baseline
    start: Mapping[str, Any]  # dotted overrides, beside `settings`, of a run that all arms of a seed begin with
    shared: Mapping[str, Any]  # metric and settings that replace those above on larger text, whose domains differ
    clock: str  # `wall`, or `cpu`: the seconds a processor worked for a run, which other work beside it leaves alone

    def on_shared_text(self) -> Experiment:
        """The same experiment on the larger text: another name, its own metric and settings. Raises LabError."""
        if not self.shared:
            raise LabError(f"{self.name}: no `shared` section says metric and settings for other text")
        return dataclasses.replace(
            self,
            name=f"{self.name}_shared",
            metric=tuple(self.shared["metric"]),
            settings={**self.settings, **self.shared["settings"]},
        )

    def runs(self, folder: Path, data: Path | None) -> list[PlannedRun]:
        """Every run with its resolved settings, seed by seed. `data`: the prepared corpus. Raises ConfigError."""
        planned = []
        for seed in self.seeds:
            start = self._run(START, self.start, seed, folder, data, None) if self.start else None
            planned += [start] if start else []
            planned += [self._run(arm, changes, seed, folder, data, start) for arm, changes in self.arms.items()]
        return planned

    def _run(
        self, arm: str, changes: Mapping[str, Any], seed: int, folder: Path, data: Path | None, after: PlannedRun | None
    ) -> PlannedRun:
        directory = folder / f"{arm}-{seed}"
        values = {**self.settings, **changes, "name": directory.name, "output_dir": str(folder)}
        values["seed"] = seed + (START_SEEDS if arm == START else 0)
        if data is not None:
            values["data.path"] = str(data)
        if after is not None:
            values["model.init_from"] = str(after.directory)
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
        config = configs.load(self.recipe, overrides)
        configs.validate_world(config, 1)
        return PlannedRun(
            arm=arm,
            seed=seed,
            directory=directory,
            recipe=self.recipe,
            overrides=overrides,
            config=config,
            after=after,
        )


def read_experiment(path: Path) -> Experiment:
    """Raises LabError or ConfigError naming the file, the key, what was expected and what was found."""
    raw = schema.read_yaml(path)

    def fail(message: str) -> LabError:
        return LabError(f"{path}: {message}")

    for key in raw:
        if key not in (*REQUIRED, *OPTIONAL):
            close = difflib.get_close_matches(str(key), (*REQUIRED, *OPTIONAL), n=1)
            raise fail(f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))
    for key in REQUIRED:
        if raw.get(key) in (None, "", [], {}):
            raise fail(f"{key} is missing; an experiment says {', '.join(REQUIRED)} before it runs")
    for key in ("name", "hypothesis", "stopping_rule", "recipe", "baseline"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise fail(f"{key}: expected text, got {raw[key]!r}")
    metric, seeds, arms = raw["metric"], raw["seeds"], raw["arms"]
    if not isinstance(metric, list) or not all(isinstance(m, str) for m in metric):
        raise fail(f"metric: expected a list of validation domains, got {metric!r}")
    if not isinstance(seeds, list) or not all(isinstance(s, int) for s in seeds) or len({*seeds}) < len(seeds):
        raise fail(f"seeds: expected a list of different whole numbers, got {seeds!r}")
    settings, start = raw.get("settings") or {}, raw.get("start") or {}
    if not isinstance(settings, dict) or not isinstance(arms, dict):
        raise fail("settings, arms: expected mappings of dotted keys of the recipe")
    if START in arms:
        raise fail(f"arms: {START} is the name of the run that arms begin with; choose another")
    for arm, changes in {"settings": settings, START: start, **arms}.items():
        if not isinstance(changes, dict):
            raise fail(f"arm {arm}: expected dotted keys and values, got {changes!r}")
        for key in changes:
            if key in RESERVED or (key in ("data", "data.path") and raw.get("corpus")):
                raise fail(f"{arm}: {key} is set by the laboratory, leave it out")
    shared = raw.get("shared") or {}
    if shared and (not isinstance(shared, dict) or {*shared} != {"metric", "settings"} or not raw.get("corpus")):
        raise fail("shared: expected metric and settings, beside a corpus")
    clock = raw.get("clock", "wall")
    if clock not in CLOCKS:
        raise fail(f"clock: expected one of {', '.join(CLOCKS)}, got {clock!r}")
    if raw["baseline"] not in arms:
        raise fail(f"baseline: expected one of the arms {', '.join(arms)}, got {raw['baseline']!r}")
    contrasts = raw.get("contrasts") or []
    for pair in contrasts:
        if not isinstance(pair, list) or len({*pair} & {*arms}) != 2 or len(pair) != 2:
            raise fail(f"contrasts: expected pairs of two different arms, [arm, other], got {pair!r}")
    return Experiment(
        name=raw["name"],
        hypothesis=raw["hypothesis"].strip(),
        metric=tuple(metric),
        stopping_rule=raw["stopping_rule"].strip(),
        recipe=(path.parent / raw["recipe"]).resolve(),
        corpus=raw.get("corpus") or "",
        settings=settings,
        baseline=raw["baseline"],
        seeds=tuple(seeds),
        arms=arms,
        start=start,
        contrasts=tuple((arm, other) for arm, other in contrasts),
        shared=shared,
        clock=clock,
    )


def record(experiment: Experiment, runs: Sequence[PlannedRun], folder: Path) -> dict[str, Any]:
    """Announce the experiment in its folder, or check that it is the one announced there. Raises LabError.

    Arms, seeds and contrasts may be added; the report says which were. What was announced may not change.
    """
    path = folder / RECORD
    announced = {
        "name": experiment.name,
        "hypothesis": experiment.hypothesis,
        "metric": list(experiment.metric),
        "stopping_rule": experiment.stopping_rule,
        "baseline": experiment.baseline,
        "clock": experiment.clock,
    }
    settings = {run.name: _settings(run.config) for run in runs}
    contrasts = [f"{arm} minus {other}" for arm, other in experiment.contrasts]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = {**announced, "contrasts": contrasts, "added_later": [], "runs": settings}
        write_json(path, made)
        return made
    old = json.loads(path.read_text(encoding="utf-8"))
    for key, value in announced.items():
        if old.get(key, "wall") != value:
            raise LabError(
                f"{path}: the {key} was announced as {old[key]!r}, now it is {value!r}; what was announced before the "
                "runs stands: choose another --output for another experiment"
            )
    for name, values in settings.items():
        before = old["runs"].get(name)
        if before is not None and before != values:
            changed = sorted(k for k in {*before, *values} if before.get(k) != values.get(k))
            raise LabError(
                f"{path}: {name} was planned with {changed[0]} = {before.get(changed[0])!r}, now "
                f"{values.get(changed[0])!r} ({len(changed)} keys differ); name the arm differently or choose another "
                "--output"
            )
    known = old.get("contrasts", [])
    new = [contrast for contrast in contrasts if contrast not in known]
    added = [*(name for name in settings if name not in old["runs"]), *new]
    made = {
        **old,
        "contrasts": [*known, *new],
        "added_later": [*old["added_later"], *added],
        "runs": {**old["runs"], **settings},
    }
    if added:
        write_json(path, made)
    return made


def _settings(config: RunConfig) -> dict[str, Any]:
    """Dotted keys of a run, without where it lies."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", configs.to_dict(config))
    return {k: v for k, v in flat.items() if k not in ("output_dir", "data.path", "data.cache_dir")}


def steps_done(run: PlannedRun) -> int:
    rows = read_metrics(run.directory)
    return rows[-1]["step"] + 1 if rows else 0


def is_finished(run: PlannedRun) -> bool:
    """A start is finished when its last weights are saved, which is after its last step is recorded."""
    rows, steps = read_metrics(run.directory), run.config.training.train_steps
    saved = run.arm != START or any(run.directory.glob(f"checkpoints/step_{steps:08d}*/complete.json"))
    return saved and bool(rows) and rows[-1]["step"] + 1 >= steps and "validation_loss" in rows[-1]


def why_unfinished(run: PlannedRun) -> str:
    """One line for the report; empty for a finished run."""
    if is_finished(run):
        return ""
    log = log_of(run)
    if not log.exists():
        blocked = run.after is not None and not is_finished(run.after)
        return "not started: the run it starts from is not finished" if blocked else "not started"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    at = f"at step {steps_done(run)} of {run.config.training.train_steps}"
    errors = [line for line in lines if line.startswith(("error:", "experiment:"))]
    return f"{at}: {errors[-1] if errors else (lines[-1] if lines else 'no output')}"


def log_of(run: PlannedRun) -> Path:
    return run.directory.parent / "logs" / f"{run.name}.txt"


def run_all(
    runs: Sequence[PlannedRun],
    *,
    jobs: int,
    say: Callable[[str], object],
    minutes: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Bring every run to its end, `jobs` processes of one core at a time; a failing run does not stop the others.

    minutes: a run that takes longer is ended and counts as failed (it would resume at the next start). All processes
    are ended when this function is left, however.
    """
    waiting = [run for run in runs if not is_finished(run)]
    kept = len(runs) - len(waiting)
    if kept:
        say(f"{kept} of {len(runs)} runs are finished and kept")
    source = source_of_package()
    whole: set[str] = set()  # runs that this call makes from their first step: a resumed one may be of two sources
    active: list[tuple[PlannedRun, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or active:
            while len(active) < jobs:
                run = next((r for r in waiting if r.after is None or is_finished(r.after)), None)
                if run is None:
                    break
                waiting.remove(run)
                twin = find_twin(run, source)
                if twin is not None:
                    copy_run(twin, run)
                    say(f"{run.name}: copied from {twin}, the same run")
                    continue
                if not run.directory.exists():
                    whole.add(run.name)
                say(f"{run.name}: {'resumes' if (run.directory / 'config.yaml').exists() else 'starts'}")
                active.append((run, _start(run, environment or {}), time.monotonic()))
            if not active:  # what is left waits for a run that failed
                break
            time.sleep(0.2)
            for entry in list(active):
                run, process, began = entry
                if process.poll() is None:
                    if minutes is None or time.monotonic() - began < 60 * minutes:
                        continue
                    process.kill()
                    process.wait()
                    with log_of(run).open("a", encoding="utf-8") as log:
                        log.write(f"experiment: ended after {minutes:g} minutes\n")
                active.remove(entry)
                took = time.monotonic() - began
                problem = why_unfinished(run)
                if not problem and run.name in whole:
                    write_json(run.directory / MADE_BY, {"source": source})
                say(f"{run.name}: " + (f"FAILED {problem}" if problem else f"finished in {took:.0f} s"))
    finally:
        for _, process, _ in active:
            process.kill()
            process.wait()


def source_of_package() -> str:
    from megatron_opus.training.agreement import source_hash  # imports torch, which a report does without

    return source_hash(ROOT / "megatron_opus")


def find_twin(run: PlannedRun, source: str) -> Path | None:
    """A finished run of another experiment beside this one with the same settings, data and source code."""
    if run.directory.exists() or run.arm == START:  # begun: it is resumed. A start is copied without its weights.
        return None
    wanted = {**_settings(run.config), "name": None}
    for path in sorted(run.directory.parent.parent.glob(f"*/*-{run.seed}/{MADE_BY}")):
        folder = path.parent
        made = json.loads(path.read_text(encoding="utf-8"))
        # as planned: config.yaml also has what the run filled in
        planned = json.loads((folder.parent / RECORD).read_text(encoding="utf-8"))["runs"].get(folder.name)
        data = configs.load(folder / "config.yaml").data.path
        same = planned is not None and {**planned, "name": None} == wanted
        if same and made["source"] == source and data == run.config.data.path:
            return folder
    return None


def copy_run(twin: Path, run: PlannedRun) -> None:
    """The twin's record without its checkpoints; a copy that is cut short is not taken for a run."""
    unfinished = run.directory.with_name(f".{run.name}.copy")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(twin, unfinished, ignore=shutil.ignore_patterns("checkpoints"))
    made = json.loads((unfinished / MADE_BY).read_text(encoding="utf-8"))
    write_json(unfinished / MADE_BY, {**made, "copied_from": made.get("copied_from", str(twin))})
    unfinished.rename(run.directory)


def _start(run: PlannedRun, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if k not in SINGLE_PROCESS}
    path = os.pathsep.join(p for p in (str(ROOT), inherited.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-m", "megatron_opus.training", str(run.recipe), *run.overrides]
    if (run.directory / "config.yaml").exists():
        command.append("--resume")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(log_of(run).open("wb"))
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **CORES, "PYTHONPATH": path, **environment},
        )
