import datasets
import pytest
import torch
from datasets import ClassLabel, Features, Image, List, Value

from lightning_igpt.data.columns import class_names_of, encode_labels, find_image_column, find_label_column

BOTH = Features({"img": Image(), "label": ClassLabel(names=["x", "y"]), "id": Value("int64"), "text": Value("string")})


def column(values, feature=None):
    features = Features({"label": feature}) if feature is not None else None
    return datasets.Dataset.from_dict({"label": values}, features=features)


def label(features, wanted=None, needed=True):
    return find_label_column(features, wanted, needed=needed, where="S")


def test_image_column_by_type():
    assert find_image_column(BOTH, None, where="S") == "img"
    two = Features({"a": Image(), "b": Image(), "c": Value("int64")})
    assert find_image_column(two, "b", where="S") == "b"
    with pytest.raises(ValueError, match=r"S has several columns of images \('a', 'b'\); set image_column"):
        find_image_column(two, None, where="S")
    with pytest.raises(ValueError, match=r"no column of type Image; set image_column\. Its columns: 'x', 'y'"):
        find_image_column(Features({"x": Value("int64"), "y": Value("string")}), None, where="S")


@pytest.mark.parametrize(
    "features, image, target",
    [
        ({"img": Image(), "fine_label": ClassLabel(names=["a"]), "coarse_label": ClassLabel(names=["b"])}, 0, 1),
        ({"mask": Image(), "image": Image(), "target": Value("int64")}, 1, 2),
        ({"jpg": Value("binary"), "cls": Value("int64"), "json": {"width": Value("int64")}}, 0, 1),
        ({"text": Value("string"), "pixel_values": {"bytes": Value("binary"), "path": Value("string")}}, 1, None),
        ({"picture": Value("string"), "label": Value("string")}, 0, 1),
        ({"input": Image(), "target": Image()}, 0, None),
    ],
)
def test_usual_names_are_known(features, image, target):
    names = list(features)
    assert find_image_column(Features(features), None, where="S") == names[image]
    assert label(Features(features), needed=target is not None) == (None if target is None else names[target])


def test_columns_that_can_hold_images():
    struct = {"bytes": Value("binary"), "path": Value("string")}
    for feature in (Value("binary"), Value("string"), struct):
        assert find_image_column(Features({"jpg": feature}), "jpg", where="S") == "jpg"
    for feature in (Value("int64"), List(Value("uint8")), ClassLabel(names=["a"]), {"w": Value("int64")}):
        with pytest.raises(ValueError, match=r"'jpg' of S has type .* which holds no images"):
            find_image_column(Features({"jpg": feature}), "jpg", where="S")


def test_label_column_by_type():
    assert label(BOTH) == "label"
    assert label(Features({"kind": ClassLabel(names=["a"]), "label": Value("int32")})) == "kind"
    assert label(Features({"labels": Value("uint8")})) == "labels"
    assert label(BOTH, "text") == "text" and label(BOTH, "id") == "id"
    with pytest.raises(ValueError, match=r"the type .*float32.*; labels are"):
        label(Features({"score": Value("float32")}), "score")


def test_unclear_labels_matter_only_when_needed():
    two = Features({"fine": ClassLabel(names=["a"]), "coarse": ClassLabel(names=["b"])})
    none = Features({"label": Value("float32")})
    assert label(two, needed=False) is None and label(none, needed=False) is None
    with pytest.raises(ValueError, match=r"several columns of labels \('fine', 'coarse'\); set label_column"):
        label(two)
    with pytest.raises(ValueError, match=r"column 'label' .*float32.*; labels are"):
        label(none)


def test_class_names():
    assert class_names_of(column([1, 0], ClassLabel(names=["u", "v", "w"])), "label") == ["u", "v", "w"]
    assert class_names_of(column([4, 0, 2]), "label") == ["0", "1", "2", "3", "4"]
    assert class_names_of(column(["b", None, "a", "b"]), "label") == ["a", "b"]
    with pytest.raises(ValueError, match=r"numbers up to 123456789"):
        class_names_of(column([0, 123456789]), "label")


def encode(dataset, names):
    return encode_labels(dataset, "label", names, where="S, split 'test'")


def test_labels_are_matched_by_name():
    names = ["cat", "dog", "eel"]
    dog_first = column([0, 1, 1], ClassLabel(names=["dog", "eel"]))
    assert encode(dog_first, names).tolist() == [1, 2, 2]
    assert encode(column([2, 0, 1], ClassLabel(names=names)), names).tolist() == [2, 0, 1]
    assert encode(column(["eel", "cat"]), names).tolist() == [2, 0]
    numbers = encode(column([2, 0], Value("int8")), names)
    assert numbers.tolist() == [2, 0] and numbers.dtype == torch.int64
    assert encode(dog_first.select([2, 0]), names).tolist() == [2, 1]


def test_bad_labels():
    names = ["cat", "dog"]
    with pytest.raises(ValueError, match=r"S, split 'test' has no 'label' in 1 of 3 rows, such as row 1"):
        encode(column([0, None, 1], ClassLabel(names=names)), names)
    with pytest.raises(ValueError, match=r"2 of 3 labels .*outside 0\.\.1, the first is -1 in row 1; .*hidden"):
        encode(column([0, -1, -1], ClassLabel(names=names)), names)
    with pytest.raises(ValueError, match=r"outside 0\.\.1, the first is 2 in row 0"):
        encode(column([2, 1]), names)
    for unknown in (column(["dog", "emu"]), column([0], ClassLabel(names=["emu"]))):
        with pytest.raises(ValueError, match=r"has the classes 'emu', which the training split does not have"):
            encode(unknown, names)
