"""Responses from prompts: the torch engine (row batch, ragged decoder, KV cache) and vLLM.

May import: errors, config, algorithms, models, cpu.
Heavy packages: transformers, vllm.
"""
