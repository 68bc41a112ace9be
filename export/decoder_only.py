"""A bundle's decoder alone: prefill cut where the picture's features come in.

For comparison with runtimes that know the decoder and not the picture.
"""

import os

import onnx
from onnx import TensorProto, helper

from .paligemma import FEATURES
from .session import Session

FILE = "decoder.onnx"


def cut(folder) -> None:
    """Write beside a bundle's prefill graph the part of it that comes after the features."""
    model = onnx.load(os.path.join(folder, "prefill.onnx"), load_external_data=False)
    graph = model.graph
    needed, nodes = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output) and FEATURES not in node.output:
            nodes.append(node)
            needed.update(node.input)
    for field in (graph.initializer, graph.input):
        kept = [value for value in field if value.name in needed]
        del field[:]
        field.extend(kept)
    kept = nodes[::-1]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.input.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["B", "P", "D"]))
    onnx.save(model, os.path.join(folder, FILE))


class DecoderSession(Session):
    """A session whose prefill takes the features [B, P, D] that `cut` asks for in place of the picture."""

    picture = FEATURES

    def _io(self, name):
        io = super()._io(name)
        if io.pop("pixel_values", None) and name == "prefill":
            io[FEATURES] = (None, None, None)
        return io

    def _file(self, name):
        return self.bundle.path / FILE if name == "prefill" else super()._file(name)
