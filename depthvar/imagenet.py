"""The 1,000 classes of ImageNet-1k, in the order of the published models' labels.

The order is that of the WordNet ids. The names are the WordNet lemmas of each id; where two classes
share the first one it is told apart ("crane (bird)", "crane (machine)", "maillot (tights)") or a
later one stands in ("tank suit", "Cardigan Welsh corgi"), so that every name is unique.

Source: ILSVRC 2012 (Russakovsky et al., arXiv 1409.0575) and WordNet 3.0.
"""

from __future__ import annotations

import json
from importlib import resources
from types import MappingProxyType

_FILE = "imagenet_classes.json"


def _lemmas() -> dict[str, tuple[str, ...]]:
    text = resources.files("depthvar.models").joinpath(_FILE).read_text(encoding="utf-8")
    return {wordnet_id: tuple(names) for wordnet_id, names in json.loads(text).items()}


LEMMAS = MappingProxyType(_lemmas())
"""WordNet id -> the name of the class, then its synonyms; several classes may share a synonym."""

WORDNET_IDS: tuple[str, ...] = tuple(LEMMAS)
CLASS_NAMES: tuple[str, ...] = tuple(names[0] for names in LEMMAS.values())
