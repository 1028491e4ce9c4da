"""Scoring images with a trained model: what it takes, what it refuses, and that company changes nothing."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssn.bundle import find_backbone, head_tensors
from ssn.checkpoint import BACKBONE_FILE, load_checkpoint, save_checkpoint
from ssn.data.preprocess import decode_image, preprocess
from ssn.errors import SSNError
from ssn.model import SuperSimpleNet, image_map
from ssn.predictor import Predictor, find_images
from tests import oracle
from tests.raw_folders import draw_image, encode_png, write_image
from tests.tolerances import FOLDED_ATOL, GOLDEN_ATOL, GOLDEN_RTOL


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Predictor:
    return Predictor.from_directory(tiny_model)


def test_scores_are_those_of_the_plain_formulation(predictor: Predictor, tiny_model: Path) -> None:
    """From pixels to logits with none of the predictor's own steps, nothing folded."""
    checkpoint = load_checkpoint(tiny_model)
    backbone = find_backbone(checkpoint)
    net = SuperSimpleNet(backbone.channels, checkpoint.config.model).eval()
    net.load_state_dict(head_tensors(checkpoint))
    image = draw_image(7, 40, 60)
    (found,) = predictor.predict([image])
    x_BCHW = preprocess(image, (32, 48), antialias=False)[None]
    with torch.no_grad():
        features = [m.permute(0, 2, 3, 1) for m in backbone(x_BCHW)]
        map_BHW, score_B = oracle.forward_eval(net, features)
    expected = image_map(map_BHW, (32, 48))[0].numpy()
    atol = FOLDED_ATOL * max(1.0, float(np.abs(expected).max()))
    assert found.score == pytest.approx(float(score_B), abs=atol)
    assert found.map_HW.dtype == np.float32
    np.testing.assert_allclose(found.map_HW, expected, rtol=0, atol=atol)


def test_path_bytes_picture_and_array_score_the_same(predictor: Predictor, tmp_path: Path) -> None:
    pixels = draw_image(3)
    path = write_image(tmp_path / "image.png", pixels)
    given = [path, str(path), path.read_bytes(), encode_png(pixels), Image.fromarray(pixels), pixels]
    found = list(predictor.predict(given, batch_size=1))
    assert len({p.score for p in found}) == 1
    assert all(np.array_equal(p.map_HW, found[0].map_HW) for p in found)
    assert [p.source for p in found] == [str(path), str(path), "image 2", "image 3", "image 4", "image 5"]


def test_grey_images_are_taken_as_colour(predictor: Predictor) -> None:
    grey = draw_image(3)[:, :, 0]
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    given = [grey, colour, Image.fromarray(grey), encode_png(grey)]
    assert len({p.score for p in predictor.predict(given, batch_size=1)}) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batch_size_changes_nothing(predictor: Predictor, batch_size: int) -> None:
    images = [draw_image(seed, 24 + seed, 40 - seed) for seed in range(7)]
    default = list(predictor.predict(images))
    found = list(predictor.predict(iter(images), batch_size=batch_size))
    assert [p.score for p in found] == pytest.approx([p.score for p in default], rel=GOLDEN_RTOL, abs=GOLDEN_ATOL)
    for a, b in zip(found, default, strict=True):
        np.testing.assert_allclose(a.map_HW, b.map_HW, rtol=GOLDEN_RTOL, atol=GOLDEN_RTOL * np.abs(b.map_HW).max())
    assert len({p.score for p in default}) == 7


def test_images_are_read_as_they_are_needed(predictor: Predictor) -> None:
    """A stream of images may be endless."""
    taken = []

    def stream() -> object:
        for seed in range(100):
            taken.append(seed)
            yield draw_image(seed)

    predictions = predictor.predict(stream(), batch_size=2)  # type: ignore[arg-type]
    next(predictions)
    assert len(taken) == 2


def test_no_images_no_predictions(predictor: Predictor) -> None:
    assert list(predictor.predict([])) == []


def test_corrupt_image_is_named(predictor: Predictor, tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.png", draw_image(0))
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(SSNError, match=r"broken\.png") as caught:
        list(predictor.predict([whole, broken]))
    assert "\n" not in str(caught.value)
    with pytest.raises(SSNError, match="image 1 "):
        list(predictor.predict([whole, b"not an image"]))


def test_missing_image_is_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(SSNError, match=r"cannot read image .*gone\.png: No such file or directory; check the path"):
        list(predictor.predict([tmp_path / "gone.png"]))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_arrays_are_refused(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(SSNError, match=r"^image 0 is \w+ \(.*\), but must be uint8 \[H, W, 3\] or \[H, W\]$"):
        list(predictor.predict([array]))


def test_rotated_photo_scores_the_same_however_it_is_given(predictor: Predictor, tmp_path: Path) -> None:
    """A camera turns the sensor's picture by a tag in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.fromarray(draw_image(1, 24, 48)).save(path, format="JPEG", exif=exif)
    upright = decode_image(path.read_bytes(), source="photo")
    assert upright.shape == (48, 24, 3)
    with Image.open(path) as picture:
        found = list(predictor.predict([path, path.read_bytes(), picture, upright], batch_size=1))
    assert len({p.score for p in found}) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I", "I;16", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_every_mode(predictor: Predictor, mode: str) -> None:
    grey = draw_image(2)[:, :, 0]
    if mode.startswith("I"):
        picture = Image.fromarray(grey.astype(np.uint16) * 257).convert(mode)
        expected = grey
    else:
        picture = Image.fromarray(draw_image(2)).convert(mode)
        expected = np.array(picture.convert("RGB"))
    by_picture, by_array = predictor.predict([picture, expected], batch_size=1)
    assert by_picture.score == by_array.score


def test_pictures_that_cannot_be_scored_are_refused(predictor: Predictor) -> None:
    with pytest.raises(SSNError, match=r"^image 0 holds floating-point pixels; convert it to 8 or 16 bits$"):
        list(predictor.predict([Image.fromarray(np.zeros((4, 4), np.float32))]))
    cut_short = Image.open(io.BytesIO(encode_png(draw_image(0))[:500]))
    with pytest.raises(SSNError, match=r"^image 0 is corrupt \(.*\); replace or remove it$"):
        list(predictor.predict([cut_short]))


def test_model_directory_is_self_contained(predictor: Predictor, tiny_model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    again = Predictor.from_directory(moved)
    image = draw_image(5)
    assert next(again.predict([image])).score == next(predictor.predict([image])).score
    assert again.meta["dataset"] == "tiny"


def test_heads_without_their_backbone_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    whole = load_checkpoint(tiny_model)
    save_checkpoint(tmp_path / "trial", tensors=whole.tensors, config=whole.config, meta=whole.meta)
    with pytest.raises(SSNError, match=r"trial holds a trial's heads without their backbone; promote the trial"):
        Predictor.from_directory(tmp_path / "trial")


def test_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match="empty") as caught:
        Predictor.from_directory(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_damaged_backbone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    content = bytearray((damaged / BACKBONE_FILE).read_bytes())
    content[-1] ^= 1
    (damaged / BACKBONE_FILE).write_bytes(content)
    with pytest.raises(SSNError, match=rf"{BACKBONE_FILE} is corrupt"):
        Predictor.from_directory(damaged)


def test_bundle_holds_the_backbone_it_was_trained_on(tiny_model: Path) -> None:
    checkpoint = load_checkpoint(tiny_model)
    assert find_backbone(checkpoint).digest == checkpoint.meta["backbone_digest"]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in two folders, and a file that is none; the working folder is their parent."""
    for name in ("pictures/b.png", "pictures/a.JPG", "pictures/deep/c.bmp"):
        write_image(tmp_path / name, draw_image(0))
    (tmp_path / "pictures/notes.txt").write_text("none")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["pictures"], ["a.JPG", "b.png", "deep/c.bmp"]),
        (["pictures/b.png"], ["b.png"]),
        (["pictures/*"], ["a.JPG", "b.png"]),
        (["pictures/**/*.bmp"], ["deep/c.bmp"]),
        (["pictures/deep", "pictures/b.png"], ["deep/c.bmp", "b.png"]),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_folders_and_patterns_are_expanded_in_order(
    pictures: Path, given: list[str], expected: list[str], absolute: bool
) -> None:
    found = find_images([str(pictures.parent / g) for g in given] if absolute else given)
    assert [os.path.relpath(p, pictures) for p in found] == expected


@pytest.mark.parametrize("given", ["pictures/*.tif", "pictures/gone.png", "nowhere/", "pictures/*.txt"])
def test_input_without_images_is_named(pictures: Path, given: str) -> None:
    with pytest.raises(SSNError, match=r"^no image at ") as caught:
        find_images(["pictures/b.png", given])
    assert given in str(caught.value)


def test_file_names_with_brackets_are_files(pictures: Path) -> None:
    path = write_image(pictures / "part [1].png", draw_image(0))
    assert find_images([str(path)]) == [path]


def test_cuda_graphs_need_a_gpu(predictor: Predictor) -> None:
    with pytest.raises(SSNError, match="CUDA graphs need a GPU, but the device is cpu"):
        Predictor(predictor.network.net, predictor.network.backbone, predictor.config, cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_change_no_score(tiny_model: Path) -> None:
    checkpoint = load_checkpoint(tiny_model)
    net = SuperSimpleNet(find_backbone(checkpoint).channels, checkpoint.config.model)
    net.load_state_dict(head_tensors(checkpoint))
    arguments = (net, find_backbone(checkpoint), checkpoint.config)
    plain, graphed = (Predictor(*arguments, device="cuda", cuda_graphs=graphs) for graphs in (False, True))
    for batch in (1, 4, 1, 4):  # recorded, then replayed with other images
        x_BCHW = torch.rand(batch, 3, 32, 48)
        for found, expected in zip(graphed.score_raw(x_BCHW), plain.score_raw(x_BCHW), strict=True):
            torch.testing.assert_close(found, expected, rtol=GOLDEN_RTOL, atol=GOLDEN_ATOL)
