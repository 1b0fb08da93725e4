"""Load time and peak memory of published files against converted ones, with random weights.

    python -m tests.measure_loading [MODEL] [FOLDER]

Needs room on disk for 1.5 times the model in float32. Prints one line per way to load: seconds to
find, check and hash, seconds to load and to read every weight once (of the processor in brackets,
which a busy machine stretches less), and by how much the process grew at most. Own memory is what
the process alone holds; mapped pages of the file are shared by all processes and given back under
pressure.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import torch

from depthvar.weights.checkpoint import convert_weights, load_model
from depthvar.weights.find import find_model
from tests.published_weights import write_published

WAYS = (
    (".pth float32", "pth", "float32"),
    (".pth float32", "pth", "float16"),
    ("safetensors float16", "half", "float32"),
    ("safetensors float16", "half", "float16"),
)


def memory_mb() -> tuple[float, float]:
    """Memory of this process now: its own, and mapped from files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kb = {line[0].rstrip(":"): int(line[1]) for line in lines if line[0].startswith("Rss")}
    return kb["RssAnon"] / 1e3 * 1.024, kb["RssFile"] / 1e3 * 1.024


def load(model: str, weights: str, precision: str) -> None:
    """Load once in this process and print what it took; every weight is read."""
    before, peak, done = memory_mb(), [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            for i, (now, then) in enumerate(zip(memory_mb(), before, strict=True)):
                peak[i] = max(peak[i], now - then)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    laps = [(time.perf_counter(), time.process_time())]
    found = find_model(model, weights)
    assert found.sha256
    laps.append((time.perf_counter(), time.process_time()))
    loaded = load_model(found, dtype=getattr(torch, precision))
    parts = (loaded.transformer, loaded.tokenizer)
    for parameter in (p for part in parts for p in part.parameters()):
        parameter.sum()
    laps.append((time.perf_counter(), time.process_time()))
    done.set()
    watcher.join()
    size = sum(p.nbytes for part in parts for p in part.parameters()) / 1e6
    spent = [f"{b[0] - a[0]:6.2f} ({b[1] - a[1]:5.2f})" for a, b in pairwise(laps)]
    print(f"{size:8,.0f} {'  '.join(spent)} {peak[0]:10,.0f} {peak[1]:14,.0f}")


def main(model: str = "var-d16", folder: str | None = None) -> None:
    """Write the weights, convert them, and load each in a fresh process, twice."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        published, half = Path(scratch) / "pth", Path(scratch) / "half"
        write_published(published, model, full_size=True)
        convert_weights(find_model(model, str(published)), half, dtype=torch.float16)
        for place in (published, half):
            total = sum(path.stat().st_size for path in place.iterdir())
            print(f"{place.name}: {total / 1e6:,.0f} MB on disk")
        print(
            f"{'file -> model':32} model MB  check, hash s         load s own MB max  mapped MB max"
        )
        for name, place, precision in WAYS * 2:
            print(f"{name + ' -> ' + precision:32}", end="", flush=True)
            code = "import sys; from tests.measure_loading import load; load(*sys.argv[1:])"
            weights = str(published if place == "pth" else half)
            subprocess.run([sys.executable, "-c", code, model, weights, precision], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
