# SPDX-License-Identifier: Apache-2.0
"""Converts text to token ids: sources, tokenizers, the grammar, annotations."""
