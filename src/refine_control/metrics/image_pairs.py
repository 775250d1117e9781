"""PSNR and SSIM of image pairs, whole or inside the mask; pure functions, reference before generated.

# N images, H W pixels; images (N, H, W, 3) uint8 in [0, 255]; mask (N, H, W) bool, True = inpainted

Every function returns one value for each image, (N,) float64; the caller takes the mean. (The mean of the images' PSNR
is not the PSNR of the pooled error: 20.5 dB against 17.5 dB on the same two images.) Images are compared as they are;
`composite` pastes the kept pixels back, and only where the caller asks for it.
"""

from __future__ import annotations

from itertools import repeat
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter

from refine_control.errors import InvalidInputError

Images = NDArray[np.uint8]
Mask = NDArray[np.bool_]
PerImage = NDArray[np.float64]

DATA_RANGE = 255.0
MAX_PSNR = 100.0
"""dB. Identical images have an infinite PSNR and would make every mean infinite; they count as this much."""

CONVENTIONS = (
    "PSNR and SSIM on 8-bit RGB, range 255, of each picture, then the mean: PSNR of the squared error over all pixels "
    "and channels, at most 100 dB; SSIM with a Gaussian window of 11 pixels, sigma 1.5, wholly inside the picture, "
    "mean of the channels. Raw pipeline output unless composited (kept pixels put back); region: inside the mask; "
    "kept: outside of it."
)
"""The note on PSNR and SSIM under tables."""

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_WINDOW = 2 * SSIM_RADIUS + 1
K1, K2 = 0.01, 0.03

HIGH_PASS_SIGMA = 1.0
"""Pixels. What a Gaussian blur of this width removes is the detail that `high_pass_energy` measures."""

_CHUNK_VALUES = 1 << 20  # values of one float64 working array: 8 MB


def psnr(reference: Images, generated: Images, mask: Mask | None = None) -> PerImage:
    """PSNR = 10 log10(255^2 / MSE) of each image, the MSE over its pixels and all three channels.

    With `mask` the MSE is over the inpainted pixels. Returns (N,) float64 in dB, at most MAX_PSNR. Raises
    InvalidInputError for images or a mask that are not as the module says and for a mask without an inpainted pixel."""
    check_images(reference, generated)
    if mask is not None:
        check_mask(mask, reference)
    masks = repeat(...) if mask is None else mask
    return np.array([_psnr(*each) for each in zip(reference, generated, masks, strict=False)])


def ssim(reference: Images, generated: Images, mask: Mask | None = None) -> PerImage:
    """SSIM of each image: Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, range 255, mean of three channels.

    The mean over window centres at least 5 pixels from the border, with `mask` over the inpainted ones among them; as
    scikit-image with `gaussian_weights=True, use_sample_covariance=False`. Returns (N,) float64 in [-1, 1]. Raises
    InvalidInputError as `psnr` does, and for images or masks without such a centre."""
    check_images(reference, generated)
    count, height, width, channels = reference.shape
    if min(height, width) < SSIM_WINDOW:
        raise InvalidInputError(
            f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels; these are {width} x {height}"
        )
    if mask is not None:
        check_mask(mask, reference, border=SSIM_RADIUS)
    step = max(1, _CHUNK_VALUES // (height * width * channels))
    per_image = np.empty(count)
    for start in range(0, count, step):
        part = slice(start, start + step)
        similarity = _ssim_map(reference[part].astype(np.float64), generated[part].astype(np.float64))
        if mask is None:
            per_image[part] = similarity.mean(axis=(1, 2))
        else:
            inside = mask[part, SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]
            per_image[part] = (similarity * inside).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
    return per_image


def high_pass_energy(images: Images, mask: Mask | None = None) -> PerImage:
    """Mean square of x - blur(x), the blur Gaussian with sigma 1 pixel (edges reflected, cut at 4 sigma): sharpness.

    Of each image, over its three channels and, with `mask`, its inpainted pixels alone. PSNR rises when a picture is
    blurred; this falls. Returns (N,) float64 in squared levels of [0, 255]: compare means of sets by
    `statistics.mean_ratio`. Raises InvalidInputError as `psnr` does."""
    check_set(images, "generated")
    if mask is not None:
        check_mask(mask, images)
    masks = repeat(...) if mask is None else mask
    return np.array([np.square(_high_pass(image)[inside]).mean() for image, inside in zip(images, masks, strict=False)])


def _high_pass(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, 3) -> what the blur of each channel removes."""
    values = image.astype(np.float64)
    return values - gaussian_filter(values, (HIGH_PASS_SIGMA, HIGH_PASS_SIGMA, 0))


def composite(reference: Images, generated: Images, mask: Mask) -> Images:
    """The generated pixels where `mask` is True, the reference's everywhere else, byte for byte.

    Returns new (N, H, W, 3) uint8. Raises InvalidInputError for images or a mask that are not as the
    module says; a mask without an inpainted pixel is allowed here and returns the reference."""
    check_images(reference, generated)
    _check_mask_form(mask, reference)
    return np.where(mask[..., None], generated, reference)


def check_images(reference: Images, generated: Images) -> None:
    """Raises InvalidInputError unless both are (N, H, W, 3) uint8 of one shape with N, H, W > 0."""
    check_set(reference, "reference")
    check_set(generated, "generated")
    if len(reference) != len(generated):
        raise InvalidInputError(
            f"{len(reference)} reference images and {len(generated)} generated ones; give as many of each, in one order"
        )
    if reference.shape != generated.shape:
        raise InvalidInputError(
            f"reference images are {reference.shape[2]} x {reference.shape[1]} pixels and generated ones "
            f"{generated.shape[2]} x {generated.shape[1]}; resize one set before comparing"
        )


def check_set(images: Images, name: str) -> None:
    """Raises InvalidInputError unless `images` are (N, H, W, 3) uint8 with N, H, W > 0."""
    if _kind(images) != np.uint8:
        raise InvalidInputError(f"{name} images are {_kind(images)}; give a uint8 array with values from 0 to 255")
    if images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
        raise InvalidInputError(f"{name} images have shape {images.shape}; give (N, H, W, 3) with at least one pixel")


def _kind(array: object) -> object:
    return array.dtype if isinstance(array, np.ndarray) else type(array).__name__


def check_mask(mask: Mask, images: Images, border: int = 0) -> None:
    """Raises InvalidInputError unless `mask` is (N, H, W) bool and each image has an inpainted pixel
    at least `border` pixels from its edges.

    `ssim` needs border=SSIM_RADIUS: check before pictures are generated."""
    _check_mask_form(mask, images)
    _, height, width = mask.shape
    inside = mask[:, border : height - border, border : width - border]
    empty = np.flatnonzero(~inside.any(axis=(1, 2)))
    if empty.size:
        where = f" more than {border - 1} pixels from the border" if border else ""
        raise InvalidInputError(
            f"{empty.size} of {len(mask)} masks have no inpainted pixel{where} (first: image {empty[0]}); "
            "leave these images out of the region's metrics"
        )


def _check_mask_form(mask: Mask, images: Images) -> None:
    if _kind(mask) != np.bool_:
        raise InvalidInputError(f"the mask is {_kind(mask)}; give a bool array, True where the image was inpainted")
    if mask.shape != images.shape[:3]:
        raise InvalidInputError(f"the mask has shape {mask.shape}; these images need {images.shape[:3]}")


def _psnr(reference: Images, generated: Images, inside: Mask | EllipsisType) -> float:
    """Of one image (H, W, 3); integers until the division, so that the error is exact."""
    difference = reference[inside].astype(np.int32) - generated[inside].astype(np.int32)
    error = int(np.square(difference).sum(dtype=np.int64)) / difference.size
    return min(MAX_PSNR, 10.0 * float(np.log10(DATA_RANGE**2 / error))) if error else MAX_PSNR


def _gaussian(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, H, W, 3) -> the weighted mean of each whole window, (n, H - 10, W - 10, 3)."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    rows = correlate1d(images, weights, axis=1)[:, SSIM_RADIUS:-SSIM_RADIUS]
    return correlate1d(rows, weights, axis=2)[:, :, SSIM_RADIUS:-SSIM_RADIUS]


def _ssim_map(reference: NDArray[np.float64], generated: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, H, W, 3) twice -> SSIM at each whole window, mean over channels, (n, H - 10, W - 10)."""
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    mean_r, mean_g = _gaussian(reference), _gaussian(generated)
    variances = _gaussian(reference**2 + generated**2) - mean_r**2 - mean_g**2
    covariance = _gaussian(reference * generated) - mean_r * mean_g
    numerator = (2 * mean_r * mean_g + c1) * (2 * covariance + c2)
    denominator = (mean_r**2 + mean_g**2 + c1) * (variances + c2)
    return (numerator / denominator).mean(axis=3)
