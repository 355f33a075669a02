"""A GGUF file as the Hugging Face model it was made from: configuration, names, order of rows."""

import itertools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.unit.loader import tiny_gguf
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import PACKED
from tokenspeed.loader.gguf_model import hf_name


def _open(path: Path) -> loader.Checkpoint:
    return loader.open_checkpoint(
        loader.ModelFiles(name="t", kind="gguf", path=path, tokenizer_dir=path.parent)
    )


def _ggml_rows(value: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order of rows to ggml's: from halves apart to pairs side by side."""
    rows = value.shape[0]
    order = np.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(0, 2, 1).ravel()
    return np.ascontiguousarray(value[order])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_take_the_names_and_rows_of_transformers(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    rng = np.random.default_rng(7)
    named = tiny_gguf.weights(architecture, rng)
    if not tied:
        named["output.weight"] = rng.standard_normal(
            named["token_embd.weight"].shape, dtype=np.float32
        )
    checkpoint = _open(tiny_gguf.write(tmp_path / "a.gguf", named, architecture=architecture))
    found = dict(checkpoint.tensors())
    assert len(found) == checkpoint.tensor_count
    assert checkpoint.hf_config["tie_word_embeddings"] is tied

    # transformers takes exactly these names for this configuration, none missing, none left over.
    config = AutoConfig.for_model(**checkpoint.hf_config)
    model = AutoModelForCausalLM.from_config(config)
    expected = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert {name: tensor.shape for name, tensor in found.items()} == expected

    for projection, heads in (("q", tiny_gguf.HEADS), ("k", tiny_gguf.KV_HEADS)):
        rows = found[f"model.layers.1.self_attn.{projection}_proj.weight"].numpy()
        in_file = named[f"blk.1.attn_{projection}.weight"]
        if architecture == "llama":
            assert not np.array_equal(rows, in_file)
            rows = _ggml_rows(rows, heads)
        np.testing.assert_array_equal(rows, in_file)
    np.testing.assert_array_equal(
        found["model.layers.0.self_attn.v_proj.weight"].numpy(), named["blk.0.attn_v.weight"]
    )


def test_the_real_llama_has_the_configuration_it_was_published_with(
    smollm2: loader.ModelFiles,
) -> None:
    checkpoint = _open(smollm2.path)
    assert checkpoint.hf_config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
    }
    assert checkpoint.quantisation == "Q4_1"
    assert checkpoint.tensor_count == 272


def test_a_load_tells_how_far_it_has_come(tmp_path: Path) -> None:
    class Heard(loader.Progress):
        def __init__(self) -> None:
            self.updates: list[tuple[str, int, int | None, str]] = []

        def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
            self.updates.append((stage, done, total, unit))

    rng = np.random.default_rng(7)
    checkpoint = _open(tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.weights("llama", rng)))
    heard = Heard()
    assert len(list(checkpoint.tensors(heard))) == len(heard.updates) == checkpoint.tensor_count
    size = checkpoint.size_bytes
    assert heard.updates[-1] == ("Loading weights", size, size, "bytes")
    assert [done for _, done, _, _ in heard.updates] == sorted(
        {done for _, done, _, _ in heard.updates}
    )


def _llama3_factors(factor: float) -> np.ndarray:
    config = LlamaConfig(
        hidden_size=tiny_gguf.HIDDEN,
        num_attention_heads=tiny_gguf.HEADS,
        head_dim=tiny_gguf.HEAD_DIM,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dims = np.arange(0, tiny_gguf.HEAD_DIM, 2) / tiny_gguf.HEAD_DIM
    return ((10_000.0**-dims) / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_found_behind_its_divisors(tmp_path: Path, factor: float) -> None:
    named = tiny_gguf.weights("llama", np.random.default_rng(7))
    named["rope_freqs.weight"] = _llama3_factors(factor)
    checkpoint = _open(tiny_gguf.write(tmp_path / "a.gguf", named))
    scaling = checkpoint.hf_config["rope_scaling"]
    assert scaling.pop("factor") == pytest.approx(factor, rel=1e-5)
    assert scaling == {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert checkpoint.tensor_count == len(named) - 1
    assert "rope_freqs.weight" not in dict(checkpoint.tensors())


def test_divisors_of_another_rule_are_refused(tmp_path: Path) -> None:
    named = tiny_gguf.weights("llama", np.random.default_rng(7))
    named["rope_freqs.weight"] = np.linspace(1, 9, tiny_gguf.HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(UnsupportedModel, match="another rule"):
        _open(tiny_gguf.write(tmp_path / "a.gguf", named))


def test_linear_scaling_is_passed_on(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    named = tiny_gguf.weights("llama", np.random.default_rng(7))
    checkpoint = _open(tiny_gguf.write(tmp_path / "a.gguf", named, change=add))
    assert checkpoint.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_yarn, "'yarn'"),
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_rope_dimension_count(4), "rotates 4 of the 16"),
    ],
)
def test_a_trait_that_is_not_handled_is_named(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], says: str
) -> None:
    named = tiny_gguf.weights("llama", np.random.default_rng(7))
    with pytest.raises(UnsupportedModel, match=says):
        _open(tiny_gguf.write(tmp_path / "a.gguf", named, change=change))


def test_an_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama, qwen2"):
        _open(path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    named = tiny_gguf.weights("llama", np.random.default_rng(7))
    named["blk.0.attn_q_norm.weight"] = np.ones(16, dtype=np.float32)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q_norm\.weight"):
        _open(tiny_gguf.write(tmp_path / "a.gguf", named))


def test_a_file_without_an_embedding_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"token_embd\.weight"):
        _open(tiny_gguf.write(tmp_path / "a.gguf", {}))


@pytest.mark.slow
def test_transformers_speaks_sense_with_the_real_weights(smollm2: loader.ModelFiles) -> None:
    checkpoint = _open(smollm2.path)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config))
    missing = model.load_state_dict(dict(checkpoint.tensors()), strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    tokenizer = loader.Tokenizer(smollm2.tokenizer_dir)
    ids = tokenizer.encode("The capital of France is")
    with torch.inference_mode():
        best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert tokenizer.decode([int(best)]) == " Paris"


def test_blocks_are_the_tensors_before_they_are_dequantised(smollm2: loader.ModelFiles) -> None:
    checkpoint = loader.open_checkpoint(smollm2)
    assert checkpoint.packed_format == PACKED
    matrices = 0
    tensors, blocks = checkpoint.tensors(), checkpoint.blocks()
    for (name, tensor), (name_again, block) in itertools.islice(
        zip(tensors, blocks, strict=True), 40
    ):
        assert name == name_again
        assert tensor.shape == block.shape
        if isinstance(block, torch.Tensor):
            assert tensor.dim() == 1
            assert torch.equal(tensor, block)
        else:
            matrices += 1
            assert torch.equal(tensor, block.to_float())
    assert matrices > 20


def test_a_file_with_a_matrix_of_floats_is_not_packable(tmp_path: Path) -> None:
    named = tiny_gguf.weights("qwen2", np.random.default_rng(7))
    path = tiny_gguf.write(tmp_path / "a.gguf", named, architecture="qwen2")
    assert _open(path).packed_format is None


def test_norms_have_the_names_of_their_architecture() -> None:
    norm = "model.layers.3.{}.weight"
    assert hf_name("blk.3.ffn_norm.weight") == norm.format("post_attention_layernorm")
    assert hf_name("blk.3.attn_q_norm.weight") is None
    assert hf_name("blk.3.attn_q_norm.weight", "qwen3") == norm.format("self_attn.q_norm")
    assert hf_name("blk.3.ffn_norm.weight", "qwen3") == norm.format("post_attention_layernorm")
    found = [
        hf_name(f"blk.3.{name}.weight", "gemma3")
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    ]
    assert found == [
        norm.format(name)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    ]
