"""Turn text into packed batches of token ids.

The order of batches is a pure function of (seed, step). So resuming needs only the step number, and
the global batch of a step does not depend on the number of ranks.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS = 0, 1, 2  # the ids Nemotron configurations use
IGNORE = -100
# test/ and the fixtures of 2to3 contain deliberately broken encodings.
_SKIPPED_STDLIB = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


class DataError(ValueError):
    """The given text cannot be trained on; the message names the file and the reason."""


def tokenizers() -> ModuleType:
    """The package, imported on first use: the commands that read no text do without it.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError("text needs tokenizers; pip install 'nemokernels[train]'") from None
    return tokenizers


def standard_library(limit_bytes: int = 6_000_000) -> list[Path]:
    """Python's own source files in a fixed order, up to ``limit_bytes``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_STDLIB.isdisjoint(path.relative_to(root).parts) and size < limit_bytes:
            files.append(path)
            size += path.stat().st_size
    return files


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The given files and all files below the given folders, sorted.

    Raises:
        DataError: a path does not exist, or there are no files.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    if not files:
        raise DataError(f"no files in {', '.join(map(str, paths))}")
    return files


def read_texts(files: Sequence[Path]) -> list[str]:
    """The files' texts; empty files are dropped.

    Raises:
        DataError: a file is not UTF-8 (the message gives the byte), or no text is left.
    """
    texts = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} "
                f"at offset {error.start})"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if text:
            texts.append(text)
    if not texts:
        raise DataError("the files hold no text")
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (any text round-trips) with ``<pad> <s> </s>`` as ids 0, 1, 2."""
    hf = tokenizers()
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents end to end, each followed by EOS; ``ends`` are their exclusive end positions."""

    tokens: torch.Tensor  # (n,) int64
    ends: torch.Tensor  # (documents,) int64

    @classmethod
    def from_texts(cls, tokenizer: Tokenizer, texts: Sequence[str]) -> Corpus:
        """Tokenise every text and append EOS to it."""
        rows = [torch.tensor([*e.ids, EOS]) for e in tokenizer.encode_batch_fast(list(texts))]
        lengths = torch.tensor([len(row) for row in rows])
        return cls(torch.cat(rows), lengths.cumsum(0))


class Batch(NamedTuple):
    """``tokens`` (1, n) holds sequences end to end; ``cu_seqlens`` (sequences + 1) bounds them.

    For a vision-language model, ``pixels`` (tiles, 3, S, S) are the normalised tiles of the images
    in the sequences, in order. If the model is sharded, either all ranks must have a tensor
    (possibly of zero tiles) or none.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    pixels: torch.Tensor | None = None


class Batches:
    """Windows of ``seq_len`` tokens, shuffled anew every epoch, ``windows`` of them per step.

    A window is split where a document ends inside it, so no sequence spans two documents.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, windows: int, seed: int):
        self.corpus, self.seq_len, self.windows, self.seed = corpus, seq_len, windows, seed
        self.count = len(corpus.tokens) // seq_len
        if self.count < windows:
            raise DataError(
                f"the text has {len(corpus.tokens)} tokens, fewer than one step needs "
                f"({windows} windows of {seq_len}); give more text or a smaller batch"
            )
        self._order: tuple[int, torch.Tensor] | None = None

    def at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of a step's global batch that ``rank`` of ``world`` works on."""
        per_epoch = self.count // self.windows
        epoch, position = divmod(step, per_epoch)
        first = position * self.windows
        mine = self._shuffled(epoch)[first : first + self.windows][rank::world].tolist()
        length, rows, bounds = self.seq_len, [], [0]
        for row, window in enumerate(mine):
            start = window * length
            rows.append(self.corpus.tokens[start : start + length])
            low, high = torch.searchsorted(
                self.corpus.ends, torch.tensor([start, start + length]), right=True
            )
            inner = self.corpus.ends[low:high] - start + row * length
            end = (row + 1) * length
            bounds += [b for b in inner.tolist() if b < end] + [end]
        return Batch(torch.cat(rows)[None], torch.tensor(bounds, dtype=torch.int32))

    def _shuffled(self, epoch: int) -> torch.Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, shuffled(self.count, self.seed, epoch))
        return self._order[1]


def shuffled(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The numbers below ``count`` in this epoch's order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))


def shift(batch: Batch, by: int, fill: int) -> torch.Tensor:
    """(n,): the token ``by`` positions ahead within the same sequence, ``fill`` past its end."""
    tokens, bounds = batch.tokens[0], batch.cu_seqlens.long()
    ends = torch.repeat_interleave(bounds[1:], bounds.diff())
    ahead = torch.arange(len(tokens), device=tokens.device) + by
    return torch.where(ahead < ends, tokens[ahead.clamp(max=len(tokens) - 1)], fill)
