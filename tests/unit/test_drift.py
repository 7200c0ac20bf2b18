"""Changed vectors are told with how far and since when; the noise of other kernels is not."""

from __future__ import annotations

import numpy as np

from millstream.broker.queue.drift import TEXTS, Baseline, Floats, diagnose_drift

FLOAT32 = "minilm float32 1a2b"


def vectors(seed: int = 1, dim: int = 16) -> Floats:
    return np.random.default_rng(seed).normal(size=(len(TEXTS), dim)).astype(np.float32)


def baseline(fingerprint: str = FLOAT32) -> Baseline:
    return Baseline(vectors(), fingerprint, 1_700_000_000_000)


def test_equal_vectors_and_those_of_other_kernels_are_no_drift() -> None:
    noise = 1e-3 * vectors(2)

    assert diagnose_drift("docs", baseline(), vectors(), FLOAT32) is None
    assert diagnose_drift("docs", baseline(), vectors() + noise, "minilm float32 other") is None
    assert diagnose_drift("docs", baseline("minilm bfloat16 1"), vectors() + 50 * noise, "minilm bfloat16 1") is None


def test_one_changed_text_is_drift_and_says_how_far_and_since_when() -> None:
    changed = vectors()
    changed[2] = -changed[2]

    finding = diagnose_drift("docs", baseline(), changed, FLOAT32)

    assert finding
    assert (finding.severity, finding.service, finding.cause) == ("warning", "docs", "drift")
    assert finding.what == (
        "its vectors have changed since 2023-11-14T22:13:20Z: the cosine of a fixed text's vectors is -1.000; "
        f"the fingerprint of the weights is the same: {FLOAT32}"
    )


def test_other_weights_and_dimensions_are_named() -> None:
    finding = diagnose_drift("docs", baseline(), vectors(dim=8), "other float32 9")

    assert finding
    assert "they had 16 dimensions, and have 8; the weights were minilm float32 1a2b, and are other" in finding.what
