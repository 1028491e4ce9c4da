"""Backbone weights of a sweep or benchmark: told apart by what they are loaded from, identified by their digest."""

from __future__ import annotations

from collections.abc import Iterable

from ssn.config import ModelConfig


def weights_key(model: ModelConfig) -> str:
    """Equal for backbones that load the same weights."""
    return f"{model.backbone}|{model.weights}|{list(model.layers)}"


def load_weights_digest(model: ModelConfig) -> str:
    """Of the weights as loaded. Calibration of random ones follows from them and the data, so it adds nothing."""
    from ssn.backbone import load_backbone

    return load_backbone(model).digest


def load_weights_digests(models: Iterable[ModelConfig]) -> dict[str, str]:
    """Digests of all backbones that trials may load, by :func:`weights_key`; each is loaded once.

    Raises:
        SSNError: one of them cannot be loaded, so that a trial would fail.
    """
    return {key: load_weights_digest(model) for key, model in {weights_key(model): model for model in models}.items()}
