"""The Triton kernel of mamba_step on a GPU."""

import mamba_steps
import on_gpu
import pytest
import torch

from nemokernels import mamba_step, testing, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("mamba_step", "triton"):
        yield


def compare(problem, device="cuda"):
    """y and both states on the device against the reference on the CPU."""
    plain, exact = problem.clone(), problem.clone(double=True)
    native = problem.map(lambda t: t.to(device))
    low, want = mamba_step(**plain.keywords()), mamba_step(**exact.keywords())
    got = mamba_step(**native.keywords())
    testing.assert_matches(got, want, low, "y")
    testing.assert_matches(native.ssm_state, exact.ssm_state, plain.ssm_state, "ssm_state")
    assert torch.equal(native.conv_state.cpu(), plain.conv_state)


@pytest.mark.parametrize("state_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("H, P, N, tokens", [(64, 64, 128, 1), (96, 80, 128, 2), (128, 64, 128, 4),
                                             (16, 64, 256, 1)])  # fmt: skip
def test_real_shapes(H, P, N, tokens, state_dtype):
    compare(mamba_steps.problem(5, tokens, H, P, N, 8, dtype=BF16, state_dtype=state_dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 7, 5, 1), (6, 33, 17, 3), (8, 5, 33, 2)])
@pytest.mark.parametrize("tokens, width", [(1, 2), (3, 3), (5, 4)])
def test_sizes(sizes, tokens, width, dtype):
    compare(mamba_steps.problem(4, tokens, *sizes, width, dtype=dtype, limits=(0.1, 2.0)))


def test_same_inputs_same_bits():
    """Programs of a group read and write one ring: any order must give the same."""
    problem = mamba_steps.problem(6, 4, 64, 64, 128, 8, dtype=BF16).map(lambda t: t.cuda())
    runs = []
    for _ in range(20):
        own = problem.clone()
        runs.append((mamba_step(**own.keywords()), own.ssm_state, own.conv_state))
    assert all(on_gpu.same_bits(runs[0], other) for other in runs)


def test_graph_replay():
    problem = mamba_steps.problem(4, 2, dtype=BF16).map(lambda t: t.cuda())
    eager = problem.clone()
    want = mamba_step(**eager.keywords())
    start = problem.clone()

    def step():
        problem.conv_state.copy_(start.conv_state)
        problem.ssm_state.copy_(start.ssm_state)
        return mamba_step(**problem.keywords())

    assert torch.equal(on_gpu.replay(step), want)
    assert torch.equal(problem.ssm_state, eager.ssm_state)


def test_more_than_2_31_elements():
    """The last slots of a cache past 2**31 elements equal those of a small one."""
    H, P, N, slots = 64, 64, 128, 4200
    problem = mamba_steps.problem(2, 1, H, P, N, 8, dtype=BF16, state_dtype=BF16)
    problem.slots = torch.tensor([0, 3], dtype=torch.int32)
    small = problem.map(lambda t: t.cuda())
    large = small.clone()
    large.ssm_state = torch.zeros(slots, 1, H, P, N, dtype=BF16, device="cuda")
    large.conv_state = torch.zeros(slots, *small.conv_state.shape[1:], dtype=BF16, device="cuda")
    assert large.ssm_state.numel() > 2**31
    large.ssm_state[-4:], large.conv_state[-4:] = small.ssm_state, small.conv_state
    large.slots = small.slots + slots - 4
    assert torch.equal(mamba_step(**large.keywords()), mamba_step(**small.keywords()))
    assert torch.equal(large.ssm_state[-4:], small.ssm_state)
