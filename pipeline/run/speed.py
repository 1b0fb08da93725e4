"""How fast one worker is, measured on a few real batches of a plan. Writes to scratch alone."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from depthvar.infinity_config import InfinityConfig
from pipeline.request.job_plan import JobPlan
from pipeline.run.forecast import Speed
from pipeline.run.worker import Resampler, Scratch, Workplace
from pipeline.shards.writer import ShardWriter

_BATCHES = 3
_ENOUGH_S = 60.0
_TOKEN_LETTERS = 4  # of English text


def measure_speed(plan: JobPlan, place: Workplace) -> Speed:
    """Sample the first batches of a plan here, after one to warm up, and write them to scratch.

    Up to three of them, fewer where these take more than a minute. Loading's errors pass through.
    Prompts have random states, of about as many tokens as an encoder makes of them.
    """

    def states_of(prompt: str) -> np.ndarray:
        model = resampler.config
        assert isinstance(model, InfinityConfig)
        num_tokens = min(len(prompt) // _TOKEN_LETTERS + 1, model.max_text_tokens)
        shape = (num_tokens, model.text_width)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    started = time.perf_counter()
    resampler = Resampler(plan, place, states_of=None if plan.prompts is None else states_of)
    loaded = time.perf_counter()
    shard = plan.shard(0)
    batches = shard.micro_batches
    resampler.sample(shard, *batches[0])
    sampled = []
    begun = time.perf_counter()
    for start, stop in batches[:_BATCHES]:
        sampled.append((resampler.sample(shard, start, stop), start))
        if time.perf_counter() - begun > _ENOUGH_S:
            break
    made = time.perf_counter()
    part = replace(shard, stop=stop, labels=shard.labels[: stop - shard.start])
    scratch = Scratch.claim(place.scratch, plan.fingerprint)
    try:
        with ShardWriter(plan, part, scratch.folder) as writer:
            for batch, start in sampled:
                writer.add(batch, start)
            writer.finish()
    finally:
        scratch.remove()
    num_images = part.num_samples
    return Speed(
        device=resampler.info.device,
        threads=place.threads,
        num_images=num_images,
        loading_s=loaded - started,
        making_s=(made - begun) / num_images,
        writing_s=(time.perf_counter() - made) / num_images,
    )
