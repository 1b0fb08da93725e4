from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import pytest

from pipeline.run.ledger import ShardRun
from pipeline.run.progress import ProgressDisplay, PromptTally, RecentRate
from pipeline.run.schedule import ShardQueue
from pipeline.run.worker import Progress, ShardDone
from pipeline.shards.committed import ShardSummary
from pipeline.storage import Storage
from tests.fake_shards import make_plan, publish_one


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run(tmp_path: Path) -> ShardRun:
    """22 images in shards of 9, 9 and 4; shard 0 is committed, the others wait."""
    storage, plan = Storage.open(tmp_path / "out"), make_plan()
    first = publish_one(storage, plan, 0, tmp_path / "scratch")
    return ShardRun(storage, plan, ShardQueue([1, 2], max_attempts=2), [ShardSummary.of(first)])


def line(run: ShardRun, images_per_s: float = 0.0) -> str:
    return run.tally.text(images_per_s)


def sampled(run: ShardRun, shard_id: int, *batches: int) -> None:
    for num_images in batches:
        run.heard(Progress(shard_id, num_images))


def test_the_numbers_are_those_of_what_was_heard(run: ShardRun):
    assert line(run) == "fake: 9/22 images (40%), 1/3 shards"
    run.crew(0, 2)
    assert line(run) == "fake: 9/22 images (40%), 1/3 shards, 2 starting"
    run.crew(1, 1)
    run.queue.take()
    sampled(run, 1, 4, 4)
    assert line(run, 2.0) == (
        "fake: 17/22 images (77%), 1/3 shards, 2 images/s, 2.5 s left, 1 worker, 1 starting"
    )
    seconds = {"sampling": 3.0, "decoding": 2.0, "encoding": 1.0, "publishing": 0.5}
    sampled(run, 1, 1)
    run.heard(ShardDone(1, 700, seconds))
    run.queue.take()
    sampled(run, 2, 4)
    run.heard(ShardDone(2, 300, {**seconds, "publishing": 0.25}))
    run.crew(2, 0)
    assert line(run, 2.0) == "fake: 22/22 images (100%), 3/3 shards, 2 images/s, 2 workers"
    tally = run.tally
    assert (tally.images, tally.shards, tally.num_bytes, tally.sampled) == (13, 2, 1000, 13)
    assert tally.seconds == {"sampling": 6, "decoding": 4, "encoding": 2, "publishing": 0.75}


def test_images_of_a_lost_shard_are_taken_back_and_retries_and_what_is_given_up_are_counted(
    run: ShardRun,
):
    assignment = run.queue.take()
    sampled(run, 1, 4, 4)
    run.lost(assignment, "its node is gone")
    assert line(run) == "fake: 9/22 images (40%), 1/3 shards"
    assignment = run.queue.take()
    sampled(run, 1, 4)
    assert line(run) == "fake: 13/22 images (59%), 1/3 shards, 1 retry"
    run.failed(assignment, "it broke", "trace", "host:1")
    assert line(run, 1.0).startswith("fake: 9/22 images (40%), 1/3 shards, 1 images/s, 13.0 s left")
    run.queue.take()
    sampled(run, 2, 4)
    run.failed(run.queue.take(), "it broke", "trace", "host:1")
    assert line(run, 1.0) == (
        "fake: 13/22 images (59%), 1/3 shards, 1 images/s, 5.0 s left, 2 retries, 1 set aside"
    )
    assert run.tally.sampled == 16, "what was sampled twice counts twice"


def test_the_rate_is_of_the_last_two_minutes():
    rate = RecentRate()
    rate.add(0.0, 0)
    assert rate.per_second(5.0) == 0
    for second in range(1, 301):
        rate.add(float(second), 10 * min(second, 150) + 2 * max(0, second - 150))
    assert rate.per_second(300.0) == pytest.approx(2)
    assert rate.per_second(420.0) == pytest.approx(242 / 241), "nothing more came"


def test_the_rate_is_of_twenty_readings_where_these_are_few():
    rate = RecentRate()
    for reading in range(40):
        rate.add(100.0 * reading, 50 * reading)
    assert rate.per_second(3900.0) == pytest.approx(0.5)
    assert rate.per_second(3900.0 + 1900.0) == pytest.approx(0.25)


def test_readings_of_one_second_are_one():
    rate = RecentRate()
    for reading in range(1001):
        rate.add(0.1 * reading, reading)
    assert rate.per_second(100.0) == pytest.approx(10)
    assert len(rate._seen) < 150


def test_a_log_gets_whole_lines_at_first_every_ten_seconds_then_every_minute_and_the_last(
    run: ShardRun, capsys: pytest.CaptureFixture[str]
):
    clock, seen = Clock(), []
    with ProgressDisplay(clock) as display:
        run.views.append(display.show)
        run.crew(1, 0)
        for second in range(1, 2001):
            clock.now_s = 100.0 + second
            run.tally.sampled = second
            run.show()
            told = capsys.readouterr().err
            if told:
                assert told.count("\n") == 1
                assert told.endswith("\n")
                seen.append(second)
        run.crew(2, 0)
    assert seen[:9] == [1, 10, 20, 30, 40, 50, 60, 70, 80]
    assert {b - a for a, b in itertools.pairwise(seen) if a > 600} == {60}
    assert capsys.readouterr().err == (
        "fake: 9/22 images (40%), 1/3 shards, 1 images/s, 13.0 s left, 2 workers\n"
    )


def test_the_end_is_said_once(run: ShardRun, capsys: pytest.CaptureFixture[str]):
    with ProgressDisplay(Clock()) as display:
        display.show(run.tally)
    assert capsys.readouterr().err == "fake: 9/22 images (40%), 1/3 shards\n"


def test_prompts_are_shown_alike(capsys: pytest.CaptureFixture[str]):
    clock, tally = Clock(), PromptTally(10)
    with ProgressDisplay(clock) as display:
        for _ in range(5):
            display.show(tally)
            clock.now_s += 5
            tally.done += 2
    assert capsys.readouterr().err.splitlines() == [
        "text encoder: 0/10 prompts (0%)",
        "text encoder: 4/10 prompts (40%), 0.4 prompts/s, 15.0 s left",
        "text encoder: 8/10 prompts (80%), 0.4 prompts/s, 5.0 s left",
        "text encoder: 10/10 prompts (100%), 0.3 prompts/s",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_drawn_anew(run: ShardRun, monkeypatch: pytest.MonkeyPatch):
    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressDisplay(clock) as display:
        run.views.append(display.show)
        run.crew(1, 0)
        drawn = terminal.getvalue()
        run.tally.sampled = 1
        clock.now_s += 0.1
        run.show()
        assert terminal.getvalue() == drawn, "not so soon"
        clock.now_s += 0.2
        run.crew(2, 0)
    frames = terminal.getvalue().rstrip("\n").split("\r")
    assert terminal.getvalue().count("\n") == 1
    assert frames[-1].startswith("|####")
    assert (
        "| fake: 9/22 images (40%), 1/3 shards, 3.33 images/s, 3.9 s left, 2 workers" in frames[-1]
    )
