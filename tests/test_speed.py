"""benchmarks/speed.py: the exponents of growth, its textbook forms, and scale's numbers by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import speed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    """Also: results go to a folder of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    yield
    torch.set_num_threads(before)


def written(tmp_path, name):
    return json.loads((tmp_path / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_exponent_of_a_quadratic_cost_is_two():
    assert speed.exponent([10, 20, 50], [3e-4 * n**2 for n in (10, 20, 50)]) == pytest.approx(2)
    assert speed.exponent([1, 2, 4], [7.0, 7.0, 7.0]) == pytest.approx(0)


def test_growth_varies_one_size_at_a_time(monkeypatch, tmp_path):
    """A kernel whose cost is pixels^1.5 · classes · batch^0.5, and three times that in its textbook form."""
    def kernel(side, classes, batch, device, textbook=False):
        return side**3 * classes * batch**0.5 * (3 if textbook else 1)

    monkeypatch.setattr(speed, "KERNELS", {"made up": (kernel, (8, 16, 32), (2, 4, 8), (1, 4), (8, 16))})
    monkeypatch.setattr(speed, "busy_proof", lambda work, device, repeats: (float(work), None))
    speed.growth(kernels=("made up",))
    rows = written(tmp_path, "growth_cpu")["rows"]
    found = {(row["kernel"], row["against"]): row["exponent"] for row in rows}
    assert found == {key: pytest.approx(value) for key, value in {
        ("made up", "pixels"): 1.5, ("made up", "classes"): 1, ("made up", "batch"): 0.5,
        ("made up, textbook", "pixels"): 1.5}.items()}
    assert rows[0]["sizes"] == [64, 256, 1024] and rows[-1]["ratio"] == pytest.approx(3, rel=1e-2)


def test_growth_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "KERNELS", {"walk": (speed.walk_work, (6, 8), (1, 2), (1, 2), (4, 6))})
    speed.growth(kernels=("walk",))
    rows = written(tmp_path, "growth_cpu")["rows"]
    assert len(rows) == 4 and all(seconds > 0 for row in rows for seconds in row["seconds"])
    with pytest.raises(SystemExit, match="choose from walk"): speed.growth(kernels=("crf",))
    with pytest.raises(SystemExit, match="at least 5"): speed.growth(repeats=3)


@pytest.mark.parametrize("kernel", ["walk", "attention", "dfr"])
def test_kernel_and_textbook_form_agree(kernel):
    make = speed.KERNELS[kernel][0]
    for ours, theirs in zip(make(12, 3, 2, CPU)(), make(12, 3, 2, CPU, textbook=True)()):
        assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)


def test_the_lattices_come_near_the_direct_sums():
    make = speed.KERNELS["crf"][0]
    ours, theirs = (np.stack(make(24, 3, 2, CPU, textbook)()) for textbook in (False, True))
    start = np.stack(list(speed.pictures_of(24, 3, 2))[1])
    assert np.abs(ours - theirs).mean() < np.abs(start - theirs).mean() / 4
    make = speed.KERNELS["energy"][0]
    (energy, slope), (exact, exact_slope) = (make(24, 3, 2, CPU, textbook)() for textbook in (False, True))
    assert 0.4 < (energy / exact).item() < 1.1
    assert torch.corrcoef(torch.stack([slope.flatten(), exact_slope.flatten()]))[0, 1] > 0.97


def make_run(folder, device="cpu (1 threads)", reused=None):
    """100 training pictures, batch 6: 60 s of training in steps of 0.5 s, 20 s of labels, 5 s of val."""
    folder.mkdir()
    entries = [{"stage": "pseudo", "split": "train", "n_images": 100, "peak_memory_mb": 700},
               {"stage": "val", "split": "val", "n_images": 40, "peak_memory_mb": 900}]
    (folder / "results.json").write_text(json.dumps({
        "stages": entries, "command": "python some/where/rrm.py --out x", "git": "abc", "device": device,
        "args": {"seg_batch": 6, "cam_batch": 4, "preset": "shapes"}, "reused": reused or {}}))
    (folder / "state.json").write_text(json.dumps({"seconds": {
        "classifier": 36.0, "seeds": 8.0, "pseudo": 12.0, "segmenter_1": 24.0, "val": 5.0}}))
    log = [{"stage": "segmenter_1", "step": step, "seconds": 3 + step / 2} for step in (0, 20, 40)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return str(folder)


def test_scale_by_hand(tmp_path, capsys):
    speed.scale((make_run(tmp_path / "a"),), processes=(4, 1000))
    found = written(tmp_path, "scale_cpu")
    assert found["rates"] == [{
        "run": "rrm a", "device": "cpu (1 threads)", "preset": "shapes", "train": 100,
        "network": "segmenter_1", "step_s": 0.5, "labels_per_s": 100 / 20,
        "inference_per_s": 40 / 5, "peak_mb": 900, "not_timed": ""}]
    voc, coco, many = found["hours"]
    assert [row["images"] for row in (voc, coco, many)] == [10582, 82081, 10**8]
    assert voc["training_h"] == pytest.approx(60 * 105.82 / 3600)
    assert coco["labels_h"] == pytest.approx(20 * 820.81 / 3600)
    assert many["hours_1"] == pytest.approx(80 * 1e6 / 3600)
    # 4 processes: the batch of 4 over all, that of 6 over 3 of them; 1000: over 4 and 6; labels over all
    assert many["hours_4"] == pytest.approx((36 / 4 + 24 / 3 + 20 / 4) * 1e6 / 3600)
    assert many["hours_1000"] == pytest.approx((36 / 4 + 24 / 6 + 20 / 1000) * 1e6 / 3600)
    assert "perfect" in found["assumptions"] and found["assumptions"] in capsys.readouterr().out


def test_scale_times_what_was_taken_over_by_the_run_that_made_it(tmp_path):
    make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", reused={"classifier": str(tmp_path / "first")})
    third = make_run(tmp_path / "third", reused={"classifier": str(tmp_path / "gone")})
    other = make_run(tmp_path / "fourth", "cpu (2 threads)", {"classifier": str(tmp_path / "first")})
    state = json.loads((Path(second) / "state.json").read_text())
    state["seconds"]["classifier"] = 0.001
    (Path(second) / "state.json").write_text(json.dumps(state))
    speed.scale((second, third, other))
    found = written(tmp_path, "scale_cpu")
    assert [row["not_timed"] for row in found["rates"]] == ["", "classifier", "classifier"]
    assert [row["training_h"] * 3600 / 105.82 for row in found["hours"][::3]] == pytest.approx([60, 24, 24])


def test_scale_counts_a_set_that_the_run_did_not_count():
    args = {"data": "shapes", "root": "data/shapes", "train_list": "train", "supervision": "image"}
    results = {"args": args, "stages": [{"stage": "val", "split": "val", "episodes": 300}]}
    assert speed.images_of(results, "val") == 300 and speed.images_of(results, "train") == 500


def test_scale_refuses(tmp_path):
    with pytest.raises(SystemExit, match="no results.json"): speed.scale((str(tmp_path / "nothing"),))
    with pytest.raises(SystemExit, match="one kind"):
        speed.scale((make_run(tmp_path / "a"), make_run(tmp_path / "b", device="NVIDIA something")))
    with pytest.raises(SystemExit, match="at least one"): speed.scale(())


def test_steps_times_a_files_own_training_step(tmp_path):
    speed.steps(methods=("dfr",))
    row, = written(tmp_path, "steps_shapes_cpu")["rows"]
    assert (row["file"], row["stage"], row["images"], row["crop"]) == ("dfr", "segmenter", 8, "96x96")
    assert row["images_per_s"] == pytest.approx(8 / row["seconds"])
    with pytest.raises(SystemExit, match="choose from a2gnn"): speed.steps(methods=("none",))


def test_every_method_has_a_training_step():
    import test_layout
    assert set(speed.STEPS) == set(test_layout.METHODS)
