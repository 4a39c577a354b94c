"""The gate for data: wrong values in files, own arrays and sources are refused and located; every real dtype works."""

import dataclasses
import errno
import gzip
import io
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

import data
from cli import UserError
from tasks import files, images, scores, signals, text, toys

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 3, 16)).astype(np.float32), np.arange(40) % 5


def own(monkeypatch, train, test=None, **fields):
    """A task of one's own, loaded: x (n, 3, 16), five classes, or other `fields` of the Task."""
    read = lambda *_: (train, test or (X, Y), "official")
    fields = dict(name="mine", shape=(3, 16), output=(5,), read=read, downloads=()) | fields
    task = dataclasses.replace(data.TASKS["satellite"], **fields)
    monkeypatch.setitem(data.TASKS, "mine", task)
    return data.load("mine", "nowhere", "nowhere", "full")


def refused(monkeypatch, match, *arguments, **fields):
    with pytest.raises(UserError, match=match) as error:
        own(monkeypatch, *arguments, **fields)
    assert len(str(error.value).splitlines()) <= 2 and "--lr" not in str(error.value)


def changed(array, index, value):
    array = array.astype(np.result_type(array, type(value)))
    array[index] = value
    return array


# ---- inputs


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "g", "i1", "u2", ">i2", "i8", "u8", "?"])
def test_inputs_of_every_real_dtype_become_the_same_fp32_numbers(monkeypatch, dtype):
    x = (RNG.integers(0, 2, X.shape) if dtype == "?" else 50 * RNG.random(X.shape)).astype(dtype)
    loaded = own(monkeypatch, (x, Y), (x, Y))
    assert loaded.test.x.dtype == torch.float32
    assert np.array_equal(loaded.test.inputs(torch.arange(40)).numpy(), x.astype(np.float32))


def test_fp32_inputs_keep_every_bit_and_lists_and_maps_work(monkeypatch, tmp_path):
    assert own(monkeypatch, (X, Y), (X, Y)).test.x.numpy().tobytes() == X.tobytes()
    assert np.array_equal(own(monkeypatch, (X, Y), (X.tolist(), Y.tolist())).test.x, X)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(own(monkeypatch, (mapped, Y), (mapped, Y)).test.x, X)


@pytest.mark.parametrize("dtype", ["c8", "O", "U3", "S3", "M8[s]", "V4"])
def test_other_values_than_real_numbers_are_refused(monkeypatch, dtype):
    x = np.zeros((40, 3, 16), dtype)
    refused(monkeypatch, "mine, training set.*expected real numbers", (x, Y))
    refused(monkeypatch, "mine, test set.*expected real numbers", (X, Y), (x, Y))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("where", ["training", "test"])
def test_inputs_that_are_not_finite_are_refused_wherever_they_are(monkeypatch, value, where):
    for sample in (0, 17, 39):  # some of them are in the validation set
        bad = changed(X, (sample, 1, 3), value)
        both = ((bad, Y), (X, Y)) if where == "training" else ((X, Y), (bad, Y))
        refused(monkeypatch, rf"mine, {where} set: x: sample {sample} has .*expected a finite", *both)


def test_nan_in_validation_alone_is_refused(monkeypatch):
    held = own(monkeypatch, (X, np.arange(40)), output=(40,)).val.y.numpy()  # y is the number of the sample
    bad = changed(X, (held, 0, 0), np.nan)
    refused(monkeypatch, rf"x: sample {held[0]} has nan.*\nWrong in {len(held)} of {len(held)}", (bad, Y))


@pytest.mark.parametrize("shape", [(40, 16, 3), (40, 48), (40, 3, 16, 1), (40, 1, 48)])
def test_shapes_are_compared_as_shapes(monkeypatch, shape):
    for both in (((X.reshape(shape), Y), (X, Y)), ((X, Y), (X.reshape(shape), Y))):
        refused(monkeypatch, r"x holds .*expected \(.*3, 16\)", *both)


@pytest.mark.parametrize("x, y", [(X, Y[:30]), (X[:30], Y), (X[:0], Y[:0]), (files.of_files(lambda i: X[i], range(30)), Y)])
def test_inputs_and_targets_are_equally_many_and_not_none(monkeypatch, x, y):
    match = rf"set: {len(x)} inputs and {len(y)} targets"
    refused(monkeypatch, match, (x, y))
    refused(monkeypatch, match, (X, Y), (x, y))


def test_one_training_sample_is_too_few(monkeypatch):
    refused(monkeypatch, "1 training samples; expected two or more", (X[:1], Y[:1]))


def test_images_are_uint8_in_both_sets_or_in_neither(monkeypatch):
    images = RNG.integers(0, 256, X.shape, dtype=np.uint8)
    for train, test in ((images, X), (X, images), (images, images.astype(np.float32))):  # only uint8 is divided by 255
        refused(monkeypatch, "images are uint8, the others are not", (train, Y), (test, Y))
    assert own(monkeypatch, (images, Y), (images, Y)).test.inputs(torch.arange(40)).max() <= 1


def test_masked_ragged_arrays_are_refused(monkeypatch):
    refused(monkeypatch, "masked", (np.ma.masked_greater(X, 1), Y))
    refused(monkeypatch, "not an array of numbers", ([[1.0], [1.0, 2.0]] * 20, Y))


def test_lazy_samples_are_checked_when_they_are_read(monkeypatch):
    bad = changed(X, (7, 0, 0), np.inf)
    lazy = files.of_files(lambda i: bad[i], range(40))
    test = own(monkeypatch, (X, Y), (lazy, Y)).test
    assert torch.equal(test.inputs(torch.arange(7)), torch.from_numpy(X[:7]))
    with pytest.raises(UserError, match="mine, test set: x: sample 7 has inf"):
        test.inputs(torch.tensor([3, 7]))
    with pytest.raises(UserError, match="sample 7 has inf"):
        list(test.batches(1, 40, 0, 0))  # read in another thread
    wrong = files.of_files(lambda i: X[i].T, range(40))
    refused(monkeypatch, r"x holds \(1, 16, 3\); expected \(1, 3, 16\)", (wrong, Y))
    numbers = own(monkeypatch, (lazy, Y))
    with pytest.raises(UserError, match="mine, training set: x: sample 7 has inf"):  # its number in the files, not in the split
        [split.inputs(torch.arange(len(split))) for split in (numbers.train, numbers.val)]


# ---- targets


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", "i8", ">i8", "u8", "f2", "f4", ">f8"])
@pytest.mark.parametrize("column", [False, True])
def test_classes_of_every_dtype_are_the_same_classes(monkeypatch, dtype, column):
    y = Y.astype(dtype)[:, None] if column else Y.astype(dtype)  # (40,) or (40, 1)
    loaded = own(monkeypatch, (X, y), (X, y))
    assert loaded.test.y.dtype == torch.int64 and loaded.test.y.tolist() == Y.tolist()
    assert torch.equal(loaded.train.y, own(monkeypatch, (X, Y)).train.y)


def test_classes_may_be_bool(monkeypatch):
    assert own(monkeypatch, (X, Y > 2), (X, Y > 2), output=(2,)).test.y.tolist() == [int(y > 2) for y in Y]


@pytest.mark.parametrize("value", [-1, 5, 1.5, np.nan, np.inf, 2**63, -(2**62)])
def test_other_classes_are_refused(monkeypatch, value):
    y = changed(Y.astype(np.uint64) if value == 2**63 else Y, 11, value)
    for name, both in (("training", ((X, y), (X, Y))), ("test", ((X, Y), (X, y)))):
        refused(monkeypatch, rf"mine, {name} set: y: sample 11 has .*expected a whole number from 0 to 4", *both)


@pytest.mark.parametrize("y", [np.eye(5)[Y], Y.astype(str), Y.astype(object), Y[:, None].repeat(2, 1)])
def test_one_hot_rows_text_and_objects_are_no_classes(monkeypatch, y):
    refused(monkeypatch, r"expected (\(\d+,\)|real numbers)", (X, y))


LABELS = dict(target="labels", loss=scores.presence, score=scores.label_auroc_error)


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", ">f4", "f2", "f8"])
def test_labels_of_every_dtype_become_fp32(monkeypatch, dtype):
    y = RNG.integers(0, 2, (40, 5)).astype(dtype)
    test = own(monkeypatch, (X, y), (X, y), **LABELS).test
    assert test.y.dtype == torch.float32 and np.array_equal(test.y, y.astype(np.float32))


@pytest.mark.parametrize("value", [-1, 2, 0.5, np.nan])
def test_labels_are_0_or_1(monkeypatch, value):
    y = RNG.integers(0, 2, (40, 5))
    refused(monkeypatch, r"y: sample 9 has .*expected 0 or 1\.", (X, y), (X, changed(y, (9, 4), value)), **LABELS)
    refused(monkeypatch, r"holds \(40, 6\); expected \(n, 5\)", (X, y), (X, np.zeros((40, 6))), **LABELS)


def test_the_number_of_a_clip_may_follow_the_labels_where_the_score_averages_over_clips(monkeypatch):
    y = RNG.integers(0, 2, (40, 5))
    with_clip = np.concatenate([y, np.arange(40)[:, None]], 1)  # (40, 6)
    clips = LABELS | {"score": scores.clip_map_error}
    assert np.array_equal(own(monkeypatch, (X, y), (X, with_clip), **clips).test.y, with_clip)
    refused(monkeypatch, "sample 2 has 3", (X, y), (X, changed(with_clip, (2, 4), 3)), **clips)
    refused(monkeypatch, "sample 2 has nan", (X, y), (X, changed(with_clip, (2, 5), np.nan)), **clips)


FIELD = dict(target="field", output=(3, 16), loss=scores.nrmse, score=scores.score_of(scores.nrmse))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_fields_are_finite_also_lazy_ones(monkeypatch, value):
    bad = changed(X, (5, 2, 1), value)
    refused(monkeypatch, "mine, training set: y: sample 5 has .*finite", (X, bad), (X, X), **FIELD)
    test = own(monkeypatch, (X, X), (X, files.of_files(lambda i: bad[i], range(40))), **FIELD).test
    assert torch.equal(test.targets(torch.tensor([4])), torch.from_numpy(X[4:5]))
    with pytest.raises(UserError, match="mine, test set: y: sample 5 has"):
        test.targets(torch.tensor([4, 5]))


def test_fields_have_the_declared_shape_and_become_fp32(monkeypatch):
    assert own(monkeypatch, (X, X), (X, (9 * X).astype(np.uint8)), **FIELD).test.y.dtype == torch.float32
    refused(monkeypatch, r"y holds \(\d+, 48\); expected \(\d+, 3, 16\)", (X, X.reshape(40, 48)), **FIELD)


def test_nan_marks_ignored_pixels_only_for_the_mask_loss(monkeypatch):
    y = changed((X > 0).astype(np.float32), (4, 0, 0), np.nan)
    masks = FIELD | {"loss": scores.mask_loss}
    assert own(monkeypatch, (X, y), (X, y), **masks).test.y.isnan().sum() == 1
    refused(monkeypatch, "sample 4 has nan", (X, y), (X, X), **FIELD)
    for value in (np.inf, -1, 0.5):
        refused(monkeypatch, "sample 8 has .*0 or 1, or NaN", (X, y), (X, changed(y, (8, 0, 0), value)), **masks)


@pytest.mark.parametrize("name", list(data.PROXIES))
def test_wrong_targets_of_a_source_are_refused(monkeypatch, tmp_path, name):
    x, y, *count = data.PROXIES[name].toy(30, seed=0)
    word = lambda words: [3]
    word.pad = 0
    bad = changed(y, (7,) + (1,) * (y.ndim - 1), np.inf)
    for targets, match in ((y[:20], "30 inputs and 20 targets"), (bad, "y: sample 7 has inf")):
        proxy = dataclasses.replace(data.PROXIES[name], read=lambda *_, y=targets: (x, y, *count))
        monkeypatch.setitem(data.PROXIES, name, proxy)
        with pytest.raises(UserError, match=f"source {name}: {match}"):
            data.load_proxy(name, tmp_path, "full", tokenizer=word)


# ---- files


def arrays(folder, name):
    """The arrays of one task in its official files, 30 samples each; `write(folder)` after a change."""
    if name == "satellite":
        parts = [f"satellite_{part}.npy" for part in ("train", "test")]
        content = {p: {"data": RNG.random((30, 46)), "label": np.arange(30) % 24 + 1} for p in parts}
        return content, lambda: [np.save(folder / p, c, allow_pickle=True) for p, c in content.items()]
    if name == "cifar100":
        (folder / "cifar-100-python").mkdir()
        x, y = RNG.integers(0, 256, (30, 3072), dtype=np.uint8), np.arange(30)
        content = {p: {"data": x, "fine_labels": y} for p in ("train", "test")}
        write = lambda: [(folder / "cifar-100-python" / p).write_bytes(pickle.dumps(c)) for p, c in content.items()]
        return content, write
    if name == "spherical":
        x, y = RNG.integers(0, 256, (30, 3, 60, 60), dtype=np.uint8), np.arange(30)
        content = {p: {"images": x, "labels": y} for p in ("train", "test")}
        return content, lambda: (folder / "s2_cifar100.gz").write_bytes(gzip.compress(pickle.dumps(content), 1))
    content = {}
    for part in ("train", "val", "test"):
        content |= {f"x_{part}": np.eye(4, dtype=np.uint8)[RNG.integers(0, 4, (30, 1000))],
                    f"y_{part}": RNG.integers(0, 2, (30, 36))}  # fmt: skip
    return content, lambda: np.savez(folder / "deepsea_filtered.npz", **content)


def test_labels_of_files_in_any_dtype_are_read_and_wrong_ones_named_with_their_file(tmp_path):
    content, write = arrays(tmp_path, "satellite")
    part, right = content["satellite_test.npy"], np.arange(30) % 24 + 1
    for label in (right.astype(">f8"), right[:, None].astype(np.uint8), right.tolist()):
        part["label"] = label
        write()
        assert np.array_equal(data.load("satellite", tmp_path, tmp_path, "full").test.y, right - 1)
    for label, match in (
        (right + 0.5, r"label: sample 0 has 1.5; expected a whole number from 1 to 24"),
        (right - 1, r"label: sample 0 has 0; expected a whole number from 1 to 24"),
        (right.astype(str), "label holds values of type <U2"),
        ([None, *right[1:]], "label holds values of type object"),
        (np.where(right == 3, np.nan, right), "label: sample 2 has nan"),
        (right[:20], "30 inputs and 20 targets"),
    ):
        part["label"] = label
        write()
        with pytest.raises(UserError, match=f"satellite.*{match}"):
            data.load("satellite", tmp_path, tmp_path, "full")


@pytest.mark.parametrize("name, entry, shape", [
    ("satellite", "data", (30, 46, 1)), ("satellite", "data", (46, 30)), ("cifar100", "data", (30, 32, 32, 3)),
    ("cifar100", "data", (30, 1024)), ("spherical", "images", (30, 60, 60, 3)), ("satellite", "data", (0, 46)),
])  # fmt: skip
def test_arrays_of_another_shape_are_refused_not_reshaped(tmp_path, name, entry, shape):
    content, write = arrays(tmp_path, name)
    for part in content.values():
        part[entry] = np.resize(part[entry], shape)
    write()
    with pytest.raises(UserError, match="holds|0 inputs"):
        data.load(name, tmp_path, tmp_path, "full")


def test_pictures_of_other_types_than_uint8_are_refused(tmp_path):
    content, write = arrays(tmp_path, "spherical")
    content["train"]["images"] = content["train"]["images"] / 255
    write()
    with pytest.raises(UserError, match="s2_cifar100.gz: train: float64 images.*expected uint8"):
        images.read_spherical(tmp_path, tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["O", "c8"])
def test_objects_in_an_npz_are_never_mapped(tmp_path, save, dtype):
    for array in ("x_train", "y_test"):
        content, _ = arrays(tmp_path, "deepsea")
        content[array] = content[array][:4].astype(dtype)
        save(tmp_path / "deepsea_filtered.npz", **content)
        with pytest.raises(UserError, match=f"deepsea_filtered.npz: {array} holds values of type"):
            signals.read_deepsea(tmp_path, tmp_path / "cache")


def test_objects_in_an_npy_file_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, None]), allow_pickle=True)
    with pytest.raises(UserError, match="a.npy holds values of type object; expected real numbers") as error:
        files.read_npy(tmp_path / "a.npy")
    assert "download" not in str(error.value)


def test_labels_of_deepsea_are_0_or_1(tmp_path):
    for value in (-1, np.nan, 7):
        content, write = arrays(tmp_path, "deepsea")
        content["y_val"] = changed(content["y_val"], (3, 5), value)
        write()
        with pytest.raises(UserError, match=r"deepsea_filtered.npz: y_val: sample 3 has .*expected 0 or 1"):
            signals.read_deepsea(tmp_path, tmp_path)


def test_nan_in_a_mapped_file_is_named_when_it_is_read(tmp_path):
    content, write = arrays(tmp_path, "deepsea")
    content["x_test"] = changed(content["x_test"].astype(">f4"), (4, 0, 0), np.nan)
    write()
    test = data.load("deepsea", tmp_path, tmp_path, "full").test
    assert np.array_equal(test.inputs(torch.arange(4)), content["x_test"][:4].transpose(0, 2, 1))
    with pytest.raises(UserError, match="deepsea, test set: x: sample 4 has nan"):
        test.inputs(torch.arange(8))


def test_records_of_an_electrocardiogram_have_one_lead_without_gaps(tmp_path):
    gap = np.full(3000, np.nan)
    for record, match in ((np.zeros((2, 3000)), r"record 7 holds \(2, 3000\)"), (gap, "record 7: sample 0 has nan")):
        records = np.empty(40, object)
        records[:] = [RNG.normal(size=3000) for _ in records]
        records[7] = record
        (tmp_path / "challenge2017.pkl").write_bytes(pickle.dumps({"data": records, "label": ["N", "A"] * 20}))
        with pytest.raises(UserError, match=f"challenge2017.pkl: {match}"):
            signals.read_ecg(tmp_path, tmp_path)


def test_sound_of_8_bits_is_unsigned_and_nan_is_refused(tmp_path):
    tone = 0.4 * np.sin(np.arange(22050) / 8)
    for name, sound in (("8", 128 + 127 * tone), ("16", 32767 * tone), ("32", tone)):
        dtype = {"8": np.uint8, "16": np.int16, "32": np.float32}[name]
        wavfile.write(tmp_path / f"{name}.wav", 22050, sound.astype(dtype))
        assert abs(signals.read_wav(tmp_path / f"{name}.wav") - tone).max() < 0.02
    wavfile.write(tmp_path / "nan.wav", 22050, changed(tone, 9, np.nan).astype(np.float32))
    with pytest.raises(UserError, match="nan.wav: sample 9 has nan"):
        signals.read_wav(tmp_path / "nan.wav")


def voc_mask(path, values, mode="P", palette=None):
    image = Image.fromarray(np.uint8(values)).convert("L")
    if mode == "P":
        image.putpalette(palette or [channel for k in range(256) for channel in images.voc_colour(k)])
    image.save(path)


def test_masks_of_voc_have_its_classes_and_its_palette(tmp_path):
    assert [images.voc_colour(k) for k in (0, 1, 15, 20, 255)] == [
        (0, 0, 0), (128, 0, 0), (192, 128, 128), (0, 64, 128), (224, 224, 192)]  # fmt: skip
    path, values = tmp_path / "m.png", np.zeros((128, 128), np.uint8)
    values[:9], values[9:20], values[-1] = 20, 1, 255
    for mode in ("P", "L"):
        voc_mask(path, values, mode)
        mask = images.read_voc_mask(path)
        assert (mask[:20] == 1).all() and (mask[20:-1] == 0).all() and np.isnan(mask[-1]).all()
    for wrong in (21, 128, 254):
        voc_mask(path, changed(values, (60, 60), np.uint8(wrong)), "L")
        with pytest.raises(UserError, match=rf"m.png has the values \[.*{wrong}.*expected one channel of classes 0 to 20"):
            images.read_voc_mask(path)
    Image.new("RGB", (128, 128)).save(path)
    with pytest.raises(UserError, match="m.png has 3 channels"):
        images.read_voc_mask(path)
    packed = [*images.voc_colour(0), *images.voc_colour(255)]  # only the colours that occur: 1 is the border, no aeroplane
    voc_mask(path, np.eye(128), "P", packed)
    with pytest.raises(UserError, match="m.png has 1 where VOC has 255"):
        images.read_voc_mask(path)


# ---- text, files of the system, advice


CONLL = "\n".join(f"w{i % 7} NN I-NP {'B-PER' if i % 8 else 'O'}" for i in range(640))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_changes_nothing(tmp_path, encoding):
    (tmp_path / "conll2003").mkdir()
    (tmp_path / "conll2003/train.txt").write_text("-DOCSTART- -X- O O\n\n" + CONLL, encoding=encoding)
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", CONLL.encode(encoding))
    for read in (text.read_conll2003, text.read_conll2000):
        pieces, labels, count = read(tmp_path, None, 0, list)  # a token for each word
        assert pieces[0][:3] == ["w0", "w1", "w2"] and len(pieces) == 20 and count == 2 and labels.all()
    (tmp_path / "list.txt").write_text("a\nb", encoding=encoding)
    assert files.read_text(tmp_path / "list.txt") == "a\nb"


def test_text_in_another_encoding_is_called_so(tmp_path):
    (tmp_path / "conll2003").mkdir()
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", "é NN B-NP\n".encode("latin-1") * 99)
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "conll2003/train.txt").write_text("é x x B-PER\n" * 99, encoding=encoding)
        for read in (text.read_conll2003, text.read_conll2000):
            with pytest.raises(UserError, match="is not UTF-8 text.*\nSave it as UTF-8"):
                read(tmp_path, None, 0, list)


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_the_system_are_no_images(tmp_path, packed):
    names = {"train/n01/images/n01_0.JPEG": jpeg(), "train/n01/images/._n01_0.JPEG": b"Mac", "train/._n02.JPEG": b"Mac",
             "train/.DS_Store": b"Mac", "__MACOSX/train/n01/images/._n01_0.JPEG": b"Mac"}  # fmt: skip
    for name, content in names.items():
        if packed:
            with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "a") as archive:
                archive.writestr(f"tiny-imagenet-200/{name}", content)
        else:
            path = tmp_path / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    x, y = images.read_tiny_imagenet(tmp_path)
    assert len(x) == 1 and y.tolist() == [0]


def test_nothing_is_found_in_folders_of_the_system(tmp_path):
    for folder in ("__MACOSX", ".Trash", "b"):
        (tmp_path / folder / "npy_train").mkdir(parents=True)
    assert files.locate(tmp_path, "npy_train") == tmp_path / "b/npy_train"
    (tmp_path / "b/npy_train").rmdir()
    assert not files.present(files.DOWNLOADS["cosmic_train"], tmp_path)
    hidden = tmp_path / ".data"  # the data folder itself may be hidden
    (hidden / "npy_train").mkdir(parents=True)
    assert files.locate(hidden, "npy_train") == hidden / "npy_train"


def test_one_of_two_files_with_the_same_name_is_not_chosen(tmp_path):
    for folder in ("satellite", "backup"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.npy").touch()
    with pytest.raises(UserError, match=r"backup/x.npy and .*satellite/x.npy: which one\?\nGive a --data-dir"):
        files.locate(tmp_path, "x.npy")
    (tmp_path / "x.npy").touch()  # the nearest one counts
    assert files.locate(tmp_path, "x.npy") == tmp_path / "x.npy"


@pytest.mark.parametrize("error, match, advice", [
    (BlockingIOError(11, "Unable to open file (unable to lock file, errno = 11)"), "is locked", "HDF5_USE_FILE_LOCKING"),
    (OSError("Unable to open file (unable to lock file, errno = 524)"), "is locked", "HDF5_USE_FILE_LOCKING"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error", ""),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), "cannot be read: No such file", ""),
    (EOFError("Ran out of input"), "is not a readable thing", "Remove it and download or save it again"),
    (OSError("truncated file: eof = 9"), "is not a readable thing", "Remove it and download or save it again"),
])  # fmt: skip
def test_advice_fits_the_cause(error, match, advice):
    with pytest.raises(UserError, match=f"f.h5 {match}") as raised, files.reading("f.h5", "thing"):
        raise error
    assert advice in str(raised.value) and ("Remove" in advice) == ("Remove" in str(raised.value))


def test_a_filter_that_is_missing_is_no_damage(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as h5:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((4,))
        properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())  # Blosc
        array = h5py.h5d.create(h5.id, b"a", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), properties)
        array.write_direct_chunk((0,), b"0" * 16)
    with pytest.raises(UserError, match="filter.*\n.*hdf5plugin") as error:
        with files.reading(tmp_path / "f.h5", "HDF5 file"), h5py.File(tmp_path / "f.h5") as h5:
            h5["a"][:]
    assert "Remove" not in str(error.value)


def test_code_that_is_missing_and_memory_are_not_blamed_on_the_file():
    for error in (ImportError("no module"), MemoryError()):
        with pytest.raises(type(error)), files.reading("f", "thing"):
            raise error


@pytest.mark.parametrize("name, toy", [("cosmic", toys.hits), ("fsd50k", toys.sounds), ("deepsea", toys.dna)])
def test_toys_have_the_stored_shapes_of_their_files(name, toy):
    x, y = toy(4, 0)
    x, y = data.validate("toy", x, y, data.TASKS[name], None if name == "cosmic" else y.shape[1])
    assert len(x) == len(y) == 4 and np.nanmax(y) == 1
