"""A sweep on a cluster that grows from no worker to two and shrinks again, on this machine, by Ray's own autoscaler.

Its local provider starts a node as a raylet of its own, with the resources that it is told. ``python -m
tests.integration.autoscaling --picture FILE`` draws the number of nodes over time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.raw_folders import write_mvtec
from tests.servers import free_port, ray_head

ROOT = Path(__file__).resolve().parents[2]
HEAD_NODE_ID = "f" * 51 + "00000"  # as the local provider names it
IDLE_TIMEOUT_MIN = 0.1
TIMEOUT_S = 240.0
SETTLE_S = 8.0
"""Watched after the last worker has gone, lest one comes back."""
SETTINGS = (
    *("model.backbone=resnet18", "model.weights=random", "model.layers=[1,2]"),
    *("model.seg_channels=16", "model.cls_channels=4", "data.image_size=[32,48]", "train.epochs=10"),
    *("train.batch_size=8", "eval.size=[24,32]", "eval.batch_size=4", "search.grace_epochs=10"),
    "finalists.count=1",
)
# Prints the number of living nodes beside the head, every half second, until it is killed; Ray prints other things.
WATCH = """
import time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
while True:
    print("workers", sum(n["Alive"] for n in ray.nodes()) - 1, flush=True)
    time.sleep(0.5)
"""
PLACE = """
import json
from tuning.execution.capacity import cluster_capacity
from tuning.settings import SweepSettings
from tuning.sweep import connect_ray, place
connect_ray()
import ray
placement = place(SweepSettings())
print(json.dumps([placement.use_gpu, placement.num_workers, cluster_capacity().describe(),
                  ray.cluster_resources().get("GPU", 0)]))
"""


@dataclass
class Outcome:
    """What was seen."""

    workers: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the sweep was started, and nodes beside the head."""
    sweep_ended_s: float = 0.0
    output: str = ""
    """Of the sweep."""
    placement: list[Any] = field(default_factory=list)
    """What ``use_gpu: auto`` decided before any GPU was there: use_gpu, num_workers, the capacity, GPUs present."""


def cluster_config(port: int) -> dict[str, Any]:
    """A head without CPUs, and up to two nodes of a CPU and a GPU."""
    lists = (
        "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
        "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
    )
    empty: dict[str, Any] = {key: [] for key in lists.split()} | {"auth": {}, "docker": {}, "file_mounts": {}}
    return empty | {
        "cluster_name": "autoscaling",
        "provider": {
            # Ray knows it as fake_multinode too, but that wants a file that its wheel leaves out
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "file_mounts_sync_continuously": False,
        "idle_timeout_minutes": IDLE_TIMEOUT_MIN,
        "upscaling_speed": 1.0,
        "max_workers": 2,
        "head_node_type": "ray.head.default",  # the provider takes no other name
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }


def run(folder: Path) -> Outcome:
    """Start the cluster, sweep two categories on it, and watch until the last worker has gone."""
    write_mvtec(folder / "raw", "widget")
    write_mvtec(folder / "raw", "gadget", first_seed=1000)
    (folder / "tiny.yaml").write_text("name: tiny\nlayout: mvtec\n")
    port, outcome = free_port(), Outcome()
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_config(port)))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` has it
    }

    def command(*words: str, env: dict[str, str] = env) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    shards = str(folder / "shards")
    command("-m", "ssn", "ingest", str(folder / "tiny.yaml"), "--raw", str(folder / "raw"), "--out", shards)
    options = ("--num-cpus=0", "--include-dashboard=false", "--object-store-memory=200000000")
    with ray_head(
        folder / "head.log", env, *options, f"--autoscaling-config={folder}/cluster.yaml", port=port
    ) as address:
        joined = {k: v for k, v in env.items() if "ID" not in k} | {"RAY_ADDRESS": address}
        outcome.placement = json.loads(command("-c", PLACE, env=joined).splitlines()[-1])
        with _watch(outcome, joined):
            started_s = time.monotonic()
            outcome.output = command(
                *("-m", "tuning", "sweep", "tiny", "--data", shards, "--out", str(folder / "runs"), "--no-use-gpu"),
                *("--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--trials", "3"),
                *(word for setting in SETTINGS for word in ("--set", setting)),
                env=joined,
            )
            outcome.sweep_ended_s = time.monotonic() - started_s
            while outcome.workers[-1][1] > 0 and time.monotonic() - started_s < TIMEOUT_S:
                time.sleep(0.5)
            time.sleep(SETTLE_S)
    return outcome


@contextmanager
def _watch(outcome: Outcome, env: dict[str, str]) -> Iterator[None]:
    watcher = subprocess.Popen([sys.executable, "-c", WATCH], env=env, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    counts = (int(line.split()[1]) for line in watcher.stdout if line.startswith("workers "))
    outcome.workers.append((0.0, next(counts)))  # it has connected
    started_s = time.monotonic()

    def note() -> None:
        outcome.workers.extend((time.monotonic() - started_s, count) for count in counts)

    thread = threading.Thread(target=note)
    thread.start()
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        thread.join()
        watcher.stdout.close()


def draw(outcome: Outcome, picture: Path) -> None:
    """Nodes beside the head over time, with the sweep's duration shaded."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    seconds, nodes = zip(*outcome.workers, strict=True)
    axes.axvspan(0, outcome.sweep_ended_s, color="0.9", label="the sweep runs")
    axes.step(seconds, nodes, where="post", color="C0", linewidth=2, label="worker nodes")
    axes.set(xlabel="seconds since the sweep was started", ylabel="worker nodes", ylim=(-0.1, max(nodes) + 0.9))
    axes.set_xlim(0, seconds[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE")
    picture = parser.parse_args(arguments).picture
    with tempfile.TemporaryDirectory(prefix="autoscaling-") as folder:
        outcome = run(Path(folder))
    draw(outcome, picture)
    changes = [(0.0, -1), *outcome.workers]
    for (_, before), (at_s, now) in zip(changes, outcome.workers, strict=False):
        if before != now:
            print(f"{at_s:6.1f} s: worker nodes {now}")
    print(f"{outcome.sweep_ended_s:6.1f} s: sweep ended; placement with use_gpu auto: {outcome.placement}")


if __name__ == "__main__":
    main()
