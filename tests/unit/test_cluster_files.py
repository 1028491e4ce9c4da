"""The files of ``clusters/`` and the Dockerfile, held against what reads them; without a cloud or a cluster."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from jsonschema.exceptions import best_match
from kubernetes import client
from pydantic import BaseModel, ConfigDict

from tuning.execution.capacity import from_autoscaling_config, max_concurrent, use_gpu

ROOT = Path(__file__).resolve().parents[2]
AWS, KUBERAY, DOCKERFILE = ROOT / "clusters/aws.yaml", ROOT / "clusters/kuberay.yaml", ROOT / "Dockerfile"
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


@pytest.fixture
def aws() -> dict[str, Any]:
    return dict(yaml.safe_load(AWS.read_text()))


@pytest.fixture
def prepared(aws: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults filled in, as ``ray up`` starts with it."""
    from ray.autoscaler._private.util import prepare_config

    return dict(prepare_config(aws))


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    """Of kuberay.yaml, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERAY.read_text())}


@pytest.fixture
def ray_cluster(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return documents["RayCluster"]


# --- AWS, the cluster launcher


def test_ray_accepts_the_launcher_file(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda c: c.update(max_wokers=4), jsonschema.ValidationError),
        (lambda c: c["docker"].update(imge="ray"), jsonschema.ValidationError),
        (lambda c: c["provider"]["security_group"].update(Name="ssn"), jsonschema.ValidationError),
        (lambda c: c.update(head_node_type="cpu"), ValueError),
        (lambda c: c["available_node_types"]["gpu"].update(min_workers=5), ValueError),
    ],
)
def test_ray_refuses_a_spoilt_one(
    spoil: Callable[[dict[str, Any]], None], error: type[Exception], prepared: dict[str, Any]
) -> None:
    from ray.autoscaler._private.util import validate_config

    spoil(prepared)
    with pytest.raises(error):
        validate_config(prepared)


def test_one_head_on_demand_and_gpu_nodes_on_spot_from_none(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert set(types) == {"head", "gpu"}
    assert prepared["head_node_type"] == "head"
    assert (types["head"]["min_workers"], types["head"]["max_workers"]) == (0, 0)
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, prepared["max_workers"])
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < prepared["idle_timeout_minutes"] <= 15


def test_the_autoscaler_finds_an_image_for_each_node_type(prepared: dict[str, Any]) -> None:
    """Its second version fails with KeyError where a file gives ``head_image`` and ``worker_image`` alone."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = AutoscalingConfig(prepared, skip_content_hash=True)
    assert config.get_docker_config("head")["image"] == prepared["docker"]["image"]
    assert config.get_docker_config("gpu")["image"] == prepared["docker"]["worker_image"]
    assert config.get_docker_config("gpu")["image"].endswith("-gpu")


@pytest.mark.parametrize("filled_in", [False, True])
def test_a_sweep_sees_the_gpus_that_there_can_be(
    filled_in: bool, aws: dict[str, Any], prepared: dict[str, Any]
) -> None:
    """In the file, for whoever declares it, and in what ``ray up`` puts on the head."""
    capacity = from_autoscaling_config(prepared if filled_in else aws, "as its autoscaler may grow it")
    assert capacity is not None
    assert use_gpu("auto", capacity)
    assert capacity.total("GPU") == aws["max_workers"]
    assert max_concurrent(capacity, num_workers=1, per_worker={"CPU": 1, "GPU": 1}) == aws["max_workers"]


def launcher_environment(docker: dict[str, Any], kind: str) -> dict[str, str]:
    """Environment of the containers of ``head`` or ``worker`` nodes."""
    words = shlex.split(" ".join(docker["run_options"] + docker.get(f"{kind}_run_options", [])))
    pairs = [words[i + 1].partition("=") for i, word in enumerate(words) if word == "-e"]
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_ray_start_is_in_token_mode_and_finds_the_token(kind: str, prepared: dict[str, Any]) -> None:
    commands = prepared[f"{kind}_start_ray_commands"]
    assert sum("ray start" in command for command in commands) == 1
    assert not any("RAY_AUTH" in command for command in commands)
    # commands run in the container, with its environment
    assert launcher_environment(prepared["docker"], kind)["RAY_AUTH_MODE"] == "token"
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_dashboard_and_mlflow_listen_on_the_loopback_interface_alone(prepared: dict[str, Any]) -> None:
    ray_start, mlflow = (
        next(c for c in prepared["head_start_ray_commands"] if text in c) for text in ("ray start", "mlflow server")
    )
    assert "--dashboard-host=127.0.0.1" in shlex.split(ray_start)
    assert "--host 127.0.0.1 --port 5000 --workers 1" in mlflow
    environment = launcher_environment(prepared["docker"], "head")
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert re.fullmatch(r"s3://[\w.-]+/mlflow", environment["MLFLOW_ARTIFACTS_DESTINATION"])
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert not [name for name in launcher_environment(prepared["docker"], "worker") if name.startswith("MLFLOW_")]
    assert "0.0.0.0" not in AWS.read_text()
    assert "IpPermissions" not in AWS.read_text()  # ports that Ray would open beside SSH


def test_mlflows_database_is_on_the_nodes_disk(prepared: dict[str, Any]) -> None:
    (volume,) = [o.split()[1] for o in prepared["docker"]["head_run_options"] if o.startswith("-v ")]
    node, _, container = volume.partition(":")
    assert prepared["provider"]["cache_stopped_nodes"] is True
    assert any(f"sqlite:///{container}/" in command for command in prepared["head_start_ray_commands"])
    # made before docker makes it, as root's
    assert f"mkdir -p ~/{Path(node).name}" in prepared["initialization_commands"]
    assert node == f"/home/{prepared['auth']['ssh_user']}/{Path(node).name}"


def test_mounted_files_are_in_a_checkout_and_are_what_is_installed(prepared: dict[str, Any]) -> None:
    mounts = {k: v for k, v in prepared["file_mounts"].items() if not k.endswith("auth_token")}
    assert all((ROOT / local).is_file() for local in mounts.values())
    assert set(mounts.values()) == {"pyproject.toml", "constraints.txt"}
    (install,) = [c for c in prepared["setup_commands"] if "uv pip install" in c]
    assert [word for word in shlex.split(install) if word.startswith("~/")] == list(mounts)
    assert prepared["head_setup_commands"] == prepared["setup_commands"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "boto3" in pinned  # neither a requirement of the project nor of its own requirements


def test_the_image_installs_what_the_launchers_nodes_install(aws: dict[str, Any]) -> None:
    def options(command: str) -> list[str]:
        words = command.partition("uv pip install")[2].split()
        return [Path(word).name for word in words if word not in ("--quiet", "--no-cache")]

    (run,) = re.findall(r"^RUN (.*)", DOCKERFILE.read_text().replace("\\\n", ""), re.MULTILINE)
    (install,) = [c for c in aws["setup_commands"] if "uv pip install" in c]
    assert options(run) == options(install)
    assert "boto3" in options(run)


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_parse(key: str, prepared: dict[str, Any]) -> None:
    for command in prepared[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


# --- both


def images() -> Iterator[str]:
    docker = yaml.safe_load(AWS.read_text())["docker"]
    yield from (docker["image"], docker["worker_image"])
    yield from re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)


def test_images_are_of_the_ray_that_is_pinned(ray_cluster: dict[str, Any]) -> None:
    version = importlib.metadata.version("ray")
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(rf"rayproject/ray:{re.escape(version)}-py31[12](-gpu)?", image) for image in images())
    assert ray_cluster["spec"]["rayVersion"] == version


@pytest.mark.parametrize("path", [AWS, KUBERAY, DOCKERFILE], ids=lambda path: path.name)
def test_no_file_holds_a_key_or_names_a_host(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA|(?i:secret_access_key|access_key_id|aws_credentials|auth_token[=:] *\w)", text)
    assert "RAY_AUTH_TOKEN" not in text
    hosts = r"(?:[\w-]+\.)+(?:com|io|org|net|dev)\b"
    # two names in Kubernetes' own style, which are no addresses
    known = {"ray.io", "eks.amazonaws.com", "nvidia.com"}
    assert set(re.findall(hosts, text)) <= known


@pytest.mark.parametrize("path", [AWS, KUBERAY], ids=lambda path: path.name)
def test_three_lines_are_to_edit(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if re.search(r"EDIT \d of", line)]
    assert [re.findall(r"# EDIT (\d) of 3\b", line) for line in lines] == [["1"], ["2"], ["3"]]
    assert not any(line.lstrip().startswith("#") for line in lines)


# --- Kubernetes, KubeRay


class Resource(BaseModel):
    """What the API server asks of every resource: no unknown fields, no value of another type than the declared one."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Resource):
    enableK8sTokenAuth: bool | None = None
    secretName: str | None = None
    mode: Literal["disabled", "token"] | None = None


class AutoscalerOptions(Resource):
    resources: client.V1ResourceRequirements | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    securityContext: client.V1SecurityContext | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None
    env: list[client.V1EnvVar] | None = None
    envFrom: list[client.V1EnvFromSource] | None = None
    volumeMounts: list[client.V1VolumeMount] | None = None


class RedisCredential(Resource):
    value: str | None = None
    valueFrom: client.V1EnvVarSource | None = None


class GcsFaultToleranceOptions(Resource):
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None
    redisAddress: str | None = None


class UpgradeStrategy(Resource):
    type: Literal["Recreate", "None"] | None = None


class ScaleStrategy(Resource):
    workersToDelete: list[str] | None = None


class GroupSpec(Resource):
    template: client.V1PodTemplateSpec
    rayStartParams: dict[str, str] | None = None
    resources: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class HeadGroupSpec(GroupSpec):
    headService: client.V1Service | None = None
    enableIngress: bool | None = None
    serviceType: str | None = None


class WorkerGroupSpec(GroupSpec):
    groupName: str
    suspend: bool | None = None
    replicas: int | None = None
    minReplicas: int
    maxReplicas: int
    idleTimeoutSeconds: int | None = None
    scaleStrategy: ScaleStrategy | None = None
    numOfHosts: int | None = None


class RayClusterSpec(Resource):
    headGroupSpec: HeadGroupSpec
    upgradeStrategy: UpgradeStrategy | None = None
    authOptions: AuthOptions | None = None
    suspend: bool | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: dict[str, str] | None = None
    enableInTreeAutoscaling: bool | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    rayVersion: str | None = None
    workerGroupSpecs: list[WorkerGroupSpec] | None = None


class RayCluster(Resource):
    """The ``spec`` of KubeRay 1.6.2's custom resource definition ``ray.io/v1``, every field of it.

    Pods, services and what else is Kubernetes' own comes from Kubernetes' own client, which is made from its OpenAPI
    definition; the definition of KubeRay repeats that part word by word.
    """

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: client.V1ObjectMeta
    spec: RayClusterSpec


DEFINITIONS: dict[str, type[BaseModel]] = {
    "RayCluster": RayCluster,
    "ServiceAccount": client.V1ServiceAccount,
    "PersistentVolumeClaim": client.V1PersistentVolumeClaim,
}


def misfits(document: dict[str, Any]) -> list[str]:
    """Where a document differs from the definition of its kind."""
    schema = DEFINITIONS[document["kind"]].model_json_schema()
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    # the one of a field's alternatives that a value comes nearest to, not "is not valid under any"
    return [f"{leaf.json_path}: {leaf.message}" for leaf in (best_match([error]) for error in errors)]


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_each_document_fits_its_definition(kind: str, documents: dict[str, dict[str, Any]]) -> None:
    assert misfits(documents[kind]) == []


def head(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["spec"]["headGroupSpec"]


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda c: c["spec"].update(enableInTreeAutoscaler=True), "'enableInTreeAutoscaler' was unexpected"),
        (lambda c: c["spec"]["authOptions"].update(mode="Token"), "'Token' is not one of ['disabled', 'token']"),
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(maxReplicas="4"), "'4' is not of type 'integer'"),
        (lambda c: c["spec"]["workerGroupSpecs"][0].pop("groupName"), "'groupName' is a required property"),
        (lambda c: head(c)["rayStartParams"].update({"num-cpus": 0}), "0 is not of type 'string'"),
        (lambda c: c["spec"].update(workerGroupSpecs={}), "$.spec.workerGroupSpecs: {} is not"),
        (lambda c: head(c).update(template=[]), "[] is not of type 'object'"),
        (lambda c: head(c)["template"]["spec"].update(toleration=[]), "'toleration' was unexpected"),
        (lambda c: head(c)["template"]["spec"].pop("containers"), "'containers' is a required property"),
        (lambda c: head(c)["template"]["spec"]["containers"][0]["env"][0].pop("name"), "'name' is a required property"),
        (lambda c: head(c)["template"]["spec"]["containers"][0].update(ports=[8265]), "8265 is not of type 'object'"),
    ],
)
def test_a_spoilt_one_is_found_out(
    spoil: Callable[[dict[str, Any]], None], found: str, ray_cluster: dict[str, Any]
) -> None:
    spoil(ray_cluster)
    (message,) = misfits(ray_cluster)
    assert found in message


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema with the strictness that ``kubectl apply`` asks of the API server: no unknown fields."""
    out = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        out["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = closed(schema["items"])
    return out


def test_a_crds_schema_is_read_strictly() -> None:
    port = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    spec = {"type": "object", "properties": {"ports": {"type": "array", "items": port}, "labels": {"type": "object"}}}
    spec["properties"]["free"] = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}
    schema = closed({"type": "object", "properties": {"spec": spec}})
    jsonschema.validate({"spec": {"ports": [1, "http"], "labels": {"a": "b"}, "free": {"any": 1}}}, schema)
    for wrong in ({"port": [1]}, {"ports": [1.5]}, {"ports": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"spec": wrong}, schema)


def test_kuberays_own_definition_accepts_the_ray_cluster(ray_cluster: dict[str, Any]) -> None:
    file = os.environ.get("KUBERAY_CRD")
    if not file:
        pytest.skip("no KUBERAY_CRD; make one by `kubectl get crd rayclusters.ray.io -o yaml > FILE`")
    crd = yaml.safe_load(Path(file).read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.Draft202012Validator(closed(schema)).validate(ray_cluster)


def test_the_operators_own_rules_are_kept(ray_cluster: dict[str, Any]) -> None:
    """Those of its validation that concern this file; the API server does not know them."""
    spec = ray_cluster["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", ray_cluster["metadata"]["name"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # with the second version of the autoscaler, a pod is never started again
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        environment = {entry["name"] for entry in group["template"]["spec"]["containers"][0].get("env", [])}
        assert not environment & {"RAY_enable_autoscaler_v2", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_REDIS_ADDRESS"}
    for group in spec["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] <= group["maxReplicas"]


def test_pods_use_a_role_and_names_agree(documents: dict[str, dict[str, Any]], ray_cluster: dict[str, Any]) -> None:
    assert set(documents) == {"ServiceAccount", "PersistentVolumeClaim", "RayCluster"}
    account = documents["ServiceAccount"]["metadata"]
    assert account["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
    head, worker = (
        group["template"]["spec"]
        for group in (ray_cluster["spec"]["headGroupSpec"], *ray_cluster["spec"]["workerGroupSpecs"])
    )
    assert head["serviceAccountName"] == worker["serviceAccountName"] == account["name"]
    (volume,) = head["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == documents["PersistentVolumeClaim"]["metadata"]["name"]
    (mlflow,) = head["initContainers"]
    (mount,) = mlflow["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert f"sqlite:///{mount['mountPath']}/mlflow.db" in mlflow["args"]
    assert len({c["image"] for c in (mlflow, *head["containers"], *worker["containers"])}) == 1
    assert ray_cluster["spec"]["authOptions"]["mode"] == "token"


def test_a_pods_dashboard_and_mlflow_listen_on_the_loopback_interface_alone(ray_cluster: dict[str, Any]) -> None:
    group = ray_cluster["spec"]["headGroupSpec"]
    assert group["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    (mlflow,), (ray,) = group["template"]["spec"]["initContainers"], group["template"]["spec"]["containers"]
    assert "--host 127.0.0.1 --port 5000 --workers 1" in " ".join(mlflow["command"])
    assert mlflow["restartPolicy"] == "Always"  # else the pod would wait for it to end
    assert mlflow["startupProbe"]["exec"]["command"][-1].endswith("/127.0.0.1/5000")
    environment = {entry["name"]: entry["value"] for entry in ray["env"]}
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_a_sweep_sees_the_gpus_of_the_ray_cluster(ray_cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = copy.deepcopy(ray_cluster)
    resource["metadata"]["namespace"] = "default"  # as the API server adds it
    (group,) = resource["spec"]["workerGroupSpecs"]
    config = _derive_autoscaling_config_from_ray_cr(resource)
    assert config["idle_timeout_minutes"] == resource["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] / 60
    capacity = from_autoscaling_config(config, "as its autoscaler may grow it")
    assert capacity is not None
    assert capacity.total("GPU") == group["maxReplicas"]
    assert max_concurrent(capacity, num_workers=1, per_worker={"CPU": 1, "GPU": 1}) == group["maxReplicas"]
