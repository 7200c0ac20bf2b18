"""Cost of a forward on this device, and its limits: measured at warm-up, corrected by each forward."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import replace

from millstream.worker.scheduling.batcher import Budget

NEW_WEIGHT = 0.2
"""Weight of the latest forward in the running mean of its size; in that of all sizes, if it was a full one."""


class ForwardCost:
    """Cost and limits of one process's forwards; thread-safe.

    `budget`: the limits of a forward, and its fixed cost in tokens. `seconds_per_token`: that of full forwards, 0.0
    until one is measured. `smallest_s`: seconds that the smallest forward takes, infinite until it is measured.
    `job_s`: mean seconds of a job in the model, 0.0 until one is measured.

    A small forward says little about a large one: its tokens are dearer, by more than a fixed cost explains. So each
    size, a power of two, has a mean of its own. One that was not measured has that of the nearest size.
    """

    def __init__(self, budget: Budget) -> None:
        self._lock = threading.Lock()
        self._cap = sys.maxsize
        self._inference_s: float | None = None
        self._by_size: dict[int, float] = {}
        self.budget = budget
        self.seconds_per_token = 0.0
        self.smallest_s = math.inf
        self.job_s = 0.0

    def limit(self, rows: int, tokens: int, inference_timeout_s: float | None = None) -> None:
        """Applies changed limits, from the next micro-batch on."""
        with self._lock:
            self.budget = replace(self.budget, rows=rows, tokens=min(tokens, self._cap))
            self._inference_s = inference_timeout_s

    def cap(self, tokens: int) -> bool:
        """Limits every later forward to `tokens`, padding included, also after a push; True if that lowers the cap."""
        with self._lock:
            lowers = tokens < self._cap
            self._cap = min(self._cap, tokens)
            self.budget = replace(self.budget, tokens=min(self.budget.tokens, self._cap))
            return lowers

    def calibrate(self, seconds_per_token: float, overhead: float, smallest_s: float) -> None:
        """Applies the measurements of warm-up; `overhead` in tokens."""
        with self._lock:
            self.budget = replace(self.budget, overhead=overhead)
            self.seconds_per_token = seconds_per_token
            self._by_size = {self.budget.tokens.bit_length(): seconds_per_token}
            self.smallest_s = smallest_s

    def resume(self, earlier: ForwardCost) -> None:
        """Applies what another instance measured of the same model on this device."""
        with self._lock:
            self._cap = earlier._cap
            tokens = min(self.budget.tokens, self._cap)
            self.budget = replace(self.budget, tokens=tokens, overhead=earlier.budget.overhead)
            self.seconds_per_token, self.smallest_s = earlier.seconds_per_token, earlier.smallest_s
            self._by_size = dict(earlier._by_size)
            self.job_s = earlier.job_s

    def observe(self, computed: int, seconds: float) -> None:
        """Corrects the cost of a token by a forward over `computed` tokens, padding included."""
        rate = seconds / (computed + self.budget.overhead)
        known, before = self.per_token_s(computed) or rate, self.seconds_per_token or rate
        self._by_size[computed.bit_length()] = known + NEW_WEIGHT * (rate - known)
        self.seconds_per_token = before + NEW_WEIGHT * min(1.0, computed / self.budget.tokens) * (rate - before)

    def observe_job(self, seconds: float) -> None:
        """Corrects the time of a job by one that was in the model for `seconds`."""
        self.job_s += NEW_WEIGHT * (seconds - self.job_s) if self.job_s else seconds

    def per_token_s(self, computed: int) -> float:
        """Seconds of a token in a forward over `computed` tokens, by those of about its size; 0.0 without any."""
        size = computed.bit_length()
        nearest = min(self._by_size, key=lambda each: (abs(each - size), -each), default=None)
        return self.seconds_per_token if nearest is None else self._by_size[nearest]

    def predicted_s(self, computed: int) -> float:
        """Predicted seconds of a forward over `computed` tokens; 0.0 until one is measured."""
        return self.per_token_s(computed) * (computed + self.budget.overhead)

    def tokens_in(self, seconds: float) -> int:
        """Tokens that run in `seconds`; 0 until a forward is measured."""
        return round(seconds / self.seconds_per_token) if self.seconds_per_token else 0

    def one_forward(self) -> Budget:
        """The budget, reduced until the predicted time of a forward is at most half the inference timeout.

        Tokens are not reduced below `overhead`: smaller forwards would spend most of their time on their fixed cost.
        """
        budget = self.budget
        if self._inference_s is None or not self.seconds_per_token:
            return budget
        fitting = self._inference_s / 2 / self.seconds_per_token - budget.overhead
        return replace(budget, tokens=min(budget.tokens, round(max(budget.overhead, fitting))))
