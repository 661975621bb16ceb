"""What a user finds who changes the import line from mamba_ssm or causal_conv1d: names, arguments.

The functions that these names have beside others of ours are tested here too.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

import nemokernels
from nemokernels import (
    RMSNormGated,
    causal_conv1d_ref,
    rms_norm_fn,
    rmsnorm_fn,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
    testing,
)

F64, INF = torch.float64, float("inf")
SCAN = dict(D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False)
STEP = dict(D=None, z=None, dt_bias=None, dt_softplus=False)
CONV = dict(bias=None, seq_idx=None, initial_states=None, return_final_states=False,
            final_states_out=None, activation=None)  # fmt: skip
UPDATE = dict(bias=None, activation=None, cache_seqlens=None)
GATED = dict(z=None, eps=1e-6, group_size=None, norm_before_gate=True)
# name -> arguments without a default there, then those with one
PUBLISHED = {
    "causal_conv1d_fn": ("x weight", CONV),
    "causal_conv1d_update": ("x conv_state weight", {**UPDATE, "conv_state_indices": None}),
    "causal_conv1d_update_ref": ("x conv_state weight", UPDATE),
    "causal_conv1d_varlen_states": ("x cu_seqlens state_len", {}),
    "causal_conv1d_varlen_states_ref": ("x cu_seqlens state_len", {}),
    "causal_conv1d_ref": ("x weight", dict(bias=None, initial_states=None,
        return_final_states=False, final_states_out=None, activation=None)),
    "mamba_chunk_scan_combined": ("x dt A B C chunk_size", dict(
        D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False,
        return_varlen_states=False, state_dtype=None)),
    "mamba_split_conv1d_scan_combined": (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size", dict(
        initial_states=None, seq_idx=None, dt_limit=(0.0, INF), return_final_states=False,
        activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
        outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None)),
    "mamba_inner_fn": (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight "
        "out_proj_bias A", dict(
        B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None,
        delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
        dt_rms_weight=None, b_c_dt_rms_eps=1e-6)),
    "selective_scan_fn": ("u delta A B C", SCAN),
    "selective_scan_ref": ("u delta A B C", SCAN),
    "selective_state_update": ("state x dt A B C", {**STEP, "state_batch_indices": None}),
    "selective_state_update_ref": ("state x dt A B C", STEP),
    "rmsnorm_fn": ("x weight bias", GATED),
    "rms_norm_fn": ("x weight bias", dict(
        residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
        prenorm=False, residual_in_fp32=False, return_dropout_mask=False)),
    "RMSNormGated": ("hidden_size", dict(
        eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_are_the_published_ones(name):
    """In their order, with their defaults; what we have beside them comes after."""
    ours = list(inspect.signature(getattr(nemokernels, name)).parameters.values())
    needed, optional = PUBLISHED[name]
    needed = needed.split()
    count = len(needed) + len(optional)
    assert [p.name for p in ours[:count]] == [*needed, *optional]
    assert {p.name: p.default for p in ours[len(needed) : count]} == optional
    assert all(p.default is not p.empty for p in ours[count:])


def randn(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64).to(dtype)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# rms_norm_fn


def normed(s, weight, eps=1e-6):
    return s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 3, 7)])
def test_rms_norm_fn(shape):
    x, residual, weight = randn(*shape), randn(*shape), randn(shape[-1])
    same(rms_norm_fn(x, weight, None), normed(x, weight))
    same(rms_norm_fn(x, weight, None, eps=0.2), normed(x, weight, 0.2))
    same(rms_norm_fn(x, weight, None, residual, eps=0.1), normed(x + residual, weight, 0.1))
    y, total = rms_norm_fn(x, weight, None, residual, prenorm=True)
    same((y, total), (normed(x + residual, weight), x + residual))


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_fn_gradients(prenorm, with_residual):
    leaves = [randn(2, 5), randn(5)] + [randn(2, 5)] * with_residual
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call(x, weight, residual=None):
        return rms_norm_fn(x, weight, None, residual, prenorm=prenorm)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_the_stream_begins(dtype):
    """residual_in_fp32 is about a stream that does not exist yet."""
    x, weight = randn(3, 8, dtype=dtype), randn(8, dtype=dtype)
    y, total = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert y.dtype == dtype and total.dtype == torch.float32 and torch.equal(total, x.float())
    assert torch.equal(y, nemokernels.rms_norm(x, weight, eps=1e-6))
    assert rms_norm_fn(x, weight, None, prenorm=True)[1].dtype == dtype
    y, again = rms_norm_fn(y, weight, None, total, prenorm=True, residual_in_fp32=True)
    assert y.dtype == dtype and again.dtype == torch.float32
    low = randn(3, 8, dtype=torch.bfloat16)
    assert rms_norm_fn(x, weight, None, low, prenorm=True, residual_in_fp32=True)[1].dtype == (
        torch.bfloat16
    )
    wide = rms_norm_fn(x.double(), weight, None, prenorm=True, residual_in_fp32=True)[1]
    assert wide.dtype == F64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [(dict(zip([name], [torch.ones(4)])), ValueError, f"`{name}` is not supported")
     for name in ("bias", "x1", "weight1", "bias1", "rowscale")]
    + [(dict(dropout_p=0.1), ValueError, "`dropout_p` is not supported, expected 0, got 0.1"),
       (dict(return_dropout_mask=True), ValueError, "`return_dropout_mask` is not supported"),
       (dict(eps=-1.0), ValueError, "`eps` must not be negative"),
       (dict(weight=torch.ones(3)), ValueError, "`weight` has shape"),
       (dict(residual=torch.ones(4)), ValueError, "`residual` has shape")],
)  # fmt: skip
def test_rms_norm_fn_bad_input(change, error, message):
    good = dict(x=torch.ones(2, 4), weight=torch.ones(4), bias=None)
    with pytest.raises(error, match=f"rms_norm_fn: {message}"):
        rms_norm_fn(**{**good, **change})


# RMSNormGated


@pytest.mark.parametrize("before", [True, False])
def test_gated_module(before):
    norm = RMSNormGated(12, 0.1, group_size=4, norm_before_gate=before, dtype=F64)
    assert norm.bias is None and torch.equal(norm.weight, torch.ones(12, dtype=F64))
    norm.load_state_dict({"weight": randn(12)})
    x, z = randn(2, 3, 12), randn(2, 3, 12)
    gate = F.silu(z)
    v = x if before else x * gate
    want = normed(v.unflatten(-1, (3, 4)), norm.weight.unflatten(-1, (3, 4)), 0.1).flatten(-2)
    same(norm(x, z), want * gate if before else want)
    same(norm(x), rmsnorm_fn(x, norm.weight, None, eps=0.1, group_size=4))
    norm(x, z=z).sum().backward()
    assert norm.weight.grad.isfinite().all()
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(12, dtype=F64))


def test_gated_module_where_and_how():
    assert RMSNormGated(4, device="meta").weight.is_meta
    assert RMSNormGated(4).eps == 1e-5 and RMSNormGated(4).norm_before_gate
    assert RMSNormGated(4, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    norm = RMSNormGated(4)
    assert torch.equal(copy.deepcopy(norm)(torch.ones(4)), norm(torch.ones(4)))
    with pytest.raises(ValueError, match="rmsnorm_fn: `group_size` is 3, expected a divisor"):
        RMSNormGated(4, group_size=3)(torch.ones(4))


# selective_scan_ref, selective_state_update_ref


def scan_inputs(batch=2, dim=6, length=5, groups=2, state=3, dtype=F64):
    grouped = (batch, groups, state, length) if groups else (batch, state, length)
    return dict(
        u=randn(batch, dim, length, dtype=dtype), delta=randn(batch, dim, length, dtype=dtype),
        A=-torch.rand(dim, state, dtype=F64) - 0.1, B=randn(*grouped, dtype=dtype),
        C=randn(*grouped, dtype=dtype), D=randn(dim), z=randn(batch, dim, length, dtype=dtype),
        delta_bias=randn(dim),
    )  # fmt: skip


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(("groups", "without"), [(2, ()), (0, ("D", "z", "delta_bias"))])
def test_selective_scan_ref(groups, without, softplus):
    """It is the specification of the function, which other tests hold to a second formula."""
    args = {k: v for k, v in scan_inputs(groups=groups).items() if k not in without}
    names, grads = list(args), [randn(2, 6, 5), randn(2, 6, 3)]

    def run(fn):
        def call(*leaves):
            return fn(**dict(zip(names, leaves)), delta_softplus=softplus, return_last_state=True)

        outs, found = testing.gradients(call, list(args.values()), grads)
        return [*outs, *found]

    assert all(map(torch.equal, run(selective_scan_ref), run(selective_scan_fn)))
    assert torch.equal(selective_scan_ref(**args), selective_scan_fn(**args))


def test_refs_have_gradients_where_a_gate_overflows():
    args = scan_inputs(dtype=torch.float32)
    args["z"], args["delta"] = args["z"] - 200, args["delta"] + 100
    leaves = {k: v.requires_grad_() for k, v in args.items()}
    selective_scan_ref(**leaves, delta_softplus=True).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    x = torch.full((1, 2, 5), -200.0, requires_grad=True)
    causal_conv1d_ref(x, torch.ones(2, 4), activation="silu").sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_refs_refuse_double_backward():
    x = randn(1, 2, 5).requires_grad_()
    y = causal_conv1d_ref(x, randn(2, 4), activation="silu")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def step_inputs(heads, dtype):
    lead, group = ((3,), (1,)) if heads else ((), ())
    return dict(
        x=randn(2, *lead, 4, dtype=dtype), dt=randn(2, *lead, 4, dtype=dtype),
        A=-torch.rand(*lead, 4, 5, dtype=F64), B=randn(2, *group, 5, dtype=dtype),
        C=randn(2, *group, 5, dtype=dtype), D=randn(*lead, 4), z=randn(2, *lead, 4, dtype=dtype),
        dt_bias=randn(*lead, 4),
    )  # fmt: skip


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("without", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_selective_state_update_ref(heads, without, dtype):
    args = {k: v for k, v in step_inputs(heads, dtype).items() if k not in without}
    state = randn(2, *([3] * heads), 4, 5, dtype=dtype)
    ours, plain = state.clone(), state.clone()
    y = selective_state_update(ours, **args, dt_softplus=True)
    got = selective_state_update_ref(plain, **args, dt_softplus=True)
    assert got.shape == y.shape and torch.equal(got, y)
    assert torch.equal(plain, ours) and not torch.equal(plain, state)


def test_selective_state_update_ref_has_no_gradient():
    args, state = step_inputs(True, F64), randn(2, 3, 4, 5)
    args["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="selective_state_update_ref writes into `state`"):
        selective_state_update_ref(state, **args)
    with torch.no_grad():
        assert not selective_state_update_ref(state, **args).requires_grad


@pytest.mark.parametrize("with_residual", [False, True])
def test_compiles_to_one_graph(with_residual):
    norm = RMSNormGated(8, group_size=4, norm_before_gate=False)

    def loss(x, z, residual):
        y = rms_norm_fn(x, norm.weight, None, residual, prenorm=True, residual_in_fp32=True)
        return norm(y[0], z).sum() + y[1].sum()

    torch.compiler.reset()
    args = [torch.randn(3, 8) for _ in range(3)]
    args[2] = args[2] if with_residual else None
    tensors = [t for t in args if t is not None]
    grads = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        fn(*leaves, *[None] * (3 - len(leaves))).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))
