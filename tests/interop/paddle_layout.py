"""A decoder of Paddle's interleaved INT8 and INT4 weights, learned from Paddle itself.

The CPU packages of Paddle (2.6.2 to 3.3.1 were looked at) register `weight_quantize` and neither
`weight_dequantize` nor `weight_only_linear`. But what `weight_quantize` does can be turned round: weights
of +-1 become the two outermost codes, so a matrix whose element i is +1 where bit b of i is set shows,
slot by slot, bit b of the element that lies there. As many matrices as i has bits give the whole
layout, and a ramp through the grid gives the number that stands for each code. Nothing of qtool's is used.
"""

import numpy as np
import paddle
from paddle.nn.quant import weight_quantize

TOP = {8: 127, 4: 7}


def _slots(values, width):
    """What `weight_quantize` stores for float values [K, N]: one unsigned number a code."""
    weight = paddle.to_tensor(values.astype("f4")).astype("bfloat16")
    out, _ = weight_quantize(weight, algo=f"weight_only_int{width}", arch=80)
    return split(out.numpy().tobytes(), width)


def split(raw, width):
    """Stored bytes -> one unsigned number a code; of two in a byte the lower bits first."""
    stored = np.frombuffer(raw, "u1")
    return stored if width == 8 else np.stack([stored & 15, stored >> 4], 1).ravel()


class Layout:
    """Where each code of a [K, N] weight lies, and what number stands for it."""

    def __init__(self, width, k, n):
        top, count = TOP[width], k * n
        index = np.arange(count).reshape(k, n)
        plus = _slots(np.ones((k, n)), width)
        minus = _slots(-np.ones((k, n)), width)
        assert np.all(plus == plus[0]) and np.all(minus == minus[0]) and plus[0] != minus[0]
        self.element = np.zeros(count, "i8")  # of each slot
        for bit in range(int(count - 1).bit_length()):
            seen = _slots(np.where(index >> bit & 1, 1.0, -1.0), width)
            assert np.all((seen == plus[0]) | (seen == minus[0]))
            self.element |= (seen == plus[0]).astype("i8") << bit
        assert np.array_equal(np.sort(self.element), np.arange(count)), "every element in one slot"
        ramp = (index // n) % (2 * top + 1) - top  # every column runs through the whole grid
        assert k >= 2 * top + 1
        seen = _slots(ramp, width)
        self.code = np.full(256, 999)
        self.code[seen] = ramp.ravel()[self.element]
        assert np.array_equal(self.code[seen], ramp.ravel()[self.element]), "one number a code"
        assert len(np.unique(seen)) == 2 * top + 1

    def codes(self, raw, width, k, n):
        """Stored bytes -> codes [K, N]."""
        codes = np.empty(k * n, "i8")
        codes[self.element] = self.code[split(raw, width)]
        assert np.all(codes != 999), "a number Paddle never writes"
        return codes.reshape(k, n)
