"""vLLM as an inference engine: how its server is started, and how it is spoken to. vLLM itself is never imported."""
