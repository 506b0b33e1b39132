"""A BPE with byte fallback as SentencePiece's `tokenizer.model`, which llama.cpp's converter reads for Gemma 3.

The file is a protocol buffer of four kinds of fields, written here without a library for it.
Source: google/sentencepiece, `src/sentencepiece_model.proto`.
"""

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE = 2
NO_ID = 2**64 - 1  # -1


def sentencepiece_file(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Collection[str], unknown: str
) -> bytes:
    """Return the file's content: a piece that two others merge into earlier has the higher score."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    pieces = [piece for piece, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    content = b"".join(
        _message(1, _text(1, piece) + _float(2, scores.get(piece, -1e4)) + _number(3, _kind(piece, special, unknown)))
        for piece in pieces
    )
    ids = {40: unknown, 41: "<bos>", 42: "<eos>", 43: "<pad>"}
    trainer = _number(3, BPE) + _number(4, len(pieces)) + _number(35, 1)
    trainer += b"".join(_number(field, vocabulary.get(piece, NO_ID)) for field, piece in ids.items())
    trainer += _text(45, unknown) + _text(46, "<bos>") + _text(47, "<eos>") + _text(48, "<pad>")
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)  # no space is added or taken out
    return content + _message(2, trainer) + _message(3, normalizer)


def all_splits(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Merges in their order, each with all other pairs that give the same piece, as SentencePiece merges them."""
    done: set[str] = set()
    for left, right in merges:
        piece = left + right
        if piece in done:
            continue
        done.add(piece)
        yield left, right
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair != (left, right) and pair[0] in vocabulary and pair[1] in vocabulary:
                yield pair


def _kind(piece: str, special: Collection[str], unknown: str) -> int:
    if piece == unknown:
        return UNKNOWN
    if piece in special:
        return CONTROL
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
