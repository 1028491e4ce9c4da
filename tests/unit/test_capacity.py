"""What a cluster can hold, from its description alone; no Ray runtime but in one integration test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from ssn.errors import SSNError
from tests.servers import ray_head
from tuning.execution import capacity as module
from tuning.execution.capacity import (
    Capacity,
    NodeShape,
    check_fits,
    from_autoscaling_config,
    larger,
    max_concurrent,
    slots,
    use_gpu,
)

CLUSTER = {
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}},
        "gpu": {"resources": {"CPU": 8, "GPU": 2}, "min_workers": 0, "max_workers": 4},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 4},
    },
}


def nodes(*resources: dict[str, float]) -> Capacity:
    return Capacity(tuple(NodeShape(r, 1) for r in resources), "the cluster as it is")


def configured(config: dict[str, Any]) -> Capacity:
    found = from_autoscaling_config(config, "as its autoscaler may grow it")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("node", "request_", "expected"),
    [
        ({"CPU": 4}, {"CPU": 1}, 4),
        ({"CPU": 4}, {"CPU": 1.5}, 2),
        ({"CPU": 1}, {"CPU": 0.1}, 10),
        ({"CPU": 4, "GPU": 1}, {"CPU": 1, "GPU": 1}, 1),
        ({"CPU": 4, "GPU": 1}, {"CPU": 0, "GPU": 0.25}, 4),
        ({"CPU": 4}, {"GPU": 1}, 0),
        ({}, {"CPU": 1}, 0),
        ({"CPU": 4, "memory": 10e9}, {"CPU": 1, "memory": 3e9}, 3),
        ({"CPU": 4}, {"CPU": 1, "memory": 3e9}, 4),  # the node's memory is not known
        ({"CPU": 4, "memory": 10e9}, {"CPU": 1}, 4),
    ],
)
def test_slots(node: dict[str, float], request_: dict[str, float], expected: int) -> None:
    assert slots(node, request_) == expected


def test_asking_for_nothing_is_refused() -> None:
    with pytest.raises(SSNError, match="asks for nothing"):
        slots({"CPU": 4}, {"CPU": 0})


def test_cluster_that_scales_from_zero_has_gpus() -> None:
    capacity = larger(nodes({"CPU": 4}), configured(CLUSTER))
    assert capacity.total("GPU") == 8
    assert use_gpu("auto", capacity)
    assert max_concurrent(capacity, num_workers=2, per_worker={"CPU": 1, "GPU": 1}) == 4
    assert capacity.describe() == "84 CPU, 8 GPU (as its autoscaler may grow it)"


def test_limit_on_all_workers_goes_to_those_that_serve_the_request_best() -> None:
    capacity = configured(CLUSTER)
    assert max_concurrent(capacity, num_workers=0, per_worker={"CPU": 4}) == 1 + 4 * 4 + 2 * 2
    assert max_concurrent(capacity, num_workers=0, per_worker={"CPU": 1, "GPU": 1}) == 4 * 2
    assert max_concurrent(configured(CLUSTER | {"max_workers": 1}), num_workers=0, per_worker={"GPU": 1}) == 2


def test_present_cluster_counts_where_it_is_larger() -> None:
    present = nodes({"CPU": 128, "GPU": 16})
    assert larger(present, configured(CLUSTER)) is present
    assert larger(present, None) is present


def test_node_types_are_filled_in_as_the_launcher_does() -> None:
    config = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {"CPU": 2}}, "worker": {"resources": {"CPU": 8}}},
    }
    assert configured(config).total("CPU") == 2 + 3 * 8
    del config["max_workers"]
    assert configured(config).total("CPU") == 2 + 2 * 8


def test_configuration_without_node_types_says_nothing() -> None:
    assert from_autoscaling_config({"max_workers": 3}, "here") is None
    unsized = {"available_node_types": {"worker": {"node_config": {"InstanceType": "p5.48xlarge"}, "max_workers": 2}}}
    assert from_autoscaling_config(unsized, "here") is None


@pytest.mark.parametrize(("setting", "expected"), [("auto", False), (False, False)])
def test_use_gpu_without_gpus(setting: Any, expected: bool) -> None:
    assert use_gpu(setting, nodes({"CPU": 4})) is expected


def test_use_gpu_can_be_declined_and_not_conjured_up() -> None:
    assert not use_gpu(False, nodes({"CPU": 4, "GPU": 1}))
    assert use_gpu(True, nodes({"CPU": 4, "GPU": 1}))
    with pytest.raises(SSNError, match=r"^use_gpu is true, but the cluster has no GPU: 4 CPU \(the cluster as it is\)"):
        use_gpu(True, nodes({"CPU": 4}))


def place(capacity: Capacity, trials: int, num_workers: int, cpu: float) -> bool:
    """Whether all workers are placed after the drivers went, one by one, where they hurt most."""
    free = sorted(round(node["CPU"] * 100) for node in capacity.nodes({"CPU": cpu}))
    worker = round(cpu * 100)
    for _ in range(trials):
        hurt = [i for i, cpus in enumerate(free) if cpus > 0 and (cpus - 1) // worker < cpus // worker]
        # Where one driver costs a worker at once, else where the fewest drivers are still needed to do so.
        target = hurt[0] if hurt else min((c % worker, i) for i, c in enumerate(free) if c > 0)[1]
        free[target] -= 1
    return sum(c // worker for c in free) >= trials * num_workers


@pytest.mark.parametrize("cpus", [(2,), (3,), (4,), (2, 2), (4, 4, 4), (1, 1, 1, 1), (8, 3, 5), (2.5, 2.5)])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("cpu", [0.5, 0.9, 1.0, 2.0])
def test_few_cpus_never_deadlock(cpus: tuple[float, ...], num_workers: int, cpu: float) -> None:
    """The count is one that works wherever drivers land, and one more would be too many."""
    capacity = nodes(*({"CPU": c} for c in cpus))
    trials = max_concurrent(capacity, num_workers=num_workers, per_worker={"CPU": cpu}, allow_none=True)
    assert place(capacity, trials, num_workers, cpu)
    assert not place(capacity, trials + 1, num_workers, cpu)


def test_two_cpus_do_not_hold_two_whole_workers_and_their_driver() -> None:
    with pytest.raises(SSNError, match=r"2 workers of 1 CPU and its driver for 0.01 CPU more, which 2 CPU \(the cl"):
        check_fits(nodes({"CPU": 2}), num_workers=2, per_worker={"CPU": 1})
    check_fits(nodes({"CPU": 2}), num_workers=2, per_worker={"CPU": 0.9})
    check_fits(nodes({"CPU": 2}), num_workers=1, per_worker={"CPU": 1})


def test_more_workers_than_the_cluster_can_ever_hold_are_refused() -> None:
    with pytest.raises(
        SSNError,
        match=r"^a trial asks for 9 workers of 1 CPU and 1 GPU, but the cluster holds 8 at most: 84 CPU, 8 GPU",
    ):
        check_fits(configured(CLUSTER), num_workers=9, per_worker={"CPU": 1, "GPU": 1})
    check_fits(configured(CLUSTER), num_workers=8, per_worker={"CPU": 1, "GPU": 1})


def test_process_larger_than_any_node_is_refused() -> None:
    with pytest.raises(SSNError, match=r"^a trial asks for 5 CPU, but no node has as much: 8 CPU"):
        check_fits(nodes({"CPU": 4}, {"CPU": 4}), num_workers=0, per_worker={"CPU": 5})
    with pytest.raises(SSNError, match="no node has as much"):
        max_concurrent(nodes({"CPU": 4}), num_workers=0, per_worker={"CPU": 5})


def test_trials_that_reserve_memory_never_fill_more_of_it_than_there_is() -> None:
    cluster = nodes({"CPU": 8, "memory": 20e9}, {"CPU": 8, "memory": 64e9})
    assert max_concurrent(cluster, num_workers=0, per_worker={"CPU": 1, "memory": 6e9}) == 3 + 8
    assert max_concurrent(cluster, num_workers=1, per_worker={"CPU": 1, "memory": 6e9}) == 3 + 7
    with pytest.raises(SSNError, match=r"^a trial asks for 1 CPU and 70 GB memory, but no node has as much: 16 CPU .*"):
        max_concurrent(cluster, num_workers=0, per_worker={"CPU": 1, "memory": 70e9})
    with pytest.raises(SSNError, match="64 GB memory on one node; lower num_workers or what each asks for"):
        max_concurrent(cluster, num_workers=2, per_worker={"CPU": 1, "memory": 70e9})


def test_kuberay_cluster_is_asked_for_where_its_account_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    asked = []
    refused: list[int] = []

    class Api:
        """Answers as the Kubernetes API does."""

        def __init__(self, namespace: str) -> None:
            self.namespace = namespace

        def get(self, path: str) -> dict[str, Any]:
            asked.append((self.namespace, path))
            if refused:
                response = requests.Response()
                response.status_code = refused[0]
                raise requests.HTTPError(response=response)
            container = {"resources": {"limits": {"cpu": "4", "memory": "8Gi"}, "requests": {}}}
            gpu = {"resources": {"limits": {"cpu": "8", "memory": "8Gi", "nvidia.com/gpu": "2"}, "requests": {}}}
            return {
                "metadata": {"namespace": "vision", "name": "defects"},
                "spec": {
                    "enableInTreeAutoscaling": True,
                    "headGroupSpec": {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}},
                    "workerGroupSpecs": [
                        {
                            "groupName": "gpu",
                            "replicas": 0,
                            "minReplicas": 0,
                            "maxReplicas": 3,
                            "rayStartParams": {},
                            "template": {"spec": {"containers": [gpu]}},
                        }
                    ],
                },
            }

    namespace = tmp_path / "namespace"
    namespace.write_text("vision\n")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "defects")
    monkeypatch.setattr(module, "_NAMESPACE_FILE", namespace)
    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Api)
    config = module.read_head_autoscaling_config()
    assert asked == [("vision", "rayclusters/defects")]
    assert config is not None
    assert configured(config).describe() == "28 CPU, 6 GPU (as its autoscaler may grow it)"

    refused.append(403)
    assert module.read_head_autoscaling_config() is None
    refused[0] = 500
    with pytest.raises(requests.HTTPError):
        module.read_head_autoscaling_config()


@pytest.mark.integration
def test_maximum_of_a_real_autoscaling_cluster_is_found(tmp_path: Path) -> None:
    """A head started as the cluster launcher starts it; its worker type never launches, having no demand."""
    lists = (
        "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
        "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
    )
    empty: dict[str, Any] = {key: [] for key in lists.split()} | {"auth": {}, "docker": {}, "file_mounts": {}}
    config = empty | {
        "cluster_name": "capacity",
        "provider": {"type": "fake_multinode"},
        "file_mounts_sync_continuously": False,
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 8, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "PYTHONPATH": str(Path(module.__file__).parents[1]),
    }
    log = tmp_path / "head.log"
    options = ("--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={file}")
    with ray_head(log, environment, *options) as address:
        script = (
            "import json, ray; from tuning.execution.capacity import cluster_capacity\n"
            f"ray.init(address='{address}', log_to_driver=False, logging_level='ERROR')\n"
            "c = cluster_capacity(); print(json.dumps([c.total('CPU'), c.total('GPU'), c.source]))"
        )
        found = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
        )
    assert found.returncode == 0, found.stderr + log.read_text()
    assert json.loads(found.stdout.splitlines()[-1]) == [25.0, 6.0, "as its autoscaler may grow it"]
