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
    """The linear layers of a Llama or Ernie of these dimensions, built by vLLM with this configuration: (its name, layer, shards).

    A shard is (module of the checkpoint, shard id that the loader is told, or None). Of a block with experts the shared ones are
    here, as one pair of matrices.
    """
    heads, kv, hidden = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    size = config.get("head_dim") or hidden // heads
    for index in range(config["num_hidden_layers"]):
        attention, mlp, inner = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp", config["intermediate_size"]
        if index in with_experts(config):
            mlp, inner = f"{mlp}.shared_experts", config["moe_intermediate_size"] * config["moe_num_shared_experts"]
        options = {"bias": False, "params_dtype": dtype, "quant_config": quantization}
        qkv = QKVParallelLinear(hidden, size, heads, kv, prefix=f"{attention}.qkv_proj", **options)
        yield f"{attention}.qkv_proj", qkv, [(f"{attention}.{shard}_proj", shard) for shard in "qkv"]
        out = RowParallelLinear(heads * size, hidden, prefix=f"{attention}.o_proj", **options)
        yield f"{attention}.o_proj", out, [(f"{attention}.o_proj", None)]
        both = MergedColumnParallelLinear(hidden, [inner] * 2, prefix=f"{mlp}.gate_up_proj", **options)
        yield f"{mlp}.gate_up_proj", both, [(f"{mlp}.gate_proj", 0), (f"{mlp}.up_proj", 1)]
        down = RowParallelLinear(inner, hidden, prefix=f"{mlp}.down_proj", **options)
        yield f"{mlp}.down_proj", down, [(f"{mlp}.down_proj", None)]


def with_experts(config):
    """Numbers of the blocks with experts, every one of a range here."""
    assert config.get("moe_layer_interval", 1) == 1
    return range(config.get("moe_layer_start_index", 0), config.get("moe_layer_end_index", -1) + 1)


def experts(config, quantization, dtype):
    """The routed experts of each block that has some, as vLLM runs them, all in one layer: (name, layer)."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    get_current_vllm_config().compilation_config.static_forward_context.clear()  # names of the case before
    for index in with_experts(config):
        prefix = f"model.layers.{index}.mlp.experts"
        yield prefix, FusedMoEFactory(
            num_experts=config["moe_num_experts"], top_k=config["moe_k"], hidden_size=config["hidden_size"],
            intermediate_size=config["moe_intermediate_size"], params_dtype=dtype, renormalize=True, quant_config=quantization,
            prefix=prefix, router_logits_dtype=torch.float32)


def parts(layer, expert=None, prefix=""):
    """Parameters of a layer, or of one expert's `prefix`, by the name they have in a checkpoint."""
    if expert is None:
        return {name: value.data for name, value in layer.named_parameters()}
    own = ((name.removeprefix(prefix), value) for name, value in layer.named_parameters() if name.startswith(prefix))
    return {name: value.data[expert] for name, value in own}


def meaning(method):
    """(bits, middle code) of what a scheme or method of vLLM's has chosen; the middle is None where zero points are stored."""
    kinds = [getattr(each, "quant_type", None) for each in (method, getattr(method, "quant_config", None))]
    kind = next((kind for kind in kinds if kind is not None), None)
    if kind is None:  # INT8 as it is, or floats
        return 8, 0
    return kind.size_bits, kind.bias if kind.has_bias() else None


def decoded(parameters, n, k, bits, middle):
    """The weight (N, K) of these parameters in F32, by the functions with which vLLM itself unpacks in PyTorch.

    None of 3 bits, which its kernels alone unpack: the compressed-tensors that vLLM 0.33 pins takes ten codes to a word, vLLM's
    parameters are of the dense length.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    def product(codes, scales):
        return codes.float() * scales.float().repeat_interleave(k // scales.shape[1], dim=1)

    def wide(zeros):
        return zeros.repeat_interleave(k // zeros.shape[1], dim=1)

    if "weight_packed" in parameters:  # as in its CompressedTensorsWNA16.apply_weights
        if bits == 3:
            return None
        scales = parameters["weight_scale"]
        codes = unpack_from_int32(parameters["weight_packed"], bits, torch.Size((n, k))).int()
        if "weight_zero_point" in parameters:
            codes = codes - wide(unpack_from_int32(parameters["weight_zero_point"], bits, scales.shape, packed_dim=0).int())
        return product(codes, scales)
    if "qweight" not in parameters:
        weight = parameters["weight"]
        return product(weight, parameters["weight_scale"]) if weight.dtype == torch.int8 else weight.float()
    kind, scales, words = getattr(scalar_types, f"uint{bits}"), parameters["scales"].t(), parameters["qweight"]
    if middle is None:  # AWQ
        turned = torch.nn.Module()
        for name in ("qweight", "qzeros"):
            setattr(turned, name, torch.nn.Parameter(parameters[name].clone(), requires_grad=False))
        _convert_awq_to_standard_format(turned, "qweight", "qzeros", bits)
        words, middle = turned.qweight.data, wide(unpack_quantized_values_into_int32(turned.qzeros.data, kind, packed_dim=0))
    return product(unpack_quantized_values_into_int32(words, kind, packed_dim=0).t() - middle, scales)
