"""Token files in Megatron's .bin/.idx layout, made up from a seed: data for runs on machines that have none.

    python bench/gpu/tokens.py PREFIX --vocab 4096 --tokens 100000 [--seed 1]
"""

import argparse
import array
import json
import pathlib
import random
import struct
import sys

U16 = 8  # the index format's code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=pathlib.Path)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 2 <= args.vocab <= 65_500 or args.tokens < 2:
        parser.error("--vocab takes 2 to 65500, --tokens 2 or more")
    write(args.prefix, made_up(args.vocab, args.tokens, args.seed))


def made_up(vocab, count, seed):
    """Tokens of which every second one follows from the one before it: half of the loss can be learnt."""
    source = random.Random(seed)
    tokens = array.array("H", bytes(2 * count))
    for i in range(count):
        guessable = i % 2 == 1
        tokens[i] = (tokens[i - 1] * 7 + 3) % vocab if guessable else int(vocab * source.random() ** 2)
    return tokens


def write(prefix, tokens, end=None):
    """One document of unsigned 16-bit tokens; or many, each with token `end` at its end, which a manifest says."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if end is not None:
        told = {"version": 1, "documents": tokens.count(end), "tokens": len(tokens), "text_bytes": 0, "token_type": "u16", "vocab": max(tokens) + 1,
                "max_token": max(tokens), "unigram_entropy_nats": 0.0, "end_of_document": end, "tokenizer_xxh3": "", "tokens_xxh3": "",
                "not_utf8": 0, "unreadable": 0, "empty": 0}
        prefix.with_name(prefix.name + ".json").write_text(json.dumps(told))
    if sys.byteorder == "big":
        tokens.byteswap()
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, U16, 1, 2)
    index = struct.pack("<i", len(tokens)) + struct.pack("<q", 0) + struct.pack("<qq", 0, 1)
    prefix.with_name(prefix.name + ".idx").write_bytes(header + index)


if __name__ == "__main__":
    main()
