"""Weights of others, in and out: Hugging Face BLIP, Salesforce's files, BERT, timm ViTs."""
