"""The tokenizer: published names and shapes, and every part against plain arithmetic.

Shape legend: B images, Z code channels, H W sides of a map, T tokens of a scale, V codes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from depthvar import published
from depthvar.config import model_config
from depthvar.var.tokenizer import GroupNorm, Tokenizer
from tests import reference_depthvar as reference
from tests.tiny_models import SHAPES, TOLERANCE, fill_with_noise, states, tiny_config, tiny_model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The published file: vae_ch160v4096z32.pth.

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def res_block(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
    shapes |= norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= conv(f"{name}.nin_shortcut", inputs, outputs, 1)
    return shapes


def attention(name: str, channels: int) -> Shapes:
    shapes = norm(f"{name}.norm", channels) | conv(f"{name}.qkv", channels, 3 * channels, 1)
    return shapes | conv(f"{name}.proj_out", channels, channels, 1)


def ends(name: str, first: tuple[int, int], middle: int, out: tuple[int, int]) -> Shapes:
    shapes = conv(f"{name}.conv_in", *first) | res_block(f"{name}.mid.block_1", middle, middle)
    shapes |= attention(f"{name}.mid.attn_1", middle)
    shapes |= res_block(f"{name}.mid.block_2", middle, middle)
    return shapes | norm(f"{name}.norm_out", out[0]) | conv(f"{name}.conv_out", *out)


def published_shapes() -> Shapes:
    shapes = {"quantize.embedding.weight": (4096, 32)}
    for i in range(4):
        shapes |= conv(f"quantize.quant_resi.qresi_ls.{i}", 32, 32)
    shapes |= conv("quant_conv", 32, 32) | conv("post_quant_conv", 32, 32)
    shapes |= ends("decoder", (32, 640), 640, (160, 3))
    shapes |= ends("encoder", (3, 160), 640, (640, 32))
    # Widths of the levels from fine to coarse: 160, 160, 320, 320, 640.
    for level, (inputs, outputs) in enumerate(
        [(160, 160), (320, 160), (320, 320), (640, 320), (640, 640)]
    ):
        for j in range(3):
            name = f"decoder.up.{level}.block.{j}"
            shapes |= res_block(name, outputs if j else inputs, outputs)
    for level, (inputs, outputs) in enumerate(
        [(160, 160), (160, 160), (160, 320), (320, 320), (320, 640)]
    ):
        for j in range(2):
            name = f"encoder.down.{level}.block.{j}"
            shapes |= res_block(name, outputs if j else inputs, outputs)
    for j in range(3):
        shapes |= attention(f"decoder.up.4.attn.{j}", 640)
    for j in range(2):
        shapes |= attention(f"encoder.down.4.attn.{j}", 640)
    for level, channels in ((1, 160), (2, 320), (3, 320), (4, 640)):
        shapes |= conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    for level, channels in ((0, 160), (1, 160), (2, 320), (3, 320)):
        shapes |= conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    return shapes


@pytest.mark.parametrize("name", ["var-d16", "var-d36-512"])
def test_names_shapes_and_sizes_are_those_of_the_public_file(name):
    with torch.device("meta"):
        model = Tokenizer(model_config(name).tokenizer)
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert found == published_shapes()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 108.9
    assert round(sum(p.numel() for p in model.decoder.parameters()) / 1e6, 2) == 64.65
    shortcuts = {
        key.rsplit(".", 2)[0] for key in found if key.startswith("decoder") and "nin" in key
    }
    assert shortcuts == {"decoder.up.1.block.0", "decoder.up.3.block.0"}


@pytest.mark.parametrize("name", ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36-512"])
def test_ten_scales_share_four_phis_by_the_published_table(name):
    config = model_config(name).tokenizer
    assert config.phi_of_scale == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert config.num_phis == 4


# The feature map.


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_every_scale_adds_its_phi_of_the_upsampled_codes(shape):
    model = tiny_model(shape)
    config, state = model.config.tokenizer, states(model)[1]
    for scale, side in enumerate(config.sides):
        codes_BTZ = noise(2, side * side, 6, seed=scale)
        got = model.tokenizer.quantize.contribution(scale, codes_BTZ)
        want = published.feature_of_codes(state, config, scale, codes_BTZ)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def cubic_weight(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_codes_are_upsampled_bicubically_by_half_pixel_centres_without_antialiasing():
    model = tiny_model(0)
    quantizer = model.tokenizer.quantize
    state = states(model)[1]
    side, last = 3, 5
    codes_BTZ = noise(1, side * side, 6)
    weights = torch.zeros(last, side, dtype=torch.float64)
    for out in range(last):
        centre = (out + 0.5) * side / last - 0.5
        for source in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[out, min(max(source, 0), side - 1)] += cubic_weight(centre - source)
    grid = codes_BTZ[0].T.reshape(6, side, side)
    h = weights @ grid @ weights.T
    name = f"quantize.quant_resi.qresi_ls.{model.config.tokenizer.phi_of_scale[2]}"
    padded = torch.nn.functional.pad(h, (1, 1, 1, 1))
    smooth = torch.zeros_like(h) + state[f"{name}.bias"][:, None, None]
    for dy in range(3):
        for dx in range(3):
            kernel = state[f"{name}.weight"][:, :, dy, dx]
            smooth += torch.einsum("oi,iyx->oyx", kernel, padded[:, dy : dy + 5, dx : dx + 5])
    got = quantizer.contribution(2, codes_BTZ)[0]
    torch.testing.assert_close(got, 0.5 * h + 0.5 * smooth, rtol=0, atol=1e-12)


def test_the_input_of_a_scale_is_the_area_average_of_the_feature_map():
    """From side 5 to 2 the middle row and column belong to both halves; to 3 cells overlap too."""
    quantizer = tiny_model(0).tokenizer.quantize
    feature_map = noise(2, 6, 5, 5)
    for scale, side in enumerate((1, 2, 3, 5)):
        got = quantizer.input_of_scale(scale, feature_map)
        assert got.shape == (2, side * side, 6)
        for row in range(side):
            for column in range(side):
                rows, columns = (
                    slice(at * 5 // side, -(-(at + 1) * 5 // side)) for at in (row, column)
                )
                want = feature_map[:, :, rows, columns].mean(dim=(2, 3))
                place = row * side + column
                torch.testing.assert_close(got[:, place], want, rtol=0, atol=1e-12)


def test_phi_is_half_the_input_and_half_its_convolution():
    model = tiny_model(0)
    phis = model.tokenizer.quantize.quant_resi
    h = noise(1, 6, 5, 5)
    for index in range(model.config.tokenizer.num_phis):
        weight = states(model)[1][f"quantize.quant_resi.qresi_ls.{index}.weight"]
        bias = states(model)[1][f"quantize.quant_resi.qresi_ls.{index}.bias"]
        smooth = torch.nn.functional.conv2d(h, weight, bias, padding=1)
        torch.testing.assert_close(phis(index, h), 0.5 * h + 0.5 * smooth, rtol=0, atol=1e-12)


# Tokens.


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_tokens_are_nearest_codes_of_what_is_left_scale_by_scale(shape):
    model = tiny_model(shape)
    config, state = model.config.tokenizer, states(model)[1]
    latent = noise(2, 6, config.latent_side, config.latent_side)
    tokens, inputs_BTZ, feature_map = model.tokenizer.tokenize(latent)
    codebook_VZ = state["quantize.embedding.weight"]
    for b in range(2):
        rest, plain_map, begin = latent[b], torch.zeros_like(latent[b]), 0
        for scale, side in enumerate(config.sides):
            wanted = published.at_side(rest[None], side)[0]
            distances = ((wanted[:, None] - codebook_VZ[None]) ** 2).sum(2)
            assert tokens[scale][b].tolist() == distances.argmin(1).tolist()
            if scale:
                end = begin + side * side
                given = published.at_side(plain_map[None], side)[0]
                torch.testing.assert_close(inputs_BTZ[b, begin:end], given, rtol=0, atol=1e-12)
                begin = end
            codes = codebook_VZ[tokens[scale][b]][None]
            added = published.feature_of_codes(state, config, scale, codes)[0]
            plain_map, rest = plain_map + added, rest - added
        torch.testing.assert_close(feature_map[b], plain_map, rtol=0, atol=1e-12)
        assert begin == inputs_BTZ.shape[1]


def test_tokens_rebuild_the_feature_map_that_tokenizing_returned():
    """From an image to tokens; from the tokens alone to the same map and transformer inputs."""
    model = tiny_model(0, torch.float32).tokenizer
    images = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = model.encode(images)
    assert latent.shape == (2, 6, 5, 5)
    tokens, inputs_BTZ, feature_map = model.tokenize(latent)
    rebuilt, inputs = torch.zeros_like(feature_map), []
    for scale, tokens_BT in enumerate(tokens):
        if scale:
            inputs.append(model.quantize.input_of_scale(scale, rebuilt))
        codes_BTZ = model.quantize.embedding(tokens_BT)
        rebuilt = rebuilt + model.quantize.contribution(scale, codes_BTZ)
    assert torch.equal(rebuilt, feature_map)
    assert torch.equal(torch.cat(inputs, dim=1), inputs_BTZ)
    assert len(torch.cat(tokens, dim=1).unique()) > 5


def test_a_code_is_nearest_to_itself_and_of_equals_the_first():
    quantizer = tiny_model(0).tokenizer.quantize
    codes = quantizer.embedding.weight
    assert quantizer.nearest(codes[None]).tolist() == [list(range(29))]
    same = Tokenizer(tiny_config().tokenizer).double().requires_grad_(False).quantize
    same.embedding.weight[:] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    assert same.nearest(noise(1, 4, 6)).tolist() == [[0] * 4]


# Encoder and decoder.


@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_equals_the_plain_one(channels):
    model = tiny_model(0, image_channels=channels)
    feature_map = noise(2, 6, 5, 5)
    got = model.tokenizer.decode(feature_map)
    want = published.decode(states(model)[1], model.config.tokenizer, feature_map)
    assert got.shape == (2, channels, 10, 10)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float64])
    assert got.abs().max() == 1  # some were clamped
    assert (got.abs() < 1).float().mean() > 0.3


def three_level_tokenizer() -> Tokenizer:
    """Two changes of width and resolution, two residual blocks, as the published one has."""
    config = replace(tiny_config().tokenizer, multipliers=(1, 2, 2), num_res_blocks=2)
    model = Tokenizer(config).double().requires_grad_(False)
    fill_with_noise(model, torch.Generator().manual_seed(5))
    return model


def test_deeper_encoders_and_decoders_equal_the_plain_ones():
    model = three_level_tokenizer()
    feature_map, images = noise(1, 6, 5, 5), noise(1, 3, 20, 20).clamp(-1, 1)
    want = published.decode(model.state_dict(), model.config, feature_map)
    torch.testing.assert_close(model.decode(feature_map), want, rtol=0, atol=1e-9)
    latent = model.quant_conv(model.encoder(images))
    want = reference.encode(model.state_dict(), model.config, images)
    assert latent.shape == (1, 6, 5, 5)
    torch.testing.assert_close(latent, want, rtol=0, atol=1e-9)


def test_decoded_images_are_clamped():
    model = three_level_tokenizer()
    model.decoder.conv_out.bias[:] = torch.tensor([50.0, -50.0, 0.0])
    images = model.decode(noise(1, 6, 5, 5))
    assert (images[:, 0] == 1).all()
    assert (images[:, 1] == -1).all()
    assert (images[:, 2].abs() < 1).any()


def decoder_of_large_images() -> Tokenizer:
    """512x512 pixels out of 16x16 tokens, four channels wide."""
    config = replace(
        tiny_config().tokenizer,
        sides=(1, 16),
        phi_of_scale=(0, 0),
        code_channels=4,
        multipliers=(1,) * 6,
        norm_groups=1,
    )
    model = Tokenizer(config).requires_grad_(False)
    fill_with_noise(model, torch.Generator().manual_seed(0))
    model.decoder.to(memory_format=torch.channels_last)
    return model


def test_a_large_image_in_float32_is_that_of_float64():
    """In the layout that decoders run in; torch's own group norm is off by 1e-4 there."""
    model, feature_map = decoder_of_large_images(), noise(1, 4, 16, 16)
    got = model.decode(feature_map.float())
    want = model.double().decode(feature_map)
    assert got.shape == (1, 3, 512, 512)
    assert want.std() > 0.2
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_its_definition_in_every_layout(layout, mean):
    norm = GroupNorm(2, 6, eps=1e-6).requires_grad_(False)
    norm.weight[:], norm.bias[:] = noise(6, seed=1), noise(6, seed=2)
    x_BCHW = noise(3, 6, 40, 50) + mean
    parts = x_BCHW.unflatten(1, (2, 3))
    centred = parts - parts.mean(dim=(2, 3, 4), keepdim=True)
    normed = centred / (centred.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-6).sqrt()
    weight, bias = (v.double()[:, None, None] for v in (norm.weight, norm.bias))
    got = norm(x_BCHW.float().to(memory_format=layout))
    assert got.is_contiguous(memory_format=layout)
    want = normed.flatten(1, 2) * weight + bias
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6 if mean == 0 else 5e-5)
