"""What llama.cpp computes with, for run.py: which of its backends multiplies, and the control by weights, a file in which
nothing is left that a product could round activations for.
"""

import collections
import ctypes
import os
import re

PROBE = 64  # tokens, as run.py's prompts; the BLAS backend takes products of 32 and more
NODE = re.compile(r"^node #\s*\d+ \(\s*(MUL_MAT\w*)\):\s*(\S*) .*?\[\s*(\w+)", re.MULTILINE)


def decoded(source, target):
    """Writes `source`, a GGUF file, again with every tensor as F32, as gguf-py decodes it, and the same metadata.

    F32 weights are multiplied in F32 by every backend. F16 and BF16 tensors are widened too: with these llama.cpp rounds
    activations to their type. Returns how many tensors were quantized.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    floats = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    quantized = 0
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        quantized += tensor.tensor_type not in floats
        writer.add_tensor(tensor.name, values.reshape([int(side) for side in reversed(tensor.shape)]).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantized


def products(opened, path):
    """Which backend makes the products of a prompt, as llama.cpp's scheduler tells: a sentence.

    `opened(path)` is a new model. What is multiplied is a weight's product or one of attention, named `kq` and `kqv` there.
    """
    import llama_cpp

    os.environ["GGML_SCHED_DEBUG"] = "2"
    lines = []
    hear = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    try:
        model = opened(path)
        llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
        model.eval(list(range(5, 5 + PROBE)))
    finally:
        del os.environ["GGML_SCHED_DEBUG"]
        from llama_cpp import _logger
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    counts = collections.Counter()
    for operation, name, backend in NODE.findall("".join(lines)):
        kind = "of attention" if re.match(r"kqv?-\d", name) else "of experts" if operation == "MUL_MAT_ID" else "with weights"
        counts[f"{kind} by {backend}"] += 1
    assert counts, "the scheduler told of no product"
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), reverse=True))
