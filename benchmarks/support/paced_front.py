"""Gateway, servicer and a paced engine: everything of `tokenspeed serve` but the model."""

import asyncio
import json
import os
import sys
from pathlib import Path

import uvloop

from tokenspeed.core.config import EngineConfig
from tokenspeed.engine.process import EngineProcess
from tokenspeed.entrypoint.gateway import Gateway, GatewayConfig, unused_port
from tokenspeed.entrypoint.parsers import PASSTHROUGH, Parsers
from tokenspeed.entrypoint.servicer import Servicer, start_server


async def main(model: str, running: int, pace_ms: float, stream_interval_ms: int) -> None:
    """Serve until standard input ends; the first line printed tells where, and who."""
    command = (sys.executable, str(Path(__file__).with_name("paced_engine.py")))
    config = EngineConfig(
        model=model,
        max_running=running,
        kernels={"pace_ms": str(pace_ms)},
        stream_interval_ms=stream_interval_ms,
    )
    engine = await EngineProcess.start(config, command=command)
    servicer = Servicer(stream_interval_s=stream_interval_ms / 1000)
    servicer.attach(engine.client)
    server, worker_port = await start_server(servicer)
    gateway = await Gateway.launch(
        GatewayConfig(
            host="127.0.0.1",
            port=unused_port(),
            worker_ports=(worker_port,),
            prometheus_port=unused_port(),
            tokenizer_dir=Path(engine.client.info.tokenizer_dir),
            parsers=Parsers(tool_call=PASSTHROUGH, reasoning=PASSTHROUGH),
        )
    )
    await gateway.wait_ready(model_name=engine.client.info.model_name, timeout_s=60)
    pids = {"servicer": os.getpid(), "gateway": gateway.pid, "engine": engine.pid}
    print(json.dumps({"url": gateway.url, "model": engine.client.info.model_name, "pids": pids}))
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await gateway.stop(is_idle=lambda: True)
    await engine.stop()
    await server.stop(grace=0.5)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
