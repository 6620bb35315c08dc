"""dfr.py: each equation against an authority, the script on a few scenes; PASCAL-Context on files made."""

import dataclasses
import itertools
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import dfr
from conftest import kill_when, sh
from data import DataError, Draws, Sample, collate, export, load, normalise, read_image, read_label

torch.set_num_threads(1)


def arguments(**changes):
    return dfr.Args(**{**dfr.SHAPES, "train_list": "train", **changes})


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def network(seed=0, classes=8, **changes):
    torch.manual_seed(seed)
    return dfr.make_dfr(arguments(**changes), "none", classes)


def batch_of(n, **changes):
    args = arguments(**changes)
    draws = Draws(load(args, "train"), dfr.train_augment(args), 0)
    return collate([draws[i] for i in range(n)])


def window_of(i, h, w, r):
    """The partners of cell i in Eq. (4.3), i itself left out."""
    return [(y, x) for y in range(max(0, i[0] - r), min(h, i[0] + r + 1))
            for x in range(max(0, i[1] - r), min(w, i[1] + r + 1)) if (y, x) != i]


def maps(h=5, w=6, B=2, d=4, classes=3, seed=0):
    """P, F, I, M, inside of a small batch."""
    rng = torch.Generator().manual_seed(seed)
    P = torch.randn(B, classes, h, w, generator=rng).softmax(1)
    F_, I = (torch.randn(B, c, h, w, generator=rng) for c in (d, 3))
    M = torch.randint(0, classes + 1, (B, h, w), generator=rng)
    inside = torch.ones(B, h, w, dtype=torch.bool)
    inside[0, :2] = False
    return P, F_, I, torch.where((M == classes) | ~inside, 255, M), inside


# ---------------------------------------------------------------- equals: pairs


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_eq4_3_is_half_of_the_window(radius):
    offsets = dfr.eq4_3_window(radius)
    both = {*offsets, *((-dy, -dx) for dy, dx in offsets)}
    span = range(-radius, radius + 1)
    assert both == set(itertools.product(span, span)) - {(0, 0)} and len(offsets) == len(both) // 2
    assert len(dfr.eq4_3_window(dfr.Args().radius)) * 2 == 11 * 11 - 1


@pytest.mark.parametrize("size", [(5, 6), (2, 9), (1, 1), (9, 2)])
@pytest.mark.parametrize("kind", ["dot", "l1", "l2"])
def test_window_sums_are_those_of_a_loop(size, kind):
    """Maps smaller than the window too."""
    x, offsets = torch.randn(2, 3, *size), dfr.eq4_3_window(3)
    out = dfr.WindowSum.apply(x, offsets, kind)
    for b, o, y, z in np.ndindex(*out.shape):
        dy, dx = offsets[o]
        if y + dy >= size[0] or not 0 <= z + dx < size[1]:
            assert out[b, o, y, z] == 0
            continue
        i, j = x[b, :, y, z], x[b, :, y + dy, z + dx]
        expected = {"dot": (i * j).sum(), "l1": (i - j).abs().sum(), "l2": ((i - j)**2).sum()}[kind]
        assert close(out[b, o, y, z], expected)


@pytest.mark.parametrize("kind", ["dot", "l1", "l2"])
def test_the_gradient_of_window_sums(kind):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    offsets = dfr.eq4_3_window(2)
    assert torch.autograd.gradcheck(lambda t: dfr.WindowSum.apply(t, offsets, kind), (x,), atol=1e-4)


def test_no_copy_of_the_channels_for_each_offset_is_kept():
    """What the losses keep for their gradients is a few numbers a pair, not C of them."""
    kept, inside = [], torch.ones(1, 16, 16, dtype=torch.bool)
    P, F_, I = torch.rand(1, 9, 16, 16), torch.rand(1, 128, 16, 16), torch.rand(1, 3, 16, 16)
    offsets, M = dfr.eq4_3_window(5), torch.randint(0, 3, (1, 16, 16))
    for t in (P, F_): t.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        K = dfr.eq4_6_13_kernel(I, F_, inside, offsets, ("xy", "rgb", "feature"), 6, 0.5, 50)
        log_D = dfr.eq4_10_log_affinity(F_, offsets)
        loss = dfr.eq4_4_dfr(P, K, inside, offsets) + dfr.eq4_12_feature_regularised(log_D, K, inside)
        loss = loss + dfr.eq4_11_feature_distance(log_D, *dfr.eq4_8_9_relations(M, offsets))
    loss.backward()
    assert sum(kept) < P.numel() + F_.numel() + 20 * K.numel() < 128 * K.numel()


# ---------------------------------------------------------------- equals: semantic head, Eqs. (4.1)–(4.6)


def test_eq4_1():
    assert dfr.eq4_1_total(1.0, 2.0, 4.0, 8.0, 0.5, 0.25) == 1 + 1 + 3
    assert (dfr.Args().w_dfr, dfr.Args().w_feature) == (1e-2, 1e-3)


def test_eq4_2_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 4, requires_grad=True)
    M_s = torch.from_numpy(np.random.default_rng(0).choice([0, 2, 255], (2, 12, 16), p=[0.02, 0.03, 0.95]))
    P = F.interpolate(logits, (12, 16), mode="bilinear").softmax(1)
    terms = [-P[b, M_s[b, y, x], y, x].log().item() for b, y, x in np.ndindex(2, 12, 16)
             if M_s[b, y, x] != 255]
    assert 3 < len(terms) < 60
    assert close(dfr.eq4_2_partial_cross_entropy(logits, M_s).detach(), sum(terms) / len(terms))


@pytest.mark.parametrize("values", [[255], [0], [3, 255]], ids=["no scribble", "all one", "one class"])
def test_crops_with_few_labels_have_finite_losses(values):
    batch = batch_of(2)
    label = torch.from_numpy(np.random.default_rng(0).choice(values, batch.scribble.shape))
    net = network().train()
    logits, feature, _ = net(batch.image)
    for choice in ("confident", "gt", "both"):
        *losses, _ = dfr.all_losses(arguments(consistency_labels=choice, gamma=0.1), logits, feature,
                                    batch.image, label, batch.pseudo != 255)
        assert all(torch.isfinite(v) for v in losses) and (losses[0] == 0) == (values == [255])
        grads = torch.autograd.grad(sum(losses), [*net.parameters()], retain_graph=True)
        assert all(torch.isfinite(g).all() for g in grads)


def kernel(i, j, parts, b, I, F_, sigmas=(2.0, 0.7, 3.0)):
    exponent = 0
    if "xy" in parts: exponent += ((i[0] - j[0])**2 + (i[1] - j[1])**2) / (2 * sigmas[0]**2)
    if "rgb" in parts: exponent += ((I[b, :, i[0], i[1]] - I[b, :, j[0], j[1]])**2).sum() / (2 * sigmas[1]**2)
    if "feature" in parts:
        exponent += ((F_[b, :, i[0], i[1]] - F_[b, :, j[0], j[1]])**2).sum() / (2 * sigmas[2]**2)
    return math.exp(-exponent)


@pytest.mark.parametrize("parts", [("xy",), ("xy", "rgb"), ("xy", "feature"), ("xy", "rgb", "feature"),
                                   ("feature",)], ids=",".join)
def test_eqs4_4_to_4_6_are_the_sum_over_all_pairs(parts):
    """As printed, from Eq. (4.5)'s first line: a sum over two different classes, i and j in both orders."""
    P, F_, I, _, inside = maps()
    offsets, total = dfr.eq4_3_window(2), 0
    K = dfr.eq4_6_13_kernel(I, F_, inside, offsets, parts, 2.0, 0.7, 3.0)
    loss = dfr.eq4_4_dfr(P, K, inside, offsets)
    for b, y, x in np.ndindex(2, 5, 6):
        for j in window_of((y, x), 5, 6, 2):
            if inside[b, y, x] and inside[b, j[0], j[1]]:
                phi = sum(P[b, c, y, x] * P[b, k, j[0], j[1]] for c in range(3) for k in range(3) if c != k)
                total += kernel((y, x), j, parts, b, I, F_) * phi
    assert close(loss, total / inside.sum())


def test_no_gradient_flows_into_the_features_through_the_kernel():
    P, F_, I, _, inside = maps()
    logits = P.log().requires_grad_()
    F_.requires_grad_()
    offsets = dfr.eq4_3_window(2)
    K = dfr.eq4_6_13_kernel(I, F_, inside, offsets, ("xy", "rgb", "feature"), 2.0, 0.7, 3.0)
    assert not K.requires_grad
    dfr.eq4_4_dfr(logits.softmax(1), K, inside, offsets).backward()
    assert F_.grad is None and logits.grad.abs().sum() > 0


def test_l_dfr_reaches_the_head_in_no_step_and_l_fd_does():
    """In the whole network: L_dfr reaches the backbone but not the consistency head's own layer."""
    batch, args, net = batch_of(2), arguments(gamma=0.1), network().train()
    logits, feature, _ = net(batch.image)
    _, L_dfr, L_fd, L_fr, _ = dfr.all_losses(args, logits, feature, batch.image, batch.scribble,
                                             batch.pseudo != 255)
    own, shared = net.consistency[0].weight, net.lateral["0"][0].weight
    grads = [torch.autograd.grad(v, [own, shared], retain_graph=True, allow_unused=True)
             for v in (L_dfr, L_fd, L_fr)]
    assert grads[0][0] is None and all(g[0].abs().sum() > 0 for g in grads[1:])
    assert all(g[1].abs().sum() > 0 for g in grads)


# ---------------------------------------------------------------- equals: consistency head, Eqs. (4.7)–(4.13)


def test_eq4_7_and_table_4_7():
    P = torch.tensor([0.99, 0.98, 0.5, 0.001])
    P = torch.stack([P, 1 - P]).view(1, 2, 2, 2)
    M = dfr.eq4_7_confident(P, 0.98)
    assert M.tolist() == [[[0, 255], [255, 1]]]
    M_s = torch.full((1, 8, 8), 255)
    M_s[0, :4, :4], M_s[0, :4, 4:] = 1, 1
    inside = torch.tensor([[[True, True], [True, False]]])
    labels = {choice: dfr.consistency_labels(P, M_s, inside, 0.98, choice).tolist()
              for choice in ("confident", "gt", "both")}
    assert labels == {"confident": [[[0, 255], [255, 255]]], "gt": [[[1, 1], [255, 255]]],
                      "both": [[[1, 1], [255, 255]]]}


def test_eqs4_8_and_4_9():
    _, _, _, M, _ = maps()
    offsets = dfr.eq4_3_window(2)
    bg, fg, apart = dfr.eq4_8_9_relations(M, offsets)
    for b, o, y, x in np.ndindex(*bg.shape):
        j = y + offsets[o][0], x + offsets[o][1]
        m, n = M[b, y, x], M[b, j[0], j[1]] if j in window_of((y, x), 5, 6, 2) else 255
        known = m != 255 and n != 255
        assert (bg[b, o, y, x], fg[b, o, y, x], apart[b, o, y, x]) == (
            known and m == n == 0, known and m == n > 0, known and m != n)
    assert bg.any() and fg.any() and apart.any()


def pairs_by_relation(M, F_):
    """{relation: [(D, δ) of its pairs, in both orders]}."""
    found = {"bg": [], "fg": [], "apart": []}
    for b, y, x in np.ndindex(*M.shape):
        for j in window_of((y, x), 5, 6, 2):
            m, n = M[b, y, x], M[b, j[0], j[1]]
            if m == 255 or n == 255: continue
            delta = (F_[b, :, y, x] - F_[b, :, j[0], j[1]]).abs().sum().item() / F_.shape[1]
            found["apart" if m != n else "fg" if m else "bg"].append((math.exp(-delta), delta))
    return found


def test_eqs4_10_and_4_11():
    _, F_, _, M, _ = maps()
    offsets = dfr.eq4_3_window(2)
    log_D = dfr.eq4_10_log_affinity(F_, offsets)
    assert close(log_D, -dfr.WindowSum.apply(F_, offsets, "l1") / 4)
    loss, expected, found = 0, 0, pairs_by_relation(M, F_)
    loss = dfr.eq4_11_feature_distance(log_D, *dfr.eq4_8_9_relations(M, offsets))
    for name, value in (("bg", lambda D: -math.log(D)), ("fg", lambda D: -math.log(D)),
                        ("apart", lambda D: -2 * math.log(1 - D))):
        expected += sum(value(D) for D, _ in found[name]) / len(found[name])
    assert close(loss, expected, atol=1e-3)
    none = torch.zeros_like(log_D, dtype=torch.bool)
    assert dfr.eq4_11_feature_distance(log_D, none, none, none) == 0
    same = torch.zeros_like(log_D).requires_grad_()
    dfr.eq4_11_feature_distance(same, none, none, ~none).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("which", ["all", "labelled"])
def test_eqs4_12_and_4_13(which):
    _, F_, I, M, inside = maps()
    offsets, total = dfr.eq4_3_window(2), 0
    K_f = dfr.eq4_6_13_kernel(I, None, inside, offsets, ("xy", "rgb"), 2.0, 0.7)
    if which == "labelled": K_f = K_f * torch.stack(dfr.eq4_8_9_relations(M, offsets)).any(0)
    loss = dfr.eq4_12_feature_regularised(dfr.eq4_10_log_affinity(F_, offsets), K_f, inside)
    for b, y, x in np.ndindex(2, 5, 6):
        for j in window_of((y, x), 5, 6, 2):
            if which == "labelled" and 255 in (M[b, y, x], M[b, j[0], j[1]]): continue
            if not inside[b, y, x] or not inside[b, j[0], j[1]]: continue
            delta = (F_[b, :, y, x] - F_[b, :, j[0], j[1]]).abs().sum() / 4
            total += kernel((y, x), j, ("xy", "rgb"), b, I, F_) * delta
    assert close(loss, total / inside.sum())


def test_all_losses_is_its_equations():
    """The image's mean in each cell, the padding, the switches."""
    batch, net = batch_of(2), network().train()
    logits, feature, _ = net(batch.image)
    valid = batch.pseudo != 255
    valid[0, :20] = False
    base = dict(gamma=0.12)
    results = {}
    for name, change in {"all": {}, "no dfr": dict(dfr_loss=False), "no fd": dict(fd_loss=False),
                         "no fr": dict(fr_loss=False), "xy": dict(kernel="xy")}.items():
        args = arguments(**base, **change)
        kept = feature if "feature" in dfr.kernel_parts(args) else None
        results[name] = dfr.all_losses(args, logits, kept, batch.image, batch.scribble, valid)
    zero = {name: [v.item() == 0 for v in r[:4]] for name, r in results.items()}
    assert zero == {"all": [False] * 4, "no dfr": [False, True, False, False],
                    "no fd": [False, False, True, False], "no fr": [False, False, False, True],
                    "xy": [False, False, True, True]}
    I, inside, offsets = F.avg_pool2d(batch.image, 4), valid[:, ::4, ::4], dfr.eq4_3_window(2)
    K = dfr.eq4_6_13_kernel(I, feature, inside, offsets, ("xy", "rgb", "feature"), 2.4, 0.5, 25)
    assert close(results["all"][1], dfr.eq4_4_dfr(logits.softmax(1), K, inside, offsets))
    assert (results["all"][4][~inside] == 255).all() and (results["all"][4] != 255).any()


# ---------------------------------------------------------------- networks


def thin_swin():
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer(patch_size=[4, 4], embed_dim=8, depths=[2, 2, 4, 2],
                                              num_heads=[1, 2, 4, 8], window_size=[7, 7], num_classes=5)


def official(state):
    """torchvision's Swin state -> the authors' names and shapes, written down by hand."""
    names = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm"}
    for i in range(4):
        if i < 3: names[f"features.{2 * i + 2}"] = f"layers.{i}.downsample"
        for j in range(4): names[f"features.{2 * i + 1}.{j}"] = f"layers.{i}.blocks.{j}"
    out = {}
    for key, value in state.items():
        stem = max((s for s in names if key.startswith(s + ".")), key=len, default="")
        new = key.replace(stem, names[stem], 1) if stem else key
        new = new.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        out[new] = value.view(49, 49) if key.endswith("relative_position_index") else value
    out["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return out


def test_swin_keys_both_ways():
    state = thin_swin().state_dict()
    theirs = official(state)
    wanted = {"patch_embed.proj.weight", "layers.2.blocks.3.attn.qkv.weight",
              "layers.0.blocks.1.mlp.fc1.bias", "layers.1.downsample.reduction.weight",
              "layers.3.blocks.0.attn.relative_position_bias_table"}
    assert wanted <= set(theirs) and not any(key.startswith("features") for key in theirs)
    back = {dfr.swin_key(key) for key in theirs if not key.endswith("attn_mask")}
    assert back == set(state) and all(dfr.swin_key(key) == key for key in state)


@pytest.mark.parametrize("form", ["authors", "authors, wrapped, half", "torchvision"])
def test_swin_weights_of_a_file(form, tmp_path):
    source, target = thin_swin(), thin_swin()
    for p in target.parameters(): torch.nn.init.zeros_(p)
    state = source.state_dict() if form == "torchvision" else official(source.state_dict())
    state = {k: v for k, v in state.items() if form != "authors" or not k.startswith(("norm.", "head."))}
    if "half" in form:
        state = {"model": {k: v.half() if v.is_floating_point() else v for k, v in state.items()}}
    torch.save(state, tmp_path / "swin.pth")
    dfr.load_swin(target, "swin_b", str(tmp_path / "swin.pth"))
    image = torch.randn(1, 3, 64, 96)
    one, two = source.eval().features(image), target.eval().features(image)
    assert one.abs().sum() > 0 and torch.allclose(one, two, atol=0.05 if "half" in form else 0)


def test_wrong_swin_weights_end_with_one_sentence(tmp_path):
    state = official(thin_swin().state_dict())
    del state["layers.2.blocks.3.attn.qkv.weight"]
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(SystemExit, match=r"missing features\.5\.3\.attn\.qkv\.weight"):
        dfr.load_swin(thin_swin(), "swin_b", str(tmp_path / "swin.pth"))
    torch.save([1, 2], tmp_path / "swin.pth")
    with pytest.raises(SystemExit, match="not a state dict"):
        dfr.load_swin(thin_swin(), "swin_b", str(tmp_path / "swin.pth"))


@pytest.mark.parametrize("size", [(64, 64), (61, 97), (33, 70)])
def test_swin_takes_any_size(size):
    swin = dfr.Swin(thin_swin(), 0.3).eval()
    assert swin.channels == (8, 16, 32, 64) and swin.strides == (4, 8, 16, 32)
    h, w = (-(-n // 4) for n in size)
    for tap, c in zip(swin(torch.randn(1, 3, *size)), swin.channels, strict=True):
        assert tap.shape == (1, c, h, w)
        assert close(tap.mean(1), torch.zeros(1, h, w), atol=1e-4), "a fresh layer norm over the channels"
        h, w = -(-h // 2), -(-w // 2)


def test_swin_b_is_the_papers():
    with torch.device("meta"): swin = dfr.Swin(torchvision.models.swin_b(weights=None), 0.3)
    assert swin.channels == (128, 256, 512, 1024)
    drops = [m.p for m in swin.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert len(drops) == 2 + 2 + 18 + 2 and drops[0] == 0 and abs(drops[-1] - 0.3) < 1e-9
    assert sorted(drops) == drops


@pytest.mark.parametrize("name, channels", [("tiny", (32, 48, 64, 96)), ("resnet18", (64, 128, 256, 512)),
                                            ("mobilenet_v2", (24, 32, 96, 1280))])
@pytest.mark.parametrize("size", [(96, 96), (75, 110)])
def test_other_backbones_and_odd_sizes(name, channels, size):
    net = network(backbone=name)
    assert net.backbone.channels == channels
    grid = [-(-n // 4) for n in size]
    logits, feature, aux = net.train()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 9, *grid) and feature.shape == (2, 32, *grid) and aux is None
    assert (feature >= 0).all() and (feature > 0).any()
    logits, feature, aux = net.eval()(torch.randn(1, 3, *size))
    assert logits.shape == (1, 9, *grid) and feature is None, "the head is not used at inference"


def test_the_fused_feature_has_2048_channels():
    net = dfr.make_dfr(dfr.Args(backbone="tiny", weights="none"), "none", 20)
    assert net.consistency[0].weight.shape == (128, 2048, 1, 1)
    assert net.classify.weight.shape == (21, 512, 1, 1)
    assert net.fuse[0][0].weight.shape == (512, 2048, 3, 3)
    assert net.ppm.join[0].weight.shape[1] == 96 + 4 * 512


@pytest.mark.parametrize("blocks", ["1", "4", "3,4", "1,2", "2,3,4"])
def test_blocks_select_levels_and_leave_nothing_that_does_not_learn(blocks):
    net = network(blocks=blocks, aux_head=True).train()
    levels = [int(b) for b in blocks.split(",")]
    assert net.consistency[0].weight.shape[1] == 32 * len(levels)
    logits, feature, aux = net(torch.randn(2, 3, 64, 64))
    (logits.sum() + feature.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert len(net.lateral) == 4 - min(levels)


def test_every_parameter_of_swin_learns(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: thin_swin())
    for blocks in ("1,2,3,4", "3,4"):
        net = network(backbone="swin_b", blocks=blocks).train()
        assert not net.backbone.frozen
        logits, feature, _ = net(torch.randn(2, 3, 64, 64))
        (logits.square().sum() + feature.sum()).backward()
        idle = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
        assert not idle
        still = {n.rsplit(".", 1)[0] for n, p in net.named_parameters() if not p.requires_grad}
        assert still == ({"backbone.tap_norms.0", "backbone.tap_norms.1"} if blocks == "3,4" else set())


@pytest.mark.parametrize("change, head, learns", [
    ({}, True, True), (dict(consistency_head=False), False, False), (dict(kernel="xy,rgb"), False, False),
    (dict(fd_loss=False, fr_loss=False), True, False), (dict(supervision="full"), False, False),
    (dict(fd_loss=False), True, True)])
def test_the_head_by_the_ablations(change, head, learns):
    net = network(**change)
    assert (net.consistency is not None) == head
    assert ("feature" in dfr.kernel_parts(arguments(**change))) == head
    assert any(p.requires_grad for p in net.consistency.parameters()) == learns if head else True


@pytest.mark.parametrize("blocks", ["1,5", "", "1,1", "12"])
def test_wrong_blocks(blocks):
    with pytest.raises(SystemExit, match="--blocks"): network(blocks=blocks)


def test_wrong_kernel():
    with pytest.raises(SystemExit, match="--kernel colour"): network(kernel="colour")


# ---------------------------------------------------------------- training recipe


def test_parameter_groups():
    torch.manual_seed(0)
    net = torch.nn.Sequential(dfr.Swin(thin_swin(), 0.3), dfr.conv_bn_relu(64, 8, 1))
    names, found = {id(p): n for n, p in net.named_parameters()}, {}
    for group in dfr.parameter_groups(net, 0.01, 1e-3, 1.0):
        for p in group["params"]: found[names[id(p)]] = group["weight_decay"]
    assert set(found) == set(names.values())
    without = {n for n, decay in found.items() if decay == 0}
    assert without == {n for n in names.values() if "norm" in n or "bias_table" in n
                       or n in ("0.blocks.0.0.2.weight", "0.blocks.0.0.2.bias", "1.1.weight", "1.1.bias")}
    assert {decay for n, decay in found.items() if n not in without} == {0.01}


def test_the_layers_behind_the_backbone_have_head_rate_times_the_rate():
    net = torch.nn.ModuleDict({"backbone": dfr.conv_bn_relu(3, 4, 1), "head": dfr.conv_bn_relu(4, 8, 1)})
    groups = dfr.parameter_groups(net, 0.01, 1e-3, 10.0)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {n: found[id(p)] for n, p in net.named_parameters()} == {
        n: 1e-3 if n.startswith("backbone") else 1e-2 for n, _ in net.named_parameters()}
    assert len(dfr.parameter_groups(net, 0.01, 1e-3, 1.0)) == 2 and dfr.Args().head_rate == 1


def test_rates_are_mmsegmentations():
    factor = dfr.rates(40_000, 1500)
    for step in (0, 1, 700, 1499, 1500, 20_000, 39_999):
        regular = 1 - step / 40_000
        expected = regular * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else regular
        assert abs(factor(step) - expected) < 1e-12
    assert abs(factor(0) - 1e-6) < 1e-12 and dfr.rates(10, 0)(0) == 1


def test_the_papers_recipe_is_the_default():
    args = dfr.Args()
    assert (args.seg_steps, args.seg_batch, args.seg_lr, args.weight_decay) == (40_000, 16, 3e-5, 0.01)
    assert (args.seg_crop, args.seg_rescale, args.gamma) == (512, (0.5, 2.0), 0.98)
    assert (args.sigma_xy, args.sigma_rgb, args.sigma_feature) == (6, 0.5, 50)
    for preset in (dfr.SHAPES, dfr.PHOTOS):
        partners = len(dfr.eq4_3_window(preset["radius"])) * 2
        assert abs(partners * preset["w_dfr"] - 120 * args.w_dfr) < 1e-9


def test_fitted():
    assert dfr.fitted((375, 500), (2048, 512), 1.0) == [512, 683]
    assert dfr.fitted((100, 1000), (2048, 512), 0.5) == [102, 1024]
    assert dfr.fitted((97, 128), (0, 0), 0.5) == [48, 64]


def test_photometric_distortion():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    s = Sample(image=image, scribble=np.zeros((20, 30), np.uint8))
    seen = [dfr.photometric(s, np.random.default_rng(i)) for i in range(60)]
    same = sum((t.image == image).all() for t in seen)
    assert 0 < same < 20 and all(t.image.dtype == np.uint8 and t.scribble is s.scribble for t in seen)
    gray = Sample(image=np.full((2, 2, 3), 100, np.uint8))
    levels = np.array([dfr.photometric(gray, np.random.default_rng(i)).image.mean() for i in range(300)])
    assert 30 < levels.min() < 60 and 150 < levels.max() < 200, "±32, then 0.5 to 1.5 times"
    no = dict(brightness=0, contrast=(1, 1), saturation=(1, 1))
    turned = [dfr.photometric(Sample(image=np.full((1, 1, 3), (200, 50, 50), np.uint8)),
                              np.random.default_rng(i), **no).image[0, 0] for i in range(100)]
    assert max(p.max() for p in turned) == 200 and max(p[1] for p in turned) > 100, "hue turns, value stays"


def test_a_varied_crop_ignores_unlabelled_pixels():
    scribble = np.full((40, 200), 255, np.uint8)
    scribble[20, :100], scribble[20, 100:] = 0, 1
    s = Sample(image=np.zeros((40, 200, 3), np.uint8), scribble=scribble, tags=np.array([True]))

    def mixed(cut):
        crops = [cut(s, 40, np.random.default_rng(i)).scribble for i in range(60)]
        shares = np.array([(c == 1).sum() / (c != 255).sum() for c in crops])
        return ((shares > 0.25) & (shares < 0.75)).mean()

    varied = mixed(lambda *call: dfr.varied_crop(*call, 0.75))
    assert mixed(data.crop) < 0.25 and 0.5 < varied < 1, "1/8 of all crops, 3/4 with ten trials"
    nothing = dfr.varied_crop(data.changed(s, scribble=np.full_like(scribble, 255)), 40,
                              np.random.default_rng(0), 0.75)
    assert (nothing.scribble == 255).all()


def test_a_crops_padding_is_marked():
    batch = batch_of(3, seg_crop=140)
    assert (batch.pseudo == 255).any() and set(batch.pseudo.unique().tolist()) == {0, 255}
    assert (batch.scribble[batch.pseudo == 255] == 255).all()


# ---------------------------------------------------------------- scribbles (Fig. 4.3)


def test_scribbles_are_shortened_to_their_middle():
    scribble = np.full((30, 40), 255, np.uint8)
    scribble[5, 2:35] = 3
    scribble[10:25, 7] = scribble[24, 7:22] = 1                     # a bent stroke of 29 cells
    scribble[28, 30] = 0                                            # a spot
    for length, straight, bent in ((1.0, 33, 29), (0.5, 17, 15), (0.0, 1, 1)):
        short = dfr.shorten(scribble, length)
        assert ((short == 255) | (short == scribble)).all(), "nothing new"
        counts = {k: (short == k).sum() for k in (0, 1, 3)}
        assert counts == {0: 1, 3: straight, 1: bent}
    half = dfr.shorten(scribble, 0.5)
    assert (half[5, 10:27] == 3).all() and half[24, 7] == 1, "the middle, also around the bend"
    assert (dfr.shorten(np.full((5, 5), 255, np.uint8), 0.3) == 255).all()


@pytest.mark.parametrize("length", [0.0, 0.3])
def test_shorter_scribbles_of_scenes(length):
    train = load(arguments(), "train")
    for i in range(4):
        whole = train[i].scribble
        short = dfr.shorten(whole, length)
        assert set(np.unique(short)) == set(np.unique(whole)), "every stroke keeps something"
        assert 0 < (short != 255).sum() < 0.6 * (whole != 255).sum()
    full, less = batch_of(8), batch_of(8, scribble_length=length)
    assert 0 < (less.scribble != 255).sum() < (full.scribble != 255).sum()


def test_training_samples_carry_no_mask():
    sample = Draws(load(arguments(), "train"), dfr.train_augment(arguments()), 0)[0]
    assert set(vars(sample)) == {"name", "image", "tags", "scribble", "pseudo"}


# ---------------------------------------------------------------- learns


def spread(w_dfr):
    """A grid of two colours with a spot of each class: the free logits after 150 steps of Eq. (4.1)."""
    torch.manual_seed(0)
    truth = torch.zeros(1, 12, 12, dtype=torch.long)
    truth[:, 2:9, 5:] = 1
    I = (2.0 * truth[:, None]).repeat(1, 3, 1, 1) + 0.2 * torch.randn(1, 3, 12, 12)
    M_s, inside = torch.full_like(truth, 255), torch.ones_like(truth, dtype=torch.bool)
    M_s[0, 6, 1], M_s[0, 5, 8] = 0, 1
    logits, offsets = torch.zeros(1, 2, 12, 12, requires_grad=True), dfr.eq4_3_window(2)
    K = dfr.eq4_6_13_kernel(I, None, inside, offsets, ("xy", "rgb"), 2.4, 0.5)
    optim = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        L_pce = dfr.eq4_2_partial_cross_entropy(logits, M_s)
        L_dfr = dfr.eq4_4_dfr(logits.softmax(1), K, inside, offsets)
        optim.zero_grad()
        dfr.eq4_1_total(L_pce, L_dfr, 0, 0, w_dfr, 0).backward()
        optim.step()
    return (logits.argmax(1) == truth).float().mean().item()


def test_l_dfr_spreads_two_spots_over_their_colours():
    assert spread(0.05) > 0.97 and spread(0.0) < 0.7


def test_the_losses_fall():
    """All four, with labels of the head that are given: then L_fd has pairs of all kinds from the start."""
    batch, args, history = batch_of(2, photometric=False), arguments(), []
    cells, net = batch_of(2, photometric=False, supervision="full").mask, network().train()
    optim = torch.optim.AdamW(net.parameters(), lr=1e-3)
    I, offsets = F.avg_pool2d(batch.image, 4), dfr.eq4_3_window(2)
    inside = (batch.pseudo != 255)[:, ::4, ::4]
    relations = dfr.eq4_8_9_relations(cells[:, ::4, ::4], offsets)
    K_f = dfr.eq4_6_13_kernel(I, None, inside, offsets, ("xy", "rgb"), 2.4, 0.5)
    for _ in range(15):
        logits, feature, _ = net(batch.image)
        L_pce, L_dfr, *_ = dfr.all_losses(args, logits, feature, batch.image, batch.scribble, inside.new_ones(
            batch.pseudo.shape))
        log_D = dfr.eq4_10_log_affinity(feature, offsets)
        losses = [L_pce, L_dfr, dfr.eq4_11_feature_distance(log_D, *relations),
                  dfr.eq4_12_feature_regularised(log_D, K_f, inside)]
        optim.zero_grad()
        dfr.eq4_1_total(*losses, args.w_dfr, args.w_feature).backward()
        optim.step()
        history.append([v.item() for v in losses])
    first, last = np.mean(history[:2], 0), np.mean(history[-2:], 0)
    assert last[0] < 0.8 * first[0] and last[1] < first[1] and last[2] < first[2], history


def test_the_head_outlives_a_time_without_confident_pairs():
    """L_fr alone, then L_fd with labels of all kinds, by the preset's rate: F must not be 0 for good, since
    no loss has a gradient there."""
    batch, net = batch_of(4, photometric=False, seg_crop=48, supervision="full"), network().train()
    kept, offsets = [], dfr.eq4_3_window(2)
    net.fuse.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].detach()))
    net(batch.image)
    I, inside = F.avg_pool2d(batch.image, 4), torch.ones(4, 12, 12, dtype=torch.bool)
    relations = dfr.eq4_8_9_relations(batch.mask[:, ::4, ::4], offsets)
    K_f = dfr.eq4_6_13_kernel(I, None, inside, offsets, ("xy", "rgb"), 2.4, 0.5)
    optim, L_fd = torch.optim.AdamW(net.consistency.parameters(), lr=dfr.SHAPES["seg_lr"]), []
    for step in range(250):
        feature = net.consistency(kept[0])
        log_D = dfr.eq4_10_log_affinity(feature, offsets)
        L_fd.append(dfr.eq4_11_feature_distance(log_D, *relations))
        loss = dfr.eq4_12_feature_regularised(log_D, K_f, inside) + (L_fd[-1] if step >= 150 else 0)
        optim.zero_grad()
        loss.backward()
        optim.step()
    first, before, last = L_fd[0], L_fd[149], L_fd[-1]
    dead = (feature.amax((0, 2, 3)) == 0).float().mean()
    assert before > 2 * first and last < 0.5 * before and dead < 0.5, (first, before, last, dead)


# ---------------------------------------------------------------- runs

TINY = """dfr.py --preset shapes --workers 0 --device cpu --width 8 --feature-dim 8 --seg-steps 6
    --seg-batch 2 --seg-crop 64 --test-scales 0.5 1 --save-every 2 --log-every 1""".split()


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
        dfr.main()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    sh(*command(folder, out))
    return out


def test_says_that_scribbles_were_derived(folder, finished, tmp_path):
    assert not any("scribble" in entry["notes"] for entry in scores(finished)), "these stand in files"
    shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "train" / "scribbles")
    sh(*command(tmp_path / "data", tmp_path / "out"))
    assert all("derived" in entry["notes"]["scribble"] for entry in scores(tmp_path / "out"))


def test_val_pictures_without_labels_are_predicted_and_not_scored(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for path in list((tmp_path / "data" / "val").iterdir()):
        if path.name != "images": shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(2): run_here(*command(tmp_path / "data", tmp_path / "out", "--seg-steps", 2))
    assert len(list((tmp_path / "out" / "val_ms").glob("*.png"))) == 5
    assert (tmp_path / "out/panels/val.png").exists() and not (tmp_path / "out/results.json").exists()


def scores(out):
    """The stages of results.json without times and memory."""
    stages = json.loads((out / "results.json").read_text())["stages"]
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages]


def contents(out, *parts):
    files = [f for part in parts for f in sorted((out / part).rglob("*")) if f.is_file()]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_runs(finished):
    entries = scores(finished)
    assert [s["stage"] for s in entries] == ["val", "val_ms"]
    for s in entries:
        assert s["n_images"] == 5 and s["uses_masks"] and not s["crf"] and s["split"] == "val"
        assert 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        fg = [v for k, v in s["iou"].items() if k != "background" and v is not None]
        assert abs(s["miou_fg"] - sum(fg) / len(fg)) < 1e-9
    assert [s["scales"] for s in entries] == [[1.0], [0.5, 1.0]]
    for place in ("val", "val_ms"):
        files = sorted((finished / place).glob("*.png"))
        assert len(files) == 5
        for file in files:
            with Image.open(file) as image: assert set(np.unique(np.asarray(image))) <= {*range(9)}
    assert (finished / "panels" / "val.png").exists()
    lines = log_of(finished)
    assert len(lines) == 6 and all(np.isfinite(list(e.values())[1:]).all() for e in lines)
    assert all(e["loss_pce"] > 0 and e["loss_dfr"] > 0 and e["loss_fr"] > 0 for e in lines)


def test_the_same_command_again_does_nothing(finished, folder):
    before, numbers = contents(finished, "val", "val_ms"), scores(finished)
    times = {f: f.stat().st_mtime_ns for f in finished.rglob("*.p[nt]*")}
    run_here(*command(folder, finished))
    assert contents(finished, "val", "val_ms") == before and scores(finished) == numbers
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def test_runs_on_full_masks(folder, tmp_path):
    run_here(*command(folder, tmp_path, "--supervision", "full", "--seg-steps", 2))
    assert all(e["loss_dfr"] == e["loss_fd"] == e["loss_fr"] == 0 < e["loss_pce"] for e in log_of(tmp_path))
    state = torch.load(tmp_path / "segmenter.pt", weights_only=True)
    assert not any(key.startswith("consistency") for key in state["model"])


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    line = command(folder, tmp_path)
    kill_when(lambda: (tmp_path / "segmenter.pt").exists(), *line)
    assert torch.load(tmp_path / "segmenter.pt", weights_only=True)["step"] < 6
    run_here(*line)
    assert scores(tmp_path) == scores(finished)
    assert contents(tmp_path, "val", "val_ms") == contents(finished, "val", "val_ms")


def test_predicts(finished, folder, tmp_path):
    pictures = folder / "val" / "images"
    run_here("dfr.py", "--predict", pictures, "--checkpoint", finished / "segmenter.pt", "--out", tmp_path,
             "--workers", 0, "--device", "cpu")
    for file in pictures.iterdir():
        label = read_label(tmp_path / "predict" / file.name, 8, read_image(file))
        assert (label == read_label(finished / "val_ms" / file.name)).all(), "the run's own prediction"
    assert len(list((tmp_path / "predict").glob("*_overlay.png"))) == 5


def test_predict_is_the_mean_over_scales_and_mirror_images():
    net, image = network().eval(), load(arguments(), "val")[0].image
    prob, size = dfr.predict(net, image, (0, 0), (0.75, 1.0), True, torch.device("cpu")), image.shape[:2]
    assert prob.shape == (9, *size) and close(prob.sum(0), np.ones(size, np.float32))
    turned = dfr.predict(net, np.ascontiguousarray(image[:, ::-1]), (0, 0), (0.75, 1.0), True,
                         torch.device("cpu"))
    assert close(prob, turned[..., ::-1].copy())
    one = dfr.predict(net, image, (0, 0), (1.0,), False, torch.device("cpu"))
    below, right = -size[0] % 32, -size[1] % 32
    assert below or right, "a size that is padded"
    x = F.pad(normalise(Sample(image=image)).image[None], (0, right, 0, below))
    with torch.no_grad(): logits = F.interpolate(net(x)[0], x.shape[2:], mode="bilinear")
    assert close(one, logits[..., :size[0], :size[1]].softmax(1)[0].numpy())


ABLATIONS = {
    "Table 4.5, CE": "--no-dfr-loss --no-consistency-head", "Table 4.5, L_dfr": "--no-fd-loss --no-fr-loss",
    "Table 4.4": "--blocks 3,4 --aux-head", "Table 4.6": "--kernel xy,feature",
    "Table 4.7": "--consistency-labels both --fr-pairs labelled",
    "Fig. 4.3": "--scribble-length 0.3 --no-photometric --fit 128 64"}


@pytest.mark.parametrize("flags", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations(folder, tmp_path, flags):
    run_here(*command(folder, tmp_path, "--seg-steps", 2, *flags.split()))
    assert [s["stage"] for s in scores(tmp_path)] == ["val", "val_ms"]
    for e in log_of(tmp_path):
        assert (e["loss_dfr"] > 0) == ("--no-dfr-loss" not in flags) and e["loss_pce"] > 0
        if "labelled" in flags: continue                            # no confident pair in so few steps
        assert (e["loss_fr"] == 0) == ("--no-fr-loss" in flags or "no-consistency" in flags)


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--scribble-length", "1.5"], "scribble-length"),
    (["--kernel", "xy,hsv"], "--kernel"), (["--blocks", "0"], "--blocks"),
    (["--seg-batch", "1"], "two images")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(SystemExit, match=words): run_here(*command(folder, tmp_path, *more))


def test_another_files_checkpoint_is_refused(folder, tmp_path):
    torch.save({"model": {"head.branches.0.weight": torch.zeros(1)}, "args": {}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"segmenter\.pt"):
        run_here("dfr.py", "--predict", folder / "val" / "images", "--checkpoint", tmp_path / "other.pt")


def test_each_field_belongs_to_the_stage_or_can_not_change_it():
    fields, known = dfr.FIELDS["segmenter"], {f.name for f in dataclasses.fields(dfr.Args)}
    free = set("preset out reuse fresh device workers crf predict checkpoint log_every save_every "
               "test_scales".split())
    assert set(fields) <= known and len(fields) == len(set(fields)) and known - set(fields) == free


# ---------------------------------------------------------------- PASCAL-Context


@pytest.fixture
def context(tmp_path):
    """VOC2010 with three train and two val pictures of 48 x 64 pixels in PASCAL-Context's layout."""
    root, rng = tmp_path / "VOC2010", np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext", "scribbles"):
        (root / part).mkdir(parents=True)
    names = {"train": ["2008_000002", "2008_000003", "2008_000007"], "val": ["2008_000001", "2008_000009"]}
    for split, listed in names.items():
        (root / "ImageSets/SegmentationContext" / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for name in listed:
            picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
            picture.save(root / "JPEGImages" / f"{name}.jpg")
            mask = np.repeat(np.array([0, 1, 47, 59], np.uint8), 16)[None].repeat(48, 0)
            mask[0] = 255
            Image.fromarray(mask).save(root / "SegmentationClassContext" / f"{name}.png")
    strokes = "".join(f"<polygon><tag>{tag}</tag><point><X>{x}</X><Y>5</Y></point><point><X>{x}</X><Y>40</Y>"
                      "</point></polygon>" for tag, x in (("background", 5), ("aeroplane", 20), ("sky", 37)))
    for name in names["train"]:
        (root / "scribbles" / f"{name}.xml").write_text(f"<annotation>{strokes}</annotation>")
    return root


def context_args(root, supervision="scribble", train_list="train_aug"):
    return types.SimpleNamespace(data="context", root=str(root), train_list=str(train_list),
                                 supervision=supervision)


def test_context_reads_scribbles_for_training_and_masks_for_tests(context):
    classes = data.CONTEXT_CLASSES
    assert len(classes) == 59 and classes == sorted(classes) and classes[46] == "sky"
    for root in (context, context.parent):
        train = load(context_args(root), "train")
        assert len(train) == 3 and train.fields == ("scribble",)
        for s in train:
            assert not hasattr(s, "mask") and s.image.shape == (48, 64, 3)
            assert (s.scribble[5:41, 5] == 0).all() and (s.scribble[5:41, 20] == 1).all()
            assert (s.scribble[5:41, 37] == 47).all() and set(np.unique(s.scribble)) == {0, 1, 47, 255}
            assert np.flatnonzero(s.tags).tolist() == [0, 46], "the tags are those of the scribbles"
    val = load(context_args(context), "val")
    assert val.names == ["2008_000001", "2008_000009"] and "scribbles" not in val.notes["tags"]
    assert set(np.unique(val[0].mask)) == {0, 1, 47, 59, 255}
    assert np.flatnonzero(val[0].tags).tolist() == [0, 46, 58]
    assert load(context_args(context, "full"), "train")[0].mask[10, 40] == 47


def test_context_without_scribbles_and_with_faults(context, tmp_path):
    for file in (context / "scribbles").iterdir(): file.unlink()
    train = load(context_args(context), "train")
    assert "derived" in train.notes["scribble"] and set(np.unique(train[0].scribble)) == {0, 1, 47, 59, 255}
    (tmp_path / "list.txt").write_text("2008_000003\n")
    picked = load(context_args(context, train_list=tmp_path / "list.txt"), "train")
    assert picked.names == ["2008_000003"]
    wrong = np.full((48, 64), 60, np.uint8)
    Image.fromarray(wrong).save(context / "SegmentationClassContext" / "2008_000001.png")
    with pytest.raises(DataError, match=r"2008_000001\.png holds 60, but only 0\.\.59"):
        load(context_args(context), "val")
    (context / "SegmentationClassContext" / "2008_000001.png").unlink()
    with pytest.raises(DataError, match="SegmentationClassContext lacks 1 of 2"):
        load(context_args(context), "val")
    with pytest.raises(DataError, match="pascal-context"): load(context_args(tmp_path / "nowhere"), "train")


def test_context_is_checked(context, capsys):
    data.check("context", str(context))
    rows = capsys.readouterr().out
    assert "expected 4998" in rows and "expected 5105" in rows and "val samples read" in rows


def test_runs_on_context(context, tmp_path):
    run_here(*TINY, "--data", "context", "--root", context, "--out", tmp_path / "run", "--seg-steps", 2)
    entries = scores(tmp_path / "run")
    assert [len(s["iou"]) for s in entries] == [60, 60] and "background" in entries[0]["iou"]
