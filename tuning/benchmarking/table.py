"""Tables of a benchmark: mean and standard deviation over repetitions, as terminal table, Markdown, CSV and LaTeX.

All numbers are percent with one decimal. A metric that is undefined is a dash with its reason in a footnote, never 0; a
repetition that failed makes n smaller. The figures of a paper stand beside ours only where the data is split as the
paper's was.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssn.data.reader import CategoryInfo
from ssn.errors import SSNError
from tuning.benchmarking.plan import Plan, Variant
from tuning.benchmarking.results import RunResult

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
INTERVAL_METRICS = ("image_auroc", "image_ap", "image_f1_max")
ABSENT = "—"
OVERALL = "mean"
"""What the mean over categories is called; a paper's CSV calls it so too."""
PAPER = "paper"
PAPER_COLUMNS = ("dataset", "category", "metric", "mean_percent", "std_percent")


@dataclass(frozen=True)
class Cell:
    """A metric over repetitions, as shares in [0, 1]."""

    mean: float | None = None
    std: float | None = None
    """Sample standard deviation; None for a single repetition."""
    n: int = 0
    reason: str | None = None
    """Why there is no mean."""


@dataclass(frozen=True)
class Row:
    """A line: a category, or the mean over all, with one configuration, or with the paper's figures."""

    category: str
    configuration: str
    cells: Mapping[str, Cell]
    n: int | None = None
    """Repetitions that are finished; for the mean over categories, in all of them. None: a paper does not say."""
    train_labels: int | None = None
    train_masks: int | None = None
    validation_labels: int | None = None
    validation_masks: int | None = None
    cost_s: float | None = None
    """Core-seconds or GPU-seconds."""
    published: bool = False
    """Whether the figures are a paper's."""


PaperNumbers = Mapping[tuple[str, str], tuple[float, float | None]]
"""(category, metric) -> mean and standard deviation in percent."""


@dataclass(frozen=True)
class BenchmarkTable:
    """Everything a table shows."""

    dataset: str
    protocol: str
    title: str
    rows: Sequence[Row]
    notes: Sequence[str]
    """Protocol, repetitions, settings, code, hardware and cost: what a reader must know to read the numbers right."""
    cost_unit: str
    """``core-seconds`` or ``GPU-seconds``."""
    code: str = ""
    hardware: str = ""
    footnotes: Sequence[str] = field(init=False)
    """Reasons of the dashes, numbered from 1."""

    def __post_init__(self) -> None:
        reasons = [cell.reason for row in self.rows for cell in row.cells.values() if cell.reason is not None]
        object.__setattr__(self, "footnotes", tuple(dict.fromkeys(reasons)))

    def markdown(self) -> str:
        """For a README or a pull request."""
        lines = [f"**{self.title}**", "", _markdown_line(_HEADINGS)]
        lines.append(_markdown_line([":---" if i < 2 else "---:" for i in range(len(_HEADINGS))]))
        lines += [_markdown_line(self._texts(row)) for row in self.rows]
        for line in self._below():
            lines += ["", line]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A ``tabular`` and its notes, for ``\\input``; needs no package."""
        lines = [f"% {self.title}".replace("\n", " ")]
        lines += [f"\\begin{{tabular}}{{ll{'r' * (len(_HEADINGS) - 2)}}}", "\\hline"]
        lines += [_latex_line(_HEADINGS), "\\hline"]
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            if before is not None and before.category != row.category:
                lines.append("\\hline")
            lines.append(_latex_line(self._texts(row)))
        lines += ["\\hline", "\\end{tabular}", ""]
        lines += [f"\\par{{\\footnotesize {escape_latex(line)}\\par}}" for line in (self.title, *self._below())]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """A line per category, configuration and metric; percent, not rounded; what is undefined is empty."""
        rows = []
        paper = {row.category: row for row in self.rows if row.published}
        for row in self.rows:
            if row.published:
                continue
            for metric, cell in row.cells.items():
                published = paper[row.category].cells[metric] if row.category in paper else Cell()
                rows.append(
                    {
                        "dataset": self.dataset,
                        "protocol": self.protocol,
                        "category": row.category,
                        "configuration": row.configuration,
                        "metric": metric,
                        "n": cell.n,
                        "mean_percent": _percent(cell.mean),
                        "std_percent": _percent(cell.std),
                        "undefined": cell.reason,
                        "paper_mean_percent": _percent(published.mean),
                        "paper_std_percent": _percent(published.std),
                        "train_labels": row.train_labels,
                        "train_masks": row.train_masks,
                        "validation_labels": row.validation_labels,
                        "validation_masks": row.validation_masks,
                        "cost": row.cost_s,
                        "cost_unit": self.cost_unit,
                        "code": self.code,
                        "hardware": self.hardware,
                    }
                )
        return to_csv(rows)

    def table(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Text, not str: a category's name may hold brackets, which rich would take for markup.
        table = Table(
            title=Text(self.title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=0
        )
        table.caption = Text("\n".join(self._below()))
        for index, heading in enumerate(_SHORT_HEADINGS):
            table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
        for row, after in zip(self.rows, [*self.rows[1:], None], strict=True):
            ends_category = after is not None and after.category != row.category and len(self.rows) > 2
            table.add_row(*map(Text, self._texts(row)), end_section=ends_category)
        return table

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; shares in [0, 1], None where a number is undefined."""
        return {
            "title": self.title,
            "notes": list(self.notes),
            "cost_unit": self.cost_unit,
            "rows": [
                {
                    "category": row.category,
                    "configuration": row.configuration,
                    "n": row.n,
                    "train_labels": row.train_labels,
                    "train_masks": row.train_masks,
                    "validation_labels": row.validation_labels,
                    "validation_masks": row.validation_masks,
                    "cost": row.cost_s,
                    "metrics": {
                        metric: {"mean": cell.mean, "std": cell.std, "n": cell.n, "undefined": cell.reason}
                        for metric, cell in row.cells.items()
                    },
                }
                for row in self.rows
            ],
        }

    def _texts(self, row: Row) -> list[str]:
        return [
            row.category,
            row.configuration,
            "" if row.n is None else str(row.n),
            _pair(row.train_labels, row.train_masks),
            _pair(row.validation_labels, row.validation_masks),
            *(self._cell(row, row.cells[metric]) for metric in METRICS),
        ]

    def _cell(self, row: Row, cell: Cell) -> str:
        if cell.mean is None:
            return ABSENT if cell.reason is None else f"{ABSENT} [{self.footnotes.index(cell.reason) + 1}]"
        text = f"{100 * cell.mean:.1f}"
        if cell.std is not None:
            text += f" ± {100 * cell.std:.1f}"
        return text if cell.n == (row.n or 0) else f"{text} (n={cell.n})"

    def _below(self) -> list[str]:
        return [*(f"[{number}] {reason}" for number, reason in enumerate(self.footnotes, 1)), *self.notes]


# In Markdown and LaTeX, and in a terminal, where all stand side by side.
_HEADINGS = ("category", "configuration", "n", "train labels/masks", "validation labels/masks", *METRICS)
_SHORT_HEADINGS = (
    *("category", "configuration", "n", "train\nlabels/\nmasks", "valid.\nlabels/\nmasks"),
    *("image\nauroc", "image\nap", "pixel\nauroc", "pixel\nap", "aupro"),
)


def make_rows(
    plan: Plan, infos: Mapping[str, CategoryInfo], results: Mapping[str, RunResult], paper: PaperNumbers | None
) -> list[Row]:
    """The lines of a table: each category's configurations, its figures in the paper, and the means over categories.

    Args:
        plan: Which run fills which cell.
        infos: By category.
        results: Finished runs by key.
        paper: Published figures; None: none, or none that compare.
    """
    rows: list[Row] = []
    for category in plan.categories:
        rows += [_category_row(plan, infos[category], results, category, variant) for variant in plan.variants]
        if paper is not None:
            rows += _paper_row(paper, category, category)
    if len(plan.categories) > 1:
        ours = [row for row in rows if not row.published]
        rows += [
            _overall_row(plan, results, variant, [row for row in ours if row.configuration == variant.label])
            for variant in plan.variants
        ]
        if paper is not None:
            rows += _overall_paper_row(paper, plan.categories)
    return rows


def _category_row(
    plan: Plan, info: CategoryInfo, results: Mapping[str, RunResult], category: str, variant: Variant
) -> Row:
    planned = [plan.run(category, variant.label, seed) for seed in plan.seeds]
    finished = [results[run.key] for run in planned if run.key in results]
    return Row(
        category=category,
        configuration=variant.label,
        cells={metric: _cell_of(metric, finished) for metric in METRICS},
        n=len(finished),
        train_labels=planned[0].train_labels,
        train_masks=planned[0].train_masks,
        validation_labels=info.counts["validation"].defective,
        validation_masks=info.counts["validation"].masks,
        cost_s=sum(map(cost_s, finished)),
    )


def _cell_of(metric: str, finished: Sequence[RunResult]) -> Cell:
    values = [result.test[metric] for result in finished if metric in result.test]
    if values:
        return summarise(values)
    if not finished:
        return Cell(reason="no repetition has finished")
    return Cell(reason=finished[0].test_undefined[metric])


def summarise(values: Sequence[float]) -> Cell:
    """Mean, sample standard deviation and number of some values, at least one."""
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _overall_row(plan: Plan, results: Mapping[str, RunResult], variant: Variant, rows: Sequence[Row]) -> Row:
    """Mean over categories in each repetition, then mean and standard deviation over repetitions.

    A repetition counts if it is finished in every category that has the metric; a category that cannot have it, such as
    one without masks, is left out.
    """

    def sum_of(values: Sequence[int | float | None]) -> Any:
        return sum(value or 0 for value in values)

    by_seed = {
        seed: {c: results.get(plan.cells[c, variant.label, seed]) for c in plan.categories} for seed in plan.seeds
    }
    complete = [seed for seed, of_category in by_seed.items() if all(of_category.values())]
    cells = {}
    for metric in METRICS:
        having = [row.category for row in rows if row.cells[metric].mean is not None or row.n == 0]
        values = []
        for seed in plan.seeds:
            found = [by_seed[seed][category] for category in having]
            shares = [result.test.get(metric) for result in found if result is not None]
            defined = [share for share in shares if share is not None]
            if having and len(defined) == len(having):
                values.append(statistics.fmean(defined))
        if values:
            cells[metric] = summarise(values)
        elif not having:
            cells[metric] = Cell(reason="undefined in every category")
        else:
            cells[metric] = Cell(reason="no repetition has finished in every category")
    return Row(
        category=OVERALL,
        configuration=variant.label,
        cells=cells,
        n=len(complete),
        train_labels=sum_of([row.train_labels for row in rows]),
        train_masks=sum_of([row.train_masks for row in rows]),
        validation_labels=sum_of([row.validation_labels for row in rows]),
        validation_masks=sum_of([row.validation_masks for row in rows]),
        cost_s=sum_of([row.cost_s for row in rows]),
    )


def partial_means(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Notes on means over fewer than all categories."""
    notes = []
    for metric in METRICS:
        of_categories = [row for row in rows if row.category != OVERALL and not row.published]
        lacking = [
            category
            for category in plan.categories
            if all(row.cells[metric].mean is None and row.n for row in of_categories if row.category == category)
        ]
        if lacking and len(lacking) < len(plan.categories) > 1:
            notes.append(f"the mean of {metric} leaves out {', '.join(lacking)}, where it is undefined")
    return notes


def _paper_row(paper: PaperNumbers, category: str, name: str) -> list[Row]:
    cells = {metric: _paper_cell(paper.get((category, metric))) for metric in METRICS}
    return [Row(name, PAPER, cells, published=True)] if any(cell.mean is not None for cell in cells.values()) else []


def _paper_cell(published: tuple[float, float | None] | None) -> Cell:
    if published is None:
        return Cell()
    mean, std = published
    return Cell(mean / 100, None if std is None else std / 100)


def _overall_paper_row(paper: PaperNumbers, categories: Sequence[str]) -> list[Row]:
    """The paper's own mean where we have all of its categories, else the mean of its figures for ours."""
    published = {category for category, _ in paper} - {OVERALL}
    if published == set(categories) and any(category == OVERALL for category, _ in paper):
        return _paper_row(paper, OVERALL, OVERALL)
    means: dict[tuple[str, str], tuple[float, float | None]] = {}
    for metric in METRICS:
        values = [paper[category, metric][0] for category in categories if (category, metric) in paper]
        if len(values) == len(categories):
            means[OVERALL, metric] = (statistics.fmean(values), None)
    return _paper_row(means, OVERALL, OVERALL)


def read_paper(file: Path, dataset: str) -> PaperNumbers:
    """Published figures of a dataset from a CSV with the columns :data:`PAPER_COLUMNS`.

    Args:
        file: The CSV.
        dataset: As the CSV calls it.

    Raises:
        SSNError: the file cannot be read, lacks a column or the dataset, or holds something else than percentages.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = [column for column in PAPER_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise SSNError(f"{file} has no column {missing[0]}; a paper's figures have {', '.join(PAPER_COLUMNS)}")
            lines = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise SSNError(f"cannot read the paper's figures {file}: {error}") from error
    numbers: dict[tuple[str, str], tuple[float, float | None]] = {}
    for number, line in enumerate(lines, 2):
        if line["dataset"] != dataset:
            continue
        try:
            std = float(line["std_percent"]) if line["std_percent"] else None
            numbers[line["category"], line["metric"]] = (float(line["mean_percent"]), std)
        except (TypeError, ValueError) as error:
            raise SSNError(f"{file}, line {number}: mean_percent and std_percent must be numbers") from error
    if not numbers:
        known = ", ".join(dict.fromkeys(line["dataset"] for line in lines))
        raise SSNError(f"{file} has no figures of {dataset}; it has {known}; name one of them with --paper-dataset")
    return numbers


def run_rows(
    plan: Plan,
    results: Mapping[str, RunResult],
    failures: Mapping[str, str],
    *,
    dataset: str,
    protocol: str,
) -> list[dict[str, Any]]:
    """A line per cell and repetition, for ``runs.csv`` and ``--json``; metrics are shares in [0, 1].

    Two cells that one run fills have a line each, with the same ``run``.
    """
    rows = []
    for (category, label, seed), key in plan.cells.items():
        run, result = plan.run(category, label, seed), results.get(key)
        row: dict[str, Any] = {
            "dataset": dataset,
            "protocol": protocol,
            "category": category,
            "configuration": label,
            "repetition": seed,
            "run": key[:32],
            "train_labels": run.train_labels,
            "train_masks": run.train_masks,
            "failure": None if result is not None else failures.get(key, "not finished"),
        }
        for metric in (*METRICS, "image_f1_max"):
            row[f"test_{metric}"] = None if result is None else result.test.get(metric)
        for metric in INTERVAL_METRICS:
            low, high = (None, None) if result is None else result.test_intervals.get(metric, (None, None))
            row |= {f"test_{metric}_95_low": low, f"test_{metric}_95_high": high}
        for metric in (*METRICS, "image_f1_max"):
            row[f"validation_{metric}"] = None if result is None else result.validation.get(metric)
        for name in ("test_images", "test_defective", "test_masks", "elapsed_s", "duration_s", "cores", "gpus"):
            row[name] = None if result is None else getattr(result, name)
        for name in ("hardware", "code", "feature_source", "finished"):
            row[name] = None if result is None else getattr(result, name)
        rows.append(row)
    return rows


def cost_s(result: RunResult) -> float:
    """What a run held, times how long: GPU-seconds on GPUs, else core-seconds."""
    return result.elapsed_s * (result.gpus or result.cores)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as CSV with a header; None is empty."""
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


_LATEX = {
    **{character: f"\\{character}" for character in "_%&#${}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "—": "--",
    "[": "{[}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}


def escape_latex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_line(texts: Sequence[str]) -> str:
    return " & ".join(map(escape_latex, texts)) + r" \\"


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _pair(labels: int | None, masks: int | None) -> str:
    return "" if labels is None else f"{labels}/{masks}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
