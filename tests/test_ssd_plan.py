import pytest
import torch

from nemokernels.ops.ssd import op

BOTH, HOPPER = ("triton", "reference"), (9, 0)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def plan(sequences=8, tokens=4096, heads=128, width=64, state=128, dtypes=(BF16, F32),
         state_dtype=None, backends=BOTH, capability=HOPPER, processors=132):  # fmt: skip
    return op.plan(sequences, tokens, heads, width, state, dtypes, state_dtype, backends,
                   capability, processors)  # fmt: skip


def test_nemotron_shapes_run_on_triton_unsplit():
    for heads in (64, 96, 112, 128, 256):
        config = plan(heads=heads)
        assert (config.backend, config.segment, config.chunk) == ("triton", 0, 64)
        assert (config.span, config.square) == (128, 64)
        assert config.tma and config.tma_met


@pytest.mark.parametrize(
    ("problem", "segment"),
    [(dict(sequences=1, tokens=131072, heads=64), 8192), (dict(sequences=1, heads=64), 0),
     (dict(sequences=1, tokens=8192, heads=8), 0), (dict(sequences=1, tokens=8193, heads=8), 8192),
     (dict(sequences=4, tokens=131072, heads=66), 0),
     (dict(sequences=2, tokens=131072, heads=66, width=128), 0),
     (dict(sequences=2, tokens=131072, heads=66), 8192)],
)  # fmt: skip
def test_long_sequences_are_split_where_programs_are_few(problem, segment):
    assert plan(**problem).segment == segment


@pytest.mark.parametrize(
    ("problem", "words"),
    [(dict(dtypes=(F64,)), "float64"), (dict(dtypes=(BF16, F64)), "float64"),
     (dict(state=257), "257"), (dict(state_dtype=F32), "torch.float32")],
)  # fmt: skip
def test_what_no_kernel_takes_goes_to_the_reference_or_raises(problem, words):
    config = plan(**problem)
    assert config.backend == "reference" and words in config.reason
    with pytest.raises(RuntimeError, match=f"ssd: .*{words}"):
        plan(**problem, backends=("triton",))


@pytest.mark.parametrize("usable", [("triton",), BOTH])
def test_a_state_that_no_kernel_takes_on_a_gpu(monkeypatch, usable):
    """With the reference at hand it runs and says so; else the error names the size."""
    monkeypatch.setattr(op._backends, "usable", lambda *_: usable)
    monkeypatch.setattr(op._triton, "processors", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: HOPPER)
    x, dt, B = torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2), torch.randn(1, 5, 1, 257)
    args = (x, dt, -torch.ones(2), B, B, *[None] * 6, 4, True, 0.0, float("inf"), None)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    if "reference" not in usable:
        with pytest.raises(RuntimeError, match="ssd: .* up to 256, got 257"):
            op.ssd_chunk_scan.redispatch(key, *args)
        return
    with pytest.warns(RuntimeWarning, match="ssd_chunk_scan has no kernel for shapes .*257"):
        out, final, _ = op.ssd_chunk_scan.redispatch(key, *args)
    want = op.ref.forward(*args)
    assert torch.equal(out, want[0]) and torch.equal(final, want[1])


def test_the_rest():
    assert plan(state_dtype=BF16).backend == "triton"
    assert plan(backends=("reference",)).backend == "reference"
    with pytest.raises(RuntimeError, match="no backend"):
        plan(backends=())
    ampere, blackwell = plan(capability=(8, 0)), plan(capability=(10, 0))
    assert not ampere.tma and blackwell.tma and not blackwell.tma_met
    for state in (128, 256):
        small = plan(state=state, capability=(12, 0))
        assert {small.scan[1], small.states[1], small.walk[1], small.group[1]} == {1}


@pytest.mark.parametrize("capability", [(8, 0), HOPPER, (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("state", [1, 16, 100, 128, 200, 256])
def test_segments_chunks_and_tiles_divide(state, dtype, capability):
    config = plan(1, 99999, 2, 64, state, (dtype,), capability=capability)
    assert config.segment % config.span == 0 and config.segment > 0
    assert config.span % config.chunk == 0 and config.span // config.square in (1, 2)
    assert dtype != F32 or config.span == config.square  # see ssd_scores_backward_kernel


def test_heads_of_several_blocks_have_fewer_stages():
    """The kernels over chunks load all blocks of a head in one stage."""
    assert plan(width=64).group == (8, 3)
    assert plan(width=80).group == (8, 2) and plan(width=80).scores == (4, 2)
    assert plan(width=129).group == plan(width=80, capability=(10, 0)).group == (8, 1)
    assert plan(width=80, dtypes=(F32,)).group == (8, 1)


def test_example_of_the_backward_is_computed_on_the_cpu(monkeypatch):
    """Where deterministic algorithms are asked for, a GPU refuses the reference's cumsum."""
    real, devices = op.ref.forward, []
    monkeypatch.setattr(op.ref, "forward", lambda *a: devices.append(a[0].device) or real(*a))
    made = op._example_backward(torch.device("meta"), BF16)
    assert devices == [torch.device("cpu")]
    assert all(t.is_meta for t in made if isinstance(t, torch.Tensor))
