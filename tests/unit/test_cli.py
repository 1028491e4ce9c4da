"""The command lines as a person meets them: what they refuse, how they say so, and what they print."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import ssn.cli
import ssn.console
import tuning.cli
from ssn.console import print_table, report_progress, run_app, write_csv, write_json
from ssn.errors import SSNError
from tuning.reporting.report import Leaderboard, LeaderboardRow
from tuning.settings import SweepSettings

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(app: typer.Typer, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            run_app(app, arguments)
        captured = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ingest", "nowhere", "--raw", "x", "--out", "y"], ["nowhere", "mvtec_ad"]),
        (["ingest", "mvtec_ad", "--raw", "missing", "--out", "y"], ["missing"]),
        (["train", "mvtec_ad", "--data", "missing", "--category", "screw", "--out", "m"], ["missing"]),
        (["evaluate", "missing", "--data", "missing"], ["missing"]),
        (["predict", "missing", "image.png"], ["no image at image.png"]),
        (["predict", "missing", "woven", "--device", "warp:9"], ["--device warp:9", "use cpu or auto"]),
        (["demo-data", "--out", "."], ["woven already exists"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(run: Run, arguments: list[str], words: list[str]) -> None:
    Path("woven").mkdir()
    status, out, err = run(ssn.cli.app, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "mvtec_ad", "--data", "missing"], ["missing"]),
        (["sweep", "mvtec_ad", "--data", "missing", "--category", "screw"], ["missing"]),
        (["report", "mvtec_ad"], ["no runs of any sweep of mvtec_ad", "--tracking-uri"]),
        (["champions", "promote", "0123abc"], ["0123abc"]),
    ],
)
def test_the_platforms_mistakes_too(run: Run, arguments: list[str], words: list[str]) -> None:
    status, _, err = run(tuning.cli.app, *arguments)
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("app", "arguments", "word"),
    [
        (ssn.cli.app, ["train"], "Missing argument"),
        (ssn.cli.app, ["trian"], "No such command"),
        (ssn.cli.app, ["train", "mvtec_ad", "--category", "screw", "--out", "m"], "--data"),
        (ssn.cli.app, ["predict", "m"], "Missing argument"),
        (ssn.cli.app, ["demo-data", "--out", "d", "--size", "many"], "--size"),
        (ssn.cli.app, ["demo-data", "--out", "d", "--size", "16"], "--size"),
        (tuning.cli.app, ["sweep", "mvtec_ad", "--data", "x", "--trials", "many"], "--trials"),
        (tuning.cli.app, ["champions", "crown"], "No such command"),
    ],
)
def test_usage_errors_have_status_2_and_name_the_option(app: typer.Typer, arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert word in result.stderr
    assert result.stdout == ""


def commands(app: typer.Typer) -> list[tuple[str, ...]]:
    found = [(info.name or info.callback.__name__,) for info in app.registered_commands if info.callback]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found += [(str(group.name), *name) for name in commands(group.typer_instance)]
    return found


def test_every_command_is_there() -> None:
    assert {" ".join(c) for c in commands(ssn.cli.app)} == {
        *("ingest", "train", "evaluate", "predict", "export", "demo-data"),
    }
    assert {" ".join(c) for c in commands(tuning.cli.app)} == {
        "sweep",
        "plan",
        "replay",
        "benchmark",
        "report",
        "champions promote",
        "champions list",
    }


@pytest.mark.parametrize(
    ("app", "command"),
    [(app, command) for app in (ssn.cli.app, tuning.cli.app) for command in commands(app)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_option_has_help(app: typer.Typer, command: tuple[str, ...]) -> None:
    node = typer.main.get_command(app)
    for name in command:
        node = node.commands[name]  # type: ignore[attr-defined]
    assert node.help
    for parameter in node.params:
        assert getattr(parameter, "help", None), f"{' '.join(command)} {parameter.name}"


def test_a_bug_keeps_its_traceback() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_app(app, [])


def test_ctrl_c_is_status_130(run: Run) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    status, out, err = run(app)
    assert (status, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("package", ["ssn", "tuning"])
def test_both_run_from_a_bare_checkout(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"python -m {package}" in done.stdout


def test_demo_data_then_ingest(run: Run, tmp_path: Path) -> None:
    status, out, _ = run(ssn.cli.app, "demo-data", "--out", "raw", "--size", "32", "--seed", "3")
    assert (status, out) == (0, "390 synthetic images of brushed, speckled, woven in raw\n")
    status, out, err = run(
        ssn.cli.app, "ingest", "synthetic_surfaces", "--raw", "raw", "--out", "shards", "--category", "woven"
    )
    assert status == 0, err
    assert out.startswith("synthetic_surfaces/woven: 130 images, written")
    assert "woven: " in err  # progress, apart from the result
    assert [p.name for p in (tmp_path / "shards/synthetic_surfaces").iterdir()] == ["woven"]


def test_train_refuses_an_unknown_setting_before_it_trains(run: Run) -> None:
    ingest_tiny(run)
    status, _, err = run(
        ssn.cli.app,
        *("train", "synthetic_surfaces", "--data", "shards", "--category", "woven"),
        *("--out", "model", "--set", "train.epoch=3"),
    )
    assert status == 2
    assert err.splitlines()[-1] == (
        "error: unknown config key train.epoch (--set train.epoch=3); did you mean train.epochs?"
    )
    assert not Path("model").exists()


TINY = (
    *("--set", "model.backbone=resnet18", "--set", "model.weights=random", "--set", "model.seg_channels=8"),
    *("--set", "model.cls_channels=4", "--set", "data.image_size=32", "--set", "train.epochs=1"),
)


def test_train_keeps_features_and_minds_memory(run: Run) -> None:
    """Stdout is the result alone; what does not fit is one line on stderr."""
    ingest_tiny(run)
    base = ("train", "synthetic_surfaces", "--data", "shards", "--category", "woven", "--out", "model", *TINY)
    status, out, err = run(ssn.cli.app, *base, "--cache", "features")
    assert status == 0, err
    assert json.loads(out)["feature_source"] == "cached"
    assert "features of woven: " in err
    (kept,) = Path("features").iterdir()
    assert (kept / "meta.json").exists()
    status, out, err = run(ssn.cli.app, *base, "--cache", "features")
    assert status == 0, err
    assert "features of woven: " not in err
    status, out, err = run(ssn.cli.app, *base, "--set", "data.image_size=128", "--memory-gb", "0.0005")
    assert status == 0, err
    assert json.loads(out)["feature_source"] == "streamed"
    (note,) = [line for line in err.splitlines() if line.startswith("note: ")]
    assert "more than the 0.5 MB there is for them; its images are kept instead" in note


def test_cache_that_cannot_be_written_is_one_line(run: Run) -> None:
    ingest_tiny(run)
    Path("file").write_text("")
    status, _, err = run(
        ssn.cli.app,
        *("train", "synthetic_surfaces", "--data", "shards", "--category", "woven", "--out", "model", *TINY),
        *("--cache", "file"),
    )
    assert status == 2
    assert err.splitlines()[-1].startswith("error: cannot write to the feature cache file: File exists; choose another")
    assert not Path("model").exists()


def test_sweep_refuses_an_unknown_setting_before_it_starts(run: Run) -> None:
    ingest_tiny(run)
    Path("own.yaml").write_text("search: {trails: 3}\n")
    status, _, err = run(tuning.cli.app, "sweep", "synthetic_surfaces", "--data", "shards", "--config", "own.yaml")
    assert status == 2
    assert err.splitlines()[-1] == "error: unknown config key search.trails (own.yaml); did you mean search.trials?"
    assert not Path("mlflow.db").exists()


def test_shorthands_of_sweep_are_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import tuning.sweep

    ingest_tiny(run)
    command = ("sweep", "synthetic_surfaces", "--data", "shards")
    status, _, err = run(tuning.cli.app, *command, "--against", "price")
    assert (status, err.splitlines()[-1].startswith("error: objective.against")) == (2, True)

    given: list[SweepSettings] = []

    def refuse(settings: SweepSettings, **_: object) -> None:
        given.append(settings)
        raise SSNError("that is all")

    monkeypatch.setattr(tuning.sweep, "sweep", refuse)
    run(tuning.cli.app, *command)
    run(tuning.cli.app, *command, "--transfer", "--against", "labels", "--trials", "5")
    assert [(s.search.transfer, s.objective.against) for s in given] == [(False, "none"), (True, "labels")]
    assert given[1].search.trials == 5


def test_defaults_of_differing_ingests_are_refused(run: Run) -> None:
    ingest_tiny(run)
    manifest = yaml.safe_load((ROOT / "datasets/synthetic_surfaces.yaml").read_text())
    manifest["defaults"]["synthesis.perlin_threshold"] = 0.5
    Path("synthetic_surfaces.yaml").write_text(yaml.safe_dump(manifest))
    status, _, err = run(
        ssn.cli.app, "ingest", "./synthetic_surfaces.yaml", "--raw", "raw", "--out", "shards", "--category", "brushed"
    )
    assert status == 0, err
    assert tuning.cli.read_defaults("shards", "synthetic_surfaces", ["brushed"])["synthesis.perlin_threshold"] == 0.5
    with pytest.raises(SSNError, match="brushed and woven of synthetic_surfaces were ingested with different"):
        tuning.cli.read_defaults("shards", "synthetic_surfaces", None)


def ingest_tiny(run: Run) -> None:
    from ssn.demo_data import generate

    generate(Path("raw"), size=32, train_normals=5, test_normals=10, test_defects=12)
    status, _, err = run(
        ssn.cli.app, "ingest", "synthetic_surfaces", "--raw", "raw", "--out", "shards", "--category", "woven"
    )
    assert status == 0, err


def test_champions_list_of_an_empty_store(run: Run) -> None:
    status, _, err = run(tuning.cli.app, "champions", "list", "--json", "champions.json")
    assert status == 0
    assert "no champions yet" in err
    assert json.loads(Path("champions.json").read_text()) == []


def test_a_leaderboard_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    row = LeaderboardRow("a" * 40, noise_sigma=0.015, test_image_auroc=0.9876, train_labels=3, duration_s=61.0)
    tuning.cli.show_leaderboard(Leaderboard("surfaces", "s1", [row, row]))
    out = capsys.readouterr().out
    assert "a" * 40 in out
    assert "0.988" in out
    tuning.cli.show_leaderboard(Leaderboard("surfaces", "s1", [row]), markdown=True)
    assert "| " + "a" * 40 + " |" in capsys.readouterr().out


def test_tables_show_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"path": "[red]/x.png", "score": 1.23456}, {"path": "y.png", "score": None}])
    out = capsys.readouterr().out
    assert "[red]/x.png" in out
    assert "1.2346" in out
    assert "-" in out


def test_results_are_written_as_json_and_csv(tmp_path: Path) -> None:
    rows = [{"path": "a,b.png", "score": 1.5}, {"path": "c.png", "score": -2.0, "heatmap": "c.jpg"}]
    write_csv(tmp_path / "new/rows.csv", rows)
    with (tmp_path / "new/rows.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {"path": "a,b.png", "score": "1.5", "heatmap": ""},
            {"path": "c.png", "score": "-2.0", "heatmap": "c.jpg"},
        ]
    write_json(tmp_path / "new/rows.json", rows)
    assert json.loads((tmp_path / "new/rows.json").read_text()) == rows
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "nan.json", float("nan"))


@pytest.mark.parametrize("write", [write_json, write_csv])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SSNError, match=r"cannot write .*file/rows"):
        write(tmp_path / "file/rows", [])


def test_progress_in_a_log_is_one_line_per_thing(capsys: pytest.CaptureFixture[str]) -> None:
    with report_progress("images") as report:
        for i in range(1, 4):
            report("woven", i, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "woven: 3 images\n"


def test_progress_on_a_terminal_stays_off_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with report_progress("images") as report:
        report("woven", 1, 2)
        report("brushed", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "woven" in captured.err
    assert "brushed" in captured.err
