"""Hymba against an independent formula; meta tokens in the state; configurations; the 1.5B."""

import dataclasses
import math

import families
import hybrids
import pytest
import torch

from nemokernels.models import (
    ConfigError,
    HymbaConfig,
    State,
    build,
    exact,
    find_variant,
    generate,
    names,
)


def plain(config, weights, tokens):
    """Logits (T, V) of one sequence, written from the published description of the nets.

    One token and one head after the other; positions turn pairs of channels as complex numbers.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    c, meta = config, len(w["model.meta_tokens"])
    half = c.qk_head_dim // 2

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def turned(x):  # (T, heads, size)
        steps = torch.arange(len(x)).double()[:, None]
        angles = steps * c.rope_theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([y.real, y.imag], -1)

    def attention(q, k, v, windowed):
        out = torch.zeros(len(q), c.num_attention_heads, c.v_head_dim, dtype=torch.float64)
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            for t in range(len(q)):
                seen = [s for s in range(t + 1)
                        if not windowed or s < meta or s > t - c.sliding_window]  # fmt: skip
                scores = k[seen, shared] @ q[t, head] / math.sqrt(c.qk_head_dim)
                out[t, head] = scores.softmax(0) @ v[seen, shared]
        return out.flatten(1)

    def mamba(name, x, gate):
        taps, T = w[f"{name}.conv1d.weight"][:, 0], len(x)
        padded = torch.cat([torch.zeros(c.conv_kernel - 1, c.d_inner).double(), x])
        x = sum(padded[i : i + T] * taps[:, i] for i in range(c.conv_kernel))
        x = x + w[f"{name}.conv1d.bias"]
        x = x * torch.sigmoid(x)
        rank, state = c.time_step_rank, c.state_size
        dt, B, C = (x @ w[f"{name}.x_proj.weight"].T).split([rank, state, state], 1)
        dt, B, C = (
            norm(f"{name}.{leaf}_layernorm", t) for leaf, t in zip(("dt", "B", "C"), (dt, B, C))
        )
        dt = (dt @ w[f"{name}.dt_proj.weight"].T + w[f"{name}.dt_proj.bias"]).exp().log1p()
        A, h, out = -w[f"{name}.A_log"].exp(), torch.zeros(c.d_inner, state).double(), []
        for t in range(T):
            h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B[t]
            out.append(h @ C[t] + w[f"{name}.D"] * x[t])
        return torch.stack(out) * gate * torch.sigmoid(gate)

    x = torch.cat([w["model.meta_tokens"], w["model.embed_tokens.weight"][tokens]])
    held = {}
    for index in range(c.num_hidden_layers):
        prefix = f"model.layers.{index}"
        first = next((g[0] for g in c.kv_reuse_groups if index in g), index)
        heads = {"q": (c.num_attention_heads, c.qk_head_dim)}
        if first == index:
            heads["k"] = (c.num_key_value_heads, c.qk_head_dim)
            heads["v"] = (c.num_key_value_heads, c.v_head_dim)
        sizes = [n * size for n, size in heads.values()] + [c.d_inner] * 2
        normed = norm(f"{prefix}.input_layernorm", x)
        *parts, inner, gate = (normed @ w[f"{prefix}.mixer.in_proj.weight"].T).split(sizes, 1)
        parts = {name: p.unflatten(1, heads[name]) for name, p in zip(heads, parts)}
        if first == index:
            held[index] = turned(parts["k"]), parts["v"]
        windowed = index not in c.global_attn_layers
        attended = attention(turned(parts["q"]), *held[first], windowed)
        scanned = mamba(f"{prefix}.mixer.mamba", inner, gate)
        both = [norm(f"{prefix}.mixer.pre_avg_layernorm1", attended),
                norm(f"{prefix}.mixer.pre_avg_layernorm2", scanned)]  # fmt: skip
        x = x + torch.stack(both).mean(0) @ w[f"{prefix}.mixer.out_proj.weight"].T
        normed = norm(f"{prefix}.pre_ffn_layernorm", x)
        gate, up = (normed @ w[f"{prefix}.mlp.{leaf}_proj.weight"].T for leaf in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{prefix}.mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm("model.norm", x[meta:]) @ head.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_word_embeddings=True, num_hidden_layers=3, kv_reuse_groups=[]),
        dict(qk_head_dim=20, conv_kernel=2, global_attn_layers=[], kv_reuse_groups=[[1, 2, 3]]),
        dict(expand=1, v_head_dim=8, meta_tokens=1, global_attn_layers=[2, 3],
             kv_reuse_groups=[[0, 1], [2, 3]]),
    ],
)  # fmt: skip
def test_forward_is_the_plain_formula(changes):
    model = families.model("hymba", dtype=torch.float64, **changes)
    tokens = hybrids.tokens(2, 12)
    with torch.no_grad():
        ours = model(tokens)
        theirs = torch.stack([plain(model.config, model.state_dict(), row) for row in tokens])
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_packed_gradients_are_those_of_separate_rows():
    """The meta tokens' too, which every sequence has before it."""
    model = families.model("hymba", dtype=torch.float64)
    rows = [hybrids.tokens(1, length, seed=length) for length in (5, 0, 7)]
    grads = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
            out = model(torch.cat(rows, 1), cu_seqlens=bounds)
        else:
            out = torch.cat([model(row) for row in rows], 1)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_slots_begin_with_the_meta_tokens_and_lengths_leave_them_out():
    model, tokens = families.model("hymba", dtype=torch.float64), hybrids.tokens(2, 6)
    state = model.new_state(3, 6, draft_tokens=1)
    assert state.prefix == 5 and state.lengths.tolist() == [0, 0, 0]
    assert {key.shape for key in state.keys.values()} == {(3, 11, 2, 16)}
    assert sorted(state.keys) == [0, 1, 3] and sorted(state.ssm) == [0, 1, 2, 3]
    with torch.no_grad():
        want = model(tokens)
        slots = torch.tensor([2, 1], dtype=torch.int32)
        for _ in range(2):  # the second time in slots that were reset
            out = [model(tokens[:, :1], state=state, slots=slots, decode=True)]  # no prefill
            state.accept()
            out.append(model(tokens[:, 1:6], state=state, slots=slots))
            got = torch.cat(out, 1)
            assert (got - want).abs().max() <= 1e-12 * want.abs().max()
            assert state.lengths.tolist() == [0, 6, 6]
            state.reset([1, 2])
    with pytest.raises(ValueError, match="slot 0 would hold 7 tokens, but `max_length` is 6"):
        model(hybrids.tokens(1, 7), state=state)


def test_a_state_without_the_meta_tokens_is_refused():
    model = families.model("hymba")
    state = State(model.config, 1, 8)
    for decode in (False, True):
        with pytest.raises(ValueError, match="`state` lacks the meta tokens"):
            model(hybrids.tokens(1, 1), state=state, decode=decode)


def test_rejected_drafts_leave_no_trace():
    """A window of three and its cache: the same bits as never having drafted."""
    model, tokens = families.model("hymba"), hybrids.tokens(1, 12)
    results = []
    with torch.no_grad(), exact():
        for drafts in (0, 2):
            state = model.new_state(1, 16, draft_tokens=2)
            out = [model(tokens[:, :4], state=state)]
            for t in range(4, 12):
                wrong = torch.zeros(1, drafts, dtype=torch.int64)
                step = torch.cat([tokens[:, t : t + 1], wrong], 1)
                out.append(model(step, state=state, decode=True)[:, :1])
                state.accept([1])
            results.append(torch.cat(out, 1))
    assert torch.equal(*results)


def test_generation_forks_and_continues():
    """A fork takes the meta tokens along; greedy tokens past the window are the argmax."""
    model = families.model("hymba", dtype=torch.float64)
    state = model.new_state(2, 12)
    tokens = generate(model, [[1, 2, 3]], max_new_tokens=8).tokens[0]
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), state=state)
        state.fork(0, 1)
        row = torch.tensor([tokens[:1]])
        slots = torch.tensor([1], dtype=torch.int32)
        for token in tokens[1:]:
            logits = model(row, state=state, slots=slots, decode=True)
            state.accept()
            assert int(logits.argmax()) == token
            row = torch.tensor([[token]])


def test_initial_values():
    """Two projections a layer write into the residual stream; the meta tokens are embeddings."""
    torch.manual_seed(0)
    model = build(families.config("hymba", intermediate_size=200), dtype=torch.float32)
    layer = model.model.layers[2]
    for projection in (layer.mixer.out_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.1)
    assert model.model.meta_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(layer.mixer.mamba.A_log[7], torch.tensor([1.0, 2, 3, 4]).log())
    for name, parameter in model.named_parameters():
        assert "norm" not in name or bool((parameter == 1).all()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=...), "`vocab_size` is missing"),
        (dict(rope_theta=...), "`rope_theta` is missing"),
        (dict(kv_reuse_groups=None), "`kv_reuse_groups` is missing"),
        (dict(hidden_size="32"), "`hidden_size` must be of type int, got '32'"),
        (dict(meta_tokens=0), "`meta_tokens` must be from 1"),
        (dict(num_key_value_heads=3), "`num_attention_heads` is 4, not a multiple"),
        (dict(v_head_dim=12), "`num_attention_heads` x `v_head_dim` is 48, but .* 64 wide"),
        (dict(qk_head_dim=7), "`qk_head_dim` must be even, got 7"),
        (dict(rope_theta=0.0), "`rope_theta` must be above 0"),
        (dict(global_attn_layers=3), "`global_attn_layers` must be a list, got 3"),
        (dict(global_attn_layers=[4]), "`global_attn_layers` holds 4, expected layers below 4"),
        (dict(global_attn_layers=[True]), "`global_attn_layers` holds True"),
        (dict(global_attn_layers=[0, 0]), "`global_attn_layers` repeats a layer"),
        (dict(kv_reuse_groups=[1, 2]), "`kv_reuse_groups` must hold lists, got 1"),
        (dict(kv_reuse_groups=[["1"]]), "`kv_reuse_groups` holds '1'"),
        (dict(kv_reuse_groups=[[1, 3]]), r"holds \(1, 3\), expected adjacent layers"),
        (dict(kv_reuse_groups=[[0, 1]]), r"holds \(0, 1\): windowed and global layers"),
        (dict(kv_reuse_groups=[[1, 2], [2, 3]]), "`kv_reuse_groups` repeats a layer"),
        (dict(hidden_act="gelu"), "`hidden_act` is 'gelu'; only 'silu' is supported"),
        (dict(conv_kernel=1), "`conv_kernel` must be 2, 3 or 4"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        families.config("hymba", **change)


def test_a_configuration_survives_its_file():
    config = families.config("hymba", torch_dtype="bfloat16")
    again = HymbaConfig.from_dict(config.to_dict())
    assert (
        dataclasses.replace(again, extra=config.extra) == config
        and again.extra["torch_dtype"] == "bfloat16"
    )
    assert again.kv_reuse_groups == ((1, 2),) and again.sources == (0, 1, 1, 3)


# Not published; these give the total that is.
GIVEN = dict(vocab_size=32001, qk_head_dim=64, v_head_dim=128, rope_theta=1e4,
             tie_word_embeddings=True)  # fmt: skip


def test_the_released_size_with_what_is_not_public_given():
    variant = find_variant("Hymba-1.5B")
    assert variant.config is None and set(variant.arguments) == set(GIVEN)
    model = build("Hymba-1.5B", device="meta", **GIVEN)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert round(count / 1e9, 2) == 1.52 and variant.published == "1.52B"
    assert count == sum(math.prod(shape) for _, shape in names.tensor_shapes(model.config))
    assert len(model.config.kv_heads) == 17  # 32 layers less the 15 that share
    wide = build("Hymba-1.5B", device="meta", **{**GIVEN, "qk_head_dim": 128})
    assert sum(tensor.numel() for tensor in wide.state_dict().values()) > 1.6e9
    for name in GIVEN:
        with pytest.raises(ValueError, match=f"Hymba-1.5B needs {name}, which are not public"):
            build("Hymba-1.5B", **{k: v for k, v in GIVEN.items() if k != name})
