"""The least that an op must move and multiply, and how long that takes: the floor of its time.

Every op folder has a ``cost.py`` whose functions count one call. Bytes count what any
implementation must read or write once: inputs, outputs and states, but nothing that could stay on
the chip between two steps, and no small per-channel parameters (biases, scales, norm weights).
Flops count matrix products alone, two per multiply-add; all other arithmetic can overlap the loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Bytes moved and flops of matrix products whose operands have the dtype ``unit``."""

    bytes: float
    flops: float = 0.0
    unit: str = "bfloat16"

    def floor(self, copy: float, gemm: Mapping[str, float]) -> float:
        """Seconds: ``max(bytes / copy, flops / gemm[unit])``; the ceilings are per second.

        Raises:
            ValueError: there are flops, but no ceiling for their unit.
        """
        if not self.flops:
            return self.bytes / copy
        if not gemm.get(self.unit):
            raise ValueError(f"no matrix product of {self.unit} was measured, the floor needs it")
        return max(self.bytes / copy, self.flops / gemm[self.unit])
