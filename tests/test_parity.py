"""Against transformers' NemotronHForCausalLM, through a checkpoint that transformers wrote."""

import hybrids
import pytest
import torch
import transformers

from nemokernels.models import from_pretrained

VARIANTS = {
    "attention": dict(pattern="*-*"),
    "mamba": dict(pattern="M*M"),
    "mamba mlp": dict(pattern="M-M*-"),
    "gelu": dict(pattern="M--*-", mlp_hidden_act="gelu"),
    "tanh gelu": dict(pattern="M-*-", mlp_hidden_act="gelu_pytorch_tanh"),
    "experts": dict(pattern="*EE"),
    "latent experts": dict(pattern="ME*ME", moe_latent_size=16),
    "grouped experts": dict(pattern="M*E", n_group=4, topk_group=2, norm_topk_prob=False),
    "grouped heads": dict(
        pattern="M*EM", num_attention_heads=6, num_key_value_heads=1, mamba_num_heads=4, n_groups=4
    ),
    "one group": dict(pattern="M*", n_groups=1, chunk_size=16, num_key_value_heads=4),
}


def write_peer(folder, **changes):
    """transformers' model with every parameter and buffer redrawn, and its checkpoint on disk."""
    fields = hybrids.config(**changes).to_dict()
    fields = {k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
    peer = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**fields)).eval()
    # transformers bounds the step from below in its chunked path alone; take the bound away.
    for module in peer.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    torch.manual_seed(0)
    state = {**dict(peer.named_parameters()), **dict(peer.named_buffers())}
    hybrids.redraw(sorted(state.items()))
    peer.save_pretrained(folder)
    return peer


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    peer = write_peer(tmp_path, **VARIANTS[request.param])
    return peer, from_pretrained(tmp_path)


def test_forward(pair):
    assert hybrids.forward_difference(*pair, hybrids.tokens(3, 21)) <= 1e-4


def test_prefill_and_cached_decode(pair):
    assert hybrids.cached_difference(*pair, hybrids.tokens(2, 18), prefill=11) <= 1e-4


MISTAKES = {
    "backbone.layers.0.mixer.D": lambda t: t.zero_(),
    "backbone.layers.0.mixer.dt_bias": lambda t: t.add_(1),
    "backbone.layers.0.mixer.A_log": lambda t: t.add_(0.5),
    "backbone.layers.0.mixer.conv1d.weight": lambda t: t.copy_(t.flip(-1)),
    "backbone.layers.0.mixer.conv1d.bias": lambda t: t.zero_(),
    "backbone.layers.0.mixer.norm.weight": lambda t: t.fill_(1),
    # x (48), B (32), C (32) are the convolution's channels; without B the state stays empty.
    "backbone.layers.0.mixer.in_proj.weight": lambda t: t[96:128].zero_(),
    "backbone.layers.1.mixer.gate.e_score_correction_bias": lambda t: t.zero_(),
    "backbone.layers.1.mixer.experts.down_proj": lambda t: t.copy_(t.roll(1, 0)),
    "backbone.layers.1.mixer.shared_experts.up_proj.weight": lambda t: t.neg_(),
    "backbone.layers.1.mixer.fc2_latent_proj.weight": lambda t: t.mul_(1.01),
    "backbone.layers.2.mixer.k_proj.weight": lambda t: t.copy_(t.roll(12, 0)),
    "backbone.layers.3.mixer.up_proj.weight": lambda t: t.neg_(),
    "backbone.layers.2.norm.weight": lambda t: t.fill_(1),
    "backbone.norm_f.weight": lambda t: t.sub_(0.1),
}


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    changes = dict(pattern="ME*-", moe_latent_size=16)
    return write_peer(folder, **changes), folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, every_kind):
    """The comparison would notice: each part of the model, put wrong, breaks it."""
    peer, folder = every_kind
    model = from_pretrained(folder)
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) <= 1e-4
    with torch.no_grad():
        MISTAKES[name](model.state_dict()[name])
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) > 1e-3
