"""Step times: the presets' arithmetic, and costs found again from measured steps."""

import numpy as np
import pytest

from tokenspeed.bench import HARDWARE, StepTime
from tokenspeed.bench.fitting import fit_step_time
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import StepWork


def test_the_h200_preset_is_what_its_data_sheet_gives() -> None:
    hardware = HARDWARE["h200-32b"]
    # 32.8 GB of weights at 80% of 4.8 TB/s; 2 * 32.8e9 operations at half of 1979 TFLOP/s; 256 KiB
    # of KV a token; what 90% of 141 GB leaves beside the weights.
    assert hardware.step_time.weights_us == pytest.approx(8541.7, abs=0.1)
    assert hardware.step_time.prefill_token_us == pytest.approx(66.3, abs=0.1)
    assert hardware.step_time.kv_token_us == pytest.approx(0.06827, abs=1e-4)
    assert hardware.kv_tokens == pytest.approx(94.1e9 / 262144, rel=1e-3)
    four = HARDWARE["h200x4-32b"].step_time
    assert four.weights_us == pytest.approx(hardware.step_time.weights_us / 4)
    assert four.step_us == hardware.step_time.step_us + 2 * 64 * 10


def loads(count: int) -> list[StepWork]:
    rng = np.random.Generator(np.random.Philox(11))
    found = []
    for _ in range(count):
        rows, tokens = int(rng.integers(0, 33)), int(rng.integers(0, 513))
        context = int(rng.integers(1, 20_000))
        found.append(
            StepWork(
                prefill_tokens=tokens,
                decode_rows=rows,
                context_tokens=rows * context + (context if tokens else 0),
                prefill_pairs=float(tokens * context),
            )
        )
    return found


def test_the_costs_behind_noisy_steps_are_found_again() -> None:
    true = StepTime(
        step_us=900, prefill_token_us=60, decode_row_us=70, kv_token_us=0.07, pair_us=0.004
    )
    noise = np.random.Generator(np.random.Philox(12)).normal(1, 0.02, 400)
    steps = [
        (load, true.predict_us(load) * factor)
        for load, factor in zip(loads(400), noise, strict=True)
    ]
    found = fit_step_time(steps)
    for name in ("step_us", "prefill_token_us", "decode_row_us", "kv_token_us", "pair_us"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1), name


def test_a_drafted_token_costs_the_products_of_a_row_and_no_reading() -> None:
    times = StepTime(step_us=900, decode_row_us=70, kv_token_us=0.07)
    row = StepWork(decode_rows=1, context_tokens=1000)
    drafted = StepWork(decode_rows=1, draft_tokens=3, context_tokens=1000)
    assert times.predict_us(drafted) - times.predict_us(row) == pytest.approx(210)


def test_no_cost_is_negative_and_none_is_made_up() -> None:
    # Faster with more KV: no cost of ours can say so.
    steps = [
        (load, 1000 + 50 * load.prefill_tokens - load.context_tokens * 1e-4) for load in loads(50)
    ]
    found = fit_step_time(steps)
    assert found.kv_token_us == 0
    assert found.prefill_token_us == pytest.approx(50, rel=0.05)
    decode_only = [
        (
            StepWork(prefill_tokens=0, decode_rows=n, context_tokens=10 * n * n, prefill_pairs=0.0),
            5.0 + n,
        )
        for n in range(1, 9)
    ]
    assert fit_step_time(decode_only).prefill_token_us == 0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="measure more"):
        fit_step_time([(load, 1.0) for load in loads(4)])
    with pytest.raises(ConfigError, match="clock"):
        fit_step_time([(load, 0.0) for load in loads(9)])
