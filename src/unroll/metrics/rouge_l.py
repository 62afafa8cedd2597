"""ROUGE-L of captions, 0 to 1, by pycocoevalcap: F-measure (beta 1.2) of the longest common subsequence (Lin 2004)."""

from unroll.metrics._captions import Scored, Texts, caption_metric, mean, with_ones

lower_is_better = False
score = mean


def count(references: Texts, hypotheses: Texts) -> Scored:
    """ROUGE-L of each picture, its best precision and its best recall over the references."""
    from pycocoevalcap.rouge.rouge import Rouge

    return Scored(with_ones(Rouge().compute_score(references, hypotheses)[1]))


statistics, compute = caption_metric("rouge-l", "ROUGE-L (0 to 1)", count, score)
