"""`tokenspeed kernels`: which kernels there are, why one is chosen, and whether they are right."""

from pathlib import Path
from typing import Annotated

import typer

from tokenspeed.cli.options import Device, LogLevel, LogLevelOption
from tokenspeed.cli.reporting import reported
from tokenspeed.core.errors import ConfigError, KernelError

__all__ = ["kernels_app"]

kernels_app = typer.Typer(
    help="Look into the kernel registry.", no_args_is_help=True, rich_markup_mode=None
)

_FORMATS = ("float32", "bfloat16", "float16")


@kernels_app.command("list")
def list_kernels(log_level: LogLevelOption = LogLevel.INFO) -> None:
    """List every op and the kernels that implement it, best band first."""
    with reported(log_level):
        # Imported late: torch takes seconds, and `--help` should not.
        from tokenspeed import kernels  # noqa: PLC0415

        kernels.load_plugins()
        for op in sorted(kernels.registry.ops):
            typer.echo(op)
            for kernel in kernels.registry.candidates(op):
                formats = (
                    "any format" if kernel.formats is kernels.ANY else ", ".join(kernel.formats)
                )
                typer.echo(
                    f"  {kernel.solution}:{kernel.name}  {kernel.priority.name.lower()}  {formats}"
                )


@kernels_app.command("explain")
def explain_kernel(
    *,
    op: Annotated[str, typer.Argument(help="Name of the op, as family.op.")],
    device: Annotated[Device, typer.Option(help="Where it would run.")] = Device.CPU,
    dtype: Annotated[
        str, typer.Option(help="Element type of activations: float32, bfloat16 or float16.")
    ] = "bfloat16",
    format_name: Annotated[
        str | None, typer.Option("--format", help="Format of the main operand [default: dtype].")
    ] = None,
    trait: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A trait the caller states; repeatable."),
    ] = None,
    force: Annotated[
        str | None, typer.Option(help="A solution to force, as --kernel OP=SOLUTION does.")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Say which kernel would be chosen for an op, and why each other one would not."""
    with reported(log_level):
        if dtype not in _FORMATS:
            raise ConfigError(f"--dtype must be one of {', '.join(_FORMATS)}, but is {dtype!r}")
        traits = dict(_trait(text) for text in trait or [])

        import torch  # noqa: PLC0415

        from tokenspeed import kernels  # noqa: PLC0415

        kernels.load_plugins()
        explanation = kernels.explain(
            op,
            device=torch.device(device.value),
            dtype=getattr(torch, dtype),
            overrides=None if force is None else {op: force},
            format_name=format_name,
            traits=traits,
        )
        typer.echo(str(explanation))


@kernels_app.command("verify")
def verify_kernels(
    *,
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Names of ops [default: all].")
    ] = None,
    solution: Annotated[
        str | None, typer.Option(help="The only solution to look at [default: all].")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The only element type of activations: float32, bfloat16 or float16 "
            "[default: all]."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where kernels run.")] = Device.CPU,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [default: all the process may use].")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Compare every kernel that can run here with its op's formula in float64.

    Sizes are odd ones too; the errors allowed, with their reasons, stand in one table,
    `tokenspeed/kernels/verify/tolerances.py`. The exit code is 1 if a kernel fails.
    """
    with reported(log_level):
        if dtype is not None and dtype not in _FORMATS:
            raise ConfigError(f"--dtype must be one of {', '.join(_FORMATS)}, but is {dtype!r}")

        import torch  # noqa: PLC0415

        from tokenspeed import kernels  # noqa: PLC0415
        from tokenspeed.execution import usable_cpu_count  # noqa: PLC0415
        from tokenspeed.kernels.cpu import start_runtime  # noqa: PLC0415
        from tokenspeed.kernels.verify import plan_runs, verify_and_tell  # noqa: PLC0415

        if device is Device.CUDA and not torch.cuda.is_available():
            raise ConfigError("--device cuda needs a GPU, and PyTorch finds none here")
        kernels.load_plugins()
        runs = plan_runs(
            kernels.registry,
            platform=kernels.Platform.of(torch.device(device.value)),
            ops=ops or (),
            solution=solution,
            dtype=None if dtype is None else getattr(torch, dtype),
        )
        runtime = start_runtime(threads=threads or usable_cpu_count())
        torch.set_num_threads(runtime.threads)
        on_gpu = device is Device.CUDA
        typer.echo(
            torch.cuda.get_device_name() if on_gpu else f"{runtime.isa}, threads: {runtime.threads}"
        )
        failed = verify_and_tell(
            runs, runtime, torch.device("cuda") if on_gpu else None, tell=typer.echo
        )
        if failed:
            raise KernelError(f"{failed} of {sum(len(run.cases) for run in runs)} cases failed")


@kernels_app.command("compile")
def compile_kernels(
    *,
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Names of ops [default: all].")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_90 or gfx942; may be repeated [default: both]. No GPU is needed."),
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Compile Triton's kernels for a GPU, at sizes of large models, and say what each takes of it.

    The exit code is 1 where one does not compile or takes more than there is.
    """
    with reported(log_level):
        from tokenspeed.kernels.triton.compile_only import TARGETS, compiling  # noqa: PLC0415
        from tokenspeed.kernels.triton.samples import samples  # noqa: PLC0415

        chosen = [sample for sample in samples() if not ops or sample.op in ops]
        if not chosen:
            known = ", ".join(sorted({sample.op for sample in samples()}))
            raise KernelError(f"no kernel of {', '.join(ops or ())}; there are those of {known}")
        for name in target or TARGETS:
            with compiling(name) as found:
                for sample in chosen:
                    first = len(found)
                    sample.call()
                    for kernel in found[first:]:
                        typer.echo(
                            f"{name:7} {sample.op:28} {sample.name:36} {kernel.name:15}"
                            f" {kernel.registers or '?':>4} registers,"
                            f" {kernel.spilled_size_bytes or 0:4} B spilled,"
                            f" {kernel.shared_size_bytes:7} B shared"
                            f"{', matrix unit' if kernel.matrix_unit else ''}"
                        )


@kernels_app.command("tune")
def tune_kernels(
    *,
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Names of ops [default: all].")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The table [default: tuned.json in the cache directory].")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Measure sizes of Triton's kernels on this GPU, and keep the fastest for engines to come."""
    with reported(log_level):
        import torch  # noqa: PLC0415

        from tokenspeed.kernels.triton.measure import time_us  # noqa: PLC0415
        from tokenspeed.kernels.triton.tuning import tune, tuned_path, write_table  # noqa: PLC0415
        from tokenspeed.kernels.triton.workloads import workloads  # noqa: PLC0415

        chosen = [work for work in workloads() if not ops or work.op in ops]
        if not chosen:
            known = ", ".join(sorted({work.op for work in workloads()}))
            raise KernelError(f"nothing of {', '.join(ops or ())} is tuned; there are {known}")
        if not torch.cuda.is_available():
            raise ConfigError("kernels are tuned on a GPU, and PyTorch finds none here")
        device, path = torch.device("cuda"), output or tuned_path()
        for work in chosen:
            call = work.make(device, 0).run
            found = tune([call], lambda calls: time_us(calls, device))
            write_table(path, torch.cuda.get_device_name(), found)
            for entry in found:
                typer.echo(
                    f"{work.op:22} {work.name:34} {entry.bucket}: {dict(entry.sizes)}"
                    f" {entry.before_us:.1f} -> {entry.after_us:.1f} us"
                )


@kernels_app.command("roofline")
def measure_roofline(
    *,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [default: all the process may use].")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Measure what this machine's memory and vector units can do at most."""
    with reported(log_level):
        from tokenspeed.execution import usable_cpu_count  # noqa: PLC0415
        from tokenspeed.kernels.cpu import Roofline, start_runtime  # noqa: PLC0415

        runtime = start_runtime(threads=threads or usable_cpu_count())
        found = Roofline.measure(runtime)
        typer.echo(f"{runtime.isa}, threads: {runtime.threads}")
        typer.echo(f"  memory read  {found.read_bytes_per_s / 1e9:7.1f} GB/s")
        typer.echo(f"  int8         {found.int8_ops_per_s / 1e9:7.0f} GOP/s")
        typer.echo(f"  bfloat16     {found.bf16_ops_per_s / 1e9:7.0f} GFLOP/s")
        typer.echo(f"  float32      {found.f32_ops_per_s / 1e9:7.0f} GFLOP/s")


@kernels_app.command("bench")
def bench_kernels(
    *,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [default: all the process may use].")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Native format of weights; may be repeated [default: all]."),
    ] = None,
    experts: Annotated[
        bool,
        typer.Option("--experts", help="Mixtures of experts instead of single products."),
    ] = False,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Measure products with packed weights beside what this machine can do at most."""
    with reported(log_level):
        from tokenspeed.execution import usable_cpu_count  # noqa: PLC0415
        from tokenspeed.kernels.cpu import start_runtime  # noqa: PLC0415
        from tokenspeed.kernels.cpu.bench import GEMM_FORMATS, bench_gemm  # noqa: PLC0415
        from tokenspeed.kernels.cpu.bench_experts import bench_experts  # noqa: PLC0415

        unknown = sorted(set(formats or ()) - set(GEMM_FORMATS))
        if unknown:
            raise ConfigError(
                f"--format {', '.join(unknown)} is no native format; the formats are "
                f"{', '.join(GEMM_FORMATS)}"
            )

        runtime = start_runtime(threads=threads or usable_cpu_count())
        if experts:
            typer.echo(f"{runtime.isa}, threads: {runtime.threads}; a layer's experts, w8")
            for found in bench_experts(runtime):
                typer.echo(
                    f"  {found.tokens:4} tokens {found.grouped_us:9.0f} us in one call,"
                    f" {found.apart_us:9.0f} us one after the other"
                    f" {found.bytes_per_s / 1e9:7.1f} GB/s"
                )
            return
        typer.echo(f"{runtime.isa}, threads: {runtime.threads}; tokens x outputs x inputs")
        for figure in bench_gemm(runtime, formats=formats or GEMM_FORMATS):
            sizes = f"{figure.tokens} x {figure.outputs} x {figure.inputs}"
            typer.echo(
                f"  {figure.format:10} {sizes:18}"
                f" {figure.ops_per_s / 1e9:7.0f} GOP/s, {figure.ops_fraction:4.0%} of the peak"
                f" {figure.bytes_per_s / 1e9:7.1f} GB/s, {figure.bytes_fraction:4.0%} of reading"
            )


def _trait(text: str) -> tuple[str, bool | int | str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"--trait {text!r} must be NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value
