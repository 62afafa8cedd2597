"""Tokenizers decide what is predicted and how bits per byte are counted; a wrong cut or length makes scores wrong."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unroll.config import check
from unroll.data import tokenizers
from unroll.data.tokenizers import Tokenizer, TokenizerOptions, learn, load
from unroll.errors import UserError

TRAINING = (
    "The cat sat on the mat.\n the cat's  mat \n\n\tIt'll cost 12 \u20ac \u2014 \u65e5\u672c\u8a9e \U0001f600!\r\nend"
)
KINDS = ["bytes", "characters", "words", "bpe"]
quick = settings(max_examples=80, deadline=None)


def made(kind: str, text: str = TRAINING, **options: object) -> Tokenizer:
    extra = {"vocabulary_size": 300} if kind == "bpe" else {}
    return learn([("text", [text])], TokenizerOptions.model_validate({"kind": kind, **extra, **options}))


TOKENIZERS = {kind: made(kind) for kind in KINDS}
texts = st.text(st.sampled_from(sorted(set(TRAINING))), max_size=60)


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts, places=st.lists(st.integers(0, 60), max_size=8))
def test_cutting_a_text_into_pieces_does_not_change_its_tokens(kind: str, text: str, places: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer.encode(text).tolist()
    pieces = list(tokenizer.encode_pieces(cut(text, places)))
    assert [number for ids in pieces for number in ids.tolist()] == whole
    assert all(0 <= number < tokenizer.vocabulary_size for number in whole)


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
@quick
@given(text=texts)
def test_decoding_gives_the_text_and_byte_lengths_its_size(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths.shape == (tokenizer.vocabulary_size,)


@quick
@given(text=st.text(max_size=60))
def test_bpe_knows_every_text(text: str) -> None:
    assert TOKENIZERS["bpe"].decode(TOKENIZERS["bpe"].encode(text)) == text


def test_long_pieces_are_cut_without_changing_bpe(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TRAINING * 3
    whole = TOKENIZERS["bpe"].encode(text).tolist()
    monkeypatch.setattr(tokenizers, "BPE_PIECE", 5)
    assert TOKENIZERS["bpe"].encode(text).tolist() == whole


def test_bpe_merges_what_is_frequent_and_learns_the_same_twice() -> None:
    tokenizer = made("bpe", "low lower lowest " * 50)
    assert len(tokenizer.encode(" low lower")) < 6
    assert made("bpe", "low lower lowest " * 50).content() == tokenizer.content()


def test_words_follow_the_convention_of_wikitext() -> None:
    tokenizer = made("words", " b a b \n \n b <unk> a c \n")
    assert tokenizer.words == ["<unk>", "<eos>", "b", "a", "c"]  # type: ignore[attr-defined]
    assert tokenizer.encode(" a z \n b").tolist() == [3, 0, 1, 2]
    assert tokenizer.decode([3, 0, 1, 2]) == "a <unk>\nb"
    assert tokenizer.byte_lengths.tolist() == [6, 1, 2, 2, 2]


def test_rare_words_become_unknown() -> None:
    text = "a a a b b c c dddd e\n"
    words = made("words", text, minimum_count=2)
    assert words.words == ["<unk>", "<eos>", "a", "b", "c"]  # type: ignore[attr-defined]
    assert words.byte_lengths[0] == round((4 + 1) / 2) + 1
    assert made("words", text, maximum_size=4).words == ["<unk>", "<eos>", "a", "b"]  # type: ignore[attr-defined]


def test_a_corpus_of_words_is_about_as_long_as_its_byte_lengths_say() -> None:
    text = "one two three\nfour five\n" * 20
    tokenizer = made("words", text)
    assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == pytest.approx(len(text), rel=0.1)


def test_counting_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound the rarest words are dropped, with permission only."""
    monkeypatch.setattr(tokenizers, "COUNTED_WORDS", 3)
    text = "a a a b b c d e f"
    assert made("words", text, maximum_size=4).words == ["<unk>", "<eos>", "a", "b"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="more than 3 different words; set the tokenizer option maximum_size"):
        made("words", text)


def test_a_character_that_training_lacks_is_named() -> None:
    tokenizer = made("characters", "abc")
    with pytest.raises(UserError, match=r"valid.txt: character 3: '\u00e9' \(U\+00E9\) is not in the training text"):
        list(tokenizer.encode_pieces(["ab", "c\u00e9"], "valid.txt"))
    lenient = made("characters", "abc", unknown=True)
    assert lenient.encode("a\u00e9c").tolist() == [0, 3, 2]
    assert lenient.decode([0, 3, 2]) == "a\ufffdc"
    assert lenient.vocabulary_size == 4


def test_text_without_blanks_is_refused_for_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "UNBROKEN_TEXT", 100)
    with pytest.raises(UserError, match=r"my\.txt: character 1: no blank behind a word in more than 100 characters"):
        list(TOKENIZERS["words"].encode_pieces(["a b", "x" * 60, "x" * 60], "my.txt"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load(tmp_path / "tokenizer.json")
    assert again.name == kind
    assert again.vocabulary_size == tokenizer.vocabulary_size
    assert np.array_equal(again.encode(TRAINING), tokenizer.encode(TRAINING))
    assert np.array_equal(again.byte_lengths, tokenizer.byte_lengths)


HEAD = {"format": "unroll tokenizer 1"}


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95pickle",
        b"[]",
        json.dumps({"kind": "words"}).encode(),
        json.dumps({**HEAD, "kind": "sentencepiece"}).encode(),
        json.dumps({**HEAD, "kind": "characters", "characters": "aa"}).encode(),
        json.dumps({**HEAD, "kind": "words", "words": ["a", "b"]}).encode(),
        json.dumps({**HEAD, "kind": "bpe", "vocabulary": {"a": 0}, "merges": [["a", "b"]]}).encode(),
        json.dumps({**HEAD, "kind": "bpe", "vocabulary": {"a": 7}}).encode(),
        json.dumps({**HEAD, "kind": "bytes", "extra": 1}).encode(),
    ],
)
def test_anything_else_is_not_loaded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer of this project: ") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_an_option_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary_size is not an option of the tokenizer words"):
        check(TokenizerOptions, {"kind": "words", "vocabulary_size": 500}, "options.tokenizer")
