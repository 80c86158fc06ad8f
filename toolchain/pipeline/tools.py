"""What carries out the stages of a run, and how it differs from what carried them out before."""

from __future__ import annotations

import PIL
import timm
import torch

from toolchain.records import Record
from toolchain.version import tool


class Tools(Record):
    """What the outcome of every stage depends on beside its inputs.

    Attributes:
        slimvit: name and version.
        sources: digest of its sources.
        torch, timm: their versions.
        pillow: its version, which decodes and resizes pictures; "" in a record that does not tell.
        threads: of torch; sums over many numbers are added up in another order by another number of them.
    """

    slimvit: str
    sources: str
    torch: str
    timm: str
    pillow: str = ""
    threads: int

    @staticmethod
    def now(sources: str) -> Tools:
        """What is here now."""
        return Tools(
            slimvit=tool(),
            sources=sources,
            torch=torch.__version__,
            timm=timm.__version__,
            pillow=PIL.__version__,
            threads=torch.get_num_threads(),
        )

    def other_than(self, before: Tools) -> str:
        """What differs from before, in words; "" where nothing does."""
        told = [
            f"{name} is {now}, it was {then}"
            for name, now, then in (
                ("slimvit", self.slimvit.removeprefix("slimvit "), before.slimvit.removeprefix("slimvit ")),
                ("torch", self.torch, before.torch),
                ("timm", self.timm, before.timm),
                ("Pillow", self.pillow, before.pillow or self.pillow),
                ("the number of threads (OMP_NUM_THREADS)", self.threads, before.threads),
            )
            if now != then
        ]
        if self.sources != before.sources and self.slimvit == before.slimvit:
            told.append("the sources of slimvit have changed")
        return "; ".join(told)
