"""PaliGemma as ONNX graphs: the model files are laid out as in `numpy_ref`, and build nodes instead of arrays.

    layers.py siglip.py gemma.py paligemma.py   the same functions with `op` as their first argument
    graphs.py     inputs, outputs and weights around them: prefill and decode models
    weights.py    the shared weights file, written tensor by tensor
    bundle.py     the directory that a host is given
    session.py    running it
    batch.py      running it over a data set
    verify.py     proving it

`op.Add(x, y)` adds a node and returns its output value.
"""
