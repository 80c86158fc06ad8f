"""One cell of a recipe's [bench]: what it depends on, what is recorded of it, and what may be required of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.devices.targets_toml import LocalSettings, named_target
from toolchain.errors import MeasurementError
from toolchain.measure.comparison import Comparison
from toolchain.measure.summary import summary
from toolchain.on_device.runner import fingerprint
from toolchain.targets import get_target


def runtime(target: str) -> list[str]:
    """The runtime and device of a target as they are now; what another one built or measured does not hold for it."""
    info = get_target(target).probe()
    return [info.runtime, info.version, info.device]


def conditions(target: str, threads: int) -> list[Any]:
    """What latency depends on besides the files: runtime, device, and the machine without what this process loaded."""
    machine = {name: fact for name, fact in fingerprint(threads)["machine"].items() if name != "runtimes"}
    return [runtime(target), machine]


def conditions_of(name: str, threads: int) -> list[Any]:
    """The same for a target that targets.toml may name; of one elsewhere, how it is reached.

    What runs there is in the result's fingerprint: a board that is off must not undo what was measured on it.
    """
    settings = named_target(name)
    if isinstance(settings, LocalSettings):
        return [*conditions(settings.runtime, threads), settings.affinity]
    return [settings.model_dump(mode="json")]


def cell_facts(target: str, found: Comparison) -> dict[str, Any]:
    """What the record of a run keeps of a comparison on a target: all but the raw samples."""
    record = {key: value for key, value in found.to_dict().items() if key not in ("raw", "raw_sha256", "parity")}
    scenario = found.scenario
    return {
        "target": target,
        "batch": scenario.batch,
        "threads": scenario.threads,
        "dense_ms": found.latency_ms("A"),
        "compressed_ms": found.latency_ms("B"),
        **record,
        "summary": summary(found),
    }


def conclusive(facts: Mapping[str, Any]) -> bool:
    """Whether a cell was measured well enough that it need not be measured again."""
    return facts["verdict"] not in ("invalid", "inconclusive")


def require_speedup(report: Mapping[str, Any], wanted: float) -> None:
    """Raises MeasurementError unless every measured cell verified at least this speedup."""
    if not report["bench"]:
        raise MeasurementError(f"a speedup of {wanted:g} was required, but the recipe measures nothing; add [bench]")
    for row in report["bench"]:
        found = row["verified_speedup_at_least"]
        if found is None or found < wanted:
            said = "no speedup was verified" if found is None else f"{found:.2f} was verified"
            raise MeasurementError(
                f"a speedup of {wanted:g} was required on {row['target']} (batch {row['batch']}, "
                f"{row['threads']} threads); {said} ({row['verdict']})"
            )
