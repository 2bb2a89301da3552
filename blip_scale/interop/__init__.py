"""Readers and writers of other projects' weights: Hugging Face BLIP, Salesforce, BERT, timm."""
