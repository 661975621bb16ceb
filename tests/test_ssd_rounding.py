import pytest
import torch

from nemokernels import mamba_chunk_scan_combined as scan


@pytest.mark.parametrize("state_dtype", [None, torch.float16, torch.float32])
def test_rounds_where_it_says(state_dtype):
    """One token per head, so that every formula is a few scalars with their casts in place.

    A second token, all zero but for its step, makes the decay to the end of the chunk differ from
    one. A float32 sum in another order flips about one bfloat16 rounding in 10^4; a cast left out,
    added or moved changes every second result.
    """
    n = 4096
    x, B, C, dy = torch.randn(4, n).bfloat16().float()
    D, S, G = torch.randn(3, n)
    (d, d2), A = torch.rand(2, n) + 0.1, -torch.rand(n)

    def low(v, dtype=torch.bfloat16):
        return v.to(dtype).float()

    def state(v):
        return low(v, state_dtype or torch.bfloat16)

    e, w, score, inner = (d * A).exp(), (d2 * A).exp(), C * B, dy * x * d
    through = w * B * state(G)
    u = through + low(score) * dy
    kept = e * w * G * S
    ddecay = dy * e * C * state(S) + kept
    y = low(score * d) * x + e * C * state(S) + D * x
    final = e * w * S + x * low(B * (w * d))
    dA = ddecay * d + (kept + d * x * through) * d2
    dB = x * (w * d) * state(G) + low(inner) * C
    dC = dy * e * state(S) + low(inner) * B
    dS = e * w * G + low(dy * e) * C

    def tokens(first, second=0.0):
        second = torch.as_tensor(second).expand(n)
        return torch.stack([first, second])[None]

    args = [tokens(x)[..., None].bfloat16(), tokens(d, d2), A, tokens(B)[..., None].bfloat16(),
            tokens(C)[..., None].bfloat16(), D, S.view(1, n, 1, 1)]  # fmt: skip
    args = [a.requires_grad_() for a in args]
    outs = scan(*args[:5], 2, D=args[5], initial_states=args[6], return_final_states=True,
                state_dtype=state_dtype)  # fmt: skip
    grads = torch.autograd.grad(outs, args, [tokens(dy)[..., None].bfloat16(), G.view(1, n, 1, 1)])
    want = [y, final, d * u + D * dy, u * x + ddecay * A, dA, dB, dC, dy * x, dS]
    for got, exact in zip((*outs, *grads), want):
        got = got[:, 0].flatten() if got.shape[1:2] == (2,) else got.flatten()
        slack = 1e-4 * exact.abs() if got.dtype == torch.float32 else 0
        wrong = (got.float() - exact.to(got.dtype).float()).abs() > slack
        assert wrong.float().mean() < 0.01
