"""From a trial's checkpoint to a model that works alone.

A trial keeps what was trained (the heads) and what identifies the backbone it was trained on; a *bundle* is the same
with the backbone's weights beside it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ssn.backbone import Backbone, apply_calibration, backbone_state, load_backbone, restore_backbone
from ssn.checkpoint import Checkpoint, save_checkpoint
from ssn.errors import SSNError

OPTIMIZER_PREFIX = "optimizer."
"""Tensors of the optimiser's state, in a checkpoint that training can resume from."""
CALIBRATION_PREFIX = "backbone_calibration."
"""Batch-norm statistics of a random backbone, which its seed does not determine."""


def head_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state dict of ``ssn.model.SuperSimpleNet``."""
    other = (OPTIMIZER_PREFIX, CALIBRATION_PREFIX)
    return {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(other)}


def find_backbone(checkpoint: Checkpoint) -> Backbone:
    """The backbone that a checkpoint's heads were trained on: the one beside them, or as the configuration says.

    Raises:
        SSNError: the weights cannot be had, or are not those of training.
    """
    model, digest = checkpoint.config.model, checkpoint.meta["backbone_digest"]
    if checkpoint.backbone is not None:
        backbone = restore_backbone(model, checkpoint.backbone)
    else:
        backbone = load_backbone(model)
        calibration = {
            name.removeprefix(CALIBRATION_PREFIX): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(CALIBRATION_PREFIX)
        }
        if calibration:
            apply_calibration(backbone, calibration)
    if backbone.digest != digest:
        raise SSNError(
            f"the model was trained on a backbone with digest {digest[:12]}, but model.weights {model.weights!r} now "
            f"gives {backbone.digest[:12]}; bring back the weights it was trained on"
        )
    return backbone


def write_bundle(checkpoint: Checkpoint, backbone: Backbone, out: Path) -> None:
    """Write heads and backbone as one directory that loads anywhere, without hub or weights file."""
    save_checkpoint(
        out,
        tensors=head_tensors(checkpoint),
        config=checkpoint.config,
        meta=checkpoint.meta,
        backbone=backbone_state(backbone),
    )
