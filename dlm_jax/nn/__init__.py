# SPDX-License-Identifier: Apache-2.0
"""Networks: matrix products, attention and the transformer. Only this package uses flax."""
