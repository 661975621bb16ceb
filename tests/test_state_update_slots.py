"""selective_state_update: slots, packed tokens, rollback and stochastic rounding."""

import itertools

import pytest
import torch

from nemokernels import selective_state_update
from nemokernels.ops.state_update import ref

F16, BF16 = torch.float16, torch.bfloat16
H, P, N, G = 3, 5, 11, 1


def inputs(tokens, dtype=torch.float32):
    x, z = torch.randn(2, tokens, H, P).to(dtype)
    B, C = torch.randn(2, tokens, G, N).to(dtype)
    D, dt_bias = torch.randn(2, H, 1)
    return dict(x=x, dt=torch.randn(tokens, H, 1).to(dtype), A=-torch.rand(H, 1, 1) - 0.1, B=B, C=C,
                D=D, z=z, dt_bias=dt_bias, dt_softplus=True)  # fmt: skip


def take(args, tokens):
    return {k: v[tokens] if k in ("x", "dt", "B", "C", "z") else v for k, v in args.items()}


def cu(*lengths):
    return torch.tensor((0, *lengths)).cumsum(0).int()


def states(slots, dtype=torch.float32):
    return torch.randn(slots, H, P, N).to(dtype)


def untouched(state, before, but=()):
    rest = [i for i in range(len(state)) if i not in but]
    return torch.equal(state[rest], before[rest])


def one_by_one(state, args, tokens, slot):
    """Single-token calls on one slot; y of each, and a copy of the state after each."""
    outs, after = [], []
    for t in tokens:
        index = torch.tensor([slot])
        outs.append(selective_state_update(state, **take(args, [t]), state_batch_indices=index))
        after.append(state[slot].clone())
    return torch.cat(outs), torch.stack(after)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_single_tokens_bit_for_bit(index):
    lengths, args = (3, 1, 0, 4), inputs(8)
    state = states(6)
    single, before = state.clone(), state.clone()
    slots = torch.tensor([4, 0, 2, 5], dtype=index)
    y = selective_state_update(state, **args, state_batch_indices=slots, cu_seqlens=cu(*lengths))
    first = 0
    for slot, length in zip(slots.tolist(), lengths):
        tokens = range(first, first + length)
        if length:
            assert torch.equal(y[first : first + length], one_by_one(single, args, tokens, slot)[0])
        first += length
    assert torch.equal(state, single) and untouched(state, before, (4, 0, 5))


def test_a_row_does_not_depend_on_its_batch():
    args, state = inputs(64), states(64)
    alone, order = state.clone(), torch.randperm(64)
    permuted = state.clone()
    y = selective_state_update(state, **args)
    shuffled = selective_state_update(permuted, **take(args, order), state_batch_indices=order)
    assert torch.equal(shuffled, y[order]) and torch.equal(permuted, state)
    for b in (0, 17, 63):
        index = torch.tensor([b])
        got = selective_state_update(alone, **take(args, [b]), state_batch_indices=index)
        assert torch.equal(got[0], y[b]) and torch.equal(alone[b], state[b])


def test_every_token_gets_its_slot():
    args, state = inputs(3), states(5)
    single = state.clone()
    outs, after = one_by_one(single, args, range(3), 2)
    slots = torch.tensor([[2, 4, 0]])
    y = selective_state_update(state, **args, state_batch_indices=slots, cu_seqlens=cu(3))
    assert torch.equal(y, outs) and torch.equal(state[[2, 4, 0]], after)
    assert torch.equal(state[[1, 3]], single[[1, 3]])


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, F16])
def test_rejected_drafts_leave_no_trace(accepted, dtype):
    """Base token and three drafts; then a step from the last accepted one."""
    args, follow = inputs(4), inputs(2)
    follow.update({k: args[k] for k in ("A", "D", "dt_bias")})
    drafted, plain = states(5, dtype), None
    plain = drafted.clone()
    slots, packed = torch.tensor([[3, 0, 4, 1]]), dict(cu_seqlens=cu(4))
    selective_state_update(drafted, **args, state_batch_indices=slots, **packed,
                           num_accepted_tokens=torch.tensor([1]))  # fmt: skip
    y = selective_state_update(drafted, **follow, state_batch_indices=slots, cu_seqlens=cu(2),
                               num_accepted_tokens=torch.tensor([accepted]))  # fmt: skip
    only = take(args, slice(0, accepted))
    slot = torch.tensor([3])
    selective_state_update(plain, **only, state_batch_indices=slot, cu_seqlens=cu(accepted))
    never = selective_state_update(plain, **follow, state_batch_indices=slot, cu_seqlens=cu(2))
    assert torch.equal(y, never) and torch.equal(drafted[0], plain[3])


def test_start_slot_counts_accepted_tokens():
    """Nothing accepted counts as one; more than there are columns is an error."""
    args, slots = inputs(1), torch.tensor([[1, 2, 0]])
    state = states(3)
    for accepted, slot in ((0, 1), (-3, 1), (1, 1), (2, 2), (3, 0)):
        got, want = state.clone(), state.clone()
        y = selective_state_update(got, **args, state_batch_indices=slots,
                                   num_accepted_tokens=torch.tensor([accepted]))  # fmt: skip
        same = selective_state_update(want, **args, state_batch_indices=torch.tensor([slot]))
        assert torch.equal(y, same) and torch.equal(got[1], want[slot])
        assert untouched(got, state, (1,))
    got = state.clone()
    y = selective_state_update(got, **take(args, [0, 0]),
                               state_batch_indices=torch.tensor([[1, 2, 0], [-1, -1, -1]]),
                               num_accepted_tokens=torch.tensor([3, 1 << 20]))  # fmt: skip
    assert torch.equal(y[1], torch.zeros(H, P)) and untouched(got, state, (1,))
    with pytest.raises(ValueError, match="`num_accepted_tokens` holds 4, expected at most 3"):
        selective_state_update(state, **args, state_batch_indices=slots,
                               num_accepted_tokens=torch.tensor([4]))  # fmt: skip


def test_pad_rows_give_zero_and_touch_nothing():
    args, state = inputs(3), states(4)
    args["x"][1] = torch.nan
    before, only = state.clone(), state.clone()
    slots = torch.tensor([3, -1, 0])
    y = selective_state_update(state, **args, state_batch_indices=slots)
    want = selective_state_update(only, **take(args, [0, 2]), state_batch_indices=slots[[0, 2]])
    assert torch.equal(y[[0, 2]], want) and torch.equal(y[1], torch.zeros(H, P))
    assert torch.equal(state, only) and untouched(state, before, (0, 3))


def test_slots_past_the_last_token_are_not_used():
    args, state = inputs(3), states(5)
    before = state.clone()
    slots = torch.tensor([[0, 3, 2], [3, 2, 77]])
    selective_state_update(state, **args, state_batch_indices=slots, cu_seqlens=cu(1, 2))
    assert untouched(state, before, (0, 3, 2)) and not untouched(state, before, (0, 3))


def test_pads_in_packed_calls():
    """A padding sequence, a token that is not kept, and tokens past the end."""
    args, state = inputs(8), states(5)
    before, single = state.clone(), state.clone()
    args["x"][6:] = torch.nan
    slots = torch.tensor([[-1, 0, 4], [2, -1, 1]])
    y = selective_state_update(state, **args, state_batch_indices=slots, cu_seqlens=cu(3, 3),
                               num_accepted_tokens=torch.tensor([1, 1]))  # fmt: skip
    outs, after = one_by_one(single, args, range(3, 6), 2)
    zero = torch.zeros_like(y)
    assert torch.equal(y[:3], zero[:3]) and torch.equal(y[6:], zero[6:])
    assert torch.equal(y[3:6], outs) and torch.equal(state[[2, 1]], after[[0, 2]])
    assert untouched(state, before, (2, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_destination_slots(packed):
    args, state = inputs(2), states(6)
    before, inplace = state.clone(), state.clone()
    source, target = torch.tensor([1, 4]), torch.tensor([3, -1])
    extra = dict(cu_seqlens=cu(1, 1)) if packed else {}
    y = selective_state_update(state, **args, state_batch_indices=source, **extra,
                               dst_state_batch_indices=target)  # fmt: skip
    want = selective_state_update(inplace, **args, state_batch_indices=source)
    assert torch.equal(y, want) and torch.equal(state[3], inplace[1])
    assert untouched(state, before, (3,))


def test_two_sequences_start_from_one_shared_slot():
    args, state = inputs(4), states(6)
    single = [state.clone(), state.clone()]
    y = selective_state_update(state, **args, state_batch_indices=torch.tensor([5, 5]),
                               dst_state_batch_indices=torch.tensor([[0, 1], [2, 3]]),
                               cu_seqlens=cu(2, 2))  # fmt: skip
    for b in range(2):
        outs, after = one_by_one(single[b], args, range(2 * b, 2 * b + 2), 5)
        assert torch.equal(y[2 * b : 2 * b + 2], outs)
        assert torch.equal(state[2 * b : 2 * b + 2], after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(state_batch_indices=[2, 2]), "slot 2 is written twice, by sequences 0 and 1"),
        (dict(state_batch_indices=[[0, 1], [2, 1]]), "slot 1 is written twice, by sequences 0 and"),
        (dict(state_batch_indices=[[0, 0], [2, 1]]), "slot 0 is written twice, by sequences 0 and"),
        (dict(state_batch_indices=[0, 6]), "sequence 1 is slot 6, expected below 6"),
        (dict(state_batch_indices=[6, 0], dst_state_batch_indices=[1, 2]),
         "`state_batch_indices` starts sequence 0 from slot 6, expected below 6"),
        (dict(state_batch_indices=[0, 1], dst_state_batch_indices=[1, 2]),
         "starts sequence 1 from slot 1, which sequence 0 writes"),
        (dict(cu_seqlens=[0, 3, 2]), "`cu_seqlens` must ascend"),
        (dict(cu_seqlens=[-1, 2, 4]), "`cu_seqlens` must ascend"),
        (dict(cu_seqlens=[0, 2, 5]), "`cu_seqlens` must ascend from 0 or more to at most 4 tokens"),
        (dict(state_batch_indices=[[0], [1]]), "`cu_seqlens` holds a sequence of 2 tokens"),
    ],
)  # fmt: skip
def test_bad_index_values_are_found_before_anything_is_written(change, message):
    state = states(6)
    before = state.clone()
    given = {"state_batch_indices": [0, 1], "cu_seqlens": [0, 2, 4], **change}
    given = {k: torch.tensor(v, dtype=torch.int32) for k, v in given.items()}
    with pytest.raises(ValueError, match="selective_state_update: .*" + message):
        selective_state_update(state, **inputs(4), **given)
    assert torch.equal(state, before)


def noise_by_definition(seed, counter, rounds):
    """Philox-4x32 in Python integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def rounded_by_definition(value, noise, dtype):
    """Floor of |value| / spacing + noise / 2**bits in exact integers, times the spacing."""
    if value != value or abs(value) == float("inf"):
        return value
    digits, bits = (11, 13) if dtype == F16 else (8, 16)
    sign = -1.0 if str(value).startswith("-") else 1.0
    kept = 0.0
    if value != 0:
        exponent = torch.tensor(abs(value), dtype=torch.float64).frexp()[1].item()
        spacing = 2.0 ** (max(exponent, -125) - digits)
        kept = float(int(abs(value) / spacing * 2**bits + noise) >> bits) * spacing
    if dtype == F16:
        kept = 0.0 if kept < 2.0**-14 else float("inf") if kept >= 65536 else kept
    return sign * (float("inf") if kept >= 2.0**128 else kept)


VALUES = [1.0, -1.0, 1.0 + 2**-23, 1.0 + 2**-10 - 2**-23, 1.5 + 2**-11, -3.14159, 0.1, 65504.0,
          65519.0, 65535.99, -65530.0, 65536.0, 1e30, 2.0**-14, 2.0**-14 - 2**-37, 2.0**-15, 6e-8,
          1e-40, 0.0, -0.0, -(2.0**-14) + 2**-38]  # fmt: skip


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("value", VALUES)
def test_stochastic_rounding_over_all_noise(value, dtype):
    x = torch.tensor(value, dtype=torch.float32)
    noise = torch.arange(8192 if dtype == F16 else 65536)
    got = ref.round_stochastically(x.expand(noise.numel()).contiguous(), noise, dtype)
    few = range(0, noise.numel(), 7 if dtype == F16 else 61)
    want = torch.tensor([rounded_by_definition(x.item(), n, dtype) for n in few]).to(dtype)
    assert torch.equal(got[:: few.step].view(torch.int16), want.view(torch.int16))
    if dtype == BF16 or 2.0**-14 <= abs(x.item()) < 65504:
        # All noise values together give the value back: no bias at all.
        assert got.double().mean().item() == x.item()
    again = ref.round_stochastically(x[None], torch.tensor([-1 << noise.numel().bit_length() - 1]),
                                     dtype)  # fmt: skip
    assert torch.equal(again, got[:1]), "bits above those it needs count"


def test_non_finite_values_survive_every_noise():
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf, 3.402e38]), payloads.view(torch.float32)])
    for noise, dtype in itertools.product((0, 1, 8191, 65535), (F16, BF16)):
        got = ref.round_stochastically(x, torch.full((8,), noise), dtype)
        assert got[:2].tolist() == [torch.inf, -torch.inf] and got[3:].isnan().all()
        # The largest float32s are far beyond float16, and within a step of bfloat16's largest.
        down = dtype == BF16 and noise < 8191
        assert got[2] == (torch.finfo(BF16).max if down else torch.inf)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("seed", [0, 7, 1 << 40, (1 << 64) - 3])
def test_noise_is_philox_of_the_element_offset(seed, dtype):
    state, args = states(4, dtype), inputs(2)
    exact, slots = state.float(), torch.tensor([3, 1])
    selective_state_update(exact, **args, state_batch_indices=slots)
    selective_state_update(state, **args, state_batch_indices=slots, seed=seed, philox_rounds=7)
    for slot in slots.tolist():
        for h, p in ((0, 0), (1, 3), (H - 1, P - 1)):
            for n in range(N):
                words = noise_by_definition(seed, ((slot * H + h) * P + p) * N + 8 * (n // 8), 7)
                noise = words[n % 8 // 2] >> (16 * (n % 2))
                noise &= 0x1FFF if dtype == F16 else 0xFFFF
                want = rounded_by_definition(exact[slot, h, p, n].item(), noise, dtype)
                assert state[slot, h, p, n].item() == want


def test_offsets_past_32_bits_reach_the_counter():
    slots = torch.tensor([0, 1 << 28])
    bits = ref.rounding_bits((4, 4, 32), slots, torch.tensor([5]), 5)
    words = noise_by_definition(5, 1 << 37, 5)
    want = [w >> shift & 0xFFFF for w in words for shift in (0, 16)]
    assert bits[1, 0, 0, :8].tolist() == want


def test_noise_depends_on_seed_and_slot_alone():
    args, start = inputs(4), states(8, F16)
    slots, seed = torch.tensor([6, 0, 3, 5]), torch.tensor([11])

    def run(order, seed=seed, **options):
        state = start.clone()
        for part in order:
            selective_state_update(state, **take(args, part), state_batch_indices=slots[part],
                                   seed=seed, **options)  # fmt: skip
        return state

    want = run([[0, 1, 2, 3]])
    for order in ([[3, 1, 0, 2]], [[2], [0, 3], [1]]):
        assert torch.equal(run(order), want)
    assert torch.equal(run([[0, 1, 2, 3]], 11), want)
    assert torch.equal(run([[0, 1, 2, 3]], (1 << 64) - 1), run([[0, 1, 2, 3]], -1))
    assert not torch.equal(run([[0, 1, 2, 3]], 12), want)
    assert not torch.equal(run([[0, 1, 2, 3]], philox_rounds=10), want)
    assert not torch.equal(run([[0, 1, 2, 3]], None), want)
    padded = start.new_zeros(8, H, P, 2 * N)[..., ::2].copy_(start)
    selective_state_update(padded, **args, state_batch_indices=slots, seed=seed)
    assert torch.equal(padded, want)


def test_rounding_noise_of_a_step_is_unbiased():
    """Each value goes up with its own probability p; the total has variance sum p (1 - p)."""
    rows = 40
    args, state = inputs(rows), states(rows, F16)
    exact = state.float()
    y = selective_state_update(exact, **args)
    assert torch.equal(selective_state_update(state, **args, seed=1234), y)
    ok = exact.abs() >= 2.0**-14
    x = exact[ok].double().abs()
    spacing = 2.0 ** (x.frexp()[1] - 11)
    low = (x / spacing).floor()
    up = state[ok].double().abs() / spacing - low
    p = x / spacing - low
    assert set(up.unique().tolist()) == {0.0, 1.0}
    deviation = (up - p).sum().abs() / (p * (1 - p)).sum().sqrt()
    assert deviation < 4
    high = (up - p)[p > 0.5].sum().abs() / (p * (1 - p))[p > 0.5].sum().sqrt()
    assert high < 4


def test_packed_tokens_are_rounded_with_the_noise_of_their_slot():
    args, state = inputs(3), states(4, F16)
    exact, slots = state.float(), torch.tensor([[2, 0, 3]])
    packed = dict(state_batch_indices=slots, cu_seqlens=cu(3))
    y = selective_state_update(exact, **args, **packed)
    assert torch.equal(selective_state_update(state, **args, **packed, seed=3), y)
    bits = ref.rounding_bits((H, P, N), slots[0], torch.tensor([3]), 5)
    rounded = ref.round_stochastically(exact[slots[0]], bits, F16)
    assert torch.equal(state[slots[0]], rounded)
