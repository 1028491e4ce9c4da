"""Our speed, memory and results against anomalib's SuperSimpleNet: same weights, same inputs, measured in turns.

``make bench`` runs every row; ``python -m tests.benchmarks.peer --list`` names them, ``--only`` selects. Each row is
printed as it comes and is on disk after every round, so that an interruption loses nothing (``--resume`` goes on).

* ``train``: a training step, optimiser included. anomalib's begins at the images, as it always does; ours on cached
  features, and with the backbone in every step. bf16 is autocast there; here, that of all products with weights, or of
  the noise's alone.
* ``infer``: latency of one image, throughput of 16, from a preprocessed image to its smoothed map and score.
* ``export``: what anomalib's own exporter writes, run by OpenVINO and ONNX Runtime, against ours native and exported.
* ``memory``: peak beyond imports, weights and inputs, each side in a process of its own.
* ``growth``: training steps of other sizes, batches and Perlin thresholds.
* ``heads``: the heads on given features against the papers' plain formulation (``tests/oracle.py``); no anomalib.
* ``epochs``: a whole training of one category and the metrics on its test split; needs ``--data``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ssn.config import Config, DataConfig, ModelConfig, SynthesisConfig, TrainConfig
from ssn.data.reader import open_search_data, open_test_data
from ssn.engine import fit
from ssn.evaluation import evaluate_samples
from ssn.export import export
from ssn.features import extract, load_image_batches, prepare_backbone
from ssn.model import Noise, SuperSimpleNet
from ssn.predictor import Predictor
from tests import oracle
from tests.benchmarks.measure import (
    Neighbours,
    OnRound,
    Report,
    Result,
    Side,
    describe_machine,
    table_lines,
    take_turns,
)
from tests.benchmarks.our_side import (
    VARIANT,
    Case,
    Precision,
    Scene,
    TrainingPrecision,
    as_exported,
    build_predictor,
    build_scene,
    predict,
    training_steps,
    with_precision,
    write_model,
)
from tests.benchmarks.probe import peak_bytes
from tests.benchmarks.runtimes import open_onnx, open_openvino

BACKBONES = ("wide_resnet50_2", "resnet18")
TRAIN_BATCHES = (8, 32)
INFER_BATCHES = (1, 16)
GROWTH_BATCH = 4
INFERENCE_ROUNDS = 4
"""Rounds of inference for each of training: they are quick, and so the noise is larger."""
OUR_STEPS = 3
"""Steps of ours per round in small batches: how much there is to do depends on the noise's masks, which are drawn."""
COVERAGE = 0.129
"""Share of noisy positions at a Perlin threshold of 0.2."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    pairs: int
    threads: int
    backbones: tuple[str, ...]
    data: str | None
    dataset: str
    category: str
    weights: str
    epochs: int
    batch: int


Row = Callable[[Result, OnRound], None]
"""Fills a result."""


def rows(options: Options) -> dict[str, Row]:
    """Every row by name, in the order in which they run."""
    found: dict[str, Row] = {}
    for backbone in options.backbones:
        for batch in TRAIN_BATCHES:
            case = Case(backbone, batch)
            found[f"train/{backbone}/batch{batch}"] = functools.partial(train_row, case, TRAINING_PRECISIONS, options)
        for batch in INFER_BATCHES:
            case = Case(backbone, batch)
            found[f"infer/{backbone}/batch{batch}"] = functools.partial(infer_row, case, options)
            found[f"export/{backbone}/batch{batch}"] = functools.partial(export_row, case, options)
        found[f"memory/{backbone}/train"] = functools.partial(memory_row, Case(backbone, 32), "train", options)
        found[f"memory/{backbone}/infer"] = functools.partial(memory_row, Case(backbone, 16), "infer", options)
        # batches of 8 and 32 are rows of `train`
        base = Case(backbone, GROWTH_BATCH)
        for name, case in {
            "base": base,
            "size128": replace(base, side=128),
            "size512": replace(base, side=512),
            "threshold0": replace(base, threshold=0.0),
            "threshold0.6": replace(base, threshold=0.6),
        }.items():
            found[f"growth/{backbone}/{name}"] = functools.partial(train_row, case, ("fp32",), options)
        found[f"heads/{backbone}/train"] = functools.partial(heads_row, backbone, "train", options)
        found[f"heads/{backbone}/infer"] = functools.partial(heads_row, backbone, "infer", options)
    if options.data is not None:
        for backbone in options.backbones:
            found[f"epochs/{backbone}/{options.category}"] = functools.partial(epochs_row, backbone, options)
    order = ("train", "infer", "export", "memory", "growth", "heads", "epochs")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].partition("/")[0])))


def train_row(
    case: Case, precisions: Sequence[TrainingPrecision], options: Options, result: Result, on_round: OnRound
) -> None:
    """(a) and (e): a training step."""
    scene = build_scene(case)
    peer = _build_peer(scene)
    result.notes["agreement"] = _agree(scene, peer)
    repeat = OUR_STEPS if case.batch <= TRAIN_BATCHES[0] else 1
    sides, comparisons = [], []
    for precision in precisions:
        theirs = "anomalib fp32"
        if precision != "bf16 noise":  # which has no counterpart there
            theirs = f"anomalib {precision}"
            run = functools.partial(peer.training_step, scene.images_BCHW, autocast=precision == "bf16")
            sides.append(Side(theirs, run))
        for what, step in training_steps(scene, precision).items():
            ours = f"ours {precision}, {what}"
            sides.append(Side(ours, step, repeat))
            comparisons += [(peer_side, ours) for peer_side in dict.fromkeys(("anomalib fp32", theirs))]
    result.unit, result.scale, result.comparisons = "ms/image", 1e3 / case.batch, comparisons
    result.rounds = options.pairs
    take_turns(sides, result, on_round)


def infer_row(case: Case, options: Options, result: Result, on_round: OnRound) -> None:
    """(b): from a preprocessed image to map and score."""
    scene, peer = _trained(case)
    images = scene.images_BCHW
    sides, comparisons = [], []
    for precision in PRECISIONS:
        theirs, ours = f"anomalib {precision}", f"ours {precision}"
        predictor = build_predictor(scene, peer.heads_state(), precision)
        sides.append(Side(theirs, functools.partial(peer.predict, images, autocast=precision == "bf16")))
        sides.append(Side(ours, functools.partial(predict, predictor, images)))
        comparisons += [(peer_side, ours) for peer_side in dict.fromkeys(("anomalib fp32", theirs))]
    result.notes["agreement"] = _agree(scene, peer)
    result.unit, result.scale, result.comparisons = "ms/image", 1e3 / case.batch, comparisons
    result.rounds = INFERENCE_ROUNDS * options.pairs
    take_turns(sides, result, on_round)


def export_row(case: Case, options: Options, result: Result, on_round: OnRound) -> None:
    """(c): the same after export, anomalib's by its own exporter; and ours run natively.

    OpenVINO's default precision, bf16 where the processor has units for it, is measured beside float32.
    """
    scene, peer = _trained(case)
    images, size = scene.images_BCHW, (case.side, case.side)
    expected = peer.predict(images)
    agreement: dict[str, float] = {"ours native fp32": _agree(scene, peer)}
    native = {precision: build_predictor(scene, peer.heads_state(), precision) for precision in PRECISIONS}
    sides = {f"ours native {name}": functools.partial(predict, network, images) for name, network in native.items()}

    def add(
        owner: str,
        files: Sequence[Path],
        images: Tensor,
        outputs: tuple[str, str],
        activate: Callable[[Tensor], Tensor],
    ) -> None:
        openvino, onnx = files
        exported, _ = open_openvino(openvino, images, outputs, threads=options.threads, precision="f32")
        found = {f"{owner} OpenVINO fp32": exported}
        exported, chosen = open_openvino(openvino, images, outputs, threads=options.threads, precision=None)
        if chosen != "f32":
            found[f"{owner} OpenVINO {chosen} (default)"] = exported
        found[f"{owner} ONNX Runtime fp32"] = open_onnx(onnx, images, outputs, threads=options.threads)
        for name, run in found.items():
            arrays = [activate(torch.as_tensor(array.copy())) for array in run()]
            found_BHW_B = [array.view_as(own) for array, own in zip(arrays, expected, strict=True)]
            difference = _anomalib().largest_difference if "default" in name else _anomalib().check_agreement
            agreement[name] = difference(found_BHW_B, expected)
        sides.update(found)

    with tempfile.TemporaryDirectory(prefix="bench-export-") as scratch:
        folder = Path(scratch)
        theirs = [peer.export(folder / "anomalib", size, format) for format in ("openvino", "onnx")]
        add("anomalib", theirs, images, ("anomaly_map", "pred_score"), lambda probability: probability)
        model = write_model(scene, peer.heads_state(), folder)
        ours = [export(model, folder / "ours", format=format) for format in ("openvino", "onnx")]
        add("ours", ours, as_exported(images), ("anomaly_map", "score"), torch.sigmoid)

        result.notes["agreement"] = agreement
        result.comparisons = [
            (theirs, ours)
            for theirs in sides
            for ours in sides
            if theirs.startswith("anomalib") and ours.startswith("ours") and ("bf16" in theirs) == ("bf16" in ours)
        ]
        result.unit, result.scale = "ms/image", 1e3 / case.batch
        result.rounds = INFERENCE_ROUNDS * options.pairs
        take_turns([Side(name, run) for name, run in sides.items()], result, on_round)


def memory_row(case: Case, work: str, options: Options, result: Result, on_round: OnRound) -> None:
    """(d): peak memory; once, because it hardly varies."""
    ours = ("ours, cached", "ours, no cache") if work == "train" else ("ours",)
    result.unit, result.scale = "MB", 1e-6
    result.comparisons = [("anomalib", side) for side in ours]
    for side in (*ours, "anomalib"):
        result.values[side] = [float(peak_bytes(case, side, work, options.threads))]
        on_round(result)


def heads_row(backbone: str, work: str, options: Options, result: Result, on_round: OnRound) -> None:
    """The heads alone, on given features, against the papers' plain formulation."""
    torch.manual_seed(0)
    channels = {"resnet18": (128, 256), "wide_resnet50_2": (512, 1024)}[backbone]
    net = SuperSimpleNet(channels, ModelConfig(variant=VARIANT))
    finest = 32  # layer 2 of a 256 x 256 image
    features = [torch.rand(GROWTH_BATCH, finest >> i, finest >> i, c) for i, c in enumerate(channels)]
    index = (torch.rand(2 * GROWTH_BATCH * (2 * finest) ** 2) < COVERAGE).nonzero().squeeze(1)
    noise = Noise(0.015 * torch.randn(len(index), sum(channels)), index)

    def step(forward: Callable[..., tuple[Tensor, Tensor]]) -> None:
        maps, scores = forward(features, noise, stop_grad=True)
        (maps.square().mean() + scores.square().mean()).backward()

    if work == "train":
        net.train()
        sides = [
            Side("plain", lambda: step(functools.partial(oracle.forward_train, net))),
            Side("ours", lambda: step(net.forward_train)),
        ]
    else:
        net.eval()
        folded = net.fold(features)
        sides = [
            Side("plain", torch.no_grad()(lambda: oracle.forward_eval(net, features))),
            Side("ours", lambda: net.score(features, folded)),
        ]
    result.unit, result.scale, result.comparisons = "ms/image", 1e3 / GROWTH_BATCH, [("plain", "ours")]
    result.rounds = options.pairs
    take_turns(sides, result, on_round)


def epochs_row(backbone_name: str, options: Options, result: Result, on_round: OnRound) -> None:
    """(f): a whole unsupervised training, from opening the data; same initial weights, images and number of steps.

    anomalib's images are decoded once, kept in memory, and never validated on, which is less than its own engine does;
    ours decodes, computes features and validates after every epoch, as ``python -m ssn train`` does. Both final
    networks are scored by the same code.
    """
    assert options.data is not None
    data = open_search_data(options.data, options.dataset, options.category)
    num_images = data.info.counts["train"].normal
    config = Config(
        model=ModelConfig(variant=VARIANT, backbone=backbone_name, weights=options.weights),
        data=DataConfig(feature_dtype="fp16"),
        synthesis=SynthesisConfig(),
        train=TrainConfig(epochs=options.epochs, batch_size=options.batch, draws_per_epoch=num_images),
    )
    result.unit, result.scale = "s", 1.0
    result.comparisons = [("anomalib fp32", f"ours {precision}") for precision in PRECISIONS]
    metrics = result.notes["test metrics"] = {}

    def finish(side: str, start: float, net: SuperSimpleNet) -> None:
        result.values[side] = [time.perf_counter() - start]
        predictor = Predictor(net, backbone, config)
        test = open_test_data(options.data or "", options.dataset, options.category)
        metrics[side] = evaluate_samples(predictor, test.stream()).metrics.values
        on_round(result)

    for precision in PRECISIONS:
        start = time.perf_counter()
        settings = with_precision(config, precision)
        backbone = prepare_backbone(settings, data)
        trainer = fit(settings, extract(settings, data, backbone), report=_say_epoch(f"ours {precision}", options))
        finish(f"ours {precision}", start, trainer.net)

    start = time.perf_counter()
    backbone = prepare_backbone(config, data)
    images = torch.cat([x_BCHW for _, x_BCHW in load_image_batches(data.stream("train"), config)])
    net = SuperSimpleNet(backbone.channels, config.model, generator_seed=config.train.train_seed)
    peer = _anomalib().AnomalibSide(
        config.model,
        threshold=config.synthesis.perlin_threshold,
        backbone_state=backbone.net.state_dict(),
        heads_state=net.state_dict(),
        epochs=options.epochs,
    )
    torch.manual_seed(config.train.train_seed)
    for epoch in range(options.epochs):
        loss = peer.run_epoch(images, options.batch)
        _say(f"anomalib: epoch {epoch + 1} of {options.epochs}, loss {loss:.3f}")
    net.load_state_dict(peer.heads_state())
    finish("anomalib fp32", start, net)


# --- pieces ---


@functools.cache
def _anomalib() -> Any:
    """The peer's module, which takes half a minute to import."""
    from tests.benchmarks import anomalib_side

    return anomalib_side


def _build_peer(scene: Scene) -> Any:
    return _anomalib().AnomalibSide(
        scene.case.config.model,
        threshold=scene.case.threshold,
        backbone_state=scene.backbone.net.state_dict(),
        heads_state=scene.build_net().state_dict(),
    )


def _trained(case: Case) -> tuple[Scene, Any]:
    """Inputs and a peer that took one step on them, so that no batch norm is an identity."""
    scene = build_scene(case)
    peer = _build_peer(scene)
    torch.manual_seed(0)
    peer.training_step(scene.images_BCHW)
    return scene, peer


def _agree(scene: Scene, peer: Any) -> float:
    """The error of our map and score with the peer's weights."""
    images = scene.images_BCHW[:2]
    predictor = build_predictor(scene, peer.heads_state(), "fp32")
    return float(_anomalib().check_agreement(predict(predictor, images), peer.predict(images)))


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _say_epoch(side: str, options: Options) -> Callable[..., None]:
    return lambda report, _: _say(
        f"{side}: epoch {report.epoch} of {options.epochs}, loss {report.metrics['train_loss']:.3f}"
    )


def select(names: Sequence[str], only: str | None) -> Iterator[str]:
    """Names that are one of the comma-separated ``only``, or begin with one and a slash."""
    wanted = [part.rstrip("/") for part in only.split(",")] if only else [""]
    yield from (name for name in names if any(not part or f"{name}/".startswith(f"{part}/") for part in wanted))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows, by the beginnings of their names: train,infer/resnet18")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each row; inference has four times as many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backbone", action="append", choices=BACKBONES, help="may be repeated; default both")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="without suffix: .json and .md are written"
    )
    parser.add_argument("--resume", action="store_true", help="skip rows that --out has from this commit and machine")
    parser.add_argument("--data", help="shards, for `epochs`; without it that row is left out")
    parser.add_argument("--dataset", default="mvtec_ad")
    parser.add_argument("--category", default="toothbrush")
    parser.add_argument("--weights", default="random", help="model.weights of `epochs`")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="batch size of `epochs`")
    arguments = parser.parse_args(argv)
    options = Options(
        pairs=arguments.pairs,
        threads=arguments.threads,
        backbones=tuple(arguments.backbone or BACKBONES),
        data=arguments.data,
        dataset=arguments.dataset,
        category=arguments.category,
        weights=arguments.weights,
        epochs=arguments.epochs,
        batch=arguments.batch,
    )
    every = rows(options)
    names = list(select(list(every), arguments.only))
    if not names:
        parser.error(f"--only {arguments.only} names no row; --list shows them (epochs needs --data)")
    if arguments.list:
        print("\n".join(names))
        return
    warnings.simplefilter("ignore")  # other people's deprecations; the test suite makes ours errors
    torch.set_num_threads(options.threads)
    report = Report(arguments.out, describe_machine(options.threads), resume=arguments.resume)
    for position, name in enumerate(names, start=1):
        if name in report.rows:
            continue
        print(f"[{position}/{len(names)}] {name}", file=sys.stderr, flush=True)
        result, neighbours = Result(name), Neighbours()

        def on_round(result: Result, neighbours: Neighbours = neighbours) -> None:
            result.notes["cores busy with other processes"] = neighbours.busy_cores()
            report.update(result)
            latest = {side: values[-1] * result.scale for side, values in result.values.items() if values}
            _say("; ".join(f"{side} {value:.4g}" for side, value in latest.items()) + f" {result.unit}")

        every[name](result, on_round)
        print("\n".join(table_lines(result.to_dict())), flush=True)
    print(f"{arguments.out}.json and {arguments.out}.md", file=sys.stderr)


if __name__ == "__main__":
    main()
