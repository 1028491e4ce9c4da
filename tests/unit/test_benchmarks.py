"""What is compared with anomalib is the same network on both sides, and what was measured is not lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch

from ssn.data.ingest import ingest
from ssn.data.manifest import Manifest
from ssn.engine import EpochReport, fit
from ssn.errors import SSNError
from ssn.losses import total_loss
from ssn.metrics import image_metrics, pixel_metrics, stratified_counts
from ssn.model import Noise
from ssn.synthesis import perlin_masks
from tests import oracle
from tests.benchmarks import aupro_memory, peer_accuracy
from tests.benchmarks.accuracy import plain_formulation
from tests.benchmarks.measure import Report, Result, Side, take_turns
from tests.benchmarks.our_side import Case, Scene, build_predictor, build_scene, predict, training_steps
from tests.benchmarks.peer import BACKBONES, main
from tests.benchmarks.peer_accuracy import METRICS, Comparison, Outcome, PixelStatistics
from tests.planted_features import CONFIG, plant_features, with_train
from tests.raw_folders import write_mvtec
from tests.tolerances import FLOAT64_RTOL, GOLDEN_RTOL, GRAD_NORM_ATOL_OF_TOTAL, GRAD_NORM_RTOL, TRAINED_RTOL

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


def _outcome(seed: int, *, shift: float, num_normal: int = 5, num_defective: int = 7) -> Outcome:
    """A network that gives defects scores higher by ``shift``, ties included; images are the same for every seed."""
    number = num_normal + num_defective
    labels = np.arange(number) >= num_normal
    masks = np.zeros((number, 9, 11), bool)
    masks[num_normal:] = np.random.default_rng(0).random((num_defective, 9, 11)) < 0.15
    random = np.random.default_rng(seed)
    known = np.ones(number, bool)
    known[-1] = False
    masks[-1] = False
    return Outcome(
        ids=tuple(map(str, range(number))),
        labels_N=labels.astype(np.int64),
        scores_N=(random.normal(size=number) + shift * labels).round(1),
        maps_NHW=(random.normal(size=masks.shape) + shift * masks).round(1).astype(np.float32),
        masks_NHW=masks,
        known_N=known,
    )


@pytest.mark.parametrize("fpr_limit", [0.05, 0.3, 1.0])
def test_pixel_metrics_of_resamples_are_those_of_repeated_images(fpr_limit: float) -> None:
    outcome = _outcome(1, shift=1)
    known = outcome.known_N
    maps, masks = outcome.maps_NHW[known], outcome.masks_NHW[known]
    counts = stratified_counts(outcome.labels_N, 60, np.random.default_rng(2))[:, known]
    counts[0] = 1
    found = PixelStatistics(maps, masks).resampled(counts, fpr_limit)
    for resample, count in enumerate(counts):
        repeated = np.repeat(np.arange(len(maps)), count)
        expected = pixel_metrics(maps[repeated], masks[repeated], fpr_limit=fpr_limit).values
        for name, values in found.items():
            assert values[resample] == pytest.approx(expected[name], rel=FLOAT64_RTOL)


def test_differences_are_of_pairs() -> None:
    better = [_outcome(seed, shift=2.5) for seed in range(3)]
    worse = [_outcome(seed + 10, shift=0.3) for seed in range(3)]
    same = peer_accuracy.paired_differences(better, better, fpr_limit=0.3, resamples=50)
    assert set(same) == set(METRICS)
    for difference in same.values():
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
        assert difference.excludes_loss
    gain = peer_accuracy.paired_differences(better, worse, fpr_limit=0.3, resamples=200)
    loss = peer_accuracy.paired_differences(worse, better, fpr_limit=0.3, resamples=200)
    assert peer_accuracy.paired_differences(better, worse, fpr_limit=0.3, resamples=200) == gain
    for name in METRICS:
        assert gain[name].low < gain[name].mean < gain[name].high
        assert gain[name].mean > 0.1
        assert (gain[name].excludes_loss, loss[name].excludes_loss) == (True, False)
        mirrored = (-loss[name].mean, -loss[name].high, -loss[name].low)
        assert mirrored == pytest.approx((gain[name].mean, gain[name].low, gain[name].high), abs=1e-12)
    (own,), (their,) = better[:1], worse[:1]
    expected = image_metrics(own.scores_N, own.labels_N).values["image_auroc"]
    assert own.metrics(0.3)["image_auroc"] == expected
    alone = peer_accuracy.paired_differences([own], [their], fpr_limit=0.3, resamples=10)["image_auroc"]
    assert alone.mean == expected - their.metrics(0.3)["image_auroc"]


def test_seeds_are_resampled_too() -> None:
    """Two pairs of runs on the same scores but for a swap of sides: each image resample gives opposite differences."""
    one, other = _outcome(1, shift=3), _outcome(2, shift=0)
    found = peer_accuracy.paired_differences([one, other], [other, one], fpr_limit=0.3, resamples=400)
    alone = peer_accuracy.paired_differences([one], [other], fpr_limit=0.3, resamples=400)
    for name in METRICS:
        assert found[name].mean == pytest.approx(0, abs=1e-12)
        assert found[name].high == pytest.approx(-found[name].low, abs=0.15)
        assert found[name].high > alone[name].mean / 2


def test_sides_that_do_not_pair_are_refused() -> None:
    one, fewer = _outcome(1, shift=1), _outcome(1, shift=1, num_normal=4)
    for theirs in ([one, one], [fewer]):
        with pytest.raises(ValueError, match="same seeds and the same images"):
            peer_accuracy.paired_differences([one], theirs, fpr_limit=0.3)


def test_outcomes_are_kept_with_their_settings(tmp_path: Path) -> None:
    outcome, file = _outcome(1, shift=1), tmp_path / "ours-seed0.npz"
    peer_accuracy.write_outcome(file, outcome, {"epochs": 3, "batch": 8})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    kept = peer_accuracy.read_outcome(file, {"epochs": 3, "batch": 8})
    assert (kept.ids, kept.metrics(0.3)) == (outcome.ids, outcome.metrics(0.3))
    for name in ("labels_N", "scores_N", "maps_NHW", "masks_NHW", "known_N"):
        assert np.array_equal(getattr(kept, name), getattr(outcome, name))
    with pytest.raises(SSNError, match=r"ours-seed0.npz was made with epochs 3, not 12; choose another --out"):
        peer_accuracy.read_outcome(file, {"epochs": 12, "batch": 8})


def test_table_says_what_is_excluded() -> None:
    outcomes = {
        "ours": [_outcome(seed, shift=0.3) for seed in range(3)],
        "anomalib": [_outcome(seed + 10, shift=2.5) for seed in range(3)],
    }
    table = peer_accuracy.summarise(outcomes, fpr_limit=0.3, resamples=100)  # type: ignore[arg-type]
    for row in table.values():
        assert row["ours"]["mean"] == pytest.approx(np.mean(row["ours"]["values"]))
        assert row["difference"] == pytest.approx(row["ours"]["mean"] - row["anomalib"]["mean"])
    settings = {
        "dataset": "d",
        "category": "c",
        "backbone": "b",
        "size": 64,
        "epochs": 1,
        "batch": 8,
        "sigma": 0.25,
        "draws": "own",
    }
    settings["anomalib"] = "2.7.0"
    content = {
        "settings": settings,
        "counts": {"train": 48, "normal": 5, "defective": 7},
        "seeds": [0, 1, 2],
        "metrics": json.loads(json.dumps(table)),
    }
    lines = peer_accuracy.to_markdown(content).splitlines()
    assert "64 x 64 pixels, unsupervised: 48 training images" in lines[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| image_auroc")]
    row = table["image_auroc"]
    assert rows[0][1] == f"{100 * row['ours']['mean']:.1f} ± {100 * np.std(row['ours']['values'], ddof=1):.1f}"
    assert rows[0][3:] == [
        f"{100 * row['difference']:+.1f}",
        f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
        "no",
    ]


def test_accuracy_needs_anomalib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peer_accuracy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        peer_accuracy.main(["--data", "shards", "--weights", "random", "--out", "out"])
    assert "anomalib is not installed" in capsys.readouterr().err


@pytest.mark.integration
def test_both_sides_are_trained_scored_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("anomalib", reason="anomalib is not installed; pip install -e '.[bench]'")
    write_mvtec(tmp_path / "raw", train=4, test_good=5, defects={"dent": 5})
    ingest(Manifest(name="bench", layout="mvtec"), tmp_path / "raw", str(tmp_path / "shards"))
    arguments = ["--data", str(tmp_path / "shards"), "--dataset", "bench", "--category", "widget"]
    arguments += ["--weights", "random", "--seeds", "1", "--batch", "4", "--resamples", "20"]
    arguments += ["--out", str(tmp_path / "out")]
    peer_accuracy.main([*arguments, "--epochs", "2"])
    said = capsys.readouterr()
    assert said.err.count("epoch 2 of 2, loss") == 2
    assert said.out == (tmp_path / "out" / "results.md").read_text()
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result["metrics"]) == set(METRICS)
    with np.load(tmp_path / "out" / "ours-seed0.npz") as ours, np.load(tmp_path / "out" / "anomalib-seed0.npz") as peer:
        assert ours["ids"].tolist() == peer["ids"].tolist()
        # the same steps on the same draws: what is left is rounding
        np.testing.assert_allclose(ours["maps"], peer["maps"], atol=1e-3 * np.abs(ours["maps"]).max())
    own = tmp_path / "own"
    peer_accuracy.main([*arguments[:-1], str(own), "--epochs", "2", "--draws", "own"])
    with np.load(own / "ours-seed0.npz") as ours, np.load(own / "anomalib-seed0.npz") as peer:
        assert np.abs(ours["maps"] - peer["maps"]).max() > 1e-2 * np.abs(ours["maps"]).max()
    capsys.readouterr()

    def run_again(*_: Any) -> None:
        raise AssertionError("trained what it had already")

    monkeypatch.setattr(Comparison, "run", run_again)
    peer_accuracy.main([*arguments, "--epochs", "2"])
    assert capsys.readouterr().out == said.out
    with pytest.raises(SSNError, match="made with epochs 2, not 3"):
        peer_accuracy.main([*arguments, "--epochs", "3"])


def test_both_ways_of_counting_pixels_agree() -> None:
    split = aupro_memory.Split(images=6, height=30, width=40, defective=2)
    drawn = list(split.draw())
    assert sum(bool(mask.any()) for _, mask in drawn) == 2
    ours, plain = aupro_memory.score_ours(split), aupro_memory.score_plainly(split)
    assert set(ours) == {"pixel_auroc", "pixel_ap", "aupro"}
    assert ours["pixel_auroc"] == pytest.approx(plain["pixel_auroc"], rel=FLOAT64_RTOL)


@pytest.mark.integration
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    split = aupro_memory.Split(images=40, height=232, width=640, defective=2)
    ours, plain = (aupro_memory.measure(side, split) for side in aupro_memory.SIDES)
    assert ours["metrics"] == aupro_memory.score_ours(split)
    pixels = 40 * 232 * 640
    assert plain["peak_bytes"] > 5 * pixels  # maps and masks alone
    assert 4 * pixels < ours["peak_bytes"] < plain["peak_bytes"]  # smaller than a block
    assert ours["duration_s"] > 0


def test_masks_are_drawn_as_anomalib_draws_them(peer: AnomalibSide) -> None:
    """Shared draws in comparisons are ours, and would hide another distribution."""
    count, side = 1500, 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs_NHW = peer.model.anomaly_generator.generate_perlin(count, side, side)[:, 0].bool()
    keys = np.stack([np.zeros(count), np.zeros(count), np.arange(count), np.zeros(count), np.zeros(count)], 1)
    ours_NHW = perlin_masks(
        keys.astype(np.int64), (side, side), threshold=peer.model.anomaly_generator.threshold, rescale_empty=True
    )

    def describe(masks_NHW: torch.Tensor) -> np.ndarray:
        """By mask: whether it is empty, the share of its positions, and of its vertical and horizontal borders."""
        borders = [(masks_NHW.diff(dim=dim) != 0).flatten(1).float().mean(1) for dim in (1, 2)]
        share_N = masks_NHW.flatten(1).float().mean(1)
        return torch.stack([(share_N == 0).float(), share_N, share_N**2, *borders], 1).numpy()

    ours, theirs = describe(ours_NHW), describe(theirs_NHW)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert np.abs(ours.mean(0) - theirs.mean(0)) / error == pytest.approx(0, abs=4)


def test_training_in_the_plain_formulation_comes_to_the_same() -> None:
    config, features = with_train(CONFIG, epochs=1), plant_features()
    reports: list[EpochReport] = []
    fit(config, features, report=lambda report, save: reports.append(report))
    with mock.patch.object(oracle, "forward_train", wraps=oracle.forward_train) as plain, plain_formulation():
        fit(config, features, report=lambda report, save: reports.append(report))
    assert plain.call_count > 0
    assert reports[1].metrics["train_loss"] == pytest.approx(reports[0].metrics["train_loss"], rel=TRAINED_RTOL)
    assert reports[1].metrics["val_loss"] == pytest.approx(reports[0].metrics["val_loss"], rel=TRAINED_RTOL)
