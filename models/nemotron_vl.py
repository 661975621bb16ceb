"""Nemotron Nano V2 VL: a Nemotron-H language model that takes images as tokens.

The vision encoder, a pixel shuffle and a projector turn a tile into vectors of the language model's
width, which replace the embeddings of the image tokens. Shapes: n tiles or frames, N tokens of a
tile, H the language model's width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.compiler import is_compiling

from nemokernels import relu2
from nemokernels._checks import check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.linear import Linear
from nemokernels.models.nemotron_h import NemotronH
from nemokernels.models.norms import RMSNorm
from nemokernels.models.state import State
from nemokernels.models.vision import VisionModel
from nemokernels.models.vl_config import SHUFFLE, NemotronVLConfig

__all__ = ["NemotronVL", "pixel_shuffle", "retained"]

PROJECTOR_EPS = 1e-5


def pixel_shuffle(x: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns, W) -> (n, rows / 2, columns / 2, 4 W): each 2 x 2 square becomes a token.

    The vectors of a square are joined row by row. The image is not transposed; this is version v2
    of the published operation.
    """
    n, rows, columns, width = x.shape
    check(
        "pixel_shuffle",
        rows % SHUFFLE == 0 and columns % SHUFFLE == 0,
        f"`x` has {rows} x {columns} patches, expected multiples of {SHUFFLE}",
    )
    x = x.view(n, rows // SHUFFLE, SHUFFLE, columns // SHUFFLE, SHUFFLE, width)
    return x.transpose(2, 3).flatten(3)


def retained(features: torch.Tensor, rate: float) -> torch.Tensor:
    """Efficient video sampling: which tokens of a clip stay when a share ``rate`` is dropped.

    A token's score is 1 - cos(itself, the token at its place one frame earlier); tokens of the
    first frame score 255. The ``max(N, int(T N (1 - rate)))`` tokens with the highest scores stay,
    in their places; among equal scores the earlier ones.

    Args:
        features: (T, N, H) projected vectors of T frames.
        rate: in [0, 1). As published, the product is computed in floating point: 0.9 of 1000 tokens
            leaves 99.

    Returns:
        (T, N) bool.

    Source: Bagrov et al., "Efficient Video Sampling", 2025, as in vLLM (``multimodal/evs.py``);
    here the scores of 16-bit features are computed in float32 too.
    """
    check_tensor("retained", "features", features, shape=(None, None, None), dims="(T, N, H)")
    check("retained", 0 <= rate < 1, f"`rate` must be in [0, 1), got {rate}")
    frames, tokens = features.shape[:2]
    wide = features.to(acc_dtype(features))
    scores = wide.new_full((frames, tokens), 255.0)
    scores[1:] = 1 - nn.functional.cosine_similarity(wide[1:], wide[:-1], dim=-1)
    count = max(tokens, int(frames * tokens * (1 - rate)))
    order = scores.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(frames * tokens, dtype=torch.bool, device=features.device)
    kept[order[:count]] = True
    return kept.view(frames, tokens)


class ReLU2(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu2(x)


class NemotronVL(CausalLM):
    """A vision-language model.

    Args:
        config: its sizes.
        device, dtype: as :class:`NemotronH`.

    Attributes:
        image_token_id: the token whose embeddings images replace; the configuration's
            ``img_context_token_id``. Set it where that is None.
    """

    def __init__(
        self,
        config: NemotronVLConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.config, self.image_token_id = config, config.img_context_token_id
        self.language_model = NemotronH(config.llm_config, **kwargs)
        self.vision_model = VisionModel(config.vision_config, **kwargs)
        width = SHUFFLE**2 * config.vision_config.hidden_size
        self.mlp1 = nn.Sequential(
            RMSNorm(width, PROJECTOR_EPS, **kwargs),
            Linear(width, config.projector_hidden_size, **kwargs),
            ReLU2(),
            Linear(config.projector_hidden_size, config.llm_config.hidden_size, **kwargs),
        )
        self.mtp = None

    @property
    def trunk(self) -> nn.Module:
        return self.language_model.trunk

    @property
    def lm_head(self) -> nn.Module:
        return self.language_model.lm_head

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised tiles or frames (n, 3, S, S) -> (n, N, H); S is 512 and N 256 as published."""
        return self.mlp1(pixel_shuffle(self.vision_model(pixels)).flatten(1, 2))

    def hidden(
        self, tokens: torch.Tensor, *, image_features: torch.Tensor | None = None, **context
    ) -> torch.Tensor:
        """Hidden states of text and images, as :meth:`CausalLM.hidden`.

        Args:
            tokens: (B, T); image vectors take the places of tokens that equal ``image_token_id``.
            image_features: (n, N, H) or (m, H), one vector per such place, in order row by row
                (the number is not checked under ``torch.compile``). None: every token has its own
                embedding.
            context: as :meth:`CausalLM.hidden`.
        """
        if image_features is None:
            return self.language_model.hidden(tokens, **context)
        check(
            "NemotronVL",
            self.image_token_id is not None,
            "`image_token_id` is not known: the checkpoint does not say it; set it",
        )
        check_tensor(
            "NemotronVL",
            "image_features",
            image_features,
            shape=(*image_features.shape[:-1], self.config.llm_config.hidden_size),
            dims="(..., H)",
        )
        places = tokens == self.image_token_id
        vectors = image_features.flatten(0, -2)
        if not is_compiling():
            count = int(places.sum())
            check(
                "NemotronVL",
                len(vectors) == count,
                f"`image_features` are {len(vectors)} vectors for {count} image tokens",
            )
        embedded = self.trunk.embeddings(tokens)
        embedded = embedded.masked_scatter(places[..., None], vectors.to(embedded.dtype))
        return self.language_model.hidden(tokens, embedded=embedded, **context)

    def new_state(self, slots: int, max_length: int, **options) -> State:
        """As :meth:`CausalLM.new_state`; an image vector counts as one token."""
        return self.language_model.new_state(slots, max_length, **options)

    def fsdp_units(self) -> list[nn.Module]:
        """The layers of the language model and the blocks of the encoder."""
        return [*super().fsdp_units(), *self.vision_model.radio_model.model.blocks]

    def reset_parameters(self) -> None:
        """Initial values: the language model's own; the other matrices have the same deviation."""
        self.language_model.reset_parameters()
        std = self.config.llm_config.initializer_range
        self.vision_model.reset_parameters(std)
        with torch.no_grad():
            nn.init.ones_(self.mlp1[0].weight)
            for linear in (self.mlp1[1], self.mlp1[3]):
                nn.init.normal_(linear.weight, std=std)
