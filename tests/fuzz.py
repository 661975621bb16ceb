"""Random problems for the kernels of the Mamba-2 ops: few specialisations, many shapes.

A specialisation is what kernels are compiled for: dtypes, sizes that are constants there, options.
A problem is drawn from its number alone. Every operator is called and compared through a ``Judge``,
with its reference in float64 and, for the budget, in the same precision.
"""

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

    def sequences(self) -> int:
        """How many take a decode step."""
        return self.randint(0, 6 if self.most > 100 else 3)

    def randn(self, *shape, dtype=F32) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def slices(self, *sizes, rows, dtype) -> list[torch.Tensor]:
        """Tensors of these widths: of their own, or side by side as a projection leaves them."""
        if self.chance():
            return [self.randn(*rows, size, dtype=dtype) for size in sizes]
        return list(self.randn(*rows, sum(sizes) + 8, dtype=dtype).split([*sizes, 8], -1)[:-1])

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


def _steps(draw, H):
    """A and dt_bias as real layers have them."""
    steps = torch.exp(torch.rand(H, device=draw.device) * 4.6 - 6.9)
    return -1 - 15 * torch.rand(H, device=draw.device), steps.expm1().log()


def ssd(draw, judge, *, dtype, P=64, N=128, G=2, R=4, mode="rows", D=1, gate=False, start=True):
    H = G * R
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    if bounds is not None and draw.random() < 0.2:
        ids = draw.runs(rows, tokens)  # of which only the padding counts
    x, B, C = draw.slices(H * P, G * N, G * N, rows=(rows, tokens), dtype=dtype)
    A, bias = _steps(draw, H)
    inputs = (
        x.unflatten(-1, (H, P)),
        draw.randn(rows, tokens, H, dtype=dtype) / 2,
        A,
        B.unflatten(-1, (G, N)) / 2,
        C.unflatten(-1, (G, N)) / 2,
        {0: None, 1: draw.randn(H), 2: draw.randn(H, P)}[D],
        draw.randn(rows, tokens, H, P, dtype=dtype) if gate else None,
        bias,
        # Representable in dtype: how <G, S> rounds states from outside is not the reference's way.
        draw.randn(sequences, H, P, N, dtype=dtype).float() if start else None,
        ids,
        bounds,
    )
    options = (draw.choice((16, 64, 128)), True, 0.0, draw.choice((INF, 0.05)), None)
    out, final, ungated = judge("ssd_chunk_scan", *inputs, *options)
    dfinal = draw.randn(*final.shape, dtype=dtype).float()
    judge("ssd_chunk_scan_backward", draw.randn(*out.shape, dtype=dtype), dfinal, *inputs, ungated,
          *options)  # fmt: skip


def mixer(draw, judge, *, dtype, P=64, N=128, G=2, R=4, mode="rows", before=False, norm=True):
    H, inner, channels = G * R, G * R * P, G * R * P + 2 * G * N
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    randn = lambda width: draw.randn(rows, tokens, width, dtype=dtype)  # noqa: E731
    A, bias = _steps(draw, H)
    judge(
        "mamba_mixer_backward",
        randn(inner),
        draw.randn(sequences, H, P, N, dtype=dtype).float(),
        randn(inner + channels + H) / 2,
        draw.randn(channels, 4, dtype=dtype) / 2,
        draw.randn(channels, dtype=dtype) if draw.chance() else None,
        A,
        draw.randn(H),
        bias,
        draw.randn(inner) if norm else None,
        draw.randn(sequences, H, P, N, dtype=dtype).float(),
        ids,
        bounds,
        randn(inner),
        torch.rand(rows, tokens, G, device=draw.device) + 0.5 if norm else draw.randn(0),
        H,
        P,
        G,
        True,
        before,
        *(draw.choice((16, 64)), True, 0.0, INF, None),
    )


def conv1d(draw, judge, *, dtype, width=4, mode="rows", silu=True, bias=True, start=True):
    rows, tokens, sequences, ids, bounds = draw.packing(mode)
    channels = draw.choice((draw.randint(1, 40), 8 * draw.randint(1, 80)))
    x, dy = (draw.slices(channels, rows=(rows, tokens), dtype=dtype)[0] for _ in "xy")
    weight = draw.randn(channels, width, dtype=dtype)
    bias = draw.randn(channels, dtype=dtype) if bias else None
    initial = draw.randn(sequences, width - 1, channels, dtype=dtype) if start else None
    inputs = (x, weight, bias, ids, initial, bounds, silu)
    _, states = judge("causal_conv1d", *inputs, True)
    judge("causal_conv1d_backward", dy, draw.randn(*states.shape, dtype=dtype), *inputs)
    batch, new = draw.randint(1, 5), draw.randint(0, 4)
    state = draw.randn(batch + 2, channels, width - 1 + new, dtype=dtype)
    slots = draw.sample(range(-1, batch + 2), batch)
    ring = draw.ints([draw.randint(0, 9) for _ in slots]) if draw.chance() else None
    judge("causal_conv1d_update", draw.randn(batch, new, channels, dtype=dtype), state, weight,
          bias, silu, ring, draw.ints(slots), None)  # fmt: skip


def rms_norm(draw, judge, *, width, dtype, wide=None):
    rows = (draw.randint(0, 3), draw.tokens())
    x, dy, residual, dtotal = draw.slices(*[width] * 4, rows=rows, dtype=dtype)
    weight, eps = draw.randn(width, dtype=wide or dtype), draw.choice((1e-5, 1e-2))
    _, rstd = judge("rms_norm", x, weight, eps)
    judge("rms_norm_backward", dy, x, weight, rstd)
    residual, dtotal = (t.to(wide or dtype) for t in (residual, dtotal))
    _, total, rstd = judge("add_rms_norm", x, residual, weight, eps)
    x_dtype = dtype if wide not in (None, dtype) else None
    judge("add_rms_norm_backward", dy, dtotal, total, weight, rstd, x_dtype)


def gated_rms_norm(draw, judge, *, groups, size, dtype, first=False, gate=True, bias=False):
    width, rows = groups * size, (draw.randint(0, 3), draw.tokens())
    x, z, dy = draw.slices(*[width] * 3, rows=rows, dtype=dtype)
    weight, bias = draw.randn(width), draw.randn(width) if bias else None
    z = z if gate else None
    _, rstd = judge("gated_rms_norm", x, weight, bias, z, 1e-5, size, first)
    judge("gated_rms_norm_backward", dy, x, weight, bias, z, rstd, size, first)


def _heads(draw, H):
    """A, D and dt_bias per head."""
    rates = -torch.rand(H, device=draw.device) * 4 - 0.1
    return rates, draw.randn(H), draw.randn(H)


def state_update(draw, judge, *, H, P, N, G, dtype, state_dtype=F32, mode="rows", gate=True):
    batch = draw.sequences()
    lengths = [draw.choice((0, 1, 2, 4)) if mode == "packed" else 1 for _ in range(batch)]
    tokens = sum(lengths)
    x, B, C = draw.slices(H * P, G * N, G * N, rows=(tokens,), dtype=dtype)
    A, D, bias = _heads(draw, H)
    places = draw.sample(range(4 * batch + 2), 4 * batch)
    slots = [[-1 if draw.random() < 0.1 else p for p in places[4 * b : 4 * b + 4]]
             for b in range(batch)]  # fmt: skip
    packed = mode == "packed"
    accepted = draw.ints([draw.randint(0, 4) for _ in range(batch)])
    judge(
        "selective_state_update",
        draw.randn(4 * batch + 2, H, P, N, dtype=state_dtype),
        x.unflatten(-1, (H, P)),
        draw.randn(tokens, H, 1, dtype=dtype).expand(-1, -1, P),
        A[:, None, None].expand(H, P, N),
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        D[:, None].expand(H, P),
        draw.randn(tokens, H, P, dtype=dtype) if gate else None,
        bias[:, None].expand(H, P),
        True,
        draw.ints(slots).view(batch, 4) if packed else draw.ints([s[0] for s in slots]),
        None,
        accepted if packed else None,
        draw.ints([sum(lengths[:b]) for b in range(batch + 1)]) if packed else None,
        None,
        5,
    )


def mamba_step(draw, judge, *, H, P, N, G, dtype, tokens=1, width=4, state_dtype=F32, gate=True):
    batch, spare, channels = draw.sequences(), draw.randint(0, 2), H * P + 2 * G * N
    xBC, z = draw.slices(channels, H * P, rows=(batch, tokens), dtype=dtype)
    A, D, bias = _heads(draw, H)
    slots = [-1 if draw.random() < 0.1 else s for s in draw.sample(range(batch + 2), batch)]
    judge(
        "mamba_step",
        xBC,
        draw.randn(batch, tokens, H, dtype=dtype),
        z if gate else None,
        draw.randn(batch + 2, channels, width - 1 + tokens + spare, dtype=dtype),
        draw.randn(batch + 2, tokens + spare, H, P, N, dtype=state_dtype),
        draw.randn(channels, width, dtype=dtype),
        draw.randn(channels, dtype=dtype),
        A,
        D,
        bias,
        draw.ints([draw.randint(0, 20) for _ in range(batch)]),
        draw.ints(slots),
        G,
        0.0,
        draw.choice((INF, 0.5)),
        None,
        5,
    )


FUZZED = (
    Fuzzed("ssd", ssd, (
        dict(dtype=BF16, G=8, R=2),
        dict(dtype=BF16, G=1, R=8, gate=True, start=False),
        dict(dtype=BF16, mode="seq_idx"),
        dict(dtype=BF16, mode="packed", D=2, gate=True),
        dict(dtype=BF16, P=80, D=2),
        dict(dtype=BF16, P=80, G=1, R=8, mode="packed"),
        dict(dtype=BF16, N=256, G=1, R=8, start=False),
        dict(dtype=BF16, N=256, mode="seq_idx"),
        dict(dtype=F16, gate=True),
        dict(dtype=F16, P=33, N=20, G=3, R=3, mode="seq_idx", D=0),
        dict(dtype=F32, G=1, R=8),
        dict(dtype=F32, P=80, mode="packed"),
    )),
    Fuzzed("ssd", mixer, (
        dict(dtype=BF16, G=8, R=2),
        dict(dtype=BF16, before=True, mode="seq_idx"),
        dict(dtype=BF16, norm=False, mode="packed"),
        dict(dtype=BF16, P=80, mode="packed"),
        dict(dtype=F16, P=33, N=20, G=3, R=3, norm=False, mode="seq_idx"),
        dict(dtype=F32, G=1, R=8),
    )),
    Fuzzed("causal_conv1d", conv1d, (
        dict(dtype=BF16),
        dict(dtype=BF16, mode="seq_idx"),
        dict(dtype=BF16, mode="packed"),
        dict(dtype=BF16, mode="packed", width=2, bias=False, start=False),
        dict(dtype=F16, width=3, mode="seq_idx", silu=False, bias=False),
        dict(dtype=F16, mode="packed"),
        dict(dtype=F32),
        dict(dtype=F32, width=3, mode="packed", silu=False),
    )),
    Fuzzed("rms_norm", rms_norm, (
        *(dict(width=w, dtype=BF16) for w in (1, 33, 128, 2688, 4096)),
        *(dict(width=w, dtype=BF16, wide=F32) for w in (257, 2688)),
        *(dict(width=w, dtype=F16) for w in (80, 4480)),
        *(dict(width=w, dtype=F32) for w in (7, 2688)),
        dict(width=18432, dtype=BF16),
    )),
    Fuzzed("gated_rms_norm", gated_rms_norm, (
        *(dict(groups=8, size=s, dtype=BF16) for s in (512, 1024)),
        dict(groups=1, size=4096, dtype=BF16, first=True),
        dict(groups=1, size=5120, dtype=BF16, bias=True),
        dict(groups=3, size=16, dtype=BF16),
        dict(groups=2, size=80, dtype=BF16, gate=False),
        dict(groups=8, size=512, dtype=F16, first=True, bias=True),
        dict(groups=5, size=7, dtype=F16),
        dict(groups=8, size=512, dtype=F32),
        dict(groups=1, size=1, dtype=F32, first=True),
    )),
    Fuzzed("state_update", state_update, (
        *(dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=s) for s in (F32, BF16, F16)),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, mode="packed"),
        dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=BF16, mode="packed"),
        dict(H=8, P=80, N=128, G=2, dtype=BF16, mode="packed"),
        dict(H=8, P=64, N=256, G=1, dtype=BF16, gate=False),
        dict(H=6, P=17, N=33, G=3, dtype=F16, state_dtype=F16, mode="packed"),
        dict(H=4, P=5, N=10, G=2, dtype=F32, mode="packed"),
    )),
    Fuzzed("mamba_step", mamba_step, (
        *(dict(H=16, P=64, N=128, G=8, dtype=BF16, state_dtype=s) for s in (F32, BF16, F16)),
        *(dict(H=16, P=64, N=128, G=8, dtype=BF16, tokens=t) for t in (2, 4)),
        dict(H=8, P=80, N=128, G=2, dtype=BF16, tokens=3),
        dict(H=8, P=64, N=256, G=1, dtype=BF16, gate=False),
        dict(H=6, P=17, N=33, G=3, dtype=F16, width=3),
        dict(H=4, P=5, N=10, G=2, dtype=F32, width=2, tokens=5),
    )),
)  # fmt: skip
