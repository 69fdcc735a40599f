"""NAG (arXiv 2604.15706): which neurons of a frozen model a document activates, against those of a target.

    impact    I_lk(z) = mean over the tokens of z of |h_l . W_l[k]|     h_l: input of the MLP of layer l, W_l: its `up`
    graph     G_l(z)  = the K neurons of layer l with the largest impact                           matrix (not `gate`)
    profile   p_l(k)  = share of neuron k among all neurons of the target documents' G_l, sums to 1 in each layer
    score     mean over the layers of  sum of p_l(k), k in G_l(z)                                             0 to 1

So formulated in the authors' code, which reads the first 120 tokens of a document and takes K = 20. Here a document is
read as by every scorer with a model: in windows whose last token is only predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.config.dimensions import ffn_size
from megatron_opus.corpus_scores.documents import PROXY, Block, CorpusDocuments, ScoreError
from megatron_opus.corpus_scores.model_losses import MODEL_BLOCK, MODEL_PIECE
from megatron_opus.corpus_scores.reference_model import (
    Precision,
    ReferenceModel,
    Windowing,
    Windows,
    open_models,
    reading_identity,
)
from megatron_opus.corpus_scores.scorer import LearningScorer, target_identity

_UP = ".mlp.linear_fc1"


class NeuronGraph(LearningScorer):
    """The overlap of a document's most activated neurons with those of a target, averaged over the models.

    neurons: K, how many of each layer are in a graph.
    """

    name = "nag"
    piece_tokens, block_tokens = MODEL_PIECE, MODEL_BLOCK

    def __init__(
        self,
        models: list[Path],
        target: Sequence[str] = (PROXY,),
        *,
        neurons: int = 20,
        windowing: Windowing | None = None,
        precision: Precision = "fp32",
    ) -> None:
        if not models:
            raise ScoreError("nag: expected a model, got none (--model DIR)")
        if neurons < 1:
            raise ScoreError(f"nag: expected at least one neuron of each layer (--neurons), got {neurons}")
        self._paths, self._target, self._neurons = models, tuple(target) or (PROXY,), neurons
        self._windowing, self._precision = windowing or Windowing(), precision
        self._models: list[ReferenceModel] = []
        self._profiles: list[np.ndarray] = []

    def identity(self) -> dict[str, Any]:
        return {
            **reading_identity(self._paths, self._windowing, self._precision),
            "target": target_identity(self._target),
            "neurons": self._neurons,
        }

    def prepare(self, corpus: CorpusDocuments, directory: Path, part: tuple[int, int]) -> None:
        self._models = open_models(self._paths, self._windowing, self._precision, corpus)
        super().prepare(corpus, directory, part)

    def learn(self, corpus: CorpusDocuments) -> dict[str, np.ndarray]:
        counts: list[np.ndarray | int] = [0] * len(self._models)
        for block in corpus.target(self._target):
            for i, model in enumerate(self._models):
                counts[i] = counts[i] + self._graphs(model, block)[0].sum(0)
        if not np.any(counts[0]):
            raise ScoreError("nag: expected documents of at least two tokens in the target, found none")
        return {f"profile_{i}": c / c.sum(-1, keepdims=True) for i, c in enumerate(map(np.asarray, counts))}

    def use(self, learned: Mapping[str, np.ndarray]) -> None:
        self._profiles = [learned[f"profile_{i}"] for i in range(len(self._models))]

    def score(self, block: Block) -> np.ndarray:
        found = np.zeros(len(block))
        for model, profile in zip(self._models, self._profiles, strict=True):
            graphs, known = self._graphs(model, block)
            found += np.where(known, np.einsum("dlk,lk->d", graphs, profile) / len(profile), np.nan)
        return found / len(self._models)

    def _graphs(self, model: ReferenceModel, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return ([documents, layers, neurons] bool: is in the graph, [documents] bool: was read at all)."""
        windows = Windows.of(block, self._windowing)
        known = np.bincount(windows.owners, minlength=len(block)) > 0
        impact = document_impacts(model, windows)
        width = impact.shape[-1]
        if self._neurons > width:
            raise ScoreError(
                f"{model.path}: expected graphs of at most the {width} neurons of a layer (--neurons), got "
                f"{self._neurons}"
            )
        top = impact.topk(self._neurons, dim=-1).indices
        graphs = torch.zeros(impact.shape, dtype=torch.bool).scatter_(-1, top, value=True)
        return graphs.numpy() & known[:, None, None], known


@torch.no_grad()
def document_impacts(model: ReferenceModel, windows: Windows) -> Tensor:
    """Return [documents, layers, neurons] float32: the sum of |h . W| over each document's tokens.

    The sum ranks the neurons of a document as the mean does. Raises ScoreError for a model without dense MLPs.
    """
    found: Tensor | None = None
    with _up_products(model) as products:
        for rows, batch in model.batches(windows):
            forward_loss(model.module, batch)
            mask = batch.loss_mask.T[:, :, None]  # [tokens, windows, 1], as Megatron lays out activations
            impact = torch.stack([(p.float().abs() * mask).sum(0) for p in products], dim=1).cpu()
            products.clear()
            if found is None:
                found = torch.zeros(windows.documents, *impact.shape[1:])
            found.index_add_(0, torch.from_numpy(windows.owners[rows]), impact)
    if found is None:  # no document of this block is long enough
        return torch.zeros(windows.documents, model.shape.num_layers, ffn_size(model.shape))
    return found


@contextmanager
def _up_products(model: ReferenceModel) -> Iterator[list[Tensor]]:
    """Yield a list to which every forward pass appends each layer's product with `up` [tokens, windows, neurons]."""
    layers = [module for name, module in model.module.named_modules() if name.endswith(_UP)]
    if len(layers) != model.shape.num_layers:
        raise ScoreError(
            f"{model.path}: expected an MLP in each of {model.shape.num_layers} layers, found {len(layers)}; nag knows "
            "no experts, take a dense model"
        )
    products: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: tuple[Tensor, Any]) -> None:
        whole = output[0]
        products.append(whole.chunk(2, dim=-1)[1] if model.shape.swiglu else whole)  # gate over up

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()
