"""Reads and writes the config.json of published GPT-2, Qwen3, Qwen3-MoE and Llama models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_opus.config import ConfigError, ModelConfig
from megatron_opus.config.dimensions import expert_ffn_size, ffn_size, head_channels, query_groups

Family = Literal["gpt2", "qwen3", "qwen3_moe", "llama"]
CONFIG_FILE = "config.json"
ARCHITECTURE: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def family(model: ModelConfig) -> Family:
    """The published architecture of this shape. Raises ConfigError with what keeps it from being any."""
    rotary: dict[str, tuple[Any, Any]] = {
        "position_embedding_type": ("rope", model.position_embedding_type),
        "normalization": ("RMSNorm", model.normalization),
        "swiglu": (True, model.swiglu),
        "add_bias_linear": (False, model.add_bias_linear),
        "add_qkv_bias": (False, model.add_qkv_bias),
    }
    asked: dict[Family, dict[str, tuple[Any, Any]]] = {
        "gpt2": {
            "position_embedding_type": ("learned_absolute", model.position_embedding_type),
            "normalization": ("LayerNorm", model.normalization),
            "swiglu": (False, model.swiglu),
            "add_bias_linear": (True, model.add_bias_linear),
            "qk_layernorm": (False, model.qk_layernorm),
            "num_query_groups": (model.num_attention_heads, query_groups(model)),
            "kv_channels": (model.hidden_size / model.num_attention_heads, head_channels(model)),
        },
        "qwen3": {**rotary, "qk_layernorm": (True, model.qk_layernorm)},
        "llama": {**rotary, "qk_layernorm": (False, model.qk_layernorm)},
    }
    experts, shared = model.num_moe_experts, model.moe_shared_expert_intermediate_size
    for found in asked.values():
        found["num_moe_experts"] = (None, experts)
    asked["qwen3_moe"] = {
        **asked["qwen3"],
        "num_moe_experts": (experts or "a number", experts),
        "moe_shared_expert_intermediate_size": (None, shared),
    }
    faults = {
        name: [f"model.{key}: expected {want}, got {got}" for key, (want, got) in keys.items() if want != got]
        for name, keys in asked.items()
    }
    for name in asked:
        if not faults[name]:
            return name
    lines = "\n".join(f"  as {name}: {'; '.join(found)}" for name, found in faults.items())
    raise ConfigError(
        f"this model has no published architecture, only GPT-2, Qwen3, Qwen3-MoE and Llama can be converted:\n{lines}"
    )


def read_config(directory: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """config.json of a Hugging Face model directory. Raises ConfigError."""
    path = directory / name
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: expected a file, found a folder or a pipe")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; expected a Hugging Face model directory") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not a file of valid JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("model_type") not in tuple(ARCHITECTURE):
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ConfigError(f"{path}: model_type: expected one of {', '.join(ARCHITECTURE)}, got {found!r}")
    return raw


def model_config(raw: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128) -> ModelConfig:
    """Our description of a published model. Raises ConfigError for keys missing or not computed here."""

    def need(key: str) -> int:
        if raw.get(key) is None:
            raise ConfigError(f"{CONFIG_FILE}: missing key {key}")
        return whole(key, raw[key])

    def whole(key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
            raise ConfigError(f"{CONFIG_FILE}: {key}: expected a positive whole number, got {value!r}")
        return value

    def optional(key: str, value: int | None = None) -> int | None:
        return value if raw.get(key) is None else whole(key, raw[key])

    def small(key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(f"{CONFIG_FILE}: {key}: expected a number above 0 and at most 1, got {value!r}")
        return float(value)

    def truth(key: str, value: bool) -> bool:
        found = raw.get(key, value)
        if not isinstance(found, bool):
            raise ConfigError(f"{CONFIG_FILE}: {key}: expected true or false, got {found!r}")
        return found

    def only(key: str, allowed: tuple[Any, ...]) -> None:
        if raw.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{CONFIG_FILE}: {key}: expected {' or '.join(map(str, allowed))}, got {raw[key]!r}")

    if raw["model_type"] == "gpt2":
        only("activation_function", ("gelu_new", "gelu_pytorch_tanh"))
        only("scale_attn_weights", (True,))
        only("scale_attn_by_inverse_layer_idx", (False,))
        only("add_cross_attention", (False,))
        # `transformers` knows these facts under a second name each, and takes the one or the other by its release
        for key, other in GPT2_NAMES.items():
            if other in raw and raw[other] != raw.get(key):
                raise ConfigError(
                    f"{CONFIG_FILE}: {key} is {raw.get(key)!r}, and {other}, which means the same, is {raw[other]!r}; "
                    f"leave {other} out, or make them equal"
                )
        if optional("head_dim", 0) not in (0, need("n_embd") // need("n_head")):
            raise ConfigError(
                f"{CONFIG_FILE}: head_dim: GPT-2 has n_embd / n_head numbers per head, "
                f"{need('n_embd') // need('n_head')}, got {raw['head_dim']!r}; leave it out"
            )
        return ModelConfig(
            num_layers=need("n_layer"),
            hidden_size=need("n_embd"),
            num_attention_heads=need("n_head"),
            ffn_hidden_size=optional("n_inner"),
            vocab_size=need("vocab_size"),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            max_position_embeddings=need("n_positions"),
            layernorm_epsilon=small("layer_norm_epsilon", raw.get("layer_norm_epsilon", 1e-5)),
            untie_embeddings_and_output_weights=not truth("tie_word_embeddings", True),
        )
    llama = raw["model_type"] == "llama"
    only("hidden_act", ("silu",))
    only("attention_bias", (False,))
    only("mlp_bias", (False,))
    only("use_sliding_window", (False,))
    only("quantization_config", (None,))
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{CONFIG_FILE}: layer_types: expected full_attention alone, got {kinds!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{CONFIG_FILE}: rope_parameters: expected keys and values, got {rope!r}")
    if rope.get("rope_type", rope.get("type", "default")) != "default" or any(
        isinstance(x, dict) for x in rope.values()
    ):
        raise ConfigError(f"{CONFIG_FILE}: rope scaling: expected none, got {rope!r}")
    # `transformers` takes what rope_parameters says, and the older key at the top where that says nothing.
    if llama and raw.get("rope_theta") is None:
        raw = {**raw, "rope_theta": 10000}
    theta = need("rope_theta") if rope.get("rope_theta") is None else whole("rope_theta", rope["rope_theta"])
    heads = need("num_attention_heads")
    # `transformers` has its own default for each of them, and takes a null for one in Llama alone
    channels = 128 if raw["model_type"] == "qwen3" else need("hidden_size") // heads
    if raw.get("head_dim") is not None or ("head_dim" in raw and not llama):
        channels = need("head_dim")
    experts: dict[str, Any] = {}
    if raw["model_type"] == "qwen3_moe":
        # every block is a mixture, and the weights of the chosen experts add up to 1
        only("decoder_sparse_step", (1,))
        if raw.get("mlp_only_layers") or not raw.get("norm_topk_prob"):
            raise ConfigError(
                f"{CONFIG_FILE}: expected mlp_only_layers [] and norm_topk_prob true, got "
                f"{raw.get('mlp_only_layers')} and {raw.get('norm_topk_prob')}"
            )
        experts = {
            # `transformers` 5 writes the second name and reads both
            "num_moe_experts": need("num_experts" if "num_experts" in raw else "num_local_experts"),
            "moe_router_topk": need("num_experts_per_tok"),
            "moe_ffn_hidden_size": need("moe_intermediate_size"),
            "moe_aux_loss_coeff": float(raw.get("router_aux_loss_coef") or 0.0),
        }
    return ModelConfig(
        num_layers=need("num_hidden_layers"),
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=optional("num_key_value_heads", heads) if llama else need("num_key_value_heads"),
        kv_channels=channels,
        ffn_hidden_size=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        max_position_embeddings=need("max_position_embeddings"),
        position_embedding_type="rope",
        rotary_base=theta,
        normalization="RMSNorm",
        layernorm_epsilon=small("rms_norm_eps", raw.get("rms_norm_eps")),
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=not llama,
        untie_embeddings_and_output_weights=not truth("tie_word_embeddings", False),
        **experts,
    )


def published_config(model: ModelConfig, dtype: str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json for this model; keys of `base` (the model that it came from) that say nothing of ours are kept."""
    kind = family(model)
    common = {
        "architectures": [ARCHITECTURE[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
    }
    own: dict[str, Any]
    if kind == "gpt2":
        own = {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.max_position_embeddings,
            "layer_norm_epsilon": model.layernorm_epsilon,
            "activation_function": "gelu_new",
            "embd_pdrop": model.hidden_dropout,
            "resid_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
        }
    else:
        own = {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": query_groups(model),
            "head_dim": head_channels(model),
            "intermediate_size": ffn_size(model),
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.layernorm_epsilon,
            "rope_theta": model.rotary_base,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": model.attention_dropout,
            **({"mlp_bias": False} if kind == "llama" else {}),
        }
    if kind == "qwen3_moe":
        own |= {
            "num_experts": model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": expert_ffn_size(model),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
        }
    kept = {k: v for k, v in (base or {}).items() if k not in ("dtype", "torch_dtype", "transformers_version")}
    if kind == "qwen3_moe":
        kept.pop("num_local_experts", None)  # one place, as below
    if "rope_parameters" in kept and kind != "gpt2":  # where newer versions of the library keep it
        own.pop("rope_theta")
        kept.pop("rope_theta", None)  # one place: an older key beside it may say something else
        kept["rope_parameters"] = {
            **(kept["rope_parameters"] or {"rope_type": "default"}),
            "rope_theta": model.rotary_base,
        }
    if base is None:
        # Defaults of the library are ids of its own vocabulary.
        kept = {"bos_token_id": None, "eos_token_id": None}
    return {**kept, **common, **own, "torch_dtype": dtype}
