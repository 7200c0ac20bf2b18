"""A random Llama of a quarter of a million weights: the time of a step is then what the engine adds to the matrices.

No token of it is part of a character, so that each token shows at once.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
END = "<|end|>"
CONTEXT = 2_048
"""Longest text, in tokens."""


def save_tiny_llama(folder: Path) -> Path:
    """Saves the model in `folder`, the same each time, and returns it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    GenerationConfig.from_dict({"eos_token_id": 0, "pad_token_id": 0}).save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": CONTEXT}))
    (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each['content'] }}\n{% endfor %}")
    return folder


def _tokenizer() -> Tokenizer:
    """Returns a tokenizer that reads ASCII letter by letter."""
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    words = [f"Ġw{number}" for number in range(VOCABULARY - len(letters) - 1)]
    made = Tokenizer(models.BPE({token: at for at, token in enumerate([END, *letters, *words])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return made
