"""Random models of many architectures, each of a few kilobytes, and tokenizers to go with them.

Weights are spread widely: with the libraries' own spread, random models give nearly the same for all texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

POSITIONS = 640
"""The longest text that these models read, in tokens."""

WORDS = (
    "the",
    "a",
    "mill",
    "miller",
    "stream",
    "turns",
    "grinds",
    "corn",
    "wheel",
    "water",
    "who",
    "is",
    "12",
    "yes",
    "no",
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!<|>/"
_PAD, _CLS, _SEP, _MASK = 0, 2, 3, 4

_USUAL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
_ROTARY = {**_USUAL, "num_key_value_heads": 1}
_OFFSET = {**_USUAL, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}
_DISENTANGLED = {**_USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_ONE_GROUP = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
_STRETCH = {"rope_theta": 1e4}
_LONG = {**_STRETCH, "original_max_position_embeddings": 16}

ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _USUAL),
    "roberta": ("roberta", _OFFSET),
    "xlm-roberta": ("xlm-roberta", _OFFSET),
    "camembert": ("camembert", _OFFSET),
    "distilbert": (
        "distilbert",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": POSITIONS},
    ),
    "mpnet": ("mpnet", {**_USUAL, "max_position_embeddings": POSITIONS + 2}),
    "electra": ("electra", {**_USUAL, "embedding_size": 16}),
    "albert": ("albert", {**_USUAL, "embedding_size": 16}),
    "deberta": ("deberta", _DISENTANGLED),
    "deberta-v2": ("deberta-v2", _DISENTANGLED),
    "modernbert": ("modernbert", {**_USUAL, "local_attention": 8}),
    "xlnet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "t5": ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
    "longformer": ("longformer", {**_OFFSET, "attention_window": 8}),
    "roformer": ("roformer", {**_USUAL, "embedding_size": 16}),
    "esm": ("esm", {**_OFFSET, "token_dropout": True, "emb_layer_norm_before": False}),
    "nomic_bert": ("nomic_bert", _USUAL),
    "squeezebert": ("squeezebert", {**_USUAL, "embedding_size": 16, **_ONE_GROUP}),
    "fnet": ("fnet", {key: value for key, value in _USUAL.items() if key != "num_attention_heads"}),
    "nystromformer": ("nystromformer", {**_USUAL, "num_landmarks": 8, "segment_means_seq_len": 8}),
    "convbert": ("convbert", {**_USUAL, "embedding_size": 16, "conv_kernel_size": 3}),
    "yoso": ("yoso", _USUAL),
    "big_bird": ("big_bird", {**_USUAL, "block_size": 4, "num_random_blocks": 1}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}),
    "qwen3": ("qwen3", {**_ROTARY, "head_dim": 8}),
    "llama": ("llama", _ROTARY),
    "mistral": ("mistral", {**_ROTARY, "sliding_window": 5}),
    "gemma2": ("gemma2", {**_ROTARY, "head_dim": 8, "sliding_window": 5}),
    "mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "rope, dynamic": (
        "llama",
        {
            **_ROTARY,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_STRETCH},
        },
    ),
    "rope, long": (
        "phi3",
        {
            **_ROTARY,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                **_STRETCH,
            },
        },
    ),
}
"""By name: the type of model, as transformers calls it, and what differs from its own settings."""

CLASSIFIERS = (
    *(
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
        "mpnet",
        "electra",
        "albert",
        "deberta",
        "deberta-v2",
    ),
    *("modernbert", "xlnet", "longformer", "roformer", "squeezebert", "fnet", "convbert", "gpt2", "qwen3", "llama"),
)
"""Those that have a sequence classifier."""

CAUSAL = (
    *("gpt2", "qwen3", "llama", "mistral", "gemma2", "mamba", "bloom", "rope, dynamic", "rope, long"),
    *("opt", "gpt_neox", "qwen2", "phi", "bart", "rwkv", "falcon"),
)
"""Those that predict the next token."""

_MORE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "opt",
        {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32},
            **{"max_position_embeddings": POSITIONS, "word_embed_proj_dim": 16},
        },
    ),
    "gpt_neox": ("gpt_neox", _USUAL),
    "qwen2": ("qwen2", _ROTARY),
    "phi": ("phi", _USUAL),
    "falcon": ("falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "rwkv": ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 32}),
    "bart": (
        "bart",
        {
            **{"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
            **{"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
            **{"max_position_embeddings": POSITIONS, "is_decoder": True, "is_encoder_decoder": False},
        },
    ),
}
_OF_TASK = {"embed": "AutoModel", "classify": "AutoModelForSequenceClassification", "predict": "AutoModelForCausalLM"}


def tokenizer_of(padding_side: str, positions: int = POSITIONS) -> PreTrainedTokenizerFast:
    """WordPiece over WORDS and letters, with the second text of a pair told from the first."""
    vocabulary = list(dict.fromkeys([*_SPECIAL, *WORDS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]))
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", _CLS), ("[SEP]", _SEP)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, mask_token="[MASK]", model_max_length=positions, padding_side=padding_side, **names
    )


def save_net(folder: Path, name: str, task: str, padding_side: str, **settings: Any) -> Path:
    """The model of that name for "embed", "classify" or "predict", and its tokenizer, as transformers saves them."""
    kind, own = {**ENCODERS, **_MORE}[name]
    tokenizer = tokenizer_of(padding_side)
    tokens = {"pad_token_id": _PAD, "bos_token_id": _CLS, "eos_token_id": _SEP, "cls_token_id": _CLS}
    more = {"sep_token_id": _SEP, "mask_token_id": _MASK, "vocab_size": len(tokenizer)}
    if task == "classify":
        more["num_labels"] = 1
    config = AutoConfig.for_model(kind, **{**tokens, **more, **own, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = getattr(transformers, _OF_TASK[task]).from_config(config)
        for weights in net.parameters():
            if weights.dim() > 1:
                torch.nn.init.normal_(weights, std=0.4)
        net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
