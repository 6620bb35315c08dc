"""One Sample type for all data sets, transforms that keep its fields aligned, and the data sets themselves.

    dataset = load(args, "train")              # reads args.data, args.root, args.train_list, args.supervision
    sample = dataset[0]                        # name, image, tags, and what the supervision reveals

Data sets    shapes, shapes-aux (other classes), drawn on the fly, no files · voc (PASCAL VOC 2012, SBD,
             ScribbleSup, what's-the-point) · coco · context (PASCAL-Context) · gta5 · cityscapes · solids
             (machine parts, rendered and "photographed", drawn on the fly) · workpiece (any folder of your
             own): each class says its layout; select() and join() make new ones of them
Coordinates  x to the right, y down, in pixel edges: pixel (row i, column j) is j <= x < j+1, i <= y < i+1.
             A box [class, x0, y0, x1, y1] is half open: its pixels are mask[y0:y1, x0:x1]. VOC's XML,
             inclusive and counted from 1, becomes (xmin-1, ymin-1, xmax, ymax).
Labels       0 = background, 1..K = dataset.classes, 255 = no label; boxes and points count from 1 too
Commands     python data.py check --data voc --root data/voc                        # what is there, what not
             python data.py export --data shapes --layout workpiece --to my/folder  # shapes as files
             python data.py voc-aug --sbd path/to/SBD --root data/voc               # SegmentationClassAug
             python data.py score --pred my/masks --data voc --root data/voc        # mIoU of any label maps
"""

import contextlib
import copy
import json
import shutil
import sys
import types
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)            # ImageNet's, of RGB / 255
LABEL_MAPS = ("mask", "instances", "scribble", "seed", "pseudo")    # moved by nearest neighbour
REVEALS = {"image": (), "point": ("points",), "scribble": ("scribble",), "box": ("boxes",),
           "full": ("points", "scribble", "boxes", "mask", "instances")}     # beside name, image and tags
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
VOC_PAGE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
VOC_CLICKS = "points/whats_the_point.json"
COCO_PAGE = "https://cocodataset.org"
COCO_SPELLING = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
                 "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
COCO_PICTURES = {"train2014": 82783, "val2014": 40504, "train2017": 118287, "val2017": 5000}
CONTEXT_CLASSES = (
    "aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling "
    "chair cloth computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light "
    "motorbike mountain mouse person plate platform pottedplant road rock sheep shelves sidewalk sign sky "
    "snow sofa table track train tree truck tvmonitor wall water window wood").split()
CONTEXT_PAGE = "https://cs.stanford.edu/~roozbeh/pascal-context"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """A file or folder is missing or wrong; the message is one sentence that names it and the remedy."""


class Sample(types.SimpleNamespace):
    """One picture with what is known about it. A field that is not revealed is absent, never None.

    name str · image (H,W,3) uint8 RGB · tags (K,) bool · boxes (M,5) float32 [class, x0, y0, x1, y1] ·
    points (P,3) float32 [class, x, y] · scribble, mask (H,W) uint8 {0..K, 255} · instances (H,W) uint8,
    0 = none, 1.. = objects, 255 = border. Stages attach further label maps: seed, pseudo (H,W) uint8.
    """

    def pin_memory(self):
        """For torch's loader: the tensors, also those in lists, in memory that a GPU reads by itself."""
        def pinned(value):
            if torch.is_tensor(value): return value.pin_memory()
            return [pinned(item) for item in value] if isinstance(value, list) else value
        return Sample(**{key: pinned(value) for key, value in vars(self).items()})


# ── Transforms: Sample -> Sample; the given one stays as it is, all fields stay aligned ───────────


def changed(s, **fields):
    """A copy of the sample with some fields replaced or added."""
    return Sample(**{**vars(s), **fields})


def label_maps(s):
    """{field: (H,W) uint8} of the label maps that the sample has."""
    return {key: getattr(s, key) for key in LABEL_MAPS if hasattr(s, key)}


def resize(s, size):
    """To size = (h, w): image bilinear (antialiased when shrinking), label maps by nearest neighbour."""
    (height, width), (h, w) = s.image.shape[:2], size
    fields = {"image": np.array(Image.fromarray(s.image).resize((w, h), Image.BILINEAR))}
    for key, label in label_maps(s).items():
        fields[key] = np.array(Image.fromarray(label).resize((w, h), Image.NEAREST))
    scale = np.array([1, w / width, h / height, w / width, h / height], np.float32)
    if hasattr(s, "boxes"): fields["boxes"] = s.boxes * scale
    if hasattr(s, "points"): fields["points"] = s.points * scale[:3]
    return changed(s, **fields)


def rescale(s, factor):
    """Both sides times factor."""
    return resize(s, [max(1, round(side * factor)) for side in s.image.shape[:2]])


def resize_long(s, pixels):
    """To that many pixels on the longer side."""
    return rescale(s, pixels / max(s.image.shape[:2]))


def flip(s):
    """Left and right exchanged."""
    maps, width = {"image": s.image, **label_maps(s)}, s.image.shape[1]
    fields = {key: np.ascontiguousarray(array[:, ::-1]) for key, array in maps.items()}
    if hasattr(s, "boxes"):
        k, x0, y0, x1, y1 = s.boxes.T
        fields["boxes"] = np.stack([k, width - x1, y0, width - x0, y1], axis=1)
    if hasattr(s, "points"):
        k, x, y = s.points.T
        fields["points"] = np.stack([k, width - x, y], axis=1)
    return changed(s, **fields)


def crop(s, size, rng, tags=False):
    """A random size x size window; a side shorter than that is padded, at a random position.

    The image is padded with the mean colour, label maps with 255; boxes are clipped; boxes of which less
    than a pixel is left and points outside are dropped. tags=True, for papers that do so, recomputes the
    tags from what is left of the first revealed of mask, boxes, points, scribble; with image tags alone they
    stay: nobody can know.
    """
    y, x = (int(rng.integers(min(0, side - size), max(0, side - size) + 1)) for side in s.image.shape[:2])
    fields = {key: window(label, y, x, size, 255) for key, label in label_maps(s).items()}
    fields["image"] = window(s.image, y, x, size, np.round(np.array(MEAN) * 255))
    if hasattr(s, "boxes"):
        corners = (s.boxes[:, 1:] - np.array([x, y, x, y], np.float32)).clip(0, size)
        left = (corners[:, 2:] - corners[:, :2] >= 1).all(axis=1)
        fields["boxes"] = np.concatenate([s.boxes[:, :1], corners], axis=1)[left]
    if hasattr(s, "points"):
        points = s.points - np.array([0, x, y], np.float32)
        fields["points"] = points[((points[:, 1:] >= 0) & (points[:, 1:] < size)).all(axis=1)]
    s = changed(s, **fields)
    return changed(s, tags=tags_of(s, len(s.tags))) if tags else s


def window(array, y, x, size, fill):
    """The size x size window of array (H,W,...) whose corner is (y, x), filled where it reaches outside."""
    out = np.empty((size, size) + array.shape[2:], array.dtype)
    out[:] = fill
    inside = array[max(y, 0):y + size, max(x, 0):x + size]
    out[max(-y, 0):max(-y, 0) + inside.shape[0], max(-x, 0):max(-x, 0) + inside.shape[1]] = inside
    return out


def tags_of(s, classes):
    """(K,) bool: classes in the first revealed of mask, boxes, points, scribble; else the sample's tags."""
    for key in ("mask", "boxes", "points", "scribble"):
        if hasattr(s, key):
            return present(getattr(s, key) if key in LABEL_MAPS else getattr(s, key)[:, 0], classes)
    return s.tags


def present(found, classes):
    """Class numbers, any shape -> (K,) bool."""
    return np.isin(np.arange(1, classes + 1), found)


def color_jitter(s, rng, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0):
    """As torchvision's: factors from [max(0, 1-v), 1+v], hue shift from [-hue, hue], in random order."""
    from torchvision.transforms import functional as F
    amounts = {F.adjust_brightness: brightness, F.adjust_contrast: contrast, F.adjust_saturation: saturation}
    steps = [(adjust, rng.uniform(max(0, 1 - v), 1 + v)) for adjust, v in amounts.items() if v]
    if hue: steps.append((F.adjust_hue, rng.uniform(-hue, hue)))
    image = Image.fromarray(s.image)
    for k in rng.permutation(len(steps)):
        image = steps[k][0](image, float(steps[k][1]))
    return changed(s, image=np.array(image))


def normalise(s):
    """numpy -> torch: image (3,H,W) float32 by ImageNet's mean and std, label maps int64, others float32."""
    image = (torch.tensor(s.image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    fields = {key: torch.tensor(label).long() for key, label in label_maps(s).items()}
    for key in ("tags", "boxes", "points"):
        if hasattr(s, key): fields[key] = torch.tensor(getattr(s, key)).float()
    return changed(s, image=image.permute(2, 0, 1).contiguous(), **fields)


def resize_batch(x, size):
    """Normalised pictures (B,3,H,W) -> (B,3,*size), antialiased when shrinking, as `resize`: the small scales
    of a test look as they did in training."""
    if x.shape[-2:] == tuple(size): return x
    return torch.nn.functional.interpolate(x, tuple(size), mode="bilinear", antialias=True)


def collate(samples):
    """B normalised samples -> one: image (B,3,H,W), tags (B,K), label maps (B,H,W); the others are lists."""
    batch = {key: [getattr(s, key) for s in samples] for key in vars(samples[0])
             if all(hasattr(s, key) for s in samples)}          # SBD's pictures have no instances, VOC's have
    stacked = ("image", "tags") + LABEL_MAPS
    return Sample(**{key: torch.stack(values) if key in stacked else values for key, values in batch.items()})


# ── Datasets ──────────────────────────────────────────────────────────────────────────────────────


def load(args, split, masks=False, fields=None):
    """Dataset of split "train" or "val". args: data, root (default data/<data>), train_list, supervision.

    A training sample shows what args.supervision reveals and nothing else. Val samples, and training samples
    under masks=True (the evaluation call, never for training), show everything there is: dataset.fields.
    Split "rendered" (solids, workpiece, gta5) holds synthetic pictures, whose masks are no secret.
    fields: of what may be seen, only these; the others are not derived either, which takes scribbles longer
    than a photograph takes to be read. Raises DataError.
    """
    if args.data not in SOURCES:
        raise DataError(f"no data set is called {args.data!r}; choose one of {', '.join(SOURCES)}")
    revealed, needed = REVEALS[args.supervision], ()
    if split in ("val", "rendered") or args.supervision == "full":
        needed = ("mask",) if (split, args.data) != ("val", "workpiece") else ()   # then val is not scored
    elif not masks:
        needed = revealed
    if split == "rendered" and args.data not in RENDERED:
        raise DataError(f"{args.data} has no rendered pictures; {', '.join(RENDERED)} have")
    shown = REVEALS["full"] if masks or split in ("val", "rendered") else revealed
    wish = Wish(*(tuple(key for key in keys if fields is None or key in fields)
                  for keys in (shown, needed, revealed)))
    root = Path(getattr(args, "root", "") or f"data/{args.data}")
    return Dataset(SOURCES[args.data](root, split, args.train_list, wish))


class Wish(NamedTuple):
    """What load asks of a data set: fields beside name, image and tags."""
    shown: tuple                # what samples have if files hold it
    needed: tuple               # of these, what every sample must have
    derived: tuple              # of these, what comes from the masks where no file holds it


class Dataset(torch.utils.data.Dataset):
    """The samples of one split with the fields that may be seen, no others.

    .names list[str] · .classes list[str] (K, without background) · .fields: what samples have beside name,
    image and tags · .notes {topic: sentence}, e.g. which labels were derived. source.read(name) gives the
    samples; labels {field: folder} adds label maps that a stage has written.
    """

    def __init__(self, source):
        self.source, self.labels, self.fields = source, {}, tuple(source.fields)
        self.names, self.classes, self.notes = source.names, source.classes, dict(source.notes)
        self.order = {name: i for i, name in enumerate(self.names)}

    def __len__(self):
        return len(self.names)

    def index(self, name):
        return self.order[name]

    def __getitem__(self, i):
        sample, seen = self.source.read(self.names[i]), ("name", "image", "tags") + self.fields
        kept = {key: value for key, value in vars(sample).items() if key in seen}
        for key, folder in self.labels.items():
            kept[key] = read_label(Path(folder) / f"{sample.name}.png", self.classes, sample.image)
        return Sample(**kept)


def with_labels(dataset, **folders):
    """The same data set with further label maps: with_labels(d, pseudo=DIR) reads DIR/<name>.png."""
    other = copy.copy(dataset)
    other.labels = {**dataset.labels, **folders}
    return other


def subset(dataset, names):
    """The same data set with only these of its names."""
    other = copy.copy(dataset)
    other.names, other.order = list(names), {name: i for i, name in enumerate(names)}
    return other


def select(dataset, classes=None, names=None):
    """The same data set with some of its classes, in the given order, the others being background.

    Pictures that show none of them are left out. classes: names, None = all. names: only these pictures.
    """
    return Dataset(Selection(dataset, classes or dataset.classes, dataset.names if names is None else names))


class Selection:
    """The source behind select()."""

    def __init__(self, dataset, classes, names):
        self.dataset, self.classes, self.fields = dataset, list(classes), list(dataset.fields)
        self.notes, self.names = dict(dataset.notes), list(names)
        if "instances" in dataset.fields and "mask" not in dataset.fields:
            self.dataset = copy.copy(dataset)                       # the mask tells their classes
            self.dataset.fields += ("mask",)
        self.old = [dataset.classes.index(name) for name in classes]
        self.number = np.zeros(256, np.uint8)                       # old label -> new label
        self.number[255] = 255
        self.number[np.array(self.old) + 1] = range(1, len(classes) + 1)
        if len(classes) < len(dataset.classes):
            self.names = [name for name in self.names if self.tags_alone(name).any()]
            self.notes["classes"] = (f"{len(classes)} of {len(dataset.classes)} classes, the others are "
                                     "background; pictures that show none of them are left out")

    def tags_alone(self, name):
        return tags_in(self.dataset, name)[self.old]

    def read(self, name):
        s = self.dataset[self.dataset.index(name)]
        fields = {"tags": s.tags[self.old]}
        for key in {"mask", "scribble"} & {*vars(s)}: fields[key] = self.number[getattr(s, key)]
        for key in {"boxes", "points"} & {*self.fields}: fields[key] = renumber(getattr(s, key), self.number)
        if "instances" in self.fields and hasattr(s, "instances"):
            fields["instances"] = np.where(fields["mask"] > 0, s.instances, 0).astype(np.uint8)
        return changed(s, **fields)


def join(datasets):
    """Data sets as one: classes of one name (VOC's and COCO's spellings count as one) are one class.

    A picture's name gets its data set's number in front: "0-2007_000032".
    """
    return Dataset(Union(datasets))


class Union:
    """The source behind join()."""

    def __init__(self, datasets):
        self.datasets, self.notes = datasets, {}
        spelled = {}
        for name in (name for d in datasets for name in d.classes): spelled.setdefault(coco_name(name), name)
        self.classes, places = list(spelled.values()), {name: k for k, name in enumerate(spelled, 1)}
        self.numbers = [np.array([0, *(places[coco_name(name)] for name in d.classes),
                                  *[255] * (255 - len(d.classes))], np.uint8) for d in datasets]
        self.fields = [key for key in datasets[0].fields if all(key in d.fields for d in datasets)]
        self.names = [f"{i}-{name}" for i, d in enumerate(datasets) for name in d.names]
        for i, d in enumerate(datasets):
            self.notes |= {f"{topic} of set {i}": note for topic, note in d.notes.items()}

    def tags_alone(self, name):
        number, name = name.split("-", 1)
        tags = tags_in(self.datasets[int(number)], name)
        return present(self.numbers[int(number)][1:len(tags) + 1][tags], len(self.classes))

    def read(self, name):
        i, old = name.split("-", 1)
        dataset, number = self.datasets[int(i)], self.numbers[int(i)]
        s = dataset[dataset.index(old)]
        fields = {key: number[getattr(s, key)] for key in {"mask", "scribble"} & {*self.fields}}
        for key in {"boxes", "points"} & {*self.fields}: fields[key] = renumber(getattr(s, key), number)
        return changed(s, name=name, tags=self.tags_alone(name), **fields)


def tags_in(dataset, name):
    """(K,) bool; the picture is opened only where its tags do not stand elsewhere."""
    read = getattr(dataset.source, "tags_alone", None)
    return read(name) if read else dataset[dataset.index(name)].tags


def renumber(rows, number):
    """Boxes or points whose class number becomes number[class]; those that become 0 are dropped."""
    classes = number[rows[:, 0].astype(int)].astype(np.float32)
    return np.concatenate([classes[:, None], rows[:, 1:]], axis=1)[classes > 0]


def coco_name(name):
    """COCO's spelling of a class of VOC."""
    return COCO_SPELLING.get(name, name)


def chosen_classes(text, classes, flag):
    """"" = all, or a list of numbers, ranges and names, "1-10,cat"; not-voc = all but VOC's 20 -> names."""
    named, voc = {}, {coco_name(name) for name in VOC_CLASSES}
    for word in filter(None, text.split(",")):
        first, _, last = word.partition("-")
        if word == "not-voc":
            found = [name for name in classes if coco_name(name) not in voc]
        elif first.isdigit() and (last or first).isdigit():
            found = classes[max(int(first), 1) - 1:int(last or first)]
        else:
            found = [name for name in classes if coco_name(name) == coco_name(word)]
        if not found:
            raise DataError(f"{flag} {text}: {word!r} is none of the classes 1 to {len(classes)} "
                            f"({few(classes)})")
        named |= dict.fromkeys(found)
    return [name for name in classes if name in named] if named else list(classes)


class Draws(torch.utils.data.Dataset):
    """Item n is the n-th draw of a training that never ends: augment(sample, rng), fixed by (seed, n) alone.

    Epoch n // N goes through the data in a permutation seeded by (seed, epoch). So order and crops are the
    same whatever the workers, and a run that stopped continues by starting at n = step * batch.
    """

    def __init__(self, dataset, augment, seed):
        self.dataset, self.augment, self.seed, self.permutation = dataset, augment, seed, (None, None)

    def __len__(self):
        return 2 ** 40                                              # practically endless

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if self.permutation[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])      # the 1: no draw has this seed
            self.permutation = epoch, rng.permutation(len(self.dataset))
        sample = self.dataset[int(self.permutation[1][place])]
        return self.augment(sample, np.random.default_rng([self.seed, n]))


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(path, what, remedy):
    """Any error while a file is read becomes one sentence with its name and the remedy."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist; check the folder and the list of names") from None
    except Exception as error:                                      # libraries raise a dozen kinds of error
        fault = " ".join(str(error).split())
        raise DataError(f"{what} {path} can not be read ({fault}); {remedy}") from None


def read_image(path):
    """(H,W,3) uint8 RGB, turned as the file's EXIF orientation says."""
    with reading(path, "picture", "take the file again"), Image.open(path) as image:
        if image.mode[0] in "IF":                                   # convert() would cut them off at 255
            raise DataError(f"picture {path} has more than 8 bits a pixel ({image.mode}); save it with 8")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path, classes=None, image=None):
    """(H,W) uint8 of a palette or grey PNG; with classes (list or K) only 0..K, 255, with image its size."""
    with reading(path, "label map", "write it again as PNG"), Image.open(path) as file:
        mode, label = file.mode, np.array(file)
    if label.ndim != 2:
        raise DataError(f"label map {path} is a {mode} picture; save it as palette or grey PNG of classes")
    if image is not None and label.shape != image.shape[:2]:
        (h, w), (height, width) = label.shape, image.shape[:2]
        raise DataError(f"label map {path} is {w}x{h} pixels, its picture {width}x{height}; make them alike")
    top = 255 if classes is None else classes if isinstance(classes, int) else len(classes)
    bad = np.unique(label[(label > top) & (label != 255)])
    if bad.size:
        soft = np.isin(label, (0, 255)).mean() > 0.5 and 255 in label
        remedy = ("looks like a black/white mask with soft edges: save the object as 1, hard-edged" if soft
                  else "save class numbers, not colours, and list every class in classes.txt")
        if mode[0] == "I": remedy = f"the file has 16 bits a pixel or more ({mode}): save it with 8"
        raise DataError(f"label map {path} holds {few(bad)}, but only 0..{top} and 255 are allowed; {remedy}")
    return label.astype(np.uint8)


def read_values(files, classes):
    """Sorted values of the first 50 label maps; DataError when 255 is the only one beside 0."""
    values = sorted(set().union(*(np.unique(read_label(path, classes)).tolist() for path in files[:50])))
    if 255 in values and not any(0 < value < 255 for value in values):
        raise DataError(f"label map {files[0]} and those beside it hold only {few(values)}: 255 means "
                        "\"ignore\" here; looks like a black/white mask: save the object as 1, not as 255")
    return values


def read_json(path):
    """The table {name: ...} of a JSON file; {} when there is no such file."""
    with reading(path, "table", "write it as JSON: {\"name\": [...], ...}"):
        return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.is_file() else {}


def read_classes(path):
    """Class names, one a line, without background."""
    with reading(path, "list of classes", "write one class name a line, without background"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()           # Windows puts a mark in front
        classes = [line.strip() for line in lines if line.strip()]
        if not 1 <= len(classes) <= 254 or len(set(classes)) < len(classes):
            raise ValueError(f"{len(classes)} names, {len(set(classes))} different; there may be 1 to 254")
    return classes


def read_list(path, known=()):
    """Names from a list file, one a line, with or without folders and suffix.

    A line may be one of the known names, blanks and all; else what follows its first word is ignored.
    """
    if not Path(path).is_file():
        raise DataError(f"the list {path} does not exist; give train_aug, train or a file of names")
    with reading(path, "list", "write a text file with one name a line"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    names = []
    for line in filter(None, map(str.strip, lines)):
        whole, first = (path.stem if path.suffix.lower() in PICTURES else path.name
                        for path in (Path(line), Path(line.split()[0])))
        street = first.removesuffix("_leftImg8bit")                 # its pictures are known without it
        names.append(next((name for name in (whole, first, street) if name in known), first))
    if not names: raise DataError(f"the list {path} is empty; write one name a line")
    return list(dict.fromkeys(names))


def stems(folder, suffixes=(".png",)):
    """{name: path} of the files with these suffixes, sorted, no dot files; {} when there is no such folder.

    Two files of one name but for the suffix are a DataError: what is written for one would replace the other.
    """
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() not in suffixes or path.name.startswith("."): continue
        if found.setdefault(path.stem, path) != path:
            raise DataError(f"{found[path.stem]} and {path.name} have one name but for the suffix; keep one "
                            "of them, or rename it")
    return found


def few(items):
    """The first dozen, for a message."""
    return ", ".join(map(str, items[:12])) + ", …" * (len(items) > 12)


def require(names, there, where, remedy):
    """DataError with the first names that are not there."""
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(f"{where} lacks {len(missing)} of {len(names)} pictures ({few(missing)}); {remedy}")


def class_number(name, classes, path):
    """1..K."""
    if name in classes: return classes.index(name) + 1
    raise DataError(f"{path} names the class {name!r}, none of {', '.join(classes)}; correct it, or add it "
                    "to classes.txt")


def locate(rows, columns, classes, size, path):
    """Named points or boxes of a picture of size (H, W) -> numbered, all inside.

    [(class name, x, y)] -> (P,3) float32, those on the rim moved into the rim's pixel;
    [(class name, x0, y0, x1, y1)] -> (M,5) float32
    """
    height, width = size
    with reading(path, "boxes or points of", "write [class, x0, y0, x1, y1] or [class, x, y]"):
        out = np.array([[class_number(name, classes, path), *at] for name, *at in rows], np.float32)
        out = out.reshape(len(rows), columns)
    x, y, x1, y1 = out[:, [1, 2, -2, -1]].T
    off = (x < -1) | (y < -1) | (x1 > width + 1) | (y1 > height + 1)    # old VOC files may be off by one
    off |= ~np.isfinite(out).all(axis=1)
    rim = 0.5 if columns == 3 else 0
    out[:, 1:] = out[:, 1:].clip(rim, ((width - rim, height - rim) * 2)[:columns - 1])
    if columns == 5: off |= (out[:, 1:3] >= out[:, 3:]).any(axis=1)     # or it lies beside the picture
    if off.any():
        name, *at = rows[off.argmax()]
        raise DataError(f"{path} has {name} at {few(at)}, beyond its picture of {width}x{height}; mend it or "
                        "use the picture that it was drawn on")
    return out


# ── Weak labels derived from masks, where a data set ships none ───────────────────────────────────


def objects_of(mask, instances=None):
    """[(class, (H,W) bool)] of the objects; without instances, each connected region of a class is one."""
    if instances is None:
        regions = [(int(k), *ndimage.label(mask == k)) for k in np.setdiff1d(mask, (0, 255))]
        return [(k, numbers == i) for k, numbers, count in regions for i in range(1, count + 1)]
    found = []
    for inside in (instances == i for i in np.setdiff1d(instances, (0, 255))):
        votes = np.bincount(mask[inside], minlength=256)
        votes[[0, 255]] = 0
        if votes.any(): found.append((int(votes.argmax()), inside))
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


def draw_stroke(scribble, k, corners, inside):
    """Paints class k along the corners [(y, x), ...], where inside is true; about 1 % of the side wide."""
    layer, width = Image.new("L", inside.shape[::-1]), max(1, round(min(inside.shape) / 100))
    line = [(int(x), int(y)) for y, x in corners]
    ImageDraw.Draw(layer).line(line * 2 if len(line) == 1 else line, fill=1, width=width, joint="curve")
    scribble[(np.asarray(layer) > 0) & inside] = k


def derive_scribble(mask, objects, rng):
    """(H,W) uint8 {0..K, 255}: a thin stroke along each object, and one or two in the background."""
    scribble = np.full(mask.shape, 255, np.uint8)
    grounds = [(0, mask == 0)] * int(rng.integers(1, 3)) if (mask == 0).any() else []
    for k, inside in objects + grounds:
        far = depth(inside)
        deep = np.argwhere(far >= 0.4 * far.max())
        corners = rng.choice(deep, 3)
        if k:                                                       # end to end through the thickest place
            corners[0] = deep[((deep - corners[0]) ** 2).sum(axis=1).argmax()]
            corners[1] = np.unravel_index(far.argmax(), far.shape)
            corners[2] = deep[((deep - corners[0]) ** 2).sum(axis=1).argmax()]
        draw_stroke(scribble, k, corners, inside)
    return scribble


def derive(s, wanted):
    """Adds boxes, points, scribble, as far as wanted and absent, from mask and instances; seeded by name.

    What was derived is kept for the next 1,000: a scribble takes longer than a photograph takes to be read.
    """
    missing = [key for key in ("boxes", "points", "scribble") if key in wanted and not hasattr(s, key)]
    if not missing: return s
    instances, seed = getattr(s, "instances", None), zlib.crc32(s.name.encode())
    makers = {"boxes": derive_boxes,
              "points": lambda objects: derive_points(objects, np.random.default_rng([seed, 1])),
              "scribble": lambda objects: derive_scribble(s.mask, objects, np.random.default_rng([seed, 2]))}
    source = (s.name, *(zlib.crc32(x.tobytes()) for x in (s.mask, instances) if x is not None))
    absent = [key for key in missing if (key, *source) not in KEPT]
    if absent:
        if len(KEPT) > 1000: KEPT.clear()
        objects = objects_of(s.mask, instances)
        KEPT.update({(key, *source): makers[key](objects) for key in absent})
    return changed(s, **{key: KEPT[key, *source].copy() for key in missing})


KEPT = {}                                                           # derive's, of this process


def complete(s, wanted, files, classes):
    """Adds mask and instances if they, or labels derived from them, are wanted; opens the files only then."""
    if s.name in files["mask"] and any(key in wanted and not hasattr(s, key) for key in REVEALS["full"]):
        s = changed(s, mask=read_label(files["mask"][s.name], classes, s.image))
        if s.name in files["instances"]:                            # pictures of SBD have none
            s = changed(s, instances=read_label(files["instances"][s.name], None, s.image))
        s = derive(s, wanted)
    return s


DERIVED = "derived from the (instance) masks, seeded by picture name"
FILES = {"tags": "tags.json", "boxes": "boxes", "points": "points", "scribble": "scribbles", "mask": "masks"}


def find_fields(names, files, wish, notes, classes, where):
    """Looks that the needed files {field: {name: ...}} are there -> the fields that samples will have.

    Boxes, points and scribbles that no file holds come from the masks if the supervision is about them; notes
    says so.
    """
    for key in wish.needed:
        kind = key if files[key] else "mask"
        require(names, files[kind], f"{where} ({FILES[kind]})", f"{FILES[key]} are needed here")
    derived = [key for key in wish.derived if not files[key] and files["mask"] and key != "instances"]
    notes |= dict.fromkeys(derived, DERIVED)
    fields = [key for key in wish.shown if files[key] or key in derived]
    if "mask" in fields:
        masked = [files["mask"][name] for name in names if name in files["mask"]]
        read_values(masked, classes)
        if len(masked) < len(names):
            fields.remove("mask")
            notes["mask"] = f"{len(masked)} of {len(names)} pictures have a mask: labels are not scored"
    return fields


# ── shapes: a yardstick drawn on the fly ──────────────────────────────────────────────────────────
# As hard for weak labels as photographs are: the two classes of a look-alike pair share form, colour range
# and texture of the body and differ by one small part; distractors have the colours of bodies and parts; a
# context goes with a class. The drawing is fixed for good: a method is tuned to its paper, never to these
# scenes.


class Kind(NamedTuple):
    """A class of objects in their own frame: u along the body, v across it, the body within [-1, 1]."""
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
    Kind("oval-fin", "oval", 0.6, "bands", (150, 112, 84), "wedge", (196, 62, 52), (0.92, 0.0), 0.40),
    Kind("oval-cap", "oval", 0.6, "bands", (150, 112, 84), "square", (58, 96, 188), (0.85, 0.0), 0.30),
    Kind("block-disc", "block", 0.8, "plain", (118, 132, 92), "disc", (232, 200, 66), (0.45, 0.30), 0.40),
    Kind("block-bar", "block", 0.8, "plain", (118, 132, 92), "bar", (170, 225, 240), (0.45, 0.0), 0.42),
    Kind("pear-ring", "pear", 1.0, "spots", (134, 116, 140), "ring", (226, 224, 214), (-0.5, 0.0), 0.36),
    Kind("pear-leaf", "pear", 1.0, "spots", (134, 116, 140), "diamond", (60, 170, 90), (0.95, 0.0), 0.38),
    Kind("star-eye", "star", 1.0, "checks", (164, 136, 104), "disc", (44, 152, 160), (0.0, 0.0), 0.30),
    Kind("star-horn", "star", 1.0, "checks", (164, 136, 104), "wedge", (190, 70, 150), (0.8, 0.0), 0.42),
)
AUXILIARY = (
    Kind("cross-hub", "cross", 1.0, "plain", (140, 124, 96), "diamond", (226, 130, 44), (0.0, 0.0), 0.40),
    Kind("cross-tip", "cross", 1.0, "plain", (140, 124, 96), "square", (96, 60, 160), (0.85, 0.0), 0.30),
    Kind("moon-knob", "moon", 1.0, "bands", (112, 124, 136), "disc", (214, 92, 110), (-0.80, 0.15), 0.30),
    Kind("moon-band", "moon", 1.0, "bands", (112, 124, 136), "bar", (240, 240, 150), (0.0, 0.7), 0.34),
    Kind("hexagon-flag", "hexagon", 0.9, "spots", (152, 120, 120), "wedge", (90, 180, 220), (0.9, 0.0), 0.42),
    Kind("hexagon-nut", "hexagon", 0.9, "spots", (152, 120, 120), "ring", (30, 70, 60), (0.0, 0.0), 0.38),
)
FOLDS = ((0, 4), (1, 6), (2, 5), (3, 7))                         # few-shot: indices of TARGETS, never a pair
SCENES = {"train": 500, "val": 200}
CONTEXTS = {1: "water", 5: "reed"}     # class: what is in 85 % of its scenes, 5 % of the others


def draw_scene(seed, split, index, classes="target"):
    """Scene number `index` of a split, fixed by the arguments: Sample with image, tags, mask, instances.

    classes: "target" (the 8 of TARGETS) or "aux" (the 6 of AUXILIARY, a disjoint set).
    """
    kinds = {"target": TARGETS, "aux": AUXILIARY}[classes]
    rng = np.random.default_rng([seed, ("train", "val").index(split), index, len(kinds)])
    height, width = rng.integers(96, 129, 2)
    grid = np.mgrid[:height, :width].astype(float)                  # (2,H,W): rows, columns
    image, tones = draw_background(rng, grid)
    chosen = choose_kinds(rng, len(kinds))
    for k, name in CONTEXTS.items() if classes == "target" else ():
        if rng.random() < (0.85 if k - 1 in chosen else 0.05): draw_context(image, name, rng, grid)
    draw_distractors(image, rng, grid)
    mask, instances, things = *np.zeros((2, height, width), np.uint8), []
    for k in chosen:
        thing = place_object(kinds[k], things, rng, grid)
        if thing is not None:
            draw_object(image, thing, rng, tones)
            things.append(thing)
            mask[thing.cover], instances[thing.cover] = k + 1, len(things)
    ramp = turned(grid, (height / 2, width / 2), rng.uniform(0, 2 * np.pi))[0] / max(height, width)
    image = image * (1 + rng.uniform(0.1, 0.5) * ramp)[..., None] + rng.uniform(-12, 12)   # light
    image = ndimage.gaussian_filter(image, (*[rng.uniform(0.4, 0.8)] * 2, 0))
    image = (image + rng.normal(0, rng.uniform(3, 8), image.shape)).round().clip(0, 255).astype(np.uint8)
    return Sample(name=f"{split}_{index:04d}", image=image, tags=present(mask, len(kinds)), mask=mask,
                  instances=instances)


def choose_kinds(rng, count):
    """Class indices of 1 to 4 objects; a third of the later ones repeat the one before, to touch it."""
    chosen = [int(rng.integers(count))]
    for _ in range(rng.choice(4, p=[0.35, 0.35, 0.2, 0.1])):
        chosen.append(chosen[-1] if rng.random() < 0.35 else int(rng.integers(count)))
    return chosen


def turned(grid, centre, angle):
    """Coordinates (u, v) in pixels in a frame at centre (y, x), turned by angle."""
    y, x = grid[0] - centre[0], grid[1] - centre[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def tint(rng, colour, spread):
    """(3,) a colour near the given one: brightness varies, and each channel half as much."""
    return (np.array(colour) + rng.normal(0, spread) + rng.normal(0, spread / 2, 3)).clip(15, 240)


def pattern(name, u, v, rng, period):
    """(H,W) in [-1, 1]: a texture over the coordinates u, v."""
    phase, turn = rng.uniform(0, 2 * np.pi, 2), 2 * np.pi / period
    if name == "bands": return np.sin(turn * u + phase[0])
    if name == "spots": return np.sin(turn * u + phase[0]) * np.sin(turn * v + phase[1])
    if name == "checks": return np.sign(np.sin(turn * u + phase[0]) * np.sin(turn * v + phase[1]))
    if name == "gradient": return (u - u.mean()) / abs(u).max()
    cloud = ndimage.gaussian_filter(rng.normal(size=u.shape), period / 3)
    return (cloud / (2 * cloud.std())).clip(-1, 1) if name == "cloud" else np.zeros(u.shape)


def draw_background(rng, grid):
    """((H,W,3) float image, its two tones): tones like bodies, mixed by a texture and a cloud."""
    kinds = TARGETS + AUXILIARY
    tones = [tint(rng, kinds[rng.integers(len(kinds))].colour, 26) for _ in range(2)]
    u, v = turned(grid, (0, 0), rng.uniform(0, np.pi))
    name = ("bands", "cloud", "checks", "gradient")[rng.integers(4)]
    texture = pattern(name, u, v, rng, rng.uniform(10, 28))
    mix = 0.5 + 0.35 * texture + 0.25 * pattern("cloud", u, v, rng, rng.uniform(5, 12))
    mix = mix.clip(0, 1)[..., None]
    return tones[0] * mix + tones[1] * (1 - mix), tones


def draw_context(image, name, rng, grid):
    """Water (rippled, the lower part of the picture) or reed (blades, at its left or right side)."""
    (height, width), (rows, cols) = grid[0].shape, grid
    sides = (rows, cols), (rows, width - cols)
    along, across = (cols, height - rows) if name == "water" else sides[rng.integers(2)]
    wave = 3 * np.sin(2 * np.pi * along / rng.uniform(25, 50))
    inside = across + wave < (height if name == "water" else width) * rng.uniform(0.3, 0.5)
    colour = tint(rng, (96, 128, 150) if name == "water" else (122, 134, 78), 12)
    image[inside] = (colour + 16 * np.sin(1.35 * across + 2 * wave)[..., None])[inside]


def draw_distractors(image, rng, grid):
    """2 to 5 blobs that belong to no class: small ones with the colour of a part, larger ones like bodies."""
    kinds = TARGETS + AUXILIARY
    for _ in range(rng.integers(2, 6)):
        kind, like_part = kinds[rng.integers(len(kinds))], rng.random() < 0.6
        radius = rng.uniform(2.5, 6) if like_part else rng.uniform(5, 13)
        u, v = turned(grid, rng.uniform(0, grid[0].shape), rng.uniform(0, np.pi))
        lobes = 1 + 0.25 * np.sin(rng.integers(2, 4) * np.arctan2(v, u) + rng.uniform(0, 6))
        inside = (u / rng.uniform(1, 1.6)) ** 2 + v ** 2 < (radius * lobes) ** 2
        shade = pattern("plain" if like_part else kind.texture, u, v, rng, max(4, radius / 2))
        colour = tint(rng, kind.part_colour if like_part else kind.colour, 14)
        image[inside] = (colour + 18 * shade[..., None])[inside]


def place_object(kind, things, rng, grid):
    """A place for an object where it and all earlier ones stay recognisable, or None after 30 trials.

    -> namespace: kind, centre (y, x), radius, its own coordinates u, v (H,W), rim (H,W) < 1 within the body,
    and body, part, cover (H,W) bool. Most of body and part must be in sight; what it covers, others lose.
    """
    beside = things[-1] if things and things[-1].kind == kind else None
    for trial in range(30):
        radius, centre = rng.uniform(12, 28), rng.uniform(0.12, 0.88, 2) * grid[0].shape
        if beside is not None and trial < 20:                       # touch the one before, of the same class
            radius = np.clip(beside.radius * rng.uniform(0.8, 1.2), 12, 28)
            angle = rng.uniform(0, 2 * np.pi)
            gap = (radius + beside.radius) * rng.uniform(0.65, 0.9)
            centre = beside.centre + gap * np.array([np.sin(angle), np.cos(angle)])
        u, v = (axis / radius for axis in turned(grid, centre, rng.uniform(0, 2 * np.pi)))
        rim, (at_u, at_v) = FORMS[kind.body](u, v / kind.height), kind.place
        part = FORMS[kind.part]((u - at_u) / kind.size, (v - at_v) / kind.size) < 1
        new = types.SimpleNamespace(kind=kind, centre=centre, radius=radius, u=u, v=v, rim=rim, body=rim < 1,
                                    part=part, cover=(rim < 1) | part)
        whole = np.array([1.2 * kind.height, 0.8 * kind.size ** 2]) * radius ** 2
        if ((new.body.sum(), part.sum()) > whole).all() and all(
                (old.body & ~new.cover).sum() > 0.5 * old.body.sum() and
                (old.part & ~new.cover).sum() > 0.7 * old.part.sum() for old in things):
            for old in things: old.body, old.part = old.body & ~new.cover, old.part & ~new.cover
            return new
    return None


def draw_object(image, thing, rng, tones):
    """The body with its texture, darker towards the rim, then the part."""
    for _ in range(20):                                             # an eye must tell it from the ground
        colour = tint(rng, thing.kind.colour, 24)
        if min(abs(colour - tone).max() for tone in tones) > 28: break
    r = thing.radius
    shade = 18 * pattern(thing.kind.texture, thing.u * r, thing.v * r, rng, max(4, r / 2.5))
    shade += 12 - 42 * thing.rim.clip(0, 1) ** 2
    image[thing.body] = (colour + shade[..., None])[thing.body]
    image[thing.part] = tint(rng, thing.kind.part_colour, 12)


class Shapes:
    """500 train and 200 val scenes, drawn when first asked for, then kept. A list file picks among them."""

    def __init__(self, root, split, train_list, wish):
        self.classes, self.notes, self.fields = [kind.name for kind in TARGETS], {}, wish.shown
        self.names, self.split, self.scenes = [f"{split}_{i:04d}" for i in range(SCENES[split])], split, {}
        if split == "train" and train_list not in ("train", "train_aug"):
            listed = read_list(train_list)
            require(listed, self.names, "shapes", f"its names are {self.names[0]} to {self.names[-1]}")
            self.names = listed

    def read(self, name):
        if name not in self.scenes:
            self.scenes[name] = derive(draw_scene(0, self.split, int(name[-4:])), REVEALS["full"])
        return self.scenes[name]


class AuxiliaryShapes(Shapes):
    """Other scenes by the same rules, with the six classes of AUXILIARY, none of which is in TARGETS."""

    def __init__(self, root, split, train_list, wish):
        super().__init__(root, split, train_list, wish)
        self.classes = [kind.name for kind in AUXILIARY]

    def read(self, name):
        if name not in self.scenes:
            scene = draw_scene(0, self.split, int(name[-4:]), "aux")
            self.scenes[name] = derive(scene, REVEALS["full"])
        return self.scenes[name]


# ── voc: PASCAL VOC 2012 with SBD, ScribbleSup and what's-the-point ───────────────────────────────


class VOC:
    """JPEGImages/*.jpg, Annotations/*.xml (tags, boxes), ImageSets/Segmentation/{train,val}.txt; optional
    SegmentationClass, SegmentationClassAug (SBD), SegmentationObject/*.png, scribbles/*.xml (ScribbleSup) or
    *.png, points/whats_the_point.json.

    root is VOC2012, VOCdevkit or its parent. A classes.txt beside JPEGImages replaces the 20 names. Tags are
    the classes of all XML objects, difficult ones too, as in the masks. Unless masks are revealed, they are
    opened only to derive scribbles or points that are not shipped, and notes says so.
    """

    def __init__(self, root, split, train_list, wish):
        self.root, self.notes = voc_root(root), {}
        self.classes = voc_classes(self.root)
        self.names = voc_names(self.root, train_list if split == "train" else "val")
        self.pictures = stems(self.root / "JPEGImages", PICTURES)
        require(self.names, self.pictures, self.root / "JPEGImages", f"get {VOC_PAGE} or mend the list")
        self.files = {"boxes": stems(self.root / "Annotations", (".xml",)), "mask": voc_masks(self.root),
                      "instances": stems(self.root / "SegmentationObject"),
                      "scribble": stems(self.root / "scribbles", (".xml", ".png")),
                      "points": read_json(self.root / VOC_CLICKS) if "points" in wish.shown else {}}
        require(self.names, self.files["boxes"], self.root / "Annotations", f"get the XML of {VOC_PAGE}")
        self.fields = find_fields(self.names, self.files, wish, self.notes, self.classes, self.root)

    def read(self, name):
        image, xml = read_image(self.pictures[name]), self.files["boxes"][name]
        boxes = locate(read_voc_xml(xml), 5, self.classes, image.shape[:2], xml)
        s = Sample(name=name, image=image, boxes=boxes)
        s.tags = present(s.boxes[:, 0], len(self.classes))
        if "scribble" in self.fields and name in self.files["scribble"]:
            s.scribble = read_scribble(self.files["scribble"][name], self.classes, image)
        if "points" in self.fields and name in self.files["points"]:
            path = self.root / VOC_CLICKS
            s.points = voc_points(self.files["points"][name], self.classes, image.shape[:2], path)
        return complete(s, self.fields, self.files, self.classes)

    def tags_alone(self, name):
        """(K,) bool of a picture that is not opened."""
        found = [k for k, *_ in read_voc_xml(self.files["boxes"][name])]
        return present([class_number(k, self.classes, self.files["boxes"][name]) for k in found],
                       len(self.classes))


def voc_root(root, year="VOC2012", page=VOC_PAGE):
    """The folder VOC2012, whichever of the three the user gave."""
    tried = [root, root / year, root / "VOCdevkit" / year]
    for folder in tried:
        if (folder / "JPEGImages").is_dir(): return folder
    raise DataError(f"no JPEGImages in {few(tried)}; get {year} ({page}), give its folder as --root")


def voc_classes(root):
    return read_classes(root / "classes.txt") if (root / "classes.txt").is_file() else VOC_CLASSES


def voc_masks(root):
    """{name: path} of all masks: VOC's own, else SBD's."""
    return {**stems(root / "SegmentationClassAug"), **stems(root / "SegmentationClass")}


def voc_names(root, which):
    """Names of "val", "train", "train_aug" = (train ∪ SegmentationClassAug) − val, or of a list file."""
    train, val = (root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val"))
    pictures = stems(root / "JPEGImages", PICTURES)
    if which != "train_aug":
        return read_list({"train": train, "val": val}.get(which, which), pictures)
    extra = stems(root / "SegmentationClassAug")
    if not extra:
        raise DataError(f"train_aug needs {root / 'SegmentationClassAug'}, which is not there; make it with  "
                        f"python data.py voc-aug --sbd path/to/SBD --root {root}  or  --train-list train")
    return sorted({*read_list(train, pictures), *extra} - {*read_list(val, pictures)})


def read_voc_xml(path):
    """[(class name, x0, y0, x1, y1)] of a VOC annotation; the parts of persons are no objects."""
    keys, found = ("xmin", "ymin", "xmax", "ymax"), []
    with reading(path, "annotation", "take it again from VOC's archive"):
        for item in ET.parse(path).getroot().findall("object"):
            x0, y0, x1, y1 = (float(item.find("bndbox").find(key).text) for key in keys)
            found.append((item.find("name").text.strip(), x0 - 1, y0 - 1, x1, y1))
    return found


def read_scribble(path, classes, image):
    """(H,W) uint8 {0..K, 255}: an index PNG, or ScribbleSup's XML of polygons, each a tag and points X, Y."""
    if path.suffix.lower() == ".png": return read_label(path, classes, image)
    scribble, everywhere = np.full(image.shape[:2], 255, np.uint8), np.ones(image.shape[:2], bool)
    with reading(path, "scribbles", "take the file again"):
        for polygon in ET.parse(path).getroot().iter("polygon"):
            tag = polygon.find("tag").text.strip()
            corners = [(float(p.find("Y").text), float(p.find("X").text)) for p in polygon.findall("point")]
            k = 0 if tag == "background" else class_number(tag, classes, path)
            draw_stroke(scribble, k, corners, everywhere)
    return scribble


def voc_points(clicks, classes, size, path):
    """(P,3) float32 from what's-the-point's [{x, y, cls, rank}]; clicks outside the picture are dropped.

    The file has one click an object and rank counts the objects of a class in a picture: every click is kept.
    """
    height, width = size
    with reading(path, "points of a picture in", "take the file again"):
        rows = [(classes[c["cls"] - 1], c["x"], c["y"]) for c in clicks if 1 <= c["cls"] <= len(classes)]
        rows = [row for row in rows if 0 <= row[1] <= width and 0 <= row[2] <= height]
    return locate(rows, 3, classes, size, path)


# ── coco: instances_*.json ────────────────────────────────────────────────────────────────────────


class COCO:
    """annotations/instances_{train,val}{2014,2017}.json, {train,val}{2014,2017}/*.jpg; masks/ is made here.

    Classes are the file's categories in the order of their ids: 1..90 with gaps become 1..80. Pictures that
    have no annotation are left out. Tags are the classes of all annotations, boxes those of single objects.
    In masks the smaller object lies on top; a crowd is 255 where there is no single object.
    """

    def __init__(self, root, split, train_list, wish):
        self.root, self.notes, self.file = root, {}, coco_file(root, split)
        self.folder = coco_folder(self.file)
        self.classes, self.entries = read_coco(self.file)
        listed = split == "train" and train_list not in ("train", "train_aug")
        self.names = read_list(train_list, self.entries) if listed else list(self.entries)
        require(self.names, self.entries, self.file, f"mend {train_list}")
        self.names, every = [name for name in self.names if self.entries[name][2] != "[]"], len(self.names)
        if len(self.names) < every:
            self.notes["pictures"] = f"{every - len(self.names)} of {every} have no annotation: left out"
        if not self.names: raise DataError(f"{self.file} has no annotation; take it again from {COCO_PAGE}")
        self.pictures = stems(self.folder, PICTURES)
        require(self.names, self.pictures, self.folder, f"get them from {COCO_PAGE} or mend {self.file}")
        derived = [key for key in wish.derived if key in ("points", "scribble")]
        self.notes |= dict.fromkeys(derived, DERIVED)
        self.fields = [key for key in wish.shown if key in ("boxes", "mask", "instances", *derived)]

    def read(self, name):
        image, (height, width, _) = read_image(self.pictures[name]), self.entries[name]
        if image.shape[:2] != (height, width):
            raise DataError(f"{self.pictures[name]} is {image.shape[1]}x{image.shape[0]} pixels, but {width}x"
                            f"{height} in {self.file}; take the picture again")
        found = self.annotations(name)
        boxes = [(self.classes[a["category_id"] - 1], x, y, x + w, y + h) for a in found if not a["iscrowd"]
                 for x, y, w, h in [a["bbox"]]]
        s = Sample(name=name, image=image, boxes=locate(boxes, 5, self.classes, (height, width), self.file),
                   tags=present([a["category_id"] for a in found], len(self.classes)))
        if set(self.fields) - {"boxes"}:
            s = derive(changed(s, **self.masks(s)), self.fields)
        return s

    def tags_alone(self, name):
        """(K,) bool of a picture that is not opened."""
        found = [a["category_id"] for a in json.loads(self.entries[name][2])]
        return present(found, len(self.classes))

    def annotations(self, name):
        """A picture's annotations as the file has them, but with category_id 1..K and RLE."""
        height, width, text = self.entries[name]
        with reading(self.file, f"annotation of {name} in", f"take the file again from {COCO_PAGE}"):
            return [{**a, "segmentation": coco_rle(a["segmentation"], height, width)}
                    for a in json.loads(text)]

    def masks(self, s):
        """{"mask", "instances": (H,W) uint8} from masks/; who asks first draws them and keeps them there.

        Each process writes under a name of its own, then renames: two that draw the same do not clash.
        """
        from common import save_label
        parts = {"mask": self.folder.name, "instances": f"{self.folder.name}_instances"}
        files = {key: self.root / "masks" / part / f"{s.name}.png" for key, part in parts.items()}
        written = self.file.stat().st_mtime
        if all(file.is_file() and file.stat().st_mtime >= written for file in files.values()):
            return {key: read_label(file, self.classes if key == "mask" else None, s.image)
                    for key, file in files.items()}
        maps = draw_coco(self.annotations(s.name), *s.image.shape[:2])
        with contextlib.suppress(OSError):                          # a folder that is not ours to write to
            for key, file in files.items(): save_label(file, maps[key])
        return maps


def coco_file(root, split):
    """The annotations of a split: of 2014 (the papers') or 2017, first of a year whose pictures are there."""
    files = [root / "annotations" / f"instances_{split}{year}.json" for year in (2014, 2017)]
    found = [file for file in files if file.is_file()]
    if not found:
        raise DataError(f"there is neither {files[0]} nor {files[1].name}; get it from {COCO_PAGE} or "
                        "correct --root")
    return next((file for file in found if coco_folder(file).is_dir()), found[0])


def coco_folder(file):
    """The pictures' folder that belongs to an annotation file."""
    return file.parent.parent / file.stem.removeprefix("instances_")


def read_coco(path):
    """Class names, {picture's name: (height, width, its annotations, category_id 1..K, as JSON)}.

    As text: the polygons of 118,287 pictures as Python lists would be copied into each loader's memory.
    """
    with reading(path, "annotation file", f"take it again from {COCO_PAGE}"):
        table = json.loads(path.read_text())
        categories = sorted(table["categories"], key=lambda category: category["id"])
        number = {category["id"]: k for k, category in enumerate(categories, 1)}
        found = {image["id"]: [] for image in table["images"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in table["images"]}
        for a in table["annotations"]:
            if a["category_id"] not in number or a["image_id"] not in found:
                raise DataError(f"{path} has an annotation (id {a['id']}) of category {a['category_id']} in "
                                f"picture {a['image_id']}, one of which it does not list; mend the file")
            (width, height), (x, y, w, h) = sizes[a["image_id"]], a["bbox"]
            left = min(x + w, y + h, width - x, height - y)         # far outside: locate refuses it
            if min(w, h) > 0 and not -1 <= left <= 0:               # COCO has a few boxes without any width
                kept = {key: a[key] for key in ("bbox", "area", "segmentation")}
                kept |= {"category_id": number[a["category_id"]], "iscrowd": a.get("iscrowd", 0)}
                found[a["image_id"]].append(kept)
        entries = {Path(image["file_name"]).stem: (image["height"], image["width"],
                                                   json.dumps(found[image["id"]]))
                   for image in table["images"]}
    return [category["name"] for category in categories], entries


def coco_rle(segmentation, height, width):
    """Polygons, or RLE as a list or as text -> pycocotools' RLE; an empty annotation covers nothing."""
    from pycocotools import mask
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"RLE of size {segmentation['size']}, picture {[height, width]}")
        text = isinstance(segmentation["counts"], str)
        return segmentation if text else mask.frPyObjects(segmentation, height, width)
    polygons = [corners for corners in segmentation if len(corners) >= 6]
    if not polygons: return mask.encode(np.zeros((height, width), np.uint8, order="F"))
    return mask.merge(mask.frPyObjects(polygons, height, width))


def draw_coco(annotations, height, width):
    """{"mask", "instances": (H,W) uint8}; from the 255th object on, counted from the largest, no instance."""
    from pycocotools import mask as rle
    mask, instances = np.zeros((2, height, width), np.uint8)
    drawn = [(a, rle.decode(a["segmentation"]).astype(bool)) for a in annotations]
    for a, inside in drawn:
        if a["iscrowd"]: mask[inside] = instances[inside] = 255
    single = sorted((-inside.sum(), i) for i, (a, inside) in enumerate(drawn) if not a["iscrowd"])
    for k, (_, i) in enumerate(single, 1):
        a, inside = drawn[i]
        mask[inside], instances[inside] = a["category_id"], min(k, 255)
    return {"mask": mask, "instances": instances}


def coco_annotations(s):
    """The objects of a sample's masks as COCO has them: category_id 1..K, RLE."""
    from pycocotools import mask as rle
    objects = objects_of(s.mask, getattr(s, "instances", None))
    found = []
    for (k, inside), (_, x0, y0, x1, y1) in zip(objects, derive_boxes(objects).tolist()):
        code = rle.encode(np.asfortranarray(inside, np.uint8))
        found.append({"category_id": k, "iscrowd": 0, "area": float(inside.sum()),
                      "bbox": [x0, y0, x1 - x0, y1 - y0],
                      "segmentation": {"size": list(inside.shape), "counts": code["counts"].decode()}})
    return found


# ── context: PASCAL-Context, 59 classes of things and stuff ───────────────────────────────────────


class Context:
    """JPEGImages/*.jpg, SegmentationClassContext/*.png (0 = background, 1..59 = CONTEXT_CLASSES, 255 = no
    label), ImageSets/SegmentationContext/{train,val}.txt (4,998 and 5,105 names); optional scribbles/*.xml
    (ScribbleSup) or *.png. It is the layout that mmsegmentation's converter writes.

    root is VOC2010, VOCdevkit or its parent. Background is a class like the others: learned and scored. Tags
    are the classes of the scribbles where all pictures have one, else of the masks.
    """

    def __init__(self, root, split, train_list, wish):
        self.root, self.notes, self.classes = voc_root(root, "VOC2010", CONTEXT_PAGE), {}, CONTEXT_CLASSES
        self.names = context_names(self.root, train_list if split == "train" else "val")
        self.pictures = stems(self.root / "JPEGImages", PICTURES)
        require(self.names, self.pictures, self.root / "JPEGImages", f"get {CONTEXT_PAGE} or mend the list")
        self.files = {"scribble": stems(self.root / "scribbles", (".xml", ".png")),
                      "mask": stems(self.root / "SegmentationClassContext"),
                      "boxes": {}, "points": {}, "instances": {}}
        self.tags_from = "scribble" if set(self.names) <= set(self.files["scribble"]) else "mask"
        require(self.names, self.files[self.tags_from], self.root / "SegmentationClassContext",
                "every picture needs scribbles or a mask, from which its tags come")
        self.notes["tags"] = f"taken from {FILES[self.tags_from]}"
        self.fields = find_fields(self.names, self.files, wish, self.notes, self.classes, self.root)

    def read(self, name):
        s, wanted = Sample(name=name, image=read_image(self.pictures[name])), {*self.fields, self.tags_from}
        if "scribble" in wanted and name in self.files["scribble"]:
            s.scribble = read_scribble(self.files["scribble"][name], self.classes, s.image)
        s = complete(s, wanted, self.files, self.classes)
        source = Sample(**{self.tags_from: getattr(s, self.tags_from)})
        return changed(s, tags=tags_of(source, len(self.classes)))


def context_names(root, which):
    """Names of "val", "train" (train_aug is the same), or of a list file."""
    which = "train" if which == "train_aug" else which
    own = root / "ImageSets" / "SegmentationContext" / f"{which}.txt"
    return read_list(own if which in ("train", "val") else which, stems(root / "JPEGImages", PICTURES))


# ── workpiece: a folder of your own ───────────────────────────────────────────────────────────────


class Workpiece:
    """<root>/classes.txt (one name a line, without background; the first is class 1), and in train/ and val/:

    images/*         any picture format             masks/*.png      0..K, 255 = ignore; val, train if known
    tags.json        {"name": ["bolt", ...], ...}   instances/*.png  0 = none, 1.. = objects, 255 = border
    boxes.json       {"name": [["bolt", x0, y0, x1, y1], ...], ...}  in pixel edges, half open
    points.json      {"name": [["bolt", x, y], ...], ...}            scribbles/*.png  0..K, 255 = no label

    A third folder, rendered/, may hold synthetic pictures in the same form: images/* and masks/*.png; its own
    classes.txt, where there is one, must be the same. See data set solids.

    Names are file names without suffix. Only classes.txt, images and what supervision needs must be there;
    val may be pictures alone, which are not scored.
    Tags come from the first of tags.json, boxes.json, points.json, scribbles, masks. Boxes, points, scribbles
    that are not there come from the masks: objects are the instances, else the connected regions of a class.
    """

    def __init__(self, root, split, train_list, wish):
        self.root, self.notes, folder = root / split, {}, root / split / "images"
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; put the {split} pictures there, one at least, or "
                            "correct --root (python data.py export --layout workpiece shows the layout)")
        self.classes, self.pictures = read_classes(root / "classes.txt"), stems(folder, PICTURES)
        own = root / split / "classes.txt"
        if own.is_file() and read_classes(own) != self.classes:
            raise DataError(f"{own} lists other classes ({few(read_classes(own))}) than "
                            f"{root / 'classes.txt'} ({few(self.classes)}); rendered "
                            "and real pictures need one list, in one order")
        listed = split == "train" and train_list not in ("train", "train_aug")
        self.names = read_list(train_list, self.pictures) if listed else list(self.pictures)
        require(self.names, self.pictures, folder, f"mend {train_list}")
        if not self.names: raise DataError(f"{folder} is empty; put the {split} pictures there, one at least")
        self.files = {key: read_json(self.root / f"{key}.json") for key in ("tags", "boxes", "points")}
        self.files |= {key: stems(self.root / part) for key, part in
                       (("scribble", "scribbles"), ("mask", "masks"), ("instances", "instances"))}
        self.tags_from = next((key for key in FILES if self.files[key]), "tags")
        if self.tags_from != "tags": self.notes["tags"] = f"taken from {FILES[self.tags_from]}"
        if split == "val" and not self.files[self.tags_from]:
            self.notes["tags"] = "val has no labels: any class may be there, and nothing is scored"
        else:
            require(self.names, self.files[self.tags_from], f"{self.root} ({FILES[self.tags_from]})",
                    "every picture needs its tags there")
        self.fields = find_fields(self.names, self.files, wish, self.notes, self.classes, self.root)

    def read(self, name):
        s = Sample(name=name, image=read_image(self.pictures[name]))
        size, wanted = s.image.shape[:2], {*self.fields, self.tags_from}
        if name in self.files["boxes"]:
            s.boxes = locate(self.files["boxes"][name], 5, self.classes, size, self.root / "boxes.json")
        if name in self.files["points"]:
            s.points = locate(self.files["points"][name], 3, self.classes, size, self.root / "points.json")
        if "scribble" in wanted and name in self.files["scribble"]:
            s.scribble = read_scribble(self.files["scribble"][name], self.classes, s.image)
        s = complete(s, wanted, self.files, self.classes)
        if not self.files[self.tags_from]: return changed(s, tags=np.ones(len(self.classes), bool))
        if self.tags_from == "tags":
            path = self.root / "tags.json"
            with reading(path, f"tags of {name} in", "write {\"name\": [class, ...], ...}"):
                numbers = [class_number(tag, self.classes, path) for tag in self.files["tags"][name]]
            return changed(s, tags=present(numbers, len(self.classes)))
        source = Sample(**{self.tags_from: getattr(s, self.tags_from)})
        return changed(s, tags=tags_of(source, len(self.classes)))


# ── solids: a small renderer of machine parts, clean and as if photographed ──────────────────────────
# Eight texture-less grey parts, so that only their shape tells them apart. "rendered" pictures are clean and
# labelled; "real" ones (train, val) lie on one of four grounds, under uneven light, with highlights, shadows,
# blur and noise. Like shapes, the drawing is fixed for good.


def prism(outline, low, high, hole=0.0, at=(0.0, 0.0)):
    """Triangles (T,3,3), counter-clockwise from outside: a polygon (n,2) around the origin, moved to `at`,
    extruded from z = low to high, with a round hole of that radius. Boxes, cylinders, rings are prisms too.
    """
    corners = [outline, hole * outline / np.linalg.norm(outline, axis=1, keepdims=True)]
    (out, out_next), (inner, inner_next) = ((c + at, np.roll(c, -1, axis=0) + at) for c in corners)

    def wall(a, za, b, zb):
        """Quads a -> a's next -> b's next -> b as triangles; a, b are pairs (points, next points)."""
        a, a_next, b, b_next = (np.c_[points, np.full(len(points), z)] for pair, z in ((a, za), (b, zb))
                                for points in pair)
        return [np.stack([a, a_next, b_next], axis=1), np.stack([a, b_next, b], axis=1)]

    faces = wall((out, out_next), low, (out, out_next), high)
    faces += wall((out, out_next), high, (inner, inner_next), high)
    faces += wall((inner, inner_next), low, (out, out_next), low)
    if hole: faces += wall((inner, inner_next), high, (inner, inner_next), low)
    return np.concatenate(faces)


def polygon(radius, form="circle"):
    """24 corners (24,2) of a circle, a hexagon or a gear wheel of eight teeth."""
    angle = np.arange(24) * np.pi / 12
    reach = {"circle": 1.0, "hexagon": np.cos(np.pi / 6) / np.cos(angle % (np.pi / 3) - np.pi / 6),
             "gear": np.tile((1.0, 1.0, 0.72), 8)}[form]
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.reshape(reach, (-1, 1))


def box(x, y, z):
    """Triangles of a box; x, y, z are its (low, high)."""
    half, middle = np.array([[x[1] - x[0], y[1] - y[0]]]) / 2, (sum(x) / 2, sum(y) / 2)
    return prism(half * [[1, 1], [-1, 1], [-1, -1], [1, -1]], *z, at=middle)


SOLIDS = {name: np.concatenate(pieces) for name, pieces in {        # triangles; half a part is about 1
    "bolt": [prism(polygon(0.52, "hexagon"), 0.6, 1.0), prism(polygon(0.24), -1.0, 0.6)],
    "nut": [prism(polygon(0.9, "hexagon"), -0.34, 0.34, hole=0.45)],
    "tube": [prism(polygon(0.5), -0.85, 0.85, hole=0.34)],
    "bracket": [box((-0.75, 0.75), (-0.4, 0.4), (-0.75, -0.5)),
                box((-0.75, -0.5), (-0.4, 0.4), (-0.5, 0.75))],
    "flange": [prism(polygon(1.0), -0.45, -0.2, hole=0.3), prism(polygon(0.46), -0.2, 0.6, hole=0.3)],
    "gear": [prism(polygon(1.0, "gear"), -0.2, 0.2, hole=0.25)],
    "shaft": [prism(polygon(0.2), -1.0, -0.45), prism(polygon(0.42), -0.45, 0.3),
              prism(polygon(0.2), 0.3, 1.0)],
    "clamp": [box((-0.7, 0.7), (-0.45, 0.45), (-0.6, -0.35)),
              box((-0.7, -0.45), (-0.45, 0.45), (-0.35, 0.6)),
              box((0.45, 0.7), (-0.45, 0.45), (-0.35, 0.6))]}.items()}
SOLID_SCENES, SOLID_SIZE = {"rendered": 800, "train": 1600, "val": 200}, (128, 160)
GROUNDS = ("cloth", "wood", "mat", "workshop")                      # background 0 … 3, a quarter each


def rotation(axis, angle):
    """(3,3) turn about the x (0), y (1) or z (2) axis."""
    (i, j), matrix = [n for n in range(3) if n != axis], np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def pose_solids(rng, height, width):
    """One to three parts that lie or stand on a table, seen from above at an angle, in pixels from the middle
    of the picture; y up, z towards the camera.   -> [(index of SOLIDS, triangles (T,3,3))]
    """
    tilt, count, placed, parts = rng.uniform(0.25, 1.0), rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1)), [], []
    for k in rng.integers(len(SOLIDS), size=count):
        for _ in range(30):
            radius = rng.uniform(17, 30)
            x, y = (rng.uniform(radius - side / 2, side / 2 - radius) for side in (width, height))
            if all(np.hypot(x - a, y - b) > 0.8 * (radius + r) for a, b, r in placed): break
        else:
            continue
        placed.append((x, y, radius))
        pose = rotation(0, -tilt) @ rotation(2, rng.uniform(0, 2 * np.pi))
        if rng.random() < 0.5:                                      # it lies on its side
            pose = pose @ rotation(0, np.pi / 2) @ rotation(2, rng.uniform(-0.6, 0.6))
        centre = np.array([x, y, -y * np.tan(tilt)])                # further up on the table is further away
        parts.append((int(k), radius * list(SOLIDS.values())[k] @ pose.T + centre))
    return parts


def rasterise(triangles, height, width, distance):
    """Perspective z-buffer from the camera at z = distance.   triangles (T,3,3), in pixels from the middle
    -> (H,W) index of the nearest triangle, -1 = none; (T,3) normals of length 1
    """
    a, b, c = triangles.transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    length = np.linalg.norm(normals, axis=1)
    inverse = 1 / (distance - triangles[..., 2])                    # (T,3): linear in the picture, as w is
    at = triangles[..., :2] * [1, -1] * distance * inverse[..., None] + [width / 2, height / 2] - 0.5
    low = np.ceil(at.min(1)).clip(0).astype(int)                    # (T,2): first x, y; high: last + 1
    high = np.minimum(np.floor(at.max(1)).astype(int) + 1, (width, height))
    corners = np.concatenate([at, np.ones((*at.shape[:2], 1))], axis=2)
    front = (length > 1e-6) & ((normals * ([0, 0, distance] - a)).sum(1) > 0)
    seen = np.flatnonzero(front & (low < high).all(1) & (abs(np.linalg.det(corners)) > 1e-6))
    planes = np.linalg.inv(corners[seen])                           # (x, y, 1) @ plane = corners' weights
    depths = np.einsum("tij,tj->ti", planes, inverse[seen])
    nearest, index = np.zeros((height, width)), np.full((height, width), -1)
    for t, (X, Y, one), (dx, dy, d) in zip(seen, planes[..., None, None], depths):
        (left, top), (right, bottom) = low[t], high[t]
        x, y, part = np.arange(left, right), np.arange(top, bottom)[:, None], np.s_[top:bottom, left:right]
        depth = dx * x + (dy * y + d)
        front = (X * x + (Y * y + one) >= 0).all(0) & (depth > nearest[part])
        nearest[part][front], index[part][front] = depth[front], t
    return index, normals / length.clip(1e-6)[:, None]


def draw_solids(seed, split, index):
    """Picture number `index` of "rendered", "train" or "val", fixed by the arguments: Sample with image,
    tags, mask, instances. Real pictures (train, val) have background index mod 4, see GROUNDS.
    """
    rng = np.random.default_rng([seed, list(SOLID_SCENES).index(split), index, 77])
    height, width = SOLID_SIZE
    parts = pose_solids(rng, height, width)
    triangles = 2 * np.concatenate([t for _, t in parts])           # twice the size, for smooth edges
    owner = np.repeat(np.arange(len(parts)) + 1, [len(t) for _, t in parts])
    face, normals = rasterise(triangles, 2 * height, 2 * width, 5.0 * width)
    owners = np.where(face < 0, 0, owner[face])
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(0.1, 0.9), 1.0])
    light /= np.linalg.norm(light)
    diffuse = (normals @ light).clip(0)                             # Lambert
    if split == "rendered":
        image = halved(np.append(40 + 190 * diffuse, 242)[face])[..., None].repeat(3, axis=2)
    else:
        image = photograph(rng, face, owners, normals, diffuse, light, GROUNDS[index % 4])
    instances, mask = (np.zeros((height, width), np.uint8) for _ in range(2))
    for i, (k, _) in enumerate(parts, 1):
        inside = halved(owners == i) >= 0.5
        instances[inside], mask[inside] = i, k + 1
    name = f"{split}_{index:04d}" + ("" if split == "rendered" else f"_b{index % 4}")
    return Sample(name=name, image=image.round().clip(0, 255).astype(np.uint8),
                  tags=present(mask, len(SOLIDS)), mask=mask, instances=instances)


def halved(image):
    """Mean of each 2x2 pixels.   (2H,2W) -> (H,W)"""
    return (image[::2, ::2] * 1.0 + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def photograph(rng, face, owners, normals, diffuse, light, ground):
    """(H,W,3) float of a real picture; face, owners (2H,2W)."""
    half = light + [0, 0, 1]
    gloss = (normals @ (half / np.linalg.norm(half))).clip(0) ** rng.uniform(12, 40)
    cover = halved(owners > 0)
    grid = np.mgrid[:cover.shape[0], :cover.shape[1]].astype(float)
    away = rng.uniform(2, 5) * light[:2] * [-1, 1]                  # the shadow falls away from the light
    shadow = ndimage.gaussian_filter(ndimage.shift(cover, away[::-1] + [3, 0], order=1), 2.5)
    image = draw_ground(rng, ground, grid) * ((1 - 0.55 * shadow) * (1 - cover))[..., None]
    for i in range(1, owners.max() + 1):
        level = 0.28 + 0.85 * diffuse + rng.uniform(0.2, 0.9) * gloss
        image += halved(np.where(owners == i, level[face], 0))[..., None] * metal(rng, 132, 20)

    def spot(centre, area):
        return np.exp(-((grid - np.reshape(centre, (2, 1, 1))) ** 2).sum(0) / area)

    for centre in rng.permutation(np.argwhere(cover == 1))[:rng.integers(0, 5)]:       # highlights
        image += (rng.uniform(60, 150) * spot(centre, rng.uniform(1.5, 9)) * cover)[..., None]
    ramp = turned(grid, np.array(cover.shape) / 2, rng.uniform(0, 2 * np.pi))[0] / max(cover.shape)
    glow = spot(rng.uniform(0, cover.shape), rng.uniform(1e3, 6e3))
    image *= (rng.uniform(0.7, 1.1) + rng.uniform(0, 0.5) * ramp + rng.uniform(0, 0.5) * glow)[..., None]
    image = ndimage.gaussian_filter(image, (*[rng.uniform(0.4, 1.1)] * 2, 0))
    return image + rng.normal(0, rng.uniform(2, 8), image.shape)


def metal(rng, mean, spread):
    """(3,) a grey, a little warm or cold."""
    return (rng.normal(mean, spread) * (1 + rng.normal(0, 0.04) * np.array([1, 0, -1]))).clip(30, 220)


def draw_ground(rng, ground, grid):
    """(H,W,3) float: cloth, wood, cutting mat, or a steel plate with scraps as grey as the parts."""
    u, v = turned(grid, (0, 0), rng.uniform(0, np.pi))
    cloud = pattern("cloud", u, v, rng, rng.uniform(6, 20))[..., None]
    if ground == "cloth":
        return tint(rng, (70, 84, 110), 18) + 5 * cloud
    if ground == "wood":
        grain = np.sin(v / rng.uniform(1.5, 3) + 3 * cloud[..., 0] + 6 * np.sin(u / 60))[..., None]
        return tint(rng, (150, 108, 70), 14) + 18 * grain + 12 * cloud
    if ground == "mat":
        period = rng.uniform(11, 18)
        lines = ((u % period < 1.3) | (v % period < 1.3))[..., None]
        checks = np.sign(np.sin(np.pi * u / period) * np.sin(np.pi * v / period))[..., None]
        return tint(rng, (88, 128, 104), 14) + 70 * lines + 14 * checks + 8 * cloud
    image = metal(rng, 118, 16) + 14 * np.sin(u * rng.uniform(0.8, 2))[..., None] + 16 * cloud
    for _ in range(rng.integers(5, 10)):                            # strips, discs and rings without shading
        a, b = turned(grid, rng.uniform(0, grid[0].shape), rng.uniform(0, np.pi))
        form, r = FORMS[("square", "disc", "ring", "bar")[rng.integers(4)]], rng.uniform(4, 16)
        image[form(a / r, b / (r * rng.uniform(0.2, 1))) < 1] = metal(rng, 118, 34)
    return image


class Solids:
    """800 rendered, 1,600 train and 200 val pictures of 128 x 160, drawn when first asked for, then kept. A
    list file picks among the training pictures.
    """
    scenes = {}                                                     # by name, for all data sets of a process

    def __init__(self, root, split, train_list, wish):
        self.classes, self.notes, self.fields = list(SOLIDS), {}, wish.shown
        tail = [""] if split == "rendered" else [f"_b{i}" for i in range(4)]
        self.names = [f"{split}_{i:04d}{tail[i % len(tail)]}" for i in range(SOLID_SCENES[split])]
        self.split = split
        if split == "train" and train_list not in ("train", "train_aug"):
            listed = read_list(train_list)
            require(listed, self.names, "solids", f"its names are {self.names[0]} to {self.names[-1]}")
            self.names = listed

    def read(self, name):
        if name not in self.scenes:
            self.scenes[name] = draw_solids(0, self.split, int(name.split("_")[1]))
        return derive(self.scenes[name], self.fields)


# ── cityscapes, gta5: street scenes, 19 classes ─────────────────────────────────────────────────────


# Cityscapes' labels of ids 0 … 33: names and colours. Those with a * are the 19 classes, in their order.
STREET = """unlabeled 0 0 0 · ego-vehicle 0 0 0 · rectification-border 0 0 0 · out-of-roi 0 0 0 ·
static 0 0 0 · dynamic 111 74 0 · ground 81 0 81 · *road 128 64 128 · *sidewalk 244 35 232 ·
parking 250 170 160 · rail-track 230 150 140 · *building 70 70 70 · *wall 102 102 156 · *fence 190 153 153 ·
guard-rail 180 165 180 · bridge 150 100 100 · tunnel 150 120 90 · *pole 153 153 153 · polegroup 153 153 153 ·
*traffic-light 250 170 30 · *traffic-sign 220 220 0 · *vegetation 107 142 35 · *terrain 152 251 152 ·
*sky 70 130 180 · *person 220 20 60 · *rider 255 0 0 · *car 0 0 142 · *truck 0 0 70 · *bus 0 60 100 ·
caravan 0 0 90 · trailer 0 0 110 · *train 0 80 100 · *motorcycle 0 0 230 · *bicycle 119 11 32"""
STREET = [entry.split() for entry in STREET.split("·")]
STREET_IDS = [i for i, (name, *_) in enumerate(STREET) if name[0] == "*"]      # of trainIds 0 … 18
STREET_CLASSES = [STREET[i][0][1:] for i in STREET_IDS]
STREET_PAGE = {"cityscapes": "https://www.cityscapes-dataset.com",
               "gta5": "https://download.visinf.tu-darmstadt.de/data/from_games"}


def street_table(form):
    """(256,) int: value in a file -> 0..K with 1..19 = STREET_CLASSES, 255 = no label, -1 = not allowed.

    form "ids": labelIds (34 and 255 are -1, the licence plate); "train_ids": 0 … 18, 255
    """
    table = np.full(256, -1)
    if form == "train_ids":
        table[:19] = np.arange(19) + 1
    else:
        table[:35] = 255
        table[STREET_IDS] = np.arange(19) + 1
    table[255] = 255
    return table


def read_street(path, form, image=None):
    """(H,W) uint8 {1..19, 255} of a label file. form: "ids", "train_ids", or "any" of GTA5's two: index PNG
    of labelIds, or colours.
    """
    with reading(path, "label map", "take the file again"), Image.open(path) as file:
        label = np.array(file if file.mode in ("P", "L", "I", "I;16") else file.convert("RGB"))
    if label.ndim == 3:
        label, form = colours_to_ids(label, path), "ids"
    out = street_table("ids" if form == "any" else form)[label.clip(0, 255)]
    bad = np.unique(label[(out < 0) | (label > 255)])
    if bad.size:
        raise DataError(f"label map {path} holds {few(bad)}, which are no "
                        f"{'trainIds 0..18, 255' if form == 'train_ids' else 'labelIds 0..34, 255'}; "
                        "convert it, or take the file again")
    if image is not None and out.shape != image.shape[:2]:
        raise DataError(f"label map {path} is {out.shape[1]}x{out.shape[0]} pixels, its picture "
                        f"{image.shape[1]}x{image.shape[0]}; make them alike")
    return out.astype(np.uint8)


def colours_to_ids(label, path):
    """(H,W,3) in Cityscapes' colours -> (H,W) labelIds; of labels with one colour the first, but a real class
    goes before a void one.
    """
    code = label.astype(np.int64) @ [65536, 256, 1]
    known = {}
    for i in [*STREET_IDS, *range(len(STREET))]:
        known.setdefault(int(np.array(STREET[i][1:], int) @ [65536, 256, 1]), i)
    found, where = np.unique(code, return_inverse=True)
    strange = [(c >> 16, c >> 8 & 255, c & 255) for c in found.tolist() if c not in known]
    if strange:
        raise DataError(f"label map {path} holds the colours {few(strange)}, which no class of Cityscapes "
                        "has; convert it to labelIds, or take the file again")
    return np.array([known[c] for c in found.tolist()])[where].reshape(code.shape)


class Street:
    """What Cityscapes and GTA5 share. There is no background class: 0 does not occur, void is 255. Tags are
    the classes of the label map; where a training picture has none, all classes, which notes says.
    """
    classes = STREET_CLASSES

    def __init__(self, where, split, train_list, wish, pictures, labels):
        self.pictures, self.labels, self.notes = pictures, labels, {}
        listed = split == "train" and train_list not in ("train", "train_aug")
        self.names = read_list(train_list, pictures) if listed else list(pictures)
        require(self.names, pictures, where, f"mend {train_list}")
        if wish.needed or wish.derived: require(self.names, labels, where, "each picture needs its label map")
        masked = sum(name in labels for name in self.names)
        if masked < len(self.names):
            self.notes["tags"] = (f"{len(self.names) - masked} pictures have no label map: any class may be "
                                  "there")
        kept = [key for key in wish.shown if key in ("mask", *wish.derived) and key != "instances"]
        self.fields = kept if masked == len(self.names) else []

    def read(self, name):
        s = Sample(name=name, image=read_image(self.pictures[name]))
        if name not in self.labels:
            return changed(s, tags=np.ones(len(self.classes), bool))
        path, form = self.labels[name]
        s.mask = read_street(path, form, s.image)
        return derive(changed(s, tags=present(s.mask, len(self.classes))), self.fields)


class Cityscapes(Street):
    """leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, gtFine/{train,val}/<city>/*_gtFine_labelIds.png (or
    *_gtFine_labelTrainIds.png); 2,975 and 500 pictures. The training pictures need no labels.
    """

    def __init__(self, root, split, train_list, wish):
        folder = root / "leftImg8bit" / split
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}; get leftImg8bit and gtFine "
                            f"({STREET_PAGE['cityscapes']}), or correct --root")
        pictures = {path.name.removesuffix("_leftImg8bit.png"): path
                    for path in sorted(folder.glob("*/[!.]*_leftImg8bit.png"))}
        if not pictures: raise DataError(f"{folder} has no <city>/*_leftImg8bit.png; take it again")
        labels = {path.name.removesuffix(f"_gtFine_{end}.png"): (path, form)
                  for end, form in (("labelTrainIds", "train_ids"), ("labelIds", "ids"))
                  for path in sorted((root / "gtFine" / split).glob(f"*/[!.]*_gtFine_{end}.png"))}
        super().__init__(root, split, train_list, wish, pictures, labels)


class GTA5(Street):
    """images/*.png, labels/*.png: 24,966 pictures in one set. Label maps may be index PNGs of labelIds, as
    they are shipped, or pictures in Cityscapes' colours.
    """

    def __init__(self, root, split, train_list, wish):
        if split == "val":
            raise DataError("gta5 has no val pictures: it is a rendered set to learn from")
        pictures, labels = stems(root / "images"), stems(root / "labels")
        if not pictures:
            raise DataError(f"there is no picture in {root / 'images'}; get GTA5 ({STREET_PAGE['gta5']}), or "
                            "correct the folder")
        labels = {name: (path, "any") for name, path in labels.items()}
        super().__init__(root, split, train_list, wish, pictures, labels)


SOURCES = {"shapes": Shapes, "shapes-aux": AuxiliaryShapes, "voc": VOC, "coco": COCO, "context": Context,
           "workpiece": Workpiece, "solids": Solids, "cityscapes": Cityscapes, "gta5": GTA5}
RENDERED = ("solids", "workpiece", "gta5")                          # those with a split "rendered"


# ── Few-shot: class folds, pictures of a class ────────────────────────────────────────────────────


def class_folds(data, classes, order="interleaved"):
    """The test classes of each of the four folds, numbers 1..K; a fold trains on all the others.

    shapes: FOLDS. voc (PASCAL-5i): blocks of five. coco (COCO-20i): "interleaved", every fourth class (FWB,
    PFENet), or "blocks" of 20; both are in circulation. Other numbers of classes are divided alike.
    """
    if data == "shapes": return [tuple(k + 1 for k in fold) for fold in FOLDS]
    if len(classes) < 4:
        raise DataError(f"{data} has {len(classes)} classes; four folds need four or more")
    numbers = range(1, len(classes) + 1)
    if data == "coco" and order == "interleaved": return [tuple(numbers[i::4]) for i in range(4)]
    edges = [len(numbers) * i // 4 for i in range(5)]
    return [tuple(numbers[a:b]) for a, b in zip(edges, edges[1:])]


def class_areas(dataset, indices=None):
    """(n,K) int64: pixels of each class in the masks of these pictures, all by default."""
    counts = [np.bincount(dataset[i].mask.ravel(), minlength=256)[1:len(dataset.classes) + 1]
              for i in (range(len(dataset)) if indices is None else indices)]
    return np.array(counts, np.int64).reshape(-1, len(dataset.classes))


def class_mask(mask, k):
    """(H,W) {0..K, 255} -> 1 for class k, 0 for all the others, 255 stays."""
    return np.where(mask == 255, 255, mask == k).astype(np.uint8)


# ── Commands: check, export, voc-aug ──────────────────────────────────────────────────────────────


Name = Literal["shapes", "voc", "coco", "context", "workpiece", "solids", "cityscapes", "gta5"]


def splits_of(data, root):
    """The splits that a data set has."""
    rendered = data == "solids" or data == "workpiece" and (Path(root) / "rendered").is_dir()
    return ("rendered",) if data == "gta5" else ("train", "val", *["rendered"] * rendered)


def check(data: Name, root: str = "") -> None:
    """List what is there and what is missing, with expected counts, and check values; exit 1 if unusable."""
    args = types.SimpleNamespace(data=data, root=root, train_list="train", supervision="image")
    wrong = False
    for what, count, verdict in CHECKS[data](Path(root or f"data/{data}")):
        print(f"{what:<24}{count:>9}   {verdict}")
        wrong |= verdict.startswith("wrong")
    if wrong: sys.exit(1)
    for split in splits_of(data, root or f"data/{data}"):
        dataset = load(args, split, masks=True)
        for i in range(min(50, len(dataset))): dataset[i]
        print(f"{split + ' samples read':<24}{i + 1:>9}   ok")
        for topic, note in dataset.notes.items(): print(f"{'':<36}{topic}: {note}")


def remark(count, expected=None, remedy=""):
    """ok, missing, or the count that a complete download has."""
    if not count: return f"missing   {remedy}"
    return "ok" if expected in (None, count) else f"expected {expected}"


def check_shapes(root):
    yield from ((split, count, "drawn on the fly") for split, count in SCENES.items())


def check_solids(root):
    yield from ((split, count, "drawn on the fly") for split, count in SOLID_SCENES.items())


def check_cityscapes(root):
    """Rows (what, count, remark)."""
    for split, count in (("train", 2975), ("val", 500)):
        for part, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"),
                          ("gtFine", "gtFine_labelTrainIds")):
            there = len(list((root / part / split).glob(f"*/[!.]*_{end}.png")))
            remedy = "optional" if "gtFine" in end else STREET_PAGE["cityscapes"]
            yield f"{split} {end}", there, remark(there, count, remedy)


def check_gta5(root):
    """Rows (what, count, remark)."""
    for part in ("images", "labels"):
        there = len(stems(root / part))
        yield part, there, remark(there, 24966, STREET_PAGE["gta5"])


def check_voc(root):
    """Rows (what, count, remark)."""
    root = voc_root(root)
    official = not (root / "classes.txt").is_file()
    make = f"make it:  python data.py voc-aug --sbd path/to/SBD --root {root}"
    for folder, count, remedy in (
            ("JPEGImages", 17125, VOC_PAGE), ("Annotations", 17125, VOC_PAGE),
            ("SegmentationClass", 2913, VOC_PAGE), ("SegmentationObject", 2913, VOC_PAGE),
            ("SegmentationClassAug", 12031, make), ("scribbles", None, "optional")):
        there = len(stems(root / folder, (".xml", *PICTURES)))
        yield folder, there, remark(there, count if official else None, remedy)
    clicks = len(read_json(root / VOC_CLICKS))
    yield "whats_the_point.json", clicks, remark(clicks, None, "optional")
    for which, count in (("train", 1464), ("train_aug", 10582), ("val", 1449)):
        if which == "train_aug" and not stems(root / "SegmentationClassAug"):
            yield which, "-", f"needs SegmentationClassAug (expected {count})"
        else:
            there = len(voc_names(root, which))
            yield which, there, remark(there, count if official else None)
    yield from check_masks(list(voc_masks(root).values()), voc_classes(root))


def check_coco(root):
    """Rows (what, count, remark)."""
    for split in ("train", "val"):
        file = coco_file(root, split)
        folder, (classes, entries) = coco_folder(file), read_coco(file)
        there, counts = len(stems(folder, PICTURES)), COCO_PICTURES if len(classes) == 80 else {}
        yield folder.name, there, remark(there, counts.get(folder.name), COCO_PAGE)
        annotated = sum(text != "[]" for *_, text in entries.values())
        yield f"{file.name}", len(entries), f"{annotated} with objects, {len(classes)} classes"
        made = len(stems(root / "masks" / folder.name))
        yield f"masks/{folder.name}", made, "made so far; the others when they are first asked for"


def check_context(root):
    """Rows (what, count, remark)."""
    root = voc_root(root, "VOC2010", CONTEXT_PAGE)
    for folder, count in (("JPEGImages", None), ("SegmentationClassContext", 10103), ("scribbles", None)):
        there = len(stems(root / folder, (".xml", *PICTURES)))
        yield folder, there, remark(there, count, "optional" if folder == "scribbles" else CONTEXT_PAGE)
    for which, count in (("train", 4998), ("val", 5105)):
        there = len(context_names(root, which))
        yield which, there, remark(there, count)
    yield from check_masks(list(stems(root / "SegmentationClassContext").values()), CONTEXT_CLASSES)


def check_workpiece(root):
    """Rows (what, count, remark)."""
    classes = read_classes(root / "classes.txt")
    yield "classes.txt", len(classes), few(classes)
    for split in splits_of("workpiece", root):
        for part in ("images", "masks", "instances", "scribbles"):
            there = len(stems(root / split / part, PICTURES))
            yield f"{split}/{part}", there, remark(there, None, "" if part == "images" else "optional")
        for part in ("tags.json", "boxes.json", "points.json"):
            there = len(read_json(root / split / part))
            yield f"{split}/{part}", there, remark(there, None, "optional")
        yield from check_masks(list(stems(root / split / "masks").values()), classes)


def check_masks(files, classes):
    """The row about the values in the first 50 masks, runs joined: 0..3, 255."""
    if not files: return
    values = sorted(set().union(*(np.unique(read_label(path)).tolist() for path in files[:50])))
    runs = np.split(np.array(values), np.flatnonzero(np.diff(values) > 1) + 1)
    listed, verdict = few([f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]), "ok"
    try: read_values(files, classes)
    except DataError as error: verdict = f"wrong: {error}"
    yield f"values in {min(50, len(files))} masks", listed, verdict


def score(pred: Path, data: Name, root: str = "", split: Literal["val", "train"] = "val",
          train_list: str = "train") -> None:
    """mIoU of a folder of label maps <name>.png, whoever made them; 255 = no label counts as a miss."""
    from common import confusion_of
    args = types.SimpleNamespace(data=data, root=root, train_list=train_list, supervision="image")
    truth, files = load(args, split, masks=True, fields=("mask",)), stems(pred)
    if "mask" not in truth.fields: raise DataError(f"not all {split} pictures have a mask to score with")
    require(truth.names, files, pred, f"each {split} picture needs its label map there")
    confusion = confusion_of(truth, lambda s: read_label(files[s.name], truth.classes, s.image))
    rows = confusion.iou() | {"mIoU": confusion.miou(), "precision": confusion.precision(),
                              "coverage": confusion.coverage()}
    for name, value in rows.items(): print(f"{name:<24}{'not there' if value is None else f'{value:9.2f}'}")


def export(data: Name, layout: Literal["voc", "coco", "workpiece", "cityscapes", "gta5"], to: str,
           n: int = 0, root: str = "") -> None:
    """Write a data set in another's on-disk layout, the first n samples of each split (0 = all)."""
    args = types.SimpleNamespace(data=data, root=root, train_list="train", supervision="full")
    splits = splits_of(data, root or f"data/{data}")
    if layout == "gta5": splits = ("rendered",) if "rendered" in splits else ("train",)
    elif layout != "workpiece": splits = [split for split in splits if split != "rendered"]
    if not splits: raise DataError(f"{data} has rendered pictures alone; give --layout workpiece or gta5")
    datasets = {split: load(args, split) for split in splits}
    bare = [split for split, dataset in datasets.items() if "mask" not in dataset.fields]
    if bare: raise DataError(f"not all {bare[0]} pictures have a mask; an export needs them")
    twice = sorted(set.intersection(*(set(dataset.names) for dataset in datasets.values())))
    if layout == "voc" and twice:
        raise DataError(f"train and val both have {few(twice)}, and VOC keeps all pictures in one folder; "
                        "rename those of one")
    for split, dataset in datasets.items():
        count = min(n or len(dataset), len(dataset))
        LAYOUTS[layout](Path(to), split, dataset.classes, (dataset[i] for i in range(count)))
        print(f"{to}: {count} {split} samples in the {layout} layout")


def write_labels(root, s, folders):
    """Palette PNGs of those label maps that the sample has; folders {folder: field}."""
    from common import save_label
    for folder, key in folders.items():
        if hasattr(s, key):
            (root / folder).mkdir(parents=True, exist_ok=True)
            save_label(root / folder / f"{s.name}.png", getattr(s, key))


def export_workpiece(to, split, classes, samples):
    """See class Workpiece."""
    (to / split / "images").mkdir(parents=True, exist_ok=True)
    (to / "classes.txt").write_text("\n".join(classes) + "\n")
    tables = {"tags": {}, "boxes": {}, "points": {}}
    for s in samples:
        Image.fromarray(s.image).save(to / split / "images" / f"{s.name}.png")
        write_labels(to / split, s, {"masks": "mask", "instances": "instances", "scribbles": "scribble"})
        tables["tags"][s.name] = [classes[k] for k in np.flatnonzero(s.tags)]
        for key, rows in (("boxes", s.boxes), ("points", s.points)):
            tables[key][s.name] = [[classes[int(k) - 1], *map(float, at)] for k, *at in rows]
    for key, table in tables.items():
        (to / split / f"{key}.json").write_text(json.dumps(table, indent=1))


def export_voc(to, split, classes, samples):
    """See class VOC. Every mask stands in SegmentationClassAug too, so that train_aug is the train list."""
    root = to / "VOC2012"
    for part in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "points"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    names, clicks = [], read_json(root / VOC_CLICKS)
    for s in samples:
        names.append(s.name)
        Image.fromarray(s.image).save(root / "JPEGImages" / f"{s.name}.jpg", quality=95)
        write_labels(root, s, {"SegmentationClass": "mask", "SegmentationClassAug": "mask",
                               "SegmentationObject": "instances", "scribbles": "scribble"})
        (root / "Annotations" / f"{s.name}.xml").write_text(voc_xml(s, classes))
        clicks[s.name] = [{"x": x, "y": y, "cls": int(k), "rank": s.points[:i + 1, 0].tolist().count(k)}
                          for i, (k, x, y) in enumerate(s.points.tolist())]
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / VOC_CLICKS).write_text(json.dumps(clicks, indent=1))


def voc_xml(s, classes):
    """A sample's size and boxes as VOC writes them: inclusive, counted from 1."""
    names = [escape(name) for name in classes]
    objects = "".join(
        f"  <object>\n    <name>{names[int(k) - 1]}</name>\n    <difficult>0</difficult>\n    <bndbox>"
        f"<xmin>{x0 + 1:g}</xmin><ymin>{y0 + 1:g}</ymin><xmax>{x1:g}</xmax><ymax>{y1:g}</ymax></bndbox>\n"
        "  </object>\n"
        for k, x0, y0, x1, y1 in s.boxes)
    height, width = s.image.shape[:2]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n  <filename>{escape(s.name)}.jpg</filename>\n  {size}\n{objects}</annotation>\n"


def export_coco(to, split, classes, samples):
    """See class COCO; category ids are 1..K. What is 255 in a mask is no object, so it becomes background."""
    folder, table = to / f"{split}2017", {"images": [], "annotations": []}
    for path in (folder, to / "annotations"): path.mkdir(parents=True, exist_ok=True)
    for number, s in enumerate(samples, 1):
        Image.fromarray(s.image).save(folder / f"{s.name}.jpg", quality=95)
        height, width = s.image.shape[:2]
        table["images"].append({"id": number, "file_name": f"{s.name}.jpg", "height": height, "width": width})
        table["annotations"] += [{"id": len(table["annotations"]) + i, "image_id": number, **a}
                                 for i, a in enumerate(coco_annotations(s), 1)]
    table["categories"] = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    (to / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(table))


def street_ids(s, classes):
    """The label map of a sample as Cityscapes' labelIds: our 0..K become trainIds, background "road"."""
    if len(classes) > 18 and (s.mask == 0).any():
        raise DataError(f"{len(classes)} classes and background do not fit into Cityscapes' 19")
    first = int(len(classes) <= 18)                                 # 19 classes have no background
    return np.array([*STREET_IDS, *[0] * 237])[np.where(s.mask == 255, 255, s.mask.astype(int) - 1 + first)]


def export_cityscapes(to, split, classes, samples):
    """See class Cityscapes. Numbers stay, names do not: background is the first class, "road"."""
    for s in samples:
        city, end = s.name.split("_")[0], s.name.removesuffix("_leftImg8bit")
        for part in ("leftImg8bit", "gtFine"): (to / part / split / city).mkdir(parents=True, exist_ok=True)
        Image.fromarray(s.image).save(to / "leftImg8bit" / split / city / f"{end}_leftImg8bit.png")
        ids = Image.fromarray(street_ids(s, classes).astype(np.uint8))
        ids.save(to / "gtFine" / split / city / f"{end}_gtFine_labelIds.png")


def export_gta5(to, split, classes, samples):
    """See class GTA5; labels in its two forms in turn, index PNG and colours; numbers stay."""
    for part in ("images", "labels"): (to / part).mkdir(parents=True, exist_ok=True)
    colours = np.array([entry[1:] for entry in STREET], np.uint8)
    for i, s in enumerate(samples):
        Image.fromarray(s.image).save(to / "images" / f"{s.name}.png")
        ids = street_ids(s, classes).astype(np.uint8)
        label = Image.fromarray(colours[ids] if i % 2 else ids)
        if i % 2 == 0: label.putpalette(colours.ravel().tolist())
        label.save(to / "labels" / f"{s.name}.png")


def voc_aug(sbd: str, root: str = "data/voc") -> None:
    """Make SegmentationClassAug from SBD's cls/*.mat; pictures of VOC's own train and val keep VOC's mask."""
    from common import save_label
    from scipy.io import loadmat
    from tqdm import tqdm
    root = voc_root(Path(root))
    folders = [Path(sbd) / part for part in ("", "cls", "dataset/cls", "benchmark_RELEASE/dataset/cls")]
    mats = next((found for folder in folders if (found := stems(folder, (".mat",)))), {})
    if not mats: raise DataError(f"no cls/*.mat in {sbd}; give SBD's folder benchmark_RELEASE as --sbd")
    own, target = stems(root / "SegmentationClass"), root / "SegmentationClassAug"
    part = target.with_name(f"{target.name}.part")                        # renamed when it is complete
    part.mkdir(exist_ok=True)
    for name in tqdm(sorted({*mats, *own}), desc="SegmentationClassAug"):
        if name in own:
            label = read_label(own[name], len(VOC_CLASSES))
        else:
            with reading(mats[name], "SBD label", "unpack SBD again"):
                fields = loadmat(mats[name], squeeze_me=True, struct_as_record=False)
                label = np.asarray(fields["GTcls"].Segmentation, np.uint8)
        save_label(part / f"{name}.png", label)
    if target.is_dir(): shutil.rmtree(target)
    part.rename(target)
    count = len(voc_names(root, "train_aug"))
    print(f"{target}: {len({*mats, *own})} masks; train_aug now has {count} pictures (expected 10582)")


CHECKS = {"shapes": check_shapes, "voc": check_voc, "coco": check_coco, "context": check_context,
          "workpiece": check_workpiece, "solids": check_solids, "cityscapes": check_cityscapes,
          "gta5": check_gta5}
LAYOUTS = {"voc": export_voc, "coco": export_coco, "workpiece": export_workpiece,
           "cityscapes": export_cityscapes, "gta5": export_gta5}


def main():
    import tyro
    if sys.argv[1:2] in ([], ["-h"], ["--help"]): print(__doc__)    # tyro would join the lines
    commands = {"check": check, "export": export, "score": score, "voc-aug": voc_aug}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description="")
    except DataError as error:
        sys.exit(f"data.py: {error}")
    except OSError as error:
        sys.exit(f"data.py: {error.filename or 'a file'}: {error.strerror}; make room, or give a folder that "
                 "can be written to")


if __name__ == "__main__":
    main()
