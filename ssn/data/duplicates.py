"""Finding images that show the same thing twice, so that no two of them end up in different splits.

A 64-bit difference hash is useless here: parts on a fixture look alike, and two in three pairs of MVTec AD's bottles
are within one bit. So images are compared as small grey thumbnails, and what tells a copy from a sibling is how
little they differ in grey levels, against the picture's own contrast, and against how much images of this category
differ anyway.

Shape suffixes: N images, P pixels of a thumbnail.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMBNAIL_SIDE = 32
MAX_DIFFERENCE = 2.0
"""Largest root-mean-square difference of two near-duplicates' thumbnails, in grey levels of 255."""
MAX_OF_CONTRAST = 0.06
"""The same, as a share of the standard deviation within the flatter thumbnail: plain surfaces are not all alike."""
MAX_OF_SPREAD = 0.25
"""The same, as a share of the typical difference within the category: neither are parts on a fixture."""

_BLOCK = 1024


def thumbnail(image_HW3: np.ndarray) -> np.ndarray:
    """A ``[P]`` float32 thumbnail: grey, area-averaged, shifted to be about zero."""
    grey = Image.fromarray(image_HW3).convert("L").convert("F")  # resized 8-bit images are rounded
    small = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() - 128


def link_near_duplicates(thumbnails_NP: np.ndarray) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``, that connect all near-duplicates among thumbnails, sorted.

    Images that are near-duplicates, directly or through others, are connected by the pairs, though not every two of
    them are a pair. All are compared by matrix products, block by block: memory grows with N, and ten thousand images
    take some seconds, far less than decoding them did.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_images, num_pixels = thumbnails_NP.shape
    power_N = (thumbnails_NP**2).mean(axis=1)
    from_mean_N = np.sqrt(((thumbnails_NP - thumbnails_NP.mean(axis=0)) ** 2).mean(axis=1))
    spread = float(np.sqrt(2) * np.median(from_mean_N))
    limit_N = np.minimum(min(MAX_DIFFERENCE, MAX_OF_SPREAD * spread), MAX_OF_CONTRAST * thumbnails_NP.std(axis=1))
    links: set[tuple[int, int]] = set()
    for start in range(0, num_images, _BLOCK):
        rows = slice(start, start + _BLOCK)
        product = thumbnails_NP[rows] @ thumbnails_NP[start:].T / num_pixels
        squared = power_N[rows, None] + power_N[None, start:] - 2 * product
        first, second = np.nonzero(squared <= np.minimum(limit_N[rows, None], limit_N[None, start:]) ** 2)
        side = num_images - start
        graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(side, side))
        labels = connected_components(graph, directed=False)[1]
        order = np.argsort(labels, kind="stable")
        adjacent = np.nonzero(labels[order][1:] == labels[order][:-1])[0]
        links.update((int(order[k]) + start, int(order[k + 1]) + start) for k in adjacent)
    return sorted(links)
