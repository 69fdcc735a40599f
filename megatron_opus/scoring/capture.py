"""Ghost factors: what each scored layer saw (a) and the gradient of its output (b), reduced on the spot.

Per tensor-parallel rank, sequence parallel off (on: the token dimension of the scattered factor is s / tp, and the
*projected* factor is gathered, a few numbers per token instead of d):

    layer                   a              b               part of G
    ColumnParallelLinear    [s, B, in]     [s, B, out/tp]  rows of this rank, all columns
    RowParallelLinear       [s, B, in/tp]  [s, B, out]     all rows, columns of this rank
    nn.Linear               [B, s, in]     [B, s, out]     everything
    VocabParallelEmbedding  ids [B, s]     [B, s, h]       rows of this rank, all columns
    nn.Embedding            ids [B, s]     [B, s, h]       everything
    Conv1D (transformers)   [B, s, in]     [B, s, out]     everything, stored [in, out]
    an expert               [rows, in]     [rows, out]     everything, of the tokens that were sent to it
    router, shared gate     [s/tp, B, in]  [s/tp, B, out]  everything, of this rank's tokens

The rows of an expert are tokens of several sequences in any order, under expert parallelism also of other ranks'.
Its `routing` says which sequence each of them belongs to. An expert without any token has no row, and adds nothing.

An embedding is a linear layer whose sides have changed places: its *row* factor is one-hot(ids), and its column factor
is the gradient of its output. The sides of a weight stored [in, out] have changed places too: its row factor is the
layer's input. Plans call the column factor a and the row factor b.

A forward hook projects a and puts a tensor hook on the output. The tensor hook projects b, adds what projections.py
says to the pass's sums and drops both factors. Weights are frozen during the pass, so no weight gradient is computed;
the output of a layer whose input needs no gradient becomes a leaf, which is where the backward pass stops. What
activation checkpointing runs a second time, inside the backward pass, is not counted again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_opus.errors import Refusal
from megatron_opus.scoring.collectives import Traffic, all_gather
from megatron_opus.scoring.preconditioners import Preconditioners
from megatron_opus.scoring.projections import Part
from megatron_opus.scoring.sums import Reading, Sums, by_sequence
from megatron_opus.selection.precondition import Buckets, Projection, project
from megatron_opus.types import Groups, Routing, ScoredLayer


class CaptureError(Refusal, RuntimeError):
    """A scored layer did not give its factors: scores without it would be silently wrong."""


class Capture:
    """Hold hooks on the scored layers for one micro-batch (a context manager)."""

    def __init__(
        self,
        layers: Sequence[ScoredLayer],
        matrix_of: Sequence[int],
        reading: Reading,
        preconditioners: Preconditioners,
        sums: Sums,
        groups: Groups,
        traffic: Traffic,
    ) -> None:
        self.leaves: list[Tensor] = []
        self._layers, self._matrix_of, self._reading = layers, matrix_of, reading
        self._preconditioners, self._sums = preconditioners, sums
        self._groups, self._traffic = groups, traffic
        self._forward_calls = [0] * len(layers)
        self._backward_calls = [0] * len(layers)
        self._without_gradient = [0] * len(layers)  # forward calls under no_grad that no call with a graph followed
        self._handles: list[RemovableHandle] = []
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        # what follows tokens must look at a layer's routing before the experts are called
        for routing in self._routings():
            self._opened.enter_context(routing.observed(self._reading.shape[0], self._reading.share))
        for index, layer in enumerate(self._layers):
            if layer.shown is not None:
                self._opened.enter_context(layer.shown())
            self._handles.append(layer.module.register_forward_hook(self._make_forward_hook(index), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._opened.close()
        if self._reading.candidate and kind is None:
            for number, routing in enumerate(self._routings()):
                self._sums.add_load(number, self._reading.first, routing.load())
        self.leaves.clear()

    def _routings(self) -> list[Routing]:
        return list({id(x.routing): x.routing for x in self._layers if x.routing is not None}.values())

    @property
    def observing(self) -> bool:
        return bool(self._handles)

    def check(self) -> None:
        """Raise CaptureError unless every layer was seen forward and backward equally often, at least once."""
        for index, layer in enumerate(self._layers):
            forward, backward = self._forward_calls[index], self._backward_calls[index]
            if forward == backward and (forward or layer.routing is not None):
                continue  # an expert to which no token was sent may never be called
            if self._without_gradient[index]:
                cause = (
                    "it runs under torch.no_grad() inside the model's forward pass, so that no gradient reaches it; a "
                    "reentrant activation checkpoint of a library of its own does that too: switch it off for scoring"
                )
            elif not forward:
                cause = (
                    "the forward pass never calls the module: it is skipped, or other code uses its weight directly; "
                    "leave it out (build_scorer's `wanted`, or requires_grad=False)"
                )
            else:
                cause = (
                    "its output, or a part of its calls, does not influence the loss (detached, or not used); leave it "
                    "out (build_scorer's `wanted`, or requires_grad=False)"
                )
            raise CaptureError(
                f"layer {layer.name}: expected its input and its output gradient equally often, got {forward} forward "
                f"and {backward} backward calls: {cause}"
            )

    def _make_forward_hook(self, index: int) -> Callable[..., Any]:
        layer = self._layers[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                # the first half of reentrant activation checkpointing, which runs again, inside the backward pass
                self._without_gradient[index] += 1
                return None
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise CaptureError(
                    f"layer {layer.name}: expected to run on whole batches, found it inside of a transform of "
                    "torch.func (vmap, grad), which hides them; call it outside, or leave it out (`wanted`)"
                )
            out = output[0] if isinstance(output, tuple) else output
            given = args[0] if args else next(iter(kwargs.values()))
            if layer.input_of is not None:
                with torch.no_grad():
                    given = layer.input_of(given.detach())
            needs_leaf = not out.requires_grad
            if inside_backward():
                if not self._without_gradient[index]:
                    # activations computed again: their graph must be the first one's, but nothing flows back in it
                    return _with_first(output, out.detach().requires_grad_().clone()) if needs_leaf else None
                self._without_gradient[index] -= 1
            if needs_leaf:
                leaf = out.detach().requires_grad_()
                self.leaves.append(leaf)
                out = leaf.clone()  # an in-place activation may follow, which a leaf does not allow
            self._forward_calls[index] += 1
            self._sums.epsilon = max(self._sums.epsilon, torch.finfo(out.dtype).eps)
            kept: list[Tensor] = []
            if not layer.replicated or layer.own_tokens or self._groups.tp_rank == 0:
                with torch.no_grad():
                    if layer.embedding:
                        kept = [self._by_sequence(given.detach()[..., None], layer, "input")[..., 0]]
                    elif layer.routing is not None:
                        x = given.detach()
                        kept = [_sequences(layer, x)]
                        kept += [project(x, _first(part, layer)) for part in self._parts_of(index)]
                    else:
                        x = self._by_sequence(given.detach(), layer, "input")
                        kept = [
                            self._projected(x, part, _first(part, layer), layer, layer.input_scattered)
                            for part in self._parts_of(index)
                        ]
            _before_changes_in_place(module, out).register_hook(self._make_gradient_hook(index, kept, out.shape))
            return _with_first(output, out) if needs_leaf else None

        return hook

    def _make_gradient_hook(self, index: int, kept: list[Tensor], shape: torch.Size) -> Callable[[Tensor], None]:
        """Make the hook of one layer's output gradient, which is read in the output's `shape`.

        kept holds one tensor for each part, or an embedding's ids. It is empty on ranks that do not count this layer.
        """
        layer = self._layers[index]

        def hook(grad: Tensor) -> None:
            self._backward_calls[index] += 1
            if not kept:
                return
            # autocast would add up in low precision what is float32 here
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                # autograd keeps this hook until the whole graph is gone: what it closes over must not keep the factors
                forward = list(kept)
                kept.clear()
                grad = grad.reshape(shape)
                if layer.routing is not None:
                    for part, a in zip(self._parts_of(index), forward[1:], strict=True):
                        b = project(grad, _second(part, layer))
                        self._reduce_rows(index, part, *((b, a) if layer.transposed else (a, b)), forward[0])
                    return
                grad = self._by_sequence(grad, layer, "output")
                if layer.embedding:
                    self._read_embedding(index, forward[0], grad)
                    return
                forward.reverse()
                for part in self._parts_of(index):
                    factor = self._projected(grad, part, _second(part, layer), layer, layer.output_scattered)
                    a, b = (factor, forward.pop()) if layer.transposed else (forward.pop(), factor)
                    self._reduce(index, part, a, b)

        return hook

    def _by_sequence(self, x: Tensor, layer: ScoredLayer, side: str) -> Tensor:
        """Bring a factor [.., d] into [B, tokens, d], or leave Megatron's [tokens, B, d]; no values move.

        Raises CaptureError where the batch is not where it should be: its sequences could not be told apart.
        """
        size, length = self._reading.shape
        if layer.sequence_first and (not layer.embedding or side == "output"):
            if x.dim() == 3 and x.shape[1] == size:
                return x
            expected = f"[tokens, {size}, features]"
        else:
            if x.dim() >= 2 and x.shape[0] == size:
                return x if x.dim() == 3 else x.reshape(size, -1, x.shape[-1])
            if x.dim() == 2 and x.shape[0] == size * length:
                return x.view(size, length, -1)
            expected = f"[{size}, tokens, features]"
        shape = list(x.shape[:-1] if layer.embedding and side == "input" else x.shape)
        raise CaptureError(
            f"layer {layer.name}: expected an {side} of shape {expected} for {size} sequences of {length} tokens, got "
            f"{shape}; the sequences of a batch cannot be told apart in it (time-major, broadcast over the batch, or "
            "routed tokens): score one sequence at a time (selection.score_micro_batch_size=1), or leave the layer out "
            "(build_scorer's `wanted`)"
        )

    def _read_embedding(self, index: int, ids_BT: Tensor, grad: Tensor) -> None:
        layer = self._layers[index]
        start, rows = layer.rows[0]
        local_BT = ids_BT - start
        mine = ((local_BT >= 0) & (local_BT < rows))[..., None]
        padding = getattr(layer.module, "padding_idx", None)
        if padding is not None:  # nn.Embedding gives the row of this id no gradient
            mine &= (ids_BT != padding)[..., None]
        local_BT = local_BT.clamp(0, rows - 1)
        for part in self._parts_of(index):
            kept = self._projected(grad, part, part.kept, layer, layer.output_scattered)
            if part.projected is not None:
                rows_VW = part.projected.dense() if isinstance(part.projected, Buckets) else part.projected
                self._reduce(index, part, kept, torch.where(mine, rows_VW[local_BT], 0.0).to(kept.dtype))
            else:  # one-hot rows: add each token's factor to the row of its id
                total = torch.zeros(rows, kept.shape[-1], dtype=torch.float32, device=kept.device)
                masked = torch.where(mine, kept.float(), 0.0)
                self._add_gradient(index, total.index_add_(0, local_BT.flatten(), masked.flatten(0, 1)))

    def _parts_of(self, index: int) -> Sequence[Part]:
        return self._reading.parts[self._matrix_of[index]]

    def _projected(self, x: Tensor, part: Part, projection: Projection, layer: ScoredLayer, scattered: bool) -> Tensor:
        """Project activations to [B, T, w], in the order in which they lie, so that nothing large is copied.

        Scattered tokens are gathered after the projection, which makes them small. They are gathered before it where
        the projection is this rank's own.
        """
        dim = 0 if layer.sequence_first else 1
        if scattered and part.own:
            x = all_gather(x, self._groups.tp, self._traffic, dim)
        x = project(x, projection)
        if scattered and not part.own:
            x = all_gather(x, self._groups.tp, self._traffic, dim)
        return x.transpose(0, 1) if layer.sequence_first else x

    def _reduce(self, index: int, part: Part, kept: Tensor, projected: Tensor) -> None:
        matrix, sums = self._matrix_of[index], self._sums
        if part.probe:
            z = self._reading.probed
            product = projected[z].float().mT @ kept[z].float()
            sums.probes[matrix] = product + sums.probes[matrix] if matrix in sums.probes else product
            return
        if part.gradient:
            # a sum over all tokens, in whatever order they lie: transposed back, nothing is copied
            order = (1, 0) if self._layers[index].sequence_first else (0, 1)
            a_NI, b_NO = (x.permute(*order, 2).flatten(0, 1).float() for x in (kept, projected))
            self._add_gradient(index, b_NO.mT @ a_NI)
            return
        if not self._reading.candidate:
            # the proxy gradient is a sum over sequences: one long sequence of all their tokens
            assert part.operator is not None
            one = (x.reshape(1, -1, x.shape[-1]) for x in (kept, projected))
            sums.psi[sums.columns(matrix)].add_(part.operator.features(*one)[0])
            return
        first = self._reading.share * sums.n + self._reading.first
        rows = slice(first, first + len(kept))
        kappa = self._preconditioners.kappa(matrix)
        a, b = part.widths or ((0, 0) if part.operator is None else (kept.shape[-1], projected.shape[-1]))
        if part.operator is not None:
            multiplier = self._preconditioners.multiplier(matrix)
            phi = part.operator.features(kept[..., :a], projected[..., :b], multiplier)
            sums.phi[rows, sums.columns(matrix)].add_(phi, alpha=kappa)
        if part.aligned:
            # sum over tokens and columns in float32, over layers in float64
            dots = torch.linalg.vecdot(*_apart(part, kept[..., a:], projected[..., b:])).sum(1)
            sums.align[rows, part.column : part.column + part.alignments].add_(dots, alpha=kappa)

    def _reduce_rows(self, index: int, part: Part, kept: Tensor, projected: Tensor, sequences: Tensor) -> None:
        """Reduce the factors [rows, w] of an expert, whose rows belong to `sequences` [rows] of the micro-batch."""
        matrix, sums, reading = self._matrix_of[index], self._sums, self._reading
        if part.probe:
            mine = sequences == reading.share * reading.shape[0] + reading.probed
            product = projected[mine].float().mT @ kept[mine].float()
            sums.probes[matrix] = product + sums.probes[matrix] if matrix in sums.probes else product
            return
        if part.gradient:
            self._add_gradient(index, projected.float().mT @ kept.float())
            return
        if not len(sequences):
            return
        if not reading.candidate:
            assert part.operator is not None
            sums.psi[sums.columns(matrix)].add_(part.operator.features(kept[None], projected[None])[0])
            return
        size = reading.shape[0]
        # the sequence of a share, in the rows that share has in the sums
        rows = (sequences // size) * sums.n + reading.first + sequences % size
        kappa = self._preconditioners.kappa(matrix)
        a, b = part.widths or ((0, 0) if part.operator is None else (kept.shape[-1], projected.shape[-1]))
        if part.operator is not None:
            found, places = torch.unique(rows, return_inverse=True)
            a_NTI, b_NTO = (by_sequence(x, places, len(found)) for x in (kept[:, :a], projected[:, :b]))
            phi = part.operator.features(a_NTI, b_NTO, self._preconditioners.multiplier(matrix))
            columns = sums.columns(matrix)
            sums.phi[:, columns].index_add_(0, found, phi, alpha=kappa)
        if part.aligned:
            dots = torch.linalg.vecdot(*_apart(part, kept[:, a:], projected[:, b:]))
            columns = slice(part.column, part.column + part.alignments)
            sums.align[:, columns].index_add_(0, rows, dots.double(), alpha=kappa)

    def _add_gradient(self, index: int, value: Tensor) -> None:
        matrix = self._matrix_of[index]
        previous = self._sums.gradients[matrix]
        self._sums.gradients[matrix] = value if previous is None else previous.add_(value)


def _apart(part: Part, *factors: Tensor) -> list[Tensor]:
    """Return factors [.., alignments * w] as [.., alignments, w] float32."""
    return [x.float().unflatten(-1, (part.alignments, -1)) for x in factors]


def _sequences(layer: ScoredLayer, x: Tensor) -> Tensor:
    assert layer.routing is not None
    found = layer.routing.sequences(layer.expert)
    if x.dim() != 2 or len(x) != len(found):
        raise CaptureError(
            f"layer {layer.name}: expected the {len(found)} rows of the tokens that were sent to this expert, got "
            f"{list(x.shape)}; the expert is called with other rows than the dispatcher gave it"
        )
    return found


def inside_backward() -> bool:
    """Tell whether this thread runs inside a backward pass of autograd."""
    return torch._C._current_graph_task_id() != -1


def _before_changes_in_place(module: nn.Module, out: Tensor) -> Tensor:
    """Find the tensor whose gradient is that of a layer's output, whatever is done to that output in place.

    With a bias nn.Linear gives a view of the rows [B * T, d]. In-place activations give a view another history, which
    leaves its hooks behind; the rows keep theirs.
    """
    base = out._base if type(module).forward is nn.Linear.forward else None
    return base if base is not None and base.requires_grad and base.numel() == out.numel() else out


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


def _first(part: Part, layer: ScoredLayer) -> Projection:
    """The projection of the factor that the forward pass shows: the layer's input."""
    return part.projected if layer.transposed else part.kept


def _second(part: Part, layer: ScoredLayer) -> Projection:
    return part.kept if layer.transposed else part.projected
