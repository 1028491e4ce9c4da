"""Which sampler finds more in a category's budget: recorded curves, replayed through the platform's own search.

``python -m tests.benchmarks.samplers --seeds 20`` prints a table: the best full-budget objective after so many started
trials, mean and standard deviation over seeds, and in how many seeds a method beat the one that the platform uses. With
``--against labels`` it is the area under the front of objective against labels instead, as a share of the area that a
perfect front could have.

Nothing trains. A landscape says what a configuration is worth: a ridge in log sigma whose place depends on the Perlin
threshold, as in the papers (both say how much noise there is), a gain of labels that saturates, less of it where weak
labels are used, and noise of its own for every configuration. Every seed draws another landscape and seeds the sampler
too. A trial's curve approaches its worth at a speed that depends on sigma. Four trials run at once, and the platform's
successive halving stops trials at epochs 3 and 9 of 27.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from ssn.config import Config, digest, flatten, unflatten
from tuning.execution.weights import weights_key
from tuning.search.costs import trial_cost
from tuning.search.halving import Halving
from tuning.search.pareto import hypervolume, make_points
from tuning.search.sampler import make_sampler
from tuning.search.searcher import CategorySearch, MultiplexSearcher
from tuning.search.space import Axis, Choice, Condition, FloatRange
from tuning.settings import Against

EPOCHS, RUNGS, ETA, PARALLEL = 27, (3, 9), 3, 4
MASKS = 8
SIGMA, THRESHOLD, RATIO = "synthesis.noise_sigma", "synthesis.perlin_threshold", "train.supervision_ratio"
WEAK, LR = "train.weak_labels", "train.lr_heads"
BASE = flatten(Config()) | {"train.epochs": EPOCHS}
SPACES: dict[str, dict[str, Axis]] = {
    "3 axes": {
        SIGMA: FloatRange(1e-3, 0.3, log=True),
        THRESHOLD: FloatRange(0.0, 0.7),
        RATIO: Choice(tuple(i / MASKS for i in range(MASKS + 1))),
    },
}
SPACES["5 axes, one conditional"] = {
    **SPACES["3 axes"],
    LR: FloatRange(2e-5, 2e-3, log=True),
    WEAK: Choice(("drop", "use"), when=(Condition(RATIO, "<", ((MASKS - 0.5) / MASKS,)),)),
}
OURS = "the platform's"
Factory = Callable[[int, str, int], BaseSampler]


@dataclass(frozen=True)
class Landscape:
    """What configurations of one made-up category are worth."""

    log_sigma: float
    """Where the ridge is at threshold 0.35, in decades."""
    slope: float
    """How far it moves with the threshold, in decades per unit."""
    width: float
    threshold: float
    log_lr: float
    label_gain: float
    weak_gain: float

    @classmethod
    def draw(cls, seed: int) -> Landscape:
        """Another category for every seed."""
        rng = random.Random(seed)
        return cls(
            log_sigma=rng.uniform(-2.6, -0.9),
            slope=rng.uniform(-1.5, 1.5),
            width=rng.uniform(0.25, 0.6),
            threshold=rng.uniform(0.1, 0.6),
            log_lr=rng.uniform(-4.2, -3.2),
            label_gain=rng.uniform(0.0, 0.25),
            weak_gain=rng.uniform(0.0, 0.08),
        )

    def worth(self, config: Mapping[str, Any], seed: int) -> float:
        """Objective after the last epoch."""
        threshold, ratio = config[THRESHOLD], config[RATIO]
        off = math.log10(config[SIGMA]) - self.log_sigma - self.slope * (threshold - 0.35)
        value = 0.45 + 0.3 * math.exp(-0.5 * (off / self.width) ** 2)
        value -= 0.25 * (threshold - self.threshold) ** 2
        value -= 0.04 * (math.log10(config[LR]) - self.log_lr) ** 2
        value += self.label_gain * (1 - math.exp(-4 * ratio))
        if config[WEAK] == "use":
            value += self.weak_gain * (1 - ratio)
        return value + random.Random(digest([seed, config[SIGMA], threshold, ratio])).gauss(0, 0.008)

    def curve(self, config: Mapping[str, Any], seed: int) -> dict[int, float]:
        """Objective by epoch, at the rungs and at the end."""
        worth, speed = self.worth(config, seed), 4 + 3 * (math.log10(config[SIGMA]) + 3)
        return {epoch: worth - 0.4 * math.exp(-epoch / speed) for epoch in (*RUNGS, EPOCHS)}


def replay(factory: Factory, space: Mapping[str, Axis], budget: int, seed: int, against: Against) -> float:
    """What a search of one category ends with: its best full-budget objective, or its front's area."""
    search = MultiplexSearcher(
        [CategorySearch("plate", BASE, space, "data", {weights_key(unflatten(BASE).model): "weights"}, 0)],
        sweep_id="replay",
        trials_per_category=budget,
        search_seed=seed,
        against=against,
        sampler=factory,
    )
    landscape, halving = Landscape.draw(seed), Halving(RUNGS, ETA)
    running: list[tuple[str, dict[str, Any]]] = []
    for number in range(budget + PARALLEL):
        suggestion = search.suggest(f"t{number}")
        if isinstance(suggestion, dict):
            running.append((f"t{number}", suggestion["config"]))
        if len(running) == PARALLEL or suggestion == "FINISHED":
            if not running:
                break
            _finish(search, halving, landscape, seed, against, *running.pop(0))
    points = make_points(search.records(), against)
    if against == "none":
        return max(point.objective for point in points)
    return hypervolume(points, worst_objective=0.0, worst_cost=MASKS + 1) / (MASKS + 1)


def _finish(
    search: MultiplexSearcher,
    halving: Halving,
    landscape: Landscape,
    seed: int,
    against: Against,
    trial_id: str,
    config: Mapping[str, Any],
) -> None:
    masks = round(MASKS * config[RATIO])
    costs = {"masks_used": masks, "weak_labels_used": MASKS - masks if config[WEAK] == "use" else 0}
    for epoch, objective in landscape.curve(config, seed).items():
        result = {"epoch": epoch, "objective": objective, **costs}
        if epoch == EPOCHS or not halving.goes_on(trial_id, epoch, objective, trial_cost(costs, against)):
            search.on_trial_complete(trial_id, result)
            return
        search.on_trial_result(trial_id, result)


def _tpe(seed: int, category: str, budget: int, **options: Any) -> TPESampler:
    ours = make_sampler(seed, category, budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # group is experimental
        return TPESampler(
            seed=int(digest([seed, category])[:8], 16), n_startup_trials=ours._n_startup_trials, **options
        )


METHODS: dict[str, Factory] = {
    "random": lambda seed, category, budget: RandomSampler(seed=seed),
    "TPE, axis by axis": lambda *args: _tpe(*args, multivariate=False, constant_liar=True),
    "TPE multivariate": lambda *args: _tpe(*args, multivariate=True, constant_liar=True),
    "TPE multivariate, no liar": lambda *args: _tpe(*args, multivariate=True, constant_liar=False),
    "TPE multivariate, group": lambda *args: _tpe(*args, multivariate=True, group=True, constant_liar=True),
    OURS: make_sampler,
}


def tabulate(seeds: int, budgets: Sequence[int], against: Against) -> Iterator[str]:
    """Replay every method, and the lines of a Markdown table."""
    for space_name, space in SPACES.items():
        for budget in budgets:
            best = {
                name: [replay(factory, space, budget, seed, against) for seed in range(seeds)]
                for name, factory in METHODS.items()
            }
            for name, values in best.items():
                gaps = [a - b for a, b in zip(values, best[OURS], strict=True)]
                error = statistics.stdev(gaps) / math.sqrt(seeds)
                yield (
                    f"| {space_name} | {budget} | {name} | {statistics.fmean(values):.4f} | "
                    f"{statistics.stdev(values):.4f} | {statistics.fmean(gaps):+.4f} ± {error:.4f} | "
                    f"{sum(gap > 0 for gap in gaps)}/{seeds} |"
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--against", choices=["none", "labels"], default="none")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    what = "best objective" if arguments.against == "none" else "area under the front"
    print(
        f"| space | trials | method | {what}, mean | std over seeds | to the platform's, ± standard error | better in |"
    )
    print("|:---|---:|:---|---:|---:|---:|---:|")
    for line in tabulate(arguments.seeds, arguments.budgets, arguments.against):
        print(line, flush=True)


if __name__ == "__main__":
    main()
