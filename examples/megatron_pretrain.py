"""Pre-train a GPT through `megatron.training.pretrain`: what Megatron-LM's pretrain_gpt.py does, in public functions.

    torchrun --nproc-per-node 8 examples/megatron_pretrain.py <Megatron-LM's arguments>
    torchrun --nproc-per-node 8 -m megatron_opus.integrations.megatron_lm examples/megatron_pretrain.py <the same> \
        --opus-config opus.yaml

It needs megatron-core 0.19 (whose wheel contains `megatron.training`). Of OPUS it knows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def datasets(sizes: list[int], vp_stage: int | None = None) -> list[Any]:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    names = ("split", "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "mid_level_dataset_surplus")
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        **{name: getattr(args, name) for name in names},
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset

    def reads() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    return BlendedMegatronDatasetBuilder(kind, sizes, reads, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mask = loss_mask.view(-1).float()
    loss, tokens = torch.sum(losses.view(-1).float() * mask), mask.sum().detach().to(torch.int)
    fatal = get_args().check_for_nan_in_loss_and_grad  # a step with a loss of NaN is run again (--rerun-mode)
    get_rerun_state_machine().validate_result(loss, torch.isnan, "a loss is NaN", tolerance=0.0, fatal=fatal)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, partial[Any]]:
    args = get_args()
    batch: Any = {}
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        rank = mpu.get_tensor_model_parallel_rank()
        if rank == 0:
            found = next(batches)
            batch = {key: found[key].cuda(non_blocking=True) for key in KEYS if key in found}
        batch = get_batch_on_this_tp_rank(
            batch,
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            mtp_on_this_rank=False,
            cp_size=args.context_parallel_size,
            tp_rank=rank,
            is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
            is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        )
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    labels, mask = batch.get("labels"), batch.get("loss_mask")
    output = model(batch.get("tokens"), batch.get("position_ids"), batch.get("attention_mask"), labels=labels)
    return output, partial(loss_func, mask)


if __name__ == "__main__":
    parsed = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(parsed, gpt_config_from_args(parsed))
    pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
