"""Checkpoints whose digests are right and whose content is not, and states that no checkpoint can hold."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hvdqn import __main__, train
from hvdqn.checkpoint import (
    BrokenCheckpointError,
    Checkpoints,
    Progress,
    best_evaluation,
    check_learner,
    files,
    open_checkpoint,
    read_part,
    write_part,
)
from hvdqn.checkpoint.manifest import manifest_text
from hvdqn.comm.local import LocalComm
from hvdqn.config import PRESETS, parse
from hvdqn.config.validation import check_saved
from hvdqn.metrics import PhaseTimer
from hvdqn.recorder import Recorder
from tests.unit import scripted_envs

NEWEST, OLDER = "000000000400", "000000000200"


def flags(path: Path, *more: str) -> list[str]:
    words = "--preset smoke --total-env-steps 400 --checkpoint-every 200 --eval-episodes 2 --eval-every 200"
    return [*words.split(), "--run-dir", str(path), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished")
    assert train.main(flags(path)) == 0
    return path


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run of 400 env steps."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def resume(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = train.main(flags(path, "--total-env-steps", "480", *more))
    written = capsys.readouterr()
    return code, written.out + written.err


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (checkpoint / "manifest.json").write_text(manifest_text(manifest))


def change_part(checkpoint: Path, part: str, change: Callable[[Any], object]) -> None:
    """Change a part and enter its new digest in the manifest."""
    file = f"{part}.safetensors"
    content = read_part(checkpoint / file)
    change(content)
    entry = write_part(checkpoint / "new", content)
    (checkpoint / "new").rename(checkpoint / file)
    change_manifest(checkpoint, lambda manifest: manifest["files"].update({file: entry}))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda m: m.pop("files"),
    "files is a list": lambda m: m.update(files=["learner.safetensors"]),
    "an entry is text": lambda m: m["files"].update({"learner.safetensors": "x"}),
    "an entry without digest": lambda m: m["files"]["learner.safetensors"].pop("sha256"),
    "outside": lambda m: m["files"].update({"../../secret": m["files"]["learner.safetensors"]}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"]["learner.safetensors"]}),
    "too few ranks": lambda m: m["files"].pop("rank-00000.safetensors"),
    "too many ranks": lambda m: m.update(world_size=10**9),
    "no rank": lambda m: m.update(world_size=0),
    "env steps are text": lambda m: m.update(env_steps="many"),
    "env steps are missing": lambda m: m.pop("env_steps"),
    "no config": lambda m: m.pop("config"),
    "config is a list": lambda m: m.update(config=[]),
    "hidden is text": lambda m: m["config"].update(hidden="abc"),
    "hidden is nothing": lambda m: m["config"].update(hidden=None),
    "gamma is a list": lambda m: m["config"].update(gamma=[1]),
    "lr is out of range": lambda m: m["config"].update(lr=-1.0),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_with_a_valid_digest_and_a_wrong_shape_is_set_aside(
    change: Callable[[dict[str, Any]], object], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(run_dir / "checkpoints" / NEWEST, change)
    code, output = resume(run_dir, capsys)
    assert code == 0, output
    assert output.count(f"checkpoint {NEWEST} is set aside as {NEWEST}.broken") == 1
    assert f"{OLDER} at env step 200" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["hidden is text", "no files", "outside", "lr is out of range"])
def test_eval_refuses_such_a_manifest_in_one_line(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(run_dir / "checkpoints" / NEWEST, MANIFESTS[name])
    capsys.readouterr()
    assert __main__.main(["eval", str(run_dir), "--episodes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hvdqn eval: error: ")
    assert error.count("\n") == 1
    assert "is not a checkpoint's" in error


def test_the_settings_that_runs_save_pass_the_check() -> None:
    for preset in PRESETS:
        check_saved(json.loads(json.dumps(parse(["--preset", preset]).flat())))


def first_weight(part: Any) -> Any:
    return part["learner"]["target"]


LEARNERS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "target": ("learner", lambda part: first_weight(part).update({"torso.0.bias": np.zeros(1, np.float32)})),
    "moment": (
        "learner",
        lambda part: part["learner"].update({"optimizer.exp_avg": np.zeros(1, np.float32)}),
    ),
    "integers": ("learner", lambda part: first_weight(part).update({"torso.0.bias": np.zeros(1, np.int64)})),
    "no network": ("learner", lambda part: part["learner"].pop("target")),
    "text": ("learner", lambda part: part["learner"].update(target="weights")),
    "no learner": ("learner", lambda part: part.pop("learner")),
    "no clock": ("learner", lambda part: part.pop("clock")),
    "clock of text": ("learner", lambda part: part["clock"].update(env_steps="400")),
    "progress is a list": ("learner", lambda part: part.update(progress=[])),
    "policy of integers": ("policy", lambda part: part.update({"torso.0.bias": np.zeros(1, np.int64)})),
    "nothing about the policy": ("policy", lambda part: part.pop("policy")),
    "no spaces": ("policy", lambda part: part["policy"].pop("spaces")),
    "an unknown space": (
        "policy",
        lambda part: part["policy"]["spaces"].update(observation_space={"kind": "X"}),
    ),
    "settings of the policy": ("policy", lambda part: part["policy"]["config"].update(lr=-1.0)),
}


@pytest.mark.parametrize(("part", "change"), LEARNERS.values(), ids=LEARNERS)
def test_a_part_with_a_valid_digest_and_wrong_shapes_is_set_aside(
    part: str, change: Callable[[Any], object], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_part(run_dir / "checkpoints" / NEWEST, part, change)
    code, output = resume(run_dir, capsys)
    assert code == 0, output
    assert output.count(f"checkpoint {NEWEST} is set aside") == 1
    assert "Traceback" not in output


OTHERS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no moments": ("learner", lambda part: part["learner"].pop("optimizer.exp_avg")),
    "another name": ("policy", lambda part: part.update({"torso.9.bias": part.pop("torso.0.bias")})),
    "no updates": ("learner", lambda part: part["clock"].pop("updates")),
    "other progress": ("learner", lambda part: part["progress"].update(color="red")),
    "no replay field": ("rank-00000", lambda part: part["replay"].pop("0/action")),
    "short replay": ("rank-00000", lambda part: part["replay"].update({"0/reward": np.zeros(1, np.float32)})),
    "generator": ("rank-00000", lambda part: part["torch"].update(cpu=np.zeros(3, np.uint8))),
}


@pytest.mark.parametrize(("part", "change"), OTHERS.values(), ids=OTHERS)
def test_a_part_that_does_not_fit_the_run_is_refused_in_one_line(
    part: str, change: Callable[[Any], object], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_part(run_dir / "checkpoints" / NEWEST, part, change)
    code, output = resume(run_dir, capsys)
    assert code == 2, output
    assert "does not fit this run" in output
    assert "rename it to resume from the one before it" in output
    assert "Traceback" not in output


def test_a_best_of_the_wrong_shape_does_not_end_the_run(run_dir: Path) -> None:
    best = (run_dir / "checkpoints" / "best").resolve()
    change_part(best, "policy", lambda part: part["policy"].pop("eval_return_mean"))
    assert best_evaluation(run_dir) == -math.inf
    change_part(best, "policy", lambda part: part["policy"].update(eval_return_mean=[1, 2]))
    assert best_evaluation(run_dir) == -math.inf


def unreadable(checkpoint: Path) -> None:
    """Make the part of the rank such as earlier versions wrote: more than the library reads, with a right digest."""
    part = checkpoint / "rank-00000.safetensors"
    part.write_bytes((200_000_000).to_bytes(8, "little") + b"{}")
    found = files.file_digest(part)
    entry = {"sha256": found[0], "bytes": found[1]}
    change_manifest(checkpoint, lambda manifest: manifest["files"].update({part.name: entry}))


def test_a_run_resumes_from_the_newest_checkpoint_that_can_be_read(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable(run_dir / "checkpoints" / NEWEST)
    code, output = resume(run_dir, capsys)
    assert code == 0, output
    assert output.count(f"checkpoint {NEWEST} is set aside") == 1
    assert f"{OLDER} at env step 200" in output


def test_a_run_goes_on_without_the_state_of_the_environments_if_no_checkpoint_can_be_read(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (NEWEST, OLDER):
        unreadable(run_dir / "checkpoints" / name)
    code, output = resume(run_dir, capsys)
    assert code == 0, output
    assert f"{NEWEST} at env step 400" in output
    assert output.count("cannot be read") == 2  # that of 400, and that of 200 is set aside
    assert "Replay fills for" in output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["env_steps"] >= 480


def store(path: Path) -> Checkpoints:
    return Checkpoints(path, LocalComm(), 3, PhaseTimer())


def nested(levels: int) -> Any:
    content: Any = 1
    for _ in range(levels):
        content = [content]
    return content


def test_a_part_that_could_never_be_read_is_not_written_as_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 1000)
    assert "of lists and text" in store(tmp_path).save(10, {"rank-00000": {"a": ["x" * 2000]}}, {})
    assert "nested too deeply" in store(tmp_path).save(10, {"rank-00000": nested(5000)}, {})
    assert "__array__" in store(tmp_path).save(10, {"rank-00000": {"__array__": "0"}}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_a_part_is_that_of_the_library(tmp_path: Path) -> None:
    for length, fits in ((99_000_000, True), (100_000_100, False)):
        try:
            write_part(tmp_path / "x", {"a": "x" * length})
        except ValueError:
            assert not fits
        else:
            assert fits
            assert len(read_part(tmp_path / "x")["a"]) == length


def test_the_first_checkpoint_of_a_run_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = store(tmp_path)
    with monkeypatch.context() as patch:

        def fail(path: Path) -> None:
            raise BrokenCheckpointError(f"{path} cannot be read: too odd")

        patch.setattr("hvdqn.checkpoint.directory.read_part", fail)
        assert "cannot be read: too odd" in checkpoints.save(10, {"learner": {"a": 1}}, {})
    assert checkpoints.save(20, {"learner": {"a": 1}}, {}) == ""
    with monkeypatch.context() as patch:
        patch.setattr("hvdqn.checkpoint.directory.read_part", fail)
        assert checkpoints.save(30, {"learner": {"a": 1}}, {}) == ""
        assert "too odd" in checkpoints.save(30, {"learner": {"a": 1}}, {}, best=True)
    assert open_checkpoint(tmp_path / "latest").env_steps == 30


def test_arrays_that_environments_share_are_stored_once(tmp_path: Path) -> None:
    prices = np.random.default_rng(0).random(100_000)
    entry = write_part(
        tmp_path / "x", {"envs": [{"prices": prices}, {"prices": prices}, {"other": prices + 1}]}
    )
    assert 2 * prices.nbytes < entry["bytes"] < 2.1 * prices.nbytes
    back = read_part(tmp_path / "x")["envs"]
    assert (back[0]["prices"] == prices).all()
    assert back[0]["prices"] is back[1]["prices"]
    assert (back[2]["other"] == prices + 1).all()


def test_the_state_of_environments_counts_in_the_free_space_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(["--preset", "smoke", "--checkpoint-keep", "3"])
    acting = SimpleNamespace(
        replay=SimpleNamespace(nbytes=1000), envs=SimpleNamespace(saved_bytes=lambda: 9000)
    )
    for free, keeps in ((2 * 4 * 10_000 + 1, True), (2 * 4 * 10_000 - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        recorder = SimpleNamespace(
            config=config,
            comm=LocalComm(),
            run_dir=tmp_path,
            parts=SimpleNamespace(acting=acting),
            progress=Progress(),
        )
        Recorder.decide_on_replay(recorder)  # type: ignore[arg-type]
        assert recorder.progress.keeps_replay is keeps


def test_a_trading_environment_resumes_exactly_from_small_checkpoints(tmp_path: Path) -> None:
    """Its price history is the same in every environment, once as an array and once as a list."""
    trader = ("--env", "tests.unit.scripted_envs:Trader-v0", "--envs-per-rank", "8")
    assert train.main(flags(tmp_path / "whole", *trader)) == 0
    assert train.main(flags(tmp_path / "parts", *trader, "--total-env-steps", "320")) == 0
    assert train.main(flags(tmp_path / "parts", *trader)) == 0
    whole, parts = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts"))
    assert whole["param_sha256"] == parts["param_sha256"]
    part = tmp_path / "whole" / "checkpoints" / NEWEST / "rank-00000.safetensors"
    replay = read_part(part)["replay"]
    prices = part.stat().st_size - sum(array.nbytes for array in replay.values())
    assert prices < 4 * scripted_envs.Trader.BARS * 8


def make_format_2(checkpoint: Path) -> None:
    """Rewrite a checkpoint as version 0.1 wrote it: flat tensors, without names, all in one part."""
    policy = read_part(checkpoint / "policy.safetensors")
    about = policy.pop("policy")
    online = np.concatenate([array.ravel() for array in policy.values()])

    def flatten(part: Any) -> None:
        for name, value in part.setdefault("learner", {}).items():
            if isinstance(value, dict):
                part["learner"][name] = np.concatenate([value[key].ravel() for key in policy])
        part["learner"]["online"] = online
        if "eval_return_mean" in about:  # `best` held everything in the learner's part
            part["learner"]["target"] = online
            part["eval_return_mean"] = about["eval_return_mean"]

    if not (checkpoint / "learner.safetensors").exists():
        write_part(checkpoint / "learner.safetensors", {})
    change_part(checkpoint, "learner", flatten)
    (checkpoint / "policy.safetensors").unlink()
    change_manifest(checkpoint, lambda manifest: manifest["files"].pop("policy.safetensors"))
    change_manifest(checkpoint, lambda manifest: manifest.update(format=2))


def test_a_run_of_version_0_1_is_resumed_and_played(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    best = best_evaluation(run_dir)
    assert math.isfinite(best)
    for checkpoint in sorted((run_dir / "checkpoints").iterdir()):
        if not checkpoint.is_symlink():
            make_format_2(checkpoint)
    assert best_evaluation(run_dir) == best
    shas = set()
    for path in (run_dir, copy):
        assert __main__.main(["eval", str(path), "--episodes", "1"]) == 0
        code, output = resume(path, capsys)
        assert code == 0, output
        assert "at env step 400" in output
        shas.add(json.loads((path / "summary.json").read_text())["param_sha256"])
        assert open_checkpoint(path / "checkpoints" / "latest").has_names
    assert len(shas) == 1


def test_the_state_of_averaged_parameters_is_accepted() -> None:
    online = np.zeros(5, dtype=np.float32)
    learner = {"online": online, "target": online, "optimizer.step": np.array(3, dtype=np.float32)}
    check_learner({"learner": {**learner, "sync.largest_weight": np.ones(1)}}, "run")
    with pytest.raises(BrokenCheckpointError, match="target has shape"):
        check_learner({"learner": {**learner, "target": np.ones(1)}}, "run")
    with pytest.raises(BrokenCheckpointError, match="holds no parameters"):
        check_learner({"learner": {**learner, "online": online[None]}}, "run")
    named = {"target": {"a": online}, "optimizer.exp_avg": {"a": online}, "optimizer.step": np.ones(())}
    check_learner({"learner": {**named, "sync.largest_weight": np.ones(1)}}, "run")
    with pytest.raises(BrokenCheckpointError, match="exp_avg has shape"):
        check_learner({"learner": {**named, "optimizer.exp_avg": {"b": online}}}, "run")
