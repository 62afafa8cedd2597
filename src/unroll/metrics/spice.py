"""SPICE of captions, 0 to 1, by pycocoevalcap: F-measure of the scene graphs' parts (Anderson et al. 2016).

Needs a Java runtime and Stanford's language models, 400 MB, which pycocoevalcap would download: here it is said how to
fetch them, and nothing is downloaded.
"""

from pathlib import Path

from unroll.metrics import Unavailable
from unroll.metrics._captions import Scored, Texts, caption_metric, mean, need_java, with_ones

lower_is_better = False
score = mean
MODELS = "stanford-corenlp-3.6.0-models.jar"


def count(references: Texts, hypotheses: Texts) -> Scored:
    """SPICE of each picture."""
    need_java("spice", "leave it out")
    import pycocoevalcap.spice.spice as package

    if not (Path(package.__file__).parent / "lib" / MODELS).exists():
        raise Unavailable(
            f"spice: its language models ({MODELS}) are not installed; "
            "`python -m pycocoevalcap.spice.get_stanford_models` fetches them (400 MB), or leave it out"
        )
    _, each = package.Spice().compute_score(references, hypotheses)
    return Scored(with_ones([picture["All"]["f"] for picture in each]))


statistics, compute = caption_metric("spice-1.0", "SPICE (0 to 1)", count, score)
