"""Every Triton kernel compiles for Hopper and Blackwell, and takes no more than it took before."""

import json
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton, no Triton kernels")

import triton_compile  # noqa: E402

TABLE = json.loads(triton_compile.TABLE.read_text())
LAUNCHES = triton_compile.specialisations()
CASES = [(family, label, arch) for family, label in LAUNCHES for arch in triton_compile.ARCHS]


@pytest.mark.parametrize("family, label, arch", CASES)
def test_resources(family, label, arch):
    """Registers, spills and shared memory of each kernel against the table."""
    prefix = f"{family}/{label}/sm_{arch}/"
    rows = {key.removeprefix(prefix): row for key, row in TABLE["kernels"].items()
            if key.startswith(prefix)}  # fmt: skip
    measured = triton_compile.measure(LAUNCHES[family, label], arch)
    assert measured, "nothing was launched"
    assert measured.keys() == rows.keys(), "run `python tests/triton_compile.py --update`"
    # What Triton knows to be wrong it leaves out: a kernel of four registers does nothing.
    assert all(row["registers"] > 4 for row in measured.values()), "code is missing"
    if triton.__version__ == TABLE["triton"]:
        for name, row in measured.items():
            more = {what: (rows[name][what], now) for what, now in row.items()
                    if now > rows[name][what]}  # fmt: skip
            assert not more, (
                f"{name} takes more than in triton_resources.json (before, now): {more}"
            )


def test_the_chunk_scan_is_compiled_once_for_all_lengths():
    from nemokernels.ops.ssd import kernel

    def compiled(**sizes):
        with triton_compile.compile_only(90) as kernels:
            for grad in (False, True):
                kernel.launch_on_meta(grad, **sizes)()
        return [id(k) for k in kernels]

    assert len({*map(tuple, (compiled(batch=1, tokens=t) for t in (1, 77, 4096, 4097)))}) == 1
    first, *rest = (compiled(batch=1, rows=rows, tokens=9 * rows) for rows in (1, 2, 16))
    assert all(other == first for other in rest)


def test_a_mixer_of_every_model_loads_slices_by_tma():
    """Pieces of what the convolution wrote, where TMA wants addresses and rows of 16 bytes."""
    from nemokernels.models import list_variants
    from nemokernels.ops.ssd import kernel

    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    models = {v.name: [getattr(v.config, n) for n in names] for v in list_variants()
              if all(hasattr(v.config, n) for n in names)}  # fmt: skip
    for name, (H, P, G, N) in models.items():
        y = torch.empty(2, 3, H * P + 2 * G * N, dtype=torch.bfloat16)
        x, B, C = y.split([H * P, G * N, G * N], -1)
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        sizes = kernel.layout(x, B, None, None, chunk=64, block_p=64, tma=True)
        assert kernel._settle(sizes, x, B, C).TMA, name
    assert len(models) > 5


@pytest.mark.parametrize("arch", triton_compile.ARCHS)
@pytest.mark.parametrize("label", ["128 experts, top 6", "512 experts, top 22"])
def test_a_router_counts_without_an_answer(label, arch):
    """A slot is added to the counts and to those of its piece; nothing waits for the sums."""
    with triton_compile.compile_only(arch) as kernels:
        LAUNCHES["moe_route", label]()
    (choose,) = (k for k in kernels if k.name == "moe_route_choose_kernel")
    atomics = re.findall(r"\b(?:ATOM|RED)\w*\.[\w.]*", triton_compile.dump(choose, "sass"))
    assert atomics == ["REDG.E.ADD.STRONG.GPU"] * 2
    assert len(re.findall(r"atom\.global\.gpu\.relaxed\.add\.u32", choose.asm["ptx"])) == 2


def test_table_has_no_other_rows():
    known = {f"{family}/{label}/sm_{arch}" for family, label, arch in CASES}
    assert {key.rsplit("/", 1)[0] for key in TABLE["kernels"]} <= known
