"""An environment that calls sys.exit() is reported like any other exception, wherever it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdqn import evaluate, train
from hvdqn.envs.contract import warn_once
from tests.unit.unruly_envs import Leaving

SMALL = ["--preset", "smoke", "--total-env-steps", "400", "--eval-episodes", "2", "--envs-per-rank", "2"]
ENV = ["--env", "tests.unit.unruly_envs:Leaving-v0"]


@pytest.mark.parametrize(
    ("where", "instance"),
    [
        pytest.param("init", 1, id="constructor"),
        pytest.param("reset", 1, id="reset"),
        pytest.param("step", 1, id="step"),
        pytest.param("step", 3, id="evaluation"),
    ],
)
def test_sys_exit_in_an_environment_ends_the_run_with_one_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    instance: int,
) -> None:
    monkeypatch.setattr(Leaving, "made", 0)
    kwargs = f'{{"where": "{where}", "instance": {instance}}}'
    flags = ["--env-kwargs", kwargs, "--eval-every", "200", "--run-dir", str(tmp_path)]
    assert train.main([*SMALL, *ENV, *flags]) == 1
    errors = capfd.readouterr().err
    assert errors.count("rank 0 of 1 failed: Traceback") == errors.count("Traceback") == 1
    assert "RuntimeError: the environment raised sys.exit(0)" in errors


def test_sys_exit_in_close_after_an_evaluation_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run reaches its end, and finishes as it would have."""
    warn_once.cache_clear()
    monkeypatch.setattr(Leaving, "made", 0)
    flags = ["--env-kwargs", '{"where": "close", "instance": 3}', "--run-dir", str(tmp_path)]
    assert train.main([*SMALL, *ENV, *flags, "--eval-every", "200"]) == 0
    output = capfd.readouterr()
    assert output.out.count("could not be closed: RuntimeError: the environment raised sys.exit(0)") == 1
    assert not output.err


def test_sys_exit_while_a_trained_network_plays_fails_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaving, "made", 0)
    argv = [*SMALL, *ENV, "--env-kwargs", '{"instance": 1000}', "--run-dir", str(tmp_path)]
    assert train.main(argv) == 0
    monkeypatch.setattr(Leaving, "made", 1000)
    with pytest.raises(RuntimeError, match=r"raised sys\.exit\(0\)"):
        evaluate.main([str(tmp_path), "--episodes", "1", "--trust"])


def test_a_module_that_leaves_when_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leaves_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train.main([*SMALL, "--env", "leaves_at_import:Env-v0", "--run-dir", str(tmp_path / "run")]) == 2
    assert "'leaves_at_import' calls sys.exit(0) when it is imported" in capfd.readouterr().err
