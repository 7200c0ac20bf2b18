"""A plain torch.nn.Module as a service: rows of numbers in, a label and its probability out.

models:
  flowers: {type: custom, handler: "torch_module:Flowers", device: cpu}
services:
  flowers: {model: flowers, runtime: {batch_size: 256, worker_count: 2}}
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES, LABELS = 4, ("setosa", "versicolor", "virginica")
WEIGHTS = Path(os.environ.get("FLOWERS_WEIGHTS", "flowers.pt"))
"""What torch.save(net.state_dict(), "flowers.pt") wrote, in the folder where the workers start."""


class Net(nn.Module):
    """Logits [rows, labels] of features [rows, FEATURES]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, len(LABELS)))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits


class Flowers:
    """One for each worker process."""

    def set_up(self, device: str | None) -> None:
        """Load the weights, once. `weights_only` keeps a file from bringing code: a pickle could run anything."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.net = Net()
        self.net.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
        # Without dropout and with the statistics of batch norm as they were learned: a row's answer is its own.
        self.net.to(self.device).eval()

    def check(self, payload: list[float]) -> None:
        """What no neighbour is to suffer from: a list of another length would make the tensor ragged."""
        if not isinstance(payload, list) or len(payload) != FEATURES:
            raise ValueError(f"a flower is a list of {FEATURES} numbers")

    def __call__(self, payloads: list[list[float]]) -> list[dict[str, object]]:
        with torch.inference_mode():
            features = torch.tensor(payloads, dtype=torch.float32, device=self.device)
            chances, labels = self.net(features).softmax(dim=-1).max(dim=-1)
        # One copy from the device for all rows.
        pairs = zip(labels.tolist(), chances.tolist(), strict=True)
        return [{"label": LABELS[label], "probability": chance} for label, chance in pairs]
