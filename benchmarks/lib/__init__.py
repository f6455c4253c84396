# SPDX-License-Identifier: Apache-2.0
"""Code that several benchmarks share: timing, the JAX and the PyTorch contender."""
