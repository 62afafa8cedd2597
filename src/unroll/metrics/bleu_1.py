"""BLEU-1 of captions, 0 to 1, by pycocoevalcap: precision of words (Papineni et al. 2002)."""

from unroll.metrics._coco_bleu import coco_bleu

lower_is_better = False
statistics, score, compute = coco_bleu(1)
