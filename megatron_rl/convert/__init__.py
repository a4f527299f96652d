"""Conversion of checkpoints between Hugging Face and megatron-core formats, one tensor at a time, on the CPU."""
