"""Processes, devices and FSDP2.

What is sharded, and how:

* Every parameter is held in float32 (the master copy that AdamW updates).
* ``fully_shard`` wraps each layer, the MTP block and, as the root, embeddings + final norm + head.
  Gathered weights and activations use ``param_dtype``; gradients are summed in float32.
* A_log, D, dt_bias and the router's weight must not be rounded to ``param_dtype``. FSDP2 has one
  dtype per group, so these few small parameters stay whole on every rank, and one all-reduce sums
  their gradients.
* With expert parallelism over N ranks the mesh is (ranks / N, N): every N neighbours divide the
  experts among them, and ranks with the same experts shard each of their matrices by rows.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nemokernels.models import CausalLM

WHOLE = ("A_log", "D", "dt_bias", "gate.weight")


def start() -> tuple[int, int, torch.device]:
    """Join the process group of torchrun, if any; return rank, world size and device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def leave() -> None:
    """Leave the process group, if this process has one, and then end with status 0.

    A thread of gloo takes the interpreter's lock to drop a collective's tensors, and aborts the
    process if the interpreter is shutting down by then. Nobody waits for these threads, because
    torch's caches of sharded tensors keep the group. So nothing is shut down.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_whole(name: str) -> bool:
    """Whether this parameter stays unsharded and in float32."""
    return name.endswith(WHOLE)


def shard(
    root: nn.Module,
    model: CausalLM,
    device: torch.device,
    param_dtype: torch.dtype,
    expert_parallel: int = 1,
) -> None:
    """``fully_shard`` the layers of ``model``, then ``root``, which contains it, over all ranks.
    Gradients are summed, not averaged: the loss is already divided by the global number of tokens.

    Raises:
        ValueError: ``expert_parallel`` does not divide the ranks or the experts, or the remaining
            dimension of the mesh does not divide an expert's rows.
    """
    # A layer's output may be a view, as F.linear returns one; nothing here writes into it.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)
    world = dist.get_world_size()
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    whole = [p for name, p in root.named_parameters() if is_whole(name)]
    split = []
    if expert_parallel == 1:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        grid = init_device_mesh(
            device.type, (world // expert_parallel, expert_parallel), mesh_dim_names=("data", "ep")
        )
        mesh = grid._flatten("shard")
        model.split_experts(grid["ep"])
        split = list(model.experts())
    for experts in split:
        for name, parameter in experts.named_parameters():
            if parameter.shape[1] % grid["data"].size():
                raise ValueError(
                    f"experts.{name} has {parameter.shape[1]} rows, which cannot be split evenly "
                    f"over {grid['data'].size()} ranks"
                )
        fully_shard(
            experts, mesh=grid["data"], mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
        )
    units = (*model.fsdp_units(), root)
    for module in units:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    for module in (*split, *units):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has only sums
    for parameter in whole if not any(p.is_meta for p in whole) else ():
        dist.broadcast(parameter.data, src=0)


def recompute(units: Iterable[nn.Module]) -> None:
    """Keep only every unit's inputs; the backward runs its forward again. Call before sharding."""
    for unit in units:
        # Set on the instance, so that no parameter's name changes and FSDP's hooks stay outside.
        unit.forward = functools.partial(
            checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False
        )


def sum_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of the unsharded parameters over all ranks, in one all-reduce."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def all_sum(*values: torch.Tensor) -> list[torch.Tensor]:
    """Sum every tensor over all ranks, in place."""
    for value in values if dist.is_initialized() else ():
        dist.all_reduce(value)
    return list(values)
