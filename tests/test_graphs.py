import pytest
import torch

from cxr import UsageError, console, graphs
from cxr.graphs import Ahead, Recorded

CPU = torch.device("cpu")


class Emulated(Recorded):
    """A recording without a GPU: `record` makes the replay, streams there are none."""

    def __init__(self, work, record):
        super().__init__(work, CPU, on=False)
        self.on, self.record = True, record

    def _aside(self, work):
        return work()

    def _record(self, kind):
        return self.record(self, kind)


def again(recorded, kind):
    """A replay into the same memory, as a graph's."""
    memory = {}

    def replay():
        for name, term in recorded.work(recorded.static, kind).items():
            memory.setdefault(name, torch.empty_like(term)).copy_(term)
        return memory

    return replay


def total(batch, kind):
    return {"sum": batch["x"].sum() * kind}


def batches(n):
    return [{"x": torch.full((3,), float(i))} for i in range(n)]


def test_every_replay_reads_the_batch_of_the_day_and_keeps_what_the_one_before_gave():
    work, asked = Emulated(total, again), batches(2 * graphs.WARM_UP)
    sums = [work(batch, 1 + i % 2)["sum"] for i, batch in enumerate(asked)]
    assert [s.item() for s in sums] == [3 * i * (1 + i % 2) for i in range(len(asked))]
    assert set(work.replays) == {1, 2}
    assert asked[0]["x"].eq(0).all()  # a caller's batch is not written to


def test_a_kind_runs_once_before_it_is_recorded():
    work = Emulated(total, again)
    for batch in batches(graphs.WARM_UP + 1):
        work(batch, 1)
    assert set(work.replays) == {1}
    work(batches(1)[0], 2)
    assert set(work.replays) == {1}
    work(batches(1)[0], 2)
    assert set(work.replays) == {1, 2}


def refused(recorded, kind):
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def test_what_cannot_be_recorded_goes_on_without_with_one_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(console, "warn", warnings.append)
    work, asked = Emulated(total, refused), batches(graphs.WARM_UP + 3)
    sums = [work(batch, 1)["sum"].item() for batch in asked]
    assert sums == [3 * i for i in range(len(asked))]
    (line,) = warnings
    assert line.endswith("CUDA graph: operation not permitted when stream is capturing")


def test_required_it_is_an_error(monkeypatch):
    monkeypatch.setenv("CXRGAN_GRAPHS", "require")
    work = Emulated(total, refused)
    with pytest.raises(RuntimeError, match="capturing"):
        for batch in batches(graphs.WARM_UP + 1):
            work(batch, 1)


def test_only_one_process_on_a_gpu_records_unless_it_is_off(monkeypatch):
    gpu = torch.device("cuda")
    assert graphs.wanted(gpu, 1)
    assert not graphs.wanted(gpu, 2) and not graphs.wanted(CPU, 1)
    monkeypatch.setenv("CXRGAN_GRAPHS", "off")
    assert not graphs.wanted(gpu, 1)
    monkeypatch.setenv("CXRGAN_GRAPHS", "on")
    with pytest.raises(UsageError, match="CXRGAN_GRAPHS is 'on'"):
        graphs.wanted(gpu, 1)


class Unpinned(Ahead):
    def _pinned(self, arguments):
        return self.make(*arguments)


def test_what_is_made_ahead_is_what_would_have_been_made():
    made = []

    def make(number, p):
        made.append(number)
        return number * p

    ahead = Unpinned(make, on=True)
    calls = [((0, 2), (1, 2), (2, 2)), ((1, 2), (2, 2)), ((2, 3), (3, 3)), ((7, 3),)]
    assert [ahead(*call) for call in calls] == [0, 2, 6, 21]
    ahead.workers.shutdown()
    assert sorted(made) == [0, 1, 2, 2, 3, 7]  # 2 was made for another p, 3 was expected
    assert Ahead(make, on=False)((4, 1), (5, 1)) == 4 and made[-1] == 4


def test_a_failure_ahead_is_the_callers():
    def make(number):
        raise ValueError(number)

    ahead = Unpinned(make, on=True)
    with pytest.raises(ValueError, match="0"):
        ahead((0,))


GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def recorded_run(monkeypatch, mode, steps, resumed=None):
    """A tiny GAN on noise after some steps: its state. resumed: a state to go on from."""
    from cxr import checkpoints
    from cxr.device import prepare
    from cxr.evaluation.bench import Timed

    monkeypatch.setenv("CXRGAN_GRAPHS", mode)
    trainer = Timed("tiny", 16, prepare("cuda"))
    if resumed is not None:
        state, trainer.progress = resumed[0], dict(resumed[1])
        checkpoints.unpack(state, trainer.parts())
    while trainer.progress["images"] < 16 * steps:
        trainer.step()
    assert bool(trainer.recorded.replays) is (mode == "require")
    state = {k: v.detach().cpu().clone() for k, v in checkpoints.pack(trainer.parts()).items()}
    return state, dict(trainer.progress)


def assert_alike(one, two):
    """All but the first moments of G's and D's optimisers (betas of 0): the last step's gradient
    alone, in which rounding errors are largest."""
    apart = {
        name: ((value - two[0][name]).norm() / value.norm().clamp_min(1e-6)).item()
        for name, value in one[0].items()
        if value.is_floating_point() and value.numel() > 1
        if not (name.startswith(("opt_G", "opt_D")) and name.endswith("exp_avg"))
    }
    farthest = max(apart, key=apart.get)
    print(f"farthest apart: {farthest}, {apart[farthest]:.2g}")
    assert all(distance < 1e-2 for distance in apart.values()), farthest


@GPU_ONLY
def test_on_a_gpu_recorded_steps_are_those_that_python_runs(monkeypatch):
    """The same to rounding: atomic sums have no order, and 40 steps make more of it."""
    assert_alike(*(recorded_run(monkeypatch, mode, 40) for mode in ("off", "require")))


@GPU_ONLY
def test_on_a_gpu_a_resumed_recorded_run_is_the_straight_one(monkeypatch):
    straight = recorded_run(monkeypatch, "require", 60)
    half = recorded_run(monkeypatch, "require", 30)
    assert_alike(straight, recorded_run(monkeypatch, "require", 60, half))
