# SPDX-License-Identifier: Apache-2.0
"""The method: schedules, losses, samplers, guidance, likelihood; pure functions."""
