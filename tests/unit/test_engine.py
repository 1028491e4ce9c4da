"""Training and validation on features that are drawn, not computed: no images, no backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssn import engine
from ssn.bundle import OPTIMIZER_PREFIX
from ssn.checkpoint import load_checkpoint
from ssn.config import Config
from ssn.data.sampling import epoch_draws
from ssn.engine import EpochReport, Trainer, choose_supervision, evaluation_maps, fit, learning_rate_factor
from ssn.errors import SSNError
from ssn.features import CategoryFeatures
from ssn.losses import total_loss
from ssn.metrics import pixel_metrics
from ssn.model import SuperSimpleNet
from tests.planted_features import CONFIG, EVAL_SIZE, plant_features, with_train


def run(
    config: Config, features: CategoryFeatures, *, save_to: Path | None = None, save_at: int = 0, **options: Any
) -> tuple[Trainer, list[EpochReport]]:
    reports: list[EpochReport] = []

    def report(epoch: EpochReport, save: Callable[..., None]) -> None:
        reports.append(epoch)
        if save_to is not None and epoch.epoch == save_at:
            save(save_to)

    return fit(config, features, report=report, **options), reports


def same_numbers(a: EpochReport, b: EpochReport) -> bool:
    """Equal but for how long it took."""
    return {k: v for k, v in a.metrics.items() if "duration" not in k} == {
        k: v for k, v in b.metrics.items() if "duration" not in k
    } and (a.epoch, a.undefined) == (b.epoch, b.undefined)


def assert_same_state(a: Trainer, b: Trainer) -> None:
    for (name, x), y in zip(a.net.state_dict().items(), b.net.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    for index, state in a.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b.optimizer.state_dict()["state"][index][name]), (index, name)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_planted_defects_become_detectable(ratio: float) -> None:
    config = with_train(CONFIG, epochs=20, supervision_ratio=ratio)
    _, reports = run(config, plant_features(train=16, pool=2))
    losses = [r.metrics["train_loss"] for r in reports]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    last = reports[-1].metrics
    assert last["val_loss"] < 0.7 * reports[0].metrics["val_loss"]
    assert last["val_image_auroc"] == 1
    assert last["val_pixel_auroc"] > 0.95


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_equal_seeds_give_equal_numbers(ratio: float) -> None:
    config = with_train(CONFIG, supervision_ratio=ratio)
    torch.manual_seed(1)
    first, reports = run(config, plant_features())
    torch.manual_seed(2)  # the global generator has no say
    np.random.seed(2)
    second, again = run(config, plant_features())
    assert all(map(same_numbers, reports, again))
    assert_same_state(first, second)
    other, _ = run(with_train(config, train_seed=1), plant_features())
    assert not torch.equal(first.net.seg_out.weight, other.net.seg_out.weight)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("epoch", [1, 4])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, ratio: float, epoch: int) -> None:
    """Epoch 4 of 5 is past the first milestone of the learning rate."""
    config = with_train(CONFIG, epochs=5, supervision_ratio=ratio)
    features = plant_features()
    whole, reports = run(config, features, save_to=tmp_path / "checkpoint", save_at=epoch)
    resumed, rest = run(config, features, resume_from=tmp_path / "checkpoint")
    assert [r.epoch for r in rest] == list(range(epoch + 1, 6))
    assert all(map(same_numbers, reports[epoch:], rest))
    assert_same_state(whole, resumed)
    assert rest[-1].metrics["duration_s"] > reports[epoch - 1].metrics["duration_s"]


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    features = plant_features()
    whole, _ = run(CONFIG, features, save_to=tmp_path / "checkpoint", save_at=CONFIG.train.epochs)
    resumed, rest = run(CONFIG, features, resume_from=tmp_path / "checkpoint")
    assert rest == []
    assert_same_state(whole, resumed)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    features = plant_features()
    run(CONFIG, features, save_to=tmp_path / "checkpoint", save_at=1)
    with pytest.raises(SSNError, match=r"belongs to another configuration or backbone; start afresh$"):
        run(with_train(CONFIG, train_seed=1), features, resume_from=tmp_path / "checkpoint")
    with pytest.raises(SSNError, match=r"belongs to another configuration or backbone; start afresh$"):
        run(CONFIG, replace(features, backbone_digest="e" * 64), resume_from=tmp_path / "checkpoint")


def test_model_without_the_optimiser(tmp_path: Path) -> None:
    """What a finished trial leaves behind: no optimiser, and what the heads belong to."""
    features = replace(plant_features(), backbone_calibration={"bn1.running_mean": np.ones(3, np.float32)})
    trainer = Trainer(CONFIG, features)
    trainer.run_epoch()
    trainer.save(tmp_path / "resumable")
    trainer.save(tmp_path / "model", resumable=False)
    resumable, model = (load_checkpoint(tmp_path / name) for name in ("resumable", "model"))
    assert any(name.startswith(OPTIMIZER_PREFIX) for name in resumable.tensors)
    assert not any(name.startswith(OPTIMIZER_PREFIX) for name in model.tensors)
    assert set(model.tensors) == {*trainer.net.state_dict(), "backbone_calibration.bn1.running_mean"}
    assert model.config == CONFIG.resolved()
    assert model.meta["backbone_digest"] == features.backbone_digest
    assert (model.meta["dataset"], model.meta["category"]) == ("made_up", "plate")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (10, [1] * 8 + [0.4, 0.16]),
        (300, [1] * 240 + [0.4] * 30 + [0.16] * 30),
        (7, [1] * 5 + [0.4, 0.16]),
        (1, [0.16]),
    ],
)
def test_learning_rate_falls_after_80_and_90_percent(epochs: int, expected: list[float]) -> None:
    assert [learning_rate_factor(e, epochs, 0.4) for e in range(epochs)] == pytest.approx(expected)


def test_reported_learning_rate_is_the_one_used() -> None:
    config = with_train(CONFIG, epochs=10)
    trainer, reports = run(config, plant_features(train=2, pool=0))
    rates = [r.metrics["lr_heads"] for r in reports]
    assert rates == pytest.approx([2e-3] * 8 + [0.8e-3, 0.32e-3])
    adaptor, heads = trainer.optimizer.param_groups
    assert (adaptor["lr"], heads["lr"]) == pytest.approx((0.16e-3, 0.32e-3))
    assert (adaptor["weight_decay"], heads["weight_decay"]) == (1e-2, 1e-5)


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Records the features, ground truth and flags of every step."""
    seen: dict[str, list[Any]] = {"stop_grad": [], "clip": [], "features": [], "truth": [], "noise_dtype": []}
    forward, merge, clip = SuperSimpleNet.forward_train, engine.merge_masks, torch.nn.utils.clip_grad_norm_

    def spy_forward(net: SuperSimpleNet, features: list[Tensor], noise: Any, **options: Any) -> Any:
        seen["features"].append(features[0].clone())
        seen["stop_grad"].append(options["stop_grad"])
        seen["noise_dtype"].append(options["noise_dtype"])
        return forward(net, features, noise, **options)

    def spy_merge(truth: Tensor, synthetic: Tensor) -> Any:
        seen["truth"].append(truth.clone())
        return merge(truth, synthetic)

    def spy_clip(parameters: Any, max_norm: float) -> Any:
        seen["clip"].append(max_norm)
        return clip(parameters, max_norm)

    monkeypatch.setattr(SuperSimpleNet, "forward_train", spy_forward)
    monkeypatch.setattr(engine, "merge_masks", spy_merge)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    return seen


def test_unsupervised_training_stops_gradients_and_neither_clips_nor_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    trainer = Trainer(CONFIG, plant_features())
    trainer.run_epoch()
    assert not trainer.supervision.supervised
    assert set(seen["stop_grad"]) == {True}
    assert seen["clip"] == []
    assert set(seen["noise_dtype"]) == {torch.float32}
    assert not torch.cat(seen["truth"]).any()


def test_supervised_training_clips_and_flips_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    features = plant_features(pool=2)
    # a view's features are its number, and its mask marks the position of that number
    pool = features.pool
    views = len(pool.masks_VHW)
    coded = np.full_like(pool.maps_VhwC[0], 0) + 100 + np.arange(views)[:, None, None, None].astype("f4")
    masks = np.zeros_like(pool.masks_VHW)
    masks.reshape(views, -1)[np.arange(views), np.arange(views)] = True
    features = replace(features, pool=replace(pool, maps_VhwC=(coded, *pool.maps_VhwC[1:]), masks_VHW=masks))
    trainer = Trainer(with_train(CONFIG, supervision_ratio=1, grad_clip_norm=0.25), features)
    trainer.run_epoch()
    steps = 8 * 2 // CONFIG.train.batch_size  # 8 draws per labelled defect
    assert seen["clip"] == [0.25] * steps
    assert seen["stop_grad"] == [False] * steps
    drawn = torch.cat(seen["features"]).amax((1, 2, 3))
    truth = torch.cat(seen["truth"]).flatten(1)
    defective = drawn >= 100
    assert defective.sum() == len(drawn) // 2
    assert not truth[~defective].any()
    view = (drawn[defective] - 100).long()
    assert torch.equal(truth[defective].nonzero()[:, 1], view), "a mask comes with the features of its own flip"
    draws = epoch_draws(8, 2, 2, draws_per_epoch=None, seed=0, epoch=0)
    assert view.tolist() == (draws.index * 4 + draws.flip)[draws.is_defect].tolist()
    assert len(set((view % 4).tolist())) > 1


def test_only_the_chosen_share_of_the_pool_is_drawn() -> None:
    features = plant_features(pool=8)
    config = with_train(CONFIG, supervision_ratio=0.5)
    used = choose_supervision(config, features.pool).used
    assert len(used) == 4
    unused = np.setdiff1d(np.arange(8), used)
    poisoned = tuple(m.copy() for m in features.pool.maps_VhwC)
    for m in poisoned:
        for which in range(4):
            m[unused * 4 + which] = np.nan
    with_nan = replace(features, pool=replace(features.pool, maps_VhwC=poisoned))
    expected, _ = run(config, features)
    actual, _ = run(config, with_nan)
    assert_same_state(expected, actual)


def test_ratio_zero_never_reads_the_pool() -> None:
    """Its size alone counts: it sets the number of draws, so that all ratios take equally many steps."""
    features = plant_features(pool=3)
    poisoned = tuple(np.full_like(m, np.nan) for m in features.pool.maps_VhwC)
    masks = np.ones_like(features.pool.masks_VHW)
    poison = replace(features, pool=replace(features.pool, maps_VhwC=poisoned, masks_VHW=masks))
    expected, reports = run(CONFIG, features)
    actual, again = run(CONFIG, poison)
    assert_same_state(expected, actual)
    assert all(map(same_numbers, reports, again))


def test_no_two_views_of_a_run_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    draw = engine.perlin_masks

    def spy(keys: np.ndarray, *arguments: Any, **options: Any) -> Tensor:
        seen.append(keys.copy())
        return draw(keys, *arguments, **options)

    monkeypatch.setattr(engine, "perlin_masks", spy)
    run(with_train(CONFIG, train_seed=11, supervision_ratio=1), plant_features(train=3, pool=2))
    keys = np.concatenate(seen)
    assert len(np.unique(keys, axis=0)) == len(keys) == 2 * 3 * 16  # views, epochs, draws
    assert set(keys[:, 0]) == {11}
    assert sorted(set(keys[:, 1])) == [0, 1, 2]


def test_bf16_noise_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    Trainer(with_train(CONFIG, noise_precision="bf16"), plant_features()).run_epoch()
    assert set(seen["noise_dtype"]) == {torch.bfloat16}


def test_defective_validation_images_without_masks_say_nothing_of_positions() -> None:
    features = plant_features(validation=(5, 4), validation_masks=2)
    trainer = Trainer(CONFIG, features)
    trainer.run_epoch()
    loss, metrics = trainer.validate(pixel=True)

    split = features.validation
    with torch.no_grad():
        map_NHW, score_N = trainer.net([torch.from_numpy(m) for m in split.maps_VhwC])
    known = np.array([True] * 7 + [False] * 2)
    masks, labels = torch.from_numpy(split.masks_VHW), torch.from_numpy(split.labels_N)
    on_known = total_loss(map_NHW[known], score_N[known], masks[known], labels[known], truncation=0.5, gamma=4.0)
    on_all = total_loss(map_NHW, score_N, masks, labels, truncation=0.5, gamma=4.0)
    assert loss == pytest.approx(float(on_known.map_l1 + on_known.map_focal + on_all.score_focal), rel=1e-5)
    assert loss != pytest.approx(float(on_all.total), rel=1e-5)
    maps = evaluation_maps(map_NHW[known], CONFIG.data.image_size, EVAL_SIZE).numpy()
    expected = pixel_metrics(maps, split.eval_masks_N[known], fpr_limit=0.3)
    assert {k: metrics.values[k] for k in expected.values} == pytest.approx(expected.values, rel=1e-5)
    assert set(metrics.values) >= {"image_auroc", "pixel_auroc", "pixel_ap", "aupro"}


def test_validation_does_not_depend_on_batch_size() -> None:
    features = plant_features()
    results = []
    for batch_size in (1, 3, 100):
        trainer = Trainer(replace(CONFIG, eval=replace(CONFIG.eval, batch_size=batch_size)), features)
        loss, metrics = trainer.validate(pixel=True)
        results.append({"loss": loss, **metrics.values})
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(
    ("validation", "masks", "absent"),
    [
        ((5, 0), 0, ["image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro"]),
        ((0, 3), 3, ["image_auroc", "image_ap", "image_f1_max"]),
        ((5, 3), 0, ["pixel_auroc", "pixel_ap", "aupro"]),
    ],
)
def test_undefined_metrics_are_absent_with_a_reason(validation: tuple[int, int], masks: int, absent: list[str]) -> None:
    config = with_train(CONFIG, epochs=1)
    _, (report,) = run(config, plant_features(validation=validation, validation_masks=masks))
    for name in absent:
        assert f"val_{name}" not in report.metrics
        assert report.undefined[f"val_{name}"]
    assert not set(report.metrics) & set(report.undefined)
    assert all(math.isfinite(v) for v in report.metrics.values())


def test_empty_validation_split_is_refused() -> None:
    with pytest.raises(SSNError, match="plate has an empty validation split; ingest more images"):
        run(CONFIG, plant_features(validation=(0, 0)))


def test_reports_come_every_epoch_with_pixel_metrics_when_asked_for() -> None:
    _, reports = run(with_train(CONFIG, epochs=4), plant_features(), pixel_epochs=(2, 9))
    assert [r.epoch for r in reports] == [1, 2, 3, 4]
    always = {"train_loss", "val_loss", "lr_heads", "val_image_auroc", "val_image_ap", "val_image_f1_max"}
    always |= {"train_duration_s", "epoch_duration_s", "duration_s"}
    for report in reports:
        assert set(report.metrics) >= always
        assert ("val_pixel_ap" in report.metrics) == (report.epoch in (2, 4))
        assert report.metrics["train_duration_s"] <= report.metrics["epoch_duration_s"]
    totals = np.cumsum([r.metrics["epoch_duration_s"] for r in reports])
    assert [r.metrics["duration_s"] for r in reports] == pytest.approx(totals)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_loss_that_is_not_finite_ends_the_run() -> None:
    features = plant_features()
    broken = tuple(np.full_like(m, np.inf) for m in features.train.maps_VhwC)
    features = replace(features, train=replace(features.train, maps_VhwC=broken))
    with pytest.raises(SSNError, match=r"^the training loss became nan in epoch 1 \(noise_sigma 0\.5\); lower"):
        run(CONFIG, features)


def test_evaluation_maps_are_resized_after_smoothing() -> None:
    map_BHW = torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(0))
    same = evaluation_maps(map_BHW, (48, 40), (48, 40))
    resized = evaluation_maps(map_BHW, (48, 40), (24, 20))
    assert same.shape == (2, 48, 40)
    # halving bilinearly is the mean over 2 x 2
    torch.testing.assert_close(resized, torch.nn.functional.avg_pool2d(same, 2))
