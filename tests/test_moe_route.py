import math

import pytest
import torch

from nemokernels import Route, balance_loss, moe_route, update_correction_bias
from nemokernels.ops.moe_route import native, op, ref

INF, NAN = math.inf, math.nan


def by_hand(logits, bias, top_k, n_group=1, topk_group=1, norm=True, scale=1.0):
    """One token at a time, in Python floats: chosen experts and their weights."""
    tokens = []
    for row in logits.double().tolist():
        s = [1 / (1 + math.exp(-v)) for v in row]
        c = [a + b for a, b in zip(s, bias.double().tolist())]
        size = len(c) // n_group
        groups = [sum(sorted(c[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-groups[g], g))[:topk_group]
        eligible = [e for e in range(len(c)) if e // size in kept]
        chosen = sorted(eligible, key=lambda e: (-c[e], e))[:top_k]
        total = sum(s[e] for e in chosen) + 1e-20 if norm else 1.0
        tokens.append([(e, s[e] / total * scale) for e in chosen])
    return tokens


CASES = [
    dict(top_k=1),
    dict(top_k=3, scale=2.5),
    dict(top_k=8, norm_topk_prob=False),
    dict(top_k=4, n_group=2, topk_group=1, scale=5.0),
    dict(top_k=5, n_group=4, topk_group=3),
    dict(top_k=2, n_group=8, topk_group=2, norm_topk_prob=False, scale=0.5),
]


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("case", CASES)
def test_fp64_equals_a_python_loop(tokens, case):
    logits = 3 * torch.randn(tokens, 8, dtype=torch.float64)
    bias = 0.3 * torch.randn(8, dtype=torch.float64)
    route = moe_route(logits, correction_bias=bias, **case)
    renamed = {"norm" if k == "norm_topk_prob" else k: v for k, v in case.items()}
    want = by_hand(logits, bias, **renamed)
    assert route.experts.tolist() == [[e for e, _ in token] for token in want]
    weights = torch.tensor([[w for _, w in t] for t in want], dtype=torch.float64)
    torch.testing.assert_close(
        route.weights, weights.view(tokens, case["top_k"]), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("case", CASES)
def test_rows_are_sorted_by_expert_then_slot(case):
    route = moe_route(torch.randn(29, 8), **case)
    flat = route.experts.reshape(-1).tolist()
    assert route.order.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert route.counts.tolist() == [flat.count(e) for e in range(8)]
    assert route.offsets.tolist() == [sum(f <= e for f in flat) for e in range(8)]
    assert all(t.dtype == torch.int32 for t in route[1:]) and route.weights.dtype == torch.float32


def test_equals_transformers():
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        hybrid_override_pattern="E*", num_hidden_layers=2, hidden_size=16, n_routed_experts=12,
        num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = modeling.NemotronHTopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(std=0.2)
    logits, weights, experts = router(torch.randn(50, 16))
    route = moe_route(logits, top_k=3, correction_bias=router.e_score_correction_bias, n_group=4,
                      topk_group=2, scale=2.5)  # fmt: skip
    theirs, ours = experts.argsort(-1), route.experts.argsort(-1)  # theirs come in any order
    assert torch.equal(experts.gather(1, theirs), route.experts.long().gather(1, ours))
    torch.testing.assert_close(
        route.weights.gather(1, ours), weights.gather(1, theirs), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = 0.3 * torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: moe_route(x, correction_bias=bias, **case).weights, (logits,)
    )


def test_bias_selects_but_does_not_weigh_and_has_no_gradient():
    logits = torch.zeros(4, 6, requires_grad=True)
    bias = torch.tensor([0, 0, 0.5, 0, -1, 0.2], requires_grad=True)
    route = moe_route(logits, top_k=2, correction_bias=bias, norm_topk_prob=False)
    assert route.experts.tolist() == [[2, 5]] * 4 and (route.weights == 0.5).all()
    route.weights.sum().backward()
    assert bias.grad is None
    assert (logits.grad != 0).tolist() == [[False, False, True, False, False, True]] * 4


def test_ties_go_to_the_lower_index():
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 1]])
    assert moe_route(logits, top_k=5).experts.tolist() == [[1, 2, 4, 5, 0]]
    many = torch.randint(0, 3, (4, 512)).bfloat16()
    for row, chosen in zip(many.tolist(), moe_route(many, top_k=400).experts.tolist()):
        assert chosen == sorted(range(512), key=lambda e: (-row[e], e))[:400]
    # Three groups of two with equal sums: the first two are kept.
    tied = torch.tensor([[1.0, 0, 0, 1, 1, 0]])
    assert moe_route(tied, top_k=3, n_group=3, topk_group=2).experts.tolist() == [[0, 3, 1]]


def test_a_dropped_group_is_never_chosen():
    bias = torch.tensor([-INF, -INF, 0, 0])
    route = moe_route(torch.zeros(2, 4), top_k=2, correction_bias=bias, n_group=2)
    assert route.experts.tolist() == [[2, 3]] * 2
    # Even where all that is left of the kept group is an expert at -inf.
    bias = torch.tensor([0.0, 0, 9, -INF])
    logits = torch.tensor([[-INF, -INF, 0, 0]])
    route = moe_route(logits, top_k=4, correction_bias=bias, n_group=2, topk_group=2)
    assert route.experts.tolist() == [[2, 0, 1, 3]]


def test_an_expert_at_minus_infinity_comes_before_a_dropped_group():
    logits, bias = torch.zeros(1, 6), torch.tensor([0, 0, 0, 4, 4, -INF])
    route = moe_route(logits, top_k=3, correction_bias=bias, n_group=2)
    assert route.experts.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("n_group", [1, 2])
def test_nan_stays_in_its_row(n_group):
    logits = torch.randn(5, 8)
    case = dict(top_k=4, n_group=n_group, topk_group=n_group)
    clean = moe_route(logits, **case)
    logits[1], logits[3, 6] = NAN, NAN
    route = moe_route(logits, **case)
    rest = [0, 2, 4]
    assert torch.equal(route.weights[rest], clean.weights[rest])
    assert torch.equal(route.experts[rest], clean.experts[rest])
    assert route.weights[[1, 3]].isnan().all()
    assert route.experts[1].tolist() == [0, 1, 2, 3] and route.experts[3, 0] == 6
    assert all(len(set(row)) == 4 for row in route.experts.tolist())
    assert route.counts.sum() == 20
    single = moe_route(logits, norm_topk_prob=False, **case).weights
    assert single[3].isnan().tolist() == [True, False, False, False]


def test_nan_reaches_the_gradient_of_its_row_alone():
    logits = torch.randn(4, 8)
    logits[2, 3] = NAN
    logits.requires_grad_()
    moe_route(logits, top_k=2).weights.square().sum().backward()
    assert logits.grad.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", [-INF, -200.0, 0.0, 40.0, 200.0, INF])
def test_extreme_logits_stay_finite(value):
    logits = torch.full((3, 8), value, requires_grad=True)
    route = moe_route(logits, top_k=3, scale=2.5)
    route.weights.sum().backward()
    assert route.weights.isfinite().all() and logits.grad.isfinite().all()


def test_gradient_of_a_saturated_score():
    """float32 sigmoid(30) is 1, but its derivative is not 0."""
    logits = torch.full((1, 2), 30.0, requires_grad=True)
    moe_route(logits, top_k=1, norm_topk_prob=False).weights.sum().backward()
    assert math.isclose(logits.grad[0, 0], math.exp(-30), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened_first(dtype):
    logits = torch.randn(40, 16).to(dtype)
    got, want = (moe_route(x, top_k=3, scale=2.5) for x in (logits, logits.float()))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert got.weights.dtype == torch.float32


def weights_of(logits):
    return moe_route(logits, top_k=3, scale=2.5).weights


def raw_weights_of(logits):
    return moe_route(logits, top_k=3, norm_topk_prob=False).weights


def loss_of(logits):
    return balance_loss(logits, top_k=3, coefficient=50.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", [weights_of, raw_weights_of, loss_of])
def test_low_precision_logits_are_widened_first_and_gradients_rounded_once(fn, dtype):
    logits = torch.randn(40, 16).to(dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    got, want = fn(logits), fn(wide)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    dy = torch.randn_like(want)
    (d,), (wide_d,) = torch.autograd.grad(got, logits, dy), torch.autograd.grad(want, wide, dy)
    assert d.dtype == dtype and torch.equal(d, wide_d.to(dtype)) and d.any()


def test_any_strides():
    logits, bias = torch.randn(8, 2, 20)[:, 1].T, torch.randn(16)[::2]
    got = moe_route(logits, top_k=3, correction_bias=bias)
    want = moe_route(logits.contiguous(), top_k=3, correction_bias=bias.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_autocast_changes_nothing():
    logits = torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        route, loss = moe_route(logits, top_k=2), balance_loss(logits, top_k=2)
    assert torch.equal(route.weights, moe_route(logits, top_k=2).weights)
    assert torch.equal(loss, balance_loss(logits, top_k=2))


def loss_by_hand(logits, top_k, coefficient):
    """One sequence, token by token."""
    length, experts = logits.shape
    mass, load = [0.0] * experts, [0] * experts
    for row in logits.double().tolist():
        s = [1 / (1 + math.exp(-v)) for v in row]
        for e in range(experts):
            mass[e] += s[e] / sum(s)
        for e in sorted(range(experts), key=lambda e: (-s[e], e))[:top_k]:
            load[e] += 1
    total = sum(p * n for p, n in zip(mass, load))
    return coefficient * experts / (top_k * length**2) * total


@pytest.mark.parametrize("lengths", [[11], [1, 5], [4, 0, 7], [3, 3, 1, 2]])
def test_balance_loss_equals_a_python_loop(lengths):
    logits = torch.randn(sum(lengths), 6, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    parts = [loss_by_hand(p, 2, 0.01) for p in logits.split(lengths) if len(p)]
    got = balance_loss(logits, top_k=2, cu_seqlens=cu_seqlens, coefficient=0.01)
    assert math.isclose(got.item(), sum(parts) / len(parts), rel_tol=1e-13)


def test_balance_loss_of_rows_packed_and_padded_agree():
    logits = torch.randn(3, 7, 6, dtype=torch.float64)
    rows = balance_loss(logits, top_k=2)
    cu_seqlens = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    flat = logits.flatten(0, 1)
    assert torch.equal(rows, balance_loss(flat, top_k=2, cu_seqlens=cu_seqlens))
    padded = torch.cat([flat, torch.randn(5, 6, dtype=torch.float64)])
    got = balance_loss(padded, top_k=2, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got, rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        balance_loss(flat[:7], top_k=2), balance_loss(logits[:1], top_k=2), rtol=1e-14, atol=0
    )


def test_balance_loss_gradient():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 9])
    assert torch.autograd.gradcheck(
        lambda x: balance_loss(x, top_k=2, cu_seqlens=cu_seqlens, coefficient=1.0), (logits,)
    )


def test_balance_loss_of_even_loads_is_its_coefficient_and_of_nothing_zero():
    even = torch.eye(4)[torch.arange(8) % 4] * 1e-3
    torch.testing.assert_close(balance_loss(even, top_k=1, coefficient=0.5), torch.tensor(0.5))
    assert balance_loss(torch.zeros(0, 4), top_k=1) == 0
    assert balance_loss(torch.zeros(2, 0, 4), top_k=1) == 0


def test_bias_moves_by_the_sign_of_the_deviation():
    bias = torch.tensor([[0.5, 0, 0, 0], [0, 0, 0, 1]])
    counts = torch.tensor([[4, 2, 0, 2], [0, 0, 0, 0]], dtype=torch.int32)
    out = update_correction_bias(bias, counts)
    assert out is bias
    want = torch.tensor([[0.499, 0, 0.001, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(bias, want)
    # A mean that is no integer, and counts beyond what float32 tells apart.
    big = torch.tensor([2**25 + 1, 2**25, 2**25])
    bias = update_correction_bias(torch.zeros(3), big, rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5]


def test_bias_update_evens_out_the_load():
    logits, bias = torch.randn(512, 8) + torch.linspace(-1, 1, 8), torch.zeros(8)
    spread = [moe_route(logits, top_k=2, correction_bias=bias).counts.float().std().item()]
    for _ in range(400):
        counts = moe_route(logits, top_k=2, correction_bias=bias).counts
        update_correction_bias(bias, counts)
    spread.append(moe_route(logits, top_k=2, correction_bias=bias).counts.float().std().item())
    assert spread[1] < spread[0] / 10


LOGITS = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=[1.0]), TypeError, "`logits` must be a torch.Tensor"),
        (dict(logits=LOGITS.int()), TypeError, "`logits` is torch.int32"),
        (dict(logits=LOGITS[0]), ValueError, r"`logits` has shape \(8,\), expected \(T, E\)"),
        (dict(top_k=0), ValueError, "`top_k` must be in 1 to 8 .eligible experts., got 0"),
        (dict(top_k=5, n_group=2), ValueError, "`top_k` must be in 1 to 4 "),
        (dict(n_group=3), ValueError, "`n_group` must divide the number of experts 8, got 3"),
        (dict(n_group=0), ValueError, "`n_group` must divide"),
        (dict(logits=LOGITS[:, :0]), ValueError, "`top_k` must be in 1 to 0 "),
        (dict(n_group=2, topk_group=3), ValueError, "`topk_group` must be between 1 and n_group"),
        (dict(logits=torch.empty(2**30, 8, device="meta")), ValueError, "`logits` has 1073741824"),
        (dict(correction_bias=torch.zeros(7)), ValueError, r"`correction_bias` has shape \(7,\)"),
        (
            dict(correction_bias=torch.zeros(8, device="meta")),
            ValueError,
            "`correction_bias` is on",
        ),
    ],
)
def test_bad_input(change, error, message):
    args = {"logits": LOGITS, "top_k": 2, **change}
    with pytest.raises(error, match="moe_route: " + message):
        moe_route(args.pop("logits"), **args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: balance_loss(LOGITS[0], top_k=2), ValueError, r"`logits` must be \(T, E\) or"),
        (lambda: balance_loss(LOGITS, top_k=9), ValueError, "`top_k` must be in 1 to 8"),
        (lambda: balance_loss(LOGITS[None], top_k=2, cu_seqlens=torch.tensor([0, 2])), ValueError,
         r"`cu_seqlens` needs \(T, E\) `logits`"),
        (lambda: balance_loss(LOGITS, top_k=2, cu_seqlens=LOGITS[0]), TypeError, "`cu_seqlens` is"),
        (lambda: balance_loss(LOGITS, top_k=2, cu_seqlens=torch.tensor([], dtype=torch.int32)),
         ValueError, "`cu_seqlens` needs at least one entry"),
        (lambda: update_correction_bias(LOGITS.bfloat16(), LOGITS), TypeError, "`bias` is"),
        (lambda: update_correction_bias(LOGITS, LOGITS[0]), ValueError, "`counts` has shape"),
        (lambda: update_correction_bias(torch.tensor(1.0), LOGITS), ValueError, "`bias` needs"),
    ],
)  # fmt: skip
def test_bad_input_of_the_balancers(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_route_is_a_plain_tuple_of_what_the_operator_returns():
    route = moe_route(torch.randn(3, 8), top_k=2)
    assert isinstance(route, Route) and len(route) == 5
    counts, offsets, order = ref.group_rows(route.experts.long(), 8)
    assert torch.equal(counts, route.counts) and torch.equal(offsets, route.offsets)
    assert torch.equal(order, route.order)


def test_plan_gives_few_tokens_to_csrc():
    def plan(tokens, experts, top_k, backends, n_group=1, unsupported="", forward=True):
        barred = native.barred(tokens, experts, top_k, n_group) if forward else None
        return op.plan(tokens, experts, top_k, unsupported, backends, 132, barred)

    both = ("csrc", "triton", "reference")
    for problem, backend in (((341, 128, 6), "csrc"), ((342, 128, 6), "triton"),
                             ((93, 512, 22), "csrc"), ((94, 512, 22), "triton"),
                             ((2048, 512, 1), "csrc"), ((1, 32, 32), "csrc"),
                             ((1, 513, 1), "triton"), ((1, 64, 33), "triton")):  # fmt: skip
        assert plan(*problem, both).backend == backend
        assert plan(*problem, ("triton", "reference")).backend == "triton"
        assert plan(*problem, both, forward=False).backend == "triton"
        # Asked for by name, it is not replaced by another.
        if backend == "csrc":
            assert plan(*problem, ("csrc",)).backend == "csrc"
        else:
            with pytest.raises(RuntimeError, match="moe_route: csrc takes up to"):
                plan(*problem, ("csrc",))
    assert plan(8, 66, 2, both, n_group=33).backend == "triton"
    assert plan(8, 64, 2, ("csrc",), forward=False).backend == "triton"
    assert plan(8, 64, 2, both, unsupported="float64").backend == "reference"
