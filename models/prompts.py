"""A prompt of text, pictures and clips: its tokens, and the vectors for its image tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nemokernels._checks import check
from nemokernels.models.images import MAX_TILES, Clip, frame_pixels, tile_pixels
from nemokernels.models.nemotron_vl import NemotronVL, retained

__all__ = ["VisionPrompt", "vision_prompt"]


class VisionPrompt(NamedTuple):
    """``generate(model, [prompt.tokens], image_features=prompt.image_features, ...)``."""

    tokens: list[int]
    image_features: torch.Tensor | None  # (m, H), None without pictures


class Seen(NamedTuple):
    """One picture or clip: the text pieces it becomes, and its vectors.

    A label precedes each piece; ``counts`` gives each piece's number of image tokens.
    """

    labels: list[str]
    counts: list[int]
    features: torch.Tensor


@torch.no_grad()
def vision_prompt(
    model: NemotronVL,
    encode: Callable[[str], Sequence[int]],
    text: str,
    *,
    images: Sequence = (),
    videos: Sequence[Clip] = (),
    max_tiles: int = MAX_TILES,
    pruning_rate: float | None = None,
) -> VisionPrompt:
    """Place pictures and clips in a text and encode them.

    Every ``<image>`` in the text becomes ``<img>``, 256 image tokens per tile, ``</img>``. Every
    ``<video>`` becomes one line per frame, ``Frame 1 sampled at 0.00 seconds: <img>...</img>`` with
    the frame's tokens (``Frame 1: `` if the times are not known). If the text has no such marker,
    the pictures and then the clips come before it. The configuration defines how the markers are
    spelt.

    Args:
        model: encodes the pictures, on the device of its parameters.
        encode: turns text into token ids and adds none of its own. Text is encoded piece by piece
            between pictures, so that no token spans a picture's border.
        text: the prompt, in whatever chat format the model expects.
        images: RGB pictures (:func:`load_image`), in the order of their markers.
        videos: clips (:func:`load_clip`), likewise.
        max_tiles: largest number of tiles per picture, 1 to 12; see :func:`tile_pixels`.
        pruning_rate: share of a clip's tokens to drop (:func:`retained`); None: the
            configuration's.

    Raises:
        ImageError, ValueError: a picture or the configuration cannot be used, the number of markers
            differs from that of pictures or clips, or the model's image token is not known.
    """
    check(
        "vision_prompt",
        model.image_token_id is not None or not (images or videos),
        "`model.image_token_id` is not known: the checkpoint does not say it; set it",
    )
    config = model.config
    rate = config.video_pruning_rate if pruning_rate is None else pruning_rate
    image, video = config.img_context_token, config.video_context_token
    if image not in text and video not in text:
        text = image * len(images) + video * len(videos) + text
    for marker, given in ((image, images), (video, videos)):
        check(
            "vision_prompt",
            text.count(marker) == len(given),
            f"`text` has {text.count(marker)} {marker} for {len(given)} given",
        )
    rest = {image: iter(images), video: iter(videos)}
    tokens, pending, features = [], "", []
    for part in re.split(f"({re.escape(image)}|{re.escape(video)})", text):
        if part not in rest:
            pending += part
            continue
        thing = next(rest[part])
        seen = _clip(model, thing, rate) if part == video else _image(model, thing, max_tiles)
        features.append(seen.features)
        for label, count in zip(seen.labels, seen.counts):
            tokens += [
                *encode(pending + label + config.img_start_token),
                *[model.image_token_id] * count,
            ]
            pending = config.img_end_token
    tokens += encode(pending)
    return VisionPrompt(tokens, torch.cat(features) if features else None)


def _image(model: NemotronVL, image, max_tiles: int) -> Seen:
    features = _features(model, tile_pixels(model.config, image, max_tiles=max_tiles))
    return Seen([""], [features.shape[0] * features.shape[1]], features.flatten(0, 1))


def _clip(model: NemotronVL, clip: Clip, rate: float) -> Seen:
    features = _features(model, frame_pixels(model.config, clip.frames))
    kept = retained(features, rate)
    labels = []
    for index in range(len(features)):
        when = "" if clip.seconds is None else f" sampled at {clip.seconds[index]:.2f} seconds"
        labels.append("\n" * (index > 0) + f"Frame {index + 1}{when}: ")
    return Seen(labels, kept.sum(1).tolist(), features[kept])


def _features(model: NemotronVL, pixels: torch.Tensor) -> torch.Tensor:
    return model.image_features(pixels.to(model.lm_head.weight.device))
