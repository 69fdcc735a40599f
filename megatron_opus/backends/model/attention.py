"""Causal attention that never forms the s x s matrix, with optional document boundaries.

Legend: S sequence, B batch, N query heads of this rank, G key/value heads of this rank, C channels per head.

Megatron hands query_SBNC, key_SBGC, value_SBGC to `core_attention` and expects [S, B, N * C] back. PyTorch's fused
kernels compute softmax(q k^T / sqrt(C)) v block by block. With document boundaries the same kernel runs once per
contiguous document, which costs less than the whole sequence and needs no mask.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# Every fused CUDA kernel, but not the one that forms the s x s matrix: no kernel at all is an error, not a surprise.
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class DocumentMask:
    """Where the documents of each sequence lie. Travels through Megatron in the place of its attention mask.

    Built once per forward pass: the layers need lengths on the host, and asking the device for them in every layer
    would stall it.
    """

    lengths: tuple[tuple[int, ...], ...]  # per sequence, lengths of its documents in order; each sums to S

    @classmethod
    def from_ids(cls, document_ids: Tensor) -> DocumentMask:
        """From ids [B, S], any integer dtype. Raises ValueError when an id comes back after another one."""
        if document_ids.ndim != 2:
            raise ValueError(f"document_ids: expected shape [B, S], got {list(document_ids.shape)}")
        lengths = []
        for row, ids in enumerate(document_ids.cpu()):
            values, counts = torch.unique_consecutive(ids, return_counts=True)
            if len(torch.unique(values)) != len(values):
                raise ValueError(
                    f"document_ids[{row}]: expected every id in one contiguous run, got {values.tolist()}; number the "
                    "documents of a sequence in order"
                )
            lengths.append(tuple(counts.tolist()))
        return cls(tuple(lengths))

    @property
    def plain(self) -> bool:
        """True when no sequence has a boundary: ordinary causal attention."""
        return all(len(documents) == 1 for documents in self.lengths)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """query_BNSC, key_BGSC, value_BGSC -> [B, N, S, C]; G divides N. Dropout on the CPU forms the s x s matrix."""
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1 and query.is_cuda and query.dtype != torch.float32  # only these kernels group by themselves
    if repeats > 1 and not grouped:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    with sdpa_kernel(_FUSED) if query.is_cuda else contextlib.nullcontext():
        return functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: DocumentMask, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """As `causal_attention`, within each document only. Raises ValueError when the mask is of another shape."""
    batch, _, length, _ = query.shape
    if len(documents.lengths) != batch or any(sum(row) != length for row in documents.lengths):
        raise ValueError(
            f"document mask: expected {batch} sequences of {length} tokens, got "
            f"{[sum(row) for row in documents.lengths]}; build it from the ids of this very batch"
        )
    rows = []
    for b, lengths in enumerate(documents.lengths):
        pieces = zip(*(x[b : b + 1].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        rows.append(torch.cat([causal_attention(*p, scale=scale, dropout=dropout) for p in pieces], dim=2))
    return torch.cat(rows)


class SdpaCoreAttention(MegatronModule):
    """`core_attention` of a Megatron layer over torch.nn.functional.scaled_dot_product_attention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self" or config.context_parallel_size != 1:
            raise ValueError(
                "SdpaCoreAttention: expected causal self-attention without context parallelism, got "
                f"{attn_mask_type}, {attention_type}, context_parallel_size {config.context_parallel_size}"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: DocumentMask | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: DocumentMask | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query_SBNC, key_SBGC, value_SBGC -> [S, B, N * C]. Raises TypeError for a mask of Megatron's kind."""
        if attention_mask is None:
            attention_mask = attention_bias  # the mask's way through recomputed layers, see forward_loss
        if not (attention_mask is None or isinstance(attention_mask, DocumentMask)):
            raise TypeError(
                f"attention_mask: expected None (causal) or a DocumentMask, got {type(attention_mask).__name__}; "
                "call the model through forward_loss"
            )
        if packed_seq_params is not None:
            raise TypeError("SdpaCoreAttention: expected no packed_seq_params")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with _tensor_parallel_rng() if dropout else contextlib.nullcontext():
            if attention_mask is None or attention_mask.plain:
                out = causal_attention(q, k, v, scale=self.scale, dropout=dropout)
            else:
                out = document_attention(q, k, v, attention_mask, scale=self.scale, dropout=dropout)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class TransformerEngineCoreAttention(MegatronModule):
    """Transformer Engine's attention; document boundaries go to PyTorch's, which needs no packed format."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any) -> None:
        super().__init__(config=config)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.fused = TEDotProductAttention(
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **kwargs
        )
        self.documents = SdpaCoreAttention(
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **kwargs
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: DocumentMask | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: DocumentMask | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query_SBNC, key_SBGC, value_SBGC -> [S, B, N * C]."""
        if attention_mask is not None or isinstance(attention_bias, DocumentMask):
            return self.documents(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        return self.fused(
            query,
            key,
            value,
            None,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )


def _tensor_parallel_rng() -> Any:
    """Each tensor-parallel rank holds other heads: their dropout must not draw the same mask."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker().fork()
