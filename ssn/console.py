"""What both command lines share: errors become one line, progress goes to stderr, results to stdout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ssn.errors import SSNError

if TYPE_CHECKING:
    from rich.table import Table

Report = Callable[[str, int, int], None]
"""Called with what is being worked on, steps done and steps in all."""


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit.

    An :class:`~ssn.errors.SSNError` becomes one ``error:`` line on stderr and status 2, as usage errors have it; Ctrl-C
    is status 130; any other exception is a bug and keeps its traceback.
    """
    try:
        app(args=arguments)
    except SSNError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    raise AssertionError("typer always exits")


@contextmanager
def report_progress(unit: str) -> Iterator[Report]:
    """A live progress bar per thing on stderr; on a pipe or in a log file, one line when a thing is finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        finished: set[str] = set()

        def log(name: str, done: int, total: int) -> None:
            if done >= total and name not in finished:
                finished.add(name)
                print(f"{name}: {done} {unit}", file=sys.stderr, flush=True)

        yield log
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield show


def write_json(file: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, creating the folder; NaN is refused, because it is not JSON."""
    _write_text(file, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV with a header; columns are the rows' keys in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise SSNError(f"cannot write {file}: {error.strerror or error}") from error


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print ``rows`` on stdout as an aligned table; floats get four decimals, what is missing a dash."""
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        # Text, not str: rich would take a path's brackets for markup
        table.add_row(*[Text(_format(row.get(column)), overflow="fold") for column in columns])
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table on stdout; a pipe, which has no width, gets it unfolded."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:
        console.width = Measurement.get(Console(width=10_000), console.options.update(max_width=10_000), table).maximum
    console.print(table)


def _format(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_text(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SSNError(f"cannot write {file}: {error.strerror or error}") from error
