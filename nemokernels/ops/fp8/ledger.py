"""What really multiplied: for every layer that has a name, the backend of each of its products.

Written by the operators' legs, so that it tells what ran, under torch.compile too, and not what was
meant to run. A replayed CUDA graph runs what its capture noted.
"""

from __future__ import annotations

_ran: dict[str, dict[str, str]] = {}


def note(layer: str, products: tuple[str, ...], backend: str) -> None:
    """``backend`` has computed these products of ``layer``; "" is a layer nobody asks about."""
    if layer:
        _ran.setdefault(layer, {}).update(dict.fromkeys(products, backend))


def fp8_products(layer: str) -> dict[str, str]:
    """The products of the layer named so in :func:`fp8_linear` that have run, and where.

    Returns:
        ``{"forward" | "dgrad" | "wgrad": backend}``: "scaled_mm" is an FP8 product of the device,
        "reference" the same numbers from a wide product of the dequantised operands. A product
        that has not run is absent.
    """
    return dict(_ran.get(layer, {}))
