"""Philox4x32 counter-based random numbers in plain torch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is a 64-bit seed. The
counter is the low and the high word of a 64-bit offset, followed by two words the caller may choose
(by default zero). This makes the result bit-identical to Triton's ``randint4x(seed, offset)``. It
depends on seed and counter alone, so any grid, batch or backend draws the same numbers.
"""

from __future__ import annotations

import torch

from nemokernels._checks import check, check_tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    # a and m are below 2**32. int64 products wrap, so the high word is built from 16-bit halves.
    a_lo, a_hi = a & 0xFFFF, a >> 16
    low = a_lo * m
    high = a_hi * m + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def philox4x32(
    seed: int | torch.Tensor,
    offset: torch.Tensor,
    c2: int | torch.Tensor = 0,
    c3: int | torch.Tensor = 0,
    rounds: int = 10,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random 32-bit words (int64 tensors in [0, 2**32)) per element of ``offset``.

    Args:
        seed: 64-bit key, an int or an int64 tensor that broadcasts with ``offset``.
        offset: int64 tensor, the low 64 bits of the counter.
        c2, c3: the counter's upper words (32 bits each).
        rounds: number of Philox rounds: 10 is the standard generator; 5 are the fewest in use, for
            rounding noise.
    """
    offset = offset.long()
    as_tensor = lambda v: torch.as_tensor(v, dtype=torch.int64, device=offset.device)  # noqa: E731
    seed = as_tensor(seed - (1 << 64) if isinstance(seed, int) and seed >= 1 << 63 else seed)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = offset & _MASK, (offset >> 32) & _MASK
    c2, c3 = as_tensor(c2) & _MASK, as_tensor(c3) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(word: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Map a 32-bit word to [0, 1) with 24 bits: ``(word >> 8) * 2**-24``, exact in float32."""
    return (word >> 8).to(dtype) * 2.0**-24


def rounding_seed(
    where: str, seed: int | torch.Tensor | None, rounds: int, state: torch.Tensor
) -> torch.Tensor | None:
    """A ``seed`` argument as a one-element int64 tensor on the state's device; None stays None.

    Raises:
        TypeError, ValueError: it is not a 64-bit integer, or the state's dtype does not have 16
            bits.
    """
    if seed is None:
        return None
    check(where, state.dtype in (torch.float16, torch.bfloat16),
          "`seed` asks for stochastic rounding, which needs a float16 or bfloat16 state, got {}",
          state.dtype)  # fmt: skip
    check(where, rounds >= 1, "`philox_rounds` must be at least 1, got {}", rounds)
    if isinstance(seed, torch.Tensor):
        check_tensor(where, "seed", seed, dtypes=(torch.int64,), device=state.device)
        check(where, seed.numel() == 1,
              "`seed` has shape {}, expected one element", tuple(seed.shape))  # fmt: skip
        return seed.reshape(1)
    if not isinstance(seed, int):
        got = type(seed).__name__
        raise TypeError(f"{where}: `seed` must be an int or a torch.Tensor, got {got}")
    check(where, -(1 << 63) <= seed < 1 << 64, "`seed` is {}, expected a 64-bit integer", seed)
    # A fill and not a copy from the host, so that a CUDA graph can capture it.
    return state.new_full((1,), seed - (1 << 64) if seed >= 1 << 63 else seed, dtype=torch.int64)
