"""Read the files of a checkpoint folder without trusting them.

Only the safetensors library parses tensor files. JSON has a size limit and must not repeat a key. A
shard must be a plain file directly in the folder.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_JSON_BYTES = 100_000_000  # the limit safetensors puts on its own headers
MAX_SHARDS = 1000
NAMED = 20  # problems listed in one message

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded or written; the message names file, tensor and reason."""


class Problems:
    """Collects everything that is wrong with a checkpoint, to report it together."""

    def __init__(self, folder: Path):
        self.folder, self.found = folder, []

    def add(self, text: str) -> None:
        self.found.append(text)

    def raise_if_any(self) -> None:
        if not self.found:
            return
        lines = [f"  {_short(text)}" for text in self.found[:NAMED]]
        if len(self.found) > NAMED:
            lines.append(f"  ... and {len(self.found) - NAMED} more")
        count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
        raise CheckpointError(f"{_short(str(self.folder))}: {count}\n" + "\n".join(lines))


class StoredTensor(NamedTuple):
    """A tensor as a shard's header describes it. ``dtype`` stays a string if torch has no such."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class Shards:
    """The open safetensors files of a folder. A context manager."""

    def __init__(self, folder: Path, problems: Problems):
        self._stack, self._open = ExitStack(), {}
        self.tensors: dict[str, StoredTensor] = {}
        self._folder, self._problems = folder, problems

    def __enter__(self) -> Shards:
        try:
            self._read_all()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def read(self, tensor: StoredTensor, box: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The data of one tensor, or of the part that ``box`` cuts out, on the CPU."""
        file = self._open[tensor.file]
        return file.get_slice(tensor.name)[box] if box else file.get_tensor(tensor.name)

    def _read_all(self) -> None:
        single, index = (os.path.lexists(self._folder / name) for name in (SINGLE, INDEX))
        if single and index:
            self._problems.add(f"{SINGLE} and {INDEX} are both present; which counts is unclear")
        elif single:
            self._read_shard(SINGLE, None)
        elif index:
            self._read_index()
        else:
            self._problems.add(f"neither {SINGLE} nor {INDEX} is present")

    def _read_index(self) -> None:
        weight_map = read_json(self._folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self._problems.add(f"{INDEX}: `weight_map` must be an object that names tensors")
            return
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                self._problems.add(f"{INDEX}: {name} maps to {_short(repr(file))}, expected a file")
            else:
                files.setdefault(file, set()).add(name)
        if len(files) > MAX_SHARDS:
            self._problems.add(f"{INDEX}: names {len(files)} files, more than {MAX_SHARDS}")
            return
        for file, names in files.items():
            self._read_shard(file, names)
        for path in sorted(self._folder.glob("model-*.safetensors")):
            if path.name not in files:
                self._problems.add(f"{path.name}: a shard that {INDEX} does not mention")

    def _read_shard(self, file: str, listed: set[str] | None) -> None:
        """Read a shard's headers; ``listed`` is what the index says it holds."""
        reason = unsafe(self._folder, file)
        if reason is not None:
            self._problems.add(f"{file!r}: {reason}")
            return
        try:
            shard = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            names = list(shard.keys())
            found = [
                StoredTensor(file, name, tuple(part.get_shape()), _dtype(part.get_dtype()))
                for name, part in ((name, shard.get_slice(name)) for name in names)
            ]
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            self._problems.add(f"{file}: not a safetensors file ({error})")
            return
        self._open[file] = shard
        for tensor in found:
            earlier = self.tensors.setdefault(tensor.name, tensor)
            if earlier is not tensor:
                self._problems.add(f"{tensor.name}: in both {earlier.file} and {file}")
        if listed is not None:
            for name in sorted(listed.difference(names)):
                self._problems.add(f"{name}: {INDEX} places it in {file}, which does not hold it")
            for name in sorted(set(names) - listed):
                self._problems.add(f"{name}: in {file}, but {INDEX} does not place it there")


def read_bytes(folder: Path, name: str) -> bytes:
    """The content of a small file of the folder; CheckpointError if it cannot be read."""
    reason = unsafe(folder, name)
    if reason is not None:
        raise CheckpointError(f"{folder / name}: {reason}")
    path = folder / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_short(str(error))})") from None


def read_json(folder: Path, name: str) -> dict:
    """The JSON object in ``folder/name``; CheckpointError for anything else."""
    path, content = folder / name, read_bytes(folder, name)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def unsafe(folder: Path, file: str) -> str | None:
    """Why ``folder/file`` must not be opened, or None.

    A symbolic link may only lead to a file inside the folder or, if the folder is a snapshot in the
    Hugging Face cache (``<repo>/snapshots/<revision>``), into that repository's ``blobs``.
    """
    if not file or "/" in file or "\\" in file or file in (".", ".."):
        return "not a plain file name; a checkpoint's files lie directly in its folder"
    try:
        root = folder.resolve()
        roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
        target = (folder / file).resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            return "a link that leads outside the checkpoint folder"
        mode = os.stat(folder / file).st_mode
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"cannot be opened ({reason})"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _dtype(name: str) -> torch.dtype | str:
    return DTYPES.get(name, name)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {repeated!r} repeats")
    return value


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else text[:300] + "..."
