# SPDX-License-Identifier: Apache-2.0
"""Networks: matrix products, attention and the transformer; the one place of flax."""
