"""data.py: class folds for few-shot segmentation, and what an episode sees of a mask."""

import types

import numpy as np
import pytest

import data


def test_pascal_5i_is_blocks_of_five():
    folds = data.class_folds("voc", data.VOC_CLASSES)
    assert [[data.VOC_CLASSES[k - 1] for k in fold] for fold in folds] == [
        "aeroplane bicycle bird boat bottle".split(), "bus car cat chair cow".split(),
        "diningtable dog horse motorbike person".split(), "pottedplant sheep sofa train tvmonitor".split()]


def test_coco_20i_in_both_conventions():
    classes = [f"c{k}" for k in range(1, 81)]
    assert data.class_folds("coco", classes)[1] == tuple(range(2, 81, 4))          # 4i + k
    assert data.class_folds("coco", classes, "blocks")[1] == tuple(range(21, 41))
    for order in ("interleaved", "blocks"):
        folds = data.class_folds("coco", classes, order)
        assert sorted(k for fold in folds for k in fold) == list(range(1, 81))
        assert {len(fold) for fold in folds} == {20}


def test_folds_of_shapes_part_look_alikes():
    names = [kind.name.split("-")[0] for kind in data.TARGETS]
    folds = data.class_folds("shapes", names)
    assert sorted(k for fold in folds for k in fold) == list(range(1, 9))
    for fold in folds:
        assert len(fold) == 2 and len({names[k - 1] for k in fold}) == 2, "never both of a pair"


def test_too_few_classes_for_folds():
    with pytest.raises(data.DataError, match="four"): data.class_folds("coco", ["a", "b", "c"])


def test_areas_are_counted_by_hand():
    masks = [np.array([[0, 1, 1], [2, 255, 2]]), np.array([[3, 3], [3, 0]])]
    samples = [types.SimpleNamespace(mask=mask.astype(np.uint8)) for mask in masks]

    class Few(list): classes = ["a", "b", "c"]
    assert data.class_areas(Few(samples)).tolist() == [[2, 2, 0], [0, 0, 3]]
    assert data.class_areas(Few(samples), [1]).tolist() == [[0, 0, 3]]


def test_other_classes_become_background_and_255_stays():
    mask = np.array([[0, 1, 2], [255, 2, 3]], np.uint8)
    assert data.class_mask(mask, 2).tolist() == [[0, 0, 1], [255, 1, 0]]
