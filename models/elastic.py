"""Cut nested models out of elastic ones, in memory or from one checkpoint folder into another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from nemokernels.models.build import build
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.checkpoint import QUANT_CONFIG, Opened, open_checkpoint
from nemokernels.models.files import (
    CONFIG,
    CheckpointError,
    Problems,
    Shards,
    StoredTensor,
    read_bytes,
    read_json,
)
from nemokernels.models.init import assign, zero_counters
from nemokernels.models.quantization import GROUP, is_scale
from nemokernels.models.saving import Output, config_bytes, json_bytes, write_folder
from nemokernels.models.slicing import Cut, Ranges, Slicing, length, take

__all__ = ["slice_checkpoint", "slice_model"]

# The tokenizer's files are copied: the vocabulary does not change.
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "generation_config.json", "chat_template.jinja")  # fmt: skip
_LAYER = re.compile(
    r"(?P<mtp>mtp\.)?\blayers\.(?P<number>[^.]+)(\.mixer\.experts\.(?P<expert>[^.]+))?"
)


def slice_model(model: CausalLM, widths: Mapping[str, object]) -> CausalLM:
    """The nested model of the given widths, with its part of the weights copied.

    Args:
        model: a ``nemotron_h`` model.
        widths: axis -> width, see :mod:`.slicing`, for example
            ``{"hidden_size": 2304, "mamba_num_heads": 56, "intermediate_size": {"1": 9216}}``.

    Raises:
        ConfigError: the model has no such part; the message names the axis.
        ValueError: the model keeps quantised layers; slice its checkpoint instead.
    """
    if getattr(getattr(model, "quantization", None), "kept", ()):
        raise ValueError("slice_model: the model keeps quantised layers; use `slice_checkpoint`")
    slicing = Slicing(model.config, widths)
    weight = model.lm_head.weight
    child = build(slicing.child, device="meta", dtype=weight.dtype)
    loaded, child.file_dtypes = getattr(model, "file_dtypes", {}), {}
    for name, value in model.state_dict().items():
        if (cut := slicing.cut(name)) is None:
            continue
        assign(child, cut.name, take(value, cut.kept).clone())
        if name in loaded:
            child.file_dtypes[cut.name] = loaded[name]
    zero_counters(child, weight.device)
    return child.train(model.training)


def slice_checkpoint(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    widths: Mapping[str, object],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> Slicing:
    """Write the nested model of the given widths as a checkpoint folder of its own.

    Every tensor keeps its dtype, and FP8 and NVFP4 layers keep the scales of the part that stays.
    Tensors are read one by one; at most one shard of the result is in memory. The tokenizer's files
    are copied. ``out`` appears only once it is complete.

    Args:
        folder: a ``nemotron_h`` checkpoint.
        out: a new or empty folder.
        widths: as in :func:`slice_model`.
        max_shard_bytes: a shard is closed before it would exceed this.

    Returns:
        The slicing: its configurations ``parent`` and ``child``, and the layers that stayed.

    Raises:
        ConfigError: the model has no such part; the message names the axis.
        CheckpointError: the checkpoint cannot be read or ``out`` written, the folder holds more
            than a language model, or a cut goes through a block of 16 columns of an NVFP4 layer.
    """
    folder = Path(folder)
    with open_checkpoint(folder) as opened:
        data = read_json(folder, CONFIG)
        if wrapper := {"llm_config", "text_config"} & data.keys():
            raise CheckpointError(
                f"{folder}: `{wrapper.pop()}` in {CONFIG}: only a plain language model is sliced"
            )
        slicing, problems = Slicing(opened.config, widths), Problems(folder)
        outputs = _outputs(slicing, opened, problems)
        files, declared = _copied(folder), {}
        if "quantization_config" in data:
            declared = {"quantization_config": _renamed(slicing, data["quantization_config"],
                                                        problems)}  # fmt: skip
        if os.path.lexists(folder / QUANT_CONFIG):
            renamed = _renamed(slicing, read_json(folder, QUANT_CONFIG), problems)
            files[QUANT_CONFIG] = json_bytes(renamed)
        problems.raise_if_any()
        files[CONFIG] = config_bytes(slicing.child, opened.plan.dtype, **declared)
        write_folder(out, outputs, files, max_shard_bytes)
    return slicing


def _outputs(slicing: Slicing, opened: Opened, problems: Problems) -> list[Output]:
    quantized = opened.plan.quantization.layers if opened.plan.quantization else {}
    outputs = []
    for name, tensor in opened.plan.tensors.items():
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight" if is_scale(name) else name
        if (cut := slicing.cut(weight)) is None:
            continue
        packed = quantized.get(module) not in (None, "FP8")
        if packed and not is_scale(name):
            _check_blocks(module, cut.kept[1], problems)
        kept = _stored(tensor, leaf, cut, packed)
        target = cut.name.removesuffix("weight") + leaf if is_scale(name) else cut.name
        shape = tuple(map(length, kept))
        read = partial(_read, opened.shards, tensor, kept)
        outputs.append(Output(target, shape, tensor.dtype, read))
    return outputs


def _stored(tensor: StoredTensor, leaf: str, cut: Cut, packed: bool) -> tuple[Ranges, ...]:
    """The ranges of a stored tensor that stay, for the weight of ``cut`` or a scale beside it."""
    blocks = packed and leaf == "weight_scale"
    if is_scale(f".{leaf}") and not blocks:
        return tuple(((0, size),) for size in tensor.shape)  # one for the whole layer
    if not packed:
        return cut.kept
    rows, columns = cut.kept
    places = GROUP if blocks else 2  # columns per stored byte
    return rows, tuple((start // places, stop // places) for start, stop in columns)


def _read(shards: Shards, tensor: StoredTensor, kept: tuple[Ranges, ...]) -> torch.Tensor:
    return take(shards.read(tensor), kept)


def _check_blocks(module: str, columns: Ranges, problems: Problems) -> None:
    for start, stop in columns:
        if start % GROUP or stop % GROUP:
            problems.add(
                f"{module}: columns {start} to {stop} are off the boundaries of NVFP4's blocks of "
                f"{GROUP}"
            )
            return


def _copied(folder: Path) -> dict[str, bytes]:
    return {name: read_bytes(folder, name) for name in COPIED if os.path.lexists(folder / name)}


def _renamed(slicing: Slicing, value: object, problems: Problems) -> object:
    """A declaration of quantisation with the nested model's layer names."""
    if isinstance(value, dict):
        pairs = ((_module(slicing, key, problems), inner) for key, inner in value.items())
        return {key: _renamed(slicing, inner, problems) for key, inner in pairs if key is not None}
    if isinstance(value, list):
        renamed = (
            _module(slicing, item, problems)
            if isinstance(item, str)
            else _renamed(slicing, item, problems)
            for item in value
        )
        return [item for item in renamed if item is not None]
    return value


def _module(slicing: Slicing, name: str, problems: Problems) -> str | None:
    """A layer's name, or a pattern of names, in the nested model; None if nothing of it stays."""
    match, trunk = _LAYER.search(name), len(slicing.parent.pattern)
    if match is None or match["number"] == "*":
        return name
    number, expert = match["number"], match["expert"]
    if not number.isdecimal():
        if not match["mtp"] and len(slicing.layers) < len(slicing.parent.layers):
            problems.add(f"{name}: a pattern of layer numbers, which change")
        return name
    old = int(number) + (trunk if match["mtp"] else 0)
    if old not in slicing.layers:
        return None
    new = slicing.layers.index(old)
    if expert and expert.isdecimal():
        if int(expert) >= (slicing.child.layers[new].n_routed_experts or 0):
            return None
    if match["mtp"]:
        return name
    return f"{name[: match.start('number')]}{new}{name[match.end('number') :]}"
