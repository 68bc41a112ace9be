"""PaliGemma in NumPy: the definition that the other two implementations are measured against.

README.md in this folder walks one picture and one prompt through it. Read the files leaf first:

    model/layers.py      the leaf functions: linear, norms, softmax, rotary embedding, attention
    model/siglip.py      the vision tower: picture -> patch features
    model/gemma.py       the decoder: token embeddings -> hidden states -> logits
    model/paligemma.py   the two joined: prefix-LM mask, prefill, decode, the training forward
    generate.py          the sampling loop over any engine that has prefill and decode

Axis letters, used in every docstring of the project:

    B batch    T query positions    S key positions    C cache capacity (S of a fixed buffer)
    N heads    K key/value heads    G = N / K queries that share one key head    H head dim
    D width    F hidden width of the MLP    P patches    V vocabulary rows
"""

__version__ = "0.1.0"
