"""Checkpoints come back as they were, replace each other whole, and say what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ssn import checkpoint
from ssn.checkpoint import load_checkpoint, save_checkpoint
from ssn.config import Config, ModelConfig, TrainConfig
from ssn.errors import SSNError

CONFIG = Config(model=ModelConfig(backbone="resnet18", layers=(1, 2, 3)), train=TrainConfig(epochs=7))
META = {"epoch": 3, "metrics": {"image_auroc": 0.9}, "note": "größer"}


def _tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    flat = torch.arange(12.0) * value
    return {
        "whole": flat,
        "view": flat[3:6],
        "transposed": flat.view(3, 4).t(),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "count": torch.tensor(5),
    }


def _save(directory: Path, value: float = 1.0, **kwargs: object) -> None:
    save_checkpoint(directory, tensors=_tensors(value), config=CONFIG, meta=META, **kwargs)


@pytest.mark.parametrize("backbone", [None, {"conv1.weight": torch.ones(2, 3)}])
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, backbone: dict[str, torch.Tensor] | None) -> None:
    _save(tmp_path / "a" / "b", backbone=backbone)
    loaded = load_checkpoint(tmp_path / "a" / "b")
    assert loaded.config == CONFIG
    assert loaded.meta == META
    for expected, actual in ((_tensors(), loaded.tensors), (backbone, loaded.backbone)):
        if expected is None:
            assert actual is None
            continue
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    _save(tmp_path / "c", backbone={"w": torch.ones(1)})
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"heads.safetensors", "backbone.safetensors", "config.json", "meta.json"}
    assert len({p.stat().st_mode for p in (tmp_path / "c").iterdir()}) == 1
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model.layers"] == [1, 2, 3]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    _save(tmp_path / "c", backbone={"w": torch.ones(1)})
    _save(tmp_path / "c", value=2.0)
    loaded = load_checkpoint(tmp_path / "c")
    assert torch.equal(loaded.tensors["whole"], torch.arange(12.0) * 2)
    assert loaded.backbone is None
    assert not (tmp_path / "c" / "backbone.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    _save(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c").meta == META


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "c")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(SSNError, match=r"cannot write checkpoint .*No space left on device"):
            _save(tmp_path / "c", value=2.0)

    rename = os.rename

    def fail_to_install(source: Path, target: Path) -> None:
        if Path(source).name == "fresh":
            fail()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", fail_to_install)
        with pytest.raises(SSNError, match="cannot write checkpoint"):
            _save(tmp_path / "c", value=2.0)
    assert torch.equal(load_checkpoint(tmp_path / "c").tensors["whole"], torch.arange(12.0))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(SSNError, match="is not empty and holds no checkpoint"):
        _save(tmp_path)
    with pytest.raises(SSNError, match="is a file"):
        _save(tmp_path / "photo.png")
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("meta", [{"score": float("nan")}, {"path": Path("x")}])
def test_meta_that_is_not_json_is_a_bug_and_writes_nothing(tmp_path: Path, meta: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match="JSON"):
        save_checkpoint(tmp_path / "c", tensors=_tensors(), config=CONFIG, meta=meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["heads.safetensors", "config.json", "backbone.safetensors"])
def test_corrupt_or_missing_files_are_named(tmp_path: Path, name: str) -> None:
    _save(tmp_path / "c", backbone={"w": torch.ones(1)})
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SSNError, match=f"{name} is corrupt"):
        load_checkpoint(tmp_path / "c")
    path.unlink()
    with pytest.raises(SSNError, match=f"cannot read .*{name}: No such file"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format_version": 1}', '{"format_version": 1, "sha256": {}, "meta": {}}']
)
def test_a_corrupt_meta_file_is_named(tmp_path: Path, content: str) -> None:
    _save(tmp_path / "c")
    (tmp_path / "c" / "meta.json").write_text(content)
    with pytest.raises(SSNError, match=r"meta\.json is corrupt"):
        load_checkpoint(tmp_path / "c")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "c")
    path = tmp_path / "c" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(SSNError, match="has format version 99, but this release reads 1"):
        load_checkpoint(tmp_path / "c")


def test_a_directory_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SSNError, match="nothing does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(SSNError, match="holds no finished checkpoint"):
        load_checkpoint(tmp_path)


def test_a_config_of_another_release_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "flatten", lambda config: {"train.warp_factor": 9})
    _save(tmp_path / "c")
    with pytest.raises(SSNError, match=r"config\.json: unknown config key train\.warp_factor"):
        load_checkpoint(tmp_path / "c")
