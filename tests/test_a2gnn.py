"""a2gnn.py: each equation against an authority, the script on a few scenes, and what the method gains."""

import dataclasses
import itertools
import json
import runpy
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import a2gnn
import common
import data
from common import ConfusionMatrix, Run, make_backbone, save_label
from conftest import ROOT, kill_when, sh
from data import export, load, read_image, read_label

torch.set_num_threads(1)


def shapes(n, split="train", supervision="box"):
    """The first n scenes of shapes, with everything known about them."""
    args = types.SimpleNamespace(data="shapes", root="", train_list="train", supervision=supervision)
    truth = load(args, split, masks=True)
    return [truth[i] for i in range(n)]


def arguments(**changes):
    return a2gnn.Args(**{**a2gnn.SHAPES, **changes})


def random_affinity_net(seed=0):
    torch.manual_seed(seed)
    return a2gnn.AffinityNet(make_backbone("tiny", "none", 4)).eval()


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def label_map(text):
    """Rows of digits, `.` = 255 -> (H,W) uint8."""
    rows = text.split()
    return np.array([[255 if c == "." else int(c) for c in row] for row in rows], np.uint8)


def mask_of(text):
    return label_map(text) == 1


# ---------------------------------------------------------------- equals: seeds, Eqs. (3.1)–(3.5)


def test_eq3_1_foreground_by_the_low_background_by_the_high_exponent():
    one_hot = lambda winners: np.eye(3)[np.array(winners)].transpose(2, 0, 1)  # noqa: E731
    low, high = one_hot([[1, 0, 0], [2, 2, 0]]), one_hot([[1, 0, 2], [0, 1, 1]])
    assert (a2gnn.eq3_1_cam_labels(low, high) == label_map("10. 22.")).all()


def test_background_scores():
    cam = np.array([[[0.0, 0.5]], [[0.2, 0.1]]])
    assert np.allclose(a2gnn.with_background(cam, 4), [[[0.8**4, 0.5**4]], *cam])


def test_confident_labels_are_the_top_share_of_each_class():
    """Ten pixels of class 1 with scores 0.1 to 1: four are its top 40 %, all strictly above the quantile."""
    cam = np.array([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.0, 0.005, 0.02]]])
    label = label_map("1111111111001")
    low = np.stack([np.full((1, 13), 0.1), np.full((1, 13), 0.9)])
    high = low[::-1].copy()
    select = lambda: a2gnn.confident_cam_labels(label, cam, low, high, 24, 0.4, 0.01, 0.8, 0.8)  # noqa: E731
    assert (select() == label_map("......111100.")).all()
    low[1, 0, 9], high[0, 0, 11] = 0.79, 0.79                        # the CRF is not sure of these two
    assert (select() == label_map("......111.0..")).all()


def test_confident_labels_of_a_class_without_candidates():
    label, cam = label_map("12 00"), np.zeros((2, 2, 2))
    sure = np.ones((3, 2, 2))
    selected = a2gnn.confident_cam_labels(label, cam, sure, sure, 24, 0.4, 0.01, 0.8, 0.8)
    assert (selected == label_map(".. 00")).all()


@pytest.mark.parametrize("box, rows, columns", [
    ([1, 1, 2, 3, 4], (2, 4), (1, 3)), ([1, 0.4, 0.6, 2.1, 3.5], (0, 4), (0, 3)),
    ([2, 3, 3, 3, 3], (3, 4), (3, 4)), ([2, 6, 5, 6, 5], (4, 5), (5, 6)),
    ([1, -2, -1, 9, 9], (0, 5), (0, 6))])
def test_boxes_become_pixels(box, rows, columns):
    c, y, x = a2gnn.pixel_box(np.float32(box), 5, 6)
    area = np.zeros((5, 6), bool)
    area[y, x] = True
    expected = np.zeros((5, 6), bool)
    expected[slice(*rows), slice(*columns)] = True
    assert c == box[0] and (area == expected).all() and area.any()
    assert (y.start, y.stop, x.start, x.stop) == (*rows, *columns), "inside the image"


def red_square():
    rng, image = np.random.default_rng(0), np.zeros((40, 48, 3))
    image[...], image[12:28, 14:34] = (40, 130, 60), (210, 40, 40)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def test_eq3_2_grabcut_finds_the_object_in_its_box():
    image, truth = red_square(), np.zeros((40, 48), bool)
    truth[12:28, 14:34] = True
    found = a2gnn.eq3_2_grabcut(image, [1, 8, 6, 40, 34], 3, 0.15)
    assert (found == truth).mean() > 0.99 and not found[:6].any() and not found[:, 40:].any()
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: a2gnn.eq3_2_grabcut(image, [1, 8, 6, 40, 34], 3, 0.15), range(4)))
    assert all((a == found).all() for a in again)


@pytest.mark.parametrize("box, minimum", [
    ([1, 8, 6, 40, 34], 1.01), ([1, 0, 0, 48, 40], 0.15), ([1, 20, 20, 23, 25], 0.15),
    ([1, 47.5, 3, 48, 3.5], 0.15)],
    ids=["too little found", "box is the image", "tiny", "less than a pixel"])
def test_eq3_2_falls_back_to_the_whole_box(box, minimum):
    found, expected = a2gnn.eq3_2_grabcut(red_square(), np.float32(box), 3, minimum), np.zeros((40, 48), bool)
    expected[int(box[2]):int(np.ceil(box[4])), int(box[1]):int(np.ceil(box[3]))] = True
    assert (found == expected).all()


def test_eq3_2_on_one_colour_is_a_part_of_the_box():
    """Nothing tells inside from outside: whatever comes, it is not empty and stays in the box."""
    found = a2gnn.eq3_2_grabcut(np.full((20, 20, 3), 90, np.uint8), [1, 4, 4, 14, 14], 3, 0.15)
    assert found.sum() >= 15 and not found[14:].any() and not found[:, 14:].any() and not found[:4].any()


BOXES = np.float32([[1, 0, 0, 4, 4], [2, 2, 2, 6, 6]])                   # overlap: rows and columns 2 and 3
MASKS = [mask_of("000000 011100 011100 011100 000000 000000"),
         mask_of("000000 000000 000000 000110 000110 000000")]


def test_eq3_3_the_smaller_mask_wins():
    M_B, owner = a2gnn.eq3_3_box_labels(BOXES, MASKS, 6, 6)
    assert (M_B == label_map("....00 .11100 .111.. .1122. 00.22. 00....")).all()
    assert ((owner == 0) == (M_B == 1)).all() and ((owner == 1) == (M_B == 2)).all()
    label, owner = a2gnn.eq3_3_box_labels(BOXES[:0], [], 3, 4)
    assert (label == 0).all() and (owner == -1).all(), "no box: all is background"


def fused(M_I, M_B, owner, boxes):
    """Eq. (3.4) row by row, pixel by pixel, as printed; M_Bk is M_B where box k owns the pixel."""
    H, W = M_I.shape
    areas = [a2gnn.pixel_box(box, H, W) for box in boxes]
    absent = [c not in M_I[y, x] for c, y, x in areas]
    M_F = np.full((H, W), 255)
    for i, j in np.ndindex(H, W):
        if not any(y.start <= i < y.stop and x.start <= j < x.stop for _, y, x in areas):
            M_F[i, j] = M_B[i, j]
        elif M_B[i, j] == M_I[i, j]:
            M_F[i, j] = M_I[i, j]
        elif owner[i, j] >= 0 and absent[owner[i, j]]:
            M_F[i, j] = areas[owner[i, j]][0]
    return M_F


def test_eq3_4_by_hand():
    """Class 1 is in M_I, class 2 is not: in box 2 GrabCut alone decides, in box 1 both must agree."""
    M_B, owner = a2gnn.eq3_3_box_labels(BOXES, MASKS, 6, 6)
    M_I = label_map("111111 011000 011100 .11100 000000 000000")
    M_F, by_boxes = a2gnn.eq3_4_fuse(M_I, M_B, owner, BOXES)
    assert (M_F == label_map("....00 .11.00 .111.. .1122. 00.22. 00....")).all()
    assert (by_boxes == mask_of("000011 000011 000000 000110 110110 110000")).all()


def random_seeds(rng):
    """Two or three boxes on 6x7 pixels, a mask in each, and any M_I."""
    corners = np.sort(rng.integers(0, 7, (rng.integers(2, 4), 2, 2)), axis=1)
    boxes = np.float32([[rng.integers(1, 4), x0, y0, x1 + 1, y1 + 1] for (y0, x0), (y1, x1) in corners])
    masks = []
    for box in boxes:
        _, y, x = a2gnn.pixel_box(box, 6, 7)
        masks.append(np.zeros((6, 7), bool))
        masks[-1][y, x] = rng.random(masks[-1][y, x].shape) < 0.7
    return boxes, masks, rng.choice([0, 1, 2, 3, 255], (6, 7)).astype(np.uint8)


def test_eq3_4_as_printed():
    rng, alone = np.random.default_rng(1), 0
    for _ in range(100):
        boxes, masks, M_I = random_seeds(rng)
        M_B, owner = a2gnn.eq3_3_box_labels(boxes, masks, 6, 7)
        M_I[M_I == boxes[0, 0]] = 255                                # a class that the classifier missed
        M_F, by_boxes = a2gnn.eq3_4_fuse(M_I, M_B, owner, boxes)
        assert (M_F == fused(M_I, M_B, owner, boxes)).all()
        assert (M_F[by_boxes] == M_B[by_boxes]).all()
        alone += (by_boxes & (owner >= 0)).sum()
    assert alone > 100


def test_eq3_5_as_printed_keeps_everything():
    """Each label of M_F is M_B's, so "M_F = M_B or M_F = M'_I" removes nothing; ours keeps the confident."""
    rng, kept, removed = np.random.default_rng(2), 0, 0
    for _ in range(50):
        boxes, masks, M_I = random_seeds(rng)
        M_B, owner = a2gnn.eq3_3_box_labels(boxes, masks, 6, 7)
        M_F, by_boxes = a2gnn.eq3_4_fuse(M_I, M_B, owner, boxes)
        confident = np.where(rng.random(M_I.shape) < 0.5, M_I, 255)
        printed = np.where((M_F == M_B) | (M_F == confident), M_F, 255)
        assert (printed == M_F).all()
        M_g = a2gnn.eq3_5_confident(M_F, confident, by_boxes)
        for i, j in np.ndindex(6, 7):
            stays = by_boxes[i, j] or M_F[i, j] == confident[i, j]
            assert M_g[i, j] == (M_F[i, j] if stays else 255)
        kept, removed = kept + (M_g != 255).sum(), removed + ((M_g == 255) & (M_F != 255)).sum()
    assert kept > 100 and removed > 50


def test_box_seeds_of_a_scene():
    """The two stages together: M_g is a part of M_F, background lies outside all boxes or M_I says so too."""
    with ThreadPoolExecutor(1) as pool:
        for s in shapes(3):
            M_F, M_g = a2gnn.box_seeds(s, s.mask, s.mask, 3, 0.15, pool)
            assert (M_g == M_F).all(), "M_I is confident everywhere"
            assert ((M_F == s.mask) | (M_F == 255)).mean() > 0.98 and (M_F != 255).mean() > 0.7
            unsure = np.full_like(s.mask, 255)
            M_F, M_g = a2gnn.box_seeds(s, unsure, unsure, 3, 0.15, pool)
            assert (M_g == M_F).all() and set(np.unique(M_F)) <= {0, 255, *s.boxes[:, 0]}


# ---------------------------------------------------------------- equals: affinity CNN, Eqs. (3.6)–(3.13)


def within(h, w, radius):
    """All unordered pairs of different cells at most `radius` apart, by a double loop."""
    cells = list(np.ndindex(h, w))
    return {frozenset((i, j)) for i, j in itertools.combinations(cells, 2)
            if (i[0] - j[0])**2 + (i[1] - j[1])**2 <= radius**2}


def listed_pairs(h, w, offsets):
    """The pairs behind the columns of eq3_6_7_pair_labels, in its order: [(cell, cell), …]"""
    index = torch.arange(h * w).view(1, h, w)
    ends = [(a.flatten().tolist(), b.flatten().tolist())
            for a, b in (a2gnn.shifted(index, *o) for o in offsets)]
    return [(divmod(i, w), divmod(j, w)) for a, b in ends for i, j in zip(a, b, strict=True)]


@pytest.mark.parametrize("radius, h, w", [(1, 3, 4), (2, 5, 4), (3, 6, 7), (5, 6, 7)])
def test_eq3_7_and_3_11_each_pair_once_none_beyond_the_map(radius, h, w):
    pairs = listed_pairs(h, w, a2gnn.window_offsets(radius))
    assert len(pairs) == len(set(map(frozenset, pairs)))
    assert set(map(frozenset, pairs)) == within(h, w, radius)


def test_eq3_6_pair_labels():
    seed = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 255], (2, 6, 7))).long()
    offsets = a2gnn.window_offsets(3)
    label, first = a2gnn.eq3_6_7_pair_labels(seed, offsets)
    pairs = listed_pairs(6, 7, offsets)
    assert label.shape == (2, len(pairs)) and set(label.unique().tolist()) == {0, 1, 255}
    for b, (column, (i, j)) in itertools.product(range(2), enumerate(pairs)):
        m, n = seed[b][i].item(), seed[b][j].item()
        assert label[b, column] == (255 if 255 in (m, n) else int(m == n)) and first[b, column] == m


def test_eq3_8_and_the_distances_of_all_pairs():
    feature, offsets = torch.randn(2, 5, 6, 4), a2gnn.window_offsets(2)
    distance = a2gnn.PairDistance.apply(feature, offsets)
    for b, (column, (i, j)) in itertools.product(range(2), enumerate(listed_pairs(5, 6, offsets))):
        expected = (feature[b][i] - feature[b][j]).abs().sum() / 4
        assert close(distance[b, column], expected)
        assert close(a2gnn.eq3_8_affinity(distance[b, column]), np.exp(-expected.item()))


def test_gradient_of_the_distances():
    torch.manual_seed(0)
    feature = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    offsets = a2gnn.window_offsets(2)
    assert torch.autograd.gradcheck(lambda f: a2gnn.PairDistance.apply(f, offsets), (feature,))
    ends = [a2gnn.shifted(feature, *o) for o in offsets]
    slow = torch.cat([(a - b).abs().mean(-1).flatten(1) for a, b in ends], dim=1)
    weight = torch.randn_like(slow)
    one, = torch.autograd.grad((a2gnn.PairDistance.apply(feature, offsets) * weight).sum(), feature)
    two, = torch.autograd.grad((slow * weight).sum(), feature)
    assert torch.allclose(one, two)


@pytest.mark.parametrize("split", [False, True])
def test_eq3_10(split):
    rng = np.random.default_rng(3)
    distance = torch.from_numpy(rng.uniform(0.01, 3, (2, 40))).float()
    label = torch.from_numpy(rng.choice([0, 1, 255], (2, 40)))
    first = torch.from_numpy(rng.choice([0, 1, 2], (2, 40)))
    sets = {"bg": [], "fg": [], "differ": []}
    for d, same, m in zip(distance.flatten().tolist(), label.flatten(), first.flatten(), strict=True):
        D = np.exp(-d)
        if same == 1: sets["fg" if m > 0 else "bg"].append(-np.log(D))
        if same == 0: sets["differ"].append(-np.log(1 - D))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = mean(sets["bg"] + sets["fg"]) + mean(sets["differ"])
    if split: expected = mean(sets["bg"]) / 4 + mean(sets["fg"]) / 4 + mean(sets["differ"]) / 2
    assert close(a2gnn.eq3_10_affinity_loss(distance, label, first, split), expected)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("only", [0, 1, 255])
def test_eq3_10_with_empty_sets(only, split):
    """A set without pairs counts 0; the same features on both sides give a finite loss and gradient."""
    distance = torch.zeros(1, 6, requires_grad=True)
    label, first = torch.full((1, 6), only), torch.zeros(1, 6, dtype=torch.long)
    loss = a2gnn.eq3_10_affinity_loss(distance, label, first, split)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(distance.grad).all()
    assert (loss == 0) == (only != 0)


@pytest.mark.parametrize("columns", [6, 4])
def test_eq3_12_and_3_13(columns):
    """Pairs with an end in the crop's padding (here: the columns from `columns` on) do not count."""
    torch.manual_seed(1)
    real = torch.arange(6).expand(1, 5, 6) < columns
    feature, colour, offsets = torch.randn(1, 5, 6, 4), torch.rand(1, 5, 6, 3) * 0.3, a2gnn.window_offsets(2)
    total, count = 0, 0
    for i, j in itertools.product(np.ndindex(5, 6), repeat=2):      # ordered pairs, as the sum
        apart = (i[0] - j[0])**2 + (i[1] - j[1])**2
        if not 0 < apart <= 4 or max(i[1], j[1]) >= columns: continue
        rgb = (colour[0][i] - colour[0][j]).pow(2).sum().item()
        G = np.exp(-apart / (2 * 6.0**2) - rgb / (2 * 0.1**2))
        total, count = total + G * (feature[0][i] - feature[0][j]).abs().sum().item() / 4, count + 1
        assert close(a2gnn.eq3_13_gaussian(torch.tensor(float(apart)), torch.tensor(rgb), 6.0, 0.1), G)
    distance = a2gnn.PairDistance.apply(feature, offsets)
    assert close(a2gnn.eq3_12_affinity_regularised(distance, colour, real, offsets, 6.0, 0.1), total / count)


# ---------------------------------------------------------------- equals: graph, Eqs. (3.14), (3.15)


def random_graph(h, w, seed, dim=12):
    """What image_to_graph gives, with random features; neighbours have much in common."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda c: torch.rand(h, w, c, generator=g)  # noqa: E731
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).float()
    return types.SimpleNamespace(x=a2gnn.eq3_15_node_features(draw(dim)), f=draw(6) * 3, colour=draw(3) * 0.3,
                                 place=place, valid=torch.ones(h, w, 1), adjacent=None, size=(4 * h, 4 * w))


def dense_edges(graph, radius, sigma):
    """(N,N): D where above σ and within the square window (radius 0: everywhere), else 0."""
    f, place = graph.f.flatten(0, 1), graph.place.flatten(0, 1)
    D = torch.exp(-(f[:, None] - f[None]).abs().mean(-1))
    near = (place[:, None] - place[None]).abs().amax(-1) <= (radius or 10**6)
    return torch.where((D > sigma) & near, D, 0)


def scattered(tiles, window):
    """(T,q,k) tiles -> (N,N): the entry of each pair of nodes, found by carrying the nodes' numbers along."""
    n = window.h * window.w
    number = torch.arange(1, n + 1.).view(1, window.h, window.w, 1)        # 0 = beyond the grid
    q, k = (m[0, ..., 0].long() for m in (window.queries(number), window.keys(number)))
    full = torch.zeros(n + 1, n + 1).index_put((q[:, :, None], k[:, None, :]), tiles, accumulate=True)
    return full[1:, 1:]


SIZES = [(4, 5, 7), (4, 8, 16), (4, 13, 11), (2, 9, 6), (1, 4, 5), (0, 5, 6)]


@pytest.mark.parametrize("radius, h, w", SIZES)
def test_eq3_14_edges_of_the_window(radius, h, w):
    """As a dense N x N matrix: each pair within the radius once, none that is farther or off the map."""
    graph = random_graph(h, w, 0)
    pairs = a2gnn.Pairs([graph], radius)
    edges = a2gnn.eq3_14_edges(pairs.distance(), pairs.near, 0.4)
    expected = dense_edges(graph, radius, 0.4)
    assert close(scattered(edges[0], pairs.window), expected) and 0 < (expected == 0).float().mean() < 1
    near = dense_edges(graph, radius, -1) > 0
    assert torch.equal(scattered(pairs.near[0].float(), pairs.window), near.float())
    place = graph.place.flatten(0, 1)
    apart = (place[:, None] - place[None]).pow(2).sum(-1)
    assert close(scattered(pairs.place[0] * pairs.near[0], pairs.window), apart * near)


def test_pairs_within_a_circle():
    graph = random_graph(7, 9, 0)
    pairs = a2gnn.Pairs([graph], 3, euclidean=True)
    place = graph.place.flatten(0, 1)
    near = (place[:, None] - place[None]).pow(2).sum(-1) <= 9
    assert torch.equal(scattered(pairs.near[0].float(), pairs.window), near.float())


def test_eq3_15_rows_sum_to_one():
    x = a2gnn.eq3_15_node_features(torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.5, 0.0]]))
    assert close(x, [[0.25, 0.75], [0, 0], [1, 0]])


@pytest.mark.parametrize("h, w, r", [(5, 7, 4), (16, 8, 4), (3, 3, 1), (9, 4, 2), (4, 6, 0)])
def test_windows_fold_back(h, w, r):
    x, window = torch.randn(2, h, w, 3), a2gnn.Window(h, w, r)
    assert torch.equal(window.fold(window.queries(x)), x)


# ---------------------------------------------------------------- equals: layers, Eqs. (3.16)–(3.19)


def attention(H, E, w, beta, use_cos=True, use_edge=True):
    """Eqs. (3.17), (3.18) node by node.   H (N,d), E (N,N), 0 = not connected -> (N,d)"""
    out = []
    for i in range(len(H)):
        S = torch.nonzero(E[i] > 0)[:, 0]
        cos = F.cosine_similarity(H[i][None], H[S], dim=-1)
        logits = (w * cos if use_cos else 0) + (beta * (cos > 0) * E[i, S] if use_edge else 0)
        out.append(torch.softmax(logits + torch.zeros(len(S)), 0) @ H[S])
    return torch.stack(out)


def gcn(H, E):
    A = (E > 0).float()
    D = torch.diag(A.sum(1) ** -0.5)
    return torch.relu(D @ A @ D @ H)


def gat(H, E, a):
    out = []
    for i in range(len(H)):
        S = torch.nonzero(E[i] > 0)[:, 0]
        score = F.leaky_relu((H[i] * a[:, 0]).sum() + H[S] @ a[:, 1], 0.2)
        out.append(torch.softmax(score, 0) @ H[S])
    return F.elu(torch.stack(out))


def dense_network(net, b, graph, E):
    """The b-th network of a batch on one graph -> H^{L+1} (N,hidden), logits (N,C)"""
    H = torch.relu(graph.x.flatten(0, 1) @ net.W0[b])
    for layer in range(net.layers):
        if net.kind == "gcn": H = gcn(H @ net.Wl[layer][b], E)
        elif net.kind == "gat": H = gat(H @ net.Wl[layer][b], E, net.al[layer][b])
        else: H = attention(H, E, net.w[b, layer], net.beta, net.use_cos, net.use_edge)
    return H, H @ net.W[b]


def network(seeds, kind="a2gnn", **options):
    """Networks with 4, 3, 4, … output classes."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return a2gnn.A2GNN(generators, 12, [4 - s % 2 for s in seeds], 8, 3, 10.0, kind=kind, **options)


KINDS = {"a2gnn": ("a2gnn", {}), "attention only": ("a2gnn", {"use_edge": False}),
         "edge only": ("a2gnn", {"use_cos": False}), **{kind: (kind, {}) for kind in ("agnn", "gcn", "gat")}}


@torch.no_grad()
@pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("radius", [4, 0])
def test_eq3_16_to_3_19_equal_the_dense_network(kind, options, radius):
    """Graphs of three sizes in one batch: each as if alone, and as the N x N computation."""
    sizes = [(5, 7), (9, 6), (8, 3)] if radius == 0 else [(5, 7), (13, 10), (8, 8)]
    graphs = [random_graph(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    net, pairs = network(range(3), kind, **options), a2gnn.Pairs(graphs, radius)
    edges = a2gnn.eq3_14_edges(pairs.distance(), pairs.near, 0.4)
    H, logits = net(pairs.padded("x"), edges, pairs.window)
    for b, (graph, (h, w)) in enumerate(zip(graphs, sizes, strict=True)):
        E = dense_edges(graph, radius, 0.4)
        assert (E.sum(1) >= 1).all() and (E == 0).any(), "each node is its own neighbour, some pairs are cut"
        slow_H, slow_logits = dense_network(net, b, graph, E)
        assert close(H[b, :h, :w].flatten(0, 1), slow_H)
        assert close(logits[b, :h, :w].flatten(0, 1), slow_logits)
        alone, own = network([b], kind, **options), a2gnn.Pairs([graph], radius)
        _, single = alone(own.padded("x"), a2gnn.eq3_14_edges(own.distance(), own.near, 0.4), own.window)
        classes = single.shape[-1]
        assert close(single[0], logits[b, :h, :w, :classes]) and classes == 4 - b % 2
        assert not logits[b, ..., classes:].any()


@torch.no_grad()
def test_eq3_18_where_the_cosine_is_negative():
    """The edge term is switched off, the pair stays in the softmax."""
    graph = random_graph(6, 9, 5)
    pairs = a2gnn.Pairs([graph], 2)
    E, H = a2gnn.eq3_14_edges(pairs.distance(), pairs.near, 1e-3), torch.randn(1, 6, 9, 4)
    out = a2gnn.eq3_17_18_attention(H, E, torch.tensor([0.7]), 10.0, pairs.window)
    assert close(out[0].flatten(0, 1), attention(H[0].flatten(0, 1), dense_edges(graph, 2, 1e-3), 0.7, 10.0))


def test_gradients_of_a_batch_are_those_of_each_image_alone():
    """Zero padding, isolated nodes and dropped features leave no trace, and no NaN."""
    graphs = [random_graph(5, 7, 0), random_graph(9, 6, 1)]
    graphs[1].x[0, 0] = 0
    grads = []
    for members in ((0, 1), (0,), (1,)):
        pairs, net = a2gnn.Pairs([graphs[b] for b in members], 4), network(members)
        edges = a2gnn.eq3_14_edges(pairs.distance(), pairs.near, 1e-3)
        _, logits = net(pairs.padded("x"), edges, pairs.window)
        (logits[..., :2].softmax(-1)[..., :1] * pairs.padded("valid")).sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for both, *alone in zip(*grads, strict=True):
        one = torch.cat([F.pad(grad, (0, both.shape[-1] - grad.shape[-1])) for grad in alone])
        assert torch.isfinite(both).all() and close(both, one) and both.abs().max() > 0


def test_dropout_does_not_depend_on_the_batch():
    graphs = [random_graph(5, 7, 0), random_graph(9, 6, 1)]

    def factors(members):
        chosen = [graphs[b] for b in members]
        valid = a2gnn.Pairs(chosen, 4).padded("valid")
        g = types.SimpleNamespace(graphs=chosen, valid=valid, x=torch.zeros(1))
        generators = [torch.Generator().manual_seed(b) for b in members]
        return a2gnn.dropout_factors(g, generators, 16, 0.25), a2gnn.dropout_factors(g, generators, 16, 0.25)

    (both, next_both), (first, next_first), (second, _) = factors((0, 1)), factors((0,)), factors((1,))
    assert torch.equal(both[0, :5, :7], first[0]) and torch.equal(both[1, :9, :6], second[0])
    assert torch.equal(next_both[0, :5, :7], next_first[0]) and not torch.equal(first, next_first)
    assert close(first.unique(), [0, 1 / 0.75]) and 0.15 < (first == 0).float().mean() < 0.35


# ---------------------------------------------------------------- equals: losses, Eqs. (3.21)–(3.28)


def log_probabilities(B, C, H, W, seed=0):
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(1)


@pytest.mark.parametrize("balanced", [False, True])
def test_eq3_21(balanced):
    log_O, rng = log_probabilities(3, 4, 5, 6), np.random.default_rng(0)
    M_g = torch.from_numpy(rng.choice([0, 1, 2, 3, 255], (3, 5, 6)))
    M_g[2] = 255                                                                        # nothing is labelled
    expected = []
    for b in range(3):
        terms = {True: [], False: []}
        for i, j in np.ndindex(5, 6):
            c = M_g[b, i, j].item()
            if c != 255: terms[balanced and c > 0].append(-log_O[b, c, i, j].item())
        expected.append(sum(sum(t) / max(1, len(t)) for t in terms.values()))
    assert close(a2gnn.eq3_21_cross_entropy(log_O, M_g, balanced), expected) and expected[2] == 0


def test_eq3_22():
    """Over ordered pairs of different nodes and of different classes, per node; two sizes in a batch."""
    graphs = [random_graph(4, 6, 0), random_graph(7, 3, 1)]
    pairs = a2gnn.Pairs(graphs, 2)
    G = a2gnn.eq3_13_gaussian(pairs.place, pairs.squared_colour(), 6.0, 0.1)
    G = G * (pairs.near & (pairs.place > 0))
    valid = pairs.padded("valid")
    O = torch.randn(2, 7, 6, 3).softmax(-1) * valid
    loss = a2gnn.eq3_22_regularised(O, G, pairs.window, valid.sum((1, 2, 3)))
    for b, graph in enumerate(graphs):
        h, w = graph.valid.shape[:2]
        total = 0
        for i, j in itertools.product(np.ndindex(h, w), repeat=2):
            apart = (i[0] - j[0])**2 + (i[1] - j[1])**2
            if i == j or max(abs(i[0] - j[0]), abs(i[1] - j[1])) > 2: continue
            weight = np.exp(-apart / 72 - (graph.colour[i] - graph.colour[j]).pow(2).sum().item() / 0.02)
            both = O[b][i][:, None] * O[b][j][None]
            total += weight * (both.sum() - both.trace()).item()
        assert close(loss[b], total / (h * w))


# image, class, x0, y0, x1, y1
POINT_BOXES = torch.tensor([[0, 1, 1, 0, 4, 2], [0, 2, 0, 1, 2, 4], [1, 1, 2, 2, 5, 3]])


def points_by_loop(O, box):
    """Eqs. (3.23), (3.24): for each line of a box the (value, y, x) of its largest probability."""
    b, c, x0, y0, x1, y1 = box.tolist()
    rows = [max((O[b, c, y, x].item(), y, x) for x in range(x0, x1)) for y in range(y0, y1)]
    return rows + [max((O[b, c, y, x].item(), y, x) for y in range(y0, y1)) for x in range(x0, x1)]


def test_eq3_23_to_3_25_by_hand():
    """Box 1 is columns 1-3 of rows 0-1, its first row all equal; box 2 is columns 0-1 of rows 1-3."""
    O = torch.zeros(1, 3, 4, 5)
    O[0, 1] = torch.tensor([[.9, .5, .5, .5, .9], [.9, .1, .7, .6, .9], [.9] * 5, [.9] * 5])
    O[0, 2] = torch.tensor([[.9] * 5, [.2, .3, .9, .9, .9], [.4, .1, .9, .9, .9], [.1, .6, .9, .9, .9]])
    y, x, valid = a2gnn.eq3_23_25_points(O, POINT_BOXES[:2])
    points = [list(zip(y[m][valid[m]].tolist(), x[m][valid[m]].tolist(), strict=True)) for m in range(2)]
    assert points[0][0][0] == 0 and points[0][0][1] in (1, 2, 3), "any of the equal ones"
    assert points[0][1:] == [(1, 2), (0, 1), (1, 2), (1, 3)]
    assert points[1] == [(1, 1), (2, 0), (3, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("logarithm", [False, True], ids=["O", "log O"])
def test_eq3_23_to_3_25_never_leave_the_box(logarithm):
    """Also where the box's class is unlikely, and for log O, which is what train_gnn has at hand."""
    log_O = log_probabilities(2, 3, 4, 5)
    log_O[:, 1:, :, :3] -= 6
    O = log_O if logarithm else log_O.exp()
    y, x, valid = a2gnn.eq3_23_25_points(O, POINT_BOXES)
    assert valid.sum(1).tolist() == [5, 5, 4]
    for m, box in enumerate(POINT_BOXES):
        found = list(zip(y[m][valid[m]].tolist(), x[m][valid[m]].tolist(), strict=True))
        assert found == [(i, j) for _, i, j in points_by_loop(O, box)]


@pytest.mark.parametrize("feature", [True, False])
def test_eq3_26_equals_the_sum_over_pairs(feature):
    log_O = log_probabilities(2, 3, 4, 5)
    points = a2gnn.eq3_23_25_points(log_O.exp(), POINT_BOXES)
    H = torch.randn(2, 4, 5, 6)
    H_points = H[POINT_BOXES[:, :1], points[0], points[1]]
    loss = a2gnn.eq3_26_multi_point(log_O, H_points if feature else None, POINT_BOXES, points, feature)
    for b in range(2):
        first, second = [], []
        for box in POINT_BOXES[POINT_BOXES[:, 0] == b]:
            K = points_by_loop(log_O.exp(), box)
            first += [-log_O[b, box[1], y, x].item() for _, y, x in K]
            second += [1 - F.cosine_similarity(H[b, i, j], H[b, y, x], dim=0).item()
                       for _, i, j in K for _, y, x in K]
        assert close(loss[b], np.mean(first) + (np.mean(second) if feature else 0))


def test_eq3_26_without_boxes_is_zero():
    log_O, boxes = log_probabilities(2, 3, 4, 5), POINT_BOXES[:0]
    points = a2gnn.eq3_23_25_points(log_O, boxes)
    assert a2gnn.eq3_26_multi_point(log_O, torch.zeros(0, 9, 6), boxes, points).tolist() == [0, 0]


def scene_graphs(n, **changes):
    """A few scenes of shapes as make_graphs gives them, through an affinity CNN without training."""
    args, samples = arguments(hidden=16, **changes), shapes(n)
    seeds = [np.where(np.arange(s.mask.size).reshape(s.mask.shape) % 3, s.mask, 255) for s in samples]
    return args, samples, a2gnn.make_graphs(args, random_affinity_net(), samples, seeds, torch.device("cpu"))


def box_area(box, H, W):
    area = torch.zeros(H, W, dtype=torch.bool)
    area[box[3]:box[5], box[2]:box[4]] = True
    return area


def features_after_attention(args, g, seed=0):
    """H^{L+1} of networks without training."""
    generators = [torch.Generator().manual_seed(seed + b) for b in range(len(g.sizes))]
    classes = [len(own) for own in g.classes]
    net = a2gnn.A2GNN(generators, g.x.shape[-1], classes, args.hidden, args.layers, args.beta, args.gnn)
    with torch.no_grad():
        H, logits = net(g.x, g.edges, g.window)
        return H, logits + g.absent[:, None, None]


@pytest.mark.parametrize("nodes", ["pixel", "superpixel"])
@pytest.mark.parametrize("cosine", ["centred", "literal"])
def test_eq3_27_and_3_28_equal_features_at_every_pixel(cosine, nodes):
    """Inner products are made on the grid and enlarged; here all features are enlarged first."""
    args, samples, g = scene_graphs(3, nodes=nodes)
    H, logits = features_after_attention(args, g)
    points = a2gnn.eq3_23_25_points(a2gnn.to_pixels(g, logits).softmax(1), g.boxes)
    H_points = a2gnn.at_points(g, H, points[0], points[1])
    dot = a2gnn.prototype_products(g, H, H_points, points[2], cosine)
    prototypes = a2gnn.eq3_27_prototypes(H_points, points[2])
    checked, removed = a2gnn.eq3_28_consistency(g.seeds, dot, g.boxes), 0
    expected, pixels = g.seeds.clone(), a2gnn.to_pixels(g, H)
    for m, box in enumerate(g.boxes):
        b = box[0]
        y, x = (p[m][points[2][m]] for p in points[:2])
        K = pixels[b][:, y, x].T
        assert close(K, H_points[m][points[2][m]]) and close(prototypes[m], K.mean(0))
        h, w = g.graphs[b].x.shape[:2]
        mean = H[b, :h, :w].mean((0, 1)) if cosine == "centred" else torch.zeros(args.hidden)
        cos = F.cosine_similarity(pixels[b] - mean[:, None, None], (K.mean(0) - mean)[:, None, None], dim=0)
        inside = box_area(box, *cos.shape) & (g.seeds[b] == box[1])
        sure = cos.abs() > 1e-3
        assert ((dot[m] > 0) == (cos > 0))[inside & sure].all() and (inside & sure).sum() > 20
        expected[b] = torch.where(inside & (dot[m] <= 0), 255, expected[b])
        removed += (inside & sure & (cos < 0)).sum()
    assert torch.equal(checked, expected)
    if cosine == "literal": assert torch.equal(checked, g.seeds), "H >= 0: a plain cosine is never negative"
    else: assert removed > 0


def test_eq3_28_by_hand():
    """Only seeds of the box's class inside the box can go; background, other classes and unknown stay."""
    M_g = torch.tensor([[[1, 1, 0, 2, 1], [1, 255, 2, 1, 1]]])
    dot = torch.tensor([[[-1, 1, -1, -1, -1], [0, -1, -1, 0.1, -1]], [[1, 1, 1, -1, -1], [1, 1, 1, 1, 1]]])
    boxes = torch.tensor([[0, 1, 0, 0, 4, 2], [0, 2, 2, 0, 5, 2]])
    assert a2gnn.eq3_28_consistency(M_g, dot, boxes).tolist() == [[[255, 1, 0, 255, 1], [255, 255, 2, 1, 1]]]
    assert torch.equal(a2gnn.eq3_28_consistency(M_g, dot[:0], boxes[:0]), M_g)


# ---------------------------------------------------------------- equals: between grid and pixels


@pytest.mark.parametrize("cells, stride", [(2, 8), (5, 4), (7, 3)])
def test_enlarging_is_torchs_where_both_conventions_agree(cells, stride):
    """Cells at 0, s, 2s, … fill (cells-1)·s + 1 pixels exactly as align_corners=True does."""
    x, pixels = torch.randn(2, 3, cells, cells + 1), ((cells - 1) * stride + 1, cells * stride + 1)
    expected = F.interpolate(x, pixels, mode="bilinear", align_corners=True)
    assert close(a2gnn.cells_to_pixels(x, stride, pixels), expected)
    more = a2gnn.cells_to_pixels(x, stride, (pixels[0] + stride - 1, pixels[1] + 2))
    assert close(more[..., :pixels[0], :pixels[1]], expected)
    assert close(more[..., pixels[0]:, -1], more[..., pixels[0] - 1:pixels[0], -1].expand(-1, -1, stride - 1))
    assert close(more[..., ::stride, ::stride][..., :cells, :cells + 1], x), "cell i is pixel i·stride"


@pytest.mark.parametrize("scale, stride", [(0.5, 4), (1.5, 8), (2.0, 8), (1.0, 4)])
def test_cells_of_a_scaled_image_find_their_pixels(scale, stride):
    """Cells hold the place of their centre in the original image; then each pixel gets its own place."""
    size = 64
    centres = torch.arange(0, round(size * scale), stride)                     # pixels of the scaled image
    place = ((centres + 0.5) / scale - 0.5)[None, None, None].expand(1, 1, 3, -1)
    row = a2gnn.cells_to_pixels(place, stride, (5, size), (5 * scale, size * scale))[0, 0, 2]
    expected = torch.arange(size).float().clamp(place[0, 0, 0, 0], place[0, 0, 0, -1])
    assert close(row, expected, atol=1e-4)


def test_features_lie_where_the_enlargement_puts_them():
    """An edge in the picture stays where it is: a convolution's cell i is centred on pixel stride·i."""
    image = torch.zeros(1, 1, 65, 65)
    image[..., 32:] = 1
    mean = lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3) / 9, stride=2, padding=1)  # noqa: E731
    cells = mean(mean(image))
    row = a2gnn.cells_to_pixels(cells, 4, (65, 65))[0, 0, 32]
    crossing = torch.nonzero(row > 0.5)[0].item()
    assert abs(crossing - 32) <= 2, "half a cell off would be four pixels"


@pytest.mark.parametrize("nodes", ["pixel", "superpixel"])
def test_points_have_the_features_of_the_enlarged_map(nodes):
    args, samples, g = scene_graphs(3, nodes=nodes)
    H = torch.randn(*g.valid.shape[:3], 5)
    pixels, rng = a2gnn.to_pixels(g, H), torch.Generator().manual_seed(0)
    image = g.boxes[:, 0]
    size = torch.tensor(g.sizes)[image]
    y, x = (torch.rand(len(image), 40, generator=rng) * size[:, i:i + 1] for i in (0, 1))
    y, x = y.long(), x.long()
    y[:, 0], x[:, 0] = size[:, 0] - 1, size[:, 1] - 1     # the last pixel lies beyond the last cell
    assert close(a2gnn.at_points(g, H, y, x), pixels[image[:, None], :, y, x])
    assert close(a2gnn.to_pixels(g, H[image], image), pixels[image])
    for b, graph in enumerate(g.graphs):
        h, w = graph.x.shape[:2]
        height, width = graph.size
        if nodes == "pixel":
            alone = a2gnn.cells_to_pixels(H[b:b + 1, :h, :w].permute(0, 3, 1, 2), args.stride, graph.size)
        else:
            alone = H[b, 0][graph.pixels].permute(2, 0, 1)[None]
        assert close(pixels[b:b + 1, :, :height, :width], alone)


@pytest.mark.parametrize("nodes", ["pixel", "superpixel"])
def test_a_batch_of_graphs_holds_each_graph(nodes):
    """Padding, seeds, boxes and node features of scenes that differ in size."""
    args, samples, g = scene_graphs(3, nodes=nodes)
    assert len({s.image.shape for s in samples}) == 3, "the scenes should differ in size"
    M = [len(s.boxes) for s in samples]
    assert g.boxes[:, 0].tolist() == [b for b, m in enumerate(M) for _ in range(m)]
    for b, s in enumerate(samples):
        height, width = s.mask.shape
        assert (g.seeds[b, height:] == 255).all() and (g.seeds[b, :, width:] == 255).all()
        own = g.classes[b]
        assert own.tolist() == [0, *np.flatnonzero(s.tags) + 1]
        seen = g.seeds[b, :height, :width].numpy()
        assert (own[seen[seen != 255]] == s.mask[seen != 255]).all() and 0.5 < (seen != 255).mean() < 0.8
        assert torch.equal(g.absent[b] == 0, torch.arange(g.absent.shape[1]) < len(own))
        boxes = [[b, own[c], *box] for image, c, *box in g.boxes.tolist() if image == b]
        assert boxes == [[b, *map(int, box)] for box in s.boxes.tolist()], "they lie on whole pixels"
        n = g.graphs[b].x.shape[0] * g.graphs[b].x.shape[1]
        assert g.nodes[b] == n == g.valid[b].sum()
        assert close(g.graphs[b].x.sum(-1), torch.ones(g.graphs[b].x.shape[:2]))
        if nodes == "pixel": assert (height + 3) // 4 * ((width + 3) // 4) == n
        else: assert n == g.graphs[b].pixels.max() + 1 == len(g.graphs[b].adjacent)


@pytest.mark.parametrize("nodes", ["pixel", "superpixel"])
def test_edges_and_colour_weights_of_a_scene(nodes):
    """Some nodes of the smaller of two scenes against all others, padding included."""
    args, samples, g = scene_graphs(2, nodes=nodes)
    b = int(g.nodes.argmin())
    graph, (h, w) = g.graphs[b], g.valid.shape[1:3]
    E, G = scattered(g.edges[b], g.window), scattered(g.G[b], g.reg_window)
    node = lambda i: divmod(i, w)  # noqa: E731
    own = [i for i in range(h * w) if g.valid[b][node(i)]]
    for i in own[::97]:
        for j in range(h * w):
            if j not in own:
                assert E[i, j] == G[i, j] == E[j, i] == 0
                continue
            m, n = node(i), node(j)
            D = np.exp(-(graph.f[m] - graph.f[n]).abs().mean().item())
            apart, rgb = graph.place[m] - graph.place[n], (graph.colour[m] - graph.colour[n]).pow(2).sum()
            weight = np.exp(-apart.pow(2).sum().item() / 72 - rgb.item() / 0.02)
            far = apart.abs().max()
            near = [graph.adjacent[i, j]] * 2 if nodes == "superpixel" else [far <= 4, far <= 5]
            assert E[i, j].item() == pytest.approx(D * near[0].item(), abs=1e-5)
            assert G[i, j].item() == pytest.approx(weight * near[1].item() * (i != j), abs=1e-5)


def test_superpixels_that_touch_are_neighbours():
    image = shapes(1)[0].image
    index, adjacent = a2gnn.superpixels(image, 60)
    assert index.shape == image.shape[:2] and np.unique(index).tolist() == list(range(len(adjacent)))
    expected = {(i, i) for i in range(len(adjacent))}
    for y, x in np.ndindex(*index.shape):
        for j in (index[y, x - 1] if x else index[y, x], index[y - 1, x] if y else index[y, x]):
            expected |= {(index[y, x], j), (j, index[y, x])}
    assert set(zip(*np.nonzero(adjacent), strict=True)) == expected
    assert 20 < len(adjacent) < 100


def test_superpixel_features_are_means_over_their_pixels():
    sample, net = shapes(1)[0], random_affinity_net()
    graph = a2gnn.image_to_graph(net, sample.image, 4, "superpixel", "affinity", torch.device("cpu"))
    fine = a2gnn.image_to_graph(net, sample.image, 4, "pixel", "affinity", torch.device("cpu"))
    pixels = a2gnn.cells_to_pixels(fine.f.permute(2, 0, 1)[None], 4, graph.size)[0]
    for n in (0, 3, graph.pixels.max().item()):
        assert close(graph.f[0, n], pixels[:, graph.pixels == n].mean(1))
    assert graph.f.shape[-1] == 448 and close(graph.x.sum(-1), torch.ones(graph.x.shape[:2]))


def test_random_walk_is_a_matrix_power():
    graph = random_graph(6, 9, 3)
    pairs = a2gnn.Pairs([graph], 3, euclidean=True)
    affinity = a2gnn.eq3_8_affinity(pairs.distance()) ** 8 * pairs.near
    A = scattered(affinity[0], pairs.window).double()
    T, score = A / A.sum(1, keepdim=True), torch.rand(1, 6, 9, 3)
    expected = torch.linalg.matrix_power(T, 64) @ score[0].flatten(0, 1).double()
    assert close(a2gnn.random_walk(score, affinity, pairs.window, 64)[0].flatten(0, 1), expected, atol=1e-4)


def test_walk_of_a_scene_stays_in_the_boxes_of_each_class():
    """At the start; after no step at all the labels are the CAM's inside the boxes."""
    args, sample = arguments(walk_steps=0), shapes(1)[0]
    net, cam = random_affinity_net(), np.zeros((8, *sample.mask.shape), np.float32)
    for k in np.flatnonzero(sample.tags): cam[k] = 0.9
    prob = a2gnn.walk_image(args, net, sample, cam, torch.device("cpu"))
    assert prob.shape == (9, *sample.mask.shape) and np.allclose(prob.sum(0), 1, atol=1e-5)
    label, allowed = prob[:, ::4, ::4].argmax(0), np.zeros(sample.mask.shape, bool)
    for box in sample.boxes: allowed[a2gnn.pixel_box(box, *sample.mask.shape)[1:]] = True
    assert ((label > 0) == allowed[::4, ::4]).all()


# ---------------------------------------------------------------- equals: SEAM


def test_minmax():
    cam = torch.tensor([[[-1.0, 1.0], [2.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]], [[-3.0, -1.0], [-2.0, -5.0]]])
    expected = [[[0, 1 / 3], [2 / 3, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert close(a2gnn.minmax(cam), expected, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_pixel_correlation(power):
    torch.manual_seed(1)                                                        # no two peaks on one pixel
    cam, feature = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 4, 5)
    out = a2gnn.pixel_correlation(cam, feature, power)
    for b in range(2):
        score = torch.relu(cam[b])
        low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
        score = (score - low) / (high - low)
        for i in np.ndindex(4, 5):
            total, weights = torch.zeros(4), 0
            for j in np.ndindex(4, 5):
                s = score[(slice(None), *j)]
                f = (feature[b][(slice(None), *n)] for n in (i, j))
                similar = max(0.0, F.cosine_similarity(*f, dim=0).item()) ** power
                voices = torch.cat([1 - s.max()[None], torch.where(s == s.max(), s, 0)])
                total, weights = total + similar * voices, weights + similar
            assert close(out[b][(slice(None), *i)], total / weights, atol=1e-4)


def test_background_beside_the_best_class():
    cam = torch.tensor([[[[0.9, 0.6, 0.0]], [[0.8, 0.7, 0.0]]]])
    assert close(a2gnn.beside_background(cam), [[[[0.1, 0.3, 1.0]], [[0.9, 0, 0]], [[0, 0.7, 0]]]])


def test_the_lowest_quarter_of_the_best_scores():
    cam = torch.rand(2, 3, 4, 5)
    lowest = [sorted(cam[b, :, y, x].max().item() for y in range(4) for x in range(5))[:5]
              for b in range(2)]
    assert close(a2gnn.lowest_quarter(cam), np.mean(lowest), atol=1e-6)
    assert a2gnn.lowest_quarter(cam[:, :, :1, :1]) == cam[:, :, :1, :1].amax(1).mean(), "one pixel at least"


def test_only_the_best_class_keeps_its_score():
    cam = torch.tensor([[[[0.9, 0.6, 0.3]], [[0.8, 0.7, 0.2]]]])
    assert close(a2gnn.best_only(cam), [[[[0.9, 0, 0.3]], [[0, 0.7, 0]]]])


def test_cross_regularisation_counts_the_largest_differences():
    difference = torch.tensor([[[[1.0, -5.0, 2.0, 0.0, 3.0]]], [[[0.0, 0.0, 0.0, 0.0, -1.0]]]])
    assert a2gnn.hardest(difference, 0.4).item() == pytest.approx((5 + 3 + 1 + 0) / 4)
    assert a2gnn.hardest(difference, 0.01).item() == pytest.approx((5 + 1) / 2), "one at least"


def test_seam_loss():
    torch.manual_seed(0)
    cams = [torch.randn(2, k, n, n) for k, n in ((3, 8), (4, 8), (3, 4), (4, 4))]
    cams[1], cams[3] = cams[1].abs(), cams[3].abs()                             # refined: means of [0,1]
    tags = torch.tensor([[1.0, 0, 1], [0, 1.0, 0]])
    loss_cls, loss_min, loss_er, loss_ecr = a2gnn.seam_loss(cams[:2], cams[2:], tags, 0.2)
    scores = [cams[i].mean((2, 3)).sigmoid() for i in (0, 2)]
    entropy = [-(tags * s.log() + (1 - tags) * (1 - s).log()).mean() for s in scores]
    assert close(loss_cls, sum(entropy) / 2)
    with_bg = F.pad(tags, (1, 0), value=1.0)
    lowest = [(cams[i] * with_bg[:, :, None, None])[:, 1:].amax(1).flatten(1).sort().values for i in (1, 3)]
    assert close(loss_min, (lowest[0][:, :16].mean() + lowest[1][:, :4].mean()) / 2)
    plain1, refined1, plain2, refined2 = (
        F.interpolate(a2gnn.minmax(cam), (4, 4), mode="bilinear", align_corners=False)
        * (tags if cam.shape[1] == 3 else with_bg)[:, :, None, None] for cam in cams)
    assert close(loss_er, (plain1 - plain2).abs().mean())
    # the largest 20 % of 64
    gaps = [(a2gnn.beside_background(plain) - refined).abs().flatten(1).sort().values[:, -12:]
            for plain, refined in ((plain2, refined1), (plain1, refined2))]
    assert close(loss_ecr, gaps[0].mean() + gaps[1].mean())
    assert a2gnn.seam_loss(cams[:2], cams[:2], tags, 0.2)[2] == 0


def test_seam_shapes_and_gradients():
    """Nothing of the refined map's loss reaches the CAM through the pixel-correlation module."""
    net = a2gnn.SEAM(make_backbone("tiny", "none", 4), 5)
    (cam, refined), (small, _) = net(torch.randn(2, 3, 32, 48), torch.randn(2, 3, 16, 24))
    assert cam.shape == (2, 5, 8, 12) and refined.shape == (2, 6, 8, 12) and small.shape == (2, 5, 4, 6)
    refined.sum().backward(retain_graph=True)
    assert net.classifier.weight.grad is None and net.embed.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.backbone.parameters())
    cam.sum().backward()
    assert net.classifier.weight.grad.abs().sum() > 0


def test_multi_scale_cam():
    net, sample = a2gnn.SEAM(make_backbone("tiny", "none", 4), 8).eval(), shapes(1)[0]
    cam = a2gnn.multi_scale_cam(net, sample.image, sample.tags, (0.5, 1.0), 4, torch.device("cpu"))
    assert cam.shape == (8, *sample.mask.shape) and cam.min() >= 0 and cam.max() <= 1
    assert not cam[~sample.tags].any() and (cam[sample.tags].max((1, 2)) > 0.9).all()
    none = a2gnn.multi_scale_cam(net, sample.image, sample.tags & False, (0.5, 1.0), 4, torch.device("cpu"))
    assert none.shape == cam.shape and not none.any()


def test_learning_rates_of_the_groups():
    net = nn.ModuleDict({"old": nn.Linear(2, 2), "new": nn.Linear(2, 3)})
    net["old"].bias.requires_grad_(False)
    groups = a2gnn.group_rates(net, [net["new"]], 0.1, 0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates == {id(net["old"].weight): 0.1, id(net["new"].weight): 1.0, id(net["new"].bias): 2.0}
    assert {group["weight_decay"] for group in groups} == {0.5}


def test_affinity_net_takes_the_last_three_blocks():
    net = random_affinity_net()
    F_A, X = net(torch.randn(2, 3, 32, 48), nodes=True)
    assert F_A.shape == (2, 448, 8, 12) and X.shape == (2, sum(net.backbone.channels[1:]), 8, 12)
    assert (X >= 0).all()
    assert [conv.out_channels for conv in net.narrow] == [64, 128, 256]


def test_the_control_of_seeds_and_crf():
    """A labelled pixel starts at 0.7, an unknown one is even, absent classes are out."""
    sample = types.SimpleNamespace(image=np.zeros((2, 3, 3), np.uint8), tags=np.array([True, False, True]))
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a2gnn, "dense_crf", lambda images, probs, *_, **__: seen.update(prob=probs[0]) or probs)
        label = a2gnn.seeds_with_crf(sample, label_map("01. 3.0"), None, "none", "cpu")
    expected = {0: [0.7, 0.15, 0.15], 1: [0.15, 0.7, 0.15], 3: [0.15, 0.15, 0.7], 255: [1 / 3] * 3}
    for i, j in np.ndindex(2, 3):
        assert np.allclose(seen["prob"][:, i, j], expected[label_map("01. 3.0")[i, j]])
    assert label[0, 0] == 0 and label[0, 1] == 1 and label[1, 0] == 3


# ---------------------------------------------------------------- scribbles, points, tags (3.6.1)


def two_halves():
    """A picture whose left half is dark and right half bright: no superpixel crosses the middle."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 220
    return image


def test_spread_fills_superpixels_of_one_class_only():
    image, label = two_halves(), np.full((40, 60), 255, np.uint8)
    label[20, 5:25] = 2
    label[10, 45] = 0
    out = a2gnn.spread(label, image, 8)
    index, _ = a2gnn.superpixels(image, 8)
    for i in range(index.max() + 1):
        known = set(label[(index == i) & (label != 255)].tolist())
        assert (out[index == i] == (known.pop() if len(known) == 1 else 255)).all()
    assert (out == 2).sum() > 60 and (out == 0).sum() > 10 and (out[:, :30] != 0).all()
    label[20, 6] = 1                                            # two classes in one superpixel
    out = a2gnn.spread(label, image, 2)
    assert (out[:, :30] == 255).sum() == 40 * 30 - 20 and out[20, 6] == 1 and out[20, 7] == 2


def test_clicks_are_pixels_of_the_picture():
    label = a2gnn.clicks(np.array([[3, 2.9, 1.2], [1, 60.0, 39.9]]), 40, 60)
    assert label[1, 2] == 3 and label[39, 59] == 1 and (label != 255).sum() == 2


@pytest.mark.parametrize("supervision", ["scribble", "point", "image"])
def test_weak_seeds(supervision):
    args = types.SimpleNamespace(supervision=supervision, superpixels=8)
    scribble = np.full((40, 60), 255, np.uint8)
    scribble[20, 5:25] = 2
    sample = types.SimpleNamespace(image=two_halves(), scribble=scribble, points=np.array([[2, 10.0, 20.0]]))
    M_I, sure = np.full((40, 60), 1, np.uint8), np.full((40, 60), 255, np.uint8)
    sure[:, :10], sure[:, 50:] = 1, 0
    labels = a2gnn.weak_seeds(args, sample, M_I, sure, None)
    if supervision == "image":
        assert (labels["seeds_F"] == M_I).all() and (labels["seeds"] == sure).all() and len(labels) == 2
        return
    weak = labels["seeds_F"]
    assert (weak == 2).any() and set(np.unique(weak)) == {2, 255}
    merged = np.where(weak == 255, sure, weak)
    expected = {"scribble": (merged, weak), "point": (sure, merged)}[supervision]
    assert (labels["seeds"] == expected[0]).all() and (labels["seeds_gnn"] == expected[1]).all()


# ---------------------------------------------------------------- batch


def labels_of(g, probs):
    """What write_pseudo would save without CRF: one (H,W) array per graph."""
    return [own[p[:, :H, :W].argmax(0).numpy()]
            for own, p, (H, W) in zip(g.classes, probs, g.sizes, strict=True)]


def test_images_side_by_side_get_the_labels_they_get_alone():
    """--batch-images 1 and 4: the same parameters, dropout and losses for each image."""
    samples, net, labels = shapes(4), random_affinity_net(), {}
    args = arguments(hidden=16, epochs=(12, 4), gnn_lr=0.1)
    with ThreadPoolExecutor(1) as pool:
        seeds = [a2gnn.box_seeds(s, s.mask, s.mask, 1, 0.15, pool)[1] for s in samples]
    for size in (1, 4):
        for start in range(0, 4, size):
            part, names = samples[start:start + size], [s.name for s in samples[start:start + size]]
            g = a2gnn.make_graphs(args, net, part, seeds[start:start + size], torch.device("cpu"))
            for s, label in zip(part, labels_of(g, a2gnn.train_gnn(args, g, names)), strict=True):
                labels[size, s.name] = label
    one, four = (np.concatenate([labels[size, s.name].flatten() for s in samples]) for size in (1, 4))
    assert (one == four).mean() >= 0.999 and len(np.unique(one)) > 3


def test_an_image_without_boxes_is_background():
    """Beside one with boxes and alone."""
    samples, net, device = shapes(2), random_affinity_net(), torch.device("cpu")
    samples[1] = types.SimpleNamespace(**{**vars(samples[1]), "boxes": np.zeros((0, 5), np.float32),
                                          "tags": np.zeros(8, bool)})
    args = arguments(hidden=8, epochs=(3, 3), gnn_lr=0.1)
    seeds = [samples[0].mask, np.zeros_like(samples[1].mask)]
    for first in (0, 1):
        g = a2gnn.make_graphs(args, net, samples[first:], seeds[first:], device)
        probs = a2gnn.train_gnn(args, g, [s.name for s in samples[first:]])
        assert torch.isfinite(probs).all() and (labels_of(g, probs)[-1] == 0).all()


# ---------------------------------------------------------------- instances


def test_instances_in_boxes_by_hand():
    label = label_map("11220 11220 11110 00000")
    boxes = np.array([[1, 0, 0, 5, 3], [1, 1, 1, 3, 4], [2, 2, 0, 5, 2], [2, 0, 0, 2, 2]], np.float32)
    large, small, other, nothing = a2gnn.instances_in_boxes(label, boxes)
    assert (small == mask_of("00000 01000 01100 00000")).all(), "the smaller of two boxes of a class"
    assert (large == mask_of("11000 10000 10010 00000")).all()
    assert (other == mask_of("00110 00110 00000 00000")).all() and not nothing.any()
    assert a2gnn.instances_in_boxes(label, boxes[:0]).shape == (0, 4, 5)


def test_pseudo_instances_of_true_labels_are_the_objects():
    """From true labels only what two boxes of one class share can go wrong."""
    for s in shapes(12):
        masks = a2gnn.instances_in_boxes(s.mask, s.boxes)
        for k, (box, mask) in enumerate(zip(s.boxes, masks)):
            _, rows, columns = a2gnn.pixel_box(box, *s.mask.shape)
            assert (s.mask[mask] == box[0]).all() and mask.sum() == mask[rows, columns].sum()
            alone = all(i == k or other[0] != box[0] for i, other in enumerate(s.boxes))
            if alone: assert (mask == (s.mask == box[0])).all()


def written_instances(folder, s):
    masks = a2gnn.instances_in_boxes(s.mask, s.boxes)
    common.save_instances(folder / f"{s.name}.npz", masks, s.boxes[:, 0].astype(int), masks.any((1, 2)))
    return masks


@pytest.mark.parametrize("weak", [True, False])
def test_targets_keep_boxes_masks_and_classes_together(weak, tmp_path):
    """Through flip, scaling and padding; the second image has a box without pixels and one of no object."""
    samples = shapes(8)[5:8]
    samples[1].boxes = np.vstack([[[3, 0, 0, 9, 9]], samples[1].boxes]).astype(np.float32)
    samples[2].boxes = samples[2].boxes[:0]
    samples[2].mask, samples[2].instances = np.zeros((2, *samples[2].mask.shape), np.uint8)
    for s in samples: written_instances(tmp_path, s)
    objects = a2gnn.Objects(samples, tmp_path if weak else None)
    generator, size, batch = np.random.default_rng(0), 150, []
    for i in range(3):
        s = data.flip(objects[i])
        assert not hasattr(s, "mask") and set(np.unique(s.instances)) <= {*range(len(s.boxes) + 1)}
        batch.append(data.normalise(data.crop(data.resize_long(s, size), size, generator)))
    batch = data.collate(batch)
    targets = a2gnn.detector_targets(batch)
    assert len(targets[2]["boxes"]) == 0 and targets[2]["masks"].shape == (0, size, size)
    for s, target in zip(samples[:2], targets):
        real = [c for c, mask in data.objects_of(s.mask, s.instances)]
        assert sorted(target["labels"].tolist()) == sorted(real), "the box without pixels is left out"
        for (x0, y0, x1, y1), mask in zip(target["boxes"], target["masks"]):
            y, x = (axis.float() for axis in mask.nonzero().unbind(1))
            assert x.min() > x0 - 3 and x.max() < x1 + 3 and y.min() > y0 - 3 and y.max() < y1 + 3
            if not weak: assert x.max() - x.min() > x1 - x0 - 4 and y.max() - y.min() > y1 - y0 - 4
        assert target["masks"].sum(0).max() == 1 and target["masks"].dtype == torch.uint8


def test_final_masks_are_refined_and_never_lost():
    image = np.full((40, 60, 3), 30, np.uint8)
    image[10:30, 10:40] = 200
    soft = np.zeros((2, 40, 60), np.float32)
    soft[0, 8:32, 8:42] = 0.6                                               # two pixels too large all around
    soft[1, 20, 50] = 0.51                                                  # one pixel of the background
    masks = a2gnn.refine_instances(image, soft, a2gnn.CRF(2, 3, 50, 5, 10, 10), "torch", "cpu")
    assert (masks[0] == (image[..., 0] == 200)).all() and (masks[1] == (soft[1] > 0.5)).all()
    assert (a2gnn.refine_instances(image, soft, a2gnn.CRF(2, 3, 50, 5, 10, 10), "none", "cpu")
            == (soft > 0.5)).all()
    assert a2gnn.refine_instances(image, soft[:0], None, "torch", "cpu").shape == (0, 40, 60)


class Scenes(list):
    """Samples as a data set of 8 classes."""
    classes, source = [f"class {k}" for k in range(1, 9)], None


def test_coco_aps_by_hand():
    """True masks 100; every other one missed: half of the recall points (101 of them, from 0 to 1)."""
    scenes = Scenes(shapes(6))
    objects = {s.name: data.objects_of(s.mask, s.instances) for s in scenes}

    def read(name, keep=lambda k: True, shrink=0):
        own = [(c, mask) for k, (c, mask) in enumerate(objects[name]) if keep(k)]
        masks = [mask & (np.cumsum(mask).reshape(mask.shape) > shrink * mask.sum()) for _, mask in own]
        return np.array(masks), np.array([c for c, _ in own]), np.ones(len(own))

    perfect = a2gnn.coco_aps(scenes, read)
    assert perfect["ap"] == perfect["ap50_coco"] == perfect["ap75_coco"] == 100 and perfect["ap_l"] is None
    areas = [mask.sum() for own in objects.values() for _, mask in own]
    assert (perfect["ap_s"] is None) == (min(areas) >= 32**2) and max(areas) < 96**2
    shrunk = a2gnn.coco_aps(scenes, lambda name: read(name, shrink=0.28))            # IoU of about 0.72
    assert shrunk["ap50_coco"] == 100 and shrunk["ap75_coco"] == 0 and round(shrunk["ap"]) == 50
    two = next(s for s in scenes if len(objects[s.name]) > 1)
    if len({c for c, _ in objects[two.name]}) > 1:
        half = a2gnn.coco_aps(Scenes([two]), lambda name: read(name, keep=lambda k: k == 0))
        assert 0 < half["ap"] < 100
    nothing = a2gnn.coco_aps(scenes, lambda name: read(name, keep=lambda k: False))
    assert nothing["ap"] == 0


def test_coco_aps_know_the_crowds_of_the_file(tmp_path):
    """A detection inside a crowd is no mistake, the same one outside is."""
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / split / "a.jpg")
        made = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 0, 5, 10], "area": 50, "iscrowd": 0,
                 "segmentation": [[10, 0, 15, 0, 15, 10, 10, 10]]},
                {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 6, 10], "area": 60, "iscrowd": 1,
                 "segmentation": {"size": [10, 20], "counts": [0, 60, 140]}}]
        image = {"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(
            {"images": [image], "annotations": made, "categories": [{"id": 1, "name": "person"}]}))
    truth = load(arguments(data="coco", root=str(tmp_path)), "val")
    for first, ap in ((0, 100), (15, 50)):
        masks = np.zeros((2, 10, 20), bool)
        masks[0, :, first:first + 5], masks[1, :, 10:15] = True, True
        values = a2gnn.coco_aps(truth, lambda name, m=masks: (m, np.array([1, 1]), np.array([0.9, 0.8])))
        assert round(values["ap"]) == ap


# ---------------------------------------------------------------- runs

TINY = """a2gnn.py --preset shapes --workers 0 --device cpu --cam-steps 4 --cam-warmup 2 --cam-batch 4
    --cam-crop 48 --cam-resize 48 64 --cam-scales 0.5 1 --aff-steps 8 --aff-batch 4 --hidden 8
    --epochs 2 2 --batch-images 2 --seg-steps 4 --seg-batch 4 --seg-crop 48 --test-scales 1 --inst-steps 4
    --inst-batch 2 --inst-size 64 --inst-width 16 --inst-rois 16 --save-every 2 --log-every 2""".split()
STAGES = ["cam", "seed", "walk", "pseudo", "val", "val_crf"]
FOLDERS = ["seeds_F", "seeds", "walk", "walk_crf", "pseudo_raw", "pseudo", "val", "val_crf"]


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


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A run by boxes from beginning to end."""
    out = tmp_path_factory.mktemp("finished")
    sh(*command(folders, out))
    return out


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        a2gnn.main()


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    """The numbers of results.json without times and memory."""
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages(out)]


def contents(out, *parts):
    """{path: bytes} of a run folder's files, of some folders only when parts are given."""
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.name != ".lock"]
    named = {str(f.relative_to(out)): f.read_bytes() for f in files}
    return {name: data for name, data in named.items() if not parts or name.split("/")[0] in parts}


def test_runs_by_boxes(finished):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 6 and s["uses_masks"] and 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        assert s["split"] == ("val" if s["stage"].startswith("val") else "train") and s["seconds"] >= 0
    assert [s["stage"] for s in entries if s["crf"]] == ["seed", "pseudo", "val_crf"]
    seed, walk, pseudo = entries[1:4]
    assert 0 <= seed["coverage_confident"] <= seed["coverage"] <= 100 and 0 <= seed["precision"] <= 100
    assert {"miou_crf_control", "miou_confident"} <= set(seed)
    assert "miou_crf" in walk and "miou_no_crf" in pseudo


def test_a_run_writes_palette_labels_panels_and_checkpoints(finished):
    for folder in FOLDERS:
        files = sorted((finished / folder).glob("*.png"))
        assert len(files) == 6
        for file in files:
            with Image.open(file) as image:
                assert image.mode == "P" and image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
                unknown = {255} if folder.startswith("seeds") else set()
                assert set(np.unique(np.asarray(image))) <= {*range(9)} | unknown
    for name in ("train", "val"):
        with Image.open(finished / "panels" / f"{name}.png") as image:
            assert image.width > 500 and image.height > 6 * 150
    for stage in ("classifier", "affinity", "segmenter"):
        assert torch.load(finished / f"{stage}.pt", weights_only=True)["step"] in (4, 8)
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in lines} == {"classifier", "affinity", "segmenter"}
    assert all(np.isfinite(list(entry.values())[1:]).all() for entry in lines)
    assert all(entry["loss_ar"] > 0 and entry["known"] > 0 for entry in lines if entry["stage"] == "affinity")


def test_pseudo_labels_name_only_classes_of_the_image(finished, folders):
    tags = json.loads((folders["workpiece"] / "train" / "tags.json").read_text())
    classes = (folders["workpiece"] / "classes.txt").read_text().split()
    for name, present in tags.items():
        for folder in ("walk", "pseudo_raw", "pseudo"):
            with Image.open(finished / folder / f"{name}.png") as image:
                assert set(np.unique(np.asarray(image))) <= {0, *(classes.index(c) + 1 for c in present)}


def test_the_same_command_again_does_nothing(finished, folders):
    before, numbers = contents(finished), scores(finished)
    written = {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.suffix in (".pt", ".npz")}
    written |= {f: f.stat().st_mtime_ns for folder in FOLDERS for f in (finished / folder).iterdir()}
    run_here(*command(folders, finished))
    after = contents(finished)
    assert set(after) == set(before) and scores(finished) == numbers
    clocks = {"results.json", "state.json"}                # seconds and peak memory
    assert {name for name in after if after[name] != before[name]} <= clocks
    assert all(f.stat().st_mtime_ns == time for f, time in written.items())


def test_runs_on_full_masks(folders, tmp_path):
    sh(*command(folders, tmp_path, supervision="full", seg_steps=2))
    assert [s["stage"] for s in stages(tmp_path)] == ["val", "val_crf"]
    assert not any((tmp_path / name).exists() for name in ("cam", "seeds", "pseudo", "classifier.pt"))
    assert (tmp_path / "panels" / "val.png").exists() and len(list((tmp_path / "val_crf").iterdir())) == 6


@pytest.mark.parametrize("supervision", ["scribble", "point", "image"])
def test_runs_without_boxes(supervision, folders, tmp_path):
    few = dict(supervision=supervision, cam_steps=2, aff_steps=2, seg_steps=2, crf="none")
    run_here(*command(folders, tmp_path, **few))
    assert [s["stage"] for s in stages(tmp_path)] == STAGES
    nodes = sorted((tmp_path / "seeds_gnn").glob("*.png"))
    assert len(nodes) == (0 if supervision == "image" else 6)


@pytest.mark.parametrize("supervision", ["point", "image"])
def test_a_large_share_of_the_walk_decides_alone(supervision, folders, tmp_path):
    few = dict(supervision=supervision, cam_steps=2, aff_steps=2, seg_steps=2, crf="none")
    walk = ["--point-walk"] if supervision == "point" else []
    run_here(*command(folders, tmp_path, walk_share=1e6, **few), *walk)
    for file in sorted((tmp_path / "walk").glob("*.png")):
        label, alone = read_label(tmp_path / "pseudo_raw" / file.name), read_label(file)
        assert (label == alone).mean() > 0.99


def test_predicts_a_folder_and_a_picture(finished, folders, tmp_path):
    pictures = folders["workpiece"] / "val" / "images"
    few = tmp_path / "photos"
    few.mkdir()
    for file in sorted(pictures.iterdir())[:2]: shutil.copy(file, few)
    checkpoint = finished / "segmenter.pt"
    run_here("a2gnn.py", "--predict", few, "--checkpoint", checkpoint, "--out", tmp_path / "p",
             "--test-scales", 1, "--workers", 0)
    for file in few.iterdir():
        label = read_label(tmp_path / "p" / "predict" / file.name, 8, read_image(file))
        assert (label == read_label(finished / "val_crf" / file.name)).all(), "the run's own prediction"
        overlays = [f for f in (tmp_path / "p" / "predict").iterdir() if f.stem.startswith(file.stem)]
        assert len(overlays) == 2
    for missing in ((), ("--checkpoint", tmp_path / "none.pt")):
        with pytest.raises(SystemExit, match="checkpoint"):
            run_here("a2gnn.py", "--predict", few, "--out", tmp_path / "q", *missing)


@pytest.fixture(scope="module")
def instances(finished, folders, tmp_path_factory):
    """A run of --task instance that takes the stages before the detector from the first run."""
    out = tmp_path_factory.mktemp("instances")
    run_here(*command(folders, out, task="instance", reuse=finished))
    return out


def test_runs_for_instances(instances, finished):
    entries = stages(instances)
    assert [s["stage"] for s in entries] == [*STAGES[:4], "pseudo_instance", "val_instance"]
    for s in entries[4:]:
        assert s["n_images"] == 6 and s["uses_masks"] and s["crf"] and s["seconds"] >= 0
        keys = {"ap50", "ap70", "ap75", "ap", "ap50_coco", "ap75_coco", "ap_s", "ap_m", "ap_l"}
        assert keys <= set(s) and all(0 <= s[key] <= 100 for key in keys - {"ap_s", "ap_m", "ap_l"})
    assert "ap50_no_crf" in entries[5]
    assert scores(instances)[:4] == scores(finished)[:4] and not (instances / "segmenter.pt").exists()
    for folder in ("instances", "val_instance", "val_instance_crf"):
        assert len(list((instances / folder).glob("*.npz"))) == 6
    for name in ("train", "val"):
        with Image.open(instances / "panels" / f"{name}.png") as image: assert image.height > 6 * 150
    assert torch.load(instances / "detector.pt", weights_only=True)["step"] == 4
    lines = [json.loads(line) for line in (instances / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"detector"} and "loss_mask" in lines[0]


def test_pseudo_instances_are_the_labels_in_the_boxes(instances, folders):
    train = load(arguments(data="workpiece", root=str(folders["workpiece"])), "train")
    for s in train:
        masks, classes, scores = common.read_instances(instances / "instances" / f"{s.name}.npz")
        label = read_label(instances / "pseudo" / f"{s.name}.png")
        assert (classes == s.boxes[:, 0]).all() and (scores == masks.any((1, 2))).all()
        assert (masks == a2gnn.instances_in_boxes(label, s.boxes)).all()


def test_a_killed_instance_run_ends_like_an_undisturbed_one(instances, finished, folders, tmp_path):
    line = command(folders, tmp_path, task="instance", reuse=finished)
    kill_when(lambda: (tmp_path / "detector.pt").exists(), *line)
    run_here(*line)
    assert scores(tmp_path) == scores(instances)
    parts = ("instances", "val_instance", "val_instance_crf")
    assert contents(tmp_path, *parts) == contents(instances, *parts)


def test_instances_on_full_masks_and_predicted(folders, tmp_path):
    """Also in the COCO layout, whose own annotations are the ground truth."""
    export("shapes", "coco", str(tmp_path / "coco"), n=3)
    run_here(*command({"coco": tmp_path / "coco"}, tmp_path / "run", "coco", task="instance",
                      supervision="full", inst_steps=2))
    assert [(s["stage"], s["n_images"]) for s in stages(tmp_path / "run")] == [("val_instance", 3)]
    picture = sorted((tmp_path / "coco" / "val2017").iterdir())[0]
    run_here("a2gnn.py", "--predict", picture, "--checkpoint", tmp_path / "run" / "detector.pt", "--out",
             tmp_path / "p", "--device", "cpu")
    mine, theirs = (common.read_instances(folder / f"{picture.stem}.npz") for folder in
                    (tmp_path / "p" / "predict", tmp_path / "run" / "val_instance_crf"))
    assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))
    label = read_label(tmp_path / "p" / "predict" / f"{picture.stem}.png", None, read_image(picture))
    assert (label == common.numbered(mine[0][mine[2] >= 0.5], mine[2][mine[2] >= 0.5])).all()
    assert (tmp_path / "p" / "predict" / f"{picture.stem}_overlay.png").exists()


@pytest.mark.parametrize("supervision", ["scribble", "point", "image"])
def test_instances_need_boxes(supervision, folders, tmp_path):
    with pytest.raises(SystemExit, match="needs boxes"):
        run_here(*command(folders, tmp_path, task="instance", supervision=supervision))


def test_pspnet_runs_and_predicts(folders, tmp_path):
    run_here(*command(folders, tmp_path, supervision="full", segmenter="pspnet", seg_steps=2))
    state = torch.load(tmp_path / "segmenter.pt", weights_only=True)
    assert any(key.startswith("auxiliary") for key in state["model"])
    assert sum(len(g["params"]) for g in state["optim"]["param_groups"]) == len(state["optim"]["state"])
    picture = sorted((folders["workpiece"] / "val" / "images").iterdir())[0]
    run_here("a2gnn.py", "--predict", picture, "--checkpoint", tmp_path / "segmenter.pt", "--out",
             tmp_path / "p", "--device", "cpu")
    label = read_label(tmp_path / "p" / "predict" / picture.name)
    assert (label == read_label(tmp_path / "val_crf" / picture.name)).all()


def test_predict_takes_no_other_checkpoint(finished, folders, tmp_path):
    with pytest.raises(SystemExit, match="not the segmenter.pt or detector.pt"):
        run_here("a2gnn.py", "--predict", folders["workpiece"], "--checkpoint", finished / "classifier.pt")


def test_runs_with_the_ablation_flags(folders, tmp_path):
    """Superpixels, distances, full graph, GAT, the authors' variants; in the VOC layout, with few steps."""
    flags = dict(nodes="superpixel", edges="distance", radius=0, gnn="gat", consistency_cosine="literal",
                 seed_labels="M_F", aff_labels="M_F", train_on="walk_crf", cam_steps=2, aff_steps=2,
                 seg_steps=2, crf="none")
    switches = ["--consistency-in-place", "--balanced-ce", "--split-positives", "--no-affinity-reg",
                "--no-reg", "--no-mp-feature"]
    run_here(*command(folders, tmp_path, "voc", **flags), *switches)
    assert [s["stage"] for s in stages(tmp_path)] == STAGES
    assert all((tmp_path / "pseudo" / f.name).read_bytes() == f.read_bytes()
               for f in (tmp_path / "pseudo_raw").iterdir()), "without CRF both are the same"


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folders, tmp_path):
    """kill -9 while the affinity CNN trains, and again while labels are written."""
    line = command(folders, tmp_path)
    kill_when(lambda: (tmp_path / "affinity.pt").exists(), *line)
    assert torch.load(tmp_path / "affinity.pt", weights_only=True)["step"] < 8
    kill_when(lambda: any((tmp_path / "pseudo").glob("*.png")), *line)
    assert 0 < len(list((tmp_path / "pseudo").glob("*.png"))) < 6
    sh(*line)
    assert scores(tmp_path) == scores(finished)
    labels = contents(finished, *FOLDERS)
    assert contents(tmp_path, *FOLDERS) == labels and len(labels) == 6 * len(FOLDERS)


def test_reuse_takes_over_stages_with_all_their_files(finished, folders, tmp_path):
    """Another --epochs: everything before the GNN comes from the first run, nothing of it is done again."""
    run_here(*command(folders, tmp_path, epochs="1 1", reuse=finished))
    same = ("cam", "seeds_F", "seeds", "walk", "walk_crf", "classifier.pt", "affinity.pt")
    assert contents(tmp_path, *same) == contents(finished, *same)
    assert {"loss_cls", "loss_ac"}.isdisjoint((tmp_path / "log.jsonl").read_text().replace('"', " ").split())
    assert [s["stage"] for s in stages(tmp_path)] == STAGES


TWO = """
import runpy, sys, torch, a2gnn, common
from common import make_backbone, rank, world

torch.set_num_threads(1)
common.start_processes("cpu")
torch.manual_seed(0)
class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = a2gnn.AffinityNet(make_backbone("tiny", "none", 4, frozen_bn=True))
        self.head = torch.nn.Conv2d(448, 3, 1)
    def forward(self, image):
        feature = self.net(image)
        return feature, self.head(feature)
def gradients():                        # a function, as a net in DDP that outlives it keeps gloo's threads
    both = Both().train()
    image, seed = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 8, 8))
    seed[0], seed[1, :, 1:], seed[2, ::2] = 255, 255, 255              # very different numbers of labels
    mine, offsets = slice(rank() * 4 // world(), (rank() + 1) * 4 // world()), a2gnn.window_offsets(2)
    ddp = common.distribute(both)
    feature, logits = ddp(image[mine])
    distance = a2gnn.PairDistance.apply(feature.permute(0, 2, 3, 1).contiguous(), offsets)
    label, first = a2gnn.eq3_6_7_pair_labels(seed[mine], offsets)
    loss = sum(a2gnn.eq3_10_affinity_loss(distance, label, first, split) for split in (False, True))
    colour = image[mine, :, ::4, ::4].permute(0, 2, 3, 1)
    real = colour[..., 0] > -0.5
    loss = loss + 3 * a2gnn.eq3_12_affinity_regularised(distance, colour, real, offsets, 6.0, 0.1)
    entropy = torch.nn.functional.cross_entropy(logits, seed[mine], ignore_index=255, reduction="none")
    (loss + a2gnn.masked_mean(entropy, seed[mine] != 255)).backward()
    return [p.grad for p in both.parameters() if p.requires_grad]
grads = gradients()
if world() > 1:
    if rank() == 0: torch.save(grads, sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
PARTS = ["cam", "seeds_F", "seeds", "walk", "walk_crf", "pseudo_raw", "pseudo", "panels"]


@pytest.fixture(scope="module")
def two_processes(finished, folders, tmp_path_factory):
    """torchrun: gradients of one step, then all labels anew from the finished run's checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO)
    ignore = shutil.ignore_patterns(*PARTS, "results.json", "events*")
    shutil.copytree(finished, folder / "run", ignore=ignore)
    script, *flags = command(folders, folder / "run")
    sh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "two.py",
       folder / "grads.pt", ROOT / script, *flags)
    return folder


def test_two_processes_write_the_same_labels(finished, two_processes):
    """Byte by byte what one process wrote, and the same numbers."""
    labels = contents(finished, *PARTS)
    assert contents(two_processes / "run", *PARTS) == labels and len(labels) == 7 * 6 + 2
    assert scores(two_processes / "run") == scores(finished)


def test_gradients_of_two_processes_are_those_of_one(two_processes):
    """The affinity losses and the masked cross entropy at the same global batch, batch norms frozen."""
    one = runpy.run_path(str(two_processes / "two.py"))["grads"]
    two = torch.load(two_processes / "grads.pt", weights_only=True)
    assert len(one) == len(two) > 10
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max()) and a.abs().max() > 0


# ---------------------------------------------------------------- learns


def weak_seeds(sample, i):
    """Background outside the boxes, a disc of 15 % of each object, and in each box a wrong spot."""
    rng, M_g = np.random.default_rng(i), np.zeros(sample.mask.shape, np.uint8)
    y, x = np.mgrid[:M_g.shape[0], :M_g.shape[1]]
    areas = [a2gnn.pixel_box(box, *M_g.shape) for box in sample.boxes]
    for _, rows, columns in areas: M_g[rows, columns] = 255

    def spot(region, label):
        centre = rng.choice(np.argwhere(region))
        distance = (y - centre[0])**2 + (x - centre[1])**2
        M_g[region & (distance <= np.quantile(distance[region], 0.15))] = label

    for k in range(1, len(areas) + 1):
        region = sample.instances == k
        if region.any(): spot(region, sample.mask[region][0])
    for c, rows, columns in areas:
        region = np.zeros(M_g.shape, bool)
        region[rows, columns] = sample.mask[rows, columns] == 0
        if region.sum() > 20: spot(region, c)
    return M_g


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six scenes, weak seeds with wrong spots, and an affinity CNN trained on them for some seconds."""
    out, samples = tmp_path_factory.mktemp("trained"), shapes(6)
    (out / "names.txt").write_text("".join(f"{s.name}\n" for s in samples))
    args = arguments(out=str(out), train_list=str(out / "names.txt"), workers=0, device="cpu", aff_steps=20,
                     aff_batch=4, aff_momentum=0.9, epochs=(15, 15), hidden=32, gnn_lr=0.1)
    run, seeds = Run(args), [weak_seeds(s, i) for i, s in enumerate(samples)]
    for s, seed in zip(samples, seeds, strict=True): save_label(run.path("seeds", s.name), seed)
    torch.manual_seed(0)
    classifier = a2gnn.SEAM(make_backbone("tiny", "none", 8), 8)
    net = a2gnn.train_affinity(args, run, classifier, load(args, "train"))
    return types.SimpleNamespace(args=args, samples=samples, seeds=seeds, net=net)


def miou(samples, labels):
    confusion = ConfusionMatrix(range(9))
    for s, label in zip(samples, labels, strict=True): confusion.add(label, s.mask)
    return confusion.miou()


def gnn_labels(t, **changes):
    """Labels of one A²GNN per scene."""
    args = dataclasses.replace(t.args, **changes)
    g = a2gnn.make_graphs(args, t.net, t.samples, t.seeds, torch.device("cpu"))
    return labels_of(g, a2gnn.train_gnn(args, g, [s.name for s in t.samples]))


def test_the_affinity_cnn_learns(trained):
    """After training, neighbours of one class are more alike than those of two, by the true masks."""
    gaps = []
    for net in (random_affinity_net(), trained.net):
        apart = {0: [], 1: []}
        for s in trained.samples:
            graph = a2gnn.image_to_graph(net, s.image, 4, "pixel", "affinity", torch.device("cpu"))
            offsets = a2gnn.window_offsets(3)
            label, _ = a2gnn.eq3_6_7_pair_labels(torch.from_numpy(s.mask).long()[None, ::4, ::4], offsets)
            D = a2gnn.eq3_8_affinity(a2gnn.PairDistance.apply(graph.f[None], offsets))
            for same in (0, 1): apart[same].append(D[label == same])
        gaps.append(torch.cat(apart[1]).mean() - torch.cat(apart[0]).mean())
    assert gaps[1] > gaps[0] + 0.1


def test_labels_beat_their_seeds_and_the_multi_point_loss_does_it(trained):
    """So few foreground seeds lose against background in Eq. (3.21); the boxes' points bring them back."""
    seeds = miou(trained.samples, trained.seeds)
    labels, without = (miou(trained.samples, gnn_labels(trained, mp_loss=on)) for on in (True, False))
    assert labels > seeds + 15 and labels > without + 15, (seeds, labels, without)


def test_the_consistency_check_finds_wrong_seeds(trained, monkeypatch):
    """Of the wrong foreground seeds a far larger share goes than of the right ones, in the second phase."""
    seen, check = [], a2gnn.eq3_28_consistency

    def watched(seeds, *rest):
        seen.append((seeds, check(seeds, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(a2gnn, "eq3_28_consistency", watched)
    gnn_labels(trained)
    assert len(seen) == trained.args.epochs[1]
    classes = [np.concatenate([[0], np.flatnonzero(s.tags) + 1]) for s in trained.samples]
    gone = {True: [], False: []}
    for before, after in seen[-5:]:
        for b, s in enumerate(trained.samples):
            seed, left = (t[b, :s.mask.shape[0], :s.mask.shape[1]].numpy() for t in (before, after))
            known = trained.seeds[b] != 255
            seed = np.where(seed == 255, 255, classes[b][np.minimum(seed, len(classes[b]) - 1)])
            left = np.where(left == 255, 255, seed)
            assert (seed == trained.seeds[b])[known].all(), "each epoch starts from all seeds"
            for right in (True, False):
                which = (seed > 0) & (seed < 255) & ((seed == s.mask) == right)
                gone[right].append((left != seed)[which])
    right, wrong = (np.concatenate(gone[r]).mean() for r in (True, False))
    assert wrong > 0.15 and wrong > 2 * right, (wrong, right)


def test_mask_rcnn_learns_from_pseudo_instances(tmp_path):
    """Two scenes: after some steps it finds their objects' masks better than at the start."""
    samples = shapes(2)
    (tmp_path / "names.txt").write_text("".join(f"{s.name}\n" for s in samples))
    args = arguments(task="instance", out=str(tmp_path), train_list=str(tmp_path / "names.txt"), workers=0,
                     device="cpu", inst_steps=40, inst_batch=2, inst_warmup=5, inst_size=96, inst_width=16,
                     inst_rois=16, log_every=1)
    run = Run(args)
    (tmp_path / "instances").mkdir()
    for s in samples: written_instances(tmp_path / "instances", s)
    a2gnn.train_detector(args, run, load(args, "train"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for key in ("loss_mask", "loss_classifier", "loss_objectness"):
        losses = [line[key] for line in lines]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), (key, losses)
