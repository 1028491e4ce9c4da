"""What the published implementations compute, next to what this one does.

``python -m tests.golden.reference [FOLDER]`` prints the largest error of every quantity in every file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ssn.config import ModelConfig
from ssn.losses import total_loss
from ssn.model import Noise, SuperSimpleNet, image_map

CASES = ("icpr_unsupervised_square", "icpr_supervised_rect", "jims_unsupervised_square", "jims_supervised_rect")

# our module -> its name in each published code
_NAMES = {
    "icpr": {
        "adaptor": "feature_adaptor.projection",
        "seg_conv": "discriminator.seg.0",
        "seg_bn": "discriminator.seg.1",
        "seg_out": "discriminator.seg.3",
        "cls_conv": "discriminator.dec_head.0",
        "cls_bn": "discriminator.dec_head.1",
        "cls_score": "discriminator.fc_score",
    },
    "jims": {
        "adaptor": "adaptor.projection",
        "seg_conv": "segdec.seg_head.0",
        "seg_bn": "segdec.seg_head.1",
        "seg_out": "segdec.seg_head.3",
        "cls_conv": "segdec.cls_conv.0",
        "cls_bn": "segdec.cls_conv.1",
        "cls_score": "segdec.cls_fc",
    },
}


@dataclass(frozen=True)
class Quantity:
    """One array, ours and theirs."""

    name: str
    actual: np.ndarray
    expected: np.ndarray

    @property
    def max_relative_error(self) -> float:
        """Largest difference, as a share of the largest expected magnitude."""
        return float(np.abs(self.actual - self.expected).max() / np.abs(self.expected).max())


def load_case(folder: Path, case: str) -> tuple[dict[str, np.ndarray], SuperSimpleNet]:
    """The published arrays, and our network with the published weights."""
    variant = case.split("_")[0]
    with np.load(folder / f"{case}.npz") as file:
        arrays = dict(file)
    with np.load(folder / f"{variant}_head_weights.npz") as file:
        weights = dict(file)
    net = SuperSimpleNet((16, 32), ModelConfig(variant=variant))
    state = {name: torch.from_numpy(weights[published_name(variant, name)]) for name in net.state_dict()}
    net.load_state_dict(state, strict=True)
    return arrays, net


def published_name(variant: str, name: str) -> str:
    """Name of one of our parameters or buffers in the published code."""
    module, _, leaf = name.partition(".")
    return f"{_NAMES[variant][module]}.{leaf}"


def training_quantities(case: str, arrays: dict[str, np.ndarray], net: SuperSimpleNet) -> Iterator[Quantity]:
    """Map, score, targets, loss, gradient norms and batch-norm statistics of one training step."""
    variant = case.split("_")[0]
    masks = torch.from_numpy(arrays["mask_in"]).float()
    masks = masks if masks.dim() == 4 else masks[:, None]
    size = arrays["perlin"].shape[-2:]
    if masks.shape[-2:] != size:  # the jims code is given masks at image size
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
    defects = (masks[:, 0] >= 0.5).repeat(2, 1, 1)
    synthetic = (torch.from_numpy(arrays["perlin"])[:, 0] > 0) & ~defects
    index = synthetic.flatten().nonzero().squeeze(1)
    noise = Noise(torch.from_numpy(arrays["noise"]).permute(0, 2, 3, 1).flatten(0, 2)[index], index)
    labels = torch.from_numpy(arrays["label_in"])

    net.train()
    map_VHW, score_V = net.forward_train(_features(arrays), noise, stop_grad=not bool(labels.any()))
    target = defects | synthetic
    label_V = labels.repeat(2).bool() | synthetic.flatten(1).any(1)
    loss = total_loss(map_VHW, score_V, target, label_V, truncation=0.5, gamma=4.0).total
    loss.backward()
    yield _quantity("train_map", map_VHW, arrays["train_map"][:, 0])
    yield _quantity("train_score", score_V, arrays["train_score"])
    yield _quantity("train_mask", target, arrays["train_mask"][:, 0])
    yield _quantity("train_label", label_V, arrays["train_label"])
    yield _quantity("train_loss", loss, arrays["train_loss"])
    norms = {name: torch.zeros(()) if p.grad is None else p.grad.norm() for name, p in net.named_parameters()}
    yield _quantity("grad_total_norm", torch.stack(list(norms.values())).norm(), arrays["grad_total_norm"])
    for name, norm in norms.items():
        yield _quantity(f"grad_norm/{name}", norm, arrays[f"grad_norm/{published_name(variant, name)}"])
    for name, buffer in net.named_buffers():
        key = f"bn_after/{published_name(variant, name)}"
        if key in arrays:
            yield _quantity(f"bn_after/{name}", buffer, arrays[key])


def inference_quantities(case: str, arrays: dict[str, np.ndarray], net: SuperSimpleNet) -> Iterator[Quantity]:
    """Raw map, smoothed map at image size, and score."""
    net.eval()
    map_BHW, score_B = net(_features(arrays))
    full_BHW = image_map(map_BHW, (4 * map_BHW.shape[1], 4 * map_BHW.shape[2]))
    yield _quantity("eval_raw_map", map_BHW, arrays["eval_raw_map"][:, 0])
    if case.startswith("jims"):
        yield _quantity("eval_map_sigmoid", full_BHW.sigmoid(), arrays["eval_map_sigmoid"][:, 0])
        yield _quantity("eval_score_sigmoid", score_B.sigmoid(), arrays["eval_score_sigmoid"])
    else:
        yield _quantity("eval_map", full_BHW, arrays["eval_map"][:, 0])
        yield _quantity("eval_score", score_B, arrays["eval_score"])


def _features(arrays: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[layer]).permute(0, 2, 3, 1).contiguous() for layer in ("layer2", "layer3")]


def _quantity(name: str, actual: torch.Tensor, expected: np.ndarray) -> Quantity:
    return Quantity(name, actual.detach().double().numpy(), np.asarray(expected, np.float64))


def main(folder: Path) -> None:
    """Print a Markdown table; gradient norms that are zero but for rounding are left out."""
    errors: dict[str, dict[str, float]] = {}
    for case in CASES:
        for quantities in (training_quantities, inference_quantities):
            arrays, net = load_case(folder, case)
            for quantity in quantities(case, arrays, net):
                zero = quantity.name.startswith("grad_norm/") and quantity.expected < 1e-6 * arrays["grad_total_norm"]
                if not zero:
                    errors.setdefault(quantity.name, {})[case] = quantity.max_relative_error
    print("| quantity | " + " | ".join(CASES) + " |")
    print("|:---|" + "---:|" * len(CASES))
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(f"{row[case]:.1e}" if case in row else "—" for case in CASES) + " |")


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[3] / "shared" / "reference" / "golden"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
