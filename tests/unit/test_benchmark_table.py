"""Tables of made-up results: every number where it belongs, every gap explained."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ssn.errors import SSNError
from tests.made_up_benchmark import make_info, plan_of, result_of, results_of
from tuning.benchmarking.plan import PlannedRun
from tuning.benchmarking.table import (
    METRICS,
    OVERALL,
    PAPER,
    BenchmarkTable,
    Cell,
    Row,
    cost_s,
    escape_latex,
    make_rows,
    partial_means,
    read_paper,
    run_rows,
    summarise,
    to_csv,
)

INFOS = {name: make_info(name, masks=4, defective=6) for name in ("bolt", "nut_[M6]")}
PLAN = plan_of(list(INFOS.values()), overs=["train.supervision_ratio=0,1"], seeds=3)
DEFAULT_0, DEFAULT_1 = "default, supervision_ratio=0", "default, supervision_ratio=1"
SCORES = {"bolt": 0.6, "nut_[M6]": 0.8}


def score(run: PlannedRun) -> dict[str, float]:
    """0.6 or 0.8, plus a tenth with masks, plus a hundredth per repetition, for every metric."""
    return dict.fromkeys(METRICS, SCORES[run.category] + 0.1 * (run.train_masks > 0) + 0.01 * run.seed)


def table_of(rows: list[Row], notes: tuple[str, ...] = ("protocol validation",)) -> BenchmarkTable:
    return BenchmarkTable(
        "made_up", "validation", "made_up: percent", rows, notes, "core-seconds", "commit 1", "abacus"
    )


def rows_of(results: Mapping[str, Any], paper: Any = None) -> dict[tuple[str, str], Row]:
    return {(row.category, row.configuration): row for row in make_rows(PLAN, INFOS, results, paper)}


def test_rows_are_means_over_repetitions() -> None:
    rows = rows_of(results_of(PLAN, score))
    assert list(rows) == [(c, d) for c in ("bolt", "nut_[M6]", OVERALL) for d in (DEFAULT_0, DEFAULT_1)]
    row = rows["bolt", DEFAULT_1]
    cell = row.cells["pixel_ap"]
    assert (cell.mean, cell.std, cell.n) == (pytest.approx(0.71), pytest.approx(0.01), 3)
    assert (row.n, row.train_labels, row.train_masks, row.validation_labels, row.validation_masks) == (3, 4, 4, 4, 3)
    assert rows["bolt", DEFAULT_0].train_labels == 0
    assert row.cost_s == 3 * 10.0 * 2


def test_overall_is_the_mean_over_categories_in_each_repetition() -> None:
    """Not the mean of all numbers: where categories vary together, their mean varies as much."""

    def wobble(run: PlannedRun) -> dict[str, float]:
        return dict.fromkeys(METRICS, SCORES[run.category] + [0.0, 0.1, -0.1][run.seed])

    cell = rows_of(results_of(PLAN, wobble))[OVERALL, DEFAULT_0].cells["aupro"]
    assert (cell.mean, cell.std, cell.n) == (pytest.approx(0.7), pytest.approx(0.1), 3)

    def against(run: PlannedRun) -> dict[str, float]:
        sign = 1 if run.category == "bolt" else -1
        return dict.fromkeys(METRICS, SCORES[run.category] + sign * [0.0, 0.1, -0.1][run.seed])

    row = rows_of(results_of(PLAN, against))[OVERALL, DEFAULT_0]
    assert row.cells["aupro"].std == pytest.approx(0.0, abs=1e-12)
    assert (row.n, row.train_masks, row.validation_labels) == (3, 0, 8)


def test_one_category_needs_no_overall() -> None:
    plan = plan_of([INFOS["bolt"]])
    rows = make_rows(plan, INFOS, results_of(plan, score), None)
    assert [row.category for row in rows] == ["bolt"]


def test_failed_repetition_makes_n_smaller() -> None:
    results = results_of(PLAN, lambda run: None if (run.category, run.seed) == ("bolt", 1) else score(run))
    rows = rows_of(results)
    bolt, nut, overall = (rows[c, DEFAULT_0] for c in ("bolt", "nut_[M6]", OVERALL))
    assert (bolt.n, nut.n, overall.n) == (2, 3, 2)
    assert bolt.cells["image_ap"] == summarise([0.6, 0.62])
    assert overall.cells["image_ap"].mean == pytest.approx(statistics.fmean([0.7, 0.72])), "of repetitions 0 and 2"
    assert overall.cells["image_ap"].n == 2


def test_category_without_results_leaves_the_overall_empty() -> None:
    """Its mean over fewer categories would pass for one over all."""
    rows = rows_of(results_of(PLAN, lambda run: None if run.category == "bolt" else score(run)))
    assert rows["bolt", DEFAULT_0].cells["aupro"] == Cell(reason="no repetition has finished")
    assert rows[OVERALL, DEFAULT_0].cells["aupro"].reason == "no repetition has finished in every category"
    assert rows[OVERALL, DEFAULT_0].n == 0


def without_masks(run: PlannedRun) -> dict[str, float]:
    images_only = {metric: value for metric, value in score(run).items() if metric.startswith("image")}
    return images_only if run.category == "bolt" else score(run)


def test_undefined_metric_is_a_dash_with_its_reason_and_never_0() -> None:
    results = results_of(PLAN, without_masks)
    rows = rows_of(results)
    assert rows["bolt", DEFAULT_0].cells["aupro"] == Cell(reason="no masks")
    assert rows[OVERALL, DEFAULT_0].cells["aupro"] == rows["nut_[M6]", DEFAULT_0].cells["aupro"]
    table = table_of(list(rows.values()))
    line = next(line for line in table.markdown().splitlines() if line.startswith("| bolt"))
    assert line.count("— [1]") == 3
    assert " 0.0" not in line
    assert "\n[1] no masks\n" in table.markdown()
    assert partial_means(PLAN, list(rows.values())) == [
        f"the mean of {metric} leaves out bolt, where it is undefined"
        for metric in ("pixel_auroc", "pixel_ap", "aupro")
    ]


def test_metric_that_no_category_has_is_said_once() -> None:
    images_only = results_of(PLAN, lambda run: {"image_auroc": 0.5, "image_ap": 0.5})
    rows = rows_of(images_only)
    assert rows[OVERALL, DEFAULT_0].cells["aupro"] == Cell(reason="undefined in every category")
    assert partial_means(PLAN, list(rows.values())) == []


def test_one_repetition_has_no_deviation() -> None:
    assert summarise([0.5]) == Cell(0.5, None, 1)
    text = table_of([Row("bolt", "default", {m: summarise([0.5]) for m in METRICS}, n=1)]).markdown()
    assert "| 50.0 |" in text
    assert "±" not in text


def test_markdown_is_a_table_of_percent_with_one_decimal() -> None:
    text = table_of(list(rows_of(results_of(PLAN, score)).values())).markdown()
    lines = text.splitlines()
    assert lines[0] == "**made_up: percent**"
    header, rule, first = lines[2:5]
    assert header.count("|") == rule.count("|") == first.count("|") == 11
    assert first == (
        "| bolt | default, supervision_ratio=0 | 3 | 0/0 | 4/3 | 61.0 ± 1.0 | 61.0 ± 1.0 | 61.0 ± 1.0 | 61.0 ± 1.0 "
        "| 61.0 ± 1.0 |"
    )
    assert text.endswith("\nprotocol validation\n")


def test_cell_of_fewer_repetitions_says_so() -> None:
    cells = {**{m: Cell(0.5, 0.01, 3) for m in METRICS}, "aupro": Cell(0.5, 0.01, 2)}
    text = table_of([Row("a|b", "default", cells, n=3)]).markdown()
    assert "50.0 ± 1.0 (n=2) |" in text
    assert text.count("(n=") == 1
    assert "| a\\|b |" in text


def test_latex_is_a_tabular_without_loose_specials() -> None:
    rows = list(rows_of(results_of(PLAN, without_masks)).values())
    text = table_of(rows, ("50 % of A&B, x_1 ~ {3} #4 $5 \\ ^",)).latex()
    body = text.partition("\\begin{tabular}")[2].partition("\\end{tabular}")[0]
    columns = re.match(r"\{(l+r+)\}", body)
    assert columns is not None
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(rows)
    for line in lines:
        cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
        assert len(cells) == len(columns[1])
        assert not re.search(r"(?<!\\)[_%#]", line)
        assert not line.lstrip().startswith("["), "LaTeX takes it for an argument of the line before"
    assert body.count("\\hline") == 3 + 2
    assert r"nut\_{[}M6]" in body
    assert "$\\pm$" in body
    assert text.isascii()
    notes = text.partition("\\end{tabular}")[2]
    assert r"50 \% of A\&B, x\_1 \textasciitilde{} \{3\} \#4 \$5 \textbackslash{} \textasciicircum{}" in notes
    assert notes.count("{") == notes.count("}")
    assert text.startswith("% made_up: percent\n")


def test_latex_escapes_by_character() -> None:
    assert escape_latex("a_b ± 5 %") == r"a\_b $\pm$ 5 \%"
    assert escape_latex("\\_") == r"\textbackslash{}\_"


def test_terminal_shows_the_same() -> None:
    out = io.StringIO()
    Console(file=out, width=250, color_system=None).print(
        table_of(list(rows_of(results_of(PLAN, score)).values())).table()
    )
    text = out.getvalue()
    assert "nut_[M6]" in text
    assert text.count("±") == 5 * 6
    assert "protocol validation" in text


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_line_per_number() -> None:
    paper = {("bolt", "aupro"): (61.5, 0.2)}
    rows = rows_of(results_of(PLAN, without_masks), paper)
    lines = read_csv(table_of(list(rows.values())).csv())
    assert len(lines) == 3 * 2 * len(METRICS)
    found = {(line["category"], line["configuration"], line["metric"]): line for line in lines}
    image = found["bolt", DEFAULT_1, "image_ap"]
    assert (float(image["mean_percent"]), float(image["std_percent"])) == (pytest.approx(71), pytest.approx(1))
    assert (image["n"], image["train_masks"], image["cost"], image["code"]) == ("3", "4", "60.0", "commit 1")
    undefined = found["bolt", DEFAULT_1, "aupro"]
    assert (undefined["mean_percent"], undefined["undefined"]) == ("", "no masks")
    assert (undefined["paper_mean_percent"], undefined["paper_std_percent"]) == ("61.5", "0.2")
    assert found["nut_[M6]", DEFAULT_1, "aupro"]["paper_mean_percent"] == ""
    assert {line["protocol"] for line in lines} == {"validation"}


def test_json_has_none_where_a_number_is_undefined() -> None:
    rows = list(rows_of(results_of(PLAN, without_masks)).values())
    found = table_of(rows).as_dict()["rows"][0]
    assert found["metrics"]["aupro"] == {"mean": None, "std": None, "n": 0, "undefined": "no masks"}
    assert found["metrics"]["image_ap"]["n"] == 3


def test_runs_have_a_line_per_cell_with_intervals() -> None:
    results = results_of(
        PLAN, lambda run: None if (run.category, run.seed, run.train_masks) == ("bolt", 2, 4) else score(run)
    )
    (lost,) = [run for run in PLAN.runs if run.key not in results]
    rows = run_rows(PLAN, results, {lost.key: "the training loss became nan"}, dataset="made_up", protocol="official")
    assert len(rows) == len(PLAN.cells)
    failed = [row for row in rows if row["failure"]]
    assert [(row["repetition"], row["failure"], row["test_aupro"]) for row in failed] == [
        (2, "the training loss became nan", None)
    ]
    row = rows[0]
    assert (row["test_image_auroc"], row["validation_image_auroc"], row["validation_aupro"]) == (0.6, 0.75, None)
    assert (row["test_image_auroc_95_low"], row["test_image_auroc_95_high"]) == (0.5, 0.9)
    assert row["test_image_ap_95_low"] is None
    lines = read_csv(to_csv(rows))
    assert lines[0]["test_image_auroc"] == "0.6"
    assert next(line for line in lines if line["failure"])["test_aupro"] == ""
    assert to_csv([]) == ""


def test_cell_shared_by_two_settings_is_in_both_lines_and_one_run() -> None:
    plan = plan_of([make_info(masks=4)], overs=["train.supervision_ratio=0.25,0.3"], seeds=1)
    results = {run.key: result_of(run, dict.fromkeys(METRICS, 0.5)) for run in plan.runs}
    rows = run_rows(plan, results, {}, dataset="made_up", protocol="validation")
    assert len(results) == 1
    assert len(rows) == 2
    assert rows[0]["run"] == rows[1]["run"]


def test_gpu_time_counts_gpus() -> None:
    (run,) = plan_of([make_info()], seeds=1).runs
    result = result_of(run, {})
    assert cost_s(result) == 20.0
    assert cost_s(replace(result, gpus=0.5)) == 5.0


PAPER_CSV = """dataset,category,metric,mean_percent,std_percent
mvtec,bolt,aupro,90.0,0.5
mvtec,nut_[M6],aupro,80.0,
mvtec,mean,aupro,85.5,0.1
mvtec,bolt,image_ap,70.0,0.2
visa,candle,aupro,50.0,1.0
"""


def paper_file(folder: Path, text: str = PAPER_CSV) -> Path:
    file = folder / "paper.csv"
    file.write_text(text)
    return file


def test_paper_is_read(tmp_path: Path) -> None:
    numbers = read_paper(paper_file(tmp_path), "mvtec")
    assert numbers["bolt", "aupro"] == (90.0, 0.5)
    assert numbers["nut_[M6]", "aupro"] == (80.0, None)
    assert ("candle", "aupro") not in numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset,category,metric,mean_percent\n", "has no column std_percent"),
        (PAPER_CSV.replace("90.0", "ninety"), "line 2: mean_percent and std_percent must be numbers"),
        (PAPER_CSV.replace("mvtec", "btad"), "has no figures of mvtec; it has btad, visa; name one of them with"),
    ],
)
def test_paper_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SSNError) as error:
        read_paper(paper_file(tmp_path, text), "mvtec")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SSNError, match="cannot read the paper's figures"):
        read_paper(tmp_path / "missing.csv", "mvtec")


def test_paper_stands_below_ours(tmp_path: Path) -> None:
    rows = rows_of(results_of(PLAN, score), read_paper(paper_file(tmp_path), "mvtec"))
    assert [c for c, d in rows if d == PAPER] == ["bolt", "nut_[M6]", OVERALL]
    assert list(rows).index(("bolt", PAPER)) == 2
    assert rows[OVERALL, PAPER].cells["aupro"] == Cell(0.855, pytest.approx(0.001), 0), "as published"
    text = table_of(list(rows.values())).markdown()
    assert "| bolt | paper |  |  |  | — | 70.0 ± 0.2 | — | — | 90.0 ± 0.5 |" in text
    assert "| mean | paper |  |  |  | — | — | — | — | 85.5 ± 0.1 |" in text


def test_papers_mean_over_other_categories_is_not_shown_beside_ours(tmp_path: Path) -> None:
    """What it published for ours is averaged instead, and only where it has all of them."""
    text = PAPER_CSV + "mvtec,screw,aupro,10.0,0.1\n"
    rows = rows_of(results_of(PLAN, score), read_paper(paper_file(tmp_path, text), "mvtec"))
    assert rows[OVERALL, PAPER].cells["aupro"] == Cell(0.85, None, 0)
    assert rows[OVERALL, PAPER].cells["image_ap"] == Cell()
