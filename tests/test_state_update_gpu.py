"""The Triton kernel of selective_state_update on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import selective_state_update, testing, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("state_update", "triton"):
        yield


def problem(tokens, H, P=64, N=128, G=8, dtype=BF16):
    """Decode inputs of a Mamba-2 layer: x, B and C slices of one projection, the rest per head."""
    wide = torch.randn(tokens, H * P + 2 * G * N).to(dtype)
    x, B, C = wide.split((H * P, G * N, G * N), 1)
    A = -torch.rand(H) * 4 - 0.1
    dt_bias, D = torch.randn(2, H)
    return dict(
        x=x.unflatten(1, (H, P)), dt=torch.randn(tokens, H, 1).to(dtype).expand(-1, -1, P),
        A=A[:, None, None].expand(H, P, N), B=B.unflatten(1, (G, N)), C=C.unflatten(1, (G, N)),
        D=D[:, None].expand(H, P), z=torch.randn(tokens, H, P).to(dtype),
        dt_bias=dt_bias[:, None].expand(H, P), dt_softplus=True,
    )  # fmt: skip


def compare(state, args, device="cuda", **seeded):
    """y and the states on the device against the reference on the CPU."""
    plain, exact, native = state.clone(), state.double(), state.to(device)
    low = selective_state_update(plain, **args, **seeded)
    want = selective_state_update(exact, **testing.to_double(args))
    got = selective_state_update(native, **on_gpu.to(device, args), **seeded)
    testing.assert_matches(got, want, low, "y")
    testing.assert_matches(native, exact, plain, "state")


@pytest.mark.parametrize("state_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("batch, H", [(1, 64), (8, 64), (64, 128)])
def test_decode(batch, H, state_dtype):
    args = problem(batch, H)
    slots = torch.randperm(batch + 3)[:batch].int()
    slots[batch // 2] = slots[batch // 2] if batch == 1 else -1
    compare(torch.randn(batch + 3, H, 64, 128).to(state_dtype),
            dict(args, state_batch_indices=slots))  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(3, 4, 6, 10, 2), (2, 1, 1, 1, 1), (5, 8, 80, 96, 4),
                                   (2, 2, 17, 256, 1)])  # fmt: skip
def test_sizes(shape, dtype):
    batch, H, P, N, G = shape
    args = problem(batch, H, P, N, G, dtype)
    compare(torch.randn(batch, H, P, N), args)
    args.update(dt=torch.randn(batch, H, P), A=-torch.rand(H, P, N), D=None, z=None)
    compare(torch.randn(batch, H, P, N), args)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_speculation(dtype):
    """Four tokens each, every one in a slot of its own, then from the last accepted one."""
    args = problem(48, 64)
    args.update(
        state_batch_indices=torch.randperm(60)[:48].view(12, 4).int(),
        num_accepted_tokens=torch.randint(0, 5, (12,), dtype=torch.int32),
        cu_seqlens=torch.arange(0, 49, 4, dtype=torch.int32),
    )
    compare(torch.randn(60, 64, 64, 128).to(dtype), args)


@pytest.mark.parametrize("state_dtype", [BF16, F16])
@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1])
def test_stochastic_rounding(seed, state_dtype):
    """Exact sums, so that bits are decided by the random numbers alone."""
    H, P, N = 8, 64, 128
    args = problem(6, H, P, N, 1, F16)
    args.update(dt=torch.ones(6, H, 1), A=torch.zeros(H, 1, 1), dt_bias=None, dt_softplus=False)
    state = torch.randn(9, H, P, N).to(state_dtype)
    native = state.cuda()
    slots = torch.tensor([8, 1, 2, 5, 0, 3])
    selective_state_update(state, **args, state_batch_indices=slots, seed=seed)
    args = on_gpu.to("cuda", args)
    selective_state_update(native, **args, state_batch_indices=slots.cuda(), seed=seed)
    assert torch.equal(native.cpu(), state)


def test_graph():
    args = on_gpu.to("cuda", problem(8, 64))
    start = torch.randn(8, 64, 64, 128, device="cuda")
    state = start.clone()

    def run():
        state.copy_(start)
        return selective_state_update(state, **args), state

    first = [t.clone() for t in run()]
    assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_past_two_to_the_31_elements():
    slots, H = (1 << 31) // (64 * 64 * 128) + 2, 64
    state = torch.zeros(slots, H, 64, 128, device="cuda", dtype=BF16)
    args = on_gpu.to("cuda", problem(1, H))
    last = torch.tensor([slots - 1], device="cuda")
    y = selective_state_update(state, **args, state_batch_indices=last)
    small = torch.zeros(1, H, 64, 128, device="cuda", dtype=BF16)
    assert torch.equal(selective_state_update(small, **args), y)
    assert torch.equal(small[0], state[-1]) and (state[:-1] == 0).all()
