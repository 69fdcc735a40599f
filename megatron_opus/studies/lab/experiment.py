"""Experiments: arms times seeds as ordinary training runs, started as ordinary processes, resumable.

An experiment is a YAML file that states its hypothesis, metric and stopping rule before anything runs; they are
recorded in the experiment's folder with the settings of every run, and neither can be changed afterwards without
another folder. Runs that are finished are kept, interrupted ones resumed, failed ones tried again at the next start.
An arm with `shares_of: ARM` waits for the run of that arm with its seed, and fills its buffers by the domain shares
that the other run has trained on (matched_shares.py): what is left between the two is no mixture.
Where the file has a `start`, all arms of a seed begin with the weights of one run, so that what happens by chance in a
model's first steps is the same for them.

    <output>/<name>/experiment.json      what was announced, and the settings of every run
    <output>/<name>/<arm>-<seed>/        an ordinary run folder
    <output>/<name>/start-<seed>/        where the arms of a seed begin, if the file says so
    <output>/<name>/logs/<arm>-<seed>.txt
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus import config as configs
from megatron_opus.config import RunConfig
from megatron_opus.errors import Refusal
from megatron_opus.files import write_json
from megatron_opus.nested import flatten

RECORD = "experiment.json"
ROOT = Path(__file__).resolve().parents[3]
REQUIRED = ("name", "hypothesis", "metric", "stopping_rule", "recipe", "baseline", "seeds", "arms")
OPTIONAL = ("corpus", "settings", "shared", "clock", "contrasts", "start", "before")
CLOCKS = ("wall", "cpu")
RESERVED = ("name", "output_dir", "seed")  # the laboratory's own
SHARES_OF = "shares_of"  # of an arm: another arm, whose realised domain shares it takes
# a matched arm draws its K sequences as they come: nothing of the mixture is lost to a choice
MATCHED = {"selection.strategy": "random", "selection.rho": 1.0}
START, START_SEEDS = "start", 1000  # a run that arms begin with; its seeds are others, so that its data is too
SINGLE_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CORES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class LabError(Refusal, ValueError):
    """An experiment that is incomplete, or not the one its folder belongs to."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of an experiment: an arm and a seed with the resolved settings."""

    arm: str
    seed: int
    directory: Path
    recipe: Path
    overrides: tuple[str, ...]
    config: RunConfig
    after: PlannedRun | None = None  # the run whose weights it starts from
    shares_of: PlannedRun | None = None  # the run whose realised domain shares it takes

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def waits_for(self) -> tuple[PlannedRun, ...]:
        """The runs that must be finished before this one starts."""
        return tuple(run for run in (self.after, self.shares_of) if run is not None)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One YAML file. `metric`: the validation domains whose mean loss at the end is compared."""

    name: str
    hypothesis: str
    metric: tuple[str, ...]
    stopping_rule: str
    recipe: Path
    corpus: str  # of studies/lab/corpora.py; empty: the recipe's own data
    settings: Mapping[str, Any]  # dotted overrides of the recipe for all arms
    baseline: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]  # name -> dotted overrides
    contrasts: tuple[tuple[str, str], ...]  # arms compared with each other, beside the baseline
    start: Mapping[str, Any]  # dotted overrides, beside `settings`, of a run that all arms of a seed begin with
    shared: Mapping[str, Any]  # metric and settings that replace those above on larger text, whose domains differ
    clock: str  # `wall`, or `cpu`: the seconds a processor worked for a run, which other work beside it leaves alone
    before: Path | None = None  # JSON, arm -> seconds spent for it before its first step, as on scoring its data

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

    def with_matched(self, arm: str) -> Experiment:
        """The same experiment with an arm more: random with the realised shares of `arm`. Raises LabError."""
        if arm not in self.arms or SHARES_OF in self.arms[arm]:
            raise LabError(f"{self.name}: no arm {arm!r} whose shares could be taken; there are {', '.join(self.arms)}")
        name = f"random_matched_{arm}"
        kept = {key: value for key, value in self.arms[arm].items() if not key.startswith("selection.")}
        return dataclasses.replace(
            self,
            arms={**self.arms, name: {**kept, **MATCHED, SHARES_OF: arm}},
            contrasts=(*self.contrasts, (arm, name)),
        )

    def runs(self, folder: Path, data: Path | None) -> list[PlannedRun]:
        """Every run with its resolved settings, seed by seed. `data`: the prepared corpus. Raises ConfigError."""
        planned = []
        for seed in self.seeds:
            start = self._run(START, self.start, seed, folder, data, None) if self.start else None
            of_arm: dict[str, PlannedRun] = {}
            for arm in sorted(self.arms, key=lambda arm: SHARES_OF in self.arms[arm]):  # sorted() keeps the order else
                changes = {key: value for key, value in self.arms[arm].items() if key != SHARES_OF}
                run = self._run(arm, changes, seed, folder, data, start)
                other = self.arms[arm].get(SHARES_OF)
                of_arm[arm] = dataclasses.replace(run, shares_of=None if other is None else of_arm[other])
            planned += [*([start] if start else []), *(of_arm[arm] for arm in self.arms)]
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
    raw = configs.read_yaml(path)

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
    for arm, changes in arms.items():
        other = changes.get(SHARES_OF)
        if other is not None and (other not in arms or other == arm or SHARES_OF in arms[other]):
            raise fail(f"arm {arm}: {SHARES_OF}: expected an arm that takes no shares itself, got {other!r}")
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
        before=Path(raw["before"]) if raw.get("before") else None,
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
    settings = {run.name: _settings(run) for run in runs}
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


def _settings(run: PlannedRun) -> dict[str, Any]:
    """Dotted keys of a run, without where it lies."""
    flat = flatten(configs.to_dict(run.config))
    kept = {k: v for k, v in flat.items() if k not in ("output_dir", "data.path", "data.cache_dir")}
    return kept if run.shares_of is None else {**kept, SHARES_OF: run.shares_of.name}
