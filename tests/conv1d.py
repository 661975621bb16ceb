"""Problems of causal_conv1d's kernels, channel-last, and their comparison with the reference."""

import torch
from on_gpu import to

from nemokernels import testing
from nemokernels.ops.causal_conv1d import ref


def compare(kernel, device, function, *args, **launch):
    """``function`` of ``kernel`` on ``device`` against the reference; returns what it gave."""
    name = {"forward": ref.forward, "backward": ref.backward}[function]
    exact = name(*testing.to_double(args))
    low = name(*args)
    got = getattr(kernel, function)(*to(device, args), **launch)
    for i, (a, want, plain) in enumerate(zip(got, exact, low)):
        assert a.dtype == plain.dtype and a.is_contiguous()
        testing.assert_matches(a, want, plain, f"{function} output {i}")
    return got


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def ids_of(batch, tokens):
    """Runs of lengths 1, 2, 3, ...; the third of every four is padding."""
    runs = torch.repeat_interleave(torch.arange(tokens + 1), torch.arange(1, tokens + 2))[:tokens]
    ids = torch.where(runs % 4 == 2, -1, runs).int()
    return torch.stack([ids.roll(b) for b in range(batch)])


def problem(batch, tokens, dim, width, dtype, mode="rows", weight_dtype=None, initial=True):
    x, dy = torch.randn(2, batch, tokens, dim).to(dtype)
    weight = torch.randn(dim, width).to(weight_dtype or dtype)
    bias = torch.randn(dim).to(weight_dtype or dtype)
    seq_idx = ids_of(batch, tokens) if mode == "seq_idx" else None
    cu, sequences = None, batch
    if mode == "cu_seqlens":
        cuts = [0, 1, 1, 3, 4, tokens // 2, tokens // 2, tokens - 2]
        cu = ints(sorted(min(max(c, 0), tokens) for c in cuts))
        sequences = len(cuts) - 1
    states = torch.randn(sequences, width - 1, dim).to(dtype) if initial else None
    return x, weight, bias, seq_idx, states, cu, dy
