"""CIDEr-D by pycocoevalcap, 0 to 10 (many papers give 100 times as much: 1.09 is their 109; Vedantam et al. 2015).

Mean over pictures of the likeness of tf-idf vectors of 1- to 4-grams to each reference's. How rare an n-gram is comes
from the references of this test set, so scores on different test sets do not compare.
"""

from unroll.metrics._captions import Scored, Texts, caption_metric, mean, with_ones

lower_is_better = False
score = mean


def count(references: Texts, hypotheses: Texts) -> Scored:
    """CIDEr-D of each picture."""
    from pycocoevalcap.cider.cider import Cider

    return Scored(with_ones(Cider().compute_score(references, hypotheses)[1]))


statistics, compute = caption_metric("cider-d", "CIDEr-D (0 to 10)", count, score)
