"""selftrain_workpiece.py: its equations against double loops and by hand, a loss that falls, whole runs."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import selftrain_workpiece as sw
from common import CRF, UserError, save_label
from conftest import kill_when, sh
from data import DataError, Draws, Sample, collate, export, load, read_image, read_label


def arguments(**fields):
    return dataclasses.replace(sw.Args(**sw.SOLIDS), **{"root": "", **fields})


# ---------------------------------------------------------------- equals: the losses


def test_eq1_is_the_weighted_mean_over_labelled_pixels():
    rng = torch.Generator().manual_seed(0)
    logits, alpha = torch.randn(2, 4, 5, 6, generator=rng), torch.rand(2, 5, 6, generator=rng)
    label = torch.randint(0, 4, (2, 5, 6), generator=rng)
    label[0, :2], label[1, 3] = 255, 255
    total, count = 0.0, 0
    for t in range(2):
        for y in range(5):
            for x in range(6):
                if label[t, y, x] == 255: continue
                f = torch.exp(logits[t, :, y, x]) / torch.exp(logits[t, :, y, x]).sum()
                total, count = total - alpha[t, y, x] * torch.log(f[label[t, y, x]]), count + 1
    assert torch.isclose(sw.eq1_spatial_loss(logits, label, alpha), total / count)
    assert sw.eq1_spatial_loss(logits, torch.full_like(label, 255), alpha) == 0, "no label, no loss"
    assert torch.isclose(sw.eq1_spatial_loss(logits, label, 3 * alpha), 3 * total / count), "α is a weight"


def test_eq2_adds_the_two_sets():
    logits, label, alpha = torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4, 6, 6)), torch.rand(4, 6, 6)
    label[0::2, :4] = 255                                           # few real labels do not weaken them
    both = sw.eq2_joint_loss(logits, label, alpha, 2)
    parts = [sw.eq1_spatial_loss(logits[i::2], label[i::2], alpha[i::2]) for i in (0, 1)]
    assert torch.isclose(both, sum(parts)) and torch.isclose(
        sw.eq2_joint_loss(logits, label, alpha, 1), sw.eq1_spatial_loss(logits, label, alpha))


def test_source_weight_lights_every_boundary():
    """Also that of two classes with neighbouring numbers; as wide as asked; 0 or 1 elsewhere."""
    label = np.zeros((30, 40), np.uint8)
    label[8:20, 10:20], label[8:20, 20:30] = 3, 4
    literal, plus = (sw.source_weight(label, 3, form) for form in ("literal", "plus_one"))
    assert set(np.unique(literal)) == {0, 1} and (plus == 1 + literal).all()
    for y, x in ((14, 10), (14, 20), (14, 29), (8, 15), (19, 25)):  # left, between, right, top, bottom
        assert literal[y - 2:y + 2, x - 2:x + 2].any()
    assert not literal[12:16, 14:17].any() and not literal[:5].any(), "neither inside nor far away"
    wide = sw.source_weight(label, 7, "literal")
    assert 2 <= literal[14, 5:15].sum() <= 4 and 6 <= wide[14, 2:16].sum() <= 8


def test_source_weight_has_no_boundary_where_labels_end():
    """Padding, other pixels without label: the same α as on the whole picture, no edge at their border."""
    label = np.zeros((30, 40), np.uint8)
    label[8:20, 10:30] = 3
    whole = sw.source_weight(label, 3)
    padded = np.pad(label, 6, constant_values=255)
    assert (sw.source_weight(padded, 3)[6:-6, 6:-6] == whole).all()
    assert (sw.source_weight(np.pad(0 * label, 6, constant_values=255), 3) == 1).all()
    assert (sw.source_weight(np.full_like(label, 255), 3) == 1).all()


def test_target_weight_is_the_sigmoid_of_the_distance():
    rng = np.random.default_rng(0)
    label = np.repeat(np.repeat(rng.integers(0, 3, (4, 5)).astype(np.uint8), 4, 0), 4, 1)
    label[:2, :3] = 255
    alpha = sw.target_weight(label)
    for y, x in np.ndindex(label.shape):
        others = np.argwhere(label != label[y, x])
        d = np.sqrt(((others - [y, x]) ** 2).sum(1)).min() if label[y, x] not in (0, 255) else 0
        assert np.isclose(alpha[y, x], 1 / (1 + np.exp(-d)), atol=1e-5), (y, x)
    assert (alpha[label == 0] == 0.5).all(), "background: the lowest weight"
    rescaled = sw.target_weight(label, "rescaled")
    assert np.allclose(rescaled, 2 * alpha - 1) and (rescaled[label == 0] == 0).all()


def test_a_mask_that_fills_the_picture_is_certain():
    assert np.allclose(sw.target_weight(np.full((5, 6), 2, np.uint8)), 1)
    half = np.zeros((6, 20), np.uint8)
    half[:, :10] = 1
    assert sw.target_weight(half)[3, 0] > 0.99, "the picture's edge is no end of a mask"


# ---------------------------------------------------------------- equals: initial masks


def test_cam_mask_stops_where_the_paper_says():
    cam = np.random.default_rng(0).random((50, 60)) ** 3
    cam /= cam.max()
    mask = sw.cam_mask(cam, 0.02, 0.99)
    threshold = cam[mask].min()
    steps = [0.99 ** n for n in range(500)]
    first = next(t for t in steps if (cam >= t).mean() > 0.02)
    assert (mask == (cam >= first)).all() and mask.mean() > 0.02 >= (cam >= first / 0.99).mean()
    assert threshold >= first


def test_cam_mask_of_a_part_that_was_not_found():
    assert not sw.cam_mask(np.zeros((20, 20)), 0.02, 0.99).any(), "and it ends"
    small = np.zeros((20, 20))
    small[3, 4] = 1
    assert sw.cam_mask(small, 0.02, 0.99).sum() == 1, "never 2 %: what there is"


def test_cam_of_an_unsure_classifier():
    """All scores negative: the greatest is the peak all the same. Classes without a tag have no CAM."""
    class Unsure:
        def scores(self, x): return x[:, [0, 1, 2, 0], ::4, ::4] - 9

    image = np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)
    tags = np.array([True, False, True, False])
    cam = sw.cam_of_tags(Unsure(), image, tags, 48, (1.0, 0.5), 4, "cpu")
    assert cam.shape == (4, 40, 48) and (cam[[0, 2]].max((1, 2)) == 1).all() and not cam[[1, 3]].any()
    assert (cam[[0, 2]].min((1, 2)) == 0).all() and sw.cam_mask(cam[0], 0.02, 0.99).mean() > 0.02
    assert not sw.cam_of_tags(Unsure(), image, np.zeros(4, bool), 48, (1.0,), 4, "cpu").any()


def test_the_cam_sees_pictures_at_the_size_of_the_training():
    """Whatever a picture's size: its longer side has as many pixels as the classifier was trained on."""
    class Sees:
        def scores(self, image):
            seen.append(tuple(image.shape[2:]))
            return torch.rand(len(image), 1, *(-(-n // 4) for n in image.shape[2:]))

    seen, tags = [], np.array([True])
    for size in ((120, 80), (60, 40), (30, 20)):
        cam = sw.cam_of_tags(Sees(), np.zeros((*size, 3), np.uint8), tags, 60, (1.0, 2.0), 4, "cpu")
        assert cam.shape == (1, *size)
    assert seen == [(60, 40), (120, 80)] * 3


def test_only_whole_superpixels():
    index = np.arange(12).reshape(3, 4).repeat(4, 0).repeat(5, 1)
    mask = np.random.default_rng(1).random(index.shape) < 0.97
    mask[:4, :10] = True
    expected = np.zeros_like(mask)
    for i in range(12):
        if mask[index == i].all(): expected[index == i] = True
    assert (sw.whole_superpixels(mask, index) == expected).all() and 0 < expected.mean() < 1


def squares():
    """CAMs of three classes (3,40,40), superpixels of 4x4; class 0 top left, class 2 bottom right."""
    y, x = np.mgrid[:40, :40]
    cam = np.zeros((3, 40, 40), np.float32)
    cam[0] = np.clip(1 - np.hypot(y - 10, x - 10) / 14, 0, 1)
    cam[2] = np.clip(1 - np.hypot(y - 30, x - 30) / 14, 0, 1)
    return cam, (y // 4) * 10 + x // 4


def test_initial_labels_of_two_parts():
    cam, index = squares()
    label, missed = sw.initial_label(cam, np.array([True, False, True]), index, 0.05, 0.99)
    assert set(np.unique(label)) == {0, 1, 3} and missed == 0
    assert (np.argwhere(label == 1).mean(0) < 15).all() and (np.argwhere(label == 3).mean(0) > 25).all()
    for k in np.unique(index): assert len(np.unique(label[index == k])) == 1
    ignore, _ = sw.initial_label(cam, np.array([True, False, True]), index, 0.05, 0.99, "ignore")
    assert ((ignore == 255) == (label == 0)).all() and (ignore[label > 0] == label[label > 0]).all()


def test_initial_label_where_a_part_was_not_found():
    """Its pixels are somewhere in the rest: that is not background."""
    cam, index = squares()
    label, missed = sw.initial_label(cam, np.array([True, True, False]), index, 0.05, 0.99)
    assert set(np.unique(label)) == {1, 255} and missed == 1
    label, missed = sw.initial_label(0 * cam, np.array([False, True, False]), index, 0.05, 0.99)
    assert (label == 255).all() and missed == 1


@pytest.mark.parametrize("rest", ["background", "ignore"])
def test_initial_label_of_a_picture_without_parts(rest):
    cam, index = squares()
    label, missed = sw.initial_label(0 * cam, np.zeros(3, bool), index, 0.05, 0.99, rest)
    assert (label == 0).all() and missed == 0, "no tag: all background"


def test_slic_regions_are_numbered_from_zero():
    image = sw.load_real(arguments(background=2), "val")[0].image
    index = sw.slic_regions(image, 300, 10.0)
    assert index.shape == image.shape[:2] and (np.unique(index) == np.arange(index.max() + 1)).all()
    assert 150 < index.max() < 450


# ---------------------------------------------------------------- equals: Algorithm 2


def predictions(seed=0, n=5, classes=4, sharp=6.0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        logits = rng.normal(size=(classes, 20, 30)) * sharp
        e = np.exp(logits - logits.max(0))
        yield (e / e.sum(0)).astype(np.float32)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_the_streamed_threshold_is_that_of_the_sorted_list(p):
    Ps = list(predictions())
    threshold = sw.alg2_threshold(sum(sw.level_counts(P) for P in Ps), p)
    S = np.sort(np.concatenate([P.max(0).ravel() for P in Ps]))[::-1]           # lines 6 and 7
    literal = S[min(int(len(S) * p), len(S) - 1)]                               # lines 8 and 9
    assert sw.level_of(np.array([literal]))[0] == threshold
    labels = [sw.alg2_label(P, threshold) for P in Ps]
    for P, label in zip(Ps, labels, strict=True):
        sure = P.max(0) >= literal
        assert (label[sure] == P.argmax(0)[sure]).all()
        assert (sure != (label != 255)).mean() < 0.01, "up to the width of a step"
    kept = np.mean([label != 255 for label in labels])
    assert p <= kept + 1e-9 and kept < p + 0.01


def test_levels_grow_with_confidence():
    S = np.array([0, 0.3, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-6, 1.0])
    levels = sw.level_of(S)
    assert (np.diff(levels) > 0).all() and levels[0] == 0 and levels[-1] == sw.LEVELS - 1


def test_equal_confidences_keep_their_labels():
    """All pixels certain: nothing lies below the threshold."""
    P = np.zeros((3, 10, 10), np.float32)
    P[1] = 1
    threshold = sw.alg2_threshold(sw.level_counts(P), 0.3)
    assert (sw.alg2_label(P, threshold) == 1).all()


def test_superpixels_vote():
    index = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]])
    label = np.array([[3, 3, 0, 255], [3, 0, 255, 255], [1, 1, 1, 255]], np.uint8)
    assert sw.vote(label, index).tolist() == [[3, 3, 255, 255], [3, 3, 255, 255], [1, 1, 1, 1]]


def test_unaries_hold_the_classes_that_are_there():
    label = np.array([[0, 2, 255]], np.uint8)
    P = sw.unaries(label, 4, 0.7)
    assert np.allclose(P[:, 0], [[0.7, 0.3, 0.5], [0, 0, 0], [0.3, 0.7, 0.5], [0, 0, 0]])
    assert not sw.unaries(np.full((2, 3), 255, np.uint8), 4, 0.7).any()


def test_refinement_follows_the_picture():
    """A part with scattered errors: superpixels and CRF mend them; what is unlabelled stays so."""
    rng = np.random.default_rng(0)
    true = np.zeros((48, 48), np.uint8)
    true[12:36, 16:34] = 2
    image = np.where(true[..., None] > 0, 190, 60).repeat(3, 2) + rng.normal(0, 4, (48, 48, 3))
    image = image.clip(0, 255).astype(np.uint8)
    label = np.where(rng.random(true.shape) < 0.15, 2 - true, true).astype(np.uint8)
    label[40:, :] = 255
    regions = [sw.slic_regions(image, 100, 10.0)]
    known, errors, field = np.s_[:36], {}, CRF(3, 3, 50, 5, 10, 5)
    for name, index, crf in (("raw", [None], None), ("vote", regions, None), ("crf", [None], field),
                             ("both", regions, field)):
        (refined,) = sw.refine_labels([image], [label], 4, index, crf, 0.7)
        assert set(np.unique(refined)) == {0, 2, 255}
        assert index[0] is not None or ((refined == 255) == (label == 255)).all()
        errors[name] = (refined[known] != true[known]).sum()
    assert max(errors["vote"], errors["crf"]) < errors["raw"] and errors["both"] < 0.3 * errors["raw"]


def test_refining_labels_of_which_none_is_known():
    label = np.full((10, 12), 255, np.uint8)
    image = np.zeros((10, 12, 3), np.uint8)
    (refined,) = sw.refine_labels([image], [label], 3, [None], CRF(3, 3, 50, 5, 10, 5), 0.7)
    assert (refined == 255).all()


@pytest.mark.parametrize("fields, bound", [({}, True), ({"label_tags": False}, False),
                                            ({"initial": "source"}, False)])
def test_labels_hold_the_pictures_own_classes(fields, bound):
    """[D16]: of what is left the shares stay; a picture without tags is background."""
    P = np.random.default_rng(0).dirichlet(np.ones(4), (5, 6)).transpose(2, 0, 1).astype(np.float32)
    tags = np.array([False, True, False])
    Q = sw.of_tags(arguments(**fields), P, tags)
    assert np.allclose(Q.sum(0), 1, atol=1e-6)
    assert not bound and (Q == P).all() or bound and not Q[[1, 3]].any()
    if bound:
        assert np.allclose(Q[2] / Q[0], P[2] / P[0], rtol=1e-4)
        assert (sw.of_tags(arguments(), P, ~np.ones(3, bool)).argmax(0) == 0).all()


def test_a_part_that_was_lost_keeps_its_initial_mask():
    """[D16]: class 1 is there, so its initial mask is not looked at; class 2 was lost; class 3 is no tag."""
    initial = np.array([[1, 2, 2, 3], [0, 2, 0, 0]], np.uint8)
    label = np.array([[0, 0, 255, 0], [1, 1, 0, 255]], np.uint8)
    kept = sw.keep_lost(label, initial, np.array([True, True, False]))
    assert kept.dtype == np.uint8 and kept.tolist() == [[0, 2, 2, 0], [1, 1, 0, 255]]
    assert label.tolist() == [[0, 0, 255, 0], [1, 1, 0, 255]], "the input is left as it is"
    kept = sw.keep_lost(label, np.zeros_like(initial), np.array([True, True, False]))
    assert kept.tolist() == [[255, 255, 255, 255], [1, 1, 255, 255]], "class 2 may be anywhere"
    assert (sw.keep_lost(label, initial, np.array([True, False, False])) == label).all()


def test_label_change_counts_what_is_no_background(tmp_path):
    class Folder:
        def path(self, folder, name): return tmp_path / folder / f"{name}.png"

    before, after = np.zeros((2, 10), np.uint8), np.zeros((2, 10), np.uint8)
    before[0, :4], after[0, :2], after[1, 0] = 1, 1, 255
    save_label(tmp_path / "a" / "x.png", before)
    save_label(tmp_path / "b" / "x.png", after)
    assert sw.label_change(Folder(), ["x"], "a", "b") == 3 / 5
    assert sw.label_change(Folder(), ["x"], "a", "a") == 0


# ---------------------------------------------------------------- draws


def test_joint_takes_turns():
    one = Draws(range(5), lambda s, rng: ("real", s), 0)
    two = Draws(range(9), lambda s, rng: ("rendered", s), 1)
    joint = sw.Joint(one, two)
    assert [joint[n][0] for n in range(6)] == ["real", "rendered"] * 3
    assert [joint[2 * n][1] for n in range(10)] == [one[n][1] for n in range(10)]
    assert [sw.Joint(two)[n] for n in range(4)] == [two[n] for n in range(4)] and len(joint) == 2**40


def test_training_samples_carry_no_mask(tmp_path):
    args = arguments(background=1)
    train_set = sw.load_real(args, "train")
    assert len(train_set) == 400 and set(vars(train_set[0])) == {"name", "image", "tags"}
    assert all(name.endswith("_b1") for name in train_set.names)
    assert len(sw.load_real(arguments(background=-1), "train")) == 1600
    save_label(tmp_path / f"{train_set.names[0]}.png", np.zeros((128, 160)))
    labelled = sw.with_labels(train_set, pseudo=tmp_path)
    sample = sw.train_augment(args, sw.weighting(args, False))(labelled[0], np.random.default_rng(0))
    assert set(vars(sample)) == {"image", "pseudo", "weight"}
    assert sample.image.shape == (3, 96, 96) and sample.weight.shape == sample.pseudo.shape == (96, 96)
    assert set(sample.pseudo.unique().tolist()) <= {0, 255} and (sample.weight == 0.5).all()


def test_weights_of_the_settings():
    label = np.zeros((20, 20), np.uint8)
    label[5:15, 5:15] = 1
    real, rendered = (sw.weighting(arguments(), kind)(label) for kind in (False, True))
    assert real.min() == 0.5 and real.max() > 0.95 and set(np.unique(rendered)) == {1, 2}
    assert (sw.weighting(arguments(spatial=False), False)(label) == 1).all()
    assert (sw.weighting(arguments(spatial=False), True)(label) == 1).all()
    assert (sw.weighting(arguments(supervision="full"), False)(label) == 1).all(), "true masks need no weight"


# ---------------------------------------------------------------- learns


def test_a_random_ground_leaves_masks_and_moves_pictures():
    """[D2]: the ground changes wholly, the part keeps its shading; the same seed draws the same ground."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44], mask[:4] = 3, 255
    shade = np.where(np.arange(64)[:, None, None] < 32, 60, 200) * np.ones((64, 64, 3))
    image = np.where(mask[..., None] == 3, shade, 242).astype(np.uint8)
    grounds = []
    for seed in range(30):
        s = sw.on_random_ground(Sample(image=image, mask=mask), np.random.default_rng(seed))
        again = sw.on_random_ground(Sample(image=image, mask=mask), np.random.default_rng(seed))
        assert s.image.dtype == np.uint8 and (s.image == again.image).all() and (s.mask == mask).all()
        part = s.image[22:42, 22:42].mean((1, 2))
        assert part[-6:].mean() > 1.5 * part[:6].mean(), "the shading of the part is gone"
        grounds.append(s.image[mask == 0].mean(0))
    spread = np.std(grounds, axis=0)
    assert (spread > 20).all() and (image == np.where(mask[..., None] == 3, shade, 242)).all()


def test_the_classifier_starts_from_the_encoder():
    """Its linear layer: a part's weights minus the background's, so its CAM is the encoder's margin."""
    torch.manual_seed(0)
    backbone = sw.make_backbone("tiny", "none", 8, False)
    encoder = sw.DeepLab(backbone, torch.nn.Conv2d(backbone.channels[-1], 9, 1)).eval()
    net = sw.TagNet(sw.make_backbone("tiny", "none", 8, False), 8).eval()
    sw.start_from(encoder, net)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): scores = encoder(image)
    assert torch.allclose(net.scores(image), scores[:, 1:] - scores[:, :1], atol=1e-5)
    assert not any(norm.training for norm in net.train().backbone.norms()), "batch norm must stay"


def test_the_joint_loss_falls():
    """A few rendered and real pictures with true labels."""
    args = arguments(seg_crop=64)
    torch.manual_seed(0)
    net, rendered, real = sw.make_pspnet(args, "none", 8).train(), load(args, "rendered"), load(args, "val")
    augment = [sw.train_augment(args, sw.weighting(args, kind)) for kind in (False, True)]
    samples = [augment[i % 2]((real, rendered)[i % 2][i], np.random.default_rng(i)) for i in range(6)]
    batch, history = collate(samples), []
    optim = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(14):
        logits = sw.cells_to_pixels(net(batch.image)[0], net.backbone.strides[-1], batch.pseudo.shape[1:])
        loss = sw.eq2_joint_loss(logits, batch.pseudo, torch.stack(batch.weight), 2)
        optim.zero_grad()
        loss.backward()
        optim.step()
        history.append(loss.item())
    assert np.mean(history[-2:]) < 0.6 * history[0], history


def test_rendered_pictures_on_random_grounds():
    """--rendered-ground random: the label stays, the white ground goes."""
    args, rendered = arguments(), load(arguments(), "rendered")
    weigh, seen = sw.weighting(args, True), {}
    for ground in ("rendered", "random"):
        augment = sw.train_augment(args, weigh, ground)
        seen[ground] = [augment(rendered[i], np.random.default_rng(i)) for i in range(8)]
    for plain, other in zip(*seen.values()):
        assert (plain.pseudo == other.pseudo).all() and (plain.weight == other.weight).all()
    spread = {ground: np.mean([s.image[:, s.pseudo == 0].std().item() for s in samples])
              for ground, samples in seen.items()}
    assert spread["random"] > 3 * spread["rendered"]


# ---------------------------------------------------------------- runs

TINY = """selftrain_workpiece.py --preset shapes --workers 0 --device cpu --cam-steps 3 --cam-batch 2
    --enc-steps 2 --enc-batch 2 --cam-crop 48 --cam-resize 48 64 --superpixels 100 --seg-steps 4
    --source-steps 3 --seg-batch 4 --seg-crop 48 --rounds 2 --cam-scales 0.5 --test-scales 0.5 --stop-change 0
    --save-every 2 --log-every 1""".split()
STAGES = ["initial", "round_1", "round_2", "val", "val_crf"]
FOLDERS = ["initial", "round_1", "pseudo_1", "round_2", "val", "val_crf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures a split, as files."""
    made = tmp_path_factory.mktemp("workpiece")
    export("solids", "workpiece", str(made), n=4)
    return made


def command(folder, out, *more):
    return [*TINY, "--data", "workpiece", "--root", folder, "--out", out, *more]


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        sw.main()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run_here(*command(folder, out))
    return out


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages(out)]


def contents(out, *parts):
    files = [f for part in parts for f in ([out / part] if (out / part).is_file() else
                                           sorted((out / part).rglob("*"))) if f.is_file()]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def log(out, stage):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def test_runs_all_rounds(finished):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 4 and s["uses_masks"] and 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        assert 0 <= s["miou_fg"] <= 100 and s["split"] == ("val" if "val" in s["stage"] else "train")
    initial, first = entries[:2]
    assert 0 <= initial["missed"] <= 100 and initial["coverage"] <= 100
    assert first["ratio"] == sw.SOLIDS["ratio"] and 0 <= first["change"] <= 100 and first["coverage"] > 50
    assert [s["stage"] for s in entries if s["crf"]] == ["val_crf"]
    for place in FOLDERS:
        files = sorted((finished / place).glob("*.png"))
        assert len(files) == 4
        values = set().union(*(np.unique(np.array(Image.open(f))).tolist() for f in files))
        assert values <= {*range(9)} | ({255} if place in ("initial", "pseudo_1") else set())
    assert {f.name for f in (finished / "panels").iterdir()} == {"train.png", "val.png", "several.png"}
    assert [len(log(finished, s)) for s in ("classifier", "segmenter_1", "segmenter_2")] == [3, 4, 4]
    assert not (finished / "segmenter_3.pt").exists() and not (finished / "pseudo_2").exists()


def test_the_same_command_again_does_nothing(finished, folder):
    before, numbers = contents(finished, *FOLDERS, "cam", "confidence"), scores(finished)
    times = {f: f.stat().st_mtime_ns for f in finished.rglob("*.p[nt]*")}
    run_here(*command(folder, finished))
    assert contents(finished, *FOLDERS, "cam", "confidence") == before and scores(finished) == numbers
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    """kill -9 in round 2; then the same command again."""
    for name in ("classifier.pt", "cam", "initial", "args.json", "state.json", "log.jsonl", "segmenter_1.pt",
                 "round_1", "confidence/round_1"):
        if (finished / name).is_dir(): shutil.copytree(finished / name, tmp_path / name)
        else: shutil.copy(finished / name, tmp_path / name)
    line = command(folder, tmp_path)
    kill_when(lambda: (tmp_path / "segmenter_2.pt").exists(), *line)
    run_here(*line)
    assert scores(tmp_path) == scores(finished)
    assert contents(tmp_path, *FOLDERS) == contents(finished, *FOLDERS)


def test_rounds_stop_when_labels_settle(finished, folder, tmp_path):
    """All of them change less than 101 %; classifier, initial masks and round 1 are taken over."""
    run_here(*command(folder, tmp_path, "--stop-change", "1.01", "--reuse", finished))
    assert [s["stage"] for s in stages(tmp_path)] == ["initial", "round_1", "val", "val_crf"]
    parts = ["initial", "round_1", "pseudo_1"]
    assert contents(tmp_path, *parts) == contents(finished, *parts)
    assert not (tmp_path / "segmenter_2.pt").exists()


ROWS = {"initial only": "--rounds 1 --no-rendered --no-spatial", "+ rendered": "--rounds 1 --no-spatial",
        "raw": "--no-refine --seg-steps 1",
        "no superpixels": "--no-refine-superpixels --crf none --seg-steps 1",
        "literal": "--rounds 1 --source-weight literal --target-weight rescaled --initial-rest ignore"}


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_the_rows_of_table_4(finished, folder, tmp_path, flags):
    run_here(*command(folder, tmp_path, "--reuse", finished, *flags.split()))
    one = "--rounds 1" in flags
    assert [s["stage"] for s in stages(tmp_path)] == [s for s in STAGES if not (one and s == "round_2")]
    assert contents(tmp_path, "classifier.pt") == contents(finished, "classifier.pt")
    if "ignore" not in flags: assert contents(tmp_path, "initial") == contents(finished, "initial")
    if "no-refine " in flags:
        assert contents(tmp_path, "pseudo_1") == {k.replace("round", "pseudo"): v for k, v in
                                                  contents(tmp_path, "round_1").items()}, "raw predictions"
    assert len(log(tmp_path, "segmenter_1")) == (1 if "seg-steps" in flags else 4)


def test_source_only_and_full(folder, tmp_path):
    run_here(*command(folder, tmp_path / "source", "--source-only"))
    run_here(*command(folder, tmp_path / "full", "--supervision", "full", "--seg-steps", 1))
    for name in ("source", "full"):
        assert [s["stage"] for s in stages(tmp_path / name)] == ["val", "val_crf"]
    assert len(log(tmp_path / "source", "source")) == 3
    assert len(log(tmp_path / "full", "segmenter_1")) == 2
    assert all(line["known"] > 0.5 for line in log(tmp_path / "full", "segmenter_1"))
    assert not (tmp_path / "full" / "initial").exists()


def test_real_training_pictures_need_no_masks(folder, tmp_path):
    """Nor does a set of one part: nothing of train is scored. A picture without tags is not ranked [D16]."""
    shutil.copytree(folder, tmp_path / "data")
    for part in ("masks", "instances", "scribbles", "boxes.json", "points.json"):
        path = tmp_path / "data" / "train" / part
        if path.is_dir(): shutil.rmtree(path)
        else: path.unlink()
    tags = json.loads((tmp_path / "data" / "train" / "tags.json").read_text())
    first, *others = sorted(tags)
    (tmp_path / "data" / "train" / "tags.json").write_text(json.dumps({**tags, first: []}))
    run_here(*command(tmp_path / "data", tmp_path / "out", "--rounds", 2, "--seg-steps", 1, "--cam-steps", 1))
    assert [s["stage"] for s in stages(tmp_path / "out")] == ["val", "val_crf"]
    def ranked(name): return np.load(tmp_path / "out/confidence/round_1" / f"{name}.npz")["counts"].sum()
    assert ranked(first) == 0 and {ranked(name) for name in others} == {160 * 128}
    assert not read_label(tmp_path / "out/pseudo_1" / f"{first}.png").any(), "all background"


def test_street_scenes_start_from_the_source(tmp_path):
    """GTA5 to Cityscapes on exported solids, by the preset of --data cityscapes made small."""
    for layout in ("cityscapes", "gta5"): export("solids", layout, str(tmp_path / layout), n=3)
    small = [word for word in TINY if word not in ("--preset", "shapes")]
    run_here(*small, "--data", "cityscapes", "--root", tmp_path / "cityscapes", "--rendered-root",
             tmp_path / "gta5", "--backbone", "tiny", "--seg-stride", 4, "--weights", "none", "--out",
             tmp_path / "out")
    entries = stages(tmp_path / "out")
    assert [s["stage"] for s in entries] == STAGES and len(entries[0]["iou"]) == 20
    assert entries[1]["ratio"] == pytest.approx(0.35), "0.3 made the initial labels"
    assert not (tmp_path / "out" / "classifier.pt").exists()
    made = json.loads((tmp_path / "out" / "args.json").read_text())
    assert [made[key] for key in ("optimizer", "power", "initial", "preset")] == [
        "sgd", 0.98, "source", "cityscapes"]
    assert all(s["iou"]["background"] is None for s in entries), "no such class: never predicted"


def test_predicts_with_the_runs_network(finished, folder, tmp_path):
    run_here("selftrain_workpiece.py", "--predict", folder / "val" / "images", "--checkpoint",
             finished / "segmenter_2.pt", "--out", tmp_path, "--workers", 0, "--device", "cpu")
    for file in (folder / "val" / "images").iterdir():
        label = read_label(tmp_path / "predict" / file.name, 8, read_image(file))
        assert (label == read_label(finished / "val_crf" / file.name)).all(), "the run's own prediction"
    assert len(list((tmp_path / "predict").glob("*_overlay.png"))) == 4


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--source-only", "--no-rendered"], "nothing to learn"),
    (["--seg-batch", "5"], "multiple of 2"), (["--rounds", "0"], "1 or more"), (["--ratio", "0"], "ratio"),
    (["--cam-decay", "1"], "cam-decay"), (["--ratio", "0.99", "--ratio-max", "0.98"], "not below"),
    (["--test-scales"], "one number or more"), (["--cam-scales"], "one number or more"),
    (["--superpixels", "0"], "1 or more"), (["--compactness", "0"], "above 0"),
    (["--cam-resize", "200", "100"], "smaller first"),
    (["--backbone", "mobilenet_v2", "--weights", "nowhere.pt"], "nowhere"),
    (["--cam-backbone", "resnet18"], "add --enc-steps 0")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(UserError, match=words): run_here(*command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_error_rendered_set_with_other_classes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("\n".join("abcdefgh"))
    with pytest.raises(DataError, match="one classes.txt"):
        run_here(*command(folder, tmp_path / "out", "--rendered-root", tmp_path / "other"))


def test_error_no_rendered_pictures(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("rendered"))
    for more in ([], ["--no-rendered"]):                        # the encoder needs them in any case
        with pytest.raises(DataError, match="--no-rendered --enc-steps 0"):
            run_here(*command(tmp_path / "data", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_stage_is_refused(finished, folder):
    with pytest.raises(SystemExit, match="segmenter"):
        run_here("selftrain_workpiece.py", "--predict", folder / "val" / "images", "--checkpoint",
                 finished / "classifier.pt")


def test_two_processes_train(finished, folder, tmp_path):
    sh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
       *command(folder, tmp_path, "--reuse", finished, "--rounds", 1, "--seg-steps", 2))
    assert [s["stage"] for s in stages(tmp_path)] == ["initial", "round_1", "val", "val_crf"]
    assert len(contents(tmp_path, "val_crf")) == 4


def test_stages_are_shared_only_between_runs_that_agree():
    fields = [name for names in sw.FIELDS.values() for name in names]
    known = {f.name for f in dataclasses.fields(sw.Args)}
    assert set(fields) <= known and len(fields) == len(set(fields))
    free = set("""preset out reuse fresh device workers predict checkpoint log_every save_every rounds
        stop_change seg_crf""".split())
    assert known - set(fields) == free, "each field belongs to a stage, or can not change one"
    source = [name for names in sw.SOURCE_FIELDS.values() for name in names]
    assert sorted(source) == sorted({*fields} - {"source_only"})
    stages, depends = list(sw.SOURCE_FIELDS), {"source_steps", "seg_lr", "test_scales", "ratio", "label_crf"}
    before = [name for stage in stages[:stages.index("initial") + 1] for name in sw.SOURCE_FIELDS[stage]]
    assert depends <= set(before), "initial masks by a source network depend on all that made them"
