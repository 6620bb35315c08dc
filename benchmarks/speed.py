"""Times what the method files claim about their speed; nothing imports this file.

    python benchmarks/speed.py a2gnn                    # A²GNN: images/s side by side, windowed attention
    python benchmarks/speed.py a2gnn --device cuda      # the same on a GPU, with peak memory
    python benchmarks/speed.py crf                      # dense CRF: the torch lattice against pydensecrf
    python benchmarks/speed.py dfr                      # DFR: L_dfr by shifts and by unfold, time and memory
    python benchmarks/speed.py dfr --device cuda --side 128 --batch 2 --step paper    # at the paper's size
    python benchmarks/speed.py irnet                    # IRNet: sparse walk against matrix powers, images/s
    python benchmarks/speed.py rrm                      # RRM: a training step with and without its CRF
    python benchmarks/speed.py rrm --device cuda --preset paper    # the same at the paper's setting
    python benchmarks/speed.py cian                     # CIAN: parameters and MACs as in the paper's Table 1
    python benchmarks/speed.py schedule --run RUN      # A²GNN: a run's short GNN schedule against the paper's
    python benchmarks/speed.py growth                   # exponents: pixels, classes, batch; textbook forms
    python benchmarks/speed.py growth --device cuda     # the same on a GPU
    python benchmarks/speed.py steps --device cuda --preset paper    # a training step of every file
    python benchmarks/speed.py scale RUN RUN            # rates of finished runs; hours for VOC, COCO, 10^8

Each number is the median of --repeats runs (5 or more) in one process, after one run that is not counted;
those of scale are what the runs themselves recorded.
Prints a table and writes benchmarks/results/<name>_<device>.json. A further subcommand is one
more function below, entered in COMMANDS.
"""

import functools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# ── Clock and report ────────────────────────────────────────────────────────────────────────────────────────
def clock(work, device):
    """Seconds of work()."""
    if device.type == "cuda": torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda": torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(work, device, repeats):
    """Median seconds of work() and peak memory of the GPU in MB (None on the CPU)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)                          # the statistics want a GPU that has started
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [clock(work, device) for _ in range(repeats + 1)]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
    return statistics.median(seconds[1:]), peak


def processor():
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(rows):
    """Prints rows (dicts with the same keys)."""
    columns = list(rows[0])
    shown = lambda v: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v)  # noqa: E731
    cells = [columns, *([shown(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells))


def save(name, content):
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


def report(name, device, settings, rows):
    """Prints rows and writes them with the machine's description."""
    show(rows)
    hardware = {"cpu": processor(), "cores": os.cpu_count()}
    if device.type == "cuda": hardware["gpu"] = torch.cuda.get_device_name(device)
    save(f"{name}_{device.type}", {
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "device": str(device), "hardware": hardware, "settings": settings,
        "rows": rows})


# ── a2gnn ───────────────────────────────────────────────────────────────────────────────────────────────────
def dense_attention(H, E, w, beta):
    """Eqs. (3.17), (3.18) over all N x N pairs.   H (B,N,d), E (B,N,N), w (B,)"""
    unit = torch.nn.functional.normalize(H, dim=-1)
    cos = unit @ unit.transpose(1, 2)
    logits = w[:, None, None] * cos + torch.where(E > 0, beta * E * (cos > 0), -1e9)
    return logits.softmax(-1) @ H


def attention_case(device, side, radius, hidden, batch=1):
    """One layer forward and backward on side x side grids, as two functions: windowed and dense."""
    import a2gnn
    n, generator = side * side, torch.Generator().manual_seed(0)
    H, f, w = (torch.rand(*s, generator=generator).to(device)
               for s in ((batch, side, side, hidden), (batch, side, side, 32), (batch,)))
    H.requires_grad_()
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(device)
    graphs = [types.SimpleNamespace(
        x=x, f=x, colour=x[..., :3], place=place.view(side, side, 2).float(), adjacent=None,
        valid=torch.ones(side, side, 1, device=device)) for x in f]
    pairs = a2gnn.Pairs(graphs, radius)
    E = a2gnn.eq3_14_edges(pairs.distance(), pairs.near, 1e-3)

    def windowed():
        out = a2gnn.eq3_17_18_attention(H, E, w, 10.0, pairs.window)
        return out.reshape(batch, n, -1), torch.autograd.grad(out.square().sum(), H)[0]

    @functools.cache
    def full():
        full = torch.exp(-torch.cdist(f.view(batch, n, -1), f.view(batch, n, -1), p=1.0) / f.shape[-1])
        return full * (torch.cdist(place.float(), place.float(), p=float("inf")) <= radius)[None]

    def dense():
        out = dense_attention(H.view(batch, n, -1), full(), w, 10.0)
        return out, torch.autograd.grad(out.square().sum(), H)[0]

    return windowed, dense


def attention_rows(device, repeats, side, radius, hidden):
    """The layer of attention_case: windowed, dense, the ratio of both."""
    windowed, dense = attention_case(device, side, radius, hidden)
    difference = (windowed()[0] - dense()[0]).abs().max().item()
    assert difference < 1e-3, f"windowed and dense attention differ by {difference}"
    (fast, fast_peak), (slow, slow_peak) = (measure(work, device, repeats) for work in (windowed, dense))
    timed = (("window", fast, fast_peak), ("dense", slow, slow_peak))
    return [{"what": f"attention {side}x{side} {what}", "seconds": seconds, "per_s": 1 / seconds,
             "ratio": seconds / fast, "peak_mb": peak} for what, seconds, peak in timed]


def a2gnn_speed(device: str = "cpu", threads: int = 0, repeats: int = 5, images: int = 8,
                preset: Literal["shapes", "photos", "paper"] = "shapes", epochs: tuple[int, int] = (15, 15),
                batch_images: tuple[int, ...] = (1, 2, 4, 8), sides: tuple[int, ...] = (24, 32, 48)) -> None:
    """Images/s of train_gnn by --batch-images; the windowed attention against the dense N x N one.

    The scenes are those of shapes, the affinity CNN is not trained: its weights do not change the time.
    ratio: images/s against the first --batch-images; of the attention, seconds against the window's.
    """
    import a2gnn
    from common import make_backbone
    from data import load
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    if threads: torch.set_num_threads(threads)
    device = torch.device(device)
    size = {"shapes": a2gnn.SHAPES, "photos": a2gnn.PHOTOS, "paper": {}}[preset]
    args = a2gnn.Args(**{**size, "stride": 4, "epochs": epochs, "train_list": "train"})
    train_set = load(args, "train", masks=True)
    samples = [train_set[i] for i in range(images)]
    torch.manual_seed(0)
    net = a2gnn.AffinityNet(make_backbone("tiny", "none", 4)).to(device).eval()

    rows = []
    for size in batch_images:
        chunks = [samples[i:i + size] for i in range(0, images, size)]

        def work(chunks=chunks):
            for chunk in chunks:
                g = a2gnn.make_graphs(args, net, chunk, [s.mask for s in chunk], device)
                a2gnn.train_gnn(args, g, [s.name for s in chunk])

        seconds, peak = measure(work, device, repeats)
        first = rows[0]["per_s"] if rows else images / seconds
        rows.append({"what": f"train_gnn batch_images={size}", "seconds": seconds, "per_s": images / seconds,
                     "ratio": images / seconds / first, "peak_mb": peak})
    for side in sides: rows += attention_rows(device, repeats, side, args.radius or 4, args.hidden)
    settings = dict(repeats=repeats, images=images, preset=preset, epochs=epochs, hidden=args.hidden,
                    radius=args.radius, stride=args.stride)
    report("speed_a2gnn", device, settings, rows)


def a2gnn_schedule(run: str, images: int = 16, hidden: int = 256, epochs: tuple[int, int] = (50, 50),
                   device: str = "cpu") -> None:
    """What a preset's short GNN schedule costs: mIoU and seconds an image of the run's own schedule and of
    --hidden, --epochs (the paper's by default), on the first images of a finished run's training set.
    """
    import a2gnn
    from common import CRF, ConfusionMatrix, dense_crf, make_backbone
    from data import load, read_label
    folder, device = Path(run), torch.device(device)
    args = a2gnn.Args(**json.loads((folder / "args.json").read_text()))
    truth = load(args, "train", masks=True)
    net = a2gnn.AffinityNet(make_backbone(args.cam_backbone, "none", args.stride))
    net.load_state_dict(torch.load(folder / "affinity.pt", map_location="cpu", weights_only=True)["model"])
    net = net.to(device, memory_format=torch.channels_last).eval()
    rows = []
    schedules = [(args.hidden, tuple(args.epochs)), (hidden, epochs)]
    for schedule in schedules:
        args.hidden, args.epochs = schedule
        scores, seconds = [ConfusionMatrix(["background", *truth.classes]) for _ in range(2)], 0.0
        for start in range(0, min(images, len(truth)), args.batch_images):
            chunk = [truth[i] for i in range(start, min(start + args.batch_images, images, len(truth)))]
            seeds = [read_label(folder / a2gnn.SEEDS[args.seed_labels] / f"{s.name}.png") for s in chunk]
            began = time.perf_counter()
            g = a2gnn.make_graphs(args, net, chunk, seeds, device)
            O = a2gnn.train_gnn(args, g, [s.name for s in chunk]).cpu().numpy()
            seconds += time.perf_counter() - began
            probs = [o[:len(own), :h, :w] for o, own, (h, w) in zip(O, g.classes, g.sizes)]
            refined = dense_crf([s.image for s in chunk], probs, CRF(*args.gnn_crf), args.crf)
            for score, outputs in zip(scores, (probs, refined)):
                for s, own, output in zip(chunk, g.classes, outputs): score.add(own[output.argmax(0)], s.mask)
        rows.append({"hidden": args.hidden, "epochs": str(args.epochs), "images": images,
                     "miou_no_crf": scores[0].miou(), "miou": scores[1].miou(),
                     "seconds_an_image": seconds / images})
    report("a2gnn_schedule", device, {"run": folder.name, "data": args.data, "stride": args.stride}, rows)


# ── crf ─────────────────────────────────────────────────────────────────────────────────────────────────────
CRFS = {"psa": (3, 3, 80, 13, 10, 10), "irn": (3, 3, 50, 5, 10, 10), "deeplab": (1, 3, 67, 3, 4, 10)}


def crf_case(name, height, width, classes, seed):
    """A photograph of scikit-image and what a network might say of it: noisy segments of random classes."""
    import numpy as np
    import skimage.data
    import skimage.segmentation
    import skimage.transform
    image = skimage.transform.resize(getattr(skimage.data, name)(), (height, width), order=3)
    image = (255 * image).clip(0, 255).astype(np.uint8)
    rng = np.random.default_rng(seed)
    segments = skimage.segmentation.felzenszwalb(image, 200, 0.8, 200)
    one_hot = np.eye(classes)[rng.integers(0, classes, segments.max() + 1)[segments]][4::8, 4::8]
    logits = torch.from_numpy(3 * one_hot + rng.normal(0, 1.5, one_hot.shape)).permute(2, 0, 1)[None].float()
    logits = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear")[0]
    return image, logits.softmax(0).numpy()


def paired(images, probs, crf, device, repeats, reference):
    """Seconds of the lattice and of pydensecrf, run in turn, and their ratios: three lists of `repeats`."""
    from common import dense_crf
    names = ["torch", "pydensecrf"] if reference else ["torch"]
    runs = [[clock(lambda backend=name: dense_crf(images, probs, crf, backend, device=device), device)
             for name in names] for _ in range(repeats + 1)][1:]
    ours, theirs = [run[0] for run in runs], [run[-1] for run in runs if reference]
    return ours, theirs, [b / a for a, b in zip(ours, theirs)]


def crf_row(what, ours, theirs, ratios):
    middle = lambda values: statistics.median(values) if values else None  # noqa: E731
    return {"what": what, "torch_s": middle(ours), "pydensecrf_s": middle(theirs), "ratio": middle(ratios)}


def lattice_shares(image, crf, classes, device, repeats):
    """Milliseconds of the build and of one filtering's parts, for one image's bilateral kernel."""
    import torch.nn.functional as F
    from common import PermutohedralLattice, pixel_features
    place, _ = pixel_features([image.shape[:2]], crf.bi_xy, device)
    f = torch.cat([place, torch.as_tensor(image, device=device).reshape(-1, 3) / crf.bi_rgb], dim=1)
    lattice = PermutohedralLattice(f).normalise()
    x = torch.rand(len(f), classes, device=device)
    v = torch.rand(len(lattice.blur), classes, device=device)
    bags = functools.partial(F.embedding_bag, mode="sum")
    parts = {
        "build": lambda: PermutohedralLattice(f).normalise(),
        "splat": lambda: bags(lattice.point, x, lattice.splat, per_sample_weights=lattice.splat_weight),
        "blur": lambda: functools.reduce(lambda y, n: bags(n, y, lattice.blur,
                                                           per_sample_weights=lattice.blur_weight),
                                         lattice.neighbours, v),
        "slice": lambda: bags(lattice.vertex, v, lattice.slice, per_sample_weights=lattice.slice_weight),
        "all of filter": lambda: lattice.filter(x)}
    return {name: 1000 * measure(work, device, repeats)[0] for name, work in parts.items()}


def peak_memory(backend, height, width, classes):
    """MB that one CRF adds to the peak of a process (Linux)."""
    from common import CRF, dense_crf
    torch.set_num_threads(1)
    image, prob = crf_case("astronaut", height, width, classes, 0)
    dense_crf([image[:32, :32]], [prob[:, :32, :32].copy()], CRF(*CRFS["psa"]), backend)
    Path("/proc/self/clear_refs").write_text("5")               # the peak starts again from what is held now
    before = resident_peak()
    dense_crf([image], [prob], CRF(*CRFS["psa"]), backend)
    return resident_peak() - before


def resident_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def crf_speed(device: str = "cpu", threads: int = 1, repeats: int = 5,
              pictures: tuple[str, ...] = ("astronaut", "coffee", "cat")) -> None:
    """The lattice CRF against pydensecrf (always one thread), in turn in one process. ratio: how many times
    faster the lattice is, median over pictures and repeats; below 1 it is slower.
    """
    import multiprocessing

    import numpy as np
    from common import CRF, mean_field
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    torch.set_num_threads(threads)
    device = torch.device(device)
    try:
        import pydensecrf.densecrf  # noqa: F401
        reference = True
    except ImportError:
        reference = False
    rows = []
    for height, width in ((321, 321), (375, 500)):
        for classes in (4, 21):
            for name, values in CRFS.items():
                runs = []
                for i, picture in enumerate(pictures):
                    image, prob = crf_case(picture, height, width, classes, i)
                    runs.append(paired([image], [prob], CRF(*values), device, repeats, reference))
                together = (sum(lists, []) for lists in zip(*runs))
                rows.append(crf_row(f"{width}x{height} {classes} classes {name}", *together))
    ratios = [row["ratio"] for row in rows]
    batch = [crf_case(pictures[i % len(pictures)], 321, 321, 2 + i % 3, i) for i in range(8)]
    images, probs = [image for image, _ in batch], [np.stack([p, p[::-1]]) for _, p in batch]
    crf = CRF(*CRFS["psa"])
    rows.append(crf_row("RRM's step: 8 images x 2 unaries, 321x321",
                        *paired(images, probs, crf, device, repeats, reference)))
    together = [clock(lambda: mean_field(images, probs, crf, device), device) for _ in range(repeats + 1)]
    rows.append(crf_row("the same, all in one lattice", together[1:], [], []))
    settings = dict(repeats=repeats, pictures=pictures, shares_ms_500x375_21={
        name: lattice_shares(crf_case("astronaut", 375, 500, 21, 0)[0], CRF(*values), 21, device, repeats)
        for name, values in CRFS.items()})
    if reference:
        settings["geometric_mean_ratio"] = statistics.geometric_mean(ratios)
    if device.type == "cpu":
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            settings["extra_peak_mb_500x375"] = {
                f"{backend} {classes} classes": pool.apply(peak_memory, (backend, 375, 500, classes))
                for backend in ("torch", "pydensecrf")[:1 + reference] for classes in (4, 21)}
    report(f"speed_crf_{threads}_threads", device, settings, rows)
    print(json.dumps({key: settings[key] for key in list(settings)[2:]}, indent=1))


# ── irnet ───────────────────────────────────────────────────────────────────────────────────────────────────
def irnet_scene(h, w, classes, seed):
    """CAM (C,h,w), displacement field (2,h,w) and boundaries (h,w) of two discs a class."""
    import numpy as np
    from scipy import ndimage
    rng, (y, x) = np.random.default_rng(seed), np.indices((h, w))
    centres = rng.uniform(0.15, 0.85, (2 * classes, 2)) * (h, w)
    toward = centres[:, :, None, None] - np.stack([y, x])                               # (2C,2,h,w)
    distance = np.linalg.norm(toward, axis=1)
    nearest, size = distance.argmin(0), min(h, w) / 5
    D = np.take_along_axis(toward, nearest[None, None], 0)[0] * (distance.min(0) < 2 * size)
    B = np.exp(-(distance.min(0) - size)**2 / 4) + 0.02 * rng.random((h, w))
    cam = np.exp(-(distance / size)**2).reshape(classes, 2, h, w).max(1)
    D = D + ndimage.gaussian_filter(rng.normal(0, 8, (2, h, w)), (0, 4, 4))
    cam = cam / cam.max((1, 2), keepdims=True)
    return tuple(array.astype(np.float32) for array in (cam, D, B.clip(0, 1)))


def dense_walk(maps, index, weight, doublings):
    """T^(2^doublings) by repeated squaring of the N x N matrix, then one product.   maps (N,C)"""
    T = torch.zeros(len(index), len(index), device=weight.device).scatter_add_(1, index.long(), weight)
    for _ in range(doublings): T = T @ T
    return T @ maps


def irnet_speed(device: str = "cpu", threads: int = 1, repeats: int = 5, classes: int = 2, images: int = 4,
                height: int = 375, width: int = 500, dense_height: int = 188, dense_width: int = 252) -> None:
    """The random walk's 256 sparse products against repeated squaring of the dense matrix, and images/s of
    the whole label synthesis (after the network), at stride 4.

    The dense matrix is timed at --dense-height x --dense-width, where it fits; the row "extrapolated" is that
    time by the cube of the ratio of the cells, not a measurement. ratio: seconds against the sparse walk's.
    """
    import irnet
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    torch.set_num_threads(threads)
    device, args, rows, cells = torch.device(device), irnet.Args(), [], []
    doublings = args.walk_steps.bit_length() - 1
    for H, W in ((dense_height, dense_width), (height, width)):
        cam, D, B = irnet_scene(-(-H // 4), -(-W // 4), classes, 0)
        maps, _ = irnet.start_of_walk(cam, D, B, args.refine_steps, args.centroid)
        maps, B = torch.tensor(maps, device=device), torch.tensor(B, device=device)
        index, weight = irnet.eq12_transitions(B, args.walk_radius, args.walk_beta)
        walk = lambda: irnet.eq13_random_walk([maps], [(index, weight)], 2**doublings)[0]  # noqa: B023, E731
        dense = lambda: dense_walk(maps.flatten(1).T, index, weight, doublings)  # noqa: B023, E731
        build, _ = measure(lambda: irnet.eq12_transitions(B, args.walk_radius, args.walk_beta),  # noqa: B023
                           device, repeats)
        fast, fast_peak = measure(walk, device, repeats)
        cells.append(len(index))
        if not rows:
            difference = (walk().flatten(1).T - dense()).abs().max().item()
            assert difference < 1e-4, f"sparse and dense walk differ by {difference}"
            slow, slow_peak = measure(dense, device, repeats)
        else:
            slow, slow_peak = slow * (cells[1] / cells[0])**3, None
        what = f"{W}x{H}, {len(maps)} maps"
        rows += [{"what": f"Eq. (12) {what}", "seconds": build, "ratio": None, "peak_mb": None},
                 {"what": f"walk {what}", "seconds": fast, "ratio": 1.0, "peak_mb": fast_peak},
                 {"what": f"dense {what}{', extrapolated' if len(cells) > 1 else ''}", "seconds": slow,
                  "ratio": slow / fast, "peak_mb": slow_peak}]
    scenes = [irnet_scene(-(-height // 4), -(-width // 4), classes, seed) for seed in range(images)]
    seconds, peak = measure(lambda: [irnet_synthesis(irnet, args, scene, (height, width), device)
                                     for scene in scenes], device, repeats)
    rows.append({"what": f"synthesis {width}x{height}, {images / seconds:.3g} images/s",
                 "seconds": seconds / images, "ratio": None, "peak_mb": peak})
    report(f"speed_irnet_{threads}_threads", device, dict(
        repeats=repeats, classes=classes, images=images, walk_steps=2**doublings, radius=args.walk_radius,
        cells=cells, squarings=doublings, extrapolated="by the cube of the cells"),
        rows)


def irnet_synthesis(irnet, args, scene, size, device):
    """Eqs. (10)-(15), enlargement and connected parts of one image."""
    cam, D, B = scene
    maps, owner = irnet.start_of_walk(cam, D, B, args.refine_steps, args.centroid)
    transitions = irnet.eq12_transitions(torch.tensor(B, device=device), args.walk_radius, args.walk_beta)
    walked = irnet.eq13_random_walk([torch.tensor(maps, device=device)], [transitions], args.walk_steps)[0]
    scores = irnet.cells_to_pixels(walked[None], 4, size)[0].cpu().numpy()
    irnet.best_labels(scores[:len(cam)], args.background)
    label, score = irnet.best_labels(scores[len(cam):], args.background)
    return irnet.instances_of(label, score, owner + 1, args.fragment)


# ── rrm ─────────────────────────────────────────────────────────────────────────────────────────────────────
def rrm_step(args, net, optim, batch, amp):
    """One step of rrm.train_joint on a batch that is there already: no loader, no log."""
    import rrm
    with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=amp):
        y_hat, cam, scores, F_m = net(batch.image, args.cam_scales)
    rgb, valid, classes = rrm.to_rgb(batch.image), batch.pseudo != 255, batch.tags.shape[1]
    label = rrm.mine(rgb, cam, batch.tags, valid, **rrm.mining_options(args))
    losses = rrm.joint_losses(args, scores, F_m, label, rgb, valid, classes)
    loss = rrm.eq2_14_classification(y_hat, batch.tags) + rrm.eq2_15_joint(*losses, args.w_energy)
    optim.zero_grad()
    loss.backward()
    optim.step()


def rrm_batch(args, device, tags):
    """A batch for rrm_step: scenes of shapes; for the other presets photographs of scikit-image with tags
    that are made up, 1 to `tags` an image, since the CRF's time depends on their number only."""
    import numpy as np
    import rrm
    import skimage.data
    from common import to_device
    from data import Draws, Sample, collate, load
    if args.preset == "shapes":
        draws = Draws(load(args, "train"), rrm.joint_augment(args), 0)
        samples = [draws[i] for i in range(args.joint_batch)]
    else:
        names, augment = ("astronaut", "coffee", "cat", "rocket"), rrm.joint_augment(args)
        samples = [augment(Sample(name=str(i), image=getattr(skimage.data, names[i % 4])(),
                                  tags=np.isin(np.arange(20), range(i, i + 1 + i % tags))),
                           np.random.default_rng(i)) for i in range(args.joint_batch)]
    return to_device(collate(samples), device)


def rrm_speed(device: str = "cpu", threads: int = 1, repeats: int = 5, tags: int = 3, amp: bool = True,
              preset: Literal["shapes", "photos", "paper"] = "shapes", backbone: str = "",
              gamma_high: float = 32.0, reference: bool = True) -> None:
    """Seconds of one joint training step (thesis, Table 2.4's Speed), with two background exponents as the
    authors' code: without the mining CRF, with the lattice, with pydensecrf (one thread, on the CPU), and
    without the energy loss. ratio: against the step without CRF.

    backbone: default the preset's; weights are random, since they do not change the time. amp: bf16 on a GPU.
    """
    import dataclasses

    import rrm
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    if threads: torch.set_num_threads(threads)
    device = torch.device(device)
    size = {"shapes": rrm.SHAPES, "photos": rrm.PHOTOS, "paper": {}}[preset]
    args = rrm.Args(**{**size, "preset": preset, "weights": "none", "gamma_high": gamma_high, "workers": 0,
                       "train_list": "train", **({"backbone": backbone} if backbone else {})})
    batch = rrm_batch(args, device, tags)
    torch.manual_seed(0)
    net = rrm.make_rrm(args, "none", batch.tags.shape[1]).train()
    net = net.to(device, memory_format=torch.channels_last)
    optim = torch.optim.SGD(net.parameters(), lr=0.0)                   # the network stays what it is
    cases = {"no mining CRF": dict(mining_crf=False), "lattice CRF": dict(crf="torch"),
             "pydensecrf": dict(crf="pydensecrf"), "lattice CRF, no energy loss": dict(energy_loss=False)}
    if not reference: del cases["pydensecrf"]
    half, rows = amp and device.type == "cuda", []
    for what, changes in cases.items():
        variant = dataclasses.replace(args, **changes)
        seconds, peak = measure(lambda v=variant: rrm_step(v, net, optim, batch, half), device, repeats)
        first = rows[0]["seconds"] if rows else seconds
        rows.append({"what": what, "seconds": seconds, "ratio": seconds / first, "peak_mb": peak})
    settings = dict(repeats=repeats, preset=preset, backbone=args.backbone, batch=args.joint_batch,
                    crop=args.joint_crop, stride=args.stride, amp=amp,
                    exponents=[args.gamma, args.gamma_high])
    report(f"speed_rrm_{preset}_{threads}_threads", device, settings, rows)


# ── cian ────────────────────────────────────────────────────────────────────────────────────────────────────
def cian_cost(side: int = 321, backbone: str = "resnet101", classes: int = 20) -> None:
    """Table 1: parameters (M) and multiply-adds (G) of one image, counted on shapes without numbers.

    ours: x̂ of Eq. (5) with one reference, whose backbone is not counted, as in the paper; training: x̂^c and
    x̂^s, each with its own φ_o and classification layer.
    """
    import cian
    from common import make_backbone
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    def ours(net, image, pairs):
        x = net.backbone(image)[-1]
        q, r, c = net.affinity.embed(x)
        other, own = ((r[h], c[h]) for h in (pairs[:, 0], torch.arange(len(x))))
        m = cian.eq5_merge([cian.eq2_3_message(q, *other), cian.eq2_3_message(q, *own)])
        return net.head(cian.eq4_augment(x, m, net.affinity.phi_o))

    rows, works = [], {"vanilla DeepLab": lambda net, image, _: net.head(net.backbone(image)[-1]),
                       "baseline, self-affinity": lambda net, image, _: net(image), "ours": ours,
                       "ours, training": lambda net, image, pairs: net(image, pairs)}
    with FakeTensorMode(), torch.no_grad():
        net = cian.CIAN(make_backbone(backbone, "none", 8), classes, "max", 0.01, 12).eval()
        image, pairs = torch.zeros(2, 3, side, side), cian.others_of_group(2, 1)
        for what, work in works.items():
            with FlopCounterMode(display=False) as counter: work(net, image, pairs)
            parts = [net.backbone, net.head] if what.startswith("vanilla") else [net]
            rows.append({"what": what, "gmac": counter.get_total_flops() / 2 / 2 / 1e9,
                         "parameters_m": sum(p.numel() for part in parts for p in part.parameters()) / 1e6})
    report("cian_cost", torch.device("cpu"), dict(side=side, backbone=backbone, classes=classes), rows)


# ── dfr ─────────────────────────────────────────────────────────────────────────────────────────────────────
def dfr_case(batch, side, classes, dim, device):
    """Logits, features, image and the set of inner cells of a made-up batch."""
    generator = torch.Generator().manual_seed(0)
    logits, F_, I = (torch.randn(batch, c, side, side, generator=generator).to(device)
                     for c in (classes, dim, 3))
    return logits.requires_grad_(), F_.relu().requires_grad_(), I, torch.ones_like(I[:, 0], dtype=torch.bool)


def dfr_by_shifts(logits, F_, I, inside, radius, sigmas):
    """Eqs. (4.3) to (4.6) of dfr.py."""
    import dfr
    offsets = dfr.eq4_3_window(radius)
    K = dfr.eq4_6_13_kernel(I, F_, inside, offsets, ("xy", "rgb", "feature"), *sigmas)
    return dfr.eq4_4_dfr(logits.softmax(1), K, inside, offsets)


def dfr_by_unfold(logits, F_, I, inside, radius, sigmas):
    """The same with all (2r+1)² partners of each cell side by side: (B,C,121,hw) for each of P, I and F."""
    size = 2 * radius + 1

    def windows(x):
        return torch.nn.functional.unfold(x, size, padding=radius).unflatten(1, (x.shape[1], size**2))

    with torch.no_grad():
        span = torch.arange(-radius, radius + 1.0, device=I.device)
        square = (span[:, None]**2 + span**2).flatten()[:, None]                        # (121,1)
        exponent = square / (2 * sigmas[0]**2)
        for x, sigma in ((I, sigmas[1]), (F_, sigmas[2])):
            exponent = exponent + (windows(x) - x.flatten(2)[:, :, None]).square().sum(1) / (2 * sigma**2)
        K = torch.exp(-exponent) * windows(inside[:, None].float())[:, 0] * (square > 0)
    P = logits.softmax(1)
    agreement = (windows(P) * P.flatten(2)[:, :, None]).sum(1)
    return (K * (1 - agreement)).sum(1).mean()


DFR_FORMS = {"shifts": dfr_by_shifts, "unfold": dfr_by_unfold}


def dfr_peak(form, sizes, radius, sigmas):
    """MB that the loss and its gradient add to the peak of a process (Linux)."""
    torch.set_num_threads(1)
    case = dfr_case(*sizes, torch.device("cpu"))
    small = dfr_case(1, 2 * radius, *sizes[2:], torch.device("cpu"))
    DFR_FORMS[form](*small, radius, sigmas).backward()                  # loads what a first call loads
    Path("/proc/self/clear_refs").write_text("5")               # the peak starts again from what is held now
    before = resident_peak()
    DFR_FORMS[form](*case, radius, sigmas).backward()
    return resident_peak() - before


def dfr_step_row(preset, backbone, device, repeats, amp):
    """One training step on a batch that is there already; the losses alone are the row before it."""
    import dfr
    from common import to_device
    from data import Draws, collate, load
    size = {"shapes": dfr.SHAPES, "photos": dfr.PHOTOS, "paper": {}}[preset]
    args = dfr.Args(**{**size, "weights": "none", "train_list": "train",
                       **({"backbone": backbone} if backbone else {})})
    train_set = load(args, "train")
    draws = Draws(train_set, dfr.train_augment(args), 0)
    batch = to_device(collate([draws[i] for i in range(args.seg_batch)]), device)
    net = dfr.make_dfr(args, "none", len(train_set.classes)).train()
    net = net.to(device, memory_format=torch.channels_last)
    optim = torch.optim.AdamW(net.parameters(), lr=0.0)                 # the network stays what it is

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
            logits, feature, _ = net(batch.image)
        *losses, _ = dfr.all_losses(args, logits, feature, batch.image, batch.scribble, batch.pseudo != 255)
        optim.zero_grad()
        dfr.eq4_1_total(*losses, args.w_dfr, args.w_feature).backward()
        optim.step()

    seconds, peak = measure(step, device, repeats)
    return {"what": f"training step, {preset}, {args.backbone}, {args.seg_batch} images of {args.seg_crop}",
            "seconds": seconds, "ratio": None, "peak_mb": peak, "memory_ratio": None}


def dfr_speed(device: str = "cpu", threads: int = 1, repeats: int = 5, batch: int = 1, side: int = 64,
              classes: int = 21, dim: int = 128, step: Literal["none", "shapes", "photos", "paper"] = "none",
              backbone: str = "", amp: bool = True) -> None:
    """L_dfr with its gradient, kernel included, at the paper's radius and deviations: by shifts as in dfr.py
    and by an unfold of the window. peak_mb: what the loss adds. ratio and memory_ratio: against the shifts.

    --step: also a whole training step on scenes of shapes, for which a backbone may be given.
    """
    import multiprocessing

    import dfr
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    torch.set_num_threads(threads)
    device, args = torch.device(device), dfr.Args()
    sizes, sigmas = (batch, side, classes, dim), (args.sigma_xy, args.sigma_rgb, args.sigma_feature)
    case, rows = dfr_case(*sizes, device), []
    values, grads = zip(*((form(*case, args.radius, sigmas), torch.autograd.grad(
        form(*case, args.radius, sigmas), case[0])[0]) for form in DFR_FORMS.values()))
    difference = max(abs(values[0] / values[1] - 1).item(), ((grads[0] - grads[1]).abs().max()
                                                              / grads[1].abs().max()).item())
    assert difference < 1e-3, f"shifts and unfold differ by {difference}"
    del grads
    for name, form in DFR_FORMS.items():
        held = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0
        seconds, peak = measure(lambda f=form: torch.autograd.grad(f(*case, args.radius, sigmas), case[0]),
                                device, repeats)
        if peak is None:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peak = pool.apply(dfr_peak, (name, sizes, args.radius, sigmas))
        first = rows[0] if rows else {"seconds": seconds, "peak_mb": peak - held}
        rows.append({"what": f"L_dfr by {name}", "seconds": seconds, "ratio": seconds / first["seconds"],
                     "peak_mb": peak - held, "memory_ratio": (peak - held) / first["peak_mb"]})
    if step != "none": rows.append(dfr_step_row(step, backbone, device, repeats, amp))
    settings = dict(repeats=repeats, batch=batch, grid=side, classes=classes, dim=dim, radius=args.radius,
                    largest_relative_difference=difference, amp=amp)
    report(f"speed_dfr_{threads}_threads", device, settings, rows)


# ── growth ──────────────────────────────────────────────────────────────────────────────────────────────────
def pictures_of(side, classes, batch):
    """A square photograph, `batch` times, and made-up probabilities: lists of (H,W,3) and (C,H,W)."""
    return zip(*(crf_case("astronaut", side, side, classes, seed) for seed in range(batch)))


def crf_work(side, classes, batch, device, textbook=False):
    """Mean field with PSA's parameters; textbook: the direct sum over all pixels instead of the lattice."""
    import common
    images, probs = map(list, pictures_of(side, classes, batch))
    crf = common.CRF(*CRFS["psa"])
    if not textbook: return lambda: common.dense_crf(images, probs, crf, device=device)
    return lambda: exact_mean_field(images, probs, crf, device)


def exact_mean_field(images, probs, crf, device):
    """common.dense_crf's update with the N x N kernels themselves."""
    results = []
    for image, prob in zip(images, probs):
        h, w = image.shape[:2]
        place = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).float()
        colour = torch.as_tensor(image, device=device).reshape(-1, 3)
        G = 0
        for f, weight in ((place / crf.gauss_xy, crf.gauss_w),
                          (torch.cat([place / crf.bi_xy, colour / crf.bi_rgb], 1), crf.bi_w)):
            K = torch.exp(-torch.cdist(f, f).square() / 2)
            norm = K.sum(1).rsqrt()
            G = G + weight * norm[:, None] * K * norm
        unary = torch.as_tensor(prob, device=device).flatten(1).T.clamp_min(1e-10).log()
        Q = unary.softmax(1)
        for _ in range(crf.steps): Q = (unary + G @ Q).softmax(1)
        results.append(Q.T.view_as(torch.as_tensor(prob)).cpu().numpy())
    return results


def energy_work(side, classes, batch, device, textbook=False):
    """RRM's dense energy and its gradient; textbook: the direct sum over all pairs of pixels."""
    import numpy as np
    from common import dense_energy
    images, probs = (torch.from_numpy(np.stack(part)).to(device)
                     for part in pictures_of(side, classes, batch))
    images, probs = images.permute(0, 3, 1, 2), probs.requires_grad_()

    def work():
        energy = dense_energy(images, probs, 15.0, 50.0, exact=textbook)
        return energy, torch.autograd.grad(energy, probs)[0]
    return work


def walk_work(side, classes, batch, device, textbook=False):
    """IRNet's Eqs. (12), (13) for `classes` maps; textbook: the power of the dense matrix by squaring."""
    import irnet
    args, generator = irnet.Args(), torch.Generator().manual_seed(0)
    maps, B = (torch.rand(batch, *n, side, side, generator=generator).to(device) for n in ((classes,), ()))

    def work():
        transitions = [irnet.eq12_transitions(b, args.walk_radius, args.walk_beta) for b in B]
        if not textbook: return irnet.eq13_random_walk(list(maps), transitions, args.walk_steps)
        return [dense_walk(m.flatten(1).T, *t, args.walk_steps.bit_length() - 1).T.view_as(m)
                for m, t in zip(maps, transitions)]
    return work


def attention_work(side, classes, batch, device, textbook=False):
    """A²GNN's layer and its gradient with the paper's radius, 64 features; it knows no classes."""
    return attention_case(device, side, 4, 64, batch)[textbook]


def dfr_work(side, classes, batch, device, textbook=False):
    """DFR's L_dfr and its gradient, 128 features, by shifts; textbook: an unfold of the window."""
    import dfr
    args, case = dfr.Args(), dfr_case(batch, side, classes, 128, device)
    form = DFR_FORMS["unfold" if textbook else "shifts"]

    def work():
        loss = form(*case, args.radius, (args.sigma_xy, args.sigma_rgb, args.sigma_feature))
        return loss, torch.autograd.grad(loss, case[0])[0]
    return work


# kernel: function, sides, numbers of classes and of images to measure, sides of the textbook form
KERNELS = {"crf": (crf_work, (80, 120, 160, 240), (2, 4, 8, 16), (1, 2, 4, 8), (16, 24, 32, 48)),
           "energy": (energy_work, (80, 120, 160, 240), (2, 4, 8, 16), (1, 2, 4, 8), (24, 32, 48, 64)),
           "walk": (walk_work, (32, 48, 64, 96), (2, 4, 8, 16), (1, 2, 4, 8), (16, 20, 24, 32)),
           "attention": (attention_work, (24, 32, 48, 64), (), (1, 2, 4, 8), (16, 24, 32, 40)),
           "dfr": (dfr_work, (24, 32, 48, 64), (5, 10, 20, 40), (1, 2, 4, 8), (16, 20, 24, 32))}


def exponent(sizes, seconds):
    """p of seconds ~ size^p: the slope of the least squares line through the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(s) for s in seconds]).slope


def busy_proof(work, device, repeats):
    """As measure, but on the CPU the process' own CPU seconds: other jobs do not count."""
    if device.type == "cuda": return measure(work, device, repeats)
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:]), None


def growth_row(kernel, against, sizes, works, device, repeats):
    seconds = [busy_proof(work, device, repeats) for work in works]
    return {"kernel": kernel, "against": against, "sizes": list(sizes),
            "seconds": [float(f"{s:.3g}") for s, _ in seconds],
            "exponent": exponent(sizes, [s for s, _ in seconds]), "peak_mb": seconds[-1][1], "ratio": None}


def growth_rows(kernel, device, repeats):
    """A kernel's rows: against pixels, classes and batch, the others fixed; then its textbook form."""
    work, sides, classes, batches, textbook_sides = KERNELS[kernel]
    side, many, rows = sides[1], classes[1] if classes else 0, []
    grids = {"pixels": [(s, many, 1) for s in sides], "classes": [(side, c, 1) for c in classes],
             "batch": [(side, many, b) for b in batches]}
    for against, cases in grids.items():
        sizes = {"pixels": [s * s for s in sides], "classes": classes, "batch": batches}[against]
        if sizes: rows.append(growth_row(kernel, against, sizes, (work(*case, device) for case in cases),
                                         device, repeats))
    cases = [(s, many, 1, device, True) for s in textbook_sides]
    rows.append(growth_row(f"{kernel}, textbook", "pixels", [s * s for s in textbook_sides],
                           (work(*case) for case in cases), device, repeats))
    ours, _ = busy_proof(work(*cases[-1][:-1]), device, repeats)
    rows[-1]["ratio"] = rows[-1]["seconds"][-1] / ours
    return rows


def growth(device: str = "cpu", repeats: int = 5, kernels: tuple[str, ...] = tuple(KERNELS)) -> None:
    """How the seconds of each kernel grow: the fitted exponent against pixels, classes and images of a batch.

    On the CPU one thread, and its CPU seconds, which other jobs on the machine change little. The sizes are
    small, so constant costs flatten the exponents. pixels: cells for walk, attention and dfr.
    textbook: N x N sums; for dfr an unfold. ratio: its seconds against ours at its largest size. peak_mb: of
    the largest size, on a GPU. Tests compare values of kernel and textbook form; the lattice only comes near.
    """
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    wrong = set(kernels) - set(KERNELS)
    if wrong: raise SystemExit(f"--kernels {' '.join(sorted(wrong))}: choose from {' '.join(KERNELS)}")
    torch.set_num_threads(1)
    device, rows = torch.device(device), []
    for kernel in kernels:
        rows += growth_rows(kernel, device, repeats)
        print(f"measured: {kernel}", flush=True)
    report("growth", device, {"repeats": repeats}, rows)


# ── scale ───────────────────────────────────────────────────────────────────────────────────────────────────
SETS = {"VOC": 10_582, "COCO": 82_081, "10^8": 10**8}
BATCHES = {"classifier": "cam_batch", "affinity": "aff_batch", "irnet": "irn_batch", "joint": "joint_batch",
           "encoder": "enc_batch", "generator": "gen_batch", "segmenter": "seg_batch",
           "aux_segmenter": "seg_batch", "detector": "inst_batch"}      # trained network: its field in args
ASSUMPTIONS = """Assumed, not measured:
- training keeps the run's epochs, so its steps grow with the images; label synthesis grows with the images;
  a stage on other pictures (rendered, or an auxiliary set) is taken to grow as well;
- synthesis divides over all processes; a training over at most its batch, by a number that divides the batch;
- scaling over processes is perfect: no time for gradients, loading, or waiting for the slowest;
- network, crop, picture size and epochs are those of the run and its preset, not the paper's unless the run
  was; evaluation and prediction are not counted; the run was one process on a device that may have been busy.
"""


def read_run(folder):
    """Its path, results.json and state.json."""
    files = [Path(folder) / name for name in ("results.json", "state.json")]
    for file in files:
        if not file.exists(): raise SystemExit(f"{folder}: no {file.name}; give the folder of a finished run")
    return Path(folder), *(json.loads(file.read_text()) for file in files)


def step_seconds(folder):
    """Seconds of a training step of each network, from the first to the last line of its log."""
    lines, file = {}, folder / "log.jsonl"
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else []):
        lines.setdefault(line["stage"], []).append(line)
    return {stage: (log[-1]["seconds"] - log[0]["seconds"]) / (log[-1]["step"] - log[0]["step"])
            for stage, log in lines.items() if len(log) > 1}


def stages_of(run):
    """A run's stages {name: kind, seconds, step_s, batch} and the names of those that it can not time.

    A stage that was taken over (--reuse) has the time of the run that made it, if that is still there and of
    the same device.
    """
    folder, results, state = run
    steps, found, missing = step_seconds(folder), {}, []
    for stage, seconds in state["seconds"].items():
        network = re.sub(r"_?\d+$", "", stage)
        if stage in results.get("reused", {}):
            theirs = Path(results["reused"][stage])
            other = read_run(theirs) if (theirs / "results.json").exists() else None
            same = other and other[1]["device"] == results["device"]
            before = stages_of(other)[0].get(stage) if same else None
            if before: found[stage] = before
            else: missing.append(stage)
        elif network in BATCHES:
            found[stage] = {"kind": "training", "seconds": seconds, "step_s": steps.get(stage),
                            "batch": results["args"][BATCHES[network]]}
        else:
            kind = "inference" if stage.startswith(("val", "test")) else "labels"
            found[stage] = {"kind": kind, "seconds": seconds}
    return found, missing


def images_of(results, split):
    """Pictures of the training or validation split; scl's episodes; else what the data set counts itself."""
    from data import load
    entries = [entry for entry in results["stages"] if entry.get("split") == split]
    known = [entry.get("n_images", entry.get("episodes")) for entry in entries]
    return known[0] if known else len(load(types.SimpleNamespace(**results["args"]), split))


def rates_of(run):
    """One row: the last network's step, all label synthesis together, the last evaluation, memory."""
    (folder, results, _), (stages, missing) = run, stages_of(run)
    kinds = {kind: [stage for stage in stages if stages[stage]["kind"] == kind]
             for kind in ("training", "labels", "inference")}
    network, test = (kinds[kind][-1] if kinds[kind] else None for kind in ("training", "inference"))
    labels = sum(stages[stage]["seconds"] for stage in kinds["labels"])
    peaks = [entry["peak_memory_mb"] for entry in results["stages"] if entry.get("peak_memory_mb")]
    train, val = images_of(results, "train"), images_of(results, "val")
    method, args = re.search(r"(\w+)\.py", results["command"]).group(1), results["args"]
    return {"run": f"{method} {folder.name}", "device": results["device"], "preset": args["preset"],
            "train": train, "network": network, "step_s": stages[network]["step_s"] if network else None,
            "labels_per_s": train / labels if labels else None,
            "inference_per_s": val / stages[test]["seconds"] if test else None,
            "peak_mb": max(peaks, default=None), "not_timed": ", ".join(missing)}


def hours(stages, factor, processes):
    """Hours of training and of label synthesis of `factor` times the run's images on so many processes."""
    total = {"training": 0.0, "labels": 0.0, "inference": 0.0}
    for stage in stages.values():
        limit = stage.get("batch", processes)
        used = max(n for n in range(1, processes + 1) if limit % n == 0)
        total[stage["kind"]] += stage["seconds"] * factor / used / 3600
    return total["training"], total["labels"]


def scale(runs: tuple[str, ...], processes: tuple[int, ...] = (8, 1024)) -> None:
    """Rates of finished run folders, and hours for VOC, COCO and 10^8 images on 1 and on --processes devices.

    step_s: a step of the last trained network. labels_per_s: all label synthesis together. inference_per_s:
    the last evaluation (episodes a second for scl), with its scales, CRF and scores. training_h, labels_h: on
    one device. not_timed: stages that were taken over from a run that is gone; they are missing in the hours.
    """
    if not runs: raise SystemExit("give at least one run folder")
    folders = [read_run(run) for run in runs]
    kinds = {results["device"].split()[0] == "cpu" for _, results, _ in folders}
    if len(kinds) > 1: raise SystemExit("runs on CPUs and on GPUs: give those of one kind")
    rates, rows = [rates_of(run) for run in folders], []
    for run, rate in zip(folders, rates):
        stages, _ = stages_of(run)
        for name, images in SETS.items():
            training, labels = hours(stages, images / rate["train"], 1)
            rows.append({"run": rate["run"], "data": name, "images": images, "training_h": training,
                         "labels_h": labels, "hours_1": training + labels,
                         **{f"hours_{n}": sum(hours(stages, images / rate["train"], n)) for n in processes}})
    show(rates)
    show(rows)
    print(ASSUMPTIONS)
    save(f"scale_{'cpu' if kinds == {True} else 'cuda'}", {
        "command": "python benchmarks/speed.py scale RUN ...", "assumptions": ASSUMPTIONS, "rates": rates,
        "stages": {rate["run"]: stages_of(run)[0] for run, rate in zip(folders, rates)},
        "git": {rate["run"]: results["git"] for (_, results, _), rate in zip(folders, rates)}, "hours": rows})


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────
class FixedBatch:
    """Stands in for Run in a file's own training function: one batch, drawn once, comes again and again.

    Its steps() times what the file does with the batch, augmentation and loading left out. Every label folder
    that a file reads holds the ground truth of the data set.
    """

    def __init__(self, args, device, repeats, labels):
        self.args, self.device, self.repeats, self.labels, self.rows = args, device, repeats, labels, []
        self.dir = labels.parent

    def reseed(self, *key):
        torch.manual_seed(0)

    def log(self, step, **values):
        """A real run reads its losses every 20 steps."""

    def autocast(self):
        half = self.args.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def place(self, net):
        return net.to(self.device, memory_format=torch.channels_last)

    def steps(self, stage, draws, steps, batch, net, optim, schedule=None):
        """Yields (step, batch) 1 + repeats times; a row of the median of all but the first."""
        from common import to_device
        from data import collate
        sample = to_device(collate([draws[n] for n in range(batch)]), self.device)
        for group in optim.param_groups: group["lr"] = 0.0          # the network stays what it is
        cuda, seconds = self.device.type == "cuda", []
        if cuda: torch.cuda.reset_peak_memory_stats(self.device)
        start = max(0, steps - self.repeats - 1)                    # the last steps: every loss is on
        for step in range(start, start + self.repeats + 1):
            if cuda: torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            yield step, sample
            if cuda: torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        size = tuple(sample.image.shape)
        self.rows.append({"stage": stage, "images": size[0], "crop": f"{size[3]}x{size[2]}",
                          "seconds": median, "images_per_s": size[0] / median,
                          "peak_mb": torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None})


def labels_everywhere(run, dataset, folders):
    """The ground truth of a data set as the label folders of a run."""
    from common import save_label
    for name in dataset.names:
        save_label(run.labels / f"{name}.png", dataset[dataset.index(name)].mask)
    for folder in folders: (run.dir / folder).symlink_to(run.labels, target_is_directory=True)


def tags_of(dataset):
    import numpy as np
    return np.array([np.asarray(dataset[i].tags) for i in range(len(dataset))], bool)


def a2gnn_steps(a2gnn, args, run, train_set):
    classifier = a2gnn.train_classifier(args, run, train_set)
    a2gnn.train_affinity(args, run, classifier, train_set)
    a2gnn.train_segmenter(args, run, train_set)


def irnet_steps(irnet, args, run, train_set):
    classifier = irnet.train_classifier(args, run, train_set)
    irnet.train_irnet(args, run, classifier, train_set)
    irnet.train_segmenter(args, run, train_set)


def rrm_steps(rrm, args, run, train_set):
    rrm.train_joint(args, run, None, train_set)


def cian_steps(cian, args, run, train_set):
    cian.train_classifier(args, run, train_set)
    cian.train_round(args, run, train_set, tags_of(train_set), "seeds", 1, None)


def dfr_steps(dfr, args, run, train_set):
    dfr.train_segmenter(args, run, train_set)


def lpg_steps(lpg, args, run, train_set):
    lpg.settle_lpg(args)
    lpg.train_segmenter(args, run, "segmenter_1", train_set, "pseudo_1", 1)
    lpg.train_generator(args, run, 1, train_set, None)


def scl_steps(scl, args, run, train_set):
    scl.settle_scl(args)
    backbone = scl.make_encoder(args, "none").freeze()
    scl.train_segmenter(args, run, train_set, tags_of(train_set), backbone)


def selftrain_steps(selftrain, args, run, train_set):
    rendered = selftrain.load_rendered(args, train_set.classes)
    real = selftrain.with_labels(train_set, pseudo=run.labels)
    selftrain.train_round(args, run, "segmenter_1", args.seg_steps, 1, real, rendered, None)


# file: its function above, the label folders that it reads
STEPS = {"a2gnn": (a2gnn_steps, ("seeds", "seeds_F", "pseudo")),
         "irnet": (irnet_steps, ("relations", "pseudo")), "rrm": (rrm_steps, ()),
         "cian": (cian_steps, ("seeds",)), "dfr": (dfr_steps, ()), "lpg": (lpg_steps, ("pseudo_1",)),
         "scl": (scl_steps, ()), "selftrain_workpiece": (selftrain_steps, ())}


def steps(device: str = "cpu", preset: Literal["shapes", "photos", "paper"] = "shapes", repeats: int = 5,
          threads: int = 0, methods: tuple[str, ...] = tuple(STEPS)) -> None:
    """Seconds and peak memory of a training step of each file's networks, by the file's own training code.

    The scenes are those of shapes (of solids), cropped or padded to the preset's crop; weights are random,
    which does not change the time. One batch is drawn once: loading and augmentation are not in the numbers.
    """
    import importlib
    import tempfile

    from data import load
    if repeats < 5: raise SystemExit(f"--repeats {repeats}: a median needs at least 5")
    wrong = set(methods) - set(STEPS)
    if wrong: raise SystemExit(f"--methods {' '.join(sorted(wrong))}: choose from {' '.join(STEPS)}")
    if threads: torch.set_num_threads(threads)
    device, rows = torch.device(device), []
    for method in methods:
        module, (work, folders) = importlib.import_module(method), STEPS[method]
        own = getattr(module, "SOLIDS", None) or module.SHAPES
        size = {"shapes": own, "photos": module.PHOTOS, "paper": {}}[preset]
        args = module.Args(**{**size, "weights": "none", "train_list": "train"})
        if getattr(args, "cam_backbone", "") == "same": args.cam_backbone = args.backbone
        train_set = load(args, "train", masks=True)
        with tempfile.TemporaryDirectory() as folder:
            run = FixedBatch(args, device, repeats, Path(folder) / "labels")
            if folders or method == "selftrain_workpiece": labels_everywhere(run, train_set, folders)
            work(module, args, run, train_set)
        rows += [{"file": method, **row} for row in run.rows]
        show(rows[-len(run.rows):])
        if device.type == "cuda": torch.cuda.empty_cache()
    report(f"steps_{preset}", device, dict(repeats=repeats, preset=preset), rows)


COMMANDS = {"a2gnn": a2gnn_speed, "cian": cian_cost, "crf": crf_speed, "dfr": dfr_speed, "growth": growth,
            "irnet": irnet_speed, "rrm": rrm_speed, "scale": scale,
            "schedule": a2gnn_schedule, "steps": steps}                               # one entry a subcommand


def main():
    import tyro
    from tyro.extras import subcommand_cli_from_dict

    def positional(runs: tyro.conf.Positional[tuple[str, ...]], processes: tuple[int, ...] = (8, 1024)):
        scale(runs, processes)

    positional.__doc__ = scale.__doc__
    subcommand_cli_from_dict({**COMMANDS, "scale": positional}, description=__doc__)


if __name__ == "__main__":
    main()
