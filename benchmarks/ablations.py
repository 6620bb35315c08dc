"""Runs the tables of the papers, one command a table; nothing imports this file.

    python benchmarks/ablations.py list                                        # tables and their rows
    python benchmarks/ablations.py dfr --table 4.5                             # on shapes, one seed
    python benchmarks/ablations.py dfr --table 4.5 --seeds 3 --rows 0,1,3,4    # some rows with three seeds
    python benchmarks/ablations.py rrm --table 2.3 --data voc --extra="--root data/voc"    # the real data
    python benchmarks/ablations.py cian --table 2 --no-run                     # only what was run before

Every row is one run of the method file in runs/ablations/. The rows of a table and seed share their early
stages through --reuse of its first row. The same command again continues: a finished row is not run twice.
Rows that were run with another --extra are refused: they would not compare.
Writes benchmarks/results/ablation_<method>_<table>_<data>.json and a Markdown table beside it, with the
paper's column, and says of each ordering of the paper whether it holds; a row that was not run says so.
"""

import functools
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    label: str
    flags: str = ""
    paper: float | None = None


class Table(NamedTuple):
    """stages: columns, names of results.json's stages, the paper's first. orders: (worse row, better row)."""
    title: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    orders: tuple[tuple[int, int], ...] = ()
    metric: str = "miou"


def rows_of(field, papers):
    """One row a value of one field: {value: the paper's number}."""
    return tuple(Row(f"{field} {value}", f"--{field} {value}", paper) for value, paper in papers.items())


A2GNN_SUPERVISION = Table(
    "Tables 3.1, 3.10, 3.11: the four supervisions, DeepLab-v2", ("val_crf", "val", "pseudo"),
    rows_of("supervision", {"box": 73.8, "scribble": 74.3, "point": 66.8, "image": 66.8, "full": 76.8}),
    orders=((2, 0), (3, 0), (2, 1), (3, 1), (0, 4), (1, 4)))
CIAN_PARTS = Table("Table 2: the parts of CIAN", ("val_crf", "val"), (
    Row("+ RT (all)", "--rounds 2", 64.3),
    Row("baseline (self-affinity)", "--no-cross --no-completion --rounds 1", 58.3),
    Row("+ CE", "--no-completion --rounds 1", 59.1),
    Row("+ CP", "--rounds 1", 62.5),
    Row("full supervision", "--supervision full --rounds 1")), orders=((1, 2), (2, 3), (3, 0), (0, 4)))
CIAN_PAIRS = Table("Table 3: pairs of a common class against random pairs", ("val_crf", "val"), (
    Row("common-class, + CP", "--rounds 1", 62.5),
    Row("random, + CP", "--rounds 1 --pairs random", 59.7),
    Row("common-class, + CE", "--no-completion --rounds 1", 59.1),
    Row("random, + CE", "--no-completion --rounds 1 --pairs random", 58.5)), orders=((1, 0), (3, 2)))
CIAN_STRONG = Table("Table 4: a share of the seeds replaced by masks", ("val_crf", "val"), (
    Row("CIAN, none", "--rounds 1", 62.5),
    Row("baseline, none", "--no-cross --no-completion --rounds 1", 58.3),
    Row("CIAN, 5 %", "--rounds 1 --strong-ratio 0.05", 65.8),
    Row("baseline, 5 %", "--no-cross --no-completion --rounds 1 --strong-ratio 0.05", 61.4),
    Row("CIAN, 10 %", "--rounds 1 --strong-ratio 0.1", 67.3),
    Row("baseline, 10 %", "--no-cross --no-completion --rounds 1 --strong-ratio 0.1", 62.2)),
    orders=((1, 0), (3, 2), (5, 4)))
DFR_LOSSES = Table("Table 4.5: the losses of DFR", ("val", "val_ms"), (
    Row("CE", "--no-dfr-loss --no-consistency-head", 68.9),
    Row("CE + DFR", "--no-fd-loss --no-fr-loss", 81.0),
    Row("CE + DFR + FD", "--no-fr-loss", 81.1),
    Row("all", "", 81.5),
    Row("full supervision", "--supervision full", 82.8)), orders=((0, 1), (1, 2), (2, 3), (3, 4)))
DFR_BLOCKS = Table("Table 4.4: the shared features", ("val", "val_ms"), rows_of("blocks", {
    "1,2,3,4": 81.5, "1": 81.1, "2": 81.1, "3": 81.3, "4": 81.3, "1,2": 81.2, "3,4": 80.9, "1,2,3": 80.8,
    "2,3,4": 80.5}), orders=tuple((row, 0) for row in range(1, 9)))
DFR_KERNEL = Table("Table 4.6: the kernel", ("val", "val_ms"), rows_of("kernel", {
    "xy,rgb,feature": 81.5, "xy": 72.8, "xy,rgb": 80.8, "xy,feature": 74.9}),
    orders=((1, 2), (1, 3), (2, 0), (3, 0)))
DFR_LABELS = Table("Table 4.7: labels of the feature consistency head", ("val", "val_ms"), rows_of(
    "consistency-labels", {"confident": 81.5, "gt": 80.6, "both": 81.1}), orders=((1, 0), (2, 0)))
IRNET_LABELS = Table(
    "section 6.3: DeepLab on labels with and without propagation", ("val", "val_crf", "pseudo"), (
        Row("propagated labels", "--no-mask-rcnn", 63.5),
        Row("CAM", "--no-mask-rcnn --train-on cam"),
        Row("full supervision", "--no-mask-rcnn --supervision full", 72.3)), orders=((1, 0), (0, 2)))
LPG_STAGES = Table(
    "Table II: generators and stages (the paper's column: after three)", (
        "val_3", "val_2", "val_1", "val_crf", "pseudo_crf", "pseudo_1", "pseudo_3"), (
        Row("Hourglass (EM)", "", 68.4),
        Row("Hourglass (fixed)", "--generator-fixed", 67.5),
        Row("ResNet-18", "--generator-net resnet18", 66.5),
        Row("ResNet-101", "--generator-net resnet101", 67.1),
        Row("full supervision", "--supervision full", 69.6)), orders=((1, 0), (2, 3), (3, 0), (0, 4)))
LPG_SUPERVISION = Table(
    "Table IV: masks for none, some or all of the target's pictures",
    ("val_3", "val_2", "val_1", "val_crf"), (
        Row("boxes", "", 68.4), Row("boxes and some masks", "--supervision semi", 68.7),
        Row("full supervision", "--supervision full", 69.6)), orders=((0, 1), (1, 2)))
LPG_MASKS = Table("Table VI: share of the auxiliary masks", ("val_3", "val_2", "val_1"), (
    Row("all", "", 68.4), Row("85 %", "--aux-fraction 0.75", 68.0), Row("60 %", "--aux-fraction 0.5", 67.5),
    Row("30 %", "--aux-fraction 0.25", 65.7)), orders=((3, 2), (2, 1), (1, 0)))
RRM_RATIO = Table("Table 2.1: share of reliable pixels, joint loss", ("val_crf", "val"), rows_of("ratio", {
    0.4: 65.4, 0.1: 53.0, 0.2: 63.7, 0.3: 64.7, 0.6: 63.4, 0.8: 62.8, 1.0: 62.9}),
    orders=tuple((row, 0) for row in range(1, 7)))
RRM_LOSSES = Table("Table 2.3: the losses of RRM", ("val_crf", "val"), (
    Row("CE", "--no-energy-loss --no-bcd-loss", 52.0),
    Row("CE + DE", "--no-bcd-loss", 64.8),
    Row("CE + BCD", "--no-energy-loss", 52.9),
    Row("all", "", 65.4),
    Row("full supervision", "--supervision full", 80.8)), orders=((0, 1), (0, 2), (1, 3), (2, 3), (3, 4)))
RRM_ATTENTION = Table("Table 2.5: re-weighted attention", ("val_crf", "val"), (
    Row("R-FAM", "", 65.4), Row("FAM", "--reweight none", 64.7)), orders=((1, 0),))
RRM_TWO_STEP = Table("Table 2.6: two steps", ("val_two_step_crf", "val_two_step", "val_crf"), (
    Row("two-step", "--two-step", 69.3),
    Row("full supervision", "--two-step --supervision full", 76.8)), orders=((0, 1),))
SCL_GUIDES = Table(
    "Tables 5.6, 5.7: SGM, CGM, one and five shots", ("test_1shot", "test_5shot_average", "test_5shot_cgm"), (
        Row("SGM", "", 57.5), Row("baseline", "--guide none", 55.4),
        Row("SGM, one scale", "--test-scales 1", 56.3),
        Row("baseline, one scale", "--guide none --test-scales 1", 54.0)), orders=((1, 0), (3, 2), (2, 0)))
SCL_VECTORS = Table("Table 5.8: support vectors, one shot", ("test_1shot",), (
    Row("v_pri and v_aux", "", 57.5), Row("v_s", "--vectors s", 55.6), Row("v_pri", "--vectors pri", 56.6),
    Row("v_aux", "--vectors aux", 51.4), Row("all three", "--vectors all", 57.1)),
    orders=((1, 0), (2, 0), (3, 0), (4, 0)))
SCL_LOSSES = Table("Table 5.9: losses of SGM, one shot", ("test_1shot",), (
    Row("both", "", 57.5), Row("L_s1", "--no-s2-loss", 55.6), Row("L_s2", "--no-s1-loss", 56.8)),
    orders=((1, 0), (2, 0)))
SELFTRAIN_PARTS = Table(
    "Table 4: the parts of the framework (background left out, as in the paper)", ("val", "val_crf"), (
        Row("all, with label refinement", "--background 2", 79.8),
        Row("initial labels only", "--background 2 --rounds 1 --no-rendered --no-spatial", 32.2),
        Row("+ rendered pictures", "--background 2 --rounds 1 --no-spatial", 47.5),
        Row("+ spatial loss", "--background 2 --rounds 1", 66.0),
        Row("rendered pictures alone", "--background 2 --source-only"),
        Row("full supervision", "--background 2 --supervision full")),
    orders=((1, 2), (2, 3), (3, 0), (4, 0), (0, 5)), metric="miou_fg")
SELFTRAIN_BACKGROUNDS = Table("Table 1: the four backgrounds", ("val", "val_crf", "initial"), tuple(
    Row(f"background {n}", f"--background {n}") for n in range(4)), metric="miou_fg")
TABLES = {
    "a2gnn": {"3.11": A2GNN_SUPERVISION},
    "cian": {"2": CIAN_PARTS, "3": CIAN_PAIRS, "4": CIAN_STRONG},
    "dfr": {"4.4": DFR_BLOCKS, "4.5": DFR_LOSSES, "4.6": DFR_KERNEL, "4.7": DFR_LABELS},
    "irnet": {"2": IRNET_LABELS},
    "lpg": {"II": LPG_STAGES, "IV": LPG_SUPERVISION, "VI": LPG_MASKS},
    "rrm": {"2.1": RRM_RATIO, "2.3": RRM_LOSSES, "2.5": RRM_ATTENTION, "2.6": RRM_TWO_STEP},
    "scl": {"5.7": SCL_GUIDES, "5.8": SCL_VECTORS, "5.9": SCL_LOSSES},
    "selftrain_workpiece": {"1": SELFTRAIN_BACKGROUNDS, "4": SELFTRAIN_PARTS},
}


@dataclass
class Args:
    table: str
    """number of the paper's table, such as 4.5"""
    data: str = ""
    """--data of the method file; default its own, shapes or solids"""
    seeds: int = 1
    """runs a row, seeds 0, 1, …"""
    rows: str = ""
    """numbers of the rows to run, such as 0,3; default all. The others are reported where they were run"""
    to: str = "runs/ablations"
    """folder of the runs"""
    extra: str = ""
    """further flags of the method file, for all rows, in quotes"""
    run: bool = True
    """--no-run: only collect finished runs"""


def folder_of(method, args, row, seed):
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in row.flags.replace("--", "")) or "default"
    return Path(args.to) / f"{method}-{args.data}" / f"{name}-s{seed}"


def run_row(method, args, row, seed, donor):
    """One run of the method file; ends this script where the run fails, and the next call continues it."""
    folder = folder_of(method, args, row, seed)
    command = [sys.executable, str(ROOT / f"{method}.py"), "--data", args.data, *shlex.split(row.flags),
               "--seed", str(seed), "--out", str(folder), *shlex.split(args.extra)]
    if donor != folder and (donor / "args.json").exists(): command += ["--reuse", str(donor)]
    print("\n$ " + shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"row '{row.label}', seed {seed} failed; mend it and give the same command again")


def check_extra(method, args, table):
    """Ends this script where a finished row was run with another --extra, by the command that it recorded."""
    for folder in (folder_of(method, args, row, seed) for row in table.rows for seed in range(args.seeds)):
        words = shlex.split((finished(folder, table.stages) or {}).get("command", ""))
        if "--out" not in words: continue
        extra = words[words.index("--out") + 2:]                        # as run_row writes it
        if "--reuse" in extra: extra = extra[:extra.index("--reuse")]
        if extra != shlex.split(args.extra):
            raise SystemExit(f"{folder} was run with --extra={shlex.quote(shlex.join(extra))}, not with "
                             f"{shlex.quote(args.extra)}; give that, or choose another --to")


def finished(folder, stages):
    """A run's results, or None if its last stage is missing."""
    path = folder / "results.json"
    if not path.exists(): return None
    results = json.loads(path.read_text())
    names = {stage["stage"] for stage in results["stages"]}
    return results if stages[0] in names else None


def collect(method, args, table):
    """Everything that was run: list of rows with the values of each seed."""
    rows = []
    for row in table.rows:
        values, commits = {}, set()
        for seed in range(args.seeds):
            results = finished(folder_of(method, args, row, seed), table.stages)
            if results is None: continue
            scores = {stage["stage"]: stage.get(table.metric) for stage in results["stages"]}
            values[str(seed)] = {stage: scores.get(stage) for stage in table.stages}
            commits.add(results["git"])
        rows.append({"label": row.label, "flags": row.flags, "paper": row.paper, "seeds": values,
                     "commits": sorted(commits)})
    return rows


def spread(values):
    """Mean and standard deviation as text."""
    if not values: return "–"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def judge(table, rows):
    """Per ordering of the paper: the paired differences of the seeds that both rows have."""
    verdicts = []
    for worse, better in table.orders:
        low, high = rows[worse], rows[better]
        shared = sorted(set(low["seeds"]) & set(high["seeds"]))
        gains = [high["seeds"][s][table.stages[0]] - low["seeds"][s][table.stages[0]] for s in shared]
        paper = None if None in (low["paper"], high["paper"]) else round(high["paper"] - low["paper"], 1)
        holds = None if not gains else statistics.mean(gains) > 0
        verdicts.append({"worse": low["label"], "better": high["label"], "paper": paper, "gains": gains,
                         "holds": holds, "every_seed": bool(gains) and min(gains) > 0})
    return verdicts


def markdown(method, args, table, rows, verdicts):
    head = ["row", *(f"{stage} ({table.metric})" for stage in table.stages), "seeds", "paper"]
    lines = [f"### {method}.py, {table.title}, `--data {args.data}`", "", "| " + " | ".join(head) + " |",
             "|" + "---|" * len(head)]
    for row in rows:
        columns = [spread([v[stage] for v in row["seeds"].values() if v[stage] is not None])
                   for stage in table.stages]
        if not row["seeds"]: columns = ["not run"] + ["–"] * (len(table.stages) - 1)
        paper = "–" if row["paper"] is None else f"paper: {row['paper']:.1f}"
        lines.append("| " + " | ".join([row["label"], *columns, str(len(row["seeds"])), paper]) + " |")
    lines.append("")
    for v in verdicts:
        if v["holds"] is None: continue
        verdict = "holds" if v["every_seed"] else "holds on average" if v["holds"] else "does not hold"
        paper = "" if v["paper"] is None else f" (paper: {v['paper']:+.1f})"
        ours = ("+" if statistics.mean(v["gains"]) > 0 else "") + spread(v["gains"])
        lines.append(f"- {v['worse']} < {v['better']}: {verdict}, {ours}{paper}, {len(v['gains'])} seed(s)")
    return "\n".join(lines) + "\n"


def write(path, text):
    """Written under another name first, so that a kill leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(path.suffix + ".tmp").write_text(text)
    path.with_suffix(path.suffix + ".tmp").replace(path)


def list_tables() -> None:
    """All tables and their rows."""
    for method, tables in TABLES.items():
        for number, table in tables.items():
            print(f"{method} --table {number}: {table.title}")
            for i, row in enumerate(table.rows): print(f"    {i}  {row.label}: {row.flags or 'defaults'}")


def run_table(method: str, args: Args) -> None:
    """Runs a table's rows that are not finished, then writes and prints the table."""
    if args.table not in TABLES[method]:
        raise SystemExit(f"{method} has no --table {args.table}; there are: {', '.join(TABLES[method])}")
    args.data = args.data or ("solids" if method == "selftrain_workpiece" else "shapes")
    table = TABLES[method][args.table]
    wanted = [int(n) for n in args.rows.split(",")] if args.rows else range(len(table.rows))
    if not all(0 <= n < len(table.rows) for n in wanted) or args.seeds < 1:
        raise SystemExit(f"--rows are numbers from 0 to {len(table.rows) - 1}, --seeds is at least 1")
    check_extra(method, args, table)
    for seed in range(args.seeds if args.run else 0):
        donor = folder_of(method, args, table.rows[wanted[0]], seed)
        for n in wanted:
            if finished(folder_of(method, args, table.rows[n], seed), table.stages) is None:
                run_row(method, args, table.rows[n], seed, donor)
    rows = collect(method, args, table)
    verdicts = judge(table, rows)
    text = markdown(method, args, table, rows, verdicts)
    name = f"ablation_{method}_{args.table}_{args.data}"
    write(RESULTS / f"{name}.json", json.dumps(
        {"method": method, "table": args.table, "title": table.title, "data": args.data, "extra": args.extra,
         "rows": rows, "orders": verdicts}, indent=1) + "\n")
    write(RESULTS / f"{name}.md", text)
    print("\n" + text)


def main():
    import tyro
    from tyro.extras import subcommand_cli_from_dict

    def command(method, args: tyro.conf.OmitArgPrefixes[Args]) -> None:
        """One table of this method."""
        run_table(method, args)

    subcommand_cli_from_dict({**{method: functools.partial(command, method) for method in TABLES},
                              "list": list_tables}, description=__doc__)


if __name__ == "__main__":
    main()
