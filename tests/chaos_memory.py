"""`python -m tests.chaos_memory`: a shard that fills the node's memory, under Ray's real monitor.

Ray ends the worker when the node's memory runs low. The job must charge the shard that did it, set
it aside and make the others; with the fault gone, `--retry-failed` must end in the bytes of an
undisturbed run. Takes 4 GiB of free memory and is no part of the suite: what else runs on the
machine could be ended in its place.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ray.cluster_utils import Cluster

from jobs import verify
from tests import fake_job
from tests.fake_shards import data_files
from tests.fakes import set_faults
from tests.fault_hook import FAULTS_VARIABLE

ROOM_BYTES = 2 * 2**30  # what the node may still take; the shard takes twice as much
FLAGS = ["--per-class", "6", "--samples-per-shard", "10", "--batch-size", "2", "--device", "cpu"]
HOG_INDEX = 25  # within the third of six shards


def memory_in_use() -> tuple[int, int]:
    """Bytes in use on this machine, and all there are."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kb = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return (kb["MemTotal"] - kb["MemAvailable"]) * 1024, kb["MemTotal"] * 1024


def main() -> int:
    """Print what happened; exit code 0 if it is what is promised."""
    in_use, total = memory_in_use()
    if total - in_use < 2 * ROOM_BYTES:
        print(f"{(total - in_use) / 2**30:.1f} GiB are free, wanted {2 * ROOM_BYTES / 2**30:.0f}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ[FAULTS_VARIABLE] = str(folder / "faults.json")
        set_faults(folder / "faults.json")
        assert fake_job.main([f"--out={folder / 'wanted'}", "--workers=0", *FLAGS]) == 0
        system = {
            "memory_usage_threshold": (in_use + ROOM_BYTES) / total,
            "memory_monitor_refresh_ms": 100,
        }
        head = {"num_cpus": 2, "include_dashboard": False, "_system_config": system}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            job = [f"--out={folder / 'out'}", f"--address={cluster.address}", "--workers=2", *FLAGS]
            set_faults(folder / "faults.json", hog=HOG_INDEX, hog_bytes=2 * ROOM_BYTES)
            first = fake_job.main(job)
            rows = [json.loads(row) for row in (folder / "out/commits/failures.jsonl").open()]
            set_faults(folder / "faults.json")
            second = fake_job.main([*job, "--retry-failed"])
        finally:
            cluster.shutdown()
        is_sound = verify.main([str(folder / "out"), "--deep"]) == 0
        is_same = data_files(folder / "out") == data_files(folder / "wanted")
    charged = Counter((row["shard_id"], row["cause"]) for row in rows)
    aside = sorted(row["shard_id"] for row in rows if row["set_aside"])
    print(f"charged (shard, cause): {dict(charged)}; set aside: {aside}; exit code {first}")
    print(f"again with --retry-failed: exit code {second}, sound {is_sound}, same bytes {is_same}")
    return 0 if (first, second, aside, is_sound, is_same) == (1, 0, [2], True, True) else 1


if __name__ == "__main__":
    sys.exit(main())
