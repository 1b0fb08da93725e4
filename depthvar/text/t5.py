"""The T5 encoder of `transformers`, which is imported when one is loaded: that takes seconds."""

# B prompts of one batch, T tokens of the longest, C width.

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from depthvar.errors import InputError, shown
from depthvar.text.encoder_files import require_transformers

Found = TypeVar("Found")
_BATCH_TOKENS = 8192  # padding included: attention over the longest prompts takes half a gigabyte


class T5:
    """Gives the states of prompts: the last hidden state of each token, its end included.

    `half`: weights and states are float16, save for the `wo` matrices, whose products overflow
    there. `threads` of the process from here on: on CPUs they decide the last bit. Errors:
    `InputError` where the files do not fit or cannot be read.
    """

    def __init__(self, folder: Path, device: str, *, half: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self._tokenizer = load_tokenizer(folder)
        model, found = _reading(
            folder,
            lambda: _transformers().T5EncoderModel.from_pretrained(
                folder,
                dtype=torch.float16 if half else torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
        missing = sorted(found["missing_keys"])
        if missing:
            raise InputError(
                f"{folder} lacks {len(missing)} tensors of its encoder, the first {missing[0]}:"
                " fetch it again"
            )
        self._model = model.eval().to(device)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The states (tokens, width) of each prompt; which others are beside it plays no part."""
        tokens: list[list[int]] = self._tokenizer(list(prompts))["input_ids"]
        states: dict[int, np.ndarray] = {}
        for batch in _batches([len(ids) for ids in tokens]):
            lengths = torch.tensor([len(tokens[i]) for i in batch])
            longest = int(lengths.max())
            ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)  # the mask hides the rest
            for row, i in enumerate(batch):
                ids_BT[row, : len(tokens[i])] = torch.tensor(tokens[i])
            mask_BT = torch.arange(longest) < lengths[:, None]
            hidden_BTC = self._model(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
            ).last_hidden_state
            hidden = hidden_BTC.cpu().numpy()
            states |= {i: hidden[row, : len(tokens[i])] for row, i in enumerate(batch)}
        for i, prompt in enumerate(prompts):
            if not np.isfinite(states[i]).all():
                raise InputError(
                    f"the text encoder's states of {shown(prompt)} are no numbers: its weights are"
                    " damaged, or too large for half precision: use --precision float32"
                )
        return [states[i] for i in range(len(prompts))]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in an encoder's folder. Errors: `InputError`."""
    return _reading(
        folder,
        lambda: _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The places of prompts in batches of like length, of at most `_BATCH_TOKENS` with padding."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * lengths[place] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _transformers() -> Any:
    require_transformers()
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _reading(folder: Path, read: Callable[[], Found]) -> Found:
    """What `read` makes of a folder, whose errors of files that do not fit share no base."""
    try:
        return read()
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"the text encoder in {folder} cannot be loaded ({lines[0]}): save model and tokenizer"
            " again with save_pretrained, or fetch them again"
        ) from error
