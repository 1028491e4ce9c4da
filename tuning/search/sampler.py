"""Who suggests a category's next configuration: Optuna's tree-structured Parzen estimator (TPE)."""

from __future__ import annotations

from optuna.samplers import TPESampler

from ssn.config import digest


def make_sampler(search_seed: int, category: str, budget: int) -> TPESampler:
    """A sampler whose draws depend on the seed and the category alone.

    Its variants are compared in ``tests/benchmarks/samplers.py``. Multivariate is Optuna's default for studies of one
    direction; those of two are sampled axis by axis.

    Args:
        search_seed: Of the sweep.
        category: Name.
        budget: Trials of the category.
    """
    return TPESampler(
        seed=int(digest([search_seed, category])[:8], 16),
        # Optuna's ten random trials before it models anything would be the whole of a small budget.
        n_startup_trials=min(10, max(2, budget // 3)),
        # trials that still run count as poor ones, so that those of one moment are not all alike
        constant_liar=True,
    )
