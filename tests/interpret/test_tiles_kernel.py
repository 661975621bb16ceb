"""Where tiles of rows begin if there is no table of them."""

import pytest
import torch
import triton
import triton.language as tl
from expert_kernels import NO_OFFSETS

from nemokernels.ops.moe_experts import kernel


@triton.jit
def places_kernel(
    offsets_ptr, expert_ptr, row_ptr, experts, BLOCK_M: tl.constexpr, LANES: tl.constexpr
):
    tile = tl.program_id(0)
    expert, row = kernel.tile_of(offsets_ptr, None, None, tile, experts, BLOCK_M, LANES)
    tl.store(expert_ptr + tile, expert)
    tl.store(row_ptr + tile, row)


def places(offsets, slots, height):
    """Expert and row of every program."""
    tiles = kernel.tiles_of(offsets, slots, height)
    assert tiles.expert is None and tiles.row is None and tiles.count == slots
    expert, row = torch.full((2, slots), -9, dtype=torch.int32)
    places_kernel[(slots,)](
        offsets, expert, row, offsets.shape[0], BLOCK_M=height, LANES=tiles.lanes
    )
    return expert.tolist(), row.tolist()


@pytest.mark.parametrize("experts", [1, 5, 32, 33, 130])
@pytest.mark.parametrize("height", [2, 16])
def test_places(experts, height):
    slots = min(experts, 37)
    for chosen in (torch.randint(experts, (slots,)), torch.full((slots,), experts - 1),
                   torch.zeros(slots), torch.arange(slots)):  # fmt: skip
        counts = torch.bincount(chosen.long(), minlength=experts)
        offsets = counts.cumsum(0).int()
        want = [-1] * slots
        for e, (end, count) in enumerate(zip(offsets.tolist(), counts.tolist())):
            for row in range(end - count, end, height):
                want[row] = e
        assert places(offsets, slots, height) == (want, list(range(slots)))


@pytest.mark.parametrize("offsets", NO_OFFSETS)
def test_no_offsets(offsets):
    expert, row = places(torch.tensor(offsets, dtype=torch.int32), 4, 2)
    assert all(-1 <= e < 4 for e in expert) and row == [0, 1, 2, 3]


@pytest.mark.parametrize("slots, always", [(13, False), (12, True)])
def test_more_rows_than_experts_have_a_table(slots, always):
    offsets = torch.tensor([slots] * 12, dtype=torch.int32)
    tiles = kernel.tiles_of(offsets, slots, 4, always=always)
    expert, row = kernel.tile_table(offsets, slots, 4)
    assert tiles.count == expert.shape[0] and tiles.lanes == 0
    assert torch.equal(tiles.expert, expert) and torch.equal(tiles.row, row)
