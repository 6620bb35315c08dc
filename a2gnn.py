"""A²GNN: Affinity Attention Graph Neural Network for Weakly Supervised Semantic Segmentation.
B. Zhang, J. Xiao, J. Jiao, Y. Wei, Y. Zhao; TPAMI 2021. Equation numbers: B. Zhang's thesis, chapter 3.

Symbols      x image (B,3,H,W) · B_k box with label L_Bk · M_I, M'_I labels of the classifier, all and
             confident · M_B, M_F, M_g box, fused and confident seeds (H,W), 255 = unknown · F_A affinity
             feature (B,448,h,w) · D affinity of a pair · X, E node features and edges · H^l node features of
             layer l (B,h,w,256) · P^l attention · O class probability · K_j the points that box j selects
Equations    (3.1) eq3_1_cam_labels    (3.2) eq3_2_grabcut    (3.3) eq3_3_box_labels    (3.4) eq3_4_fuse
             (3.5) eq3_5_confident    (3.6) eq3_6_7_pair_labels    (3.7) eq3_6_7_pair_labels
             (3.8) eq3_8_affinity    (3.9) train_affinity    (3.10) eq3_10_affinity_loss
             (3.11) window_offsets    (3.12) eq3_12_affinity_regularised    (3.13) eq3_13_gaussian
             (3.14) eq3_14_edges    (3.15) eq3_15_node_features    (3.16) A2GNN    (3.17) eq3_17_18_attention
             (3.18) eq3_17_18_attention    (3.19) A2GNN    (3.20) train_gnn    (3.21) eq3_21_cross_entropy
             (3.22) eq3_22_regularised    (3.23) eq3_23_25_points    (3.24) eq3_23_25_points
             (3.25) eq3_23_25_points    (3.26) eq3_26_multi_point    (3.27) eq3_27_prototypes
             (3.28) eq3_28_consistency
             §3.2's SEAM (its reference 57) has no numbered equations in the thesis: SEAM, seam_loss;
             nor have §3.4's pseudo instances: instances_in_boxes
Figures      Fig. 3.2 (left to right) and Algorithm 2 (top to bottom) = main(); Fig. 3.4 = eq3_17_18_attention
Commands     python a2gnn.py                           # embedded shapes, made for two CPU cores
             python a2gnn.py --data voc --root data/voc --supervision box       # paper: 73.8 val with CRF
             python a2gnn.py --data voc --root data/voc --supervision full      # upper bound; paper: 76.8
             python a2gnn.py --data voc --root data/voc --segmenter pspnet      # Table 3.1; paper: 75.6
             python a2gnn.py --data voc --root data/voc --task instance          # Table 3.2; paper: AP50 59.1
             python a2gnn.py --data coco --task instance --inst-steps 90000  # Table 3.3; paper: AP 20.9
             python a2gnn.py --data voc --cam-backbone resnet38 --weights FILE.params  # paper's classifier
             python a2gnn.py --predict photos/ --checkpoint runs/a2gnn-voc-box-s0/segmenter.pt
             python a2gnn.py --predict photos/ --checkpoint runs/a2gnn-voc-box-instance-s0/detector.pt
Departures   [D1] classifier and affinity CNN: ResNet-50; the paper's ResNet-38 has weights only for MXNet
             [D2] segmentation network: from ImageNet and trained at one scale a step; the paper's 73.8 starts
                  from a COCO-segmentation checkpoint
             [D3] Eq. 3.5 as printed keeps all of M_F, since each label of M_F is one of M_B; read: "= M_B"
                  counts only where the boxes alone decide
             [D4] the affinity CNN starts from the classifier (paper silent; the authors' from an affinity
                  network trained on all SEAM labels)
             [D5] Eqs. 3.12 and 3.22 are sums without a scale: 3.12 here the mean over pairs, 3.22 per node,
                  over the authors' 11 x 11 window (--reg-radius 0: all pairs, as printed)
             [D6] Eq. 3.10 as printed; authors' code halves it and averages background and foreground
                  positives apart (--split-positives)
             [D7] affinity CNN: Euclidean r = 5 as printed (Eqs. 3.7, 3.11); graph: the authors' square
                  window, --radius 4 (theirs for tags and points is 3); Eq. 3.14 has none, --radius 0, though
                  §3.4 sets r = 5 for inference too
             [D8] Eq. 3.28: cosines of non-negative features (Eq. 3.16) are never below 0, so it never acts;
                  here both features are centred on the image's mean (--consistency-cosine literal)
             [D9] the paper's 50 + 50 epochs at lr 0.03, Eq. 3.21 and a check of phase two, anew each epoch;
                  authors' code for boxes: 150 + 150 at 0.035, --balanced-ce, --consistency-in-place
             [D10] SGD without momentum for SEAM and affinity CNN: what their published optimiser really does
             [D11] GNN's output layer: the image's own classes (its tags) and background; the authors' has all
             [D12] random walk of Table 3.4: starts from the CAM inside its class's boxes, background outside
             [D13] odd kernels centre feature cell i on pixel stride·i: so CAM, walk, GNN and scores are
                  enlarged (the authors' bilinear is half a cell off); taps by torch's bilinear
             [D14] Mask R-CNN is torchvision's with FPN; pictures are squares of one size; paper silent on
                  its schedule: Detectron's, as many epochs of VOC as its 1x has of COCO
             [D15] node features are cut at 0 (no change for ResNets): MobileNetV2's blocks end without ReLU
             [D16] misprints: Eq. 3.13 squares its norms; Eq. 3.22 means c_i ≠ c_j (else it is constant);
                  Eq. 3.28's d is a cosine, and labels other than the box's class stay (authors' code)
             [D17] SEAM as its code has it: the background is a channel of pixel correlation and L_ECR, and
                  L_min presses the refined CAM's lowest quarter to 0; its text has neither. Here the
                  losses are taken on the feature grid (its code: on pixels), and the correlation scales each
                  map by minimum and maximum (its code, from memory: by its maximum; they differ only where a
                  map is positive everywhere)
             [D18] points: §3.6.1's "same setting with the scribble task" is read as the merge with M'_I: M_P
                  alone has no background; SLIC's settings are unreleased; the authors' README adds the random
                  walk for points too (--point-walk), the paper for tags alone
             [D19] without pretrained weights the first --cam-warmup steps train the tags alone (0 by default)
             [D20] pseudo instances: a pixel in several boxes of its class goes to the smallest, a box without
                  pixels teaches nothing; the detector's boxes are the given ones (paper silent). True ones,
                  for the upper bound, have the pixels that no smaller object hides
             [D21] "CRF to refine our final prediction": of each instance against the rest, with the values of
                  the GNN's CRF; a mask that it would erase stays (paper silent)
             [D22] segmentation networks of Table 3.1: PSPNet runs on DeepLab's schedule; Tree-FCN (a compiled
                  tree filter), saliency maps and Res2Net are left out
             [D23] CRF of the pseudo labels: the authors' code; §3.4's "same as [18, 97]" names two that
                  differ, 3 3 80 13 10 10 and 3 3 83 5 4 10
             [D24] the preset of photographs, both with a look at masks of training pictures: the fourth power
                  of the pixel correlation's cosines, which a few hundred pictures leave near 1, so that the
                  CAM is averaged flat; and confident background where the CAM is below 6 %, not 1 %
"""

import contextlib
import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    ASPP, CRF, DeepLab, PSPNet, Run, UserError, cells_to_pixels, confusion_of, dense_crf, detector_schedule,
    draw_panels, enlarge, inference, instance_aps, instance_overlay, label_probs, lerp_matrix, make_backbone,
    mask_rcnn, numbered, parse_args, pictures_to_predict, poly, pretrained, read_instances, read_predictor,
    reduce, save_instances, save_label, save_npz, save_prediction, start_processes, weights_of, with_weights,
    world)
from data import (
    Draws, Sample, changed, coco_annotations, color_jitter, crop, derive_boxes, flip, load, normalise,
    objects_of, read_label, rescale, resize_batch, resize_long, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco", "workpiece"] = "shapes"
    """data set of data.py; shapes is drawn on the fly, workpiece is any folder of your own"""
    task: Literal["semantic", "instance"] = "semantic"
    """last network: one of segmentation, or Mask R-CNN (Tables 3.2 and 3.3; needs boxes)"""
    supervision: Literal["box", "scribble", "point", "image", "full"] = "box"
    """what the training set may reveal; full = the same segmentation network on ground truth (upper bound)"""
    backbone: Literal[
        "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "resnet101"
    """segmentation network (§3.4: ResNet-101)"""
    cam_backbone: Literal[
        "same", "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "resnet50"
    """classifier and affinity CNN; paper: resnet38, with --weights FILE.params [D1]. same = --backbone"""
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
    # --- 1 SEAM classifier (§3.2; defaults are SEAM's own) ---
    stride: int = 8
    """output stride of affinity CNN and graph (§3.4's dilations: a node every 8 pixels)"""
    cam_stride: int = 8
    """output stride of the classifier"""
    cam_steps: int = 10_580
    """8 epochs of 10,582 images at batch 8"""
    cam_warmup: int = 0
    """first steps with L_cls alone, for networks that start from nothing [D19]"""
    cam_batch: int = 8
    """images a step, over all processes"""
    cam_lr: float = 0.01
    """backbone weights; biases x2, new layers x10 and x20; poly 0.9"""
    cam_momentum: float = 0.0
    """SEAM's text says 0.9; its optimiser ran without [D10]"""
    cam_crop: int = 448
    """pixels"""
    cam_resize: tuple[int, int] = (448, 768)
    """the longer side is drawn from this range"""
    cam_scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """scales of the CAM, each with its mirror image"""
    er_scale: float = 0.3
    """scale of the second branch (equivariant regularisation)"""
    pcm_power: float = 1.0
    """exponent of the pixel correlation's cosines [D24]"""
    ecr_top: float = 0.2
    """share of the largest differences that the cross regularisation counts"""
    # --- 2 seeds (§3.2, §3.3.2) ---
    bg_low: float = 4.0
    """background (1 - max CAM)^bg_low: large, so what stays foreground is foreground"""
    bg_high: float = 24.0
    """background (1 - max CAM)^bg_high: small, so what stays background is background"""
    confident: float = 0.4
    """§3.3.2: top 40 % confident pixels of each class"""
    confident_fg: float = 0.01
    """authors' code: CAM scores below this do not enter the ranking"""
    confident_bg: float = 0.8
    """authors' code: background score of a confident background pixel"""
    confident_crf: float = 0.8
    """authors' code: CRF probability of a confident pixel"""
    seed_crf: CRF = CRF(3, 3, 80, 13, 10, 10)
    """PSA's: Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations"""
    superpixels: int = 400
    """SLIC superpixels that scribbles and points spread over (§3.6.1; the authors' number is unreleased)"""
    grabcut_steps: int = 3
    """iterations of GrabCut"""
    grabcut_min: float = 0.15
    """a GrabCut mask whose IoU with its box is below this becomes the whole box"""
    # --- 3 affinity CNN (§3.3.3) and random walk ---
    aff_steps: int = 31_740
    """12 epochs of 10,582 images at batch 4 (authors' code)"""
    aff_batch: int = 4
    """images a step, over all processes"""
    aff_lr: float = 0.01
    """backbone weights; biases x2, new layers x10 and x20; poly 0.9"""
    aff_momentum: float = 0.0
    """see cam_momentum"""
    aff_radius: int = 5
    """r of Eqs. 3.7 and 3.11, grid cells"""
    affinity_reg: bool = True
    """L_Ar, Eq. 3.12 (Tables 3.4 and 3.8)"""
    w_affinity_reg: float = 3.0
    """λ of Eq. 3.9"""
    split_positives: bool = False
    """authors' code: background and foreground positives averaged apart, L_Ac halved [D6]"""
    aff_labels: Literal["M_g", "M_F"] = "M_g"
    """seeds that the affinity CNN learns from (Table 3.8)"""
    gauss_xy: float = 6.0
    """σ_xy of Eq. 3.13, grid cells"""
    gauss_rgb: float = 0.1
    """σ_rgb of Eq. 3.13, on normalised colours"""
    walk_bg: float = 6.0
    """SEAM's random walk: background exponent"""
    walk_beta: float = 8.0
    """SEAM's random walk: power of the affinities"""
    walk_steps: int = 64
    """SEAM's random walk: number of steps"""
    # --- 4 A²GNN (§3.3.4, §3.3.5) ---
    gnn: Literal["a2gnn", "gcn", "gat", "agnn"] = "a2gnn"
    """graph layer (Fig. 3.7)"""
    nodes: Literal["pixel", "superpixel"] = "pixel"
    """Table 3.6"""
    edges: Literal["affinity", "distance"] = "affinity"
    """Table 3.6: D of the affinity CNN, or the same form on the backbone's features"""
    radius: int = 4
    """neighbourhood (2r+1)² of the authors' code; 0 = the full graph [D7]"""
    attention_only: bool = False
    """Table 3.7: without the edge term"""
    edge_only: bool = False
    """Table 3.7: without the cosine"""
    hidden: int = 256
    """§3.4: width of the embedding and the attention layers"""
    layers: int = 3
    """§3.3.4: affinity attention layers"""
    beta: float = 10.0
    """β of Eq. 3.18 (authors' code; the paper gives no value)"""
    sigma: float = 1e-3
    """σ of Eq. 3.14"""
    epochs: tuple[int, int] = (50, 50)
    """§3.4: epochs of the two phases [D9]"""
    gnn_lr: float = 0.03
    """§3.4, Adam; authors' code for boxes 0.035"""
    gnn_weight_decay: float = 5e-4
    """§3.4"""
    dropout: float = 0.5
    """§3.4, after the first layer"""
    reg: bool = True
    """L_reg, Eq. 3.22 (Table 3.5)"""
    w_reg: float = 0.01
    """λ1 of Eq. 3.20; authors' code without boxes 0.3"""
    reg_radius: int = 5
    """window of Eq. 3.22 (authors' code)"""
    seed_labels: Literal["M_g", "M_F"] = "M_g"
    """seeds that the GNN learns from (§3.5.3: 78.8 and 73.2); scribbles and points: their own"""
    mp_loss: bool = True
    """L_mp, Eq. 3.26 (Table 3.5)"""
    mp_feature: bool = True
    """the second, feature term of Eq. 3.26 (Fig. 3.8 e and f)"""
    consistency: bool = True
    """consistency check, Eqs. 3.27 and 3.28 (Table 3.5)"""
    consistency_cosine: Literal["centred", "literal"] = "centred"
    """literal never acts, since features are non-negative [D8]"""
    consistency_in_place: bool = False
    """authors' code: removed seeds never come back, checked from the first epoch [D9]"""
    balanced_ce: bool = False
    """authors' code: foreground and background averaged apart [D9]"""
    walk_share: float = 3.0
    """image tags, §3.6.1: pseudo labels are GNN + this many times the random walk"""
    point_walk: bool = False
    """the same for points (authors' README; the paper has it for tags alone) [D18]"""
    batch_images: int = 8
    """graphs trained side by side, each with its own parameters; does not change the result"""
    gnn_crf: CRF = CRF(2, 3, 50, 5, 10, 10)
    """CRF on the probabilities of GNN and random walk (authors' code) [D23]"""
    # --- 5 segmentation network (§3.4) ---
    segmenter: Literal["deeplab", "pspnet"] = "deeplab"
    """Table 3.1 [D22]; PSPNet's own recipe: --seg-lr 0.01 --seg-batch 16 --seg-crop 473 --seg-steps 30000"""
    seg_auxiliary: float = 0.4
    """weight of PSPNet's auxiliary loss (its paper)"""
    train_on: Literal["pseudo", "pseudo_raw", "walk", "walk_crf", "seeds_F"] = "pseudo"
    """labels of the last network: A²GNN with or without CRF, random walk, or plain box seeds M_F"""
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
    """output stride of the segmentation network"""
    seg_rates: tuple[int, ...] = (6, 12, 18, 24)
    """dilations of DeepLab-v2's ASPP; one beyond the crop's cells is never trained, yet speaks in tests"""
    weight_decay: float = 5e-4
    """of classifier, affinity CNN and segmentation network"""
    test_scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    """each with its mirror image"""
    seg_crf: CRF = CRF(1, 3, 67, 3, 4, 10)
    """DeepLab-v2's"""
    # --- 6 Mask R-CNN (--task instance; Detectron's defaults) ---
    inst_steps: int = 8000
    """12 epochs of 10,582 images at batch 16 [D14]; for COCO, Detectron's 1x is 90,000, and as many epochs as
    on VOC of the classifier and the affinity CNN are --cam-steps 82000 --aff-steps 246000"""
    inst_batch: int = 16
    """images a step, over all processes"""
    inst_lr: float = 0.02
    """divided by 10 after 2/3 and 8/9 of the steps; momentum 0.9"""
    inst_weight_decay: float = 1e-4
    """Detectron's"""
    inst_warmup: int = 500
    """steps in which the rate rises from a third"""
    inst_size: int = 1066
    """longer side of a picture: VOC's 500 x 375 at Detectron's shorter side of 800"""
    inst_width: int = 256
    """channels of pyramid and mask head; the box head has four times as many"""
    inst_rois: int = 512
    """boxes that an image's losses are taken of"""
    inst_crf: CRF = CRF(2, 3, 50, 5, 10, 10)
    """CRF on the final masks [D21]"""


# What two CPU cores do in minutes; everything else as the paper.
SHAPES = dict(
    backbone="tiny", cam_backbone="tiny", weights="none", stride=4, cam_stride=8, seg_stride=4,
    cam_steps=4000, cam_warmup=3000, cam_lr=0.05, cam_momentum=0.9, cam_crop=96, cam_resize=(96, 128),
    er_scale=0.6, aff_steps=120, aff_batch=8, walk_steps=16, hidden=64,
    seg_steps=4000, seg_batch=8, seg_lr=0.02, seg_crop=96, seg_rates=(3, 6, 9, 12),
    seg_rescale=(0.75, 1.25), test_scales=(0.75, 1.0, 1.25),
    inst_steps=400, inst_batch=4, inst_warmup=100, inst_size=128, inst_width=64, inst_rois=64)
# A few hundred photographs with a pretrained backbone, in about an hour on two CPU cores.
# (On grids coarser than the paper's the walk takes fewer steps: its reach grows with their square root; and
# SEAM's second branch is larger: at scale 0.3 its grid would have 6 x 6 cells; the paper's has 17 x 17.)
PHOTOS = dict(
    cam_backbone="same", train_list="train", stride=16, cam_stride=16, seg_stride=16,
    cam_steps=330, cam_lr=0.02, cam_crop=321, cam_resize=(321, 513), er_scale=0.6,
    pcm_power=4.0, confident_bg=0.2,                                        # [D24]
    aff_steps=790, walk_steps=16, hidden=64,                                # 12 epochs, as in the paper
    seg_steps=1000, seg_batch=8, seg_lr=5e-4, seg_crop=257, seg_rates=(3, 6, 9, 12),
    test_scales=(0.75, 1.0, 1.25),
    inst_steps=1000, inst_batch=4, inst_lr=0.005, inst_warmup=100, inst_size=320, inst_width=128,
    inst_rois=128)

# Folders of the seeds in the run; supervisions whose GNN has seeds of its own, seeds_gnn (§3.6.1).
SEEDS = {"M_g": "seeds", "M_F": "seeds_F"}
OWN_NODES = ("scribble", "point")
# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "classifier": "data root train_list seed amp weights cam_backbone cam_stride cam_steps cam_warmup "
                  "cam_batch cam_lr cam_momentum cam_crop cam_resize er_scale pcm_power ecr_top "
                  "weight_decay",
    "seeds": "supervision crf cam_scales bg_low bg_high confident confident_fg confident_bg confident_crf "
             "seed_crf superpixels grabcut_steps grabcut_min",
    "affinity": "stride aff_steps aff_batch aff_lr aff_momentum aff_radius affinity_reg w_affinity_reg "
                "split_positives aff_labels gauss_xy gauss_rgb",
    "walk": "walk_bg walk_beta walk_steps gnn_crf",
    "pseudo": "gnn seed_labels nodes edges radius attention_only edge_only hidden layers beta sigma epochs "
              "gnn_lr gnn_weight_decay dropout reg w_reg reg_radius mp_loss mp_feature consistency "
              "consistency_cosine consistency_in_place balanced_ce walk_share point_walk",
    "segmenter": "backbone train_on segmenter seg_auxiliary seg_steps seg_batch seg_lr seg_crop seg_rescale "
                 "seg_stride seg_rates",
    "detector": "inst_steps inst_batch inst_lr inst_weight_decay inst_warmup inst_size inst_width inst_rois",
}.items()}


# ── Networks (§3.2, §3.3.3, §3.3.4) ─────────────────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class SEAM(nn.Module):
    """Classifier with pixel-correlation module (§3.2's [57]).

    forward(*images), each (B,3,H,W)  ->  for each a pair: cam (B,K,h,w), not yet normalised, and refined
    (B,K+1,h,w), background first.
    """

    def __init__(self, backbone, classes, power=1.0):
        super().__init__()
        low, mid, high = backbone.channels[-3:]
        self.backbone, self.power = backbone, power
        self.dropout = nn.Dropout2d(0.5)
        self.classifier = nn.Conv2d(high, classes, 1, bias=False)
        self.low, self.mid = nn.Conv2d(low, 64, 1, bias=False), nn.Conv2d(mid, 128, 1, bias=False)
        self.embed = nn.Conv2d(64 + 128 + 3, 192, 1, bias=False)
        self.new_layers = [self.classifier, self.low, self.mid, self.embed]

    def forward(self, *images):
        return [self.one(image) for image in images]

    def one(self, image):
        taps = self.backbone(image)
        cam = self.classifier(self.dropout(taps[-1]))
        low, mid = F.relu(self.low(taps[-3].detach())), F.relu(self.mid(taps[-2].detach()))
        feature = torch.cat([resample(t, cam.shape[-2:]) for t in (image, low, mid)], dim=1)
        cam, feature = cam.float(), self.embed(feature).float()
        with torch.autocast(image.device.type, enabled=False):                      # means: too flat for bf16
            return cam, pixel_correlation(cam.detach(), feature, self.power)


class AffinityNet(nn.Module):
    """Affinity CNN (§3.3.3, Fig. 3.3): the last three blocks -> 64/128/256 channels -> 448 -> F_A.

    forward(image (B,3,H,W))  ->  F_A (B,448,h,w); nodes=True: also X (B,D,h,w), the blocks' features.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        widths = zip(backbone.channels[-3:], (64, 128, 256))
        self.narrow = nn.ModuleList(nn.Conv2d(c, d, 1, bias=False) for c, d in widths)
        self.fuse = nn.Conv2d(448, 448, 1, bias=False)
        self.new_layers = [*self.narrow, self.fuse]

    def forward(self, image, nodes=False):
        taps = self.backbone(image)[-3:]
        taps = [resample(t, taps[-1].shape[-2:]) for t in taps]
        narrow = torch.cat([F.elu(conv(t)) for conv, t in zip(self.narrow, taps)], dim=1)
        F_A = F.elu(self.fuse(narrow)).float()
        return (F_A, torch.cat(taps, dim=1).float()) if nodes else F_A


class Window:
    """The graph's neighbourhoods as dense tiles: an h x w grid is cut into tiles of t x t nodes, t = 2r (the
    queries); all nodes within r of any of them lie in 2t x 2t nodes around the tile (the keys). A (2r+1)²
    window thus costs small dense products and never N x N. r = 0 is the full graph: one tile, all nodes are
    keys. Nodes beyond the grid are zeros; who connects with whom is said by the edges.
    """

    def __init__(self, h, w, r):
        self.h, self.w, self.r, self.t = h, w, r, 2 * r
        self.th, self.tw = (-(-h // self.t), -(-w // self.t)) if r else (1, 1)

    def queries(self, x):
        """(B,h,w,C) -> (B,T,q,C)"""
        if self.r == 0:
            return x.flatten(1, 2)[:, None]
        t = self.t
        x = F.pad(x, (0, 0, 0, self.tw * t - self.w, 0, self.th * t - self.h))
        x = x.unflatten(2, (self.tw, t)).unflatten(1, (self.th, t))                     # (B, th, t, tw, t, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def keys(self, x):
        """(B,h,w,C) -> (B,T,k,C)"""
        if self.r == 0:
            return x.flatten(1, 2)[:, None]
        r, t, th, tw = self.r, self.t, self.th, self.tw
        x = F.pad(x, (0, 0, r, (tw + 1) * t - self.w - r, r, (th + 1) * t - self.h - r))
        x = x.unflatten(2, (tw + 1, t)).unflatten(1, (th + 1, t)).transpose(2, 3)  # (B, th+1, tw+1, t, t, C)
        near = [x[:, a:a + th, b:b + tw].flatten(3, 4) for a in (0, 1) for b in (0, 1)]
        return torch.cat(near, dim=3).flatten(1, 2)

    def fold(self, y):
        """(B,T,q,C) -> (B,h,w,C), the inverse of queries"""
        if self.r == 0:
            return y[:, 0].unflatten(1, (self.h, self.w))
        y = y.unflatten(2, (self.t, self.t)).unflatten(1, (self.th, self.tw)).transpose(2, 3)
        return y.flatten(3, 4).flatten(1, 2)[:, :self.h, :self.w]


class A2GNN(nn.Module):
    """B affinity attention networks side by side (Eqs. 3.16–3.19), one per image, each with own parameters.

    forward(x (B,h,w,D), edges (B,T,q,k), window, keep (B,h,w,hidden) dropout factors or None)
    ->  H^{L+1} (B,h,w,hidden), logits (B,h,w,C).
    generators: one torch.Generator per image draws its initial parameters, whatever else is in the batch;
    classes: number of output classes of each image, C is the largest.
    """

    def __init__(self, generators, dim, classes, hidden, layers, beta, kind="a2gnn", use_cos=True,
                 use_edge=True):
        super().__init__()
        self.kind, self.beta, self.layers = kind, beta, layers
        self.use_cos, self.use_edge = use_cos, use_edge and kind == "a2gnn"

        def xavier(rows, widths):  # padded with 0 to the widest
            draws = [(2 * torch.rand(rows, n, generator=g, device=g.device) - 1) * (6 / (rows + n)) ** 0.5
                     for n, g in zip(widths, generators)]
            return nn.Parameter(torch.stack([F.pad(d, (0, max(widths) - d.shape[1])) for d in draws]))

        same = [hidden] * len(generators)
        self.W0 = xavier(dim, same)                                                     # (B,D,hidden)
        w = [torch.rand(layers, generator=g, device=g.device) for g in generators]
        self.w = nn.Parameter(torch.stack(w))  # w^l ~ U(0,1), as the authors'
        self.W = xavier(hidden, classes)                                                # W^{L+1}
        if kind in ("gcn", "gat"):
            self.Wl = nn.ParameterList(xavier(hidden, same) for _ in range(layers))
        if kind == "gat":
            self.al = nn.ParameterList(xavier(hidden, [2] * len(same)) for _ in range(layers))

    def forward(self, x, edges, window, keep=None):
        H = F.relu(x.flatten(1, 2) @ self.W0).unflatten(1, x.shape[1:3])                # Eq. (3.16)
        H = H if keep is None else H * keep  # §3.4: dropout after layer 1
        terms = edge_terms(edges, self.beta)                                            # for all layers
        for i in range(self.layers):
            if self.kind in ("gcn", "gat"):
                H = (H.flatten(1, 2) @ self.Wl[i]).unflatten(1, x.shape[1:3])
            if self.kind == "gcn":
                H = F.relu(gcn_layer(H, edges, window))
            elif self.kind == "gat":
                H = F.elu(gat_layer(H, edges, self.al[i], window))
            else:
                H = eq3_17_18_attention(H, terms, self.w[:, i], self.beta, window, self.use_cos,
                                        self.use_edge)
        return H, (H.flatten(1, 2) @ self.W).unflatten(1, x.shape[1:3])  # Eq. (3.19), softmax in the loss


# ── SEAM (§3.2) ─────────────────────────────────────────────────────────────────────────────────────────────
def minmax(cam):
    """Negative scores to 0, then each map to [0,1]; a flat map becomes 0.   (…,h,w)"""
    cam = F.relu(cam)
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return F.relu(cam - low - 1e-5) / (high - low + 1e-5)


def pixel_correlation(cam, feature, power=1.0):
    """Pixel-correlation module: each pixel's scores become the mean over all pixels, weighted by the positive
    part of the cosine of their features (to a power [D24]). Only each pixel's best class speaks, and the
    background.

    cam (B,K,h,w) without gradient, feature (B,192,h,w) -> (B,K+1,h,w), background first
    """
    cam = beside_background(minmax(cam))
    f = F.normalize(feature.flatten(2), dim=1)
    similar = F.relu(f.transpose(1, 2) @ f) ** power                                    # (B,N,N)
    similar = similar / (similar.sum(1, keepdim=True) + 1e-5)
    return (cam.flatten(2) @ similar).view_as(cam)


def seam_loss(full, small, tags, ecr_top):
    """L_cls, L_min, L_ER, L_ECR. [D17]   full, small: (cam, refined) at scale 1, er_scale; tags (B,K) float

    L_min: the refined CAM's lowest quarter of each image. L_ER: L1 between the CAMs of both scales. L_ECR: L1
    between each scale's refined CAM and the other scale's plain one, counting its largest 20 % only.
    """
    (cam1, refined1), (cam2, refined2) = full, small
    loss_cls = sum(F.multilabel_soft_margin_loss(cam.mean((2, 3)), tags) for cam in (cam1, cam2)) / 2
    here, size = tags[:, :, None, None], cam2.shape[-2:]
    with_bg = F.pad(here, (0, 0, 0, 0, 1, 0), value=1.0)
    loss_min = sum(lowest_quarter(refined[:, 1:] * here) for refined in (refined1, refined2)) / 2
    cam1, refined1 = resample(minmax(cam1), size) * here, resample(minmax(refined1), size) * with_bg
    cam2, refined2 = minmax(cam2) * here, minmax(refined2) * with_bg
    loss_er = (cam1 - cam2).abs().mean()
    loss_ecr = (hardest(beside_background(cam2.detach()) - refined1, ecr_top)
                + hardest(beside_background(cam1.detach()) - refined2, ecr_top))
    return loss_cls, loss_min, loss_er, loss_ecr


def lowest_quarter(cam):
    """Mean over the quarter of an image's pixels with the lowest best score.   (B,K,h,w) >= 0 -> scalar"""
    score = cam.amax(1).flatten(1)
    return score.topk(max(1, score.shape[1] // 4), dim=1, largest=False).values.mean()


def beside_background(cam):
    """(B,K,h,w) in [0,1] -> (B,K+1,h,w): 1 − max first, then each pixel's best class alone."""
    return torch.cat([1 - cam.amax(1, keepdim=True), best_only(cam)], dim=1)


def best_only(cam):
    """Each pixel's best class keeps its score, all others become 0.   (B,K,h,w)"""
    return cam * (cam == cam.amax(1, keepdim=True))


def hardest(difference, share):
    """Mean of the largest `share` of |difference| in each image.   (B,K,h,w) -> scalar"""
    difference = difference.abs().flatten(1)
    return difference.topk(max(1, int(share * difference.shape[1])), dim=1).values.mean()


@inference()
def multi_scale_cam(net, image, tags, scales, stride, device):
    """Refined CAM summed over scales and mirror images, then each map to [0,1].

    image (H,W,3) uint8, tags (K,) bool -> (K,H,W) float32, absent classes 0
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    total = 0
    for scale in scales:
        seen = [max(32, round(n * scale)) for n in image.shape[:2]]
        scaled = resize_batch(x, seen)
        refined = net(torch.cat([scaled, scaled.flip(-1)]))[0][1][:, 1:][:, tags]
        cam = cells_to_pixels(refined, stride, image.shape[:2], seen)
        total = total + F.relu(cam[0] + cam[1].flip(-1))
    full = np.zeros((len(tags), *image.shape[:2]), np.float32)
    full[tags] = minmax(total).cpu().numpy()
    return full


# ── Seeds (§3.2, §3.3.2): arrays in, arrays out ─────────────────────────────────────────────────────────────
def with_background(cam, exponent):
    """(K,H,W) in [0,1] -> (K+1,H,W): background score (1 − max)^exponent first."""
    return np.concatenate([(1 - cam.max(0, keepdims=True)) ** exponent, cam])


def eq3_1_cam_labels(crf_low, crf_high):
    """Eq. (3.1): M_I. Foreground where it wins against the large background, background where it wins against
    the small one, else 255.

    crf_low, crf_high (K+1,H,W): CRF probabilities of the CAM with exponents bg_low and bg_high -> (H,W) uint8
    """
    low, high = crf_low.argmax(0), crf_high.argmax(0)
    return np.where(low > 0, low, np.where(high == 0, 0, 255)).astype(np.uint8)


def confident_cam_labels(M_I, cam, crf_low, crf_high, bg_exponent, share, fg, bg, crf_prob):
    """§3.3.2: M'_I keeps a pixel of M_I where the CRF is sure of it and the CAM ranks it in its class's top
    `share` (background: scores it above `bg`).   -> (H,W) uint8"""
    scores = with_background(cam, bg_exponent)
    winner = scores.argmax(0)
    sure = (M_I == 0) & (scores[0] > bg) & (crf_high[0] >= crf_prob)
    for c in np.unique(M_I[(M_I > 0) & (M_I < 255)]):
        ranked = (winner == c) & (scores[c] > fg)
        if ranked.any():
            threshold = np.quantile(scores[c][ranked], 1 - share)
            sure |= (M_I == c) & ranked & (scores[c] > threshold) & (crf_low[c] >= crf_prob)
    return np.where(sure, M_I, 255).astype(np.uint8)


def pixel_box(box, H, W):
    """[c, x0, y0, x1, y1] floats -> class, slices of rows and columns in the image; at least one pixel."""
    c, x0, y0, x1, y1 = box
    x0, y0 = max(0, min(int(np.floor(x0)), W - 1)), max(0, min(int(np.floor(y0)), H - 1))
    x1, y1 = min(W, max(int(np.ceil(x1)), x0 + 1)), min(H, max(int(np.ceil(y1)), y0 + 1))
    return int(c), slice(y0, y1), slice(x0, x1)


def eq3_2_grabcut(image, box, steps, minimum):
    """Eq. (3.2): the pixels that GrabCut calls foreground inside one box.   image (H,W,3) uint8 -> (H,W) bool

    The whole box where GrabCut finds next to nothing (IoU with the box below `minimum`), has no background to
    learn from, or has fewer than 16 pixels to learn from.
    """
    import cv2

    inside = np.zeros(image.shape[:2], bool)
    _, rows, columns = pixel_box(box, *inside.shape)
    inside[rows, columns] = True
    if inside.all() or inside.sum() < 16:
        return inside
    state = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    cv2.setRNGSeed(0)
    colours = np.zeros((1, 65)), np.zeros((1, 65))  # its two mixture models
    cv2.grabCut(np.ascontiguousarray(image[..., ::-1]), state, None, *colours, steps, cv2.GC_INIT_WITH_MASK)
    found = ((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)) & inside
    return found if found.sum() >= minimum * inside.sum() else inside


def eq3_3_box_labels(boxes, masks, H, W):
    """Eq. (3.3): M_B, background outside all boxes, GrabCut's pixels inside, 255 where GrabCut says no.

    boxes (M,5), masks list of (H,W) bool -> M_B (H,W) uint8, owner (H,W) int (index of the box, -1 = none).
    The smaller mask wins where masks overlap.
    """
    M_B, owner = np.zeros((H, W), np.uint8), np.full((H, W), -1)
    for box in boxes:
        _, rows, columns = pixel_box(box, H, W)
        M_B[rows, columns] = 255
    for k in sorted(range(len(masks)), key=lambda k: -masks[k].sum()):
        M_B[masks[k]], owner[masks[k]] = int(boxes[k][0]), k
    return M_B, owner


def eq3_4_fuse(M_I, M_B, owner, boxes):
    """Eq. (3.4): M_F, and where the boxes alone decided it (rows 1 and 3).   -> (H,W) uint8, (H,W) bool"""
    inside, alone = np.zeros(M_I.shape, bool), np.zeros(M_I.shape, bool)
    for k, box in enumerate(boxes):
        c, rows, columns = pixel_box(box, *M_I.shape)
        inside[rows, columns] = True
        if not (M_I[rows, columns] == c).any():                                         # L_Bk ∉ S(M_{I−Bk})
            alone |= owner == k
    by_boxes = alone | ~inside                                                          # rows 3 and 1
    return np.where(by_boxes | (M_I == M_B), M_B, 255).astype(np.uint8), by_boxes


def eq3_5_confident(M_F, M_I_confident, by_boxes):
    """Eq. (3.5): M_g = M_F where it equals M'_I, or where the boxes alone decided it.   [D3] (H,W) uint8"""
    return np.where(by_boxes | (M_F == M_I_confident), M_F, 255).astype(np.uint8)


# ── Affinity CNN (§3.3.3): pairs and losses ─────────────────────────────────────────────────────────────────
def window_offsets(radius):
    """Eq. (3.11): half of the (dy,dx) with ‖(dy,dx)‖₂ ≤ r, so that each pair of pixels comes once."""
    return [(dy, dx) for dy in range(radius + 1) for dx in range(-radius, radius + 1)
            if (dy > 0 or dx > 0) and dy * dy + dx * dx <= radius * radius]


def shifted(x, dy, dx):
    """Both ends of all pairs (i, i + (dy,dx)) in the map, dy ≥ 0.   (B,h,w,…) -> two views of equal shape"""
    h, w = x.shape[1:3]
    return x[:, :h - dy, max(0, -dx):w - max(0, dx)], x[:, dy:, max(0, dx):w - max(0, -dx)]


class PairDistance(torch.autograd.Function):
    """‖F_A(i) − F_A(j)‖₁ / d_A of all pairs, offset by offset: memory is that of one offset, also backward.

    feature (B,h,w,C) contiguous, offsets -> (B,P), the P pairs in the order of the offsets
    """

    @staticmethod
    def forward(ctx, feature, offsets):
        ctx.save_for_backward(feature)
        ctx.offsets = offsets
        ends = (shifted(feature, *offset) for offset in offsets)
        return torch.cat([(a - b).abs_().mean(-1).flatten(1) for a, b in ends], dim=1)

    @staticmethod
    def backward(ctx, grad):
        feature, = ctx.saved_tensors
        out, start = torch.zeros_like(feature), 0
        for offset in ctx.offsets:
            a, b = shifted(feature, *offset)
            n = a.shape[1] * a.shape[2]
            g = grad[:, start:start + n].reshape(*a.shape[:3], 1) / feature.shape[-1]
            step = (a - b).sign_().mul_(g)
            out_a, out_b = shifted(out, *offset)
            out_a += step
            out_b -= step
            start += n
        return out, None


def eq3_8_affinity(distance):
    """Eq. (3.8): D(i,j) = exp(−‖F_A(i) − F_A(j)‖₁ / d_A).   distance: the exponent, any shape"""
    return torch.exp(-distance)


def eq3_6_7_pair_labels(M_g, offsets):
    """Eqs. (3.6), (3.7): L_A = 1 same label, 0 different, 255 where an end is unknown.

    M_g (B,h,w), down-sampled -> L_A (B,P), the label of each pair's first end (B,P)
    """
    ends = [[end.flatten(1) for end in shifted(M_g, *offset)] for offset in offsets]
    a, b = (torch.cat(side, dim=1) for side in zip(*ends))
    return torch.where((a == 255) | (b == 255), 255, (a == b).long()), a


def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq3_10_affinity_loss(distance, L_A, first, split=False):
    """Eq. (3.10): −mean log D over A⁺ − mean log(1 − D) over A⁻.   all (B,P); [D6] split: authors' balance"""
    near = distance                                                                     # −log D
    far = -torch.log(-torch.expm1(-distance.clamp_min(1e-5)))  # −log(1 − D), finite at D = 1
    if split:
        same = masked_mean(near, (L_A == 1) & (first == 0)) + masked_mean(near, (L_A == 1) & (first > 0))
        return same / 4 + masked_mean(far, L_A == 0) / 2
    return masked_mean(near, L_A == 1) + masked_mean(far, L_A == 0)


def eq3_13_gaussian(squared_xy, squared_rgb, sigma_xy, sigma_rgb):
    """Eq. (3.13): exp(−‖ΔPos‖²/2σ_xy² − ‖ΔCor‖²/2σ_rgb²); [i ≠ j] is the caller's. [D16]"""
    return torch.exp(-squared_xy / (2 * sigma_xy**2) - squared_rgb / (2 * sigma_rgb**2))


def eq3_12_affinity_regularised(distance, colour, valid, offsets, sigma_xy, sigma_rgb):
    """Eq. (3.12): mean_ij G(i,j) ‖F_A(i) − F_A(j)‖₁ / d_A.   [D5]

    distance (B,P), colour (B,h,w,3), valid (B,h,w) bool: False in the crop's padding
    """
    G, inside = [], []
    for dy, dx in offsets:
        a, b = shifted(colour, dy, dx)
        inside.append(torch.logical_and(*shifted(valid, dy, dx)).flatten(1))
        rgb = (a - b).pow(2).sum(-1).flatten(1)
        G.append(eq3_13_gaussian(torch.full_like(rgb, dy * dy + dx * dx), rgb, sigma_xy, sigma_rgb))
    return masked_mean(torch.cat(G, dim=1) * distance, torch.cat(inside, dim=1))


def cell_colours(image, stride):
    """Colour of a feature cell: mean of an odd window centred on pixel stride·i.   (B,3,H,W) -> (B,3,h,w)"""
    return F.avg_pool2d(image, stride + 1, stride, stride // 2, count_include_pad=False)


# ── Graph (§3.3.3 "Convert Image to Graph") ─────────────────────────────────────────────────────────────────
def eq3_14_edges(distance, connected, sigma):
    """Eq. (3.14): E = D where D > σ, else 0; nodes outside S(i) get 0.   distance, connected (…,q,k)"""
    D = eq3_8_affinity(distance)
    return D * ((D > sigma) & connected)


def eq3_15_node_features(x):
    """Eq. (3.15): each node's feature divided by its sum.   (…,D)

    It needs features ≥ 0, as ResNets' after their ReLU; MobileNetV2's linear bottlenecks are cut at 0 [D15].
    """
    x = F.relu(x)
    return x / x.sum(-1, keepdim=True).clamp_min(1e-6)


@inference()
def image_to_graph(net, image, stride, nodes, edges, device):
    """One image as nodes (Fig. 3.3), not yet joined by edges.   image (H,W,3) uint8 -> namespace of
    x (h,w,D) node features · f (h,w,d) features D compares · colour (h,w,3) · place (h,w,2) grid position ·
    valid (h,w,1) · adjacent (N,N) or None · pixels: (rows, columns) of `enlarge`, or superpixel index (H,W).
    """
    image_t = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    F_A, X = net(image_t, nodes=True)
    (h, w), (H, W) = F_A.shape[-2:], image.shape[:2]
    place = torch.stack(
        torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float().to(device)[None]
    rows, columns = lerp_matrix(H, h, stride, (H, h), device), lerp_matrix(W, w, stride, (W, w), device)
    maps = dict(x=X, f=F_A if edges == "affinity" else X, colour=cell_colours(image_t, stride), place=place)
    if nodes == "pixel":
        maps = {key: t[0].permute(1, 2, 0).contiguous() for key, t in maps.items()}
        pixels, adjacent = (rows, columns), None
    else:
        index, adjacent = superpixels(image, h * w)
        pixels, adjacent = torch.as_tensor(index, device=device), torch.as_tensor(adjacent, device=device)
        at_pixels = {key: enlarge(t, rows[None], columns[None])[0].flatten(1).T for key, t in maps.items()}
        maps = {key: mean_by_index(t, pixels.flatten(), len(adjacent))[None] for key, t in at_pixels.items()}
    maps["x"], valid = eq3_15_node_features(maps["x"]), torch.ones_like(maps["place"][..., :1])
    return SimpleNamespace(**maps, valid=valid, adjacent=adjacent, pixels=pixels, size=(H, W))


def mean_by_index(values, index, n):
    """(P,C), (P,) in 0…n−1 -> (n,C): mean of the values of each index."""
    total = torch.zeros(n, values.shape[1], device=values.device).index_add_(0, index, values)
    return total / torch.bincount(index, minlength=n)[:, None]


def superpixels(image, number):
    """SLIC as GraphNet's nodes (Table 3.6).   -> index (H,W) from 0, adjacency (N,N) bool with self"""
    from skimage.segmentation import slic

    index = slic(image, n_segments=number, compactness=10, start_label=0)
    index = np.unique(index, return_inverse=True)[1].reshape(image.shape[:2])
    adjacent = np.eye(index.max() + 1, dtype=bool)
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        adjacent[a, b] = adjacent[b, a] = True
    return index, adjacent


class Pairs:
    """All pairs of nodes of B graphs on a common, padded grid that are connected, as tiles of a Window.

    near (B,T,q,k) bool: at most `radius` apart (square or Euclidean); superpixels: touching; radius 0: all
    place (B,T,q,k): squared distance on the grid
    """

    def __init__(self, graphs, radius, euclidean=False):
        self.graphs, superpixel = graphs, graphs[0].adjacent is not None
        h, w = (max(g.x.shape[i] for g in graphs) for i in (0, 1))
        self.window = Window(h, w, 0 if superpixel else radius)
        valid, place = self.padded("valid"), self.padded("place")
        dy, dx = self.apart(place[..., :1]), self.apart(place[..., 1:])
        self.place = dy * dy + dx * dx
        self.near = (self.window.queries(valid) > 0) & (self.window.keys(valid).transpose(-1, -2) > 0)
        if superpixel:
            touching = [F.pad(g.adjacent, (0, w - len(g.adjacent), 0, w - len(g.adjacent))) for g in graphs]
            self.near &= torch.stack(touching)[:, None]
        elif radius > 0:
            self.near &= ((self.place <= radius**2) if euclidean else
                          (torch.maximum(dy.abs(), dx.abs()) <= radius))

    def padded(self, key):
        """(B,h,w,C) of one attribute of the graphs, 0 beyond each graph's own grid."""
        h, w = self.window.h, self.window.w
        maps = (getattr(g, key) for g in self.graphs)
        return torch.stack([F.pad(t, (0, 0, 0, w - t.shape[1], 0, h - t.shape[0])) for t in maps])

    def apart(self, t):
        """(B,h,w,1) -> differences (B,T,q,k)."""
        return self.window.queries(t) - self.window.keys(t).transpose(-1, -2)

    def squared_colour(self):
        return sum(self.apart(channel) ** 2 for channel in self.padded("colour").split(1, dim=-1))

    def distance(self):
        """Eq. (3.8)'s exponent between the features f, (B,T,q,k)."""
        f = self.padded("f")
        return torch.cdist(self.window.queries(f), self.window.keys(f), p=1.0) / f.shape[-1]


def random_walk(score, affinity, window, steps):
    """Table 3.4's RW: scores (B,h,w,C) go `steps` times along the row-normalised affinities (B,T,q,k)."""
    transition = affinity / affinity.sum(-1, keepdim=True).clamp_min(1e-12)
    for _ in range(steps):
        score = window.fold(transition @ window.keys(score))
    return score


# ── A²GNN (§3.3.4, §3.3.5): one value per image from each loss, (B,), since each image has its own network ──
def eq3_17_18_attention(H, E, w, beta, window, use_cos=True, use_edge=True):
    """Eqs. (3.17), (3.18): H^{l+1} = P H^l, P(i,j) = softmax_{j∈S(i)} (w cos(H_i,H_j) + β [cos > 0] E_ij).

    H (B,h,w,d), w (B,) -> (B,h,w,d); E (B,T,q,k) with 0 for j ∉ S(i), or what edge_terms made of it
    """
    joined, apart = E if isinstance(E, tuple) else edge_terms(E, beta)
    norm = H.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    unit, w = H / norm, w[:, None, None, None]
    k = window.keys(unit)
    logits = window.queries(unit * w if use_cos else unit) @ k.transpose(-1, -2)        # w cos
    positive = torch.where(w > 0, logits > 0, logits < 0) if use_cos else logits > 0
    logits = (logits if use_cos else 0) + (torch.where(positive, joined, apart) if use_edge else apart)
    P = logits.softmax(-1)
    return window.fold((P * window.keys(norm).transpose(-1, -2)) @ k)  # keys of H are norm · unit


def edge_terms(E, beta):
    """What Eq. (3.18) adds where the cosine is positive, β E, and where it is not, 0; -1e9 for j ∉ S(i)."""
    apart = torch.where(E > 0, 0.0, -1e9)
    return apart + beta * E, apart


def gcn_layer(H, E, window):
    """GCN (Kipf and Welling): sum over neighbours with symmetric normalisation, edges 0/1 (Fig. 3.7)."""
    A = (E > 0).float()
    degree = window.fold(A.sum(-1, keepdim=True)).clamp_min(1).rsqrt()
    return window.fold(A @ window.keys(H * degree)) * degree


def gat_layer(H, E, a, window):
    """GAT (Veličković et al.), one head: softmax over S(i) of LeakyReLU(a₁·H_i + a₂·H_j).   a (B,d,2)"""
    s = (H.flatten(1, 2) @ a).unflatten(1, H.shape[1:3])
    logits = F.leaky_relu(window.queries(s[..., :1]) + window.keys(s[..., 1:]).transpose(-1, -2), 0.2)
    return window.fold(logits.masked_fill(E <= 0, -1e9).softmax(-1) @ window.keys(H))


def eq3_21_cross_entropy(log_O, M_g, balanced=False):
    """Eq. (3.21): −mean log O where labelled; [D9] balanced: fg, bg apart.   log_O (B,C,H,W), M_g (B,H,W)"""
    nll = -log_O.gather(1, M_g.clamp_max(log_O.shape[1] - 1)[:, None])[:, 0]
    sets = ((M_g == 0), (M_g > 0) & (M_g != 255)) if balanced else (M_g != 255,)
    return sum((nll * s).sum((1, 2)) / s.sum((1, 2)).clamp_min(1) for s in sets)


def eq3_22_regularised(O, G, window, nodes):
    """Eq. (3.22): Σ_ab G(a,b) Σ_{ci≠cj} O^ci(a) O^cj(b) over the window, per node. [D5] [D16]

    O (B,h,w,C), 0 beyond the image's grid; G (B,T,q,k), nodes (B,) number of nodes -> (B,)
    """
    same = window.queries(O) * (G @ window.keys(O))                                     # Σ_b G(a,b) O(a) O(b)
    return (G.sum((1, 2, 3)) - same.sum((1, 2, 3))) / nodes


def inside_boxes(boxes, H, W):
    """boxes (M,6) long [image, class, x0, y0, x1, y1] -> each box's rows (M,H) and columns (M,W), bool"""
    _, _, x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    Y, X = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    return (Y >= y0) & (Y < y1), (X >= x0) & (X < x1)


@torch.no_grad()
def eq3_23_25_points(O, boxes):
    """Eqs. (3.23)–(3.25): in each row and column of a box the pixel where the box's class is most probable.

    O (B,C,H,W), boxes (M,6) -> y, x, valid (M,H+W): first one point per row, then one per column
    """
    rows, columns = inside_boxes(boxes, *O.shape[-2:])
    prob = O[boxes[:, 0], boxes[:, 1]].masked_fill(~(rows[:, :, None] & columns[:, None]), -torch.inf)
    Y, X = (torch.arange(n, device=O.device).expand(len(boxes), n) for n in O.shape[-2:])
    y, x = torch.cat([Y, prob.argmax(1)], dim=1), torch.cat([prob.argmax(2), X], dim=1)
    return y, x, torch.cat([rows, columns], dim=1)


def eq3_26_multi_point(log_O, H_points, boxes, points, feature=True):
    """Eq. (3.26): −mean log O^{B_j} over points + mean of 1 − cos(H_m,H_n) over all pairs of a box's points.

    H_points (M,P,d) features at the points. Σ_mn cos = ‖Σ_m H_m/‖H_m‖‖², so pairs cost no more than points.
    """
    y, x, valid = points
    image, c, n = boxes[:, 0], boxes[:, 1], valid.sum(1).float()

    def per_image(value):
        return torch.zeros(len(log_O), device=value.device).index_add(0, image, value)

    nll = -(log_O[image[:, None], c[:, None], y, x] * valid).sum(1)
    loss = per_image(nll) / per_image(n).clamp_min(1)                                   # N_p
    if feature:
        unit = F.normalize(H_points, dim=-1, eps=1e-8) * valid[..., None]
        apart = n * n - unit.sum(1).pow(2).sum(-1)
        loss = loss + per_image(apart) / per_image(n * n).clamp_min(1)                  # N_f
    return loss


def eq3_27_prototypes(H_points, valid):
    """Eq. (3.27): mean feature of a box's points.   (M,P,d), (M,P) -> (M,d)"""
    return (H_points * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)


@torch.no_grad()
def eq3_28_consistency(M_g, product, boxes):
    """Eq. (3.28): a seed of the box's class becomes 255 where its cosine with the prototype is ≤ 0. [D16]

    M_g (B,H,W); product (M,H,W): inner product of each pixel's feature with the box's prototype, which has
    the cosine's sign -> (B,H,W)
    """
    image, c = boxes[:, 0], boxes[:, 1, None, None]
    rows, columns = inside_boxes(boxes, *M_g.shape[1:])
    noisy = rows[:, :, None] & columns[:, None] & (M_g[image] == c) & (product <= 0)
    removed = torch.zeros(M_g.shape, device=M_g.device).index_add_(0, image, noisy.float()) > 0
    return torch.where(removed, 255, M_g)


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


def seam_augment(args):
    """SEAM's augmentation, of two networks; `pseudo` becomes 255 in the crop's padding, 0 elsewhere."""
    def augment(sample, rng):
        sample = changed(sample, pseudo=np.zeros_like(sample.image[..., 0]))
        sample = resize_long(sample, int(rng.integers(args.cam_resize[0], args.cam_resize[1] + 1)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(color_jitter(sample, rng, 0.3, 0.3, 0.3, 0.1), args.cam_crop, rng))
    return augment


def train_classifier(args, run, train_set):
    """SEAM on image tags (Algorithm 2, first loop)."""
    run.reseed("classifier")
    start = pretrained(args.cam_backbone, args.weights)
    weights = weights_of(args.cam_backbone, args.weights)
    backbone = make_backbone(args.cam_backbone, weights, args.cam_stride, start)
    net = SEAM(backbone, len(train_set.classes), args.pcm_power)
    ddp = run.place(net).train()
    new_layers = net.new_layers if start else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.cam_lr, args.weight_decay),
                            lr=args.cam_lr, momentum=args.cam_momentum)
    draws, schedule = Draws(train_set, seam_augment(args), args.seed), poly(args.cam_steps)
    for step, batch in run.steps("classifier", draws, args.cam_steps, args.cam_batch, net, optim, schedule):
        small = F.interpolate(batch.image, scale_factor=args.er_scale, mode="bilinear", align_corners=False)
        with run.autocast():
            full, reduced = ddp(batch.image, small)
        loss_cls, loss_min, loss_er, loss_ecr = seam_loss(full, reduced, batch.tags, args.ecr_top)
        loss = loss_cls + (step >= args.cam_warmup) * (loss_min + loss_er + loss_ecr)   # [D19]
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss_cls=loss_cls, loss_min=loss_min, loss_er=loss_er, loss_ecr=loss_ecr)
    return net.eval()


def write_seeds(args, run, net, train_set):
    """CAM -> M_I, M'_I -> seeds.   Writes cam/*.npz, seeds_F/*.png (M_F) and seeds/*.png (M_g).

    For tags seeds_F is M_I, for scribbles and points those alone, spread over superpixels (M_S, M_P); they
    have seeds_gnn/*.png too, since affinity CNN and GNN learn from different labels.
    """
    with run.timed("seeds"), ThreadPoolExecutor(max(1, args.workers)) as pool:
        for names in run.todo(train_set.names, "seeds", chunk=16, stage="seeds",
                              beside=("cam", "seeds_F", "seeds_gnn")):
            samples = [train_set[train_set.index(name)] for name in names]
            images = [s.image for s in samples]
            cams = [multi_scale_cam(net, s.image, s.tags, args.cam_scales, args.cam_stride, run.device)
                    for s in samples]
            pairs = [np.stack([with_background(cam, exponent) for exponent in (args.bg_low, args.bg_high)])
                     for cam in cams]
            refined = dense_crf(images, pairs, args.seed_crf, args.crf, args.workers, run.device)
            for s, cam, (crf_low, crf_high) in zip(samples, cams, refined):
                M_I = eq3_1_cam_labels(crf_low, crf_high)
                sure = confident_cam_labels(M_I, cam, crf_low, crf_high, args.bg_high, args.confident,
                                            args.confident_fg, args.confident_bg, args.confident_crf)
                present = np.flatnonzero(s.tags)
                save_npz(run.path("cam", s.name, ".npz"), cam=cam[present].astype(np.float16),
                         present=present)
                labels = weak_seeds(args, s, M_I, sure, pool)
                for folder in sorted(labels, reverse=True):                             # seeds last: todo's
                    save_label(run.path(folder, s.name), labels[folder])


def weak_seeds(args, sample, M_I, M_I_confident, pool):
    """The labels of one image that each supervision allows (§3.2, §3.3.2, §3.6.1).   -> {folder: (H,W)}

    seeds_F: all that is known; seeds: for the affinity CNN; seeds_gnn: for the GNN, where it is another.
    """
    if args.supervision == "image":
        return {"seeds_F": M_I, "seeds": M_I_confident}
    if args.supervision == "box":
        M_F, M_g = box_seeds(sample, M_I, M_I_confident, args.grabcut_steps, args.grabcut_min, pool)
        return {"seeds_F": M_F, "seeds": M_g}
    if args.supervision == "scribble":
        M_S = spread(sample.scribble, sample.image, args.superpixels)
        return {"seeds_F": M_S, "seeds": np.where(M_S != 255, M_S, M_I_confident), "seeds_gnn": M_S}
    M_P = spread(clicks(sample.points, *M_I.shape), sample.image, args.superpixels)
    merged = np.where(M_P != 255, M_P, M_I_confident)                                   # [D18]
    return {"seeds_F": M_P, "seeds": M_I_confident, "seeds_gnn": merged}


def clicks(points, H, W):
    """Points (P,3) [c, x, y] -> (H,W) uint8 labels, 255 elsewhere."""
    label = np.full((H, W), 255, np.uint8)
    for c, x, y in points:
        label[min(max(int(y), 0), H - 1), min(max(int(x), 0), W - 1)] = c
    return label


def spread(label, image, number):
    """§3.6.1: a superpixel takes the class of the weak labels inside it; labels of two classes stay alone.

    label (H,W) 255 = unknown, image (H,W,3) uint8 -> (H,W) uint8
    """
    index, _ = superpixels(image, number)
    known = label != 255
    low, high = np.full(index.max() + 1, 255), np.full(index.max() + 1, -1)
    np.minimum.at(low, index[known], label[known])
    np.maximum.at(high, index[known], label[known])
    return np.where(known, label, np.where(low == high, low, 255)[index]).astype(np.uint8)


def box_seeds(sample, M_I, M_I_confident, steps, minimum, pool):
    """§3.2, §3.3.2: M_F and M_g of one image from its boxes."""
    H, W = M_I.shape
    masks = list(pool.map(lambda box: eq3_2_grabcut(sample.image, box, steps, minimum), sample.boxes))
    M_B, owner = eq3_3_box_labels(sample.boxes, masks, H, W)
    M_F, by_boxes = eq3_4_fuse(M_I, M_B, owner, sample.boxes)
    return M_F, eq3_5_confident(M_F, M_I_confident, by_boxes)


def read_cam(run, name, classes):
    """cam/<name>.npz -> (K,H,W) float32, absent classes 0."""
    with np.load(run.path("cam", name, ".npz")) as file:
        cam = np.zeros((classes, *file["cam"].shape[1:]), np.float32)
        cam[file["present"]] = file["cam"]
    return cam


def train_affinity(args, run, classifier, train_set):
    """Affinity CNN on the confident seeds, Eq. (3.9): L_Aff = L_Ac + λ L_Ar (Algorithm 2, second loop)."""
    run.reseed("affinity")
    net = AffinityNet(make_backbone(args.cam_backbone, "none", args.stride))
    net.backbone.load_state_dict(classifier.backbone.state_dict())                      # [D4]
    ddp = run.place(net).train()
    optim = torch.optim.SGD(group_rates(net, net.new_layers, args.aff_lr, args.weight_decay),
                            lr=args.aff_lr, momentum=args.aff_momentum)
    labelled = with_labels(train_set, seed=run.dir / SEEDS[args.aff_labels])
    draws, schedule = Draws(labelled, seam_augment(args), args.seed), poly(args.aff_steps)
    offsets, s = window_offsets(args.aff_radius), args.stride
    for step, batch in run.steps("affinity", draws, args.aff_steps, args.aff_batch, net, optim, schedule):
        with run.autocast():
            F_A = ddp(batch.image)
        distance = PairDistance.apply(F_A.permute(0, 2, 3, 1).contiguous(), offsets)
        L_A, first = eq3_6_7_pair_labels(batch.seed[:, ::s, ::s], offsets)  # M'_g: the pixel of each cell
        loss = loss_ac = eq3_10_affinity_loss(distance, L_A, first, args.split_positives)
        loss_ar = torch.zeros(())
        if args.affinity_reg:
            colour = cell_colours(batch.image, s).permute(0, 2, 3, 1)
            loss_ar = eq3_12_affinity_regularised(distance, colour, batch.pseudo[:, ::s, ::s] != 255, offsets,
                                                  args.gauss_xy, args.gauss_rgb)
            loss = loss + args.w_affinity_reg * loss_ar                                 # Eq. (3.9)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss_ac=loss_ac, loss_ar=loss_ar, known=(L_A != 255).float().mean(),
                differ=(L_A == 0).float().mean())
    return net.eval()


@inference()
def write_walk(args, run, net, train_set):
    """Table 3.4's RW: random walk of the CAM, in boxes if any [D12].   Writes walk/*.png, walk_crf/*.png"""
    with run.timed("walk"):
        for names in run.todo(train_set.names, "walk_crf", chunk=16, stage="walk", beside=("walk",)):
            samples = [train_set[train_set.index(name)] for name in names]
            cams = [read_cam(run, name, len(train_set.classes)) for name in names]
            probs = [walk_image(args, net, s, cam, run.device) for s, cam in zip(samples, cams)]
            refined = dense_crf([s.image for s in samples], probs, args.gnn_crf, args.crf, args.workers,
                                run.device)
            for s, prob, crf in zip(samples, probs, refined):
                save_label(run.path("walk", s.name), prob.argmax(0))
                save_label(run.path("walk_crf", s.name), crf.argmax(0))


def walk_start(args, sample, cam):
    """Table 3.4's Baseline: CAM (K,H,W) inside its class's boxes, background 1 outside.   -> (K+1,H,W)"""
    allowed = np.full(cam.shape, args.supervision != "box")
    if args.supervision == "box":
        for box in sample.boxes:
            c, rows, columns = pixel_box(box, *cam.shape[1:])
            allowed[c - 1, rows, columns] = True
    return with_background(cam * allowed, args.walk_bg)


def walk_image(args, net, sample, cam, device):
    """Random walk of one image's CAM (K,H,W) -> probabilities (K+1,H,W)."""
    s = args.stride
    score = walk_start(args, sample, cam)[:, ::s, ::s]
    graph = image_to_graph(net, sample.image, s, "pixel", "affinity", device)
    pairs = Pairs([graph], args.aff_radius, euclidean=True)
    affinity = eq3_8_affinity(pairs.distance()) ** args.walk_beta * pairs.near
    start = torch.tensor(score, device=device).permute(1, 2, 0)[None]
    moved = random_walk(start, affinity, pairs.window, args.walk_steps).permute(0, 3, 1, 2)
    prob = enlarge(moved, *(matrix[None] for matrix in graph.pixels))[0]
    return (prob / prob.sum(0, keepdim=True)).cpu().numpy()


def make_graphs(args, net, samples, seeds, device):
    """B images and their seeds (H,W) -> all that train_gnn needs, padded to common sizes."""
    graphs = [image_to_graph(net, s.image, args.stride, args.nodes, args.edges, device) for s in samples]
    pairs, reg = Pairs(graphs, args.radius), Pairs(graphs, args.reg_radius)
    G = (eq3_13_gaussian(reg.place, reg.squared_colour(), args.gauss_xy, args.gauss_rgb)
         * (reg.near & (reg.place > 0)))
    valid, sizes = pairs.padded("valid"), [graph.size for graph in graphs]
    no_boxes = np.zeros((0, 5), np.float32)
    all_boxes = [getattr(s, "boxes", no_boxes) for s in samples]
    classes = [np.array(sorted({0, *(np.flatnonzero(s.tags) + 1), *own[:, 0].astype(int)}))
               for s, own in zip(samples, all_boxes)]                                   # output layers [D11]
    C = max(map(len, classes))
    local = np.full((len(samples), 256), 255)  # label -> output channel
    for b, own in enumerate(classes):
        local[b, own] = range(len(own))
    H, W = np.max(sizes, axis=0)
    labels = np.full((len(samples), H, W), 255)
    for b, seed in enumerate(seeds):
        labels[b, :seed.shape[0], :seed.shape[1]] = local[b][seed]
    boxes = [(b, local[b][int(box[0])], x.start, y.start, x.stop, y.stop) for b, own in enumerate(all_boxes)
             for box in own for _, y, x in [pixel_box(box, *sizes[b])]]
    return SimpleNamespace(
        graphs=graphs, sizes=sizes, classes=classes, shape=(H, W), x=pairs.padded("x"), valid=valid,
        nodes=valid.sum((1, 2, 3)), window=pairs.window,
        edges=eq3_14_edges(pairs.distance(), pairs.near, args.sigma), reg_window=reg.window, G=G,
        stride=args.stride, seeds=torch.tensor(labels, device=device),
        boxes=torch.tensor(boxes, dtype=torch.long, device=device).view(-1, 6),
        **pixel_maps(graphs, *valid.shape[1:3], H, W),
        absent=torch.tensor([[-1e9 * (c >= len(own)) for c in range(C)] for own in classes], device=device))


def pixel_maps(graphs, h, w, H, W):
    """How nodes become pixels, padded: {rows (B,H,h), columns (B,W,w)}, for superpixels {index (B,H,W)}."""
    def stacked(matrices, height, width):
        return torch.stack([F.pad(m, (0, width - m.shape[1], 0, height - m.shape[0])) for m in matrices])

    if graphs[0].adjacent is not None:
        return dict(index=stacked([g.pixels for g in graphs], H, W))
    rows, columns = zip(*(g.pixels for g in graphs))
    return dict(rows=stacked(rows, H, h), columns=stacked(columns, W, w))


def to_pixels(g, nodes, image=None):
    """Node maps (B,h,w,C) of a chunk of graphs -> (B,C,H,W).   image (M,): nodes (M,h,w,C) of these images"""
    image = slice(None) if image is None else image
    nodes = nodes.permute(0, 3, 1, 2)
    if hasattr(g, "index"):
        index = g.index[image]
        return nodes.flatten(2).gather(
            2, index.flatten(1)[:, None].expand(-1, nodes.shape[1], -1)).unflatten(2, g.shape)
    return enlarge(nodes, g.rows[image], g.columns[image])


def at_points(g, H, y, x):
    """Node features at the pixels (y, x), (M,P) each, of the boxes' images: what to_pixels would give there.

    H (B,h,w,d) -> (M,P,d)
    """
    image = g.boxes[:, :1]
    if hasattr(g, "index"):
        return H.flatten(1, 2)[image, g.index[image, y, x]]
    ends = []
    for place, axis in ((y, 0), (x, 1)):
        last = torch.tensor([graph.x.shape[axis] - 1 for graph in g.graphs], device=H.device)[image]
        place = (place / g.stride).minimum(last)
        low = place.floor().long()
        ends.append(((low, 1 - (place - low)), ((low + 1).minimum(last), place - low)))
    corners = [((image * H.shape[1] + i) * H.shape[2] + j, a * b) for i, a in ends[0] for j, b in ends[1]]
    index, weight = (torch.stack(side, dim=-1).flatten(0, 1) for side in zip(*corners))
    bags = F.embedding_bag(index, H.flatten(0, 2), per_sample_weights=weight.to(H.dtype), mode="sum")
    return bags.unflatten(0, y.shape)


def train_gnn(args, g, names):
    """§3.3.5: one A²GNN per image, trained from scratch in two phases, Eq. (3.20).   -> O (B,C,H,W)"""
    generators = [torch.Generator(g.x.device).manual_seed(zlib.crc32(f"{args.seed} {name}".encode()))
                  for name in names]
    net = A2GNN(generators, g.x.shape[-1], list(map(len, g.classes)), args.hidden, args.layers, args.beta,
                args.gnn, use_cos=not args.edge_only, use_edge=not args.attention_only)
    optim = torch.optim.Adam(net.parameters(), lr=args.gnn_lr, weight_decay=args.gnn_weight_decay)
    seeds = g.seeds
    boxes = args.supervision == "box"                          # §3.6: without them neither L_mp nor the check
    for epoch in range(sum(args.epochs)):
        second, labels = epoch >= args.epochs[0], seeds
        H, logits = net(g.x, g.edges, g.window, dropout_factors(g, generators, args.hidden, args.dropout))
        logits = logits + g.absent[:, None, None]
        log_O = to_pixels(g, logits).log_softmax(1)
        if boxes:
            y, x, valid = points = eq3_23_25_points(log_O, g.boxes)
            H_points = at_points(g, H, y, x)
        if boxes and args.consistency and (second or args.consistency_in_place):
            product = prototype_products(g, H.detach(), H_points.detach(), valid, args.consistency_cosine)
            labels = eq3_28_consistency(seeds, product, g.boxes)
            seeds = labels if args.consistency_in_place else seeds
        loss = eq3_21_cross_entropy(log_O, labels, args.balanced_ce)
        if boxes and args.mp_loss:
            loss = loss + eq3_26_multi_point(log_O, H_points, g.boxes, points, args.mp_feature)
        if args.reg and second:
            O = logits.softmax(-1) * g.valid
            loss = loss + args.w_reg * eq3_22_regularised(O, g.G, g.reg_window, g.nodes)
        optim.zero_grad()
        loss.sum().backward()  # Eq. (3.20), image by image
        optim.step()
    with torch.no_grad():
        return to_pixels(g, net(g.x, g.edges, g.window)[1] + g.absent[:, None, None]).softmax(1)


def dropout_factors(g, generators, hidden, p):
    """Dropout of each image from its own generator, whatever else is in the batch.   -> (B,h,w,hidden)"""
    h, w = g.valid.shape[1:3]
    factors = []
    for graph, generator in zip(g.graphs, generators):
        own = graph.x.shape[:2]
        keep = torch.rand((*own, hidden), generator=generator, device=g.x.device) >= p
        factors.append(F.pad(keep / (1 - p), (0, 0, 0, w - own[1], 0, h - own[0])))
    return torch.stack(factors)


def prototype_products(g, H, H_points, valid, cosine):
    """Inner products of each box's prototype (Eq. 3.27) with its image's features, at all pixels: (M,H,W).

    Linear in the features, so taken at the nodes and enlarged. centred [D8]: both minus the image's mean
    """
    prototype, image = eq3_27_prototypes(H_points, valid), g.boxes[:, 0]
    if cosine == "centred":
        mean = (H * g.valid).sum((1, 2)) / g.nodes[:, None]
        prototype, H = prototype - mean[image], H - mean[:, None, None]
    product = (H[image] * prototype[:, None, None]).sum(-1, keepdim=True)
    return to_pixels(g, product, image)[:, 0]


def write_pseudo(args, run, net, train_set):
    """One A²GNN per image, `batch_images` side by side; then CRF.   Writes pseudo_raw/*.png, pseudo/*.png"""
    folder = "seeds_gnn" if args.supervision in OWN_NODES else SEEDS[args.seed_labels]
    with run.timed("pseudo"):
        for names in run.todo(train_set.names, "pseudo", args.batch_images, stage="pseudo",
                              beside=("pseudo_raw",)):
            samples = [train_set[train_set.index(name)] for name in names]
            seeds = [read_label(run.path(folder, name), train_set.classes) for name in names]
            g = make_graphs(args, net, samples, seeds, run.device)
            O = train_gnn(args, g, names).cpu().numpy()
            probs = [o[:len(own), :H, :W] for o, own, (H, W) in zip(O, g.classes, g.sizes)]
            if args.supervision == "image" or args.supervision == "point" and args.point_walk:    # §3.6.1
                cams = [read_cam(run, name, len(train_set.classes)) for name in names]
                probs = [(prob + args.walk_share * walk_image(args, net, s, cam, run.device)[own])
                         / (1 + args.walk_share)
                         for prob, own, s, cam in zip(probs, g.classes, samples, cams)]
            refined = dense_crf([s.image for s in samples], probs, args.gnn_crf, args.crf, args.workers,
                                run.device)
            for name, own, prob, crf in zip(names, g.classes, probs, refined):
                save_label(run.path("pseudo_raw", name), own[prob.argmax(0)])
                save_label(run.path("pseudo", name), own[crf.argmax(0)])


def make_network(kind, backbone, weights, stride, rates, classes):
    """The segmentation networks of Table 3.1.   [D2] [D22]"""
    net = make_backbone(backbone, weights_of(backbone, weights), stride, pretrained(backbone, weights))
    if kind == "pspnet":
        return PSPNet(net, classes + 1)
    return DeepLab(net, ASPP(net.channels[-1], classes + 1, rates))


def train_segmenter(args, run, train_set):
    """DeepLab-v2 or PSPNet on the pseudo labels, or on ground truth with --supervision full."""
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.seg_crop, rng))

    def entropy(logits, stride, label):
        logits = cells_to_pixels(logits.float(), stride, label.shape[-2:])                      # [D13]
        return masked_mean(F.cross_entropy(logits, label, ignore_index=255, reduction="none"), label != 255)

    run.reseed("segmenter")
    net = make_network(args.segmenter, args.backbone, args.weights, args.seg_stride, args.seg_rates,
                       len(train_set.classes))
    ddp, strides = run.place(net).train(), net.backbone.strides
    new_layers = [part for name, part in net.named_children() if name != "backbone"]
    new_layers = new_layers if pretrained(args.backbone, args.weights) else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.seg_lr, args.weight_decay),
                            lr=args.seg_lr, momentum=0.9)
    full = args.supervision == "full"
    labelled = train_set if full else with_labels(train_set, pseudo=run.dir / args.train_on)
    draws, schedule = Draws(labelled, augment, args.seed), poly(args.seg_steps)
    for step, batch in run.steps("segmenter", draws, args.seg_steps, args.seg_batch, net, optim, schedule):
        label = batch.mask if full else batch.pseudo
        with run.autocast():
            logits = ddp(batch.image)
        if args.segmenter == "pspnet":
            main, auxiliary = (entropy(part, s, label) for part, s in zip(logits, strides[:-3:-1]))
            loss = main + args.seg_auxiliary * auxiliary
        else:
            loss = entropy(logits, strides[-1], label)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, known=(label != 255).float().mean(), background=(label == 0).float().mean())
    return net.eval()


# ── Instances (§3.4): pseudo masks and Mask R-CNN ───────────────────────────────────────────────────────────
def instances_in_boxes(label, boxes):
    """§3.4: the pixels in a box that have its class are its instance; in several boxes, the smallest's.

    [D20]   label (H,W), boxes (M,5) -> (M,H,W) bool, box by box
    """
    owner, places = np.full(label.shape, -1), [pixel_box(box, *label.shape) for box in boxes]
    for k in np.argsort([-owner[rows, columns].size for _, rows, columns in places], kind="stable"):
        c, rows, columns = places[k]
        owner[rows, columns][label[rows, columns] == c] = k
    return owner == np.arange(len(boxes))[:, None, None]


def write_pseudo_instances(args, run, train_set):
    """Boxes and the labels of --train-on -> instances.   Writes instances/*.npz, in the order of the boxes"""
    with run.timed("pseudo_instance"):
        for (name,) in run.todo(train_set.names, "instances"):
            boxes = train_set[train_set.index(name)].boxes
            masks = instances_in_boxes(read_label(run.path(args.train_on, name), train_set.classes), boxes)
            save_instances(run.path("instances", name, ".npz"), masks, boxes[:, 0].astype(int),
                           masks.any((1, 2)).astype(float))


def make_detector(backbone, weights, size, width, rois, classes):
    """Mask R-CNN. [D14]   size: longer side that pictures are brought to"""
    stride = 16 if backbone in ("tiny", "vgg16") else 32                                # as it is by nature
    start = pretrained(backbone, weights)
    net = make_backbone(backbone, weights_of(backbone, weights), stride, start)
    if start:
        net.blocks[0].requires_grad_(False)  # as Detectron: FREEZE_AT 2
    return mask_rcnn(net, size, width, rois, classes)


class Objects(torch.utils.data.Dataset):
    """A data set's objects: boxes (M,5) whose first column counts from 1, the same numbers in `instances`
    (H,W), their classes (M,).

    folder: what write_pseudo_instances wrote, beside the given boxes; None: ground truth, where a picture
    without instance masks (SBD's) has one of each connected region.
    """

    def __init__(self, dataset, folder=None):
        self.dataset, self.folder = dataset, folder

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        s = self.dataset[i]
        if self.folder is None:
            objects = objects_of(s.mask, getattr(s, "instances", None))
            boxes, masks = derive_boxes(objects), [mask for _, mask in objects]
        else:
            boxes, (masks, _, _) = s.boxes, read_instances(self.folder / f"{s.name}.npz")
        boxes, number = boxes[:254], np.zeros(s.image.shape[:2], np.uint8)              # [D20] 255 is padding
        for k, mask in enumerate(masks[:254], 1):
            number[mask] = k
        rows = np.arange(1, len(boxes) + 1, dtype=np.float32)
        return Sample(name=s.name, image=s.image, tags=s.tags, instances=number,
                      boxes=np.column_stack([rows, boxes[:, 1:]]), classes=torch.tensor(boxes[:, 0]).long())


def detector_targets(batch):
    """What torchvision's detector learns from; an object without a pixel is left out.   batch of Objects
    -> list of {boxes (M,4), labels (M,), masks (M,H,W) uint8}"""
    targets = []
    for boxes, number, classes in zip(batch.boxes, batch.instances, batch.classes):
        masks = number == boxes[:, :1, None]
        kept = masks.flatten(1).any(1)
        targets.append({"boxes": boxes[kept, 1:], "labels": classes[boxes[kept, 0].long() - 1],
                        "masks": masks[kept].byte()})
    return targets


def train_detector(args, run, train_set):
    """Mask R-CNN on the pseudo instances, or on ground truth with --supervision full."""
    def augment(sample, rng):
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(resize_long(sample, args.inst_size), args.inst_size, rng))

    run.reseed("detector")
    net = make_detector(args.backbone, args.weights, args.inst_size, args.inst_width, args.inst_rois,
                        len(train_set.classes))
    ddp = run.place(net).train()
    optim = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=args.inst_lr, momentum=0.9,
                            weight_decay=args.inst_weight_decay)
    folder = None if args.supervision == "full" else run.dir / "instances"
    draws = Draws(Objects(train_set, folder), augment, args.seed)
    schedule = detector_schedule(args.inst_steps, args.inst_warmup)
    for step, batch in run.steps("detector", draws, args.inst_steps, args.inst_batch, net, optim, schedule):
        targets = detector_targets(batch)
        losses = ddp(list(batch.image), targets)  # without autocast: its losses are inside
        optim.zero_grad()
        sum(losses.values()).backward()
        optim.step()
        run.log(step, objects=sum(len(t["labels"]) for t in targets) / len(targets), **losses)
    return net.eval()


@inference()
def predict_instances(net, image, device):
    """image (H,W,3) uint8 -> soft masks (M,H,W) in [0,1], classes (M,) from 1, scores (M,), best first"""
    found = net([normalise(Sample(image=image)).image.to(device)])[0]
    return found["masks"][:, 0].cpu().numpy(), found["labels"].cpu().numpy(), found["scores"].cpu().numpy()


def refine_instances(image, soft, crf, backend, device):
    """§3.4: dense CRF of each instance against the rest.   [D21] (M,H,W) in [0,1] -> (M,H,W) bool"""
    masks = soft > 0.5
    if not len(soft):
        return masks
    refined = dense_crf([image], [np.stack([1 - soft, soft], axis=1)], crf, backend, device=device)[0]
    refined = refined.argmax(1) > 0
    return np.where(refined.any((1, 2), keepdims=True), refined, masks)


def write_detections(args, run, net, val_set):
    """Mask R-CNN's instances without and with CRF.   Writes val_instance/*.npz, val_instance_crf/*.npz"""
    with run.timed("val_instance"):
        for (name,) in run.todo(val_set.names, "val_instance_crf"):
            image = val_set[val_set.index(name)].image
            soft, classes, scores = predict_instances(net, image, run.device)
            refined = refine_instances(image, soft, args.inst_crf, args.crf, run.device)
            save_instances(run.path("val_instance", name, ".npz"), soft > 0.5, classes, scores)
            save_instances(run.path("val_instance_crf", name, ".npz"), refined, classes, scores)


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
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


def instance_pairs(dataset, read):
    """True and found instances, picture by picture; pictures without instance masks (SBD's) are left out.

    read(name) -> masks, classes, scores
    """
    for sample in (dataset[i] for i in range(len(dataset))):
        if hasattr(sample, "instances"):
            yield objects_of(sample.mask, sample.instances), read(sample.name)


def coco_aps(dataset, read):
    """COCO's AP over IoU 0.5 … 0.95, at 0.5 and 0.75, and of small, medium and large objects; percent.

    read as for instance_pairs. --data coco is scored on its file's own annotations, with crowds and overlaps.
    """
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def table(annotations):
        made = COCO()
        made.dataset = {"images": images, "categories": categories,
                        "annotations": [{**a, "id": k} for k, a in enumerate(annotations, 1)]}
        made.createIndex()
        return made

    images, real, ours = [], [], []
    categories = [{"id": k} for k in range(1, len(dataset.classes) + 1)]
    own = getattr(dataset.source, "annotations", None)
    for i in range(len(dataset)):
        s = dataset[i]
        if not hasattr(s, "instances"):
            continue
        images.append({"id": i, "height": s.image.shape[0], "width": s.image.shape[1]})
        real += [{**a, "image_id": i} for a in (own(s.name) if own else coco_annotations(s))]
        ours += [{"image_id": i, "category_id": int(c), "score": float(score), "iscrowd": 0,
                  "area": float(mask.sum()), "segmentation": rle.encode(np.asfortranarray(mask, np.uint8))}
                 for mask, c, score in zip(*read(s.name))]
    with contextlib.redirect_stdout(io.StringIO()):  # it says much
        score = COCOeval(table(real), table(ours), "segm")
        score.evaluate()
        score.accumulate()
        score.summarize()
    names = ("ap", "ap50_coco", "ap75_coco", "ap_s", "ap_m", "ap_l")
    return {name: 100 * value if value >= 0 else None for name, value in zip(names, score.stats.tolist())}


def evaluate_labels(args, run, split):
    """Scores what the stages wrote. Only here and in draw_a2gnn are masks of weak labels' images seen."""
    truth = load(args, split, masks=True, fields=("mask", "instances", "boxes"))
    notes = {**load(args, split).notes, **truth.notes}                                  # what was derived
    if "mask" not in truth.fields:                                                    # own data may lack it
        return

    def written(folder):
        return confusion_of(truth, lambda s: read_label(run.path(folder, s.name), truth.classes))

    def aps(folder):
        def read(name):
            return read_instances(run.path(folder, name, ".npz"))
        values, images = instance_aps(instance_pairs(truth, read), len(truth.classes))
        return {"n_images": images, **values, **coco_aps(truth, read)}

    def result(stage, confusion, timed, **values):
        values = {"n_images": len(truth), **values}
        run.result(stage, confusion, split=split, uses_masks=True, notes=notes,
                   seconds=round(sum(map(run.seconds, timed)), 1), **values)

    if split == "val" and args.task == "instance":
        plain = aps("val_instance")
        result("val_instance", None, ["detector", "val_instance"], crf=True, **aps("val_instance_crf"),
               ap50_no_crf=plain["ap50"], ap_no_crf=plain["ap"])
        return
    if split == "val":
        for stage in ("val", "val_crf"):
            result(stage, written(stage), ["segmenter", "val"], crf="crf" in stage, scales=args.test_scales)
        return
    cam = confusion_of(truth, lambda s: with_background(
        read_cam(run, s.name, len(truth.classes)), args.bg_low).argmax(0))
    result("cam", cam, ["classifier"], crf=False, scales=args.cam_scales)
    M_F, M_g = written("seeds_F"), written("seeds")
    control = confusion_of(truth, lambda s: seeds_with_crf(
        s, read_label(run.path("seeds_F", s.name), truth.classes), args.gnn_crf, args.crf, run.device))
    result("seed", M_F, ["seeds"], crf=True, precision=M_F.precision(), coverage=M_F.coverage(),
           miou_confident=M_g.miou(), precision_confident=M_g.precision(), coverage_confident=M_g.coverage(),
           miou_crf_control=control.miou())
    start = confusion_of(truth, lambda s: walk_start(
        args, s, read_cam(run, s.name, len(truth.classes))).argmax(0))
    result("walk", written("walk"), ["affinity", "walk"], crf=False, miou_crf=written("walk_crf").miou(),
           miou_start=start.miou())
    result("pseudo", written("pseudo"), ["pseudo"], crf=True, miou_no_crf=written("pseudo_raw").miou())
    if args.task == "instance":
        result("pseudo_instance", None, ["pseudo", "pseudo_instance"], **aps("instances"),
               crf=args.train_on not in ("pseudo_raw", "walk"))


def seeds_with_crf(sample, seed, crf, backend, device):
    """Control: box seeds and a CRF only; a labelled pixel starts at 0.7, an unknown one even.   -> (H,W)"""
    present = np.concatenate([[0], np.flatnonzero(sample.tags) + 1])
    local = np.full(256, 255)
    local[present] = range(len(present))
    prob = label_probs(local[seed], len(present))
    return present[dense_crf([sample.image], [prob], crf, backend, device=device)[0].argmax(0)]


def draw_a2gnn(args, run, split):
    """panels/<split>.png of what the stages wrote; with --task instance of instances too."""
    truth, instance = load(args, split, masks=True, fields=("mask", "instances")), args.task == "instance"

    def objects(folder):
        def cell(sample):
            masks, _, scores = read_instances(run.path(folder, sample.name, ".npz"))
            return instance_overlay(sample.image, masks, scores, 0.5)
        return cell

    if split == "train":
        seeds = {"seed M_F": "seeds_F", "seed M_g": "seeds"}
        if args.supervision in OWN_NODES:
            seeds = {"seed, affinity CNN": "seeds", "seed M_g": "seeds_gnn"}
        columns = {"CAM": lambda s: read_cam(run, s.name, len(truth.classes)).max(0), **seeds,
                   "walk": "walk", "A2GNN": "pseudo_raw", "A2GNN + CRF": "pseudo"}
        columns |= {"instances": objects("instances")} if instance else {}
    elif instance:
        columns = {"instances": objects("val_instance"), "instances + CRF": objects("val_instance_crf")}
    else:
        columns = {"prediction": "val", "prediction + CRF": "val_crf"}
    draw_panels(run, split, truth, columns, "instances" if instance else "mask")


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder; of instances if --checkpoint is a detector.pt.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given); of
    instances also predict/*.npz with masks, classes and scores.
    """
    kinds = {"head.branches.0.weight": "deeplab", "head.4.weight": "pspnet",
             "roi_heads.box_predictor.cls_score.weight": "instance"}
    state, last = read_predictor(args, Args, "segmenter.pt or detector.pt", *kinds)
    device, made = start_processes(args.device), Args(**state["args"])
    kind, classes = kinds[last], len(state["model"][last]) - 1
    if kind == "instance":
        net = make_detector(made.backbone, "none", made.inst_size, made.inst_width, made.inst_rois, classes)
    else:
        net = make_network(kind, made.backbone, "none", made.seg_stride, made.seg_rates, classes)
    net = with_weights(net, state, device)
    for image, path in pictures_to_predict(args):
        if kind == "instance":
            soft, found, scores = predict_instances(net, image, device)
            masks = refine_instances(image, soft, CRF(*made.inst_crf), args.crf, device)
            save_instances(f"{path}.npz", masks, found, scores)
            label = numbered(masks[scores >= 0.5], scores[scores >= 0.5])
        else:
            prob = predict(net, image, made.test_scales, device)
            label = dense_crf([image], [prob], CRF(*made.seg_crf), args.crf, device=device)[0].argmax(0)
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_a2gnn(args, val_set):
    """What would else fail after hours fails now."""
    instance = args.task == "instance"
    if instance and args.supervision not in ("box", "full"):
        raise UserError(f"--task instance needs boxes: --supervision box (or full), not {args.supervision}")
    if instance and "instances" not in val_set.fields:
        raise UserError("--task instance: the val pictures have no instance masks (val/instances in a folder "
                        "of your own, SegmentationObject in VOC) to score with")
    if instance:                                                                       # wrong weights: now
        make_detector(args.backbone, args.weights, args.inst_size, args.inst_width, args.inst_rois, 1)
    else:
        make_network(args.segmenter, args.backbone, args.weights, args.seg_stride, args.seg_rates, 1)


def main():
    """Algorithm 2 from top to bottom, then the last network; --supervision full: that network alone."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    args.cam_backbone = args.backbone if args.cam_backbone == "same" else args.cam_backbone
    if args.predict:
        return predict_folder(args)
    weak, instance, seen = args.supervision != "full", args.task == "instance", ("mask", "instances")
    train_set = load(args, "train", fields=None if weak else seen)
    val_set = load(args, "val", fields=seen)
    check_a2gnn(args, val_set)
    run = Run(args, FIELDS)
    if weak:
        classifier = train_classifier(args, run, train_set)                             # Eq. (3.1)
        write_seeds(args, run, classifier, train_set)                                   # Eqs. (3.1)–(3.5)
        affinity = train_affinity(args, run, classifier, train_set)                     # Eqs. (3.6)–(3.13)
        write_walk(args, run, affinity, train_set)                                      # Table 3.4's RW
        write_pseudo(args, run, affinity, train_set)                                    # Eqs. (3.14)–(3.28)
        if instance:
            write_pseudo_instances(args, run, train_set)                                # §3.4
        if not run.has("pseudo_instance" if instance else "pseudo"):
            draw_a2gnn(args, run, "train")
            evaluate_labels(args, run, "train")
    if instance:
        detector = train_detector(args, run, train_set)
        write_detections(args, run, detector, val_set)
    else:
        segmenter = train_segmenter(args, run, train_set)
        write_predictions(args, run, segmenter, val_set)
    if not run.has("val_instance" if instance else "val_crf"):
        draw_a2gnn(args, run, "val")
        evaluate_labels(args, run, "val")
    run.table()


if __name__ == "__main__":
    main()
