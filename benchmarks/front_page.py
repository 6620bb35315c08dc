"""Draws one page of pictures from finished runs, one block a method; nothing imports this file.

    python benchmarks/front_page.py --to page.jpg runs/a2gnn-shapes-box-s0 runs/dfr-shapes-scribble-s0
    python benchmarks/front_page.py --to page.png --first 8 --lines 3 runs/irnet-voc-image-s0    # others

A block shows what the run folder holds: a training picture with the labels that its supervision reveals and
the label map that the method made of them (light: no label), then a validation picture with prediction and
ground truth, all cut to their middle squares. Which pictures is up to --first, so runs on the same data show
the same ones. A run of scl.py shows the episodes of its panels/test.png. A method without a run is left out
and named.
"""

import colorsys
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, atomic, read_json
from data import REVEALS, DataError, chosen_classes, load, read_image, read_label, select

TITLES = {"a2gnn": "A2GNN", "rrm": "RRM", "irnet": "IRNet", "cian": "CIAN", "dfr": "DFR", "lpg": "LPG",
          "scl": "SCL", "selftrain_workpiece": "Self-training"}
WORDS = {"image": "image tags", "point": "points", "scribble": "scribbles", "box": "boxes", "full": "masks",
         "semi": "boxes, some masks"}
BESIDE = {"lpg": " + masks of other classes", "selftrain_workpiece": " + rendered pictures",
          "scl": " of other classes, one example"}
LABELS = "pseudo pseudo_3 pseudo_2 pseudo_1 seeds initial".split()      # the last that a method makes, first
PREDICTIONS = "val_two_step_crf val_crf val_3 val".split()
GAP, STRIP, MARGIN, INK, GREY = 4, 40, 12, (20, 20, 20), (110, 110, 110)


class Line(NamedTuple):
    """Pictures that belong together: a caption and a square picture each."""
    captions: list
    cells: list


class Block(NamedTuple):
    """One method: its title, its score, and rows of lines (a training picture, a validation picture)."""
    title: str
    score: str
    rows: list


# ── One cell ────────────────────────────────────────────────────────────────────────────────────────────────
def fit(image, cell):
    """The middle square of a picture, cell x cell pixels.   (H,W,3) uint8 -> PIL picture"""
    side, (height, width) = min(image.shape[:2]), image.shape[:2]
    left, top = (width - side) / 2, (height - side) / 2
    return Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC,
                                         (left, top, left + side, top + side))


def colours():
    """(256,3) uint8, bright and unlike their neighbours: VOC's are dark for pictures as small as these."""
    hues = [colorsys.hsv_to_rgb(0.61803 * k % 1, 0.9 if k % 2 else 0.7, 1.0) for k in range(256)]
    return np.vstack([[[0, 0, 0]], np.round(255 * np.array(hues[1:255])), [[225, 225, 225]]]).astype(np.uint8)


def painted(image, label):
    """The picture under its labels, with their edges; 255 (no label) is light.   -> (H,W,3) uint8"""
    colour, label = colours()[label], np.asarray(label)
    weight = 0.55 * (label != 0)[..., None]
    found = weight * colour + (1 - weight) * image
    inner = ndimage.grey_erosion(label, 3) != ndimage.grey_dilation(label, 3)
    found[inner & (label != 0) & (label != 255)] = colour[inner & (label != 0) & (label != 255)]
    return np.round(found).astype(np.uint8)


def font(size):
    return ImageFont.load_default(size)


def weak_cell(sample, supervision, classes, cell):
    """The training picture with what training may see of it: tags, clicks, strokes, boxes or masks."""
    colour, image = [tuple(map(int, c)) for c in colours()], sample.image
    if supervision == "full":
        image = painted(image, sample.mask)
    if supervision == "scribble":
        image = np.where((sample.scribble != 255)[..., None], colours()[sample.scribble], image)
    square, (height, width) = fit(image, cell), image.shape[:2]
    draw, scale = ImageDraw.Draw(square), cell / min(height, width)
    at = np.array([width - min(height, width), height - min(height, width)]) / 2
    for k, *corners in sample.boxes.tolist() if supervision in ("box", "semi") else ():
        x0, y0, x1, y1 = (scale * (np.reshape(corners, (2, 2)) - at)).ravel()
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour[int(k)], width=2)
    for k, *point in sample.points.tolist() if supervision == "point" else ():
        x, y = scale * (point - at)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour[int(k)], outline="black")
    for i, k in enumerate(np.flatnonzero(sample.tags)[::-1] if supervision == "image" else ()):
        name, y = classes[k], cell - 14 * (i + 1)
        draw.rectangle((0, y, draw.textlength(name, font(11)) + 6, y + 13), fill=colour[k + 1])
        draw.text((3, y), name, fill="black", font=font(11))
    return square


# ── One method ──────────────────────────────────────────────────────────────────────────────────────────────
def method_of(run):
    """Which method file made a run folder, by the command in its results.json."""
    try:
        args, results = (read_json(Path(run) / name) for name in ("args.json", "results.json"))
    except ValueError as error:
        raise UserError(f"{run}: args.json or results.json is broken ({error})") from None
    if not args or not results:
        raise UserError(f"{run} is no finished run: it needs args.json and results.json")
    words = [Path(word).stem for word in results.get("command", "").split() if word.endswith(".py")]
    if not words or words[0] not in TITLES:
        raise UserError(f"{run}: its command {results.get('command')!r} (results.json) names no method file")
    return words[0], types.SimpleNamespace(**args), {row["stage"]: row for row in results.get("stages", [])}


def title_of(method, args):
    return f"{TITLES[method]}: {WORDS.get(args.supervision, args.supervision)}{BESIDE.get(method, '')}"


def first_of(run, folders):
    """The first of these folders of label maps that a run has, or None."""
    return next((name for name in folders if any((Path(run) / name).glob("*.png"))), None)


def pictures(args, run, split, folder, first, lines):
    """[(sample with everything that is known, label map of the run)] of the first pictures that it has."""
    revealed = "box" if args.supervision == "semi" else args.supervision
    args = types.SimpleNamespace(**{**vars(args), "supervision": revealed})
    dataset = load(args, split, masks=True, fields=("mask", *REVEALS[revealed]))
    if getattr(args, "classes", ""):
        dataset = select(dataset, chosen_classes(args.classes, dataset.classes, "--classes"))
    names = [name for name in dataset.names if folder is None or (run / folder / f"{name}.png").is_file()]
    if len(names) < first + lines:
        raise UserError(f"{run} has {len(names)} label maps of {split}, fewer than --first {first} and "
                        f"--lines {lines} need")
    found = []
    for name in names[first:first + lines]:
        sample, file = dataset[dataset.index(name)], run / str(folder) / f"{name}.png"
        found.append((sample, folder and read_label(file, dataset.classes, sample.image)))
    return found, dataset.classes


def segmentation_block(run, method, args, stages, first, lines, cell):
    """Training pictures: weak label, label map, truth. Validation pictures: image, prediction, truth."""
    made, predicted = first_of(run, LABELS), first_of(run, PREDICTIONS)
    if predicted is None:
        raise UserError(f"{run} holds no predictions of validation pictures ({', '.join(PREDICTIONS)})")
    train, classes = pictures(args, run, "train", made, first, lines)
    val, _ = pictures(args, run, "val", predicted, first, lines)
    rows = []
    for (seen, label), (shown, prediction) in zip(train, val):
        maps = [("its labels", label), ("ground truth", getattr(seen, "mask", None))]
        cells = [weak_cell(seen, args.supervision, classes, cell)]
        cells += [fit(painted(seen.image, map), cell) for _, map in maps if map is not None]
        captions = ["training", *(caption for caption, map in maps if map is not None)]
        right = [shown.image, *(painted(shown.image, map) for map in (prediction, shown.mask))]
        rows.append([Line(captions, cells), Line(["validation", "prediction", "ground truth"],
                                                 [fit(image, cell) for image in right])])
    score = stages.get(predicted, {}).get("miou")
    return Block(title_of(method, args), "" if score is None else f"val mIoU {score:.1f}", rows)


def sheet_rows(path, height=160, gap=4, head=20):
    """The pictures of a contact sheet (common.contact_sheet), row by row; a white column is between two."""
    sheet = read_image(path)
    rows = []
    for top in range(head, sheet.shape[0] - height, height + gap):
        white = (sheet[head:] == 255).all((0, 2))
        edges = np.flatnonzero(np.diff(np.r_[True, white, True].astype(int)))
        cells = [sheet[top:top + height, a:b] for a, b in zip(edges[::2], edges[1::2])]
        rows.append([cell[:, ~(cell == 255).all((0, 2))] for cell in cells])
    return rows


def few_shot_block(run, args, stages, first, lines, cell):
    """Episodes: the support with its mask, query, predictions of one shot and of the most, ground truth."""
    rows = sheet_rows(run / "panels" / "test.png") if (run / "panels" / "test.png").is_file() else []
    if len(rows) < first + lines:
        raise UserError(f"{run}/panels/test.png has {len(rows)} episodes, fewer than --first {first} and "
                        f"--lines {lines} need")
    captions = ["query", "1 shot", f"{max(args.shots)} shots", "ground truth"]
    blocks = []
    for support, query, one, *more, truth in rows[first:first + lines]:
        cells = [fit(np.ascontiguousarray(image), cell) for image in (query, one, *more[-1:], truth)]
        blocks.append([Line(["one example"], [fit(np.ascontiguousarray(support), cell)]),
                       Line(captions if more else captions[:2] + captions[3:], cells)])
    score = stages.get("test_1shot", {}).get("miou")
    return Block(title_of("scl", args), "" if score is None else f"unseen classes, 1 shot: mIoU {score:.1f}",
                 blocks)


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────
def draw_block(block, cell):
    """-> PIL picture: title and score, captions, then the rows."""
    width = 6 * cell + 4 * GAP + MARGIN
    height = STRIP + len(block.rows) * (cell + GAP)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((0, 0), block.title, fill=INK, font=font(18))
    draw.text((width, 3), block.score, fill=GREY, font=font(14), anchor="ra")
    for i, row in enumerate(block.rows):
        x, y = 0, STRIP + i * (cell + GAP)
        for line in row:
            for caption, picture in zip(line.captions, line.cells):
                if i == 0: draw.text((x, 24), caption, fill=GREY, font=font(11))
                page.paste(picture, (x, y))
                x += cell + GAP
            x += MARGIN - GAP
    return page


def front_page(runs: tuple[str, ...], /, to: str, first: int = 0, lines: int = 2, cell: int = 96,
               columns: int = 2, quality: int = 80) -> None:
    """One page of all methods' pictures.

    Args:
        runs: finished run folders, one a method, in any order.
        to: the picture to write, .jpg or .png.
        first: number of the first picture to show, from 0.
        lines: pictures a method.
        cell: width and height of a picture in pixels.
        columns: methods side by side.
        quality: of the JPEG.
    """
    if not runs or min(first, 0) < 0 or min(lines, cell, columns) < 1:
        raise UserError("give at least one run folder; --first from 0, --lines, --cell and --columns from 1")
    blocks = {}
    for run in map(Path, runs):
        method, args, stages = method_of(run)
        if method in blocks: raise UserError(f"{run}: a second run of {method}; one a method is shown")
        blocks[method] = (few_shot_block(run, args, stages, first, lines, cell) if method == "scl" else
                          segmentation_block(run, method, args, stages, first, lines, cell))
    missing = [f"{method}.py" for method in TITLES if method not in blocks]
    if missing: print(f"left out, no run given: {', '.join(missing)}")
    drawn = [draw_block(blocks[method], cell) for method in TITLES if method in blocks]
    width, height = drawn[0].width + 2 * MARGIN, drawn[0].height + 2 * MARGIN
    columns = min(columns, len(drawn))
    page = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height), "white")
    for i, block in enumerate(drawn):
        page.paste(block, (i % columns * width + MARGIN, i // columns * height + MARGIN))
    with atomic(to) as file:
        page.save(file, format="PNG" if to.endswith(".png") else "JPEG", quality=quality, optimize=True)
    print(f"{to}: {page.width} x {page.height} pixels, {Path(to).stat().st_size / 1000:.0f} kB, "
          f"{len(drawn)} methods")


def main():
    import tyro

    try:
        tyro.cli(front_page, description=__doc__)
    except DataError as error:
        raise UserError(error) from None


if __name__ == "__main__":
    main()
