# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases by stem; each module has ``add_arguments(parser)`` and ``run(args, journal) -> rows``.

``COLUMNS``, where a module has it, are the columns of the printed table; the JSON has all.
"""
