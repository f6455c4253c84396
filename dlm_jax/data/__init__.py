# SPDX-License-Identifier: Apache-2.0
"""From text to token ids: sources, tokenizers, the grammar, annotations."""
