"""Owns the mesh of ranks, their groups and the collectives between them; never knows a model."""

from tokenspeed.distributed.group import Group, connect
from tokenspeed.distributed.mesh import ATTENTION_AXES, AXES, EXPERT_AXES, Mesh, share

__all__ = ["ATTENTION_AXES", "AXES", "EXPERT_AXES", "Group", "Mesh", "connect", "share"]
