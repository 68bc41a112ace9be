"""PaliGemma in PyTorch: the twin of `numpy_ref`, file by file and name by name, and where training happens."""
