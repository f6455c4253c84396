# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model: text metrics, control tasks and plots."""
