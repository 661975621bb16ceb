"""What an op must at least move and multiply, and how long that takes: the floor of its time.

Every op folder has a ``cost.py`` whose functions count one call. Bytes are those that any
implementation reads or writes once: inputs, outputs, states; nothing that could stay on the chip
between two steps. Small per-channel parameters (biases, scales, norm weights) are left out.
Flops are those of matrix products alone, two per multiply-add; the rest runs beside the loads.
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
        """Seconds: ``max(bytes / copy, flops / gemm[unit])``, ceilings in bytes and flops per s.

        Raises:
            ValueError: there are flops and no ceiling for their unit.
        """
        if not self.flops:
            return self.bytes / copy
        if not gemm.get(self.unit):
            raise ValueError(f"no matrix product of {self.unit} was measured, the floor needs it")
        return max(self.bytes / copy, self.flops / gemm[self.unit])
