# SPDX-License-Identifier: Apache-2.0
"""What is installed here, which kernels run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass, field
from typing import Any

REQUIRED: dict[str, str | None] = {
    "torch": "2.11",
    "transformers": "5.3",
    "safetensors": "0.4",
    "numpy": None,
    "rich": None,
    "tqdm": None,
    "matplotlib": None,
}
OPTIONAL = {"pandas": "report.to_frame()"}


@dataclass
class Finding:
    """One thing that is missing or slower than it could be, and the command that mends it.

    ``blocks`` means that the main job can't run.
    """

    what: str
    mend: str
    blocks: bool


@dataclass
class Diagnosis:
    """What :func:`diagnose` found."""

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """Whether ``kvopt run`` can work."""
        return not any(finding.blocks for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "can_run": self.can_run,
            "versions": self.versions,
            "devices": self.devices,
            "kernels": self.kernels,
            "build": self.build,
            "findings": [vars(finding) for finding in self.findings],
        }


def diagnose() -> Diagnosis:
    """Looks at versions, devices, kernels and embedded files. Never raises for what it finds missing."""
    found = Diagnosis()
    found.versions["python"] = platform.python_version()
    _packages(found)
    if not any(finding.blocks for finding in found.findings):
        _kernels(found)
    _assets(found)
    return found


def _packages(found: Diagnosis) -> None:
    for name, least in REQUIRED.items():
        version = _version(name)
        found.versions[name] = version
        wanted = f"{name}>={least}" if least else name
        if version is None:
            found.findings.append(Finding(f"{name} is not installed", f"pip install '{wanted}'", True))
        elif least is not None and _numbers(version) < _numbers(least):
            found.findings.append(Finding(f"{name} {version} is too old", f"pip install -U '{wanted}'", True))
    for name, use in OPTIONAL.items():
        found.versions[name] = _version(name)
        if found.versions[name] is None:
            found.findings.append(Finding(f"{name} is not installed: no {use}", f"pip install {name}", False))


def _kernels(found: Diagnosis) -> None:
    """Devices, and what runs where; needs torch."""
    try:
        import torch

        import kvopt
        from kvopt.experiments.machine import cpu_name, ram_bytes, usable_cores

        build = kvopt.build_info()
    except Exception as error:
        mend = "pip install --force-reinstall --no-deps kvopt"
        found.findings.append(Finding(f"kvopt can't be imported: {error}", mend, True))
        return
    found.build = build
    found.versions = {"kvopt": build["kvopt"], **found.versions}
    ram = ram_bytes()
    memory = "" if ram is None else f", {ram / 2**30:.0f} GiB"
    found.devices.append(f"cpu: {cpu_name()}, {usable_cores()} cores{memory}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        found.devices.append(
            f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor}, {size:.0f} GiB"
        )

    compiled = bool(build["ops"])
    chosen = f"{build['isa_selected']} (compiled: {_listed(build['isa_compiled'])})"
    found.kernels["cpu"] = chosen if compiled else "slow reference in torch"
    archs = build["cuda_archs"]
    found.kernels["cuda"] = f"compiled for {_listed(archs)}" if archs else "none"
    if not compiled:
        mend = "install a C++ compiler, then: pip install --force-reinstall --no-deps kvopt (in a clone: .)"
        found.findings.append(Finding("the compiled operators are missing: kvopt runs, slowly", mend, False))
    elif torch.cuda.is_available() and not archs:
        mend = "install the CUDA toolkit (nvcc), then in a clone: KVOPT_CUDA=ON pip install --no-deps ."
        found.findings.append(Finding("a GPU is there, but kvopt was built without CUDA", mend, False))
    for sentence in build["missing"]:
        if not any(sentence == finding.what for finding in found.findings):
            found.findings.append(Finding(str(sentence), "", False))
    if torch.version.cuda is None and _nvidia_driver():
        mend = "see https://pytorch.org/get-started/locally for the CUDA build of torch"
        found.findings.append(
            Finding("an NVIDIA driver is there, but torch was built without CUDA", mend, False)
        )


def _assets(found: Diagnosis) -> None:
    from kvopt import assets

    for name in assets.missing():
        mend = "pip install --force-reinstall --no-deps kvopt"
        found.findings.append(Finding(f"the embedded {name} is missing", mend, True))


def print_diagnosis(found: Diagnosis) -> None:
    """Prints a diagnosis for people, on stdout, without needing any package."""
    print(
        "versions   " + ", ".join(f"{name} {version or '(none)'}" for name, version in found.versions.items())
    )
    for device in found.devices:
        print(f"device     {device}")
    for device, path in found.kernels.items():
        print(f"kernels    {device}: {path}")
    for finding in found.findings:
        mend = f"\n           → {finding.mend}" if finding.mend else ""
        print(f"{'MISSING ' if finding.blocks else 'note    '}   {finding.what}{mend}")
    print(
        "kvopt run can work here"
        if found.can_run
        else "kvopt run can NOT work here: mend what is MISSING above"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` → ``(2, 11, 0)``."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _listed(values: Any) -> str:
    return values if isinstance(values, str) else ", ".join(map(str, values))


def _nvidia_driver() -> bool:
    from pathlib import Path

    return Path("/proc/driver/nvidia/version").exists()
