"""What the scores of captions share: BLEU, ROUGE-L, CIDEr-D and METEOR as `pycocoevalcap` computes them.

Both sides are tokenised alike. `tokenizer: words` takes words in lower case without punctuation and is the same on
every machine; `ptb` is the Penn Treebank tokenizer that published scores use, and needs a Java runtime.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unroll.config import check
from unroll.metrics import Bootstrap, Score, ScoreOfSums, Statistics, Unavailable
from unroll.metrics._predictions import Sentence, conditions, read_sentences
from unroll.metrics.bootstrap import scored

Texts = dict[int, list[str]]
"""By picture: what pycocoevalcap takes, one hypothesis and one or more references, tokens between blanks."""


class Options(Bootstrap):
    """`tokenizer`: see the top of this file."""

    tokenizer: Literal["words", "ptb"] = "words"


@dataclass(frozen=True)
class Scored:
    """What a library says of some pictures: numbers that add up [n,k], and its score of all, if it is not their ratio."""

    values: np.ndarray
    value: float | None = None


def caption_metric(
    name: str, unit: str, count: Callable[[Texts, Texts], Scored], score: ScoreOfSums
) -> tuple[Callable[..., Statistics], Callable[..., Score]]:
    """The functions `statistics` and `compute` of a metric of captions.

    Args:
        name: for the signature.
        unit: with the scale, which differs from paper to paper.
        count: what the library finds in (references, hypotheses).
        score: the score of added-up numbers.

    The functions raise a UserError for predictions that are missing, malformed or incomplete, and unknown options, and
    Unavailable where something outside Python is needed and missing.
    """

    @functools.lru_cache(maxsize=4)
    def counted(sentences: tuple[Sentence, ...], tokenizer: str) -> Scored:
        return count(*tokenized(sentences, tokenizer))

    def statistics(predictions: Path, options: Mapping[str, Any]) -> Statistics:
        """What each picture adds: [pictures,k]."""
        checked, sentences = check(Options, options, "evaluate options"), read_sentences(predictions)
        found = counted(tuple(sentences), checked.tokenizer)
        return Statistics(found.values, conditions(sentences, {"metric": name, "tokenizer": checked.tokenizer}))

    def compute(predictions: Path, options: Mapping[str, Any]) -> Score:
        """The score of all pictures, with a bootstrap interval over them."""
        checked, sentences = check(Options, options, "evaluate options"), read_sentences(predictions)
        found = counted(tuple(sentences), checked.tokenizer)
        counts = sorted({len(sentence.references) for sentence in sentences})
        references = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        version = importlib.metadata.version("pycocoevalcap")
        signature = f"{name}|references:{references}|tokenizer:{checked.tokenizer}|pycocoevalcap:{version}"
        return scored(found.values, score, unit, checked, signature, found.value)

    return statistics, compute


def mean(sums: np.ndarray) -> np.ndarray:
    """The score that is a mean over pictures: [...,2] -> [...]."""
    result: np.ndarray = sums[..., 0] / sums[..., 1]
    return result


def with_ones(scores: Any) -> np.ndarray:
    """Scores of pictures beside the ones that count them: [n] -> [n,2]."""
    each = np.asarray(scores, dtype=np.float64)
    return np.stack([each, np.ones(len(each))], axis=1)


def tokenized(sentences: tuple[Sentence, ...], tokenizer: str) -> tuple[Texts, Texts]:
    """References and hypotheses of every picture, tokens between blanks.

    Raises:
        Unavailable: ptb without a Java runtime.
    """
    references = {number: list(sentence.references) for number, sentence in enumerate(sentences)}
    hypotheses = {number: [sentence.hypothesis] for number, sentence in enumerate(sentences)}
    if tokenizer == "words":
        return _words(references), _words(hypotheses)
    need_java("tokenizer: ptb", "use words")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    split = PTBTokenizer()
    sides = [
        split.tokenize({number: [{"caption": text or "."} for text in texts] for number, texts in side.items()})
        for side in (references, hypotheses)
    ]
    return sides[0], sides[1]


def _words(texts: Texts) -> Texts:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()))

    return {number: [plain(text) for text in each] for number, each in texts.items()}


def need_java(what: str, instead: str) -> None:
    """Raises Unavailable if there is no Java runtime."""
    if shutil.which("java") is None:
        raise Unavailable(f"{what}: needs a Java runtime, and no `java` is on the path; install one, or {instead}")
