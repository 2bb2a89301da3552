"""Read and write weights of other projects: Hugging Face BLIP, Salesforce files, BERT, timm."""
