"""Right or wrong, before any time is taken.

Our result is held to the float64 reference by the rule of the tests: at most twice the error of the
reference in the same dtype, plus two ulp (``nemokernels.testing``). A peer rounds where it likes,
and sums such as the gradient of A cancel; its adapter is right if the error stays under ``PEER`` of
the result in the root mean square.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.utils._pytree import tree_leaves, tree_map

from nemokernels import testing
from nemokernels.bench.plans import to_reference, watched
from nemokernels.bench.rows import Make, Row

FEW = 1024  # elements, of which the budget is not left to one reference
PEER = 0.1
PEER_EQUAL = 0.999  # share of equal elements of integer and 8-bit results


class Wrong(AssertionError):
    """A result that is not what the reference says."""


class Task:
    """A function on a row's inputs, as it is checked and timed: ``run(prepare())``."""

    def __init__(self, function, row: Row, inputs: dict, grad: torch.Tensor | None = None):
        self.function, self.row, self.inputs, self.grad = function, row, inputs, grad

    def prepare(self):
        """Everything that is not timed: for a backward, the forward and a copy of its gradient."""
        if self.row.way == "forward":
            return None
        leaves = {n: self.inputs[n].detach().requires_grad_() for n in self.row.subject.wrt}
        grad = None if self.grad is None else self.grad.clone()  # some peers write into it
        out = self._forward(leaves) if self.row.way == "backward" else None
        return leaves, out, grad

    def run(self, prepared):
        """What is timed. Returns the results, or the gradients."""
        if self.row.way == "forward":
            with torch.no_grad():
                return self.function(**self.inputs)
        leaves, out, grad = prepared
        if out is None:
            out = self._forward(leaves)
        return torch.autograd.grad(out, list(leaves.values()), grad)

    def _forward(self, leaves) -> torch.Tensor:
        return tensors(self.function(**{**self.inputs, **leaves}))[0]

    def copy(self) -> Task:
        """The same on copies of the inputs."""
        inputs = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, self.inputs)
        return Task(self.function, self.row, inputs, self.grad)

    def once(self) -> list[torch.Tensor]:
        """The results of one run that leaves the inputs as they were."""
        subject = self.row.subject
        kept = {name: self.inputs[name].clone() for name in subject.mutates}
        task = Task(self.function, self.row, {**self.inputs, **kept}, self.grad)
        return tensors(task.run(task.prepare()))


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Judge:
    """A row's inputs, and its results in float64 and in its own dtype by the reference."""

    def __init__(self, row: Row, device: torch.device, shape: dict | None = None):
        self.row = row
        self.inputs = row.subject.inputs(Make(device, row.dtype), **(shape or row.shape))
        self.grad = None
        if row.way != "forward":
            self.grad = self._output_gradient(device)
        reference = row.subject.exact or row.subject.ours
        with reference_runs():
            self.low = Task(reference, row, self.inputs, self.grad).once()
            kept = {name: self.inputs[name] for name in row.subject.kept}
            wide = testing.to_double(self.inputs) | kept
            grad = None if self.grad is None else self.grad.double()
            self.exact = Task(reference, row, wide, grad).once()
            self.low = self._worst_of_few([Task(low, row, self.inputs, self.grad)
                                           for low in row.subject.lows])  # fmt: skip

    def _worst_of_few(self, others: list[Task]) -> list[torch.Tensor]:
        """``low``, with those of few elements taken from whichever reference errs most."""
        few = [is_float(want) and want.numel() < FEW for want in self.exact]
        if not any(few):
            return self.low
        found = [[low] for low in self.low]
        for task in others:
            for lows, low, is_few in zip(found, task.once(), few, strict=True):
                lows += [low] * is_few
        return [testing.worst(want, lows) for want, lows in zip(self.exact, found, strict=True)]

    def task(self, function) -> Task:
        return Task(function, self.row, self.inputs, self.grad)

    def ours(self, results: list[torch.Tensor]) -> float:
        """The largest error in units of what is allowed. Raises Wrong above 1."""
        if len(results) != len(self.exact):
            raise Wrong(f"{len(results)} results, expected {len(self.exact)}")
        worst = 0.0
        for i, (got, want, plain) in enumerate(zip(results, self.exact, self.low)):
            try:
                if is_float(got):
                    worst = max(worst, testing.assert_matches(got, want, plain, f"result {i}"))
                elif not torch.equal(got, plain):
                    raise AssertionError(f"result {i} is not what the reference gives")
            except AssertionError as error:
                raise Wrong(str(error)) from None
        return worst

    def peer(self, results: list[torch.Tensor]) -> float:
        """The largest relative error in the root mean square. Raises Wrong above PEER."""
        worst = 0.0
        for i, (got, want, plain) in enumerate(zip(results, self.exact, self.low)):
            if got.shape != want.shape:
                raise Wrong(f"result {i} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
            if not is_float(plain):
                same = (as_bytes(got) == as_bytes(plain)).double().mean().item()
                if same < PEER_EQUAL:
                    raise Wrong(f"result {i} agrees in {same:.1%} of its elements")
                continue
            error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
            if not error <= PEER:  # NaN is wrong too
                raise Wrong(f"result {i} is {error.item():.2%} off the reference")
            worst = max(worst, error.item())
        if not results:
            raise Wrong("no result")
        return worst

    def _output_gradient(self, device: torch.device) -> torch.Tensor:
        meta = self.row.subject.ours(
            **tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, self.inputs)
        )
        first = tensors(meta)[0]
        return Make(device, first.dtype, seed=1).randn(*first.shape)


def is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8) if tensor.is_floating_point() else flat


@contextlib.contextmanager
def reference_runs():
    """Every op runs its reference, on the GPU too, where that would otherwise be warned of."""
    with watched(to_reference), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no kernel", category=RuntimeWarning)
        yield
