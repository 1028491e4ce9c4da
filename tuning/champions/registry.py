"""Champions: one registered model per category, ``<dataset>.<category>``, whose alias ``champion`` is the one to use.

The model is logged to the winning trial's own run, not to a run of its own: in MLflow's pages a registered version then
leads to the parameters and curves of the very trial that it is, and promoting another trial by hand does the same.
Only the champion's copy carries the backbone; trials keep what was trained, and the digest of the backbone they used.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.errors import SSNError
from tuning.champions.incumbent import Incumbent
from tuning.tracking.mlflow_tracker import MAX_TAG_LENGTH, absolute_uri, explained, open_client
from tuning.tracking.protocol import BENCHMARK_STAGE, MODEL_ARTIFACT_PATH, TRIAL_MODEL_FILES

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

    from ssn.checkpoint import Checkpoint
    from ssn.config import Config

ALIAS = "champion"
BUNDLE = "bundle"
"""The pyfunc model's artifact that is the model directory of ``ssn.predictor.Predictor.from_directory``."""
PIP_REQUIREMENTS = ("torch", "timm", "numpy", "pillow", "safetensors", "pyarrow")
"""What ``ssn`` needs to predict. Given explicitly: MLflow would find out by loading the model, which takes minutes."""
BACKBONE_DIGEST_KEY = "backbone_digest"
"""Key in a checkpoint's meta data, and version tag, of the SHA-256 of the backbone's weights."""


@dataclass(frozen=True)
class Decision:
    """The numbers by which a configuration became champion; they are the registered version's tags."""

    validation_objective: float
    """What the search maximised: the mean over seeds where there were several."""
    num_trials: int
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metric name -> value on the test split; undefined ones are absent."""
    train_masks: int = 0
    """Defective training images whose pixel masks the champion used."""
    train_weak_labels: int = 0
    """Those that it used without their masks."""
    validation_labels: int = 0
    """Defective validation images by which it was chosen."""
    validation_masks: int = 0
    """Those among them that had a mask."""
    extra: Mapping[str, str] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """As version tags, numbers to six digits."""
        numbers = {"validation_objective": self.validation_objective}
        numbers |= {f"test_{name}": value for name, value in self.test_metrics.items()}
        return {
            **{name: f"{value:.6g}" for name, value in numbers.items()},
            "num_trials": str(self.num_trials),
            "train_masks": str(self.train_masks),
            "train_weak_labels": str(self.train_weak_labels),
            "validation_labels": str(self.validation_labels),
            "validation_masks": str(self.validation_masks),
            **self.extra,
        }


@dataclass(frozen=True)
class ChampionVersion:
    """A registered model version that has the alias."""

    name: str
    version: str
    run_id: str
    created: bool
    """False where the run had been registered before and only the alias moved."""

    @property
    def model_uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` takes."""
        return f"models:/{self.name}@{ALIAS}"


def registered_name(dataset: str, category: str) -> str:
    """The registered model of a category."""
    return f"{dataset}.{category}"


def register_champion(
    tracking_uri: str, *, run_id: str, bundle_dir: Path, decision: Decision | None = None
) -> ChampionVersion:
    """Register a trial's model and give it the alias ``champion``.

    A run is registered once: called again, tags are updated and the alias returns to the version that exists.

    Args:
        tracking_uri: Tracking store and model registry.
        run_id: The trial's run.
        bundle_dir: Its model directory, backbone included.
        decision: Why it is the champion; None for a choice by hand.

    Raises:
        SSNError: the run is unknown, or not a trial of this platform; the bundle is not self-contained.
    """
    from ssn.checkpoint import BACKBONE_FILE

    client = open_client(tracking_uri)
    with explained(tracking_uri):
        run = _get_trial_run(client, run_id, tracking_uri)
        name = registered_name(run.data.tags["dataset"], run.data.tags["category"])
        existing = _version_of_run(client, name, run_id)
        if existing is None and not (bundle_dir / BACKBONE_FILE).is_file():
            raise SSNError(f"{bundle_dir} has no {BACKBONE_FILE}, so it cannot be loaded alone; write it as a bundle")
        registered = existing or _register(client, name, run, bundle_dir)
        for key, value in _version_tags(run, decision).items():
            client.set_model_version_tag(name, registered.version, key, value[:MAX_TAG_LENGTH])
        client.set_registered_model_alias(name, ALIAS, registered.version)
        client.set_tag(run_id, "champion_version", f"{name}/{registered.version}")
    return ChampionVersion(name, str(registered.version), run_id, created=existing is None)


def promote(run_id: str, tracking_uri: str, *, decision: Decision | None = None) -> ChampionVersion:
    """Make any complete trial, picked by its run id, the champion of its category.

    Promoting the same run twice makes one version.

    Args:
        run_id: As MLflow's pages show it.
        tracking_uri: Tracking store and model registry.
        decision: Numbers for the version's tags.

    Raises:
        SSNError: the run is unknown or has no model (it was pruned or failed), or its backbone is not to be had; or it
            is a benchmark's, which would be a choice by test scores.
    """
    from ssn.bundle import find_backbone, write_bundle

    client = open_client(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="promote-") as scratch, explained(tracking_uri):
        run = _get_trial_run(client, run_id, tracking_uri)
        if run.data.tags.get("stage") == BENCHMARK_STAGE:
            raise SSNError(
                f"run {run_id} is a benchmark's, whose test scores are known, and champions are chosen without them; "
                "promote a run of a sweep"
            )
        name = registered_name(run.data.tags["dataset"], run.data.tags["category"])
        bundle_dir = Path(scratch, BUNDLE)
        if _version_of_run(client, name, run_id) is None:
            trained = _download_model(client, run)
            write_bundle(trained, find_backbone(trained), bundle_dir)
        return register_champion(tracking_uri, run_id=run_id, bundle_dir=bundle_dir, decision=decision)


@dataclass(frozen=True)
class ChampionOrigin:
    """With what, and on what, a category's champion was trained."""

    config: Config
    run_id: str
    version: str
    data_uri: str | None
    """Where the images were that it was tuned on; None: not recorded."""
    search_fingerprint: str | None
    """Of those images."""
    split_seed: str | None = None
    """By which they had been split; None: not recorded."""


class NoChampionError(SSNError):
    """A category has no champion."""


def find_champion(tracking_uri: str, dataset: str, category: str) -> ChampionOrigin:
    """Look up the champion of a category, without its weights.

    Raises:
        NoChampionError: it has none.
        SSNError: the champion's run has no model any more.
    """
    from ssn.checkpoint import CONFIG_FILE
    from ssn.config import unflatten

    client = open_client(tracking_uri)
    name = registered_name(dataset, category)
    with explained(tracking_uri), tempfile.TemporaryDirectory(prefix="champion-") as scratch:
        registered = _champion_version(client, name)
        if registered is None:
            raise NoChampionError(
                f"{name} has no champion at {absolute_uri(tracking_uri)}; run `tuning sweep` first, or leave the "
                "configuration champion out"
            )
        run = _get_trial_run(client, registered.run_id, tracking_uri)
        if f"{MODEL_ARTIFACT_PATH}/{CONFIG_FILE}" not in {
            item.path for item in client.list_artifacts(registered.run_id, MODEL_ARTIFACT_PATH)
        }:
            raise SSNError(
                f"the champion of {name}, run {registered.run_id}, has no configuration any more; sweep again"
            )
        path = client.download_artifacts(registered.run_id, f"{MODEL_ARTIFACT_PATH}/{CONFIG_FILE}", scratch)
        config = unflatten(json.loads(Path(path).read_text(encoding="utf-8")))
    return ChampionOrigin(
        config=config,
        run_id=registered.run_id,
        version=str(registered.version),
        data_uri=run.data.tags.get("data_uri"),
        search_fingerprint=run.data.tags.get("search_fingerprint"),
        split_seed=run.data.tags.get("split_seed"),
    )


def find_incumbent(tracking_uri: str, dataset: str, category: str) -> Incumbent | None:
    """The champion of a category as a rival for the next one; None: there is none yet."""
    client = open_client(tracking_uri)
    name = registered_name(dataset, category)
    with explained(tracking_uri):
        registered = _champion_version(client, name)
    if registered is None:
        return None
    return Incumbent(name, str(registered.version), registered.run_id, dict(registered.tags))


def tag_version(tracking_uri: str, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Add tags to a registered version."""
    client = open_client(tracking_uri)
    with explained(tracking_uri):
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value[:MAX_TAG_LENGTH])


def _champion_version(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def load_trial_model(run_id: str, tracking_uri: str) -> Checkpoint:
    """What a complete trial has kept: its heads and what identifies its backbone.

    Raises:
        SSNError: the run is unknown or has no model (it was pruned or failed).
    """
    client = open_client(tracking_uri)
    with explained(tracking_uri):
        return _download_model(client, _get_trial_run(client, run_id, tracking_uri))


def _download_model(client: MlflowClient, run: Run) -> Checkpoint:
    from ssn.checkpoint import load_checkpoint

    run_id = run.info.run_id
    if {f"{MODEL_ARTIFACT_PATH}/{n}" for n in TRIAL_MODEL_FILES} - {
        item.path for item in client.list_artifacts(run_id, MODEL_ARTIFACT_PATH)
    }:
        state = run.data.tags.get("trial_state", run.info.status)
        raise SSNError(f"run {run_id} ({state}) has no model; promote a run whose trial_state is COMPLETE")
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        return load_checkpoint(Path(client.download_artifacts(run_id, MODEL_ARTIFACT_PATH, scratch)))


def _get_trial_run(client: MlflowClient, run_id: str, tracking_uri: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise SSNError(
                f"run {run_id!r} is not at {absolute_uri(tracking_uri)}; copy the run id from its page in MLflow"
            ) from error
        raise
    if "trial_identity" not in run.data.tags:
        raise SSNError(f"run {run_id} ({run.info.run_name}) is not a trial; give the id of a run below a category's")
    return run


def _version_of_run(client: MlflowClient, name: str, run_id: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    return max(found, key=lambda v: int(v.version), default=None)


def _version_tags(run: Run, decision: Decision | None) -> dict[str, str]:
    of_run = (
        "sweep_id",
        "trial_identity",
        "search_fingerprint",
        "test_fingerprint",
        "backbone_digest",
        "git_commit",
        "git_dirty",
    )
    tags = {key: run.data.tags[key] for key in of_run if key in run.data.tags}
    return tags | (decision.tags() if decision is not None else {})


def _register(client: MlflowClient, name: str, run: Run, bundle_dir: Path) -> ModelVersion:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    from ssn.checkpoint import load_checkpoint

    meta = load_checkpoint(bundle_dir).meta
    run_id = run.info.run_id
    identity = {key: run.data.tags[key] for key in ("dataset", "category", "trial_identity")}
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=ALIAS,
        source_run_id=run_id,
        tags=identity,
        params=dict(run.data.params),
        model_type="anomaly-detection",
    )
    with tempfile.TemporaryDirectory(prefix="pyfunc-") as scratch:
        folder = Path(scratch, "model")
        save_pyfunc_model(folder, bundle_dir, logged_model=logged, metadata=identity)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(name, tags={key: identity[key] for key in ("dataset", "category")})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {BACKBONE_DIGEST_KEY: meta[BACKBONE_DIGEST_KEY]} if BACKBONE_DIGEST_KEY in meta else {}
    # Not models:/<model id>: a SQLite registry would look that up at the process's global tracking URI.
    return client.create_model_version(
        name, source=logged.artifact_location, run_id=run_id, tags=tags, model_id=logged.model_id
    )


def save_pyfunc_model(
    folder: Path,
    bundle_dir: Path,
    *,
    logged_model: LoggedModel | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle as an MLflow pyfunc model, with the ``ssn`` package that runs it.

    Args:
        folder: Where; must not exist.
        bundle_dir: Self-contained model directory.
        logged_model: The tracker's entry that the files are for.
        metadata: Anything, kept in the model's ``MLmodel`` file.

    Its input is ``[N, H, W, 3]`` uint8 of any size; see ``pyfunc_model.py`` for what it returns. It loads wherever the
    packages of :data:`PIP_REQUIREMENTS` are installed.
    """
    import numpy as np

    import ssn.config

    with warnings.catch_warnings():
        # At import and again at saving, MLflow recommends type hints in place of a signature; they cannot say "any
        # height and width".
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
            outputs=Schema(
                [
                    TensorSpec(np.dtype(np.float32), (-1,), name="score"),
                    TensorSpec(np.dtype(np.float32), (-1, -1, -1), name="anomaly_map"),
                ]
            ),
        )
        mlflow_model = Model(metadata=dict(metadata or {}))
        if logged_model is not None:
            mlflow_model.artifact_path = logged_model.artifact_location
            mlflow_model.run_id = logged_model.source_run_id
            mlflow_model.model_uuid = mlflow_model.model_id = logged_model.model_id
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={BUNDLE: str(bundle_dir)},
            code_paths=[str(Path(ssn.config.__file__).parent)],
            signature=signature,
            input_example=_example_image(),
            pip_requirements=[f"{package}=={version(package)}" for package in PIP_REQUIREMENTS],
            mlflow_model=mlflow_model,
        )


def _example_image() -> np.ndarray:
    """[1, 64, 64, 3] uint8: a grey ramp, to show the form of the input rather than a surface."""
    import numpy as np

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.broadcast_to(ramp[None, None, :, None], (1, 64, 64, 3)).copy()
