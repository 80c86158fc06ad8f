"""Export: a deploy model becomes an ONNX file, an engine, and a proof that each is still the same model."""
