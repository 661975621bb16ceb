"""FP8: quantisation with and without the transpose, and the linear layer it serves."""

from functools import partial

import torch

from nemokernels import fp8_linear, quantize_fp8
from nemokernels.bench.rows import Subject
from nemokernels.ops.fp8 import cost

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def scaled(make, *shape):
    """Random numbers and the scale that fills E4M3 with them (five sigma)."""
    return make.randn(*shape), make.tensor([LARGEST / 5], torch.float32)


def codes(x, scale):
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(E4M3)


def inputs(make, rows, width, *, transpose):
    x, scale = scaled(make, rows, width)
    return dict(x=x, scale=scale, transpose=transpose)


def ours(x, scale, transpose):
    return quantize_fp8(x, scale, transpose=transpose)


def eager(x, scale, transpose):
    q, amax = codes(x, scale), x.abs().amax().float()
    return (q, amax, q.t().contiguous()) if transpose else (q, amax)


def inputs_linear(make, M, K, N):
    (x, x_scale), (w, w_scale) = scaled(make, M, K), scaled(make, N, K)
    return dict(x=x, weight=w, x_scale=x_scale, w_scale=w_scale)


def ours_linear(x, weight, x_scale, w_scale):
    return fp8_linear(x, weight, x_scale=x_scale, w_scale=w_scale)


def eager_linear(x, weight, x_scale, w_scale):
    return torch._scaled_mm(
        codes(x, x_scale), codes(weight, w_scale).t(), scale_a=1 / x_scale, scale_b=1 / w_scale,
        out_dtype=x.dtype, use_fast_accum=True,
    )  # fmt: skip


class EagerLinear(torch.autograd.Function):
    """The same with a backward, whose products read transposed codes."""

    @staticmethod
    def forward(ctx, x, weight, x_scale, w_scale):
        x8, w8 = codes(x, x_scale), codes(weight, w_scale)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        return torch._scaled_mm(x8, w8.t(), scale_a=1 / x_scale, scale_b=1 / w_scale,
                                out_dtype=x.dtype, use_fast_accum=True)  # fmt: skip

    @staticmethod
    def backward(ctx, dy):
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        scale = 57344 / dy.abs().amax().float()
        dy8 = (dy.float() * scale).to(torch.float8_e5m2)
        options = dict(scale_a=1 / scale, out_dtype=dy.dtype)
        dx = torch._scaled_mm(dy8, w8.t().contiguous().t(), scale_b=1 / w_scale, **options)
        dw = torch._scaled_mm(dy8.t().contiguous(), x8.t().contiguous().t(), scale_b=1 / x_scale,
                              **options)  # fmt: skip
        return dx, dw, None, None


def eager_trained(x, weight, x_scale, w_scale):
    return EagerLinear.apply(x, weight, x_scale, w_scale)


def quantise(title, transpose):
    return Subject("fp8", title, inputs=partial(inputs, transpose=transpose), ours=ours,
                   eager=eager, kept=("scale",), tiny=dict(rows=3, width=32))  # fmt: skip


QUANTIZE = quantise("quantize_fp8", False)
TRANSPOSE = quantise("quantize_fp8 with transpose", True)
linear = dict(inputs=inputs_linear, ours=ours_linear, tiny=dict(M=32, K=48, N=16),
              kept=("x_scale", "w_scale"))  # fmt: skip
LINEAR = Subject("fp8", "fp8_linear", eager=eager_linear, **linear)
TRAINED = Subject("fp8", "fp8_linear", eager=eager_trained, wrt=("x", "weight"), **linear)

ROWS = []
for width in (4096, 21504):
    shape = dict(rows=16384, width=width)
    for subject, transpose in ((QUANTIZE, False), (TRANSPOSE, True)):
        counted = cost.quantize(16384 * width, 2, transpose)
        ROWS.append(subject.row(f"16384 x {width}", cost=counted, quick=width == 4096, **shape))
for K, N in ((4096, 18560), (4096, 21504), (2688, 10304)):
    shape = dict(M=16384, K=K, N=N)
    label, quick = f"16384 x {K} to {N}", N == 18560
    ROWS.append(LINEAR.row(label, cost=cost.linear(**shape, itemsize=2), quick=quick, **shape))
    ROWS.append(TRAINED.row(label, "backward", cost=cost.linear_backward(**shape, itemsize=2),
                            quick=quick, **shape))  # fmt: skip


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
