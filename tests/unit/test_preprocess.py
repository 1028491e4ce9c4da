"""Decoding and resizing."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ssn.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    decode_image,
    decode_mask,
    decode_mask_levels,
    encode_mask,
    preprocess,
    resize_mask,
)
from ssn.errors import SSNError
from tests.raw_folders import draw_image, encode_png
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_round_trip(format: str) -> None:
    image_HW3 = draw_image(0, 7, 5)
    decoded = decode_image(encode(Image.fromarray(image_HW3), format), source="x")
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, image_HW3)


def test_grey_palette_and_transparent_images_become_rgb() -> None:
    grey_HW = draw_image(1, 6, 4)[:, :, 0]
    expected = np.repeat(grey_HW[:, :, None], 3, axis=2)
    grey = Image.fromarray(grey_HW)
    alpha = Image.merge("LA", (grey, Image.new("L", grey.size, 10)))
    palette = grey.copy().convert("P")
    for image in (grey, alpha, palette):
        assert np.array_equal(decode_image(encode(image), source="x"), expected)


def test_sixteen_bit_images_are_scaled_not_clipped() -> None:
    levels_HW = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(levels_HW)), source="x")
    assert decoded[0, :, 0].tolist() == [0, 1, 127, 255]
    assert decode_mask(encode(Image.fromarray(levels_HW)), source="x").tolist() == [[False, False, False, True]]


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(draw_image(2, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_image(encode(image, "PNG", exif=exif), source="x").shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image at all", "no image format that can be read"),
        (encode_png(draw_image(3, 40, 40))[:200], "corrupt or unreadable"),
        (encode(Image.fromarray(draw_image(3, 40, 40)), "JPEG")[:400], "corrupt or unreadable"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, reason: str) -> None:
    for decode in (decode_image, decode_mask):
        with pytest.raises(SSNError) as error:
            decode(data, source="screw/test/bent/007.png")
        assert "screw/test/bent/007.png" in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_floating_point_images_are_refused() -> None:
    with pytest.raises(SSNError, match="x holds floating-point pixels"):
        decode_image(encode(Image.fromarray(np.ones((3, 3), dtype=np.float32)), "TIFF"), source="x")


def test_masks_round_trip_as_black_and_white() -> None:
    mask_HW = np.random.default_rng(0).random((9, 13)) > 0.5
    data = encode_mask(mask_HW)
    assert np.array_equal(decode_mask(data, source="x"), mask_HW)
    assert set(np.unique(np.asarray(Image.open(io.BytesIO(data))))) == {0, 255}


def test_mask_levels_of_colours_palettes_and_bits() -> None:
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[0, 0] = (255, 0, 0)
    assert decode_mask(encode_png(red), source="x").tolist() == [[True, False], [False, False]]
    white_on_black = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    white_on_black.putpalette([0, 0, 0, 255, 255, 255])
    assert white_on_black.mode == "P"
    assert decode_mask(encode(white_on_black), source="x").tolist() == [[False, True], [True, False]]
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode_mask_levels(encode(bits), source="x").tolist() == [[255, 0]]


def test_mask_is_cut_at_128() -> None:
    levels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    assert decode_mask(encode_png(levels), source="x").tolist() == [[False, False, True, True]]


def test_preprocess_normalises_without_resizing_at_the_same_size() -> None:
    image_HW3 = draw_image(4, 5, 6)
    x_3HW = preprocess(image_HW3, (5, 6), antialias=False)
    expected = (image_HW3 / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert x_3HW.dtype == torch.float32
    assert x_3HW.is_contiguous()
    np.testing.assert_allclose(
        x_3HW.permute(1, 2, 0).numpy(), expected.astype(np.float32), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL
    )


def test_preprocess_resizes_bilinearly_about_pixel_centres() -> None:
    """Halving without a filter averages each 2 x 2 block; with one, neighbours beyond it count too."""
    image_HW3 = draw_image(5, 8, 12)
    plain, filtered = (preprocess(image_HW3, (4, 6), antialias=antialias) for antialias in (False, True))
    blocks = image_HW3.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3)) / 255
    expected = (blocks - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(
        plain.permute(1, 2, 0).numpy(), expected.astype(np.float32), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL
    )
    assert plain.shape == filtered.shape == (3, 4, 6)
    assert not torch.allclose(plain, filtered, atol=1e-2)


def test_masks_resize_by_nearest_neighbour() -> None:
    mask_HW = np.array([[True, False, False], [False, True, False]])
    assert resize_mask(mask_HW, (2, 3)) is mask_HW
    assert np.array_equal(resize_mask(mask_HW, (4, 6)), np.kron(mask_HW, np.ones((2, 2), dtype=bool)))
    wide = np.arange(12) % 3 == 0
    expected = torch.nn.functional.interpolate(torch.tensor(wide).float()[None, None], size=7, mode="nearest")
    assert np.array_equal(resize_mask(wide[None], (1, 7))[0], expected[0, 0].numpy() > 0)


def test_read_only_pixels_are_taken() -> None:
    """PIL's arrays may not be written to."""
    image_HW3 = draw_image(0, 8, 6)
    expected_3HW = preprocess(image_HW3, (8, 6), antialias=False)
    image_HW3.setflags(write=False)
    assert torch.equal(preprocess(image_HW3, (8, 6), antialias=False), expected_3HW)
