"""The text encoder itself, on a tiny T5: the one file whose tests import `transformers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import depthvar.text.t5
from depthvar.errors import InputError
from depthvar.sampling import Sampler
from depthvar.text.encoder_files import find_encoder
from depthvar.text.t5 import T5
from depthvar.weights.checkpoint import save_model
from jobs import generate, verify
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.request.plan_file import stored_plan
from pipeline.shards.text_states import TEXT_FOLDER, TextStates
from pipeline.storage import Storage
from tests.fake_shards import data_files
from tests.tiny_models import tiny_text_model
from tests.tiny_t5 import WIDTH, write_tiny_t5

PROMPTS = ["a photo of a red fox in the snow, zebra", "fox", "the cat", "a red cat", "quick\u00e9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_t5(tmp_path_factory.mktemp("t5"))


def reference(folder: Path, prompt: str) -> np.ndarray:
    """The last hidden state of one prompt alone, by the whole T5 as its own library runs it."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    with torch.inference_mode():
        return model.encoder(**tokens).last_hidden_state[0].numpy()


def test_states_are_those_of_every_token_and_of_the_end_whatever_else_is_in_the_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = find_encoder(str(folder)).load("cpu", half=False, threads=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    together = encode(PROMPTS)
    monkeypatch.setattr(depthvar.text.t5, "_BATCH_TOKENS", 8)
    in_small_batches = encode(PROMPTS)
    for prompt, states, others in zip(PROMPTS, together, in_small_batches, strict=True):
        wanted = reference(folder, prompt)
        assert states.dtype == np.float32
        assert states.shape == wanted.shape
        tolerance = 1e-6 * np.abs(wanted).max()
        assert np.abs(states - wanted).max() < tolerance
        assert np.abs(others - wanted).max() < tolerance
    assert together[1].shape == (2, WIDTH)  # "fox" and the end


def test_half_precision_keeps_the_products_that_overflow_in_float32(folder: Path):
    encoder = T5(folder, "cpu", half=True, threads=1)
    dtypes = {n.rpartition(".wo.")[1]: p.dtype for n, p in encoder._model.named_parameters()}
    assert dtypes == {".wo.": torch.float32, "": torch.float16}
    for states, prompt in zip(encoder(PROMPTS), PROMPTS, strict=True):
        assert states.dtype == np.float16  # of the last norm: storing it so loses nothing
        assert np.abs(states - reference(folder, prompt)).max() < 0.02


def test_an_encoder_saved_alone_gives_the_same(folder: Path, tmp_path: Path):
    alone = T5(write_tiny_t5(tmp_path / "alone", whole=False), "cpu", half=False, threads=1)
    assert alone(["fox"])[0].shape == (2, WIDTH)


def test_a_prompt_of_too_many_tokens_is_refused_with_its_length_and_beginning(folder: Path):
    found = find_encoder(str(folder))
    found.check(["fox " * 7, "cat"], width=WIDTH, max_tokens=8)
    with pytest.raises(
        InputError, match=r"prompt of 9 tokens, 'fox fox .*'\.\.\., wanted at most 8"
    ):
        found.check(["cat", "fox " * 8], width=WIDTH, max_tokens=8)
    with pytest.raises(InputError, match="has states of width 32, wanted 2048"):
        found.check(["cat"], width=2048, max_tokens=8)


def test_weights_that_do_not_fit_and_states_that_are_no_numbers_are_told(
    folder: Path, tmp_path: Path
):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file(tensors | {query: tensors[query] * np.nan}, broken / "model.safetensors")
    with pytest.raises(InputError, match="states of 'fox' are no numbers: its weights are damaged"):
        T5(broken, "cpu", half=False, threads=1)(["fox"])
    save_file({n: t for n, t in tensors.items() if n != query}, broken / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks 1 tensors of its encoder, the first {query}"):
        T5(broken, "cpu", half=False, threads=1)
    save_file(tensors | {query: tensors[query][:8]}, broken / "model.safetensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        T5(broken, "cpu", half=False, threads=1)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        find_encoder(str(broken)).check(["fox"], width=WIDTH, max_tokens=8)


def test_a_job_makes_every_image_from_the_states_of_its_prompt(tmp_path: Path, capsys):
    """`depthvar generate` from words to pixels, with a real encoder and a real text model, tiny."""
    model = tiny_text_model(0, torch.float32)
    weights, out = tmp_path / "tiny-infinity", tmp_path / "out"
    save_model(weights, model.config, model.transformer, model.tokenizer, dtype=torch.float32)
    encoder = write_tiny_t5(tmp_path / "t5", width=model.config.text_width)
    (tmp_path / "templates.txt").write_text("a {class} in the snow\nthe {class}\n")
    job = [
        f"--model={weights}", f"--text-encoder={encoder}", "--class-names=red fox,cat", "--seed=3",
        f"--templates={tmp_path / 'templates.txt'}", "--per-class=4", "--samples-per-shard=5",
        "--batch-size=3", "--reference-scale=2", "--workers=0", "--device=cpu",
    ]  # fmt: skip
    assert generate.main([*job, f"--out={out}"]) == 0
    assert "note: 4 prompts are encoded before the first image" in capsys.readouterr().err
    plan = stored_plan(Storage.open(str(out)))
    sampler = Sampler(model, plan.runnable_policy, plan.sampling)
    samples = list(iterate_samples(open_dataset(str(out))))
    assert len({sample.prompt for sample in samples}) > 2
    states = TextStates(Storage.open(str(out)), str(plan.text_encoder_sha256))
    for first, last in ((0, 3), (3, 5), (5, 8)):
        found = [states.of(str(sample.prompt)) for sample in samples[first:last]]
        for sample, ours in zip(samples[first:last], found, strict=True):
            wanted = reference(encoder, str(sample.prompt))
            assert np.abs(ours - wanted).max() < 1e-6 * np.abs(wanted).max()
        given = [torch.from_numpy(ours) for ours in found]
        images = sampler(given, seed=3, indices=range(first, last)).images_BHWC
        assert np.array_equal(images, [sample.image for sample in samples[first:last]])

    whole = data_files(out)
    for file in (out / "commits" / "00001.json", *(out / TEXT_FOLDER).iterdir()):
        file.unlink()
    assert generate.main([*job, f"--out={out}"]) == 0
    assert data_files(out) == whole
    argv = [str(out), "--deep", "--regenerate=8", f"--weights={weights}", "--device=cpu"]
    assert verify.main(argv) == 0
    assert "regenerated 8 images: 8 exact" in capsys.readouterr().out

    new = f"--out={tmp_path / 'new'}"
    with pytest.raises(InputError, match=r"prompt of 10 tokens, 'a red fox red fox .*at most 9"):
        generate.main([*job, new, "--class-names=cat,red fox red fox red"])
    with pytest.raises(InputError, match="has states of width 32, wanted 10: give the model's own"):
        generate.main([*job, new, f"--text-encoder={write_tiny_t5(tmp_path / 'wide')}"])
    assert not (tmp_path / "new").exists()
