import pytest
import torch

from nemokernels._philox import philox4x32, uniform

# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    low64 = counter[0] | counter[1] << 32
    offset = torch.tensor(low64 - (1 << 64) if low64 >> 63 else low64)
    got = philox4x32(key[0] | key[1] << 32, offset, counter[2], counter[3])
    assert tuple(int(w) for w in got) == words


def test_uniform_range():
    words = torch.tensor([0, 0xFFFFFFFF])
    assert uniform(words).tolist() == [0.0, 1.0 - 2.0**-24]
