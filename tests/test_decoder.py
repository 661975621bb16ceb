"""Decoders against an independent formula; positions, caches, packing, training and generation."""

import math

import families
import hybrids
import pytest
import torch
import torch.nn.functional as F

from nemokernels.models import build
from nemokernels.models.decoder import rope_table
from nemokernels.models.runs import Packed


def angle(config, position, pair):
    """Of one pair of channels, as the Llama 3 paper's reference has it: case by case."""
    frequency = 1 / config.rope_theta ** (2 * pair / config.rotary_dim)
    s = config.rope_scaling
    if s is not None:
        wavelength = 2 * math.pi / frequency
        longest = s.original_max_position_embeddings / s.low_freq_factor
        shortest = s.original_max_position_embeddings / s.high_freq_factor
        if wavelength > longest:
            frequency /= s.factor
        elif wavelength >= shortest:
            smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
    return position * frequency


def rotation(config, position):
    """The matrix that turns a head at this position."""
    half = config.rotary_dim // 2
    matrix = torch.eye(config.head_dim, dtype=torch.float64)
    for i in range(half):
        cos, sin = (f(angle(config, position, i)) for f in (math.cos, math.sin))
        matrix[i, i] = matrix[i + half, i + half] = cos
        matrix[i, i + half], matrix[i + half, i] = -sin, sin
    return matrix


def plain(config, weights, tokens):
    """Logits (T, V) of one sequence, written from the published description of the nets."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(name, x):
        if f"{name}.bias" not in w:
            return (
                x
                / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
                * w[f"{name}.weight"]
            )
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        y = (x - mean) / (var + config.norm_eps).sqrt()
        return y * (1 + w[f"{name}.weight"]) + w[f"{name}.bias"]

    def attention(prefix, x, kv_heads):
        T, heads, size = len(x), config.num_attention_heads, config.head_dim
        q, k, v = ((x @ w[f"{prefix}.{leaf}_proj.weight"].T).view(T, -1, size) for leaf in "qkv")
        turn = torch.stack([rotation(config, t) for t in range(T)])
        q, k = (torch.einsum("tij,thj->thi", turn, part) for part in (q, k))
        out = torch.empty(T, heads, size, dtype=torch.float64)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(size)
            scores += torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
            out[:, head] = scores.softmax(-1) @ v[:, shared]
        return out.reshape(T, -1) @ w[f"{prefix}.o_proj.weight"].T

    def ffn(prefix, x):
        up = x @ w[f"{prefix}.up_proj.weight"].T
        gate = w.get(f"{prefix}.gate_proj.weight")
        inner = up.clamp(min=0) ** 2 if gate is None else F.silu(x @ gate.T) * up
        return inner @ w[f"{prefix}.down_proj.weight"].T

    x = w["model.embed_tokens.weight"][tokens]
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        keys = w.get(f"{prefix}.self_attn.k_proj.weight")
        if keys is not None:
            heads = len(keys) // config.head_dim
            normed = norm(f"{prefix}.input_layernorm", x)
            x = x + attention(f"{prefix}.self_attn", normed, heads)
        if f"{prefix}.mlp.up_proj.weight" in w:
            x = x + ffn(f"{prefix}.mlp", norm(f"{prefix}.post_attention_layernorm", x))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm("model.norm", x) @ head.T


@pytest.fixture(params=families.DECODERS)
def model(request):
    return families.model(request.param, dtype=torch.float64)


def test_forward_is_the_plain_formula(model):
    tokens = hybrids.tokens(2, 40)
    with torch.no_grad():
        ours = model(tokens)
        theirs = torch.stack([plain(model.config, model.state_dict(), row) for row in tokens])
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_tied_head_is_the_embeddings():
    model = families.model("llama", dtype=torch.float64, tie_word_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    tokens = hybrids.tokens(1, 20)
    theirs = plain(model.config, model.state_dict(), tokens[0])
    assert (model(tokens)[0] - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    model.lm_head.weight.sum().backward()
    assert torch.equal(model.model.embed_tokens.weight.grad, torch.ones(96, 32).double())


def test_angles_are_exact_far_out():
    config = families.config("llama", rope_theta=500000.0)
    positions = torch.tensor([[0, 1, 131071, 1 << 30]])
    cos, sin = rope_table(config, positions, torch.float64)
    for t, position in enumerate(positions[0].tolist()):
        for pair in range(6):
            want = angle(config, position, pair)
            slack = 1e-12 + 1e-15 * abs(want)  # a few roundings of the angle itself
            assert abs(cos[0, t, 0, pair] - math.cos(want)) <= slack
            assert abs(sin[0, t, 0, pair] - math.sin(want)) <= slack
    narrow = rope_table(config, positions, torch.bfloat16)[0]
    assert narrow.dtype == torch.float32 and torch.equal(narrow, cos.float())


def test_packed_positions_start_anew():
    """Attention would not notice: it depends on differences of positions alone."""
    bounds = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    tokens = hybrids.tokens(1, 6)
    assert Packed(None, bounds).positions(tokens).tolist() == [[0, 1, 0, 0, 1, 2]]
    assert Packed(None, None).positions(hybrids.tokens(2, 3)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("family", families.DECODERS)
def test_initial_values(family):
    torch.manual_seed(0)
    model = build(families.config(family, hidden_size=64), dtype=torch.float32)
    config = model.config
    for name, value in model.state_dict().items():
        if "norm" in name:
            centred = family == "nemotron"
            assert bool((value == (0.0 if centred else 1.0)).all()), name
        else:
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = config.initializer_range / (config.depth**0.5 if out else 1)
            assert value.std().item() == pytest.approx(std, rel=0.15), name
    assert not list(model.buffers())


def test_units_to_shard_are_the_layers_that_hold_something():
    model = families.model("nemotron-nas")
    assert [len(list(unit.parameters())) for unit in model.fsdp_units()] == [9, 4, 5, 9]
    assert [*model.new_state(1, 4).keys] == [0, 3, 4]
    assert [key.shape[2] for key in model.new_state(1, 4).keys.values()] == [2, 4, 1]
