"""Configuration of Nemotron Nano V2 VL: a language model, a C-RADIO vision encoder, a projector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemokernels.models.config import NemotronHConfig
from nemokernels.models.fields import (
    ConfigError,
    check_divides,
    check_fixed,
    check_object,
    check_type,
    show,
)

__all__ = ["NemotronVLConfig", "VisionConfig", "refuse_sound"]

MODEL_TYPE = "NemotronH_Nano_VL_V2"
PREFIX = "vision_model.radio_model.model.patch_generator."
SHUFFLE = 2  # rows and columns of patches that become one token
_FIXED = {"model_type": MODEL_TYPE, "downsample_ratio": 1 / SHUFFLE, "ps_version": "v2"}

# C-RADIO's config.json names a timm model instead of sizes. The family uses this one.
TIMM = {
    "vit_huge_patch16_224": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 16,
    }
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the C-RADIO encoder.

    ``num_prefix_tokens`` (class and register tokens together) and ``grid_size`` (side of the square
    position grid, in patches) are None until a checkpoint's tensors or the caller supplies them.
    ``extra`` keeps the fields of ``vision_config`` that are not interpreted here.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6
    num_prefix_tokens: int | None = None
    grid_size: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_types(self)
        check_divides(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> VisionConfig:
        """Read ``vision_config``; its sizes are fields or follow from ``args.model``."""
        check_object(data, "vision_config")
        left = {key: value for key, value in data.items() if value is not None}
        args = left.get("args", {})
        check_object(args, "vision_config.args")
        for name in ("min_num_patches", "max_num_patches"):
            if left.get(name) or args.get(name):
                raise ConfigError(
                    f"`{name}` asks for images of any resolution, which is not supported; tiles are"
                )
        if left.get("video_temporal_patch_size", 1) != 1:
            raise ConfigError(
                "`video_temporal_patch_size` is "
                f"{show(left['video_temporal_patch_size'])}; only 1 is supported"
            )
        model = args.get("model")
        if model is not None and not (isinstance(model, str) and model in TIMM):
            raise ConfigError(
                f"`vision_config.args.model` is {show(model)}, expected one of {', '.join(TIMM)}"
            )
        sizes = dict(TIMM.get(model, {}))
        sizes |= {spec.name: left.pop(spec.name) for spec in _specs(cls) if spec.name in left}
        for spec in _specs(cls):
            if spec.default is dataclasses.MISSING and spec.name not in sizes:
                raise ConfigError(f"`vision_config.{spec.name}` is missing (or `args.model`)")
        return cls(**sizes, extra=left)

    def check_known(self) -> None:
        """Raise if a size that only a checkpoint or the caller can supply is missing."""
        for name in ("num_prefix_tokens", "grid_size"):
            if getattr(self, name) is None:
                raise ConfigError(
                    f"`vision_config.{name}` is not known; read it from a checkpoint or give it"
                )

    def to_dict(self) -> dict[str, object]:
        own = {spec.name: getattr(self, spec.name) for spec in _specs(self)}
        return {**self.extra, **{key: value for key, value in own.items() if value is not None}}


@dataclass(frozen=True)
class NemotronVLConfig:
    """The config.json of a vision-language model, under the names that the file uses.

    The normalisation constants, per channel of an image scaled to [0, 1], and the id of the image
    token are None if the file does not give them; nothing is assumed. ``extra`` keeps the fields
    that are not interpreted here.

    Raises:
        ConfigError: a field is missing, has the wrong type or value, or two fields disagree.
    """

    llm_config: NemotronHConfig
    vision_config: VisionConfig
    projector_hidden_size: int
    force_image_size: int = 512
    norm_mean: tuple[float, float, float] | None = None
    norm_std: tuple[float, float, float] | None = None
    img_context_token_id: int | None = None
    img_context_token: str = "<image>"
    img_start_token: str = "<img>"
    img_end_token: str = "</img>"
    video_context_token: str = "<video>"
    use_thumbnail: bool = True
    video_pruning_rate: float = 0.0
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("norm_mean", "norm_std"):
            object.__setattr__(self, name, _triple(name, getattr(self, name)))
        _check_types(self)
        if self.norm_std is not None and min(self.norm_std) <= 0:
            raise ConfigError(f"`norm_std` must be positive, got {show(self.norm_std)}")
        if (self.norm_mean is None) != (self.norm_std is None):
            raise ConfigError("`norm_mean` and `norm_std` must be given together")
        if self.force_image_size % (SHUFFLE * self.vision_config.patch_size):
            raise ConfigError(
                f"`force_image_size` is {self.force_image_size}, not a multiple of "
                f"{SHUFFLE} patches of {self.vision_config.patch_size}"
            )
        if self.img_context_token_id is not None:
            check_token(self.img_context_token_id, self.vocab_size)
        if not 0 <= self.video_pruning_rate < 1:
            raise ConfigError(
                f"`video_pruning_rate` must be in [0, 1), got {show(self.video_pruning_rate)}"
            )
        markers = [self.img_context_token, self.video_context_token]
        if len({*markers, ""}) < 3:
            raise ConfigError(
                f"`img_context_token` and `video_context_token` must differ and not "
                f"be empty, got {show(markers)}"
            )
        if self.mtp_pattern:
            raise ConfigError(
                "`num_nextn_predict_layers`: multi-token prediction after images is not supported"
            )

    model_type = MODEL_TYPE

    # The trainer, the generator and the loader ask any configuration for these.
    @property
    def vocab_size(self) -> int:
        return self.llm_config.vocab_size

    @property
    def mtp_pattern(self) -> str:
        return self.llm_config.mtp_pattern

    @property
    def n_routed_experts(self) -> int | None:
        return self.llm_config.n_routed_experts

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> NemotronVLConfig:
        """Read the fields of a config.json."""
        check_object(data)
        refuse_sound(data)
        left = dict(data)
        check_fixed(left, _FIXED)
        for name in ("llm_config", "vision_config", "projector_hidden_size"):
            if name not in left:
                raise ConfigError(f"`{name}` is missing")
        check_object(left["vision_config"], "vision_config")
        vision = {k: v for k, v in left.pop("vision_config").items() if v is not None}
        for name in ("patch_size", "num_prefix_tokens"):
            value = left.pop(name, None)
            if value is not None and vision.setdefault(name, value) != value:
                raise ConfigError(
                    f"`{name}` is {show(value)} but `vision_config.{name}` is {show(vision[name])}"
                )
        try:
            llm = NemotronHConfig.from_dict(left.pop("llm_config"))
        except ConfigError as error:
            raise ConfigError(f"`llm_config`: {error}") from None
        known = VisionConfig.from_dict(vision)
        if left.get("vit_hidden_size", known.hidden_size) != known.hidden_size:
            raise ConfigError(
                f"`vit_hidden_size` is {show(left['vit_hidden_size'])} but the "
                f"encoder's is {known.hidden_size}"
            )
        own = {spec.name: left.pop(spec.name) for spec in _specs(cls) if spec.name in left}
        return cls(llm, known, **own, extra=left)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that :meth:`from_dict` reads."""
        own = {spec.name: getattr(self, spec.name) for spec in _specs(self)}
        own |= {
            "llm_config": self.llm_config.to_dict(),
            "vision_config": self.vision_config.to_dict(),
        }
        own = {
            key: list(value) if isinstance(value, tuple) else value for key, value in own.items()
        }
        own = {key: value for key, value in own.items() if value is not None}
        v = self.vision_config  # other readers expect these at the top
        own |= {"patch_size": v.patch_size, "vit_hidden_size": v.hidden_size}
        return {"architectures": [MODEL_TYPE], **_FIXED, **self.extra, **own}

    def completed(
        self, shapes: Mapping[str, tuple[int, ...]], preprocessor: Mapping[str, object]
    ) -> NemotronVLConfig:
        """This configuration, completed from a checkpoint's other files.

        Args:
            shapes: shapes of the stored tensors, by name. The class tokens give
                ``num_prefix_tokens``, the position grid gives ``grid_size``.
            preprocessor: the content of preprocessor_config.json, for the normalisation constants
                (``norm_mean`` or ``image_mean``, and the same for std).

        Raises:
            ConfigError: a tensor is missing or is not a grid, or constants disagree.
        """
        tokens, grid = (_shape(shapes, PREFIX + leaf) for leaf in ("cls_token.token", "pos_embed"))
        side = math.isqrt(grid[-2])
        if side * side != grid[-2]:
            raise ConfigError(f"{PREFIX}pos_embed: {grid[-2]} positions are not a square grid")
        stored = {"num_prefix_tokens": tokens[-2], "grid_size": side}
        for (name, value), leaf in zip(stored.items(), ("cls_token.token", "pos_embed")):
            if getattr(self.vision_config, name) not in (None, value):
                raise ConfigError(
                    f"`vision_config.{name}` is {getattr(self.vision_config, name)}, but "
                    f"{PREFIX}{leaf} has the shape of {value}"
                )
        vision = dataclasses.replace(self.vision_config, **stored)
        constants = {}
        for name, other in (("norm_mean", "image_mean"), ("norm_std", "image_std")):
            found = _triple(name, preprocessor.get(name, preprocessor.get(other)))
            constants[name] = getattr(self, name) or found
            if found not in (None, constants[name]):
                raise ConfigError(
                    f"`{name}` is {show(constants[name])} in config.json but "
                    f"{show(found)} in preprocessor_config.json"
                )
        return dataclasses.replace(self, vision_config=vision, **constants)


def refuse_sound(data: Mapping[str, object]) -> None:
    """Raise if the model has a sound encoder, like Nemotron Omni."""
    for name in ("sound_config", "audio_config"):
        if data.get(name) is not None:
            raise ConfigError(f"`{name}`: not supported: sound encoder")


def check_token(token: object, vocab_size: int) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise ConfigError(
            f"`img_context_token_id` must be a token below {vocab_size}, got {show(token)}"
        )


def _specs(config) -> list[dataclasses.Field]:
    return [spec for spec in dataclasses.fields(config) if spec.name != "extra"]


def _check_types(config) -> None:
    for spec in _specs(config):
        kind = spec.type.removesuffix(" | None")
        if kind in ("int", "float", "bool", "str") and spec.name != "img_context_token_id":
            check_type(spec.name, getattr(config, spec.name), spec.type)


def _triple(name: str, value: object) -> tuple[float, float, float] | None:
    """Three finite numbers, or None."""
    if value is None:
        return None
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    good = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers]
    if good != [True] * 3 or not all(math.isfinite(v) for v in numbers):
        raise ConfigError(f"`{name}` must be three numbers, got {show(value)}")
    return tuple(float(v) for v in numbers)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) < 2:
        raise ConfigError(f"{name}: " + ("missing" if name not in shapes else f"has shape {shape}"))
    return shape
