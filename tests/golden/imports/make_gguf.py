#!/usr/bin/env python3
"""GGUF files that llama.cpp quantized, and what it says of them.

    pip install torch==2.15.0 gguf==0.19.0 tokenizers==0.23.3 sentencepiece safetensors==0.8.0 llama-cpp-python==0.3.36
    python tests/golden/imports/make_gguf.py

    gguf/blocks.safetensors   for each block type TYPE: TYPE/blocks, random weights quantized by ggml itself; TYPE/values, decoded
                              by gguf-py; ggml's own decoder is compared with that here
    gguf/model.gguf           a random Llama with a byte-level BPE tokenizer, quantized to Q4_K_M by llama.cpp
    gguf/model.safetensors    the first 64 rows of its decoded tensors under GGUF's names (by gguf-py), logits of llama.cpp for `ids`, and `text`
                              with its `tokens`
    gguf/pieces.gguf          a SentencePiece tokenizer and no tensors; pieces.safetensors has `text` and `tokens`
"""

import ctypes
import io
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

HERE = Path(__file__).parent / "gguf"
TYPES = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL]
TEXT = "It's 12345 tokens, isn't it?  Two  spaces\n\tand a tab; naïve 中文 🚀 — they've said so.\n\n"
CORPUS = [(Path(__file__).parents[3] / name).read_text("utf-8") for name in ("README.md", "docs/architecture.md", "docs/artifact.md")]
IDS = [1, 77, 190, 212, 42, 7, 130, 12, 248, 40, 99, 31]


def ggml():
    """ggml's functions, out of the library llama.cpp loaded."""
    folder = Path(llama_cpp.llama_cpp._lib._name).parent
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    return base


def blocks():
    base, tensors = ggml(), {}
    names = {T.Q2_K: "q2_K", T.Q3_K: "q3_K", T.Q4_K: "q4_K", T.Q5_K: "q5_K", T.Q6_K: "q6_K"}
    for number, kind in enumerate(TYPES):
        n, k = 3, 512
        values = np.random.default_rng(number).normal(0, 0.05, (n, k)).astype(np.float32)
        values[1, 64:96] = 0  # a block of zeros
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros((n, k // weights * size), np.uint8)
        wrote = base.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, n, k, None)
        assert wrote == out.nbytes, (kind, wrote)
        decoded = gguf.quants.dequantize(out, kind)
        own = np.zeros((n, k), np.float32)
        decode = getattr(base, f"dequantize_row_{names.get(kind, kind.name.lower())}")
        decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        decode(out.ctypes.data, own.ctypes.data, n * k)
        # The compiler may fuse a product and a sum in ggml; numpy never does.
        assert np.abs(own - decoded).max() <= 1e-6 * np.abs(decoded).max(), kind
        assert np.abs(decoded - values).max() < 0.2, kind
        tensors[f"{kind.name}/blocks"] = torch.from_numpy(out)
        tensors[f"{kind.name}/values"] = torch.from_numpy(decoded.copy())
    save_file(tensors, HERE / "blocks.safetensors")
    (HERE / "blocks.safetensors").chmod(0o644)


def bpe():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())["model"]


def paired(rows, heads):
    """Rows of a head as llama.cpp's converter orders them."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def quantized(source, target, kind):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0


def tokens(path):
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    data = TEXT.encode()
    return torch.tensor(model.tokenize(data, add_bos=True, special=True), dtype=torch.int32)


def model():
    random = np.random.default_rng(5)
    hidden, inner, vocab, heads, kv = 256, 256, 320, 4, 2
    head = hidden // heads
    made = bpe()
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "f32.gguf"
        writer = gguf.GGUFWriter(source, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(hidden)
        writer.add_block_count(1)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(vocab)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        texts = sorted(made["vocab"], key=made["vocab"].get)
        assert len(texts) == vocab
        writer.add_token_list(texts)
        writer.add_token_types([3 if i < 3 else 1 for i in range(vocab)])
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in made["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")

        def add(name, *shape, one=False):
            values = random.normal(0, 0.1 if one else 0.08, shape).astype(np.float32) + one
            if ".attn_q" in name or ".attn_k" in name:
                values = paired(values, shape[0] // head)
            writer.add_tensor(name, np.ascontiguousarray(values))

        add("token_embd.weight", vocab, hidden)
        add("output_norm.weight", hidden, one=True)
        for name, *shape in (("attn_q", hidden, hidden), ("attn_k", kv * head, hidden), ("attn_v", kv * head, hidden),
                             ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
                             ("ffn_down", hidden, inner)):
            add(f"blk.0.{name}.weight", *shape)
        add("blk.0.attn_norm.weight", hidden, one=True)
        add("blk.0.ffn_norm.weight", hidden, one=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        target = HERE / "model.gguf"
        quantized(source, target, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M)
    reader = gguf.GGUFReader(target)
    tensors = {f"values/{t.name}": torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)[:64].copy()) for t in reader.tensors}
    kinds = sorted({t.tensor_type.name for t in reader.tensors})
    # Logits from decoded weights in F32: llama.cpp rounds activations to 8 bits where weights are blocks.
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work) / "plain.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, 1, True
        assert llama_cpp.llama_model_quantize(str(target).encode(), str(plain).encode(), ctypes.byref(params)) == 0
        runner = llama_cpp.Llama(str(plain), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        runner.eval(IDS)
        logits = np.array(runner.scores[: len(IDS)], np.float32)
    tensors |= {"ids": torch.tensor(IDS, dtype=torch.int32), "logits": torch.from_numpy(logits.copy()),
                "text": torch.tensor(list(TEXT.encode()), dtype=torch.uint8), "tokens": tokens(target)}
    save_file(tensors, HERE / "model.safetensors")
    print(kinds, target.stat().st_size, "bytes")


def pieces():
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter("\n".join(CORPUS).splitlines()), model_writer=out, vocab_size=420,
                                             model_type="bpe", byte_fallback=True, num_threads=1)
    made = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    target = HERE / "pieces.gguf"
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    ids = range(made.vocab_size())
    writer.add_token_list([made.id_to_piece(i) for i in ids])
    writer.add_token_scores([made.get_score(i) for i in ids])
    kind = lambda i: 6 if made.is_byte(i) else 3 if made.is_control(i) else 2 if made.is_unknown(i) else 1
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    save_file({"text": torch.tensor(list(TEXT.encode()), dtype=torch.uint8), "tokens": tokens(target)}, HERE / "pieces.safetensors")
    print("pieces", target.stat().st_size, "bytes")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    blocks()
    model()
    pieces()
