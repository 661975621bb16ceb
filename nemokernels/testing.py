"""Judging a result: derived tolerances, poisoned allocations, derivative checks.

Used by the tests, the self-test and the bench, so that all three mean the same by "right".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils._pytree import tree_map


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at magnitude ``scale`` (zero for a zero scale)."""
    if scale == 0.0:
        return 0.0
    info = torch.finfo(dtype)
    return max(2.0 ** int(torch.tensor(scale, dtype=torch.float64).log2().floor()) * info.eps,
               info.smallest_normal * info.eps)  # fmt: skip


def error_budget(reference: torch.Tensor, low: torch.Tensor) -> float:
    """``2 * max|low - reference| + 2 ulp(max|reference|)`` in the dtype of ``low``.

    The rule of FlashAttention's tests: a kernel may err at most twice as much as plain torch does
    in the same precision, plus two units of the output format at the largest magnitude.
    """
    if reference.numel() == 0:
        return 0.0
    # No indexing by a mask: on a GPU its indices are several times as large as the tensor.
    finite, exact = torch.isfinite(reference), reference.double()
    plain = torch.where(finite, low.double() - exact, 0.0).abs_().max().item()
    scale = torch.where(finite, exact, 0.0).abs_().max().item()
    return 2.0 * plain + 2.0 * ulp(scale, low.dtype)


def worst(reference: torch.Tensor, candidates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of several low-precision references, each as good as the others, the one that errs most.

    The error of a result that is a handful of sums is a matter of chance, and so is a budget taken
    from one reference: of two that are equally good one errs more than twice as much as the other
    in up to three of ten cases.
    """
    exact = reference.detach().double()
    finite = torch.isfinite(exact)

    def error(low: torch.Tensor) -> float:
        difference = torch.where(finite, (low.double() - exact).abs(), 0.0)
        return difference.nan_to_num_(math.inf).max().item() if low.numel() else 0.0

    return max(candidates, key=error)


def assert_matches(
    actual: torch.Tensor, reference: torch.Tensor, low: torch.Tensor, name: str = "output"
) -> float:
    """Assert that ``actual`` is as close to ``reference`` as its precision allows.

    Args:
        actual: what the kernel returned.
        reference: the float64 oracle; the comparison is made on its device.
        low: the reference implementation run in the kernel's dtype with the documented cast points;
            its error against ``reference`` sets the budget.
        name: what the message calls it.

    Returns:
        max error divided by the budget (0 where both are exact).

    Raises:
        AssertionError: wrong shape, different NaN or Inf positions, an error over the budget, or
            no budget, as ``low`` is not finite where ``reference`` is.
    """
    assert actual.shape == reference.shape, f"{name}: shape {actual.shape} != {reference.shape}"
    if actual.numel() == 0:
        return 0.0
    want = reference.detach().double()
    got, low = (t.detach().to(want.device) for t in (actual.double(), low))
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: finite masks differ"
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN masks differ"
    error = torch.where(finite, (got - want).abs(), 0.0)
    worst, budget = error.max().item(), error_budget(want, low)
    assert math.isfinite(budget), f"{name}: `low` is not finite where `reference` is: no budget"
    if worst > budget:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: error {worst:.3e} at {where} exceeds the budget {budget:.3e} "
            f"(got {got[where].item():.6e}, want {want[where].item():.6e})"
        )
    return worst / budget if budget else 0.0


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill everything ``torch.empty`` returns with NaN (or the largest integer).

    An element that a kernel forgets to write then shows. This also turns on deterministic
    algorithms, since torch ties the two together.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def to_double(tree):
    """Every floating tensor of a pytree as float64 (float8 and integer tensors are left alone)."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.dtype in wide else t, tree
    )


def gradients(
    fn: Callable, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs of ``fn(*tensors)`` and the gradient of every floating tensor.

    ``grads`` are the gradients of the outputs; by default all are one.
    """
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    out = fn(*leaves)
    outs = [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if o is not None]
    outs = [o for o in outs if o.requires_grad]
    grads = grads or [torch.ones_like(o) for o in outs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return outs, list(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
