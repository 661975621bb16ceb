from collections import Counter

import pytest
import torch

from nemokernels.train import data
from nemokernels.train.data import EOS, Batch, Batches, Corpus, DataError, shift

TEXTS = [f"document {i}: " + "some words to learn " * (i % 5 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.from_texts(tokenizer, TEXTS)


def test_tokenizer_round_trips_any_text(tokenizer):
    for text in ("plain", "a\tb\r\n", "žluťoučký kůň", "日本語 🙂", "\x00\x1f", "   "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<s>", "</s>")] == [0, 1, 2]


def test_corpus_keeps_every_document(tokenizer, corpus):
    starts = [0, *corpus.ends[:-1].tolist()]
    for start, end, text in zip(starts, corpus.ends.tolist(), TEXTS):
        row = corpus.tokens[start:end].tolist()
        assert row[-1] == EOS and tokenizer.decode(row[:-1]) == text


def test_epoch_sees_every_window_once(corpus):
    batches = Batches(corpus, seq_len=16, windows=2, seed=7)
    seen = [
        row for step in range(batches.count // 2) for row in batches.at(step).tokens.view(2, 16)
    ]
    windows = corpus.tokens[: batches.count * 16].view(-1, 16)
    counts = Counter(tuple(row.tolist()) for row in seen)
    assert counts <= Counter(map(tuple, windows.tolist()))
    assert len(seen) == batches.count // 2 * 2


def test_order_changes_with_epoch_and_seed_only(corpus):
    batches = Batches(corpus, seq_len=16, windows=2, seed=7)
    per_epoch = batches.count // 2
    again = Batches(corpus, seq_len=16, windows=2, seed=7)
    other = Batches(corpus, seq_len=16, windows=2, seed=8)
    epoch = lambda b, e: torch.cat(  # noqa: E731
        [b.at(e * per_epoch + i).tokens for i in range(per_epoch)], 1
    )
    assert torch.equal(epoch(batches, 1), epoch(again, 1))
    assert not torch.equal(epoch(batches, 0), epoch(batches, 1))
    assert not torch.equal(epoch(batches, 0), epoch(other, 0))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(corpus, world):
    batches = Batches(corpus, seq_len=16, windows=4, seed=0)
    whole = batches.at(3).tokens.view(4, 16).tolist()
    parts = [
        row for r in range(world) for row in batches.at(3, r, world).tokens.view(-1, 16).tolist()
    ]
    assert sorted(parts) == sorted(whole)


def test_sequences_end_where_documents_end(corpus):
    batches = Batches(corpus, seq_len=16, windows=4, seed=0)
    for step in range(batches.count // 4):
        batch = batches.at(step)
        bounds = batch.cu_seqlens.tolist()
        assert (
            bounds[0] == 0 and bounds[-1] == 64 and all(a < b for a, b in zip(bounds, bounds[1:]))
        )
        assert set(range(0, 65, 16)) <= set(bounds)
        inner = batch.tokens[0, torch.tensor(bounds[1:]) - 1] == EOS
        cut = torch.tensor([b % 16 == 0 for b in bounds[1:]])
        assert (inner | cut).all()
        is_eos = (batch.tokens[0] == EOS).nonzero().flatten() + 1
        assert set(is_eos.tolist()) <= set(bounds)


def test_shift_never_crosses_a_sequence():
    batch = Batch(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([0, 3, 4, 5], dtype=torch.int32))
    assert shift(batch, 1, -100).tolist() == [6, 7, -100, -100, -100]
    assert shift(batch, 2, 0).tolist() == [7, 0, 0, 0, 0]


def test_standard_library_is_text_every_machine_has():
    files = data.standard_library(limit_bytes=300_000)
    assert len(files) > 5 and files == data.standard_library(limit_bytes=300_000)
    assert sum(map(len, data.read_texts(files))) > 250_000


def test_bad_text(tmp_path, corpus):
    bad = tmp_path / "latin1.txt"
    bad.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin1.txt: not UTF-8 text \(byte 0xe9 at offset 3\)"):
        data.read_texts([bad])
    with pytest.raises(DataError, match="absent: no such file or folder"):
        data.text_files([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files in"):
        data.text_files([tmp_path / "empty"])
    blank = tmp_path / "blank.txt"
    blank.write_text("")
    with pytest.raises(DataError, match="hold no text"):
        data.read_texts([blank])
    with pytest.raises(DataError, match="fewer than one step needs"):
        Batches(corpus, seq_len=100_000, windows=2, seed=0)
