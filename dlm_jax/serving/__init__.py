# SPDX-License-Identifier: Apache-2.0
"""A web page and a JSON API for one model: `dlm serve --model e2e`."""
