"""How Megatron's mixture-of-experts layers are scored: which rows an expert gets, and what no module hook sees.

An expert is an MLP of ordinary layers whose rows are tokens of many sequences. Which sequence each row belongs to is
told by a second dispatch: before the tokens of a layer are sent to their experts, the number of each token's sequence
travels the same way, through the layer's own dispatcher and with the same routing. Cost: one number a token.

    allgather, alltoall   both take tensors of any width
    flex                  refused: DeepEP sends rows of the hidden width alone

The router and the gate of shared experts multiply by their weights inside of other code, and the grouped layers of
Transformer Engine by those of all experts at once. While a pass looks, their products go through a module of their own
for each matrix, whose input and output gradient are the factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_opus.backends.model import te_layers
from megatron_opus.config import ConfigError

DISPATCHERS = ("allgather", "alltoall")


class DispatchedSequences:
    """Follows sequence numbers through the dispatcher of one MoELayer (see `Routing`)."""

    def __init__(self, layer: MoELayer) -> None:
        """Raises ConfigError for a layer whose rows cannot be followed."""
        check(layer)
        self._layer = layer
        # of each grouped linear layer, one module for each expert of this rank
        self.products = {m: [_Product() for _ in te_layers.grouped_weights(m)] for m in layer.experts.children()}
        self._rows: tuple[Tensor, ...] = ()
        self._load = torch.zeros(0, 0)

    @contextlib.contextmanager
    def observed(self, sequences: int, share: int) -> Iterator[None]:
        router: Any = self._layer.router

        def routed(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    probs, routing_map = output
                    self._load = routing_map.view(-1, sequences, routing_map.shape[-1]).float().sum(0)
                    self._rows = self._follow(args[0], probs, routing_map, sequences, share)

        # counts for a bias that balances the load: the router adds to them whenever gradients are on
        counts = getattr(router, "local_tokens_per_expert", None)
        before = None if counts is None else counts.clone()
        handle = router.register_forward_hook(routed)
        try:
            with contextlib.ExitStack() as opened:
                for grouped, products in self.products.items():
                    if products:
                        opened.enter_context(_shown_grouped(grouped, products))
                yield
        finally:
            handle.remove()
            if counts is not None:
                counts.copy_(before)

    def sequences(self, expert: int) -> Tensor:
        return self._rows[expert]

    def load(self) -> Tensor:
        return self._load

    def _follow(self, hidden: Tensor, probs: Tensor, routing_map: Tensor, sequences: int, share: int) -> Any:
        dispatcher: Any = self._layer.token_dispatcher
        tokens, size, _ = hidden.shape  # [s / tp, b, h]
        if size != sequences:
            raise ConfigError(
                f"mixture of experts: expected {sequences} sequences in each forward pass, got activations of shape "
                f"{list(hidden.shape)}; expected [tokens, sequences, features]"
            )
        numbers = share * sequences + torch.arange(sequences, dtype=torch.float32, device=hidden.device)
        x, p = dispatcher.dispatch_preprocess(
            numbers.repeat(tokens).view(tokens, sequences, 1), routing_map.clone(), probs.detach()
        )
        x, p = dispatcher.token_dispatch(x, p)
        x, per_expert, _ = dispatcher.dispatch_postprocess(x, p)
        return torch.split(x[:, 0].round().long(), per_expert.tolist())


class _Product(nn.Module):
    """Stands for y = x W^T where a model computes it outside of any module."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


@contextlib.contextmanager
def _method(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function` stand in for a method of `owner` while the context is open."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own method comes back
        if own is not None:
            setattr(owner, name, own)


def _shown_grouped(grouped: Any, products: Sequence[_Product]) -> contextlib.AbstractContextManager[None]:
    """Call a module with the rows and the product of every expert inside the context; the sum of them is unchanged."""
    own = grouped.forward

    def forward(x: Tensor, splits: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        y, *rest = own(x, splits, *args, **kwargs)
        rows = [int(n) for n in splits]
        found = zip(products, x.split(rows), y.split(rows), strict=True)
        return torch.cat([product(a, b) for product, a, b in found]), *rest

    return _method(grouped, "forward", forward)


Shown = tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[object]]]


def shown_router(router: Any) -> Shown:
    """Return a module that is called with the router's input and logits inside the context beside it."""
    product = _Product()

    def shown() -> contextlib.AbstractContextManager[None]:
        gating = router.gating
        return _method(router, "gating", lambda x: product(x, gating(x)))

    return product, shown


def shown_gate(shared: Any) -> Shown:
    """Return a module that is called with input and logits of the gate of shared experts inside the context."""
    product = _Product()

    def gated(hidden_states: Tensor) -> Tensor:
        output, _ = MLP.forward(shared, hidden_states)
        logits = product(hidden_states, nn.functional.linear(hidden_states, shared.gate_weight))
        gate: Tensor = output * torch.sigmoid(logits)
        return gate

    return product, lambda: _method(shared, "forward", gated)


def check(layer: MoELayer) -> None:
    """Raise ConfigError, by name, for what cannot be scored or was not tried."""
    c: Any = layer.config
    kind = type(layer.experts)
    if kind not in (SequentialMLP, TEGroupedMLP):
        raise ConfigError(
            f"mixture of experts: expected SequentialMLP or TEGroupedMLP, got {kind.__name__}; set "
            "moe_grouped_gemm=False, or moe_use_legacy_grouped_gemm=False with Transformer Engine"
        )
    if kind is TEGroupedMLP:
        _check_grouped(layer)
    else:
        parts = [part for e in layer.experts.local_experts for part in (e.linear_fc1, e.linear_fc2)]
        if foreign := {type(x).__name__ for x in parts} - {"ColumnParallelLinear", "RowParallelLinear"}:
            raise ConfigError(
                f"mixture of experts: expected Megatron's own linear layers in every expert, got {', '.join(foreign)}"
            )
    etp = layer.experts.tp_group
    wrong = (
        ("moe_expert_capacity_factor", c.moe_expert_capacity_factor is not None, "null: which tokens are dropped would "
         "depend on the other sequences of a micro-batch"),
        ("moe_token_dispatcher_type", c.moe_token_dispatcher_type not in DISPATCHERS, " or ".join(DISPATCHERS)),
        ("moe_shared_expert_overlap", c.moe_shared_expert_overlap, "false"),
        ("expert_tensor_parallel_size", etp is not None and etp.size() > 1, "1"),
        ("context_parallel_size", c.context_parallel_size > 1, "1 beside experts"),
        ("moe_latent_size", getattr(c, "moe_latent_size", None) is not None, "null"),
        ("moe_apply_probs_on_input", c.moe_apply_probs_on_input, "false"),
        ("moe_input_jitter_eps", c.moe_input_jitter_eps is not None, "null"),
        ("moe_router_load_balancing_type", c.moe_router_load_balancing_type == "sinkhorn", "aux_loss or none"),
        ("fp8", bool(c.fp8) or bool(getattr(c, "fp4", None)), "null: experts would get rows of padding"),
        ("sequence_parallel", c.tensor_model_parallel_size > 1 and not c.sequence_parallel, "true with tensor "
         "parallelism: every rank would send all tokens"),
    )  # fmt: skip
    for name, refused, expected in wrong:
        if refused:
            got = etp.size() if name == "expert_tensor_parallel_size" else getattr(c, name)
            raise ConfigError(f"mixture of experts: {name}: expected {expected}, got {got}")


def _check_grouped(layer: Any) -> None:
    experts = layer.experts
    if getattr(experts, "_with_fused_impl", False):
        raise ConfigError(
            "mixture of experts: use_transformer_engine_op_fuser: expected false, got true; a fused layer shows no "
            "product"
        )
    for name in ("linear_fc1", "linear_fc2"):
        found = len(te_layers.grouped_weights(getattr(experts, name)))
        if found != layer.num_local_experts:
            raise ConfigError(
                f"mixture of experts: {name}: expected a weight for each of {layer.num_local_experts} experts, got "
                f"{found}; set moe_single_grouped_weight=False"
            )
