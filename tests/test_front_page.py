"""benchmarks/front_page.py: one page of what run folders hold; a folder that is no run is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import front_page
from common import contact_sheet, save_label
from data import load


def fake_run(folder, method="a2gnn", supervision="box", stages=(), **fields):
    """A run folder of shapes: its arguments and results, no label maps."""
    args = {"data": "shapes", "root": "", "train_list": "train_aug", "supervision": supervision, **fields}
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "results.json").write_text(json.dumps(
        {"command": f"python some/where/{method}.py --seed 0", "stages": list(stages)}))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run whose labels and predictions of two pictures are the ground truth."""
    folder = fake_run(tmp_path / "run", stages=[{"stage": "val", "miou": 61.26}])
    args = front_page.method_of(folder)[1]
    for split, name in (("train", "pseudo"), ("val", "val")):
        truth = load(args, split, masks=True)
        for sample in (truth[0], truth[1]): save_label(folder / name / f"{sample.name}.png", sample.mask)
    return folder


def test_one_run_makes_a_page(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["front_page.py", "--to", str(tmp_path / "page.jpg"), str(run)])
    front_page.main()
    left_out, made = capsys.readouterr().out.splitlines()
    assert "rrm.py" in left_out and "scl.py" in left_out and "a2gnn.py" not in left_out
    page = np.array(Image.open(tmp_path / "page.jpg").convert("RGB"))
    assert f"{page.shape[1]} x {page.shape[0]} pixels" in made
    assert page.shape[1] > 6 * 96 and page.std() > 20


@pytest.mark.parametrize("supervision", ["image", "point", "scribble", "box", "semi", "full"])
def test_labels_that_are_the_truth_look_like_it(run, supervision):
    args = front_page.method_of(run)[1]
    args.supervision = supervision
    block = front_page.segmentation_block(run, "a2gnn", args, {"val": {"miou": 61.26}}, 0, 2, 64)
    assert (block.title, block.score) == (f"A2GNN: {front_page.WORDS[supervision]}", "val mIoU 61.3")
    for train, val in block.rows:
        weak, label, truth, image, prediction, real = map(np.array, train.cells + val.cells)
        assert (label == truth).all() and (prediction == real).all()
        assert (weak != truth).any() == (supervision != "full") and (image != real).any()


def test_the_drawn_box_surrounds_its_object():
    args = front_page.types.SimpleNamespace(data="shapes", root="", train_list="train_aug", supervision="box")
    sample = load(args, "train", masks=True)[0]
    side = min(sample.mask.shape)
    left, top = (sample.mask.shape[1] - side) / 2, (sample.mask.shape[0] - side) / 2
    k, *corners = sample.boxes[0].tolist()
    sample.boxes = sample.boxes[:1]
    sample.image = np.zeros_like(sample.image)
    drawn = np.array(front_page.weak_cell(sample, "box", [], 4 * side)).any(-1)
    ys, xs = np.nonzero(drawn)
    found = xs.min() / 4 + left, ys.min() / 4 + top, (xs.max() + 1) / 4 + left, (ys.max() + 1) / 4 + top
    inside = np.clip(corners, [left, top] * 2, [left + side, top + side] * 2)
    assert np.abs(np.array(found) - inside).max() < 0.5


def test_few_shot_pictures_come_from_the_panels(tmp_path):
    folder = fake_run(tmp_path / "run", "scl", "full", shots=[1, 5])
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 200, (160, 160, 3), np.uint8) for _ in range(5)] for _ in range(2)]
    contact_sheet(folder / "panels" / "test.png", rows, ["a"] * 5)
    found = front_page.sheet_rows(folder / "panels" / "test.png")
    assert all((np.array(a) == b).all() for mine, theirs in zip(found, rows) for a, b in zip(mine, theirs))
    block = front_page.few_shot_block(folder, *front_page.method_of(folder)[1:], 0, 2, 32)
    assert [len(line.cells) for line in block.rows[1]] == [1, 4]


def test_a_folder_that_is_no_run_and_other_mistakes(run, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = fake_run(tmp_path / "broken")
    (broken / "args.json").write_text("{")
    to, no_method = str(tmp_path / "page.png"), fake_run(tmp_path / "other", "speed")
    no_maps, no_panels = fake_run(tmp_path / "bare"), fake_run(tmp_path / "shot", "scl", "full", shots=[1])
    for runs, changes, words in (
            ([tmp_path / "empty"], {}, "is no finished run"), ([tmp_path / "gone"], {}, "is no finished run"),
            ([no_method], {}, "no method file"), ([broken], {}, "is no JSON"),
            ([no_maps], {}, "holds no predictions"), ([no_panels], {}, "has 0 episodes"),
            ([run, run], {}, "a second run of a2gnn"),
            ([], {}, "at least one"), ([run], {"lines": 0}, "at least one"),
            ([run], {"first": 1}, "fewer than")):
        with pytest.raises(SystemExit, match=words): front_page.front_page(tuple(runs), to, **changes)
    assert not Path(to).exists()
