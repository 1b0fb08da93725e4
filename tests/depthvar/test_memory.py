import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depthvar import memory
from depthvar.config import (
    MODELS,
    ModelConfig,
    SamplingSettings,
    TokenizerConfig,
    TransformerConfig,
    model_config,
)
from depthvar.cost import TEXT_TOKENS
from depthvar.infinity_config import INFINITY_2B, INFINITY_8B, BitDecoderConfig
from depthvar.memory import (
    LIBRARY_BYTES,
    decoder_parameters,
    largest_batch,
    memory_need,
    transformer_parameters,
)
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer, initialise
from depthvar.weights.checkpoint import assemble, random_model
from depthvar.weights.find import FoundModel, blank_part
from tests.live_memory import LiveBytes
from tests.tiny_models import tiny_infinity

SIDES = (1, 2, 4, 8, 12, 16)
POLICIES = (
    make_policy("full"),
    make_policy("uniform", reference_scale=3),
    make_policy("depthvar", reference_scale=3, proxy="raw"),
    make_policy("depthvar", reference_scale=3, proxy="raw", guided_scales=4, kept_guidance=0.5),
)


def test_counted_parameters_of_a_text_model_are_those_of_its_transformer():
    for config in (INFINITY_2B, INFINITY_8B, tiny_infinity(1)):
        transformer = blank_part(config, "transformer")
        assert transformer_parameters(config) == sum(p.numel() for p in transformer.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_counted_parameters_are_those_of_the_modules(name: str):
    config = MODELS[name]
    with torch.device("meta"):
        transformer, tokenizer = Transformer(config.transformer), Tokenizer(config.tokenizer)
    assert transformer_parameters(config) == sum(p.numel() for p in transformer.parameters())
    decoding = (tokenizer.decoder, tokenizer.post_quant_conv)
    wanted = sum(p.numel() for module in decoding for p in module.parameters())
    assert decoder_parameters(config.tokenizer) == wanted


def _sampler(
    policy: DepthPolicy, width: int, codes: int, base_width: int, precision: str = "float32"
) -> Sampler:
    config = ModelConfig(
        name="memory",
        transformer=TransformerConfig(
            num_classes=2,
            sides=SIDES,
            num_blocks=5,
            width=width,
            num_heads=4,
            codebook_size=codes,
            code_channels=8,
        ),
        tokenizer=TokenizerConfig(
            sides=SIDES,
            phi_of_scale=(0,) * len(SIDES),
            codebook_size=codes,
            code_channels=8,
            base_width=base_width,
            multipliers=(1, 2),
            num_res_blocks=1,
            norm_groups=4,
        ),
        class_names=("a", "b"),
    )
    transformer, tokenizer = Transformer(config.transformer), Tokenizer(config.tokenizer)
    initialise(transformer, torch.Generator().manual_seed(0))
    dtype = getattr(torch, precision)
    found = FoundModel(config, Path("a"), Path("b"), None, ())
    model = assemble(found, transformer, tokenizer, device="cpu", dtype=dtype)
    return Sampler(model, policy, SamplingSettings(1.5, 0, 0.9))


def test_a_batch_decoded_in_slices_has_the_same_pixels_but_for_rounding_in_less_memory(monkeypatch):
    sampler = _sampler(POLICIES[0], 32, 128, base_width=16, precision="float32")
    maps_BZHW = torch.randn(4, *sampler.tokens([0], seed=0, indices=[0]).feature_map_BZHW.shape[1:])
    needs, peaks, pixels = [], [], []
    for at_once in (4, 3):
        height, width = sampler.config.image_size
        monkeypatch.setattr(memory, "_PIXELS_DECODED_AT_ONCE", at_once * height * width)
        with LiveBytes() as decoding:
            pixels.append(sampler.decode(maps_BZHW))
        need = memory_need(
            sampler.config, sampler.plan, batch_size=4, streams=2, precision="float32"
        )
        needs.append(need.decoding)
        peaks.append(decoding.peak)
    whole, sliced = (images.int() for images in pixels)
    differences = (whole - sliced).abs()  # a sum may be rounded otherwise in a smaller batch
    assert differences.max() <= 1
    assert differences.count_nonzero() <= differences.numel() // 1000
    assert needs[1] == needs[0] * 3 // 4
    assert peaks[1] == pytest.approx(peaks[0] * 3 / 4, rel=0.05)


@pytest.mark.parametrize(
    "policy", range(len(POLICIES)), ids=["full", "uniform", "depthvar", "guided"]
)
@pytest.mark.parametrize("is_wide", [True, False], ids=["wide", "many codes"])
def test_the_need_is_what_sampling_and_decoding_hold_at_once(policy, is_wide):
    """Every two of policy, shape and precision meet."""
    width, codes = (128, 128) if is_wide else (32, 1024)
    precision = "float32" if is_wide == (policy % 2 == 0) else "bfloat16"
    sampler = _sampler(POLICIES[policy], width, codes, base_width=16, precision=precision)
    with LiveBytes() as sampling:
        sampled = sampler.tokens([0, 1, 1, 0], seed=0, indices=range(4))
    with LiveBytes() as decoding:
        sampler.decode(sampled.feature_map_BZHW)
    need = memory_need(sampler.config, sampler.plan, batch_size=4, streams=2, precision=precision)
    assert need.cache + need.sampling == pytest.approx(sampling.peak, rel=0.1)
    assert need.decoding == pytest.approx(decoding.peak, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "width", "bits", "policy"),
    [
        ("float32", 128, 8, POLICIES[0]),
        ("float32", 128, 8, POLICIES[2]),
        ("float32", 32, 128, POLICIES[1]),
        ("bfloat16", 64, 8, POLICIES[2]),
        ("bfloat16", 32, 128, POLICIES[0]),
        ("float32", 128, 8, POLICIES[3]),
        ("bfloat16", 32, 128, POLICIES[3]),
    ],
)
def test_the_need_of_a_text_model_is_what_it_holds_at_once(precision, width, bits, policy):
    config = tiny_infinity(
        grids=tuple((side, side) for side in SIDES),
        rotary_grid=(16, 16),
        width=width,
        num_heads=4,
        bits=bits,
        max_text_tokens=TEXT_TOKENS,
        decoder=BitDecoderConfig(base_width=64, multipliers=(1, 2), norm_groups=4),
    )
    model = random_model(config, dtype=getattr(torch, precision))
    sampler = Sampler(model, policy, config.sampling)
    texts = [torch.ones(TEXT_TOKENS, config.text_width) for _ in range(4)]
    with LiveBytes() as sampling:
        sampled = sampler.tokens(texts, seed=0, indices=range(4))
    with LiveBytes() as decoding:
        sampler.decode(sampled.feature_map_BZHW)
    need = memory_need(config, sampler.plan, batch_size=4, streams=2, precision=precision)
    assert need.cache + need.sampling == pytest.approx(sampling.peak, rel=0.1)
    assert need.decoding == pytest.approx(decoding.peak, rel=0.1)
    held = sum(p.nbytes for m in (model.transformer, model.tokenizer) for p in m.parameters())
    assert need.weights == pytest.approx(held, rel=0.01)


def test_half_precision_halves_weights_and_cache():
    config = MODELS["var-d16"]
    plan = _sampler(POLICIES[0], 64, 64, 16).plan
    wide, half = (
        memory_need(config, plan, batch_size=1, streams=2, precision=name)
        for name in ("float32", "float16")
    )
    assert half.cache * 2 == wide.cache
    assert half.weights == pytest.approx(wide.weights / 2, rel=0.001)


def test_the_largest_batch_is_the_last_one_whose_need_fits():
    config = model_config("digits")
    plan = DepthPlan.build(config.sides, config.num_blocks, make_policy("full"))
    how = {"streams": 2, "precision": "float32"}
    room = memory_need(config, plan, batch_size=37, **how).peak
    assert largest_batch(config, plan, room, at_most=50, **how) == 37
    assert largest_batch(config, plan, room - 1, at_most=50, **how) == 36
    assert largest_batch(config, plan, room, at_most=10, **how) == 10
    assert largest_batch(config, plan, 1000, at_most=50, **how) == 0


def test_a_job_s_process_takes_no_more_than_planned_and_not_much_less(tmp_path: Path):
    """15% above would hurt; 25% below is what heaps without slack come to on some machines.

    Besides the mapped files, whose resident part is the kernel's choice and has a bound. The jobs
    are forked from one process that has imported what they need.
    """
    program = """if True:
        import os, sys
        from jobs.generate import main
        import pipeline.run.driver, pipeline.run.in_process
        for batch in (10, 50):
            if (pid := os.fork()) == 0:
                flags = [f"--per-class={batch // 10}", f"--batch-size={batch}", "--workers=0"]
                flags += ["--policy=full", "--contact-sheet=0", f"--out={sys.argv[1]}/{batch}"]
                assert main(flags) == 0
                print("batch", batch, open("/proc/self/status").read())
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    config = model_config("digits")
    plan = DepthPlan.build(config.sides, config.num_blocks, make_policy("full"))
    jobs = done.stdout.split("batch ")[1:]
    assert len(jobs) == 2
    for job in jobs:
        peak, files = (
            int(job.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmHWM", "RssFile")
        )
        need = memory_need(
            config, plan, batch_size=int(job.split()[0]), streams=2, precision="float32"
        )
        planned = need.process_peak - LIBRARY_BYTES
        assert planned / 1.25 <= peak - files <= planned * 1.15
        assert files <= 1.1 * LIBRARY_BYTES
