"""The official code's numbers, reproduced: forward, loss, gradient norms, batch-norm statistics and inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden.reference import CASES, inference_quantities, load_case, training_quantities
from tests.tolerances import GOLDEN_ATOL, GOLDEN_RTOL, GRAD_NORM_ATOL_OF_TOTAL, GRAD_NORM_RTOL

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    return shared_dir / "reference" / "golden"


@pytest.mark.parametrize("case", CASES)
def test_training_step(golden_dir: Path, case: str) -> None:
    arrays, net = load_case(golden_dir, case)
    names = set()
    for quantity in training_quantities(case, arrays, net):
        names.add(quantity.name)
        if quantity.name.startswith("grad_"):
            # a bias in front of a batch norm has a gradient of zero but for rounding
            rtol, atol = GRAD_NORM_RTOL, GRAD_NORM_ATOL_OF_TOTAL * float(arrays["grad_total_norm"])
        else:
            rtol, atol = GOLDEN_RTOL, GOLDEN_ATOL * float(np.abs(quantity.expected).max())
        np.testing.assert_allclose(quantity.actual, quantity.expected, rtol=rtol, atol=atol, err_msg=quantity.name)
    assert {f"grad_norm/{name}" for name, _ in net.named_parameters()} <= names


@pytest.mark.parametrize("case", CASES)
def test_inference(golden_dir: Path, case: str) -> None:
    arrays, net = load_case(golden_dir, case)
    for quantity in inference_quantities(case, arrays, net):
        atol = GOLDEN_ATOL * float(np.abs(quantity.expected).max())
        np.testing.assert_allclose(
            quantity.actual, quantity.expected, rtol=GOLDEN_RTOL, atol=atol, err_msg=quantity.name
        )
