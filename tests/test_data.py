"""data.py: fields stay aligned, nothing leaks, broken files end in one sentence, layouts come back."""

import json
import os
import re
import shutil
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sh
from PIL import Image

import data
from common import confusion_of, save_label
from data import DataError, Draws, Sample, load, read_label

SUPERVISIONS = list(data.REVEALS)
LABELS, LAYOUTS = set(data.REVEALS["full"]), ("voc", "coco", "workpiece")
REAL = Path(os.environ.get("WSSS_DATA", "none")) / "VOC2012"
real = pytest.mark.skipif(not REAL.is_dir(), reason="WSSS_DATA names no folder with VOC2012")


def args(name, root="", supervision="full", train_list="train"):
    return types.SimpleNamespace(data=name, root=str(root), supervision=supervision,
                                 train_list=str(train_list))


def rng(seed=0):
    return np.random.default_rng(seed)


def command(monkeypatch, capsys, *argv):
    """data.py's command line in this process -> (exit status or message, what it printed)."""
    monkeypatch.setattr("sys.argv", ["data.py", *map(str, argv)])
    status = 0
    try: data.main()
    except SystemExit as end: status = end.code
    return status, capsys.readouterr().out


def exported(folder, layout, n=5):
    data.export("shapes", layout, str(folder), n)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{layout: folder} of five train and five val scenes; tests that change files take a copy."""
    return {layout: exported(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


@pytest.fixture
def voc(exports, tmp_path):
    """A copy of the exported VOC folder, VOC2012 itself."""
    return Path(shutil.copytree(exports["voc"] / "VOC2012", tmp_path / "VOC2012"))


@pytest.fixture
def work(exports, tmp_path):
    """A copy of the exported folder of one's own."""
    return Path(shutil.copytree(exports["workpiece"], tmp_path / "work"))


@pytest.fixture
def coco(exports, tmp_path):
    """A copy of the exported COCO folder."""
    return Path(shutil.copytree(exports["coco"], tmp_path / "coco", ignore=shutil.ignore_patterns("masks")))


def png(path, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


# ---------------------------------------------------------------- transforms


CELL = 12                                       # label maps are cells of this side: a shift by one shows


def cells(x, y, classes=8):
    """The label that stands at position (x, y) of `painted`."""
    return (x // CELL + 3 * (y // CELL)).astype(int) % (classes + 1)


def painted(height=84, width=132):
    """A sample whose image holds its coordinates (red = 2 y, green = x + 60), with labels that follow."""
    y, x = np.mgrid[:height, :width]
    label = cells(x, y).astype(np.uint8)
    image = np.stack([2 * y, x + 60, 0 * x], axis=-1).astype(np.uint8)
    boxes = np.array([[1, 24, 12, 60, 48], [3, 0, 0, 132, 84], [2, 96, 60, 132, 84]], np.float32)
    points = np.array([[1, 30.5, 18.5], [2, 131.5, 83.5], [5, 0.5, 0.5], [4, 66.5, 42.5]], np.float32)
    return Sample(name="painted", image=image, tags=np.arange(8) < 5, boxes=boxes, points=points, mask=label,
                  instances=label.copy(), scribble=label.copy(), seed=label.copy(), pseudo=label.copy())


def where(s):
    """Original coordinates (x, y) that the image's colours tell, and which pixels are no padding."""
    image = s.image.astype(float)
    return image[..., 1] - 60, image[..., 0] / 2, image[..., 2] < 50


def shrunk(mask, pixels):
    for _ in range(pixels):
        mask = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    return mask


def assert_aligned(s, original, tolerance):
    """Labels, boxes and points name the place that the image's colours name; blurred borders are left out."""
    x, y, inside = where(s)
    assert inside.mean() > 0.1
    clear = np.abs((x + 0.5) % CELL - CELL / 2) < CELL / 2 - tolerance
    clear &= np.abs((y + 0.5) % CELL - CELL / 2) < CELL / 2 - tolerance
    clear &= shrunk(inside, 1)
    assert clear.sum() > 100
    for key in data.LABEL_MAPS:
        label = getattr(s, key)
        assert label.dtype == np.uint8 and label.shape == s.image.shape[:2]
        assert (label[clear] == cells(np.round(x[clear]), np.round(y[clear]))).all(), key
        assert (label[~inside] == 255).all() and (label[inside] != 255).all(), key
    known = {k: (px, py) for k, px, py in original.points}
    for k, px, py in s.points:
        i, j = int(py), int(px)
        assert inside[i, j]
        assert abs(x[i, j] + 0.5 - known[k][0]) <= tolerance, k
        assert abs(y[i, j] + 0.5 - known[k][1]) <= tolerance, k
    corners = {k: rest for k, *rest in original.boxes}
    for k, *box in s.boxes:
        check_box(k, box, corners[k], (x, y, inside), tolerance)


def check_box(k, box, corners, seen, tolerance):
    """Colours at the box's four sides name the sides of the original box, unless it was clipped there."""
    (x, y, inside), (x0, y0, x1, y1) = seen, (round(v) for v in box)
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    i, j = (y0 + y1) // 2, (x0 + x1) // 2
    if x0 > columns[0]: assert abs(min(x[i, x0], x[i, x1 - 1]) - corners[0]) <= tolerance, k
    if x1 <= columns[-1]: assert abs(max(x[i, x0], x[i, x1 - 1]) + 1 - corners[2]) <= tolerance, k
    if y0 > rows[0]: assert abs(y[y0, j] - corners[1]) <= tolerance, k
    if y1 <= rows[-1]: assert abs(y[y1 - 1, j] + 1 - corners[3]) <= tolerance, k


GEOMETRY = {
    "resize": lambda s: data.resize(s, (60, 150)), "larger": lambda s: data.rescale(s, 1.5),
    "smaller": lambda s: data.rescale(s, 0.6), "long": lambda s: data.resize_long(s, 100), "flip": data.flip,
    "crop": lambda s: data.crop(s, 70, rng(1)), "pad": lambda s: data.crop(s, 140, rng(2)),
    "both": lambda s: data.crop(s, 100, rng(3)),
    "all": lambda s: data.crop(data.flip(data.rescale(s, 1.3)), 120, rng(4)),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_all_fields_stay_aligned(name):
    s, before = painted(), painted()
    out = GEOMETRY[name](s)
    assert_aligned(out, s, 0 if name in ("flip", "crop", "pad", "both") else 2)     # 0: no interpolation
    for key, value in vars(before).items():     # and the given sample stays as it was
        assert np.array_equal(getattr(s, key), value)


def test_the_alignment_check_sees_a_shift():
    s = painted()
    for key in ("mask", "boxes", "points"):
        broken = data.changed(data.flip(s), **{key: getattr(s, key)})
        with pytest.raises(AssertionError): assert_aligned(broken, s, 1)


def test_flipping_twice_is_nothing():
    s, again = painted(), data.flip(data.flip(painted()))
    for key, value in vars(s).items(): assert np.array_equal(getattr(again, key), value), key


def test_label_maps_are_never_mixed():
    label = rng().choice([0, 3, 8, 255], (20, 30)).astype(np.uint8)
    s = data.changed(painted(20, 30), mask=label)
    assert np.array_equal(data.rescale(s, 2).mask, label.repeat(2, axis=0).repeat(2, axis=1))
    assert set(np.unique(data.rescale(s, 0.37).mask)) <= {0, 3, 8, 255}
    assert set(np.unique(data.rescale(s, 1.37).mask)) == {0, 3, 8, 255}


def test_sizes_after_scaling():
    s = painted(84, 132)
    assert data.resize_long(s, 66).image.shape == (42, 66, 3)
    assert data.rescale(s, 0.5).mask.shape == (42, 66) and data.rescale(s, 0.001).image.shape == (1, 1, 3)
    assert data.rescale(s, 0.5).boxes[0].tolist() == [1, 12, 6, 30, 24]


def test_padding_is_the_mean_colour_and_no_label():
    out = data.crop(painted(40, 50), 90, rng(5))
    outside = out.mask == 255
    assert outside.sum() == 90 * 90 - 40 * 50
    assert (out.image[outside] == np.round(np.array(data.MEAN) * 255)).all()
    assert abs(data.normalise(out).image[:, torch.tensor(outside)]).max() < 0.02


def test_crops_and_paddings_reach_every_position():
    def places(size):                           # where column 0 and row 0 of the picture end up
        crops = (data.crop(painted(24, 25), size, rng(i)) for i in range(300))
        corner = (lambda c: np.argwhere(c.mask != 255)[0]) if size > 24 else (lambda c: c.image[0, 0, :2])
        return {tuple(corner(c).tolist()) for c in crops}
    assert len(places(22)) == 3 * 4 and len(places(27)) == 4 * 3


def test_boxes_are_clipped_and_lost_things_dropped():
    s = painted()
    out = data.crop(s, 60, types.SimpleNamespace(integers=lambda low, high: 0))     # the corner at (0, 0)
    assert out.boxes.tolist() == [[1, 24, 12, 60, 48], [3, 0, 0, 60, 60]]           # the third is outside
    assert out.points.tolist() == [[1, 30.5, 18.5], [5, 0.5, 0.5]]
    assert out.tags.tolist() == s.tags.tolist()


@pytest.mark.parametrize("field,expected", [("mask", {5}), ("boxes", {1, 3}), ("points", {1}),
                                            ("scribble", {5}), (None, set(range(1, 9)))])
def test_tags_after_a_crop(field, expected):
    """The 10 x 10 window at x = 24, y = 12 is one cell of label 5; without labels nobody can know."""
    whole = painted()
    s = Sample(name=whole.name, image=whole.image, tags=np.ones(8, bool))
    if field: s = data.changed(s, **{field: getattr(whole, field)})
    corner = iter((12, 24))
    out = data.crop(s, 10, types.SimpleNamespace(integers=lambda low, high: next(corner)), tags=True)
    assert set(np.flatnonzero(out.tags) + 1) == expected and out.tags.dtype == bool
    assert data.crop(s, 10, rng()).tags.all()                           # without tags=True they stay


def test_colour_jitter_means_what_torchvision_means():
    from torchvision.transforms import functional as F
    s = data.draw_scene(0, "train", 0)
    image = Image.fromarray(s.image)
    for amounts, adjust, factor in (((0.4, 0, 0, 0), F.adjust_brightness, rng(3).uniform(0.6, 1.4)),
                                    ((0, 0.4, 0, 0), F.adjust_contrast, rng(3).uniform(0.6, 1.4)),
                                    ((0, 0, 2.0, 0), F.adjust_saturation, rng(3).uniform(0, 3)),
                                    ((0, 0, 0, 0.1), F.adjust_hue, rng(3).uniform(-0.1, 0.1))):
        out = data.color_jitter(s, rng(3), *amounts)
        assert np.array_equal(out.image, np.array(adjust(image, factor)))
        assert not np.array_equal(out.image, s.image) and out.mask is s.mask
    assert np.array_equal(data.color_jitter(s, rng(3)).image, s.image)
    several = [data.color_jitter(s, rng(i), 0.3, 0.3, 0.3, 0.1).image for i in (1, 1, 2)]
    assert np.array_equal(several[0], several[1]) and not np.array_equal(several[0], several[2])


def test_normalise():
    s = painted()
    out = data.normalise(s)
    assert out.image.shape == (3, 84, 132) and out.image.dtype == torch.float32
    assert out.mask.dtype == torch.int64 and out.seed.dtype == torch.int64
    assert out.tags.dtype == out.boxes.dtype == out.points.dtype == torch.float32
    expected = (s.image[10, 20] / 255 - np.array(data.MEAN)) / np.array(data.STD)
    assert np.allclose(out.image[:, 10, 20], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 35), (37, 61), (90, 130)])
def test_test_scales_are_filtered_like_training_scales(size):
    image = rng().integers(0, 256, (60, 100, 3), np.uint8)
    trained = data.normalise(data.resize(Sample(image=image), size)).image
    tested = data.resize_batch(data.normalise(Sample(image=image)).image[None], size)[0]
    step = 1 / 255 / min(data.STD)                  # pictures are rounded to grey values, row- and columnwise
    assert (trained - tested).abs().max() < 1.01 * step


def test_collate():
    samples = [data.normalise(data.crop(painted(), 64, rng(i))) for i in range(3)]
    batch = data.collate(samples)
    assert batch.image.shape == (3, 3, 64, 64) and batch.tags.shape == (3, 8)
    assert batch.pseudo.shape == (3, 64, 64) and batch.pseudo.dtype == torch.int64
    assert batch.name == ["painted"] * 3 and len(batch.boxes) == len(batch.points) == 3
    assert torch.equal(batch.boxes[1], samples[1].boxes) and torch.equal(batch.mask[2], samples[2].mask)


# ---------------------------------------------------------------- draws


def augment(s, rng):
    """What trainings do, at module level so that any kind of worker process can have it."""
    return data.normalise(data.crop(data.rescale(s, float(rng.uniform(0.8, 1.2))), 48, rng))


def test_draws_are_the_same_whatever_the_workers():
    draws = Draws(load(args("shapes", supervision="box"), "train"), augment, seed=4)
    part = torch.utils.data.Subset(draws, range(6, 14))                 # a run that goes on in the middle
    runs = [list(torch.utils.data.DataLoader(part, batch_size=4, num_workers=n, collate_fn=data.collate))
            for n in (0, 2)]
    for one, two in zip(*runs, strict=True):
        assert one.name == two.name and torch.equal(one.image, two.image)
        assert all(torch.equal(a, b) for a, b in zip(one.boxes, two.boxes, strict=True))
    again = draws[9]
    assert again.name == runs[0][0].name[3] and torch.equal(again.image, runs[0][0].image[3])


def test_an_epoch_takes_each_picture_once_and_epochs_and_seeds_differ(work):
    dataset = load(args("workpiece", work, "image"), "train")
    def names(seed, epoch):
        draws = Draws(dataset, lambda s, rng: s.name, seed)
        return tuple(draws[epoch * 5 + i] for i in range(5))
    orders = [names(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == dataset.names for order in orders) and len(set(orders)) > 4
    assert len(Draws(dataset, None, 0)) > 10 ** 9
    numbers = [Draws(dataset, lambda s, rng: rng.random(), seed)[n] for seed in range(3) for n in range(10)]
    assert len(set(numbers)) == 30


# ---------------------------------------------------------------- shapes


def test_scenes_are_fixed_by_their_number():
    one, two = data.draw_scene(0, "train", 3), data.draw_scene(0, "train", 3)
    for key, value in vars(one).items(): assert np.array_equal(value, getattr(two, key)), key
    for other in ((0, "val", 3), (1, "train", 3), (0, "train", 4)):
        other = data.draw_scene(*other)
        assert other.image.shape != one.image.shape or not np.array_equal(other.image, one.image)


def test_the_yardstick_does_not_move():
    """Numbers measured on shapes compare only while these hold: pixels of each class in ten scenes."""
    drawn = [data.draw_scene(0, "val", i) for i in range(10)]
    pixels = np.bincount(np.concatenate([s.mask.ravel() for s in drawn]), minlength=9)
    assert np.allclose(pixels, [111075, 3283, 5051, 793, 1599, 787, 6262, 1423, 2740], rtol=0.005)
    assert abs(np.mean([s.image.mean() for s in drawn]) - 115.309) < 0.05


@pytest.fixture(scope="module")
def scenes():
    dataset = load(args("shapes"), "train")
    return [dataset[i] for i in range(80)]


def test_scenes_hold_what_they_promise(scenes):
    objects = [len(s.boxes) for s in scenes]
    assert min(objects) >= 1 and max(objects) == 4 and 1.5 < np.mean(objects) < 2.6
    for s in scenes:
        assert all(96 <= side <= 128 for side in s.mask.shape) and s.image.shape == (*s.mask.shape, 3)
        assert set(np.unique(s.mask)) - {0} == set(np.flatnonzero(s.tags) + 1) == set(s.boxes[:, 0])
        assert ((s.instances > 0) == (s.mask > 0)).all() and (s.mask == 0).mean() > 0.2
    pixels = np.bincount(np.concatenate([s.mask.ravel() for s in scenes]), minlength=9)
    assert 0.1 < 1 - pixels[0] / pixels.sum() < 0.25 and pixels[1:].min() > 0.3 * pixels[1:].mean()
    sizes = np.concatenate([(s.boxes[:, 3:] - s.boxes[:, 1:3]).max(axis=1) for s in scenes])
    assert 8 <= np.percentile(sizes, 5) and np.percentile(sizes, 95) <= 62 and sizes.std() > 8


def test_some_objects_of_one_class_touch(scenes):
    from scipy import ndimage
    joined = 0
    for s in scenes:
        for k in np.flatnonzero(s.tags) + 1:
            regions, count = ndimage.label(s.mask == k)
            joined += any(len(np.unique(s.instances[regions == i])) > 1 for i in range(1, count + 1))
    assert joined >= 16                                                 # by chance it would be 10


def test_weak_labels_follow_from_the_masks(scenes):
    for s in scenes:
        ids = np.setdiff1d(s.instances, 0)
        assert len(s.boxes) == len(s.points) == len(ids)
        for i, (k, x0, y0, x1, y1), (point_class, x, y) in zip(ids, s.boxes, s.points):
            rows, cols = np.nonzero(s.instances == i)
            assert (x0, y0, x1, y1) == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)      # tight
            assert s.mask[rows[0], cols[0]] == k == point_class and s.instances[int(y), int(x)] == i
            assert (s.scribble[s.instances == i] == k).any()                            # a stroke each
        drawn = s.scribble != 255
        assert (s.scribble[drawn] == s.mask[drawn]).all() and (s.scribble == 0).any() and drawn.mean() < 0.06


def test_objects_of_a_mask():
    mask = np.array([[1, 1, 0, 2], [0, 0, 0, 2], [1, 255, 0, 2]], np.uint8)
    ids = np.array([[1, 1, 255, 3], [1, 1, 1, 4], [2, 255, 0, 4]], np.uint8)   # object 1: mostly background
    assert [(k, inside.sum()) for k, inside in data.objects_of(mask, ids)] == [(1, 5), (1, 1), (2, 1), (2, 2)]
    assert [(k, inside.sum()) for k, inside in data.objects_of(mask)] == [(1, 2), (1, 1), (2, 3)]
    boxes = data.derive_boxes(data.objects_of(mask))
    assert boxes.tolist() == [[1, 0, 0, 2, 1], [1, 0, 2, 1, 3], [2, 3, 0, 4, 3]] and boxes.dtype == np.float32
    assert data.derive_boxes([]).shape == (0, 5) and data.derive_points([], rng()).shape == (0, 3)
    assert (data.derive_scribble(np.zeros((20, 30), np.uint8), [], rng()) % 255 == 0).all()


def test_the_classes_of_a_pair_differ_by_a_small_part_only():
    assert len(data.TARGETS) == 8 and len(data.AUXILIARY) == 6
    v, u = np.mgrid[-2:2:0.01, -2:2:0.01]
    pairs = [kinds[i:i + 2] for kinds in (data.TARGETS, data.AUXILIARY) for i in range(0, len(kinds), 2)]
    for one, two in pairs:
        assert one[1:5] == two[1:5]                     # body, height, texture, colour
        assert np.abs(np.subtract(one.part_colour, two.part_colour)).max() > 60 and one.part != two.part
        for kind in (one, two):
            body = data.FORMS[kind.body](u, v / kind.height) < 1
            part = data.FORMS[kind.part]((u - kind.place[0]) / kind.size, (v - kind.place[1]) / kind.size) < 1
            assert 0.07 < part.sum() / (body | part).sum() < 0.2, kind.name
            assert (body & part).any(), f"{kind.name}: the part does not touch the body"
    names = [kind.name for kind in data.TARGETS + data.AUXILIARY]
    assert len(set(names)) == 14
    assert sorted(k for fold in data.FOLDS for k in fold) == list(range(8))
    assert all(one // 2 != two // 2 for one, two in data.FOLDS)


def test_context_goes_with_its_class(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "draw_context", lambda image, name, rng, grid: drawn.append(name))
    counts = {name: {True: [], False: []} for name in data.CONTEXTS.values()}
    for i in range(150):
        drawn.clear()
        s = data.draw_scene(0, "train", i)
        for k, name in data.CONTEXTS.items(): counts[name][bool(s.tags[k - 1])].append(name in drawn)
    for name, having in counts.items():
        assert np.mean(having[True]) > 0.7, name
        assert np.mean(having[False]) < 0.15, name


def test_auxiliary_scenes_are_another_set():
    drawn = [data.draw_scene(0, "train", i, "aux") for i in range(12)]
    assert all(s.tags.shape == (6,) for s in drawn) and max(s.mask.max() for s in drawn) == 6
    assert {kind.body for kind in data.TARGETS}.isdisjoint(kind.body for kind in data.AUXILIARY)
    for s in drawn: assert set(np.unique(s.mask)) - {0} == set(np.flatnonzero(s.tags) + 1) != set()


def test_shapes_takes_a_list(tmp_path):
    names = tmp_path / "few.txt"
    names.write_text("train_0007\nfolder/train_0003.png extra\n\ntrain_0007\n")
    dataset = load(args("shapes", train_list=names), "train")
    assert dataset.names == ["train_0007", "train_0003"] and dataset.index("train_0003") == 1
    assert np.array_equal(dataset[1].image, data.draw_scene(0, "train", 3).image)
    assert len(load(args("shapes", train_list=names), "val")) == 200
    names.write_text("train_0500\n")
    with pytest.raises(DataError, match="train_0500"): load(args("shapes", train_list=names), "train")


# ---------------------------------------------------------------- what training may see


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("name", ["shapes", *LAYOUTS])
def test_a_training_sample_shows_what_the_supervision_reveals(exports, name, supervision):
    setting = args(name, exports.get(name, ""), supervision)
    train = load(setting, "train")
    for sample in (train[0], train[len(train) - 1]):
        assert {"name", "image", "tags"} <= set(vars(sample))
        assert set(vars(sample)) & LABELS == set(data.REVEALS[supervision])
    shown = LABELS if name != "coco" else {"mask", "instances", "boxes", *data.REVEALS[supervision]}
    assert set(vars(load(setting, "val")[0])) & LABELS == shown     # COCO ships no points, no scribbles
    assert set(vars(load(setting, "train", masks=True)[0])) & LABELS == shown


@pytest.mark.parametrize("supervision", ["image", "point", "scribble", "box"])
def test_voc_training_needs_no_masks(voc, supervision):
    for folder in ("SegmentationClass", "SegmentationClassAug", "SegmentationObject"):
        shutil.rmtree(voc / folder)
    train = load(args("voc", voc, supervision), "train")
    assert len([train[i] for i in range(len(train))]) == 5 and train.notes == {}


@pytest.mark.parametrize("supervision,folder", [("scribble", "scribbles"), ("point", "points")])
def test_voc_derives_what_is_not_shipped_and_says_so(voc, supervision, folder):
    shutil.rmtree(voc / folder)
    train, field = load(args("voc", voc, supervision), "train"), data.REVEALS[supervision][0]
    assert "derived" in train.notes[field] and set(train.notes) == {field}
    one, two = train[2], load(args("voc", voc, supervision), "train")[2]
    assert np.array_equal(getattr(one, field), getattr(two, field)) and not hasattr(one, "mask")
    truth = load(args("voc", voc), "train", masks=True)[2]
    if field == "points":
        assert [truth.mask[int(y), int(x)] for k, x, y in one.points] == one.points[:, 0].tolist()
        assert len({truth.instances[int(y), int(x)] for k, x, y in one.points}) == len(truth.boxes)
    else:
        drawn = one.scribble != 255
        assert drawn.any() and (one.scribble[drawn] == truth.mask[drawn]).all()


def test_a_picture_of_sbd_has_no_instances(voc):
    name = load(args("voc", voc), "train").names[0]
    (voc / "SegmentationObject" / f"{name}.png").unlink()
    train = load(args("voc", voc), "train", masks=True)
    assert hasattr(train[0], "mask") and not hasattr(train[0], "instances") and hasattr(train[1], "instances")
    (voc / "points" / "whats_the_point.json").unlink()
    points = load(args("voc", voc, "point"), "train")[0].points
    assert [train[0].mask[int(y), int(x)] for k, x, y in points] == points[:, 0].tolist() and len(points)


def test_with_labels(tmp_path, work):
    from common import save_label
    train = load(args("workpiece", work, "box"), "train")
    shape = train[0].image.shape[:2]
    for s in (train[i] for i in range(5)):
        save_label(tmp_path / f"{s.name}.png", np.full(s.image.shape[:2], 255))
    save_label(tmp_path / f"{train.names[0]}.png", np.full(shape, 8))
    labelled = data.with_labels(train, pseudo=tmp_path)
    assert labelled.names == train.names and labelled.classes == train.classes
    assert (labelled[0].pseudo == 8).all() and labelled[0].pseudo.shape == shape
    assert np.array_equal(labelled[0].boxes, train[0].boxes)
    assert (labelled[1].pseudo == 255).all()                  # a picture without any label is allowed
    assert not hasattr(train[0], "pseudo") and not hasattr(labelled[0], "mask")
    assert hasattr(data.with_labels(labelled, seed=tmp_path)[0], "pseudo")
    save_label(tmp_path / f"{train.names[0]}.png", np.full(shape, 9))
    with pytest.raises(DataError, match=rf"{train.names[0]}\.png holds 9"): labelled[0]
    save_label(tmp_path / f"{train.names[0]}.png", np.zeros((7, 9)))
    with pytest.raises(DataError, match="is 9x7 pixels"): labelled[0]
    (tmp_path / f"{train.names[0]}.png").unlink()
    with pytest.raises(DataError, match="does not exist"): labelled[0]


# ---------------------------------------------------------------- layouts come back


def assert_same(one, two, image=True):
    assert one.name == two.name and one.tags.tolist() == two.tags.tolist()
    if image: assert np.array_equal(one.image, two.image)
    for key in ("mask", "instances", "scribble", "boxes"):
        assert np.array_equal(getattr(one, key), getattr(two, key)), key
    assert np.allclose(one.points, two.points, atol=1e-4)


@pytest.mark.parametrize("layout", ["voc", "workpiece"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_export_and_load_give_the_same_samples(exports, layout, split):
    back, original = load(args(layout, exports[layout]), split), load(args("shapes"), split)
    assert back.classes == original.classes and back.names == original.names[:5] and back.notes == {}
    for i in range(5):
        assert_same(back[i], original[i], image=layout == "workpiece")          # VOC's pictures are JPEGs
        assert np.abs(back[i].image.astype(int) - original[i].image).mean() < 12
    files = list((exports[layout]).rglob("*.png"))
    assert {Image.open(f).mode for f in files if "images" not in f.parts} == {"P"}


def test_voc_to_workpiece_and_back(exports, tmp_path, monkeypatch, capsys):
    for source, layout in (("voc", "workpiece"), ("workpiece", "voc")):
        root = exports[source] if source == "voc" else tmp_path / "workpiece"
        status, _ = command(monkeypatch, capsys, "export", "--data", source, "--root", root, "--layout",
                            layout, "--to", tmp_path / layout, "--n", 3)
        assert status == 0
    back, original = load(args("voc", tmp_path / "voc"), "train"), load(args("shapes"), "train")
    assert len(back) == 3
    for i in range(3): assert_same(back[i], original[i], image=False)


def test_an_export_keeps_names_with_signs_of_xml(work, tmp_path):
    """A file of classes may begin with a byte order mark, too, as Windows writes it."""
    for path in [work / "classes.txt", *work.rglob("*.json")]:
        path.write_text(path.read_text().replace("oval-fin", "nuts & <bolts>"), encoding="utf-8-sig")
    data.export("workpiece", "voc", str(tmp_path / "voc"), root=str(work))
    back, given = (load(args(*place), "train") for place in (("voc", tmp_path / "voc"), ("workpiece", work)))
    assert back.classes == given.classes and "nuts & <bolts>" in back.classes
    for i in range(len(given)): assert_same(back[i], given[i], image=False)


def test_what_can_not_be_exported(work, tmp_path, monkeypatch, capsys):
    for path in [*(work / "val").rglob("val_0001.*"), *(work / "val").glob("*.json")]:
        if path.suffix == ".json": path.write_text(path.read_text().replace("val_0001", "train_0001"))
        else: path.rename(path.with_stem("train_0001"))
    flags = "export", "--data", "workpiece", "--root", work, "--to", tmp_path / "to", "--layout"
    status, _ = command(monkeypatch, capsys, *flags, "voc")             # there the second would replace it
    assert "train and val both have train_0001" in status and not (tmp_path / "to").exists()
    assert command(monkeypatch, capsys, *flags, "coco")[0] == 0
    shutil.rmtree(work / "val" / "masks")
    assert "not all val pictures have a mask" in command(monkeypatch, capsys, *flags, "workpiece")[0]
    (tmp_path / "file").touch()
    flags = "export", "--data", "shapes", "--layout", "voc", "--to", tmp_path / "file"
    assert "file/VOC2012" in command(monkeypatch, capsys, *flags)[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_gives_the_same_samples_but_numbers_objects_by_size(exports, split):
    back, original = load(args("coco", exports["coco"]), split), load(args("shapes"), split)
    assert back.classes == original.classes and back.names == original.names[:5]
    for i in range(5):
        one, two = back[i], original[i]
        assert one.tags.tolist() == two.tags.tolist() and np.array_equal(one.mask, two.mask)
        assert sorted(one.boxes.tolist()) == sorted(two.boxes.tolist())
        pairs = {*zip(one.instances.ravel().tolist(), two.instances.ravel().tolist())}
        assert len(pairs) == len(np.unique(one.instances)) == len(np.unique(two.instances)), "one to one"
        sizes = [(one.instances == k).sum() for k in range(1, one.instances.max() + 1)]
        assert sizes == sorted(sizes, reverse=True)
        assert [one.mask[int(y), int(x)] for _, x, y in one.points] == one.points[:, 0].tolist()


def test_three_forms_of_root(exports, tmp_path):
    devkit = tmp_path / "parent" / "VOCdevkit"
    shutil.copytree(exports["voc"] / "VOC2012", devkit / "VOC2012")
    forms = (devkit.parent, devkit, devkit / "VOC2012")
    names = [load(args("voc", root, "box"), "train").names for root in forms]
    assert names[0] == names[1] == names[2] and len(names[0]) == 5


def test_train_aug_is_computed(voc):
    from common import save_label
    mask = data.read_label(voc / "SegmentationClass" / "train_0001.png", 8)
    (voc / "ImageSets/Segmentation/train.txt").write_text("train_0000\ntrain_0002\n")
    (voc / "SegmentationClass" / "train_0001.png").unlink()
    save_label(voc / "SegmentationClassAug" / "train_0000.png", np.zeros((4, 4)))   # VOC's own mask wins
    for name in ("train_0003", "train_0004", "val_0000"):
        (voc / "SegmentationClassAug" / f"{name}.png").unlink()
    dataset = load(args("voc", voc, "full", "train_aug"), "train")
    assert dataset.names == ["train_0000", "train_0001", "train_0002"]      # no val picture, and with mask
    assert np.array_equal(dataset[1].mask, mask) and dataset[0].mask.shape == dataset[0].image.shape[:2]
    shutil.rmtree(voc / "SegmentationClassAug")
    with pytest.raises(DataError, match="--train-list train"):
        load(args("voc", voc, "box", "train_aug"), "train")
    assert load(args("voc", voc, "box", "train"), "train").names == ["train_0000", "train_0002"]


def test_a_list_of_ones_own(voc, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("JPEGImages/train_0003.jpg SegmentationClass/train_0003.png\ntrain_0001\n")
    assert load(args("voc", voc, "box", names), "train").names == ["train_0003", "train_0001"]


@pytest.mark.parametrize("layout, folder", [("workpiece", "train/images"), ("voc", "VOC2012/JPEGImages")])
def test_a_list_may_have_names_with_blanks(exports, tmp_path, layout, folder):
    root, names = Path(shutil.copytree(exports[layout], tmp_path / layout)), tmp_path / "list.txt"
    for path in root.rglob("*train_0001.*"): path.rename(path.with_stem("my part 1"))
    for path in [*root.rglob("*.json"), *root.rglob("*.txt")]:
        path.write_text(path.read_text().replace("train_0001", "my part 1"))
    for line in ("my part 1", "some where/my part 1.png", f"{folder}/my part 1.jpg"):
        names.write_text(f"{line}\ntrain_0002 my part 1\n")
        assert load(args(layout, root, "box", names), "train").names == ["my part 1", "train_0002"]
    assert "my part 1" in load(args(layout, root, "box"), "train").names


def test_a_list_of_cityscapes_files(tmp_path):
    streets, names = exported(tmp_path / "streets", "cityscapes", 3), tmp_path / "list.txt"
    names.write_text("train/train_0002_leftImg8bit.png gtFine/train/train_0002_labelIds.png\ntrain_0000\n")
    train = load(args("cityscapes", streets, "image", names), "train")
    assert train.names == ["train_0002", "train_0000"] and train[0].image.ndim == 3
    names.write_text("train/train_0009_leftImg8bit.png\n")
    with pytest.raises(DataError, match=r"lacks 1 of 1 pictures \(train_0009"):
        load(args("cityscapes", streets, "image", names), "train")


def test_sbd_merging(voc, tmp_path, monkeypatch, capsys):
    from scipy.io import savemat
    root, cls = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset" / "cls"
    assert voc == root
    (voc / "classes.txt").unlink()                                      # the true 20 classes
    shutil.rmtree(voc / "SegmentationClassAug")
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("train_0000\n")
    for name in ("train_0001", "train_0002"): (voc / "SegmentationClass" / f"{name}.png").unlink()
    cls.mkdir(parents=True)
    label = np.zeros((30, 40), np.uint8)
    label[5:20, 5:30] = 15
    for name in ("train_0000", "train_0001", "val_0001"):
        savemat(cls / f"{name}.mat", {"GTcls": {"Segmentation": label, "Boundaries": np.zeros(3)}})
    status, out = command(monkeypatch, capsys, "voc-aug", "--sbd", tmp_path, "--root", tmp_path)
    assert status == 0 and "expected 10582" in out
    made = {path.stem: data.read_label(path) for path in (voc / "SegmentationClassAug").iterdir()}
    assert np.array_equal(made["train_0001"], label)
    assert np.array_equal(made["train_0000"], data.read_label(voc / "SegmentationClass" / "train_0000.png"))
    assert "train_0002" not in made and "val_0001" in made
    assert data.voc_names(voc, "train_aug") == ["train_0000", "train_0001", "train_0003", "train_0004"]
    (cls / "train_0001.mat").write_bytes(b"no mat file")
    status, _ = command(monkeypatch, capsys, "voc-aug", "--sbd", tmp_path, "--root", tmp_path)
    assert "train_0001.mat" in status and "unpack SBD again" in status
    status, _ = command(monkeypatch, capsys, "voc-aug", "--sbd", tmp_path / "nowhere", "--root", tmp_path)
    assert "nowhere" in status and "--sbd" in status


def test_scribblesup_xml(voc):
    shutil.rmtree(voc / "scribbles")
    (voc / "scribbles").mkdir()
    def stroke(tag, *at):
        points = "".join(f"<point><X>{x}</X><Y>{y}</Y></point>" for x, y in at)
        return f"<polygon><tag>{tag}</tag>{points}</polygon>"
    text = stroke("background", (2, 5), (40, 5)) + stroke("star-eye", (50, 10), (50, 60))
    text += stroke("pear-ring", (70, 33))
    for i in range(5):
        xml = text if i % 2 else f"<scribbles>{text}</scribbles>"       # both forms are about
        (voc / "scribbles" / f"train_000{i}.xml").write_text(f"<annotation>{xml}</annotation>")
    train = load(args("voc", voc, "scribble"), "train")
    assert train.notes == {}
    eye, ring = train.classes.index("star-eye") + 1, train.classes.index("pear-ring") + 1
    for i in range(5):
        scribble = train[i].scribble
        assert scribble[5, 2] == scribble[5, 20] == scribble[5, 40] == 0
        assert (scribble[10:61, 50] == eye).all() and scribble[33, 70] == ring
        assert set(np.unique(scribble)) == {0, eye, ring, 255} and (scribble != 255).sum() < 200
    (voc / "scribbles" / "train_0000.xml").write_text(f"<annotation>{stroke('zebra', (1, 1))}</annotation>")
    with pytest.raises(DataError, match=r"train_0000\.xml names the class 'zebra'"): train[0]
    (voc / "scribbles" / "train_0000.xml").write_text("<annotation><poly")
    with pytest.raises(DataError, match=r"train_0000\.xml can not be read"): train[0]


def test_clicks_of_every_rank_are_kept_and_brought_inside():
    rows = (3.2, 4.9, 1, 1), (10, 8, 1, 2), (0, 0, 2, 1), (30, 4, 2, 2), (5, 5, 9, 1)
    clicks = [dict(zip(("x", "y", "cls", "rank"), row)) for row in rows]
    points = data.voc_points(clicks, ["a", "b"], (8, 10), "clicks")
    assert np.allclose(points, [[1, 3.2, 4.9], [1, 9.5, 7.5], [2, 0.5, 0.5]])
    assert data.voc_points([], ["a"], (8, 10), "clicks").shape == (0, 3)


# ---------------------------------------------------------------- a folder of one's own


def test_tags_from_what_is_there(work):
    expected = load(args("workpiece", work, "image"), "train")
    tags = [expected[i].tags.tolist() for i in range(5)]
    for remove in ("tags.json", "boxes.json", "points.json", "scribbles"):
        path = work / "train" / remove
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        train = load(args("workpiece", work, "image"), "train")
        assert [train[i].tags.tolist() for i in range(5)] == tags, remove
        assert "taken from" in train.notes["tags"] and set(vars(train[0])) == {"name", "image", "tags"}
    shutil.rmtree(work / "train" / "masks")
    with pytest.raises(DataError, match=r"tags\.json"): load(args("workpiece", work, "image"), "train")


def test_weak_labels_of_ones_own_are_derived_when_masks_are_there(work):
    full = load(args("workpiece", work, "box"), "train")[0].boxes
    (work / "train" / "boxes.json").unlink()
    train = load(args("workpiece", work, "box"), "train")
    assert np.array_equal(train[0].boxes, full) and "derived" in train.notes["boxes"]
    shutil.rmtree(work / "train" / "instances")
    assert set(load(args("workpiece", work, "box"), "train")[0].boxes[:, 0]) == set(full[:, 0])
    shutil.rmtree(work / "train" / "masks")
    with pytest.raises(DataError, match="boxes"): load(args("workpiece", work, "box"), "train")
    assert len(load(args("workpiece", work, "point"), "train")[0].points)


def test_training_pictures_need_no_masks(work):
    shutil.rmtree(work / "train" / "masks")
    scored = load(args("workpiece", work, "box"), "train", masks=True)
    assert "mask" not in scored.fields and not hasattr(scored[0], "mask") and "boxes" in scored.fields
    with pytest.raises(DataError, match="masks"): load(args("workpiece", work, "full"), "train")


@pytest.mark.parametrize("supervision", ["box", "full"])
def test_ones_own_val_pictures_need_no_labels(work, voc, supervision):
    shutil.rmtree(work / "val" / "masks")
    val = load(args("workpiece", work, supervision), "val")
    assert "mask" not in val.fields and not hasattr(val[0], "mask") and not val[0].tags.all()
    for path in list((work / "val").iterdir()):
        if path.name != "images": shutil.rmtree(path) if path.is_dir() else path.unlink()
    for masks in (False, True):
        val = load(args("workpiece", work, supervision), "val", masks, ("mask",))
        assert val.fields == () and len(val) == 5 and val[0].tags.all() and "any class" in val.notes["tags"]
    for folder in ("SegmentationClass", "SegmentationClassAug"): shutil.rmtree(voc / folder)
    assert_error(lambda: load(args("voc", voc, "box"), "val"), "masks are needed")
    for path in (work / "val" / "images").iterdir(): path.unlink()
    assert_error(lambda: load(args("workpiece", work), "val"), "images is empty", "one at least")
    (work / "val" / "images").rmdir()
    assert_error(lambda: load(args("workpiece", work), "val"), "no folder", "val/images", "one at least")


def test_a_picture_without_objects(work):
    for key in ("tags", "boxes", "points"):
        path = work / "train" / f"{key}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "train_0000": []}))
    for supervision, shape in (("box", (0, 5)), ("point", (0, 3))):
        s = load(args("workpiece", work, supervision), "train")[0]
        assert getattr(s, data.REVEALS[supervision][0]).shape == shape and not s.tags.any()
        out = data.normalise(data.crop(data.flip(data.rescale(s, 0.7)), 50, rng(), tags=True))
        assert getattr(out, data.REVEALS[supervision][0]).shape == shape


def test_a_turned_photograph_is_turned_back(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = 200
    exif = Image.Exif()
    exif[0x0112] = 6                                                # "turn by 90 degrees clockwise to view"
    Image.fromarray(image).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    seen = data.read_image(tmp_path / "phone.jpg")
    assert seen.shape == (40, 20, 3) and seen[:18].mean() > 190 and seen[22:].mean() < 10
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    assert data.read_image(tmp_path / "grey.png").shape == (20, 40, 3)


# ---------------------------------------------------------------- one clear sentence for each error


def assert_error(call, *words):
    """One sentence that has all these words (file, fault, remedy)."""
    with pytest.raises(DataError) as caught: call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def read_all(setting, split="train", masks=False):
    dataset = load(setting, split, masks)
    return [dataset[i] for i in range(len(dataset))]


def test_error_unknown_data_set():
    assert_error(lambda: load(args("imagenet"), "train"), "imagenet", "shapes", "coco, context, workpiece")


def test_error_missing_folder(tmp_path, work):
    nowhere = tmp_path / "none"
    assert_error(lambda: load(args("voc", nowhere), "train"), str(nowhere), "JPEGImages", data.VOC_PAGE)
    assert_error(lambda: load(args("workpiece", nowhere), "train"), "none/train/images", "--root")
    for path in (work / "train" / "images").iterdir(): path.unlink()
    assert_error(lambda: load(args("workpiece", work), "train"), "images is empty")
    (work / "classes.txt").unlink()
    assert_error(lambda: load(args("workpiece", work), "val"), "classes.txt")


def test_error_two_files_of_one_name(voc, work):
    shutil.copy(work / "train/images/train_0001.png", work / "train/images/train_0001.bmp")
    assert_error(lambda: load(args("workpiece", work), "train"), "train_0001.bmp", "train_0001.png", "rename")
    shutil.copy(voc / "JPEGImages/val_0001.jpg", voc / "JPEGImages/val_0001.JPG")
    assert_error(lambda: load(args("voc", voc), "val"), "val_0001.JPG", "val_0001.jpg", "rename")


def test_dot_files_are_no_pictures(work, tmp_path):
    for folder in ("images", "masks"): (work / "train" / folder / "._train_0001.png").write_text("macOS")
    assert len(read_all(args("workpiece", work))) == 5
    streets = exported(tmp_path / "streets", "cityscapes", 2)
    for path in list(streets.rglob("*.png")): path.with_name(f"._{path.name}").write_text("macOS")
    assert len(read_all(args("cityscapes", streets))) == 2


def test_error_list(voc, tmp_path):
    setting = args("voc", voc, "box", tmp_path / "list.txt")
    assert_error(lambda: load(setting, "train"), "list.txt does not exist", "train_aug")
    (tmp_path / "list.txt").write_text("\n \n")
    assert_error(lambda: load(setting, "train"), "list.txt is empty")
    (tmp_path / "list.txt").write_text("train_0001\n2007_999999\n")
    assert_error(lambda: load(setting, "train"), "lacks 1 of 2", "2007_999999", "list")
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    assert_error(lambda: load(setting, "val"), "val.txt does not exist")


def test_error_missing_annotation_and_mask(voc):
    (voc / "Annotations" / "train_0002.xml").unlink()
    assert_error(lambda: load(args("voc", voc, "image"), "train"), "Annotations lacks 1 of 5", "train_0002")
    for folder in ("SegmentationClass", "SegmentationClassAug"): (voc / folder / "val_0003.png").unlink()
    assert_error(lambda: load(args("voc", voc, "image"), "val"), "masks", "val_0003")


@pytest.mark.parametrize("name", ["JPEGImages/train_0001.jpg", "SegmentationClass/train_0001.png",
                                  "SegmentationObject/train_0001.png", "scribbles/train_0001.png"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_error_truncated_picture(voc, name, damage):
    content = (voc / name).read_bytes()
    broken = {"cut": content[:len(content) // 2], "text": b"<html>404</html>", "empty": b""}
    (voc / name).write_bytes(broken[damage])
    assert_error(lambda: read_all(args("voc", voc)), name, "can not be read", "again")


def test_error_annotation_is_no_xml(voc):
    path = voc / "Annotations" / "train_0000.xml"
    for text in ("", "<annotation><object><name>oval-fin</name></object></annotation>", "<annotation>"):
        path.write_text(text)
        assert_error(lambda: read_all(args("voc", voc, "image")), "train_0000.xml can not be read", "again")


def test_error_sizes_differ(voc):
    for folder, setting in (("SegmentationClass", args("voc", voc)), ("SegmentationObject", args("voc", voc)),
                            ("scribbles", args("voc", voc, "scribble"))):
        path = voc / folder / "train_0000.png"
        kept = path.read_bytes()
        Image.open(path).transpose(Image.ROTATE_90).resize((50, 60), Image.NEAREST).save(path)
        assert_error(lambda s=setting: read_all(s), str(path), "50x60", "its picture")
        path.write_bytes(kept)


def test_error_illegal_values(work):
    path = work / "train" / "masks" / "train_0000.png"
    mask = np.array(Image.open(path))
    png(path, np.where(mask > 0, 77, mask))
    assert_error(lambda: read_all(args("workpiece", work)), str(path), "holds 77", "0..8 and 255", "class")
    soft = np.where(mask > 0, 255, 0)
    soft[:3, :3] = [100, 140, 180]
    png(path, soft)
    assert_error(lambda: read_all(args("workpiece", work)), str(path), "100, 140, 180", "black/white")
    png(path, np.stack([soft] * 3, axis=-1))
    assert_error(lambda: read_all(args("workpiece", work)), str(path), "RGB", "palette or grey")
    Image.fromarray(np.full(mask.shape, 300, np.uint16)).save(path)
    for call in (lambda: read_all(args("workpiece", work)), lambda: data.read_label(path)):
        assert_error(call, str(path), "holds 300", "16 bits", "save it with 8")


def test_error_black_and_white_masks(work):
    for path in (work / "train" / "masks").iterdir():
        png(path, np.where(np.array(Image.open(path)) > 0, 255, 0))
    assert_error(lambda: load(args("workpiece", work), "train"), "train_0000.png", "0, 255", "black/white")
    path = work / "train" / "masks" / "train_0001.png"
    png(path, np.array(Image.open(path)) // 255)
    assert len(read_all(args("workpiece", work))) == 5      # one of 0 and 255 among others is legal


def test_error_box_outside(voc, work):
    path = voc / "Annotations" / "train_0000.xml"
    tree = ET.parse(path)
    corner = tree.find("object/bndbox/xmax")
    corner.text = str(int(float(corner.text)) + 300)
    tree.write(path)
    assert_error(lambda: read_all(args("voc", voc, "box")), str(path), "beyond its picture", "mend it")
    table = json.loads((work / "train" / "boxes.json").read_text())
    name, x0, y0, x1, y1 = table["train_0001"][0]
    for bad in ([name, x1, y0, x0, y1], [name, x0, -9, x1, y1], [name, x0, y0, x1, 2000]):
        (work / "train" / "boxes.json").write_text(json.dumps({**table, "train_0001": [bad]}))
        assert_error(lambda: read_all(args("workpiece", work, "box")), "boxes.json", "beyond", "mend it")
    (work / "train" / "boxes.json").write_text(json.dumps(table))
    points = json.loads((work / "train" / "points.json").read_text())
    (work / "train" / "points.json").write_text(json.dumps({**points, "train_0001": [[name, 500, 3]]}))
    assert_error(lambda: read_all(args("workpiece", work, "point")), "points.json", "500, 3")


def test_a_box_may_touch_the_rim():
    for box in ((0, 0, 40, 30), (-1, 0, 41, 30)):                       # old files may be off by one
        assert data.locate([("b", *box)], 5, ["a", "b"], (30, 40), "file").tolist() == [[2, 0, 0, 40, 30]]
    for box in ((0, 0, 42, 30), (-1, 0, 0, 30), (0, -0.5, 40, 0), (40, 0, 41, 30), (0, 30, 40, 31)):
        with pytest.raises(DataError, match="file has b at"):
            data.locate([("b", *box)], 5, ["a", "b"], (30, 40), "file")


def test_error_unknown_class(voc, work):
    path = voc / "Annotations" / "train_0000.xml"
    path.write_text(path.read_text().replace("<name>", "<name>un"))
    assert_error(lambda: read_all(args("voc", voc, "image")), str(path), "'un", "classes.txt")
    table = json.loads((work / "train" / "tags.json").read_text())
    (work / "train" / "tags.json").write_text(json.dumps({**table, "train_0001": ["nut"]}))
    assert_error(lambda: read_all(args("workpiece", work, "image")), "tags.json", "'nut'", "classes.txt")


def test_error_tables_and_classes(work):
    path = work / "train" / "boxes.json"
    table = json.loads(path.read_text())
    for bad in (["oval-fin", 1, 2, 3], ["oval-fin", 1, 2, "x", 9], [1, 1, 2, 3, 4], 7):
        path.write_text(json.dumps({**table, "train_0001": [bad] * 5}))
        assert_error(lambda: read_all(args("workpiece", work, "box")), "boxes.json")
    del table["train_0002"]
    path.write_text(json.dumps(table))
    assert_error(lambda: load(args("workpiece", work, "box"), "train"), "boxes", "train_0002")
    path.write_text("{")
    assert_error(lambda: load(args("workpiece", work, "box"), "train"), "boxes.json can not be read", "JSON")
    (work / "classes.txt").write_text("a\na\n")
    assert_error(lambda: load(args("workpiece", work, "box"), "train"), "classes.txt", "1 different")


# ---------------------------------------------------------------- coco


@pytest.fixture
def scene(tmp_path):
    """A function that writes two 20 x 10 pictures and their annotations, with COCO's gaps -> root."""
    categories = [{"id": k, "name": name} for k, name in ((90, "brush"), (1, "person"), (13, "stop sign"))]
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir()
        for name in "ab":
            Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / f"{split}2014" / f"{name}.jpg")
    (tmp_path / "annotations").mkdir()

    def write(*annotations):
        images = [{"id": i, "file_name": f"{name}.jpg", "height": 10, "width": 20} for i, name in
                  ((7, "a"), (5, "b"))]
        for split in ("train", "val"):
            table = {"images": images, "annotations": list(annotations), "categories": categories}
            (tmp_path / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(table))
        return tmp_path
    return write


def annotation(category, bbox, segmentation, crowd=0, image=7):
    return {"id": 3, "image_id": image, "category_id": category, "bbox": bbox, "area": 1.0, "iscrowd": crowd,
            "segmentation": segmentation}


SQUARE = annotation(90, [2, 1, 8, 6], [[2, 1, 10, 1, 10, 7, 2, 7]])
COUNTS = [0, 10 * 6, 140]                                           # columns 0..5, counted down each column
CROWD = annotation(1, [0, 0, 6, 10], {"size": [10, 20], "counts": COUNTS}, crowd=1)


def test_coco_polygons_rle_and_crowds(scene):
    from pycocotools import mask as rle
    dot = np.zeros((10, 20), np.uint8)
    dot[3:5, 8:12] = 1
    code = rle.encode(np.asfortranarray(dot))
    small = annotation(13, [8, 3, 4, 2], {"size": [10, 20], "counts": code["counts"].decode()})
    root = scene(small, CROWD, SQUARE)
    train = load(args("coco", root), "train")
    assert train.classes == ["person", "stop sign", "brush"] and train.names == ["a"]   # b has no annotation
    assert "1 of 2" in train.notes["pictures"]
    s, expected = train[0], np.zeros((10, 20), int)
    expected[:, :6], expected[1:7, 2:10], expected[3:5, 8:12] = 255, 3, 2       # the smaller object on top
    assert np.array_equal(s.mask, expected) and s.tags.tolist() == [True] * 3
    assert np.array_equal(s.instances, np.select([expected == 3, expected == 2], [1, 2], expected))
    assert sorted(s.boxes.tolist()) == [[2, 8, 3, 12, 5], [3, 2, 1, 10, 7]]             # a crowd has no box
    own = {a["category_id"]: rle.decode(a["segmentation"]) for a in train.source.annotations("a")}
    assert own[1].sum() == 60 and own[3].sum() == 48 and np.array_equal(own[2], dot)


def test_coco_masks_are_kept_and_drawn_anew_for_another_file(scene, monkeypatch):
    root = scene(SQUARE)
    first = load(args("coco", root), "val")[0]
    files = [root / "masks" / part / "a.png" for part in ("val2014", "val2014_instances")]
    assert all(file.is_file() for file in files) and not (root / "masks" / "train2014").exists()
    assert load(args("coco", root, "box"), "train")[0].boxes.tolist() == [[3, 2, 1, 10, 7]]
    assert not (root / "masks" / "train2014").exists()                          # boxes need no masks
    monkeypatch.setattr(data, "draw_coco", lambda *_: pytest.fail("drawn although it is there"))
    assert np.array_equal(load(args("coco", root), "val")[0].mask, first.mask)
    monkeypatch.undo()
    scene(annotation(1, [0, 0, 4, 4], [[0, 0, 4, 0, 4, 4, 0, 4]]))
    later = files[0].stat().st_mtime + 5
    os.utime(root / "annotations" / "instances_val2014.json", (later, later))
    assert set(np.unique(load(args("coco", root), "val")[0].mask)) == {0, 1}


def test_coco_masks_where_nothing_can_be_written(scene):
    root = scene(SQUARE)
    (root / "masks").write_text("not a folder")
    assert (load(args("coco", root), "val")[0].mask == 3).sum() == 48


def test_two_processes_draw_the_same_coco_masks(coco):
    code = ("import sys, types; from data import load\n"
            "args = types.SimpleNamespace(data='coco', root=sys.argv[1], train_list='train', "
            "supervision='full')\n"
            "for _ in range(3): print([int(s.mask.sum()) for s in load(args, 'train')])")
    import concurrent.futures
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = [done.stdout for done in pool.map(lambda _: sh("-c", code, coco), range(2))]
    assert outputs[0] == outputs[1] and len(set(outputs[0].split("\n"))) == 2
    assert len(list((coco / "masks").rglob("*"))) == 2 + 2 * 5                  # nothing temporary is left


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 1, 4, 4]]], ids=["none", "empty", "two points"])
def test_coco_empty_annotations(scene, segmentation):
    thin = [annotation(13, box, [[]]) for box in ([0, 0, 0, 5], [20, 0, 0.5, 5], [3, -0.5, 9, 0.5])]
    root = scene(SQUARE, annotation(1, [1, 1, 3, 3], segmentation), *thin)
    s = load(args("coco", root), "train")[0]
    assert s.boxes.tolist() == [[3, 2, 1, 10, 7], [1, 1, 1, 4, 4]] and s.tags.tolist() == [True, False, True]
    assert set(np.unique(s.mask)) == {0, 3} and set(np.unique(s.instances)) == {0, 1}


def test_error_coco(scene, tmp_path):
    setting = args("coco", tmp_path)
    assert_error(lambda: load(setting, "train"), "instances_train2014.json", "2017", data.COCO_PAGE, "--root")
    scene(SQUARE, annotation(12, [0, 0, 4, 4], [[0, 0, 4, 0, 4, 4]]))
    assert_error(lambda: load(setting, "train"), "category 12", "instances_train2014.json")
    scene(annotation(1, [0, 0, 4, 4], [[0, 0, 4, 0, 4, 4]], image=6))
    assert_error(lambda: load(setting, "train"), "picture 6", "instances_train2014.json")
    scene()
    assert_error(lambda: load(setting, "train"), "no annotation")
    scene(annotation(1, [0, 0, 4, 4], {"size": [9, 9], "counts": [0, 81]}))
    assert_error(lambda: read_all(setting), "annotation of a", "[9, 9]")
    scene(annotation(1, [18, 0, 40, 4], [[0, 0, 4, 0, 4, 4]]))
    assert_error(lambda: read_all(setting), "person at 18", "20x10")
    scene(SQUARE)
    Image.fromarray(np.zeros((20, 10, 3), np.uint8)).save(tmp_path / "train2014" / "a.jpg")
    assert_error(lambda: read_all(setting), "a.jpg is 10x20 pixels, but 20x10")
    (tmp_path / "train2014" / "a.jpg").unlink()
    assert_error(lambda: load(setting, "train"), "train2014 lacks 1 of 1", "(a)")
    (tmp_path / "annotations" / "instances_train2014.json").write_text("[]")
    assert_error(lambda: load(setting, "train"), "annotation file", "instances_train2014.json")


def test_coco_takes_a_list(coco, tmp_path):
    (tmp_path / "few.txt").write_text("train_0003.jpg\ntrain_0001\n")
    train = load(args("coco", coco, "box", tmp_path / "few.txt"), "train")
    assert train.names == ["train_0003", "train_0001"] and len(load(args("coco", coco), "val")) == 5
    (tmp_path / "few.txt").write_text("train_0009\n")
    setting = args("coco", coco, "box", tmp_path / "few.txt")
    assert_error(lambda: load(setting, "train"), "train_0009", "few.txt")


@pytest.mark.skipif(not (REAL.parent / "coco").is_dir(), reason="WSSS_DATA names no folder with coco")
def test_coco_slice_is_read(tmp_path):
    from pycocotools.coco import COCO
    for part in ("annotations", "train2017", "val2017"):
        (tmp_path / part).symlink_to(REAL.parent / "coco" / part)
    train, val = (load(args("coco", tmp_path, "box"), split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (30, 10, 80) and train.classes[-1] == "toothbrush"
    theirs = COCO(val.source.file)
    for i in range(0, 10, 3):
        s = val[i]
        number, = (k for k, image in theirs.imgs.items() if image["file_name"] == f"{s.name}.jpg")
        own = theirs.imgToAnns[number]
        single = [a for a in own if not a["iscrowd"]]
        ids = sorted(theirs.cats)
        assert {ids[k] for k in np.flatnonzero(s.tags)} == {a["category_id"] for a in own}
        assert len(s.boxes) == len(single)
        assert all(np.allclose(box[1:3], a["bbox"][:2], atol=1) for box, a in zip(s.boxes, single))
        union = np.any([theirs.annToMask(a) for a in single], axis=0)
        assert np.array_equal(union, (s.mask != 0) & (s.mask != 255)), "objects lie on top of crowds"
        small = min(single, key=lambda a: a["area"])                            # nothing lies on top of it
        assert (s.mask[theirs.annToMask(small) > 0] == ids.index(small["category_id"]) + 1).all()


# ---------------------------------------------------------------- commands


def test_score_is_the_miou_of_a_folder_of_label_maps(work, tmp_path, monkeypatch, capsys):
    truth = load(args("workpiece", work), "val")
    for sample in truth:
        label = np.where(sample.mask == 255, 0, sample.mask)
        label[:, :10], label[:, 10:14] = 0, 255
        save_label(tmp_path / f"{sample.name}.png", label)
    line = ("score", "--pred", tmp_path, "--data", "workpiece", "--root", work)
    status, out = command(monkeypatch, capsys, *line)
    table = {row.split()[0]: row.split()[1] for row in out.splitlines()}
    ours = confusion_of(truth, lambda s: read_label(tmp_path / f"{s.name}.png"))
    assert status == 0 and abs(float(table["mIoU"]) - ours.miou()) < 0.01 and 10 < ours.miou() < 99
    assert float(table["coverage"]) < 100 and set(truth.classes) < set(table)
    (tmp_path / f"{truth.names[0]}.png").unlink()
    status, out = command(monkeypatch, capsys, *line)
    assert f"lacks 1 of {len(truth)} pictures" in status


def test_check_says_what_is_there(voc, work, coco, monkeypatch, capsys):
    status, out = command(monkeypatch, capsys, "check", "--data", "voc", "--root", voc.parent)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert status == 0 and rows["JPEGImages"] == ["10", "ok"] and rows["train_aug"] == ["5", "ok"]
    masks = [data.read_label(path) for path in (voc / "SegmentationClass").iterdir()]
    seen = sorted(set().union(*(np.unique(mask).tolist() for mask in masks)))
    assert re.search(r"values in 10 masks +([\d., ]+)   ok", out).group(1).startswith(f"{seen[0]}..")
    shutil.rmtree(voc / "SegmentationClassAug")
    (voc / "classes.txt").unlink()
    status, out = command(monkeypatch, capsys, "check", "--data", "voc", "--root", voc)
    assert "missing   make it:  python data.py voc-aug" in out
    assert "expected 10582" in out and "expected 17125" in out
    assert "none of aeroplane, bicycle" in status                       # the XML's classes are not VOC's 20
    status, out = command(monkeypatch, capsys, "check", "--data", "workpiece", "--root", work)
    assert status == 0 and out.count("ok") >= 14
    status, out = command(monkeypatch, capsys, "check", "--data", "coco", "--root", coco)
    assert status == 0 and "5 with objects, 8 classes" in out and "train samples read" in out


def test_check_finds_black_and_white_masks(work, monkeypatch, capsys):
    for path in (work / "val" / "masks").iterdir():
        png(path, np.where(np.array(Image.open(path)) > 0, 255, 0))
    status, out = command(monkeypatch, capsys, "check", "--data", "workpiece", "--root", work)
    line = next(line for line in out.splitlines() if "0, 255" in line)
    assert status == 1 and line.startswith("values in 5 masks")
    assert "wrong" in line and "save the object as 1" in line


def test_the_command_line_itself(tmp_path):
    done = sh("data.py", "check", "--data", "voc", "--root", tmp_path, ok=False)
    assert "JPEGImages" in done.stdout and "Traceback" not in done.stdout


# ---------------------------------------------------------------- real photographs


@real
def test_voc_slice_is_read():
    train, val = load(args("voc", REAL), "train"), load(args("voc", REAL.parent, "image"), "val")
    assert (len(train), len(val)) == (263, 171) and train.classes == data.VOC_CLASSES
    assert "derived" in train.notes["scribble"] and "points" not in train.notes and val.notes == {}
    assert not hasattr(val[0], "scribble") and hasattr(val[0], "instances") and hasattr(train[0], "scribble")
    s = train[train.index("2007_000032")]
    assert s.image.shape == (281, 500, 3) and np.flatnonzero(s.tags).tolist() == [0, 14]
    assert s.boxes[0].tolist() == [1, 103, 77, 375, 183]                # the XML says 104, 78, 375, 183
    assert (s.mask == 255).any() and set(np.unique(s.mask)) == {0, 1, 15, 255}
    assert len(np.setdiff1d(s.instances, (0, 255))) == len(s.boxes) == 4
    assert not hasattr(load(args("voc", REAL, "box"), "train")[0], "mask")


@real
def test_xml_boxes_fit_the_masks_of_the_objects():
    """Original and derived XML: boxes lie around objects of their class, no side off by a pixel."""
    official = set((REAL / "Annotations_official.txt").read_text().split())
    train, overlaps, offsets = load(args("voc", REAL), "train"), {True: [], False: []}, {True: [], False: []}
    for s in (train[i] for i in range(0, len(train), 4)):
        objects = data.objects_of(s.mask, s.instances)
        tight = data.derive_boxes([(k, inside | around(s, inside)) for k, inside in objects])
        for box in s.boxes:
            best = max(tight, key=lambda other: iou(box, other))
            overlaps[s.name in official].append(iou(box, best))
            if iou(box, best) > 0.7: offsets[s.name in official].append(box[1:] - best[1:])
    for kind in (True, False):
        assert len(offsets[kind]) > 10 and np.median(overlaps[kind]) > 0.85
        assert (np.abs(np.median(offsets[kind], axis=0)) <= 0.5).all()


def around(s, inside):
    """The 255 border next to an object: VOC's boxes count it."""
    grown = inside.copy()
    for axis in (0, 1):
        for step in (-2, -1, 1, 2): grown |= np.roll(inside, step, axis)
    return grown & (s.mask == 255)


def iou(one, two):
    if one[0] != two[0]: return 0.0
    side = np.minimum(one[3:], two[3:]) - np.maximum(one[1:3], two[1:3])
    areas, inter = [np.prod(box[3:] - box[1:3]) for box in (one, two)], np.prod(side.clip(0))
    return inter / (sum(areas) - inter)


@real
def test_human_clicks_lie_in_their_objects():
    train, truth = load(args("voc", REAL, "point"), "train"), load(args("voc", REAL), "train", masks=True)
    labels, classes, objects = [], [], 0
    for i in range(0, len(train), 5):
        clicked, seen = train[i], truth[i]
        assert set(vars(clicked)) == {"name", "image", "tags", "points"}
        labels += [seen.mask[int(y), int(x)] for k, x, y in clicked.points]
        classes += clicked.points[:, 0].tolist()
        objects += len(seen.boxes)
    labels, classes = np.array(labels), np.array(classes)
    known = labels != 255                                               # a fifth lies on 255 borders
    assert (labels == classes)[known].mean() > 0.9 and known.mean() > 0.8
    assert 0.95 * objects < len(labels) < 1.05 * objects                # one click an object, not one a class


@real
def test_derived_scribbles_of_photographs_are_inside_their_class():
    train, truth = load(args("voc", REAL, "scribble"), "train"), load(args("voc", REAL), "train", masks=True)
    for i in range(0, len(train), 40):
        scribble, mask = train[i].scribble, truth[i].mask
        drawn = scribble != 255
        assert (scribble[drawn] == mask[drawn]).all() and 0 < drawn.mean() < 0.1
        assert set(np.unique(scribble)) - {0, 255} == set(np.unique(mask)) - {0, 255}


@real
def test_check_of_the_slice(monkeypatch, capsys):
    status, out = command(monkeypatch, capsys, "check", "--data", "voc", "--root", REAL.parent)
    assert status == 0 and "expected 17125" in out and "0..20, 255   ok" in out
    assert "needs SegmentationClassAug (expected 10582)" in out
    with pytest.raises(DataError, match="--train-list train"):
        load(args("voc", REAL, "box", "train_aug"), "train")


def test_derived_labels_are_kept_by_picture_and_mask():
    mask = np.zeros((40, 50), np.uint8)
    mask[5:20, 5:30] = 1
    made = data.derive(Sample(name="a", mask=mask), ("boxes", "scribble"))
    again = data.derive(Sample(name="a", mask=mask.copy()), ("boxes", "scribble"))
    assert (made.scribble == again.scribble).all() and (made.boxes == again.boxes).all()
    again.scribble[:] = 7                                           # a copy: what is kept stays as it was
    assert (data.derive(Sample(name="a", mask=mask), ("scribble",)).scribble == made.scribble).all()
    other = data.derive(Sample(name="a", mask=np.roll(mask, 10, 1)), ("boxes",))
    assert other.boxes.tolist() == [[1, 15, 5, 40, 20]] and made.boxes.tolist() == [[1, 5, 5, 30, 20]]
    assert (data.derive(Sample(name="b", mask=mask), ("scribble",)).scribble != made.scribble).any()
