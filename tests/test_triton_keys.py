"""A new length compiles nothing: what Triton would compile, counted for random problems."""

import collections
import importlib
from pathlib import Path

import fuzz
import key_sweeps
import pytest
import torch
import triton_compile
import triton_keys
from fuzz_draw import Draw
from triton.runtime.jit import JITFunction

import nemokernels
from nemokernels import _tl, _triton
from nemokernels._registry import FAMILIES

LENGTHS = (0, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 77, 96)
# Launched more than once in a call, for other constants or widths: forward and backward, B and C.
LAUNCHES = collections.defaultdict(
    lambda: 1, ssd_steps_kernel=2, ssd_group_backward_kernel=2, clear_outside_kernel=3
)


class OfLength(Draw):
    """Problems of certain lengths, each divisible by 16 or not."""

    lengths = LENGTHS

    def tokens(self):
        return self.choice(self.lengths)

    def randn(self, *shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype)


class OfOneToken(OfLength):
    lengths = (1,)


def count(fuzzed, which, draw, problems):
    operators = FAMILIES[fuzzed.family].operators | FAMILIES["ssd"].operators

    def launch(name, *args):
        return triton_keys.launch(operators[name], args)

    with triton_keys.counted() as keys:
        for number in range(problems):
            problem = draw(number, 120, torch.device("cpu"))
            fuzzed.problem(problem, launch, **fuzzed.specialisations[which])
    return {kernel: set(of) for kernel, of in keys.items()}


@pytest.mark.parametrize("fuzzed", fuzz.FUZZED, ids=lambda fuzzed: fuzzed.name)
def test_a_specialisation_is_compiled_once(fuzzed):
    """For a thousand problems, too, a kernel is compiled once per specialisation and launch."""
    everything = collections.defaultdict(set)
    for which in range(len(fuzzed.specialisations)):
        for kernel, keys in count(fuzzed, which, OfLength, 16).items():
            everything[kernel] |= keys
            assert len(keys) <= LAUNCHES[kernel], f"{which}: {kernel} {triton_keys.differ(keys)}"
    assert everything
    for kernel, keys in everything.items():
        assert len(keys) <= 12 * LAUNCHES[kernel], kernel


@pytest.mark.parametrize("fuzzed", fuzz.FUZZED, ids=lambda fuzzed: fuzzed.name)
def test_a_single_token_is_compiled_apart_at_most_twice(fuzzed):
    """Torch gives an axis of one entry another stride: a view of one token, one of one row."""
    for which in range(len(fuzzed.specialisations)):
        longer = count(fuzzed, which, OfLength, 8)
        for kernel, keys in count(fuzzed, which, OfOneToken, 8).items():
            more = len(keys - longer.get(kernel, set()))
            assert more <= 2 * LAUNCHES[kernel], f"{which}: {kernel} {triton_keys.differ(keys)}"


def sweep_keys(sweep, options, after, lengths):
    """What kernels are compiled for in calls of these lengths, with one row, two and sixteen."""
    operators = {name: of for family in FAMILIES.values() for name, of in family.operators.items()}

    def launch(name, *args):
        return triton_keys.launch(operators[name], args)

    def slices(rows, *widths):
        draw = OfLength(0, 0, torch.device("cpu"))
        return draw.slices(*widths, rows=rows, dtype=torch.bfloat16, after=after)

    with triton_keys.counted() as keys:
        for rows in (1, 2, 16):
            for tokens in lengths:
                sweep.problem(launch, rows, tokens, slices, **options)
    return keys


@pytest.mark.parametrize("sweep", key_sweeps.SWEEPS, ids=lambda sweep: sweep.problem.__name__)
def test_a_model_compiles_a_kernel_for_all_lengths(sweep):
    """As often as the sweep says. In odd layouts, none and a lone token may have another."""
    for options in sweep.options:
        for after in (None, 16, 8, 3):
            apart = () if after in (None, 16) else (0, 1)
            longer = sweep_keys(sweep, options, after, {*LENGTHS, 1}.difference(apart))
            assert longer
            for kernel, keys in longer.items():
                assert len(keys) <= sweep.allows(kernel), f"{kernel} {triton_keys.differ(keys)}"
            for kernel, keys in sweep_keys(sweep, options, after, apart).items():
                more = len(keys - longer[kernel])
                assert more <= 2 * sweep.allows(kernel), f"{kernel} {triton_keys.differ(keys)}"


def test_no_kernel_is_left_out():
    """Every kernel of an op is launched by a sweep or a random problem."""
    kernels, launched = set(), set()
    for path in Path(nemokernels.__file__).parent.glob("ops/*/kernel*.py"):
        module = importlib.import_module(f"nemokernels.ops.{path.parent.name}.{path.stem}")
        kernels |= {name for name, value in vars(module).items()
                    if isinstance(value, JITFunction) and name.endswith("_kernel")}  # fmt: skip
    for sweep in key_sweeps.SWEEPS:
        for options in sweep.options:
            launched |= sweep_keys(sweep, options, None, (96,)).keys()
    for fuzzed in fuzz.FUZZED:
        for which in range(len(fuzzed.specialisations)):
            launched |= count(fuzzed, which, OfLength, 2).keys()
    assert len(kernels) > 50 and not kernels - launched


def test_counted_is_what_is_compiled():
    """Rows of one and of sixteen change nothing; a width divisible by 16 and another dtype do."""
    shapes = [(1, 48), (16, 48), (5, 48), (5, 47)]

    def launches():
        for shape in shapes:
            x = torch.empty(shape)
            _tl.column_sum(x, x.new_empty(shape[1]))
            _tl.column_sum(x, x.new_empty(shape[1], dtype=torch.float16))

    with triton_keys.counted() as keys:
        launches()
    with triton_compile.compile_only(90) as kernels:
        launches()
    assert len(keys["column_sum_kernel"]) == len({*map(id, kernels)}) == 4
    assert triton_keys.differ(keys["column_sum_kernel"]).keys() == {"out_ptr", "width"}


def test_the_divisor_of_rows():
    """It looks at the strides of rows and of tokens; a lone row's is never used."""
    aligned = torch.empty(2, 5, 16)
    assert _triton.row_divisor(aligned, None, aligned.expand(3, 2, 5, 16)) == 16
    for other in (torch.empty(2, 2, 8), torch.empty(2, 97).as_strided((2, 6, 16), (97, 16, 1))):
        assert _triton.row_divisor(aligned, other) == 1
    assert _triton.row_divisor(torch.empty(97).as_strided((1, 6, 16), (97, 16, 1))) == 16
