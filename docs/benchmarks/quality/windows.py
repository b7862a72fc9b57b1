"""Texts cut into windows of token ids, and models loaded so that nothing is missing.

Shared by the evaluation and by the statistics of layer inputs.  No window
overlaps another, none begins with a special token, and the cut is the same on
every run.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

CONTEXT = 512  # tokens in a window

logging.set_verbosity_error()
logging.disable_progress_bar()


def token_ids(folder, path):
    """The ids of a whole text file, no special tokens added."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return tokenizer.encode(Path(path).read_text(encoding="utf-8"), add_special_tokens=False).ids


def cut(ids, count, context=CONTEXT):
    """[count, context]: that many windows, spread evenly over the text."""
    available = len(ids) // context
    if available < count:
        raise ValueError(f"the text has {available} windows of {context} tokens, {count} are wanted")
    starts = [i * available // count * context for i in range(count)]
    return torch.tensor([ids[start : start + context] for start in starts])


def model(folder):
    """A model in f32.  A weight that is missing or left over is an error, not a warning."""
    result, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {k: sorted(v)[:3] for k, v in info.items() if v and k != "error_msgs"}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return result.eval()
