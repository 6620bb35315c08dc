"""SCL: Self-Guided and Cross-Guided Learning for Few-Shot Segmentation.
B. Zhang, J. Xiao, T. Qin; CVPR 2021. Equation numbers: B. Zhang's thesis, chapter 5.
Both baselines are here: CANet (C. Zhang et al., CVPR 2019) and PFENet (Z. Tian et al., TPAMI 2020).

Symbols      I_s, M_s support picture and mask, 1 = the class, 255 = no label · I_q, M_q query · F_s, F_q
             features (B,d,h,w) · v_s, v_pri, v_aux support vectors (B,d), V those in use (B,n,d) · P_s1,
             P_s2, P_q probabilities (B,2,h,w) · FPM feature processing module, D decoder · K shots ·
             G(I_i|I_k) scores of picture i with support k · U_s^k confidence in support k
Equations    (5.1) eq5_1_support_vector    (5.2, 5.8, 5.11) eq5_2_8_11_concat
             (5.3, 5.9) SCL.eq5_3_9_support_scores    (5.4) eq5_4_predicted_mask
             (5.5, 5.6) eq5_5_6_primary_auxiliary    (5.7, 5.10, 5.13) eq5_7_10_13_cross_entropy
             (5.12) SCL.eq5_12_query_scores    (5.14) eq5_14_total    (5.15) eq5_15_cross_predictions
             (5.16) eq5_16_confidence    (5.17) eq5_17_fuse
Figures      Fig. 5.1 = SCL.forward; Fig. 5.2 = SCL.self_guided; Fig. 5.4 = SingleScaleFPM and
             SingleScaleDecoder; Fig. 5.5 = MultiScaleFPM and MultiScaleDecoder; Fig. 1.5 = test_self
Tables       5.6 --test-scales 1 · 5.7 --guide none, with the stages test_1shot, test_5shot_average and
             test_5shot_cgm of both runs · 5.8 --vectors s | pri | aux | all · 5.9 --no-s1-loss, --no-s2-loss
Commands     python scl.py                                     # embedded shapes, made for two CPU cores
             python scl.py --guide none --out runs/scl-none    # the baseline
             python scl.py --compare runs/scl-none runs/scl-shapes-full-s0        # gain and its interval
             python scl.py --data voc --root data/voc --baseline pfenet --fold 1  # paper: 70.0, 70.9; mean of
                                                                                  # the four folds 61.8, 62.9
             python scl.py --data coco --root data/coco --baseline pfenet --backbone resnet101  # paper: 36.4,
                                                                                  # mean of the folds 37.0
             python scl.py --predict photos/ --support-images a.jpg b.jpg --support-masks a.png b.png \
                 --checkpoint runs/scl-voc-full-s0/segmenter.pt
Departures   [D1] backbones are torchvision's; PFENet's has a stem of three 3x3 convolutions
             [D2] the fixed backbone's batch norm keeps ImageNet's statistics; in the authors' code those of
                  the batch (--batch-norm batch)
             [D3] CANet's history mask: a prediction of the same step, without gradient, in place of the last
                  epoch's, of which random episodes have none
             [D4] the paper's rates are a tenth of those that the authors' code ends up with; the latter are
                  taken
             [D5] masks: grid cell i is pixel stride·i, so M_s is binary as in Eq. 5.1 (authors' code:
                  bilinear); a mask between all cells takes the cells that it touches
             [D6] Eqs. 5.7, 5.10, 5.13: on pixels, mean over those with a label (both baselines' codes); 255
                  has none (CANet's code: background)
             [D7] "average" is Eq. 5.17 with all U equal, for both baselines; PFENet itself averages vectors
             [D8] Eq. 5.16 as printed: all i, with i = k, IoU of the class, predictions of the query's module;
                  authors' code (--cgm-score code): i ≠ k, predictions of the support's module, for PFENet the
                  mean of both classes' IoU. All U zero: the average
             [D9] --vectors s, pri, aux: the one vector takes both places; --vectors s has no L_s2, which
                  would be L_s1 once more. --vectors all: three places, in Eq. 5.2 all of them v_s
             [D10] bins of PFENet are shares of the feature grid, 60/60 to 8/60, in tests and for COCO too
                  (authors' code, COCO: the smallest 1/8)
             [D11] a crop without a pixel of the class is drawn again, ten times at most
             [D12] test classes are drawn with equal chance; classes with fewer pictures than shots + 1 are
                  left out and named; the last network is tested (authors' code: the best epoch on the test
                  episodes)
             [D13] a backbone from nothing (--weights none) first learns to segment the fold's training
                  classes; then it stays fixed, as one from ImageNet does
             [D14] presets: narrower decoders, their first weights scaled to that, less dropout, rates for few
                  steps, smaller crops, fewer pixels that make a picture count, one test scale, fewer episodes
                  and refinements. photos: --init-std 0.02, which for a quarter of the channels is the
                  paper's 0.01; He's, as for shapes, made scores of ±10 of features that are larger there.
                  shapes: training pictures without held-out classes (--held-out drop), so that an encoder
                  from nothing does not learn them as background
             [D15] PASCAL-5i trains on train_aug, 10,582 pictures, for as many steps as 200 epochs of the
                  authors' list of 5,953, which --train-list can name
             [D16] CANet's query: pictures longer than 640 pixels, COCO's longest, are seen at 640
             [D17] CANet's test refines --refinements times (its code: while the mask still changes for the
                  better); it trains 200 epochs, on COCO as many steps (SCL's code for CANet: 150 epochs)
             [D18] PFENet's second pass over the support computes its pyramid anew, as Eq. 5.8 has it
                  (authors' code: the first pass's once more)
             [D19] CANet: the support's FPM shares the query's comparison convolution and has a residual block
                  of its own; the paper names the residual block, whose inputs alone differ, and is silent on
                  the convolution before it (--no-share-compare: its own)
Nothing here uses a dense CRF, as in the paper; --crf has no effect.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (
    DeepLab, Run, UserError, barrier, cells_to_pixels, contact_sheet, inference, make_backbone, overlay,
    parse_args, pictures_to_predict, poly, pretrained, rank, read_json, read_predictor, reduce, save_npz,
    save_prediction, start_processes, with_weights, world, write_json)
from data import (
    MEAN, DataError, Draws, Sample, changed, class_areas, class_folds, class_mask, crop, flip, load,
    normalise, read_image, read_label, rescale, resize, resize_batch, resize_long, window)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco"] = "shapes"
    """shapes is drawn on the fly; voc = PASCAL-5i, coco = COCO-20i"""
    supervision: Literal["full"] = "full"
    """masks of the training classes; pixels of held-out classes are background"""
    backbone: Literal["tiny", "resnet50", "resnet101", "mobilenet_v2"] = "resnet50"
    """stays fixed. Taps: layer2, layer3, for PFENet's prior layer4; features 6, 13, 18 of MobileNet [D1]"""
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
    # --- episodes (§5.4.2) ---
    fold: int = 0
    """0 to 3: its classes are tested, the others trained"""
    folds: Literal["interleaved", "blocks"] = "interleaved"
    """COCO-20i: every fourth class (PFENet's and the paper's), or blocks of 20"""
    min_area: int = 2048
    """a picture counts for a class from this many pixels on (PFENet)"""
    held_out: Literal["background", "drop"] = "background"
    """training pictures that also show a held-out class: it is background (authors' code), or left out"""
    # --- encoder from nothing ---
    enc_steps: int = 60_000
    """only for tiny and with --weights none: segmentation of the training classes [D13]"""
    enc_batch: int = 8
    """images a step, over all processes"""
    enc_lr: float = 0.05
    """SGD; poly 0.9"""
    enc_decay: float = 5e-4
    """weight decay"""
    enc_rescale: tuple[float, float] = (0.75, 1.5)
    """range of the random scale; crops of seg_crop"""
    # --- network (Figs. 5.4, 5.5) ---
    baseline: Literal["canet", "pfenet"] = "canet"
    """single-scale with history mask, or multi-scale with prior mask"""
    guide: Literal["none", "sgm"] = "sgm"
    """none = the published baseline; sgm = self-guided module"""
    vectors: Literal["s", "pri", "aux", "pri,aux", "all"] = "pri,aux"
    """support vectors of SGM that the query gets (Table 5.8) [D9]"""
    s1_loss: bool = True
    """Eq. 5.7 (Table 5.9)"""
    s2_loss: bool = True
    """Eq. 5.10 (Table 5.9)"""
    share_compare: bool = True
    """CANet: one comparison convolution for the FPMs of support and query [D19]"""
    width: int = 256
    """§5.4.1: d, channels of all features"""
    dropout: float = 0.5
    """of the reduced features and, in CANet, of comparison, ASPP and classifier (authors' code)"""
    init_std: float = 0.01
    """CANet: normal distribution of all new weights (authors' code); 0 = He's √(2/inputs) for narrow ones"""
    empty_history: float = 0.7
    """CANet: chance that the history mask is empty in training; SCL's code: 0.9 [D3]"""
    inner_weight: float = 1.0
    """PFENet: weight of the losses at each bin"""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """statistics of the fixed backbone in training: ImageNet's, or the batch's (authors' code) [D2]"""
    # --- training (§5.4.1); 0 = the baseline's own, see OWN ---
    seg_steps: int = 0
    """200 epochs of 5,953 images [D15]; PFENet on COCO: 50 of 82,081"""
    seg_batch: int = 0
    """episodes a step, over all processes: 4; PFENet on COCO: 32"""
    seg_lr: float = 0
    """CANet 2.5e-3 constant, PFENet 0.025 poly 0.9, on COCO 0.2; the paper names a tenth of each [D4]"""
    weight_decay: float = 0
    """CANet 5e-4, PFENet 1e-4"""
    seg_crop: int = 0
    """pixels: CANet 321, PFENet 473, on COCO 641"""
    seg_rescale: tuple[float, ...] = ()
    """range of the random scale: CANet 1 to 1.5 (supports), PFENet 0.9 to 1.1, on COCO 0.8 to 1.25"""
    momentum: float = 0.9
    """of SGD"""
    # --- test (§5.4.2) ---
    shots: tuple[int, ...] = (1, 5)
    """K, all on the same episodes"""
    fuse: tuple[Literal["average", "cgm"], ...] = ("average", "cgm")
    """K > 1: equal weights [D7], cross-guided module, or both"""
    cgm_score: Literal["paper", "code"] = "paper"
    """Eq. 5.16 as printed, or the authors' code [D8]"""
    episodes: int = 1000
    """§5.4.2; PFENet's code 5,000"""
    test_seeds: int = 5
    """§5.4.1: sets of episodes, seeds 0, 1, …"""
    test_scales: tuple[float, ...] = ()
    """of the query, scores averaged: CANet 0.7, 1, 1.3, PFENet 1 (Table 5.6)"""
    refinements: int = 4
    """CANet: passes with the last prediction as history, after the first"""
    cache: int = 32
    """pictures whose features are kept in the test; does not change the result"""
    compare: tuple[str, ...] = ()
    """two finished run folders: no training, prints what the second gains over the first"""
    support_images: tuple[str, ...] = ()
    """--predict: pictures that show the class"""
    support_masks: tuple[str, ...] = ()
    """--predict: as many masks, 0 = background, any one other value = the class"""


# What the baselines do not share.
OWN = {
    "canet": dict(seg_steps=297_650, seg_batch=4, seg_lr=2.5e-3, weight_decay=5e-4, seg_crop=321,
                  seg_rescale=(1.0, 1.5), test_scales=(0.7, 1.0, 1.3)),
    "pfenet": dict(seg_steps=297_650, seg_batch=4, seg_lr=0.025, weight_decay=1e-4, seg_crop=473,
                   seg_rescale=(0.9, 1.1), test_scales=(1.0,)),
    "pfenet-coco": dict(seg_steps=128_252, seg_batch=32, seg_lr=0.2, seg_crop=641, seg_rescale=(0.8, 1.25))}
# What two CPU cores do in minutes; everything else as the paper.   [D14]
SHAPES = dict(
    backbone="tiny", weights="none", width=32, dropout=0.1, init_std=0, min_area=128, held_out="drop",
    enc_steps=2000, seg_steps=4000, seg_batch=4, seg_lr=0.01, seg_crop=97,
    test_scales=(1.0,), refinements=1, episodes=300, test_seeds=1, cache=400)
# A few hundred photographs with a small pretrained backbone on two CPU cores.   [D14]
PHOTOS = dict(
    backbone="mobilenet_v2", train_list="train", width=64, dropout=0.1, init_std=0.02, seg_steps=1000,
    seg_batch=4, seg_lr=2.5e-3, seg_crop=257, test_scales=(1.0,), refinements=1, shots=(1,), episodes=300,
    test_seeds=1, cache=200)

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "areas": "data root train_list supervision",
    "encoder": "seed amp weights backbone fold folds min_area held_out enc_steps enc_batch enc_lr enc_decay "
               "enc_rescale seg_crop momentum",
    "segmenter": "baseline guide vectors s1_loss s2_loss share_compare width dropout init_std empty_history "
                 "inner_weight batch_norm seg_steps seg_batch seg_lr weight_decay seg_rescale",
}.items()}


# ── Support vectors (Eqs. 5.1–5.6) and PFENet's prior mask ──────────────────────────────────────────────────
def eq5_1_support_vector(F_s, region):
    """Eq. (5.1), masked GAP: Σ_i F_s(i)·[M_s(i) = 1] / Σ_i [M_s(i) = 1]; 0 for an empty region.

    F_s (B,d,h,w), region (B,h,w) bool -> (B,d)
    """
    region = region[:, None].to(F_s.dtype)
    return (F_s * region).sum((2, 3)) / region.sum((2, 3)).clamp_min(1)


def eq5_2_8_11_concat(feature, V):
    """Eqs. (5.2), (5.8), (5.11): Concat([F, V_1, …, V_n]).   (B,d,h,w), (B,n,d) -> (B,(1+n)d,h,w)"""
    return torch.cat([feature, V.flatten(1)[:, :, None, None].expand(-1, -1, *feature.shape[2:])], dim=1)


def eq5_4_predicted_mask(scores):
    """Eq. (5.4): M̂_s = arg-max P_s1 = 1.   scores (B,2,h,w) -> (B,h,w) bool"""
    return scores.detach().argmax(1) == 1


def eq5_5_6_primary_auxiliary(F_s, M_s, predicted):
    """Eqs. (5.5), (5.6): v_pri of the object's predicted part, v_aux of the missing one.   -> (B,d) twice"""
    return eq5_1_support_vector(F_s, M_s & predicted), eq5_1_support_vector(F_s, M_s & ~predicted)


def to_cells(mask, stride):
    """M_s on the feature grid: cell i is pixel stride·i.   [D5]   (B,H,W) {0, 1, 255} -> (B,h,w) bool"""
    inside = mask == 1
    cells = inside[:, ::stride, ::stride]
    touched = F.max_pool2d(inside[:, None].float(), stride, ceil_mode=True)[:, 0] > 0
    return torch.where(cells.flatten(1).any(1)[:, None, None], cells, touched)


def prior_mask(high_q, high_s):
    """PFENet: each query cell's largest cosine with a cell of the support's object, brought to 0 … 1.

    high_q (B,C,h,w); high_s (B,C,h',w'), 0 outside of the object -> (B,1,h,w)
    """
    q, s = (F.normalize(x.float().flatten(2), dim=1) for x in (high_q, high_s))
    with torch.autocast(q.device.type, enabled=False):      # in bf16 all large cosines would be a few values
        best = (s.transpose(1, 2) @ q).amax(1).view(len(q), 1, *high_q.shape[2:])
    low, top = best.amin((2, 3), keepdim=True), best.amax((2, 3), keepdim=True)
    return (best - low) / (top - low + 1e-7)


# ── Networks (Figs. 5.1, 5.2, 5.4, 5.5) ─────────────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def on_grid(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size), corner on corner, as PFENet does."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


def conv3(inputs, outputs, dilation=1):
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)


class Residual(nn.Sequential):
    """CANet's block, without the sum."""

    def __init__(self, inputs, width):
        super().__init__(nn.ReLU(), conv3(inputs, width), nn.ReLU(), conv3(width, width))


class SingleScaleFPM(nn.Module):
    """CANet: comparison and first residual block; the query's block also gets the history mask (Fig. 5.4).
    The comparison is one for query and support [D19].

    forward(feature (B,d,h,w), V (B,n,d), extra (B,2,h,w) or None) -> (B,d,h,w)
    """

    def __init__(self, width, vectors, extra, dropout):
        super().__init__()
        self.compare = nn.Sequential(conv3((1 + vectors) * width, width, 2), nn.ReLU(), nn.Dropout2d(dropout))
        self.residual = Residual(width + extra, width)

    def forward(self, feature, V, extra=None):
        x = self.compare(eq5_2_8_11_concat(feature, V))
        return x + self.residual(x if extra is None else torch.cat([x, extra], dim=1))


class SingleScaleDecoder(nn.Module):
    """CANet: two residual blocks, ASPP, classifier.   (B,d,h,w) -> [scores (B,2,h,w)]"""

    def __init__(self, width, dropout, rates=(6, 12, 18)):
        super().__init__()
        self.residuals = nn.ModuleList(Residual(width, width) for _ in range(2))
        convs = [nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1),      # of the mean, of each cell
                 *(conv3(width, width, rate) for rate in rates)]
        self.aspp = nn.ModuleList(nn.Sequential(conv, nn.ReLU(), nn.Dropout2d(dropout)) for conv in convs)
        self.classify = nn.Sequential(nn.Conv2d(5 * width, width, 1), nn.ReLU(), nn.Dropout2d(dropout),
                                      nn.Conv2d(width, 2, 1))

    def forward(self, x):
        for residual in self.residuals:
            x = x + residual(x)
        whole = self.aspp[0](x.mean((2, 3), keepdim=True)).expand_as(x)
        return [self.classify(torch.cat([whole, *(branch(x) for branch in self.aspp[1:])], dim=1))]


class MultiScaleFPM(nn.Module):
    """PFENet: the features pooled to each bin, merged; the query's with the prior mask (Fig. 5.5).   [D10]

    forward(feature (B,d,h,w), V (B,n,d), extra (B,1,h,w) or None) -> list of (B,d,h_i,w_i), fine to coarse
    """

    def __init__(self, width, vectors, extra, bins=(1, 30 / 60, 15 / 60, 8 / 60)):
        super().__init__()
        self.bins = bins
        self.merge = nn.ModuleList(
            nn.Sequential(nn.Conv2d((1 + vectors) * width + extra, width, 1), nn.ReLU()) for _ in bins)

    def forward(self, feature, V, extra=None):
        x, levels = eq5_2_8_11_concat(feature, V), []
        for share, merge in zip(self.bins, self.merge):
            size = [max(1, round(share * n)) for n in x.shape[2:]]
            level = F.adaptive_avg_pool2d(x, size)
            levels.append(merge(level if extra is None else torch.cat([level, on_grid(extra, size)], dim=1)))
        return levels


class MultiScaleDecoder(nn.Module):
    """PFENet: inter-scale merging from fine to coarse, then all levels together.

    list of (B,d,h_i,w_i) -> [scores (B,2,h,w)], while it trains also those at each level, on the same grid
    """

    def __init__(self, width, levels=4):
        super().__init__()

        def classifier():
            return nn.Sequential(conv3(width, width), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(width, 2, 1))

        def refine():
            return nn.Sequential(conv3(width, width), nn.ReLU(), conv3(width, width), nn.ReLU())

        def join(inputs):
            return nn.Sequential(nn.Conv2d(inputs * width, width, 1), nn.ReLU())

        self.alpha = nn.ModuleList(join(2) for _ in range(levels - 1))
        self.beta = nn.ModuleList(refine() for _ in range(levels))
        self.inner = nn.ModuleList(classifier() for _ in range(levels))
        self.join, self.refine, self.classify = join(levels), refine(), classifier()

    def forward(self, levels):
        grid, merged = levels[0].shape[2:], []
        for i, x in enumerate(levels):
            if i: x = x + self.alpha[i - 1](torch.cat([x, on_grid(merged[-1], x.shape[2:])], dim=1))
            merged.append(x + self.beta[i](x))
        x = self.join(torch.cat([on_grid(level, grid) for level in merged], dim=1))
        scores = [self.classify(x + self.refine(x))]
        if self.training: scores += [on_grid(head(level), grid) for head, level in zip(self.inner, merged)]
        return scores


class SCL(nn.Module):
    """Fig. 5.1.   forward(image (2B,3,H,W), mask (2B,H,W)), rows query, support, query, …

    -> {"q": P_q's scores, "s1", "s2"}, each a list of (B,2,h,w): the main scores, then PFENet's at each bin.
    vectors: which of v_s, v_pri, v_aux the query gets; sgm: whether there is a support module at all.
    """

    def __init__(self, backbone, stride, baseline, sgm, vectors, width, dropout, empty_history, refinements,
                 share_compare=True):
        super().__init__()
        single = baseline == "canet"
        self.backbone, self.stride, self.single = backbone.requires_grad_(False), stride, single
        self.vectors, self.empty_history, self.refinements = vectors, empty_history, refinements
        if single: backbone.blocks = backbone.blocks[:3]                  # layer4 only makes the prior mask
        middle, self.third = sum(backbone.channels[1:3]), backbone.channels[2]
        self.places = 3 if len(vectors) == 3 else 2 if sgm else 1

        def reduction():
            conv = conv3(middle, width, 2) if single else nn.Conv2d(middle, width, 1)
            return nn.Sequential(conv, nn.ReLU(), nn.Dropout2d(dropout))

        def fpm(extra):
            return (SingleScaleFPM(width, self.places, extra, dropout) if single
                    else MultiScaleFPM(width, self.places, extra))

        self.reduce_query = reduction()
        self.reduce_support = self.reduce_query if single else reduction()
        self.fpm_query, self.fpm_support = fpm(2 if single else 1), fpm(0) if sgm else None
        if sgm and single and share_compare: self.fpm_support.compare = self.fpm_query.compare      # [D19]
        self.decoder = SingleScaleDecoder(width, dropout) if single else MultiScaleDecoder(width)

    @torch.no_grad()
    def encode(self, image):
        """The fixed backbone's layer2 and layer3 together, and layer4 (None for CANet).   (B,·,h,w)"""
        taps = self.backbone(image)
        return torch.cat(taps[1:3], dim=1), None if self.single else taps[3]

    @torch.no_grad()
    def object_high(self, middle, M_s):
        """PFENet: layer4 of the support's object alone, from layer3 without the rest; None for CANet."""
        if self.single: return None
        region = M_s[:, None].to(middle.dtype)
        return self.backbone.blocks[3](middle[:, -self.third:] * region) * region

    def eq5_3_9_support_scores(self, F_s, V):
        """Eqs. (5.3), (5.9) before the softmax: D(FPM_s(Concat([F_s, V])))."""
        return [scores.float() for scores in self.decoder(self.fpm_support(F_s, V))]

    def self_guided(self, F_s, M_s):
        """Fig. 5.2.   F_s (B,d,h,w), M_s (B,h,w) bool -> V (B,n,d), {"s1": …, "s2": …}"""
        v = {"s": eq5_1_support_vector(F_s, M_s)}
        V, scores = torch.stack([v["s"]] * self.places, dim=1), {}
        if self.fpm_support is None: return V, scores
        scores["s1"] = self.eq5_3_9_support_scores(F_s, V)
        if self.vectors == ("s",): return V, scores                                     # [D9]
        v["pri"], v["aux"] = eq5_5_6_primary_auxiliary(F_s, M_s, eq5_4_predicted_mask(scores["s1"][0]))
        chosen = [v[name] for name in self.vectors]
        V = torch.stack(chosen * 2 if len(chosen) == 1 else chosen, dim=1)
        if self.training: scores["s2"] = self.eq5_3_9_support_scores(F_s, V)            # [D18]
        return V, scores

    def eq5_12_query_scores(self, F_q, V, prior=None):
        """Eq. (5.12) before the softmax: D(FPM_q(F_q^A)); CANet's again and again, with what it predicted."""
        def once(extra):
            return [scores.float() for scores in self.decoder(self.fpm_query(F_q, V, extra))]

        if not self.single: return once(prior)
        history = F_q.new_zeros(len(F_q), 2, *F_q.shape[2:])
        if self.training:
            fed = torch.rand(len(F_q), 1, 1, 1, device=F_q.device) >= self.empty_history
            # [D3] Not under no_grad: older torch's autocast would keep the weights cast there, cut off from
            # their gradients, for the second pass as well.
            if fed.any(): history = once(history)[0].detach().softmax(1) * fed
            return once(history)
        for _ in range(self.refinements): history = once(history)[0].softmax(1)    # [D17]
        return once(history)

    def forward(self, image, mask):
        (middle, high), M_s = self.encode(image), to_cells(mask[1::2], self.stride)
        V, scores = self.self_guided(self.reduce_support(middle[1::2]).float(), M_s)
        prior = None if self.single else prior_mask(high[::2], self.object_high(middle[1::2], M_s))
        scores["q"] = self.eq5_12_query_scores(self.reduce_query(middle[::2]).float(), V, prior)
        return scores


# ── Losses (Eqs. 5.7, 5.10, 5.13, 5.14) ─────────────────────────────────────────────────────────────────────
def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq5_7_10_13_cross_entropy(scores, mask, stride):
    """Eqs. (5.7), (5.10), (5.13): −log P of the right class, mean over pixels.   [D6]

    scores (B,2,h,w), mask (B,H,W) {0, 1, 255}
    """
    scores = cells_to_pixels(scores, stride, mask.shape[1:])
    return masked_mean(F.cross_entropy(scores, mask, ignore_index=255, reduction="none"), mask != 255)


def with_inner(scores, mask, stride, weight):
    """The cross-entropy of the main scores and, for PFENet, the mean one of the bins."""
    main, *inner = [eq5_7_10_13_cross_entropy(s, mask, stride) for s in scores]
    return main + weight * sum(inner) / len(inner) if inner else main


def eq5_14_total(L_s1, L_s2, L_q):
    """Eq. (5.14): L = L_s1 + L_s2 + L_q; what is switched off is 0."""
    return L_s1 + L_s2 + L_q


# ── Cross-guided module (Eqs. 5.15–5.17) ────────────────────────────────────────────────────────────────────
class Supports(NamedTuple):
    """K support pictures of one class, features without gradient."""
    F_q: torch.Tensor           # (K,d,h,w) in the query's part, for Eq. 5.15
    F_s: torch.Tensor           # (K,d,h,w) in the support's part
    V: torch.Tensor             # (K,n,d)
    mask: torch.Tensor          # (K,H,W) {0, 1, 255}
    high: torch.Tensor | None   # (K,C,h,w) layer4, PFENet
    object: torch.Tensor | None     # the same of the object alone


def together(supports):
    """K times one support -> Supports of K."""
    return Supports(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*supports)))


def eq5_15_cross_predictions(net, supports, module="query"):
    """Eq. (5.15): M̂_s^{i|k} = arg-max G(I_s^i|I_s^k), for each k all i in one batch.   [D8]

    module: G with the query's FPM as printed, or "support"   -> (K,K,H,W) bool, row k, column i
    """
    K, size, rows = len(supports.V), supports.mask.shape[1:], []
    for k in range(K):
        V = supports.V[k:k + 1].expand(K, -1, -1)
        if module == "query":
            prior = None if net.single else prior_mask(supports.high, supports.object[k:k + 1])
            scores = net.eq5_12_query_scores(supports.F_q, V, prior)[0]
        else:
            scores = net.eq5_3_9_support_scores(supports.F_s, V)[0]
        rows.append(cells_to_pixels(scores, net.stride, size).argmax(1) == 1)
    return torch.stack(rows)


def iou(predicted, truth, valid):
    """Bool maps (...,H,W) -> IoU (...) over the valid pixels; 0 where both are empty."""
    inter, union = (predicted & truth & valid).sum((-2, -1)), ((predicted | truth) & valid).sum((-2, -1))
    return inter / union.clamp_min(1)


def eq5_16_confidence(predicted, mask, with_self=True, with_background=False):
    """Eq. (5.16): U_s^k = 1/K Σ_i IOU(M̂_s^{i|k}, M_s^i).   [D8]   (K,K,H,W), (K,H,W) -> (K,)"""
    truth, valid, K = mask == 1, mask != 255, len(mask)
    score = iou(predicted, truth, valid)                                                # (K,K)
    if with_background: score = (score + iou(~predicted, ~truth, valid)) / 2
    if with_self or K == 1: return score.mean(1)
    return (score.sum(1) - score.diagonal()) / (K - 1)


def eq5_17_fuse(scores, U):
    """Eq. (5.17): softmax(1/K Σ_k U_s^k G(I_q|I_s^k)).   scores (K,2,H,W), U (K,) -> (2,H,W)"""
    return (U[:, None, None, None] * scores).mean(0).softmax(0)


@inference()
def confidence(net, supports, score):
    """U of these supports by --cgm-score; all alike where each is 0.   [D8]"""
    paper = score == "paper" or net.fpm_support is None
    predicted = eq5_15_cross_predictions(net, supports, "query" if paper else "support")
    U = eq5_16_confidence(predicted, supports.mask, score == "paper", score == "code" and not net.single)
    return U if U.any() else torch.ones_like(U)


# ── Episodes (§5.2, §5.4.2) ─────────────────────────────────────────────────────────────────────────────────
def pictures_of(areas, classes, min_area, least, names):
    """Which pictures stand for a class.   areas (n,K) pixels -> (n,K) bool, {class left out: how many it has}

    A class needs min_area pixels in at least `least` pictures [D12]; all others' columns are False.
    """
    pool = np.zeros_like(areas, bool)
    columns = [k - 1 for k in classes]
    pool[:, columns] = areas[:, columns] >= min_area
    short = [c for c in columns if pool[:, c].sum() < least]
    found = {names[c]: int(pool[:, c].sum()) for c in short}
    pool[:, short] = False
    return pool, found


def read_areas(run, dataset, split):
    """Pixels of each class in each picture.   Writes areas/<split>.npz -> (n,K)"""
    for (name,) in run.todo([split], "areas", stage="areas"):
        save_npz(run.path("areas", name, ".npz"),
                 areas=class_areas(dataset, tqdm(range(len(dataset)), f"areas of {split}")))
    path = run.path("areas", split, ".npz")
    with np.load(path) as file:
        areas = file["areas"]
    if len(areas) != len(dataset):
        raise UserError(f"{path} has {len(areas)} pictures, the {split} set {len(dataset)}: the data have "
                        "changed; start over with --fresh and without --reuse")
    return areas


def make_pools(args, run, train_set, val_set):
    """Pictures of the fold's training and of its test classes (n,K) bool; test classes left out {name: …}"""
    names = train_set.classes
    tested = class_folds(args.data, names, args.folds)[args.fold]
    trained = [k for k in range(1, len(names) + 1) if k not in tested]
    run.say(f"fold {args.fold}: tested {', '.join(names[k - 1] for k in tested)} · trained "
            f"{', '.join(names[k - 1] for k in trained)}")
    pools = []
    for split, data, classes, least in (("train", train_set, trained, 2),
                                        ("val", val_set, tested, max(args.shots) + 1)):
        areas = read_areas(run, data, split)
        if split == "train" and args.held_out == "drop":                                # [D14]
            areas = areas * ~areas[:, np.array(tested) - 1].any(1, keepdims=True)
        why = f"{least} {split} pictures with {args.min_area} pixels of it"
        pool, short = pictures_of(areas, classes, args.min_area, least, names)
        if short: run.say(f"left out, fewer than {why}: {short}")
        if not pool.any():
            raise DataError(f"fold {args.fold}: no class has {why}; lower --shots or --min-area, or take "
                            "another fold")
        pools.append(pool)
    return pools, short


class Episodes(torch.utils.data.Dataset):
    """Training episodes that never end: item 2e is the query of episode e, item 2e + 1 its support.

    Each picture of the pool (n,K) is a query once an epoch, for a random one of its classes. An episode
    shows that class alone. Fixed by (seed, number) as in Draws. augment(sample, support, rng)
    """

    def __init__(self, dataset, pool, augment, seed):
        self.dataset, self.pool, self.augment, self.seed = dataset, pool, augment, seed
        self.episodes = Draws(np.flatnonzero(pool.any(1)), self.members, seed)

    def __len__(self):
        return len(self.episodes)

    def __getitem__(self, n):
        episode, support = divmod(n, 2)
        k, *pictures = self.episodes[episode]
        sample = self.dataset[pictures[support]]
        sample = Sample(image=sample.image, mask=class_mask(sample.mask, k))
        return self.augment(sample, bool(support), np.random.default_rng([self.seed, n, 2]))

    def members(self, query, rng):
        column = rng.choice(np.flatnonzero(self.pool[query]))
        others = np.flatnonzero(self.pool[:, column])
        return int(column) + 1, int(query), int(rng.choice(others[others != query]))


def draw_episodes(pool, number, shots, seed):
    """Test episodes (number, 2 + shots): class 1..K, query, supports; with more shots the first stay."""
    rng, rows = np.random.default_rng([seed, 3]), []
    classes = np.flatnonzero(pool.any(0))
    for _ in range(number):
        column = rng.choice(classes)
        rows.append([column + 1, *rng.permutation(np.flatnonzero(pool[:, column]))[:1 + shots]])
    return np.array(rows)


def object_crop(sample, size, rng):
    """A random crop that keeps a pixel of the class, if one of ten does so.   [D11]"""
    for _ in range(10):
        part = crop(sample, size, rng)
        if (part.mask == 1).any(): break
    return part


MEAN_COLOUR = tuple(round(255 * value) for value in MEAN)


def rotate(sample, angle):
    """By degrees, around the centre; the corners become mean colour and 255."""
    image = Image.fromarray(sample.image).rotate(angle, Image.BILINEAR, fillcolor=MEAN_COLOUR)
    mask = Image.fromarray(sample.mask).rotate(angle, Image.NEAREST, fillcolor=255)
    return changed(sample, image=np.array(image), mask=np.array(mask))


def augment_canet(sample, support, size, scale, rng):
    """Query stretched to the crop; support stretched to a random scale of it, flipped, cropped."""
    if not support: return normalise(resize(sample, (size, size)))
    side = round(size * rng.uniform(*scale))
    sample = resize(sample, (side, side))
    return normalise(object_crop(flip(sample) if rng.random() < 0.5 else sample, size, rng))


def augment_pfenet(sample, support, size, scale, rng):
    """Random scale, rotation by up to 10 degrees, blur, mirror image, crop; query and support alike."""
    import cv2

    sample = rescale(sample, rng.uniform(*scale))
    if rng.random() < 0.5: sample = rotate(sample, rng.uniform(-10, 10))
    if rng.random() < 0.5: sample = changed(sample, image=cv2.GaussianBlur(sample.image, (5, 5), 0))
    return normalise(object_crop(flip(sample) if rng.random() < 0.5 else sample, size, rng))


AUGMENT = {"canet": augment_canet, "pfenet": augment_pfenet}


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────
def make_encoder(args, weights):
    """Backbone whose layer2, layer3 and layer4 lie on one grid.   [D1] [D2]"""
    start = pretrained(args.backbone, args.weights)
    return make_backbone(args.backbone, weights, stride_of(args), start and args.batch_norm == "frozen")


def stride_of(args):
    return 4 if args.backbone == "tiny" else 8


def make_scl(args, weights, backbone=None):
    """SCL of Args, on this backbone or on a new one; weights "none" where they are loaded afterwards."""
    sgm = args.guide == "sgm"
    vectors = {"all": "s,pri,aux"}.get(args.vectors, args.vectors) if sgm else "s"
    net = SCL(backbone or make_encoder(args, weights), stride_of(args), args.baseline, sgm,
              tuple(vectors.split(",")), args.width, args.dropout, args.empty_history, args.refinements,
              args.share_compare)
    for name, module in net.named_modules() if args.baseline == "canet" else ():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
            deviation = args.init_std or (2 / module.weight[0].numel()) ** 0.5
            nn.init.normal_(module.weight, std=deviation)
            nn.init.zeros_(module.bias)
    if sgm and not args.s1_loss and (not args.s2_loss or vectors == "s"):
        part = net.fpm_support.residual if net.single and args.share_compare else net.fpm_support
        part.requires_grad_(False)                                           # no loss reaches it
    return net


def train_encoder(args, run, train_set, pool):
    """A backbone from nothing learns to segment the fold's training classes.   [D13]"""
    columns = np.flatnonzero(pool.any(0))
    number = np.zeros(256, np.uint8)
    number[columns + 1], number[255] = np.arange(1, len(columns) + 1), 255   # held-out classes: background

    def augment(sample, rng):
        sample = Sample(image=sample.image, mask=number[sample.mask])
        sample = rescale(sample, rng.uniform(*args.enc_rescale))
        return normalise(crop(flip(sample) if rng.random() < 0.5 else sample, args.seg_crop, rng))

    run.reseed("encoder")
    backbone = make_encoder(args, args.weights)
    net = DeepLab(backbone, nn.Conv2d(backbone.channels[-1], len(columns) + 1, 1))
    ddp, s = run.place(net).train(), stride_of(args)
    optim = torch.optim.SGD(net.parameters(), lr=args.enc_lr, momentum=args.momentum,
                            weight_decay=args.enc_decay)
    kept = torch.utils.data.Subset(train_set, np.flatnonzero(pool.any(1)).tolist())
    draws, schedule = Draws(kept, augment, args.seed), poly(args.enc_steps)
    for step, batch in run.steps("encoder", draws, args.enc_steps, args.enc_batch, net, optim, schedule):
        with run.autocast():
            scores = ddp(batch.image)
        label = batch.mask[:, ::s, ::s]                                                 # [D5]
        nll = F.cross_entropy(scores.float(), label, ignore_index=255, reduction="none")
        loss = masked_mean(nll, label != 255)
        optim.zero_grad()
        loss.backward()
        optim.step()
        inside = (label > 0) & (label != 255)
        run.log(step, loss=loss, right=masked_mean((scores.argmax(1) == label).float(), inside))
    return net.backbone.freeze() if args.batch_norm == "frozen" else net.backbone


def train_segmenter(args, run, train_set, pool, backbone):
    """§5.3.3: 1-shot episodes; the backbone is fixed, all other layers learn."""
    def augment(sample, support, rng):
        return AUGMENT[args.baseline](sample, support, args.seg_crop, args.seg_rescale, rng)

    run.reseed("segmenter")
    net = make_scl(args, args.weights, backbone)
    ddp = run.place(net).train()
    optim = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=args.seg_lr,
                            momentum=args.momentum, weight_decay=args.weight_decay)
    draws, steps = Episodes(train_set, pool, augment, args.seed), args.seg_steps
    schedule = poly(steps) if args.baseline == "pfenet" else None
    for step, batch in run.steps("segmenter", draws, steps, 2 * args.seg_batch, net, optim, schedule):
        M_q, M_s = batch.mask[::2], batch.mask[1::2]
        with run.autocast():
            scores = ddp(batch.image, batch.mask)
        used = {"s1": args.s1_loss and "s1" in scores, "s2": args.s2_loss and "s2" in scores, "q": True}
        L = {key: with_inner(scores[key], M_q if key == "q" else M_s, net.stride, args.inner_weight)
             if use else 0.0 for key, use in used.items()}
        loss = eq5_14_total(L["s1"], L["s2"], L["q"])
        optim.zero_grad()
        loss.backward()
        optim.step()
        predicted = eq5_4_predicted_mask(cells_to_pixels(scores["q"][0], net.stride, M_q.shape[1:]))
        run.log(step, loss=loss, **{f"loss_{key}": value for key, value in L.items()},
                iou=iou(predicted, M_q == 1, M_q != 255).mean())
    return net.eval()


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
def network_sized(sample, baseline, size):
    """A picture in the size of training: stretched (CANet), or padded (PFENet).   -> sample, (h, w) within"""
    if baseline == "canet": return resize(sample, (size, size)), (size, size)
    sample = resize_long(sample, size)
    image = window(sample.image, 0, 0, size, MEAN_COLOUR)
    return changed(sample, image=image, mask=window(sample.mask, 0, 0, size, 255)), sample.image.shape[:2]


@inference()
def encode_support(args, net, image, mask, device):
    """One support picture (H,W,3) and its mask (H,W) {0, 1, 255} -> Supports of K = 1"""
    sample = normalise(network_sized(Sample(image=image, mask=mask), args.baseline, args.seg_crop)[0])
    mask = sample.mask[None].to(device)
    middle, high = net.encode(sample.image[None].to(device, memory_format=torch.channels_last))
    F_s, M_s = net.reduce_support(middle).float(), to_cells(mask, net.stride)
    return Supports(net.reduce_query(middle).float(), F_s, net.self_guided(F_s, M_s)[0], mask, high,
                    net.object_high(middle, M_s))


LONGEST = 640                                                                           # [D16]


@inference()
def encode_query(args, net, image, device):
    """A query picture at each test scale -> list of F_q, layer4, size that the network saw, (h, w) within"""
    views, plain = [], Sample(image=image, mask=np.zeros(image.shape[:2], np.uint8))
    if net.single and max(image.shape) > LONGEST: plain = resize_long(plain, LONGEST)
    for scale in args.test_scales:
        if net.single:                                                       # its own size
            inside = [max(32, round(scale * n)) for n in plain.image.shape[:2]]
            x = resize_batch(normalise(plain).image[None].to(device), inside)
        else:
            sample, inside = network_sized(plain, args.baseline, round(scale * args.seg_crop))
            x = normalise(sample).image[None].to(device)
        middle, high = net.encode(x.contiguous(memory_format=torch.channels_last))
        views.append((net.reduce_query(middle).float(), high, x.shape[2:], inside))
    return views


@inference()
def query_scores(net, views, supports, size):
    """G(I_q|I_s^k) for all k in one batch, mean over the scales.   -> (K,2,*size)"""
    K, total = len(supports.V), 0
    for F_q, high, seen, (h, w) in views:
        prior = None if net.single else prior_mask(high.expand(K, -1, -1, -1), supports.object)
        scores = net.eq5_12_query_scores(F_q.expand(K, -1, -1, -1), supports.V, prior)[0]
        total = total + resample(cells_to_pixels(scores, net.stride, seen)[..., :h, :w], size)
    return total / len(views)


def settings(args):
    """{stage without "test_": (shots, fuse)}; 1 shot has nothing to fuse."""
    several = {f"{K}shot_{fuse}": (K, fuse) for K in args.shots if K > 1 for fuse in args.fuse}
    return {**({"1shot": (1, "none")} if 1 in args.shots else {}), **several}


@inference()
def segment(args, net, views, supports, size):
    """{setting: (H,W) bool} for one query; a setting of K shots takes the first K supports."""
    scores, found = query_scores(net, views, supports, size), {}
    for setting, (K, fuse) in settings(args).items():
        U = torch.ones(K, device=scores.device)                                         # [D7]
        if fuse == "cgm":
            first = Supports(*(None if part is None else part[:K] for part in supports))
            U = confidence(net, first, args.cgm_score)
        found[setting] = (eq5_17_fuse(scores[:K], U).argmax(0) == 1).cpu().numpy()
    return found


def counts_of(predicted, mask):
    """Pixels (4,): intersection and union of the class, of the rest.   (H,W) bool, (H,W) {0, 1, 255}"""
    p, t, valid = predicted, mask == 1, mask != 255
    return [int((part & valid).sum()) for part in (p & t, p | t, ~p & ~t, ~p | ~t)]


CHUNK = 50      # episodes a file


def write_test(args, run, net, val_set, episodes):
    """Segments all test episodes; query = support as in Fig. 1.5 is the setting "self". "objects" is no
    prediction but all labelled objects of the query: what an answer that ignores the support could reach.

    Writes test/s<seed>_<first episode>.npz: class (E,), setting (E,4) as counts_of; panels/test.png
    """
    kept = functools.lru_cache(args.cache)                              # one picture at a time: no change
    picture = kept(val_set.__getitem__)
    query_of = kept(lambda i: encode_query(args, net, picture(i).image, run.device))

    @kept
    def support_of(i, k):
        s = picture(i)
        return encode_support(args, net, s.image, class_mask(s.mask, k), run.device)

    def test(k, query, chosen):
        supports, size = together([support_of(i, k) for i in chosen]), picture(query).mask.shape
        found = segment(args, net, query_of(query), supports, size)
        first, size = chosen[0], picture(chosen[0]).mask.shape
        scores = query_scores(net, query_of(first), support_of(first, k), size)
        return {**found, "self": (scores[0].argmax(0) == 1).cpu().numpy()}

    names = [f"s{seed}_{first:05d}" for seed in range(args.test_seeds)
             for first in range(0, args.episodes, CHUNK)]
    with run.timed("test"), run.autocast():
        for (name,) in run.todo(names, "test"):
            seed, first = map(int, name[1:].split("_"))
            counts, panels = {"class": []}, []
            for k, query, *chosen in episodes[seed][first:first + CHUNK].tolist():
                found, q, s = test(k, query, chosen), picture(query), picture(chosen[0])
                found["objects"] = (q.mask > 0) & (q.mask != 255)
                counts["class"].append(k)
                for setting, predicted in found.items():
                    mask = (s if setting == "self" else q).mask
                    counts.setdefault(setting, []).append(counts_of(predicted, class_mask(mask, k)))
                if name == names[0] and len(panels) < 16:
                    labels = [*(found[setting] for setting in settings(args)), q.mask == k]
                    labels = [overlay(q.image, label) for label in labels]
                    panels.append([overlay(s.image, s.mask == k), q.image, *labels])
            if panels:
                titles = ["support", "query", *settings(args), "ground truth"]
                contact_sheet(run.path("panels", "test"), panels, titles)
            save_npz(run.path("test", name, ".npz"), **{key: np.array(rows) for key, rows in counts.items()})


def read_test(folder, number, seed):
    """What write_test has written for one seed's episodes.   -> {"class": (E,), setting: (E,4)}"""
    parts = [np.load(Path(folder) / "test" / f"s{seed}_{first:05d}.npz") for first in range(0, number, CHUNK)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}


def scores_of(classes, counts, weights=None):
    """Intersections and unions summed over all episodes, then IoU in percent.

    classes (E,), counts (E,4), weights (W,E): how often each episode counts -> mIoU over the classes (W,),
    FB-IoU (W,), {class: IoU} of the first row
    """
    weights = np.ones((1, len(classes))) if weights is None else weights
    each = np.unique(classes)
    sums = np.stack([(weights * (classes == k)) @ counts for k in each])                # (C,W,4)
    with np.errstate(invalid="ignore"):
        ious = sums[..., 0] / sums[..., 1]
        total = sums.sum(0)
        fb = (total[:, 0] / total[:, 1] + total[:, 2] / total[:, 3]) / 2
        miou = np.nanmean(ious, axis=0)
    return 100 * miou, 100 * fb, dict(zip(each.tolist(), (100 * ious[:, 0]).tolist()))


def paired_gain(classes, pictures, mine, other, draws=2000):
    """What `mine` gains over `other` in mIoU and FB-IoU, with a 95 % interval: bootstrap over the pictures
    that are segmented, as episodes with the same one do not count for two. Not in it: another training.

    classes, pictures (E,): of each episode; mine, other (E,4) as counts_of
    """
    found, which = np.unique(pictures, return_inverse=True)
    n = len(found)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)[:, which]
    out = {}
    for key, i in (("gain", 0), ("fb_gain", 1)):
        one, many = (scores_of(classes, mine, w)[i] - scores_of(classes, other, w)[i]
                     for w in (None, weights))
        low, high = np.nanpercentile(many, (2.5, 97.5))
        out |= {key: float(one[0]), f"{key}_low": float(low), f"{key}_high": float(high)}
    return out


def joined(tests):
    """The tests of all seeds as one."""
    return {key: np.concatenate([test[key] for test in tests]) for key in tests[0]}


def evaluate_test(args, run, classes, left_out):
    """test_<setting>_s<seed>, their mean test_<setting>, and what CGM gains over the average."""
    tests = [read_test(run.dir, args.episodes, seed) for seed in range(args.test_seeds)]
    speed = dict(test_episodes_per_s=args.episodes * len(tests) / max(run.seconds("test"), 1e-9))
    if "segmenter" not in run.results.get("reused", {}):
        speed["train_episodes_per_s"] = args.seg_steps * args.seg_batch / max(run.seconds("segmenter"), 1e-9)
    seconds = round(sum(map(run.seconds, ("encoder", "segmenter", "test"))), 1)
    every, listed = joined(tests), read_json(run.path("episodes", "test", ".json"))
    queries = np.array([row[1] for rows in listed for row in rows])
    for K in args.shots if {"average", "cgm"} <= {*args.fuse} else ():
        if K > 1:
            gain = paired_gain(every["class"], queries, every[f"{K}shot_cgm"], every[f"{K}shot_average"])
            run.result(f"test_{K}shot_cgm_gain", shots=K, episodes=len(every["class"]), fold=args.fold,
                       uses_masks=True, **gain)
    if "objects" in every:
        miou, fb, each = scores_of(every["class"], every["objects"])
        run.result("test_objects", split="val", fold=args.fold, episodes=args.episodes, uses_masks=True,
                   miou=float(miou[0]), fb_iou=float(fb[0]),
                   iou={classes[k - 1]: value for k, value in each.items()})
    for setting, (K, fuse) in {**settings(args), "self": (1, "none")}.items():      # self: last
        rows, known = [], dict(
            split="val", shots=K, fold=args.fold, baseline=args.baseline, guide=args.guide, fuse=fuse,
            scales=args.test_scales, episodes=args.episodes, left_out=left_out, crf=False, uses_masks=True,
            seconds=seconds)
        for seed, test in enumerate(tests):
            miou, fb, each = scores_of(test["class"], test[setting])
            rows.append((miou[0], fb[0]))
            run.result(f"test_{setting}_s{seed}", **known, episode_seed=seed, miou=float(miou[0]),
                       fb_iou=float(fb[0]), iou={classes[k - 1]: value for k, value in each.items()})
        (miou, fb), (miou_std, fb_std) = np.mean(rows, axis=0).tolist(), np.std(rows, axis=0).tolist()
        run.result(f"test_{setting}", **known, seeds=len(tests), miou=miou, fb_iou=fb, miou_std=miou_std,
                   fb_iou_std=fb_std, **speed)


def compare_runs(args):
    """--compare A B: what B gains over A in each setting, on the same episodes.   Writes <B>/compare.json"""
    if len(args.compare) != 2: raise UserError("--compare: give two run folders")
    tests, drawn = [], []
    for folder in args.compare:
        made, listed = (read_json(Path(folder) / name) for name in ("args.json", "episodes/test.json"))
        done = read_json(Path(folder) / "results.json", {"stages": []})["stages"]
        if not listed or not any(entry["stage"] == "test_self" for entry in done):
            raise UserError(f"--compare {folder}: not the folder of a finished run of scl.py")
        seeds = range(made["test_seeds"])
        tests.append(joined([read_test(folder, made["episodes"], seed) for seed in seeds]))
        drawn.append((made["data"], [row[:3] for rows in listed for row in rows]))
    if drawn[0] != drawn[1]: raise UserError("--compare: these two runs were not tested on the same episodes")
    a, b = tests
    _, query, support = np.array(drawn[0][1]).T
    gains = {key: paired_gain(a["class"], support if key == "self" else query, b[key], a[key])
             for key in b if key in a and key not in ("class", "objects")}
    for key, gain in gains.items():
        print(f"{key:>16}  mIoU {gain['gain']:+.2f} [{gain['gain_low']:+.2f}, {gain['gain_high']:+.2f}]   "
              f"FB-IoU {gain['fb_gain']:+.2f} [{gain['fb_gain_low']:+.2f}, {gain['fb_gain_high']:+.2f}]")
    write_json(Path(args.compare[1]) / "compare.json", {"over": args.compare[0], **gains})


def support_mask(path, image):
    """A user's mask: 0 = background, one other value = the class; 255 beside that one = no label."""
    mask = read_label(path, None, image)
    values = np.setdiff1d(mask, 0)
    if len(values) > 1: values = np.setdiff1d(values, 255)
    if len(values) != 1:
        what = f"holds {len(values)} values beside 0 and 255" if len(values) else "is empty"
        raise UserError(f"support mask {path} {what}; save background as 0 and the object as one value")
    return np.where(mask == values[0], 1, np.where(mask == 255, 255, 0)).astype(np.uint8)


def predict_folder(args):
    """--predict: masks (0, 1) and overlays of a picture or a folder, guided by the user's support pictures.

    --fuse (the last one named) and --cgm-score count; test scales and refinements are the checkpoint's.
    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    state, _ = read_predictor(args, Args, "segmenter.pt", "reduce_query.0.weight")
    if not args.support_images or len(args.support_images) != len(args.support_masks):
        raise UserError(f"--predict needs --support-images and as many --support-masks; there are "
                        f"{len(args.support_images)} and {len(args.support_masks)}")
    device, made = start_processes(args.device), Args(**{"share_compare": False, **state["args"]})
    net, found = with_weights(make_scl(made, "none"), state, device), []
    for image, path in zip(map(read_image, args.support_images), args.support_masks):
        found.append(encode_support(made, net, image, support_mask(path, image), device))
        if not (found[-1].mask == 1).any():
            raise UserError(f"support mask {path} is empty at {made.seg_crop} pixels, the network's size; "
                            "give a picture that shows more of the class")
    supports, U = together(found), torch.ones(len(found), device=device)                # [D7]
    if len(found) > 1 and args.fuse[-1:] != ("average",):
        U = confidence(net, supports, args.cgm_score)
    for image, path in pictures_to_predict(args):
        scores = query_scores(net, encode_query(made, net, image, device), supports, image.shape[:2])
        save_prediction(path, image, (eq5_17_fuse(scores, U).argmax(0) == 1).cpu().numpy())


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def settle_scl(args):
    """Fields that are left open get their values; what would else fail after hours fails now."""
    own = {**OWN[args.baseline], **OWN.get(f"{args.baseline}-{args.data}", {})}
    for name, value in own.items():
        if not getattr(args, name): setattr(args, name, value)
    if not 0 <= args.fold < 4: raise UserError(f"--fold {args.fold}: give 0, 1, 2 or 3")
    if not args.shots or min(args.shots) < 1 or not args.fuse or min(args.episodes, args.test_seeds) < 1:
        raise UserError("--shots, --episodes, --test-seeds: give numbers from 1; --fuse: average, cgm")
    if args.min_area < 1:
        raise UserError(f"--min-area {args.min_area}: give 1 or more")
    if args.support_images or args.support_masks:
        raise UserError("--support-images, --support-masks: only with --predict")
    make_scl(args, args.weights)                                             # wrong weights: now


def main():
    """Training by §5.3.3, then §5.4.2's test episodes; --compare: what one run gains over another."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    if args.compare:
        return compare_runs(args)
    if args.predict:
        return predict_folder(args)
    train_set, val_set = (load(args, split, fields=("mask",)) for split in ("train", "val"))
    start_processes(args.device)
    settle_scl(args)
    run = Run(args, FIELDS)
    pools, left_out = make_pools(args, run, train_set, val_set)
    start = pretrained(args.backbone, args.weights)
    backbone = None if start else train_encoder(args, run, train_set, pools[0])
    net = train_segmenter(args, run, train_set, pools[0], backbone)               # Eqs. (5.1)–(5.14)
    episodes = [draw_episodes(pools[1], args.episodes, max(args.shots), seed)
                for seed in range(args.test_seeds)]
    if rank() == 0:
        write_json(run.path("episodes", "test", ".json"), [rows.tolist() for rows in episodes])
    barrier()
    write_test(args, run, net, val_set, episodes)                                       # Eqs. (5.15)–(5.17)
    if not run.has("test_self"): evaluate_test(args, run, train_set.classes, left_out)
    run.table()


if __name__ == "__main__":
    main()
