"""What all configurations share: reading a config.json and checking its fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MAX_SIZE = 1 << 24  # 100 times any released size; only a damaged file exceeds it
MAX_LAYERS = 4096


class ConfigError(ValueError):
    """config.json is not a usable configuration; the message names the field."""


def read_file(path: str | Path, parse: Callable[[object], T]) -> T:
    """Read a JSON file and return what ``parse`` makes of its content.

    Raises:
        ConfigError: the file cannot be read, or ``parse`` raised it; the message names the file.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    try:
        return parse(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_object(data: object, name: str = "") -> None:
    """Raise unless ``data``, the field of this name or the whole file, is a JSON object."""
    if not isinstance(data, Mapping):
        what = f"`{name}`" if name else "config"
        raise ConfigError(f"{what} must be a JSON object, got {type(data).__name__}")


def rename(data: dict[str, object], aliases: Mapping[str, str]) -> None:
    """Rename fields of ``data`` that have an old name; if both are there, they must agree."""
    for old, new in aliases.items():
        if old in data:
            value = data.pop(old)
            if data.setdefault(new, value) != value:
                raise ConfigError(f"`{old}` is {show(value)} but `{new}` is {show(data[new])}")


def check_fixed(data: Mapping[str, object], fixed: Mapping[str, object]) -> None:
    """Raise if a field is there with a value other than the supported one."""
    for name, want in fixed.items():
        if data.get(name, want) != want:
            raise ConfigError(f"`{name}` is {show(data[name])}; only {want!r} is supported")


def show(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # an integer of thousands of digits, endless nesting
        return f"a {type(value).__name__} too long to show"


def check_type(name: str, value: object, kind: str) -> None:
    if value is None and kind.endswith("| None"):
        return
    kind = kind.removesuffix(" | None")
    integer = isinstance(value, int) and not isinstance(value, bool)
    good = {
        "int": integer,
        "float": integer or isinstance(value, float),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }[kind]
    if not good:
        raise ConfigError(f"`{name}` must be of type {kind}, got {show(value)}")
    if kind == "int":
        low = 0 if name == "num_nextn_predict_layers" else 1
        if not low <= value <= MAX_SIZE:
            raise ConfigError(f"`{name}` must be from {low} to {MAX_SIZE}, got {show(value)}")
    if kind == "float" and not 0 <= value <= 1e6:  # also refuses NaN
        raise ConfigError(f"`{name}` must be from 0 to 1e6, got {show(value)}")


def check_divides(config, whole: str, part: str) -> None:
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise ConfigError(f"`{whole}` is {a}, not a multiple of `{part}` {b}")


def check_scan(config) -> None:
    """Raise ConfigError unless a Mamba layer's filter and steps are ones that the kernels take."""
    if not 2 <= config.conv_kernel <= 4:
        raise ConfigError(f"`conv_kernel` must be 2, 3 or 4, got {config.conv_kernel}")
    if not config.time_step_min <= config.time_step_max:
        raise ConfigError(
            f"`time_step_max` is {config.time_step_max}, below `time_step_min` "
            f"{config.time_step_min}"
        )
