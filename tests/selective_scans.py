"""What the tests of the selective scan's kernels share."""

from nemokernels import testing
from nemokernels.ops.selective_scan import ref


def low_gradients(args, exact):
    """The reference's gradients; of those that are a few long sums, from four of its calls the one
    that errs most, or chance makes the budget. (Gradients are linear in dout and dfinal.)"""
    dout, dfinal, *rest = args
    mine = ref.backward(*args)
    found = [mine]
    for factor in (3, 5, 7):
        scaled = ref.backward(factor * dout.float(), factor * dfinal, *rest)
        found.append([low if low.element_size() < 4 else other / factor
                      for low, other in zip(mine, scaled)])  # fmt: skip
    return [testing.worst(*pair) for pair in zip(exact, zip(*found))]
