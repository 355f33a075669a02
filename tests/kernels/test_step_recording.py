"""Where a recorded step's inputs go, and which rows its kernels run for, without a model.

Legend: T tokens, R rows, S samples, X slots, P pages of a slot, V vocabulary.
"""

import numpy as np
import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.core.step import Int32Array
from tokenspeed.kernels.cpu import CpuRuntime, CpuSampling, StepRecording

TOKENS_MAX, ROWS_MAX, SAMPLES_MAX, SLOTS, PAGES, VOCABULARY = 9, 3, 4, 6, 5, 8


def ints(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)


class Inputs:
    """The memory a recording reads, of two cache groups, and a kernel on samples."""

    def __init__(self) -> None:
        # What is there before must not matter.
        self.token_ids_T = torch.full((TOKENS_MAX,), -7)
        self.positions_T = torch.full((TOKENS_MAX,), -7)
        self.query_starts = np.full(ROWS_MAX + 1, -7, dtype=np.int32)
        self.context_lens_R = np.full(ROWS_MAX, -7, dtype=np.int32)
        self.row_slots_R = np.full(ROWS_MAX, -7, dtype=np.int32)
        self.sampled_S = torch.full((SAMPLES_MAX,), -7)
        self.last_token_X = torch.arange(SLOTS) + 100
        self.kv_slots = [torch.full((TOKENS_MAX,), -7) for _ in range(2)]
        self.tables_XP = [torch.full((SLOTS, PAGES), -7, dtype=torch.int32) for _ in range(2)]
        self.logits_SV = torch.zeros(SAMPLES_MAX, VOCABULARY)
        self.chosen_S = torch.full((SAMPLES_MAX,), -7)

    def recording(self, runtime: CpuRuntime) -> StepRecording:
        return StepRecording(
            runtime,
            self.token_ids_T,
            self.positions_T,
            self.query_starts,
            self.context_lens_R,
            self.row_slots_R,
            self.sampled_S,
            self.last_token_X,
            list(zip(self.kv_slots, self.tables_XP, strict=True)),
        )


def test_a_plan_is_taken_in_and_its_tokens_become_the_last_of_their_slots() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    recording.begin()
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    assert recording.end(inputs.logits_SV, inputs.chosen_S)
    assert len(recording) == 1
    assert inputs.chosen_S.tolist() == [-7] * SAMPLES_MAX
    inputs.logits_SV[0, 5] = inputs.logits_SV[1, 2] = inputs.logits_SV[2, 3] = 1.0

    # A decode row, a chunk that nothing is sampled from, and the end of a prompt.
    tokens = np.full(2, -1, dtype=np.int32)
    groups = [
        (ints(31, 40, 41, 42, 7, 8), ints(4, 2, 2), ints(1, 0, 1), ints(11, 12, 13)),
        (ints(61, 70, 71, 72, 17, 18), ints(0, 4), ints(3, 4), ints(21, 22)),
    ]
    recording.run(
        1, ints(4, 2, 0), ints(0, 1, 4, 6), ints(20, 0, 9), ints(0, 1, 2, 3, 8, 9), ints(0, 2),
        groups, tokens, None,
    )  # fmt: skip
    assert inputs.token_ids_T.tolist() == [104, 1, 2, 3, 8, 9, -7, -7, -7]
    assert inputs.positions_T.tolist() == [20, 0, 1, 2, 9, 10, -7, -7, -7]
    assert inputs.query_starts.tolist() == [0, 1, 4, 6]
    assert inputs.context_lens_R.tolist() == [20, 0, 9]
    assert inputs.row_slots_R.tolist() == [4, 2, 0]
    assert inputs.sampled_S.tolist() == [0, 5, -7, -7]
    for (kv_slots, slots, indices, pages), kept, table_XP in zip(
        groups, inputs.kv_slots, inputs.tables_XP, strict=True
    ):
        assert kept.tolist() == [*kv_slots, -7, -7, -7]
        expected_XP = torch.full((SLOTS, PAGES), -7, dtype=torch.int32)
        expected_XP[slots, indices] = torch.from_numpy(pages)
        assert torch.equal(table_XP, expected_XP)
    # The third row of logits is no sample's.
    assert inputs.chosen_S.tolist() == [5, 2, -7, -7]
    assert tokens.tolist() == [5, 2]
    assert inputs.last_token_X.tolist() == [2, 101, 102, 103, 5, 105]


def test_of_a_row_with_a_draft_the_last_sample_that_counts_is_its_slots_last_token() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    recording.begin()
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    assert recording.end(inputs.logits_SV, inputs.chosen_S)
    for sample, token in enumerate((5, 2, 5, 3)):
        inputs.logits_SV[sample, token] = 1.0

    def run(draft: tuple[int, int]) -> list[int]:
        """A decode row with a draft of two tokens, a chunk of two of which the last is sampled."""
        tokens = np.full(4, -1, dtype=np.int32)
        recording.run(
            1, ints(4, 2), ints(0, 3, 5), ints(20, 6), ints(0, *draft, 1, 2), ints(0, 0, 0, 1),
            [], tokens, None,
        )  # fmt: skip
        assert tokens.tolist() == [5, 2, 5, 3]
        assert inputs.positions_T.tolist()[:5] == [20, 21, 22, 6, 7]
        assert inputs.sampled_S.tolist() == [0, 1, 2, 4]
        assert inputs.last_token_X[2] == 3
        return [int(inputs.last_token_X[4]), *inputs.token_ids_T.tolist()[:5]]

    # Wrong at once, and right behind, which does not count; right once; right to the end.
    assert run((4, 2)) == [5, 104, 4, 2, 1, 2]
    assert run((5, 1)) == [2, 5, 5, 1, 1, 2]
    assert run((5, 2)) == [5, 2, 5, 2, 1, 2]


def test_numbers_that_cannot_be_told_apart_are_refused() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    inputs.sampled_S = inputs.sampled_S[:ROWS_MAX]
    with pytest.raises(KernelError, match="most tokens, rows and samples must differ"):
        inputs.recording(runtime)


def test_a_kernel_on_another_number_of_rows_is_not_recorded() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    recording.begin()
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    _cpu.argmax(runtime, inputs.logits_SV[:2], inputs.chosen_S[:2])
    assert not recording.end(inputs.logits_SV, inputs.chosen_S)
    assert len(recording) == 0
    # Kernels run again.
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    assert inputs.chosen_S.tolist() == [0] * SAMPLES_MAX


def test_a_new_recording_takes_the_place_of_an_earlier_one() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    for _ in range(2):
        recording.begin()
        _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
        assert recording.end(inputs.logits_SV, inputs.chosen_S)
    assert len(recording) == 1


def test_more_samples_than_recorded_are_refused() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    recording.begin()
    assert recording.end(inputs.logits_SV, inputs.chosen_S)
    sampled = ints(*[0] * (SAMPLES_MAX + 1))
    tokens = np.zeros_like(sampled)
    with pytest.raises(KernelError, match="a step of 1 tokens, 1 rows and 5 samples"):
        recording.run(0, ints(1), ints(0, 1), ints(0), ints(5), sampled, [], tokens, None)
    assert inputs.token_ids_T.tolist() == [-7] * TOKENS_MAX


def test_a_sampler_chooses_within_the_step_and_its_tokens_become_the_last_of_their_slots() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    recording.begin()
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    assert recording.end(inputs.logits_SV, inputs.chosen_S)
    inputs.logits_SV[:2] = torch.arange(VOCABULARY) * 1.0
    sampler = CpuSampling(runtime, slots_max=SLOTS, vocabulary=VOCABULARY)
    likeliest = {
        "temperature": 0.0, "top_k": VOCABULARY, "top_p": 1.0, "min_p": 0.0, "seed": 0,
        "min_new_tokens": 0, "logprobs": None, "ends": [], "bias_ids": [], "bias_values": [],
        "repetition": 1.0, "presence": 0.0, "frequency": 0.0, "seen": None,
    }  # fmt: skip
    sampler.bind(4, **likeliest)
    sampler.bind(0, **likeliest | {"bias_ids": [1], "bias_values": [50.0], "logprobs": 1})
    tokens = np.full(2, -1, dtype=np.int32)
    report = (np.zeros(1, np.float32), np.zeros(1, np.int32), np.zeros(1, np.float32))
    plan = (2, ints(4, 0), ints(0, 1, 2), ints(20, 9), ints(0, 0), ints(0, 1),
            [(ints(31, 7), ints(), ints(), ints())] * 2)  # fmt: skip
    recording.run(*plan, tokens, (sampler, ints(3, 5), *report))
    last = VOCABULARY - 1
    assert tokens.tolist() == [last, 1]
    assert inputs.last_token_X.tolist() == [1, 101, 102, 103, last, 105]
    expected = inputs.logits_SV[1].log_softmax(-1)
    assert float(report[0][0]) == pytest.approx(float(expected[1]), rel=1e-6)
    assert report[1].tolist() == [last]
    # A report is wanted of as many rows as there is room for.
    with pytest.raises(KernelError, match="1 rows report log-probabilities"):
        recording.run(*plan, tokens, (sampler, ints(3, 5), *(np.zeros_like(a[:0]) for a in report)))
    with pytest.raises(KernelError, match="every sample needs one position"):
        recording.run(*plan, tokens, (sampler, ints(3), *report))


def test_a_sampler_refuses_what_its_slots_cannot_have() -> None:
    runtime = CpuRuntime(threads=1, isa=None)
    sampler = CpuSampling(runtime, slots_max=2, vocabulary=40)
    settings = {
        "temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "seed": 0,
        "min_new_tokens": 0, "logprobs": None, "ends": [], "bias_ids": [], "bias_values": [],
        "repetition": 1.0, "presence": 0.0, "frequency": 0.0, "seen": None,
    }  # fmt: skip
    with pytest.raises(KernelError, match="slot 2 of 2"):
        sampler.bind(2, **settings)
    for wrong in (
        {"ends": [40]},
        {"bias_ids": [-1], "bias_values": [0.0]},
        {"seen": (ints(40), ints())},
        {"seen": (ints(), ints(-1))},
    ):
        with pytest.raises(KernelError, match="is not among the 40 that logits have"):
            sampler.bind(0, **settings | wrong)
    with pytest.raises(KernelError, match="a bit for each of 40 tokens"):
        sampler.allow(0, torch.zeros(1, dtype=torch.int32))


def test_while_recording_a_watcher_is_told_where_the_operands_of_kernels_lie() -> None:
    runtime, inputs = CpuRuntime(threads=1, isa=None), Inputs()
    recording = inputs.recording(runtime)
    seen: list[int] = []
    recording.begin(seen.append)
    _cpu.argmax(runtime, inputs.logits_SV[1:], inputs.chosen_S[1:])
    _cpu.aside(runtime, inputs.positions_T, inputs.token_ids_T, lambda rows: None)
    expected = [inputs.logits_SV[1:], inputs.chosen_S[1:], inputs.positions_T, inputs.token_ids_T]
    assert list(dict.fromkeys(seen)) == [tensor.data_ptr() for tensor in expected]
    recording.end(inputs.logits_SV, inputs.chosen_S)
    seen.clear()
    _cpu.argmax(runtime, inputs.logits_SV, inputs.chosen_S)
    assert not seen
