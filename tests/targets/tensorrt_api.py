"""The part of the TensorRT API that slimvit uses; a test compares it with the source and the installed module."""

from __future__ import annotations

from collections.abc import Mapping

API: Mapping[str, tuple[str, ...]] = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse", "parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "INetworkDefinition": ("num_layers", "get_layer", "num_inputs", "get_input", "get_flag"),
    "ILayer": ("type", "num_inputs", "get_input", "num_outputs", "get_output"),
    "ITensor": ("name", "shape", "dtype"),
    "IBuilderConfig": (
        *("add_optimization_profile", "profiling_verbosity", "get_flag", "set_flag", "hardware_compatibility_level"),
        *("create_timing_cache", "set_timing_cache", "get_timing_cache"),
    ),
    "ITimingCache": ("serialize",),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    "IOptimizationProfile": ("set_shape",),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        *("create_execution_context", "create_engine_inspector", "num_io_tensors"),
        *("get_tensor_name", "get_tensor_mode", "get_tensor_dtype"),
        *("create_serialization_config", "serialize_with_config"),
    ),
    "EngineInspector": ("get_engine_information",),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3"),
    "NetworkDefinitionCreationFlag": (),
    "ILogger": ("Severity",),
    "BuilderFlag": ("TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"),
    "Refitter": ("refit_cuda_engine",),
    "OnnxParserRefitter": ("refit_from_file", "refit_from_bytes"),
    "ISerializationConfig": ("clear_flag",),
    "SerializationFlag": ("EXCLUDE_WEIGHTS",),
    "ProfilingVerbosity": ("DETAILED",),
    "LayerInformationFormat": ("JSON",),
    "LayerType": ("MATRIX_MULTIPLY", "SHUFFLE", "CAST", "DEQUANTIZE", "SOFTMAX"),
    "TensorIOMode": ("INPUT",),
}
# Only where engines are built ahead of time.
API_AHEAD_OF_TIME: Mapping[str, tuple[str, ...]] = {
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": (),
}
