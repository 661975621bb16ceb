"""Initial values of a model that is trained from scratch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemokernels.models.fp8 import Fp8State
from nemokernels.models.names import is_stack
from nemokernels.models.norms import LayerNorm, RMSNorm

__all__ = ["assign", "local_part", "reset_buffers", "reset_parameters", "zero_counters"]

_INTO_RESIDUAL = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj", "dense", "dense_4h_to_h")


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Fill every parameter and buffer of a model of any family.

    Linear layers, experts, routers and embeddings are drawn from normal(0, initializer_range).
    Weights that write into the residual stream are divided by the square root of the number of
    layers (as in GPT-2) if the config's ``rescale_prenorm_residual`` says so; for the MTP block,
    its own layers count. Mamba's step sizes are log-uniform in [time_step_min, time_step_max] and
    at least time_step_floor; D is one. A is uniform in [1, 16] in Mamba-2; in Mamba-1 it is 1, 2,
    ... along the state, and the projection of the steps is uniform in +- 1 / sqrt(its inputs).
    Norms multiply by one. Biases and buffers are zero, except FP8's scales.

    With the same seed a sharded model gets the values of the whole one: every rank draws all
    numbers and keeps its own. It needs memory for its part and one whole tensor, or one expert.
    """
    unit = {  # what each kind of norm stores to multiply by one
        f"{path}.weight": 1 - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if isinstance(module, (RMSNorm, LayerNorm))
    }
    for name, parameter in model.named_parameters():
        if name in unit:
            fill = functools.partial(nn.init.constant_, val=unit[name])
        else:
            fill = _rule(name, parameter, model.config)
        _draw(parameter, fill, one_by_one=is_stack(name))
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Set every buffer to zero, and FP8's scales to one."""
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if isinstance(module, Fp8State):
            module.reset()


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """This rank's part of a tensor (all of it if not sharded), and where in the whole it lies."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), tuple(slice(a, a + n) for a, n in zip(starts, sizes))


def _draw(
    parameter: nn.Parameter, fill: Callable[[torch.Tensor], object], *, one_by_one: bool
) -> None:
    (local, box), shape = local_part(parameter), parameter.shape
    if not one_by_one:
        local, box, shape = local[None], (slice(0, 1), *box), (1, *shape)
    for index in range(shape[0]):
        if not isinstance(parameter, DTensor):
            fill(local[index])
            continue
        whole = torch.empty(shape[1:], dtype=local.dtype, device=local.device)
        fill(whole)
        if box[0].start <= index < box[0].stop:
            local[index - box[0].start].copy_(whole[box[1:]])


def _rule(name: str, parameter: nn.Parameter, c) -> Callable[[torch.Tensor], object]:
    """The function that fills the parameter of this name; norms aside."""
    layers = len(c.mtp_pattern) if name.startswith("mtp.") else c.depth
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf == "D":
        return nn.init.ones_
    if leaf in _INTO_RESIDUAL:
        scale = math.sqrt(layers) if c.rescale_prenorm_residual else 1.0
        return functools.partial(nn.init.normal_, std=c.initializer_range / scale)
    if "conv1d" in name:
        bound = c.conv_kernel**-0.5
        return functools.partial(nn.init.uniform_, a=-bound, b=bound)
    if leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        return functools.partial(_init_steps, config=c)
    if leaf == "bias":
        return nn.init.zeros_
    if leaf == "dt_proj":
        bound = c.time_step_rank**-0.5
        return functools.partial(nn.init.uniform_, a=-bound, b=bound)
    if leaf == "A_log" and parameter.dim() == 2:
        return lambda tensor: tensor.copy_(torch.arange(1, tensor.shape[1] + 1).log())
    if leaf == "A_log":
        return lambda tensor: nn.init.uniform_(tensor, 1, 16).log_()
    return functools.partial(nn.init.normal_, std=c.initializer_range)


def _init_steps(bias: torch.Tensor, config) -> None:
    low = max(config.time_step_min, config.time_step_floor, torch.finfo(torch.float32).tiny)
    steps = torch.empty_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
    nn.init.uniform_(steps, math.log(low), math.log(max(low, config.time_step_max)))
    dt = steps.exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def zero_counters(model: nn.Module, device: torch.device) -> None:
    """Replace buffers on meta that are not part of a checkpoint by zeros."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            assign(model, name, torch.zeros_like(buffer, device=device))


def assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the model's parameter or buffer of this name by ``value``."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=module._parameters[leaf].requires_grad)
    setattr(module, leaf, value)
