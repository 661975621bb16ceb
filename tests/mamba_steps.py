"""Problems for mamba_step, shared by its tests on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class Problem:
    """The operator's arguments, by name and in order."""

    xBC: torch.Tensor
    dt: torch.Tensor
    z: torch.Tensor | None
    conv_state: torch.Tensor
    ssm_state: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor | None
    dt_bias: torch.Tensor | None
    lengths: torch.Tensor
    slots: torch.Tensor | None
    groups: int
    dt_min: float = 0.0
    dt_max: float = float("inf")
    seed: torch.Tensor | None = None
    rounds: int = 5

    def args(self):
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def keywords(self):
        """As the public function takes them."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept.update(ngroups=kept.pop("groups"), philox_rounds=kept.pop("rounds"))
        kept["dt_limit"] = (kept.pop("dt_min"), kept.pop("dt_max"))
        return kept

    def map(self, fn):
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Problem(*(fn(v) if isinstance(v, torch.Tensor) else v for v in values))

    def clone(self, double=False):
        return self.map(lambda t: t.double() if double and t.is_floating_point() else t.clone())


def problem(
    rows=4, tokens=1, H=4, P=6, N=10, G=2, width=4, spare=0, dtype=torch.float32,
    state_dtype=torch.float32, limits=(0.0, float("inf")), seed=None, without=(),
):  # fmt: skip
    """Rows at every phase of their rings: new, short, past a turn; the second is padding."""
    channels, slots = H * P + 2 * G * N, rows + 2
    lengths = torch.tensor([2, 7, 0, 13, 1, 5], dtype=torch.int32)[:rows]
    places = torch.tensor([5, -1, 0, 2, 1, 4], dtype=torch.int32)[:rows] if rows > 1 else None
    places = None if places is None else places.where(places < slots, 3)
    wide = torch.float32
    made = Problem(
        xBC=torch.randn(rows, tokens, channels).to(dtype),
        dt=torch.randn(rows, tokens, H).to(dtype),
        z=torch.randn(rows, tokens, H * P).to(dtype),
        conv_state=torch.randn(slots, channels, width - 1 + tokens + spare).to(dtype),
        ssm_state=torch.randn(slots, max(tokens, 1) + spare, H, P, N).to(state_dtype),
        conv_weight=torch.randn(channels, width).to(dtype),
        conv_bias=torch.randn(channels).to(dtype),
        A=-torch.rand(H, dtype=wide) * 4 - 0.1,
        D=torch.randn(H, dtype=wide),
        dt_bias=torch.randn(H, dtype=wide),
        lengths=lengths,
        slots=places,
        groups=G,
        dt_min=limits[0],
        dt_max=limits[1],
        seed=None if seed is None else torch.tensor([seed]),
    )
    for name in without:
        setattr(made, name, None)
    return made
