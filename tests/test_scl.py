"""scl.py: each equation against an authority, the episodes, the script on few scenes, and what it learns."""

import dataclasses
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scl
from common import UserError, save_image, save_label
from conftest import kill_when, sh
from data import DataError, Sample, class_mask, collate, draw_scene, export, read_image, read_label

torch.set_num_threads(1)


def arguments(**changes):
    args = scl.Args(**{**scl.SHAPES, "width": 8, "seg_crop": 33, "episodes": 4, "shots": (1, 3), **changes})
    scl.settle_scl(args)
    return args


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    net = scl.make_scl(arguments(**changes), "none").eval()
    net.backbone.freeze()
    return net


def episode(count=2, size=33, seed=0):
    """Images (2·count,3,size,size), masks of one disc each."""
    torch.manual_seed(seed)
    masks = torch.zeros(2 * count, size, size, dtype=torch.long)
    for i in range(2 * count): masks[i, 4 + i:20 + i, 6:24] = 1
    masks[:, 0] = 255
    return torch.randn(2 * count, 3, size, size) + 2 * (masks == 1)[:, None], masks


def supports(net, K=3, size=33):
    """K supports, each encoded by itself, as the test does."""
    args, scenes = arguments(), [draw_scene(0, "train", i) for i in range(K)]
    one = [scl.encode_support(args, net, s.image, (s.mask > 0).astype(np.uint8), "cpu") for s in scenes]
    return scl.together(one), scenes


# ---------------------------------------------------------------- equals: support vectors, Eqs. (5.1)–(5.6)


def test_eqs_1_5_6_by_a_double_loop():
    torch.manual_seed(0)
    feature, M, hat = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) > 0.5, torch.rand(2, 4, 5) > 0.5
    pri, aux = scl.eq5_5_6_primary_auxiliary(feature, M, hat)
    whole = scl.eq5_1_support_vector(feature, M)
    for b in range(2):
        sums = {key: [torch.zeros(3), 0] for key in ("s", "pri", "aux")}
        for y, x in itertools.product(range(4), range(5)):
            for key in ("s", "pri" if hat[b, y, x] else "aux") if M[b, y, x] else ():
                sums[key][0] += feature[b, :, y, x]
                sums[key][1] += 1
        for key, mine in (("s", whole), ("pri", pri), ("aux", aux)):
            assert close(mine[b], sums[key][0] / sums[key][1])


def test_a_perfect_prediction_leaves_an_empty_auxiliary_vector():
    feature, M = torch.randn(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    pri, aux = scl.eq5_5_6_primary_auxiliary(feature, M, M)
    assert close(aux, torch.zeros(1, 3)) and close(pri, feature.mean((2, 3)))


def test_concatenation_repeats_each_vector_at_each_cell():
    feature, V = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 3)
    out = scl.eq5_2_8_11_concat(feature, V)
    assert out.shape == (2, 9, 4, 5) and close(out[:, :3], feature)
    for y, x in itertools.product(range(4), range(5)):
        assert close(out[:, 3:6, y, x], V[:, 0]) and close(out[:, 6:, y, x], V[:, 1])


def test_cells_are_pixels_and_a_thin_object_is_not_lost():
    mask = torch.zeros(2, 9, 9, dtype=torch.long)
    mask[0, 3:6, 3:6], mask[0, 8, 8], mask[1, 5:7, 2:4] = 1, 255, 1       # the second lies between the cells
    cells = scl.to_cells(mask, 4)
    assert cells.shape == (2, 3, 3) and cells[0].nonzero().tolist() == [[1, 1]]
    assert cells[1].nonzero().tolist() == [[1, 0]]


def test_scores_return_to_the_pixels_of_their_cells():
    for size in ((33, 41), (35, 38)):
        cells = torch.randn(1, 2, *(-(-n // 4) for n in size))
        pixels = scl.cells_to_pixels(cells, 4, size)
        assert pixels.shape[2:] == size and close(pixels[..., ::4, ::4], cells, 1e-4)
        assert close(pixels[0, 0, 0, 2], (cells[0, 0, 0, 0] + cells[0, 0, 0, 1]) / 2, 1e-4)


def test_prior_mask_by_a_double_loop():
    torch.manual_seed(0)
    q, s = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 2, 4)
    s[:, :, 0] = 0                                                          # outside of the object
    prior = scl.prior_mask(q, s)
    for b in range(2):
        best = torch.tensor([max(float(F.cosine_similarity(q[b].flatten(1)[:, i], s[b].flatten(1)[:, j], 0))
                                 for j in range(8)) for i in range(9)])
        assert close(prior[b].flatten(), (best - best.min()) / (best.max() - best.min()), 1e-4)
    assert close(scl.prior_mask(q, s[:1])[0], prior[0]), "one support for several queries"


# ---------------------------------------------------------------- equals: losses, Eqs. (5.7)–(5.14)


def test_cross_entropy_leaves_out_255():
    scores, mask = torch.randn(1, 2, 3, 3), torch.randint(0, 2, (1, 9, 9))
    mask[0, 0] = 255
    pixels = scl.cells_to_pixels(scores, 4, (9, 9)).softmax(1)
    slow = [-pixels[0, mask[0, y, x], y, x].log() for y in range(1, 9) for x in range(9)]
    assert close(scl.eq5_7_10_13_cross_entropy(scores, mask, 4), sum(slow) / len(slow))
    assert scl.eq5_7_10_13_cross_entropy(scores, torch.full_like(mask, 255), 4) == 0


def test_the_bins_of_pfenet_count_as_one_mean():
    mask, parts = torch.randint(0, 2, (1, 9, 9)), [torch.randn(1, 2, 3, 3) for _ in range(3)]
    each = [scl.eq5_7_10_13_cross_entropy(p, mask, 4) for p in parts]
    assert close(scl.with_inner(parts, mask, 4, 0.5), each[0] + 0.5 * (each[1] + each[2]) / 2)
    assert close(scl.with_inner(parts[:1], mask, 4, 0.5), each[0])
    assert scl.eq5_14_total(1.0, 2.0, 4.0) == 7.0


# ---------------------------------------------------------------- equals: cross guidance, Eqs. (5.15)–(5.17)


def test_eq16_at_three_shots_by_hand():
    """Masks of 4 pixels. Row k, column i: how support k segments picture i."""
    mask = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 255]]])
    predicted = torch.tensor([[[[1, 1, 0, 0]], [[1, 1, 0, 0]], [[0, 0, 0, 1]]],
                              [[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 1]]],
                              [[[0, 0, 1, 1]], [[0, 0, 0, 0]], [[1, 1, 0, 0]]]]) == 1
    assert close(scl.eq5_16_confidence(predicted, mask),
                 [(1 + 1 / 2 + 0) / 3, (1 / 2 + 1 + 1) / 3, (0 + 0 + 2 / 3) / 3])
    others = [(1 / 2 + 0) / 2, (1 / 2 + 1) / 2, 0]
    assert close(scl.eq5_16_confidence(predicted, mask, with_self=False), others)
    background = [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 3 / 4, 0]]               # by hand too
    both = (torch.tensor([[1, 1 / 2, 0], [1 / 2, 1, 1], [0, 0, 2 / 3]]) + torch.tensor(background)) / 2
    assert close(scl.eq5_16_confidence(predicted, mask, with_background=True), both.mean(1))


def test_eq17_by_hand():
    scores, U = torch.randn(3, 2, 2, 2), torch.tensor([0.5, 0.0, 1.0])
    slow = torch.softmax((0.5 * scores[0] + 1.0 * scores[2]) / 3, dim=0)
    assert close(scl.eq5_17_fuse(scores, U), slow)
    assert close(scl.eq5_17_fuse(scores, torch.ones(3)), scores.mean(0).softmax(0))


@pytest.mark.parametrize("baseline", ["canet", "pfenet"])
def test_eq15_in_one_batch_is_each_pair_by_itself(baseline):
    net = network(baseline=baseline)
    S, _ = supports(net) if baseline == "canet" else (pfenet_supports(net), None)
    with torch.no_grad():
        together = {m: scl.eq5_15_cross_predictions(net, S, m) for m in ("query", "support")}
        for k, i in itertools.product(range(3), range(3)):
            V = S.V[k:k + 1]
            prior = None if net.single else scl.prior_mask(S.high[i:i + 1], S.object[k:k + 1])
            alone = net.eq5_12_query_scores(S.F_q[i:i + 1], V, prior)[0]
            other = net.eq5_3_9_support_scores(S.F_s[i:i + 1], V)[0]
            for module, scores in (("query", alone), ("support", other)):
                slow = scl.cells_to_pixels(scores, 4, (33, 33)).argmax(1)[0] == 1
                assert (together[module][k, i] != slow).float().mean() < 0.01
        U = scl.confidence(net, S, "paper")
        assert close(U, scl.eq5_16_confidence(together["query"], S.mask)) or not together["query"].any()
        code = scl.eq5_16_confidence(together["support"], S.mask, False, baseline == "pfenet")
        assert close(scl.confidence(net, S, "code"), code) or not code.any()


def pfenet_supports(net):
    args = arguments(baseline="pfenet")
    scenes = [draw_scene(0, "train", i) for i in range(3)]
    return scl.together([scl.encode_support(args, net, s.image, (s.mask > 0).astype(np.uint8), "cpu")
                         for s in scenes])


def test_without_sgm_confidence_goes_through_the_query_module():
    net = network(guide="none")
    S, _ = supports(net)
    with torch.no_grad():
        predicted = scl.eq5_15_cross_predictions(net, S, "query")
        U = scl.eq5_16_confidence(predicted, S.mask, False)
        assert close(scl.confidence(net, S, "code"), U if U.any() else torch.ones(3))


def test_confidence_of_nothing_is_the_average(monkeypatch):
    net = network()
    S, _ = supports(net)
    nothing = torch.zeros(3, 3, 33, 33, dtype=torch.bool)
    monkeypatch.setattr(scl, "eq5_15_cross_predictions", lambda *a: nothing)
    assert close(scl.confidence(net, S, "paper"), torch.ones(3))


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("baseline", ["canet", "pfenet"])
@pytest.mark.parametrize("guide", ["none", "sgm"])
def test_every_layer_but_the_backbone_learns(baseline, guide):
    net = network(baseline=baseline, guide=guide, dropout=0, empty_history=0).train()
    image, mask = episode()
    scores = net(image, mask)
    assert set(scores) == ({"q"} if guide == "none" else {"s1", "s2", "q"})
    for each in scores.values():
        assert len(each) == (1 if baseline == "canet" else 5)
        assert all(s.shape == (2, 2, 9, 9) for s in each)
    sum(scl.with_inner(s, mask[1::2], 4, 1.0) for s in scores.values()).backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None) != name.startswith("backbone."), name
        assert name.startswith("backbone.") == (not p.requires_grad)


def test_the_support_module_has_its_own_first_block_and_shares_the_decoder():
    for baseline, extra in (("canet", 2), ("pfenet", 1)):
        net = network(baseline=baseline)
        mine, other = (sum(p.numel() for p in m.parameters()) for m in (net.fpm_query, net.fpm_support))
        assert mine > other, f"the query's has {extra} channels more"
        if baseline == "canet":                                                         # [D19]
            assert net.fpm_support.compare is net.fpm_query.compare
            assert net.fpm_support.residual is not net.fpm_query.residual
            apart = network(baseline=baseline, share_compare=False)
            assert apart.fpm_support.compare is not apart.fpm_query.compare
        calls = []
        net.decoder.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        net.train()(*episode())
        assert len(calls) in (3, 4), "s1, s2, query, and CANet's history"


@pytest.mark.parametrize("vectors, places, s2", [
    ("s", 2, False), ("pri", 2, True), ("aux", 2, True), ("pri,aux", 2, True), ("all", 3, True)])
def test_vectors_of_table_5_8(vectors, places, s2):
    net = network(vectors=vectors).train()
    image, mask = episode()
    assert ("s2" in net(image, mask)) == s2
    F_s, M = torch.randn(1, 8, 9, 9), scl.to_cells(mask[:1], 4)
    V, scores = net.eval().self_guided(F_s, M)
    assert V.shape == (1, places, 8)
    v_s = scl.eq5_1_support_vector(F_s, M)
    hat = scl.eq5_4_predicted_mask(scores["s1"][0])
    pri, aux = scl.eq5_5_6_primary_auxiliary(F_s, M, hat)
    expected = {"s": [v_s, v_s], "pri": [pri, pri], "aux": [aux, aux], "pri,aux": [pri, aux],
                "all": [v_s, pri, aux]}[vectors]
    assert close(V, torch.stack(expected, 1).detach())


def test_canet_refines_with_its_own_last_prediction():
    net = network()
    feature, V, fed = torch.randn(1, 8, 9, 9), torch.randn(1, 2, 8), []
    net.fpm_query.register_forward_pre_hook(lambda m, a: fed.append(a[2]))
    net.refinements = 2
    with torch.no_grad(): net.eq5_12_query_scores(feature, V)
    assert len(fed) == 3 and not fed[0].any()
    assert close(fed[1].sum(1), torch.ones(1, 9, 9)) and not close(fed[1], fed[2], 1e-9)


@pytest.mark.parametrize("empty, passes", [(1.0, 1), (0.0, 2)])
def test_history_mask_in_training(empty, passes):
    net, fed = network(empty_history=empty).train(), []
    net.fpm_query.register_forward_pre_hook(lambda m, a: fed.append(a[2]))
    net(*episode())
    assert len(fed) == passes and bool(fed[-1].any()) == (passes == 2) and not fed[-1].requires_grad


def test_pfenets_high_features_see_the_object_alone():
    net = network(baseline="pfenet")
    image, mask = episode(1)
    middle, high = net.encode(image)
    region = scl.to_cells(mask, 4)
    seen = net.object_high(middle, region)
    assert not (seen * ~region[:, None]).any() and seen.shape == high.shape
    changed = middle + 5 * ~region[:, None]
    assert close(net.object_high(changed, region), seen)


def test_batch_norm_is_frozen_or_takes_the_batch():
    frozen = network().train()
    assert not any(norm.training for norm in frozen.backbone.norms())
    other = scl.make_scl(arguments(batch_norm="batch"), "none").train()
    before = other.backbone.norms()[0].running_mean.clone()
    other(*episode())
    assert not close(other.backbone.norms()[0].running_mean, before)


def test_canet_sees_large_photographs_at_640_pixels():
    net, args = network(), arguments(test_scales=(0.5, 1.0))
    for side, seen in ((96, (48, 96)), (1280, (320, 640))):
        views = scl.encode_query(args, net, np.zeros((side, side // 2, 3), np.uint8), "cpu")
        assert [tuple(view[2]) for view in views] == [(n, max(32, n // 2)) for n in seen]


def test_mobilenet_taps_lie_on_one_grid():
    net = scl.make_scl(arguments(backbone="mobilenet_v2", baseline="pfenet"), "none").eval()
    middle, high = net.encode(torch.randn(1, 3, 65, 65))
    assert middle.shape == (1, 32 + 96, 9, 9) and high.shape == (1, 1280, 9, 9) and net.stride == 8


# ---------------------------------------------------------------- episodes


def pool_of(rows):
    return np.array(rows, bool)


def test_pictures_of_a_class_by_area():
    areas = np.array([[300, 0, 100], [300, 50, 100], [100, 300, 300]])
    pool, short = scl.pictures_of(areas, [1, 3], 200, 2, ["a", "b", "c"])
    assert pool.tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    assert short == {"c": 1}


class Scenes(list):
    """A data set of masks that name their place."""
    classes = ["a", "b", "c"]


def scenes(n=6):
    return Scenes(Sample(name=str(i), image=np.full((8, 8, 3), i, np.uint8),
                         mask=np.array([[0, 1, 2, 3, 255, 0, 0, 0]] * 8, np.uint8)) for i in range(n))


def test_training_episodes():
    pool = pool_of([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    seen = []

    def augment(sample, support, rng):
        seen.append((int(sample.image[0, 0, 0]), support, int(np.flatnonzero(sample.mask[0] == 1)[0])))
        assert set(np.unique(sample.mask)) == {0, 1, 255} and not hasattr(sample, "tags")
        return sample

    draws = scl.Episodes(scenes(), pool, augment, seed=1)
    for n in range(50): draws[n]
    for (q, _, k), (s, support, same) in zip(seen[::2], seen[1::2]):
        assert k == same and q != s and support and pool[q, k - 1] and pool[s, k - 1]
    assert sorted(q for q, *_ in seen[:10:2]) == [0, 1, 2, 3, 5], "each picture of the pool once an epoch"
    again = list(seen)
    seen.clear()
    other = scl.Episodes(scenes(), pool, augment, seed=1)
    for n in reversed(range(50)): other[n]
    assert seen[::-1] == again, "seed and number alone decide"


def test_test_episodes_are_seeded_and_more_shots_keep_the_first():
    pool = pool_of([[1, 0], [1, 1], [1, 1], [1, 1], [0, 1], [1, 1]])
    five, one = scl.draw_episodes(pool, 40, 4, 7), scl.draw_episodes(pool, 40, 1, 7)
    assert (five[:, :3] == one).all() and five.shape == (40, 6) and set(five[:, 0]) == {1, 2}
    assert not (scl.draw_episodes(pool, 40, 4, 8) == five).all()
    for k, *pictures in five.tolist():
        assert len(set(pictures)) == 5 and pool[pictures, k - 1].all()


@pytest.mark.parametrize("baseline", ["canet", "pfenet"])
def test_augmentation_keeps_the_object(baseline):
    rng, s = np.random.default_rng(0), draw_scene(0, "train", 3)
    sample = Sample(image=s.image, mask=class_mask(s.mask, int(s.mask.max())))
    for support in (False, True):
        for _ in range(5):
            out = scl.AUGMENT[baseline](sample, support, 49, (1.0, 1.5), rng)
            assert out.image.shape == (3, 49, 49) and out.mask.shape == (49, 49)
            assert (out.mask == 1).any() and set(out.mask.unique().tolist()) <= {0, 1, 255}
    collate([out, out])


def test_pfenets_test_pictures_keep_their_shape():
    s = Sample(image=np.zeros((40, 80, 3), np.uint8), mask=np.ones((40, 80), np.uint8))
    out, inside = scl.network_sized(s, "pfenet", 64)
    assert inside == (32, 64) and out.image.shape == (64, 64, 3)
    assert (out.mask[:32] == 1).all() and (out.mask[32:] == 255).all()
    assert scl.network_sized(s, "canet", 64)[0].mask.shape == (64, 64)


# ---------------------------------------------------------------- the metric


def test_counts_and_scores_by_hand():
    truth = np.array([[1, 1, 0, 255]])
    assert scl.counts_of(np.array([[True, False, True, True]]), truth) == [1, 3, 0, 2]
    classes = np.array([2, 5, 2])
    counts = np.array([[1, 3, 4, 8], [2, 4, 6, 10], [3, 5, 2, 6]])
    miou, fb, each = scl.scores_of(classes, counts)
    assert close(each[2], 100 * 4 / 8) and close(each[5], 50.0) and close(miou[0], 50.0)
    assert close(fb[0], 50 * (6 / 12 + 12 / 24)), "summed over all episodes, not a mean of their IoUs"
    twice = scl.scores_of(classes, counts, np.array([[2, 1, 0]]))[0]
    assert close(twice[0], 100 * (2 / 6 + 1 / 2) / 2)


def test_paired_gain():
    rng = np.random.default_rng(0)
    classes, union, pictures = rng.integers(1, 3, 200), np.full(200, 100), np.arange(200)
    base = rng.integers(20, 60, 200)
    a = np.stack([base, union, base, union], 1)
    b = a + np.array([5, 0, 0, 0])
    gain = scl.paired_gain(classes, pictures, b, a)
    assert close(gain["gain"], 5.0) and gain["gain_low"] > 4.9 and close(gain["fb_gain"], 2.5)
    same = scl.paired_gain(classes, pictures, a, a)
    assert same["gain"] == same["gain_low"] == same["gain_high"] == 0
    noisy = np.stack([rng.integers(20, 60, 200), union, base, union], 1)
    gain = scl.paired_gain(classes, pictures, noisy, a)
    width = gain["gain_high"] - gain["gain_low"]
    assert gain["gain_low"] < gain["gain"] < gain["gain_high"] and width > 1
    few = np.arange(200) % 10                                   # ten pictures, each with a gain of its own
    own = np.stack([base + np.array([-9, -6, -3, 0, 3, 4, 6, 9, 12, 15])[few], union, base, union], 1)
    alone, shared = (scl.paired_gain(classes, p, own, a) for p in (pictures, few))
    widths = [gain["gain_high"] - gain["gain_low"] for gain in (alone, shared)]
    assert widths[1] > 3 * widths[0], "episodes with one picture do not count for two"


# ---------------------------------------------------------------- learns


@pytest.mark.parametrize("baseline, lr", [("canet", 0.01), ("pfenet", 0.03)])
def test_losses_fall_on_one_episode(baseline, lr):
    net = network(baseline=baseline, dropout=0).train()
    image, mask = episode()
    optim = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for _ in range(20):
        parts = {key: scl.with_inner(s, mask[::2] if key == "q" else mask[1::2], 4, 1.0)
                 for key, s in net(image, mask).items()}
        losses.append({key: float(value.detach()) for key, value in parts.items()})
        optim.zero_grad()
        sum(parts.values()).backward()
        optim.step()
    assert all(losses[-1][key] < 0.85 * losses[0][key] for key in ("s1", "s2", "q"))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A few scenes in VOC's layout: 8 classes, so folds of two neighbours."""
    to = tmp_path_factory.mktemp("scl") / "voc"
    export("shapes", "voc", str(to), 24)
    return to


SMALL = """--data voc --preset shapes --train-list train --fold 1 --width 8 --seg-crop 33 --enc-steps 4
    --seg-steps 4 --seg-batch 2 --enc-batch 2 --episodes 3 --shots 1 2 --test-seeds 2 --log-every 1
    --save-every 1 --workers 0 --device cpu --refinements 1""".split()


def command(folder, out, *more):
    return ["scl.py", *SMALL, "--root", folder, "--out", out, *more]


def run_here(*argv):
    """The script in this process: nothing is imported again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(a) for a in argv])
        scl.main()


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "canet"
    run_here(*command(folder, out))
    return out


def stages(out):
    return {entry["stage"]: entry for entry in json.loads((out / "results.json").read_text())["stages"]}


def scores(out):
    return {name: [e.get(key) for key in ("miou", "fb_iou", "gain")] for name, e in stages(out).items()}


def counts(out):
    parts = sorted((out / "test").glob("*.npz"))
    return {(p.name, key): value.tolist() for p in parts for key, value in np.load(p).items()}


def test_runs_and_writes_one_entry_a_setting_and_seed(finished):
    found = stages(finished)
    names = [f"test_{s}" for s in ("1shot", "2shot_average", "2shot_cgm", "self")]
    assert set(found) == {*names, *(f"{n}_s{i}" for n in names for i in (0, 1)), "test_2shot_cgm_gain",
                          "test_objects"}
    for name in names:
        entry, seeds = found[name], [found[f"{name}_s{i}"] for i in (0, 1)]
        for e in (entry, *seeds):
            assert {"shots", "fold", "guide", "fuse", "episodes", "miou", "fb_iou"} <= set(e)
            assert 0 <= e["miou"] <= 100 and e["uses_masks"] and e["fold"] == 1 and e["guide"] == "sgm"
        assert close(entry["miou"], sum(e["miou"] for e in seeds) / 2)
        assert set(seeds[0]["iou"]) <= {"block-disc", "block-bar"}
    assert found["test_2shot_cgm"]["fuse"] == "cgm" and found["test_1shot"]["shots"] == 1
    gain = found["test_2shot_cgm_gain"]
    assert gain["gain_low"] <= gain["gain_high"] and gain["episodes"] == 6
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {e["stage"] for e in lines} == {"encoder", "segmenter"}
    assert all(np.isfinite(list(e.values())[1:]).all() for e in lines)
    assert {"loss_s1", "loss_s2", "loss_q", "iou"} <= set(lines[-1]) and lines[-1]["loss_s1"] > 0
    assert (finished / "panels" / "test.png").exists()


def test_the_same_command_again_does_nothing(finished, folder):
    before, times = scores(finished), {f: f.stat().st_mtime_ns for f in finished.rglob("*.[np][pt]*")}
    run_here(*command(folder, finished))
    assert scores(finished) == before and all(f.stat().st_mtime_ns == t for f, t in times.items())


def test_the_cache_of_features_changes_nothing(finished, folder, tmp_path):
    run_here(*command(folder, tmp_path, "--reuse", finished, "--cache", 1))
    assert counts(tmp_path) == counts(finished)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["reused"]) == {"areas", "encoder", "segmenter"}
    timed = {"train_episodes_per_s"}
    assert timed <= set(stages(finished)["test_1shot"]) and not timed & set(stages(tmp_path)["test_1shot"])


def test_test_counts_are_those_of_a_plain_loop(finished, folder):
    """1-shot and self of the first episode, without cache and files between."""
    made = json.loads((finished / "args.json").read_text())
    args = scl.Args(**made)
    net = scl.make_scl(args, "none")
    net.load_state_dict(torch.load(finished / "segmenter.pt", weights_only=True)["model"])
    net.eval()
    from data import load
    val = load(args, "val")
    k, query, first, *_ = json.loads((finished / "episodes" / "test.json").read_text())[0][0]
    s = scl.encode_support(args, net, val[first].image, class_mask(val[first].mask, k), "cpu")
    for setting, i in (("1shot", query), ("self", first)):
        views = scl.encode_query(args, net, val[i].image, "cpu")
        label = scl.query_scores(net, views, s, val[i].mask.shape)[0].argmax(0) == 1
        expected = scl.counts_of(label.numpy(), class_mask(val[i].mask, k))
        got = counts(finished)["s0_00000.npz", setting][0]
        assert np.abs(np.subtract(got, expected)).max() <= 3


VARIANTS = {"pfenet": "--baseline pfenet",
            "pfenet baseline": "--baseline pfenet --guide none --cgm-score code",
            "canet baseline": "--guide none", "code's score": "--cgm-score code --fuse cgm",
            "only s1": "--no-s2-loss", "only s2": "--no-s1-loss", "only v_s": "--vectors s",
            "all vectors": "--vectors all",
            "multi-scale": "--test-scales 0.7 1 1.3", "batch norm": "--batch-norm batch",
            "no support loss": "--no-s1-loss --vectors s"}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_variants(finished, folder, tmp_path, flags):
    """Tables 5.6 to 5.9 and the other baseline; the encoder comes from the finished run."""
    more = ["--reuse", finished, "--seg-steps", 1, "--test-seeds", 1, *flags.split()]
    run_here(*command(folder, tmp_path, *more))
    found = stages(tmp_path)
    assert 0 <= found["test_1shot"]["miou"] <= 100
    assert ("test_2shot_average" in found) == ("--fuse" not in flags)
    line = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert (line["loss_s1"] == 0) == ("none" in flags or "no-s1" in flags)
    assert (line["loss_s2"] == 0) == ("none" in flags or "no-s2" in flags or "vectors s" in flags)
    listed = [(out / "episodes" / "test.json").read_text() for out in (finished, tmp_path)]
    assert json.loads(listed[0])[0] == json.loads(listed[1])[0], "every run has the same episodes"


def test_compares_two_runs(finished, folder, tmp_path, capsys):
    run_here(*command(folder, tmp_path / "a", "--guide", "none", "--reuse", finished))
    run_here("scl.py", "--compare", tmp_path / "a", finished)
    assert "1shot" in capsys.readouterr().out
    gains = json.loads((finished / "compare.json").read_text())
    mine, other = counts(finished), counts(tmp_path / "a")
    for setting in ("1shot", "self", "2shot_cgm"):
        files = sorted({name for name, _ in mine})
        a, b = (np.concatenate([c[f, setting] for f in files]) for c in (other, mine))
        classes = np.concatenate([mine[f, "class"] for f in files])
        expected = scl.scores_of(classes, b)[0] - scl.scores_of(classes, a)[0]
        assert close(gains[setting]["gain"], float(expected[0]))
    (finished / "compare.json").unlink()
    run_here(*command(folder, tmp_path / "b", "--episodes", 2, "--reuse", finished))
    with pytest.raises(UserError, match="same episodes"):
        run_here("scl.py", "--compare", tmp_path / "b", finished)
    with pytest.raises(UserError, match="finished"): run_here("scl.py", "--compare", tmp_path, finished)


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    """kill -9 in the training of episodes; then the same command again."""
    for name in ("encoder.pt", "areas", "args.json", "state.json"):
        if (finished / name).is_dir(): shutil.copytree(finished / name, tmp_path / name)
        else: shutil.copy(finished / name, tmp_path / name)
    kill_when(lambda: (tmp_path / "segmenter.pt").exists(), *command(folder, tmp_path))
    assert torch.load(tmp_path / "segmenter.pt", weights_only=True)["step"] < 4
    run_here(*command(folder, tmp_path))
    assert counts(tmp_path) == counts(finished) and scores(tmp_path) == scores(finished)


def test_two_processes(finished, folder, tmp_path):
    sh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
       *command(folder, tmp_path, "--reuse", finished, "--seg-steps", 2))
    assert set(stages(tmp_path)) == set(stages(finished))


# ---------------------------------------------------------------- predict


@pytest.fixture
def photographs(tmp_path):
    """Three supports, masks as users have them (0/255, 0/1 with 255, 0/3), and a folder of queries."""
    for i, (object_, ignore) in enumerate(((255, None), (1, 255), (3, None))):
        s = draw_scene(0, "val", i)
        mask = np.where(s.mask > 0, object_, 0).astype(np.uint8)
        if ignore: mask[:3] = ignore
        save_image(tmp_path / f"s{i}.png", s.image)
        save_image(tmp_path / f"m{i}.png", mask)
        save_image(tmp_path / "q" / f"q{i}.png", draw_scene(0, "val", 10 + i).image)
    return tmp_path


def predict(finished, place, K, *more):
    images, masks = ([place / f"{kind}{i}.png" for i in range(K)] for kind in "sm")
    run_here("scl.py", "--predict", place / "q", "--checkpoint", finished / "segmenter.pt", "--out",
             place / "out", "--device", "cpu", "--support-images", *images, "--support-masks", *masks, *more)


@pytest.mark.parametrize("K", [1, 3])
def test_predicts_with_the_users_supports(finished, photographs, K):
    predict(finished, photographs, K)
    for i in range(3):
        label = read_label(photographs / "out" / "predict" / f"q{i}.png", 1,
                           read_image(photographs / "q" / f"q{i}.png"))
        assert set(np.unique(label)) <= {0, 1}
    assert len(list((photographs / "out" / "predict").glob("*_overlay.png"))) == 3


def test_masks_of_users(photographs):
    for i in range(3):
        image = read_image(photographs / f"s{i}.png")
        raw, mask = read_label(photographs / f"m{i}.png"), scl.support_mask(photographs / f"m{i}.png", image)
        assert set(np.unique(mask)) == ({0, 1, 255} if i == 1 else {0, 1})
        assert ((mask == 1) == (raw == (255, 1, 3)[i])).all()


@pytest.mark.parametrize("spoil, words", [
    (lambda m: np.zeros_like(m), "is empty"), (lambda m: m[:20], "make them alike"),
    (lambda m: m // 64 * 20 + np.arange(m.shape[1], dtype=np.uint8), "values beside")])
def test_wrong_support_masks_are_named(finished, photographs, spoil, words):
    save_label(photographs / "m0.png", spoil(read_label(photographs / "m0.png")))
    with pytest.raises((UserError, DataError), match=f"m0.png.*{words}"): predict(finished, photographs, 1)


def test_an_object_too_small_for_the_network_is_named(finished, photographs):
    mask = np.zeros(read_image(photographs / "s0.png").shape[:2], np.uint8)
    mask[0, 0] = 1                                              # between those that the resize takes
    save_label(photographs / "m0.png", mask)
    with pytest.raises(UserError, match="m0.png.*empty at 33 pixels"): predict(finished, photographs, 1)


def test_a_test_support_whose_object_vanishes_gives_no_vector():
    """In the test no episode may end the run: the support says nothing, as in training (Eq. 5.1)."""
    args = arguments(seg_crop=33)
    net, image = scl.make_scl(args, "none").eval(), np.zeros((90, 120, 3), np.uint8)
    mask = np.zeros((90, 120), np.uint8)
    mask[0, 0] = 1
    support = scl.encode_support(args, net, image, mask, "cpu")
    assert not (support.mask == 1).any() and not support.V.any()
    assert (scl.confidence(net, scl.together([support] * 2), "paper") == 1).all()


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--fold", "4"], "--fold 4"), (["--shots", "0"], "from 1"),
    (["--seg-rescale", "1.5", "1.0"], "smaller first"), (["--min-area", "0"], "1 or more"),
    (["--support-images", "a.jpg"], "only with --predict"),
    (["--compare", "x"], "two run folders"), (["--backbone", "mobilenet_v2", "--weights", "no.pt"], "no.pt")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(UserError, match=words): run_here(*command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_supports_and_masks_must_pair(finished, photographs):
    with pytest.raises(UserError, match="as many"):
        predict(finished, photographs, 1, "--support-masks", photographs / "m0.png", photographs / "m1.png")
    with pytest.raises(UserError, match="not the segmenter.pt"):
        run_here("scl.py", "--predict", photographs / "q", "--checkpoint", finished / "encoder.pt",
                 "--support-images", photographs / "s0.png", "--support-masks", photographs / "m0.png")


def test_a_class_with_too_few_pictures_is_left_out_and_a_fold_without_any_refused(folder, tmp_path, capsys):
    with pytest.raises(DataError, match="fold 1: no class has 26 val pictures"):
        run_here(*command(folder, tmp_path / "none", "--shots", 25))
    areas = np.zeros((24, 8), int)
    areas[:8, 2], areas[:3, 3], areas[:, [0, 1, 4, 5, 6, 7]] = 500, 500, 500
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scl, "read_areas", lambda *a: areas)
        args = arguments(data="voc", fold=1, shots=(1, 5))
        fake = type("Run", (), {"say": staticmethod(print)})
        data = type("Data", (), {"classes": [f"c{k}" for k in range(1, 9)]})
        pools, short = scl.make_pools(args, fake, data, data)
    assert short == {"c4": 3} and "'c4': 3" in capsys.readouterr().out
    assert pools[1].any(0).nonzero()[0].tolist() == [2] and not pools[0][:, 2:4].any()


def test_areas_of_other_data_are_refused(tmp_path):
    run = scl.Run(arguments(out=str(tmp_path)))
    np.savez(run.path("areas", "val", ".npz"), areas=np.zeros((3, 8), int))
    assert scl.read_areas(run, [None] * 3, "val").shape == (3, 8)
    with pytest.raises(UserError, match="has 3 pictures, the val set 4: the data have changed"):
        scl.read_areas(run, [None] * 4, "val")


@pytest.mark.parametrize("held_out, kept", [("background", [0, 1, 2, 3]), ("drop", [0, 3])])
def test_training_pictures_with_held_out_classes(monkeypatch, held_out, kept):
    """Classes 2 and 7 are held out in fold 1; pictures 1 and 2 show a pixel or more of them."""
    areas = np.zeros((4, 8), int)
    areas[:, 0] = 500
    areas[1, 1], areas[2, 6] = 1, 900
    monkeypatch.setattr(scl, "read_areas", lambda run, data, split: areas + 900 * (split == "val"))
    fake, data = type("Run", (), {"say": staticmethod(print)}), type("Data", (), {"classes": [*"abcdefgh"]})
    args = arguments(data="shapes", fold=1, shots=(1,), held_out=held_out, min_area=100)
    pools, _ = scl.make_pools(args, fake, data, data)
    tested = scl.class_folds("shapes", data.classes, "interleaved")[1]
    assert list(tested) == [2, 7], "this test's areas are of other classes"
    assert np.flatnonzero(pools[0].any(1)).tolist() == kept and pools[1].any(1).all()


def test_stages_are_shared_only_between_runs_that_agree():
    fields = [name for names in scl.FIELDS.values() for name in names]
    known = {f.name for f in dataclasses.fields(scl.Args)}
    assert set(fields) <= known and len(fields) == len(set(fields))
    free = set("""preset out reuse fresh device workers predict checkpoint log_every save_every crf shots
        fuse cgm_score episodes test_seeds test_scales refinements cache compare support_images
        support_masks""".split())
    assert known - set(fields) == free, "each field belongs to a stage, or can not change one"


def test_the_baselines_defaults(monkeypatch):
    monkeypatch.setattr(scl, "make_scl", lambda *a: None)                   # ResNet-50 is not needed here
    cases = ("canet", 321, 2.5e-3, (0.7, 1.0, 1.3)), ("pfenet", 473, 0.025, (1.0,))
    for baseline, crop, lr, scales in cases:
        args = scl.Args(baseline=baseline, weights="none")
        scl.settle_scl(args)
        assert (args.seg_crop, args.seg_lr, args.test_scales, args.seg_batch) == (crop, lr, scales, 4)
    args = scl.Args(data="coco", baseline="pfenet", weights="none", seg_batch=8)
    scl.settle_scl(args)
    assert (args.seg_crop, args.seg_lr, args.seg_batch, args.weight_decay) == (641, 0.2, 8, 1e-4)
