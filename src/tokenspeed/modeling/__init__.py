"""Owns placements, layers and models as equations over ops; never names a collective or a file."""

from tokenspeed.modeling.batch import ForwardBatch, GivenStates, HiddenStates, KVStorage
from tokenspeed.modeling.config import ModelConfig, RopeConfig
from tokenspeed.modeling.head import Head, build_head
from tokenspeed.modeling.model import Model, build_model, compile_model
from tokenspeed.modeling.models.registry import ARCHITECTURES, model_class

__all__ = [
    "ARCHITECTURES",
    "ForwardBatch",
    "GivenStates",
    "Head",
    "HiddenStates",
    "KVStorage",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "build_head",
    "build_model",
    "compile_model",
    "model_class",
]
