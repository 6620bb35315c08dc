"""cian.py: each equation against an authority, the pairs, the script on a few scenes, and what it learns."""

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
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import cian
from common import UserError, make_backbone, save_image
from conftest import kill_when, sh
from data import DataError, Draws, collate, export, load, read_image, read_label

torch.set_num_threads(1)


def arguments(**changes):
    return cian.Args(**{**cian.SHAPES, **changes})


def close(a, b, atol=1e-5):
    a, b = (t if torch.is_tensor(t) else torch.tensor(t) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-4)


def label_map(text):
    """Rows of digits, `.` = 255 -> (H,W) int64."""
    return torch.tensor([[255 if c == "." else int(c) for c in row] for row in text.split()])


def module(channels=6, seed=0, std=0.5, **changes):
    """An affinity module that does something: γ is not zero."""
    torch.manual_seed(seed)
    made = cian.AffinityModule(channels, std=std, **changes)
    torch.nn.init.uniform_(made.phi_o[1].weight, 0.5, 1.5)
    return made


# ---------------------------------------------------------------- equals: the module, Eqs. (1)–(5)


def message(q, r, c):
    """Eqs. (1)–(3) pixel by pixel, of one image.   q (N,d), r and c (M,d)"""
    rows = []
    for i in range(len(q)):
        k = [math.exp((q[i] * r[j]).sum()) for j in range(len(r))]
        rows.append(sum(k[j] / sum(k) * c[j] for j in range(len(r))))
    return torch.stack(rows)


def test_eqs_1_to_3_by_a_double_loop():
    torch.manual_seed(0)
    q, r, c = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    m = cian.eq2_3_message(q, r, c)
    assert close(m, torch.stack([message(*one) for one in zip(q, r, c)]))
    weights = cian.eq1_2_affinity(q, r)
    assert close(weights.sum(-1), torch.ones(2, 5)) and close(weights @ c, m)
    assert not close(F.scaled_dot_product_attention(q, r, c), m), "the default scale 1/√d is another equation"


@pytest.mark.parametrize("how", ["max", "mean"])
def test_eqs_1_to_5_of_a_group_by_loops(how):
    """Three images, each with the two others as references: the max is of messages, before φ_o and γ."""
    net, x = module(merge=how), torch.randn(3, 6, 5, 4)
    references = cian.others_of_group(3, 2)
    out = net(x, references)
    messages = {head: [] for head in ("self", "cross")}
    for b in range(3):
        q = net.phi_q(x[b:b + 1])[0].flatten(1).T
        keys = []
        for h in (b, *references[b].tolist()):
            r, c = (F.max_pool2d(phi(x[h:h + 1]), 3, 2, 1)[0] for phi in (net.phi_r, net.phi_c))
            assert r.shape == (3, 3, 2)
            keys.append(message(q.detach(), r.flatten(1).T.detach(), c.flatten(1).T.detach()))
        merged = torch.stack([torch.stack([m[i] for m in keys]).max(0).values if how == "max" else
                              sum(m[i] for m in keys) / 3 for i in range(20)])
        messages["cross"].append(merged)
        messages["self"].append(keys[0])
    y = net.phi_o[0](torch.stack([*messages["cross"], *messages["self"]]).transpose(1, 2).view(6, 3, 5, 4))
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    y = (y - mean) / (var + 1e-5).sqrt() * net.phi_o[1].weight[:, None, None]           # live statistics
    assert close(out["cross"].detach(), (x + y[:3]).detach(), atol=1e-4)
    assert close(out["self"].detach(), (x + y[3:]).detach(), atol=1e-4)


def test_the_module_begins_as_the_identity():
    made, x = cian.AffinityModule(8), torch.randn(4, 8, 6, 6)
    assert made.gamma() == 0 and close(made(x)["self"].detach(), x)
    assert list(made(x)) == ["self"] and list(made(x, cian.others_of_group(4, 1))) == ["cross", "self"]
    loss = made(x, cian.others_of_group(4, 1))["cross"].square().sum()
    loss.backward()
    assert made.phi_o[1].weight.grad.abs().sum() > 0, "γ can leave zero"
    for phi in (made.phi_q, made.phi_r, made.phi_c, made.phi_o[0]): assert 0.005 < phi.weight.std() < 0.015


def test_an_image_paired_with_itself_is_self_affinity():
    net, x = module().eval(), torch.randn(2, 6, 4, 4)
    out = net(x, torch.tensor([[0], [1]]))
    assert close(out["cross"].detach(), out["self"].detach())


def test_bf16_attention_is_in_float32():
    net, x = module(), torch.randn(2, 6, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in net.embed(x)} == {torch.float32}
        assert all(t.dtype == torch.float32 for t in net(x, cian.others_of_group(2, 1)).values())


def test_table_1_on_paper():
    """ResNet-101 at 321²: the module adds 8.39 M parameters and 15.6 GMAC, a second attention 1.5 more."""
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    macs = {}
    with FakeTensorMode():                                          # shapes without numbers: no work
        net = cian.CIAN(make_backbone("resnet101", "none", 8), 20, "max", 0.01, 12).eval()
        image = torch.zeros(2, 3, 321, 321)
        works = {"vanilla": lambda: net.head(net.backbone(image)[-1]), "baseline": lambda: net(image),
                 "ours": lambda: net(image, cian.others_of_group(2, 1))}
        for what, work in works.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad(): work()
            macs[what] = counter.get_total_flops() / 2 / 1e9 / 2        # MAC of one image
    assert count(net.affinity) == 4 * 2048 * 1024 + 2 * 2048
    assert abs(macs["baseline"] - macs["vanilla"] - 15.6) < 0.1
    # the second x̂ costs an attention, φ_o and f_c again
    assert abs(macs["ours"] - macs["baseline"] - 1.52 - 41**2 * (1024 * 2048 + 9 * 2048 * 21) / 1e9) < 0.05
    assert 72 < macs["vanilla"] < 74 and 42 < count(net.backbone) / 1e6 < 43


# ---------------------------------------------------------------- equals: losses, Eqs. (6)–(9)


def test_eqs_6_and_8_by_hand():
    torch.manual_seed(0)
    scores, label = torch.randn(2, 4, 3, 5), torch.from_numpy(
        np.random.default_rng(0).choice([0, 2, 3, 255], (2, 3, 5)))
    values = [-math.log(scores[b, :, i, j].softmax(0)[label[b, i, j]]) for b, i, j in np.ndindex(2, 3, 5)
              if label[b, i, j] != 255]
    assert close(cian.eq6_8_cross_entropy(scores, label), sum(values) / len(values))


def test_a_crop_without_a_labelled_pixel_has_loss_zero():
    scores = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = cian.eq6_8_cross_entropy(scores, torch.full((2, 3, 5), 255))
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()


def test_eq7_keeps_the_images_classes_and_background():
    scores = 5 * F.one_hot(label_map("0123 3210"), 4).permute(2, 0, 1)[None].float()
    valid = torch.ones(1, 2, 4, dtype=torch.bool)
    valid[0, 1, 3] = False
    label = lambda *tags: cian.eq7_online_label(scores, torch.tensor([tags]), valid)[0]  # noqa: E731
    assert (label(1.0, 0.0, 1.0) == label_map("01.3 3.1.")).all()
    assert (label(0.0, 1.0, 0.0) == label_map("0.2. .2..")).all()
    assert (label(0.0, 0.0, 0.0) == label_map("0... ....")).all(), "an image without tags: background only"


@pytest.mark.parametrize("target", ["own", "cross"])
def test_eq9_has_four_terms_and_targets_without_gradient(target):
    torch.manual_seed(0)
    scores = {head: torch.randn(2, 4, 3, 3, requires_grad=True) for head in ("cross", "self")}
    label = torch.from_numpy(np.random.default_rng(0).choice([0, 2, 255], (2, 3, 3)))
    tags, valid = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.ones(2, 3, 3, dtype=torch.bool)
    terms = cian.eq9_terms(scores, label, tags, valid, True, target)
    assert list(terms) == ["loss_ce_cross", "loss_ce_self", "loss_cp_cross", "loss_cp_self"]
    y_hat = {head: cian.eq7_online_label(s, tags, valid) for head, s in scores.items()}
    for head, s in scores.items():
        goal = y_hat["cross" if target == "cross" else head]
        assert close(terms[f"loss_ce_{head}"].detach(), cian.eq6_8_cross_entropy(s, label).detach())
        assert close(terms[f"loss_cp_{head}"].detach(), cian.eq6_8_cross_entropy(s, goal).detach())
    assert (y_hat["cross"] != y_hat["self"]).any(), "the two targets differ here"
    terms["loss_cp_self"].backward()
    assert scores["cross"].grad is None and scores["self"].grad.abs().sum() > 0


def test_eq9_without_cross_or_completion():
    scores, label = {"self": torch.randn(1, 3, 2, 2)}, torch.zeros(1, 2, 2, dtype=torch.long)
    tags, valid = torch.zeros(1, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    assert list(cian.eq9_terms(scores, label, tags, valid, False)) == ["loss_ce_self"]
    assert list(cian.eq9_terms(scores, label, tags, valid, True, "cross")) == ["loss_ce_self", "loss_cp_self"]


# ---------------------------------------------------------------- seeds


def test_seeds_conflicts_and_the_rest_are_ignored():
    cam = np.zeros((2, 1, 7), np.float32)
    cam[0, 0] = [0.9, 0.4, 0.3, 0.0, 0.8, 0.0, 0.31]
    cam[1, 0] = [0.0, 0.5, 0.0, 0.0, 0.0, 0.9, 0.30]
    saliency = np.array([[0.5, 0.5, 0.5, 0.05, 0.05, 0.06, 0.9]])
    assert (torch.from_numpy(cian.seeds_from(cam, saliency, 0.3, 0.06)) == label_map("1..0.21")).all()
    assert (cian.seeds_from(cam[:0], saliency, 0.3, 0.06) == label_map("...00..").numpy()).all(), "no class"


def test_boundary_connectivity_of_a_disc():
    """A disc in the middle is salient, the ground is not; a bar from border to border is ground."""
    y, x = np.mgrid[:80, :100]
    image = np.full((80, 100, 3), (90, 120, 150), np.uint8)
    disc, bar = (y - 30)**2 + (x - 50)**2 < 15**2, y > 60
    image[disc], image[bar] = (200, 60, 40), (60, 90, 40)
    saliency = cian.boundary_connectivity(image, 150, 10.0)
    assert saliency.shape == (80, 100) and 0 <= saliency.min() and saliency.max() <= 1
    assert saliency[disc].mean() > 0.9 and saliency[~disc & ~bar].mean() < 0.03 and saliency[66:].mean() < 0.1
    plain = np.full((40, 40, 3), 99, np.uint8)
    assert (cian.boundary_connectivity(plain, 50, 10.0) < 0.06).all(), "all ground"


def test_given_saliency_of_another_size(tmp_path):
    image = np.zeros((10, 20), np.uint8)
    image[:, 10:] = 255
    save_image(tmp_path / "a.png", image)
    saliency = cian.given_saliency(tmp_path / "a.png", (20, 40))
    assert saliency.shape == (20, 40) and (saliency[:, :15] == 0).all() and (saliency[:, 25:] == 1).all()
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(DataError, match="b.png"): cian.given_saliency(tmp_path / "b.png", (20, 40))
    with pytest.raises(DataError, match="c.png"): cian.given_saliency(tmp_path / "c.png", (20, 40))
    Image.fromarray(np.full((10, 20), 40_000, np.uint16)).save(tmp_path / "d.png")
    with pytest.raises(DataError, match="d.png has more than 8 bits"):
        cian.given_saliency(tmp_path / "d.png", (20, 40))


def test_cam_is_normalised_and_has_the_images_classes_only():
    torch.manual_seed(0)
    net = cian.Classifier(make_backbone("tiny", "none", 8), 4, pool5=True).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    cam = cian.class_activation(net, image, np.array([True, False, True, False]), (1.0, 0.5), 8, "cpu")
    assert cam.shape == (4, 40, 56) and (cam[[1, 3]] == 0).all() and cam.min() >= 0
    for c in (0, 2): assert cam[c].max() == 0 or abs(cam[c].max() - 1) < 1e-5
    none = cian.class_activation(net, image, np.zeros(4, bool), (1.0,), 8, "cpu")
    assert none.shape == cam.shape and not none.any(), "an image without tags"
    x = torch.randn(2, 3, 32, 32)
    assert close(net(x).detach(), net.classifier(net.pool5(net.backbone(x)[-1]).mean((2, 3), keepdim=True)
                                                 )[:, :, 0, 0].detach())


def test_vgg16_as_the_paper_has_it():
    """pool4 with stride 1, conv5 with dilation 2: stride 8."""
    with torch.device("meta"):                                      # shapes without numbers: no work
        net = cian.Classifier(make_backbone("vgg16", "none", 8), 20, pool5=True)
        assert net.scores(torch.zeros(1, 3, 65, 65)).shape == (1, 20, 9, 9)
    convs = [m.dilation for m in net.backbone.blocks[3].modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs == [(2, 2)] * 3 and net.backbone.strides == (2, 4, 8, 8)


# ---------------------------------------------------------------- pairs


TAGS = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)


def groups(pairs="common", references=1, seed=0, tags=TAGS):
    """Groups whose items are (index, crop's first random number)."""
    return cian.Groups(range(len(tags)), lambda i, rng: (i, rng.random()), seed, tags, references, pairs)


@pytest.mark.parametrize("references", [1, 2])
def test_each_image_is_a_query_once_an_epoch(references):
    drawn, size, n = groups(references=references), 1 + references, len(TAGS)
    for epoch in range(3):
        queries = [drawn[(epoch * n + g) * size][0] for g in range(n)]
        assert sorted(queries) == list(range(n))
    assert [drawn[g * size][0] for g in range(n)] != [drawn[(n + g) * size][0] for g in range(n)]


@pytest.mark.parametrize("references", [1, 2])
def test_common_pairs_share_a_class(references):
    drawn, size, met = groups(references=references), 1 + references, set()
    for g in range(120):
        items = [drawn[g * size + m] for m in range(size)]
        query, *others = [i for i, _ in items]
        assert len({r for _, r in items}) == size, "each member has a crop of its own"
        for other in others:
            assert other == query or (TAGS[query] & TAGS[other]).any(), (query, other)
            met.add((query, other))
        assert TAGS[[query, *others]].all(0).any() or not TAGS[query].any(), "all of a group share one class"
    assert {(0, 1), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)} <= met
    assert {p for p in met if p[0] in (4, 5)} == {(4, 4), (5, 5)}, "no partner: another crop of itself"


def test_random_pairs_are_any_other_images():
    drawn = groups("random")
    met = {(drawn[2 * g][0], drawn[2 * g + 1][0]) for g in range(600)}
    assert met == {(a, b) for a, b in itertools.product(range(6), repeat=2) if a != b}


def test_one_image_alone():
    drawn = groups("random", tags=TAGS[:1])
    assert [drawn[n][0] for n in range(4)] == [0, 0, 0, 0]


def test_draws_depend_on_seed_and_number_alone():
    one, two, other = groups(), groups(), groups(seed=1)
    backwards = {n: two[n] for n in reversed(range(24))}            # as another process asks for them
    assert [one[n] for n in range(24)] == [backwards[n] for n in range(24)] != [other[n] for n in range(24)]


def test_the_others_of_a_group():
    assert cian.others_of_group(6, 1).tolist() == [[1], [0], [3], [2], [5], [4]]
    assert cian.others_of_group(6, 2).tolist() == [[1, 2], [2, 0], [0, 1], [4, 5], [5, 3], [3, 4]]


def test_partners_in_a_ring():
    assert cian.partners(TAGS) == [(0, 1, 0), (1, 2, 1), (2, 3, 1), (3, 1, 1)]


def test_training_samples_carry_no_mask():
    args = arguments(train_list="train")
    sample = Draws(load(args, "train"), cian.train_augment(args), 0)[0]
    assert set(vars(sample)) == {"name", "image", "tags", "pseudo"}


def test_the_crops_padding_is_marked():
    args = arguments(train_list="train", seg_crop=200)
    pseudo = Draws(load(args, "train"), cian.train_augment(args), 0)[0].pseudo
    assert set(pseudo.unique().tolist()) == {0, 255}


# ---------------------------------------------------------------- prediction


def test_predictions_are_probabilities_that_turn_with_the_image():
    torch.manual_seed(0)
    net = cian.make_cian(arguments(), "none", 3).eval()
    image = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    prob = cian.predict(net, image, (0.75, 1.0), "cpu")
    assert prob.shape == (4, 45, 61) and np.allclose(prob.sum(0), 1, atol=1e-4)
    alone = net(cian.normalise(cian.Sample(image=image)).image[None])["self"]
    assert alone.shape == (1, 4, 12, 16)


def test_two_images_in_a_batch_do_not_see_each_other():
    """Mirror images go through the network together: self-affinity is each one's own."""
    net = cian.make_cian(arguments(init_std=0.5), "none", 3).eval()
    torch.nn.init.ones_(net.affinity.phi_o[1].weight)
    x = torch.randn(2, 3, 40, 40)
    both, one = net(x)["self"], net(x[:1])["self"]
    assert close(both[:1].detach(), one.detach(), atol=1e-4)


# ---------------------------------------------------------------- learns


def test_losses_fall_and_gamma_leaves_zero():
    """Pairs of scenes with some true pixels: all four terms fall, and the module is used."""
    args = arguments(train_list="train", supervision="full")
    train_set = load(args, "train")
    few = [i for i in range(40) if train_set[i].tags[:2].any()][:4]
    torch.manual_seed(0)
    net = cian.make_cian(args, "none", 8).train()
    batch = collate([cian.train_augment(args)(train_set[i], np.random.default_rng(i)) for i in few])
    spots = F.max_pool2d((torch.rand(4, 1, 96, 96) < 0.003).float(), 9, 1, 4)[:, 0] > 0
    label = torch.where(spots, batch.mask, 255)[:, ::4, ::4]
    valid, history = batch.pseudo[:, ::4, ::4] == 0, []
    optim = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(25):
        scores = net(batch.image, cian.others_of_group(4, 1))
        terms = cian.eq9_terms(scores, label, batch.tags, valid)
        optim.zero_grad()
        sum(terms.values()).backward()
        optim.step()
        history.append([v.item() for v in terms.values()])
    history = np.array(history)
    assert (history[-3:].mean(0) < 0.6 * history[:3].mean(0)).all(), history
    assert net.affinity.gamma() > 1e-3


# ---------------------------------------------------------------- runs

TINY = """cian.py --preset shapes --workers 0 --device cpu --cam-steps 4 --cam-batch 2 --cam-crop 48
    --cam-resize 48 64 --superpixels 30 --seg-steps 6 --retrain-steps 4 --warmup 2 --seg-batch 4 --seg-crop 48
    --test-scales 1 --save-every 2 --log-every 1""".split()
STAGES = ["cam", "seed", "val_1", "val_crf_1", "pseudo_1", "val", "val_crf"]
FOLDERS = ["seeds", "pseudo_1_raw", "pseudo_1", "val_1", "val_crf_1", "val", "val_crf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six train and six val scenes as files."""
    made = tmp_path_factory.mktemp("workpiece")
    export("shapes", "workpiece", str(made), n=6)
    return made


def command(folder, out, *more):
    return [*TINY, "--data", "workpiece", "--root", folder, "--out", out, *more]


def run_here(*argv):
    """A script's main() in this process: what a run computes does not depend on it, and torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(w) for w in argv])
        cian.main()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("finished")
    sh(*command(folder, out))
    return out


def stages(out):
    return json.loads((out / "results.json").read_text())["stages"]


def scores(out):
    """The numbers of results.json without times and memory."""
    return [{k: v for k, v in s.items() if k not in ("seconds", "peak_memory_mb")} for s in stages(out)]


def contents(out, *parts):
    files = [f for part in parts for f in sorted((out / part).rglob("*")) if f.is_file()]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_runs_both_rounds(finished, folder):
    entries = stages(finished)
    assert [s["stage"] for s in entries] == STAGES
    for s in entries:
        assert s["n_images"] == 6 and s["uses_masks"] and 0 <= s["miou"] <= 100 and len(s["iou"]) == 9
        assert s["split"] == ("val" if s["stage"].startswith("val") else "train") and s["seconds"] >= 0
        if s["split"] == "val":
            assert s["gamma"] > 0 and s["strong_ratio"] == 0 and s["attention_pairs"] > 0
            assert 0 < s["attention_class"] < 1 and 0 < s["attention_area"] < 1 and s["attention_ratio"] > 0
    assert [s["stage"] for s in entries if s["crf"]] == ["val_crf_1", "pseudo_1", "val_crf"]
    tags = json.loads((folder / "train" / "tags.json").read_text())
    classes = (folder / "classes.txt").read_text().split()
    for place in FOLDERS:
        files = sorted((finished / place).glob("*.png"))
        assert len(files) == 6
        for file in files:
            with Image.open(file) as image: values = set(np.unique(np.asarray(image)))
            assert values <= {*range(9)} | ({255} if place == "seeds" else set())
            if not place.startswith("val"):
                assert values <= {0, 255, *(classes.index(c) + 1 for c in tags[file.stem])}
    for name in ("train", "val", "affinity"): assert (finished / "panels" / f"{name}.png").exists()
    lines = log(finished)
    assert {entry["stage"] for entry in lines} == {"classifier", "segmenter_1", "segmenter_2"}
    assert all(np.isfinite(list(entry.values())[1:]).all() for entry in lines)
    for entry in lines[4:]:
        early = entry["stage"] == "segmenter_1" and entry["step"] < 2
        assert ("loss_cp_cross" in entry) != early and "loss_ce_cross" in entry
    assert lines[4]["gamma"] == 0 or lines[4]["step"] == 0
    assert lines[10]["gamma"] > lines[5]["gamma"] > 0, "round 2 goes on from the weights of round 1"


def test_the_same_command_again_does_nothing(finished, folder):
    before = contents(finished, *FOLDERS, "cam")
    times = {f: f.stat().st_mtime_ns for f in finished.rglob("*.p[nt]*")}
    numbers = scores(finished)
    run_here(*command(folder, finished))
    assert contents(finished, *FOLDERS, "cam") == before and scores(finished) == numbers
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())


def test_runs_on_full_masks(folder, tmp_path):
    run_here(*command(folder, tmp_path, *"--supervision full --seg-steps 3".split()))
    assert [s["stage"] for s in stages(tmp_path)] == ["val", "val_crf"]
    assert not any((tmp_path / name).exists() for name in ("cam", "seeds", "pseudo_1"))
    assert all("loss_cp_self" not in entry and "loss_ce_cross" in entry for entry in log(tmp_path))


def test_predicts_with_the_runs_network(finished, folder, tmp_path):
    pictures = folder / "val" / "images"
    for checkpoint, place in (("segmenter_1.pt", "val_crf_1"), ("segmenter_2.pt", "val_crf")):
        run_here("cian.py", "--predict", pictures, "--checkpoint", finished / checkpoint, "--out",
                 tmp_path / place, "--workers", 0, "--device", "cpu")
        for file in pictures.iterdir():
            label = read_label(tmp_path / place / "predict" / file.name, 8, read_image(file))
            assert (label == read_label(finished / place / file.name)).all(), "the run's own prediction"
        assert len(list((tmp_path / place / "predict").glob("*_overlay.png"))) == 6


@pytest.mark.parametrize("more, words", [
    (["--predict", "x"], "checkpoint"), (["--seg-batch", "3"], "multiple of 2"),
    (["--references", "0"], "no-cross"), (["--seg-steps", "2"], "never begin"),
    (["--references", "2"], "multiple of 3"), (["--strong-ratio", "1.5"], "share"),
    (["--test-scales"], "one number or more"), (["--dilation", "0"], "dilation"),
    (["--cam-resize", "90", "60"], "smaller first"), (["--foreground", "15"], "from 0 to 1"),
    (["--backbone", "mobilenet_v2", "--weights", "nowhere.pt"], "nowhere")])
def test_mistakes_end_with_one_sentence(folder, tmp_path, more, words):
    with pytest.raises(UserError, match=words): run_here(*command(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_missing_saliency_maps_are_named_at_once(folder, tmp_path):
    with pytest.raises(DataError, match="lacks 6 of 6"):
        run_here(*command(folder, tmp_path / "out", "--saliency", tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_stage_is_refused(finished, folder):
    with pytest.raises(SystemExit, match="segmenter"):
        run_here("cian.py", "--predict", folder / "val" / "images", "--checkpoint",
                 finished / "classifier.pt")


ABLATIONS = {
    "baseline": "--no-cross --no-completion", "self and completion": "--no-cross --completion-target cross",
    "random pairs": "--pairs random --no-completion", "authors' target": "--completion-target cross",
    "two references, mean": "--references 2 --merge mean --seg-batch 3", "5 % strong": "--strong-ratio 0.34"}


@pytest.mark.parametrize("flags", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations(finished, folder, tmp_path, flags):
    """Tables 2, 3 and 4; classifier and seeds come from the finished run."""
    run_here(*command(folder, tmp_path, "--reuse", finished, "--rounds", 1, "--seg-steps", 2, "--warmup", 0,
                      *flags.split()))
    assert [s["stage"] for s in stages(tmp_path)] == ["cam", "seed", "val", "val_crf"]
    parts = ["classifier.pt", "seeds"]
    assert contents(tmp_path, *parts) == contents(finished, *parts)
    lines = [entry for entry in log(tmp_path) if entry["stage"] == "segmenter_1"]
    assert all(("loss_ce_cross" in e) == ("no-cross" not in flags) for e in lines)
    assert all(("loss_cp_self" in e) == ("no-completion" not in flags) for e in lines)
    if "strong" in flags:
        truth = load(types.SimpleNamespace(data="workpiece", root=str(folder), train_list="train",
                                           supervision="full"), "train")
        same = [(read_label(tmp_path / "seeds_strong" / f"{s.name}.png") == s.mask).all() for s in truth]
        kept = [contents(tmp_path, f"seeds_strong/{s.name}.png") for s in truth]
        assert sum(same) == 2 and len(kept) == 6 and stages(tmp_path)[-1]["strong_ratio"] == 0.34
        for s, strong in zip(truth, same, strict=True):
            seed = read_label(tmp_path / "seeds" / f"{s.name}.png")
            assert strong or (read_label(tmp_path / "seeds_strong" / f"{s.name}.png") == seed).all()
    else:
        assert not (tmp_path / "seeds_strong").exists()


def test_given_saliency_maps_make_the_background(finished, folder, tmp_path):
    for file in (folder / "train" / "images").iterdir():
        height, width = read_image(file).shape[:2]
        image = np.full((height, width), 255, np.uint8)
        image[:, :10] = 0
        save_image(tmp_path / "maps" / f"{file.stem}.png", image)
    run_here(*command(folder, tmp_path / "out", "--reuse", finished, "--rounds", 1, "--seg-steps", 1,
                      "--warmup", 0, "--saliency", tmp_path / "maps"))
    for file in (tmp_path / "out" / "seeds").glob("*.png"):
        label = read_label(file)
        assert (label[:, 10:] != 0).all() and set(np.unique(label[:, :10])) <= {0, 255}


def test_a_killed_run_ends_like_an_undisturbed_one(finished, folder, tmp_path):
    """kill -9 in round 2; then the same command again."""
    parts = ["classifier.pt", "cam", "saliency", "seeds", "args.json", "state.json", "log.jsonl", "tags"]
    for name in parts:                                              # it starts where round 1 begins
        if (finished / name).is_dir(): shutil.copytree(finished / name, tmp_path / name)
        else: shutil.copy(finished / name, tmp_path / name)
    line = command(folder, tmp_path)
    kill_when(lambda: (tmp_path / "segmenter_2.pt").exists(), *line)
    assert torch.load(tmp_path / "segmenter_2.pt", weights_only=True)["step"] < 4
    sh(*line)
    assert scores(tmp_path) == scores(finished)
    assert contents(tmp_path, *FOLDERS) == contents(finished, *FOLDERS)


def test_two_processes_train(finished, folder, tmp_path):
    """torchrun: pairs stay together in a process, and labels are written by both."""
    sh("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
       *command(folder, tmp_path, "--reuse", finished, "--rounds", 1, "--seg-steps", 2, "--warmup", 0,
                "--save-every", 1))
    assert [s["stage"] for s in stages(tmp_path)] == ["cam", "seed", "val", "val_crf"]
    assert contents(tmp_path, "seeds") == contents(finished, "seeds")
    assert len(contents(tmp_path, "val_crf")) == 6


def test_stages_are_shared_only_between_runs_that_agree():
    mine, fields = arguments(), [name for names in cian.FIELDS.values() for name in names]
    known = {f.name for f in dataclasses.fields(mine)}
    assert set(fields) <= known and len(fields) == len(set(fields))
    free = set("""preset out reuse fresh device workers predict checkpoint log_every save_every rounds
        seg_crf""".split())
    assert known - set(fields) == free, "each field belongs to a stage, or can not change one"
