"""On a CUDA device: the jobs of scripts/check_gpu.py, and whole runs, alone and side by side."""

import dataclasses
import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import running
import test_lanes
import torch
import torch.nn.functional as F
from running import TINY, Run, assert_same_run, run_here, without
from test_check_gpu import script

import models
from mbn import BatchRenorm2d, MemorizedBatchNorm2d
from mbn.benchmark import equalities
from mbn.benchmark.workload import Arm, Case, Setup
from mbn.system import cuda_graph
from mbn.system.cuda_graph import own_stream
from mbn.training.execution import set_arithmetic
from mbn.training.iteration import Update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"
LANES = {8: (1, 2), 128: (1, 2)}
SHORT = dataclasses.replace(script.SIZES, models=("resnet20",), images=256, rounds=1, lanes=LANES, lane_seconds=0.2)
SETUP = Setup(Path("data"), torch.device(DEVICE), models.build, SHORT, random=True)
# Three epochs and a half of 6 batches, the last one smaller; on whatever device.
RUN = [o for o in TINY if o != "machine.device=cpu"] + [
    f"machine.device={DEVICE}",
    "machine.deterministic=true",
    "schedule.iterations=20",
]


@pytest.fixture(autouse=True)
def _settings_as_they_were():
    """Arithmetic settings belong to the process, and a capture that a test leaves behind holds memory."""
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.benchmark, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _cublas_as_determinism_wants_it(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    """A function that runs `train.py` with RUN and more, in this process, with a network that draws nothing."""
    monkeypatch.setattr(running, "build_tiny", test_lanes.build)

    def call(*more, folder="run"):
        return run_here(capsys, monkeypatch, *RUN, f"machine.results={tmp_path / folder}", *more)

    return call


@pytest.fixture
def left(tmp_path):
    return lambda *more, folder="run": Run(tmp_path / folder, [*RUN, *more])


# Compilers warn about float32 without TF32, which exact comparison needs, and about parts of torch 2.11.
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore::DeprecationWarning")
@pytest.mark.parametrize("job", script.todo(SHORT), ids=lambda job: job.name)
def test_what_a_person_would_run_first_is_ok(job):
    assert job.work(SETUP, time.monotonic() + 240).missing == {}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("layer", "settings"),
    [(MemorizedBatchNorm2d, {}), (MemorizedBatchNorm2d, {"gradient": "batch"}), (BatchRenorm2d, {})],
    ids=["mbn paper", "mbn batch", "brn"],
)
def test_gradients_are_those_in_float64_in_every_precision(layer, settings, dtype, last):
    """Kernels of half precision meet factors in float32 there."""
    ours = layer(8, forwards=1, **settings).to(DEVICE)
    exact = layer(8, forwards=1, **settings).double()
    layout = torch.channels_last if last else torch.contiguous_format
    for _ in range(3):
        x, dy = (3 * torch.randn(6, 8, 7, 7) + 1).to(dtype), torch.randn(6, 8, 7, 7).to(dtype)
        there = x.to(DEVICE).contiguous(memory_format=layout).requires_grad_()
        here = x.detach().double().requires_grad_()
        ours(there).backward(dy.to(DEVICE))
        exact(here).backward(dy.double())
        largest = (there.grad.cpu().double() - here.grad).abs().max() / here.grad.abs().max()
        assert largest < (1e-5 if dtype == torch.float32 else 2e-2)


# Capturing.


def test_no_two_threads_share_a_stream():
    """torch hands out 32 streams in turn: two threads on one would capture each other's work."""
    device = torch.device(DEVICE)
    with own_stream(device):
        mine = torch.cuda.current_stream(device).cuda_stream
        for _ in range(40):
            with own_stream(device):
                assert torch.cuda.current_stream(device).cuda_stream != mine


def test_an_iteration_that_waits_for_the_device_goes_on_in_eager_mode_and_others_are_captured(monkeypatch, capsys):
    set_arithmetic(SETUP.device, False, True)
    case, batches = Case("resnet20", 8, 1), equalities.random_batches([8] * 7, SETUP)
    original = Update._iterate

    def trained(mode):
        training = equalities.new_training(case, Arm("mbn", 2, mode), SETUP)
        equalities.train_on(training, batches)
        return training

    with own_stream(SETUP.device):
        eager = equalities.tensors(trained("eager"))
        with monkeypatch.context() as patch:
            patch.setattr(Update, "_iterate", lambda self, x, y: (original(self, x, y), self.window.sum().item()))
            waits = trained("graph-eager")
        assert waits.update.mode == "eager"
        err = capsys.readouterr().err
        assert err.count("warning: iterations cannot be captured here") == 1
        assert "not permitted when stream is capturing" in err  # and not that the capture could not be ended
        assert equalities.largest_difference(equalities.tensors(waits), eager)[0] == 0
        captured = trained("graph-eager")
        assert captured.in_mode
        assert equalities.largest_difference(equalities.tensors(captured), eager)[0] == 0


def test_another_lanes_first_convolutions_do_not_spoil_a_capture():
    """cuDNN waits for the device while it tries algorithms, which a thread that captures does not survive."""
    set_arithmetic(SETUP.device, True, False)
    begun, done = threading.Event(), threading.Event()

    def captures():
        with own_stream(SETUP.device):
            for _ in range(8):
                training = equalities.new_training(Case("resnet20", 8, 1), Arm("mbn", 2, "graph-eager"), SETUP)
                equalities.train_on(training, equalities.random_batches([8] * 5, SETUP))
                begun.set()
                assert training.in_mode

    def convolves():
        begun.wait()
        with own_stream(SETUP.device):
            for n in itertools.count(1):
                # Not random: before torch 2.13 all generators refuse to draw while one graph is captured.
                x, weight = (torch.ones(shape, device=DEVICE) for shape in ((n, 8, 16, 16), (8, 8, 3, 3)))
                cuda_graph.uncaptured(lambda x=x, weight=weight: F.conv2d(x, weight), SETUP.device)
                if done.is_set():
                    return n

    with cuda_graph.shared_thread(), ThreadPoolExecutor(2) as pool:
        capturing, convolving = pool.submit(captures), pool.submit(convolves)
        capturing.add_done_callback(lambda _: (begun.set(), done.set()))
        capturing.result()
        assert convolving.result() > 8


def test_capturing_works_here():
    assert cuda_graph.fault(torch.device(DEVICE)) is None


# Whole runs.


@pytest.mark.parametrize("norm", ["bn", "mbn", "brn", "gn"])
def test_a_run_in_mode_auto_is_captured_and_ends_with_the_same_bits_after_a_stop(here, left, monkeypatch, norm):
    assert here(f"norm={norm}").code == 0
    assert left(f"norm={norm}").record()["mode"] == "graph-eager"
    with monkeypatch.context() as patch:
        test_lanes.after(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = here(f"norm={norm}", folder="stopped")
    assert stopped.code == 75
    assert left(f"norm={norm}", folder="stopped").checkpoint()["iteration"] == 9
    assert here(f"norm={norm}", folder="stopped").code == 0
    assert_same_run(left(f"norm={norm}"), left(f"norm={norm}", folder="stopped"))


def test_a_run_with_dropout_is_captured_and_ends_with_the_same_bits_after_a_stop(here, left, monkeypatch):
    """Its masks come from the generator; a capture advances its state as eager iterations do."""
    monkeypatch.setattr(running, "build_tiny", DROPS)
    for folder, mode in (("run", "auto"), ("eager", "eager")):
        assert here(f"machine.mode={mode}", folder=folder).code == 0
    assert_same_state(left(), left("machine.mode=eager", folder="eager"))
    with monkeypatch.context() as patch:
        test_lanes.after(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert here(folder="stopped").code == 75
    assert here(folder="stopped").code == 0
    assert_same_run(left(), left(folder="stopped"))


DROPS = running.build_tiny


def assert_same_state(one, other):
    for key in ("model", "optimizer", "generators"):
        running.assert_same_bits(one.checkpoint()[key], other.checkpoint()[key], key)


@pytest.mark.parametrize("mode", ["eager", "graph-eager"])
def test_three_lanes_give_the_same_results_as_each_run_alone(here, left, mode):
    together = (f"machine.mode={mode}", "machine.together=3")
    done = here("-m", "norm=mbn", "seed=0,1,2", *together)
    assert (done.code, done.err) == (0, "")
    for seed in (0, 1, 2):
        one = ("norm=mbn", f"seed={seed}", *together)
        assert here(*one, folder="alone").code == 0
        assert_same_run(left(*one), left(*one, folder="alone"))
        assert left(*one).record()["mode"] == mode


CONTROLS = ("evaluate.precise=true", "evaluate.rules=true")


@pytest.mark.parametrize("norm", ["bn", "mbn", "brn"])
def test_controls_are_the_same_whether_forwards_are_captured_or_not(here, left, norm):
    for mode in ("eager", "auto"):
        done = here(f"norm={norm}", f"machine.mode={mode}", *CONTROLS, folder=mode)
        assert (done.code, done.err) == (0, "")  # nor a warning that something could not be captured
    eager, captured = (left(f"norm={norm}", *CONTROLS, folder=mode).record()["controls"] for mode in ("eager", "auto"))
    assert without(eager, ["by"]) == without(captured, ["by"])
    assert None not in (captured["test_error_precise"], captured["train_error"], captured["rules"])


def test_lanes_of_two_methods_measure_what_each_run_does_alone(here, left):
    """Their epochs end, and their controls are measured, while others are captured and replayed."""
    together = ("machine.together=4", *CONTROLS)
    done = here("-m", "norm=mbn,brn", "seed=0,1", *together)
    assert (done.code, done.err) == (0, "")
    for norm, seed in itertools.product(("mbn", "brn"), (0, 1)):
        one = (f"norm={norm}", f"seed={seed}", *together)
        assert here(*one, folder="alone").code == 0
        assert_same_run(left(*one), left(*one, folder="alone"))
        assert "warning" not in (left(*one).folder / "log.txt").read_text()


# Memory.


def ask_for_too_much():
    torch.empty(2**45, dtype=torch.uint8, device=DEVICE)


SENTENCE = "the device's memory is not enough: try a smaller batch_size than 256"


def test_too_little_memory_is_one_sentence(here, left, monkeypatch):
    with monkeypatch.context() as patch:
        test_lanes.after(patch, 8, ask_for_too_much)
        ended = here("norm=mbn")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith(f"error: {SENTENCE}")
    assert here("norm=mbn").code == 0
    assert left("norm=mbn").record_path.exists()


def test_a_lane_without_memory_ends_alone(here, left, monkeypatch):
    together = "machine.together=3"
    with monkeypatch.context() as patch:
        test_lanes.after(patch, 8, ask_for_too_much, name="bn-f1-b256-s1")
        ended = here("-m", "norm=bn", "seed=0,1,2", together)
    assert ended.code == 1
    assert ended.err.count("error:") == 1
    assert f"{SENTENCE}, machine.together" in ended.err
    done = [left("norm=bn", f"seed={seed}", together).record_path.exists() for seed in (0, 1, 2)]
    assert done == [True, False, True]
