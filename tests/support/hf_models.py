"""Tiny random models of `transformers`, saved as the published ones are, and what they and ours compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opus.config import ModelConfig, RunConfig, from_dict, to_dict

VOCAB = 91  # padded to 96 by tests: rows that no token has, on the last tensor-parallel rank
LENGTH = 24


def config(kind: str, tied: bool, **changes: Any) -> Any:
    """Shapes in which everything that can be mixed up has another size."""
    from transformers import GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    common = {"vocab_size": VOCAB, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 48}
        return GPT2Config(**{**common, **shape, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **changes})
    if kind == "qwen3_moe":
        experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
        changes = {**experts, **changes}
    return {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "llama": LlamaConfig}[kind](
        **{
            **common,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 12,  # hidden / heads would be 4
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            **changes,
        }
    )


def save(
    directory: Path, kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """A model directory. Every weight is random and large, norms and biases too: no two may be exchanged unseen."""
    from transformers import AutoModelForCausalLM

    shard_size = changes.pop("max_shard_size", "5GB")
    model = AutoModelForCausalLM.from_config(config(kind, tied, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2, generator=generator)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def published_logits(directory: Path) -> Tensor:
    """[2, LENGTH, V] float32, by `transformers`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens()).logits


def recipe_for(directory: Path, tp: int, **sections: dict[str, Any]) -> RunConfig:
    """A recipe of the model in `directory`, from its own config.json, that starts from its weights."""
    from megatron_opus.backends.formats.hf_config import model_config, read_config

    model = to_dict(model_config(read_config(directory), make_vocab_size_divisible_by=32))
    raw: dict[str, Any] = {
        "name": "hf",
        "model": {**model, "init_from": str(directory)},
        "data": {"seq_length": LENGTH},
        "parallel": {"tensor_model_parallel_size": tp, "zero_stage": 1},
        "training": {"global_batch_size": 4, "micro_batch_size": 2, "train_steps": 4},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return from_dict(raw)


def our_logits(recipe: RunConfig, init_from: Path | None = None) -> dict[str, Any]:
    """On one rank: logits of the Megatron model that was started from the recipe's weights, and its token losses.

    The logits of all tensor-parallel ranks side by side, padding included.
    """
    import dataclasses

    import torch.distributed as dist

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.backends.model.build import build_model
    from megatron_opus.backends.model.gpt import forward_loss
    from megatron_opus.backends.model.parallel import init_parallel
    from megatron_opus.types import Batch
    from megatron_opus.weights.initial_weights import load_initial_weights

    if init_from is not None:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, init_from=str(init_from)))
    init_distributed(recipe.parallel)
    groups = init_parallel(recipe.parallel)
    gpt = build_model(recipe).eval()
    said = load_initial_weights(gpt, recipe, groups)
    return {"said": said, **logits_of(gpt, groups, dist, forward_loss, Batch)}


def logits_of(gpt: Any, groups: Any, dist: Any, forward_loss: Any, batch_type: Any) -> dict[str, Any]:
    ids = tokens()
    positions = torch.arange(LENGTH).expand_as(ids)
    with torch.no_grad():
        part = gpt(input_ids=ids, position_ids=positions, attention_mask=None).float()
        even = gpt.config.sequence_parallel  # which splits the tokens over two ranks
        length = LENGTH - 2 if even else LENGTH - 1
        losses = forward_loss(
            gpt,
            batch_type(
                tokens=ids[:, :length],
                labels=ids[:, 1 : length + 1],
                loss_mask=torch.ones(2, length),
                position_ids=positions[:, :length],
            ),
        )
    parts = [part]
    if groups.tp is not None:
        parts = [torch.empty_like(part) for _ in range(groups.tp_size)]
        dist.all_gather(parts, part.contiguous(), group=groups.tp)
    return {"logits": torch.cat(parts, dim=-1), "losses": losses}


def raw_tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def model_of(recipe: RunConfig) -> ModelConfig:
    return recipe.model


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))
