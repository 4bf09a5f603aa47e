"""GGUF files for llama.cpp: architectures, tensors, tokenizer, and the file itself."""
