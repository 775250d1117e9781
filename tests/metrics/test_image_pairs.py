"""PSNR and SSIM against hand calculation and scikit-image; the laws of masks and compositing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import MAX_PSNR, check_mask, composite, high_pass_energy, psnr, ssim


def make_pair(seed=0, count=3, height=40, width=33, noise=20):
    """Smooth images and noisy copies, so that SSIM is far from 0 and from 1."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phases = random.uniform(0, 6, (count, 1, 1, 3))
    reference = 127 + 100 * np.sin(x[..., None] / 5 + phases) * np.cos(y[..., None] / 7 - phases)
    generated = reference + random.normal(0, noise, reference.shape)
    return reference.astype(np.uint8), generated.clip(0, 255).astype(np.uint8)


def make_mask(seed=1, count=3, height=40, width=33):
    mask = np.zeros((count, height, width), dtype=bool)
    for index, row in enumerate(mask):
        row[8 + index : 25, 6 : 20 + index] = True
    mask[:, ::3, ::4] = np.random.default_rng(seed).random(mask[:, ::3, ::4].shape) < 0.5
    return mask


def scikit_map(reference, generated):
    _, whole = structural_similarity(
        reference,
        generated,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    return whole[5:-5, 5:-5]


def test_psnr_by_hand_on_three_channels():
    reference = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    generated = reference.copy()
    generated[0, 0, 0] = (10, 20, 30)  # 100 + 400 + 900 over 2 x 2 x 3 values: MSE 116.67
    assert psnr(reference, generated)[0] == pytest.approx(10 * np.log10(65025 * 12 / 1400))
    mask = np.zeros((1, 2, 2), dtype=bool)
    mask[0, 0] = True  # two pixels: 1400 / 6
    assert psnr(reference, generated, mask)[0] == pytest.approx(10 * np.log10(65025 * 6 / 1400))


def test_psnr_does_not_wrap_around_in_uint8():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white)[0] == psnr(white, black)[0] == 0.0


def test_psnr_equals_scikit_image():
    reference, generated = make_pair()
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(reference, generated, strict=True)]
    np.testing.assert_allclose(psnr(reference, generated), expected, rtol=1e-12)


def test_the_mean_of_psnr_is_not_the_psnr_of_the_pooled_error():
    reference = np.full((2, 16, 16, 3), 100, np.uint8)
    generated = reference.copy()
    generated[0] += 1
    generated[1] += 50
    of_each = psnr(reference, generated)
    np.testing.assert_allclose(of_each, 10 * np.log10(255**2 / np.array([1.0, 2500.0])))
    pooled = psnr(reference.reshape(1, 32, 16, 3), generated.reshape(1, 32, 16, 3))[0]
    assert pooled == pytest.approx(10 * np.log10(255**2 / 1250.5))
    assert of_each.mean() > pooled + 10


def test_identical_images_have_the_documented_cap_and_ssim_one():
    reference, _ = make_pair()
    np.testing.assert_array_equal(psnr(reference, reference), np.full(3, MAX_PSNR))
    np.testing.assert_allclose(ssim(reference, reference), 1.0, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 33), (11, 11), (12, 64)])
def test_ssim_equals_scikit_image_on_valid_borders(shape):
    reference, generated = make_pair(height=shape[0], width=shape[1])
    expected = [scikit_map(a, b).mean() for a, b in zip(reference, generated, strict=True)]
    np.testing.assert_allclose(ssim(reference, generated), expected, atol=1e-6)
    assert 0.05 < min(expected) < max(expected) < 0.95


def test_region_ssim_is_the_mean_of_scikits_map_over_valid_mask_pixels():
    (reference, generated), mask = make_pair(), make_mask()
    expected = [scikit_map(a, b)[m[5:-5, 5:-5]].mean() for a, b, m in zip(reference, generated, mask, strict=True)]
    np.testing.assert_allclose(ssim(reference, generated, mask), expected, atol=1e-6)
    assert np.abs(ssim(reference, generated, mask) - ssim(reference, generated)).min() > 1e-4


def test_ssim_of_many_images_is_each_image_alone(monkeypatch):
    reference, generated = make_pair(count=7)
    mask = make_mask(count=7)
    together = ssim(reference, generated, mask)
    monkeypatch.setattr("refine_control.metrics.image_pairs._CHUNK_VALUES", 2 * 40 * 33 * 3)  # chunks of 2, 2, 2, 1
    np.testing.assert_array_equal(ssim(reference, generated, mask), together)
    assert len(set(together)) == 7


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_the_region_of_a_full_mask_is_the_whole_image(metric):
    reference, generated = make_pair()
    full = np.ones(reference.shape[:3], dtype=bool)
    np.testing.assert_allclose(metric(reference, generated, full), metric(reference, generated), rtol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_compositing_keeps_the_rest_and_changes_psnr_as_predicted(seed, share):
    random = np.random.default_rng(seed)
    reference, generated = random.integers(0, 256, (2, 2, 12, 9, 3), dtype=np.uint8)
    mask = random.random((2, 12, 9)) < share
    mask[:, 0, 0] = True
    before = reference.copy(), generated.copy()
    pasted = composite(reference, generated, mask)
    np.testing.assert_array_equal(pasted[~mask], reference[~mask])
    np.testing.assert_array_equal(pasted[mask], generated[mask])
    np.testing.assert_array_equal(reference, before[0])
    np.testing.assert_array_equal(generated, before[1])
    # the composite's whole MSE is the region's MSE times the region's share of the image
    fraction = mask.mean(axis=(1, 2))
    predicted = psnr(reference, generated, mask) - 10 * np.log10(fraction)
    np.testing.assert_allclose(psnr(reference, pasted), np.minimum(predicted, MAX_PSNR))
    np.testing.assert_array_equal(psnr(reference, pasted, mask), psnr(reference, generated, mask))


GOOD = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("reference", "generated", "says"),
    [
        (GOOD, GOOD[:1], "2 reference images and 1 generated"),
        (GOOD, np.zeros((2, 16, 8, 3), np.uint8), "16 x 16 pixels and generated ones 8 x 16"),
        (GOOD, GOOD.astype(np.float32), "generated images are float32"),
        (GOOD.astype(np.int64), GOOD, "reference images are int64"),
        (GOOD.tolist(), GOOD, "reference images are list"),
        (GOOD[0], GOOD[0], "give (N, H, W, 3)"),
        (GOOD[..., :1], GOOD[..., :1], "give (N, H, W, 3)"),
        (GOOD[:0], GOOD[:0], "at least one pixel"),
        (GOOD[:, :0], GOOD[:, :0], "at least one pixel"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_that_cannot_be_compared_are_refused(metric, reference, generated, says):
    with pytest.raises(InvalidInputError) as refusal:
        metric(reference, generated)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones((2, 16, 8), bool), "these images need (2, 16, 16)"),
        (np.ones((2, 16, 16), np.uint8), "the mask is uint8"),
        (np.stack([np.ones((16, 16), bool), np.zeros((16, 16), bool)]), "first: image 1"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_masks_that_do_not_fit_are_refused(metric, mask, says):
    with pytest.raises(InvalidInputError) as refusal:
        metric(GOOD, GOOD, mask)
    assert says in str(refusal.value)


def test_ssim_refuses_what_no_window_covers():
    with pytest.raises(InvalidInputError, match="at least 11 x 11"):
        ssim(GOOD[:, :10], GOOD[:, :10])
    edge = np.zeros((2, 16, 16), bool)
    edge[:, :5] = True
    assert (psnr(GOOD, GOOD, edge) == MAX_PSNR).all()
    with pytest.raises(InvalidInputError, match="more than 4 pixels from the border"):
        ssim(GOOD, GOOD, edge)
    edge[:, 5, 5] = True  # the first window centre
    check_mask(edge, GOOD, border=5)
    assert ssim(GOOD, GOOD, edge).shape == (2,)


def test_high_pass_energy_falls_with_blur_and_grows_with_the_square_of_contrast():
    reference, sharp = make_pair()
    mask = make_mask()
    blurred = np.stack([gaussian_filter(image, (2, 2, 0)) for image in sharp])
    assert (high_pass_energy(blurred, mask) < 0.1 * high_pass_energy(sharp, mask)).all()
    assert (high_pass_energy(reference // 2 * 2, mask) > 0).all()
    assert (high_pass_energy(np.full_like(sharp, 90), mask) == 0).all()
    board = np.indices(sharp.shape[1:3]).sum(0) % 2
    low, high = (
        np.broadcast_to(100 + level * board[None, ..., None], sharp.shape).astype(np.uint8) for level in (20, 60)
    )
    np.testing.assert_allclose(high_pass_energy(high, mask), 9 * high_pass_energy(low, mask))
    # of a checkerboard a blur of one pixel leaves next to nothing: the energy is the square of half its contrast
    np.testing.assert_allclose(high_pass_energy(low), 10.0**2, rtol=0.02)


def test_high_pass_energy_is_of_the_masked_region():
    _, generated = make_pair()
    mask = np.zeros(generated.shape[:3], bool)
    mask[:, :10] = True
    below = generated.copy()
    below[:, 15:] = 255 - below[:, 15:]  # farther away than the filter reaches
    np.testing.assert_array_equal(high_pass_energy(below, mask), high_pass_energy(generated, mask))
    halves = [high_pass_energy(generated, half) * half.sum((1, 2)) for half in (mask, ~mask)]
    np.testing.assert_allclose(sum(halves) / mask[0].size, high_pass_energy(generated))
    with pytest.raises(InvalidInputError, match="inpainted pixel"):
        high_pass_energy(generated, np.zeros_like(mask))
