"""Kills runs at random moments, and gives bad inputs: what comes out? Nothing but its test imports this file.

    python benchmarks/robustness.py kills                              # all eight files, 20 kills each
    python benchmarks/robustness.py kills --files cian dfr --times 5
    python benchmarks/robustness.py inputs                             # a corpus of broken files and flags

kills: one tiny run a file (scenes of shapes or solids exported as files, a few steps a stage), undisturbed;
then the same command in another folder, killed with SIGKILL, with all its processes, at seeded random moments
and continued each time. At its end the folder must equal the undisturbed one: the numbers of results.json
(without times and memory), all PNG and .npz files byte by byte, and what the checkpoints hold (weights,
optimiser, random state) bit for bit. A folder that ends before it was killed often enough is compared, and
another one begun. The killed processes are forked from one that has imported the libraries, so that no kill
is spent on an import.

inputs: see robustness_inputs.py. Both write benchmarks/results/robustness_<command>.json.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "robustness"
sys.path[:0] = [str(ROOT)]

ALWAYS = "--workers 0 --device cpu --save-every 2 --log-every 1"
SCENES = "--data workpiece --root {work}/shapes"
TINY = {
    "a2gnn": f"""{SCENES} --preset shapes --cam-steps 4 --cam-warmup 2 --cam-batch 4 --cam-crop 48
        --cam-resize 48 64 --cam-scales 0.5 1 --aff-steps 6 --aff-batch 4 --hidden 8 --epochs 2 2
        --batch-images 2 --seg-steps 4 --seg-batch 4 --seg-crop 48 --test-scales 1""",
    "rrm": f"""{SCENES} --preset shapes --cam-steps 4 --cam-batch 2 --cam-crop 48 --cam-resize 48 64
        --cam-scales 0.5 1 --joint-steps 6 --joint-batch 2 --joint-crop 48 --local-width 8
        --attention-width 8 --seg-steps 4 --seg-batch 2 --seg-crop 48 --seg-scales 1 --two-step""",
    "dfr": f"""{SCENES} --preset shapes --width 8 --feature-dim 8 --seg-steps 6 --seg-batch 2 --seg-crop 64
        --test-scales 0.5 1""",
    "scl": """--data voc --root {work}/voc --preset shapes --train-list train --fold 1 --width 8
        --seg-crop 33 --enc-steps 4 --seg-steps 4 --seg-batch 2 --enc-batch 2 --episodes 3 --shots 1 2
        --test-seeds 2 --refinements 1""",
    "irnet": f"""{SCENES} --preset shapes --cam-steps 4 --cam-batch 4 --cam-crop 48 --cam-resize 48 64
        --cam-scales 0.5 1 --irn-steps 6 --irn-batch 4 --irn-crop 48 --batch-images 2 --walk-steps 16
        --refine-steps 5 --seg-steps 4 --seg-batch 4 --seg-crop 48 --test-scales 1 --inst-steps 4
        --inst-batch 2 --inst-size 64 --inst-width 16 --inst-rois 16""",
    "cian": f"""{SCENES} --preset shapes --cam-steps 4 --cam-batch 2 --cam-crop 48 --cam-resize 48 64
        --superpixels 30 --seg-steps 6 --retrain-steps 4 --warmup 2 --seg-batch 4 --seg-crop 48
        --test-scales 1""",
    "lpg": f"""{SCENES} --preset shapes --aux workpiece --aux-root {{work}}/aux --hg-dims 8 8 8
        --hg-modules 1 1 1 --hg-features 8 --gen-steps 4 --gen-batch 2 --gen-crop 32 --gen-scale 0.5
        --seg-steps 3 --seg-batch 2 --seg-crop 48 --stages 2 --probe 3""",
    "selftrain_workpiece": """--data workpiece --root {work}/solids --preset shapes --cam-steps 3
        --cam-batch 2 --enc-steps 2 --enc-batch 2 --cam-crop 48 --cam-resize 48 64 --superpixels 100
        --seg-steps 4 --source-steps 3 --seg-batch 4 --seg-crop 48 --rounds 2 --cam-scales 0.5
        --test-scales 0.5 --stop-change 0""",
}


def command(method, out):
    return [f"{method}.py", *f"{TINY[method]} {ALWAYS}".format(work=WORK).split(), "--out", str(out)]


def make_pictures(methods):
    """The tiny folders that the commands name, as far as they are not there."""
    import data
    wanted = [("shapes", "workpiece", "shapes", 4), ("shapes", "voc", "voc", 24),
              ("solids", "workpiece", "solids", 4), ("shapes-aux", "workpiece", "aux", 4)]
    used = " ".join(" ".join(command(method, "")) for method in methods)
    for source, layout, folder, n in wanted:
        if str(WORK / folder) in used and not (WORK / folder).exists():
            with contextlib.redirect_stdout(io.StringIO()):
                data.export(source, layout, str(WORK / folder), n=n)


# ── kills ─────────────────────────────────────────────────────────────────────────────────────────


def start(method, out):
    """The method's main() in a process and process group of its own -> its id. Output goes to <out>.log."""
    module = importlib.import_module(method)
    out.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    with contextlib.suppress(OSError): os.setpgid(pid, pid)             # both do it: no kill may come before
    if pid: return pid
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2): os.dup2(log, stream)
    sys.argv, status = command(method, out), 1
    try:
        module.main()
        status = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid, out):
    """Waits for a process that nobody kills; its end must be a good one."""
    status = os.waitpid(pid, 0)[1]
    if status: raise SystemExit(f"{out} ended with status {status}; see {out}.log")


def kill(pid):
    """SIGKILL to the process and its children -> whether that hit a running process."""
    with contextlib.suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run ended with status {os.WEXITSTATUS(status)}; see the .log files in {WORK}")
    return os.WIFSIGNALED(status)


def numbers(out):
    """results.json's stages without what differs between two runs of the same command."""
    stages = json.loads((out / "results.json").read_text())["stages"]
    moving = re.compile(r"seconds|_per_s$|peak_memory")
    return [{key: value for key, value in stage.items() if not moving.search(key)} for stage in stages]


def equal(a, b):
    """Two checkpoints' contents, or parts of them, bit for bit; the arguments (where they lie) may differ."""
    import torch
    if torch.is_tensor(a): return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "args")
    if isinstance(a, list): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(one, two):
    """What two run folders do not have in common: list of names; [] = the same end."""
    import torch
    found = [] if numbers(one) == numbers(two) else ["results.json"]
    for suffix in (".png", ".npz", ".pt"):
        files = [{f.relative_to(out): f for f in out.rglob(f"*{suffix}")} for out in (one, two)]
        found += map(str, files[0].keys() ^ files[1].keys())
        for name in files[0].keys() & files[1].keys():
            a, b = files[0][name], files[1][name]
            if suffix == ".pt":
                same = equal(*(torch.load(file, map_location="cpu", weights_only=True) for file in (a, b)))
            else:
                same = a.read_bytes() == b.read_bytes()
            if not same: found.append(str(name))
    return found + [str(file.relative_to(two)) for file in two.rglob(".*.tmp")]


def kill_often(method, times, seed):
    """One method's row: {kills, folders, different, labels, seconds_undisturbed, seconds}."""
    rng, began, hits, folders, different = random.Random(f"{seed} {method}"), time.monotonic(), 0, 0, []
    whole = WORK / method / "whole"
    shutil.rmtree(WORK / method, ignore_errors=True)
    wait(start(method, whole), whole)
    took = time.monotonic() - began
    while hits < times:
        folders, moments = folders + 1, 0
        out = WORK / method / f"killed_{folders}"
        running = True
        while running and hits < times:
            pid = start(method, out)
            time.sleep(rng.uniform(0, took / 3))
            running = kill(pid)
            moments, hits = moments + running, hits + running
        wait(start(method, out), out)                       # to the end; when it has ended, it does nothing
        different += [f"{out.name}: {name}" for name in differences(whole, out)]
        print(f"{method}: {out.name}, {moments} kills, {len(different)} differences", flush=True)
    return {"kills": hits, "folders": folders, "identical": not different, "different": different,
            "labels": len(list(whole.rglob("*.png"))), "seconds_undisturbed": round(took, 1),
            "seconds": round(time.monotonic() - began, 1)}


def kills(methods, times, seed):
    file = RESULTS / "robustness_kills.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    libraries = ("torch.utils.tensorboard", "tyro", "skimage.segmentation", "cv2", "pycocotools.cocoeval")
    for name in (*libraries, *methods): importlib.import_module(name)
    make_pictures(methods)
    for method in methods:
        table[method] = kill_often(method, times, seed)
        write(file, table)
    print("| file | kills | run folders | PNG files | identical | seconds undisturbed |")
    print("|---|---|---|---|---|---|")
    for method, row in table.items():
        print(f"| `{method}.py` | {row['kills']} | {row['folders']} | {row['labels']} | "
              f"{'yes' if row['identical'] else 'NO'} | {row['seconds_undisturbed']} |")
    return all(row["identical"] for row in table.values())


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=sys.argv[0], description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kills")
    killing.add_argument("--files", nargs="+", default=list(TINY), choices=list(TINY))
    killing.add_argument("--times", type=int, default=20)
    killing.add_argument("--seed", type=int, default=0)
    commands.add_parser("inputs")
    args = parser.parse_args()
    if args.command == "kills":
        sys.exit(not kills([name.removesuffix(".py") for name in args.files], args.times, args.seed))
    from robustness_inputs import report
    sys.exit(not report(RESULTS / "robustness_inputs.json"))


if __name__ == "__main__":
    main()
