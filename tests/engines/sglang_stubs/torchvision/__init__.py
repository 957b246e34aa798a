"""What SGLang imports of torchvision, whose wheel wants a CUDA PyTorch: names for text models, nothing that runs."""

__version__ = "0.0"
