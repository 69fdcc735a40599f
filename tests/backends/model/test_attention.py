from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_opus.backends.model.attention import DocumentMask, causal_attention, document_attention

B, S, C = 3, 24, 8
SCALE = 1 / math.sqrt(C)


def inputs(heads: int, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of [S, B, N, C], which is how Megatron holds them."""
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = [(S, B, n, C) for n in (heads, groups, groups)]
    q, k, v = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    return q, k, v


def explicit(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax with the whole s x s matrix, in float64; allowed: [B, S, S] bool."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~allowed[:, None], -math.inf)
    return scores.softmax(-1) @ v


def gradients(out: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [g.double() for g in torch.autograd.grad((out * weight).sum(), tensors)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_explicit_mask(heads: int, groups: int, masked: bool) -> None:
    """A group attending to another group's keys, or a document to the one before it, still gives plausible losses."""
    starts = torch.tensor([[0, 0], [5, 6], [1, 23]])
    ids = (torch.arange(S) >= starts[:, :1]).int() + (torch.arange(S) >= starts[:, 1:]).int()
    allowed = torch.ones(S, S).tril().bool().expand(B, S, S)
    if masked:
        allowed = allowed & (ids[:, :, None] == ids[:, None, :])
    tensors = inputs(heads, groups)
    q, k, v = (x.permute(1, 2, 0, 3) for x in tensors)
    if masked:
        got = document_attention(q, k, v, DocumentMask.from_ids(ids), scale=SCALE)
    else:
        got = causal_attention(q, k, v, scale=SCALE)
    want = explicit(*tensors, allowed)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(got, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_no_s_by_s_matrix(dtype: torch.dtype, heads: int, groups: int) -> None:
    """PyTorch falls back to the s x s kernel without a word; with only the blockwise one allowed, it raises."""
    tensors = inputs(heads, groups, dtype)
    q, k, v = (x.permute(1, 2, 0, 3) for x in tensors)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        out = causal_attention(q, k, v, scale=SCALE)
    assert out.dtype == dtype
    gradients(out, tensors)


def test_document_masks() -> None:
    """An id that comes back would need attention over a gap, which segments cannot give."""
    mask = DocumentMask.from_ids(torch.tensor([[7, 7, 8, 9], [1, 1, 1, 1]]))
    assert mask.lengths == ((2, 1, 1), (4,))
    assert not mask.plain
    with pytest.raises(ValueError, match=r"document_ids\[0\]: expected every id in one contiguous run"):
        DocumentMask.from_ids(torch.tensor([[1, 2, 1]]))
    q, k, v = (x.permute(1, 2, 0, 3) for x in inputs(4, 4))
    with pytest.raises(ValueError, match="expected 3 sequences of 24 tokens"):
        document_attention(q, k, v, mask, scale=SCALE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_kernels_on_cuda(dtype: torch.dtype, dropout: float) -> None:
    """On a GPU the s x s kernel is excluded: every shape that training uses must have a fused one."""
    for heads, groups in ((25, 25), (8, 2)):
        q = torch.randn(2, heads, 64, 64, device="cuda", dtype=dtype, requires_grad=True)
        k, v = (torch.randn(2, groups, 64, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        causal_attention(q, k, v, scale=0.125, dropout=dropout).sum().backward()
