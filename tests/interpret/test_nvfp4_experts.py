"""The CUDA leg of experts in NVFP4: csrc, built for the host, multiplies; Triton adds up slots."""

import pytest
import torch

from nemokernels import _backends
from nemokernels.ops.moe_experts import kernel
from nemokernels.ops.nvfp4_gemm import native, op, ref

CPU = torch.device("cpu")
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True])
def test_the_leg_has_the_bits_of_its_parts(host_library, monkeypatch, dtype, apart):
    """The weights of the route are float32 or float64, and may lie apart."""
    monkeypatch.setattr(_backends, "usable", lambda family, device: ("csrc",))
    up, down = (op._example_experts_weights(CPU, *s) for s in ((32, 160), (160, 32)))
    offsets = torch.tensor([5, 5, 139, 150], dtype=torch.int32)
    weights = torch.rand(75, 2, dtype=dtype)
    weights = weights.t().contiguous().t() if apart else weights
    scale = torch.full((4,), 3 / ref.LARGEST)
    args = (torch.randn(75, 160).bfloat16(), scale[:1], *up, 2 * scale, *down, weights, offsets,
            torch.randperm(150).int())  # fmt: skip
    want, widths, slot_sum = ref.compose(native.grouped_product, *args), [], kernel.slot_sum

    def noted(rows, weights, out, row_of):
        widths.append(out.shape[1])
        slot_sum(rows, weights, out, row_of=row_of)

    monkeypatch.setattr(kernel, "slot_sum", noted)
    assert want.any(1).all() and torch.equal(op.experts.redispatch(KEYS, *args), want)
    assert torch.equal(op.by_kernels(*op._contiguous(args), slot_bytes=1), want)
    assert widths == [160, 128, 32]
