"""BLEU-2 of captions, 0 to 1, by pycocoevalcap: precisions of 1- to 2-grams (Papineni et al. 2002)."""

from unroll.metrics._coco_bleu import coco_bleu

lower_is_better = False
statistics, score, compute = coco_bleu(2)
