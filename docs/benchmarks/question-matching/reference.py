"""The same questions through Hugging Face transformers on the CPU, in three settings.

plain   a row for each prompt with each of its answers, in order, padded on the
        left, log-softmax over the whole vocabulary at every position
lean    a row for each prompt, both answers from its last position, whose
        logits alone are computed; rows sorted by length
cached  as lean, and the keys and values of the prefix that all prompts share
        are computed once

All in f32, in batches of the size given. Tokenizing counts, loading does not.
"""

import argparse
import copy
import json
import time
from os.path import commonprefix

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def batches(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]


def padded(rows, pad):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


def split(tokenizer, item):
    """Tokens of the prompt and of each answer, tokenized jointly."""
    prompt = tokenizer(item["prompt"])["input_ids"]
    joint = [tokenizer(item["prompt"] + a)["input_ids"] for a in item["answers"]]
    border = min(len(commonprefix([prompt, ids])) for ids in joint)
    return prompt[:border], [ids[border:] for ids in joint]


def plain(model, tokenizer, items, size):
    rows = [(i, context, own) for i, item in enumerate(items) for context, answers in [split(tokenizer, item)] for own in answers]
    out = [[] for _ in items]
    for batch in batches(rows, size):
        ids, mask = padded([context + own for _, context, own in batch], tokenizer.eos_token_id)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logp = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        for row, (i, _, own) in enumerate(batch):
            at = range(ids.shape[1] - len(own) - 1, ids.shape[1] - 1)
            out[i].append(sum(logp[row, p, t].item() for p, t in zip(at, own, strict=True)))
    return out


def lean(model, tokenizer, items, size, share=False):
    parts = [split(tokenizer, item) for item in items]
    assert all(len(own) == 1 for _, answers in parts for own in answers), "single-token answers"
    contexts = [context for context, _ in parts]
    shared = commonprefix(contexts)[: min(map(len, contexts)) - 1] if share else []
    cache = None
    if shared:
        cache = model(input_ids=torch.tensor([shared]), use_cache=True, logits_to_keep=1).past_key_values
    out = [None] * len(items)
    order = sorted(range(len(items)), key=lambda i: -len(contexts[i]))
    for batch in batches(order, size):
        ids, mask = padded([contexts[i][len(shared) :] for i in batch], tokenizer.eos_token_id)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + len(shared)
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(batch))
            mask = torch.cat([torch.ones((len(batch), len(shared)), dtype=torch.long), mask], 1)
        last = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, logits_to_keep=1)
        logp = last.logits[:, -1].log_softmax(-1)
        for row, i in enumerate(batch):
            out[i] = [logp[row, own[0]].item() for own in parts[i][1]]
    return out


SETTINGS = {
    "plain": plain,
    "lean": lean,
    "cached": lambda *args: lean(*args, share=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("questions")
    parser.add_argument("answers")
    parser.add_argument("--setting", choices=SETTINGS, default="plain")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    with open(args.questions, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    begun = time.perf_counter()
    found = SETTINGS[args.setting](model, tokenizer, items, args.batch)
    seconds = time.perf_counter() - begun
    with open(args.answers, "w") as file:
        file.writelines(json.dumps({"nats": nats}) + "\n" for nats in found)
    print(json.dumps({"questions": len(items), "seconds": seconds}))


if __name__ == "__main__":
    main()
