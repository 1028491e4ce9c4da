"""Training and validation on features that are drawn, not computed: no images, no backbone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssn import engine, model
from ssn.bundle import OPTIMIZER_PREFIX
from ssn.checkpoint import load_checkpoint
from ssn.config import Config
from ssn.data.sampling import epoch_draws, official_draws, supervised_subset
from ssn.engine import (
    EpochReport,
    Trainer,
    choose_supervision,
    evaluation_maps,
    fit,
    learning_rate_factor,
    missing_labels,
)
from ssn.errors import SSNError
from ssn.features import NUM_FLIPS, CategoryFeatures
from ssn.losses import total_loss
from ssn.metrics import pixel_metrics
from ssn.model import Noise, SuperSimpleNet
from ssn.synthesis import feature_noise, perlin_masks
from tests import oracle
from tests.planted_features import CHANNELS, CONFIG, EVAL_SIZE, MAP_SIZE, plant_features, with_train
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL, GRAD_NORM_ATOL_OF_TOTAL, GRAD_NORM_RTOL, TRAINED_RTOL


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"supervision_ratio": 1.0},
        {"supervision_ratio": 0.5, "weak_labels": "use"},
        {"supervision_ratio": 1.0, "sampling": "official"},
    ],
)
@pytest.mark.parametrize("epoch", [1, 4])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, settings: dict[str, Any], epoch: int) -> None:
    """Epoch 4 of 5 is past the first milestone of the learning rate."""
    config = with_train(CONFIG, epochs=5, **settings)
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
    draws = epoch_draws(8, 2, 2, num_flips=4, draws_per_epoch=None, seed=0, epoch=0)
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


def test_validation_is_looked_at_when_it_is_due_and_changes_nothing() -> None:
    config = with_train(CONFIG, epochs=7)
    _, every = run(config, plant_features(), pixel_epochs=(2,))
    _, some = run(replace(config, eval=replace(config.eval, every_n_epochs=3)), plant_features(), pixel_epochs=(2,))
    assert [r.epoch for r in some] == [1, 2, 3, 4, 5, 6, 7]
    for full, report in zip(every, some, strict=True):
        assert report.metrics["train_loss"] == full.metrics["train_loss"]
        looked = {name for name in report.metrics if name.startswith("val_")}
        if report.epoch in (2, 3, 6, 7):
            assert {name: report.metrics[name] for name in looked} == {
                name: value for name, value in full.metrics.items() if name.startswith("val_")
            }
        else:
            assert not looked
            assert not report.undefined


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


# The four regimes of supervision.

REGIMES = {
    "unsupervised": {"supervision_ratio": 0.0, "weak_labels": "drop"},
    "weak": {"supervision_ratio": 0.0, "weak_labels": "use"},
    "mixed": {"supervision_ratio": 0.5, "weak_labels": "use"},
    "partial": {"supervision_ratio": 0.5, "weak_labels": "drop"},
    "full": {"supervision_ratio": 1.0, "weak_labels": "drop"},
}


@pytest.mark.parametrize("variant", ["icpr", "jims"])
@pytest.mark.parametrize("regime", REGIMES)
def test_step_is_the_papers_loss_on_the_plain_network(regime: str, variant: Any) -> None:
    """One batch of normal, masked and weakly labelled images: loss, gradients and batch-norm statistics."""
    config = replace(
        with_train(CONFIG, **REGIMES[regime], batch_size=100, grad_clip_norm=1e9),
        model=replace(CONFIG.model, variant=variant),
    ).resolved()
    features = plant_features(train=4, pool=5, pool_masks=4, seed=3)
    features.pool.masks_VHW[:8] = False  # the masks of two images mark no position of the smaller map
    trainer = Trainer(config, features)
    plain = (
        SuperSimpleNet(features.channels, config.model, generator_seed=config.train.train_seed)
        .double()
        .train()
        .requires_grad_(True)
    )
    gains = [1.0]  # by which batch norms scale up a gradient's rounding errors
    for norm in (plain.seg_bn, plain.cls_bn):
        norm.register_forward_hook(
            lambda _, inputs, __: gains.append(float(inputs[0].detach().var((0, 2, 3)).min() + 1e-5) ** -0.5)
        )
    loss = trainer.run_epoch()

    pool, train = features.pool, config.train
    chosen = supervised_subset(pool.defect_types, pool.has_mask_N.tolist(), pool.ids, train.supervision_ratio, 0)
    masked = set(chosen.tolist())
    weak = set(range(5)) - masked if train.weak_labels == "use" else set()
    drawn = sorted(masked | weak)
    draws = epoch_draws(4, 4, len(drawn), num_flips=4, draws_per_epoch=None, seed=0, epoch=0)
    views, truth, is_weak, keys = [], [], [], []
    for is_defect, index, which, occurrence in zip(*vars(draws).values(), strict=True):
        split, image = (pool, drawn[index]) if is_defect else (features.train, index)
        view = image * split.num_flips + which
        views.append([m[view] for m in split.maps_VhwC])
        truth.append(split.masks_VHW[view] & (not is_defect or image in masked))
        is_weak.append(is_defect and image in weak)
        keys.append([train.train_seed, 0, int(split.ids[image][:15], 16), occurrence])
    assert any(is_weak) == bool(weak)
    defect_V = torch.from_numpy(draws.is_defect).repeat(2)
    maps = [torch.from_numpy(np.stack(layer)).double() for layer in zip(*views, strict=True)]
    truth_V = torch.from_numpy(np.stack(truth * 2))
    weak_V = torch.tensor(is_weak * 2)
    keys_V = np.array([[*key, half] for half in (0, 1) for key in keys])
    synthetic_V = perlin_masks(keys_V, MAP_SIZE, threshold=0.2, rescale_empty=variant == "jims")
    synthetic_V[weak_V] = False
    noisy_V = synthetic_V & ~truth_V
    rows_NC = feature_noise(keys_V, noisy_V, sum(CHANNELS), 0.5).double()
    noise = Noise(rows_NC, noisy_V.flatten().nonzero().squeeze(1))
    supervised = regime != "unsupervised"
    map_V, score_V = oracle.forward_train(plain, maps, noise, stop_grad=not supervised)

    # the losses of the papers' code, on what is left when weakly labelled images are taken out
    mask_V = (synthetic_V | truth_V)[~weak_V]
    map_known = map_V[~weak_V]
    marked_V = (synthetic_V | truth_V).flatten(1).any(1)
    label_V = marked_V | defect_V
    assert bool((defect_V & ~marked_V & ~weak_V).any()) == bool(masked & {0, 1})

    def focal(logits: Tensor, targets: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        p_t = torch.where(targets, p, 1 - p)
        return (-((1 - p_t) ** 4) * p_t.log()).mean()

    expected = torch.clip(map_known[~mask_V] + 0.5, min=0).mean() + torch.clip(0.5 - map_known[mask_V], min=0).mean()
    expected = expected + focal(map_known, mask_V) + focal(score_V, label_V)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected.detach()), rel=FLOAT32_RTOL)
    total = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    for (name, ours), theirs in zip(trainer.net.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        assert (ours.grad is None) == (not ours.requires_grad)
        allowed = GRAD_NORM_RTOL * theirs.grad.norm() + GRAD_NORM_ATOL_OF_TOTAL * max(gains) * total
        actual = torch.zeros_like(theirs.grad) if ours.grad is None else ours.grad
        assert (actual - theirs.grad).norm() <= allowed, name
    for ours_bn, theirs_bn in ((trainer.net.seg_bn, plain.seg_bn), (trainer.net.cls_bn, plain.cls_bn)):
        # over all views, weakly labelled ones included
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(ours_bn, name), getattr(theirs_bn, name).float(), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL
            )


def test_regimes_use_the_images_that_they_say() -> None:
    pool = plant_features(pool=5, pool_masks=4).pool
    counts = {}
    for regime, settings in REGIMES.items():
        found = choose_supervision(with_train(CONFIG, **settings), pool)
        assert not set(found.used) & set(found.weak)
        assert found.drawn.tolist() == sorted([*found.used, *found.weak])
        assert found.supervised == (regime != "unsupervised")
        counts[regime] = (len(found.used), len(found.weak))
    assert counts == {"unsupervised": (0, 0), "weak": (0, 5), "mixed": (2, 3), "partial": (2, 0), "full": (4, 0)}


def test_all_regimes_of_a_category_take_equally_many_steps() -> None:
    """Images without masks, which weak labels bring in, do not lengthen an epoch either."""
    features = plant_features(train=8, pool=6, pool_masks=3)
    lengths = {name: len(Trainer(with_train(CONFIG, **s), features)._draw(0).index) for name, s in REGIMES.items()}
    assert set(lengths.values()) == {24}


@pytest.mark.parametrize("regime", ["weak", "mixed"])
@pytest.mark.parametrize("sampling", ["balanced", "official"])
def test_masks_of_weakly_labelled_images_do_not_leak(regime: str, sampling: str) -> None:
    config = with_train(CONFIG, **REGIMES[regime], sampling=sampling)
    features = plant_features(pool=6)
    weak = choose_supervision(config, features.pool).weak
    masks = features.pool.masks_VHW.copy()
    views = (weak[:, None] * 4 + np.arange(4)).ravel()
    masks[views] = np.random.default_rng(0).random((len(views), *MAP_SIZE)) < 0.5
    other = replace(features, pool=replace(features.pool, masks_VHW=masks))
    expected, reports = run(config, features)
    actual, again = run(config, other)
    assert_same_state(expected, actual)
    assert all(map(same_numbers, reports, again))
    # which would show: a mask that is used does make a difference
    used = with_train(config, supervision_ratio=1.0)
    assert not torch.equal(run(used, features)[0].net.seg_out.weight, run(used, other)[0].net.seg_out.weight)


def test_weak_training_clips_flips_and_lets_gradients_through_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    trainer = Trainer(with_train(CONFIG, **REGIMES["weak"]), plant_features(pool=3, pool_masks=0))
    draws = trainer._draw(0)
    assert len(set(draws.flip[draws.is_defect])) > 1
    trainer.run_epoch()
    assert set(seen["stop_grad"]) == {False}
    assert set(seen["clip"]) == {1.0}
    assert not torch.cat(seen["truth"]).any()


def test_score_loss_of_weakly_labelled_images_reaches_the_segmentation_head() -> None:
    """Its only way to learn from them: their positions are in neither map loss."""
    features = plant_features(train=1, pool=1, pool_masks=0)
    trainer = Trainer(with_train(CONFIG, **REGIMES["weak"]), features)
    trainer.net.train()
    maps = [m.float() for m in features.pool.gather(np.array([0]), torch.device("cpu"))]
    none = Noise(torch.zeros(0, sum(CHANNELS)), torch.zeros(0, dtype=torch.long))
    map_VHW, score_V = trainer.net.forward_train(maps, none, stop_grad=False)
    weight = torch.zeros(2, 1, 1)
    loss = total_loss(map_VHW, score_V, map_VHW > 9, torch.ones(2), truncation=0.5, gamma=4.0, weight_BHW=weight)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.map_l1 == loss.map_focal == 0
    assert trainer.net.seg_out.weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_pool_without_masks_is_learnt_from() -> None:
    config = with_train(CONFIG, epochs=20, **REGIMES["weak"])
    features = plant_features(train=16, pool=2, pool_masks=0)
    trainer, reports = run(config, features)
    assert (len(trainer.supervision.used), len(trainer.supervision.weak)) == (0, 2)
    losses = [r.metrics["train_loss"] for r in reports]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert reports[-1].metrics["val_image_auroc"] == 1


def test_weak_labels_make_no_difference_where_there_are_none_left() -> None:
    for changes, features in (
        ({"supervision_ratio": 0.0}, plant_features(pool=0)),
        ({"supervision_ratio": 1.0}, plant_features(pool=3)),
    ):
        dropped, reports = run(with_train(CONFIG, **changes), features)
        used, again = run(with_train(CONFIG, **changes, weak_labels="use"), features)
        assert_same_state(dropped, used)
        assert all(map(same_numbers, reports, again))


def test_labels_that_a_category_lacks_are_missed_in_one_line() -> None:
    def missed(features: CategoryFeatures, **changes: Any) -> str | None:
        return missing_labels(with_train(CONFIG, **changes), features.info)

    none, unmasked, masked = plant_features(pool=0), plant_features(pool=2, pool_masks=0), plant_features(pool=2)
    expected = "plate: the pool has no defective images, so train.weak_labels=use adds none"
    assert missed(none, weak_labels="use") == expected
    expected = "plate: the pool has no masks, so train.supervision_ratio is taken as 0"
    assert missed(unmasked, supervision_ratio=0.5, weak_labels="use") == expected
    assert missed(none, supervision_ratio=1.0) == expected
    assert missed(unmasked, weak_labels="use") is None
    assert missed(masked, supervision_ratio=0.5, weak_labels="use") is None
    assert missed(none) is None


def test_checkpoint_says_what_labels_were_used(tmp_path: Path) -> None:
    Trainer(with_train(CONFIG, **REGIMES["mixed"]), plant_features(pool=5, pool_masks=4)).save(tmp_path / "model")
    meta = load_checkpoint(tmp_path / "model").meta
    assert (meta["masks_used"], meta["weak_labels_used"]) == (2, 3)


def test_features_without_the_whole_pool_are_no_use_for_weak_labels() -> None:
    features = plant_features(pool=3, pool_masks=2)
    kept = replace(features, pool=plant_features(pool=2).pool)
    Trainer(CONFIG, kept)
    with pytest.raises(RuntimeError, match=r"make them with train\.weak_labels=use"):
        Trainer(with_train(CONFIG, weak_labels="use"), kept)


def test_defects_are_shown_as_they_are_without_flips() -> None:
    """Features that hold flips serve as well as those that do not; what lacks them is refused."""
    features = plant_features(pool=3)
    config = with_train(CONFIG, supervision_ratio=1.0, flip_defects=False)
    poisoned = tuple(m.copy() for m in features.pool.maps_VhwC)
    for m in poisoned:
        m[np.arange(len(m)) % NUM_FLIPS > 0] = np.nan
    with_nan = replace(features, pool=replace(features.pool, maps_VhwC=poisoned))
    unflipped = replace(
        features,
        pool=replace(
            features.pool,
            maps_VhwC=tuple(m[::NUM_FLIPS] for m in features.pool.maps_VhwC),
            masks_VHW=features.pool.masks_VHW[::NUM_FLIPS],
            num_flips=1,
        ),
    )
    expected, _ = run(config, unflipped)
    actual, _ = run(config, with_nan)
    assert_same_state(expected, actual)
    with pytest.raises(RuntimeError, match=r"lack flipped pool images; make them with train\.flip_defects=true"):
        Trainer(with_train(CONFIG, supervision_ratio=1.0), unflipped)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_official_sampling_draws_the_papers_epochs(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_train(CONFIG, sampling="official", supervision_ratio=ratio)
    trainer = Trainer(config, plant_features(train=30, pool=2))
    seen = watch(monkeypatch)
    for epoch in range(2):
        expected = official_draws(30, 2 if ratio else 0, num_flips=4, seed=0, epoch=epoch)
        seen["features"].clear()
        trainer.run_epoch()
        assert sum(map(len, seen["features"])) == len(expected.index) == (16 if ratio else 30)


def test_published_split_without_validation_images_is_trained_on() -> None:
    features = plant_features(validation=(0, 0))
    features = replace(features, info=replace(features.info, protocol="official"))
    trainer, reports = run(with_train(CONFIG, supervision_ratio=1.0, sampling="official"), features)
    with_validation, _ = run(with_train(CONFIG, supervision_ratio=1.0, sampling="official"), plant_features())
    assert_same_state(trainer, with_validation)
    for report in reports:
        assert "train_loss" in report.metrics
        assert not [name for name in report.metrics if name.startswith("val_")]
        assert report.undefined["val_image_auroc"] == "the published split has no validation images"
        assert ("val_pixel_ap" in report.undefined) == (report.epoch == CONFIG.train.epochs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler; apt-get install g++")
@pytest.mark.parametrize("regime", [{}, {"supervision_ratio": 1.0}])
def test_compiled_training_computes_the_same(regime: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    features = plant_features()
    plain, reports = run(with_train(CONFIG, **regime), features)
    compiled_kernels, asked = model._compiled_kernels, []
    monkeypatch.setattr(model, "_compiled_kernels", lambda: asked.append(1) or compiled_kernels())
    compiled, again = run(with_train(CONFIG, compile=True, **regime), features)
    assert asked
    for one, other in zip(reports, again, strict=True):
        for name in ("train_loss", "val_loss"):
            assert other.metrics[name] == pytest.approx(one.metrics[name], rel=TRAINED_RTOL)
    for (name, expected), found in zip(plain.net.named_parameters(), compiled.net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=TRAINED_RTOL, atol=TRAINED_RTOL, msg=name)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        SSNError, match=r"^train\.compile needs a C\+\+ compiler, no-such-compiler; install it, set CXX"
    ):
        Trainer(with_train(CONFIG, compile=True), plant_features())
