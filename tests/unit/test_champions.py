"""The model registry: what is registered loads anywhere, and any finished trial can be promoted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssn.backbone import Backbone, backbone_state, calibrate, calibration_state, load_backbone
from ssn.bundle import CALIBRATION_PREFIX
from ssn.checkpoint import save_checkpoint
from ssn.config import Config, DataConfig, ModelConfig, flatten
from ssn.errors import SSNError
from ssn.model import SuperSimpleNet
from ssn.predictor import Predictor
from tuning.champions.registry import (
    ALIAS,
    ChampionVersion,
    Decision,
    find_incumbent,
    promote,
    register_champion,
    save_pyfunc_model,
    tag_version,
)
from tuning.tracking import MLflowTracker, Sweep, TrialInfo
from tuning.tracking.mlflow_tracker import default_tracking_uri

SWEEP = Sweep("s1", "widgets", {"bolt": {"search_fingerprint": "f1", "test_fingerprint": "f2"}})
DECISION = Decision(
    validation_objective=0.91,
    num_trials=30,
    test_metrics={"image_auroc": 0.97},
    train_masks=5,
    validation_labels=9,
    validation_masks=8,
    extra={"protocol": "honest"},
)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    backbone = load_backbone(ModelConfig(backbone="resnet18", weights="random", layers=(1, 2)))
    save_file(backbone_state(backbone), path)
    return path


@pytest.fixture(scope="module")
def config(weights_file: Path) -> Config:
    return Config(
        model=ModelConfig(
            backbone="resnet18", weights=str(weights_file), layers=(1, 2), seg_channels=16, cls_channels=8
        ),
        data=DataConfig(image_size=(32, 48)),
    )


@pytest.fixture(scope="module")
def backbone(config: Config) -> Backbone:
    return load_backbone(config.model)


def save_model(
    folder: Path,
    config: Config,
    backbone: Backbone,
    *,
    whole: bool,
    seed: int = 0,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    torch.manual_seed(seed)
    net = SuperSimpleNet(backbone.channels, config.model)
    save_checkpoint(
        folder,
        tensors={**net.state_dict(), **(extra or {})},
        config=config,
        meta={"backbone_digest": backbone.digest},
        backbone=backbone_state(backbone) if whole else None,
    )
    return folder


@pytest.fixture
def trial_dir(tmp_path: Path, config: Config, backbone: Backbone) -> Path:
    return save_model(tmp_path / "trial", config, backbone, whole=False)


@pytest.fixture
def bundle_dir(tmp_path: Path, config: Config, backbone: Backbone) -> Path:
    return save_model(tmp_path / "bundle", config, backbone, whole=True)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    MLflowTracker(default_tracking_uri(folder)).check()
    return folder / "mlflow.db"


@pytest.fixture
def tracker(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowTracker]:
    """A store with the sweep's parents. Nothing may be written to the working directory, which is MLflow's default."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracker = MLflowTracker(default_tracking_uri(tmp_path))
    tracker.start_sweep(SWEEP)
    yield tracker
    assert list((tmp_path / "cwd").iterdir()) == []
    assert "MLFLOW_TRACKING_URI" not in os.environ


def finish_trial(tracker: MLflowTracker, config: Config, trial_dir: Path, index: int = 0) -> str:
    run_id = tracker.start_trial(SWEEP, TrialInfo("bolt", f"key{index}", index, flatten(config)))
    tracker.log_epoch(run_id, 1, {"objective": 0.9})
    tracker.finish_trial(run_id, "COMPLETE", artifact_dir=trial_dir)
    return run_id


def test_champion_is_the_next_ones_rival_with_its_tags(
    tracker: MLflowTracker, config: Config, trial_dir: Path, bundle_dir: Path
) -> None:
    assert find_incumbent(tracker.tracking_uri, "widgets", "bolt") is None
    run_id = finish_trial(tracker, config, trial_dir)
    register_champion(tracker.tracking_uri, run_id=run_id, bundle_dir=bundle_dir, decision=DECISION)
    tag_version(tracker.tracking_uri, "widgets.bolt", "1", {"kept_by_sweep": "s2"})
    incumbent = find_incumbent(tracker.tracking_uri, "widgets", "bolt")
    assert incumbent is not None
    assert (incumbent.title, incumbent.run_id, incumbent.search_fingerprint) == ("widgets.bolt/1", run_id, "f1")
    assert (incumbent.tags["validation_objective"], incumbent.tags["kept_by_sweep"]) == ("0.91", "s2")


def test_registered_champion_has_alias_and_the_numbers_of_the_decision(
    tracker: MLflowTracker, config: Config, trial_dir: Path, bundle_dir: Path
) -> None:
    run_id = finish_trial(tracker, config, trial_dir)
    champion = register_champion(tracker.tracking_uri, run_id=run_id, bundle_dir=bundle_dir, decision=DECISION)

    assert champion == ChampionVersion("widgets.bolt", "1", run_id, created=True)
    assert champion.model_uri == "models:/widgets.bolt@champion"
    version = tracker.client.get_model_version_by_alias("widgets.bolt", ALIAS)
    assert version.run_id == run_id
    expected = {"validation_objective": "0.91", "test_image_auroc": "0.97", "num_trials": "30", "train_masks": "5"}
    expected |= {
        "validation_labels": "9",
        "validation_masks": "8",
        "search_fingerprint": "f1",
        "test_fingerprint": "f2",
    }
    expected |= {"trial_identity": "key0", "sweep_id": "s1", "protocol": "honest"}
    assert {key: version.tags[key] for key in expected} == expected
    (run,) = [r for r in tracker.find_runs("widgets") if r.run_id == run_id]
    assert (run.status, run.tags["champion_version"]) == ("FINISHED", "widgets.bolt/1")


def test_run_is_registered_once(tracker: MLflowTracker, config: Config, trial_dir: Path, bundle_dir: Path) -> None:
    first, second = (finish_trial(tracker, config, trial_dir, index) for index in range(2))
    uri = tracker.tracking_uri
    register_champion(uri, run_id=first, bundle_dir=bundle_dir)
    register_champion(uri, run_id=second, bundle_dir=bundle_dir)
    again = register_champion(uri, run_id=first, bundle_dir=bundle_dir, decision=replace(DECISION, num_trials=31))
    assert (again.version, again.created) == ("1", False)
    versions = tracker.client.search_model_versions("name = 'widgets.bolt'")
    assert sorted(str(v.version) for v in versions) == ["1", "2"]
    champion = tracker.client.get_model_version_by_alias("widgets.bolt", ALIAS)
    assert (str(champion.version), champion.tags["num_trials"]) == ("1", "31")


def test_heads_alone_are_not_registered(tracker: MLflowTracker, config: Config, trial_dir: Path) -> None:
    run_id = finish_trial(tracker, config, trial_dir)
    with pytest.raises(SSNError, match=r"no backbone\.safetensors"):
        register_champion(tracker.tracking_uri, run_id=run_id, bundle_dir=trial_dir)
    assert tracker.client.search_registered_models() == []


LOAD_AND_PREDICT = """
import sys
import numpy as np
import mlflow

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/widgets.bolt@champion")
images = np.load(sys.argv[2])
out = model.predict(images)
np.savez(sys.argv[3], **out)
assert model.predict(np.zeros((1, 70, 20, 3), np.uint8))["anomaly_map"].shape == (1, 32, 48)
assert model.predict(np.zeros((0, 70, 20, 3), np.uint8))["score"].shape == (0,)
try:
    model.predict(images.astype(np.float32) / 255)
except mlflow.exceptions.MlflowException:
    pass
else:
    sys.exit("float images were accepted")
import ssn
assert "code" in str(ssn.__path__), ssn.__path__
loaded = {"ray", "optuna", "tuning"} & set(sys.modules)
assert not loaded, loaded
"""


def test_champion_loads_in_a_fresh_process_without_the_project(
    tracker: MLflowTracker, config: Config, trial_dir: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    run_id = finish_trial(tracker, config, trial_dir)
    register_champion(tracker.tracking_uri, run_id=run_id, bundle_dir=bundle_dir)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    shutil.rmtree(bundle_dir)

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT, tracker.tracking_uri, tmp_path / "images.npy", tmp_path / "out.npz"],
        cwd=fresh,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    expected = list(
        Predictor.from_directory(
            save_model(tmp_path / "same", config, load_backbone(config.model), whole=True)
        ).predict(images)
    )
    np.testing.assert_allclose(out["score"], [p.score for p in expected], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["anomaly_map"], [p.map_HW for p in expected], rtol=1e-4, atol=1e-5)


def test_pyfunc_model_pins_what_it_needs(bundle_dir: Path, tmp_path: Path) -> None:
    save_pyfunc_model(tmp_path / "model", bundle_dir)
    lines = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert set(pins) == {"mlflow", "torch", "timm", "numpy", "pillow", "safetensors", "pyarrow"}
    assert pins["torch"] == torch.__version__.partition("+")[0]


def test_any_complete_trial_can_be_promoted_once(
    tracker: MLflowTracker, config: Config, trial_dir: Path, tmp_path: Path
) -> None:
    first, second = (finish_trial(tracker, config, trial_dir, index) for index in range(2))
    promoted = [promote(run_id, tracker.tracking_uri) for run_id in (first, second, second)]
    assert [(p.version, p.created) for p in promoted] == [("1", True), ("2", True), ("2", False)]
    version = tracker.client.get_model_version_by_alias("widgets.bolt", ALIAS)
    assert str(version.version) == "2"
    bundle = Path(version.source.removeprefix("file://")) / "artifacts" / "bundle"
    (prediction,) = Predictor.from_directory(bundle).predict([np.zeros((20, 20, 3), np.uint8)])
    assert prediction.map_HW.shape == (32, 48)


def test_promotion_refuses_weights_that_changed(
    tracker: MLflowTracker, config: Config, trial_dir: Path, weights_file: Path, backbone: Backbone
) -> None:
    run_id = finish_trial(tracker, config, trial_dir)
    kept = weights_file.read_bytes()
    state = backbone_state(backbone)
    try:
        save_file({**state, "conv1.weight": state["conv1.weight"] + 1}, weights_file)
        with pytest.raises(SSNError, match=f"digest {backbone.digest[:12]}.*bring back the weights"):
            promote(run_id, tracker.tracking_uri)
    finally:
        weights_file.write_bytes(kept)
    assert tracker.client.search_registered_models() == []


def test_calibrated_random_weights_come_back_from_seed_and_statistics(
    tracker: MLflowTracker, config: Config, tmp_path: Path
) -> None:
    random = replace(config, model=replace(config.model, weights="random"))
    calibrated = load_backbone(random.model)
    calibrate(calibrated, [torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))])
    assert calibrated.digest != load_backbone(random.model).digest
    statistics = {f"{CALIBRATION_PREFIX}{name}": tensor for name, tensor in calibration_state(calibrated).items()}
    with_them = save_model(tmp_path / "with", random, calibrated, whole=False, extra=statistics)
    without = save_model(tmp_path / "without", random, calibrated, whole=False)
    with pytest.raises(SSNError, match="bring back the weights"):
        promote(finish_trial(tracker, random, without, 0), tracker.tracking_uri)
    assert promote(finish_trial(tracker, random, with_them, 1), tracker.tracking_uri).created


def test_promotion_names_what_is_no_finished_trial(tracker: MLflowTracker, config: Config) -> None:
    uri = tracker.tracking_uri
    pruned = tracker.start_trial(SWEEP, TrialInfo("bolt", "key0", 0, flatten(config)))
    tracker.finish_trial(pruned, "PRUNED")
    with pytest.raises(SSNError, match=rf"{pruned} \(PRUNED\) has no model"):
        promote(pruned, uri)
    with pytest.raises(SSNError, match="run 'nonsense' is not at sqlite:"):
        promote("nonsense", uri)
    with pytest.raises(SSNError, match="0123456789abcdef0123456789abcdef' is not at"):
        promote("0123456789abcdef" * 2, uri)
    (parent,) = [r for r in tracker.find_runs("widgets") if r.parent_run_id is None]
    with pytest.raises(SSNError, match=r"\(bolt\) is not a trial"):
        promote(parent.run_id, uri)
