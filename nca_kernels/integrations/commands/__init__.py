"""The commands of ``nca-kernels`` that need Hugging Face packages."""
