"""Nested models: a slice equals its parent with everything else masked out."""

import json
import math

import families
import hybrids
import pytest
import torch
import torch.nn.functional as F
import vl

from nemokernels.models import (
    ConfigError,
    RewardConfig,
    from_pretrained,
    generate,
    save_pretrained,
)
from nemokernels.models.elastic import slice_model
from nemokernels.models.slicing import Slicing, take

SIZES = dict(num_attention_heads=6, mamba_num_heads=8, moe_latent_size=16)
WIDTHS = {
    "hidden_size": 22,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "n_routed_experts": 5,
    "moe_intermediate_size": 17,
    "moe_shared_expert_intermediate_size": 30,
    "moe_latent_size": 9,
}


def parent(pattern="M*-EM", mtp="*E", dtype=torch.float64, **changes):
    return hybrids.model(pattern, mtp, dtype=dtype, **{**SIZES, **changes})


# A second formula: the parent's own weights at full width, with masks as in elastic training. The
# residual stream is zero outside the channels that stay; a norm averages over those that do.


def prefix(size, keep):
    return (torch.arange(size) < keep).double()


def masked_norm(x, weight, mask, eps=1e-5):
    x = x * mask
    mean = (x * x).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return x / (mean + eps).sqrt() * weight * mask


class Masked:
    """Forward pass of a model under masks; ``kept`` layers write into the stream."""

    def __init__(self, model, widths, kept=None):
        c = self.config = model.config
        self.state, self.widths = model.state_dict(), widths
        self.kept = range(len(c.pattern)) if kept is None else kept
        self.stream = prefix(c.hidden_size, self.width("hidden_size"))

    def width(self, name, layer=None):
        width = self.widths.get(name, getattr(self.config, name))
        return width.get(layer, getattr(self.config, name)) if isinstance(width, dict) else width

    def logits(self, tokens):
        return self.hidden(tokens) @ self.state["lm_head.weight"].T

    def hidden(self, tokens):
        x = self.state["backbone.embeddings.weight"][tokens] * self.stream
        for index in self.kept:
            x = self.layer(x, f"backbone.layers.{index}", self.config.pattern[index], index)
        return masked_norm(x, self.state["backbone.norm_f.weight"], self.stream)

    def mtp(self, hidden, ahead):
        w, last = self.state, len(self.config.mtp_pattern) - 1
        e = masked_norm(w["backbone.embeddings.weight"][ahead] * self.stream,
                        w["mtp.layers.0.enorm.weight"], self.stream)  # fmt: skip
        h = masked_norm(hidden, w["mtp.layers.0.hnorm.weight"], self.stream)
        x = (torch.cat([e, h], -1) @ w["mtp.layers.0.eh_proj.weight"].T) * self.stream
        for index, letter in enumerate(self.config.mtp_pattern):
            x = self.layer(x, f"mtp.layers.{index}", letter, len(self.config.pattern) + index)
        return masked_norm(x, w[f"mtp.layers.{last}.final_layernorm.weight"], self.stream)

    def layer(self, x, path, letter, index):
        mixer = {"M": self.mamba, "*": self.attention, "-": self.mlp, "E": self.moe}[letter]
        normed = masked_norm(x, self.state[f"{path}.norm.weight"], self.stream)
        return x + mixer(normed, f"{path}.mixer.", index) * self.stream

    def two(self, x, up, down, keep):
        inner = (x @ up.T).relu().square() * prefix(up.shape[0], keep)
        return inner @ down.T

    def mlp(self, x, path, index):
        up, down = (self.state[f"{path}{leaf}_proj.weight"] for leaf in ("up", "down"))
        return self.two(x, up, down, self.width("intermediate_size", index))

    def attention(self, x, path, index):
        c = self.config
        q, k, v = ((x @ self.state[f"{path}{leaf}_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
                   for leaf in "qkv")  # fmt: skip
        group = c.num_attention_heads // c.num_key_value_heads
        keep = self.width("num_attention_heads") // c.num_key_value_heads
        length, out = x.shape[1], torch.zeros_like(q)
        future = torch.ones(length, length).triu(1).bool()
        for head in range(c.num_attention_heads):
            if head % group < keep:
                score = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / c.head_dim**0.5
                weight = score.masked_fill(future, -math.inf).softmax(-1)
                out[:, :, head] = weight @ v[:, :, head // group]
        return out.flatten(-2) @ self.state[f"{path}o_proj.weight"].T

    def mamba(self, x, path, index):
        c, w = self.config, {n.removeprefix(path): t for n, t in self.state.items()
                             if n.startswith(path)}  # fmt: skip
        H, P, G, N = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
        per, keep = H // G, self.width("mamba_num_heads") // G
        heads = (torch.arange(H) % per < keep).double()
        inner = (heads[:, None] * prefix(P, self.width("mamba_head_dim"))).flatten()
        z, u, dt = (x @ w["in_proj.weight"].T).split([H * P, H * P + 2 * G * N, H], -1)
        u = F.pad(u.transpose(1, 2), (3, 0))
        u = F.silu(F.conv1d(u, w["conv1d.weight"], w["conv1d.bias"], groups=u.shape[1]))
        xs, B, C = u.transpose(1, 2).split([H * P, G * N, G * N], -1)
        dt = F.softplus(dt + w["dt_bias"])
        decay, h, ys = torch.exp(-dt * w["A_log"].exp()), 0, []
        for t in range(x.shape[1]):
            xt = xs[:, t].unflatten(-1, (H, P))
            Bt, Ct = (m[:, t].unflatten(-1, (G, N)).repeat_interleave(per, 1) for m in (B, C))
            h = decay[:, t, :, None, None] * h + torch.einsum(
                "bhp,bhn->bhpn", dt[:, t, :, None] * xt, Bt
            )
            ys.append(torch.einsum("bhpn,bhn->bhp", h, Ct) + w["D"][:, None] * xt)
        y = torch.stack(ys, 1).flatten(-2) * F.silu(z)
        y, weight, mask = (m.unflatten(-1, (G, -1)) for m in (y, w["norm.weight"], inner))
        return masked_norm(y, weight, mask).flatten(-2) @ w["out_proj.weight"].T

    def moe(self, x, path, index):
        c, w = self.config, self.state
        E = self.width("n_routed_experts", index)
        score = (x @ w[f"{path}gate.weight"].T).sigmoid()
        biased = score + w[f"{path}gate.e_score_correction_bias"]
        biased = biased.masked_fill(torch.arange(c.n_routed_experts) >= E, -math.inf)
        top = biased.topk(c.num_experts_per_tok, -1).indices
        weight = torch.zeros_like(score).scatter(-1, top, score.gather(-1, top))
        weight = weight / weight.sum(-1, keepdim=True) * c.routed_scaling_factor
        latent = (x @ w[f"{path}fc1_latent_proj.weight"].T) * prefix(
            c.moe_latent_size, self.width("moe_latent_size")
        )
        ups, downs = w[f"{path}experts.up_proj"], w[f"{path}experts.down_proj"]
        inner = self.width("moe_intermediate_size", index)
        routed = sum(weight[..., e, None] * self.two(latent, ups[e], downs[e], inner)
                     for e in range(E))  # fmt: skip
        routed = routed * prefix(c.moe_latent_size, self.width("moe_latent_size"))
        shared = [w[f"{path}shared_experts.{leaf}_proj.weight"] for leaf in ("up", "down")]
        width = self.width("moe_shared_expert_intermediate_size", index)
        return routed @ w[f"{path}fc2_latent_proj.weight"].T + self.two(x, *shared, width)


def assert_equals_masked(model, widths):
    child = slice_model(model, widths)
    masked = Masked(model, {name: width for name, width in widths.items() if name != "layers"},
                    widths.get("layers"))  # fmt: skip
    tokens, keep = hybrids.tokens(2, 11), child.config.hidden_size
    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(child(tokens), masked.logits(tokens), **close)
    if child.mtp is not None:
        hidden, ahead = child.hidden(tokens), tokens.roll(-1, 1)
        want = masked.mtp(masked.hidden(tokens), ahead)
        torch.testing.assert_close(child.mtp_hidden(hidden, ahead), want[..., :keep], **close)
        assert not want[..., keep:].any()
    return child


def test_masked_formula_without_masks_is_the_model():
    assert_equals_masked(parent(), {})


@pytest.mark.parametrize("axis", WIDTHS)
def test_one_axis(axis):
    child = assert_equals_masked(parent(), {axis: WIDTHS[axis]})
    assert getattr(child.config, axis) == WIDTHS[axis]
    assert child.config.block_configs is None


def test_all_axes_and_fewer_layers():
    child = assert_equals_masked(parent("M*-EM-*E"), {**WIDTHS, "layers": [0, 1, 3, 5, 7]})
    assert (child.config.pattern, child.config.mtp_pattern) == ("M*E-E", "*E")


def test_widths_by_layer():
    widths = {"intermediate_size": {2: 40}, "n_routed_experts": {3: 4, 6: 5},
              "moe_intermediate_size": {8: 11}, "layers": [0, 2, 3, 5, 6]}  # fmt: skip
    child = assert_equals_masked(parent("M*-EM-E"), widths)
    assert child.config.to_dict()["model_type"] == "nemotron_h_puzzle"
    assert [c.n_routed_experts for c in child.config.layers] == [8, 8, 4, 8, 5, 8, 8]
    again = slice_model(child, {"n_routed_experts": 4, "intermediate_size": 40,
                                "moe_intermediate_size": 11})  # fmt: skip
    assert again.config.block_configs is None and again.config.n_routed_experts == 4


def test_a_layer_is_renumbered_with_its_own_sizes():
    """A slice of a slice with widths per layer is the slice of both."""
    model = parent("E-E-E", mtp="")
    first = slice_model(model, {"intermediate_size": {1: 50, 3: 30}, "n_routed_experts": {4: 6}})
    both = slice_model(first, {"layers": [1, 2, 3, 4]})
    at_once = slice_model(model, {"intermediate_size": {1: 50, 3: 30}, "n_routed_experts": {4: 6},
                                  "layers": [1, 2, 3, 4]})  # fmt: skip
    assert both.config == at_once.config
    state = at_once.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in both.state_dict().items())


def test_rows_of_in_proj():
    """Two groups of four heads of eight channels; six heads of five stay: by hand."""
    slicing = Slicing(parent().config, {"mamba_num_heads": 6, "mamba_head_dim": 5})
    x = [h * 8 + c for h in (0, 1, 2, 4, 5, 6) for c in range(5)]
    BC = list(range(128, 192))
    dt = [192 + h for h in (0, 1, 2, 4, 5, 6)]
    rows = x + [64 + i for i in x] + BC + dt
    cut = slicing.cut("backbone.layers.0.mixer.in_proj.weight")
    table = torch.arange(200)[:, None].expand(-1, 32)
    assert take(table, cut.kept)[:, 0].tolist() == rows
    conv = slicing.cut("backbone.layers.4.mixer.conv1d.bias")
    assert take(torch.arange(128), conv.kept).tolist() == x + [i - 64 for i in BC]


def test_queries_stay_with_their_key_value_head():
    slicing = Slicing(parent().config, {"num_attention_heads": 4})
    cut = slicing.cut("mtp.layers.0.mixer.o_proj.weight")
    kept = take(torch.arange(72)[None].expand(32, -1), cut.kept)[0].tolist()
    assert kept == [h * 12 + c for h in (0, 1, 3, 4) for c in range(12)]


def test_it_copies():
    model = parent()
    child = slice_model(model, {})
    assert child.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        child.backbone.norm_f.weight.zero_()
    assert model.backbone.norm_f.weight.all()


def test_it_generates_with_its_own_block_and_round_trips(tmp_path):
    model = slice_model(parent(dtype=torch.float32), {**WIDTHS, "intermediate_size": {2: 40}})
    assert not model.training
    drafted = generate(model, [[5, 6, 7]], max_new_tokens=6, speculate=2, exact=True)
    assert drafted.tokens == generate(model, [[5, 6, 7]], max_new_tokens=6, exact=True).tokens
    save_pretrained(model, tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.pattern == model.config.pattern


def test_elements_of_a_published_nested_size():
    """The 22.3B model that a public pruning example makes of Nano 30B: 3.0B active."""
    from nemokernels.models.names import tensor_shapes
    from nemokernels.models.variants import find_config

    widths = {"hidden_size": 2304, "n_routed_experts": 104,
              "moe_shared_expert_intermediate_size": 3072}  # fmt: skip
    child = Slicing(find_config("Star Elastic 30B"), widths).child
    assert round(sum(math.prod(s) for _, s in tensor_shapes(child)) / 1e9, 1) == 22.3


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"ssm_state_size": 8}, "`ssm_state_size` is no axis, expected one of hidden_size"),
        ({"num_experts_per_tok": 2}, "`num_experts_per_tok` is no axis"),
        ({3: 1}, "`3` is no axis"),
        ({"hidden_size": 33}, "`hidden_size` is 33, wider than the parent's 32"),
        ({"hidden_size": 0}, "`hidden_size` must be from 1"),
        ({"hidden_size": "8"}, "`hidden_size` must be of type int"),
        ({"hidden_size": {"0": 8}}, "`hidden_size` must be of type int"),
        ({"mamba_num_heads": 7}, "`mamba_num_heads` is 7, off the boundaries of the 2 groups"),
        ({"num_attention_heads": 3}, "`num_attention_heads` is 3, off the boundaries of the 2"),
        ({"intermediate_size": {"0": 8}}, "`intermediate_size`: '0' is no layer that stays and"),
        ({"intermediate_size": {"2": 8}, "layers": [0]}, "`intermediate_size`: no layer has it"),
        ({"intermediate_size": {"2": 57}}, "`intermediate_size of layer 2` is 57, wider than"),
        ({"n_routed_experts": {"3": True}}, "`n_routed_experts of layer 3` must be of type int"),
        ({"n_routed_experts": 2}, "`num_experts_per_tok` is 3, but a token chooses among 2"),
        ({"layers": []}, "`layers` must be a list of layer numbers"),
        ({"layers": [1, 1]}, "`layers` must ascend within 0 to 4, got 1"),
        ({"layers": [0, 5]}, "`layers` must ascend within 0 to 4, got 5"),
        ({"layers": [True]}, "`layers` must ascend"),
        ([], "`widths` must be a JSON object, got list"),
    ],
)  # fmt: skip
def test_refusals(widths, message):
    with pytest.raises(ConfigError, match=message):
        Slicing(parent().config, widths)


def test_refusals_of_models():
    with pytest.raises(ConfigError, match="`moe_latent_size`: the model has none"):
        Slicing(hybrids.config("E"), {"moe_latent_size": 8})
    with pytest.raises(ConfigError, match="experts in 2 groups have no prefix"):
        Slicing(hybrids.config("E", n_group=2, topk_group=2), {"n_routed_experts": 6})
    for family in ("llama", "mamba2"):
        with pytest.raises(ConfigError, match=f"only nemotron_h can be sliced, not {family}"):
            Slicing(families.config(family), {})
    with pytest.raises(ConfigError, match="sliced, not NemotronH_Nano_VL_V2"):
        Slicing(vl.config(), {})
    with pytest.raises(ConfigError, match="sliced, not a reward model"):
        Slicing(RewardConfig(hybrids.config("M"), "score"), {})


def test_widths_are_json():
    assert Slicing(parent().config, json.loads('{"intermediate_size": {"2": 8}}')).child
