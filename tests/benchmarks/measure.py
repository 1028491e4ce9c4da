"""Timing sides in turns, and keeping what was measured: JSON and Markdown, written anew after every round."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "numpy", "anomalib", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Side:
    """One of the implementations that a row compares."""

    name: str
    run: Callable[[], object]
    repeat: int = 1
    """Calls per round, whose mean counts: evens out what differs from step to step, such as the noisy positions."""


@dataclass
class Result:
    """What was measured of a row."""

    row: str
    unit: str = "s"
    scale: float = 1.0
    """From ``values`` to ``unit``."""
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (peer, ours) of sides whose ratio the row is about."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """By side, one value per round: seconds or bytes. Values at the same place were measured in the same round."""
    rounds: int = 1
    """As many as were asked for; a row with fewer was interrupted."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return bool(self.values) and all(len(values) >= self.rounds for values in self.values.values())

    def summarise(self) -> list[dict[str, Any]]:
        """Per comparison: both medians in ``unit``, and the median and range of peer / ours over the rounds."""
        lines = []
        for peer, ours in self.comparisons:
            pairs = list(zip(self.values.get(peer, []), self.values.get(ours, []), strict=False))
            if not pairs:
                continue
            ratios = [theirs / own for theirs, own in pairs]
            lines.append(
                {
                    "peer": peer,
                    "ours": ours,
                    "peer_median": statistics.median(theirs for theirs, _ in pairs) * self.scale,
                    "ours_median": statistics.median(own for _, own in pairs) * self.scale,
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                    "pairs": len(pairs),
                }
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "complete": self.complete,
            "unit": self.unit,
            "summary": self.summarise(),
            "scale": self.scale,
            "comparisons": [list(pair) for pair in self.comparisons],
            "rounds": self.rounds,
            "values": self.values,
            "notes": self.notes,
        }


OnRound = Callable[[Result], None]


def take_turns(sides: Sequence[Side], result: Result, on_round: OnRound) -> Result:
    """Time every side once a round, after a warm-up, in an order that turns round by round.

    A change of the machine's speed then hits all sides, and none always comes after the same other one.
    """
    for side in sides:
        side.run()
    result.values = {side.name: [] for side in sides}
    for turn in range(result.rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            for _ in range(side.repeat):
                side.run()
            result.values[side.name].append((time.perf_counter() - start) / side.repeat)
        on_round(result)
    return result


class Neighbours:
    """How much of the machine others use from now on: figures of a busy machine are worth little."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy_cores(self) -> float:
        """Mean number of cores that worked for others than this process and its finished children; 0 if unknown."""
        others_s, wall_s = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, round(others_s / wall_s, 2))

    @staticmethod
    def _read() -> tuple[float, float]:
        stat, own = Path("/proc/stat"), os.times()
        if not stat.exists():
            return 0.0, time.monotonic()
        user, nice, system, *_ = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in stat.read_text().split()[1:8])
        own_s = own.user + own.system + own.children_user + own.children_system
        return user + nice + system - own_s, time.monotonic()


def describe_machine(threads: int) -> dict[str, Any]:
    """What the figures depend on, besides the code that they compare."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in cpuinfo if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu.get("flags", "").split()]
    return {
        "machine": platform.machine(),
        "cpu": cpu.get("model name", platform.processor() or "unknown"),
        "cpu_features": features,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit,
    }


class Report:
    """Rows as they come, in ``<out>.json`` and ``<out>.md``.

    Args:
        out: Path without suffix.
        stamp: From :func:`describe_machine`.
        resume: Keep the complete rows that an earlier run with the same stamp left there.
    """

    def __init__(self, out: Path, stamp: dict[str, Any], *, resume: bool) -> None:
        self.out, self.stamp = out, stamp
        self.rows: dict[str, dict[str, Any]] = {}
        file = out.with_suffix(".json")
        if resume and file.exists():
            earlier = json.loads(file.read_text())
            if earlier["stamp"] == stamp:
                self.rows = {row["row"]: row for row in earlier["rows"] if row["complete"]}

    def update(self, result: Result) -> None:
        """Put a row's figures so far on disk; a reader sees either the old files or the new ones."""
        self.rows[result.row] = result.to_dict() | {
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        content = {"stamp": self.stamp, "rows": list(self.rows.values())}
        self._replace(".json", json.dumps(content, indent=1))
        self._replace(".md", to_markdown(content))

    def _replace(self, suffix: str, text: str) -> None:
        target = self.out.with_suffix(suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f"{suffix}.partial")
        partial.write_text(text)
        os.replace(partial, target)


def to_markdown(content: dict[str, Any]) -> str:
    """The stamp, a table of ratios, and what else the rows found."""
    stamp = content["stamp"]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    lines = [
        f"{stamp['cpu']} ({', '.join(stamp['cpu_features'])}), {stamp['threads']} threads of {stamp['cores']} cores, "
        f"{stamp['memory_gb']} GB, Python {stamp['python']}, {versions}, commit {stamp['commit']}.",
        "Medians of the pairs; `ratio` is the median of the pairs' peer / ours, with its range.",
        "",
        "| row | peer | ours | unit | peer | ours | ratio | range | pairs |",
        "|:---|:---|:---|:---|---:|---:|---:|:---|---:|",
    ]
    lines += [line for row in content["rows"] for line in table_lines(row)]
    noted = [row for row in content["rows"] if row["notes"]]
    if noted:
        lines += ["", *(f"* {row['row']}: {_in_words(row['notes'])}" for row in noted)]
    return "\n".join(lines) + "\n"


def table_lines(row: dict[str, Any]) -> list[str]:
    """A row's lines of the Markdown table."""
    name = row["row"] + ("" if row["complete"] else " (interrupted)")
    return [
        f"| {name} | {line['peer']} | {line['ours']} | {row['unit']} | {_figure(line['peer_median'])} "
        f"| {_figure(line['ours_median'])} | {line['ratio']:.2f} | {line['ratio_min']:.2f}–{line['ratio_max']:.2f} "  # noqa: RUF001
        f"| {line['pairs']} |"
        for line in row["summary"]
    ]


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _in_words(notes: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, dict):
            return "; ".join(f"{key} {one(item)}" for key, item in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{key}: {one(value)}" for key, value in notes.items())
