"""The Philox contract: known answers, layout, statistics."""

from __future__ import annotations

import pytest
import torch

from gptfast import rng


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(counter, seed, expected):
    c = torch.tensor([counter])
    assert tuple(w.item() for w in rng.philox4x32((c, c, c, c), seed)) == expected


def philox(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    """The generator once more, in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_dropout_mask_element_by_element():
    shape, p, seed, offset = (2, 3, 70), 0.3, 2**50 + 3, 2**32 - 2
    keep = rng.dropout_keep(shape, p, seed, offset)
    for m in range(2):
        for i in range(3):
            for j in range(70):
                words = philox((((j >> 5) << 2) | ((j >> 1) & 3), i, m, offset), seed)
                lane = (((j >> 3) & 3) << 1) | (j & 1)
                bits = (words[lane >> 1] >> (16 * (lane & 1))) & 0xFFFF
                assert keep[m, i, j] == (bits >= round(p * 65536))


def test_sampling_noise_element_by_element():
    seed, position, stream = 11, 7, 2**32 - 1
    noise = rng.gumbel_noise(10, seed, torch.tensor([position]), torch.tensor([stream]))[0]
    for t in range(10):
        x = philox((t >> 2, position, stream, 0x73616D70), seed)[t & 3]
        v = min(torch.tensor(float(x)) * 2**-32 + 2**-33, torch.tensor(1 - 2**-24))
        torch.testing.assert_close(noise[t], -torch.log(-torch.log1p(-v)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_right_share(p):
    keep = rng.dropout_keep((4, 200, 333), p, seed=5, offset=0)
    share, n = keep.double().mean().item(), keep.numel()
    assert abs(share - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
    assert abs(rng.dropout_scale(p) * (1 - p) - (p < 1)) < 1e-4


def test_masks_of_neighbouring_calls_are_unrelated():
    masks = [rng.dropout_keep((1, 100, 500), 0.5, *key).double() for key in ((0, 0), (0, 1), (1, 0), (2**32, 0))]
    for a in range(4):
        for b in range(a):
            correlation = ((masks[a] - 0.5) * (masks[b] - 0.5)).mean().item() * 4
            assert abs(correlation) < 5 / 50000**0.5


def test_seeds_as_signed_integers():
    assert [rng.as_int64(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
