# SPDX-License-Identifier: Apache-2.0
"""What several benchmarks share: races, our programs, the PyTorch peer."""
