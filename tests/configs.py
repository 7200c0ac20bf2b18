"""Texts of config.yaml that several tests read."""

from __future__ import annotations

USERS_FILE = """\
models:
  embedding_v1: {type: embedding, model_name: "all-MiniLM-L6-v2", device: "cpu"}
  reranker_v1:  {type: reranker,  model_name: "ms-marco-MiniLM-L6-v2"}
  llm_v1:       {type: llm,       model_name: "SmolLM2-135M"}
services:
  embedding_service:
    model: embedding_v1
    runtime: {batch_size: 64, batch_timeout: 0.01, max_queue_size: 500, worker_count: 4, queue_timeout: 0.05, \
inference_timeout: 0.3, total_timeout: 0.5, rate_limit: 100, enable_cache: true}
  reranker_service:
    model: reranker_v1
    runtime: {batch_size: 16, batch_timeout: 0.02, max_queue_size: 200, worker_count: 2, queue_timeout: 0.1, \
inference_timeout: 0.5, total_timeout: 0.8, rate_limit: 50, enable_cache: false}
  llm_service:
    model: llm_v1
    runtime: {batch_size: 4, batch_timeout: 0.05, max_queue_size: 50, worker_count: 1, queue_timeout: 0.2, \
inference_timeout: 2.0, total_timeout: 3.0, rate_limit: 10, enable_cache: false}
"""
"""The format as a user wrote it."""

SMALL = """\
models:
  m: {type: %s, model_name: some/model}
services:
  embed:
    model: m
    runtime: {%s}
"""
"""One service; to be filled in with its model's type and what stands in `runtime`."""
