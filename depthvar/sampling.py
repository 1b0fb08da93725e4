"""From labels to images: the main path.

Shape legend: B images, G stream rows (2B guided: conditional then unconditional), T tokens of a
scale (N of an image), C width, V codes, Z code channels, H W sides, S scales.

Source: Tian et al., arXiv 2404.02905 (next-scale sampling, guidance ramp); arXiv 2604.17286 (depth
per token, code blending).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar import engine
from depthvar.cost import image_cost
from depthvar.engine import DepthEngine, KeyValueCache, ScaleTrace
from depthvar.memory import images_decoded_at_once
from depthvar.plan import DepthPlan
from depthvar.pointwise import PLAIN, Pointwise
from depthvar.policy import DepthPolicy
from depthvar.randomness import ranking_uniforms, token_uniforms
from depthvar.recording import Record, Recorded
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import AnyLoaded, why_not_finite

Given = Sequence[int] | Sequence[Tensor] | Sequence[npt.NDArray[np.float32]] | Tensor
"""What a batch is of: class labels, or the states of texts, each (length, channels)."""
ConditionT = TypeVar("ConditionT")
DrawnT = TypeVar("DrawnT", bound="Drawn")
ScaleHook = Callable[[int, Tensor, ScaleTrace], None]
"""Called after every scale with (scale, guided logits (B, T, V), trace)."""


class Backbone(engine.Backbone[ConditionT], Protocol[ConditionT]):
    """What the sampler needs of a transformer beside its blocks."""

    def condition(self, given: Any, streams: int) -> ConditionT:
        """What no scale and no token changes; the rows of two streams are [given, unconditional].

        `given` are labels or states of texts, as `Given`.
        """
        ...

    def tensors_of(self, given: Any, streams: int) -> Any:
        """What `condition` takes as well: tensors on the device, of one of few shapes."""
        ...

    def first_rows(self, condition: ConditionT, count: int) -> ConditionT:
        """The condition of the first rows alone."""
        ...

    def embed(self, scale: int, codes_GTZ: Tensor | None, condition: ConditionT) -> Tensor:
        """Input of a scale (G, T, C), at least float32; at scale 0 there are no codes yet."""
        ...

    def logits(self, x_GTC: Tensor, condition: ConditionT) -> Tensor:
        """What tokens are drawn from (G, T, V), at least float32."""
        ...


class Drawn(Protocol):
    """Drawn tokens and the distribution that they come from."""

    @property
    def tokens(self) -> Tensor:
        """The tokens (B, T), or their bits (B, T, Z)."""
        ...

    @property
    def log_prob_BT(self) -> Tensor:  # noqa: N802 - the suffix is the shape
        """Natural log of the probability of what was drawn."""
        ...

    def entropy(self) -> Tensor:
        """Entropy of the distribution in nats (B, T)."""
        ...


class Codec(Protocol[DrawnT]):
    """What the sampler needs of a quantizer: from logits to codes, and from codes to the map."""

    draws_per_token: int

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the feature map."""
        ...

    def draw(self, logits_BTV: Tensor, uniforms_BU: Tensor, settings: SamplingSettings) -> DrawnT:
        """Draw the tokens of a scale from guided logits; `uniforms_BU` go token by token."""
        ...

    def codes(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The code vectors of tokens (B, T, Z)."""
        ...

    def expected_codes(self, drawn: DrawnT) -> Tensor:
        """Mean code vectors under the distributions (B, T, Z)."""
        ...

    def spread(self, drawn: DrawnT) -> Tensor:
        """Variance of the code vectors, summed over their channels (B, T)."""
        ...

    def input_of_scale(self, scale: int, feature_map_BZHW: Tensor) -> Tensor:
        """The feature map at the grid of a scale, as tokens (B, T, Z)."""
        ...

    def contribution(self, scale: int, codes_BTZ: Tensor) -> Tensor:
        """What the code vectors of a scale add to the feature map (B, Z, H, W)."""
        ...


@dataclass(frozen=True)
class SampleBatch:
    """Images of a batch and what is recorded of their making.

    images_BHWC: uint8. mean_change_BS: the ranking signal, averaged over the tokens of each scale.
    mean_log_prob_BS: mean natural log-probability of the drawn tokens of each scale; both 0 for
    scales that the policy skips. depths_BN: blocks that every token ran, scale by scale in raster
    order, of the conditional stream. sampling_s, decoding_s: wall seconds of the batch.
    """

    images_BHWC: npt.NDArray[np.uint8]
    mean_change_BS: npt.NDArray[np.float32]
    mean_log_prob_BS: npt.NDArray[np.float32]
    depths_BN: npt.NDArray[np.uint8]
    sampling_s: float
    decoding_s: float


@dataclass(frozen=True)
class SampledTokens:
    """A batch before decoding: feature map (B, Z, H, W) and the tokens of every sampled scale."""

    feature_map_BZHW: Tensor
    tokens: tuple[Tensor, ...]
    mean_change_BS: Tensor
    mean_log_prob_BS: Tensor


@dataclass
class BatchState:
    """A batch on its way through the scales: what those drawn so far leave for the next.

    signal_BT: what the next scale's tokens are ranked by, if the drawn distributions tell it.
    difference_BTV: conditional less unconditional logits, once later scales take them over.
    """

    condition: Any
    cache: KeyValueCache
    feature_map_BZHW: Tensor
    trace: ScaleTrace | None = None
    signal_BT: Tensor | None = None
    difference_BTV: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)


class Sampler:
    """A model under a policy and sampling settings, ready to make images.

    A sample depends on (seed, global index, label, model, policy, settings) and on nothing else of
    its batch.
    """

    def __init__(
        self,
        model: AnyLoaded,
        policy: DepthPolicy,
        settings: SamplingSettings,
        *,
        record: Record | None = None,
        pointwise: Pointwise = PLAIN,
    ) -> None:
        """`InputError` when the policy does not fit the model or lacks its calibration.

        With `record`, calls replay what it made of the first batch of every shape. `pointwise` is
        what lies between the products.
        """
        model = model.with_pointwise(pointwise)
        if policy.proxy == "calibrated" and model.proxy_fit is None:
            model.found.require_calibration(model.config, policy.preset)
        self.config = model.config
        self.plan = DepthPlan.build(model.config.grids, model.config.num_blocks, policy)
        self.settings = settings
        self.cost = image_cost(model.config, self.plan, streams=settings.streams)
        self._streams = self.plan.streams(settings.streams)
        self.model = model
        self._backbone: Backbone[Any] = model.transformer
        self._codec: Codec[Any] = model.tokenizer.quantize
        self._depths = [
            torch.as_tensor(scale.depths, dtype=torch.uint8, device=model.device)
            for scale in self.plan.scales
        ]
        self._engine = DepthEngine(
            self._backbone,
            self.plan,
            device=model.device,
            dtype=model.stream_dtype,
            proxy_fit=model.proxy_fit,
            pointwise=pointwise,
        )
        self._draw: Callable[..., tuple[Tensor, ...]] = self._drawn
        self._show: Callable[..., tuple[Tensor, ...]] = self._shown
        self._records = record is not None
        if record:
            self._draw, self._show = Recorded(self._drawn, record), Recorded(self._shown, record)

    def __call__(self, given: Given, *, seed: int, indices: Sequence[int]) -> SampleBatch:
        """Make one image of each thing given; `indices` are the samples' global indices."""
        begun = time.perf_counter()
        with torch.inference_mode():
            if self._records:  # and every shape is another recording
                given = self._backbone.tensors_of(given, self.settings.streams)
            feature_map_BZHW, *told = self._draw(given, *self._numbers(seed, indices))
            mean_change_BS, mean_log_prob_BS, depths_BN = (values.cpu().numpy() for values in told)
            if not (np.isfinite(mean_change_BS).all() and np.isfinite(mean_log_prob_BS).all()):
                raise self._not_finite("drew tokens from numbers that are")
            sampled_at = time.perf_counter()
            images_BHWC = self.decode(feature_map_BZHW).cpu().numpy()
        decoded_at = time.perf_counter()
        return SampleBatch(
            images_BHWC=images_BHWC,
            mean_change_BS=mean_change_BS,
            mean_log_prob_BS=mean_log_prob_BS,
            depths_BN=depths_BN,
            sampling_s=sampled_at - begun,
            decoding_s=decoded_at - sampled_at,
        )

    def tokens(
        self,
        given: Given,
        *,
        seed: int,
        indices: Sequence[int],
        on_scale: ScaleHook | None = None,
        forced: Sequence[Tensor] | None = None,
    ) -> SampledTokens:
        """Draw the tokens of one image of each thing given, without decoding them.

        `forced` as in `tokens_from_uniforms`.
        """
        numbers = self._numbers(seed, indices)
        return self.tokens_from_uniforms(given, *numbers, on_scale=on_scale, forced=forced)

    def _numbers(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Uniform numbers for the draws of samples, and for ranking their tokens at random."""
        num_tokens = self.config.num_tokens
        num_draws = num_tokens * self._codec.draws_per_token
        return (
            self._on_device(token_uniforms(seed, indices, num_draws)),
            self._on_device(ranking_uniforms(seed, indices, num_tokens)),
        )

    @torch.inference_mode()
    def _drawn(
        self, given: Any, uniforms_BN: Tensor, ranking_BN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All scales: feature map, mean change and log-probability (float32), and depths.

        Runs on the device alone, and the same whatever the numbers are: it can be recorded.
        """
        state, batch = self._begun(given, len(ranking_BN)), len(ranking_BN)
        depths: list[Tensor] = []

        def keep_depths(i: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
            depths.append(self._depths[i][trace.slot_of_raster_GT[:batch]])

        for _ in self.plan.scales:
            self.draw_scale(state, uniforms_BN, ranking_BN, on_scale=keep_depths)
        sampled = self.finish(state)
        depths_BN = torch.cat(depths, dim=1)
        num_skipped = self.config.num_tokens - depths_BN.shape[1]
        return (
            sampled.feature_map_BZHW,
            sampled.mean_change_BS.float(),
            sampled.mean_log_prob_BS.float(),
            F.pad(depths_BN, (0, num_skipped)),
        )

    @torch.inference_mode()
    def tokens_from_uniforms(
        self,
        given: Given,
        uniforms_BN: Tensor,
        ranking_BN: Tensor,
        *,
        on_scale: ScaleHook | None = None,
        forced: Sequence[Tensor] | None = None,
    ) -> SampledTokens:
        """Draw all scales with the given uniform numbers, in scale order one per token (VAR).

        Tokens of bits take one number per bit, `uniforms_BN` is (B, N * bits) of them.

        `forced` are the tokens of every scale that later scales see in place of the drawn ones
        (teacher forcing); what is returned are the drawn tokens.
        """
        state = self.begin(given)
        for i in range(len(self.plan.scales)):
            forced_BT = forced[i] if forced else None
            self.draw_scale(state, uniforms_BN, ranking_BN, on_scale=on_scale, forced_BT=forced_BT)
        return self.finish(state)

    @torch.inference_mode()
    def begin(self, given: Given) -> BatchState:
        """A batch before its first scale."""
        return self._begun(given, len(given))

    def _begun(self, given: Any, batch: int) -> BatchState:
        return BatchState(
            self._backbone.condition(given, self.settings.streams),
            self.new_cache(batch),
            torch.zeros(
                batch,
                *self._codec.map_shape,
                dtype=self.model.stream_dtype,
                device=self.model.device,
            ),
        )

    @torch.inference_mode()
    def finish(self, state: BatchState) -> SampledTokens:
        """A batch after its last scale."""
        changes = [change_BT.mean(dim=1) for change_BT in state.changes]
        log_probs = [log_prob_BT.mean(dim=1) for log_prob_BT in state.log_probs]
        skipped = [torch.zeros_like(changes[0])] * (len(self.config.grids) - len(changes))
        return SampledTokens(
            state.feature_map_BZHW,
            tuple(state.tokens),
            torch.stack(changes + skipped, dim=1),
            torch.stack(log_probs + skipped, dim=1),
        )

    @torch.inference_mode()
    def draw_scale(
        self,
        state: BatchState,
        uniforms_BN: Tensor,
        ranking_BN: Tensor,
        *,
        on_scale: ScaleHook | None = None,
        forced_BT: Tensor | None = None,
    ) -> None:
        """The next scale: embed, run the blocks, draw, and add the codes to the feature map."""
        backbone, codec = self._backbone, self._codec
        i, policy = len(state.tokens), self.plan.policy
        here = self._places(i)
        if i and self._streams[i] < self._streams[i - 1]:
            self._leave_unconditional(state)
        # Every scale after the first starts from the feature map at its own size.
        codes_BTZ = codec.input_of_scale(i, state.feature_map_BZHW) if i else None
        x_GTC = backbone.embed(i, self._for_streams(i, codes_BTZ), state.condition)
        given_BT = ranking_BN[:, here]
        if state.signal_BT is not None:
            given_BT = self._engine.upsample(i, state.signal_BT)
        trace = self._engine.run_scale(
            i, x_GTC, state.condition, state.cache, state.trace, given_BT
        )
        logits_BTV = self._guided(state, backbone.logits(trace.hidden_GTC, state.condition))
        draws = slice(here.start * codec.draws_per_token, here.stop * codec.draws_per_token)
        drawn = codec.draw(logits_BTV, uniforms_BN[:, draws], self.settings)
        if on_scale:
            on_scale(i, logits_BTV, trace)
        # The code vectors, weighted as the policy says, add to the feature map.
        tokens = drawn.tokens if forced_BT is None else forced_BT
        codes_BTZ = codec.codes(tokens, self.model.stream_dtype)
        if self.plan.scales[i].adaptive and policy.blending != "none":
            weight_BT1 = self._engine.code_weights(i, trace)[:, :, None].to(codes_BTZ.dtype)
            codes_BTZ = codes_BTZ * weight_BT1
            if policy.uses_expected_codes:
                codes_BTZ = codes_BTZ + (1 - weight_BT1) * codec.expected_codes(drawn)
        state.feature_map_BZHW = state.feature_map_BZHW + codec.contribution(i, codes_BTZ)
        state.trace, state.signal_BT = trace, self._signal(i, drawn)
        state.tokens.append(drawn.tokens)
        state.changes.append(trace.change_BT)
        state.log_probs.append(drawn.log_prob_BT)

    def _places(self, i: int) -> slice:
        """Where the tokens of a scale are among all of an image."""
        begin = sum(earlier.count for earlier in self.plan.scales[:i])
        return slice(begin, begin + self.plan.scales[i].count)

    def _signal(self, i: int, drawn: Drawn) -> Tensor | None:
        """What the next scale is ranked by, of the distributions of this one (B, T)."""
        policy, later = self.plan.policy, self.plan.scales[i + 1 : i + 2]
        if not policy.ranks_by_distribution or not any(scale.adaptive for scale in later):
            return None
        if policy.ranking == "entropy":
            signal_BT = drawn.entropy()
        elif policy.ranking == "spread":
            signal_BT = self._codec.spread(drawn)
        else:
            signal_BT = -drawn.log_prob_BT
        # Tokens with one distribution tie, whatever the last bits of its sums.
        return signal_BT.float()

    @torch.inference_mode()
    def decode(self, feature_map_BZHW: Tensor) -> Tensor:
        """Feature map to pixels (B, H, W, C) uint8, rounded; raises if any pixel is not finite.

        Pixels of a sampler that records hold until its next call.
        """
        pixels_BHWC, is_finite = self._show(feature_map_BZHW)
        if not is_finite:
            raise self._not_finite("made an image with a pixel that is")
        return pixels_BHWC

    @torch.inference_mode()
    def _shown(self, feature_map_BZHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, C) uint8, rounded, and whether all are finite; can be recorded."""
        pixels, finite = [], []
        at_once = images_decoded_at_once(self.config.image_size)
        slices = feature_map_BZHW.to(self.model.dtype).split(at_once)
        for slice_bZHW in slices:
            images_bCHW = self.model.tokenizer.decode(slice_bZHW).float()
            finite.append(torch.isfinite(images_bCHW).all())
            pixels_bCHW = ((images_bCHW + 1) * 127.5).round().to(torch.uint8)
            pixels.append(pixels_bCHW.permute(0, 2, 3, 1))
        return torch.cat(pixels).contiguous(), torch.stack(finite).all()

    def _not_finite(self, what: str) -> ArithmeticError:
        return ArithmeticError(
            f"{self.config.name} {what} not finite, wanted finite ones: "
            f"{why_not_finite(self.model)}"
        )

    def _on_device(self, values: npt.NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(self.model.device)

    def _for_streams(self, scale: int, codes_BTZ: Tensor | None) -> Tensor | None:
        if codes_BTZ is None:
            return None
        return codes_BTZ.to(self.model.dtype).repeat(self._streams[scale], 1, 1)

    def _leave_unconditional(self, state: BatchState) -> None:
        """Go on with the conditional stream, whose rows come first."""
        batch = len(state.feature_map_BZHW)
        assert state.trace is not None
        state.condition = self._backbone.first_rows(state.condition, batch)
        state.cache, state.trace = state.cache.first_rows(batch), state.trace.first_rows(batch)

    def _guided(self, state: BatchState, logits_GTV: Tensor) -> Tensor:
        """The logits to draw from; the state keeps the difference that the next scale takes."""
        scale, settings = len(state.tokens), self.settings
        strength = settings.strength(scale, len(self.config.grids))
        logits_BTV = logits_GTV
        if self._streams[scale] == 2:
            conditional_BTV, unconditional_BTV = logits_GTV.chunk(2)
            logits_BTV = (1 + strength) * conditional_BTV - strength * unconditional_BTV
            if self.plan.keeps_difference(scale):
                state.difference_BTV = conditional_BTV - unconditional_BTV
        elif state.difference_BTV is not None:
            state.difference_BTV = self._engine.upsample(scale, state.difference_BTV)
            state.difference_BTV *= self.plan.policy.kept_guidance
            logits_BTV = torch.add(logits_GTV, state.difference_BTV, alpha=strength)
        return logits_BTV if settings.temperature == 1.0 else logits_BTV / settings.temperature

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for a batch of this sampler."""
        return KeyValueCache(
            self.plan,
            rows=batch * self.settings.streams,
            heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            like=self.model.transformer.pos_start,
        )
