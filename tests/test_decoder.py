"""Decoders against an independent formula; positions, caches, packing, training and generation."""

import dataclasses
import json
import math

import decoders
import hybrids
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_checkpoint import stored_bytes

from nemokernels.models import build, exact, from_pretrained, generate, save_pretrained
from nemokernels.models.decoder import rope_table
from nemokernels.models.runs import Packed
from nemokernels.train.commands import load_model
from nemokernels.train.data import Batch
from nemokernels.train.objective import Objective
from nemokernels.train.trainer import Trainer


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


@pytest.fixture(params=decoders.FAMILIES)
def model(request):
    return decoders.model(request.param, dtype=torch.float64)


def test_forward_is_the_plain_formula(model):
    tokens = hybrids.tokens(2, 40)
    with torch.no_grad():
        ours = model(tokens)
        theirs = torch.stack([plain(model.config, model.state_dict(), row) for row in tokens])
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_tied_head_is_the_embeddings():
    model = decoders.model("llama", dtype=torch.float64, tie_word_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    tokens = hybrids.tokens(1, 20)
    theirs = plain(model.config, model.state_dict(), tokens[0])
    assert (model(tokens)[0] - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    model.lm_head.weight.sum().backward()
    assert torch.equal(model.model.embed_tokens.weight.grad, torch.ones(96, 32).double())


def test_angles_are_exact_far_out():
    config = decoders.config("llama", rope_theta=500000.0)
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


def test_packed_is_separate(model):
    rows = [hybrids.tokens(1, length, seed=length) for length in (5, 0, 1, 17)]
    bounds = torch.tensor([0, 5, 5, 6, 23], dtype=torch.int32)
    with torch.no_grad():
        packed = model(torch.cat(rows, 1), cu_seqlens=bounds)
        separate = torch.cat([model(row) for row in rows], 1)
    assert (packed - separate).abs().max() <= 1e-12 * separate.abs().max()


def test_chunks_of_prefill_and_decode_are_the_whole(model):
    """Two sequences of unlike lengths in slots 2 and 0; a padding row takes part."""
    tokens = hybrids.tokens(2, 20)
    a, b = tokens
    state = model.new_state(3, 24, draft_tokens=2)
    with torch.no_grad():
        whole = model(tokens)
        slots = torch.tensor([2, -1, 0], dtype=torch.int32)
        first = torch.cat([a[:7], a[:3], b[:4]])[None]
        bounds = torch.tensor([0, 7, 10, 14], dtype=torch.int32)
        out = model(first, cu_seqlens=bounds, state=state, slots=slots)[0]
        got_a, got_b = [out[:7]], [out[10:]]
        second = torch.cat([b[4:9], a[7:8]])[None]
        bounds = torch.tensor([0, 5, 6], dtype=torch.int32)
        out = model(second, cu_seqlens=bounds, state=state, slots=slots[[2, 0]])[0]
        got_b.append(out[:5]), got_a.append(out[5:])
        wrong = torch.zeros_like(a[:1])
        step = torch.stack([a[8:11], a[:3], torch.cat([b[9:11], wrong])])
        out = model(step, state=state, slots=slots, decode=True)
        state.accept([3, 1, 2])  # the second sequence's last token was a rejected draft
        got_a.append(out[0]), got_b.append(out[2, :2])
        step = torch.stack([a[11:12], a[:1], b[11:12]])
        out = model(step, state=state, slots=slots, decode=True)
        state.accept()
        got_a.append(out[0]), got_b.append(out[2])
    assert state.lengths.tolist() == [12, 0, 12]
    for got, want in zip((torch.cat(got_a), torch.cat(got_b)), whole):
        assert (got - want[:12]).abs().max() <= 1e-12 * want.abs().max()


def test_empty_inputs(model):
    assert model(hybrids.tokens(0, 5)).shape == (0, 5, 96)
    assert model(hybrids.tokens(2, 0)).shape == (2, 0, 96)
    state = model.new_state(1, 4)
    none = torch.zeros(1, dtype=torch.int32)
    assert model(hybrids.tokens(1, 0), cu_seqlens=none, state=state).shape == (1, 0, 96)


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_greedy_generation_is_the_argmax_of_the_whole(family):
    model = decoders.model(family, dtype=torch.float64)
    prompts = [[5, 6, 7], [1], list(range(20))]
    got = generate(model, prompts, max_new_tokens=9).tokens
    for prompt, tokens in zip(prompts, got):
        row = list(prompt)
        for _ in range(9):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        assert row[len(prompt) :] == tokens


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_exact_mode_ignores_the_batch(family):
    model = decoders.model(family, dtype=torch.float32)
    tokens = hybrids.tokens(3, 13)
    with torch.no_grad(), exact():
        assert torch.equal(model(tokens)[1:2], model(tokens[1:2]))


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_loss_on_a_repeated_batch_halves(family, tmp_path):
    torch.manual_seed(0)
    model = build(decoders.config(family, vocab_size=320), dtype=torch.float32)
    settings = tiny.settings(steps=50, lr=1e-2, warmup=2, decay=10)
    trainer = Trainer(model, tiny.batches(settings), settings, tmp_path)
    batch = trainer.batches.at(0, 0, 1)
    trainer.batches.at = lambda *_: batch
    reports = [trainer.train_step() for _ in range(50)]
    assert reports[-1].losses[0] <= reports[0].losses[0] / 2
    assert len(reports[0].losses) == 1 and reports[0].load_max == 0
    trainer.export(tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert again.config.model_type == family
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_every_parameter_gets_a_gradient(family):
    model = decoders.model(family, dtype=torch.float64).train()
    batch = tiny.batches(tiny.settings()).at(0, 0, 1)
    batch = Batch(batch.tokens % 96, batch.cu_seqlens)
    objective = Objective(model, mtp_depths=2, mtp_weight=0.3)
    objective(batch, objective.label_counts(batch))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_initial_values(family):
    torch.manual_seed(0)
    model = build(decoders.config(family, hidden_size=64), dtype=torch.float32)
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
    model = decoders.model("nemotron-nas")
    assert [len(list(unit.parameters())) for unit in model.fsdp_units()] == [9, 4, 5, 9]
    assert [*model.new_state(1, 4).keys] == [0, 3, 4]
    assert [key.shape[2] for key in model.new_state(1, 4).keys.values()] == [2, 4, 1]


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_the_command_line_builds_from_a_config_file(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(decoders.config(family).to_dict()))
    model = load_model(str(tmp_path / "config.json"), seed=0)
    assert model.config.model_type == family
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("family", decoders.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_loading_and_saving_keeps_every_byte(family, tied, tmp_path):
    model = decoders.model(family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    save_pretrained(model, tmp_path / "a", max_shard_bytes=20_000)
    save_pretrained(from_pretrained(tmp_path / "a", dtype=torch.float32), tmp_path / "b")
    save_pretrained(from_pretrained(tmp_path / "a"), tmp_path / "c")
    first = stored_bytes(tmp_path / "a")
    assert ("lm_head.weight" in first) != tied
    assert stored_bytes(tmp_path / "c") == first
    assert stored_bytes(tmp_path / "b").keys() == first.keys()
    again = from_pretrained(tmp_path / "c").config
    assert dataclasses.replace(again, extra={}) == model.config
