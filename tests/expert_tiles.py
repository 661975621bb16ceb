"""The table of tiles that products of experts take, made on the host. Not a test itself."""

import torch


def tiles_of(offsets, rows):
    """Expert and first row of each tile of ``rows`` rows, and one entry too many."""
    expert, row, start = [], [], 0
    for e, end in enumerate(offsets.tolist()):
        for first in range(start, end, rows):
            expert.append(e)
            row.append(first)
        start = end
    return [torch.tensor(t, dtype=torch.int32) for t in (expert + [-1], row + [start])]
