"""Prompts to answers: prefill and decoding in batches, streaming, sampling, chat."""
