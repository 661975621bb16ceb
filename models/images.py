"""Turn pictures and clips into normalised tiles: reading with pillow, tiling, choice of frames.

pillow is imported on first use, so that text models do not need it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from nemokernels._checks import check
from nemokernels.models.vl_config import NemotronVLConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_FRAMES",
    "MAX_TILES",
    "Clip",
    "ImageError",
    "frame_indices",
    "frame_pixels",
    "load_clip",
    "load_image",
    "tile_grid",
    "tile_pixels",
]

MAX_TILES = 12  # beside the thumbnail
MAX_FRAMES = 128
FPS = 2.0  # frames per second that the model sees


class ImageError(ValueError):
    """A picture cannot be used; the message names the file and the reason."""


class Clip(NamedTuple):
    """The sampled frames of a video, and each one's time in seconds (None if not known)."""

    frames: list[Image]
    seconds: list[float] | None = None


def load_image(path: str | os.PathLike) -> Image:
    """Read a picture as 8-bit RGB, in the orientation in which it is stored.

    Grey, palette and CMYK pictures are converted. Pictures with 16 or 32 bits per sample are
    refused, as their range is not known, and so are transparent pixels, as their background is not.
    An alpha channel that is opaque everywhere is dropped.

    Raises:
        ImageError: pillow cannot read it, or it is damaged, too large or refused.
    """
    with _opened(path) as image:
        return _rgb(path, image)


def load_clip(path: str | os.PathLike, *, fps: float | None = None) -> Clip:
    """Read a video: a folder of frames, one picture each in order of names, or a GIF or APNG.

    Two frames per second are taken, at most 128; see :func:`frame_indices`.

    Args:
        path: the folder or file. A single frame is a video too.
        fps: frames per second of the source. None: taken from an animation's durations; if there
            are none, every frame is used, and the times are not known.

    Raises:
        ImageError: there are no frames, or they differ in size; also as :func:`load_image`.
    """
    check("load_clip", fps is None or 0 < fps < float("inf"), f"`fps` must be positive, got {fps}")
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).iterdir() if p.is_file() and p.name[0] != ".")
        if not files:
            raise ImageError(f"{path}: no frames in this folder")
        chosen = frame_indices(len(files), fps or FPS)
        frames = [load_image(files[index]) for index in chosen]
    else:
        frames, chosen, fps = _animation(path, fps)
    if len({frame.size for frame in frames}) > 1:
        raise ImageError(f"{path}: frames differ in size")
    # As in the published pipelines, a frame lasts a whole number of milliseconds.
    seconds = [index * int(1000 / fps) / 1000 for index in chosen] if fps else None
    return Clip(frames, seconds)


def frame_indices(frames: int, fps: float) -> list[int]:
    """Indices of the frames that the model sees: two per second, but at most 128, evenly spread.

    A slower source keeps every frame.
    """
    check("frame_indices", frames >= 1, f"`frames` must be at least 1, got {frames}")
    step = max(fps / FPS, frames / MAX_FRAMES, 1.0)
    indices = (int(k * step) for k in range(MAX_FRAMES))
    return [index for index in indices if index < frames]


def tile_grid(
    width: int, height: int, *, tile: int = 512, max_tiles: int = MAX_TILES
) -> tuple[int, int]:
    """Columns and rows of tiles for a picture: those whose ratio is nearest to its own.

    Of all grids of 1 to ``max_tiles`` tiles this is the one with the smallest |width / height -
    columns / rows|. Among equals it is the largest with less than twice the picture's pixels, or
    else the smallest.

    Source: the dynamic resolution of InternVL (Chen et al., 2024).
    """
    check(
        "tile_grid",
        1 <= max_tiles <= MAX_TILES,
        f"`max_tiles` must be from 1 to {MAX_TILES}, got {max_tiles}",
    )
    check("tile_grid", width > 0 and height > 0, f"the picture is {width} x {height} pixels")
    counts = range(1, max_tiles + 1)
    grids = [(i, j) for i in counts for j in counts if i * j <= max_tiles]
    best, distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        off = abs(width / height - columns / rows)
        covered = 2 * width * height > tile * tile * columns * rows
        if off < distance or (off == distance and covered):
            best, distance = (columns, rows), off
    return best


def tile_pixels(
    config: NemotronVLConfig, image: Image, *, max_tiles: int = MAX_TILES
) -> torch.Tensor:
    """The normalised tiles of a picture, (n, 3, S, S) float32: row by row, then the thumbnail.

    The picture is stretched to its :func:`tile_grid` by pillow's bicubic filter, in 8 bits, and cut
    into tiles. If there are several, a thumbnail of the whole follows, if the configuration asks
    for one.

    Raises:
        ImageError: the picture is not RGB, or has no pixels.
        ValueError: the configuration has no normalisation constants, or `max_tiles` is not 1 to 12.
    """
    side = config.force_image_size
    _check_rgb(image)
    columns, rows = tile_grid(*image.size, tile=side, max_tiles=max_tiles)
    whole = _resized(image, columns * side, rows * side)
    corners = [(x * side, y * side) for y in range(rows) for x in range(columns)]
    tiles = [whole.crop((x, y, x + side, y + side)) for x, y in corners]
    if len(tiles) > 1 and config.use_thumbnail:
        tiles.append(_resized(image, side, side))
    return _normalised(config, tiles)


def frame_pixels(config: NemotronVLConfig, frames: Sequence[Image]) -> torch.Tensor:
    """The normalised frames of a clip, (T, 3, S, S) float32: each is one tile, without thumbnail.

    Raises:
        ImageError, ValueError: as :func:`tile_pixels`; or there are not 1 to 128 frames.
    """
    check(
        "frame_pixels",
        1 <= len(frames) <= MAX_FRAMES,
        f"`frames` must be 1 to {MAX_FRAMES} pictures, got {len(frames)}",
    )
    for frame in frames:
        _check_rgb(frame)
    side = config.force_image_size
    return _normalised(config, [_resized(frame, side, side) for frame in frames])


def _normalised(config: NemotronVLConfig, tiles: list[Image]) -> torch.Tensor:
    if config.norm_mean is None:
        raise ValueError(
            "`norm_mean` and `norm_std` are not known: neither config.json nor "
            "preprocessor_config.json gives them"
        )
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
        for values in (config.norm_mean, config.norm_std)
    )
    return (pixels.float() / 255 - mean) / std


def _resized(image: Image, width: int, height: int) -> Image:
    return image.resize((width, height), _pillow().Resampling.BICUBIC)


def _check_rgb(image: Image) -> None:
    if image.mode != "RGB" or 0 in image.size:
        raise ImageError(
            f"expected an RGB picture with pixels, got {image.mode} of "
            f"{image.width} x {image.height}; see load_image"
        )


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise ImageError("pictures need pillow; pip install 'nemokernels[vision]'") from None
    return Image


def _opened(path: str | os.PathLike) -> Image:
    pillow = _pillow()
    try:
        return pillow.open(path)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ImageError(_reason(path, error)) from None


def _animation(
    path: str | os.PathLike, fps: float | None
) -> tuple[list[Image], list[int], float | None]:
    """The sampled frames of a file, their indices, and the frame rate of the source."""
    with _opened(path) as image:
        count = getattr(image, "n_frames", 1)
        if fps is None:
            durations = []
            for index in range(count):
                _seek(path, image, index)
                durations.append(image.info.get("duration", 0))
            fps = 1000 * count / sum(durations) if min(durations) > 0 else None
        chosen = frame_indices(count, fps or FPS)
        frames = []
        for index in chosen:
            _seek(path, image, index)
            frames.append(_rgb(path, image))
    return frames, chosen, fps


def _seek(path: str | os.PathLike, image: Image, index: int) -> None:
    try:
        image.seek(index)
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise ImageError(_reason(path, error)) from None


def _rgb(path: str | os.PathLike, image: Image) -> Image:
    """A copy of the picture, or of its current frame, in RGB."""
    if 0 in image.size:
        raise ImageError(f"{path}: has {image.width} x {image.height} pixels")
    # "RGB;16B" is 16 bits per channel; "BGR;16" is 16 bits per pixel, which pillow expands rightly.
    raw = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if image.mode[0] in "IF" or any(re.search(r"(?<!BGR);(16|32)", mode) for mode in raw):
        raise ImageError(f"{path}: holds samples of more than 8 bits; convert it to 8 bits first")
    try:
        image.load()
        if "transparency" in image.info or image.mode[-1] in "Aa":
            rgba = image.convert("RGBA")
            if rgba.getchannel("A").getextrema()[0] < 255:
                raise ImageError(f"{path}: has transparent pixels; put it on a background first")
            return rgba.convert("RGB")
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(_reason(path, error)) from None


def _reason(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: cannot be read ({error.strerror})"
    return f"{path}: not a usable picture ({str(error).splitlines()[0]:.200})"
