"""CIAN: Cross-Image Affinity Net for Weakly Supervised Semantic Segmentation.
J. Fan, Z. Zhang, T. Tan, C. Song, J. Xiao; AAAI 2020. Equation numbers: the paper's.

Symbols      q, r query and reference image · x_i feature of pixel i, a grid cell · φ_q, φ_r,
             φ_c, φ_o layers of the CIAN module · k_ij affinity of pixel i of q and j of r, k̄_ij normalised ·
             m_i message to pixel i · x̂^c, x̂^s features augmented by cross- and by self-affinity · f_c
             classification layer · y seeds, ŷ labels made online, 255 = none · L_q classes of image q
Equations    (1) eq1_2_affinity, eq2_3_message    (2) eq2_3_message    (3) eq2_3_message    (4) eq4_augment
             (5) eq5_merge    (6) eq6_8_cross_entropy    (7) eq7_online_label    (8) eq6_8_cross_entropy
             (9) eq9_terms
Figures      Fig. 2 left = main(), CIAN; right = AffinityModule; Fig. 3 = draw_affinity
Commands     python cian.py                            # embedded shapes, made for two CPU cores
             python cian.py --data voc --root data/voc               # paper: 64.3 val with CRF, "+ RT"
             python cian.py --data voc --saliency maps/              # background from your own saliency maps
             python cian.py --no-cross --no-completion --rounds 1 --out runs/cian-baseline
             python cian.py --data voc --root data/voc --supervision full            # upper bound
             python cian.py --predict photos/ --checkpoint runs/cian-voc-image-s0/segmenter_2.pt
Departures   [D1] backbones are torchvision's; the authors' is MXNet's pre-activation ResNet on raw colours
             [D2] new layers learn x10 (authors' code; paper silent), those of a network from nothing x1;
                  LargeFOV keeps its bias (authors' code: none)
             [D3] saliency: boundary connectivity of superpixels (Zhu et al., CVPR 2014), with a threshold of
                  its own; the paper's is DRFI, to be given as --saliency
             [D4] the paper's classifier: only layers, loss and rate are known. Here: pool5 and one linear
                  layer, schedule of the segmentation network, CAM of one scale and its mirror image
             [D5] Eq. 5's maximum also takes in the image paired with itself, as §CIAN Module says
             [D6] a batch of 16 images is 8 queries with a reference each, and each of a pair is also the
                  other's reference (authors' code): 20 epochs are 26,456 steps
             [D7] L_q of Eq. 7: the image's tags and background; authors' code: classes of the cropped seeds
             [D8] Eq. 9 as printed, each x̂ has its own ŷ; authors' code: that of x̂^c for both
                  (--completion-target cross)
             [D9] Eqs. 6, 8: on the feature grid, mean over the batch's pixels with a label (authors' code);
                  a crop's padding has no label (authors' code: background)
             [D10] rate decays with each step; authors' code: with each epoch
             [D11] an image that shares no class with another is paired with another crop of itself; several
                  references all share one class with the query (paper: each of them some class)
             [D12] test: mean probability of scales and mirror images (paper silent); authors' code: logits,
                  and the scales' maximum as one map more
             [D13] odd kernels centre feature cell i on pixel stride·i: so seeds are read and scores enlarged
             [D14] presets: with few pictures the completion loss waits for --warmup steps, as it keeps to
                  what the network says first; shapes: φ's first weights scaled to narrower layers; both:
                  thresholds of boundary connectivity set with a look at masks of training pictures
             [D15] retraining labels: classes of the image's tags only (paper silent; --no-retrain-tags)
             [D16] --supervision full: L_ce alone, one round
             [D17] --strong-ratio: the ground truth also stays in the labels of later rounds (paper silent)
             [D18] φ_o's batch norm takes the messages of both heads as one batch (paper silent), so that
                  self-affinity is normalised in tests as it was in training
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (
    CRF, LargeFOV, Run, UserError, cells_to_pixels, confusion_of, contact_sheet, dense_crf, draw_panels,
    inference, make_backbone, overlay, parse_args, pictures_to_predict, poly, pretrained, rank,
    read_predictor, reduce, save_image, save_label, save_npz, save_prediction, shard, start_processes,
    weights_of, with_weights, world)
from data import (
    DataError, Draws, Sample, changed, crop, flip, load, normalise, read_image, read_label, reading,
    require, rescale, resize_batch, resize_long, stems, tags_in, with_labels)


# ── Args ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Args:
    # --- task ---
    data: Literal["shapes", "voc", "coco", "workpiece"] = "shapes"
    """data set of data.py; shapes is drawn on the fly, workpiece is any folder of your own"""
    supervision: Literal["image", "full"] = "image"
    """what the training set may reveal; full = the same segmentation network on ground truth (upper bound)
    [D16]"""
    backbone: Literal[
        "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "resnet101"
    """segmentation network; the paper also has resnet50 [D1]"""
    cam_backbone: Literal[
        "same", "tiny", "resnet18", "resnet50", "resnet101", "vgg16", "mobilenet_v2", "resnet38"] = "vgg16"
    """classifier (§Initial Seeds: VGG16). same = --backbone"""
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
    # --- 1 classifier (§Initial Seeds) ---
    cam_stride: int = 8
    """output stride of the classifier; VGG16: pool4 with stride 1, conv5 with dilation 2"""
    cam_steps: int = 13_228
    """20 epochs of 10,582 images at batch 16 [D4]"""
    cam_batch: int = 16
    """images a step, over all processes"""
    cam_lr: float = 1e-3
    """§Initial Seeds; the new layer x10 [D2]; poly 0.9"""
    cam_crop: int = 321
    """pixels"""
    cam_resize: tuple[int, int] = (256, 512)
    """the longer side is drawn from this range"""
    cam_scales: tuple[float, ...] = (1.0,)
    """scales of the CAM, each with its mirror image [D4]"""
    # --- 2 seeds (§Initial Seeds) ---
    foreground: float = 0.3
    """a class's CAM above this is its seed"""
    saliency: str = ""
    """folder with a grey PNG, 0 to 255, for each training image; default: boundary connectivity [D3]"""
    saliency_threshold: float = 0.06
    """given saliency maps, 0 to 1: below is background"""
    connectivity_threshold: float = 0.06
    """the same for boundary connectivity, whose scale is another one [D3]"""
    superpixels: int = 200
    """SLIC superpixels of boundary connectivity"""
    connectivity_sigma: float = 10.0
    """colour difference (CIE Lab) over which superpixels belong together"""
    strong_ratio: float = 0.0
    """Table 4: share of the training images whose seeds become ground truth, 0.05 or 0.10; this alone
    reveals masks under --supervision image"""
    # --- 3 CIAN (§The Cross-Image Affinity Module, §Multiple Pairs) ---
    references: int = 1
    """N of Eq. 5, reference images of each query"""
    pairs: Literal["common", "random"] = "common"
    """references share a class with the query, or are any images (Table 3)"""
    cross: bool = True
    """cross-image affinity; without it Table 2's baseline and +CP alone, on the same batches"""
    merge: Literal["max", "mean"] = "max"
    """Eq. 5, or the average function"""
    init_std: float = 0.01
    """§Reproducibility: of φ's normal distributions; the classification layers have 0.01 in any case"""
    dilation: int = 12
    """of LargeFOV, the classification layer f_c"""
    # --- 4 losses (§Training Loss) ---
    completion: bool = True
    """L_cp, Eq. 8 (Table 2)"""
    completion_target: Literal["own", "cross"] = "own"
    """whose arg-max Eq. 7 takes: each head's own as printed, or x̂^c's for both (authors' code) [D8]"""
    warmup: int = 0
    """steps of the first round without L_cp [D14]"""
    # --- 5 training (§Reproducibility) ---
    rounds: int = 2
    """2: retraining, "+ RT" (Table 2); 1: without"""
    seg_stride: int = 8
    """output stride of the segmentation network"""
    seg_steps: int = 26_456
    """20 epochs of 10,582 queries, 8 a step [D6]"""
    retrain_steps: int = 26_456
    """the same in each later round, which goes on from the weights of the one before"""
    seg_batch: int = 16
    """images a step, queries and references, over all processes"""
    seg_lr: float = 5e-4
    """backbone; new layers x10 [D2]; poly 0.9"""
    seg_crop: int = 321
    """pixels"""
    seg_rescale: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    """one of these scales is drawn (authors' code)"""
    momentum: float = 0.9
    """of both networks"""
    weight_decay: float = 5e-4
    """of both networks (authors' code)"""
    # --- 6 inference ---
    test_scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """each with its mirror image (authors' code)"""
    seg_crf: CRF = CRF(3, 3, 80, 13, 10, 5)
    """authors' code: Gauss σ and weight, bilateral σ_xy, σ_rgb and weight, iterations"""
    retrain_crf: CRF = CRF(3, 3, 80, 13, 10, 10)
    """the same for retraining labels"""
    retrain_tags: bool = True
    """retraining labels hold classes of the image's tags only [D15]"""


# What two CPU cores do in minutes; everything else as the paper.
SHAPES = dict(
    backbone="tiny", cam_backbone="tiny", weights="none", seg_stride=4,
    cam_steps=4000, cam_batch=8, cam_lr=0.05, cam_crop=96, cam_resize=(96, 128), superpixels=150,
    connectivity_threshold=0.3, init_std=0.1, dilation=6, warmup=1000,                               # [D14]
    seg_steps=4000, retrain_steps=1500, seg_batch=8, seg_lr=0.02, seg_crop=96, seg_rescale=(0.75, 1.0, 1.25))
# A few hundred photographs with a small pretrained backbone on two CPU cores.
PHOTOS = dict(
    backbone="mobilenet_v2", cam_backbone="mobilenet_v2", train_list="train", cam_stride=16, seg_stride=16,
    cam_steps=330, cam_batch=8, cam_lr=2e-3, cam_resize=(321, 513), dilation=6,
    connectivity_threshold=0.5, seg_steps=1000, retrain_steps=500, seg_batch=8, seg_lr=1e-4,
    seg_crop=257, warmup=500)                                                                       # [D14]

# What a stage's result depends on, beside the fields of the stages before it: --reuse compares these.
FIELDS = {stage: names.split() for stage, names in {
    "classifier": "data root train_list seed amp weights cam_backbone cam_stride cam_steps cam_batch cam_lr "
                  "cam_crop cam_resize momentum weight_decay",
    "seeds": "supervision cam_scales foreground saliency saliency_threshold connectivity_threshold "
             "superpixels connectivity_sigma",
    "segmenter_1": "backbone strong_ratio references pairs cross merge init_std dilation completion "
                   "completion_target warmup seg_stride seg_steps seg_batch seg_lr seg_crop seg_rescale",
    "pseudo_1": "crf test_scales retrain_crf retrain_tags",
    "segmenter_2": "retrain_steps",
}.items()}


# ── Networks: the cross-image affinity module (Eqs. 1–5) ────────────────────────────────────────────────────
def resample(x, size):
    """Bilinear (B,C,h,w) -> (B,C,*size)."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def eq1_2_affinity(q, r):
    """Eqs. (1), (2): k_ij = exp(φ_q(x_i)·φ_r(x_j)) and k̄_ij = k_ij / Σ_j k_ij.

    q (B,N,d), r (B,M,d) -> (B,N,M)
    """
    return (q @ r.transpose(1, 2)).softmax(-1)


def eq2_3_message(q, r, c):
    """Eqs. (2), (3): m_i = Σ_j k̄_ij φ_c(x_j), exactly, without the N x M affinities in memory.

    q (B,N,d), r and c (B,M,d) -> (B,N,d)
    """
    heads = (t[:, None] for t in (q, r, c))                     # one head: CUDA's kernels want (B,1,N,d)
    return F.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]              # no 1/√d in Eq. (1)


def eq4_augment(x, m, phi_o):
    """Eq. (4): x̂_i = x_i + φ_o(m_i).   x (B,D,h,w), m (B,N,d) -> (B,D,h,w)"""
    return x + phi_o(m.transpose(1, 2).unflatten(2, x.shape[2:]))


def eq5_merge(messages, how="max"):
    """Eq. (5): m_i = max_h m_i^(h), element by element, or their mean.   list of (B,N,d) -> (B,N,d)"""
    stacked = torch.stack(messages)
    return stacked.amax(0) if how == "max" else stacked.mean(0)


class AffinityModule(nn.Module):
    """The CIAN module (Fig. 2, right).

    forward(x (B,D,h,w), references (B,N) places in the batch, or None)
    ->  {"cross": x̂^c, "self": x̂^s}, without references x̂^s alone
    """

    def __init__(self, channels, merge="max", std=0.01):
        super().__init__()
        self.merge, half = merge, channels // 2
        self.phi_q, self.phi_r, self.phi_c = (nn.Conv2d(channels, half, 1, bias=False) for _ in range(3))
        self.phi_o = nn.Sequential(nn.Conv2d(half, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        for phi in (self.phi_q, self.phi_r, self.phi_c, self.phi_o[0]):
            nn.init.normal_(phi.weight, std=std)
        nn.init.zeros_(self.phi_o[1].weight)                    # at first x̂ = x

    def embed(self, x):
        """(B,D,h,w) -> φ_q(x) (B,N,d); φ_r(x), φ_c(x) (B,M,d), M cells at half the resolution; float32"""
        maps = self.phi_q(x), self.pool(self.phi_r(x)), self.pool(self.phi_c(x))
        return [t.flatten(2).transpose(1, 2).float() for t in maps]

    def forward(self, x, references=None):
        q, r, c = self.embed(x)
        with torch.autocast(x.device.type, enabled=False):      # logits without scale: too large for bf16
            own = eq2_3_message(q, r, c)
            messages = {"self": own}
            if references is not None:                                                  # [D5]
                others = [eq2_3_message(q, r[h], c[h]) for h in references.T]
                messages = {"cross": eq5_merge([*others, own], self.merge), "self": own}
        n, m = len(messages), torch.cat(list(messages.values()))                        # [D18]
        return dict(zip(messages, eq4_augment(x.repeat(n, 1, 1, 1), m, self.phi_o).chunk(n)))

    def gamma(self):
        """Mean |γ| of φ_o's batch norm: 0 as long as the module does nothing."""
        return self.phi_o[1].weight.abs().mean()


class CIAN(nn.Module):
    """DeepLab-LargeFOV with the module before its classification layer (Fig. 2, left).

    forward(image (B,3,H,W), references)  ->  {head: scores (B,K+1,h,w)}, heads and references: AffinityModule
    """

    def __init__(self, backbone, classes, merge, std, dilation):
        super().__init__()
        self.backbone, self.stride = backbone, backbone.strides[-1]
        self.affinity = AffinityModule(backbone.channels[-1], merge, std)
        self.head = LargeFOV(backbone.channels[-1], classes + 1, dilation)                      # [D2]

    def forward(self, image, references=None):
        augmented = self.affinity(self.backbone(image)[-1], references)
        return {head: self.head(x).float() for head, x in augmented.items()}


class Classifier(nn.Module):
    """VGG16 for CAM (§Initial Seeds).   forward(image (B,3,H,W)) -> tag scores (B,K);  scores: (B,K,h,w)"""

    def __init__(self, backbone, classes, pool5):
        super().__init__()
        self.backbone = backbone
        self.pool5 = nn.MaxPool2d(3, stride=1, padding=1) if pool5 else nn.Identity()           # [D4]
        self.classifier = nn.Conv2d(backbone.channels[-1], classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def scores(self, image):
        return self.classifier(self.pool5(self.backbone(image)[-1])).float()

    def forward(self, image):
        return self.scores(image).mean((2, 3))                  # the mean of scores is the score of the mean


# ── Losses (Eqs. 6–9) ───────────────────────────────────────────────────────────────────────────────────────
def masked_mean(value, mask):
    """Mean of `value` where `mask`, over the global batch of all processes; 0 where the mask is empty."""
    count = reduce(mask.sum().float()) / world()
    return (value * mask).sum() / count.clamp_min(1 / world())


def eq6_8_cross_entropy(scores, label):
    """Eqs. (6), (8): −1/|S| Σ_{i∈S} yᵢᵀ log f_c(x̂_i), S the pixels with a label; 0 without any.   [D9]

    scores (B,C,h,w); label (B,h,w), 255 = none: the seeds y in Eq. (6), ŷ of Eq. (7) in Eq. (8)
    """
    return masked_mean(F.cross_entropy(scores, label, ignore_index=255, reduction="none"), label != 255)


def eq7_online_label(scores, tags, valid):
    """Eq. (7): ŷ_i = arg-max f_c(x̂_i) where it is one of L_q, else 255. No gradient.   [D7]

    scores (B,K+1,h,w), tags (B,K), valid (B,h,w) bool: False in padding -> (B,h,w)
    """
    label = scores.detach().argmax(1)
    L_q = F.pad(tags > 0, (1, 0), value=True)                   # background is always allowed
    allowed = L_q.gather(1, label.flatten(1)).view_as(label) & valid
    return torch.where(allowed, label, 255)


def eq9_terms(scores, label, tags, valid, completion=True, target="own"):
    """Eq. (9): L_ce(x̂^c), L_ce(x̂^s), L_cp(x̂^c), L_cp(x̂^s), whose sum is L.   [D8]

    scores {"cross": (B,K+1,h,w), "self": …}; a head or loss that is switched off has no term
    """
    terms = {f"loss_ce_{head}": eq6_8_cross_entropy(s, label) for head, s in scores.items()}
    for head, s in scores.items() if completion else ():
        source = scores.get("cross", s) if target == "cross" else s
        terms[f"loss_cp_{head}"] = eq6_8_cross_entropy(s, eq7_online_label(source, tags, valid))
    return terms


# ── Seeds (§Initial Seeds): arrays in, arrays out ───────────────────────────────────────────────────────────
@inference()
def class_activation(net, image, tags, scales, stride, device):
    """CAM summed over scales and mirror images, negative scores cut, each map's peak 1.

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
    full[tags] = (total / total.amax((1, 2), keepdim=True).clamp_min(1e-5)).cpu().numpy()
    return full


def boundary_connectivity(image, number, sigma):
    """Saliency exp(−c²/2), c = length on the image's border / √area of the soft region around a superpixel,
    where another belongs to it by exp(−d²/2σ²), d the geodesic colour distance.   [D3]

    image (H,W,3) uint8 -> (H,W) in [0,1]
    """
    from scipy.sparse.csgraph import shortest_path
    from skimage.color import rgb2lab
    from skimage.segmentation import slic

    index = slic(image, n_segments=number, compactness=10, start_label=0)
    index = np.unique(index, return_inverse=True)[1].reshape(image.shape[:2])
    size = np.bincount(index.ravel())
    colour = np.stack([np.bincount(index.ravel(), channel.ravel()) / size
                       for channel in rgb2lab(image).transpose(2, 0, 1)], axis=1)               # (n,3)
    border = np.zeros(len(size), bool)
    border[np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]])] = True
    adjacent = border[:, None] & border                         # the border is one: objects do not cut it
    for a, b in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        adjacent[a, b] = adjacent[b, a] = True
    apart = np.linalg.norm(colour[:, None] - colour, axis=-1).clip(1e-6)    # 0 would mean: not adjacent
    geodesic = shortest_path(np.where(adjacent, apart, np.inf), directed=False)
    near = np.exp(-geodesic**2 / (2 * sigma**2))
    connectivity = near[:, border].sum(1) / np.sqrt(near.sum(1))
    return np.exp(-connectivity**2 / 2)[index]


def given_saliency(path, size):
    """A grey PNG, brought to the image's size (H,W).   -> (H,W) in [0,1]"""
    with reading(path, "saliency map", "write it again as grey PNG"), Image.open(path) as file:
        if file.mode[0] in "IF":                                # convert() would cut them off at 255
            raise DataError(f"saliency map {path} has more than 8 bits a pixel ({file.mode}); save it with 8")
        return np.asarray(file.convert("L").resize(size[::-1], Image.Resampling.BILINEAR)) / 255


def seeds_from(cam, saliency, foreground, background):
    """Foreground: CAM above its threshold; background: saliency below its own; none or several: 255.

    cam (K,H,W), saliency (H,W) -> (H,W) uint8
    """
    claims = np.concatenate([saliency[None] < background, cam > foreground])
    return np.where(claims.sum(0) == 1, claims.argmax(0), 255).astype(np.uint8)


# ── Query-reference pairs (§Multiple Pairs, §The Query-Reference Pairs) ─────────────────────────────────────
class Groups(torch.utils.data.Dataset):
    """Draws of groups, a query and its references side by side; each image is a query once an epoch.

    Item n is member n mod (1+N) of group n div (1+N), fixed by (seed, n) as in Draws: so workers, processes
    and interruptions do not change it. tags (images,K) bool.
    """

    def __init__(self, dataset, augment, seed, tags, references, pairs):
        self.dataset, self.augment, self.seed, self.tags = dataset, augment, seed, tags
        self.references, self.pairs = references, pairs
        self.groups = Draws(range(len(dataset)), self.members, seed)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, n):
        group, member = divmod(n, 1 + self.references)
        sample = self.dataset[self.groups[group][member]]
        return self.augment(sample, np.random.default_rng([self.seed, n, 2]))

    def members(self, query, rng):
        """Indices [query, references …]: a reference shares a class with all before it. [D11]"""
        found, common = [query], self.tags[query]
        for _ in range(self.references):
            fits = (self.tags & common).any(1) if self.pairs == "common" else np.ones(len(self.tags), bool)
            fits[found] = False
            partner = int(rng.choice(np.flatnonzero(fits))) if fits.any() else query
            found.append(partner)
            common = common & self.tags[partner]
        return found


def others_of_group(batch, references):
    """Places of each image's references, the others of its group.   -> (batch,N) int64   [D6]"""
    place, size = torch.arange(batch)[:, None], 1 + references
    return place // size * size + (place % size + torch.arange(1, size)) % size


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────
def two_rates(net, lr, new):
    """Optimiser groups: the backbone, and the new layers at `new` times its rate.   [D2]"""
    parts = {True: [], False: []}
    for name, p in net.named_parameters():
        parts[name.startswith("backbone.")].append(p)
    return [{"params": parts[True], "lr": lr}, {"params": parts[False], "lr": new * lr}]


def train_classifier(args, run, train_set):
    """§Initial Seeds: image tags, multi-class sigmoid loss."""
    def augment(sample, rng):
        sample = resize_long(sample, int(rng.integers(args.cam_resize[0], args.cam_resize[1] + 1)))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.cam_crop, rng))

    run.reseed("classifier")
    start = pretrained(args.cam_backbone, args.weights)
    weights = weights_of(args.cam_backbone, args.weights)
    backbone = make_backbone(args.cam_backbone, weights, args.cam_stride, start)
    net = Classifier(backbone, len(train_set.classes), pool5=args.cam_backbone == "vgg16")
    ddp = run.place(net).train()
    optim = torch.optim.SGD(two_rates(net, args.cam_lr, 10 if start else 1), lr=args.cam_lr,
                            momentum=args.momentum, weight_decay=args.weight_decay)
    draws, schedule = Draws(train_set, augment, args.seed), poly(args.cam_steps)
    for step, batch in run.steps("classifier", draws, args.cam_steps, args.cam_batch, net, optim, schedule):
        with run.autocast():
            scores = ddp(batch.image)
        loss = F.binary_cross_entropy_with_logits(scores.float(), batch.tags)
        optim.zero_grad()
        loss.backward()
        optim.step()
        run.log(step, loss=loss, right=((scores > 0) == (batch.tags > 0)).float().mean())
    return net.eval()


def write_initial_seeds(args, run, net, train_set):
    """CAM and saliency -> seeds.   Writes cam/*.npz, saliency/*.png and seeds/*.png"""
    maps = stems(Path(args.saliency)) if args.saliency else {}

    def saliency_of(sample):
        if maps:
            return given_saliency(maps[sample.name], sample.image.shape[:2])
        return boundary_connectivity(sample.image, args.superpixels, args.connectivity_sigma)

    background = args.saliency_threshold if args.saliency else args.connectivity_threshold
    with run.timed("seeds"), ThreadPoolExecutor(max(1, args.workers)) as pool:
        for names in run.todo(train_set.names, "seeds", chunk=16, stage="seeds", beside=("cam", "saliency")):
            samples = [train_set[train_set.index(name)] for name in names]
            for s, saliency in zip(samples, pool.map(saliency_of, samples)):
                cam = class_activation(net, s.image, s.tags, args.cam_scales, args.cam_stride, run.device)
                seeds = seeds_from(cam, saliency, args.foreground, background)
                present = np.flatnonzero(s.tags)
                save_npz(run.path("cam", s.name, ".npz"), cam=cam[present].astype(np.float16),
                         present=present)
                save_image(run.path("saliency", s.name), np.round(255 * saliency).astype(np.uint8))
                save_label(run.path("seeds", s.name), seeds)


def read_cam(run, name, classes):
    """cam/<name>.npz -> (K,H,W) float32, absent classes 0."""
    with np.load(run.path("cam", name, ".npz")) as file:
        cam = np.zeros((classes, *file["cam"].shape[1:]), np.float32)
        cam[file["present"]] = file["cam"]
    return cam


def read_tags(run, train_set):
    """Tags of all training images, for the pairs.   Writes tags/train.npz -> (images,K) bool"""
    for (name,) in run.todo(["train"], "tags"):
        tags = [tags_in(train_set, each) for each in tqdm(train_set.names, "tags")]
        save_npz(run.path("tags", name, ".npz"), tags=np.array(tags, bool))
    path = run.path("tags", "train", ".npz")
    with np.load(path) as file:
        tags = file["tags"]
    if len(tags) != len(train_set):
        raise UserError(f"{path} has {len(tags)} pictures, the train set {len(train_set)}: the data have "
                        "changed; start over with --fresh")
    return tags


def write_strong(args, run, train_set, folder):
    """Table 4: the labels of `folder`, but of a random share of the images the ground truth.   [D17]

    Writes <folder>_strong/*.png, whose name it returns. The only place where weak training sees masks.
    """
    truth, target = load(args, "train", masks=True, fields=("mask",)), f"{folder}_strong"
    number = round(args.strong_ratio * len(train_set))
    chosen = {*np.random.default_rng(args.seed).permutation(train_set.names)[:number]}
    run.say(f"--strong-ratio {args.strong_ratio}: training sees the ground truth of {number} images")
    for (name,) in run.todo(train_set.names, target):
        label = truth[truth.index(name)].mask if name in chosen else read_label(run.path(folder, name))
        save_label(run.path(target, name), label)
    return target


def make_cian(args, weights, classes):
    """CIAN; weights "none" where they are loaded afterwards."""
    backbone = make_backbone(args.backbone, weights_of(args.backbone, weights), args.seg_stride,
                             pretrained(args.backbone, args.weights))                   # [D1]
    return CIAN(backbone, classes, args.merge, args.init_std, args.dilation)


def train_augment(args):
    """§Reproducibility's augmentation; `pseudo` becomes 255 in the crop's padding, 0 elsewhere."""
    def augment(sample, rng):
        sample = changed(sample, pseudo=np.zeros_like(sample.image[..., 0]))
        sample = rescale(sample, rng.choice(args.seg_rescale))
        sample = flip(sample) if rng.random() < 0.5 else sample
        return normalise(crop(sample, args.seg_crop, rng))
    return augment


def train_round(args, run, train_set, tags, folder, number, net):
    """One round of CIAN on the labels of `folder`, Eq. (9), or on ground truth.

    number: 1, 2 …; net: the round before's, which is trained on, None in the first
    """
    stage, full = f"segmenter_{number}", args.supervision == "full"
    run.reseed(stage)
    net = make_cian(args, args.weights, len(train_set.classes)) if net is None else net
    ddp = run.place(net).train()
    new = 10 if pretrained(args.backbone, args.weights) else 1
    optim = torch.optim.SGD(two_rates(net, args.seg_lr, new), lr=args.seg_lr, momentum=args.momentum,
                            weight_decay=args.weight_decay)
    labelled = train_set if full else with_labels(train_set, seed=run.dir / folder)
    draws = Groups(labelled, train_augment(args), 10 * args.seed + number, tags, args.references, args.pairs)
    steps, s = args.seg_steps if number == 1 else args.retrain_steps, net.stride
    for step, batch in run.steps(stage, draws, steps, args.seg_batch, net, optim, poly(steps)):     # [D10]
        references = others_of_group(len(batch.image), args.references).to(run.device) if args.cross else None
        with run.autocast():
            scores = ddp(batch.image, references)
        label = (batch.mask if full else batch.seed)[:, ::s, ::s]                       # [D13]
        valid = batch.pseudo[:, ::s, ::s] == 0
        completion = args.completion and not full and (number > 1 or step >= args.warmup)       # [D14] [D16]
        terms = eq9_terms(scores, label, batch.tags, valid, completion, args.completion_target)
        loss = sum(terms.values())
        optim.zero_grad()
        loss.backward()
        optim.step()
        online = eq7_online_label(scores["self"], batch.tags, valid)
        run.log(step, loss=loss, **terms, known=(label != 255).float().mean(),
                background=(label == 0).float().mean(), online=(online != 255).float().mean(),
                online_background=(online == 0).float().mean(), gamma=net.affinity.gamma())
    return net.eval()


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────────────────
@inference()
def predict(net, image, scales, device):
    """Class probabilities by self-affinity, mean over scales and mirror images.   [D12]

    image (H,W,3) uint8 -> (K+1,H,W) float32
    """
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    stride, size, total = net.stride, image.shape[:2], 0
    for scale in scales:
        seen = [max(32, round(n * scale)) for n in size]
        scaled = resize_batch(x, seen)
        logits = net(torch.cat([scaled, scaled.flip(-1)]))["self"]
        prob = cells_to_pixels(logits, stride, size, seen).softmax(1)
        total = total + prob[0] + prob[1].flip(-1)
    return (total / (2 * len(scales))).cpu().numpy()


def predict_set(args, run, net, dataset, plain, sharp, crf, by_tags=False):
    """Predictions without and with CRF.   Writes <plain>/*.png and <sharp>/*.png

    by_tags [D15]: classes that the image does not have, by its tags, get probability 0
    """
    with run.timed(sharp):
        for names in run.todo(dataset.names, sharp, chunk=16, stage=sharp, beside=(plain,)):
            samples = [dataset[dataset.index(name)] for name in names]
            probs = [predict(net, s.image, args.test_scales, run.device) for s in samples]
            if by_tags:
                probs = [prob * np.r_[True, s.tags][:, None, None] for s, prob in zip(samples, probs)]
                probs = [prob / prob.sum(0, keepdims=True).clip(1e-12) for prob in probs]
            refined = dense_crf([s.image for s in samples], probs, crf, args.crf, args.workers, run.device)
            for name, prob, Q in zip(names, probs, refined):
                save_label(run.path(plain, name), prob.argmax(0))
                save_label(run.path(sharp, name), Q.argmax(0))


def evaluate_stage(args, run, stage, split, folder, timed, **values):
    """One entry of results.json. Only from here on are val masks, and those of weak labels' images, seen.

    folder: label maps; cam: the classes whose CAM is above the seeds' threshold
    """
    truth = load(args, split, masks=True, fields=("mask",))
    if "mask" not in truth.fields:                                                    # own data may lack it
        return

    def label_of(sample):
        if folder != "cam":
            return read_label(run.path(folder, sample.name), truth.classes)
        cam = read_cam(run, sample.name, len(truth.classes))
        return np.where(cam.max(0) > args.foreground, cam.argmax(0) + 1, 0)

    confusion = confusion_of(truth, label_of)
    if stage == "seed":
        values.update(precision=confusion.precision(), coverage=confusion.coverage())
    run.result(stage, confusion, split=split, n_images=len(truth), uses_masks=True, notes=truth.notes,
               seconds=round(sum(map(run.seconds, timed)), 1), **values)


@inference()
def embedded(net, image, device):
    """An image at scale 1.   (H,W,3) uint8 -> x (1,D,h,w), φ_q(x), φ_r(x), φ_c(x) as AffinityModule.embed"""
    x = normalise(Sample(image=image)).image[None].to(device, memory_format=torch.channels_last)
    x = net.backbone(x)[-1].float()
    return x, *net.affinity.embed(x)


def partners(tags):
    """For each image the next one, in a ring, that shares a class; and the first such class, 0 … K−1.

    tags (n,K) bool -> list of (query, reference, class); images without partner are left out
    """
    n, found = len(tags), []
    for i in range(n):
        for j in (k % n for k in range(i + 1, i + n)):
            common = np.flatnonzero(tags[i] & tags[j])
            if len(common):
                found.append((i, j, common[0]))
                break
    return found


@torch.no_grad()
def evaluate_attention(args, run, net):
    """Where cross-image affinity looks: share of k̄ on the reference's common class, against its area there.

    Mean over val pairs with that class in both grids: for the query's pixels of the class, and for all of
    them (Fig. 3's mean map).   -> fields of results.json, {} without masks
    """
    truth, s = load(args, "val", masks=True, fields=("mask",)), net.stride
    if "mask" not in truth.fields:
        return {}
    pairs = partners(np.array([tags_in(truth, name) for name in truth.names]))
    total = torch.zeros(4, dtype=torch.float64)
    for i, j, c in tqdm(shard(pairs), "attention", disable=rank() > 0):
        query, reference = truth[i], truth[j]
        rows = torch.tensor(query.mask[::s, ::s] == c + 1).flatten()                            # [D13]
        keys = torch.tensor(reference.mask[::2 * s, ::2 * s] == c + 1).flatten()
        if rows.any() and keys.any():
            q, r = embedded(net, query.image, run.device)[1], embedded(net, reference.image, run.device)[2]
            share = eq1_2_affinity(q, r)[0].cpu()[:, keys].sum(1)                       # (N,)
            total += torch.stack([share[rows].mean(), share.mean(), keys.float().mean(), torch.tensor(1.0)])
    own, every, area, number = reduce(total).tolist()
    if not number:
        return {}
    return dict(attention_class=own / number, attention_all=every / number, attention_area=area / number,
                attention_ratio=own / area, attention_pairs=int(number))


def draw_cian(args, run, split, columns):
    """panels/<split>.png of what the stages wrote.   columns {title: folder}"""
    truth = load(args, split, masks=True, fields=("mask",))
    if split == "train":
        columns = {"CAM": lambda s: read_cam(run, s.name, len(truth.classes)).max(0),
                   "saliency": lambda s: read_image(run.path("saliency", s.name))[..., 0] / 255, **columns}
    draw_panels(run, split, truth, columns)


@torch.no_grad()
def draw_affinity(args, run, net):
    """panels/affinity.png, as Fig. 3: mean affinity of self and cross; the common class's scores from the
    raw features, the residual and their sum; the prediction.
    """
    if rank() > 0:
        return
    truth, rows = load(args, "val", masks=True, fields=("mask",)), []
    samples = [truth[i] for i in range(min(64, len(truth)))]

    def heat(x, size):
        x = x - x.min()
        return resample((x / x.max().clamp_min(1e-12))[None, None], size)[0, 0].cpu().numpy()

    for i, j, c in partners(np.array([s.tags for s in samples]))[:8]:
        query, reference = samples[i].image, samples[j].image
        (x, q, *own), (x_r, _, *other) = (embedded(net, image, run.device) for image in (query, reference))
        maps = []
        for (r, _), grid, image in ((own, x, query), (other, x_r, reference)):
            cells = [-(-n // 2) for n in grid.shape[2:]]
            maps.append(heat(eq1_2_affinity(q, r)[0].mean(0).view(*cells), image.shape[:2]))
        m = eq5_merge([eq2_3_message(q, *other), eq2_3_message(q, *own)], net.affinity.merge)
        augmented = eq4_augment(x, m, net.affinity.phi_o)
        scores = [net.head(t)[0] for t in (x, augmented - x, augmented)]
        label = cells_to_pixels(scores[-1][None], net.stride, query.shape[:2])[0].argmax(0).cpu().numpy()
        rows.append([query, reference, *maps, *(heat(t[c + 1], query.shape[:2]) for t in scores),
                     overlay(query, label)])
    if rows:
        contact_sheet(run.path("panels", "affinity"), rows, [
            "query", "reference", "self-affinity", "cross-affinity", "raw", "residual", "augmented",
            "prediction"])


def evaluate_round(args, run, net, number, last):
    """val and val_crf of one round ("_1" and so on before the last), affinities, panels."""
    tag = "" if last else f"_{number}"
    if run.has(f"val_crf{tag}"):
        return
    values = dict(scales=args.test_scales, strong_ratio=args.strong_ratio, gamma=net.affinity.gamma().item())
    timed = [f"segmenter_{number}", f"val_crf{tag}"]
    draw_cian(args, run, "val", {"prediction": f"val{tag}", "prediction + CRF": f"val_crf{tag}"})
    draw_affinity(args, run, net)
    values |= evaluate_attention(args, run, net)
    for stage in (f"val{tag}", f"val_crf{tag}"):
        evaluate_stage(args, run, stage, "val", stage, timed, crf="crf" in stage, **values)


def predict_folder(args):
    """--predict: masks and overlays of a picture or a folder, by the network of --checkpoint.

    Writes predict/*.png, predict/*_overlay.png beside the checkpoint (or in --out, where that is given).
    """
    state, last = read_predictor(args, Args, "segmenter_1.pt or segmenter_2.pt", "head.branches.0.weight")
    device, made = start_processes(args.device), Args(**state["args"])
    net = with_weights(make_cian(made, "none", len(state["model"][last]) - 1), state, device)
    for image, path in pictures_to_predict(args):
        prob = predict(net, image, made.test_scales, device)
        label = dense_crf([image], [prob], CRF(*made.seg_crf), args.crf, device=device)[0].argmax(0)
        save_prediction(path, image, label)


# ── Main ────────────────────────────────────────────────────────────────────────────────────────────────────
def check_cian(args, train_set):
    """What would else fail after hours fails now."""
    group = world() * (1 + args.references)
    if args.references < 1 or args.rounds < 1:
        raise UserError("--references and --rounds: give 1 or more (--no-cross trains without references)")
    if args.seg_batch % group:
        raise UserError(f"--seg-batch {args.seg_batch}: give a multiple of {group}, processes x images of a "
                        "group (a query and its references)")
    if args.completion and args.supervision != "full" and args.warmup >= args.seg_steps:
        raise UserError(f"--warmup {args.warmup}: with --seg-steps {args.seg_steps} the completion loss "
                        "would never begin; give fewer, or --no-completion")
    if min(args.connectivity_sigma, args.dilation, args.init_std) <= 0:
        raise UserError("--connectivity-sigma, --dilation, --init-std: give numbers above 0")
    for name in ("foreground", "saliency_threshold", "connectivity_threshold"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')}: give a number from 0 to 1")
    if not 0 <= args.strong_ratio < 1:
        raise UserError(f"--strong-ratio {args.strong_ratio}: give a share of the images, from 0 to below 1")
    if args.strong_ratio and "mask" not in load(args, "train", masks=True, fields=("mask",)).fields:
        raise UserError("--strong-ratio needs masks of the training images, and they are not all there")
    if args.saliency:
        require(train_set.names, stems(Path(args.saliency)), args.saliency, "each needs a grey PNG there")
    make_cian(args, args.weights, 1)                                                   # wrong weights: now


def main():
    """Fig. 2 from seeds to retraining, round by round; --supervision full: one round on ground truth."""
    args = parse_args(Args, __doc__, presets={"shapes": SHAPES, "photos": PHOTOS})
    args.cam_backbone = args.backbone if args.cam_backbone == "same" else args.cam_backbone
    if args.predict:
        return predict_folder(args)
    train_set, val_set = (load(args, split, fields=("mask",)) for split in ("train", "val"))
    start_processes(args.device)
    check_cian(args, train_set)
    run, weak = Run(args, FIELDS), args.supervision != "full"
    if weak:
        classifier = train_classifier(args, run, train_set)                             # §Initial Seeds
        write_initial_seeds(args, run, classifier, train_set)
        if not run.has("seed"):
            draw_cian(args, run, "train", {"seed": "seeds"})
            evaluate_stage(args, run, "cam", "train", "cam", ["classifier"], crf=False)
            evaluate_stage(args, run, "seed", "train", "seeds", ["seeds"], crf=False)
    tags, folder, net = read_tags(run, train_set), "seeds", None
    rounds = args.rounds if weak else 1                                                 # [D16]
    for number in range(1, rounds + 1):
        last = number == rounds
        if weak and args.strong_ratio:
            folder = write_strong(args, run, train_set, folder)                         # Table 4
        net = train_round(args, run, train_set, tags, folder, number, net)              # Eqs. (1)–(9)
        tag = "" if last else f"_{number}"
        predict_set(args, run, net, val_set, f"val{tag}", f"val_crf{tag}", args.seg_crf)
        evaluate_round(args, run, net, number, last)
        if not last:                                                                    # retraining
            folder = f"pseudo_{number}"
            predict_set(args, run, net, train_set, f"{folder}_raw", folder, args.retrain_crf,
                        args.retrain_tags)
            if not run.has(folder):
                draw_cian(args, run, "train", {"seed": "seeds", "retraining label": folder})
                evaluate_stage(args, run, folder, "train", folder, [folder], crf=True)
    run.table()


if __name__ == "__main__":
    main()
