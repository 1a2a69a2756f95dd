"""A sample of tests/fuzz/disk_faults.py: every kind of save on a disk that fails."""

from __future__ import annotations

import pytest

from tests.fuzz import disk_faults


@pytest.mark.slow
def test_no_fault_of_the_disk_loses_or_mixes_files():
    report = disk_faults.run(seconds=12, seed=0)
    assert report.findings == []
    assert all(report.tried.values())
    assert all(count > 40 for count in report.possible.values()), "the shim does not see the saves"


def test_a_save_that_writes_in_place_is_found():
    report = disk_faults.run(seconds=20, seed=0, names="written in place")
    found = "".join(report.findings)
    assert report.tried["written in place"] == report.possible["written in place"]
    assert "a fresh reader: JSONDecodeError" in found and "half, then SIGKILL at change" in found
