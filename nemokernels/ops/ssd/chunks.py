"""Cutting a batch into chunks, and carrying states from chunk to chunk.

A chunk is L consecutive tokens of one sequence; the last one of a sequence is padded. Sequences
are the rows of a (B, T) batch or the pieces of a packed row. Either way there are K chunks in all,
those of a sequence adjacent, and everything within a chunk is computed for all K at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie. S sequences, K chunks of L tokens."""

    token: torch.Tensor  # (K, L) index into the B*T tokens; past a sequence's end its last token
    valid: torch.Tensor  # (K, L) whether a real token stands there
    first: torch.Tensor  # (S) number of the sequence's first chunk
    count: torch.Tensor  # (S) chunks of the sequence
    ids: torch.Tensor | None  # (K, L) seq_idx of every position; None: one id throughout
    before: torch.Tensor | None  # (K) seq_idx of the position before the chunk

    def gather(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(B, T, ...) to (K, L, ...) in ``dtype``, zero where there is no token."""
        rows = tensor.flatten(0, 1)[self.token].to(dtype)
        return rows.masked_fill_(~self.valid.view(*self.valid.shape, *[1] * (rows.dim() - 2)), 0)

    def scatter(self, chunked: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(K, L, ...) to the shape and dtype of ``like`` (B, T, ...), zero where no chunk lies."""
        out = like.new_zeros(like.shape)
        out.flatten(0, 1)[self.token[self.valid]] = chunked[self.valid].to(like.dtype)
        return out


def cut(
    batch: int,
    length: int,
    chunk_size: int,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
    where: str = "mamba_chunk_scan_combined",
) -> Chunks:
    """Cut B rows of T tokens, or with ``cu_seqlens`` the pieces of one row.

    Padding (negative ``seq_idx``) is not valid, and takes the id of the last token before it, so
    that states pass through it. Ids before a row's first token are 0. Messages begin with
    ``where``.
    """
    if cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=device) * length
    else:
        bounds = cu_seqlens.long()
        _check_bounds(where, bounds, length)
    count = (bounds.diff() + chunk_size - 1) // chunk_size
    first = count.cumsum(0) - count
    owner = torch.repeat_interleave(torch.arange(len(count), device=device), count)
    rank = torch.arange(len(owner), device=device) - first[owner]
    token = (bounds[owner] + rank * chunk_size)[:, None] + torch.arange(chunk_size, device=device)
    end = bounds[owner + 1][:, None]
    valid, token = token < end, torch.minimum(token, end - 1)
    ids = before = None
    if seq_idx is not None:
        valid = valid & (seq_idx.flatten()[token] >= 0)
        if cu_seqlens is None:
            ids = fill_forward(seq_idx).flatten()[token]
            before = torch.where(rank == 0, 0, ids[:, -1].roll(1))
    return Chunks(token, valid, first, count, ids, before)


def carry(
    start: torch.Tensor, decay: torch.Tensor, add: torch.Tensor, chunks: Chunks, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``s = decay * s + add`` over the chunks of every sequence, last chunk first if reverse.

    Args:
        start: (S, ..., P, N) value of s before the first step.
        decay: (K, ...).
        add: (K, ..., P, N).

    Returns:
        s as it met each chunk, like add, and s at the end, like start.
    """
    met, state = torch.empty_like(add), start.clone()
    ranks = range(int(chunks.count.max()) if len(chunks.count) else 0)
    for rank in reversed(ranks) if reverse else ranks:
        live = (chunks.count > rank).nonzero().squeeze(1)
        at = chunks.first[live] + rank
        met[at] = state[live]
        state[live] = decay[at][..., None, None] * state[live] + add[at]
    return met, state


def packed_places(
    cu_seqlens: torch.Tensor, length: int, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """For kernels: bounds (S+1), first chunk and chunk count of each sequence (S), most chunks.

    Taken without waiting for the device. Whatever the values of ``cu_seqlens``, the bounds stay
    inside the row.
    """
    bounds = cu_seqlens.clamp(0, length).cummax(0).values.int()
    count = (bounds.diff() + chunk_size - 1) // chunk_size
    first = (count.cumsum(0) - count).int()
    return bounds, first, count, (length + len(count) * (chunk_size - 1)) // chunk_size


def fill_forward(seq_idx: torch.Tensor) -> torch.Tensor:
    if seq_idx.numel() == 0:
        return seq_idx
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last = torch.where(seq_idx >= 0, position, -1).cummax(1).values
    return torch.where(last >= 0, seq_idx.gather(1, last.clamp_min(0)), 0)


def _check_bounds(where: str, bounds: torch.Tensor, length: int) -> None:
    values = bounds.tolist()
    if values[0] != 0 or values[-1] > length or values != sorted(values):
        raise ValueError(
            f"{where}: `cu_seqlens` is {values}, expected to start at 0, not to "
            f"decrease, and to end at {length} tokens at most"
        )
