"""A model's tokenizer, read from Hugging Face files; imports no torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tokenspeed.core.errors import CorruptCheckpoint, InvalidParameter
from tokenspeed.loader.chat_template import ChatTemplate
from tokenspeed.loader.detokenizer import IncrementalDetokenizer, TokenBytes
from tokenspeed.loader.files import read_json_object
from tokenspeed.loader.special_tokens import SpecialTokens, special_texts, tokenizer_file

__all__ = ["Tokenizer"]


class Tokenizer:
    """Text to token ids and back, and conversations to text.

    Args:
        tokenizer_dir: folder with tokenizer.json and, where the model has them,
            tokenizer_config.json, generation_config.json, config.json and chat_template.jinja.

    Attributes:
        special: tokens that begin, end and fill up texts.
        bos_token_id, eos_token_ids, pad_token_id: each of them.
        vocab_size: token ids that the tokenizer knows.

    Raises:
        CorruptCheckpoint: a file is missing or damaged.
        UnsupportedModel: a decoder or a chat template that cannot be handled.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        path = tokenizer_file(tokenizer_dir)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            # The library raises plain Exception for whatever is wrong with a file.
            raise CorruptCheckpoint(f"{path} is no valid tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _optional(tokenizer_dir / "tokenizer_config.json")
        added = self._tokenizer.get_added_tokens_decoder()
        # Its state is its JSON; reading the whole file a second time would cost as much again.
        decoder: Any = self._tokenizer.decoder and json.loads(
            self._tokenizer.decoder.__getstate__()
        )
        self._bytes = TokenBytes(
            decoder,
            text_of=self._tokenizer.id_to_token,
            added={index: token.content for index, token in added.items()},
            special=frozenset(index for index, token in added.items() if token.special),
        )
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        marks = {index for index, token in added.items() if not token.content.isspace()}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is not None and (token := self._tokenizer.token_to_id(unknown)) is not None:
            marks.add(token)
        self._control = self._bytes.special | marks
        self.special = SpecialTokens.find(tokenizer_dir, self._tokenizer.token_to_id)
        self.bos_token_id = self.special.bos
        self.eos_token_ids = self.special.eos
        self.pad_token_id = self.special.pad
        texts = special_texts(config)
        # Some families' files say this beside a tokenizer.json that does not.
        self._adds_bos = config.get("add_bos_token") is True
        sources = _templates(tokenizer_dir, config)
        self._templates = {name: ChatTemplate(text, texts) for name, text in sources.items()}

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, by its text in the tokenizer's own spelling."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return bool(self._templates)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text, in which special tokens may be written out.

        Args:
            text: any text; a lone surrogate counts as U+FFFD.
            add_special: add what the model wants around every text, such as the token that begins
                it; a text that has that one written out gets no second one.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special)
        ids: list[int] = encoding.ids
        begins = self.bos_token_id
        if add_special and begins is not None:
            if ids[:2] == [begins, begins]:
                return ids[1:]
            if self._adds_bos and ids[:1] != [begins]:
                return [begins, *ids]
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id that the vocabulary lacks."""
        return self._bytes[token_id]

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are no text to a reader."""
        return self._bytes.special

    @property
    def control_token_ids(self) -> frozenset[int]:
        """Tokens that mean more than the text they are written as: special ones, tags such as that
        of a tool call, and what stands for unknown text."""
        return self._control

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        stream = self.incremental_detokenizer(skip_special=skip_special)
        return stream.push(token_ids) + stream.flush()

    def incremental_detokenizer(self, *, skip_special: bool = True) -> IncrementalDetokenizer:
        """A stream from token ids to text."""
        return IncrementalDetokenizer(self._bytes, skip_special=skip_special)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as the model's text, to be encoded without `add_special`.

        Args:
            messages: in the form of OpenAI's chat API.
            tools: likewise; None for none.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            InvalidParameter: the model has no chat template, or its template refuses.
        """
        template = (self._templates.get("tool_use") if tools else None) or self._templates.get(
            "default"
        )
        if template is None:
            raise InvalidParameter(
                "the model has no chat template; send it a plain prompt, or serve an instruct model"
            )
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the one that most models have is "default"."""
    if (folder / "chat_template.jinja").exists():
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = read_json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        named = (item for item in template if isinstance(item, dict))
        return {
            str(item["name"]): item["template"]
            for item in named
            if "name" in item and isinstance(item.get("template"), str)
        }
    if template is not None:
        raise CorruptCheckpoint(f"{folder} has a chat_template that is {json.dumps(template)[:80]}")
    return {}
