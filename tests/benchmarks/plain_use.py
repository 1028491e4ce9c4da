"""The sweep of ``against_plain`` as a user writes it with Ray Tune, Optuna and anomalib's SuperSimpleNet.

Its images lie in folders: ``{train,validation}/{good,defect,masks}``, a mask named as its image. The network, its loss,
its optimiser and schedule are anomalib's; the loop is the user's own, because anomalib's data modules hold no defective
images for training. Between the two marks is what the user writes, and what is counted. As in anomalib, no image is
flipped, and every epoch of every trial runs the backbone.

    python -m tests.benchmarks.plain_use --data FOLDER --trials 16 --epochs 9 --draws 72 --json plain.json
"""

# fmt: off
# --- what the user writes ---
import argparse
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from anomalib.models.image.supersimplenet import Supersimplenet
from PIL import Image
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms.v2 import functional as F


class Images(Dataset):
    def __init__(self, folder, size, ratio=1.0):
        good, defects = sorted((folder / "good").iterdir()), sorted((folder / "defect").iterdir())
        random.Random(0).shuffle(defects)
        self.items = [(p, 0) for p in good] + [(p, 1) for p in defects[: round(ratio * len(defects))]]
        self.masks, self.size = folder / "masks", [size, size]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        image = F.resize(F.to_dtype(F.pil_to_tensor(Image.open(path).convert("RGB")), scale=True), self.size)
        image = F.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        if not label:
            return image, torch.zeros(self.size), 0.0
        mask = F.pil_to_tensor(Image.open(self.masks / path.name).convert("L"))
        return image, (F.resize(mask, self.size, F.InterpolationMode.NEAREST)[0] > 127).float(), 1.0


def train(config):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    a = SimpleNamespace(**config["arguments"])
    data = Images(Path(a.data) / "train", a.size, config["ratio"])
    labels = [label for _, label in data.items]
    weights = [1 / labels.count(label) for label in labels]  # half of the draws are defective
    loader = DataLoader(data, a.batch, sampler=WeightedRandomSampler(weights, a.draws))
    validation = DataLoader(Images(Path(a.data) / "validation", a.size), a.batch)
    module = Supersimplenet(config["threshold"], a.backbone, supervised=1 in labels, pre_processor=False,
                            post_processor=False, evaluator=False, visualizer=False)
    module.model.anomaly_generator.noise_std = config["sigma"]
    module.trainer = SimpleNamespace(max_epochs=a.epochs)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for _ in range(a.epochs):
        module.model.train()
        for images, masks, labels in loader:
            pred_map, pred_score, target_mask, target_label = module.model(images, masks, labels.float())
            loss = module.loss(pred_map=pred_map, pred_score=pred_score, target_mask=target_mask,
                               target_label=target_label)
            optimizer.zero_grad()
            loss.backward()
            if module.supervised:
                torch.nn.utils.clip_grad_norm_(module.model.parameters(), 1)
            optimizer.step()
        scheduler.step()
        module.model.eval()
        scores, maps, truths, targets = [], [], [], []
        with torch.no_grad():
            for images, masks, labels in validation:
                found = module.model(images)
                scores.append(found.pred_score.flatten())
                maps.append(found.anomaly_map.flatten())
                truths.append(masks.flatten())
                targets.append(labels)
        auroc = roc_auc_score(np.concatenate(targets), np.concatenate(scores))
        pixel_ap = average_precision_score(np.concatenate(truths), np.concatenate(maps))
        tune.report({"objective": (auroc + pixel_ap) / 2, "image_auroc": auroc, "pixel_ap": pixel_ap})


def search(a):
    space = {"sigma": tune.loguniform(1e-3, 0.3), "threshold": tune.uniform(0.0, 0.7), "ratio": tune.uniform(0.0, 1.0),
             "arguments": vars(a)}
    return tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective", mode="max", num_samples=a.trials, search_alg=OptunaSearch(seed=0),
            scheduler=ASHAScheduler(max_t=a.epochs, grace_period=1, reduction_factor=3),
        ),
        run_config=tune.RunConfig(storage_path=str(Path(a.out).absolute()), verbose=1),
    ).fit()
# --- so far ---
# fmt: on


def main() -> None:
    """Search, and write down the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images; absolute, for Ray's workers")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--draws", type=int, default=72, help="images per epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--size", type=int, default=256, help="above 64: anomalib cannot draw its noise for smaller maps"
    )
    parser.add_argument("--backbone", default="resnet18.tv_in1k")
    parser.add_argument("--weights", help="of the backbone, for a machine without a network")
    parser.add_argument("--out", required=True, help="folder for Ray's state")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.weights:
        os.environ[WEIGHTS_VARIABLE] = str(Path(arguments.weights).absolute())
    json_file = arguments.json
    del arguments.json, arguments.weights
    results = search(arguments)
    best = results.get_best_result()
    epochs = [len(r.metrics_dataframe) for r in results if r.metrics_dataframe is not None]
    found = {
        "best_validation": best.metrics["objective"],
        "epochs_of_best": best.metrics["training_iteration"],
        "config": {name: best.config[name] for name in ("sigma", "threshold", "ratio")},
        "errors": len(results.errors),
        "trials": len(results),
        "epochs": sum(epochs),
    }
    json_file.write_text(json.dumps(found, indent=1))


WEIGHTS_VARIABLE = "PLAIN_USE_WEIGHTS"


def _weights_from_file() -> None:
    """anomalib asks timm for pretrained weights, which a machine without a network has in a file; in every process."""
    import timm
    from safetensors.torch import load_file

    create, path = timm.create_model, os.environ[WEIGHTS_VARIABLE]

    def create_model(*arguments, **options):
        model = create(*arguments, **{**options, "pretrained": False})
        # the file may lack layers that are not used
        unknown = model.load_state_dict(load_file(path), strict=False).unexpected_keys
        assert not unknown, f"{path} has {unknown}, which {arguments} has not"
        return model

    timm.create_model = create_model


if WEIGHTS_VARIABLE in os.environ:
    _weights_from_file()

if __name__ == "__main__":
    from tests.benchmarks import plain_use  # by its name, so that Ray's workers import it, weights and all

    plain_use.main()
