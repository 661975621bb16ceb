import pytest
import torch

from nemokernels import mtp_verify

NAN = float("nan")
LOGITS, DRAFTS = torch.zeros(2, 3, 5), torch.zeros(2, 2).long()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=[1.0]), TypeError, "`logits` must be a torch.Tensor"),
        (dict(logits=LOGITS.long()), TypeError, "`logits` is torch.int64"),
        (dict(logits=LOGITS[0]), ValueError, r"`logits` has shape \(3, 5\), expected \(B, K"),
        (dict(logits=LOGITS[..., :0]), ValueError, "`logits` needs at least one row"),
        (dict(drafts=DRAFTS[:, :1]), ValueError, r"`drafts` has shape \(2, 1\), expected \(B, K\)"),
        (dict(drafts=DRAFTS.float()), TypeError, "`drafts` is torch.float32"),
        (dict(drafts=DRAFTS.to("meta")), ValueError, "`drafts` is on meta"),
        (dict(draft_probs=LOGITS), ValueError, r"`draft_probs` has shape \(2, 3, 5\)"),
        (dict(draft_lengths=DRAFTS), ValueError, "`draft_lengths` has shape"),
        (dict(draft_lengths=2), TypeError, "`draft_lengths` must be a torch.Tensor, got int"),
        (dict(request_ids=LOGITS[:, 0, 0]), TypeError, "`request_ids` is torch.float32"),
        (dict(positions=DRAFTS[0, :1]), ValueError, r"`positions` has shape \(1,\)"),
        (dict(temperature=-1.0), ValueError, "`temperature` must be finite and not negative"),
        (dict(temperature=NAN), ValueError, "`temperature` must be finite"),
        (dict(temperature="hot"), TypeError, "`temperature` must be float or a torch.Tensor"),
        (dict(temperature=DRAFTS[0]), TypeError, "`temperature` is torch.int64"),
        (dict(top_k=-1), ValueError, "`top_k` must be at least 0, got -1"),
        (dict(top_k=2.0), TypeError, "`top_k` must be int or a torch.Tensor, got float"),
        (dict(top_p=0.0), ValueError, r"`top_p` must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), ValueError, "`top_p` must be in"),
        (dict(seed=2**64), ValueError, r"`seed` must be in \[0, 2\*\*64\)"),
        (dict(seed=1.0), TypeError, "`seed` must be int or a torch.Tensor"),
        (dict(seed=torch.tensor([1, 2, 3])), ValueError, "`seed` needs 1 or 2 elements, got 3"),
        (dict(seed=torch.tensor([1], dtype=torch.int32)), TypeError, "`seed` is torch.int32"),
    ],
)
def test_bad_input(change, error, message):
    args = {"logits": LOGITS, "drafts": DRAFTS, **change}
    with pytest.raises(error, match="mtp_verify: " + message):
        mtp_verify(args.pop("logits"), args.pop("drafts"), **args)


def test_probabilities_must_sum_to_one_where_they_are_used():
    probs = torch.full((2, 2, 5), 0.2)
    probs[1, 1] *= 1.5
    extra = dict(draft_probs=probs, temperature=torch.tensor([1.0, 0.5]))
    with pytest.raises(
        ValueError, match=r"`draft_probs.sum\(-1\)` is 1.5 at request 1, draft 1, expected 1"
    ):
        mtp_verify(LOGITS, DRAFTS, **extra)
    mtp_verify(LOGITS, DRAFTS, draft_lengths=torch.tensor([2, 1]), **extra)
    mtp_verify(LOGITS, DRAFTS, draft_probs=probs, temperature=torch.tensor([1.0, 0.0]))
    probs[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"`draft_probs.sum\(-1\)` is nan"):
        mtp_verify(LOGITS, DRAFTS, **extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(drafts=torch.tensor([[1, 2], [3, 7]])), "`drafts` is 7 at request 1, draft 1, .* 6"),
        (dict(drafts=torch.tensor([[-1, 2], [3, 4]])), "`drafts` is -1 at request 0, draft 0"),
        (dict(top_p=torch.tensor([0.5, 0.0])), "`top_p` is 0 at request 1, expected in"),
        (dict(top_p=torch.tensor([1.5, 1.0])), "`top_p` is 1.5 at request 0"),
        (dict(top_p=torch.tensor([1.0, float("nan")])), "`top_p` is nan at request 1"),
        (dict(top_k=torch.tensor([2, -1])), "`top_k` is -1 at request 1"),
        (dict(temperature=torch.tensor([-0.5, 1.0])), "`temperature` is -0.5 at request 0"),
        (dict(temperature=torch.tensor([0.5, float("inf")])), "`temperature` is inf at request 1"),
    ],
)
def test_values_of_tensors_on_the_host(change, message):
    good = dict(logits=torch.zeros(2, 3, 7), drafts=torch.ones(2, 2).long(), temperature=1.0)
    mtp_verify(**good)
    with pytest.raises(ValueError, match=message):
        mtp_verify(**{**good, **change})


def test_drafts_past_their_length_may_be_anything():
    lengths = torch.tensor([1, -1])
    logits = torch.randn(2, 3, 7)
    got, want = (
        mtp_verify(logits, torch.tensor(drafts), draft_lengths=lengths)
        for drafts in ([[1, 99], [-7, 99]], [[1, 0], [0, 0]])
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))
