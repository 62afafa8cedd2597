"""The published programs for captions, in Java: the Penn Treebank tokenizer and METEOR."""

import json
import shutil
from pathlib import Path

import pytest

from unroll.metrics import meteor
from unroll.metrics._captions import tokenized
from unroll.metrics._predictions import Sentence

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")


def test_the_published_tokenizer() -> None:
    sentences = (Sentence("x", ("It's a well-kept, green park.",), "A park!"),)
    assert tokenized(sentences, "ptb") == ({0: ["it 's a well-kept green park"]}, {0: ["a park"]})


def test_meteor_has_an_interval_around_it(tmp_path: Path) -> None:
    pairs = [(["a dog runs over the hill"], "a dog is running over the hills"), (["a"], "b")]
    lines = [
        {"id": number, "source": f"{number}.jpg", "references": references, "hypothesis": hypothesis}
        for number, (references, hypothesis) in enumerate(pairs)
    ]
    (tmp_path / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = meteor.compute(tmp_path, {})
    assert 0.2 < found.value < 0.9
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
