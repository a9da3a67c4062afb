import math

import numpy as np
import pytest
from einops import rearrange

from minibert.tasks import metrics

NAMES = ("no", "yes")


def test_binary_scores_are_those_of_the_second_class_worked_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    scores = metrics.classification(labels, predictions, NAMES)
    assert scores["accuracy"] == 0.7 and scores["precision"] == 0.75 and scores["recall"] == 0.6
    assert scores["f1"] == pytest.approx(6 / 9)
    assert scores["mcc"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert scores["per_class"]["no"] == {"precision": 4 / 6, "recall": 0.8, "f1": 8 / 11, "support": 5}


def test_three_classes_are_averaged_over_those_that_occur():
    scores = metrics.classification([0, 0, 1, 1], [0, 1, 1, 1], ("a", "b", "never"))
    assert scores["precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_undefined_scores_are_zero_and_undefined_correlations_nan():
    scores = metrics.classification([0, 0, 0], [0, 0, 0], NAMES)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["mcc"]) == (0.0, 0.0, 0.0, 0.0)
    assert scores["accuracy"] == 1.0
    for correlation in (metrics.pearson, metrics.spearman):
        assert math.isnan(correlation([1, 1, 1], [1, 2, 3])) and math.isnan(correlation([2], [3]))


def test_correlations_and_errors_have_the_values_worked_by_hand():
    assert metrics.pearson([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert metrics.spearman([0, 5, 5, 100], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert metrics.spearman([1, 2, 3], [-1, -10, -1000]) == pytest.approx(-1)
    assert metrics.mse([1, 2, 3], [1, 4, 6]) == pytest.approx(13 / 3)
    assert metrics.regression([1, 2, 3, 4], [2, 1, 4, 3])["spearman"] == pytest.approx(0.6)


def test_large_counts_do_not_overflow():
    table = np.array([[400_000_000, 100_000_000], [100_000_000, 400_000_000]])
    assert metrics.matthews(table) == pytest.approx(0.6)


# of random inputs that another package scores, too
some_cases = pytest.mark.parametrize("cases", [200, pytest.param(1000, marks=pytest.mark.slow)])


@some_cases
def test_classification_agrees_with_scikit_learn(cases):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for case in range(cases):
        classes, count = 2 + case % 6, int(rng.integers(1, 60))
        labels = rng.integers(0, classes, count)
        predictions = np.where(rng.random(count) < rng.random(), labels, rng.integers(0, max(classes - 1, 1), count))
        scores = metrics.classification(labels, predictions, [str(i) for i in range(classes)])
        every = sklearn.precision_recall_fscore_support(labels, predictions, labels=range(classes), zero_division=0)
        table = [list(row.values()) for row in scores["per_class"].values()]
        np.testing.assert_allclose(table, np.stack(every, 1), err_msg=str(case))
        average = "binary" if classes == 2 else "macro"
        expected = sklearn.precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)[:3]
        assert [scores["precision"], scores["recall"], scores["f1"]] == pytest.approx(expected), case
        assert scores["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predictions))
        if len({*labels, *predictions}) > 1:  # scikit-learn warns of a table with a single cell
            assert scores["mcc"] == pytest.approx(sklearn.matthews_corrcoef(labels, predictions)), case


@some_cases
def test_regression_agrees_with_scipy(cases):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(cases):
        x = rng.integers(0, 6, 37) / 5  # many ties, as in STS-B
        y = x + rng.normal(size=37).round(1)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy([0, 1], [0]), "expected the same"),
        (lambda: metrics.mse([], []), "N > 0"),
        (lambda: metrics.classification([0, 2], [0, 1], NAMES), "labels range from 0 to 2: expected 0 to 1"),
        (lambda: metrics.classification([0, 1], [-1, 1], NAMES), "predictions range from -1 to 1"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def drawn(n=501, classes=4, seed=3):
    """Labels that are drawn from softmax(logits): these probabilities are calibrated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.array([rng.choice(classes, p=row) for row in shares]), logits, shares


def test_the_calibration_error_is_that_of_a_plain_loop():
    labels, _, shares = drawn()
    bins = {}
    for label, row in zip(labels.tolist(), shares.tolist(), strict=True):
        number = next(b for b in range(1, 16) if max(row) <= b / 15)
        bins.setdefault(number, []).append((max(row), row.index(max(row)) == label))
    error = 0.0
    for found in bins.values():
        confidence, accuracy = (sum(values) / len(found) for values in zip(*found, strict=True))
        error += len(found) / len(labels) * abs(confidence - accuracy)
    assert metrics.ece(labels, shares) == pytest.approx(error, abs=1e-12)
    assert error > 0.01 and len(bins) > 9
    rows = metrics.reliability(labels, shares)
    assert sum(row["count"] for row in rows) == 501 and [round(row["to"] * 15) for row in rows] == sorted(bins)


def test_the_calibration_error_worked_by_hand():
    # two are 0.9 sure and one of them is right; one is 0.6 sure and right
    shares = [[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]]
    assert metrics.ece([0, 0, 0], shares) == pytest.approx((2 * 0.4 + 0.4) / 3)
    assert metrics.ece([0], [[1.0, 0.0]]) == 0.0, "a certainty is in the last bin"


def test_the_brier_score_is_that_of_scikit_learn_and_worked_by_hand():
    assert metrics.brier([0, 1], [[1.0, 0.0], [0.7, 0.3]]) == pytest.approx((0 + 2 * 0.7**2) / 2)
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, _, shares = drawn(classes=2)
    assert metrics.brier(labels, shares) == pytest.approx(2 * sklearn.brier_score_loss(labels, shares[:, 1]))


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_the_temperature_undoes_a_factor_and_is_where_the_labels_are_likeliest(factor):
    labels, logits, _ = drawn(4001)
    found = metrics.temperature(labels, logits * factor)
    assert found == pytest.approx(factor, rel=0.1)

    def loss(divisor):
        z = logits * factor / divisor
        return (np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean()

    assert loss(found) < min(loss(found * 0.99), loss(found * 1.01))


def test_a_temperature_of_labels_that_are_all_right_or_all_wrong_is_finite():
    assert metrics.temperature([0, 1], [[3.0, 0.0], [0.0, 3.0]]) == pytest.approx(0.01)
    assert metrics.temperature([1, 0], [[3.0, 0.0], [0.0, 3.0]]) == pytest.approx(100)


def test_scores_that_are_not_a_row_an_example_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3, 2\]: expected \[N\] and \[N, K\], N > 0"):
        metrics.ece([0, 1], np.ones((3, 2)))


@some_cases
def test_the_area_under_the_curve_agrees_with_scikit_learn(cases):
    """Every other case with as many equal scores as there can be."""
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        labels = rng.random(count := int(rng.integers(2, 40))) < rng.random()
        labels[:2] = True, False
        scores = rng.integers(-5, 6, count) / 7 if seed % 2 else rng.normal(size=count)
        assert metrics.auroc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores))


def test_the_area_under_the_curve_needs_both_kinds():
    assert math.isnan(metrics.auroc([True, True], [1, 2])) and math.isnan(metrics.auroc([0], [1]))
    assert metrics.auroc([0, 0, 1, 1], [1, 2, 2, 3]) == 3.5 / 4


def test_several_labels_agree_with_scikit_learn():
    """A thousand cases, side by side for one call; in many a label never occurs or is never given."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng, words, names = np.random.default_rng(0), ("precision", "recall", "f1"), ("a", "b", "c", "d")
    targets, given = (rng.random((1000, 13, 4)) < rng.random((1000, 1, 4)) ** 2 for _ in range(2))
    results = [metrics.multi_label(*case, names) for case in zip(targets, given, strict=True)]

    def theirs(columns):
        x, y = (rearrange(part, columns) for part in (targets, given))
        return np.stack(sklearn.precision_recall_fscore_support(x, y, zero_division=0), 1)

    every = theirs("case n label -> n (case label)").reshape(1000, 4, 4)
    assert (every[..., :3] == 0).any()
    ours = [[list(result["per_class"][name].values()) for name in names] for result in results]
    np.testing.assert_allclose(ours, every)
    micro = theirs("case n label -> (n label) case")[:, :3]
    np.testing.assert_allclose([[result[word] for word in words] for result in results], micro)
    np.testing.assert_allclose([result["macro_f1"] for result in results], every[..., 2].mean(1))
    assert [result["exact"] for result in results] == (targets == given).all(2).mean(1).tolist()


@pytest.mark.parametrize(
    ("targets", "given"), [([[1, 0]], [[1]]), ([1, 0], [1, 0]), (np.ones((0, 2)), np.ones((0, 2)))]
)
def test_labels_that_do_not_fit_are_refused(targets, given):
    with pytest.raises(ValueError, match="targets and predictions have shapes"):
        metrics.multi_label(targets, given, ["a", "b"])
