"""What a Mamba-2 layer's decode step must move; it multiplies no matrices."""

from __future__ import annotations

from nemokernels._cost import Cost


def forward(
    B: int, T: int, H: int, P: int, G: int, N: int, W: int, state_itemsize: int, itemsize: int
) -> Cost:
    """B rows of T tokens: a state of each row read, one per token written; W - 1 inputs of the
    convolution's history read, T written; xBC and dt read, y written."""
    channels = H * P + 2 * G * N
    states = (1 + T) * H * P * N * state_itemsize
    rows = (W - 1 + T) * channels + T * (channels + H + H * P)
    return Cost(B * (states + rows * itemsize))
