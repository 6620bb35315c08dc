"""Draws one page of pictures from finished runs, one block a method; nothing imports this file.

    python benchmarks/front_page.py --to docs/front_page.jpg runs/a2gnn-shapes-box-s0 runs/rrm-shapes-image-s0 …
    python benchmarks/front_page.py --to page.jpg --first 8 --lines 3 runs/irnet-voc-image-s0    # other pictures

A block shows what the run folder holds: a training picture with the labels that its supervision reveals and
the label map that the method made of them, then a validation picture with prediction and ground truth. The
pictures are the first of their lists, not chosen by eye: runs on the same data show the same ones. A run of
scl.py shows the episodes of its panels/test.png. A method without a run is left out and named.
"""

import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import UserError, atomic, overlay, read_json, voc_palette
from data import chosen_classes, load, read_image, read_label, select

TITLES = {"a2gnn": "A²GNN", "rrm": "RRM", "irnet": "IRNet", "cian": "CIAN", "dfr": "DFR", "lpg": "LPG",
          "scl": "SCL", "selftrain_workpiece": "Self-training"}
WORDS = {"image": "image tags", "point": "points", "scribble": "scribbles", "box": "boxes", "full": "masks",
         "semi": "boxes, some masks"}
BESIDE = {"lpg": " + masks of other classes", "selftrain_workpiece": " + rendered pictures",
          "cian": " of picture pairs", "scl": " of other classes"}
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
    """(H,W,3) uint8 -> PIL picture of cell x cell pixels, white around it; with the scale and the corner."""
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    small = Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))),
                                          Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    corner = (cell - small.width) // 2, (cell - small.height) // 2
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(small, corner)
    return square, scale, corner


def font(size):
    return ImageFont.load_default(size)


def weak_cell(sample, supervision, classes, cell):
    """The training picture with what training may see of it: tags, clicks, strokes, boxes or masks."""
    colours, image = [tuple(map(int, c)) for c in voc_palette()], sample.image
    if supervision == "full":
        image = overlay(image, sample.mask)
    if supervision == "scribble":
        drawn = sample.scribble != 255
        image = np.where(drawn[..., None], voc_palette()[sample.scribble], image)
    square, scale, (left, top) = fit(image, cell)
    draw = ImageDraw.Draw(square)
    for k, x0, y0, x1, y1 in sample.boxes.tolist() if supervision in ("box", "semi") else ():
        edges = (left + x0 * scale, top + y0 * scale, left + x1 * scale - 1, top + y1 * scale - 1)
        draw.rectangle(edges, outline="white", width=3)
        draw.rectangle(edges, outline=colours[int(k)], width=2)
    for k, x, y in sample.points.tolist() if supervision == "point" else ():
        x, y = left + x * scale, top + y * scale
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colours[int(k)], outline="white")
    if supervision == "image":
        tags = [(name, colours[k]) for k, name in enumerate(classes, 1) if sample.tags[k - 1]]
        for i, (name, colour) in enumerate(reversed(tags)):
            y = cell - 14 * (i + 1)
            draw.rectangle((0, y, draw.textlength(name, font(11)) + 6, y + 13), fill=colour)
            draw.text((3, y), name, fill="white", font=font(11))
    return square


# ── One method ──────────────────────────────────────────────────────────────────────────────────────────────
def method_of(run):
    """Which method file made a run folder, by the command in its results.json."""
    args, results = (read_json(Path(run) / name) for name in ("args.json", "results.json"))
    if not args or not results:
        raise UserError(f"{run} is no finished run: it needs args.json and results.json")
    words = [Path(word).stem for word in results.get("command", "").split() if word.endswith(".py")]
    if not words or words[0] not in TITLES:
        raise UserError(f"{run}: the command in results.json, {results.get('command')!r}, names no method file")
    return words[0], types.SimpleNamespace(**args), {row["stage"]: row for row in results.get("stages", [])}


def title_of(method, args):
    return f"{TITLES[method]}: {WORDS.get(args.supervision, args.supervision)}{BESIDE.get(method, '')}"


def first_of(run, folders):
    """The first of these folders of label maps that a run has, or None."""
    return next((name for name in folders if any((Path(run) / name).glob("*.png"))), None)


def pictures(args, run, split, folder, first, lines):
    """[(sample with everything that is known, label map of the run)] of the first pictures that it has."""
    dataset = load(args, split, masks=True)
    if getattr(args, "classes", ""):
        dataset = select(dataset, chosen_classes(args.classes, dataset.classes, "--classes"))
    names = [name for name in dataset.names if folder is None or (run / folder / f"{name}.png").is_file()]
    if len(names) < first + lines:
        raise UserError(f"{run} has {len(names)} label maps of {split}, fewer than --first {first} and --lines "
                        f"{lines} need")
    found = []
    for name in names[first:first + lines]:
        sample = dataset[dataset.index(name)]
        found.append((sample, folder and read_label(run / folder / f"{name}.png", dataset.classes, sample.image)))
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
        cells += [fit(overlay(seen.image, map), cell)[0] for _, map in maps if map is not None]
        captions = ["training", *(caption for caption, map in maps if map is not None)]
        right = [shown.image, *(overlay(shown.image, map) for map in (prediction, shown.mask))]
        rows.append([Line(captions, cells), Line(["validation", "prediction", "ground truth"],
                                                 [fit(image, cell)[0] for image in right])])
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
    """Episodes: the support with its mask, query, prediction of one shot, ground truth."""
    rows = sheet_rows(run / "panels" / "test.png") if (run / "panels" / "test.png").is_file() else []
    if len(rows) < first + lines:
        raise UserError(f"{run}/panels/test.png has {len(rows)} episodes, fewer than --first {first} and "
                        f"--lines {lines} need")
    captions = ["support", "query", "prediction", "ground truth"]
    blocks = []
    for support, query, one_shot, *_, truth in rows[first:first + lines]:
        cells = [fit(np.ascontiguousarray(image), cell)[0] for image in (support, query, one_shot, truth)]
        blocks.append([Line(captions[:1], cells[:1]), Line(captions[1:], cells[1:])])
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
               columns: int = 2, quality: int = 88) -> None:
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
    except ValueError as error:                     # data.py's DataError: one sentence
        raise UserError(error) from None


if __name__ == "__main__":
    main()
