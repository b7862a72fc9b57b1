#!/usr/bin/env python3
"""Writes golden.json: ids the tokenizers library gives, texts transformers makes of conversations.

    pip install tokenizers==0.23.3 transformers==5.23.0
    python tests/golden/tokenizers/make.py
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "tiny-ernie45"
TEXTS = [
    "", " ", "  two  spaces ", "\n", "a\n\nb\t", "Debian is an operating system.", "DEBIAN", "naïve café",
    "e\u0301 combining", "12345 67.890", "3.14159e-10", "操作系统", "中文 and English 混合", "，。！？", "日本語のテキスト",
    "한국어", "😀", "👩‍👩‍👧‍👦 family", "𠮷野家", "\u200bzero width", "<s>", "</s>", "text <s> inside", "<unk>", "<pad>",
    "apt-get install -y foo", "https://example.org/a?b=c&d=%20", "#include <stdio.h>\nint main(){}", "\"quoted\" 'text'",
    "x" * 300, "ﬁ ligature", "ÅÄÖ", "\u00a0nbsp", "tab\tseparated\tvalues", "emoji 🎉🎊 and 中文 42", "…", "—–-",
    "Ωμέγα", "русский текст", "عربي", "\r\nwindows\r\n", "ends with space ",
]
TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}\n{% endfor %}"
             "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "system": "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
              "{% set rest = messages[1:] %}{% else %}{% set system = 'Be brief.' %}{% set rest = messages %}"
              "{% endif -%}\n{{ bos_token }}[{{ system }}]\n{%- for m in rest %}\n"
              "    {%- if m.role == 'user' %}\n        {{- 'Q: ' + m.content.strip() }}\n"
              "    {%- else %}\n        {{- 'A: ' ~ m.content | upper }}{{ eos_token }}\n    {%- endif %}\n"
              "    {%- if not loop.last %}{{ '|' }}{% endif %}\n{%- endfor %}"
              "{% if add_generation_prompt %}A:{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
                 "{% set ns.n = ns.n + 1 %}{{ ns.n }}. {{ m.content.split(' ')[0] }};{% endif %}{% endfor %}"
                 "{{ messages | length }} {{ messages[-1] | tojson }}",
}
TALKS = [
    [{"role": "user", "content": " Hello there "}],
    [{"role": "system", "content": " You are \"kind\". "}, {"role": "user", "content": "你好 <b>"},
     {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Bye & thanks"}],
]


def main():
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = [{"text": t, "plain": tokenizer.encode(t, add_special_tokens=False).ids,
            "special": tokenizer.encode(t, add_special_tokens=True).ids} for t in TEXTS]
    for item in ids:
        item["decoded"] = tokenizer.decode(item["plain"], skip_special_tokens=False)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    talks = []
    for name, template in TEMPLATES.items():
        for talk in TALKS:
            for prompt in (False, True):
                text = fast.apply_chat_template(talk, chat_template=template, tokenize=False,
                                                add_generation_prompt=prompt)
                talks.append({"name": name, "template": template, "messages": talk, "prompt": prompt, "text": text})
    out = {"ids": ids, "talks": talks}
    (HERE / "golden.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(len(ids), "texts", len(talks), "conversations")


if __name__ == "__main__":
    main()
