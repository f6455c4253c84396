# SPDX-License-Identifier: Apache-2.0
"""Using a trained model: loading, sampling, constraints, published weights."""
