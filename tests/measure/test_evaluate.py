"""scripts/evaluate.py: our checkpoints and other people's weights are tested again, and exported for others."""

import contextlib
import errno
import json
import pickle
import re
import subprocess
import sys
import warnings

import jpegs
import numpy as np
import pytest
import torch
import torchvision
from running import Trap, build_small, load_script
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import train
from mbn import config
from mbn.config import REPOSITORY
from mbn.measure.evaluation import batch_size_for, evaluate
from mbn.records import record
from mbn.training import checkpoint_file

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RESULT = re.compile(r"(.*): loss (\d+\.\d{4}), top-1 error (\d+\.\d\d) %, top-5 error (\d+\.\d\d) %")

script = load_script("evaluate")


@pytest.fixture
def measure(capsys):
    """A function that runs the script in this process and returns loss, top-1 and top-5 error as printed."""

    def run(*arguments):
        capsys.readouterr()
        code = script.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return tuple(float(v) for v in RESULT.fullmatch(out.splitlines()[0]).groups()[1:])

    return run


@pytest.fixture
def refusal(capsys):
    """A function that runs the script and returns its error, which is one sentence."""

    def run(*arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # an error would look like a wrong file
            assert script.main([str(a) for a in arguments]) in (1, 2)
        assert caught == []
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: [^\n]{1,490}\.\n", err)
        assert "weights_only" not in err  # torch's advice to run what is in the file
        return err

    return run


# A run of ours.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short finished run on digits: its checkpoint and its record. Only these name the network."""
    results = tmp_path_factory.mktemp("digits")
    arguments = [
        *("dataset=digits", "model=resnet20", "norm=mbn", "batch_size=32", "schedule.iterations=6", "seed=4"),
        *("norm.memory=7", "machine.threads=1", "machine.device=cpu"),
    ]
    return trained(arguments, results)


def trained(arguments, results):
    """What training leaves: the path of the checkpoint, and the record."""
    assert train.main([*arguments, f"machine.results={results}"]) == 0
    (path,) = results.rglob("*records/**/*.json")
    (weights,) = (results / "runs").rglob("checkpoint.pt")
    return weights, record.read(path)


def same_as_record(measured, result):
    assert measured[0] == pytest.approx(result["test_loss"], abs=6e-5)
    assert measured[1:] == pytest.approx((result["test_error"], result["test_error_top5"]), abs=0.006)


def test_a_checkpoint_of_ours_gives_the_errors_of_its_record_and_needs_nothing_beside_it(digits, measure):
    path, result = digits
    measured = measure(path)
    same_as_record(measured, result)
    assert 0 < measured[1] < 100


def test_it_runs_as_a_command_from_anywhere(digits, tmp_path):
    path, result = digits
    command = [sys.executable, REPOSITORY / "scripts" / "evaluate.py", path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    same_as_record([float(v) for v in RESULT.fullmatch(done.stdout.strip()).groups()[1:]], result)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_holds_its_memory(digits):
    state = torch.load(digits[0], weights_only=True)["model"]
    counts = {key: tensor for key, tensor in state.items() if key.endswith("memory_count")}
    assert len(counts) == 19
    # 6 batches of 32 in 7 rows: pixels of the three stages, and one row still empty.
    assert {tuple(count.tolist()) for count in counts.values()} == {
        (*([32.0 * side**2] * 6), 0.0) for side in (32, 16, 8)
    }
    memory = state["bn1.memory_mean"]
    assert memory.shape == (7, 16)
    assert memory[:6].abs().sum(1).min() > 0
    assert not memory[6].any()
    assert len({tuple(row.tolist()) for row in memory}) == 7


def test_evaluation_uses_the_memory_that_a_checkpoint_holds(digits, tmp_path, measure):
    state = checkpoint_file.read(digits[0])
    for key, tensor in state["model"].items():
        if key.endswith("running_mean"):
            tensor.add_(0.5)
    checkpoint_file.save(state, tmp_path / "changed.pt")
    assert measure(tmp_path / "changed.pt")[0] != measure(digits[0])[0]


def test_overrides_beside_a_checkpoint_of_ours_change_what_they_name(digits, measure):
    whole = measure(digits[0])
    assert measure(digits[0], "evaluate.batch_size=7") == pytest.approx(whole, abs=2e-4)
    assert measure(digits[0], "dataset.mean=[0.5,0.5,0.5]")[0] != whole[0]
    assert measure(digits[0], "dataset.std=[0.2,0.3,0.4]")[0] != whole[0]


def test_the_weights_of_a_run_are_exported_with_its_configuration_and_evaluate_to_the_same(digits, tmp_path, measure):
    """The file tells how its weights were trained: batch size, seed, schedule."""
    exported = tmp_path / "model.safetensors"
    whole = measure(digits[0], "--export", exported)
    content = torch.load(digits[0], weights_only=True)
    same_tensors(load_file(exported), content["model"])
    with safe_open(exported, "pt") as file:
        described = json.loads(file.metadata()["config"])
    assert described == config.identity(config.from_dict(json.loads(content["config"])))
    assert (described["batch_size"], described["seed"], described["norm"]["memory"]) == (32, 4, 7)
    assert described["schedule"]["iterations"] == 6
    for group in ("dataset", "model", "norm", "forwards"):
        assert described[group] == digits[1]["config"][group]
    assert str(tmp_path) not in json.dumps(described)
    # The file says all that is needed: no option beside it.
    assert measure(exported) == whole


def same_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# Weights of torchvision's.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return jpegs.make_tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """torchvision's ResNet-18 for three classes, with no layer near the identity, and a file with its state_dict."""
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("theirs") / "resnet18.pth"
    # Without BatchNorm's counters, as torchvision's older files are.
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, path)
    return model, path


def options(tree, *overrides):
    return [
        *("model=resnet18", "dataset=imagenet", "norm=bn", "dataset.image_size=96", *jpegs.NUMBERS),
        *(f"machine.data={tree}", "machine.workers=0", "machine.device=cpu", *overrides),
    ]


def by_hand(model, tree, mean, std, part="val"):
    """torchvision's model on images that torchvision read, and its mean loss and top-1 error."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(110),
            torchvision.transforms.CenterCrop(96),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(mean, std),
        ]
    )
    images, labels = zip(*torchvision.datasets.ImageFolder(tree / part, transform), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    labels = torch.tensor(labels)
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) != labels).float().mean().item()


@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), ([0.5, 0.45, 0.3], STD), (MEAN, [0.1, 0.2, 0.3]), ([0.0] * 3, [1.0] * 3)]
)
def test_torchvisions_weights_give_torchvisions_errors_under_any_normalisation(theirs, tree, mean, std, measure):
    model, path = theirs
    overrides = [] if (mean, std) == (MEAN, STD) else [f"dataset.mean={mean}", f"dataset.std={std}"]
    measured = measure(path, *options(tree, *(o.replace(" ", "") for o in overrides)))
    same_as_by_hand(measured, by_hand(model, tree, mean, std))
    if overrides:  # so that the test tells one normalisation from another
        assert abs(measured[0] - by_hand(model, tree, MEAN, STD)[0]) > 2e-3


def same_as_by_hand(measured, expected):
    assert measured[0] == pytest.approx(expected[0], abs=2e-4)
    assert measured[1:] == pytest.approx((expected[1], 0), abs=0.006)  # no top-5 error of three classes


@pytest.mark.parametrize(
    "setting",
    ["norm.group=4", "batch_size=64", "schedule.lr=[9]", "schedule=imagenet", "++seed=3", "machine.mode=eager"],
)
def test_settings_of_training_are_refused(setting, digits, theirs, tree, refusal):
    key = setting.lstrip("+").partition("=")[0]
    for given in ((digits[0],), (theirs[1], *options(tree))):
        assert f"{key} is for training: leave it out." in refusal(*given, setting)


def test_training_images_are_prepared_as_test_images_are(theirs, tree, measure):
    measured = measure(theirs[1], "--train", *options(tree))
    same_as_by_hand(measured, by_hand(theirs[0], tree, MEAN, STD, "train"))
    assert abs(measured[0] - by_hand(theirs[0], tree, MEAN, STD)[0]) > 2e-3  # so that the test tells one from the other


@pytest.mark.parametrize("norm", ["brn", "mbn"])
def test_torchvisions_weights_serve_the_other_norms_at_test_time(theirs, tree, norm, measure):
    model, path = theirs
    overrides = [o.replace("norm=bn", f"norm={norm}") for o in options(tree)]
    assert measure(path, *overrides)[0] == pytest.approx(by_hand(model, tree, MEAN, STD)[0], abs=2e-4)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_may_lie_inside_a_training_checkpoint_of_others(theirs, tree, key, tmp_path, measure):
    torch.save({key: theirs[0].state_dict(), "epoch": 90}, tmp_path / "checkpoint.pth.tar")
    assert measure(tmp_path / "checkpoint.pth.tar", *options(tree)) == measure(theirs[1], *options(tree))


def test_torchvisions_weights_are_exported_and_evaluate_to_the_same(theirs, tree, tmp_path, measure):
    model, path = theirs
    exported = tmp_path / "resnet18.safetensors"
    whole = measure(path, *options(tree, "dataset.mean=[0.5,0.45,0.3]"), "--export", exported)
    same_tensors(load_file(exported), model.state_dict())
    # Its metadata hold the model and the normalisation, but the user says where the images are.
    assert measure(exported, f"machine.data={tree}", "machine.workers=0") == whole


def test_a_checkpoint_of_ours_on_folders_gives_the_errors_of_its_record(tree, tmp_path, measure, monkeypatch):
    monkeypatch.setattr("models.build", build_small)
    where = [f"machine.data={tree}", "machine.workers=0"]
    arguments = [*jpegs.RUN, "norm=brn", "batch_size=8", "schedule.epochs=1", *where]
    weights, result = trained(arguments, tmp_path)
    same_as_record(measure(weights, *where, "machine.device=cpu"), result)


# What is refused.


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=resnet34"], ["model=resnet34", "norm=bn", "layer"]),  # which weights are missing
        (["dataset.classes=4"], ["4 classes"]),
        (["dataset=cifar10", "dataset.image_size=32"], ["resnet18"]),
        (["epoch=3"], ["epoch"]),
    ],
)
def test_weights_that_do_not_fit_and_wrong_configurations_are_one_sentence(theirs, tree, refusal, overrides, parts):
    message = refusal(theirs[1], *options(tree, *overrides))
    for part in parts:
        assert part in message


def test_a_checkpoint_of_ours_with_another_network_is_one_sentence(digits, refusal):
    message = refusal(digits[0], "model=resnet56")
    assert "model=resnet56" in message
    assert str(digits[0]) in message


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "inside", "ours"])
def test_a_malicious_pickle_runs_nothing(form, digits, tmp_path, refusal):
    mark, path = tmp_path / "ran", tmp_path / "weights.pt"
    evil = Trap(mark)
    if form == "torch":
        torch.save(evil, path)
    elif form == "legacy":
        torch.save({"conv1.weight": evil}, path, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif form == "inside":
        torch.save({"state_dict": {"conv1.weight": torch.zeros(1), "x": evil}}, path)
    else:
        checkpoint_file.save({**checkpoint_file.read(digits[0]), "extra": evil}, path)
    message = refusal(path, "model=resnet18", "dataset=imagenet", "norm=bn")
    assert str(path) in message
    assert not mark.exists()
    # An unsafe reader would have run it.
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert mark.exists()


def text(path):
    path.write_text("<html>404 not found</html>")


def empty(path):
    path.write_bytes(b"")


def zeros(path):
    path.write_bytes(b"\0" * 1000)


def a_list(path):
    torch.save([torch.zeros(3)], path)


def a_tensor(path):
    torch.save(torch.zeros(3), path)


def missing(path):
    pass


def a_pickle(path):
    path.write_bytes(pickle.dumps({"conv1.weight": [0.0]}, protocol=4))


def a_module(path):
    torch.save(nn.Linear(2, 2), path)


def an_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def damaged(path):
    """Bytes at which torch.load raises none of the errors that it names."""
    path.write_bytes(b"\x80\x02\x85.")


def a_number(path):
    torch.save({"conv1.weight": 3, "epoch": 5}, path)


def cut_short(path):
    torch.save({"conv1.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])


NO_WEIGHTS = [missing, text, empty, zeros, a_list, a_tensor, a_number, cut_short, a_pickle, a_module, an_array, damaged]


@pytest.mark.parametrize("content", NO_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_one_sentence(content, suffix, tmp_path, tree, refusal):
    path = tmp_path / f"weights{suffix}"
    content(path)
    assert str(path) in refusal(path, *options(tree))


def test_a_damaged_checkpoint_of_ours_is_one_sentence_that_names_the_one_before(digits, tmp_path, refusal):
    path = tmp_path / "checkpoint.pt"
    content = digits[0].read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # in its checksum
    assert refusal(path) == f"error: {path} is damaged: its checksum is wrong: train again.\n"
    before = tmp_path / "checkpoint.previous.pt"
    before.touch()
    assert refusal(path).endswith(f"its checksum is wrong: use {before}, or train again.\n")


def test_a_file_that_may_not_be_read_is_one_sentence(digits, refusal, monkeypatch):
    def load(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", load)
    assert "make it readable" in refusal(digits[0])


def test_what_would_be_ignored_or_make_a_strange_file_is_refused(digits, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "evaluate.precise and evaluate.rules are for train.py" in refusal(digits[0], "evaluate.precise=true")
    assert "looks like a setting" in refusal(digits[0], "--export", "machine.threads=1")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_written_is_one_sentence(digits, tmp_path, capsys):
    (tmp_path / "no").touch()
    assert script.main([str(digits[0]), "--export", str(tmp_path / "no" / "model.safetensors")]) == 1
    assert re.fullmatch(r"error: cannot write [^\n]*\.\n", capsys.readouterr().err)


def test_an_export_has_the_mode_of_other_files(digits, tmp_path, measure):
    exported, other = tmp_path / "weights" / "model.safetensors", tmp_path / "other"
    measure(digits[0], "--export", exported)
    other.touch()
    assert exported.stat().st_mode == other.stat().st_mode


# mbn.measure.evaluation itself.


def test_loss_and_errors_by_hand():
    """Three batches of different sizes: every image counts the same."""
    logits = torch.randn(11, 7)
    labels = torch.randint(0, 7, (11,))
    batches = [(logits[i:j], labels[i:j]) for i, j in ((0, 5), (5, 10), (10, 11))]
    measured = evaluate(lambda x: x, batches)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels, strict=True)]
    assert measured.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert measured.error == pytest.approx(100 * sum(rank >= 1 for rank in ranks) / 11)
    assert measured.error_top5 == pytest.approx(100 * sum(rank >= 5 for rank in ranks) / 11)
    assert 0 < measured.error_top5 < measured.error


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_top_5_of_few_classes_is_never_wrong_and_no_graph_is_kept(classes):
    logits = torch.randn(6, classes, requires_grad=True)
    grads = []

    def model(x):
        y = 2 * x
        grads.append(y.requires_grad)
        return y

    assert evaluate(model, [(logits, torch.zeros(6, dtype=torch.int64))]).error_top5 == 0
    assert grads == [False]


@pytest.mark.parametrize(
    ("overrides", "device", "size"),
    [
        ("dataset=cifar10", "cpu", 125),
        ("dataset=cifar10", "cuda", 5000),
        ("dataset=imagenet model=resnet50", "cpu", 2),
        ("dataset=imagenet model=resnet50", "cuda", 102),
        ("dataset=imagenet model=vgg16", "cpu", 2),
        ("dataset=imagenet model=vgg16", "mps", 20),
        ("dataset=imagenet model=resnet50 evaluate.batch_size=7", "cuda", 7),
        ("dataset=imagenet model=resnet50 dataset.image_size=4000", "cpu", 1),
    ],
)
def test_how_many_images_are_tested_at_once_follows_their_size_and_the_device(overrides, device, size):
    assert batch_size_for(config.load(overrides.split()), torch.device(device)) == size
