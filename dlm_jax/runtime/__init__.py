# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, devices, hosts and progress reports."""
