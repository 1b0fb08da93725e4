"""A T5 text encoder and its tokenizer, as `transformers` saves them: found, checked and hashed.

    config.json  model.safetensors (or its parts and index)  tokenizer.json  [tokenizer_config.json]

The encoder alone or the whole T5: what else the files hold is not loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from depthvar.errors import InputError
from depthvar.strict_json import read_json
from depthvar.text.states import Encode
from depthvar.weights.files import from_hub, sha256_of, shards_of

DEFAULT_ENCODER = "google/flan-t5-xl"
WANTED_ENCODER = (
    "a text encoder as save_pretrained of model and tokenizer write it, with config.json,"
    " model.safetensors (or its parts) and tokenizer.json: check --text-encoder"
)
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_FILES = ("config.json", _INDEX, "model*.safetensors", "*token*.json")
_PACKAGE = "transformers"
_WIDE = "layer.1.DenseReluDense.wo.weight"
_SHOWN_PROMPT = 100


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder's files; `width`: channels of its states. Parameters of the encoder alone.

    `num_wide` are those that stay float32 in half precision, where they would overflow.
    """

    folder: Path
    files: tuple[Path, ...]
    width: int
    num_parameters: int
    num_wide: int

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over names and bytes of all files, which are read when it is first asked for."""
        lines = [f"{path.name} {sha256_of(path)}\n" for path in self.files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def num_bytes(self, *, half: bool) -> int:
        """What the weights take in memory."""
        narrow = self.num_parameters - self.num_wide
        return 4 * self.num_wide + (2 if half else 4) * narrow

    def check(self, prompts: Iterable[str], *, width: int, max_tokens: int) -> None:
        """`InputError` for states of another width, and for a prompt of too many tokens."""
        from depthvar.text.t5 import load_tokenizer

        if self.width != width:
            raise InputError(
                f"the text encoder in {self.folder} has states of width {self.width}, wanted"
                f" {width}: give the model's own as --text-encoder"
            )
        prompts = list(prompts)
        tokens = load_tokenizer(self.folder)(prompts)["input_ids"]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > max_tokens:
                raise InputError(
                    f"got a prompt of {len(ids)} tokens, {prompt[:_SHOWN_PROMPT]!r}..., wanted at"
                    f" most {max_tokens}, its end included: shorten it, nothing is cut off here"
                )

    def load(self, device: str, *, half: bool, threads: int) -> Encode:
        """The encoder, ready on a device. Errors: `InputError` for weights that do not fit."""
        from depthvar.text.t5 import T5

        return T5(self.folder, device, half=half, threads=threads)


def require_transformers() -> None:
    """`InputError` where the package that runs text encoders is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise InputError(
            f"a text encoder needs {_PACKAGE}, which is not installed: pip install"
            f" '{_PACKAGE}>=5', or give --text-states"
        )


def encoder_files(names: Collection[str]) -> tuple[str, ...]:
    """Which of the files in a folder belong to an encoder; () where a part is missing."""
    chosen = sorted(n for n in names if any(fnmatch(n, wanted) for wanted in _FILES))
    has_weights = any(name.endswith(".safetensors") for name in chosen)
    is_whole = has_weights and {"config.json", _TOKENIZER} <= {*chosen}
    return tuple(chosen) if is_whole else ()


def find_encoder(place: str) -> FoundEncoder:
    """The encoder in a local folder or a Hugging Face repository, which is fetched into its cache.

    No tensor is loaded. Errors: `InputError` for what holds none, or a damaged one.
    """
    folder = Path(place)
    if not folder.is_dir():
        folder = Path(from_hub(place, _FILES) or place)
    if not folder.is_dir():
        raise InputError(f"{place} does not exist, wanted a folder: check --text-encoder")
    held = [path.name for path in folder.iterdir() if path.is_file()]
    names = encoder_files(held)
    if not names:
        listed = ", ".join(sorted(held)[:8]) or "no files"
        raise InputError(f"{folder} holds {listed}, wanted {WANTED_ENCODER}")
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "t5":
        raise InputError(
            f"{folder} holds a model of type {kind!r}, wanted the encoder of a T5 such as"
            f" {DEFAULT_ENCODER}: check --text-encoder"
        )
    shapes = _shapes(folder)
    width = config.get("d_model")
    wanted = {f"encoder.block.{i}.{_WIDE}" for i in range(config.get("num_layers") or 1)}
    norm = "encoder.final_layer_norm.weight"
    if not {norm, *wanted} <= shapes.keys() or shapes[norm] != (width,):
        raise InputError(
            f"{folder} holds weights without the {config.get('num_layers')} encoder blocks of width"
            f" {width} that its config.json tells of: fetch it again, or check --text-encoder"
        )
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return FoundEncoder(
        folder,
        tuple(folder / name for name in names),
        width,
        num_parameters=sum(sizes.values()),
        num_wide=sum(sizes[name] for name in sizes if name.endswith(_WIDE)),
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the encoder's tensors by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    index = folder / _INDEX
    for path in shards_of(index) if index.is_file() else [folder / "model.safetensors"]:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if name == "shared.weight" or name.startswith("encoder."):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}): fetch it again") from error
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)  # the same tensor by another name
    return shapes
