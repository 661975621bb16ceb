"""FP8: quantisation with and without the transpose, and the linear layer it serves."""

import functools

import torch
import torch.nn.functional as F

from nemokernels import delayed_scaling_update, fp8_linear, quantize_fp8
from nemokernels.bench.rows import Subject
from nemokernels.ops.fp8 import cost

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def scaled(make, *shape):
    """Random numbers and the scale that fills E4M3 with them (five sigma)."""
    return make.randn(*shape), make.tensor([LARGEST / 5], torch.float32)


def codes(x, scale):
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(E4M3)


def inputs(make, rows, width, *, transpose, squared_relu):
    x, scale = scaled(make, rows, width)
    if squared_relu:
        scale = scale / 5
    return dict(x=x, scale=scale, transpose=transpose, squared_relu=squared_relu)


def ours(x, scale, transpose, squared_relu):
    return quantize_fp8(x, scale, transpose=transpose, squared_relu=squared_relu)


def eager(x, scale, transpose, squared_relu):
    x = F.relu(x).square() if squared_relu else x
    q, amax = codes(x, scale), x.abs().amax().float()
    return (q, amax, q.t().contiguous()) if transpose else (q, amax)


def inputs_linear(make, M, K, N):
    (x, x_scale), (w, w_scale) = scaled(make, M, K), scaled(make, N, K)
    return dict(x=x, weight=w, x_scale=x_scale, w_scale=w_scale, x8=codes(x, x_scale),
                w8=codes(w, w_scale))  # fmt: skip


def ours_linear(x, weight, x_scale, w_scale, x8, w8):
    return fp8_linear(x, weight, x_scale=x_scale, w_scale=w_scale)


def product(x8, w8, x_scale, w_scale, dtype):
    return torch._scaled_mm(x8, w8.t(), scale_a=1 / x_scale, scale_b=1 / w_scale, out_dtype=dtype,
                            use_fast_accum=True)  # fmt: skip


def eager_linear(x, weight, x_scale, w_scale, x8, w8):
    return product(codes(x, x_scale), codes(weight, w_scale), x_scale, w_scale, x.dtype)


def bare():
    """The product of operands that were quantised before: what the layer's overhead is over."""
    return lambda x, weight, x_scale, w_scale, x8, w8: product(x8, w8, x_scale, w_scale, x.dtype)


def unquantised():
    return lambda x, weight, x_scale, w_scale, x8, w8: F.linear(x, weight)


def transformer_engine():
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    @functools.cache
    def layer(N, K):
        return te.Linear(K, N, bias=False, params_dtype=torch.bfloat16, device="cuda")

    def run(x, weight, x_scale, w_scale, x8, w8):  # its scales are those of the tensors
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            return torch.func.functional_call(layer(*weight.shape), {"weight": weight}, (x,))

    return run


class EagerLinear(torch.autograd.Function):
    """The same with a backward, whose products read transposed codes."""

    @staticmethod
    def forward(ctx, x, weight, x_scale, w_scale):
        x8, w8 = codes(x, x_scale), codes(weight, w_scale)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        return product(x8, w8, x_scale, w_scale, x.dtype)

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


def eager_trained(x, weight, x_scale, w_scale, x8, w8):
    return EagerLinear.apply(x, weight, x_scale, w_scale)


def quantise(title, transpose=False, squared_relu=False):
    make_inputs = functools.partial(inputs, transpose=transpose, squared_relu=squared_relu)
    return Subject("fp8", title, inputs=make_inputs, ours=ours, eager=eager, kept=("scale",),
                   tiny=dict(rows=3, width=32))  # fmt: skip


def inputs_update(make, columns, length):
    history = make.rand(length, columns, dtype=torch.float32)
    return dict(scale=make.rand(columns, dtype=torch.float32), history=history)


def ours_update(scale, history):
    delayed_scaling_update(scale, history)
    return scale, history


def eager_update(scale, history):
    """Of tensors that were all used, as the random ones are."""
    scale.copy_(LARGEST / history.amax(0))
    rolled = history.roll(-1, 0)
    rolled[0] = 0
    history.copy_(rolled)
    return scale, history


QUANTIZE = {
    False: [quantise("quantize_fp8"), quantise("quantize_fp8 of relu2", squared_relu=True)],
    True: [
        quantise("quantize_fp8 with transpose", transpose=True),
        quantise("quantize_fp8 of relu2 with transpose", transpose=True, squared_relu=True),
    ],
}
linear = dict(inputs=inputs_linear, ours=ours_linear, tiny=dict(M=32, K=48, N=16),
              kept=("x_scale", "w_scale"))  # fmt: skip
LINEAR = Subject(
    "fp8",
    "fp8_linear",
    eager=eager_linear,
    peers={"scaled_mm": bare, "linear": unquantised, "transformer_engine": transformer_engine},
    **linear,
)
TRAINED = Subject(
    "fp8",
    "fp8_linear",
    eager=eager_trained,
    wrt=("x", "weight"),
    peers={"linear": unquantised, "transformer_engine": transformer_engine},
    **linear,
)

UPDATE = Subject(
    "fp8", "delayed_scaling_update", inputs=inputs_update, ours=ours_update, eager=eager_update,
    mutates=("scale", "history"), kept=("scale", "history"), tiny=dict(columns=5, length=4),
)  # fmt: skip

ROWS = []
for width in (4096, 21504):
    shape = dict(rows=16384, width=width)
    for transpose, subjects in QUANTIZE.items():
        counted = cost.quantize(16384 * width, 2, transpose)
        for subject in subjects:
            ROWS.append(subject.row(f"16384 x {width}", cost=counted, quick=width == 4096, **shape))
for K, N in ((4096, 18560), (4096, 21504), (2688, 10304)):
    shape = dict(M=16384, K=K, N=N)
    label, quick = f"16384 x {K} to {N}", N == 18560
    ROWS.append(LINEAR.row(label, cost=cost.linear(**shape, itemsize=2), quick=quick, **shape))
    ROWS.append(TRAINED.row(label, "backward", cost=cost.linear_backward(**shape, itemsize=2),
                            quick=quick, **shape))  # fmt: skip
    ROWS.append(TRAINED.row(label, "both", cost=cost.linear_both(**shape, itemsize=2), **shape))

# Input, weight and gradient of Nemotron-H 8B's 112 linear layers.
ROWS.append(UPDATE.row("h8b 1024 steps", cost=cost.update(336, 1024), columns=336, length=1024))


def test_bench(benchmark, row, measure):
    measure(benchmark, row)
