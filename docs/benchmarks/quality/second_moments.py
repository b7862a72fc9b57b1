"""Second moments of the inputs of every linear layer, H = sum of x x^T, by torch.

    python second_moments.py --work DIR [--windows 128]

runs windows of DIR/calib.txt, spread evenly, through DIR/smollm2 and writes
DIR/hessians.safetensors: f32 matrices K x K, raw sums (not divided by
anything), for the four distinct inputs of each block

    model.layers.N.self_attn.qkv   input of q_proj, k_proj, v_proj
    model.layers.N.self_attn.o     input of o_proj
    model.layers.N.mlp.gate_up     input of gate_proj, up_proj
    model.layers.N.mlp.down        input of down_proj

and, in its metadata, the number of tokens.  The model is the unquantized base
throughout.  Sums are f32 over one window and f64 over windows.  It serves the
rows that other tools need an importance matrix for, and is a second opinion on
`qtool calibrate`.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import windows

WINDOWS = 128
INPUTS = {
    "self_attn.qkv": "self_attn.q_proj",
    "self_attn.o": "self_attn.o_proj",
    "mlp.gate_up": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
}


@torch.inference_mode()
def second_moments(model, ids, progress=lambda done: None):
    """{name: f64 matrix} over all tokens of all windows."""
    sums = {}

    def observer(name):
        def observe(_module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            moment = x.T @ x
            if name in sums:
                sums[name] += moment
            else:
                sums[name] = moment.double()

        return observe

    hooks = []
    for number, layer in enumerate(model.model.layers):
        for name, module in INPUTS.items():
            hook = observer(f"model.layers.{number}.{name}")
            hooks.append(layer.get_submodule(module).register_forward_pre_hook(hook))
    for done, window in enumerate(ids, 1):
        model.model(window[None], use_cache=False)
        progress(done)
    for hook in hooks:
        hook.remove()
    return sums


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", required=True, help="the benchmark's working folder")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows of 512 tokens (default 128)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    ids = windows.cut(windows.token_ids(work / "smollm2", work / "calib.txt"), args.windows)
    start = time.monotonic()

    def progress(done):
        if done % 8 == 0:
            print(f"{done} of {len(ids)} windows, {time.monotonic() - start:.0f} s", flush=True)

    sums = second_moments(windows.model(work / "smollm2"), ids, progress)
    metadata = {"tokens": str(ids.numel()), "windows": str(len(ids)), "context": str(ids.shape[1])}
    part = work / "hessians.part"
    save_file({name: matrix.float() for name, matrix in sums.items()}, part, metadata=metadata)
    part.chmod(0o644)
    part.rename(work / "hessians.safetensors")


if __name__ == "__main__":
    main()
