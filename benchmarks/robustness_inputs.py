"""The corpus of bad inputs behind `python benchmarks/robustness.py inputs` and tests/test_robustness.py.

A case spoils one thing (a file of a small data set, a checkpoint, a flag, a folder to write to) and does what
a user would do next. Expected: it ends with a status other than 0 and a message that names the file or the
flag and says what to do, without a traceback; nothing half-written stays behind, and a pickle that carries a
command is not executed. Data cases go through data.load and read every sample; the others call a file's
main() with a command line. What would reach the interpreter goes through the sys.excepthook that every file
installs.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import common
import data
from robustness import TINY, write

METHODS = list(TINY)
REMEDY = re.compile(r"\b(add|allowed|check|choose|convert|correct|delete|get|give|install|lower|make|mend|"
                    r"need(s|ed)|only|save|put|take|there is|this file has|use|wait|write|helptext)\b", re.I)


class Case(NamedTuple):
    """spoil(place) makes the mistake in a folder of its own, act(place) does what a user does then.

    names: regular expression of what the message must name. kept: of files that may be new afterwards.
    """
    group: str
    title: str
    spoil: Callable
    act: Callable
    names: str
    kept: str = "$^"


# ── What is spoilt ────────────────────────────────────────────────────────────────────────────────


def layouts():
    """Functions that write two training and two val scenes in each layout."""
    def write_as(layout):
        return lambda to: data.export("shapes", layout, str(to), n=2)
    return {layout: write_as(layout) for layout in ("workpiece", "voc", "coco", "cityscapes", "gta5")}


@functools.cache
def master(layout):
    """The unspoilt data set, written once."""
    folder = Path(tempfile.mkdtemp(prefix="robustness-")) / layout
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()): layouts()[layout](folder)
    return folder


def put(content):
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file):
    """The first half of a file."""
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def swap(old, new):
    """Replaces the first place where a regular expression fits."""
    def spoil(file):
        text, count = re.subn(old, new, file.read_text(), count=1, flags=re.S)
        assert count == 1, f"{old} is not in {file}"
        file.write_text(text)
    return spoil


def table(change):
    """Changes a JSON file's content in place."""
    def spoil(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return spoil


def first_row(change):
    """Changes the rows of train_0000 in a table {name: rows}."""
    return table(lambda content: content.update(train_0000=change(content["train_0000"])))


def pixels(value, mode=None):
    """A PNG like the one that is there, with other values. value: number, or function of the old array."""
    def spoil(file):
        with Image.open(file) as old: array = np.array(old)
        new = value(array) if callable(value) else np.full_like(array, value)
        Image.fromarray(new, mode).save(file)
    return spoil


def folder_instead(file):
    file.unlink()
    file.mkdir()


def link_to_nothing(file):
    file.unlink()
    file.symlink_to("nowhere")


def huge(file):
    """A PNG that says it has 60,000 x 60,000 pixels."""
    import struct
    import zlib
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, b"IDAT")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


BOMB = "".join(['<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">',
                *(f'<!ENTITY {x} "{f"&{y};" * 10}">' for y, x in zip("abcdefgh", "bcdefghi")),
                "]><annotation>&i;</annotation>"])
PIC, MASK = "train/images/train_0000.png", "train/masks/train_0000.png"
XML, JPG = "VOC2012/Annotations/train_0000.xml", "VOC2012/JPEGImages/train_0000.jpg"
CLICKS, STROKE = "VOC2012/points/whats_the_point.json", "VOC2012/scribbles/train_0000.xml"
COCO, COCO_JPG = "annotations/instances_train2017.json", "train2017/train_0000.jpg"
CITY = "gtFine/train/train/train_0000_gtFine_labelIds.png"

# layout, title, file that is spoilt, how, what the message must name
DATA = [
    ("workpiece", "picture: cut short", PIC, cut, "train_0000.png"),
    ("workpiece", "picture: zero bytes", PIC, put(""), "train_0000.png"),
    ("workpiece", "picture: text", PIC, put("hello"), "train_0000.png"),
    ("workpiece", "picture: a folder", PIC, folder_instead, "train_0000.png"),
    ("workpiece", "picture: a link to nothing", PIC, link_to_nothing, "train_0000.png"),
    ("workpiece", "picture: 60,000 x 60,000", PIC, huge, "train_0000.png"),
    ("workpiece", "picture: 16 bits", PIC, pixels(lambda a: a[..., 0].astype(np.uint16) * 257),
     "train_0000.png"),
    ("workpiece", "picture: other size than its mask", PIC, pixels(lambda a: a[:-3]), "train_0000.png"),
    ("voc", "picture: JPEG cut short", JPG, cut, "train_0000.jpg"),
    ("voc", "picture: zero bytes, JPEG", JPG, put(""), "train_0000.jpg"),
    ("voc", "picture: missing", JPG, Path.unlink, "train_0000"),
    ("voc", "picture: CMYK JPEG of another size", JPG,
     lambda file: Image.new("CMYK", (50, 40)).save(file), "train_0000.(xml|png)"),
    ("workpiece", "mask: class 9 of 8", MASK, pixels(9), "train_0000.png"),
    ("workpiece", "mask: class 254", MASK, pixels(254), "train_0000.png"),
    ("workpiece", "mask: RGB", MASK, pixels(lambda a: np.stack([a] * 3, -1)), "train_0000.png"),
    ("workpiece", "mask: RGBA", MASK, pixels(lambda a: np.stack([a] * 4, -1)), "train_0000.png"),
    ("workpiece", "mask: grey with alpha", MASK, pixels(lambda a: np.stack([a] * 2, -1)), "train_0000.png"),
    ("workpiece", "mask: 16 bits", MASK, pixels(lambda a: a.astype(np.uint16) + 1000), "train_0000.png"),
    ("workpiece", "mask: black and white, soft edges", MASK,
     pixels(lambda a: np.where(np.arange(a.size).reshape(a.shape) % 7, 255, 130).astype(np.uint8)),
     "train_0000.png"),
    ("workpiece", "mask: wrong size", MASK, pixels(lambda a: a[:-3]), "train_0000.png"),
    ("workpiece", "mask: cut short", MASK, cut, "train_0000.png"),
    ("workpiece", "mask: zero bytes", MASK, put(""), "train_0000.png"),
    ("workpiece", "mask: missing", MASK, Path.unlink, "train_0000"),
    ("workpiece", "instances: wrong size", MASK.replace("masks", "instances"), pixels(lambda a: a[1:]),
     "instances.train_0000.png"),
    ("workpiece", "scribble: class 77", MASK.replace("masks", "scribbles"), pixels(77),
     "scribbles.train_0000.png"),
    ("cityscapes", "mask: labelId 99", CITY, pixels(99), "train_0000_gtFine"),
    ("cityscapes", "mask: wrong size", CITY, pixels(lambda a: a[2:]), "train_0000_gtFine"),
    ("gta5", "mask: a colour of no class", "labels/train_0001.png", pixels(77), "train_0001.png"),
    ("voc", "XML: cut short", XML, cut, "train_0000.xml"),
    ("voc", "XML: zero bytes", XML, put(""), "train_0000.xml"),
    ("voc", "XML: a class that is not listed", XML, swap("<name>.*?</name>", "<name>zebra</name>"), "zebra"),
    ("voc", "XML: no box", XML, swap("<bndbox>.*?</bndbox>", ""), "train_0000.xml"),
    ("voc", "XML: no name", XML, swap("<name>.*?</name>", ""), "train_0000.xml"),
    ("voc", "XML: a box outside", XML, swap("<xmax>.*?</xmax>", "<xmax>9999</xmax>"), "train_0000.xml"),
    ("voc", "XML: a box inside out", XML, swap("<xmin>.*?</xmin>", "<xmin>90</xmin>"), "train_0000.xml"),
    ("voc", "XML: words for numbers", XML, swap("<ymin>.*?</ymin>", "<ymin>top</ymin>"), "train_0000.xml"),
    ("voc", "XML: not a number", XML, swap("<ymin>.*?</ymin>", "<ymin>nan</ymin>"), "train_0000.xml"),
    ("voc", "XML: entities that multiply", XML, put(BOMB), "train_0000.xml"),
    ("voc", "XML: missing", XML, Path.unlink, "train_0000"),
    ("voc", "scribble XML: broken", STROKE, put("<annotation><polygon>"), "train_0000.xml"),
    ("voc", "scribble XML: unknown tag", STROKE, put(
        "<annotation><polygon><tag>zebra</tag><point><X>1</X><Y>1</Y></point></polygon></annotation>"),
     "zebra"),
    ("voc", "points: broken JSON", CLICKS, cut, "whats_the_point.json"),
    ("voc", "points: words for numbers", CLICKS, first_row(lambda rows: [{**rows[0], "cls": "cat"}]),
     "whats_the_point.json"),
    ("voc", "points: no class", CLICKS, first_row(lambda rows: [{"x": 1, "y": 1}]), "whats_the_point.json"),
    ("workpiece", "JSON: broken", "train/tags.json", put("{"), "tags.json"),
    ("workpiece", "JSON: a list", "train/tags.json", put("[1, 2]"), "tags.json"),
    ("workpiece", "JSON: null for tags", "train/tags.json", first_row(lambda rows: None), "tags.json"),
    ("workpiece", "JSON: a number for tags", "train/tags.json", first_row(lambda rows: 3), "tags.json"),
    ("workpiece", "JSON: an unknown tag", "train/tags.json", first_row(lambda rows: ["zebra"]), "tags.json"),
    ("workpiece", "JSON: a picture without tags", "train/tags.json",
     table(lambda t: t.pop("train_0000")), "train_0000"),
    ("workpiece", "JSON: words for a box", "train/boxes.json",
     first_row(lambda rows: [[rows[0][0], "a", 1, 2, 3]]), "boxes.json"),
    ("workpiece", "JSON: a box of three numbers", "train/boxes.json",
     first_row(lambda rows: [rows[0][:4]]), "boxes.json"),
    ("workpiece", "JSON: a box outside", "train/boxes.json",
     first_row(lambda rows: [[rows[0][0], 0, 0, 5000, 9]]), "boxes.json"),
    ("workpiece", "JSON: null for boxes", "train/boxes.json", first_row(lambda rows: None), "boxes.json"),
    ("workpiece", "JSON: a point outside", "train/points.json",
     first_row(lambda rows: [[rows[0][0], -50, 9]]), "points.json"),
    ("coco", "JSON: broken", COCO, cut, "instances_train2017.json"),
    ("coco", "JSON: a list", COCO, put("[]"), "instances_train2017.json"),
    ("coco", "JSON: no categories", COCO, table(lambda t: t.pop("categories")), "instances_train2017.json"),
    ("coco", "JSON: unknown category", COCO, table(lambda t: t["annotations"][0].update(category_id=99)),
     "instances_train2017.json"),
    ("coco", "JSON: an annotation of no picture", COCO,
     table(lambda t: t["annotations"][0].update(image_id=99)),
     "instances_train2017.json"),
    ("coco", "JSON: no bbox", COCO, table(lambda t: t["annotations"][0].pop("bbox")),
     "instances_train2017.json"),
    ("coco", "JSON: null for a bbox", COCO, table(lambda t: t["annotations"][0].update(bbox=None)),
     "instances_train2017.json"),
    ("coco", "JSON: a bbox outside", COCO, table(lambda t: t["annotations"][0].update(bbox=[900, 9, 9, 9])),
     "instances_train2017.json"),
    ("coco", "JSON: RLE of another size", COCO,
     table(lambda t: t["annotations"][0]["segmentation"].update(size=[3, 3])), "instances_train2017.json"),
    ("coco", "JSON: RLE of nothing", COCO,
     table(lambda t: t["annotations"][0].update(segmentation={"size": [1, 2]})), "instances_train2017.json"),
    ("coco", "JSON: words for a polygon", COCO,
     table(lambda t: t["annotations"][0].update(segmentation=[["a"] * 6])), "instances_train2017.json"),
    ("coco", "JSON: no height", COCO, table(lambda t: t["images"][0].pop("height")),
     "instances_train2017.json"),
    ("coco", "JSON: no annotation at all", COCO, table(lambda t: t.update(annotations=[])),
     "instances_train2017.json"),
    ("coco", "picture: other size than in the JSON", COCO_JPG,
     lambda file: Image.new("RGB", (50, 40)).save(file), "train_0000.jpg"),
    ("coco", "picture: missing", COCO_JPG, Path.unlink, "train_0000"),
    ("workpiece", "classes.txt: empty", "classes.txt", put(""), "classes.txt"),
    ("workpiece", "classes.txt: one name twice", "classes.txt", put("a\na\n"), "classes.txt"),
    ("workpiece", "classes.txt: 300 names", "classes.txt", put("\n".join(map(str, range(300)))),
     "classes.txt"),
    ("workpiece", "classes.txt: binary", "classes.txt", put(b"\xff\xfe\x00"), "classes.txt"),
    ("workpiece", "classes.txt: missing", "classes.txt", Path.unlink, "classes.txt"),
    ("workpiece", "classes.txt: too few for the masks", "classes.txt", put("oval-fin\n"), "train"),
    ("workpiece", "folder: no val", "val", shutil.rmtree, "val"),
    ("voc", "folder: no annotations", "VOC2012/Annotations", shutil.rmtree, "Annotations"),
    ("voc", "list: missing", "VOC2012/ImageSets/Segmentation/val.txt", Path.unlink, "val.txt"),
    ("voc", "list: empty", "VOC2012/ImageSets/Segmentation/val.txt", put("\n"), "val.txt"),
    ("voc", "list: binary", "VOC2012/ImageSets/Segmentation/val.txt", put(b"\xff\xfe\x00"), "val.txt"),
    ("voc", "list: unknown names", "VOC2012/ImageSets/Segmentation/val.txt", put("nobody\n"), "nobody"),
]


def read_everything(layout):
    """Loads both splits with all that the files hold and reads every sample."""
    def act(place):
        args = types.SimpleNamespace(data=layout, root=str(place), train_list="train", supervision="full")
        for split in ("train",) if layout == "gta5" else ("train", "val"):
            dataset = data.load(args, split, masks=True)
            for i in range(len(dataset)): dataset[i]
    return act


def data_cases():
    for layout, title, file, spoil, names in DATA:
        def prepare(place, layout=layout, file=file, spoil=spoil):
            shutil.copytree(master(layout), place, dirs_exist_ok=True)
            if layout == "voc" and file == STROKE: (place / STROKE).with_suffix(".png").unlink()
            spoil(place / file)
        yield Case("data", f"{layout}, {title}", prepare, read_everything(layout), names, kept=r"masks/")
    for layout in ("voc", "coco", "context", "workpiece", "cityscapes", "gta5"):
        yield Case("data", f"{layout}, folder: empty", nothing, read_everything(layout),
                   "JPEGImages|instances_|train|images|root")


# ── Command lines ─────────────────────────────────────────────────────────────────────────────────


def nothing(place):
    pass


class Folders(dict):
    """{place} in a command line is the case's folder, {voc} the unspoilt data set in that layout."""

    def __missing__(self, layout):
        return master(layout)


def call(method, *words):
    """main() of a file with a command line, in which Folders are filled in."""
    def act(place):
        old = sys.argv
        sys.argv = [f"{method}.py", *(str(word).format_map(Folders(place=place)) for word in words)]
        try: importlib.import_module(method).main()
        finally: sys.argv = old
    return act


def cian(*words):
    """cian.py on the small data set, with further flags."""
    tiny = TINY["cian"].split()[4:]
    return call("cian", *tiny, "--device", "cpu", "--workers", 0, "--data", "workpiece", "--root",
                "{workpiece}", "--out", "{place}/out", *words)


def flag_cases():
    """Flags that do not exist, are of the wrong type or can not be: nothing may be written."""
    lines = ["--no-such-flag 1", "--seed many", "--seed -1", "--seg-steps 2.5", "--seg-steps -4",
             "--seg-batch 0", "--seg-batch 3", "--cam-batch -2", "--seg-crop 0", "--log-every 0",
             "--save-every 0", "--workers -1", "--data imagenet", "--supervision boxes", "--device tpu",
             "--device cuda:99", "--preset large", "--backbone alexnet", "--crf best",
             "--weights {place}/none.pt", "--weights imagenet", "--references 0", "--warmup 99",
             "--strong-ratio 2", "--root {place}/none", "--saliency {place}/none",
             "--train-list {place}/none.txt", "--backbone tiny --seg-stride 3", "--out"]
    for line in lines:
        flag = line.split()[-2] if len(line.split()) > 1 else line
        names = {"--weights": "weights|tiny", "--root": "none", "--train-list": "none.txt",
                 "--saliency": "none", "--backbone": "alexnet", "--seg-stride": "stride"}.get(flag, flag)
        yield Case("flags", line.replace("{place}/", ""), nothing, cian(*line.split()), names)
    for method in METHODS:
        yield Case("flags", f"{method}.py --predict without --checkpoint", nothing,
                   call(method, "--predict", "{place}"), "--checkpoint")
    for words, names in ((("check", "--data", "voc", "--root", "{place}/none"), "none"),
                         (("check", "--data", "imagenet"), "--data"),
                         (("voc-aug", "--sbd", "{place}/none", "--root", "{voc}"), "none"),
                         (("export", "--data", "shapes"), "--layout|--to")):
        yield Case("flags", f"data.py {' '.join(map(str, words[:3]))}".replace("{place}/", ""), nothing,
                   call("data", *words), names)


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────


class Command:
    """Unpickled by an unwary program, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def save(content):
    """Spoils by writing a checkpoint; content may be a function of the case's folder."""
    def spoil(place):
        torch.save(content(place) if callable(content) else content, place / "x.pt")
    return spoil


def raw_pickle(place):
    import pickle
    (place / "x.pt").write_bytes(pickle.dumps({"model": Command(place / "executed")}))


def args_of(method):
    return common.plain_fields(importlib.import_module(method).Args())


def then_cut(place):
    save({"model": {"w": torch.zeros(99)}})(place)
    cut(place / "x.pt")


def checkpoint_cases():
    predict = ("--predict", "{workpiece}/val/images", "--checkpoint", "{place}/x.pt")
    weights = ("--backbone", "resnet18", "--weights", "{place}/x.pt")
    wicked = save(lambda place: {"model": Command(place / "executed")})
    files = {"cut short": then_cut, "random bytes": lambda p: (p / "x.pt").write_bytes(bytes(range(256)) * 9),
             "zero bytes": lambda p: (p / "x.pt").touch(), "a folder": lambda p: (p / "x.pt").mkdir(),
             "a picture": lambda p: Image.new("L", (9, 9)).save(p / "x.pt", "PNG"),
             "missing": nothing, "a pickle that carries a command": wicked,
             "an old pickle that carries a command": raw_pickle,
             "a list": save([torch.zeros(2)]), "a tensor": save(torch.zeros(2))}
    for title, spoil in files.items():
        yield Case("checkpoints", f"--checkpoint: {title}", spoil, call("cian", *predict), "x.pt")
        yield Case("checkpoints", f"--weights: {title}", spoil, cian(*weights), "x.pt")
    alone = {"model": {"affinity.phi_q.weight": torch.zeros(1)}}
    yield Case("checkpoints", "--checkpoint: no args", save(alone), call("cian", *predict), "x.pt")
    yield Case("checkpoints", "--weights: other keys", save({"w": torch.zeros(2)}), cian(*weights), "x.pt")
    shapes = {"conv1.weight": torch.zeros(2)}
    yield Case("checkpoints", "--weights: other shapes", save(shapes), cian(*weights), "x.pt")
    yield Case("checkpoints", "--weights: broken MXNet file",
               lambda p: (p / "x.params").write_bytes(bytes(99)),
               lambda p: common.read_mxnet(p / "x.params"), "x.params")
    keys = ("head.branches.0.weight", "head.4.weight", "classify.weight", "affinity.phi_q.weight",
            "reduce_query.0.weight", "classification.classifier.weight")
    for i, method in enumerate(METHODS):
        other = METHODS[i - 1]
        model = {key: torch.zeros(3, 1) for key in keys}
        spoil = save(lambda p, other=other, model=model: {"model": model, "args": args_of(other)})
        support = ("--support-images", "a.png", "--support-masks", "a.png") if method == "scl" else ()
        yield Case("checkpoints", f"{method}.py with a checkpoint of {other}.py", spoil,
                   call(method, *predict, *support), "x.pt.*another method")


# ── Folders to write to, runs to take from ────────────────────────────────────────────────────────


def held(act):
    """What a user does while another process writes to out/."""
    def do(place):
        (place / "out").mkdir()
        hold = ("import fcntl; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
                "print(1, flush=True); input()")
        with subprocess.Popen([sys.executable, "-c", hold], cwd=place / "out", stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            try: act(place)
            finally: other.communicate(b"\n")
    return do


def full(size):
    """What a user does when no file can become larger than `size` bytes, as on a full disk."""
    def limited(act):
        def do(place):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try: act(place)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return do
    return limited


def write_to_full_device(place):
    """The kernel's own "no space left on device", while a file is written under its temporary name."""
    with common.atomic(place / "labels.png") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")


def run_of(**changes):
    """A folder `reused` and a folder `out` with the args.json of a run."""
    def spoil(place):
        fields = {**args_of("cian"), **changes}
        for name in ("out", "reused"):
            (place / name).mkdir()
            (place / name / "args.json").write_text(json.dumps(fields))
    return spoil


def broken_json(name):
    def spoil(place):
        (place / name).mkdir()
        (place / name / "args.json").write_text('{"lr": ')
    return spoil


def folder_cases():
    made = r"^out(/(\.lock|args.json|state.json|log.jsonl|events.*))?$"      # a run that has begun
    yield Case("folders", "--out is a file", lambda p: (p / "out").touch(), cian(), "--out .*out")
    yield Case("folders", "--out below a file", lambda p: (p / "f").touch(), cian("--out", "{place}/f/g"),
               "--out")
    yield Case("folders", "--out can not be made", nothing, cian("--out", "/proc/run"), "--out /proc/run")
    yield Case("folders", "--out that nobody may write to", nothing, cian("--out", "/proc/self"), "--out")
    yield Case("folders", "--out made with other arguments", run_of(cam_lr=7), cian(), "out was made.*cam_lr",
               made)
    yield Case("folders", "--out with a broken args.json", broken_json("out"), cian(), "args.json", made)
    yield Case("folders", "--out in use by another process", nothing, held(cian()), "out: another", made)
    yield Case("folders", "--reuse: no run", nothing, cian("--reuse", "{place}/none"), "--reuse")
    yield Case("folders", "--reuse: a file", lambda p: (p / "f").touch(), cian("--reuse", "{place}/f"),
               "--reuse")
    yield Case("folders", "--reuse: broken args.json", broken_json("reused"),
               cian("--reuse", "{place}/reused"), "args.json")
    yield Case("folders", "disk full: a label map", nothing, write_to_full_device, "labels.png")
    yield Case("folders", "disk full: args.json", nothing, full(50)(cian()), "out.*json", made)
    yield Case("folders", "disk full: a checkpoint", nothing, full(60_000)(cian()), "classifier.pt", made)
    for method in METHODS:
        yield Case("folders", f"{method}.py --predict: empty folder", *empty_prediction(method), "--predict")


def empty_prediction(method):
    """(spoil, act): a good checkpoint, and a folder without pictures."""
    keys = {"a2gnn": "head.branches.0.weight", "irnet": "head.branches.0.weight",
            "lpg": "head.branches.0.weight", "dfr": "classify.weight", "cian": "head.branches.0.weight",
            "scl": "reduce_query.0.weight", "selftrain_workpiece": "head.4.weight"}

    def spoil(place):
        (place / "none").mkdir()
        model, module = {keys.get(method): torch.zeros(9, 1)}, importlib.import_module(method)
        made = module.Args(**getattr(module, "SHAPES", {})) if method == "rrm" else module.Args()
        if method == "rrm":                                     # makes the network first
            model = module.make_rrm(made, "none", 8).state_dict()
        torch.save({"model": model, "args": common.plain_fields(made)}, place / "x.pt")

    support = ("--support-images", "a.png", "--support-masks", "a.png") if method == "scl" else ()
    return spoil, call(method, "--predict", "{place}/none", "--checkpoint", "{place}/x.pt", "--device", "cpu",
                       *support)


# ── The judge ─────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Answer:
    case: Case
    status: int
    message: str
    faults: list


def cases():
    return [*data_cases(), *flag_cases(), *checkpoint_cases(), *folder_cases()]


def ending(act, place):
    """(exit status, what a user reads at the end); output before the end is not part of it."""
    said, hook = io.StringIO(), sys.excepthook
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            act(place)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str): return status, end.code
        except BaseException as error:
            status, said = 1, io.StringIO()
            with contextlib.redirect_stderr(said):
                common.short_errors(type(error), error, error.__traceback__)
    sys.excepthook = hook
    return status, said.getvalue().strip()


def contents(place):
    return {str(path.relative_to(place)) for path in place.rglob("*")} if place.is_dir() else set()


def answer(case, place):
    """Runs one case in an empty folder."""
    case.spoil(place)
    before = contents(place)
    status, message = ending(case.act, place)
    plain = re.sub(r"([╭─╮│╰╯\s]|---+)+", " ", message).strip()
    box = "helptext" in plain                                   # tyro's messages about flags
    new = sorted(name for name in contents(place) - before if not re.search(case.kept, name))
    faults = [*(["exit status 0"] * (status == 0)), *(["a traceback"] * ("Traceback" in message)),
              *(["names nothing"] * (not re.search(case.names, plain))),
              *(["no remedy"] * (not REMEDY.search(plain))),
              *(["more than a line"] * (len(message.splitlines()) > 1 and not box)),
              *(["too long"] * (len(plain) > 600)), *(f"left behind: {name}" for name in new)]
    masters = rf"{re.escape(tempfile.gettempdir())}/robustness-[^/ ]+"
    message = re.sub(rf"{masters}|{re.escape(str(place))}", "…", plain)
    return Answer(case, status, message, faults)


def answers(chosen=None):
    """The corpus' answers, one after the other."""
    for case in chosen or cases():
        with tempfile.TemporaryDirectory(prefix="robustness-") as place:
            yield answer(case, Path(place))


def report(file):
    """Writes the JSON table, prints what is wrong and how many passed -> whether all did."""
    began, rows = time.monotonic(), []
    for a in answers():
        rows.append({"group": a.case.group, "case": a.case.title, "status": a.status, "message": a.message,
                     "faults": a.faults})
        if a.faults: print(f"{a.case.group}: {a.case.title}: {', '.join(a.faults)}\n    {a.message[-600:]}")
    good = sum(not row["faults"] for row in rows)
    write(file, {"cases": len(rows), "answered": good, "seconds": round(time.monotonic() - began, 1),
                 "rows": rows})
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        print(f"{group}: {sum(not row['faults'] for row in mine)} of {len(mine)}")
    print(f"{good} of {len(rows)} bad inputs answered well")
    return good == len(rows)
