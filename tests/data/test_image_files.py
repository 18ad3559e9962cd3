"""What is opened as an image, and how: formats, modes, extreme shapes and sizes, and files that are none of ours."""

import errno
import io
import os
import re
import types
from pathlib import Path

import jpegs
import numpy as np
import pytest
import torchvision.transforms.v2.functional as TF
from jpegs import CLASSES, described, opened
from PIL import Image, PngImagePlugin

from mbn.data import image_folder
from mbn.data.image_folder import LONGEST, Decoder, Files, decode, list_images, middle, open_folders
from mbn.system.errors import UserError


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photograph(mode="RGB"):
    return Image.fromarray(jpegs.photographs()[0][:60, :90]).convert(mode)


def read(folder, content, name="x.JPEG"):
    """The image as it is tested, from a file with that content."""
    (folder / name).write_bytes(content)
    return Decoder(Files(folder, [name], [0], [len(content)]), 32, False, 0)[None, 0][0]


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which training never did
    return exif.tobytes()


OPENED = {
    **{f"JPEG {mode}": encoded(photograph(mode), "JPEG") for mode in ("RGB", "L", "CMYK", "YCbCr")},
    **{f"PNG {mode}": encoded(photograph(mode), "PNG") for mode in ("RGB", "L", "LA", "RGBA", "P", "1")},
    "PNG with a transparent colour": encoded(photograph("P"), "PNG", transparency=3),
    "PNG with transparency by colour": encoded(photograph("P"), "PNG", transparency=bytes(range(200))),
    "JPEG progressive, with EXIF": encoded(photograph(), "JPEG", progressive=True, exif=rotated()),
    "several images in a JPEG": encoded(photograph(), "MPO", save_all=True, append_images=[photograph()]),
    "WEBP": encoded(photograph(), "WEBP"),
    "BMP": encoded(photograph(), "BMP"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", OPENED)
def test_images_of_four_formats_are_opened_whatever_their_name_with_the_values_that_pillow_gives(kind, tmp_path):
    image = Image.open(io.BytesIO(OPENED[kind])).convert("RGB")
    assert np.array_equal(decode(OPENED[kind]), image)
    expected = TF.center_crop(TF.resize(image, [37], antialias=True), [32])
    assert np.array_equal(read(tmp_path, OPENED[kind]), expected)


@pytest.mark.parametrize("form", ["EPS", "TIFF", "GIF", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_refused_and_start_no_program(form, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *args, **_: started.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(
        UserError, match=r"x\.jpeg cannot be decoded \(it is not a JPEG, PNG, WebP or BMP\): restore it,"
    ):
        read(tmp_path, encoded(photograph(), form), "x.jpeg")
    assert started == []


def test_of_16_bits_of_grey_the_upper_8_are_taken():
    grey = np.arange(0, 65536, 11, dtype=np.uint16)[: 60 * 90].reshape(60, 90)
    image = np.asarray(decode(encoded(Image.fromarray(grey), "PNG")))
    assert image.shape == (60, 90, 3)
    assert (image == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize(("width", "height"), [(40, 30), (100, 100)])
def test_more_pixels_than_pillow_thinks_safe_are_refused(width, height, tmp_path, monkeypatch):
    """Where Pillow would only warn, and where it raises an error."""
    content = encoded(Image.new("RGB", (width, height)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"cannot be decoded \(it has more than 1,000 pixels\)"):
        read(tmp_path, content)


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (3, 301), (101, 1)])
def test_only_the_middle_of_a_strip_is_resized(size, monkeypatch):
    """Whole, an image of 1 x 20000 pixels takes 5 GB."""
    resized, resize = [], TF.resize
    monkeypatch.setattr(
        TF, "resize", lambda image, *args, **kwargs: resized.append(image) or resize(image, *args, **kwargs)
    )
    shade = np.linspace(0, 255, max(size)).astype(np.uint8)
    strip = Image.fromarray(shade[None] if size[0] > size[1] else shade[:, None]).resize(size).convert("RGB")
    values = np.asarray(middle(strip, 32))
    assert values.shape == (32, 32, 3)
    assert abs(values.astype(int) - 127).max() <= 3
    assert max(resized[0].size) <= LONGEST * min(resized[0].size)


@pytest.mark.parametrize("size", [(7, 690), (690, 7), (1, 100), (60, 37), (37, 37)])
def test_other_images_are_resized_whole(size):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8))
    assert np.array_equal(middle(image, 32), TF.center_crop(TF.resize(image, [37], antialias=True), [32]))


def test_whatever_a_parser_raises_is_one_sentence(tmp_path, monkeypatch):
    for error in (KeyError("x"), IndexError("list index out of range"), RecursionError(), OverflowError("big.")):
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_, raised=error: (_ for _ in ()).throw(raised))
        with pytest.raises(UserError) as caught:
            read(tmp_path, OPENED["PNG RGB"])
        assert re.fullmatch(r"\S*x\.JPEG cannot be decoded \([^.]+\): restore it[^\n]*\.", str(caught.value))


@pytest.fixture
def disk(monkeypatch):
    """A function that lets a file be read only after so many errors with this number; the pauses in between."""
    pauses = []
    monkeypatch.setattr(image_folder, "time", types.SimpleNamespace(sleep=pauses.append))

    def fails(number, times):
        left = [OSError(number, os.strerror(number))] * times

        def opened(path, mode):
            if left:
                raise left.pop()
            return Path(path).open(mode)

        monkeypatch.setattr(image_folder, "open", opened, raising=False)
        return pauses

    return fails


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE"])
def test_an_image_that_cannot_be_read_for_a_moment_is_read_again(name, tmp_path, disk):
    pauses = disk(getattr(errno, name), 3)
    assert read(tmp_path, OPENED["PNG RGB"]).shape == (32, 32, 3)
    assert pauses == [1, 5, 20]


@pytest.mark.parametrize(("name", "tries"), [("ESTALE", 3), ("ENOENT", 0), ("EACCES", 0)])
def test_an_image_that_cannot_be_read_is_not_called_damaged(name, tries, tmp_path, disk):
    pauses = disk(getattr(errno, name), 4)
    with pytest.raises(UserError, match=r"^cannot use \S*x\.JPEG \([^.]+\): [^.]* and run the command again\.$"):
        read(tmp_path, OPENED["PNG RGB"])
    assert len(pauses) == tries


# Names.


def test_a_damaged_file_is_named_without_control_characters(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, b"damaged", "a\x1b[2J\n.jpeg")
    assert str(caught.value).startswith(f"{tmp_path}/a\\x1b[2J\\n.jpeg cannot be decoded (")


def test_hidden_files_are_left_out_and_said_once(copied, capsys):
    """macOS writes ._x.JPEG beside x.JPEG on disks of other systems."""
    before = [files.text.tobytes() for files in open_folders(described(), copied)]
    assert capsys.readouterr().err == ""
    for part, name in (("train", "._a.JPEG"), ("train", ".b.png"), ("val", "._\x1b[2Jc.JPEG"), ("train", ".DS_Store")):
        (copied / part / CLASSES[0] / name).write_bytes(b"\0\5\x16\7")
    (copied / "train" / ".ipynb_checkpoints").mkdir()
    assert [files.text.tobytes() for files in open_folders(described(), copied)] == before
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: 4 hidden files are left out, such as \S*/train/\.ipynb_checkpoints\.\n", said)


def test_only_regular_files_and_links_to_them_are_images(tmp_path):
    """A pipe would be waited for without end."""
    (tmp_path / "folder.jpeg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpeg")
    (tmp_path / "a.jpeg").write_bytes(b"123")
    (tmp_path / "b.jpeg").symlink_to("a.jpeg")
    (tmp_path / "zero.jpeg").symlink_to("/dev/zero")
    assert list_images(tmp_path)[:2] == (["a.jpeg", "b.jpeg"], [3, 3])


def test_what_cannot_be_listed_is_one_sentence(copied):
    (copied / "train" / CLASSES[0] / "link.jpeg").symlink_to("nothing")
    with pytest.raises(
        UserError, match=r"^cannot read \S*link\.jpeg \(No such file or directory\): restore it [^.]*\.$"
    ):
        open_folders(described(), copied)


# The fingerprint.


def exchange(a, b):
    a.rename(a.with_name("between"))
    b.rename(a)
    a.with_name("between").rename(b)


def exchange_classes(train):
    exchange(train / CLASSES[0], train / CLASSES[1])


def move_to_another_class(train):
    (train / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").rename(train / CLASSES[1] / "moved.JPEG")


def rename(train):
    (train / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").rename(train / CLASSES[0] / f"{CLASSES[0]}_0.jpeg")


def lengthen(train):
    with (train / CLASSES[2] / f"{CLASSES[2]}_0.JPEG").open("ab") as file:
        file.write(b"\0")


def rename_class(train):
    for part in ("train", "val"):
        (train.parent / part / CLASSES[2]).rename(train.parent / part / "z")


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change", [exchange_classes, rename, lengthen, rename_class])
def test_another_path_size_or_label_is_another_fingerprint(change, part, copied):
    before = opened(copied).fingerprint
    change(copied / part)
    assert opened(copied).fingerprint != before


def test_the_fingerprint_is_the_same_in_any_folder_and_for_any_run(tree, copied):
    assert re.fullmatch("[0-9a-f]{64}", opened(tree).fingerprint)
    assert opened(copied, workers=2, seed=5, flip=False, image_size=32).fingerprint == opened(tree).fingerprint
