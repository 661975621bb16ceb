"""Which configuration belongs to a ``model_type``, and which model to a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemokernels.models import decoder_config, gpt_config
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.decoder_config import DecoderConfig
from nemokernels.models.fields import ConfigError, check_object, read_file, show
from nemokernels.models.gpt_config import GPTConfig
from nemokernels.models.hymba_config import HymbaConfig
from nemokernels.models.mamba2_config import Mamba2Config
from nemokernels.models.mamba_config import MambaConfig
from nemokernels.models.reward_config import REWARD, RewardConfig
from nemokernels.models.vl_config import MODEL_TYPE, NemotronVLConfig, refuse_sound

__all__ = ["CONFIGS", "Config", "parse_config", "read_config", "unwrapped"]

Config = (
    NemotronHConfig
    | DecoderConfig
    | GPTConfig
    | MambaConfig
    | HymbaConfig
    | NemotronVLConfig
    | RewardConfig
)
CONFIGS: dict[str, type[Config]] = {
    "nemotron_h": NemotronHConfig,
    "nemotron_h_puzzle": NemotronHConfig,
    "hymba": HymbaConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    **dict.fromkeys(decoder_config.FAMILIES, DecoderConfig),
    **dict.fromkeys(gpt_config.FAMILIES, GPTConfig),
    MODEL_TYPE: NemotronVLConfig,
}


def parse_config(data: Mapping[str, object]) -> Config:
    """Read the fields of a config.json; their ``model_type`` decides which configuration it is.

    Without a ``model_type``, ``nemotron_h`` is assumed.

    Raises:
        ConfigError: the ``model_type`` is unknown, or a field is not as it must be.
    """
    check_object(data)
    model_type = data.get("model_type", "nemotron_h")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise ConfigError(f"`model_type` is {show(model_type)}, expected one of "
                          f"{', '.join(CONFIGS)}")  # fmt: skip
    if REWARD not in data:
        return CONFIGS[model_type].from_dict(data)
    plain = {key: value for key, value in data.items() if key not in (REWARD, "architectures")}
    return RewardConfig.from_dict(parse_config(plain), data[REWARD])


def read_config(path: str | Path) -> Config:
    """Read a config.json file of any family, or of a wrapper whose language model is one.

    Raises:
        ConfigError: as :func:`parse_config`.
    """
    return read_file(path, lambda data: parse_config(unwrapped(data)))


def unwrapped(data: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's fields in a wrapper of unknown type; otherwise ``data`` itself."""
    check_object(data)
    refuse_sound(data)
    if data.get("model_type") == MODEL_TYPE:
        return data
    for nested in ("llm_config", "text_config"):
        data = data[nested] if isinstance(data.get(nested), dict) else data
    return data
