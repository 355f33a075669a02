"""Choosing a kernel: capability, format, traits, determinism, override, priority, in this order."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch

from tokenspeed.core.errors import ConfigError, KernelError
from tokenspeed.kernels.capability import Platform
from tokenspeed.kernels.cpu.runtime import CpuRuntime, start_runtime
from tokenspeed.kernels.registry import (
    ANY,
    Kernel,
    Op,
    Priority,
    Registry,
    TraitValue,
)
from tokenspeed.kernels.registry import registry as default_registry

__all__ = ["Explanation", "KernelSelector", "Verdict", "explain", "objection"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one candidate.

    Attributes:
        kernel: the candidate.
        lost_at: "capability", "format", "traits", "determinism", "override" or "priority"; None for
            the winner.
        reason: a sentence.
    """

    kernel: Kernel
    lost_at: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a kernel was chosen for a request.

    Attributes:
        request: the request in words.
        winner: None if no candidate can run.
        verdicts: every candidate, in order of preference.
    """

    request: str
    winner: Kernel | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [
            f"  {verdict.kernel.solution}:{verdict.kernel.name}: {verdict.reason}"
            for verdict in self.verdicts
        ]
        return "\n".join([self.request, *(lines or ["  no kernel is registered"])])


class KernelSelector:
    """Chooses kernels for one model on one device, once, when the model is built.

    Args:
        device: where the model runs.
        dtype: its activations' element type, and the format of a request that names none.
        overrides: op name to the solution that must be used.
        weight_formats: formats in which the checkpoint's matrices can be had, best first; the
            dtype alone if None.
        kv_formats: formats that KV pages may have, best first, all of one element type; the dtype
            alone if None.
        activation_formats: formats that activations between two ops may have beside tensors of the
            dtype; none if None.
        runtime: threads and memory of native kernels; None for one that has the calling thread,
            and is started when a kernel first needs it.
        registry: where kernels are looked up; the package's own unless a test brings another.
        platform: what the device offers; found out unless a test brings another.
        deterministic: whether kernels whose rows depend on the batch are out of the question.

    Attributes:
        device, dtype: as given.
        context_shared: whether ranks have a part of each context.

    Raises:
        KernelError: an override names no op.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        overrides: Mapping[str, str] | None = None,
        weight_formats: Sequence[str] | None = None,
        kv_formats: Sequence[str] | None = None,
        activation_formats: Sequence[str] | None = None,
        runtime: CpuRuntime | None = None,
        registry: Registry | None = None,
        platform: Platform | None = None,
        deterministic: bool = False,
    ) -> None:
        self._deterministic = deterministic
        self.device = device
        self.dtype = dtype
        self._registry = registry or default_registry
        self._platform = platform or Platform.of(device)
        self._overrides = dict(overrides or {})
        self._weight_formats = tuple(weight_formats or (self._dtype_name,))
        self._kv_formats = tuple(kv_formats or (self._dtype_name,))
        self._activation_formats = tuple(activation_formats or ())
        self._runtime = runtime
        self.context_shared = False
        for name in self._overrides:
            self._registry.op(name)

    @property
    def runtime(self) -> CpuRuntime:
        """Threads and memory of native kernels."""
        if self._runtime is None:
            self._runtime = start_runtime(threads=1)
        return self._runtime

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight_format(self, *ops: Op[..., Any]) -> str:
        """The first of the checkpoint's formats in which each of some ops has a kernel.

        Traits are not looked at. Where no format serves all ops, that of the dtype is the answer,
        and `select` will say what is missing.

        Args:
            ops: those that read one weight as their main operand.
        """
        for name in self._weight_formats:
            if all(self._reads(op.name, name) for op in ops):
                return name
        return self._dtype_name

    def kv_format(self, *ops: Op[..., Any], **traits: TraitValue) -> str:
        """The first of the formats of KV pages that all of some ops read.

        Where none does and the type is the model's own, that is the answer, and `select` will say
        what is missing.

        Args:
            ops: those that share the pages.
            traits: values of their traits; each op is asked for those it has.

        Raises:
            ConfigError: another type was asked for, and no kernels here read pages of it.
        """
        lost = []
        for name in self._kv_formats:
            found = [
                self.explain(
                    op.name,
                    format_name=name,
                    traits={trait: traits[trait] for trait in op.traits & set(traits)},
                )
                for op in ops
            ]
            if all(explanation.winner for explanation in found):
                return name
            lost += [str(explanation) for explanation in found if explanation.winner is None]
        if self.kv_dtype_name == self._dtype_name:
            return self._dtype_name
        raise ConfigError(
            f"--kv-dtype {self.kv_dtype_name} needs kernels that read and write such pages, and "
            f"there are none for this model here; choose --kv-dtype auto. {' '.join(lost)}"
        )

    @property
    def kv_dtype_name(self) -> str:
        """Name of the element type of KV pages."""
        return self._kv_formats[0].removeprefix("interleaved_")

    def select_beyond_reference(
        self,
        op: Op[P, R],
        *,
        format_name: str | None = None,
        traits: Mapping[str, TraitValue] | None = None,
    ) -> Callable[P, R] | None:
        """As `select`, for an op that stands for several: None where no kernel does better than
        they do.

        Args:
            op: the one.
            format_name, traits: as for `select`.
        """
        winner = self.explain(op.name, format_name=format_name, traits=traits).winner
        if winner is None or winner.priority == Priority.REFERENCE:
            return None
        return self.select(op, format_name=format_name, traits=traits)

    def reads(
        self,
        op: Op[..., Any],
        *,
        format_name: str | None = None,
        traits: Mapping[str, TraitValue] | None = None,
    ) -> tuple[str, ...]:
        """Formats that the kernel which `select` gives takes its activations in, beside tensors.

        Args:
            op: a reader of activations.
            format_name, traits: as for `select`.
        """
        winner = self.explain(op.name, format_name=format_name, traits=traits).winner
        formats = winner.reads if winner else ()
        return tuple(name for name in formats if name in self._activation_formats)

    def result_format(self, *ops: Op[..., Any], reads: Sequence[str]) -> str:
        """The first of a reader's formats in which each of some ops gives its result; the dtype if
        there is none.

        Args:
            ops: those whose results go to the reader.
            reads: what `reads` says of the reader.
        """
        for name in reads:
            if all(self.explain(op.name, format_name=name).winner for op in ops):
                return name
        return self._dtype_name

    def with_tensors_only(self) -> "KernelSelector":
        """The same choices where activations must be tensors, as between ranks."""
        selector = copy.copy(self)
        selector._runtime = self.runtime
        selector._activation_formats = ()
        return selector

    def with_context_shared(self) -> "KernelSelector":
        """The same choices for a model whose ranks have a part of each context."""
        selector = copy.copy(self)
        selector._runtime = self.runtime
        selector.context_shared = True
        return selector

    def _reads(self, op: str, format_name: str) -> bool:
        return any(
            kernel.requires.unmet_by(self._platform) is None
            and (kernel.formats is ANY or format_name in kernel.formats)
            and kernel.solution == self._overrides.get(op, kernel.solution)
            and not (self._deterministic and kernel.batch_dependent)
            for kernel in self._registry.candidates(op)
        )

    def select(
        self,
        op: Op[P, R],
        *,
        format_name: str | None = None,
        traits: Mapping[str, TraitValue] | None = None,
    ) -> Callable[P, R]:
        """The kernel to call.

        Args:
            op: what to compute.
            format_name: element type or packed format of the op's main operand (weights of a gemm,
                KV of an attention); None for the selector's dtype.
            traits: values of the op's traits that the caller states.

        Raises:
            KernelError: nothing fits, or the forced solution cannot run; names every reason.
        """
        explanation = self.explain(op.name, format_name=format_name, traits=traits)
        if explanation.winner is None:
            forced = self._overrides.get(op.name)
            wanted = f"{forced!r} was forced for {op.name}" if forced else f"{op.name} is needed"
            raise KernelError(f"{wanted}, but no such kernel can run. {explanation}")
        call = explanation.winner.call
        if explanation.winner.takes_runtime:
            call = functools.partial(call, runtime=self.runtime)
        return cast("Callable[P, R]", call)

    def explain(
        self,
        op: str,
        *,
        format_name: str | None = None,
        traits: Mapping[str, TraitValue] | None = None,
    ) -> Explanation:
        """Every candidate for a request, with the reason it won or lost.

        Raises:
            KernelError: no such op, or a trait it does not have.
        """
        declared = self._registry.op(op)
        stated = dict(traits or {})
        unknown = sorted(set(stated) - declared.traits)
        if unknown:
            raise KernelError(
                f"{op} has no trait {', '.join(unknown)}; it has "
                f"{', '.join(sorted(declared.traits)) or 'none'}"
            )
        format_name = format_name or self._dtype_name
        winner: Kernel | None = None
        verdicts = []
        for kernel in self._registry.candidates(op):
            lost_at, reason = self._first_objection(kernel, format_name, stated)
            if lost_at is None and winner is not None:
                lost_at = "priority"
                reason = (
                    f"can run, but {winner.solution}:{winner.name} of band {winner.priority.name} "
                    f"comes before band {kernel.priority.name}"
                )
            elif lost_at is None:
                winner = kernel
            verdicts.append(Verdict(kernel=kernel, lost_at=lost_at, reason=reason))
        words = "".join(f", {name}={value!r}" for name, value in sorted(stated.items()))
        return Explanation(
            request=f"{op} on {self._platform.device}, format={format_name}{words}:",
            winner=winner,
            verdicts=tuple(verdicts),
        )

    def _first_objection(
        self, kernel: Kernel, format_name: str, traits: Mapping[str, TraitValue]
    ) -> tuple[str | None, str]:
        found = objection(kernel, self._platform, format_name=format_name, traits=traits)
        if found is not None:
            return found
        if self._deterministic and kernel.batch_dependent:
            return "determinism", "a row's last bits depend on what shares its batch"
        forced = self._overrides.get(kernel.op)
        if forced is not None and kernel.solution != forced:
            return "override", f"{forced!r} was forced"
        return None, "chosen: it was forced" if forced else "chosen"


def objection(
    kernel: Kernel,
    platform: Platform,
    *,
    format_name: str,
    traits: Mapping[str, TraitValue],
) -> tuple[str, str] | None:
    """Why a kernel cannot serve a request, as `Verdict` has it: where it lost, and the reason.

    None if it can.
    """
    unmet = kernel.requires.unmet_by(platform)
    if unmet:
        return "capability", unmet
    if kernel.formats is not ANY and format_name not in kernel.formats:
        return "format", f"reads {', '.join(sorted(kernel.formats))}, not {format_name}"
    unfit = _unfit_trait(kernel, traits)
    if unfit:
        return "traits", unfit
    return None


def _unfit_trait(kernel: Kernel, traits: Mapping[str, TraitValue]) -> str | None:
    for name, value in sorted(traits.items()):
        if name not in kernel.traits:
            return f"does not declare {name}"
        admitted = kernel.traits[name]
        if admitted is not ANY and value not in admitted:
            return f"handles {name} of {sorted(admitted)!r}, not {value!r}"
    for name, admitted in sorted(kernel.traits.items()):
        if admitted is not ANY and name not in traits:
            return f"depends on {name}, which the request does not state"
    return None


def explain(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    overrides: Mapping[str, str] | None = None,
    format_name: str | None = None,
    traits: Mapping[str, TraitValue] | None = None,
) -> Explanation:
    """`KernelSelector.explain` for those who have no selector.

    Raises:
        KernelError: no such op, or a trait it does not have.
    """
    selector = KernelSelector(device=device, dtype=dtype, overrides=overrides)
    return selector.explain(op, format_name=format_name, traits=traits)
