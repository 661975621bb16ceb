"""Save a model as a checkpoint folder in the Hugging Face layout, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemokernels.models import names
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.families import Config
from nemokernels.models.files import CONFIG, INDEX, SINGLE, CheckpointError


def save_pretrained(
    model: CausalLM, folder: str | os.PathLike, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write ``config.json`` and safetensors shards, which transformers can read too.

    A tensor that still has the dtype in which it was loaded is written in its file's dtype, so that
    loading and saving reproduces every byte. All others are written in the embeddings' dtype,
    correction biases in float32. A model that was loaded from a quantised checkpoint is written
    dequantised. Names begin as in the file it was loaded from: with ``backbone.``, ``model.`` or
    nothing. Everything is written to a folder beside ``folder``, flushed to the disk and then
    renamed, so that ``folder`` is complete once it exists.

    Args:
        model: any model of this package that is not on meta.
        folder: is created, with its parents; it may exist if it is empty.
        max_shard_bytes: largest size of a shard; a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
        ValueError: the model is on meta or keeps quantised layers, or max_shard_bytes is not
            positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"save_pretrained: `max_shard_bytes` must be > 0, got {max_shard_bytes}")
    if any(value.is_meta for value in model.state_dict().values()):
        raise ValueError("save_pretrained: the model is on meta and has no values to write")
    if getattr(getattr(model, "quantization", None), "kept", ()):
        raise ValueError(
            "save_pretrained: the model keeps quantised layers; load it without `keep_quantized`"
        )
    outputs = _outputs(model)
    config = config_bytes(model.config, outputs[0].dtype)
    write_folder(folder, outputs, {CONFIG: config}, max_shard_bytes)


class Output(NamedTuple):
    """One tensor to write. ``read`` returns its values in its shape; they are not kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: str | os.PathLike,
    outputs: Sequence[Output],
    files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:
    """Write ``files`` and the tensors' shards beside ``folder``, then rename the result.

    At most one shard is in memory.
    """
    folder = Path(os.path.abspath(folder))
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.incomplete"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: exists and is not an empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        files = {**files, **_write_shards(staging, outputs, max_shard_bytes)}
        for name, content in files.items():
            _write_file(staging / name, content)
        _sync(staging)
        os.rename(staging, folder)  # atomic; onto an empty folder too
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def json_bytes(data: Mapping[str, object]) -> bytes:
    """``data`` as a JSON file's content."""
    return (json.dumps(data, indent=2) + "\n").encode()


def config_bytes(config: Config, dtype: torch.dtype, **more: object) -> bytes:
    """The config.json of a checkpoint with weights of this dtype, plus the fields in ``more``."""
    data = config.to_dict()
    data.pop("torch_dtype", None)  # the old spelling of `dtype`
    return json_bytes({**data, "dtype": str(dtype).removeprefix("torch."), **more})


def _write_shards(
    folder: Path, outputs: Sequence[Output], max_shard_bytes: int
) -> dict[str, bytes]:
    """Write the safetensors files; return the index if there are several."""
    shards: list[list[Output]] = []
    room = 0
    for output in outputs:
        if not shards or output.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(output)
        room -= output.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        values = {o.name: o.read().detach().to("cpu", o.dtype).contiguous() for o in shard}
        save_file(values, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
        weight_map |= dict.fromkeys(values, file)
    if len(shards) <= 1:
        return {}
    total = sum(output.nbytes for output in outputs)
    return {INDEX: json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})}


def _outputs(model: CausalLM) -> list[Output]:
    state = model.state_dict()
    loaded = getattr(model, "file_dtypes", {})
    layout = names.layout(model.config)
    trunk = getattr(model, "file_trunk", layout.trunk)
    default = state[layout.trunk + layout.embeddings].dtype
    outputs = []
    for name, shape in names.tensor_shapes(model.config):
        target, index = names.stacked(name) or (name, None)
        value = state[target] if index is None else state[target][index]
        if tuple(value.shape) != shape:
            raise RuntimeError(f"{target}: the model holds {tuple(value.shape)}, expected {shape}")
        in_memory, in_file = loaded.get(target, (None, None))
        dtype = in_file if value.dtype == in_memory else names.published_dtype(name, default)
        if name.startswith(layout.trunk):
            name = trunk + name.removeprefix(layout.trunk)
        outputs.append(Output(name, shape, dtype, value.detach))
    kept = model.kept.items()
    return outputs + [Output(name, tuple(v.shape), v.dtype, v.detach) for name, v in kept]


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
