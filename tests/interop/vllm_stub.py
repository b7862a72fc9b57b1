"""vLLM without a GPU, for vllm_config.py: its Python code, told that it runs on an NVIDIA GPU of capability 9.0.

What is put in place of what is not there: the modules of compiled kernels are empty; three questions to them (whether a kind of
product is supported) are answered with yes; the platform answers for an H100. Nothing that computes is replaced, and nothing
that computes can be called. One process is a world of its own (gloo), as vLLM needs one.
"""

import sys
import tempfile
import types
from pathlib import Path

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm import _custom_ops
from vllm.platforms import current_platform

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # as its Llama and Ernie say


def started():
    """vLLM's own settings as they are by default, to be made current with `set_current_vllm_config`."""
    settings = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(settings):
        world = Path(tempfile.mkdtemp(prefix="qtool-vllm-")) / "world"
        init_distributed_environment(1, 0, f"file://{world}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    for name in ("bitsandbytes", "compressed-tensors"):  # reads everything it registers, while there is no GPU
        try:
            get_quantization_config(name)
        except ValueError:
            pass
    for name in ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch"):
        sys.modules.setdefault(f"vllm.{name}", types.ModuleType(f"vllm.{name}"))
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "NVIDIA H100"

    questions = [name for name in dir(_custom_ops) if name.startswith("cutlass_scaled_mm_supports_")]
    assert len(questions) == 3, questions
    for name in questions:
        setattr(_custom_ops, name, lambda capability: True)
    assert not current_platform.is_cuda(), "this is for machines without a GPU"
    current_platform.__class__ = Hopper  # everything that has imported it sees the change
    assert current_platform.is_cuda() and current_platform.has_device_capability(90)
    return settings


def layers(config, quantization, dtype):
    """The linear layers of a Llama of these dimensions, built by vLLM with this configuration: (its name, layer, shards).

    A shard is (module of the checkpoint, shard id that the loader is told, or None).
    """
    heads, kv, hidden, inner = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"))
    size = config.get("head_dim") or hidden // heads
    for index in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        options = {"bias": False, "params_dtype": dtype, "quant_config": quantization}
        qkv = QKVParallelLinear(hidden, size, heads, kv, prefix=f"{attention}.qkv_proj", **options)
        yield f"{attention}.qkv_proj", qkv, [(f"{attention}.{shard}_proj", shard) for shard in "qkv"]
        out = RowParallelLinear(heads * size, hidden, prefix=f"{attention}.o_proj", **options)
        yield f"{attention}.o_proj", out, [(f"{attention}.o_proj", None)]
        both = MergedColumnParallelLinear(hidden, [inner] * 2, prefix=f"{mlp}.gate_up_proj", **options)
        yield f"{mlp}.gate_up_proj", both, [(f"{mlp}.gate_proj", 0), (f"{mlp}.up_proj", 1)]
        down = RowParallelLinear(inner, hidden, prefix=f"{mlp}.down_proj", **options)
        yield f"{mlp}.down_proj", down, [(f"{mlp}.down_proj", None)]


def decoded(layer, dtype=torch.float32):
    """The weight of a layer after loading, (N, K), by the functions with which vLLM itself unpacks in PyTorch.

    None of 3 bits, which its kernels alone unpack: the compressed-tensors that vLLM 0.33 pins takes ten codes to a word, vLLM's
    parameters are of the dense length.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    n, k = sum(layer.output_partition_sizes), layer.input_size

    def product(codes, scales):
        scales = scales.to(dtype)
        return codes.to(dtype) * scales.repeat_interleave(k // scales.shape[1], dim=1)

    parameters = {name: value.data for name, value in layer.named_parameters()}
    if "weight_packed" in parameters:  # as in its CompressedTensorsWNA16.apply_weights
        bits, scales = layer.scheme.num_bits, parameters["weight_scale"]
        if bits == 3:
            return None
        codes = unpack_from_int32(parameters["weight_packed"], bits, torch.Size((n, k))).int()
        if "weight_zero_point" in parameters:
            zeros = unpack_from_int32(parameters["weight_zero_point"], bits, scales.shape, packed_dim=0).int()
            codes = codes - zeros.repeat_interleave(k // zeros.shape[1], dim=1)
        return product(codes, scales)
    if "qweight" not in parameters:
        weight = parameters["weight"]
        return product(weight, parameters["weight_scale"]) if weight.dtype == torch.int8 else weight.to(dtype)
    method = layer.quant_method
    kind, scales = method.quant_type, parameters["scales"].t()
    if not kind.has_bias():  # AWQ
        _convert_awq_to_standard_format(layer, "qweight", "qzeros", kind.size_bits)
        zeros = unpack_quantized_values_into_int32(layer.qzeros.data, kind, packed_dim=0)
        bias = zeros.repeat_interleave(k // zeros.shape[1], dim=1)
    else:
        bias = kind.bias
    return product(unpack_quantized_values_into_int32(layer.qweight.data, kind, packed_dim=0).t() - bias, scales)
