"""What ``make bench`` compares is the same network on both sides, and what it measured is not lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ssn.losses import total_loss
from ssn.model import Noise
from tests.benchmarks.measure import Report, Result, Side, take_turns
from tests.benchmarks.our_side import Case, Scene, build_predictor, build_scene, predict, training_steps
from tests.benchmarks.peer import BACKBONES, main
from tests.tolerances import GOLDEN_RTOL, GRAD_NORM_ATOL_OF_TOTAL, GRAD_NORM_RTOL

if TYPE_CHECKING:
    from tests.benchmarks.anomalib_side import AnomalibSide

# anomalib's Perlin noise needs maps of at least 32 positions a side
CASE = Case("test_resnet", batch=2, side=128)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene(CASE)


@pytest.fixture(scope="module")
def peer(scene: Scene) -> AnomalibSide:
    pytest.importorskip("anomalib", reason="anomalib is not installed; pip install -e '.[bench]'")
    from tests.benchmarks.anomalib_side import AnomalibSide

    side = AnomalibSide(
        CASE.config.model,
        threshold=CASE.threshold,
        backbone_state=scene.backbone.net.state_dict(),
        heads_state=scene.build_net().state_dict(),
    )
    torch.manual_seed(0)
    side.training_step(scene.images_BCHW)  # batch norms that are not identities
    return side


class _GivenNoise(torch.nn.Module):
    """In place of anomalib's generator: noise and mask that we know."""

    def __init__(self, noise_VCHW: torch.Tensor, mask_V1HW: torch.Tensor) -> None:
        super().__init__()
        self.noise, self.mask = noise_VCHW, mask_V1HW

    def forward(self, input_features: Any, adapted_features: Any, masks: Any, labels: Any) -> Any:
        noisy = [torch.cat((x, x)) + self.noise for x in (input_features, adapted_features)]
        return *noisy, self.mask.float(), self.mask.flatten(1).any(1).float()


@pytest.mark.integration
def test_map_and_score_agree_with_anomalib(scene: Scene, peer: AnomalibSide) -> None:
    from tests.benchmarks.anomalib_side import check_agreement

    predictor = build_predictor(scene, peer.heads_state(), "fp32")
    ours, theirs = predict(predictor, scene.images_BCHW), peer.predict(scene.images_BCHW)
    check_agreement(ours, theirs)
    with pytest.raises(AssertionError, match="the two sides differ"):
        check_agreement((ours[0], ours[1] + 0.01), theirs)


@pytest.mark.integration
def test_training_agrees_with_anomalib(scene: Scene, peer: AnomalibSide, monkeypatch: pytest.MonkeyPatch) -> None:
    net = scene.build_net().train()
    net.load_state_dict(peer.heads_state())
    features = [torch.from_numpy(m).float() for m in exact_features(scene)]
    channels = sum(f.shape[3] for f in features)
    torch.manual_seed(1)
    mask_VHW = torch.rand(4, 32, 32) < 0.2
    rows_NC = 0.1 * torch.randn(int(mask_VHW.sum()), channels)
    noise_VHWC = torch.zeros(4, 32, 32, channels)
    noise_VHWC[mask_VHW] = rows_NC

    map_VHW, score_V = net.forward_train(
        features, Noise(rows_NC, mask_VHW.flatten().nonzero().squeeze(1)), stop_grad=True
    )
    loss = total_loss(map_VHW, score_V, mask_VHW, mask_VHW.flatten(1).any(1), truncation=0.5, gamma=4.0).total
    loss.backward()
    monkeypatch.setattr(peer.model, "anomaly_generator", _GivenNoise(noise_VHWC.permute(0, 3, 1, 2), mask_VHW[:, None]))
    monkeypatch.setattr(peer.optimizer, "step", lambda: None)
    assert peer.training_step(scene.images_BCHW) == pytest.approx(float(loss.detach()), rel=GOLDEN_RTOL)

    theirs = peer.gradient_norms()
    total = torch.tensor(list(theirs.values())).norm().item()
    for name, parameter in net.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert norm == pytest.approx(theirs[name], rel=GRAD_NORM_RTOL, abs=GRAD_NORM_ATOL_OF_TOTAL * total), name


def exact_features(scene: Scene) -> list[Any]:
    """Features in float32, which the cache rounds."""
    from tests.benchmarks.our_side import compute_features

    return [m.clone().numpy() for m in compute_features(scene.backbone, scene.images_BCHW)]


def test_a_step_changes_the_weights_with_and_without_the_cache() -> None:
    scene = build_scene(replace(CASE, side=64))
    steps = training_steps(scene, "bf16")
    assert list(steps) == ["cached", "no cache"]
    losses = [step() for step in steps.values()]
    assert len(set(losses)) == 2


def test_sides_take_turns_and_ratios_are_of_pairs() -> None:
    order: list[str] = []
    result = Result("row", comparisons=[("theirs", "ours")], rounds=2)
    seen: list[int] = []
    sides = [Side("theirs", lambda: order.append("t")), Side("ours", lambda: order.append("o"), repeat=2)]
    take_turns(sides, result, lambda r: seen.append(len(r.values["ours"])))
    assert "".join(order) == "to" + "too" + "oot"
    assert seen == [1, 2]
    assert result.complete

    result.values = {"theirs": [2.0, 9.0, 8.0], "ours": [1.0, 3.0, 1.0]}
    (line,) = result.summarise()
    assert (line["peer_median"], line["ours_median"], line["ratio"], line["pairs"]) == (8.0, 1.0, 3.0, 3)


def test_a_report_keeps_complete_rows_of_the_same_stamp(tmp_path: Path) -> None:
    stamp = {"cpu": "x", "cpu_features": [], "threads": 1, "cores": 1, "memory_gb": 1, "python": "3", "versions": {}}
    stamp["commit"] = "abc"
    out = tmp_path / "deep" / "bench"
    report = Report(out, stamp, resume=False)
    done = Result("done", comparisons=[("p", "o")], values={"p": [2.0], "o": [1.0]}, notes={"agreement": 1e-6})
    broken_off = Result("broken off", comparisons=[("p", "o")], values={"p": [2.0], "o": [1.0]}, rounds=5)
    report.update(done)
    report.update(broken_off)
    assert [row["complete"] for row in json.loads(out.with_suffix(".json").read_text())["rows"]] == [True, False]
    assert "| done | p | o | s | 2 | 1 | 2.00 |" in out.with_suffix(".md").read_text()
    assert "broken off (interrupted)" in out.with_suffix(".md").read_text()
    assert list(Report(out, stamp, resume=True).rows) == ["done"]
    assert not Report(out, {**stamp, "commit": "def"}, resume=True).rows
    assert not Report(out, stamp, resume=False).rows


def test_rows_are_selected_by_the_beginnings_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list", "--only", "train/resnet18,memory", "--backbone", "resnet18"])
    assert capsys.readouterr().out.split() == [
        "train/resnet18/batch8",
        "train/resnet18/batch32",
        "memory/resnet18/train",
        "memory/resnet18/infer",
    ]
    main(["--list", "--only", "infer/resnet18/batch1"])
    assert capsys.readouterr().out.split() == ["infer/resnet18/batch1"]
    main(["--list", "--data", "shards"])
    names = capsys.readouterr().out.split()
    assert {name.split("/")[0] for name in names} == {"train", "infer", "export", "memory", "growth", "heads", "epochs"}
    assert {name.split("/")[1] for name in names} == set(BACKBONES)
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "names no row" in capsys.readouterr().err
