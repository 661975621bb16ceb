"""What this card can do at best: bytes per second of a copy, flops per second of square products.

Measured in every run, before and after the rows; the better of the two is what a floor is made
from. ``float32`` products may use TF32, ``float8_e4m3fn`` is torch's scaled product with fast
accumulation, ``float4_e2m1fn_x2`` the one of NVFP4 operands: the fastest that a kernel with such
operands could use.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from nemokernels.bench.check import Task
from nemokernels.bench.clock import Clock, race
from nemokernels.bench.rows import unit

COPY_BYTES = 1 << 30  # read, and as many written
SIZE = 8192
FP8, FP4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8, FP4)


@dataclass(frozen=True)
class Ceilings:
    """Copy in bytes/s (read and written), products in flop/s by dtype, why one is missing."""

    copy: float
    gemm: dict[str, float]
    missing: dict[str, str]

    def best(self, other: Ceilings) -> Ceilings:
        gemm = {k: max(v, other.gemm.get(k, 0.0)) for k, v in self.gemm.items()}
        return Ceilings(max(self.copy, other.copy), gemm, self.missing)

    def drift(self, other: Ceilings) -> dict[str, float]:
        """How far each moved from self to other, as a share."""
        moved = {"copy": other.copy / self.copy - 1}
        return moved | {k: other.gemm[k] / v - 1 for k, v in self.gemm.items() if k in other.gemm}


def calibrate(clock: Clock, *, copy_bytes: int = COPY_BYTES, size: int = SIZE) -> Ceilings:
    """Measure all ceilings, everyone in turn."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    functions, missing = {"copy": lambda: target.copy_(source)}, {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in DTYPES:
            product = _product(dtype, size, clock.device)
            try:
                product()
                functions[unit(dtype)] = product
            except (RuntimeError, NotImplementedError, ValueError) as error:
                missing[unit(dtype)] = str(error).splitlines()[0]
        row = SimpleNamespace(way="forward")
        runners = {k: clock.ready(Task(f, row, {}), None) for k, f in functions.items()}
        times = {k: stats.median for k, stats in race(runners, clock).items()}
    finally:
        torch.set_float32_matmul_precision(precision)
    copy = 2 * copy_bytes / times.pop("copy")
    return Ceilings(copy, {k: 2 * size**3 / t for k, t in times.items()}, missing)


def _product(dtype: torch.dtype, size: int, device: torch.device):
    if dtype is FP4:
        codes = torch.randint(256, (2, size, size // 2), dtype=torch.uint8, device=device)
        a, b = codes.view(FP4)
        ones = torch.ones(size * size // 16, device=device).to(FP8)  # in any order
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=ones, scale_b=ones, out_dtype=torch.bfloat16
        )
    # Random numbers: a product of zeros takes less power and runs at a higher clock rate.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype is not FP8:
        return lambda: a @ b.t()
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
