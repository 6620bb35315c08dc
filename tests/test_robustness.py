"""The corpus of bad inputs: each ends with one clear message, no traceback, and nothing half-written."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import robustness
import robustness_inputs as corpus
from robustness_inputs import Case, answer, cian, nothing

CASES = corpus.cases()


@pytest.mark.parametrize("case", CASES, ids=[f"{c.group}: {c.title}" for c in CASES])
def test_a_bad_input_is_answered_well(case, tmp_path):
    a = answer(case, tmp_path)
    assert not a.faults, a.message


def test_the_corpus_is_large_and_of_each_kind():
    titles = [(case.group, case.title) for case in CASES]
    assert len(CASES) >= 60 and len(set(titles)) == len(titles)
    groups = {group: sum(g == group for g, _ in titles) for group, _ in titles}
    assert min(groups.values()) >= 10 and set(groups) == {"data", "flags", "checkpoints", "folders"}


def fail(kind, text):
    def act(place): raise kind(text)
    return act


@pytest.mark.parametrize("act, fault", [
    (nothing, "exit status 0"), (fail(KeyError, "bbox"), "a traceback"),
    (fail(SystemExit, "give another"), "names nothing"), (fail(SystemExit, "x.png is bad"), "no remedy"),
    (fail(SystemExit, "x.png:\ngive another"), "more than a line"),
    (lambda place: (place / "half").touch(), "left behind: half")])
def test_the_judge_sees_each_fault(act, fault, tmp_path):
    assert fault in answer(Case("", "", nothing, act, "x.png"), tmp_path).faults


def test_the_judge_is_content_with_a_good_answer(tmp_path):
    act = fail(SystemExit, "x.png can not be read; take the file again")
    assert answer(Case("", "", nothing, act, "x.png"), tmp_path).faults == []


def test_the_pickle_would_do_harm(tmp_path):
    """Read without weights_only it is executed: that nothing happens in the corpus is the readers' merit."""
    import torch
    corpus.save(lambda place: {"model": corpus.Command(place / "executed")})(tmp_path)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_the_unspoilt_inputs_are_accepted(tmp_path):
    for layout in corpus.layouts(): corpus.read_everything(layout)(corpus.master(layout))
    assert corpus.ending(cian("--supervision", "full", "--seg-steps", 2, "--crf", "none"), tmp_path)[0] == 0


def test_two_folders_are_compared_bit_by_bit(tmp_path):
    import json

    import torch
    for name in "ab":
        (tmp_path / name).mkdir()
        stage = {"stage": "val", "miou": 1.0, "seconds": ord(name), "episodes_per_s": ord(name)}
        (tmp_path / name / "results.json").write_text(json.dumps({"stages": [stage]}))
        (tmp_path / name / "x.png").write_bytes(b"1")
        torch.save({"model": {"w": torch.ones(2)}, "optim": [1], "args": name}, tmp_path / name / "x.pt")
    a, b = tmp_path / "a", tmp_path / "b"
    assert robustness.differences(a, b) == []
    (b / "x.png").write_bytes(b"2")
    torch.save({"model": {"w": torch.tensor([1, 1 + 1e-7])}, "optim": [1], "args": ""}, b / "x.pt")
    (b / ".y.png.1.tmp").touch()
    assert robustness.differences(a, b) == ["x.png", "x.pt", ".y.png.1.tmp"]


def test_a_kill_hits_only_what_runs():
    for seconds, hit in ((60, True), (0, False)):
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            os.execvp("sleep", ["sleep", str(seconds)])
        with contextlib.suppress(OSError): os.setpgid(pid, pid)
        if not hit: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert robustness.kill(pid) == hit


def test_the_tiny_commands_parse(tmp_path):
    import importlib

    import tyro
    for method in robustness.TINY:
        tyro.cli(importlib.import_module(method).Args, args=robustness.command(method, tmp_path)[1:])
