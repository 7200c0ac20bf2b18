"""Models small enough to make in a test and run anywhere, but saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

TINY_DIM = 16
TINY_LIMIT = 32
"""The longest text the tiny model reads, in tokens."""

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-'水车磨坊"
_WORDS = ["the", "stream", "turns", "mill", "a", "miller", "grinds", "corn", "##s", "##ing", "##ed"]


def save_tiny_model(folder: Path) -> Path:
    """A sentence-transformers model: a random BERT of one layer, mean pooling, WordPiece. The same each time.

    Its vocabulary is written down: training one breaks ties at random, and the lengths of texts with them.
    """
    bert = folder / "bert"
    config = tiny_bert(bert)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(bert)
    SentenceTransformer(str(bert), device="cpu").save(str(folder / "model"))
    return folder / "model"


def tiny_bert(folder: Path, **settings: Any) -> BertConfig:
    """The configuration of a BERT of one layer, whose tokenizer is saved in `folder`."""
    folder.mkdir(parents=True)
    vocabulary = list(dict.fromkeys([*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *_WORDS]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer.from_pretrained(folder, model_max_length=TINY_LIMIT).save_pretrained(folder)
    return BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=TINY_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=TINY_LIMIT,
        **settings,
    )
