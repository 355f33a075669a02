"""An engine process without a model: real wire, real control plane, a fake forward of fixed time.

Takes the command line of `python -m tokenspeed.engine`; the pace is PACE_MS in the configuration's
`kernels`, so that the benchmark can choose it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
from tests.support.fake_runner import FakeRunner

from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.step import StepPlan
from tokenspeed.engine.core import Engine, EngineCore
from tokenspeed.engine.facts import EngineInfo
from tokenspeed.engine.server import serve
from tokenspeed.loader import Progress, Tokenizer, resolve

CONTEXT_MAX = 8192


class PacedRunner(FakeRunner):
    """Sleeps as long as a forward pass would take."""

    def __init__(self, *, pace_s: float, slots_max: int) -> None:
        # Ids of letters and words only: the gateway must find text to stream.
        super().__init__(vocabulary=1000, slots_max=slots_max)
        self._pace_s = pace_s

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        time.sleep(self._pace_s)
        launched = super().launch(plan)
        result = launched.result()
        result.tokens[:] = 1000 + result.tokens
        return launched


def build(config: EngineConfig) -> Engine:
    """An engine that streams made-up tokens of the model's vocabulary."""
    files = resolve(config.model)
    tokenizer = Tokenizer(files.tokenizer_dir)
    scheduler = SchedulerConfig(
        groups=(CacheGroup(pages=config.max_running * CONTEXT_MAX // config.page_size // 4),),
        slots_max=config.max_running,
        step_tokens_max=config.max_step_tokens,
        context_max=CONTEXT_MAX,
    )
    runner = PacedRunner(
        pace_s=float(config.kernels["pace_ms"]) / 1e3, slots_max=config.max_running
    )
    core = EngineCore(
        Scheduler(scheduler), runner, eos_token_ids=(), overlap_depth=0, seed=config.seed
    )
    info = EngineInfo(
        model_name=files.name,
        architecture="LlamaForCausalLM",
        model_type="llama",
        model_path=str(files.path),
        tokenizer_dir=str(files.tokenizer_dir),
        quantisation="none",
        dtype="float32",
        vocab_size=tokenizer.vocab_size,
        context_max=CONTEXT_MAX,
        eos_token_ids=list(tokenizer.eos_token_ids),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        default_sampling={},
        pages=scheduler.groups[0].pages,
        page_size=scheduler.page_size,
        slots_max=scheduler.slots_max,
        step_tokens_max=scheduler.step_tokens_max,
        overlap_depth=0,
        weights_size_bytes=0,
        kv_size_bytes=0,
        tps_floor=None,
        tps_alone=None,
    )
    return Engine(core=core, info=info)


def main() -> int:
    """Serve until the parent is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--config-json", required=True)
    arguments = parser.parse_args()
    config = msgspec.json.decode(arguments.config_json, type=EngineConfig)

    def builder(progress: Progress, found: Callable[[Path], None]) -> Engine:
        engine = build(config)
        found(Path(engine.info.tokenizer_dir))
        return engine

    return serve(
        builder,
        arguments.socket,
        parent_pid=os.getppid(),
        stream_interval_s=config.stream_interval_ms / 1000,
    )


if __name__ == "__main__":
    sys.exit(main())
