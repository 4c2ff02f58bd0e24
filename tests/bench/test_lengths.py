"""Lengths as the command line states them: read, refused, and drawn as they say."""

import numpy as np
import pytest

from maxlike.bench.lengths import Lengths


def drawn(text: str, n: int = 20_000) -> np.ndarray:
    return Lengths.parse(text).draw(n, np.random.default_rng(0))


@pytest.mark.parametrize("text", ["128", "uniform:64:256", "normal:256:64", "lognormal:256:128.5", "1e6",
                                  "uniform:1048577:2147483647"])
def test_stated_as_read(text: str) -> None:
    assert Lengths.parse(str(Lengths.parse(text))) == Lengths.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "nan", "inf", "many", "64:256", "uniform:64", "uniform:1:2:3", "uniform:9:3", "uniform:0:3",
     "uniform:1:2.5", "normal:256", "normal:256:-1", "normal:0:1", "lognormal:nan:1", "lognormal:5:inf", "poisson:3:4",
     "fixed:3:0", "1e300", "lognormal:1:1e200", "uniform:1:1e30"],
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Lengths are given as N, uniform:LOW:HIGH") as error:
        Lengths.parse(text)
    assert repr(text) in str(error.value)


def test_fixed() -> None:
    assert set(drawn("17")) == {17}


def test_uniform_reaches_both_ends_evenly() -> None:
    values, counts = np.unique(drawn("uniform:3:7"), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6, 7]
    # 20,000 draws over 5 values: 4,000 each, with a standard deviation of 57.
    assert np.abs(counts - 4000).max() < 5 * 57


# The error of a mean of n draws is std / sqrt(n), of a standard deviation about std * sqrt((kurtosis - 1) / 4n).
def test_normal() -> None:
    lengths = drawn("normal:500:80")
    assert abs(lengths.mean() - 500) < 5 * 80 / np.sqrt(20_000)
    assert abs(lengths.std() - 80) < 5 * 80 / np.sqrt(40_000)
    assert abs(np.mean(lengths < 420) - 0.1587) < 0.015  # one standard deviation below


def test_lognormal_has_the_mean_and_deviation_stated() -> None:
    lengths = drawn("lognormal:400:200", 200_000)
    assert abs(lengths.mean() - 400) < 5 * 200 / np.sqrt(200_000)
    assert abs(lengths.std() - 200) < 4
    logs = np.log(lengths)
    assert abs(((logs - logs.mean()) ** 3).mean() / logs.std() ** 3) < 0.03  # the logarithm is symmetric


@pytest.mark.parametrize("text", ["normal:10:0.3", "lognormal:10:0.3"])
def test_rounded_to_the_nearest(text: str) -> None:
    assert abs(drawn(text).mean() - 10) < 0.02


@pytest.mark.parametrize("text", ["normal:3:50", "lognormal:1:30"])
def test_none_below_one_token(text: str) -> None:
    lengths = drawn(text)
    assert lengths.min() == 1
    assert lengths.dtype == np.int64
