"""What a chunk scan must move and multiply. B rows, T tokens, H heads of P, G groups, state N.

Products are counted as the quadratic form in chunks of 64 tokens, whole squares, with the scores
C B^T made once per group: the fewest of the chunk sizes in use. The backward makes the scores and
the states again and takes the decay's gradient from row sums of the products it has anyway.
"""

from __future__ import annotations

from nemokernels._cost import Cost

CHUNK = 64


def forward(B: int, T: int, H: int, P: int, G: int, N: int, itemsize: int, unit: str) -> Cost:
    """x, dt, B and C read; y and the float32 final state written."""
    moved = B * T * (2 * H * P + 2 * G * N + H) * itemsize + 4 * B * H * P * N
    per_token = 2 * G * CHUNK * N + H * (2 * CHUNK * P + 4 * N * P)
    return Cost(moved, B * T * per_token, unit)


def backward(B: int, T: int, H: int, P: int, G: int, N: int, itemsize: int, unit: str) -> Cost:
    """x, dy, dt, B and C read; dx, ddt, dB and dC written."""
    moved = B * T * (3 * H * P + 4 * G * N + 2 * H) * itemsize
    per_token = 6 * G * CHUNK * N + H * (4 * CHUNK * P + 10 * N * P)
    return Cost(moved, B * T * per_token, unit)


def mixer_forward(B: int, T: int, H: int, P: int, G: int, N: int, itemsize: int, unit: str) -> Cost:
    """From zxbcdt to the input of the output projection: both once, nothing in between."""
    moved = B * T * (3 * H * P + 2 * G * N + H) * itemsize
    return Cost(moved, forward(B, T, H, P, G, N, itemsize, unit).flops, unit)


def mixer_both(B: int, T: int, H: int, P: int, G: int, N: int, itemsize: int, unit: str) -> Cost:
    """A forward and its backward, which reads zxbcdt and dy and writes dzxbcdt."""
    sizes = B, T, H, P, G, N, itemsize, unit
    ahead = mixer_forward(*sizes)
    moved = ahead.bytes + B * T * (5 * H * P + 4 * G * N + 2 * H) * itemsize
    return Cost(moved, ahead.flops + backward(*sizes).flops, unit)
