"""Load a Hugging Face directory with `transformers` and print its logits, to check an export by hand.

    python tests/golden/hf_check.py DIR '[[1, 2, 3], [4, 5, 6]]'     tokens as JSON, one list per sequence
    python tests/golden/hf_check.py DIR --batch batch.json           the first batch of a golden
    python tests/golden/hf_check.py DIR --compare OTHER_DIR TOKENS   largest difference between two models

Prints {"model", "missing", "unexpected", "logits"} as JSON; exit status 1 if the weights do not cover the model.
"""

import argparse
import json
import pathlib
import sys

import torch
import transformers


def main():
    args = parse_args()
    tokens = torch.tensor(read_tokens(args))
    model, info = load(args.dir)
    out = {
        "model": type(model).__name__,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
    }
    logits = model(input_ids=tokens, use_cache=False).logits
    if args.compare:
        other, _ = load(args.compare)
        difference = logits - other(input_ids=tokens, use_cache=False).logits
        out["largest_difference"] = difference.abs().max().item()
        out["largest_logit"] = logits.abs().max().item()
    else:
        out["logits"] = logits.tolist()
    json.dump(out, sys.stdout)
    print()
    sys.exit(1 if out["missing"] or out["unexpected"] or out["mismatched"] else 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("tokens", nargs="?", help="JSON list of sequences, or one sequence")
    parser.add_argument("--batch", type=pathlib.Path, help="a golden's batch.json")
    parser.add_argument("--compare", type=pathlib.Path, help="a second model directory")
    args = parser.parse_args()
    if (args.tokens is None) == (args.batch is None):
        parser.error("give TOKENS or --batch, one of them")
    return args


def read_tokens(args):
    if args.batch:
        return json.loads(args.batch.read_text())[0]["tokens"]
    tokens = json.loads(args.tokens)
    return tokens if isinstance(tokens[0], list) else [tokens]


def load(folder):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    return model.eval(), info


if __name__ == "__main__":
    with torch.no_grad():
        main()
