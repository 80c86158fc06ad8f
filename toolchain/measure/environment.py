"""Describes the machine of a measurement, and compares the fingerprints of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, JsonValue

from toolchain.records import Record

SLOWER = 0.8
"""A clock frequency below this share of its highest is noted."""
BUSY = 0.2
"""More than this many cores kept busy by other processes are noted."""
GPU_HELD_BACK = {0x4: "its power limit", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "its power supply"}
"""Bits of what nvidia-smi calls clocks_throttle_reasons.active (nvml.h, nvmlClocksEventReason*) and what they mean."""


class Machine(BaseModel):
    """The facts of a machine that are shown."""

    cpu: str | None = None
    cores: int | None = None
    affinity: tuple[int, ...] | None = None
    cpu_quota: float | None = None
    threads: int | str | None = None
    gpus: tuple[dict[str, str], ...] = ()
    runtimes: dict[str, str] = Field(default_factory=dict)


def _described(machine: dict[str, JsonValue]) -> dict[str, JsonValue]:
    Machine.model_validate(machine)
    return machine


MachineFacts = Annotated[dict[str, JsonValue], AfterValidator(_described)]
"""What a device tells of itself; whatever of it is shown has the type of `Machine`."""


class Fingerprint(Record):
    """What `toolchain.on_device.runner.fingerprint` returns: `machine` must not change, `state` (frequency, load, throttling) may."""

    machine: MachineFacts
    state: dict[str, JsonValue]

    @property
    def observed(self) -> State:
        """What is known of the state."""
        return State.model_validate(self.state)


class State(BaseModel):
    """The facts of a state that say something of the samples; a device that cannot tell one leaves it out."""

    frequency_mhz: float | None = None
    throttle_count: int | None = None
    throttled_now: int = 0
    quota_stops: int | None = None
    cpu_seconds: dict[str, float] | None = None
    gpus: tuple[dict[str, str], ...] = ()


def machine_changes(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """One line for each fact of the machine that is not the same in all fingerprints; empty if they agree."""
    first = fingerprints[0].machine
    changes = {}
    for other in fingerprints[1:]:
        for key in sorted(first.keys() | other.machine.keys()):
            if first.get(key) != other.machine.get(key):
                changes[key] = f"{key} {first.get(key)!r} → {other.machine.get(key)!r}"
    return list(changes.values())


def slowed(sessions: Sequence[tuple[Fingerprint, Fingerprint]]) -> list[str]:
    """What says that a device slowed itself down while it was measured; empty if nothing does.

    Ratios of what ran side by side hold then; milliseconds are those of a device that is hot or lacks power.

    Args:
        sessions: the fingerprints before and after each. Clocks count after work alone: before it they may be at rest.
    """
    states = [each.observed for pair in sessions for each in pair]
    after = states[1::2]
    counts = [state.throttle_count for state in states if state.throttle_count is not None]
    clocks = [state.frequency_mhz for state in after if state.frequency_mhz is not None]
    words = []
    if counts and max(counts) > counts[0]:
        words.append(f"it was throttled {_times(max(counts) - counts[0])} for its heat")
    stops = [
        later.quota_stops - before.quota_stops
        for before, later in zip(states[::2], after, strict=True)
        if before.quota_stops is not None and later.quota_stops is not None
    ]
    if sum(stops):
        words.append(f"the limit of its container stopped it {_times(sum(stops))}")
    if any(state.throttled_now for state in states):
        words.append("its firmware held it back for heat or low voltage")
    if clocks and min(clocks) < SLOWER * max(clocks):
        words.append(f"its clock was between {min(clocks):g} and {max(clocks):g} MHz")
    bits = [_hex(gpu.get("clocks_throttle_reasons.active")) for state in after for gpu in state.gpus]
    reasons = {what: None for bit, what in GPU_HELD_BACK.items() if any(active & bit for active in bits)}
    if reasons:
        words.append(f"its GPU was held back by {' and '.join(reasons)}")
    return words


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _hex(text: str | None) -> int:
    """A number as nvidia-smi writes it, 0x…; 0 for "[N/A]" and the like."""
    try:
        return int(text or "", 16)
    except ValueError:
        return 0


def cores_of_others(sessions: Sequence[tuple[Fingerprint, Fingerprint]]) -> float | None:
    """How many cores other processes kept busy on average while it was measured; None where the device cannot tell.

    Args:
        sessions: the fingerprints before and after each.
    """
    seconds = [(before.observed.cpu_seconds, after.observed.cpu_seconds) for before, after in sessions]
    spent = {"everyone": 0.0, "own": 0.0, "clock": 0.0}
    for before, after in seconds:
        if before is None or after is None:
            return None
        for name in spent:
            spent[name] += after[name] - before[name]
    return max(0.0, spent["everyone"] - spent["own"]) / spent["clock"] if spent["clock"] > 0 else None


def describe_machine(environment: Mapping[str, JsonValue]) -> str:
    """One line for a table's hardware column: processor, usable cores, threads, GPUs, runtimes."""
    machine = Machine.model_validate(environment)
    cores = len(machine.affinity) if machine.affinity else machine.cores
    runtimes = ", ".join(f"{name} {version}" for name, version in machine.runtimes.items() if name != "numpy")
    gpus = [f"{gpu['name']} (driver {gpu['driver_version']})" for gpu in machine.gpus]
    limit = (
        []
        if machine.cpu_quota is None
        else [f"limited to {machine.cpu_quota:g} core{'' if machine.cpu_quota == 1 else 's'}"]
    )
    return ", ".join(
        [f"{machine.cpu}", f"{cores} usable cores", *limit, f"{machine.threads} thread(s)", *gpus, runtimes]
    )
