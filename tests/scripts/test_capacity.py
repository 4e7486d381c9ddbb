"""The capacity simulator, where the answer is known: by hand, and by queueing theory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from capacity import Machine, Scaling, best, grid, read_trace, simulate

from gateway.settings import Deployment
from tests.conftest import ROOT

MACHINE = Machine(cold=20.0, service=1.0, beside=0.0, price=0.001)


def test_one_request_pays_for_a_cold_start_and_the_window() -> None:
    outcome = simulate([0.0], Scaling(window=60, concurrency=1), MACHINE)
    assert outcome.worst == 21.0
    assert outcome.cost == pytest.approx((20 + 1 + 60) * 0.001)
    assert outcome.containers == 1


def test_a_warm_container_answers_at_once_and_is_always_paid() -> None:
    outcome = simulate([100.0, 5000.0], Scaling(min=1, concurrency=1), MACHINE)
    assert outcome.worst == 1.0
    assert outcome.cost == pytest.approx(0.001 * 5060, rel=0.01)


def test_a_burst_on_one_gpu_is_served_one_after_the_other() -> None:
    for concurrency in (1, 4):
        outcome = simulate([0.0] * 10, Scaling(max=1, concurrency=concurrency), MACHINE)
        assert outcome.worst == 20 + 10
    wide = simulate([0.0] * 10, Scaling(max=10, concurrency=1), MACHINE)
    assert wide.worst == 21.0 and wide.containers == 10


def test_buffers_are_there_only_while_something_runs() -> None:
    busy = simulate([0.0, 100.0], Scaling(buffer=2, window=10, concurrency=1), MACHINE)
    assert busy.containers == 3
    assert busy.cost == pytest.approx(2 * (21 + 10 + 2 * 30) * 0.001, rel=0.05)


def test_waiting_is_that_of_an_m_d_1_queue() -> None:
    """Mean wait of Poisson arrivals at one server of constant time (Pollaczek-Khinchine)."""
    draw, load = random.Random(1), 0.7
    arrivals, now = [], 0.0
    for _ in range(40_000):
        now += draw.expovariate(load)
        arrivals.append(now)
    waits: list[float] = []
    free = 0.0
    for arrival in arrivals:  # the same, by Lindley's recursion
        free = max(free, arrival) + 1.0
        waits.append(free - arrival)
    outcome = simulate(arrivals, Scaling(min=1, max=1, concurrency=1), MACHINE)
    assert sum(waits) / len(waits) - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    assert outcome.p50 == pytest.approx(sorted(waits)[len(waits) // 2 - 1], abs=1e-6)
    assert outcome.busy == pytest.approx(load, rel=0.02)


def test_the_cheapest_that_meets_the_target_is_chosen() -> None:
    arrivals = [0.0, 300.0, 600.0]
    tried = [(each, simulate(arrivals, each, MACHINE)) for each in grid(2)]
    patient, hurried = best(tried, 60), best(tried, 2)
    assert patient is not None and patient[0].min == 0
    assert hurried is not None and hurried[1].p95 <= 2 and hurried[1].cost > patient[1].cost
    assert best(tried, 0.5) is None


def test_its_defaults_are_those_of_a_deployment() -> None:
    assert Scaling().environment() == {
        f"ZIMAGE_{name.upper()}": str(getattr(Deployment(), name))
        for name in (
            "min_containers",
            "buffer_containers",
            "max_containers",
            "scaledown_window",
            "concurrency",
        )
    }


def test_the_program(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("1000\n1000.5\n\n1300\n")
    assert read_trace(trace) == [0.0, 0.5, 300.0]
    command = [sys.executable, ROOT / "scripts" / "capacity.py", "--trace", trace, "--p95", "30"]
    outputs = ["--plot", tmp_path / "plot.png", "--json", tmp_path / "all.json"]
    done = subprocess.run([*command, *outputs], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "export ZIMAGE_MIN_CONTAINERS=0" in done.stdout and "default" in done.stdout
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((tmp_path / "all.json").read_text())["tried"]) == len(grid(10))
    trace.write_text("soon")
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2 and "line 1: 'soon' is no number" in wrong.stderr


def test_help_has_the_defaults_and_what_they_are_in() -> None:
    command = [sys.executable, ROOT / "scripts" / "capacity.py", "--help"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())
    assert f"seconds from a container's start until it is ready ({Machine().cold})" in text
    assert "Not simulated:" in text and "Exit code 1" in text
