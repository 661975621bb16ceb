"""How much memory it takes to serve a model, computed from its configuration alone.

Weights count as a checkpoint stores them (this package's models dequantise quantised layers unless
they are loaded with ``keep_quantized``), caches as :class:`~nemokernels.models.State` lays them
out. Activations, workspaces and the CUDA context are not counted; a reserve leaves room for them.
Everything is in bytes.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from typing import NamedTuple

import torch

from nemokernels.models import names
from nemokernels.models.families import Config
from nemokernels.models.quantization import GROUP
from nemokernels.models.state import State
from nemokernels.models.variants import Precision, Variant

__all__ = ["PRECISIONS", "Memory", "gpus_needed", "memory", "precision_of"]

PRECISIONS = ("bf16", "fp8", "nvfp4")
_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2}
_SCALES = {"FP8": 2, "NVFP4": 2, "W4A16_NVFP4": 1}  # float32 scalars beside a layer
_UNQUANTISED = ("vision_model.*", "mlp1.*", "mtp.*", "*lm_head")


class Memory(NamedTuple):
    """Bytes of everything that stays in memory while a model is served.

    Attributes:
        weights: algorithm ("BF16" for what is not quantised) -> bytes, scales included.
        kv_token: key-value cache per token of a sequence.
        kv: key-value cache per sequence of the context's length.
        state: SSM states and convolution windows, per sequence; they do not grow.
        batch: sequences.
    """

    weights: dict[str, int]
    kv_token: int
    kv: int
    state: int
    batch: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.batch * (self.kv + self.state)


def precision_of(variant: Variant | None, name: str) -> Precision:
    """How a model in this precision is quantised: as released, or by assumption if not known.

    Raises:
        ValueError: no such precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"no precision {name!r}; there are {', '.join(PRECISIONS)}")
    if name == "bf16":
        return Precision((), "bf16")
    if variant is not None and name in variant.precisions:
        return variant.precisions[name]
    algorithm = name.upper()
    rules = (*((pattern, "BF16") for pattern in _UNQUANTISED), ("*", algorithm))
    return Precision(
        rules,
        "fp8",
        assumed=f"every linear layer but lm_head, routers, MTP block and encoders in {algorithm}, "
        "the key-value cache in FP8",
    )


def memory(config: Config, precision: Precision, *, context: int, batch: int) -> Memory:
    """Memory for ``batch`` sequences of ``context`` tokens, without drafts.

    Raises:
        ValueError: context or batch is below 1, or the context is longer than the learned
            positions.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    learned = getattr(config, "max_position_embeddings", None)
    if learned is not None and context > learned:
        raise ValueError(f"`context` is {context}, but {learned} positions were learned")
    caching = getattr(config, "llm_config", config)  # a vision encoder has no caches
    one, two, all_ = (State(caching, 1, tokens, device="meta") for tokens in (1, 2, context))
    kv = _BYTES[precision.kv]
    ssm = one.ssm.values()
    ssm_bytes = (
        {t.element_size() for t in ssm} if precision.ssm is None else {_BYTES[precision.ssm]}
    )
    return Memory(
        _weights(config, precision),
        kv * (_kv(two) - _kv(one)),
        kv * _kv(all_),
        max(ssm_bytes, default=0) * _elements(ssm) + 2 * _elements(one.conv.values()),
        batch,
    )


def gpus_needed(total: int, gpu: float, *, reserve: float = 0.1) -> int:
    """The smallest number of GPUs with ``gpu`` bytes each that hold ``total`` bytes, evenly split.

    ``reserve`` is the fraction of every GPU that stays free.

    Raises:
        ValueError: a GPU without memory, or a reserve that is not from 0 to below 1.
    """
    if not gpu > 0:
        raise ValueError(f"a GPU must have memory, got {gpu:g} bytes")
    if not 0 <= reserve < 1:
        raise ValueError(f"`reserve` must be from 0 to below 1, got {reserve}")
    return max(1, math.ceil(total / (gpu * (1 - reserve))))


def _weights(config: Config, precision: Precision) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, shape in names.tensor_shapes(config):
        algorithm = _algorithm(name, shape, precision)
        elements = math.prod(shape)
        if algorithm == "BF16":
            found[algorithm] += elements * names.published_dtype(name, torch.bfloat16).itemsize
        elif algorithm == "FP8":
            found[algorithm] += elements
        else:  # two values per byte, and one byte of scale per block
            found[algorithm] += elements // 2 + elements // GROUP
        found[algorithm] += 4 * _SCALES.get(algorithm, 0)
    return dict(found)


def _algorithm(name: str, shape: tuple[int, ...], precision: Precision) -> str:
    """The algorithm a tensor is stored in. Only linear layers are quantised, in whole blocks."""
    module, _, leaf = name.rpartition(".")
    linear = leaf == "weight" and len(shape) == 2 and not module.endswith(".gate")
    if not linear or "embed" in module:
        return "BF16"
    matches = (how for pattern, how in precision.rules if fnmatch.fnmatchcase(module, pattern))
    algorithm = next(matches, "BF16")
    return "BF16" if "NVFP4" in algorithm and shape[1] % GROUP else algorithm


def _kv(state: State) -> int:
    return _elements([*state.keys.values(), *state.values.values()])


def _elements(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)
