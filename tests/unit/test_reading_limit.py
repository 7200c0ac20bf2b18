"""The longest text a model reads is found by running it: for every make of positions, whatever its files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from embedders import save_prompted, save_routed, save_static
from models import TINY_LIMIT
from rerankers import save_bi_encoder, save_cross_encoder, save_judge
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from millstream.broker.config.spec import ModelSpec
from millstream.broker.contract.errors import MillstreamError, ModelUnavailable
from millstream.broker.contract.job import Json
from millstream.worker.models.base import ANY_LENGTH, Limit, Prepared
from millstream.worker.models.embedding.embedding import EmbeddingModel
from millstream.worker.models.embedding.tokens import text_of
from millstream.worker.models.loading.limits import MOST, count_positions, find_limit, stretch
from millstream.worker.models.reranking.reranker import load_reranker

POSITIONS = 40
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MAKES: list[tuple[str, dict[str, Any]]] = [
    ("Bert", {}),
    ("Roberta", {}),
    ("XLMRoberta", {}),
    ("Camembert", {}),
    ("Roberta", {"pad_token_id": 7}),
    ("MPNet", {}),
    ("DistilBert", {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}),
    ("Electra", {}),
    ("Albert", {"embedding_size": 8}),
    ("Deberta", {"position_biased_input": True, "pos_att_type": [], "relative_attention": False}),
    ("DebertaV2", {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("Esm", {"position_embedding_type": "absolute", "mask_token_id": 4}),
    ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}),
    ("OPT", {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    ("GPTNeo", {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}),
    ("ModernBert", {"cls_token_id": 0, "sep_token_id": 2}),
    ("Llama", {"num_key_value_heads": 2}),
    ("Bloom", {"n_layer": 1, "n_head": 2}),
    ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "max_position_embeddings": None}),
]

Forward = Callable[[int], object]


def made(name: str, settings: dict[str, Any]) -> Forward:
    """The forward of a random model over one text of so many tokens."""
    own = {key: value for key, value in {**SMALL, **settings}.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**own)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()

    def forward(tokens: int) -> object:
        with torch.inference_mode():
            return model(input_ids=torch.full((1, tokens), 5))

    return forward


def longest(forward: Forward, beyond: int) -> int:
    """The most tokens that run, below `beyond`."""
    for tokens in range(5, beyond):
        try:
            forward(tokens)
        except (IndexError, RuntimeError):
            return tokens - 1
    return beyond - 1


@pytest.mark.parametrize(("name", "settings"), MAKES, ids=[f"{name} {at}" for at, (name, _) in enumerate(MAKES)])
def test_the_limit_is_the_longest_text_that_runs_for_every_make_of_positions(
    name: str, settings: dict[str, Any]
) -> None:
    forward = made(name, settings)
    truth = longest(forward, 2 * POSITIONS + 1)

    limit = find_limit(2 * POSITIONS, forward, None)

    assert limit == Limit(truth, truth)
    # Known without a text that is too long: on CUDA that would end the process.
    known = count_positions(forward)
    assert known == (None if truth == 2 * POSITIONS else truth)


def test_relative_positions_have_no_limit() -> None:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model: Any = transformers.T5EncoderModel(config)

    assert count_positions(lambda tokens: model(input_ids=torch.full((1, tokens), 5))) is None


class Table:
    """A model whose forward over more than `room` tokens fails without a look-up, and moves its clock on."""

    def __init__(self, room: int, token_s: float = 0.0, error: Exception | None = None) -> None:
        self.ran: list[int] = []
        self.now = 0.0
        self._room, self._token_s = room, token_s
        self._error = error or ValueError("too long")

    def forward(self, tokens: int) -> None:
        self.now += self._token_s * tokens
        if tokens > self._room:
            raise self._error
        self.ran.append(tokens)


def test_a_limit_that_no_look_up_shows_is_found_by_running() -> None:
    model = Table(room=77)

    assert find_limit(512, model.forward, None) == Limit(77, 77)
    with pytest.raises(ModelUnavailable, match=r"max_length is 512, and the model reads at most 77 tokens"):
        find_limit(512, model.forward, 512)


def test_the_search_for_the_longest_text_ends_after_10_seconds(caplog: pytest.LogCaptureFixture) -> None:
    model = Table(room=77)

    def forward(tokens: int) -> None:
        model.now += 6.0 * (tokens > 77)
        model.forward(tokens)

    assert find_limit(512, forward, None, lambda: model.now) == Limit(64, 64)
    assert model.now == 18.0
    assert "64 tokens run, 80 do not" in caplog.text


def test_an_empty_look_up_shows_no_limit() -> None:
    """Of tables that some models look up for parts that a short text lacks."""
    table = torch.nn.Embedding(POSITIONS, 4)

    def forward(tokens: int) -> object:
        return table(torch.empty(1, 0, dtype=torch.long)), table(torch.arange(tokens)[None])

    assert count_positions(forward) == POSITIONS


@pytest.mark.parametrize("named", [40_000, 10**30])
def test_a_very_long_limit_is_not_run_whole(named: int) -> None:
    model = Table(room=10**40)

    limit = find_limit(named, model.forward, None)

    assert limit == Limit(min(named, ANY_LENGTH), MOST)
    assert max(model.ran) == MOST


def test_no_forward_starts_that_would_take_seconds() -> None:
    model = Table(room=10**6, token_s=1 / 128)

    assert find_limit(512, model.forward, None, lambda: model.now) == Limit(512, 128)


def test_a_limit_that_has_no_room_in_memory_is_kept_and_said() -> None:
    model = Table(room=100, error=MemoryError())

    limit = find_limit(512, model.forward, None)

    assert limit == Limit(512, 64)
    assert str(limit) == "512 tokens a text, 64 were tried"


def test_a_device_that_asserted_is_not_asked_again() -> None:
    model = Table(room=100, error=RuntimeError("CUDA error: device-side assert triggered"))

    with pytest.raises(ModelUnavailable, match=r"the model cannot read 128 tokens.*smaller max_length"):
        find_limit(512, model.forward, None)
    assert model.now == 0.0


def test_limits_are_said_in_words() -> None:
    assert str(Limit(512, 512)) == "512 tokens a text"
    assert str(Limit(32_768, 2_048)) == "32768 tokens a text, 2048 were tried"
    assert str(Limit(ANY_LENGTH, 2_048)) == "texts of any length"


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_a_short_text_is_stretched_to_any_length_between_its_special_tokens(tokens: int) -> None:
    made = stretch([0, 7, 2], tokens)

    assert len(made) == tokens
    assert made.count(7) == max(1, tokens - 2)
    assert made[-1] in (2, 7)


@pytest.mark.parametrize("a_word", [1, 2, 3])
@pytest.mark.parametrize("special", [0, 2])
def test_a_sample_never_has_more_tokens_than_asked(a_word: int, special: int) -> None:
    def count(text: str) -> int:
        # A tokenizer may make a token of a space at the end.
        return special + a_word * len(text.split()) + text.endswith(" ")

    for tokens in (2, 3, 16, 62, 128):
        counted = count(text_of(tokens, count))
        assert tokens - a_word < counted <= tokens or counted == special


def of(folder: Path, **settings: Any) -> EmbeddingModel:
    spec = ModelSpec.model_validate({"type": "embedding", "model_name": str(folder), **settings})
    return EmbeddingModel(spec, "cpu", 1, "end")


def reranker(folder: Path, **settings: Any) -> Any:
    spec = ModelSpec.model_validate({"type": "reranker", "model_name": str(folder), **settings})
    return load_reranker(spec, "cpu", 1, "end")


@pytest.fixture
def roberta(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of 40 positions, of which texts have 38; its tokenizer names no limit."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_max_length=10**30)
    tokenizer.save_pretrained(tmp_path / "raw")
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**{**SMALL, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "raw")
    SentenceTransformer(str(tmp_path / "raw"), device="cpu").save(str(tmp_path / "roberta"))
    return tmp_path / "roberta"


def rows(model: Any, texts: Sequence[Json], **options: Any) -> list[Prepared]:
    prepared = model.prepare(texts, options)
    assert not [row for row in prepared if isinstance(row, MillstreamError)]
    return list(prepared)


def test_long_texts_are_cut_to_what_a_roberta_reads(roberta: Path) -> None:
    model = of(roberta)

    (row,) = rows(model, ["mill " * 100])

    assert (model.limit, row.tokens, row.truncated) == (Limit(38, 38), 38, True)
    assert len(model.forward([row])) == 1


def test_a_max_length_above_the_positions_is_an_error_at_start(roberta: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelUnavailable, match="max_length is 39, and the model reads at most 38 tokens"):
        of(roberta, max_length=39)
    with pytest.raises(ModelUnavailable, match=f"max_length is 5000, and the model reads at most {TINY_LIMIT} tokens"):
        of(tiny_model, max_length=5_000)
    assert of(roberta, max_length=38).limit == Limit(38, 38)


def test_a_limit_in_the_models_own_files_above_its_positions_is_lowered(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = folder / "sentence_bert_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_seq_length": 5_000}))

    model = of(folder)

    assert model.limit == Limit(TINY_LIMIT, TINY_LIMIT)


@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_every_model_takes_its_own_samples(tiny_model: Path, roberta: Path, tmp_path: Path, tokens: int) -> None:
    static = save_static(tiny_model, tmp_path / "static")
    folders = [
        roberta,
        static,
        # A default prompt takes part of each text's room.
        save_prompted(tiny_model, tmp_path / "prompted", default="query"),
        save_routed(tiny_model, static, tmp_path / "routed"),
    ]

    for folder in folders:
        model = of(folder)
        (row,) = rows(model, model.samples(tokens), truncate="none")
        assert row.tokens <= model.limit.tokens


def test_every_route_of_a_model_has_its_own_limit(tiny_model: Path, tmp_path: Path) -> None:
    static = save_static(tiny_model, tmp_path / "static")
    model = of(save_routed(tiny_model, static, tmp_path / "routed"))

    (query,) = rows(model, ["a " * 90], input_type="query", truncate="end")
    (document,) = rows(model, ["a " * 90], input_type="document", truncate="end")

    assert (query.truncated, document.tokens) == (False, TINY_LIMIT)


def test_rerankers_read_what_their_models_read(tiny_model: Path, tmp_path: Path) -> None:
    cross = save_cross_encoder(tmp_path / "cross")
    bi = save_bi_encoder(tmp_path / "bi", tiny_model)
    judge = save_judge(tmp_path / "gpt2", "gpt2")
    assert reranker(cross).limit == reranker(bi).limit == Limit(TINY_LIMIT, TINY_LIMIT)

    for folder in (cross, bi, judge):
        with pytest.raises(ModelUnavailable, match=r"max_length is 5000, and the model reads at most \d+ tokens"):
            reranker(folder, max_length=5_000)


def test_a_rerankers_row_at_the_limit_runs(roberta: Path, tmp_path: Path) -> None:
    raw = roberta.parent / "raw"
    config = RobertaConfig.from_pretrained(raw, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(raw)
    tokenizer.save_pretrained(tmp_path / "cross")
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    model = reranker(tmp_path / "cross")

    (row,) = model.prepare(["mill " * 100], {"query": "a"})

    assert (model.limit, row.tokens) == (Limit(38, 38), 38)
    assert len(model.forward([row])) == 1
