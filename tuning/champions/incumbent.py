"""The champion that is registered already, against the candidate of a new sweep: the better one gets the alias.

On the same data, judged alike, the validation results that were recorded decide. Otherwise both models are scored on
the present validation split, without the images that the incumbent trained on. An incumbent that exceeds a bound of the
present sweep gives way, and where champions are the knee of a front, so does one that is better but costs more. The
test split has no say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ssn.config import EvalConfig
from ssn.errors import SSNError
from tuning.search.costs import COST_NAMES
from tuning.settings import ObjectiveSettings

if TYPE_CHECKING:
    from ssn.checkpoint import Checkpoint
    from ssn.data.reader import SearchData

Way = Literal["unopposed", "out of bounds", "recorded", "rescored", "not comparable"]


@dataclass(frozen=True)
class Incumbent:
    """A category's registered champion."""

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the registered version."""

    @property
    def search_fingerprint(self) -> str | None:
        """Of the data it was chosen on; None: not recorded."""
        return self.tags.get("search_fingerprint")

    @property
    def title(self) -> str:
        """Such as ``mvtec_ad.bottle/3``."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate gets the alias, and by what comparison."""

    promoted: bool
    way: Way
    reason: str
    """One line for the user; empty where nobody was there to compare with."""
    incumbent: Incumbent | None = None
    candidate_objective: float | None = None
    incumbent_objective: float | None = None
    num_images: int | None = None
    """Validation images that both were scored on again."""
    num_left_out: int | None = None
    """Those left out because the incumbent trained on them."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        kept = {key: value for key, value in asdict(self).items() if key != "incumbent"}
        return {**kept, "incumbent": None if self.incumbent is None else self.incumbent.title}


@dataclass(frozen=True)
class Rescored:
    """Two models on the same validation images."""

    candidate_objective: float
    incumbent_objective: float
    num_images: int
    num_left_out: int


COST_TAGS = {"labels": ("train_masks", "train_weak_labels"), "latency": ("latency_ms",)}
"""Of a registered version: what its cost is the sum of, by ``objective.against``."""

UNOPPOSED = Verdict(promoted=True, way="unopposed", reason="")


def yardstick(objective: ObjectiveSettings, evaluation: EvalConfig) -> dict[str, str]:
    """What two recorded objectives must share to compare, as tags of a registered version."""
    height, width = evaluation.size
    return {
        "objective_metric": objective.metric,
        "cost_per_mask": f"{objective.cost_per_mask:g}",
        "eval_size": f"{height} x {width}",
        "aupro_fpr_limit": f"{evaluation.aupro_fpr_limit:g}",
    }


def recorded_objective(incumbent: Incumbent, *, search_fingerprint: str, judged_by: Mapping[str, str]) -> float | None:
    """The incumbent's validation objective, if it was measured as the candidate's is; None: it must be scored again.

    Args:
        incumbent: Whose.
        search_fingerprint: Of the present data.
        judged_by: From :func:`yardstick`.
    """
    if incumbent.search_fingerprint != search_fingerprint or "validation_objective" not in incumbent.tags:
        return None
    if any(incumbent.tags.get(key) != value for key, value in judged_by.items()):
        return None
    return float(incumbent.tags["validation_objective"])


def compare_recorded(category: str, incumbent: Incumbent, candidate: float, recorded: float) -> Verdict:
    """The verdict on the same data; of equals, the incumbent stays.

    Args:
        category: Named in the reason.
        incumbent: The registered champion.
        candidate: Mean validation objective of the new sweep's best.
        recorded: Of the incumbent.
    """
    # a version's tags hold six digits
    promoted = float(f"{candidate:.6g}") > recorded
    reason = (
        f"{category}: the data has not changed since {incumbent.title} became champion with {recorded:.3f} on "
        f"validation; this sweep's best has {candidate:.3f} and {_outcome(promoted)}"
    )
    return Verdict(promoted, "recorded", reason, incumbent, candidate, recorded)


def compare_rescored(category: str, incumbent: Incumbent, rescored: Rescored) -> Verdict:
    """The verdict where both models were scored again; of equals, the incumbent stays."""
    promoted = rescored.candidate_objective > rescored.incumbent_objective
    reason = (
        f"{category}: on {rescored.num_images} validation images (without {rescored.num_left_out} that the champion "
        f"trained on) {incumbent.title} has {rescored.incumbent_objective:.3f}; this sweep's best has "
        f"{rescored.candidate_objective:.3f} and {_outcome(promoted)}"
    )
    return Verdict(
        promoted,
        "rescored",
        reason,
        incumbent,
        rescored.candidate_objective,
        rescored.incumbent_objective,
        rescored.num_images,
        rescored.num_left_out,
    )


def not_comparable(category: str, incumbent: Incumbent, why: str) -> Verdict:
    """The candidate takes the alias untried, and the user is told."""
    reason = f"{category}: the champion {incumbent.title} is replaced without a comparison, because {why}"
    return Verdict(True, "not comparable", reason, incumbent)


def _outcome(promoted: bool) -> str:
    return "takes its place" if promoted else "does not take its place"


def out_of_bounds(category: str, incumbent: Incumbent, objective: ObjectiveSettings) -> Verdict | None:
    """The verdict on an incumbent that the present sweep would not have as champion; None: it keeps the bounds, as far
    as its costs were recorded."""
    bounds = (
        ("max_masks", objective.max_masks, "train_masks", "masks"),
        ("max_latency_ms", objective.max_latency_ms, "latency_ms", "ms"),
    )
    for bound, most, tag, unit in bounds:
        if most is not None and float(incumbent.tags.get(tag, 0)) > most:
            reason = (
                f"{category}: the champion {incumbent.title} gives way, because its {incumbent.tags[tag]} {unit} are "
                f"more than objective.{bound}={most:g}"
            )
            return Verdict(True, "out of bounds", reason, incumbent)
    return None


def favour_cheaper(category: str, verdict: Verdict, objective: ObjectiveSettings, cost: float) -> Verdict:
    """The verdict where champions are the knee of a front: an incumbent stays only if it costs no more, too.

    Args:
        category: Named in the reason.
        verdict: By the objective alone.
        objective: What it is weighed against, and which trial of the front is picked.
        cost: Of the candidate, by :func:`tuning.search.costs.trial_cost`.
    """
    if verdict.promoted or verdict.incumbent is None or objective.against == "none" or objective.pick != "knee":
        return verdict
    name, tags = COST_NAMES[objective.against], verdict.incumbent.tags
    parts = [tags.get(tag) for tag in COST_TAGS[objective.against]]
    known = None if None in parts else sum(float(part) for part in parts if part is not None)
    if known is not None and known <= cost:
        return verdict
    than = "a cost that was not recorded" if known is None else f"{known:g}"
    reason = (
        f"{category}: {verdict.incumbent.title} is as good or better, but this sweep's knee has a {name} of "
        f"{cost:g} instead of {than}, and takes its place"
    )
    return replace(verdict, promoted=True, reason=reason)


def images_to_leave_out(incumbent: Checkpoint, *, data_changed: bool) -> frozenset[str]:
    """Ids of the images that an incumbent trained on; none where the data is the one it was validated on.

    Raises:
        SSNError: its checkpoint does not say.
    """
    from ssn.engine import TRAINED_ON

    if not data_changed:
        return frozenset()
    if TRAINED_ON not in incumbent.meta:
        raise SSNError("its checkpoint, of an earlier release, does not name the images it trained on")
    return frozenset(incumbent.meta[TRAINED_ON])


def rescore(
    candidate: Checkpoint,
    incumbent: Checkpoint,
    data: SearchData,
    left_out: Collection[str],
    objective: ObjectiveSettings,
    evaluation: EvalConfig,
    device: str,
    cpus: float,
) -> Rescored:
    """Score two models on the same images of the validation split; runs where a trial would.

    Args:
        candidate: The new sweep's best.
        incumbent: The registered champion.
        data: Present search data.
        left_out: Ids of images to do without.
        objective: Of the present sweep, and the same for both.
        evaluation: Likewise.
        device: Where to score.
        cpus: Of this process.

    Raises:
        SSNError: what is left of the split cannot rank models, or a backbone is not to be had.
    """
    from ssn.bundle import find_backbone
    from ssn.evaluation import Evaluation, evaluate_samples
    from ssn.predictor import Predictor
    from tuning.execution.objective import compute_objective, use_threads

    use_threads(cpus)

    def evaluate(model: Checkpoint) -> Evaluation:
        # pixel metrics compare at one size alone
        judged_alike = replace(model, config=replace(model.config, eval=evaluation))
        predictor = Predictor.from_checkpoint(judged_alike, find_backbone(model), device=device)
        return evaluate_samples(predictor, (s for s in data.stream("validation") if s.id not in left_out))

    def judge(model: Checkpoint, found: Evaluation) -> float:
        for name in ("image_auroc", objective.metric):
            if name in found.metrics.undefined:
                raise SSNError(
                    f"{name} is undefined on the {len(found.ids)} validation images it did not train on "
                    f"({found.metrics.undefined[name]})"
                )
        return compute_objective(
            objective,
            {f"val_{name}": value for name, value in found.metrics.values.items()},
            has_masks=found.num_masks > 0,
            masks_used=int(model.meta.get("masks_used", 0)),
        )

    models: Sequence[Checkpoint] = (candidate, incumbent)
    evaluations = [evaluate(model) for model in models]
    objectives = [judge(model, found) for model, found in zip(models, evaluations, strict=True)]
    counts = data.info.counts["validation"]
    num_images = len(evaluations[0].ids)
    return Rescored(objectives[0], objectives[1], num_images, counts.normal + counts.defective - num_images)
