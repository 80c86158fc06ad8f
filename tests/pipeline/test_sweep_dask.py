"""A sweep on the workers of a Dask cluster: who is given what, who is refused, and that it comes to what it comes to alone."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings, strategies
from made_up_reports import a_report
from recipes import tiny_recipe

from toolchain import errors
from toolchain.cli import main
from toolchain.errors import (
    BudgetError,
    DeviceLost,
    FolderBusy,
    RecipeError,
    SlimvitError,
    TargetUnavailable,
    WorkerLost,
)
from toolchain.files import read_json
from toolchain.measure.samples import Design
from toolchain.pipeline import sweep_dask as module
from toolchain.pipeline.run import run
from toolchain.pipeline.sweep import sweep, variants
from toolchain.pipeline.sweep_dask import Found, Order, Patience, installed, look, on_dask
from toolchain.report.record import Report

distributed = pytest.importorskip(
    "distributed", reason="distributed is not installed: pip install 'slimvit[distributed]'"
)

BRISK = Patience(connect_s=0.5)
RECIPE = tiny_recipe("[train]\nepochs = 1\n[budget]\nparams = 0.5\n")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers, each a process of one thread that its nanny starts again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster:
            yield cluster


@pytest.fixture
def worker():
    """The address of a scheduler in this process, with one worker; both are gone after the test, as their threads draw random numbers."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp://"
    ) as cluster:
        yield cluster.scheduler_address


@contextlib.contextmanager
def one_thread():
    """As workers have it: what threads add up to depends on how many they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(variant, folder, folders):
    return run(variant.recipe, folder, others=folders)


# With real workers


@pytest.mark.slow
def test_it_comes_to_what_it_comes_to_alone_and_what_fails_fails_alone(cluster, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    settings = ["--set", "budget.params=0.6,0.5,0.001"]
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(recipe), *settings, "--out", str(tmp_path / "out"), "--dask", cluster.scheduler_address])
    said = capsys.readouterr()
    assert end.value.code == BudgetError.exit_code, said.err
    assert "params-0.001 failed: " in said.err
    assert "(3 of 3)" in said.err
    assert "1 of 3 variants failed (params-0.001)" in said.err
    grid = variants(recipe, ["budget.params=0.6,0.5"])
    with one_thread():
        plain = sweep(grid, tmp_path / "plain", alone)
    for name, report in plain.reports.items():
        there = Report.load(tmp_path / "out" / name)
        assert there.compressed == report.compressed
        assert there.parity == report.parity
        plans = [(tmp_path / folder / name / "plan.json").read_bytes() for folder in ("out", "plain")]
        assert plans[0] == plans[1]
    found, alike = (read_json(tmp_path / folder / "sweep.json") for folder in ("out", "plain"))
    assert found["runs"] == alike["runs"]
    assert [*found["failed"]] == ["params-0.001"]
    records = [(tmp_path / "out" / name / ".slimvit" / "weigh.json").read_bytes() for name in plain.reports]
    assert records[0] == records[1], "they shared what they have in common"
    assert not [*(tmp_path / "out" / ".slimvit").glob("dask-*")]


@pytest.mark.slow
def test_a_worker_that_is_killed_has_its_variant_carried_on_by_another(cluster, recipe, tmp_path):
    grid, said, threads = variants(recipe, ["budget.params=0.7,0.001"]), [], []
    first = tmp_path / "out" / "params-0.7" / ".slimvit" / "dense.json"
    before = []

    def say(text):
        said.append(text)
        if text.startswith("params-0.7 on ") and not threads:
            threads.append(threading.Thread(target=kill, args=(text.rpartition(" ")[2],)))
            threads[0].start()

    def kill(worker):
        with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
            (pid,) = client.run(os.getpid, workers=[worker]).values()
        deadline = time.monotonic() + 60
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        before.append(first.stat().st_mtime_ns)
        os.kill(pid, signal.SIGKILL)

    ended = {
        variant.name: outcome
        for variant, outcome in on_dask(grid, tmp_path / "out", cluster.scheduler_address, Design(), say)
    }
    threads[0].join()
    assert isinstance(ended["params-0.7"], Report)
    assert isinstance(ended["params-0.001"], BudgetError)
    workers = [text.rpartition(" ")[2] for text in said if text.startswith("params-0.7 on ")]
    assert len(set(workers)) == 2
    assert f"params-0.7: the worker {workers[0]} went away; another goes on with it" in said
    assert before == [first.stat().st_mtime_ns], "what was done is not done again"


def test_workers_that_do_not_see_what_the_recipe_reads_are_refused(worker, recipe, tmp_path):
    recipe.write_text(RECIPE.replace('"digits"', '"images:pictures"'))
    grid = variants(recipe, ["budget.params=0.7,0.5"])
    words = rf"the worker tcp://\S+ does not see {tmp_path / 'pictures'}, which the recipe reads"
    with pytest.raises(RecipeError, match=words):
        list(on_dask(grid, tmp_path / "out", worker, Design(), print))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("tcp://127.0.0.1:1", TargetUnavailable, "no scheduler answers at tcp://127.0.0.1:1. Start one"),
        ("nothing://there", RecipeError, "is no address .*; write one as tcp://HOST:8786"),
    ],
)
def test_an_address_where_no_scheduler_is(recipe, tmp_path, address, error, words):
    grid = variants(recipe, ["budget.params=0.7,0.5"])
    with pytest.raises(error, match=words):
        list(on_dask(grid, tmp_path / "out", address, Design(), print, BRISK))


def test_without_dask_a_sentence_says_what_to_install(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    grid = variants(recipe, ["budget.params=0.7,0.5"])
    with pytest.raises(RecipeError, match=r"pip install 'slimvit\[distributed\]'"):
        list(on_dask(grid, tmp_path / "out", "tcp://127.0.0.1:1", Design(), print))


def test_a_dry_run_checks_on_this_machine(recipe, tmp_path, capsys):
    settings = ["--set", "budget.params=0.7,0.5", "--out", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(recipe), *settings, "--dask", "tcp://127.0.0.1:1"])
    assert end.value.code == RecipeError.exit_code
    assert "--dry-run checks the variants on this machine: leave --dask out" in capsys.readouterr().err


# What a worker says of itself


def test_a_worker_says_what_it_lacks(tmp_path):
    token = tmp_path / ".slimvit" / "dask-1"
    assert "--out has to lie on a file system that all workers share" in look(token, []).lacks
    token.parent.mkdir()
    token.write_text("dask-2")
    assert "--out has to lie on a file system that all workers share" in look(token, []).lacks
    token.write_text("dask-1")
    assert "does not see the locks of other machines" in look(token, []).lacks
    with FileLock(module._lock(token)):
        assert look(token, [tmp_path]).lacks == ""
        assert (
            f"does not see {tmp_path / 'no'}, which the recipe reads" in look(token, [tmp_path, tmp_path / "no"]).lacks
        )


def test_what_a_recipe_reads_by_path(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ['model.checkpoint="a.safetensors"', 'data.source="imagefolder:b"', 'data.classes="c.json"']
    found = variants(recipe, ["budget.params=0.7,0.5", *settings])[0].recipe
    assert [*module._places(found)] == [tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.json"]
    plain = variants(recipe, ["budget.params=0.7,0.5", 'data.classes="imagenet-1k"'])[0].recipe
    assert [*module._places(plain)] == []


def every_error():
    kinds, left = [], [SlimvitError]
    while left:
        kinds.append(kind := left.pop())
        left += kind.__subclasses__()
    return [kind for kind in kinds if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error())
def test_errors_come_back_from_workers_as_they_were(kind):
    error = kind("board", "it is off", "apt") if issubclass(kind, TargetUnavailable) else kind("a sentence")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


# Who is given what


class Task:
    """A future of the cluster below."""

    def __init__(self):
        self.status, self.value, self.callback = "pending", None, None

    def done(self):
        return self.status != "pending"

    def result(self, timeout):
        return self.value

    def cancel(self):
        self.status = "cancelled"

    def add_done_callback(self, callback):
        callback(self)  # so that nobody waits


class MadeUp:
    """A cluster whose workers end what they are given, or die, as a script says; it looks after the rules."""

    def __init__(self, machines, script, *, one_a_machine):
        self.machines, self.script, self.one_a_machine = dict(machines), list(script), one_a_machine
        self.there, self.at, self.began, self.count = list(machines), {}, [], len(machines)

    def nthreads(self):
        self.step()
        return dict.fromkeys(self.there, 4)

    def run(self, function, token, places, workers, on_error):
        return {worker: Found(self.machines[worker], installed(), "") for worker in workers}

    def run_on_scheduler(self, function):
        return function()

    def submit(self, function, order, workers, pure):
        (worker,) = workers
        assert function is Order.carry_out
        assert worker in self.there
        assert worker not in self.at, "one variant a worker"
        if self.one_a_machine:
            assert self.machines[worker] not in {self.machines[each] for each in self.at}
        task = Task()
        self.at[worker] = task
        self.began.append(order.variant.name)
        return task

    def step(self):
        """The next of the script, and when it is at its end, the end of whatever is under way."""
        what, which = self.script.pop(0) if self.script else ("end", 0)
        if not self.at:
            return
        worker = sorted(self.at)[which % len(self.at)]
        task = self.at.pop(worker)
        if what == "die":
            self.there.remove(worker)
            self.count += 1
            self.there.append(f"w{self.count}")
            self.machines[f"w{self.count}"] = self.machines[worker]
            return
        busy = FolderBusy("another process is at it")
        board = DeviceLost("board", "it dropped off")
        task.value = {"busy": busy, "end": a_report(), "board": board}.get(what, BudgetError("out of reach"))
        task.status = "finished"


def cluster_of(client, folder, say=lambda _: None, **timing):
    return module._Cluster(client, "tcp://made-up", folder / "token", [], say, Patience(**timing))


SCRIPT = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(["end", "end", "fail", "busy", "die", "board"]), strategies.integers(0, 3)
    ),
    max_size=30,
)


@given(SCRIPT, strategies.lists(strategies.sampled_from("abc"), min_size=1, max_size=4), strategies.booleans())
@settings(max_examples=60)
def test_every_variant_ends_once_and_no_worker_and_where_it_is_timed_no_machine_has_two(
    tmp_path_factory, script, machines, timed
):
    folder = tmp_path_factory.mktemp("made-up")
    (folder / "recipe.toml").write_text(RECIPE + ("[bench]\n" if timed else ""))
    grid = variants(folder / "recipe.toml", ["budget.params=0.1,0.2,0.3,0.4,0.5"])
    client = MadeUp({f"w{index}": machine for index, machine in enumerate(machines)}, script, one_a_machine=timed)
    staff = cluster_of(client, folder, look_s=0.0)
    staff.check()
    ended = list(module._carried_out(grid, folder, Design(), staff))
    assert sorted(variant.name for variant, _ in ended) == sorted(variant.name for variant in grid)
    assert not any(isinstance(outcome, FolderBusy) for _, outcome in ended)
    lost = [outcome for _, outcome in ended if isinstance(outcome, WorkerLost)]
    assert len(lost) <= [what for what, _ in script].count("die") // module.LOSSES
    boards = [outcome for _, outcome in ended if isinstance(outcome, DeviceLost)]
    assert len(boards) <= [what for what, _ in script].count("board"), "a device that a run lost is no lost worker"
    assert client.at == {}


def test_a_device_that_a_run_lost_is_no_lost_worker(recipe, tmp_path):
    grid = variants(recipe, ["budget.params=0.1,0.2"])
    client = MadeUp({"w0": "a"}, [("end", 0), ("board", 0)], one_a_machine=False)
    staff = cluster_of(client, tmp_path)
    ended = {variant.name: outcome for variant, outcome in module._carried_out(grid, tmp_path, Design(), staff)}
    assert [type(outcome) for outcome in ended.values()].count(DeviceLost) == 1
    assert client.began == ["params-0.1", "params-0.2"]


def test_a_variant_that_ends_every_worker_is_given_up(recipe, tmp_path):
    grid = variants(recipe, ["budget.params=0.1,0.2"])
    client = MadeUp({"w0": "a"}, [("die", 0)] * 20, one_a_machine=False)
    staff = cluster_of(client, tmp_path)
    ended = {variant.name: outcome for variant, outcome in module._carried_out(grid, tmp_path, Design(), staff)}
    assert [type(outcome) for outcome in ended.values()] == [WorkerLost] * 2
    assert "3 workers went away while they carried it out; see their logs" in str(ended["params-0.1"])
    assert client.began == ["params-0.1"] * 3 + ["params-0.2"] * 3


def test_when_nobody_asks_on_nothing_more_begins(recipe, tmp_path):
    grid = variants(recipe, ["budget.params=0.1,0.2,0.3,0.4,0.5"])
    client = MadeUp({"w0": "a", "w1": "b"}, [], one_a_machine=False)
    staff = cluster_of(client, tmp_path)
    ended = module._carried_out(grid, tmp_path, Design(), staff)
    next(ended)
    ended.close()
    assert client.began == ["params-0.1", "params-0.2"]


def test_workers_that_come_later_are_looked_at_and_left_out_if_they_cannot_take_part(recipe, tmp_path):
    grid, said = variants(recipe, ["budget.params=0.1,0.2,0.3"]), []
    client = MadeUp({"w0": "a"}, [], one_a_machine=False)
    staff = cluster_of(client, tmp_path, said.append)
    staff.check()
    client.there.append("w9")
    client.run = lambda *_, workers, on_error: dict.fromkeys(workers, ModuleNotFoundError("toolchain"))
    ended = list(module._carried_out(grid, tmp_path, Design(), staff))
    assert len(ended) == 3
    assert [text for text in said if "w9" in text] == [
        f"the worker w9 is left out: it cannot import this slimvit: install slimvit {installed()['slimvit']} there"
    ]
    client.there.remove("w0")
    with pytest.raises(RecipeError, match=r"the worker w9 cannot import this slimvit.*; or remove it"):
        cluster_of(client, tmp_path, said.append).check()


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({**installed(), "timm": "0.1"}, f"has timm 0.1, and this machine has {installed()['timm']}: install the same"),
        ({}, "cannot import this slimvit: install slimvit"),
    ],
)
def test_workers_with_another_slimvit_are_refused(tmp_path, there, words):
    client = MadeUp({"w0": "a"}, [], one_a_machine=False)
    client.run = lambda *_, workers, on_error: dict.fromkeys(workers, Found("a", there, ""))
    with pytest.raises(RecipeError, match=re.escape(f"the worker w0 {words}")):
        cluster_of(client, tmp_path).check()


def test_a_cluster_without_workers_is_waited_for(recipe, tmp_path):
    grid, said = variants(recipe, ["budget.params=0.1,0.2"]), []
    client = MadeUp({"w0": "a"}, [], one_a_machine=False)
    client.there.remove("w0")
    staff = cluster_of(client, tmp_path, said.append, look_s=0.01)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(lambda: list(module._carried_out(grid, tmp_path, Design(), staff)))
        time.sleep(0.1)
        assert not ended.done()
        client.there.append("w0")
        assert len(ended.result(30)) == 2
    assert said[0] == "no worker of tcp://made-up can take a variant; waiting for one"
    assert said.count(said[0]) == 1
