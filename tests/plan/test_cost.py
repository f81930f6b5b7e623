"""Hours and dollars, checked on the one large run whose bill was published."""

import pytest

from opendeep_jax.config.load import load_recipe
from opendeep_jax.plan.cost import V3_PUBLISHED_DOLLARS, V3_PUBLISHED_GPU_HOURS, cost_of, v3_reproduced


def test_a_days_work():
    cost = cost_of(tokens=86_400e6, tokens_per_second=1e6, chips=100, dollars_per_chip_hour=2.0)
    assert cost == (pytest.approx(1), pytest.approx(2400), pytest.approx(4800))


def test_deepseek_v3s_bill_comes_out_within_15_percent():
    cost = v3_reproduced(load_recipe("deepseek_v3").model)
    assert cost.chip_hours == pytest.approx(V3_PUBLISHED_GPU_HOURS, rel=0.15)
    assert cost.dollars == pytest.approx(V3_PUBLISHED_DOLLARS, rel=0.15)
