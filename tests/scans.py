"""Inputs of the chunk scan's operator for the tests of its kernels."""

import torch

INPUTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")


def inputs(batch=1, length=37, heads=2, width=16, groups=1, state=16, dtype=torch.float32,
           without=(), per_channel=False, seq_idx=None, cu_seqlens=None):  # fmt: skip
    """Inputs of the operator by name; x, B, C and z are slices of wider tensors."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype)

    wide = torch.float32
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shared = randn(batch, length, heads * width + 2 * groups * state + 8)
    x, B, C, _ = shared.split([heads * width, *[groups * state] * 2, 8], -1)
    made = dict(
        x=x.unflatten(-1, (heads, width)),
        dt=randn(batch, length, heads) / 2,
        A=-1 - 15 * torch.rand(heads),
        B=B.unflatten(-1, (groups, state)),
        C=C.unflatten(-1, (groups, state)),
        D=randn(heads, width, dtype=wide) if per_channel else randn(heads, dtype=wide),
        z=randn(batch, heads, length, width).transpose(1, 2),
        dt_bias=torch.exp(torch.rand(heads) * 4.6 - 6.9).expm1().log(),
        initial_states=randn(rows, heads, width, state).to(wide),
        seq_idx=None if seq_idx is None else torch.tensor(seq_idx).int().expand(batch, length),
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens).int(),
    )
    return {**made, **dict.fromkeys(without)}
