"""Small tokenizers as language models have them, written down: training one breaks ties at random."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from millstream.worker.generation.settings import TextSettings

EOS = "<|end|>"
SPECIAL = ("<pad>", EOS, "<|im_start|>", "<|im_end|>")
WORDS = ("the", "mill", "stream", "turns", "wheel", "water", "miller", "水", "车", "end", "{", "}", '"', ":")

VOCABULARY = 400
"""Width of the logits: a little more than the tokens, as models pad it."""

CHATML = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no developer here') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments.city }}]"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few words, as GPT-2's: an emoji is four tokens. It has a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [piece for word in WORDS for piece, _ in splitter.pre_tokenize_str(word)]
    tokenizer = Tokenizer(_bpe([*SPECIAL, *alphabet], words, byte_fallback=False))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, chat_template=CHATML
    )


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer of words that begin with their space, as Llama's: unknown characters become tokens of one byte."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    alphabet = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer = Tokenizer(_bpe(alphabet, [f"▁{word}" for word in WORDS if word.isascii() and word.isalpha()]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]


def text_settings(
    tokenizer: PreTrainedTokenizerFast | None = None, context: int = 200, **generation: object
) -> TextSettings:
    """The settings of a model with this tokenizer, by default `byte_level`, and a generation config."""
    config = GenerationConfig(**generation)  # type: ignore[no-untyped-call]
    return TextSettings.of(tokenizer or byte_level(), VOCABULARY, context, config)


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """The token ids of a text."""
    return (tokenizer or byte_level()).backend_tokenizer.encode(text, add_special_tokens=False).ids


def _bpe(alphabet: list[str], words: list[str], byte_fallback: bool = True) -> models.BPE:
    """A model that joins the letters of each word from left to right, then the space before it with the word."""
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(alphabet))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for at in range(1, len(word)):
            if word[: at + 1] not in vocabulary:
                vocabulary[word[: at + 1]] = len(vocabulary)
                merges.append((word[:at], word[at]))
    if not byte_fallback:
        for word in words:
            vocabulary[f"Ġ{word}"] = len(vocabulary)
            merges.append(("Ġ", word))
    return models.BPE(vocabulary, merges, byte_fallback=byte_fallback, unk_token="<unk>" if byte_fallback else None)
