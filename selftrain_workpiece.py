"""Iterative self-training with image tags and rendered images: workpieces, and GTA5 to Cityscapes.
"A self-training framework for weakly supervised semantic segmentation with image tags".
Equation numbers: the paper's.

Symbols      I_S, I_T rendered (source) and real (target) images · L, L_t labels, 0 = background, 255 = none
             (the paper's zero vector, ignore_index) · α_tn spatial weight of pixel n of image t · f(w, I)
             class probabilities · P predictions, S their maximum over the classes · p ratio of Algorithm 2
Equations    (1) eq1_spatial_loss    (2) eq2_joint_loss    (3.1) cam_mask, whole_superpixels, initial_label
             (3.3) source_weight, target_weight
             (3.4) level_counts, alg2_threshold, alg2_label, refine_labels
Figures      Fig. 1 = main(), Algorithm 1 = self_train; Fig. 2 = write_initial; Fig. 4 = panels/train.png,
             its last row panels/val.png; Fig. 5 = panels/several.png
Tables       4: initial mask = stage `initial`, label refinement = the run of Table 1; the others:
             python selftrain_workpiece.py --background 2 --rounds 1 --no-rendered --no-spatial --out runs/t4a
             python selftrain_workpiece.py --background 2 --rounds 1 --no-spatial --out runs/t4-rendered
             python selftrain_workpiece.py --background 2 --rounds 1 --out runs/t4-spatial
Commands     python selftrain_workpiece.py                          # embedded solids, made for two CPU cores
             python selftrain_workpiece.py --background 2 --out runs/b2     # Table 1: 0, 1, 2, 3
             python selftrain_workpiece.py --source-only --out runs/source  # the domain gap
             python selftrain_workpiece.py --supervision full               # upper bound
             python selftrain_workpiece.py --data workpiece --root my/parts # rendered/ train/ val/
             python selftrain_workpiece.py --data cityscapes --root data/cityscapes --rendered-root data/gta5
             python selftrain_workpiece.py --predict photos/ --checkpoint runs/…/segmenter_3.pt
Departures   [D1] rates: the exponents are lost in the text; 1e-4 (Adam), 1e-3 (SGD). One rate for all
                  layers; the poly schedule, stated for SGD alone, also with Adam
             [D2] classifier: only "classification network, CAM" is known. Here the segmentation network's
                  backbone with one linear layer, Adam, colour jitter; the whole picture, to lose no tag, of
                  at most --cam-resize pixels, which is also the CAM's size.
                  Preset solids, from nothing: a backbone that first learns to segment the rendered parts,
                  on random grounds and in random light, stands for ImageNet's weights in all networks, its
                  batch norm kept; the classifier goes on from its linear layer too
             [D3] the rest of an initial mask is background (--initial-rest), with the lowest weight of the
                  literal distance transform, sigmoid(0): seeds alone never teach background. Where the CAM
                  misses a part of the tags, the rest of that picture stays without label
             [D4] several parts in a picture: each has its own 2 %; two claims on a pixel: the larger CAM.
                  Preset solids 8 %: a part covers 5 % of its picture, and the rest of a mask is background
             [D5] source weight: 1 + dilated edges; the paper's words: 0 elsewhere (--source-weight literal).
                  Both weights are of the scaled and cropped label that a step sees
             [D6] Eq. (1): mean over the pixels with a label instead of the sum; the lost minus sign is back
             [D7] "labelled as negative" (§3.4) is "unlabelled" in Algorithm 2 and no background: 255
             [D8] ratio p: not stated. Parts cover few pixels and are the least certain, so the most certain
                  30 % of all pixels would be background alone: 0.9 and more (presets, whose parts cover 6 %
                  and less: 0.98 and more); CBST's schedule .3, +.05, up to .5 for street scenes
             [D9] Algorithm 2's sorting: a histogram of the confidences in 4,096 steps of -log(1 - S), whose
                  size does not depend on the data set
             [D10] refinement, which Algorithm 2 leaves out: each superpixel takes its most frequent label
                  ("unlabelled" is one), then a dense CRF on label unaries; what is unlabelled stays so
             [D11] SLIC's, Canny's, the dilation's and the CRF's parameters (σ_xy for pictures of 640 pixels;
                  presets: less, as theirs are smaller), steps, number of rounds and what ends them are not
                  stated; a round goes on from the weights of the one before. After the last one no labels are
                  made, as nothing would learn from them
             [D12] --no-refine: the next round learns from plain predictions ("simply iteration", §3.4)
             [D13] odd kernels centre feature cell i on pixel stride·i: so CAM and scores are enlarged
             [D14] --supervision full: real masks with α = 1 instead of pseudo labels, beside the rendered
                  pictures; one round with the steps of all
             [D15] street scenes: the 19 classes have no background; class 0 is neither taught nor predicted
             [D16] the labels of a round hold classes of the picture's tags only, and a part of the tags that
                  they lost keeps its initial mask, or takes the background's labels away: else a part that is
                  lost once is taught as background from then on (paper: "CAM and the super pixel map" refine
                  the predictions, no more is said). So the scores of round_1, round_2, … use tags, those of
                  val do not, S of Algorithm 2 is the largest share among the tags' classes, and a picture
                  without tags, all background, is not ranked. Not with --initial source, which has no tags
             [D17] PSPNet's auxiliary loss (0.4) and scale, mirror and crop augmentation are PSPNet's paper's
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage

from common import (
    CRF, DeepLab, PSPNet, Run, UserError, cells_to_pixels, confusion_of, dense_crf, draw_panels, inference,
    label_probs, make_backbone, parse_args, pictures_to_predict, poly, pretrained, read_predictor, reduce,
    save_label, save_npz, save_prediction, shard, start_processes, weights_of, with_weights, world)
from data import (
    DataError, Draws, Sample, changed, color_jitter, crop, flip, load, normalise, read_label, rescale,
    resize_batch, resize_long, subset, tags_in, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["solids", "workpiece", "cityscapes"] = "solids"
    """real pictures: solids (drawn on the fly), workpiece (a folder of your own), cityscapes"""
    supervision: Literal["image", "full"] = "image"
    """what the real training set may reveal; full = the same network on ground truth (upper bound) [D14]"""
    backbone: Literal[
        "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "resnet18"
    """of PSPNet (§4.2.1); the preset of cityscapes has resnet101 (§4.2.2)"""
    cam_backbone: Literal[
        "same", "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "same"
    """classifier [D2]. same = --backbone"""
    # --- run: the same lines in every file, so a diff shows only the method ---
    root: str = ""
    """where the data lies; default data/<name>"""
    train_list: str = "train_aug"
    """VOC: train_aug (10,582, needs SBD), train (1,464), or a file of names"""
    preset: Literal["auto", "paper", "shapes", "photos"] = "auto"
    """small-scale defaults; auto = shapes for --data shapes or solids, else the paper's. Flags by hand win"""
    out: str = ""
    """run folder; default runs/<method>-<data>-<supervision>-s<seed>. The same command again continues it"""
    reuse: str = ""
    """another run folder whose finished stages are taken over where the fields they depend on agree"""
    fresh: bool = False
    """start over in an existing run folder"""
    seed: int = 0
    """seeds python, numpy and torch"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    amp: bool = True
    """bf16 autocast of the networks on CUDA; losses stay in float32"""
    workers: int = 2
    """processes that load images, and that run the CRF on the CPU"""
    weights: str = "imagenet"
    """imagenet (torchvision's IMAGENET1K_V1), none, or a file"""
    crf: Literal["torch", "pydensecrf", "none"] = "torch"
    """dense CRF: built in (CPU and GPU), pydensecrf (the reference), or none at all"""
    predict: str = ""
    """a picture or a folder: no training, writes masks and overlays; needs --checkpoint"""
    checkpoint: str = ""
    """a run's last network (segmenter.pt, detector.pt, …), for --predict"""
    log_every: int = 20
    """steps between two lines of log.jsonl"""
    save_every: int = 200
    """steps between two checkpoints"""
    # --- pictures ---
    rendered: bool = True
    """the rounds learn from rendered pictures too ("+ CAD" of Table 4); the encoder [D2] does in any case"""
    rendered_root: str = ""
    """folder of the rendered set: workpiece: one with classes.txt and rendered/, default --root; cityscapes:
    GTA5's, default data/gta5"""
    rendered_ground: Literal["rendered", "random"] = "rendered"
    """what the rendered parts lie on in the rounds: as they were rendered, or on grounds as --enc-ground"""
    background: Literal[-1, 0, 1, 2, 3] = 0
    """solids: ground of the real pictures, cloth, wood, mat, workshop; -1 = all. Table 4: 2"""
    source_only: bool = False
    """train on rendered pictures alone and stop: what the domain gap costs"""
    # --- encoder from nothing ---
    enc_steps: int = 0
    """steps in which a backbone from nothing first learns to segment rendered parts [D2]"""
    enc_batch: int = 8
    """images a step, over all processes"""
    enc_lr: float = 2e-3
    """Adam; poly"""
    enc_ground: Literal["random", "rendered"] = "random"
    """what the parts then lie on: random colours and textures in random light, or as they were rendered"""
    # --- 1 initial masks (§3.1, §4.2.1) ---
    initial: Literal["cam", "source"] = "cam"
    """CAM of a classifier, or predictions of a network trained on rendered pictures (§4.2.2)"""
    cam_stride: int = 8
    """output stride of the classifier"""
    cam_steps: int = 5000
    """steps of the classifier [D2]"""
    cam_batch: int = 16
    """images a step, over all processes"""
    cam_lr: float = 1e-4
    """Adam; poly [D1] [D2]"""
    cam_resize: tuple[int, int] = (480, 640)
    """the longer side is drawn from this range"""
    cam_crop: int = 640
    """pixels; not below the range, so that no part is cut off"""
    cam_jitter: float = 0.3
    """brightness, contrast and saturation [D2]"""
    cam_scales: tuple[float, ...] = (1.0,)
    """scales of the CAM, 1 = the largest of --cam-resize; each with its mirror image"""
    cam_decay: float = 0.99
    """the CAM's threshold starts at 1 and is multiplied by this …"""
    cam_share: float = 0.02
    """… until more than this share of the picture is masked"""
    superpixels: int = 1000
    """SLIC superpixels of a picture [D11]"""
    compactness: float = 10.0
    """of SLIC, in CIE Lab [D11]"""
    initial_rest: Literal["background", "ignore"] = "background"
    """what an initial mask does not cover [D3]"""
    # --- 2 top-down step (§3.2, §3.3) ---
    spatial: bool = True
    """spatial weights (Table 4); without them α = 1"""
    source_weight: Literal["plus_one", "literal"] = "plus_one"
    """rendered: 1 + edges, or edges alone [D5]"""
    target_weight: Literal["literal", "rescaled"] = "literal"
    """real: σ(d), from 0.5, or 2σ(d) − 1, from 0: then background, d = 0, is not taught by real pictures"""
    edge_width: int = 5
    """pixels by which the rendered labels' boundaries are dilated [D11]"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """§4.2.1; sgd for street scenes (§4.2.2)"""
    seg_lr: float = 1e-4
    """§4.2.1 [D1]"""
    power: float = 0.98
    """of the poly schedule (§4.2.2); 0.9 is usual"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 0.0
    """of the segmentation network"""
    seg_stride: int = 8
    """output stride of the segmentation network"""
    seg_steps: int = 5000
    """steps of each round [D11]"""
    source_steps: int = 20_000
    """steps of --source-only and of --initial source"""
    seg_batch: int = 16
    """images a step, over all processes, one half rendered"""
    seg_crop: int = 473
    """pixels [D17]"""
    seg_rescale: tuple[float, float] = (0.5, 2.0)
    """range of the random scale [D17]"""
    seg_auxiliary: float = 0.4
    """weight of PSPNet's auxiliary loss [D17]"""
    # --- 3 bottom-up step (§3.4, Algorithm 2) ---
    rounds: int = 4
    """at most [D11]"""
    stop_change: float = 0.02
    """no further round when less than this share of the labels changes; pixels that are background before and
    after do not count"""
    refine: bool = True
    """Algorithm 2 and the refinement (Table 4); without: plain predictions [D12]"""
    ratio: float = 0.9
    """p of Algorithm 2, where it is used first: share of the pixels that keep their label [D8]"""
    ratio_step: float = 0.03
    """added each time after"""
    ratio_max: float = 0.98
    """p does not grow beyond"""
    label_tags: bool = True
    """labels hold classes of the picture's tags only [D16]"""
    keep_initial: bool = True
    """a part of the tags that a round's label lost keeps its initial mask [D16]"""
    refine_superpixels: bool = True
    """superpixels refine the labels [D10]"""
    refine_crf: bool = True
    """the dense CRF refines the labels [D10]"""
    label_crf: CRF = CRF(3, 3, 50, 5, 10, 5)
    """Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations [D11]"""
    label_prob: float = 0.7
    """probability of its label in a pixel's unary [D10]"""
    # --- inference ---
    test_scales: tuple[float, ...] = (1.0,)
    """each with its mirror image"""
    seg_crf: CRF = CRF(3, 3, 50, 5, 10, 5)
    """of val_crf (Fig. 4, last row) [D11]"""


# What a busy CPU core does in twenty minutes; the rest as the paper. Also `--preset shapes`, for a folder.
SOLIDS = dict(
    backbone="tiny", weights="none", cam_stride=8, cam_steps=600, cam_batch=8, cam_lr=5e-4,
    enc_steps=2000, cam_share=0.08, cam_resize=(144, 160), cam_crop=160,
    superpixels=500, edge_width=3, seg_lr=2e-3, seg_stride=4, seg_steps=1000, source_steps=1000, rounds=3,
    seg_crop=96, seg_rescale=(0.8, 1.25), ratio=0.98, ratio_step=0.01, ratio_max=1.0,
    label_crf=CRF(3, 3, 12, 5, 10, 5), seg_crf=CRF(3, 3, 12, 5, 10, 5))     # σ_xy for a quarter of the width
# Real surfaces of one part, a few dozen to a few hundred photographs, a small pretrained backbone on a CPU.
PHOTOS = dict(
    backbone="mobilenet_v2", cam_stride=16, cam_steps=300, cam_batch=8, cam_resize=(257, 321),
    cam_crop=321, superpixels=400, seg_stride=16, seg_lr=5e-4, seg_steps=300, source_steps=900,
    seg_batch=8, seg_crop=257, seg_rescale=(0.75, 1.25), rounds=3, ratio=0.98, ratio_step=0.01,
    ratio_max=1.0, label_crf=CRF(3, 3, 30, 5, 10, 5), seg_crf=CRF(3, 3, 30, 5, 10, 5))       # [D8] [D11]
# §4.2.2, GTA5 to Cityscapes: chosen by itself with --data cityscapes. Half size, as memory of a GPU allows.
SCENES = dict(
    backbone="resnet101", initial="source", optimizer="sgd", seg_lr=1e-3, weight_decay=1e-4, seg_steps=40_000,
    source_steps=40_000, seg_batch=8, seg_crop=473, seg_rescale=(0.35, 0.75), test_scales=(0.5,),
    superpixels=4000, initial_rest="ignore", ratio=0.3, ratio_step=0.05, ratio_max=0.5)       # [D8] [D15]

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "encoder": "data root seed amp weights backbone cam_backbone cam_stride cam_jitter enc_steps enc_batch "
               "enc_lr enc_ground seg_crop seg_rescale rendered_root power",
    "classifier": "train_list background cam_batch cam_lr cam_steps cam_resize cam_crop",
    "initial": "supervision initial cam_scales cam_decay cam_share superpixels compactness initial_rest",
    "segmenter_1": "rendered rendered_ground source_only spatial source_weight target_weight edge_width "
                   "optimizer seg_lr momentum weight_decay seg_stride seg_steps source_steps seg_batch "
                   "seg_auxiliary",
    "round_1": "test_scales label_tags",
    "pseudo_1": "crf keep_initial refine ratio ratio_step ratio_max refine_superpixels refine_crf label_crf "
                "label_prob",
}.items()}
# --initial source: the order of the stages is another one, and the initial masks depend on all of it.
SOURCE_FIELDS = {
    "encoder": FIELDS["encoder"],
    "source": [name for stage in ("classifier", "initial", "segmenter_1")
               for name in FIELDS[stage] if name != "source_only"],
    "initial_raw": FIELDS["round_1"], "initial": FIELDS["pseudo_1"],
    "segmenter_1": [], "round_1": [], "pseudo_1": []}


# ── Networks (§3.1, §3.3) ───────────────────────────────────────────────────────────────────────────────────
class TagNet(nn.Module):
    """Classifier for CAM (§3.1).   forward(image (B,3,H,W)) -> tag scores (B,K);  scores: (B,K,h,w)   [D2]"""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Conv2d(backbone.channels[-1], classes, 1)

    def scores(self, image):
        return self.linear(self.backbone(image)[-1]).float()

    def forward(self, image):
        return self.scores(image).mean((2, 3))                  # the mean of scores is the score of the mean


def make_pspnet(args, weights, classes):
    """PSPNet for `classes` and background; weights "none" where they are loaded afterwards."""
    start = pretrained(args.backbone, args.weights)
    backbone = make_backbone(args.backbone, weights_of(args.backbone, weights), args.seg_stride, start)
    net = PSPNet(backbone, classes + 1)
    if args.data == "cityscapes":                               # [D15] e^-1000 = 0: never predicted
        with torch.no_grad(): net.head[-1].bias[0] = net.auxiliary[-1].bias[0] = -1000.0
    return net


# ── Losses (§3.2, §3.3) ─────────────────────────────────────────────────────────────────────────────────────
def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq1_spatial_loss(logits, label, alpha):
    """Eq. (1): −Σ_t Σ_n α_tn log f_y(w, I_t), y the label of pixel n; mean over the pixels with one.   [D6]

    logits (B,C,H,W), label (B,H,W) with 255 = none, alpha (B,H,W)
    """
    minus_log_f = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    return masked_mean(alpha * minus_log_f, label != 255)


def eq2_joint_loss(logits, label, alpha, sets):
    """Eq. (2): L = L_ws(I_S) + L_wt(I_T), each of them Eq. (1); images of the sets in turn, see Joint."""
    return sum(eq1_spatial_loss(logits[i::sets], label[i::sets], alpha[i::sets]) for i in range(sets))


def source_weight(label, width, form="plus_one"):
    """§3.3: boundaries of a rendered label by Canny, dilated to `width` pixels.   [D5]

    What has no label, padding too, is filled with the nearest label first: its border is no boundary.
    label (H,W) uint8 -> α (H,W): 1 + edges, or edges alone ("literal")
    """
    import cv2

    if (label == 255).any() and not (label == 255).all():
        y, x = ndimage.distance_transform_edt(label == 255, return_distances=False, return_indices=True)
        label = label[y, x]
    edges = cv2.Canny(np.ascontiguousarray(label), 1, 2) > 0    # a step between any two classes is an edge
    edges = cv2.dilate(edges.astype(np.uint8), np.ones((width, width), np.uint8)).astype(np.float32)
    return edges if form == "literal" else 1 + edges


def target_weight(label, form="literal"):
    """§3.3: α = σ(d), d the distance of a pixel of a mask to where the mask ends; 0 outside all masks.   [D3]

    The array's edge is no end of a mask, padding and unlabelled pixels are.
    label (H,W) uint8 -> α (H,W) in [0.5,1], "rescaled" [0,1]
    """
    d = np.zeros(label.shape, np.float32)
    for k in np.setdiff1d(label, (0, 255)):
        inside = label == k
        d[inside] = ndimage.distance_transform_edt(inside)[inside] if not inside.all() else 1e3
    alpha = 1 / (1 + np.exp(-d))
    return 2 * alpha - 1 if form == "rescaled" else alpha


# ── Initial masks (§3.1): arrays in, arrays out ─────────────────────────────────────────────────────────────
@inference()
def cam_of_tags(net, image, tags, longer, scales, stride, device):
    """CAM summed over scales (1: the longer side has `longer` pixels) and mirror images; each map from 0,
    its least value, to 1, its greatest.

    So the CAM of a tag that the classifier does not believe in has a peak too, as the rule of §4.2.1 expects.
    image (H,W,3) uint8, tags (K,) bool -> (K,H,W) float32, absent classes 0
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    total = 0
    for scale in scales:
        seen = [max(32, round(n * scale * longer / max(image.shape[:2]))) for n in image.shape[:2]]
        scaled = resize_batch(x, seen)
        scores = net.scores(torch.cat([scaled, scaled.flip(-1)]))[:, tags]
        scores = cells_to_pixels(scores, stride, image.shape[:2], seen)
        total = total + scores[0] + scores[1].flip(-1)
    total = total - total.amin((1, 2), keepdim=True)
    full = np.zeros((len(tags), *image.shape[:2]), np.float32)
    full[tags] = (total / total.amax((1, 2), keepdim=True).clamp_min(1e-5)).cpu().numpy()
    return full


def cam_mask(cam, share, decay):
    """§3.1, §4.2.1: threshold 1, times `decay` until more than `share` of the pixels are masked.

    cam (H,W) with peak 1 -> (H,W) bool; nothing where the CAM is 0 everywhere
    """
    threshold = 1.0
    while (cam >= threshold).mean() <= share and threshold > 1e-3:
        threshold *= decay
    return cam >= threshold


def slic_regions(image, number, compactness):
    """SLIC superpixels (§3.1).   (H,W,3) uint8 -> index (H,W) from 0"""
    from skimage.segmentation import slic

    index = slic(image, n_segments=number, compactness=compactness, start_label=0)
    return np.unique(index, return_inverse=True)[1].reshape(image.shape[:2])


def whole_superpixels(mask, index):
    """§3.1: only superpixels entirely inside the mask.   mask (H,W) bool, index (H,W) -> (H,W) bool"""
    inside = np.bincount(index.ravel(), mask.ravel())
    return (inside == np.bincount(index.ravel()))[index]


def initial_label(cam, tags, index, share, decay, rest="background"):
    """§3.1 for all classes of the tags [D3] [D4].   cam (K,H,W) -> (H,W) uint8, number of classes missed"""
    label, strongest, missed = np.full(index.shape, 255, np.uint8), cam.argmax(0), 0
    for k in np.flatnonzero(tags):
        region = whole_superpixels(cam_mask(cam[k], share, decay) & (strongest == k), index)
        label[region] = k + 1
        missed += not region.any()
    if rest == "background" and not missed or not tags.any():
        label[label == 255] = 0
    return label, missed


# ── Label refinement (§3.4, Algorithm 2): arrays in, arrays out ─────────────────────────────────────────────
LEVELS, FINEST = 4096, 16.2                                     # all 1 − S below e^−16.2 are one level


def level_of(S):
    """Confidence S in [0,1] -> whole number 0 … LEVELS − 1 that grows with it, even steps of −log(1 − S)."""
    doubt = (1 - S.astype(np.float64)).clip(np.exp(-FINEST))
    return (-np.log(doubt) / FINEST * (LEVELS - 1)).astype(np.int64)


def level_counts(P):
    """Algorithm 2, lines 3 and 4: S = max P, as counts of its levels [D9].   (C,H,W) -> (LEVELS,)"""
    return np.bincount(level_of(P.max(0)).ravel(), minlength=LEVELS)


def alg2_threshold(counts, p):
    """Algorithm 2, lines 6 to 9: the level at index ⌊length · p⌋ of all sorted, the highest first.   [D9]"""
    index = min(int(counts.sum() * p), counts.sum() - 1)
    return LEVELS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), index, side="right"))


def alg2_label(P, threshold):
    """Algorithm 2, lines 12 and 13: argmax P, unlabelled below the threshold [D7].   (C,H,W) -> (H,W)"""
    return np.where(level_of(P.max(0)) < threshold, 255, P.argmax(0)).astype(np.uint8)


def vote(label, index):
    """Each superpixel takes its most frequent label, of which "unlabelled" is one.   [D10]"""
    counts = np.bincount(256 * index.ravel() + label.ravel(), minlength=256 * (index.max() + 1))
    return counts.reshape(-1, 256).argmax(1).astype(np.uint8)[index]


def unaries(label, classes, prob):
    """label_probs over the classes that the label has; the others are 0: absent.   -> (classes,H,W)"""
    there = np.setdiff1d(label, 255)
    full = np.zeros((classes, *label.shape), np.float32)
    places = np.full(256, 255)
    places[there] = np.arange(len(there))
    if len(there):
        full[there] = label_probs(places[label], len(there), prob)
    return full


def refine_labels(images, labels, classes, regions, crf, prob, backend="torch", workers=0, device="cpu"):
    """§3.4: "the super-pixel map and the CRF layer are utilized to refine the pseudo-labels".   [D10]

    images, labels, regions: lists of (H,W,3), (H,W), index (H,W) or None; crf: CRF or None -> list of (H,W)
    """
    labels = [label if index is None else vote(label, index) for label, index in zip(labels, regions)]
    if crf is None:
        return labels
    Q = dense_crf(images, [unaries(label, classes, prob) for label in labels], crf, backend, workers, device)
    return [np.where(label == 255, 255, q.argmax(0)).astype(np.uint8) for label, q in zip(labels, Q)]


# ── Data ────────────────────────────────────────────────────────────────────────────────────────────────────
def load_real(args, split, masks=False):
    """The real pictures; of solids those on --background."""
    dataset = load(args, split, masks, fields=("mask",))
    if args.data != "solids" or args.background < 0:
        return dataset
    names = [name for name in dataset.names if name.endswith(f"_b{args.background}")]
    if not names:
        raise UserError(f"--train-list {args.train_list} has no picture on background {args.background}")
    return subset(dataset, names)


def load_rendered(args, classes):
    """The rendered pictures with their masks; the classes must be those of the real ones."""
    street = args.data == "cityscapes"
    root = args.rendered_root or ("data/gta5" if street else args.root)
    try:
        dataset = load(replace(args, data="gta5" if street else args.data, root=root), "rendered",
                       fields=("mask",))
    except DataError as error:
        if street: raise
        raise DataError(f"{error}; or do without rendered pictures: --no-rendered --enc-steps 0") from None
    if dataset.classes != classes:
        raise DataError(f"the rendered set {root} has the classes {', '.join(dataset.classes)}, the real one "
                        f"{args.root} {', '.join(classes)}; give both one classes.txt")
    return dataset


class Joint(torch.utils.data.Dataset):
    """Draws of several sets in turn: of k sets, item k·n + i is draw n of set i."""

    def __init__(self, *draws):
        self.draws = draws

    def __len__(self):
        return len(self.draws[0])

    def __getitem__(self, n):
        return self.draws[n % len(self.draws)][n // len(self.draws)]


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────
def on_random_ground(sample, rng):
    """Rendered parts on a ground of two random colours, mixed by a cloud or by stripes, in uneven light,
    blurred and noisy: so that a backbone from nothing learns the parts, not their clean white ground.   [D2]
    """
    inside = ((sample.mask > 0) & (sample.mask != 255))[..., None]
    y, x = np.mgrid[:inside.shape[0], :inside.shape[1]] / max(inside.shape[:2]) - 0.5

    def across():
        angle = rng.uniform(0, 2 * np.pi)
        return x * np.cos(angle) + y * np.sin(angle)

    tones = rng.uniform(20, 235, (2, 3))
    if rng.random() < 0.5: tones = tones.mean(1, keepdims=True) * 0.75 + tones * 0.25       # nearly grey
    mix = ndimage.gaussian_filter(rng.normal(size=x.shape), rng.uniform(1, 16))
    mix /= mix.std()
    if rng.random() < 0.5: mix = 0.6 * mix + 1.2 * np.sin(across() * 2 * np.pi * rng.uniform(3, 24))
    mix = (0.5 + rng.uniform(0, 0.8) * mix).clip(0, 1)[..., None]
    part = sample.image * rng.uniform(0.4, 1.0) * (1 + rng.normal(0, 0.04) * np.array([1, 0, -1]))
    image = np.where(inside, part, tones[0] * mix + tones[1] * (1 - mix))
    image *= (1 + rng.uniform(0, 0.5) * across())[..., None]
    image = ndimage.gaussian_filter(image, (*[rng.uniform(0.3, 1.1)] * 2, 0))
    image += rng.normal(0, rng.uniform(2, 9), image.shape)
    return changed(sample, image=image.clip(0, 255).astype(np.uint8))


def train_encoder(args, run, rendered):
    """A backbone from nothing learns to segment the rendered pictures, with one linear layer.   [D2]

    Cross-entropy, parts and background averaged separately.   -> DeepLab; None where --enc-steps is 0
    """
    def augment(sample, rng):
        sample = rescale(Sample(image=sample.image, mask=sample.mask), rng.uniform(*args.seg_rescale))
        sample = crop(flip(sample) if rng.random() < 0.5 else sample, args.seg_crop, rng)
        sample = color_jitter(sample, rng, *[args.cam_jitter] * 3)
        return normalise(on_random_ground(sample, rng) if args.enc_ground == "random" else sample)

    if not args.enc_steps:
        return None
    run.reseed("encoder")
    backbone = make_backbone(args.backbone, "none", args.cam_stride)
    net = DeepLab(backbone, nn.Conv2d(backbone.channels[-1], len(rendered.classes) + 1, 1))
    ddp = run.place(net).train()
    optim = torch.optim.Adam(net.parameters(), lr=args.enc_lr)
    draws, schedule = Draws(rendered, augment, args.seed), poly(args.enc_steps, args.power)
    for step, batch in run.steps("encoder", draws, args.enc_steps, args.enc_batch, net, optim, schedule):
        with run.autocast():
            scores = ddp(batch.image)
        scores = cells_to_pixels(scores.float(), args.cam_stride, batch.mask.shape[-2:])        # [D13]
        nll = F.cross_entropy(scores, batch.mask, ignore_index=255, reduction="none")
        inside = (batch.mask > 0) & (batch.mask != 255)
        loss = masked_mean(nll, inside) + masked_mean(nll, batch.mask == 0)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, right=masked_mean((scores.argmax(1) == batch.mask).float(), inside))
    return net


def start_from(encoder, net):
    """The encoder's backbone for `net`, its batch norm kept as it is, as that of ImageNet's weights.   [D2]

    A classifier also takes over the linear layer: a part's score is the part's minus the background's.
    """
    net.backbone.load_state_dict(encoder.backbone.state_dict())
    net.backbone.freeze()
    if isinstance(net, TagNet):
        with torch.no_grad():
            for mine, its in zip(net.linear.parameters(), encoder.head.parameters()):
                mine.copy_(its[1:] - its[:1])


def train_classifier(args, run, train_set, encoder):
    """§3.1: image tags.   [D2]   encoder: of train_encoder, or None"""
    def augment(sample, rng):
        sample = Sample(image=sample.image, tags=sample.tags)
        sample = resize_long(sample, int(rng.integers(args.cam_resize[0], args.cam_resize[1] + 1)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(color_jitter(sample, rng, *[args.cam_jitter] * 3), args.cam_crop, rng))

    run.reseed("classifier")
    backbone = make_backbone(args.cam_backbone, weights_of(args.cam_backbone, args.weights), args.cam_stride,
                             pretrained(args.cam_backbone, args.weights))
    net = TagNet(backbone, len(train_set.classes))
    if encoder is not None: start_from(encoder, net)
    ddp = run.place(net).train()
    optim = torch.optim.Adam(net.parameters(), lr=args.cam_lr)
    draws, schedule = Draws(train_set, augment, args.seed), poly(args.cam_steps, args.power)
    for step, batch in run.steps("classifier", draws, args.cam_steps, args.cam_batch, net, optim, schedule):
        with run.autocast():
            scores = ddp(batch.image)
        loss = F.binary_cross_entropy_with_logits(scores.float(), batch.tags)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, right=((scores > 0) == (batch.tags > 0)).float().mean())
    return net.eval()


def write_initial(args, run, net, train_set):
    """CAM and superpixels -> initial masks (Fig. 2).   Writes cam/*.npz (with `missed`), initial/*.png"""
    with run.timed("initial"):
        for (name,) in run.todo(train_set.names, "initial", stage="initial", beside=("cam",)):
            s = train_set[train_set.index(name)]
            cam = cam_of_tags(net, s.image, s.tags, args.cam_resize[1], args.cam_scales, args.cam_stride,
                              run.device)
            index = slic_regions(s.image, args.superpixels, args.compactness)
            label, missed = initial_label(cam, s.tags, index, args.cam_share, args.cam_decay,
                                          args.initial_rest)
            present = np.flatnonzero(s.tags)
            save_npz(run.path("cam", name, ".npz"), cam=cam[present].astype(np.float16), present=present,
                     missed=missed)
            save_label(run.path("initial", name), label)


def read_cam(run, name, classes):
    """cam/<name>.npz -> (K,H,W) float32, absent classes 0."""
    with np.load(run.path("cam", name, ".npz")) as file:
        cam = np.zeros((classes, *file["cam"].shape[1:]), np.float32)
        cam[file["present"]] = file["cam"]
    return cam


def train_augment(args, weigh, ground="rendered"):
    """Scale, mirror image, crop; then the label, from mask or pseudo label, and its spatial weight."""
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        sample = crop(sample, args.seg_crop, rng)
        if ground == "random":
            sample = on_random_ground(color_jitter(sample, rng, *[args.cam_jitter] * 3), rng)
        label = sample.mask if hasattr(sample, "mask") else sample.pseudo
        return changed(normalise(Sample(image=sample.image, pseudo=label)),
                       weight=torch.from_numpy(weigh(label)).float())
    return augment


def weighting(args, rendered):
    """§3.3: label (H,W) -> α (H,W), for rendered or for real pictures."""
    if not args.spatial or args.supervision == "full" and not rendered:
        return lambda label: np.ones(label.shape, np.float32)
    if rendered:
        return lambda label: source_weight(label, args.edge_width, args.source_weight)
    return lambda label: target_weight(label, args.target_weight)


def train_round(args, run, stage, steps, number, real, rendered, encoder, net=None):
    """Top-down step (§3.3): PSPNet on real and rendered pictures, or on one set, where the other is None.

    net: the round before's, which is trained on; a new one where there is none, on the encoder's backbone
    """
    run.reseed(stage)
    sets = [(dataset, train_augment(args, weighting(args, own), args.rendered_ground if own else ""))
            for dataset, own in ((real, False), (rendered, True)) if dataset is not None]
    if net is None:
        net = make_pspnet(args, args.weights, len(sets[0][0].classes))
        if encoder is not None: start_from(encoder, net)
    ddp = run.place(net).train()
    values = dict(lr=args.seg_lr, weight_decay=args.weight_decay)
    optim = (torch.optim.Adam(net.parameters(), **values) if args.optimizer == "adam" else
             torch.optim.SGD(net.parameters(), momentum=args.momentum, **values))
    draws = Joint(*(Draws(dataset, augment, 1000 * args.seed + 10 * number + i)
                    for i, (dataset, augment) in enumerate(sets)))
    schedule, n, strides = poly(steps, args.power), len(sets), net.backbone.strides[:-3:-1]     # [D1]
    for step, batch in run.steps(stage, draws, steps, args.seg_batch, net, optim, schedule):
        label, alpha = batch.pseudo, torch.stack(batch.weight)
        with run.autocast():
            logits = ddp(batch.image)                           # main and auxiliary
        large = [cells_to_pixels(part.float(), s, label.shape[-2:]) for part, s in zip(logits, strides)]
        loss, auxiliary = (eq2_joint_loss(part, label, alpha, n) for part in large)             # [D13]
        total = loss + args.seg_auxiliary * auxiliary                                   # [D17]
        optim.zero_grad()
        total.backward()
        optim.step()
        first = label[::n]                                      # the real ones, where there are any
        run.log(step, loss=loss, known=(first != 255).float().mean(), background=(first == 0).float().mean())
    return net.eval()


# ── Bottom-up step (§3.4) ───────────────────────────────────────────────────────────────────────────────────
@inference()
def predict(net, image, scales, device):
    """Class probabilities, mean over scales and mirror images.   image (H,W,3) uint8 -> (K+1,H,W) float32"""
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    stride, size, total = net.backbone.strides[-1], image.shape[:2], 0
    for scale in scales:
        seen = [max(32, round(n * scale)) for n in size]
        scaled = resize_batch(x, seen)
        logits = net(torch.cat([scaled, scaled.flip(-1)])).float()
        prob = cells_to_pixels(logits, stride, size, seen).softmax(1)
        total = total + prob[0] + prob[1].flip(-1)
    return (total / (2 * len(scales))).cpu().numpy()


def by_tags(args):
    """Whether labels hold classes of the picture's tags only.   [D16]"""
    return args.label_tags and args.initial == "cam"


def of_tags(args, P, tags):
    """Probabilities among background and the picture's own classes alone.   [D16]   P (K+1,H,W), tags (K,)"""
    if not by_tags(args):
        return P
    P = P * np.r_[True, tags][:, None, None]
    return P / P.sum(0, keepdims=True).clip(1e-12)


def keep_lost(label, initial, tags):
    """A part of the picture's tags that a round's label (H,W) lost keeps its initial mask. Where it has none,
    background is without label: the part may be anywhere.   [D16]"""
    for k in np.flatnonzero(tags) + 1:
        if not (label == k).any():
            label = np.where((initial == k) & ((label == 0) | (label == 255)), k, label).astype(np.uint8)
    found = np.isin(np.flatnonzero(tags) + 1, label).all()
    return label if found else np.where(label == 0, 255, label).astype(np.uint8)


def predict_train(args, run, net, train_set, folder):
    """Algorithm 2, lines 1 to 5.   Writes confidence/<folder>/*.npz (counts), <folder>/*.png (argmax)"""
    with run.timed(folder):
        for (name,) in run.todo(train_set.names, folder, stage=folder, beside=(f"confidence/{folder}",)):
            sample = train_set[train_set.index(name)]
            P = of_tags(args, predict(net, sample.image, args.test_scales, run.device), sample.tags)
            known = by_tags(args) and not sample.tags.any()     # all background: no place in the ranking
            save_npz(run.path(f"confidence/{folder}", name, ".npz"), counts=level_counts(P) * (not known))
            save_label(run.path(folder, name), P.argmax(0))


def write_round_labels(args, run, net, train_set, source, folder, p):
    """Algorithm 2, lines 6 to 14, and the refinement.   Writes <folder>/*.png

    source: the folder that predict_train wrote
    """
    counts = np.zeros(LEVELS, np.int64)
    for name in train_set.names:
        with np.load(run.path(f"confidence/{source}", name, ".npz")) as file:
            counts += file["counts"]
    threshold, crf = alg2_threshold(counts, p), args.label_crf if args.refine_crf else None
    with run.timed(folder):
        for names in run.todo(train_set.names, folder, chunk=16, stage=folder):
            if not args.refine:                                                         # [D12]
                for name in names: save_label(run.path(folder, name), read_label(run.path(source, name)))
                continue
            samples = [train_set[train_set.index(name)] for name in names]
            images, labels = [sample.image for sample in samples], []
            for sample in samples:                              # one picture's probabilities at a time
                P = of_tags(args, predict(net, sample.image, args.test_scales, run.device), sample.tags)
                labels.append(alg2_label(P, threshold))
            regions = [None] * len(names)
            if args.refine_superpixels:
                regions = [slic_regions(image, args.superpixels, args.compactness) for image in images]
            labels = refine_labels(images, labels, len(train_set.classes) + 1, regions, crf,
                                   args.label_prob, args.crf, args.workers, run.device)
            for s, label in zip(samples, labels):
                if args.keep_initial and args.initial == "cam":
                    label = keep_lost(label, read_label(run.path("initial", s.name)), s.tags)
                save_label(run.path(folder, s.name), label)


def label_change(run, names, before, after):
    """Share of the pixels whose label differs; those that are background in both do not count."""
    counts = torch.zeros(2, dtype=torch.float64)
    for name in shard(names):
        old, new = (read_label(run.path(folder, name)) for folder in (before, after))
        counts += torch.tensor([(old != new).sum(), ((old != 0) | (new != 0)).sum()])
    differ, every = reduce(counts).tolist()
    return differ / max(1, every)


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
def write_predictions(args, run, net, val_set):
    """Predictions of the segmentation network without and with CRF.   Writes val/*.png and val_crf/*.png"""
    with run.timed("val"):
        for names in run.todo(val_set.names, "val_crf", chunk=16):
            images = [val_set[val_set.index(name)].image for name in names]
            probs = [predict(net, image, args.test_scales, run.device) for image in images]
            refined = dense_crf(images, probs, args.seg_crf, args.crf, args.workers, run.device)
            for name, prob, crf in zip(names, probs, refined):
                save_label(run.path("val", name), prob.argmax(0))
                save_label(run.path("val_crf", name), crf.argmax(0))


def evaluate_stage(args, run, stage, split, folder, timed, crf=False, labels="", **values):
    """One entry of results.json. Only from here on are val masks, and those of weak labels' images, seen.

    folder: label maps; labels: those that the next round learns from; miou_fg is without background
    """
    truth = load_real(args, split, masks=True)
    if "mask" not in truth.fields or run.has(stage):                                  # own data may lack it
        return
    confusion = confusion_of(truth, lambda s: read_label(run.path(folder, s.name), truth.classes))
    fg = [value for value in list(confusion.iou().values())[1:] if value is not None]
    if labels:
        learnt = confusion_of(truth, lambda s: read_label(run.path(labels, s.name), truth.classes))
        values.update(precision=learnt.precision(), coverage=learnt.coverage())
    run.result(stage, confusion, split=split, n_images=len(truth), uses_masks=True, crf=crf,
               miou_fg=sum(fg) / len(fg) if fg else None, scales=args.test_scales, notes=truth.notes,
               seconds=round(sum(map(run.seconds, timed)), 1), **values)


def missed_share(run, train_set):
    """Percent of the tags whose part the CAM never found."""
    missed, tags = 0, 0
    for name in train_set.names:
        with np.load(run.path("cam", name, ".npz")) as file:
            missed, tags = missed + int(file["missed"]), tags + len(file["present"])
    return 100 * missed / max(1, tags)


def draw_selftrain(args, run, split, folders, cam=False):
    """panels/<split>.png of the label maps in these folders, `cam`: beside the CAM; val: also
    panels/several.png, of the pictures with two parts or more.
    """
    truth, columns = load_real(args, split, masks=True), {folder: folder for folder in folders}
    if cam:
        columns = {"CAM": lambda s: read_cam(run, s.name, len(truth.classes)).max(0), **columns}
    draw_panels(run, split, truth, columns)
    several = (name for name in truth.names if split == "val" and tags_in(truth, name).sum() > 1)
    several = list(itertools.islice(several, 16))
    if several:
        draw_panels(run, "several", subset(truth, several), columns)


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder, by the network of --checkpoint.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    state, last = read_predictor(args, Args, "segmenter_….pt or source.pt", "head.4.weight")
    device, made = start_processes(args.device), Args(**state["args"])
    net = with_weights(make_pspnet(made, "none", len(state["model"][last]) - 1), state, device)
    for image, path in pictures_to_predict(args):
        prob = predict(net, image, made.test_scales, device)
        label = dense_crf([image], [prob], CRF(*made.seg_crf), args.crf, device=device)[0].argmax(0)
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_selftrain(args):
    """What would else fail after hours fails now."""
    needs_rendered = args.source_only or args.initial == "source" and args.supervision != "full"
    if needs_rendered and not args.rendered:
        raise UserError("--no-rendered leaves nothing to learn from with --source-only or --initial source")
    if args.rounds < 1 or args.edge_width < 1:
        raise UserError("--rounds and --edge-width: give 1 or more")
    if args.seg_batch % (2 * world()):
        raise UserError(f"--seg-batch {args.seg_batch}: give a multiple of {2 * world()}, a real and a "
                        "rendered picture for each process")
    if not 0 < args.cam_decay < 1 or not 0 <= args.cam_share < 1:
        raise UserError("--cam-decay and --cam-share: give shares between 0 and 1")
    if not 0 < args.ratio <= args.ratio_max <= 1 or args.ratio_step < 0:
        raise UserError("--ratio and --ratio-max: give shares above 0 and up to 1, the latter not below the "
                        "former; --ratio-step: 0 or more")
    if args.compactness <= 0:
        raise UserError(f"--compactness {args.compactness}: give a number above 0")
    make_pspnet(args, args.weights, 1)                                                 # wrong weights: now
    if args.enc_steps and (pretrained(args.backbone, args.weights) or args.cam_backbone != args.backbone):
        raise UserError("--enc-steps is for --weights none and one backbone for both networks; with trained "
                        "weights add --enc-steps 0")


def self_train(args, run, train_set, rendered, net, encoder):
    """Algorithm 1: rounds of top-down and bottom-up steps.   net: of --initial source -> the last network"""
    folder = labels = "initial"
    drawn = ["initial"] if args.initial == "cam" else ["initial_raw", "initial"]
    for number in range(1, args.rounds + 1):
        stage, last = f"round_{number}", number == args.rounds
        real = with_labels(train_set, pseudo=run.dir / labels)
        net = train_round(args, run, f"segmenter_{number}", args.seg_steps, number, real, rendered,
                          encoder, net)
        predict_train(args, run, net, train_set, stage)
        drawn.append(stage)
        values, change = {}, 1.0
        if not last:
            folder = f"pseudo_{number}"
            uses = number - (args.initial == "cam")             # initial source: the first was `initial`
            p = min(args.ratio_max, args.ratio + uses * args.ratio_step)
            write_round_labels(args, run, net, train_set, stage, folder, p)
            change = label_change(run, train_set.names, labels, folder)
            values = dict(labels=folder, ratio=p if args.refine else 1.0, change=100 * change)
            labels = folder
        timed = [f"segmenter_{number}", stage, f"pseudo_{number}"]
        evaluate_stage(args, run, stage, "train", stage, timed, **values)
        if change < args.stop_change:
            run.say(f"{100 * change:.1f} % of the labels changed: no further round")
            break
    if not run.has("val"):
        draw_selftrain(args, run, "train", drawn, cam=args.initial == "cam")
    return net


def main():
    """Fig. 1: initial masks, then Algorithm 1; --supervision full: one round on ground truth."""
    presets = {"solids": SOLIDS, "shapes": SOLIDS, "photos": PHOTOS, "cityscapes": SCENES}
    args = parse_args(Args, __doc__, presets=presets)
    args.cam_backbone = args.backbone if args.cam_backbone == "same" else args.cam_backbone
    if args.predict:
        return predict_folder(args)
    train_set, val_set = load_real(args, "train"), load_real(args, "val")
    rendered = load_rendered(args, train_set.classes) if args.rendered or args.enc_steps else None
    start_processes(args.device)
    check_selftrain(args)
    run, net = Run(args, FIELDS if args.initial == "cam" else SOURCE_FIELDS), None
    encoder = train_encoder(args, run, rendered)
    rendered = rendered if args.rendered else None
    if args.source_only or args.initial == "source" and args.supervision != "full":
        net = train_round(args, run, "source", args.source_steps, 0, None, rendered, encoder)    # §4.2.2
    if args.supervision == "full" and not args.source_only:
        net = train_round(args, run, "segmenter_1", args.rounds * args.seg_steps, 1, train_set, rendered,
                          encoder)
    elif not args.source_only:
        if args.initial == "cam":
            classifier = train_classifier(args, run, train_set, encoder)                # §3.1
            write_initial(args, run, classifier, train_set)
            evaluate_stage(args, run, "initial", "train", "initial", ["encoder", "classifier", "initial"],
                           labels="initial", missed=missed_share(run, train_set))
        else:
            predict_train(args, run, net, train_set, "initial_raw")
            write_round_labels(args, run, net, train_set, "initial_raw", "initial", args.ratio)
            evaluate_stage(args, run, "initial", "train", "initial_raw",
                           ["encoder", "source", "initial_raw", "initial"], labels="initial")
        net = self_train(args, run, train_set, rendered, net, encoder)                  # Algorithm 1
    write_predictions(args, run, net, val_set)
    if not run.has("val_crf"):
        draw_selftrain(args, run, "val", ["val", "val_crf"])
        timed = (["encoder", "source", "val"] if args.source_only else
                 ["encoder", "segmenter_1", "val"] if args.supervision == "full" else ["val"])
        for stage in ("val", "val_crf"):
            evaluate_stage(args, run, stage, "val", stage, timed, crf=stage == "val_crf")
    run.table()


if __name__ == "__main__":
    main()
