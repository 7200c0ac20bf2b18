"""Prompts of rerankers that are language models: the model's own chat template, or a fixed format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from millstream.broker.contract.errors import ModelUnavailable
from millstream.broker.contract.rerank import RerankOptions
from millstream.worker.models.reranking.pairs import Frame

_HEAD = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

_MARK = "\ue000"
"""Placeholder of a document: a character of private use, which no template contains."""


def qwen3_frame(question: RerankOptions) -> tuple[str, str]:
    """Returns the prompt that Qwen3-Reranker was trained with: "<Instruct>: ...", "<Query>: ...", "<Document>: ..."."""
    instruction = question.instruction or _INSTRUCTION
    return f"{_HEAD}<Instruct>: {instruction}\n<Query>: {question.query}\n<Document>: ", _TAIL


def likelihood_frame(question: RerankOptions) -> tuple[str, str]:
    """Returns the prompt of a reranker by query likelihood. It ends with the query."""
    head = f"{question.instruction}\nPassage: " if question.instruction else "Passage: "
    # Without spaces around it, a query has the same tokens however it was typed.
    return head, f"\nQuestion answered by this passage: {question.query.strip()}".rstrip()


def chat_frame(tokenizer: Any, prompt: str, settings: Mapping[str, object], name: str) -> Frame:
    """Returns the frame of a chat template, as sentence-transformers uses it.

    Query and document are messages of these roles. The instruction, or else the model's own `prompt`, is the system's
    message before them. Raises ModelUnavailable if the template drops query or document.
    """

    def render(question: RerankOptions, document: str) -> str:
        messages = [{"role": "query", "content": question.query}, {"role": "document", "content": document}]
        if system := question.instruction or prompt:
            messages.insert(0, {"role": "system", "content": system})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))

    def frame(question: RerankOptions) -> tuple[str, str]:
        head, _, tail = render(question, _MARK).rpartition(_MARK)
        return head, tail

    try:
        has_both = all(text in render(RerankOptions("mill?"), "stream!") for text in ("mill?", "stream!"))
    except (TemplateError, ValueError, TypeError):
        has_both = False
    if not has_both:
        raise ModelUnavailable(
            f"the chat template of {name!r} does not carry a query and a document",
            hint="give a reranker saved by sentence-transformers with its chat_template.jinja",
        )
    return frame
