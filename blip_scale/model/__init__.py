"""The network alone: torch and timm. Knows no rank, no file, no tokenizer, no recipe."""
