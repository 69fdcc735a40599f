"""The utility that OPUS gives to candidates, at a frozen checkpoint, for every document of a corpus.

    G(z)    gradient of the mean loss of document z        g_V   mean gradient of the proxy's windows
    score   <P G(z), g_V>                                  P     the optimizer's frozen multiplier
            <P G(z), g_V> / ||P G(z)||                     with `normalise`

The gradient of a document is the mean of those of its windows, weighted by their predicted tokens. So are the scores,
and the norm is that of the mean, from the inner products of the windows: sqrt(w' K w). The scores are exact up to the
optimizer's multiplier, which is separable for AdamW; the norms are sketched (8,192 numbers).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opus.api import build_scorer
from megatron_opus.backends.engines.build import build_engine
from megatron_opus.backends.formats.torch_files import load_plain, pickles_below, refuse_code
from megatron_opus.backends.model.build import build_model
from megatron_opus.backends.model.scored_layers import megatron_layers
from megatron_opus.config import (
    Geometry,
    OptimizerConfig,
    PreconditionerConfig,
    RunConfig,
    SelectionConfig,
    SketchConfig,
)
from megatron_opus.corpus_scores.documents import PROXY, Block, CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.model_losses import MODEL_BLOCK, MODEL_PIECE
from megatron_opus.corpus_scores.reference_model import (
    Precision,
    ReferenceModel,
    Windowing,
    Windows,
    batch_of,
    check_tokenizer,
    newest,
    one_process,
    reading_identity,
)
from megatron_opus.corpus_scores.scorer import DocumentScorer, Say, target_identity
from megatron_opus.data.permutation import key, permute
from megatron_opus.runs import checkpoints
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.scoring.verify import gradient_check
from megatron_opus.types import Batch, Fragment, Hyper, MuonHyper, OptimizerState
from megatron_opus.weights.sources import checkpoint_config

_TOGETHER = 32  # windows of one scoring pass, all of a document in one of them
_MICRO = 8
_NEVER = 10**9  # steps until a frozen proxy and a frozen preconditioner are read again


class Opus(DocumentScorer):
    """The utility of a document for the coming update toward a proxy, averaged over frozen checkpoints.

    geometry: `auto` takes the optimizer state of a checkpoint of ours, of its own optimizer; `sgd` compares plain
    gradients, and is what weights without optimizer state need. normalise: divide by the norm of the update.
    proxy_windows: how many windows of the target the proxy's gradient is of, drawn with `seed`.
    """

    name = "opus"
    piece_tokens, block_tokens = MODEL_PIECE, MODEL_BLOCK

    def __init__(
        self,
        models: list[Path],
        target: Sequence[str] = (PROXY,),
        *,
        geometry: Geometry = "auto",
        normalise: bool = False,
        proxy_windows: int = 64,
        windowing: Windowing | None = None,
        precision: Precision = "fp32",
        seed: int = 0,
        say: Say = print,
    ) -> None:
        if not models:
            raise ScoreError("opus: expected a checkpoint, got none (--model DIR)")
        if proxy_windows < 1:
            raise ScoreError(f"opus: expected at least one window of the proxy (--proxy-windows), got {proxy_windows}")
        self._paths, self._target, self._geometry = models, tuple(target) or (PROXY,), geometry
        self._normalise, self._proxy_windows, self._seed = normalise, proxy_windows, seed
        self._windowing, self._precision, self._say = windowing or Windowing(), precision, say
        self._passes: list[ScoringPass] = []
        self._proxy: Batch | None = None

    def identity(self) -> dict[str, Any]:
        return {
            **reading_identity(self._paths, self._windowing, self._precision),
            "target": target_identity(self._target),
            "geometry": self._geometry,
            "normalise": self._normalise,
            "proxy_windows": self._proxy_windows,
            "seed": self._seed,
        }

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        config = SelectionConfig(
            score_length=self._windowing.tokens,
            score_micro_batch_size=_MICRO,
            proxy_refresh_every=_NEVER,
            preconditioner=PreconditionerConfig(kind=self._geometry, refresh_every=_NEVER),
            sketch=SketchConfig(alignment="direction"),  # the proxy stays: its direction is formed once
        )
        self._passes = [self._pass(path, corpus, config) for path in self._paths]
        self._proxy = batch_of(self._proxy_of(corpus))

    def score(self, block: Block) -> np.ndarray:
        windows = Windows.of(block, self._windowing)
        lengths = np.array([len(ids) - 1 for ids in windows.ids], dtype=np.float64)
        found = np.full(len(block), np.nan)
        for rows in _groups(windows, lengths):
            owners = windows.owners[rows]
            weights = lengths[rows] / np.bincount(owners, lengths[rows])[owners]
            per_model = [self._windows_scores(scorer, windows, rows, owners, weights) for scorer in self._passes]
            for document in np.unique(owners):
                found[document] = np.mean([scores[document] for scores in per_model])
        return found

    def _windows_scores(
        self, scorer: ScoringPass, windows: Windows, rows: np.ndarray, owners: np.ndarray, weights: np.ndarray
    ) -> dict[int, float]:
        """Return document -> score under one model."""
        assert self._proxy is not None
        batch = batch_of([windows.ids[row] for row in rows])
        signals = scorer(batch, self._proxy, interaction=self._normalise)
        assert signals.alignment is not None
        align = signals.alignment.double().numpy()
        found = {}
        for document in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == document)
            value = float(weights[mine] @ align[mine])
            if signals.interaction is not None:
                inner = signals.interaction.double().numpy()[np.ix_(mine, mine)]
                norm = float(np.sqrt(max(weights[mine] @ inner @ weights[mine], 0.0)))
                value = value / norm if norm > 0 else np.nan
            found[document] = value
        return found

    def _proxy_of(self, corpus: CorpusDocuments) -> list[np.ndarray]:
        """Draw the windows of the target of which the proxy's gradient is the mean."""
        every = [ids for block in corpus.target(self._target) for ids in Windows.of(block, self._windowing).ids]
        if not every:
            raise ScoreError("opus: expected documents of at least two tokens in the target, found none")
        count = min(self._proxy_windows, len(every))
        places = permute(np.arange(count), len(every), key("proxy windows", self._seed))
        return [every[place] for place in np.sort(places).tolist()]

    # --- models -----------------------------------------------------------------------------------------------------

    def _pass(self, path: Path, corpus: CorpusDocuments, config: SelectionConfig) -> ScoringPass:
        found = newest(path)
        if (found / checkpoints.MARKER).is_file() and self._geometry != "sgd":
            return self._with_optimizer(found, corpus, config)
        if self._geometry != "sgd":
            raise ScoreError(
                f"{path}: expected a checkpoint with optimizer state for geometry {self._geometry}, found weights "
                "alone; compare plain gradients with --geometry sgd"
            )
        model = ReferenceModel(path, self._windowing, self._precision)
        model.check_corpus(corpus)
        self._say(f"{path}: plain gradients (geometry sgd)")
        optimizer = torch.optim.SGD(model.module.parameters(), lr=1.0)
        return build_scorer(model.module, optimizer, config=config, device=model.device)

    def _with_optimizer(self, path: Path, corpus: CorpusDocuments, config: SelectionConfig) -> ScoringPass:
        """Bring a checkpoint back as its run had it: weights, and the state of its optimizer."""
        device, groups = one_process()
        recipe, marker = checkpoint_config(path)
        check_tokenizer(path, recipe.model, corpus)
        _check_readable(path, recipe, marker, self._windowing)
        checkpoints.verify_contents(path, marker)
        refuse_code(pickles_below(path / "engine"))
        engine = build_engine(build_model(recipe), recipe, groups)
        moment = path / "moment_00000.pt"
        engine.load(path, load_plain(moment) if moment.is_file() else None)
        engine.module.eval()
        self._say(f"{path}: the state of {recipe.optimizer.name} at step {marker['step']}")
        runner = engine.runner()
        return ScoringPass(
            runner,
            megatron_layers(engine.module, selection=config),
            AtLargestRate(engine.optimizer_state(), recipe.optimizer),
            config,
            groups=groups,
            device=device,
            verify=gradient_check(runner)[0],
        )


class AtLargestRate:
    """An optimizer's state with the largest learning rates of its recipe in the place of the coming step's.

    At the end of a schedule the coming rate may be 0, which would give every document the score 0. Between matrices of
    one optimizer a rate changes nothing; between Muon's and AdamW's their ratio is kept over the whole schedule.
    """

    def __init__(self, state: OptimizerState, optimizer: OptimizerConfig) -> None:
        self._state, self._optimizer = state, optimizer
        self.sharded_over_dp = state.sharded_over_dp

    def hypers(self, weights: Sequence[torch.nn.Parameter], geometry: Geometry = "auto") -> list[Hyper]:
        o = self._optimizer
        found = self._state.hypers(weights, geometry)
        return [replace(h, lr=o.muon_lr if isinstance(h, MuonHyper) else o.lr) for h in found]

    def second_moment(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return self._state.second_moment(weight)

    def momentum(self, weight: torch.nn.Parameter) -> Sequence[Fragment]:
        return self._state.momentum(weight)


def _check_readable(path: Path, recipe: RunConfig, marker: dict[str, Any], windowing: Windowing) -> None:
    """Refuse a checkpoint whose optimizer state one process cannot read, or whose model has fewer positions."""
    if marker["layout"]["world_size"] != 1:
        raise ScoreError(
            f"{path}: expected a checkpoint of one process, whose optimizer state another one can read, found one of "
            f"{marker['layout']['world_size']}; compare plain gradients with --geometry sgd, which reads the weights "
            "of any number"
        )
    positions = recipe.model.max_position_embeddings or recipe.data.seq_length
    if windowing.tokens > positions:
        raise ScoreError(
            f"{path}: expected windows of at most the model's {positions} positions, got {windowing.tokens}; lower "
            "--window"
        )


def _groups(windows: Windows, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield [windows] int64 numbers of windows that are scored together: whole documents of similar lengths."""
    bounds = np.searchsorted(windows.owners, np.arange(windows.documents + 1))
    longest = [lengths[a:b].max() if a < b else 0 for a, b in itertools.pairwise(bounds)]
    group: list[int] = []
    for document in sorted(range(windows.documents), key=lambda i: (longest[i], i)):
        mine = range(int(bounds[document]), int(bounds[document + 1]))
        if group and len(group) + len(mine) > _TOGETHER:
            yield np.array(group)
            group = []
        group += mine
    if group:
        yield np.array(group)
