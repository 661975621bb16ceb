"""The model family: sizes, structure, packing, gradients, prediction further ahead."""

import math

import hybrids
import pytest
import torch
import torch.nn.functional as F

from nemokernels import relu2, rms_norm
from nemokernels.models import NemotronH, NemotronHConfig, build, exact
from nemokernels.models.linear import is_exact, linear


@pytest.fixture(scope="module")
def wide():
    return hybrids.model("M*-EME", "*E", moe_latent_size=16, dtype=torch.float64)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_names_and_dtypes():
    model = build("NVIDIA-Nemotron-3-Super-120B-A12B-BF16", device="meta", dtype=torch.bfloat16)
    state = model.state_dict()
    assert state["backbone.layers.0.mixer.in_proj.weight"].shape == (18560, 4096)
    assert state["backbone.layers.0.mixer.conv1d.weight"].shape == (10240, 1, 4)
    assert state["backbone.layers.1.mixer.experts.up_proj"].shape == (512, 2688, 1024)
    assert state["mtp.layers.0.eh_proj.weight"].shape == (4096, 8192)
    assert state["mtp.layers.1.mixer.experts.down_proj"].shape == (512, 1024, 2688)
    assert {"mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight",
            "mtp.layers.1.final_layernorm.weight", "backbone.norm_f.weight",
            "lm_head.weight", "backbone.embeddings.weight"} <= set(state)  # fmt: skip
    wide = {name for name, t in state.items() if t.dtype == torch.float32}
    leaves = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")
    assert wide == {name for name in state if name.endswith(leaves)}
    assert {t.dtype for t in state.values()} == {torch.float32, torch.bfloat16}


def test_runs_on_meta():
    model = build(hybrids.config("ME*"), device="meta")
    assert model(torch.zeros(1, 5, dtype=torch.int64, device="meta")).shape[:2] == (1, 5)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no variant 'nano'; did you mean Nemotron 3 Nano 30B"):
        build("nano")
    with pytest.raises(TypeError, match="`name_or_config` must be a variant's name or a"):
        build(3)


def test_casts_leave_wide_what_must_be_wide():
    model = hybrids.model("ME*", dtype=torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        wide = name.endswith(("A_log", ".D", "dt_bias", "gate.weight", "correction_bias"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert not wide or torch.equal(tensor, before[name])
    assert {t.dtype for t in model.double().state_dict().values()} == {torch.float64}
    assert {t.dtype for t in model.half().float().state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("lengths", [(5, 1, 9), (16, 0, 3), (1, 1, 1), (8, 8, 8)])
def test_packed_equals_separate(wide, lengths):
    rows = [hybrids.tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = torch.cat(rows, 1)
    for run in (wide, wide.hidden):
        out = run(packed, cu_seqlens=bounds)
        assert_close(out, torch.cat([run(row) for row in rows], 1))
    out = wide.mtp_hidden(out, packed.roll(-1, 1), cu_seqlens=bounds)
    moved = packed.roll(-1, 1).split(lengths, 1)
    want = [wide.mtp_hidden(wide.hidden(row), next_) for row, next_ in zip(rows, moved)]
    assert_close(out, torch.cat(want, 1))


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(pattern="M-*-", mlp_hidden_act="gelu_pytorch_tanh", intermediate_size=37)],
)
def test_packed_equals_separate_bit_for_bit_in_exact_mode(fields):
    model, lengths = hybrids.model(**fields), (5, 0, 9, 1)
    rows = [hybrids.tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    with exact():
        packed = model(torch.cat(rows, 1), cu_seqlens=bounds)
        assert torch.equal(packed, torch.cat([model(row) for row in rows], 1))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1), (3, 7)])
def test_sizes(wide, shape):
    hidden = wide.hidden(hybrids.tokens(*shape))
    assert hidden.shape == (*shape, 32) and wide(hybrids.tokens(*shape)).shape == (*shape, 96)
    assert wide.mtp_hidden(hidden, hybrids.tokens(*shape)).shape == (*shape, 32)


def test_is_causal(wide):
    tokens = hybrids.tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 96
    a, b = wide(tokens), wide(changed)
    assert_close(a[:, :12], b[:, :12])
    assert ((a - b)[:, 12:].abs().amax(-1) > 1e-6).all()


def attention_formula(state, prefix, x):
    q, k, v = (
        F.linear(x, state[f"{prefix}.{n}_proj.weight"]).unflatten(-1, (-1, 12)) for n in "qkv"
    )
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(12)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(mask, -math.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(-2)
    return F.linear(out, state[f"{prefix}.o_proj.weight"])


def experts_formula(state, prefix, x, top_k=3, scale=2.5):
    """Token by token, every expert an ordinary MLP."""
    mlp = lambda u, up, down: F.linear(F.linear(u, up).clamp(min=0) ** 2, down)  # noqa: E731
    get = lambda name: state[f"{prefix}.{name}"]  # noqa: E731
    rows = []
    for token in x.flatten(0, 1):
        scores = F.linear(token, get("gate.weight")).sigmoid()
        chosen = (scores + get("gate.e_score_correction_bias")).topk(top_k).indices
        weights = scores[chosen] / scores[chosen].sum() * scale
        u = F.linear(token, get("fc1_latent_proj.weight"))
        y = sum(w * mlp(u, get("experts.up_proj")[e], get("experts.down_proj")[e])
                for w, e in zip(weights, chosen))  # fmt: skip
        shared = (get(f"shared_experts.{n}_proj.weight") for n in ("up", "down"))
        rows.append(F.linear(y, get("fc2_latent_proj.weight")) + mlp(token, *shared))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_block_from_its_definition(wide, depth):
    state, tokens = wide.state_dict(), hybrids.tokens(2, 9 + depth)
    norm = lambda x, name: F.rms_norm(x, (32,), state[name], 1e-5)  # noqa: E731
    hidden = want = wide.hidden(tokens[:, :9])
    for k in range(1, depth + 1):
        ahead = tokens[:, k : 9 + k]
        hidden = wide.mtp_hidden(hidden, ahead)
        embedded = state["backbone.embeddings.weight"][ahead]
        both = [
            norm(embedded, "mtp.layers.0.enorm.weight"),
            norm(want, "mtp.layers.0.hnorm.weight"),
        ]
        x = F.linear(torch.cat(both, -1), state["mtp.layers.0.eh_proj.weight"])
        x = x + attention_formula(state, "mtp.layers.0.mixer", norm(x, "mtp.layers.0.norm.weight"))
        x = x + experts_formula(state, "mtp.layers.1.mixer", norm(x, "mtp.layers.1.norm.weight"))
        want = norm(x, "mtp.layers.1.final_layernorm.weight")
    assert_close(hidden, want)


def test_model_without_mtp_says_so():
    model = hybrids.model("M*")
    with pytest.raises(ValueError, match="this model has no MTP block"):
        model.mtp_hidden(torch.zeros(1, 2, 32), hybrids.tokens(1, 2))


def test_gradients_reach_every_parameter(wide):
    wide.zero_grad()
    tokens = hybrids.tokens(2, 40)
    hidden = wide.hidden(tokens)
    ahead = wide.mtp_hidden(hidden, tokens.roll(-1, 1))
    (wide.lm_head(hidden).square().mean() + wide.lm_head(ahead).square().mean()).backward()
    for name, parameter in wide.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        per_row = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]
        if "embeddings" not in name:  # only the rows of the tokens seen
            assert (per_row != 0).any(), name
    wide.zero_grad()


def test_gradient_of_the_whole_model():
    """Central differences along random directions, all parameters at once."""
    model = hybrids.model("ME*-", "*E", dtype=torch.float64, moe_latent_size=8)
    tokens = hybrids.tokens(1, 11)
    parameters = list(model.parameters())

    def loss():
        hidden = model.hidden(tokens)
        return (model.lm_head(model.mtp_hidden(hidden, tokens)) + model.lm_head(hidden)).sin().sum()

    grads = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        torch.manual_seed(seed)
        directions, step = [torch.randn_like(p) for p in parameters], 1e-6
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                for p, d in zip(parameters, directions):
                    p.add_(d, alpha=sign * step)
                ends.append(loss())
            for p, d in zip(parameters, directions):
                p.add_(d, alpha=step)
        want = (ends[0] - ends[1]) / (2 * step)
        got = sum((g * d).sum() for g, d in zip(grads, directions))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_expert_counts_are_kept_in_training_only():
    model = hybrids.model("ME*E", "*E")
    tokens = hybrids.tokens(2, 10)
    model(tokens)
    assert [row.tolist() for row in model.expert_counts] == [[0] * 8] * 3
    model.train()
    for _ in range(2):
        hidden = model.hidden(tokens)
    model.mtp_hidden(hidden, tokens)
    assert [row.sum().item() for row in model.expert_counts] == [120, 120, 60]
    assert all(r.expert_counts is row for r, row in zip(model.routers(), model.expert_counts))
    assert not any("expert_counts" in name for name in model.state_dict())
    assert hybrids.model("M*").expert_counts == []


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(packed):
    model = hybrids.model("M*-E", "*E", moe_latent_size=16).train()
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32) if packed else None
    tokens = hybrids.tokens(1, 12)

    def loss(tokens):
        hidden = model.hidden(tokens, cu_seqlens=bounds)
        ahead = model.mtp_hidden(hidden, tokens.roll(-1, 1), cu_seqlens=bounds)
        return (model.lm_head(hidden) + model.lm_head(ahead)).square().mean()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        for router in model.routers():
            router.expert_counts.zero_()
        value = run(tokens)
        value.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append((value.detach(), grads, torch.stack(model.expert_counts)))
    (a, grads_a, counts_a), (b, grads_b, counts_b) = results
    assert torch.equal(a, b) and torch.equal(counts_a, counts_b) and counts_a.sum() > 0
    for x, y in zip(grads_a, grads_b):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_exact_mode_ends_with_its_block():
    with exact():
        with pytest.raises(RuntimeError), exact():
            raise RuntimeError
        assert is_exact()
    assert not is_exact()


def test_exact_mode_reaches_compiled_code():
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    plain = compiled(x, weight)
    with exact():
        one_by_one = compiled(x, weight)
        assert torch.equal(one_by_one, torch.cat([linear(row, weight) for row in x.split(1)]))
    compiled(x, weight)
    assert len(graphs) == 2 and graphs[1] > graphs[0] and plain.shape == (4, 5)


def test_reset_parameters():
    torch.manual_seed(0)
    c = hybrids.config("M*-EME", "*E", moe_latent_size=16, hidden_size=256, initializer_range=0.05)
    model = build(c)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(t.isfinite().all() for t in state.values())
    for name, t in state.items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        layers = 2 if name.startswith("mtp") else 6
        if "norm" in leaf or leaf == "D":
            assert (t == 1).all(), name
        elif leaf in ("e_score_correction_bias", "expert_counts"):
            assert (t == 0).all(), name
        elif t.dim() >= 2 and "conv1d" not in name:
            small = leaf in ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
            std = 0.05 / math.sqrt(layers) if small else 0.05
            # The sample deviation of n normal values is within 5 of its own deviations.
            assert abs(t.std() / std - 1) < 5 / math.sqrt(2 * t.numel()), name
    A = state["backbone.layers.0.mixer.A_log"].exp()
    dt = F.softplus(state["backbone.layers.0.mixer.dt_bias"])
    assert (A >= 1).all() and (A <= 16).all() and A.std() > 0
    assert (dt >= 0.000999).all() and (dt <= 0.1001).all() and dt.std() > 0
    bound = state["backbone.layers.0.mixer.conv1d.weight"].abs().max()
    assert 0.45 < bound <= 0.5
    same = build(hybrids.config("M-", rescale_prenorm_residual=False, hidden_size=256))
    assert abs(same.backbone.layers[1].mixer.down_proj.weight.std() / 0.02 - 1) < 0.05


def test_logits_at_the_start_are_calm():
    torch.manual_seed(0)
    logits = build(hybrids.config("M*-EME"))(hybrids.tokens(2, 30))
    loss = F.cross_entropy(logits.flatten(0, 1), hybrids.tokens(2, 30, seed=1).flatten())
    assert abs(loss.item() - math.log(96)) < 0.1


def test_autocast_keeps_router_and_states_wide():
    model = hybrids.model("M*-E")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(hybrids.tokens(2, 9))
        scores = next(model.routers())(torch.randn(3, 32))
    assert logits.dtype == torch.bfloat16 and scores.dtype == torch.float32
    assert (logits.float() - model(hybrids.tokens(2, 9))).abs().median() < 0.1


def test_layer_is_residual_plus_mixer_of_norm(wide):
    """The stream that layers hand on, against the plain sum."""
    x, residual = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    layer = wide.backbone.layers[2]
    out, stream = layer(x, residual, None)
    assert torch.equal(stream, x + residual)
    normed = rms_norm(stream, layer.norm.weight, eps=1e-5)
    up, down = layer.mixer.up_proj.weight, layer.mixer.down_proj.weight
    assert_close(out, F.linear(relu2(F.linear(normed, up)), down))


def test_units_of_sharding_cover_the_layers():
    model = hybrids.model("M*E", "*E")
    assert model.fsdp_units() == [*model.backbone.layers, model.mtp]
    assert hybrids.model("M*").mtp is None and len(hybrids.model("M*").fsdp_units()) == 2


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, "`tokens` must be a torch.Tensor, got list"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"`tokens` has shape \(4,\)"),
        (torch.zeros(1, 4), TypeError, "`tokens` is torch.float32"),
    ],
)
def test_bad_tokens(wide, tokens, error, message):
    with pytest.raises(error, match=message):
        wide(tokens)


def test_bad_next_tokens(wide):
    with pytest.raises(ValueError, match=r"`next_tokens` has shape \(1, 3\), expected \(B, T\)"):
        wide.mtp_hidden(torch.zeros(1, 4, 32).double(), hybrids.tokens(1, 3))


def test_config_travels_with_the_model(wide):
    again = NemotronH(NemotronHConfig.from_dict(wide.config.to_dict()), device="meta")
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in wide.state_dict().items()
    }
