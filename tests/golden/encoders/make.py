#!/usr/bin/env python3
"""Makes the tiny random encoders of this folder, and what Hugging Face transformers computes with them.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/encoders/make.py

For each architecture: NAME/config.json and model.safetensors (F32), and NAME/golden.safetensors:
    ids.I, types.I, tasks.I   I64 (T): tokens of sequence I, their types (0 and 1), their task (ernie only)
    hidden.I                  F32 (T, hidden): last hidden states of that sequence run alone
    logits, padded_logits     F32 (sequences, labels): each alone, and all in one right-padded batch
    means, padded_means       F32 (sequences, hidden): mean over the tokens, likewise
And bert/tokenizer.json, a WordPiece tokenizer of 96 tokens, with bert/rows.json: texts and pairs, cut to several
lengths, and the ids and types that transformers gives them.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (BertConfig, BertForSequenceClassification, BertModel, ErnieConfig,
                          ErnieForSequenceClassification, RobertaConfig, RobertaForSequenceClassification)

HERE = Path(__file__).parent
COMMON = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64)
LABELS3 = {i: f"label {i}" for i in range(3)}
LABELS5 = {i: f"label {i}" for i in range(5)}
CASES = {
    "bert": (BertForSequenceClassification, BertConfig(**COMMON, id2label=LABELS3)),
    "bert-bare": (BertModel, BertConfig(**COMMON, hidden_act="gelu_new")),
    "ernie": (ErnieForSequenceClassification,
              ErnieConfig(**COMMON, use_task_id=True, task_type_vocab_size=3, id2label=LABELS5)),
    "roberta": (RobertaForSequenceClassification,
                RobertaConfig(**COMMON, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)),
}
LENGTHS = [23, 9, 40, 1]


def make(name, kind, config, seed):
    torch.manual_seed(seed)
    model = kind(config).eval()
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Larger than usual initial weights: attention and types must matter in the logits.
            value.copy_(torch.randn_like(value) * (0.3 if value.dim() < 2 else 0.15)
                        + ("LayerNorm.weight" in key))
    padding = config.pad_token_id
    tokens = [torch.randint(3, config.vocab_size, (n,)) for n in LENGTHS]
    types = [(torch.arange(n) >= n // 2).long() % config.type_vocab_size for n in LENGTHS]
    tasks = [torch.full((n,), i % 3) for i, n in enumerate(LENGTHS)]
    given = [dict(input_ids=ids, token_type_ids=kind_) for ids, kind_ in zip(tokens, types)]
    if name == "ernie":
        for row, task in zip(given, tasks):
            row["task_type_ids"] = task
    out = {}

    def logits(fields):
        return model(**fields).logits if hasattr(model, "classifier") else None

    width = max(LENGTHS)
    mask = torch.stack([(torch.arange(width) < n).long() for n in LENGTHS])
    padded = {key: torch.stack([torch.nn.functional.pad(row[key], (0, width - len(row[key])),
                                                        value=padding if key == "input_ids" else 0)
                                for row in given]) for key in given[0]}
    padded["attention_mask"] = mask
    with torch.no_grad():
        alone = [base(**{k: v[None] for k, v in row.items()}).last_hidden_state[0] for row in given]
        together = base(**padded).last_hidden_state
        for i, (row, hidden) in enumerate(zip(given, alone)):
            for key, short in [("input_ids", "ids"), ("token_type_ids", "types"), ("task_type_ids", "tasks")]:
                if key in row:
                    out[f"{short}.{i}"] = row[key].contiguous()
            out[f"hidden.{i}"] = hidden.contiguous()
        out["means"] = torch.stack([hidden.mean(0) for hidden in alone])
        weights = mask[..., None].float()
        out["padded_means"] = (together * weights).sum(1) / weights.sum(1)
        if logits(padded) is not None:
            out["logits"] = torch.cat([logits({k: v[None] for k, v in row.items()}) for row in given])
            out["padded_logits"] = logits(padded)
            assert (out["logits"] - out["padded_logits"]).abs().max() < 1e-4, name
            assert (out["logits"][0] - out["logits"][1]).abs().max() > 0.1, name
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    if name == "bert-bare":
        # Older checkpoints hold this buffer, and norms by the names TensorFlow has for their parts.
        tensors = load_file(folder / "model.safetensors")
        renamed = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                   for k, v in tensors.items()}
        assert len(renamed) == len(tensors) and renamed.keys() != tensors.keys()
        renamed["embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(out, folder / "golden.safetensors")
    print(name, sum(p.numel() for p in model.parameters()), "parameters", out["means"].shape)


WORDS = ("the a cat cats sat on mat dog ran un ##able ##s ##ed ##ing play a b c d e f g h i j k l m n o p q r s t u v w "
         "x y z ##a ##b ##c ##d ##e ##f 你 好 吗 我 是 , . ? ! 0 1 2 3 4 5 6 7 8 9").split()
TEXTS = ["", "The cat sat on the mat.", "Cats playing, unable? 12 ...", "你好吗 我 是 x", "\t a\nb  c é ü ☃",
         "dogs " * 30, "[MASK] a [SEP] b"]


def rows():
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = names + list(dict.fromkeys(WORDS))
    words += [f"[unused{i}]" for i in range(96 - len(words))]
    inner = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inner.add_special_tokens(names)
    inner.save(str(HERE / "bert" / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")
    out = []
    for a in TEXTS:
        for b in [None, *TEXTS]:
            for most in [5, 8, 13, 64]:
                # Lists, because an empty second text by itself counts as none.
                row = fast([a], None if b is None else [b], truncation=True, max_length=most,
                           return_token_type_ids=True)
                ids, types = row["input_ids"][0], row["token_type_ids"][0]
                assert len(ids) <= most and ids.count(3) >= (1 if b is None else 2)
                out.append(dict(a=a, b=b, most=most, ids=ids, types=types))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in out)
    (HERE / "bert" / "rows.json").write_text(f"[\n{lines}\n]\n")
    print(len(words), "tokens,", len(out), "rows")


if __name__ == "__main__":
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, (name, (kind, config)) in enumerate(CASES.items()):
        make(name, kind, config, seed)
    rows()
