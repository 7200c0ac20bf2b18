"""A process that generates texts with OpenVINO GenAI: local_openvino.py '{"threads": 1, "folder": ..., ...}'.

It answers orders as local_generation.py does. Its Python is another one, with optimum-intel[openvino] and
openvino-genai: they need an older transformers. The model is exported to `home`, in float32. `slots`: texts at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
"""With bfloat16 it ended the process on a CPU with AMX (SIGFPE)."""


def exported(folder: Path, home: Path) -> Path:
    """Returns the folder in `home` that has the model in OpenVINO's form."""
    from openvino import save_model  # type: ignore[import-not-found, unused-ignore]
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-not-found, unused-ignore]
    from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    target = home / f"{folder.name}-openvino"
    if not (target / "openvino_tokenizer.xml").exists():
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(
            target
        )
        pair = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
        for name, part in zip(("openvino_detokenizer", "openvino_tokenizer"), reversed(pair), strict=True):
            save_model(part, target / f"{name}.xml")
    return target


class Pipeline:
    """The model in OpenVINO's continuous batching."""

    def __init__(self, folder: Path, threads: int, slots: int) -> None:
        import openvino_genai  # type: ignore[import-not-found, unused-ignore]

        self._library: Any = openvino_genai
        scheduler: Any = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = slots
        scheduler.max_num_batched_tokens = 512
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = False
        settings = SETTINGS | {"INFERENCE_NUM_THREADS": threads}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
        self._tokenizer: Any = self._pipeline.get_tokenizer()

    def run(self, requests: list[Any]) -> dict[str, Any]:
        import numpy as np
        from openvino import Tensor  # type: ignore[import-not-found, unused-ignore]

        began = time.perf_counter()
        handles = []
        for at, (prompt, tokens) in enumerate(requests):
            config = self._library.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
            ids = Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(at, ids, config))
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        made: list[list[int]] = [[] for _ in requests]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - began
            for at, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        made[at] += output.generated_ids
                    first.setdefault(at, now)
                    last[at] = now
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "first": [first[at] for at in range(len(requests))],
            "last": [last[at] for at in range(len(requests))],
            "text": [self._tokenizer.decode(ids) for ids in made],
        }


def main() -> None:
    orders = json.loads(sys.argv[1])
    # The libraries print to standard output, too: answers have a line of their own there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = exported(Path(orders["folder"]), Path(orders["home"]))
    pipeline = Pipeline(folder, orders["threads"], orders["slots"])
    for line in sys.stdin:
        answers.write(json.dumps(pipeline.run(json.loads(line)["requests"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
