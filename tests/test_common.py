"""common.py against authorities: hand counts, pydensecrf, torchvision, files written here, itself."""

import dataclasses
import importlib
import itertools
import json
import random
import re
import struct
import textwrap
import types
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import common
import data
from common import CRF, ConfusionMatrix, Run, UserError, dense_crf, make_backbone, parse_args
from conftest import sh


@dataclasses.dataclass
class Args:
    data: Literal["shapes", "voc"] = "shapes"
    supervision: str = "box"
    preset: Literal["auto", "paper", "shapes", "photos"] = "auto"
    root: str = ""
    out: str = ""
    reuse: str = ""
    fresh: bool = False
    seed: int = 0
    device: str = "cpu"
    amp: bool = True
    workers: int = 0
    save_every: int = 3
    log_every: int = 1
    lr: float = 0.01
    radius: int = 5
    scales: tuple[float, ...] = (1.0, 0.5)


# ---------------------------------------------------------------- arguments


def test_a_preset_moves_defaults_and_a_flag_wins():
    presets = {"shapes": {"radius": 3, "lr": 0.2}, "photos": {"radius": 4}}
    ask = lambda line: parse_args(Args, "text", presets, line.split())          # noqa: E731
    auto = ask("")
    assert (auto.preset, auto.radius, auto.lr, auto.scales) == ("shapes", 3, 0.2, (1.0, 0.5))
    assert (ask("--data voc").preset, ask("--data voc").radius) == ("paper", 5)
    assert ask("--data voc --preset photos").radius == 4 and ask("--preset paper").radius == 5
    assert ask("--radius 5").radius == 5 and ask("--radius 5").lr == 0.2, "the paper's own value, by hand"
    assert ask("--data voc").root == "data/voc" and ask("--data voc --root x").root == "x"
    assert ask("--data voc --seed 3").out.endswith("-voc-box-s3") and ask("--out here").out == "here"
    tasks = dataclasses.make_dataclass("Tasks", [("task", str, "semantic")], bases=(Args,))
    outs = [parse_args(tasks, "text", {}, line.split()).out for line in ("", "--task instance")]
    assert [out.split("-", 1)[1] for out in outs] == ["shapes-box-s0", "shapes-box-instance-s0"]


@pytest.mark.parametrize("line", ["--data imagenet", "--preset large", "--no-such-flag 1", "--radius many"])
def test_an_unknown_value_ends_with_an_error(line, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Args, "text", {}, line.split())
    assert end.value.code not in (0, None) and line.split()[0] in str(capsys.readouterr())


def test_presets_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="photos.*paper, shapes"):
        parse_args(Args, "text", {"shapes": {}}, ["--preset", "photos"])
    with pytest.raises(UserError, match="steeps"):
        parse_args(Args, "text", {"shapes": {"steeps": 1}}, [])


def test_help_shows_the_docstring_as_it_stands(capsys):
    doc = "Title — a paper\n\nSymbols      x image (B,3,H,W)\nEquations    (1) maps  (2) loss\n     [D1] no"
    with pytest.raises(SystemExit) as end:
        parse_args(Args, doc, {}, ["--help"])
    text = capsys.readouterr().out
    assert not end.value.code and doc in text and "--radius" in text


# ---------------------------------------------------------------- files and pictures


def test_a_writer_that_fails_leaves_the_old_file_and_no_half_one(tmp_path):
    file = tmp_path / "sub" / "a.json"
    common.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(file, {"a": object()})
    with pytest.raises(RuntimeError), common.atomic(file) as temporary:
        temporary.write_text("half")
        assert temporary.exists() and temporary.parent == file.parent
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in file.parent.iterdir()] == ["a.json"]


def test_labels_are_palette_pngs_in_vocs_colours(tmp_path):
    palette = common.voc_palette()
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
             (128, 128, 128), (64, 0, 0)]
    assert palette[:9].tolist() == [list(c) for c in first] and palette[20].tolist() == [0, 64, 128]
    assert palette[255].tolist() == [224, 224, 192]
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    common.save_label(tmp_path / "x.y.png", torch.from_numpy(label).long())
    with Image.open(tmp_path / "x.y.png") as image:
        assert image.mode == "P" and (np.asarray(image) == label).all()
        assert (np.asarray(image.convert("RGB")) == palette[label]).all()


def test_overlay_and_contact_sheet(tmp_path):
    image, label = np.full((8, 4, 3), 100, np.uint8), np.zeros((8, 4), np.uint8)
    label[0] = 1
    over = common.overlay(image, label, 0.5)
    assert over[0, 0].tolist() == [114, 50, 50] and (over[1:] == 100).all()
    for use in (lambda: common.overlay(image, label[1:]), lambda: common.confusion_of(
            type("Data", (list,), {"classes": ["a"]})([data.Sample(mask=label)]), lambda s: label[:, 1:])):
        with pytest.raises(UserError, match="the data have changed"): use()
    heat = common.colour(np.array([[0, 1 / 3, 2 / 3, 1]]))
    assert heat[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255]]
    rows = [[image, label], [image, label.astype(float)]]
    common.contact_sheet(tmp_path / "s.png", rows, ["a", "b"], height=16, gap=2)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (20 + 2 * 18, 2 * 8 + 3 * 2, 3) and (sheet[24, 4] == 100).all()
    assert sheet[21, 14].tolist() == [128, 0, 0] and (sheet[:18] < 128).any(), "label colour; titles"


def test_panels_have_folders_functions_and_the_truth(tmp_path, monkeypatch):
    """A column is a folder of labels or a function; a sample without ground truth has no last cell."""
    sheets, image = [], np.full((4, 5, 3), 9, np.uint8)
    monkeypatch.setattr(common, "contact_sheet", lambda path, rows, titles: sheets.append((rows, titles)))
    run = types.SimpleNamespace(path=lambda folder, name: tmp_path / folder / f"{name}.png")

    class Truth(list):
        classes = ["one", "two"]

    truth = Truth(types.SimpleNamespace(name=str(n), image=image) for n in range(20))
    truth[0].mask = np.full((4, 5), 2)
    for s in truth: common.save_label(tmp_path / "pseudo" / f"{s.name}.png", np.ones((4, 5)))
    common.draw_panels(run, "train", truth, {"CAM": lambda s: image[..., 0] / 9, "labels": "pseudo"})
    (rows, titles), = sheets
    assert titles == ["image", "CAM", "labels", "ground truth"]
    assert [len(row) for row in rows] == [4] + [3] * 15
    assert (rows[1][1] == 1).all() and (rows[0][2] == common.overlay(image, np.ones((4, 5), int))).all()
    assert (rows[0][3] == common.overlay(image, truth[0].mask)).all()


def test_pictures_to_predict(tmp_path):
    for name in ("b.jpg", "a.PNG", "._a.png", "notes.txt"): (tmp_path / name).write_text("")
    assert [file.name for file in common.files_to_predict(tmp_path)] == ["a.PNG", "b.jpg"]
    assert common.files_to_predict(str(tmp_path / "b.jpg")) == [tmp_path / "b.jpg"]
    (tmp_path / "b.png").write_text("")
    with pytest.raises(data.DataError, match="b.jpg and b.png have one"): common.files_to_predict(tmp_path)
    with pytest.raises(UserError, match="no picture"): common.files_to_predict(tmp_path / "notes.txt")
    (tmp_path / "b.png").rename(tmp_path / "a_overlay.png")
    with pytest.raises(data.DataError, match="both write a_overlay.png"): common.files_to_predict(tmp_path)


# ---------------------------------------------------------------- metric


def test_confusion_matrix_counted_by_hand():
    mask = np.array([[0, 0, 0, 1], [1, 1, 2, 255]])
    pred = np.array([[0, 0, 1, 1], [255, 2, 2, 3]])            # the 3 stands on an ignored pixel
    matrix = ConfusionMatrix(["background", "cat", "dog", "cow", "owl"])
    matrix.add(pred[:1], mask[:1])
    matrix.add(torch.from_numpy(pred[1:]), torch.from_numpy(mask[1:]))
    # background: 2 right, 1 missed; cat: 1 right, 2 missed (one by no label), 1 too many; dog: 1, 1 too many
    by_hand = {"background": 200 / 3, "cat": 25, "dog": 50, "cow": None, "owl": None}
    assert matrix.iou() == pytest.approx(by_hand)
    assert matrix.miou() == pytest.approx((200 / 3 + 25 + 50) / 3)
    assert matrix.precision() == pytest.approx(100 * 4 / 6)
    assert matrix.coverage() == pytest.approx(100 * 6 / 7)
    matrix.add(np.array([[3]]), np.array([[0]]))               # predicted, never true: present, and zero
    assert matrix.iou()["cow"] == 0 and matrix.iou()["owl"] is None
    empty = ConfusionMatrix(["background", "cat"])
    assert (empty.miou(), empty.precision(), empty.coverage()) == (None, None, None)


@pytest.mark.parametrize("pred, mask, words", [
    ([[0, 2]], [[0, 1]], "prediction holds .2."), ([[0, 1]], [[0, 254]], "mask holds .254."),
    ([[0]], [[0, 1]], "size")])
def test_confusion_matrix_refuses(pred, mask, words):
    with pytest.raises(ValueError, match=words):
        ConfusionMatrix(["background", "cat"]).add(np.array(pred), np.array(mask))


# ---------------------------------------------------------------- dense CRF

PSA = common.CRF(gauss_xy=3, gauss_w=3, bi_xy=20, bi_rgb=13, bi_w=10, steps=5)


def noisy_picture(seed, height=30, width=41):
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 60, np.uint8)
    image[8:22, 10:30] = (200, 90, 40)
    image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    inside = np.zeros((height, width))
    inside[8:22, 10:30] = 1
    prob = np.zeros((4, height, width), np.float32)
    prob[1] = np.clip(0.3 + 0.4 * inside + rng.normal(0, 0.25, inside.shape), 0.02, 0.98)
    prob[3] = 1 - prob[1]
    return image, prob, inside


@pytest.mark.parametrize("backend", ["pydensecrf", "torch"])
def test_dense_crf_is_pydensecrf_over_the_present_classes(backend):
    import pydensecrf.densecrf as authority
    from pydensecrf.utils import unary_from_softmax
    image, prob, inside = noisy_picture(0)
    field = authority.DenseCRF2D(41, 30, 2)
    field.setUnaryEnergy(unary_from_softmax(np.ascontiguousarray(prob[[1, 3]])))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=20, srgb=13, rgbim=image, compat=10)
    expected = np.array(field.inference(5)).reshape(2, 30, 41)
    (result,) = dense_crf([image], [torch.from_numpy(prob)], PSA, backend)
    assert result.dtype == np.float32 and np.allclose(result[[1, 3]], expected, atol=1e-6)
    assert not result[[0, 2]].any()
    wrong = lambda p: ((p[1] > p[3]) != inside).mean()          # noqa: E731
    assert wrong(prob) > 0.1 and wrong(result) < 0.02


def test_dense_crf_leaves_alone_and_refuses():
    image, prob, _ = noisy_picture(1)
    assert (dense_crf([image], [prob], PSA, "none")[0] == prob).all()
    alone = np.zeros_like(prob)
    alone[2] = 0.4
    assert (dense_crf([image], [alone], PSA)[0] == alone).all()
    with pytest.raises(ValueError, match="match"):
        dense_crf([image[:-1]], [prob], PSA)
    with pytest.raises(ValueError, match="NaN"):
        dense_crf([image], [prob * np.nan], PSA)
    with pytest.raises(ValueError):
        dense_crf([image, image], [prob], PSA)
    with pytest.raises(ValueError, match="none of"):
        dense_crf([image], [prob], PSA, "other")


def test_dense_crf_in_processes_gives_the_same():
    images, probs, _ = zip(*(noisy_picture(seed, 20 + seed) for seed in (9, 10, 11)))
    together = dense_crf(images, probs, PSA, "pydensecrf", workers=2)
    alone = dense_crf(images, probs, PSA, "pydensecrf")
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert not (together[0] == probs[0]).all()


# ---------------------------------------------------------------- the run folder


class Toy(torch.utils.data.Dataset):
    """Draws in small: item n is fixed by n."""

    def __len__(self):
        return 2**40

    def __getitem__(self, n):
        image = torch.from_numpy(np.random.default_rng(n).normal(size=(3, 8, 8)).astype(np.float32))
        return types.SimpleNamespace(name=str(n), image=image, boxes=torch.full((1, 5), float(n)))


def collate(samples):
    name, image, boxes = zip(*((s.name, s.image, s.boxes) for s in samples))
    return types.SimpleNamespace(name=list(name), image=torch.stack(image), boxes=list(boxes))


@pytest.fixture(autouse=True)
def toy_collate(monkeypatch):
    import data
    monkeypatch.setattr(data, "collate", collate)


def toy_net():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(144, 2))


def train(run, stage="net", steps=10, stop=None):
    """Trains the toy, or leaves in the middle of step `stop`; returns the net and the steps done."""
    net, done = toy_net(), []
    optim = torch.optim.SGD(net.parameters(), lr=run.args.lr, momentum=0.9)
    for step, batch in run.steps(stage, Toy(), steps, 4, net, optim, common.poly(steps)):
        assert batch.boxes[1][0, 0] == 4 * step + 1, "step t takes items 4t … 4t + 3"
        loss = (net(batch.image) - torch.rand(1) - np.random.rand()).pow(2).mean()
        if step == stop: return net, done
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, step_size=optim.param_groups[0]["lr"])
        done.append(step)
    return net, done


def same_weights(one, other):
    one, other = (torch.cat([value.flatten() for value in net.state_dict().values()]) for net in (one, other))
    assert one.isfinite().all()
    return torch.equal(one, other)


def lines(run):
    return [json.loads(line) for line in (run.dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_training_ends_bit_for_bit_like_an_undisturbed_one(tmp_path, workers):
    whole, done = train(Run(Args(out=str(tmp_path / "whole"))))
    assert done == list(range(10)) and not same_weights(whole, toy_net())
    args = Args(out=str(tmp_path / "parts"), workers=workers)
    first = Run(args)
    half, done = train(first, stop=7)
    assert done == list(range(7)) and not first.resumed and not same_weights(whole, half)
    with open(first.dir / "log.jsonl", "a") as file:
        file.write('{"stage": "net", "st')                      # what a kill leaves of a line
    common.seed_everything(99)
    second = Run(args)
    net, done = train(second)
    assert second.resumed and done == [6, 7, 8, 9] and same_weights(net, whole)
    assert [entry["step"] for entry in lines(second)] == list(range(10))
    assert lines(second)[5]["step_size"] == pytest.approx(0.01 * 0.5 ** 0.9)
    after = torch.rand(1)
    third, done = train(Run(args))
    assert done == [] and same_weights(third, whole)
    assert torch.rand(1) == after, "a stage that is skipped leaves the same random state"


def test_tensorboard_shows_what_the_log_says_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    first = Run(Args(out=str(tmp_path)))
    train(first, "early")
    train(first, stop=8)
    first.writer.close()
    second = Run(Args(out=str(tmp_path)))
    train(second)
    second.writer.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    for stage in ("early", "net"):
        for key in ("loss", "step_size"):
            logged = [(entry["step"], entry[key]) for entry in lines(second) if entry["stage"] == stage]
            seen = [(event.step, event.value) for event in shown.Scalars(f"{stage}/{key}")]
            assert len(seen) == 10 and np.allclose(seen, logged)


def test_a_training_that_diverges_ends_with_a_sentence(tmp_path):
    run = Run(Args(out=str(tmp_path), lr=1e30))
    with pytest.raises(UserError, match="net: loss is (nan|inf) in step .* lower learning rate"): train(run)
    assert all(np.isfinite(entry["loss"]) for entry in lines(run)), "log.jsonl holds numbers only"
    assert all(np.isfinite(entry["loss"]) for entry in lines(run)), "log.jsonl holds numbers only"


@pytest.mark.parametrize("steps", [3, 2])
def test_no_checkpoint_holds_weights_that_are_no_numbers(tmp_path, steps):
    """Also between two lines of the log; 3: a save on the way, 2: the last one."""
    run = Run(Args(out=str(tmp_path), lr=1e30, log_every=100))
    with pytest.raises(UserError, match=f"net: a weight .* in step {steps - 1}, .* --reuse {tmp_path}"):
        train(run, steps=5 if steps == 3 else steps)
    assert not (tmp_path / "net.pt").exists()


def test_a_checkpoint_holds_tensors_and_plain_types(tmp_path):
    run = Run(Args(out=str(tmp_path)))
    train(run, steps=4)
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert set(state) == {"model", "optim", "step", "args", "rng"} and state["step"] == 4
    assert state["args"]["scales"] == [1.0, 0.5]
    assert state["args"] == json.loads((tmp_path / "args.json").read_text())


@pytest.mark.parametrize("seconds, expected", [(0.1, [2, 4, 6, 8, 9]), (1.1, [2, 8, 9]), (9, [2, 9])])
def test_saving_takes_a_twentieth_of_the_time(tmp_path, monkeypatch, seconds, expected):
    """A step takes 4 s here, saving so many; the last step is always saved."""
    clock, saved = types.SimpleNamespace(now=0.0), []
    def save(path, state):
        saved.append(state["step"])
        clock.now += seconds
    monkeypatch.setattr(common, "save_checkpoint", save)
    monkeypatch.setattr(common, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    run, net = Run(Args(out=str(tmp_path), save_every=2)), toy_net()
    for _ in run.steps("net", Toy(), 9, 4, net, torch.optim.SGD(net.parameters(), 0.1)): clock.now += 4
    assert saved == expected


def test_random_states_come_back():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), torch.rand(1).item()
    draw()
    state = common.rng_state()
    first = draw()
    assert draw() != first
    common.set_rng_state(state)
    assert draw() == first


def test_a_folder_of_other_arguments_is_refused_by_field(tmp_path):
    Run(Args(out=str(tmp_path), radius=5))
    with pytest.raises(UserError, match=r"lr: 0.3, there 0.01; radius: 7, there 5.*--fresh"):
        Run(Args(out=str(tmp_path), radius=7, lr=0.3))
    assert Run(Args(out=str(tmp_path), workers=2, save_every=5, log_every=9)).resumed


@pytest.mark.parametrize("root", ["{0}/voc", "{0}/voc/", "voc", "./voc/", "x/../voc"])
def test_a_path_is_the_same_however_it_is_spelled(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    train(Run(Args(out="run", root=f"{tmp_path}/voc"), {"net": ["root"]}))
    again = Args(out="run", root=root.format(tmp_path))
    assert Run(again).resumed and common.read_json("run/args.json")["root"] == again.root, "as it was given"
    _, done = train(Run(dataclasses.replace(again, out="other", reuse="run"), {"net": ["root"]}))
    assert not done
    for other in (f"{tmp_path}/voc2", "coco", ""):
        with pytest.raises(UserError, match="root: "): Run(Args(out="run", root=other))
    two = {"aux_root": "a/,b", "weights": "imagenet", "lr": "a/"}
    assert not common.differing(two, {**two, "aux_root": f"a,{tmp_path}/b"}, two)
    assert len(common.differing(two, {"aux_root": "a", "weights": "none", "lr": "a"}, two)) == 3


def test_fresh_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine/a.png", "my.pt", "my.json"):
        (tmp_path / name).write_text("mine")
    run = Run(Args(out=str(tmp_path)))
    train(run)
    common.save_label(run.path("pseudo/deep", "a"), np.zeros((2, 2)))
    run.result("val", miou=1.0)
    again = Run(Args(out=str(tmp_path), fresh=True, radius=9))
    assert not again.resumed and not again.has("val") and again.seconds("net") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "my.pt", "my.json", ".lock", "args.json"}
    assert (tmp_path / "mine/a.png").exists()


SCRIPT = """
    import sys
    sys.path.insert(0, TESTS)
    import test_common as t, common, torch
"""


def script(tmp_path, body):
    file = tmp_path / "script.py"
    tests = str(Path(__file__).resolve().parent)
    file.write_text(textwrap.dedent(SCRIPT).replace("TESTS", repr(tests)) + textwrap.dedent(body))
    return file


def test_a_second_process_on_the_folder_is_refused(tmp_path):
    run = Run(Args(out=str(tmp_path / "run")))
    file = script(tmp_path, f"common.Run(t.Args(out={str(run.dir)!r}))")
    assert "another process" in sh(file, ok=False).stdout
    run.lock_file.close()
    (run.dir / ".left.png.1.tmp").write_text("half a file")
    assert "continued" in sh(file).stdout
    assert not list(run.dir.glob(".*.tmp")), "left over by a killed process"


def test_todo_goes_on_by_chunk(tmp_path):
    names = ["a", "b.c", "d", "e", "f"]
    run = Run(Args(out=str(tmp_path)))
    assert list(run.todo(names, "cam")) == [[name] for name in names]
    assert list(run.todo(names, "cam", chunk=2)) == [["a", "b.c"], ["d", "e"], ["f"]]
    for name, in run.todo(names, "cam"):
        if name == "e": break
        common.save_npz(run.path("cam", name, ".npz"), cam=np.ones(2))
    assert list(run.todo(names, "cam")) == [["e"], ["f"]]
    assert list(run.todo(names, "cam", chunk=2)) == [["d", "e"], ["f"]], "chunks stay as they were"


def test_what_follows_a_skipped_stage_draws_the_same(tmp_path):
    def job():
        run = Run(Args(out=str(tmp_path)))
        for name, in run.todo(["a", "b"], "seeds"):
            common.save_label(run.path("seeds", name), torch.randint(0, 3, (2, 2)))
        return torch.rand(1).item()
    assert job() == job()


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    clock = itertools.count(step=10)                            # each look at the clock is ten seconds later
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    with Run(Args(out=str(tmp_path))).timed("walk"):
        pass
    run = Run(Args(out=str(tmp_path)))
    assert run.seconds("walk") == 10
    with pytest.raises(KeyboardInterrupt), run.timed("walk"), run.timed("walk"):
        raise KeyboardInterrupt
    assert Run(Args(out=str(tmp_path))).seconds("walk") == 20, "an inner block of the same stage counts once"


def test_results(tmp_path, capsys):
    run = Run(Args(out=str(tmp_path)))
    matrix = ConfusionMatrix(["background", "cat"])
    matrix.add(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 0, 1]]))
    assert not run.has("val")
    run.result("seed", miou=1.0)
    run.result("val", split="val", n_images=3, confusion=matrix, crf=False)
    run.result("seed", miou=2.0, seconds=7)
    assert Run(Args(out=str(tmp_path))).has("val")
    result = json.loads((tmp_path / "results.json").read_text())
    seed, val = result["stages"]
    assert (seed["stage"], seed["miou"], seed["seconds"]) == ("seed", 2.0, 7)
    assert val["iou"] == pytest.approx({"background": 200 / 3, "cat": 50})
    assert val["miou"] == pytest.approx(175 / 3)
    assert (val["n_images"], val["crf"], val["seconds"]) == (3, False, 0) and val["peak_memory_mb"] > 10
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] and result["args"]["radius"] == 5
    assert {"command", "git", "device"} <= set(result) and seed["git"] == val["git"] == result["git"]
    capsys.readouterr()
    run.table()
    assert re.search(r"val\s+58\.33", capsys.readouterr().out)
    Run(Args(out=str(tmp_path / "own"))).table()
    assert "nothing was scored" in capsys.readouterr().out


FIELDS = {"net": ["seed", "lr"], "pseudo": ["radius"]}


def pipeline(args):
    run = Run(args, FIELDS)
    net, done = train(run)
    made = []
    for name, in run.todo(["a", "b"], "pseudo", stage="pseudo", beside=["cam"]):
        common.save_npz(run.path("cam", name, ".npz"), cam=np.ones(2))
        common.save_label(run.path("pseudo", name), np.full((2, 2), args.radius))
        made.append(name)
    return run, net, done, made


def test_reuse_takes_the_stages_whose_fields_agree(tmp_path):
    _, net, done, made = pipeline(Args(out=str(tmp_path / "a")))
    assert len(done) == 10 and len(made) == 2
    run, other, done, made = pipeline(Args(out=str(tmp_path / "b"), reuse=str(tmp_path / "a"), scales=(1.0,)))
    assert not done and not made and same_weights(net, other) and (run.dir / "cam/a.npz").exists()
    assert set(run.results["reused"]) == {"net", "pseudo"}
    run, _, done, made = pipeline(Args(out=str(tmp_path / "c"), reuse=str(tmp_path / "a"), radius=2))
    assert not done and made == ["a", "b"] and set(run.results["reused"]) == {"net"}
    run, _, done, made = pipeline(Args(out=str(tmp_path / "d"), reuse=str(tmp_path / "a"), lr=0.02))
    assert len(done) == 10 and made == ["a", "b"] and "reused" not in run.results
    with pytest.raises(UserError, match="args.json"):
        pipeline(Args(out=str(tmp_path / "e"), reuse=str(tmp_path)))
    assert not (tmp_path / "e").exists()


def test_results_say_which_commit_made_them(tmp_path, monkeypatch, capsys):
    for name, commit in (("a", "abc1"), ("b", "abc2"), ("c", "abc3")):
        monkeypatch.setattr(common, "git_commit", lambda commit=commit: commit)
        last = str(tmp_path / chr(ord(name) - 1)) if name > "a" else ""
        run, *_ = pipeline(Args(out=str(tmp_path / name), reuse=last))
        run.result("val", miou=1.0)
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert (results["git"], results["stages"][0]["git"]) == ("abc3", "abc3")
    assert results["reused_git"] == {"net": "abc1", "pseudo": "abc1"}, "who made it, not who had it"
    assert set(results["reused"].values()) == {str(tmp_path / "b")}
    assert "goes on with" not in capsys.readouterr().out
    Run(Args(out=str(tmp_path / "c"))).result("val_crf", miou=1.0)
    assert "goes on with" not in capsys.readouterr().out
    monkeypatch.setattr(common, "git_commit", lambda: "abc4")
    Run(Args(out=str(tmp_path / "c"))).result("val_crf", miou=2.0)
    assert re.search(r"/c has stages of git abc3 and goes on with git abc4", capsys.readouterr().out)
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert [entry["git"] for entry in results["stages"]] == ["abc3", "abc4"]


def test_reuse_takes_no_unfinished_training(tmp_path):
    train(Run(Args(out=str(tmp_path / "a")), FIELDS), stop=7)
    _, done = train(Run(Args(out=str(tmp_path / "b"), reuse=str(tmp_path / "a")), FIELDS))
    assert done == list(range(10))


def test_two_processes_share_the_work_and_sum(tmp_path):
    """Sharded items, a sum over processes, and two halves of a batch that train like the whole."""
    file = script(tmp_path, """
        def train(out):
            run = common.Run(t.Args(out=out, save_every=2, lr=0.01))
            torch.manual_seed(0)
            net = torch.nn.Conv2d(3, 1, 3)
            ddp, optim, seen = run.place(net), torch.optim.SGD(net.parameters(), 0.01), []
            for step, batch in run.steps("net", t.Toy(), 3, 4, net, optim):
                seen += batch.name
                optim.zero_grad(); ddp(batch.image).square().mean().backward(); optim.step()
            return run, net, [seen, torch.rand(1).item()]
        def threads_left():                     # registered first, so called last, after the group's end
            tasks = (p.read_text() for p in Path("/proc/self/task").glob("*/comm"))
            name = f"{sys.argv[1]}.threads.{os.environ.get('RANK', 0)}"
            Path(name).write_text(" ".join(task.strip() for task in tasks))
        import atexit, data, os, sys
        from pathlib import Path
        atexit.register(threads_left)
        data.collate = t.collate
        run, net, seen = train(sys.argv[1])
        matrix = common.ConfusionMatrix(["background", "cat"])
        matrix.add(t.np.full((1, 2), common.rank()), t.np.ones((1, 2), int))
        names = list(run.todo(list("abcde"), "cam", chunk=2))
        common.write_json(f"{sys.argv[1]}.{common.rank()}", [
            *seen, common.shard(list("xyz")), names, matrix.reduce().counts.tolist(),
            net.weight.sum().item(), net.bias.item()])
    """)
    sh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", file, tmp_path / "two")
    sh(file, tmp_path / "one")
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one.0", "two.0", "two.1"))
    assert first[0] == ["0", "1", "4", "5", "8", "9"] and second[0] == ["2", "3", "6", "7", "10", "11"]
    assert alone[0] == [str(n) for n in range(12)]
    assert first[1] == second[1] == alone[1], "after a stage all processes draw the same"
    assert (first[2], second[2]) == (["x", "z"], ["y"])
    assert first[3] == [["a", "b"], ["e"]] and second[3] == [["c", "d"]]
    assert first[4] == second[4] == [[0, 0, 0], [2, 2, 0]]
    assert first[5:] == second[5:] == pytest.approx(alone[5:], abs=1e-6)
    for number in "01":
        threads = (tmp_path / f"two.threads.{number}").read_text()
        assert "python" in threads and "gloo" not in threads, "they may abort the exit"


@pytest.mark.parametrize("device, gpus, local, words", [
    ("cuda:7", 2, None, "--device cuda:7: .* 2 GPUs"), ("cuda", 0, None, "--device cuda: .* 0 GPUs"),
    ("cuda:0", 0, None, "0 GPUs"), ("gpu", 2, None, "--device gpu"), ("cuda", 2, 2, "process 2 .* 2 GPUs"),
    ("cuda:1", 2, None, None), ("cuda", 1, None, None), ("auto", 2, 1, None), ("cuda:7", 2, 1, None)])
def test_gpus_that_are_not_there_are_refused(device, gpus, local, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if local is not None: monkeypatch.setenv("LOCAL_RANK", str(local))
    if words is None:
        expected = local if local is not None else device[5:] or 0
        assert common.start_processes(device) == torch.device(f"cuda:{expected}")
        return
    with pytest.raises(UserError, match=words): common.start_processes(device)


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl")])
def test_how_each_backend_waits_and_ends(device, backend, monkeypatch):
    """nccl: a barrier on the process' own GPU; its group is not left at the exit, where it would wait."""
    made, ends, waits = [], [], []
    for name, value in {"is_available": True, "device_count": 4, "current_device": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(common.dist, "init_process_group", lambda backend, timeout: made.append(backend))
    monkeypatch.setattr(common.dist, "is_initialized", lambda: bool(made))
    monkeypatch.setattr(common.dist, "get_backend", lambda: made[0])
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(common.dist, "barrier", lambda device_ids: waits.append(device_ids))
    monkeypatch.setattr(common.atexit, "register", ends.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    common.start_processes(device)
    common.barrier()
    gloo = backend == "gloo"
    assert made == [backend] and waits == [None if gloo else [2]]
    assert ends == ([common.dist.destroy_process_group] if gloo else [])


def test_a_batch_that_does_not_split_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class WithBatch(Args):
        net_batch: int = 4

    monkeypatch.setattr(common, "world", lambda: 3)
    with pytest.raises(UserError, match="--net-batch 4 can not be split over 3"):
        Run(WithBatch(out=str(tmp_path)))
    assert not (tmp_path / "args.json").exists()


def test_poly_schedule():
    factor = common.poly(100)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.5 ** 0.9) and factor(99) == pytest.approx(0.01 ** 0.9)
    assert common.poly(10, power=2)(5) == 0.25


# ---------------------------------------------------------------- backbones and heads


@pytest.mark.parametrize("name, stride, strides", [
    ("tiny", 4, (2, 4, 4, 4)), ("tiny", 8, (2, 4, 8, 8)), ("resnet18", 8, (4, 8, 8, 8)),
    ("resnet18", 32, (4, 8, 16, 32)), ("mobilenet_v2", 8, (4, 8, 8, 8)), ("mobilenet_v2", 16, (4, 8, 16, 16)),
    ("vgg16", 8, (2, 4, 8, 8))])
def test_taps_have_the_promised_channels_and_strides(name, stride, strides):
    net = make_backbone(name, "none", stride)
    assert net.strides == strides and net.channels == common.CHANNELS[name]
    with torch.no_grad():
        taps = net(torch.randn(1, 3, 96, 64))
    sizes = [(c, 96 // s, 64 // s) for c, s in zip(net.channels, strides)]
    assert [tuple(tap.shape[1:]) for tap in taps] == sizes


def test_backbones_refuse():
    for name, stride in (("tiny", 32), ("vgg16", 32), ("resnet18", 64), ("mobilenet_v2", 7), ("resnet19", 8)):
        with pytest.raises(SystemExit, match=name):
            make_backbone(name, "none", stride)


def test_tiny_is_small():
    size = sum(p.numel() for p in make_backbone("tiny", "none", 4, frozen_bn=False).parameters())
    assert 200_000 < size < 500_000


def saved_weights(name, tmp_path):
    """A torchvision network with batch norms that do something, and its weights in a half precision file."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None).eval()
    state = {}
    for key, value in net.state_dict().items():
        noise = torch.rand(value.shape) * 0.5 if re.search(r"running|bias", key) else 0
        state[key] = (value + noise).half() if value.is_floating_point() else value
    torch.save(state, tmp_path / f"{name}.pth")
    net.load_state_dict({key: value.float() for key, value in state.items()})
    return net, tmp_path / f"{name}.pth"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_dilation_keeps_the_weights_and_what_they_compute(name, tmp_path):
    """On sizes 32n + 1 every fourth pixel of stride 8 is exactly the pixel of stride 32."""
    net, file = saved_weights(name, tmp_path)
    x = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        coarse, fine = make_backbone(name, file, 32)(x), make_backbone(name, file, 8)(x)
        if name == "mobilenet_v2":
            expected = net.features(x)
        else:
            expected = x
            for part in list(net.children())[:-2]: expected = part(expected)
    assert torch.allclose(coarse[-1], expected, atol=1e-5)
    scale = coarse[-1].abs().max()
    assert fine[-1].shape[-1] == 9 and torch.allclose(fine[-1][..., ::4, ::4], coarse[-1], atol=1e-5 * scale)
    assert torch.allclose(fine[2][..., ::2, ::2], coarse[2], atol=1e-5 * coarse[2].abs().max())


def test_vgg16_pools_as_deeplab_v1(tmp_path):
    """Poolings of 3x3, so that cell i lies on pixel stride·i and odd sizes give ceil(size / stride) cells."""
    net, file = saved_weights("vgg16", tmp_path)
    fine = make_backbone("vgg16", file, 8)
    for pool in (4, 9, 16): net.features[pool] = nn.MaxPool2d(3, 2, 1)
    x = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        taps = fine(x)
        assert torch.allclose(taps[2], net.features[:23](x), atol=1e-4)
        assert taps[3].shape[-2:] == (5, 6) and taps[1].shape[-2:] == (9, 11)
    assert [m.dilation for m in fine.blocks[3].modules() if isinstance(m, nn.Conv2d)] == [(2, 2)] * 3


def test_mobilenet_with_real_weights_is_torchvisions(pictures):
    file = pictures / "weights" / "mobilenet_v2_imagenet1k_fp16.pth"
    net = torchvision.models.mobilenet_v2(weights=None).eval()
    state = torch.load(file, weights_only=True)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    x = torch.randn(1, 3, 96, 96)
    backbone = make_backbone("mobilenet_v2", str(file), 32)
    with torch.no_grad():
        taps = backbone(x)
        for tap, end in zip(taps, (4, 7, 14, 19), strict=True):
            assert torch.equal(tap, net.features[:end](x))
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_frozen_batch_norms_stay_frozen(name):
    for frozen in (True, False):
        net = make_backbone(name, "none", 8, frozen_bn=frozen)
        wrapped = common.DeepLab(net, nn.Conv2d(net.channels[-1], 3, 1)).train()
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
        kept = [torch.equal(a, norm.running_mean) for a, norm in zip(before, norms)]
        assert all(kept) if frozen else not any(kept)
        assert all(norm.weight.requires_grad != frozen for norm in norms) and net.blocks[1].training
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_weights_that_do_not_fit_are_named(tmp_path):
    good = torchvision.models.resnet18(weights=None).state_dict()
    bad = {**good, "more": torch.ones(1), "conv1.weight": torch.ones(1)}
    del bad["layer1.0.conv1.weight"]
    torch.save(bad, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"model": good, "step": 3}, tmp_path / "run.pth")
    faults = r"missing layer1.0.conv1.weight.*unknown more.*shape \(1,\) of conv1.weight"
    for file, words in (("bad.pth", faults), ("text.pth", "can not be read"), ("none.pth", "no such file"),
                        ("run.pth", "not a state dict")):
        with pytest.raises(UserError, match=words):
            make_backbone("resnet18", str(tmp_path / file), 8)
    torch.save({key: value for key, value in good.items() if "tracked" not in key}, tmp_path / "old.pth")
    assert make_backbone("resnet18", tmp_path / "old.pth", 8).frozen, "old files have no counters"


def test_imagenet_weights_without_a_network_end_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")     # nobody listens there
    with pytest.raises(UserError, match=r"can not download https://.*resnet18.*--weights none"):
        make_backbone("resnet18", "imagenet", 8)
    for name in ("tiny", "resnet38"):
        with pytest.raises(UserError, match=f"{name}.*--weights"):
            make_backbone(name, "imagenet", 8)


def test_heads():
    x = torch.randn(2, 16, 9, 9)
    aspp = common.ASPP(16, 3, rates=(1, 2))
    by_hand = sum(nn.functional.conv2d(x, b.weight, b.bias, padding=r, dilation=r)
                  for b, r in zip(aspp.branches, (1, 2)))
    assert torch.allclose(aspp(x), by_hand) and 0.005 < aspp.branches[0].weight.std() < 0.015
    fov = common.LargeFOV(16, 3)
    assert torch.allclose(fov(x), nn.functional.conv2d(x, fov.branches[0].weight, padding=12, dilation=12))
    assert common.LargeFOVVGG(16, 3)(x).shape == (2, 3, 9, 9)
    net = common.DeepLab(make_backbone("tiny", "none", 4), common.ASPP(common.CHANNELS["tiny"][-1], 3))
    assert net(torch.randn(1, 3, 32, 48)).shape == (1, 3, 8, 12)


def test_pspnet():
    """Layers as in its paper for a backbone like ResNet's; each pooled part is the mean over its areas."""
    net = common.PSPNet(make_backbone("resnet50", "none", 8), 21)
    sizes = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)][-8:]
    assert sizes == [*[(512, 2048, 1, 1)] * 4, (512, 4096, 3, 3), (21, 512, 1, 1), (256, 1024, 3, 3),
                     (21, 256, 1, 1)]
    net = common.PSPNet(make_backbone("tiny", "none", 8), 3)
    image = torch.randn(2, 3, 48, 96)
    assert [tuple(logits.shape) for logits in net.train()(image)] == [(2, 3, 6, 12), (2, 3, 6, 12)]
    seen = {}
    for i, pool in enumerate(net.pools):
        pool[1].register_forward_pre_hook(lambda _, x, i=i: seen.update({i: x[0]}))
    assert net.eval()(image).shape == (2, 3, 6, 12), "without the auxiliary classifier"
    x = net.backbone(image)[-1]
    assert [tuple(seen[i].shape[2:]) for i in range(4)] == [(1, 1), (2, 2), (3, 3), (6, 6)]
    assert torch.allclose(seen[2][:, :, 1, 2], x[:, :, 2:4, 8:12].mean((2, 3)), atol=1e-5)


# ---------------------------------------------------------------- ResNet-38 and MXNet's file format


def mxnet_names(branch2b):
    """(name in the MXNet file, module path, tensor) of model A1, written down unit by unit."""
    yield "conv1a_weight", "conv1a", "weight"
    for unit in "2a 2b1 2b2 3a 3b1 3b2 4a 4b1 4b2 4b3 4b4 4b5 5a 5b1 5b2 6a 7a".split():
        if unit in ("2a", "3a", "4a", "5a", "6a", "7a"):
            yield f"res{unit}_branch1_weight", f"units.{unit}.shortcut", "weight"
        for i, branch in enumerate(["2a", branch2b] + ["2b2"] * (unit[0] in "67")):
            yield f"res{unit}_branch{branch}_weight", f"units.{unit}.convs.{i}", "weight"
            yield from norm_names(f"bn{unit}_branch{branch}", f"units.{unit}.bns.{i}")
    yield from norm_names("bn7", "bn7")


def norm_names(theirs, ours):
    yield f"{theirs}_gamma", ours, "weight"
    yield f"{theirs}_beta", ours, "bias"
    yield f"{theirs}_moving_mean", ours, "running_mean"
    yield f"{theirs}_moving_var", ours, "running_var"


def write_params(file, arrays, form, magic=0x112, dtype=0):
    """The NDArray list as MXNet writes it: form 2 (storage type), 1 (64 bit sizes) or 0 (the oldest)."""
    data = struct.pack("<QQQ", magic, 0, len(arrays))
    for array in arrays.values():
        shape = array.shape
        if form == 2: data += struct.pack("<Ii", 0xF993FAC9, 0)
        if form == 1: data += struct.pack("<I", 0xF993FAC8)
        data += struct.pack(f"<I{len(shape)}{'q' if form else 'I'}", len(shape), *shape)
        data += struct.pack("<iii", 1, 0, dtype) + array.astype(["<f4", "<f8", "<f2"][dtype]).tobytes()
    data += struct.pack("<Q", len(arrays))
    for name in arrays:
        data += struct.pack("<Q", len(name)) + name.encode()
    file.write_bytes(data)


def params_of(net, branch2b="2b1"):
    """A network's tensors under MXNet's names, with the classifier that the file also holds."""
    state = net.state_dict()
    arrays = {("aux:" if "moving" in name else "arg:") + name: state[f"{path}.{tensor}"].numpy()
              for name, path, tensor in mxnet_names(branch2b)}
    return {**arrays, "arg:linear1000_weight": np.ones((10, 4)), "arg:linear1000_bias": np.ones(10)}


def random_resnet38():
    net = common.ResNet38(thin=16)
    for key, value in net.state_dict().items():
        scale = 0.1 if "conv" in key else 1
        if value.is_floating_point(): value.copy_(torch.rand(value.shape) * scale + 0.01)
    return net.eval()


@pytest.mark.parametrize("form, branch2b, dtype", [(2, "2b1", 0), (1, "2b", 1), (0, "2b1", 2)])
def test_resnet38_reads_mxnets_file(tmp_path, form, branch2b, dtype):
    source, net = random_resnet38(), common.ResNet38(thin=16).eval()
    arrays = params_of(source, branch2b)
    assert len(arrays) - 2 == sum(not key.endswith("tracked") for key in source.state_dict()), "all are named"
    write_params(tmp_path / "r38.params", arrays, form, dtype=dtype)
    common.load_resnet38_params(net, tmp_path / "r38.params")
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        for mine, theirs in zip(net(x), source(x), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6 if dtype < 2 else 0.05)
    back = params_of(net, branch2b)
    tolerance = 0 if dtype < 2 else 1e-3
    assert all(np.allclose(back[name], array, atol=tolerance) for name, array in arrays.items())


def test_resnet38_refuses_files_that_do_not_fit(tmp_path):
    net, file = common.ResNet38(thin=16), tmp_path / "r38.params"
    arrays = params_of(net)
    write_params(file, arrays, 2, magic=0x113)
    with pytest.raises(UserError, match="r38.params: not an MXNet.*0x112"):
        common.load_resnet38_params(net, file)
    write_params(file, arrays, 2)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        common.load_resnet38_params(net, file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        common.load_resnet38_params(net, file)
    write_params(file, {k: v for k, v in arrays.items() if "bn4b3_branch2a_beta" not in k}, 2)
    with pytest.raises(UserError, match="missing units.4b3.bns.0.bias"):
        common.load_resnet38_params(net, file)
    write_params(file, {**arrays, "arg:res8a_branch9_weight": np.ones(2)}, 2)
    with pytest.raises(UserError, match="res8a_branch9_weight"):
        common.load_resnet38_params(net, file)
    with pytest.raises(UserError, match="can not be read"):
        common.load_resnet38_params(net, tmp_path / "none.params")


def test_resnet38_is_model_a1(tmp_path):
    with torch.device("meta"):                                  # shapes without numbers: 105 million weights
        net = common.ResNet38().freeze().train()
        taps = net(torch.empty(1, 3, 448, 320))
    sizes = [(c, 448 // s, 320 // s) for c, s in zip(net.channels, net.strides)]
    assert [tuple(tap.shape[1:]) for tap in taps] == sizes
    assert net.channels == (256, 512, 1024, 4096) and net.strides == (4, 8, 8, 8)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == 1 + 2 * 15 + 2
    assert [conv.dilation[0] for conv in convs[-8:]] == [1, 2, 2, 2, 2, 2, 4, 4]
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout2d)] == [0.3, 0.5]
    assert not any(norm.training or norm.weight.requires_grad for norm in net.norms())
    assert not net.conv1a.weight.requires_grad and not net.units["2b2"].convs[1].weight.requires_grad
    assert net.units["3a"].convs[0].weight.requires_grad and net.units["7a"].dropout.training


def test_inference_is_without_gradients_and_cudnn_and_ends():
    @common.inference()
    def look():
        return torch.is_grad_enabled(), torch.backends.cudnn.enabled

    before = torch.is_grad_enabled(), torch.backends.cudnn.enabled
    assert before == (True, True)
    assert look() == look() == (False, False)                       # a decorator serves more than one call
    assert (torch.is_grad_enabled(), torch.backends.cudnn.enabled) == before


@pytest.mark.parametrize("field, default, good, bad", [
    ("test_scales", (1.0,), (0.5, 1.0), ()), ("test_scales", (1.0,), (0.5, 1.0), (0.0, 1.0)),
    ("seg_rates", (6, 12), (3,), (0, 6)), ("seg_lr", 0.1, 0.2, -0.1), ("seg_lr", 0.0, 0.0, -1.0),
    ("seg_rescale", (0.5, 1.5), (0.7, 0.7), (1.5, 0.5)), ("seg_rescale", (0.5, 1.5), (0.7, 0.8), (0.7,)),
    ("seg_rescale", (), (), (1.5, 0.5)), ("seg_rescale", (1.0, 0.5, 2.0), (2.0, 1.0), (-1.0, 1.0)),
    ("superpixels", 200, 1, 0), ("seg_crop", 321, 1, 0), ("seg_batch", 0, 0, -1), ("seg_steps", 5, 0, -1),
    ("seg_crf", CRF(1, 3, 67, 3, 4, 10), CRF(1, 0, 67, 3, 0, 0), CRF(0, 3, 67, 3, 4, 10)),
    ("seg_crf", CRF(0, 0, 0, 0, 0, 0), CRF(0, 0, 5, 0, 0, 0), CRF(-1, 0, 0, 0, 0, 0))])
def test_numbers_that_no_run_can_have(field, default, good, bad):
    Made = dataclasses.make_dataclass("Made", [(field, type(default), dataclasses.field(default=default))])
    common.check_numbers(Made())
    common.check_numbers(Made(good))
    with pytest.raises(UserError, match="--" + field.replace("_", "-")): common.check_numbers(Made(bad))


# ── Scores lie where their cells are ────────────────────────────────────────────────────────────────────────
class EveryFourth(nn.Module):
    """Cell i is pixel 4·i: scores (0, red − 50.5), as of a network that sees single pixels."""

    def __init__(self, head=None):
        super().__init__()
        self.backbone, self.stride, self.head = types.SimpleNamespace(strides=[4]), 4, head

    def forward(self, image):
        red = (image[:, :1, ::4, ::4] * data.STD[0] + data.MEAN[0]) * 255
        scores = torch.cat([torch.zeros_like(red), red - 50.5], dim=1)
        return {self.head: scores} if self.head else scores


@pytest.mark.parametrize("size", [(96, 128), (97, 113), (98, 101), (99, 103)])
@pytest.mark.parametrize("method", ["a2gnn", "irnet", "selftrain_workpiece", "rrm", "cian", "lpg"])
def test_predictions_are_not_shifted_whatever_the_size(method, size):
    module, device, scales = importlib.import_module(method), torch.device("cpu"), (0.75, 1.0)
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0] = np.arange(size[1])
    options = {"rrm": (EveryFourth(), image, 4, scales, True), "lpg": (EveryFourth(), image),
               "cian": (EveryFourth("self"), image, scales)}.get(method, (EveryFourth(), image, scales))
    prob = module.predict(*options, device)
    assert (prob.argmax(0) == (np.arange(size[1]) > 50)).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_that_learn_are_shared_by_all_gpus(frozen):
    backbone = make_backbone("tiny", "none", 16, frozen)
    net = common.DeepLab(backbone, nn.Sequential(nn.Conv2d(backbone.channels[-1], 3, 1), nn.BatchNorm2d(3)))
    before, names = dict(net.named_parameters()), list(net.state_dict())
    if frozen: backbone.freeze()
    common.share_norms(net)
    assert dict(net.named_parameters()) == before and list(net.state_dict()) == names
    assert isinstance(net.head[1], nn.SyncBatchNorm)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in backbone.modules()) != frozen


def test_a_backbone_that_learnt_on_several_gpus_is_frozen_like_any_other():
    """Scl's encoder: its norms are SyncBatchNorm from then on, which is no BatchNorm2d."""
    backbone = make_backbone("tiny", "none", 16, frozen_bn=False)
    number = len(backbone.norms())
    common.share_norms(common.DeepLab(backbone, nn.Identity()))
    norms = backbone.train().norms()
    assert len(norms) == number and all(isinstance(m, nn.SyncBatchNorm) and m.training for m in norms)
    backbone.freeze().train()
    assert not any(m.training or m.weight.requires_grad for m in norms)


def test_enlarging_keeps_float32_under_autocast():
    x = torch.randn(2, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16): inside = common.cells_to_pixels(x, 4, (19, 23))
    assert inside.dtype == torch.float32 and torch.equal(inside, common.cells_to_pixels(x, 4, (19, 23)))
    assert common.cells_to_pixels(x.bfloat16(), 4, (19, 23)).dtype == torch.float32
