"""The `.depth.npy` member: how many blocks every token of an image ran.

A flat uint8 array: the scales one after the other, each in raster order. The plan holds the sides
of the scales; a scale that the policy skips is all 0. Where the guided streams of a sample are
ranked apart, the conditional one's.
"""

from __future__ import annotations

import io
import math

import numpy as np

from pipeline.request.job_plan import JobPlan

DEPTH_MAP_SUFFIX = "depth.npy"


def depth_map_file(depths_N: np.ndarray) -> bytes:
    """The bytes of the member; equal depths give equal bytes."""
    buffer = io.BytesIO()
    np.save(buffer, depths_N, allow_pickle=False)
    return buffer.getvalue()


def read_depth_map(data: bytes, plan: JobPlan) -> list[np.ndarray]:
    """The depths of every scale (rows, columns), uint8.

    Errors: `ValueError` for others than planned.

    How deep a scale runs in the mean is fixed by the plan.
    """
    try:
        depths_N = np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OSError) as error:
        raise ValueError(f"the depth map is no .npy file: {error}") from error
    ends = np.cumsum([math.prod(grid) for grid in plan.depth_map_grids])
    if depths_N.dtype != np.uint8 or depths_N.shape != (ends[-1],):
        raise ValueError(
            f"got a depth map {depths_N.dtype} {depths_N.shape}, wanted uint8 ({ends[-1]},)"
        )
    scales = [
        part.reshape(grid)
        for part, grid in zip(np.split(depths_N, ends[:-1]), plan.depth_map_grids, strict=True)
    ]
    means = [float(scale.mean()) for scale in scales]
    if not np.allclose(means, plan.compute.depth_per_scale):
        raise ValueError(
            f"got scales of mean depth {means}, wanted {list(plan.compute.depth_per_scale)}"
        )
    return scales
