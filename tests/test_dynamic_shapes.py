"""Every public function compiles to one graph with symbolic sizes, and is not compiled per size."""

import pytest
import torch

import nemokernels as nk


def rand(*shape):
    return torch.randn(*shape)


def ssd(t):
    return nk.mamba_chunk_scan_combined(
        rand(2, t, 4, 8), rand(2, t, 4), -torch.rand(4) - 0.1, rand(2, t, 2, 8), rand(2, t, 2, 8),
        16, D=rand(4), z=rand(2, t, 4, 8), dt_bias=rand(4), dt_softplus=True,
    )  # fmt: skip


def mixer(t):
    return nk.mamba_split_conv1d_scan_combined(
        rand(2, t, 2 * 32 + 2 * 16 + 4), rand(64, 4), rand(64), rand(4), -torch.rand(4) - 0.1,
        rand(4), 16, headdim=8, ngroups=2, rmsnorm_weight=rand(32), norm_before_gate=False,
    )  # fmt: skip


def moe(t):
    route = nk.moe_route(rand(t, 8), top_k=2, correction_bias=rand(8))
    return nk.moe_experts(rand(t, 16), rand(8, 24, 16), rand(8, 16, 24), route)


def moe_ragged(t):
    starts = torch.arange(t + 1, dtype=torch.int32) * 2
    route = nk.ragged_route(torch.rand(2 * t), torch.arange(2 * t).int() % 8, starts, num_experts=8)
    return nk.moe_experts(rand(t, 16), rand(8, 24, 16), rand(8, 16, 24), route)


def step(t):
    return nk.mamba_step(
        rand(t, 2, 48), rand(t, 2, 4), torch.zeros(t, 48, 5), torch.zeros(t, 2, 4, 8, 4),
        rand(48, 4), rand(48), -torch.rand(4), torch.full((t,), 3, dtype=torch.int32), ngroups=2,
    )  # fmt: skip


CASES = {
    "rms_norm": lambda t: nk.rms_norm(rand(2, t, 16), rand(16), residual=rand(2, t, 16))[0],
    "rmsnorm_fn": lambda t: nk.rmsnorm_fn(
        rand(2, t, 16), rand(16), z=rand(2, t, 16), group_size=8, norm_before_gate=False
    ),
    "relu2": lambda t: nk.relu2(rand(t, 16)),
    "causal_conv1d_fn": lambda t: nk.causal_conv1d_fn(
        rand(2, 16, t), rand(16, 4), rand(16), activation="silu"
    ),
    "ssd": ssd,
    "mixer": mixer,
    "mamba_step": step,
    "attention": lambda t: nk.attention(rand(2, t, 4, 8), rand(2, t, 2, 8), rand(2, t, 2, 8)),
    "linear_cross_entropy": lambda t: nk.linear_cross_entropy(
        rand(t, 16), rand(32, 16), torch.randint(32, (t,))
    ),
    "moe": moe,
    "moe_ragged": moe_ragged,
    "balance_loss": lambda t: nk.balance_loss(rand(2, t, 8), top_k=2),
    "fp8_linear": lambda t: nk.fp8_linear(rand(16 * t, 32), rand(16, 32)),
    "nvfp4_linear": lambda t: nk.nvfp4_linear(rand(t, 32), nk.quantize_nvfp4(rand(16, 32))),
    "mtp_verify": lambda t: nk.mtp_verify(rand(t, 3, 32), torch.randint(32, (t, 2))).accepted,
    "selective_scan_fn": lambda t: nk.selective_scan_fn(
        rand(2, 8, t), rand(2, 8, t), -torch.rand(8, 16), rand(2, 16, t), rand(2, 1, 16, t),
        z=rand(2, 8, t), delta_softplus=True,
    ),
    "selective_state_update": lambda t: nk.selective_state_update(
        torch.zeros(t, 4, 8, 16), rand(t, 4, 8), rand(t, 4, 8), -torch.rand(4, 8, 16),
        rand(t, 2, 16), rand(t, 2, 16), dt_softplus=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_lengths(name):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(CASES[name], fullgraph=True, dynamic=True, backend=backend)
    for t in (37, 50, 64, 129):
        torch.manual_seed(t)
        got = compiled(t)
        torch.manual_seed(t)
        assert torch.equal(got, CASES[name](t))
    assert len(graphs) <= 2
