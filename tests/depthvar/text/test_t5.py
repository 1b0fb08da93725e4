"""The text encoder itself, on a tiny T5: the one file whose tests import `transformers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import depthvar.text.t5
from depthvar.errors import InputError
from depthvar.text.encoder_files import find_encoder
from depthvar.text.states import prompt_sha256
from depthvar.text.t5 import T5
from jobs import verify
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.shards.text_states import TEXT_FOLDER
from tests import fake_job
from tests.fakes import TEXT_MODEL, fake_image
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
    encode = find_encoder(str(folder)).load("cpu", half=False)
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
    encoder = T5(folder, "cpu", half=True)
    dtypes = {n.rpartition(".wo.")[1]: p.dtype for n, p in encoder._model.named_parameters()}
    assert dtypes == {".wo.": torch.float32, "": torch.float16}
    for states, prompt in zip(encoder(PROMPTS), PROMPTS, strict=True):
        assert states.dtype == np.float16  # of the last norm: storing it so loses nothing
        assert np.abs(states - reference(folder, prompt)).max() < 0.02


def test_an_encoder_saved_alone_gives_the_same(folder: Path, tmp_path: Path):
    alone = T5(write_tiny_t5(tmp_path / "alone", whole=False), "cpu", half=False)
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
        T5(broken, "cpu", half=False)(["fox"])
    save_file({n: t for n, t in tensors.items() if n != query}, broken / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks 1 tensors of its encoder, the first {query}"):
        T5(broken, "cpu", half=False)
    save_file(tensors | {query: tensors[query][:8]}, broken / "model.safetensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        T5(broken, "cpu", half=False)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        find_encoder(str(broken)).check(["fox"], width=WIDTH, max_tokens=8)


def test_a_job_makes_every_image_from_the_states_of_its_prompt(tmp_path: Path, capsys):
    folder = write_tiny_t5(tmp_path / "t5", width=TEXT_MODEL.text_width)
    (tmp_path / "prompts.txt").write_text("a red fox\na cat in the snow\nthe photo\n")
    out = tmp_path / "out"
    job = [
        f"--out={out}", f"--model={TEXT_MODEL.name}", f"--prompts={tmp_path / 'prompts.txt'}",
        "--per-class=2", f"--text-encoder={folder}", "--workers=0", "--device=cpu",
    ]  # fmt: skip
    assert fake_job.main(job) == 0
    assert "note: 3 prompts are encoded before the first image" in capsys.readouterr().err
    (states,) = (out / TEXT_FOLDER).iterdir()
    made = load_file(states)
    for sample in iterate_samples(open_dataset(str(out))):
        prompt = str(sample.prompt)
        found, wanted = made[prompt_sha256(prompt)], reference(folder, prompt)
        assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
        pixels = fake_image(found, 0, int(sample.key), 32, 3)
        assert np.array_equal(sample.image, pixels)
    assert verify.main([str(out), "--deep"]) == 0

    (tmp_path / "prompts.txt").write_text("a cat\n" + "fox " * 600)
    new = ["--out", str(tmp_path / "new")]
    with pytest.raises(InputError, match=r"prompt of 601 tokens, 'fox fox fox"):
        fake_job.main([*job, *new])
    with pytest.raises(InputError, match="has states of width 32, wanted 4: give the model's own"):
        fake_job.main([*job, *new, f"--text-encoder={write_tiny_t5(tmp_path / 'wide')}"])
    assert not (tmp_path / "new").exists()
