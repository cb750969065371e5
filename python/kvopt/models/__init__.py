# SPDX-License-Identifier: Apache-2.0
"""What kvopt knows of models: loading them (``load``) and counting their bytes (``memory``)."""
