"""The stages of a run, one module each: name, inputs and work of a stage."""
