"""What a run measures of its final weights beside the plain test error, at its end, later, or from a file."""

import itertools

import pytest
import running
import torch
from running import Tiny, load_script, without

import models
from mbn.data.datasets import load_data
from mbn.measure.other_rules import averages_with_momentum, statistics_of_the_test_batch
from mbn.network_layers import from_config
from mbn.records import controls
from mbn.system.signals import StopRequest
from mbn.training.controls import Trained

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
    monkeypatch.setattr("mbn.training.controls.LAST", 3)
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


def test_processes_share_each_test_batch_and_put_their_share_back(whole):
    model, data = network(whole("norm=mbn"))
    data.share = share = lambda n: slice(n // 2, n)
    trained = Trained(whole("norm=mbn").config, model, data, torch.device("cpu"), StopRequest())
    batches = list(trained._test_in_batches(100))
    assert [len(y) for _, y in batches] == [50, 50, 50, 30]
    assert torch.equal(batches[0][1], data.test_labels[50:100])
    assert data.share is share


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
        ((path, "--rules", "--record", f"machine.results={tmp_path / 'nowhere'}"), "cannot read"),
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
