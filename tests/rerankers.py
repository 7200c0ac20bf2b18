"""Rerankers small enough to make in a test and run anywhere, but saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import tiny_bert
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

SPREAD = 0.5
"""The deviation of random weights: with less, all scores were nearly the same."""

JUDGE_LIMIT = 512
"""The longest prompt a tiny judge reads, in tokens."""

WORDS = ("mill", "stream", "turns", "corn", "miller", "grinds", "the", "a")
"""One token each, to the tiny cross-encoder."""

CHAT = """\
{%- for message in messages %}{{ '<' + message.role + '>: ' + message.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'answer:' }}{% endif %}"""

_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def save_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A random BERT with a classifier, WordPiece."""
    config = tiny_bert(folder, num_labels=labels, initializer_range=SPREAD)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_bi_encoder(folder: Path, model: Path) -> Path:
    """The embedding model in `model`, with a prompt for queries and another for documents."""
    encoder = SentenceTransformer(str(model), device="cpu", prompts={"query": "stream ", "document": "mill "})
    encoder.save(str(folder))
    return folder


def save_judge(folder: Path, kind: str, answers: str = "yes no") -> Path:
    """A random language model: "qwen3", which turns its positions, or "gpt2", which learned them. Byte-level BPE.

    The words of `answers` are tokens of its vocabulary.
    """
    tokenizer = _tokenizer(answers)
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(tokenizer), "initializer_range": SPREAD / 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(_qwen3(size)) if kind == "qwen3" else GPT2LMHeadModel(_gpt2(size))
        model.save_pretrained(folder)
    return folder


def save_chatting_classifier(folder: Path) -> Path:
    """A random language model with a classifier for its last token, asked through a chat template."""
    tokenizer = _tokenizer("yes no")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(tokenizer), "initializer_range": SPREAD / 2, "num_labels": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Qwen3ForSequenceClassification(_qwen3(size))  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
    return folder


def save_chatting_judge(folder: Path, judge: Path) -> Path:
    """The language model in `judge` as a cross-encoder of sentence-transformers, with a chat template and a prompt."""
    settings: dict[str, Any] = {"chat_template": {"add_generation_prompt": True}}
    transformer = Transformer(
        str(judge),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": CHAT},
        processing_kwargs=settings,
    )
    yes, no = transformer.tokenizer.convert_tokens_to_ids(["yes", "no"])
    modules = [transformer, LogitScore(true_token_id=yes, false_token_id=no)]
    encoder = CrossEncoder(modules=modules, prompts={"task": "find the corn"}, default_prompt_name="task", device="cpu")
    encoder.save(str(folder))
    return folder


def _tokenizer(answers: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([answers, *(f"{word} {word}" for word in WORDS)] * 8, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, pad_token="<|pad|>", model_max_length=JUDGE_LIMIT
    )


def _qwen3(settings: dict[str, Any]) -> Qwen3Config:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    width: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return Qwen3Config(max_position_embeddings=JUDGE_LIMIT, **heads, **width, **settings)


def _gpt2(settings: dict[str, Any]) -> GPT2Config:
    return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=JUDGE_LIMIT, **settings)
