"""What prepacked linear layers gain: linear_layers.py prints the time of one layer, torch's own and ours, in turn.

The layers are those of MiniLM-L6 (384 wide) and of a large BERT (1,024 wide); rows are the tokens of a forward.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import nn

from millstream.worker.models.kernels.linear import Prepacked

LAYERS = ((384, 384, False), (384, 1_536, False), (384, 1_536, True), (1_536, 384, False), (1_024, 4_096, False))
"""Width, width of what comes out, and whether a GELU follows."""
ROWS = (4, 16, 64, 512, 2_048)
ROUNDS, ROUND_S = 7, 0.02


def seconds(run: Callable[[], object]) -> float:
    """Of one call, in the mean of a round."""
    calls, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < ROUND_S:
        run()
        calls += 1
    return passed / calls


def compared(layer: nn.Module, prepacked: Prepacked, rows: torch.Tensor) -> tuple[float, float, float]:
    """Microseconds of either, and how much faster ours is: medians of rounds in turn."""
    rounds = [(seconds(lambda: layer(rows)), seconds(lambda: prepacked(rows))) for _ in range(ROUNDS)]
    theirs, ours = (1e6 * statistics.median(each) for each in zip(*rounds, strict=True))
    return theirs, ours, statistics.median(one / other for one, other in rounds)


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    click.echo(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    click.echo("         layer   rows   torch us  prepacked us  times faster")
    with torch.inference_mode():
        for wide, out, gelu in LAYERS:
            linear = nn.Linear(wide, out)
            layer = nn.Sequential(linear, nn.GELU()) if gelu else linear
            prepacked, name = Prepacked(linear, gelu=gelu), f"{wide}x{out}{'+GELU' if gelu else ''}"
            for count in ROWS:
                theirs, ours, gain = compared(layer, prepacked, torch.randn(count, wide))
                click.echo(f"{name:>14} {count:>6} {theirs:>10.0f} {ours:>13.0f} {gain:>13.2f}")


if __name__ == "__main__":
    main()
