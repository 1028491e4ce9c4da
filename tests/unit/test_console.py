"""What the command lines print where there is no terminal."""

from __future__ import annotations

import pytest

from ssn.console import print_table, report_progress


def test_a_thing_is_said_to_be_finished_once(capsys: pytest.CaptureFixture[str]) -> None:
    with report_progress("images") as report:
        for done in (1, 2, 2):
            report("widget", done, 2)
        report("gadget", 3, 3)
    assert capsys.readouterr().err == "widget: 2 images\ngadget: 3 images\n"


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"run_id": "0123456789abcdef" * 20, "note": "word " * 60, "score": 0.25, "none": None}])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "0123" in line]
    assert "0123456789abcdef" * 20 in row
    assert ("word " * 60).strip() in row
    assert "0.2500" in row
