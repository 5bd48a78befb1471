"""TinyBERT's data augmentation: copies of texts in which words were replaced by others that fit (arXiv 1909.10351, Algorithm 1)."""
