"""One run on this rank: its folder, its parts wired together, and how it starts anew or resumes."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.backends.cpu import get_cpu_capability

from megatron_opus import config as configs
from megatron_opus.backends.engines.build import build_engine
from megatron_opus.backends.engines.processes import init_distributed
from megatron_opus.backends.model import extras
from megatron_opus.backends.model.build import build_model, resolve
from megatron_opus.backends.model.parallel import init_parallel
from megatron_opus.backends.model.scored_layers import megatron_layers
from megatron_opus.backends.model.stages import named_parameters
from megatron_opus.config import RunConfig
from megatron_opus.data.buffer import CandidateBuffer
from megatron_opus.data.domain_schedule import domain_schedule
from megatron_opus.data.iterator import SelectedBatchIterator
from megatron_opus.errors import Refusal
from megatron_opus.estimates import fit
from megatron_opus.files import write_text
from megatron_opus.layout.model_layout import ModelLayout, recipe_layout
from megatron_opus.ranks.agreement import check_agreement, environment, together, weight_digests
from megatron_opus.ranks.lost_ranks import Watch, set_timeouts
from megatron_opus.ranks.stopping import StopAgreement
from megatron_opus.runs import checkpoints
from megatron_opus.runs.data import Say, open_corpus
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.scoring.loss_pass import LossPass
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.scoring.verify import gradient_check
from megatron_opus.selection.prefilter import Prefilter
from megatron_opus.selection.strategies import build_strategy, scoring_config
from megatron_opus.training import checkpoint
from megatron_opus.training.driver import SelectionDriver
from megatron_opus.training.loop import TrainingLoop
from megatron_opus.types import Groups
from megatron_opus.weights.initial_weights import load_initial_weights

CONFIG_FILE = "config.yaml"


class RunDirectoryError(Refusal, RuntimeError):
    """The run folder holds another run, or none to resume."""


class Session:
    """Builds everything for one run. Collective. Refuses, before allocating, what cannot run."""

    def __init__(
        self,
        recipe: RunConfig,
        *,
        resume: bool,
        versions: Mapping[str, str],
        say: Say,
        stop_requested: Callable[[], int] = lambda: 0,
        watch: Watch | None = None,
        verify: bool = True,
        verify_data: bool = False,
        trust_checkpoint: bool = False,
        claim: Callable[[Path], str] = lambda run_dir: "",
    ) -> None:
        """Build everything.

        `stop_requested` gives the number of the signal by which this process was asked to stop, 0 for none. `watch` is
        told what this rank is doing. `verify` and `trust_checkpoint` say how a checkpoint is read at resume
        (`checkpoint.load`). The data's files are compared with their manifest by a sample, and whole at a resume with
        `verify`, or with `verify_data`. `claim` takes the run folder for this process, on rank 0, or says why it cannot
        be had.
        """
        self._claim = claim
        self._say = say
        minutes = recipe.training.exit_duration_minutes
        until = None if minutes is None else time.monotonic() + 60 * minutes
        self.run_dir = Path(recipe.output_dir) / recipe.name
        device = init_distributed(recipe.parallel)
        # before anything that could fail on one rank only because its code or settings are other ones
        check_agreement({"version": versions, "environment": environment(), "configuration": configs.to_dict(recipe)})
        # before the data where the vocabulary is known: preparing a corpus for a model that does not fit is a waste
        if recipe.model.vocab_size is not None:
            together(lambda: _check_memory(recipe, say), "comparing the model with the memory of its machine")
        whole, share = verify_data or (resume and verify), (dist.get_rank(), dist.get_world_size())
        corpus = together(lambda: open_corpus(recipe, say, whole=whole, share=share), "opening the data")
        if recipe.selection.scores_gradients:
            # a proxy that is too small is refused here, and not at the step that asks too much of it
            k_p = recipe.selection.proxy_batch_size
            together(lambda: corpus.proxy_ids(0, k_p, recipe.seed), "drawing from the proxy")
        config = together(lambda: resolve(recipe, corpus.tokenizer.vocab_size), "resolving the configuration")
        if recipe.model.vocab_size is None:
            together(lambda: _check_memory(config, say), "comparing the model with the memory of its machine")
        fingerprints = {"data": corpus.fingerprint}
        contents = together(corpus.content_digests, "reading the data")
        check_agreement({"configuration": configs.to_dict(config), "data": {"fingerprint": fingerprints, **contents}})
        groups = init_parallel(config.parallel, seed=config.seed)
        self._check_run_dir(config, resume)
        for name, status, used in extras.report(config.model.attention_backend):
            say(f"{name}: {status}; {used}")
        model = build_model(config)
        if config.model.init_from and not (resume and checkpoint.shared_latest(self.run_dir / "checkpoints")):
            say(load_initial_weights(model, config, groups))
        layout = recipe_layout(config)
        _check_weights(model, layout, groups)
        engine = build_engine(model, config, groups)
        say(f"model: {layout.published_size() / 1e6:.1f}M parameters; {engine.description}, on {device}")
        if config.training.precision == "bf16" and device.type == "cpu" and get_cpu_capability() == "AVX2":
            say("precision: this processor has no instructions for bf16; training.precision=fp32 is much faster")
        buffer = CandidateBuffer(
            corpus,
            config.pool_size,
            config.seed,
            unselected=config.data.unselected,
            schedule=domain_schedule(corpus, config.data, config.training.train_steps),
            max_epochs=config.data.domain_max_epochs,
        )
        # one less: a share may be rounded up to the next sequence
        ceiling = (corpus.sequences("candidates") - 1) / config.pool_size
        strategy = build_strategy(
            config.selection, buffer.domains, buffer.weights, ceiling, config.training.global_batch_size
        )
        scorer, loss_pass = None, None
        if strategy.needs == {"loss"}:
            loss_pass = LossPass(engine.runner(), config.selection, groups=groups, device=device)
        elif strategy.needs:
            runner = engine.runner()
            # one sequence forward and backward, once per start: cheap beside a run with wrong scores
            verified_by, why_not = gradient_check(runner)
            say(
                f"scoring: gradients are not compared with autograd's: {why_not}"
                if verified_by is None
                else "scoring: the first pass compares the gradients of one candidate with autograd's"
            )
            scorer = ScoringPass(
                runner,
                megatron_layers(engine.module, layout, config.selection),
                engine.optimizer_state(),
                scoring_config(config.selection),
                groups=groups,
                device=device,
                verify=verified_by,
            )
        iterator = SelectedBatchIterator(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        prefilter = None
        if config.selection.prefilter.pool_ratio > 1:
            prefilter = Prefilter(config.selection.prefilter, len(buffer.domains))
        self.driver = SelectionDriver(config, groups, corpus, buffer, strategy, scorer, iterator, loss_pass, prefilter)
        self.engine, self.corpus, self.config = engine, corpus, config
        self._fingerprints = fingerprints
        set_timeouts(config.parallel.distributed_timeout_minutes)
        self.loop = TrainingLoop(
            config,
            self.run_dir,
            groups,
            engine,
            corpus,
            self.driver,
            iterator,
            self._save,
            stop=StopAgreement(stop_requested, until, device),
            watch=watch or Watch(),
        )
        if resume:
            self._resume(verify, trust_checkpoint)
        self._write_config()

    def train(self) -> bool:
        """Train to the last step and say where everything is. False: stopped before it, with a checkpoint."""
        t, n, s = self.config.training, self.config.buffer_size, self.config.selection
        ratio = s.prefilter.pool_ratio
        self._say(
            f"run: {self.run_dir}; {t.train_steps} steps, each: {s.strategy} takes {t.global_batch_size} of {n} "
            f"candidates of {self.config.data.seq_length} tokens"
            + (f", which the prefilter picks from {n * ratio}" if ratio > 1 else "")
        )
        row = self.loop.run()
        if self.loop.stopped:
            self._say(
                f"stopped after {self.driver.counters.step} of {t.train_steps} steps: {self.loop.stopped}. "
                f"The checkpoint is in {self.run_dir.resolve()}; --resume goes on from it"
            )
            return False
        losses = row.get("validation_loss", {})
        self._say("final validation loss: " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        self._say(f"config, metrics.jsonl, tensorboard/, ledger/ and checkpoints/ are in {self.run_dir.resolve()}")
        return True

    def _save(self, step: int) -> None:
        checkpoint.save(
            self.engine,
            self.run_dir / "checkpoints",
            step=step,
            state=self.driver.state_dict(),
            config=self.config,
            fingerprints=self._fingerprints,
            keep=self.config.training.keep_checkpoints,
        )

    def _resume(self, verify: bool, trust: bool) -> None:
        directory = checkpoint.shared_latest(self.run_dir / "checkpoints")
        if directory is None:
            self._say(f"no complete checkpoint in {self.run_dir}: killed before its first one, starting from step 0")
            return
        state = checkpoint.load(
            self.engine,
            directory,
            config=self.config,
            fingerprints=self._fingerprints,
            verify=verify,
            trust=trust,
            say=self._say,
        )
        self.driver.load_state_dict(state)
        self._record_changes(directory)
        check_agreement({"step resumed from": self.driver.counters.step})
        self._say(f"resumed from {directory} at step {self.driver.counters.step}")

    def _record_changes(self, directory: Path) -> None:
        """Say and write down which settings of the mixture are others than those of the checkpoint."""
        saved = checkpoints.read_marker(directory)["config"]
        changes = checkpoints.recorded_changes(saved, self.config)
        for key, was, now in changes:
            self._say(f"{key}: was {was!r}, is {now!r} from step {self.driver.counters.step} on")
        if changes and dist.get_rank() == 0:
            with (self.run_dir / checkpoints.CHANGES_FILE).open("a", encoding="utf-8") as stream:
                for key, was, now in changes:
                    row = {"step": self.driver.counters.step, "key": key, "was": was, "now": now}
                    stream.write(json.dumps(row) + "\n")

    def _check_run_dir(self, config: RunConfig, resume: bool) -> None:
        """Refuse to write over another run. Rank 0 looks, all ranks agree."""
        problem = [""]
        if dist.get_rank() == 0 and not (problem := [self._claim(self.run_dir)])[0]:
            exists = (self.run_dir / CONFIG_FILE).exists()
            if config.training.tensorboard and importlib.util.find_spec("tensorboard") is None:
                problem[0] = (
                    "training.tensorboard: expected the package tensorboard, found none; pip install tensorboard, or "
                    "set training.tensorboard=false (metrics.jsonl has the same numbers)"
                )
            elif exists and not resume:
                problem[0] = (
                    f"{self.run_dir} already holds a run: continue it with --resume, or choose another name with "
                    "name=<new name>"
                )
            elif resume and not exists:
                problem[0] = f"--resume: expected a run in {self.run_dir}, found none; leave --resume out to start one"
            elif resume and checkpoints.latest(self.run_dir / "checkpoints") is None:
                problem[0] = self._why_not_start_over(config)
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise RunDirectoryError(problem[0])

    def _why_not_start_over(self, config: RunConfig) -> str:
        """A run without checkpoint may begin again only if it had reached none: its record would be lost otherwise."""
        recorded = configs.to_dict(configs.load(self.run_dir / CONFIG_FILE))
        if different := checkpoints.settings_that_differ(recorded, config):
            lines = "; ".join(f"{key}: {saved!r}, now {now!r}" for key, saved, now in different[:10])
            return f"--resume: {self.run_dir} is a run with other settings: {lines}"
        steps, interval = len(read_metrics(self.run_dir)), recorded["training"]["checkpoint_interval"]
        if interval and steps > interval:
            return (
                f"--resume: {self.run_dir} has recorded {steps} steps with a checkpoint every {interval}, but none is "
                "complete in checkpoints/: is its disk mounted? To start over, choose another name"
            )
        return ""

    def _write_config(self) -> None:
        """The resolved configuration, once everything is built: a refused start leaves no folder behind."""
        if dist.get_rank() == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(self.run_dir / CONFIG_FILE, configs.dump(self.config))


def _check_weights(model: nn.Module, layout: ModelLayout, groups: Groups) -> None:
    """Replicated weights are the same on every rank, shards on the data-parallel ranks that hold the same one."""
    parameters = dict(named_parameters(model))
    apart = {n: p for n, p in parameters.items() if layout.ep_size > 1 and layout[n].expert is not None}
    alike, cut = weight_digests(
        ((n, p) for n, p in parameters.items() if n not in apart),
        lambda name: layout.tp_size > 1 and layout[name].cut is not None,
    )
    stage = f"pipeline stage {groups.pp_rank}" if groups.pp_size > 1 else ""
    experts, _ = weight_digests(apart.items(), lambda name: False)
    check_agreement({"initial weight": experts}, peers=f"expert-parallel rank {groups.ep_rank} {stage}".strip())
    check_agreement({"initial weight": alike}, peers=stage)
    check_agreement({"initial weight": cut}, peers=f"tensor-parallel rank {groups.tp_rank} {stage}".strip())


def _check_memory(config: RunConfig, say: Say) -> None:
    for line in fit.start_up_report(config, dist.get_world_size()):
        say(line)
