"""Owns the mesh of ranks, their groups and the collectives between them; never knows a model."""

from tokenspeed.distributed.group import LOOPBACK, Group, Store, connect, file_store
from tokenspeed.distributed.meeting import (
    ByteGroup,
    Place,
    RankName,
    address_towards,
    leave_failure,
    meet,
    tcp_store,
)
from tokenspeed.distributed.mesh import ATTENTION_AXES, AXES, EXPERT_AXES, Mesh, share

__all__ = [
    "ATTENTION_AXES",
    "AXES",
    "EXPERT_AXES",
    "LOOPBACK",
    "ByteGroup",
    "Group",
    "Mesh",
    "Place",
    "RankName",
    "Store",
    "address_towards",
    "connect",
    "file_store",
    "leave_failure",
    "meet",
    "share",
    "tcp_store",
]
