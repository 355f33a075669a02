"""How far a kernel's result may lie from the float64 formula, and why.

Errors are of a whole tensor: norm(ours - exact) / norm(exact), and the same of largest absolute
values. The exact value is computed in float64 from the very inputs the kernel gets, so the
rounding of inputs does not count.
"""

from dataclasses import dataclass

__all__ = ["TOLERANCES", "Tolerance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Allowed relative error per element type of the result, with the reason."""

    float32: float
    bfloat16: float
    reason: str


TOLERANCES = {
    "gemm.linear": Tolerance(
        float32=2e-6,
        bfloat16=4e-3,
        reason="sums are float32 in an unknown order; one rounding of the result (2^-9)",
    ),
    "gemm.logits": Tolerance(
        float32=2e-6,
        bfloat16=2e-5,
        reason="the result is float32: what remains is the rounding of a remainder (2^-17)",
    ),
    "attention.paged_mha": Tolerance(
        float32=2e-6,
        bfloat16=6e-3,
        reason="softmax and sums are float32; a kernel may round probabilities to bfloat16 for "
        "the product with V, and rounds the result",
    ),
    "norm.rms_norm": Tolerance(
        float32=1e-6,
        bfloat16=4e-3,
        reason="float32 arithmetic, one rounding of the result (2^-9)",
    ),
    "norm.add_rms_norm": Tolerance(
        float32=1e-6,
        bfloat16=4e-3,
        reason="as rms_norm, and the exact value starts from the sum as it was rounded",
    ),
    "rope.angles": Tolerance(
        float32=1e-6, bfloat16=1e-6, reason="float32 whatever the model's type"
    ),
    "rope.rotate": Tolerance(
        float32=1e-6, bfloat16=4e-3, reason="float32 arithmetic, one rounding of the result"
    ),
    "activation.silu_and_mul": Tolerance(
        float32=1e-6, bfloat16=4e-3, reason="float32 arithmetic, one rounding of the result"
    ),
    "kvcache.append": Tolerance(float32=0.0, bfloat16=0.0, reason="a copy"),
    "embedding.lookup": Tolerance(float32=0.0, bfloat16=0.0, reason="a copy"),
}
"""By op name. The largest-value error may be twice the norm-wise one."""
