"""Responses from prompts: the contract of an engine (`engine_protocol`), the torch engine (row batch, ragged decoder, KV cache)
and vLLM.

May import: errors, tables, config, algorithms, models, cpu.
Heavy packages: transformers, vllm.
"""
