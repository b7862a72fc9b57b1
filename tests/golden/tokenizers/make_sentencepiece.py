#!/usr/bin/env python3
"""Trains three small SentencePiece models and writes what the `sentencepiece` package makes of texts.

    pip install sentencepiece==0.2.3
    apt-get download debian-handbook            # 11.20220922
    python tests/golden/tokenizers/make_sentencepiece.py debian-handbook_11.20220922_all.deb

Training text: the first 2,000 English and 2,000 Chinese paragraphs of the handbook's training chapters
(tests/models/handbook.py). Models, in folders of their own as tokenizer.model:
    bpe-ernie   BPE, byte fallback, no prefix, no normalization, white space kept, as ERNIE-4.5
    bpe-llama   BPE, byte fallback, a space put before the text, white space kept, as Llama
    unigram     unigram, NFKC and white space squeezed, unknown characters unknown, as T5
Beside each, texts.json: for each text its ids and what they decode to. And specials.json, by transformers 5.23.0
(pip install transformers==5.23.0): a tokenizer_config.json with tokens of its own, and texts in which they stand.
"""

import json
import random
import sys
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "models"))
import handbook  # noqa: E402

BASE = dict(split_digits=True, user_defined_symbols=["<mask:1>", "<mask:6>", "你好吗"],
            control_symbols=["<|begin|>"], unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
            minloglevel=2, character_coverage=0.995, max_sentence_length=8192)
BYTES = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
             remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, vocab_size=1700)
MODELS = {
    "bpe-ernie": dict(BYTES, add_dummy_prefix=False),
    "bpe-llama": dict(BYTES, add_dummy_prefix=True),
    "unigram": dict(model_type="unigram", normalization_rule_name="nmt_nfkc", vocab_size=1500),
}
TEXTS = [
    "", " ", "  ", "      ", " a", "a ", "  a  b   c    ", "\n", "\n\n\n", "\t", "a\tb\nc\r\nd",
    "The quick brown fox.", "Debian administrators install packages.", "你好", "你好吗?", "我们安装软件包。",
    "安装 Debian 系统 12.5 版", "混合 English 和中文 and 数字 1234567890", "3.14159", "2024年11月25日", "0", "007",
    "😀", "👩‍👩‍👧‍👦 family", "🇨🇳🇩🇪", "é", "e\u0301", "a\u0300\u0301\u0302b", "ﬁ ligature ﬀ", "ＡＢＣ　１２３", "①②③ ㎏ ㍿ ½",
    "ÅÅ Ω Ω", "한국어 각", "ｶﾞ ガ ハ\u309a", "\u200b zero\u200bwidth\u200d \ufeff", "\x00", "a\x00b", "\x01\x02\x1b[0m\x7f",
    "\u0085 \u2028 \u2029 \u3000 \u00a0x", "<s>", "</s>", "<unk>", "<mask:1>", "a<mask:1>b", "<mask:6> <mask:1>",
    "<mask:1", "<|begin|>", "<0x41>", "<0xE4>", "▁", "a▁b", "▁▁▁", "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the the", "THE Quick", "x" * 100, "的" * 40, "ab" * 64, " " * 33 + "x", "x" + " " * 40, "a  " * 20,
    "\u0e01\u0e33 \u0e40\u0e01\u0e49", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𠀀𠀁", "\U0010ffff", "\ue000",
    "https://www.debian.org/doc/?a=1&b=2#x", "if (x<1) { y = x*2; } // c", "C:\\dir\\file", "\"q\" 'q' “q” ‘q’ …—",
    "ſ ẞ ß İ ı", "Ǆ ǆ ǅ", "a\u0327\u0301 c\u0327", "\u0344\u0345", "\u1100\u1161\u11a8", "㌀㍻", "⑴⒈㈱", "™ © ®",
]


def fuzzed(count):
    """Strings of characters of many kinds, from a seed."""
    rng = random.Random(5)
    kinds = ["abcdefghij klmnopqrstuvwxyz", "   ", "0123456789", "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也",
             "\u0300\u0301\u0327\u0308\u3099", "éüñÅﬁ①㎏ＡＢｶﾞ½", "😀👍🏽‍", "\n\t\x01\u200b\u00a0\u3000", "<>mask:16|", "한글각가"]
    return ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


CONFIG = {
    "tokenizer_class": "Ernie4_5_Tokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
    "additional_special_tokens": ["<mask:1>", "<|begin|>"],
    "added_tokens_decoder": {
        "1700": {"content": "<|end|>", "special": True}, "1701": {"content": "<|end|>>", "special": True},
        "1702": {"content": "<|strip|>", "special": True, "lstrip": True, "rstrip": True},
        "1703": {"content": "extra word", "special": False},
    },
}
MARKED = ["<s>", "<s>Hello</s>", "a <|begin|> b", "<|begin|>User: 你好\nAssistant: <|end|>", "<|end|>><|end|>",
          "x  <|strip|>  y", "an extra word here", "<mask:1><mask:1>a", "extra extra word", "</s></s> </s>", "<|end|",
          " <s> ", "你好吗<s>你好吗", "<mask:6><s>", "plain", ""]


def marked(path):
    """What the slow tokenizers of transformers make of texts with special tokens in them."""
    from transformers import AddedToken
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
    decoder = {int(i): AddedToken(t["content"], special=t["special"], lstrip=t.get("lstrip", False),
                                  rstrip=t.get("rstrip", False), normalized=False)
               for i, t in CONFIG["added_tokens_decoder"].items()}
    slow = SentencePieceBackend(vocab_file=str(path), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                additional_special_tokens=CONFIG["additional_special_tokens"],
                                added_tokens_decoder=decoder)
    return [dict(text=text, ids=slow.convert_tokens_to_ids(slow.tokenize(text))) for text in MARKED]


def main():
    texts = handbook.load(deb=sys.argv[1])
    english, chinese = ([line for line in texts[f"train.{language}"].split("\n") if line.strip()]
                        for language in ("en", "zh"))
    lines = english[:2000] + chinese[:2000]
    samples = TEXTS + [line[:120] for line in english[2000:2010] + chinese[2000:2010]] + fuzzed(120)
    for name, options in MODELS.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        path = folder / "tokenizer.model"
        with open(path, "wb") as out:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out,
                                                     **(BASE | options))
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        rows = [dict(text=text, ids=model.encode(text), decoded=model.decode(model.encode(text)))
                for text in samples]
        lines_out = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
        (folder / "texts.json").write_text(f"[\n{lines_out}\n]\n")
        if name != "unigram":
            out = dict(config=CONFIG, texts=marked(path))
            (folder / "specials.json").write_text(json.dumps(out, indent=1) + "\n")
        print(name, model.vocab_size(), path.stat().st_size, "bytes", len(rows), "texts")


if __name__ == "__main__":
    main()
