"""What `make demo` shows is learning: trained detectors find the synthetic defects, untrained ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssn.data.ingest import ingest
from ssn.data.manifest import load_manifest
from ssn.data.reader import open_search_data, open_test_data
from ssn.demo_data import generate
from ssn.engine import Trainer, fit
from ssn.evaluation import evaluate_samples
from ssn.features import extract, prepare_backbone
from ssn.loader import load_config
from ssn.predictor import Predictor
from tuning.settings import SweepSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATASET = "synthetic_surfaces"
TRAINED_IMAGE_AUROC = 0.9
GAIN_OVER_UNTRAINED = 0.15


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    generate(folder / "raw")
    ingest(load_manifest(DATASET), folder / "raw", str(folder / "shards"), None)
    return str(folder / "shards")


@pytest.mark.parametrize("category", ["brushed", "speckled", "woven"])
def test_the_demo_configuration_learns(shards: str, category: str) -> None:
    data = open_search_data(shards, DATASET, category)
    settings = load_config(SweepSettings, files=[ROOT / "demo.yaml"], defaults=data.info.defaults)
    config = settings.config()
    backbone = prepare_backbone(config, data)
    features = extract(config, data, backbone)

    def score_on_test(trainer: Trainer) -> float:
        predictor = Predictor(trainer.net, backbone, config)
        metrics = evaluate_samples(predictor, open_test_data(shards, DATASET, category).stream()).metrics
        return metrics.values["image_auroc"]

    untrained = score_on_test(Trainer(config, features))
    trained = score_on_test(fit(config, features, report=lambda report, save: None))
    print(f"{category}: test image_auroc {trained:.3f} trained, {untrained:.3f} untrained")
    assert trained >= TRAINED_IMAGE_AUROC
    assert trained >= untrained + GAIN_OVER_UNTRAINED
