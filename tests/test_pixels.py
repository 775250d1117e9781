"""Pictures as people keep them and as networks take them: nothing is lost on the way there and back."""

import numpy as np
import pytest
import torch

from refine_control.pixels import from_images, to_images


def every_value() -> np.ndarray:
    values = np.arange(256, dtype=np.uint8)
    return np.stack([values, values[::-1], np.roll(values, 7)], -1).reshape(2, 8, 16, 3)


def test_every_value_comes_back() -> None:
    images = every_value()
    assert np.array_equal(to_images(from_images(images)), images)
    assert torch.equal(from_images(torch.from_numpy(images)), from_images(images))


def test_range_and_order_of_the_axes() -> None:
    images = every_value()
    pixels = from_images(images)
    assert pixels.shape == (2, 3, 8, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert pixels[1, 2, 3, 4] == pytest.approx(images[1, 3, 4, 2] / 127.5 - 1)


def test_what_is_out_of_range_is_clipped_and_the_rest_rounded_to_the_nearest() -> None:
    pixels = torch.tensor([-7.0, -1.0, 0.0039, 0.0041, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_images(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert to_images(torch.full((1, 3, 1, 1), -0.0041))[0, 0, 0, 0] == 127


def test_bf16_and_views_of_arrays_are_taken() -> None:
    images = every_value()
    assert to_images(from_images(images).bfloat16().requires_grad_()).shape == images.shape
    assert torch.equal(from_images(images[:, ::-1]), from_images(images).flip(2))


def test_arrays_that_nobody_may_write_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    images = every_value()
    images.setflags(write=False)
    from_images(images)
    assert not recwarn.list
