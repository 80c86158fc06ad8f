"""Runs a sweep on the workers of a Dask cluster, in a folder that all of them share.

Which worker takes what is decided here and not by Dask: one variant a worker, of variants that time anything one a machine,
and no worker that was not looked at first.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
from filelock import FileLock, Timeout

from toolchain.errors import (
    FolderBusy,
    RecipeError,
    SlimvitError,
    StorageError,
    TargetUnavailable,
    WorkerLost,
    fault_words,
)
from toolchain.files import write_text
from toolchain.measure.samples import Design
from toolchain.pipeline.job import code
from toolchain.pipeline.sweep import WAIT, Ended, Variant
from toolchain.places import CLASS_LISTS, LOCAL, model_source, path_of_source
from toolchain.recipe import Recipe
from toolchain.report.absent import PRIVATE
from toolchain.report.record import Report

if TYPE_CHECKING:
    from distributed import Client, Future

LOSSES = 3
"""As many workers may go away under a variant before it counts as failed: it may be what ends them."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Where Linux tells machines apart, and not the containers of one."""


@dataclass(frozen=True)
class Patience:
    """How long a cluster is waited for.

    Attributes:
        connect_s: seconds until a scheduler that does not answer is taken for absent.
        look_s: seconds between looks at which workers there are.
        fetch_s: seconds for a finished report to come from its worker.
    """

    connect_s: float = 10.0
    look_s: float = 1.0
    fetch_s: float = 60.0


PATIENT = Patience()


@dataclass(frozen=True)
class Found:
    """A worker's report on itself: its machine, its packages, and what it lacks, "" if nothing."""

    machine: str
    installed: Mapping[str, str]
    lacks: str


@dataclass(frozen=True)
class Order:
    """What a worker carries out; one value, so that Dask looks for no tasks in it."""

    variant: Variant
    folder: Path
    folders: tuple[Path, ...]
    design: Design

    def carry_out(self) -> Report | SlimvitError:
        """The report of the run, or why there is none; a folder that others are at is given back after a while."""
        from functools import partial

        from toolchain.measure.compare import compare
        from toolchain.pipeline.run import run

        timed = partial(compare, design=self.design)
        try:
            return run(self.variant.recipe, self.folder, compare=timed, others=self.folders)
        except FolderBusy as error:
            time.sleep(WAIT)
            return error
        except SlimvitError as error:
            return error
        except OSError as error:
            return StorageError(f"{error.filename or self.folder}: {fault_words(error)}")


def installed() -> dict[str, str]:
    """Package → version, for every package on which the outcome of a run depends."""
    packages = {"torch": version("torch"), "timm": version("timm"), "Pillow": PIL.__version__}
    return {"slimvit": f"{version('slimvit')} ({code()[:8]})", **packages}


def look(token: Path, places: Sequence[Path]) -> Found:
    """What the process that this is called in has and lacks.

    Args:
        token: a file of the shared folder that holds its own name, and whose lock the sweep holds.
        places: files and folders that the recipe reads.
    """
    return Found(BOOT.read_text().strip() if BOOT.exists() else platform.node(), installed(), _lack(token, places))


def _lack(token: Path, places: Sequence[Path]) -> str:
    shared = token.parent.parent
    try:
        same = token.read_text(encoding="utf-8") == token.name
    except OSError:
        same = False
    if not same:
        return f"does not see {shared}: --out has to lie on a file system that all workers share, under the same path"
    if not os.access(token.parent, os.W_OK):
        return f"cannot write to {shared}: let its user write there"
    try:
        with FileLock(_lock(token), timeout=0):
            return f"does not see the locks of other machines in {shared}: choose a file system that has them, as NFS 4"
    except Timeout:
        pass
    except (OSError, NotImplementedError) as error:
        return f"has no locks in {shared} ({error}): choose a file system that has them, as NFS 4"
    gone = [str(path) for path in places if not path.exists()]
    return f"does not see {gone[0]}, which the recipe reads: put it there, or on a shared file system" if gone else ""


def _lock(token: Path) -> Path:
    return token.with_name(f"{token.name}.lock")


def on_dask(
    grid: Sequence[Variant],
    out: Path,
    address: str,
    design: Design,
    say: Callable[[str], None],
    patience: Patience = PATIENT,
) -> Iterator[Ended]:
    """Each variant with its outcome, as they end on the workers of a scheduler.

    A worker that goes away has its variant carried out by another, which takes up what it finished. Workers may come later.
    When the caller stops asking, what was not begun is not begun, and what is under way ends on its worker.

    Args:
        grid: the variants.
        out: the folder, on a file system that the workers share.
        address: of the scheduler, such as "tcp://HOST:8786".
        design: how latency is timed.
        say: told what begins and ends, and which workers are left out.
        patience: how long the cluster is waited for.

    Raises:
        RecipeError: Dask is not installed, the address is none, or a worker cannot take part; the message says why.
        TargetUnavailable: no scheduler answers, or it went away.
        StorageError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_connected(address, patience.connect_s))
        token = stack.enter_context(_token(out.resolve()))
        places = list(dict.fromkeys(place for variant in grid for place in _places(variant.recipe)))
        cluster = _Cluster(client, address, token, places, say, patience)
        try:
            cluster.check()
            yield from _carried_out(grid, out.resolve(), design, cluster)
        except OSError as error:
            raise TargetUnavailable(
                "dask", f"the scheduler at {address} went away ({error}). Run the same command to go on."
            ) from error


@contextlib.contextmanager
def _connected(address: str, timeout_s: float) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError:
        raise RecipeError("--dask needs another package. Try: pip install 'slimvit[distributed]'") from None
    try:
        client = Client(address, timeout=timeout_s, set_as_default=False)
    except ValueError as error:
        raise RecipeError(f"--dask {address!r} is no address ({error}); write one as tcp://HOST:8786") from None
    except OSError:
        raise TargetUnavailable(
            "dask", f"no scheduler answers at {address}. Start one with `dask scheduler`, or give its address."
        ) from None
    with client:
        yield client


@contextlib.contextmanager
def _token(out: Path) -> Iterator[Path]:
    """A file below `out` that holds its own name, and whose lock this process holds until the block ends."""
    token = out / PRIVATE / f"dask-{uuid.uuid4().hex}"
    write_text(token, token.name)
    try:
        with FileLock(_lock(token)):
            yield token
    except NotImplementedError:
        raise StorageError(f"the file system of {out} has no locks; choose another --out") from None
    finally:
        token.unlink(missing_ok=True)
        _lock(token).unlink(missing_ok=True)
        for folder in (token.parent, out):  # of a sweep that was refused, nothing stays
            with contextlib.suppress(OSError):
                folder.rmdir()


def _places(recipe: Recipe) -> Iterator[Path]:
    """The files and folders that a recipe names by path."""
    kind, place = model_source(recipe.model.name)
    named = {
        place: kind == LOCAL,
        recipe.model.checkpoint: True,
        path_of_source(recipe.data.source): True,
        recipe.data.classes: recipe.data.classes not in CLASS_LISTS,
    }
    yield from (Path(path) for path, is_path in named.items() if path and is_path)


def _times(recipe: Recipe) -> bool:
    """Whether something is measured that another run beside it would disturb."""
    return bool(recipe.budget.latency or (recipe.bench and recipe.bench.targets))


@dataclass
class _Cluster:
    """The workers of a scheduler, and which of them may take part.

    Attributes:
        client: of the scheduler.
        address: of the scheduler, for messages.
        token, places: as in `look`.
        say: told which workers come, and which are left out.
        patience: how long they are waited for.
        known: worker → what it said of itself.
        unfit: workers that cannot take part.
    """

    client: Client
    address: str
    token: Path
    places: Sequence[Path]
    say: Callable[[str], None]
    patience: Patience = PATIENT
    known: dict[str, Found] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Raises RecipeError if the scheduler or one of its workers, as they are now, cannot take part."""
        try:
            has = self.client.run_on_scheduler(installed)
        except (ImportError, AttributeError):
            has = {}
        if differs := _difference(has):  # it unpickles what its workers are given
            raise RecipeError(f"the scheduler at {self.address} {differs}")
        for address, why in self._newcomers(list(self.client.nthreads())):
            raise RecipeError(f"the worker {address} {why}; or remove it")

    def workers(self) -> dict[str, str]:
        """Worker → machine of those that are there and may take part; newcomers that may not are said, and left out."""
        there = list(self.client.nthreads())
        for address, why in self._newcomers(there):
            self.say(f"the worker {address} is left out: it {why}")
        return {address: self.known[address].machine for address in there if address in self.known}

    def _newcomers(self, there: Sequence[str]) -> list[tuple[str, str]]:
        """Workers that were not looked at before and cannot take part, with why."""
        new = [address for address in there if address not in self.known and address not in self.unfit]
        if not new:
            return []
        answers = self.client.run(look, self.token, list(self.places), workers=new, on_error="return")
        refused = []
        for address, found in answers.items():
            if isinstance(found, OSError):  # it went away meanwhile
                continue
            if isinstance(found, Found):
                why = _difference(found.installed) or found.lacks
            elif isinstance(found, ImportError | AttributeError):
                why = _difference({})
            else:
                why = f"does not answer as it should: {type(found).__name__}: {found}"
            if why:
                self.unfit.add(address)
                refused.append((address, why))
            else:
                self.known[address] = found
        return refused


def _difference(has: Mapping[str, str]) -> str:
    """What another process has installed that is not what this one has; "" if it is the same."""
    for package, wanted in installed().items():
        if package not in has:
            return f"cannot import this {package}: install {package} {wanted} there"
        if has[package] != wanted:
            return f"has {package} {has[package]}, and this machine has {wanted}: install the same there"
    return ""


def _carried_out(grid: Sequence[Variant], out: Path, design: Design, cluster: _Cluster) -> Iterator[Ended]:
    folders = tuple(out / variant.name for variant in grid)
    timed = any(_times(variant.recipe) for variant in grid)
    waiting = deque(grid)
    at: dict[Future, tuple[Variant, str]] = {}
    losses, busy, ended = Counter[str](), set[str](), 0
    news, alone = threading.Event(), False
    while waiting or at:
        news.clear()
        workers = cluster.workers()
        for future, (variant, worker) in list(at.items()):
            outcome = _outcome(future, cluster.patience.fetch_s, lost=worker not in workers)
            if outcome is None:
                continue
            del at[future]
            if isinstance(outcome, FolderBusy):
                busy.add(variant.name)
                waiting.append(variant)
            elif isinstance(outcome, WorkerLost) and losses[variant.name] + 1 < LOSSES:
                losses[variant.name] += 1
                cluster.say(f"{variant.name}: the worker {worker} went away; another goes on with it")
                waiting.appendleft(variant)
            else:
                ended += 1
                how = "is done" if isinstance(outcome, Report) else f"failed: {outcome}"
                cluster.say(f"{variant.name} {how} ({ended} of {len(grid)})")
                yield variant, outcome
        for worker in _idle(workers, [worker for _, worker in at.values()], one_a_machine=timed):
            if not waiting:
                break
            variant = waiting.popleft()
            order = Order(variant, out / variant.name, folders, design)
            future = cluster.client.submit(Order.carry_out, order, workers=[worker], pure=False)
            future.add_done_callback(lambda _: news.set())
            at[future] = variant, worker
            if variant.name not in busy:
                cluster.say(f"{variant.name} on {worker}")
        if not workers and not alone:
            cluster.say(f"no worker of {cluster.address} can take a variant; waiting for one")
        alone = not workers
        if waiting or at:
            news.wait(cluster.patience.look_s)


def _idle(workers: Mapping[str, str], busy: Sequence[str], *, one_a_machine: bool) -> Iterator[str]:
    """Workers that may be given a variant now, of each machine only one where the runs time something."""
    machines = {workers[worker] for worker in busy if worker in workers}
    for worker, machine in workers.items():
        if worker not in busy and not (one_a_machine and machine in machines):
            machines.add(machine)
            yield worker


def _outcome(future: Future, timeout_s: float, *, lost: bool) -> Report | SlimvitError | None:
    """What came of a task, None if nothing yet; a WorkerLost if its worker went away. Other errors are raised as they are."""
    from distributed import KilledWorker

    if future.status in ("finished", "error"):
        try:
            outcome: Report | SlimvitError = future.result(timeout=timeout_s)
        except (TimeoutError, KilledWorker):
            lost = True
        else:
            return outcome
    if lost or future.done():  # cancelled, or forgotten by a scheduler that was started anew
        future.cancel()
        return WorkerLost("dask", f"{LOSSES} workers went away while they carried it out; see their logs.")
    return None
