"""Models inside of what other libraries put around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_oracle import EXACT, relative
from small_models import TinyGPT, random_batch, token_losses

import megatron_opus
from megatron_opus.config import ConfigError

N, K_P = 4, 2


def share(batch: Any, rank: int) -> Any:
    half = len(batch) // 2
    return batch.rows(rank * half, (rank + 1) * half)


def of_rank(how: str, zero: int) -> dict[str, Any]:
    """Train two steps with AdamW under DDP or DeepSpeed, every rank on its half; then score, every rank its half."""
    import torch.distributed as dist

    from megatron_opus.backends.model import cpu_shims

    cpu_shims.install()  # else DeepSpeed compiles a shared-memory collective, which is no part of what is tested
    rank = dist.get_rank()
    model: Any = TinyGPT()
    candidates, proxy = random_batch(N, seed=1), random_batch(K_P, seed=2)
    if how == "ddp":
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=2e-3)
    elif how == "deepspeed":
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, which the other loops here do not have
        }
        own = torch.optim.AdamW(model.parameters(), lr=2e-3)
        wrapped = deepspeed.initialize(model=model, optimizer=own, config=settings, dist_init_required=False)[0]
        optimizer = wrapped
    else:
        wrapped, optimizer = model, torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(2):
        batch = random_batch(4, seed=50 + step)
        batch = batch if how == "one process" else share(batch, rank)
        loss = token_losses(wrapped, batch).mean()
        if how == "deepspeed":
            wrapped.backward(loss)
            wrapped.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if how != "one process":
        candidates, proxy = share(candidates, rank), share(proxy, rank)
    scorer = megatron_opus.build_scorer(wrapped, optimizer, config=EXACT)
    found = scorer(candidates, proxy)
    return {"align": found.alignment, "geometry": found.geometry, "verified": scorer.verified}


@pytest.mark.parametrize(("how", "zero"), [("ddp", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
def test_a_wrapped_model_scores_as_one_process_does(world2: Any, how: str, zero: int) -> None:
    """Guards against each rank reading its own fragment of the second moment, its own half of the proxy, or its own
    candidates alone: errors of 1e5. One process with the whole batch is the truth."""
    truth = world2.run(of_rank, "one process", 0)[0]
    for result in world2.run(of_rank, how, zero):
        assert result["geometry"] == truth["geometry"] == "adamw-separable"
        assert relative(result["align"], truth["align"]) < 1e-3  # two steps of AdamW, trained apart
        assert bool(result["verified"]) == (zero < 3)


def test_compiled_parts_are_named() -> None:
    """Guards against a compiled block inside of an ordinary model, in which no hook fires."""
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.blocks[1] = torch.compile(model.blocks[1])
    with pytest.raises(ConfigError, match=r"blocks\.1: .*torch\.compile"):
        megatron_opus.build_scorer(model, optimizer)
    model = TinyGPT()
    model.blocks[0].compile()
    with pytest.raises(ConfigError, match=r"blocks\.0: .*torch\.compile"):
        megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def fully_sharded(whole: bool) -> str:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not dist.is_initialized():
        from megatron_opus.backends.engines.processes import init_distributed
        from megatron_opus.config import ParallelConfig

        init_distributed(ParallelConfig())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = TinyGPT()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
    assert isinstance(model.lm_head.weight, DTensor)
    if whole:
        from torch.distributed.fsdp import fully_shard

        model = TinyGPT()
        fully_shard(model, mesh=mesh)
    try:
        megatron_opus.build_scorer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("whole", [False, True])
def test_fsdp_is_told_what_to_do(world2: Any, whole: bool) -> None:
    """Guards against sketches of a part of a weight, or an error out of DTensor's dispatcher."""
    for message in world2.run(fully_sharded, whole):
        assert "full_state_dict=True" in message
        assert "DTensor" in message


def whole_copy_of_fsdp() -> tuple[Any, Any]:
    """The scores of FSDP2's model by the copy that the refusal asks for, and those of a model that was never cut."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from megatron_opus.backends.engines.processes import init_distributed
    from megatron_opus.config import ParallelConfig

    if not dist.is_initialized():
        init_distributed(ParallelConfig())
    cut, uncut = TinyGPT(), TinyGPT()
    fully_shard(cut, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (cut, uncut)]
    for model, optimizer in zip((cut, uncut), optimizers, strict=True):
        for step in range(2):
            token_losses(model, random_batch(4, seed=step)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    full = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(cut, optimizers[0], options=full)
    copy = TinyGPT()
    optimizer = torch.optim.AdamW(copy.parameters(), lr=1e-3)
    set_state_dict(copy, optimizer, model_state_dict=weights, optim_state_dict=state, options=full)
    candidates, proxy = random_batch(6, seed=7), random_batch(3, seed=8)
    found = megatron_opus.score(copy, candidates, proxy, optimizer, config=EXACT)
    truth = megatron_opus.score(uncut, candidates, proxy, optimizers[1], config=EXACT)
    return found.alignment, truth.alignment


def test_a_whole_copy_of_an_fsdp_model_is_scored(world2: Any) -> None:
    """Guards against a remedy in an error's text that does not work: a copy without optimizer state."""
    for found, truth in world2.run(whole_copy_of_fsdp):
        assert relative(found, truth) < 1e-4  # gradients that are averaged over two ranks differ in their last bits
