"""Checkpoints from Hugging Face's form to megatron-core's and back, a tensor at a time, on the CPU alone."""
