"""The measured and the projected scaling of `hvdqn bench scaling`, with numbers computed by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hvdqn import bench
from hvdqn.bench import loop, scaling
from hvdqn.bench.allreduce import AllreduceTiming
from hvdqn.bench.projection import Levels, Line, Work, allreduce_seconds, efficiency, fit, project
from hvdqn.errors import UserError
from tests.unit.bench_timings import US, make_timing

# Projection


@pytest.mark.parametrize(
    ("model", "ranks", "expected"),
    [
        # 10 us + 4000 bytes x 1 ns = 14 us on 2 ranks. Ring: alpha 5 us, beta 1 ns; tree: alpha 10 us, beta 1 ns.
        ("ring", 2, 14.0),
        ("tree", 2, 14.0),
        ("ring", 8, 2 * 7 * 5.0 + 2 * 7 / 8 * 4.0),
        ("ring", 512, 2 * 511 * 5.0 + 2 * 511 / 512 * 4.0),
        ("tree", 8, 3 * (10.0 + 4.0)),
        ("tree", 9, 4 * (10.0 + 4.0)),
        ("tree", 512, 9 * (10.0 + 4.0)),
    ],
)
def test_allreduce_seconds_match_the_formulas(model, ranks, expected):
    line = Line(latency=10 * US, seconds_per_byte=1e-9)
    assert allreduce_seconds(model, line, 2, ranks, 4_000) == pytest.approx(expected * US)


def test_a_model_reproduces_the_line_at_the_measured_ranks():
    line = Line(latency=30 * US, seconds_per_byte=2e-9)
    for model in ("ring", "tree"):
        assert allreduce_seconds(model, line, 4, 4, 10_000) == pytest.approx(50 * US)


def test_fit_finds_a_line_over_six_orders_of_magnitude():
    line = fit({size: 20 * US + 3e-10 * size for size in (4, 400, 40_000, 16_000_000)})
    assert line.latency == pytest.approx(20 * US)
    assert line.seconds_per_byte == pytest.approx(3e-10)


def test_fit_is_never_negative():
    assert fit({4: 30 * US, 4_000: 20 * US}).seconds_per_byte == 0.0


def test_efficiency_matches_the_formula():
    work = Work(seconds=100 * US, updates=2.0, hidden_seconds=5 * US)
    assert efficiency(work, 4 * US) == 1.0
    assert efficiency(work, 30 * US) == pytest.approx(100 / (100 + 2 * 25))
    work = Work(seconds=100 * US, updates=2.0, hidden_seconds=5 * US, window_seconds=20 * US)
    assert efficiency(work, 30 * US, 19 * US) == pytest.approx(100 / (100 + 2 * 25))
    assert efficiency(work, 30 * US, 50 * US) == pytest.approx(100 / (100 + 2 * (25 + 30)))


def test_a_sum_takes_its_time_within_a_host_and_between_hosts():
    """4 ranks on a host: 3 us + 4000 bytes x 0.5 ns = 5 us. Between 2 hosts: 14 us, as above."""
    levels = Levels(Line(3 * US, 5e-10), 4, Line(10 * US, 1e-9), 2)
    for ranks, hosts in ((5, 2), (8, 2), (9, 3), (64, 16)):
        for model in ("ring", "tree"):
            expected = allreduce_seconds(model, levels.between, 2, hosts, 4_000)
            assert levels.seconds(model, ranks, 4_000) == pytest.approx((5 * US, expected))
    assert levels.seconds("ring", 8, 4_000) == pytest.approx((5 * US, 14 * US))
    assert levels.seconds("ring", 4, 4_000) == pytest.approx((5 * US, 0.0))


def test_a_projection_has_both_models_at_each_number_of_ranks():
    levels = Levels(Line(2 * US, 0.0), 2, Line(10 * US, 0.0), 2)
    found = project(levels, 4_000, Work(90 * US, 1.0, 0.0), (2, 8))
    assert [(one.model, one.ranks) for one in found] == [("ring", 2), ("ring", 8), ("tree", 2), ("tree", 8)]
    assert found[0].efficiency == pytest.approx(90 / (90 + 2))
    assert found[1].efficiency == pytest.approx(90 / (90 + 2 + 2 * 3 * 5))  # 4 hosts
    assert found[3].efficiency == pytest.approx(90 / (90 + 2 + 2 * 10))


# Scaling


def test_efficiency_in_the_table_is_the_rate_per_rank():
    loops = [make_timing(), make_timing(4, rate=3000.0, exposed=10 * US)]
    assert scaling.table_rows(loops) == [
        ("1", "1,000", "125.0", "100%", "0.0%"),
        ("4", "3,000", "93.8", "75%", "10.0%"),
    ]


def test_strong_scaling_leaves_out_numbers_that_do_not_divide_the_work():
    flags = ["--preset", "smoke", "--envs-per-rank", "8", "--batch-per-rank", "32"]
    assert scaling.strong_scaling_flags(flags, [1, 2, 3, 8]) == {
        1: ["--envs-per-rank", "8", "--batch-per-rank", "32"],
        2: ["--envs-per-rank", "4", "--batch-per-rank", "16"],
        8: ["--envs-per-rank", "1", "--batch-per-rank", "4"],
    }


def test_a_projection_of_measured_timings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weak = [make_timing(), make_timing(2, rate=1800.0, exposed=10 * US, hidden=5 * US)]
    messages = AllreduceTiming("mpi", 2, 1_000, {1: 10 * US + 4e-9, 1_000: 14 * US, 1_000_000: 4_010 * US})
    links = AllreduceTiming("mpi", 2, 1_000, {1: 100 * US + 4e-8, 1_000: 140 * US, 1_000_000: 40_100 * US})
    found = scaling.add_projection("mpi", weak, weak, messages, links, [8])
    eight = {one.model: one for one in found.projected if one.ranks == 8}
    assert eight["tree"].allreduce_seconds == pytest.approx(14 * US + 2 * 140 * US)
    assert eight["tree"].efficiency == pytest.approx(90 / (90 + 14 - 5 + 280))
    scaling.print_projection(found)
    printed = capsys.readouterr().out
    assert "294, 24%" in printed
    late = [make_timing(), make_timing(2, rate=200.0, exposed=900 * US, hidden=800 * US)]
    others = scaling.add_projection("mpi", late, late, messages, links, [8]).projected
    eight = {one.model: one for one in others if one.ranks == 8}
    assert eight["tree"].efficiency == pytest.approx(90 / (90 + 280))
    assert "Assumed" in printed
    scaling.draw(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_rank_has_as_many_threads_in_every_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    assert scaling.with_threads_of_largest_job(["--preset", "smoke"], 4)[-2:] == ["--threads-per-rank", "2"]
    assert scaling.with_threads_of_largest_job([], 16)[-2:] == ["--threads-per-rank", "1"]
    assert scaling.with_threads_of_largest_job(["--threads-per-rank=3"], 4) == ["--threads-per-rank=3"]


def test_a_measurement_without_an_update_is_refused(monkeypatch: pytest.MonkeyPatch):
    idle = loop.as_json(dataclasses.replace(make_timing(), updates=0))
    monkeypatch.setattr(scaling, "run_bench_job", lambda *_: idle)
    with pytest.raises(UserError, match="raise --seconds"):
        scaling.time_job("mpi", 1, 0.1, [])


@pytest.mark.parametrize("text", ["", "2", "1,x", "0,2", "2,2"])
def test_wrong_numbers_of_ranks_are_refused(text):
    with pytest.raises(UserError, match="--np"):
        scaling.parse_rank_counts(text)


def test_a_single_rank_is_always_measured():
    assert scaling.parse_rank_counts("4,2") == [1, 2, 4]


def test_read_prints_the_timings_in_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for ranks in (4, 1):
        content = loop.as_json(make_timing(ranks, rate=1000.0 * ranks))
        (tmp_path / f"{ranks}.json").write_text(json.dumps(content))
    assert bench.main(["scaling", "--read", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("1,000") < printed.index("4,000")
    assert bench.main(["scaling", "--read", str(tmp_path), "--nonsense"]) == 2
    for wrong in ("{}", "[1]"):
        (tmp_path / "other.json").write_text(wrong)
        assert bench.main(["scaling", "--read", str(tmp_path)]) == 2
    assert "--nonsense has no effect" in capsys.readouterr().err.splitlines()[0]
