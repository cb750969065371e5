# SPDX-License-Identifier: Apache-2.0
"""Prints the folder of the torch package that this interpreter's environment has; exit 1 if there is none.

torch is not imported (that takes seconds, and inside an isolated build it is not importable): only folders are
looked at.
"""

import site
import sys
import sysconfig
from pathlib import Path

paths = sysconfig.get_paths()
folders = [paths["purelib"], paths["platlib"], *site.getsitepackages([sys.prefix])]
config = Path(sys.prefix) / "pyvenv.cfg"
if config.is_file() and "include-system-site-packages = true" in config.read_text().lower():
    folders += site.getsitepackages([sys.base_prefix])
folders.append(site.getusersitepackages())

for folder in folders:
    torch = Path(folder) / "torch"
    if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        print(torch)
        sys.exit(0)
sys.exit(1)
