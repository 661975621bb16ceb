"""Initial values of a model that is trained from scratch."""

from __future__ import annotations

import math

import torch
from torch import nn

from nemokernels.models.fp8 import Fp8State
from nemokernels.models.norms import LayerNorm, RMSNorm

__all__ = ["reset_parameters"]

_INTO_RESIDUAL = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj", "dense", "dense_4h_to_h")


@torch.no_grad()
def reset_parameters(model: nn.Module) -> None:
    """Fill every parameter and buffer of a model of any family.

    Linear layers, experts, routers and embeddings: normal(0, initializer_range). Weights that write
    into the residual stream are divided by the square root of the number of layers (the scheme of
    GPT-2) if the config's ``rescale_prenorm_residual`` says so; an MTP block counts its own layers.
    Mamba: step sizes log-uniform in [time_step_min, time_step_max] and not below time_step_floor, D
    one. A is uniform in [1, 16] in Mamba-2; in Mamba-1 it is 1, 2, ... along the state, and the
    projection of the steps is uniform in +- 1 / sqrt(its inputs). Norms multiply by one; biases and
    buffers are zero, but for FP8's scales.
    """
    c, std = model.config, model.config.initializer_range
    unit = {  # what a norm stores to multiply by one
        f"{path}.weight": 1 - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if isinstance(module, (RMSNorm, LayerNorm))
    }
    for name, parameter in model.named_parameters():
        layers = len(c.mtp_pattern) if name.startswith("mtp.") else c.depth
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if name in unit:
            nn.init.constant_(parameter, unit[name])
        elif leaf == "D":
            nn.init.ones_(parameter)
        elif leaf in _INTO_RESIDUAL:
            scale = math.sqrt(layers) if c.rescale_prenorm_residual else 1.0
            nn.init.normal_(parameter, std=std / scale)
        elif "conv1d" in name:
            bound = c.conv_kernel**-0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
            _init_steps(parameter, c)
        elif leaf == "bias":
            nn.init.zeros_(parameter)
        elif leaf == "dt_proj":
            bound = c.time_step_rank**-0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif leaf == "A_log" and parameter.dim() == 2:
            parameter.copy_(torch.arange(1, parameter.shape[1] + 1).log())
        elif leaf == "A_log":
            nn.init.uniform_(parameter, 1, 16).log_()
        else:
            nn.init.normal_(parameter, std=std)
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        if isinstance(module, Fp8State):
            module.reset()


def _init_steps(bias: nn.Parameter, config) -> None:
    low = max(config.time_step_min, config.time_step_floor, torch.finfo(torch.float32).tiny)
    steps = torch.empty_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
    nn.init.uniform_(steps, math.log(low), math.log(max(low, config.time_step_max)))
    dt = steps.exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
