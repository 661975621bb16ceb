"""The mixers of a Nemotron-H layer: Mamba-2, attention, MLP and mixture of experts.

Module names are the tensor names of the published checkpoints; only the experts differ, which are
stacked here and stored one by one there. ``readers`` are the linear layers that read a mixer's
input, if nothing else does: a norm that emits FP8 emits it for them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nemokernels import (
    Fp8Normed,
    Route,
    gated_rms_norm_fp8,
    moe_experts,
    moe_route,
    rmsnorm_fn,
)
from nemokernels.models import streams
from nemokernels.models.activations import ACTIVATIONS
from nemokernels.models.balance import Balance, carrying, recomputing
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.expert_parallel import moe_experts_over
from nemokernels.models.linear import Linear, each_row, is_exact, linear, row_by_row
from nemokernels.models.norms import RMSNorm, emission
from nemokernels.models.runs import Run

__all__ = ["MLP", "MoE", "Attention", "Mamba2", "Router"]


class Wide(nn.Module):
    """A module whose own parameters and buffers a cast of the model never narrows.

    A_log, D, dt_bias and the router are float32 in a model of any 16-bit dtype.
    """

    def _apply(self, fn, recurse=True):
        for child in self.children() if recurse else ():
            child._apply(fn)

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            narrow = out.is_floating_point() and out.itemsize < 4
            return tensor.to(out.device, torch.float32) if narrow else out

        return super()._apply(apply, recurse=False)


class Conv1d(nn.Module):
    """Holds the depthwise convolution's weight in the checkpoint's shape."""

    def __init__(self, channels: int, taps: int, bias: bool, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, **kwargs))
        self.bias = nn.Parameter(torch.empty(channels, **kwargs)) if bias else None


class Mamba2(Wide):
    def __init__(self, config: NemotronHConfig, index: int, **kwargs):
        super().__init__()
        self.config, self.index = config, index
        inner, heads = config.d_inner, config.mamba_num_heads
        wide = {**kwargs, "dtype": _wide(kwargs["dtype"])}
        rows, bias = inner + config.conv_dim + heads, config.use_bias
        self.in_proj = Linear(config.hidden_size, rows, bias=bias, **kwargs)
        self.conv1d = Conv1d(config.conv_dim, config.conv_kernel, config.use_conv_bias, **kwargs)
        self.A_log = nn.Parameter(torch.empty(heads, **wide))
        self.D = nn.Parameter(torch.empty(heads, **wide))
        self.dt_bias = nn.Parameter(torch.empty(heads, **wide))
        self.norm = RMSNorm(inner, config.layer_norm_epsilon, **kwargs)
        self.out_proj = Linear(inner, config.hidden_size, bias=bias, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.in_proj,)

    def forward(self, x: torch.Tensor | Fp8Normed, run: Run) -> torch.Tensor:
        return self.out_proj(run.mamba(self, self.in_proj(x)))

    def split(self, zxbcdt: torch.Tensor) -> list[torch.Tensor]:
        """The parts of the input projection: z, xBC and dt."""
        c = self.config
        return zxbcdt.split([c.d_inner, c.conv_dim, c.mamba_num_heads], -1)

    def weights(self) -> dict[str, torch.Tensor | None]:
        """The parameters between the projections, norm aside, as the functions name them."""
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        small = {"A": -self.A_log.exp(), "D": self.D, "dt_bias": self.dt_bias}
        return {"weight": taps, "bias": bias, **small}

    def gated_norm(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | Fp8Normed:
        """The output norm of y (B, T, heads, head_dim), gated by z first, for ``out_proj``."""
        options = {"z": z, "eps": self.norm.eps, "norm_before_gate": False}
        options["group_size"] = self.config.d_inner // self.config.n_groups
        emits = emission((self.out_proj,), y)
        if emits is None:
            return rmsnorm_fn(y.flatten(-2), self.norm.weight, **options)
        return gated_rms_norm_fp8(y.flatten(-2), self.norm.weight, **options, **emits)


class Attention(nn.Module):
    """Causal grouped-query attention without positional encoding."""

    def __init__(self, config: NemotronHConfig, index: int, **kwargs):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim, **kwargs)
        self.k_proj = Linear(width, kv, **kwargs)
        self.v_proj = Linear(width, kv, **kwargs)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, width, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: torch.Tensor | Fp8Normed, run: Run) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in self.readers)
        return self.o_proj(run.attend(self.index, q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str = "relu2", **kwargs):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.up_proj = Linear(width, inner, **kwargs)
        self.down_proj = Linear(inner, width, **kwargs)

    @property
    def readers(self) -> tuple[Linear, ...]:
        return (self.up_proj,)

    def forward(self, x: torch.Tensor | Fp8Normed, run: Run | None = None) -> torch.Tensor:
        return each_row(self._rows, x)

    def _rows(self, x: torch.Tensor | Fp8Normed) -> torch.Tensor:
        return self.down_proj(self.up_proj(x), self.act)


class Router(Wide):
    """Scores every token against every expert, in float32, autocast or not.

    On a GPU that is what ``torch.set_float32_matmul_precision`` says: its default, "highest", is
    float32; others multiply in TF32, which moves tokens to other experts.

    ``expert_counts`` adds up the tokens each expert received in training mode, for loss-free
    balancing; whoever moves ``e_score_correction_bias`` zeroes it. ``balance`` adds the auxiliary
    loss to what is differentiated in training mode.
    """

    balance: Balance | None = None

    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        experts, dtype = config.n_routed_experts, _wide(kwargs.pop("dtype"))
        weight = torch.empty(experts, config.hidden_size, dtype=dtype, **kwargs)
        self.weight = nn.Parameter(weight)
        bias = torch.zeros(experts, dtype=dtype, **kwargs)
        self.register_buffer("e_score_correction_bias", bias)
        counts = torch.zeros(experts, dtype=torch.int64, **kwargs)
        self.register_buffer("expert_counts", counts, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type if x.device.type != "meta" else "cpu"  # meta knows no autocast
        with torch.autocast(kind, enabled=False):
            return linear(x.to(self.weight.dtype), self.weight)

    def trained(self, logits: torch.Tensor, route: Route) -> Route:
        """Count what ``logits`` chose; the route's weights carry the auxiliary loss."""
        if not recomputing():
            self.expert_counts.add_(route.counts)
        if self.balance is None or not torch.is_grad_enabled():
            return route
        loss = self.balance.loss(logits, route.weights.shape[1])
        return route._replace(weights=carrying(route.weights, loss))


class Experts(nn.Module):
    """The routed experts: all of them, or after :meth:`split` a rank's."""

    mesh: DeviceMesh | None = None

    def __init__(self, experts: int, width: int, inner: int, **kwargs):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width, **kwargs))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, **kwargs))

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this rank's part; the parameters become DTensors, sharded over the 1-D ``mesh``."""
        ranks, rank = mesh.size(), mesh.get_local_rank()
        experts = self.up_proj.shape[0]
        if experts % ranks:
            raise ValueError(f"{experts} experts cannot be split evenly over {ranks} ranks")
        for name, whole in list(self.named_parameters()):
            part = whole.detach().chunk(ranks)[rank].clone()
            part = DTensor.from_local(
                part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            setattr(self, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self.mesh = mesh

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        if self.mesh is None:
            return moe_experts(x, self.up_proj, self.down_proj, route)
        if is_exact():
            raise ValueError("exact mode computes one row at a time, split experts all together")
        up, down = self.up_proj.to_local(), self.down_proj.to_local()
        return moe_experts_over(x, up, down, route, self.mesh.get_group())


class MoE(nn.Module):
    """Routed experts plus one shared expert.

    With ``moe_latent_size`` the routed experts work in a narrower space between two projections;
    router and shared expert always see the full width. The shared expert runs on a stream of its
    own where that may pay (:func:`.streams.pays`).
    """

    readers = ()  # router and experts read the input too, and as values

    def __init__(self, config: NemotronHConfig, **kwargs):
        super().__init__()
        width, latent = config.hidden_size, config.moe_latent_size
        self.gate = Router(config, **kwargs)
        inner = config.moe_intermediate_size
        self.experts = Experts(config.n_routed_experts, latent or width, inner, **kwargs)
        self.shared_experts = MLP(width, config.moe_shared_expert_intermediate_size, **kwargs)
        self.fc1_latent_proj = Linear(width, latent, **kwargs) if latent else None
        self.fc2_latent_proj = Linear(latent, width, **kwargs) if latent else None
        self.choice = {
            "top_k": config.num_experts_per_tok,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "norm_topk_prob": config.norm_topk_prob,
            "scale": config.routed_scaling_factor,
        }

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        shared = streams.aside(self.shared_experts, x)
        routed = row_by_row(self._routed, x.reshape(-1, x.shape[-1])).view_as(x)
        return routed + shared()

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.gate.e_score_correction_bias
        logits = self.gate(x)
        route = moe_route(logits, correction_bias=bias, **self.choice)
        if self.training:
            route = self.gate.trained(logits, route)
        if self.fc1_latent_proj is None:
            return self.experts(x, route)
        return self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x), route))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
