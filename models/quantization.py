"""Which linear layers of a checkpoint are quantised, and how: NVIDIA ModelOpt's FP8 and NVFP4.

A checkpoint declares its scheme in ``hf_quant_config.json`` or in the ``quantization_config`` of
``config.json``; the tensors must agree with it. A quantised layer P stores, for a weight (R, K):

* FP8: ``P.weight`` float8_e4m3fn (R, K) and ``P.weight_scale`` float32 scalar;
* NVFP4: ``P.weight`` uint8 (R, K/2), ``P.weight_scale`` float8_e4m3fn (R, K/16) and
  ``P.weight_scale_2`` float32 scalar. Without activation scales this is W4A16_NVFP4.

``P.input_scale`` is the static activation scale; ``k_proj.k_scale`` and ``v_proj.v_scale`` belong
to an FP8 KV cache and are 1 where absent.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nemokernels import NVFP4
from nemokernels.models.files import CheckpointError, Problems, StoredTensor
from nemokernels.models.names import is_linear

ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4")
SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
GROUP = 16
MAX_WILDCARDS = 1000  # every pattern is tried on every layer


@dataclass
class Quantization:
    """What a quantised checkpoint declared, kept on the model as ``model.quantization``.

    Attributes:
        layers: module name -> "FP8", "NVFP4" or "W4A16_NVFP4". The model holds them dequantised,
            except those in ``kept``.
        input_scales: module name -> static activation scale (x is quantised as x / scale).
        kv_scales: module name of a k_proj or v_proj -> scale of its FP8 cache.
        w4a4: those of ``kept`` that multiply activations in NVFP4 too.
    """

    layers: dict[str, str] = field(default_factory=dict)
    input_scales: dict[str, float] = field(default_factory=dict)
    kv_scales: dict[str, float] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    w4a4: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scheme:
    """A declared scheme. ``layers`` and ``excluded`` are None if they are not declared."""

    file: str
    algorithm: str
    kv_cache: str | None
    layers: dict[str, str] | None
    excluded: frozenset[str] | None
    wildcards: tuple[str, ...] = ()

    def agrees(self, module: str, stored: str | None) -> bool:
        """Whether ``module`` may be stored as ``stored`` (None: not quantised)."""
        ancestors = [module]
        while "." in ancestors[-1]:
            ancestors.append(ancestors[-1].rsplit(".", 1)[0])
        if self.excluded is not None and (
            any(name in self.excluded for name in ancestors)
            or any(fnmatch.fnmatchcase(module, pattern) for pattern in self.wildcards)
        ):
            return stored is None
        if self.layers is not None:
            named = next((self.layers[name] for name in ancestors if name in self.layers), None)
            return _same(named, stored)
        if self.algorithm == "MIXED_PRECISION":
            return True
        if self.excluded is None:
            return stored is None or _same(self.algorithm, stored)
        return _same(self.algorithm, stored)


def _same(declared: str | None, stored: str | None) -> bool:
    # NVFP4 without activation scales is W4A16, whatever the file calls it.
    return declared == stored or (declared, stored) == ("NVFP4", "W4A16_NVFP4")


def parse_scheme(file: str, data: dict, canonical) -> Scheme:
    """Read the scheme in ``data``, in either spelling; ``canonical`` maps module names to ours.

    Raises:
        CheckpointError: a method, algorithm or group size this package does not decode.
    """
    where = f"{file}: quantization"
    method = data.get("quant_method", "modelopt")
    if method != "modelopt":
        raise CheckpointError(f"{where}: `quant_method` is {method!r:.100}, expected 'modelopt'")
    algorithm = data.get("quant_algo")
    if algorithm not in (*ALGORITHMS, "MIXED_PRECISION"):
        raise CheckpointError(
            f"{where}: `quant_algo` is {algorithm!r:.100}, expected one of "
            f"{', '.join(ALGORITHMS)}, MIXED_PRECISION"
        )
    _check_group(where, data)
    listed = data.get("quantized_layers")
    layers = None
    if listed is not None:
        if not isinstance(listed, dict):
            raise CheckpointError(f"{where}: `quantized_layers` must map layers to algorithms")
        layers = {canonical(name): _layer(f"{where}: {name}", how) for name, how in listed.items()}
    excluded = data.get("exclude_modules", data.get("ignore"))
    if excluded is None:
        return Scheme(file, algorithm, _kv_cache(where, data), layers, None)
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise CheckpointError(f"{where}: the excluded modules must be a list of names")
    names = {canonical(name) for name in excluded}
    wildcards = tuple(sorted(name for name in names if any(c in name for c in "*?[")))
    if len(wildcards) > MAX_WILDCARDS:
        raise CheckpointError(f"{where}: {len(wildcards)} wildcards, at most {MAX_WILDCARDS}")
    return Scheme(
        file, algorithm, _kv_cache(where, data), layers, frozenset(names.difference(wildcards)),
        wildcards,
    )  # fmt: skip


def _layer(where: str, how: object) -> str:
    algorithm = how.get("quant_algo") if isinstance(how, dict) else how
    if algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"{where}: `quant_algo` is {algorithm!r:.100}, expected one of {', '.join(ALGORITHMS)}"
        )
    if isinstance(how, dict):
        _check_group(where, how)
    return algorithm


def _check_group(where: str, data: dict) -> None:
    if data.get("group_size", GROUP) not in (GROUP, None):
        raise CheckpointError(
            f"{where}: `group_size` is {data['group_size']!r:.100}, expected {GROUP}"
        )


def _kv_cache(where: str, data: dict) -> str | None:
    scheme = data.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        eight = scheme.get("num_bits") == 8 and scheme.get("type", "float") == "float"
        algorithm = "FP8" if eight else str(scheme)
    else:
        algorithm = data.get("kv_cache_quant_algo") if scheme is None else str(scheme)
    if algorithm not in (None, "FP8"):
        raise CheckpointError(f"{where}: KV cache in {algorithm!r:.100}, expected FP8 or none")
    return algorithm


def is_scale(name: str) -> bool:
    """Whether ``name`` is one of the tensors that accompany a quantised layer."""
    return name.endswith(tuple("." + leaf for leaf in SCALES))


def stored_as(module: str, tensors: dict[str, StoredTensor]) -> str | None:
    """The algorithm that the dtypes of a module's weight and scales show; None if not quantised."""
    weight = tensors.get(f"{module}.weight")
    if weight is None or not is_linear(module):
        return None
    if weight.dtype == torch.float8_e4m3fn:
        return "FP8"
    if weight.dtype == torch.uint8:
        return "NVFP4" if f"{module}.input_scale" in tensors else "W4A16_NVFP4"
    return None


def nvfp4_of(module: str, read: Callable[[str], torch.Tensor]) -> NVFP4:
    """The NVFP4 weight of a layer, whose parts ``read`` returns by their leaf names.

    Raises:
        CheckpointError: a block scale is negative; no quantiser writes one, and matrix units that
            multiply NVFP4 take it for positive.
    """
    weight = NVFP4(*map(read, ("weight", "weight_scale", "weight_scale_2")))
    if (weight.scales.view(torch.uint8) > 127).any():
        raise CheckpointError(f"{module}.weight_scale: holds a negative block scale")
    return weight


def companions(
    module: str, shape: tuple[int, ...], algorithm: str | None, kv_cache: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """The tensors of a linear layer, weight included: leaf -> (shape, dtype, required).

    A layer that is not quantised has no entry for its weight: that has the model's dtype.
    """
    rows, columns = shape
    scalar = ((), torch.float32)
    leaves: dict[str, tuple[tuple[int, ...], torch.dtype, bool]] = {}
    if algorithm == "FP8":
        leaves["weight"] = (shape, torch.float8_e4m3fn, True)
        leaves["weight_scale"] = (*scalar, True)
        leaves["input_scale"] = (*scalar, False)
    elif algorithm is not None:
        leaves["weight"] = ((rows, columns // 2), torch.uint8, True)
        leaves["weight_scale"] = ((rows, columns // GROUP), torch.float8_e4m3fn, True)
        leaves["weight_scale_2"] = (*scalar, True)
        leaves["input_scale"] = (*scalar, False)
    if kv_cache and module.endswith((".k_proj", ".v_proj")):
        leaves[f"{module[-6]}_scale"] = (*scalar, False)
    return leaves


def check_layers(
    linear: dict[str, tuple[int, ...]],
    tensors: dict[str, StoredTensor],
    scheme: Scheme | None,
    problems: Problems,
) -> tuple[dict[str, str], set[str]]:
    """Compare the stored layers with the declared scheme.

    Args:
        linear: module -> logical weight shape, of every linear layer the model has.
        tensors: canonical name -> what is stored.
        scheme: the declared scheme; None if there is none.
        problems: collects every contradiction.

    Returns:
        ``(layers, used)``: module -> algorithm, and the names of scales that belong to a layer.
    """
    layers, used = {}, set()
    kv_cache = scheme is not None and scheme.kv_cache is not None
    for module, shape in linear.items():
        if f"{module}.weight" not in tensors:
            continue
        algorithm = stored_as(module, tensors)
        if scheme is None and algorithm is not None:
            problems.add(
                f"{module}: stored as {algorithm}, but neither hf_quant_config.json nor "
                "config.json declares a quantisation"
            )
        if scheme is not None and not scheme.agrees(module, algorithm):
            stored = algorithm or "an unquantised weight"
            problems.add(f"{module}: stored as {stored}, which contradicts {scheme.file}")
        if algorithm is not None:
            layers[module] = algorithm
            if algorithm != "FP8" and shape[1] % GROUP:
                problems.add(f"{module}: NVFP4 needs a multiple of {GROUP} columns, got {shape[1]}")
        for leaf, (want, dtype, required) in companions(module, shape, algorithm, kv_cache).items():
            name = f"{module}.{leaf}"
            got = tensors.get(name)
            if got is None:
                if required:
                    problems.add(f"{name}: missing ({algorithm} layer)")
                continue
            used.add(name)
            if got.dtype != dtype:
                problems.add(f"{name}: {got.file} stores {got.dtype}, expected {dtype}")
            if got.shape != want and not (want == () and got.shape == (1,)):
                problems.add(f"{name}: {got.file} stores shape {got.shape}, expected {want}")
    return layers, used
