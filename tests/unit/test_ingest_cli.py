"""``python -m ssn ingest`` as a person meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ssn.cli
from ssn.console import run_app
from tests.raw_folders import draw_image, encode_png, write_ksdd2, write_mvtec, write_sensum, write_sensum_folds

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            run_app(ssn.cli.app, ("ingest", *arguments))
        captured = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, captured.out, captured.err

    return call


def test_check_prints_the_report_of_ingest(run: Run, tmp_path: Path) -> None:
    write_mvtec(tmp_path / "raw", "bottle")
    status, checked, err = run("mvtec_ad", "--raw", "raw", "--check")
    assert (status, err) == (0, "bottle: 33 images\n")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    status, written, err = run("mvtec_ad", "--raw", "raw", "--out", "shards")
    assert (status, err) == (0, "bottle: 66 steps\n")
    assert checked.splitlines()[0] == "mvtec_ad/bottle: 33 images, would be written (split seed 0)"
    assert checked == written.replace(", written", ", would be written")
    status, checked, _ = run("mvtec_ad", "--raw", "raw", "--out", "shards", "--check")
    assert status == 0
    assert checked == written.replace(", written", ", unchanged")


def test_check_of_a_damaged_folder_is_one_line_and_status_2(run: Run, tmp_path: Path) -> None:
    write_mvtec(tmp_path / "raw", "bottle")
    for name in ("000", "003"):
        (tmp_path / f"raw/bottle/train/good/{name}.png").write_bytes(encode_png(draw_image(1))[:300])
    status, out, err = run("mvtec_ad", "--raw", "raw", "--check")
    assert (status, out) == (2, "")
    assert err.startswith("error: image bottle/train/good/000.png is corrupt or unreadable (")
    assert err.endswith("; at fault as well: 1 (bottle/train/good/003.png)\n")
    assert err.count("\n") == 1
    status, out, _ = run("mvtec_ad", "--raw", "raw", "--check", "--skip-unreadable")
    assert status == 0
    assert "skipped 2 (image bottle/train/good/000.png is corrupt" in out


def test_official_folds_and_masks_from_the_command_line(run: Run, tmp_path: Path) -> None:
    write_sensum(tmp_path / "sensum")
    write_sensum_folds(tmp_path / "sensum")
    status, out, _ = run("sensum", "--raw", "sensum", "--out", "out", "--protocol", "official", "--fold", "1")
    assert status == 0
    assert "sensum/softgel: 15 images, written (official split, fold 1)\n" in out
    status, _, err = run("sensum", "--raw", "sensum", "--out", "out")
    assert status == 2
    assert "was made with --protocol official, not validation; use that protocol, or another output folder" in err
    write_ksdd2(tmp_path / "ksdd2")
    status, _, err = run("ksdd2", "--raw", "ksdd2", "--check", "--masks", "16")
    assert (status, err) == (
        2,
        "error: ksdd2/ksdd2 publishes no choice of 16 masks here; leave --masks out\n",
    )


def test_writing_needs_a_place(run: Run, tmp_path: Path) -> None:
    write_mvtec(tmp_path / "raw", "bottle")
    status, _, err = run("mvtec_ad", "--raw", "raw")
    assert status == 2
    assert err == "error: give --out, the folder or URI to write shards to; or --check, to write nothing\n"
