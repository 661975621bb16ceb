"""What random problems are drawn and judged with. See fuzz.py."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass

import on_gpu
import torch
from torch.utils._pytree import tree_leaves, tree_map

from nemokernels import testing
from nemokernels._registry import FAMILIES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF = float("inf")
FEW = 256  # elements


class Judge:
    """Runs operators by ``call(operator, args)`` and holds what they return and write to a budget.

    The budget comes from what the reference errs. Of a few elements it is a matter of chance, so
    tensors of fewer than FEW are kept, and those of all problems judged as one by ``finish``.
    """

    def __init__(self, call: Callable):
        self.call, self.few = call, collections.defaultdict(list)

    def __call__(self, name: str, *args):
        family = next(f for f in FAMILIES.values() if name in f.operators)
        operator = family.operators[name]
        native, plain, exact = (tree_map(_copy, args) for _ in range(3))
        exact = testing.to_double(exact)
        got = self.call(operator, native)
        with on_gpu.references():
            low, want = operator.reference(*plain), operator.reference(*exact)
        written = [n for n, a in enumerate(operator.overload._schema.arguments)
                   if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
        trees = [tree_leaves((out, [after[n] for n in written]))
                 for out, after in ((got, native), (want, exact), (low, plain))]  # fmt: skip
        for i, (a, b, c) in enumerate(zip(*trees)):
            assert a.shape == b.shape and a.dtype == c.dtype, f"{name} {i}"
            if not a.is_floating_point():
                assert torch.equal(a, c), f"{name} {i}"
            elif a.numel() < FEW:
                self.few[name, i].append([t.flatten() for t in (a, b, c)])
            else:
                testing.assert_matches(a, b, c, f"{name} {i}")
        return got

    def finish(self):
        for (name, i), many in self.few.items():
            got, want, low = map(torch.cat, zip(*many))
            if got.numel() < FEW:  # still: the reference may have been lucky by a factor of two
                low = (want + 2 * (low - want)).to(low.dtype)
            testing.assert_matches(got, want, low, f"{name} {i} of all problems")


def _copy(value):
    """The same values and strides in other memory."""
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.new_zeros(value.untyped_storage().nbytes() // value.element_size())
    whole.copy_(value.as_strided(whole.shape, (1,), 0))
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


class Draw(random.Random):
    """What a problem is made of. ``most`` tokens per row at most."""

    def __init__(self, number: int, most: int, device: torch.device):
        super().__init__(number)
        torch.manual_seed(number)
        self.most, self.device = most, device

    def chance(self) -> bool:
        return self.random() < 0.5

    def tokens(self) -> int:
        """0, 1, a few, or around the ends of chunks and tiles."""
        near = self.choice((0, 1, 16, 32, 64, 128, 192, 256)) + self.randint(-2, 2)
        return min(max(self.choice((near, self.randint(1, self.most))), 0), self.most)

    def sequences(self, low: int, high: int) -> int:
        """How many take a decode step, which the plan asks for. Small problems: at most 3."""
        return min(self.randint(low, high), self.most if self.most > 100 else 3)

    def randn(self, *shape, dtype=F32) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def slices(self, *sizes, rows, dtype, after=None) -> list[torch.Tensor]:
        """Tensors of these widths: of their own, or side by side ``after`` so many other elements,
        as a projection leaves them."""
        if after is None:
            return [self.randn(*rows, size, dtype=dtype) for size in sizes]
        whole = self.randn(*rows, after + sum(sizes), dtype=dtype)
        return list(whole.split([after, *sizes], -1)[1:])

    def ints(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def runs(self, rows: int, tokens: int) -> torch.Tensor:
        """Sequence ids: runs of any length, some of them padding."""

        def row():
            ids, number = [], self.choice((0, 3))
            while len(ids) < tokens:
                pad = self.random() < 0.2
                ids += [-1 if pad else number] * self.choice((1, 2, self.randint(1, tokens)))
                number += not pad
            return ids[:tokens]

        return self.ints([row() for _ in range(rows)]).view(rows, tokens)

    def bounds(self, tokens: int) -> torch.Tensor:
        """cu_seqlens: some sequences are empty, some tokens in the end are nobody's."""
        cuts = [self.randint(0, tokens) for _ in range(self.randint(1, 6))]
        cuts += self.choices(cuts, k=self.randint(0, 2))
        return self.ints([0, *sorted(cuts)])

    def packing(self, mode: str) -> tuple:
        """Rows, tokens, sequences, seq_idx and cu_seqlens."""
        tokens, rows = self.tokens(), 1 if mode == "packed" else self.randint(1, 3)
        bounds = self.bounds(tokens) if mode == "packed" else None
        ids = self.runs(rows, tokens) if mode == "seq_idx" else None
        return rows, tokens, rows if bounds is None else len(bounds) - 1, ids, bounds


@dataclass(frozen=True)
class Fuzzed:
    """``problem(draw, judge, **specialisation)`` draws one and calls the operators on it."""

    family: str
    problem: Callable
    specialisations: tuple[dict, ...]

    @property
    def name(self) -> str:
        return self.problem.__name__

    def run(self, which: int, numbers: range, most: int, device, call, **changed) -> None:
        """Problems of these numbers, up to ``most`` tokens; ``changed`` of the specialisation."""
        judge, options = Judge(call), {**self.specialisations[which], **changed}
        for number in numbers:
            try:
                self.problem(Draw(number, most, device), judge, **options)
            except AssertionError as error:
                raise AssertionError(f"{self.name}, {which}, problem {number}: {error}") from error
        judge.finish()
