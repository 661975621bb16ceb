"""Every row of the bench: what it will do on a GPU, as far as that can be seen without one."""

import dataclasses
import importlib
import sys
import types

import pytest
import torch

from nemokernels import testing
from nemokernels.bench import check, peers
from nemokernels.bench.rows import MODELS, Make, Row, model, ops, rows, unit
from nemokernels.bench.run import contestants

ROWS = rows()
CPU = torch.device("cpu")
CEILINGS = 3.0e12, {"bfloat16": 784e12, "float16": 784e12, "float32": 400e12,
                    "float8_e4m3fn": 1355e12, "float4_e2m1fn_x2": 2710e12}  # fmt: skip


def one_of_each():
    """A row for every subject, way and dtype."""
    chosen = {(row.subject.title, row.way, row.dtype): row for row in ROWS}
    return [pytest.param(row, id=row.id) for row in chosen.values()]


def tiny(row: Row) -> Row:
    return dataclasses.replace(row, shape=dict(row.subject.tiny))


def test_ids_are_unique_and_quick_rows_lead():
    assert len({row.id for row in ROWS}) == len(ROWS)
    quick = [row.quick for row in ROWS]
    assert quick == sorted(quick, reverse=True) and 30 <= sum(quick) <= 60
    assert rows(("ssd",), quick=True) == [r for r in ROWS if r.quick and "chunk_scan" in r.id]


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="no bench for op 'sdd'; there are attention, "):
        rows(("sdd",))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
def test_row_builds_at_full_size(row):
    """The function accepts the row's inputs, and the floor is one a GPU could have."""
    inputs = row.subject.inputs(Make("meta", row.dtype), **row.shape)
    results = check.tensors(row.subject.ours(**inputs))
    assert results and all(t.device.type == "meta" for t in results)
    assert set(row.subject.wrt) | set(row.subject.mutates) | set(row.subject.kept) <= set(inputs)
    floor = row.cost.floor(*CEILINGS)
    assert 1e-10 < floor < 0.1
    # What the function takes and returns at least is what any implementation moves.
    if row.way == "forward" and not row.subject.title.startswith("moe_experts"):
        inputs.pop("dense", None)  # for plain torch alone
        whole = sum({id(t): t.nbytes for t in check.tensors(inputs) + results}.values())
        assert 0.3 * whole <= row.cost.bytes <= 2 * whole
    assert row.goal is None or 0 < row.goal < 1


@pytest.mark.parametrize("row", one_of_each())
def test_adapters_are_right(row):
    """Ours, plain torch, and the function the reference runs in pieces, on a small problem."""
    judge = check.Judge(tiny(row), CPU)
    assert judge.ours(judge.task(row.subject.ours).once()) <= 1
    assert judge.peer(judge.task(row.subject.eager).once()) <= check.PEER


@pytest.mark.parametrize("row", one_of_each())
def test_inputs_are_the_same_every_time_and_left_alone(row):
    build = lambda: row.subject.inputs(Make(CPU, row.dtype), **row.subject.tiny)  # noqa: E731
    judge = check.Judge(tiny(row), CPU)
    judge.task(row.subject.ours).once()
    for before, after in zip(check.tensors(build()), check.tensors(judge.inputs)):
        assert torch.equal(check.as_bytes(before), check.as_bytes(after))


def test_pieces_are_the_whole(monkeypatch):
    from nemokernels.bench import bench_causal_conv1d, bench_mixer, bench_moe_experts, bench_ssd

    monkeypatch.setattr(bench_causal_conv1d, "PIECE", 6)
    monkeypatch.setattr(bench_moe_experts, "PIECE", 10)
    for module, subject in (
        (bench_ssd, bench_ssd.SSD),
        (bench_mixer, bench_mixer.MIXER),
        (bench_causal_conv1d, bench_causal_conv1d.CONV),
        (bench_moe_experts, bench_moe_experts.FORWARD),
    ):
        inputs = subject.inputs(Make(CPU, torch.float64), **subject.tiny)
        pairs = zip(check.tensors(module.exact(**inputs)), check.tensors(subject.ours(**inputs)))
        for piece, whole in pairs:
            torch.testing.assert_close(piece, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", ["ssd", "selective_scan"])
def test_plain_torch_carries_states_far(op):
    """Where decays are slow, a state lives through many chunks and doublings."""
    row = tiny(next(r for r in rows((op,)) if r.way == "forward"))
    row = dataclasses.replace(row, dtype=torch.float32)

    def slow(make, **sizes):
        inputs = row.subject.inputs(make, **sizes)
        return inputs | {"A": inputs["A"] / 200}

    subject = dataclasses.replace(row.subject, inputs=slow)
    judge = check.Judge(dataclasses.replace(row, subject=subject), CPU)
    assert judge.peer(judge.task(row.subject.eager).once()) < 1e-4


@pytest.mark.parametrize("short", MODELS)
def test_shapes_come_from_the_released_models(short):
    assert model(short).hidden_size in (2688, 4096, 8192, 3136)


def test_moe_rows_count_the_experts_they_touch():
    from nemokernels.bench.bench_moe_experts import FORWARD, touched

    inputs = FORWARD.inputs(Make(CPU, torch.float32), T=8, X=2, F=2, E=128, k=6)
    assert inputs["experts"].unique().numel() == touched(8, 128, 6) < 48
    assert touched(1, 128, 6) == 6 and touched(16384, 128, 6) == 128


def test_goals_of_the_experts():
    """Shares of the roofline, or of the copy alone; microseconds of an H100 for the routing."""
    goals = {(r.subject.title, r.way, r.label): r.goal for r in ROWS if r.quick and r.goal}
    layer, eight, four = (
        f"moe_experts{weights}" for weights in ("", " with FP8 weights", " with NVFP4 weights")
    )
    want = {(layer, "nano3 1"): 0.85, (layer, "nano3 8"): 0.97, (layer, "nano3 64"): 0.97}
    for label, goal in (("nano3 1", 0.70), ("nano3 8", 0.88), ("nano3 64", 0.92)):
        want[f"{four} and its router", label] = goal
    want[four, "nano3 16384"] = want[f"{eight} and its router", "nano3 16384"] = 0.60
    want[f"{layer} with its router", "nano3 16384"] = 0.75
    pair = "quantize_nvfp4_pair, Hadamard, stochastic"
    want[pair, "32768 x 4096"] = 0.65
    for (title, label), goal in want.items():
        assert goals.get((title, "forward", label)) == goal, (title, label)
    planned = {r.label: r for r in ROWS if r.subject.title.startswith("moe_route and the tiles")}
    route = {r.label: r for r in ROWS if r.subject.title == "moe_route"}
    limits = (route["nano3 64"], 3e-6), (planned["nano3 64"], 6e-6), (planned["nano3 16384"], 35e-6)
    for row, limit in limits:
        assert row.cost.floor(*CEILINGS) / row.goal == pytest.approx(limit)
    assert all(row.quick for row in planned.values() if row.goal)


# A wrong adapter must not get a time.


def broken(row, change):
    """The row with a function whose first result is changed."""

    def ours(**inputs):
        results = row.subject.ours(**inputs)
        first, *rest = results if isinstance(results, tuple) else (results,)
        return change(first), *rest

    return ours


def at_one_place(t: torch.Tensor) -> torch.Tensor:
    return torch.arange(t.numel()).view_as(t) == t.numel() // 2


CHANGES = {
    "one element off": lambda t: torch.where(at_one_place(t), t + 1, t),
    "one NaN": lambda t: torch.where(at_one_place(t), float("nan"), t),
    "all zero": torch.zeros_like,
    "another shape": lambda t: t[None],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", ["ssd", "rms_norm", "attention"])
def test_a_wrong_result_is_wrong(op, change):
    row = tiny(rows((op,))[0])
    judge = check.Judge(row, CPU)
    with pytest.raises(check.Wrong):
        judge.ours(judge.task(broken(row, CHANGES[change])).once())
    if change != "one element off":  # a peer may round as it likes
        with pytest.raises(check.Wrong):
            judge.peer(judge.task(broken(row, CHANGES[change])).once())


def test_a_missing_result_and_wrong_codes_are_wrong():
    row = tiny(rows(("fp8",))[0])
    judge = check.Judge(row, CPU)
    right = judge.task(row.subject.ours).once()
    with pytest.raises(check.Wrong, match="1 results, expected 2"):
        judge.ours(right[:1])
    codes = right[0].view(torch.uint8).clone()
    codes.view(-1)[0] ^= 1
    with pytest.raises(check.Wrong, match="result 0"):
        judge.ours([codes.view(right[0].dtype), right[1]])
    with pytest.raises(check.Wrong, match="agrees in"):
        judge.peer([codes.view(right[0].dtype), right[1]])
    with pytest.raises(check.Wrong, match="no result"):
        judge.peer([])


@pytest.mark.parametrize(("lows", "few", "right"), [(1, 99, True), (0, 99, False), (1, 0, False)])
def test_few_elements_have_the_budget_of_several_references(monkeypatch, lows, few, right):
    """Chance may have made the first one good; of many elements it cannot."""
    row = tiny(next(r for r in ROWS if r.subject.title == "relu2" and r.way == "forward"))
    monkeypatch.setattr(check, "FEW", few)
    off = lambda by: lambda x: row.subject.ours(x) * (1 + by)  # noqa: E731
    subject = dataclasses.replace(row.subject, tiny=dict(rows=1, width=8), lows=(off(0.1),) * lows)
    judge = check.Judge(tiny(dataclasses.replace(row, subject=subject)), CPU)
    result = judge.task(off(0.15)).once()
    if right:
        assert 0.5 < judge.ours(result) <= 1
    else:
        with pytest.raises(check.Wrong):
            judge.ours(result)


def test_the_scans_gradient_of_decay_is_held_to_other_chunks(monkeypatch):
    """Their references are right ones: they err by their roundings, each by its own."""
    row = tiny(next(r for r in ROWS if r.subject.title.endswith("packed") and r.way == "backward"))
    judge, place = check.Judge(row, CPU), row.subject.wrt.index("A")
    errors = set()
    for low in row.subject.lows:
        results = judge.task(low).once()
        assert judge.ours(results) <= 1
        errors.add((results[place] - judge.exact[place]).abs().max().item())
    used = (judge.low[place] - judge.exact[place]).abs().max().item()
    assert len(errors) > 1 and used >= max(errors)
    monkeypatch.setattr(check, "FEW", 16)  # the gradient of A has 4 elements, that of x 9600
    counts = []
    monkeypatch.setattr(testing, "worst", lambda want, lows: counts.append(len(lows)) or lows[0])
    exact = check.Judge(row, CPU).exact
    several = 1 + len(row.subject.lows)
    assert counts == [several if want.numel() < 16 else 1 for want in exact]


def test_a_wrong_gradient_is_wrong():
    row = tiny(next(r for r in ROWS if r.subject.title == "relu2" and r.way == "backward"))
    judge = check.Judge(row, CPU)
    with pytest.raises(check.Wrong):
        judge.ours(judge.task(lambda x: x.relu() ** 3).once())


@pytest.mark.parametrize("way", ["forward", "both"])
def test_a_product_that_was_not_quantised_is_timed_beside_ours(way):
    row = tiny(next(r for r in rows(("fp8",)) if "linear" in r.subject.peers and r.way == way))
    judge = check.Judge(row, CPU)
    results = judge.task(row.subject.peers["linear"]()).once()
    assert 0.01 < judge.peer(results) <= check.PEER


# Peers: absent ones say so, and those that are there are connected.


def test_every_peer_has_a_distribution():
    for row in ROWS:
        assert set(row.subject.peers) <= set(peers.DISTRIBUTIONS)
        assert {"torch eager", "torch.compile"} <= set(contestants(row, with_peers=False))


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setitem(peers.DISTRIBUTIONS, "mamba_ssm", ("no-such-distribution",))
    row = rows(("ssd",))[0]
    with pytest.raises(peers.Absent, match="no-such-distribution is not installed"):
        contestants(row, with_peers=True)["mamba_ssm"]()


def test_a_peer_that_does_not_import_says_why(monkeypatch):
    monkeypatch.setitem(peers.DISTRIBUTIONS, "mamba_ssm", ("torch",))

    def connect():
        raise OSError("undefined symbol: _ZN")

    with pytest.raises(peers.Absent, match="does not import: OSError: undefined symbol"):
        peers.load("mamba_ssm", connect)


def fake(monkeypatch, name, **attributes):
    """Put a module of that name in place of a library."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    vars(sys.modules[name]).update(attributes)


def test_adapters_call_drop_in_peers_rightly(monkeypatch):
    """Our drop-in functions have the peers' names and arguments, so they can stand in for them."""
    import nemokernels as nk

    fake(monkeypatch, "mamba_ssm.ops.triton.ssd_combined",
         mamba_chunk_scan_combined=nk.mamba_chunk_scan_combined)  # fmt: skip
    ops_ = {
        "mamba_ssm.ops.triton.layernorm_gated": dict(rmsnorm_fn=nk.rmsnorm_fn),
        "mamba_ssm.ops.triton.selective_state_update": dict(
            selective_state_update=nk.selective_state_update
        ),
    }
    for name, attributes in ops_.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    fake(monkeypatch, "causal_conv1d", causal_conv1d_fn=nk.causal_conv1d_fn,
         causal_conv1d_update=nk.causal_conv1d_update)  # fmt: skip

    def fla_conv(x, weight, bias, activation, backend):
        y = nk.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=activation)
        return y.transpose(1, 2), None

    fake(monkeypatch, "fla.modules.convolution", causal_conv1d=fla_conv)
    for op, name in (("ssd", "mamba_ssm"), ("gated_rms_norm", "mamba_ssm"), ("mixer", "mamba_ssm"),
                     ("state_update", "mamba_ssm"), ("causal_conv1d", "causal_conv1d"),
                     ("causal_conv1d", "fla")):  # fmt: skip
        chosen = {r.subject.title: r for r in rows((op,)) if name in r.subject.peers}
        assert chosen
        for row in chosen.values():
            judge = check.Judge(tiny(row), CPU)
            judge.peer(judge.task(row.subject.peers[name]()).once())


def test_every_bench_file_runs_under_pytest():
    for op in ops():
        module = importlib.import_module(f"nemokernels.bench.bench_{op}")
        assert module.ROWS and callable(module.test_bench)
    assert unit(torch.bfloat16) == "bfloat16"
