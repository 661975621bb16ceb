"""The Triton kernels of causal_conv1d on a GPU."""

import conv1d
import on_gpu
import pytest
import torch
from conv1d import ints, problem

from nemokernels import causal_conv1d_fn, causal_conv1d_update, testing, use_backend
from nemokernels.ops.causal_conv1d import kernel, op, ref

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("causal_conv1d", "triton"):
        yield


def config(batch, tokens, dim, dtype):
    return op.plan(batch, tokens, dim, (dtype,), ("triton",), 132)


@pytest.mark.parametrize("mode", ["rows", "seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tokens, dim", [(1, 8), (37, 64), (300, 10240 + 24)])
def test_forward_and_backward(tokens, dim, mode, width, dtype):
    batch = 1 if mode == "cu_seqlens" else 2
    x, weight, bias, *packing, dy = problem(batch, tokens, dim, width, dtype, mode)
    args, launch = (x, weight, bias, *packing, True), config(batch, tokens, dim, dtype)
    _, states = conv1d.compare(kernel, "cuda", "forward", *args, True, config=launch)
    final = torch.randn(states.shape).to(dtype)
    conv1d.compare(kernel, "cuda", "backward", dy, final, *args, config=launch)


@pytest.mark.parametrize("mode", ["plain", "ring", "speculative"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_update(mode, width, dtype):
    x, state = torch.randn(4, 3, 700).to(dtype), torch.randn(6, 700, width + 1).to(dtype)
    weight, position, slots = torch.randn(700, width), ints([0, 7, 2, 1]), ints([5, -1, 0, 3])
    args = (weight, None, True, position if mode == "ring" else None, slots,
            position if mode == "speculative" else None)  # fmt: skip
    plain, exact_state, native = state.clone(), state.double(), state.cuda()
    low = ref.update(x, plain, *args)
    exact = ref.update(x.double(), exact_state, *testing.to_double(args))
    got = kernel.update(x.cuda(), native, *on_gpu.to("cuda", args), config=config(4, 3, 700, dtype))
    testing.assert_matches(got, exact, low)
    assert torch.equal(native.cpu(), plain)


def test_same_bits_and_graph_replay():
    x, weight, bias, _, initial, cu, dy = on_gpu.to("cuda", problem(1, 900, 520, 4, BF16,
                                                                    "cu_seqlens"))  # fmt: skip

    def step():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, initial)]
        y, states = causal_conv1d_fn(leaves[0].mT, leaves[1], leaves[2], None, leaves[3].mT, True,
                                     activation="silu", cu_seqlens=cu)  # fmt: skip
        return [y, states, *torch.autograd.grad([y, states], leaves, [dy.mT, states])]

    assert on_gpu.same_bits(step(), step())
    assert on_gpu.same_bits(on_gpu.replay(step), step())


def test_more_than_2_31_elements():
    conv1d.compare_past_two_to_the_31()
    x, weight = torch.randn(1, 2048, device="cuda").to(BF16), torch.randn(2048, 4, device="cuda")
    state = torch.zeros(1, 2048, 4, device="cuda", dtype=BF16)
    assert causal_conv1d_update(x, state, weight).shape == (1, 2048)
