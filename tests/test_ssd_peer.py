"""Both functions of the chunk scan against mamba_ssm's own, where it is installed."""

import on_gpu
import pytest
import torch

from nemokernels import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, testing

BF16, F16 = torch.bfloat16, torch.float16
OTHER = 8  # budgets: the peer rounds elsewhere; another function would err by its whole size


@pytest.fixture
def peer():
    where = "mamba_ssm.ops.triton.ssd_combined"
    return pytest.importorskip(where, reason="mamba_ssm is not installed")


def compare(ours, theirs, tensors):
    """Outputs and gradients: ours err no more than the peer's, by the rule for a reference."""
    doubles = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in tensors]
    with torch.no_grad():
        outs = ours(*doubles)
    # Every low-precision result gets the same representable gradients.
    grads = [torch.randn(o.shape).to(tensors[0].dtype) for o in outs]
    exact = testing.gradients(ours, doubles, [g.double() for g in grads])
    got, low = (
        testing.gradients(fn, tensors, [g.to(o) for g, o in zip(grads, fn(*tensors))])
        for fn in (ours, theirs)
    )
    for i, (a, want, other) in enumerate(zip(sum(got, []), sum(exact, []), sum(low, []))):
        testing.assert_matches(a, want, other, f"output or gradient {i}")
        worst = (other.double().cpu() - want).abs().max().item()
        assert worst <= OTHER * testing.error_budget(want, a.cpu()), f"peer's {i}"


def scan_inputs(device, dtype, groups, ids):
    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    wide = torch.float32
    return [
        randn(2, 300, 8, 64), randn(2, 300, 8), -torch.rand(8, device=device) * 8 - 0.5,
        randn(2, 300, groups, 128) / 2, randn(2, 300, groups, 128) / 2, randn(8, dtype=wide),
        randn(8, dtype=wide) - 4, *([ids(2, 300)] if ids else []),
    ]  # fmt: skip


def scan(function):
    def run(x, dt, A, B, C, D, bias, seq_idx=None):
        out = function(x, dt, A, B, C, 128, D=D, dt_bias=bias, dt_softplus=True, seq_idx=seq_idx,
                       return_final_states=True)  # fmt: skip
        return [o.to(x.dtype) for o in out]

    return run


def thirds(device):
    return lambda B, T: (torch.arange(T, device=device).int() // (T // 3))[None].expand(B, T)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("sequences", [False, True])
def test_scan(peer, groups, dtype, sequences):
    ids = thirds("cuda") if sequences else None
    with on_gpu.references():
        compare(scan(mamba_chunk_scan_combined), scan(peer.mamba_chunk_scan_combined),
                scan_inputs("cuda", dtype, groups, ids))  # fmt: skip


def mixer_inputs(device, dtype, groups):
    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    H, P, N, wide = 8, 64, 128, torch.float32
    channels = H * P + 2 * groups * N
    return [
        randn(2, 300, H * P + channels + H), randn(channels, 4) / 2, randn(channels),
        randn(H, dtype=wide) - 4, -torch.rand(H, device=device) * 8 - 0.5, randn(H, dtype=wide),
        randn(H * P, dtype=wide), randn(96, H * P, dtype=dtype) / 16,
    ]  # fmt: skip


def mixer(function, groups, norm_before_gate):
    def run(zxbcdt, weight, bias, dt_bias, A, D, norm, projection):
        out = function(zxbcdt, weight, bias, dt_bias, A, D, 128, rmsnorm_weight=norm,
                       outproj_weight=projection, headdim=64, ngroups=groups,
                       norm_before_gate=norm_before_gate)  # fmt: skip
        return [out]

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mixer(peer, groups, norm_before_gate):
    pytest.importorskip("causal_conv1d", reason="causal_conv1d, which the peer needs, is not there")
    with on_gpu.references():
        compare(mixer(mamba_split_conv1d_scan_combined, groups, norm_before_gate),
                mixer(peer.mamba_split_conv1d_scan_combined, groups, norm_before_gate),
                mixer_inputs("cuda", BF16, groups))  # fmt: skip


@pytest.mark.parametrize("ids", [None, thirds("cpu")], ids=["rows", "sequences"])
def test_comparison_accepts_what_is_right_and_nothing_else(ids):
    """With our own function as the peer, on the CPU."""
    ours, tensors = scan(mamba_chunk_scan_combined), scan_inputs("cpu", BF16, 4, ids)
    compare(ours, ours, tensors)
    whole = mixer(mamba_split_conv1d_scan_combined, 4, False)
    compare(whole, whole, mixer_inputs("cpu", BF16, 4))

    def without_D(*args):
        return ours(*args[:5], args[5] * 0, *args[6:])

    for pair in ((ours, without_D), (without_D, ours)):
        with pytest.raises(AssertionError):
            compare(*pair, tensors)
