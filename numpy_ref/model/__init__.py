"""The model, leaf first: layers, siglip, gemma, paligemma."""
