from __future__ import annotations

import re

import pytest

from depthvar import imagenet
from depthvar.config import MODELS, model_config
from depthvar.errors import InputError
from pipeline.request.classes import parse_classes
from pipeline.request.labels_file import read_labels_file

VAR = model_config("var-d16")


@pytest.mark.parametrize(
    ("index", "wordnet_id", "name"),
    [
        (0, "n01440764", "tench"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby"),
        (388, "n02510455", "giant panda"),
        (417, "n02782093", "balloon"),
        (979, "n09468604", "valley"),
        (985, "n11939491", "daisy"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_well_known_classes_are_where_everybody_has_them(index, wordnet_id, name):
    assert imagenet.WORDNET_IDS[index] == wordnet_id
    assert imagenet.CLASS_NAMES[index] == name


def test_there_are_a_thousand_ids_in_order():
    assert len(imagenet.WORDNET_IDS) == 1000
    assert list(imagenet.WORDNET_IDS) == sorted(set(imagenet.WORDNET_IDS))
    assert all(re.fullmatch(r"n\d{8}", i) for i in imagenet.WORDNET_IDS)


def test_every_name_is_unique_and_can_be_typed_in_a_list():
    folded = {name.casefold() for name in imagenet.CLASS_NAMES}
    assert len(folded) == 1000
    for name in imagenet.CLASS_NAMES:
        assert name.isascii()
        assert name.isprintable()
        assert name == name.strip()
        assert not set(name) & set(',"')
        assert not re.match(r"[0-9-]", name)


def test_only_the_published_models_have_wordnet_ids():
    for model in MODELS.values():
        is_imagenet = model.name.startswith("var-")
        assert (model.wordnet_ids == imagenet.WORDNET_IDS) is is_imagenet
        assert bool(model.other_names) is is_imagenet
    assert model_config("digits").wordnet_ids is None


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0", (0,)),
        ("998-999", (998, 999)),
        ("tench", (0,)),
        ("n01440764", (0,)),
        ("N02123045", (281,)),
        ("n15075141, 3-5, golden retriever", (3, 4, 5, 207, 999)),
        ("Tinca tinca", (0,)),
        ("polar bear", (296,)),
        ("cardigan", (474,)),
        ("Cardigan", (264,)),
        ("crane (bird),crane (machine)", (134, 517)),
        ("jack-o'-lantern", (607,)),
        ("all", tuple(range(1000))),
    ],
)
def test_classes_are_given_by_id_range_name_and_wordnet_id(text, ids):
    assert parse_classes(text, VAR.class_names, VAR.other_names) == ids


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1000", "0 to 999"),
        ("n00000001", "unknown class"),
        ("crane", "134, 517"),
        ("maillot", "638, 639"),
        ("tench,n01440764", "class 0 more than once"),
        ("golden retreiver", "'golden retriever'"),
    ],
)
def test_a_class_that_is_none_or_several_is_refused(text, told):
    with pytest.raises(InputError, match=told):
        parse_classes(text, VAR.class_names, VAR.other_names)


def test_every_class_is_found_by_its_name_and_by_its_wordnet_id():
    names = ",".join(imagenet.CLASS_NAMES)
    wordnet_ids = ",".join(imagenet.WORDNET_IDS)
    for text in (names, wordnet_ids):
        assert parse_classes(text, VAR.class_names, VAR.other_names) == tuple(range(1000))


def test_a_labels_file_takes_wordnet_ids(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("n01440764,2\ntoilet paper,3\n281\n")
    counts = read_labels_file(file, VAR.class_names, VAR.other_names)
    assert counts.as_mapping() == {0: 2, 281: 1, 999: 3}
