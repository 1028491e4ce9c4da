"""How much memory the features of a search take: what its trials share, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ssn.config import Config, Size, flatten
from ssn.data.reader import CategoryInfo
from ssn.data.records import SEARCH_SPLITS
from tuning.execution.weights import weights_key
from tuning.search.feature_groups import FEATURE_KEYS, enumerate_configs
from tuning.search.space import CategorySpace, as_value


@dataclass(frozen=True)
class FeatureGroup:
    """Trials that share their features."""

    config: Config
    """Of one of them."""
    settings: Mapping[str, Any]
    """What tells them from the category's other groups."""
    num_bytes: int
    """Of the features, or of what is kept instead."""
    source: str
    """``cached`` or, where they exceed the budget by themselves, ``streamed``."""


class MapSizes:
    """Channels and sizes of backbones' maps; each is built once, with random weights, so that nothing is fetched."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[int, ...], Size], list[tuple[int, Size]]] = {}

    def __call__(self, config: Config) -> list[tuple[int, Size]]:
        """Of one configuration, finest first."""
        from ssn.backbone import load_backbone
        from ssn.streaming import feature_sizes

        key = (config.model.backbone, config.model.layers, config.data.image_size)
        if key not in self._known:
            backbone = load_backbone(replace(config.model, weights="random"))
            self._known[key] = list(feature_sizes(config, backbone, "cpu"))
        return self._known[key]


def size_feature_groups(
    space: CategorySpace, info: CategoryInfo, measure: MapSizes, *, budget_bytes: int
) -> list[FeatureGroup]:
    """The groups of one category's trials, the first trial's first.

    Args:
        space: Its search.
        info: Its counts.
        measure: Shared by all categories.
        budget_bytes: Memory for all features together; what exceeds it by itself is streamed.

    Raises:
        SSNError: a backbone cannot be built.
    """
    from ssn.features import feature_key

    kept: dict[str, Config] = {}
    for config in enumerate_configs(space, FEATURE_KEYS):
        # neither where the data is nor which weights and device these are matters among trials of one category
        key = feature_key(config, info, data_uri="", weights_digest=weights_key(config.model), device="cpu")
        kept.setdefault(key, config)
    flats = [flatten(config) for config in kept.values()]
    differing = [key for key in FEATURE_KEYS if len({as_value(flat[key]) for flat in flats}) > 1]
    return [
        FeatureGroup(config, {key: flat[key] for key in differing}, *_size(config, info, measure, budget_bytes))
        for config, flat in zip(kept.values(), flats, strict=True)
    ]


def _size(config: Config, info: CategoryInfo, measure: MapSizes, budget_bytes: int) -> tuple[int, str]:
    from ssn.features import estimate_bytes, estimate_target_bytes, num_images
    from ssn.model import map_size

    sizes = measure(config)
    num_bytes = estimate_bytes(config, info, sizes)
    if num_bytes <= budget_bytes:
        return num_bytes, "cached"
    images = sum(num_images(config, info, split) for split in SEARCH_SPLITS)
    decoded = images * 3 * config.data.image_size[0] * config.data.image_size[1] * 4
    return decoded + estimate_target_bytes(config, info, map_size([size for _, size in sizes])), "streamed"
