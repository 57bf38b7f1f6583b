"""Which CPU cores the servers of one machine get."""

import os

import pytest

from art_backend_local.servers.devices import cores_of_replicas


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no processes to cores")
def test_several_servers_share_the_cores_and_never_the_same_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 5, 8, 9, 11})
    assert cores_of_replicas(1) == [()]
    assert cores_of_replicas(2) == [(1, 2, 3), (5, 8, 9)]
    assert cores_of_replicas(7) == [(1,), (2,), (3,), (5,), (8,), (9,), (11,)]
    # More servers than cores: the system has to share them out.
    assert cores_of_replicas(8) == [()] * 8
