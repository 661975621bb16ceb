"""RewardConfig: a language model's configuration whose head gives rewards instead of logits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nemokernels.models.fields import ConfigError, check_object, check_type, show
from nemokernels.models.vl_config import NemotronVLConfig

__all__ = ["ATTRIBUTES", "REWARD", "RewardConfig"]

REWARD = "reward_head"  # in config.json
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# Weights of the attributes in the scalar reward of Nemotron-4-340B-Reward. Its head has nine
# outputs, of which the first four are unused.
_FIVE = (0.3, 0.74, 0.46, 0.47, -0.33)
WEIGHTS = {1: (1.0,), 5: _FIVE, 9: (0.0,) * 4 + _FIVE}
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class RewardConfig:
    """A language model with a reward head; every other field is that of ``backbone``.

    Args:
        backbone: the language model's configuration; an MTP block is left out.
        head: name of the head's module in the checkpoint. Nemotron-4-340B-Reward's is not public.
        outputs: rewards per response: 1, or the attributes of HelpSteer2 (:data:`ATTRIBUTES`): 5,
            or 9 of which the last five count.
        bias: whether the head has a bias.
        weights: weights of the outputs in the scalar reward; None: the published ones, for 1, 5 or
            9 outputs.

    Raises:
        ConfigError: the backbone cannot have a reward head, or a field is not as it must be.
    """

    backbone: object
    head: str
    outputs: int = 1
    bias: bool = False
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.backbone, (RewardConfig, NemotronVLConfig)):
            raise ConfigError(f"a {type(self.backbone).__name__} cannot have a reward head")
        for name, kind in (("head", "str"), ("outputs", "int"), ("bias", "bool")):
            check_type(f"{REWARD}.{name}", getattr(self, name), kind)
        if not _NAME.fullmatch(self.head):
            raise ConfigError(f"`{REWARD}.head` is {show(self.head)}, expected a module's name")
        if self.backbone.mtp_pattern:
            plain = dataclasses.replace(
                self.backbone, num_nextn_predict_layers=0, mtp_hybrid_override_pattern="",
                mtp_block_configs=None,
            )  # fmt: skip
            object.__setattr__(self, "backbone", plain)
        weights = WEIGHTS.get(self.outputs) if self.weights is None else self.weights
        listed = isinstance(weights, (list, tuple)) and len(weights) == self.outputs
        if not listed or not all(isinstance(weight, (int, float)) for weight in weights):
            raise ConfigError(
                f"`{REWARD}.weights` must be {self.outputs} numbers, got {show(weights)}"
            )
        object.__setattr__(self, "weights", tuple(map(float, weights)))

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "backbone":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.backbone, name)

    @classmethod
    def from_dict(cls, backbone: object, data: object) -> RewardConfig:
        """Read the reward head that config.json describes, on ``backbone``."""
        check_object(data, REWARD)
        known = {spec.name for spec in dataclasses.fields(cls)} - {"backbone"}
        if unknown := sorted(map(str, set(data) - known)):
            raise ConfigError(f"`{REWARD}` holds {show(unknown)}, expected {', '.join(known)}")
        if "head" not in data:
            raise ConfigError(f"`{REWARD}.head` is missing")
        return cls(backbone, **data)

    @classmethod
    def of_tensors(
        cls, backbone: object, head: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> RewardConfig:
        """Find the head of this name among the shapes of a checkpoint's tensors."""
        shape = shapes.get(f"{head}.weight")
        if shape is None or len(shape) != 2:
            raise ConfigError(f"`{REWARD}`: the checkpoint has no matrix {show(head + '.weight')}")
        return cls(backbone, head, shape[0], f"{head}.bias" in shapes)

    def to_dict(self) -> dict[str, object]:
        """The fields of a config.json that :func:`~.families.parse_config` reads."""
        own = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        del own["backbone"]
        own["weights"] = list(self.weights)
        return {**self.backbone.to_dict(), "architectures": ["RewardModel"], REWARD: own}
