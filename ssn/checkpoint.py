"""Checkpoints and model bundles: a directory of safetensors and JSON, without pickle.

``heads.safetensors`` holds what was trained, ``backbone.safetensors`` (in a bundle that must work alone) the frozen
backbone, ``config.json`` the flattened configuration. ``meta.json``, written last, holds the format version, the
SHA-256 of every other file and whatever the writer has to say; a directory without it is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ssn.config import Config, flatten, unflatten
from ssn.errors import SSNError

FORMAT_VERSION = 1
HEADS_FILE = "heads.safetensors"
BACKBONE_FILE = "backbone.safetensors"
CONFIG_FILE = "config.json"
META_FILE = "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` found; ``backbone`` is None unless the directory is a self-contained bundle."""

    tensors: dict[str, Tensor]
    config: Config
    meta: dict[str, Any]
    backbone: dict[str, Tensor] | None = None


def save_checkpoint(
    directory: Path,
    *,
    tensors: Mapping[str, Tensor],
    config: Config,
    meta: Mapping[str, Any],
    backbone: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint so that whoever reads ``directory`` finds a complete one, old or new, or none.

    Args:
        directory: Created with its parents. An existing checkpoint there is replaced as a whole.
        tensors: Any device; stored as they are on the CPU.
        config: Stored flattened.
        meta: Anything that JSON can hold, NaN and infinities excepted.
        backbone: From ``ssn.backbone.backbone_state``; makes the directory self-contained.

    Raises:
        SSNError: ``directory`` holds something that is not a checkpoint, or cannot be written.
        TypeError, ValueError: ``meta`` is not JSON; nothing is written.
    """
    directory = Path(directory)
    _to_json(dict(meta))  # fails before anything is written
    files = {CONFIG_FILE: _to_json(flatten(config)), HEADS_FILE: _serialise(tensors)}
    if backbone is not None:
        files[BACKBONE_FILE] = _serialise(backbone)
    if directory.exists() and not directory.is_dir():
        raise SSNError(f"{directory} is a file; choose another directory for the checkpoint")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / META_FILE).exists():
        raise SSNError(f"{directory} is not empty and holds no checkpoint; choose another directory or empty it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the renames stay within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            sha256 = {}
            for name, content in files.items():
                (fresh / name).write_bytes(content)
                sha256[name] = _sha256(content)
            envelope = {"format_version": FORMAT_VERSION, "sha256": sha256, "meta": dict(meta)}
            (fresh / META_FILE).write_bytes(_to_json(envelope))
            _swap(fresh, directory, Path(scratch, "previous"))
    except OSError as exc:
        raise SSNError(
            f"cannot write checkpoint {directory}: {exc.strerror or exc}; free the space or choose another place"
        ) from exc


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify a checkpoint; tensors are on the CPU.

    Raises:
        SSNError: ``directory`` is missing, incomplete, corrupt or of another format version.
    """
    directory = Path(directory)
    if not (directory / META_FILE).is_file():
        problem = "holds no finished checkpoint" if directory.is_dir() else "does not exist"
        raise SSNError(
            f"checkpoint {directory} {problem} ({META_FILE} is missing); give the directory of a trained model"
        )
    envelope = _parse_json(directory / META_FILE, _read(directory / META_FILE))
    version = envelope.get("format_version")
    if version != FORMAT_VERSION:
        raise SSNError(
            f"checkpoint {directory} has format version {version!r}, but this release reads {FORMAT_VERSION}; "
            "use the release that wrote it, or train again"
        )
    sha256, meta = envelope.get("sha256"), envelope.get("meta")
    if not isinstance(sha256, dict) or not isinstance(meta, dict) or not {HEADS_FILE, CONFIG_FILE} <= sha256.keys():
        raise SSNError(f"{directory / META_FILE} is corrupt; restore it from a copy, or train again")
    content: dict[str, bytes] = {}
    for name in (HEADS_FILE, CONFIG_FILE, BACKBONE_FILE):
        if name in sha256:
            content[name] = _read(directory / name)
            if _sha256(content[name]) != sha256[name]:
                raise SSNError(
                    f"{directory / name} is corrupt (its SHA-256 is not the one in {META_FILE}); "
                    "restore it from a copy, or train again"
                )
    try:
        config = unflatten(_parse_json(directory / CONFIG_FILE, content[CONFIG_FILE]))
    except SSNError as exc:
        raise SSNError(f"{directory / CONFIG_FILE}: {exc}") from exc
    return Checkpoint(
        tensors=load_safetensors(content[HEADS_FILE]),
        config=config,
        meta=meta,
        backbone=load_safetensors(content[BACKBONE_FILE]) if BACKBONE_FILE in content else None,
    )


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as exc:
        raise SSNError(f"{path} is corrupt (not JSON); restore it from a copy, or train again") from exc
    if not isinstance(value, dict):
        raise SSNError(f"{path} is corrupt (not a JSON object); restore it from a copy, or train again")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise SSNError(f"cannot read {path}: {exc.strerror or exc}; restore it from a copy, or train again") from exc


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    # Cloned, because safetensors refuses tensors that share memory, as views of one flat buffer do. To bytes and not to
    # a file, because safetensors creates files that only their owner can read.
    cloned = {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return save_safetensors(cloned)


def _swap(fresh: Path, target: Path, previous: Path) -> None:
    # A directory cannot be renamed onto one that is not empty. If the second rename fails, the first is undone.
    had_previous = target.is_dir()
    if had_previous:
        os.rename(target, previous)
    try:
        os.rename(fresh, target)
    except OSError:
        if had_previous:
            os.rename(previous, target)
        raise
    if had_previous:
        shutil.rmtree(previous)
