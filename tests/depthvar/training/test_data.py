import hashlib

import torch

from depthvar.training.data import ImageSet, augment, digit_scenes, digits, to_float
from depthvar.training.recipe import Augmentation


def test_held_out_digits_are_balanced_fixed_and_never_trained_on():
    train_set, held_out = digits("train"), digits("held-out")
    assert train_set.labels_N.bincount().tolist() == [400] * 10
    assert held_out.labels_N.bincount().tolist() == [100] * 10
    pixels = held_out.images_NCHW.numpy().tobytes() + held_out.labels_N.numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest().startswith(HELD_OUT_SHA256)
    trained = {image.numpy().tobytes() for image in train_set.images_NCHW}
    assert not any(image.numpy().tobytes() in trained for image in held_out.images_NCHW)


HELD_OUT_SHA256 = "1e026f975d119c14"


def test_digits_are_centred_in_32_pixels():
    images = digits("held-out").images_NCHW
    assert images.shape == (1000, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert images[:, :, :2].max() == 0
    assert images[:, :, :, -2:].max() == 0


def test_a_scene_is_an_unaltered_digit_of_its_split_somewhere_on_a_larger_canvas():
    real, scenes = digits("held-out"), digit_scenes("held-out")
    assert scenes.images_NCHW.shape == (1000, 1, 48, 48)
    assert torch.equal(scenes.labels_N, real.labels_N)
    corners = set()
    for scene, digit in zip(scenes.images_NCHW[::50, 0], real.images_NCHW[::50, 0], strict=True):
        (top, left), (y, x) = scene.nonzero().amin(0).tolist(), digit.nonzero().amin(0).tolist()
        corners.add((top - y, left - x))
        found = scene[top - y : top - y + 32, left - x : left - x + 32]
        assert torch.equal(found, digit)
        assert scene.count_nonzero() == digit.count_nonzero()
    assert len(corners) > 15
    assert torch.equal(digit_scenes("held-out").images_NCHW, scenes.images_NCHW)


def test_training_scenes_have_every_training_digit_at_four_places():
    scenes = digit_scenes("train")
    assert scenes.labels_N.bincount().tolist() == [1600] * 10
    inks = scenes.images_NCHW.long().sum(dim=(1, 2, 3)).view(4, 4000)
    assert (inks == digits("train").images_NCHW.long().sum(dim=(1, 2, 3))).all()
    assert len(scenes.images_NCHW[::4000].flatten(1).unique(dim=0)) == 4


def test_a_split_holds_out_the_share_asked_for_and_loses_nothing():
    data = digits("held-out")
    train_set, held_out = data.split(0.1)
    assert len(train_set) == 900
    assert len(held_out) == 100
    assert held_out.labels_N.bincount().min() > 0


def test_no_class_is_held_out_whole():
    """Classes of one image, of two, of nine; the tenth image of all is the first class of one."""
    labels = torch.tensor([0] * 9 + [1] + [2] * 2 + [3])
    data = ImageSet(torch.arange(13).view(13, 1, 1, 1), labels, ("a", "b", "c", "d"))
    for share in (0.01, 0.1, 0.3, 0.5, 0.99):
        train_set, held_out = data.split(share)
        assert set(train_set.labels_N.tolist()) == {0, 1, 2, 3}
        both = torch.cat([train_set.images_NCHW, held_out.images_NCHW]).flatten()
        assert sorted(both.tolist()) == list(range(13))


def test_a_set_of_one_image_is_trained_on_and_nothing_held_out():
    train_set, held_out = ImageSet(torch.zeros(1, 1, 2, 2), torch.tensor([0]), ("a",)).split(0.1)
    assert (len(train_set), len(held_out)) == (1, 0)


def test_augmentation_of_no_range_changes_nothing():
    images = to_float(digits("held-out").images_NCHW[:8])
    still = Augmentation(degrees=0, zoom=0, shear=0, shift=0)
    same = augment(images, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, atol=1e-4, rtol=0)


def test_flipping_mirrors_about_half_of_the_images():
    images = to_float(digits("held-out").images_NCHW[:200])
    flip = Augmentation(degrees=0, zoom=0, shear=0, shift=0, flip=True)
    flipped = augment(images, flip, torch.Generator().manual_seed(0))
    mirrored = [
        torch.allclose(after, before.flip(-1), atol=1e-3)
        for before, after in zip(images, flipped, strict=True)
    ]
    assert 70 < sum(mirrored) < 130


def test_augmentation_depends_on_its_generator_alone():
    images = to_float(digits("held-out").images_NCHW[:8])
    a, b, c = (
        augment(images, Augmentation(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
