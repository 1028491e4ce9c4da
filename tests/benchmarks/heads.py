"""Time of the heads as computed here against the papers' plain formulation, same weights and inputs, in one run.

``make bench`` prints a Markdown table. Both sides take turns, so that a change of the machine's speed hits both; each
figure is the median over the pairs, and the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ssn.config import ModelConfig
from ssn.model import Noise, SuperSimpleNet
from tests import oracle

BACKBONES = {"resnet18": (128, 256), "wide_resnet50_2": (512, 1024)}
FINEST = 32
"""Side of the finest map: layer 2 of a 256 x 256 image."""
COVERAGE = 0.129
"""Share of noisy positions at a Perlin threshold of 0.2."""


def measure(ours: Callable[[], object], plain: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio plain / ours, after one warm-up each."""
    ours(), plain()
    times = []
    for _ in range(pairs):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        plain()
        times.append((middle - start, time.perf_counter() - middle))
    return (
        statistics.median(t[0] for t in times),
        statistics.median(t[1] for t in times),
        statistics.median(t[1] / t[0] for t in times),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, commit {commit or 'unknown'}, fp32, ")
    print(f"256 x 256 images, batch {arguments.batch}, heads on given features, {arguments.pairs} pairs\n")
    print("| backbone | what | here, ms/image | plain, ms/image | ratio |")
    print("|:---|:---|---:|---:|---:|")
    for backbone, channels in BACKBONES.items():
        net = SuperSimpleNet(channels, ModelConfig())
        sides = [FINEST // 2**i for i in range(len(channels))]
        features = [torch.rand(arguments.batch, s, s, c) for s, c in zip(sides, channels, strict=True)]
        mask = torch.rand(2 * arguments.batch, 2 * FINEST, 2 * FINEST) < COVERAGE
        index = mask.flatten().nonzero().squeeze(1)
        noise = Noise(0.015 * torch.randn(len(index), sum(channels)), index)

        def step(forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
            maps, scores = forward(features, noise, stop_grad=True)  # noqa: B023  # called within the same iteration
            (maps.square().mean() + scores.square().mean()).backward()

        net.train()
        rows = {
            "training step": measure(
                lambda: step(net.forward_train),  # noqa: B023
                lambda: step(lambda *a, **k: oracle.forward_train(net, *a, **k)),  # noqa: B023
                arguments.pairs,
            )
        }
        net.eval()
        folded = net.fold(features)
        with torch.no_grad():
            rows["inference"] = measure(
                lambda: net.score(features, folded),  # noqa: B023
                lambda: oracle.forward_eval(net, features),  # noqa: B023
                arguments.pairs,
            )
        for what, (ours_s, plain_s, ratio) in rows.items():
            per_image = [1e3 * seconds / arguments.batch for seconds in (ours_s, plain_s)]
            print(f"| {backbone} | {what} | {per_image[0]:.0f} | {per_image[1]:.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
