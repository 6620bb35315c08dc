"""RRM: End-to-End Weakly Supervised Semantic Segmentation with Reliable Region Mining.
B. Zhang, J. Xiao, Y. Wei, K. Huang, S. Luo, Y. Zhao; Pattern Recognition 2022 (first version: AAAI 2020).
Equation numbers: B. Zhang's thesis, chapter 2.

Symbols      I image (B,3,H,W) · y tags (B,K), ŷ their logits · F features of the backbone (B,D,h,w) · ω
             weights of the classifier · M_cam CAM (B,K,H,W) · P_fg, P_bg scores in [0,1] · γ background decay
             I_cam, I_crf, I_final labels (H,W), 255 = unreliable; Φ labelled pixels · A affinity of all
             pairs of cells (B,N,N), N = h·w · A_w its re-weighting, e rank, N_k+ number of positive values
             F_l, F_g features of the local and the global sub-branch, F_m both · P_l, P_g scores
             (B,K+1,h,w) · P_net probability · S soft filter · G Gaussian kernel · M_p predicted mask ·
             F_ctr feature centres
Equations    (2.1) eq2_1_cam    (2.2) eq2_2_multi_scale    (2.3) eq2_3_foreground
             (2.4) eq2_4_background    (2.5) mine    (2.6) eq2_6_cam_label    (2.7) eq2_7_final_label
             (2.8) eq2_8_affinity    (2.9) eq2_9_reweight    (2.10) eq2_10_positive
             (2.11) eq2_11_attention    (2.12) eq2_12_global_feature    (2.13) eq2_13_average
             (2.14) eq2_14_classification    (2.15) eq2_15_joint    (2.16) eq2_16_cross_entropy
             (2.17–2.20) eq2_17_20_dense_energy    (2.21) eq2_21_soft_filter    (2.22) eq2_22_feature
             (2.23) eq2_23_mask    (2.24) eq2_24_25_centres    (2.25) eq2_24_25_centres    (2.26) eq2_26_bcd
Figures      Fig. 2.1 = RRM.forward, mine, joint_losses; Fig. 2.2 = ClassificationBranch.multi_scale_cam;
             Fig. 2.4 = RFAM; Algorithm 1 = train_joint
Commands     python rrm.py                             # embedded shapes, made for two CPU cores
             python rrm.py --data voc --root data/voc              # one step; paper (ResNet-38): 65.4 val
             python rrm.py --data voc --backbone resnet38 --weights FILE.params    # the paper's network
             python rrm.py --data voc --two-step                   # paper: 69.3 val with CRF
             python rrm.py --data voc --two-step --supervision full     # upper bounds; paper: 80.8, 76.8
             python rrm.py --no-energy-loss --no-bcd-loss --reuse runs/rrm-shapes-image-s0 --out runs/rrm-ce
             python rrm.py --predict photos/ --checkpoint runs/rrm-voc-image-s0/joint.pt
Departures   [D1] backbone: ResNet-50; the paper's ResNet-38 has weights only for MXNet
             [D2] two-step network: from ImageNet and trained at one scale a step; the paper's 69.3 starts
                  from a COCO-segmentation checkpoint
             [D3] Eq. 2.4: (1 − max)^γ as its source [18] and the authors' code; printed is 1 − max^γ, whose
                  background grows with γ
             [D4] α of Eq. 2.6: in each image the top 40 % of the class's own pixels, of background too
                  (§2.3.1: "for each class"; authors' code: background where (1 − max)^32 is above 0.8)
             [D5] one γ and agreement of labels alone, as printed; authors' code: two exponents, 4 for
                  foreground, 32 for background and CAM, and a CRF probability of 0.8: --gamma-high 32
                  --bg-min 0.8 --crf-min 0.8. That threshold belongs to that exponent: with γ = 4 alone it
                  would take a CAM of up to 5 % for background
             [D6] Eq. 2.9, second row: √((N_k − e)/(N_k − N_k+)), which is 1 next to the positive values and
                  falls to 0, as the text wants; --reweight literal as printed. No gradient through A_w
             [D7] Eq. 2.8: F₁F₂, since F₂ is C₁×HW already; no 1/√C₁, as the authors' code
             [D8] Eqs. 2.18, 2.20: 1/W is not defined; here 67/N², at the paper's crop the authors' 1e-7. Half
                  resolution; i = j is in the lattice's sum; S and the kernel as constants: −2·S·G P
             [D9] weight decay 5e-4 as printed (authors' code 1e-5); only the classifier learns x10, as the
                  authors' code (AAAI: all new layers, --heads-x10); biases x2, as PSA
             [D10] SGD without momentum: what the authors' optimiser really does
             [D11] joint training starts from a classifier by PSA's recipe, as the authors advise, and keeps
                  its batch norm (the authors' is frozen from the start)
             [D12] Eq. 2.26: N are the numbers of items of each sum (authors' code: cells averaged within a
                  class first, centres x0.5); an image without predicted background has no centre
             [D13] odd kernels centre feature cell i on pixel stride·i: so CAM and scores are enlarged
             [D14] --supervision full: L_class and the plain mean cross-entropy on ground truth, no more; in
                  presets at a rate of its own
             [D15] pseudo masks of the two-step extension: only classes of the image's tags (paper silent)
             [D16] CAM: negative scores are 0 (authors' code); the extra scales see the backbone in evaluation
                  mode. A crop's padding is never labelled and takes no part in energy and BCD loss
             [D17] presets: σ_d and the local dilation scaled with crop and grid, widths lowered; so few steps
                  need momentum and a branch that learns x10. Shapes have fewer colours: a pixel's kernel sums
                  to 3.9/67 of the crop, on VOC to 1.6/67; energy_pairs makes up for it
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    ASPP, CRF, DeepLab, Run, UserError, cells_to_pixels, confusion_of, dense_crf, dense_energy, draw_panels,
    inference, make_backbone, parse_args, pictures_to_predict, poly, pretrained, read_predictor, reduce,
    save_label, save_npz, save_prediction, start_processes, weights_of, with_weights, world)
from data import (
    MEAN, STD, Draws, Sample, changed, color_jitter, crop, flip, load, normalise, read_label, rescale,
    resize_batch, resize_long, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco", "workpiece"] = "shapes"
    """data set of data.py; shapes is drawn on the fly, workpiece is any folder of your own"""
    supervision: Literal["image", "full"] = "image"
    """what the training set may reveal; full = the same networks on ground truth (upper bound) [D14]"""
    backbone: Literal[
        "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "resnet50"
    """of RRM, its deepest tap is F; paper: resnet38 with --weights FILE.params [D1]"""
    seg_backbone: Literal[
        "same", "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2",
        "resnet38"] = "resnet101"
    """of the two-step extension's DeepLab-v2 (§2.3.3: ResNet-101). same = --backbone"""
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
    # --- 1 classifier (authors' code: PSA's recipe) ---
    init: Literal["classifier", "joint"] = "classifier"
    """joint training starts from a trained classifier [D11], or at once (authors' train_from_init)"""
    cam_stride: int = 8
    """output stride of the classifier"""
    cam_steps: int = 9_920
    """15 epochs of 10,582 images at batch 16"""
    cam_batch: int = 16
    """images a step, over all processes"""
    cam_lr: float = 0.1
    """backbone weights; biases x2, classifier x10; poly 0.9"""
    cam_momentum: float = 0.0
    """PSA says 0.9, its optimiser ran without [D10]; with 0.9 divide the rate by ten"""
    cam_crop: int = 448
    """pixels"""
    cam_resize: tuple[int, int] = (256, 512)
    """the longer side is drawn from this range"""
    # --- 2 on-line mining of reliable regions (§2.2.2) ---
    cam_scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """§2.3.1: scales of Eq. 2.2; only scale 1 is also trained on"""
    gamma: float = 4.0
    """γ of Eq. 2.4 (§2.3.1)"""
    gamma_high: float = 0.0
    """authors' code: 32, a second exponent, which decides background; 0 = the paper's one γ [D5]"""
    ratio: float = 0.4
    """§2.3.1: share of each class's pixels that stay, of background too (Table 2.1) [D4]"""
    fg_min: float = 0.1
    """authors' code: pixels with a lower score do not enter a class's ranking; it acts with --gamma-high 32
    alone, as a class wins against (1 − max)^4 from 0.28 on"""
    bg_min: float = 0.0
    """authors' code: 0.8, background stays where its score is above this; 0 = ranked by --ratio [D4]"""
    crf_min: float = 0.0
    """authors' code: 0.8, the CRF probability that a label needs; 0 = Eq. 2.7 as printed [D5]"""
    confident: bool = True
    """select by α of Eq. 2.6 (Table 2.4, Conf.); without, each pixel keeps its CAM label"""
    mining_crf: bool = True
    """agreement with the CRF, Eqs. 2.5 and 2.7 (Tables 2.2 and 2.4)"""
    cam_crf: CRF = CRF(3, 3, 80, 13, 10, 10)
    """[18]'s (PSA): Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations"""
    # --- 3 segmentation branch (§2.2.3) ---
    branch: Literal["local", "global", "both"] = "both"
    """sub-branches that are built, trained and used (Table 2.3)"""
    reweight: Literal["text", "literal", "none"] = "text"
    """A_w of Eq. 2.9: as the text describes it, as printed [D6], or none: Table 2.5's FAM"""
    shared_backbone: bool = True
    """one backbone for both branches; without, each branch trains its own (§2.3.2: 61.7)"""
    stride: int = 8
    """output stride of the backbone"""
    local_dilation: int = 12
    """§2.3.1: of the local sub-branch's two convolutions [D17]"""
    local_width: int = 512
    """§2.3.1: C_l"""
    attention_width: int = 256
    """§2.3.1: C_1, and width of the convolution behind R-FAM"""
    # --- 4 joint training (§2.2.4) ---
    joint_steps: int = 40_000
    """§2.3.1"""
    warmup: int = 0
    """first steps with L_class alone; authors' train_from_init: half of them"""
    joint_batch: int = 8
    """§2.3.1: images a step, over all processes; BCD's centres are those of each process's part"""
    joint_lr: float = 1e-3
    """§2.3.1; biases x2, classifier x10; poly 0.9"""
    joint_momentum: float = 0.0
    """the paper names none, authors' code ran without [D10]; with 0.9 divide the rate by ten: at more than
    the paper's rate joint training spoiled the CAM that it learns from (shapes)"""
    full_lr: float = 0.0
    """instead of joint_lr with --supervision full, which has no CAM that a larger rate could spoil; 0 = it"""
    heads_x10: bool = False
    """AAAI version: the segmentation branch learns x10 too [D9]"""
    weight_decay: float = 5e-4
    """§2.3.1; authors' code 1e-5 [D9]. Of all networks"""
    joint_crop: int = 321
    """§2.3.1, pixels"""
    joint_rescale: tuple[float, float] = (0.7, 1.3)
    """§2.3.1: range of the random scale"""
    energy_loss: bool = True
    """L_energy, Eq. 2.20 (Table 2.3)"""
    w_energy: float = 1.0
    """λ1 of Eq. 2.15"""
    energy_pairs: float = 67.0
    """1/W of Eq. 2.18 is this / N², N pixels; with N = 161², the paper's crop, the authors' 1e-7 [D8]"""
    energy_xy: float = 100.0
    """σ_d of Eq. 2.18, pixels of the crop"""
    energy_rgb: float = 15.0
    """σ_r of Eq. 2.18, colours 0 to 255"""
    energy_scale: float = 0.5
    """authors' code: resolution at which the energy is taken"""
    bcd_loss: bool = True
    """L_BCD, Eq. 2.26 (Table 2.3)"""
    # --- 5 inference (§2.3.1) and the two-step extension (§2.3.3) ---
    test_scales: tuple[float, ...] = (1.0,)
    """of RRM's predictions; authors' code: one scale, no mirror image"""
    post_crf: CRF = CRF(3, 3, 83, 5, 4, 10)
    """of RRM's predictions (authors' code)"""
    two_step: bool = False
    """train DeepLab-v2 on RRM's predictions for the training set"""
    pseudo_tags: bool = True
    """pseudo masks hold classes of the image's tags only [D15]"""
    seg_steps: int = 20_000
    """DeepLab-v2's public PyTorch recipe"""
    seg_batch: int = 10
    """images a step, over all processes"""
    seg_lr: float = 2.5e-4
    """backbone; head x10, its biases x20; poly 0.9; momentum 0.9"""
    seg_crop: int = 321
    """pixels"""
    seg_rescale: tuple[float, float] = (0.5, 1.5)
    """range of the random scale"""
    seg_stride: int = 8
    """output stride of DeepLab"""
    seg_rates: tuple[int, ...] = (6, 12, 18, 24)
    """dilations of DeepLab-v2's ASPP; one beyond the crop's cells is never trained, yet speaks in tests"""
    seg_scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    """of DeepLab's predictions, each with its mirror image"""
    seg_crf: CRF = CRF(1, 3, 67, 3, 4, 10)
    """DeepLab-v2's"""


# What two CPU cores do in minutes; everything else as the paper.
SHAPES = dict(
    backbone="tiny", seg_backbone="tiny", weights="none", cam_stride=8, stride=4, seg_stride=4,
    cam_steps=4000, cam_batch=8, cam_lr=0.05, cam_momentum=0.9, cam_crop=96, cam_resize=(96, 128),
    local_dilation=6, local_width=64, attention_width=32, energy_xy=30, energy_pairs=28,    # [D17]
    joint_steps=600, joint_batch=4, joint_lr=1e-4, full_lr=3e-3, joint_momentum=0.9, heads_x10=True,
    joint_crop=96,
    seg_steps=4000, seg_batch=8, seg_lr=0.02, seg_crop=96, seg_rates=(3, 6, 9, 12), seg_rescale=(0.75, 1.25),
    seg_scales=(0.75, 1.0, 1.25))
# A few hundred photographs with a pretrained backbone on two CPU cores.
PHOTOS = dict(
    seg_backbone="same", train_list="train", cam_stride=16, stride=16, seg_stride=16,
    cam_steps=330, cam_batch=8, cam_lr=0.02, cam_crop=321, cam_resize=(321, 513),
    local_dilation=6, local_width=256, attention_width=128, energy_xy=80,
    joint_steps=300, joint_lr=1e-4, full_lr=1e-3, joint_momentum=0.9, heads_x10=True,
    joint_crop=257, joint_rescale=(0.56, 1.04),             # the paper's 0.7 to 1.3 of a crop of 321
    seg_steps=1000, seg_batch=8, seg_lr=5e-4, seg_crop=257, seg_rates=(3, 6, 9, 12),
    seg_scales=(0.75, 1.0, 1.25))

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "classifier": "data root train_list seed amp weights backbone cam_stride cam_steps cam_batch cam_lr "
                  "cam_momentum cam_crop cam_resize weight_decay",
    "joint": "supervision crf init cam_scales gamma gamma_high ratio fg_min bg_min crf_min confident "
             "mining_crf cam_crf branch reweight shared_backbone stride local_dilation local_width "
             "attention_width joint_steps warmup joint_batch joint_lr full_lr joint_momentum heads_x10 "
             "joint_crop joint_rescale energy_loss w_energy energy_pairs energy_xy energy_rgb energy_scale "
             "bcd_loss",
    "seeds": "",
    "pseudo": "test_scales post_crf pseudo_tags",
    "segmenter": "seg_backbone seg_steps seg_batch seg_lr seg_crop seg_rescale seg_stride seg_rates",
}.items()}


# ── Networks (§2.2.2, §2.2.3) ───────────────────────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class ClassificationBranch(nn.Module):
    """Classification branch with its backbone (§2.2.2): global average pooling, then a linear layer ω.

    forward(image (B,3,H,W))  ->  ŷ (B,K), F (B,D,h,w)
    """

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.dropout = backbone, nn.Dropout2d(0.5)
        self.classifier = nn.Conv2d(backbone.channels[-1], classes, 1, bias=False)

    def forward(self, image):
        feature = self.backbone(image)[-1]
        pooled = self.dropout(feature).mean((2, 3), keepdim=True)
        return self.classifier(pooled)[:, :, 0, 0].float(), feature

    @torch.no_grad()
    def multi_scale_cam(self, image, feature, scales, stride):
        """Fig. 2.2: M_cam (B,K,H,W) of the image, whose F at scale 1 is given.   [D16]"""
        size, training, cams = image.shape[-2:], self.backbone.training, []
        self.backbone.eval()                    # the extra scales must not enter batch norm's statistics
        for scale in scales:
            seen = size if scale == 1 else [max(32, round(n * scale)) for n in size]
            maps = feature if scale == 1 else self.backbone(resize_batch(image, seen))[-1]
            with torch.autocast(image.device.type, enabled=False):          # bf16 is too coarse for ranks
                cams.append(eq2_1_cam(maps.float(), self.classifier.weight, stride, size, seen))
        self.backbone.train(training)
        return eq2_2_multi_scale(cams)


class RFAM(nn.Module):
    """Re-weighting feature attention module (Fig. 2.4): F (B,D,h,w) -> F_g (B,2·C_1,h,w), float32."""

    def __init__(self, channels, width, reweight):
        super().__init__()
        self.reweight = reweight
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1, bias=False) for _ in range(3))

    def forward(self, feature):
        F1, F2, F3 = (conv(feature).float().flatten(2) for conv in self.project)        # (B,C_1,N)
        F1, F3 = F1.transpose(1, 2), F3.transpose(1, 2)                                 # (B,N,C_1)
        with torch.autocast(feature.device.type, enabled=False):                        # ranks need float32
            if self.reweight == "none":
                heads = (t[:, None] for t in (F1, F2.transpose(1, 2), F3))
                F_a = F.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]
            else:
                A = eq2_8_affinity(F1, F2)
                F_a = eq2_11_attention(A, eq2_9_reweight(A.detach(), self.reweight), F3)
        return eq2_12_global_feature(F_a, F3, feature.shape[-2:])


class RRM(nn.Module):
    """Both branches (Fig. 2.1).   forward(image (B,3,H,W), scales of the CAM, none of them: no CAM)
    ->  ŷ (B,K), M_cam (B,K,H,W) or None, scores (B,K+1,h,w), F_m (B,C_l+C_g,h,w)

    own_backbone: the segmentation branch's, None = it shares the classifier's
    """

    def __init__(self, classification, own_backbone, classes, stride, branch, reweight, dilation,
                 local_width, width):
        super().__init__()
        self.classification, self.own_backbone, self.stride = classification, own_backbone, stride
        channels, self.branches = classification.backbone.channels[-1], nn.ModuleDict()
        if branch != "global":
            self.branches["local"] = nn.Sequential(
                nn.Sequential(nn.Conv2d(channels, local_width, 3, padding=dilation, dilation=dilation,
                                        bias=False), nn.ReLU()),
                nn.Conv2d(local_width, classes + 1, 3, padding=dilation, dilation=dilation, bias=False))
        if branch != "local":
            self.branches["global"] = nn.Sequential(
                RFAM(channels, width, reweight),
                nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.ReLU(),
                              nn.Conv2d(width, classes + 1, 3, padding=1, bias=False)))
        for layer in self.branches.modules():
            if isinstance(layer, nn.Conv2d): nn.init.xavier_uniform_(layer.weight)

    def segment(self, image, feature=None):
        """Segmentation branch: scores (P_l + P_g)/2 (B,K+1,h,w) and F_m."""
        if feature is None or self.own_backbone is not None:
            feature = (self.own_backbone or self.classification.backbone)(image)[-1]
        features = [first(feature) for first, _ in self.branches.values()]              # F_l, F_g
        scores = [last(f).float() for f, (_, last) in zip(features, self.branches.values())]
        return eq2_13_average(scores), eq2_22_feature(features)

    def forward(self, image, scales=()):
        y, feature = self.classification(image)
        cam = self.classification.multi_scale_cam(image, feature, scales, self.stride) if scales else None
        return y, cam, *self.segment(image, feature)


# ── Re-weighted attention (Eqs. 2.8–2.13) ───────────────────────────────────────────────────────────────────
def eq2_8_affinity(F1, F2):
    """Eq. (2.8): A = F₁ F₂.   [D7]   F1 (B,N,C_1), F2 (B,C_1,N) -> (B,N,N), row k: pixel k's attention"""
    return F1 @ F2


def eq2_10_positive(A):
    """Eq. (2.10): N_k+ = Σ_m [A(m|k) > 0].   (B,N,N) -> (B,N,1)"""
    return (A > 0).sum(-1, keepdim=True)


def eq2_9_reweight(A, mode="text"):
    """Eq. (2.9): A_w = e/N_k+ where A > 0; elsewhere √((N_k − e)/(N_k − N_k+)), e the 1-based rank of A in
    its row, largest first.   [D6]   mode literal: √(|N_k+ − e|/N_k+) elsewhere   (B,N,N) -> (B,N,N) float32
    """
    N = A.shape[-1]
    order = (A.argsort(dim=-1, descending=True, stable=True) if A.is_cuda else
             torch.from_numpy(np.argsort(-A.numpy(), axis=-1)))             # on the CPU five times faster
    e = torch.empty_like(A, dtype=torch.float32)
    e.scatter_(-1, order, torch.arange(1.0, N + 1, device=A.device).expand_as(e))
    positive = eq2_10_positive(A)
    top = e / positive.clamp_min(1)
    if mode == "literal":
        low = ((positive - e).abs() / positive.clamp_min(1)).sqrt()
    else:
        low = ((N - e) / (N - positive).clamp_min(1)).sqrt()
    return torch.where(A > 0, top, low)


def eq2_11_attention(A, A_w, F3):
    """Eq. (2.11): F_a = (softmax(A) ⊙ A_w) F₃, not normalised again.   (B,N,N), (B,N,N), (B,N,C_1)"""
    return (A.softmax(-1) * A_w) @ F3


def eq2_12_global_feature(F_a, F3, size):
    """Eq. (2.12): F_g = concat(F_a, F₃).   (B,N,C_1) twice -> (B,2·C_1,h,w)"""
    return torch.cat([F_a, F3], dim=-1).transpose(1, 2).unflatten(2, tuple(size))


def eq2_13_average(scores):
    """Eq. (2.13): (P_l + P_g)/2; P_net is its softmax, taken where it is used.   list of (B,C,h,w)"""
    return sum(scores) / len(scores)


# ── Mining of reliable regions (Eqs. 2.1–2.7) ───────────────────────────────────────────────────────────────
def eq2_1_cam(feature, weight, stride, size, seen):
    """Eq. (2.1): M_ocam = RS(Σ_ch ω F).   feature (B,D,h,w) of the image seen at size `seen`, weight
    (K,D,1,1) -> (B,K,*size), negative scores cut [D16] [D13]"""
    return cells_to_pixels(F.relu(F.conv2d(feature, weight)), stride, size, seen)


def eq2_2_multi_scale(cams):
    """Eq. (2.2): M_cam = Σ_i M_ocam(s_i) / (n + 1).   list of (B,K,H,W)"""
    return sum(cams) / len(cams)


def eq2_3_foreground(cam):
    """Eq. (2.3): P_fg = M_cam / max(M_cam), a map without a positive score stays 0.   (k,H,W)"""
    return cam / cam.amax((-2, -1), keepdim=True).clamp_min(1e-5)


def eq2_4_background(P_fg, gamma):
    """Eq. (2.4): P_bg = (1 − max_c P_fg)^γ.   [D3]   (k,H,W) -> (1,H,W); 1 for an image without a class"""
    return (1 - F.pad(P_fg, (0, 0, 0, 0, 1, 0)).amax(0, keepdim=True)) ** gamma


def keep_top(score, candidate, ratio):
    """Where `candidate`, the largest `ratio` of them by score (and what equals the last).   (H,W) -> bool"""
    values = score[candidate].sort(descending=True).values
    keep = int(np.ceil(ratio * len(values)))
    return candidate & (score >= values[keep - 1]) if keep else torch.zeros_like(candidate)


def eq2_6_cam_label(P, valid, ratio, fg_min, bg_min):
    """Eq. (2.6): I_cam = arg-max of P_fg-bg where it is above α, else 255.   [D4]

    P (1+k,H,W), background first; valid (H,W) bool: False pixels get no label and no rank
    """
    winner = P.argmax(0)
    sure = (winner == 0) & valid
    sure = sure & (P[0] > bg_min) if bg_min > 0 else keep_top(P[0], sure, ratio)
    for c in range(1, len(P)):
        sure |= keep_top(P[c], (winner == c) & valid & (P[c] > fg_min), ratio)
    return torch.where(sure, winner, 255)


def crf_label(Q, crf_min):
    """I_crf of Eq. (2.5)'s probabilities Q (U,1+k,H,W).   -> (H,W)

    U = 1: their arg-max. U = 2, authors' code: foreground where it wins against the large background (first),
    background where it wins against the small one (last), else 255. Below crf_min: 255.
    """
    (low_p, low), (high_p, high) = Q[0].max(0), Q[-1].max(0)
    label = torch.where((low > 0) & (low_p >= crf_min), low, 255)
    return torch.where((high == 0) & (high_p >= crf_min) & (low == 0), 0, label)


def eq2_7_final_label(I_cam, I_crf):
    """Eq. (2.7): I_final = I_cam where it equals I_crf, else 255.   (H,W)"""
    return torch.where(I_cam == I_crf, I_cam, 255)


@torch.no_grad()
def mine(rgb, cam, tags, valid, gammas, ratio, fg_min, bg_min, crf_min, confident, crf, backend="torch",
         workers=0):
    """Eqs. (2.3)–(2.7): the labels I_final of a batch.   -> (B,H,W) int64, 255 = unreliable

    rgb (B,3,H,W) 0..255, cam (B,K,H,W) M_cam, tags (B,K), valid (B,H,W) bool; gammas: one or two background
    exponents; crf: None = no CRF
    """
    own = [torch.cat([row.new_zeros(1).long(), row.nonzero()[:, 0] + 1]) for row in tags]
    unaries = []
    for b, classes in enumerate(own):
        P_fg = eq2_3_foreground(cam[b, classes[1:] - 1])
        unaries.append(torch.stack([torch.cat([eq2_4_background(P_fg, g), P_fg]) for g in gammas]))
    if crf is not None:                                                                 # Eq. (2.5)
        images = list(rgb.permute(0, 2, 3, 1).cpu().numpy())
        refined = dense_crf(images, unaries, crf, backend, workers, rgb.device)
        refined = [torch.as_tensor(Q, device=rgb.device) for Q in refined]
    labels = []
    for b, classes in enumerate(own):
        P = unaries[b][-1]
        label = (eq2_6_cam_label(P, valid[b], ratio, fg_min, bg_min) if confident else
                 torch.where(valid[b], P.argmax(0), 255))
        if crf is not None:
            label = eq2_7_final_label(label, crf_label(refined[b], crf_min))
        known = classes[label.clamp_max(len(classes) - 1)]
        labels.append(torch.where(label == 255, 255, known))
    return torch.stack(labels)


def mining_options(args):
    """The fields of Args that `mine` takes."""
    gammas = (args.gamma, args.gamma_high) if args.gamma_high else (args.gamma,)
    return dict(gammas=gammas, ratio=args.ratio, fg_min=args.fg_min, bg_min=args.bg_min, crf_min=args.crf_min,
                confident=args.confident, crf=args.cam_crf if args.mining_crf else None, backend=args.crf,
                workers=args.workers)


def to_rgb(image):
    """The network's input back to colours 0..255, whole numbers.   (B,3,H,W)"""
    mean, std = (torch.tensor(t, device=image.device).view(3, 1, 1) for t in (MEAN, STD))
    return (255 * (image * std + mean)).round_().clamp_(0, 255)


# ── Losses (Eqs. 2.14–2.26) ─────────────────────────────────────────────────────────────────────────────────
def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq2_14_classification(y_hat, y):
    """Eq. (2.14): multi-label soft margin loss.   (B,K), (B,K)"""
    return F.multilabel_soft_margin_loss(y_hat, y)


def eq2_15_joint(L_ce, L_energy, L_bcd, w_energy):
    """Eq. (2.15): L_joint_seg = L_ce + λ1 L_energy + L_BCD."""
    return L_ce + w_energy * L_energy + L_bcd


def eq2_16_cross_entropy(scores, label):
    """Eq. (2.16): −log P_net at the labelled pixels, mean over background plus mean over foreground (§2.3.1).

    scores (B,C,H,W), label (B,H,W), 255 = unlabelled
    """
    nll = F.cross_entropy(scores, label, ignore_index=255, reduction="none")
    return masked_mean(nll, label == 0) + masked_mean(nll, (label > 0) & (label != 255))


def eq2_21_soft_filter(P_net, labelled):
    """Eq. (2.21): S = 1 − max_c P_net where labelled, else 1.   (B,C,h,w), (B,h,w) bool -> (B,h,w)"""
    return torch.where(labelled, 1 - P_net.detach().amax(1), 1.0)


def eq2_17_20_dense_energy(scores, stride, label, rgb, valid, sigma_d, sigma_r, pairs, scale):
    """Eqs. (2.17)–(2.20): Σ_ij S(i) G(i,j) Σ_c P^c(i) (1 − P^c(j)), 1/W = pairs/N², mean over images.   [D8]

    scores (B,C,h,w), a cell each `stride` pixels; label, valid (B,H,W) and rgb (B,3,H,W) of the crop;
    sigma_d in pixels of the crop
    """
    size = [max(1, round(n * scale)) for n in rgb.shape[-2:]]
    P_net = cells_to_pixels(scores, stride, size, rgb.shape[-2:]).softmax(1)
    state = torch.stack([label != 255, valid], dim=1).float()
    labelled, inside = F.interpolate(state, size, mode="nearest").bool().unbind(1)
    energy = dense_energy(resample(rgb, size), P_net, sigma_r, sigma_d * scale, inside,
                          eq2_21_soft_filter(P_net, labelled))
    return pairs / (size[0] * size[1]) ** 2 * energy


def eq2_22_feature(features):
    """Eq. (2.22): F_m = concat(F_l, F_g).   list of (B,C,h,w)"""
    return torch.cat([f.float() for f in features], dim=1)


def eq2_23_mask(scores, valid):
    """Eq. (2.23): M_p = arg-max_c P_net on the cells, 255 in padding.   (B,C,h,w), (B,H,W) -> (B,h,w)"""
    inside = F.interpolate(valid[:, None].float(), scores.shape[-2:], mode="nearest")[:, 0] > 0
    return torch.where(inside, scores.argmax(1), 255)


def eq2_24_25_centres(F_m, member):
    """Eqs. (2.24), (2.25): mean feature of each group of cells.   (P,D), member (P,G) 0/1 -> (G,D)"""
    return member.T @ F_m / member.sum(0)[:, None].clamp_min(1)


def eq2_26_bcd(F_m, M_p, classes):
    """Eq. (2.26): mean 1 + cos of the centres of two foreground classes, and of a class and a background;
    plus mean 1 − cos of foreground cells and their centre, and of background cells and theirs.   [D12]

    F_m (B,D,h,w), M_p (B,h,w) of 0..classes, 255 = padding; a term without items is 0
    """
    B, K = len(M_p), classes
    image = torch.arange(B, device=M_p.device)[:, None, None].expand_as(M_p)
    group = torch.where(M_p == 0, K + image, M_p - 1).flatten()     # c: c − 1; background of b: K + b
    group[M_p.flatten() == 255] = -1
    features = F_m.permute(0, 2, 3, 1).flatten(0, 2)                                    # (B·h·w,D)
    member = (group[:, None] == torch.arange(K + B, device=group.device)).float()
    centres = F.normalize(eq2_24_25_centres(features, member), dim=1)
    there, foreground = member.any(0), torch.arange(K + B, device=group.device) < K
    fg, bg = there & foreground, there & ~foreground
    apart = 1 + centres @ centres.T
    pairs = fg[:, None] & fg & ~torch.eye(K + B, dtype=torch.bool, device=fg.device)    # [c_i ≠ c_j]
    own = centres[group.clamp_min(0)]
    near = 1 - (F.normalize(features, dim=1) * own).sum(1)
    is_bg, is_fg = (M_p == 0).flatten(), ((M_p > 0) & (M_p != 255)).flatten()
    return (masked_mean(apart, pairs) + masked_mean(apart, fg[:, None] & bg)
            + masked_mean(near, is_fg) + masked_mean(near, is_bg))


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────
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


def make_classifier(args, stride, weights, classes):
    """Classification branch; weights "none" where they are loaded afterwards."""
    start = pretrained(args.backbone, args.weights)
    return ClassificationBranch(make_backbone(args.backbone, weights, stride, start), classes)


def make_rrm(args, weights, classes):
    """RRM; weights "none" where they are loaded afterwards.

    Without shared_backbone the segmentation branch's own starts from the same weights, and no loss of one
    branch reaches the other: two networks, trained apart.
    """
    classification, own = make_classifier(args, args.stride, weights, classes), None
    if args.init == "classifier":
        classification.backbone.freeze()                                                # [D11]
    if not args.shared_backbone:
        own = make_classifier(args, args.stride, weights, classes).backbone
    return RRM(classification, own, classes, args.stride, args.branch, args.reweight, args.local_dilation,
               args.local_width, args.attention_width)


def train_classifier(args, run, train_set):
    """Classification branch alone on image tags, PSA's recipe.   [D11]"""
    def augment(sample, rng):
        sample = resize_long(sample, int(rng.integers(args.cam_resize[0], args.cam_resize[1] + 1)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(color_jitter(sample, rng, 0.3, 0.3, 0.3, 0.1), args.cam_crop, rng))

    run.reseed("classifier")
    net = make_classifier(args, args.cam_stride, args.weights, len(train_set.classes))
    ddp = run.place(net).train()
    new_layers = [net.classifier] if pretrained(args.backbone, args.weights) else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.cam_lr, args.weight_decay),
                            lr=args.cam_lr, momentum=args.cam_momentum)
    draws, schedule = Draws(train_set, augment, args.seed), poly(args.cam_steps)
    for step, batch in run.steps("classifier", draws, args.cam_steps, args.cam_batch, net, optim, schedule):
        with run.autocast():
            y_hat, _ = ddp(batch.image)
        loss = eq2_14_classification(y_hat, batch.tags)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss_class=loss)
    return net


def joint_losses(args, scores, F_m, label, rgb, valid, classes):
    """L_ce, L_energy, L_BCD of the segmentation branch; those switched off are 0."""
    large, zero = cells_to_pixels(scores, args.stride, label.shape[-2:]), scores.new_zeros(())  # [D13]
    if args.supervision == "full":                                                      # [D14]
        nll = F.cross_entropy(large, label, ignore_index=255, reduction="none")
        return masked_mean(nll, label != 255), zero, zero
    loss_energy = loss_bcd = zero
    if args.energy_loss:
        loss_energy = eq2_17_20_dense_energy(scores, args.stride, label, rgb, valid, args.energy_xy,
                                             args.energy_rgb, args.energy_pairs, args.energy_scale)
    if args.bcd_loss:
        loss_bcd = eq2_26_bcd(F_m, eq2_23_mask(scores, valid), classes)
    return eq2_16_cross_entropy(large, label), loss_energy, loss_bcd


def joint_augment(args):
    """§2.3.1's augmentation; `pseudo` becomes 255 in the crop's padding, 0 elsewhere."""
    def augment(sample, rng):
        sample = changed(sample, pseudo=np.zeros_like(sample.image[..., 0]))
        sample = rescale(sample, rng.uniform(*args.joint_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.joint_crop, rng))
    return augment


def train_joint(args, run, classifier, train_set):
    """Algorithm 1: both branches at once, on labels that are mined in each step."""
    run.reseed("joint")
    full, classes = args.supervision == "full", len(train_set.classes)
    net = make_rrm(args, args.weights, classes)
    if classifier is not None:
        net.classification.load_state_dict(classifier.state_dict())                     # [D11]
    ddp = run.place(net).train()
    new_layers = [net.classification.classifier, *([net.branches] if args.heads_x10 else [])]
    lr = args.full_lr if full and args.full_lr else args.joint_lr
    optim = torch.optim.SGD(group_rates(net, new_layers, lr, args.weight_decay), lr=lr,
                            momentum=args.joint_momentum)
    draws, schedule = Draws(train_set, joint_augment(args), args.seed), poly(args.joint_steps)
    for step, batch in run.steps("joint", draws, args.joint_steps, args.joint_batch, net, optim, schedule):
        with run.autocast():
            y_hat, cam, scores, F_m = ddp(batch.image, () if full else args.cam_scales)
        rgb, valid = to_rgb(batch.image), batch.pseudo != 255
        label = batch.mask if full else mine(rgb, cam, batch.tags, valid, **mining_options(args))
        loss_class = eq2_14_classification(y_hat, batch.tags)
        loss_ce, loss_energy, loss_bcd = joint_losses(args, scores, F_m, label, rgb, valid, classes)
        joint = eq2_15_joint(loss_ce, loss_energy, loss_bcd, args.w_energy)
        loss = loss_class + (step >= args.warmup) * joint
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss_class=loss_class, loss_ce=loss_ce, loss_energy=loss_energy, loss_bcd=loss_bcd,
                known=(label != 255).float().mean(), background=(label == 0).float().mean())
    return net.eval()


def make_segmenter(backbone, weights, stride, rates, classes):
    """DeepLab-v2.   [D2]"""
    net = make_backbone(backbone, weights_of(backbone, weights), stride, pretrained(backbone, weights))
    return DeepLab(net, ASPP(net.channels[-1], classes + 1, rates))


def train_segmenter(args, run, train_set):
    """Two-step extension (§2.3.3): DeepLab-v2 on the pseudo masks, or on ground truth."""
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.seg_crop, rng))

    run.reseed("segmenter")
    net = make_segmenter(args.seg_backbone, args.weights, args.seg_stride, args.seg_rates,
                         len(train_set.classes))
    ddp, stride = run.place(net).train(), net.backbone.strides[-1]
    new_layers = [net.head] if pretrained(args.seg_backbone, args.weights) else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.seg_lr, args.weight_decay),
                            lr=args.seg_lr, momentum=0.9)
    full = args.supervision == "full"
    labelled = train_set if full else with_labels(train_set, pseudo=run.dir / "pseudo")
    draws, schedule = Draws(labelled, augment, args.seed), poly(args.seg_steps)
    for step, batch in run.steps("segmenter", draws, args.seg_steps, args.seg_batch, net, optim, schedule):
        label = batch.mask if full else batch.pseudo
        with run.autocast():
            logits = ddp(batch.image)
        logits = cells_to_pixels(logits.float(), stride, label.shape[-2:])                      # [D13]
        loss = masked_mean(F.cross_entropy(logits, label, ignore_index=255, reduction="none"), label != 255)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, known=(label != 255).float().mean(), background=(label == 0).float().mean())
    return net.eval()


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
@inference()
def predict(score, image, stride, scales, mirror, device):
    """Class probabilities, mean over scales (and mirror images).

    score: function (1,3,H,W) -> scores (1,K+1,h,w), a cell each `stride` pixels
    image (H,W,3) uint8 -> (K+1,H,W) float32
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    size, total = image.shape[:2], 0
    for scale in scales:
        seen = [max(32, round(n * scale)) for n in size]
        scaled = resize_batch(x, seen)
        total = total + cells_to_pixels(score(scaled).float(), stride, size, seen).softmax(1)
        if mirror:
            turned = cells_to_pixels(score(scaled.flip(-1)).float(), stride, size, seen)
            total = total + turned.flip(-1).softmax(1)
    return (total[0] / (len(scales) * (1 + mirror))).cpu().numpy()


def one_step(net):
    """RRM at inference: the segmentation branch alone (§2.3.1)."""
    return lambda image: net.segment(image)[0]


def predict_set(args, run, score, dataset, plain, sharp, crf, stride, scales, mirror, by_tags=False):
    """Predictions without and with CRF.   Writes <plain>/*.png and <sharp>/*.png

    by_tags [D15]: classes that the image does not have, by its tags, get probability 0
    """
    with run.timed(plain):
        for names in run.todo(dataset.names, sharp, chunk=16, stage=sharp, beside=(plain,)):
            samples = [dataset[dataset.index(name)] for name in names]
            probs = [predict(score, s.image, stride, scales, mirror, run.device) for s in samples]
            if by_tags:
                probs = [prob * np.r_[True, s.tags][:, None, None] for s, prob in zip(samples, probs)]
                probs = [prob / prob.sum(0, keepdims=True).clip(1e-12) for prob in probs]
            refined = dense_crf([s.image for s in samples], probs, crf, args.crf, args.workers, run.device)
            for name, prob, Q in zip(names, probs, refined):
                save_label(run.path(plain, name), prob.argmax(0))
                save_label(run.path(sharp, name), Q.argmax(0))


@inference()
def write_mined(args, run, net, train_set):
    """CAM and I_final of the whole training images, by the trained network: what the mining has become.

    Writes cam/*.npz (P_fg) and seeds/*.png. Nothing is trained on them.
    """
    with run.timed("seeds"):
        for (name,) in run.todo(train_set.names, "seeds", stage="seeds", beside=("cam",)):
            sample = train_set[train_set.index(name)]
            s = normalise(sample)
            x = s.image[None].to(run.device, memory_format=torch.channels_last)
            feature = net.classification(x)[1]
            cam = net.classification.multi_scale_cam(x, feature, args.cam_scales, args.stride)
            tags, valid = s.tags[None].to(run.device), torch.ones_like(x[:, 0], dtype=torch.bool)
            label = mine(to_rgb(x), cam, tags, valid, **mining_options(args))[0]
            present = np.flatnonzero(sample.tags)
            P_fg = eq2_3_foreground(cam[0])[present].cpu().numpy()
            save_npz(run.path("cam", name, ".npz"), cam=P_fg.astype(np.float16), present=present)
            save_label(run.path("seeds", name), label.cpu())


def read_cam(run, name, classes):
    """cam/<name>.npz -> (K,H,W) float32, absent classes 0."""
    with np.load(run.path("cam", name, ".npz")) as file:
        cam = np.zeros((classes, *file["cam"].shape[1:]), np.float32)
        cam[file["present"]] = file["cam"]
    return cam


def evaluate_labels(args, run, split):
    """Scores what the stages wrote. Only here and in draw_rrm are masks of weak labels' images seen."""
    truth = load(args, split, masks=True, fields=("mask",))
    if "mask" not in truth.fields:                                                    # own data may lack it
        return

    def cam_label(sample):
        P_fg = torch.from_numpy(read_cam(run, sample.name, len(truth.classes)))
        return torch.cat([eq2_4_background(P_fg, args.gamma_high or args.gamma), P_fg]).argmax(0).numpy()

    def result(stage, confusion, timed, **values):
        run.result(stage, confusion, split=split, n_images=len(truth), uses_masks=True,
                   seconds=round(sum(map(run.seconds, timed)), 1), notes=truth.notes, **values)

    def written(folder):
        return confusion_of(truth, lambda s: read_label(run.path(folder, s.name), truth.classes))

    if split == "train":
        result("cam", confusion_of(truth, cam_label), ["classifier"], crf=False, scales=args.cam_scales)
        seed = written("seeds")
        result("seed", seed, ["seeds"], crf=args.mining_crf, precision=seed.precision(),
               coverage=seed.coverage())
        if args.two_step:
            result("pseudo", written("pseudo"), ["pseudo_raw"], crf=True, scales=args.test_scales,
                   miou_no_crf=written("pseudo_raw").miou())
        return
    speed = {}                                                                          # Table 2.4's Speed
    if "joint" not in run.results.get("reused", {}):
        speed["seconds_a_step"] = round(run.seconds("joint") / max(1, args.joint_steps), 4)
    for stage in ("val", "val_crf"):
        result(stage, written(stage), ["joint", "val"], crf="crf" in stage, scales=args.test_scales,
               **speed)
    for stage in ("val_two_step", "val_two_step_crf") if args.two_step else ():
        result(stage, written(stage), ["segmenter", "val_two_step"], crf="crf" in stage,
               scales=args.seg_scales)


def draw_rrm(args, run, split):
    """panels/<split>.png of what the stages wrote."""
    truth = load(args, split, masks=True, fields=("mask",))
    if split == "train":
        columns = {"CAM": lambda s: read_cam(run, s.name, len(truth.classes)).max(0),
                   "reliable regions": "seeds", **({"pseudo mask": "pseudo"} if args.two_step else {})}
    else:
        columns = {"one step": "val", "one step + CRF": "val_crf",
                   **({"two steps + CRF": "val_two_step_crf"} if args.two_step else {})}
    draw_panels(run, split, truth, columns)


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder, by the network of --checkpoint.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    joint, two_step = "classification.classifier.weight", "head.branches.0.weight"
    state, last = read_predictor(args, Args, "joint.pt or segmenter.pt", joint, two_step)
    device, made = start_processes(args.device), Args(**state["args"])
    if last == joint:
        net, scales, mirror = make_rrm(made, "none", len(state["model"][last])), made.test_scales, False
        crf, score, stride = CRF(*made.post_crf), one_step(net), made.stride
    else:
        score = net = make_segmenter(made.seg_backbone, "none", made.seg_stride, made.seg_rates,
                                     len(state["model"][last]) - 1)
        scales, mirror, crf, stride = made.seg_scales, True, CRF(*made.seg_crf), made.seg_stride
    with_weights(net, state, device)
    for image, path in pictures_to_predict(args):
        prob = predict(score, image, stride, scales, mirror, device)
        label = dense_crf([image], [prob], crf, args.crf, device=device)[0].argmax(0)
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_rrm(args):
    """What would else fail after hours fails now."""
    if not 0 < args.ratio <= 1 or args.gamma <= 0 or args.gamma_high < 0:
        raise UserError("--ratio: give a share above 0 up to 1; --gamma: above 0; --gamma-high: 0 or more")
    if min(args.local_dilation, args.local_width, args.attention_width, args.energy_xy, args.energy_rgb) <= 0:
        raise UserError("--local-dilation, --local-width, --attention-width, --energy-xy, --energy-rgb: give "
                        "numbers above 0")
    make_rrm(args, args.weights, 1)                                                    # wrong weights: now
    if args.two_step:
        make_segmenter(args.seg_backbone, args.weights, args.seg_stride, args.seg_rates, 1)


def main():
    """Algorithm 1, then the two-step extension; --supervision full: the same networks on ground truth."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    args.seg_backbone = args.backbone if args.seg_backbone == "same" else args.seg_backbone
    if args.predict:
        return predict_folder(args)
    weak = args.supervision != "full"
    train_set, val_set = (load(args, split, fields=("mask",)) for split in ("train", "val"))
    check_rrm(args)
    run = Run(args, FIELDS)
    classifier = train_classifier(args, run, train_set) if args.init == "classifier" else None
    net = train_joint(args, run, classifier, train_set)                                 # Algorithm 1
    if weak:
        write_mined(args, run, net, train_set)
    score, options = one_step(net), (args.post_crf, args.stride, args.test_scales, False)
    predict_set(args, run, score, val_set, "val", "val_crf", *options)
    if args.two_step:                                                                   # §2.3.3
        if weak:
            predict_set(args, run, score, train_set, "pseudo_raw", "pseudo", *options, args.pseudo_tags)
        segmenter = train_segmenter(args, run, train_set)
        predict_set(args, run, segmenter, val_set, "val_two_step", "val_two_step_crf", args.seg_crf,
                    args.seg_stride, args.seg_scales, True)
    if weak and not run.has("pseudo" if args.two_step else "seed"):
        draw_rrm(args, run, "train")
        evaluate_labels(args, run, "train")
    if not run.has("val_two_step_crf" if args.two_step else "val_crf"):
        draw_rrm(args, run, "val")
        evaluate_labels(args, run, "val")
    run.table()


if __name__ == "__main__":
    main()
