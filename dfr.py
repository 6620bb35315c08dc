"""DFR: Dynamic Feature Regularized Loss for Weakly Supervised Semantic Segmentation.
B. Zhang, J. Xiao, Y. Zhao; arXiv:2108.01296. Equation numbers: B. Zhang's thesis, chapter 4.

Symbols      I image (B,3,H,W), its mean in each cell (B,3,h,w) · P probabilities (B,C,h,w), C = K + 1 · M_s
             scribbles (B,H,W), 255 = unlabelled · F features of the consistency head (B,d,h,w) · S places of
             the cells · R pairs of cells within the window · K, K_f kernels (B,O,h,w), O = ((2r+1)² − 1)/2
             offsets: each pair once · M confident labels (B,h,w) · γ confidence · R_A pairs that M labels ·
             A their relation, sets A⁺_bg, A⁺_fg, A⁻ · D affinity of a pair
Equations    (4.1) eq4_1_total    (4.2) eq4_2_partial_cross_entropy    (4.3) eq4_3_window
             (4.4) eq4_4_dfr    (4.5) eq4_5_disagreement    (4.6) eq4_6_13_kernel
             (4.7) eq4_7_confident    (4.8, 4.9) eq4_8_9_relations    (4.10) eq4_10_log_affinity
             (4.11) eq4_11_feature_distance    (4.12) eq4_12_feature_regularised    (4.13) eq4_6_13_kernel
Figures      Fig. 4.1 = train_segmenter; Fig. 4.2 = UPerNet over Swin; Fig. 4.3 = --scribble-length
Tables       4.4 --blocks · 4.5 --no-dfr-loss --no-fd-loss --no-fr-loss (row 1: --no-dfr-loss
             --no-consistency-head; row 2: --no-fd-loss --no-fr-loss, where an untrained head stays in the
             kernel) · 4.6 --kernel (without feature the head goes) · 4.7 --consistency-labels
Commands     python dfr.py                                     # embedded shapes, made for two CPU cores
             python dfr.py --data voc --root data/voc --weights FILE.pth      # ImageNet-22k; paper: 82.8
             python dfr.py --data voc --root data/voc --supervision full      # upper bound; paper: 84.6
             python dfr.py --data context --root data/context  # paper: 52.9 on PASCAL-Context
             python dfr.py --no-dfr-loss --no-consistency-head --out runs/dfr-ce      # paper: 68.9 for 81.5
             python dfr.py --predict photos/ --checkpoint runs/dfr-voc-scribble-s0/segmenter.pt
Departures   [D1] Swin-B starts from torchvision's ImageNet-1k weights; the paper's, ImageNet-22k, only exist
                  as the Swin authors' file, --weights swin_base_patch4_window7_224_22k.pth
             [D2] Eq. 4.2: P is enlarged to the pixels of the scribbles, as mmsegmentation does; as printed it
                  runs over cells, of which thin scribbles would keep few
             [D3] Eq. 4.12: all pairs R, since it is there for what has no label, and as Eq. 3.12 of A²GNN;
                  --fr-pairs labelled: R_A as printed
             [D4] a crop's padding takes no part in any loss, and hw counts the other cells; partners outside
                  the map do not count
             [D5] Eq. 4.11: log(1 − D + 1e-5), infinite else for equal features; a mean over no pair is 0
             [D6] "‖·‖² is the L2 distance" in Eqs. 4.6, 4.13: its square, as the sign says; S in cells
             [D7] the fused feature of 2048 channels: UPerNet's four levels before its fusing convolution,
                  which so belongs to the semantic head; --blocks selects among these levels
             [D8] no auxiliary head; mmsegmentation's default has one (--aux-head), the paper names none
             [D9] multi-scale test with mirror images (mmsegmentation's; the paper names the scales only)
             [D10] --scribble-length keeps the middle of each stroke (paper silent)
             [D11] --supervision full: cross-entropy on ground truth alone, without head and L_dfr
             [D12] PASCAL-Context: background is learned and scored like the 59 classes; miou_fg leaves its
                  IoU out (paper silent); crop and scale as for VOC (mmsegmentation's: 480 and 520)
             [D13] the grid is 1/4 of the image for every backbone; batch norms that start from ImageNet stay
                  fixed; no weight decay for any norm layer; crops, and in tests padding, of whole cells of
                  the deepest tap (32 pixels), logits by torch's bilinear
             [D14] presets: window, σ_xy and λ1 scaled with the smaller grid (λ1 times the number of partners
                  stays 1.2), σ3 with √d; widths lowered; rates for few steps, on photographs the layers
                  behind the backbone ten times as fast: a step of AdamW moves a weight by the rate at most
             [D15] the biases of the head's own layer start at 1 (paper silent): until confident pairs of two
                  classes come, nothing holds features apart, and from torch's start the ReLU of each channel
                  dies meanwhile, so that F is 0 for good; AdamW divides λ2 out of this layer's steps
Nothing here uses a dense CRF, as in the paper; --crf has no effect.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from scipy import ndimage

from common import (
    Backbone, Run, UserError, confusion_of, draw_panels, imagenet_weights, inference, load_exactly,
    make_backbone, parse_args, pictures_to_predict, poly, pretrained, read_predictor, read_state, reduce,
    save_label, save_prediction, start_processes, with_weights, world)
from data import Draws, Sample, changed, crop, flip, load, normalise, read_label, resize, resize_batch


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "context", "workpiece"] = "shapes"
    """data set of data.py; shapes is drawn on the fly, workpiece is any folder of your own"""
    supervision: Literal["scribble", "full"] = "scribble"
    """what the training set may reveal; full = the same network on ground truth (upper bound) [D11]"""
    backbone: Literal[
        "swin_b", "swin_t", "tiny", "resnet18", "resnet50", "resnet101", "mobilenet_v2"] = "swin_b"
    """§4.3.2: Swin-Base. Taps: the stages of Swin, layer1–4 of ResNet, features 3, 6, 13, 18 of MobileNet"""
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
    # --- network (Fig. 4.2; mmsegmentation's Swin-B with UPerNet) ---
    width: int = 512
    """channels of each UPerNet level; four of them make the fused feature of 2048 [D7]"""
    blocks: str = "1,2,3,4"
    """levels that the fused feature consists of (Table 4.4), comma-separated [D7]"""
    dropout: float = 0.1
    """before the last layer of the semantic head"""
    drop_path: float = 0.3
    """stochastic depth of Swin's last block, growing linearly from 0"""
    aux_head: bool = False
    """mmsegmentation's default: a small FCN on the third tap [D8]"""
    w_aux: float = 0.4
    """its weight"""
    # --- semantic head (§4.2.2) ---
    scribble_length: float = 1.0
    """Fig. 4.3: share of each stroke that is used, 0 = a spot [D10]"""
    dfr_loss: bool = True
    """L_dfr, Eq. 4.4 (Table 4.5)"""
    w_dfr: float = 1e-2
    """λ1 of Eq. 4.1; goes with a sum over 120 partners"""
    kernel: str = "xy,rgb,feature"
    """what the kernel of L_dfr compares (Table 4.6), comma-separated; without feature the head goes"""
    radius: int = 5
    """r of Eq. 4.3, cells"""
    sigma_xy: float = 6.0
    """σ1 of Eqs. 4.6 and 4.13, cells"""
    sigma_rgb: float = 0.5
    """σ2 of Eqs. 4.6 and 4.13, on the network's normalised input"""
    sigma_feature: float = 50.0
    """σ3 of Eq. 4.6"""
    # --- feature consistency head (§4.2.3) ---
    consistency_head: bool = True
    """the head; without it the kernel has no feature either (Table 4.6)"""
    feature_dim: int = 128
    """§4.3.2: d, channels of F"""
    fd_loss: bool = True
    """L_fd, Eq. 4.11 (Table 4.5)"""
    fr_loss: bool = True
    """L_fr, Eq. 4.12 (Table 4.5)"""
    w_feature: float = 1e-3
    """λ2 of Eq. 4.1"""
    fr_pairs: Literal["all", "labelled"] = "all"
    """pairs of Eq. 4.12: R, or R_A as printed [D3]"""
    consistency_labels: Literal["confident", "gt", "both"] = "confident"
    """labels of the head (Table 4.7): M, the scribbles, or M with the scribbles written over it"""
    gamma: float = 0.98
    """γ of Eq. 4.7"""
    # --- training (§4.3.2; mmsegmentation's defaults) ---
    seg_steps: int = 40_000
    """§4.3.2"""
    seg_batch: int = 16
    """§4.3.2: images a step, over all processes"""
    seg_lr: float = 3e-5
    """§4.3.2, AdamW; Swin's own default is 6e-5"""
    head_rate: float = 1.0
    """rate of all layers behind the backbone, times seg_lr; the paper has one rate for all [D14]"""
    warmup: int = 1500
    """first steps with a rate that grows linearly from 1e-6 of it; power 1 decay over all steps"""
    weight_decay: float = 0.01
    """§4.3.2; 0 for norms and relative positions [D13]"""
    seg_crop: int = 512
    """§4.3.2, pixels"""
    fit: tuple[int, int] = (2048, 512)
    """at scale 1 pictures fit in these (longer, shorter) sides, in tests too; 0 0 = their own size"""
    seg_rescale: tuple[float, float] = (0.5, 2.0)
    """§4.3.2: range of the random scale"""
    cat_max_ratio: float = 0.75
    """a crop is drawn anew, ten times at most, while one class has this share of its labelled pixels"""
    photometric: bool = True
    """§4.3.2: random photometric distortion"""
    # --- inference ---
    test_scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    """§4.3.2, of val_ms, each with its mirror image [D9]; val is scale 1 alone"""


# What two CPU cores do in minutes; everything else as the paper.   [D14]
SHAPES = dict(
    backbone="tiny", weights="none", width=32, feature_dim=32, sigma_feature=25, radius=2, sigma_xy=2.4,
    w_dfr=0.05, seg_steps=4000, seg_batch=8, seg_lr=2e-3, warmup=100, seg_crop=96, fit=(0, 0),
    seg_rescale=(0.75, 1.25), test_scales=(0.75, 1.0, 1.25))
# A few hundred photographs with a small pretrained backbone on two CPU cores.
PHOTOS = dict(
    backbone="mobilenet_v2", train_list="train", width=64, feature_dim=32, sigma_feature=25, radius=3,
    sigma_xy=3.6, w_dfr=0.025, seg_steps=1000, seg_batch=8, seg_lr=2e-4, head_rate=10, warmup=50,
    seg_crop=256, fit=(1024, 256), test_scales=(0.75, 1.0, 1.25))

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {"segmenter": (
    "data root train_list supervision seed amp weights backbone width blocks dropout drop_path aux_head "
    "w_aux scribble_length dfr_loss w_dfr kernel radius sigma_xy sigma_rgb sigma_feature consistency_head "
    "feature_dim fd_loss fr_loss w_feature fr_pairs consistency_labels gamma seg_steps seg_batch "
    "seg_lr head_rate warmup weight_decay seg_crop fit seg_rescale cat_max_ratio photometric").split()}


def listed(text, allowed, flag):
    """A comma-separated choice, "xy,rgb" -> ["xy", "rgb"], or a UserError."""
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= set(allowed) or len(set(words)) < len(words):
        raise UserError(f"{flag} {text}: give one or more of {','.join(allowed)}, comma-separated")
    return words


def kernel_parts(args):
    """What K compares; the feature only if there is a head, and no head without the feature (Table 4.6)."""
    parts = listed(args.kernel, ("xy", "rgb", "feature"), "--kernel")
    head = args.consistency_head and args.supervision == "scribble"
    return [part for part in parts if part != "feature" or head]


# ── Networks (Fig. 4.2) ─────────────────────────────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Swin(Backbone):
    """torchvision's Swin Transformer with a layer norm on each of four taps, strides 4, 8, 16, 32.

    Takes any size: the image is padded to whole patches of 4, the windows pad themselves.
    """

    def __init__(self, net, drop_path):
        stages, width = net.features, net.features[0][0].out_channels
        channels = [width * 2**i for i in range(4)]
        super().__init__([stages[i:i + 2] for i in (0, 2, 4, 6)], channels, (4, 8, 16, 32))
        self.tap_norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        layers = [m for m in self.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
        for i, layer in enumerate(layers): layer.p = drop_path * i / (len(layers) - 1)

    def forward(self, x):
        H, W = x.shape[-2:]
        x, taps = F.pad(x, (0, -W % 4, 0, -H % 4)), []
        for block, norm in zip(self.blocks, self.tap_norms):
            x = block(x)                                                                # (B,h,w,C)
            taps.append(norm(x).permute(0, 3, 1, 2))
        return taps


def swin_key(key):
    """Key of the Swin authors' checkpoint -> torchvision's, whose own keys stay what they are.

    patch_embed.proj, .norm: features.0.0, .0.2; layers.I.blocks.J: features.(2I+1).J; layers.I.downsample:
    features.(2I+2); mlp.fc1, .fc2: mlp.0, .3. The order of a merged patch and of the positions is the same.
    """
    key = key.replace("patch_embed.proj.", "features.0.0.").replace("patch_embed.norm.", "features.0.2.")
    key = re.sub(r"^layers\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", key)
    key = re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}.", key)
    return key.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")


def load_swin(net, name, weights):
    """Weights of torchvision, or of the Swin authors' file {"model": …} (ImageNet-22k), into torchvision's
    network. Its classifier and last norm are left out, as are the authors' attention masks.   [D1]
    """
    if weights == "none":
        return
    state = imagenet_weights(name) if weights == "imagenet" else read_state(weights)
    state = state.get("model", state) if isinstance(state, dict) else {}
    if not state or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"weights {weights}: not a state dict; give a file of tensors by name")
    outside = ("head.", "norm.")
    state = {swin_key(key): value for key, value in state.items()
             if not key.startswith(outside) and not key.endswith("attn_mask")}
    state = {key: value.flatten() if key.endswith("position_index") else value.float()
             for key, value in state.items()}
    load_exactly(net, state, weights, outside)


def conv_bn_relu(inputs, outputs, kernel):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs), nn.ReLU())


class PPM(nn.Module):
    """Pyramid pooling: (B,D,h,w) and its averages in 1, 2², 3², 6² fields -> (B,width,h,w)."""

    def __init__(self, channels, width, fields=(1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_bn_relu(channels, width, 1))
                                   for n in fields)
        self.join = conv_bn_relu(channels + len(fields) * width, width, 3)

    def forward(self, x):
        return self.join(torch.cat([x, *(resample(pool(x), x.shape[-2:]) for pool in self.pools)], dim=1))


class UPerNet(nn.Module):
    """Backbone, PPM and FPN, semantic head, feature consistency head.

    forward(image (B,3,H,W))  ->  logits (B,C,h,w), F (B,d,h,w) or None, logits of the auxiliary head or None;
    h, w = a quarter of H, W, rounded up. blocks: levels of the fused feature, 1 is the finest. The layers
    that no chosen level needs are not there. feature_dim: 0 = no head.
    """

    def __init__(self, backbone, classes, width, blocks, dropout, feature_dim, aux):
        super().__init__()
        self.backbone, self.first = backbone, min(blocks) - 1
        self.ppm = PPM(backbone.channels[3], width)
        self.lateral = nn.ModuleDict({str(i): conv_bn_relu(backbone.channels[i], width, 1)
                                      for i in range(self.first, 3)})
        self.smooth = nn.ModuleDict({str(b - 1): conv_bn_relu(width, width, 3) if b < 4 else nn.Identity()
                                     for b in sorted(blocks)})
        fused = width * len(blocks)
        self.fuse = nn.Sequential(conv_bn_relu(fused, width, 3), nn.Dropout2d(dropout))
        self.classify = nn.Conv2d(width, classes + 1, 1)
        self.consistency = nn.Sequential(nn.Conv2d(fused, feature_dim, 1), nn.ReLU()) if feature_dim else None
        self.aux = nn.Sequential(conv_bn_relu(backbone.channels[2], width // 2, 3), nn.Dropout2d(dropout),
                                 nn.Conv2d(width // 2, classes + 1, 1)) if aux else None
        for layer in [self.classify, *([self.aux[-1]] if aux else [])]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        if feature_dim: nn.init.ones_(self.consistency[0].bias)                         # [D15]

    def forward(self, image):
        grid = [-(-n // 4) for n in image.shape[-2:]]                                   # [D13]
        taps = self.backbone(image)
        levels = {3: self.ppm(taps[3])}
        for i in range(2, self.first - 1, -1):                                          # top-down
            levels[i] = self.lateral[str(i)](taps[i])
            levels[i] = levels[i] + resample(levels[i + 1], levels[i].shape[-2:])
        fused = torch.cat([resample(conv(levels[int(i)]), grid) for i, conv in self.smooth.items()], dim=1)
        logits, feature, aux = self.classify(self.fuse(fused)).float(), None, None
        if self.training and self.consistency is not None: feature = self.consistency(fused).float()
        if self.training and self.aux is not None: aux = self.aux(taps[2]).float()
        return logits, feature, aux


# ── Pairs of cells ──────────────────────────────────────────────────────────────────────────────────────────
def eq4_3_window(radius):
    """Eq. (4.3): |Δx|, |Δy| ≤ r, i ≠ j; one of (i, j), (j, i).   -> list of (Δy, Δx), half of the window"""
    return [(dy, dx) for dy in range(radius + 1) for dx in range(-radius, radius + 1) if (dy, dx) > (0, 0)]


def pair_views(x, offset):
    """x (...,h,w) at the cells i and at their partners j = i + offset, both inside: two views, one shape."""
    (h, w), (dy, dx) = x.shape[-2:], offset
    bottom, left = max(0, h - dy), max(0, -dx)
    right = max(left, w - max(0, dx))
    return x[..., :bottom, left:right], x[..., dy:dy + bottom, left + dx:right + dx]


def labels_of_partners(label, offsets, outside=255):
    """(B,h,w) -> (B,O,h,w): the label of each cell's partner, `outside` where that lies outside."""
    out = label.new_full((len(label), len(offsets), *label.shape[-2:]), outside)
    for o, offset in enumerate(offsets):
        pair_views(out[:, o], offset)[0].copy_(pair_views(label, offset)[1])
    return out


class WindowSum(torch.autograd.Function):
    """WindowSum.apply(x, offsets, kind): (B,C,h,w) -> (B,O,h,w), Σ_c of x_i x_j ("dot"), |x_i − x_j| ("l1")
    or (x_i − x_j)² ("l2") of each cell and its partner; 0 where that lies outside.

    Goes offset by offset, forward and backward: never more than one offset's C channels are in memory, where
    an unfold, or autograd on shifted copies, would hold C channels for each of them.
    """

    @staticmethod
    def forward(ctx, x, offsets, kind):
        ctx.save_for_backward(x)
        ctx.offsets, ctx.kind = offsets, kind
        out = x.new_zeros(len(x), len(offsets), *x.shape[-2:])
        for o, offset in enumerate(offsets):
            i, j = pair_views(x, offset)
            term = i * j if kind == "dot" else (i - j).abs_() if kind == "l1" else (i - j).square_()
            pair_views(out[:, o], offset)[0].copy_(term.sum(1))
        return out

    @staticmethod
    def backward(ctx, slope):
        x, = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for o, offset in enumerate(ctx.offsets):
            (i, j), (grad_i, grad_j) = pair_views(x, offset), pair_views(grad, offset)
            g = pair_views(slope[:, o:o + 1], offset)[0]
            if ctx.kind == "dot":
                grad_i.addcmul_(g, j)
                grad_j.addcmul_(g, i)
            else:
                term = (i - j).sign_().mul_(g) if ctx.kind == "l1" else (i - j).mul_(2 * g)
                grad_i.add_(term)
                grad_j.sub_(term)
        return grad, None, None


# ── Losses of the semantic head (Eqs. 4.1–4.6) ──────────────────────────────────────────────────────────────
def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq4_1_total(L_pce, L_dfr, L_fd, L_fr, w_dfr, w_feature):
    """Eq. (4.1): L = L_pce + λ1 L_dfr + λ2 (L_fd + L_fr)."""
    return L_pce + w_dfr * L_dfr + w_feature * (L_fd + L_fr)


def eq4_2_partial_cross_entropy(logits, M_s):
    """Eq. (4.2): −log Pᵗ, mean over the labelled pixels.   [D2]   logits (B,C,h,w), M_s (B,H,W)"""
    nll = F.cross_entropy(resample(logits, M_s.shape[-2:]), M_s, ignore_index=255, reduction="none")
    return masked_mean(nll, M_s != 255)


@torch.no_grad()
def eq4_6_13_kernel(I, F_, inside, offsets, parts, sigma_xy, sigma_rgb, sigma_feature=None):
    """Eq. (4.6): K = exp(−‖S_i−S_j‖²/2σ1² − ‖I_i−I_j‖²/2σ2² − ‖F_i−F_j‖²/2σ3²), F without gradient.   [D6]
    Eq. (4.13), K_f: parts ("xy", "rgb").

    I (B,3,h,w), F_ (B,d,h,w) or None, inside (B,h,w) bool, False in padding [D4] -> (B,O,h,w), 0 for pairs
    that are not inside both
    """
    exponent = torch.zeros(1, len(offsets), 1, 1, device=I.device)
    if "xy" in parts:
        square = torch.tensor([dy**2 + dx**2 for dy, dx in offsets], device=I.device)
        exponent = exponent + square[:, None, None] / (2 * sigma_xy**2)
    if "rgb" in parts:
        exponent = exponent + WindowSum.apply(I, offsets, "l2") / (2 * sigma_rgb**2)
    if "feature" in parts:
        exponent = exponent + WindowSum.apply(F_, offsets, "l2") / (2 * sigma_feature**2)
    return torch.exp(-exponent) * (inside[:, None] & labels_of_partners(inside, offsets, False))


def eq4_5_disagreement(P, K, offsets):
    """Eq. (4.5): φ(i,j) = K(i,j) (1 − Σ_c P^c(i) P^c(j)).   P (B,C,h,w), K (B,O,h,w) -> (B,O,h,w)"""
    return K * (1 - WindowSum.apply(P, offsets, "dot"))


def eq4_4_dfr(P, K, inside, offsets):
    """Eq. (4.4): 1/hw Σ_i Σ_{(i,j) ∈ R} φ(i,j); each pair counts twice, as (i,j) and as (j,i)."""
    return masked_mean(2 * eq4_5_disagreement(P, K, offsets).sum(1), inside)


# ── Losses of the feature consistency head (Eqs. 4.7–4.13) ──────────────────────────────────────────────────
def eq4_7_confident(P, gamma):
    """Eq. (4.7): M = arg-max_c P^c where P > γ, else 255.   (B,C,h,w) -> (B,h,w)"""
    score, label = P.max(1)
    return torch.where(score > gamma, label, 255)


def consistency_labels(P, M_s, inside, gamma, choice):
    """Table 4.7: M of Eq. (4.7), or the scribbles at the cells ("gt"), or "both", these written over M."""
    M = eq4_7_confident(P, gamma)
    if choice != "confident":
        cells = F.interpolate(M_s[:, None].float(), P.shape[-2:], mode="nearest")[:, 0].long()
        M = cells if choice == "gt" else torch.where(cells != 255, cells, M)
    return torch.where(inside, M, 255)


def eq4_8_9_relations(M, offsets):
    """Eqs. (4.8), (4.9): the pairs of R_A by their A.   M (B,h,w) -> A⁺_bg, A⁺_fg, A⁻ (B,O,h,w) bool"""
    M = M.to(torch.uint8)
    M_i, M_j = M[:, None], labels_of_partners(M, offsets)
    known, same = (M_i != 255) & (M_j != 255), M_i == M_j                               # R_A
    return known & same & (M_i == 0), known & same & (M_i > 0), known & ~same


def eq4_10_log_affinity(F_, offsets):
    """Eq. (4.10): log D = −‖F_i − F_j‖₁/d.   (B,d,h,w) -> (B,O,h,w)"""
    return -WindowSum.apply(F_, offsets, "l1") / F_.shape[1]


def eq4_11_feature_distance(log_D, bg, fg, apart):
    """Eq. (4.11): −mean log D over A⁺_bg, −mean log D over A⁺_fg, −2 mean log(1 − D) over A⁻.   [D5]"""
    log_rest = (1e-5 - torch.expm1(log_D)).log()
    return -masked_mean(log_D, bg) - masked_mean(log_D, fg) - 2 * masked_mean(log_rest, apart)


def eq4_12_feature_regularised(log_D, K_f, inside):
    """Eq. (4.12): 1/hw Σ_i Σ_{(i,j)} K_f(i,j) ‖F_i − F_j‖₁/d.   [D3]   (B,O,h,w) twice, inside (B,h,w)"""
    return masked_mean(2 * (K_f * -log_D).sum(1), inside)


def all_losses(args, logits, feature, image, M_s, valid):
    """L_pce, L_dfr, L_fd, L_fr of Eq. (4.1), and M (B,h,w); what is switched off is 0.

    logits (B,C,h,w), feature (B,d,h,w) or None, image (B,3,H,W), M_s (B,H,W), valid (B,H,W): not padding
    """
    grid, parts, offsets = logits.shape[-2:], kernel_parts(args), eq4_3_window(args.radius)
    L_pce, P = eq4_2_partial_cross_entropy(logits, M_s), logits.softmax(1)
    L_dfr = L_fd = L_fr = logits.new_zeros(())
    I = F.interpolate(image, grid, mode="area")
    inside = F.interpolate(valid[:, None].float(), grid, mode="nearest")[:, 0] > 0
    sigmas = args.sigma_xy, args.sigma_rgb, args.sigma_feature
    M = consistency_labels(P.detach(), M_s, inside, args.gamma, args.consistency_labels)
    if args.dfr_loss and args.supervision == "scribble":
        L_dfr = eq4_4_dfr(P, eq4_6_13_kernel(I, feature, inside, offsets, parts, *sigmas), inside, offsets)
    if feature is not None and (args.fd_loss or args.fr_loss):
        log_D, relations = eq4_10_log_affinity(feature, offsets), eq4_8_9_relations(M, offsets)
        if args.fd_loss:
            L_fd = eq4_11_feature_distance(log_D, *relations)
        if args.fr_loss:
            K_f = eq4_6_13_kernel(I, None, inside, offsets, ("xy", "rgb"), *sigmas)
            if args.fr_pairs == "labelled": K_f = K_f * torch.stack(relations).any(0)
            L_fr = eq4_12_feature_regularised(log_D, K_f, inside)
    return L_pce, L_dfr, L_fd, L_fr, M


# ── Scribbles and augmentation (Fig. 4.3, §4.3.2) ───────────────────────────────────────────────────────────
def shorten(scribble, length):
    """Keeps this share of each stroke, its middle, measured along it; 0 = a spot.   [D10]   (H,W) uint8"""
    from skimage.graph import MCP_Geometric

    out = np.full_like(scribble, 255)
    for k in np.setdiff1d(scribble, 255):
        strokes, count = ndimage.label(scribble == k, np.ones((3, 3)))
        for n, window in enumerate(ndimage.find_objects(strokes), 1):
            inside = strokes[window] == n
            along = MCP_Geometric(np.where(inside, 1.0, -1.0))                          # -1: no way through
            far = along.find_costs([np.argwhere(inside)[0]])[0]
            end = np.unravel_index(np.where(inside, far, -1).argmax(), far.shape)
            far = along.find_costs([end])[0]
            off = np.where(inside, abs(far - far[inside].max() / 2), np.inf)            # from the middle
            out[window][off <= max(length * far[inside].max() / 2, off.min())] = k
    return out


def fitted(size, fit, factor):
    """(H, W) of a picture -> its size at a scale; fit: (longer, shorter) side, (0, 0) = its own size."""
    if any(fit):
        factor *= min(fit[0] / max(size), fit[1] / min(size))
    return [max(1, round(n * factor)) for n in size]


def photometric(sample, rng, brightness=32, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18):
    """mmsegmentation's distortion: brightness, contrast, saturation, hue (of 180), each with probability 1/2;
    contrast before or behind the last two."""
    import cv2

    def linear(x, gain=1.0, shift=0.0):
        return (x.astype(np.float32) * gain + shift).clip(0, 255).astype(np.uint8)

    image, (bright, contrasty, saturate, turn, first) = sample.image, rng.random(5) < 0.5
    if bright: image = linear(image, shift=rng.uniform(-brightness, brightness))
    if contrasty and first: image = linear(image, rng.uniform(*contrast))
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate: hsv[..., 1] = linear(hsv[..., 1], rng.uniform(*saturation))
        if turn: hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-hue, hue)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrasty and not first: image = linear(image, rng.uniform(*contrast))
    return changed(sample, image=image)


def varied_crop(sample, size, rng, cat_max_ratio):
    """A random crop of which no class has more than this share of the labels, if one of ten is so."""
    for _ in range(10):
        part = crop(sample, size, rng)
        label = part.mask if hasattr(part, "mask") else part.scribble
        counts = np.bincount(label[label != 255], minlength=1)
        if np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum(): break
    return part


def train_augment(args):
    """§4.3.2's augmentation; `pseudo` becomes 255 in the crop's padding, 0 elsewhere."""
    def augment(sample, rng):
        if args.scribble_length < 1 and args.supervision == "scribble":
            sample = changed(sample, scribble=shorten(sample.scribble, args.scribble_length))
        sample = changed(sample, pseudo=np.zeros_like(sample.image[..., 0]))
        sample = resize(sample, fitted(sample.image.shape[:2], args.fit, rng.uniform(*args.seg_rescale)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        sample = photometric(sample, rng) if args.photometric else sample
        return normalise(varied_crop(sample, args.seg_crop, rng, args.cat_max_ratio))
    return augment


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────
def make_dfr(args, weights, classes):
    """UPerNet of Args; weights "none" where they are loaded afterwards. What no loss reaches is fixed."""
    blocks = [int(b) for b in listed(args.blocks, "1234", "--blocks")]
    if args.backbone.startswith("swin"):
        net = torchvision.models.get_model(args.backbone, weights=None)
        load_swin(net, args.backbone, weights)
        backbone = Swin(net, args.drop_path)
        for norm in backbone.tap_norms[:min(blocks) - 1]: norm.requires_grad_(False)
        if args.aux_head: backbone.tap_norms[2].requires_grad_(True)
    else:
        backbone = make_backbone(args.backbone, weights, 16 if args.backbone == "tiny" else 32,
                                 pretrained(args.backbone, args.weights))
    head = "feature" in kernel_parts(args)
    net = UPerNet(backbone, classes, args.width, blocks, args.dropout, head * args.feature_dim, args.aux_head)
    if head and not (args.fd_loss or args.fr_loss): net.consistency.requires_grad_(False)
    return net


def parameter_groups(net, weight_decay, lr, head_rate):
    """Optimiser groups: norms and relative positions do not decay [D13]; rate of the layers behind the
    backbone times head_rate [D14]."""
    norms = {id(p) for m in net.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm))
             for p in m.parameters()}
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            free = id(p) in norms or name.endswith("relative_position_bias_table")
            rate = lr if name.startswith("backbone.") else lr * head_rate
            groups.setdefault((rate, 0.0 if free else weight_decay), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def rates(steps, warmup):
    """Schedule step -> (1 − step/steps), in the first `warmup` steps times a line from 1e-6 to 1."""
    decay = poly(steps, 1.0)
    return lambda step: decay(step) * (1 - (1 - step / warmup) * (1 - 1e-6) if step < warmup else 1)


def train_segmenter(args, run, train_set):
    """Fig. 4.1: both heads at once, end to end."""
    run.reseed("segmenter")
    net = make_dfr(args, args.weights, len(train_set.classes))
    if args.seg_batch // world() < 2 and (world() == 1 or run.device.type == "cpu"):
        raise UserError(f"--seg-batch {args.seg_batch}: each process needs two images or more, since batch "
                        "norm sees one value an image in the coarsest pooling")
    ddp = run.place(net).train()
    groups = parameter_groups(net, args.weight_decay, args.seg_lr, args.head_rate)
    optim = torch.optim.AdamW(groups, lr=args.seg_lr, betas=(0.9, 0.999))
    draws, schedule = Draws(train_set, train_augment(args), args.seed), rates(args.seg_steps, args.warmup)
    for step, batch in run.steps("segmenter", draws, args.seg_steps, args.seg_batch, net, optim, schedule):
        label = batch.mask if args.supervision == "full" else batch.scribble            # [D11]
        with run.autocast():
            logits, feature, aux = ddp(batch.image)
        *losses, M = all_losses(args, logits, feature, batch.image, label, batch.pseudo != 255)
        loss = eq4_1_total(*losses, args.w_dfr, args.w_feature)
        if aux is not None: loss = loss + args.w_aux * eq4_2_partial_cross_entropy(aux, label)      # [D8]
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, **dict(zip(("loss_pce", "loss_dfr", "loss_fd", "loss_fr"), losses)),
                known=(label != 255).float().mean(), confident=(M != 255).float().mean(),
                background=(M == 0).float().mean())
    return net.eval()


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
def whole_cells(net, image):
    """Logits of an image of any size: padded to whole cells of the deepest tap, as training's crops are, so
    that cells lie where they lay there; enlarged, cropped back.   [D13]   (1,3,H,W) -> (1,K+1,H,W)"""
    H, W = image.shape[-2:]
    return F.interpolate(net(F.pad(image, (0, -W % 32, 0, -H % 32)))[0], scale_factor=4, mode="bilinear",
                         align_corners=False)[..., :H, :W]


@inference()
def predict(net, image, fit, scales, mirror, device):
    """Class probabilities, mean over scales (and mirror images).

    image (H,W,3) uint8 -> (K+1,H,W) float32
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    size, total = image.shape[:2], 0
    for scale in scales:
        scaled = resize_batch(x, [max(32, n) for n in fitted(size, fit, scale)])
        total = total + resample(whole_cells(net, scaled), size).softmax(1)
        if mirror:
            total = total + resample(whole_cells(net, scaled.flip(-1)), size).softmax(1).flip(-1)
    return (total[0] / (len(scales) * (1 + mirror))).cpu().numpy()


def predict_val(args, run, net, val_set):
    """Predictions at a single scale and at several.   Writes val/*.png and val_ms/*.png"""
    with run.timed("val"):
        for (name,) in run.todo(val_set.names, "val_ms"):
            image = val_set[val_set.index(name)].image
            single = predict(net, image, args.fit, (1.0,), False, run.device)
            many = predict(net, image, args.fit, args.test_scales, True, run.device)
            save_label(run.path("val", name), single.argmax(0))
            save_label(run.path("val_ms", name), many.argmax(0))


def evaluate_labels(args, run):
    """Scores what the stages wrote; miou_fg is the mean over the classes without background [D12]."""
    truth = load(args, "val", masks=True, fields=("mask",))
    if "mask" not in truth.fields:                                                    # own data may lack it
        return
    learnt = load(args, "train", fields=() if args.supervision == "full" else ("scribble",))

    def result(stage, scales):
        confusion = confusion_of(truth, lambda s: read_label(run.path(stage, s.name), truth.classes))
        fg = [value for name, value in list(confusion.iou().items())[1:] if value is not None]
        run.result(stage, confusion, split="val", n_images=len(truth), uses_masks=True, crf=False,
                   scales=scales, miou_fg=sum(fg) / len(fg) if fg else None,
                   notes={**truth.notes, **learnt.notes},
                   seconds=round(run.seconds("segmenter") + run.seconds("val"), 1))

    result("val", (1.0,))
    result("val_ms", args.test_scales)


def draw_dfr(args, run):
    """panels/val.png of what the stages wrote."""
    truth = load(args, "val", masks=True, fields=("mask",))
    draw_panels(run, "val", truth, {"prediction": "val", "multi-scale": "val_ms"})


def predict_folder(args):
    """--predict: multi-scale masks and overlays of a picture or a folder, by the network of --checkpoint.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    state, last = read_predictor(args, Args, "segmenter.pt", "classify.weight")
    device, made = start_processes(args.device), Args(**state["args"])
    net = with_weights(make_dfr(made, "none", len(state["model"][last]) - 1), state, device)
    for image, path in pictures_to_predict(args):
        prob = predict(net, image, made.fit, made.test_scales, True, device)
        save_prediction(path, image, prob.argmax(0))


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_dfr(args):
    """What would else fail after hours fails now."""
    if not 0 <= args.scribble_length <= 1:
        raise UserError(f"--scribble-length {args.scribble_length}: give a share from 0 to 1")
    if args.seg_crop % 32:
        raise UserError(f"--seg-crop {args.seg_crop}: give a multiple of 32, whole cells of the deepest tap")
    if min(args.fit) <= 0 < max(args.fit):
        raise UserError(f"--fit {args.fit[0]} {args.fit[1]}: give two sides above 0, or 0 0 for no scaling")
    if args.radius < 1 or min(args.sigma_xy, args.sigma_rgb, args.sigma_feature) <= 0:
        raise UserError("--radius: give 1 or more; --sigma-xy, --sigma-rgb, --sigma-feature: above 0")
    if args.supervision != "full" and args.dfr_loss and not kernel_parts(args):
        raise UserError(f"--kernel {args.kernel} without --consistency-head leaves nothing to compare")
    make_dfr(args, args.weights, 1)                                                    # wrong weights: now


def main():
    """Fig. 4.1 from training to test; --supervision full: the same network on ground truth."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    if args.predict:
        return predict_folder(args)
    label = "mask" if args.supervision == "full" else "scribble"
    train_set, val_set = load(args, "train", fields=(label,)), load(args, "val", fields=("mask",))
    check_dfr(args)
    run = Run(args, FIELDS)
    net = train_segmenter(args, run, train_set)                                         # Eqs. (4.1)–(4.13)
    predict_val(args, run, net, val_set)
    if not run.has("val_ms"):
        draw_dfr(args, run)
        evaluate_labels(args, run)
    run.table()


if __name__ == "__main__":
    main()
