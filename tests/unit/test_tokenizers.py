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
from unroll.data.tokenizers import BpeTokenizer, SubwordSampler, Tokenizer, TokenizerOptions, learn, load
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


# ---------------------------------------------------------------- sentences and BPE-dropout

SENTENCES = [
    "low lower lowest.",
    "the lowest of the low",
    " two  blanks ",
    "Gr\u00fc\u00df Gott, aaaa aaa!",
    "newer\u00a0wider",
]


def sentence_tokenizer(size: int = 300) -> BpeTokenizer:
    texts = [("text", [sentence]) for sentence in SENTENCES * 20]
    options = TokenizerOptions(kind="bpe", vocabulary_size=size)
    tokenizer = learn(texts, options, leading_blank=True)
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


SENTENCE_BPE = sentence_tokenizer()


@quick
@given(text=st.text(st.sampled_from(" \n\tlowerstaG\u00fc\u00df.,'!\u00a0\u3000\x1f"), max_size=40))
def test_a_leading_blank_comes_and_goes_without_a_trace(text: str) -> None:
    ids = SENTENCE_BPE.encode(text)
    assert SENTENCE_BPE.decode(ids) == text
    assert SENTENCE_BPE.encode_all([text, "low"], ["a", "b"])[0].tolist() == ids.tolist()


def test_the_first_word_of_a_sentence_is_the_same_token_as_inside(tmp_path: Path) -> None:
    assert SENTENCE_BPE.encode("low low low").tolist() == SENTENCE_BPE.encode("low").tolist() * 3
    SENTENCE_BPE.save(tmp_path / "tokenizer.json")
    assert load(tmp_path / "tokenizer.json").encode("low").tolist() == SENTENCE_BPE.encode("low").tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_at_once_are_encoded_as_one_by_one(kind: str) -> None:
    many = ["the cat", "", "sat on"]
    for text, ids in zip(many, TOKENIZERS[kind].encode_all(many, many), strict=True):
        assert ids.tolist() == TOKENIZERS[kind].encode(text).tolist()


@pytest.mark.parametrize("tokenizer", [SENTENCE_BPE, TOKENIZERS["bpe"]], ids=["sentences", "text"])
@quick
@given(text=st.text(st.sampled_from(" \n\tlowerstaG\u00fc\u00df.,'!\u00a0\u3000\x1f"), max_size=40), key=st.integers())
def test_sampled_tokens_spell_the_text_and_without_dropout_are_the_tokenizers(
    tokenizer: BpeTokenizer, text: str, key: int
) -> None:
    assert SubwordSampler(tokenizer, 0.0, seed=1).encode(text, key).tolist() == tokenizer.encode(text).tolist()
    sampled = SubwordSampler(tokenizer, 0.5, seed=1).encode(text, key)
    assert sampled.dtype == np.int64
    assert tokenizer.decode(sampled) == text


def test_a_cut_depends_on_seed_key_and_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process meets the texts in another order, and may have forgotten words in between."""
    calls = [(text, key) for text in SENTENCES for key in range(20)]
    forwards, backwards = (SubwordSampler(SENTENCE_BPE, 0.3, seed=5) for _ in range(2))
    expected = {call: forwards.encode(*call).tolist() for call in calls}
    monkeypatch.setattr(tokenizers, "KEPT_CUTS", 3)
    assert {call: backwards.encode(*call).tolist() for call in reversed(calls)} == expected
    assert {call: forwards.encode(*call).tolist() for call in calls} == expected
    monkeypatch.setattr(tokenizers, "KEPT_WORD", 0)
    fresh = SubwordSampler(SENTENCE_BPE, 0.3, seed=5)
    assert {call: fresh.encode(*call).tolist() for call in calls} == expected
    other = SubwordSampler(SENTENCE_BPE, 0.3, seed=6)
    assert {call: other.encode(*call).tolist() for call in calls} != expected


def test_memory_of_kept_cuts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "KEPT_CUTS", 40)
    sampler = SubwordSampler(SENTENCE_BPE, 0.3, seed=5)
    for key in range(200):
        sampler.encode(f"low lower {key} lowest", key)
        held = sum(cut is not None for cuts in sampler._kept.values() for cut in cuts)
        assert held == sampler._kept_count <= 40


def test_merges_are_dropped_as_often_as_asked_for() -> None:
    """A word of one possible merge stays whole with probability 1 - p, in the whole and place by place."""
    tokenizer = BpeTokenizer({"a": 0, "b": 1, "ab": 2, " ": 3, "\u0120": 4}, [("a", "b")])
    sampler = SubwordSampler(tokenizer, 0.25, seed=3, variants=256)
    rows = [sampler.encode("ab\nab\nab".replace("\n", " "), key).tolist() for key in range(500)]
    whole = np.array([row.count(2) for row in rows])
    assert whole.mean() / 3 == pytest.approx(0.75, abs=0.06)
    assert {tuple(row) for row in rows} >= {(2, 4, 2, 4, 2), (0, 1, 4, 2, 4, 2), (2, 4, 0, 1, 4, 2), (2, 4, 2, 4, 0, 1)}
    assert SubwordSampler(tokenizer, 1.0, seed=3).encode("ab", 0).tolist() == [0, 1]


def test_more_dropout_makes_longer_texts() -> None:
    text = " ".join(SENTENCES)
    lengths = [
        np.mean([len(SubwordSampler(SENTENCE_BPE, dropout, seed=1).encode(text, key)) for key in range(20)])
        for dropout in (0.0, 0.1, 0.3, 0.9)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] == len(SENTENCE_BPE.encode(text)) < lengths[1]


def test_subword_dropout_needs_merges_and_a_probability() -> None:
    with pytest.raises(UserError, match="found the tokenizer characters, bpe is allowed"):
        SubwordSampler(TOKENIZERS["characters"], 0.1, seed=1)
    with pytest.raises(UserError, match=r"found 1\.5, 0 to 1 is allowed"):
        SubwordSampler(SENTENCE_BPE, 1.5, seed=1)
    with pytest.raises(UserError, match="found 0 variants, 1 to 256 are allowed"):
        SubwordSampler(SENTENCE_BPE, 0.1, seed=1, variants=0)
