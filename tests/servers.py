"""Servers that tests talk to over the loopback interface: object stores, Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

KEY, SECRET = "testing-key", "testing-secret"
TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str, process: subprocess.Popen[bytes] | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Until ``host:port`` accepts connections; fails at once if ``process``, which is to open it, has ended."""
    parts = urlsplit(f"//{address}")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((parts.hostname, parts.port), timeout=1).close()
        except OSError:
            assert process is None or process.poll() is None, f"{process.args} ended with {process.returncode}"
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def moto_s3(*buckets: str) -> Iterator[str]:
    """Endpoint of an S3 server with these buckets, empty."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )
    for bucket in buckets:
        client.create_bucket(Bucket=bucket)
    client.close()
    try:
        yield endpoint
    finally:
        server.stop()


@contextmanager
def ray_head(log: Path, env: Mapping[str, str], *options: str, port: int | None = None) -> Iterator[str]:
    """``host:port`` of a Ray cluster, whose head is started as the cluster launcher starts one.

    Args:
        log: File for what it prints.
        env: Its environment, which the jobs that it runs inherit.
        options: More of ``ray start``'s.
        port: By default a free one.
    """
    port = port or free_port()
    # Its own folder, so that no other Ray on this machine takes it for the current cluster; short, for socket names.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={free_port()}"]
        # jobs are submitted to this; on Ray's usual port, the agent of another cluster on this machine may listen
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        with log.open("wb") as output:
            head = subprocess.Popen(
                [*command, f"--temp-dir={folder}", *options],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while head.poll() is None and "Ray runtime started" not in log.read_text():
                time.sleep(0.2)
            assert head.poll() is None, log.read_text()
            yield f"127.0.0.1:{port}"
        finally:
            # its servers are in its process group; told politely, they take half a minute to go, one after the other
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
