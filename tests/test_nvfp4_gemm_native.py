"""csrc/nvfp4_gemm: its layout is CUTLASS's, its machine code multiplies in NVFP4, its checks hold.

The kernels themselves need a GPU of compute capability 10.x or 12.x.
"""

import re

import pytest
import torch
from machine_code import compiled, functions_of, needs_nvcc, output

from nemokernels import _build, swizzle_scales, testing
from nemokernels.ops.nvfp4.ref import quantize, swizzled_shape
from nemokernels.ops.nvfp4_gemm import native, op, ref

CPU = torch.device("cpu")
needs_cutlass = pytest.mark.skipif(
    _build.find_cutlass() is None, reason="needs the wheel nvidia-cutlass; not installed"
)
# What ptxas makes of tcgen05.mma.kind::mxf4nvf4.block_scale.scale_vec::4X, and of mma.sync with
# the same suffixes: block scales of 16 elements.
INSTRUCTIONS = {"100a": r"UTCOMMA\.4X ", "120a": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X "}
SOURCES = [
    pytest.param(kind, arch, marks=[pytest.mark.all_of_csrc] if kind == "grouped" else [])
    for kind in ("dense", "grouped")
    for arch in INSTRUCTIONS
]


@needs_nvcc
@needs_cutlass
@pytest.mark.parametrize("kind, arch", SOURCES)
def test_machine_code_multiplies_in_nvfp4(build_cache, kind, arch):
    name = f"nvfp4_{kind}_sm{arch}.cu"
    product = [f for f in functions_of(name, arch) if re.search(INSTRUCTIONS[arch], f)]
    assert len(product) == 1 and "GemmUniversal" in product[0].split("\n")[0]
    assert "UTMALDG" in product[0] and not re.search(r"\b[HQ]MMA", product[0])
    # What CUTLASS does once per tile of the grouped product of sm_120a spills 60 bytes; the loop
    # over the depth of a tile spills nothing, here or elsewhere.
    _, report = compiled(name, arch)
    spilled = {60} if (kind, arch) == ("grouped", "120a") else set()
    assert set(_build.spills(report).values()) == spilled
    at = [match.start() for match in re.finditer(INSTRUCTIONS[arch], product[0])]
    assert not re.search(r"\b(STL|LDL)\b", product[0][at[0] : at[-1]])


LAYOUT = """
#include <cuda_runtime.h>
#include <cstdio>
#include <cstdlib>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

// Where the scales of rows and blocks of 16 lie, of the left and of the right operand.
int main(int, char** argv) {
  const int rows = atoi(argv[1]), depth = atoi(argv[2]);
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;
  const auto left = Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 7, depth, 1));
  const auto right = Config::tile_atom_to_shape_SFB(cute::make_shape(7, rows, depth, 1));
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < depth; ++k)
      printf("%d %d\\n", int(left(r, k, 0)), int(right(r, k, 0)));
  printf("%d %d\\n", int(cute::cosize(left)), int(cute::cosize(right)));
}
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """CUTLASS's layout of scales on the host: (rows, depth) to lines of two indices."""
    source = tmp_path_factory.mktemp("layout") / "layout.cpp"
    source.write_text(LAYOUT)
    program = source.with_suffix("")
    output(_build.find_nvcc(), "-std=c++17", "-isystem", str(_build.find_cutlass()), str(source),
           "-o", str(program))  # fmt: skip
    return lambda *sizes: output(str(program), *map(str, sizes)).split("\n")[:-1]


@needs_nvcc
@needs_cutlass
@pytest.mark.parametrize("rows, depth", [(1, 16), (5, 48), (128, 64), (129, 80), (300, 272)])
def test_swizzled_scales_lie_where_cutlass_reads_them(layout, rows, depth):
    *found, size = ([int(i) for i in line.split()] for line in layout(rows, depth))
    found = torch.tensor(found).reshape(rows, depth // 16, 16, 2)
    assert (found == found[:, :, :1, :1]).all()  # one per block, alike in both operands
    padded = swizzled_shape((rows, depth // 16))
    assert size == [padded[0] * padded[1]] * 2
    # The position of every scale, read off where its number ends up, one byte of it at a time.
    number = torch.arange(1, rows * (depth // 16) + 1).reshape(rows, depth // 16)
    low, high = (swizzle_scales((number >> s & 255).to(torch.uint8)).long() for s in (0, 8))
    assert torch.equal((low + 256 * high).reshape(-1)[found[:, :, 0, 0]], number)


@pytest.fixture
def operands(host_library):
    a, a_scales, b, b_scales, alpha = op._example_product(CPU, torch.float32)
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    return dict(a=a, a_scales=a_scales, b=b, b_scales=b_scales, alpha=alpha, out=out)


def shifted(t):
    """The same values at an address that is no multiple of 16."""
    wide = t.new_empty(t.numel() + 1)
    wide[1:] = t.reshape(-1)
    return wide[1:].view(t.shape)


@pytest.mark.parametrize("change, message", [
    (lambda t: dict(a=shifted(t["a"])), "aligned to 16 bytes"),
    (lambda t: dict(b_scales=shifted(t["b_scales"])), "aligned to 16 bytes"),
    (lambda t: dict(a=t["a"].int()), "contiguous bytes"),
    (lambda t: dict(b=t["b"][:, :40]), "contiguous bytes"),
    (lambda t: dict(a_scales=t["a_scales"][:64]), "as many as the sizes say"),
    (lambda t: dict(a=t["a"][:, :40].contiguous()), "K in multiples of 32"),
    (lambda t: dict(out=t["out"][:, :132].contiguous()), "N in multiples of 8"),
    (lambda t: dict(out=t["out"].float()), "contiguous bfloat16 result"),
    (lambda t: dict(out=t["out"][:0]), "sizes from 1 to"),
    (lambda t: dict(alpha=t["alpha"].double()), "one float32 factor"),
])  # fmt: skip
def test_dense_refuses(operands, change, message):
    operands |= change(operands)
    with pytest.raises(RuntimeError, match=message):
        native._product(*operands.values())


@pytest.mark.parametrize("m, n, k", [(1, 8, 32), (130, 136, 96), (7, 264, 160)])
def test_the_host_multiplies_what_it_is_given(host_library, m, n, k):
    """Plain loops in the place of CUTLASS: sizes, strides and the order of scales."""
    a, a_scales, a_global = op._example_operand(CPU, m, k)
    b, b_scales, b_global = op._example_operand(CPU, n, k)
    args, alpha = (a, a_scales, b, b_scales), a_global * b_global
    exact, low = ref.product(*args, alpha.double()), ref.product(*args, alpha)
    testing.assert_matches(native.product(*args, alpha), exact, low)


@pytest.mark.parametrize("squared_relu", [False, True])
@pytest.mark.parametrize("ends", [(131, 131, 200, 200), (0, 1, 2, 2), (128, 256, 257, 300),
                                  (0, 0, 0, 7)])  # fmt: skip
def test_the_host_multiplies_groups(host_library, ends, squared_relu):
    offsets = torch.tensor(ends, dtype=torch.int32)
    codes, scales, scale_2 = quantize(torch.randn(ends[-1], 96), None, 1, None)
    b, b_scales, b_global = op._example_experts_weights(CPU, 136, 96)
    args = codes, ref.group_scales(scales, offsets), b, b_scales
    alpha = b_global * scale_2
    low, exact = (ref.grouped_product(*args, t, offsets, squared_relu)
                  for t in (alpha, alpha.double()))  # fmt: skip
    got = native.grouped_product(*args, alpha, offsets, squared_relu)
    testing.assert_matches(got, exact, low)


@pytest.mark.parametrize(
    "ends", [(900, 3, -7, 40), (-1, -1, -1, -1), (2**30, 0, 5, 1), (9, 3, 5, 12)]
)
def test_offsets_that_are_none_stay_in_bounds(host_library, ends):
    """An expert has what lies behind the largest end before it; rows of none are not written."""
    offsets = torch.tensor(ends, dtype=torch.int32)
    b, b_scales, alpha = op._example_experts_weights(CPU, 8, 32)
    a = torch.randint(256, (40, 16), dtype=torch.uint8)
    a_scales = torch.full((ref.padded_rows(40, 4), 4), 0x38, dtype=torch.uint8)  # ones
    out = torch.full((40, 8), -5.25, dtype=torch.bfloat16)
    native._grouped(a, a_scales, b, b_scales, alpha, offsets, False, 0, out)
    expert = torch.full((40,), -1)
    last = 0
    for e, end in enumerate(ends):
        expert[last : min(end, 40)] = e if end > last else -1
        last = max(last, min(end, 40))
    assert (out[expert < 0] == -5.25).all()
    for e in expert.unique().tolist():
        if e >= 0:
            rows = expert == e
            want = ref.values(a, a_scales[:128], torch.float32)[rows] @ ref.values(
                b[e], b_scales[e], torch.float32
            ).T * alpha[e]  # fmt: skip
            torch.testing.assert_close(out[rows].float(), want, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("ends", [(5, 5, 12, 12), (900, 3, -7, 40), (-1,) * 4, (2**30, 0, 5, 1)])
@pytest.mark.parametrize("change", [{}, {0: -7, 3: 12, 8: 2**31 - 1}, {0: 1, 2: 1}])
def test_experts_of_a_route_that_is_none_stay_in_bounds(host_library, ends, change):
    """Ends of any kind, slots out of range or twice: what a GPU does not read back to refuse."""
    *args, _, order = op._example_experts(CPU, torch.bfloat16)
    order = order.clone()
    for row, slot in change.items():
        order[row] = slot
    y = ref.compose(native.grouped_product, *args, torch.tensor(ends, dtype=torch.int32), order)
    assert y.shape == (6, 64)
    if ends == (5, 5, 12, 12) and not change:
        assert torch.equal(y, ref.experts(*args, torch.tensor(ends, dtype=torch.int32), order))


@pytest.mark.parametrize("counts", [(128, 0, 130, 12), (0, 253, 0, 17), (1, 127, 140, 2)])
def test_pieces_of_the_rows_have_the_same_bits(host_library, counts):
    """Pieces of 128 rows and, of the result, 128 columns at a time; and both as one."""
    up, down = (op._example_experts_weights(CPU, *s) for s in ((96, 160), (160, 96)))
    offsets, order = torch.tensor(counts).cumsum(0).int(), torch.randperm(270).int()
    top = torch.tensor([3.0, 9.0, 12.0, 20.0, 7.0]) / 2688
    args = (torch.randn(135, 160).bfloat16(), top[:1], *up, top[1:], *down, torch.rand(135, 2),
            offsets, order)  # fmt: skip
    few, one = (ref.compose(native.grouped_product, *args, slot_bytes=n) for n in (1, 2**40))
    assert torch.equal(few, one)
    testing.assert_matches(few, ref.experts(*testing.to_double(args)), ref.experts(*args))


@pytest.mark.parametrize("change, message", [
    (lambda t: dict(offsets=t["offsets"].long()), "int32 ends"),
    (lambda t: dict(offsets=t["offsets"][:0]), "int32 ends"),
    (lambda t: dict(offsets=t["offsets"][:3]), "as many as the sizes say"),
    (lambda t: dict(a_scales=t["a_scales"][:256]), "as many as the sizes say"),
    (lambda t: dict(alpha=t["alpha"][:3]), "one float32 factor per product"),
    (lambda t: dict(first=64), "from a multiple of 128 on"),
    (lambda t: dict(first=128), "expected columns of b"),
    (lambda t: dict(first=-128), "expected columns of b"),
])  # fmt: skip
def test_grouped_refuses(host_library, change, message):
    names = ("a", "a_scales", "b", "b_scales", "alpha", "offsets", "squared_relu")
    args = dict(zip(names, op._example_grouped(CPU, torch.float32)))
    args |= dict(first=0, out=torch.empty(200, 136, dtype=torch.bfloat16))
    args |= change(args)
    with pytest.raises(RuntimeError, match=message):
        native._grouped(*args.values())


def test_the_host_multiplies_some_columns(host_library):
    """Whole tiles of 128 to begin with, as many columns as the result has."""
    offsets = torch.tensor([5, 5, 150], dtype=torch.int32)
    codes, scales, scale_2 = quantize(torch.randn(150, 96), None, 1, None)
    b, b_scales, b_global = (t[:3] for t in op._example_experts_weights(CPU, 328, 96))
    args = codes, ref.group_scales(scales, offsets), b, b_scales, b_global * scale_2, offsets, False
    whole, want = native.grouped_product(*args), ref.grouped_product(*args)
    for first, columns in ((0, 128), (128, 128), (256, 72), (128, 200)):
        for multiply, all_ in ((native.grouped_product, whole), (ref.grouped_product, want)):
            part = multiply(*args, first, torch.empty(150, columns, dtype=torch.bfloat16))
            assert torch.equal(part, all_[:, first : first + columns])


def test_python_and_cuda_agree_on_units():
    header = (_build.source_dir() / "nvfp4_gemm/nvfp4_gemm.h").read_text()
    for name, value in (("kDepthUnit", op.K_UNIT), ("kColumnUnit", op.N_UNIT),
                        ("kAlignment", op.ALIGNMENT)):  # fmt: skip
        assert f"{name} = {value};" in header
    assert ref.TILE == 128


def test_sources_of_an_architecture():
    assert _build.own_arch(_build.Path("nvfp4_dense_sm100a.cu")) == "100a"
    assert _build.own_arch(_build.Path("w4a16_bf16.cu")) is None
    names = {arch: {u.name for u in _build.units([arch])} for arch in _build.ARCHS}
    assert {"nvfp4_dense_sm100a.cu", "nvfp4_grouped_sm100a.cu"} == names["100a"] - names["90a"]
    assert {"nvfp4_dense_sm120a.cu", "nvfp4_grouped_sm120a.cu"} == names["120a"] - names["90a"]


@needs_nvcc
def test_without_cutlass_only_hopper_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "find_cutlass", lambda: None)
    assert not _build.needs_cutlass(["90a"]) and _build.needs_cutlass(["90a", "120a"])
    with pytest.raises(FileNotFoundError, match="build: no CUTLASS headers; run `pip inst"):
        _build.build(["100a"], out=tmp_path)
