"""SGLang as an inference engine: how its server is started and spoken to. SGLang itself is never imported."""
