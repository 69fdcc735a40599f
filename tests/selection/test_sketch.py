from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opus.config import SketchConfig
from megatron_opus.selection import hashing
from megatron_opus.selection.precondition import compose, project
from megatron_opus.selection.sketch import build_sketch, two_sided_shape
from megatron_opus.types import Ranges

OPERATORS = ["materialise", "two_sided", "two_stage"]


def make(operator, seed=42, dim=256, d_out=24, d_in=40, rows=None, cols=None, name="layer"):
    return build_sketch(
        SketchConfig(operator=operator, dim=dim, seed=seed, intermediate_dim=4 * dim),
        name=name,
        d_out=d_out,
        d_in=d_in,
        rows=rows or ((0, d_out),),
        cols=cols or ((0, d_in),),
    )


def apply(sketch, a, b, rows=None, cols=None, multiplier=None):
    """Features with the diagonal or dense sides of a preconditioner composed into the projections."""
    kept, projected = project(a, compose(cols, sketch.cols)), project(b, compose(rows, sketch.rows))
    return sketch.features(kept, projected, multiplier)


def factors(size=3, tokens=7, d_out=24, d_in=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, tokens, d_in, generator=g), torch.randn(size, tokens, d_out, generator=g)


def cut(ranges: Ranges) -> torch.Tensor:
    return torch.cat([torch.arange(s, s + n) for s, n in ranges])


@st.composite
def sharding(draw, size):
    """Pieces of 0..size-1 dealt to 2 to 4 shards, in a shuffled order: rows of a shard need not be contiguous."""
    points = sorted(draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=7)))
    pieces = [(a, b - a) for a, b in zip([0, *points], [*points, size], strict=True)]
    order = draw(st.permutations(pieces))
    shards = draw(st.integers(2, 4))
    return [tuple(order[i::shards]) for i in range(shards) if order[i::shards]]


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_shards_add_up(operator, data):
    """Fault: hashes by local size and layer order (defect 6 of the reference) make another sharding another sketch.

    Tolerance: float32 sums in another order, 280 products of order 1 each.
    """
    a, b = factors()
    row, col = torch.rand(24) + 0.5, torch.rand(40) + 0.5
    whole = apply(make(operator), a, b, row, col)
    by_rows = data.draw(st.booleans())
    total = torch.zeros_like(whole)
    for ranges in data.draw(sharding(24 if by_rows else 40)):
        index = cut(ranges)
        if by_rows:
            total += apply(make(operator, rows=ranges), a, b[..., index], row[index], col)
        else:
            total += apply(make(operator, cols=ranges), a[..., index], b, row, col[index])
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_unbiased_over_seeds(operator):
    """Fault: a correlated sign or bucket hash biases every inner product; no single seed would show it.

    The mean over 400 seeds must lie within 4 standard errors of the true value.
    """
    a, b = factors(size=2, seed=1)
    g = torch.bmm(b.transpose(1, 2), a).flatten(1)
    truth = float(g[0] @ g[1])
    values = []
    for seed in range(400):
        features = apply(make(operator, seed=seed), a, b)
        values.append(float(features[0] @ features[1]))
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - truth) < 4 * error


@pytest.mark.parametrize("operator", OPERATORS)
def test_variance_falls_as_one_over_m(operator):
    """Fault: hash values that repeat with a short period waste buckets, and more of them do not help.

    From m to 4m the variance over 300 seeds must fall by 4 within the band a ratio of two such estimates has (x 1.6).
    For two_sided both factors double: its leading terms are 1/m1 + 1/m2, so on full-rank matrices it falls by 2 to 4;
    two_stage adds such a term of its wider sides.
    """
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 60, 64, generator=g), torch.randn(2, 60, 64, generator=g)
    variance = []
    for dim in (64, 256):
        values = []
        for seed in range(300):
            features = apply(make(operator, seed=seed, dim=dim, d_out=64, d_in=64), a, b)
            values.append(float(features[0] @ features[1]))
        variance.append(torch.tensor(values, dtype=torch.float64).var().item())
    ratio = variance[0] / variance[1]
    low, high = (2 / 1.6, 6 * 1.6) if operator.startswith("two_") else (4 / 1.6, 4 * 1.6)
    assert low < ratio < high


def test_two_sided_is_exact_with_room_for_all():
    """Fault: collisions although there are more buckets than indices."""
    a, b = factors(d_out=6, d_in=5)
    features = apply(make("two_sided", dim=4096, d_out=6, d_in=5), a, b)
    g = torch.bmm(b.transpose(1, 2), a).flatten(1)
    torch.testing.assert_close(features @ features.T, g @ g.T, rtol=1e-5, atol=1e-4)


def test_count_sketch_applies_an_exact_multiplier():
    """Fault: the exact preconditioner applied to the wrong row chunk. Compared through a hash-free sum of squares."""
    a, b = factors(size=1)
    multiplier = torch.rand(24, 40) + 0.5
    sketch = make("materialise", dim=2**20)  # so wide that 960 entries hardly collide
    features = apply(sketch, a, b, multiplier=multiplier)
    truth = multiplier * torch.bmm(b.transpose(1, 2), a)[0]
    torch.testing.assert_close(features.square().sum(), truth.square().sum(), rtol=1e-3, atol=0)


def test_row_chunks_do_not_change_the_sketch(monkeypatch):
    """Fault: hashes indexed by the row inside a chunk instead of the global row."""
    from megatron_opus.selection import sketch as module

    a, b = factors()
    whole = apply(make("materialise"), a, b)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 3 * 40 * 5)  # five rows at a time
    torch.testing.assert_close(apply(make("materialise"), a, b), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["two_sided", "two_stage"])
def test_only_materialise_takes_an_exact_preconditioner(operator):
    """Fault: silently sketching with the identity where the preconditioner cannot be applied."""
    a, b = factors()
    with pytest.raises(TypeError, match="materialise"):
        apply(make(operator), a, b, multiplier=torch.ones(24, 40))


@pytest.mark.parametrize("operator", OPERATORS)
def test_dense_sides_are_applied_to_the_gradient(operator):
    """Fault: Muon's multiplier on the wrong side, or transposed. Sketching L G R through the factors' projections is
    sketching the materialised L G R, given as a product of its own."""
    a, b = factors()
    g = torch.Generator().manual_seed(5)
    left, right = torch.randn(24, 24, generator=g), torch.randn(40, 40, generator=g)
    left, right = left + left.T, right + right.T
    whole = torch.bmm(b.transpose(1, 2), a)
    product = left @ whole @ right
    # one token per row of the matrix: a = the rows of L G R, b = unit vectors
    explicit = apply(make(operator), product, torch.eye(24).expand(len(a), 24, 24))
    torch.testing.assert_close(apply(make(operator), a, b, left, right), explicit, rtol=1e-3, atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**14), st.integers(1, 5000), st.integers(1, 5000))
def test_two_sided_shape_fits(dim, d_out, d_in):
    """Fault: more numbers than asked for, or a side with more buckets than indices."""
    m_out, m_in = two_sided_shape(dim, d_out, d_in)
    assert 1 <= m_out <= d_out
    assert 1 <= m_in <= d_in
    assert m_out * m_in <= dim


def test_hashes_are_stable_and_balanced():
    """Fault: a hash that depends on the process (PYTHONHASHSEED) or the torch version breaks every stored sketch."""
    assert hashing.layer_key(42, "decoder.layers.0.mlp.linear_fc1", "row") == -1399362562897004334
    h = hashing.mix(0, torch.arange(3))
    assert h.tolist() == [0, -2152535657050944081, 7960286522194355700]
    found = hashing.balanced_buckets(7, torch.arange(100), 8)
    assert set(torch.bincount(found, minlength=8).tolist()) <= {12, 13}
    assert len(set(found[:8].tolist())) == 8
    assert hashing.balanced_buckets(7, torch.arange(5), 8).unique().numel() == 5
    assert abs(hashing.signs(hashing.mix(1, torch.arange(10000))).mean()) < 0.05


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sums_of_slices_are_the_product_with_the_dense_matrix(data):
    """Fault: a slice put into the wrong buckets where a shard begins or ends inside a block, or blocks that wrap."""
    from megatron_opus.selection.precondition import Buckets, project
    from megatron_opus.selection.sketch import side_sketch

    size, count = data.draw(st.integers(2, 90)), data.draw(st.integers(1, 40))
    for ranges in data.draw(sharding(size)):
        side = side_sketch(3, "layer", "row", size, count, ranges)
        assert isinstance(side, Buckets)
        x = torch.randn(2, 5, len(cut(ranges)), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(project(x, side), x @ side.dense(), rtol=1e-5, atol=1e-5)
        assert (side.dense().abs().sum(1) == 1).all()
