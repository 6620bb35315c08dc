"""benchmarks/ablations.py: its flags exist, and its means, orderings and gaps are what the runs say."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablations
from ablations import Row, Table

ROWS = [(method, number, row) for method, tables in ablations.TABLES.items()
        for number, table in tables.items() for row in table.rows]


@pytest.mark.parametrize("method, number, row", ROWS, ids=[f"{m} {n}: {r.label}" for m, n, r in ROWS])
def test_each_row_parses(method, number, row):
    tyro.cli(importlib.import_module(method).Args, args=shlex.split(row.flags))


def test_rows_of_a_table_differ_and_orders_name_rows():
    for tables in ablations.TABLES.values():
        for table in tables.values():
            assert len({row.flags for row in table.rows}) == len({row.label for row in table.rows})
            assert len({row.flags for row in table.rows}) == len(table.rows)
            assert all(0 <= n < len(table.rows) for order in table.orders for n in order)


TABLE = Table("a table", ("val", "val_crf"),
              (Row("low", "--a", 50.0), Row("high", "", 60.0), Row("never", "--b")),
              orders=((0, 1), (1, 0), (0, 2)))


@pytest.fixture
def args(tmp_path, monkeypatch):
    """Two seeds of `low`, one of `high` that is finished and one that is not, none of `never`."""
    monkeypatch.setattr(ablations, "TABLES", {"rrm": {"9": TABLE}})
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "results")
    args = ablations.Args(table="9", data="shapes", seeds=2, to=str(tmp_path / "runs"), run=False)
    for row, seed, val in ((0, 0, 40.0), (0, 1, 42.0), (1, 0, 45.0), (1, 1, None)):
        folder = ablations.folder_of("rrm", args, TABLE.rows[row], seed)
        folder.mkdir(parents=True)
        done = [{"stage": "val", "miou": val, "seconds": 3}, {"stage": "val_crf", "miou": (val or 0) + 1}]
        done = done if val else []
        (folder / "results.json").write_text(json.dumps({"stages": done, "git": "abc"}))
    return args


def test_means_orderings_and_rows_that_were_not_run(args, capsys):
    ablations.run_table("rrm", args)
    written = json.loads((ablations.RESULTS / "ablation_rrm_9_shapes.json").read_text())
    assert [sorted(row["seeds"]) for row in written["rows"]] == [["0", "1"], ["0"], []]
    first, second, third = written["orders"]
    assert (first["gains"], first["holds"], first["paper"]) == ([5.0], True, 10.0)
    assert (second["gains"], second["holds"]) == ([-5.0], False)
    assert (third["gains"], third["holds"]) == ([], None)
    text = capsys.readouterr().out
    assert "| low | 41.0 ± 1.4 | 42.0 ± 1.4 | 2 | paper: 50.0 |" in text
    assert "| high | 45.0 | 46.0 | 1 | paper: 60.0 |" in text
    assert "| never | not run | – | 0 | – |" in text
    assert "- low < high: holds, +5.0 (paper: +10.0), 1 seed(s)" in text
    assert "- high < low: does not hold" in text
    assert "low < never" not in text


def test_an_ordering_of_several_seeds_may_hold_on_average_only():
    table = Table("", ("val",), (Row("a"), Row("b")), ((0, 1),))
    rows = [{"label": n, "paper": None, "seeds": {str(i): {"val": v} for i, v in enumerate(values)}}
            for n, values in (("a", (40.0, 40.0)), ("b", (50.0, 39.0)))]
    verdict, = ablations.judge(table, rows)
    assert verdict["holds"] and not verdict["every_seed"] and verdict["gains"] == [10.0, -1.0]


def test_rows_of_another_extra_are_refused(args):
    folder = ablations.folder_of("rrm", args, TABLE.rows[0], 0)
    results = json.loads((folder / "results.json").read_text())
    results["command"] = f"python rrm.py --a --out {folder} --cam-steps 3 --reuse there"
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="was run with --extra='--cam-steps 3', not with ''"):
        ablations.run_table("rrm", args)
    args.extra = "--cam-steps 3"
    ablations.run_table("rrm", args)


def test_only_missing_rows_are_run_and_share_the_first_one(args, monkeypatch):
    calls = []
    monkeypatch.setattr(ablations, "run_row",
                        lambda _, a, row, seed, donor: calls.append((row.label, seed, donor)))
    args.run = True
    ablations.run_table("rrm", args)
    folders = [ablations.folder_of("rrm", args, TABLE.rows[0], seed) for seed in range(2)]
    assert calls == [("never", 0, folders[0]), ("high", 1, folders[1]), ("never", 1, folders[1])]


@pytest.mark.parametrize("changes", [dict(table="8"), dict(rows="3"), dict(rows="-1"), dict(seeds=0)])
def test_mistakes_end_with_one_sentence(args, changes):
    for name, value in changes.items(): setattr(args, name, value)
    with pytest.raises(SystemExit, match="--"): ablations.run_table("rrm", args)
