"""LPG: Learning Class-Agnostic Pseudo Mask Generation for Box-Supervised Semantic Segmentation.
C. Xie, D. Ren, L. Wang, W. Zuo; arXiv:2103.05463, IEEE TMM. Equation numbers: the paper's.

Two data sets: the target has boxes only; the auxiliary one has boxes and masks, of other classes. On the
auxiliary set a generator learns to make a class's mask from image, boxes and the segmentation network's
probability; it never learns which class it is, and so works on the target's classes too.

Symbols      x image · y^b boxes of one class, filled · y^p mask, ŷ^p pseudo mask · f segmentation network,
             θ its weights · g generator, ω its weights · p softmax of g's two channels · ψ its arg-max
Equations    (1) eq1_latent_segmentation    (2) eq2_4_cross_entropy    (3) eq3_generate
             (4) eq2_4_cross_entropy    (5, 6) eq5_6_generator_loss    (7) eq7_fuse
Figures      Fig. 1 = learn_generators; Fig. 2 = the loop of main; Fig. 3 = panels/train.png
Commands     python lpg.py                              # embedded shapes, made for two CPU cores
             python lpg.py --data voc --root data/voc --aux coco --aux-root data/coco    # paper: 68.4 val
             python lpg.py --data voc --backbone resnet101 --out runs/lpg-r101           # paper: 73.3 val
             python lpg.py --data voc --supervision semi                                 # paper: 68.7 val
             python lpg.py --data voc --backbone resnet101 --generator runs/lpg-voc-box-s0/generators.pt \
                 --out runs/lpg-r101-vgg                                                 # paper: 72.9 val
             python lpg.py --data coco --classes not-voc --aux voc --aux-root data/voc   # Table VII, LPG_voc
             python lpg.py --data coco --classes not-voc --generator runs/lpg-voc-box-s0/generators.pt \
                 --out runs/lpg-coco                                                     # Table VII, LPG_coco
             python lpg.py --generator-fixed --reuse runs/lpg-shapes-box-s0 --out runs/lpg-fixed    # Table II
             python lpg.py --predict photos/ --checkpoint runs/lpg-voc-box-s0/segmenter_3.pt
Departures   [D1] g sees RGB by ImageNet's mean and deviation; authors' code: BGR minus the mean
             [D2] losses of f and g at the label's resolution, scores enlarged; authors' code: labels reduced
                  to 41² cells for f, to every fourth pixel for g
             [D3] an item for g is an image and one of its classes, drawn at random (paper silent)
             [D4] the rate of g decays with each step; authors' code: every 50 steps
             [D5] first stage: f learned on filled boxes (text); authors' code: no f (--first-stage none).
                  Here that is a channel of zeros in the same network, and not for --generator-fixed, whose
                  generator was trained with f
             [D6] where filled boxes of several classes overlap, the smaller box wins (paper silent)
             [D7] equal overlap rates: the class listed first (paper silent)
             [D8] LargeFOV starts from VGG16, its fc6 and fc7 thinned out as by DeepLab; the authors' file
                  init_deeplab_largeFOV is not needed. DeepLab-ResNet101 without its multi-scale training
             [D9] ASPP's weights learn; in the authors' script they do not, by a misspelt filter. Its
                  ResNet101 trains its batch norm and has no max-pooling (stride 4); here both are ImageNet's,
                  stride 8. g sees whole images padded to what its levels need; authors': to 512 or 640
             [D10] ResNet generators (Table II): output stride 8 and a 1x1 layer, from nothing (paper silent;
                  so they have the paper's number of weights)
             [D11] CRF on boxes: WSSL's Bbox-Seg, the middle fifth of a box is certain; the paper cites WSSL
             [D12] --supervision full: ground truth in each stage, so that the upper bound has the same steps
             [D13] f at a single scale, no mirror image, for labels and for val (paper silent)
             [D14] f is not trained on the auxiliary set after the last E-step: no generator would see it
             [D15] presets: g smaller, on smaller images, at a larger rate; networks without pretrained
                  weights learn x1 in their last layer
             [D16] CRF on the last stage's val predictions alone, as val_crf; val_1 … val_N are without (the
                  paper does not say which of its numbers have one)
             [D17] auxiliary pixels that are 255 in their mask (COCO's crowds, VOC's borders) are 255 in f's
                  labels; a picture without boxes (crowds alone) is no item for g (paper silent)
             [D18] weight decay on f's biases too; DeepLab's published recipe, which the paper follows, has
                  none on them (decay_mult 0). What the authors' code does is not settled
"""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet

from common import (
    ASPP, CRF, DeepLab, LargeFOVVGG, Run, UserError, cells_to_pixels, confusion_of, dense_crf, distribute,
    draw_panels, imagenet_weights, inference, load_exactly, make_backbone, parse_args, pictures_to_predict,
    plain_fields, poly, pretrained, rank, read_predictor, read_state, reduce, save_checkpoint, save_label,
    save_npz, save_prediction, start_processes, with_weights, world)
from data import (
    Draws, Sample, changed, chosen_classes, coco_name, crop, flip, join, load, normalise, read_label,
    rescale, select, voc_root, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco", "workpiece"] = "shapes"
    """target data set; shapes is drawn on the fly, workpiece is any folder of your own"""
    supervision: Literal["box", "semi", "full"] = "box"
    """what the target's training set may reveal; semi = boxes and some masks (--semi-masks); full = the same
    network on ground truth (upper bound) [D12]"""
    backbone: Literal["tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2"] = "vgg16"
    """segmentation network f: vgg16 = DeepLab-LargeFOV, resnet101 = DeepLab-ResNet101 (Table I)"""
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
    # --- data sets (§IV-A) ---
    classes: str = ""
    """classes of the target: all, or numbers and names: 1-10,cat; not-voc = all but VOC's 20. Pictures that
    show none of them are left out, in val too"""
    aux: str = ""
    """auxiliary data sets, comma-separated; default: coco for voc, voc for coco, shapes-aux for shapes. Their
    list is --train-list, or train where that is a file of names"""
    aux_root: str = ""
    """their folders, comma-separated; default data/<name>"""
    aux_classes: str = ""
    """classes of the auxiliary set, as --classes; default: all that the target does not have"""
    aux_fraction: float = 1.0
    """Table VI: share of the auxiliary pictures, 0.75, 0.5, 0.25 (85, 60, 30 % of the masks)"""
    semi_masks: str = "train"
    """--supervision semi: a list as --train-list whose pictures show masks (VOC: 1,464), or a share, 0.14"""
    # --- generator (§III-B, Table II) ---
    generator_net: Literal["hourglass", "resnet18", "resnet101"] = "hourglass"
    """architecture of g (Table II) [D10]"""
    hg_dims: tuple[int, ...] = (96, 96, 128, 128, 128, 192)
    """Hourglass: channels of each level (authors' code)"""
    hg_modules: tuple[int, ...] = (2, 2, 2, 2, 2, 4)
    """Hourglass: residual blocks of each level (authors' code)"""
    hg_features: int = 256
    """Hourglass: channels before the head (authors' code)"""
    gen_steps: int = 100_000
    """Table I, each stage"""
    gen_batch: int = 32
    """Table I: images a step, over all processes"""
    gen_lr: float = 1e-4
    """Table I; Adam; poly 0.9"""
    gen_weight_decay: float = 5e-4
    """authors' code"""
    gen_crop: int = 512
    """pixels; a multiple of what g needs, 128 for the Hourglass (authors' code)"""
    gen_rescale: tuple[float, float] = (0.5, 1.5)
    """range of the random scale (authors' code)"""
    gen_scale: float = 1.0
    """g sees all images this much smaller, and its scores are enlarged [D15]"""
    # --- EM (§III-B, §III-C) ---
    stages: int = 3
    """§IV-B: three or four"""
    first_stage: Literal["box", "none"] = "box"
    """what the first generator sees of f: f learned on filled boxes, or nothing [D5]"""
    generator_fixed: bool = False
    """HgNet (Fixed) of Table II: the last generator in all stages of the target"""
    generator: str = ""
    """generators.pt of another run (Table VIII, LPG'): no auxiliary data set"""
    overlap: Literal["rate", "first"] = "rate"
    """§III-D where classes overlap: the higher overlap rate, or the class listed first (authors' code)"""
    # --- segmentation network (Table I) ---
    seg_stride: int = 8
    """output stride of the segmentation network"""
    large_fov: int = 12
    """dilation of LargeFOV's fc6, for vgg16"""
    seg_rates: tuple[int, ...] = (6, 12, 18, 24)
    """dilations of DeepLab-v2's ASPP, for all others"""
    seg_steps: int = 0
    """each stage; 0 = Table I: 20,000 for vgg16, else 40,000"""
    seg_batch: int = 0
    """images a step, over all processes; 0 = Table I: 30 for vgg16, else 10"""
    seg_lr: float = 0
    """weights; biases x2, the last layer x10 and x20; 0 = Table I: 1e-3 for vgg16, else 2.5e-4; poly 0.9"""
    seg_crop: int = 321
    """pixels"""
    seg_rescale: tuple[float, float] = (0.5, 1.5)
    """range of the random scale (DeepLab's)"""
    momentum: float = 0.9
    """DeepLab's"""
    weight_decay: float = 5e-4
    """DeepLab's"""
    seg_crf: CRF = CRF(0, 0, 0, 0, 0, 0)
    """Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations; 0 = authors' code: 3 3 140 5 5 10
    for vgg16, else 1 3 67 3 4 10"""
    # --- what pseudo masks are compared with (Table III) ---
    label_crf: CRF = CRF(3, 3, 140, 5, 5, 10)
    """dense CRF on the boxes [D11]"""
    box_centre: float = 0.2
    """share of a box's area, in its middle, that is certainly its class (WSSL) [D11]"""
    grabcut_steps: int = 5
    """iterations of GrabCut, which runs on all training pictures; 0 = without it"""
    probe: int = 200
    """training pictures on which the last generator also runs with a probability channel of zeros"""


# Table I and the authors' CRF, for fields that are 0.
TABLE_I = {True: dict(seg_steps=20_000, seg_batch=30, seg_lr=1e-3, seg_crf=CRF(3, 3, 140, 5, 5, 10)),
           False: dict(seg_steps=40_000, seg_batch=10, seg_lr=2.5e-4, seg_crf=CRF(1, 3, 67, 3, 4, 10))}
AUXILIARY = {"shapes": "shapes-aux", "voc": "coco", "coco": "voc"}
# What two CPU cores do in minutes; everything else as the paper.
SHAPES = dict(
    backbone="tiny", weights="none", semi_masks="0.14", seg_stride=4, seg_rates=(3, 6, 9, 12),
    hg_dims=(32, 32, 48, 48, 64, 96), hg_modules=(1, 1, 1, 1, 1, 2), hg_features=64,    # [D15]
    gen_steps=300, gen_batch=8, gen_lr=1e-3, gen_crop=128, gen_rescale=(0.75, 1.25),
    seg_steps=600, seg_batch=8, seg_lr=0.02, seg_crop=96, seg_rescale=(0.75, 1.25))
# A few hundred photographs with a small pretrained backbone on two CPU cores.
PHOTOS = dict(
    backbone="mobilenet_v2", train_list="train", semi_masks="0.14", seg_stride=16, seg_rates=(3, 6, 9, 12),
    hg_dims=(48, 48, 64, 64, 64, 96), hg_features=128, gen_scale=0.5,                   # [D15]
    gen_steps=600, gen_batch=8, gen_lr=5e-4, gen_crop=256, gen_rescale=(0.75, 1.5),
    seg_steps=300, seg_batch=8, seg_lr=1e-4, seg_crop=257)

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "pseudo_crf": "data root train_list classes seed crf label_crf box_centre",
    "pseudo_grabcut": "grabcut_steps",
    "aux_segmenter_0": "amp weights aux aux_root aux_classes aux_fraction first_stage backbone seg_stride "
                       "large_fov seg_rates seg_steps seg_batch seg_lr seg_crop seg_rescale momentum "
                       "weight_decay",
    "aux_prob_1": "",
    "generator_1": "generator_net hg_dims hg_modules hg_features gen_steps gen_batch gen_lr gen_weight_decay "
                   "gen_crop gen_rescale gen_scale",
    "aux_pseudo_1": "overlap",
    "aux_segmenter_1": "",
    **{f"{part}_{n}": "" for n in range(2, 10)
       for part in ("aux_prob", "generator", "aux_pseudo", "aux_segmenter")},
    "segmenter_0": "supervision semi_masks",
    "pseudo_1": "generator generator_fixed stages",
    "segmenter_1": "",
    **{f"{part}_{n}": "" for n in range(2, 10) for part in ("pseudo", "segmenter")},
}.items()}


# ── Networks: the generator g (§III-B, Table II) ────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def residual(inputs, outputs, stride=1):
    """Two 3x3 convolutions with batch norm and a shortcut."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    same = inputs == outputs and stride == 1
    return resnet.BasicBlock(inputs, outputs, stride, None if same else shortcut)


def repeated(channels, number):
    """That many residual blocks, one after the other."""
    return nn.Sequential(*(residual(channels, channels) for _ in range(number)))


class Level(nn.Module):
    """One level of the Hourglass and all below it.   (B,dims[0],h,w) -> the same

    dims, modules: channels and residual blocks of this level and of those below. h and w: multiples of
    2^(levels − 1), levels = len(dims).
    """

    def __init__(self, dims, modules):
        super().__init__()
        (here, below), number = dims[:2], modules[0]
        self.skip = repeated(here, number)
        self.down = nn.Sequential(residual(here, below, 2), *repeated(below, number - 1))
        self.inner = Level(dims[1:], modules[1:]) if len(dims) > 2 else repeated(below, modules[-1])
        self.up = nn.Sequential(*repeated(below, number - 1), residual(below, here))

    def forward(self, x):
        low = self.up(self.inner(self.down(x)))
        return self.skip(x) + F.interpolate(low, scale_factor=2, mode="nearest")


class Hourglass(nn.Module):
    """One stack.   (B,5,H,W), H and W multiples of .multiple -> logits (B,2,H/4,W/4); 12.1 M weights"""

    def __init__(self, dims, modules, features):
        super().__init__()
        wide, self.multiple = dims[0], 4 * 2 ** (len(dims) - 1)
        self.stem = nn.Sequential(nn.Conv2d(5, wide // 2, 7, 2, 3, bias=False), nn.BatchNorm2d(wide // 2),
                                  nn.ReLU(), residual(wide // 2, wide, 2))
        self.levels = Level(dims, modules)
        self.features = nn.Sequential(nn.Conv2d(wide, features, 3, padding=1, bias=False),
                                      nn.BatchNorm2d(features), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(features, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, 2, 1))

    def forward(self, x):
        return self.head(self.features(self.levels(self.stem(x)))).float()


class ResNetGenerator(nn.Module):
    """ResNet-18 or ResNet-101 of Table II.   (B,5,H,W) -> logits (B,2,H/8,W/8)   [D10]"""

    def __init__(self, name):
        super().__init__()
        self.backbone, self.multiple = make_backbone(name, "none", 8, frozen_bn=False), 8
        self.backbone.blocks[0][0] = nn.Conv2d(5, 64, 7, 2, 3, bias=False)
        self.head = nn.Conv2d(self.backbone.channels[-1], 2, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[-1]).float()


def make_generator(kind, dims, modules, features):
    if kind != "hourglass":
        return ResNetGenerator(kind)
    if len(dims) != len(modules) or len(dims) < 2:
        raise UserError(f"--hg-dims {dims} and --hg-modules {modules}: give as many of both, two or more")
    return Hourglass(dims, modules, features)


def eq3_generate(g, x, y_b, f):
    """Eq. (3): logits of g(y^b, x, f(x;θ'); ω), one class an item.

    x (B,3,H,W) [D1], y_b (B,H,W) in {0,1}, f (B,H,W) the class's probability -> (B,2,h,w): background, object
    """
    return g(torch.cat([x, y_b[:, None].to(x.dtype), f[:, None].to(x.dtype)], 1))


def eq5_6_generator_loss(logits, y_p):
    """Eqs. (5), (6): L(y^p, g(…)), cross-entropy with the true mask. (5) asks it of the f that learned g's
    masks; (6) puts g in that f's place.

    logits (B,2,h,w); y_p (B,H,W): 1 = the class, 0 = not, 255 = no label   [D2]
    """
    return eq2_4_cross_entropy(resample(logits.float(), y_p.shape[-2:]), y_p)


def eq7_fuse(p, y_b, classes, rule="rate"):
    """Eq. (7): y^p = Σ_i C_i × y^{b_i} • ψ(p_i); classes that claim a pixel are ranked by §III-D.

    p (n,2,H,W), y_b (n,H,W), classes (n,) in the order of the boxes -> (H,W) uint8.
    rule rate: of two classes that share a region, the one with the higher region ÷ its own predicted area, so
    the smaller prediction; first: the one listed first, which is also what equal rates give.   [D7]
    """
    masks = (y_b > 0) & (p.argmax(1) == 1)                      # (n,H,W)
    area = masks.flatten(1).sum(1).tolist()
    last_first = reversed(range(len(classes)))                  # painted last = on top
    order = sorted(last_first, key=lambda i: -area[i]) if rule == "rate" else last_first
    label = np.zeros(masks.shape[1:], np.uint8)
    for i in order:
        label[masks[i].cpu().numpy()] = classes[i]
    return label


# ── Segmentation network f, its losses and labels (Eqs. 1, 2, 4) ────────────────────────────────────────────
def make_deeplab(backbone, weights, stride, large_fov, rates, classes):
    """DeepLab-LargeFOV for VGG16, else DeepLab-v2 with ASPP.   [D8]"""
    net = make_backbone(backbone, weights, stride, pretrained(backbone, weights))
    if backbone != "vgg16":
        return DeepLab(net, ASPP(net.channels[-1], classes + 1, rates))
    head = LargeFOVVGG(net.channels[-1], classes + 1, large_fov)
    if weights != "none":                                       # 7x7, 4096 -> 3x3, 1024 channels
        state = imagenet_weights("vgg16") if weights == "imagenet" else read_state(weights)
        missing = [key for key in (f"classifier.{i}.{part}" for i in (0, 3) for part in ("weight", "bias"))
                   if key not in state]
        if missing:
            raise UserError(f"weights {weights} have no {', '.join(missing)}, where fc6 and fc7 start from; "
                            "give torchvision's whole vgg16, or --weights imagenet")
        fc6, fc7 = (state[f"classifier.{i}.weight"][::4] for i in (0, 3))
        fc6, fc7 = fc6.view(1024, 512, 7, 7)[:, :, ::3, ::3], fc7[:, ::4, None, None]
        head[2].load_state_dict({"weight": fc6, "bias": state["classifier.0.bias"][::4]})
        head[5].load_state_dict({"weight": fc7, "bias": state["classifier.3.bias"][::4]})
    return DeepLab(net, head)


def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq2_4_cross_entropy(logits, label):
    """Eqs. (2), (4): L(ŷ^p, f(x;θ)), mean over the pixels with a label.   [D2]

    logits (B,C,H,W), label (B,H,W), 255 = none
    """
    return masked_mean(F.cross_entropy(logits, label, ignore_index=255, reduction="none"), label != 255)


def eq1_latent_segmentation(prob, y_b, classes):
    """Eq. (1): arg-max over y^p of log P(y^b|y^p) − L(y^p, f): each pixel's best class among those whose
    boxes hold it, and background. WSSL's E-step, what f alone says; a control here.

    prob (K+1,H,W), y_b (n,H,W), classes (n,) -> (H,W) uint8
    """
    score = torch.cat([prob[:1], prob[classes] * y_b])          # P(y^b|y^p) = 0 outside the class's boxes
    return np.array([0, *classes], np.uint8)[score.argmax(0).cpu().numpy()]


@inference()
def class_scores(net, image, device):
    """Logits of the whole image.   [D13]   image (H,W,3) uint8 -> (1,K+1,h,w) float32"""
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    return net(x).float()


# ── Boxes (§III): arrays in, arrays out ─────────────────────────────────────────────────────────────────────
def pixel_box(box, H, W):
    """[c, x0, y0, x1, y1] floats -> class, slices of rows and columns in the image; at least one pixel."""
    c, x0, y0, x1, y1 = box
    x0, y0 = max(0, min(int(np.floor(x0)), W - 1)), max(0, min(int(np.floor(y0)), H - 1))
    x1, y1 = min(W, max(int(np.ceil(x1)), x0 + 1)), min(H, max(int(np.ceil(y1)), y0 + 1))
    return int(c), slice(y0, y1), slice(x0, x1)


def box_maps(boxes, H, W):
    """y^b of each class.   boxes (M,5) -> classes in the order of the boxes, (n,H,W) float32 of 0 and 1"""
    classes = list(dict.fromkeys(int(c) for c in boxes[:, 0]))
    maps = np.zeros((len(classes), H, W), np.float32)
    for box in boxes:
        c, rows, columns = pixel_box(box, H, W)
        maps[classes.index(c), rows, columns] = 1
    return classes, maps


def by_area(boxes):
    """Boxes in falling order of area.   [D6]"""
    return boxes[np.argsort(-np.prod(boxes[:, 3:5] - boxes[:, 1:3], axis=1), kind="stable")]


def filled_boxes(boxes, H, W):
    """The first ŷ^p: classes fill their boxes.   [D6]   (M,5) -> (H,W) uint8"""
    label = np.zeros((H, W), np.uint8)
    for box in by_area(boxes):
        c, rows, columns = pixel_box(box, H, W)
        label[rows, columns] = c
    return label


def box_unaries(boxes, centre, H, W):
    """WSSL's Bbox-Seg: background outside all boxes, a class in the middle of its box, even between.   [D11]

    -> classes (n,), probabilities (n+1,H,W), background first
    """
    classes, maps = box_maps(boxes, H, W)
    prob = np.concatenate([np.ones((1, H, W), np.float32), maps])
    for box in by_area(boxes):
        c, x0, y0, x1, y1 = box
        dx, dy = (1 - centre ** 0.5) / 2 * (x1 - x0), (1 - centre ** 0.5) / 2 * (y1 - y0)
        _, rows, columns = pixel_box((c, x0 + dx, y0 + dy, x1 - dx, y1 - dy), H, W)
        prob[:, rows, columns] = 0
        prob[1 + classes.index(int(c)), rows, columns] = 1
    return classes, prob / prob.sum(0)


def grabcut_label(image, boxes, steps):
    """GrabCut in each box, the smaller mask on top; the whole box where it finds nothing.   -> (H,W) uint8"""
    import cv2

    label, found = np.zeros(image.shape[:2], np.uint8), []
    for box in boxes:
        c, rows, columns = pixel_box(box, *label.shape)
        state = np.full(label.shape, cv2.GC_BGD, np.uint8)
        state[rows, columns] = cv2.GC_PR_FGD
        mask = state == cv2.GC_PR_FGD
        if not mask.all() and mask.sum() >= 16:
            cv2.setRNGSeed(0)
            cv2.grabCut(np.ascontiguousarray(image[..., ::-1]), state, None, np.zeros((1, 65)),
                        np.zeros((1, 65)), steps, cv2.GC_INIT_WITH_MASK)
            cut = mask & ((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD))
            mask = cut if cut.any() else mask
        found.append((c, mask))
    for c, mask in sorted(found, key=lambda pair: -pair[1].sum()):
        label[mask] = c
    return label


@inference()
def pseudo_masks(g, net, sample, rule, scale, device, blind=False):
    """Eqs. (1), (3), (7): labels of one image from its boxes.   -> by g, and by f alone: (H,W) uint8 each

    net None: without f. blind: g's probability channel is zero. scale: of the image that g sees.
    """
    H, W = sample.image.shape[:2]
    classes, y_b = box_maps(sample.boxes, H, W)
    if not classes:
        return np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    y_b = torch.from_numpy(y_b).to(device)
    small = rescale(sample, scale)
    size = small.image.shape[:2]
    x = normalise(Sample(image=small.image)).image.to(device).expand(len(classes), -1, -1, -1)
    f, alone = torch.zeros(len(classes), *size, device=device), filled_boxes(sample.boxes, H, W)
    if net is not None:
        prob, stride = class_scores(net, sample.image, device).softmax(1), net.backbone.strides[-1]
        alone = eq1_latent_segmentation(cells_to_pixels(prob, stride, (H, W))[0], y_b, classes)
        f = cells_to_pixels(prob[:, classes], stride, size, (H, W))[0] * (not blind)
    boxes = torch.from_numpy(box_maps(small.boxes, *size)[1]).to(device)
    below, right = (-n % g.multiple for n in size)              # padding: the mean colour, outside all boxes
    logits = eq3_generate(g, *(F.pad(t, (0, right, 0, below)) for t in (x, boxes, f)))
    logits = resample(logits, (size[0] + below, size[1] + right))[..., :size[0], :size[1]]
    return eq7_fuse(resample(logits, (H, W)).softmax(1), y_b, classes, rule), alone


# ── Training (Table I) ──────────────────────────────────────────────────────────────────────────────────────
def group_rates(net, new_layers, lr, weight_decay):
    """Optimiser groups of the PSA family: backbone weights x1, biases x2, new layers x10, biases x20."""
    new = {id(p) for layer in new_layers for p in layer.parameters()}
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            factor = (10 if id(p) in new else 1) * (2 if name.endswith("bias") else 1)
            groups.setdefault(factor, []).append(p)
    return [{"params": params, "lr": lr * factor, "weight_decay": weight_decay}
            for factor, params in groups.items()]


def train_segmenter(args, run, stage, dataset, folder, number, net=None):
    """M-step, Eqs. (2), (4): f on the labels of `folder`, on ground truth where that is "".

    number: of the stage, for the draws; net: of the stage before, which is trained on
    """
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.seg_crop, rng))

    run.reseed(stage)
    if net is None:
        net = make_deeplab(args.backbone, args.weights, args.seg_stride, args.large_fov, args.seg_rates,
                           len(dataset.classes))
    ddp, stride = run.place(net).train(), net.backbone.strides[-1]
    last = net.head[-1] if args.backbone == "vgg16" else net.head
    new_layers = [last] if pretrained(args.backbone, args.weights) else []              # [D15]
    optim = torch.optim.SGD(group_rates(net, new_layers, args.seg_lr, args.weight_decay),
                            lr=args.seg_lr, momentum=args.momentum)                     # [D9] [D18]
    labelled = with_labels(dataset, pseudo=run.dir / folder) if folder else dataset
    draws, schedule = Draws(labelled, augment, 1000 * args.seed + number), poly(args.seg_steps)
    for step, batch in run.steps(stage, draws, args.seg_steps, args.seg_batch, net, optim, schedule):
        label = batch.pseudo if folder else batch.mask
        with run.autocast():
            logits = ddp(batch.image)
        logits = cells_to_pixels(logits.float(), stride, label.shape[-2:])
        loss = eq2_4_cross_entropy(logits, label)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, known=(label != 255).float().mean(), background=(label == 0).float().mean())
    return net.eval()


def write_probs(run, folder, dataset, net):
    """f's probability of each image's classes, on f's grid.   Writes <folder>/*.npz"""
    with run.timed(folder):
        for (name,) in run.todo(dataset.names, folder, stage=folder):
            sample = dataset[dataset.index(name)]
            classes = np.unique(sample.boxes[:, 0]).astype(int)
            with run.autocast():                                # as in write_pseudo_masks
                scores = class_scores(net, sample.image, run.device)
            prob = scores.float().softmax(1)[0, classes]
            save_npz(run.path(folder, name, ".npz"), classes=classes, prob=prob.half().cpu().numpy(),
                     stride=net.backbone.strides[-1])


def read_prob(path, c, size):
    """Class c's probability at `size` as a label map: (H,W) uint8, 254 = 1"""
    with np.load(path) as file:
        prob = torch.from_numpy(file["prob"][file["classes"] == c][None]).float()
        prob = cells_to_pixels(prob, int(file["stride"]), size)[0, 0]
    return (254 * prob).round().clamp(0, 254).byte().numpy()


class WithBoxes(torch.utils.data.Dataset):
    """Of a picture without boxes, such as COCO's of crowds alone, the next one that has some."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        for place in range(i, i + len(self)):
            sample = self.dataset[place % len(self)]
            if len(sample.boxes): return sample
        raise UserError("no auxiliary picture has a box; choose others by --aux and --aux-classes")


def generator_augment(args, folder):
    """An image and one of its classes [D3]: mask = y^p, pseudo = y^b, seed = f's probability, 254 = 1.

    folder: f's probabilities, None = without. Padding is background (authors' code).
    """
    def augment(sample, rng):
        seen, c = np.zeros(sample.image.shape[:2], np.uint8), int(rng.choice(np.unique(sample.boxes[:, 0])))
        if folder:
            seen = read_prob(folder / f"{sample.name}.npz", c, seen.shape)
        s = changed(sample, seed=seen, boxes=sample.boxes[sample.boxes[:, 0] == c])
        s = rescale(s, args.gen_scale * rng.uniform(*args.gen_rescale))
        s = crop(flip(s) if rng.random() < 0.5 else s, args.gen_crop, rng)
        inside = s.seed != 255
        target = np.where(s.mask == 255, 255, s.mask == c)
        y_b = box_maps(s.boxes, *inside.shape)[1].sum(0)        # of one class, or of none
        return normalise(Sample(
            name=s.name, image=s.image, tags=s.tags, pseudo=y_b.astype(np.uint8), seed=s.seed * inside,
            mask=(target * inside).astype(np.uint8)))
    return augment


def train_generator(args, run, number, aux_set, folder, g=None):
    """E-step, Eqs. (5), (6): g against the auxiliary masks; it goes on from the stage before."""
    stage = f"generator_{number}"
    run.reseed(stage)
    if g is None:
        g = make_generator(args.generator_net, args.hg_dims, args.hg_modules, args.hg_features)
    ddp = distribute(g.to(run.device)).train()                  # channels last crashed torch 2.15 on a CPU
    optim = torch.optim.Adam(g.parameters(), lr=args.gen_lr, betas=(0.9, 0.999),
                             weight_decay=args.gen_weight_decay)
    augment = generator_augment(args, run.dir / folder if folder else None)
    draws = Draws(WithBoxes(aux_set), augment, 1000 * args.seed + 100 + number)
    schedule = poly(args.gen_steps)                             # [D4]
    for step, batch in run.steps(stage, draws, args.gen_steps, args.gen_batch, g, optim, schedule):
        with run.autocast():
            logits = eq3_generate(ddp, batch.image, batch.pseudo, batch.seed / 254)
        loss = eq5_6_generator_loss(logits, batch.mask)
        optim.zero_grad()
        loss.backward()
        optim.step()
        with torch.no_grad():
            found, real = resample(logits, batch.mask.shape[-2:]).argmax(1) == 1, batch.mask == 1
        run.log(step, loss=loss, iou=(found & real).sum() / (found | real).sum().clamp_min(1),
                foreground=real.float().mean())
    return g.eval()


def learn_generators(args, run, aux_set):
    """Fig. 1: EM on the auxiliary set.   -> the generator of each stage; writes generators.pt"""
    g, net, found = None, None, []
    if args.first_stage == "box":                                                       # [D5]
        write_boxes(run, "aux_boxes", aux_set)
        net = train_segmenter(args, run, "aux_segmenter_0", aux_set, "aux_boxes", 10)
    for number in range(1, args.stages + 1):
        folder = f"aux_prob_{number}" if net is not None else None
        if folder:
            write_probs(run, folder, aux_set, net)
        g = train_generator(args, run, number, aux_set, folder, g)                      # E-step
        found.append(copy.deepcopy(g))
        if number < args.stages:                                                        # M-step [D14]
            write_pseudo_masks(args, run, f"aux_pseudo_{number}", aux_set, g, net)
            net = train_segmenter(args, run, f"aux_segmenter_{number}", aux_set, f"aux_pseudo_{number}",
                                  10 + number, net)
    if rank() == 0:
        run.note("generators.pt")
        save_checkpoint(run.dir / "generators.pt", {
            "generators": [g.state_dict() for g in found], "args": plain_fields(args),
            "data": args.aux or AUXILIARY[args.data], "classes": aux_set.classes})
    return found


MADE = ("generator_net", "hg_dims", "hg_modules", "hg_features", "gen_scale", "first_stage")


def read_generators(args, device):
    """The first --stages generators of --generator; how they were made (MADE) becomes this run's way."""
    state = read_state(args.generator)
    if "generators" not in state:
        raise UserError(f"--generator {args.generator} is not the generators.pt of a run")
    if len(state["generators"]) < args.stages:
        raise UserError(f"--generator {args.generator} has {len(state['generators'])} stages: lower --stages")
    made, found = state["args"], []
    for weights in state["generators"][:args.stages]:
        g = make_generator(made["generator_net"], made["hg_dims"], made["hg_modules"], made["hg_features"])
        load_exactly(g, weights, args.generator)
        found.append(g.to(device).eval())
    for field in MADE:
        setattr(args, field, made[field])
    return found


def generator_notes(args, target):
    """What results.json says of a --generator that knows the target's own classes, or may: {topic: sentence}.

    Allowed: with COCO as both, it is Table VII's LPG_coco.
    """
    state = read_state(args.generator) if args.generator else {"classes": []}
    if "classes" not in state:
        return {"generator": f"{args.generator} does not say whose true masks it was trained on"}
    taken = {coco_name(name) for name in target.classes}
    both = [name for name in state["classes"] if coco_name(name) in taken]
    return {"generator": f"{args.generator} was trained on {state['data']}'s true masks of the target's own "
                         f"{', '.join(both)}"} if both else {}


# ── Label synthesis ─────────────────────────────────────────────────────────────────────────────────────────
def without_void(label, sample):
    """On the auxiliary set, where masks are known: no label where the mask has none.   [D17]"""
    return np.where(sample.mask == 255, np.uint8(255), label) if hasattr(sample, "mask") else label


def write_boxes(run, folder, dataset):
    """The first labels, filled boxes.   Writes <folder>/*.png"""
    for (name,) in run.todo(dataset.names, folder):
        sample = dataset[dataset.index(name)]
        label = filled_boxes(sample.boxes, *sample.image.shape[:2])
        save_label(run.path(folder, name), without_void(label, sample))


def write_box_crf(args, run, dataset):
    """Table III's dense CRF on the boxes [D11].   Writes pseudo_crf/*.png"""
    with run.timed("pseudo_crf"):
        for names in run.todo(dataset.names, "pseudo_crf", chunk=16, stage="pseudo_crf"):
            samples = [dataset[dataset.index(name)] for name in names]
            unaries = [box_unaries(s.boxes, args.box_centre, *s.image.shape[:2]) for s in samples]
            refined = dense_crf([s.image for s in samples], [prob for _, prob in unaries], args.label_crf,
                                args.crf, args.workers, run.device)
            for name, (classes, _), Q in zip(names, unaries, refined):
                save_label(run.path("pseudo_crf", name), np.array([0, *classes])[Q.argmax(0)])


def write_grabcut(args, run, dataset):
    """GrabCut in the boxes.   Writes pseudo_grabcut/*.png"""
    with run.timed("pseudo_grabcut"), ThreadPoolExecutor(max(1, args.workers)) as pool:
        for names in run.todo(dataset.names, "pseudo_grabcut", chunk=16, stage="pseudo_grabcut"):
            samples = [dataset[dataset.index(name)] for name in names]
            cuts = pool.map(lambda s: grabcut_label(s.image, s.boxes, args.grabcut_steps), samples)
            for name, cut in zip(names, cuts): save_label(run.path("pseudo_grabcut", name), cut)


def write_pseudo_masks(args, run, folder, dataset, g, net, blind=False):
    """Pseudo masks by g, and by f alone.   Writes <folder>/*.png, <folder>_eq1/*.png"""
    with run.timed(folder):
        for (name,) in run.todo(dataset.names, folder, stage=folder, beside=(f"{folder}_eq1",)):
            sample = dataset[dataset.index(name)]
            with run.autocast():
                label, alone = pseudo_masks(g, net, sample, args.overlap, args.gen_scale, run.device, blind)
            save_label(run.path(f"{folder}_eq1", name), alone)
            save_label(run.path(folder, name), without_void(label, sample))


def write_semi(args, run, folder, train_set, truth):
    """--supervision semi: labels of `folder`, ground truth where it is known.   Writes <folder>_semi/*.png"""
    for (name,) in run.todo(train_set.names, f"{folder}_semi"):
        known = name in truth.order
        label = truth[truth.index(name)].mask if known else read_label(run.path(folder, name))
        save_label(run.path(f"{folder}_semi", name), label)
    return f"{folder}_semi"


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
def predict(net, image, device):
    """Class probabilities.   [D13]   image (H,W,3) uint8 -> (K+1,H,W) float32"""
    scores, stride = class_scores(net, image, device), net.backbone.strides[-1]
    return cells_to_pixels(scores, stride, image.shape[:2]).softmax(1)[0].cpu().numpy()


def predict_val(args, run, net, val_set, number, last):
    """Predictions of one stage, of the last with CRF too [D16].   Writes val_<number>/*.png, val_crf/*.png"""
    plain = f"val_{number}"
    final = "val_crf" if last else plain
    for names in run.todo(val_set.names, final, chunk=16):
        with run.timed(plain):
            images = [val_set[val_set.index(name)].image for name in names]
            probs = [predict(net, image, run.device) for image in images]
            for name, prob in zip(names, probs):
                save_label(run.path(plain, name), prob.argmax(0))
        if last:
            with run.timed("val_crf"):
                refined = dense_crf(images, probs, args.seg_crf, args.crf, args.workers, run.device)
                for name, Q in zip(names, refined):
                    save_label(run.path("val_crf", name), Q.argmax(0))


def evaluate_stage(args, run, stage, split, timed, controls=None, notes=None, **values):
    """One entry of results.json. Only from here on are val masks, and those of weak labels' images, seen.

    timed: the work whose seconds are this entry's; controls: {field: folder} whose mIoU is noted too; notes:
    beside those of the data set
    """
    if run.has(stage):
        return
    truth = target_set(args, split, masks=True)
    if "mask" not in truth.fields:                                                    # own data may lack it
        return

    def written(folder, data=truth):
        return confusion_of(data, lambda s: read_label(run.path(folder, s.name), truth.classes))

    for field, folder in (controls or {}).items():
        values[field] = written(folder).miou()
    if stage == f"pseudo_{args.stages}" and args.probe:
        some = select(truth, names=truth.names[:args.probe])
        values["miou_probe"] = written(stage, some).miou()
        values["miou_blind"] = written(f"{stage}_blind", some).miou()
    run.result(stage, written(stage), split=split, n_images=len(truth), uses_masks=True,
               notes={**truth.notes, **(notes or {})}, seconds=round(sum(map(run.seconds, timed)), 1),
               **values)


def draw_lpg(args, run, split):
    """panels/<split>.png of what the stages wrote; train: as Fig. 3."""
    stages = range(1, args.stages + 1)
    if split == "train":
        columns = {"boxes": "boxes", **({"CRF": "pseudo_crf"} if args.crf != "none" else {}),
                   **({"GrabCut": "pseudo_grabcut"} if args.grabcut_steps else {}),
                   **{f"LPG, stage {n}": f"pseudo_{n}" for n in stages}}
    else:
        columns = {**{f"stage {n}": f"val_{n}" for n in stages}, "with CRF": "val_crf"}
    draw_panels(run, split, target_set(args, split, masks=True), columns)


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder, by the network of --checkpoint.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    state, last = read_predictor(args, Args, "segmenter_….pt", "head.8.weight", "head.branches.0.weight")
    device, made = start_processes(args.device), Args(**state["args"])
    net = make_deeplab(made.backbone, "none", made.seg_stride, made.large_fov, made.seg_rates,
                       len(state["model"][last]) - 1)
    net = with_weights(net, state, device)
    for image, path in pictures_to_predict(args):
        prob = predict(net, image, device)
        label = dense_crf([image], [prob], CRF(*made.seg_crf), args.crf, device=device)[0].argmax(0)
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def target_set(args, split, masks=False):
    """The target with its classes. Its training samples show boxes, masks only under --supervision full."""
    revealed = "box" if args.supervision == "semi" else args.supervision
    dataset = load(dataclasses.replace(args, supervision=revealed), split, masks, ("boxes", "mask"))
    chosen = chosen_classes(args.classes, dataset.classes, "--classes")
    return select(dataset, chosen) if chosen != dataset.classes else dataset


def semi_set(args, train_set):
    """--supervision semi: the training pictures whose masks are known, with them."""
    share = args.semi_masks.replace(".", "", 1).isdigit()
    train_list = args.train_list if share else args.semi_masks
    truth = target_set(dataclasses.replace(args, supervision="full", train_list=train_list), "train")
    known = [name for name in truth.names if name in train_set.order]
    if share:
        number = round(float(args.semi_masks) * len(known))
        known = sorted(np.random.default_rng([args.seed, 2]).permutation(known)[:number].tolist())
    if len(known) in (0, len(train_set)):                   # coco and workpiece have no list "train" of some
        raise UserError(f"--semi-masks {args.semi_masks} shows the masks of {len(known)} of {len(train_set)} "
                        "pictures: give a share, 0.14, or a list of some of them")
    return select(truth, names=known)


def auxiliary_set(args, target, val):
    """§IV-A: boxes and masks of classes that the target does not have, without the target's own pictures."""
    sources = (args.aux or AUXILIARY.get(args.data, "")).split(",")
    roots = args.aux_root.split(",") if args.aux_root else [f"data/{source}" for source in sources]
    if sources == [""]:
        raise UserError(f"--data {args.data} has no auxiliary set by default: give --aux and --aux-root")
    if len(roots) != len(sources):
        raise UserError(f"--aux {args.aux} --aux-root {args.aux_root}: give as many folders as data sets")
    def place(data, root):                                  # VOC's folder may be given in three ways
        return data, (voc_root(Path(root)) if data == "voc" else Path(root)).resolve()

    taken, parts = {coco_name(name) for name in target.classes}, []
    for source, root in zip(sources, roots):
        asked = dataclasses.replace(args, data=source, root=root, supervision="full", train_list=(
            args.train_list if args.train_list in ("train", "train_aug") else "train"))
        part = load(asked, "train", fields=("boxes", "mask"))
        own = {*target.names, *val.names} if place(source, root) == place(args.data, args.root) else {}
        parts.append(select(part, names=[name for name in part.names if name not in own]))
    every = join(parts) if len(parts) > 1 else parts[0]
    free = [name for name in every.classes if coco_name(name) not in taken]
    chosen = chosen_classes(args.aux_classes, every.classes, "--aux-classes") if args.aux_classes else free
    both = [name for name in chosen if name not in free]
    if both or not chosen:
        raise UserError(f"{', '.join(both) or 'all auxiliary classes'}: also in the target set; choose "
                        "others by --classes and --aux-classes")
    every = select(every, chosen)
    if not len(every):
        raise UserError("no auxiliary picture is left: those of the target and those that show none of "
                        f"{', '.join(chosen)} do not count; choose others by --aux and --aux-classes")
    number = max(1, round(args.aux_fraction * len(every)))
    kept = {*np.random.default_rng([args.seed, 1]).permutation(every.names)[:number].tolist()}
    return select(every, names=[name for name in every.names if name in kept])


def settle_lpg(args):
    """Fields that are left open get their values; what would else fail after hours fails now."""
    own = TABLE_I[args.backbone == "vgg16"]
    for field in ("seg_steps", "seg_batch", "seg_lr"):
        setattr(args, field, getattr(args, field) or own[field])
    args.seg_crf = CRF(*(given or value for given, value in zip(args.seg_crf, own["seg_crf"])))
    g = make_generator(args.generator_net, args.hg_dims, args.hg_modules, args.hg_features)
    if args.gen_crop % g.multiple:
        raise UserError(f"--gen-crop {args.gen_crop}: give a multiple of {g.multiple} for this generator")
    if not 1 <= args.stages <= 9:
        raise UserError(f"--stages {args.stages}: give 1 to 9")
    if not 0 < args.aux_fraction <= 1:
        raise UserError(f"--aux-fraction {args.aux_fraction}: give a share of the pictures, above 0 up to 1")
    learns = args.supervision != "full" and not args.generator
    if learns and args.gen_batch // world() < 2 and args.gen_crop == g.multiple:
        raise UserError(f"--gen-batch {args.gen_batch}: with --gen-crop {args.gen_crop} batch norm sees one "
                        "value a process; give two images a process, or a larger crop")
    make_deeplab(args.backbone, args.weights, args.seg_stride, args.large_fov, args.seg_rates, 1)
    if args.generator:
        read_generators(args, "cpu")                            # which may change --first-stage
    if args.generator_fixed and args.first_stage == "none" and args.stages > 1:                # [D5]
        raise UserError("--generator-fixed --first-stage none: the last generator was trained with f's "
                        "probability, and stage 1 has no f; take --first-stage box (or a --generator made "
                        "with it), or leave --generator-fixed out")


def main():
    """Fig. 1 on the auxiliary set, then Fig. 2 on the target; --supervision full: Fig. 2 on ground truth."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    if args.predict:
        return predict_folder(args)
    train_set, val_set = target_set(args, "train"), target_set(args, "val")
    start_processes(args.device)
    settle_lpg(args)
    full, semi, N = args.supervision == "full", args.supervision == "semi", args.stages
    truth = semi_set(args, train_set) if semi else None
    if not len(train_set) or not len(val_set):
        raise UserError(f"--classes {args.classes}: no picture of train, or none of val, shows one of them")
    aux_set = None if full or args.generator else auxiliary_set(args, train_set, val_set)
    run = Run(args, FIELDS)
    generators, notes = [], {} if full else generator_notes(args, train_set)
    for sentence in notes.values(): run.say(sentence)
    if not full:
        write_boxes(run, "boxes", train_set)
        boxes = {"miou_boxes": "boxes"}
        if args.crf != "none":
            write_box_crf(args, run, train_set)
            evaluate_stage(args, run, "pseudo_crf", "train", ["pseudo_crf"], boxes, crf=True)
        if args.grabcut_steps:
            write_grabcut(args, run, train_set)
            evaluate_stage(args, run, "pseudo_grabcut", "train", ["pseudo_grabcut"],
                           {} if run.has("pseudo_crf") else boxes, crf=False)
        if aux_set: run.say(f"auxiliary set: {len(aux_set)} pictures, {aux_set.classes}")
        generators = (read_generators(args, run.device) if args.generator else
                      learn_generators(args, run, aux_set))
    net = None
    for number in range(0 if args.first_stage == "box" else 1, N + 1):                  # Fig. 2
        folder = "" if full else f"pseudo_{number}" if number else "boxes"
        if number and not full:
            g = generators[-1 if args.generator_fixed else number - 1]
            write_pseudo_masks(args, run, folder, train_set, g, net)
            if number == N and args.probe:
                few = select(train_set, names=train_set.names[:args.probe])
                write_pseudo_masks(args, run, f"{folder}_blind", few, g, net, blind=True)
            evaluate_stage(args, run, folder, "train", [folder], {"miou_eq1": f"{folder}_eq1"}, notes,
                           crf=False)
        folder = write_semi(args, run, folder, train_set, truth) if semi else folder
        net = train_segmenter(args, run, f"segmenter_{number}", train_set, folder, number, net)
        if number:
            predict_val(args, run, net, val_set, number, number == N)
            timed = [f"segmenter_{number}", f"val_{number}"]
            evaluate_stage(args, run, f"val_{number}", "val", timed, notes=notes, crf=False)
    if not run.has("val_crf"):
        for split in ("val",) if full else ("train", "val"):
            draw_lpg(args, run, split)
        evaluate_stage(args, run, "val_crf", "val", ["val_crf"], notes=notes, crf=True)
    run.table()


if __name__ == "__main__":
    main()
