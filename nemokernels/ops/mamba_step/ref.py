"""A Mamba-2 layer's decode step in plain torch: the specification and the CPU leg.

B rows of T tokens, W taps, H heads of size P, G groups, N state size, C = H*P + 2*G*N channels,
L entries of a convolution ring, M states of a slot. It is the composition of the convolution and
the state update with their cast points: convolved values are rounded to the dtype of xBC; dt,
recurrence and gate are in the accumulation dtype.
"""

from __future__ import annotations

import torch

from nemokernels._activations import softplus
from nemokernels._checks import check
from nemokernels._registry import acc_dtype
from nemokernels.ops.causal_conv1d import ref as conv1d
from nemokernels.ops.state_update import ref as state_update

FN = "mamba_step"


def forward(
    xBC: torch.Tensor,
    dt: torch.Tensor,
    z: torch.Tensor | None,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    groups: int,
    dt_min: float,
    dt_max: float,
    seed: torch.Tensor | None,
    philox_rounds: int,
) -> torch.Tensor:
    """Advance both states by T tokens per row; returns y (B, T, H, P)."""
    rows, tokens, _ = xBC.shape
    held, M, H, P, N = ssm_state.shape
    y = xBC.new_zeros(rows, tokens, H, P)
    live, slots, lengths = _live(slots, lengths, held)
    if not live.numel() or not tokens:
        return y
    xBC, dt = xBC[live], dt[live]
    convolved = _convolve(xBC, conv_state, conv_weight, conv_bias, lengths, slots)
    x, B, C = convolved.split([H * P, groups * N, groups * N], -1)

    acc = torch.promote_types(acc_dtype(ssm_state), acc_dtype(xBC))
    d = dt.to(acc)
    d = softplus(d if dt_bias is None else d + dt_bias.to(acc)).clamp(dt_min, dt_max)

    # Every row's states on a strip of its own: where it starts, then one per token.
    count = live.numel()
    strip = ssm_state.new_zeros(count, tokens + 1, H, P, N, dtype=acc)
    begun = lengths > 0
    strip[begun, 0] = ssm_state[slots[begun], (lengths[begun] - 1) % M].to(acc)
    places = torch.arange(count * (tokens + 1), device=xBC.device).view(count, tokens + 1)
    y[live] = state_update.forward(
        strip.flatten(0, 1),
        x.reshape(-1, H, P),
        d.reshape(-1, H, 1),
        A[:, None, None],
        B.reshape(-1, groups, N),
        C.reshape(-1, groups, N),
        None if D is None else D[:, None],
        None if z is None else z[live].reshape(-1, H, P),
        None,
        False,
        places[:, 0],
        places[:, 1:],
        None,
        torch.arange(0, count * tokens + 1, tokens, device=xBC.device),
        None,
        philox_rounds,
    ).view(count, tokens, H, P)
    for t in range(tokens):
        place = (lengths + t) % M
        ssm_state[slots, place] = state_update.rounded(
            strip[:, t + 1], slots * M + place, ssm_state.dtype, seed, philox_rounds
        )
    return y


def _live(slots, lengths, held):
    slots = torch.arange(lengths.shape[0], device=lengths.device) if slots is None else slots
    live = (slots >= 0).nonzero()[:, 0]
    slots, lengths = slots[live].long(), lengths[live].long()
    check(FN, len(set(slots.tolist())) == slots.numel(),
          "`slots` must not repeat a slot, got {}", slots.tolist())  # fmt: skip
    check(FN, not slots.numel() or int(slots.max()) < held,
          "`slots` holds {}, expected below {}", slots.tolist(), held)  # fmt: skip
    check(FN, not lengths.numel() or int(lengths.min()) >= 0,
          "`lengths` must not be negative, got {}", lengths.tolist())  # fmt: skip
    return live, slots, lengths


def _convolve(xBC, conv_state, weight, bias, lengths, slots):
    """The convolution and SiLU of xBC after what the ring holds, and xBC into the ring."""
    width, L = weight.shape[1], conv_state.shape[2]
    before = lengths[:, None] + torch.arange(1 - width, 0, device=xBC.device)
    history = conv_state[slots[:, None], :, before % L]
    history = torch.where((before >= 0)[..., None], history, 0)
    y, _ = conv1d.forward(xBC, weight, bias, None, history, None, True, False)
    new = lengths[:, None] + torch.arange(xBC.shape[1], device=xBC.device)
    conv_state[slots[:, None], :, new % L] = xBC
    return y
