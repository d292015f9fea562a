import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from cxr import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def logistic_sample(rng, count, temperature=1.0):
    """Logits that are `temperature` times too large, and labels drawn from the true ones."""
    true = rng.normal(0, 2, count)
    return true * temperature, (rng.random(count) < 1 / (1 + np.exp(-true))).astype(int)


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half(rng):
    scores, labels = rng.integers(0, 5, 60), rng.integers(0, 2, 60)
    higher = scores[labels == 1][:, None] - scores[labels == 0]
    pairs = (higher > 0).mean() + (higher == 0).mean() / 2
    assert metrics.auroc(scores, labels) == pytest.approx(pairs, abs=1e-12)


@pytest.mark.parametrize("scores, value", [([1, 2, 3, 4], 1), ([4, 3, 2, 1], 0), ([7] * 4, 0.5)])
def test_auroc_of_perfect_inverted_and_constant_scores(scores, value):
    assert metrics.auroc(np.array(scores), np.array([0, 0, 1, 1])) == value


def test_auroc_is_undefined_without_both_classes_or_with_a_nan_score():
    assert np.isnan(metrics.auroc(np.array([0.1, 0.2]), np.array([1, 1])))
    assert np.isnan(metrics.auroc(np.array([0.1, np.nan]), np.array([0, 1])))


def test_rates_count_the_images_and_patients_of_their_own_class():
    called, labels = np.array([True, True, False, True, False]), np.array([1, 1, 1, 0, 0])
    found = metrics.rates(called, labels, np.arange(5))
    assert (found["sensitivity"]["value"], found["sensitivity"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (found["specificity"]["value"], found["specificity"]["n"]) == (1 / 2, 2)
    labels = np.repeat([1, 0], [5, 195])
    few = metrics.rates(labels == 1, labels, np.arange(200))["sensitivity"]
    assert few["low"] ** 5 == pytest.approx(0.025) and few["n"] == 5


def test_an_accuracy_calls_a_half_positive():
    probabilities, labels = np.array([0.5, 0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 1, 0, 0])
    assert metrics.accuracy(probabilities, labels) == pytest.approx(3 / 5)


def test_rates_are_undefined_without_an_image_to_count():
    found = metrics.rates(np.array([False, True]), np.array([0, 0]), np.arange(2))
    assert np.isnan(found["sensitivity"]["value"]) and found["sensitivity"]["n"] == 0
    assert np.isnan(metrics.accuracy(np.array([]), np.array([])))
    assert np.isnan(metrics.calibration_error(np.array([]), np.array([])))


def test_scikit_learn_finds_the_same_rates(rng):
    labels = rng.integers(0, 2, 200)
    probabilities = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 2)
    called = probabilities >= 0.5
    assert metrics.auroc(probabilities, labels) == pytest.approx(
        roc_auc_score(labels, probabilities)
    )
    assert metrics.accuracy(probabilities, labels) == accuracy_score(labels, called)
    found = metrics.rates(called, labels, np.arange(200))
    assert found["sensitivity"]["value"] == pytest.approx(recall_score(labels, called))
    assert found["specificity"]["value"] == pytest.approx(recall_score(labels, called, pos_label=0))


def test_sigmoid_does_not_overflow():
    assert metrics.sigmoid(np.array([-1e4, 0, 1e4])).tolist() == [0, 0.5, 1]
    assert metrics.sigmoid(np.array([1.3]))[0] == pytest.approx(1 / (1 + np.exp(-1.3)))


def test_pearson_is_nan_where_a_column_is_constant(rng):
    a, b = rng.normal(size=(2, 20))
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.isnan(metrics.pearson(a, np.ones(20)))


def test_calibration_error_weighs_the_gap_of_each_bin_by_its_share():
    probabilities = np.array([0.01, 0.03, 0.95, 1.0])  # the first bin and the last
    labels = np.array([0, 0, 1, 0])
    expected = 0.5 * abs(0.02 - 0) + 0.5 * abs(0.975 - 0.5)
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(expected)


def test_calibration_error_tells_calibrated_from_overconfident(rng):
    logits, labels = logistic_sample(rng, 20000, temperature=3)
    assert metrics.calibration_error(1 / (1 + np.exp(-logits / 3)), labels) < 0.02
    assert metrics.calibration_error(1 / (1 + np.exp(-logits)), labels) > 0.05


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_temperature_undoes_a_known_scaling(temperature, rng):
    logits, labels = logistic_sample(rng, 20000, temperature)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_temperature_has_the_least_cross_entropy(rng):
    logits, labels = logistic_sample(rng, 5000, temperature=2)

    def loss(temperature):
        return np.logaddexp(0, np.where(labels == 1, -logits, logits) / temperature).mean()

    best = min(np.geomspace(0.05, 20, 2000), key=loss)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("positives, negatives", [(5, 5), (500, 500), (3, 40)])
def test_temperature_of_a_separable_set_grants_the_certainty_of_its_size(positives, negatives):
    logits, labels = np.repeat([5.0, -5.0], [positives, negatives]), [1] * positives
    sure = (positives**2 + positives) / (positives + 2) + (negatives**2 + negatives) / (
        negatives + 2
    )
    wrong = positives + negatives - sure  # Platt's targets, summed over both classes
    found = metrics.fit_temperature(logits, np.array(labels + [0] * negatives))
    assert found == pytest.approx(5 / np.log(sure / wrong))


def test_temperature_stays_in_its_bounds():
    logits, labels = np.repeat([-1e-3, 1e-3], 50), np.repeat([0, 1], 50)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(0.05)
    assert metrics.fit_temperature(1e4 * logits, 1 - labels) == pytest.approx(20)
    assert metrics.fit_temperature(np.array([]), np.array([])) == 1


def images(rng, count=3, size=24):
    ramp = torch.linspace(-2, 1, size)  # black to white, so that every term of SSIM counts
    x = (ramp + torch.from_numpy(rng.normal(0, 0.2, (count, 1, size, size))).float()).clamp(-1, 1)
    noise = torch.from_numpy(rng.normal(0, 0.3, x.shape)).float()
    return x, (x + noise).clamp(-1, 1)


def test_psnr_is_decibels_of_the_full_range():
    x = torch.zeros(2, 1, 8, 8)
    y = torch.stack([x[0] + 0.2, x[1] + 0.02])
    torch.testing.assert_close(metrics.psnr(x, y), torch.tensor([20.0, 40.0]))


def test_ssim_is_one_for_equal_images_and_falls_with_noise(rng):
    x, y = images(rng)
    torch.testing.assert_close(metrics.ssim(x, x), torch.ones(3))
    assert (metrics.ssim(x, y) < 0.95).all()
    assert (metrics.ssim(x, -x) < metrics.ssim(x, y)).all()


def test_ssim_has_the_right_gradient(rng):
    x, y = images(rng, count=1)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(metrics.ssim(x, y).sum(), x)
    step = 1e-2 * torch.sign(slope)
    rise = (metrics.ssim(x + step, y) - metrics.ssim(x - step, y)).item() / 2
    assert rise == pytest.approx((slope * step).sum().item(), rel=0.02)


def test_scikit_image_finds_the_same_psnr_and_ssim(rng):
    x, y = images(rng)
    unit = [((image + 1) / 2)[:, 0].double().numpy() for image in (x, y)]
    options = {
        "gaussian_weights": True,
        "use_sample_covariance": False,
        "sigma": 1.5,
        "data_range": 1,
    }
    ssim = [structural_similarity(a, b, **options) for a, b in zip(*unit)]
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(*unit)]
    np.testing.assert_allclose(metrics.ssim(x, y), ssim, atol=1e-5)
    np.testing.assert_allclose(metrics.psnr(x, y), psnr, rtol=1e-5)


def test_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error(rng):
    values = rng.normal(3, 1, 400)
    found = metrics.bootstrap(np.mean, np.arange(400), values)
    assert found["value"] == values.mean() and found["n"] == 400
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.1)


@pytest.mark.parametrize("rows", [1, 2, 7, 60, 61])
def test_a_mean_has_the_resamples_of_any_statistic(rng, rows):
    """Its shortcut by sums gives what the drawn rows themselves give."""
    patients, values = rng.integers(0, rows, 60), rng.normal(size=60)
    short = metrics.bootstrap(np.mean, patients, values)
    long = metrics.bootstrap(lambda each: each.mean(), patients, values)
    assert short == pytest.approx(long, nan_ok=True, abs=1e-12)


def test_bootstrap_draws_patients_not_images(rng):
    values = np.repeat(rng.normal(0, 1, 40), 25)  # 25 equal images of each of 40 patients
    patients = [f"patient {i}" for i in np.repeat(np.arange(40), 25)]
    shuffled = rng.permutation(1000)
    by_patient = metrics.bootstrap(np.mean, np.array(patients)[shuffled], values[shuffled])
    by_image = metrics.bootstrap(np.mean, np.arange(1000), values)
    width = by_patient["high"] - by_patient["low"]
    assert width == pytest.approx(5 * (by_image["high"] - by_image["low"]), rel=0.25)


def test_bootstrap_keeps_every_row_of_a_drawn_patient_and_its_columns_aligned(rng):
    patients = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    shuffled = rng.permutation(10)

    def check(drawn, image):
        assert np.array_equal(patients[shuffled][image], drawn)
        times = np.bincount(image, minlength=10)[np.argsort(shuffled, kind="stable")]
        first = np.array([0, 1, 3, 6])
        assert np.array_equal(times, np.repeat(times[first], [1, 2, 3, 4]))
        assert times[first].sum() == 4
        return 0.0

    metrics.bootstrap(check, patients[shuffled], patients[shuffled], np.arange(10), samples=50)


def test_bootstrap_skips_resamples_that_lack_a_class():
    scores, labels = np.array([0.1, 0.2, 0.3, 0.9]), np.array([0, 0, 0, 1])
    found = metrics.bootstrap(metrics.auroc, np.arange(4), scores, labels)
    assert (found["value"], found["high"]) == (1, 1)


@pytest.mark.parametrize("patients", [11, 40])
def test_a_share_of_all_or_none_has_the_exact_interval(patients):
    every = metrics.bootstrap(metrics.share, np.arange(patients), np.ones(patients))
    none = metrics.bootstrap(metrics.share, np.arange(patients), np.zeros(patients))
    assert every["low"] ** patients == pytest.approx(0.025) and every["high"] == 1
    assert none["low"] == 0 and none["high"] == pytest.approx(1 - every["low"])
    twice = metrics.bootstrap(metrics.share, np.arange(2 * patients) // 2, np.ones(2 * patients))
    assert twice["low"] == every["low"]


def test_the_mean_of_other_numbers_keeps_the_interval_of_its_resamples():
    found = metrics.bootstrap(np.mean, np.arange(11), np.ones(11))
    assert found["low"] == found["high"] == 1


def test_an_accuracy_is_a_share():
    found = metrics.bootstrap(metrics.accuracy, np.arange(11), np.ones(11), np.ones(11))
    assert found["low"] ** 11 == pytest.approx(0.025)


@pytest.mark.parametrize("positives, negatives", [(5, 5), (20, 19), (60, 10)])
def test_a_perfect_auroc_has_newcombes_score_interval(positives, negatives):
    """At its low end, the observed 1 is z standard errors of Hanley & McNeil away."""
    labels = np.repeat([1, 0], [positives, negatives])
    found = metrics.bootstrap(metrics.auroc, np.arange(len(labels)), labels * 2.0, labels)
    a = found["low"]
    assert (found["value"], found["high"]) == (1, 1) and 0.5 < a < 1
    extra = ((positives + negatives) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))
    error = np.sqrt(a * (1 - a) * (1 + extra) / (positives * negatives))
    assert 1 - a == pytest.approx(1.959964 * error)
    mirrored = metrics.bootstrap(metrics.auroc, np.arange(len(labels)), -labels, labels)
    assert [mirrored[key] for key in ("value", "low", "high")] == pytest.approx([0, 0, 1 - a])
    twice = metrics.bootstrap(
        metrics.auroc,
        np.repeat(np.arange(len(labels)), 2),
        np.repeat(labels, 2),
        np.repeat(labels, 2),
    )
    assert twice["low"] == a  # patients are counted


@pytest.mark.parametrize("positives, negatives", [(5, 5), (10, 30)])
def test_a_perfect_auroc_is_rare_where_the_truth_is_the_low_end(rng, positives, negatives):
    labels = np.repeat([1, 0], [positives, negatives])
    low, _ = metrics.auroc_ends(1, np.arange(len(labels)), labels)
    odds = low / (1 - low)  # of two exponential scores, whose true AUROC is then `low`
    high = rng.exponential(odds, (4000, positives)).min(1)
    assert np.mean(high > rng.exponential(1, (4000, negatives)).max(1)) < 0.03


def test_an_auroc_short_of_perfect_has_the_bootstraps_interval(rng):
    labels = np.arange(60) % 2
    scores = labels + rng.normal(0, 0.4, 60)
    found = metrics.bootstrap(metrics.auroc, np.arange(60), scores, labels)
    assert 0.9 < found["low"] < found["value"] < found["high"] <= 1


def test_bootstrap_of_what_is_undefined_is_nan():
    one_class = metrics.bootstrap(metrics.auroc, [0, 1], np.ones(2), np.ones(2), samples=10)
    nothing = metrics.bootstrap(np.mean, [], np.array([]))
    assert all(np.isnan(found[key]) for found in (one_class, nothing) for key in ("value", "high"))
    assert (one_class["n"], nothing["n"]) == (2, 0)


def test_bootstrap_is_repeatable_and_follows_its_seed(rng):
    values = rng.normal(size=50)
    first = metrics.bootstrap(np.mean, np.arange(50), values, samples=100)
    assert first == metrics.bootstrap(np.mean, np.arange(50), values, samples=100)
    assert first != metrics.bootstrap(np.mean, np.arange(50), values, samples=100, seed=1)


def test_spearman_sees_order_alone_and_shares_tied_ranks():
    a = np.array([1.0, 2, 3, 4])
    assert metrics.spearman(a, np.exp(a)) == pytest.approx(1)
    assert metrics.spearman(a, -(a**3)) == pytest.approx(-1)
    assert metrics.spearman(a, np.array([1, 1, 2, 2])) == pytest.approx(2 / np.sqrt(5))
    unequal = metrics.spearman(np.arange(5), np.array([1, 1, 1, 2, 3]))
    assert unequal == pytest.approx(8 / np.sqrt(80))
    assert np.isnan(metrics.spearman(a, np.ones(4)))


def test_one_patient_has_no_interval():
    numbers = metrics.bootstrap(np.mean, ["a", "a"], np.array([0.2, 0.4]))
    assert np.isclose(numbers["value"], 0.3) and np.isnan([numbers["low"], numbers["high"]]).all()
