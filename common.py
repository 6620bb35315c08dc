"""What no paper has an equation for: arguments, run folder, backbones and heads, dense CRF, metric, pictures.

Every method file imports this one (and data.py); this one knows no method. B batch, K classes without the
background, C channels or classes with it, H,W pixels, h,w feature grid. 0 = background, 255 = no label.

    args = parse_args(Args, __doc__, {"shapes": SHAPES})      # command line
    run = Run(args, FIELDS)                                   # runs/<name>/
    for step, batch in run.steps("net", draws, 1000, 16, net, optim, poly(1000)):   # saves, continues
        ...
    for chunk in run.todo(names, "pseudo", 16):               # what is not written yet
        for name in chunk: save_label(run.path("pseudo", name), label)
    run.result("val", split="val", n_images=len(names), confusion=confusion)
"""
import atexit
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet
from tqdm import tqdm


CAN_NOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class UserError(SystemExit):
    """A mistake that the user can mend: ends the program with one sentence instead of a traceback."""


def short_errors(kind, error, trace):
    """sys.excepthook: a data.DataError, also of a loader's process, ends with its sentence only.

    So does a disk that is full, or a folder that is not ours to write to.
    """
    if kind.__name__ == "DataError":
        print(str(error).strip().splitlines()[-1].removeprefix("data.DataError: "), file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in CAN_NOT_WRITE:
        print(f"{error.filename or 'a file'}: {error.strerror}; make room, or choose another folder to write "
              "to: the same command again continues", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ── Arguments ───────────────────────────────────────────────────────────────────────────────────────────────

def parse_args(Args, doc, presets=None, argv=None):
    """Command line -> Args. `doc` is shown as it stands by --help; `presets` maps a name to {field: default}.

    --preset auto takes the preset named like the data set, if any, else the paper's values (those of Args). A
    preset only moves defaults: a flag given by hand wins. args.preset, .root and .out come back resolved.
    """
    import tyro
    sys.excepthook = short_errors
    presets, argv = presets or {}, sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(doc.strip() + "\n\nDefaults below are --preset paper.\n")     # tyro would join the lines
    chosen = tyro.cli(Args, description="", args=argv)
    preset = chosen.preset
    if preset == "auto":
        preset = chosen.data if chosen.data in presets else "paper"
    if preset != "paper" and preset not in presets:
        raise UserError(f"--preset {preset}: this file has {', '.join(['paper', *presets])}")
    values = presets.get(preset, {})
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Args)})
    if unknown:
        raise UserError(f"preset {preset} sets fields that Args does not have: {', '.join(unknown)}")
    args = tyro.cli(Args, description="", args=argv, default=Args(**values))
    check_numbers(args)
    args.preset = preset
    args.root = args.root or f"data/{args.data}"
    if not getattr(args, "predict", ""):
        task = "-instance" if getattr(args, "task", "") == "instance" else ""
        args.out = args.out or (f"runs/{Path(sys.argv[0]).stem}-{args.data}-{args.supervision}{task}"
                                f"-s{args.seed}")
    return args


def check_numbers(args):
    """UserError for numbers that no run can have, by the fields' names. 0, or nothing, is allowed where the
    field's default has it; two numbers called …_resize or …_rescale are a range.
    """
    sizes = r"(_batch|_crop|_every|_scales?|_rates?|_resize|_rescale|_lr|_power|^batch_images|^superpixels)$"
    for field in dataclasses.fields(args):
        name, value, default = field.name, getattr(args, field.name), field.default
        flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, tuple) else (value,)
        if isinstance(value, CRF):
            deviations, usual = (value.gauss_xy, value.bi_xy, value.bi_rgb), 0 in default
            if min(deviations) < 0 or 0 in deviations and not usual:
                raise UserError(f"{flag}: give standard deviations above 0")
        elif isinstance(value, int) and (name in ("workers", "seed") or name.endswith("_steps")):
            if value < 0: raise UserError(f"{flag} {value}: give 0 or more")
        elif re.search(sizes, name):
            usual = default if isinstance(default, tuple) else (default,)
            if not values and usual: raise UserError(f"{flag}: give one number or more")
            if values and (min(values) < 0 or min(values) == 0 and 0 not in usual):
                raise UserError(f"{flag} {' '.join(map(str, values))}: give "
                                + ("1 or more" if isinstance(values[0], int) else "numbers above 0"))
            if name.endswith(("_resize", "_rescale")) and values and len(usual) in (0, 2) and (
                    len(values) != 2 or values[0] > values[1]):
                raise UserError(f"{flag}: give two numbers, the smaller first")


def seed_everything(seed):
    """Seeds python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state():
    """State of python's, numpy's and torch's generators, in tensors and plain types (for weights_only)."""
    version, keys, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    state = {"python": [version, list(keys), gauss], "torch": torch.get_rng_state(),
             "numpy": [kind, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached]}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state):
    """Undoes what has been drawn since rng_state()."""
    version, keys, gauss = state["python"]
    kind, key, *rest = state["numpy"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ── Several processes (torchrun) ────────────────────────────────────────────────────────────────────────────

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:                                             # nccl guesses a GPU by rank if none is named
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def shard(items):
    """This process' share of a sequence."""
    return items[rank()::world()]


def reduce(tensor):
    """Sums a tensor over all processes, in place; returns it."""
    if world() > 1:
        buffer = tensor.cuda() if dist.get_backend() == "nccl" else tensor      # nccl only sums on the GPU
        dist.all_reduce(buffer)
        tensor.copy_(buffer)
    return tensor


def distribute(net):
    """Averages gradients over processes (DDP); with one process or nothing to train, the net itself."""
    if world() == 1 or not any(p.requires_grad for p in net.parameters()):
        return net
    if next(net.parameters()).is_cuda: share_norms(net)         # torch has it for GPUs alone
    return DistributedDataParallel(net)


def share_norms(net):
    """Batch norms that learn see the images of all processes; those of a frozen backbone stay, in place."""
    for name, part in net.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(net, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))
        elif not getattr(part, "frozen", False):
            share_norms(part)


def unwrap(net):
    """The net inside DDP."""
    return net.module if isinstance(net, DistributedDataParallel) else net


def start_processes(device):
    """torch.device for --device auto|cpu|cuda; joins torchrun's process group, by gloo or nccl."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"cpu|cuda(:\d+)?", device)
    place = int(os.environ.get("LOCAL_RANK", device[5:] or 0)) if known and device != "cpu" else 0
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not known or device != "cpu" and place >= gpus:
        wanted = f" (process {place} of this machine)" if "LOCAL_RANK" in os.environ else ""
        raise UserError(f"--device {device}{wanted}: give auto, cpu, cuda or cuda:N, N from 0; torch sees "
                        f"{gpus} GPUs")
    if device != "cpu": device = f"cuda:{place}"
    if device != "cpu": torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        day = datetime.timedelta(days=1)                        # the slowest share of images may take long
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=day)
        # Else gloo's threads may abort the exit. A net in DDP that still lives keeps them: none is global.
        # nccl's group waits for all processes to leave it: one that ends by an error would never end.
        if dist.get_backend() == "gloo": atexit.register(dist.destroy_process_group)
    return torch.device(device)


@contextlib.contextmanager
def inference():
    """Around a network that sees pictures of many sizes: no gradients, and on a GPU no cuDNN, which plans its
    convolutions anew for each size (MobileNetV2, channels last, H200: 1.2 s a new size, without it 4 ms).
    """
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        yield


# ── Files: written under a temporary name, then renamed ─────────────────────────────────────────────────────

@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path in the same folder that becomes `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)            # write() itself does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as file:
        file.write_text(json.dumps(value, indent=1) + "\n")


def save_checkpoint(path, state):
    """state: tensors and plain types only, so that torch.load(path, weights_only=True) reads it."""
    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:                           # torch's word for a disk that is full
            why = str(error).splitlines()[0]
            raise UserError(f"{path} can not be written ({why}); make room, then give the same command "
                            "again: it continues") from None


def save_npz(path, **arrays):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def save_image(path, image):
    """image (H,W,3) or (H,W) uint8, or a PIL image -> PNG."""
    with atomic(path) as file:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format="PNG")


def save_label(path, label):
    """label (H,W) of 0..255 (array or tensor) -> palette PNG in VOC's colours, 255 = VOC's border colour."""
    image = Image.fromarray(np.ascontiguousarray(np.asarray(label), dtype=np.uint8))
    image.putpalette(voc_palette().ravel().tolist())
    save_image(path, image)


def save_instances(path, masks, classes, scores):
    """One picture's instances.   masks (M,H,W) bool, classes (M,) from 1, scores (M,)"""
    save_npz(path, masks=masks, classes=classes, scores=scores)


def read_instances(path):
    """-> masks (M,H,W) bool, classes (M,), scores (M,)"""
    with np.load(path) as file:
        return file["masks"], file["classes"], file["scores"]


@functools.cache
def voc_palette():
    """(256,3) uint8: the bits of a number go in turn to red, green and blue, there highest bit first."""
    index, palette = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


# ── The run folder ──────────────────────────────────────────────────────────────────────────────────────────

NO_EFFECT = {"out", "device", "workers", "fresh", "reuse", "predict", "checkpoint", "log_every",
             "save_every", "batch_images"}                      # fields that cannot change a result
PATHS = {"root", "train_list", "weights", "aux_root", "rendered_root", "saliency", "generator", "semi_masks"}


def plain_fields(args):
    """Fields of a dataclass in the types that JSON gives back (a tuple is a list, a Path a string)."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def differing(mine, theirs, names):
    """["lr: 0.1, there 0.2", …]: those of the fields whose values differ between two args.json.

    Two spellings of one path do not differ.
    """
    def meant(args, name):
        value = args.get(name, "absent")
        if name not in PATHS or not isinstance(value, str): return value
        return [part and os.path.abspath(part) for part in value.split(",")]    # also of words, on both sides

    return [f"{name}: {mine.get(name, 'absent')}, there {theirs.get(name, 'absent')}"
            for name in sorted(names) if meant(mine, name) != meant(theirs, name)]


def read_json(file, default=None):
    try:
        return json.loads(Path(file).read_text()) if Path(file).exists() else default
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); mend or delete it, or choose another folder") from None


class Run:
    """One run folder: arguments, checkpoints, products, log and results; the same command again continues it.

    args: a dataclass with out, device, amp, workers, seed, fresh, reuse, log_every, save_every.
    fields: {stage: [field, …]} in the order of the stages: a stage of another run (--reuse) is taken over if
    the fields of that stage and of all stages before it agree. Raises UserError for a folder that another
    live process uses, or that was made with other arguments.
    """

    def __init__(self, args, fields=None):
        self.args, self.fields, self.dir = args, fields or {}, Path(args.out)
        self.device = start_processes(args.device)
        for name, size in vars(args).items():                   # now, not after days of earlier stages
            if name.endswith("_batch") and size % world():
                raise UserError(f"--{name.replace('_', '-')} {size} can not be split over {world()}")
        self.stage, self.marks, self.bar, self.writer = "", {}, None, None
        self.saved = 0.0, 0.0                                   # seconds of the last save, and when it ended
        if args.reuse and not self.dir.exists(): self.donor()                   # a wrong folder: say so now
        if rank() == 0:
            self.lock()
            if args.fresh: self.clear()
        barrier()
        theirs, mine = read_json(self.dir / "args.json"), plain_fields(args)
        differ = differing(mine, theirs, {*mine, *theirs} - NO_EFFECT) if theirs else []
        if differ:
            more = f"; and {len(differ) - 8} more" if len(differ) > 8 else ""
            raise UserError(f"{self.dir} was made with other arguments ({'; '.join(differ[:8])}{more}); use "
                            "those, choose another --out, or start over with --fresh")
        self.resumed = theirs is not None
        self.state = read_json(self.dir / "state.json", {"seconds": {}, "wrote": []})
        self.results = read_json(self.dir / "results.json", {"stages": []})
        before, now = self.results.get("git"), git_commit()
        self.results.update(command=shlex.join(["python", *sys.argv]), versions=versions(), git=now,
                            args=mine, device=device_name(self.device))
        barrier()
        if rank() == 0: write_json(self.dir / "args.json", mine)
        self.say(f"{self.dir} {'continued' if self.resumed else 'started'} · git {self.results['git']} · "
                 f"{self.results['device']} x {world()}\n" + " ".join(f"{k}={v}" for k, v in mine.items()))
        if self.results["stages"] and before != now:
            self.say(f"{self.dir} has stages of git {before} and goes on with git {now}")
        seed_everything(args.seed)

    # --- the folder ---

    def lock(self):
        """A record lock ends with this process and is not inherited by its workers: none stays behind."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.dir / ".lock", "w")
        except OSError as error:
            raise UserError(f"--out {self.dir} can not be written to ({error.strerror}: {error.filename}); "
                            "choose another --out") from None
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.dir}: another process writes to this run folder; wait for it or choose "
                            "another --out") from None
        for left_over in self.dir.rglob(".*.tmp"):              # of a process that was killed while it wrote
            left_over.unlink()

    def clear(self):
        """--fresh: removes what a run wrote here and nothing else."""
        for name in read_json(self.dir / "state.json", {"wrote": []})["wrote"]:
            if (self.dir / name).is_dir(): shutil.rmtree(self.dir / name)
            else: (self.dir / name).unlink(missing_ok=True)
        own = [self.dir / name for name in ("results.json", "log.jsonl", "state.json", "args.json")]
        for file in [*self.dir.glob("events.out.tfevents.*"), *own]:            # args.json last: the guard
            file.unlink(missing_ok=True)

    def note(self, name):
        """Remembers, before it is made, a file or folder that --fresh may remove."""
        if name not in self.state["wrote"]:
            self.state["wrote"].append(name)
            self.save_state()

    def save_state(self):
        if rank() == 0: write_json(self.dir / "state.json", self.state)

    def path(self, folder, name, suffix=".png"):
        """<run>/<folder>/<name><suffix>; makes the folder."""
        self.note(Path(folder).parts[0])
        path = self.dir / folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def say(self, text):
        if rank() == 0: tqdm.write(text)

    def progress(self, total, initial, title):
        return tqdm(total=total, initial=initial, desc=title, disable=rank() != 0, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 30)

    # --- time and chance ---

    @contextlib.contextmanager
    def timed(self, stage):
        """Adds the block's wall seconds to .seconds(stage), which interruptions do not reset."""
        if stage in self.marks:                                 # an outer block counts already
            yield
            return
        self.marks[stage] = time.perf_counter()
        try:
            yield
        finally:
            self.tick()
            del self.marks[stage]

    def tick(self):
        now = time.perf_counter()
        for stage, mark in self.marks.items():
            self.state["seconds"][stage] = self.seconds(stage) + now - mark
            self.marks[stage] = now
        self.save_state()

    def seconds(self, stage):
        return self.state["seconds"].get(stage, 0.0)

    def reseed(self, *key):
        """Seeds by (--seed, key): a stage draws the same, whether the work before it is new or not."""
        seed_everything(zlib.crc32(repr((self.args.seed, *key)).encode()))

    # --- training ---

    def steps(self, stage, draws, steps, batch, net, optim, schedule=None):
        """Yields (step, batch on the device) for the steps that <stage>.pt does not hold yet, and saves.

        draws: data.Draws; step t takes items t·batch … (t+1)·batch − 1, split evenly over processes.
        schedule(step) is the factor on each group's first learning rate. After the loop the net holds the
        final weights, trained now, earlier, or by the run given as --reuse.
        """
        from data import collate
        part = batch // world()
        for group in optim.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.stage = stage
        self.reseed(stage, rank())
        self.take_over(stage, [f"{stage}.pt"], lambda file: read_state(file)["step"] == steps)
        start = self.restore(stage, net, optim)
        first = [t * batch + rank() * part for t in range(start, steps)]
        loader = torch.utils.data.DataLoader(
            draws, batch_sampler=[range(n, n + part) for n in first], num_workers=self.args.workers,
            collate_fn=collate, pin_memory=self.device.type == "cuda",
            generator=torch.Generator())                        # its own, to leave the global one alone
        with self.timed(stage), self.progress(steps, start, stage) as self.bar:
            for step, sample in enumerate(loader if first else (), start):
                for group in optim.param_groups:
                    group["lr"] = group["initial_lr"] * (schedule(step) if schedule else 1)
                yield step, to_device(sample, self.device)
                self.bar.update()
                took, at = self.saved                           # saving may cost a twentieth of the time
                due = took < 0.5 or time.perf_counter() - at > 20 * took
                if (step + 1) % self.args.save_every == 0 and due or step + 1 == steps:
                    self.save(stage, net, optim, step + 1)
        if world() > 1:                                         # DDP copies statistics only before a forward
            for buffer in unwrap(net).buffers(): dist.broadcast(buffer, 0)
        self.stage = ""
        self.reseed(stage, "end")
        barrier()

    def save(self, stage, net, optim, step):
        """Writes <stage>.pt; UserError instead where a weight is no finite number."""
        self.tick()
        start = time.perf_counter()
        if rank() == 0:
            if not all(weight.isfinite().all() for weight in net.parameters()):
                raise self.diverged("a weight is no finite number", step - 1)
            self.note(f"{stage}.pt")
            save_checkpoint(self.dir / f"{stage}.pt", {
                "model": unwrap(net).state_dict(), "optim": optim.state_dict(), "step": step,
                "args": plain_fields(self.args), "rng": rng_state()})
            if self.writer: self.writer.flush()
        self.saved = time.perf_counter() - start, time.perf_counter()

    def restore(self, stage, net, optim):
        """Sets net, optimiser and random state to <stage>.pt; returns the step to go on with."""
        if not (self.dir / f"{stage}.pt").exists():
            if rank() == 0: self.cut_log(stage, 0)
            return 0
        state = read_state(self.dir / f"{stage}.pt")
        unwrap(net).load_state_dict(state["model"])
        optim.load_state_dict(state["optim"])
        if rank() == 0:
            set_rng_state(state["rng"])
            self.cut_log(stage, state["step"])
        else:
            self.reseed(stage, rank(), state["step"])           # the file holds the state of process 0 only
        return state["step"]

    def cut_log(self, stage, start):
        """Removes log lines of steps that will be done again, and a last line that a kill cut short."""
        keep = [entry for entry in self.logged() if entry["stage"] != stage or entry["step"] < start]
        with atomic(self.dir / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in keep))

    def logged(self):
        """Entries of log.jsonl, but for a last line that a kill cut short."""
        file, entries = self.dir / "log.jsonl", []
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError): entries.append(json.loads(line))
        return entries

    def log(self, step, **values):
        """Every --log-every steps: numbers or tensors to log.jsonl, to TensorBoard, beside the bar.

        Raises UserError where a value called loss… is no finite number: what follows would be lost time.
        """
        if rank() != 0 or step % self.args.log_every:
            return
        values = {key: float(v.detach() if torch.is_tensor(v) else v) for key, v in values.items()}
        for key, value in values.items():
            if key.startswith("loss") and not math.isfinite(value):
                raise self.diverged(f"{key} is {value}", step)
        now = time.perf_counter()
        spent = round(self.seconds(self.stage) + now - self.marks.get(self.stage, now), 2)
        new = [{"stage": self.stage, "step": step, **values, "seconds": spent}]
        with open(self.dir / "log.jsonl", "a") as file:
            file.write(json.dumps(new[0]) + "\n")
        if self.writer is None:                                 # a purge is of all stages: all come again
            from torch.utils.tensorboard import SummaryWriter
            self.writer, new = SummaryWriter(self.dir, purge_step=0), self.logged()
        for entry in new:
            for key in entry.keys() - {"stage", "step", "seconds"}:
                self.writer.add_scalar(f"{entry['stage']}/{key}", entry[key], entry["step"])
        if self.bar: self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def diverged(self, what, step):
        """The UserError of a training that has come to nothing."""
        return UserError(f"{self.stage}: {what} in step {step}, the training has diverged; give a lower "
                         f"learning rate with --out NEW --reuse {self.dir} (keeps the stages before this), "
                         "or with --fresh")

    # --- label synthesis ---

    def todo(self, names, folder, chunk=1, stage=None, beside=()):
        """Yields lists of this process' names whose <folder>/<name>.png or .npz is not written yet.

        Chunks are names[0:chunk], … of the full list; one is left out when all its files exist. The random
        state is set by folder and chunk, so it does not matter what was done before. stage: the --reuse key
        of these files, and of those in the folders `beside`, which the loop writes before them.
        """
        names, suffixes = list(names), (".png", ".npz")
        self.take_over(stage, [f"{place}/{name}{suffix}" for place in (*beside, folder) for name in names
                               for suffix in suffixes])
        chunks = shard([names[i:i + chunk] for i in range(0, len(names), chunk)])
        left = [part for part in chunks if not all(any((self.dir / folder / f"{name}{suffix}").exists()
                                                       for suffix in suffixes) for name in part)]
        with self.progress(len(chunks), len(chunks) - len(left), folder) as bar:
            for part in left:
                self.reseed(folder, part[0])
                yield part
                bar.update()
                self.tick()
        self.reseed(folder, "end")
        barrier()

    # --- stages of another run ---

    def donor(self):
        """The fields of the run given as --reuse."""
        theirs = read_json(Path(self.args.reuse) / "args.json")
        if theirs is None:
            raise UserError(f"--reuse {self.args.reuse} has no args.json; give the folder of a run")
        return theirs

    def reuse_ok(self, stage):
        """Whether the run given as --reuse agrees in the fields of this stage and of all stages before it."""
        if not self.args.reuse or stage not in self.fields:
            return False
        theirs, stages = self.donor(), list(self.fields)
        needed = {name for before in stages[:stages.index(stage) + 1] for name in self.fields[before]}
        differ = differing(plain_fields(self.args), theirs, needed)
        if differ: self.say(f"[{stage}] not taken from {self.args.reuse}: {'; '.join(differ)}")
        return not differ

    def take_over(self, stage, files, finished=Path.exists):
        """Copies the files that the run given as --reuse has finished and this one lacks; says how many."""
        if rank() == 0 and self.reuse_ok(stage):
            theirs, taken = Path(self.args.reuse), 0
            for name in files:
                if not (self.dir / name).exists() and (theirs / name).exists() and finished(theirs / name):
                    self.note(Path(name).parts[0])
                    with atomic(self.dir / name) as temporary:
                        shutil.copyfile(theirs / name, temporary)
                    taken += 1
            if taken:
                self.say(f"[{stage}] {taken} file(s) taken from {theirs}")
                self.results.setdefault("reused", {})[stage] = str(theirs)
                made = read_json(theirs / "results.json", {})
                made = made.get("reused_git", {}).get(stage, made.get("git"))
                if made: self.results.setdefault("reused_git", {})[stage] = made
        barrier()

    # --- results ---

    def has(self, stage):
        """Whether results.json holds this stage."""
        return any(entry["stage"] == stage for entry in self.results["stages"])

    def result(self, stage, confusion=None, **values):
        """Adds (or replaces) a stage of results.json; a ConfusionMatrix becomes miou and iou, in percent."""
        entry = {"stage": stage, **values}
        if getattr(self.args, "crf", "") == "none" and "crf" in entry: entry["crf"] = False
        if confusion is not None: entry.update(miou=confusion.miou(), iou=confusion.iou())
        entry.setdefault("seconds", round(self.seconds(stage), 2))
        stages = self.results["stages"]
        at = next((i for i, old in enumerate(stages) if old["stage"] == stage), len(stages))
        before = max((old.get("peak_memory_mb", 0) for old in stages[at:at + 1]), default=0)
        entry.setdefault("peak_memory_mb", max(before, peak_memory(self.device)))
        entry["git"] = self.results["git"]
        stages[at:at + 1] = [entry]
        if rank() == 0: write_json(self.dir / "results.json", self.results)
        self.say(f"[{stage}] " + " ".join(f"{key}={show_value(value)}" for key, value in entry.items()
                                          if key not in ("stage", "iou", "git")))

    def table(self):
        """Prints the stages' numbers as a table, or that there are none."""
        stages = self.results["stages"]
        if not stages: return self.say(f"{self.dir} is complete; without masks nothing was scored")
        columns = ["stage", *dict.fromkeys(key for entry in stages for key, value in entry.items()
                                           if type(value) in (int, float))]
        rows = [columns, *([show_value(entry.get(key, "")) for key in columns] for entry in stages)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        self.say("\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows))

    # --- the device ---

    def autocast(self):
        """bf16 on CUDA with --amp, else nothing. Losses belong outside, in float32."""
        bf16 = self.device.type == "cuda" and self.args.amp
        return torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()

    def place(self, net):
        """The net on this process' device, channels last, with gradients averaged over processes."""
        return distribute(net.to(self.device, memory_format=torch.channels_last))


def to_device(sample, device):
    """Moves a batch's tensors, and those in its lists, to the device."""
    def move(value):
        if torch.is_tensor(value): return value.to(device, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value
    return type(sample)(**{key: move(value) for key, value in vars(sample).items()})


def poly(steps, power=0.9):
    """Schedule step -> (1 − step/steps)^power."""
    return lambda step: (1 - step / steps) ** power


def show_value(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def versions():
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages}


def git_commit():
    """Commit of this file's folder ("-dirty" with changes), or "none"."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.strip() or "none"


def device_name(device):
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"cpu ({torch.get_num_threads()} threads)"


def peak_memory(device):
    """Peak so far in MB: of the GPU's allocator, or of this process."""
    if device.type == "cuda": return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


# ── Backbones ───────────────────────────────────────────────────────────────────────────────────────────────

class Backbone(nn.Module):
    """A chain of blocks whose outputs are the feature taps.

    .channels, .strides: of each tap, shallow to deep. freeze(): batch norms keep their statistics and their
    affine parameters, also after .train().
    """

    def __init__(self, blocks, channels, strides):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.channels, self.strides, self.frozen = tuple(channels), tuple(strides), False

    def forward(self, x):
        """(B,3,H,W), by ImageNet's mean and standard deviation -> list of (B,channels[i],h_i,w_i)."""
        taps = []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return taps

    def norms(self):
        kinds = nn.BatchNorm2d, nn.SyncBatchNorm                # no kind of the former, see share_norms
        return [module for module in self.modules() if isinstance(module, kinds)]

    def freeze(self):
        self.frozen = True
        for norm in self.norms():
            norm.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for norm in self.norms() if self.frozen else []:
            norm.eval()
        return self


def make_backbone(name, weights, output_stride, frozen_bn=True):
    """Backbone by name: tiny, resnet18, resnet50, resnet101, vgg16, mobilenet_v2, resnet38.

    weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a file: a state dict in torchvision's keys
    (half precision is cast), for resnet38 also MXNet's .params. output_stride: of the deepest tap; strides
    beyond it become dilation, the weights stay. frozen_bn: batch norms are not trained (take False where they
    start from nothing). Raises UserError for a name, a stride or weights that there are not.
    """
    if name not in CHANNELS:
        raise UserError(f"backbone {name}: there is {', '.join(CHANNELS)}")
    if name == "resnet38":
        backbone = ResNet38()
        load_weights(backbone, name, weights)
    else:
        net = torchvision.models.get_model(name, weights=None) if name != "tiny" else tiny_net()
        load_weights(net, name, weights)
        blocks = parts_between_taps(net, name)
        backbone = Backbone(blocks, CHANNELS[name], dilate(blocks, output_stride))
    if backbone.strides[-1] != output_stride:
        raise UserError(f"{name} can not have output stride {output_stride}, only {backbone.strides[-1]}")
    return backbone.freeze() if frozen_bn else backbone


CHANNELS = {"tiny": (32, 48, 64, 96), "resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048),
            "resnet101": (256, 512, 1024, 2048), "vgg16": (128, 256, 512, 512),
            "mobilenet_v2": (24, 32, 96, 1280), "resnet38": (256, 512, 1024, 4096)}     # of the feature taps


def weights_of(backbone, weights):
    """An MXNet file fits ResNet-38 alone: the run's other network then starts from torchvision's weights."""
    return "imagenet" if weights.endswith(".params") and backbone != "resnet38" else weights


def pretrained(backbone, weights):
    """Whether this backbone starts from trained weights, so that its batch norm is kept as it is."""
    return backbone != "tiny" and weights != "none"


def tiny_net():
    """A ResNet of four basic blocks to train from nothing on scenes of about 100 pixels; 0.27 M weights."""
    blocks, inputs = [], 32
    for width, stride in zip(CHANNELS["tiny"], (1, 2, 2, 2)):
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        blocks.append(resnet.BasicBlock(inputs, width, stride, shortcut if inputs != width else None))
        inputs = width
    stem = (nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(nn.Sequential(*stem, blocks[0]), *blocks[1:])


def parts_between_taps(net, name):
    """The parts of a network between its feature taps; a classifier and the pooling before it stay behind."""
    if name == "tiny":
        return list(net)
    if name == "mobilenet_v2":
        return [net.features[:4], net.features[4:7], net.features[7:14], net.features[14:]]
    if name == "vgg16":                                         # taps conv2_2, conv3_3, conv4_3, conv5_3
        return [net.features[:9], net.features[9:16], net.features[16:23], net.features[23:30]]
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
    return [stem, net.layer2, net.layer3, net.layer4]


def dilate(blocks, output_stride):
    """Turns strides beyond output_stride into dilation, in place; returns the stride after each block.

    The layer that loses its stride keeps its dilation, those after it get twice as much, so that each kernel
    sees the same pixels as before, at more places.
    """
    stride, dilation, strides = 1, 1, []
    for block in blocks:
        for layer in block.modules():
            if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                continue
            pool, kernel = isinstance(layer, nn.MaxPool2d), int(np.max(layer.kernel_size))
            if kernel == 1:                                     # a shortcut beside the layers just visited
                layer.stride = (1, 1) if dilation > 1 else layer.stride
                continue
            before, strided = dilation, np.max(layer.stride) == 2
            if strided and stride < output_stride:
                stride *= 2
            elif strided:
                dilation *= 2
                layer.stride = 1 if pool else (1, 1)
            if pool and strided:
                layer.kernel_size, layer.padding = 3, 1         # DeepLab-v1's: cell i lies on pixel stride·i
            if not pool:
                layer.dilation, layer.padding = (before, before), (kernel // 2 * before,) * 2
        strides.append(stride)
    return strides


def load_weights(net, name, weights):
    """Loads "imagenet" or a file into a network of torchvision's key names; "none" leaves it as it is.

    Classifier keys are ignored. Raises UserError for a file that can not be had or read, and for keys that
    are missing, unknown or of another shape.
    """
    if weights == "none":
        return
    if str(weights).endswith(".params"):
        load_resnet38_params(net, weights)
        return
    state = imagenet_weights(name) if weights == "imagenet" else read_state(weights)
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"weights {weights}: not a state dict; give a file of tensors by name")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()
             if not key.startswith(("fc.", "classifier."))}
    load_exactly(net, state, weights, ("fc.", "classifier."))


def load_exactly(net, state, source, ignored=()):
    """load_state_dict that names the keys which are missing, unknown or of another shape, in a UserError."""
    own = {key: value for key, value in net.state_dict().items() if not key.startswith(tuple(ignored))}
    needed = [key for key in own if not key.endswith("num_batches_tracked")]    # old files lack these
    faults = [*(f"missing {key}" for key in needed if key not in state),
              *(f"unknown {key}" for key in state if key not in own),
              *(f"shape {tuple(state[key].shape)} of {key}, not {tuple(own[key].shape)}"
                for key in own if key in state and state[key].shape != own[key].shape)]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"weights {source} do not fit this backbone: {', '.join(faults[:5])}{more}; "
                        "choose another --backbone or other weights")
    net.load_state_dict(state, strict=False)


def read_state(file):
    """State dict of a file; tensors and plain types only."""
    if not Path(file).is_file():
        raise UserError(f"weights {file}: no such file; give imagenet, none or a file with a state dict")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                                  # torch raises many kinds for a broken file
        why = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in why:                               # torch's advice is to execute what it holds
            why = "it is no checkpoint, or holds more than tensors and plain types; nothing was executed"
        raise UserError(f"weights {file} can not be read as a state dict ({why}); take the file again, or "
                        "delete it if a run wrote it: the run makes it anew") from None


def read_checkpoint(file, Args):
    """<stage>.pt of a run of the method file whose Args these are; UserError for anything else."""
    state, known = read_state(file), {field.name for field in dataclasses.fields(Args)}
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or "args" not in state:
        raise UserError(f"--checkpoint {file} has no model and args; give a run's .pt, as segmenter.pt")
    foreign = sorted(set(state["args"]) - known)
    if foreign:
        raise UserError(f"--checkpoint {file} is of another method or version (it has "
                        f"{', '.join(foreign[:3])}); give it to the file that wrote it")
    return state


def imagenet_weights(name):
    """torchvision's IMAGENET1K_V1 state dict, from its cache or the network."""
    if name in ("tiny", "resnet38"):
        remedy = "--weights none" if name == "tiny" else "--weights FILE.params, the authors' MXNet file"
        raise UserError(f"torchvision has no ImageNet weights for {name}: give {remedy}")
    source = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return source.get_state_dict(progress=rank() == 0, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"can not download {source.url} ({error}): fetch it elsewhere, give it as --weights "
                        "FILE, or train from nothing with --weights none") from None


# --- Wide-ResNet-38 (Wu, Shen, van den Hengel: Wider or Deeper, model A1) ---

# stage: (units, widths, stride of the first unit, dilation, dropout); two widths: 3x3 3x3, three: 1x1 3x3 1x1
PLAN38 = {2: (3, (128, 128), 2, 1, 0), 3: (3, (256, 256), 2, 1, 0), 4: (6, (512, 512), 2, 1, 0),
          5: (3, (512, 1024), 1, 2, 0), 6: (1, (512, 1024, 2048), 1, 4, 0.3),
          7: (1, (1024, 2048, 4096), 1, 4, 0.5)}


class Unit38(nn.Module):
    """Pre-activation residual unit. Returns its output and its first activation (a feature tap)."""

    def __init__(self, inputs, widths, stride, dilations, dropout):
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        sizes = list(zip((inputs, *widths), widths, kernels, dilations))
        self.bns = nn.ModuleList(nn.BatchNorm2d(size[0]) for size in sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(m, n, k, stride if i == 0 else 1, k // 2 * d, d, bias=False)
            for i, (m, n, k, d) in enumerate(sizes))
        same = inputs == widths[-1] and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, widths[-1], 1, stride, bias=False)
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, x):
        first = F.relu(self.bns[0](x))
        y = self.convs[0](first)
        for bn, conv in zip(self.bns[1:], self.convs[1:]):
            y = conv(self.dropout(F.relu(bn(y))))
        return y + (x if self.shortcut is None else self.shortcut(first)), first


class ResNet38(Backbone):
    """Taps after BN-ReLU: 256 at stride 4; 512, 1024, 4096 at stride 8. thin divides all widths (for tests).

    freeze() also fixes the first convolution and stage 2, as PSA and its heirs do.
    """

    def __init__(self, thin=1):
        super().__init__([], [width // thin for width in CHANNELS["resnet38"]], (4, 8, 8, 8))
        self.conv1a, inputs = nn.Conv2d(3, 64 // thin, 3, padding=1, bias=False), 64 // thin
        self.units = nn.ModuleDict()
        for stage, (count, widths, stride, dilation, dropout) in PLAN38.items():
            widths = [width // thin for width in widths]
            for i in range(count):
                dilations = [dilation if i else 1, dilation, dilation]
                self.units[f"{stage}a" if i == 0 else f"{stage}b{i}"] = Unit38(
                    inputs, widths, 1 if i else stride, dilations, dropout)
                inputs = widths[-1]
        self.bn7 = nn.BatchNorm2d(inputs)

    def forward(self, x):
        taps, x = [], self.conv1a(x)
        for name, unit in self.units.items():
            x, first = unit(x)
            if name in ("4a", "5a", "6a"):
                taps.append(first)
        return [*taps, F.relu(self.bn7(x))]

    def freeze(self):
        for part in (self.conv1a, *(unit for name, unit in self.units.items() if name[0] == "2")):
            part.requires_grad_(False)
        return super().freeze()


def load_resnet38_params(net, file):
    """Loads the MXNet file ilsvrc-cls_rna-a1_cls1000_ep-0001.params into a ResNet38 (no mxnet needed).

    res2a_branch2a_weight -> units.2a.convs.0.weight, res3b1_branch2b1_weight -> units.3b1.convs.1.weight
    (branch2b and branch2b1 are the same, branch2b2 is convs.2), res2a_branch1_weight ->
    units.2a.shortcut.weight; bn2a_branch2a_gamma, _beta, _moving_mean, _moving_var -> units.2a.bns.0.weight,
    .bias, .running_mean, .running_var; conv1a and bn7 keep their names; linear1000 is left out.
    """
    state, unknown = {}, []
    for key, array in read_mxnet(file).items():
        name = key.split(":")[-1]
        target = key38(name)
        if target:
            state[target] = torch.from_numpy(array.astype(np.float32))
        elif not name.startswith("linear1000_"):
            unknown.append(name)
    if unknown:
        raise UserError(f"weights {file}: not keys of Wide-ResNet-38: {', '.join(sorted(unknown)[:5])}")
    load_exactly(net, state, file)


def key38(name):
    """Key of ResNet38 for a key of the MXNet file, or None."""
    last = {"weight": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
            "moving_var": "running_var"}
    match = re.fullmatch(r"(?:(conv1a|bn7)|(res|bn)(\d[ab]\d*)_branch(1|2a|2b1?|2b2))_(\w+)", name)
    if not match or match[5] not in last:
        return None
    if match[1]:
        return f"{match[1]}.{last[match[5]]}"
    index = {"2a": 0, "2b": 1, "2b1": 1, "2b2": 2}.get(match[4])
    part = "shortcut" if index is None else f"{'convs' if match[2] == 'res' else 'bns'}.{index}"
    return f"units.{match[3]}.{part}.{last[match[5]]}"


def read_mxnet(file):
    """MXNet's NDArray list (little endian) -> {name: array}.

    uint64 magic 0x112, uint64 reserved, uint64 count, arrays; uint64 count, names (uint64 length, bytes).
    Array: uint32 0xF993FAC9, int32 storage | uint32 0xF993FAC8 | nothing (oldest form); uint32 rank, that
    many sizes (int64, oldest form uint32); int32 device, int32 device number; int32 type; the values.
    """
    try:
        data, at = Path(file).read_bytes(), 0
    except OSError as error:
        raise UserError(f"weights {file} can not be read: {error.strerror}") from None

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values if len(values) != 1 else values[0]

    def take_array():
        nonlocal at
        first = take("I")
        if first == 0xF993FAC9 and take("i") not in (0, -1):
            raise ValueError("sparse array")
        new = first in (0xF993FAC8, 0xF993FAC9)
        size = take("I") if new else first
        shape = np.atleast_1d(take(f"{size}{'q' if new else 'I'}"))
        take("ii")
        dtype = np.dtype(["<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8"][take("i")])
        array = np.frombuffer(data, dtype, int(np.prod(shape)), at)
        at += array.nbytes
        return array.reshape(shape)

    try:
        if take("Q") != 0x112:
            raise ValueError("it does not begin with 0x112")
        take("Q")
        arrays = [take_array() for _ in range(take("Q"))]
        names = [take(f"{take('Q')}s").decode() for _ in range(take("Q"))]
        return dict(zip(names, arrays, strict=True))
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(f"weights {file}: not an MXNet parameter file, or cut short ({error}); take it "
                        "again") from None


# ── From feature cells to pixels ────────────────────────────────────────────────────────────────────────────
# Odd kernels centre cell i on pixel stride·i. Bilinear interpolation straight to the image's size puts it
# elsewhere, and for each size at another place.

def lerp_matrix(pixels, nodes, stride, shape, device, scale=1.0):
    """Bilinear weights that enlarge one axis. Feature cell i lies at pixel stride·i of the image the network
    saw, which was `scale` times the original; beyond the first and last cell their values are repeated.

    pixels, nodes: the image's own; shape: (rows, columns) of the padded matrix, at least these -> float32
    """
    index = torch.arange(pixels, device=device)
    place = (((index + 0.5) * scale - 0.5) / stride).clamp(0, nodes - 1)
    low = place.floor().long()
    matrix = torch.zeros(shape, device=device)
    matrix[index, low] = 1 - (place - low)
    matrix[index, (low + 1).clamp_max(nodes - 1)] += place - low
    return matrix


def enlarge(x, rows, columns):
    """Node maps to pixel maps by two products.   x (B,C,h,w), rows (B,H,h), columns (B,W,w) -> (B,C,H,W)"""
    with torch.autocast(x.device.type, enabled=False):          # in bf16 near scores would become equal
        x = (x.float().flatten(1, 2) @ columns.transpose(1, 2)).unflatten(1, x.shape[1:3])
        return rows[:, None] @ x


def cells_to_pixels(x, stride, size, seen=None):
    """Feature maps (B,C,h,w) of an image seen at size `seen` -> (B,C,*size), its own size.

    For sides of stride·n + 1, such as 321 and 513, it is bilinear interpolation with align_corners=True.
    """
    rows, columns = (lerp_matrix(n, cells, stride, (n, cells), x.device, scaled / n)
                     for n, cells, scaled in zip(size, x.shape[-2:], seen or size))
    return enlarge(x, rows[None], columns[None])


# ── Heads ───────────────────────────────────────────────────────────────────────────────────────────────────

class ASPP(nn.Module):
    """DeepLab-v2's classifier, the sum of four dilated 3x3: (B,channels,h,w) -> (B,classes,h,w)."""

    def __init__(self, channels, classes, rates=(6, 12, 18, 24)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, classes, 3, padding=r, dilation=r) for r in rates)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class LargeFOV(ASPP):
    """CIAN's classifier: one 3x3 convolution of dilation 12."""

    def __init__(self, channels, classes, dilation=12):
        super().__init__(channels, classes, (dilation,))


class LargeFOVVGG(nn.Sequential):
    """DeepLab-v1's classifier on conv5_3: two poolings of stride 1, fc6 3x3 of dilation 12, fc7, fc8."""

    def __init__(self, channels, classes, dilation=12):
        super().__init__(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1),
                         nn.Conv2d(channels, 1024, 3, padding=dilation, dilation=dilation), nn.ReLU(),
                         nn.Dropout(0.5), nn.Conv2d(1024, 1024, 1), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(1024, classes, 1))
        nn.init.normal_(self[-1].weight, std=0.01)
        nn.init.zeros_(self[-1].bias)


class DeepLab(nn.Module):
    """Backbone and head: image (B,3,H,W) -> logits (B,K+1,h,w) at the backbone's output stride."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image):
        return self.head(self.backbone(image)[-1])


class PSPNet(nn.Module):
    """Pyramid pooling (Zhao et al. 2017): the deepest tap beside its means over 1, 2x2, 3x3 and 6x6 areas.

    image (B,3,H,W) -> logits (B,classes,h,w); while it trains also those of an auxiliary classifier on the
    tap before. Its batch norms need two images or more in each process.
    """

    def __init__(self, backbone, classes, bins=(1, 2, 3, 6)):
        super().__init__()
        before, channels = backbone.channels[-2:]
        narrow, pooled = channels // 4, channels // len(bins)
        self.backbone = backbone
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv_norm(channels, pooled, 1))
                                   for n in bins)
        self.head = nn.Sequential(*conv_norm(channels + len(bins) * pooled, narrow, 3), nn.Dropout2d(0.1),
                                  nn.Conv2d(narrow, classes, 1))
        self.auxiliary = nn.Sequential(*conv_norm(before, before // 4, 3), nn.Dropout2d(0.1),
                                       nn.Conv2d(before // 4, classes, 1))

    def forward(self, image):
        *_, before, x = self.backbone(image)
        means = [F.interpolate(pool(x), x.shape[-2:], mode="bilinear") for pool in self.pools]
        logits = self.head(torch.cat([x, *means], dim=1))
        return (logits, self.auxiliary(before)) if self.training else logits


def conv_norm(inputs, outputs, kernel):
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


class Pyramid(nn.Module):
    """Feature pyramid over all taps of a backbone.   (B,3,H,W) -> {"0": (B,width,h,w), …, "pool": …}"""

    def __init__(self, backbone, width):
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        self.backbone, self.out_channels = backbone, width
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, LastLevelMaxPool())

    def forward(self, image):
        return self.fpn({str(i): tap for i, tap in enumerate(self.backbone(image))})


def mask_rcnn(net, size, width, rois, classes):
    """torchvision's Mask R-CNN with a feature pyramid on a Backbone.

    size: longer side that pictures are brought to; width: channels of pyramid and mask head, the box head has
    four times as many; rois: boxes that an image's losses are taken of
    """
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    sides = tuple((8 * s,) for s in (*net.strides, 2 * net.strides[-1]))  # ResNets: 32 … 512, as Detectron
    return MaskRCNN(
        Pyramid(net, width), min_size=size, max_size=size, image_mean=[0, 0, 0], image_std=[1, 1, 1],
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides)),
        box_head=TwoMLPHead(49 * width, 4 * width), box_predictor=FastRCNNPredictor(4 * width, classes + 1),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1), box_batch_size_per_image=rois)


def detector_schedule(steps, warmup):
    """Detectron's: up from a third, then a tenth after 2/3 and a hundredth after 8/9 of the steps."""
    def factor(step):
        rise = min(1, 1 / 3 + 2 / 3 * step / max(1, warmup))
        return rise * 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 8 / 9))
    return factor


# ── Gaussian filtering on the permutohedral lattice ─────────────────────────────────────────────────────────

class PermutohedralLattice:
    """Gaussian filter of N points in time linear in N (Adams, Baek, Davis 2010; the steps' names are theirs).

    filter(x)_i = s · sum over the points j of i's image of exp(-|f_i - f_j|²/2) x_j, nearly: s is about 0.6
    for d = 5 and 0.9 for d = 2. Kraehenbuehl's code errs alike, and papers' numbers were made with it.
    features (N,d), float32 or float64, in deviations of the kernel; image (N,) int64: each point's image,
    None = one. bag: the most values that one sum of the splat takes in (a flat region's vertex has thousands,
    which a GPU adds up one by one); 0 = any number. Deterministic.
    """

    def __init__(self, features, image=None, bag=None):
        (N, d), device = features.shape, features.device
        cell, rank, weight = self.simplex(features)
        # Keys: corner k has remainder k; from corner k-1 to k the cell of rank d+1-k falls by one. A key's
        # digits are the remainder and the first d cells, with room for neighbours of the outermost corners.
        low = cell.amin(1) - 2
        digits = (cell.amax(1) - low + 2).tolist()[:d]
        unit = [(d + 1) * math.prod(digits[:i]) for i in range(d + 1)]
        count = unit[d] * (1 if image is None else int(image.max()) + 1)
        if count >= 2 ** 63:
            raise ValueError(f"PermutohedralLattice: the features span {count:.0e} cells, 2^63 is the most; "
                             "are the deviations far too small?")
        whole = torch.int32 if count < 2 ** 31 else torch.int64                         # sorts twice as fast
        units = torch.tensor([*unit[:d], 0], device=device, dtype=whole)[:, None]
        key = ((cell - low[:, None]).to(whole) * units).sum(0, dtype=whole)
        key = key if image is None else key + image.to(whole) * unit[d]
        fall = torch.empty(d + 1, N, device=device, dtype=whole)
        fall.scatter_(0, rank, units.expand(-1, N) - 1)
        key = torch.cat([key[None], -fall[1:].flip(0)]).cumsum(0, dtype=whole)
        # Vertices: equal keys. One stable sort gives each vertex's corners and each corner's vertex.
        key, order = key.flatten().sort(stable=True)
        new = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=new[1:])
        number = torch.empty_like(order, dtype=torch.int32)
        number.scatter_(0, order, new.cumsum(0, dtype=torch.int32).sub_(1))
        self.vertex = number.view(d + 1, N).T.flatten()
        self.slice_weight = weight.T.flatten().div_(1 + 2.0 ** -d)
        self.slice = torch.arange(0, (d + 1) * N, d + 1, device=device, dtype=torch.int32)
        self.point, self.splat_weight = order.int().remainder_(N), weight.flatten()[order]
        start = new.nonzero()[:, 0]
        self.cut_bags(F.pad(start, (0, 1), value=len(order)),   # vertex M is empty: its value is always zero
                      (64 if features.is_cuda else 0) if bag is None else bag)
        self.join(key[start], units, d)
        self.blur_weight = features.new_tensor([1, 0.5, 0.5]).repeat(len(start) + 1)

    @staticmethod
    def simplex(features):
        """The simplex around each point: cells of its remainder-0 corner and ranks, (d+1,N) each; weights."""
        N, d = features.shape
        # Elevate: into the plane of d+1 coordinates with sum 0, in units in which the blur has deviation 1.
        axis = torch.arange(1, d + 1, device=features.device, dtype=features.dtype)
        f = features.T * ((d + 1) * (2 / 3) ** 0.5 / (axis * (axis + 1)).sqrt())[:, None]
        elevated, total = f.new_empty(d + 1, N), f.new_zeros(N)
        for j in range(d, 0, -1):
            torch.sub(total, f[j - 1], alpha=j, out=elevated[j])
            total += f[j - 1]
        elevated[0] = total
        # Embed in the simplex: the nearest point of remainder 0, (d+1)·cell; ranks of the offsets to it.
        cell = (elevated / (d + 1)).round_()
        offset, cell = elevated.sub_(cell, alpha=d + 1), cell.int()
        rank = cell.sum(0, dtype=torch.int32).repeat(d + 1, 1)
        for i in range(d):
            for j in range(i + 1, d + 1):
                less = offset[i] < offset[j]
                rank[i] += less
                rank[j] += less.logical_not_()
        wrap = (rank < 0).int() - (rank > d).int()              # where that point lies beside the plane
        rank, cell = rank.add_(wrap, alpha=d + 1).long(), cell.add_(wrap)
        offset.sub_(wrap, alpha=d + 1)
        # Barycentric weights of the simplex's corners 0..d.
        falling = torch.empty_like(offset).scatter_(0, rank, offset.div_(d + 1))
        weight = torch.cat([falling[d:] - falling[:1] + 1, (falling[:-1] - falling[1:]).flip(0)])
        return cell, rank, weight

    def cut_bags(self, start, bag):
        """Where each vertex's sum of the splat begins; with `bag`: sums of at most so many, then of those."""
        self.splat, self.pieces = start.int(), None
        if bag:
            pieces = F.pad((start.diff() + bag - 1) // bag, (0, 1))
            self.pieces = (pieces.cumsum(0) - pieces).int()
            inner = torch.arange(int(pieces.sum()), device=start.device)
            inner -= self.pieces.repeat_interleave(pieces)
            self.splat = (start.repeat_interleave(pieces) + bag * inner).int()

    def join(self, vertex, units, d):
        """Blur: along axis j a vertex has neighbours at ±(1, …, 1, -d, 1, …, 1), -d at j, or M where none is.

        vertex (M,) sorted keys; units (d+1,1) of a key's digits
        """
        M, whole = len(vertex), vertex.dtype
        carry = torch.where(vertex % (d + 1) == d, units.sum() - d, 1).to(whole)
        wanted = vertex + carry - units
        found = torch.searchsorted(vertex, wanted, out_int32=True).clamp_max_(M - 1)
        above = F.pad(torch.where(vertex[found] == wanted, found, M).int(), (0, 1), value=M)
        here = torch.arange(M + 1, device=vertex.device, dtype=torch.int32).expand(d + 1, -1)
        below = torch.full_like(above, M).scatter_(1, above.long(), here)
        below[:, M] = M
        self.neighbours = torch.stack([here, above, below], dim=-1).flatten(1)          # (d+1,3(M+1))
        self.blur = torch.arange(0, 3 * (M + 1), 3, device=vertex.device, dtype=torch.int32)

    def filter(self, x, transpose=False):
        """K x, or Kᵀ x: the blurs do not commute where vertices are missing, so K is not quite symmetric.

        x (N,C) in the features' type, contiguous -> (N,C). No gradient: see gaussian_filter.
        """
        bags = functools.partial(F.embedding_bag, mode="sum")   # on CPUs far the fastest weighted sum of rows
        x = bags(self.point, x, self.splat, per_sample_weights=self.splat_weight)
        if self.pieces is not None:
            x = bags(torch.arange(len(x), device=x.device, dtype=torch.int32), x, self.pieces)
        for neighbours in self.neighbours.flip(0) if transpose else self.neighbours:
            x = bags(neighbours, x, self.blur, per_sample_weights=self.blur_weight)
        return bags(self.vertex, x, self.slice, per_sample_weights=self.slice_weight)

    def normalise(self):
        """From now on K is D^-1/2 K D^-1/2, D its row sums: pydensecrf's NORMALIZE_SYMMETRIC."""
        norm = (self.filter(self.slice_weight.new_ones(len(self.slice), 1)) + 1e-20).rsqrt_()[:, 0]
        self.splat_weight *= norm[self.point]
        self.slice_weight *= norm.repeat_interleave(len(self.vertex) // len(norm))
        return self


class ExactFilter:
    """The Gaussian filter itself, by attention: time N², memory N. For tests and for small images on a GPU.

    A query f_i has the weight exp(f_i·f_j - |f_j|²/2) for key f_j, and exp(|f_i|²/2) for a null key. What
    comes back for x, divided by what does for the null key, is the sum over j of exp(-|f_i - f_j|²/2) x_j.
    """

    def __init__(self, features):
        f = features - features.mean(0)
        half, one = f.square().sum(1, keepdim=True) / 2, torch.ones_like(f[:, :1])
        self.query = torch.cat([f, one, half], dim=1)
        self.key = F.pad(torch.cat([f, -half, 0 * one], dim=1), (0, 0, 0, 1))
        self.key[-1, -1] = 1

    def filter(self, x, transpose=False):
        """x (N,C) -> (N,C); K is symmetric."""
        value = F.pad(x, (0, 1, 0, 1))
        value[-1, -1] = 1
        heads = (t[None, None] for t in (self.query, self.key, value))
        out = F.scaled_dot_product_attention(*heads, scale=1.0)[0, 0]
        return out[:, :-1] / out[:, -1:]


class GaussianFilter(torch.autograd.Function):
    """GaussianFilter.apply(x, kernel): kernel.filter(x), whose gradient is a filtering with the transpose."""

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.kernel = kernel
        return kernel.filter(x.contiguous())

    @staticmethod
    def backward(ctx, gradient):
        return ctx.kernel.filter(gradient.contiguous(), transpose=True), None


def pixel_features(sizes, sigma_xy, device="cpu", dtype=torch.float32):
    """x / σ, y / σ of the pixels of pictures of these (H,W), row by row; the picture of each.  (N,2), (N,)"""
    places, image = [], []
    for i, (H, W) in enumerate(sizes):
        x, y = torch.meshgrid(torch.arange(W, device=device), torch.arange(H, device=device), indexing="xy")
        places.append(torch.stack([x, y], dim=-1).flatten(0, 1))
        image.append(torch.full((H * W,), i, device=device))
    return torch.cat(places).to(dtype) / sigma_xy, torch.cat(image) if len(sizes) > 1 else None


def dense_energy(images, probs, sigma_rgb, sigma_xy, valid=None, gate=None, exact=False):
    """Dense energy Σ_i g_i Σ_j G_ij Σ_c P_i^c (1 − P_j^c), mean over the images.   -> scalar, never negative

    images (B,3,H,W) RGB 0..255; probs (B,C,H,W), float32 or float64, at the same size; sigma_xy in pixels of
    that size; valid (B,H,W) bool: False pixels (padding) take no part. G = exp(-|Δxy|²/2σ² - |ΔRGB|²/2σ²) is
    not normalised and includes i = j: the lattice's (about 0.6 of it), or with exact=True G itself.
    Without gate, g = 1 and the gradient is the true one. With gate (B,H,W), as RRM's authors do it, g is a
    constant for the gradient, and dE/dP = -2 g G P, as if g and G commuted.
    """
    B, C, H, W = probs.shape
    if images.shape != (B, 3, H, W):
        raise ValueError(f"dense_energy: images {tuple(images.shape)}, probabilities {tuple(probs.shape)}")
    if not probs.isfinite().all():
        raise ValueError("dense_energy: probabilities hold NaN or infinity")
    valid = torch.ones(B, H, W, dtype=torch.bool, device=probs.device) if valid is None else valid
    together = probs.is_cuda and not exact                      # on the CPU image by image: it fits the cache
    energy = 0 * probs.sum()
    for part in [slice(None)] if together else [slice(b, b + 1) for b in range(B)]:
        inside = valid[part].flatten()
        place, number = pixel_features([(H, W)] * len(valid[part]), sigma_xy, probs.device, probs.dtype)
        colour = images[part].permute(0, 2, 3, 1).reshape(-1, 3).to(probs.dtype)
        f, P = torch.cat([place, colour / sigma_rgb], dim=1)[inside], probs[part].permute(0, 2, 3, 1)
        P, number = P.reshape(-1, C)[inside], None if number is None else number[inside]
        if not len(P):
            continue
        kernel = ExactFilter(f) if exact else PermutohedralLattice(f, number)
        g = 1 if gate is None else gate[part].flatten()[inside].detach().to(P.dtype)
        KP, around = GaussianFilter.apply(P, kernel), kernel.filter(torch.ones_like(P[:, :1]))[:, 0]
        value = (g * (around * P.sum(1) - (P * KP).sum(1))).sum()                       # Σ_j G_ij Σ_c …
        if gate is not None:
            slope = -2 * (g[:, None] * P * KP.detach()).sum()
            value = value.detach() + slope - slope.detach()
        energy = energy + value
    return energy / B


# ── Dense CRF ───────────────────────────────────────────────────────────────────────────────────────────────

class CRF(NamedTuple):
    """Mean field: Gaussian and bilateral kernel (deviations in pixels, in RGB 0..255; weight), iterations."""
    gauss_xy: float
    gauss_w: float
    bi_xy: float
    bi_rgb: float
    bi_w: float
    steps: int


def dense_crf(images, probs, crf, backend="torch", workers=0, device="cpu"):
    """Refines class probabilities by Kraehenbuehl and Koltun's dense CRF (Potts, symmetric normalisation).

    images: list of (H,W,3) uint8 or float 0..255; probs: as many (C,H,W), or (U,C,H,W) for U unaries of one
    image, which then share its lattice: arrays or tensors -> list of float32 arrays of the same shapes.
    A class that is zero everywhere is absent: left out and returned as zero; with one class present there is
    nothing to do. backend: torch (on `device`), pydensecrf (the reference; workers > 1: that many processes,
    kept for later calls), none (returns probs). For several jobs on few cores set OMP_WAIT_POLICY=passive.
    """
    probs = [prob.detach().float().cpu() if torch.is_tensor(prob) else prob for prob in probs]
    probs = [np.asarray(prob, np.float32) for prob in probs]
    images = [np.array(image.cpu() if torch.is_tensor(image) else image, order="C") for image in images]
    for image, prob in zip(images, probs, strict=True):
        if image.shape != (*prob.shape[-2:], 3) or prob.ndim not in (3, 4):
            raise ValueError(f"dense_crf: image {image.shape} and probabilities {prob.shape} do not match")
        if not np.isfinite(prob).all() or not np.isfinite(image).all():
            raise ValueError("dense_crf: probabilities or image hold NaN or infinity")
    if backend not in ("torch", "pydensecrf", "none"):
        raise ValueError(f"dense_crf: backend {backend} is none of torch, pydensecrf, none")
    if backend == "none":
        return probs
    results, jobs = [prob.copy() for prob in probs], []
    for i, prob in enumerate(probs):
        stack = prob.reshape(-1, *prob.shape[-3:])
        present = stack.any(axis=(0, 2, 3))
        if present.sum() > 1:
            jobs.append((i, present, images[i], stack[:, present]))
    if backend == "torch":
        batch = 1 if torch.device(device).type == "cpu" else 8
        parts = [jobs[i:i + batch] for i in range(0, len(jobs), batch)]
        refined = [prob for part in parts for prob in
                   mean_field([job[2] for job in part], [job[3] for job in part], crf, device)]
    else:
        work = [(image, prob, crf) for *_, image, prob in jobs]
        pool = crf_pool(workers) if workers > 1 and len(work) > 1 else None
        refined = pool.starmap(reference_crf, work, 1) if pool else [reference_crf(*job) for job in work]
    for (i, present, _, _), out in zip(jobs, refined, strict=True):
        results[i].reshape(-1, *results[i].shape[-3:])[:, present] = out
    return results


@torch.no_grad()
def mean_field(images, probs, crf, device="cpu"):
    """dense_crf on the lattice.   images: (H,W,3) each; probs: (U,C,H,W) each, U the same -> the same

    Every class of every unary is a channel; an image with fewer classes than the most has log p = -1e4 there.
    """
    sizes, C = tuple(image.shape[:2] for image in images), max(prob.shape[1] for prob in probs)
    logs = [torch.as_tensor(prob, device=device).clamp(1e-5, 1).log_().permute(2, 3, 0, 1) for prob in probs]
    log_p = torch.cat([F.pad(log, (0, C - log.shape[-1]), value=-1e4).flatten(0, 1) for log in logs])
    colour = torch.cat([torch.as_tensor(image, device=device).reshape(-1, 3) for image in images]).float()
    place, image = pixel_features(sizes, crf.bi_xy, device)
    bilateral = PermutohedralLattice(torch.cat([place, colour / crf.bi_rgb], dim=1), image).normalise()
    kernels = [(crf.gauss_w, position_lattice(sizes, crf.gauss_xy, device)), (crf.bi_w, bilateral)]
    Q = iterate(log_p, kernels, crf.steps, softmax_ if log_p.device.type == "cpu" else stable_softmax)
    if not Q.sum().isfinite():                                  # large weights: e^88 is the last in float32
        Q = iterate(log_p, kernels, crf.steps, stable_softmax)
    parts = Q.split([H * W for H, W in sizes])
    return [part[..., :prob.shape[1]].permute(1, 2, 0).reshape(prob.shape).cpu().numpy()
            for part, prob in zip(parts, probs)]


@functools.lru_cache(8)
def position_lattice(sizes, sigma_xy, device):
    """The Gaussian kernel depends on the pictures' sizes only: the last 8 lattices are kept."""
    return PermutohedralLattice(*pixel_features(sizes, sigma_xy, device)).normalise()


def iterate(log_p, kernels, steps, softmax):
    """Mean field iterations from softmax(log p).   log_p (N,U,C); kernels: (weight, lattice) -> (N,U,C)"""
    Q = softmax(log_p.clone())
    for _ in range(steps):
        logits = log_p.clone()
        for weight, kernel in kernels:
            logits.add_(kernel.filter(Q.flatten(1)).view_as(Q), alpha=weight)           # Potts
        Q = softmax(logits)
    return Q


def softmax_(x):
    """Softmax over the last axis, in place and without a shift: several times faster on a CPU."""
    x.exp_()
    return x.div_(x @ x.new_ones(x.shape[-1], 1))


def stable_softmax(x):
    return torch.softmax(x, dim=-1)


def label_probs(label, classes, gt_prob=0.7):
    """Unaries from labels: gt_prob for a pixel's class, the rest spread; 255 (unknown): all alike.

    label (H,W) of 0..classes-1 and 255 -> (classes,H,W) float32
    """
    prob = np.full((classes, *label.shape), (1 - gt_prob) / max(1, classes - 1), np.float32)
    for c in range(classes):
        prob[c, label == c] = gt_prob
    prob[:, label == 255] = 1 / classes
    return prob


def reference_crf(image, probs, crf):
    """dense_crf of one picture through pydensecrf.   (H,W,3), (U,C,H,W) -> (U,C,H,W)"""
    import pydensecrf.densecrf as densecrf
    image = np.ascontiguousarray(np.round(image).astype(np.uint8))
    _, C, H, W = probs.shape
    result = np.empty_like(probs)
    for prob, out in zip(probs, result):
        field = densecrf.DenseCRF2D(W, H, C)
        field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(prob, 1e-5, 1)).reshape(C, -1)))
        field.addPairwiseGaussian(sxy=crf.gauss_xy, compat=crf.gauss_w)
        field.addPairwiseBilateral(sxy=crf.bi_xy, srgb=crf.bi_rgb, rgbim=image, compat=crf.bi_w)
        out[:] = np.reshape(field.inference(crf.steps), (C, H, W))
    return result


@functools.cache
def crf_pool(workers):
    """Processes for reference_crf, forked by a server without threads and GPU; they end with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common"])
    pool = context.Pool(workers)
    atexit.register(pool.terminate)                             # else its __del__ complains at the very end
    return pool


# ── Metric ──────────────────────────────────────────────────────────────────────────────────────────────────

class ConfusionMatrix:
    """Counts of (true class, predicted class) over pixels; classes: names with the background first."""

    def __init__(self, classes):
        self.classes = list(classes)
        self.counts = torch.zeros(len(classes), len(classes) + 1, dtype=torch.int64)  # last column: no label

    def add(self, pred, mask):
        """pred, mask (H,W). mask 255: the pixel does not count; pred 255: a miss of the true class."""
        pred, mask = (np.asarray(labels, np.int64) for labels in (pred, mask))
        n = len(self.classes)
        if pred.shape != mask.shape:
            raise ValueError(f"prediction {pred.shape} and mask {mask.shape} differ in size")
        for labels, what in ((pred, "prediction"), (mask, "mask")):
            wrong = np.unique(labels[(labels != 255) & ((labels < 0) | (labels >= n))])
            if len(wrong):
                raise ValueError(f"{what} holds {wrong[:5].tolist()}, allowed are 0..{n - 1} and 255")
        valid = mask != 255
        pred = np.where(pred == 255, n, pred)
        pairs = mask[valid] * (n + 1) + pred[valid]
        self.counts += torch.from_numpy(np.bincount(pairs, minlength=n * (n + 1))).view(n, n + 1)

    def reduce(self):
        """Sums over all processes; returns itself."""
        reduce(self.counts)
        return self

    def iou(self):
        """{class: percent, or None where neither masks nor predictions have the class}."""
        hits = self.counts.diagonal()                           # n of them, the table is n x (n+1)
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return {name: 100 * hit / every if every else None
                for name, hit, every in zip(self.classes, hits.tolist(), union.tolist())}

    def miou(self):
        """Mean over the classes that are there, percent; None if none is."""
        present = [value for value in self.iou().values() if value is not None]
        return sum(present) / len(present) if present else None

    def precision(self):
        """Percent of the labelled pixels that are right, background included; None without any."""
        labelled = self.counts[:, :-1].sum().item()
        return 100 * self.counts.diagonal().sum().item() / labelled if labelled else None

    def coverage(self):
        """Percent of the pixels that have a label; None without any pixel."""
        pixels = self.counts.sum().item()
        return 100 * self.counts[:, :-1].sum().item() / pixels if pixels else None


def confusion_of(dataset, label_of):
    """ConfusionMatrix over a data set with masks; label_of(sample) -> (H,W), 255 = unlabelled."""
    confusion = ConfusionMatrix(["background", *dataset.classes])
    for i in shard(range(len(dataset))):
        sample = dataset[i]
        label = label_of(sample)
        check_size(label, sample.mask)
        confusion.add(label, sample.mask)
    return confusion.reduce()


def check_size(label, image):
    """UserError where a label map (H,W) has another size than its picture (H,W,3) or mask (H,W)."""
    (h, w), (height, width) = label.shape, image.shape[:2]
    if (h, w) != (height, width):
        raise UserError(f"a label map of this run is {w}x{h} pixels, its picture {width}x{height}: the data "
                        "have changed; start over with --fresh")


def mask_ious(masks, truths):
    """(P,H,W), (G,H,W) bool -> (P,G)"""
    a, b = (m.reshape(len(m), m.shape[1] * m.shape[2]).astype(np.float32) for m in (masks, truths))
    common = a @ b.T
    return common / np.maximum(a.sum(1)[:, None] + b.sum(1) - common, 1)


def match(ious, threshold):
    """Which predictions hit: those whose best object has IoU ≥ threshold and was not hit by a better one.

    ious (P,G) of one class in one image, predictions in falling order of score -> (P,) bool
    """
    hits, taken = np.zeros(len(ious), bool), set()
    for p, row in enumerate(ious if ious.shape[1] else ()):
        g = row.argmax()
        if row[g] >= threshold and g not in taken:
            hits[p] = True
            taken.add(g)
    return hits


def area_under_curve(scores, hits, objects):
    """VOC's average precision: area under precision over recall, precision made to fall.   -> in [0,1]"""
    hits = np.asarray(hits, bool)[np.argsort(-np.asarray(scores), kind="stable")]
    true = np.cumsum(hits)
    precision = true / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / objects)  # recall rises by 1/objects at each hit


def instance_aps(pictures, classes, thresholds=(0.5, 0.7, 0.75)):
    """VOC's AP of instance masks: mean over the classes that have objects, percent.

    pictures: pairs of the true objects [(class, mask (H,W)), …] and the found (masks, classes, scores)
    -> {ap50: …, ap70: …, ap75: …}, number of pictures
    """
    objects = dict.fromkeys(range(1, classes + 1), 0)
    found = {(c, t): ([], []) for c in objects for t in thresholds}                     # scores, hits
    images = 0
    for truth, (masks, labels, scores) in pictures:
        images += 1
        for c in {*labels.tolist(), *(c for c, _ in truth)}:
            own = np.flatnonzero(labels == c)
            own = own[np.argsort(-scores[own], kind="stable")]
            real = np.array([mask for k, mask in truth if k == c], bool).reshape(-1, *masks.shape[1:])
            objects[c] += len(real)
            ious = mask_ious(masks[own], real)
            for t in thresholds:
                found[c, t][0].extend(scores[own].tolist())
                found[c, t][1].extend(match(ious, t).tolist())
    present = [c for c, count in objects.items() if count]
    aps = {t: [area_under_curve(*found[c, t], objects[c]) for c in present] for t in thresholds}
    return {f"ap{100 * t:.0f}": 100 * float(np.mean(aps[t])) if present else None for t in thresholds}, images


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────────────────

def colour(cell):
    """(H,W,3) uint8 stays; (H,W) floats in [0,1] -> black-red-yellow-white; (H,W) labels -> VOC colours."""
    cell = np.asarray(cell)
    if cell.ndim == 3:
        return cell.astype(np.uint8)
    if np.issubdtype(cell.dtype, np.floating):
        return (255 * np.clip(3 * cell[..., None] - np.arange(3), 0, 1)).astype(np.uint8)
    return voc_palette()[cell.astype(np.uint8)]


def overlay(image, label, alpha=0.5):
    """Labels over the picture; the background stays as it is. image (H,W,3), label (H,W) -> (H,W,3) uint8."""
    check_size(label, image)
    weight = alpha * (np.asarray(label) != 0)[..., None]
    return np.round(weight * colour(label) + (1 - weight) * image).astype(np.uint8)


def contact_sheet(path, rows, titles, height=160, gap=4):
    """PNG of rows of pictures (see colour), one title over each column, each row scaled to one height."""
    def scaled(cell):
        smooth = np.ndim(cell) == 3
        cell = Image.fromarray(colour(cell))
        size = max(1, round(cell.width * height / cell.height)), height
        return cell.resize(size, Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)

    rows = [[scaled(cell) for cell in row] for row in rows]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    size = sum(widths) + gap * (len(widths) + 1), 20 + (height + gap) * len(rows)
    sheet, left = Image.new("RGB", size, "white"), gap
    draw = ImageDraw.Draw(sheet)
    for i, width in enumerate(widths):
        if i < len(titles):
            draw.text((left, 4), titles[i], fill="black")
        for j, row in enumerate(rows):
            if i < len(row):
                sheet.paste(row[i], (left, 20 + j * (height + gap)))
        left += width + gap
    save_image(path, sheet)


def draw_panels(run, name, truth, columns, label="mask"):
    """panels/<name>.png: contact sheet of the first 16 images, one row each, with the ground truth last.

    truth: data set; columns: {title: folder of label maps, or function of a sample -> picture, see colour};
    label: the attribute of a sample that is its ground truth, if it has one
    """
    from data import read_label
    if rank() > 0:
        return
    rows = []
    for s in (truth[i] for i in range(min(16, len(truth)))):
        cells = [column(s) if callable(column) else
                 overlay(s.image, read_label(run.path(column, s.name), truth.classes))
                 for column in columns.values()]
        rows.append([s.image, *cells, *([overlay(s.image, getattr(s, label))] if hasattr(s, label) else [])])
    contact_sheet(run.path("panels", name), rows, ["image", *columns, "ground truth"])


def numbered(masks, scores):
    """Instances as one label map, the surest on top.   (M,H,W) -> (H,W) uint8, 0 = none"""
    label = np.zeros(masks.shape[1:], np.uint8)
    for k in np.argsort(scores, kind="stable"):
        label[masks[k]] = k % 254 + 1
    return label


def instance_overlay(image, masks, scores, least):
    """Instances of at least this score over the picture."""
    return overlay(image, numbered(masks[scores >= least], scores[scores >= least]))


# ── Pictures of your own (--predict) ────────────────────────────────────────────────────────────────────────
def read_predictor(args, Args, names, *weights):
    """--checkpoint of --predict -> its state, and which of `weights` it has, each of one kind of network.

    names: the checkpoints that fit, for the message, as "segmenter.pt or detector.pt"
    """
    if not Path(args.checkpoint).is_file():
        raise UserError(f"--predict needs --checkpoint runs/…/{names}; {args.checkpoint!r} is no file")
    state = read_checkpoint(args.checkpoint, Args)
    kind = next((weight for weight in weights if weight in state["model"]), None)
    if kind is None:
        raise UserError(f"--checkpoint {args.checkpoint} is not the {names} of a run")
    files_to_predict(args.predict)                              # none: said before a network is made
    return state, kind


def with_weights(net, state, device):
    """A network for inference, with the weights of a checkpoint's state."""
    net.load_state_dict(state["model"])
    return net.to(device, memory_format=torch.channels_last).eval()


def files_to_predict(source):
    """A picture, or all of a folder; UserError where there is none, DataError where two share a file."""
    from data import PICTURES, DataError, stems
    source = Path(source)
    files = stems(source, PICTURES).values() if source.is_dir() else [source]
    files = [file for file in files if file.suffix.lower() in PICTURES]
    if not files:
        raise UserError(f"--predict {source}: no picture there; give some ({', '.join(PICTURES)})")
    names = {file.stem for file in files}
    for file in files:
        if f"{file.stem}_overlay" in names:                     # what save_prediction writes for file.stem
            raise DataError(f"{file} and a picture {file.stem}_overlay would both write "
                            f"{file.stem}_overlay.png; rename one of them")
    return files


def pictures_to_predict(args):
    """--predict: yields each picture (H,W,3) and the path of its prediction, without suffix: in `predict`
    beside the checkpoint, or in --out, where that is given.
    """
    from data import read_image
    files = files_to_predict(args.predict)
    folder = Path(args.out or Path(args.checkpoint).parent) / "predict"
    if rank() == 0:
        print(f"{len(files)} picture(s) -> {folder}")
    for file in tqdm(shard(files), "predict"):
        yield read_image(file), folder / file.stem


def save_prediction(path, image, label):
    """<path>.png, labels (H,W), and <path>_overlay.png."""
    save_label(f"{path}.png", label)
    save_image(f"{path}_overlay.png", overlay(image, label))
