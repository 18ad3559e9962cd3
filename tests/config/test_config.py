"""The configuration: what is refused and how, a run's length, its identity and its name."""

import builtins
import copy
import dataclasses
import functools
import inspect
import io
import json
import os
import pkgutil
import random
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from running import with_new_fields

import models
import train
from mbn import config, methods, network_layers
from mbn.config import CONFIGS, REPOSITORY, ConfigError, from_dict, iterations, load, loading, run_name, to_dict
from mbn.norm.base import norm_layers

# Further settings that some options need, so that every option of every group is tried.
COMPANIONS = {"norm=normprop": ["model=nin"], "dataset=imagenet": ["model=resnet18"]}
COMPANIONS |= {f"model=resnet{depth}": ["dataset=imagenet"] for depth in (18, 34, 50)}
OPTIONS = [f"{group}={option}" for group in config.groups() for option in config.options(group)]
NAMES = {
    "": "cifar10/resnet20/mbn-f2-b128-s0-f8a6b40a",
    "model=resnet56 norm=bn": "cifar10/resnet56/bn-f1-b128-s0-e209a5c2",
    "dataset=digits batch_size=64 norm.gradient=batch seed=3": "digits/resnet20/mbn-f2-b64-s3-0a209aaa",
    "dataset=cifar100 model=nin schedule.iterations=78200 batch_size=8": "cifar100/nin/mbn-f2-b8-s0-1f2a9985",
}


def sentence(message):
    return "\n" not in message and message.endswith(".") and len(message) < 400


def refusal(*overrides):
    """The message with which overrides are refused, which is one sentence."""
    with pytest.raises(ConfigError) as caught:
        load(list(overrides))
    message = str(caught.value)
    assert sentence(message)
    return message


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A function that writes configs/experiment/mine.yaml into a copy of the configurations, and uses the copy."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    monkeypatch.setattr("mbn.config.loading.CONFIGS", folder)
    return lambda text: (folder / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)


# What is refused.


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epoch", "schedule.epochs"),
        ("batchsize", "batch_size"),
        ("lam", "norm.lam"),
        ("schedule.epoch", "schedule.epochs"),
        ("norm.memry", "norm.memory"),
        ("machine.devise", "machine.device"),
        ("optimizer.lr", "schedule.lr"),
        ("optimizer.nesterov", ""),
        ("colour", ""),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_key_is_named(plus, key, meant):
    message = refusal(f"{plus}{key}=3")
    assert key in message
    assert meant in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batchsize: 3\n", "batchsize"),
        ("schedule:\n  epoch: 3\n", "schedule.epoch"),
        ("norm:\n  memry: 3\n", "norm.memry"),
        ("machine:\n  deep:\n    er: 3\n", "machine.deep"),
        ("norm:\n  decay: 2\n", "norm.decay must be above 0 and at most 1"),
    ],
)
def test_an_unknown_key_or_an_impossible_value_in_an_experiment_file_is_refused(experiment, text, says):
    experiment(text)
    assert says in refusal("experiment=mine")


def test_a_path_in_an_experiment_file_may_begin_with_home(experiment, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    experiment("machine:\n  data: ~/sets\n  results: a/~\n")
    machine = load(["experiment=mine"]).machine
    assert (machine.data, machine.results) == ("/home/me/sets", "a/~")


def test_a_good_experiment_file_is_read_and_the_command_line_wins(experiment):
    experiment("defaults:\n  - override /norm: bn\nseed: 5\nbatch_size: 7\n")
    c = load(["experiment=mine", "seed=6"])
    assert (c.norm.name, c.forwards, c.seed, c.batch_size) == ("bn", 1, 6, 7)


def cases(table):
    """Pairs (override, what is wanted) of a table {what is wanted: overrides}."""
    return [(override, wanted) for wanted, overrides in table.items() for override in overrides.split()]


WRONG_TYPES = {
    "a whole number": "batch_size=abc batch_size=1.5 batch_size=true batch_size=null seed=1e3 forwards=[1]",
    "a number": "norm.decay=much schedule.scale=abc optimizer.momentum={a:1}",
    "a list of numbers": "norm.lam=0.5 norm.lam=[abc] norm.lam=[null] schedule.lr=0.1 schedule.lr=[[0.1]]",
    "a whole number or null": "schedule.epochs=2.5 norm.group=2.5",
    "true or false": "machine.again=maybe",
    "a text": "machine.device=null",
    "a group of settings": "optimizer=3",
}
IMPOSSIBLE = {
    "from 1 to the 50000 training images": "batch_size=0 batch_size=50001",
    "at least 1": "norm.memory=0 norm.group=0 norm.group=-2 schedule.epochs=0 schedule.iterations=-1 "
    "schedule.default_epochs=0 evaluate.batch_size=0 machine.threads=0 machine.together=0 "
    "dataset.classes=0 dataset.image_size=0 dataset.train_images=0 dataset.test_images=0",
    "at least 0": "optimizer.weight_decay=-1 optimizer.warmup=-1 dataset.padding=-1 machine.workers=-1",
    "above 0": "norm.eps=0 schedule.milestones=[0,0.4] schedule.lr=[0.1,0,0.1] schedule.lr=[inf] schedule.scale=0 "
    "machine.checkpoint_seconds=0 dataset.std=[0,1,1]",
    "below 1": "schedule.milestones=[0.4,1] optimizer.momentum=1",
    "above 0 and at most 1": "norm.decay=0 norm.decay=1.01 norm.decay=nan",
    "from 0 to 1": "norm.lam=[-0.1] norm.lam=[0.1,0.5,1.1] norm.lam=[nan]",
    "null or a number that divides batch_size=128": "norm.group=3 norm.group=256",
    "1 or 3": "norm.lam=[0.1,0.5] norm.lam=[] schedule.lr=[0.1,0.01]",
    "3 numbers": "dataset.mean=[0.5]",
    "rises": "schedule.milestones=[0.6,0.4] schedule.milestones=[0.4,0.4]",
    "from 0": "seed=-1",
    "1 or 2": "forwards=3 forwards=0",
    "paper or batch": "norm.gradient=both",
    "ones or uniform": "model.gamma=zeros",
    "the path of a folder": "machine.data='' machine.results=''",
    "auto, cpu, cuda, cuda:N or mps": "machine.device=gpu",
    "auto, eager, compile": "machine.mode=fast",
}


@pytest.mark.parametrize(("override", "wanted"), cases(WRONG_TYPES))
def test_a_wrong_type_is_refused(override, wanted):
    message = refusal(override)
    assert message.startswith(override.partition("=")[0])
    assert wanted in message


@pytest.mark.parametrize(("override", "wanted"), cases(IMPOSSIBLE))
def test_an_impossible_value_is_refused_with_what_would_be_right(override, wanted):
    """The value is put directly into the configuration: composing takes a tenth of a second."""
    key, _, text = override.partition("=")
    plain = node = to_dict(load_once())
    *groups, last = key.split(".")
    for group in groups:
        node = node[group]
    assert last in node
    node[last] = yaml.safe_load(text.replace("nan", ".nan").replace("inf", ".inf"))
    with pytest.raises(ConfigError) as caught:
        from_dict(plain)
    message = str(caught.value)
    assert message.startswith(key)
    assert wanted in message
    assert sentence(message)


@pytest.mark.parametrize("norm", ["bn", "mbn", "brn"])
def test_groups_of_images_are_part_of_the_name_and_null_is_none(norm):
    names = [run_name(load_once(f"norm={norm}", *group)) for group in ([], ["norm.group=null"], ["norm.group=128"])]
    assert names[0] == names[1] != names[2]


def test_a_batch_larger_than_the_chosen_data_set_is_refused():
    assert load(["dataset=digits", "batch_size=1437"]).batch_size == 1437
    assert "1437 training images of digits" in refusal("dataset=digits", "batch_size=1438")


@pytest.mark.parametrize("side", [28, 64])
@pytest.mark.parametrize("model", ["nin", "vgg16"])
def test_images_that_a_network_cannot_take_are_refused_with_networks_that_can(model, side):
    message = refusal("dataset=digits", f"dataset.image_size={side}", f"model={model}")
    assert f"resnet20, resnet56 for images of {side} pixels a side (dataset=digits), not '{model}'" in message


def test_both_epochs_and_iterations_are_refused():
    message = refusal("schedule.epochs=3", "schedule.iterations=300")
    assert "schedule.epochs and schedule.iterations" in message
    assert "null" in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["norm=bnn"], ["norm=bnn", "bn", "mbn"]),
        (["dataset=mnist"], ["dataset=mnist", "cifar10", "digits"]),
        (["model=resnet21"], ["model=resnet21", "resnet20"]),
        (["experiment=quick"], ["experiment=quick", "quickstart"]),
        (["norm=bn", "norm.memory=3"], ["norm.memory", "norm=mbn"]),
        (["model.dropout=0.3"], ["model.dropout", "model=nin"]),
        (["+seed=3"], ["seed", "without the plus"]),
        (["~seed"], ["seed", "cannot be deleted"]),
        (["norm.name=bn"], ["norm.name is set with what belongs to it: write norm=bn"]),
        (["+model.name=vgg16"], ["write model=vgg16"]),
        (["~norm"], ["norm"]),
        (["hydra.verbose=true"], ["hydra.verbose"]),
        (["++norm=bn"], ["norm=bn"]),
        (["seed"], ["seed", "key=value"]),
        (["norm.lam=[0.1"], ["norm.lam", "key=[1,2]"]),
        (["batch_size=${nothing}"], ["nothing"]),
        (["norm=bn,mbn"], ["norm=bn,mbn", "-m"]),
        (["seed=range(3)"], ["seed=range(3)", "-m"]),
    ],
)
def test_what_cannot_be_composed_is_refused_in_one_sentence(overrides, named):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in named)


def test_experiment_null_means_no_experiment():
    assert load(["experiment=null"]) == load([])


@pytest.fixture
def command(tmp_path):
    """Runs train.py as a process in which importing torch fails, with all its folders in a temporary one."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise ImportError('torch was imported')\n")
    (tmp_path / "here").mkdir()

    def run(*arguments):
        places = [f"machine.results={tmp_path}/results", f"machine.data={tmp_path}/data"]
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "train.py"), *arguments, *places],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "blocked")},
            cwd=tmp_path / "here",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["blocked", "here"]
        assert list((tmp_path / "here").iterdir()) == []
        return done

    return run


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["dataset=digits", "epochs=3"], "epochs"),
        (["dataset=digits", "batch_size=abc"], "batch_size"),
        (["dataset=digits", "forwards=3"], "forwards"),
        (["-m", "dataset=digits", "forwards=3"], "forwards"),
        (["-m", "dataset=digits", "epochs=3,4"], "epochs"),
        (["-m", "dataset=digits", "+epochs=3,4"], "epochs"),
        (["-m", "dataset=digits", "forwards=1,2,3"], "forwards"),
        (["--nonsense", "dataset=digits"], "--nonsense"),
    ],
)
def test_a_wrong_command_ends_in_one_line_without_a_traceback_torch_or_a_file(command, arguments, key):
    done = command(*arguments)
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert key in done.stderr


def test_a_right_command_gets_as_far_as_torch(command):
    """Otherwise the tests above could pass because no command ever gets as far as torch."""
    done = command("dataset=digits")
    assert done.returncode != 0
    assert "torch was imported" in done.stderr


# What composes.


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option):
    group, _, name = option.partition("=")
    c = load([option, *COMPANIONS.get(option, [])])
    if group in ("dataset", "model", "norm"):
        assert getattr(c, group).name == name


@pytest.mark.parametrize(("dataset", "epochs"), [("cifar100", 200), ("digits", 20), ("imagenet", 90)])
def test_a_data_set_has_its_own_schedule_or_the_papers(dataset, epochs):
    schedule = load([f"dataset={dataset}", *COMPANIONS.get(f"dataset={dataset}", [])]).schedule
    assert (schedule.default_epochs, schedule.lr) == (epochs, [0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm", "bn"), ("dataset", "cifar10"), ("model", "nin"), ("norm.gradient", "batch"), ("forwards", 1)],
)
def test_the_quickstart_can_be_overridden(key, value):
    def of(config):
        found = functools.reduce(getattr, key.split("."), config)
        return getattr(found, "name", found)

    assert of(load(["experiment=quickstart"])) != value
    assert of(load(["experiment=quickstart", f"{key}={value}"])) == value


@pytest.mark.parametrize("group", loading.REGISTRIES)
def test_a_file_without_its_entry_and_an_entry_without_its_file_are_refused(experiment, group):
    table, home = loading.REGISTRIES[group]
    assert sorted(table) == config.options(group)
    known = next(iter(table))
    path = loading.CONFIGS / group / f"{known}.yaml"
    path.with_name("new.yaml").write_text(path.read_text().replace(f"name: {known}", "name: new"))
    path.unlink()
    assert refusal(f"{group}=new") == f"configs/{group}/new.yaml is there, but {home} lacks it: add an entry."
    assert f"{group}={known} does not exist" in refusal(f"{group}={known}")
    experiment(f"defaults:\n  - override /{group}: new\n")
    assert home in refusal("experiment=mine")


@pytest.mark.parametrize("name", config.options("model"))
def test_a_network_takes_every_setting_that_the_configuration_has_for_it(name):
    network = config.NETWORKS[name]
    settings = {f.name for f in dataclasses.fields(network.settings)} - {"name", "gamma"}  # which `models.build` takes
    builders = [path for path in (network.small, network.large) if path]
    assert builders
    for path in builders:
        builder = pkgutil.resolve_name(f"models.{path.replace('.', ':')}")
        assert settings <= set(inspect.signature(builder).parameters)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_has_statistics_of_batches_where_the_registry_says_so(name):
    c = load([f"norm={name}", "model=nin"])
    assert bool(norm_layers(models.build(layers=network_layers.from_config(c), **config.network(c)))) == (
        methods.METHODS[name].statistics
    )


@pytest.mark.parametrize("name", config.options("norm"))
def test_a_norm_takes_every_setting_that_the_configuration_has_for_it_with_the_same_default(name):
    fields = {f.name: f.default for f in dataclasses.fields(methods.METHODS[name].settings)}
    del fields["name"]
    parameters = dict(inspect.signature(getattr(network_layers, name)).parameters)
    del parameters["forwards"]
    fields.pop("lam", None)  # a list in the configuration, the number in force in the layer
    parameters.pop("lam", None)
    assert fields == {key: p.default for key, p in parameters.items()}


@pytest.mark.parametrize(("norm", "forwards"), [("mbn", 2), ("bn", 1)])
def test_forwards_follows_the_norm_unless_it_is_given(norm, forwards):
    assert load([f"norm={norm}"]).forwards == forwards
    for given in (1, 2):
        assert load([f"norm={norm}", f"forwards={given}"]).forwards == given
        assert load([f"forwards={given}", f"norm={norm}"]).forwards == given


def test_the_defaults_are_the_papers_run():
    c = load(["dataset=cifar10", "model=resnet56", "norm=mbn"])
    assert (c.forwards, c.norm.lam, c.norm.gradient) == (2, [0.1, 0.5, 0.9], "paper")
    assert (c.norm.memory, c.norm.decay, c.norm.eps) == (20, 0.9, 1e-5)
    assert (c.schedule.lr, c.schedule.milestones) == ([0.1, 0.01, 0.001], [0.4, 0.6])
    assert (c.optimizer.momentum, c.optimizer.weight_decay) == (0.9, 1e-4)
    assert (c.batch_size, c.seed, iterations(c)) == (128, 0, 78200)
    assert (c.dataset.padding, c.dataset.flip) == (4, True)
    assert (c.dataset.mean, c.dataset.std) == ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    other = load(["dataset=cifar100"]).dataset
    assert (other.mean, other.std) == ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])
    assert (other.classes, load(["dataset=digits"]).dataset.flip) == (100, False)


def test_cfg_shows_every_setting_on_a_line_of_its_own(capsys):
    assert train.main(["--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    plain = yaml.safe_load(shown)
    groups = sum(isinstance(v, dict) for v in plain.values())
    assert len(shown.strip().splitlines()) == len(list(leaves(plain))) + groups
    assert plain == to_dict(load([]))


@pytest.mark.parametrize("order", ["--cfg job {}", "-c {}", "{} --cfg job"])
def test_cfg_shows_what_the_rest_of_the_command_sets(order, capsys):
    overrides = "norm=bn dataset=digits seed=4"
    assert train.main(order.format(overrides).split()) == 0
    assert yaml.safe_load(capsys.readouterr().out) == to_dict(load(overrides.split()))


def test_a_sweep_is_all_combinations_in_order():
    assert config.sweep_lines(["norm=bn,mbn", "dataset=digits", "seed=range(0,3)", "norm.lam=[0.1],[0.9]"]) == [
        [f"norm={norm}", "dataset=digits", f"seed={seed}", f"norm.lam=[{lam}]"]
        for norm in ("bn", "mbn")
        for seed in (0, 1, 2)
        for lam in (0.1, 0.9)
    ]


# Lengths.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 391 * 200),
        (["batch_size=100"], 500 * 200),
        (["schedule.epochs=20"], 391 * 20),
        (["schedule.iterations=1000"], 1000),
        (["schedule.scale=0.1"], 7820),
        (["schedule.scale=0.3"], 23460),
        (["schedule.scale=2", "schedule.iterations=1000"], 2000),
        (["schedule.scale=0.07", "schedule.epochs=100"], 2737),
        (["schedule.scale=1e-9"], 1),
        (["batch_size=8", "schedule.iterations=78200"], 78200),
        (["batch_size=50000", "schedule.epochs=2"], 2),
        (["dataset=digits", "batch_size=64"], 23 * 20),
        (["dataset=digits", "batch_size=1437"], 20),
    ],
)
def test_length(overrides, expected):
    assert iterations(load(overrides)) == expected


@pytest.mark.parametrize("percent", range(1, 100))
def test_scale_is_exact_in_the_decimals_that_were_typed(percent):
    """0.29 * 100 is 28.999999999999996: the length must be exactly 29 % of 78200."""
    plain = to_dict(load_once())
    plain["schedule"]["scale"] = percent / 100
    assert iterations(from_dict(plain)) == 782 * percent


_loaded = {}


def load_once(*overrides):
    """load, remembered: composing takes a tenth of a second."""
    if overrides not in _loaded:
        _loaded[overrides] = load(list(overrides))
    return copy.deepcopy(_loaded[overrides])


# Identity and name.


@pytest.mark.parametrize("overrides", NAMES)
def test_names_are_those_of_the_first_version(overrides):
    """A changed name orphans every record. So a new setting's default in the schema must change no run."""
    assert run_name(load(overrides.split())) == NAMES[overrides]


def test_the_name_is_the_same_however_the_length_is_given():
    same = [
        ["schedule.epochs=20"],
        ["schedule.iterations=7820"],
        ["schedule.scale=0.1"],
        ["schedule.default_epochs=20"],
        ["schedule.epochs=10", "schedule.scale=2"],
        ["schedule.iterations=782", "schedule.scale=10", "schedule.default_epochs=3"],
    ]
    assert len({run_name(load(overrides)) for overrides in same}) == 1
    assert run_name(load(["schedule.iterations=7821"])) != run_name(load(["schedule.iterations=7820"]))


OTHER_TEXTS = {
    "evaluate.batch_size": 500,
    "dataset.name": "cifar100",
    "model.gamma": "uniform",
    "norm.gradient": "batch",
    "norm.group": 2,
    "precision": "bf16",
    "machine.data": "/x",
    "machine.results": "/y",
    "machine.device": "cpu",
    "machine.mode": "eager",
    "machine.threads": 3,
    "machine.workers": 3,
    "schedule.epochs": 7,
    "schedule.iterations": 11,
}


def leaves(plain, prefix=""):
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(key, value):
    """Another possible value of a setting."""
    if key in OTHER_TEXTS:
        return OTHER_TEXTS[key]
    if key == "forwards":
        return 3 - value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    if isinstance(value, list):
        return [v / 2 for v in value]
    raise AssertionError(f"add to OTHER_TEXTS what else {key} can be")


BASES = [("model=nin",), ("model=vgg16", "norm=bn")] + [
    (f"norm={name}", "model=nin") for name in config.options("norm") if name not in ("bn", "mbn")
]


@pytest.mark.parametrize("base", BASES, ids=" ".join)
def test_the_name_changes_with_every_setting_except_those_of_machine_and_evaluate(base):
    plain = to_dict(load_once(*base))
    before = run_name(from_dict(plain))
    names = [before]
    for key, value in leaves(plain):
        if key in ("model.name", "norm.name"):  # the next test's
            continue
        if key == "model.gamma" and not methods.METHODS[plain["norm"]["name"]].gamma:
            continue
        other = copy.deepcopy(plain)
        group, _, last = key.rpartition(".")
        (other[group] if group else other)[last] = changed(key, value)
        name = run_name(from_dict(other))
        if group in ("machine", "evaluate"):
            assert name == before, key
        else:
            assert name not in names, key
            names.append(name)


def test_models_and_norms_have_names_of_their_own():
    names = [run_name(load_once(f"norm={n}", f"model={m}")) for m in ("nin", "vgg16") for n in config.options("norm")]
    assert len(set(names)) == len(names)


@dataclasses.dataclass
class NewGroup:
    knob: float = 0.25


@pytest.mark.parametrize("cls", [NewGroup, methods.MBN, config.Model, config.Dataset, config.Optimizer], ids=str)
def test_a_new_setting_or_group_at_its_neutral_default_changes_no_name(cls, monkeypatch):
    c = load_once()
    before = run_name(c)
    group = next((f.name for f in dataclasses.fields(c) if isinstance(getattr(c, f.name), cls)), "augment")
    old = getattr(c, group, NewGroup())
    newer = cls if cls is NewGroup else with_new_fields(type(old), ("knob", float, dataclasses.field(default=0.25)))
    schema = with_new_fields(config.Config, (group, newer, dataclasses.field(default_factory=newer)))
    monkeypatch.setattr("mbn.config.run_identity.Config", schema)
    c = schema(**vars(c) | {group: newer(**vars(old))})
    assert run_name(c) == before
    getattr(c, group).knob = 0.5
    assert run_name(c) != before


def test_a_configuration_survives_its_dictionary():
    for base in BASES:
        c = load_once(*base)
        assert from_dict(to_dict(c)) == c


def test_a_setting_absent_from_a_dictionary_is_at_the_schemas_default():
    """So that a record written before a setting existed is read, and keeps its name."""
    plain = to_dict(load_once())
    del plain["norm"]["eps"], plain["seed"], plain["evaluate"]
    assert run_name(from_dict(plain)) == run_name(load_once())


# Typing errors: every one-letter deletion, doubling and swap in every key.


def typos():
    """(further overrides, wrong key, value) for every key of every configuration and every slip that is not a key."""
    homes = {}
    for base in [(), *BASES]:
        plain = to_dict(load_once(*base))
        for key, value in leaves(plain):
            homes.setdefault(key, (base, value))
        for group in config.groups():
            if group != "experiment":
                homes.setdefault(group, ((), plain[group].get("name", plain["dataset"]["name"])))
    homes["experiment"] = ((), "quickstart")
    valid = {*homes, *(key.rpartition(".")[0] for key in homes)}
    slips = {}
    for key, (base, value) in homes.items():
        for i in range(len(key)):
            before, letter, behind = key[:i], key[i], key[i + 1 :]
            wrong = {before + behind, before + 2 * letter + behind, before + behind[:1] + letter + behind[1:]}
            for slip in sorted(wrong - valid):
                slips[slip] = (base, slip, value)
    return list(slips.values())


def text_of(value):
    """A setting's value as it is typed."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def as_file(key, value):
    """An experiment file that sets a key, as nested mappings."""
    lines = [f"{'  ' * depth}{json.dumps(part)}:" for depth, part in enumerate(key.split("."))]
    return "\n".join(lines) + f" {json.dumps(value)}\n"


def refused(*overrides):
    try:
        load(list(overrides))
    except ConfigError as error:
        return "\n" not in str(error)
    return False


def typed(slips):
    """The slips that are accepted on a command line, plain or with a plus; there should be none."""
    return [
        f"{plus}{key}"
        for base, key, value in slips
        for plus in ("", "+")
        if not refused(*base, f"{plus}{key}={text_of(value)}")
    ]


def filed(slips, experiment):
    """The slips that are accepted in an experiment file; there should be none."""
    accepted = []
    for base, key, value in slips:
        experiment(as_file(key, value))
        if not refused("experiment=mine", *base):
            accepted.append(key)
    return accepted


def test_a_key_without_its_slip_is_accepted(experiment):
    """Otherwise all could be refused for their values, or for a file that cannot be read."""
    for base in [(), *BASES]:
        keys = dict(leaves(to_dict(load_once(*base))))
        chosen = dict(random.Random(len(keys)).sample(sorted(keys.items()), 2))
        chosen = {key: value for key, value in chosen.items() if key not in ("norm.name", "model.name", "dataset.name")}
        for key, value in chosen.items():
            load([*base, f"{key}={text_of(value)}"])
            experiment(as_file(key, value))
            load(["experiment=mine", *base])


def test_slips_on_a_command_line_are_refused():
    assert typed(random.Random(0).sample(typos(), 300)) == []


def test_slips_in_an_experiment_file_are_refused(experiment):
    assert filed(random.Random(1).sample(typos(), 8), experiment) == []


@pytest.mark.long("7", "One-letter slips of every key on a command line, plain and with a plus, that were refused")
def test_every_slip_on_a_command_line(count, figure):
    slips = typos()
    slips = random.Random(2).sample(slips, count(len(slips)))
    accepted = typed(slips)
    figure(2 * len(slips) - len(accepted), 2 * len(slips), ", ".join(accepted))


@pytest.mark.long("7", "One-letter slips of every key in an experiment file that were refused")
def test_every_slip_in_a_file(experiment, count, figure):
    slips = typos()
    slips = random.Random(2).sample(slips, count(len(slips)))
    accepted = filed(slips, experiment)
    figure(len(slips) - len(accepted), len(slips), ", ".join(accepted))


@pytest.mark.long("7", "Slips as real commands: one line, exit code 2, without torch, a traceback or a file")
def test_fifty_slips_as_commands(command, count, figure):
    slips = random.Random(3).sample(typos(), count(50))
    right = 0
    for number, (base, key, value) in enumerate(slips):
        done = command(*base, f"{'+' * (number % 2)}{key}={text_of(value)}")
        right += done.returncode == 2 and not done.stdout and re.fullmatch(r"error: [^\n]*\n", done.stderr) is not None
    figure(right, len(slips))


@pytest.mark.parametrize(
    ("limit", "processors"), [("200000 100000", 2), ("150000 100000", 2), ("10 100000", 1), ("max 100000", 64)]
)
def test_a_container_s_limit_on_processors_counts(monkeypatch, limit, processors):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    file, is_there = builtins.open, os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path == "/sys/fs/cgroup/cpu.max" or is_there(path))
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *args, **more: io.StringIO(limit) if "cpu.max" in str(path) else file(path, *args, **more),
    )
    assert config.cores() == processors
