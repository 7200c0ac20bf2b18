"""The scripts keep their contracts on a real server."""

from __future__ import annotations

import pytest
from contracts.cancel import CancelContract
from contracts.claim import ClaimContract
from contracts.dead import DeadLettersContract
from contracts.detached import DetachedContract, WebhookContract
from contracts.emit import EmitContract
from contracts.enqueue import EnqueueContract
from contracts.lease import BeatContract, BellContract, LivenessContract, ReclaimContract, ReleaseContract
from contracts.look import LookContract
from contracts.metrics import MetricsContract
from contracts.pause import PauseContract, PurgeContract
from contracts.queue import Queue
from contracts.rate import RateContract
from contracts.settle import SettleContract
from contracts.slots import SlotsContract
from contracts.suspects import SuspectsContract

from millstream.broker.contract.keys import ServiceKeys
from millstream.broker.transport.connection import Connection


@pytest.fixture
def queue(connection: Connection, service: str) -> Queue:
    opened = Queue(connection.client, ServiceKeys(service))
    opened.open()
    return opened


class TestEnqueue(EnqueueContract):
    pass


class TestRate(RateContract):
    pass


class TestClaim(ClaimContract):
    pass


class TestSuspects(SuspectsContract):
    pass


class TestSlots(SlotsContract):
    pass


class TestLook(LookContract):
    pass


class TestSettle(SettleContract):
    pass


class TestEmit(EmitContract):
    pass


class TestMetrics(MetricsContract):
    pass


class TestBell(BellContract):
    pass


class TestBeat(BeatContract):
    pass


class TestLiveness(LivenessContract):
    pass


class TestRelease(ReleaseContract):
    pass


class TestReclaim(ReclaimContract):
    pass


class TestCancel(CancelContract):
    pass


class TestDetached(DetachedContract):
    pass


class TestWebhooks(WebhookContract):
    pass


class TestPause(PauseContract):
    pass


class TestPurge(PurgeContract):
    pass


class TestDeadLetters(DeadLettersContract):
    pass
