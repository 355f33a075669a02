"""How far a kernel's result may lie from the float64 formula, and why.

Errors are of a whole tensor: norm(ours - exact) / norm(exact), and half of the same of largest
absolute values. The exact value is computed in float64 from the very inputs the kernel gets, so the
rounding of inputs does not count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tokenspeed.kernels.activations import QUANTISED_ROWS
from tokenspeed.kernels.kv_formats import FLOAT8, ROUNDED
from tokenspeed.kernels.quantised import FLOAT8_BLOCKS
from tokenspeed.kernels.verify.case import Case, named
from tokenspeed.kernels.weights import GROUPED, PACKED

__all__ = ["TOLERANCES", "Tolerance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Allowed relative error, with the reason.

    Attributes:
        float32, bfloat16, float16: by element type of the activations.
        reason: why no less can be asked.
        packed: with packed weights, whatever the type; None where an op has no such weights.
        quantised: of quantised rows, whatever the type; None where an op does not give them.
        rounded: with KV pages of whole numbers, likewise.
        float8: with weights of FP8 in blocks, likewise.
        kv_float8: with KV pages of FP8, where their rounding is not the cases'; as the activations
            if None.
    """

    float32: float
    bfloat16: float
    float16: float
    reason: str
    packed: float | None = None
    quantised: float | None = None
    rounded: float | None = None
    float8: float | None = None
    kv_float8: float | None = None

    def of(self, case: Case) -> float:
        """The error allowed in a case."""
        if case.format_name in (PACKED, *GROUPED):
            assert self.packed is not None
            return self.packed
        if case.format_name == QUANTISED_ROWS:
            assert self.quantised is not None
            return self.quantised
        if case.format_name == ROUNDED:
            assert self.rounded is not None
            return self.rounded
        if case.format_name == FLOAT8_BLOCKS:
            assert self.float8 is not None
            return self.float8
        if case.format_name == FLOAT8 and self.kv_float8 is not None:
            return self.kv_float8
        return float(getattr(self, named(case.dtype)))


_ROUNDED: Final = Tolerance(
    float32=1e-6,
    bfloat16=4e-3,
    float16=5e-4,
    quantised=1e-2,
    reason="float32 arithmetic, one rounding of the result (2^-9 or 2^-12, or to 127ths of the "
    "largest of 32, which is off by half a percent of a normal one)",
)
_COPY: Final = Tolerance(float32=0.0, bfloat16=0.0, float16=0.0, packed=0.0, reason="a copy")
_CHOICE: Final = Tolerance(
    float32=0.0, bfloat16=0.0, float16=0.0, reason="there is one right answer"
)

TOLERANCES: Final[Mapping[str, Tolerance]] = {
    "gemm.linear": Tolerance(
        float32=2e-6,
        bfloat16=4e-3,
        float16=5e-4,
        packed=1.5e-2,
        float8=4e-2,
        reason="sums are float32 in an unknown order, and the result is rounded once; beside "
        "packed weights a kernel may round inputs to 127ths of the largest of 32, which is off by "
        "half a percent of a normal input, beside weights of FP8 to that type, which is off by up "
        "to 2^-4; errors are relative to sums of terms of random sign",
    ),
    "gemm.heads": Tolerance(
        float32=2e-6, bfloat16=4e-3, float16=5e-4, reason="dense products as in gemm.linear"
    ),
    "gemm.logits": Tolerance(
        float32=2e-6,
        bfloat16=2e-5,
        float16=4e-6,
        packed=1.5e-2,
        reason="the result is float32: what remains is the rounding of a remainder (2^-17); "
        "packed as in gemm.linear",
    ),
    "attention.paged_mha": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        float16=1e-3,
        rounded=1.5e-2,
        reason="softmax and sums are float32; a kernel may round probabilities to the type of V "
        "for the product with it, and rounds the result; beside rounded pages it may round queries "
        "to 127ths of a head's largest element, as packed weights have it",
    ),
    "attention.partial_mha": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        float16=1e-3,
        rounded=1.5e-2,
        reason="as attention.paged_mha; the result is float32",
    ),
    "moe.route": Tolerance(float32=1e-6, bfloat16=1e-6, float16=1e-6, reason="float32 arithmetic"),
    "moe.add": _ROUNDED,
    "moe.experts": Tolerance(
        float32=4e-6,
        bfloat16=1e-2,
        float16=1.5e-3,
        packed=3e-2,
        float8=8e-2,
        reason="two products, each as in gemm.linear, and a rounding between them",
    ),
    "attention.paged_mla": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        float16=1e-3,
        reason="as attention.paged_mha",
    ),
    "attention.partial_mla": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        float16=1e-3,
        reason="as attention.paged_mla; the result is float32",
    ),
    "attention.project_parts": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        float16=1e-3,
        reason="dense products as in gemm.linear; a kernel may round results to the weight's type",
    ),
    "attention.prompt_mla": Tolerance(
        float32=4e-6,
        bfloat16=1e-2,
        float16=1.5e-3,
        reason="as attention.paged_mha, and a kernel may round keys and values to the type of q",
    ),
    "norm.rms_norm": _ROUNDED,
    # The exact value starts from the sum as it was rounded.
    "norm.add_rms_norm": _ROUNDED,
    "rope.angles": Tolerance(
        float32=1e-6, bfloat16=1e-6, float16=1e-6, reason="float32 whatever the model's type"
    ),
    "rope.rotate": _ROUNDED,
    "activation.gelu_tanh_and_mul": _ROUNDED,
    "activation.silu_and_mul": _ROUNDED,
    "kvcache.append": Tolerance(
        float32=0.0,
        bfloat16=0.0,
        float16=0.0,
        rounded=0.501,
        reason="a copy; of rounded pages half a step, and what float32 arithmetic adds to it",
    ),
    "kvcache.append_latents": _COPY,
    "kvcache.rotate_and_append": Tolerance(
        float32=1e-6,
        bfloat16=4e-3,
        float16=5e-4,
        kv_float8=3.5e-2,
        reason="rope.rotate and a copy; FP8 pages round K to three bits",
    ),
    "embedding.lookup": _COPY,
    "attention.join_heads": _COPY,
    "embedding.take": _COPY,
    "sampling.argmax": _CHOICE,
    "sampling.add_bias": Tolerance(
        float32=1e-7, bfloat16=1e-7, float16=1e-7, reason="one addition in float32"
    ),
    "sampling.apply_bitmask": _CHOICE,
    "sampling.penalise": Tolerance(
        float32=1e-6, bfloat16=1e-6, float16=1e-6, reason="float32 arithmetic"
    ),
    "sampling.logprobs": Tolerance(
        float32=1e-6,
        bfloat16=1e-6,
        float16=1e-6,
        reason="sums of float32 weights over a vocabulary",
    ),
    "sampling.draw": Tolerance(
        float32=3e-5,
        bfloat16=3e-5,
        float16=3e-5,
        reason="float32 weights move the marks between tokens a little; the error is the distance "
        "of a uniform number from its token's share of [0, 1]",
    ),
}
"""By op name."""
