"""The parameters of a model: their names, whole shapes, and the piece of each that a tensor-parallel rank holds.

`ModelLayout` is the one value that says so. Memory, FLOPs, traffic, scoring, initialisation, conversion and checks read
it. Whole parameters of a GPT (h hidden, f feed-forward, n heads, g query groups, c channels per head, V rows of the
padded vocabulary), and what rank r of t holds:

parameter                     whole                      piece of rank r
linear_qkv.weight             [g * (n/g + 2) * c, h]     rows, contiguous: query groups of (queries.., key, value)
linear_proj.weight            [h, n * c]                 columns, contiguous
linear_fc1.weight             [f, h]                     rows, contiguous
linear_fc1.weight (SwiGLU)    [2f, h] = cat(gate, up)    cat(gate_r, up_r): two stretches of rows
linear_fc2.weight             [h, f]                     columns, contiguous
word_embeddings, output_layer [V, h]                     rows, contiguous
biases of qkv and fc1         as the rows of the weight  as the rows of the weight
everything else               whole on every rank        replicated

With experts (E of width f_e, of which expert-parallel rank r of e holds numbers r E/e to (r + 1) E/e - 1, each whole):

mlp.router.weight                              [E, h]
mlp.experts.local_experts.i.linear_fc1.weight  [f_e, h] or [2 f_e, h]
mlp.experts.local_experts.i.linear_fc2.weight  [h, f_e]
mlp.shared_experts.linear_fc1, linear_fc2      as an MLP's, of the shared experts' width
mlp.shared_experts.gate_weight                 [1, h]

Names, numbers of blocks and of experts are global.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from megatron_opus.config import ConfigError, ModelConfig, RunConfig, SelectionConfig
from megatron_opus.config.dimensions import (
    check_tensor_parallel,
    expert_ffn_size,
    ffn_size,
    head_channels,
    padded_vocab_size,
    query_groups,
)
from megatron_opus.types import Ranges

Kind = Literal["linear", "router", "embedding", "positions", "output", "norm", "bias"]
Cut = Literal["rows", "columns"]


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """Describes one parameter: what it is, its whole shape, and how tensor parallelism cuts it."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # of the whole parameter, rows that pad the vocabulary included
    cut: Cut | None = None  # the dimension that is cut; None: every rank holds all of it
    halves: bool = False  # gate and up lie one below the other, and each of them is cut by itself
    padding: int = 0  # rows at the end that no token has
    expert: int | None = None  # its number; None: no expert's
    taken: float = 1.0  # share of the tokens that go through it: topk / E for an expert

    @cached_property
    def block(self) -> int | None:
        """The number of the transformer block; None outside the blocks."""
        return block_number(self.name.rpartition(".")[0])

    @property
    def size(self) -> int:
        """Numbers in the whole parameter."""
        return math.prod(self.shape)

    @property
    def by_muon(self) -> bool:
        """True for what a Muon run trains with Muon: matrices of the blocks.

        Embeddings (positions too), the output layer, routers, norms and biases are trained with AdamW. DeepSpeed's own
        rule goes by names and would give Muon to a position embedding.
        """
        return self.kind == "linear" and self.block is not None

    def shard(self, tp_rank: int, tp_size: int) -> tuple[Ranges, ...]:
        """Give the ranges that a rank holds of each dimension, in the order in which the shard stores them.

        For a gated linear_fc1 of whole shape [96, 32], rank 1 of 2: ((24, 24), (72, 24)) and ((0, 32),).
        """
        found: list[Ranges] = [((0, n),) for n in self.shape]
        if self.cut is not None:
            dim = 0 if self.cut == "rows" else 1
            part = self.shape[dim] // (2 if self.halves else 1)
            piece = part // tp_size
            found[dim] = tuple((start + tp_rank * piece, piece) for start in range(0, self.shape[dim], part))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """Holds every parameter of the model, or of a pipeline stage, once, in the model's order, and the degrees.

    A tied output layer has no parameter of its own; on a stage without the embedding it is a copy of that one.
    """

    parameters: tuple[ParameterLayout, ...]
    tp_size: int = 1
    ep_size: int = 1
    all_blocks: tuple[int, ...] = ()  # of a stage: the numbers of the whole model's blocks
    gives_logits: bool = True  # False on every stage but the last

    @cached_property
    def _by_name(self) -> dict[str, ParameterLayout]:
        return {p.name: p for p in self.parameters}

    def __getitem__(self, name: str) -> ParameterLayout:
        """Look a parameter up. Raises KeyError."""
        return self._by_name[name]

    @property
    def matrices(self) -> tuple[ParameterLayout, ...]:
        return tuple(p for p in self.parameters if len(p.shape) == 2)

    @property
    def linear(self) -> tuple[ParameterLayout, ...]:
        """The matrices of the linear layers in the blocks."""
        return tuple(p for p in self.parameters if p.kind == "linear")

    @property
    def output(self) -> ParameterLayout:
        """The matrix that gives the logits: the output layer's own, or the token embedding that it is tied to."""
        found = {p.kind: p for p in self.parameters}
        return found.get("output") or found["embedding"]

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The numbers of the blocks that have linear layers, ascending."""
        return tuple(sorted({p.block for p in self.linear if p.block is not None}))

    @property
    def by_muon(self) -> frozenset[str]:
        """The names of the parameters that a Muon run trains with Muon."""
        return frozenset(p.name for p in self.parameters if p.by_muon)

    @property
    def head_size(self) -> int:
        """Numbers in the matrix that gives the logits; 0 on a stage that gives none."""
        return self.output.size if self.gives_logits else 0

    def stage(self, number: int, stages: int, pieces: int = 1) -> ModelLayout:
        """Cut out what pipeline stage `number` of `stages` holds, in so many interleaved pieces, as Megatron does.

        The first stage has the embeddings, the last one the final norm and the output layer; a tied output layer is a
        copy of the token embedding. Of 8 layers on 2 stages in 2 pieces, stage 0 holds 0, 1, 4 and 5. Raises
        ConfigError when the layers do not divide.
        """
        if stages == 1:
            return self
        depth, last = len(self.blocks), stages - 1
        if depth % (stages * pieces):
            raise ConfigError(
                f"model.num_layers: expected a multiple of {stages} stages x {pieces} pieces of each, got {depth}"
            )
        together = depth // (stages * pieces)

        def held(p: ParameterLayout) -> bool:
            if p.block is not None:
                return p.block // together % stages == number
            if p.kind in ("embedding", "positions"):
                return number == 0 or (number == last and p is self.output)
            return number == last

        return replace(
            self,
            parameters=tuple(p for p in self.parameters if held(p)),
            all_blocks=self.blocks,
            gives_logits=number == last,
        )

    def scored(self, selection: SelectionConfig) -> tuple[ParameterLayout, ...]:
        """List the matrices whose gradients enter the score; a tied matrix stands once."""
        blocks = scored_blocks(self.all_blocks or self.blocks, selection.scored_layers)
        asked = {"embedding": selection.score_embedding, "output": selection.score_output_layer}
        inside = ("linear", "router")
        return tuple(p for p in self.matrices if asked.get(p.kind, p.kind in inside and p.block in blocks))

    def held_by(self, ep_rank: int) -> tuple[ParameterLayout, ...]:
        """List what one expert-parallel rank holds: its own experts, and everything that is no expert's."""
        count = len({p.expert for p in self.parameters if p.expert is not None}) // self.ep_size
        return tuple(p for p in self.parameters if p.expert is None or p.expert // count == ep_rank)

    def shard(self, name: str, tp_rank: int) -> tuple[Ranges, ...]:
        """Give the ranges of each dimension that `tp_rank` holds of one parameter. Raises KeyError."""
        return self[name].shard(tp_rank, self.tp_size)

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of one parameter's shard, which is the same on every tensor-parallel rank."""
        return tuple(sum(n for _, n in ranges) for ranges in self.shard(name, 0))

    def local_size(self, names: Iterable[str] | None = None) -> int:
        """Count the numbers that one rank holds of a stage: of these parameters, or of all."""
        held = {p.name for p in self.held_by(0)}
        wanted = held if names is None else [name for name in names if name in held]
        return sum(math.prod(self.local_shape(name)) for name in wanted)

    def published_size(self) -> int:
        """Count the parameters of the whole model as it is published, without the rows that pad the vocabulary."""
        return sum(p.size - p.padding * math.prod(p.shape[1:]) for p in self.parameters)


def model_layout(
    config: ModelConfig, *, tp_size: int = 1, ep_size: int = 1, positions: int | None = None
) -> ModelLayout:
    """Describe the GPT of a configuration.

    positions: rows of the learned position embedding where `max_position_embeddings` is not set. Raises ConfigError
    when the model cannot be divided by `tp_size`, or when the vocabulary or the number of positions is not known.
    """
    check_tensor_parallel(config, tp_size)
    h, f, c = config.hidden_size, ffn_size(config), head_channels(config)
    heads, groups = config.num_attention_heads, query_groups(config)
    vocabulary = padded_vocab_size(config)
    padding = vocabulary - (config.vocab_size or vocabulary)
    found: list[ParameterLayout] = []

    def add(
        name: str, kind: Kind, shape: tuple[int, ...], cut: Cut | None, halves: bool = False, pad: int = 0, **more: Any
    ) -> None:
        found.append(ParameterLayout(name=name, kind=kind, shape=shape, cut=cut, halves=halves, padding=pad, **more))

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", "norm", (width,), None)
        if config.normalization == "LayerNorm":
            add(f"{name}.bias", "bias", (width,), None)

    def linear(name: str, shape: tuple[int, int], cut: Cut, bias: bool, halves: bool = False) -> None:
        add(f"{name}.weight", "linear", shape, cut, halves)
        if bias:
            add(f"{name}.bias", "bias", shape[:1], "rows" if cut == "rows" else None, halves)

    add("embedding.word_embeddings.weight", "embedding", (vocabulary, h), "rows", pad=padding)
    if config.position_embedding_type == "learned_absolute":
        rows = config.max_position_embeddings or positions
        if rows is None:
            raise ConfigError("model.max_position_embeddings: expected a number, got null")
        add("embedding.position_embeddings.weight", "positions", (rows, h), None)
    for i in range(config.num_layers):
        layer = f"decoder.layers.{i}"
        norm(f"{layer}.input_layernorm", h)
        linear(f"{layer}.self_attention.linear_proj", (h, heads * c), "columns", config.add_bias_linear)
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        linear(f"{layer}.self_attention.linear_qkv", ((heads + 2 * groups) * c, h), "rows", qkv_bias)
        if config.qk_layernorm:
            norm(f"{layer}.self_attention.q_layernorm", c)
            norm(f"{layer}.self_attention.k_layernorm", c)
        norm(f"{layer}.pre_mlp_layernorm", h)
        fold = 2 if config.swiglu else 1
        if config.num_moe_experts is None:
            linear(f"{layer}.mlp.linear_fc1", (fold * f, h), "rows", config.add_bias_linear, halves=config.swiglu)
            linear(f"{layer}.mlp.linear_fc2", (h, f), "columns", config.add_bias_linear)
            continue
        add(f"{layer}.mlp.router.weight", "router", (config.num_moe_experts, h), None)
        width, taken = expert_ffn_size(config), config.moe_router_topk / config.num_moe_experts
        for e in range(config.num_moe_experts):
            expert = f"{layer}.mlp.experts.local_experts.{e}"
            for name, shape, halves in (("fc1", (fold * width, h), config.swiglu), ("fc2", (h, width), False)):
                add(f"{expert}.linear_{name}.weight", "linear", shape, None, halves, expert=e, taken=taken)
        if (width := config.moe_shared_expert_intermediate_size or 0) > 0:
            shared = f"{layer}.mlp.shared_experts"
            if config.moe_shared_expert_gate:
                add(f"{shared}.gate_weight", "router", (1, h), None)
            linear(f"{shared}.linear_fc1", (fold * width, h), "rows", False, halves=config.swiglu)
            linear(f"{shared}.linear_fc2", (h, width), "columns", False)
    norm("decoder.final_layernorm", h)
    if config.untie_embeddings_and_output_weights:
        add("output_layer.weight", "output", (vocabulary, h), "rows", pad=padding)
    return ModelLayout(parameters=tuple(found), tp_size=tp_size, ep_size=ep_size)


def recipe_layout(config: RunConfig, tp_size: int | None = None) -> ModelLayout:
    """Describe a recipe's GPT, at its own tensor-parallel degree or at another. Raises as `model_layout` does."""
    tp_size = tp_size or config.parallel.tensor_model_parallel_size
    ep_size = config.parallel.expert_model_parallel_size
    return model_layout(config.model, tp_size=tp_size, ep_size=ep_size, positions=config.data.seq_length)


def scored_blocks(blocks: Sequence[int], which: str) -> tuple[int, ...]:
    """Choose the blocks that `selection.scored_layers` names out of ascending numbers.

    Of blocks 0 to 5, `all` gives all, `none` gives none, `last:2` gives 4 and 5, and `every:2`, counted from the last,
    gives 5, 3 and 1.
    """
    kind, _, number = which.partition(":")
    count = int(number or 1)
    return tuple({"none": (), "last": blocks[-count:], "every": blocks[::-1][::count]}.get(kind, blocks))


def block_number(name: str) -> int | None:
    """Read the number of the block, the first number in a module's name (`decoder.layers.3.mlp`: 3); None without."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None
