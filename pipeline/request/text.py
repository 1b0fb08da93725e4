"""Where the states of prompts come from: a text encoder, or a file of states."""

from __future__ import annotations

from pathlib import Path

from depthvar.text.encoder_files import (
    DEFAULT_ENCODER,
    FoundEncoder,
    find_encoder,
    require_transformers,
)
from depthvar.text.states import GivenStates
from pipeline.request.weights import local_encoder

TextSource = FoundEncoder | GivenStates


def find_text(encoder: str | None, states: str | None) -> TextSource:
    """The encoder by folder, URI or repository, or the file of states in its place.

    An encoder at a URI or in a repository is fetched into a cache; the default is the one of the
    published models. Loads no weights. Errors: `InputError` for what is missing or none.
    """
    if states is not None:
        return GivenStates(Path(states))
    require_transformers()
    return find_encoder(local_encoder(encoder or DEFAULT_ENCODER))
