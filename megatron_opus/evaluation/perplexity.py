"""Perplexity per domain: the validation sequences that the trainer evaluates, through the exported model.

The windows, positions and counted tokens are those of data/corpus.py, so the loss must be the trainer's own.

    x_BL tokens, y_BL labels, m_BL 1 where a token counts -> loss = sum(m * -log p(y | x)) / sum(m), nats per token
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_opus.data.corpus import Corpus
from megatron_opus.evaluation.prompts import EvaluationError
from megatron_opus.types import Batch


def domain_perplexity(
    model: Any,
    corpus: Corpus,
    *,
    sequences: int | None,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Validation domain -> loss (nats per token), perplexity, tokens and sequences that were counted.

    sequences: the first so many of each domain; None: all. Raises EvaluationError for tokens that the model has not,
    and for a loss that is not a number.
    """
    largest, size = corpus.tokenizer.vocab_size, int(model.config.vocab_size)
    if largest > size:
        raise EvaluationError(
            f"the data's tokenizer has {largest} tokens, the model {size}: it was trained with another one"
        )
    found: dict[str, dict[str, Any]] = {}
    for name in corpus.domains["validation"]:
        ids = corpus.validation_ids(name, sequences if sequences is not None else corpus.num_sequences)
        total, tokens = 0.0, 0
        for start in range(0, len(ids), batch_size):
            batch = corpus.batch(ids[start : start + batch_size])
            losses = token_losses(model, batch)
            counted = batch.loss_mask.to(losses.device) != 0
            total += losses[counted].double().sum().item()
            tokens += int(counted.sum())
        if not tokens or not math.isfinite(total):
            raise EvaluationError(f"validation domain {name}: loss {total} over {tokens} tokens; nothing to report")
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else None
        found[name] = {"loss": loss, "perplexity": perplexity, "tokens": tokens, "sequences": len(ids)}
        say(f"{name}: loss {loss:.4f} over {tokens:,} tokens")
    return found


@torch.no_grad()
def token_losses(model: Any, batch: Batch) -> Tensor:
    """[B, L] float32 nats, on the model's device."""
    batch = batch.to(model.device)
    documents = batch.document_ids
    if documents is None and not bool((batch.position_ids[:, 1:] > batch.position_ids[:, :-1]).all()):
        # transformers takes positions that start again for documents that must not see each other
        documents = torch.zeros_like(batch.tokens)
    mask = None if documents is None else _same_document(documents, model.dtype)
    logits = model(
        input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
    ).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


def _same_document(document_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] -> [B, 1, L, L], 0 where a position may look and the lowest number where not."""
    length = document_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_BL.device).tril()
    allowed = causal & (document_BL[:, :, None] == document_BL[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=document_BL.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
