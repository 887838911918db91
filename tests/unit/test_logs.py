"""What each rank shows of its log messages, and on which stream."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hvdqn.errors import UserError
from hvdqn.logs import setup_logging
from hvdqn.metrics import Metrics, PhaseTimer
from tests.launchers import clean_environment

log = logging.getLogger("hvdqn.test")


def log_all_levels() -> None:
    log.debug("details")
    log.info("progress")
    log.warning("attention")
    log.error("failure")


@pytest.mark.parametrize(
    ("level", "rank", "out", "err"),
    [
        ("", 0, "progress\nwarning: attention\n", "hvdqn: error: failure\n"),
        ("", 3, "", "hvdqn: error: rank 3: failure\n"),
        ("info", 3, "", "hvdqn: error: rank 3: failure\n"),
        ("WARNING", 0, "warning: attention\n", "hvdqn: error: failure\n"),
        ("ERROR", 0, "", "hvdqn: error: failure\n"),
        (
            "DEBUG",
            3,
            "[rank 3 hvdqn.test] details\n[rank 3 hvdqn.test] progress\n[rank 3 hvdqn.test] warning: attention\n",
            "hvdqn: error: rank 3: failure\n",
        ),
    ],
)
def test_what_a_rank_shows(
    level: str,
    rank: int,
    out: str,
    err: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HVDQN_LOG_LEVEL", level)
    setup_logging(rank, 4)
    log_all_levels()
    assert capsys.readouterr() == (out, err)


def test_an_error_names_its_rank_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(1, 2)
    log.error("rank 1 of 2 failed: no such file")
    log.error("rank 12 is not this rank")
    assert capsys.readouterr().err.splitlines() == [
        "hvdqn: error: rank 1 of 2 failed: no such file",
        "hvdqn: error: rank 1: rank 12 is not this rank",
    ]


def test_a_second_setup_prints_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(1, 2)
    setup_logging(0, 2)
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_the_logger_of_a_module_that_is_run_is_set_up_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m hvdqn.train` runs that module as `__main__`."""
    logging.getLogger("__main__").info("hello")
    assert capsys.readouterr().out == "hello\n"


def test_a_wrong_level_is_refused_and_errors_are_still_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HVDQN_LOG_LEVEL", "loud")
    with pytest.raises(UserError, match="HVDQN_LOG_LEVEL is 'loud'; set it to one of DEBUG, INFO, WARNING"):
        setup_logging(0, 1)
    log.error("failure")
    assert capsys.readouterr().err == "hvdqn: error: failure\n"


def test_a_wrong_level_ends_a_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDQN_LOG_LEVEL", "loud")
    done = subprocess.run(
        [sys.executable, "-m", "hvdqn.train", "--preset", "smoke", "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "hvdqn: error: HVDQN_LOG_LEVEL is 'loud'; set it to one of DEBUG, INFO, WARNING, ERROR\n"
    )
    assert not (tmp_path / "run").exists()


def test_messages_go_through_an_open_progress_display(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    with Metrics(tmp_path, 300, PhaseTimer(), stream=stream, line_every_seconds=3600) as metrics:
        metrics.log(100, 1, {})
        metrics.log(200, 1, {})  # held back until there is something else to print
        log_all_levels()
    shown = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
    assert shown == [
        "env steps 100/300 (33%)",
        "env steps 200/300 (66%)",
        "progress",
        "warning: attention",
    ]
    log.info("afterwards")
    assert capsys.readouterr() == ("afterwards\n", "hvdqn: error: failure\n")


def test_what_a_stream_cannot_encode_is_escaped(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with Metrics(tmp_path, 10, PhaseTimer(), stream=io.TextIOWrapper(raw, encoding="ascii")):
        log.info("run [bold]é[/bold] :smile:")
        assert raw.getvalue() == rb"run [bold]\xe9[/bold] :smile:" + b"\n"


def test_a_console_that_is_gone_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        patched.setattr(sys, "stderr", Gone())
        log_all_levels()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (["--total-env-steps", "400", "--eval-episodes", "1"], 0, ""),
        (["--learnin-starts", "3"], 2, "hvdqn: error: unknown argument '--learnin-starts'"),
        (["--wrapper", "tests.unit.scripted_envs:broken"], 1, "ValueError: a bug in the wrapper"),
    ],
    ids=["no error", "wrong input", "a bug"],
)
def test_closed_streams_do_not_end_a_run_or_hide_its_error(
    flags: list[str], code: int, error: str, tmp_path: Path
) -> None:
    """`>&-` closes standard output, `<&-` standard input: files of the run must not get their descriptors."""
    command = [sys.executable, "-m", "hvdqn.train", "--preset", "smoke", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", '"$@" >&- <&-', "bash", *command, *flags],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert error in done.stderr
    assert "NoneType" not in done.stderr
    if code == 0:
        assert done.stderr == ""
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["env_steps"] for line in lines]
