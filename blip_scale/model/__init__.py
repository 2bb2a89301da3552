"""The network, built on torch and timm. It uses no ranks, files, tokenizers or recipes."""
