"""One Sample type for every data set, the transforms that keep its parts aligned, and the data sets themselves.

    dataset = load(args, "train")              # reads args.data, args.root, args.train_list, args.supervision
    sample = dataset[0]                        # sample.image, sample.tags, and what the supervision reveals

Data sets    shapes (drawn on the fly, no files) · voc (PASCAL VOC 2012, SBD, ScribbleSup, what's-the-point) · workpiece (your folder)
Coordinates  x to the right and y down, in pixel edges: pixel (row i, column j) covers j <= x < j+1, i <= y < i+1.
             A box is [class, x0, y0, x1, y1], half open: its pixels are mask[y0:y1, x0:x1]. VOC's 1-based inclusive XML
             (xmin, ymin, xmax, ymax) becomes (xmin-1, ymin-1, xmax, ymax).
Labels       0 = background, 1..K = dataset.classes, 255 = no label. Class numbers in boxes and points are 1..K as well.
Commands     python data.py check --data voc --root data/voc                              # what is there, what is missing
             python data.py export --data shapes --layout workpiece --to my/folder        # shapes in a real layout, to look at
             python data.py voc-aug --sbd path/to/SBD --root data/voc                     # makes SegmentationClassAug
"""
import copy
import json
import sys
import types
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                  # ImageNet's, of RGB / 255
LABEL_MAPS = ("mask", "instances", "scribble", "seed", "pseudo")          # moved by nearest neighbour, padded with 255
REVEALS = {"image": (), "point": ("points",), "scribble": ("scribble",), "box": ("boxes",),
           "full": ("points", "scribble", "boxes", "mask", "instances")}   # beside name, image and tags
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
VOC_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
SHOWN = 12                                                                # so many values or names an error message lists


class DataError(ValueError):
    """A file or folder is missing or wrong; the message is one sentence that names it and the remedy."""


class Sample(types.SimpleNamespace):
    """One picture with what is known about it. A field that is not revealed is absent, never None.

    name str · image (H,W,3) uint8 RGB · tags (K,) bool · boxes (M,5) float32 [class, x0, y0, x1, y1] · points (P,3) float32
    [class, x, y] · scribble, mask (H,W) uint8 {0..K, 255} · instances (H,W) uint8: 0 = none, 1.. = objects, 255 = border.
    Stages of a method attach further label maps: seed, pseudo (H,W) uint8.
    """


# ── Transforms: Sample -> Sample, the given one stays as it is, all fields stay aligned ──────────────────────────────

def changed(s, **fields):
    """A copy of the sample with some fields replaced."""
    return Sample(**{**vars(s), **fields})


def label_maps(s):
    """The sample's label maps: {field: (H,W) uint8}."""
    return {key: getattr(s, key) for key in LABEL_MAPS if hasattr(s, key)}


def resize(s, size):
    """To size = (h, w): image bilinear (antialiased when shrinking), label maps by nearest neighbour."""
    (height, width), (h, w) = s.image.shape[:2], size
    fields = {"image": np.asarray(Image.fromarray(s.image).resize((w, h), Image.BILINEAR))}
    for key, label in label_maps(s).items():
        fields[key] = np.asarray(Image.fromarray(label).resize((w, h), Image.NEAREST))
    scale = np.array([1, w / width, h / height, w / width, h / height], np.float32)
    for key in ("boxes", "points"):
        if hasattr(s, key):
            fields[key] = getattr(s, key) * scale[:getattr(s, key).shape[1]]
    return changed(s, **fields)


def rescale(s, factor):
    """Both sides times factor."""
    return resize(s, [max(1, round(side * factor)) for side in s.image.shape[:2]])


def resize_long(s, pixels):
    """So that the longer side has this many pixels."""
    return rescale(s, pixels / max(s.image.shape[:2]))


def flip(s):
    """Left and right exchanged."""
    width = s.image.shape[1]
    fields = {key: np.ascontiguousarray(array[:, ::-1]) for key, array in {"image": s.image, **label_maps(s)}.items()}
    if hasattr(s, "boxes"):
        fields["boxes"] = np.stack([s.boxes[:, 0], width - s.boxes[:, 3], s.boxes[:, 2],
                                    width - s.boxes[:, 1], s.boxes[:, 4]], axis=1)
    if hasattr(s, "points"):
        fields["points"] = np.stack([s.points[:, 0], width - s.points[:, 1], s.points[:, 2]], axis=1)
    return changed(s, **fields)


def window(array, y, x, size, fill):
    """The size x size window of array (H,W,...) whose corner is (y, x), filled where it reaches outside."""
    out = np.empty((size, size) + array.shape[2:], array.dtype)
    out[:] = fill
    inside = array[max(y, 0):y + size, max(x, 0):x + size]
    out[max(-y, 0):max(-y, 0) + inside.shape[0], max(-x, 0):max(-x, 0) + inside.shape[1]] = inside
    return out


def crop(s, size, rng, tags=False):
    """A random size x size window; a side shorter than that is padded, at a random position.

    The image is padded with the mean colour, label maps with 255; boxes are clipped; boxes of which less than a pixel is
    left and points outside are dropped. tags=True recomputes the tags from what is left of the first revealed of mask, boxes,
    points, scribble (with image tags alone they stay: nobody can know). For papers that do so.
    """
    y, x = (int(rng.integers(min(0, side - size), max(0, side - size) + 1)) for side in s.image.shape[:2])
    fields = {key: window(label, y, x, size, 255) for key, label in label_maps(s).items()}
    fields["image"] = window(s.image, y, x, size, np.round(np.array(MEAN) * 255).astype(np.uint8))
    if hasattr(s, "boxes"):
        corner = np.array([x, y, x, y], np.float32)
        boxes = np.concatenate([s.boxes[:, :1], (s.boxes[:, 1:] - corner).clip(0, size)], axis=1)
        fields["boxes"] = boxes[(boxes[:, 3:] - boxes[:, 1:3] >= 1).all(axis=1)]
    if hasattr(s, "points"):
        points = s.points - np.array([0, x, y], np.float32)
        fields["points"] = points[((points[:, 1:] >= 0) & (points[:, 1:] < size)).all(axis=1)]
    s = changed(s, **fields)
    return changed(s, tags=tags_of(s, len(s.tags))) if tags else s


def tags_of(s, classes):
    """(K,) bool: the classes that occur in the first revealed of mask, boxes, points, scribble; else the tags as they are."""
    for key in ("mask", "boxes", "points", "scribble"):
        if hasattr(s, key):
            found = getattr(s, key) if key in LABEL_MAPS else getattr(s, key)[:, 0]
            return np.isin(np.arange(1, classes + 1), np.unique(found).astype(int))
    return s.tags


def color_jitter(s, rng, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0):
    """Random factors from [max(0, 1-v), 1+v], hue shift from [-hue, hue] of the colour circle, in random order."""
    from torchvision.transforms import functional as F
    image = Image.fromarray(s.image)
    amounts = {F.adjust_brightness: brightness, F.adjust_contrast: contrast, F.adjust_saturation: saturation}
    steps = [(adjust, rng.uniform(max(0, 1 - v), 1 + v)) for adjust, v in amounts.items()]
    steps.append((F.adjust_hue, rng.uniform(-hue, hue)))
    for k in rng.permutation(len(steps)):
        image = steps[k][0](image, float(steps[k][1]))
    return changed(s, image=np.asarray(image))


def normalise(s):
    """numpy -> torch: image float32 (3,H,W) with ImageNet mean and std, label maps int64, tags, boxes and points float32."""
    image = (torch.tensor(s.image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    fields = {key: torch.tensor(label).long() for key, label in label_maps(s).items()}
    fields |= {key: torch.tensor(getattr(s, key)).float() for key in ("tags", "boxes", "points") if hasattr(s, key)}
    return changed(s, image=image.permute(2, 0, 1).contiguous(), **fields)


def denormalise(image):
    """(3,H,W) float -> (H,W,3) uint8, the reverse of normalise."""
    image = image.detach().float().cpu().permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    return (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def collate(samples):
    """List of B normalised samples -> one Sample: image (B,3,H,W), tags (B,K), label maps (B,H,W); name, boxes and points are lists."""
    stacked = ("image", "tags") + LABEL_MAPS
    batch = {key: [getattr(s, key) for s in samples] for key in vars(samples[0])}
    return Sample(**{key: torch.stack(values) if key in stacked else values for key, values in batch.items()})


# ── Datasets ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class Dataset(torch.utils.data.Dataset):
    """The samples of one split, each with the fields that may be seen and no others.

    source.read(name, wanted) yields a Sample; fields are the wanted ones beside name, image and tags; labels {field: folder}
    adds label maps that a stage has written. .names list[str] · .classes list[str] (K, without background) · .notes {topic: sentence}
    """

    def __init__(self, source, fields, labels=None):
        self.source, self.fields, self.labels = source, tuple(fields), dict(labels or {})
        self.names, self.classes, self.notes = source.names, source.classes, dict(source.notes)
        self.order = {name: i for i, name in enumerate(self.names)}

    def __len__(self):
        return len(self.names)

    def index(self, name):
        return self.order[name]

    def __getitem__(self, i):
        name = self.names[i]
        sample = self.source.read(name, self.fields)
        kept = {key: value for key, value in vars(sample).items() if key in ("name", "image", "tags") + self.fields}
        for key, folder in self.labels.items():
            path = Path(folder) / f"{name}.png"
            kept[key] = same_size(path, read_label(path, self.classes), kept["image"])
        return Sample(**kept)


def with_labels(dataset, **folders):
    """The same data set whose samples carry further label maps: with_labels(d, pseudo=DIR) reads DIR/<name>.png."""
    other = copy.copy(dataset)
    other.labels = {**dataset.labels, **folders}
    return other


class Draws(torch.utils.data.Dataset):
    """Item n is the n-th draw of a training that never ends: augment(sample, rng), fixed by (seed, n) alone.

    Epoch n // N goes through the data in a permutation seeded by (seed, epoch), so order and crops are the same whatever the
    workers, and a run that stopped continues by starting at n = step * batch.
    """

    def __init__(self, dataset, augment, seed):
        self.dataset, self.augment, self.seed, self.permutation = dataset, augment, seed, (None, None)

    def __len__(self):
        return 2 ** 40                                    # practically endless

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if self.permutation[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])          # the 1: no draw below has this seed
            self.permutation = epoch, rng.permutation(len(self.dataset))
        return self.augment(self.dataset[int(self.permutation[1][place])], np.random.default_rng([self.seed, n]))


def load(args, split, masks=False):
    """Dataset for split "train" or "val". args: data, root (default data/<data>), train_list, supervision.

    A training sample shows what args.supervision reveals and nothing else; val samples, and training samples under masks=True
    (the evaluation call, never used for training), show everything there is. Raises DataError.
    """
    if args.data not in SOURCES:
        raise DataError(f"no data set is called {args.data!r}; there are {', '.join(SOURCES)}")
    root = Path(getattr(args, "root", "") or f"data/{args.data}")
    source = SOURCES[args.data](root, split, getattr(args, "train_list", "train"))
    shown = set(REVEALS["full"] if masks or split == "val" else REVEALS[args.supervision])
    needed = {"mask"} if split == "val" or args.supervision == "full" else shown - {"mask", "instances"} if not masks else set()
    fields = source.prepare(shown, needed)
    return Dataset(source, [key for key in REVEALS["full"] if key in fields])


def read_list(path, root):
    """Names from a list file, one a line, with or without folders and suffix; a line's further words are ignored."""
    if not Path(path).is_file():
        raise DataError(f"the list {path} does not exist; --train-list takes train_aug, train or a file with one name a line "
                        f"(data at {root})")
    names = list(dict.fromkeys(Path(line.split()[0]).stem for line in Path(path).read_text().splitlines() if line.split()))
    if not names:
        raise DataError(f"the list {path} is empty; write one picture name a line")
    return names


def stems(folder, suffixes=(".png",)):
    """{name: path} of the files with these suffixes; empty when there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}


def require(names, files, folder, remedy):
    """Every name has its file, else DataError with the first missing ones."""
    missing = [name for name in names if name not in files]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of {len(names)} files, the first being {', '.join(missing[:SHOWN])}; {remedy}")


def read_image(path):
    """(H,W,3) uint8 RGB, turned as the file's EXIF orientation says."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"picture {path} does not exist; check --root and the list of names") from None
    except (OSError, SyntaxError) as error:
        raise DataError(f"picture {path} is truncated or not a picture ({error}); copy or download it again") from None


def read_label(path, classes=None):
    """(H,W) uint8 from a palette or grey PNG; values 0..K and 255 with classes (list or number K), any value without."""
    try:
        with Image.open(path) as image:
            image.load()
            mode, label = image.mode, np.array(image)
    except FileNotFoundError:
        raise DataError(f"label map {path} does not exist; check --root and the list of names") from None
    except (OSError, SyntaxError) as error:
        raise DataError(f"label map {path} is truncated or not a picture ({error}); write it again as PNG") from None
    if label.ndim != 2:
        raise DataError(f"label map {path} is a {mode} picture; save it as a palette or grey PNG whose pixel values are class numbers")
    if classes is not None:
        top = classes if isinstance(classes, int) else len(classes)
        bad = np.unique(label[(label > top) & (label != 255)])
        if bad.size:
            raise DataError(f"label map {path} holds the values {', '.join(map(str, bad[:SHOWN]))}{' …' * (bad.size > SHOWN)}, "
                            f"but only 0..{top} and 255 are allowed; {value_hint(label)}")
    return label.astype(np.uint8)


def value_hint(label):
    """What probably went wrong with a label map of illegal values."""
    share = np.isin(label, (0, 255)).mean()
    if share > 0.5 and np.unique(label).size > 2:
        return "looks like a black/white mask with soft edges: save the object as 1, hard-edged, not 255"
    return "save class numbers, not colours, and list every class in classes.txt"


def same_size(path, label, image):
    """The label map itself, or DataError when it does not fit its image."""
    if label.shape != image.shape[:2]:
        (h, w), (height, width) = label.shape, image.shape[:2]
        raise DataError(f"label map {path} is {w}x{h} pixels but its picture {width}x{height}; one of the two is turned or scaled")
    return label


def check_values(files, classes):
    """Values in the first 50 label maps -> list; DataError when no class occurs among them although 255 does."""
    values = sorted(set().union(*(np.unique(read_label(path, classes)).tolist() for path in files[:50])))
    if 255 in values and not any(0 < value < 255 for value in values):
        raise DataError(f"the label maps beside {files[0]} hold only {', '.join(map(str, values))}: 255 means \"ignore\" here; "
                        "looks like a black/white mask: save the object as 1, not 255")
    return values


# ── Weak labels derived from masks, where a data set ships none ──────────────────────────────────────────────────────

def objects_of(mask, instances=None):
    """[(class, (H,W) bool)] of each object; without an instance map each connected region of a class counts as one."""
    found = []
    if instances is None:
        for k in np.setdiff1d(mask, (0, 255)):
            regions, count = ndimage.label(mask == k)
            found += [(int(k), regions == i) for i in range(1, count + 1)]
        return found
    for i in np.setdiff1d(instances, (0, 255)):
        inside = instances == i
        votes = np.bincount(mask[inside], minlength=256)
        votes[[0, 255]] = 0
        found += [(int(votes.argmax()), inside)] if votes.any() else []
    return found


def derive_boxes(objects):
    """(M,5) float32, tight around each object's visible pixels."""
    boxes = []
    for k, inside in objects:
        rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        boxes.append([k, cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])
    return np.array(boxes, np.float32).reshape(-1, 5)


def depth(inside):
    """(H,W) float: each pixel's distance to the region's edge (the picture's edge counts), 0 outside."""
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    part = np.s_[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]
    out = np.zeros(inside.shape)
    out[part] = ndimage.distance_transform_edt(np.pad(inside[part], 1))[1:-1, 1:-1]
    return out


def derive_points(objects, rng):
    """(P,3) float32: one click an object, at the centre of a random pixel well inside it."""
    points = []
    for k, inside in objects:
        far = depth(inside)
        y, x = rng.choice(np.argwhere(far >= 0.6 * far.max()))
        points.append([k, x + 0.5, y + 0.5])
    return np.array(points, np.float32).reshape(-1, 3)


def draw_stroke(scribble, k, corners, width, inside):
    """Paints class k along the corners [(y, x), …], only where inside is true."""
    layer = Image.new("L", inside.shape[::-1])
    ImageDraw.Draw(layer).line([(int(x), int(y)) for y, x in corners], fill=1, width=width, joint="curve")
    scribble[(np.asarray(layer) > 0) & inside] = k


def derive_scribble(mask, objects, rng):
    """(H,W) uint8 {0..K, 255}: a thin stroke along each object, and one or two in the background."""
    scribble = np.full(mask.shape, 255, np.uint8)
    width = max(1, round(min(mask.shape) / 100))
    background = [(0, mask == 0)] * int(rng.integers(1, 3)) if (mask == 0).any() else []
    for k, inside in objects + background:
        far = depth(inside)
        deep = np.argwhere(far >= 0.4 * far.max())
        first = deep[((deep - rng.choice(deep)) ** 2).sum(1).argmax()] if k else rng.choice(deep)
        last = deep[((deep - first) ** 2).sum(1).argmax()] if k else rng.choice(deep)
        middle = np.unravel_index(far.argmax(), far.shape) if k else rng.choice(deep)
        draw_stroke(scribble, k, (first, middle, last), width, inside)
    return scribble


def derive(s, wanted, name):
    """Adds boxes, points and scribble to a sample from its mask (and instances), as far as wanted and absent; seeded by name."""
    missing = [key for key in ("boxes", "points", "scribble") if key in wanted and not hasattr(s, key)]
    if not missing:
        return s
    objects = objects_of(s.mask, getattr(s, "instances", None))
    seed = zlib.crc32(name.encode())
    fields = {"boxes": lambda: derive_boxes(objects), "points": lambda: derive_points(objects, np.random.default_rng([seed, 1])),
              "scribble": lambda: derive_scribble(s.mask, objects, np.random.default_rng([seed, 2]))}
    return changed(s, **{key: fields[key]() for key in missing})


# ── shapes: a yardstick drawn on the fly ─────────────────────────────────────────────────────────────────────────────
# As hard for weak labels as photographs are: the two classes of a look-alike pair share form, colour range and texture of
# their body and differ by one small part; distractor blobs have the colours of bodies and parts; a context goes with a class.
# The drawing is fixed for good: a method is tuned to its paper, never to these scenes.

class Kind(NamedTuple):
    """A class of objects, in the object's own frame: u along the body, v across it, the body within [-1, 1]."""
    name: str
    body: str                   # a key of FORMS
    height: float               # of the body, relative to its length
    texture: str
    colour: tuple               # mean RGB of the body
    part: str                   # a key of FORMS
    part_colour: tuple
    place: tuple                # centre (u, v) of the part
    size: float                 # half the part's length


FORMS = {                       # value < 1 inside, growing outwards; u, v arrays
    "oval": lambda u, v: u ** 2 + v ** 2,
    "block": lambda u, v: u ** 4 + v ** 4,
    "pear": lambda u, v: u ** 2 + (v / (0.78 - 0.3 * u)) ** 2,
    "star": lambda u, v: ((u ** 2 + v ** 2) ** 0.5 / (0.74 + 0.24 * np.cos(5 * np.arctan2(v, u)))) ** 2,
    "cross": lambda u, v: np.minimum(np.maximum(abs(u), abs(v) / 0.45), np.maximum(abs(v), abs(u) / 0.45)),
    "moon": lambda u, v: np.maximum(u ** 2 + v ** 2, 1.6 - (u - 0.2) ** 2 - (v + 1.1) ** 2),
    "hexagon": lambda u, v: np.maximum(abs(v), abs(u) * 0.87 + abs(v) / 2),
    "disc": lambda u, v: u ** 2 + v ** 2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)),
    "bar": lambda u, v: np.maximum(abs(u) / 0.45, abs(v) / 1.5),
    "wedge": lambda u, v: np.maximum(abs(v) / (0.55 + 0.65 * u).clip(0.05), abs(u)),
    "diamond": lambda u, v: abs(u) + abs(v),
    "ring": lambda u, v: abs((u ** 2 + v ** 2) ** 0.5 - 0.75) / 0.35,
}
TARGETS = (
    Kind("oval-fin", "oval", 0.58, "bands", (150, 112, 84), "wedge", (196, 62, 52), (0.92, 0.0), 0.40),
    Kind("oval-cap", "oval", 0.58, "bands", (150, 112, 84), "square", (58, 96, 188), (0.85, 0.0), 0.30),
    Kind("block-disc", "block", 0.80, "plain", (118, 132, 92), "disc", (232, 200, 66), (0.45, 0.30), 0.40),
    Kind("block-bar", "block", 0.80, "plain", (118, 132, 92), "bar", (170, 225, 240), (0.45, 0.0), 0.42),
    Kind("pear-ring", "pear", 1.00, "spots", (134, 116, 140), "ring", (226, 224, 214), (-0.50, 0.0), 0.36),
    Kind("pear-leaf", "pear", 1.00, "spots", (134, 116, 140), "diamond", (60, 170, 90), (0.95, 0.0), 0.38),
    Kind("star-eye", "star", 1.00, "checks", (164, 136, 104), "disc", (44, 152, 160), (0.0, 0.0), 0.30),
    Kind("star-horn", "star", 1.00, "checks", (164, 136, 104), "wedge", (190, 70, 150), (0.80, 0.0), 0.34),
)
AUXILIARY = (
    Kind("cross-hub", "cross", 1.00, "plain", (140, 124, 96), "diamond", (226, 130, 44), (0.0, 0.0), 0.40),
    Kind("cross-tip", "cross", 1.00, "plain", (140, 124, 96), "square", (96, 60, 160), (0.85, 0.0), 0.30),
    Kind("moon-knob", "moon", 1.00, "bands", (112, 124, 136), "disc", (214, 92, 110), (-0.80, 0.15), 0.30),
    Kind("moon-band", "moon", 1.00, "bands", (112, 124, 136), "bar", (240, 240, 150), (0.0, 0.7), 0.34),
    Kind("hexagon-flag", "hexagon", 0.90, "spots", (152, 120, 120), "wedge", (120, 190, 220), (0.95, 0.0), 0.42),
    Kind("hexagon-nut", "hexagon", 0.90, "spots", (152, 120, 120), "ring", (30, 70, 60), (0.0, 0.0), 0.38),
)
FOLDS = ((0, 4), (1, 6), (2, 5), (3, 7))                # few-shot: four folds of two classes (indices of TARGETS), never a pair
SCENES = {"train": 500, "val": 200}
CONTEXTS = {1: "water", 5: "reed"}                      # class number -> what lies around it in 85 % of its scenes, 5 % of the others


def pattern(name, u, v, rng, period):
    """(H,W) in [-1, 1]: a texture over the coordinates u, v in pixels."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    if name == "bands":
        return np.sin(2 * np.pi * u / period + phase[0])
    if name == "spots":
        return np.sin(2 * np.pi * u / period + phase[0]) * np.sin(2 * np.pi * v / period + phase[1])
    if name == "checks":
        return np.sign(np.sin(2 * np.pi * u / period + phase[0]) * np.sin(2 * np.pi * v / period + phase[1]))
    if name == "noise":
        cloud = ndimage.gaussian_filter(rng.normal(size=u.shape), period / 3)
        return (cloud / (2 * cloud.std())).clip(-1, 1)
    return np.zeros_like(u)


def tint(rng, colour, spread):
    """(3,) float: a colour near the given one: common brightness and each channel vary."""
    return (np.array(colour) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3)).clip(15, 240)


def rotated(rows, cols, centre, angle):
    """Coordinates (u, v) in pixels in a frame at centre (y, x), turned by angle."""
    y, x = rows - centre[0], cols - centre[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def draw_background(rng, rows, cols, kinds):
    """((H,W,3) float image, two tones): two tones of body-like colours, mixed by one of four textures."""
    tones = [tint(rng, kinds[rng.integers(len(kinds))].colour, 26) for _ in range(2)]
    u, v = rotated(rows, cols, (0, 0), rng.uniform(0, np.pi))
    name = ("bands", "noise", "checks", "gradient")[rng.integers(4)]
    mix = pattern(name, u, v, rng, rng.uniform(10, 28)) if name != "gradient" else (u - u.mean()) / (abs(u).max() + 1)
    mix = mix * 0.35 + 0.25 * pattern("noise", u, v, rng, rng.uniform(5, 12))
    mix = (0.5 + mix)[..., None].clip(0, 1)
    return tones[0] * mix + tones[1] * (1 - mix), tones


def draw_context(image, name, rng, rows, cols):
    """A band of water (blue-grey ripples) across the lower part, or of reed (green-brown blades) at the left or right."""
    height, width = rows.shape
    wave = 3 * np.sin(2 * np.pi * (cols if name == "water" else rows) / rng.uniform(25, 50))
    if name == "water":
        inside = rows > height * rng.uniform(0.5, 0.7) + wave
        colour, ripple = tint(rng, (96, 128, 150), 12), np.sin(rows * 1.3 + wave * 2)
    else:
        edge = width * rng.uniform(0.3, 0.45)
        inside = (cols if rng.random() < 0.5 else width - cols) < edge + wave
        colour, ripple = tint(rng, (122, 134, 78), 12), np.sin(cols * 1.4 + wave)
    image[inside] = (colour + 16 * ripple[..., None])[inside]


def draw_distractors(image, rng, rows, cols, kinds):
    """2 to 5 blobs that belong to no class, of the colours (and half of them the texture) of bodies and parts."""
    for _ in range(rng.integers(2, 6)):
        kind = kinds[rng.integers(len(kinds))]
        of_part = rng.random() < 0.6
        radius = rng.uniform(2.5, 6) if of_part else rng.uniform(5, 13)
        u, v = rotated(rows, cols, rng.uniform(0, rows.shape), rng.uniform(0, np.pi))
        lobes = 1 + 0.25 * np.sin(rng.integers(2, 4) * np.arctan2(v, u) + rng.uniform(0, 6))
        inside = (u / rng.uniform(1, 1.6)) ** 2 + v ** 2 < (radius * lobes) ** 2
        colour = tint(rng, kind.part_colour if of_part else kind.colour, 14)
        shade = 0 if of_part else 18 * pattern(kind.texture, u, v, rng, max(4, radius / 2))[..., None]
        image[inside] = (colour + shade + 0 * image)[inside]


def place_object(kind, rng, rows, cols, beside=None):
    """Where an object would lie: body and part (H,W) bool, its frame (u, v) and radius; beside = (centre, radius) to touch."""
    radius = rng.uniform(10, 27) if beside is None else beside[1] * rng.uniform(0.8, 1.2)
    centre = rng.uniform(0.12, 0.88, 2) * rows.shape
    if beside is not None:
        direction, gap = rng.uniform(0, 2 * np.pi), (radius + beside[1]) * rng.uniform(0.65, 0.9)
        centre = beside[0] + gap * np.array([np.sin(direction), np.cos(direction)])
    u, v = rotated(rows, cols, centre, rng.uniform(0, 2 * np.pi))
    u, v = u / radius, v / radius
    rim = FORMS[kind.body](u, v / kind.height)
    part = FORMS[kind.part]((u - kind.place[0]) / kind.size, (v - kind.place[1]) / kind.size) < 1
    return types.SimpleNamespace(kind=kind, centre=centre, radius=radius, u=u, v=v, rim=rim, body=rim < 1, part=part)


def paint_object(image, thing, rng, tones):
    """Body with its texture, darker towards the rim, then the part."""
    for _ in range(20):                                                   # an attentive eye must be able to tell it from the ground
        colour = tint(rng, thing.kind.colour, 24)
        if min(abs(colour - tone).max() for tone in tones) > 28:
            break
    r = thing.radius
    texture = pattern(thing.kind.texture, thing.u * r, thing.v * r, rng, max(4, r / 2.5))
    shade = 18 * texture - 42 * thing.rim.clip(0, 1) ** 2 + 12
    image[thing.body] = (colour + shade[..., None])[thing.body]
    image[thing.part] = tint(rng, thing.kind.part_colour, 12)


def choose_kinds(rng, count):
    """Class index of each of 1 to 4 objects; a third of the later ones repeat the one before and touch it."""
    chosen = []
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.2, 0.1])):
        chosen.append(chosen[-1] if chosen and rng.random() < 0.35 else int(rng.integers(count)))
    return chosen


def draw_scene(seed, split, index, classes="target"):
    """The scene number `index` of a split as a Sample with image, tags, mask and instances, always the same for the same arguments.

    classes: "target" (the 8 of TARGETS) or "aux" (the 6 of AUXILIARY, disjoint: an auxiliary data set with masks).
    """
    kinds = {"target": TARGETS, "aux": AUXILIARY}[classes]
    rng = np.random.default_rng([seed, ("train", "val").index(split), index, len(kinds)])
    height, width = rng.integers(96, 129, 2)
    rows, cols = np.mgrid[:height, :width].astype(float)
    image, tones = draw_background(rng, rows, cols, TARGETS + AUXILIARY)
    chosen = choose_kinds(rng, len(kinds))
    for k, name in CONTEXTS.items():
        if classes == "target" and rng.random() < (0.85 if k - 1 in chosen else 0.05):
            draw_context(image, name, rng, rows, cols)
    draw_distractors(image, rng, rows, cols, TARGETS + AUXILIARY)
    mask, instances = np.zeros((2, height, width), np.uint8)
    things = []
    for k in chosen:
        thing = fit_object(kinds[k], things, rng, rows, cols)
        if thing is not None:
            paint_object(image, thing, rng, tones)
            things.append(thing)
            mask[thing.body | thing.part] = k + 1
            instances[thing.body | thing.part] = len(things)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = rotated(rows, cols, (height / 2, width / 2), angle)[0] / max(height, width)
    image = image * (1 + rng.uniform(0.1, 0.5) * ramp)[..., None] + rng.uniform(-12, 12)
    image = ndimage.gaussian_filter(image, (rng.uniform(0.4, 0.8),) * 2 + (0,)) + rng.normal(0, rng.uniform(3, 8), image.shape)
    tags = np.isin(np.arange(1, len(kinds) + 1), mask)
    return Sample(name=f"{split}_{index:04d}", image=image.round().clip(0, 255).astype(np.uint8), tags=tags, mask=mask,
                  instances=instances)


def fit_object(kind, things, rng, rows, cols):
    """A place for a new object that leaves it and all earlier ones recognisable (most of body and part in sight), or None."""
    before = things[-1] if things and things[-1].kind == kind else None
    for attempt in range(30):
        touch = (before.centre, before.radius) if before is not None and attempt < 20 else None
        new = place_object(kind, rng, rows, cols, touch)
        area = new.radius ** 2
        if new.body.sum() < 1.2 * area * kind.height or new.part.sum() < 0.8 * (new.radius * kind.size) ** 2:
            continue                                                      # too much of it lies outside the picture
        cover = new.body | new.part
        if all((old.body & ~cover).sum() > 0.5 * old.body.sum() and (old.part & ~cover).sum() > 0.7 * old.part.sum()
               for old in things):
            for old in things:
                old.body, old.part = old.body & ~cover, old.part & ~cover
            return new
    return None


class Shapes:
    """500 train and 200 val scenes, drawn when first asked for and kept in memory. A list file picks among them."""

    def __init__(self, root, split, train_list):
        self.names = [f"{split}_{i:04d}" for i in range(SCENES[split])]
        self.classes, self.notes, self.split, self.scenes = [kind.name for kind in TARGETS], {}, split, {}
        if split == "train" and train_list not in ("train", "train_aug"):
            listed = read_list(train_list, "shapes")
            require(listed, set(self.names), "shapes", f"its names are {self.names[0]} to {self.names[-1]}")
            self.names = listed

    def prepare(self, shown, needed):
        return shown

    def read(self, name, wanted):
        if name not in self.scenes:
            scene = draw_scene(0, self.split, int(name.split("_")[1]))
            self.scenes[name] = derive(scene, REVEALS["full"], name)
        return self.scenes[name]


# ── voc: PASCAL VOC 2012 with SBD, ScribbleSup and what's-the-point ──────────────────────────────────────────────────

class VOC:
    """JPEGImages/*.jpg, Annotations/*.xml (tags, boxes), ImageSets/Segmentation/{train,val}.txt under VOC2012; where there are any:
    SegmentationClass, SegmentationClassAug (SBD), SegmentationObject/*.png, scribbles/*.xml or *.png, points/whats_the_point.json.

    root may be VOCdevkit, its parent or VOC2012. A classes.txt beside JPEGImages replaces the 20 names. Tags are the classes of all
    XML objects, difficult ones too (VOC's masks hold them). Without masks revealed SegmentationClass is opened only to derive
    scribbles or points that are not shipped, and notes says so.
    """

    def __init__(self, root, split, train_list):
        self.root = voc_root(root)
        self.pictures = stems(self.root / "JPEGImages", (".jpg", ".jpeg", ".png"))
        listed = self.root / "classes.txt"
        self.classes = read_classes(listed) if listed.is_file() else list(VOC_CLASSES)
        self.split, self.notes = split, {}
        self.names = voc_names(self.root, train_list if split == "train" else "val")
        require(self.names, self.pictures, self.root / "JPEGImages", f"take the whole of VOC 2012 ({VOC_PAGE}) or mend the list")

    def prepare(self, shown, needed):
        """Looks that the files are there, before any is read -> the fields that samples will have."""
        require(self.names, stems(self.root / "Annotations", (".xml",)), self.root / "Annotations",
                f"tags and boxes come from VOC's XML files ({VOC_PAGE})")
        self.masks = {**stems(self.root / "SegmentationClassAug"), **stems(self.root / "SegmentationClass")}    # VOC's own win
        self.objects = stems(self.root / "SegmentationObject")
        self.strokes = stems(self.root / "scribbles", (".png", ".xml")) if "scribble" in shown else {}
        clicks = self.root / "points" / "whats_the_point.json"
        self.clicks = read_json(clicks) if "points" in shown and clicks.is_file() else None
        derived = [key for key, there in (("scribble", self.strokes), ("points", self.clicks)) if key in shown and not there]
        if self.strokes:
            require(self.names, self.strokes, self.root / "scribbles", "get all of ScribbleSup, or remove the folder to derive scribbles")
        for key in derived:
            self.notes[key] = "derived from instance masks, seeded by picture name"
        if derived or "mask" in shown:
            require(self.names, self.masks, self.root / "SegmentationClass[Aug]",
                    "make the SBD ones with  python data.py voc-aug  or use --train-list train")
        if "mask" in shown:
            check_values([self.masks[name] for name in self.names], self.classes)
        return shown

    def read(self, name, wanted):
        s = Sample(name=name, image=read_image(self.pictures[name]))
        s.boxes = read_voc_xml(self.root / "Annotations" / f"{name}.xml", self.classes, s.image.shape[:2])
        s.tags = np.isin(np.arange(1, len(self.classes) + 1), s.boxes[:, 0])
        if self.strokes and "scribble" in wanted:
            s.scribble = read_scribble(self.strokes[name], self.classes, s.image)
        if self.clicks is not None and "points" in wanted:
            s.points = voc_points(self.clicks.get(name, []), s.image.shape[:2], len(self.classes))
        if "mask" in wanted or any(key in wanted and not hasattr(s, key) for key in ("scribble", "points")):
            s.mask = same_size(self.masks[name], read_label(self.masks[name], self.classes), s.image)
            if name in self.objects:                                      # SBD pictures have none
                s.instances = same_size(self.objects[name], read_label(self.objects[name]), s.image)
        return derive(s, wanted, name)


def voc_root(root):
    """The VOC2012 folder itself, whichever of the three the user gave."""
    tried = [Path(root), Path(root) / "VOC2012", Path(root) / "VOCdevkit" / "VOC2012"]
    for folder in tried:
        if (folder / "JPEGImages").is_dir():
            return folder
    raise DataError(f"no VOC 2012 at {root} (looked for JPEGImages in {', '.join(map(str, tried))}); get it from {VOC_PAGE} "
                    "and give its folder as --root")


def voc_names(root, which):
    """Names of "val", "train", "train_aug" = (train ∪ SegmentationClassAug) − val, or of a list file."""
    lists = root / "ImageSets" / "Segmentation"
    if which in ("train", "val"):
        return read_list(lists / f"{which}.txt", root)
    if which != "train_aug":
        return read_list(which, root)
    extra = stems(root / "SegmentationClassAug")
    if not extra:
        raise DataError(f"train_aug needs {root / 'SegmentationClassAug'}, which is missing; make it with  python data.py voc-aug "
                        "--sbd path/to/SBD --root …  or take  --train-list train")
    return sorted((set(read_list(lists / "train.txt", root)) | set(extra)) - set(read_list(lists / "val.txt", root)))


def read_voc_xml(path, classes, size):
    """(M,5) float32 boxes of a VOC annotation; size = (H, W) of the picture. Parts of persons are passed over."""
    try:
        objects = ET.parse(path).getroot().findall("object")
        found = [(o.find("name").text.strip(), *(float(o.find("bndbox").find(key).text) for key in ("xmin", "ymin", "xmax", "ymax")))
                 for o in objects]
    except (OSError, ET.ParseError, AttributeError, ValueError) as error:
        raise DataError(f"annotation {path} can not be read as VOC XML ({error}); take it again from VOC's archive") from None
    boxes = [(name, x0 - 1, y0 - 1, x1, y1) for name, x0, y0, x1, y1 in found]
    return check_boxes(boxes, classes, size, path)


def check_boxes(boxes, classes, size, path):
    """[(class name, x0, y0, x1, y1)] -> (M,5) float32, or DataError for an unknown class or a box outside the picture."""
    height, width = size
    out = np.zeros((len(boxes), 5), np.float32)
    for row, (name, *box) in zip(out, boxes):
        row[:] = class_number(name, classes, path), *box
        x0, y0, x1, y1 = box
        if not (-1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1):        # old VOC files are off by one now and then
            raise DataError(f"{path} has a box of {name} at x {x0:g}..{x1:g}, y {y0:g}..{y1:g}, outside its picture of "
                            f"{width}x{height}; correct the box or use the picture at the size it was drawn on")
    out[:, 1:] = out[:, 1:].clip(0, (width, height) * 2)
    return out


def class_number(name, classes, path):
    """1..K of a class name."""
    if name not in classes:
        raise DataError(f"{path} names the class {name!r}, which is none of {', '.join(classes[:25])}; correct it, or list it in classes.txt")
    return classes.index(name) + 1


def read_scribble(path, classes, image):
    """(H,W) uint8 {0..K, 255} from an index PNG, or from ScribbleSup's XML: polygons of points with a tag."""
    if path.suffix.lower() == ".png":
        return same_size(path, read_label(path, classes), image)
    scribble = np.full(image.shape[:2], 255, np.uint8)
    width, everywhere = max(1, round(min(scribble.shape) / 100)), np.ones(scribble.shape, bool)
    try:
        strokes = [(p.find("tag").text.strip(), [(float(q.find("Y").text), float(q.find("X").text)) for q in p.findall("point")])
                   for p in ET.parse(path).getroot().iter("polygon")]
    except (OSError, ET.ParseError, AttributeError, ValueError) as error:
        raise DataError(f"scribbles {path} can not be read as ScribbleSup XML ({error}); take the file again") from None
    for tag, corners in strokes:
        k = 0 if tag == "background" else class_number(tag, classes, path)
        draw_stroke(scribble, k, corners * 2 if len(corners) == 1 else corners, width, everywhere)
    return scribble


def voc_points(clicks, size, classes):
    """(P,3) float32 from what's-the-point's list of {x, y, cls, rank}: the file has one click an object, rank counting the objects
    of a class in a picture, so every click is kept. Clicks outside the picture are dropped, those on its rim moved to the rim pixel."""
    height, width = size
    points = np.array([(c["cls"], c["x"], c["y"]) for c in clicks if 1 <= c["cls"] <= classes], np.float32).reshape(-1, 3)
    inside = ((points[:, 1:] >= 0) & (points[:, 1:] <= (width, height))).all(axis=1)
    points[:, 1:] = points[:, 1:].clip(0.5, (width - 0.5, height - 0.5))
    return points[inside]


def read_json(path):
    """What a JSON file holds."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can not be read as JSON ({error}); write it again") from None


def read_classes(path):
    """Class names, one a line, without background."""
    if not path.is_file():
        raise DataError(f"{path} is missing; write the class names into it, one a line, without background")
    classes = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not 1 <= len(classes) <= 254 or len(set(classes)) < len(classes):
        raise DataError(f"{path} has {len(classes)} lines; it takes 1 to 254 different class names, one a line, without background")
    return classes


# ── workpiece: a folder of your own ──────────────────────────────────────────────────────────────────────────────────

class Workpiece:
    """<root>/classes.txt (names without background, one a line; the first is class 1) and, for each split of train and val:

    images/*        any picture format                   masks/*.png       index 0..K, 255 = ignore; val, and where known train
    tags.json       {"name": ["bolt", …], …}             instances/*.png   0 = none, 1.. = objects, 255 = border (optional)
    boxes.json      {"name": [["bolt", x0, y0, x1, y1], …], …}     pixel edges, half open
    points.json     {"name": [["bolt", x, y], …], …}               scribbles/*.png   index 0..K, 255 = no label

    All but classes.txt, images and what the supervision needs is optional. Names are file names without suffix. Tags come from
    the first there is of tags.json, boxes.json, points.json, scribbles, masks; points and scribbles that are not there
    from the masks (seeded by name; notes says so).
    """

    def __init__(self, root, split, train_list):
        self.root = Path(root) / split
        if not (self.root / "images").is_dir():
            raise DataError(f"there is no folder {self.root / 'images'}; put the {split} pictures there, or give another --root "
                            "(python data.py export --layout workpiece shows the layout)")
        self.classes, self.notes, self.split = read_classes(Path(root) / "classes.txt"), {}, split
        self.pictures = stems(self.root / "images", (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"))
        listed = split == "train" and train_list not in ("train", "train_aug")
        self.names = read_list(train_list, root) if listed else list(self.pictures)
        require(self.names, self.pictures, self.root / "images", f"mend {train_list}")
        if not self.names:
            raise DataError(f"{self.root / 'images'} is empty; put the {split} pictures there")

    def prepare(self, shown, needed):
        """Looks that the files are there -> the fields that samples will have; what is not needed may be absent."""
        self.masks, self.objects, self.strokes = (stems(self.root / key) for key in ("masks", "instances", "scribbles"))
        self.tags, self.boxes, self.points = (read_json(path) if (path := self.root / f"{key}.json").is_file() else {}
                                              for key in ("tags", "boxes", "points"))
        shipped = {"tags": self.tags, "boxes": self.boxes, "points": self.points, "scribble": self.strokes, "mask": self.masks}
        self.tags_from = next((key for key, there in shipped.items() if there), None)
        if self.tags_from is None:
            raise DataError(f"{self.root} has no tags.json, boxes.json, points.json, scribbles or masks; write at least tags.json: "
                            '{"picture": ["class", ...], ...}')
        if self.tags_from != "tags":
            self.notes["tags"] = f"from {self.tags_from}: there is no tags.json"
        needed = needed | {self.tags_from}
        for key in needed & set(shipped):
            kind = key if shipped[key] else "mask"                        # weak labels that are not there are derived from masks
            if kind != key:
                self.notes[key] = "derived from masks, seeded by picture name"
            require(self.names, shipped[kind], f"{FILES[kind]} of {self.root}",
                    f"{self.split} pictures need {FILES[key]} here (form: class Workpiece in data.py)")
        if "mask" in shown and self.masks:
            check_values([self.masks[name] for name in self.names if name in self.masks], self.classes)
        return {key for key in shown if shipped.get(key) or self.masks and (key != "instances" or self.objects)}

    def read(self, name, wanted):
        s = Sample(name=name, image=read_image(self.pictures[name]))
        size, wanted = s.image.shape[:2], {self.tags_from, *wanted}
        if name in self.boxes:
            s.boxes = check_boxes(self.boxes[name], self.classes, size, self.root / "boxes.json")
        if name in self.points:
            s.points = check_points(self.points[name], self.classes, size, self.root / "points.json")
        if name in self.strokes and "scribble" in wanted:
            s.scribble = read_scribble(self.strokes[name], self.classes, s.image)
        if name in self.masks and any(key in wanted and not hasattr(s, key) for key in REVEALS["full"]):
            s.mask = same_size(self.masks[name], read_label(self.masks[name], self.classes), s.image)
            if name in self.objects:
                s.instances = same_size(self.objects[name], read_label(self.objects[name]), s.image)
            s = derive(s, wanted, name)
        if self.tags_from == "tags":
            numbers = [class_number(tag, self.classes, self.root / "tags.json") for tag in self.tags[name]]
            return changed(s, tags=np.isin(np.arange(1, len(self.classes) + 1), numbers))
        return changed(s, tags=tags_of(Sample(**{self.tags_from: getattr(s, self.tags_from)}), len(self.classes)))


FILES = {"tags": "tags.json", "boxes": "boxes.json", "points": "points.json", "scribble": "scribbles/*.png", "mask": "masks/*.png"}
SOURCES = {"shapes": Shapes, "voc": VOC, "workpiece": Workpiece}


def check_points(points, classes, size, path):
    """[(class name, x, y)] -> (P,3) float32, or DataError for an unknown class or a point outside the picture."""
    height, width = size
    for name, x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise DataError(f"{path} has a point of {name} at x {x:g}, y {y:g}, outside its picture of {width}x{height}; correct it")
    return np.array([(class_number(name, classes, path), min(max(x, 0.5), width - 0.5), min(max(y, 0.5), height - 0.5))
                     for name, x, y in points], np.float32).reshape(-1, 3)


# ── Commands: check, export, voc-aug ─────────────────────────────────────────────────────────────────────────────────

class Lines:
    """The table that check prints; .wrong counts what is missing or wrong."""

    def __init__(self):
        self.wrong = 0

    def add(self, what, value, expected=None, remedy="", optional=False):
        """One line; ok when value is expected (or, with none expected, when there is any)."""
        ok = value == expected if expected is not None else bool(value)
        state = "ok" if ok else "missing" if not value else f"expected {expected}"
        self.wrong += not ok and not value and not optional
        print(f"{what:<22}{value:>7}   {state}{'   ' + remedy if remedy and not ok else ''}")

    def say(self, what, text, wrong=False):
        self.wrong += wrong
        print(f"{what:<22}{text}")


def check(data: Literal["shapes", "voc", "workpiece"], root: str = "") -> None:
    """List what is there and what is missing, with expected counts, and check values."""
    lines = Lines()
    where = Path(root or f"data/{data}")
    try:
        {"shapes": check_shapes, "voc": check_voc, "workpiece": check_workpiece}[data](where, lines)
        for split in ("train", "val"):
            check_samples(data, root, split, lines)
    except DataError as error:
        lines.say("stopped", f"   {error}", wrong=True)
    sys.exit(1 if lines.wrong else 0)


def check_samples(data, root, split, lines):
    """Reads up to 50 samples of a split as a training on tags, or an evaluation, would."""
    args = types.SimpleNamespace(data=data, root=root, train_list="train", supervision="image")
    dataset = load(args, split)
    for i in range(min(50, len(dataset))):
        dataset[i]
    lines.say(f"{split} samples read", f"{i + 1:>7}   ok")
    for topic, note in dataset.notes.items():
        lines.say("", f"{'':>7}   {topic}: {note}")


def check_shapes(root, lines):
    for split, count in SCENES.items():
        lines.add(split, len(Shapes(root, split, "train").names), count)


def check_voc(root, lines):
    root = voc_root(root)
    official = not (root / "classes.txt").is_file()
    make = f"make it:  python data.py voc-aug --sbd path/to/SBD --root {root}"
    for folder, count, optional, remedy in (("JPEGImages", 17125, False, VOC_PAGE), ("Annotations", 17125, False, VOC_PAGE),
                                            ("SegmentationClass", 2913, False, VOC_PAGE), ("SegmentationObject", 2913, True, ""),
                                            ("SegmentationClassAug", 12031, True, make), ("scribbles", None, True, "optional"),
                                            ("points", None, True, "optional")):
        there = stems(root / folder, (".jpg", ".jpeg", ".png", ".xml", ".json"))
        lines.add(folder, len(there), count if official else None, remedy, optional)
    for which, count in (("train", 1464), ("train_aug", 10582), ("val", 1449)):
        if which == "train_aug" and not stems(root / "SegmentationClassAug"):
            lines.say(which, f"{'-':>7}   needs SegmentationClassAug (expected {count})")
        else:
            lines.add(which, len(voc_names(root, which)), count if official else None)
    classes = VOC(root, "val", "val").classes
    check_masks({**stems(root / "SegmentationClassAug"), **stems(root / "SegmentationClass")}, classes, lines)


def check_workpiece(root, lines):
    classes = read_classes(root / "classes.txt")
    lines.say("classes.txt", f"{len(classes):>7}   {', '.join(classes[:SHOWN])}")
    for split in ("train", "val"):
        for part, optional in (("images", False), ("masks", split == "train"), ("instances", True), ("scribbles", True)):
            lines.add(f"{split}/{part}", len(stems(root / split / part, (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"))),
                      remedy="optional" if optional else "", optional=optional)
        for part in ("tags", "boxes", "points"):
            path = root / split / f"{part}.json"
            lines.add(f"{split}/{part}.json", len(read_json(path)) if path.is_file() else 0, remedy="optional", optional=True)
        check_masks(stems(root / split / "masks"), classes, lines)


def check_masks(masks, classes, lines):
    """The line about the values in the first 50 masks."""
    files = list(masks.values())[:50]
    if files:
        try:
            values = check_values(files, classes)
            lines.say(f"values in {len(files)} masks", f"{span(values)}   ok")
        except DataError as error:
            values = sorted(set().union(*(np.unique(read_label(path)).tolist() for path in files)))
            lines.say(f"values in {len(files)} masks", f"{span(values)}   wrong: {error}", wrong=True)


def span(values):
    """[0, 1, 2, 3, 255] -> "0..3, 255"."""
    runs = np.split(np.array(values), np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def export(data: Literal["shapes", "voc", "workpiece"], layout: Literal["voc", "workpiece"], to: str, n: int = 0,
           root: str = "") -> None:
    """Write a data set in another's on-disk layout, the first n samples of each split (0 = all)."""
    args = types.SimpleNamespace(data=data, root=root, train_list="train", supervision="full")
    for split in ("train", "val"):
        dataset = load(args, split)
        count = min(n or len(dataset), len(dataset))
        LAYOUTS[layout](Path(to), split, dataset.classes, [dataset[i] for i in range(count)])
        print(f"{to}: {count} {split} samples in the {layout} layout")


def named(rows, classes):
    """Boxes or points with class names in place of numbers, as lists for JSON."""
    return [[classes[int(row[0]) - 1], *map(float, row[1:])] for row in rows]


def export_workpiece(to, split, classes, samples):
    """See class Workpiece."""
    from common import save_label
    folder = to / split
    for part in ("images", "masks", "instances", "scribbles"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (to / "classes.txt").write_text("\n".join(classes) + "\n")
    for s in samples:
        Image.fromarray(s.image).save(folder / "images" / f"{s.name}.png")
        for part, key in (("masks", "mask"), ("instances", "instances"), ("scribbles", "scribble")):
            if hasattr(s, key):
                save_label(folder / part / f"{s.name}.png", getattr(s, key))
    tables = {"tags": {s.name: [classes[k] for k in np.flatnonzero(s.tags)] for s in samples},
              "boxes": {s.name: named(s.boxes, classes) for s in samples},
              "points": {s.name: named(s.points, classes) for s in samples}}
    for key, table in tables.items():
        (folder / f"{key}.json").write_text(json.dumps(table, indent=1))


def export_voc(to, split, classes, samples):
    """See class VOC. Train masks stand in SegmentationClassAug as well, so that train_aug is the train list."""
    from common import save_label
    root, lists = to / "VOC2012", to / "VOC2012" / "ImageSets" / "Segmentation"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "SegmentationObject", "scribbles", "points"):
        (root / part).mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    (lists / f"{split}.txt").write_text("\n".join(s.name for s in samples) + "\n")
    clicks_file = root / "points" / "whats_the_point.json"
    clicks = read_json(clicks_file) if clicks_file.is_file() else {}
    for s in samples:
        Image.fromarray(s.image).save(root / "JPEGImages" / f"{s.name}.jpg", quality=95)
        for part, key in (("SegmentationClass", "mask"), ("SegmentationClassAug", "mask"), ("SegmentationObject", "instances"),
                          ("scribbles", "scribble")):
            if hasattr(s, key):
                save_label(root / part / f"{s.name}.png", getattr(s, key))
        write_voc_xml(root / "Annotations" / f"{s.name}.xml", s, classes)
        clicks[s.name] = [{"x": float(x), "y": float(y), "cls": int(k), "rank": int((s.points[:i + 1, 0] == k).sum())}
                          for i, (k, x, y) in enumerate(s.points)]
    clicks_file.write_text(json.dumps(clicks, indent=1))


def write_voc_xml(path, s, classes):
    """Size and objects of a sample; boxes 1-based inclusive, as VOC has them."""
    top = ET.Element("annotation")
    ET.SubElement(top, "filename").text = f"{s.name}.jpg"
    size = ET.SubElement(top, "size")
    for key, value in zip(("width", "height", "depth"), (s.image.shape[1], s.image.shape[0], 3)):
        ET.SubElement(size, key).text = str(value)
    for name, x0, y0, x1, y1 in named(s.boxes, classes):
        item = ET.SubElement(top, "object")
        for key, value in (("name", name), ("difficult", "0")):
            ET.SubElement(item, key).text = value
        box = ET.SubElement(item, "bndbox")
        for key, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            ET.SubElement(box, key).text = f"{value:g}"
    ET.indent(top)
    ET.ElementTree(top).write(path)


def voc_aug(sbd: str, root: str = "data/voc") -> None:
    """Make SegmentationClassAug from SBD's cls/*.mat; where VOC has a mask of its own (train, val) that one is taken."""
    from common import save_label
    from scipy.io import loadmat
    from tqdm import tqdm
    root = voc_root(root)
    mats = next((found for sub in ("", "cls", "dataset/cls", "benchmark_RELEASE/dataset/cls")
                 if (found := stems(Path(sbd) / sub, (".mat",)))), None)
    if not mats:
        raise DataError(f"no cls/*.mat under {sbd}; give the unpacked benchmark_RELEASE folder of SBD as --sbd")
    own = stems(root / "SegmentationClass")
    for name in tqdm(sorted({*mats, *own}), desc="SegmentationClassAug"):
        if name in own:
            label = read_label(own[name], len(VOC_CLASSES))
        else:
            try:
                label = loadmat(mats[name], squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation.astype(np.uint8)
            except Exception as error:                                    # scipy raises many kinds for a damaged file
                raise DataError(f"{mats[name]} can not be read as an SBD label ({error}); unpack SBD again") from None
        save_label(root / "SegmentationClassAug" / f"{name}.png", label)
    print(f"{root / 'SegmentationClassAug'}: {len({*mats, *own})} masks; train_aug has {len(voc_names(root, 'train_aug'))} (expected 10582)")


LAYOUTS = {"voc": export_voc, "workpiece": export_workpiece}


def main():
    import tyro
    try:
        tyro.extras.subcommand_cli_from_dict({"check": check, "export": export, "voc-aug": voc_aug}, description=__doc__)
    except DataError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
