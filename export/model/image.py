"""Pictures to pixel values as a graph: twin of `numpy_ref/image.py`, for hosts that have no Pillow.

ONNX Runtime's antialiased Resize is Pillow's filter where it is told so: half pixels, nothing from outside the picture,
and the cubic coefficient -0.5. On bytes its cubic kernel even rounds between the two passes as Pillow does.
"""

from onnx_ir import DataType, Value

from .layers import Op


def resize_bicubic(op: Op, image: Value, size: int) -> Value:
    """uint8 [B, 3, H, W] -> float32 [B, 3, S, S] of whole numbers, as transformers resizes."""
    return op.Cast(_resize(op, image, size, mode="cubic", cubic_coeff_a=-0.5), to=DataType.FLOAT)


def resize_bilinear(op: Op, image: Value, size: int) -> Value:
    """uint8 [B, 3, H, W] -> float32 [B, 3, S, S] of whole numbers, as big_vision resizes: cut off to bytes."""
    resized = _resize(op, op.Cast(image, to=DataType.FLOAT), size, mode="linear")
    return op.Floor(op.Clip(resized, 0.0, 255.0))


#: The two preprocessings by name, as in the reference.
RESIZES = {"bicubic": resize_bicubic, "bilinear": resize_bilinear}


def preprocess(op: Op, image: Value, size: int, resize: str = "bicubic") -> Value:
    """Bytes [H, W, 3] of any size -> pixel values [1, 3, S, S] in [-1, 1]."""
    channels_first = op.Unsqueeze(op.Transpose(image, perm=[2, 0, 1]), [0])
    return scale(op, RESIZES[resize](op, channels_first, size))


def scale(op: Op, pixels: Value) -> Value:
    """0 … 255 -> -1 … 1."""
    return op.Div(op.Sub(op.Div(pixels, 255.0), 0.5), 0.5)


def _resize(op, image, size, **filter_settings):
    """One axis, rounded to bytes, then the other.

    Pillow begins with the rows, unless the height shrinks by more than twice what the width does (since version 13).
    """
    batch, height, width = (op.Shape(image, start=axis, end=axis + 1) for axis in (0, 2, 3))
    down_first = op.Greater(op.Sub(height, [size]), op.Mul(op.Max(op.Sub(width, [size]), [0]), [2]))
    middle = op.Where(down_first, op.Concat([size], width, axis=0), op.Concat(height, [size], axis=0))
    for target in (op.Concat(batch, [3], middle, axis=0), op.Concat(batch, [3, size, size], axis=0)):
        image = op.Resize(
            image, None, None, target, antialias=1, exclude_outside=1,
            coordinate_transformation_mode="half_pixel", **filter_settings,
        )  # fmt: skip
    return image
