"""How a checkpoint says that it is quantised, and which of its tensors make up one matrix."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import Stored
from tokenspeed.kernels.quantised import FLOAT4_GROUPS, FLOAT8_BLOCKS, INT4_GROUPS
from tokenspeed.loader.quantised import Raw, awq, compressed_int4, fp8_blocks, gptq, mxfp4

__all__ = ["Scheme", "read_scheme"]

_SUPPORTED = (
    "supported are fp8 (e4m3 in blocks), compressed-tensors (pack-quantized, 4-bit integers), awq "
    "(4 bits, gemm), gptq (4 bits, desc_act false) and mxfp4, and GGUF files"
)
_WORDS = {"I32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One format of quantised matrices.

    Attributes:
        name: for people.
        main: the end of the name of a matrix's numbers.
        whole: the end of the matrix's name.
        needed, possible: ends of names of what belongs to it.
        dtypes: bytes of element types, by safetensors' name, that it has beside plain ones.
        make: the matrix of its parts, by end of the name.
        format_name: of weights in which kernels take such matrices as they are, if there is one.
    """

    name: str
    main: str
    whole: str
    needed: tuple[str, ...]
    possible: tuple[str, ...] = ()
    dtypes: Mapping[str, int]
    make: Callable[[str, Mapping[str, Raw]], Stored] = field(repr=False)
    format_name: str | None = None

    def matrices(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """The checkpoint's tensors: of each, names of its parts by end; of a plain one, itself.

        Raises:
            CorruptCheckpoint: a part has no matrix, or a matrix lacks a part.
        """
        known = set(names)
        found: dict[str, dict[str, str]] = {}
        for name in sorted(known):
            beside = self._beside(name)
            if beside is not None:
                if beside + self.main not in known:
                    raise CorruptCheckpoint(f"{name} belongs to {beside + self.main}, which lacks")
                continue
            stem = name.removesuffix(self.main) if name.endswith(self.main) else None
            parts = {
                end: f"{stem}{end}"
                for end in (*self.needed, *self.possible)
                if stem is not None and f"{stem}{end}" in known
            }
            if stem is None or (self.main == self.whole and not parts):
                found[name] = {"": name}
                continue
            lacking = [end for end in self.needed if end not in parts]
            if lacking:
                raise CorruptCheckpoint(
                    f"{name} of a {self.name} checkpoint has no {stem}{lacking[0]}"
                )
            found[stem + self.whole] = {self.main: name, **parts}
        return found

    def _beside(self, name: str) -> str | None:
        """What a name begins with that is a part beside a matrix's numbers."""
        for end in (*self.needed, *self.possible):
            if name.endswith(end):
                return name.removesuffix(end)
        return None


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """What `quantization_config` of a `config.json` says; None where nothing is quantised.

    Raises:
        UnsupportedModel: another format, or an option of one; names those that are read.
    """
    scheme = config.get("quantization_config")
    if scheme is None:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    readers: dict[Any, Callable[[Mapping[str, Any]], Scheme]] = {
        "awq": _awq,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "gptq": _gptq,
        "mxfp4": _mxfp4,
    }
    if method not in readers:
        raise UnsupportedModel(f"a checkpoint quantised by {method!r}; {_SUPPORTED}")
    return readers[method](scheme)


def _fp8(scheme: Mapping[str, Any]) -> Scheme:
    _require("fp8", scheme, fmt=("e4m3",), activation_scheme=("dynamic",))
    block = scheme.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(_positive(of) for of in block):
        raise UnsupportedModel(
            f"fp8 with weight_block_size {block!r}; two numbers, as [128, 128], are supported"
        )
    return Scheme(
        name="FP8",
        main="weight",
        whole="weight",
        needed=("weight_scale_inv",),
        dtypes={"F8_E4M3": 1},
        make=partial(fp8_blocks, block=(block[0], block[1])),
        format_name=FLOAT8_BLOCKS,
    )


def _awq(scheme: Mapping[str, Any]) -> Scheme:
    _require("awq", scheme, bits=(4,), version=("gemm", "GEMM"), zero_point=(True,))
    return Scheme(
        name="AWQ",
        main="qweight",
        whole="weight",
        needed=("qzeros", "scales"),
        dtypes=_WORDS,
        make=awq,
        format_name=INT4_GROUPS,
    )


def _gptq(scheme: Mapping[str, Any]) -> Scheme:
    formats = ("gptq", "gptq_v2")
    _require("gptq", scheme, bits=(4,), desc_act=(False,), checkpoint_format=formats)
    # The first version of the format keeps zero points less one.
    offset = 0 if scheme.get("checkpoint_format") == "gptq_v2" else 1
    return Scheme(
        name="GPTQ",
        main="qweight",
        whole="weight",
        needed=("qzeros", "scales"),
        possible=("g_idx",),
        dtypes=_WORDS,
        make=partial(gptq, zero_offset=offset),
        format_name=INT4_GROUPS,
    )


def _compressed(scheme: Mapping[str, Any]) -> Scheme:
    _require("compressed-tensors", scheme, format=("pack-quantized",))
    groups = scheme.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CorruptCheckpoint("config.json: compressed-tensors needs config_groups")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise UnsupportedModel(f"compressed-tensors with {name}, which quantises no weights")
        _require(
            f"compressed-tensors ({name})",
            weights,
            num_bits=(4,),
            type=("int",),
            strategy=("group", "channel"),
            actorder=(None, False, "weight"),
        )
        if group.get("input_activations") is not None:
            raise UnsupportedModel(
                f"compressed-tensors ({name}) with input_activations, which are not quantised here"
            )
    return Scheme(
        name="INT4",
        main="weight_packed",
        whole="weight",
        needed=("weight_scale", "weight_shape"),
        possible=("weight_zero_point",),
        dtypes={**_WORDS, "I64": 8},
        make=compressed_int4,
        format_name=INT4_GROUPS,
    )


def _mxfp4(scheme: Mapping[str, Any]) -> Scheme:
    return Scheme(
        name="MXFP4",
        main="_blocks",
        whole="",
        needed=("_scales",),
        dtypes={"U8": 1},
        make=mxfp4,
        format_name=FLOAT4_GROUPS,
    )


def _require(method: str, scheme: Mapping[str, Any], **supported: tuple[Any, ...]) -> None:
    for name, values in supported.items():
        value = scheme.get(name)
        if value is not None and value not in values:
            said = " or ".join(map(repr, (value for value in values if value is not None)))
            raise UnsupportedModel(f"{method} with {name} {value!r}; {name} {said} is supported")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
