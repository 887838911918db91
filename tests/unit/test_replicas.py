"""Replicas that differ: found before each checkpoint; their causes are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hvdqn.comm import Comm
from hvdqn.config import Config, parse
from hvdqn.errors import DriftError
from hvdqn.faults import check_replicas
from hvdqn.metrics import PhaseTimer
from hvdqn.startup import compare_cpus, make_trainer, start_run
from hvdqn.trainer import Trainer
from tests.ranks import ThreadComm, run_ranks

CPU = torch.device("cpu")
# The target network is copied at the end only, so that nothing else compares the replicas.
FLAGS = (
    "--preset smoke --vectorization sync --hidden 8 --target-every 100000 --eval-every 0 --checkpoint-every 0"
)


def trained(comm: ThreadComm, run_dir: Path, flags: str = "") -> Trainer:
    """Return a trainer of a run that has begun to learn."""
    config = parse([*FLAGS.split(), *flags.split(), "--run-dir", str(run_dir)])
    stop: Any = SimpleNamespace(requested=False)
    trainer = start_run(config, comm, run_dir, stop, PhaseTimer(), make_trainer)
    trainer.train(until_env_steps=600)
    return trainer


def flip_lowest_bit(tensor: torch.Tensor) -> None:
    tensor.numpy().view(np.uint8)[4 * 17] ^= 1


@pytest.mark.parametrize("part", ["online", "target", "optimizer.exp_avg"])
def test_a_rank_that_differs_in_one_bit_writes_no_checkpoint(part: str, tmp_path: Path) -> None:
    saved: list[list[str]] = []

    def body(comm: ThreadComm) -> str:
        trainer = trained(comm, tmp_path)
        recorder, learner = trainer.recorder, trainer.learner
        recorder.save()
        target = learner.target_parameters.clone()
        trainer.train(until_env_steps=1200)
        if comm.rank == 0:
            saved.append(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
        assert torch.equal(learner.target_parameters, target)  # the comparison changes nothing
        if comm.rank == 1:
            flip_lowest_bit(learner.state()[part])
        errors = []
        for write in (recorder.save, lambda: recorder.save_best(1e9)):
            with pytest.raises(DriftError) as raised:
                write()
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
        return errors[0]

    errors = run_ranks(3, body)
    assert len(set(errors)) == 1  # raised on all ranks
    assert errors[0].startswith("at env step 1200 the weights of rank 1 differ")
    assert saved == [sorted(path.name for path in (tmp_path / "checkpoints").iterdir())]


def test_a_rank_whose_buffers_differ_is_found_when_the_target_is_copied_and_before_a_checkpoint(
    tmp_path: Path,
) -> None:
    def body(comm: ThreadComm) -> tuple[Any, ...]:
        trainer = trained(comm, tmp_path, "--torso tests.unit.test_checkpoint:Scaled")
        before = trainer.strategy.update_target(), trainer.strategy.differing_ranks()
        if comm.rank == 2:
            trainer.learner.buffers["online.torso.0.scale"][3] += 1
        return *before, trainer.strategy.differing_ranks(), trainer.strategy.update_target()

    assert run_ranks(3, body) == [([], [], [2], [2])] * 3


def test_ranks_that_may_differ_are_not_compared(tmp_path: Path) -> None:
    def body(comm: ThreadComm) -> list[int]:
        return trained(comm, tmp_path, "--sync parameters").strategy.differing_ranks()

    assert run_ranks(2, body) == [[], []]


def test_the_drift_error_names_both_causes() -> None:
    with pytest.raises(DriftError, match=r"ATEN_CPU_CAPABILITY.* or its memory is faulty"):
        check_replicas([1], 100)


def warnings_of(
    capabilities: list[str], monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU, **settings: Any
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capabilities[0])

    class Others(Comm):
        def all_gather_object(self, obj: Any) -> list[Any]:
            return [obj, *capabilities[1:]]

    Others.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    size = len(capabilities)
    return compare_cpus(Config().replace(**settings), Others(0, size, 0, size), device)  # type: ignore[abstract]


def test_ranks_on_different_cpus_are_warned_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = warnings_of(["AVX512", "AVX2", "AVX512"], monkeypatch)
    assert "AVX512 on rank 0, 2, AVX2 on rank 1" in line
    assert "Set ATEN_CPU_CAPABILITY=avx2 on all ranks" in line
    for other in ("DEFAULT", "NO AVX", "SVE256"):
        (line,) = warnings_of(["AVX512", other], monkeypatch)
        assert "Set ATEN_CPU_CAPABILITY=default on all ranks" in line


def test_equal_cpus_and_ranks_that_may_differ_bring_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warnings_of(["AVX2", "AVX2"], monkeypatch) == []
    assert warnings_of(["AVX2", "AVX512"], monkeypatch, sync="parameters") == []
    assert warnings_of(["AVX2", "AVX512"], monkeypatch, torch.device("cuda")) == []
