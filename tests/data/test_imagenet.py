"""Folders of images: how files are found and labelled, what is refused, and whole runs on a tree of photographs."""

import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jpegs
import numpy as np
import pytest
import scipy.io
import torch
import torchvision.transforms.functional as TF
from jpegs import CLASSES, MEAN, STD, described, opened
from PIL import Image
from running import Run, assert_same_run, build_small, load_script, outcome, start
from torchvision.datasets import imagenet

import train
from mbn.config import REPOSITORY
from mbn.data.image_folder import Decoder, Files, from_iteration, list_images, open_folders
from mbn.network_layers import from_config
from mbn.system.errors import UserError
from mbn.system.files import is_locked

# Python 3.12 and later warn of a fork in a process with threads, which torch's are.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


# Files.


def test_files_hold_arrays_and_no_object_for_each_path():
    paths = [f"n{i % 7:08d}/image_{i}.JPEG" for i in range(5000)]
    held_by = vars(Files(REPOSITORY, paths, [i % 7 for i in range(5000)], range(5000)))
    arrays = [value for name, value in held_by.items() if name != "root"]
    assert isinstance(held_by["root"], str)
    assert all(array.dtype in (np.uint8, np.int64) for array in arrays)
    assert sum(array.nbytes for array in arrays) < 5000 * (25 + 24)


def test_names_of_any_kind_come_back(tmp_path):
    paths = [
        *("a/ß é.JPEG", "日本/写真.jpeg", "a/x.JPEG", "d/😀 e\u0301.png", "e/" + "z" * 200),
        "c/" + os.fsdecode(b"\xff\xfe.jpg"),
    ]
    files = Files(tmp_path, paths, range(6), range(6))
    assert [files.path(i) for i in range(6)] == [os.path.join(tmp_path, p) for p in paths]  # noqa: PTH118
    assert (files.labels.tolist(), len(files)) == (list(range(6)), 6)


def test_what_workers_are_given_can_be_pickled(tree):
    """Needed where processes are spawned, not forked: on macOS, and on Linux from Python 3.14 on."""
    decoder = Decoder(opened(tree).train, 64, True, 0)
    other = pickle.loads(pickle.dumps(decoder))
    image, label = decoder[1, 9]
    assert np.array_equal(other[1, 9][0], image)
    assert other[1, 9][1] == label == 1


def test_images_are_known_by_their_extension_in_any_case_and_sorted(tmp_path):
    for name in ("b.JPEG", "a.jpg", "c.Png", "d.webp", "notes.txt", ".DS_Store", "e.JPEG.md5"):
        (tmp_path / name).touch()
    assert list_images(tmp_path).names == ["a.jpg", "b.JPEG", "c.Png", "d.webp"]


def test_labels_are_the_places_of_the_folders_in_alphabetical_order(tree):
    for files, part, n in zip(open_folders(described(), tree), ("train", "val"), (8, 3), strict=True):
        assert files.labels.tolist() == [0] * n + [1] * n + [2] * n
        folders = [os.path.dirname(files.path(i)) for i in range(len(files))]  # noqa: PTH120
        assert folders == [str(tree / part / CLASSES[label]) for label in files.labels]


@pytest.mark.parametrize(("size", "resized"), [(96, 110), (128, 146), (224, 256), (448, 512)])
def test_sizes_keep_the_proportion_of_256_to_224(tree, size, resized):
    ((images, _),) = opened(tree, image_size=size).test_batches(9)
    source = Image.open(tree / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG")
    expected = TF.center_crop(TF.resize(source, resized), size)
    assert torch.equal(images[0], TF.normalize(TF.to_tensor(expected), MEAN, STD))


# A flat val/.


def flatten(root):
    """val/ as the official archive has it, with the devkit's ground truth as torchvision keeps it: the true labels."""
    images = sorted((root / "val").glob("*/*"))
    wnids = []
    for place, i in enumerate(np.random.RandomState(0).permutation(len(images)), 1):
        wnids.append(images[i].parent.name)
        images[i].rename(root / "val" / f"ILSVRC2012_val_{place:08d}.JPEG")
    for name in CLASSES:
        (root / "val" / name).rmdir()
    # The devkit lists its classes in another order than the alphabet's.
    torch.save(({name: (name, "a class") for name in reversed(CLASSES)}, wnids), root / "meta.bin")
    return wnids


def test_a_flat_val_is_labelled_by_the_devkit(copied, tree):
    wnids = flatten(copied)
    _, tested = open_folders(described(), copied)
    assert [CLASSES[label] for label in tested.labels] == wnids != sorted(wnids)
    # The same images with the same labels as in folders, in another order.
    folders, flat = (
        [(images.sum().item(), labels.item()) for images, labels in opened(root).test_batches(1)]
        for root in (tree, copied)
    )
    assert flat != folders
    assert sorted(flat) == sorted(folders)


def test_the_devkits_archive_is_read_and_nothing_is_written_beside_it(copied, tmp_path, monkeypatch):
    """Its files are made here as the official archive has them: synsets numbered from 1, inner nodes with children."""
    wnids = flatten(copied)
    (copied / "meta.bin").unlink()
    files = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    files.mkdir(parents=True)
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = [(i, name, "a class", "", 0) for i, name in enumerate(reversed(CLASSES), 1)]
    synsets.append((4, "n00000001", "a class of classes", "", 3))
    scipy.io.savemat(files / "meta.mat", {"synsets": np.array(synsets, dtype=columns)})
    number = {name: i for i, name, *_ in synsets}
    (files / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number[name]}\n" for name in wnids))
    archive = shutil.make_archive(copied / "ILSVRC2012_devkit_t12", "gztar", tmp_path, "ILSVRC2012_devkit_t12")
    with open(archive, "rb") as file:  # noqa: PTH123
        digest = hashlib.md5(file.read()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", ("ILSVRC2012_devkit_t12.tar.gz", digest))
    before = sorted(copied.iterdir())
    _, tested = open_folders(described(), copied)
    assert [CLASSES[label] for label in tested.labels] == wnids
    assert sorted(copied.iterdir()) == before


# What is refused.


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(part):
    return lambda root: [path.unlink() for path in (root / part / CLASSES[2]).iterdir()]


def flattened(spoil):
    return lambda root: (flatten(root), spoil(root))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remove("train"), r"/train is missing: machine\.data must name .* train/<class>"),
        (remove("val"), r"/val is missing: machine\.data must name .* train/<class>"),
        (remove("val", CLASSES[1]), f"/val has no folder {CLASSES[1]}"),
        (remove("train", CLASSES[2]), f"/val has a folder {CLASSES[2]} that train/ lacks"),
        (empty("train"), f"/train/{CLASSES[2]} has no image"),
        (empty("val"), f"/val/{CLASSES[2]} has no image"),
        (flattened(lambda root: (root / "meta.bin").unlink()), "put ILSVRC2012_devkit_t12.tar.gz .* val/<class>/"),
        (
            flattened(lambda root: (root / "meta.bin").write_bytes(b"x")),
            r"\(it is damaged\): put ILSVRC2012_devkit_t12",
        ),
        (flattened(lambda root: (root / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()), "has 8 images, .* labels 9"),
        (flattened(remove("train", CLASSES[0])), f"/train has no folder {CLASSES[0]}, a class of the devkit"),
    ],
)
def test_a_tree_that_is_not_whole_is_refused_in_one_sentence(copied, spoil, says):
    spoil(copied)
    with pytest.raises(UserError, match=says) as caught:
        open_folders(described(), copied)
    assert re.fullmatch(r"[^\n]{,600}\.\)?", str(caught.value))


def as_png(content):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        lambda jpeg: jpeg[:-400],
        lambda jpeg: b"",
        lambda jpeg: b"<html>404</html>",
        lambda jpeg: b"\0" * 200 + jpeg[200:],
        lambda jpeg: as_png(jpeg)[: len(as_png(jpeg)) // 2],
        lambda jpeg: as_png(jpeg)[:33] + b"\0\0\0\1" + as_png(jpeg)[37:],  # the length of a part
    ],
)
def test_a_damaged_image_is_an_error_that_names_its_file(copied, damage, workers):
    path = copied / "train" / CLASSES[1] / f"{CLASSES[1]}_5.JPEG"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        list(opened(copied, workers).plain_train_batches(8))
    assert re.fullmatch(rf"{path} cannot be decoded .*\.", str(caught.value))


# Whole runs.


def command(root, *overrides):
    return [
        *(*jpegs.RUN, "batch_size=8", "schedule.epochs=1", "machine.workers=0"),
        *(f"machine.data={root}", *overrides),
    ]


def trained(root, results, *overrides):
    """A run in this process, to its end."""
    assert train.main([*command(root, *overrides), f"machine.results={results}"]) == 0
    return Run(results, command(root, *overrides))


@pytest.fixture
def small(monkeypatch):
    """A small network instead of the one that is asked for."""
    monkeypatch.setattr("models.build", build_small)


def test_a_run_ends_with_a_record_with_top_1_and_top_5(tree, tmp_path, capsys):
    result = trained(tree, tmp_path, "norm=mbn").record()
    # Of 9 images of 3 classes: five guesses hold the right one.
    assert result["test_error"] in [pytest.approx(100 * k / 9) for k in range(10)]
    assert result["test_error_top5"] == 0
    assert 0 < result["test_loss"] < 100
    assert (result["iterations"], result["images"]) == (3, 24)
    assert result["parameters"] == 11_176_512 + 3 * 513
    assert result["config"]["dataset"]["image_size"] == 65
    assert f"test error {result['test_error']:.2f} %" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")  # 180 MB


def test_a_corrupt_image_ends_a_run_with_one_sentence_that_names_it(copied, tmp_path):
    path = copied / "train" / CLASSES[2] / f"{CLASSES[2]}_6.JPEG"
    path.write_bytes(path.read_bytes()[:-400])
    done = outcome(start(*command(copied, "machine.workers=2", f"machine.results={tmp_path / 'results'}")))
    assert done.code == 1
    assert "Traceback" not in done.err
    (error,) = [line for line in done.err.splitlines() if "error" in line]
    assert error.startswith(f"error: {path} cannot be decoded")
    assert not (tmp_path / "results" / "records").exists()


@pytest.mark.parametrize("iteration", [0, 3])
def test_what_was_trained_before_a_corrupt_image_is_saved(iteration, copied, tree, tmp_path, small, capsys):
    overrides = ("norm=bn", "batch_size=5", "schedule.epochs=2", "machine.mode=eager")
    run = Run(tmp_path / "left", command(copied, *overrides))
    (_, index), *_ = next(from_iteration(iteration, 0, 24, 5))
    path = Path(opened(copied).train.path(index))
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    assert train.main([*command(copied, *overrides), f"machine.results={run.results}"]) == 1
    assert f"error: {path} cannot be decoded" in capsys.readouterr().err
    assert (run.checkpoint()["iteration"] if iteration else run.checkpoint_path.exists()) == iteration
    path.write_bytes(content)
    assert train.main([*command(copied, *overrides), f"machine.results={run.results}"]) == 0
    assert_same_run(run, trained(tree, tmp_path / "whole", *overrides))


def test_to_test_images_training_images_are_not_looked_for_but_their_classes_are(copied):
    expected = open_folders(described(), copied)[1].labels.tolist()
    for path in (copied / "train").glob("*/*"):
        path.unlink()
    train, test = open_folders(described(), copied, to_test=True)
    assert (len(train), test.labels.tolist()) == (0, expected)
    (copied / "val" / CLASSES[1]).rename(copied / "val" / "zz")
    with pytest.raises(UserError, match=f"/val has no folder {CLASSES[1]}"):  # else others would have its label
        open_folders(described(), copied, to_test=True)


@pytest.mark.parametrize("more", [(), ("--train",)], ids=["test images", "training images"])
def test_weights_are_tested_with_the_test_images_alone(more, copied, tmp_path, small, capsys):
    shutil.rmtree(copied / "train")
    config = Run(tmp_path, command(copied, "norm=bn")).config
    weights = tmp_path / "weights.pt"
    torch.save(build_small(layers=from_config(config), classes=3).state_dict(), weights)
    settings = [*jpegs.RUN, "norm=bn", "machine.workers=0", f"machine.data={copied}"]
    code = load_script("evaluate").main([str(weights), *settings, *more])
    said = capsys.readouterr()
    if more:
        assert (code, said.err.count("\n")) == (1, 1)
        assert "train is missing" in said.err
    else:
        assert code == 0
        assert "weights.pt on imagenet: loss" in said.out


SIGNALLED = """
import os, pytest, signal, sys, time
sys.path[:0] = [".", "tests", "tests/launch"]
import models, running, test_lanes, train
models.build = running.build_small
test_lanes.after(pytest.MonkeyPatch(), {iterations}, lambda: {send})
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_and_stopped_in_mid_epoch_a_run_ends_with_the_same_bits(tree, tmp_path, small):
    """Each time with another number of workers. An epoch has 5 iterations, the last one smaller."""
    overrides = ("norm=mbn", "batch_size=5", "schedule.epochs=2")
    left = Run(tmp_path / "left", command(tree, *overrides))

    def signalled(iterations, send, *more):
        log = tmp_path / "log"
        code = SIGNALLED.format(iterations=iterations, send=send)
        arguments = [*command(tree, *overrides, *more), f"machine.results={left.results}"]
        # Into a file: a pipe would end with the last of the workers, not with the run.
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                cwd=REPOSITORY,
                stdout=output,
                stderr=output,
                start_new_session=True,
                timeout=200,
            )
        return done.returncode, log.read_text()

    often = "machine.checkpoint_seconds=0.000001"
    code, _ = signalled(4, "os.kill(os.getpid(), signal.SIGKILL)", "machine.workers=2", often)
    assert code == -9
    # Its workers outlive it by seconds and keep open what they inherited: that must not include the run's lock.
    assert not is_locked(left.folder / "lock")
    assert left.checkpoint()["iteration"] == 3  # the fourth had not been saved
    # `timeout`, schedulers of clusters and a terminal's Ctrl-C send a signal to the workers too. Not sent by the run
    # itself: for its workers, a SIGTERM from their parent is an order to end.
    code, said = signalled(3, "[os.system(f'kill -TERM -{os.getpid()}'), time.sleep(2)]", "machine.workers=1")
    assert code == 75
    assert "resuming at iteration 3 of 10" in said
    assert "Traceback" not in said
    assert left.checkpoint()["iteration"] == 6
    assert_same_run(trained(tree, left.results, *overrides), trained(tree, tmp_path / "whole", *overrides))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_bf16_computes_in_bfloat16_and_keeps_finite_float32_weights(
    precision, dtype, tree, tmp_path, small, monkeypatch
):
    dtypes = {True: set(), False: set()}
    conv2d = torch.nn.functional.conv2d

    def spy(*args, **kwargs):
        y = conv2d(*args, **kwargs)
        dtypes[torch.is_grad_enabled()].add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    monkeypatch.setattr("mbn.training.run.eager_seconds", lambda *_: 1.0)  # it counts the operations of a forward
    overrides = (
        "norm=mbn",
        f"precision={precision}",
        "evaluate.precise=true",
        "evaluate.rules=true",
        "machine.mode=eager",
    )
    run = trained(tree, tmp_path, *overrides)
    # In training; in the second forward, evaluation and all else.
    assert dtypes == {True: {dtype}, False: {dtype}}
    assert run.record()["controls"]["test_error_precise"] in [pytest.approx(100 * k / 9) for k in range(10)]
    assert 0 < run.record()["train_loss"] < 100
    state = run.checkpoint()["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
