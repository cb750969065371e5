# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases by stem; each module has ``add_arguments(parser)`` and ``run(args) -> list of rows``."""
