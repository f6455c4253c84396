# SPDX-License-Identifier: Apache-2.0
"""The storm of `faults`, shortened."""

import faults
import pytest

pytestmark = pytest.mark.slow


def test_a_storm_of_kills_changes_no_bit(tmp_path):
    report = faults.storm(tmp_path, kills=4, in_saves=2)
    assert report.kills >= 4
    assert report.in_saves >= 2
    assert report.redone > 0
