"""Heads of drafts against their formulas, written down apart in float32."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu, softmax

from tests.models.test_draft_model import (
    CONFIG,
    OUTPUT,
    PROMPTS,
    SLOTS,
    Users,
    greedy,
    runner_of,
)
from tests.models.tiny import CONFIGS, build, read_tensors, write_tiny
from tests.support.forward import Request, build_rows
from tests.unit.execution.tiny import CPU
from tokenspeed.cache import KVPools
from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import ForwardBatch, Model, ModelConfig
from tokenspeed.modeling.batch import GivenStates, HiddenStates
from tokenspeed.modeling.head import Head, build_head

TOKENS = [7, 40, 3, 121, 90, 12, 198, 0, 55, 61, 13, 2, 88, 150, 31, 77, 5, 6, 7, 8]
# Positions that follow what the target knows, on the head's own states.
OWN = 4


def rms(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rotated(x_TXD: Tensor, theta: float = 10000.0) -> Tensor:
    half = x_TXD.shape[-1] // 2
    turns = torch.arange(len(x_TXD))[:, None] * theta ** -(torch.arange(half) / half)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    a, b = x_TXD[..., :half], x_TXD[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Steps:
    """Runs a model over one request, with what it keeps and what it is given."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kv = KVPools(model.kv_specs(), pages=16, page_size=16, device=CPU)
        self.table = torch.zeros((1, 16), dtype=torch.int32)
        self.request = Request(slot=0, pages=[9, 2, 5, 11, 0, 3, 7, 1, 8])

    def run(
        self, tokens: list[int], kept: HiddenStates, given: GivenStates | None = None
    ) -> Tensor:
        first, count = self.request.length, len(tokens)
        rows = build_rows([(self.request, count)], self.table, 16)
        self.request.length += count
        batch = ForwardBatch(
            token_ids_T=torch.tensor(tokens),
            positions_T=torch.arange(first, first + count),
            groups=(rows,),
            sample_token_indices_S=None,
            kept=kept,
            given=given,
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.kv)


def ours(target: Model, head: Head, chunk: int) -> Tensor:
    """The head's logits of all positions but the last token's, then of some on its own states;
    both networks in chunks."""
    kept = HiddenStates(head.state_layers)
    own = HiddenStates((0,))
    of_target, of_head = Steps(target), Steps(head)
    states, logits = [], []
    known = len(TOKENS) - OWN
    for start in range(0, known - 1, chunk):
        end = min(start + chunk, known - 1)
        of_target.run(TOKENS[start:end], kept)
        states.append(kept.states(end - start))
    states_TF = torch.cat(states)
    for start in range(0, known - 1, chunk):
        end = min(start + chunk, known - 1)
        given = GivenStates(states_TF=states_TF[start:end], own=False)
        logits.append(of_head.run(TOKENS[start + 1 : end + 1], own, given))
    for position in range(known - 1, len(TOKENS) - 1):
        given = GivenStates(states_TF=own.states(end - start)[-1:], own=True)
        start, end = 0, 1
        logits.append(of_head.run(TOKENS[position + 1 : position + 2], own, given))
    return torch.cat(logits)


def eagle3(folder: Path) -> dict[str, Tensor]:
    """Write a head of random weights beside a target."""
    config = CONFIGS["llama"]
    features, inner, known = config.hidden_size, config.intermediate_size, 50
    shapes = {
        "fc.weight": (features, 3 * features),
        "midlayer.hidden_norm.weight": (features,),
        "midlayer.input_layernorm.weight": (features,),
        "midlayer.self_attn.q_proj.weight": (6 * 16, 2 * features),
        "midlayer.self_attn.k_proj.weight": (2 * 16, 2 * features),
        "midlayer.self_attn.v_proj.weight": (2 * 16, 2 * features),
        "midlayer.self_attn.o_proj.weight": (features, 6 * 16),
        "midlayer.post_attention_layernorm.weight": (features,),
        "midlayer.mlp.gate_proj.weight": (inner, features),
        "midlayer.mlp.up_proj.weight": (inner, features),
        "midlayer.mlp.down_proj.weight": (features, inner),
        "norm.weight": (features,),
        "lm_head.weight": (known, features),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 1.0)
        for name, shape in shapes.items()
    }
    ids = torch.randperm(config.vocab_size, generator=generator)[:known].sort().values
    tensors["d2t"] = ids - torch.arange(known)
    tensors["t2d"] = torch.isin(torch.arange(config.vocab_size), ids)
    save_file(tensors, folder / "model.safetensors")
    wanted = config.to_dict() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": known,
    }
    (folder / "config.json").write_text(json.dumps(wanted))
    return tensors


def eagle3_formula(weights: dict[str, Tensor], theirs: Any) -> Tensor:
    """The head's logits, over whole sequences."""
    embedded_TM = theirs.model.embed_tokens(torch.tensor(TOKENS[1:]))
    known = len(TOKENS) - OWN - 1
    stream = theirs(torch.tensor([TOKENS[:known]]), output_hidden_states=True).hidden_states
    states_TM = linear(
        torch.cat([stream[layer][0] for layer in range(3)], -1), weights["fc.weight"]
    )
    middle = {name.removeprefix("midlayer."): weight for name, weight in weights.items()}
    logits: list[Tensor] = []
    while len(logits) < len(embedded_TM):
        count = len(states_TM)
        x = torch.cat(
            [
                rms(embedded_TM[:count], middle["input_layernorm.weight"]),
                rms(states_TM, middle["hidden_norm.weight"]),
            ],
            -1,
        )
        q = rotated(linear(x, middle["self_attn.q_proj.weight"]).unflatten(-1, (6, 16)))
        k = rotated(linear(x, middle["self_attn.k_proj.weight"]).unflatten(-1, (2, 16)))
        v = linear(x, middle["self_attn.v_proj.weight"]).unflatten(-1, (2, 16))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 4.0
        unseen = torch.ones(count, count).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", softmax(scores.masked_fill(unseen, -torch.inf), -1), v)
        h = states_TM + linear(mixed.flatten(1), middle["self_attn.o_proj.weight"])
        y = rms(h, middle["post_attention_layernorm.weight"])
        gate = silu(linear(y, middle["mlp.gate_proj.weight"]))
        h = h + linear(
            gate * linear(y, middle["mlp.up_proj.weight"]), middle["mlp.down_proj.weight"]
        )
        found = linear(rms(h, weights["norm.weight"]), weights["lm_head.weight"])
        logits += found[len(logits) :]
        states_TM = torch.cat([states_TM, h[-1:]])
    return torch.stack(logits)


def with_eagle3(
    folder: Path, *, native: bool = False
) -> tuple[Model, Head, dict[str, Tensor], Any]:
    """A target and a head; the head's weights, and the target as transformers has it."""
    theirs = write_tiny("llama", folder).theirs
    target = build(json.loads((folder / "config.json").read_text()), native_formats=native)
    target.load_weights(read_tensors(folder).items())
    (folder / "head").mkdir()
    weights = eagle3(folder / "head")
    config = ModelConfig.from_hf(json.loads((folder / "head" / "config.json").read_text()))
    head = build_head(config, device=CPU, kernels=target.kernels, target=target)
    head.load_weights(read_tensors(folder / "head").items())
    return target, head, weights, theirs


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_eagle3_is_its_formula(tmp_path: Path, chunk: int) -> None:
    target, head, weights, theirs = with_eagle3(tmp_path)
    assert head.state_layers == (0, 1, 2)
    with torch.no_grad():
        wanted = eagle3_formula(weights, theirs)
    torch.testing.assert_close(ours(target, head, chunk), wanted, atol=1e-4, rtol=1e-4)
    ids = torch.arange(50)
    assert torch.equal(head.tokens(ids), ids + weights["d2t"])
    assert head.tokens(ids)[torch.arange(50)].tolist() == weights["t2d"].nonzero()[:, 0].tolist()


def next_token_formula(block: Any, weights: dict[str, Tensor], theirs: Any) -> Tensor:
    """The next layer's logits, over whole sequences, with the block as transformers has it."""
    embedded_TM = theirs.model.embed_tokens(torch.tensor(TOKENS[1:]))
    known = len(TOKENS) - OWN - 1
    # The last of these is behind the model's last norm.
    states_TM = theirs.model(torch.tensor([TOKENS[:known]])).last_hidden_state[0]
    logits: list[Tensor] = []
    while len(logits) < len(embedded_TM):
        count = len(states_TM)
        both = [
            rms(embedded_TM[:count], weights["enorm.weight"]),
            rms(states_TM, weights["hnorm.weight"]),
        ]
        x = linear(torch.cat(both, -1), weights["eh_proj.weight"])[None]
        positions = torch.arange(count)[None]
        unseen = torch.full((count, count), -torch.inf).triu(1)[None, None]
        x = block(
            x,
            attention_mask=unseen,
            position_ids=positions,
            position_embeddings=theirs.model.rotary_emb(x, positions),
        )[0]
        states = rms(x, weights["shared_head.norm.weight"])
        logits += theirs.lm_head(states)[len(logits) :]
        states_TM = torch.cat([states_TM, states[-1:]])
    return torch.stack(logits)


def with_next_token(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    native: bool = False,
    save: bool = False,
) -> tuple[Model, Head, Any, dict[str, Tensor], Any]:
    """A target and its next-token layer; the layer's block and other weights, and the target, as
    transformers has them."""
    # A checkpoint of one layer more, which is given to the head.
    layers = CONFIGS[name].num_hidden_layers
    longer = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "num_hidden_layers": layers + 1})
    monkeypatch.setitem(CONFIGS, name, longer)
    theirs = write_tiny(name, folder).theirs
    block, theirs.model.layers = theirs.model.layers[layers], theirs.model.layers[:layers]
    theirs.config.num_hidden_layers = layers
    features = theirs.config.hidden_size
    generator = torch.Generator().manual_seed(2)
    own = {
        "enorm.weight": torch.randn(features, generator=generator),
        "hnorm.weight": torch.randn(features, generator=generator),
        "eh_proj.weight": torch.randn(features, 2 * features, generator=generator) * 0.3,
        "shared_head.norm.weight": torch.randn(features, generator=generator),
        "embed_tokens.weight": theirs.model.embed_tokens.weight.detach(),
        "shared_head.head.weight": theirs.lm_head.weight.detach(),
    }
    tensors = read_tensors(folder)
    tensors |= {f"model.layers.{layers}.{key}": value for key, value in own.items()}
    hf_config = json.loads((folder / "config.json").read_text())
    hf_config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    if save:
        save_file(
            {k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(hf_config))
    target = build(hf_config, native_formats=native)
    target.load_weights(tensors.items())
    assert target.config.next_layers == 1
    head = build_head(target.config, device=CPU, kernels=target.kernels, target=target)
    head.load_weights(tensors.items())
    return target, head, block, own, theirs


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-apart", "glm4-moe"])
def test_a_next_token_layer_is_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    target, head, block, own, theirs = with_next_token(name, tmp_path, monkeypatch)
    with torch.no_grad():
        wanted = next_token_formula(block, own, theirs)
    torch.testing.assert_close(ours(target, head, chunk), wanted, atol=1e-4, rtol=1e-4)


def proposed(target: Model, head: Head, text: list[int], count: int) -> list[tuple[int, float]]:
    """What a head proposes behind a text, and the chances, each network run over all of it."""
    kept, own = HiddenStates(head.state_layers), HiddenStates((0,))
    of_target, of_head = Steps(target), Steps(head)
    of_target.run(text[:-1], kept)
    given = GivenStates(states_TF=kept.states(len(text) - 1), own=False)
    found: list[tuple[int, float]] = []
    tokens = text[1:]
    while len(found) < count:
        logits_V = of_head.run(tokens, own, given)[-1]
        token = int(head.tokens(logits_V.argmax()[None]))
        found.append((token, float(logits_V.softmax(-1).max())))
        given = GivenStates(states_TF=own.states(len(tokens))[-1:], own=True)
        tokens = [token]
    return found


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["eagle3", "deepseek-v3"])
def test_heads_propose_beside_their_target_what_they_propose_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, native: bool, cut: bool
) -> None:
    if name == "eagle3":
        target, head = with_eagle3(tmp_path, native=native)[:2]
    else:
        target, head = with_next_token(name, tmp_path, monkeypatch, native=native)[:2]
    runner = runner_of(target, head, CONFIG)
    if name == "eagle3":
        assert isinstance(runner._steps.recorded, StepGraph) == native
    users = Users(runner, CONFIG, seed=5)
    if cut:
        # As if grammars forbade all guesses that are wrong.
        texts = [greedy(target, list(prompt), OUTPUT) for prompt in PROMPTS]

        def taken(slot: int, guesses: list[int]) -> int:
            index = SLOTS.index(slot)
            right = texts[index][len(users.outputs[index]) :]
            pairs = zip(guesses, right, strict=False)
            return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])

        monkeypatch.setattr(runner._confinement, "taken", taken)
    users.run(most=4)
    checked = 0
    for prompt, output, of_user in zip(PROMPTS, users.outputs, users.proposed, strict=True):
        assert output == greedy(target, list(prompt), len(output))
        for length, (tokens, chances) in of_user.items():
            wanted = proposed(target, head, [*prompt, *output[:length]], len(tokens))
            assert tokens == [token for token, _ in wanted]
            assert chances == pytest.approx([chance for _, chance in wanted], abs=1e-4)
            checked += len(tokens)
    assert checked > 50
    runner.close()


def test_a_head_counts_no_weights_of_its_target(tmp_path: Path) -> None:
    tiny = write_tiny("llama", tmp_path)
    target = build(json.loads((tmp_path / "config.json").read_text()))
    weights = eagle3(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    head = build_head(config, device=CPU, kernels=target.kernels, target=target)
    own = [weight for name, weight in weights.items() if name not in ("d2t", "t2d")]
    assert tiny.theirs is not None
    assert head.weights_size_bytes == 4 * sum(weight.numel() for weight in own) + 8 * 50


def test_what_does_not_fit_a_head_is_said(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    llama_config = json.loads((tmp_path / "config.json").read_text())
    target = build(llama_config)
    with pytest.raises(UnsupportedModel, match="num_nextn_predict_layers"):
        build_head(target.config, device=CPU, kernels=target.kernels, target=target)
    eagle3(tmp_path)
    head_config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match="--speculate draft:PATH"):
        build(head_config)
    other = ModelConfig.from_hf(head_config | {"vocab_size": 300})
    with pytest.raises(UnsupportedModel, match="72 features and 300 tokens"):
        build_head(other, device=CPU, kernels=target.kernels, target=target)
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}
    other = ModelConfig.from_hf(head_config | {"eagle_config": layers})
    with pytest.raises(UnsupportedModel, match="states of three layers"):
        build_head(other, device=CPU, kernels=target.kernels, target=target)
    config = ModelConfig.from_hf(head_config)
    head = build_head(config, device=CPU, kernels=target.kernels, target=target)
    tensors = read_tensors(tmp_path)
    del tensors["fc.weight"]
    with pytest.raises(CorruptCheckpoint, match=r"missing: fc\.weight"):
        head.load_weights(tensors.items())
