"""Which way a metric gets better, by its name: the one place that knows."""

from __future__ import annotations

import re
from typing import Literal

from orchestrator.errors import ConfigError

__all__ = ["Direction", "direction_of"]

Direction = Literal["min", "max"]

RISING = frozenset(
    {
        "accuracy", "acc", "auc", "auroc", "auprc", "ap", "map", "ndcg", "dcg", "mrr", "reciprocal", "hit", "hits",
        "recall", "precision", "sensitivity", "specificity", "top", "f", "r", "bleu", "rouge", "chrf", "meteor",
        "iou", "miou", "dice", "psnr", "ssim", "kappa", "mcc", "pearson", "spearman", "correlation", "reward",
    }
)  # fmt: skip
FALLING = frozenset(
    {
        "loss", "logloss", "error", "err", "entropy", "perplexity", "ppl", "nll", "nats", "bits", "bpb", "bpc",
        "mse", "rmse", "rmsle", "mae", "mape", "wer", "cer", "eer", "fid", "brier", "ece", "deviance", "divergence",
        "distance", "regret",
    }
)  # fmt: skip
NUMBERED = frozenset({"top", "f", "r"})
"""Words that name a metric with a number alone: top5, f1, r2."""
TURNED = frozenset({"neg", "negative", "inverse"})
"""Words that turn what follows round, or belong to a name such as negative predictive value: too few to guess by."""


def direction_of(metric: str, given: str | None = None) -> Direction:
    """Return whether the best of ``metric`` is its lowest value or its highest: as ``given``, or else by its name.

    Of several words that are known the last one counts: top5_error is an error.

    Raises:
        ConfigError: another word than min or max was given, or nothing was and the name says nothing.
    """
    match given:
        case "min" | "max":
            return given
        case str():
            raise ConfigError(f"mode={given!r}: use min for a metric that should fall, max for one that should rise")
    words = re.findall(r"[a-z]+[0-9]*|[0-9]+", metric.lower())
    known: list[Direction] = [found for word in words if (found := _of_word(word)) is not None]
    if not known or TURNED.intersection(words):
        raise ConfigError(
            f"metric={metric!r}: whether it should rise or fall does not show in its name: "
            "give --mode max where more is better, --mode min where less is"
        )
    return known[-1]


def _of_word(word: str) -> Direction | None:
    name = word.rstrip("0123456789")
    if name in NUMBERED and name == word:
        return None
    return "max" if name in RISING else "min" if name in FALLING else None
