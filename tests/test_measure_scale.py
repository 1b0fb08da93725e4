from __future__ import annotations

from pathlib import Path

from pipeline.run.ledger import ShardRun
from pipeline.run.schedule import ShardQueue
from pipeline.storage import Storage
from tests import measure_scale
from tests.fake_shards import make_plan


def test_steps_read_the_summaries_in_place_of_the_records(tmp_path: Path, capsys):
    measure_scale.many_shards(tmp_path / "out", 1_100, num_missing=4)
    read = {}
    for step in measure_scale.STEPS:
        assert measure_scale.main(["--step", step, "--folder", str(tmp_path)]) == 0
        read[step] = int(capsys.readouterr().out.split("|")[-2].replace(",", ""))
    assert read == {
        "plan 10^9 samples": 0,
        "resume without summaries": 1_097,  # and the plan
        "write them": 1_097,
        "resume": 2,
        "end of a run": 6,  # and the indexes
        "status": 512 + 3,  # the newest, as ever, and the ledgers
        "verify": 2,
    }


def test_the_driver_of_64_workers_asks_for_all_that_is_ready_at_once(capsys):
    """200 shards of eight batches: of each nine words are heard, and each worker introduced."""
    plan = make_plan({0: 200 * 8}, samples_per_shard=8, batch_size=1)
    run = ShardRun(Storage.open("nowhere"), plan, ShardQueue(range(200), 3))
    simulated = measure_scale.run_simulated(run, 64)
    assert run.tally.shards == 200
    assert simulated.calls["get"] == 64 + 200 * 9
    assert simulated.calls["wait"] <= 2 * (1 + 200 * 9 / 64 + 9)
