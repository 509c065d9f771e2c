"""What a model costs: latency, prefill, memory and throughput against the context, beside what the machine could do."""
