"""Tokenizers exported from GGUF files: the same ids as llama.cpp, and the same text back."""

import functools
import gzip
import json
import shutil
import unicodedata
from pathlib import Path

import gguf
import pytest
import tokenizers
from transformers import AutoTokenizer

from tests.data.tokenizers import record
from tests.data.tokenizers.strings import SEED, strings
from tests.unit.loader import tiny_gguf
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.loader.export import export_tokenizer
from tokenspeed.loader.gguf_file import GGUFFile

MODELS = ["smollm2-135m", "qwen2.5-coder-0.5b"]


@functools.cache
def _texts(name: str) -> list[str]:
    texts = strings(record.SPECIAL[name])
    assert len(texts) == 2000
    return texts


@functools.cache
def _recorded(name: str) -> tuple[list[list[int]], dict[int, list[int]]]:
    content = json.loads(gzip.decompress((record.HERE / f"{name}.json.gz").read_bytes()))
    return content["recognised"], {int(index): ids for index, ids in content["plain"].items()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, loader.ModelFiles]:
    fixture = {"smollm2-135m": "smollm2", "qwen2.5-coder-0.5b": "qwen_coder"}[request.param]
    return request.param, request.getfixturevalue(fixture)


def _differing(name: str, encoded: list[list[int]]) -> list[tuple[int, str]]:
    recorded, _ = _recorded(name)
    pairs = zip(_texts(name), encoded, recorded, strict=True)
    return [(index, text) for index, (text, a, b) in enumerate(pairs) if a != b]


def test_ids_are_those_of_llama_cpp(model: tuple[str, loader.ModelFiles]) -> None:
    name, files = model
    tokenizer = loader.Tokenizer(files.tokenizer_dir)
    encoded = [tokenizer.encode(text) for text in _texts(name)]
    assert _differing(name, encoded) == [], f"seed {SEED}"


def test_special_tokens_as_plain_text_give_the_ids_of_llama_cpp(
    model: tuple[str, loader.ModelFiles],
) -> None:
    name, files = model
    tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    _, plain = _recorded(name)
    assert len(plain) > 50
    for index, ids in plain.items():
        text = _texts(name)[index]
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, f"{index}: {text!r}"


def test_every_text_comes_back_whole(model: tuple[str, loader.ModelFiles]) -> None:
    name, files = model
    tokenizer = loader.Tokenizer(files.tokenizer_dir)
    for index, text in enumerate(_texts(name)):
        # Qwen2 composes characters before it splits, so that is the text that comes back.
        expected = unicodedata.normalize("NFC", text) if name in record.COMPOSED else text
        back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
        assert back == expected, f"{index} of seed {SEED}"


def test_a_stream_gives_the_text_piece_by_piece(model: tuple[str, loader.ModelFiles]) -> None:
    name, files = model
    tokenizer = loader.Tokenizer(files.tokenizer_dir)
    for index, text in enumerate(_texts(name)):
        ids = tokenizer.encode(text)
        stream = tokenizer.incremental_detokenizer(skip_special=False)
        pieces = [stream.push([token]) for token in ids]
        assert stream.flush() == ""
        whole = tokenizer.decode(ids, skip_special=False)
        assert "".join(pieces) == whole, f"{index} of seed {SEED}"
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces), f"{index} of seed {SEED}"


def test_the_exported_folder_loads_in_transformers(model: tuple[str, loader.ModelFiles]) -> None:
    name, files = model
    theirs = AutoTokenizer.from_pretrained(files.tokenizer_dir)
    encoded = [theirs.encode(text, add_special_tokens=False) for text in _texts(name)]
    assert _differing(name, encoded) == [], f"seed {SEED}"
    ours = loader.Tokenizer(files.tokenizer_dir)
    assert theirs.eos_token_id == ours.eos_token_ids[0]
    assert theirs.pad_token_id == ours.pad_token_id
    messages = [{"role": "user", "content": "<b>é</b>"}]
    assert theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == ours.render_chat(messages)


def test_the_stock_decoder_agrees_with_ours(model: tuple[str, loader.ModelFiles]) -> None:
    name, files = model
    stock = tokenizers.Tokenizer.from_file(str(files.tokenizer_dir / "tokenizer.json"))
    ours = loader.Tokenizer(files.tokenizer_dir)
    for ids in _recorded(name)[0]:
        # Cut anywhere, so that some end or begin within a character.
        cut = ids[len(ids) // 3 :]
        for skip in (True, False):
            assert ours.decode(cut, skip_special=skip) == stock.decode(
                cut, skip_special_tokens=skip
            )


def test_special_ids_are_found_without_the_vocabulary(
    model: tuple[str, loader.ModelFiles], tmp_path: Path
) -> None:
    _, files = model
    whole = loader.Tokenizer(files.tokenizer_dir).special
    assert loader.SpecialTokens.read(files.tokenizer_dir) == whole
    # A file that does not say what was added, or not what is looked for, is left to the library.
    folder = tmp_path / "tokenizer"
    shutil.copytree(files.tokenizer_dir, folder)
    content = (folder / "tokenizer.json").read_text()
    for damaged in (
        content.replace('"added_tokens"', '"other"'),
        content.replace('"added_tokens":', '"x": {"added_tokens": 3}, "added_tokens":', 1),
        content.replace('"content"', '"contents"'),
    ):
        (folder / "tokenizer.json").write_text(damaged)
        assert loader.SpecialTokens.read(folder) is None


def test_special_ids_and_sizes(smollm2: loader.ModelFiles, qwen_coder: loader.ModelFiles) -> None:
    small = loader.Tokenizer(smollm2.tokenizer_dir)
    assert (small.bos_token_id, small.eos_token_ids, small.pad_token_id) == (1, (2, 0), 2)
    assert small.vocab_size == 49152
    coder = loader.Tokenizer(qwen_coder.tokenizer_dir)
    assert coder.eos_token_ids == (151645, 151643)
    # The embedding's padding is no token, and text never becomes one.
    assert coder.vocab_size == 151665
    assert 151665 not in coder.encode("[PAD151665]")
    assert coder.decode([151665, 151935, 10**9]) == ""


def test_special_tokens_are_skipped_unless_asked_for(smollm2: loader.ModelFiles) -> None:
    tokenizer = loader.Tokenizer(smollm2.tokenizer_dir)
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>"


def test_half_a_character_is_held_back_and_in_the_end_replaced(
    smollm2: loader.ModelFiles,
) -> None:
    tokenizer = loader.Tokenizer(smollm2.tokenizer_dir)
    # U+10330 has no token of its own, so it is spelt in bytes.
    ids = tokenizer.encode("\U00010330")
    assert len(ids) > 1
    stream = tokenizer.incremental_detokenizer()
    assert [stream.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["\U00010330"]
    assert stream.push(ids[:1]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("on")) == "on"


def test_a_lone_surrogate_becomes_the_replacement_character(smollm2: loader.ModelFiles) -> None:
    tokenizer = loader.Tokenizer(smollm2.tokenizer_dir)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_a_damaged_tokenizer_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"no tokenizer\.json"):
        loader.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="no valid tokenizer: EOF"):
        loader.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(CorruptCheckpoint, match="no valid tokenizer"):
        loader.Tokenizer(tmp_path)


def _exported(path: Path) -> loader.Tokenizer:
    export_tokenizer(GGUFFile.open(path), path.parent)
    return loader.Tokenizer(path.parent)


def test_llama_3_keeps_whole_words_and_begins_texts(tmp_path: Path) -> None:
    tokenizer = _exported(tiny_gguf.write(tmp_path / "a.gguf", {}, pre="llama-bpe"))
    hello = tiny_gguf.TOKENS.index("hello")
    assert tokenizer.encode("hello") == [hello]
    assert tokenizer.encode("hello", add_special=True) == [tokenizer.bos_token_id, hello]


def test_what_begins_a_text_comes_once_wherever_it_is_said(tmp_path: Path) -> None:
    tokenizer = _exported(tiny_gguf.write(tmp_path / "a.gguf", {}, pre="llama-bpe"))
    begins, hello = tokenizer.bos_token_id, tiny_gguf.TOKENS.index("hello")
    assert begins is not None
    written = tokenizer.decode([begins], skip_special=False)
    assert tokenizer.encode(f"{written}hello", add_special=True) == [begins, hello]
    assert tokenizer.encode("hello") == [hello]
    # Files of some families say it in the configuration alone.
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert loader.Tokenizer(tmp_path).encode("hello", add_special=True) == [begins, hello]


def test_an_unknown_pre_tokenizer_names_the_supported_ones(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, pre="deepseek-llm")
    with pytest.raises(UnsupportedModel, match=r"'deepseek-llm'.*smollm, qwen2, llama-bpe"):
        _exported(path)


def _sentencepiece(path: Path, *, add_space_prefix: bool) -> Path:
    """A vocabulary where scores, not lengths, say what is merged first."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = ["ab", "bc", "\u2581a", "abc", "\u2581abc"]
    pieces += [(text, -1.0 - rank, 1) for rank, text in enumerate(merged)]
    pieces += [(text, -100.0, 1) for text in "\u2581abc"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    tokenizer = _exported(_sentencepiece(tmp_path / "a.gguf", add_space_prefix=False))
    first = 3 + 256
    # "ab" outscores "bc", and then "abc" beats "_a".
    assert tokenizer.encode("abc") == [first + 3]
    assert tokenizer.encode("bcab") == [first + 1, first]
    assert tokenizer.encode(" abc", add_special=True) == [1, first + 4]


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_text_comes_back_whole(tmp_path: Path, add_space_prefix: bool) -> None:
    tokenizer = _exported(_sentencepiece(tmp_path / "a.gguf", add_space_prefix=add_space_prefix))
    for text in ("abc", " abc  c", "é\U0001f600", "a\nb", "cab\tcab"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.incremental_detokenizer()
        assert "".join(stream.push([token]) for token in ids) + stream.flush() == text


@pytest.mark.slow
def test_gemma_ids_are_those_of_llama_cpp(tmp_path: Path) -> None:
    name = "gemma-3-270m"
    tokenizer_dir = tmp_path
    export_tokenizer(GGUFFile.open(loader.pull(name)), tokenizer_dir)
    tokenizer = loader.Tokenizer(tokenizer_dir)
    assert _differing(name, [tokenizer.encode(text) for text in _texts(name)]) == []
    for text in _texts(name):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
