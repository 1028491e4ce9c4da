"""From encoded bytes to what the network takes.

Shape suffixes: H, W height and width of an image; 3 RGB channels.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ssn.errors import SSNError

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode_image(data: bytes, *, source: str) -> np.ndarray:
    """Decode an encoded image.

    Grey, palette, 16-bit and transparent images become 8-bit RGB (transparency is dropped); an EXIF orientation is
    applied, as OpenCV does.

    Args:
        data: The bytes of an image file.
        source: What to call it in an error.

    Returns:
        ``[H, W, 3]`` uint8 RGB.

    Raises:
        SSNError: empty, corrupt, or in a format that Pillow does not know.
    """
    image = ImageOps.exif_transpose(_open(data, source))
    if image.mode.startswith("I"):
        grey_HW = _scale_16_bit(np.asarray(image))
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise SSNError(f"image {source} holds floating-point pixels; convert it to 8 or 16 bits")
    return np.array(image.convert("RGB"))


def decode_mask_levels(data: bytes, *, source: str) -> np.ndarray:
    """Decode a mask to ``[H, W]`` uint8 levels: of its brightest colour channel.

    Raises:
        SSNError: empty, corrupt, or in a format that Pillow does not know.
    """
    image = _open(data, source)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode.startswith("I"):
        return _scale_16_bit(np.asarray(image))
    if image.mode in ("L", "LA"):
        return np.array(image.getchannel("L"))
    levels_HW: np.ndarray = np.array(image.convert("RGB")).max(axis=2)
    return levels_HW


def decode_mask(data: bytes, *, source: str) -> np.ndarray:
    """Decode a stored mask to ``[H, W]`` bool, true where defective (level 128 and above).

    Raises:
        SSNError: empty, corrupt, or in a format that Pillow does not know.
    """
    mask_HW: np.ndarray = decode_mask_levels(data, source=source) >= 128
    return mask_HW


def encode_mask(mask_HW: np.ndarray) -> bytes:
    """Encode a bool mask as an 8-bit single-channel PNG of 0 and 255."""
    buffer = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def preprocess(image_HW3: np.ndarray, image_size: tuple[int, int], *, antialias: bool) -> torch.Tensor:
    """Resize bilinearly and normalise with ImageNet's mean and standard deviation.

    Args:
        image_HW3: uint8 RGB.
        image_size: Height and width of the result, in pixels.
        antialias: Whether to filter before shrinking (JIMS 2025) or not (ICPR 2024, as OpenCV does).

    Returns:
        ``[3, height, width]`` float32.
    """
    import torch
    from torch.nn import functional as F

    # torch.tensor copies, and so takes arrays that are not to be written to, as PIL gives them
    x_3HW = torch.tensor(np.ascontiguousarray(image_HW3)).permute(2, 0, 1).float() / 255
    if x_3HW.shape[1:] != torch.Size(image_size):
        x_13HW = x_3HW[None]
        x_3HW = F.interpolate(x_13HW, size=image_size, mode="bilinear", align_corners=False, antialias=antialias)[0]
    mean_311 = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std_311 = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((x_3HW - mean_311) / std_311).contiguous()


def resize_mask(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a bool mask to ``size`` (height, width) by nearest neighbour: source = floor(i * ratio), as OpenCV."""
    height, width = mask_HW.shape
    if (height, width) == tuple(size):
        return mask_HW
    rows = np.arange(size[0]) * height // size[0]
    columns = np.arange(size[1]) * width // size[1]
    resized_HW: np.ndarray = mask_HW[rows[:, None], columns[None, :]]
    return resized_HW


def _open(data: bytes, source: str) -> Image.Image:
    if not data:
        raise SSNError(f"image {source} is empty (0 bytes); restore or remove it")
    try:
        with warnings.catch_warnings():
            # A large photograph is no attack here; Pillow still refuses absurd sizes with an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no image format that can be read" if "cannot identify" in str(error) else " ".join(str(error).split())
        raise SSNError(f"image {source} is corrupt or unreadable ({reason}); restore or remove it") from error
    return image


def _scale_16_bit(levels_HW: np.ndarray) -> np.ndarray:
    """16-bit levels to 8-bit ones; Pillow itself would clip at 255."""
    return np.clip(levels_HW.astype(np.int64) // 257, 0, 255).astype(np.uint8)
