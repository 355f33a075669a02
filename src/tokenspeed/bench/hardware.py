"""How long a step takes on a device that is not there, and how many pages such a device holds."""

import math
from dataclasses import dataclass, fields

from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import StepWork

__all__ = ["HARDWARE", "Hardware", "StepTime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Microseconds of a step as a function of what it runs.

        step_us + max(weights_us, prefill_token_us * prompt tokens
                                  + decode_row_us * (decode rows + drafted tokens))
                + kv_token_us * tokens of KV that attention reads (the contexts of all rows)
                + pair_us * pairs of (prompt token, token it attends to)

    The maximum is the roofline of the matrix products: a step reads all weights however few its
    tokens are, and computes behind that read as long as they are few. With `weights_us` 0 the
    function is linear.

    Attributes:
        step_us: what every step costs: launch, collectives, sampling.
        weights_us: reading the weights once.
        prefill_token_us, decode_row_us: matrix products of one token.
        kv_token_us: reading one token's keys and values.
        pair_us: prefill attention of one query token with one key token.
    """

    step_us: float = 0.0
    weights_us: float = 0.0
    prefill_token_us: float = 0.0
    decode_row_us: float = 0.0
    kv_token_us: float = 0.0
    pair_us: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and 0 <= value <= 1e9):
                raise ConfigError(
                    f"{field.name} must be microseconds in [0, 1e9], but is {value!r}"
                )

    def predict_us(self, work: StepWork) -> float:
        """Microseconds of a step."""
        products = self.prefill_token_us * work.prefill_tokens + self.decode_row_us * (
            work.decode_rows + work.draft_tokens
        )
        return (
            self.step_us
            + max(self.weights_us, products)
            + self.kv_token_us * work.context_tokens
            + self.pair_us * work.prefill_pairs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One replica: devices that serve one copy of a model.

    Attributes:
        description: model and devices, for people.
        devices: how many make the replica.
        kv_tokens: tokens that the KV pool holds.
        step_time: its step times.
    """

    description: str
    devices: int
    kv_tokens: int
    step_time: StepTime


def _roofline(
    *,
    description: str,
    devices: int,
    parameters: float,
    weight_size_bytes: float,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    memory_size_bytes: float,
    bandwidth: float,
    products_flops: float,
    attention_flops: float,
    collective_us: float,
) -> Hardware:
    """A replica from published peaks, by the arithmetic that docs/simulator.md explains.

    Bandwidth is bytes a second and flops are operations a second of one device. Four fifths of the
    bandwidth and half of the peak operations are taken to be reached.
    """
    reached_bandwidth = 0.8 * bandwidth * devices
    kv_size_bytes = 2 * layers * kv_heads * head_dim * 2  # K and V in BF16
    weights_size_bytes = parameters * weight_size_bytes
    product_us = 1e6 * 2 * parameters / (0.5 * products_flops * devices)
    # Scores and their sum over values: two products of head_dim, a multiplication and an addition
    # each.
    pair_flops = 4 * heads * head_dim * layers
    return Hardware(
        description=description,
        devices=devices,
        kv_tokens=int((0.9 * memory_size_bytes * devices - weights_size_bytes) / kv_size_bytes),
        step_time=StepTime(
            step_us=1000 + 2 * layers * collective_us,
            weights_us=1e6 * weights_size_bytes / reached_bandwidth,
            prefill_token_us=product_us,
            decode_row_us=product_us,
            kv_token_us=1e6 * kv_size_bytes / reached_bandwidth,
            pair_us=1e6 * pair_flops / (0.5 * attention_flops * devices),
        ),
    )


def _h200_32b(devices: int, collective_us: float) -> Hardware:
    # Qwen3-32B: 32.8e9 parameters, 64 layers, 64 query and 8 KV heads of 128; weights in FP8.
    # H200 SXM: 141 GB at 4.8 TB/s, 1979 TFLOP/s dense in FP8 and 989 in BF16 (the data sheet).
    return _roofline(
        description=f"a dense 32B model in FP8 on {devices} H200",
        devices=devices,
        parameters=32.8e9,
        weight_size_bytes=1.0,
        layers=64,
        heads=64,
        kv_heads=8,
        head_dim=128,
        memory_size_bytes=141e9,
        bandwidth=4.8e12,
        products_flops=1.979e15,
        attention_flops=0.989e15,
        collective_us=collective_us,
    )


HARDWARE: dict[str, Hardware] = {
    "h200-32b": _h200_32b(1, 0.0),
    # Tensor parallel; a small all-reduce over NVLink takes about 10 us.
    "h200x4-32b": _h200_32b(4, 10.0),
    # Fitted by benchmarks/fit_step_time.py, with native kernels; 2 GiB of KV.
    "cpu2-135m": Hardware(
        description="SmolLM2-135M in BF16 on two cores of an AMD EPYC (Zen 5)",
        devices=1,
        kv_tokens=93_206,
        step_time=StepTime(
            step_us=2279,
            prefill_token_us=207.8,
            decode_row_us=252.0,
            kv_token_us=0.5995,
            pair_us=0.1207,
        ),
    ),
}
