"""Names of metrics, and which way each gets better."""

from __future__ import annotations

import pytest

from orchestrator.errors import ConfigError
from orchestrator.scheduling.metric_direction import direction_of


@pytest.mark.parametrize(
    "name",
    [
        "accuracy",
        "val_acc",
        "top5",
        "top_5_accuracy",
        "top1-acc",
        "auc",
        "auc_roc",
        "recall",
        "recall_at_10",
        "recall@10",
        "reciprocal_rank",
        "mrr",
        "ndcg",
        "ndcg@10",
        "ndcg10",
        "map",
        "mAP",
        "mAP@0.5",
        "map50",
        "precision",
        "f1",
        "f1_macro",
        "macro/f1",
        "r2",
        "hit_rate",
        "hits@3",
        "bleu",
        "iou",
        "dice",
        "psnr",
    ],
)
def test_what_should_rise(name: str) -> None:
    assert direction_of(name) == "max"


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "val_loss",
        "bits_per_byte",
        "bits_per_token",
        "normalized_entropy",
        "perplexity",
        "error",
        "top5_error",
        "mse",
        "rmse",
        "mae",
        "wer",
        "fid",
        "accuracy_loss",
        "nll",
    ],
)
def test_what_should_fall(name: str) -> None:
    assert direction_of(name) == "min"


@pytest.mark.parametrize("name", ["calibration", "score", "top", "r", "neg_mean_squared_error", "mapping", "", "1"])
def test_what_a_name_does_not_say_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"give --mode max where more is better, --mode min where less is"):
        direction_of(name)
    assert direction_of(name, "max") == "max"
    assert direction_of(name, "min") == "min"


def test_what_is_given_counts_and_must_be_one_of_two() -> None:
    assert direction_of("loss", "max") == "max"
    with pytest.raises(ConfigError, match="mode='up': use min for a metric that should fall"):
        direction_of("loss", "up")


def test_the_metrics_of_our_own_jobs_are_known() -> None:
    """As README and the docstrings of `jobs` name them; calibration, best at 1, is the one that has no direction."""
    rising = {"accuracy", "auc", "recall_at_1", "recall_at_10", "reciprocal_rank"}
    falling = {"loss", "normalized_entropy", "bits_per_byte", "bits_per_token"}
    assert {name for name in rising | falling if direction_of(name) == "max"} == rising
