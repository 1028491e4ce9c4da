"""Where a run was made: code, hardware and package versions, as tags."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ssn-tuning", "torch", "timm", "numpy", "ray", "optuna", "mlflow", "pyarrow")


def environment_tags(checkout: Path | None = None) -> dict[str, str]:
    """Tags that say with what a run was made; what cannot be known is left out.

    Args:
        checkout: Folder whose git commit is recorded; by default the one that holds this package. An installed wheel,
            or a Ray job's copy of the working directory, has none: there ``code_digest`` has to do.
    """
    folder = checkout or Path(__file__).resolve().parents[2]
    return {
        "code_digest": code_digest(folder),
        **git_tags(folder),
        **job_tags(),
        **hardware_tags(),
        **package_tags(),
    }


def code_digest(folder: Path) -> str:
    """SHA-256 of the sources of ``ssn`` and ``tuning`` in ``folder``: equal wherever the code is."""
    digest = hashlib.sha256()
    for file in sorted(file for package in ("ssn", "tuning") for file in (folder / package).rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def job_tags() -> dict[str, str]:
    """``ray_job``, the submission id, and whatever the submitter said (``ray job submit --metadata-json``)."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    metadata = {str(key): str(value) for key, value in config.get("metadata", {}).items()}
    submission_id = metadata.pop("job_submission_id", None)
    own = {"ray_job": submission_id} if submission_id is not None else {}
    return {f"ray_job_{key}": value for key, value in metadata.items() if key != "job_name"} | own


def git_tags(checkout: Path) -> dict[str, str]:
    """``git_commit`` and ``git_dirty`` of a checkout; empty outside one, or where git is not installed."""
    if not (checkout / ".git").exists():
        return {}
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit, "git_dirty": str(bool(changes)).lower()}


def _git(checkout: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def hardware_tags() -> dict[str, str]:
    """``hardware_cpu``, ``hardware_cores``, ``hardware_memory_gb`` and ``hardware_gpus`` of this machine."""
    tags = {"hardware_cpu": _cpu_model(), "hardware_cores": str(len(os.sched_getaffinity(0)))}
    tags["hardware_memory_gb"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}"
    tags["hardware_gpus"] = ", ".join(_gpu_names()) or "none"
    return tags


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def package_tags() -> dict[str, str]:
    """``version_<package>`` of the installed packages that decide a run's numbers."""
    tags = {"version_python": platform.python_version()}
    for package in PACKAGES:
        try:
            tags[f"version_{package}"] = version(package)
        except PackageNotFoundError:  # a bare checkout has no version of its own
            continue
    return tags
