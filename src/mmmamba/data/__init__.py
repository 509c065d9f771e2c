"""Samples to batches: JSONL records, pictures and tiles, the prompt template, packing, the deterministic order."""
