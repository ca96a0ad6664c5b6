"""The noise is docs/noise.md bit for bit, whatever computes it, and it is distributed as it should be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy_noise
import pytest
import torch
from scipy import special
from torch import Tensor

from genfast import ops, reference
from genfast.reference.noise import philox
from genfast.testing.oracle import same_bits

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1]
DIGITS = {torch.bfloat16: 8, torch.float16: 11}  # significant bits
COUNT = 40_003  # more than any vector or block, and no multiple of four

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32-10: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected
    assert tuple(int(w) for w in numpy_noise.philox(counter, key)) == expected


def from_numpy(rows: Callable[[int, int, int, int], np.ndarray], draw: int, stream: int) -> Tensor:
    return torch.from_numpy(np.stack([rows(seed, draw, stream, COUNT) for seed in SEEDS]))


@pytest.mark.parametrize(("draw", "stream"), [(0, 0), (3, 0), (2**32 - 1, 5)])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_bits_are_the_specifications(kind: str, draw: int, stream: int, isa: str) -> None:
    expected = from_numpy(getattr(numpy_noise, f"{kind}s"), draw, stream)
    for namespace in (ops, reference):
        got = getattr(namespace, kind)(torch.tensor(SEEDS), expected.shape, draw=draw, stream=stream)
        assert same_bits(got, expected), f"{namespace.__name__}: {(got != expected).sum()} of {got.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_other_dtypes_round_the_same_values(kind: str, dtype: torch.dtype, isa: str) -> None:
    expected = from_numpy(getattr(numpy_noise, f"{kind}s"), 1, 2)
    if kind == "uniform" and dtype in DIGITS:
        expected = torch.from_numpy(numpy_noise.toward_zero(expected.numpy(), DIGITS[dtype]))
    expected = expected.to(dtype)
    for namespace in (ops, reference):
        got = getattr(namespace, kind)(torch.tensor(SEEDS), expected.shape, draw=1, stream=2, dtype=dtype)
        assert same_bits(got, expected), namespace.__name__


@pytest.mark.parametrize("dtype", list(DIGITS), ids=str)
def test_uniforms_in_16_bits_stay_below_one(dtype: torch.dtype, isa: str) -> None:
    """In both layouts, at any place of a vector; rounded to nearest, 1 of 512 numbers in bfloat16 would be 1."""
    seeds, largest = torch.arange(8), 1 - 2.0 ** -DIGITS[dtype]
    exact = ops.uniform(seeds, (8, 3, 131, 67))
    for layout in (torch.contiguous_format, torch.channels_last):
        got = ops.uniform(seeds, exact.shape, dtype=dtype, memory_format=layout)
        assert float(got.max()) == largest and float(exact.max()) > 1 - 2.0**-16
        assert bool((got.float() <= exact).all()) and float((exact - got.float()).max()) < 2.0 ** -DIGITS[dtype]
        assert same_bits(got, torch.from_numpy(numpy_noise.toward_zero(exact.numpy(), DIGITS[dtype])).to(dtype))


@pytest.mark.parametrize("shape", [(3, 1, 7, 9), (3, 4, 16, 16), (3, 5, 33, 65), (3, 3, 2, 9, 11), (3, 130, 3, 3)])
def test_memory_format_changes_no_number(shape: tuple[int, ...], isa: str) -> None:
    """The element's number is its logical one, wherever it lies."""
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    got = ops.normal(torch.tensor(SEEDS[3:]), shape, memory_format=last)
    assert got.is_contiguous(memory_format=last)
    count = math.prod(shape[1:])
    expected = torch.from_numpy(np.stack([numpy_noise.normals(seed, 0, 0, count) for seed in SEEDS[3:]])).view(shape)
    assert same_bits(got, expected)


def test_batch_split_and_order_change_no_number(isa: str) -> None:
    seeds = torch.tensor(SEEDS)
    whole = ops.normal(seeds, (6, 3, 50, 50), draw=9)
    order = torch.tensor([4, 0, 5, 2, 2, 1])
    assert same_bits(ops.normal(seeds[order], (6, 3, 50, 50), draw=9), whole[order])
    for k in range(6):
        assert same_bits(ops.normal(seeds[k : k + 1], (1, 3, 50, 50), draw=9), whole[k : k + 1])


def test_threads_change_no_number(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.normal(torch.tensor([5, 6]), (2, 3, 200, 201)))
    torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_the_ends_of_the_range() -> None:
    """The largest magnitude is the documented one: r at u = 2^-33 times a cosine of at most 1."""
    zero = np.zeros(1, np.uint32)
    with np.errstate(over="ignore"):
        largest = abs(float(numpy_noise.pair(zero, np.array([2**30 - 1], np.uint32))[1][0]))
        reach = max(abs(float(v[0])) for b in range(0, 2**32, 2**24) for v in numpy_noise.pair(zero, np.array([b], np.uint32)))
        one = numpy_noise.pair(np.array([2**32 - 1], np.uint32), zero)
    assert max(largest, reach) == pytest.approx(math.sqrt(-2 * math.log(2**-33)), abs=1e-6) == pytest.approx(6.764, abs=5e-4)
    assert float(one[0][0]) == 0 and float(one[1][0]) == 0


# ---- distribution --------------------------------------------------------------------------------------------------------------


def z_scores(z: Tensor) -> dict[str, float]:
    """How many standard errors each statistic of (seeds, draws, elements) independent normals is from its expectation."""
    n = z.numel()
    z = z.double()
    scores = {}
    # Mean and variance of the k-th power of a standard normal: moments 1, 2, 3, 4, 6, 8 are 0, 1, 0, 3, 15, 105.
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        scores[f"moment {power}"] = (float((z**power).sum()) - n * mean) / math.sqrt(n * variance)
    # Neighbours in every direction, and a lane apart, are uncorrelated; so are their squares.
    for name, a, b in (
        ("seeds", z[1:], z[:-1]),
        ("draws", z[:, 1:], z[:, :-1]),
        *((f"elements {lag} apart", z[..., lag:], z[..., :-lag]) for lag in (1, 2, 3, 4, 16, 64)),
    ):
        scores[f"correlation of {name}"] = float((a * b).sum()) / math.sqrt(a.numel())
        scores[f"correlation of squares of {name}"] = float(((a * a - 1) * (b * b - 1)).sum()) / math.sqrt(4 * a.numel())
    return scores


def tail_counts(z: Tensor) -> dict[float, int]:
    return {bound: int((z.abs() > bound).sum()) for bound in (3.0, 4.0, 5.0)}


def kolmogorov_smirnov(z: np.ndarray) -> float:
    """The p-value of the largest distance from the normal's distribution function (Kolmogorov's limit)."""
    cdf = special.ndtr(np.sort(z.astype(np.float64)))
    n = len(z)
    distance = max(float((np.arange(1, n + 1) / n - cdf).max()), float((cdf - np.arange(n) / n).max()))
    return float(special.kolmogorov(distance * math.sqrt(n)))


def check_distribution(chunks: list[tuple[int, int]], seeds: int, draws: int, elements: int) -> None:
    """Over ``chunks`` of (first seed, first draw). The numbers are fixed, so the bounds are met for ever or not at all."""
    totals: dict[str, float] = {}
    tails = dict.fromkeys((3.0, 4.0, 5.0), 0)
    worst = 1.0
    for first_seed, first_draw in chunks:
        ids = torch.arange(first_seed, first_seed + seeds)
        z = torch.stack([ops.normal(ids, (seeds, elements), draw=first_draw + d) for d in range(draws)], 1)
        for name, score in z_scores(z).items():
            totals[name] = totals.get(name, 0.0) + score / math.sqrt(len(chunks))
        for bound, count in tail_counts(z).items():
            tails[bound] += count
        worst = min(worst, kolmogorov_smirnov(z.numpy().ravel()))
    n = len(chunks) * seeds * draws * elements
    assert max(map(abs, totals.values())) < 4, totals
    for bound, count in tails.items():
        expected = n * 2 * special.ndtr(-bound)
        assert abs(count - expected) < 4 * math.sqrt(expected) + 1, f"{count} beyond {bound}, not {expected:.1f}"
    assert worst * len(chunks) > 0.005, worst


def test_distribution_of_a_million() -> None:
    check_distribution([(0, 0)], seeds=10, draws=5, elements=20_000)


@pytest.mark.slow
def test_distribution_of_a_hundred_million() -> None:
    check_distribution([(1000 * k, 7 * k) for k in range(50)], seeds=20, draws=5, elements=20_000)


def test_uniform_is_uniform() -> None:
    u = ops.uniform(torch.arange(10), (10, 100_000)).double()
    n = u.numel()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * n)
    counts = torch.histc(u, 64, 0, 1)
    chi2 = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert special.chdtrc(63, chi2) > 0.005
    assert torch.equal(u * 2**24, (u * 2**24).floor())
