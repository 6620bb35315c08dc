"""lpg.py: each equation against an authority, boxes, data sets, the script on a few scenes."""

import contextlib
import dataclasses
import json
import math
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import lpg
from common import UserError, parse_args, poly
from conftest import kill_when, sh
from data import (
    REVEALS, DataError, Dataset, Draws, Sample, collate, derive, draw_scene, export, export_workpiece, load,
    read_image, read_label)

torch.set_num_threads(1)


def arguments(**changes):
    return lpg.Args(**{**lpg.SHAPES, "root": "data/shapes", "train_list": "train", **changes})


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 5)


# ---------------------------------------------------------------- equals: generators


@pytest.mark.parametrize("kind, millions", [("hourglass", 12.1), ("resnet18", 11.2), ("resnet101", 42.5)])
def test_table_2_has_these_numbers_of_weights(kind, millions):
    """The paper cuts ResNet-18's 11.18 M off to 11.1."""
    args = lpg.Args()
    with torch.device("meta"):                                      # shapes without numbers: no work
        g = lpg.make_generator(kind, args.hg_dims, args.hg_modules, args.hg_features).eval()
        side = 256
        assert g(torch.zeros(1, 5, side, side)).shape[2:] == (side // (4 if kind == "hourglass" else 8),) * 2
    assert round(sum(p.numel() for p in g.parameters()) / 1e6, 1) == millions
    assert g.multiple == (128 if kind == "hourglass" else 8)


def test_each_level_of_the_hourglass_is_used():
    torch.manual_seed(0)
    g = lpg.make_generator("hourglass", (8, 8, 12), (2, 1, 2), 8)
    assert g.multiple == 16
    g(torch.randn(2, 5, 32, 48)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in g.parameters())
    with pytest.raises(UserError, match="as many"): lpg.make_generator("hourglass", (8, 8), (1, 1, 1), 8)


def test_eq3_gives_image_boxes_and_probability_to_the_generator():
    x, y_b, f = torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4).long(), torch.rand(2, 4, 4)
    seen = lpg.eq3_generate(lambda t: t, x, y_b, f)
    assert seen.shape == (2, 5, 4, 4) and close(seen[:, :3], x)
    assert close(seen[:, 3], y_b.float()) and close(seen[:, 4], f)


# ---------------------------------------------------------------- equals: losses and labels


def test_eqs_2_4_5_and_6_by_hand():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 3, 5), torch.from_numpy(
        np.random.default_rng(0).choice([0, 1, 2, 255], (2, 3, 5)))
    values = [-math.log(logits[b, :, i, j].softmax(0)[label[b, i, j]]) for b, i, j in np.ndindex(2, 3, 5)
              if label[b, i, j] != 255]
    assert close(lpg.eq2_4_cross_entropy(logits, label), sum(values) / len(values))
    two, label = logits[:, :2], label.where(label != 2, 0)
    values = [-math.log(two[b, :, i, j].softmax(0)[label[b, i, j]]) for b, i, j in np.ndindex(2, 3, 5)
              if label[b, i, j] != 255]
    assert close(lpg.eq5_6_generator_loss(two, label), sum(values) / len(values))
    assert lpg.eq2_4_cross_entropy(logits, torch.full((2, 3, 5), 255)) == 0, "no label"


def test_eq1_takes_the_best_class_that_the_boxes_allow():
    rng = np.random.default_rng(0)
    prob = torch.from_numpy(rng.dirichlet(np.ones(5), (6, 7))).permute(2, 0, 1).float()
    y_b, classes = torch.from_numpy(rng.random((2, 6, 7)) < 0.5).float(), [4, 2]
    label = lpg.eq1_latent_segmentation(prob, y_b, classes)
    for i, j in np.ndindex(6, 7):
        allowed = [0] + [c for c, inside in zip(classes, y_b) if inside[i, j]]
        assert label[i, j] == max(allowed, key=lambda c: prob[c, i, j].item())


def slow_fusion(masks, classes, rule):
    """§III-D by pixels and pairs: overlap ÷ own predicted area, the higher wins, else the first."""
    label = np.zeros(masks.shape[1:], int)
    for at in np.ndindex(*label.shape):
        winner = None
        for k in np.flatnonzero(masks[(slice(None), *at)]):
            if winner is None:
                winner = k
            elif rule == "rate":
                overlap = (masks[winner] & masks[k]).sum()
                if overlap / masks[k].sum() > overlap / masks[winner].sum(): winner = k
        label[at] = 0 if winner is None else classes[winner]
    return label


@pytest.mark.parametrize("rule", ["rate", "first"])
def test_eq7_against_a_loop_over_pixels_and_pairs(rule):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p, classes = torch.from_numpy(rng.dirichlet((1, 1), (3, 5, 6))).permute(0, 3, 1, 2), [7, 2, 5]
        y_b = torch.from_numpy(rng.random((3, 5, 6)) < rng.uniform(0.3, 1, (3, 1, 1))).float()
        masks = (y_b.bool() & (p[:, 1] > p[:, 0])).numpy()
        assert (lpg.eq7_fuse(p, y_b, classes, rule) == slow_fusion(masks, classes, rule)).all()


def test_eq7_equal_rates_and_a_small_class_in_a_large_one():
    p = torch.zeros(2, 2, 4, 4)
    p[0, 1, :2], p[1, 1, 1:3] = 1, 1                                # eight pixels each, four in common
    p[:, 0] = 1 - p[:, 1]
    whole = torch.ones(2, 4, 4)
    for order in ([3, 1], [1, 3]): assert (lpg.eq7_fuse(p, whole, order)[:2] == order[0]).all()
    p[0, 1] = 1
    p[0, 0] = 0                                                     # the whole picture: rate 1/2, the other 1
    assert (lpg.eq7_fuse(p, whole, [3, 1])[1:3] == 1).all()
    assert (lpg.eq7_fuse(p, whole, [3, 1], "first") == 3).all()
    assert (lpg.eq7_fuse(p, 0 * whole, [3, 1]) == 0).all(), "nothing outside the boxes"


# ---------------------------------------------------------------- boxes


def test_filled_boxes_smaller_on_top():
    label = lpg.filled_boxes(boxes((2, 3, 3, 5, 5), (1, 0, 0, 6, 8), (3, 4, 4, 9, 9)), 10, 10)
    assert (label[3:5, 3:5] == 2).all() and label[0, 0] == 1 and label[6, 5] == 3 and label[9, 9] == 0
    assert not lpg.filled_boxes(boxes(), 4, 4).any()
    assert (lpg.filled_boxes(boxes((5, 0, 0, 4, 4)), 4, 4) == 5).all()


def test_box_maps_are_of_a_class_in_the_order_of_the_boxes():
    classes, maps = lpg.box_maps(boxes((3, 0, 0, 2, 2), (1, 1, 1, 4, 4), (3, 2, 0, 4, 1)), 4, 4)
    assert classes == [3, 1] and maps.shape == (2, 4, 4)
    assert maps[0].sum() == 6 and maps[1].sum() == 9 and maps[0, 0, 3] == 1


def test_box_unaries_of_wssl():
    classes, prob = lpg.box_unaries(boxes((2, 2, 2, 12, 12), (1, 10, 2, 18, 12)), 0.25, 20, 20)
    assert classes == [2, 1] and np.allclose(prob.sum(0), 1)
    assert (prob[:, 0, 0] == [1, 0, 0]).all() and (prob[:, 3, 3] == [0.5, 0.5, 0]).all()
    assert np.allclose(prob[:, 3, 11], 1 / 3), "both boxes: even"
    assert prob[1].tolist()[7][7] == 1 and (prob[1] == 1).sum() == 36, "a quarter of 10x10, in whole pixels"
    assert lpg.box_unaries(boxes(), 0.2, 4, 4)[1].shape == (1, 4, 4)


def test_grabcut_in_boxes():
    image = np.full((40, 40, 3), (30, 60, 90), np.uint8)
    image[12:28, 12:28] = (220, 180, 40)
    label = lpg.grabcut_label(image, boxes((3, 8, 8, 32, 32)), 5)
    assert (label[12:28, 12:28] == 3).all() and (label == 3).sum() == 256
    assert (lpg.grabcut_label(image, boxes((2, 0, 0, 40, 40)), 5) == 2).all(), "the whole image"
    assert not lpg.grabcut_label(image, boxes(), 5).any()


def scene(index=3):
    return derive(draw_scene(0, "train", index), REVEALS["full"])


class Fake(torch.nn.Module):
    """A segmentation network of stride 4 whose scores are given: (1,K+1,h,w) whatever the image."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.backbone = scores, types.SimpleNamespace(strides=[4])

    def forward(self, x):
        return self.scores


def generator(seed=0, dims=(8, 8, 8)):
    torch.manual_seed(seed)
    return lpg.make_generator("hourglass", dims, (1,) * len(dims), 8).eval()


def several():
    """A scene with boxes of several classes."""
    return next(s for s in map(scene, range(50)) if s.tags.sum() > 2)


def test_permuting_class_ids_permutes_the_masks():
    """Nothing in g knows which class it is."""
    s, g, rng = several(), generator(), np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(0, 2, (1, 9, 24, 24))).float()
    order = np.array([0, *(1 + rng.permutation(8))])                # new id of each class
    moved = torch.empty_like(scores)
    moved[:, order] = scores
    renamed = np.concatenate([order[s.boxes[:, :1].astype(int)], s.boxes[:, 1:]], axis=1)
    other = Sample(**{**vars(s), "boxes": renamed})
    one = lpg.pseudo_masks(g, Fake(scores), s, "rate", 1.0, "cpu")
    two = lpg.pseudo_masks(g, Fake(moved), other, "rate", 1.0, "cpu")
    assert len(np.unique(one[0])) > 2, "a generator that finds something"
    for a, b in zip(one, two): assert (order[a] == b).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_inputs_are_padded_and_scores_cropped_back(scale):
    s, shapes = several(), []

    def g(x):
        shapes.append(x.shape)
        return torch.stack([0.5 - x[:, 3], x[:, 3] - 0.5], 1)       # it repeats the boxes
    g.multiple = 32
    label, alone = lpg.pseudo_masks(g, None, s, "rate", scale, "cpu")
    assert label.shape == alone.shape == s.image.shape[:2]
    assert all(n % 32 == 0 for n in shapes[0][2:]) and shapes[0][:2] == (s.tags.sum(), 5)
    assert shapes[0][2] - 32 < scale * s.image.shape[0] <= shapes[0][2] + 1
    assert not label[alone == 0].any(), "nothing outside the boxes"
    assert (label[alone > 0] > 0).mean() > (0.999 if scale == 1 else 0.9)


def test_the_probability_channel_is_the_class_of_the_boxes_and_may_be_blinded():
    s, seen = several(), []

    def g(x):
        seen.append(x[:, 4])
        return torch.zeros(len(x), 2, *x.shape[2:])
    g.multiple = 1
    scores = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (1, 9, 20, 20))).float()
    for blind in (False, True): lpg.pseudo_masks(g, Fake(scores), s, "rate", 1.0, "cpu", blind)
    classes = lpg.box_maps(s.boxes, 8, 8)[0]
    wanted = lpg.cells_to_pixels(scores.softmax(1)[:, classes], 4, s.image.shape[:2])[0]
    assert close(seen[0], wanted, 1e-4) and (seen[1] == 0).all()


def test_an_image_without_a_box_and_a_box_that_covers_everything():
    s = scene()
    empty = Sample(name="x", image=s.image, boxes=boxes())
    for label in lpg.pseudo_masks(generator(), None, empty, "rate", 1.0, "cpu"):
        assert label.shape == s.image.shape[:2] and not label.any()
    H, W = s.image.shape[:2]
    full = Sample(name="x", image=s.image, boxes=boxes((4, 0, 0, W, H)))
    label, alone = lpg.pseudo_masks(generator(), None, full, "rate", 1.0, "cpu")
    assert set(np.unique(label)) <= {0, 4} and (alone == 4).all()


# ---------------------------------------------------------------- data sets and training items


def test_the_items_of_the_generator(tmp_path):
    args = arguments(gen_crop=160, gen_rescale=(1.0, 1.0))
    s = several()
    s.mask[:9, :] = 255
    classes = np.unique(s.boxes[:, 0]).astype(int)
    prob = np.random.default_rng(0).random((len(classes), 24, 25)).astype(np.float16)
    lpg.save_npz(tmp_path / f"{s.name}.npz", classes=classes, prob=prob, stride=4)
    chosen = set()
    for n in range(12):
        item = lpg.generator_augment(args, tmp_path)(s, np.random.default_rng(n))
        assert item.image.shape == (3, 160, 160) and set(item.mask.unique().tolist()) <= {0, 1, 255}
        area = [(s.mask == c).sum() for c in classes]
        found = int((item.mask == 1).sum())
        assert found in area
        c = classes[area.index(found)]
        chosen.add(c)
        assert (item.mask == 255).sum() == (s.mask == 255).sum(), "void stays; padding is background"
        assert item.pseudo.sum() == lpg.box_maps(s.boxes[s.boxes[:, 0] == c], *s.mask.shape)[1].sum()
        assert (item.pseudo[item.mask == 1] == 1).all(), "image, boxes and mask stay aligned"
        grid = torch.from_numpy(prob[list(classes).index(c)])[None, None].float()
        wanted = lpg.cells_to_pixels(grid, 4, s.mask.shape)
        assert abs(item.seed.sum() / 254 - wanted.sum()) < 0.01 * wanted.sum() and item.seed.max() <= 254
    assert chosen == set(classes), "all classes are drawn"
    assert not lpg.generator_augment(args, None)(s, np.random.default_rng(0)).seed.any(), "without f"


def test_the_generator_draws_no_picture_without_boxes():
    empty = Sample(**{**vars(scene()), "boxes": boxes()})
    pictures = lpg.WithBoxes([scene(0), empty, empty, scene(2)])
    assert [pictures[i].name for i in range(len(pictures))] == [scene(i).name for i in (0, 2, 2, 2)]
    args, items = arguments(), []
    args.gen_steps, run = 8, types.SimpleNamespace(device="cpu", dir=None, reseed=lambda stage: None)
    run.steps = lambda stage, draws, *more: items.extend(draws[i].name for i in range(12)) or ()
    lpg.train_generator(args, run, 1, [scene(0), empty, empty, scene(2)], None, generator())
    assert {*items} == {scene(0).name, scene(2).name}
    with pytest.raises(UserError, match="no auxiliary picture has a box"): lpg.WithBoxes([empty])[0]


def test_what_the_auxiliary_mask_does_not_tell_is_no_label_for_f(tmp_path):
    """COCO's crowds; the target's samples have no mask, and all pixels a label."""
    s, written = several(), {}
    s.mask[:9], s.mask[40:50, 30:60] = 255, 255
    run = types.SimpleNamespace(
        todo=lambda names, *more, **kinds: ([name] for name in names), device="cpu",
        timed=lambda stage: contextlib.nullcontext(), autocast=contextlib.nullcontext,
        path=lambda folder, name: tmp_path / f"{folder}.png")
    for fields in (("boxes", "mask"), ("boxes",)):
        source = types.SimpleNamespace(names=[s.name], classes=[], notes={}, fields=fields, read=lambda n: s)
        lpg.write_boxes(run, "boxes", Dataset(source))
        lpg.write_pseudo_masks(arguments(), run, "pseudo", Dataset(source), generator(), None)
        written[fields] = [read_label(tmp_path / f"{folder}.png", 8) for folder in ("boxes", "pseudo")]
    for known, plain in zip(*written.values()):
        void = s.mask == 255
        assert (known[void] == 255).all() and (known == plain)[~void].all() and plain.max() <= 8


@pytest.mark.parametrize("supervision", ["box", "semi", "full"])
def test_target_samples_show_no_more_than_they_may(supervision):
    args = arguments(supervision=supervision)
    train_set = lpg.target_set(args, "train")
    assert hasattr(train_set[0], "boxes") and hasattr(train_set[0], "mask") == (supervision == "full")
    truth = lpg.semi_set(args, train_set)
    assert len(truth) == 70 and hasattr(truth[0], "mask") and truth.names == sorted(truth.names)
    assert not hasattr(truth[0], "scribble"), "nothing that no step uses: it would be drawn at each reading"


@pytest.mark.parametrize("masks", ["train", "0", "1.0"])
def test_semi_is_neither_weak_nor_full(masks):
    args = arguments(supervision="semi", semi_masks=masks)
    with pytest.raises(UserError, match="0 of 500|500 of 500"):
        lpg.semi_set(args, lpg.target_set(args, "train"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Eight train and eight val scenes in VOC's layout."""
    made = tmp_path_factory.mktemp("voc")
    export("shapes", "voc", str(made), n=8)
    return str(made)


def test_classes_of_one_data_set_are_target_and_auxiliary(voc, tmp_path):
    coco = str(tmp_path)
    export("shapes", "coco", coco, n=4)
    args = arguments(data="voc", root=voc, aux="voc", aux_root=voc, classes="1-4")
    target, val = lpg.target_set(args, "train"), lpg.target_set(args, "val")
    every = load(types.SimpleNamespace(data="voc", root=voc, train_list="train", supervision="full"), "train")
    assert target.classes == val.classes == every.classes[:4]
    aux = lpg.auxiliary_set(args, target, val)
    assert aux.classes == every.classes[4:] and len(aux) > 0
    assert not {*aux.names} & {*target.names}, "shared pictures belong to the target"
    assert vars(aux[0]).keys() == {"name", "image", "tags", "boxes", "mask"}
    assert {*aux.names} == {s.name for s in every if s.tags[4:].any() and not s.tags[:4].any()}
    assert all(set(np.unique(s.mask)) <= {0, 1, 2, 3, 4} and hasattr(s, "boxes") for s in aux)
    other = types.SimpleNamespace(data="coco", root=coco, train_list="train", supervision="full")
    more = [s.name for s in load(other, "train") if s.tags[4:].any()]
    spelled = dataclasses.replace(args, aux_root=f"{voc}/../{Path(voc).name}")
    assert lpg.auxiliary_set(spelled, target, val).names == aux.names, "the same folder in other words"
    both = dataclasses.replace(args, aux="voc,coco", aux_root=f"{voc},{coco}")
    joined = lpg.auxiliary_set(both, target, val)
    assert joined.classes == aux.classes, "one name, one class"
    assert joined.names == [f"0-{name}" for name in aux.names] + [f"1-{name}" for name in more]


@pytest.mark.parametrize("changes, words", [
    (dict(aux_classes="3-6"), "block-disc, block-bar: also in the target"),
    (dict(classes=""), "all auxiliary"),
    (dict(aux="voc,coco"), "as many"), (dict(aux_classes="zebra"), "zebra")])
def test_a_class_in_both_sets_is_named(voc, changes, words):
    args = arguments(**{**dict(data="voc", root=voc, aux="voc", aux_root=voc, classes="1-4"), **changes})
    with pytest.raises((UserError, DataError), match=words):
        lpg.auxiliary_set(args, lpg.target_set(args, "train"), lpg.target_set(args, "val"))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_a_fraction_of_the_auxiliary_pictures(fraction):
    args = arguments(aux_fraction=fraction)
    target, val = lpg.target_set(args, "train"), lpg.target_set(args, "val")
    aux = lpg.auxiliary_set(args, target, val)
    assert len(aux) == 500 * fraction and len(aux.classes) == 6 and hasattr(aux[0], "mask")
    assert aux.names == lpg.auxiliary_set(args, target, val).names == sorted(aux.names)


# ---------------------------------------------------------------- equals: the segmentation network


@pytest.mark.parametrize("backbone, last", [("vgg16", "head.8"), ("resnet101", "head.branches")])
def test_four_groups_of_rates(backbone, last):
    """Table I: weights, biases x2, the last layer x10 and x20, where all of ASPP's weights learn."""
    with torch.device("meta"):
        net = lpg.make_deeplab(backbone, "none", 8, 12, (6, 12, 18, 24), 20)
    head = net.head[-1] if backbone == "vgg16" else net.head
    groups = lpg.group_rates(net, [head], 1e-3, 5e-4)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in net.named_parameters():
        if p.requires_grad:
            wanted = 1e-3 * (10 if name.startswith(last) else 1) * (2 if name.endswith("bias") else 1)
            assert abs(rates[id(p)] - wanted) < 1e-9, name
    assert len(groups) == 4 and all(group["weight_decay"] == 5e-4 for group in groups), "biases too [D18]"


def test_fc6_and_fc7_are_thinned_out(monkeypatch):
    backbone = torch.nn.Identity()
    backbone.channels = (512,)
    numbers = torch.arange(4096.0)
    state = {"classifier.0.weight": torch.arange(25088.0).expand(4096, -1), "classifier.0.bias": numbers,
             "classifier.3.weight": numbers.expand(4096, -1), "classifier.3.bias": numbers}
    monkeypatch.setattr(lpg, "make_backbone", lambda *a: backbone)
    monkeypatch.setattr(lpg, "imagenet_weights", lambda name: state)
    head = lpg.make_deeplab("vgg16", "imagenet", 8, 12, (), 20).head
    assert head[2].weight.shape == (1024, 512, 3, 3) and head[2].dilation == (12, 12)
    assert head[2].weight[5, 7].tolist() == [[7 * 49 + 7 * y + x for x in (0, 3, 6)] for y in (0, 3, 6)]
    assert head[2].bias[3] == 12 and head[5].weight[0, 2, 0, 0] == 8
    assert head[8].weight.shape == (21, 1024, 1, 1)


def test_vgg16_weights_without_fc6_and_fc7_are_refused(tmp_path):
    """What many libraries call VGG-16 ends at conv5_3."""
    with torch.device("meta"): shapes = torchvision.models.vgg16().features.state_dict()
    features = {f"features.{key}": torch.zeros(1).expand(value.shape) for key, value in shapes.items()}
    torch.save(features, tmp_path / "features.pth")
    with pytest.raises(UserError, match=r"features\.pth have no classifier\.0\.weight, classifier\.0\.bias"):
        lpg.settle_lpg(lpg.Args(weights=str(tmp_path / "features.pth")))
    lpg.settle_lpg(lpg.Args(weights="none"))


def test_open_fields_get_table_1():
    for backbone, steps, batch, lr, crf in (("vgg16", 20_000, 30, 1e-3, 140),
                                            ("resnet101", 40_000, 10, 2.5e-4, 67)):
        args = lpg.Args(backbone=backbone, weights="none")
        lpg.settle_lpg(args)
        assert (args.seg_steps, args.seg_batch, args.seg_lr, args.seg_crf.bi_xy) == (steps, batch, lr, crf)
    args = lpg.Args(backbone="resnet18", weights="none", seg_steps=7)
    lpg.settle_lpg(args)
    assert args.seg_steps == 7 and args.seg_batch == 10
    for changes in (dict(gen_crop=100), dict(stages=0), dict(aux_fraction=0)):
        with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')}"):
            lpg.settle_lpg(arguments(**changes))


def test_the_last_generator_is_not_used_without_the_probability_it_was_trained_with(tmp_path):
    """Table II's fixed generator, where the first has no f: in the flags, or in the file's."""
    for changes in (dict(stages=1), dict(generator_fixed=False), dict(first_stage="box")):
        lpg.settle_lpg(arguments(**{"generator_fixed": True, "first_stage": "none", **changes}))
    with pytest.raises(UserError, match="leave --generator-fixed out"):
        lpg.settle_lpg(arguments(generator_fixed=True, first_stage="none"))
    made = arguments(hg_dims=(8, 8, 8), hg_modules=(1, 1, 1), hg_features=8, first_stage="none")
    torch.save({"generators": [generator().state_dict()] * 3,
                "args": {field: getattr(made, field) for field in lpg.MADE}}, tmp_path / "g.pt")
    with pytest.raises(UserError, match="leave --generator-fixed out"):
        lpg.settle_lpg(arguments(generator_fixed=True, generator=str(tmp_path / "g.pt")))


# ---------------------------------------------------------------- learns


def test_the_generator_beats_its_boxes_on_four_scenes():
    args = arguments(gen_crop=96, gen_scale=1.0, hg_dims=(16, 16, 24, 24), hg_modules=(1,) * 4,
                     hg_features=16)
    aux_set = load(dataclasses.replace(args, data="shapes-aux", supervision="full"), "train")
    torch.manual_seed(0)
    g = lpg.make_generator("hourglass", args.hg_dims, args.hg_modules, args.hg_features).train()
    optim = torch.optim.Adam(g.parameters(), lr=3e-3)
    draws = Draws(lpg.select(aux_set, names=aux_set.names[:4]), lpg.generator_augment(args, None), 0)
    for step in range(60):
        batch = collate([draws[8 * step + i] for i in range(8)])
        logits = lpg.eq3_generate(g, batch.image, batch.pseudo, batch.seed / 254)
        loss = lpg.eq5_6_generator_loss(logits, batch.mask)
        for group in optim.param_groups: group["lr"] = 3e-3 * poly(60)(step)
        optim.zero_grad()
        loss.backward()
        optim.step()
    found, real = lpg.resample(logits, (96, 96)).argmax(1) == 1, batch.mask == 1
    iou = lambda mask: ((mask & real).sum() / (mask | real).sum()).item()  # noqa: E731
    assert iou(found) > iou(batch.pseudo > 0) + 0.1, (iou(found), iou(batch.pseudo > 0))


# ---------------------------------------------------------------- runs

TINY = """lpg.py --preset shapes --workers 0 --device cpu --hg-dims 8 8 8 --hg-modules 1 1 1 --hg-features 8
    --gen-steps 4 --gen-batch 2 --gen-crop 32 --gen-scale 0.5 --seg-steps 3 --seg-batch 2 --seg-crop 48
    --stages 2
    --probe 3 --save-every 2 --log-every 1""".split()
STAGES = ["pseudo_crf", "pseudo_grabcut", "pseudo_1", "val_1", "pseudo_2", "val_2", "val_crf"]
LABELS = ["boxes", "pseudo_crf", "pseudo_grabcut", "pseudo_1", "pseudo_1_eq1", "pseudo_2", "pseudo_2_eq1"]
VAL = ["val_1", "val_2", "val_crf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four train and four val scenes of each class set, as files."""
    made = tmp_path_factory.mktemp("workpiece")
    export("shapes", "workpiece", str(made / "target"), n=4)
    for split in ("train", "val"):
        aux = load(arguments(data="shapes-aux", supervision="full"), split)
        export_workpiece(made / "aux", split, aux.classes, (aux[i] for i in range(4)))
    return made


def command(folder, out, *more):
    return [*TINY, "--data", "workpiece", "--root", folder / "target", "--aux", "workpiece", "--aux-root",
            folder / "aux", "--out", out, *more]


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        lpg.main()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("finished")
    run_here(*command(folder, out))
    return out


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    """The numbers of results.json without times and memory."""
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages(out)]


def contents(out, *parts):
    files = [f for part in parts for f in (out / part, *sorted((out / part).rglob("*"))) if f.is_file()]
    assert files, f"{out} has nothing of {parts}"
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_runs_all_stages(finished, folder):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 4 and s["uses_masks"] and 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        assert s["split"] == ("val" if s["stage"].startswith("val") else "train") and s["seconds"] >= 0
    assert [s["stage"] for s in entries if s["crf"]] == ["pseudo_crf", "val_crf"]
    assert "miou_boxes" in entries[0] and "miou_eq1" in entries[2] and "miou_probe" not in entries[2]
    assert {"miou_eq1", "miou_probe", "miou_blind"} <= entries[4].keys()
    tags = json.loads((folder / "target" / "train" / "tags.json").read_text())
    classes = (folder / "target" / "classes.txt").read_text().split()
    for place in LABELS:
        files = sorted((finished / place).glob("*.png"))
        assert len(files) == 4
        for file in files:
            label = read_label(file, 8)
            assert {*np.unique(label)} <= {0, *(classes.index(c) + 1 for c in tags[file.stem])}
            inside = read_label(finished / "boxes" / file.name) > 0
            assert not label[~inside].any(), "nothing outside the boxes"
    assert all(len(list((finished / place).glob("*.png"))) == 4 for place in VAL)
    for name in ("train", "val"): assert (finished / "panels" / f"{name}.png").exists()
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {e["stage"] for e in lines} == {"aux_segmenter_0", "generator_1", "aux_segmenter_1", "generator_2",
                                           "segmenter_0", "segmenter_1", "segmenter_2"}
    assert all(np.isfinite([v for k, v in entry.items() if k != "stage"]).all() for entry in lines)
    kept = torch.load(finished / "generators.pt", weights_only=True)["generators"]
    last = torch.load(finished / "generator_2.pt", weights_only=True)["model"]
    assert len(kept) == 2 and all((kept[1][k] == v).all() for k, v in last.items())
    assert any((kept[0][k] != v).any() for k, v in last.items()), "a generator of each stage"


def test_each_stage_has_the_seconds_of_its_own_work(finished):
    spent = json.loads((finished / "state.json").read_text())["seconds"]
    work = {"val_1": ["segmenter_1", "val_1"], "val_2": ["segmenter_2", "val_2"]}
    for s in stages(finished):
        own = [spent[part] for part in work.get(s["stage"], [s["stage"]])]
        assert min(own) > 0 and abs(s["seconds"] - sum(own)) < 0.06, s["stage"]
    assert sum(s["seconds"] for s in stages(finished)) <= sum(spent.values()) + 0.35, "nothing twice"


def test_the_same_command_again_does_nothing(finished, folder):
    before, numbers = contents(finished, *LABELS, *VAL), scores(finished)
    times = {f: f.stat().st_mtime_ns for f in finished.rglob("*.png")}
    run_here(*command(folder, finished))
    assert contents(finished, *LABELS, *VAL) == before and scores(finished) == numbers
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def test_runs_on_full_masks(folder, tmp_path):
    run_here(*command(folder, tmp_path, "--supervision", "full"))
    assert [s["stage"] for s in stages(tmp_path)] == VAL
    assert not any((tmp_path / name).exists() for name in ("boxes", "generators.pt", "pseudo_1", "aux_boxes"))


def test_runs_semi_supervised(finished, folder, tmp_path):
    """The generators are those of the weak run; half of the labels are ground truth."""
    run_here(*command(folder, tmp_path, "--supervision", "semi", "--semi-masks", "0.5", "--reuse", finished))
    assert [s["stage"] for s in stages(tmp_path)] == STAGES
    assert contents(tmp_path, "generator_2.pt") == contents(finished, "generator_2.pt")
    truth = load(arguments(data="workpiece", root=str(folder / "target"), supervision="full"), "train")
    for place in ("boxes", "pseudo_1", "pseudo_2"):
        same = [(read_label(tmp_path / f"{place}_semi" / f"{s.name}.png") == s.mask).all() for s in truth]
        assert sum(same) == 2
        for s, known in zip(truth, same, strict=True):
            semi, weak = (read_label(tmp_path / p / f"{s.name}.png") for p in (f"{place}_semi", place))
            assert known or (semi == weak).all()


def test_generators_are_used_again_for_another_network(finished, folder, tmp_path):
    """Table VIII: no auxiliary set, the architecture comes from the file."""
    run_here(*command(folder, tmp_path, "--generator", finished / "generators.pt", "--backbone", "resnet18",
                      "--seg-stride", 8, "--gen-scale", 1, "--aux", "nowhere", "--stages", 1))
    assert [s["stage"] for s in stages(tmp_path)] == [*STAGES[:4], "val_crf"]
    assert not any((tmp_path / name).exists() for name in ("aux_boxes", "generator_1.pt"))
    assert json.loads((tmp_path / "args.json").read_text())["gen_scale"] == 0.5


def test_a_generator_that_knows_the_targets_classes_is_reported(finished, folder, tmp_path, capsys):
    state = torch.load(finished / "generators.pt", weights_only=True)
    aux = (folder / "aux" / "classes.txt").read_text().split()
    assert state["classes"] == aux and state["data"] == "workpiece"

    def noted(**changes):
        kept = {key: value for key, value in {**state, **changes}.items() if value is not None}
        torch.save(kept, tmp_path / "g.pt")
        return lpg.generator_notes(arguments(generator=str(tmp_path / "g.pt")), target)
    target = types.SimpleNamespace(classes=["tvmonitor", "sofa", "cow"])
    assert noted(classes=["zebra", "bear"]) == {} == lpg.generator_notes(arguments(), target)
    assert "coco's true masks of the target's own couch, tv" in noted(
        classes=["zebra", "couch", "tv"], data="coco")["generator"], "VOC's and COCO's spelling"
    assert "does not say" in noted(classes=None, data=None)["generator"], "a file of before"
    own = (folder / "target" / "classes.txt").read_text().split()[:2]
    torch.save({**state, "classes": [*aux, *own]}, tmp_path / "g.pt")
    run_here(*command(folder, tmp_path / "out", "--generator", tmp_path / "g.pt", "--stages", 1))
    said = capsys.readouterr().out
    for s in stages(tmp_path / "out"):
        sentence = s["notes"].get("generator", "")
        assert sentence.endswith(", ".join(own)) == (s["stage"] in ("pseudo_1", "val_1", "val_crf"))
        assert not sentence or sentence in said.splitlines(), "one line of its own"
    assert not any("generator" in s["notes"] for s in stages(finished))


def test_table_7s_row_lpg_coco_passes_the_checks(finished, tmp_path):
    """The docstring's command, COCO's generators on COCO, up to the training; on scenes in COCO's layout."""
    line = re.search(r"python lpg\.py (--data coco[^#]+)# Table VII, LPG_coco", lpg.__doc__).group(1)
    export("shapes", "coco", str(tmp_path), n=4)
    for file in (tmp_path / "annotations").glob("*.json"):
        table = json.loads(file.read_text())
        for category, name in zip(table["categories"], ("person", "zebra")): category["name"] = name
        file.write_text(json.dumps(table))
    state = torch.load(finished / "generators.pt", weights_only=True)
    torch.save({**state, "generators": [state["generators"][0]] * 3, "data": "coco", "classes": ["zebra"]},
               tmp_path / "g.pt")
    given = ["--root", tmp_path, "--generator", tmp_path / "g.pt", "--weights", "none"]
    args = parse_args(lpg.Args, lpg.__doc__, {"shapes": lpg.SHAPES, "photos": lpg.PHOTOS},
                      [*shlex.split(line.replace("\\\n", " ")), *map(str, given)])
    lpg.settle_lpg(args)
    target, val = lpg.target_set(args, "train"), lpg.target_set(args, "val")
    assert len(target) and len(val) and "person" not in target.classes and len(target.classes) == 7
    sentence = lpg.generator_notes(args, target)["generator"]
    assert sentence.endswith("coco's true masks of the target's own zebra")


@pytest.mark.parametrize("flags, left", [
    ("--grabcut-steps 0", ["pseudo_crf"]), ("--crf none", ["pseudo_grabcut"]),
    ("--crf none --grabcut-steps 0", [])])
def test_baselines_are_left_out(finished, folder, tmp_path, monkeypatch, flags, left):
    """What does not run is no stage and no column; without a CRF its arg-max of ties is no result."""
    sheets = []
    monkeypatch.setattr("common.contact_sheet", lambda file, rows, titles: sheets.append(titles))
    run_here(*command(folder, tmp_path, "--generator", finished / "generators.pt", "--stages", 1,
                      "--gen-scale", 0.5, *flags.split()))
    assert [s["stage"] for s in stages(tmp_path)] == [*left, "pseudo_1", "val_1", "val_crf"]
    assert ["miou_boxes" in s for s in stages(tmp_path)][:len(left)] == [True] * len(left)
    titles = {"pseudo_crf": "CRF", "pseudo_grabcut": "GrabCut"}
    assert sheets[0] == ["image", "boxes", *map(titles.get, left), "LPG, stage 1", "ground truth"]
    assert [name for name in titles if (tmp_path / name).exists()] == left


ABLATIONS = {"fixed": "--generator-fixed", "without f": "--first-stage none --probe 0",
             "first": "--overlap first"}


@pytest.mark.parametrize("flags", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations(finished, folder, tmp_path, flags):
    run_here(*command(folder, tmp_path, "--reuse", finished, *flags.split()))
    assert [s["stage"] for s in stages(tmp_path)] == STAGES
    assert contents(tmp_path, "pseudo_crf") == contents(finished, "pseudo_crf")
    same = contents(tmp_path, "generator_1.pt") == contents(finished, "generator_1.pt")
    assert same == ("none" not in flags)
    assert (tmp_path / "segmenter_0.pt").exists() == ("none" not in flags)


def test_predicts_with_the_runs_network(finished, folder, tmp_path):
    pictures = folder / "target" / "val" / "images"
    run_here("lpg.py", "--predict", pictures, "--checkpoint", finished / "segmenter_2.pt", "--out", tmp_path,
             "--workers", 0, "--device", "cpu")
    for file in pictures.iterdir():
        label = read_label(tmp_path / "predict" / file.name, 8, read_image(file))
        assert (label == read_label(finished / "val_crf" / file.name)).all(), "the run's own prediction"
    assert len(list((tmp_path / "predict").glob("*_overlay.png"))) == 4


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--generator", "nowhere.pt"], "nowhere"),
    (["--aux", "workpiece,voc"], "as many"), (["--seg-rates", "0", "6"], "seg-rates 0 6: give 1"),
    (["--seg-rescale", "1.5", "0.5"], "smaller first"), (["--gen-lr", "-1"], "gen-lr -1"),
    (["--gen-crop", "30"], "multiple of 16"), (["--stages", "12"], "1 to 9")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(UserError, match=words): run_here(*command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_files_of_another_kind_are_refused(finished, folder, tmp_path):
    with pytest.raises(UserError, match="segmenter"):
        run_here("lpg.py", "--predict", folder / "target" / "val" / "images", "--checkpoint",
                 finished / "generators.pt")
    with pytest.raises(UserError, match=r"not the generators\.pt"):
        run_here(*command(folder, tmp_path / "out", "--generator", finished / "segmenter_1.pt"))
    with pytest.raises(UserError, match="has 2 stages"):
        run_here(*command(folder, tmp_path / "out", "--generator", finished / "generators.pt", "--stages", 3))


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    """kill -9 in the second generator; then the same command again."""
    first = ["boxes", "pseudo_crf", "pseudo_grabcut", "aux_boxes", "aux_segmenter_0.pt", "aux_prob_1",
             "generator_1.pt", "aux_pseudo_1", "aux_pseudo_1_eq1", "aux_segmenter_1.pt", "args.json",
             "state.json", "log.jsonl"]
    for name in first:                                              # it starts where the second stage begins
        if (finished / name).is_dir(): shutil.copytree(finished / name, tmp_path / name)
        else: shutil.copy(finished / name, tmp_path / name)
    line = command(folder, tmp_path)
    kill_when(lambda: (tmp_path / "generator_2.pt").exists(), *line)
    assert torch.load(tmp_path / "generator_2.pt", weights_only=True)["step"] <= 4
    sh(*line)
    assert scores(tmp_path) == scores(finished)
    assert contents(tmp_path, *LABELS, *VAL) == contents(finished, *LABELS, *VAL)


def test_stages_are_shared_only_between_runs_that_agree():
    mine, fields = arguments(), [name for names in lpg.FIELDS.values() for name in names]
    known = {f.name for f in dataclasses.fields(mine)}
    assert set(fields) <= known and len(fields) == len(set(fields))
    free = set("""preset out reuse fresh device workers predict checkpoint log_every save_every seg_crf
        probe""".split())
    assert known - set(fields) == free, "each field belongs to a stage, or can not change one"
    order = list(lpg.FIELDS)
    for n in range(1, 10):
        wanted = [f"{part}_{n}" for part in ("generator", "aux_pseudo", "aux_segmenter")] + ["segmenter_0"]
        assert sorted(wanted, key=order.index) == wanted
        assert {f"pseudo_{n}", f"segmenter_{n}"} <= set(order)
