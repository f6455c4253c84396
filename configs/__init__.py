# SPDX-License-Identifier: Apache-2.0
"""The bundled run configs; installed, this package is `dlm_jax.configs`."""
