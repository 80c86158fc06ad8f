"""TensorRT and TensorRT for RTX: networks, builds, engines and their runs."""
