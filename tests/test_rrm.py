"""rrm.py: each equation against an authority, the script on a few scenes, and what the losses gain."""

import dataclasses
import itertools
import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import rrm
from common import CRF, dense_crf, dense_energy, make_backbone
from conftest import kill_when, sh
from data import Draws, collate, export, load, normalise, read_image, read_label

torch.set_num_threads(1)


def arguments(**changes):
    return rrm.Args(**{**rrm.SHAPES, **changes})


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def network(classes=8, seed=0, **changes):
    torch.manual_seed(seed)
    return rrm.make_rrm(arguments(**changes), "none", classes)


def label_map(text):
    """Rows of digits, `.` = 255 -> (H,W) int64."""
    return torch.tensor([[255 if c == "." else int(c) for c in row] for row in text.split()])


def batch_of(n, first=0, **changes):
    """The n scenes from `first` on as a batch of joint training, with masks."""
    args = arguments(train_list="train", supervision="full", **changes)
    draws = Draws(load(args, "train"), rrm.joint_augment(args), 0)
    return collate([draws[i] for i in range(first, first + n)])


# ---------------------------------------------------------------- equals: mining, Eqs. (2.1)–(2.7)


def test_eq2_1_sums_channels_and_cuts_negative_scores():
    torch.manual_seed(0)
    feature, weight = torch.randn(2, 5, 4, 3), torch.randn(3, 5, 1, 1)
    cam = rrm.eq2_1_cam(feature, weight, 1, (4, 3), (4, 3))         # one cell a pixel: RS changes nothing
    for b, c, i, j in itertools.product(range(2), range(3), range(4), range(3)):
        score = sum(weight[c, d, 0, 0] * feature[b, d, i, j] for d in range(5))
        assert close(cam[b, c, i, j], score.clamp_min(0))


@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_eq2_1_finds_the_pixels_of_its_cells(scale):
    """A cell i of the scaled image lies on its pixel stride·i, so a spot keeps its place at every scale."""
    seen, stride = [round(33 * scale), round(41 * scale)], 4
    feature = torch.zeros(1, 1, -(-seen[0] // stride), -(-seen[1] // stride))
    feature[0, 0, 2, 3] = 1
    cam = rrm.eq2_1_cam(feature, torch.ones(1, 1, 1, 1), stride, (33, 41), seen)[0, 0]
    y, x = divmod(cam.argmax().item(), 41)
    assert abs(y - ((8 + 0.5) / scale - 0.5)) <= 1 and abs(x - ((12 + 0.5) / scale - 0.5)) <= 1


def test_eq2_2_and_fig_2_2_the_mean_of_all_scales():
    net, image = network().eval(), torch.randn(1, 3, 40, 48)
    scales, stride = (0.5, 1.0, 1.5), net.stride
    _, feature = net.classification(image)
    cam = net.classification.multi_scale_cam(image, feature, scales, stride)
    maps = []
    for scale in scales:
        seen = [max(32, round(40 * scale)), max(32, round(48 * scale))]
        scaled = F.interpolate(image, seen, mode="bilinear", align_corners=False, antialias=True)
        maps.append(rrm.eq2_1_cam(net.classification.backbone(scaled)[-1],
                                  net.classification.classifier.weight, stride, (40, 48), seen))
    assert close(cam, sum(maps) / 3) and not cam.requires_grad


def test_the_extra_scales_leave_batch_norm_alone():
    net, image = network(init="joint").train(), torch.randn(2, 3, 40, 40)
    _, feature = net.classification(image)
    before = [b.clone() for b in net.buffers()]
    net.classification.multi_scale_cam(image, feature, (0.5, 1.0), 4)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert net.classification.backbone.training


def test_eq2_3_and_2_4():
    cam = torch.tensor([[[0.0, 2.0, 4.0]], [[3.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    P_fg = rrm.eq2_3_foreground(cam)
    assert close(P_fg, [[[0.0, 0.5, 1.0]], [[1.0, 1 / 3, 0.0]], [[0.0, 0.0, 0.0]]])
    assert close(rrm.eq2_4_background(P_fg, 4), [[[0.0, 0.5**4, 0.0]]])
    assert close(rrm.eq2_4_background(P_fg[:0], 4), [[[1.0, 1.0, 1.0]]]), "no class: all is background"


def test_eq2_4_as_printed_would_grow_with_gamma():
    P_fg = torch.full((1, 1, 1), 0.5)
    assert rrm.eq2_4_background(P_fg, 32) < rrm.eq2_4_background(P_fg, 4) and 1 - 0.5**32 > 1 - 0.5**4


def test_eq2_6_top_share_of_each_class_and_background_by_its_score():
    """Ten pixels of class 1 with scores 0.1 … 1: 0.1 does not count, of the nine others four are 40 %."""
    fg = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.0, 0.05, 0.2, 0.0]])
    bg = torch.tensor([[0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0, 0.81, 0.8, 0.9]])
    valid = torch.ones(1, 14, dtype=torch.bool)
    valid[0, 13] = False
    P = torch.stack([bg, fg])
    assert (rrm.eq2_6_cam_label(P, valid, 0.4, 0.1, 0.8) == label_map("......111100..")).all()
    assert (rrm.eq2_6_cam_label(P, valid, 1.0, 0.1, 0.8) == label_map(".11111111100..")).all()
    assert (rrm.eq2_6_cam_label(P, valid, 0.4, 0.1, 0.0) == label_map("......111100..")).all()
    assert (rrm.eq2_6_cam_label(P, valid, 0.3, 0.1, 0.0) == label_map(".......1110...")).all()


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 1.0])
def test_eq2_6_keeps_the_share_in_each_class(ratio):
    rng = torch.Generator().manual_seed(0)
    P = torch.rand(4, 30, 40, generator=rng)
    valid = torch.ones(30, 40, dtype=torch.bool)
    label, winner = rrm.eq2_6_cam_label(P, valid, ratio, 0.1, 0.0), P.argmax(0)
    for c in range(4):
        own = (winner == c) & ((P[c] > 0.1) | (c == 0))
        assert ((label == c) <= own).all() and (label == c).sum() == math.ceil(ratio * own.sum())
        if ratio < 1: assert P[c][label == c].min() >= P[c][own & (label != c)].max()


def test_crf_label_of_one_and_two_exponents():
    low = torch.tensor([[[0.1, 0.7, 0.6, 0.9]], [[0.9, 0.3, 0.4, 0.1]]])
    high = torch.tensor([[[0.1, 0.4, 0.9, 0.7]], [[0.9, 0.6, 0.1, 0.3]]])
    assert (rrm.crf_label(low[None], 0) == label_map("1000")).all()
    assert (rrm.crf_label(low[None], 0.8) == label_map("1..0")).all()
    assert (rrm.crf_label(torch.stack([low, high]), 0) == label_map("1.00")).all()
    assert (rrm.crf_label(torch.stack([low, high]), 0.8) == label_map("1.0.")).all()


def test_eq2_7():
    final = rrm.eq2_7_final_label(label_map("0.12 1.20"), label_map("0011 1.2."))
    assert (final == label_map("0.1. 1.2.")).all()


OPTIONS = dict(gammas=(4.0,), ratio=0.4, fg_min=0.1, bg_min=0.8, crf_min=0.0, confident=True,
               crf=CRF(3, 3, 80, 13, 10, 3))


def mining_case(n=3, classes=8):
    batch = batch_of(n)
    truth = torch.stack([batch.mask == c for c in range(1, classes + 1)], dim=1).float()
    cam = F.avg_pool2d(truth, 9, 1, 4) * torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    return rrm.to_rgb(batch.image), cam, batch.tags, batch.pseudo != 255


@pytest.mark.parametrize("gammas", [(4.0,), (4.0, 32.0)])
def test_mine_is_its_equations_image_by_image(gammas):
    rgb, cam, tags, valid = mining_case()
    labels = rrm.mine(rgb, cam, tags, valid, **{**OPTIONS, "gammas": gammas})
    for b in range(len(rgb)):
        classes = [0, *(tags[b].nonzero()[:, 0] + 1).tolist()]
        P_fg = torch.stack([cam[b, c - 1] / cam[b, c - 1].max() for c in classes[1:]])
        unaries = [torch.cat([(1 - P_fg.amax(0, keepdim=True)) ** g, P_fg]) for g in gammas]
        image = rgb[b].permute(1, 2, 0).numpy()
        Q = [dense_crf([image], [u], OPTIONS["crf"])[0].argmax(0) for u in unaries]
        sure = rrm.eq2_6_cam_label(unaries[-1], valid[b], 0.4, 0.1, 0.8)
        for i, j in np.ndindex(*sure.shape):
            crf = Q[0][i, j] or (0 if Q[-1][i, j] == 0 else 255)
            expected = classes[sure[i, j]] if sure[i, j] == crf != 255 else 255
            assert labels[b, i, j] == expected
    assert (labels[~valid] == 255).all() and len(labels.unique()) > 3


def test_mine_without_crf_and_without_confidence():
    rgb, cam, tags, valid = mining_case()
    plain = rrm.mine(rgb, cam, tags, valid, **{**OPTIONS, "crf": None})
    with_crf = rrm.mine(rgb, cam, tags, valid, **OPTIONS)
    assert ((with_crf == plain) | (with_crf == 255)).all() and (with_crf != plain).any()
    whole = rrm.mine(rgb, cam, tags, valid, **{**OPTIONS, "crf": None, "confident": False})
    assert (whole[valid] != 255).all() and ((plain == whole) | (plain == 255)).all()
    none = rrm.mine(rgb, cam, tags, valid, **OPTIONS, backend="none")
    assert (none == plain).all(), "no CRF at all: it agrees with the CAM"


def test_mine_odd_images():
    """No class at all; one class; a class whose CAM is dead: its IndexError is the authors', not ours."""
    rgb, cam, tags, valid = mining_case()
    tags = torch.zeros_like(tags)
    tags[1, 0] = tags[2, 0] = tags[2, 3] = 1
    cam[1, 0, 20:40, 20:40], cam[2, 0], cam[2, 3] = 1, 0, 0
    labels = rrm.mine(rgb, cam, tags, valid, **OPTIONS)
    assert set(labels[0][valid[0]].tolist()) == {0}
    assert set(labels[1].unique().tolist()) <= {0, 1, 255} and (labels[1] == 1).any()
    assert set(labels[2].unique().tolist()) <= {0, 255}


def test_a_batch_without_reliable_foreground_trains():
    args, batch = arguments(), batch_of(2)
    net = network().train()
    _, _, scores, F_m = net(batch.image, ())
    for label in (torch.zeros_like(batch.mask), torch.full_like(batch.mask, 255)):
        losses = rrm.joint_losses(args, scores, F_m, label, rrm.to_rgb(batch.image), batch.pseudo != 255, 8)
        assert all(torch.isfinite(loss) for loss in losses)
    sum(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.branches.parameters())


def test_colours_come_back():
    s = load(arguments(train_list="train"), "train")[0]
    image = normalise(s).image
    assert (rrm.to_rgb(image[None])[0].permute(1, 2, 0).numpy() == s.image).all()


# ---------------------------------------------------------------- equals: attention, Eqs. (2.8)–(2.13)


def reweighted(row, mode):
    """Eq. (2.9) of one row by its definition: rank 1 is the largest value."""
    N, positive = len(row), sum(a > 0 for a in row)
    weights = []
    for a in row:
        e = 1 + sum(other > a for other in row)
        if a > 0: weights.append(e / positive)
        elif mode == "literal": weights.append(math.sqrt(abs(positive - e) / positive))
        else: weights.append(math.sqrt((N - e) / (N - positive)))
    return weights


@pytest.mark.parametrize("mode", ["text", "literal", "none"])
def test_r_fam_on_a_6x6_map_equals_a_double_loop(mode):
    torch.manual_seed(0)
    feature = torch.randn(2, 5, 6, 6)
    module = rrm.RFAM(5, 4, mode)
    out = module(feature)
    assert out.shape == (2, 8, 6, 6)
    for b in range(2):
        F1, F2, F3 = ([(conv.weight[:, :, 0, 0] @ feature[b, :, i, j]).detach() for i, j in np.ndindex(6, 6)]
                      for conv in module.project)
        for k in range(36):
            row = [(F1[k] @ F2[m]).item() for m in range(36)]
            assert 0 < sum(a > 0 for a in row) < 36, "both rows of Eq. (2.9)"
            weights = [1] * 36 if mode == "none" else reweighted(row, mode)
            total = sum(math.exp(a) for a in row)
            F_a = sum(math.exp(a) / total * w * f for a, w, f in zip(row, weights, F3, strict=True))
            assert close(out[b, :, k // 6, k % 6].detach(), torch.cat([F_a, F3[k]]), atol=1e-4)


def test_eq2_9_is_small_at_both_ends_and_large_between():
    A = torch.arange(29.5, -21, -1)[None, None] / 10                # 30 positive values, 21 negative ones
    weights = rrm.eq2_9_reweight(A)[0, 0]
    assert rrm.eq2_10_positive(A).item() == 30
    assert weights.argmax() == 29 and close(weights[29], 1.0)
    assert (weights[:30].diff() > 0).all() and (weights[30:].diff() < 0).all()
    assert weights[0] < 0.05 and weights[-1] == 0
    literal = rrm.eq2_9_reweight(A, "literal")[0, 0]
    assert (literal[30:].diff() > 0).all(), "as printed it grows towards the lowest scores"


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("mode", ["text", "literal"])
def test_eq2_9_with_one_sign_only(value, mode):
    weights = rrm.eq2_9_reweight(torch.full((1, 3, 9), value), mode)
    assert torch.isfinite(weights).all() and weights.dtype == torch.float32


def test_eq2_13_and_the_branches():
    image = torch.randn(1, 3, 48, 48)
    net = network().eval()
    feature = net.classification.backbone(image)[-1]
    local, global_ = (net.branches[name](feature) for name in ("local", "global"))
    scores, F_m = net.segment(image)
    assert close(scores, (local + global_) / 2) and F_m.shape == (1, 64 + 2 * 32, 12, 12)
    assert (F_m[:, :64] >= 0).all() and (F_m[:, 64:] < 0).any(), "F_l behind its ReLU, F_g behind R-FAM"
    for branch, width in (("local", 64), ("global", 64)):
        alone = network(branch=branch)
        assert list(alone.branches) == [branch] and alone.segment(image)[1].shape[1] == width


def test_who_learns_from_what():
    """Shared: both losses reach the backbone. Not shared: each its own. The CAM carries no gradient."""
    image = torch.randn(2, 3, 48, 48)

    def touched(part, loss):
        part.zero_grad()
        loss.backward(retain_graph=True)
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())

    for shared in (True, False):
        net = network(shared_backbone=shared).train()
        y, cam, scores, _ = net(image, (0.5, 1.0))
        assert not cam.requires_grad and cam.shape == (2, 8, 48, 48)
        backbone = net.classification.backbone
        assert touched(backbone, y.sum()) and touched(backbone, scores.square().sum()) == shared
        assert shared or touched(net.own_backbone, scores.square().sum())
        assert shared or not touched(net.own_backbone, y.sum())


# ---------------------------------------------------------------- equals: losses, Eqs. (2.14)–(2.26)


def test_eq2_14_as_printed():
    torch.manual_seed(0)
    y_hat, y = torch.randn(3, 5), (torch.rand(3, 5) < 0.4).float()
    total = 0
    for b, c in np.ndindex(3, 5):
        p = 1 / (1 + math.exp(-y_hat[b, c]))
        total -= (y[b, c] * math.log(p) + (1 - y[b, c]) * math.log(1 - p)) / 5
    assert close(rrm.eq2_14_classification(y_hat, y), total / 3)


def test_eq2_15():
    assert rrm.eq2_15_joint(1.0, 2.0, 4.0, 0.5) == 6.0


def test_eq2_16_foreground_and_background_apart():
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 5, 6)
    label = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 3, 255], (2, 5, 6)))
    P, sets = scores.softmax(1), {True: [], False: []}
    for b, i, j in np.ndindex(2, 5, 6):
        c = label[b, i, j].item()
        if c != 255: sets[c > 0].append(-math.log(P[b, c, i, j]))
    expected = sum(sum(values) / len(values) for values in sets.values())
    assert close(rrm.eq2_16_cross_entropy(scores, label), expected)
    for value in (0, 2, 255):
        loss = rrm.eq2_16_cross_entropy(scores, torch.full_like(label, value))
        assert torch.isfinite(loss) and (loss == 0) == (value == 255)


def test_eq2_17_to_2_21_by_a_double_loop(monkeypatch):
    """The sum over all pairs with the exact kernel, i = j included, the soft filter and 1/W = pairs/N²."""
    torch.manual_seed(0)
    monkeypatch.setattr(rrm, "dense_energy", lambda *a: dense_energy(*a, exact=True))
    scores, rgb = 2 * torch.randn(2, 3, 6, 6), 60 * torch.rand(2, 3, 6, 6)
    label = torch.from_numpy(np.random.default_rng(1).choice([0, 2, 255], (2, 6, 6)))
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[1, 4:] = False
    loss = rrm.eq2_17_20_dense_energy(scores, 1, label, rgb, valid, 5.0, 20.0, 67.0, 1.0)
    P, total = scores.softmax(1).double(), 0
    for b in range(2):
        cells = [cell for cell in np.ndindex(6, 6) if valid[b][cell]]
        for i, j in itertools.product(cells, cells):
            xy = (i[0] - j[0])**2 + (i[1] - j[1])**2
            colour = (rgb[b, :, i[0], i[1]] - rgb[b, :, j[0], j[1]]).square().sum().item()
            G = math.exp(-xy / (2 * 5.0**2) - colour / (2 * 20.0**2))
            S = 1 - P[b, :, i[0], i[1]].max() if label[b][i] != 255 else 1
            total += S * G * sum(P[b, c, i[0], i[1]] * (1 - P[b, c, j[0], j[1]]) for c in range(3))
    assert close(loss, 67 / 36**2 * total / 2)


def test_eq2_19_is_the_sum_over_pairs_of_different_classes():
    a, b = torch.rand(4).softmax(0), torch.rand(4).softmax(0)
    assert close(sum(a[m] * b[n] for m in range(4) for n in range(4) if m != n), (a * (1 - b)).sum())


def test_the_energys_weight_is_the_authors_at_the_papers_crop():
    assert abs(rrm.Args().energy_pairs / (161 * 161)**2 - 1e-7) < 1e-9
    assert round(rrm.Args().joint_crop * rrm.Args().energy_scale) in (160, 161)


def test_the_energys_gradient_is_that_of_a_constant_filter():
    """Energy at half resolution: finite, with a gradient, none through the soft filter."""
    scores = torch.randn(1, 3, 6, 6, requires_grad=True)
    label, valid = torch.zeros(1, 24, 24, dtype=torch.long), torch.ones(1, 24, 24, dtype=torch.bool)
    rgb = 255 * torch.rand(1, 3, 24, 24)
    rrm.eq2_17_20_dense_energy(scores, 4, label, rgb, valid, 10.0, 30.0, 67.0, 0.5).backward()
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().sum() > 0
    P = scores.softmax(1)
    assert not rrm.eq2_21_soft_filter(P, label[:, :6, :6] == 0).requires_grad


def bcd(F_m, M_p):
    """Eq. (2.26) cell by cell."""
    cells = {}
    for b, i, j in np.ndindex(*M_p.shape):
        c = M_p[b, i, j].item()
        if c != 255: cells.setdefault(c or ("background", b), []).append(F_m[b, :, i, j])
    centres = {g: torch.stack(f).mean(0) for g, f in cells.items()}
    cos = lambda a, b: F.cosine_similarity(a, b, dim=0)  # noqa: E731
    fg, bg = [g for g in cells if isinstance(g, int)], [g for g in cells if not isinstance(g, int)]
    terms = [[1 + cos(centres[a], centres[b]) for a in fg for b in fg if a != b],
             [1 + cos(centres[a], centres[b]) for a in fg for b in bg],
             [1 - cos(f, centres[g]) for g in fg for f in cells[g]],
             [1 - cos(f, centres[g]) for g in bg for f in cells[g]]]
    return sum(sum(term) / len(term) for term in terms if term)


MASKS = {"all": [0, 1, 3, 4, 255], "no background": [1, 2], "background": [0], "one class": [0, 2],
         "padding": [255]}


@pytest.mark.parametrize("values", MASKS.values(), ids=MASKS)
def test_eq2_22_to_2_26(values):
    torch.manual_seed(0)
    F_m = rrm.eq2_22_feature([torch.randn(3, 4, 4, 5), torch.randn(3, 3, 4, 5)]).requires_grad_()
    M_p = torch.from_numpy(np.random.default_rng(0).choice(values, (3, 4, 5)))
    M_p[2][M_p[2] == 0] = values[-1]                                # an image without background
    loss = rrm.eq2_26_bcd(F_m, M_p, 4)
    assert close(loss.detach(), torch.as_tensor(bcd(F_m.detach(), M_p), dtype=torch.float32))
    loss.backward()
    assert torch.isfinite(F_m.grad).all()


def test_eq2_23_and_padding():
    scores = torch.randn(1, 3, 4, 4)
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    valid[:, :, 8:] = False
    M_p = rrm.eq2_23_mask(scores, valid)
    assert (M_p[:, :, 2:] == 255).all() and (M_p[:, :, :2] == scores.argmax(1)[:, :, :2]).all()


def test_eq2_26_pulls_and_pushes():
    """Descending the loss: features of one class come together, classes and backgrounds part."""
    torch.manual_seed(0)
    F_m, M_p = torch.randn(2, 6, 4, 4, requires_grad=True), torch.arange(32).view(2, 4, 4) % 3
    optim, losses = torch.optim.SGD([F_m], lr=5.0), []
    for _ in range(60):
        losses.append(rrm.eq2_26_bcd(F_m, M_p, 2))
        optim.zero_grad()
        losses[-1].backward()
        optim.step()
    assert losses[-1] < losses[0] / 2


def test_bf16_features_give_float32_labels_and_losses():
    batch, net = batch_of(2), network().train()
    with torch.autocast("cpu", torch.bfloat16):
        y, cam, scores, F_m = net(batch.image, (0.5, 1.0))
    assert {t.dtype for t in (y, cam, scores, F_m)} == {torch.float32}
    rgb, valid = rrm.to_rgb(batch.image), batch.pseudo != 255
    label = rrm.mine(rgb, cam, batch.tags, valid, **OPTIONS)
    losses = rrm.joint_losses(arguments(), scores, F_m, label, rgb, valid, 8)
    sum(losses).backward()
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses)


def test_after_a_classifier_batch_norm_is_kept():
    for init, frozen in (("classifier", True), ("joint", False)):
        net = network(init=init).train()
        before = [b.clone() for b in net.buffers()]
        net(torch.randn(2, 3, 40, 40), (0.5, 1.0))
        assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True)) == frozen
        norms = net.classification.backbone.norms()
        assert all(p.requires_grad for norm in norms for p in norm.parameters()) != frozen


def test_learning_rates_of_joint_training():
    net = network(init="joint")
    rates = {g["lr"]: len(g["params"]) for g in rrm.group_rates(net, [net.classification.classifier], 1.0, 0)}
    assert rates[10.0] == 1 and set(rates) == {1.0, 2.0, 10.0}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_other_backbones(name):
    net = network(backbone=name, stride=8).eval()
    y, cam, scores, _ = net(torch.randn(1, 3, 64, 64), (1.0,))
    assert y.shape == (1, 8) and cam.shape == (1, 8, 64, 64) and scores.shape == (1, 9, 8, 8)


def test_dilations_are_2_and_4_at_stride_8():
    net = make_backbone("resnet50", "none", 8)
    dilations = [{m.dilation[0] for m in block.modules() if isinstance(m, torch.nn.Conv2d)}
                 for block in net.blocks]
    assert [max(d) for d in dilations] == [1, 1, 2, 4] and net.strides[-1] == 8


# ---------------------------------------------------------------- learns


def train_a_little(args, steps=14, n=4):
    """Joint training on labels as the mining would give them: some true pixels of n scenes."""
    net, batch = network(init="joint").train(), batch_of(n)
    rng = torch.Generator().manual_seed(0)
    spots = F.max_pool2d((torch.rand(n, 1, 96, 96, generator=rng) < 0.002).float(), 9, 1, 4)[:, 0] > 0
    label = torch.where(spots & (batch.mask != 255), batch.mask, 255)
    optim = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    rgb, valid, history = rrm.to_rgb(batch.image), batch.pseudo != 255, []
    for _ in range(steps):
        y, _, scores, F_m = net(batch.image, ())
        losses = rrm.joint_losses(args, scores, F_m, label, rgb, valid, 8)
        loss = rrm.eq2_14_classification(y, batch.tags) + rrm.eq2_15_joint(*losses, args.w_energy)
        optim.zero_grad()
        loss.backward()
        optim.step()
        history.append([v.item() for v in losses])
    full = rrm.eq2_17_20_dense_energy(scores, args.stride, label, rgb, valid, args.energy_xy, args.energy_rgb,
                                      67.0, 0.5)
    return np.array(history), full.item()


def test_the_losses_fall_and_the_energy_does_only_with_its_loss():
    joint, energy = train_a_little(arguments())
    assert (joint[-3:].mean(0) < joint[:3].mean(0) * 0.8).all(), joint
    alone, energy_alone = train_a_little(arguments(energy_loss=False, bcd_loss=False))
    assert (alone[:, 1:] == 0).all() and alone[-1, 0] < alone[0, 0] / 1.5
    assert energy < energy_alone, (energy, energy_alone)


# ---------------------------------------------------------------- runs

TINY = """rrm.py --preset shapes --workers 0 --device cpu --cam-steps 4 --cam-batch 2 --cam-crop 48
    --cam-resize 48 64 --cam-scales 0.5 1 --joint-steps 6 --joint-batch 2 --joint-crop 48 --local-width 8
    --attention-width 8 --seg-steps 4 --seg-batch 2 --seg-crop 48 --seg-scales 1 --save-every 2
    --log-every 1""".split()
STAGES = ["cam", "seed", "pseudo", "val", "val_crf", "val_two_step", "val_two_step_crf"]
FOLDERS = ["seeds", "pseudo_raw", "pseudo", "val", "val_crf", "val_two_step", "val_two_step_crf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five train and five val scenes as files."""
    made = tmp_path_factory.mktemp("workpiece")
    export("shapes", "workpiece", str(made), n=5)
    return made


def command(folder, out, *more):
    return [*TINY, "--data", "workpiece", "--root", folder, "--out", out, *more]


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        rrm.main()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run with both steps from beginning to end."""
    out = tmp_path_factory.mktemp("finished")
    sh(*command(folder, out, "--two-step"))
    return out


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    """The numbers of results.json without times and memory."""
    moving = ("seconds", "peak_memory_mb", "seconds_a_step")
    return [{k: v for k, v in s.items() if k not in moving} for s in stages(out)]


def contents(out, *parts):
    files = [f for part in parts for f in sorted((out / part).rglob("*")) if f.is_file()]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_runs_both_steps(finished, folder):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 5 and s["uses_masks"] and 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        assert s["split"] == ("val" if s["stage"].startswith("val") else "train") and s["seconds"] >= 0
    assert [s["stage"] for s in entries if s["crf"]] == ["seed", "pseudo", "val_crf", "val_two_step_crf"]
    assert entries[3]["seconds_a_step"] > 0 and "coverage" in entries[1] and "miou_no_crf" in entries[2]
    tags = json.loads((folder / "train" / "tags.json").read_text())
    classes = (folder / "classes.txt").read_text().split()
    for place in FOLDERS:
        files = sorted((finished / place).glob("*.png"))
        assert len(files) == 5
        for file in files:
            with Image.open(file) as image: values = set(np.unique(np.asarray(image)))
            assert values <= {*range(9)} | ({255} if place == "seeds" else set())
            if place in ("seeds", "pseudo_raw", "pseudo"):
                assert values <= {0, 255, *(classes.index(c) + 1 for c in tags[file.stem])}
    for name in ("train", "val"): assert (finished / "panels" / f"{name}.png").exists()
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in lines} == {"classifier", "joint", "segmenter"}
    assert all(np.isfinite(list(entry.values())[1:]).all() for entry in lines)
    assert all(e["loss_energy"] > 0 and e["loss_bcd"] > 0 for e in lines if e["stage"] == "joint")


def test_the_same_command_again_does_nothing(finished, folder):
    before = contents(finished, *FOLDERS, "cam")
    times = {f: f.stat().st_mtime_ns for f in finished.rglob("*.p[nt]*")}
    numbers = scores(finished)
    run_here(*command(folder, finished, "--two-step"))
    assert contents(finished, *FOLDERS, "cam") == before and scores(finished) == numbers
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def test_runs_on_full_masks(folder, tmp_path):
    flags = "--supervision full --two-step --joint-steps 2 --seg-steps 2".split()
    run_here(*command(folder, tmp_path, *flags))
    assert [s["stage"] for s in stages(tmp_path)] == STAGES[3:]
    assert not any((tmp_path / name).exists() for name in ("cam", "seeds", "pseudo"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(e["loss_energy"] == e["loss_bcd"] == 0 for e in lines if e["stage"] == "joint")


def test_predicts_with_both_networks(finished, folder, tmp_path):
    pictures = folder / "val" / "images"
    for checkpoint, place in (("joint.pt", "val_crf"), ("segmenter.pt", "val_two_step_crf")):
        run_here("rrm.py", "--predict", pictures, "--checkpoint", finished / checkpoint, "--out",
                 tmp_path / place, "--workers", 0, "--device", "cpu")
        for file in pictures.iterdir():
            label = read_label(tmp_path / place / "predict" / file.name, 8, read_image(file))
            assert (label == read_label(finished / place / file.name)).all(), "the run's own prediction"
        assert len(list((tmp_path / place / "predict").glob("*_overlay.png"))) == 5


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--ratio", "0"], "ratio"), (["--ratio", "1.5"], "ratio")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(SystemExit, match=words): run_here(*command(folder, tmp_path, *more))


def test_a_checkpoint_of_another_stage_is_refused(finished, folder):
    with pytest.raises(SystemExit, match="joint.pt"):
        run_here("rrm.py", "--predict", folder / "val" / "images", "--checkpoint", finished / "classifier.pt")


ABLATIONS = {
    "authors' mining": "--gamma-high 32 --bg-min 0.8 --crf-min 0.8 --reweight none",
    "local, plain CAM": "--branch local --no-mining-crf --no-confident --no-energy-loss --no-bcd-loss",
    "global, own backbone": "--branch global --reweight literal --no-shared-backbone --heads-x10",
    "from the beginning": "--init joint --warmup 1 --crf none --bg-min 0 --ratio 1"}


@pytest.mark.parametrize("flags", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations(finished, folder, tmp_path, flags):
    """Tables 2.1 to 2.5; the classifier comes from the finished run."""
    run_here(*command(folder, tmp_path, "--reuse", finished, "--joint-steps", 2, *flags.split()))
    assert [s["stage"] for s in stages(tmp_path)] == ["cam", "seed", "val", "val_crf"]
    if "--init" in flags: assert not (tmp_path / "classifier.pt").exists()
    else: assert contents(tmp_path, "classifier.pt") == contents(finished, "classifier.pt")


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    """kill -9 in joint training; then the same command again."""
    line = command(folder, tmp_path, "--two-step")
    kill_when(lambda: (tmp_path / "joint.pt").exists(), *line)
    assert torch.load(tmp_path / "joint.pt", weights_only=True)["step"] < 6
    sh(*line)
    assert scores(tmp_path) == scores(finished)
    assert contents(tmp_path, *FOLDERS) == contents(finished, *FOLDERS)


def test_pseudo_masks_are_shared_only_between_runs_that_agree():
    mine, fields = arguments(), [name for names in rrm.FIELDS.values() for name in names]
    known = {f.name for f in dataclasses.fields(mine)}
    assert set(fields) <= known and len(fields) == len(set(fields))
    free = set("""preset out reuse fresh device workers predict checkpoint log_every save_every two_step
        seg_scales seg_crf""".split())
    assert known - set(fields) == free, "each field belongs to a stage, or can not change one"


def test_training_samples_carry_no_mask():
    args = types.SimpleNamespace(data="shapes", root="", train_list="train", supervision="image")
    draws = Draws(load(args, "train"), rrm.joint_augment(arguments()), 0)
    sample = draws[0]
    assert set(vars(sample)) == {"name", "image", "tags", "pseudo"}
    assert set(sample.pseudo.unique().tolist()) <= {0, 255}
