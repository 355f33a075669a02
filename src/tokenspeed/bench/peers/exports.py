"""A model's weights in forms that other engines read, made once from the file that ours reads."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

from tokenspeed import loader
from tokenspeed.bench.peers.environments import python
from tokenspeed.core.environment import peers_dir
from tokenspeed.core.errors import MeasurementError

__all__ = ["hf_folder", "openvino_folder"]

_log = logging.getLogger(__name__)


def hf_folder(files: loader.ModelFiles, name: str) -> Path:
    """The model as bfloat16 safetensors, which vLLM reads and OpenVINO exports from."""
    # Only now: it imports torch.
    from safetensors.torch import save_file  # noqa: PLC0415

    target = peers_dir() / "models" / name
    if not (target / "config.json").exists():
        _log.info("exporting %s to %s", name, target)
        checkpoint = loader.open_checkpoint(files)
        tensors = {
            tensor_name: value.bfloat16().contiguous()
            for tensor_name, value in checkpoint.tensors()
        }
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        for file in files.tokenizer_dir.iterdir():
            shutil.copy(file, target / file.name)
        (target / "config.json").write_text(
            json.dumps({**checkpoint.hf_config, "torch_dtype": "bfloat16"})
        )
    return target


def openvino_folder(files: loader.ModelFiles, name: str, weights: str) -> Path:
    """The model in OpenVINO's form with `weights` "int4" or "int8", its own requantisation.

    Raises:
        MeasurementError: the export failed; its words are on stderr.
    """
    target = peers_dir() / "models" / f"{name}-{weights}"
    if not (target / "openvino_model.bin").exists():
        _log.info("exporting %s to %s", name, target)
        options = ["--group-size", "64", "--ratio", "1.0"] if weights == "int4" else []
        command = [
            str(python("openvino").parent / "optimum-cli"),
            *("export", "openvino", "--task", "text-generation-with-past"),
            *("--model", str(hf_folder(files, name)), "--weight-format", weights),
            *(*options, str(target)),
        ]
        try:
            subprocess.run(command, check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MeasurementError(f"{name} cannot be exported to OpenVINO: {error}") from error
    return target
