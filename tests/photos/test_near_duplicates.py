"""Laws of near duplicates: copies are near, others are far, and the search finds just what comparing all would find."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_control.photos.decode import thumbnail
from refine_control.photos.near_duplicates import DISTANCE, SIDE, fingerprint, near_pairs


def scenery(seed: int, width: int = 330, height: int = 250) -> Image.Image:
    """Blobs of two sizes with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.integers(0, 256, (20, 26, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.blend(coarse, fine, 0.3)


def saved(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def mark(data: bytes) -> int:
    value = fingerprint(thumbnail(data, SIDE)[0])
    assert value is not None
    return value


def groups(count: int, pairs) -> set[frozenset[int]]:
    """What hangs together by the pairs."""
    member = list(range(count))
    for one, other in pairs:
        joined = {member[one], member[other]}
        member = [min(joined) if each in joined else each for each in member]
    return {frozenset(n for n in range(count) if member[n] == name) for name in member}


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_copies_are_near_and_other_pictures_far():
    originals = [mark(saved(scenery(seed))) for seed in range(12)]
    assert min(distance(a, b) for n, a in enumerate(originals) for b in originals[:n]) > 2 * DISTANCE
    for seed, original in enumerate(originals):
        whole = scenery(seed)
        turned = Image.Exif()
        turned[0x0112] = 6
        for copy in (
            saved(whole, "JPEG", quality=30),
            saved(whole.resize((101, 77), Image.Resampling.LANCZOS), "JPEG", quality=70),
            saved(whole.resize((1333, 1001), Image.Resampling.BICUBIC), "JPEG", quality=90),  # decoded at a quarter
            saved(whole.convert("L"), "WEBP"),
            saved(whole.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned, quality=90),
            saved(whole.transpose(Image.Transpose.ROTATE_90), "TIFF", exif=turned),
        ):
            assert distance(mark(copy), original) <= DISTANCE


def test_a_flat_picture_has_no_fingerprint():
    for level in (0, 17, 255):
        assert fingerprint(np.full((SIDE, SIDE), level, np.uint8)) is None
    speckled = np.full((SIDE, SIDE), 90, np.uint8)
    speckled[::5, ::7] += 3
    assert fingerprint(speckled) is None
    ramp = np.tile(np.arange(0, 8 * SIDE, 8, dtype=np.uint8), (SIDE, 1))
    stripes = np.where(np.arange(SIDE) % 8 < 4, 200, 40).astype(np.uint8)[:, None].repeat(SIDE, 1)
    for plain in (ramp, ramp.T, stripes, stripes.T):
        assert fingerprint(plain) is None


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=6),
    st.lists(st.tuples(st.integers(0, 40), st.sets(st.integers(0, 63), max_size=6)), max_size=40),
    st.sampled_from([0, 1, 3, 4, 7]),
)
def test_the_search_finds_what_comparing_all_with_all_finds(seeds, steps, most):
    hashes = list(seeds)
    for which, flips in steps if hashes else ():
        hashes.append(hashes[which % len(hashes)] ^ sum(1 << bit for bit in flips))
    found = list(near_pairs(np.array(hashes, np.uint64), most))
    everything = [(a, b) for b in range(len(hashes)) for a in range(b) if distance(hashes[a], hashes[b]) <= most]
    assert {(min(pair), max(pair)) for pair in found} <= set(everything)
    assert groups(len(hashes), found) == groups(len(hashes), everything)


def test_the_search_is_not_quadratic():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 60_000, np.uint64)
    hashes[:20_000] = hashes[0]  # a template of which there are many copies
    hashes[30_000:30_100] = hashes[40_000:40_100] ^ np.uint64(1 << 63 | 1 << 30 | 3)
    found = list(near_pairs(hashes))
    assert len(found) < 10 * 60_000
    joined = {(min(pair), max(pair)) for pair in found}
    assert {(30_000 + n, 40_000 + n) for n in range(100)} <= joined
    assert {(n, n + 1) for n in range(19_999)} <= joined


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count):
    assert list(near_pairs(np.zeros(count, np.uint64))) == []
