"""Room of mllm-msr."""
