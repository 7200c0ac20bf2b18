"""Language models small enough to make in a test and run anywhere, but saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CONTEXT = 512
"""Tokens of prompt and text that a tiny language model has room for."""

SPREAD = 0.2
"""The deviation of random weights: with less, a text repeats one token."""

END = 0
"""Id of the end token."""

CHAT = """\
{%- for message in messages %}{{ '<' + message.role + '>: ' + message.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'answer:' }}{% endif %}"""

KINDS = ("llama", "grouped", "qwen3", "gpt2")

_TEXT = (
    "The mill turns in the stream, and the miller grinds the corn of the whole valley.",
    "Water falls on the wheel; 24 hours a day it turns. Who grinds at night? Nobody knows.",
    "水车在河里转动。磨坊主磨玉米。 Ünïcödé, 🌾 and 🌊 too.",
)


def save_language_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float64, *, context: int = CONTEXT, **settings: Any
) -> Path:
    """A random language model of one of KINDS, "qwen2" or "mistral", which has sliding windows. Byte-level BPE.

    `settings`: those of its config that differ.
    """
    tokenizer = _tokenizer(context)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _make(kind, len(tokenizer), context, settings).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=END)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path) -> Any:
    """The model as transformers loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval()


def reference_text(model: Any, prompt: list[int], most: int, **options: Any) -> list[int]:
    """The ids that transformers' own `generate` puts behind `prompt`; greedy."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, **options)
    return [int(each) for each in made[0, len(prompt) :]]


def _make(kind: str, vocabulary: int, context: int, chosen: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {"vocab_size": vocabulary, "initializer_range": SPREAD}
    settings |= {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=context, **settings))
    settings |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": context}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 4 if kind == "llama" else 2, **chosen}
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **settings))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**{"sliding_window": 16, **settings}))
    return LlamaForCausalLM(LlamaConfig(**settings))


def _tokenizer(context: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token="<|end|>", model_max_length=context
    )
    tokenizer.chat_template = CHAT
    return tokenizer
