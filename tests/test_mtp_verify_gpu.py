"""The Triton kernels of mtp_verify on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import mtp_verify, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("mtp_verify", "triton"):
        yield


def problem(batch, drafts, vocab, dtype=BF16, device="cpu"):
    logits = (2 * torch.randn(batch, drafts + 1, vocab, device=device)).to(dtype)
    probs = (logits[:, :-1].float() / 2).softmax(-1)
    picks = torch.multinomial(probs.view(-1, vocab), 1).view(batch, drafts)
    options = dict(seed=7, request_ids=torch.arange(batch, device=device) << 20,
                   positions=torch.full((batch,), (1 << 31) - 2, device=device))  # fmt: skip
    return logits, picks, probs, options


def compare(logits, drafts, **options):
    """Against the reference on the CPU; sums that round differently may move one draw in 1000."""
    want = mtp_verify(logits, drafts, **options)
    on = on_gpu.to("cuda", (logits, drafts, options))
    got = on_gpu.to("cpu", tuple(mtp_verify(*on[:2], **on[2])))
    same = (got[0] == want.accepted) & (got[1] == want.next_token)
    assert (~same).sum() <= len(same) // 1000
    torch.testing.assert_close(got[2][same], want.logprobs[same], rtol=1e-5, atol=1e-5,
                               equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [1, 37, 5000, 131072])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("sampled", [False, True])
def test_drafts(vocab, dtype, temperature, sampled):
    logits, drafts, probs, options = problem(16, 3, vocab, dtype)
    if not sampled:
        drafts, probs = logits[:, :3].argmax(-1), None
    lengths = torch.randint(-1, 4, (16,))
    compare(logits, drafts, draft_lengths=lengths, draft_probs=probs, temperature=temperature,
            **options)  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 37, 5000, 131072])
@pytest.mark.parametrize("cuts", [dict(top_k=20), dict(top_p=0.9), dict(top_k=50, top_p=0.8)])
def test_cuts(vocab, cuts):
    logits, drafts, probs, options = problem(16, 2, vocab)
    compare(logits, drafts, draft_probs=probs, temperature=0.8, **cuts, **options)


def test_rows_without_distribution():
    logits, drafts, _, options = problem(5, 1, 5000)
    logits[0, 0, 4999], logits[1, 1], logits[2, 0, 17] = torch.nan, -torch.inf, torch.inf
    for temperature in (0.0, 1.0):
        compare(logits, logits[:, :1].argmax(-1), temperature=temperature, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_no_bit(temperature):
    logits, drafts, probs, options = problem(64, 3, 131072, device="cuda")
    whole = mtp_verify(logits, drafts, draft_probs=probs, temperature=temperature, **options)
    for b in (0, 17, 63):
        row = slice(b, b + 1)
        mine = dict(options, request_ids=options["request_ids"][row],
                    positions=options["positions"][row], temperature=temperature)  # fmt: skip
        alone = mtp_verify(logits[row], drafts[row], draft_probs=probs[row], **mine)
        assert on_gpu.same_bits(alone, tuple(t[row] for t in whole))


def test_graph():
    logits, drafts, probs, options = problem(8, 3, 5000, device="cuda")
    options.update(
        temperature=torch.ones(8, device="cuda"), top_p=torch.full((8,), 0.9, device="cuda"),
        seed=torch.ones(1, device="cuda", dtype=torch.int64),
    )  # fmt: skip
    run = lambda: tuple(mtp_verify(logits, drafts, draft_probs=probs, **options))  # noqa: E731
    first = run()
    assert on_gpu.same_bits(first, on_gpu.replay(run))


def test_past_two_to_the_31_elements():
    rows = (1 << 31) // 131072 + 2
    logits = torch.zeros(rows, 1, 131072, device="cuda", dtype=BF16)
    logits[-1, 0, 131071] = 40
    none = torch.zeros(rows, 0, dtype=torch.int64, device="cuda")
    for temperature in (0.0, 1.0):
        assert mtp_verify(logits, none, temperature=temperature).next_token[-1] == 131071
