"""Problems of causal_conv1d's kernels, channel-last, and their comparison with the reference."""

import torch
from on_gpu import to

from nemokernels import causal_conv1d_fn, testing
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


def compare_past_two_to_the_31(dim=2048, tokens=1_060_000, device="cuda"):
    """The last tokens of a long row against its end alone, forward and backward."""
    x = torch.randn(1, 64, dim, device=device, dtype=torch.bfloat16)
    x = x.repeat(1, -(-tokens // 64), 1)
    weight = torch.randn(dim, 4, device=device)
    y = causal_conv1d_fn(x.mT, weight, activation="silu")
    end = causal_conv1d_fn(x[:, -100:].mT, weight, initial_states=x[:, -103:-100].mT.contiguous(),
                           activation="silu")  # fmt: skip
    assert torch.equal(y[..., -100:], end)
    dy, none = torch.zeros_like(x), x.new_empty(0, 3, dim)
    dy[:, -100:] = x[:, :100]
    backward = torch.ops.nemokernels.causal_conv1d_backward
    options = weight, None, None, None, None, True
    dx, dweight, dbias, _ = backward(dy, none, x, *options)
    last, *sums, _ = backward(dy[:, -200:], none, x[:, -200:], *options)
    torch.testing.assert_close(dx[:, -200:], last)
    assert (dx[:, :5] == 0).all()
    for got, want in zip((dweight, dbias), sums):
        torch.testing.assert_close(got, want)
