"""Every tensor argument that lies on another device than the first is refused by its name."""

import pytest
import torch

import nemokernels as nk

X, W, ONE = torch.ones(2, 32), torch.ones(16, 32), torch.ones(())
INT, ROW = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
Q, KV = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8)
CALLS = {
    "quantize_fp8": dict(x=X, scale=ONE),
    "dequantize_fp8": dict(q=X.to(torch.float8_e4m3fn), scale_inv=ONE),
    "delayed_scaling_update": dict(scale=X[0], amax_history=X, amax=X[0]),
    "cast_fp8_weight": dict(weight=W, scale=ONE, amax=ONE.clone()),
    "fp8_linear": dict(
        x=X, weight=W, bias=W[:, 0], x_scale=ONE, w_scale=ONE, dy_scale=ONE, x_amax=ONE.clone(),
        w_amax=ONE.clone(), dy_amax=ONE.clone(), main_grad=torch.zeros(16, 32),
    ),
    "rms_norm_fp8": dict(x=X, weight=X[0], scale=ONE, residual=X),
    "gated_rms_norm_fp8": dict(x=X, weight=X[0], scale=ONE, bias=X[0], z=X),
    "mtp_verify": dict(
        logits=torch.ones(2, 2, 5), drafts=ROW[:, None], draft_lengths=ROW,
        draft_probs=torch.full((2, 1, 5), 0.2), temperature=torch.ones(2), top_k=ROW,
        top_p=torch.ones(2), seed=ROW, request_ids=ROW, positions=ROW,
    ),
    "linear_cross_entropy": dict(hidden=X, weight=W, targets=ROW),
    "attention": dict(
        q=Q[:1], k=KV[:1], v=KV[:1], cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        alibi_slopes=torch.ones(4),
    ),
    "attention_with_cache": dict(
        q=Q, k=KV, v=KV, k_cache=torch.zeros(2, 9, 2, 8), v_cache=torch.zeros(2, 9, 2, 8),
        lengths=INT, slots=torch.tensor([1, 0], dtype=torch.int32), alibi_slopes=torch.ones(4),
    ),
    "rms_norm": dict(x=X, weight=X[0], residual=X),
    "rmsnorm_fn": dict(x=X, weight=X[0], bias=X[0], z=X),
}  # fmt: skip
CASES = [(name, moved) for name, args in CALLS.items() for moved in list(args)[1:]]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_good(name):
    getattr(nk, name)(**CALLS[name])


@pytest.mark.parametrize(("name", "moved"), CASES)
def test_mixed_devices(name, moved):
    args = CALLS[name]
    with pytest.raises(ValueError, match=f"^{name}: `{moved}` is on meta, expected cpu"):
        getattr(nk, name)(**{**args, moved: args[moved].to("meta")})


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", ["x_codes", "weight_codes"])
def test_codes_on_another_device(name, part):
    codes = list(nk.cast_fp8_weight(X if name == "x_codes" else W))
    codes[part] = codes[part].to("meta")
    with pytest.raises(ValueError, match=f"fp8_linear: `{name}` is on meta"):
        nk.fp8_linear(X.clone().requires_grad_(), W.clone().requires_grad_(),
                      **{name: nk.Fp8Codes(*codes)})  # fmt: skip
