"""Tree search for routes that answer a prompt better, or with fewer layers, than the dense model (Dr.LLM's labels)."""
