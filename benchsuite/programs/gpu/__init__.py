"""The check of a machine with a CUDA device: laws, rates and memory that are measured there."""
