"""The tokenizer of a model in GGUF's keys, from its own files or from another GGUF of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera.runtime.errors import CameraError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TEMPLATE = "give a GGUF of the same model as template, whose tokenizer is then taken"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the patterns that tokenizer.json splits text by
SPLITS = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int, pre: str | None) -> None:
    """Write tokens, merges, special ids and chat template of a byte-level BPE tokenizer.

    vocabulary: rows of the embedding; ids that no token has become unused ones. pre: llama.cpp's
    name of the way text is split, where it can't be told from tokenizer.json. CameraError for
    other tokenizers.
    """
    from gguf import SpecialVocab

    path = folder / "tokenizer.json"
    if not path.exists():
        raise CameraError(f"{folder} has no tokenizer.json: {TEMPLATE}.")
    stored = json.loads(path.read_text())
    model = stored.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CameraError(f"{path} is no byte-level BPE tokenizer: {TEMPLATE}.")
    pre = pre or split_name(stored, path)
    tokens, kinds = _tokens(stored, vocabulary, path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if not model["merges"]:  # llama.cpp wants one: the text of this one is no token
        first, second = tokens[0], tokens[-1]
        writer.add_token_merges([f"{first} {second}"])
    special = SpecialVocab(folder, load_merges=bool(model["merges"]), n_vocab=len(tokens))
    special.add_to_gguf(writer, quiet=True)


def split_name(stored: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the way a tokenizer splits text; CameraError for one it can't be told."""
    before = stored.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    for step in steps:
        pattern = (step.get("pattern") or {}).get("Regex") if step.get("type") == "Split" else None
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise CameraError(
        f"how {path} splits text isn't known by name: set pre to llama.cpp's name of it (such as "
        f"deepseek-v3), or {TEMPLATE}."
    )


def _tokens(stored: dict[str, Any], vocabulary: int, path: Path) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in stored["model"]["vocab"].items()}
    kind = dict.fromkeys(by_id, NORMAL)
    for added in stored.get("added_tokens", []):
        by_id[added["id"]] = added["content"]
        kind[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(by_id) >= vocabulary:
        raise CameraError(f"{path} has {max(by_id) + 1} tokens, the embedding {vocabulary} rows.")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    return tokens, [kind.get(index, UNUSED) for index in range(vocabulary)]


def copy_tokenizer(writer: GGUFWriter, template: Path, vocabulary: int) -> None:
    """Write the tokenizer of another GGUF; CameraError if it has another number of tokens."""
    from gguf import GGUFReader, GGUFValueType

    try:
        fields = GGUFReader(template).fields
    except (OSError, ValueError, IndexError) as error:
        raise CameraError(f"template {template} can't be read as GGUF: {error}.") from error
    tokens = fields.get("tokenizer.ggml.tokens")
    found = len(tokens.data) if tokens else 0
    if found != vocabulary:
        raise CameraError(
            f"template {template} has {found} tokens and the model {vocabulary}: it is no GGUF of "
            "the same model."
        )
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
