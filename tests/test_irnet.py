"""irnet.py: each equation against an authority, the script on a few scenes, and what the method gains."""

import itertools
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

import common
import irnet
from common import CRF, ConfusionMatrix, Run, dense_crf, make_backbone, save_label
from conftest import kill_when, sh
from data import export, load, read_image, read_label

torch.set_num_threads(1)


def shapes(n, split="train"):
    """The first n scenes of shapes, with everything known about them."""
    args = types.SimpleNamespace(data="shapes", root="", train_list="train", supervision="image")
    truth = load(args, split, masks=True)
    return [truth[i] for i in range(n)]


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def label_map(text):
    """Rows of digits, `.` = 255 -> (H,W) uint8."""
    return np.array([[255 if c == "." else int(c) for c in row] for row in text.split()], np.uint8)


def mask_of(text):
    return label_map(text) == 1


def random_irnet(seed=0, name="tiny", stride=8):
    torch.manual_seed(seed)
    return irnet.IRNet(irnet.without_dilation(make_backbone(name, "none", stride))).eval()


# ---------------------------------------------------------------- equals: CAM and relations, Eqs. (1)–(4)


def test_eq1():
    scores = torch.tensor([[[-1.0, 2.0], [4.0, 1.0]], [[-3.0, -1.0], [-2.0, -5.0]]])
    assert close(irnet.eq1_cam(scores), [[[0, 0.5], [1, 0.25]], [[0, 0], [0, 0]]])


def test_tag_logits_are_the_mean_of_the_scores():
    torch.manual_seed(0)
    net = irnet.CamNet(make_backbone("tiny", "none", 8), 3, cut=False).eval()
    x = torch.randn(2, 3, 40, 48)
    feature = net.backbone(x)[-1].mean((2, 3))                       # global average pooling, then φ
    assert close(net(x), feature @ net.phi.weight[:, :, 0, 0].T)
    assert net.scores(x).shape == (2, 3, 5, 6)


def test_the_cut_classifier_learns_its_upper_blocks_only():
    net = irnet.CamNet(make_backbone("resnet18", "none", 16), 3, cut=True)
    net(torch.randn(1, 3, 32, 32)).sum().backward()
    learns = [any(p.grad is not None for p in block.parameters()) for block in net.backbone.blocks]
    assert learns == [False, False, True, True] and net.phi.weight.grad is not None


def test_the_last_stride_becomes_one_without_dilation():
    net = irnet.without_dilation(make_backbone("resnet50", "none", 16))
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.dilation == (1, 1) and m.padding[0] == m.kernel_size[0] // 2 for m in convs)
    assert [t.shape[-1] for t in net(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 4]
    assert net.blocks[3][0].conv2.stride == net.blocks[3][0].downsample[0].stride == (1, 1)


def test_cam_of_an_image():
    """Absent classes are zero, each present one's peak is 1, and a mirror image has the mirrored CAM."""
    torch.manual_seed(1)
    net = irnet.CamNet(make_backbone("tiny", "none", 8), 4, cut=False).eval()
    image = np.random.default_rng(0).integers(0, 256, (33, 49, 3), dtype=np.uint8)  # cells mirror onto cells
    tags = np.array([True, False, True, False])
    cam = irnet.cam_of_image(net, image, tags, (1.0,), 8, torch.device("cpu"))
    assert cam.shape == (4, 33, 49) and not cam[~tags].any() and close(cam[tags].max((1, 2)), [1.0, 1.0])
    other = irnet.cam_of_image(net, image[:, ::-1].copy(), tags, (1.0,), 8, torch.device("cpu"))
    assert close(other[:, :, ::-1].copy(), cam, atol=1e-3)
    x = irnet.normalise(irnet.Sample(image=image)).image[None]
    total = (F.relu(net.scores(x)) + F.relu(net.scores(x.flip(-1))).flip(-1))[0, 0]
    assert close(cam[0, ::8, ::8], total / irnet.cells_to_pixels(total[None, None], 8, (33, 49)).max(), 1e-3)


def test_confident_areas_by_hand():
    """Scores above 0.3 are foreground, below 0.05 background, between them unknown; here without a CRF."""
    cam = np.float32([[[0.9, 0.2, 0.02, 0.31]], [[0.1, 0.25, 0.04, 0.8]]])
    maps = irnet.confident_maps(cam, 0.3, 0.05, 0.7)
    assert maps.shape == (2, 3, 1, 4) and close(maps.sum(1), np.ones((2, 1, 4))) and close(maps.max(), 0.7)
    refined = dense_crf([np.zeros((1, 4, 3), np.uint8)], [maps], CRF(3, 3, 50, 5, 10, 10), "none")[0]
    assert (irnet.relations_of(refined, np.array([1, 6])) == [[2, 255, 0, 7]]).all()


def test_images_without_confident_pixels_or_tags():
    unsure = irnet.confident_maps(np.full((1, 4, 5), 0.1, np.float32), 0.3, 0.05, 0.7)
    assert (irnet.relations_of(unsure, np.array([2])) == 255).all()
    empty = irnet.confident_maps(np.zeros((0, 4, 5), np.float32), 0.3, 0.05, 0.7)
    assert (irnet.relations_of(empty, np.array([], int)) == 0).all()


def listed_pairs(h, w, offsets):
    """The pairs behind the columns of eq3_4_pair_sets, in its order: [(cell, cell), …]"""
    index = torch.arange(h * w).view(1, h, w)
    ends = [(a.flatten().tolist(), b.flatten().tolist())
            for a, b in (irnet.shifted(index, *o) for o in offsets)]
    return [(divmod(i, w), divmod(j, w)) for a, b in ends for i, j in zip(a, b, strict=True)]


@pytest.mark.parametrize("radius, h, w", [(2, 5, 4), (3, 6, 7), (5, 6, 7), (10, 4, 9), (5, 1, 6)])
def test_eq2_each_pair_once(radius, h, w):
    pairs = listed_pairs(h, w, irnet.eq2_offsets(radius, h, w))
    cells = list(np.ndindex(h, w))
    near = {frozenset((i, j)) for i, j in itertools.combinations(cells, 2)
            if (i[0] - j[0])**2 + (i[1] - j[1])**2 < radius**2}
    assert len(pairs) == len(set(map(frozenset, pairs))) and set(map(frozenset, pairs)) == near


def test_eq3_and_4():
    M = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 255], (2, 5, 6))).long()
    offsets = irnet.eq2_offsets(3, 5, 6)
    sets = irnet.eq3_4_pair_sets(M, offsets)
    for b, (column, (i, j)) in itertools.product(range(2), enumerate(listed_pairs(5, 6, offsets))):
        m, n = M[b][i].item(), M[b][j].item()
        known = 255 not in (m, n)
        expected = (known and m == n > 0, known and m == n == 0, known and m != n)
        assert tuple(s[b, column].item() for s in sets) == expected
    assert all(s.any() for s in sets)


# ---------------------------------------------------------------- equals: losses, Eqs. (5)–(8)


def test_eq5_and_6():
    rng, offsets = np.random.default_rng(1), irnet.eq2_offsets(3, 5, 6)
    D = torch.from_numpy(rng.normal(0, 3, (2, 2, 5, 6))).float()
    delta, apart = irnet.pair_differences(D, offsets)
    pairs = listed_pairs(5, 6, offsets)
    some = torch.from_numpy(rng.random((2, len(pairs))) < 0.3)
    fg, bg = [], []
    for b, (column, (i, j)) in itertools.product(range(2), enumerate(pairs)):
        if not some[b, column]: continue
        difference = (D[b, :, i[0], i[1]] - D[b, :, j[0], j[1]]).numpy()
        fg.append(np.abs(difference - (np.array(j) - i)).sum())
        bg.append(np.abs(difference).sum())
    assert close(irnet.eq5_displacement_fg(delta, apart, some), np.mean(fg))
    assert close(irnet.eq6_displacement_bg(delta, some), np.mean(bg))


def test_weight_of_eq6_is_one_unless_a_preset_lets_it_grow():
    assert irnet.Args().irn_ramp == 0
    assert [irnet.ramp_weight(step, 100, 0.0) for step in (0, 50, 99)] == [1, 1, 1]
    assert [irnet.ramp_weight(step, 100, 0.5) for step in (0, 25, 50, 99)] == [0, 0.5, 1, 1]


def test_eq5_is_zero_for_true_displacements_to_a_centroid():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    D, offsets = torch.stack([2.5 - y, 4 - x])[None], irnet.eq2_offsets(4, 6, 7)
    delta, apart = irnet.pair_differences(D, offsets)
    every = torch.ones(delta[:, 0].shape, dtype=torch.bool)
    assert irnet.eq5_displacement_fg(delta, apart, every) < 1e-6 < irnet.eq6_displacement_bg(delta, every)


def on_path(i, j):
    """Π_ij: cells of the pair's bounding rectangle nearer than 1 to the line, by the point's projection."""
    i, j, found = np.array(i, float), np.array(j, float), []
    for y in range(int(min(i[0], j[0])), int(max(i[0], j[0])) + 1):
        for x in range(int(min(i[1], j[1])), int(max(i[1], j[1])) + 1):
            p = np.array([y, x])
            foot = i + (j - i) * np.dot(p - i, j - i) / np.dot(j - i, j - i)
            if np.linalg.norm(p - foot) < 1 - 1e-9: found.append((y, x))
    return found


def test_paths_by_hand():
    assert irnet.path_cells(0, 3) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert irnet.path_cells(0, -2) == [(0, -2), (0, -1), (0, 0)]
    diagonal = set(irnet.path_cells(3, 3))                           # three wide
    assert diagonal == {(y, x) for y in range(4) for x in range(4) if abs(y - x) <= 1}


def test_eq7():
    B, offsets = torch.rand(2, 7, 8, generator=torch.Generator().manual_seed(0)), irnet.eq2_offsets(5, 7, 8)
    a = irnet.eq7_affinity(B, offsets)
    for column, (i, j) in enumerate(listed_pairs(7, 8, offsets)):
        for b in range(2):
            assert close(a[b, column], 1 - max(B[b][cell].item() for cell in on_path(i, j)))


def test_gradient_of_eq7():
    torch.manual_seed(0)
    B, offsets = torch.rand(1, 4, 5, dtype=torch.float64, requires_grad=True), irnet.eq2_offsets(3, 4, 5)
    assert torch.autograd.gradcheck(lambda B: irnet.eq7_affinity(B, offsets), (B,))


def test_eq8():
    rng = np.random.default_rng(3)
    a, which = rng.uniform(0.05, 0.95, (2, 40)), rng.integers(0, 4, (2, 40))
    sets = [torch.from_numpy(which == k) for k in range(3)]
    mean = [np.mean(-np.log(a[which == k])) for k in range(2)] + [np.mean(-np.log(1 - a[which == 2]))]
    loss = irnet.eq8_boundary(torch.from_numpy(a), *sets)
    assert close(loss, mean[0] / 2 + mean[1] / 2 + mean[2], atol=1e-3)


@pytest.mark.parametrize("edge", [-40.0, 40.0])
def test_losses_without_pairs_or_at_saturation_are_finite(edge):
    logits = torch.full((1, 4, 5), edge, requires_grad=True)
    D, offsets = torch.zeros(1, 2, 4, 5, requires_grad=True), irnet.eq2_offsets(3, 4, 5)
    a, (delta, apart) = irnet.eq7_affinity(logits.sigmoid(), offsets), irnet.pair_differences(D, offsets)
    for M in (torch.full((1, 4, 5), 255), torch.arange(20).view(1, 4, 5) % 2, torch.zeros(1, 4, 5)):
        fg, bg, differ = irnet.eq3_4_pair_sets(M, offsets)
        loss = irnet.eq8_boundary(a, fg, bg, differ)
        loss = loss + irnet.eq5_displacement_fg(delta, apart, fg) + irnet.eq6_displacement_bg(delta, bg)
        grads = torch.autograd.grad(loss, (logits, D), retain_graph=True)
        assert all(torch.isfinite(t).all() for t in (loss, *grads))
        assert (loss == 0) == bool((M == 255).all())


# ---------------------------------------------------------------- equals: the network (§4.1)


@pytest.mark.parametrize("name, stride, grid", [("tiny", 8, 2), ("resnet50", 16, 4), ("mobilenet_v2", 16, 4)])
def test_both_branches_lie_on_the_grid(name, stride, grid):
    net = random_irnet(0, name, stride).train()
    edge, D = net(torch.randn(2, 3, 64, 48))
    assert net.stride == grid and edge.shape == (2, 64 // grid, 48 // grid)
    assert D.shape == (2, 2, *edge.shape[1:])
    (edge.sum() + D.sum()).backward()
    branches = net.boundary_branch, net.displacement_branch
    learning = {id(p) for branch in branches for p in branch.parameters()}
    for p in net.parameters(): assert (p.grad is not None) == (id(p) in learning)


def test_layers_as_in_the_paper():
    """Five levels; 32 channels each for boundaries; 64/128/256/256/256, 256, and three layers to decode."""
    net = random_irnet(0, "resnet50", 16)
    widths = [64, 256, 512, 1024, 2048]
    for branch in (net.edge, net.field): assert [layer[0].in_channels for layer in branch] == widths
    assert [layer[0].out_channels for layer in net.edge] == [32] * 5
    assert [layer[0].out_channels for layer in net.field] == [64, 128, 256, 256, 256]
    convs = [m for m in net.decode.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convs] == [256, 256, 2] and convs[0].in_channels == 448
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in net.modules())
    assert norms == 5 + 5 + 1 + 2, "all convolutions except the last of each branch"
    levels = irnet.five_levels(net.backbone, torch.zeros(1, 3, 64, 64))
    assert [level.shape[-1] for level in levels] == [16, 16, 8, 4, 4]
    assert all(close(a, b) for a, b in zip(levels[1:], net.backbone(torch.zeros(1, 3, 64, 64)), strict=True))


@pytest.mark.parametrize("size", [(33, 47), (64, 64)])
def test_fields_of_any_size(size):
    """Each 2 x 2 pixels a cell; boundaries of the mirror image are the mirrored ones where cells match."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    net = random_irnet()
    D, B = irnet.fields_of(net, image, 45, torch.device("cpu"))
    assert D.shape == (2, -(-size[0] // 2), -(-size[1] // 2)) and B.shape == D.shape[1:]
    assert ((B > 0) & (B < 1)).all()
    x = irnet.normalise(irnet.Sample(image=image)).image[None]
    pad = [-(-max(45, n) // 8) * 8 - n for n in size]
    edge, field = net(F.pad(x, (0, pad[1], 0, pad[0])))
    assert close(D, field[0, :, :D.shape[1], :D.shape[2]], 1e-4)
    if size[1] % 2:
        other = net(F.pad(x.flip(-1), (0, pad[1], 0, pad[0])))[0][0, :B.shape[0], :B.shape[1]].flip(-1)
        assert close(B, ((edge[0, :B.shape[0], :B.shape[1]] + other) / 2).sigmoid(), 1e-4)


# ---------------------------------------------------------------- equals: label synthesis, Eqs. (10)–(15)


def test_eq10_against_a_loop():
    D = np.random.default_rng(0).normal(0, 12, (2, 9, 11)).astype(np.float32)
    D = ndimage.gaussian_filter(D, (0, 2, 2))
    refined = irnet.eq10_refine(torch.tensor(D), 7).numpy()
    for y, x in np.ndindex(9, 11):
        p = np.clip(np.array([y, x]) + D[:, y, x], 0, [8, 10])
        for _ in range(7):
            step = [ndimage.map_coordinates(channel, p[:, None], order=1, mode="nearest") for channel in D]
            p = np.clip(p + np.ravel(step), 0, [8, 10])
        assert np.allclose(refined[:, y, x], p - [y, x], atol=1e-3)
    assert close(irnet.eq10_refine(torch.zeros(2, 1, 5), 3), torch.zeros(2, 1, 5))


def two_fields():
    """Displacements of 12 x 24 cells that point a third of the way to one of two centroids."""
    place = np.indices((12, 24)).astype(np.float32)
    right = place[1] >= 12
    D = np.stack([5 - place[0], np.where(right, 18, 5) - place[1]]) / 3
    return D.astype(np.float32), right


def test_eq14_and_15_find_both_instances():
    D, right = two_fields()
    centroids = irnet.eq14_centroids(3 * D, 2.5)
    assert centroids.max() == 2 and ((centroids > 0) == (np.linalg.norm(3 * D, axis=0) < 2.5)).all()
    refined = irnet.eq10_refine(torch.tensor(D), 30).numpy()
    assert np.abs(refined - 3 * D).max() < 0.5, "refinement completes displacements that are too short"
    I = irnet.eq15_instance_map(refined, centroids)
    assert (I == np.where(right, centroids[5, 18], centroids[5, 5])).all()
    assert irnet.eq14_centroids(np.zeros((2, 3, 3)), 2.5).max() == 1
    corner = np.zeros((2, 3, 3))
    corner[0, 1] = 9                                                 # the middle row parts the two others
    assert irnet.eq14_centroids(corner, 2.5).max() == 2


def test_eq15_points_that_end_nowhere():
    centroids = np.array([[0, 1], [0, 0]])
    refined = np.zeros((2, 2, 2))
    refined[1, 0, 0] = 0.9                                           # ends beside the centroid's middle
    assert (irnet.eq15_instance_map(refined, centroids) == [[1, 1], [0, 0]]).all()


def test_eq11():
    rng = np.random.default_rng(0)
    M, I = rng.random((2, 4, 5)), rng.integers(0, 4, (4, 5))
    M[1][I == 2] = 0
    cams, owner = irnet.eq11_instance_cams(M, I)
    expected = [(c, np.where(I == k, M[c], 0)) for c in range(2) for k in range(1, 4) if (c, k) != (1, 2)]
    assert owner.tolist() == [c for c, _ in expected] and close(cams, np.array([m for _, m in expected]))
    none = irnet.eq11_instance_cams(M, np.zeros((4, 5), int))
    assert none[0].shape == (0, 4, 5) and len(none[1]) == 0


def dense_transitions(B, radius, beta):
    """Eq. (12) over all pairs of cells: T (N,N)."""
    h, w = B.shape
    cells, A = list(np.ndindex(h, w)), np.eye(h * w)
    for (m, i), (n, j) in itertools.combinations(enumerate(cells), 2):
        if (i[0] - j[0])**2 + (i[1] - j[1])**2 < radius**2:
            A[m, n] = A[n, m] = (1 - max(B[cell] for cell in on_path(i, j))) ** beta
    return A / A.sum(1, keepdims=True)


@pytest.mark.parametrize("h, w, radius", [(9, 12, 5), (3, 12, 5), (1, 1, 5), (8, 7, 3)])
def test_eq12_and_rows_sum_to_one_at_every_border(h, w, radius):
    B = np.random.default_rng(0).random((h, w)) * 0.5
    index, weight = irnet.eq12_transitions(torch.tensor(B), radius, 10.0)
    T = torch.zeros(h * w, h * w, dtype=weight.dtype).scatter_add_(1, index.long(), weight)
    assert close(T, dense_transitions(B, radius, 10), 1e-6)
    assert close(weight.sum(1), np.ones(h * w), 1e-6) and (weight >= 0).all()


def walk_case(h, w, maps, seed):
    rng = np.random.default_rng(seed)
    B = ndimage.gaussian_filter(rng.random((h, w)), 1)
    B = (B - B.min()) / (B.max() - B.min())
    return torch.tensor(rng.random((maps, h, w)) * (1 - B)).float(), torch.tensor(B).float()


def test_eq13_is_the_matrix_power():
    """256 sparse products against the 256th power of the dense matrix."""
    maps, B = walk_case(14, 17, 3, 0)
    walked, = irnet.eq13_random_walk([maps], [irnet.eq12_transitions(B, 5, 10.0)], 256)
    T = np.linalg.matrix_power(dense_transitions(B.double().numpy(), 5, 10), 256)
    expected = (T @ maps.flatten(1).double().numpy().T).T.reshape(3, 14, 17)
    assert np.abs(walked.numpy() - expected).max() < 1e-4
    assert np.abs(walked.numpy() - maps.numpy()).max() > 0.1, "and something moved"


def test_walks_of_several_images_are_those_of_each():
    cases = [walk_case(*case) for case in ((9, 7, 2, 0), (3, 12, 5, 1), (12, 12, 0, 2))]
    transitions = [irnet.eq12_transitions(B, 5, 10.0) for _, B in cases]
    together = irnet.eq13_random_walk([maps for maps, _ in cases], transitions, 20)
    for (maps, _), own, walked in zip(cases, transitions, together, strict=True):
        assert walked.shape == maps.shape
        assert close(walked, irnet.eq13_random_walk([maps], [own], 20)[0], 1e-6)


def test_a_wall_stops_the_walk():
    B, start = torch.zeros(8, 12), torch.zeros(1, 8, 12)
    B[:, 6], start[:, 3, 2] = 1.0, 1.0
    walked = irnet.eq13_random_walk([start], [irnet.eq12_transitions(B, 5, 10.0)], 256)[0][0]
    assert (walked[:, :6] > 0.01).all() and walked[:, 6:].abs().max() == 0


def test_best_labels():
    scores = np.array([[[1.1, 0.4, 2.0, 0.0]], [[0.5, 0.6, 4.0, 0.9]]])
    label, relative = irnet.best_labels(scores, 0.25)
    assert (label == [[1, 0, 2, 0]]).all() and close(relative, scores / 4)   # background: 0.25 of 4
    assert (irnet.best_labels(np.zeros((0, 2, 3)), 0.25)[0] == np.zeros((2, 3))).all()


def test_instances_are_connected_and_fragments_score_nothing():
    label = label_map("1100200000 1100200000 0010000022")       # 4-connected: the corner is apart
    scores = np.zeros((2, 3, 10))
    scores[0, :2, :2], scores[0, 2, 2], scores[1, 0, 4], scores[1, 2, 9] = 0.5, 0.9, 0.7, 0.6
    scores[0, 1, 1] = 0.8
    masks, classes, best = irnet.instances_of(label, scores, np.array([3, 7]), 0.05)
    assert classes.tolist() == [3, 3, 7, 7] and close(best, np.float32([0.8, 0, 0.7, 0.6]))
    assert [m.sum() for m in masks] == [4, 1, 2, 2] and (masks.any(0) == (label > 0)).all()
    masks, classes, best = irnet.instances_of(np.zeros((3, 4), int), scores[:, :, :4], np.array([1, 2]), 0.01)
    assert masks.shape == (0, 3, 4) and len(classes) == len(best) == 0


def test_touching_instances_need_the_displacement_field():
    """Two touching discs of one class: connected parts see one object, Eqs. (10)–(15) see two."""
    D, right = two_fields()
    cam = np.exp(-(np.linalg.norm(3 * D, axis=0) / 6)**2)[None].astype(np.float32)
    B = np.full((12, 24), 0.01, np.float32)
    maps, owner = irnet.start_of_walk(cam, 3 * D, B, 10, 2.5)
    transitions = irnet.eq12_transitions(torch.tensor(B), 5, 10.0)
    scores = irnet.eq13_random_walk([torch.tensor(maps)], [transitions], 8)[0].numpy()
    assert len(maps) == 3 and owner.tolist() == [0, 0] and close(maps[0], maps[1:].sum(0))
    one = irnet.instances_of(*irnet.best_labels(scores[:1], 0.1), np.array([1]), 0.01)[0]
    two = irnet.instances_of(*irnet.best_labels(scores[1:], 0.1), np.array([1, 1]), 0.01)[0]
    assert len(one) == 1 and len(two) == 2 and all(right[m].mean() in (0, 1) for m in two)


# ---------------------------------------------------------------- equals: instances and their metric


def test_mask_ious():
    a = np.stack([mask_of("1100 1100"), mask_of("0000 0001")])
    b = np.stack([mask_of("0110 0110"), mask_of("1100 1100"), mask_of("0000 0000")])
    assert close(common.mask_ious(a, b), np.float32([[1 / 3, 1, 0], [0, 0, 0]]))
    assert common.mask_ious(a[:0], b).shape == (0, 3) and common.mask_ious(a, b[:0]).shape == (2, 0)


def test_matching_takes_each_object_once():
    ious = np.array([[0.6, 0.55], [0.9, 0.1], [0.2, 0.5], [0.4, 0.3]])
    assert common.match(ious, 0.5).tolist() == [True, False, True, False]
    assert common.match(ious[:, :0], 0.5).tolist() == [False] * 4


def test_average_precision_by_hand():
    """Hits at ranks 1 and 3 of 3 objects: precision 1 up to recall 1/3, 2/3 up to recall 2/3."""
    assert close(common.area_under_curve([0.5, 0.9, 0.7], [True, True, False], 3), (1 + 2 / 3) / 3)
    assert common.area_under_curve([], [], 3) == 0 and common.area_under_curve([0.1], [True], 1) == 1
    assert close(common.area_under_curve([0.9, 0.8, 0.7], [False, True, True], 2), 2 / 3)  # the envelope


def voc_ap(scores, hits, objects):
    """VOC's development kit in other words: the sum over recall steps of the best precision from there on."""
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    points = [(sum(hits[k] for k in order[:n]) / objects, sum(hits[k] for k in order[:n]) / n)
              for n in range(1, len(order) + 1)]
    recalls = sorted({0.0, *(r for r, _ in points)})
    return sum((r - before) * max(p for recall, p in points if recall >= r)
               for before, r in itertools.pairwise(recalls))


def test_average_precision_of_random_lists():
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        scores, hits = rng.permutation(n) / n, rng.random(n) < 0.5
        objects = hits.sum() + rng.integers(1, 4)
        assert close(common.area_under_curve(scores, hits, objects), voc_ap(scores, hits, objects))


def test_aps_of_true_halved_and_absent_instances():
    samples = shapes(6)
    objects = {s.name: irnet.objects_of(s.mask, s.instances) for s in samples}

    class Truth(list):
        classes = list(range(8))

    def read(name, keep=1):
        kept = objects[name][::keep]
        return np.array([m for _, m in kept]), np.array([c for c, _ in kept]), np.ones(len(kept), np.float32)

    truth = Truth(samples)

    def aps(read):
        return common.instance_aps(irnet.instance_pairs(truth, read), 8)

    assert aps(read) == ({"ap50": 100, "ap70": 100, "ap75": 100}, 6)
    assert aps(lambda name: read(name, 99))[0]["ap50"] < 100
    wrong = aps(lambda name: (read(name)[0], read(name)[1] % 8 + 1, read(name)[2]))
    assert wrong[0]["ap50"] < 50
    del samples[0].instances                                         # a picture of SBD
    assert aps(read)[1] == 5


def test_targets_of_a_crop():
    number = torch.from_numpy(label_map("1100. 1102. 33000").astype(int))[None]
    label = torch.from_numpy(label_map("4400. 4405. 66000").astype(int))[None]
    target, = irnet.targets_of(number, label)                        # 2 is one pixel, 3 one row: left out
    assert target["boxes"].tolist() == [[0, 0, 2, 2]] and target["labels"].tolist() == [4]
    assert (target["masks"][0] == (number[0] == 1)).all() and target["masks"].dtype == torch.uint8
    empty, = irnet.targets_of(torch.full_like(number, 255), label)
    assert [tuple(empty[key].shape) for key in ("boxes", "labels", "masks")] == [(0, 4), (0,), (0, 3, 5)]


def test_instance_maps_of_a_folder_and_of_the_truth(tmp_path):
    s, = shapes(1)
    masks = np.stack([s.instances == 1, s.mask == 0])
    common.save_instances(tmp_path / f"{s.name}.npz", masks, np.array([5, 6]), np.array([0.5, 0]))
    weak, full = irnet.Instances([s], tmp_path)[0], irnet.Instances([s])[0]
    assert (weak.instances == (s.instances == 1)).all() and (weak.pseudo == 5 * (s.instances == 1)).all()
    assert not hasattr(weak, "mask") and not hasattr(full, "mask")
    assert ((full.instances > 0) == (s.instances > 0)).all() and (full.pseudo[s.instances > 0] > 0).all()
    del s.instances
    assert irnet.Instances([s])[0].instances.max() == sum(ndimage.label(s.mask == c)[1] for c in range(1, 9))


def test_schedule_of_the_detector():
    factor = common.detector_schedule(90, 10)
    assert [round(factor(step), 5) for step in (0, 5, 10, 59, 60, 80)] == [0.33333, 0.66667, 1, 1, 0.1, 0.01]


def test_anchors_and_heads_are_detectrons_for_resnet50():
    net = irnet.make_detector("resnet50", "none", 800, 256, 512, 20)
    assert net.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert net.roi_heads.box_predictor.cls_score.out_features == 21
    convs = [m for m in net.roi_heads.mask_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convs] == [256] * 4
    sizes = [tuple(t.shape[1:]) for t in net.backbone(torch.zeros(1, 3, 64, 96)).values()]
    assert sizes == [(256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3), (256, 1, 2)]


def test_field_colours():
    D = np.zeros((2, 1, 3))
    D[1, 0, 1], D[1, 0, 2] = 4, -4                                   # nowhere: white; right: red; left: cyan
    expected = np.array([[[255, 255, 255], [255, 0, 0], [0, 255, 255]]])
    assert np.abs(irnet.field_colours(D).astype(int) - expected).max() <= 6


# ---------------------------------------------------------------- runs

TINY = """irnet.py --preset shapes --workers 0 --device cpu --cam-steps 4 --cam-batch 4 --cam-crop 48
    --cam-resize 48 64 --cam-scales 0.5 1 --irn-steps 6 --irn-batch 4 --irn-crop 48 --batch-images 2
    --walk-steps 16 --refine-steps 5 --seg-steps 4 --seg-batch 4 --seg-crop 48 --test-scales 1
    --inst-steps 4 --inst-batch 2 --inst-size 64 --inst-width 16 --inst-rois 16 --save-every 2
    --log-every 2""".split()
STAGES = ["cam", "pseudo", "pseudo_instance", "val", "val_crf", "val_instance"]
LABELS = ["relations", "pseudo", "pseudo_cam", "val", "val_crf"]
INSTANCES = ["instances_displacement", "instances_boundary", "instances_cam", "instances_val"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six train and six val scenes as files: {"workpiece": folder, "voc": folder}."""
    made = {}
    for layout in ("workpiece", "voc"):
        made[layout] = tmp_path_factory.mktemp(layout)
        export("shapes", layout, str(made[layout]), n=6)
    return made


def command(folders, out, layout="workpiece", **flags):
    given = [w for key, value in flags.items() for w in (f"--{key.replace('_', '-')}", *str(value).split())]
    return [*TINY, "--data", layout, "--root", folders[layout], "--out", out, *given]


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        irnet.main()


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A run by tags from beginning to end."""
    out = tmp_path_factory.mktemp("finished")
    run_here(*command(folders, out))
    return out


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    """The numbers of results.json without times and memory."""
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages(out)]


def contents(out, *parts):
    """{path: bytes} of some folders and files of a run."""
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.relative_to(out).parts[0] in parts]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_runs_by_tags(finished):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 6 and s["uses_masks"] and s["seconds"] >= 0
        assert s["split"] == ("val" if s["stage"].startswith("val") else "train")
        numbers = [s[key] for key in s if key[:2] == "ap" or key == "miou"]
        assert len(numbers) == {"pseudo_instance": 5, "val_instance": 3}.get(s["stage"], 1)
        assert all(0 <= n <= 100 for n in numbers)
    assert {"ap50_cam", "ap50_boundary"} <= set(entries[2])


def test_a_run_writes_labels_instances_panels_and_checkpoints(finished, folders):
    tags = json.loads((folders["workpiece"] / "train" / "tags.json").read_text())
    classes = (folders["workpiece"] / "classes.txt").read_text().split()
    for folder in LABELS + INSTANCES: assert len(list((finished / folder).iterdir())) == 6
    for name, present in tags.items():
        allowed = {0, *(classes.index(c) + 1 for c in present)}
        for folder in ("pseudo", "pseudo_cam"):
            assert set(np.unique(read_label(finished / folder / f"{name}.png"))) <= allowed
        assert set(np.unique(read_label(finished / "relations" / f"{name}.png"))) <= {*allowed, 255}
        cam = common.read_instances(finished / "instances_cam" / f"{name}.npz")
        label = read_label(finished / "pseudo_cam" / f"{name}.png")
        for mask, c in zip(*cam[:2], strict=True): assert (label[mask] == c).all()
        assert (cam[0].any(0) == (label > 0)).all() and cam[0].sum(0).max(initial=0) <= 1
    for name in ("train", "val"):
        with Image.open(finished / "panels" / f"{name}.png") as image:
            assert image.width > 400 and image.height > 6 * 150
    for stage in ("classifier", "irnet", "segmenter", "detector"):
        assert torch.load(finished / f"{stage}.pt", weights_only=True)["step"] in (4, 6)
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in lines} == {"classifier", "irnet", "segmenter", "detector"}
    assert all(np.isfinite(list(entry.values())[1:]).all() for entry in lines)


def test_runs_on_full_masks_without_mask_rcnn(folders, tmp_path):
    run_here(*command(folders, tmp_path, "voc", supervision="full", seg_steps=2), "--no-mask-rcnn")
    assert [s["stage"] for s in stages(tmp_path)] == ["val", "val_crf"]
    assert not any((tmp_path / name).exists() for name in ("cam", "pseudo", "classifier.pt", "detector.pt"))


def test_both_upper_bounds_where_some_pictures_lack_instances(folders, tmp_path):
    """As SBD's: their connected regions teach, and AP leaves them out."""
    root = tmp_path / "voc"
    shutil.copytree(folders["voc"], root)
    masks = sorted((root / "VOC2012" / "SegmentationObject").glob("*.png"))
    masks[0].unlink(); masks[-1].unlink()                            # one of train, one of val
    run_here(*command({"voc": root}, tmp_path / "run", "voc", supervision="full", seg_steps=2, inst_steps=2))
    assert [(s["stage"], s["n_images"]) for s in stages(tmp_path / "run")] == [
        ("val", 6), ("val_crf", 6), ("val_instance", 5)]


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_predicts_a_folder(finished, folders, tmp_path, kind):
    few = tmp_path / "photos"
    few.mkdir()
    for file in sorted((folders["workpiece"] / "val" / "images").iterdir())[:2]: shutil.copy(file, few)
    run_here("irnet.py", "--predict", few, "--checkpoint", finished / f"{kind}.pt", "--out", tmp_path / "p",
             "--device", "cpu")
    for file in few.iterdir():
        label = read_label(tmp_path / "p" / "predict" / file.name, None, read_image(file))
        assert (tmp_path / "p" / "predict" / f"{file.stem}_overlay.png").exists()
        if kind == "segmenter":
            assert (label == read_label(finished / "val_crf" / file.name)).all(), "the run's own prediction"
        else:
            mine, theirs = (common.read_instances(folder / f"{file.stem}.npz") for folder in
                            (tmp_path / "p" / "predict", finished / "instances_val"))
            assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("checkpoint", ["none.pt", "classifier.pt"])
def test_predict_needs_a_segmenter_or_detector(finished, folders, tmp_path, checkpoint):
    with pytest.raises(SystemExit, match="checkpoint"):
        run_here("irnet.py", "--predict", folders["workpiece"], "--checkpoint", finished / checkpoint)


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folders, tmp_path):
    """kill -9 while IRNet trains and while Mask R-CNN does."""
    line = command(folders, tmp_path)
    kill_when(lambda: (tmp_path / "irnet.pt").exists(), *line)
    assert torch.load(tmp_path / "irnet.pt", weights_only=True)["step"] < 6
    kill_when(lambda: (tmp_path / "detector.pt").exists(), *line)
    sh(*line)
    assert scores(tmp_path) == scores(finished)
    parts = ["cam", "fields", "mean_displacement", *LABELS, *INSTANCES]
    assert contents(tmp_path, *parts) == contents(finished, *parts)


def test_reuse_takes_over_all_before_the_walk(finished, folders, tmp_path):
    """Other rows and steps of the walk: network and fields come from the first run, with all their files."""
    run_here(*command(folders, tmp_path, walk_steps=2, train_on="cam", reuse=finished), "--no-mask-rcnn")
    parts = ["cam", "relations", "fields", "mean_displacement", "classifier.pt", "irnet.pt"]
    assert contents(tmp_path, *parts) == contents(finished, *parts)
    assert "loss_b" not in (tmp_path / "log.jsonl").read_text()


def test_an_image_without_tags_is_background(folders, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(folders["workpiece"], root)
    tags = json.loads((root / "train" / "tags.json").read_text())
    name = sorted(tags)[0]
    (root / "train" / "tags.json").write_text(json.dumps({**tags, name: []}))
    with Image.open(root / "train" / "images" / f"{name}.png") as image: small = image.resize((47, 33))
    small.save(root / "train" / "images" / f"{name}.png")
    for part in ("masks", "instances", "scribbles"): shutil.rmtree(root / "train" / part)
    for part in ("boxes", "points"): (root / "train" / f"{part}.json").unlink()
    flags = dict(seg_steps=2, inst_steps=2, irn_init="weights", crf="none", train_on="boundary")
    run_here(*command({"workpiece": root}, tmp_path / "run", **flags), "--authors-weights")
    assert not read_label(tmp_path / "run" / "pseudo" / f"{name}.png").any()
    assert read_label(tmp_path / "run" / "pseudo" / f"{name}.png").shape == (33, 47)
    assert len(common.read_instances(tmp_path / "run" / "instances_displacement" / f"{name}.npz")[0]) == 0
    assert [s["stage"] for s in stages(tmp_path / "run")] == ["val", "val_crf", "val_instance"]


# ---------------------------------------------------------------- learns


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """IRNet after some seconds on three scenes, whose true masks stand for the confident areas."""
    out, samples = tmp_path_factory.mktemp("trained"), shapes(3)
    (out / "names.txt").write_text("".join(f"{s.name}\n" for s in samples))
    changes = dict(out=str(out), train_list=str(out / "names.txt"), workers=0, device="cpu", irn_steps=50,
                   irn_batch=3, irn_crop=64, irn_rescale=(0.8, 0.8), irn_radius=6, log_every=1)
    args = irnet.Args(**{**irnet.SHAPES, **changes})
    run, train_set = Run(args), load(args, "train")
    for s in samples: save_label(run.path("relations", s.name), s.mask)
    torch.manual_seed(0)
    classifier = irnet.CamNet(irnet.classifier_backbone(args), 8, cut=False).eval()
    net = irnet.train_irnet(args, run, classifier, train_set)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return types.SimpleNamespace(net=net, samples=samples, lines=lines)


def test_irnet_learns_boundaries_and_displacements(trained):
    for key, share in (("loss_b", 0.8), ("loss_fg", 0.8)):
        losses = [line[key] for line in trained.lines]
        assert np.mean(losses[-10:]) < share * np.mean(losses[:10]), (key, losses)


def test_the_walk_enlarges_small_seeds(trained):
    """A CAM that lights a fifth of each object: its labels cover more of the objects after the walk."""
    before, after = ConfusionMatrix(range(9)), ConfusionMatrix(range(9))
    for s in trained.samples:
        D, B = (t.numpy() for t in irnet.fields_of(trained.net, s.image, 80, torch.device("cpu")))
        own, depth = np.flatnonzero(s.tags), np.zeros(s.mask.shape)
        for k in range(1, s.instances.max() + 1):
            inside = s.instances == k
            if not inside.any(): continue
            distance = ndimage.distance_transform_edt(inside)
            depth[inside & (distance >= np.quantile(distance[inside], 0.8))] = 1
        cam = np.stack([depth * (s.mask == c + 1) for c in own]).astype(np.float32)
        start, _ = irnet.start_of_walk(cam[:, ::2, ::2], D, B, 1, 2.5)
        transitions = irnet.eq12_transitions(torch.tensor(B), 5, 10.0)
        walked, = irnet.eq13_random_walk([torch.tensor(start[:len(own)])], [transitions], 256)
        walked = irnet.cells_to_pixels(walked[None], 2, s.mask.shape)[0].numpy()
        for confusion, scores in ((before, cam), (after, walked)):
            label = irnet.best_labels(scores, 0.25)[0]
            confusion.add(np.concatenate([[0], own + 1])[label], s.mask)
    assert after.miou() > before.miou() + 5, (before.miou(), after.miou())
