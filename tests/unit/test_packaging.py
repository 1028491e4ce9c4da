"""What a wheel carries, and that everything it carries loads."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from ssn.config import Config
from ssn.data.manifest import load_manifest
from ssn.loader import load_config
from tuning.settings import SweepSettings

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = sorted((ROOT / "datasets").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_a_wheel_has_two_top_level_names(wheel_names: list[str]) -> None:
    top = {name.partition("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ssn", "tuning"}
    assert len(top) == 3


def test_a_wheel_carries_every_module_and_every_manifest(wheel_names: list[str]) -> None:
    expected = {str(path.relative_to(ROOT)) for package in ("ssn", "tuning") for path in (ROOT / package).rglob("*.py")}
    expected |= {
        f"ssn/_resources/{kind}/{path.name}"
        for kind in ("datasets", "clusters")
        for path in (ROOT / kind).glob("*.yaml")
    }
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_datasets_and_clusters_hold_yaml_alone() -> None:
    """An importable top-level ``datasets`` would shadow Hugging Face's package."""
    assert MANIFESTS
    for kind in ("datasets", "clusters"):
        assert {path.suffix for path in (ROOT / kind).rglob("*") if path.is_file()} <= {".yaml"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_shipped_manifest_loads_and_its_defaults_are_settings(path: Path) -> None:
    by_name, by_path = load_manifest(path.stem), load_manifest(str(path))
    assert by_name == by_path
    load_config(Config, defaults=by_name.defaults)
    load_config(SweepSettings, defaults=by_name.defaults)


def test_the_demos_settings_load() -> None:
    settings = load_config(
        SweepSettings, files=[ROOT / "demo.yaml"], defaults=load_manifest("synthetic_surfaces").defaults
    )
    assert settings.data.image_size == settings.eval.size == (128, 128)
    assert settings.model.weights == "random"  # nothing to download


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [w for group in (project["dependencies"], *extras) for w in group if not w.startswith(project["name"])]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].strip().lower()
        assert name in pinned, f"{name} is not in constraints.txt; run `make constraints`"


def test_what_a_ray_job_uploads_is_small_and_complete(tmp_path: Path) -> None:
    """``ray job submit --working-dir .``: all code and manifests, no tests, nothing that git ignores."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    expected = {path for folder in ("ssn", "tuning") for path in (ROOT / folder).rglob("*.py")}
    expected |= {path for folder in ("datasets", "clusters") for path in (ROOT / folder).glob("*.yaml")}
    missing = {str(path.relative_to(ROOT)) for path in expected} - names
    assert not missing
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".git/", ".venv/", "demo/"))]
    assert package.stat().st_size < 2_000_000
