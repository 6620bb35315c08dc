"""solids (the renderer of machine parts), two sets in the workpiece layout, the street scenes' layouts."""

import json
import shutil
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, draw_solids, export, load, read_image, read_label


def arguments(name, root="", supervision="image", train_list="train"):
    return types.SimpleNamespace(data=name, root=str(root), train_list=train_list, supervision=supervision)


def check(name, root, monkeypatch, capsys):
    """What `python data.py check` prints, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["data.py", "check", "--data", name, "--root", str(root)])
    status = 0
    try: data.main()
    except SystemExit as end: status = end.code
    return capsys.readouterr().out, status


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """solids in the three layouts, four pictures a split."""
    made = tmp_path_factory.mktemp("solids")
    for layout in ("workpiece", "cityscapes", "gta5"): export("solids", layout, str(made / layout), n=4)
    return made


@pytest.fixture
def street(exports, tmp_path):
    """Cityscapes and GTA5 to spoil."""
    for layout in ("cityscapes", "gta5"): shutil.copytree(exports / layout, tmp_path / layout)
    return tmp_path


# ---------------------------------------------------------------- the renderer


def volume(triangles):
    """Of a closed surface, counter-clockwise from outside; six times that of the tetrahedra to the origin."""
    return np.einsum("ti,ti->", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])) / 6


def test_prisms_are_closed_and_face_outwards():
    assert np.isclose(volume(data.box((1, 3), (-1, 2), (0.5, 1))), 2 * 3 * 0.5)
    area = 24 / 2 * np.sin(2 * np.pi / 24)                          # of a polygon of 24 corners, radius 1
    assert np.isclose(volume(data.prism(data.polygon(1), 0, 2)), 2 * area)
    assert np.isclose(volume(data.prism(data.polygon(1), 0, 2, hole=0.5)), 2 * area * (1 - 0.25))
    assert np.isclose(volume(data.prism(data.polygon(1, "hexagon"), -1, 0)), 3 * np.sqrt(3) / 2, rtol=0.01)
    for name, triangles in data.SOLIDS.items():
        assert volume(triangles) > 0.1, name
        assert 0.7 < np.linalg.norm(triangles.reshape(-1, 3), axis=1).max() < 1.2, name


def hit_by_ray(triangles, origin, ray):
    """Index of the first triangle, seen from its front, that a ray meets (Moeller and Trumbore), or -1."""
    a, b, c = triangles.transpose(1, 0, 2)
    p, q = np.cross(ray, c - a), np.cross(origin - a, b - a)
    det = ((b - a) * p).sum(1)
    front = det > 1e-9
    det = np.where(front, det, 1)
    u, v, far = ((origin - a) * p).sum(1) / det, q @ ray / det, ((c - a) * q).sum(1) / det
    far = np.where(front & (u >= 0) & (v >= 0) & (u + v <= 1) & (far > 0), far, np.inf)
    return far.argmin() if far.min() < np.inf else -1


def test_the_z_buffer_equals_ray_casting():
    """Perspective, hidden surfaces and backs, at the centres of 24 x 32 pixels."""
    turn = data.rotation(0, -0.7) @ data.rotation(2, 0.4)
    clamp, flange = (size * data.SOLIDS[name] @ turn.T for name, size in (("clamp", 9), ("flange", 5)))
    triangles = np.concatenate([clamp, flange + [3, 2, 6]])
    index, normals = data.rasterise(triangles, 24, 32, 60.0)
    camera, same = np.array([0.0, 0.0, 60.0]), 0
    for y in range(24):
        for x in range(32):
            ray = np.array([x + 0.5 - 16, 12 - y - 0.5, -60.0])
            same += hit_by_ray(triangles, camera, ray) == index[y, x]
    assert (index >= 0).mean() > 0.15 and same >= 24 * 32 - 4, "all but pixels on an edge"
    seen = np.unique(index[index >= 0])
    assert np.allclose(np.linalg.norm(normals[seen], axis=1), 1)
    middle = triangles[seen].mean(1)
    assert (((camera - middle) * normals[seen]).sum(1) > 0).all(), "only fronts are seen"


def test_a_picture_is_fixed_by_its_number():
    for split in data.SOLID_SCENES:
        one, two, other = draw_solids(0, split, 5), draw_solids(0, split, 5), draw_solids(0, split, 6)
        assert (one.image == two.image).all() and (one.mask == two.mask).all()
        assert (one.image != other.image).mean() > 0.02 and one.image.shape == (*data.SOLID_SIZE, 3)
    assert (draw_solids(1, "train", 5).image != draw_solids(0, "train", 5).image).mean() > 0.5


def test_the_pictures_do_not_change():
    """Labels and mean grey of three pictures, as they were when the renderer was fixed."""
    found = [(s.name, np.unique(s.mask).tolist(), int((s.mask > 0).sum()), round(float(s.image.mean()), 1))
             for s in (draw_solids(0, split, 3) for split in data.SOLID_SCENES)]
    for (name, classes, area, grey), (name0, classes0, area0, grey0) in zip(found, FIXED, strict=True):
        assert (name, classes) == (name0, classes0), found
        assert abs(area - area0) <= 3 and abs(grey - grey0) < 0.3, found


FIXED = [("rendered_0003", [0, 8], 1414, 234.0), ("train_0003_b3", [0, 2], 1224, 126.3),
         ("val_0003_b3", [0, 4], 1505, 125.5)]


@pytest.fixture(scope="module")
def scenes():
    return {split: [draw_solids(0, split, i) for i in range(40)] for split in data.SOLID_SCENES}


def test_pictures_hold_what_they_promise(scenes):
    for split, samples in scenes.items():
        counts = [int(s.instances.max()) for s in samples]
        assert set(counts) == {1, 2, 3} and counts.count(1) > 20
        for s in samples:
            assert (s.tags == data.present(s.mask, 8)).all() and ((s.mask > 0) == (s.instances > 0)).all()
            for i in range(1, s.instances.max() + 1):
                inside = s.instances == i
                assert 0.004 < inside.mean() < 0.16 and len(np.unique(s.mask[inside])) == 1
        assert np.any([s.tags for s in samples], axis=0).all(), "each part occurs"
        assert s.name == ("rendered_0039" if split == "rendered" else f"{split}_0039_b3")


def test_rendered_pictures_are_clean_and_real_ones_are_not(scenes):
    """Grey on a plain ground with sharp labels, against colour, texture, uneven light and noise."""
    for s in scenes["rendered"]:
        assert (np.ptp(s.image.astype(int), axis=2) == 0).all(), "grey"
        edge = data.ndimage.binary_dilation(s.mask > 0)
        assert (s.image[~edge] == 242).all(), "the ground"
        inside = data.ndimage.binary_erosion(s.mask > 0)
        assert (s.image[inside] < 242).mean() > 0.95
    for s in scenes["train"]:
        ground = s.image[s.mask == 0].astype(float)
        assert ground.std(0).max() > 4 and (np.ptp(ground, axis=1) > 0).mean() > 0.5


def test_the_four_backgrounds_differ(scenes):
    """Mean colour of the ground, by background: blue cloth, brown wood, green mat, grey steel."""
    means = np.array([np.mean([s.image[s.mask == 0].mean(0) for s in scenes["train"][b::4]], axis=0)
                      for b in range(4)])
    red, green, blue = means.T
    assert blue[0] > red[0] + 15 and red[1] > blue[1] + 40 and green[2] > red[2] + 15
    assert np.ptp(means[3]) < 15


def test_each_type_has_its_own_shape():
    """Silhouettes in one pose differ from type to type."""
    turn = data.rotation(0, -0.8) @ data.rotation(2, 0.5)
    shapes = [data.rasterise(20 * t @ turn.T, 64, 64, 300.0)[0] >= 0 for t in data.SOLIDS.values()]
    assert len(shapes) == 8
    for i, a in enumerate(shapes):
        for b in shapes[:i]: assert (a & b).sum() / (a | b).sum() < 0.85


def test_a_picture_takes_few_milliseconds():
    start = time.process_time()
    for i in range(8): draw_solids(0, "train", i)
    assert (time.process_time() - start) / 8 < 0.06


@pytest.mark.parametrize("supervision", ["image", "full"])
def test_what_solids_reveals(supervision):
    args = arguments("solids", supervision=supervision)
    train, val, rendered = (load(args, split) for split in ("train", "val", "rendered"))
    assert (len(train), len(val), len(rendered)) == (1600, 200, 800)
    assert hasattr(train[1], "mask") == (supervision == "full")
    if supervision == "image": assert set(vars(train[1])) == {"name", "image", "tags"}
    assert hasattr(val[0], "mask") and hasattr(rendered[0], "mask") and hasattr(rendered[0], "boxes")
    assert hasattr(load(args, "train", masks=True)[0], "mask")
    few = data.subset(train, train.names[3::4])
    assert len(few) == 400 and few[1].name == "train_0007_b3" == few.names[few.index("train_0007_b3")]
    assert len(train) == 1600


def test_solids_takes_a_list(tmp_path):
    (tmp_path / "list.txt").write_text("train_0003_b3\n")
    assert load(arguments("solids", train_list=tmp_path / "list.txt"), "train").names == ["train_0003_b3"]
    (tmp_path / "list.txt").write_text("train_0003_b0\n")
    with pytest.raises(DataError, match="train_0003_b0"):
        load(arguments("solids", train_list=tmp_path / "list.txt"), "train")


def test_error_no_rendered_pictures():
    with pytest.raises(DataError, match="shapes has no rendered"): load(arguments("shapes"), "rendered")


# ---------------------------------------------------------------- two sets in the workpiece layout


def test_workpiece_holds_rendered_and_real_pictures(exports, monkeypatch, capsys):
    root = exports / "workpiece"
    for split in ("rendered", "train", "val"):
        got = load(arguments("workpiece", root), split, masks=True)
        true = load(arguments("solids"), split, masks=True)
        assert got.classes == true.classes and got.names == true.names[:4]
        for s, t in zip(got, (true[i] for i in range(4)), strict=True):
            assert (s.image == t.image).all() and (s.mask == t.mask).all() and (s.tags == t.tags).all()
            assert np.allclose(s.boxes, t.boxes)
    assert set(vars(load(arguments("workpiece", root), "train")[0])) == {"name", "image", "tags"}
    text, status = check("workpiece", root, monkeypatch, capsys)
    assert not status and "rendered/masks                  4   ok" in text and "rendered samples read" in text


def test_rendered_pictures_need_masks_and_nothing_else(exports, tmp_path):
    for part in ("rendered/images", "rendered/masks"):
        shutil.copytree(exports / "workpiece" / part, tmp_path / part)
    shutil.copy(exports / "workpiece" / "classes.txt", tmp_path)
    s = load(arguments("workpiece", tmp_path), "rendered")[0]
    assert (s.tags == data.present(s.mask, 8)).all()
    shutil.rmtree(tmp_path / "rendered" / "masks")
    with pytest.raises(DataError, match="rendered .* lacks 4 of 4"):
        load(arguments("workpiece", tmp_path), "rendered")


def test_error_rendered_and_real_have_other_classes(exports, tmp_path):
    shutil.copytree(exports / "workpiece", tmp_path / "w")
    own = tmp_path / "w" / "rendered" / "classes.txt"
    shutil.copy(tmp_path / "w" / "classes.txt", own)
    assert len(load(arguments("workpiece", tmp_path / "w"), "rendered")) == 4
    own.write_text("nut\nbolt\n")
    with pytest.raises(DataError, match="other classes"):
        load(arguments("workpiece", tmp_path / "w"), "rendered")


# ---------------------------------------------------------------- street scenes


def test_the_table_of_street_classes():
    assert len(data.STREET) == 34 and len(data.STREET_CLASSES) == 19
    assert data.STREET_CLASSES[::6] == ["road", "traffic-light", "rider", "bicycle"]
    ids = dict(zip(data.STREET_CLASSES, data.STREET_IDS))           # as Cityscapes' own table has them
    assert (ids["road"], ids["sidewalk"], ids["building"], ids["pole"], ids["traffic-light"], ids["sky"],
            ids["person"], ids["car"], ids["bus"], ids["train"], ids["motorcycle"], ids["bicycle"]
            ) == (7, 8, 11, 17, 19, 23, 24, 26, 28, 31, 32, 33)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_is_read(exports, split):
    got, true = load(arguments("cityscapes", exports / "cityscapes", "full"), split), load(
        arguments("solids", supervision="full"), split)
    assert got.classes == data.STREET_CLASSES and sorted(got.names) == true.names[:4]
    for s, t in zip(got, (true[i] for i in range(4)), strict=True):
        assert (s.image == t.image).all() and (s.mask == t.mask + 1).all(), "background is the first class"
        assert (s.tags[1:9] == t.tags).all() and s.tags[0] and not s.tags[9:].any()


def test_training_pictures_of_cityscapes_hide_their_labels(street):
    args = arguments("cityscapes", street / "cityscapes")
    train = load(args, "train")
    assert set(vars(train[0])) == {"name", "image", "tags"} and train[0].tags.sum() < 19
    shutil.rmtree(street / "cityscapes" / "gtFine" / "train")
    train = load(args, "train")
    assert set(vars(train[0])) == {"name", "image", "tags"} and train[0].tags.all() and "tags" in train.notes
    assert load(args, "train", masks=True).fields == ()
    with pytest.raises(DataError, match="label map"):
        load(arguments("cityscapes", street / "cityscapes", "full"), "train")


def test_label_ids_and_train_ids_are_the_same(street):
    args = arguments("cityscapes", street / "cityscapes")
    before = [s.mask for s in load(args, "val")]
    for path in (street / "cityscapes" / "gtFine" / "val").rglob("*_labelIds.png"):
        ids = np.array(Image.open(path))
        train_ids = np.full(ids.shape, 255, np.uint8)
        for t, i in enumerate(data.STREET_IDS): train_ids[ids == i] = t
        train_ids[:2] = 255
        Image.fromarray(train_ids).save(str(path).replace("labelIds", "labelTrainIds"))
        path.unlink()
    after = [s.mask for s in load(args, "val")]
    for a, b in zip(before, after, strict=True): assert (a[2:] == b[2:]).all() and (b[:2] == 255).all()


def test_gta5_is_not_exported_to_a_layout_of_real_pictures(exports, tmp_path):
    with pytest.raises(DataError, match="rendered pictures alone"):
        export("gta5", "voc", str(tmp_path), root=str(exports / "gta5"))


def test_gta5_is_read_in_both_forms(exports):
    dataset = load(arguments("gta5", exports / "gta5"), "rendered")
    modes = [Image.open(path).mode for path in sorted((exports / "gta5" / "labels").iterdir())]
    assert modes == ["P", "RGB", "P", "RGB"]
    true = load(arguments("solids"), "rendered")
    for s, t in zip(dataset, (true[i] for i in range(4)), strict=True):
        assert (s.mask == t.mask + 1).all() and (s.image == t.image).all()


def test_void_is_no_label(street):
    """Licence plate (34), void ids, and a colour that a class shares with a void label."""
    folder = street / "gta5" / "labels"
    first, second = sorted(folder.iterdir())[:2]
    ids = np.array(Image.open(first))
    ids[0, :5] = 0, 5, 18, 34, 17
    Image.fromarray(ids).save(first)
    colours = np.array(Image.open(second))
    colours[0, :4] = (0, 0, 0), (153, 153, 153), (0, 0, 142), (111, 74, 0)
    Image.fromarray(colours).save(second)
    dataset = load(arguments("gta5", street / "gta5"), "rendered")
    pole, car = data.STREET_CLASSES.index("pole") + 1, data.STREET_CLASSES.index("car") + 1
    assert dataset[0].mask[0, :5].tolist() == [255, 255, 255, 255, pole]
    assert dataset[1].mask[0, :4].tolist() == [255, pole, car, 255]


@pytest.mark.parametrize("form, spoil, words", [
    (1, lambda a: np.full_like(a, 7), "colours .*7, 7, 7"), (0, lambda a: np.full_like(a, 90), "holds 90"),
    (0, lambda a: a[:-3], "160x125")])
def test_error_labels_of_gta5(street, form, spoil, words):
    path = sorted((street / "gta5" / "labels").iterdir())[form]
    Image.fromarray(spoil(np.array(Image.open(path)))).save(path)
    dataset = load(arguments("gta5", street / "gta5"), "rendered")
    with pytest.raises(DataError, match=words): dataset[form]


def test_error_street_folders(street):
    with pytest.raises(DataError, match="no val pictures"): load(arguments("gta5", street / "gta5"), "val")
    with pytest.raises(DataError, match="no picture in"): load(arguments("gta5", street), "rendered")
    with pytest.raises(DataError, match="leftImg8bit"): load(arguments("cityscapes", street), "train")
    shutil.rmtree(street / "gta5" / "labels")
    with pytest.raises(DataError, match="label map"): load(arguments("gta5", street / "gta5"), "rendered")


def test_check_of_street_scenes(street, monkeypatch, capsys):
    text, status = check("cityscapes", street / "cityscapes", monkeypatch, capsys)
    assert not status and "expected 2975" in text and "val samples read" in text
    text, status = check("gta5", street / "gta5", monkeypatch, capsys)
    assert not status and "expected 24966" in text and "rendered samples read" in text


def test_more_classes_than_cityscapes_has(tmp_path):
    s = types.SimpleNamespace(mask=np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match="19"): data.street_ids(s, ["x"] * 19)
    s.mask = np.array([[1, 19, 255]], np.uint8)
    assert data.street_ids(s, ["x"] * 19).tolist() == [[7, 33, 0]]


# ---------------------------------------------------------------- real sets through the workpiece layout


def as_workpiece(root, classes, rows):
    """The README's recipe. rows: (split, name, image (H,W,3), label (H,W) of 0..K and 255 = none)."""
    tags = {"train": {}, "val": {}}
    for split, name, image, label in rows:
        for part, array in (("images", image), ("masks", label)):
            (root / split / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / split / part / f"{name}.png")
        tags[split][name] = [classes[k - 1] for k in np.unique(label) if 0 < k < 255]
    (root / "classes.txt").write_text("\n".join(classes))
    for split, table in tags.items(): (root / split / "tags.json").write_text(json.dumps(table))


def magnetic_tile(source):
    """Five kinds of defects; black-and-white masks with soft edges; each fourth picture is val."""
    kinds = sorted(p.name.removeprefix("MT_") for p in source.glob("MT_*") if p.name != "MT_Free")
    for kind in [*kinds, "Free"]:
        for i, path in enumerate(sorted((source / f"MT_{kind}" / "Imgs").glob("*.jpg"))):
            inside = np.array(Image.open(path.with_suffix(".png")).convert("L")) > 127
            label = (inside * (kinds.index(kind) + 1 if kind in kinds else 0)).astype(np.uint8)
            yield "val" if i % 4 == 0 else "train", path.stem, read_image(path), label


def screws(source):
    for i, path in enumerate(sorted((source / "images").glob("*.jpg"))):
        yield ("val" if i % 4 == 0 else "train", path.stem, read_image(path),
               read_label(source / "masks" / f"{path.stem}.png"))


def camvid(source):
    """Street scenes: its classes 0..10 become 1..11, its void (11) is no label."""
    for split in ("train", "val"):
        for path in sorted((source / split).glob("*.png")):
            label = read_label(source / f"{split}annot" / path.name)
            yield split, path.stem, read_image(path), np.where(label > 10, 255, label + 1).astype(np.uint8)


@pytest.mark.parametrize("name, rows, classes, count", [
    ("magnetic_tile", magnetic_tile, ["Blowhole", "Break", "Crack", "Fray", "Uneven"], 60),
    ("screwmetric_sixth", screws, ["screw"], 18), ("CamVid", camvid, [f"c{k}" for k in range(11)], 11)])
def test_real_sets_as_workpiece(pictures, tmp_path, name, rows, classes, count, monkeypatch, capsys):
    if not (pictures / name).is_dir(): pytest.skip(f"no {name}")
    as_workpiece(tmp_path, classes, rows(pictures / name))
    sets = [load(arguments("workpiece", tmp_path), split) for split in ("train", "val")]
    assert sum(map(len, sets)) == count and min(map(len, sets)) >= 3
    assert not hasattr(sets[0][0], "mask")
    assert all((s.mask[s.mask != 255] <= len(classes)).all() for s in sets[1])
    assert any(s.tags.any() for s in sets[0])
    _, status = check("workpiece", tmp_path, monkeypatch, capsys)
    assert not status
