# SPDX-License-Identifier: Apache-2.0
"""How good a model is: measures of texts, control tasks, plots."""
