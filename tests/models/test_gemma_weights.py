"""Gemma 3 on real weights of a GGUF file: logits against `transformers` on the same tensors."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.tiny import build
from tests.support.forward import Driver
from tokenspeed import LLM, SamplingParams, loader
from tokenspeed.execution import Runner

# Longer than the window of 512, so that layers that have one see less than the others.
TEXT = " ".join(f"The {n}th line of a page says that {n} and {n} are {2 * n}." for n in range(40))


@pytest.mark.slow
def test_logits_equal_those_of_transformers_beyond_the_window() -> None:
    files = loader.resolve("gemma-3-270m")
    checkpoint = loader.open_checkpoint(files)
    tensors = dict(checkpoint.tensors())
    tokens = loader.Tokenizer(files.tokenizer_dir).encode(TEXT)[:600]
    assert len(tokens) == 600
    config = AutoConfig.for_model(**checkpoint.hf_config)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = theirs.load_state_dict(tensors, strict=False, assign=True)
    theirs.tie_weights()
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0, -100:]
    model = build(checkpoint.hf_config)
    model.load_weights(tensors.items())
    logits = Driver(model).prefill(tokens, chunk=200)[-100:]
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    assert logits.argmax(-1).equal(expected.argmax(-1))


@pytest.mark.slow
def test_packed_weights_go_on_with_a_text() -> None:
    with LLM("gemma-3-270m", max_context=1024, max_running=2) as llm:
        params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
        (output,) = llm.generate("1, 2, 3, 4, 5, 6, 7, 8,", params)
        # Without the token that begins a text this model goes on with nothing sensible.
        begins = llm.info.bos_token_id
        assert begins is not None
        assert output.prompt_token_ids == [begins, *llm.tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8,")]
        assert output.completions[0].text.startswith(" 9, 10, 11")
        # One that is written out is not doubled, and token ids go as they are.
        (written,) = llm.generate("<bos>1, 2, 3, 4, 5, 6, 7, 8,", params)
        assert written.prompt_token_ids == output.prompt_token_ids
        (ids,) = llm.generate([output.prompt_token_ids[1:]], params)
        assert ids.prompt_token_ids == output.prompt_token_ids[1:]
        # Its steps are recorded, the scale of its embedding with them.
        runner = llm._core.runner
        assert isinstance(runner, Runner)
        assert runner._steps.recorded is not None
