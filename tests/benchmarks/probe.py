"""Peak memory of one side's training step or inference, in a process of its own.

Run by ``tests.benchmarks.peer`` as ``python -m tests.benchmarks.probe JSON``; prints JSON. Linux alone, whose kernel
can be told to forget a process's peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.our_side import Case


def peak_bytes(case: Case, side: str, work: str, threads: int) -> int:
    """Memory that a side needs beyond imports, weights and inputs.

    Args:
        case: What is computed.
        side: ``anomalib``, ``ours, cached`` or ``ours, no cache``; for inference, ``anomalib`` or ``ours``.
        work: ``train``: two steps, so that the optimiser's state is there in the second; ``infer``: two batches.
        threads: Of torch.

    Raises:
        MemoryError: the process did not live to tell.
    """
    request = json.dumps({"case": asdict(case), "side": side, "work": work, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.probe", request],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode != 0:
        raise MemoryError(
            f"{side}, {work}: ended with status {done.returncode}, -9 being the kernel's when it runs out"
        )
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def main(request: dict[str, Any]) -> None:
    """Prepare, forget the peak so far, work, print what the peak then was."""
    import torch

    torch.set_num_threads(request["threads"])
    work = _prepare(Case(**request["case"]), request["side"], request["work"])
    print(json.dumps({"bytes": peak_beyond_now(lambda: (work(), work()))}))


def peak_beyond_now(work: Callable[[], object]) -> int:
    """Most memory that this process holds during ``work``, in bytes beyond what it holds now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory of the preparations would be used again without being counted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    work()
    return _status("VmHWM") - before


def _prepare(case: Case, side: str, work: str) -> Callable[[], object]:
    from tests.benchmarks.our_side import build_predictor, build_scene, predict, training_steps

    scene = build_scene(case)
    images, heads = scene.images_BCHW, scene.build_net().state_dict()
    if side == "anomalib":
        from tests.benchmarks.anomalib_side import AnomalibSide

        peer = AnomalibSide(
            case.config.model,
            threshold=case.threshold,
            backbone_state=scene.backbone.net.state_dict(),
            heads_state=heads,
        )
        return (lambda: peer.training_step(images)) if work == "train" else (lambda: peer.predict(images))
    if work == "train":
        return training_steps(scene, "fp32")[side.removeprefix("ours, ")]
    predictor = build_predictor(scene, heads, "fp32")
    return lambda: predict(predictor, images)


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
