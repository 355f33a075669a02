"""What an engine's process begins before it imports torch, which takes a second on one CPU."""

# Its face, `tokenspeed.kernels.cpu`, has to do with tensors.
from tokenspeed._cpu import WeightMemory
from tokenspeed.core.config import EngineConfig
from tokenspeed.engine.sizing import RESERVE_SIZE_BYTES, available_memory_size_bytes
from tokenspeed.loader import ModelFiles

__all__ = ["take_memory"]


def take_memory(config: EngineConfig, files: ModelFiles) -> WeightMemory | None:
    """Have the system make memory for a model's packed weights from now on, on another CPU.

    Zeroing it takes longer than packing weights into it. None where weights are not packed, where
    they may not fit, and where several engines or ranks share them and the machine.
    """
    alone = config.tp * config.cp * config.dp == 1
    if files.kind != "gguf" or config.device != "cpu" or not alone:
        return None
    # Blocks of a file take about as much when they are packed.
    size_bytes = files.path.stat().st_size
    if size_bytes + RESERVE_SIZE_BYTES > available_memory_size_bytes():
        return None
    return WeightMemory(size_bytes=size_bytes)
