"""IRNet: Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations.
J. Ahn, S. Cho, S. Kwak; CVPR 2019. Equation numbers: the paper's.

Symbols      x image (B,3,H,W) · φ_c weights of class c · M_c its CAM · M̂ pseudo class map, 255 = unknown ·
             P⁺_fg, P⁺_bg, P⁻ pairs of cells (B,P) · D displacement field (B,2,h,w), (y, x) in cells ·
             B class boundaries (B,h,w) · Π_ij cells on the line from i to j · a_ij affinity · γ radius ·
             C centroids · I instance map (h,w) · M̄_ck CAM of class c in instance k · T transitions · t steps
Equations    (1) eq1_cam    (2–4) eq2_offsets, eq3_4_pair_sets    (5) eq5_displacement_fg
             (6) eq6_displacement_bg    (7) eq7_affinity    (8) eq8_boundary    (9) train_irnet
             (10) eq10_refine    (11) eq11_instance_cams    (12) eq12_transitions    (13) eq13_random_walk
             (14) eq14_centroids    (15) eq15_instance_map
Figures      Fig. 1 = main(); Fig. 2 = IRNet; Fig. 3 = relations_of; Fig. 9 = panels/train.png
Tables       Table 1: ap50_cam, ap50_boundary, ap50 of stage pseudo_instance. Table 2: miou of cam and pseudo;
             its AffinityNet column is not in this file (a2gnn.py has an affinity CNN with random walk)
Commands     python irnet.py                                  # embedded shapes, made for two CPU cores
             python irnet.py --data voc --root data/voc       # paper: 63.5 val with CRF, 46.7 AP50
             python irnet.py --data voc --root data/voc --supervision full       # upper bound; paper: 72.3
             python irnet.py --data voc --root data/voc --train-on cam           # networks on CAMs alone
             python irnet.py --predict photos/ --checkpoint runs/irnet-voc-image-s0/segmenter.pt
             python irnet.py --predict photos/ --checkpoint runs/irnet-voc-image-s0/detector.pt
Departures   [D1] second level of the displacement branch: 128 channels (authors' code); §4.1 would keep 256
             [D2] segmentation network: trained at one scale a step, not DeepLab-v2's three with shared loss
             [D3] "gradients amplified by a factor of 10": ten times the learning rate (authors' code)
             [D4] IRNet's frozen backbone has the classifier's trained weights; "identical to that of the
                  classification network" may mean the architecture only (--irn-init weights)
             [D5] Eq. 2: all pairs inside the crop; the authors leave out those that start near its border
             [D6] Π_ij: all cells less than one cell away from the line, a thick line (authors' code)
             [D7] Eq. 10: the second D is the initial field, bilinear between cells, kept inside the map.
                  100 iterations as in the paper; the authors' code has 300
             [D8] "the mean of D": over the whole training set (authors' code), not of each image
             [D9] D of Eq. 14 is the initial field, of Eq. 15 the refined one; a cell whose vector ends in no
                  centroid belongs to no instance (paper silent)
             [D10] SGD without momentum for classifier and IRNet: what the published optimiser really does
             [D11] "less than bottom 25 %": below 0.25 of the image's highest score (authors' code)
             [D12] unconnected parts of an instance count as several, those below 1 % of the image score 0 and
                  teach nothing (authors' code)
             [D13] odd kernels centre feature cell i on pixel stride·i: so CAM, walk, boundaries and scores
                  are enlarged (the authors' bilinear is half a cell off); taps by torch's bilinear
             [D14] Mask R-CNN is torchvision's with the paper's FPN over --backbone; pictures are squares of
                  one size; the number of steps, which the paper does not give, is a guess
             [D15] classifier: the first three levels do not learn (authors' code); without pretrained weights
                  they do
             [D16] Eqs. 5, 6, 8, 9 as printed; the authors halve L^B and divide the others by four
                  (--authors-weights): at the same rates our step of D is four times theirs.
                  log(a + 1e-5) instead of log a keeps Eq. 8 finite
             [D17] IRNet sees pictures padded to its crop size, as in the authors' code, and to whole cells
             [D18] presets: IRNet learns with momentum 0.9 and rate 0.05 of both branches, in place of 0.1
                  and ten times that without momentum: few steps of few images. photos: the weight of Eq. 6
                  grows from 0 to 1 in the first half of the steps. Otherwise D becomes constant within 40
                  steps and stays so ("spread" in log.jsonl): probably since at D = 0 a step loses in Eq. 6
                  what it gains in Eq. 5, and layers below an output of 0 learn nothing
             [D19] preset shapes: t = 50, since the walk's reach grows with √t and the scenes' grid has about
                  55 cells a side where VOC's has 125: 256 · (55/125)²
             [D20] labels are scored on all training pictures, with train_aug 10,582; the paper's 48.3 and
                  66.5 are of VOC's own 1,464 (--train-list train)
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torchvision.ops import masks_to_boxes

from common import (
    ASPP, CRF, DeepLab, Run, UserError, cells_to_pixels, confusion_of, dense_crf, detector_schedule,
    draw_panels, inference, instance_aps, instance_overlay, label_probs, make_backbone, mask_rcnn, numbered,
    parse_args, pictures_to_predict, poly, pretrained, read_instances, read_predictor, reduce, save_instances,
    save_label, save_npz, save_prediction, start_processes, weights_of, with_weights, world)
from data import (
    Draws, Sample, crop, flip, load, normalise, objects_of, read_label, rescale, resize_batch,
    resize_long, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco", "workpiece"] = "shapes"
    """data set of data.py; shapes is drawn on the fly, workpiece is any folder of your own"""
    supervision: Literal["image", "full"] = "image"
    """what the training set may reveal; full = the same two networks on ground truth (upper bounds)"""
    backbone: Literal["tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2"] = "resnet50"
    """of all four networks (§3, §A.2: ResNet-50)"""
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
    # --- 1 classifier and CAM (§3; schedule of the authors' code) ---
    cam_stride: int = 16
    """§3: output stride of classifier and IRNet; strides beyond it become 1, without dilation"""
    cam_steps: int = 3307
    """5 epochs of 10,582 images at batch 16"""
    cam_batch: int = 16
    """images a step, over all processes"""
    cam_lr: float = 0.1
    """§6.1, backbone; the new layer x10; poly 0.9"""
    cam_momentum: float = 0.0
    """the published optimiser ran without [D10]"""
    cam_crop: int = 512
    """pixels"""
    cam_resize: tuple[int, int] = (320, 640)
    """the longer side is drawn from this range"""
    cam_scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """scales of the CAM, each with its mirror image"""
    cam_threshold: float = 0.15
    """authors' code: a CAM above it is foreground in the rows "CAM" of Tables 1 and 2"""
    # --- 2 inter-pixel relations (§4.2) ---
    confident_fg: float = 0.3
    """§4.2: a CAM above it is confident foreground"""
    confident_bg: float = 0.05
    """§4.2: a CAM below it is confident background"""
    relation_crf: CRF = CRF(3, 3, 50, 5, 10, 10)
    """authors' code: Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations"""
    relation_prob: float = 0.7
    """authors' code: probability of a label as the CRF's unary"""
    # --- 3 IRNet (§4; schedule of the authors' code) ---
    irn_init: Literal["classifier", "weights"] = "classifier"
    """start of its frozen backbone: the trained classifier, or --weights [D4]"""
    irn_steps: int = 993
    """3 epochs of 10,582 images at batch 32"""
    irn_batch: int = 32
    """images a step, over all processes"""
    irn_lr: float = 0.1
    """§6.1, boundary branch; poly 0.9"""
    irn_amplify: float = 10.0
    """§6.1: factor of the displacement branch's gradients, here of its learning rate [D3]"""
    irn_momentum: float = 0.0
    """see cam_momentum"""
    irn_crop: int = 512
    """pixels, a multiple of --cam-stride"""
    irn_rescale: tuple[float, float] = (0.5, 1.5)
    """range of the random scale"""
    irn_radius: int = 10
    """γ of Eq. 2 (§6.1), cells"""
    irn_ramp: float = 0.0
    """share of the steps in which Eq. 6's weight grows from 0 to 1; paper: 0, always 1 [D18]"""
    authors_weights: bool = False
    """authors' code: L^B / 2, and L^D averaged over x and y, then halved [D16]"""
    # --- 4 label synthesis (§5) ---
    refine_steps: int = 100
    """§6.1: iterations of Eq. 10; authors' code 300"""
    centroid: float = 2.5
    """Eq. 14: shorter displacements are candidates for centroids, cells"""
    walk_radius: int = 5
    """§6.1: γ at inference, cells"""
    walk_beta: float = 10.0
    """§6.1: β of Eq. 12"""
    walk_steps: int = 256
    """§6.1: t of Eq. 13"""
    background: float = 0.25
    """§5.2: share of the highest score below which is background [D11]"""
    fragment: float = 0.01
    """authors' code: smaller parts of an image score 0 [D12]"""
    batch_images: int = 8
    """images whose walks run side by side on a GPU; does not change the result"""
    # --- 5 segmentation network (§A.2.2) ---
    train_on: Literal["displacement", "boundary", "cam"] = "displacement"
    """labels of both last networks: a row of Table 1; the semantic ones of the first two are the same"""
    seg_steps: int = 20_000
    """DeepLab-v2's"""
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
    seg_weight_decay: float = 5e-4
    """DeepLab-v2's"""
    weight_decay: float = 1e-4
    """of the other three networks (authors' code, Detectron)"""
    test_scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """§A.2.2; each with its mirror image"""
    seg_crf: CRF = CRF(1, 3, 67, 3, 4, 10)
    """DeepLab-v2's"""
    # --- 6 Mask R-CNN (§A.2.1; Detectron's defaults) ---
    mask_rcnn: bool = True
    """without it the run ends with the segmentation network"""
    inst_steps: int = 4500
    """the paper gives no number [D14]; users of the authors' labels report 18,000 at batch 4"""
    inst_batch: int = 16
    """images a step, over all processes"""
    inst_lr: float = 0.02
    """divided by 10 after 2/3 and 8/9 of the steps; momentum 0.9"""
    inst_warmup: int = 500
    """steps in which the rate rises from a third"""
    inst_size: int = 1066
    """longer side of a picture: VOC's 500 x 375 at Detectron's shorter side of 800"""
    inst_width: int = 256
    """channels of pyramid and mask head; the box head has four times as many"""
    inst_rois: int = 512
    """boxes that an image's losses are taken of"""


# What two CPU cores do in minutes; everything else as the paper. tiny's strides are half of ResNet-50's, and
# the scenes' objects are less than half as large as VOC's.
SHAPES = dict(
    backbone="tiny", weights="none", cam_stride=8, cam_steps=4000, cam_lr=0.05, cam_momentum=0.9,
    cam_crop=96, cam_resize=(96, 128), irn_steps=400, irn_batch=4, irn_lr=0.05, irn_amplify=1.0,   # [D18]
    irn_momentum=0.9, irn_crop=96, irn_rescale=(0.75, 1.25), walk_steps=50,                        # [D19]
    seg_stride=4, seg_steps=4000, seg_batch=8, seg_lr=0.02, seg_crop=96, seg_rates=(3, 6, 9, 12),
    seg_rescale=(0.75, 1.25), test_scales=(0.75, 1.0, 1.25),
    inst_steps=400, inst_batch=4, inst_warmup=100, inst_size=128,
    inst_width=64, inst_rois=64)
# A few hundred photographs with a pretrained backbone, in about an hour on two CPU cores.
PHOTOS = dict(
    train_list="train", cam_steps=165, cam_batch=8, cam_lr=0.05, cam_crop=320, cam_resize=(320, 512),
    irn_steps=2000, irn_batch=4, irn_lr=0.05, irn_amplify=1.0, irn_momentum=0.9, irn_crop=224,     # [D18]
    irn_ramp=0.5,
    seg_stride=16, seg_steps=1000, seg_batch=8, seg_lr=5e-4,
    seg_crop=257, seg_rates=(3, 6, 9, 12), test_scales=(0.75, 1.0, 1.25), mask_rcnn=False)

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "classifier": "data root train_list seed amp weights backbone cam_stride cam_steps cam_batch cam_lr "
                  "cam_momentum cam_crop cam_resize weight_decay",
    "cam": "supervision crf cam_scales confident_fg confident_bg relation_crf relation_prob",
    "irnet": "irn_init irn_steps irn_batch irn_lr irn_amplify irn_momentum irn_crop irn_rescale irn_radius "
             "irn_ramp authors_weights",
    "fields": "",
    "pseudo": "cam_threshold refine_steps centroid walk_radius walk_beta walk_steps background fragment",
    "segmenter": "train_on seg_steps seg_batch seg_lr seg_crop seg_rescale seg_stride seg_rates "
                 "seg_weight_decay",
    "detector": "inst_steps inst_batch inst_lr inst_warmup inst_size inst_width inst_rois",
}.items()}
ROWS = ("displacement", "boundary", "cam")                                              # Table 1, best first


# ── Networks (§3, §4.1) ─────────────────────────────────────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def without_dilation(backbone):
    """§3: the last downsampling's stride becomes 1 and nothing else changes, so kernels are not dilated."""
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d) and layer.dilation != (1, 1):
            layer.padding = tuple(p // d for p, d in zip(layer.padding, layer.dilation))
            layer.dilation = (1, 1)
    return backbone


class CamNet(nn.Module):
    """Image classifier (§3): features f, global average pooling and φ.

    forward(image (B,3,H,W)) -> tag logits (B,K);  scores(image) -> φ_cᵀ f(x) (B,K,h,w)
    """

    def __init__(self, backbone, classes, cut):
        super().__init__()
        self.backbone = backbone
        self.phi = nn.Conv2d(backbone.channels[-1], classes, 1, bias=False)
        if cut:
            backbone.blocks[:2].requires_grad_(False)                                   # [D15]

    def scores(self, image):
        return self.phi(self.backbone(image)[-1]).float()

    def forward(self, image):
        return self.scores(image).mean((2, 3))  # the mean of φᵀf is φᵀ of the mean


def five_levels(backbone, image):
    """§4.1's five levels: the first block's stem, then each block.   -> list of (B,c,h,w), fine to coarse"""
    first = backbone.blocks[0]
    levels = [first[:-1](image)]
    for block in (first[-1], *backbone.blocks[1:]):
        levels.append(block(levels[-1]))
    return levels


def narrow(inputs, outputs, groups):
    """§4.1: 1 x 1 convolution and group norm; the ReLU comes after an enlargement."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.GroupNorm(groups, outputs))


class IRNet(nn.Module):
    """§4.1, Fig. 2: two branches of 1 x 1 convolutions on the five levels of a frozen backbone.

    forward(image (B,3,H,W)) -> boundary logits (B,h,w), D (B,2,h,w), (y, x) in cells, both on the grid of the
    second level (stride 4 for ResNets). H, W: multiples of the output stride, so that levels lie in line.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.stride = backbone.requires_grad_(False), backbone.strides[0]
        with torch.no_grad():
            widths = [level.shape[1] for level in five_levels(backbone, torch.zeros(1, 3, 64, 64))]
        self.edge = nn.ModuleList(narrow(width, 32, 4) for width in widths)
        self.edge_out = nn.Conv2d(5 * 32, 1, 1)
        plan = zip(widths, (64, 128, 256, 256, 256), (8, 16, 16, 16, 16))               # [D1]
        self.field = nn.ModuleList(narrow(*layer) for layer in plan)
        self.merge = narrow(3 * 256, 256, 16)
        self.decode = nn.Sequential(narrow(64 + 128 + 256, 256, 16), nn.ReLU(), narrow(256, 256, 16),
                                    nn.ReLU(), nn.Conv2d(256, 2, 1, bias=False))
        self.boundary_branch = nn.ModuleList([*self.edge, self.edge_out])
        self.displacement_branch = nn.ModuleList([*self.field, self.merge, self.decode])

    def forward(self, image):
        with torch.no_grad():
            levels = five_levels(self.backbone, image)
        grid, middle = levels[1].shape[-2:], levels[2].shape[-2:]
        edge = [F.relu(resample(layer(level), grid)) for layer, level in zip(self.edge, levels)]
        fine = [F.relu(resample(layer(level), grid)) for layer, level in zip(self.field[:2], levels)]
        coarse = [F.relu(resample(layer(level), middle)) for layer, level in zip(self.field[2:], levels[2:])]
        merged = F.relu(resample(self.merge(torch.cat(coarse, dim=1)), grid))           # top-down path way
        with torch.autocast(image.device.type, enabled=False):  # bf16 is too coarse for places
            D = self.decode(torch.cat([*fine, merged], dim=1).float())
        return self.edge_out(torch.cat(edge, dim=1))[:, 0].float(), D


# ── Class attention maps (§3) and confident areas (§4.2): arrays in, arrays out ─────────────────────────────
def eq1_cam(scores):
    """Eq. (1): M_c(x) = φ_cᵀ f(x) / max_x φ_cᵀ f(x), negative scores cut.   (K,H,W) -> (K,H,W) in [0,1]"""
    scores = F.relu(scores)
    return scores / scores.amax((-2, -1), keepdim=True).clamp_min(1e-5)


@inference()
def cam_of_image(net, image, tags, scales, stride, device):
    """CAM, Eq. (1), of scores summed over scales and mirror images.

    image (H,W,3) uint8, tags (K,) bool -> (K,H,W) float32, absent classes 0
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    total = 0
    for scale in scales:
        seen = [max(32, round(n * scale)) for n in image.shape[:2]]
        scaled = resize_batch(x, seen)
        scores = F.relu(net.scores(torch.cat([scaled, scaled.flip(-1)]))[:, tags])
        scores = cells_to_pixels(scores, stride, image.shape[:2], seen)
        total = total + scores[0] + scores[1].flip(-1)
    full = np.zeros((len(tags), *image.shape[:2]), np.float32)
    full[tags] = eq1_cam(total).cpu().numpy()
    return full


def with_threshold(scores, threshold):
    """(C,H,W) -> (C+1,H,W): background first, with one score for all pixels."""
    return np.concatenate([np.full_like(scores, threshold, shape=(1, *scores.shape[1:])), scores])


def confident_maps(cam, fg, bg, prob):
    """§4.2: labels at both thresholds as unaries of a dense CRF.   cam (C,H,W) -> (2,C+1,H,W)"""
    labels = (with_threshold(cam, threshold).argmax(0) for threshold in (fg, bg))
    return np.stack([label_probs(label, len(cam) + 1, prob) for label in labels])


def relations_of(refined, present):
    """§4.2: M̂, foreground where the strict threshold's refined map has it, background where the loose one's
    has none either, else 255.   refined (2,C+1,H,W), present (C,) classes from 0 -> (H,W) uint8"""
    strict, loose = refined.argmax(1)
    classes = np.concatenate([[0], present + 1])
    return np.where(strict > 0, classes[strict], np.where(loose > 0, 255, 0)).astype(np.uint8)


# ── Inter-pixel relations (§4.2) and losses (§4.3, §4.4) ────────────────────────────────────────────────────
def eq2_offsets(radius, h, w):
    """Eq. (2): half of the (dy,dx) ≠ 0 with ‖(dy,dx)‖₂ < γ, so that each pair of cells of an h x w map comes
    once. [D5]"""
    return [(dy, dx) for dy in range(min(radius, h)) for dx in range(1 - min(radius, w), min(radius, w))
            if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius]


def shifted(x, dy, dx):
    """Both ends of all pairs (i, i + (dy,dx)) in the map, dy ≥ 0.   (B,h,w,…) -> two views of equal shape"""
    h, w = x.shape[1:3]
    return x[:, :h - dy, max(0, -dx):w - max(0, dx)], x[:, dy:, max(0, dx):w - max(0, -dx)]


def eq3_4_pair_sets(M, offsets):
    """Eqs. (3), (4): P⁺_fg, P⁺_bg, P⁻.   M (B,h,w) with 255 = unknown -> three (B,P) bool

    P: all pairs, offset by offset, here and in the functions below.
    """
    ends = [[end.flatten(1) for end in shifted(M, *offset)] for offset in offsets]
    a, b = (torch.cat(side, dim=1) for side in zip(*ends))
    known, same = (a != 255) & (b != 255), a == b
    return known & same & (a > 0), known & same & (a == 0), known & ~same


def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def pair_differences(D, offsets):
    """δ(i,j) = D(x_i) − D(x_j) and δ̂(i,j) = x_j − x_i of all pairs.   D (B,2,h,w) -> (B,2,P), (2,P)"""
    ends = [shifted(D.flatten(0, 1), *offset) for offset in offsets]
    counts = torch.tensor([a.shape[1] * a.shape[2] for a, _ in ends], device=D.device)
    apart = torch.tensor(offsets, dtype=D.dtype, device=D.device).T.repeat_interleave(counts, dim=1)
    return torch.cat([(a - b).flatten(1) for a, b in ends], dim=1).unflatten(0, (-1, 2)), apart


def eq5_displacement_fg(delta, apart, fg):
    """Eq. (5): mean over P⁺_fg of |δ − δ̂|.   (B,2,P), (2,P), (B,P) bool"""
    return masked_mean((delta - apart).abs().sum(1), fg)


def eq6_displacement_bg(delta, bg):
    """Eq. (6): mean over P⁺_bg of |δ|.   (B,2,P), (B,P) bool"""
    return masked_mean(delta.abs().sum(1), bg)


def path_cells(dy, dx):
    """Π_ij of Eq. (7): cells (y, x) in the rectangle from (0,0) to (dy,dx) less than 1 off the line. [D6]"""
    cells = [(y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1)]
    return [(y, x) for y, x in cells if (dy * x - dx * y)**2 < dy * dy + dx * dx]


def eq7_affinity(B, offsets):
    """Eq. (7): a_ij = 1 − max_{k∈Π_ij} B(x_k).   B (B,h,w) -> (B,P)

    The cell of each maximum is found first, by ranks and without gradient: memory is that of the pairs, not
    of the paths.
    """
    h, w = B.shape[1:]
    order = B.detach().flatten(1).argsort(dim=1)
    rank = order.argsort(dim=1).int().view(-1, h, w)
    highest = [rank[:, :0].flatten(1)]
    for dy, dx in offsets:
        rows, columns, left = h - dy, w - abs(dx), max(0, -dx)
        parts = [rank[:, y:y + rows, x + left:x + left + columns] for y, x in path_cells(dy, dx)]
        highest.append(functools.reduce(torch.maximum, parts).flatten(1))
    return 1 - B.flatten(1).gather(1, order.gather(1, torch.cat(highest, dim=1).long()))


def eq8_boundary(a, fg, bg, differ):
    """Eq. (8): L^B = −½ mean log a over P⁺_fg − ½ mean log a over P⁺_bg − mean log(1 − a) over P⁻. [D16]"""
    same, other = -torch.log(a + 1e-5), -torch.log(1 - a + 1e-5)
    return masked_mean(same, fg) / 2 + masked_mean(same, bg) / 2 + masked_mean(other, differ)


# ── Label synthesis (§5) ────────────────────────────────────────────────────────────────────────────────────
def eq10_refine(D, steps):
    """Eq. (10): D_{u+1}(x) = D_u(x) + D(x + D_u(x)), `steps` times. [D7]   (2,h,w) -> (2,h,w)"""
    h, w = D.shape[1:]
    last = torch.tensor([h - 1, w - 1], device=D.device).view(2, 1, 1)
    x = torch.stack(torch.meshgrid(*(torch.arange(n, device=D.device) for n in (h, w)), indexing="ij"))
    place = (x + D).clamp(min=0).minimum(last)                                          # x + D_0(x)
    for _ in range(steps):
        at = (2 * place / last.clamp_min(1) - 1).permute(1, 2, 0).flip(-1)  # as grid_sample wants it: (x, y)
        step = F.grid_sample(D[None], at[None], mode="bilinear", padding_mode="border", align_corners=True)[0]
        place = (place + step).clamp(min=0).minimum(last)
    return place - x


def eq14_centroids(D, length):
    """Eq. (14): connected components Ĉ_1 … Ĉ_K of C = {x: ‖D(x)‖₂ < 2.5}.   (2,h,w) -> (h,w), 0 = none"""
    return ndimage.label(np.linalg.norm(D, axis=0) < length)[0]


def eq15_instance_map(refined, centroids):
    """Eq. (15): I(x) = k if x + D(x) ∈ Ĉ_k, 0 where it ends in none. [D9]   (2,h,w), (h,w) -> (h,w)"""
    h, w = centroids.shape
    y, x = np.rint(np.indices((h, w)) + refined).astype(int)
    return centroids[y.clip(0, h - 1), x.clip(0, w - 1)]


def eq11_instance_cams(M, I):
    """Eq. (11): M̄_ck(x) = M_c(x) if I(x) = k, else 0; those that are 0 everywhere are left out.

    M (C,h,w), I (h,w) -> (N,h,w), index of each one's class in M (N,)
    """
    inside = I == np.arange(1, I.max() + 1)[:, None, None]                              # (K,h,w)
    cams = M[:, None] * inside
    some = cams.any((2, 3))
    return cams[some].astype(np.float32), np.nonzero(some)[0]


def eq12_transitions(B, radius, beta):
    """Eq. (12): T = S⁻¹ A^∘β with a_ii = 1, as lists of neighbours: T vec(x) = Σ_n weight[:,n] x[index[:,n]].

    B (h,w) -> index, weight (h·w, n), n the cells nearer than the radius; beyond the map's border weight is 0
    """
    h, w = B.shape
    every, half = eq2_offsets(radius, radius, radius), eq2_offsets(radius, h, w)
    A = torch.zeros(1, h, w, 1 + 2 * len(every), device=B.device)
    A[..., 0] = 1
    affinity = eq7_affinity(B[None], half).split([(h - dy) * (w - abs(dx)) for dy, dx in half], dim=1)
    for (dy, dx), a in zip(half, affinity):
        n, a = 2 * every.index((dy, dx)), a.view(1, h - dy, w - abs(dx))
        shifted(A[..., n + 1], dy, dx)[0].copy_(a)                                      # from i to j
        shifted(A[..., n + 2], dy, dx)[1].copy_(a)                                      # and back
    steps = [0, *(sign * (dy * w + dx) for dy, dx in every for sign in (1, -1))]
    index = torch.arange(h * w, device=B.device)[:, None] + torch.tensor(steps, device=B.device)
    T = A[0].flatten(0, 1) ** beta
    return index.clamp(0, h * w - 1).int(), T / T.sum(1, keepdim=True)


def eq13_random_walk(maps, transitions, steps):
    """Eq. (13): vec(M̄*) = Tᵗ vec(M̄ ⊙ (1 − B)) by t products with the sparse T, never a power of T.

    maps: start maps (N,h,w) of each image, already times (1 − B); transitions: what Eq. (12) says of each.
    All maps of all images walk side by side, as one list of cells.   -> list of (N,h,w)
    """
    cells, channels = [len(index) for index, _ in transitions], max(1, *map(len, maps))
    first = np.cumsum([0, *cells[:-1]]).tolist()
    index = torch.cat([index + n for (index, _), n in zip(transitions, first)])
    weight = torch.cat([weight for _, weight in transitions])
    x = torch.cat([F.pad(m.flatten(1).T, (0, channels - len(m))) for m in maps])
    for _ in range(steps):
        x = F.embedding_bag(index, x, per_sample_weights=weight, mode="sum")
    return [part[:, :len(m)].T.reshape(m.shape) for part, m in zip(x.split(cells), maps)]


def best_labels(scores, background):
    """§5.2: each pixel's best map, 0 where the best is below `background` of the highest. [D11]

    scores (N,H,W) -> (H,W) int, 0 … N; scores divided by the highest
    """
    scores = scores / max(scores.max(initial=0), 1e-8)
    return with_threshold(scores, background).argmax(0), scores


def instances_of(label, scores, classes, fragment):
    """Each connected part of a label is an instance; its score is the highest of its label inside it. [D12]

    label (H,W) 0 … N; scores (N,H,W); classes (N,), from 1 -> masks (M,H,W), classes (M,), scores (M,)
    """
    masks, found, best = [], [], []
    for n in np.unique(label[label > 0]):
        parts, count = ndimage.label(label == n)
        for k in range(1, count + 1):
            mask = parts == k
            masks.append(mask)
            found.append(classes[n - 1])
            best.append(scores[n - 1][mask].max() if mask.sum() >= fragment * mask.size else 0)
    masks = np.array(masks, bool).reshape(-1, *label.shape)
    return masks, np.array(found, np.int64), np.array(best, np.float32)


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


def classifier_backbone(args):
    """§3: backbone of classifier and IRNet."""
    net = make_backbone(args.backbone, args.weights, args.cam_stride, pretrained(args.backbone, args.weights))
    return without_dilation(net)


def train_classifier(args, run, train_set):
    """§3: image tags, multi-label soft margin."""
    def augment(sample, rng):
        sample = resize_long(sample, int(rng.integers(args.cam_resize[0], args.cam_resize[1] + 1)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.cam_crop, rng))

    run.reseed("classifier")
    start = pretrained(args.backbone, args.weights)
    net = CamNet(classifier_backbone(args), len(train_set.classes), cut=start)
    ddp = run.place(net).train()
    new_layers = [net.phi] if start else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.cam_lr, args.weight_decay),
                            lr=args.cam_lr, momentum=args.cam_momentum)
    draws, schedule = Draws(train_set, augment, args.seed), poly(args.cam_steps)
    for step, batch in run.steps("classifier", draws, args.cam_steps, args.cam_batch, net, optim, schedule):
        with run.autocast():
            logits = ddp(batch.image)
        loss = F.multilabel_soft_margin_loss(logits.float(), batch.tags)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, right=((logits > 0) == (batch.tags > 0)).float().mean())
    return net.eval()


def write_cams(args, run, net, train_set):
    """CAM -> M̂.   Writes cam/*.npz and relations/*.png (M̂, 255 = not confident)"""
    with run.timed("cam"):
        for names in run.todo(train_set.names, "relations", chunk=16, stage="cam", beside=("cam",)):
            samples = [train_set[train_set.index(name)] for name in names]
            cams = [cam_of_image(net, s.image, s.tags, args.cam_scales, args.cam_stride, run.device)[s.tags]
                    for s in samples]
            maps = [confident_maps(cam, args.confident_fg, args.confident_bg, args.relation_prob)
                    for cam in cams]
            refined = dense_crf([s.image for s in samples], maps, args.relation_crf, args.crf, args.workers,
                                run.device)
            for s, cam, pair in zip(samples, cams, refined):
                present = np.flatnonzero(s.tags)
                save_npz(run.path("cam", s.name, ".npz"), cam=cam.astype(np.float16), present=present)
                save_label(run.path("relations", s.name), relations_of(pair, present))


def read_cam(run, name, classes):
    """cam/<name>.npz -> (K,H,W) float32, absent classes 0."""
    with np.load(run.path("cam", name, ".npz")) as file:
        cam = np.zeros((classes, *file["cam"].shape[1:]), np.float32)
        cam[file["present"]] = file["cam"]
    return cam


def ramp_weight(step, steps, ramp):
    """Weight of Eq. (6) in Eq. (9): 1; with `ramp` it grows from 0 to 1 in that share of the steps. [D18]"""
    return min(1.0, step / (ramp * steps)) if ramp else 1.0


def train_irnet(args, run, classifier, train_set):
    """Both branches on the pairs of confident areas, Eq. (9): L = L^D_fg + L^D_bg + L^B."""
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.irn_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.irn_crop, rng))

    run.reseed("irnet")
    backbone = classifier_backbone(args).freeze()
    if args.irn_init == "classifier":
        backbone.load_state_dict(classifier.backbone.state_dict())                      # [D4]
    net = IRNet(backbone)
    ddp = run.place(net).train()
    groups = [{"params": net.boundary_branch.parameters(), "lr": args.irn_lr},
              {"params": net.displacement_branch.parameters(), "lr": args.irn_amplify * args.irn_lr}]
    optim = torch.optim.SGD(groups, lr=args.irn_lr, momentum=args.irn_momentum,
                            weight_decay=args.weight_decay)
    labelled = with_labels(train_set, seed=run.dir / "relations")
    draws, schedule, s = Draws(labelled, augment, args.seed), poly(args.irn_steps), net.stride
    for step, batch in run.steps("irnet", draws, args.irn_steps, args.irn_batch, net, optim, schedule):
        with run.autocast():
            edge, D = ddp(batch.image)
        M = batch.seed[:, ::s, ::s]  # the pixel of each cell
        offsets = eq2_offsets(args.irn_radius, *M.shape[1:])
        fg, bg, differ = eq3_4_pair_sets(M, offsets)
        delta, apart = pair_differences(D, offsets)
        loss_fg, loss_bg = eq5_displacement_fg(delta, apart, fg), eq6_displacement_bg(delta, bg)
        loss_b = eq8_boundary(eq7_affinity(edge.sigmoid(), offsets), fg, bg, differ)
        loss_d = loss_fg + ramp_weight(step, args.irn_steps, args.irn_ramp) * loss_bg
        loss = loss_d / 4 + loss_b / 2 if args.authors_weights else loss_d + loss_b     # Eq. (9) [D16]
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss_fg=loss_fg, loss_bg=loss_bg, loss_b=loss_b, known=(M != 255).float().mean(),
                differ=differ.float().mean(), spread=D.detach().std((2, 3)).mean())     # of D: constant, if 0
    return net.eval()


@inference()
def fields_of(net, image, least, device):
    """D and B of one image; B from the mean logits of the image and its mirror image.

    image (H,W,3) uint8; padded to `least` pixels and to whole cells [D17] -> D (2,h,w), B (h,w)
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    (H, W), s, whole = image.shape[:2], net.stride, net.backbone.strides[-1]
    down, right = (-(-max(least, n) // whole) * whole - n for n in (H, W))
    edge, D = net(F.pad(torch.cat([x, x.flip(-1)]), (0, right, 0, down)))
    h, w = -(-H // s), -(-W // s)
    edge = cells_to_pixels(edge[:, None, :h, :w], s, (H, W))[:, 0]
    edge = (edge[0] + edge[1].flip(-1)) / 2
    return D[0, :, :h, :w], edge[::s, ::s].sigmoid()


def write_fields(args, run, net, train_set):
    """What IRNet says of each image.   Writes fields/*.npz (D as it comes, B) and the mean of all D"""
    with run.timed("fields"):
        for (name,) in run.todo(train_set.names, "fields", stage="fields"):
            D, B = fields_of(net, train_set[train_set.index(name)].image, args.irn_crop, run.device)
            save_npz(run.path("fields", name, ".npz"), D=D.cpu().numpy().astype(np.float16),
                     B=B.cpu().numpy().astype(np.float16))
        for (name,) in run.todo(["mean"], "mean_displacement"):
            total, cells = np.zeros(2), 0
            for image in train_set.names:
                D = read_fields(run, image)[0]
                total, cells = total + D.sum((1, 2), dtype=np.float64), cells + D[0].size
            save_npz(run.path("mean_displacement", name, ".npz"), mean=total / cells)


def read_fields(run, name):
    """fields/<name>.npz -> D (2,h,w), B (h,w) float32"""
    with np.load(run.path("fields", name, ".npz")) as file:
        return file["D"].astype(np.float32), file["B"].astype(np.float32)


def read_mean_displacement(run):
    """§4.3: the mean of D, which is to be subtracted [D8].   -> (2,1,1) float32"""
    with np.load(run.path("mean_displacement", "mean", ".npz")) as file:
        return file["mean"].astype(np.float32)[:, None, None]


def start_of_walk(cam, D, B, refine_steps, centroid):
    """Eqs. (10), (11), (14), (15): the maps that walk, first the classes' CAMs, then those of the instances.

    cam (C,h,w) of the image's classes on the grid; D (2,h,w), its mean subtracted; B (h,w)
    -> (C+N,h,w) times (1 − B), index of the instances' class in cam (N,)
    """
    refined = eq10_refine(torch.as_tensor(D), refine_steps).numpy()
    I = eq15_instance_map(refined, eq14_centroids(D, centroid))
    instances, owner = eq11_instance_cams(cam, I)
    return np.concatenate([cam, instances]) * (1 - B), owner


def walk_images(args, run, names, cams, stride):
    """All walks of some images, enlarged.   cams: (C,H,W) of each image's own classes
    -> per image: scores of classes and instances (C+N,H,W), index of the instances' class (N,)"""
    mean, starts, transitions, owners = read_mean_displacement(run), [], [], []
    for name, cam in zip(names, cams):
        D, B = read_fields(run, name)
        maps, owner = start_of_walk(cam[:, ::stride, ::stride], D - mean, B, args.refine_steps, args.centroid)
        starts.append(torch.tensor(maps, device=run.device))
        transitions.append(eq12_transitions(torch.tensor(B, device=run.device), args.walk_radius,
                                            args.walk_beta))
        owners.append(owner)
    together = len(names) if run.device.type == "cuda" else 1  # on the CPU one by one: it fits the cache
    parts = [slice(i, i + together) for i in range(0, len(names), together)]
    walked = [m for part in parts for m in eq13_random_walk(starts[part], transitions[part], args.walk_steps)]
    scores = [cells_to_pixels(m[None], stride, cam.shape[1:])[0].cpu().numpy()
              for m, cam in zip(walked, cams)]
    return list(zip(scores, owners))


@torch.no_grad()
def synthesise_labels(args, run, stride, train_set):
    """Semantic labels of both rows of Table 2, instance labels of all rows of Table 1.

    Writes pseudo/*.png, pseudo_cam/*.png and instances_{displacement,boundary,cam}/*.npz
    """
    folders = ("pseudo_cam", *(f"instances_{row}" for row in ROWS))
    with run.timed("pseudo"):
        for names in run.todo(train_set.names, "pseudo", args.batch_images, stage="pseudo", beside=folders):
            tags = [np.flatnonzero(train_set[train_set.index(name)].tags) for name in names]
            cams = [read_cam(run, name, len(train_set.classes))[own] for name, own in zip(names, tags)]
            for name, own, cam, (scores, owner) in zip(names, tags, cams,
                                                       walk_images(args, run, names, cams, stride)):
                rows = {"cam": (with_threshold(cam, args.cam_threshold).argmax(0), cam, own + 1),
                        "boundary": (*best_labels(scores[:len(cam)], args.background), own + 1),
                        "displacement": (*best_labels(scores[len(cam):], args.background), own[owner] + 1)}
                for row, (label, score, classes) in rows.items():
                    save_instances(run.path(f"instances_{row}", name, ".npz"),
                                   *instances_of(label, score, classes, args.fragment))
                semantic = np.concatenate([[0], own + 1])
                save_label(run.path("pseudo_cam", name), semantic[rows["cam"][0]])
                save_label(run.path("pseudo", name), semantic[rows["boundary"][0]])


def make_segmenter(backbone, weights, stride, rates, classes):
    """DeepLab-v2.   [D2]"""
    net = make_backbone(backbone, weights_of(backbone, weights), stride, pretrained(backbone, weights))
    return DeepLab(net, ASPP(net.channels[-1], classes + 1, rates))


def train_segmenter(args, run, train_set):
    """DeepLab-v2 on the pseudo labels, or on ground truth with --supervision full."""
    def augment(sample, rng):
        sample = rescale(sample, rng.uniform(*args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.seg_crop, rng))

    run.reseed("segmenter")
    net = make_segmenter(args.backbone, args.weights, args.seg_stride, args.seg_rates,
                         len(train_set.classes))
    ddp, stride = run.place(net).train(), net.backbone.strides[-1]
    new_layers = [net.head] if pretrained(args.backbone, args.weights) else []
    optim = torch.optim.SGD(group_rates(net, new_layers, args.seg_lr, args.seg_weight_decay),
                            lr=args.seg_lr, momentum=0.9)
    full, folder = args.supervision == "full", "pseudo_cam" if args.train_on == "cam" else "pseudo"
    labelled = train_set if full else with_labels(train_set, pseudo=run.dir / folder)
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


# ── Mask R-CNN (§6.3, §A.2.1) ───────────────────────────────────────────────────────────────────────────────
def make_detector(backbone, weights, size, width, rois, classes):
    """Mask R-CNN. [D14]   size: longer side that pictures are brought to"""
    stride = 16 if backbone in ("tiny", "vgg16") else 32                                # as it is by nature
    start = pretrained(backbone, weights)
    net = make_backbone(backbone, weights_of(backbone, weights), stride, start)
    if start:
        net.blocks[0].requires_grad_(False)  # as Detectron: FREEZE_AT 2
    return mask_rcnn(net, size, width, rois, classes)


class Instances(torch.utils.data.Dataset):
    """A data set with instances as label maps: `instances` numbers them, `pseudo` has their classes.

    folder: what save_instances wrote, score 0 left out; None: ground truth, where a picture without instance
    masks (SBD's) has one of each connected region.
    """

    def __init__(self, dataset, folder=None):
        self.dataset, self.folder = dataset, folder

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        s = self.dataset[i]
        if self.folder is None:
            objects = objects_of(s.mask, getattr(s, "instances", None))
        else:
            masks, classes, scores = read_instances(self.folder / f"{s.name}.npz")
            objects = [(c, mask) for c, mask, score in zip(classes, masks, scores) if score > 0]
        number, label = np.zeros((2, *s.image.shape[:2]), np.uint8)
        for k, (c, mask) in enumerate(objects[:254], 1):
            number[mask], label[mask] = k, c
        return Sample(name=s.name, image=s.image, tags=s.tags, instances=number, pseudo=label)


def targets_of(instances, label):
    """What torchvision's detector learns from; objects of 2 x 2 pixels or more.   both (B,H,W), 255 = none
    -> list of {boxes (M,4), labels (M,), masks (M,H,W) uint8}"""
    targets = []
    for number, classes in zip(instances, label):
        numbers = number.unique()
        masks = number == numbers[(numbers != 0) & (numbers != 255)][:, None, None]
        boxes, first = masks_to_boxes(masks), masks.flatten(1).byte().argmax(1)         # both ends included
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        targets.append({"boxes": boxes[kept] + boxes.new_tensor([0, 0, 1, 1]),
                        "labels": classes.flatten()[first[kept]], "masks": masks[kept].byte()})
    return targets


def train_detector(args, run, train_set):
    """Mask R-CNN on the instance labels, or on ground truth with --supervision full."""
    def augment(sample, rng):
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(resize_long(sample, args.inst_size), args.inst_size, rng))

    run.reseed("detector")
    net = make_detector(args.backbone, args.weights, args.inst_size, args.inst_width, args.inst_rois,
                        len(train_set.classes))
    ddp = run.place(net).train()
    optim = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=args.inst_lr, momentum=0.9,
                            weight_decay=args.weight_decay)
    folder = None if args.supervision == "full" else run.dir / f"instances_{args.train_on}"
    draws = Draws(Instances(train_set, folder), augment, args.seed)
    schedule = detector_schedule(args.inst_steps, args.inst_warmup)
    for step, batch in run.steps("detector", draws, args.inst_steps, args.inst_batch, net, optim, schedule):
        targets = targets_of(batch.instances, batch.pseudo)
        losses = ddp(list(batch.image), targets)  # without autocast: its losses are inside
        optim.zero_grad()
        sum(losses.values()).backward()
        optim.step()
        run.log(step, objects=sum(len(t["labels"]) for t in targets) / len(targets), **losses)
    return net.eval()


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


@inference()
def predict_instances(net, image, device):
    """image (H,W,3) uint8 -> masks (M,H,W) bool, classes (M,) from 1, scores (M,), best first"""
    found = net([normalise(Sample(image=image)).image.to(device)])[0]
    masks = found["masks"][:, 0] > 0.5
    return masks.cpu().numpy(), found["labels"].cpu().numpy(), found["scores"].cpu().numpy()


def write_instances(args, run, net, val_set):
    """Mask R-CNN's instances.   Writes instances_val/*.npz"""
    with run.timed("val_instance"):
        for (name,) in run.todo(val_set.names, "instances_val"):
            found = predict_instances(net, val_set[val_set.index(name)].image, run.device)
            save_instances(run.path("instances_val", name, ".npz"), *found)


def instance_pairs(dataset, read):
    """True and found instances, picture by picture; pictures without instance masks (SBD's) are left out.

    read(name) -> masks, classes, scores
    """
    for sample in (dataset[i] for i in range(len(dataset))):
        if hasattr(sample, "instances"):
            yield objects_of(sample.mask, sample.instances), read(sample.name)


def evaluate_labels(args, run, split):
    """Scores what the stages wrote. Only here and in draw_irnet are masks of weak labels' images seen."""
    truth = load(args, split, masks=True, fields=("mask", "instances"))
    if "mask" not in truth.fields:                                                    # own data may lack it
        return

    def written(folder):
        return confusion_of(truth, lambda s: read_label(run.path(folder, s.name), truth.classes))

    def aps(folder):
        pairs = instance_pairs(truth, lambda name: read_instances(run.path(folder, name, ".npz")))
        return instance_aps(pairs, len(truth.classes))

    def result(stage, confusion, timed, **values):
        values = {"n_images": len(truth), **values}
        run.result(stage, confusion, split=split, uses_masks=True, notes=truth.notes,
                   seconds=round(sum(map(run.seconds, timed)), 1), **values)

    if split == "train":                                                                # [D20]
        result("cam", written("pseudo_cam"), ["classifier", "cam"], crf=False, scales=args.cam_scales)
        result("pseudo", written("pseudo"), ["irnet", "fields", "pseudo"], crf=False)
        rows = {row: aps(f"instances_{row}") for row in ROWS}
        others = {f"ap50_{row}": rows[row][0]["ap50"] for row in ROWS[1:]}
        result("pseudo_instance", None, ["irnet", "fields", "pseudo"], crf=False,
               n_images=rows["displacement"][1], **rows["displacement"][0], **others)
        return
    for stage in ("val", "val_crf"):
        result(stage, written(stage), ["segmenter", "val"], crf="crf" in stage, scales=args.test_scales)
    if args.mask_rcnn:
        values, images = aps("instances_val")
        result("val_instance", None, ["detector", "val_instance"], crf=False, n_images=images, **values)


def field_colours(D):
    """Fig. 9: direction as hue, length as strength of colour.   (2,h,w) -> (h,w,3) uint8"""
    length = np.linalg.norm(D, axis=0)
    hue = (np.arctan2(D[0], D[1]) / (2 * np.pi)) % 1
    hsv = np.stack([hue, length / max(length.max(), 1e-8), np.ones_like(hue)])
    channels = [Image.fromarray(channel) for channel in (255 * hsv).astype(np.uint8)]
    return np.array(Image.merge("HSV", channels).convert("RGB"))


def draw_irnet(args, run, split):
    """panels/<split>.png of what the stages wrote; train: as Fig. 9."""
    truth = load(args, split, masks=True, fields=("mask", "instances"))

    def objects(folder, least):
        def cell(sample):
            masks, _, scores = read_instances(run.path(folder, sample.name, ".npz"))
            return instance_overlay(sample.image, masks, scores, least)
        return cell

    if split == "train":
        mean = read_mean_displacement(run)
        columns = {"CAM": lambda s: read_cam(run, s.name, len(truth.classes)).max(0),
                   "displacement field": lambda s: field_colours(read_fields(run, s.name)[0] - mean),
                   "class boundary": lambda s: read_fields(run, s.name)[1],
                   "instances": objects("instances_displacement", 1e-8), "class labels": "pseudo"}
    else:
        columns = {**({"instances": objects("instances_val", 0.5)} if args.mask_rcnn else {}),
                   "prediction": "val", "prediction + CRF": "val_crf"}
    draw_panels(run, split, truth, columns)


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder; of instances if --checkpoint is a detector.pt.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given); of
    instances also predict/*.npz with masks, classes and scores.
    """
    semantic, instances = "head.branches.0.weight", "roi_heads.box_predictor.cls_score.weight"
    state, last = read_predictor(args, Args, "segmenter.pt or detector.pt", semantic, instances)
    device, made = start_processes(args.device), Args(**state["args"])
    classes = len(state["model"][last]) - 1
    if last == semantic:
        net = make_segmenter(made.backbone, "none", made.seg_stride, made.seg_rates, classes)
    else:
        net = make_detector(made.backbone, "none", made.inst_size, made.inst_width, made.inst_rois, classes)
    net = with_weights(net, state, device)
    for image, path in pictures_to_predict(args):
        if last == semantic:
            prob = predict(net, image, made.test_scales, device)
            label = dense_crf([image], [prob], CRF(*made.seg_crf), args.crf, device=device)[0].argmax(0)
        else:
            masks, found, scores = predict_instances(net, image, device)
            save_instances(f"{path}.npz", masks, found, scores)
            label = numbered(masks[scores >= 0.5], scores[scores >= 0.5])
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_irnet(args):
    """What would else fail after hours fails now."""
    if args.irn_radius < 2:
        raise UserError(f"--irn-radius {args.irn_radius}: give 2 or more; below there are no pairs")
    if args.irn_crop % args.cam_stride:
        raise UserError(f"--irn-crop {args.irn_crop} is no multiple of --cam-stride {args.cam_stride}: "
                        "the levels of IRNet would not lie in line")
    classifier_backbone(args)                                       # wrong weights, impossible strides: now
    make_segmenter(args.backbone, args.weights, args.seg_stride, args.seg_rates, 1)


def main():
    """Fig. 1 from left to right, then the last two networks; --supervision full: those two alone."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    if args.predict:
        return predict_folder(args)
    train_set = load(args, "train", fields=("mask", "instances"))
    val_set = load(args, "val", fields=("mask",))
    check_irnet(args)
    run = Run(args, FIELDS)
    if args.supervision != "full":
        classifier = train_classifier(args, run, train_set)                             # Eq. (1)
        write_cams(args, run, classifier, train_set)                                    # §4.2
        irnet = train_irnet(args, run, classifier, train_set)                           # Eqs. (2)–(9)
        write_fields(args, run, irnet, train_set)                                       # D and B
        synthesise_labels(args, run, irnet.stride, train_set)                           # Eqs. (10)–(15)
        if not run.has("pseudo_instance"):
            draw_irnet(args, run, "train")
            evaluate_labels(args, run, "train")
    segmenter = train_segmenter(args, run, train_set)
    write_predictions(args, run, segmenter, val_set)
    if args.mask_rcnn:
        detector = train_detector(args, run, train_set)
        write_instances(args, run, detector, val_set)
    if not run.has("val_instance" if args.mask_rcnn else "val_crf"):
        draw_irnet(args, run, "val")
        evaluate_labels(args, run, "val")
    run.table()


if __name__ == "__main__":
    main()
