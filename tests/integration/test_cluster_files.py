"""``ray up clusters/aws.yaml`` against a mocked AWS: what is made there, and what is run on the nodes.

Ray's own launcher and autoscaler run; EC2 and IAM are moto's, and commands for nodes are written down instead of run.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from tests.servers import KEY, SECRET, free_port, moto_s3, wait_for
from tuning.execution.capacity import from_autoscaling_config

# ray up never closes the file by which it takes its settings to the head
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-bootstrap-:ResourceWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
AWS = ROOT / "clusters/aws.yaml"
REGION = "us-east-1"
HOME = "/home/ray"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of somebody who has made a token and works in the checkout."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a-token-for-tests")
    return tmp_path


@pytest.fixture
def cloud(home: Path) -> Iterator[Any]:
    """EC2 of an account that has the roles which the README makes, and nothing else."""
    from ray.autoscaler._private.aws import config, utils

    caches = (utils.resource_cache, utils.client_cache, config._get_subnets_or_die)
    for cache in caches:
        cache.cache_clear()
    with mock_aws():
        iam = boto3.client("iam", REGION)
        for name in ("ssn-head", "ssn-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.resource("ec2", REGION)
    for cache in caches:
        cache.cache_clear()
    gc.collect()  # here, where its warning is expected, rather than in another test


def launcher_file() -> dict[str, Any]:
    config = dict(yaml.safe_load(AWS.read_text()))
    config["provider"]["region"] = REGION  # the line is the user's to edit
    return config


def bootstrap() -> dict[str, Any]:
    from ray.autoscaler._private import commands

    return dict(commands._bootstrap_config(launcher_file(), no_config_cache=True))


def open_ports(cloud: Any, config: dict[str, Any]) -> list[tuple[int, str]]:
    """Ports of the nodes' security group that are open from outside the group, and for whom."""
    (group_id,) = {g for t in config["available_node_types"].values() for g in t["node_config"]["SecurityGroupIds"]}
    group = cloud.SecurityGroup(group_id)
    assert group.group_name == "ssn"
    inside = [rule for rule in group.ip_permissions if rule["UserIdGroupPairs"]]
    assert [(r["IpProtocol"], [p["GroupId"] for p in r["UserIdGroupPairs"]]) for r in inside] == [("-1", [group_id])]
    outside = [rule for rule in group.ip_permissions if not rule["UserIdGroupPairs"]]
    assert all(rule["FromPort"] == rule["ToPort"] for rule in outside)
    return [(rule["FromPort"], ip["CidrIp"]) for rule in outside for ip in rule["IpRanges"]]


def test_only_ssh_is_open(cloud: Any, home: Path) -> None:
    config = bootstrap()
    assert open_ports(cloud, config) == [(22, "0.0.0.0/0")]
    (key,) = (home / ".ssh").iterdir()
    assert key.stat().st_mode & 0o077 == 0
    assert [pair.name for pair in cloud.key_pairs.all()] == [key.stem]


def test_a_security_group_that_is_there_stays_as_it_is(cloud: Any) -> None:
    """So that it can be open to one address alone."""
    (vpc,) = cloud.vpcs.all()
    group = cloud.create_security_group(GroupName="ssn", Description="ssn", VpcId=vpc.id)
    group.authorize_ingress(IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="203.0.113.7/32")
    itself = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    group.authorize_ingress(IpPermissions=[itself])
    config = bootstrap()
    assert open_ports(cloud, config) == [(22, "203.0.113.7/32")]
    assert {g.group_name for g in cloud.security_groups.all()} == {"default", "ssn"}


def test_stated_resources_are_those_of_the_instance_types(cloud: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    stated = launcher_file()
    bare = copy.deepcopy(stated)
    for node_type in bare["available_node_types"].values():
        del node_type["resources"]
    found = AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
    for name, node_type in stated["available_node_types"].items():
        assert {k: v for k, v in found[name]["resources"].items() if k in ("CPU", "GPU")} == node_type["resources"]


class Nodes:
    """Stands in for ``subprocess``: writes down what Ray's launcher would run over SSH, and answers as a node does."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self.on_node: list[str] = []
        self.in_container: list[str] = []
        self.copied: dict[str, str] = {}
        """Contents of what went to the node, by path below the folder of its container."""

    def check_call(self, words: list[str], **_: Any) -> int:
        self.note(words)
        return 0

    def check_output(self, words: list[str], **_: Any) -> bytes:
        command = self.note(words)
        if "printenv HOME" in command:
            return HOME.encode()
        if ".Config.Env" in command:
            return json.dumps([f"HOME={HOME}"]).encode()
        if ".Runtimes" in command:
            return b"map[nvidia:{nvidia-container-runtime}]"
        if "command -v docker" in command:
            return b"/usr/bin/docker"
        if "meminfo" in command:
            return b"MemAvailable: 16000000 kB"
        return b""

    def note(self, words: list[str]) -> str:
        """Take a command out of the shells around it: SSH's, ``docker exec``'s, and the login shell in each."""
        if words[0] == "rsync":
            source, _, target = words[-2], *words[-1].partition(":")[::2]
            self.copied[target.partition("/ssn/")[2]] = Path(source).read_text()
            return ""
        assert words[0] == "ssh"
        (start,) = [i for i, word in enumerate(words) if word.startswith("ubuntu@")]
        command, notes = " ".join(words[start + 1 :]), self.on_node
        while True:
            subprocess.run(["bash", "-n", "-c", command], check=True)
            inner = shlex.split(command)
            if inner[:2] == ["docker", "exec"] and "/bin/bash" in inner:
                command, notes = inner[-1], self.in_container
            elif inner[:4] == ["bash", "--login", "-c", "-i"]:
                (command,) = re.fullmatch(r"source ~/.bashrc; export [\w= ]+ && \((.*)\)", inner[4], re.DOTALL).groups()
            else:
                notes.append(command)
                return command

    def run(self) -> str:
        """The ``docker run`` of the node."""
        (command,) = [command for command in self.on_node if command.startswith("docker run")]
        return command

    def index(self, text: str) -> int:
        """Of the command in the container that holds it."""
        (found,) = [i for i, command in enumerate(self.in_container) if text in command]
        return found


def test_ray_up_sets_up_a_head_which_sets_up_workers(cloud: Any, home: Path) -> None:
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    config = bootstrap()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    asked: set[str] = set()
    for client in (provider.ec2.meta.client, provider.ec2_fail_fast.meta.client):
        client.meta.events.register("before-call.ec2", lambda model, **_: asked.add(model.name))

    def ray_up() -> Nodes:
        nodes = Nodes()
        commands.get_or_create_head_node(
            copy.deepcopy(config), str(AWS), False, False, True, None, _provider=provider, _runner=nodes
        )
        return nodes

    # the head
    nodes = ray_up()
    (head,) = cloud.instances.all()
    assert head.iam_instance_profile["Arn"].endswith("/ssn-head")
    assert head.instance_lifecycle is None  # on demand
    assert nodes.on_node.index("mkdir -p ~/mlflow") < nodes.on_node.index(nodes.run())
    assert "rayproject/ray:" in nodes.run()
    for option in (
        "-e RAY_AUTH_MODE=token",
        "-e MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
        "-e RAY_JOB_STOP_WAIT_TIME_S=60",
        "-v /home/ubuntu/mlflow:/home/ray/mlflow",
        f"-v /tmp/ray_tmp_mount/ssn/~/.ray/auth_token:{HOME}/.ray/auth_token",
        "--net=host",
    ):
        assert f" {option} " in nodes.run()
    assert nodes.copied["~/.ray/auth_token"] == "a-token-for-tests"
    assert nodes.copied["~/ssn/constraints.txt"] == (ROOT / "constraints.txt").read_text()
    assert nodes.index("uv pip install") < nodes.index("mlflow server") < nodes.index("ray start --head")
    assert f"-r {HOME}/ssn/pyproject.toml boto3 -c {HOME}/ssn/constraints.txt" in "".join(nodes.in_container)
    assert f"--autoscaling-config={HOME}/ray_bootstrap_config.yaml" in nodes.in_container[-1]

    # what the head's autoscaler, and a sweep, find there
    on_head = json.loads(nodes.copied["~/ray_bootstrap_config.yaml"])
    capacity = from_autoscaling_config(on_head, "as its autoscaler may grow it")
    assert capacity is not None
    assert capacity.total("GPU") == launcher_file()["max_workers"]

    # a worker, launched and set up from there
    for path, text in nodes.copied.items():
        (home / path.removeprefix("~/")).parent.mkdir(exist_ok=True)
        (home / path.removeprefix("~/")).write_text(text)
    autoscaling = AutoscalingConfig(on_head)
    tags = {"ray-node-type": "worker", "ray-user-node-type": "gpu", "ray-launch-config": "1", "ray-node-name": "worker"}
    (worker_id,) = provider.create_node(autoscaling.get_cloud_node_config("gpu"), tags, 1)
    worker = cloud.Instance(worker_id)
    assert worker.iam_instance_profile["Arn"].endswith("/ssn-worker")
    assert worker.instance_lifecycle == "spot"
    provider.non_terminated_nodes({})
    nodes = Nodes()
    RayInstaller(provider, autoscaling, nodes).install_ray(
        Instance(cloud_instance_id=worker_id, instance_type="gpu"), "10.0.0.1"
    )
    assert "-gpu " in nodes.run()
    assert " --runtime=nvidia " in nodes.run()
    assert " -e RAY_AUTH_MODE=token " in nodes.run()
    assert "MLFLOW" not in nodes.run()
    assert nodes.copied["~/.ray/auth_token"] == "a-token-for-tests"
    assert "ray_bootstrap" not in " ".join(nodes.copied)  # the key that opens every node stays on the head
    assert nodes.index("nvidia-smi") < nodes.index("ray start")
    assert "export RAY_HEAD_IP=10.0.0.1; " in nodes.in_container[-1]

    # `ray down`, and `ray up` again: the same head with the same disk
    provider.terminate_nodes([head.id])
    head.reload()
    assert head.state["Name"] == "stopped"
    nodes = ray_up()
    head.reload()
    assert head.state["Name"] == "running"
    assert len(list(cloud.instances.all())) == 2
    assert nodes.index("uv pip install") < nodes.index("mlflow server") < nodes.index("ray start --head")

    # what the head's role must allow, beside iam:PassRole and ssm:GetParameters
    assert asked == {"DescribeInstances", "RunInstances", "CreateTags", "StartInstances", "StopInstances"}


@pytest.mark.cluster
def test_mlflow_is_started_once_and_keeps_artifacts_in_the_bucket(tmp_path: Path) -> None:
    """The head's own command, but for its port and folder."""
    import mlflow

    port = free_port()
    (command,) = [c for c in launcher_file()["head_start_ray_commands"] if "mlflow server" in c]
    command = command.replace(f"{HOME}/mlflow", str(tmp_path)).replace("5000", str(port))
    with moto_s3("bucket") as s3:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))} | {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": s3,
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/mlflow",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        try:
            for _ in range(2):
                subprocess.run(["bash", "-c", command], env=environment, check=True)
            wait_for(f"127.0.0.1:{port}")
            assert len(mlflow_servers(tmp_path)) == 1
            client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
            run = client.create_run(client.create_experiment("parts"))
            client.log_text(run.info.run_id, "some text", "notes.txt")
            store = boto3.client("s3", REGION, endpoint_url=s3, aws_access_key_id=KEY, aws_secret_access_key=SECRET)
            (stored,) = store.list_objects_v2(Bucket="bucket")["Contents"]
            store.close()
            assert re.fullmatch(rf"mlflow/\d+/{run.info.run_id}/artifacts/notes.txt", stored["Key"])
        finally:
            for pid in mlflow_servers(tmp_path):
                os.killpg(pid, signal.SIGTERM)  # setsid has given it a group, which its workers share
    assert (tmp_path / "mlflow.db").stat().st_size > 0


def mlflow_servers(folder: Path) -> list[int]:
    """Ids of those that keep their database in a folder, without their workers'."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,pgid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, group, words in rows if pid == group and f"sqlite:///{folder}/mlflow.db" in words]
