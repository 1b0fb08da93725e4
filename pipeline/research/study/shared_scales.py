"""The first scales of a batch, drawn once for all policies that begin with them.

Policies with one reference scale R run the scales 0..R alike, in full depth.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from depthvar.plan import DepthPlan
from depthvar.sampling import BatchState, Sampler


def shared_scales(plan: DepthPlan) -> int:
    """How many scales at the beginning of a plan leave what full depth leaves.

    Proxies want the changes of the scale before the first shallow one, some rankings what its
    distributions tell, and guidance the difference of the last guided scale: full depth drops all.
    """
    for i, scale in enumerate(plan.scales):
        is_followed = any(following.adaptive for following in plan.scales[i + 1 : i + 2])
        is_told = is_followed and plan.policy.ranks_by_distribution
        is_kept = any(plan.keeps_change(i, block) for block in range(plan.num_blocks))
        is_last_guided = plan.policy.guided_scales == i + 1
        if scale.adaptive or is_kept or is_told or is_last_guided:
            return i
    return len(plan.scales)


@torch.inference_mode()
def taken_over(begun: BatchState, sampler: Sampler) -> BatchState:
    """A copy of a batch to go on with under another sampler's plan; `begun` stays as it is."""
    cache = sampler.new_cache(begun.feature_map_BZHW.shape[0])
    for block in range(sampler.plan.num_blocks):
        cache.append(block, *begun.cache.kept(block))
    return replace(
        begun,
        cache=cache,
        tokens=list(begun.tokens),
        changes=list(begun.changes),
        log_probs=list(begun.log_probs),
    )
