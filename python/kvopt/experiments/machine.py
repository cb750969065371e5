# SPDX-License-Identifier: Apache-2.0
"""The machine that a measurement was made on: a number without it means nothing."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Hardware and versions. ``ram_bytes`` is ``None`` where the system doesn't tell; no host or user names."""

    cpu: str
    cores: int
    threads: int
    ram_bytes: int | None
    gpus: tuple[str, ...]
    os: str
    python: str
    torch: str
    transformers: str
    kvopt: str
    isa: str | None
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "gpus": list(self.gpus)}

    def __str__(self) -> str:
        """One line for a figure's title."""
        where = ", ".join(self.gpus) if self.gpus else f"{self.cpu}, {self.threads} threads"
        return f"{where} · torch {self.torch} · {self.date[:10]}"


def stamp() -> Machine:
    """Describes this machine now."""
    import torch
    import transformers

    import kvopt

    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    selected = kvopt.build_info().get("isa_selected")
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        ram_bytes=ram_bytes(),
        gpus=gpus,
        os=f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        kvopt=kvopt.__version__,
        isa=None if selected is None else str(selected),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where that is not told."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return " ".join(line.split(":", 1)[1].replace("(R)", "").replace("(TM)", "").split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def ram_bytes() -> int | None:
    """Installed memory in bytes, or ``None`` where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
