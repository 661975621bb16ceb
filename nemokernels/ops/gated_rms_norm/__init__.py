"""RMSNorm with a SiLU gate: the norm between the Mamba-2 scan and its output projection."""

from __future__ import annotations

import torch

from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.gated_rms_norm import op

__all__ = ["RMSNormGated", "rmsnorm_fn"]


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """Grouped RMSNorm over the last axis, gated by ``silu(z)``.

    With ``norm(v) = v / sqrt(mean(v**2) + eps) * weight + bias``, the mean taken over each group
    of ``group_size`` consecutive channels:

    * ``norm_before_gate=False``: ``y = norm(x * silu(z))``. **Nemotron passes False**, with
      ``group_size = d_inner / n_groups``.
    * ``norm_before_gate=True`` (the default, for drop-in use): ``y = norm(x) * silu(z)``.
    * without z: ``y = norm(x)``.

    Gate, statistics and affine are in float32 (float64 for float64 input); one cast at the end.
    Under autocast nothing is cast further.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64, any strides.
        weight: (D), any of these dtypes.
        bias: (D), any of these dtypes.
        z: (..., D) like x, any of these dtypes; it may be a slice of a wider projection.
        eps: added to the mean square; not negative.
        group_size: channels per group, a divisor of D; None means D.
        norm_before_gate: the order of norm and gate.

    Returns:
        y (..., D), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Dao and Gu, "Transformers are SSMs", 2024; names and argument order are those of
    ``mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn`` (there ``bias`` has no default).
    """
    group = check_arguments("rmsnorm_fn", x, weight, bias, z, eps, group_size)
    return op.gated_rms_norm(x, weight, bias, z, eps, group, norm_before_gate)[0]


class RMSNormGated(torch.nn.Module):
    """:func:`rmsnorm_fn` with its weight, which is one at first; without a bias.

    Args:
        hidden_size: D, channels of the last axis.
        eps, group_size, norm_before_gate: as in :func:`rmsnorm_fn`; **Nemotron's norm_before_gate
            is False**, which is not the default.
        device, dtype: of the weight.

    Source: drop-in for ``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``, under the name by which
    mamba_ssm's modules import it: mamba_ssm has another ``RMSNorm``, without a gate, whose second
    argument is a residual.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of x (..., D), gated by z of the same shape."""
        return rmsnorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )


def check_arguments(
    fn: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int | None,
) -> int:
    """Raise as :func:`rmsnorm_fn` does, in the name of the function ``fn``; the size of a group."""
    check_tensor(fn, "x", x, dtypes=FLOATS)
    check(fn, x.dim() >= 1, "`x` needs at least one axis, got a scalar")
    width, device = x.shape[-1], x.device
    for name, value in (("weight", weight), ("bias", bias)):
        if name == "weight" or value is not None:
            check_tensor(fn, name, value, shape=(width,), dims="(D,)", dtypes=FLOATS, device=device)
    if z is not None:
        check_tensor(fn, "z", z, shape=x.shape, dims="the shape of x", dtypes=FLOATS, device=device)
    check(fn, eps >= 0, "`eps` must not be negative, got {}", eps)
    group = width if group_size is None else group_size
    check(fn, width == 0 or (group > 0 and width % group == 0),
          "`group_size` is {}, expected a divisor of the last axis ({})", group, width)  # fmt: skip
    return max(group, 1)
