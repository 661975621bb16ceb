"""A Mamba-1 mixer behind its input projection, from the convolution to the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nemokernels._autocast import autocast
from nemokernels._checks import FLOATS, check, check_tensor
from nemokernels.ops.causal_conv1d import causal_conv1d_fn
from nemokernels.ops.rms_norm import rms_norm
from nemokernels.ops.selective_scan import selective_scan_fn

__all__ = ["mamba_inner_fn"]

FN = "mamba_inner_fn"


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """The inner part of a Mamba-1 mixer::

        x, z = halves of xz;  x = silu(causal_conv1d(x))
        steps, B, C = x_proj(x), cut in R, N and N;  delta = delta_proj(steps)
        B, C, delta = their RMSNorms, where a weight for one is given
        out = out_proj(selective_scan(x, delta, A, B, C, D, z))

    Under autocast the three projections run in its dtype; the rest casts nothing.

    Args:
        xz: (B, 2 dim, L), float32, bfloat16, float16 or float64.
        conv1d_weight: (dim, 1, W), W 2, 3 or 4; conv1d_bias: (dim).
        x_proj_weight: (R + 2N, dim), without the N rows of a B or C that is given.
        delta_proj_weight: (dim, R); its bias is ``delta_bias``, (dim).
        out_proj_weight: (E, dim); out_proj_bias: (E).
        A, D, delta_softplus: as in :func:`selective_scan_fn`.
        B, C: instead of the projected ones, as in :func:`selective_scan_fn`.
        B_proj_bias, C_proj_bias: (N), added to the projected B and C.
        checkpoint_lvl: 0 or 1, which mean the same here: the operators keep their own inputs.
        b_rms_weight, c_rms_weight: (N); dt_rms_weight: (dim), for delta before its bias.
        b_c_dt_rms_eps: eps of the three norms.

        The projections have xz's dtype, except under autocast; the others any of those above.

    Returns:
        out (B, L, E), in xz's dtype or autocast's. Gradients flow to every floating-point argument.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.

    Source: Gu and Dao, "Mamba", 2023. Names and argument order are those of
    ``mamba_ssm.ops.selective_scan_interface``, where A may be complex, B and C the same for all
    tokens (here: errors), and the backward passes the three norms by.
    """
    check_tensor(FN, "xz", xz, shape=(None,) * 3, dims="(B, 2 dim, L)", dtypes=FLOATS)
    dim, odd = divmod(xz.shape[1], 2)
    check(FN, not odd, "`xz` has {} channels, expected an even number", xz.shape[1])
    check_tensor(FN, "A", A, shape=(dim, None), dims="(dim, N)", dtypes=FLOATS, device=xz.device)
    check_tensor(FN, "conv1d_weight", conv1d_weight, shape=(dim, 1, None), dims="(dim, 1, W)")
    check(FN, checkpoint_lvl in (0, 1),
          "`checkpoint_lvl` must be 0 or 1, got {}", checkpoint_lvl)  # fmt: skip
    state = A.shape[1]
    check_tensor(FN, "delta_proj_weight", delta_proj_weight, shape=(dim, None), dims="(dim, R)")
    rank = delta_proj_weight.shape[1]
    sizes = (rank, state * (B is None), state * (C is None))
    _check_projections(xz, {
        "x_proj_weight": (x_proj_weight, (sum(sizes), dim), "(R + 2N, dim)"),
        "delta_proj_weight": (delta_proj_weight, (dim, rank), "(dim, R)"),
        "out_proj_weight": (out_proj_weight, (None, dim), "(E, dim)"),
    })  # fmt: skip
    if out_proj_bias is not None:
        shape = out_proj_weight.shape[:1]
        _check_projections(xz, {"out_proj_bias": (out_proj_bias, shape, "(E,)")})
    for name, value, size in (
        ("conv1d_bias", conv1d_bias, dim),
        ("D", D, dim),
        ("delta_bias", delta_bias, dim),
        ("B_proj_bias", B_proj_bias, state),
        ("C_proj_bias", C_proj_bias, state),
        ("b_rms_weight", b_rms_weight, state),
        ("c_rms_weight", c_rms_weight, state),
        ("dt_rms_weight", dt_rms_weight, dim),
    ):
        if value is not None:
            check_tensor(FN, name, value, shape=(size,), dtypes=FLOATS, device=xz.device)
    for name, bias, given in (("B", B_proj_bias, B), ("C", C_proj_bias, C)):
        check(FN, bias is None or given is None,
              "`{}_proj_bias` is of no use where `{}` is given", name, name)  # fmt: skip

    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    steps, projected_B, projected_C = F.linear(x.transpose(1, 2), x_proj_weight).split(sizes, -1)
    delta = F.linear(steps, delta_proj_weight).transpose(1, 2)
    B = _biased(projected_B, B_proj_bias).transpose(1, 2) if B is None else B
    C = _biased(projected_C, C_proj_bias).transpose(1, 2) if C is None else C
    B, C, delta = (
        _normed(t, weight, b_c_dt_rms_eps)
        for t, weight in ((B, b_rms_weight), (C, c_rms_weight), (delta, dt_rms_weight))
    )
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _check_projections(xz: torch.Tensor, expected: dict[str, tuple]) -> None:
    dtype = autocast(xz)[0].dtype
    for name, (value, shape, dims) in expected.items():
        check_tensor(FN, name, value, shape=shape, dims=dims, dtypes=FLOATS, device=xz.device)
        if autocast(value)[0].dtype != dtype:
            raise TypeError(f"{FN}: `{name}` is {value.dtype}, expected {dtype} like `xz`")


def _biased(value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return value if bias is None else value + bias.to(value.dtype)


def _normed(value: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis but one."""
    if weight is None:
        return value
    return rms_norm(value.transpose(-1, -2), weight, eps=eps).transpose(-1, -2)
