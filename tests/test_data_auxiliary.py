"""data.py for lpg.py: auxiliary classes of shapes, chosen classes, several data sets as one."""

import types

import numpy as np
import pytest

from data import (
    AUXILIARY, COCO_SPELLING, TARGETS, VOC_CLASSES, DataError, Dataset, chosen_classes, export, join, load,
    select, tags_in)


def ask(data, root="", supervision="full", split="train"):
    args = types.SimpleNamespace(data=data, root=str(root), train_list="train", supervision=supervision)
    return load(args, split)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Eight train and eight val scenes in the layouts voc and coco."""
    made = tmp_path_factory.mktemp("layouts")
    for layout in ("voc", "coco"): export("shapes", layout, str(made / layout), n=8)
    return made


def test_auxiliary_shapes_have_classes_of_their_own():
    aux, target = ask("shapes-aux"), ask("shapes")
    assert aux.classes == [kind.name for kind in AUXILIARY] and target.classes == [k.name for k in TARGETS]
    assert not {*aux.classes} & {*target.classes} and aux.names == target.names
    s, t = aux[0], target[0]
    assert s.image.shape != t.image.shape or (s.image != t.image).any(), "other scenes"
    assert len(s.tags) == 6 and set(np.unique(s.mask)) - {0} == set(np.flatnonzero(s.tags) + 1)
    assert len(s.boxes) and set(s.boxes[:, 0]) == set(np.flatnonzero(s.tags) + 1)
    assert not hasattr(ask("shapes-aux", supervision="box")[0], "mask")


@pytest.mark.parametrize("text, found", [
    ("", "a b c sofa cat"), ("1-2", "a b"), ("2,4-9", "b sofa cat"), ("cat,a", "a cat"), ("couch", "sofa"),
    ("not-voc", "a b c")])
def test_classes_are_chosen_by_number_name_or_not_voc(text, found):
    assert chosen_classes(text, "a b c sofa cat".split(), "--classes") == found.split()


@pytest.mark.parametrize("text", ["dog", "7", "1-2,cow", "0"])
def test_a_class_that_is_not_there_is_named(text):
    with pytest.raises(DataError, match=f"--classes {text}: '{text.split(',')[-1]}'"):
        chosen_classes(text, "a b c".split(), "--classes")


def test_voc_and_coco_spell_six_classes_differently():
    assert set(COCO_SPELLING) < set(VOC_CLASSES) and not set(COCO_SPELLING.values()) & set(VOC_CLASSES)


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_fields_that_are_not_asked_for_are_not_made(exported, layout):
    args = types.SimpleNamespace(data=layout, root=str(exported / layout), train_list="train")
    for args.supervision, split, masks, shown in (
            ("full", "train", False, "boxes mask"), ("box", "train", False, "boxes"),
            ("box", "train", True, "boxes mask"), ("image", "train", False, ""),
            ("box", "val", False, "boxes mask")):
        some, every = (load(args, split, masks, fields) for fields in (("boxes", "mask"), None))
        assert {*some.fields} == {*some.source.fields} == {*shown.split()} <= {*every.fields}
        for key in some.fields: assert (getattr(some[3], key) == getattr(every[3], key)).all()


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_selected_classes_are_renumbered_everywhere(exported, layout):
    every = ask(layout, exported / layout)
    chosen = [every.classes[5], every.classes[1]]
    some = select(every, chosen)
    assert some.classes == chosen and some.fields == every.fields and "classes" in some.notes
    old = {1: 6, 2: 2}
    kept = [s.name for s in every if {6, 2} & {*np.unique(s.mask)}]
    assert 0 < len(kept) < len(every) and some.names == kept
    for name in kept:
        s, t = every[every.index(name)], some[some.index(name)]
        for new, number in old.items():
            assert ((t.mask == new) == (s.mask == number)).all()
            assert t.tags[new - 1] == s.tags[number - 1]
            assert (t.boxes[t.boxes[:, 0] == new, 1:] == s.boxes[s.boxes[:, 0] == number, 1:]).all()
        assert (t.mask[~np.isin(s.mask, [2, 6, 255])] == 0).all()
        assert ((t.mask == 255) == (s.mask == 255)).all()
        assert len(t.boxes) == np.isin(s.boxes[:, 0], [2, 6]).sum() and len(t.tags) == 2
        assert (t.instances[np.isin(s.mask, [2, 6])] == s.instances[np.isin(s.mask, [2, 6])]).all()
        assert (t.instances[t.mask == 0] == 0).all()


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_selection_of_instances_alone(exported, layout):
    args = types.SimpleNamespace(data=layout, root=str(exported / layout), train_list="", supervision="full")
    whole, alone = (load(args, "val", fields=fields) for fields in (None, ("instances",)))
    whole, alone = (select(every, every.classes[1:3]) for every in (whole, alone))
    assert alone.fields == ("instances",) and alone.names == whole.names
    assert set(vars(alone[0])) == {"name", "image", "tags", "instances"}
    assert alone[0].instances.any() and (alone[0].instances == whole[0].instances).all()


def test_a_selection_of_names_keeps_all_classes():
    every = ask("shapes-aux")
    some = select(every, names=every.names[3:5])
    assert some.names == every.names[3:5] and some.classes == every.classes and "classes" not in some.notes
    assert (some[1].mask == every[4].mask).all() and (some[1].boxes == every[4].boxes).all()


@pytest.mark.parametrize("supervision", ["box", "image"])
def test_a_selection_shows_no_more_than_the_data_set(supervision):
    every = ask("shapes", supervision=supervision)
    s = select(every, every.classes[:4])[0]
    assert not hasattr(s, "mask") and hasattr(s, "boxes") == (supervision == "box")


def test_tags_without_opening_the_picture(exported):
    for layout in ("voc", "coco"):
        every = ask(layout, exported / layout)
        for s in every:
            assert (tags_in(every, s.name) == s.tags).all()
            assert (tags_in(select(every, every.classes[2:5]), s.name) == s.tags[2:5]).all()


class Two:
    """A data set of two pictures with given classes."""

    def __init__(self, classes, labels):
        self.classes, self.labels, self.names = classes, labels, ["x", "y"]
        self.fields, self.notes = ["boxes", "mask"], {"source": "made up"}

    def read(self, name):
        label = np.array([[0, self.labels[self.names.index(name)], 255]], np.uint8)
        return types.SimpleNamespace(name=name, image=np.zeros((1, 3, 3), np.uint8), mask=label,
                                     tags=np.isin(np.arange(1, len(self.classes) + 1), label),
                                     boxes=np.array([[label[0, 1], 0, 0, 1, 1]], np.float32))


def test_data_sets_joined_share_classes_of_one_name():
    a, b = Dataset(Two(["sofa", "cat"], [1, 2])), Dataset(Two(["kite", "couch"], [1, 2]))
    both = join([a, b])
    assert both.classes == ["sofa", "cat", "kite"] and both.names == ["0-x", "0-y", "1-x", "1-y"]
    assert [s.mask[0].tolist() for s in both] == [[0, 1, 255], [0, 2, 255], [0, 3, 255], [0, 1, 255]]
    assert [s.boxes[0, 0] for s in both] == [1, 2, 3, 1] and [s.name for s in both] == both.names
    assert all((np.flatnonzero(s.tags) + 1 == s.boxes[0, 0]).all() and len(s.tags) == 3 for s in both)
    assert both.notes == {"source of set 0": "made up", "source of set 1": "made up"}
    few = select(both, ["kite", "sofa"])
    assert few.names == ["0-x", "1-x", "1-y"] and few[2].mask[0].tolist() == [0, 2, 255]
