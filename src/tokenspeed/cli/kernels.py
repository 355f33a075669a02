"""`tokenspeed kernels`: which kernels there are, and why one is chosen."""

from typing import Annotated

import typer

from tokenspeed.cli.options import Device, LogLevel, LogLevelOption
from tokenspeed.cli.reporting import reported
from tokenspeed.core.errors import ConfigError

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
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Measure products with packed weights beside what this machine can do at most."""
    with reported(log_level):
        from tokenspeed.execution import usable_cpu_count  # noqa: PLC0415
        from tokenspeed.kernels.cpu import start_runtime  # noqa: PLC0415
        from tokenspeed.kernels.cpu.bench import GEMM_FORMATS, bench_gemm  # noqa: PLC0415

        unknown = sorted(set(formats or ()) - set(GEMM_FORMATS))
        if unknown:
            raise ConfigError(
                f"--format {', '.join(unknown)} is no native format; the formats are "
                f"{', '.join(GEMM_FORMATS)}"
            )

        runtime = start_runtime(threads=threads or usable_cpu_count())
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
