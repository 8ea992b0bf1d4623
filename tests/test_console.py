"""What is printed on terminals that cannot show all characters, and errors of the operating system as one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from specrag.cli.console import failures_reported

# Prints what `specrag ask` does once the answer is there; without models, so that only the terminal is tested.
SHOWN = """
import sys
from specrag.cli.answers import show, show_json
from specrag.cli.console import err, out, print_what_can_be_printed
from specrag.schema import Draft, Passage, SpeculativeAnswer, Timings, Verdict
passage = Passage("Das Wetter, 天気, погода", title="Größe")
draft = Draft(0, (0,), (passage,), "42 — 😀 天気", "weil …")
answer = SpeculativeAnswer("wie groß? 天気", draft.text, draft.rationale, (passage,), False, (Verdict(draft, -1.0),),
                           ("draft",), "none", Timings(), notes=("eine Notiz: 😀",))
print_what_can_be_printed()
show_json(answer) if sys.argv[1] == "json" else show(answer, explain=True)
"""


def printed(arguments: list[str], encoding: str) -> bytes:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_an_answer_is_printed_whatever_the_terminals_encoding(encoding):
    shown = printed(["-c", SHOWN, "text"], encoding).decode(encoding)
    assert "42" in shown and "log" in shown and "total 0.00 s" in shown
    assert ("Größe" in shown) == (encoding != "ascii")
    assert ("天気" in shown) == (encoding == "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_loses_nothing_on_any_terminal(encoding):
    answer = json.loads(printed(["-c", SHOWN, "json"], encoding).decode(encoding))
    assert answer["text"] == "42 — 😀 天気"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_help_is_printed_on_any_terminal(encoding):
    assert b"questions" in printed(["-m", "specrag.cli", "--help"], encoding)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "error: No space left on device"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), "error: /root/x: Permission denied"),
        (OSError("something else"), "error: something else"),
        (TimeoutError(), "error: TimeoutError"),
    ],
)
def test_errors_of_the_operating_system_are_one_line(error, line):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        with failures_reported():
            raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1 and result.stderr.strip() == line
