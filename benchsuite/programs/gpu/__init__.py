"""The check of a machine with a CUDA device: laws, rates and memory measured there."""
