# SPDX-License-Identifier: Apache-2.0
"""The machine: checkpoints, devices and hosts, progress."""
