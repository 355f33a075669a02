"""Owns placements, layers and models as equations over ops; never names a collective or a file."""

from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig, RopeConfig
from tokenspeed.modeling.model import Model, build_model, compile_model
from tokenspeed.modeling.models.registry import ARCHITECTURES, model_class

__all__ = [
    "ARCHITECTURES",
    "ForwardBatch",
    "KVStorage",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "build_model",
    "compile_model",
    "model_class",
]
