"""ExecuTorch's programs: built from ONNX files, and run on the host by its Python runtime."""
