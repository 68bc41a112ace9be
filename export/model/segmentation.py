"""The mask codec's decoder: twin of `numpy_ref/model/segmentation.py`. Hosts need no encoder."""

from onnx_ir import Value

from numpy_ref.model.layers import Params
from numpy_ref.model.segmentation import CELLS

from .layers import Op, conv, conv_transpose, relu


def res_block(op: Op, p: Params, x: Value) -> Value:
    """x + conv1(relu(conv3(relu(conv3(x))))): x [B, C, h, w] -> [B, C, h, w]."""
    hidden = relu(op, conv(op, x, **p["conv_0"], padding=1))
    hidden = relu(op, conv(op, hidden, **p["conv_1"], padding=1))
    return op.Add(x, conv(op, hidden, **p["conv_2"]))


def decoder(op: Op, p: Params, words: Value) -> Value:
    """Code words to masks: words [B, 4, 4, E] -> [B, 64, 64], positive inside."""
    x = relu(op, conv(op, op.Transpose(words, perm=[0, 3, 1, 2]), **p["input"]))
    for block in p["res"]:
        x = res_block(op, block, x)
    for stage in p["up"]:
        x = relu(op, conv_transpose(op, x, **stage, stride=2, padding=1))
    return op.Squeeze(conv(op, x, **p["output"]), [1])


def decode(op: Op, p: Params, codes: Value) -> Value:
    """Tokens to masks: codes [B, 16] in 0 … 127 -> [B, 64, 64]."""
    return decoder(op, p["decoder"], op.Reshape(op.Gather(p["codebook"], codes), [0, CELLS, CELLS, -1]))
