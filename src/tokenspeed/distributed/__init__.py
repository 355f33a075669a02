"""Owns the mesh of ranks, their groups and the collectives between them; never knows a model."""

from tokenspeed.distributed.group import Group, Store, connect, file_store
from tokenspeed.distributed.mesh import ATTENTION_AXES, AXES, EXPERT_AXES, Mesh, share

__all__ = [
    "ATTENTION_AXES",
    "AXES",
    "EXPERT_AXES",
    "Group",
    "Mesh",
    "Store",
    "connect",
    "file_store",
    "share",
]
