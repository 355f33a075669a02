"""Owns the other engines we are compared with, and how each runs best; never our own engine."""

from tokenspeed.bench.peers.compare import PeerComparison, measure_peers
from tokenspeed.bench.peers.environments import PACKAGES, llama_tool, python
from tokenspeed.bench.peers.exports import hf_folder, openvino_folder
from tokenspeed.bench.peers.servers import ENGINES, Launch, Server, launch_of, unused_port

__all__ = [
    "ENGINES",
    "PACKAGES",
    "Launch",
    "PeerComparison",
    "Server",
    "hf_folder",
    "launch_of",
    "llama_tool",
    "measure_peers",
    "openvino_folder",
    "python",
    "unused_port",
]
