"""What importing costs: the model needs no platform, and --help needs no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded_after(code: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport json, sys\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.rpartition("MODULES")[2])
    return {name.partition(".")[0] for name in modules}


def test_the_model_package_pulls_in_no_platform() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "ssn").rglob("*.py")
        # the command line and what only it imports
        if path.name not in ("__main__.py", "__init__.py", "cli.py", "console.py", "loader.py")
    )
    assert {"ssn.config", "ssn.model", "ssn.data.reader"} <= set(modules)
    loaded = loaded_after("import ssn\n" + "\n".join(f"import {name}" for name in modules))
    assert not loaded & {"ray", "mlflow", "optuna", "pydantic", "s3fs", "tuning"}


@pytest.mark.parametrize("package", ["ssn", "tuning"])
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_command_lines_help_imports_nothing_heavy(package: str, arguments: list[str]) -> None:
    code = f"""
import sys
from {package}.__main__ import main
sys.argv = ["{package}", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
"""
    heavy = {"torch", "timm", "ray", "mlflow", "optuna", "pyarrow", "scipy", "sklearn", "pydantic", "s3fs", "numpy"}
    assert not loaded_after(code) & heavy


@pytest.mark.parametrize(
    ("package", "command"),
    [
        *[("ssn", name) for name in ("ingest", "train", "evaluate", "predict", "demo-data")],
        *[("tuning", name) for name in ("sweep", "champions", "plan", "report", "replay")],
    ],
)
def test_a_commands_help_imports_neither_torch_nor_ray_nor_mlflow(package: str, command: str) -> None:
    code = f"""
import sys
from {package}.__main__ import main
sys.argv = ["{package}", "{command}", "--help"]
try:
    main()
except SystemExit as done:
    assert done.code == 0, done.code
"""
    assert not loaded_after(code) & {"torch", "timm", "ray", "mlflow"}


def test_training_on_features_imports_no_compiler() -> None:
    """Of which sympy is a part; it would cost every new trial process seconds."""
    loaded = loaded_after(
        """
from ssn.engine import fit
from tests.planted_features import CONFIG, plant_features, with_train
fit(with_train(CONFIG, epochs=1), plant_features(), report=lambda report, save: None)
"""
    )
    assert "torch" in loaded
    assert not loaded & {"sympy", "timm", "torchvision"}
