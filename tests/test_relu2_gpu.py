"""The Triton kernels of relu2 on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import relu2, use_backend

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("relu2", "triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 17), (300, 21504), (0, 4)])
def test_against_the_reference(shape, dtype):
    x, dy = torch.randn(2, *shape).to(dtype)
    on_gpu.compare(relu2, [x], [dy])
    if x.dim() == 2:
        on_gpu.compare(lambda x: relu2(x.mT), [x], [dy.mT])


def test_graph():
    x, dy = torch.randn(2, 100, 77, device="cuda").bfloat16()

    def run():
        return torch.ops.nemokernels.relu2(x), torch.ops.nemokernels.relu2_backward(dy, x)

    assert on_gpu.same_bits(run(), on_gpu.replay(run))


def test_past_two_to_the_31_elements():
    x = torch.ones((1 << 31) + 77, device="cuda", dtype=torch.bfloat16)
    assert relu2(x)[-100:].sum() == 100
