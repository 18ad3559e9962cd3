"""What a run measures of its final weights beside the plain test error, at its end, later, or from a file."""

import itertools
import re

import pytest
import running
import torch
from running import Tiny, load_script, without
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
from mbn.data.datasets import load_data
from mbn.measure.other_rules import LAST_BATCHES, averages_with_momentum, statistics_of_the_test_batch
from mbn.network_layers import from_config
from mbn.records import controls, record
from mbn.system.files import lock
from mbn.system.signals import StopRequest
from mbn.training.trained import Trained

ASKED = ["evaluate.rules=true", "evaluate.precise=true"]


def measured(run):
    return without(run.record()["controls"], ["by"])


def network(run):
    model = Tiny(from_config(run.config), 10)
    model.load_state_dict(run.checkpoint()["model"])
    return model.eval(), load_data(run.config, torch.device("cpu"))


@pytest.mark.parametrize("norm", ["norm=bn", "norm=brn", "norm=mbn", "norm=gn"])
def test_what_is_asked_for_later_completes_the_same_numbers(norm, here, left, whole):
    """One by one, the last one replacing neither; the weights and the rest of the record stay."""
    here(norm)
    before, weights = left(norm).record(), left(norm).checkpoint_path.read_bytes()
    for asked in ASKED:
        assert here(norm, asked).code == 0
    after = left(norm).record()
    assert {key for key in after if after[key] != before[key]} == {"controls", "checksum"}
    assert measured(left(norm)) == measured(whole(norm, *ASKED))
    assert left(norm).checkpoint_path.read_bytes() == weights
    assert (after["controls"]["rules"] is None) == (norm == "norm=gn")
    assert after["controls"]["train_error"] is not None


@pytest.mark.parametrize("code", ["the same", "0" * 64])
def test_what_other_code_has_measured_is_measured_again_with_what_is_asked_for_later(code, here, left, whole):
    """Because `by` names one code for all."""
    here("norm=mbn", "evaluate.precise=true")
    run, found = left("norm=mbn"), left("norm=mbn").record()["controls"]
    changed = {"test_error_precise": 50.0}
    by = found["by"] if code == "the same" else found["by"] | {"code": code}
    record.rewrite(run.record_path, controls=found | changed | {"by": by})
    assert here("norm=mbn", "evaluate.rules=true").code == 0
    assert measured(run) == measured(whole("norm=mbn", *ASKED)) | (changed if code == "the same" else {})
    assert run.record()["controls"]["by"]["code"] == found["by"]["code"]


def test_the_training_error_is_that_of_augmented_images_in_evaluation_mode(whole):
    run = whole("norm=mbn", *ASKED)
    model, data = network(run)
    wrong = torch.cat([model(x).argmax(1) != y for x, y in itertools.islice(data.train_batches(0, 256), 6)])
    assert len(wrong) == 1437
    assert run.record()["controls"]["train_error"] == pytest.approx(100 * wrong.double().mean().item(), abs=1e-9)


def test_rules_have_the_last_batches_of_training_and_test_batches_in_file_order(here, left, monkeypatch):
    given = []

    def spy(model, momentum, train, *more):
        given.append(list(train))
        return averages_with_momentum(model, momentum, given[-1], *more)

    monkeypatch.setattr("mbn.measure.other_rules.averages_with_momentum", spy)
    assert LAST_BATCHES == 100  # as the page of results says
    monkeypatch.setattr("mbn.training.trained.LAST_BATCHES", 3)
    here("norm=bn", *ASKED)
    found, (model, data) = left("norm=bn").record()["controls"]["rules"], network(left("norm=bn"))
    last = list(itertools.islice(data.train_batches(5, 256), 3))
    assert [len(y) for _, y in last] == [157, 256, 256]  # of two epochs
    assert len(given) == 2
    running.assert_same_bits(given, [last] * 2)
    test = list(data.test_batches(360))
    for momentum in (0.9, 1.0):
        expected = averages_with_momentum(model, momentum, last, test)
        assert found[f"averages with momentum {momentum}"] == pytest.approx(expected, abs=1e-9)
    for size in (8, 128, 256):
        expected = statistics_of_the_test_batch(model, data.test_batches(size), False)
        assert found[f"test batch of {size}"] == pytest.approx(expected, abs=1e-9)


def test_processes_share_each_test_batch(whole):
    model, data = network(whole("norm=mbn"))
    data.share = lambda n: slice(n // 2, n)
    trained = Trained(whole("norm=mbn").config, model, data, torch.device("cpu"), StopRequest())
    batches = list(trained._test_in_batches(100))
    assert [len(y) for _, y in batches] == [50, 50, 50, 30]
    assert torch.equal(batches[1][1], data.test_labels[150:200])


# scripts/evaluate.py --rules.


@pytest.fixture
def script(capsys, monkeypatch, tmp_path):
    """A function that runs scripts/evaluate.py with the tiny network: exit code, stdout and stderr."""
    evaluate = load_script("evaluate")
    monkeypatch.setattr(models, "build", running.build_tiny)
    monkeypatch.setattr("mbn.records.provenance.commit_and_dirty", lambda: (running.COMMIT, running.DIRTY))

    def run(path, *arguments):
        capsys.readouterr()
        settings = [f"machine.results={tmp_path / 'results'}", "machine.threads=1", "machine.device=cpu"]
        code = evaluate.main([*map(str, (path, *settings, *arguments))])
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("norm", ["norm=mbn", "norm=gn"])
def test_a_file_gives_the_controls_of_its_run_and_writes_them_into_its_record(
    norm, here, left, whole, script, tmp_path
):
    here(norm)
    before = left(norm).record()
    exported = tmp_path / "weights.safetensors"
    assert script(left(norm).checkpoint_path, "--export", exported)[0] == 0
    code, out, err = script(exported, "--rules")
    assert (code, err, left(norm).record()) == (0, "", before)
    expected = whole(norm, *ASKED).record()["controls"]
    for name, error in (expected["rules"] or {}).items():
        assert f"{error:6.2f} % {name}\n" in out
    assert f"{expected['train_error']:6.2f} % training error in evaluation mode" in out
    assert ("precise statistics" in out) == (norm != "norm=gn")
    assert script(exported, "--rules", "--record")[0] == 0
    after = left(norm).record()
    assert {key for key in after if after[key] != before[key]} == {"controls", "checksum"}
    assert measured(left(norm)) == {key: pytest.approx(expected[key], abs=1e-6) for key in controls.FIELDS}
    assert after["controls"]["by"]["commit"] == running.COMMIT


def test_what_cannot_be_measured_or_written_is_one_sentence(here, left, script, tmp_path):
    here()
    path, plain = left().checkpoint_path, tmp_path / "plain.pth"
    torch.save(left().checkpoint()["model"], plain)
    before = left().record_path.read_bytes()
    for arguments, said in (
        ((path, "--record"), "add --rules"),
        ((path, "--rules", "--train"), "leave out --train"),
        ((path, "--rules", "norm=bn"), "leave out norm=bn"),
        ((plain, "--rules"), "names no run"),
        ((path, "--rules", "--record", f"machine.results={tmp_path / 'nowhere'}"), "there is no "),
    ):
        code, out, err = script(*arguments)
        assert code in (1, 2)
        assert out == ""
        assert said in err
        assert err.startswith("error: ")
    state = left().checkpoint()
    state["model"]["fc.weight"].neg_()
    running.checkpoint_file.save(state, path)
    code, _, err = script(path, "--rules", "--record")
    assert (code, left().record_path.read_bytes()) == (1, before)
    assert "and its record says" in err


def export(script, weights, path):
    assert script(weights, "--export", path)[0] == 0
    return path


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("form", [".pt", ".safetensors"])
def test_only_the_end_of_the_training_that_a_record_is_of_is_measured_for_it(form, here, left, script, tmp_path):
    """Also where the test error is near enough: that of the checkpoint before, and of another training of the run."""
    here("machine.checkpoint_seconds=1e-9")
    earlier = left().folder / "checkpoint.previous.pt"
    assert running.checkpoint_file.read(earlier)["iteration"] == 7
    other = left().folder / "other.pt"
    running.checkpoint_file.save(left().checkpoint() | {"journal": "0" * 64}, other)
    before = left().record_path.read_bytes()
    for weights, said in ((earlier, "does not hold the end of the run"), (other, "another journal")):
        if form == ".safetensors":
            weights, said = export(script, weights, tmp_path / f"{weights.stem}{form}"), "another journal"
        code, out, err = script(weights, "--rules", "--record")
        assert (code, out, left().record_path.read_bytes()) == (1, "", before)
        assert str(weights) in err
        assert said in err


def test_an_export_from_before_it_named_its_journal_is_measured_as_before(here, left, script, tmp_path):
    here()
    path = export(script, left().checkpoint_path, tmp_path / "new.safetensors")
    described = metadata(path)
    assert described.pop("journal") == left().record()["journal"]
    save_file(load_file(path), tmp_path / "old.safetensors", described)
    assert script(tmp_path / "old.safetensors", "--rules", "--record")[0] == 0
    assert left().record()["controls"] is not None


def test_an_export_of_an_export_names_the_same_journal(here, left, script, tmp_path):
    here()
    first = export(script, left().checkpoint_path, tmp_path / "first.safetensors")
    second = export(script, first, tmp_path / "second.safetensors")
    assert metadata(second) == metadata(first)
    assert "journal" in metadata(first)


def test_a_run_that_is_being_trained_gets_no_controls(here, left, script):
    here()
    before = left().record_path.read_bytes()
    with lock(left().folder / "lock"):
        code, out, err = script(left().checkpoint_path, "--rules", "--record")
    assert (code, out) == (76, "")
    assert "is being trained" in err
    assert left().record_path.read_bytes() == before


# scripts/evaluate.py without it.


@pytest.mark.parametrize(
    "more",
    [
        ("norm=bn", "norm.group=2"),
        ("schedule.milestones=[0.5]", "norm.lam=[0.1,0.9]", "schedule.lr=[0.1,0.01]"),
        ("schedule.lr=[0.1]", "schedule.milestones=[0.2,0.4,0.6]", "norm.lam=[0.1,0.2,0.3,0.4]"),
    ],
)
def test_a_checkpoint_of_any_settings_is_tested_and_exported(more, here, left, script, tmp_path):
    assert here(*more).code == 0
    exported = tmp_path / "weights.safetensors"
    printed = []
    for arguments in ((left(*more).checkpoint_path, "--export", exported), (exported,), (exported, "norm.eps=0.5")):
        code, out, err = script(*arguments)
        assert (code, err) == (0, "")
        printed.append(out)
    assert all(f"top-1 error {left(*more).record()['test_error']:.2f} %" in out for out in printed[:2])
    losses = [re.search(r"loss (\d+\.\d+)", out)[1] for out in printed]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "override",
    ["norm.eps=0.5", "norm=brn", "model=resnet56", "precision=bf16", "dataset.mean=[0.5,0.5,0.5]", "++norm.eps=0.5"],
)
def test_an_export_describes_the_run_that_trained_its_weights_and_no_other(override, here, left, script, tmp_path):
    here("norm=bn")
    exported = tmp_path / "weights.safetensors"
    code, out, err = script(left("norm=bn").checkpoint_path, "--export", exported, override)
    assert (code, out, exported.exists()) == (2, "", False)
    assert err.endswith(f"leave out {override}.\n")


@pytest.mark.parametrize("more", [(), ("--rules",)])
def test_threads_and_arithmetic_are_those_that_training_would_use(more, here, left, script, monkeypatch):
    here("norm=gn")
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("mbn.training.execution.set_arithmetic", lambda *given: chosen.append(given))
    code, _, _ = script(left("norm=gn").checkpoint_path, *more, "machine.threads=3", "machine.deterministic=true")
    assert code == 0
    assert chosen == [3, (torch.device("cpu"), True, True)]
