"""A bundle's decoder alone: prefill cut where the picture's features come in.

For comparison with runtimes that know the decoder and not the picture.
"""

from pathlib import Path

import onnx
from onnx.utils import Extractor

from ..model.paligemma import FEATURES
from ..session import Session

FILE = "decoder.onnx"


def cut(folder: Path) -> None:
    """Write beside a bundle's prefill graph the part of it that comes after the features."""
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    inputs, outputs = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    inputs[inputs.index(Session.picture)] = FEATURES
    onnx.save(Extractor(model).extract_model(inputs, outputs), folder / FILE)


class DecoderSession(Session):
    """A session whose prefill takes the features [B, P, D] that `cut` asks for in place of the picture."""

    picture = FEATURES

    def _io(self, name):
        io = super()._io(name)
        if name == "prefill":
            del io[Session.picture]
            io[FEATURES] = (None, self.config.vision.patches, self.config.text.width)
        return io

    def _file(self, name):
        return self.bundle.path / FILE if name == "prefill" else super()._file(name)
