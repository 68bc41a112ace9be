"""PaliGemma in NumPy: the definition that the other two implementations are measured against.

README.md in this folder walks one picture and one prompt through it. Read the files leaf first:

    model/layers.py      the leaf functions: linear, norms, softmax, rotary embedding, attention
    model/siglip.py      the vision tower: picture -> patch features
    model/gemma.py       the decoder: token embeddings -> hidden states -> logits
    model/paligemma.py   the two joined: prefix-LM mask, prefill, decode, the training forward
    engine.py            what an engine is: prefill, decode and what a caller must know of it; the reference as one
    generate.py          the sampling loop over any engine
    answer.py            from pictures and a prompt to text, boxes and masks

Axis letters, used in every docstring of the project:

    B batch    T query positions    S key positions    C cache capacity (S of a fixed buffer)
    N heads    K key/value heads    G = N / K queries that share one key head    H head dim
    D width    F hidden width of the MLP    P patches    V vocabulary rows
    B*N pictures, where a row has N of them (one as a rule)
"""

from . import interrupts

__version__ = "0.1.0"

if interrupts.is_command():
    interrupts.end_process()  # until `cli.run` begins
